"""`MultiHead`: several trained classifiers on one pass of the encoder answer as each does alone."""

import copy
import json

import pytest
import torch
from modelling_fixtures import LAYERS, WINDOW, batch, mel_mask, randomise, tiny_whisper
from recognition_fixtures import recogniser
from whisper_meft import MeftConfig, MeftModel, MultiHead, UserError, get_meft_model
from whisper_meft.encoder import chunked, shared_pass
from whisper_meft.encoder.frozen import FrozenEncoder

HEADS = {
    "lst": {"reduction_factor": 4, "adapter_dim": 8},
    "lst early": {"reduction_factor": 8, "adapter_dim": 4, "layers": [1, 2]},
    "unipt": {"reduction_factor": 4},
    "unipt pooled": {"reduction_factor": 4, "attention": "pooled:3", "layers": "last:1"},
    "sherl": {"reduction_factor": 4},
    "head": {},
    "weighted_sum": {},
}


def made(name, base, seed=1, **options) -> MeftModel:
    config = {"method": name.split()[0], **HEADS.get(name, {}), **options}
    return randomise(get_meft_model(base, MeftConfig.from_dict(config)), seed).eval()


def alone(models, *given) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(*given).logits for model in models]


def assert_same_bits(found, expected) -> None:
    assert len(found) == len(expected)
    for output, logits in zip(found, expected):
        assert torch.equal(output.logits, logits) and not output.logits.requires_grad


@pytest.fixture
def passes(monkeypatch):
    """How often each layer's index was run, of whatever encoder."""
    ran = []
    finish = FrozenEncoder._states

    def counted(self, *given):
        for index, state in enumerate(finish(self, *given)):
            ran.append(index)
            yield state

    monkeypatch.setattr(FrozenEncoder, "_states", counted)
    return ran


@pytest.mark.parametrize(
    ("dtype", "max_frames", "pooling"),
    [(None, "fidelity", "mean"), (None, "longest", "statistics"), ("bfloat16", 17, "statistics")],
)
def test_each_head_says_what_it_says_alone(dtype, max_frames, pooling, passes):
    base = tiny_whisper()
    options = {"max_frames": max_frames, "pooling": pooling, "backbone_dtype": dtype}
    models = [made(name, base, seed, **options) for seed, name in enumerate(HEADS)]
    models[0].config.calibration_temperature = 1.7
    features, _ = batch(size=5)
    mask = mel_mask([2 * WINDOW, 7, 30, 1, 41], 2 * WINDOW)
    expected = alone(models, features, mask)
    passes.clear()
    assert_same_bits(MultiHead(models)(features, mask), expected)
    assert passes == list(range(LAYERS + 1))
    assert_same_bits(MultiHead(models[::-1])(features, mask), expected[::-1])


@pytest.mark.parametrize(
    "names",
    [["sherl", "head"], ["lst early", "head"], ["lst early", "sherl"], ["sherl", "head", "lst early"]],
)
@pytest.mark.parametrize("order", [1, -1])
def test_whoever_reads_the_most_states_may_end_first(names, order, passes):
    base = tiny_whisper()
    models = [made(name, base, seed) for seed, name in enumerate(names)][::order]
    features, _ = batch(size=3)
    expected = alone(models, features)
    passes.clear()
    assert_same_bits(MultiHead(models)(features), expected)
    assert passes == list(range(LAYERS + 1 if "head" in names else LAYERS))


@pytest.mark.parametrize("names", [["sherl", "sherl"], ["lst early", "lst early"], ["head"]])
def test_layers_that_nobody_reads_are_not_run(names, passes):
    base = tiny_whisper()
    models = [made(name, base, seed) for seed, name in enumerate(names)]
    features, _ = batch(size=2)
    expected = alone(models, features)
    passes.clear()
    assert_same_bits(MultiHead(models)(features), expected)
    assert passes == list(range(LAYERS if names[0] != "head" else LAYERS + 1))


