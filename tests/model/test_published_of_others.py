"""Models that the published code computes in another way: what is written, and what is said about it."""

import pytest
import safetensors.torch
import torch
from modelling_fixtures import randomise, tiny_whisper
from transformers import WhisperForAudioClassification
from whisper_meft import LSTConfig, get_meft_model
from whisper_meft.model.published import to_published


def saved(folder, **options):
    """An LST model saved in ``folder``/ours, and the weights of its backbone."""
    tiny_whisper().save_pretrained(folder / "whisper")
    base = WhisperForAudioClassification.from_pretrained(folder / "whisper")
    truth = {name: t.clone() for name, t in base.encoder.state_dict().items()}
    model = randomise(get_meft_model(base, LSTConfig(reduction_factor=4, **options)))
    model.save_pretrained(folder / "ours")
    return truth


@pytest.mark.filterwarnings("ignore:the published code has")
def test_a_quantised_backbone_is_written_as_it_was_before(tmp_path):
    truth = saved(tmp_path, backbone_quantization="int8")
    with pytest.warns(UserWarning, match="trained on a backbone that is rounded to int8"):
        to_published(tmp_path / "ours", tmp_path / "published")
    written = safetensors.torch.load_file(tmp_path / "published/model.safetensors")
    assert not [name for name in written if name.endswith((".codes", ".scale", ".total"))]
    assert all(torch.equal(written[f"encoder.{name}"], tensor) for name, tensor in truth.items())


@pytest.mark.filterwarnings("ignore:the published code has")
def test_other_max_frames_are_no_secret(tmp_path):
    saved(tmp_path, max_frames="longest")
    with pytest.warns(
        UserWarning, match="max_frames='longest'; the published code computes the whole window"
    ):
        to_published(tmp_path / "ours", tmp_path / "published")
