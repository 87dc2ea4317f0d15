"""Batches that fit the device: --auto_batch, and the answer to an out-of-memory error."""

import pytest
import torch
from training_fixtures import make_audio_folder, make_backbone
from whisper_meft import LSTConfig, UserError
from whisper_meft.commands import train as commands_train
from whisper_meft.commands.cli import main
from whisper_meft.memory.counting import estimate
from whisper_meft.model.pretrained import load_config
from whisper_meft.training import fitting
from whisper_meft.training import run as train
from whisper_meft.training.trainer import MeftTrainer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitting")
    return make_backbone(folder / "backbone"), make_audio_folder(folder / "audio", per_class=4)


def parsed(inputs, output, **options):
    backbone, audio = inputs
    options = {
        "model_name_or_path": backbone,
        "train_data": audio,
        "output_dir": output,
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return commands_train.make_parser().parse([f"--{name}={value}" for name, value in options.items()])


@pytest.mark.parametrize(
    ("batch", "fitting_clips", "expected"),
    [
        (128, 500, (128, 1)),
        (128, 127, (64, 2)),
        (6, 5, (3, 2)),
        (7, 6, (1, 7)),
        (12, 4, (4, 3)),
        (1, 1, (1, 1)),
    ],
)
def test_a_batch_is_split_into_the_fewest_equal_parts(batch, fitting_clips, expected):
    assert fitting.split_batch(batch, fitting_clips) == expected


def test_the_largest_that_fits_does_and_one_more_does_not(inputs, tmp_path):
    model, _, _, arguments = parsed(inputs, tmp_path / "out", per_device_train_batch_size=500)
    config, backbone = LSTConfig(), load_config(model)

    def peak(clips):
        return estimate(backbone, "lst", clips, dtype="float32", num_labels=3, device_type="cpu").peak

    limit = peak(20)
    found = fitting.largest_fitting(config, backbone, arguments, "float32", 3, limit)
    assert 18 <= found <= 20 and peak(found) <= limit < peak(21)
    assert fitting.largest_fitting(config, backbone, arguments, "float32", 3, 1000) == 0


def test_auto_batch_trains_the_same_in_parts(inputs, tmp_path, monkeypatch, capsys):
    whole = train.train(*parsed(inputs, tmp_path / "whole"))
    # Six clips do not fit, three do.
    monkeypatch.setattr(fitting, "largest_fitting", lambda *_: 4)
    parts = train.train(*parsed(inputs, tmp_path / "parts", auto_batch=True))
    assert "a batch of 6 is computed as 2 times 3 clips" in capsys.readouterr().out
    assert parts.training["steps"] == whole.training["steps"] == 2
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_auto_batch_leaves_a_batch_that_fits(inputs, tmp_path):
    arguments = parsed(inputs, tmp_path / "out", auto_batch=True)
    train.train(*arguments)
    assert arguments[3].per_device_train_batch_size == 6
    assert arguments[3].gradient_accumulation_steps == 1


def test_not_even_one_clip_fits(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "device_memory", lambda use_cpu: 1000)
    with pytest.raises(
        UserError, match="auto_batch: not even one clip fits into .* --saved_activations int8"
    ):
        train.train(*parsed(inputs, tmp_path / "out", auto_batch=True))


def test_out_of_memory_is_answered_with_what_fits(inputs, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(MeftTrainer, "training_step", full)
    backbone, audio = inputs
    options = {"model_name_or_path": backbone, "train_data": audio, "output_dir": tmp_path / "out"}
    options |= {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "disable_tqdm": True}
    status = main(["train", *(f"--{name}={value}" for name, value in options.items())])
    error = capsys.readouterr().err
    assert status != 0 and "Traceback" not in error
    # By the count all six fit, so something else fills the device: half of them are suggested.
    assert "do not hold a step of 6 clips" in error
    assert "--per_device_train_batch_size 3 --gradient_accumulation_steps 4" in error
    assert "--saved_activations int8" in error


def test_fixed_frames_count_as_a_shorter_window(inputs, tmp_path):
    model, _, _, arguments = parsed(inputs, tmp_path / "out", per_device_train_batch_size=200)
    backbone = load_config(model)
    limit = estimate(backbone, "lst", 10, dtype="float32", device_type="cpu").peak
    sizes = [
        fitting.largest_fitting(LSTConfig(max_frames=frames), backbone, arguments, "float32", 2, limit)
        for frames in ("fidelity", 10)
    ]
    assert sizes[1] > 3 * sizes[0]


def test_the_option_is_documented(capsys):
    with pytest.raises(SystemExit):
        commands_train.make_parser().parse(["--help"])
    assert "--auto_batch" in capsys.readouterr().out
