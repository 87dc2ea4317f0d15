"""MeftModel: configs, gradients, saving, loading, and what it says when something does not fit."""

import copy
import dataclasses
import inspect
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import whisper_meft.model.saving
from modelling_fixtures import CLASSES, CONFIGS, MELS, WINDOW, batch, mel_mask, randomise, tiny_whisper
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForAudioClassification,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    pipeline,
)
from whisper_meft import LSTConfig, MeftConfig, MeftModel, SHERLConfig, UniPTConfig, UserError, get_meft_model
from whisper_meft.encoder.fingerprint import fingerprint, same_backbone
from whisper_meft.model.backbone import load_backbone, resolve_backbone
from whisper_meft.once import warn_once

METHODS = list(CONFIGS)


def model_of(method, seed=0, max_frames="fidelity", dtype=None, **options) -> MeftModel:
    config = CONFIGS[method](reduction_factor=4, max_frames=max_frames, backbone_dtype=dtype, **options)
    return randomise(get_meft_model(tiny_whisper(seed), config))


def scores(model, features=None, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()[0] if features is None else features, **inputs).logits


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("method", METHODS)
def test_config_round_trip(method, tmp_path):
    config = CONFIGS[method](reduction_factor=4, max_frames=7, backbone_dtype=torch.bfloat16)
    assert config.to_dict()["method"] == method and config.backbone_dtype == "bfloat16"
    json.dumps(config.to_dict())
    assert MeftConfig.from_dict(config.to_dict()) == config
    assert CONFIGS[method].from_dict({k: v for k, v in config.to_dict().items() if k != "method"}) == config
    config.save_pretrained(tmp_path)
    assert MeftConfig.from_pretrained(tmp_path) == config
    model_of(method).save_pretrained(tmp_path / "model")
    assert MeftConfig.from_pretrained(tmp_path / "model").reduction_factor == 4


def test_every_option_is_documented():
    for config in CONFIGS.values():
        for field in dataclasses.fields(config):
            assert len(field.metadata["help"]) > 20, (config, field.name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor must be a positive integer, got 0"),
        ({"reduction_factor": -8}, "got -8"),
        ({"reduction_factor": 2.0}, "got 2.0"),
        ({"reduction_factor": True}, "got True"),
        ({"reduction_factor": "8"}, "got '8'"),
        ({"adapter_dim": 0}, "adapter_dim must be a positive integer"),
        ({"layers": []}, "layers must be None or a non-empty list"),
        ({"layers": 3}, "layers must be None or a non-empty list"),
        ({"layers": [0, 1]}, "every entry of layers must be a positive integer, got 0"),
        ({"layers": [2, 2]}, "without repeats"),
        ({"layers": [3, 1]}, "increasing order"),
        (
            {"max_frames": "full"},
            "max_frames must be 'fidelity', 'longest' or a positive integer, got 'full'",
        ),
        ({"max_frames": 0}, "max_frames must be a positive integer, got 0"),
        ({"max_frames": None}, "max_frames must be a positive integer, got None"),
        ({"backbone_dtype": "int8"}, "backbone_dtype must be one of"),
        ({"rank": 8}, "'rank' is not an option of lst, accepted are"),
        ({"method": "ia3"}, "s2_lora, sherl, unipt, weighted_sum, got 'ia3'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError) as caught:
        MeftConfig.from_dict({"method": "lst", **options})
    assert message in str(caught.value)


def test_configs_of_the_wrong_kind():
    with pytest.raises(UserError, match="MeftConfig is a base class"):
        MeftConfig()
    with pytest.raises(UserError, match="UniPTConfig has method 'unipt', got options for 'lst'"):
        UniPTConfig.from_dict({"method": "lst"})
    with pytest.raises(UserError, match="must be a JSON object"):
        MeftConfig.from_dict([1])
    with pytest.raises(TypeError):
        SHERLConfig(layers=[1])


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LSTConfig(reduction_factor=33), {}, "reduction_factor must be at most 32"),
        (UniPTConfig(layers=[1, 4]), {}, r"layers must lie in 1\.\.3"),
        (LSTConfig(max_frames=25), {}, "max_frames must be at most 24"),
        (SHERLConfig(), {"encoder_layers": 1}, "at least 2 layers"),
    ],
)
def test_options_that_do_not_fit_the_backbone(config, changes, message):
    with pytest.raises(UserError, match=message):
        get_meft_model(tiny_whisper(**changes), config)


