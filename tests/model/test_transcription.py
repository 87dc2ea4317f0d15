"""MeftForConditionalGeneration: zero-shot start, causality, gradients, generation, saving and loading."""

import copy
import json
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from modelling_fixtures import CONFIGS, LAYERS, MELS, WINDOW, randomise, tiny_whisper
from recognition_fixtures import TOKENS, VOCABULARY, clips, ids_of, ids_of_plain, logits, recogniser
from tokens_fixtures import spelling_tokenizer
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from whisper_meft import (
    HeadConfig,
    LoRAConfig,
    LSTConfig,
    MeftForConditionalGeneration,
    MeftModel,
    SHERLConfig,
    UniPTConfig,
    UserError,
    get_meft_model,
)
from whisper_meft.data import Collator, Example, TranscriptTokens
from whisper_meft.decoder import chunked as decoder_chunked
from whisper_meft.encoder import chunked as encoder_chunked
from whisper_meft.once import warn_once

METHODS = pytest.mark.parametrize("method", list(CONFIGS))
PLACEMENTS = pytest.mark.parametrize("placement", ["encoder", "decoder"])
# Every method in every placement that it has.
EVERYWHERE = pytest.mark.parametrize(
    ("method", "placement"),
    [*((m, p) for m in CONFIGS for p in ("encoder", "decoder")), ("lst", "both"), ("unipt", "both")],
)


def model_of(method, placement, trained=True, base=None, dtype=None, **options):
    config = CONFIGS[method](reduction_factor=4, placement=placement, **options)
    model = get_meft_model(recogniser(dtype=dtype) if base is None else base, config)
    return randomise(model) if trained else model


# ---------------------------------------------------------------- the start


@EVERYWHERE
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_step_0_is_the_backbone_bit_for_bit(method, placement, attention):
    base = recogniser(attn_implementation=attention)
    plain = copy.deepcopy(base).eval()
    model = model_of(method, placement, trained=False, base=base).train()
    features, labels = clips()
    ids = ids_of(model, labels)
    # Hugging Face's decoder, on what our encoder hears: that has kernels of its own.
    if method == "sherl" and placement == "encoder":
        *_, before_last, _ = model.encoder.stream(features)
        heard = model.encoder.last_layer(before_last)
    else:
        *_, last = model.encoder.stream(features)
        heard = model.encoder.layer_norm(last)
    found = logits(model, features, ids)
    assert torch.equal(found, logits(plain, None, ids, encoder_outputs=(heard,)))
    torch.testing.assert_close(found, logits(plain, features, ids), rtol=1e-4, atol=1e-5)
    loss = model(features, labels=labels).loss
    torch.testing.assert_close(loss, plain(features, labels=labels).loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model.generate(features, num_beams=3), plain.generate(features, num_beams=3), rtol=0, atol=0
    )


@EVERYWHERE
def test_languages_are_detected_as_by_the_backbone_at_the_start(method, placement):
    base = recogniser()
    base.generation_config.lang_to_id = {"<|nl|>": 5, "<|de|>": 6, "<|en|>": 7}
    features = clips(6)[0]
    expected = copy.deepcopy(base).eval().detect_language(features, num_segment_frames=features.shape[2])
    model = model_of(method, placement, trained=False, base=base).train()
    found = model.detect_language(features, num_segment_frames=features.shape[2])
    assert torch.equal(found, expected) and model.training


@EVERYWHERE
def test_a_step_changes_what_it_should_and_the_backbone_keeps_every_bit(method, placement):
    base = recogniser()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = model_of(method, placement, trained=False, base=base).train()
    features, labels = clips()
    start = model(features, labels=labels).loss
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        model(features, labels=labels).loss.backward()
        optimizer.step()
    # Of SHERL the gate is open and flat at the start; UniPT's bias is none of its output's business.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name != "side_network.gate" and not name.endswith(".gate.bias"):
            assert parameter.grad.any(), name
    assert model(features, labels=labels).loss < start - 0.01
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


# ---------------------------------------------------------------- what sees what


@EVERYWHERE
def test_no_logit_sees_the_tokens_behind_it(method, placement):
    model = model_of(method, placement).eval()
    features, labels = clips()
    ids = ids_of(model, labels)
    whole = logits(model, features, ids)
    for token in range(1, TOKENS):
        changed = ids.clone()
        changed[:, token] = (changed[:, token] + 5) % (VOCABULARY - 1)
        other = logits(model, features, changed)
        assert torch.equal(other[:, :token], whole[:, :token])
        assert not torch.allclose(other[:, token:], whole[:, token:])


