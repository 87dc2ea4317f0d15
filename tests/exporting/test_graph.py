"""The module that is exported gives what the model gives, whatever the method, the options and the clips."""

import functools
import math

import numpy as np
import pytest
import torch
from modelling_fixtures import MELS, randomise, tiny_whisper
from transformers import WhisperFeatureExtractor
from whisper_meft import MeftConfig, UserError, get_meft_model
from whisper_meft.data import Collator, log_mel, window_of
from whisper_meft.exporting.graph import ClassifierGraph, WaveformGraph
from whisper_meft.exporting.log_mel import LogMel

WINDOW = 50  # encoder frames, a second
LENGTHS = [16_000, 15_999, 20_000, 12_345, 8_000, 8_001, 321, 150, 15_700]
SMALL = {
    "lst": {"reduction_factor": 4, "adapter_dim": 6},
    "unipt": {"reduction_factor": 4},
    "sherl": {"reduction_factor": 4},
    "adapter": {"adapter_dim": 6},
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "fc2"]},
    "lora_plus": {"r": 4, "lora_alpha": 8},
    "s2_lora": {"r": 4, "lora_alpha": 8},
    "adalora": {"init_r": 4, "target_r": 2, "lora_alpha": 8},
}
CASES = [
    *((method, each, {}) for method in sorted(MeftConfig.methods()) for each in ("fidelity", "longest")),
    *((method, 31, {}) for method in ("head", "lst", "sherl", "unipt")),
    *((method, "longest", {"pooling": "statistics"}) for method in ("head", "lora", "lst", "sherl", "unipt")),
    ("lst", "fidelity", {"pooling": "statistics"}),
    *(("unipt", "longest", {"attention": each}) for each in ("pooled:4", "pooled:7", "linear", "summary")),
    *(("unipt", "fidelity", {"attention": each}) for each in ("pooled:4", "linear", "summary")),
    ("lst", "longest", {"layers": [2]}),
    ("lst", "longest", {"layers": [1, 2], "pooling": "statistics"}),
    ("unipt", 31, {"layers": "last:2", "attention": "pooled:3"}),
]


def extractor(**options):
    return WhisperFeatureExtractor(feature_size=MELS, chunk_length=WINDOW // 50, **options)


def make(method, **options):
    if "lora" in method and method != "s2_lora":
        pytest.importorskip("peft")
    base = tiny_whisper(max_source_positions=WINDOW)
    config = MeftConfig.from_dict({"method": method, **SMALL.get(method, {}), **options})
    model = randomise(get_meft_model(base, config), std=0.1)
    model.config.calibration_temperature = 0.6
    if config.pooling == "statistics":
        model.standardisation.mean.normal_()
        model.standardisation.variance.uniform_(0.5, 2)
    return model.eval()


def sounds(samples, seed=0):
    """A waveform of each length, loudest somewhere in it or, of every other one, at its very end."""
    generator = np.random.default_rng(seed)
    waves = []
    for index, number in enumerate(samples):
        time = np.arange(number)
        wave = np.sin(time * generator.uniform(0.05, 0.4)) * 0.2 + 0.05 * generator.standard_normal(number)
        loudness = time / number if index % 2 else np.hanning(number) + 1e-3
        waves.append((wave * loudness).astype(np.float32))
    return waves


def stacked(waves, behind=np.nan):
    samples = [len(wave) for wave in waves]
    batch = np.full((len(waves), max(samples)), behind, np.float32)
    for row, wave in zip(batch, waves):
        row[: len(wave)] = wave
    return torch.from_numpy(batch), torch.tensor(samples)


@functools.cache
def items(max_frames):
    """The model's inputs, by the library's own way from a waveform."""
    made, window = [], window_of(extractor(), max_frames)
    for wave in sounds(LENGTHS):
        wave = wave[: window * 160]
        mel = log_mel(wave, extractor(), full_window=max_frames == "fidelity")[:, :window]
        mask = torch.arange(mel.shape[1]) < math.ceil(len(wave) / 160)
        made.append(
            {"input_features": torch.from_numpy(np.ascontiguousarray(mel)), "attention_mask": mask.long()}
        )
    return Collator(extractor(), max_frames)(made)


@pytest.mark.parametrize(("method", "max_frames", "options"), CASES)
def test_probabilities_are_the_models(method, max_frames, options):
    model, waves = make(method, max_frames=max_frames, **options), sounds(LENGTHS)
    inputs = items(max_frames)
    with torch.no_grad():
        expected = model(**inputs).logits
        graph = ClassifierGraph(model)
        frames = inputs["attention_mask"].sum(-1)
        probabilities, logits = graph(inputs["input_features"], frames)
        torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(probabilities, expected.softmax(-1), rtol=2e-5, atol=1e-5)
        from_waves = WaveformGraph(graph, extractor())
        torch.testing.assert_close(from_waves(*stacked(waves))[1], expected, rtol=1e-4, atol=1e-4)
        alone = from_waves(*stacked([waves[5]]))[1]  # among no longer ones
        torch.testing.assert_close(alone[0], expected[5], rtol=1e-4, atol=1e-4)
    assert expected.softmax(-1).std(0).max() > 1e-4  # clips differ


def test_the_model_stays_as_it_was():
    model = make("lora", max_frames="longest")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = type(model.side_network)
    ClassifierGraph(model)
    assert type(model.side_network) is kind and model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("frames", [59, 60])
def test_features_of_any_number_of_frames(frames):
    model = make("lst", max_frames="longest")
    features = torch.randn(3, MELS, frames)
    lengths = torch.tensor([frames, 33, 1])
    mask = (torch.arange(frames) < lengths[:, None]).long()
    with torch.no_grad():
        expected = model(features, mask).logits
        torch.testing.assert_close(ClassifierGraph(model)(features, lengths)[1], expected)


@pytest.mark.parametrize("whole", [True, False])
def test_log_mel_is_the_extractors(whole):
    waves = sounds(LENGTHS, seed=3) + [np.zeros(5000, np.float32)]
    waves[0][-3:] = 0.9  # louder than all else, where the window reflects it
    module = LogMel(extractor(), 16_000, whole)
    for wave in waves:
        expected = log_mel(wave[:16_000], extractor(), full_window=whole)[:, :100]
        found, frames = module(*stacked([wave]))
        assert frames.tolist() == [math.ceil(min(len(wave), 16_000) / 160)]
        found = found[0, :, : expected.shape[1]].numpy()
        # What is 80 dB under the loudest is as near to it as float32 tells.
        np.testing.assert_allclose(found, expected, atol=2e-3)
        assert np.abs(found - expected).mean() < 2e-5


@pytest.mark.parametrize("max_frames", ["longest", "fidelity"])
def test_a_clip_without_samples_has_no_answer(max_frames):
    module = WaveformGraph(ClassifierGraph(make("lst", max_frames=max_frames)), extractor())
    batch = torch.full((3, 4000), torch.nan)
    batch[1] = 0.1
    with torch.no_grad():
        for found in module(batch, torch.tensor([0, 9_999, -1])):
            assert found[1].isfinite().all() and found[[0, 2]].isnan().all()
        alone = module(batch[1:2], torch.tensor([4000]))[0]
    torch.testing.assert_close(module(batch, torch.tensor([0, 9_999, -1]))[0][1:2], alone)


def test_an_extractor_that_adds_noise_is_refused():
    with pytest.raises(UserError, match=r"adds noise \(dither 0\.1\)"):
        LogMel(extractor(dither=0.1), 16_000, True)