def test_get_meft_model_checks_its_arguments():
    with pytest.raises(
        UserError, match="base must be a WhisperForAudioClassification or a WhisperFor.*, got Linear"
    ):
        get_meft_model(torch.nn.Linear(2, 2), LSTConfig())
    with pytest.raises(UserError, match="config must be LSTConfig"):
        get_meft_model(tiny_whisper(), {"method": "lst"})
    with pytest.raises(UserError, match="base must be .*, got NoneType: a config alone makes no model"):
        AutoModelForAudioClassification.from_config(model_of("lst").config)


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("method", METHODS)
def test_what_asks_for_gradients_in_vain_is_told_of_once(method, caplog):
    warn_once.cache_clear()
    model = model_of(method).train()
    features, labels = batch()
    model.encoder.layers[-1].fc1.weight.requires_grad_()  # SHERL's gradient crosses it
    model(features, labels=labels)
    assert ("would train" in caplog.text) == (method != "sherl")
    caplog.clear()
    model.encoder.layers[0].fc1.weight.requires_grad_()
    model.eval()(features)
    assert not caplog.text
    model.train()
    for _ in range(2):
        model(features, labels=labels).loss.backward()
    (told,) = caplog.records
    assert "encoder.layers.0.fc1.weight" in told.message and f"{method} runs the encoder" in told.message
    assert model.encoder.layers[0].fc1.weight.grad is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_frames", ["fidelity", "longest", 20])
