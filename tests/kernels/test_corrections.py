"""Side networks whose output is added to the backbone's: zero at the start, exact, and causal for tokens."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import meft_kernels
from meft_kernels import reference

WIDTH, LAYERS, FACTOR = 24, 3, 4
NETWORKS = pytest.mark.parametrize("name", ["LST", "UniPT", "CausalUniPT"])
PACKAGES = pytest.mark.parametrize("package", [meft_kernels, reference], ids=["ops", "reference"])


def build(package, name, trained=True, **options):
    torch.manual_seed(0)
    side = getattr(package, name)(WIDTH, LAYERS, FACTOR, correction=True, dtype=torch.float64, **options)
    if trained:
        with torch.no_grad():
            for parameter in side.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return side


def states(tokens=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        0.5 + torch.randn(2, tokens, WIDTH, generator=generator, dtype=torch.float64)
        for _ in range(LAYERS + 1)
    ]


@PACKAGES
@NETWORKS
def test_zero_at_the_start_with_a_gradient_to_the_widening(name, package):
    side = build(package, name, trained=False)
    out = side(states())
    assert out.shape == (2, 7, WIDTH) and not out.any()
    (out * torch.randn_like(out)).sum().backward()
    assert side.up.linear.weight.grad.norm() > 0.1 and side.norm is None
    assert not any(key.startswith("norm.") for key in side.state_dict())


@PACKAGES
@NETWORKS
def test_the_correction_is_the_widened_state(name, package):
    side, hidden_states = build(package, name), states()
    state = side.state(hidden_states, None)
    up = side.up
    normed = F.layer_norm(state, state.shape[-1:], up.norm.weight, up.norm.bias, 1e-5)
    torch.testing.assert_close(side(hidden_states), F.linear(normed, up.linear.weight, up.linear.bias))
    with pytest.raises(ValueError, match="pooled is (for correction=False|not for CausalUniPT)"):
        side.pooled(hidden_states)


@NETWORKS
def test_outputs_and_gradients_are_the_readable_modules(name):
    fast, plain = build(meft_kernels, name), build(reference, name)
    upstream = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    results = [side(states()) for side in (fast, plain)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)
    for out in results:
        out.backward(upstream)
    for (key, ours), theirs in zip(fast.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-9, msg=key)


@PACKAGES
def test_causal_unipt_token_by_token(package):
    """Each token worked out alone from the formulas, with only what came before it."""
    side, hidden_states = build(package, "CausalUniPT"), states()

    def projected(i):
        down = side.down[i]
        normed = F.layer_norm(hidden_states[i], (WIDTH,), down.norm.weight, down.norm.bias, 1e-5)
        return F.linear(normed, down.linear.weight, down.linear.bias)

    *features, anchor = map(projected, range(LAYERS + 1))
    found = side.state(hidden_states, None)
    for clip in range(2):
        for t in range(7):
            a, merged, confidence = anchor[clip, t], [], []
            for feature in features:
                before = feature[clip, : t + 1]
                scores = torch.relu(before @ a)
                merged.append(scores @ before / (scores.sum() + 1e-7) + feature[clip, t])
                confidence.append((side.gate.weight[0] * a * feature[clip, t]).sum())
            mixed = sum(c * m for c, m in zip(torch.stack(confidence).softmax(0), merged))
            adapter = side.adapter
            normed = F.layer_norm(mixed, mixed.shape, adapter.norm.weight, adapter.norm.bias, 1e-5)
            expected = a + adapter.linear_2(F.gelu(adapter.linear_1(normed)))
            torch.testing.assert_close(found[clip, t], expected, rtol=1e-9, atol=1e-10)


@PACKAGES
@pytest.mark.parametrize("name", ["LST", "CausalUniPT"])
def test_a_token_does_not_see_the_ones_behind_it(name, package):
    side = build(package, name)
    before, changed = states(), states()
    for state in changed:
        state[:, 4:] = torch.randn_like(state[:, 4:])
    a, b = side(before), side(changed)
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4:], b[:, 4:])


@PACKAGES
def test_causal_unipt_with_a_cache_is_the_same(package):
    side, hidden_states = build(package, "CausalUniPT"), states()
    whole, cache, parts = side.state(hidden_states, None), [], []

    def past(features):
        cache[:] = [torch.cat(both, 1) for both in zip(cache, features)] if cache else features
        return cache

    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        parts.append(side.state([state[:, part] for state in hidden_states], None, past=past))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)


@PACKAGES
def test_causal_unipt_leaves_out_tokens_that_are_not_valid(package):
    side, hidden_states = build(package, "CausalUniPT"), states()
    short = side.state([state[:, 2:] for state in hidden_states], None)
    valid = torch.arange(7).expand(2, 7) >= 2
    padded = side.state(hidden_states, None, valid=valid)
    torch.testing.assert_close(padded[:, 2:], short, rtol=1e-11, atol=1e-12)


@PACKAGES
def test_sherl_that_starts_at_zero_shot(package):
    side = package.SHERL(WIDTH, LAYERS, FACTOR, start="zero_shot", dtype=torch.float64)
    hidden_states = states()
    out = side(hidden_states)
    assert torch.equal(out, hidden_states[LAYERS - 1])
    (out * torch.randn_like(out)).sum().backward()
    assert side.out.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="start must be 'published' or 'even' or 'zero_shot', got 'open'"):
        package.SHERL(WIDTH, LAYERS, FACTOR, start="open")


# ---------------------------------------------------------------- one that hears, and one that writes


PAIRS = pytest.mark.parametrize("kind", ["Ladder", "UniPT"])


def pair(package, kind, trained=True):
    torch.manual_seed(0)
    place = {"dtype": torch.float64} | ({"adapter_dim": 10} if kind == "Ladder" else {})
    memory, decoder = (
        getattr(package, f"{kind}Memory")(WIDE, 2, 2, **place),
        getattr(package, f"{kind}Decoder")(WIDE, LAYERS, 2, **place),
    )
    if trained:
        with torch.no_grad():
            for parameter in (*memory.parameters(), *decoder.parameters()):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return memory, decoder


WIDE = 128  # two heads at half of it


def wide_states(tokens, number, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, WIDE, generator=generator, dtype=torch.float64) for _ in range(number)]


def written(decoder, states, heard, **options):
    return decoder.widen(decoder.state(states, None, heard, **options))


@PAIRS
@PACKAGES
def test_a_pair_starts_at_zero(package, kind):
    memory, decoder = pair(package, kind, trained=False)
    heard, states = memory(wide_states(11, 3, 1)), wide_states(5, LAYERS + 1, 2)
    assert heard.shape == (2, 11, WIDE // 2) and memory.up is None
    out = written(decoder, states, heard)
    assert out.shape == (2, 5, WIDE) and not out.any()
    with pytest.raises(ValueError, match="memory must be the encoder"):
        decoder(states)
    with pytest.raises(ValueError, match="correction must be False"):
        getattr(package, f"{kind}Memory")(WIDE, 2, correction=True)
    with pytest.raises(ValueError, match="pooled is"):
        memory.pooled(wide_states(11, 3, 1))


@PACKAGES
@pytest.mark.parametrize(("size", "heads"), [(8, 1), (48, 1), (64, 2), (80, 2), (96, 3), (100, 2), (160, 5)])
def test_heads_are_of_about_32(package, size, heads):
    attention = reference.side_decoder.SideAttention(size, dtype=torch.float64)
    assert attention.heads == heads
    x = torch.randn(2, 6, size, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(size, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        parts = attention.query, attention.key, attention.value
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        biases = [attention.query.bias, torch.zeros(size), attention.value.bias]
        theirs.in_proj_bias.copy_(torch.cat(biases))
        theirs.out_proj.weight.copy_(attention.out.weight)
        theirs.out_proj.bias.copy_(attention.out.bias)
    keys, values = (attention.split(x, part) for part in (attention.key, attention.value))
    torch.testing.assert_close(attention.attend(x, keys, values, None), theirs(x, x, x)[0])


@PAIRS
def test_a_pair_on_the_ops_is_the_readable_one(kind):
    results = []
    for package in (meft_kernels, reference):
        memory, decoder = pair(package, kind)
        out = written(decoder, wide_states(5, LAYERS + 1, 2), memory(wide_states(11, 3, 1)))
        out.backward(torch.ones_like(out).cumsum(-1))
        results.append([out.detach(), *(p.grad for p in (*memory.parameters(), *decoder.parameters()))])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-7)


@PAIRS
@PACKAGES
def test_all_may_listen_to_one_clip_and_else_each_to_its_own(package, kind, monkeypatch):
    monkeypatch.setattr(meft_kernels.modules, "_SCORES", 1)  # a clip at a time
    memory, decoder = pair(package, kind)
    heard, states = memory(wide_states(11, 3, 1)), wide_states(5, LAYERS + 1, 2)
    one = heard[:1]
    found, expected = (written(decoder, states, each) for each in (one, one.expand(2, -1, -1)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    parameters = [*memory.parameters(), *decoder.parameters()]
    outputs = (found, expected)
    grads = [torch.autograd.grad(each, parameters, upstream, retain_graph=True) for each in outputs]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for wrong in (heard.repeat(2, 1, 1), heard[:0], heard[..., :-1], heard[0]):
        with pytest.raises(ValueError, match=r"memory must be .* of shape \(2 or 1, T, 64\), got \("):
            decoder.state(states, None, wrong)


@PAIRS
@PACKAGES
def test_hooks_on_parts_of_a_pair_run_or_are_told_of(package, kind):
    memory, decoder = pair(package, kind)
    heard, states = memory(wide_states(3, 3, 1)).detach(), wide_states(2, LAYERS + 1, 2)
    for name, part in decoder.named_modules():
        if not name or isinstance(part, torch.nn.ModuleList):
            continue
        ran = []
        handle = part.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            written(decoder, states, heard)
        sentence = f"forward hooks of a {type(part).__name__} in a side network do not run: "
        assert ran or sentence in str([each.message for each in told]), name
        handle.remove()


class Cache:
    """Keeps what earlier tokens left behind, as a generation does."""

    def __init__(self):
        self.kept = {}

    def of_a_ladder(self, rung, listens, make):
        if listens:
            return self.kept.setdefault((rung, listens), make())
        before, now = self.kept.get((rung, listens)), make()
        self.kept[rung, listens] = (
            now if before is None else tuple(torch.cat(each, 2) for each in zip(before, now))
        )
        return self.kept[rung, listens]

    def of_unipt(self, features):
        before = self.kept.get("features")
        self.kept["features"] = (
            features if before is None else [torch.cat(each, 1) for each in zip(before, features)]
        )
        return self.kept["features"]


@PAIRS
@PACKAGES
def test_a_pair_writes_causally_and_the_same_with_a_cache(package, kind):
    memory, decoder = pair(package, kind)
    heard, states = memory(wide_states(11, 3, 1)), wide_states(6, LAYERS + 1, 2)
    whole = written(decoder, states, heard)
    changed = [state.clone() for state in states]
    for state in changed:
        state[:, 4:] = torch.randn_like(state[:, 4:])
    assert torch.equal(written(decoder, changed, heard)[:, :4], whole[:, :4])
    other = written(decoder, states, heard + 0.1)
    assert not torch.allclose(other, whole, atol=1e-3)  # it listens
    cache = Cache()
    options = {"cache": cache.of_a_ladder} if kind == "Ladder" else {"past": cache.of_unipt}
    parts = [
        written(decoder, [state[:, part] for state in states], heard, **options)
        for part in (slice(0, 3), slice(3, 4), slice(4, 6))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-11)
    valid = torch.arange(6).expand(2, 6) >= 2
    short = written(decoder, [state[:, 2:] for state in states], heard)
    padded = written(decoder, states, heard, valid=valid)
    torch.testing.assert_close(padded[:, 2:], short, rtol=1e-10, atol=1e-11)
    assert padded.isfinite().all()


@PACKAGES
def test_unipt_listens_token_by_token(package):
    """Each token worked out alone from the formulas."""
    memory, decoder = pair(package, "UniPT")
    heard, states = memory(wide_states(11, 3, 1)), wide_states(5, LAYERS + 1, 2)
    with torch.no_grad():
        decoder.listening[1].linear.bias[0] = 3  # so that their order shows

    def projected(i):
        down = decoder.down[i]
        normed = F.layer_norm(states[i], (WIDE,), down.norm.weight, down.norm.bias, 1e-5)
        return F.linear(normed, down.linear.weight, down.linear.bias)

    *features, anchor = map(projected, range(LAYERS + 1))
    listened = []
    for feature, each in zip(features, decoder.listening):
        rows = torch.empty_like(feature)
        for clip in range(2):
            for t in range(5):
                scores = torch.relu(heard[clip] @ feature[clip, t])
                x = scores @ heard[clip] / (scores.sum() + 1e-7)
                x = F.linear(x, each.linear.weight, each.linear.bias)
                x = F.layer_norm(x, x.shape, each.norm.weight, each.norm.bias, 1e-5)
                rows[clip, t] = feature[clip, t] + x
        listened.append(rows)
    gate = decoder.gate.weight, decoder.gate.bias
    mixed = reference.causal_attention.definition(anchor, *gate, listened)
    expected = anchor + decoder.adapt(mixed)
    torch.testing.assert_close(decoder.state(states, None, heard), expected, rtol=1e-9, atol=1e-10)


def test_unipt_that_listens_keeps_no_scores_of_frames():
    """Scores of all frames are many times what else is kept."""
    memory, decoder = pair(meft_kernels, "UniPT")
    heard, states, saved = memory(wide_states(400, 3, 1)).detach(), wide_states(50, LAYERS + 1, 2), {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        written(decoder, states, heard)
    assert saved and 2 * 50 * 400 * heard.itemsize not in saved.values()