@EVERYWHERE
def test_neighbours_and_padding_change_nothing(method, placement):
    model = model_of(method, placement, dtype=torch.float64).eval()
    features, labels = clips(dtype=torch.float64)
    ids = ids_of(model, labels)
    whole, loss = logits(model, features, ids), model(features, labels=labels).loss
    losses = []
    for i in range(len(ids)):
        counted = int((labels[i] != -100).sum())
        alone = logits(model, features[i : i + 1], ids[i : i + 1, :counted])
        torch.testing.assert_close(alone[0], whole[i, :counted], rtol=1e-9, atol=1e-10)
        one = model(features[i : i + 1], labels=labels[i : i + 1, :counted], num_items_in_batch=1)
        losses.append(one.loss)
    torch.testing.assert_close(sum(losses) / (labels != -100).sum(), loss, rtol=1e-9, atol=1e-10)


@EVERYWHERE
def test_tokens_padded_on_the_left_are_not_looked_at(method, placement):
    """As long-form generation pads the texts so far of several recordings."""
    model = model_of(method, placement, dtype=torch.float64).eval()
    features, labels = clips(dtype=torch.float64)
    ids = ids_of(model, labels)
    ids = torch.cat([torch.full((3, 2), 7), ids], 1)
    mask = torch.arange(ids.shape[1]).expand(3, -1) >= 2
    whole = logits(model, features, ids, decoder_attention_mask=mask.long())
    ids[:, :2] = torch.tensor([11, 4])
    other = logits(model, features, ids, decoder_attention_mask=mask.long())
    torch.testing.assert_close(other[:, 2:], whole[:, 2:], rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- generation


@EVERYWHERE
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_with_caches_is_that_without(method, placement, options):
    model = model_of(method, placement, dtype=torch.float64).eval()
    features, _ = clips(dtype=torch.float64)
    with_cache = model.generate(features, **options)
    assert torch.equal(with_cache, model.generate(features, use_cache=False, **options))
    plain = recogniser(dtype=torch.float64).eval().generate(features, **options)
    assert with_cache.shape != plain.shape or not torch.equal(with_cache, plain)


@EVERYWHERE
def test_attentions_and_states_come_once_however_often_it_generates(method, placement):
    """transformers collects them by hooks on the layers, which every generation and the base share."""
    base = recogniser(attn_implementation="eager").eval()
    plain = copy.deepcopy(base)
    model = model_of(method, placement, trained=False, base=base).eval()
    features, _ = clips()
    options = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    expected = plain.generate(features, **options)
    for whisper in (model, model, model, base):
        found = whisper.generate(features, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for name in ("cross_attentions", "decoder_attentions", "decoder_hidden_states"):
            for one, other in zip(found[name], expected[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@PLACEMENTS
def test_times_of_tokens_are_those_of_the_backbone(placement):
    base = recogniser(attn_implementation="eager").eval()
    base.generation_config.alignment_heads = [[0, 0], [1, 1]]
    plain = copy.deepcopy(base)
    model = model_of("lst", placement, trained=False, base=base).eval()
    features, _ = clips()
    expected = plain.generate(features, return_token_timestamps=True)["token_timestamps"]
    assert expected.max() > 0
    for whisper in (model, model, model, base):
        assert torch.equal(
            whisper.generate(features, return_token_timestamps=True)["token_timestamps"], expected
        )


@EVERYWHERE
def test_a_cache_of_fixed_length_is_used_or_refused(method, placement):
    model = model_of(method, placement).eval()
    features, _ = clips()
    options = {"cache_implementation": "static", "max_new_tokens": 6}
    if placement == "both" or (method, placement) == ("unipt", "decoder"):
        with pytest.raises(UserError, match="cache_implementation must be None or 'dynamic'.*StaticLayer"):
            model.generate(features, **options)
    else:
        assert torch.equal(model.generate(features, **options), model.generate(features, max_new_tokens=6))


@EVERYWHERE
def test_greedy_generation_follows_the_logits(method, placement):
    model = model_of(method, placement, dtype=torch.float64).eval()
    features, _ = clips(dtype=torch.float64)
    found = model.generate(features, suppress_tokens=[], begin_suppress_tokens=[])
    ids = torch.tensor([[model.decoder.config.decoder_start_token_id, VOCABULARY - 1]]).repeat(3, 1)
    for step in range(found.shape[1]):
        best = logits(model, features, ids)[:, -1].argmax(-1)
        going = (found[:, :step] != 2).all(1)  # not ended yet
        assert torch.equal(best[going], found[going, step])
        ids = torch.cat([ids, found[:, step : step + 1]], 1)


def test_a_generation_config_in_its_place_among_the_arguments():
    model, (features, _) = model_of("lst", "encoder").eval(), clips()
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.eos_token_id = 3, None
    found = model.generate(features, config)
    assert torch.equal(found, model.generate(features, generation_config=config))
    assert found.shape[1] < model.generate(features).shape[1]


@EVERYWHERE
def test_generation_from_encoder_outputs(method, placement):
    model = model_of(method, placement).eval()
    features, labels = clips()
    heard = model.get_encoder()(features)
    assert torch.equal(model.generate(encoder_outputs=heard), model.generate(features))
    ids = ids_of(model, labels)
    assert torch.equal(logits(model, None, ids, encoder_outputs=heard), logits(model, features, ids))
    beams = model.generate(features, num_beams=2)
    for form in (heard, (heard[0],), [heard[0]]):
        assert torch.equal(model.generate(encoder_outputs=form, num_beams=2), beams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_timestamps": True}, "return_timestamps cannot be True with encoder_outputs"),
        (
            {"num_return_sequences": 2, "num_beams": 2},
            "num_return_sequences cannot be 2 with encoder_outputs",
        ),
        ({"temperature": (0.0, 0.5)}, r"temperature cannot be \(0.0, 0.5\) with encoder_outputs"),
        ({"input_features": clips()[0]}, "one of input_features and encoder_outputs"),
        ({"encoder_outputs": clips()[0]}, "encoder_outputs must be .*, got a Tensor"),
        ({"encoder_outputs": (clips()[0][0],)}, r"encoder_outputs must be .*, got \(\d+, \d+\)"),
        ({"generation_config": GenerationConfig(return_timestamps=True)}, "return_timestamps cannot be True"),
    ],
)
def test_what_hears_again_is_refused_with_encoder_outputs(options, message):
    model = model_of("lst", "encoder").eval()
    given = {"encoder_outputs": model.get_encoder()(clips()[0]), **options}
    with pytest.raises(UserError, match=message):
        model.generate(**given)


# ---------------------------------------------------------------- gradients, against a plain reimplementation


def normed(x, weights, prefix):
    return F.layer_norm(x, x.shape[-1:], weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], 1e-5)


def linear(x, weights, prefix):
    return F.linear(x, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])


def mlp(x, weights, prefix):
    hidden = F.gelu(linear(normed(x, weights, f"{prefix}.norm"), weights, f"{prefix}.linear_1"))
    return linear(hidden, weights, f"{prefix}.linear_2")


def lst_state(weights, states):
    def down(i):
        return linear(normed(states[i], weights, f"down.{i}.norm"), weights, f"down.{i}.linear")

    state = down(0)
    for i in range(1, len(states)):
        gate = torch.sigmoid(weights[f"rungs.{i - 1}.gate"] / 0.1)
        state = gate * state + (1 - gate) * down(i)
        state = state + mlp(state, weights, f"rungs.{i - 1}")
    return state


def unipt_state(weights, states, causal, memory=None):
    *features, anchor = (
        linear(normed(state, weights, f"down.{i}.norm"), weights, f"down.{i}.linear")
        for i, state in enumerate(states)
    )
    if memory is not None:
        for i, feature in enumerate(features):
            scores = torch.relu(feature @ memory.mT)
            heard = scores / (scores.sum(-1, keepdim=True) + 1e-7) @ memory
            heard = normed(linear(heard, weights, f"listening.{i}.linear"), weights, f"listening.{i}.norm")
            features[i] = feature + heard
    merged, confidence = [], []
    for feature in features:
        scores = torch.relu(anchor @ feature.mT)
        scores = scores.tril() if causal else scores
        merged.append(scores / (scores.sum(-1, keepdim=True) + 1e-7) @ feature + feature)
        product = anchor * feature if causal else (anchor.mean(1) * feature.mean(1))[:, None]
        confidence.append(linear(product, weights, "gate"))
    mixed = (torch.stack(confidence).softmax(0) * torch.stack(merged)).sum(0)
    return anchor + mlp(mixed, weights, "adapter")


def sherl_input(weights, states):
    gated = []
    for i, state in enumerate(states):
        p = torch.relu(linear(state, weights, f"down.{i}.linear_1"))
        z = linear(p, weights, f"down.{i}.linear_2") + p
        gated.append(z * torch.sigmoid(linear(p, weights, f"down.{i}.linear_3")))
    *shallow, deep = gated
    directions = [z / (z.norm(dim=-1, keepdim=True) + 1e-6) for z in shallow]
    pulls = []
    for z, direction in zip(shallow, directions):
        rho = sum(torch.relu((direction * other).sum(-1, keepdim=True)) for other in directions)
        pull = torch.relu(linear(z * deep, weights, "guide"))
        pulls.append(torch.where(rho > 0, pull / rho.clamp(min=1e-30), 0))
    total = sum(pull.abs() for pull in pulls) + 1e-6
    y = sum(pull / total * z for pull, z in zip(pulls, shallow)) + deep
    return linear(torch.relu(y), weights, "out") + torch.tanh(weights["gate"] / 0.1) * states[-1]


def attended(x, heard, weights, prefix, causal):
    """Attention of one head, as wide as the side networks of these tests."""
    query = linear(x, weights, f"{prefix}.query")
    scores = query @ F.linear(heard, weights[f"{prefix}.key.weight"]).mT / x.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -1e300)
    return linear(scores.softmax(-1) @ linear(heard, weights, f"{prefix}.value"), weights, f"{prefix}.out")


