"""The study of examples/study: its page is what its records give, its statistics, and that it goes on."""

import argparse
import shutil
import sys
from pathlib import Path

import pytest
from training_fixtures import make_audio_folder, make_backbone
from whisper_meft import MeftConfig, UserError
from whisper_meft.commands.compare import make_parser
from whisper_meft.comparison.arguments import RATE_FACTOR

FOLDER = Path(__file__).parents[2] / "examples" / "study"
sys.path.append(str(FOLDER))

import study  # noqa: E402
import study_report  # noqa: E402

RECORDS = study_report.load(FOLDER / "results")
TRAINED = {part: found for part, found in RECORDS.items() if "test_reference" in found["shapes"]}
SEARCHES = [part for part, found in TRAINED.items() if "search" in found["figures"][0]]


def good_rows(found: dict) -> list[dict]:
    return [row for row in found["figures"] if row["status"] == "ok"]


# --- what is committed --------------------------------------------------------------------------------------


def test_the_page_is_what_the_records_give():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert study_report.filled(text, RECORDS) == text, "run python examples/study/study.py --report"
    tables = {match["name"] for match in study_report._MARKED.finditer(text)}
    assert tables == set(study_report.TABLES)
    for name in study_report.FIGURES:
        assert f"({name}.png)" in text and (FOLDER / f"{name}.png").is_file()


def test_every_part_is_there_with_its_origin():
    assert set(RECORDS) == set(study.PARTS)
    assert set(study.METHODS) == set(MeftConfig.methods())
    for found in RECORDS.values():
        where = found["environment"]
        assert where["commit"] and where["torch"] and where["device"] and where["threads"] == 1
        assert found["command"].startswith("python examples/study/study.py")


@pytest.mark.parametrize("part", TRAINED)
def test_scores_are_those_of_the_answers(part):
    found = TRAINED[part]
    shapes = found["shapes"]
    reference = shapes["test_reference"]
    assert len(reference) == len(shapes["test_speakers"].split()) == shapes["test_clips"]
    for row in good_rows(found):
        assert [seed["seed"] for seed in row["seeds"]] == list(range(shapes["seeds"]))
        shares = [
            sum(map(str.__eq__, seed["predicted"], reference)) / len(reference) for seed in row["seeds"]
        ]
        assert row["accuracy"]["values"] == pytest.approx(shares)
        assert row["accuracy"]["mean"] == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize("part", SEARCHES)
def test_rates_are_chosen_on_validation_clips(part):
    chosen = {row["method"]: row["learning_rate"] for row in good_rows(RECORDS[study.SEARCHED])}
    for row in good_rows(TRAINED[part]):
        tried = [run["learning_rate"] for run in row["search"]]
        runs = [run for run in row["search"] if "failed" not in run]
        best = max(runs, key=lambda run: (run["validation_accuracy"], -run["validation_loss"]))
        assert row["learning_rate"] == best["learning_rate"]
        if part == study.SEARCHED:
            assert len(tried) == len(study.RATES)
        else:
            method = row["method"].partition(":")[0]
            factor = RATE_FACTOR.get(method, 1)
            steps = [pytest.approx([rate * factor, lower * factor]) for rate, lower in study.LOWER.items()]
            assert tried[0] == pytest.approx(chosen[method]) and tried in steps


# --- statistics ---------------------------------------------------------------------------------------------


