"""Checkpoints of the published code: the same scores and gradients, there and back.

``published_logits`` computes the formulas of the paper's code from its own tensor names and Hugging Face's
encoder, in double precision, with nothing of this library.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from modelling_fixtures import CLASSES, LAYERS, WIDTH, WINDOW, batch, tiny_whisper
from torch.nn.functional import gelu, layer_norm, linear, relu
from transformers import WhisperFeatureExtractor, WhisperForAudioClassification
from whisper_meft import MeftModel, UniPTConfig, UserError, get_meft_model
from whisper_meft.model.published import convert, to_published

SIDE, ADAPTER = 8, 20  # reduction factor 4
METHODS = ["lst", "unipt", "sherl"]


# ------------------------------------------------- the published computation, written from its formulas


def hidden_states(whisper, features):
    """h_0 to h_L before the final LayerNorm, from Hugging Face's encoder."""
    raw = []
    hooks = [
        layer.register_forward_hook(lambda m, args, output: raw.append(output))
        for layer in whisper.encoder.layers
    ]
    with torch.no_grad():
        embedding = whisper.encoder(features, output_hidden_states=True).hidden_states[0]
    for hook in hooks:
        hook.remove()
    return [embedding, *raw]


def affine(x, t, name):
    return linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def normed(x, t, name):
    return layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)


def norm_affine(x, t, name):
    return affine(normed(x, t, f"{name}.0"), t, f"{name}.1")


def lst_final(h, t):
    s = norm_affine(h[0], t, "encoder.first_downsample")
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}"
        u = torch.sigmoid(t[f"{layer}.gate_param"] / 0.1)
        m = u * s + (1 - u) * norm_affine(h[i + 1], t, f"{layer}.side_downsample")
        block = f"{layer}.LST_block"
        s = m + affine(
            gelu(affine(normed(m, t, f"{block}.norm"), t, f"{block}.linear_1")), t, f"{block}.linear_2"
        )
    return normed(norm_affine(s, t, "encoder.final_upsample"), t, "encoder.layer_norm_LST")


def unipt_final(h, t):
    f = [norm_affine(h[0], t, "encoder.side_downsample0_encoder")]
    f += [norm_affine(h[i + 1], t, f"encoder.side_downsamples_encoder.{i}") for i in range(LAYERS)]
    a = f[-1]
    merged, confidence = [], []
    for x in f[:-1]:
        r = relu(torch.einsum("bsr,btr->bst", a, x))
        merged.append(torch.einsum("bst,btr->bsr", r / (r.sum(-1, keepdim=True) + 1e-7), x) + x)
        confidence.append(affine(a.mean(1) * x.mean(1), t, "encoder.side_gate_layer_encoder"))
    weights = torch.softmax(torch.cat(confidence, 1), 1)
    g = sum(weights[:, i, None, None] * m for i, m in enumerate(merged))
    p = "encoder.side_projection_encoder"
    z = a + affine(gelu(affine(normed(g, t, f"{p}.0"), t, f"{p}.1")), t, f"{p}.3")
    up = affine(relu(normed(z, t, "encoder.side_upsample.0")), t, "encoder.side_upsample.2")
    return normed(up, t, "encoder.layer_norm_unipt_encoder")


def sherl_final(h, t, whisper):
    block = "encoder.side_block"
    z = []
    for i in range(LAYERS):
        p = relu(affine(h[i], t, f"{block}.hor_block.{i}.fc1"))
        inner = affine(p, t, f"{block}.hor_block.{i}.fc2") + p
        z.append(inner * torch.sigmoid(affine(p, t, f"{block}.hor_block.{i}.fc3")))
    shallow, deep = torch.stack(z[:-1]), z[-1]  # [K, B, T, r]
    n = shallow / (shallow.pow(2).sum(-1, keepdim=True).sqrt() + 1e-6)
    rho = relu(torch.einsum("jbtr,kbtr->jkbt", n, n)).sum(1)
    e = relu(affine(shallow * deep, t, f"{block}.guide_block.fc_attn"))[..., 0] / rho
    alpha = e / (e.abs().sum(0) + 1e-6)
    y = (alpha[..., None] * shallow).sum(0) + deep
    x = affine(relu(y), t, f"{block}.fc_out") + torch.tanh(t[f"{block}.gate_params"] / 0.1) * h[LAYERS - 1]
    return whisper.encoder.layer_norm(whisper.encoder.layers[-1](x, None))