def pair_state(method, weights, heard_states, states):
    memory, weights = (
        {name.removeprefix(part): w for name, w in weights.items() if name.startswith(part)}
        for part in ("memory.", "decoder.")
    )
    if method == "unipt":
        heard = unipt_state(memory, heard_states, causal=False)
        state = unipt_state(weights, states, causal=True, memory=heard)
        return linear(normed(state, weights, "up.norm"), weights, "up.linear")
    heard = normed(lst_state(memory, heard_states), memory, "norm")

    def down(i):
        return linear(normed(states[i], weights, f"down.{i}.norm"), weights, f"down.{i}.linear")

    state = down(0)
    for i in range(len(states) - 1):
        gate = torch.sigmoid(weights[f"rungs.{i}.gate"] / 0.1)
        state = gate * state + (1 - gate) * down(i + 1)
        x = normed(state, weights, f"speaking.{i}.norm")
        state = state + attended(x, x, weights, f"speaking.{i}", causal=True)
        x = normed(state, weights, f"listening.{i}.norm")
        state = state + attended(x, heard, weights, f"listening.{i}", causal=False)
        state = state + mlp(state, weights, f"rungs.{i}")
    return linear(normed(state, weights, "up.norm"), weights, "up.linear")


def raw_states(layers, run):
    """What each of Hugging Face's layers takes while ``run`` runs, and what the last one gives."""
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, given, out: seen.append(out)))
    run()
    for hook in hooks:
        hook.remove()
    return seen


