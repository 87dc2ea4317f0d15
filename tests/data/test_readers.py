"""Every data layout on a small made tree, and the ways in which manifests and folders go wrong."""

import csv
import io
import os
import time

import datasets
import numpy as np
import pytest
import soundfile
from data_fixtures import RATE, found, index_of, names, table, wave, write
from datasets import Audio, ClassLabel, Dataset, DatasetDict
from whisper_meft.audio import read_audio
from whisper_meft.data import list_audio_files, list_splits, load_examples
from whisper_meft.data.options import KESPEECH_PAPER_LABELS
from whisper_meft.data.splits import canonical_split
from whisper_meft.errors import UserError

# --- audio folder ---


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "by class"
    write(root / "Ji-Lu" / "a.wav", 0)
    write(root / "Ji-Lu" / "deep" / "er" / "b.flac", 1)
    write(root / "中原 官话" / "ü c.WAV", 2)
    (root / "Ji-Lu" / "notes.txt").write_text("not audio")
    (root / "Ji-Lu" / "._a.wav").write_bytes(b"a resource fork")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.wav").write_bytes(b"")
    return root


def test_folder_by_class(folder):
    examples = load_examples(folder)
    assert found(examples) == [(0, "Ji-Lu", None), (1, "Ji-Lu", None), (2, "中原 官话", None)]
    assert examples[0].name == str(folder / "Ji-Lu" / "a.wav")
    assert str(folder) in examples.description
    assert list_splits(folder) == []
    assert len(load_examples(str(folder), "audiofolder")) == 3


def test_folder_with_splits(tmp_path):
    for i, (split, label) in enumerate([("train", "a"), ("train", "b"), ("Test", "a"), ("dev", "b")]):
        write(tmp_path / split / label / "x.wav", i)
    assert set(list_splits(tmp_path)) == {"train", "Test", "dev"}
    assert found(load_examples(tmp_path, split="train")) == [(0, "a", None), (1, "b", None)]
    assert found(load_examples(tmp_path, split="test")) == [(2, "a", None)]
    assert found(load_examples(tmp_path, split="validation")) == [(3, "b", None)]
    assert found(load_examples(tmp_path, split="dev")) == [(3, "b", None)]
    with pytest.raises(UserError, match="several splits .*dev.*train"):
        load_examples(tmp_path)
    with pytest.raises(UserError, match="no split 'other': it has Test, dev, train"):
        load_examples(tmp_path, split="other")


def test_folder_may_have_labels_that_are_called_like_splits(tmp_path):
    write(tmp_path / "test" / "x.wav", 0)
    write(tmp_path / "dev" / "x.wav", 1)
    assert [example.label for example in load_examples(tmp_path)] == ["dev", "test"]


def test_folder_that_mixes_splits_and_labels(tmp_path):
    write(tmp_path / "train" / "a" / "x.wav", 0)
    write(tmp_path / "noise" / "x.wav", 1)
    with pytest.raises(UserError, match="mixes split folders .train. with other folders of audio .noise."):
        load_examples(tmp_path, split="train")


def test_folder_links_are_followed_once(folder, tmp_path):
    (folder / "Ji-Lu" / "loop").symlink_to(folder)
    write(tmp_path / "elsewhere" / "d.wav", 3)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked" / "e.wav").symlink_to(folder / "Ji-Lu" / "a.wav")
    (folder / "Ji-Lu" / "gone.wav").symlink_to(folder / "nowhere")
    examples = load_examples(folder)
    assert names(examples) == ["a.wav", "b.flac", "gone.wav", "d.wav", "e.wav", "ü c.WAV"]
    with pytest.raises(UserError, match="gone.wav is a link to a file that does not exist"):
        examples[2].decode()


def test_formats_that_cannot_be_read_are_listed_and_not_passed_over(folder):
    (folder / "Ji-Lu" / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(50))
    assert "phone.m4a" in names(load_examples(folder))


def test_files_without_a_label_folder(folder):
    write(folder / "z.wav", 5)
    with pytest.raises(UserError, match="1 of 4 examples .* have no label: .*z.wav"):
        load_examples(folder)
    assert len(load_examples(folder, require_labels=False)) == 4


def test_empty_folder_and_forgotten_manifest(tmp_path):
    with pytest.raises(UserError, match="no audio files were found"):
        load_examples(tmp_path)
    table(tmp_path / "list.csv", "path,label", "a.wav,x")
    with pytest.raises(UserError, match=r"it holds list\.csv, if that is a manifest give its path"):
        load_examples(tmp_path)


def test_list_audio_files(folder):
    assert [os.path.basename(p) for p in list_audio_files(folder)] == ["a.wav", "b.flac", "ü c.WAV"]
    with pytest.raises(UserError, match="cannot list"):
        list_audio_files(folder / "nowhere")


