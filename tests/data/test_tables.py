"""Tables beside audio, JSON lines, gzip, and columns that say which part of a file a row is."""

import bz2
import gzip
import json
import os
import zipfile

import numpy as np
import pytest
import soundfile
from data_fixtures import RATE, found, table, write
from datasets import Audio, ClassLabel, Dataset
from whisper_meft.data import list_splits, load_examples, load_shards, segments
from whisper_meft.errors import UserError


@pytest.fixture
def speakers(tmp_path):
    """Two speakers' folders with two clips each; what they say is another matter."""
    for i in range(4):
        write(tmp_path / f"s{i % 2}" / f"{i}.wav", i)
    return tmp_path


CLIPS = ["s0/0.wav", "s1/1.wav", "s0/2.wav", "s1/3.wav"]
LABELS = ["north", "north", "south", "south"]
EXPECTED = [(i, label, None) for i, label in enumerate(LABELS)]


def rows(delimiter: str = ",") -> list[str]:
    return [delimiter.join(pair) for pair in zip(CLIPS, LABELS)]


def objects(names=("file_name", "label")) -> list[str]:
    return [json.dumps(dict(zip(names, pair))) for pair in zip(CLIPS, LABELS)]


# --- metadata as the hub's AudioFolder has it ---


@pytest.mark.parametrize(
    "name, lines",
    [
        ("metadata.csv", ["file_name,label", *rows()]),
        ("metadata.tsv", ["file_name\tlabel", *rows("\t")]),
        ("metadata.jsonl", objects()),
        ("metadata.csv.gz", ["file_name,label", *rows()]),
    ],
)
def test_metadata_goes_before_folders(speakers, name, lines):
    text = "\n".join(lines).encode()
    (speakers / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert found(load_examples(speakers)) == EXPECTED
    assert {e.label for e in load_examples(speakers, "audiofolder")} == {"s0", "s1"}


def test_metadata_in_each_folder(tmp_path):
    for i, split in enumerate(["train", "train", "test"]):
        write(tmp_path / split / f"{i}.wav", i)
    lines = [json.dumps({"file_name": f"{i}.wav", "label": "ab"[i]}) for i in range(2)]
    table(tmp_path / "train" / "metadata.jsonl", *lines)
    with pytest.raises(UserError, match=r"has metadata in train, and none for test/2\.wav"):
        load_examples(tmp_path, split="train")
    table(tmp_path / "test" / "metadata.csv", "file_name,label", "2.wav,a")
    assert list_splits(tmp_path) == ["test", "train"]
    assert found(load_examples(tmp_path, split="train")) == [(0, "a", None), (1, "b", None)]
    (tmp_path / "train").rename(tmp_path / "s1")
    (tmp_path / "test").rename(tmp_path / "s2")
    assert list_splits(tmp_path) == []
    assert found(load_examples(tmp_path)) == [(0, "a", None), (1, "b", None), (2, "a", None)]


def test_metadata_of_folders_that_are_splits(tmp_path):
    write(tmp_path / "train" / "0.wav", 0)
    write(tmp_path / "test" / "1.wav", 1)
    table(tmp_path / "metadata.csv", "file_name,label", "train/0.wav,a", "test/1.wav,b")
    assert found(load_examples(tmp_path, split="train")) == [(0, "a", None)]
    assert found(load_examples(tmp_path, split="test")) == [(1, "b", None)]


# --- tables that would be passed over ---


@pytest.mark.parametrize(
    "name, lines",
    [
        ("labels.csv", ["path,label", *rows()]),
        ("list.tsv", ["file\tdialect", *rows("\t")]),
        ("all.txt", ["audio|accent", *rows("|")]),
        ("manifest.json", objects(("audio_filepath", "label"))),
        ("s1/info.csv", ["file_name,label", "1.wav,north"]),
        ("stems.csv", ["file,label", "0,north"]),
    ],
)
def test_a_table_of_labels_beside_speakers_is_not_passed_over(speakers, name, lines):
    path = table(speakers / name, *lines)
    with pytest.raises(UserError, match="lists audio files with their labels .*--data_format") as error:
        load_examples(speakers)
    assert str(path) in str(error.value)
    assert {e.label for e in load_examples(speakers, "audiofolder")} == {"s0", "s1"}
    assert {e.label for e in load_examples(speakers, layout="class")} == {"s0", "s1"}


def test_tables_of_a_folder_can_be_asked_for(speakers):
    table(speakers / "labels.csv", "path,label", *rows())
    table(speakers / "notes.csv", "when,what", "now,this")
    assert found(load_examples(speakers, "manifest")) == EXPECTED


@pytest.mark.parametrize(
    "name, lines",
    [
        ("labels.csv", rows()),
        ("list.csv", ["file_name,Klasse", *rows()]),
        ("speakers.txt", ["ID  AGE  ACCENTS", "s0  23  Scottish"]),
        ("people.csv", ["id,accent", "s0,Scottish"]),
        ("labels.xlsx", ["no text"]),
    ],
)
def test_tables_that_cannot_be_read_are_named(speakers, name, lines, caplog):
    table(speakers / name, *lines)
    assert {e.label for e in load_examples(speakers)} == {"s0", "s1"}
    assert f"folders are taken as classes; not read: {name}" in caplog.text


def test_other_tables_are_no_matter(speakers, caplog):
    table(speakers / "README.txt", "path,label", "a list of things")
    table(speakers / "elsewhere.csv", "path,label", "other.wav,x")
    assert {e.label for e in load_examples(speakers)} == {"s0", "s1"}
    assert not caplog.text


def test_columns_named_for_folders_are_said_not_to_be_used(speakers, caplog):
    assert {e.label for e in load_examples(speakers, label_column_name="口音")} == {"s0", "s1"}
    assert "is read by its folders, without the columns 口音" in caplog.text


# --- JSON lines, gzip, archives ---


@pytest.mark.parametrize("whole", [False, True])
def test_manifests_of_json(tmp_path, whole):
    for i in range(2):
        write(tmp_path / f"{i}.wav", i)
    content = [
        {"audio_filepath": "0.wav", "label": 7, "speaker": None, "more": {"x": [1]}},
        {"label": " é ", "audio_filepath": "1.wav", "speaker": "s"},
    ]
    path = tmp_path / ("m.json" if whole else "m.jsonl")
    path.write_text(json.dumps(content) if whole else "\ufeff" + "\n\n".join(map(json.dumps, content)))
    assert found(load_examples(path)) == [(0, "7", None), (1, "é", "s")]


def test_nan_in_json_is_missing_and_whole_floats_are_digits(tmp_path):
    """As Python writes what pandas made of a column in which values are missing."""
    nan = float("nan")
    rows = [
        {"path": "0.wav", "label": 1.0, "speaker": 19.0, "start": 0.5, "end": nan},
        {"path": "1.wav", "label": nan, "speaker": nan, "start": nan, "end": 0.75},
        {"path": "2.wav", "label": 0.5, "speaker": 19, "start": 1.0, "end": 2},
    ]
    path = table(tmp_path / "m.jsonl", *map(json.dumps, rows))
    examples = load_examples(path, require_labels=False)
    assert [(e.label, e.speaker) for e in examples] == [("1", "19"), (None, None), ("0.5", "19")]
    assert [(e.start, e.stop) for e in examples] == [(0.5, None), (None, 0.75), (1.0, 2.0)]
    with pytest.raises(UserError, match="1 of 3 examples of .* have no label: .*1.wav"):
        load_examples(path)


def test_true_and_false_are_the_same_classes_in_every_format(tmp_path):
    rows = [{"path": "0.wav", "label": True, "speaker": False}, {"path": "1.wav", "label": False}]
    data = Dataset.from_list(rows)
    data.to_csv(tmp_path / "m.csv")
    data.to_parquet(tmp_path / "m.parquet")
    table(tmp_path / "m.jsonl", *map(json.dumps, rows))
    streamed = load_shards(str(tmp_path / "m.parquet"), cache_dir=str(tmp_path / "cache"))
    assert {e.label for e in streamed} == {"True", "False"}
    for name in ("m.csv", "m.parquet", "m.jsonl"):
        examples = load_examples(tmp_path / name, cache_dir=str(tmp_path / "cache"))
        assert [(e.label, e.speaker) for e in examples] == [("True", "False"), ("False", None)]
    table(tmp_path / "m.csv", "path,label", "0.wav,true", "1.wav,no")
    assert [e.label for e in load_examples(tmp_path / "m.csv")] == ["true", "no"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"path": "a.wav", "label": "x"}\n{"path"', "line 2: not a line of JSON"),
        ('{"path": "a.wav"}\n["a"]', "line 2: an object of JSON is needed"),
        ("[]", "is empty"),
        ('{"path": "a.wav"}', "no label column that is known"),
    ],
)
def test_malformed_json(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load_examples(tmp_path / "m.jsonl")


@pytest.mark.parametrize("name", ["label", "speaker", "path", "channel", "text"])
@pytest.mark.parametrize("value", [["a"], ["a", "b"], {"x": "a"}, []])
def test_lists_and_objects_of_json_are_no_names(tmp_path, name, value):
    write(tmp_path / "0.wav", 0)
    plain = {"path": "0.wav", "label": "a", "speaker": "s", "text": "ja", "channel": 0, "more": value}
    how = {"speaker_column_name": "speaker", "channel_column_name": "channel", "require_text": name == "text"}
    path = table(tmp_path / "m.jsonl", json.dumps(plain), json.dumps({**plain, name: value}))
    with pytest.raises(
        UserError, match=f"line 2: the column '{name}' holds .*; text or a number is accepted"
    ):
        load_examples(path, **how)
    table(path, json.dumps(plain))
    assert [e.label for e in load_examples(path, **how)] == ["a"]


@pytest.mark.parametrize("value", [["a"], {"x": "a"}, []])
def test_columns_of_lists_and_objects_that_nobody_named_are_not_used(tmp_path, value, caplog):
    fields = {"label": "a", "speaker": "s", "subset": "train", "channel": 1}
    nested = {**fields, "speaker": value, "subset": value, "channel": value}
    lines = (json.dumps({"path": f"{i}.wav", **each}) for i, each in enumerate((fields, nested)))
    path = table(tmp_path / "m.jsonl", *lines)
    assert list_splits(path) == []
    found = [(e.label, e.speaker, e.channel) for e in load_examples(path)]
    assert found == [("a", None, None)] * 2
    told = "m.jsonl: its column '{}' is not used, as it holds lists or objects of JSON"
    for name in ("speaker", "subset", "channel"):
        assert sum(message.endswith(told.format(name)) for message in caplog.messages) == 1
    with pytest.raises(UserError, match="line 2: the column 'speaker' holds"):
        load_examples(path, speaker_column_name="speaker")
    # Times of words, say; and where transcripts are wanted, labels are one of these.
    path = table(
        tmp_path / "w.jsonl", json.dumps({"path": "0.wav", "label": "a", "start": value, "end": value})
    )
    assert parts(path) == [("a", None, None, "seconds")]
    with pytest.raises(UserError, match="line 1: the column 'end' holds"):
        load_examples(path, stop_column_name="end")
    path = table(tmp_path / "t.jsonl", json.dumps({"path": "0.wav", "text": "ja", "labels": value}))
    assert [(e.label, e.text) for e in load_examples(path, require_text=True)] == [(None, "ja")]
    with pytest.raises(UserError, match="line 1: the column 'labels' holds"):
        load_examples(path)


def test_gzipped_tables(tmp_path):
    write(tmp_path / "0.wav", 0)
    text = b"path,label\n0.wav,a\n" + b"0.wav,a\n" * 99
    for name in ("m.csv.gz", "train.tsv.gz", "test.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(text))
    assert found(load_examples(tmp_path / "m.csv.gz")) == [(0, "a", None)]
    assert list_splits(tmp_path) == ["test", "train"]
    (tmp_path / "m.csv.gz").write_bytes(gzip.compress(text)[:-10])
    with pytest.raises(UserError, match=r"m\.csv\.gz is a damaged gzip file"):
        load_examples(tmp_path / "m.csv.gz")


def test_archives_are_named_as_such(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.csv", "w") as archive:
        archive.writestr("m.csv", "path,label")
    with pytest.raises(UserError, match=r"m\.csv is not text, it is a zip archive or a spreadsheet"):
        load_examples(tmp_path / "m.csv")
    (tmp_path / "m.tsv").write_bytes(bz2.compress(b"path,label"))
    with pytest.raises(UserError, match=r"m\.tsv is not text, it is a bzip2 archive: unpack it"):
        load_examples(tmp_path / "m.tsv")


# --- rows of one file ---


@pytest.fixture
def stereo(tmp_path):
    """``x.wav``, one second with 0.25 on the left and 0.5 on the right, and ``y.wav`` with one channel."""
    sides = np.full((RATE, 2), [0.25, 0.5], np.float32)
    soundfile.write(tmp_path / "x.wav", sides, RATE, subtype="FLOAT")
    write(tmp_path / "y.wav", 0)
    return tmp_path


def parts(path, **options) -> list[tuple]:
    return [(e.label, e.start, e.stop, e.unit) for e in load_examples(path, **options)]


@pytest.mark.parametrize(
    "columns, first, second",
    [
        ("start,end", "0,0.25", "0.25,0.75"),
        ("offset,duration", "0,0.25", "0.25,0.5"),
        ("start_ms,end_ms", "0,250", "250,750"),
        ("Start (ms),End (ms)", "0,250", "250,750"),
        ("startMs,endMs", "0,250", "250,750"),
        ("offset_ms,duration_ms", "0,250", "250,500"),
        ("start_s,end_ms", "0,250", "0.25,750"),
        ("start_ms,duration", "0,0.25", "250,0.5"),
        ("onset,offset", "0,0.25", "0.25,0.75"),
        ("begin_time_seconds,end_time_seconds", "0,0.25", "0.25,0.75"),
        ("t_start,t_end", "0,0.25", "0.25,0.75"),
        ("startTime,endTime", "0,0.25", "0.25,0.75"),
    ],
)
def test_columns_of_times(stereo, columns, first, second):
    path = table(stereo / "m.csv", f"path,label,{columns}", f"x.wav,a,{first}", f"x.wav,b,{second}")
    assert parts(path) == [("a", 0, 0.25, "seconds"), ("b", 0.25, 0.75, "seconds")]


@pytest.mark.parametrize(
    "columns, second",
    [("start_sample,end_sample", "4000,12000"), ("frame_offset,num_frames", "4000,8000")],
)
def test_columns_of_samples(stereo, columns, second):
    path = table(stereo / "m.csv", f"path,label,{columns}", "x.wav,a,0,4000", f"x.wav,b,{second}")
    assert parts(path) == [("a", 0, 4000, "samples"), ("b", 4000, 12000, "samples")]


@pytest.mark.parametrize(
    "columns, fields, message",
    [
        ("start_s,end_samples", "0,4000", "start, end and duration must all be in samples or all be times"),
        ("start_frame,end_frame", "0,25", "'start_frame' counts in frames of a length that is not known"),
        ("start_ms,end_ms", "250,250", "the segment from 0.25 to 0.25 is empty"),
    ],
)
def test_columns_of_times_that_mean_nothing(stereo, columns, fields, message):
    with pytest.raises(UserError, match=message):
        load_examples(table(stereo / "m.csv", f"path,label,{columns}", f"x.wav,a,{fields}"))


@pytest.mark.parametrize("columns", ["start,offset", "offset,begin", "start_ms,offset_ms"])
def test_an_offset_beside_a_start_must_be_explained(stereo, columns):
    path = table(stereo / "m.csv", f"path,label,{columns}", "x.wav,a,0.1,0.2")
    with pytest.raises(UserError, match="m.csv has the columns '.*' and 'offset.*', and none that is known"):
        load_examples(path)
    table(path, f"path,label,{columns}", "x.wav,a,0.1,0.1")
    end, start = sorted(columns.split(","), key=lambda name: not name.startswith("offset"))
    with pytest.raises(UserError, match="the segment from .* is empty"):
        load_examples(path, stop_column_name=end, start_column_name=start)
    table(path, f"path,label,{columns}", "x.wav,a,0.1,0.2")
    assert parts(path, start_column_name=columns.split(",")[0])[0][2] is None
    table(path, f"path,label,{columns},duration", "x.wav,a,0.1,0.2,0.3")
    assert len(load_examples(path)) == 1


def test_starts_without_ends(stereo):
    path = table(stereo / "m.csv", "path,label,start,length", "x.wav,a,0.1,0.2", "x.wav,b,0.3,0.2")
    with pytest.raises(UserError, match=r"line 3: .*x\.wav is given from 0.1 and from 0.3, both to its end"):
        load_examples(path)
    table(path, "path,label,start,end", "x.wav,a,0.1,0.3", "x.wav,b,0.3,")
    assert parts(path) == [("a", 0.1, 0.3, "seconds"), ("b", 0.3, None, "seconds")]


@pytest.mark.parametrize(
    "columns, first, second, told",
    [
        (
            "xmin,xmax",
            "0,0.25",
            "0,",
            "'xmin' and 'xmax' may say which part of a file is meant; they",
        ),
        ("to,from", "0.25,0", "0.5,0.1", "'from' and 'to' may say which part"),
        ("f0_max,f0_min", "1,2", "2,1", ""),
        ("from,to", "ann,bob", "cid,dov", ""),
        ("duration", "0.3", "0.2", "'duration' says less than files last (0.3 s of 1 s in "),
        ("duration_samples", "16000", "800", "'duration_samples' says less than files last (0.05 s of 0.2 s"),
        ("duration", "0.98", "7", ""),
        ("duration_frames", "3", "3", ""),
        ("start", "0.5", "0.1", "'start' says where to start, and none is known by its name for the end"),
        ("start,duration_frames", "0,5", "0.1,5", "files are heard to their ends (--stop_column_name)"),
        ("start", "0", "0", ""),
        ("end", "0.5", "", "'end' says where to end, and none is known by its name for the start: files are"),
    ],
)
def test_what_is_assumed_of_times_is_said(stereo, columns, first, second, told, caplog):
    path = table(stereo / "m.csv", f"path,label,{columns}", f"x.wav,a,{first}", f"y.wav,b,{second}")
    assert len(load_examples(path)) == 2
    assert told in caplog.text and len(caplog.messages) == bool(told)


@pytest.mark.parametrize(
    "values, first",
    [(("0", "1"), 0), (("1", "2"), 1), (("1.0", "2.0"), 1), (("A", "B"), None), (("left", "Right"), None)],
)
def test_a_channel_is_an_example_of_its_own(stereo, values, first, caplog):
    path = table(stereo / "m.csv", "path,label,channel", *(f"x.wav,{v},{v}" for v in values))
    examples = load_examples(path)
    assert [(e.label, e.channel) for e in examples] == [(values[0], 0), (values[1], 1)]
    assert len({e.name for e in examples}) == 2
    assert (f"taken to count from {first}" in caplog.text) == (first is not None)


def test_a_channel_column_of_files_with_one_channel_is_not_used(stereo, caplog):
    path = table(stereo / "m.csv", "path,label,channel", "y.wav,a,3")
    assert [e.channel for e in load_examples(path)] == [None]
    assert "its column channel is not used" in caplog.text
    one = table(stereo / "one.csv", "path,label,channel", "y.wav,a,1")
    assert [e.channel for e in load_examples(one)] == [None]
    assert f"its column channel is not used, as {stereo / 'y.wav'} has one channel" in caplog.text
    table(path, "path,label,channel", "y.wav,a,phone", "x.wav,b,web")
    assert [e.channel for e in load_examples(path)] == [None, None]
    table(path, "path,label,mic", "x.wav,a,1", "y.wav,b,2")
    assert [e.channel for e in load_examples(path, channel_column_name="mic")] == [0, 1]
    table(path, "path,label,mic", "x.wav,a,near")
    with pytest.raises(UserError, match="a channel is a number, left or right, A or B; .* mic has near"):
        load_examples(path, channel_column_name="mic")


def test_a_channel_column_that_is_not_used_for_some_of_its_values_is_named(stereo, caplog):
    rows = "x.wav,a,1,0,1", "x.wav,b,2,1,2", "x.wav,a,both,2,3"
    path = table(stereo / "m.csv", "path,label,channel,start,end", *rows)
    assert [e.channel for e in load_examples(path)] == [None] * 3
    assert "its column channel is not used, as it holds both beside channels" in caplog.text


@pytest.mark.parametrize("values", [("0", "1"), ("0", "0"), ("1", "2"), ("left", "right")])
def test_a_channel_column_is_used_where_any_file_has_several_channels(stereo, values):
    """Whichever row comes first."""
    rows = f"y.wav,a,{values[0]}", f"x.wav,b,{values[1]}"
    expected = {"a": 0, "b": int(values[0] != values[1])}
    for lines in (rows, rows[::-1]):
        path = table(stereo / "m.csv", "path,label,channel", "gone.wav,b,", *lines)
        assert {e.label: e.channel for e in load_examples(path)} == expected


def test_of_many_files_with_one_channel_some_are_asked(tmp_path, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(segments, "_channel_count", lambda path: asked.append(path) or 1)
    many = [f"{i}.wav,{'ab'[i % 2]},{int(i >= 2000)}" for i in range(4000)]
    examples = load_examples(table(tmp_path / "m.csv", "path,label,channel", *many))
    assert {e.channel for e in examples} == {None}
    assert len(asked) == len(set(asked)) == 256
    assert sum(int(os.path.basename(path)[:-4]) >= 2000 for path in asked) > 200
    assert "its column channel is not used, as all of 256 files asked" in caplog.text


def test_rows_that_differ_in_an_unknown_column_are_refused_by_its_name(stereo):
    path = table(stereo / "m.csv", "id,path,label,turn,note", "1,x.wav,a,1,n", "2,x.wav,a,2,n")
    with pytest.raises(UserError, match=r"line 3: .*x\.wav is given twice: the rows differ in 'turn', which"):
        load_examples(path)
    table(path, "path,label,t0,t1", "x.wav,a,0,0.5", "x.wav,b,0.5,1")
    with pytest.raises(UserError, match="given twice, as 'a' and as 'b': the rows differ in 't0', 't1'"):
        load_examples(path)
    options = {"start_column_name": "t0", "stop_column_name": "t1"}
    assert parts(path, **options) == [("a", 0, 0.5, "seconds"), ("b", 0.5, 1, "seconds")]
    for numbers in ("id", "Unnamed: 0", "__index_level_0__"):
        table(path, f"{numbers},path,label", "1,x.wav,a", "2,x.wav,a")
        assert len(load_examples(path)) == 1


def test_rows_of_one_file_that_write_its_path_in_two_ways(stereo, caplog):
    (stereo / "sub").mkdir()
    path = table(stereo / "m.csv", "path,label", "x.wav,a", "./sub/../x.wav,b")
    with pytest.raises(UserError, match=r"line 3: .*x\.wav is given twice, as 'a' and as 'b'"):
        load_examples(path)
    table(path, "path,label", "x.wav,a", f"{stereo}/x.wav,a", "y.wav,b")
    assert [e.label for e in load_examples(path)] == ["a", "b"]
    assert "gives 1 rows twice" in caplog.text
    path.unlink()
    for name, clip in (("one", "x.wav"), ("two", "./x.wav")):
        table(stereo / f"{name}.csv", "path,label", f"{clip},a")
    with pytest.raises(UserError, match=r"is in .*one\.csv and in .*two\.csv: give one of the tables"):
        load_examples(stereo, "manifest")


def test_rows_of_a_data_set_that_share_a_file(stereo):
    content = {"path": ["x.wav"] * 2, "label": [1, 0], "offset": [0.0, 0.25], "duration": [0.25, 0.5]}
    data = Dataset.from_dict(content).cast_column("label", ClassLabel(names=["b", "a"]))
    expected = [("a", 0, 0.25, "seconds"), ("b", 0.25, 0.75, "seconds")]
    assert parts(data, data_root=stereo) == expected
    audio = Dataset.from_dict({**content, "path": [os.path.join(stereo, "x.wav")] * 2})
    audio = audio.cast_column("path", Audio(decode=False))
    assert [part[1:] for part in parts(audio)] == [part[1:] for part in expected]
    unknown = audio.remove_columns(["duration"]).rename_column("offset", "from")
    with pytest.raises(UserError, match="row 1: .*given twice, as '1' and as '0': the rows differ in 'from'"):
        load_examples(unknown)


def test_named_columns_cut_audio_that_is_in_a_data_set(stereo):
    content = (stereo / "x.wav").read_bytes()
    cuts = {"t_ms": [0, 250], "to_ms": [250, 750]}
    audio = [{"bytes": content, "path": None}] * 2
    data = Dataset.from_dict({"audio": audio, "label": ["a", "b"], **cuts})
    assert parts(data) == [("a", None, None, "seconds"), ("b", None, None, "seconds")]
    cut = parts(data, start_column_name="t_ms", stop_column_name="to_ms")
    assert cut == [("a", 0, 0.25, "seconds"), ("b", 0.25, 0.75, "seconds")]


def test_times_beside_a_column_of_audio_that_are_not_used_are_named(stereo, caplog):
    clips, start = [str(stereo / "x.wav"), str(stereo / "y.wav")], [0.1, 0.0]
    columns = {"audio": clips, "label": ["a", "b"], "begin_time": start, "seg_end": [0.5, 0.1]}
    data = Dataset.from_dict(columns).cast_column("audio", Audio(decode=False))
    assert parts(data) == [("a", None, None, "seconds"), ("b", None, None, "seconds")]
    assert "its columns 'begin_time', 'seg_end' may say which part of a file is meant" in caplog.text
    cut = parts(data, start_column_name="begin_time", stop_column_name="seg_end")
    assert cut == [("a", 0.1, 0.5, "seconds"), ("b", 0.0, 0.1, "seconds")] and len(caplog.messages) == 1


def test_features_cannot_be_cut():
    data = Dataset.from_dict({"input_features": [np.zeros((80, 4))], "labels": ["a"], "t": [1.0]})
    with pytest.raises(UserError, match="features cannot be cut, t cannot be used"):
        load_examples(data, start_column_name="t")


def test_kaldi_recordings_that_share_a_file(stereo):
    table(stereo / "k" / "wav.scp", f"r1 {stereo}/x.wav", f"r2 {stereo}/x.wav")
    table(stereo / "k" / "utt2lang", "r1 a", "r2 b")
    with pytest.raises(UserError, match="r1, r2 are the same file, and no reco2file_and_channel says"):
        load_examples(stereo / "k")
    table(stereo / "k" / "reco2file_and_channel", "r1 x A", "r2 x B")
    assert [(e.label, e.channel) for e in load_examples(stereo / "k")] == [("a", 0), ("b", 1)]


# --- paths of Windows ---


@pytest.mark.parametrize("file", [r"C:\data\x.wav", "D:/x.wav", r"\\server\x.wav", r"clips\none.wav"])
def test_paths_of_windows_get_a_hint(stereo, file):
    path = table(stereo / "m.csv", "path,label", "y.wav,a", f"{file},b")
    with pytest.raises(UserError, match="line 3: .* is a path of Windows: write it with / .*--data_root"):
        load_examples(path)
    table(stereo / "k" / "wav.scp", f"u1 {file}")
    table(stereo / "k" / "utt2lang", "u1 a")
    with pytest.raises(UserError, match="u1: .* is a path of Windows"):
        load_examples(stereo / "k")


def test_relative_paths_of_windows_that_are_there(speakers, caplog):
    path = table(speakers / "m.csv", "path,label", r"s0\0.wav,a", r".\s1\1.wav,b")
    assert found(load_examples(path)) == [(0, "a", None), (1, "b", None)]
    assert r"2 paths are written with \ and were read with /" in caplog.text
