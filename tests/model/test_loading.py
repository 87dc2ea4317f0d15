"""What loading accepts as transformers does, and damaged configs that it names in one sentence."""

import pytest
from modelling_fixtures import tiny_whisper
from transformers import AutoModelForAudioClassification, WhisperForAudioClassification
from whisper_meft import LSTConfig, MeftModel, get_meft_model


@pytest.fixture
def folder(tmp_path):
    tiny_whisper().save_pretrained(tmp_path / "whisper")
    base = WhisperForAudioClassification.from_pretrained(tmp_path / "whisper")
    get_meft_model(base, LSTConfig(reduction_factor=4)).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def test_the_auto_class_chooses_the_attention(folder):
    for name in ("eager", "sdpa"):
        model = AutoModelForAudioClassification.from_pretrained(folder, attn_implementation=name)
        assert model.encoder.config._attn_implementation == name
    assert MeftModel.from_pretrained(folder).encoder.config._attn_implementation == "sdpa"
