"""The frozen backbone in 8 or 4 bits: near the original, remembered, never saved, refused where needed."""

import ctypes
import gc
import json
import shutil
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modelling_fixtures import CONFIGS, LAYERS, WIDTH, WINDOW, batch, randomise, tiny_whisper
from safetensors import safe_open
from training_fixtures import make_audio_folder, make_backbone, train_command
from transformers import WhisperFeatureExtractor
from whisper_meft import (
    FrozenEncoder,
    HeadConfig,
    LoRAConfig,
    LSTConfig,
    MeftModel,
    SHERLConfig,
    data,
    get_meft_model,
)
from whisper_meft.commands import cli
from whisper_meft.encoder import quantization
from whisper_meft.encoder.chunked import pooled_in_chunks
from whisper_meft.encoder.nf4 import NF4Linear
from whisper_meft.encoder.quantization import (
    REVISION,
    Int8Linear,
    is_quantized,
    multiplies_int8_exactly,
    nbytes,
    project,
)
from whisper_meft.encoder.sizes import whisper_config
from whisper_meft.errors import UserError
from whisper_meft.feature_cache.dataset import CachedCollator, CachedDataset
from whisper_meft.feature_cache.filling import prepare_cache
from whisper_meft.feature_cache.key import cache_key
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.files import write_json
from whisper_meft.memory.counting import estimate
from whisper_meft.model.backbone import load_backbone, set_labels
from whisper_meft.training.checkpoints import check_same_model

from meft_kernels import HiddenState, use_backend
from meft_kernels.int8_linear import int8_linear
from meft_kernels.reference.common import row_statistics

SIZES = {"encoder_ffn_dim": 64}
# Of the hidden states, relative to their root mean square: a scale per row of 8 bits, over a few layers; and
# sixteen levels, 9 % away from normal weights, in four blocks one after the other: twice that.
NEAR = {"int8": 0.03, "fp8": 0.06, "nf4": 0.18}
# What each kind is on this CPU.
SCHEMES = {"int8": "int8" if multiplies_int8_exactly() else "int8 weights", "fp8": "fp8 weights"}
SCHEMES["nf4"] = "nf4"
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")


def model_of(method, kind, seed=1, **options):
    config = CONFIGS[method](reduction_factor=2, backbone_quantization=kind, **options)
    torch.manual_seed(seed)
    return randomise(get_meft_model(tiny_whisper(**SIZES), config))


def gradients(model, features, labels, **more):
    model.zero_grad()
    model(features, labels=labels, **more).loss.backward()
    free = model.meft_config.without_gradient
    named = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad and n not in free]
    return torch.cat([grad.flatten() for _, grad in named])


@needs_torchao
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", NEAR)
def test_hidden_states_are_near_the_original_and_in_fewer_bytes(kind, dtype):
    features, _ = batch()
    exact = list(FrozenEncoder(tiny_whisper(**SIZES).encoder, dtype).stream(features))
    encoder = FrozenEncoder(tiny_whisper(**SIZES).encoder, dtype, kind)
    assert encoder.quantization == SCHEMES[kind]
    before = nbytes(FrozenEncoder(tiny_whisper(**SIZES).encoder, dtype).layers[1:])
    assert nbytes(encoder.layers[1:]) < before * {"float32": 0.4, "bfloat16": 0.75}[dtype]
    assert not is_quantized(encoder.layers[0])
    for layer, (state, expected) in enumerate(zip(encoder.stream(features), exact, strict=True)):
        assert state.dtype == getattr(torch, dtype) and not state.requires_grad
        error = (state - expected).float().norm() / expected.float().norm()
        assert (error == 0) if layer < 2 else 0 < error < NEAR[kind], (layer, error)


def defined(x, linear):
    """What an int8 layer means, in float64: the codes of each group of each row one by one."""
    x = x.double().unflatten(-1, (linear.scale.shape[0], -1))
    low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
    step = ((high - low) / 254).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.round(-low / step)
    codes = torch.floor(x / step + zero + 0.5)
    assert ((codes >= 0) & (codes <= 255)).all()
    rounded = ((codes - zero) * step).flatten(-2)
    return rounded @ held_weight(linear).double().T + (0 if linear.bias is None else linear.bias.double())


