"""Every op on the shared case table: values, all gradients, and what autograd, compile and autocast ask."""

import warnings
from dataclasses import replace

import pytest
import torch

from meft_kernels import native, ops, use_backend
from meft_kernels.ops import autograd, backends
from meft_kernels.testing import (
    CASES,
    Case,
    assert_as_good_as_torch,
    flat_tensors,
    outputs_and_gradients,
    relative_error,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONE_EACH = list({(case.op, case.pool > 1): case for case in reversed(CASES)}.values())


def by_name(case):
    return case.name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_as_good_as_torch(case, dtype, device, poisoned_memory):
    with use_backend("reference" if device == "cpu" else "auto"):
        assert_as_good_as_torch(case, dtype, device)


def test_yardstick_catches_a_wrong_gradient(monkeypatch):
    case = ONE_EACH[0]
    broken = autograd.make_function(case.op)
    apply = broken.apply
    monkeypatch.setattr(broken, "apply", lambda *arguments: apply(*arguments) * 1.0001)
    monkeypatch.setitem(autograd.FUNCTIONS, case.op, broken)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good_as_torch(case, torch.float32)


@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_blocks_do_not_change_the_result(case, monkeypatch):
    """Rows worked through one at a time give what one block gives."""
    from meft_kernels.reference import common

    inputs = case.inputs(torch.float64)
    upstream = torch.randn(case.definition()(**inputs).shape, dtype=torch.float64)
    whole = outputs_and_gradients(case.function(), inputs, upstream)
    monkeypatch.setitem(common.BLOCK_ELEMENTS, "cpu", 1)
    parts = outputs_and_gradients(case.function(), inputs, upstream)
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize("keeping", [False, True], ids=["", "keeping"])
@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_opcheck(case, keeping, monkeypatch):
    """Schema, fake and dispatch of the forward and the backward op, on detached inputs."""
    from torch.library import opcheck

    if keeping and case.op not in native.KEEPING:
        pytest.skip("no kernel of it hands a projection on")
    if not keeping:
        monkeypatch.setattr(native, "KEEPING", frozenset())
    captured = {}

    def spied(find):
        def spy(*which):
            kernel = find(*which)

            def run(*arguments):
                captured[which[0]] = (kernel.default, arguments)
                return kernel(*arguments)

            return run

        return spy

    inputs = case.inputs(torch.float32)
    for tensor in flat_tensors(inputs).values():
        tensor.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(backends, "kernel", spied(backends.kernel))
        patch.setattr(native, "kernel", spied(native.kernel))
        case.function()(**inputs).sum().backward()

    def detach(value):
        if isinstance(value, (list, tuple)):
            return [detach(item) for item in value]
        return value.detach() if isinstance(value, torch.Tensor) else value

    called = f"{case.op}_keeping" if keeping else case.op
    assert {called, f"{called}_bwd"} <= set(captured)
    for op, arguments in captured.values():
        opcheck(op, tuple(detach(argument) for argument in arguments))


@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_subsets_of_inputs_needing_grad(case):
    inputs = case.inputs(torch.float32)
    upstream = torch.randn(case.definition()(**inputs).shape)
    everything = outputs_and_gradients(case.function(), inputs, upstream)
    for name, tensor in flat_tensors(inputs).items():
        tensor.requires_grad_()
        out = case.function()(**inputs)
        assert out.requires_grad
        grads = torch.autograd.grad(out, [tensor], upstream)
        assert torch.equal(grads[0], everything[name]), name
        tensor.requires_grad_(False)
    assert not case.function()(**inputs).requires_grad


@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_same_bits_twice_and_inputs_untouched(case):
    inputs = case.inputs(torch.float32)
    before = {name: tensor.clone() for name, tensor in flat_tensors(inputs).items()}
    upstream = torch.randn(case.definition()(**inputs).shape)
    first = outputs_and_gradients(case.function(), inputs, upstream)
    second = outputs_and_gradients(case.function(), inputs, upstream)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], tensor) for name, tensor in flat_tensors(inputs).items())


