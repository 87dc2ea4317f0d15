"""The methods that train inside the backbone, on recognition: in the encoder, the decoder or both."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from modelling_fixtures import LAYERS, randomise, tiny_whisper
from process_fixtures import two_processes
from recognition_fixtures import TOKENS, VOCABULARY, clips, ids_of, logits, recogniser
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForSpeechSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
    WhisperForConditionalGeneration,
)
from whisper_meft import (
    AdapterConfig,
    BitFitConfig,
    FullConfig,
    LoRAConfig,
    LoRAPlusConfig,
    MeftConfig,
    MeftForConditionalGeneration,
    MeftTrainer,
    MeZOConfig,
    S2LoRAConfig,
    UserError,
    get_meft_model,
)
from whisper_meft.decoder import chunked as decoder_chunked
from whisper_meft.methods.adalora import RankAllocation
from whisper_meft.methods.mezo import MeZO

DECODER_LAYERS = 3
# Of each method: options, and which of a part's tensors train.
TABLE = {
    "full": ({}, lambda name: name != "encoder.embed_positions.weight"),
    "bitfit": ({}, lambda name: name.endswith("bias")),
    "adapter": ({"adapter_dim": 5}, lambda name: ".down." in name or ".up." in name),
    "lora": ({"r": 4, "lora_alpha": 8}, lambda name: "lora_" in name),
    "lora_plus": ({"r": 4, "lora_alpha": 8}, lambda name: "lora_" in name),
    "adalora": ({"init_r": 6, "target_r": 3, "lora_alpha": 12}, lambda name: "lora_" in name),
    "s2_lora": (
        {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "fc1"]},
        lambda name: "lora_" in name or "coefficients" in name,
    ),
    "mezo": ({}, lambda name: name != "encoder.embed_positions.weight"),
}
TARGETS = ["encoder", "decoder", "both"]
EVERYWHERE = pytest.mark.parametrize(
    ("method", "target"), [(method, target) for method in TABLE for target in TARGETS]
)
# Of the others' modules these are all there is.
MODULES = pytest.mark.parametrize(
    ("method", "target"),
    [(method, target) for method in TABLE if method not in ("lora_plus", "mezo") for target in TARGETS],
)
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def config_of(method, target, **options) -> MeftConfig:
    return MeftConfig.from_dict({"method": method, "target": target, **TABLE[method][0], **options})


def model_of(method, target, trained=True, base=None, dtype=None, **options) -> MeftForConditionalGeneration:
    base = recogniser(dtype=dtype, **STILL) if base is None else base
    torch.manual_seed(5)  # what a method adds is drawn
    model = get_meft_model(base, config_of(method, target, **options))
    if dtype is not None:
        model.to(dtype)
    return randomise(model, std=0.2) if trained else model


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def in_target(name, target) -> bool:
    return target == "both" or name.startswith(f"{target}.")


def steps(model, count=4, rate=1e-2):
    """The loss before and after some steps of Adam, dropout aside."""
    features, labels = clips()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(features, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# ---------------------------------------------------------------- the start


@EVERYWHERE
def test_step_0_is_the_backbone_bit_for_bit(method, target):
    base = recogniser()
    plain = copy.deepcopy(base).eval()
    model = model_of(method, target, trained=False, base=base).eval()
    features, labels = clips()
    ids = ids_of(model, labels)
    if target == "decoder":  # the frozen encoder has kernels of its own
        *_, last = model.encoder.stream(features)
        heard = (model.encoder.layer_norm(last),)
        expected = logits(plain, None, ids, encoder_outputs=heard)
    else:
        expected = logits(plain, features, ids)
    assert torch.equal(logits(model, features, ids), expected)
    torch.testing.assert_close(
        model(features, labels=labels).loss, plain(features, labels=labels).loss, rtol=1e-5, atol=1e-6
    )
    for options in ({}, {"num_beams": 3}):
        assert torch.equal(model.generate(features, **options), plain.generate(features, **options))


@EVERYWHERE
def test_what_trains_and_what_is_frozen(method, target):
    base = recogniser(**STILL)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = model_of(method, target, trained=False, base=base).train()
    start = trained(model)
    named = dict(model.named_parameters())
    assert set(start) == {n for n in named if in_target(n, target) and TABLE[method][1](n)}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.saved_names() == set(start) | {name for name in named if "ranknum" in name}
    if method == "mezo":
        optimizer = MeZO([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        features, labels = clips()
        optimizer.measure(lambda: model(features, labels=labels).loss)
        optimizer.step()
    else:
        losses = steps(model)
        assert losses[-1] < losses[0]
    after = dict(base.state_dict())  # shared with the model, but for what was replaced
    moved = {name for name, tensor in trained(model).items() if not torch.equal(tensor, start[name])}
    assert moved == set(start)
    for name, tensor in before.items():
        ours = name.removeprefix("model.")
        if ours == "proj_out.weight":
            ours = "decoder.embed_tokens.weight"
        kept = after.get(name, after.get(f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"))
        assert torch.equal(kept, tensor) == (ours not in start), name


@pytest.mark.parametrize("method", TABLE)
def test_unset_is_both(method):
    both, unset = model_of(method, "both"), model_of(method, None)
    assert set(trained(unset)) == set(trained(both)) and unset.meft_config.target is None


@pytest.mark.parametrize("method", TABLE)
def test_whether_the_encoder_is_frozen(method):
    assert MeftConfig.methods()[method].frozen_encoder is False
    frozen = {target: config_of(method, target).frozen_encoder for target in (None, *TARGETS)}
    assert frozen == {None: False, "encoder": False, "decoder": True, "both": False}
    model = model_of(method, "decoder").train()
    assert not any(p.requires_grad for p in model.encoder.parameters())
    enabled = []
    model.encoder.layers[0].fc1.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    features, labels = clips()
    with torch.set_grad_enabled(method != "mezo"):
        model(features, labels=labels)
    assert enabled and not any(enabled)


# ---------------------------------------------------------------- what sees what


@MODULES
def test_no_logit_sees_the_tokens_behind_it(method, target):
    model = model_of(method, target).eval()
    features, labels = clips()
    ids = ids_of(model, labels)
    whole = logits(model, features, ids)
    for token in range(1, TOKENS):
        changed = ids.clone()
        changed[:, token] = (changed[:, token] + 5) % (VOCABULARY - 1)
        other = logits(model, features, changed)
        assert torch.equal(other[:, :token], whole[:, :token])
        assert not torch.allclose(other[:, token:], whole[:, token:])


@MODULES
def test_neighbours_and_padding_change_nothing(method, target):
    model = model_of(method, target, dtype=torch.float64).eval()
    features, labels = clips(dtype=torch.float64)
    ids = ids_of(model, labels)
    with torch.no_grad():
        whole, loss = logits(model, features, ids), model(features, labels=labels).loss
        losses = []
        for i in range(len(ids)):
            counted = int((labels[i] != -100).sum())
            alone = logits(model, features[i : i + 1], ids[i : i + 1, :counted])
            torch.testing.assert_close(alone[0], whole[i, :counted], rtol=1e-9, atol=1e-10)
            one = model(features[i : i + 1], labels=labels[i : i + 1, :counted], num_items_in_batch=1)
            losses.append(one.loss)
    torch.testing.assert_close(sum(losses) / (labels != -100).sum(), loss, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["full", "adapter", "lora"])
def test_tokens_padded_on_the_left_are_not_looked_at(method):
    model = model_of(method, "both", dtype=torch.float64).eval()
    features, labels = clips(dtype=torch.float64)
    ids = torch.cat([torch.full((3, 2), 7), ids_of(model, labels)], 1)
    mask = torch.arange(ids.shape[1]).expand(3, -1) >= 2
    whole = logits(model, features, ids, decoder_attention_mask=mask.long())
    ids[:, :2] = torch.tensor([11, 4])
    other = logits(model, features, ids, decoder_attention_mask=mask.long())
    torch.testing.assert_close(other[:, 2:], whole[:, 2:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("target", TARGETS)
def test_a_shorter_window(target):
    model = model_of("lora", target, max_frames=10, dtype=torch.float64).eval()
    features, labels = clips(dtype=torch.float64)
    with pytest.raises(UserError, match="a clip has sound up to frame 48 of its log-mel, max_frames 10"):
        model(features, labels=labels)
    features[..., 20:] = -1.5
    ids = ids_of(model, labels)
    assert torch.equal(logits(model, features, ids), logits(model, features[..., :20], ids))
    assert model.get_encoder()(features).last_hidden_state.shape[1] == 10
    assert model.generate(features).shape[0] == 3


# ---------------------------------------------------------------- generation


@MODULES
def test_generation_with_caches_is_that_without(method, target):
    model = model_of(method, target, dtype=torch.float64).eval()
    features, _ = clips(dtype=torch.float64)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        with_cache = model.generate(features, **options)
        assert torch.equal(with_cache, model.generate(features, use_cache=False, **options))
        plain = recogniser(dtype=torch.float64).eval().generate(features, **options)
        assert with_cache.shape != plain.shape or not torch.equal(with_cache, plain)
    heard = model.get_encoder()(features)
    assert torch.equal(model.generate(encoder_outputs=heard), model.generate(features))


@MODULES
def test_greedy_generation_follows_the_logits(method, target):
    model = model_of(method, target, dtype=torch.float64).eval()
    features, _ = clips(dtype=torch.float64)
    found = model.generate(features, suppress_tokens=[], begin_suppress_tokens=[])
    ids = torch.tensor([[model.decoder.config.decoder_start_token_id, VOCABULARY - 1]]).repeat(3, 1)
    for step in range(found.shape[1]):
        best = logits(model, features, ids)[:, -1].argmax(-1)
        going = (found[:, :step] != 2).all(1)  # not ended yet
        assert torch.equal(best[going], found[going, step])
        ids = torch.cat([ids, found[:, step : step + 1]], 1)


def test_generation_is_that_of_evaluation_whatever_the_mode():
    """Also where gradient checkpointing is on, which takes Hugging Face's layers their cache."""
    model = model_of("lora", "both", base=recogniser(), lora_dropout=0.9)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    features, _ = clips()
    expected = model.eval().generate(features)
    assert torch.equal(model.train().generate(features), expected) and model.training
    assert model.decoder.layers[0].training and model.encoder.layers[0].training


