"""The Triton kernels behind the ops: the case table and the three modules under ``use_backend("triton")``."""

from dataclasses import replace

import pytest
import torch

import meft_kernels
from meft_kernels import use_backend
from meft_kernels.ops.registration import WITHOUT_TRITON
from meft_kernels.testing import CASES, assert_as_good_as_torch

pytest.importorskip("triton")

# Without a GPU the kernels run in the interpreter, which knows fp32 and fp16.
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Small cases, for the interpreter is slow. Guidance has a gradient of one element, which needs many draws.
FUSED = [
    replace(case, frames=min(case.frames, 13))
    for case in CASES
    if case.op not in WITHOUT_TRITON and case.batch < 3
]


@pytest.fixture(autouse=True)
def _triton():
    try:
        with use_backend("triton"):
            yield
    except RuntimeError as error:  # the interpreter was switched off on purpose
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name)
def test_case_table(case, dtype, poisoned_memory):
    assert_as_good_as_torch(case, dtype, DEVICE, draws=8 if case.op == "guidance" else 3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["LST", "UniPT", "SHERL"])
def test_modules_equal_the_reference(method, masked):
    torch.manual_seed(0)
    plain = getattr(meft_kernels.reference, method)(96, 3, 4, device=DEVICE)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fused = getattr(meft_kernels, method)(96, 3, 4, device=DEVICE)
    fused.load_state_dict(plain.state_dict())
    states = [0.5 + torch.randn(2, 21, 96, device=DEVICE) for _ in range(4)]
    lengths = torch.tensor([21, 8], device=DEVICE) if masked else None
    upstream, grads = None, []
    for side in (plain, fused):
        out = side(states, lengths) if method == "SHERL" else side.pooled(states, lengths)
        upstream = torch.randn_like(out) if upstream is None else upstream
        grads.append((out, *torch.autograd.grad(out, list(side.parameters()), upstream)))
    names = ["out", *(name for name, _ in plain.named_parameters())]
    for name, expected, got in zip(names, *grads):
        if name != "gate.bias":  # zero in exact arithmetic, noise in the plain module
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4, msg=name)


def test_the_kernels_really_run(monkeypatch):
    from meft_kernels.triton_kernels import gated_up

    calls = []
    original = gated_up.forward
    monkeypatch.setattr(gated_up, "forward", lambda *a: calls.append(1) or original(*a))
    case = next(case for case in CASES if case.op == "gated_up")
    case.function()(**case.inputs(torch.float32, DEVICE))
    assert calls
    with use_backend("auto"):
        case.function()(**case.inputs(torch.float32, DEVICE))
    assert (len(calls) > 1) == CUDA


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    case = next(case for case in CASES if case.op == "ladder")
    inputs = case.inputs(torch.float32, DEVICE)
    compiled = torch.compile(case.function(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), case.function()(**inputs), rtol=1e-5, atol=1e-6)
