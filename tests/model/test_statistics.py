"""``pooling="statistics"``: what the head then reads, for every method and by every way into the model."""

import pytest
import torch
from modelling_fixtures import WIDTH, WINDOW, batch, mel_mask, randomise, tiny_whisper
from training_fixtures import make_backbone
from transformers import WhisperForAudioClassification
from whisper_meft import HeadConfig, LSTConfig, MeftConfig, MeftModel, UserError, get_meft_model
from whisper_meft.encoder.pooling import mean_and_deviation
from whisper_meft.model.published import to_published

ALONE = {"head", "full", "bitfit", "lora", "lora_plus", "adalora", "s2_lora", "adapter", "mezo"}
OPTIONS = {"adalora": {"init_r": 4, "target_r": 2}}
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0}


def model_of(method: str, **options) -> MeftModel:
    torch.manual_seed(0)
    config = {"method": method, "pooling": "statistics", **OPTIONS.get(method, {}), **options}
    model = get_meft_model(tiny_whisper(**STILL), MeftConfig.from_dict(config))
    return randomise(model, std=0.05)


@pytest.mark.parametrize("method", MeftConfig.methods())
def test_a_step_trains_and_the_result_is_saved(method, tmp_path):
    model = model_of(method)
    wide = 2 if method in ALONE else 3
    assert model.projector.in_features == wide * WIDTH
    features, labels = batch()
    if method != "mezo":
        model(features, labels=labels).loss.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad
        )
    else:
        with torch.no_grad():
            model(features, labels=labels)
    assert model.standardisation.clips == len(features)
    model.save_pretrained(tmp_path)
    loaded = MeftModel.from_pretrained(tmp_path, backbone=tiny_whisper(**STILL))
    assert loaded.meft_config.pooling == "statistics"
    with torch.no_grad():
        torch.testing.assert_close(loaded(features).logits, model.eval()(features).logits)


def test_the_head_reads_mean_and_deviation_of_the_encoders_output():
    model = model_of("head").eval()
    features, _ = batch()
    with torch.no_grad():
        *_, last = model.encoder.stream(features, final_norm=True)
        read = mean_and_deviation(last, None)
        expected = model.classifier(
            model.projector(read * (1 + 1e-6) ** -0.5)
        )  # nothing was seen in training yet
        torch.testing.assert_close(model(features).logits, expected)


@pytest.mark.parametrize("method", ["head", "weighted_sum", "lst", "unipt", "sherl"])
@pytest.mark.parametrize("max_frames", ["fidelity", "longest"])
def test_cached_states_and_chunks_give_the_same(method, max_frames):
    features, labels = batch()
    mask = mel_mask([2 * WINDOW, 20, 32, 2], 2 * WINDOW)
    trimmed = max_frames == "longest"
    results = []
    for way in ("whole", "chunks", "cached"):
        model = model_of(method, max_frames=max_frames)
        given = {"input_features": features, "attention_mask": mask}
        if way == "chunks":
            type(model.meft_config).chunk_size, before = 3, type(model.meft_config).chunk_size
        elif way == "cached":
            lengths = (mask.sum(1) + 1) // 2
            states = list(model.encoder.stream(features, lengths if trimmed else None))
            given = {"hidden_states": torch.stack([states[i] for i in model.states_read], 1)}
            given["hidden_state_lengths"] = lengths
        try:
            out = model(**given, labels=labels)
        finally:
            if way == "chunks":
                type(model.meft_config).chunk_size = before
        out.loss.backward()
        results.append([out.logits, model.projector.weight.grad, model.standardisation.mean.clone()])
    for other in results[1:]:
        for one, two in zip(results[0], other):
            torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-4)


def test_padding_and_neighbours_change_nothing_in_evaluation():
    model = model_of("lst", max_frames="longest")
    features, labels = batch()
    model(features, labels=labels)
    mask = mel_mask([20, 30, 40, 48], 2 * WINDOW)
    with torch.no_grad():
        together = model.eval()(features, attention_mask=mask).logits
        alone = model(features[:1, :, :20], attention_mask=mask[:1, :20]).logits
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


def test_the_default_reads_what_it_did():
    model = get_meft_model(tiny_whisper(**STILL), MeftConfig.from_dict({"method": "lst"}))
    assert model.projector.in_features == WIDTH and not any("standard" in name for name in model.state_dict())


def test_mistakes_are_named():
    with pytest.raises(UserError, match="pooling must be 'mean' or 'statistics', got 'max'"):
        HeadConfig(pooling="max")
    with pytest.raises(UserError, match="pooling='statistics' cannot be merged"):
        model_of("head").merge_and_unload()


def test_the_published_code_cannot_load_it(tmp_path):
    base = make_backbone(tmp_path / "backbone")
    whisper = WhisperForAudioClassification.from_pretrained(base)
    get_meft_model(whisper, LSTConfig(pooling="statistics")).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="trained with pooling='statistics'"):
        to_published(tmp_path / "saved", tmp_path / "published")
    assert not (tmp_path / "published").exists()
