"""The check that a fused kernel passes on a device before it is used there."""

import warnings

import pytest
import torch

from meft_kernels import ops, reference
from meft_kernels.ops import backends, self_check
from meft_kernels.ops.backends import HAS_TRITON
from meft_kernels.ops.registration import HOST_CODE, WITHOUT_TRITON
from meft_kernels.reference import stand_in
from meft_kernels.testing import Case


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch):
    monkeypatch.setattr(self_check, "verdicts", {})


def calls_of(case, dtype):
    """(registered name, argument names, arguments) of every kernel call of one forward and backward."""
    calls, original = [], backends.kernel

    def spying(name, backend=None):
        def run(*arguments):
            calls.append((name, arguments))
            return original(name, backend)(*arguments)

        return run

    backends.kernel = spying
    try:
        inputs = case.inputs(dtype)
        for value in inputs.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.requires_grad_()
        inputs.get("x", torch.empty(0)).requires_grad_(False)
        with ops.use_backend("reference"):  # the C++ kernels hand more on to the backward
            case.function()(**inputs).sum().backward()
    finally:
        backends.kernel = original
    found = []
    for name, arguments in calls:
        schema = getattr(torch.ops.meft, name).default._schema
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        detached = [[t.detach() for t in a] if isinstance(a, list) else a for a in detached]
        found.append((name, [argument.name for argument in schema.arguments], detached))
    return found


def kernels(name):
    return HOST_CODE[name].plain, HOST_CODE[name].fused


CASES = [
    Case(op, batch=3, frames=5, width=48, side=24, adapter_dim=40, layers=3, masked=op == "relu_attention")
    for op in ops.OP_NAMES[1:]
    if op not in WITHOUT_TRITON
]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_right_kernels_pass(case, poisoned_memory, monkeypatch):
    # The interpreter is slow.
    monkeypatch.setattr(self_check, "FRAMES", 70)
    monkeypatch.setattr(self_check, "DRAWS", 2)
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


def test_right_kernels_pass_whatever_device_is_the_default():
    x = torch.randn(2, 5, 16)
    arguments = (x, torch.randn(4, 16), torch.randn(4), *reference.row_statistics(x))
    names = ["x", "weight", "bias", "mean", "rstd"]
    plain, fused = reference.norm_linear.forward, lambda *given: reference.norm_linear.forward(*given)
    with warnings.catch_warnings(), torch.device("meta"):  # as torch.set_default_device("cuda") on a GPU
        warnings.simplefilter("error")
        assert self_check.choose("norm_linear", names, arguments, plain, fused) is fused


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


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("[CUDA]: out of memory")],
    ids=["allocator", "driver"],
)
def test_memory_that_runs_out_once_leaves_the_kernel_for_later(error):
    name, names, arguments = linear_call()
    plain, full = reference.norm_linear.forward, True

    def fused(*given):
        if full:
            raise error
        return plain(*given)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check.choose(name, names, arguments, plain, fused) is plain
        full = False
        for _ in range(2):
            assert self_check.choose(name, names, arguments, plain, fused) is fused
    assert list(self_check.verdicts.values()) == [True]


def frames(keep):
    """Zeroes the frames of an activation for which ``keep`` is false."""

    def change(out):
        kept = torch.tensor([keep(frame) for frame in range(out.shape[-2])])
        return out * kept[:, None].to(out.dtype) if out.ndim == 3 else out

    return change


def second_clip_shifted(out):
    return torch.cat([out[:2], out[2:] * 1.2]) if out.ndim == 3 else out


def one_channel_zero(out):
    return out.index_fill(-1, torch.tensor([5]), 0) if out.shape[-1] > 5 else out


