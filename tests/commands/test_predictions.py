"""The tables that `whisper-meft predict` writes."""

import csv
import io

import pytest
from whisper_meft.commands.predict import as_csv, segments_as_csv, several_as_csv
from whisper_meft.errors import UserError
from whisper_meft.evaluation.loaded import usable_device

LABELS = ["file", "label", "end", "probability of label", "other"]
CHANCES = {label: 0.1 * (index + 1) for index, label in enumerate(LABELS)}


def test_classes_called_as_a_column_have_columns_of_their_own():
    row = {"file": "a.wav", "label": "file", "probabilities": CHANCES}
    window = row | {"start": 0.0, "end": 1.0}
    both = {"file": "a.wav", "models": {"m": row, "n": row}}
    shown = [
        "probability of file",
        "probability of probability of label",
        "end",
        "probability of label",
        "other",
    ]
    ends = [*shown[:2], "probability of end", *shown[3:]]
    several = ["file", *(f"{name}:{head}" for name in "mn" for head in ("label", "file", *shown[1:]))]
    for text, columns in (
        (as_csv([row], LABELS), ["file", "label", *shown]),
        (segments_as_csv([("a.wav", [window])], LABELS), ["file", "start", "end", "label", *ends]),
        (several_as_csv([both], "mn", [LABELS] * 2), several),
    ):
        heads, cells = csv.reader(io.StringIO(text))
        assert heads == columns and len(set(heads)) == len(heads)
        assert cells[-5:] == [f"{chance:.6f}" for chance in CHANCES.values()]


def test_a_device_that_computes_nothing_is_refused():
    for name in ("meta", "nonsense", "cpu:x"):
        with pytest.raises(
            UserError, match=f"^device: cannot use '{name}', cpu or a GPU such as cuda"
        ) as found:
            usable_device(name)
        assert "\n" not in str(found.value)
    assert usable_device("cpu").type == "cpu"