# ---------------------------------------------------------------- gradients, against a plain reimplementation


def update(method, name, weights, options, inputs, output, shared):
    """What a linear layer called ``name`` gives with what the method adds, by the papers' formulas."""
    if method == "adapter":
        hidden = F.gelu(F.linear(output, weights[f"{name}.down.weight"], weights[f"{name}.down.bias"]))
        return output + F.linear(hidden, weights[f"{name}.up.weight"], weights[f"{name}.up.bias"])
    scale = options["lora_alpha"] / options.get("r", options.get("init_r"))
    if method == "s2_lora":
        a, b = shared[output.shape[-1], inputs.shape[-1]]
        return output + scale * ((inputs @ a.T) * weights[f"{name}.coefficients"]) @ b.T
    end = "" if method == "adalora" else ".weight"
    a, b = (weights[f"{name}.lora_{factor}.default{end}"] for factor in "AB")
    if method == "adalora":  # peft's epsilon keeps an empty update finite
        scale = options["lora_alpha"] / (options["init_r"] + 1e-5)
        return output + scale * ((inputs @ a.T) * weights[f"{name}.lora_E.default"].T) @ b.T
    return output + scale * (inputs @ a.T) @ b.T


def penalty(method, weights):
    if method == "adalora":
        norms = []
        for name, factor in weights.items():
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            if "lora_E" not in name:
                norms.append((gram - torch.eye(len(gram), dtype=gram.dtype)).pow(2).sum().sqrt())
        return 0.5 * sum(norms) / len(norms)
    if method == "s2_lora":
        return 1e-4 * sum(tensor.abs().sum() for name, tensor in weights.items() if "coefficients" in name)
    return 0.0


