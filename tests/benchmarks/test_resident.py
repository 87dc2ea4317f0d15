"""The resident set of a whole process that trains one step."""

import json

from benchmarks import resident


def test_the_stages_of_a_step(tmp_path, capsys):
    options = ["--model", "tiny", "--batch", "1", "--dtype", "float32", "--output", str(tmp_path)]
    assert resident.main(options) == 0
    (file,) = tmp_path.glob("resident-*.json")
    found = json.loads(file.read_text())
    peaks = {row["stage"]: row["peak_bytes"] for row in found["figures"]}
    assert list(peaks) == ["imports", "model", "forward", "backward", "step"]
    assert sorted(peaks.values()) == list(peaks.values())
    weights = 8_208_384 * 4  # of whisper-tiny's encoder
    assert peaks["model"] - peaks["imports"] > 0.8 * weights
    assert peaks["forward"] > peaks["model"]
    assert "after backward" in capsys.readouterr().out


def test_a_mistake_is_one_line(capsys):
    assert resident.main(["--method", "nothing", "--no-record"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "method must be one of" in error
