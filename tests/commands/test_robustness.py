"""Awkward inputs and moments: what is found out early, and what one bad file or name must not spoil."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file, save_file
from training_fixtures import RATE, make_audio_folder, make_backbone, tone, train_command
from whisper_meft import data
from whisper_meft.commands.cli import main
from whisper_meft.evaluation.classifier import Classifier

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, train/ and model/, which was trained for two steps."""
    folder = tmp_path_factory.mktemp("robustness")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=4)
    assert main(train_command(folder / "backbone", folder / "train", folder / "model", max_steps=2)) == 0
    return folder


# --- before work is lost ----------------------------------------------------------------------------------


def test_missing_backbone_weights_are_found_before_the_audio_is_read(work, tmp_path, capsys, monkeypatch):
    tensors = load_file(work / "backbone/model.safetensors")
    del tensors["encoder.layers.1.fc1.weight"]
    make_backbone(tmp_path / "backbone")
    save_file(tensors, tmp_path / "backbone/model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(data, "check_audio", lambda *args: pytest.fail("the audio was read first"))
    assert main(train_command(tmp_path / "backbone", work / "train", tmp_path / "out")) == 1
    err = capsys.readouterr().err
    assert "lacks 1 encoder tensors" in err and "encoder.layers.1.fc1.weight" in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"metric_for_best_model": "f1"}, "--metric_for_best_model must be one of accuracy,"),
        (
            {"save_strategy": "best", "eval_strategy": "no"},
            "--save_strategy best saves when an evaluation is",
        ),
        (
            {"metric_for_best_model": "loss", "eval_strategy": "no"},
            "--metric_for_best_model loss chooses among evaluations: it cannot be used with --eval_strategy",
        ),
        (
            {"metric_for_best_model": "accuracy", "save_strategy": "no"},
            "with --eval_strategy no, the default with --save_strategy no",
        ),
        ({"max_steps": 0}, "--max_steps must be at least 1"),
        ({"num_train_epochs": "nan"}, "--num_train_epochs must be above 0 and finite"),
        ({"learning_rate": "inf"}, "--learning_rate must be above 0 and finite"),
        ({"seed": -1}, "--seed must lie between 0 and 2^32 - 1"),
        ({"data_seed": 10**20}, "--data_seed must lie between 0 and 2^32 - 1, got 1"),
        ({"save_steps": 0}, "--save_steps must be above 0"),
        ({"logging_steps": "nan"}, "--logging_steps must be above 0 and finite, got nan"),
        ({"weight_decay": -1}, "--weight_decay must be 0 or more and finite, got -1.0"),
        ({"warmup_steps": "nan"}, "--warmup_steps must be 0 or more and finite, got nan"),
        ({"label_smoothing_factor": 1.5}, "--label_smoothing_factor must be at least 0 and below 1, got 1.5"),
        ({"label_smoothing_factor": -0.5}, "--label_smoothing_factor must be at least 0 and below 1, got -0"),
        ({"adam_beta2": 1}, "--adam_beta2 must be at least 0 and below 1, got 1.0"),
        ({"max_grad_norm": "nan"}, "--max_grad_norm must be above 0, or 0 for no limit, got nan"),
        ({"max_grad_norm": -1}, "--max_grad_norm must be above 0, or 0 for no limit, got -1.0"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be 0 or more"),
        ({"remove_unused_columns": True}, "--remove_unused_columns cannot be True"),
        ({"prediction_loss_only": True}, "--prediction_loss_only cannot be True"),
    ],
)
def test_options_that_would_fail_later_are_refused_at_once(option, message, work, tmp_path, capsys):
    assert main(train_command(work / "backbone", work / "train", tmp_path / "out", **option)) == 2
    assert message in capsys.readouterr().err


def test_an_epoch_without_a_batch_is_explained(work, tmp_path, capsys):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    assert main(train_command(work / "backbone", work / "train", tmp_path / "out", **options)) == 1
    assert "do not fill one batch of 64" in capsys.readouterr().err


