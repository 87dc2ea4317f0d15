"""Tables of paths in Parquet and in data sets: they are read as the same table in CSV is."""

from decimal import Decimal
from importlib.util import find_spec

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import RATE, found, wave, write
from datasets import Audio, ClassLabel, Dataset, DatasetDict
from whisper_meft.data import list_splits, load_examples, load_shards
from whisper_meft.errors import UserError


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# --- a column that says the split ---

SPLITS = ["train", "test", "train", None]
LABELS = ["a", "b", "b", "a"]


def divided(tmp_path, kind: str, name: str = "split"):
    """A data set of four clips, whose column says the split of three."""
    clips = [str(write(tmp_path / f"{i}.wav", i)) for i in range(4)]
    if kind == "arrays":
        clips = [{"array": wave(i), "sampling_rate": RATE} for i in range(4)]
    data = Dataset.from_dict({"audio": clips, "label": LABELS, name: SPLITS})
    return data.cast_column("audio", Audio(decode=False)) if kind == "audio" else data


@pytest.mark.parametrize("kind", ["paths", "arrays"])
def test_a_column_of_splits_divides_what_has_none(tmp_path, kind):
    data = divided(tmp_path, kind)
    parquet = tmp_path / "m.parquet"
    data.to_parquet(parquet)
    (tmp_path / "folder").mkdir()
    data.to_parquet(tmp_path / "folder" / "m.parquet")
    data.save_to_disk(tmp_path / "disk")
    classes = data.cast_column("split", ClassLabel(names=["test", "train"]))
    for source in (data, classes, parquet, tmp_path / "folder", tmp_path / "disk", DatasetDict(train=data)):
        options = {} if isinstance(source, Dataset | DatasetDict) else {"cache_dir": str(tmp_path / "cache")}
        assert list_splits(source, **options) == ["train", "test"]
        assert found(load_examples(source, split="train", **options)) == [(0, "a", None), (2, "b", None)]
        assert found(load_examples(source, split="test", **options)) == [(1, "b", None)]
        with pytest.raises(UserError, match="has several splits .train, test."):
            load_examples(source, **options)


def test_splits_of_a_data_set_go_before_a_column(tmp_path, caplog):
    data = divided(tmp_path, "audio")
    both = DatasetDict(train=data, test=data.select([1]))
    assert list_splits(both) == ["train", "test"]
    assert len(load_examples(both, split="test")) == 1 and not caplog.text
    assert len(load_examples(both, split="train")) == 4
    assert "its column 'split' has test, train; it is not used" in caplog.text


@pytest.mark.parametrize("kind", ["paths", "audio", "arrays"])
def test_a_column_of_any_name_that_holds_nothing_but_splits(tmp_path, kind, caplog):
    data = divided(tmp_path, kind, "set")
    data.to_parquet(tmp_path / "m.parquet")
    data.save_to_disk(tmp_path / "disk")
    classes = data.cast_column("set", ClassLabel(names=["test", "train"]))
    for source in (data, classes, tmp_path / "m.parquet", tmp_path / "disk", DatasetDict(train=data)):
        how = {} if isinstance(source, Dataset | DatasetDict) else {"cache_dir": str(tmp_path / "cache")}
        assert list_splits(source, **how) == ["train", "test"]
        assert found(load_examples(source, split="train", **how)) == [(0, "a", None), (2, "b", None)]
        assert found(load_examples(source, split="test", **how)) == [(1, "b", None)]
    assert f"{tmp_path}/disk: its column 'set' is taken for the split of each row, as it" in caplog.text
    with pytest.raises(UserError, match="columns 'set', 'own' all name splits"):
        list_splits(data.add_column("own", SPLITS))
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "own")
    assert len(load_examples(tmp_path / "own", split="train")) == 4
    assert f"{tmp_path}/own (train): its column 'set' has test, train; it is not used" in caplog.text
    assert f"{tmp_path}/own: its column" not in caplog.text


