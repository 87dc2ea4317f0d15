"""``python -m benchmarks.heads``: every way is run."""

import json

import pytest

from benchmarks import heads


def test_all_ways_are_measured(tmp_path, capsys):
    assert heads.main(["--model", "toy", "--rounds", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    rows = found["figures"]["rows"]
    alone = ["lst", "unipt", "weighted_sum", "head", "sherl"]
    ways = [*alone, heads.SETS[0], f"{heads.SETS[0]}, one after the other", *heads.SETS[1:]]
    assert [row["way"] for row in rows] == ways and all(row["seconds"]["median"] > 0 for row in rows)
    assert all(way in printed for way in ways) and found["shapes"] == {"model": "toy", "batch": 2}
    medians = {row["way"]: row["seconds"]["median"] for row in rows}
    for row in rows[len(alone) :]:
        members = row["way"].partition(",")[0].split("+")
        assert row["dearest"] == max(members, key=medians.get)
        assert row["ratio"] == medians[row["way"]] / medians[row["dearest"]]


def test_trimmed_clips(tmp_path, capsys):
    asked = ["--model", "toy", "--rounds", "1", "--output", str(tmp_path), "--sets", "lst+sherl"]
    assert heads.main([*asked, "--seconds", "0.5"]) == 0
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["shapes"]["seconds"] == 0.5
    assert heads.main([*asked, "--seconds", "31"]) == 1
    assert "--seconds must be above 0 and at most" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["batch", "rounds"])
def test_numbers_that_make_no_sense(option, tmp_path, capsys):
    assert heads.main(["--model", "toy", f"--{option}", "0", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"--{option} must be a positive integer, got 0" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model(tmp_path, capsys):
    assert heads.main(["--model_name_or_path", str(tmp_path), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("benchmarks.heads: error: ")