WRONG = {
    "scaled": lambda out: out * 1.03,
    "one frame": frames(lambda frame: frame != 17),
    "last frame": frames(lambda frame: frame != 749),
    "later frames": frames(lambda frame: frame < 128),
    "one clip": second_clip_shifted,
    "one channel": one_channel_zero,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "op", ["norm_linear", "ladder", "relu_attention", "gated_down", "guidance", "gated_up"]
)
def test_no_wrong_forward_slips_through(op, dtype, wrong):
    case = Case(op, batch=2, frames=4, width=64, side=24, adapter_dim=40, layers=2)
    name, names, arguments = next(call for call in calls_of(case, dtype) if call[0] == op)
    plain, _ = kernels(name)
    with pytest.warns(UserWarning, match="is off by"):
        assert self_check.choose(name, names, arguments, plain, lambda *a: WRONG[wrong](plain(*a))) is plain


@pytest.mark.parametrize("change", [0.0, -1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["norm_linear", "ladder", "gated_down", "guidance", "gated_up"])
def test_no_wrong_gradient_slips_through(op, dtype, change):
    """Any one of a backward's results may be the wrong one, scalars too."""
    case = Case(op, batch=2, frames=4, width=64, side=24, adapter_dim=40, layers=2)
    name, names, arguments = next(call for call in calls_of(case, dtype) if call[0] == f"{op}_bwd")
    plain, _ = kernels(name)
    for index, grad in enumerate(plain(*arguments)):
        if not grad.numel():
            continue

        def fused(*given, index=index):
            grads = list(plain(*given))
            grads[index] = change * grads[index]
            return grads

        self_check.verdicts.clear()
        with pytest.warns(UserWarning, match=f"result {index} is off by"):
            assert self_check.choose(name, names, arguments, plain, fused) is plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_another_order_of_sums_passes(dtype):
    """What a fused kernel may do: the same sums in fp32 in another order, rounded once."""
    case = Case("norm_linear", batch=2, frames=4, width=192, side=48)
    name, names, arguments = next(call for call in calls_of(case, dtype) if call[0] == "norm_linear")
    plain, _ = kernels(name)

    def fused(x, weight, bias, mean, rstd):
        parts = x.float().chunk(6, -1), weight.to(x.dtype).float().chunk(6, -1)
        raw = sum(a @ b.T for a, b in list(zip(*parts))[::-1])
        centre = weight.to(x.dtype).float().sum(-1)
        return (rstd[..., None] * (raw - mean[..., None] * centre) + bias).to(x.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check.choose(name, names, arguments, plain, fused) is fused


def test_each_width_and_type_is_checked_once_and_sizes_are_not():
    plain, checks = reference.norm_linear.forward, []

    def fused(*arguments):
        checks.append(arguments[0].shape)
        return plain(*arguments)

    for batch, frames in ((3, 5), (1, 1), (4, 9)):
        name, names, arguments = linear_call(batch=batch, frames=frames)
        self_check.choose(name, names, arguments, plain, fused)
    assert checks == [(3, 750, 48)] * 3
    self_check.choose(*linear_call(torch.float16), plain, fused)
    assert len(checks) == 6


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
    for name, code in HOST_CODE.items():
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"meft::{name}", "CUDA")
        assert registered == (code.op not in WITHOUT_TRITON), name


def test_inside_a_graph_nothing_is_checked_and_that_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(self_check, "left_unchecked", set())
    plain, fused = object(), object()
    given = ("ladder", ["x"], [torch.ones(2, 3, 4)])
    assert self_check.choose(*given, plain, fused) is plain
    assert self_check.left_unchecked == {"ladder"} and not self_check.verdicts
    # What was checked before is taken at its word.
    self_check.left_unchecked.clear()
    self_check.verdicts[self_check._key(*given)] = True
    assert self_check.choose(*given, plain, fused) is fused and not self_check.left_unchecked


def test_refused_kernels_are_told_with_their_reasons():
    (name, names, arguments), *_ = calls_of(CASES[0], torch.float32)
    plain, wrong = kernels(name)[0], lambda *arguments: torch.full((), torch.nan)
    with pytest.warns(UserWarning, match="is not used on this device"):
        self_check.choose(name, names, arguments, plain, wrong)
    (line,) = self_check.refused()
    assert line.startswith(f"{name} (float32, ") and line.endswith("it gives other shapes than the reference")