@pytest.mark.parametrize("values", [["train", "other", "test", None], ["train"] * 4, ["dev", "test"] * 2])
def test_columns_of_any_name_that_are_no_splits(tmp_path, values, caplog):
    data = divided(tmp_path, "audio").remove_columns("split").add_column("set", values)
    classes = data.cast_column("label", ClassLabel(names=["a", "b"])).rename_column("label", "what")
    assert list_splits(data) == [] and len(load_examples(data)) == 4
    assert len(list(load_shards(data.to_iterable_dataset(num_shards=2)))) == 4
    assert list_splits(classes, label_column_name="what") == [] and not caplog.text
    named = data.remove_columns("label").map(lambda row, i: {"set": SPLITS[i] or "dev"}, with_indices=True)
    assert len(load_examples(named, label_column_name="Set")) == 4
    assert len(list(load_shards(named.to_iterable_dataset(), label_column_name="Set"))) == 4


def test_a_column_of_something_else_is_no_split(tmp_path, caplog):
    data = divided(tmp_path, "audio").remove_columns("split").add_column("subset", ["S", "M", "S", "M"])
    assert list_splits(data) == [] and len(load_examples(data)) == 4
    assert "its column 'subset' names no splits and is not used (S, M)" in caplog.text


def test_paths_in_a_file_divide_it_as_they_do_in_csv(tmp_path, caplog):
    names = [f"clips/{part}/{i}.wav" for i, part in enumerate(["train", "test", "train", "test"])]
    for i, name in enumerate(names):
        write(tmp_path / name, i)
    data = Dataset.from_dict({"audio": names, "label": LABELS})
    data.to_parquet(tmp_path / "m.parquet")
    data.to_csv(tmp_path / "m.csv")
    cache = {"cache_dir": str(tmp_path / "cache")}
    for source, options in ((tmp_path / "m.csv", {}), (tmp_path / "m.parquet", cache)):
        assert list_splits(source, **options) == ["train", "test"]
        assert found(load_examples(source, split="test", **options)) == [(1, "b", None), (3, "a", None)]
        with pytest.raises(UserError, match="has several splits .train, test."):
            load_examples(source, **options)
        assert f"{source}: its splits are taken from the folders in its paths (train, test); a" in caplog.text
    # Who makes a data set in memory has chosen its rows; a column says otherwise.
    assert len(load_examples(data, data_root=str(tmp_path))) == 4
    data.add_column("split", ["train"] * 4).to_parquet(tmp_path / "all.parquet")
    assert len(load_examples(tmp_path / "all.parquet", **cache)) == 4


@pytest.mark.parametrize("name", ["split", "set"])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_stream_is_not_divided_by_a_column(tmp_path, shards, name):
    data = divided(tmp_path, "arrays", name)
    told = f"column '{name}' says the split of each row .(train, test|test, train)., and a stream"
    with pytest.raises(UserError, match=told):
        list(load_shards(data.to_iterable_dataset(num_shards=shards)))
    for shard in range(1, shards):
        stream = load_shards(data.select([0, 1, 1, 1]).to_iterable_dataset(num_shards=shards))
        with pytest.raises(UserError, match=told):
            list(stream.labels(shard))
    data.to_parquet(tmp_path / "m.parquet")
    for source in (str(tmp_path / "m.parquet"), DatasetDict(train=data)):
        with pytest.raises(UserError, match=told):
            list(load_shards(source, cache_dir=str(tmp_path / "cache")))
    assert len(found(load_shards(data.select([0, 2]).to_iterable_dataset()))) == 2
    own = DatasetDict(train=data.select([0, 2]), test=data.select([1]))
    assert len(found(load_shards(own, split="test"))) == 1


