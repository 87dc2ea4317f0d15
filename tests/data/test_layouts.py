"""Which folders and tables are classes and which are splits, above all where names can be both."""

import logging

import pytest
from data_fixtures import table, write
from datasets import Dataset, DatasetDict
from whisper_meft.data import list_splits, load_examples
from whisper_meft.data.splits import canonical_split, split_kinds
from whisper_meft.errors import UserError


def tree(root, *paths: str):
    """Clips at these paths; ``{a,b}`` stands for both."""
    for path in paths:
        if "{" in path:
            before, rest = path.split("{", 1)
            inside, after = rest.split("}", 1)
            tree(root, *(f"{before}{each}{after}" for each in inside.split(",")))
        else:
            write(root / f"{path}.wav", 0, 0.01)
    return root


def counts(source, **options) -> dict:
    """Examples by label, of each split where there are several."""
    splits = list_splits(source, **options)
    if not splits:
        return dict(load_examples(source, **options).label_counts())
    return {name: dict(load_examples(source, split=name, **options).label_counts()) for name in splits}


# --- folders that are called like languages and like splits ---


@pytest.mark.parametrize("names", ["tr,en,de", "cv,ru", "val,dev", "dev,tst,deu", "tr,cv,tt", "trn,eng"])
def test_language_codes_are_classes(tmp_path, names):
    tree(tmp_path, f"{{{names}}}/{{s0,s1}}/a")
    assert counts(tmp_path) == dict.fromkeys(names.split(","), 2)


def test_turkish_and_chuvash_alone_are_classes_and_a_line_says_so(tmp_path, caplog):
    tree(tmp_path, "{tr,cv}/{s0,s1,s2}/{a,b}")
    assert counts(tmp_path) == {"tr": 6, "cv": 6}
    assert "cv, tr are taken as classes" in caplog.text and "--layout split/class" in caplog.text
    assert counts(tmp_path, layout="split/class") == {
        split: {"s0": 2, "s1": 2, "s2": 2} for split in ("cv", "tr")
    }


def test_codes_of_three_letters_alone_are_asked_for(tmp_path):
    tree(tmp_path, "{trn,dev,tst}/{north,south}/a")
    with pytest.raises(UserError, match="dev, trn, tst may be splits or languages.*--layout") as error:
        load_examples(tmp_path)
    assert "north" not in str(error.value)
    assert counts(tmp_path, layout="class") == {"trn": 2, "dev": 2, "tst": 2}
    assert counts(tmp_path, layout="split/class")["trn"] == {"north": 1, "south": 1}


def test_codes_that_share_no_folder_are_classes(tmp_path):
    tree(tmp_path, "trn/{s1,s2}/a", "dev/{s3,s4}/a")
    assert counts(tmp_path) == {"trn": 2, "dev": 2}


@pytest.mark.parametrize("names", ["train,dev", "training,cv", "tr,test", "train,val,tst", "TRAIN,Dev,eval"])
def test_codes_beside_a_name_that_is_no_code_are_splits(tmp_path, names):
    tree(tmp_path, f"{{{names}}}/{{tr,en}}/a")
    assert counts(tmp_path) == {name: {"tr": 1, "en": 1} for name in names.split(",")}


def test_splits_with_more_in_their_names(tmp_path):
    tree(tmp_path, "{train-clean,train-other,dev_1,test set}/{tr,en}/a")
    assert set(counts(tmp_path)) == {"train-clean", "train-other", "dev_1", "test set"}
    assert load_examples(tmp_path, split="train").label_counts() == {"tr": 2, "en": 2}


def test_a_class_called_train_beside_other_classes(tmp_path):
    tree(tmp_path, "{train,bus,car}/a")
    assert counts(tmp_path) == {"train": 1, "bus": 1, "car": 1}


def test_splits_without_class_folders(tmp_path):
    tree(tmp_path, "{train,test}/a")
    with pytest.raises(UserError, match="test, train are called like splits, and 2 audio files lie in them"):
        load_examples(tmp_path, split="train")
    assert counts(tmp_path, layout="class") == {"train": 1, "test": 1}