def _strided(value):
    """The same values behind other strides: every second element of a wider, transposed buffer."""
    if isinstance(value, list):
        return [_strided(item) for item in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        wide = torch.stack([value, torch.full_like(value, torch.nan)], -1)
        order = list(range(value.ndim))[::-1]
        return wide.permute(*order, value.ndim).contiguous().permute(*order, value.ndim)[..., 0]
    return value


@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_non_contiguous_inputs(case):
    inputs = case.inputs(torch.float64)
    upstream = torch.randn(case.definition()(**inputs).shape, dtype=torch.float64)
    expected = outputs_and_gradients(case.function(), inputs, upstream)
    strided = {name: _strided(value) for name, value in inputs.items()}
    assert not all(tensor.is_contiguous() for tensor in flat_tensors(strided).values())
    for tensor in flat_tensors(strided).values():
        tensor.requires_grad_()
    out = case.function()(**strided)
    grads = torch.autograd.grad(out, list(flat_tensors(strided).values()), _strided(upstream))
    for name, value in zip(expected, (out, *grads)):
        assert torch.allclose(value, expected[name], rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_empty_batch(case):
    case = replace(case, batch=0)
    inputs = case.inputs(torch.float32)
    upstream = torch.zeros(case.definition()(**inputs).shape)
    results = outputs_and_gradients(case.function(), inputs, upstream)
    assert results["out"].shape == upstream.shape and upstream.shape[0] == 0
    assert not any(value.any() for value in results.values())


@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_nan_does_not_vanish(case):
    inputs = case.inputs(torch.float32)
    activation = flat_tensors(inputs)[
        next(n for n in flat_tensors(inputs) if n in ("x", "anchor", "features[0]"))
    ]
    activation[0, 0, 0] = torch.nan
    assert case.function()(**inputs).isnan().any()


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_second_derivative_raises(case, loss):
    inputs = case.inputs(torch.float64)
    tensors = [tensor.requires_grad_() for tensor in flat_tensors(inputs).values()]
    out = case.function()(**inputs)
    grads = torch.autograd.grad(loss(out), tensors, create_graph=True)
    assert [g.detach() for g in grads][0].isfinite().all()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(grad.square().sum() for grad in grads if grad.requires_grad).backward()


@pytest.mark.parametrize("case", ONE_EACH, ids=by_name)
def test_compiles_as_one_graph(case):
    torch._dynamo.reset()
    inputs = case.inputs(torch.float32)
    upstream = torch.randn(case.definition()(**inputs).shape)
    expected = outputs_and_gradients(case.function(), inputs, upstream)
    compiled = torch.compile(case.function(), fullgraph=True, backend="aot_eager")
    for name, value in outputs_and_gradients(compiled, inputs, upstream).items():
        # The small fold around an op may be reassociated; the op itself is the same kernel.
        assert relative_error(value, expected[name]) < 1e-5 or not expected[name].any(), name
    assert torch.allclose(compiled(**inputs), expected["out"], rtol=1e-5, atol=1e-6)  # nothing needs grad
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs), expected["out"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case", [c for c in ONE_EACH if c.op not in ("guidance", "linear_cross_entropy")], ids=by_name
)
def test_autocast_saves_half_precision_activations(case):
    inputs = case.inputs(torch.float32)
    parameters = {
        id(tensor.untyped_storage()) for name, tensor in flat_tensors(inputs).items() if "weight" in name
    }
    for tensor in flat_tensors(inputs).values():
        tensor.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = case.function()(**inputs)
    assert out.dtype == torch.bfloat16
    frames = case.batch * case.frames
    big = [
        t
        for t in saved
        if t.numel() >= frames * case.side and id(t.untyped_storage()) not in parameters and t.ndim == 3
    ]
    assert big and all(t.dtype == torch.bfloat16 for t in big)
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in flat_tensors(inputs).values() if t.grad is not None)


def test_fp16_survives_large_hidden_states():
    """Rows of 3e4 overflow a half-precision product of raw rows; the op's stays finite and exact."""
    case = next(case for case in CASES if case.op == "norm_linear")
    inputs = case.inputs(torch.float32)
    inputs["x"] = (inputs["x"] * 3e4 / inputs["x"].abs().max()).half()
    truth = case.definition()(**{**inputs, "x": inputs["x"].double()})
    assert relative_error(case.function()(**inputs), truth) < 2e-3


