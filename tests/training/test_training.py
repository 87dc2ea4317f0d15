"""`whisper-meft train`: what a run leaves behind, what it is evaluated on, crashes, resuming and NaN."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from process_fixtures import Running
from safetensors.torch import load_file
from training_fixtures import TONES, make_audio_folder, make_backbone, make_manifest, train_command
from transformers import TrainerControl, TrainerState
from whisper_meft import data
from whisper_meft.commands.cli import main
from whisper_meft.commands.train import make_parser
from whisper_meft.errors import UserError
from whisper_meft.model.config import MeftModelConfig
from whisper_meft.training import checkpoints
from whisper_meft.training import run as train
from whisper_meft.training.guard import FiniteGuard, NonFiniteError
from whisper_meft.training.settings import settle
from whisper_meft.training.tasks import classification

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, train/, test/ and train.csv, which names four speakers per class."""
    folder = tmp_path_factory.mktemp("training")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=12)
    make_audio_folder(folder / "test", per_class=4, seed=1)
    make_manifest(folder / "train.csv", folder / "train", speakers_per_class=4)
    return folder


def run(work, output, *extra, train_data="train.csv", **options) -> int:
    return main([*train_command(work / "backbone", work / train_data, output, **options), *extra])


def results_of(folder) -> tuple[dict, dict]:
    return tuple(json.loads((folder / f"{name}_results.json").read_text()) for name in ("train", "eval"))


# --- a whole run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lst", "unipt", "sherl"])
def test_a_run_learns_and_leaves_model_results_and_figures(method, work, tmp_path, capsys):
    options = {"num_train_epochs": 20, "learning_rate": 3e-2} if method == "sherl" else {}
    assert run(work, tmp_path / "out", method=method, eval_data=work / "test", **options) == 0
    training, evaluation = results_of(tmp_path / "out")
    assert training["method"]["method"] == method
    assert training["train_examples"] == 36 and evaluation["count"] == 12
    assert evaluation["accuracy"] > 0.8, "the tones should be learnt"
    assert training["best_metric"] == pytest.approx(evaluation["accuracy"])
    for name in ("confusion_matrix.png", "learning_curve.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    # The saved model is the one that was scored.
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(work / "test")]) == 0
    again = json.loads((tmp_path / "out" / "evaluation" / "eval_results.json").read_text())
    assert again["confusion_matrix"] == evaluation["confusion_matrix"]
    # Only the side network and the head are stored.
    assert not any(key.startswith("encoder.") for key in load_file(tmp_path / "out" / "model.safetensors"))


def test_the_parts_of_a_run_work_alone(work, tmp_path):
    arguments = train_command(work / "backbone", work / "train", tmp_path / "out", learning_rate=None)
    model_arguments, method, sources, training = make_parser().parse(arguments[1:])
    settings = settle(model_arguments, method, training)
    assert (settings.config.method, settings.dtype, training.learning_rate) == ("lst", "float32", 5e-4)
    examples = train.read_examples(sources, settings)
    assert examples.labels == ["high", "low", "middle"]
    train.settle_batch(settings, examples)
    base = train.load_base(settings)
    model = train.build_model(base, settings, examples)
    collator, training_set, evaluation_set = train.build_datasets(
        model, settings, examples, data.SpeechDataset
    )
    assert (len(training_set), len(evaluation_set)) == (len(examples.training), len(examples.evaluation))
    batch = collator([training_set[0], training_set[1]])
    assert model(**batch)["logits"].shape == (2, 3)
    assert not (tmp_path / "out").exists()


def test_learning_rates_are_the_papers_when_none_is_given(work, tmp_path):
    for method, rate in (("lst", 5e-4), ("unipt", 1e-4), ("sherl", 1e-4)):
        folder = tmp_path / method
        assert run(work, folder, method=method, learning_rate=None, max_steps=1, eval_strategy="no") == 0
        assert json.loads((folder / "train_results.json").read_text())["learning_rate"] == rate


