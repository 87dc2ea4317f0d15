"""Names in any script: columns, labels, speakers and paths, however their letters are written."""

import unicodedata

import pytest
from data_fixtures import found, table, write
from datasets import Dataset
from whisper_meft.data import (
    Example,
    ExampleSet,
    check_known_labels,
    load_examples,
    warn_on_shared_audio,
    warn_on_shared_speakers,
)
from whisper_meft.data.names import alike, normal
from whisper_meft.errors import UserError


def decomposed(text: str) -> str:
    assert (other := unicodedata.normalize("NFD", text)) != text
    return other


@pytest.mark.parametrize(
    "name, other",
    [
        ("方言", "方言 "),
        ("ＬＡＢＥＬ", "label"),
        ("Straße", "STRASSE"),
        ("Диалект", "диалект"),
        ("Dialéct", decomposed("dialéct")),
        ("가", decomposed("가")),
        ("file-name", "File Name"),
        ("می‌خواهم", "میخواهم"),
    ],
)
def test_names_that_are_the_same(name, other):
    assert normal(name) == normal(other) != ""


@pytest.mark.parametrize(
    "name, other", [("口音", "方言"), ("हिन्दी", "हनद"), ("#", "@"), ("β", "b"), ("e", "é")]
)
def test_names_that_are_not(name, other):
    assert normal(name) != normal(other)


OPTIONS = ["audio", "label", "speaker", "start", "stop", "channel"]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_column_in_another_script_that_is_not_there(tmp_path, option):
    write(tmp_path / "0.wav", 0)
    path = table(tmp_path / "m.csv", "path,性别,方言,label", "0.wav,男,官话,x")
    data = Dataset.from_dict({"path": ["0.wav"], "性别": ["男"], "label": ["x"]})
    for source in (path, data):
        with pytest.raises(UserError, match="has no column '口音': it has .*性别"):
            load_examples(source, **{f"{option}_column_name": "口音"})


def test_columns_in_another_script(tmp_path):
    write(tmp_path / "0.wav", 0)
    path = table(tmp_path / "m.csv", "音频,性别,방언,说话人", "0.wav,男,官话,s1")
    names = {"audio": "音频", "label": decomposed("방언"), "speaker": "说话人"}
    options = {f"{key}_column_name": value for key, value in names.items()}
    assert found(load_examples(path, **options)) == [(0, "官话", "s1")]
    data = Dataset.from_dict({"音频": [str(tmp_path / "0.wav")], "방언": ["官话"], "说话人": ["s1"]})
    assert found(load_examples(data, **options)) == [(0, "官话", "s1")]


def test_columns_that_differ_in_case_only(tmp_path):
    path = table(tmp_path / "m.csv", "path,Label,label", "0.wav,a,b")
    for source in (path, Dataset.from_dict({"path": ["0.wav"], "Label": ["a"], "label": ["b"]})):
        with pytest.raises(UserError, match="differ only in how they are written .'Label', 'label'"):
            load_examples(source)
        with pytest.raises(UserError, match="differ only in how they are written"):
            load_examples(source, label_column_name="LABEL")
        assert [e.label for e in load_examples(source, label_column_name="Label")] == ["a"]
        assert [e.label for e in load_examples(source, label_column_name="label")] == ["b"]


def test_labels_composed_in_two_ways_are_one_and_it_is_said(tmp_path, caplog):
    labels = ["Gascón", decomposed("Gascón"), "x"]
    path = table(tmp_path / "m.csv", "path,label", *(f"{i}.wav,{label}" for i, label in enumerate(labels)))
    data = Dataset.from_dict({"path": ["0", "1", "2"], "label": labels})
    for i, label in enumerate(labels):
        write(tmp_path / "tree" / label / f"{i}.wav", i)
    for number, source in enumerate((path, data, tmp_path / "tree"), 1):
        assert load_examples(source).label_counts() == {"Gascón": 2, "x": 1}
        assert caplog.text.count("composed in two ways (NFC, NFD); each is one class: Gascón") == number


def test_labels_that_differ_in_case_are_said(tmp_path, caplog):
    path = table(tmp_path / "m.csv", "path,label", "0.wav,Ji-Lu", "1.wav,ji-lu", "2.wav,Ａ", "3.wav,b")
    assert len(load_examples(path).label_counts()) == 4
    told = "differ only in case, width, white space or what cannot be seen, each a class of its own: "
    assert f"{told}'Ji-Lu' and 'ji-lu'" in caplog.text
    assert alike(["Ａ", "A", "b"]) == [["A", "Ａ"]]


def test_labels_that_look_the_same_are_said(tmp_path, caplog):
    rows = "0.wav,a", "1.wav,a\u200b", "2.wav,new  land", "3.wav,New land", "4.wav,newland"
    assert len(load_examples(table(tmp_path / "m.csv", "path,label", *rows)).label_counts()) == 5
    assert "each a class of its own: 'New land' and 'new  land', 'a' and 'a\\u200b'" in caplog.text
    assert alike(["\ufeffa", "a", "b c", "b\xa0c", "bc"]) == [["a", "\ufeffa"], ["b c", "b\xa0c"]]


def test_labels_to_keep_are_compared_composed(tmp_path):
    path = table(tmp_path / "m.csv", "path,label", f"0.wav,{decomposed('é')}", "1.wav,e", "2.wav,x")
    assert [e.label for e in load_examples(path, labels=["é", "e"])] == ["é", "e"]
    assert [e.label for e in load_examples(path, labels=decomposed("é"))] == ["é"]
    with pytest.raises(UserError, match="has not all of the labels .*; 'X' is written 'x' there"):
        load_examples(path, labels=["e", "X"])
    with pytest.raises(UserError, match="none of the labels X: it has .*'X' is written 'x' there"):
        load_examples(path, labels=["X"])


def test_sets_are_compared_composed(caplog):
    train = ExampleSet([Example("é.wav", "é", "Zoé")], "train")
    other = ExampleSet([Example(decomposed("é.wav"), decomposed("é"), decomposed("Zoé"))], "test")
    check_known_labels(other, ["é"])
    assert warn_on_shared_speakers(train, other) == ["Zoé"]
    assert len(warn_on_shared_audio(train, other)) == 1
    with pytest.raises(UserError, match="labels that the training data has not.*'é' is written 'É' there"):
        check_known_labels(other, ["É"])


def test_paths_composed_in_another_way_are_found(tmp_path, caplog):
    write(tmp_path / decomposed("Ö") / decomposed("é.wav"), 3)
    path = table(tmp_path / "m.csv", "path,label", "Ö/é.wav,a", "Ö/none.wav,b")
    examples = load_examples(path)
    assert found(examples[:1]) == [(3, "a", None)]
    assert "1 paths have their letters composed in another way than their files (NFC, NFD)" in caplog.text
    table(tmp_path / "k" / "wav.scp", f"u1 {tmp_path}/Ö/é.wav")
    table(tmp_path / "k" / "utt2lang", "u1 a")
    assert found(load_examples(tmp_path / "k")) == [(3, "a", None)]
    table(path, "path,label", "Ö/é.wav,a", f"{decomposed('Ö/é.wav')},b")
    with pytest.raises(UserError, match="is given twice, as 'a' and as 'b'"):
        load_examples(path)
