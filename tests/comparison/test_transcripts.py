"""`whisper-meft compare --task transcribe`: word errors in the place of accuracy."""

import json

import pytest
import torch
from recogniser_fixtures import make_recogniser
from training_fixtures import make_audio_folder, make_transcripts
from transformers import AutoConfig, WhisperForConditionalGeneration
from whisper_meft import MeftConfig
from whisper_meft.commands.cli import main
from whisper_meft.commands.compare import make_parser
from whisper_meft.comparison import costs as compare_costs
from whisper_meft.comparison import runs as compare
from whisper_meft.comparison.arguments import options_of

METHODS = ["lst:placement=decoder", "bitfit"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    make_recogniser(folder / "whisper")
    for seed, (part, clips) in enumerate({"train": 4, "test": 2}.items()):
        make_audio_folder(folder / part, per_class=clips, seed=seed)
        make_transcripts(folder / f"{part}.csv", folder / part)
    return folder


def command(work, output, **options) -> list[str]:
    options = {
        "task": "transcribe",
        "language": "nl",
        "methods": ",".join(METHODS),
        "model_name_or_path": work / "whisper",
        "train_data": work / "train.csv",
        "test_data": work / "test.csv",
        "validation_fraction": 0.25,
        "output_dir": output,
        "seeds": 2,
        "num_train_epochs": 1,
        "batch_size": 4,
        **options,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["compare", *given, "--learning_rates", "1e-3", "1e-2"]


def test_a_comparison_leaves_json_table_and_figures(work, tmp_path, capsys, monkeypatch):
    scored = []
    original = compare.evaluate_transcripts
    monkeypatch.setattr(compare, "evaluate_transcripts", lambda *a: scored.append(len(a[1])) or original(*a))
    out = tmp_path / "out"
    assert main(command(work, out)) == 0
    results = json.loads((out / "compare.json").read_text())
    assert list(results["methods"]) == ["zero-shot", *METHODS]
    assert results["settings"]["language"] == "nl" and "labels" not in results["settings"]
    # The test clips: once by the backbone, and once per method and seed, never for the search.
    assert scored == [6] * 5
    for method in METHODS:
        row = results["methods"][method]
        assert row["status"] == "ok" and row["step_time_ratio"] > 0
        best = min(row["search"], key=lambda run: (run["validation_wer"], run["validation_loss"]))
        assert row["learning_rate"] == best["learning_rate"]
        tests = [each["test"] for each in row["seeds"]]
        assert row["wer"]["values"] == [test["normalized_wer"]["rate"] for test in tests]
        assert row["cer_as_written"]["values"] == [test["cer"]["rate"] for test in tests]
        assert row["options"]["method"] == method.partition(":")[0]
    zero_shot = results["methods"]["zero-shot"]
    assert len(zero_shot["wer"]["values"]) == 1 and "learning_rate" not in zero_shot
    table = (out / "compare.md").read_text()
    assert "| WER, test | CER, test |" in table and "language nl" in table and "chance" not in table
    assert "| zero-shot |" in table and all(f"| {method} |" in table for method in METHODS)
    for name in ("wer.png", "costs.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "zero-shot: WER" in printed and "chosen on 3 validation clips, scored on 6 test clips" in printed
    # Once more: everything is there.
    assert main(command(work, out)) == 0
    assert scored == [6] * 5
    again = json.loads((out / "compare.json").read_text())
    for each in (again, results):
        for row in each["methods"].values():
            row.pop("step_time_ratio", None)  # timed anew
    assert again == results


def test_the_rate_is_chosen_by_word_errors_of_validation_alone(work, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "measure_costs", lambda *a: {})
    arguments = make_parser().parse(command(work, tmp_path / "out", methods="lst", seeds=1)[1:])[0]
    comparison = compare.Comparison(arguments)
    validation = {1e-3: (0.2, 1.0), 1e-2: (0.3, 0.1)}  # fewer word errors win, whatever the loss

    def fake_run(method, rate, seed, say):
        wer, loss = validation[rate]
        scores = {"validation_wer": wer, "validation_loss": loss, "seconds": 0.0}
        return {"folder": f"lr{rate}", "learning_rate": rate, "seed": seed, **scores}

    names = ("wer", "cer", "normalized_wer", "normalized_cer")
    monkeypatch.setattr(comparison, "run", fake_run)
    monkeypatch.setattr(comparison, "_can_score", lambda run: True)
    monkeypatch.setattr(
        comparison, "score_on_test", lambda run: {n: {"rate": run["learning_rate"]} for n in names}
    )
    row = comparison.compare("lst", lambda text: None)
    assert row["learning_rate"] == row["wer"]["mean"] == 1e-3


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"methods": "lst,head"}, 2, "--methods must be all or some of "),
        ({"language": None}, 1, "language is needed to transcribe"),
        ({"train_data": None}, 2, "--train_data is needed with --task transcribe"),
        ({"model_name_or_path": None}, 2, "--model_name_or_path is needed with --task transcribe"),
        ({"task": "classify"}, 2, "--language cannot be used with --task classify"),
        ({"methods": "lora,lst:layers=last:99", "train_data": "nowhere"}, 1, "lst:layers=last:99: "),
        ({"max_frames": "longest"}, 1, "max_frames must be 'fidelity' or a number for recognition"),
    ],
)
def test_mistakes_give_one_line(options, status, message, work, tmp_path, capsys):
    assert main(command(work, tmp_path / "out", **options)) == status
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize("method", ["lst", "lst:placement=both", "full", "adalora", "mezo"])
def test_costs_of_a_step(method, work):
    config = AutoConfig.from_pretrained(work / "whisper")
    batch = {
        "input_features": torch.randn(3, 80, 100),
        "decoder_input_ids": torch.zeros(3, 7, dtype=torch.long),
        "labels": torch.zeros(3, 7, dtype=torch.long),
    }
    chosen = MeftConfig.from_dict(options_of(method, config.d_model, 4))
    how = (torch.device("cpu"), torch.float32, None, WhisperForConditionalGeneration)
    costs = compare_costs.measure_costs(config, chosen, batch, *how)
    assert costs["trainable_parameters"] < costs["all_parameters"]
    assert costs["step_time_ratio"] > 0
    assert costs["counted_mib"] > 4 * costs["all_parameters"] / 2**20
    assert costs["counted_mib"] == pytest.approx(costs["measured_mib"], rel=0.02)