@pytest.mark.parametrize("max_frames", ["longest", "30"])
def test_other_windows_train_and_are_remembered(max_frames, work, tmp_path):
    assert run(work, tmp_path / "out", max_frames=max_frames, eval_data=work / "test") == 0
    training, evaluation = results_of(tmp_path / "out")
    assert str(training["method"]["max_frames"]) == max_frames
    assert evaluation["accuracy"] > 0.8
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(work / "test"), "--batch_size", "3"]) == 0
    again = json.loads((tmp_path / "out" / "evaluation" / "eval_results.json").read_text())
    assert again["confusion_matrix"] == evaluation["confusion_matrix"]


def test_without_evaluation_data_whole_speakers_are_set_aside_and_the_output_says_so(
    work, tmp_path, capsys, monkeypatch
):
    seen = {}
    original = data.SpeechDataset.__init__

    def spy(self, examples, *args, **kwargs):
        seen["evaluation" if "training" in seen else "training"] = examples
        original(self, examples, *args, **kwargs)

    monkeypatch.setattr(data.SpeechDataset, "__init__", spy)
    assert run(work, tmp_path / "out", validation_fraction=0.25, max_steps=2) == 0
    out = capsys.readouterr().out
    assert "no evaluation data was given: 9 of 36 training examples were set aside" in out
    assert seen["training"].speakers().isdisjoint(seen["evaluation"].speakers())
    assert set(seen["evaluation"].label_counts()) == set(TONES)
    assert "set aside" in results_of(tmp_path / "out")[1]["note"]


def test_choosing_on_a_test_set_is_called_by_its_name(work, tmp_path, capsys):
    assert run(work, tmp_path / "a", eval_data=work / "test", max_steps=2) == 0
    assert "this looks like a test set" in capsys.readouterr().out
    shutil.copytree(work / "test", tmp_path / "held_out")
    assert run(work, tmp_path / "b", eval_data=tmp_path / "held_out", max_steps=2) == 0
    assert "looks like a test set" not in capsys.readouterr().out
    assert run(work, tmp_path / "c", eval_data=work / "test", max_steps=2, load_best_model_at_end=False) == 0
    assert "nothing was chosen on this data" in capsys.readouterr().out


def test_the_best_checkpoint_is_what_is_saved_not_the_last(work, tmp_path, monkeypatch):
    accuracies = iter([0.3, 0.9, 0.5, 0.4])  # one per epoch: the second is the best

    def pretend(labels, recordings):
        return lambda prediction: {"accuracy": next(accuracies), "mean_class_accuracy": 0, "macro_f1": 0}

    monkeypatch.setattr(classification, "make_compute_metrics", pretend)
    monkeypatch.setattr(train.MeftTrainer, "predict", keep_metrics_away(train.MeftTrainer.predict))
    out = tmp_path / "out"
    assert run(work, out, eval_data=work / "test", num_train_epochs=4, save_total_limit=2) == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-20"}
    assert results_of(out)[0]["best_checkpoint"] == str(out / "checkpoint-10")
    saved, best, last = (weights(folder) for folder in (out, out / "checkpoint-10", out / "checkpoint-20"))
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert not all(torch.equal(saved[name], last[name]) for name in saved)


def keep_metrics_away(predict):
    def without_metrics(self, *args, **kwargs):
        self.compute_metrics = None
        return predict(self, *args, **kwargs)

    return without_metrics