def plain_loss(base, method, placement, weights, features, labels):
    """The whole model written with Hugging Face's modules and formulas, for autograd."""
    encoder, decoder = base.model.encoder, base.model.decoder
    states = raw_states(encoder.layers, lambda: encoder(features))
    up = "up.norm", "up.linear"
    if placement == "encoder" and method == "sherl":
        heard = encoder.layer_norm(encoder.layers[-1](sherl_input(weights, states[:-1]), None))
    else:
        heard = encoder.layer_norm(states[-1])
        if placement == "encoder":
            state = (
                lst_state(weights, states) if method == "lst" else unipt_state(weights, states, causal=False)
            )
            heard = heard + linear(normed(state, weights, up[0]), weights, up[1])
    ids = ids_of_plain(base, labels)

    def run():
        return decoder(input_ids=ids, encoder_hidden_states=heard, use_cache=False).last_hidden_state

    if placement == "encoder":
        output = run()
    elif placement == "both":
        own = raw_states(decoder.layers, run)
        output = decoder.layer_norm(own[-1]) + pair_state(method, weights, states, own)
    elif method == "sherl":
        states = raw_states(decoder.layers, run)[:-1]
        mask = torch.full((ids.shape[1],) * 2, -1e300, dtype=heard.dtype).triu(1)[None, None]
        output = decoder.layer_norm(
            decoder.layers[-1](sherl_input(weights, states), mask, heard, use_cache=False)
        )
    else:
        states = raw_states(decoder.layers, run)
        state = lst_state(weights, states) if method == "lst" else unipt_state(weights, states, causal=True)
        output = decoder.layer_norm(states[-1]) + linear(normed(state, weights, up[0]), weights, up[1])
    return F.cross_entropy(base.proj_out(output).flatten(0, 1), labels.flatten())


