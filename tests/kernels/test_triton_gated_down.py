"""SHERL's gated down-projection in Triton: values and gradients by widths, rows and blocks of rows."""

import pytest
import torch

pytest.importorskip("triton")

from triton_fixtures import DEVICE, assert_as_good_as_reference, run

from meft_kernels.reference import gated_down as reference
from meft_kernels.testing import Case, relative_error
from meft_kernels.triton_kernels import gated_down as kernel
from meft_kernels.triton_kernels import host
from meft_kernels.tune import choice

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TYPES = [torch.float32, torch.float16]
NAMES = ["x", "weight_1", "bias_1", "weight_2", "bias_2", "weight_3", "bias_3"]


def draw(case: Case, dtype: torch.dtype, seed: int = 0):
    grad = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(seed))
    return case.inputs(dtype, DEVICE, seed), grad.to(DEVICE, dtype)


def check(case: Case, dtype: torch.dtype, draws: int = 2, **options):
    pairs = [draw(case, dtype, seed) for seed in range(draws)]
    assert_as_good_as_reference(kernel, reference, pairs, NAMES, True, **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [5, 24, 48, 80, 96, 160, 192, 320])
def test_widths(side, dtype):
    check(Case("gated_down", batch=1, frames=37, width=2 * side, side=side), dtype)


@pytest.mark.parametrize("batch, frames", [(1, 1), (1, 64), (2, 37), (2, 100)])
def test_frames(batch, frames):
    check(Case("gated_down", batch=batch, frames=frames, width=33, side=24), torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_blocks_of_rows(dtype, monkeypatch):
    """Several blocks, the last one short, and several groups of rows in the weights' gradients."""
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 128 * 24 * (4 + 4 * dtype.itemsize))
    monkeypatch.setattr(host, "LEAST_ROWS", 48)
    check(Case("gated_down", batch=2, frames=150, width=48, side=24), dtype, draws=1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [5, 24, 96, 160])
def test_bits_take_the_place_of_signs(side, dtype):
    """Those of the forward, and a backward that is told them, of an x that has other signs."""
    inputs, grad = draw(Case("gated_down", batch=2, frames=37, width=64, side=side), dtype)
    x, *parameters = inputs.values()
    out, bits = kernel.forward_active(x, *parameters)
    expected_out, expected_bits = reference.forward_active(x, *parameters)
    torch.testing.assert_close(out, expected_out, rtol=4e-3, atol=4e-3)
    assert torch.equal(bits, expected_bits) and torch.equal(out, kernel.forward(x, *parameters))
    copy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    assert not torch.equal(reference.active_bits(copy, *parameters[:2]), bits)
    given = (copy, *parameters, True, bits)
    truth = reference.backward(grad.double(), *(each.double() for each in given[:7]), True, bits)
    plain, fused = reference.backward(grad, *given), kernel.backward(grad, *given)
    for a, b, c in zip(fused, plain, truth, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_error(a, c) <= 2 * relative_error(b, c) + 4 * torch.finfo(dtype).eps


def test_no_frames():
    case = Case("gated_down", batch=0)
    inputs, grad = draw(case, torch.float16)
    result = run(kernel, inputs, grad, NAMES, True)
    assert result["out"].shape == (0, case.frames, case.side)
    assert result["x"].shape == inputs["x"].shape
    assert not any(result[name].any() for name in NAMES[1:])


def test_gradient_of_x_on_request_only():
    inputs, grad = draw(Case("gated_down"), torch.float32)
    with_x = run(kernel, inputs, grad, NAMES, True)
    without = run(kernel, inputs, grad, NAMES, False)
    assert without["x"].shape == (0,)
    assert all(torch.equal(with_x[name], without[name]) for name in NAMES[1:])


@pytest.mark.parametrize("special", ["dead", "open", "shut", "large"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_saturation(special, dtype):
    """No p above zero; gates at 1 and near 0; inputs of order 1e4."""
    inputs, grad = draw(Case("gated_down", frames=11), dtype)
    if special == "dead":
        inputs["bias_1"] -= 1e4
    elif special == "large":
        inputs["x"] *= 1e4
        inputs["weight_1"] *= 1e-4
    else:
        inputs["bias_3"] += 50 if special == "open" else -5
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], NAMES, True)


def test_nan_stays_in_its_row():
    inputs, grad = draw(Case("gated_down", batch=1, frames=6), torch.float32)
    inputs["x"][0, 2, 3] = torch.nan
    result = run(kernel, inputs, grad, NAMES, True)
    for name in ("out", "x"):
        bad = result[name][0].isnan().any(-1)
        assert bad.tolist() == [False, False, True, False, False, False]
    assert all(result[name].isnan().any() for name in NAMES[1:])


def test_strided_inputs_and_half_parameters():
    inputs, grad = draw(Case("gated_down", frames=5), torch.float16)
    inputs = {name: value.half() for name, value in inputs.items()}
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], NAMES, True)
    expected = run(kernel, inputs, grad, NAMES, True)
    strange = {
        name: value.mT.contiguous().mT if value.ndim > 1 else value.repeat(2, 1).mT.contiguous()[:, 0]
        for name, value in inputs.items()
    }
    got = run(kernel, strange, grad.mT.contiguous().mT, NAMES, True)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-3, atol=2e-3)


def test_runs_repeat():
    inputs, grad = draw(Case("gated_down", batch=3), torch.float16)
    first, again = (run(kernel, inputs, grad, NAMES, True) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_no_row_serves_goes_to_the_reference(monkeypatch):
    def same(dtype):
        inputs, grad = draw(Case("gated_down"), dtype)
        expected = run(reference, inputs, grad, NAMES, True)
        got = run(kernel, inputs, grad, NAMES, True)
        assert all(torch.equal(got[name], expected[name]) for name in expected)

    same(torch.float64)
    monkeypatch.setattr(choice, "choose", lambda *_: None)
    same(torch.float32)