# --- manifests ---


@pytest.fixture
def clips(tmp_path):
    for i in range(4):
        write(tmp_path / "clips" / f"{i}.wav", i, seconds=2.0 if i == 3 else 0.2)
    return tmp_path


def test_manifest_with_every_column(clips):
    path = table(
        clips / "m.csv",
        "path,label,speaker,start,end",
        "clips/0.wav,en,s1,,",
        f"{clips}/clips/1.wav,de,s2,0.05,0.1",
        "clips/../clips/3.wav,de,,0.5,1.25",
    )
    examples = load_examples(path)
    assert found(examples) == [(0, "en", "s1"), (1, "de", "s2"), (3, "de", None)]
    assert [len(e.decode()[0]) for e in examples] == [3_200, 800, 12_000]
    assert examples[1].name.endswith("1.wav [0.05 to 0.1 s]")
    assert list_splits(path) == []


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_manifest_delimiters_line_ends_and_marks(clips, delimiter, end, encoding):
    rows = [["File Name", "Dialect", "Client-ID"], ["clips/0.wav", "北京", "s 1"], ["clips/1.wav", "é", "s2"]]
    path = table(clips / "m.csv", *(delimiter.join(row) for row in rows), encoding=encoding, end=end)
    assert found(load_examples(path)) == [(0, "北京", "s 1"), (1, "é", "s2")]


def test_manifest_quotes_spaces_and_empty_rows(clips):
    text = (
        '"path" , label,text\n\n'
        '"clips/0.wav",  " en ","one, ""two""\nthree"\n,,\n   \n'
        "clips/1.wav , de ,x\r\n\n"
        '  "clips/2.wav",de,,\n'
    )
    (clips / "m.csv").write_text(text, newline="")
    assert found(load_examples(clips / "m.csv")) == [(0, "en", None), (1, "de", None), (2, "de", None)]


def test_tsv_with_loose_quotation_marks(clips):
    path = table(
        clips / "m.tsv",
        "client_id\tpath\tsentence\taccent",
        's1\tclips/0.wav\tHe said "no.\ten',
        's2\tclips/1.wav\t"\t"d""e"',
    )
    assert found(load_examples(path)) == [(0, "en", "s1"), (1, 'd"e', "s2")]
    said = {'"Ja" zei hij, "nee"': '"Ja" zei hij, "nee"', '"Ja, ""nee"""': 'Ja, "nee"', '"Ja"': "Ja"}
    for written, text in said.items():
        path = table(clips / "n.tsv", "path\tsentence", f"clips/0.wav\t{written}")
        assert load_examples(path, require_text=True)[0].text == text


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=\t", "sep=:"])
def test_a_first_line_that_says_the_delimiter(clips, first):
    """As Excel reads and writes it."""
    rows = ["path", "label", "note"], ["clips/0.wav", "a", "x,y,z"], ["clips/1.wav", "b", ""], ["more"]
    lines = [first, *(first.strip('"')[-1].join(row) for row in rows)]
    path = table(clips / "m.csv", *lines[:-1], encoding="utf-8-sig", end="\r\n")
    assert found(load_examples(path)) == [(0, "a", None), (1, "b", None)]
    with pytest.raises(UserError, match="line 5: 1 fields, the header has 3"):
        load_examples(table(path, *lines))


def test_manifest_split_column(clips):
    path = table(
        clips / "m.csv",
        "path,label,split",
        "clips/0.wav,a,train",
        "clips/1.wav,b,train",
        "clips/2.wav,a,valid",
    )
    assert list_splits(path) == ["train", "valid"]
    assert found(load_examples(path, split="train")) == [(0, "a", None), (1, "b", None)]
    assert found(load_examples(path, split="validation")) == [(2, "a", None)]
    with pytest.raises(UserError, match="no split 'test': it has train, valid"):
        load_examples(path, split="test")


@pytest.mark.parametrize("name, train, test", [("set", "train", "test"), ("Usage", "Training", "Testing")])
def test_manifest_column_that_holds_nothing_but_splits(clips, name, train, test, caplog):
    rows = f"clips/0.wav,a,{train}", f"clips/1.wav,b,{test}", f"clips/2.wav,b,{train}"
    path = table(clips / "m.csv", f"path,label,{name}", *rows)
    assert list_splits(path) == [train, test]
    assert [e.label for e in load_examples(path, split="train")] == ["a", "b"]
    assert [e.label for e in load_examples(path, split="test")] == ["b"]
    told = f"its column {name!r} is taken for the split of each row, as it holds {test}, {train}"
    assert sum(message.endswith(told) for message in caplog.messages) == 1
    both = table(clips / "b.csv", f"path,label,{name},own", *(f"{row},{row.split(',')[2]}" for row in rows))
    with pytest.raises(UserError, match=f"columns '{name}', 'own' all name splits: call the one that is"):
        load_examples(both)