def test_a_run_at_its_last_step_is_not_trained_further(work, tmp_path, capsys):
    command = train_command(
        work / "backbone", work / "train", tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2
    )
    assert main(command) == 0
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert main([*command, "--resume_from_checkpoint", "True"]) == 0
    assert "is finished, at step 2, and left as it is" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert (
        "checkpoint-2" in before
        and main(["evaluate", str(tmp_path / "out/checkpoint-2"), "--data", str(work / "train")]) == 0
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_an_output_that_cannot_be_written_is_found_before_any_work(
    command, work, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    clip = next((work / "train").rglob("*.wav"))
    arguments = {
        "train": train_command(work / "backbone", work / "train", tmp_path / "file/out"),
        "evaluate": [
            "evaluate",
            work / "model",
            "--data",
            work / "train",
            "--output_dir",
            tmp_path / "file/out",
        ],
        "predict": ["predict", work / "model", clip, "--output", tmp_path / "file/out.csv"],
    }[command]
    monkeypatch.setattr(data, "check_audio", lambda *args, **kwargs: pytest.fail("the audio was read first"))
    assert main([str(argument) for argument in arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("whisper-meft: error: cannot write ") and err.count("\n") == 1


# --- one bad file, one strange name -----------------------------------------------------------------------


def write_clip(path: Path, scale: float = 1.0) -> Path:
    wave = scale * tone(900.0, 0.5, np.random.default_rng(0)).astype(np.float64)
    soundfile.write(path, wave, RATE, subtype="DOUBLE")
    return path


def predictions(capsys, model: Path, *arguments) -> tuple[int, str, str]:
    status = main(["predict", str(model), *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_samples_that_are_no_audio_do_not_spoil_the_others(work, tmp_path, capsys):
    good, absurd = write_clip(tmp_path / "good.wav"), write_clip(tmp_path / "absurd.wav", scale=1e30)
    status, out, err = predictions(capsys, work / "model", good, absurd)
    assert status == 1 and "good.wav" in out and "absurd.wav" not in out
    assert "cannot read" in err and "absurd.wav" in err and "which lies in -1 to 1" in err
    # Integers written as floats are audio.
    assert predictions(capsys, work / "model", write_clip(tmp_path / "int.wav", scale=2.0**31))[0] == 0


def test_a_clip_with_an_infinite_output_does_not_spoil_the_others(work, tmp_path, capsys, monkeypatch):
    def spoilt(self, examples, *given, **more):
        rows = original(self, examples, *given, **more)
        rows[[example.name.endswith("b.wav") for example in examples]] = np.nan
        return rows

    original = Classifier.answers
    monkeypatch.setattr(Classifier, "answers", spoilt)
    clips = [write_clip(tmp_path / name) for name in ("a.wav", "b.wav", "c.wav")]
    status, out, err = predictions(capsys, work / "model", *clips)
    assert status == 1 and "a.wav" in out and "c.wav" in out and "b.wav" not in out
    assert "b.wav" in err and "NaN" in err
    assert predictions(capsys, work / "model", clips[1])[0] == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_and_not_waited_for(work, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.wav")
    status, out, err = predictions(
        capsys, work / "model", write_clip(tmp_path / "good.wav"), tmp_path / "pipe.wav"
    )
    assert status == 1 and "good.wav" in out and "is a pipe or a device" in err


def test_a_link_to_itself_and_names_that_are_no_text(work, tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "loop.wav").symlink_to("loop.wav")
    try:
        os.rename(write_clip(folder / "good.wav"), os.fsencode(folder) + b"/latin-\xe9.wav")
    except OSError:
        pytest.skip("file names must be UTF-8 here")
    status, out, err = predictions(capsys, work / "model", folder, "--output", tmp_path / "out.json")
    assert status == 1 and "loop.wav" in err
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert os.fsencode(row["file"]).endswith(b"latin-\xe9.wav")
    # On a terminal of any encoding.
    command = [sys.executable, "-m", "whisper_meft", "predict", work / "model", row["file"]]
    result = subprocess.run(command, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert result.returncode == 0 and rb"latin-\udce9.wav" in result.stdout


def test_an_empty_name_is_not_the_current_folder(work, capsys):
    assert predictions(capsys, work / "model", "")[2].startswith("whisper-meft: error: AUDIO_OR_DIR is empty")


# --- messages ---------------------------------------------------------------------------------------------


def test_an_error_below_a_progress_bar_has_a_line_of_its_own(work, tmp_path, capsys):
    options = {"learning_rate": 1e30, "disable_tqdm": False, "per_device_train_batch_size": 4}
    assert main(train_command(work / "backbone", work / "train", tmp_path / "out", **options)) == 1
    last = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(last) == 1 and last[0].startswith("whisper-meft: error: ") and "NaN or infinite" in last[0]


def test_a_hub_that_cannot_be_reached_gives_one_line(work, tmp_path):
    command = [sys.executable, "-m", "whisper_meft", *train_command("nobody/nothing", work, tmp_path / "out")]
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    code = (
        "import sys, time\ntime.sleep = lambda seconds: None\n"  # the hub client waits between its attempts
        "from whisper_meft.commands.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command[1:3] = ["-c", code]
    result = subprocess.run(command, env={**ENVIRONMENT, **offline}, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("whisper-meft: error: model_name_or_path: cannot load nobody/nothing")
