"""Answers as HTML: what is shown, and that text from outside does nothing."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from whisper_meft.app import drawing
from whisper_meft.app.hearing import Classified, Transcribed
from whisper_meft.evaluation.generating import Segment, Transcript
from whisper_meft.evaluation.timeline import ClassifiedSegment, Timeline

VOID = {"img", "path"}


class Page(HTMLParser):
    """Elements and text of a part of a page, which must be well formed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def timeline(rows, seconds, window=2.0, labels=("a", "b", "c")):
    rows = np.asarray(rows, np.float32)
    starts = np.arange(len(rows)) * (seconds - window) / max(1, len(rows) - 1)
    segments = [
        ClassifiedSegment(
            float(at),
            float(at + window),
            None if np.isnan(row).any() else labels[int(row.argmax())],
            row,
        )
        for at, row in zip(starts, rows)
    ]
    whole = np.nanmean(rows, 0)
    return Timeline(labels, seconds, segments, labels[int(whole.argmax())], whole)


def classified(rows, seconds=2.0, threshold=None, label=None, **options):
    found = timeline(rows, seconds, **options)
    return Classified(found, label or found.label, threshold)


def test_the_most_probable_classes_as_bars():
    page = Page(drawing.answer(classified([[0.1, 0.6, 0.3]]), 2))
    assert page.text.startswith("b b 60.0% c 30.0% 1 more class has 10.0%.")
    assert [each["style"] for each in page.all("div") if "style" in each] == ["width:60.00%", "width:30.00%"]
    assert [each.get("class") for each in page.all("tr")] == ["best", None]
    assert not page.all("svg") and "2.0 seconds were heard." in page.text


def test_more_bars_than_classes_are_all_of_them():
    page = Page(drawing.answer(classified([[0.1, 0.6, 0.3]]), 50))
    assert "a 10.0%" in page.text and "more class" not in page.text


def test_what_is_rejected_has_no_best_class():
    page = Page(drawing.answer(classified([[0.1, 0.6, 0.3]], threshold=0.75, label="none of these"), 3))
    assert page.text.startswith("none of these The most probable class has 60.0%, less than the 75.0% that")
    assert not any("class" in each for each in page.all("tr"))


def strips(page):
    """Of each strip the columns that are said and the others: left, right and height, from 0 to 1."""
    found = []
    for name, attributes in page.elements:
        if name == "svg":
            found.append({})
        elif name == "path":
            parts = re.findall(r"M([\d.]+) 100V([\d.]+)H([\d.]+)V100z", attributes["d"])
            assert "".join(f"M{a} 100V{b}H{c}V100z" for a, b, c in parts) == attributes["d"]
            columns = [(float(a) / 1000, float(c) / 1000, 1 - float(b) / 100) for a, b, c in parts]
            found[-1][attributes["class"]] = columns
    return found


def test_probabilities_over_time():
    rows = [[0.9, 0.1, 0.0], [0.4, 0.5, 0.1], [0.0, 0.2, 0.8]]
    page = Page(drawing.answer(classified(rows, 4.0), 3))
    a, c, b = strips(page)  # in the order of the bars
    assert a["said"] == [pytest.approx((0, 0.375, 0.9), abs=1e-3)]
    assert a["other"] == [pytest.approx((0.375, 0.625, 0.4), abs=1e-3)]  # and nothing where there is nothing
    assert b["said"] == [pytest.approx((0.375, 0.625, 0.5), abs=1e-3)]
    assert [each[2] for each in b["other"]] == pytest.approx([0.1, 0.2])
    assert c["said"] == [pytest.approx((0.625, 1, 0.8), abs=1e-3)]
    assert "4.0 seconds were heard, in 3 windows of 2 s, one every 1 s." in page.text
    assert "0:00 to 0:02 a 90.0% 0:02 to 0:02 b 50.0% 0:02 to 0:04 c 80.0%" in page.text


def test_how_often_a_window_begins_is_not_told_of_two():
    """The second ends with the recording, and begins one second behind the first, which the hop is not."""
    page = Page(drawing.answer(classified([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]], 3.0), 3))
    assert "3.0 seconds were heard, in 2 windows of 2 s. The height is the probability" in page.text


def test_windows_below_the_threshold_and_silent_ones_are_none():
    rows = [[0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [np.nan] * 3, [0.9, 0.1, 0.0], [0.7, 0.3, 0.0]]
    page = Page(drawing.answer(classified(rows, 10.0, threshold=0.6), 3))
    a = strips(page)[0]
    assert [each[2] for each in a["said"]] == pytest.approx([0.9, 0.9, 0.7])
    assert [each[2] for each in a["other"]] == pytest.approx([0.5])
    lines = page.text.partition("time class probability ")[2]
    assert lines == (
        "0:00 to 0:02 a 90.0% 0:02 to 0:04 (not sure enough) 50.0% 0:04 to 0:06 (nothing can be heard) "
        "0:06 to 0:10 a 80.0%"
    )


def test_an_hour_is_drawn_in_columns_that_can_be_seen():
    generator = np.random.default_rng(0)
    rows = generator.dirichlet([0.3] * 3, 7199)
    heard = classified(rows, 3600.0, window=1.0)
    text = drawing.answer(heard, 3)
    page = Page(text)
    columns = [sorted(each["said"] + each["other"]) for each in strips(page)]
    assert all(500 < len(each) <= 600 for each in columns) and len(text) < 400_000
    for index, each in zip(np.argsort(-heard.timeline.probabilities), columns):
        area = sum((right - left) * height for left, right, height in each)
        assert area == pytest.approx(rows[:, index].mean(), abs=0.01)
    assert re.search(r" and \d+ more lines$", page.text) and len(page.all("tr")) < 520
    marks = [each["style"] for each in page.all("span")]
    assert marks[0] == "left:0.00%" and 4 <= len(marks) <= 8 and "0:50:00" not in page.text


def test_names_and_messages_do_nothing():
    evil = '<img src=x onerror="alert(1)">\x1b[31m\u202e&amp;'
    labels = (evil, "b", "c")
    rows = [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1]]
    parts = [
        drawing.answer(classified(rows, 4.0, labels=labels), 3),
        drawing.answer(classified(rows, 4.0, labels=labels, threshold=0.99, label=evil), 3),
        drawing.answer(Transcribed(1.0, Transcript(evil, (Segment(0.0, 1.0, evil),))), 3),
        drawing.failure(evil),
        drawing.heading(evil, evil),
        drawing.note(evil),
    ]
    for part in parts:
        page = Page(part)
        assert not page.all("img") and "<img" not in part and "\x1b" not in part and "\u202e" not in part
        assert r'<img src=x onerror="alert(1)">\x1b[31m\u202e&amp;' in page.text


def test_transcripts():
    segments = (Segment(0.0, 2.5, "well"), Segment(2.5, 61.0, "then"))
    page = Page(drawing.answer(Transcribed(61.0, Transcript("well then", segments)), 5))
    assert page.text.startswith("well then 61.0 seconds were heard. Over time time text")
    assert page.text.endswith("0:00 to 0:02 well 0:02 to 1:01 then")
    broken = Page(drawing.answer(Transcribed(1.0, Transcript("", complete=False)), 5))
    assert broken.text.startswith("No words were heard. It breaks off")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.6, "1:00:00"), (7325, "2:02:05")]
)
def test_times(seconds, shown):
    assert drawing.clock(seconds) == shown
