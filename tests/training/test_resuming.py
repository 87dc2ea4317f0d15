"""Going on with a run: finished, stopped early, cut off before its results, or told something else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modelling_fixtures import ToyClips, tiny_whisper
from process_fixtures import Running
from safetensors.torch import load_file
from training_fixtures import make_audio_folder, make_backbone, train_command
from transformers import TrainerCallback
from whisper_meft import MeftConfig, MeftTrainer, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.options.training import TrainArguments
from whisper_meft.training import checkpoints, resuming
from whisper_meft.training import run as train
from whisper_meft.training.tasks import classification

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, train/ of 12 clips (three batches of 4), test/, and finished/, a run of two epochs."""
    folder = tmp_path_factory.mktemp("resuming")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=4)
    make_audio_folder(folder / "test", per_class=2, seed=1)
    assert main(command(folder, folder / "finished")) == 0
    return folder


def command(work, output, **options) -> list[str]:
    options = {
        "eval_data": work / "test",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "dataloader_num_workers": 0,
    } | options
    train_data = options.pop("train_data", work / "train")
    return train_command(work / "backbone", train_data, output, **options)


def resume(work, output, **options) -> int:
    return main(command(work, output, **{"resume_from_checkpoint": True, **options}))


def contents(folder) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def results(folder) -> dict:
    return json.loads((folder / "train_results.json").read_text())


