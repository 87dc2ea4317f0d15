"""How data is read: the options of every command that reads it."""

import json
from types import NoneType
from typing import get_args, get_type_hints

import pytest
from data_fixtures import write
from datasets import Dataset
from whisper_meft.commands.evaluate import EvaluateArguments, load_streamed
from whisper_meft.data import load_examples
from whisper_meft.data.options import FORMATS
from whisper_meft.errors import UserError
from whisper_meft.options.common import DataFormatArguments


def test_every_format_can_be_named():
    literal, none = get_args(get_type_hints(DataFormatArguments)["data_format"])
    assert get_args(literal) == FORMATS and none is NoneType


@pytest.mark.parametrize("content", ["a\r\n\n c \nb\u2028b", ["a", "c", "b\u2028b"]])
def test_labels_in_a_file_are_the_classes_that_are_kept(tmp_path, content):
    file = tmp_path / ("classes.txt" if isinstance(content, str) else "classes.JSON")
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    for i, label in enumerate("abc"):
        write(tmp_path / "clips" / label / "0.wav", i)
    options = DataFormatArguments(labels=[str(file)]).reader_options()
    assert options["labels"] == ["a", "c", "b\u2028b"]
    assert sorted(load_examples(tmp_path / "clips", **options).label_counts()) == ["a", "c"]
    Dataset.from_dict({"path": ["x.wav"], "label": ["a"]}).to_parquet(tmp_path / "m.parquet")
    how = {"data": str(tmp_path / "m.parquet"), "streaming": True, "dataset_cache_dir": str(tmp_path / "c")}
    shards, labels = load_streamed(EvaluateArguments(**how, labels=[str(file)]))
    assert labels == {"a", "c", "b\u2028b"} and [example.label for example in shards] == ["a"]
    assert load_streamed(EvaluateArguments(**how, labels=["all"]))[1] is None
    assert load_streamed(EvaluateArguments(**how, labels=["a", "b.txt"]))[1] == {"a", "b.txt"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.txt", None, "labels: cannot read .*gone.txt: No such file"),
        ("gone.json", None, "cannot read .*gone.json"),
        ("a.txt", b"\xff\xfea", "labels: cannot read .*a.txt"),
        ("a.txt", b"\n \n", "labels: .*a.txt names no classes"),
        ("a.json", b'{"a": 0}', "labels: .*a.json must hold a JSON list of classes"),
        ("a.json", b"[1, 2]", "labels: .*a.json must hold a JSON list of classes"),
    ],
)
def test_files_of_labels_that_are_none(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        DataFormatArguments(labels=[str(tmp_path / name)]).reader_options()