def test_a_split_beside_the_classes_that_it_holds(tmp_path):
    tree(tmp_path, "{en,de,tr}/a", "dev/{en,de}/b")  # VoxLingua107 as it is unpacked
    with pytest.raises(UserError, match="dev holds folders called like those beside it .de, en.*train"):
        load_examples(tmp_path)


def test_layout_is_for_folders(tmp_path):
    with pytest.raises(UserError, match="layout must be one of class, split/class, class/split, got 'x'"):
        load_examples(tmp_path, layout="x")
    with pytest.raises(UserError, match='layout says what folders .* the format here is "huggingface"'):
        load_examples(Dataset.from_dict({"path": ["x"], "label": ["a"]}), layout="class")


def test_a_folder_of_noise_beside_classes_is_left_out(tmp_path, caplog):
    """Speech Commands; its recordings of noise last a minute and are cut to make silence of."""
    tree(tmp_path / "plain", "{yes,no,_silence_,_background_noise_}/{a,b}")
    assert counts(tmp_path / "plain") == {"yes": 2, "no": 2, "_silence_": 2}
    assert "plain: 2 files in _background_noise_ are left out, as" in caplog.text
    tree(tmp_path / "split", "{train,test}/{yes,no}/a", "train/_background_noise_/a", "_background_noise_/a")
    assert counts(tmp_path / "split") == {name: {"yes": 1, "no": 1} for name in ("train", "test")}
    tree(tmp_path / "noise", "_background_noise_/a")
    assert counts(tmp_path / "noise") == {"_background_noise_": 1}


# --- class first, split second ---


@pytest.mark.parametrize("between", ["", "audio/", "a/b/"])
def test_class_first_split_second(tmp_path, between, caplog):
    tree(tmp_path, f"{{en,de,tr}}/{between}{{train,dev,test}}/{{s1,s2}}/x")
    assert counts(tmp_path) == {s: {"en": 2, "de": 2, "tr": 2} for s in ("train", "dev", "test")}
    assert "taken as classes, and dev, test, train in them as splits" in caplog.text
    paths = [example.audio for example in load_examples(tmp_path, split="train")]
    assert len(paths) == 6 and all("/train/" in path for path in paths)
    assert counts(tmp_path, layout="class") == {"en": 6, "de": 6, "tr": 6}


def test_class_first_with_splits_in_some_classes_only(tmp_path):
    tree(tmp_path, "en/{train,test}/x", "de/s1/x")
    with pytest.raises(UserError, match="mixes split folders .test, train. with other folders of audio .s1."):
        load_examples(tmp_path)
    with pytest.raises(UserError, match="class/split needs a folder such as train or test in every class"):
        load_examples(tmp_path, layout="class/split")


def test_class_first_with_codes_for_splits(tmp_path):
    tree(tmp_path, "{en,de}/{tr,cv}/x")
    with pytest.raises(UserError, match="cv, tr may be splits or languages"):
        load_examples(tmp_path)
    assert counts(tmp_path, layout="class/split") == {s: {"en": 1, "de": 1} for s in ("tr", "cv")}


def test_languages_that_are_codes_with_splits_in_them(tmp_path, caplog):
    tree(tmp_path, "{trn,dev}/{train,test}/{s1,s2}/x")
    assert counts(tmp_path) == {s: {"trn": 2, "dev": 2} for s in ("train", "test")}
    assert "may be splits" not in caplog.text


def test_languages_in_families_are_no_splits(tmp_path):
    tree(tmp_path, "turkic/{tr,cv}/x", "slavic/ru/x")
    assert counts(tmp_path) == {"turkic": 2, "slavic": 1}


# --- tables ---


def listed(root, name: str, *labels: str):
    for label in labels:
        tree(root / "clips", label)
    rows = (f"../clips/{each}.wav,{each}" for each in labels)
    return table(root / "tables" / name, "path,language", *rows)