def test_differences_are_paired_and_drawn_by_speaker():
    shapes = {"test_reference": "0101010101", "test_speakers": " ".join("aabbccddde")}
    right, wrong = shapes["test_reference"], "1010101010"

    def row(*predicted: str) -> dict:
        return {"seeds": [{"predicted": each} for each in predicted]}

    assert study_report.difference(shapes, row(right, right), row(wrong, wrong)) == {
        "mean": 100.0,
        "low": 100.0,
        "high": 100.0,
    }
    same = study_report.difference(shapes, row("0101011010"), row("0101011010"))
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0}  # the same clips on both sides: no noise at all
    first_half = row("0101101010")  # right on the four clips of a and b alone
    gap = study_report.difference(shapes, first_half, row(wrong))
    assert gap["mean"] == pytest.approx(40.0)
    assert gap["low"] == 0.0 and gap["high"] > 75  # five voices: as wide as draws of voices make it
    seeds = study_report.difference(shapes, row(right, wrong), row(wrong, wrong))
    assert seeds["mean"] == 50.0 and (seeds["low"], seeds["high"]) == (0.0, 100.0)


# --- the script ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study on a random backbone and tones, and the options that it is run with."""
    make_backbone(tmp_path / "backbone")
    make_audio_folder(tmp_path / "corpus" / "train", per_class=4)
    make_audio_folder(tmp_path / "corpus" / "validation", per_class=2, seed=2)
    make_audio_folder(tmp_path / "corpus" / "test", per_class=2, seed=1)
    monkeypatch.setattr(study, "SEEDS", 2)
    argv = {
        "model_name_or_path": tmp_path / "backbone",
        "train_data": tmp_path / "corpus",
        "output_dir": tmp_path / "runs",
        "num_train_epochs": 1,
        "batch_size": 4,
        "use_cpu": True,
    }
    (arguments,) = make_parser().parse([f"--{name}={value}" for name, value in argv.items()])
    (tmp_path / "results").mkdir()
    options = argparse.Namespace(results=tmp_path / "results", work=tmp_path / "work")
    return study.Study(arguments), options


def test_a_part_goes_on_where_it_was(tiny, monkeypatch, capsys):
    tiny_study, options = tiny
    runs = []
    original = study.Study.run

    def counted(self, method, rate, seed):
        runs.append((method, rate, seed))
        if method == "weighted_sum" and stop:
            raise KeyboardInterrupt
        return original(self, method, rate, seed)

    monkeypatch.setattr(study.Study, "run", counted)
    shapes = {"test_reference": study.digits(tiny_study.reference()), "test_speakers": "a b a b a b"}

    def go(entries, shapes=shapes):
        study.train_part(options, "part", tiny_study, shapes, dict.fromkeys(entries, [1e-3, 1e-2]))

    stop = True
    with pytest.raises(KeyboardInterrupt):
        go(["head", "lst:layers=[9]", "weighted_sum"])
    stop = False
    assert [run[0] for run in runs] == ["head"] * 3 + ["lst:layers=[9]"] * 2 + ["weighted_sum"]
    runs.clear()
    go(["head", "weighted_sum"])
    assert {run[0] for run in runs} == {"weighted_sum"}
    head, weighted = study_report.load(options.results)["part"]["figures"]
    assert [head["method"], weighted["method"]] == [
        "head",
        "weighted_sum",
    ]  # what failed was tried again or left
    for row in (head, weighted):
        assert len(row["search"]) == 2 and len(row["seeds"]) == 2
        for seed in row["seeds"]:
            right = sum(map(str.__eq__, seed["predicted"], shapes["test_reference"]))
            assert seed["accuracy"] == pytest.approx(right / 6)
    assert head["trainable_parameters"] == 32 * 16 + 16 + 16 * 3 + 3
    assert weighted["trainable_parameters"] == head["trainable_parameters"] + 3
    with pytest.raises(UserError, match="made with other settings"):
        go(["head"], {**shapes, "snr_db": 3})