@EVERYWHERE
@pytest.mark.parametrize("small", [False, True], ids=["kept", "recomputed"])
def test_every_gradient_is_that_of_a_plain_reimplementation(method, placement, small, monkeypatch):
    if small:  # every layer computed again, one clip at a time, also of the encoder
        monkeypatch.setattr(decoder_chunked, "_KEPT_BYTES", 0)
        monkeypatch.setitem(decoder_chunked._LAYER_BYTES, "cpu", 1)
        monkeypatch.setattr(encoder_chunked, "_KEPT_BYTES", 0)
        monkeypatch.setitem(encoder_chunked._INNER_ELEMENTS, "cpu", 1)
    base = recogniser(dtype=torch.float64).eval()
    model = model_of(method, placement, base=copy.deepcopy(base))
    if method == "sherl":  # whose gate is too far open for a gradient
        torch.nn.init.constant_(model.side_network.gate, 0.05)
    features, labels = clips(dtype=torch.float64)
    weights = {
        name: tensor.detach().double().requires_grad_()
        for name, tensor in model.side_network.named_parameters()
    }
    model.side_network.double()
    truth = plain_loss(base, method, placement, weights, features, labels)
    gradients = torch.autograd.grad(truth, list(weights.values()), allow_unused=True)
    loss = model.train()(features, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-10)
    for (name, parameter), expected in zip(model.side_network.named_parameters(), gradients):
        if name.endswith("gate.bias"):  # zero, but for rounding
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-9
            continue
        assert expected is not None and expected.any(), name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-9, msg=name)


def test_recomputing_keeps_less():
    def kept(limit):
        model = model_of("lst", "encoder", base=recogniser(max_source_positions=WINDOW)).train()
        features, labels = clips()
        saved = {}

        def note(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        before = decoder_chunked._KEPT_BYTES
        decoder_chunked._KEPT_BYTES = limit
        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                model(features, labels=labels)
        finally:
            decoder_chunked._KEPT_BYTES = before
        own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        return sum(size for place, size in saved.items() if place not in own)

    assert kept(0) < 0.8 * kept(2**28)


# ---------------------------------------------------------------- number formats


@EVERYWHERE
def test_a_backbone_in_half_precision(method, placement):
    model = model_of(method, placement, backbone_dtype="bfloat16").train()
    assert model.encoder.dtype == model.decoder.dtype == torch.bfloat16
    assert model.decoder.proj_out.weight is model.decoder.embed_tokens.weight
    assert all(p.dtype == torch.float32 for p in model.side_network.parameters())
    features, labels = clips()
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(features, labels=labels).loss
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
    whole = model_of(method, placement)
    assert abs(loss - whole(features, labels=labels).loss) < 0.1 * loss
    assert model.generate(features).shape[0] == 3


@PLACEMENTS
def test_autocast_of_a_float32_backbone(placement):
    model = model_of("lst", placement).train()
    features, labels = clips()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(features, labels=labels).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.side_network.parameters())


# ---------------------------------------------------------------- saving and loading


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    recogniser().save_pretrained(folder)
    return folder


def loaded(folder):
    return WhisperForConditionalGeneration.from_pretrained(folder)


@EVERYWHERE
def test_save_and_load(method, placement, backbone_folder, tmp_path):
    model = model_of(method, placement, base=loaded(backbone_folder)).eval()
    model.generation_config.max_length = 9
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"side_network"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["task"] == "transcription" and config["architectures"] == ["MeftForConditionalGeneration"]
    features, labels = clips()
    for cls in (MeftForConditionalGeneration, AutoModelForSpeechSeq2Seq):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is MeftForConditionalGeneration and not again.training
        assert torch.equal(again(features, labels=labels).logits, model(features, labels=labels).logits)
        assert torch.equal(again.generate(features), model.generate(features))
        assert again.generation_config.max_length == 9
    assert "automatic-speech-recognition" in (tmp_path / "README.md").read_text()


