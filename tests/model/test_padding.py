"""Padding of log-mel is recognised wherever the model is called: by masks, by the features, in pipelines."""

import numpy as np
import pytest
import torch
from transformers import TrainingArguments, WhisperFeatureExtractor, pipeline
from whisper_meft import LSTConfig, MeftTrainer, UserError, get_meft_model
from whisper_meft.evaluation.classifier import Classifier, predict
from whisper_meft.model.backbone import load_backbone, set_labels
from whisper_meft.model.saving import extractor_to_save
from whisper_meft.options.inference import InferenceArguments
from whisper_meft.padding import frames_with_sound

from tests.modelling_fixtures import MELS, WINDOW, batch, mel_mask, randomise, tiny_whisper
from tests.training_fixtures import RATE, make_backbone, tone


def model_of(max_frames):
    return randomise(get_meft_model(tiny_whisper(), LSTConfig(max_frames=max_frames))).eval()


@torch.no_grad()
def scores(model, features, **inputs):
    return model(features, **inputs).logits


def padded(frames, total, value):
    """Random log-mel of clips of so many frames, then a constant."""
    features = batch(len(frames), total)[0]
    return features.masked_fill(~mel_mask(frames, total).bool()[:, None], value)


@pytest.mark.parametrize("value", [0.0, -0.37])
@pytest.mark.parametrize("max_frames", ["longest", 20])
def test_padding_is_recognised_without_a_mask(value, max_frames):
    frames = [2 * WINDOW, 31, 12, 1]
    features, model = padded(frames, 2 * WINDOW, value), model_of(max_frames)
    assert frames_with_sound(features).tolist() == frames
    with_mask = scores(model, features, attention_mask=mel_mask(frames, 2 * WINDOW))
    assert torch.equal(scores(model, features), with_mask)
    alone = scores(model, features[2:3, :, :12], attention_mask=torch.ones(1, 12))
    torch.testing.assert_close(with_mask[2:3], alone, rtol=1e-4, atol=1e-5)


def test_a_clip_of_silence_alone_counts_one_frame():
    assert frames_with_sound(torch.full((2, MELS, 9), -1.5)).tolist() == [1, 1]
    assert frames_with_sound(torch.zeros(2, MELS, 0)).tolist() == [1, 1]


@pytest.mark.parametrize("samples", [160 * 40, 160 * 40 + 1, 160 * 40 + 159, 160 * 39 + 1])
def test_a_mask_of_samples_is_one_of_frames(samples):
    """WhisperFeatureExtractor gives either, depending on where return_attention_mask is set."""
    features, model = batch(2, 40)[0], model_of("longest")
    sound = torch.tensor([samples, 160 * 20 + 5])
    mask = (torch.arange(samples) < sound[:, None]).long()
    expected = scores(model, features, attention_mask=mel_mask([40, 21], 40))
    assert torch.equal(scores(model, features, attention_mask=mask), expected)


def test_masks_that_mean_something_else_are_refused():
    features, model = batch(2, 40)[0], model_of("longest")
    for shape in ((2, 39), (2, 80), (2, 160 * 42), (3, 40), (40,)):
        with pytest.raises(UserError, match="attention_mask must have shape"):
            model(features, attention_mask=torch.ones(shape))
    with pytest.raises(UserError, match="got 0 before 1: pad clips at their end"):
        model(features, attention_mask=1 - mel_mask([5, 5], 40))


@pytest.mark.parametrize("name", ["input_features", "attention_mask", "labels", "hidden_states"])
@pytest.mark.parametrize("kind", [np.array, list])
def test_arrays_and_lists_are_refused_by_name(name, kind):
    inputs = {"input_features": batch(1)[0], name: kind([1.0])}
    if name == "hidden_states":
        del inputs["input_features"]
    with pytest.raises(UserError, match=f"{name} must be a torch.Tensor, got .*(ndarray|list): turn arrays"):
        model_of("longest")(**inputs)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A backbone with a window of 2 seconds."""
    return make_backbone(tmp_path_factory.mktemp("base"), max_source_positions=100)


@pytest.mark.parametrize("max_frames", ["fidelity", "longest", 50])
def test_a_pipeline_answers_as_predict_does(max_frames, backbone, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    base, out = load_backbone(backbone), tmp_path / "out"
    set_labels(base, ["high", "low", "middle"])
    extractor = WhisperFeatureExtractor.from_pretrained(backbone)
    model = randomise(get_meft_model(base, LSTConfig(max_frames=max_frames, reduction_factor=2)))
    arguments = TrainingArguments(str(out), report_to="none", use_cpu=True)
    MeftTrainer(model, arguments, processing_class=extractor).save_model()
    assert not extractor.return_attention_mask  # the one that was given stays as it was

    generator, files = np.random.default_rng(0), []
    for seconds in (0.1004, 0.3, 0.99, 1.6, 2.4):
        files.append(str(tmp_path / f"{seconds}.wav"))
        soundfile.write(files[-1], tone(500, seconds, generator), RATE, subtype="FLOAT")
    # Which hears the first seconds of a longer one alone.
    classifier = Classifier.load(out, InferenceArguments(window="first"), progress=False)
    rows, bad = predict(classifier, files)
    assert not bad
    classify = pipeline("audio-classification", model=str(out), device="cpu")
    for file, row in zip(files, rows):
        answer = classify(soundfile.read(file, dtype="float32")[0])
        for each in answer:
            assert each["score"] == pytest.approx(row["probabilities"][each["label"]], abs=2e-5), file


def test_settings_of_the_extractor_that_is_saved():
    extractor = WhisperFeatureExtractor(chunk_length=30)
    assert extractor_to_save(extractor, "fidelity") is extractor
    assert extractor_to_save(extractor, "longest").return_attention_mask
    assert extractor_to_save(extractor, "longest").chunk_length == 30
    assert extractor_to_save(extractor, 250).n_samples == 5 * RATE
    assert extractor_to_save(extractor, 275).chunk_length == 30  # no whole number of seconds
