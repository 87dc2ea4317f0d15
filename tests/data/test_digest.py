"""What tells sets of examples apart: what is listed of them, wherever they lie."""

import random
from dataclasses import replace

from whisper_meft.data.digest import digest_of
from whisper_meft.data.examples import DatasetCell, Example


def clips(root: str) -> list[Example]:
    return [Example(f"{root}{label}/{number}.wav", label) for label in ("a", "b") for number in (1, 2)]


def test_where_data_lies_does_not_matter():
    found = {digest_of(clips(root)) for root in ("", "train/", "/data/corpus/train/", "../é/", "../e\u0301/")}
    assert len(found) == 1 and len(found.pop()) == 8
    rows = [
        [
            Example(DatasetCell(None, i, "audio"), "a", name=f"row {i} of {place} (train), {i}.wav")
            for i in (0, 1)
        ]
        for place in ("user/corpus", "/elsewhere/data")
    ]
    assert digest_of(rows[0]) == digest_of(rows[1]) != digest_of(rows[0][:1])
    assert digest_of([]) != digest_of(rows[0][:1])


def test_what_is_listed_of_a_clip_matters():
    before = clips("train/")
    found = {digest_of(before)}
    for change in (
        {"name": "train/a/3.wav"},
        {"label": "b"},
        {"text": "said"},
        {"start": 1.0},
        {"stop": 2},
        {"start": 1, "unit": "samples"},
        {"channel": 0},
        {"window": (0.0, 1.0)},
    ):
        found.add(digest_of([replace(before[0], **change), *before[1:]]))
    assert len(found) == 9
    assert digest_of(before) != digest_of(before[1:])
    assert digest_of([replace(before[0], start=1, stop=2)]) == digest_of(
        [replace(before[0], start=1.0, stop=2.0)]
    )
    # What is found out about it does not.
    assert digest_of([replace(each, seconds=1.0, speaker="s") for each in before]) == digest_of(before)


def test_their_order_matters_where_it_is_asked_for():
    mixed = clips("train/")
    random.Random(3).shuffle(mixed)
    assert mixed != clips("train/") and digest_of(mixed) == digest_of(clips("train/"))
    assert digest_of(mixed, in_order=True) != digest_of(clips("train/"), in_order=True)