def test_tables_named_by_language_are_read_together(tmp_path, caplog):
    for name in ("tr", "cv", "de"):
        listed(tmp_path, f"{name}.csv", name)
    assert counts(tmp_path / "tables") == {"tr": 1, "cv": 1, "de": 1}
    assert "read as one data set" in caplog.text and "cv.csv, de.csv, tr.csv" in caplog.text
    assert set(list_splits(tmp_path / "tables", layout="split/class")) == {"tr", "cv", "de"}


def test_tables_that_may_be_languages_or_splits_are_asked_for(tmp_path):
    listed(tmp_path, "trn.csv", "a", "b")
    listed(tmp_path, "dev.csv", "a", "b")
    with pytest.raises(UserError, match="the tables dev, trn may be splits or languages: say --layout"):
        load_examples(tmp_path / "tables")
    with pytest.raises(UserError, match="is in .*dev.csv and in .*trn.csv"):
        load_examples(tmp_path / "tables", layout="class")
    assert set(list_splits(tmp_path / "tables", layout="split/class")) == {"trn", "dev"}
    listed(tmp_path, "train.csv", "a", "b")
    assert set(list_splits(tmp_path / "tables")) == {"trn", "dev", "train"}
    assert load_examples(tmp_path / "tables", split="train").description.endswith("(train)")


def test_tables_of_splits_without_one_for_training(tmp_path):
    listed(tmp_path, "dev.csv", "a", "b")
    listed(tmp_path, "test.csv", "c")
    assert counts(tmp_path / "tables") == {"dev": {"a": 1, "b": 1}, "test": {"c": 1}}


def test_folders_of_splits_beside_a_table(tmp_path):
    tree(tmp_path, "{one,two}/{a,b}/x")
    table(tmp_path / "notes.csv", "path,what", "one/a/x.wav,y")
    assert set(counts(tmp_path, layout="split/class")) == {"one", "two"}


def test_one_table_twice(tmp_path):
    listed(tmp_path, "train.csv", "a")
    listed(tmp_path, "train.tsv", "a")
    with pytest.raises(UserError, match="holds train.csv, train.tsv, which go by one name"):
        load_examples(tmp_path / "tables")


def test_tables_read_together_that_share_a_clip(tmp_path):
    listed(tmp_path, "tr.csv", "a", "b")
    listed(tmp_path, "all.csv", "a", "b")
    with pytest.raises(UserError, match=r"a\.wav is in .*all\.csv and in .*tr\.csv: give one of the tables"):
        load_examples(tmp_path / "tables")


def common_voice(root, language: str, accents: str = ""):
    for i, name in enumerate(("train", "dev", "test")):
        tree(root / language, f"clips/{language}_{i}")
        row = f"s{i}\t{language}_{i}.wav\thi\t{accents}\t{language}"
        table(root / language / f"{name}.tsv", "client_id\tpath\tsentence\taccents\tlocale", row)
    table(root / language / "validated.tsv", "client_id\tpath\tsentence\taccents\tlocale", row)


def test_common_voice(tmp_path):
    common_voice(tmp_path, "cv", accents="Anatri")
    examples = load_examples(tmp_path / "cv", split="train")
    assert [(e.label, e.speaker) for e in examples] == [("Anatri", "s0")]
    assert examples[0].audio.endswith("clips/cv_0.wav") and len(examples[0].decode()[0])
    common_voice(tmp_path, "tr")
    with pytest.raises(UserError, match="class may be the folder cv or the column 'accents'.*label_column"):
        load_examples(tmp_path, split="train")
    by_language = counts(tmp_path, label_column_name="locale")
    assert by_language == {s: {"cv": 1, "tr": 1} for s in ("train", "dev", "test")}
    tree(tmp_path, "de/clips/x")
    with pytest.raises(UserError, match="a table per split in some of its folders and none in de"):
        load_examples(tmp_path, split="train", label_column_name="locale")


