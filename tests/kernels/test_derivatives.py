"""Derivatives that the ops do not have raise, however they are asked for; those that they have go on."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import meft_kernels
from meft_kernels import ops, use_backend
from meft_kernels.self_attention import self_attention
from meft_kernels.testing import CASES, flat_tensors

TWICE = pytest.raises(RuntimeError, match="differentiate twice")
ONE_EACH = list({case.op: case for case in CASES}.values())
METHODS = pytest.mark.parametrize("method", ["LST", "UniPT", "SHERL"])
SQUARE, LINEAR = (lambda out: out.square().sum()), torch.sum


def network(method: str, where=meft_kernels):
    """A network, and the loss as a function of its parameters."""
    torch.manual_seed(0)
    side = getattr(where, method)(16, 3, 2)
    states = [torch.randn(2, 5, 16) for _ in range(3 if method == "SHERL" else 4)]
    return side, lambda parameters: functional_call(side, parameters, (states,)).square().sum()


@pytest.mark.parametrize("loss", [LINEAR, SQUARE], ids=["linear", "square"])
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.op)
def test_to_any_one_argument(case, loss):
    """Also where the engine visits the nodes alone that lead to that argument."""
    inputs = case.inputs(torch.float64)
    tensors = [t.requires_grad_() for t in flat_tensors(inputs).values() if t.is_floating_point()]
    out = loss(case.function()(**inputs))
    grads = torch.autograd.grad(out, tensors, create_graph=True)
    total = sum(each.square().sum() for each in grads if each.requires_grad)
    for tensor in tensors:
        with TWICE:
            torch.autograd.grad(total, tensor, allow_unused=True, retain_graph=True)


@METHODS
@pytest.mark.parametrize("saved", ["exact", "fp8"])
def test_of_a_network(method, saved):
    side, loss = network(method)
    side.saved_activations = saved
    parameters = dict(side.named_parameters())
    first = list(parameters.values())[:3]
    plain = torch.autograd.grad(loss(parameters), list(parameters.values()))
    grads = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
    for found, expected in zip(grads, plain):
        assert torch.equal(found, expected)
    with TWICE:
        torch.autograd.grad(sum(map(SQUARE, grads)), first, allow_unused=True)


@METHODS
def test_of_nested_transforms(method):
    side, loss = network(method)
    parameters = {name: each.detach() for name, each in side.named_parameters()}
    with TWICE:
        grad(lambda given: sum(map(SQUARE, grad(loss)(given).values())))(parameters)
    # Of the inner gradient to one parameter to another.
    one, other = [name for name in parameters if name.startswith("down.0")][:2]
    inner = lambda a, b: grad(lambda a: loss({**parameters, one: a, other: b}))(a)  # noqa: E731
    with TWICE:
        grad(lambda b: SQUARE(inner(parameters[one], b)))(parameters[other])


def test_of_a_frozen_head():
    """Whose gradient is all that is kept: its first derivative is there in a graph, the second raises."""
    x, weight, labels = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4), torch.tensor([1, 2, 3])
    expected = torch.nn.functional.cross_entropy(x @ weight.T, labels, reduction="sum")
    for count in (3, 1):
        for loss in (LINEAR, SQUARE):
            out = ops.linear_cross_entropy(x[:count], weight, labels[:count])
            (found,) = torch.autograd.grad(loss(out), x, create_graph=True)
            if count == 3 and loss is LINEAR:
                torch.testing.assert_close(found, *torch.autograd.grad(expected, x))
            with TWICE:
                torch.autograd.grad(found.square().sum(), x, allow_unused=True)
    run = lambda x: ops.linear_cross_entropy(x, weight, labels)  # noqa: E731
    with TWICE:
        grad(lambda x: SQUARE(grad(lambda x: SQUARE(run(x)))(x)))(x.detach())
    assert jacrev(run)(x.detach()).shape == (3, 3, 4)  # through vmap


class _Stopped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *(pytest.param(case, "auto", id=case.op) for case in ONE_EACH),
        *(pytest.param(case, "triton", id="slab") for case in ONE_EACH if case.op == "relu_attention"),
    ],
)
def test_where_no_gradient_comes_from_above(case, backend):
    """Also of what keeps more than its arguments for the backward: C++ kernels, a slab, a frozen head."""
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = replace(case, frames=5).inputs(torch.float32)
    tensors = [t for t in flat_tensors(inputs).values() if t.is_floating_point()]
    taking = [t.requires_grad_() for t in (tensors[:1] if case.op == "linear_cross_entropy" else tensors)]
    with use_backend(backend):
        out = case.function()(**inputs)
        (_Stopped.apply(out).sum() + sum(t.sum() for t in taking)).backward()
    assert all(torch.equal(t.grad, torch.ones_like(t)) for t in taking)


def test_under_checkpointing():
    """Which gives what was saved a single time."""
    case = next(case for case in CASES if case.op == "norm_linear")
    inputs = case.inputs(torch.float64)
    tensors = [tensor.requires_grad_() for tensor in flat_tensors(inputs).values()]
    out = checkpoint(lambda: case.function()(**inputs), use_reentrant=False)
    grads = torch.autograd.grad(out.sum(), tensors, create_graph=True)
    with TWICE:
        torch.autograd.grad(sum(map(SQUARE, grads)), tensors)


def test_gradients_of_gradients_that_the_ops_have_no_part_in():
    case = next(case for case in CASES if case.op == "gated_up")
    inputs = case.inputs(torch.float64)
    leaf = inputs["bias"].requires_grad_()
    own = torch.ones((), dtype=torch.float64, requires_grad=True)
    out = case.function()(**inputs).sum() + own**3
    grads = torch.autograd.grad(out, [leaf, own], create_graph=True)
    assert torch.autograd.grad(grads[1], own)[0] == 6
    expected = 2 * grads[0].detach()
    assert torch.equal(grads[0].mul_(2), expected)  # as of any gradient


@METHODS
def test_forward_mode(method):
    side, loss = network(method)
    parameters = {name: each.detach() for name, each in side.named_parameters()}
    ones = {name: torch.ones_like(each) for name, each in parameters.items()}
    name = next(iter(parameters))

    def in_dual_level():
        with forward_ad.dual_level():
            loss({name: forward_ad.make_dual(each, ones[name]) for name, each in parameters.items()})

    for ask in (
        lambda: jvp(loss, (parameters,), (ones,)),
        lambda: jacfwd(lambda own: loss({**parameters, name: own}))(parameters[name]),
        in_dual_level,
    ):
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp|vmap"):
            ask()
    plain = network(method, meft_kernels.reference)[1]
    expected = sum(each.sum() for each in grad(plain)(parameters).values())
    torch.testing.assert_close(jvp(plain, (parameters,), (ones,))[1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.op)
def test_forward_mode_of_an_op(case):
    inputs = case.inputs(torch.float64)
    given = next(iter(flat_tensors(inputs).values()))
    first = next(iter(inputs))
    assert torch.is_tensor(inputs[first])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        case.function()(**{**inputs, first: forward_ad.make_dual(given, torch.ones_like(given))})


def test_tangents_elsewhere_are_kept():
    """An op without one computes as ever."""
    case = next(case for case in CASES if case.op == "gated_up")
    inputs = case.inputs(torch.float64)
    expected = case.function()(**inputs).sum()
    one = torch.ones((), dtype=torch.float64)
    value, tangent = jvp(lambda by: by * by * case.function()(**inputs).sum(), (one,), (one,))
    assert value == expected and tangent == 2 * expected
    mapped = vmap(lambda x: case.function()(**{**inputs, "x": x}))
    assert mapped(torch.stack([inputs["x"]] * 2))[1].equal(case.function()(**inputs))


def test_tangents_of_self_attention_are_torchs():
    """Also where torch's fused kernel has none: then both raise."""
    given = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    plain = torch.nn.functional.scaled_dot_product_attention

    def tangent(function):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(each, torch.ones_like(each)) for each in given]
            try:
                return forward_ad.unpack_dual(function(*duals)).tangent
            except (NotImplementedError, RuntimeError) as error:
                return str(error)

    found, expected = tangent(self_attention), tangent(plain)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)
