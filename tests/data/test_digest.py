"""What tells sets of examples apart: what is listed of them, wherever they lie."""

import random
from dataclasses import replace

import pytest
from data_fixtures import write
from datasets import Audio, Dataset
from streaming_fixtures import make_shards, sound, tar
from whisper_meft.data import load_examples
from whisper_meft.data.digest import digest_of
from whisper_meft.data.examples import Example


def clips(root: str) -> list[Example]:
    return [Example(f"{root}{label}/{number}.wav", label) for label in ("a", "b") for number in (1, 2)]


def test_where_data_lies_does_not_matter():
    found = {digest_of(clips(root)) for root in ("", "train/", "/data/corpus/train/", "../é/", "../e\u0301/")}
    assert len(found) == 1 and len(found.pop()) == 8


FOLDERS = ("one", "elsewhere, or, not/two")


def digests(paths) -> set[str]:
    return {digest_of(load_examples(str(path))) for path in paths}


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_where_shards_lie_does_not_matter_and_what_they_hold_does(tmp_path, kind):
    def shard(name: str, key: str):
        members = [(f"{key}{i}.{suffix}", content) for i in (0, 1) for suffix, content in clip(i)]
        return tar(tmp_path / f"{name}.{kind}", members, "w:gz" if kind == "tar.gz" else "w")

    def clip(i: int):
        return ("wav", sound(i)), ("cls", b"ab"[i : i + 1])

    moved = [shard(f"{folder}/train-000", "ann/") for folder in FOLDERS]
    assert len(digests(moved)) == 1
    others = [shard("keys/train-000", "bob/"), shard("names/train-001", "ann/")]
    assert len(digests(moved + others)) == 3
    assert len(digests([make_shards(tmp_path / folder, [2, 2]) for folder in FOLDERS])) == 1


@pytest.mark.parametrize("named", [True, False])
def test_where_a_data_set_lies_does_not_matter(tmp_path, named):
    def parquet(folder: str, key: str):
        (tmp_path / folder).mkdir(parents=True)
        audio = [{"bytes": sound(i), "path": f"{key}, {i}.wav" if named else None} for i in (0, 1)]
        rows = Dataset.from_dict({"audio": audio, "label": ["a", "b"]}).cast_column(
            "audio", Audio(decode=False)
        )
        rows.to_parquet(tmp_path / folder / "train.parquet")
        return tmp_path / folder / "train.parquet"

    moved = [parquet(folder, "ann") for folder in FOLDERS]
    assert len(digests(moved)) == 1
    assert len(digests([*moved, parquet("three", "bob")])) == (2 if named else 1)


def test_where_files_that_rows_name_lie_does_not_matter(tmp_path):
    found = set()
    for folder in FOLDERS:
        files = [str(write(tmp_path / folder / f"{i}.wav", i, seconds=0.1)) for i in (0, 1)]
        rows = Dataset.from_dict({"audio": files, "label": ["a", "b"]}).cast_column("audio", Audio())
        found.add(digest_of(load_examples(rows)))
    assert len(found) == 1


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