@pytest.mark.parametrize("load", [load_examples, load_shards])
def test_files_that_are_in_none_of_the_splits_are_named(tmp_path, load, caplog):
    """datasets takes those alone whose names have a split's in them: of languages, Domung (dev)."""
    data, cache = divided(tmp_path, "arrays").remove_columns("split"), {"cache_dir": str(tmp_path / "cache")}
    for folder, names in (
        ("few", ("dev", "nl", "de")),
        ("none", ("nl", "de")),
        ("all", ("train-nl", "test")),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            data.to_parquet(tmp_path / folder / f"{name}.parquet")
    assert len(list(load(str(tmp_path / "none"), **cache))) == 8
    assert len(list(load(str(tmp_path / "all"), split="train", **cache))) == 4 and not caplog.text
    assert len(list(load(str(tmp_path / "few"), **cache))) == 4
    assert "few: de.parquet, nl.parquet are not read, as others are called like splits (valid" in caplog.text


# --- several columns of audio ---


@pytest.mark.parametrize("streaming", [False, True])
def test_of_several_columns_of_audio_one_is_known_or_named(tmp_path, streaming):
    clips = [str(write(tmp_path / f"{i}.wav", i)) for i in range(4)]
    data = Dataset.from_dict({"noisy": clips[:2], "clean": clips[2:], "label": ["a", "b"]})
    for name in ("noisy", "clean"):
        data = data.cast_column(name, Audio(decode=False))

    def load(data, **how):
        load = load_shards if streaming else load_examples
        return found(load(data.to_iterable_dataset() if streaming else data, **how))

    with pytest.raises(UserError, match="has several columns of audio .noisy, clean.: name one with audio_"):
        load(data)
    assert load(data, audio_column_name="clean") == [(2, "a", None), (3, "b", None)]
    assert load(data.rename_column("clean", "audio")) == [(2, "a", None), (3, "b", None)]
    assert load(data.remove_columns("clean")) == [(0, "a", None), (1, "b", None)]


# --- numbers, some of them missing ---


@pytest.mark.parametrize("kind", ["paths", "audio", "streamed"])
def test_nan_is_missing_and_whole_floats_are_digits(tmp_path, kind):
    nan, load = float("nan"), load_shards if kind == "streamed" else load_examples
    clips = [str(write(tmp_path / f"{i}.wav", i)) for i in range(3)]
    columns = {"audio": clips, "speaker": [19.0, nan, 2.5], "label": [1.0, nan, 0.0]}
    data = Dataset.from_dict(columns)
    data = data if kind == "paths" else data.cast_column("audio", Audio(decode=False))
    data = data.to_iterable_dataset() if kind == "streamed" else data
    expected = [(0, "1", "19"), (1, None, None), (2, "0", "2.5")]
    assert found(load(data, require_labels=False)) == expected
    if kind != "streamed":
        with pytest.raises(UserError, match="1 of 3 examples of .* have no label"):
            load_examples(data)


def test_times_that_are_nan_are_missing(tmp_path):
    nan, clips = float("nan"), [str(write(tmp_path / f"{i}.wav", i)) for i in range(2)]
    data = Dataset.from_dict({"audio": clips, "label": ["a", "b"], "start": [0.05, nan], "end": [nan, 0.1]})
    assert [(e.start, e.stop) for e in load_examples(data)] == [(0.05, None), (None, 0.1)]


@pytest.mark.parametrize("value", [0.5, float("inf"), float("-inf")])
def test_labels_that_are_no_whole_numbers(tmp_path, value):
    clips = [str(write(tmp_path / f"{i}.wav", i)) for i in range(2)]
    with pytest.raises(UserError, match="the label column 'label' is of type float64; text, integers or"):
        load_examples(Dataset.from_dict({"audio": clips, "label": [1.0, value]}))


def test_times_in_decimals_cut(tmp_path):
    """As databases write them."""
    clips = [str(write(tmp_path / f"{i}.wav", i)) for i in range(2)]
    pairs = (("start", ("0.05", "0.00")), ("end", ("0.10", "0.20")), ("speaker_id", ("7.00", "8.00")))
    columns = {name: pa.array(map(Decimal, values)) for name, values in pairs}
    pq.write_table(pa.table({"path": clips, "label": ["a", "b"], **columns}), tmp_path / "m.parquet")
    examples = load_examples(tmp_path / "m.parquet", cache_dir=str(tmp_path / "cache"))
    assert [(e.start, e.stop, e.speaker) for e in examples] == [(0.05, 0.1, "7"), (0, 0.2, "8")]


def test_columns_of_other_types_are_said_not_to_be_used(tmp_path, caplog):
    clips = [str(write(tmp_path / f"{i}.wav", i)) for i in range(2)]
    others = {"start": pa.array([50, 60], pa.duration("ms")), "speaker": [["s"], ["t"]], "more": [[1], [2]]}
    data = Dataset(pa.table({"path": clips, "label": ["a", "b"], **others}))
    assert [(e.start, e.speaker) for e in load_examples(data)] == [(None, None)] * 2
    told = [message.partition("its column ")[2] for message in caplog.messages]
    assert told[0] == "'start' is not used, as it is of type duration[ms]"
    assert len(told) == 2 and told[1].startswith("'speaker' is not used, as it is of type")
    with pytest.raises(UserError, match="the column 'start' is of type duration.ms.; text and numbers are"):
        load_examples(data, start_column_name="start")


# --- relative paths ---


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["paths", "audio"])
def test_relative_paths_start_at_the_file(tmp_path, monkeypatch, kind, streaming):
    for folder in ("sub", "there", "other"):
        (tmp_path / folder / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sub" / "set")
    for i in range(2):
        write(tmp_path / "there" / "clips" / f"{i}.wav", i)
        write(tmp_path / "sub" / "clips" / f"{i}.wav", 7)
        write(tmp_path / "other" / "clips" / f"{i}.wav", i + 2)
    data = Dataset.from_dict({"audio": ["../clips/0.wav", "../clips/1.wav"], "label": ["a", "b"]})
    if kind == "audio":  # as others write them: datasets itself would put the sound in
        data = data.map(lambda row: {"audio": {"bytes": None, "path": row["audio"]}})
    data.to_parquet(tmp_path / "there" / "set" / "m.parquet")
    data.save_to_disk(tmp_path / "disk")
    arrow = next((tmp_path / "disk").glob("*.arrow")).rename(tmp_path / "there" / "clips" / "m.arrow")
    load, cache = load_shards if streaming else load_examples, {"cache_dir": str(tmp_path / "cache")}
    for source in ("../../there/set/m.parquet", str(arrow), "../../there/set"):
        assert found(load(source, data_format="huggingface", **cache)) == [(0, "a", None), (1, "b", None)]
        moved = load(source, data_format="huggingface", data_root=str(tmp_path / "other" / "set"), **cache)
        assert found(moved) == [(2, "a", None), (3, "b", None)]
    memory = data.to_iterable_dataset() if streaming else data
    assert found(load(memory)) == [(7, "a", None), (7, "b", None)]


# --- a table beside its audio ---


@pytest.mark.parametrize("load", [load_examples, load_shards])
@pytest.mark.parametrize("name", ["metadata", "list"])
def test_a_folder_of_audio_with_its_table_in_parquet(tmp_path, load, name):
    for i in range(2):
        write(tmp_path / "all" / "clips" / f"{i}.wav", i)
    data = Dataset.from_dict({"file_name": ["clips/0.wav", "clips/1.wav"], "label": ["a", "b"]})
    data.to_parquet(tmp_path / "all" / f"{name}.parquet")
    found_there = found(load(str(tmp_path / "all"), cache_dir=str(tmp_path / "cache")))
    assert found_there == [(0, "a", None), (1, "b", None)]


@pytest.mark.skipif(find_spec("torchcodec") is not None, reason="with torchcodec, datasets reads them")
def test_tables_in_parquet_in_folders_of_audio_are_to_be_written_otherwise(tmp_path):
    for i, split in enumerate(("train", "test")):
        write(tmp_path / "all" / split / "0.wav", i)
        table = Dataset.from_dict({"file_name": ["0.wav"], "label": ["a"]})
        table.to_parquet(tmp_path / "all" / split / "metadata.parquet")
    with pytest.raises(
        UserError, match="is a folder of audio files, .* metadata.csv or metadata.jsonl"
    ) as error:
        load_examples(str(tmp_path / "all"), split="train", cache_dir=str(tmp_path / "cache"))
    assert "torchcodec" not in str(error.value) and "hf download" not in str(error.value)
