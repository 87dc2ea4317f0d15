"""The study on people: its folds, that it goes on where it was, that its page is its records."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from training_fixtures import RATE, TONES, make_backbone, tone
from whisper_meft import MeftConfig
from whisper_meft.comparison.arguments import parse_method
from whisper_meft.files import read_json, write_json

from examples.real_speech import __main__ as command
from examples.real_speech import attention_report, cells, plan, report
from examples.real_speech import folds as division
from examples.real_speech.folds import TASKS, Clip, folds
from examples.study.study_report import _MARKED

FOLDER = Path(report.__file__).parent
RECORDS = report.load(FOLDER / "results")


# --- folds --------------------------------------------------------------------------------------------------


def clips(per_class=(11, 9, 13), twice=()) -> dict[str, list[Clip]]:
    made = [
        Clip(Path(f"{label}{n}.flac"), f"class{label}", f"speaker{label}-{n}", 8.0)
        for label, count in enumerate(per_class)
        for n in range(count)
    ]
    made += [Clip(Path(f"again{i}.flac"), made[i].label, made[i].speaker, 8.0) for i in twice]
    return {"train": made[::2], "dev": made[1::4], "test": made[3::4]}


def test_every_speaker_is_tested_in_one_fold_and_in_no_two_parts():
    splits = clips(twice=(0, 5))
    found = folds(splits, own_split=False)
    everyone = sorted(clip.key for part in splits.values() for clip in part)
    assert len(found) == 5
    assert sorted(clip.key for fold in found for clip in fold["test"]) == everyone
    for fold in found:
        speakers = [{clip.speaker for clip in fold[split]} for split in ("train", "dev", "test")]
        assert not (speakers[0] & speakers[1] or speakers[0] & speakers[2] or speakers[1] & speakers[2])
        assert sorted(clip.key for part in fold.values() for clip in part) == everyone
        for label, count in zip(("class0", "class1", "class2"), (11, 9, 13)):
            share = len({clip.speaker for clip in fold["test"] if clip.label == label})
            assert count // 5 <= share <= -(-count // 5)
    other = {split: list(reversed(part)) for split, part in splits.items()}
    assert folds(other, own_split=False) == found  # names decide, not the order of the manifests
    assert folds(splits, own_split=True) == [splits]


def test_the_plan_has_every_method_and_one_rate_search_for_all():
    planned = list(plan.plan())
    rows = {cell.row for cell in planned if cell.row.task == "accents"}
    assert {row.method for row in rows} == set(MeftConfig.methods())
    for row in rows:
        assert {cell.rate for cell in planned if cell.row == row and cell.fold == 0} >= set(row.rates)
        assert {cell.fold for cell in planned if cell.row == row} == set(range(5))
        MeftConfig.from_dict({"method": row.method, **parse_method(row.compared)[1]})
        assert not {*row.name} & {*':/\\*?"<>| '}  # a name of files and folders anywhere
    published = [row for row in rows if parse_method(row.entry)[1] == {"max_frames": plan.TRIMMED}]
    assert {row.method for row in published} == set(MeftConfig.methods())
    for row in published:
        assert len(row.rates) >= 3
        assert {cell.seed for cell in planned if cell.row == row} == set(range(row.seeds))
        assert row.seeds == (3 if row.frozen and row.method != "sherl" else 1)
    forms = [row.entry for row in rows if "attention=" in row.entry]
    assert sorted(forms) == [
        f"unipt:pooling=statistics+attention={each}+max_frames=longest"
        for each in ("linear", "pooled:4", "pooled:8", "summary")
    ]
    assert len({row.name for row in rows}) == len(rows)


# --- the driver ---------------------------------------------------------------------------------------------


@pytest.fixture
def speech(tmp_path) -> Path:
    """A folder like that of the recordings, with tones."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "speech" / TASKS["accents"].folder
    (folder / "audio").mkdir(parents=True)
    rows = []
    for label, frequency in TONES.items():
        for n in range(10):
            soundfile.write(folder / "audio" / f"{label}{n}.flac", tone(frequency, 0.8, generator), RATE)
            rows.append([f"audio/{label}{n}.flac", label, f"{label}{n}", 0.8])
    for split, part in (("train", rows[::2]), ("dev", rows[1::4]), ("test", rows[3::4])):
        with open(folder / f"l1_{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["path", "label", "speaker", "seconds"], *part])
    make_backbone(tmp_path / "backbone")
    return tmp_path / "speech"


@pytest.fixture
def go(speech, tmp_path, monkeypatch):
    """Runs the command on a short plan of three folds."""
    for module in (plan, division):
        monkeypatch.setattr(module, "FOLDS", 3)
    rows = [
        plan.row("head", rates=(1e-2, 1e-3), epochs=2, seeds=2),
        plan.row("head:pooling=statistics", rates=(1e-2,), epochs=40, seeds=1),
        plan.row("bitfit", rates=(1e-3,), epochs=4, training={"head_learning_rate": 2e-2}),
    ]

    def short():
        for row in rows:
            yield from plan.searched(row)
            yield from plan.tested(row)
            yield from plan.seeded(row)

    monkeypatch.setattr(plan, "plan", short)
    monkeypatch.setattr(report, "plan", short)
    work = tmp_path / "work"
    where = ["--model", str(tmp_path / "backbone"), "--speech", str(speech), "--work", str(work)]

    def run(*argv: str) -> int:
        return command.main(["run", *where, *argv])

    return run, work


def test_it_goes_on_where_it_was_and_makes_its_page(go, tmp_path, monkeypatch, capsys):
    run, work = go
    begun = []
    original = cells.Fold.run

    def counted(self, method, rate, seed):
        begun.append((method, rate, seed))
        if len(begun) == 6:
            raise KeyboardInterrupt
        return original(self, method, rate, seed)

    monkeypatch.setattr(cells.Fold, "run", counted)
    assert run() == 130
    assert len(list((work / "rows").glob("accents/head*/*.json"))) == 5
    (work / "stop").touch()
    assert run() == 0 and len(begun) == 6
    (work / "stop").unlink()
    assert run("--minutes", "0") == 0 and len(begun) == 6
    assert run() == 0
    assert len(begun) == 1 + (2 + 2 + 3) + (1 + 2) + (1 + 2)  # once each, and the one that was interrupted
    again = len(begun)
    assert run() == 0 and len(begun) == again
    capsys.readouterr()
    assert run("--list") == 0
    assert all(line.startswith("done") for line in capsys.readouterr().out.splitlines())

    (row,) = (work / "rows" / "accents").glob("head-pooling*/fold2-*.json")
    found = read_json(row)
    assert (
        found["status"] == "ok"
        and found["cpu_seconds"] > 0
        and found["audio_seconds"] == pytest.approx(40 * 0.8 * 13, abs=40)
    )
    # What the process held already may have been enough.
    assert found["peak_bytes"] >= found["bytes_before"] > 0 and found["origin"]["torch"]
    assert "/" not in str({key: value for key, value in found.items() if key != "origin"})

    page = tmp_path / "README.md"
    shutil.copy(FOLDER / "README.md", page)
    results = tmp_path / "results"
    options = ["report", "--work", str(work), "--results", str(results), "--page", str(page)]
    assert command.main(options) == 0
    record = report.load(results)["accents"]
    rows = report.rows_of(record)
    assert rows["head:max_frames=longest"].tried == [1e-3, 1e-2]
    folder = work / "runs" / "accents" / "0" / "epochs4-head_learning_rate0.02" / "runs"
    (trained,) = folder.glob("bitfit-max_frames=longest/*/train_results.json")
    assert read_json(trained)["learning_rate"] == 1e-3 and read_json(trained)["head_learning_rate"] == 2e-2
    statistics = rows["head:pooling=statistics+max_frames=longest"]
    assert report.accuracies(record, statistics)[0] > 0.8  # tones: the answers are those of the right clips
    between = report.gap(record, statistics, rows["bitfit:head_learning_rate=0.02+max_frames=longest"])
    assert between["folds"] == 3 and between["low"] <= between["mean"] <= between["high"]
    text = page.read_text()
    assert "| head, pooling=statistics |" in text and "3/3 folds, 1 seed, 1/1 rates" in text
    before = (results / "accents.json").read_bytes()
    assert command.main(options) == 0
    assert (results / "accents.json").read_bytes() == before and page.read_text() == text  # nothing new
    shutil.rmtree(work / "rows" / "accents" / "logistic")
    assert command.main(options) == 0 and page.read_text() == text  # what was taken over stays

    shutil.rmtree(work)
    (lost,) = [
        cell for cell in record["figures"] if cell["entry"].startswith("head:pool") and cell["fold"] == 2
    ]
    record["figures"].remove(lost)
    write_json(results / "accents.json", record)
    capsys.readouterr()
    assert run("--records", str(results), "--rows", "accents") == 0
    assert "took up 12 rows" in capsys.readouterr().out
    assert begun[again:] == [("head:pooling=statistics+max_frames=longest", 1e-2, 0)]
    assert command.main(options) == 0
    figures = report.load(results)["accents"]["figures"]
    assert len(figures) == len(record["figures"]) + 1 and all(cell in figures for cell in record["figures"])


def test_what_an_option_changes_is_told_on_the_same_seeds():
    def row(entry, answers):
        told = {"status": "ok", "fold": 0, "rate": None}
        return report.Found(entry, [{**told, "seed": n, "predicted": each} for n, each in enumerate(answers)])

    shapes = {"folds": [{"test_reference": "0011", "test_speakers": "a b c d"}]}
    changed, base = row("lst:x=1", ["0011"]), row("lst:", ["0010", "1111"])
    assert report.gap({"shapes": shapes}, changed, base)["mean"] == pytest.approx(37.5)
    assert report.gap({"shapes": shapes}, changed, base, same_seeds=True)["mean"] == pytest.approx(25)


def test_records_of_another_study_are_not_taken_up(go, speech, tmp_path, capsys):
    run, work = go
    results = tmp_path / "results"
    assert run("--rows", "accents head:max") == 0
    report.collect(work, results)
    record = report.load(results)["accents"]
    make_backbone(tmp_path / "wider", d_model=128)
    capsys.readouterr()

    def refused(*argv: str) -> str:
        shutil.rmtree(work)
        assert run("--records", str(results), *argv) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not list(work.glob("rows/*/*"))
        return error

    assert "is of a model of another size than" in refused("--model", str(tmp_path / "wider"))
    record["shapes"]["folds"][0]["train_clips"] += 1
    write_json(results / "accents.json", record)
    assert "is of other folds than the recordings" in refused()
    (results / "accents.json").unlink()
    assert "--records: there are no records of the study in" in refused()


def test_a_row_that_fails_costs_no_other(go, monkeypatch):
    run, work = go
    rows = [plan.row("weighted_sum", rates=(1e30,), epochs=4), plan.row("head", rates=(1e30, 1e-2), epochs=4)]
    order = [*plan.searched(rows[0]), *plan.tested(rows[0]), *plan.searched(rows[1])]
    monkeypatch.setattr(plan, "plan", lambda: order)
    assert run() == 0
    assert len(list((work / "rows" / "accents" / "weighted_sum-max_frames=longest").iterdir())) == 1
    folder = work / "rows" / "accents" / "head-max_frames=longest"
    assert read_json(folder / "fold0-lr1e+30-seed0.json")["status"].startswith("failed: ")
    assert read_json(folder / "fold0-lr0.01-seed0.json")["status"] == "ok"


def test_mistakes_give_one_line(tmp_path, capsys):
    where = ["--speech", str(tmp_path), "--work", str(tmp_path / "work")]
    for argv, message in (
        (["run", *where], "--speech: cannot read"),
        (["run", *where, "--rows", "lsd"], "--rows: no row of the plan begins with 'lsd'"),
        (["report", "--work", str(tmp_path)], "--work: there are no rows in"),
        (["report", "--results", str(tmp_path)], "there are no records in"),
        (["report", "--attention", "--work", str(tmp_path)], "--work: --attention reads results/ alone"),
    ):
        assert command.main(argv) == 1
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


# --- what is committed --------------------------------------------------------------------------------------


def test_the_page_is_what_the_records_give():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert report.filled(text, RECORDS, report.TABLES) == text, "run python -m examples.real_speech report"
    assert {match["name"] for match in _MARKED.finditer(text)} == set(report.TABLES)
    for name, draw in report.FIGURES.items():
        assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == draw(RECORDS)
        assert f"({name}.svg)" in text


def test_the_page_of_the_attention_is_what_both_studies_records_give():
    text = (FOLDER / "ATTENTION.md").read_text(encoding="utf-8")
    study = attention_report.study_report.load(attention_report.SYNTHETIC)
    found = attention_report.text_of(text, RECORDS, study)
    assert found == text, "run python -m examples.real_speech report --attention"
    assert {match["name"] for match in _MARKED.finditer(text)} == set(attention_report.TABLES)
    for part in attention_report.LEVELS:
        (exact,) = [row for row in study[part]["figures"] if row["method"] == "unipt"]
        for seed in exact["seeds"]:  # the model answers every clip with every attention
            assert set(seed["read_as"]) == set(plan.ATTENTIONS)
            assert {len(each) for each in seed["read_as"].values()} == {len(seed["predicted"])}


@pytest.mark.parametrize("task", RECORDS)
def test_records_say_what_they_ran_on_and_answer_every_clip(task):
    found = RECORDS[task]
    parts = found["shapes"]["folds"]
    assert sum(len(part["test_reference"]) for part in parts) == len(
        " ".join(part["test_speakers"] for part in parts).split()
    )
    for cell in found["figures"]:
        assert cell["origin"]["commit"] and cell["origin"]["torch"] and cell["origin"]["device"]
        if cell["status"] == "ok":
            assert len(cell["predicted"]) == len(parts[cell["fold"]]["test_reference"])


@pytest.mark.parametrize(
    ("best", "tried", "told"),
    [
        (0.001, (0.0001, 0.001, 0.01), "0.001"),
        (0.01, (0.001, 0.01), "0.01 ↑"),
        (0.001, (0.001, 0.01), "0.001 ↓"),
    ]
    + [(0.001, (0.001,), "0.001")],
)
def test_a_rate_at_the_end_of_those_that_were_tried_is_marked(best, tried, told):
    cells = [
        {"status": "ok", "fold": 0, "seed": 0, "rate": rate, "predicted": "0", "validation_loss": 1.0}
        | {"validation_accuracy": 0.5 + (rate == best) / 4}
        for rate in tried
    ]
    assert report._rate(report.Found("head", cells)) == told


@pytest.mark.parametrize("task", RECORDS)
def test_rates_are_chosen_on_validation_clips(task):
    for row in report.rows_of(RECORDS[task]).values():
        first = [c for c in RECORDS[task]["figures"] if c["entry"] == row.entry and c["fold"] == 0]
        first = [c for c in first if c["seed"] == 0 and c["status"] == "ok" and c["rate"]]
        if first:
            best = max(first, key=lambda cell: (cell["validation_accuracy"], -cell["validation_loss"]))
            assert row.rate == best["rate"]