def plain_loss(base, method, weights, options, features, labels):
    """The loss of Hugging Face's model, whose linear layers a method's formulas change, for autograd."""
    shared = {
        (weights[name.replace("lora_A", "lora_B")].shape[0], tensor.shape[1]): (
            tensor,
            weights[name.replace("lora_A", "lora_B")],
        )
        for name, tensor in weights.items()
        if "shared_factors" in name and "lora_A" in name
    }
    adapted = {name.rpartition(".lora_")[0] or name.rpartition(".coefficients")[0] for name in weights}
    adapted |= {name.rpartition(".down.")[0] for name in weights}
    for name, module in base.model.named_modules():
        if name in adapted and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, given, output, name=name: update(
                    method, name, weights, options, given[0], output, shared
                )
            )
    return base(features, labels=labels).loss + penalty(method, weights)


@MODULES
def test_every_gradient_is_that_of_a_plain_reimplementation(method, target, monkeypatch):
    if target == "encoder":  # the frozen decoder computed again, one clip at a time
        monkeypatch.setattr(decoder_chunked, "_KEPT_BYTES", 0)
        monkeypatch.setitem(decoder_chunked._LAYER_BYTES, "cpu", 1)
    base = recogniser(dtype=torch.float64, **STILL)
    model = model_of(method, target, base=copy.deepcopy(base), dtype=torch.float64).train()
    features, labels = clips(dtype=torch.float64)
    weights = {name: tensor.requires_grad_() for name, tensor in trained(model).items()}
    if method in ("full", "bitfit"):
        own = dict(base.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        weights = {name: own[name] for name in weights}
    truth = plain_loss(base.eval(), method, weights, TABLE[method][0], features, labels)
    gradients = torch.autograd.grad(truth, list(weights.values()))
    loss = model(features, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-10)
    named = dict(model.named_parameters())
    for name, expected in zip(weights, gradients):
        assert expected.any(), name
        torch.testing.assert_close(named[name].grad, expected, rtol=1e-7, atol=1e-10, msg=name)
    assert all(named[name].grad is None for name in set(named) - set(weights))


def test_lora_is_that_of_peft():
    """The library by itself, on the whole of Hugging Face's model."""
    import peft

    base = recogniser(dtype=torch.float64, **STILL)
    model = model_of("lora", "both", base=copy.deepcopy(base), dtype=torch.float64).train()
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(base, options).double().eval()
    prefix = "base_model.model.model."
    own = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.removeprefix(prefix) for name in own} == set(ours)
    with torch.no_grad():
        for name, parameter in ours.items():
            own[prefix + name].copy_(parameter)
    features, labels = clips(dtype=torch.float64)
    for each in (theirs, model):
        each(input_features=features, labels=labels).loss.backward()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, own[prefix + name].grad, rtol=1e-7, atol=1e-10, msg=name)