@pytest.mark.parametrize("ratio", [0, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_with_a_large_mean(ratio, dtype):
    """Centring keeps the folded projection accurate when a row's mean dwarfs its spread."""
    case = next(case for case in CASES if case.op == "norm_linear")
    inputs = case.inputs(torch.float32)
    inputs["x"] = (torch.randn_like(inputs["x"]) + ratio).to(dtype)
    upstream = torch.randn(case.definition()(**inputs).shape).to(dtype)
    truth = outputs_and_gradients(case.definition(), inputs, upstream, torch.float64)
    computed = outputs_and_gradients(case.function(), inputs, upstream)
    for name, value in truth.items():
        assert relative_error(computed[name], value) < 8e-3, name


def test_attention_special_rows():
    """A query that matches nothing, one that matches one key, and equal keys."""
    anchor = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    feature = torch.tensor([[[1.0, 0.0], [0.5, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    gate = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    out = ops.relu_attention(anchor, *gate, [feature])
    weighted = (1.0 * feature[0, 0] + 0.5 * feature[0, 1]) / 1.5
    expected = torch.stack([torch.zeros(2).double(), weighted, feature[0, 2]]) + feature[0]
    assert torch.allclose(out[0], expected, atol=1e-6)


def test_guidance_special_rows():
    """A zero vector has no weight and no NaN, twins share one's weight, no positive logit means no pull."""
    weight, bias = torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    deep = torch.ones(1, 1, 3, dtype=torch.float64)
    one = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64)
    zero = torch.zeros_like(one)
    features = [t.clone().requires_grad_() for t in (zero, one, one, deep)]
    out = ops.guidance(weight, bias, features)
    assert torch.allclose(out, one + deep, atol=1e-5)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), features))
    assert torch.equal(ops.guidance(-weight, bias, [one, one, deep]), deep)


@pytest.mark.parametrize("name", ["weight", "gate_weight"])
def test_gradient_of_a_weight_that_is_nearly_one(name):
    """One frame, where one layer often has nearly all the weight: what is left of a gradient is a difference
    of numbers that are nearly the same, of which plain fp32 loses up to every digit."""
    case = Case("guidance" if name == "weight" else "relu_attention", batch=1, frames=1, layers=3)
    for seed in range(12):
        inputs = case.inputs(torch.float32, seed=seed)
        if name == "gate_weight":
            inputs[name] = 6 * inputs[name]
        upstream = torch.randn(1, 1, case.side, generator=torch.Generator().manual_seed(seed))
        truth = outputs_and_gradients(case.definition(), inputs, upstream, torch.float64)[name]
        with use_backend("reference"):
            found = outputs_and_gradients(case.function(), inputs, upstream)[name]
        assert relative_error(found, truth) < 1e-5 if truth.any() else not found.any(), seed


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-20, 1e-10])
def test_guidance_of_tiny_vectors_is_finite(size, width):
    weight, bias = torch.ones(1, width), torch.zeros(1)
    features = [torch.full((1, 2, width), value).requires_grad_() for value in (size, 1.0, 2.0)]
    out = ops.guidance(weight, bias, features)
    grads = torch.autograd.grad(out.sum(), features)
    assert torch.isfinite(out).all() and all(torch.isfinite(grad).all() for grad in grads)


# Features of half the frames, too few numbers, rows of two sizes, one length for all, no clips.
WRONG = [
    ("relu_attention", "features", lambda given: [each[:1, :4] for each in given]),
    ("relu_attention", "anchor", lambda given: given[0]),
    ("relu_attention", "lengths", lambda given: torch.tensor([13])),
    ("linear_attention", "features", lambda given: [given[0][:, :-1], *given[1:]]),
    ("guidance", "features", lambda given: [given[0][:, :-1], *given[1:]]),
    ("norm_linear", "bias", lambda given: given[:3]),
    ("gated_up", "y", lambda given: given[:, :2]),
    ("pooled_upsample", "lengths", lambda given: torch.tensor(2)),
    *(
        (case.op, name, lambda given: given[..., :-1])
        for case in ONE_EACH
        for name in flat_tensors(case.inputs(torch.float32))
        if "features" not in name and case.pool == 1
    ),
]