def held_weight(linear):
    """The weights that an int8 layer stands for, (out, in)."""
    codes = linear.codes.unflatten(1, (linear.scale.shape[0], -1))
    return (codes * linear.scale.T[:, :, None]).flatten(1)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("products", [multiplies_int8_exactly(), False])
@pytest.mark.parametrize("shape, groups", [((1, 16), 1), ((2, 3, 48), 3), ((700, 2048), 16), ((0, 16), 1)])
def test_an_int8_layer_is_what_it_says(shape, groups, products, backend):
    with use_backend(backend):
        check_an_int8_layer(shape, groups, products)


def check_an_int8_layer(shape, groups, products):
    torch.manual_seed(0)
    linears = [torch.nn.Linear(shape[-1], out, bias=out > 16) for out in (16, 32)]
    layers = [Int8Linear(linear, products, groups) for linear in linears]
    # Rows of either sign, with a mean, of one value, of nothing, and with a spike.
    x = torch.randn(shape) + 2 * torch.randn(*shape[:-1], 1)
    rows = x.view(-1, shape[-1])
    for row, value in ((0, 0.0), (1, 3.0), (2, rows[2:3].abs()), (3, -rows[3:4].abs() * 1e-30)):
        rows[row : row + 1] = value
    rows[-1:, 3] = 500.0
    together = project(x, *layers)
    for linear, layer, y in zip(linears, layers, together, strict=True):
        assert torch.equal(layer(x), y) and y.shape == (*shape[:-1], linear.out_features)
        weight = held_weight(layer)
        off = (weight - linear.weight).abs().unflatten(1, (groups, -1)).amax(2)
        assert off.le(0.501 * layer.scale.T).all()
        exact = torch.nn.functional.linear(x, linear.weight, linear.bias)
        expected = defined(x, layer) if products else torch.nn.functional.linear(x, weight, linear.bias)
        if exact.numel():
            # A value half way between two codes may go to either.
            norm = expected.double().norm(dim=-1).clamp_min(1e-30)
            assert ((y.double() - expected).norm(dim=-1) <= 2e-3 * norm).all()
            assert (y - exact).norm() <= 0.05 * exact.norm()
    assert project(rows[:1], *layers)[0].equal(together[0].view(-1, 16)[:1])  # whatever else is there
    spoilt = x.clone()
    spoilt.view(-1, shape[-1])[1:2, 5] = float("nan")
    assert layers[0](spoilt).view(-1, 16)[1:2].isnan().all()
    with pytest.raises(RuntimeError, match="gives no gradient"):
        layers[0](x.requires_grad_())
    half = x.detach().bfloat16()
    found, expected = layers[1](half), layers[1](half.float())
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.01 * expected.norm()  # of the output's rounding


@pytest.mark.skipif(not multiplies_int8_exactly(), reason="weights alone are in int8 here")
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("width, groups", [(1, 1), (3, 3), (5, 1)])
def test_int8_layers_of_any_width(width, groups, backend):
    layer = Int8Linear(torch.nn.Linear(width, 40), True, groups)
    x = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
    with use_backend(backend):
        found = layer(x)
    assert (found - defined(x, layer)).norm() <= 1e-2 * found.norm()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_int8_layers_of_other_shapes_are_refused(backend):
    codes, one = torch.ones(64, 16, dtype=torch.int8), torch.ones(1, 64)
    x = torch.zeros(3, 16)
    for given in (
        ([codes], [one], [one], [torch.ones(3)]),
        ([codes], [torch.zeros(0, 64)], [torch.zeros(0, 64)], [None]),
        ([codes], [one[:, :5]], [one], [None]),
    ):
        with use_backend(backend), pytest.raises((ValueError, RuntimeError)):
            int8_linear(x, *given)