@pytest.mark.parametrize("clips", [0, 5])
def test_a_batch_in_chunks(clips, monkeypatch, passes):
    monkeypatch.setitem(chunked._INNER_ELEMENTS, "cpu", 48 * WINDOW * 2)  # two clips
    base = tiny_whisper()
    models = [made(name, base, seed, max_frames="longest") for seed, name in enumerate(HEADS)]
    features, _ = batch(size=clips)
    mask = mel_mask([30 + index for index in range(clips)], 2 * WINDOW)
    expected = alone(models, features, mask)
    passes.clear()
    assert_same_bits(MultiHead(models)(features, mask), expected)
    assert passes.count(0) == max(1, -(-clips // 2))
    chunky = [made("lst", base, 3, max_frames="longest", chunk_size=3), models[2]]
    found = MultiHead(chunky)(features, mask)
    for output, logits in zip(found, alone(chunky, features, mask)):
        torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)


def test_states_are_held_only_where_a_second_reader_wants_them(monkeypatch):
    made_here = []
    passed = shared_pass._Passed
    monkeypatch.setattr(
        shared_pass, "_Passed", lambda *given: made_here.append(passed(*given)) or made_here[-1]
    )
    base = tiny_whisper()
    features, _ = batch(size=2)
    MultiHead([made("head", base), made("lst", base)])(features)
    MultiHead([made("sherl", base), made("unipt pooled", base), made("lst", base)])(features)
    assert [sorted(each._held) for each in made_here] == [[LAYERS], list(range(LAYERS + 1))]


def test_under_autocast():
    base = tiny_whisper()
    models = [made(name, base, seed) for seed, name in enumerate(HEADS)]
    features, _ = batch(size=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(MultiHead(models)(features), alone(models, features))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_backbone(kind, tmp_path):
    sizes = {"d_model": 64, "encoder_ffn_dim": 64}
    names = ["sherl", "lst", "unipt", "weighted_sum"]
    paths = []
    for seed, name in enumerate(names):
        model = made(name, tiny_whisper(**sizes), seed, backbone_quantization=kind)
        model.config.base_model_name_or_path = None
        paths.append(tmp_path / name.replace(" ", "_"))
        model.save_pretrained(paths[-1])
    base = tiny_whisper(**sizes)
    base.save_pretrained(tmp_path / "whisper")
    features, _ = batch()
    models = [MeftModel.from_pretrained(path, backbone=tmp_path / "whisper") for path in paths]
    expected = alone(models, features)
    assert_same_bits(MultiHead(models)(features), expected)
    # The four were loaded with four backbones; here there is one, but for SHERL's last layer.
    whole = MultiHead.from_pretrained(paths, backbone=tmp_path / "whisper")
    assert_same_bits(whole(features), expected)
    sherl, lst, unipt, _ = whole.models
    assert lst.encoder.layers[1] is unipt.encoder.layers[1] is sherl.encoder.layers[1]
    assert lst.encoder.layers[-1] is unipt.encoder.layers[-1] is not sherl.encoder.layers[-1]
    assert all(torch.equal(one, other) for one, other in zip(alone(whole.models, features), expected))


def test_saved_models_are_loaded_with_one_backbone(tmp_path, monkeypatch):
    base = tiny_whisper()
    base.save_pretrained(tmp_path / "whisper")
    features, _ = batch()
    paths, expected = [], []
    for seed, name in enumerate(HEADS):
        model = made(name, base, seed)
        model.config.base_model_name_or_path = str(tmp_path / "whisper")
        paths.append(tmp_path / name.replace(" ", "_"))
        # Those that hold their own copy are compared with the others' when they are loaded.
        model.save_pretrained(paths[-1], save_backbone=name == "unipt")
        expected += alone([model], features)
    whole = MultiHead.from_pretrained(paths)
    assert_same_bits(whole(features), expected)
    assert len({id(model.encoder.layers[1]) for model in whole.models}) == 1
    held = sum(p.numel() for p in whole.parameters())
    own = sum(p.numel() for m in whole.models for n, p in m.named_parameters() if "encoder." not in n)
    assert held == own + sum(p.numel() for p in whole.encoder.parameters())
    for model, logits in zip(whole.models, expected):
        assert torch.equal(model(features).logits, logits)
    assert MultiHead.from_pretrained(paths[:2], dtype="bfloat16").encoder.dtype == torch.bfloat16
    given = MultiHead.from_pretrained([str(path) for path in paths[:2]], backbone=copy.deepcopy(base))
    assert_same_bits(given(features), expected[:2])


def test_what_trains_afterwards_is_seen(tmp_path):
    base = tiny_whisper()
    models = [made("lst", base), made("head", base)]
    whole = MultiHead(models)
    features, labels = batch()
    before = [output.logits for output in whole(features)]
    models[0].train()
    models[0](features, labels=labels).loss.backward()
    with torch.no_grad():
        models[0].classifier.bias += 1
    found = [output.logits for output in whole(features)]
    torch.testing.assert_close(found[0], before[0] + 1)
    assert torch.equal(found[1], before[1])
    assert not whole.train().training and not models[0].training


# ---------------------------------------------------------------- what cannot share a pass


@pytest.mark.parametrize("method", sorted(m for m, c in MeftConfig.methods().items() if not c.frozen_encoder))
def test_methods_inside_the_encoder_are_refused(method):
    inside = get_meft_model(tiny_whisper(), MeftConfig.from_dict({"method": method}))
    with pytest.raises(UserError, match=f"models.1. cannot share a pass: {method} trains inside the encoder"):
        MultiHead([made("lst", tiny_whisper()), inside])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_frames": "longest"}, "max_frames is fidelity for the one and longest for the other"),
        ({"backbone_dtype": "bfloat16"}, "backbone_dtype is float32 for the one and bfloat16"),
        ({"backbone_quantization": "nf4"}, "backbone_quantization is None for the one and nf4"),
        ({"attn_implementation": "eager"}, "attn_implementation is sdpa for the one and eager"),
        ({"seed": 1}, "their backbones have different weights or sizes"),
        ({"encoder_layers": LAYERS + 1}, "different weights or sizes"),
        ({"encoder_attention_heads": 2}, "different weights or sizes"),
        ({"encoder_ffn_dim": 32}, "different weights or sizes"),
    ],
)
def test_models_that_differ_are_refused(change, message):
    theirs = {k: v for k, v in change.items() if not k.startswith(("max", "backbone"))}
    ours = {k: v for k, v in change.items() if k not in theirs}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64}
    models = [made("sherl", tiny_whisper(**sizes)), made("lst", tiny_whisper(**sizes))]
    models.append(made("head", tiny_whisper(**sizes | theirs), **ours))
    MultiHead(models[:2])
    with pytest.raises(UserError, match=message):
        MultiHead(models)


