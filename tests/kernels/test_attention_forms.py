"""UniPT's attention in its forms: what each is, where they agree, and that padding does not count."""

import copy
import math

import pytest
import torch

import meft_kernels
from meft_kernels import native, ops, reference, use_backend
from meft_kernels.testing import Case, outputs_and_gradients

FORMS = ("exact", "pooled:1", "pooled:3", "pooled:8", "pooled:100", "linear", "summary")


def inputs_of(batch=2, frames=13, side=6, layers=3, seed=0, dtype=torch.float64):
    return Case("relu_attention", batch=batch, frames=frames, side=side, layers=layers).inputs(
        dtype, seed=seed
    )


def apply(form, *, anchor, gate_weight, gate_bias, features, lengths=None):
    """The attention of a form by the public ops."""
    if form == "linear":
        return ops.linear_attention(anchor, gate_weight, gate_bias, features, lengths)
    if form == "summary":
        return reference.summary_attention.definition(anchor, gate_weight, gate_bias, lengths, features)
    _, pool = reference.parse_attention(form)
    return ops.relu_attention(anchor, gate_weight, gate_bias, features, lengths, pool)


def frame_by_frame(form, anchor, gate_weight, gate_bias, features, length):
    """One clip's output (length, r), a frame and a key at a time, in Python's own numbers."""
    query, width = anchor[:length].tolist(), anchor.shape[1]
    kind, pool = reference.parse_attention(form)

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b))

    def relu(a):
        return [max(x, 0.0) for x in a]

    def mean(rows):
        return [sum(column) / len(rows) for column in zip(*rows)]

    merged, confidences = [], []
    for feature in features:
        rows = feature[:length].tolist()
        groups = [rows[start : start + pool] for start in range(0, length, pool)]
        attended = []
        for a in query:
            if kind == "summary":
                weights, keys = [1.0] * length, rows
            elif kind == "linear":
                weights, keys = [dot(relu(a), relu(key)) for key in rows], rows
            else:
                keys = [mean(group) for group in groups]
                weights = [len(group) * max(dot(a, key), 0.0) for group, key in zip(groups, keys)]
            total = sum(weights) + (0 if kind == "summary" else 1e-7)
            attended.append([sum(w * key[i] for w, key in zip(weights, keys)) / total for i in range(width)])
        merged.append([[x + y for x, y in zip(*pair)] for pair in zip(attended, rows)])
        product = [x * y for x, y in zip(mean(query), mean(rows))]
        confidences.append(dot(gate_weight[0].tolist(), product) + gate_bias.item())
    shares = [math.exp(confidence - max(confidences)) for confidence in confidences]
    shares = [share / sum(shares) for share in shares]
    return torch.tensor(
        [
            [sum(s * layer[t][i] for s, layer in zip(shares, merged)) for i in range(width)]
            for t in range(length)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("form", FORMS)
def test_is_the_formula(form):
    inputs = inputs_of()
    inputs["lengths"] = torch.tensor([13, 7])
    found = apply(form, **inputs)
    for clip, length in enumerate((13, 7)):
        given = (inputs["anchor"][clip], inputs["gate_weight"], inputs["gate_bias"])
        expected = frame_by_frame(form, *given, [f[clip] for f in inputs["features"]], length)
        torch.testing.assert_close(found[clip, :length], expected, rtol=1e-11, atol=1e-12)


def results(form, inputs, upstream):
    return outputs_and_gradients(lambda **given: apply(form, **given), inputs, upstream)


@pytest.mark.parametrize("form", FORMS)
def test_masked_equals_trimmed(form):
    """Value and gradients of a padded clip are those of the clip cut short, whatever its padding holds."""
    inputs = inputs_of()
    length = 7
    inputs["lengths"] = torch.tensor([length, 13])
    for padded in (inputs["anchor"], *inputs["features"]):
        padded[0, length:] *= 1000
    upstream = torch.randn(2, 13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream[0, length:] = 0
    upstream[1] = 0  # so that the gate's gradient is the first clip's
    found = results(form, inputs, upstream)
    cut = {**inputs, "lengths": None, "anchor": inputs["anchor"][:1, :length]}
    cut["features"] = [feature[:1, :length] for feature in inputs["features"]]
    expected = results(form, cut, upstream[:1, :length])
    for name, value in expected.items():
        got = found[name]
        if got.ndim == 3:
            assert name == "out" or not got[0, length:].any(), name
            got = got[:1, :length]
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pooled_by_one_frame_is_exact(dtype, backend):
    inputs = inputs_of(dtype=dtype)
    upstream = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    with use_backend(backend):
        found, expected = (results(form, inputs, upstream) for form in ("pooled:1", "exact"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def one_key_alone(frames=24, pool=1):
    """Inputs of which every product is exact in fp32, with one key that has all of each query's weight, or
    but a 4096th; an upstream gradient."""
    generator = torch.Generator().manual_seed(0)

    def eighths(*shape):
        return torch.randint(-15, 16, shape, generator=generator) / 8

    anchor = torch.zeros(2, frames, 6)
    anchor[..., 0] = 0.5 ** torch.randint(0, 16, (2, frames), generator=generator)
    features = eighths(2, 2, frames, 6).repeat_interleave(pool, 2)[:, :, :frames]
    features[..., 0] = -1
    features[:, :, pool : 2 * pool, 0] = 1
    features[:, 1, :pool, 0] = 1 / 4096
    inputs = {"anchor": anchor, "gate_weight": torch.zeros(1, 6), "gate_bias": torch.zeros(1)}
    return {**inputs, "features": list(features)}, eighths(2, frames, 6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("pool", [1, 5])
def test_gradients_of_a_query_with_one_key_do_not_cancel(pool, backend):
    if backend == "native" and not native.LOADED:
        pytest.skip(native.REASON)
    inputs, upstream = one_key_alone(pool=pool)
    exact = outputs_and_gradients(ops.relu_attention, {**inputs, "pool": pool}, upstream, torch.float64)
    with use_backend(backend):
        found = outputs_and_gradients(ops.relu_attention, {**inputs, "pool": pool}, upstream)
    for name in ("anchor", "features[0]", "features[1]"):
        size = exact[name].norm(dim=-1)
        error = (found[name].double() - exact[name]).norm(dim=-1)
        assert size.any() and (error <= 1e-5 * size).all(), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", [2, 4, 5])
def test_pooled_is_exact_on_features_that_are_constant_over_groups(pool, masked):
    inputs = inputs_of()
    inputs["lengths"] = torch.tensor([13, 6]) if masked else None
    inputs["features"] = [
        feature[:, ::pool].repeat_interleave(pool, 1)[:, :13].contiguous() for feature in inputs["features"]
    ]
    found, expected = (apply(form, **inputs) for form in (f"pooled:{pool}", "exact"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_linear_is_exact_where_nothing_is_negative(masked):
    inputs = inputs_of()
    inputs["lengths"] = torch.tensor([13, 6]) if masked else None
    inputs["anchor"] = inputs["anchor"].abs()
    inputs["features"] = [feature.abs() for feature in inputs["features"]]
    upstream = torch.randn(2, 13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = (results(form, inputs, upstream) for form in ("linear", "exact"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_all_agree_on_constant_features(form):
    """Where every frame is the same and looks the anchor's way: all attend to that frame."""
    inputs = inputs_of()
    inputs["anchor"] = inputs["anchor"].abs()
    inputs["features"] = [feature[:, :1].abs().repeat(1, 13, 1) for feature in inputs["features"]]
    expected = apply("exact", **inputs)
    rtol = 1e-12 if form.startswith(("pooled", "linear")) else 1e-7  # which has no epsilon
    torch.testing.assert_close(apply(form, **inputs), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("pool", [0, -1, 2.0, True, "2"])
def test_pool_must_be_a_positive_integer(pool):
    with pytest.raises(ValueError, match="pool must be a positive integer, got"):
        ops.relu_attention(**inputs_of(), pool=pool)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_does_not_overflow_nor_underflow(form):
    """A window of 1500 frames with features as large as pretrained models have, and a loss scale's
    gradients; products with operands rounded to fp16, as on CUDA."""
    case = Case("relu_attention", batch=1, frames=1500, side=24, layers=2)
    inputs = case.inputs(torch.float16)
    inputs["features"] = [8 * (feature + 0.5) for feature in inputs["features"]]
    upstream = 5e-4 * torch.randn(1, 1500, 24, generator=torch.Generator().manual_seed(1))
    half = upstream.half()
    wide = {
        name: [each.double() for each in value] if isinstance(value, list) else value
        for name, value in inputs.items()
    }
    wide |= {name: wide[name].double() for name in ("anchor", "gate_weight", "gate_bias")}
    truth = results(form, wide, half.double())

    def rounded(a, b, dtype):
        return a.to(dtype).float() @ b.to(dtype).float()

    with pytest.MonkeyPatch.context() as patch, use_backend("reference"):
        for module in (reference.relu_attention, reference.linear_attention):
            patch.setattr(module, "matmul", rounded)
        found = results(form, inputs, half)
    for name in ("out", "anchor", "features[0]"):
        error = (found[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 0.1, (name, error)  # keys are rounded to fp16; what underflows is off by tenths


def test_clips_of_no_or_few_frames_have_finite_gradients_in_half_precision():
    """Beside a whole one; products with operands rounded to fp16, as on CUDA."""
    case = Case("relu_attention", batch=4, frames=1500, side=8, layers=2)
    inputs = {**case.inputs(torch.float16), "lengths": torch.tensor([0, 1, 20, 1500])}
    given = (*(inputs[name] for name in ("anchor", "gate_weight", "gate_bias", "lengths", "features")),)
    upstream = torch.randn(4, 1500, 8, generator=torch.Generator().manual_seed(1)).half()
    wide = [each.double() if torch.is_tensor(each) and each.is_floating_point() else each for each in given]
    wide[-1] = [feature.double() for feature in inputs["features"]]
    truth = reference.linear_attention.backward(upstream.double(), *wide)
    with pytest.MonkeyPatch.context() as patch:
        rounded = lambda a, b, dtype: a.to(dtype).float() @ b.to(dtype).float()  # noqa: E731
        patch.setattr(reference.linear_attention, "matmul", rounded)
        found = reference.linear_attention.backward(upstream, *given)
    for one, exact in zip(found[3:], truth[3:], strict=True):
        assert one.isfinite().all()
        assert (one.double() - exact).norm() <= 1e-2 * exact.norm()


# --- the modules --------------------------------------------------------------------------------------------


def states(width=12, layers=3, frames=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [0.3 + torch.randn(2, frames, width, dtype=dtype, generator=generator) for _ in range(layers + 1)]


def network(package, form, kind="UniPT", **options):
    torch.manual_seed(7)
    side = getattr(package, kind)(12, 3, 2, dtype=torch.float64, attention=form, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return side


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_module_equals_the_readable_one(form, backend):
    fast, plain = network(meft_kernels, form), network(reference, form)
    lengths = torch.tensor([7, 4])
    upstream = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with use_backend(backend):
        out = fast.pooled(states(), lengths)
        grads = torch.autograd.grad(out, list(fast.parameters()), upstream)
    expected = plain.pooled(states(), lengths)
    expected_grads = torch.autograd.grad(expected, list(plain.parameters()), upstream)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    for (name, _), got, value in zip(fast.named_parameters(), grads, expected_grads, strict=True):
        if name != "gate.bias":
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["UniPT", "UniPTMemory"])
def test_forms_share_their_parameters(kind):
    exact = network(meft_kernels, "exact", kind)
    outputs = []
    for form in FORMS:
        other = getattr(meft_kernels, kind)(12, 3, 2, dtype=torch.float64, attention=form)
        other.load_state_dict(exact.state_dict())
        outputs.append(other(states()))
        assert ("attention=" in repr(other)) == (form != "exact")
    assert torch.equal(outputs[0], outputs[1])
    assert all(not torch.allclose(outputs[0], each, rtol=1e-3) for each in outputs[2:])


@pytest.mark.parametrize("package", [meft_kernels, reference])
def test_a_form_may_be_set_later(package):
    side = network(package, "exact")
    for form in FORMS[::-1]:
        side.attention = form
        assert torch.equal(side.pooled(states()), network(package, form).pooled(states()))
        assert repr(copy.deepcopy(side)) == repr(network(package, form))
    with pytest.raises(ValueError, match="attention must be 'exact', 'pooled:p'"):
        side.attention = "Linear"
    assert side.attention == FORMS[0]
    with pytest.raises(ValueError, match="attention must be 'exact' where"):
        network(package, "exact", "CausalUniPT").attention = "linear"


@pytest.mark.parametrize("keep", ["exact", "fp8"])
@pytest.mark.parametrize("form", ["pooled:3", "linear", "summary"])
def test_saved_activations_and_corrections(form, keep):
    """8-bit copies change weight gradients a little and the output not at all."""
    side = network(meft_kernels, form, saved_activations=keep, correction=True)
    exact = network(meft_kernels, form, correction=True)
    out, expected = side(states()), exact(states())
    torch.testing.assert_close(out, expected)
    weights = side.down[1].linear.weight, exact.down[1].linear.weight
    grads = [torch.autograd.grad(o.sum(), w)[0].flatten() for o, w in zip((out, expected), weights)]
    assert torch.cosine_similarity(*grads, 0) > 0.99


@pytest.mark.parametrize("form", ["pooled:3", "linear", "summary"])
def test_autocast_and_hidden_states_that_need_gradients(form):
    side = network(meft_kernels, form).float()
    given = [state.float().requires_grad_() for state in states()]
    expected = torch.autograd.grad(side.pooled(given).square().sum(), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = side.pooled(given)
    assert out.dtype == torch.bfloat16
    for found, value in zip(torch.autograd.grad(out.float().square().sum(), given), expected, strict=True):
        assert torch.cosine_similarity(found.flatten(), value.flatten(), 0) > 0.95


@pytest.mark.parametrize("form", ["pooled:3", "linear"])
def test_second_derivative_is_refused(form):
    inputs = inputs_of()
    inputs["anchor"].requires_grad_()
    (grad,) = torch.autograd.grad(apply(form, **inputs).sum(), inputs["anchor"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "attention",
    ["", "pooled", "pooled:", "pooled:0", "pooled:-1", "pooled:2.5", "pooled:x", "Linear", None, 8]
    + [
        "pooled:²",
        f"pooled:{2**31}",
        "pooled:" + "0" * 11 + "1" + "0" * 20,
        "pooled:000",
        "pooled:" + "9" * 5000,
        "linear:2",
        " exact",
    ],
)
def test_another_word_is_refused(attention):
    assert reference.parse_attention("pooled:" + "0" * 20 + "8") == ("relu", 8)
    with pytest.raises(ValueError, match="attention must be 'exact', 'pooled:p' with a positive number p"):
        meft_kernels.UniPT(12, 3, 2, attention=attention)


def test_no_form_but_exact_where_time_runs_one_way():
    for cls in (meft_kernels.CausalUniPT, reference.CausalUniPT):
        with pytest.raises(ValueError, match="attention must be 'exact' where no token may see what follows"):
            cls(12, 3, 2, attention="pooled:4")
        cls(12, 3, 2, attention="pooled:1")