def test_unreadable_files_are_named_at_the_end_and_strict_stops_at_once(work, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(work / "train", folder)
    (folder / "low" / "broken.wav").write_bytes(b"")
    assert run(work, tmp_path / "out", train_data=folder, max_steps=2) == 0
    out = capsys.readouterr().out
    assert "1 of 37 examples were left out" in out and "broken.wav" in out.splitlines()[-1]
    left_out = results_of(tmp_path / "out")[0]["left_out"]
    assert [Path(each["file"]).name for each in left_out] == ["broken.wav"]
    assert run(work, tmp_path / "strict", train_data=folder, strict=True) == 1
    assert "broken.wav" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()


def test_shared_speakers_are_warned_of(work, tmp_path, capsys):
    make_manifest(tmp_path / "held_out.csv", work / "test", speakers_per_class=2)  # speakers 0 and 1 of 0..3
    assert run(work, tmp_path / "out", eval_data=tmp_path / "held_out.csv", max_steps=1) == 0
    warning = [line for line in capsys.readouterr().err.splitlines() if "speakers of" in line]
    assert len(warning) == 1 and warning[0].startswith("whisper-meft: warning: 6 of 6 speakers")


def test_early_stopping_gradient_accumulation_and_bf16(work, tmp_path):
    out = tmp_path / "out"
    options = {
        "early_stopping_patience": 2,
        "num_train_epochs": 40,
        "gradient_accumulation_steps": 2,
        "bf16": True,
    }
    assert run(work, out, eval_data=work / "test", **options) == 0
    training, evaluation = results_of(out)
    assert training["epochs"] < 40  # accuracy cannot rise for 40 epochs in a row on 12 clips
    assert evaluation["accuracy"] > 0.8


def test_overwriting_removes_the_earlier_run(work, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(work, out, max_steps=2) == 0
    (out / "mine.txt").write_text("kept")
    old = {path.name for path in out.glob("checkpoint-*")}
    assert run(work, out, max_steps=1) == 1
    assert "not empty" in capsys.readouterr().err
    assert run(work, out, max_steps=1, overwrite_output_dir=True) == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1"} != old
    assert (out / "mine.txt").read_text() == "kept"


# --- resuming ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(work):
    """A run of 6 steps that saved every 2, as if it had died after step 6 of 10."""
    out = work / "interrupted"
    # The schedule is constant, so that 6 steps of 6 equal 6 steps of 10.
    assert run(work, out, **RESUMABLE, max_steps=6) == 0
    assert [path.name for path in checkpoints.list_checkpoints(out)] == [f"checkpoint-{n}" for n in (6, 4, 2)]
    return out


RESUMABLE = {
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 5,
    "lr_scheduler_type": "constant",
}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(work, interrupted, tmp_path, capsys):
    assert run(work, tmp_path / "whole", **RESUMABLE, max_steps=10) == 0
    shutil.copytree(interrupted, tmp_path / "out")
    assert run(work, tmp_path / "out", **RESUMABLE, max_steps=10, resume_from_checkpoint=True) == 0
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-6'}" in capsys.readouterr().out
    whole = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, whole[name], msg=name)
    # and that is not because nothing was trained after step 6
    assert not torch.equal(whole["classifier.weight"], weights(interrupted)["classifier.weight"])


FILES = [
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "last byte"])
def test_a_damaged_newest_checkpoint_is_found_out(name, damage, interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-6" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: {"empty": 0, "half": len(content) // 2, "last byte": -1}[damage]])
    if damage == "last byte" and content.endswith(b"}\n"):
        return  # only the final newline is gone: nothing is lost
    said = []
    assert checkpoints.newest_complete(tmp_path / "out", said.append) == tmp_path / "out" / "checkpoint-4"
    assert len(said) == 1 and name in said[0] and "checkpoint-6" in said[0]
    # It is out of the way, but nothing of it is lost: nobody knows that it is not wanted.
    assert not (tmp_path / "out" / "checkpoint-6").exists()
    aside = tmp_path / "out" / "aside-checkpoint-6"
    assert {each.name for each in aside.iterdir()} >= set(FILES) - {name}


def test_whole_checkpoints_are_not_suspected(interrupted):
    for checkpoint in checkpoints.list_checkpoints(interrupted):
        assert checkpoints.problem_with(checkpoint) is None


def test_training_resumes_from_the_checkpoint_before_a_damaged_one(work, interrupted, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    optimizer = out / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    status = run(work, out, **RESUMABLE, max_steps=10, resume_from_checkpoint=out / "checkpoint-6")
    assert status == 1  # asked for by name, it is refused
    assert "checkpoint-6 is not complete (optimizer.pt is incomplete)" in capsys.readouterr().err
    assert run(work, out, **RESUMABLE, max_steps=10, resume_from_checkpoint=True) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-6 is not complete (optimizer.pt is incomplete)" in printed
    assert f"resuming from {out / 'checkpoint-4'}" in printed
    assert results_of_training(out)["steps"] == 10
    assert checkpoints.problem_with(out / "checkpoint-6") is None


def results_of_training(folder) -> dict:
    return json.loads((folder / "train_results.json").read_text())


def test_resuming_where_there_is_no_checkpoint_starts_from_the_beginning(work, tmp_path, capsys):
    assert run(work, tmp_path / "out", **RESUMABLE, max_steps=2, resume_from_checkpoint=True) == 0
    assert "training starts from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "unipt"}, "has method='lst', but now it is 'unipt'"),
        ({"reduction_factor": 4}, "has reduction_factor=2, but now it is 4"),
        ({"labels": ["low", "high"]}, "has label2id="),
    ],
)
def test_resuming_with_another_model_is_refused(change, message, work, interrupted, tmp_path, capsys):
    shutil.copytree(interrupted, tmp_path / "out")
    labels = change.pop("labels", None)
    extra = ["--labels", *labels] if labels else []
    options = {**RESUMABLE, **change, "max_steps": 10, "resume_from_checkpoint": True}
    assert run(work, tmp_path / "out", *extra, **options) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_from_before_an_option_is_one_with_its_default(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "out")
    folder = max((tmp_path / "out").glob("checkpoint-*"))
    saved = json.loads((folder / "config.json").read_text())
    now = MeftModelConfig.from_pretrained(folder)
    assert saved["meft"].pop("pooling") == "mean"
    (folder / "config.json").write_text(json.dumps(saved))
    checkpoints.check_same_model(folder, now)
    now.meft["pooling"] = "statistics"
    with pytest.raises(UserError, match="has pooling='mean', but now it is 'statistics'"):
        checkpoints.check_same_model(folder, now)