@pytest.mark.parametrize(
    "name, values",
    [
        ("set", ("train", "other", "test")),
        ("set", ("train", "train", "")),
        ("set", ("dev", "test", "dev")),
        ("lng", ("tr", "cv", "tr")),
        ("accent", ("train", "test", "train")),
    ],
)
def test_manifest_columns_that_are_no_splits(clips, name, values):
    rows = (f"clips/{i}.wav,{'ab'[i % 2]},{value}" for i, value in enumerate(values))
    path = table(clips / "m.csv", f"path,label,{name}", *rows)
    assert list_splits(path) == [] and len(load_examples(path)) == 3
    table(path, "path,what,label", *(f"clips/{i}.wav,{v},c" for i, v in enumerate(["train", "test"])))
    assert len(load_examples(path, label_column_name="what")) == 2


def test_manifest_rows_of_a_split_that_is_written_in_several_ways_or_not_at_all(clips, caplog):
    splits = ["train", "Train", "training", "", "extra", "valid", "dev"]
    header, *rows = "path,label,split", *(f"clips/{i % 3}.wav,{i},{split}" for i, split in enumerate(splits))
    path = table(clips / "m.csv", header, *rows)
    assert [e.label for e in load_examples(path, split="train")] == ["0", "1", "2"]
    told = f"{path}: 2 rows are of no split and are left out; theirs is none (1), 'extra' (1)"
    assert caplog.messages == [told]
    assert [e.label for e in load_examples(path, split="validation")] == ["5", "6"]
    assert [e.label for e in load_examples(path, split="extra")] == ["4"]
    # Names of more words are splits of their own where a plain one is there.
    splits = ["test_clean", "test", "tst", "train_noisy", "train_clean"]
    rows = (f"clips/{i % 3}.wav,{i},{split}" for i, split in enumerate(splits))
    path = table(clips / "n.csv", header, *rows)
    for split, labels in (("test", "12"), ("test_clean", "0"), ("train", "34"), ("train_noisy", "3")):
        assert "".join(e.label for e in load_examples(path, split=split)) == labels
    # Of tables, as of folders, one that is called so exactly is meant alone: others may be copies of it.
    for name, label in (("train", "a"), ("train_sp", "b"), ("test", "c")):
        table(clips / "each" / f"{name}.csv", "path,label", f"../clips/0.wav,{label}")
    assert [e.label for e in load_examples(clips / "each", split="train")] == ["a"]


def test_manifest_per_split_and_metadata(clips):
    table(clips / "train.csv", "path,label", "clips/0.wav,a", "clips/1.wav,b")
    table(clips / "my-test.tsv", "path\tlabel", "clips/2.wav\ta")
    assert list_splits(clips) == ["my-test", "train"]
    assert found(load_examples(clips, split="test")) == [(2, "a", None)]
    table(clips / "clips" / "metadata.csv", "file_name,label", "3.wav,b")
    assert found(load_examples(clips / "clips")) == [(3, "b", None)]
    table(clips / "hub" / "train" / "metadata.csv", "file_name,label", "../../clips/1.wav,b")
    assert found(load_examples(clips / "hub", split="train")) == [(1, "b", None)]


def test_manifest_named_columns_and_data_root(clips):
    path = table(clips / "lists" / "m.csv", "where,what,who,path", "0.wav,a,s1,no", "1.wav,b,s2,no")
    examples = load_examples(
        path,
        audio_column_name="where",
        label_column_name="What",
        speaker_column_name="who",
        data_root=clips / "clips",
    )
    assert found(examples) == [(0, "a", "s1"), (1, "b", "s2")]
    with pytest.raises(UserError, match="no column 'nope': it has where, what, who, path"):
        load_examples(path, audio_column_name="nope")
    with pytest.raises(UserError, match="no label column that is known by its name.*label_column_name"):
        load_examples(path)
    assert list_splits(path) == []


def test_manifest_columns_in_seconds_with_a_duration(clips):
    path = table(clips / "m.csv", "path,label,start,duration", "clips/3.wav,a,0.5,0.25", "clips/3.wav,b,1,")
    assert [len(e.decode()[0]) for e in load_examples(path)] == [4_000, 16_000]


def test_manifest_rows_given_twice(clips, caplog):
    path = table(clips / "m.csv", "path,label", "clips/0.wav,a", "clips/0.wav,a", "clips/1.wav,b")
    assert len(load_examples(path)) == 2
    assert "1 rows twice" in caplog.text
    table(path, "path,label", "clips/0.wav,a", "clips/0.wav,b")
    with pytest.raises(UserError, match=r"line 3: .*0\.wav is given twice, as 'a' and as 'b'"):
        load_examples(path)