@pytest.fixture
def no_training(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("nothing was to be trained")

    monkeypatch.setattr(train.MeftTrainer, "training_step", refused)


# --- nothing left to do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fewer", [{}, {"num_train_epochs": 1}, {"max_steps": 6}])
def test_a_finished_run_is_left_as_it_is(fewer, work, tmp_path, capsys, no_training):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    before = contents(out)
    assert resume(work, out, **fewer) == 0
    assert contents(out) == before
    printed = capsys.readouterr().out
    assert f"the run in {out} is finished, at step 6" in printed and "accuracy" in printed


def test_without_checkpoints_it_is_known_by_its_results(work, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    options = {"save_strategy": "no", "eval_strategy": "epoch"}
    assert main(command(work, out, **options)) == 0
    before = contents(out)
    assert resume(work, out, **options) == 0
    assert contents(out) == before
    assert "is finished, at step 6" in capsys.readouterr().out
    for change, named in (
        ({"learning_rate": 1e-5}, "learning_rate 0.003 (now 1e-05)"),
        ({"learning_rate": 1e-5, "num_train_epochs": 3}, "learning_rate 0.003 (now 1e-05)"),
        ({"per_device_train_batch_size": 6}, "per_device_train_batch_size 4 (now 6)"),
        ({"method": "unipt", "num_train_epochs": 3}, "has method='lst', but now it is 'unipt'"),
    ):
        assert resume(work, out, **options | change) == 1
        assert named in capsys.readouterr().err.splitlines()[-1]
        assert contents(out) == before
    assert resume(work, out, **options, num_train_epochs=3) == 0  # from the beginning
    assert results(out)["steps"] == 9


def test_a_finished_run_whose_checkpoints_are_gone_is_not_written_over(work, tmp_path, capsys, no_training):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    for checkpoint in checkpoints.list_checkpoints(out):
        shutil.rmtree(checkpoint)
    before = contents(out)
    assert resume(work, out) == 0
    assert resume(work, out, metric_for_best_model="macro_f1") == 1
    assert "metric_for_best_model accuracy (now macro_f1)" in capsys.readouterr().err.splitlines()[-1]
    assert contents(out) == before


def test_a_larger_goal_goes_on_with_a_finished_run(work, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    assert resume(work, out, num_train_epochs=3) == 0
    assert "resuming from" in capsys.readouterr().out
    after = results(out)
    assert (after["steps"], after["resumed_from_step"], after["epochs"]) == (9, 6, 3)


def test_a_finished_run_of_another_rate_is_refused(work, capsys, no_training):
    assert resume(work, work / "finished", learning_rate=1e-5) == 1
    assert "learning_rate 0.003 (now 1e-05)" in capsys.readouterr().err


def test_a_finished_run_of_another_method_is_refused(work, tmp_path, capsys):
    assert resume(work, work / "finished", method="unipt") == 1
    assert "has method='lst', but now it is 'unipt'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "missing", [["train_results.json"], ["model.safetensors"], ["eval_results.json"], None]
)
def test_a_run_that_was_killed_before_its_results_gets_them(missing, work, tmp_path, capsys, no_training):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    before = contents(out)
    for path in (
        [out / name for name in missing] if missing else [each for each in out.iterdir() if each.is_file()]
    ):
        path.unlink()
    assert resume(work, out) == 0
    assert "its results are written now" in capsys.readouterr().out
    after = contents(out)
    assert after.keys() == before.keys()
    for name in ("model.safetensors", "config.json", "eval_results.json"):
        assert after[name] == before[name]
    whole = json.loads(before["train_results.json"])
    for name in ("steps", "epochs", "best_checkpoint", "best_metric", "planned_steps"):
        expected = whole[name]
        if name == "best_checkpoint":
            expected = str(out / Path(expected).name)
        assert results(out)[name] == expected, name
    assert results(out)["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)


def test_an_early_stopped_run_is_over_and_more_patience_goes_on(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        classification,
        "make_compute_metrics",
        lambda labels, recordings: lambda _: {"accuracy": 0.5, "mean_class_accuracy": 0.5, "macro_f1": 0.5},
    )
    out, options = tmp_path / "out", {"num_train_epochs": 8, "early_stopping_patience": 2}
    assert main(command(work, out, **options)) == 0
    assert results(out)["steps"] == 9  # the first epoch is the best, two more were waited for
    before = contents(out)
    assert resume(work, out, **options) == 0
    assert contents(out) == before and "is finished, at step 9" in capsys.readouterr().out
    (out / "train_results.json").unlink()
    assert resume(work, out, **options) == 0
    assert results(out)["steps"] == 9 and "its results are written now" in capsys.readouterr().out
    # It goes on counting where it was.
    assert resume(work, out, **{**options, "early_stopping_patience": 3}) == 0
    assert results(out)["steps"] == 12


# --- the whole run's numbers ------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_whole_run(work, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    shutil.rmtree(out / "checkpoint-6")
    options = {"resume_from_checkpoint": out / "checkpoint-3", "logging_steps": 2}
    assert resume(work, out, **options) == 0
    whole, parts = results(work / "finished"), results(out)
    assert parts["resumed_from_step"] == 3 and whole["resumed_from_step"] == 0
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert contents(out)["model.safetensors"] == contents(work / "finished")["model.safetensors"]


def test_resuming_says_nothing_about_shares_and_takes_the_new_intervals(work, tmp_path, caplog):
    out = tmp_path / "out"
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "save_total_limit": 9}
    assert main(command(work, out, **options, max_steps=4)) == 0
    assert resume(work, out, **{**options, "save_steps": 3}, max_steps=9) == 0
    assert not [record for record in caplog.records if "do not match" in record.getMessage()]
    steps = [checkpoints.checkpoint_step(each) for each in checkpoints.list_checkpoints(out)]
    assert steps == [9, 6, 4, 2]


# --- what must be as it was -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, named",
    [
        ({"per_device_train_batch_size": 6}, "per_device_train_batch_size 4 (now 6)"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 (now 2)"),
        ({"max_train_samples": 10}, "train_examples 12 (now 10)"),
        ({"seed": 7}, "seed 1 (now 7)"),
    ],
)
def test_other_steps_are_refused_and_named(change, named, work, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    before = contents(out)
    assert resume(work, out, **{"num_train_epochs": 3, **change}) == 1
    err = capsys.readouterr().err
    assert "was trained with" in err and named in err
    assert contents(out) == before


@pytest.mark.parametrize(
    "change, named",
    [
        ({"learning_rate": 1e-5}, "learning_rate 0.003 (now 1e-05)"),
        ({"head_learning_rate": 1e-2}, "head_learning_rate None (now 0.01)"),
        ({"weight_decay": 0.1}, "weight_decay 0.0 (now 0.1)"),
        ({"optim": "sgd"}, "(now sgd)"),
        ({"adam_beta2": 0.9}, "adam_beta2 0.999 (now 0.9)"),
        ({"loss": "focal"}, "loss cross_entropy (now focal), focal_gamma 0.0 (now 2.0)"),
        ({"class_weights": "balanced"}, "class_weights None (now balanced "),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.0 (now 0.1)"),
        ({"train_data": "other"}, "trained with names and labels of train_data "),
        ({"metric_for_best_model": "macro_f1"}, "metric_for_best_model accuracy (now macro_f1)"),
        ({"metric_for_best_model": "loss"}, "greater_is_better True (now False)"),
        ({"eval_data": "other"}, "trained with names and labels of eval_data "),
        ({"max_eval_samples": 4}, "trained with names and labels of eval_data "),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type constant (now reduce_lr_on_plateau)",
        ),
    ],
)
def test_other_terms_are_refused_and_named(change, named, work, tmp_path, capsys, no_training):
    out = work / "finished"
    before = contents(out)
    if "other" in change.values():  # as much of it, with one clip of another name
        shutil.copytree(work / ("train" if "train_data" in change else "test"), tmp_path / "other")
        (tmp_path / "other" / "low" / "low0.wav").rename(tmp_path / "other" / "low" / "low9.wav")
        change = dict.fromkeys(change, tmp_path / "other")
    assert resume(work, out, **{"num_train_epochs": 3, **change}) == 1
    err = capsys.readouterr().err.splitlines()
    assert "was trained with" in err[-1] and named in err[-1] and "Traceback" not in err
    assert contents(out) == before


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_backbone_of_other_weights_is_refused(epochs, work, tmp_path, capsys, no_training):
    out = work / "finished"
    before = contents(out)
    other = make_backbone(tmp_path / "retrained", init_std=0.2)
    assert resume(work, out, num_train_epochs=epochs, model_name_or_path=other) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"was trained beside {work / 'backbone'}, which has other weights than {other}" in err
    assert contents(out) == before


def test_the_same_backbone_may_be_moved(work, tmp_path):
    shutil.copytree(work / "finished", tmp_path / "out")
    shutil.copytree(work / "backbone", tmp_path / "moved")
    assert resume(work, tmp_path / "out", num_train_epochs=3, model_name_or_path=tmp_path / "moved") == 0


def test_what_a_checkpoint_was_chosen_by_is_kept_where_nothing_is_scored(work, tmp_path, capsys):
    """Or a later score of something else would be compared with the best one so far."""
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    shutil.rmtree(out / "checkpoint-6")
    unscored = {"eval_strategy": "no", "eval_data": None, "max_steps": 4}
    assert resume(work, out, **unscored, resume_from_checkpoint=out / "checkpoint-3") == 0
    assert resume(work, out, metric_for_best_model="macro_f1") == 1
    assert "metric_for_best_model accuracy (now macro_f1)" in capsys.readouterr().err


def test_scores_that_choose_nothing_may_become_others(work, tmp_path, capsys):
    """What was the best by the scores of before is forgotten: those of now cannot be compared with it."""
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    changed = {"metric_for_best_model": "loss", "max_eval_samples": 4, "optim": "adamw_torch"}
    assert resume(work, out, **changed, load_best_model_at_end=False, num_train_epochs=3) == 0
    after, before = results(out), results(work / "finished")
    state = json.loads((out / "checkpoint-9" / "trainer_state.json").read_text())
    assert after["best_metric"] == state["log_history"][-1]["eval_loss"]
    assert Path(after["best_checkpoint"]).name == "checkpoint-9"
    # The same optimizer by another name, which stays what it was.
    assert after["terms"]["optim"] == before["terms"]["optim"] == "adamw_torch_fused"
    assert (
        torch.load(out / "checkpoint-9" / "training_args.bin", weights_only=False).optim
        == before["terms"]["optim"]
    )
    (out / "train_results.json").unlink()
    again = {**changed, "max_eval_samples": 5, "load_best_model_at_end": False, "num_train_epochs": 3}
    assert resume(work, out, **again) == 0
    assert "its results are written now" in capsys.readouterr().out
    assert results(out)["best_metric"] is None
    assert resume(work, out, num_train_epochs=4) == 1
    assert "metric_for_best_model loss (now accuracy)" in capsys.readouterr().err


def test_data_may_be_moved(work, tmp_path):
    moved, out = tmp_path / "elsewhere" / "moved", tmp_path / "out"
    shutil.copytree(work / "train", moved)
    shutil.copytree(work / "test", tmp_path / "heard")
    shutil.copytree(work / "finished", out)
    assert resume(work, out, train_data=moved, eval_data=tmp_path / "heard", num_train_epochs=3) == 0
    assert results(out)["resumed_from_step"] == 6
    assert results(out)["terms"] == results(work / "finished")["terms"]


def test_a_checkpoint_from_before_terms_were_kept_goes_on():
    assert resuming.changed_terms({}, {"learning_rate": 1e-3}) == []
    assert resuming.changed_terms({"learning_rate": 1e-3, "other": 1}, {"learning_rate": 1e-3}) == []
    assert resuming.changed_terms({"optim": "sgd"}, {"optim": "adamw_torch", "new": 1}) == ["optim"]
    assert resuming.changed_terms({"optim": "adamw_torch_fused"}, {"optim": "adamw_torch"}) == []
    assert resuming.changed_terms({"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a"}) == ["b"]


def test_the_first_step_of_more_epochs_is_not_wasted(tmp_path):
    """The linear schedule of a finished run ended at 0, and its checkpoint says so."""
    rates = []

    class Rates(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups if group["params"]])

    def run(steps, **options):
        model = get_meft_model(tiny_whisper(), MeftConfig.from_dict({"method": "lst"}))
        arguments = TrainArguments(
            output_dir=str(tmp_path),
            learning_rate=1e-2,
            head_learning_rate=1e-1,
            max_steps=steps,
            lr_scheduler_type="linear",
            eval_strategy="no",
            save_strategy="steps",
            save_steps=2,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = MeftTrainer(model, arguments, train_dataset=ToyClips(), callbacks=[Rates()])
        trainer.train(**options)
        return trainer

    run(2)
    trainer = run(4, resume_from_checkpoint=True)
    for found, factor in zip(rates, (1, 1 / 2, 1 / 2, 1 / 4), strict=True):
        assert set(found) == {1e-2 * factor, 1e-1 * factor}
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry][-2] == 5e-3


def test_the_same_clips_in_other_parts_go_on(work, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    assert resume(work, out, **parts) == 0
    assert (results(out)["steps"], results(out)["epochs"]) == (9, 3)


def test_how_clips_are_dealt_out_matters_within_an_epoch():
    now = resuming.Batches(1, None, 12, 3, 4, None, 4, 1, 1, False)
    before = {**vars(now), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert now.changes_since(before, 4) == []  # one process takes the same clips in the same order
    by_length = {**before, "by_length": True}
    two = replace(now, processes=2, per_device_train_batch_size=2)
    for then, run in (
        (by_length, replace(now, by_length=True)),
        ({**vars(now)}, two),
        ({**vars(now)}, replace(now, by_length=True)),
    ):
        assert run.changes_since(then, 4) != [] and run.changes_since(then, 3) == []
    assert now.changes_since({"steps_per_epoch": 2}, 4) == ["steps_per_epoch"]
    older = {name: value for name, value in vars(now).items() if name != "sampling"}
    assert now.changes_since(older, 4) == []
    assert replace(now, sampling="balanced").changes_since(older, 4) == ["sampling"]
    ordered = replace(now, order_of_clips="a")
    assert ordered.changes_since({**vars(now), "order_of_clips": "b"}, 4) == ["order_of_clips"]
    assert ordered.changes_since({**vars(now), "order_of_clips": "b"}, 3) == []
    before_order = {name: value for name, value in vars(now).items() if name != "order_of_clips"}
    assert ordered.changes_since(before_order, 4) == []
    assert now.changes_since({**vars(now), "clips_per_step": None, "max_frames_per_batch": 99}, 3)


def test_a_scaler_of_a_run_in_16_bits_is_not_needed(work, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    torch.save({"scale": 65536.0}, out / "checkpoint-6" / "scaler.pt")
    assert resume(work, out, num_train_epochs=3) == 0
    assert results(out)["steps"] == 9


def test_going_back_sets_aside_what_came_later(work, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    later = contents(out / "checkpoint-6")
    options = {"num_train_epochs": 4, "resume_from_checkpoint": out / "checkpoint-3", "save_total_limit": 9}
    assert resume(work, out, **options) == 0
    assert "checkpoint-6 is later than checkpoint-3" in capsys.readouterr().out
    assert contents(out / "aside-checkpoint-6") == later
    assert results(out)["steps"] == 12


# --- stopping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal_number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_with_a_checkpoint_and_a_line(signal_number, status, work, tmp_path):
    options = {
        "save_strategy": "no",
        "eval_strategy": "no",
        "enable_jit_checkpoint": True,
        "logging_steps": 1,
    }
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "whisper_meft", *command(work, out, **options, num_train_epochs=2000)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "learning rate" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal_number)
    printed, err = process.communicate(timeout=120)
    assert process.returncode == status and "Traceback" not in err
    step = int(printed.split("stopped at step ")[1].split(" of 6000;")[0])
    assert f"go on with --resume_from_checkpoint True --output_dir {out}" in printed
    assert {each.name for each in out.iterdir()} == {f"checkpoint-{step}"}
    assert checkpoints.problem_with(out / f"checkpoint-{step}") is None


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_stopped_run_ends_where_an_unstopped_one_does(step, work, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch, and at its end, where the evaluation still belongs to it."""
    original = train.MeftTrainer.training_step

    def then_ask(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            self.interrupts.asked = signal.SIGTERM
        return original(self, *args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(train.MeftTrainer, "training_step", then_ask)
        train.train(*train_arguments(work, out))
    assert stopped.value.code == 143
    assert f"stopped at step {step} of 6; go on with" in capsys.readouterr().out
    assert resume(work, out) == 0
    whole = load_file(work / "finished" / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name
    whole, parts = results(work / "finished"), results(out)
    assert parts["best_metric"] == whole["best_metric"]
    assert Path(parts["best_checkpoint"]).name == Path(whole["best_checkpoint"]).name
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)


def test_a_signal_in_the_last_step_still_ends_the_process(work, tmp_path, monkeypatch):
    """Several runs in one process must not go on with the next; the run itself is whole."""
    original = train.MeftTrainer.training_step

    def then_ask(self, *args, **kwargs):
        if self.state.global_step + 1 == 6:
            self.interrupts.asked = signal.SIGINT
        return original(self, *args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train.MeftTrainer, "training_step", then_ask)
        train.train(*train_arguments(work, out))
    assert results(out)["steps"] == 6


def train_arguments(work, output, **options) -> tuple:
    from whisper_meft.commands.train import make_parser

    return make_parser().parse(command(work, output, **options)[1:])


def test_killed_runs_resume_to_the_same_bits(work, tmp_path):
    """Killed at whatever step of whatever it is doing; the lock of a killed run is no obstacle."""
    out = tmp_path / "out"
    options = {"num_train_epochs": 12, "dataloader_num_workers": 2}
    assert main(command(work, tmp_path / "whole", **options)) == 0
    arguments = command(work, out, **options, resume_from_checkpoint=True)
    for step in (6, 18):
        with Running("-m", "whisper_meft", *arguments) as process:
            deadline = time.time() + 240
            while not (out / f"checkpoint-{step}").exists():
                assert process.runs and time.time() < deadline, process.stderr[-3000:]
                time.sleep(0.001)
    assert main(arguments) == 0
    assert contents(out)["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]