def test_tables_without_labels_in_folders_of_classes(tmp_path):
    for language in ("en", "de"):
        tree(tmp_path, f"{language}/wavs/{{a,b}}")
        table(tmp_path / language / "train.csv", "path,text", "a.wav,hi")
        table(tmp_path / language / "test.csv", "path,text", "b.wav,ho")
    assert counts(tmp_path) == {s: {"en": 1, "de": 1} for s in ("train", "test")}


def test_splits_in_the_paths_of_a_table(tmp_path, caplog):
    path = table(
        tmp_path / "m.csv",
        "path,label",
        *(f"en/{split}/{i}.wav,{label}" for i, (split, label) in enumerate([("train", "a"), ("test", "b")])),
    )
    assert counts(path) == {"train": {"a": 1}, "test": {"b": 1}}
    assert "splits are taken from the folders in its paths (train, test" in caplog.text
    assert counts(path, layout="class") == {"a": 1, "b": 1}
    table(path, "path,label,split", "train/0.wav,a,one", "test/1.wav,b,one")
    assert counts(path) == {"one": {"a": 1, "b": 1}}
    table(path, "path,label", "tr/0.wav,a", "cv/1.wav,b")
    assert counts(path) == {"a": 1, "b": 1}


def test_a_table_with_paths_of_splits_and_others_says_so(tmp_path, caplog):
    path = table(tmp_path / "m.csv", "path,label", "train/0.wav,a", "test/1.wav,b", "more/2.wav,b")
    assert counts(path) == {"a": 1, "b": 2}
    assert "mixes split folders (test, train)" in caplog.text and "no split is taken" in caplog.text


# --- splits of other sources ---


def rows(*labels: str) -> Dataset:
    return Dataset.from_dict({"path": [f"{i}.wav" for i in range(len(labels))], "label": labels})


def test_languages_as_splits_of_a_data_set_are_not_taken_for_others():
    data = DatasetDict(tr=rows("a", "b"), en=rows("a", "b"), de=rows("a"))
    with pytest.raises(UserError, match="no split 'train': it has tr, en, de; tr may be a language"):
        load_examples(data, split="train")
    assert len(load_examples(data, split="tr")) == 2
    assert len(load_examples(DatasetDict(train=rows("a"), cv=rows("b")), split="validation")) == 1
    assert len(load_examples(DatasetDict(dev=rows("a")), split="validation")) == 1


def test_kaldi_folders_named_by_language(tmp_path):
    for name in ("tr", "en"):
        table(tmp_path / name / "wav.scp", f"u{name} x.wav")
        table(tmp_path / name / "utt2lang", f"u{name} {name}")
    with pytest.raises(UserError, match="no split 'train': it has en, tr; tr may be a language"):
        load_examples(tmp_path, split="train")


@pytest.mark.parametrize(
    "name, kind",
    [
        ("tr", "train"),
        ("cv", "validation"),
        ("tr_tr", None),
        ("cv-corpus-17", None),
        ("fleurs_tr", None),
        ("my-val", "validation"),
        ("ｔｅｓｔ", "test"),
        ("čtest", None),
    ],
)
def test_short_names_are_splits_as_a_whole_only(name, kind):
    assert canonical_split(name) == kind


def test_split_kinds_look_at_what_stands_beside():
    assert split_kinds(["tr", "en", "dev"]) == {}
    assert split_kinds(["tr", "en", "test"]) == {"tr": "train", "test": "test"}
    assert split_kinds(["train_1", "dev"]) == {"train_1": "train", "dev": "validation"}


def test_what_is_assumed_is_said_once(tmp_path, caplog):
    tree(tmp_path, "{en,de}/{train,test}/x")
    with caplog.at_level(logging.WARNING):
        list_splits(tmp_path), load_examples(tmp_path, split="train"), load_examples(tmp_path, split="test")
    assert caplog.text.count("as splits") == 1
