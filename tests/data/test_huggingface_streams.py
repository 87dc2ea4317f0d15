"""Hugging Face data sets with streaming=True, of what lies on disk."""

import numpy as np
import pytest
from data_fixtures import found, write
from streaming_fixtures import sound
from torch.utils.data import DataLoader, IterableDataset
from whisper_meft.data import list_splits, load_examples, load_shards
from whisper_meft.errors import UserError

datasets = pytest.importorskip("datasets")


def rows(count=20, **more):
    return [
        {"audio": {"bytes": sound(i), "path": f"{i}.wav"}, "accent": "ab"[i % 2], "speaker": f"s{i % 3}"}
        | more
        for i in range(count)
    ]


def dataset(count=20):
    return datasets.Dataset.from_list(rows(count)).cast_column("audio", datasets.Audio(decode=False))


EXPECTED = [(i, "ab"[i % 2], f"s{i % 3}") for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four Parquet files of training data and one of validation data; and the same as save_to_disk has it."""
    path, whole = tmp_path_factory.mktemp("rows"), dataset()
    (path / "parquet").mkdir()
    for number in range(4):
        part = whole.shard(4, number, contiguous=True)
        part.to_parquet(path / "parquet" / f"train-{number:05}-of-00004.parquet")
    dataset(3).to_parquet(path / "parquet" / "validation-00000-of-00001.parquet")
    datasets.DatasetDict(train=whole, test=dataset(2)).save_to_disk(path / "disk")
    return path


def test_parquet(folder):
    source = str(folder / "parquet")
    assert sorted(list_splits(source, streaming=True)) == ["train", "validation"]
    shards = load_shards(source, split="train")
    assert len(shards) == 4 and found(shards) == EXPECTED
    assert [label for shard in range(4) for _, label in shards.labels(shard)] == [row[1] for row in EXPECTED]
    assert next(iter(shards)).name == f"row 0 of shard 0 of {source} (train), 0.wav"


@pytest.mark.parametrize("file", ["train-00001-of-00004.parquet"])
def test_one_file(folder, file):
    assert found(load_shards(str(folder / "parquet" / file))) == EXPECTED[5:10]


def test_saved_to_disk(folder):
    assert found(load_shards(str(folder / "disk"), split="train")) == EXPECTED
    assert found(load_shards(str(folder / "disk" / "train"))) == EXPECTED


def test_a_data_set_in_memory():
    assert found(load_shards(dataset().to_iterable_dataset(num_shards=3))) == EXPECTED
    with pytest.raises(UserError, match="is streamed; here its length is needed"):
        load_examples(dataset().to_iterable_dataset())


def test_class_labels_and_transcripts():
    whole = datasets.Dataset.from_list(rows(4, text=" Ja. ")).cast_column(
        "accent", datasets.ClassLabel(names=["b", "a"])
    )
    whole = whole.cast_column("audio", datasets.Audio(decode=False)).to_iterable_dataset()
    assert [example.label for example in load_shards(whole)] == ["a", "b", "a", "b"]
    assert [example.text for example in load_shards(whole, require_text=True)] == ["Ja."] * 4
    with pytest.raises(UserError, match="no text column"):
        load_shards(dataset().to_iterable_dataset(), require_text=True)


def test_speakers_that_are_classes_have_their_names():
    whole = datasets.Dataset.from_list([{**row, "speaker": i - 1} for i, row in enumerate(rows(3))])
    whole = whole.cast_column("speaker", datasets.ClassLabel(names=["ann", "bob"]))
    whole = whole.cast_column("audio", datasets.Audio(decode=False))
    for examples in (load_examples(whole), load_shards(whole.to_iterable_dataset())):
        assert [example.speaker for example in examples] == [None, "ann", "bob"]


def test_arrays_features_and_paths(tmp_path):
    wave = (np.full(1600, 3 / 100) * 2**15).astype(np.int16)
    values = {
        "array": {"array": wave.tolist(), "sampling_rate": 16_000},
        "path": str(write(tmp_path / "2.wav", 2)),
    }
    for value in values.values():
        rows = datasets.Dataset.from_list([{"audio": value, "label": "a"}])
        if isinstance(value, dict):
            features = datasets.Features(
                audio={
                    "array": datasets.List(datasets.Value("int16")),
                    "sampling_rate": datasets.Value("int64"),
                },
                label=datasets.Value("string"),
            )
            rows = rows.cast(features)
        assert found(load_shards(rows.to_iterable_dataset())) == [(2, "a", None)]
    mel = datasets.Dataset.from_list([{"input_features": np.ones((80, 6)).tolist(), "label": 1}])
    (example,) = load_shards(mel.to_iterable_dataset())
    assert example.has_features and np.asarray(example.value()).shape == (80, 6) and example.label == "1"


def test_processes_of_a_loader_do_not_deal_rows_out_again(folder):
    """datasets would give each process of a DataLoader other shards, behind our back."""

    class Whole(IterableDataset):
        def __iter__(self):
            return (example.name for example in load_shards(str(folder / "parquet"), split="train"))

    names = list(DataLoader(Whole(), batch_size=None, num_workers=2))
    assert len(names) == 40 and len(set(names)) == 20


@pytest.mark.parametrize(
    "columns, match",
    [
        ({"audio": 3, "label": "a"}, "the column 'audio' is of type Value"),
        ({"audio": "a.wav", "accents": {"x": 1}}, "the label column 'accents' is of type"),
        ({"audio": "a.wav", "kind": "a"}, "has no label column that is known by its name"),
        ({"sounds": "a.wav", "label": "a"}, "has no audio column that is known by its name"),
    ],
)
def test_columns_that_mean_nothing(columns, match):
    with pytest.raises(UserError, match=match):
        load_shards(datasets.Dataset.from_list([columns]).to_iterable_dataset())


@pytest.mark.parametrize("name", ["start", "end_time", "channel"])
def test_parts_of_files_are_refused(tmp_path, name):
    """Which are heard whole: the beginning of each file would be taken for any part of it."""
    path = str(write(tmp_path / "2.wav", 2))
    rows = datasets.Dataset.from_list([{"audio": path, "label": "a", name: 1}])
    with pytest.raises(UserError, match=f"{name} says which part of a file is meant"):
        load_shards(rows.to_iterable_dataset())
    cast = rows.cast_column("audio", datasets.Audio())
    with pytest.raises(UserError, match=f"{name} says which part of a file is meant"):
        list(load_shards(cast.to_iterable_dataset()))
    held = datasets.Dataset.from_list(
        [{"audio": {"bytes": (tmp_path / "2.wav").read_bytes(), "path": None}, "label": "a", name: 1}]
    )
    assert len(list(load_shards(held.to_iterable_dataset()))) == 1  # a cut clip, whose column tells of it


def test_labels_are_composed():
    rows = datasets.Dataset.from_list([{"audio": "x.wav", "label": "ho\u0308ch"}])
    shards = load_shards(rows.to_iterable_dataset())
    assert [label for _, label in shards.labels(0)] == ["h\xf6ch"]


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="x.parquet"):
        list(load_shards(str(tmp_path / "x.parquet")))