def test_kill_9_loses_at_most_one_checkpoint_interval(work, tmp_path, capsys):
    out, interval = tmp_path / "out", 5
    options = {**RESUMABLE, "save_steps": interval, "save_total_limit": 3}
    arguments = train_command(work / "backbone", work / "train.csv", out, **options, max_steps=100_000)
    with Running("-m", "whisper_meft", *arguments) as process:
        deadline = time.time() + 120
        # Killed as the folder of step 40 appears: most likely in the middle of writing it.
        while not (out / "checkpoint-40").exists():
            assert process.runs and time.time() < deadline, "training did not get to step 40"
            time.sleep(0.0005)
    reached = checkpoints.checkpoint_step(checkpoints.list_checkpoints(out)[0])
    goal = reached + 2 * interval
    assert run(work, out, **{**options, "max_steps": goal}, resume_from_checkpoint=True) == 0
    printed = capsys.readouterr().out
    resumed = int(printed.split("resuming from ")[1].splitlines()[0].rpartition("-")[2])
    assert resumed >= reached - interval
    assert results_of_training(out)["steps"] == goal
    newest = checkpoints.list_checkpoints(out)
    assert all(checkpoints.problem_with(checkpoint) is None for checkpoint in newest)
    assert main(["predict", str(out), str(work / "test")]) == 0


# --- NaN and infinity -------------------------------------------------------------------------------------


def test_nan_features_stop_training_and_name_step_and_file(work, tmp_path, capsys, monkeypatch):
    original = data.SpeechDataset.__getitem__
    calls = {"count": 0}

    def spoil(self, index):
        item = original(self, index)
        calls["count"] += 1
        if self.examples[index].name.endswith("low3.wav") and calls["count"] > 36:  # in the second epoch
            item["input_features"][3, 7] = float("nan")
        return item

    monkeypatch.setattr(data.SpeechDataset, "__getitem__", spoil)
    out = tmp_path / "out"
    assert run(work, out, eval_strategy="no", save_strategy="epoch", num_train_epochs=3) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert "the features are NaN or infinite at step " in error[0]
    step = int(error[0].split("at step ")[1].split(";")[0])
    assert 5 < step <= 10  # 36 clips make 5 steps an epoch
    assert "low3.wav" in error[0] and error[0].count(".wav") == 1
    assert f"the last good one is {out / 'checkpoint-5'}" in error[0]
    assert [path.name for path in checkpoints.list_checkpoints(out)] == ["checkpoint-5"]
    assert checkpoints.problem_with(out / "checkpoint-5") is None
    assert not (out / "model.safetensors").exists()