def test_the_head_is_the_embedding_and_stays_it():
    model = model_of("full", "decoder").train()
    assert model.decoder.proj_out.weight is model.decoder.embed_tokens.weight
    features, labels = clips()
    steps(model)
    assert model.decoder.proj_out.weight is model.decoder.embed_tokens.weight
    # Of words that are never read the head's gradient alone is left, and it is there.
    model.zero_grad()
    model(features, labels=labels).loss.backward()
    read = set(ids_of(model, labels).flatten().tolist())
    never = [word for word in range(VOCABULARY) if word not in read]
    assert never and model.decoder.embed_tokens.weight.grad[never].any(1).all()


def test_smoothed_labels_with_a_head_that_trains():
    model = model_of("full", "both", dtype=torch.float64).train()
    features, labels = clips(dtype=torch.float64)
    scores = model(features, labels=labels, return_logits=True).logits
    truth = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    trains = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(truth, trains)
    found = torch.autograd.grad(model(features, labels=labels, label_smoothing=0.2).loss, trains)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_a_head_of_its_own_trains_and_is_saved(tmp_path):
    base = recogniser(tie_word_embeddings=False, **STILL)
    base.save_pretrained(tmp_path / "whisper")
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "whisper")
    model = model_of("full", "decoder", trained=False, base=loaded).train()
    assert {"decoder.proj_out.weight", "decoder.embed_tokens.weight"} <= set(trained(model))
    losses = steps(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "trained")
    again = MeftForConditionalGeneration.from_pretrained(tmp_path / "trained")
    features, labels = clips()
    expected = logits(model.eval(), features, ids_of(model, labels))
    assert torch.equal(logits(again, features, ids_of(model, labels)), expected)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, features, ids_of(model, labels)), expected, rtol=1e-4, atol=1e-4)


def saved_bytes(model, features, labels) -> int:
    """Bytes of activations that autograd keeps in a forward pass, parameters left out."""
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(features, labels=labels)
    return sum(kept.values())


