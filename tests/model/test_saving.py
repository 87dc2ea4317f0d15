"""What saving refuses, so that nothing is lost, and what it writes whatever it is given."""

import pytest
import torch
from modelling_fixtures import batch, randomise, tiny_whisper
from transformers import WhisperForAudioClassification
from whisper_meft import LSTConfig, MeftModel, UserError, get_meft_model


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded_whisper(folder):
    tiny_whisper().save_pretrained(folder)
    return WhisperForAudioClassification.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(batch()[0]).logits


@pytest.mark.parametrize("save_backbone", [False, True])
def test_the_folder_of_the_backbone_is_not_written_over(save_backbone, tmp_path, monkeypatch):
    folder = tmp_path / "whisper"
    monkeypatch.chdir(tmp_path)
    model = get_meft_model(loaded_whisper("whisper"), LSTConfig(reduction_factor=4))
    (tmp_path / "other name").symlink_to(folder)
    before = content(folder)
    for name in ("whisper", folder, tmp_path / "other name"):
        with pytest.raises(UserError, match="it is the folder of the backbone"):
            model.save_pretrained(name, save_backbone=save_backbone)
    assert content(folder) == before


def test_a_folder_that_holds_its_backbone_can_be_written_again(tmp_path):
    model = get_meft_model(loaded_whisper(tmp_path / "whisper"), LSTConfig(reduction_factor=4))
    model.save_pretrained(tmp_path / "ours", save_backbone=True)
    again = randomise(MeftModel.from_pretrained(tmp_path / "ours"))
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "ours")), logits(again))
    again.save_pretrained(tmp_path / "ours", save_backbone=True)
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "ours")), logits(again))
