"""The study of transcription: it goes on where it was, chooses on validation clips, and is its records."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from recogniser_fixtures import make_recogniser, noise
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from whisper_meft.evaluation.transcripts import score_transcripts
from whisper_meft.files import read_json

from examples.real_speech import __main__ as command
from examples.real_speech import transcription_cells as cells
from examples.real_speech import transcription_plan as plan
from examples.real_speech import transcription_report as report
from examples.study.study_report import _MARKED

FOLDER = Path(report.__file__).parent
PAGE = FOLDER / "TRANSCRIPTION.md"
COMMITTED = FOLDER / "results" / f"{report.NAME}.json"
SETS = {
    "nl_train": 8,
    "nl_dev": 3,
    "nl_test": 4,
    "nl_test_other": 2,
    "de_train": 3,
    "de_dev": 2,
    "de_test": 3,
}


# --- scores -------------------------------------------------------------------------------------------------


def test_edits_of_clips_add_up_to_those_of_all():
    said = ["Zo is het!", "wat een dag", "ja"]
    heard = ["zo was het", "wat een dag", "ja ja ja ja ja ja"]
    errors, lengths = cells.errors_of(said, heard, "nl"), cells.lengths_of(said, "nl")
    together = score_transcripts(said, heard, "dutch")
    for kind in cells.KINDS:
        assert sum(cells.numbers(errors[kind])) == getattr(together, kind).errors
        assert sum(cells.numbers(lengths[kind])) == getattr(together, kind).length
    assert cells.numbers(errors["wer"]) == [3, 0, 5]
    # The last text goes on and on: of its 15 wrong letters 2 are counted, as many as it has.
    assert cells.numbers(errors["cer"]) == [4, 0, 15]
    assert cells.held_rate(errors, lengths) == (4 + 0 + 2) / (10 + 11 + 2)


def test_differences_are_between_the_same_clips():
    found = {"shapes": {"sets": {"nl_test": {"lengths": {"cer": "10 10 10 10"}}}}}

    def run(*errors):
        tests = [{"nl_test": {"cer": each}} for each in errors]
        cell = {"language": "nl", "entry": "lst", "status": "ok", "rate": 1.0, "dev_rate": 0.0}
        return report.Run([{**cell, "seed": seed, "tests": each} for seed, each in enumerate(tests)])

    one, other = run("1 2 3 4", "3 4 5 6"), run("1 2 3 4")
    gap = report.difference(found, one, other, "nl_test", "cer")
    # Of whatever clips, the second seed has 20 points more than the first, which is the other row's.
    assert gap["mean"] == pytest.approx(10) and gap["low"] == pytest.approx(0)
    assert gap["high"] == pytest.approx(20)
    assert report.rates(found, one, "nl_test", "cer").tolist() == [25, 45]


def test_the_plan_has_every_placement_and_its_references():
    planned = list(plan.plan())
    for language in plan.LANGUAGES:
        rows = {cell.row for cell in planned if cell.row.language == language}
        assert {*plan.LST.values(), plan.UNIPT, plan.SHERL, plan.FULL, plan.LORA} <= {r.entry for r in rows}
        for row in rows:
            own = [cell for cell in planned if cell.row == row]
            assert {cell.rate for cell in own} == {*row.rates, None}
            assert {cell.seed for cell in own if cell.rate is None} == set(range(row.seeds))
            if not row.zero_shot:
                assert len(row.rates) >= 1
                assert row.config.transcribes and row.config.method == row.method


# --- the driver ---------------------------------------------------------------------------------------------


@pytest.fixture
def speech(tmp_path) -> Path:
    """A folder like that of the recordings: noise with letters for transcripts."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "speech" / plan.FOLDER
    (folder / "audio").mkdir(parents=True)
    for name, count in SETS.items():
        rows = [["path", "label", "speaker", "text"]]
        for n in range(count + (name == "de_test")):
            seconds = 0.9 if n == count else generator.uniform(0.3, 0.7)  # the last one is too long
            noise(folder / "audio" / f"{name}{n}.wav", seconds, seed=len(rows) + 100 * len(name))
            text = "".join(generator.choice(list("abcd "), size=6)).strip() or "a"
            rows.append([f"audio/{name}{n}.wav", name[:2], f"{name[:2]}-reader", text])
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return tmp_path / "speech"


