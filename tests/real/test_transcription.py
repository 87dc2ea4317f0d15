"""A real Whisper transcribes as ever with an untrained side network beside it, whatever generate is asked."""

import os

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from whisper_meft import LSTConfig, SHERLConfig, UniPTConfig, get_meft_model

pytestmark = pytest.mark.real

MODELS = pytest.mark.parametrize(
    ("config", "placement"),
    [
        (LSTConfig, "encoder"),
        (LSTConfig, "both"),
        (UniPTConfig, "decoder"),
        (SHERLConfig, "encoder"),
        (SHERLConfig, "decoder"),
    ],
)


@pytest.fixture(scope="module")
def whisper():
    return WhisperForConditionalGeneration.from_pretrained(os.environ["MEFT_WHISPER"]).eval()


def log_mel(seconds, **options):
    """Of a voice-like sound: a gliding tone with overtones that comes and goes."""
    time = np.arange(int(16000 * seconds)) / 16000
    phase = 2 * np.pi * np.cumsum(140 + 30 * np.sin(2 * np.pi * 0.7 * time)) / 16000
    voice = sum(np.sin(k * phase) / k for k in range(1, 20)) * (1 + np.sin(2 * np.pi * 3 * time))
    extractor = WhisperFeatureExtractor.from_pretrained(os.environ["MEFT_WHISPER"])
    return extractor([0.05 * voice.astype(np.float32)], sampling_rate=16000, return_tensors="pt", **options)


@MODELS
def test_generates_what_the_backbone_does(config, placement, whisper):
    model = get_meft_model(whisper, config(placement=placement)).eval()
    features = log_mel(4).input_features
    for options in ({}, {"num_beams": 3, "language": "nl"}, {"return_timestamps": True, "language": "de"}):
        options = {"max_new_tokens": 12, **options}
        assert torch.equal(model.generate(features, **options), whisper.generate(features, **options))


def test_long_form(whisper):
    model = get_meft_model(whisper, UniPTConfig(placement="decoder")).eval()
    given = log_mel(40, truncation=False, padding="longest", return_attention_mask=True)
    options = {"attention_mask": given.attention_mask, "return_timestamps": True, "language": "en"}
    options |= {"condition_on_prev_tokens": True, "max_new_tokens": 40}
    found = model.generate(given.input_features, **options)
    assert torch.equal(found, whisper.generate(given.input_features, **options))


@MODELS
def test_logits_and_a_step(config, placement, whisper):
    model = get_meft_model(whisper, config(placement=placement)).eval()
    features = log_mel(3).input_features
    ids = torch.tensor([[50258, 50259, 50359, 50363, 2425, 11, 1002]])
    with torch.no_grad():
        expected = whisper(features, decoder_input_ids=ids).logits
        found = model(features, decoder_input_ids=ids).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()
    model.train()(features, labels=ids).loss.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert names and all(name.startswith("side_network.") for name in names)