def test_a_row_at_one_rate_watches_sherl(tiny, monkeypatch):
    tiny_study, options = tiny
    shapes = {"test_reference": study.digits(tiny_study.reference()), "test_speakers": "a b a b a b"}
    monkeypatch.setattr(study.watching, "STEPS", (0, 2))
    monkeypatch.setattr(study.Classification, "trainer_class", study.watching.Watched)
    entries = ["sherl:start=zero_shot@0.02", "sherl@0.02", "lst@0.02"]
    study.make_rows(options, "part", shapes, entries, lambda entry: tiny_study.row_at(entry, 2))
    open_gate, published, lst = study_report.load(options.results)["part"]["figures"]
    assert [row["method"] for row in (open_gate, published, lst)] == entries
    for row in (open_gate, published):
        assert row["learning_rate"] == 0.02 and "search" not in row and len(row["seeds"]) == 2
        for seed in row["seeds"]:
            assert [look["step"] for look in seed["watched"]] == [0, 2]
            for look in seed["watched"]:
                assert 0 <= look["guided"] <= 1 and 0 < look["constant"] < 1 and look["loss"] > 0
    assert "watched" not in lst["seeds"][0]
    first = open_gate["seeds"][0]["watched"][0]  # the backbone as it is
    assert first["gate"] == pytest.approx(1) and first["guided"] > 0.9
    assert first["input"] == pytest.approx(1) and first["spread"] == pytest.approx(1)
    first = published["seeds"][0]["watched"][0]
    assert first["gate"] == 0 and first["input"] < 0.5
    assert "zero_shot | 8 | 0.02 | " in study_report.starts({"starts": {"figures": [open_gate]}})


def test_the_tables_of_starts_tell_runs_apart():
    def row(start, *accuracies):
        look = dict.fromkeys(("loss", "guided", "gate", "input", "constant", "spread", "side_gradient"), 0.5)
        seeds = [
            {"accuracy": accuracy, "watched": [{"step": step, **look, "loss": accuracy} for step in (0, 24)]}
            for accuracy in accuracies
        ]
        options = {"method": "sherl", "reduction_factor": 4, **({"start": start} if start else {})}
        accuracy = {"mean": sum(accuracies) / len(accuracies), "std": 0.1}
        more = {"status": "ok", "options": options, "learning_rate": 0.01, "accuracy": accuracy}
        return {"method": f"{start}@0.01", "seeds": seeds, **more}

    rows = [row(None, 0.25, 0.6, 0.29, 0.7), row("zero_shot", 0.6, 0.5, 0.4, 0.3)]
    records = {"starts": {"figures": rows}}
    table = study_report.starts(records).splitlines()[2:]
    assert table[0].startswith("| sherl | 4 | 0.01 | 2 of 4 | 65.0 ± 7.1 | 46.0")
    assert table[1].startswith("| sherl, zero_shot | 4 | 0.01 | 0 of 4 | 45.0")
    inside = [line.split(" | ")[:4] for line in study_report.collapse(records).splitlines()[2:]]
    assert inside[:3] == [
        ["| published", "at chance (2)", "0", "0.27"],
        ["| published", "at chance (2)", "24", "0.27"],
        ["| published", "learns (2)", "0", "0.65"],
    ]
    assert [line[1] for line in inside[4:]] == ["learns (4)"] * 2
    assert study_report.starts({}) == study_report.collapse({}) == study_report.queries({})


def test_mistakes_give_one_line(tmp_path, capsys):
    for argv, message in (
        ([], "--work is needed"),
        (["--work", str(tmp_path), "--parts", "accent"], "--parts must be some of"),
        (["--work", str(tmp_path), "--parts", "reduction", "--results", str(tmp_path)], "--parts accents-"),
        (["--report", "--results", str(tmp_path)], "there are no records in"),
    ):
        assert study.main(argv) == 1
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


def test_the_report_writes_page_and_figures(tmp_path):
    shutil.copy(FOLDER / "README.md", tmp_path)
    written = study_report.write(FOLDER / "results", tmp_path, figures=["reduction"])
    assert [path.name for path in written] == ["README.md", "reduction.png"]
    assert written[0].read_text(encoding="utf-8") == (FOLDER / "README.md").read_text(encoding="utf-8")
    assert written[1].read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="table must be one of"):
        study_report.filled("<!-- table: nothing -->\n<!-- end of table -->", RECORDS)