@pytest.fixture
def backbone(tmp_path) -> Path:
    """A tiny Whisper that names no times unasked, as trained ones do not."""
    folder = make_recogniser(tmp_path / "backbone")
    generation = GenerationConfig.from_pretrained(folder)
    times = range(generation.no_timestamps_token_id, WhisperConfig.from_pretrained(folder).vocab_size)
    generation.suppress_tokens = [*generation.suppress_tokens, *times]
    generation.save_pretrained(folder)
    return folder


@pytest.fixture
def go(speech, backbone, tmp_path, monkeypatch):
    """Runs the command on a short plan, with a window of 0.8 s."""
    for module in (plan, cells):
        monkeypatch.setattr(module, "WINDOW", 40)
        monkeypatch.setattr(module, "MOST_TOKENS", 10)
    zero_shot = plan.row(plan.ZERO_SHOT)
    rows = [
        plan.row("lst:placement=encoder+reduction_factor=4+epochs=6", rates=(1e-3, 2e-2), seeds=2),
        plan.row("lst:placement=decoder+epochs=2", rates=(1e-3,), seeds=1),
        plan.row("full:target=decoder+epochs=2", rates=(1e-3,), seeds=1),
        plan.row("lst:placement=both+epochs=1", "de", rates=(1e30, 1e-3), seeds=1),
    ]

    def short():
        yield from plan.tested(zero_shot)
        for row in rows:
            yield from plan.searched(row)
            yield from plan.tested(row)
            yield from plan.seeded(row)

    monkeypatch.setattr(plan, "plan", short)
    monkeypatch.setattr(report, "plan", short)
    work = tmp_path / "work"
    where = ["--model", str(backbone), "--speech", str(speech), "--work", str(work)]
    return lambda *argv: command.main(["transcribe", *where, *argv]), work


def test_it_goes_on_where_it_was_and_makes_its_page(go, tmp_path, monkeypatch, capsys):
    run, work = go
    begun = []
    original = cells.Recognition._train

    def counted(self, row, model, rate, seed):
        begun.append((row.entry, rate, seed))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return original(self, row, model, rate, seed)

    monkeypatch.setattr(cells.Recognition, "_train", counted)
    assert run() == 130
    assert run("--minutes", "0") == 0 and len(begun) == 3
    assert run() == 0
    assert len(begun) == 1 + (2 + 1) + 1 + 1 + 2  # once each, and the one that was interrupted
    assert run() == 0 and len(begun) == 8
    capsys.readouterr()
    assert run("--list") == 0
    assert all(line.startswith("done") for line in capsys.readouterr().out.splitlines())

    shapes = read_json(work / "transcription" / "shapes.json")["sets"]
    assert {name: each["clips"] for name, each in shapes.items()} == SETS
    assert [name for name, each in shapes.items() if each["left_out"]] == ["de_test"]
    folder = work / "transcription" / "rows" / "nl"
    (encoder,) = folder.glob("lst-placement=encoder*")
    found = [read_json(path) for path in sorted(encoder.iterdir())]
    assert [each["seed"] for each in found] == [0, 0, 1] or [each["seed"] for each in found] == [0, 1, 0]
    best = min((each for each in found if each["seed"] == 0), key=lambda each: each["dev_rate"])
    assert [each["rate"] for each in found if "tests" in each] == [best["rate"]] * 2  # that alone is tested
    for each in found:
        assert each["train_losses"][-1] < each["train_losses"][0] and each["cpu_seconds"] > 0
    failed = read_json(next((work / "transcription" / "rows" / "de").glob("*/lr1e+30-seed0.json")))
    assert failed["status"].startswith("failed: ")

    shutil.copy(PAGE, tmp_path / "page.md")
    results = tmp_path / "results"
    options = ["report", "--transcription", "--work", str(work)]
    options += ["--results", str(results), "--page", str(tmp_path / "page.md")]
    assert command.main(options) == 0
    text = (tmp_path / "page.md").read_text()
    assert "| zero-shot |" in text and "| full, decoder, epochs=2 | " in text
    stored = (results / "transcription.json").read_text()
    heard = [*(work / "transcription" / "heard").glob("*/*/*.json")]
    assert heard and not any(word in stored for path in heard for word in read_json(path) if len(word) > 9)
    assert command.main(options) == 0
    assert (results / "transcription.json").read_text() == stored  # nothing new
    shutil.rmtree(work / "transcription" / "rows" / "de")
    assert (
        command.main(options) == 0 and (tmp_path / "page.md").read_text() == text
    )  # what was taken over stays


