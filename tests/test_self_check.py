"""The check that a fused kernel passes on a device before it is used there."""

import warnings

import pytest
import torch

from meft_kernels import ops, reference, self_check
from meft_kernels.reference import stand_in
from meft_kernels.testing import Case

HAS_TRITON = ops._HAS_TRITON


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch):
    monkeypatch.setattr(self_check, "_verdicts", {})


def calls_of(case, dtype):
    """(registered name, argument names, arguments) of every kernel call of one forward and backward."""
    calls, original = [], ops._kernel

    def spying(backend, name):
        def run(*arguments):
            calls.append((name, arguments))
            return original(backend, name)(*arguments)

        return run

    ops._kernel = spying
    try:
        inputs = case.inputs(dtype)
        for value in inputs.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.requires_grad_()
        inputs.get("x", torch.empty(0)).requires_grad_(False)
        case.function()(**inputs).sum().backward()
    finally:
        ops._kernel = original
    found = []
    for name, arguments in calls:
        schema = getattr(torch.ops.meft, name).default._schema
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        detached = [[t.detach() for t in a] if isinstance(a, list) else a for a in detached]
        found.append((name, [argument.name for argument in schema.arguments], detached))
    return found


def kernels(name):
    op, plain, fused = ops._HOST_CODE[name]
    return plain, fused


CASES = [
    Case(op, batch=3, frames=5, width=48, side=24, adapter_dim=40, layers=3, masked=op == "relu_attention")
    for op in ops.OP_NAMES[1:]
    if op not in ops._PLAIN
]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_right_kernels_pass(case, poisoned_memory):
    seen = set()
    for name, names, arguments in calls_of(case, torch.float16):
        plain, fused = kernels(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self_check.choose(name, names, arguments, plain, fused) is fused
        seen.add(name)
    assert {case.op, f"{case.op}_bwd"} <= seen


def linear_call(dtype=torch.float32, batch=3, frames=5):
    case = Case("norm_linear", batch=batch, frames=frames, width=48, side=24)
    return next(call for call in calls_of(case, dtype) if call[0] == "norm_linear")


def broken(change):
    return lambda *arguments: change(reference.norm_linear.forward(*arguments))


def fail(*_):
    raise RuntimeError("out of resources: shared memory\nand more")


@pytest.mark.parametrize(
    ("fused", "complaint"),
    [
        (broken(lambda out: out * 1.001), "result 0 is off by 1.0e-03, the reference at the same type by"),
        (broken(lambda out: out.index_fill(1, torch.tensor([69]), torch.nan)), "result 0 is not finite"),
        (broken(lambda out: out[:1]), "it gives other shapes than the reference"),
        (fail, "it failed with RuntimeError: out of resources: shared memory;"),
    ],
)
def test_wrong_kernels_are_left_alone_with_one_warning(fused, complaint):
    name, names, arguments = linear_call()
    plain = reference.norm_linear.forward
    with pytest.warns(UserWarning, match="the fused kernel of norm_linear is not used") as caught:
        for _ in range(3):
            assert self_check.choose(name, names, arguments, plain, fused) is plain
    assert len(caught) == 1 and complaint in str(caught[0].message)


def test_each_width_and_type_is_checked_once_and_sizes_are_not():
    plain, checks = reference.norm_linear.forward, []

    def fused(*arguments):
        checks.append(arguments[0].shape)
        return plain(*arguments)

    for batch, frames in ((3, 5), (1, 1), (4, 9)):
        name, names, arguments = linear_call(batch=batch, frames=frames)
        self_check.choose(name, names, arguments, plain, fused)
    assert checks == [(2, 70, 48)]
    self_check.choose(*linear_call(torch.float16), plain, fused)
    assert len(checks) == 2


def test_no_check_while_memory_is_counted():
    with stand_in.standing_for("cuda", (9, 0)):
        assert self_check.choose(*linear_call(), reference.norm_linear.forward, fail) is fail


def test_arguments_are_not_written_into():
    name, names, arguments = linear_call()
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    self_check.choose(name, names, arguments, reference.norm_linear.forward, reference.norm_linear.forward)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments) if isinstance(a, torch.Tensor))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_auto_on_cuda_goes_through_the_check():
    for name, (op, _, _) in ops._HOST_CODE.items():
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"meft::{name}", "CUDA")
        assert registered == (op not in ops._PLAIN), name
