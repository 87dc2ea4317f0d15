"""``--preset``: its options come first, those that are given win."""

import json

import pytest
from whisper_meft.commands.train import make_parser
from whisper_meft.options.parser import UsageError
from whisper_meft.options.training import PRESETS, parsed_options

NEEDED = ["--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]


def options_of(*argv: str) -> dict:
    groups = make_parser().parse([*NEEDED, *argv])
    return {name: value for group in groups for name, value in vars(group).items()}


def as_given(name: str) -> dict:
    given = PRESETS[name]
    return {key: value for key, value in options_of("--preset", name).items() if key in given}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_options_are(name):
    assert as_given(name) == {**PRESETS[name], "lr_scheduler_type": as_given(name)["lr_scheduler_type"]}
    assert as_given(name)["lr_scheduler_type"].value == PRESETS[name]["lr_scheduler_type"]
    told = make_parser().format_help()
    told = " ".join(told.split())
    assert all(f"--{option} {value}" in told for option, value in PRESETS[name].items())


def test_without_one_nothing_changes():
    found = options_of()
    assert found["preset"] is None and found["pooling"] is None and found["method"] == "lst"
    assert found["learning_rate"] is None and found["max_frames"] == "fidelity"


@pytest.mark.parametrize("place", ["before", "behind"])
def test_what_is_given_wins(place):
    chosen = ["--method", "sherl", "--learning_rate=1e-5"]
    argv = [*chosen, "--preset=recommended"] if place == "before" else ["--preset", "recommended", *chosen]
    found = options_of(*argv)
    assert found["method"] == "sherl" and found["learning_rate"] == 1e-5 and found["pooling"] == "statistics"


def test_from_a_file_and_from_python(tmp_path):
    values = {"model_name_or_path": "m", "train_data": "d", "output_dir": "o", "preset": "recommended"}
    (tmp_path / "options.json").write_text(json.dumps({**values, "num_train_epochs": 3}))
    _, method, _, training = make_parser().parse([str(tmp_path / "options.json")])
    assert method.pooling == "statistics" and training.num_train_epochs == 3
    _, method, _, training = parsed_options({**values, "pooling": "mean"})
    assert method.pooling == "mean" and training.learning_rate == PRESETS["recommended"]["learning_rate"]


def test_an_unknown_name_is_one_line():
    with pytest.raises(UsageError, match="--preset: invalid choice: 'best'"):
        options_of("--preset", "best")