def test_states_of_changed_recordings_are_made_again(go, speech):
    run, work = go
    only = "nl lst:placement=encoder"
    assert run("--rows", only) == 0
    rows = {path: read_json(path) for path in (work / "transcription" / "rows").glob("nl/lst*/*.json")}
    (made,) = (work / "transcription" / "features").glob("nl/encoder*.json")
    before = made.stat().st_mtime_ns
    for path in rows:
        path.unlink()
    for path in (speech / plan.FOLDER / "audio").iterdir():
        path.touch()
    assert run("--rows", only) == 0
    again = {path: read_json(path) for path in rows}
    assert {each["status"] for each in again.values()} == {"ok"}
    assert all(again[path]["train_losses"] == rows[path]["train_losses"] for path in rows)
    assert made.stat().st_mtime_ns > before


def test_what_is_heard_is_the_backbone_before_training(go, backbone, tmp_path):
    """The zero-shot row's texts are those of Hugging Face's own model with the same window."""
    run, work = go
    assert run("--rows", "nl zero_shot") == 0
    found = read_json(work / "transcription" / "rows" / "nl" / "zero_shot" / "seed0.json")
    heard = read_json(work / "transcription" / "heard" / "nl" / "zero_shot" / "lrNone-seed0-nl_test.json")
    study = cells.Recognition(str(backbone), tmp_path / "speech", work)
    clips = study.clips("nl_test").examples
    whisper = WhisperForConditionalGeneration.from_pretrained(backbone, dtype=torch.bfloat16)
    tokenizer = study.tokenizer("nl")
    expected = []
    for example in clips:
        item = cells.data.SpeechDataset(clips.select([clips.examples.index(example)]), study.extractor)[0]
        features = item["input_features"][None].to(torch.bfloat16)
        states = whisper.model.encoder.embed_positions.weight
        encoder = whisper.model.encoder
        with torch.no_grad():
            hidden = torch.nn.functional.gelu(encoder.conv1(features[..., :80]))
            hidden = torch.nn.functional.gelu(encoder.conv2(hidden)).permute(0, 2, 1) + states[:40]
            for layer in encoder.layers:
                hidden = layer(hidden, None)
                hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
            hidden = encoder.layer_norm(hidden)
            options = {"language": "nl", "task": "transcribe", "max_new_tokens": 10}
            tokens = whisper.generate(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), **options)
        expected.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert heard == expected
    references = [each.text for each in clips]
    assert found["tests"]["nl_test"]["cer"] == cells.errors_of(references, expected, "nl")["cer"]


def test_mistakes_give_one_line(backbone, tmp_path, capsys):
    capsys.readouterr()
    where = ["--model", str(backbone), "--speech", str(tmp_path), "--work", str(tmp_path)]
    for argv, message in (
        (["transcribe", *where], "nl_train.csv"),
        (["transcribe", *where, "--rows", "nl lsd"], "--rows: no row of the plan begins with 'nl lsd'"),
        (["report", "--transcription", "--work", str(tmp_path)], "--work: there are no rows in"),
        (["report", "--transcription", "--results", str(tmp_path)], "there is no transcription.json in"),
    ):
        assert command.main(argv) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("examples.real_speech: ") and message in error


# --- what is committed --------------------------------------------------------------------------------------


def test_the_page_is_what_the_record_gives():
    text = PAGE.read_text(encoding="utf-8")
    tables = report.TABLES
    assert report.filled(text, report.record.read(COMMITTED), tables) == text, "run report --transcription"
    assert {match["name"] for match in _MARKED.finditer(text)} == set(tables)


def test_the_record_holds_counts_and_no_texts():
    found = report.record.read(COMMITTED)
    sets = found["shapes"]["sets"]
    for cell in found["figures"]:
        assert cell["origin"]["commit"] and cell["origin"]["torch"] and cell["origin"]["device"]
        heard = {f"{cell['language']}_dev": cell.get("dev"), **cell.get("tests", {})}
        for name, errors in heard.items():
            for kind in cells.KINDS if errors else ():
                assert len(cells.numbers(errors[kind])) == sets[name]["clips"]
    # Numbers are all that is said of a clip.
    counted = [
        each for cell in found["figures"] for each in [cell.get("dev"), *cell.get("tests", {}).values()]
    ]
    assert all(
        set(json.dumps(each)) <= set('0123456789 ,:{}"_abcdefghijklmnopqrstuvwxyz')
        for each in counted
        if each
    )


def test_rates_are_chosen_on_validation_clips():
    for run in report.runs_of(report.record.read(COMMITTED)).values():
        if run.tried:
            assert run.tried[run.rate]["dev_rate"] == min(cell["dev_rate"] for cell in run.tried.values())
