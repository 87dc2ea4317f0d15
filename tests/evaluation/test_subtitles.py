"""Subtitles by the rules of their formats, and names of output files that never meet."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper_meft.evaluation.generating import Segment, Transcript
from whisper_meft.evaluation.subtitles import as_srt, as_txt, as_vtt, output_names

SPOKEN = Transcript(
    "a b",
    (
        Segment(0.0, 1.5, "a & <b> --> c"),
        Segment(59.9996, 60.0, "line\n\nend\x00\u2028 here"),
        Segment(3599.999, 3661.04, "an hour"),
        Segment(360000.0, 360001.0, "a hundred"),
    ),
)


def test_subrip():
    assert as_srt(SPOKEN) == (
        "1\n00:00:00,000 --> 00:00:01,500\na & <b> -> c\n\n"
        "2\n00:01:00,000 --> 00:01:00,000\nline end here\n\n"
        "3\n00:59:59,999 --> 01:01:01,040\nan hour\n\n"
        "4\n100:00:00,000 --> 100:00:01,000\na hundred\n"
    )
    assert as_srt(Transcript("")) == ""
    longer = Transcript("", (Segment(0.0, 1.0, "a ---> b ----> c --x>"),))
    assert as_srt(longer) == "1\n00:00:00,000 --> 00:00:01,000\na -> b -> c --x>\n"


def test_webvtt():
    assert as_vtt(SPOKEN) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na &amp; &lt;b&gt; --&gt; c\n\n"
        "00:01:00.000 --> 00:01:00.000\nline end here\n\n"
        "00:59:59.999 --> 01:01:01.040\nan hour\n\n"
        "100:00:00.000 --> 100:00:01.000\na hundred\n"
    )
    assert as_vtt(Transcript("")) == "WEBVTT\n"


def test_text():
    assert as_txt(SPOKEN).splitlines() == ["a & <b> --> c", "line end here", "an hour", "a hundred"]
    assert as_txt(Transcript("one\nline")) == "one line\n"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(), max_size=5))
def test_any_text_that_shows_is_one_cue(texts):
    segments = tuple(Segment(i, i + 1, text) for i, text in enumerate(texts))
    times = re.compile(r"^(\d\d:\d\d:\d\d[.,]\d{3}) --> (\d\d:\d\d:\d\d[.,]\d{3})$", re.MULTILINE)
    for write in (as_srt, as_vtt):
        written = write(Transcript("", segments))
        said = [text for text in texts if as_txt(Transcript(text)).strip()]
        assert len(times.findall(written)) == written.count("-->") == len(said)
        assert "\n\n\n" not in written and "\r" not in written


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["/r/one.wav", "/r/two.wav"], ["one", "two"]),
        (["/r/a/x.wav", "/r/b/x.wav", "/r/b/y.wav"], ["a/x", "b/x", "y"]),
        (["/r/x.wav", "/r/x.mp3"], ["x.wav", "x.mp3"]),
        (["/r/x.wav", "/r/sub/X.wav"], ["x", "sub/X"]),
        (["/r/X.wav", "/r/x.mp3"], ["X.wav", "x.mp3"]),
        (["/r/x.wav", "/r/x.mp3", "/r/x.wav.flac"], ["x.wav", "x.mp3", "x.wav.flac"]),
        (["/r/a/x.wav", "/r/a/./x.wav"], ["x", "x"]),  # one recording, named in two ways
        (["/r/e\u0301.wav", "/r/sub/\u00e9.wav"], ["e\u0301", "sub/\u00e9"]),
        (["/only.wav"], ["only"]),
        (["/r/.wav"], [".wav"]),
        (["/r/part.1.wav", "/r/part.2.wav"], ["part.1", "part.2"]),
    ],
)
def test_names_of_output_files(files, names):
    assert output_names(files) == [Path(name) for name in names]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.from_regex(r"\A([abA]/){0,2}[abA](\.[abA]){0,2}\.(wav|a)\Z"), min_size=1, max_size=8))
def test_no_two_recordings_share_an_output(files):
    files = sorted({file.casefold(): file for file in files}.values())
    names = output_names(files)
    assert len({str(name).casefold() for name in names}) == len(files)
    assert not any(name.is_absolute() or ".." in name.parts for name in names)
    # Alone each keeps its own name.
    assert all(output_names([file]) == [Path(os.path.basename(file)).with_suffix("")] for file in files)
