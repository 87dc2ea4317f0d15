"""Awkward inputs and moments: what is found out early, and what one bad file or name must not spoil."""

import pytest
from safetensors.torch import load_file, save_file
from training_fixtures import make_audio_folder, make_backbone, train_command
from whisper_meft import data
from whisper_meft.cli import main


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