@pytest.mark.parametrize(("op", "name", "change"), WRONG, ids=[f"{op}-{name}" for op, name, _ in WRONG])
def test_shapes_that_do_not_fit_are_refused_alike(op, name, change):
    inputs = next(case for case in ONE_EACH if case.op == op).inputs(torch.float32)
    inputs[name] = change(inputs[name])
    said = set()
    for backend in ops.BACKENDS if backends.HAS_TRITON else ops.BACKENDS[:-1]:
        for takes_gradient in (False, True):
            for tensor in flat_tensors(inputs).values():
                tensor.requires_grad_(takes_gradient)
            with ops.assume_backend(backend), pytest.raises(ValueError, match="must have shape") as error:
                Case(op).function()(**inputs)
            said.add(str(error.value))
    assert len(said) == 1 and "\n" not in said.pop()


def test_other_shapes_that_do_not_fit():
    x, weight, bias = torch.randn(6, 32), torch.randn(16, 32), torch.zeros(16)
    with pytest.raises(ValueError, match=r"mean must have shape \(6,\), got \(5,\)"):
        ops.folded_linear(x, weight, bias, ops.row_statistics(x[:5]))
    with pytest.raises(ValueError, match=r"norm_bias must have shape \(32,\), got \(1,\)"):
        ops.fold(torch.ones(32), torch.zeros(1), weight, bias)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., D\), got \(\)"):
        ops.gated_up(x[0, 0], bias, weight.T, x[0], torch.zeros(1))
    with pytest.raises(ValueError, match=r"grad must have shape \(6, 32\), got \(5, 32\)"):
        ops.gated_up_sums_(x[:5], x, torch.randn(6, 16), weight.T)


def test_use_backend():
    case = next(case for case in CASES if case.op == "gated_up")
    inputs = case.inputs(torch.float32)
    expected = torch.ops.meft_reference.gated_up(*inputs.values())
    with use_backend("reference"):
        assert torch.equal(case.function()(**inputs), expected)
    with pytest.raises(ValueError, match="backend must be one of .* got 'fast'"):
        with use_backend("fast"):
            pass
    with pytest.raises(KeyError):
        with use_backend("reference"):
            raise KeyError
    assert backends.current() == "auto"


def test_triton_is_asked_for_where_it_can_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    with pytest.raises(RuntimeError, match="'triton' needs a CUDA device"):
        with use_backend("triton"):
            pass
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="'triton' needs the triton package"):
        with use_backend("triton"):
            pass


def test_another_kernel_slots_in_without_changes_above():
    """A kernel registered on a device's key is used by auto and not by the reference backend."""
    case = next(case for case in CASES if case.op == "gated_up")
    inputs = case.inputs(torch.float32)
    with use_backend("reference"):
        expected = case.function()(**inputs)
    ours, before = case.function()(**inputs), ops.backend_status()["gated_up"]
    library = torch.library.Library("meft", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the C++ kernel is overridden
            library.impl("gated_up", lambda x, *_: torch.full_like(x, 7), "CPU", allow_override=True)
        assert ops.backend_status()["gated_up"][0] == "native"
        assert (case.function()(**inputs) == 7).all()
        with use_backend("reference"):
            assert torch.equal(case.function()(**inputs), expected)
    finally:
        library._destroy()
    assert torch.equal(case.function()(**inputs), ours)
    assert ops.backend_status()["gated_up"] == before


def test_every_op_is_registered_with_a_reference():
    for namespace in ("meft", "meft_reference", "meft_native", "meft_triton"):
        for name in ops.OP_NAMES:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(
                f"{namespace}::{name}", "CompositeExplicitAutograd"
            )
    assert {case.op for case in CASES} == set(ops.OP_NAMES) - {"row_statistics"}


def test_no_warnings_from_an_op():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in ONE_EACH:
            case.function()(**case.inputs(torch.float32))
