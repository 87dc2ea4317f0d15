"""Numbers that begin with a dash, as values of options."""

import json
from dataclasses import dataclass

import pytest
from whisper_meft.options.parser import Parser, UsageError


@dataclass
class Some:
    """Options that take numbers."""

    one: float = 0.0
    two: list[float] | None = None


@pytest.mark.parametrize(
    "text", ["-1", "-1.", "-.5", "-0.25", "-1e-05", "-1E5", "-2.5e+3", "-inf", "-Infinity"]
)
def test_negative_numbers_are_values(text, tmp_path):
    for arguments in ([f"--one={text}", "--two", text, "3"], ["--two", "3", text, "--one", text]):
        some = Parser("some", (Some,), usage="").parse(arguments)[0]
        assert some.one == float(text) and sorted(some.two) == sorted([float(text), 3.0])


def test_a_small_one_in_a_json_file(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"two": [-0.00001, 3], "one": -1e-300}))
    some = Parser("some", (Some,), usage="").parse([str(path)])[0]
    assert some.two == [-1e-5, 3.0] and some.one == -1e-300


@pytest.mark.parametrize("text", ["-e", "-1x", "-1e", "--1", "-one"])
def test_others_are_no_values(text):
    with pytest.raises(UsageError):
        Parser("some", (Some,), usage="").parse(["--two", text])