def test_every_trainable_parameter_gets_a_gradient_and_no_other(method, max_frames):
    model = model_of(method, max_frames=max_frames)
    features, labels = batch()
    model(features, attention_mask=mel_mask([48, 30, 11, 2], 48), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        own = not name.startswith("encoder.")
        assert parameter.requires_grad == own, name
        assert (parameter.grad is not None) == own, name
        assert parameter.dtype == torch.float32
        # Softmax does not see a shift: the bias of UniPT's confidence has no influence.
        if own and name != "side_network.gate.bias":
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_keys(method):
    model = model_of(method)
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"side_network", "projector", "classifier", "encoder"}
    encoder = {n.removeprefix("encoder.") for n in model.state_dict() if n.startswith("encoder.")}
    assert encoder == set(tiny_whisper().encoder.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_forward_is_side_network_then_mean_then_head(method):
    """Put together by hand from the states that Hugging Face gives, with the projector before the mean."""
    model = model_of(method).double()
    whisper = tiny_whisper(0, dtype=torch.float64).eval()
    features, labels = batch(dtype=torch.float64)
    raw = []
    for layer in whisper.encoder.layers:
        layer.register_forward_hook(lambda m, args, output: raw.append(output))
    with torch.no_grad():
        embedding = whisper.encoder(features, output_hidden_states=True).hidden_states[0]
        states = [embedding, *raw]
        final = model.side_network(states)
        if method == "sherl":
            final = whisper.encoder.layer_norm(whisper.encoder.layers[-1](final, None))
        logits = model.classifier(model.projector(final).mean(1))
        output = model(features, labels=labels)
    torch.testing.assert_close(output.logits, logits, rtol=1e-10, atol=1e-10)
    loss = -torch.log_softmax(logits, -1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_frames", ["longest", 20])
def test_a_clip_does_not_depend_on_its_neighbours(method, max_frames):
    model = model_of(method, max_frames=max_frames).double()
    features, labels = batch(dtype=torch.float64)
    frames = [48, 29, 12, 2]
    together = scores(model, features, attention_mask=mel_mask(frames, 48))
    for i, length in enumerate(frames):
        length += length % 2  # up to the end of the last encoder frame
        alone = scores(model, features[i : i + 1, :, :length], attention_mask=mel_mask([frames[i]], length))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(scores(model, features), together)


@pytest.mark.parametrize("method", METHODS)
def test_fidelity_ignores_the_mask_and_needs_the_whole_window(method):
    model = model_of(method)
    features, _ = batch()
    assert torch.equal(scores(model), scores(model, attention_mask=mel_mask([48, 29, 12, 2], 48)))
    with pytest.raises(UserError, match="must have 48 frames"):
        model(features[..., :40])


def test_a_number_of_frames_cuts_longer_clips():
    model = model_of("lst", max_frames=10)
    features, _ = batch()
    other = features.clone()
    other[..., 20:] = 100
    assert torch.equal(scores(model, features), scores(model, other))
    mask = mel_mask([48, 30, 12, 2], 48)
    cut = scores(model, features[..., :20], attention_mask=mask[:, :20])
    assert torch.equal(scores(model, features, attention_mask=mask), cut)


def test_a_clip_without_sound_is_finite():
    model = model_of("unipt", max_frames="longest")
    features, labels = batch()
    output = model(features, attention_mask=mel_mask([48, 0, 0, 0], 48), labels=labels)
    assert torch.isfinite(output.logits).all() and torch.isfinite(output.loss)


def test_stops_at_the_last_layer_it_taps():
    model = model_of("lst", layers=[1])
    calls = []
    for i, layer in enumerate(model.encoder.layers):
        layer.fc1.register_forward_hook(lambda *_, i=i: calls.append(i))
    scores(model)
    assert calls == [0]


def test_loss_with_num_items_in_batch_and_skipped_labels():
    model = model_of("lst").eval()
    features, labels = batch()
    per_clip = torch.nn.functional.cross_entropy(scores(model), labels, reduction="none")
    torch.testing.assert_close(model(features, labels=labels).loss, per_clip.mean())
    for items in (8, torch.tensor(8)):
        loss = model(features, labels=labels, num_items_in_batch=items).loss
        torch.testing.assert_close(loss, per_clip.sum() / 8)
    labels[0] = -100
    torch.testing.assert_close(model(features, labels=labels).loss, per_clip[1:].mean())


def test_tuple_output():
    model = model_of("lst")
    features, labels = batch()
    loss, logits = model(features, labels=labels, return_dict=False)
    assert torch.equal(logits, model(features).logits) and loss.ndim == 0
    assert len(model(features, return_dict=False)) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"labels": torch.tensor([0, 1, 2, CLASSES])},
            r"labels must lie in 0\.\.2, the model has 3 labels, got 3",
        ),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "got -1"),
        ({"labels": torch.tensor([0, 1])}, "labels must be 4 class numbers"),
        ({"labels": torch.zeros(4)}, "labels must be 4 class numbers"),
        ({"attention_mask": torch.ones(4, 47)}, r"attention_mask must have shape \(4, 48\)"),
    ],
)
def test_bad_inputs_are_named(inputs, message):
    with pytest.raises(UserError, match=message):
        model_of("lst", max_frames="longest")(batch()[0], **inputs)


