"""The adapter in Triton: values and gradients by side and hidden widths, rows and splits of rows."""

import pytest
import torch

pytest.importorskip("triton")

from triton_fixtures import DEVICE, assert_as_good_as_reference, run

from meft_kernels.reference import adapter as reference
from meft_kernels.reference import common
from meft_kernels.testing import Case
from meft_kernels.triton_kernels import adapter as kernel
from meft_kernels.triton_kernels import host
from meft_kernels.tune import choice

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TYPES = [torch.float32, torch.float16]
NAMES = ["x", "norm_weight", "norm_bias", "weight_1", "bias_1", "weight_2", "bias_2"]
LIBRARY_SIDE = 208  # above the widths that the table has an adapter_bwd for


def draw(case: Case, dtype: torch.dtype, seed: int = 0):
    grad = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(seed))
    return case.inputs(dtype, DEVICE, seed), grad.to(DEVICE, dtype)


def check(case: Case, dtype: torch.dtype, draws: int = 2):
    pairs = [draw(case, dtype, seed) for seed in range(draws)]
    assert_as_good_as_reference(kernel, reference, pairs, NAMES, True)


def test_both_backwards_are_covered():
    assert choice.choose("adapter_bwd", 192) and not choice.choose("adapter_bwd", LIBRARY_SIDE)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [5, 24, 48, 80, 96, 128, 160, 192, LIBRARY_SIDE, 384, 640])
def test_widths(side, dtype):
    check(Case("adapter", batch=1, frames=37, side=side, adapter_dim=40), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [24, 96, LIBRARY_SIDE])
@pytest.mark.parametrize("hidden", [1, 64, 200])
def test_hidden_widths(hidden, side, dtype):
    check(Case("adapter", batch=1, frames=12, side=side, adapter_dim=hidden), dtype)


@pytest.mark.parametrize("side", [24, LIBRARY_SIDE])
@pytest.mark.parametrize("batch, frames", [(1, 1), (1, 12), (1, 64), (2, 37), (1, 100)])
def test_frames(batch, frames, side):
    check(Case("adapter", batch=batch, frames=frames, side=side), torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [48, 160])
def test_several_blocks_of_rows_per_split(side, dtype, monkeypatch):
    """The weights' gradient over splits of several blocks, the last split short."""
    monkeypatch.setattr(host, "MULTIPROCESSORS", 2)
    check(Case("adapter", batch=1, frames=210, side=side, adapter_dim=70), dtype, draws=1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_blocks_of_rows_in_library_products(dtype, monkeypatch):
    monkeypatch.setitem(common.BLOCK_ELEMENTS, "cpu", 40 * 70)
    monkeypatch.setattr(common, "DEFAULT_BLOCK_ELEMENTS", 40 * 70)
    monkeypatch.setattr(host, "LEAST_ROWS", 16)
    check(Case("adapter", batch=2, frames=75, side=LIBRARY_SIDE, adapter_dim=40), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("special", ["shifted", "outlier", "large", "saturated", "constant"])
def test_special_rows(special, dtype):
    inputs, grad = draw(Case("adapter", side=96, frames=11), dtype)
    if special == "shifted":
        inputs["x"] += 100
    elif special == "outlier":
        inputs["x"][..., 7] += 300
    elif special == "large":
        inputs["x"] *= 1e4 / inputs["x"].abs().max()
    elif special == "saturated":
        inputs["bias_1"] += torch.where(torch.arange(40, device=DEVICE) % 2 == 0, 30, -30)
    else:  # some rows only: an all-constant batch leaves gradients that are rounding noise
        inputs["x"][:, ::2] = 3
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], NAMES, True)


def test_gradient_of_x_on_request_only():
    inputs, grad = draw(Case("adapter"), torch.float32)
    with_x, without = (run(kernel, inputs, grad, NAMES, need) for need in (True, False))
    assert without["x"].shape == (0,)
    assert all(torch.equal(with_x[name], without[name]) for name in NAMES[1:])


def test_strided_inputs():
    inputs, grad = draw(Case("adapter", batch=3, frames=8), torch.float32)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in inputs.items()}
    result = run(kernel, strided, grad[:1, :1].expand_as(grad), NAMES, True)
    same = run(kernel, inputs, grad[:1, :1].expand_as(grad).contiguous(), NAMES, True)
    for name, value in same.items():  # the library's products may sum in another order
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-4)


def test_gradients_are_contiguous():
    """Their strides are part of what compiled code relies on."""
    inputs, grad = draw(Case("adapter"), torch.float16)
    assert all(value.is_contiguous() for value in run(kernel, inputs, grad, NAMES, True).values())


def test_no_rows():
    inputs, grad = draw(Case("adapter", batch=0), torch.float16)
    result = run(kernel, inputs, grad, NAMES, True)
    assert result["out"].shape == result["x"].shape == grad.shape
    assert not any(result[name].any() for name in NAMES[1:])


@pytest.mark.parametrize("shared", ["weight_1", "weight_2", "both"])
def test_adapters_that_share_a_weight_of_this_step(shared):
    """What is made of a weight once per step does not hold what else the call was given."""
    inputs, grad = draw(Case("adapter", batch=1, frames=3), torch.float16)
    for name in ("weight_1", "weight_2"):
        inputs[name] = inputs[name].requires_grad_() * 1
    others, other_grad = draw(Case("adapter", batch=1, frames=3), torch.float16, seed=1)
    names = ["weight_1", "weight_2"] if shared == "both" else [shared]
    others |= {name: inputs[name] for name in names}
    with torch.no_grad():
        run(kernel, inputs, grad, NAMES, True)
        assert_as_good_as_reference(kernel, reference, [(others, other_grad)], NAMES, True)


def test_float64_and_unlisted_widths_use_the_reference():
    wide = Case("adapter", batch=1, frames=2, side=1300, adapter_dim=3)
    for inputs, grad in (draw(Case("adapter"), torch.float64), draw(wide, torch.float32)):
        expected = run(reference, inputs, grad, NAMES, True)
        for name, value in run(kernel, inputs, grad, NAMES, True).items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("side", [24, LIBRARY_SIDE])
def test_nan_stays_in_its_row(side):
    inputs, grad = draw(Case("adapter", batch=1, frames=6, side=side), torch.float32)
    inputs["x"][0, 2, 3] = torch.nan
    result = run(kernel, inputs, grad, NAMES, True)
    for name in ("out", "x"):
        assert result[name][0].isnan().any(-1).tolist() == [False, False, True, False, False, False]
    assert all(result[name].isnan().any() for name in ("norm_weight", "norm_bias", "weight_1", "weight_2"))