def test_one_weight_of_one_layer_is_enough(tmp_path):
    """Which the sampled fingerprint would not see."""
    models = [made(name, tiny_whisper()) for name in ("lst", "unipt", "sherl")]
    MultiHead(models)
    with torch.no_grad():
        models[1].encoder.layers[-1].fc1.weight[0, 0] += 1e-6
        models[2].encoder.layers[-1].fc1.weight[0, 0] += 1e-6
    with pytest.raises(UserError, match="models.0. and models.1. cannot share a pass: their backbones"):
        MultiHead(models)
    MultiHead([models[0], models[2]])  # SHERL runs the last layer for itself
    paths = []
    for index, model in enumerate(models[:2]):
        paths.append(tmp_path / str(index))
        model.save_pretrained(paths[-1], save_backbone=True)
    with pytest.raises(UserError, match="their backbones have different weights"):
        MultiHead.from_pretrained(paths)


def test_other_arguments_are_refused(tmp_path):
    model = made("lst", tiny_whisper())
    for wrong in ([], model, "out", None):
        with pytest.raises(UserError, match="models must be a list of one or more MeftModel, got"):
            MultiHead(wrong)
    for wrong in (recogniser(), "out", get_meft_model(recogniser(), MeftConfig.from_dict({"method": "lst"}))):
        with pytest.raises(UserError, match="models.1. must be a MeftModel, which classifies, got"):
            MultiHead([model, wrong])
    for wrong in ([], "out"):
        with pytest.raises(UserError, match="names_or_paths must be a list of one or more"):
            MultiHead.from_pretrained(wrong)
    features, _ = batch()
    whole = MultiHead([model])
    with pytest.raises(UserError, match="unknown arguments: nonsense"):
        MultiHead.from_pretrained(["out"], nonsense=1)
    with pytest.raises(UserError, match="input_features is needed"):
        whole(None)
    with pytest.raises(UserError, match="input_features must be a torch.Tensor"):
        whole(features.numpy())
    with pytest.raises(UserError, match="mel bins"):
        whole(features[:, 1:])
    with pytest.raises(UserError, match="models.0. is in disable_adapter"), model.disable_adapter():
        whole(features)


def test_saved_models_that_differ_are_refused_before_weights_are_read(tmp_path):
    base = tiny_whisper()
    base.save_pretrained(tmp_path / "whisper")
    made("lst", base).save_pretrained(tmp_path / "lst", save_backbone=True)

    def changed(name, **options) -> str:
        folder = tmp_path / name
        folder.mkdir()
        values = json.loads((tmp_path / "lst" / "config.json").read_text())
        values["meft"].update(options.pop("meft", {}))
        (folder / "config.json").write_text(json.dumps(values | options))
        return str(folder)

    other = made("lst", tiny_whisper(seed=5)).fingerprint()
    for name, options, message in (
        ("dtype", {"meft": {"backbone_dtype": "bfloat16"}}, "give one with dtype=.* .--backbone_dtype"),
        ("kind", {"meft": {"backbone_quantization": "nf4"}}, "--backbone_quantization"),
        ("frames", {"meft": {"max_frames": "longest"}}, "max_frames is fidelity .* run them one by one"),
        ("inside", {"meft": None}, "lora trains inside the encoder"),
        ("task", {"task": "transcription"}, "task is a model for transcription"),
        ("print", {"base_model_fingerprint": other}, "were trained on different backbones, backbone and"),
    ):
        if options.get("meft", 0) is None:
            get_meft_model(tiny_whisper(), MeftConfig.from_dict({"method": "lora"})).save_pretrained(
                tmp_path / name
            )
            path = str(tmp_path / name)
        else:
            path = changed(name, **options)
        with pytest.raises(UserError, match=message) as error:
            MultiHead.from_pretrained([tmp_path / "lst", path])
        assert path in str(error.value)