@pytest.mark.skipif(not multiplies_int8_exactly(), reason="weights alone are in int8 here")
@torch.no_grad()
def test_int8_layers_compile_whole_and_compute_the_same():
    torch.manual_seed(0)
    layers = [Int8Linear(torch.nn.Linear(128, 48, bias=bias), groups=2) for bias in (True, False)]
    compiled = torch.compile(lambda x: project(x, *layers), backend="aot_eager", fullgraph=True, dynamic=True)
    for clips in (3, 2):
        x = torch.randn(clips, 5, 128)
        for found, expected in zip(compiled(x), project(x, *layers), strict=True):
            assert (found - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("size", [64, 272, 4096])
def test_groups_divide_the_inputs(size):
    groups = quantization._groups(size)
    assert size % groups == 0 and groups == {64: 1, 272: 1, 4096: 32}[size]
    assert quantization._groups(384) == 3 and quantization._groups(1280) == 10


def test_four_bits_are_those_of_normal_float():
    # The published table of QLoRA (arXiv 2305.14314, appendix E).
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    published += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    published += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    published += [0.7229568362236023, 1.0]
    torch.manual_seed(0)
    linear = torch.nn.Linear(80, 48)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(48, 1) + 0.1)  # so that blocks differ
        linear.weight.view(-1, 64)[3] = 0  # as do dead ones
    layer = NF4Linear(linear)
    torch.testing.assert_close(layer.levels, torch.tensor(published), rtol=0, atol=1e-6)
    held, blocks = layer.weight(torch.float32).view(-1, 64), linear.weight.detach().view(-1, 64)
    scales = layer._scales()
    largest = blocks.abs().amax(1)
    assert (scales - largest).abs().max() <= 0.501 * (largest.max() - largest.min()) / 255
    # The nearest of the sixteen, for each weight.
    levels = torch.tensor(published) * scales[:, None, None]
    nearest = (blocks[:, :, None] - levels).abs().amin(2)
    torch.testing.assert_close((held - blocks).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert sum(each.numel() * each.element_size() for each in (layer.codes, layer.scale_codes)) == 60 * 33
    x = torch.randn(2, 3, 80, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], layer.weight(torch.float32).sum(0))
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - layer(x)).norm() <= 0.02 * half.norm()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind, dtype", [("int8", "float32"), ("nf4", "bfloat16")])
def test_loading_holds_one_layer_at_a_time_in_full_precision(kind, dtype, tmp_path, monkeypatch):
    def held():
        ctypes.CDLL(None).malloc_trim(0)  # what is free is not held
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    sizes = {"encoder_layers": 8, "d_model": 512, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 64}
    make_backbone(tmp_path / "backbone", **sizes, encoder_attention_heads=8)
    gc.collect()
    seen, replace = [], quantization._replace
    monkeypatch.setattr(quantization, "_replace", lambda *a, **b: (replace(*a, **b), seen.append(held())))
    layer = 4 * (4 * 512 * 512 + 2 * 512 * 2048)
    before = held()
    base = load_backbone(tmp_path / "backbone", dtype=torch.float32, quantized=True)
    assert held() - before < 2 * layer
    encoder = FrozenEncoder(base.encoder, dtype, kind)
    assert len(seen) == 7 and encoder.dtype == getattr(torch, dtype)
    assert max(seen) - before < nbytes(encoder) + 3 * layer < 7 * layer  # of 8
    # What it is does not depend on how it came there.
    whole = FrozenEncoder(
        load_backbone(tmp_path / "backbone", dtype=getattr(torch, dtype)).encoder, None, kind
    )
    assert encoder.original == whole.original
    for found, expected in zip(encoder.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(found, expected)


def saturating(rows, columns):
    """Products of int8 matrices as on a CPU without VNNI: one is shifted to be unsigned, and sums of two
    products are 16 bits."""
    shifted = (rows.int() + 128).unflatten(1, (-1, 2))[..., None]
    pairs = (shifted * columns.int().unflatten(0, (-1, 2))).sum(2)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(1, dtype=torch.int32) - 128 * columns.int().sum(0)


@needs_torchao
def test_weights_alone_are_quantised_where_products_of_int8_saturate(monkeypatch):
    features, _ = batch()
    exact = list(FrozenEncoder(tiny_whisper(**SIZES).encoder).stream(features))
    monkeypatch.setattr(torch, "_int_mm", saturating)
    multiplies_int8_exactly.cache_clear()
    try:
        encoder = FrozenEncoder(tiny_whisper(**SIZES).encoder, None, "int8")
    finally:
        multiplies_int8_exactly.cache_clear()
    assert encoder.quantization == "int8 weights"
    assert nbytes(encoder.layers[1:]) < 0.4 * nbytes(FrozenEncoder(tiny_whisper(**SIZES).encoder).layers[1:])
    for state, expected in zip(encoder.stream(features), exact, strict=True):
        assert (state - expected).norm() < NEAR["int8"] * expected.norm()


@needs_torchao
@pytest.mark.parametrize("kind", NEAR)
@pytest.mark.parametrize("method", CONFIGS)
def test_every_side_network_trains_on_it(method, kind):
    features, labels = batch(6)
    expected = gradients(model_of(method, None), features, labels)
    found = gradients(model_of(method, kind), features, labels)
    least = 0.85 if kind == "nf4" else 0.95  # 0 between two batches
    assert torch.cosine_similarity(found, expected, dim=0) > least
    assert (found - expected).norm() > 1e-4 * expected.norm()  # it is quantised


@needs_torchao
def test_the_gradient_of_sherl_goes_through_a_last_layer_that_is_whole():
    model = model_of("sherl", "int8")
    layers = model.encoder.layers
    assert [is_quantized(layer) for layer in layers] == [False, *[True] * (LAYERS - 2), False]
    states = torch.randn(2, 5, WIDTH, requires_grad=True)
    model.encoder.last_layer(states).square().sum().backward()
    assert states.grad.norm() > 0
    assert not any(p.requires_grad for p in model.encoder.parameters())


@needs_torchao
@pytest.mark.parametrize("kind", NEAR)
def test_statistics_chunks_autocast_and_neighbours_change_nothing(kind):
    encoder = FrozenEncoder(tiny_whisper(**SIZES).encoder, None, kind)
    features, _ = batch(5)
    frames = [2 * WINDOW, 30, 18, 2 * WINDOW, 8]
    lengths = torch.tensor(frames) // 2
    plain = list(encoder.stream(features, lengths))
    known = list(encoder.stream(features, lengths, statistics=True))
    for state, other in zip(plain, known, strict=True):
        assert torch.equal(state, other[0] if isinstance(other, HiddenState) else other)
    assert all(isinstance(each, HiddenState) for each in known[:-1])
    for found, expected in zip(known[2].statistics, row_statistics(plain[2]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        for state, other in zip(plain, encoder.stream(features, lengths), strict=True):
            assert torch.equal(state, other)
    # Rounding in another order takes some code of an input to its neighbour: no more than quantising does.
    bound = {"int8": NEAR["int8"] / 2, "fp8": 1e-5, "nf4": 1e-5}[kind]
    for i, length in enumerate(lengths.tolist()):
        alone = list(encoder.stream(features[i : i + 1, :, : frames[i]], lengths[i : i + 1]))
        for state, other in zip(plain, alone, strict=True):
            difference = (state[i, :length] - other[0, :length]).norm()
            assert difference <= bound * other[0, :length].norm()
    side = model_of("lst", None).side_network
    whole, parts = (pooled_in_chunks(encoder, side, features, lengths, size) for size in (5, 2))
    assert (whole - parts).norm() <= bound * whole.norm()


@needs_torchao
@pytest.mark.parametrize("kind", NEAR)
def test_it_is_remembered_and_can_be_left_out(kind, tmp_path):
    make_backbone(tmp_path / "backbone")
    base = load_backbone(tmp_path / "backbone")
    model = randomise(get_meft_model(base, LSTConfig(reduction_factor=2, backbone_quantization=kind)))
    model.save_pretrained(tmp_path / "out")
    features = torch.randn(2, 80, 100)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not any(name.startswith("encoder.") for name in file.keys())  # noqa: SIM118
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["meft"]["backbone_quantization"] == kind
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as one that the backbone has other weights
        loaded = MeftModel.from_pretrained(tmp_path / "out")
    assert loaded.encoder.quantization == model.encoder.quantization
    with torch.no_grad():
        expected = model.eval()(features).logits
        torch.testing.assert_close(loaded(features).logits, expected)
        whole = MeftModel.from_pretrained(tmp_path / "out", quantization="none")
        assert whole.meft_config.backbone_quantization is None and not is_quantized(whole.encoder)
        assert not torch.equal(whole(features).logits, expected)
    # One that was trained on what an earlier version made of the same weights.
    older = tmp_path / "older"
    shutil.copytree(tmp_path / "out", older)
    assert saved.pop("quantization_revision") == REVISION
    write_json(older / "config.json", saved | {"label2id": model.config.label2id})
    with pytest.warns(UserWarning, match=f"earlier version rounded to {kind} in another way"):
        MeftModel.from_pretrained(older, backbone=tmp_path / "backbone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeftModel.from_pretrained(older, backbone=tmp_path / "backbone", quantization="none")
    with pytest.raises(UserError, match=f"quantization_revision=None, but now it is {REVISION}"):
        check_same_model(older, type(loaded.config)(**saved | {"quantization_revision": REVISION}))
    with pytest.raises(UserError, match="save_backbone out"):
        model.save_pretrained(tmp_path / "whole", save_backbone=True)
    assert not (tmp_path / "whole" / "model.safetensors").exists()
    with pytest.raises(UserError, match="quantised already"):
        get_meft_model(base, LSTConfig(reduction_factor=2))
    head = get_meft_model(load_backbone(tmp_path / "backbone"), HeadConfig(backbone_quantization=kind))
    with pytest.raises(UserError, match="cannot be merged: load the model with quantization='none'"):
        head.merge_and_unload()


@needs_torchao
def test_a_cache_knows_how_the_backbone_was_quantised(tmp_path):
    make_backbone(tmp_path / "backbone", encoder_layers=3)
    audio = make_audio_folder(tmp_path / "audio", 2)
    examples, _ = data.check_audio(data.load_examples(str(audio)), progress=False)
    extractor = WhisperFeatureExtractor.from_pretrained(tmp_path / "backbone")

    def make(kind, method=LSTConfig):
        config = method(reduction_factor=2, max_frames="longest", backbone_quantization=kind)
        base = load_backbone(tmp_path / "backbone")
        set_labels(base, list(label2id))
        return randomise(get_meft_model(base, config))

    label2id = {"high": 0, "low": 1, "middle": 2}
    model = make("int8")
    cache = prepare_cache(tmp_path / "c", model, extractor, [examples], "exact", progress=False)
    online = data.SpeechDataset(examples, extractor, label2id, "longest")
    online = data.Collator(extractor, "longest")([online[i] for i in range(len(examples))])
    dataset = CachedDataset(examples, cache, model, label2id)
    cached = CachedCollator()([dataset[i] for i in range(len(examples))])
    expected = gradients(model, online.pop("input_features"), online.pop("labels"), **online)
    found = gradients(model, None, cached.pop("labels"), **cached)
    assert (found - expected).norm() <= 0.01 * expected.norm()
    was = f"{SCHEMES['int8']}, revision {REVISION}"
    for kind, now in ((None, "None"), ("fp8", f"fp8 weights, revision {REVISION}")):
        stale = f"stale: backbone_quantization was {was}, now it is {now};"
        with pytest.raises(UserError, match=stale):
            prepare_cache(tmp_path / "c", make(kind), extractor, [examples], progress=False)
    # SHERL's whole last layer is behind all that it reads.
    key = cache_key(make("int8", SHERLConfig).encoder, extractor, "longest")
    FeatureCache(tmp_path / "c").check(key, (0, 1))


@needs_torchao
@pytest.mark.parametrize("kind", NEAR)
def test_memory_counts_the_bytes_that_are_held(kind):
    exact, counted = (
        estimate("tiny", "lst", 2, dtype="float32", frames=100, device_type="cpu", backbone_quantization=k)
        for k in (None, kind)
    )
    exact, counted = (each.phases["backward"].contributors for each in (exact, counted))
    base = type(tiny_whisper())._from_config(whisper_config("tiny", num_labels=2, frames=100))
    encoder = FrozenEncoder(base.encoder, None, kind)
    assert counted["backbone weights"] == nbytes(encoder) < 0.6 * exact["backbone weights"]
    assert counted["hidden states"] == exact["hidden states"]


def test_what_cannot_be_quantised_is_named(monkeypatch):
    with pytest.raises(UserError, match="backbone_quantization must be None, int8, fp8 or nf4, got 'int4'"):
        LSTConfig(backbone_quantization="int4")
    with pytest.raises(UserError, match="must be None for lora, which trains inside the encoder, got 'int8'"):
        LoRAConfig(backbone_quantization="int8")
    with pytest.raises(UserError, match="needs backbone_dtype float32, bfloat16 or float16, got float64"):
        FrozenEncoder(tiny_whisper().encoder, "float64", "int8")
    narrow = {"d_model": 24, "encoder_ffn_dim": 40}
    with pytest.raises(UserError, match="widths that are multiples of 16, got 24 and 40"):
        FrozenEncoder(tiny_whisper(**narrow).encoder, None, "int8")
    with pytest.raises(UserError, match="int8 needs a backbone with layers beside the first"):
        get_meft_model(tiny_whisper(encoder_layers=2), SHERLConfig(backbone_quantization="int8"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert FrozenEncoder(tiny_whisper(**SIZES).encoder, None, "int8").quantization == SCHEMES["int8"]
    with pytest.raises(UserError, match="fp8 needs torchao .pip install"):
        FrozenEncoder(tiny_whisper().encoder, None, "fp8")


@needs_torchao
@pytest.mark.parametrize("kind", NEAR)
def test_a_cast_of_a_quantised_backbone(kind):
    """Goes on but in fp8, whose weights stay in their own format."""
    features, _ = batch()
    model = model_of("lst", kind).eval().half()
    if kind != "fp8":
        assert torch.isfinite(model(features).logits).all()
        return
    with pytest.raises(
        UserError, match="cast to float16 after backbone_quantization='fp8' had .* of float32"
    ):
        model(features)
    assert torch.isfinite(model.float()(features).logits).all()


@pytest.mark.parametrize("make", [Int8Linear, NF4Linear])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_leaves_what_weights_are_held_by(make, dtype):
    """Scales of small weights are nothing in float16."""
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data.mul_(1e-5)
    layer, x = make(linear), torch.randn(5, 64).to(dtype)
    before, expected = layer.state_dict(), layer(x.float())
    assert expected.any()
    assert layer.to(dtype) is layer and layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    found = layer.float()(x.float())
    assert torch.equal(found, expected)
    assert {each.device.type for each in layer.to("meta", dtype).buffers()} == {"meta"}


@needs_torchao
def test_what_torchao_cannot_do_is_named(monkeypatch):
    weight = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    with pytest.raises(UserError, match="capability 8.9 or newer, a card has 8.0: use int8"):
        quantization._fp8_scheme(weight)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert quantization._fp8_scheme(weight)[0] == "fp8"


@needs_torchao
def test_the_commands_quantise(tmp_path, capsys):
    backbone, audio = make_backbone(tmp_path / "backbone"), make_audio_folder(tmp_path / "audio", 6)
    options = {"backbone_quantization": "int8", "num_train_epochs": 3, "max_frames": "longest"}
    command = train_command(backbone, audio, tmp_path / "out", **options)
    assert cli.main([*command, "--cache_features"]) == 0
    assert cli.main(["evaluate", str(tmp_path / "out"), f"--data={audio}"]) == 0
    wav = str(audio / "low" / "low0.wav")
    assert cli.main(["predict", str(tmp_path / "out"), wav, "--backbone_quantization=none"]) == 0
    assert cli.main(["memory", "--model=tiny", "--batch=1", "--backbone_quantization=int8"]) == 0
    capsys.readouterr()
    options["backbone_quantization"] = "fp8"
    resume = train_command(backbone, audio, tmp_path / "out", resume_from_checkpoint=True, **options)
    assert cli.main(resume) == 1
    assert "backbone_quantization='int8', but now it is 'fp8'" in capsys.readouterr().err
    refused = train_command(backbone, audio, tmp_path / "full", method="full", reduction_factor=None)
    assert cli.main([*refused, "--backbone_quantization=int8"]) == 1
    assert "must be None for full" in capsys.readouterr().err and not (tmp_path / "full").exists()


def test_predicting_on_a_device_that_is_not_there(tmp_path, capsys):
    assert cli.main(["predict", str(tmp_path), "a.wav", "--device=cuda:77"]) == 1
    assert "device: cannot use 'cuda:77'" in capsys.readouterr().err