def test_what_is_set_in_a_generation_config_is_loaded_wherever_it_is_from(backbone_folder, tmp_path):
    """As of a folder without generation_config.json."""
    base = loaded(backbone_folder)
    base.generation_config = GenerationConfig.from_model_config(base.config)
    base.generation_config.language = "nl"
    model = get_meft_model(base, LoRAConfig(r=2))
    model.generation_config.lang_to_id = {"<|nl|>": 5}
    model.save_pretrained(tmp_path / "saved", save_backbone=True)
    path = tmp_path / "saved" / "generation_config.json"
    before = json.loads(path.read_text())
    for values in (before, {**before, "_from_model_config": True}):  # as earlier versions wrote it
        path.write_text(json.dumps(values))
        again = MeftForConditionalGeneration.from_pretrained(tmp_path / "saved")
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        for found in (again, WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged")):
            assert found.generation_config.language == "nl"
            assert found.generation_config.lang_to_id == {"<|nl|>": 5}


@PLACEMENTS
def test_a_self_contained_folder(placement, backbone_folder, tmp_path):
    model = model_of("lst", placement, base=loaded(backbone_folder)).eval()
    model.save_pretrained(tmp_path / "saved", save_backbone=True)
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = MeftForConditionalGeneration.from_pretrained(tmp_path / "moved")
    features, labels = clips()
    assert torch.equal(again(features, labels=labels).logits, model(features, labels=labels).logits)
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path / "moved" / "backbone")
    expected = loaded(backbone_folder).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in plain.state_dict().items())


def test_the_wrong_class_is_named(backbone_folder, tmp_path):
    model_of("lst", "encoder", base=loaded(backbone_folder)).save_pretrained(tmp_path / "hears")
    with pytest.raises(UserError, match="for transcription, MeftModel is for classification: load it by"):
        MeftModel.from_pretrained(tmp_path / "hears")
    with pytest.raises(UserError, match="load it by MeftForConditionalGeneration"):
        AutoModelForAudioClassification.from_pretrained(tmp_path / "hears")
    get_meft_model(tiny_whisper(), LSTConfig()).save_pretrained(tmp_path / "names", save_backbone=True)
    with pytest.raises(UserError, match="for classification, .* load it by MeftModel"):
        MeftForConditionalGeneration.from_pretrained(tmp_path / "names")
    with pytest.raises(UserError, match="backbone must be a WhisperForConditionalGeneration, got"):
        MeftForConditionalGeneration.from_pretrained(tmp_path / "hears", backbone=tiny_whisper())


def test_a_task_that_is_none_is_named(backbone_folder, tmp_path):
    model_of("lst", "encoder", base=loaded(backbone_folder)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"task": "translation"}))
    with pytest.raises(UserError, match="task must be classification or transcription, got 'translation'"):
        MeftForConditionalGeneration.from_pretrained(tmp_path)


def test_another_decoder_is_noticed(backbone_folder, tmp_path):
    model_of("lst", "encoder", base=loaded(backbone_folder)).save_pretrained(tmp_path)
    other = loaded(backbone_folder)
    with torch.no_grad():
        for parameter in other.model.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.warns(UserWarning, match="has other weights than the one"):
        MeftForConditionalGeneration.from_pretrained(tmp_path, backbone=other)


def test_a_backbone_without_a_decoder_is_named(tmp_path):
    model = get_meft_model(tiny_whisper(), LSTConfig())
    model.save_pretrained(tmp_path / "encoder", save_backbone=True)
    model_of("lst", "encoder").save_pretrained(tmp_path / "saved", save_backbone=True)
    with pytest.raises(UserError, match="backbone: .* lacks .* tensors"):
        MeftForConditionalGeneration.from_pretrained(
            tmp_path / "saved", backbone=tmp_path / "encoder" / "backbone"
        )


def test_copies():
    model = model_of("unipt", "decoder").eval()
    features, labels = clips()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(features, labels=labels).logits, model(features, labels=labels).logits)
    with torch.no_grad():
        twin.side_network.up.linear.weight.zero_()
        twin.decoder.layer_norm.weight.zero_()
    assert torch.equal(model.generate(features), copy.deepcopy(model).generate(features))
    assert not torch.equal(twin(features, labels=labels).logits, model(features, labels=labels).logits)


