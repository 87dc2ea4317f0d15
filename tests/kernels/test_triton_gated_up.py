"""SHERL's way back to the backbone's width in Triton: values and gradients by widths, rows and gates."""

import pytest
import torch

pytest.importorskip("triton")

from triton_fixtures import DEVICE, assert_as_good_as_reference, run

from meft_kernels.reference import gated_up as reference
from meft_kernels.testing import Case, relative_error
from meft_kernels.triton_kernels import gated_up as kernel
from meft_kernels.triton_kernels import host
from meft_kernels.tune import choice

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TYPES = [torch.float32, torch.float16]
NAMES = ["x", "y", "weight", "bias", "gate"]


def draw(case: Case, dtype: torch.dtype, seed: int = 0):
    grad = torch.randn(case.batch, case.frames, case.width, generator=torch.Generator().manual_seed(seed))
    return case.inputs(dtype, DEVICE, seed), grad.to(DEVICE, dtype)


def check(case: Case, dtype: torch.dtype, draws: int = 2, **options):
    pairs = [draw(case, dtype, seed) for seed in range(draws)]
    assert_as_good_as_reference(kernel, reference, pairs, NAMES, True, **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [5, 24, 48, 80, 96, 160, 192, 320])
def test_widths(side, dtype):
    check(Case("gated_up", batch=1, frames=37, width=2 * side, side=side), dtype)


@pytest.mark.parametrize("batch, frames", [(1, 1), (1, 64), (2, 37), (2, 100)])
def test_frames(batch, frames):
    # The gate's gradient is one number, whose error is luck: several draws.
    check(Case("gated_up", batch=batch, frames=frames, width=33, side=24), torch.float32, draws=4)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64], ids=str)
@pytest.mark.parametrize("module", [kernel, reference])
def test_sums_of_parts_give_the_gradients(module, dtype):
    """y is written over, whatever its layout."""
    inputs, grad = draw(Case("gated_up", batch=3, frames=50), dtype)
    x, y, weight, bias, gate = inputs.values()
    expected = module.backward(grad, *inputs.values(), False)[1:]
    apart = y.repeat(1, 1, 2)[..., : y.shape[-1]]
    flat = torch.cat([y.new_zeros(1), y.flatten()])[1:].view(y.shape)
    for given in (y.clone(), apart, flat):
        parts = [module.sums_(*(t[i : i + 1] for t in (grad, x, given)), weight) for i in range(3)]
        summed = (torch.stack(each).sum(0) for each in zip(*parts))
        found = [given, *reference.gradients(*summed, weight, bias, gate)]
        assert all(relative_error(a, b) < 40 * torch.finfo(dtype).eps for a, b in zip(found, expected))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_groups_of_rows(dtype, monkeypatch):
    monkeypatch.setattr(host, "LEAST_ROWS", 48)
    check(Case("gated_up", batch=2, frames=150, width=48, side=24), dtype, draws=1)


def test_no_frames():
    case = Case("gated_up", batch=0)
    inputs, grad = draw(case, torch.float16)
    result = run(kernel, inputs, grad, NAMES, True)
    assert result["out"].shape == inputs["x"].shape and result["y"].shape == inputs["y"].shape
    assert not any(result[name].any() for name in ("weight", "bias", "gate"))


@pytest.mark.parametrize("side", [24, 160])
def test_gradient_of_x_on_request_only(side):
    inputs, grad = draw(Case("gated_up", side=side), torch.float32)
    with_x = run(kernel, inputs, grad, NAMES, True)
    without = run(kernel, inputs, grad, NAMES, False)
    assert without["x"].shape == (0,)
    assert all(torch.equal(with_x[name], without[name]) for name in NAMES[1:])


@pytest.mark.parametrize("gate", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gates(gate, dtype):
    """SHERL starts at 0, where h is left out and the gate's gradient is largest."""
    inputs, grad = draw(Case("gated_up", frames=9), dtype)
    inputs["gate"] = torch.full_like(inputs["gate"], gate)
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], NAMES, True)


def test_no_positive_y():
    """Only bias and h are left; y's and the weight's gradients are zero."""
    inputs, grad = draw(Case("gated_up", frames=9), torch.float32)
    inputs["y"] = -inputs["y"].abs()
    inputs["y"][0, 0] = 0
    result = run(kernel, inputs, grad, NAMES, True)
    keep = torch.tanh(inputs["gate"] / 0.1)
    torch.testing.assert_close(result["out"], inputs["bias"] + keep * inputs["x"])
    assert not result["y"].any() and not result["weight"].any()


@pytest.mark.parametrize("where", ["x", "y"])
def test_nan_stays_in_its_row(where):
    inputs, grad = draw(Case("gated_up", batch=1, frames=6), torch.float32)
    inputs[where][0, 2, 3] = torch.nan
    out = kernel.forward(**inputs)
    assert out[0].isnan().any(-1).tolist() == [False, False, True, False, False, False]
    result = run(kernel, inputs, grad, NAMES, True)
    assert result["gate" if where == "x" else "weight"].isnan().any()


def test_strided_inputs_and_half_parameters():
    inputs, grad = draw(Case("gated_up", frames=5), torch.float16)
    inputs = {name: value.half() for name, value in inputs.items()}
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], NAMES, True)
    expected = run(kernel, inputs, grad, NAMES, True)
    strange = {
        name: value.mT.contiguous().mT if value.ndim > 1 else value.repeat(2, 1).mT.contiguous()[:, 0]
        for name, value in inputs.items()
    }
    got = run(kernel, strange, grad.mT.contiguous().mT, NAMES, True)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_row_does_not_depend_on_the_others():
    inputs, grad = draw(Case("gated_up", batch=3), torch.float16)
    first, again = (run(kernel, inputs, grad, NAMES, True) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = kernel.forward(**{**inputs, "x": inputs["x"][1:2], "y": inputs["y"][1:2]})
    assert torch.equal(alone, first["out"][1:2])


def test_what_no_row_serves_goes_to_the_reference(monkeypatch):
    def same(dtype):
        inputs, grad = draw(Case("gated_up"), dtype)
        expected = run(reference, inputs, grad, NAMES, True)
        got = run(kernel, inputs, grad, NAMES, True)
        assert all(torch.equal(got[name], expected[name]) for name in expected)

    same(torch.float64)
    monkeypatch.setattr(choice, "choose", lambda *_: None)
    same(torch.float32)