@pytest.mark.parametrize(
    "lines, message",
    [
        (["path,label", "a.wav"], "line 2: 1 fields, the header has 2"),
        (["path,label", "a.wav,x,more"], "line 2: 3 fields, the header has 2"),
        (["path,label", "", "a.wav,x", ",x"], "line 4: the path column is empty"),
        (["path,label,start,end", "a.wav,x,zero,1"], "line 2: start and end must be numbers, got 'zero'"),
        (["path,label,start,end", "a.wav,x,1,nan"], "line 2: start and end must be numbers"),
        (["path,label,start,end", "a.wav,x,2,1"], "line 2: the segment from 2.0 to 1.0 is empty"),
        (["path,label,start,end", "a.wav,x,-2,1"], "line 2: the segment from -2.0"),
        (["path,label", '"a.wav,x', "b.wav,y"], "not a row of the table"),
        (["path,label", 'a.wav,"x"y'], "line 2: not a row of the table"),
        (["a.wav,x", "b.wav,y"], "has no header line"),
        (["foo,bar", "b.wav,y"], "no audio column that is known by its name.*audio_column_name"),
        (["path,text", "b.wav,y"], "no label column that is known by its name: it has path, text"),
        (["path,label,path", "b.wav,y,z"], "two columns called 'path'"),
        (["path,label"], "holds no examples"),
        (["path,label", "a.wav,x", "b.wav, "], "1 of 2 examples .* have no label: .*b.wav"),
        ([""], "is empty: a header line"),
        (["x" * 200_000], "column"),
        (["path,label", "y" * 200_000 + ",x"], "field larger than field limit"),
    ],
)
def test_malformed_manifests(tmp_path, lines, message):
    path = table(tmp_path / "m.csv", *lines)
    with pytest.raises(UserError, match=message) as error:
        load_examples(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1_000


def test_manifests_that_are_not_text(tmp_path):
    for content in (b"path,label\na.wav,\xff\xfe\xfa", bytes(500), b"PK\x03\x04" + bytes(range(256))):
        (tmp_path / "m.csv").write_bytes(content)
        with pytest.raises(UserError, match=r"m\.csv is not"):
            load_examples(tmp_path / "m.csv")


def test_a_manifest_of_100_000_rows_takes_seconds(tmp_path):
    rows = ["path,label,speaker,start,end"]
    rows += [f"audio/{i}.wav,l{i % 6},s{i % 500},0.5,3.25" for i in range(100_000)]
    path = table(tmp_path / "m.csv", *rows)
    started = time.process_time()
    assert len(load_examples(path)) == 100_000
    assert time.process_time() - started < 20  # about 2 on an idle core


# --- SpeechBrain ---


def speechbrain(path, *rows: str):
    return table(path, "ID,duration,wav,start,end,dialect", *rows)


def test_speechbrain_counts_in_samples_and_fills_placeholders(clips):
    path = speechbrain(
        clips / "train.csv",
        "u1,0.5,{data_root}/clips/3.wav,8000,16000,EGY",
        "u2,1.0,$data_root/clips/3.wav,16000.0,32000.0,MSA",
        "u3,0.2,${data_folder}/clips/0.wav,0,3200,EGY",
    )
    examples = load_examples(path)
    assert [(e.unit, len(e.decode()[0]), e.label) for e in examples] == [
        ("samples", 8_000, "EGY"),
        ("samples", 16_000, "MSA"),
        ("samples", 3_200, "EGY"),
    ]
    assert found(examples)[2][0] == 0
    moved = path.rename(clips / "clips" / "moved.csv")
    assert found(load_examples(moved, data_root=clips)) == found(examples)
    with pytest.raises(UserError, match="does not exist"):
        load_examples(moved)[0].decode()


def test_speechbrain_columns_in_seconds_are_told_apart(clips):
    path = speechbrain(clips / "m.csv", "u1,0.5,clips/3.wav,0.5,1.0,a", "u2,1.0,clips/3.wav,1.0,2.0,b")
    assert [len(e.decode()[0]) for e in load_examples(path)] == [8_000, 16_000]
    assert {e.unit for e in load_examples(path, "speechbrain")} == {"samples"}


def test_speechbrain_rows_without_a_duration(clips):
    rows = "u1,,clips/3.wav,0,16000,a", "u2,1.0,clips/2.wav,0,16000,b"
    assert {e.unit for e in load_examples(speechbrain(clips / "m.csv", *rows))} == {"samples"}
    path = speechbrain(clips / "n.csv", rows[0])
    with pytest.raises(UserError, match="'start', 'end' may be in samples or in seconds, as no row"):
        load_examples(path)
    assert load_examples(path, "speechbrain")[0].unit == "samples"
    assert load_examples(speechbrain(path, "u1,,clips/3.wav,0,2,a"))[0].unit == "seconds"


def test_speechbrain_folder_of_splits(clips):
    for split in ("adi20_train", "adi20_dev", "adi20_test"):
        speechbrain(clips / "csv" / f"{split}.csv", "u1,0.5,../clips/3.wav,0,8000,EGY")
    assert list_splits(clips / "csv") == ["adi20_dev", "adi20_test", "adi20_train"]
    assert load_examples(clips / "csv", split="validation").description.endswith("(adi20_dev)")


# --- Kaldi ---


@pytest.fixture
def kaldi(clips):
    root = clips / "data" / "train"
    table(root / "wav.scp", "u1 clips/0.wav", "u2\tclips/1.wav", f"u3   {clips}/clips/2.wav")
    table(root / "utt2dialect", "u3 c", "u1 a", "u2 b b")
    table(root / "utt2spk", "u2 s2", "u1 s1")
    return root


def test_kaldi_joins_by_id(kaldi, clips):
    assert found(load_examples(kaldi)) == [(0, "a", "s1"), (1, "b b", "s2"), (2, "c", None)]
    table(kaldi / "wav.scp", f"u1 {clips}/clips/3.wav", encoding="utf-8-sig", end="\r\n")
    assert found(load_examples(kaldi)) == [(3, "a", "s1")]


def test_options_that_mean_nothing_for_a_format_are_named(kaldi, folder, clips, caplog):
    """They may be meant for the evaluation data, which has another one."""
    load_examples(kaldi, speaker_column_name="utt2gender", start_column_name="begin", data_root=clips)
    load_examples(folder, data_root=clips, dataset_config_name="x")
    assert [message for message in caplog.messages if "without" in message] == [
        f'{kaldi} is read as "kaldi", without speaker_column_name, start_column_name',
        f'{folder} is read as "audiofolder", without data_root, dataset_config_name',
    ]


def test_kaldi_folders_are_splits(kaldi):
    assert list_splits(kaldi) == []
    assert list_splits(kaldi.parent) == ["train"]
    assert len(load_examples(kaldi.parent)) == len(load_examples(kaldi.parent, split="train")) == 3


def test_kaldi_segments(kaldi, clips):
    table(kaldi / "wav.scp", f"r1 {clips}/clips/3.wav")
    table(kaldi / "segments", "u1 r1 0.00 0.50", "u2 r1 0.5 1.75", "u3 r1 1.75 -1")
    assert [(len(e.decode()[0]), e.label) for e in load_examples(kaldi)] == [
        (8_000, "a"),
        (20_000, "b b"),
        (4_000, "c"),
    ]


def test_a_missing_first_file_does_not_say_where_the_others_are(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    write(tmp_path / "clips" / "1.wav", 1)
    write(tmp_path / "clips" / "é.wav", 2)
    path = table(
        tmp_path / "m.csv", "path,label", *(f"gone{i}.wav,a" for i in range(99)), "1.wav,a", "é.wav,b"
    )
    assert [index_of(e) for e in load_examples(path) if "gone" not in e.name] == [1, 2]
    for folder in (tmp_path / "k", tmp_path / "data" / "train" / "k"):
        gone = (f"u{i} clips/gone{i}.wav" for i in range(99))
        table(folder / "wav.scp", *gone, "v clips/1.wav")
        table(folder / "utt2lang", *(f"u{i} a" for i in range(99)), "v b")
        assert index_of(load_examples(folder)[-1]) == 1


def test_kaldi_label_file_by_name(kaldi):
    table(kaldi / "text", "u1 yes", "u2 no", "u3 no")
    assert [e.label for e in load_examples(kaldi, label_column_name="text")] == ["yes", "no", "no"]
    with pytest.raises(UserError, match="no label file 'utt2x': it holds text, utt2dialect, utt2spk"):
        load_examples(kaldi, label_column_name="utt2x")
    (kaldi / "utt2dialect").unlink()
    with pytest.raises(UserError, match="no label file that is known by its name .*label_column_name"):
        load_examples(kaldi)
    assert [e.label for e in load_examples(kaldi, require_labels=False)] == [None] * 3


@pytest.mark.parametrize(
    "file, lines, message",
    [
        ("wav.scp", ["u1 sph2pipe -f wav a.sph |"], "u1 is a pipe .*commands are not run"),
        ("wav.scp", ["u1 data/raw.ark:1234"], "u1 lies in a Kaldi archive"),
        ("wav.scp", ["u1"], "line 1: an id and a value are needed, got 'u1'"),
        ("wav.scp", ["u1 a.wav", "u1 b.wav"], "line 2: the id u1 is given twice"),
        ("wav.scp", ["u9 a.wav"], "1 of 1 examples .* have no label: .*a.wav"),
        ("segments", ["u1 r9 0 1"], "u1 is in recording r9, which wav.scp does not list"),
        ("segments", ["u1 u1 0"], "u1 needs a recording, a start and an end, got 'u1 0'"),
        ("segments", ["u1 u1 1 0.5"], "u1: the segment from 1.0 to 0.5 is empty"),
        ("segments", ["u1 u1 1 x"], "u1: start and end must be numbers, got 'x'"),
        ("utt2dialect", ["u1 a"], "2 of 3 examples .* have no label"),
    ],
)
def test_malformed_kaldi_folders(kaldi, file, lines, message):
    table(kaldi / file, *lines)
    with pytest.raises(UserError, match=message):
        load_examples(kaldi)


# --- KeSpeech ---


@pytest.fixture
def kespeech(tmp_path):
    root = tmp_path / "KeSpeech"
    labels = ["Mandarin", *KESPEECH_PAPER_LABELS, "Beijing", "Northeastern"]
    for split in ("train_phase1", "train_phase2", "dev_phase1", "dev_phase2", "test"):
        lines = {"wav.scp": [], "utt2subdialect": [], "utt2spk": [], "text": []}
        for i, label in enumerate(labels):
            name = f"{split}_{i}"
            audio = f"Audio/spk{i}/{'phase2' if '2' in split else 'phase1'}/{name}.wav"
            write(root / audio, i, 0.05)
            for file, value in (("wav.scp", audio), ("utt2subdialect", label), ("utt2spk", f"spk{i}")):
                lines[file].append(f"{name} {value}")
            lines["text"].append(f"{name} 你好 <SPOKEN_NOISE>")
        for file, content in lines.items():
            # Another order in every file: only the ids say what belongs together.
            table(
                root / "Tasks" / "ASR" / split / file, *(content if file == "wav.scp" else reversed(content))
            )
    (root / "Metadata").mkdir()
    return root


def test_kespeech_keeps_the_six_labels_of_the_paper(kespeech):
    examples = load_examples(kespeech, split="train")
    assert len(examples) == 12
    assert examples.label_counts() == dict.fromkeys(KESPEECH_PAPER_LABELS, 2)
    for index, label, speaker in found(examples):
        assert label == KESPEECH_PAPER_LABELS[index - 1] and speaker == f"spk{index}"
    assert list_splits(kespeech) == ["dev_phase1", "dev_phase2", "test", "train_phase1", "train_phase2"]
    assert len(load_examples(kespeech, split="validation")) == 12
    assert len(load_examples(kespeech, split="test")) == 6
    assert len(load_examples(kespeech, split="train_phase1")) == 6


def test_kespeech_other_labels_and_entrances(kespeech, monkeypatch):
    assert len(load_examples(kespeech, split="test", labels="all")) == 9
    two = load_examples(kespeech / "Tasks" / "ASR", split="test", labels=["Beijing", "Mandarin"])
    assert sorted(two.label_counts()) == ["Beijing", "Mandarin"]
    assert len(load_examples(kespeech / "Tasks" / "ASR" / "test")) == 6
    monkeypatch.chdir(kespeech)
    assert found(load_examples("Tasks/ASR/test"))[0][0] == 1
    assert found(load_examples(".", split="test"))[0][0] == 1
    with pytest.raises(UserError, match="none of the labels Klingon: it has Beijing"):
        load_examples(kespeech, split="test", labels=["Klingon"])


def test_labels_of_which_there_are_no_examples(folder, kespeech, caplog):
    there = sorted({example.label for example in load_examples(folder)})
    wanted = [*there[:1], "ccc"]
    with pytest.raises(UserError, match=f"has no examples of ccc, which labels names: it has {there[0]}, "):
        load_examples(folder, labels=wanted, every_label=True)
    assert not caplog.text
    assert {example.label for example in load_examples(folder, labels=wanted)} == {there[0]}
    assert "has no examples of ccc, which labels names" in caplog.text
    caplog.clear()
    # Of the paper's six, which nobody named, a part of KeSpeech may have fewer.
    (kespeech / "Tasks" / "ASR" / "test" / "utt2subdialect").write_text("utt_test_1 Ji-Lu\n")
    (kespeech / "Tasks" / "ASR" / "test" / "wav.scp").write_text("utt_test_1 x.wav\n")
    assert len(load_examples(kespeech, split="test", every_label=True)) == 1 and not caplog.text


def test_kespeech_wrong_folder(kespeech, tmp_path):
    with pytest.raises(UserError, match="is not KeSpeech"):
        load_examples(tmp_path, "kespeech")
    (kespeech / "Tasks" / "ASR" / "test" / "utt2subdialect").unlink()
    with pytest.raises(UserError, match="no label file 'utt2subdialect'"):
        load_examples(kespeech, split="test")


# --- Hugging Face ---


def encoded(index: int) -> dict:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave(index), RATE, format="WAV", subtype="FLOAT")
    return {"bytes": buffer.getvalue(), "path": f"{index}.wav"}


def hub_like(labels, **more) -> Dataset:
    """A data set as the hub's Parquet files give it: with an Audio column that needs torchcodec to decode."""
    content = {"audio": [encoded(i) for i in range(len(labels))], "dialect": labels, **more}
    return Dataset.from_dict(content).cast_column("audio", Audio(decode=False)).cast_column("audio", Audio())


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_audio_data_set_without_torchcodec():
    data = hub_like(["b", " a ", "b"], client_id=["s1", None, "s2"])
    examples = load_examples(data)
    assert found(examples) == [(0, "b", "s1"), (1, "a", None), (2, "b", "s2")]
    assert "row 1 of" in examples[1].name and "1.wav" in examples[1].name


def test_class_labels_keep_their_names_and_selection_is_respected():
    data = hub_like([0, 1, 1, 0]).cast_column("dialect", ClassLabel(names=["zh", "ar"]))
    examples = load_examples(data.select([3, 1, 2]))
    assert found(examples) == [(3, "zh", None), (1, "ar", None), (2, "ar", None)]
    shuffled = load_examples(data.shuffle(seed=3))
    assert {(i, label) for i, label, _ in found(shuffled)} == {(0, "zh"), (1, "ar"), (2, "ar"), (3, "zh")}
    unlabelled = Dataset.from_dict({"path": ["x"], "label": [-1]}).cast_column(
        "label", ClassLabel(names=["a"])
    )
    with pytest.raises(UserError, match="1 of 1 examples .* have no label"):
        load_examples(unlabelled)


def test_save_to_disk_and_splits(tmp_path):
    splits = DatasetDict(train=hub_like(["a", "b"]), test=hub_like(["a"]))
    splits.save_to_disk(tmp_path / "disk")
    assert list_splits(tmp_path / "disk") == ["train", "test"]
    assert list_splits(splits) == ["train", "test"]
    for source in (tmp_path / "disk", splits):
        assert found(load_examples(source, split="train")) == [(0, "a", None), (1, "b", None)]
        assert found(load_examples(source, split="test")) == [(0, "a", None)]
        with pytest.raises(UserError, match="several splits .train, test."):
            load_examples(source)
        with pytest.raises(UserError, match="no split 'validation': it has train, test"):
            load_examples(source, split="validation")
    splits["train"].save_to_disk(tmp_path / "one")
    assert found(load_examples(tmp_path / "one")) == [(0, "a", None), (1, "b", None)]


def test_parquet_and_arrow(tmp_path):
    data = hub_like(["a", "b", "a"])
    (tmp_path / "set" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    data.select([2]).to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    cache = str(tmp_path / "cache")
    expected = [(0, "a", None), (1, "b", None), (2, "a", None)]
    assert found(load_examples(tmp_path / "set", split="train", cache_dir=cache)) == expected
    assert found(load_examples(tmp_path / "set", split="test", cache_dir=cache)) == [(2, "a", None)]
    one = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    assert found(load_examples(one, cache_dir=cache)) == expected
    data.save_to_disk(tmp_path / "disk")
    arrow = next((tmp_path / "disk").glob("*.arrow"))
    assert found(load_examples(arrow)) == expected
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="bad.parquet cannot be loaded as a data set"):
        load_examples(tmp_path / "bad.parquet", cache_dir=cache)


def test_other_ways_to_hold_audio_in_columns(tmp_path):
    path = str(write(tmp_path / "x.wav", 7))
    paths = Dataset.from_dict({"file": [path], "accent": ["a"]})
    assert found(load_examples(paths)) == [(7, "a", None)]
    relative = Dataset.from_dict({"audio": ["x.wav"], "accent": ["a"]})
    assert found(load_examples(relative, data_root=tmp_path)) == [(7, "a", None)]
    cast = Dataset.from_dict({"audio": [path], "label": [3]}).cast_column("audio", Audio(decode=False))
    assert found(load_examples(cast)) == [(7, "3", None)]
    arrays = Dataset.from_dict({"audio": [{"array": wave(7), "sampling_rate": RATE}], "label": ["a"]})
    assert found(load_examples(arrays)) == [(7, "a", None)]
    missing = Dataset.from_dict({"path": ["x.wav", None], "label": ["a", "b"]})
    with pytest.raises(UserError, match="row 1 has no audio path in its column 'path'"):
        load_examples(missing)


def test_precomputed_features(tmp_path):
    features = np.random.default_rng(0).random((3, 80, 20), np.float32)
    data = Dataset.from_dict({"input_features": list(features), "labels": [2, 10, 0]})
    data.save_to_disk(tmp_path / "features")
    examples = load_examples(tmp_path / "features")
    assert [e.label for e in examples] == ["2", "10", "0"]
    assert all(e.has_features for e in examples)
    assert np.array_equal(examples[1].value(), features[1])
    named = data.cast_column("labels", ClassLabel(names=[f"l{i}" for i in range(11)]))
    assert [e.label for e in load_examples(named)] == ["l2", "l10", "l0"]


def test_data_sets_that_do_not_fit():
    with pytest.raises(UserError, match="no audio column that is known"):
        load_examples(Dataset.from_dict({"x": [1], "label": ["a"]}))
    with pytest.raises(UserError, match="no label column that is known by its name: it has what"):
        load_examples(hub_like(["a"]).rename_column("dialect", "what"))
    with pytest.raises(UserError, match="column 'audio' is of type"):
        load_examples(Dataset.from_dict({"audio": [1], "label": ["a"]}))
    with pytest.raises(UserError, match="label column 'label' is of type"):
        load_examples(Dataset.from_dict({"path": ["x"], "label": [[1, 2]]}))
    with pytest.raises(UserError, match="label column 'label' is of type float64"):
        load_examples(Dataset.from_dict({"path": ["x"], "label": [0.5]}))
    assert load_examples(Dataset.from_dict({"path": ["x"], "label": [2.0]}))[0].label == "2"
    with pytest.raises(UserError, match="is streamed"):
        load_examples(hub_like(["a"]).to_iterable_dataset())


def test_hub_names_go_to_load_dataset(monkeypatch):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return hub_like(["a"]) if kwargs.get("split") else DatasetDict(train=hub_like(["a", "b"]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = load_examples(
        "owner/name", split="train", dataset_config_name="egypt", revision="main", cache_dir="c", token="t"
    )
    assert len(examples) == 2
    assert calls.pop() == (
        ("owner/name", "egypt"),
        {"split": None, "cache_dir": "c", "revision": "main", "token": "t"},
    )
    assert len(load_examples("name", split="train[:10%]")) == 1
    assert calls.pop()[1]["split"] == "train[:10%]"


def test_hub_failures_are_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        try:
            raise ImportError("To support encoding audio data, please install 'torchcodec'.")
        except ImportError as error:
            raise RuntimeError("An error occurred\nwhile generating") from error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="owner/name cannot be loaded.*hf download .*owner/name") as error:
        load_examples("owner/name", split="train")
    assert "\n" not in str(error.value)

    def missing(*args, **kwargs):
        raise FileNotFoundError("Couldn't find it\non the hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError, match="Couldn't find it on the hub .and no local path has this name.$"):
        load_examples("owner/name")


# --- the choice of a format ---


def test_sources_that_are_no_data(tmp_path, clips, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, message in [
        ("nowhere/at/all", "does not exist"),
        ("nowhere.csv", "does not exist"),
        ("clips/mistyped", "does not exist"),
        ("", "does not exist"),
        ("clips/0.wav", "single audio file"),
        (3, "data must be a path"),
        (None, "data must be a path"),
    ]:
        with pytest.raises(UserError, match=message):
            load_examples(source)
    table(tmp_path / "k" / "wav.scp", "u1 a.wav")
    with pytest.raises(UserError, match="give the folder that holds wav.scp"):
        load_examples("k/wav.scp")
    with pytest.raises(UserError, match="data_format must be one of audiofolder, .* got 'zip'"):
        load_examples(clips, "zip")
    with pytest.raises(UserError, match='is a file; the format "kaldi" is a folder'):
        load_examples(table(tmp_path / "m.csv", "path,label"), "kaldi")
    with pytest.raises(UserError, match="holds no wav.scp"):
        load_examples(clips / "clips", "kaldi")
    with pytest.raises(UserError, match="no metadata.csv and no table per split"):
        load_examples(clips / "clips", "manifest")


def test_an_example_set_passes_through(clips):
    examples = load_examples(clips)
    assert load_examples(examples) is examples
    assert list_splits(examples) == []


def test_manifest_written_by_the_csv_module_round_trips(clips):
    labels = ['quo"te', "com,ma", "new\nline", "tab\there", "ordinary"]
    with open(clips / "m.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows(
            [f"clips/{i % 4}.wav" if i < 4 else "other.wav", label] for i, label in enumerate(labels)
        )
    assert [e.label for e in load_examples(clips / "m.csv")] == labels


@pytest.mark.parametrize(
    "name, kind",
    [
        ("train_phase2", "train"),
        ("dev", "validation"),
        ("test-clean", "test"),
        ("train.clean.100", "train"),
        ("adi17_dev", "validation"),
        ("latest", None),
        ("contrast", None),
    ],
)
def test_canonical_split(name, kind):
    assert canonical_split(name) == kind


def test_read_audio_takes_what_a_cell_gives():
    example = load_examples(hub_like(["a"]))[0]
    assert np.array_equal(read_audio(example.value()), wave(0))