@pytest.mark.parametrize(("method", "placement"), [("unipt", "decoder"), ("lst", "encoder")])
def test_a_model_that_has_generated_is_pickled(method, placement):
    base = recogniser().eval()
    model = model_of(method, placement, base=base).eval()
    features, labels = clips()
    expected = model.generate(features)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.generate(features), expected)
    assert torch.equal(model.generate(features), expected)
    pickle.dumps(model)
    # The base gives hidden states as before, each once.
    states = base(features, decoder_input_ids=ids_of(model, labels), output_hidden_states=True)
    assert len(states.decoder_hidden_states) == base.config.decoder_layers + 1


# ---------------------------------------------------------------- options and inputs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HeadConfig(), "method must be one of .*full, .*lst, unipt, sherl.* for recognition, got 'head'"),
        (LSTConfig(max_frames="longest"), "max_frames must be 'fidelity' or a number for recognition"),
        (LSTConfig(pooling="statistics"), "pooling is of classification; nothing is pooled for recognition"),
        (LSTConfig(max_frames=WINDOW + 1), f"max_frames must be at most {WINDOW}"),
        (LSTConfig(layers=[LAYERS + 3]), r"layers must lie in 1..3"),
        (LSTConfig(placement="decoder", layers=[4]), r"layers must lie in 1..3"),
    ],
)
def test_options_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        get_meft_model(
            recogniser(encoder_layers=5)
            if "lie" in message and config.placement == "decoder"
            else recogniser(),
            config,
        )


def test_placements_are_for_recognition():
    with pytest.raises(UserError, match="placement must be 'encoder' or 'decoder' or 'both', got 'side'"):
        LSTConfig(placement="side")
    with pytest.raises(UserError, match="placement must be 'encoder' for classification"):
        get_meft_model(tiny_whisper(), LSTConfig(placement="decoder"))
    with pytest.raises(UserError, match="placement must be 'encoder' or 'decoder' for sherl, got 'both'"):
        SHERLConfig(placement="both")
    for config in (LSTConfig, UniPTConfig):
        with pytest.raises(UserError, match="layers must be None for placement='both'"):
            config(placement="both", layers=[1])
    with pytest.raises(UserError, match="start must be None, 'published' or 'even' or 'zero_shot', got"):
        SHERLConfig(start="random")


def test_where_sherl_starts():
    features, labels = clips()
    zero_shot = model_of("sherl", "encoder", trained=False)
    assert zero_shot.side_network.gate == 2 and not zero_shot.side_network.out.weight.any()
    published = model_of("sherl", "encoder", trained=False, start="published")
    assert published.side_network.gate == 0 and published.side_network.out.weight.any()
    assert get_meft_model(tiny_whisper(), SHERLConfig()).side_network.gate == 0
    assert get_meft_model(tiny_whisper(), SHERLConfig(start="zero_shot")).side_network.gate == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "labels or decoder_input_ids are needed: to transcribe, call generate"),
        ({"input_features": None}, "one of input_features, encoder_outputs and hidden_states is needed"),
        ({"labels": torch.full((3, 4), VOCABULARY)}, r"labels must lie in 0..19, the vocabulary, got 20"),
        ({"labels": torch.full((3, 4), -1)}, r"labels must lie in 0..19, the vocabulary, got -1"),
        ({"labels": torch.full((3, 17), 4)}, "labels must hold 1 to 16 tokens"),
        ({"labels": torch.full((2, 4), 4)}, r"labels must be token numbers of shape \(3, tokens\)"),
        ({"labels": torch.ones(3, 4)}, "labels must be token numbers"),
        ({"labels": [[4]]}, "labels must be a torch.Tensor"),
        ({"decoder_input_ids": torch.full((3, 2), 4)}, "labels must have the shape of decoder_input_ids"),
        ({"input_features": torch.zeros(3, MELS, 9)}, "input_features must have 48 frames"),
        ({"past_key_values": DynamicCache()}, "past_key_values must be None: forward reads token numbers"),
        ({"decoder_inputs_embeds": torch.zeros(3, 2, 16)}, "decoder_inputs_embeds must be None"),
        ({"decoder_position_ids": torch.arange(3)[None]}, "decoder_position_ids must be None"),
        ({"use_cache": True}, "use_cache must be None: .* keeps no cache; generate does"),
    ],
)
def test_bad_inputs_are_named(changes, message):
    features, labels = clips()
    with pytest.raises(UserError, match=message):
        model_of("lst", "encoder")(**{"input_features": features, "labels": labels, **changes})


