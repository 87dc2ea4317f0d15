"""A real Whisper transcribes as ever with an untrained side network beside it, whatever generate is asked."""

import copy
import os

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from whisper_meft import LSTConfig, MeftConfig, SHERLConfig, UniPTConfig, get_meft_model
from whisper_meft.methods.mezo import MeZO

pytestmark = pytest.mark.real

MODELS = pytest.mark.parametrize(
    ("config", "placement"),
    [
        (LSTConfig, "encoder"),
        (LSTConfig, "both"),
        (UniPTConfig, "both"),
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


# Of each method that trains inside: a learning rate at which five steps show.
RATES = {
    "full": 1e-5,
    "bitfit": 1e-3,
    "adapter": 1e-3,
    "lora": 1e-4,
    "lora_plus": 5e-5,
    "adalora": 1e-3,
    "s2_lora": 1e-3,
    "mezo": 1e-6,
}


@pytest.mark.parametrize(
    ("method", "target"),
    [
        *((method, "both") for method in RATES),
        *((m, t) for m in ("full", "lora") for t in ("encoder", "decoder")),
    ],
)
def test_methods_inside_start_at_zero_shot_and_learn(method, target, whisper):
    base = copy.deepcopy(whisper)
    model = get_meft_model(
        base, MeftConfig.from_dict({"method": method, "target": target, "max_frames": 400})
    )
    features = log_mel(8).input_features
    labels = torch.tensor([[50258, 50259, 50359, 50363, 2425, 11, 1002, 50257]])
    ids = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        heard = model.eval().get_encoder()(features)
        expected = whisper(encoder_outputs=heard, decoder_input_ids=ids).logits
        assert torch.equal(model(features, decoder_input_ids=ids).logits, expected)
    labels[:, :3] = -100
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = MeZO(trained, RATES[method]) if method == "mezo" else torch.optim.Adam(trained, RATES[method])

    def loss():
        return model(features, labels=labels).loss

    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        if method == "mezo":
            losses.append(optimizer.measure(loss))
        else:
            losses.append(loss())
            losses[-1].backward()
            assert all(p.grad.isfinite().all() for p in trained)
        optimizer.step()
    with torch.no_grad():
        losses = torch.stack([*losses, loss()]).detach()
    assert losses.isfinite().all()
    if method != "mezo":  # five random directions promise nothing
        assert losses[-1] < losses[0]