def test_an_exploding_loss_stops_training_before_it_reaches_a_checkpoint(work, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "max_steps": 20}
    assert run(work, out, **options, learning_rate=1e30) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "NaN or infinite at step " in error
    step = int(error.split("at step ")[1].split(",")[0].split(";")[0])
    saved = checkpoints.list_checkpoints(out)
    assert [checkpoints.checkpoint_step(path) for path in saved] == list(range(step - 1, 0, -1))[:2]
    for checkpoint in saved:
        assert checkpoints.problem_with(checkpoint) is None
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(checkpoint).values())


def test_a_model_that_the_last_step_ruined_is_not_saved(work, tmp_path, capsys, monkeypatch):
    original = train.MeftTrainer.training_step

    def ruin(self, model, *arguments):
        loss = original(self, model, *arguments)
        if self.state.global_step == 1:  # the second step, and the last
            self.model.classifier.weight.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(train.MeftTrainer, "training_step", ruin)
    out, options = tmp_path / "out", {"save_strategy": "no", "eval_strategy": "no", "max_grad_norm": 0}
    assert run(work, out, **options, max_steps=2) == 1
    assert "became NaN or infinite at step 2, try a lower learning_rate" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_features, labels=None):
        return {"loss": self.weight * labels.float().mean(), "logits": input_features.mean((1, 2))}


def test_the_guard_tells_features_loss_and_parameters_apart():
    model = Toy()
    guard = FiniteGuard(model, ["a.wav", "b.wav", "c.wav"], ["d.wav"])
    state, control = TrainerState(), TrainerControl()
    good, index = torch.zeros(2, 4, 6), torch.tensor([2, 0])
    model(input_features=good, labels=torch.tensor([1, 2]), index=index)
    state.global_step = 6
    guard.on_step_begin(None, state, control)
    bad = good.clone()
    bad[1, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"features are NaN or infinite at step 7; files: a\.wav$"):
        model(input_features=bad, labels=torch.tensor([1, 2]), index=index)
    with pytest.raises(
        NonFiniteError, match=r"the loss is NaN or infinite at step 7; files: c\.wav, a\.wav$"
    ):
        model(input_features=good, labels=torch.tensor([1.0, float("nan")]), index=index)
    model.eval()
    with pytest.raises(NonFiniteError, match=r"in the evaluation after step 7; files: d\.wav$"):
        model(input_features=bad[1:], labels=torch.tensor([1]), index=torch.tensor([0]))
    control.should_save = True
    guard.on_step_end(None, state, control)  # nothing wrong with the parameters yet
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="parameter weight became NaN or infinite at step 6"):
        guard.on_step_end(None, state, control)
    guard.close()
    model(input_features=bad, labels=torch.tensor([1, 2]))  # the hooks are gone


# --- several processes ------------------------------------------------------------------------------------


def test_two_processes_train_and_only_the_main_one_writes(work, tmp_path):
    out = tmp_path / "out"
    arguments = train_command(
        work / "backbone", work / "train.csv", out, eval_data=work / "test", per_device_train_batch_size=4
    )
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + ["-m", "whisper_meft", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("training on 36 examples") == 1
    assert result.stdout.count("model and results are in") == 1
    assert "used in computing the loss" not in result.stderr  # DDP's complaint about unused parameters
    training, evaluation = results_of(out)
    assert evaluation["count"] == 12 and evaluation["accuracy"] > 0.8
    # 36 clips in batches of 2 x 4
    assert training["steps"] == 8 * 5
    assert main(["evaluate", str(out), "--data", str(work / "test")]) == 0
    again = json.loads((out / "evaluation" / "eval_results.json").read_text())
    assert np.array_equal(again["confusion_matrix"], evaluation["confusion_matrix"])
    assert checkpoints.problem_with(checkpoints.list_checkpoints(out)[0], processes=2) is None