@pytest.mark.parametrize(("method", "target"), [("full", "both"), ("lora", "both"), ("adapter", "decoder")])
def test_checkpointing_gives_the_same_gradients_for_less(method, target):
    """With dropout, whose masks the second computation has to draw again."""
    features, labels = clips()
    found, kept = [], []
    for checkpointing in (False, True):
        model = model_of(method, target, base=recogniser(decoder_layerdrop=0.0)).train()
        if checkpointing:
            model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        kept.append(saved_bytes(model, features, labels))
        torch.manual_seed(8)
        model(features, labels=labels).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert kept[1] < 0.6 * kept[0]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_dropout_of_the_backbone_is_that_of_hugging_face(monkeypatch):
    base = recogniser()
    plain = copy.deepcopy(base).train()
    plain.model.encoder.layerdrop = plain.model.decoder.layerdrop = 0.0
    model = model_of("full", "both", trained=False, base=base).train()
    features, labels = clips()
    losses = []
    monkeypatch.setattr(torch, "rand", lambda *_: torch.ones(()))  # which decides about LayerDrop
    for each in (plain, model):
        torch.manual_seed(4)
        losses.append(each(features, labels=labels).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    quiet = model.eval()(features, labels=labels).loss
    assert abs(quiet - losses[0]) > 1e-2
    found, expected = dict(model.named_parameters()), dict(plain.model.named_parameters())
    for name, parameter in found.items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_of_a_method_is_active_in_training_alone(target):
    base = recogniser(**STILL)
    model = model_of("lora", target, base=base, lora_dropout=0.5)
    features, labels = clips()
    ids = ids_of(model, labels)
    first, second = (logits(model.train(), features, ids) for _ in range(2))
    assert not torch.allclose(first, second)
    first, second = (logits(model.eval(), features, ids) for _ in range(2))
    assert torch.equal(first, second)


@EVERYWHERE
def test_can_be_counted_on_fake_tensors(method, target):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = get_meft_model(recogniser(**STILL), config_of(method, target)).train()
        with torch.set_grad_enabled(method != "mezo"):
            loss = model(torch.empty(2, 12, 48), labels=torch.zeros(2, 5, dtype=torch.long)).loss
        if method != "mezo":
            loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------- number formats


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["adapter", "lora", "adalora", "s2_lora"])
def test_a_backbone_in_half_precision(method, target):
    model = model_of(method, target, backbone_dtype="bfloat16").train()
    assert model.encoder.dtype == model.decoder.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    features, labels = clips()
    whole = model_of(method, target).train()(features, labels=labels).loss
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(features, labels=labels).loss
        loss.backward()
        assert loss.dtype == torch.float32 and abs(loss - whole) < 0.1 * whole
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.generate(features, num_beams=2).shape[0] == 3


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["full", "bitfit", "mezo"])
def test_weights_that_train_have_float32_masters(method, target):
    model = model_of(method, target, base=recogniser(**STILL).to(torch.bfloat16)).train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.decoder.proj_out.weight is model.decoder.embed_tokens.weight
    features, labels = clips()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(method != "mezo"):
        loss = model(features, labels=labels).loss
    if method != "mezo":
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------- saving, loading, merging


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    recogniser(**STILL).save_pretrained(folder)
    return folder


def loaded(folder):
    return WhisperForConditionalGeneration.from_pretrained(folder)