def published_logits(method, t, whisper, features):
    h = hidden_states(whisper, features)
    final = (
        {"lst": lst_final, "unipt": unipt_final}[method](h, t)
        if method != "sherl"
        else sherl_final(h, t, whisper)
    )
    return affine(affine(final, t, "projector").mean(1), t, "classifier")


# ------------------------------------------------- checkpoints as the published code writes them


def side_shapes(method) -> dict[str, tuple[int, ...]]:
    d, r = WIDTH, SIDE
    shapes = {}

    def put(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def norm(name, size):
        put(name, size)

    e = "encoder"
    if method == "lst":
        for name in (f"{e}.first_downsample", *(f"{e}.layers.{i}.side_downsample" for i in range(LAYERS))):
            norm(f"{name}.0", d), put(f"{name}.1", r, d)
        for i in range(LAYERS):
            block = f"{e}.layers.{i}.LST_block"
            (
                norm(f"{block}.norm", r),
                put(f"{block}.linear_1", ADAPTER, r),
                put(f"{block}.linear_2", r, ADAPTER),
            )
            shapes[f"{e}.layers.{i}.gate_param"] = (1,)
        norm(f"{e}.final_upsample.0", r), put(f"{e}.final_upsample.1", d, r), norm(f"{e}.layer_norm_LST", d)
    elif method == "unipt":
        downs = [
            f"{e}.side_downsample0_encoder",
            *(f"{e}.side_downsamples_encoder.{i}" for i in range(LAYERS)),
        ]
        for name in downs:
            norm(f"{name}.0", d), put(f"{name}.1", r, d)
        put(f"{e}.side_gate_layer_encoder", 1, r)
        p = f"{e}.side_projection_encoder"
        norm(f"{p}.0", r), put(f"{p}.1", d, r), put(f"{p}.3", r, d)
        norm(f"{e}.side_upsample.0", r), put(f"{e}.side_upsample.2", d, r)
        norm(f"{e}.layer_norm_unipt_encoder", d)
    else:
        for i in range(LAYERS):
            hor = f"{e}.side_block.hor_block.{i}"
            put(f"{hor}.fc1", r, d), put(f"{hor}.fc2", r, r), put(f"{hor}.fc3", r, r)
        put(f"{e}.side_block.guide_block.fc_attn", 1, r), put(f"{e}.side_block.fc_out", d, r)
        shapes[f"{e}.side_block.gate_params"] = (1,)
    put("projector", 10, d), put("classifier", CLASSES, 10)
    return shapes


def side_tensors(method, seed=5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Away from zero, so that every term counts; small gates, so that none of them saturates.
    scale = {"gate_param": 0.05, "gate_params": 0.05}
    return {
        name: scale.get(name.rsplit(".", 1)[1], 0.25) * torch.randn(shape, generator=generator)
        + (1 if name.endswith("weight") and len(shape) == 1 else 0)
        for name, shape in side_shapes(method).items()
    }


def write_checkpoint(folder, method, form="safetensors", backbone=True, side=None):
    """A folder as the published script's Trainer leaves it; returns (side tensors, the Whisper beneath)."""
    whisper = tiny_whisper(11)
    side = side_tensors(method) if side is None else side
    tensors = dict(side)
    if backbone:
        tensors |= {f"encoder.{name}": value for name, value in whisper.encoder.state_dict().items()}
    folder.mkdir(parents=True)
    config = whisper.config.to_dict() | {
        "_name_or_path": "openai/whisper-small",
        "architectures": ["WhisperForAudioClassification"],
        "torch_dtype": "float32",
        "transformers_version": "4.47.0",
        "use_weighted_layer_sum": False,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        weight_map = {}
        for k in range(2):
            shard = f"model-{k + 1:05d}-of-00002.safetensors"
            part = {name: tensors[name] for name in names[k::2]}
            safetensors.torch.save_file(part, folder / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return side, whisper.eval()


def gradients_under_published_names(model, folder):
    """The model's gradients, sent through ``to_published`` in place of its parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    model.save_pretrained(folder / "gradients", save_backbone=True)
    to_published(folder / "gradients", folder / "gradients-published")
    return safetensors.torch.load_file(folder / "gradients-published/model.safetensors")


@pytest.mark.filterwarnings("ignore:the published code has")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_scores_and_gradients_equal_the_published_computation(method, form, tmp_path):
    side, whisper = write_checkpoint(tmp_path / "published", method, form)
    features, _ = batch()
    upstream = torch.randn(4, CLASSES)
    truth = {name: value.double().requires_grad_() for name, value in side.items()}
    logits = published_logits(method, truth, whisper.double(), features.double())
    (logits * upstream).sum().backward()

    convert(tmp_path / "published", tmp_path / "ours")
    shutil.rmtree(tmp_path / "published")  # the result is self-contained
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        model = MeftModel.from_pretrained(tmp_path / "ours").to(dtype)
        assert model.meft_config.method == method and model.meft_config.reduction_factor == 4
        if method == "lst":
            assert model.meft_config.adapter_dim == ADAPTER
        output = model(features.to(dtype)).logits
        torch.testing.assert_close(output.double(), logits.detach(), rtol=tolerance, atol=tolerance)
        (output * upstream).sum().backward()
        found = gradients_under_published_names(model, tmp_path / str(dtype))
        for name, tensor in truth.items():
            size = tensor.grad.abs().max()
            if name == "encoder.side_gate_layer_encoder.bias":  # a softmax does not see a shift
                assert size < 1e-12 and found[name].abs().max() < tolerance
                continue
            assert size > 1e-4, name
            # 1e-6: the gradients travel through float32 files.
            assert (found[name].double() - tensor.grad).abs().max() <= max(tolerance, 1e-6) * size, name


@pytest.mark.filterwarnings("ignore:the published code has")
@pytest.mark.parametrize("method", METHODS)
def test_there_and_back_is_the_identity(method, tmp_path):
    side, whisper = write_checkpoint(tmp_path / "published", method)
    convert(tmp_path / "published", tmp_path / "ours", method=method)
    to_published(tmp_path / "ours", tmp_path / "back")
    before = safetensors.torch.load_file(tmp_path / "published/model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with safetensors.safe_open(tmp_path / "back/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4.47 refuses files without
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("published", "back")]
    for key in ("model_type", "d_model", "classifier_proj_size", "id2label", "architectures", "num_mel_bins"):
        assert configs[0][key] == configs[1][key]
    # The stock class loads what it knows: the encoder and the head.
    stock = WhisperForAudioClassification.from_pretrained(tmp_path / "back")
    assert torch.equal(stock.classifier.weight, side["classifier.weight"])
    assert torch.equal(stock.encoder.layers[1].fc1.weight, whisper.encoder.layers[1].fc1.weight)


def test_a_named_backbone_is_referred_to(tmp_path):
    whisper = tiny_whisper(11)
    whisper.save_pretrained(tmp_path / "whisper")
    for with_backbone in (False, True):
        src, dst = tmp_path / f"src{with_backbone}", tmp_path / f"dst{with_backbone}"
        write_checkpoint(src, "unipt", backbone=with_backbone)
        convert(src, dst, backbone=tmp_path / "whisper")
        assert not (dst / "backbone").exists()
        assert json.loads((dst / "config.json").read_text())["base_model_name_or_path"] == str(
            tmp_path / "whisper"
        )
    write_checkpoint(tmp_path / "own", "unipt")
    convert(tmp_path / "own", tmp_path / "self-contained")
    features, _ = batch()
    with torch.no_grad():
        first, second, third = (
            MeftModel.from_pretrained(tmp_path / f)(features).logits
            for f in ("dstFalse", "dstTrue", "self-contained")
        )
    assert torch.equal(first, second) and torch.equal(first, third)
    tiny_whisper(12).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has other weights than the one in"):
        convert(tmp_path / "own", tmp_path / "fails", backbone=tmp_path / "other")
    tiny_whisper(12, d_model=16, encoder_layers=2).save_pretrained(tmp_path / "smaller")
    tiny_whisper(12, num_mel_bins=13).save_pretrained(tmp_path / "other_mel")
    for name, message in (
        ("smaller", "hidden_size is 16 where 32 is needed, num_hidden_layers is 2 where 3 is needed"),
        ("other_mel", "num_mel_bins is 13 where 12 is needed"),
    ):
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "srcFalse", tmp_path / "fails", backbone=tmp_path / name)


def test_a_pickle_that_runs_code_is_refused_without_advice_to_run_it(tmp_path):
    write_checkpoint(tmp_path / "src", "lst")
    (tmp_path / "src/model.safetensors").unlink()
    (tmp_path / "src/pytorch_model.bin").write_bytes(pickle.dumps(Path("anything but tensors"), protocol=2))
    with pytest.raises(UserError, match="more than tensors, which could run code") as caught:
        convert(tmp_path / "src", tmp_path / "dst")
    assert "weights_only" not in str(caught.value)


def test_impossible_sizes_in_the_config_name_the_file(tmp_path):
    write_checkpoint(tmp_path / "src", "lst")
    config = json.loads((tmp_path / "src/config.json").read_text())
    (tmp_path / "src/config.json").write_text(json.dumps(config | {"d_model": -4}))
    with pytest.raises(UserError, match=r"config\.json cannot be used"):
        convert(tmp_path / "src", tmp_path / "dst")


def test_feature_extractor_is_written_or_copied(tmp_path):
    write_checkpoint(tmp_path / "published", "sherl")
    convert(tmp_path / "published", tmp_path / "ours")
    extractor = WhisperFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert extractor.feature_size == 12 and extractor.nb_max_frames == 2 * WINDOW
    (tmp_path / "published/preprocessor_config.json").write_text('{"feature_size": 12, "mine": 1}')
    convert(tmp_path / "published", tmp_path / "again")
    assert "mine" in (tmp_path / "again/preprocessor_config.json").read_text()


def test_sizes_that_the_published_code_cannot_have(tmp_path):
    write_checkpoint(tmp_path / "published", "lst")
    convert(tmp_path / "published", tmp_path / "ours")
    with pytest.warns(UserWarning, match="has reduction_factor 8, adapter_dim 256 written into it"):
        to_published(tmp_path / "ours", tmp_path / "back")
    model = get_meft_model(tiny_whisper(), UniPTConfig(layers=[1, 3]))
    model.save_pretrained(tmp_path / "some", save_backbone=True)
    with pytest.raises(UserError, match=r"taps the layers \[1, 3\]: the published code taps all"):
        to_published(tmp_path / "some", tmp_path / "fails")


def without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("lst", lambda t: without(t, "encoder.layers.1.gate_param"), "encoder.layers.1.gate_param missing"),
        (
            "lst",
            lambda t: without(t, "encoder.layers.0.LST_block.linear_1.weight"),
            "linear_1.weight missing",
        ),
        ("unipt", lambda t: without(t, "classifier.bias"), "classifier.bias missing"),
        ("sherl", lambda t: t | {"encoder.surplus": torch.zeros(1)}, "encoder.surplus unknown"),
        ("sherl", lambda t: t | {"layer_weights": torch.zeros(4)}, "layer_weights unknown"),
        (
            "unipt",
            lambda t: t | {"encoder.side_upsample.0.bias": torch.zeros(3)},
            "side_upsample.0.bias has shape",
        ),
        ("lst", lambda t: t | {"encoder.first_downsample.1.weight": torch.zeros(12, 32)}, "side width 12"),
        ("lst", lambda t: t | {"encoder.first_downsample.1.weight": torch.zeros(8)}, "should be a matrix"),
        ("lst", lambda t: without(t, "encoder.first_downsample.1.weight"), "one side network, found none"),
        ("lst", lambda t: t | side_tensors("unipt"), "one side network, found lst and unipt"),
    ],
)
def test_tensors_that_do_not_fit_are_named(method, change, message, tmp_path):
    write_checkpoint(tmp_path / "published", method, side=change(side_tensors(method)))
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "published", tmp_path / "ours")
    assert message in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_missing_backbone_tensors_are_named(tmp_path):
    write_checkpoint(tmp_path / "none", "lst", backbone=False)
    with pytest.raises(UserError, match="holds no backbone: name the one .*--backbone"):
        convert(tmp_path / "none", tmp_path / "ours")
    write_checkpoint(tmp_path / "some", "lst")
    path = tmp_path / "some/model.safetensors"
    safetensors.torch.save_file(without(safetensors.torch.load_file(path), "encoder.layers.2.fc1.bias"), path)
    with pytest.raises(UserError, match="encoder.layers.2.fc1.bias missing"):
        convert(tmp_path / "some", tmp_path / "ours")


def test_folders_that_cannot_be_converted(tmp_path):
    write_checkpoint(tmp_path / "published", "lst")
    cases = [
        ((tmp_path / "nowhere", tmp_path / "o"), {}, "there is no folder"),
        ((tmp_path / "published", tmp_path / "published"), {}, "would be overwritten"),
        ((tmp_path / "published", tmp_path / "published/config.json"), {}, "a folder is needed"),
        (
            (tmp_path / "published", tmp_path / "o"),
            {"method": "sherl"},
            "holds a lst side network, not sherl",
        ),
        (
            (tmp_path / "published", tmp_path / "o"),
            {"method": "lora"},
            "method must be one of lst, unipt, sherl",
        ),
    ]
    for folders, options, message in cases:
        with pytest.raises(UserError, match=message):
            convert(*folders, **options)
    convert(tmp_path / "published", tmp_path / "ours")
    with pytest.raises(UserError, match="saved model of this library already"):
        convert(tmp_path / "ours", tmp_path / "o")
    with pytest.raises(UserError, match="holds a whisper model, not a side network"):
        to_published(tmp_path / "published", tmp_path / "o")
    path = tmp_path / "published/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors, it is damaged"):
        convert(tmp_path / "published", tmp_path / "o")
    (tmp_path / "published/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="describes a bert model"):
        convert(tmp_path / "published", tmp_path / "o")
    shutil.copytree(tmp_path / "ours", tmp_path / "empty")
    (tmp_path / "empty/model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        to_published(tmp_path / "empty", tmp_path / "o")


@pytest.mark.parametrize("dst", [".", ".."])
@pytest.mark.parametrize(
    "turn, src", [(convert, "published"), (to_published, "ours"), (to_published, "on_the_hub/model")]
)
def test_the_folder_that_one_is_in_is_not_replaced(turn, src, dst, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "published", "lst")
    convert(tmp_path / "published", tmp_path / "ours")
    (tmp_path / "out" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "below")
    with pytest.raises(UserError, match="it is the folder that you are in, or above it"):
        turn(src if "/" in src else tmp_path / src, dst)
    assert list((tmp_path / "out").rglob("*")) == [tmp_path / "out" / "below"]


def test_weighted_layer_sum(tmp_path):
    for method in METHODS:
        folder = tmp_path / method
        write_checkpoint(
            folder, method, side=side_tensors(method) | {"layer_weights": torch.ones(LAYERS + 1)}
        )
        config = json.loads((folder / "config.json").read_text()) | {"use_weighted_layer_sum": True}
        (folder / "config.json").write_text(json.dumps(config))
        if method == "lst":  # the published LST discards the sum
            convert(folder, tmp_path / "ours")
            continue
        with pytest.raises(UserError, match="use_weighted_layer_sum"):
            convert(folder, tmp_path / "ours")
