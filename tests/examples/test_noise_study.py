"""The study of noise: who makes it, what is compared, that it goes on where it was and is its record."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from training_fixtures import RATE, TONES, make_backbone, tone
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.files import read_json

from benchmarks import record
from examples.real_speech import __main__ as command
from examples.real_speech import folds as division
from examples.real_speech import noise_cells as cells
from examples.real_speech import noise_plan as plan
from examples.real_speech import noise_report as report
from examples.real_speech import plan as clean_plan
from examples.real_speech.folds import TASKS
from examples.study.study_report import _MARKED

FOLDER = Path(report.__file__).parent
PAGE = FOLDER / "NOISE.md"
COMMITTED = FOLDER / "results" / f"{report.NAME}.json"


# --- noise --------------------------------------------------------------------------------------------------


def manifest(folder: Path, name: str, rows: list) -> None:
    with open(folder / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "speaker", "seconds"], *rows])


@pytest.fixture
def speech(tmp_path, monkeypatch) -> Path:
    """A folder like that of the recordings, with tones; each speaker of the languages hums at a pitch."""
    for name, value in {"RECORDINGS": 2, "SECONDS": 1, "VOICES": 2}.items():
        monkeypatch.setattr(cells, name, value)
    generator = np.random.default_rng(0)
    people = tmp_path / "speech" / TASKS["languages"].folder
    accents = tmp_path / "speech" / TASKS["accents"].folder
    people.mkdir(parents=True)
    accents.mkdir()
    for split, pitches in (("train", (500, 700)), ("dev", (900,)), ("test", (1100, 1300))):
        rows = []
        for pitch in pitches:
            time = np.arange(RATE // 2) / RATE
            soundfile.write(people / f"{pitch}.wav", pitch / 5000 * np.sin(2 * np.pi * pitch * time), RATE)
            rows.append([f"{pitch}.wav", "xx", f"speaker{pitch}", 0.5])
        manifest(people, split, rows)
    rows = []
    for label, frequency in TONES.items():
        for n in range(6):
            soundfile.write(accents / f"{label}{n}.wav", tone(frequency, 0.4, generator), RATE)
            rows.append([f"{label}{n}.wav", label, f"{label}{n}", 0.4])
    for split, part in (("train", rows[::2]), ("dev", rows[1::4]), ("test", rows[3::4])):
        manifest(accents, f"l1_{split}", part)
    return tmp_path / "speech"


def test_babble_is_of_other_people_in_training_than_in_tests(speech, tmp_path):
    folder = tmp_path / "noises"
    cells.make_noises(folder, speech)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.wav")}
    assert sorted(found) == [
        *(f"test/babble0{n}.wav" for n in range(2)),
        *(f"train/{kind}0{n}.wav" for kind in ("babble", "coloured") for n in range(2)),
        *(f"voices/babble0{n}.wav" for n in range(8)),
    ]
    for name, path in found.items():
        wave, rate = soundfile.read(path)
        assert (
            rate == RATE and len(wave) == RATE and np.sqrt(np.square(wave).mean()) == pytest.approx(0.1, 1e-3)
        )
        if "babble" in name:  # both voices, as loud as each other, and nobody else's
            spectrum = np.abs(np.fft.rfft(wave))
            voices = (1100, 1300) if "test" in name else (500, 700)
            assert sorted(np.argsort(spectrum)[-2:]) == list(voices)
            assert spectrum[voices[0]] == pytest.approx(spectrum[voices[1]], 0.01)
    before = {path: (soundfile.read(path)[0], path.stat().st_mtime_ns) for path in found.values()}
    found["test/babble01.wav"].unlink()
    cells.make_noises(folder, speech)
    for path, (wave, time) in before.items():
        assert (soundfile.read(path)[0] == wave).all()
        assert path.name == "babble01.wav" or path.stat().st_mtime_ns == time


# --- what is compared ---------------------------------------------------------------------------------------


def test_the_plan_runs_every_method_both_ways_on_every_fold():
    planned = list(plan.plan())
    for method in plan.METHODS:
        for how in ("none", plan.CHOSEN):
            own = [each for each in planned if each.row == plan.row(method, how)]
            assert {each.fold for each in own} == set(range(5))
    assert {each.row.how for each in planned} == set(plan.TRAININGS)
    assert {each.rate for each in planned} == {plan.RATE}
    rows = {each.row for each in planned}
    assert len({row.name for row in rows}) == len({(row.name, row.budget) for row in rows}) == len(rows)


def rows(clean: str, noisy: str) -> dict:
    def found(predicted):
        cell = {"status": "ok", "fold": 0, "seed": 0, "rate": 1.0, "predicted": predicted}
        return report.Found("head", [{**cell, "validation_accuracy": 1.0, "validation_loss": 0.0}])

    return {"clean": found(clean), "coloured 0 dB": found(noisy)}


def test_a_loss_is_halved_where_its_interval_says_so():
    count = 200
    part = {"test_reference": "1" * count, "test_speakers": " ".join(f"s{i}" for i in range(count))}
    found = {"shapes": {"folds": [part]}}

    def right(share: float) -> str:
        return "1" * round(share * count) + "0" * (count - round(share * count))

    plain = rows(right(1.0), right(0.5))
    for noisy, share, said in (
        (0.95, 0.1, "yes"),
        (0.76, 0.48, "yes, but not beyond doubt"),
        (0.72, 0.56, "no, but not beyond doubt"),
        (0.50, 1.0, "no"),
    ):
        left = report.kept_loss(found, plain, rows(right(1.0), right(noisy)), "coloured 0 dB")
        assert left["share"] == pytest.approx(share) and report.verdict(left) == said
        assert left["mean"] == pytest.approx(100 * (1 - noisy) - 25)
        assert left["low"] <= left["mean"] <= left["high"]
    # What clean clips pay is a loss too, counted from the model without augmentation.
    dearer = rows(right(0.8), right(0.7))
    assert report.kept_loss(found, plain, dearer, "coloured 0 dB")["share"] == pytest.approx(0.2)
    paid = report.kept_loss(found, plain, dearer, "coloured 0 dB", from_plain=True)
    assert paid["share"] == pytest.approx(0.6) and paid["mean"] == pytest.approx(5)


# --- the driver ---------------------------------------------------------------------------------------------


def test_it_hears_what_it_says_and_makes_its_page(speech, tmp_path, monkeypatch, capsys):
    for module in (clean_plan, division):
        monkeypatch.setattr(module, "FOLDS", 3)
    monkeypatch.setattr(cells, "copies_of", lambda how: 1 if how == "none" else 2)
    monkeypatch.setattr(plan, "row", lambda *given, make=plan.row: make(*given, epochs=6))
    short = [
        plan.Cell(plan.row(plan.METHODS[0], how), fold, 2e-2, 0)
        for how, fold in (("none", 0), ("babble", 0), ("none", 1), ("louder", 0))
    ]
    monkeypatch.setattr(plan, "plan", lambda: short)
    make_backbone(tmp_path / "backbone")
    work = tmp_path / "work"
    where = ["--speech", str(speech), "--work", str(work)]
    begun = []
    original = cells.NoisyFold.run

    def counted(self, *arguments):
        begun.append(self.row.how)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(cells.NoisyFold, "run", counted)
    argv = ["noise", "--model", str(tmp_path / "backbone"), *where]
    assert command.main(argv) == 130 and command.main(argv) == 0 and command.main(argv) == 0
    assert begun == ["none", "babble", "babble", "none", "louder"]
    capsys.readouterr()
    assert command.main([*argv, "--list"]) == 0
    assert all(line.startswith("done") for line in capsys.readouterr().out.splitlines())

    found = [read_json(path) for path in sorted((work / "noise" / "rows").rglob("*.json"))]
    assert [each["status"] for each in found] == ["ok"] * 4
    for each in found:
        assert set(each["test"]) == set(each["validation"]) == {"clean", *plan.HEARD}
        assert {len(answers) for answers in each["validation"].values()} == {
            len(each["validation_reference"])
        }
        assert each["version_cpu_seconds"] > 0 and str(tmp_path) not in str(each)

    # Every clip as it is, two versions of training clips of two kinds, and what is heard through noise.
    def names(fold: int, part: str) -> set[str]:
        path = work / "noise" / "folds" / "accents" / str(fold) / f"{part}.csv"
        return {Path(row["path"]).stem for row in csv.DictReader(path.read_text().splitlines())}

    heard = {name for fold in range(2) for part in ("dev", "test") for name in names(fold, part)}
    (folder,) = (work / "noise" / "features" / "accents").iterdir()
    assert len(FeatureCache(folder)) == 6 * len(TONES) + 2 * 2 * len(names(0, "train")) + len(
        plan.HEARD
    ) * len(heard)

    page, results = tmp_path / "NOISE.md", tmp_path / "results"
    shutil.copy(PAGE, page)
    options = ["report", "--noise", "--work", str(work), "--results", str(results), "--page", str(page)]
    assert command.main(options) == 0
    text = page.read_text()
    assert "| head, statistics | babble | coloured 0 dB |" in text
    before = (results / "noise.json").read_bytes()
    assert command.main(options) == 0
    assert (results / "noise.json").read_bytes() == before and page.read_text() == text


def test_mistakes_give_one_line(tmp_path, capsys):
    for argv, message in (
        (["noise", "--speech", str(tmp_path), "--work", str(tmp_path)], "--speech: cannot read"),
        (["report", "--noise", "--work", str(tmp_path)], "--work: there are no rows in"),
        (["report", "--noise", "--results", str(tmp_path)], "there is no record"),
    ):
        assert command.main(argv) == 1
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


# --- what is committed --------------------------------------------------------------------------------------


def test_the_page_is_what_the_record_gives():
    text, found = PAGE.read_text(encoding="utf-8"), record.read(COMMITTED)
    assert report.text_of(text, found) == text, "run python -m examples.real_speech report --noise"
    assert {match["name"] for match in _MARKED.finditer(text)} == set(report.TABLES)
    parts = found["shapes"]["folds"]
    for cell in found["figures"]:
        assert cell["origin"]["commit"] and cell["status"] == "ok"
        for answers in cell["test"].values():
            assert len(answers) == len(parts[cell["fold"]]["test_reference"])


def test_how_to_augment_was_chosen_on_validation_clips():
    found = record.read(COMMITTED)

    def noisy(how):
        rows = report.heard_rows(found, plan.METHODS[0], how)
        (cell,) = [cell for cell in rows["clean"].cells if cell["fold"] == 0]
        reference = cell["validation_reference"]
        return sum(a == b for name in plan.HEARD for a, b in zip(cell["validation"][name], reference))

    ran = [how for how in plan.TRAININGS if report.heard_rows(found, plan.METHODS[0], how)]
    assert max(ran, key=noisy) == plan.CHOSEN