@EVERYWHERE
def test_save_load_and_merge(method, target, backbone_folder, tmp_path):
    model = model_of(method, target, base=loaded(backbone_folder)).eval()
    model.generation_config.max_length = 9
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(tensors) == set(trained(model)) | {n for n in model.state_dict() if "ranknum" in n}
    features, labels = clips()
    ids = ids_of(model, labels)
    expected, said = logits(model, features, ids), model.generate(features, num_beams=2)
    for cls in (MeftForConditionalGeneration, AutoModelForSpeechSeq2Seq):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is MeftForConditionalGeneration and not again.training
        assert torch.equal(logits(again, features, ids), expected)
        assert torch.equal(again.generate(features, num_beams=2), said)
        assert set(trained(again)) == set(trained(model))
        assert again.decoder.proj_out.weight is again.decoder.embed_tokens.weight
    assert "automatic-speech-recognition" in (tmp_path / "README.md").read_text()
    assert "recogniser trained by" in (tmp_path / "README.md").read_text()

    if not model.meft_config.can_merge:
        with pytest.raises(UserError, match="adapter cannot be merged into the backbone"):
            model.merge_and_unload()
        return
    plain = model.merge_and_unload()
    assert type(plain) is WhisperForConditionalGeneration and plain.dtype == torch.float32
    assert plain.proj_out.weight is plain.model.decoder.embed_tokens.weight
    torch.testing.assert_close(logits(plain, features, ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.generate(features, num_beams=2), said)
    assert (logits(loaded(backbone_folder), features, ids) - expected).abs().max() > 0.05
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(loaded(tmp_path / "plain").generate(features, num_beams=2), said)
    assert torch.equal(logits(model, features, ids), expected)  # and stays as it is


@pytest.mark.parametrize(("method", "target"), [("full", "decoder"), ("bitfit", "both"), ("s2_lora", "both")])
def test_a_self_contained_folder(method, target, backbone_folder, tmp_path):
    model = model_of(method, target, base=loaded(backbone_folder)).eval()
    model.save_pretrained(tmp_path / "saved", save_backbone=True)
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = MeftForConditionalGeneration.from_pretrained(tmp_path / "moved")
    features, labels = clips()
    ids = ids_of(model, labels)
    assert torch.equal(logits(again, features, ids), logits(model, features, ids))
    assert torch.equal(again.generate(features), model.generate(features))
    names = safetensors.torch.load_file(tmp_path / "moved/backbone/model.safetensors").keys()
    assert names == set(recogniser().state_dict()) - {"proj_out.weight"}


@pytest.mark.parametrize(
    ("method", "target"),
    [("lora", "both"), ("bitfit", "both"), ("full", "decoder"), ("full", "encoder"), ("adapter", "decoder")],
)
def test_another_backbone_is_noticed(method, target, backbone_folder, tmp_path):
    """By the part that does not train; of what trains all is saved."""
    model_of(method, target, base=loaded(backbone_folder)).save_pretrained(tmp_path)
    other = loaded(backbone_folder)
    part = other.model.decoder if target == "encoder" else other.model.encoder
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.warns(UserWarning, match="has other weights than the one"):
        MeftForConditionalGeneration.from_pretrained(tmp_path, backbone=other)


def test_what_trains_needs_no_backbone_to_be_known_by(backbone_folder, tmp_path):
    model_of("full", "both", base=loaded(backbone_folder)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base_model_fingerprint"] is None


def test_merging_says_what_a_plain_whisper_hears(caplog):
    model_of("lora", "both", max_frames=11).merge_and_unload()
    assert "a plain Whisper recogniser computes the whole window" in caplog.text


def test_copies():
    model = model_of("s2_lora", "both").eval()
    features, labels = clips()
    twin, ids = copy.deepcopy(model), ids_of(model, labels)
    expected = logits(model, features, ids)
    assert torch.equal(logits(twin, features, ids), expected)
    with torch.no_grad():
        twin.encoder.shared_factors["32x32"].lora_A.zero_()
    assert not torch.equal(logits(twin, features, ids), expected)
    assert torch.equal(logits(model, features, ids), expected)


# ---------------------------------------------------------------- options


def test_targets_are_named():
    with pytest.raises(UserError, match="target must be None, 'encoder' or 'decoder' or 'both', got 'side'"):
        LoRAConfig(target="side")
    for target in ("decoder", "both"):
        for config in (FullConfig, BitFitConfig, AdapterConfig, LoRAConfig, S2LoRAConfig, MeZOConfig):
            with pytest.raises(UserError, match="target must be None or 'encoder' for classification, which"):
                get_meft_model(tiny_whisper(), config(target=target))
    assert get_meft_model(tiny_whisper(), LoRAConfig(target="encoder")).encoder.trains_matrices is False
    with pytest.raises(UserError, match="must be None for lora, which trains inside the encoder"):
        LoRAConfig(target="both", backbone_quantization="int8")
    with pytest.raises(UserError, match="placement.* is not an option of lora"):
        MeftConfig.from_dict({"method": "lora", "placement": "decoder"})


def test_a_frozen_encoder_can_be_quantised():
    model = model_of("lora", "decoder", backbone_quantization="int8").train()
    assert model.encoder.quantization == "int8"
    losses = steps(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("target", TARGETS)
def test_a_backbone_that_carries_an_adapter_is_refused(target):
    base = recogniser()
    get_meft_model(base, LoRAConfig(target=target))
    with pytest.raises(UserError, match="base already carries an adapter of an earlier model"):
        get_meft_model(base, LoRAConfig(target="encoder"))


def test_a_loss_without_the_penalty_is_refused():
    model = model_of("adalora", "both").train()
    features, labels = clips()
    found = model(features, decoder_input_ids=ids_of(model, labels)).logits
    with pytest.raises(UserError, match="adalora adds a penalty to the loss"):
        found.sum().backward()
    model.penalty_elsewhere = True
    model(features, decoder_input_ids=ids_of(model, labels)).logits.sum().backward()


def test_parts_of_a_batch_hold_the_penalty_once():
    features, labels = clips()
    counted = (labels != -100).sum()
    model = model_of("s2_lora", "both", l1_weight=0.3).train()
    whole = model(features, labels=labels).loss
    parts = [
        model(features[rows], labels=labels[rows], num_items_in_batch=counted).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)
    quiet = model.eval()(features, labels=labels).loss
    torch.testing.assert_close(
        whole - quiet,
        0.3 * sum(p.abs().sum() for name, p in model.named_parameters() if "coefficients" in name),
    )


# ---------------------------------------------------------------- what methods do in training


class Spoken(torch.utils.data.Dataset):
    """Clips whose text is a constant added to some mel bins."""

    def __init__(self, size=12):
        self.features, _ = clips(size)
        self.words = torch.arange(size) % 3
        for i, word in enumerate(self.words):
            self.features[i, word * 3 : word * 3 + 3] += 2

    def __len__(self):
        return len(self.words)

    def __getitem__(self, i):
        word = int(self.words[i])
        return {"input_features": self.features[i], "labels": torch.tensor([5 + word, 9 + word, 2])}


def arguments(folder, kind=TrainingArguments, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(str(folder), **{**defaults, **options})


@pytest.mark.parametrize(
    ("method", "target"),
    [("full", "both"), ("lora_plus", "decoder"), ("adalora", "both"), ("s2_lora", "both")],
)
def test_a_stock_seq2seq_trainer_trains_and_generates(method, target, tmp_path):
    model = model_of(method, target, trained=False)
    generated = []

    def score(prediction):
        generated.append(prediction.predictions.shape)
        return {"tokens": float(prediction.predictions.shape[1])}

    options = {"predict_with_generate": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = Seq2SeqTrainer(
        model,
        arguments(tmp_path, Seq2SeqTrainingArguments, gradient_accumulation_steps=2, **options),
        train_dataset=Spoken(),
        eval_dataset=Spoken(4),
        compute_metrics=score,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0] and generated[0][0] == 4
    checkpoint = max(tmp_path.glob("checkpoint-*"))
    assert set(safetensors.torch.load_file(checkpoint / "model.safetensors")) == model.saved_names()


def test_adalora_allocates_one_budget_over_encoder_and_decoder(tmp_path):
    model = model_of("adalora", "both", trained=False, tfinal=4, allocation_interval=1)
    Seq2SeqTrainer(model, arguments(tmp_path, Seq2SeqTrainingArguments), train_dataset=Spoken()).train()
    ranks = {n: int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n}
    weights = 2 * (LAYERS + 2 * DECODER_LAYERS)
    assert len(ranks) == weights and sum(ranks.values()) == 3 * weights
    parts = [sum(r for n, r in ranks.items() if n.startswith(part)) for part in ("encoder", "decoder")]
    assert parts != [3 * 2 * LAYERS, 3 * 4 * DECODER_LAYERS]  # as a budget for each would give


def test_adalora_ranks_by_importance_across_the_parts():
    """A part without importance is what loses its ranks."""
    model = model_of("adalora", "both", tinit=0, tfinal=1, allocation_interval=1)

    class State:
        max_steps, global_step = 4, 2

    allocation = RankAllocation(model, model.meft_config)
    allocation.on_train_begin(None, State, None)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 1e-6 if name.startswith("encoder.") else 1.0
            parameter.grad = size * torch.randn_like(parameter)
    allocation.on_optimizer_step(None, State, None, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    left = {n: int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n}
    assert sum(left.values()) == 3 * len(left)
    assert sum(count for name, count in left.items() if name.startswith("encoder.")) == 0


def test_lora_plus_moves_b_faster_in_both_parts(tmp_path):
    moved = {}
    for config in (LoRAConfig, LoRAPlusConfig):
        torch.manual_seed(5)
        model = get_meft_model(recogniser(**STILL), config(r=4, lora_alpha=8))
        start = trained(model)
        options = arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=1, optim="sgd", max_grad_norm=0.0)
        Seq2SeqTrainer(model, options, train_dataset=Spoken()).train()
        moved[config] = {n: (p - start[n]).norm() for n, p in trained(model).items() if "lora_B" in n}
    assert len(moved[LoRAConfig]) == 2 * (LAYERS + 2 * DECODER_LAYERS)
    for name, slow in moved[LoRAConfig].items():
        torch.testing.assert_close(moved[LoRAPlusConfig][name], 16 * slow, rtol=1e-3, atol=1e-9)


def test_s2_lora_shares_its_factors_between_encoder_and_decoder():
    model = model_of("s2_lora", "both")
    layers = [*model.encoder.layers, *model.decoder.layers]
    assert len({id(layer.self_attn.v_proj.factors[0]) for layer in layers}) == 1
    assert (
        model.decoder.layers[0].encoder_attn.v_proj.factors
        == model.encoder.layers[0].self_attn.v_proj.factors
    )
    assert len({id(layer.fc1.factors[0]) for layer in layers}) == 1
    assert not list(model.decoder.shared_factors)
    other = model_of("s2_lora", "both", base=recogniser(decoder_ffn_dim=40, **STILL))
    assert list(other.decoder.shared_factors) == ["40x32"]
    alone = model_of("s2_lora", "decoder")
    assert set(alone.decoder.shared_factors) == {"32x32", "48x32"}


def test_where_lora_and_adapters_sit_in_a_decoder():
    lora = {n.removeprefix("decoder.layers.0.") for n in trained(model_of("lora", "decoder"))}
    for attention in ("self_attn", "encoder_attn"):
        for name in ("q_proj", "v_proj"):
            assert f"{attention}.{name}.lora_A.default.weight" in lora
    adapter = {n.removeprefix("decoder.layers.0.") for n in trained(model_of("adapter", "decoder"))}
    for name in ("self_attn.out_proj", "encoder_attn.out_proj", "fc2"):
        assert f"{name}.down.weight" in adapter


@pytest.mark.parametrize("target", TARGETS)
def test_mezo_learns_by_forward_passes(target, tmp_path):
    model = model_of("mezo", target, trained=False)
    features, labels = clips()
    with pytest.raises(UserError, match="mezo trains without gradients: use whisper_meft.MeftTrainer"):
        model.train()(features, labels=labels)
    options = arguments(tmp_path, max_steps=60, learning_rate=1e-3, per_device_train_batch_size=12)
    trainer = MeftTrainer(model=model, args=options, train_dataset=Spoken(), eval_dataset=Spoken())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


@pytest.mark.parametrize("method", ["lora", "lora_plus", "adalora"])
def test_the_own_trainer_too(method, tmp_path):
    model = model_of(method, "both", trained=False)
    options = arguments(tmp_path, max_steps=40)
    trainer = MeftTrainer(model=model, args=options, train_dataset=Spoken(), eval_dataset=Spoken())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("method", ["full", "adalora"])
def test_resume_equals_the_uninterrupted_run(method, tmp_path):
    extra = {"allocation_interval": 2, "tfinal": 3} if method == "adalora" else {}
    found = []
    for stops in ([], [StopAt(4)], []):
        folder = tmp_path / ("whole" if not found else "parts")
        model = model_of(method, "both", trained=False, **extra)
        options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "seed": 3}
        trainer = Seq2SeqTrainer(
            model,
            arguments(folder, Seq2SeqTrainingArguments, **options),
            train_dataset=Spoken(),
            callbacks=stops,
        )
        trainer.train(resume_from_checkpoint=len(found) == 2)
        found.append(trained(model))
    for name, tensor in found[0].items():
        assert torch.equal(found[2][name], tensor), name
    assert any(not torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


DDP_METHODS = {"full": "both", "s2_lora": "both", "adapter": "decoder", "mezo": "decoder"}
DDP_OPTIONS = {"max_steps": 3, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "seed": 3}
DDP_SCRIPT = """
import sys
import torch

tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
from test_transcription_methods import DDP_METHODS, ddp_run, trained

for method, target in DDP_METHODS.items():
    model = ddp_run(method, target, folder, 2)
    torch.save(trained(model), f"{folder}/{method}-{torch.distributed.get_rank()}.pt")
"""


def ddp_run(method, target, folder, size):
    model = model_of(method, target, trained=False)
    more = {"per_device_train_batch_size": size, "ddp_find_unused_parameters": False, **DDP_OPTIONS}
    MeftTrainer(model=model, args=arguments(folder, **more), train_dataset=Spoken()).train()
    return model


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    (tmp_path / "run.py").write_text(DDP_SCRIPT)
    two_processes(tmp_path / "run.py", Path(__file__).parent, tmp_path)
    for method, target in DDP_METHODS.items():
        start = trained(model_of(method, target, trained=False))
        single = trained(ddp_run(method, target, tmp_path, 4))
        ranks = [torch.load(tmp_path / f"{method}-{rank}.pt") for rank in (0, 1)]
        for name, tensor in single.items():
            assert torch.equal(ranks[0][name], ranks[1][name]), (method, name)
            torch.testing.assert_close(ranks[0][name], tensor, rtol=2e-5, atol=2e-5, msg=name)
        assert any(not torch.equal(start[name], tensor) for name, tensor in single.items())