@PLACEMENTS
def test_a_shorter_window(placement):
    model = model_of("lst", placement, max_frames=10, dtype=torch.float64).eval()
    features, labels = clips(dtype=torch.float64)
    with pytest.raises(
        UserError, match="a clip has sound up to frame 48 of its log-mel, max_frames 10 keeps 20"
    ):
        model(features, labels=labels)
    with pytest.raises(UserError, match="a clip has sound up to frame 48"):
        model.generate(features)
    features[..., 20:] = -1.5
    ids = ids_of(model, labels)
    assert torch.equal(logits(model, features, ids), logits(model, features[..., :20], ids))
    heard = model.get_encoder()(features).last_hidden_state
    assert heard.shape[1] == 10 and model.generate(features).shape[0] == 3


def test_spec_augment_of_the_config_is_said_not_to_be_done(caplog):
    warn_once.cache_clear()
    features, labels = clips()
    for asked in (False, True):
        model = model_of("lst", "encoder", base=recogniser(apply_spec_augment=asked))
        model.eval()(features, labels=labels)
        assert "SpecAugment" not in caplog.text
        model.train()(features, labels=labels)
    assert "apply_spec_augment" in caplog.text and "--augment spec" in caplog.text


def test_smoothed_labels_and_logits_on_demand():
    model = model_of("lst", "encoder").train()
    features, labels = clips()
    found = model(features, labels=labels, label_smoothing=0.2)
    assert found.logits is None
    whole = model(features, labels=labels, return_logits=True).logits
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    assert len(model(features, labels=labels, return_dict=False)) == 1
    assert model.eval()(features, labels=labels, return_logits=False).logits is None


class Spoken(torch.utils.data.Dataset):
    """Clips whose text is a constant added to some mel bins."""

    def __init__(self, size=12):
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(size, MELS, 2 * WINDOW, generator=generator)
        self.words = torch.arange(size) % 3
        for i, word in enumerate(self.words):
            self.features[i, word * 3 : word * 3 + 3] += 2

    def __len__(self):
        return len(self.words)

    def __getitem__(self, i):
        word = int(self.words[i])
        return {"input_features": self.features[i], "labels": torch.tensor([5 + word, 9 + word, 2])}


@PLACEMENTS
def test_a_stock_seq2seq_trainer_trains_and_generates(placement, tmp_path):
    model = model_of("lst", placement, trained=False)
    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=1e-2,
        predict_with_generate=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to=[],
        use_cpu=True,
    )
    generated = []

    def score(prediction):
        generated.append(prediction.predictions.shape)
        return {"tokens": float(prediction.predictions.shape[1])}

    trainer = Seq2SeqTrainer(
        model, arguments, train_dataset=Spoken(), eval_dataset=Spoken(4), compute_metrics=score
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0] and len(generated) == 3 and generated[0][0] == 4
    checkpoint = max(tmp_path.glob("checkpoint-*"))
    saved = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert set(saved) == {f"side_network.{name}" for name in model.side_network.state_dict()}


def test_batches_of_transcripts_train_it_and_the_prompt_does_not_count():
    tokenizer = spelling_tokenizer("dutch")
    base = recogniser(vocab_size=len(tokenizer), max_target_positions=24)
    model = get_meft_model(base, LSTConfig(placement="encoder", reduction_factor=4)).eval()
    tokens = TranscriptTokens(tokenizer, longest=24)
    items = []
    for i, text in enumerate(["ja", "nee, zeker niet"]):
        ids = {name: torch.tensor(row) for name, row in tokens(Example(f"{i}.wav", text=text)).items()}
        features = torch.randn(MELS, 2 * WINDOW, generator=torch.Generator().manual_seed(i))
        items.append({"input_features": features, "attention_mask": torch.ones(2 * WINDOW), **ids})
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)
    batch = Collator(extractor, WINDOW, tokens.end)(items)
    out = model(batch["input_features"], decoder_input_ids=batch["decoder_input_ids"], labels=batch["labels"])
    said = torch.tensor([item["labels"][-1] for item in items])
    assert torch.equal(said, torch.full_like(said, tokenizer.eos_token_id))
    counted = []
    for row, item in zip(out.logits, items):
        start = len(tokens.prompt) - 1
        scores, wanted = row[start : len(item["labels"])], item["labels"][start:]
        assert torch.equal(wanted, torch.cat([item["decoder_input_ids"][start + 1 :], wanted[-1:]]))
        counted.append(F.cross_entropy(scores, wanted, reduction="none"))
    torch.testing.assert_close(out.loss, torch.cat(counted).mean())