# ---------------------------------------------------------------- number formats, copies, fake tensors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_frames", ["fidelity", "longest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbone_keeps_float32_masters(method, max_frames, dtype):
    exact = model_of(method, max_frames=max_frames)
    config = CONFIGS[method](reduction_factor=4, max_frames=max_frames)
    model = randomise(get_meft_model(tiny_whisper(dtype=dtype), config))
    features, labels = batch()
    mask = mel_mask([48, 29, 12, 2], 48)
    for parameter in model.encoder.parameters():
        assert parameter.dtype == dtype
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            output = model(features, attention_mask=mask, labels=labels)
        output.loss.backward()
        assert output.logits.dtype == output.loss.dtype == torch.float32
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == parameter.grad.dtype == torch.float32, name
                assert torch.isfinite(parameter.grad).all(), name
        expected = scores(exact, attention_mask=mask)
        assert (output.logits - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_frames", ["fidelity", "longest"])
def test_compiles_into_one_graph(method, max_frames):
    model = model_of(method, max_frames=max_frames)
    features, labels = batch()
    inputs = {"attention_mask": mel_mask([48, 29, 12, 2], 48), "labels": labels}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = compiled(features, **inputs).loss
    loss.backward()
    gradient = model.classifier.weight.grad.clone()
    model.zero_grad()
    expected = model(features, **inputs).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, model.classifier.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_whole_model_in_another_format(dtype):
    model = model_of("sherl").to(dtype)
    features, labels = batch()
    output = model(features, labels=labels)
    output.loss.backward()
    assert output.logits.dtype == dtype and all(p.grad.dtype == dtype for p in model.classifier.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_deepcopy_and_pickle(method):
    model = model_of(method)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(scores(other), scores(model))
        next(other.side_network.parameters()).data += 1
        assert not torch.equal(scores(other), scores(model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_building_and_a_training_step_with_fake_tensors(method, dtype):
    with FakeTensorMode():
        config = CONFIGS[method](reduction_factor=4, max_frames="longest", backbone_dtype=dtype)
        model = get_meft_model(tiny_whisper(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            output = model(
                torch.zeros(2, MELS, 2 * WINDOW),
                attention_mask=torch.ones(2, 2 * WINDOW),
                labels=torch.zeros(2, dtype=torch.long),
            )
        output.loss.backward()
        optimizer.step()
        assert output.logits.shape == (2, CLASSES)
        assert model.classifier.weight.grad.shape == model.classifier.weight.shape


def test_two_models_share_one_backbone():
    whisper = tiny_whisper()
    first, second = (get_meft_model(whisper, CONFIGS[m](reduction_factor=4)) for m in ("lst", "sherl"))
    assert first.encoder.layers is second.encoder.layers
    assert first.classifier is not second.classifier


def test_the_head_starts_as_the_base_models():
    whisper = tiny_whisper()
    model = get_meft_model(whisper, LSTConfig(reduction_factor=4))
    assert torch.equal(model.projector.weight, whisper.projector.weight)
    assert torch.equal(model.classifier.bias, whisper.classifier.bias)
    model.classifier.weight.data += 1
    assert not torch.equal(model.classifier.weight, whisper.classifier.weight)


# ---------------------------------------------------------------- PEFT's habits


def test_trainable_parameters_as_peft_prints_them(capsys):
    model = model_of("unipt")
    trainable = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("encoder."))
    total = sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == (trainable, total)
    model.print_trainable_parameters()
    share = f"{100 * trainable / total:.4f}"
    line = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share}\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_refused_with_the_reason(method):
    with pytest.raises(UserError, match=f"a {method} side network cannot be merged .* beside the backbone"):
        model_of(method).merge_and_unload()


def test_trainer_sees_labels_and_mask():
    signature = inspect.signature(MeftModel.forward).parameters
    assert {"input_features", "attention_mask", "labels"} <= set(signature)


# ---------------------------------------------------------------- saving and loading


@pytest.fixture
def backbone_folder(tmp_path) -> Path:
    """An ordinary Whisper folder: encoder and decoder, as on the hub."""
    torch.manual_seed(7)
    whisper = tiny_whisper(7)
    full = WhisperForConditionalGeneration._from_config(whisper.config)
    full.model.encoder.load_state_dict(whisper.encoder.state_dict())
    full.save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper"


def saved_model(backbone_folder, folder, method="lst", **options) -> MeftModel:
    base = load_backbone(backbone_folder)
    base.config.id2label = {0: "Ji-Lu", 1: "Jiang-Huai"}
    base.config.label2id = {"Ji-Lu": 0, "Jiang-Huai": 1}
    base.classifier = torch.nn.Linear(10, 2)
    model = randomise(get_meft_model(base, CONFIGS[method](reduction_factor=4, **options)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(method, backbone_folder, tmp_path, capfd):
    folder = tmp_path / "out"
    model = saved_model(backbone_folder, folder, method, max_frames=20)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert set(tensors) == {n for n, p in model.named_parameters() if p.requires_grad}
    config = json.loads((folder / "config.json").read_text())
    assert config["meft"]["method"] == method and config["id2label"]["1"] == "Jiang-Huai"
    assert config["base_model_name_or_path"] == str(backbone_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = MeftModel.from_pretrained(folder)
    assert not loaded.training and loaded.config.label2id == {"Ji-Lu": 0, "Jiang-Huai": 1}
    assert loaded.meft_config == MeftConfig.from_dict(config["meft"])
    assert torch.equal(scores(loaded), scores(model))
    assert capfd.readouterr() == ("", "")  # neither loading reports nor progress bars
    auto = AutoModelForAudioClassification.from_pretrained(folder)
    assert torch.equal(scores(auto), scores(model))


def test_self_contained_folder_can_be_moved(backbone_folder, tmp_path):
    model = saved_model(backbone_folder, tmp_path / "out")
    model.save_pretrained(tmp_path / "all", save_backbone=True)
    shutil.rmtree(backbone_folder)
    (tmp_path / "all").rename(tmp_path / "moved")
    loaded = MeftModel.from_pretrained(tmp_path / "moved")
    assert torch.equal(scores(loaded), scores(model))
    # Saved again into the same folder it still refers to the backbone relatively, elsewhere absolutely.
    loaded.save_pretrained(tmp_path / "moved")
    assert json.loads((tmp_path / "moved/config.json").read_text())["base_model_name_or_path"] == "backbone"
    loaded.save_pretrained(tmp_path / "other")
    assert torch.equal(scores(MeftModel.from_pretrained(tmp_path / "other")), scores(model))


def test_a_relative_backbone_is_relative_to_the_saved_folder(backbone_folder, tmp_path, monkeypatch):
    model = saved_model(backbone_folder, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["base_model_name_or_path"] = "../whisper"
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    monkeypatch.chdir("/")
    assert torch.equal(scores(MeftModel.from_pretrained(tmp_path / "out")), scores(model))


def test_a_shipped_backbone_is_named_without_its_path(backbone_folder, tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    assets.mkdir()
    backbone_folder.rename(assets / "tiny-one")
    monkeypatch.setattr("whisper_meft.model.backbone.ASSETS", assets)
    assert resolve_backbone("tiny-one") == str(assets / "tiny-one")
    model = saved_model("tiny-one", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["base_model_name_or_path"] == "tiny-one"
    assert torch.equal(scores(MeftModel.from_pretrained(tmp_path / "out")), scores(model))


def test_backbone_dtype_is_remembered_and_can_be_changed(backbone_folder, tmp_path):
    model = saved_model(backbone_folder, tmp_path / "out", backbone_dtype="bfloat16")
    loaded = MeftModel.from_pretrained(tmp_path / "out")
    assert loaded.encoder.dtype == torch.bfloat16 and loaded.projector.weight.dtype == torch.float32
    assert torch.equal(scores(loaded), scores(model))
    for dtype in ("float32", torch.float32):
        assert MeftModel.from_pretrained(tmp_path / "out", dtype=dtype).encoder.dtype == torch.float32
    with pytest.raises(UserError, match="dtype must be one of"):
        MeftModel.from_pretrained(tmp_path / "out", dtype="half")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_passes_through(attention, backbone_folder, tmp_path):
    model = saved_model(backbone_folder, tmp_path / "out")
    loaded = MeftModel.from_pretrained(tmp_path / "out", attn_implementation=attention)
    assert loaded.encoder.layers[0].self_attn.config._attn_implementation == attention
    torch.testing.assert_close(scores(loaded), scores(model), rtol=1e-4, atol=1e-4)


def test_a_given_backbone(backbone_folder, tmp_path):
    model = saved_model(backbone_folder, tmp_path / "out")
    copied = shutil.copytree(backbone_folder, tmp_path / "copy")
    shutil.rmtree(backbone_folder)
    with pytest.raises(UserError, match="backbone: there is no folder .*backbone=") as caught:
        MeftModel.from_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value)
    loaded = MeftModel.from_pretrained(tmp_path / "out", backbone=copied)
    assert torch.equal(scores(loaded), scores(model))
    base = load_backbone(copied, dtype=torch.bfloat16)
    loaded = MeftModel.from_pretrained(tmp_path / "out", backbone=base)
    assert loaded.encoder.layers is base.encoder.layers and loaded.encoder.dtype == torch.bfloat16


def test_another_backbone_is_noticed(backbone_folder, tmp_path):
    saved_model(backbone_folder, tmp_path / "out")
    with pytest.warns(UserWarning, match="has other weights than the one"):
        MeftModel.from_pretrained(tmp_path / "out", backbone=tiny_whisper(8))
    with pytest.raises(UserError, match="num_mel_bins is 16 where 12 is needed"):
        MeftModel.from_pretrained(tmp_path / "out", backbone=tiny_whisper(num_mel_bins=16))
    with pytest.raises(UserError, match="hidden_size is 16 where 32 .*num_hidden_layers is 2 where 3"):
        MeftModel.from_pretrained(tmp_path / "out", backbone=tiny_whisper(d_model=16, encoder_layers=2))


def test_fingerprint_survives_rounding_and_notices_training():
    encoder = tiny_whisper().encoder
    saved = fingerprint(encoder)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert same_backbone(copy.deepcopy(encoder).to(dtype), saved)
    assert not same_backbone(randomise(copy.deepcopy(encoder), std=0.005), saved)
    assert not same_backbone(encoder, "no hexadecimal") and not same_backbone(encoder, "00")


def corrupt(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"\xff" * len(content))


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_files_are_named(file, how, backbone_folder, tmp_path):
    saved_model(backbone_folder, tmp_path / "out")
    corrupt(tmp_path / "out" / file, how)
    with pytest.raises(UserError) as caught:
        MeftModel.from_pretrained(tmp_path / "out")
    assert str(tmp_path / "out" / file) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_backbone_is_named(backbone_folder, tmp_path):
    saved_model(backbone_folder, tmp_path / "out")
    corrupt(backbone_folder / "model.safetensors", "truncated")
    with pytest.raises(UserError, match=str(backbone_folder)):
        MeftModel.from_pretrained(tmp_path / "out")


def test_weights_that_do_not_fit_are_named(backbone_folder, tmp_path):
    saved_model(backbone_folder, tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for change, message in [
        ({"classifier.bias": None}, "classifier.bias missing"),
        ({"surplus": torch.zeros(1)}, "surplus unknown"),
        ({"classifier.bias": torch.zeros(9)}, r"classifier.bias has shape \(9,\) instead of \(2,\)"),
    ]:
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        safetensors.torch.save_file(changed, path)
        with pytest.raises(UserError, match=message):
            MeftModel.from_pretrained(tmp_path / "out")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_pickled_weights_cannot_run_code(backbone_folder, tmp_path, monkeypatch):
    model = saved_model(backbone_folder, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    (tmp_path / "out/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "out/pytorch_model.bin")
    assert torch.equal(scores(MeftModel.from_pretrained(tmp_path / "out")), scores(model))
    torch.save(tensors | {"more": Evil()}, tmp_path / "out/pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin"):
        MeftModel.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


def test_folders_that_are_no_saved_models(backbone_folder, tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        MeftModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no config.json"):
        MeftModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a whisper model, not a side network; .* convert"):
        MeftModel.from_pretrained(backbone_folder)
    with pytest.raises(UserError, match="is a file"):
        MeftModel.from_pretrained(backbone_folder / "config.json")
    saved_model(backbone_folder, tmp_path / "out")
    with pytest.raises(UserError, match="unknown arguments: devicemap"):
        MeftModel.from_pretrained(tmp_path / "out", devicemap="auto")
    with pytest.raises(UserError, match="backbone: there is no folder .*nowhere"):
        MeftModel.from_pretrained(tmp_path / "out", backbone=tmp_path / "nowhere")
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        MeftModel.from_pretrained(tmp_path / "out")


def test_a_backbone_without_a_name_needs_one(tmp_path):
    model_of("lst").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not name its backbone"):
        MeftModel.from_pretrained(tmp_path)
    assert MeftModel.from_pretrained(tmp_path, backbone=tiny_whisper()).meft_config.method == "lst"


def test_a_failed_save_leaves_the_old_files(backbone_folder, tmp_path, monkeypatch):
    model = saved_model(backbone_folder, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def half(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(whisper_meft.model.saving.safetensors.torch, "save_file", half)
    model.classifier.weight.data += 1
    with pytest.raises(UserError, match="cannot write .*model.safetensors: disk full"):
        model.save_pretrained(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_save_uses_the_given_state_dict_and_main_process(tmp_path):
    model = model_of("lst")
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    state = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "ones", state_dict=state)
    tensors = safetensors.torch.load_file(tmp_path / "ones/model.safetensors")
    assert all((v == 1).all() for v in tensors.values()) and not any(k.startswith("encoder") for k in tensors)


def test_model_card(backbone_folder, tmp_path):
    model = saved_model(backbone_folder, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n") and "audio-classification" in card and "Ji-Lu, Jiang-Huai" in card
    (tmp_path / "out/README.md").write_text("mine")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == "mine"


def test_push_to_hub(backbone_folder, tmp_path, monkeypatch):
    model = saved_model(backbone_folder, tmp_path / "out")
    uploads = []

    class Hub:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **_):
            uploads.append((repo_id, self.token, sorted(os.listdir(folder_path))))

    monkeypatch.setattr(whisper_meft.model.saving, "HfApi", Hub)
    for name in (model.config.base_model_name_or_path, str(tmp_path / "moved away"), "~/moved away"):
        model.config.base_model_name_or_path = name
        with pytest.raises(UserError, match="is not on the model hub"):
            model.push_to_hub("dialects")
    model.push_to_hub("dialects", save_backbone=True, token="t")
    model.config.base_model_name_or_path = "openai/whisper-small"
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    files = ["README.md", "config.json", "model.safetensors"]
    assert uploads == [("me/dialects", "t", sorted([*files, "backbone"])), ("me/named", None, files)]


def test_saving_uploads_what_is_saved_and_as_is_said(backbone_folder, tmp_path, monkeypatch):
    model = saved_model(backbone_folder, tmp_path / "out")
    model.config.base_model_name_or_path = "openai/whisper-small"
    told = {}

    class Hub:
        def __init__(self, token=None):
            told["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            told["private"] = private
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **options):
            told.update(options, weights=(Path(folder_path) / "model.safetensors").read_bytes())

    monkeypatch.setattr(whisper_meft.model.saving, "HfApi", Hub)
    options = {"repo_id": "me/ours", "private": True, "token": "t", "revision": "mine", "create_pr": True}
    options["commit_message"] = "Ours"
    ones = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "new", state_dict=ones, push_to_hub=True, **options)
    assert told == options | {"weights": (tmp_path / "new/model.safetensors").read_bytes()}


def test_audio_classification_pipeline(backbone_folder, tmp_path):
    model = saved_model(backbone_folder, tmp_path / "out").eval()
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=0.48, n_fft=400, hop_length=160)
    classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
    wave = np.random.default_rng(0).standard_normal(7680).astype(np.float32)
    answer = classify({"raw": wave, "sampling_rate": 16000})
    features = extractor(wave, sampling_rate=16000, return_tensors="pt").input_features
    expected = scores(model, features).softmax(-1)[0]
    assert {a["label"]: pytest.approx(a["score"], abs=1e-5) for a in answer} == {
        "Ji-Lu": expected[0].item(),
        "Jiang-Huai": expected[1].item(),
    }
