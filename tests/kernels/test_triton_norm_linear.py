"""Row statistics and the folded projection in Triton: values and gradients by widths, means."""

import pytest
import torch

pytest.importorskip("triton")

from triton_fixtures import DEVICE, assert_as_good_as_reference, run

from meft_kernels import reference
from meft_kernels.reference import norm_linear as definition
from meft_kernels.testing import Case, relative_error
from meft_kernels.triton_kernels import host, row_statistics
from meft_kernels.triton_kernels import norm_linear as kernel

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TYPES = [torch.float32, torch.float16]
NAMES = ["x", "weight", "bias"]


def draw(case: Case, dtype: torch.dtype, seed: int = 0, change=lambda x: x):
    """The folded op's arguments; ``change`` acts on x before its statistics are taken."""
    given = case.inputs(dtype, DEVICE, seed)
    x = change(given["x"])
    weight, bias = definition.fold(*(given[n] for n in ("norm_weight", "norm_bias", "weight", "bias")))
    mean, rstd = reference.row_statistics(x)
    grad = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd}, grad.to(DEVICE, dtype)


def check(case: Case, dtype: torch.dtype, draws: int = 2, change=lambda x: x, need_x: bool = True):
    pairs = [draw(case, dtype, seed, change) for seed in range(draws)]
    assert_as_good_as_reference(kernel, definition, pairs, NAMES, need_x)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [5, 24, 48, 80, 96, 160, 192, 320, 640])
def test_widths(side, dtype):
    check(Case("norm_linear", batch=1, frames=37, width=side + 9, side=side), dtype)


@pytest.mark.parametrize("batch, frames", [(1, 1), (1, 12), (2, 64), (2, 37)])
def test_frames(batch, frames):
    check(Case("norm_linear", batch=batch, frames=frames, width=33, side=24), torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_groups_of_rows_in_the_weight_gradient(dtype, monkeypatch):
    monkeypatch.setattr(host, "LEAST_ROWS", 32)
    check(Case("norm_linear", batch=2, frames=75, width=48, side=24), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shift", [10.0, 100.0])
def test_rows_with_a_large_mean(shift, dtype):
    """Means of 10 and 100 standard deviations: what the centred weight and its row sums are for."""
    check(Case("norm_linear", width=96, side=24), dtype, change=lambda x: x + shift)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_outlier_channel(dtype):
    def with_outlier(x):
        x = x.clone()
        x[..., 7] += 300
        return x

    check(Case("norm_linear", width=96, side=24), dtype, change=with_outlier)


def test_exact_zeros():
    """A constant row is centred to zero: the output is the bias, and dx has no size to judge."""
    inputs, grad = draw(Case("norm_linear"), torch.float32, change=lambda x: torch.ones_like(x))
    out = kernel.forward(*inputs.values())
    torch.testing.assert_close(out, inputs["bias"].expand_as(out), atol=1e-4, rtol=0)
    assert torch.isfinite(
        torch.cat([g.flatten() for g in kernel.backward(grad, *inputs.values(), True)])
    ).all()


def test_gradient_of_x_on_request_only():
    inputs, grad = draw(Case("norm_linear"), torch.float32)
    with_x, without = (run(kernel, inputs, grad, NAMES, need) for need in (True, False))
    assert without["x"].shape == (0,)
    assert all(torch.equal(with_x[name], without[name]) for name in NAMES[1:])


def test_strided_inputs():
    inputs, grad = draw(Case("norm_linear", batch=3, frames=8), torch.float32)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in inputs.items()}
    result = run(kernel, strided, grad.transpose(0, 1).contiguous().transpose(0, 1), NAMES, True)
    for name, value in run(kernel, inputs, grad, NAMES, True).items():
        # The library's products may sum in another order.
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-4)


def test_no_rows():
    inputs, grad = draw(Case("norm_linear", batch=0), torch.float16)
    result = run(kernel, inputs, grad, NAMES, True)
    assert result["out"].shape == grad.shape
    assert result["x"].shape == inputs["x"].shape
    assert not result["weight"].any() and not result["bias"].any()


def test_float64_and_unlisted_widths_use_the_reference():
    case = Case("norm_linear", frames=3, width=16, side=1300)
    for inputs, grad in (draw(Case("norm_linear"), torch.float64), draw(case, torch.float32)):
        expected = run(definition, inputs, grad, NAMES, True)
        for name, value in run(kernel, inputs, grad, NAMES, True).items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 64, 129, 768, 2048])
def test_row_statistics(width, dtype):
    x = torch.randn(3, 7, width, device=DEVICE).mul_(2).add_(100).to(dtype)
    assert_statistics(x)


def assert_statistics(x):
    mean, rstd = row_statistics.forward(x)
    exact_mean, exact_rstd = reference.row_statistics(x.double())
    assert mean.shape == rstd.shape == x.shape[:-1]
    assert mean.dtype == rstd.dtype == torch.float32
    assert relative_error(mean, exact_mean) < 1e-6
    assert relative_error(rstd, exact_rstd) < 1e-5


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_statistics_of_constant_rows(value):
    mean, rstd = row_statistics.forward(torch.full((3, 65), value, device=DEVICE))
    torch.testing.assert_close(mean, torch.full_like(mean, value))
    torch.testing.assert_close(
        rstd, torch.full_like(rstd, reference.common.NORM_EPS**-0.5), rtol=1e-2, atol=0
    )


def test_statistics_of_odd_layouts():
    assert_statistics(torch.randn(6, 5, 3, device=DEVICE).transpose(0, 2))
    assert_statistics(torch.randn(33, device=DEVICE))
    mean, rstd = row_statistics.forward(torch.empty(2, 0, 8, device=DEVICE))
    assert mean.shape == rstd.shape == (2, 0)
    wide = torch.randn(2, 2049, dtype=torch.float64, device=DEVICE)
    for computed, expected in zip(row_statistics.forward(wide), reference.row_statistics(wide)):
        assert torch.equal(computed, expected)


def test_nan_stays_in_its_row():
    inputs, grad = draw(Case("norm_linear", batch=1, frames=6), torch.float32)
    inputs["x"][0, 2, 3] = torch.nan
    mean, rstd = row_statistics.forward(inputs["x"])
    result = run(kernel, {**inputs, "mean": mean, "rstd": rstd}, grad, NAMES, True)
    for bad in (mean.isnan()[0], rstd.isnan()[0], *(result[n][0].isnan().any(-1) for n in ("out", "x"))):
        assert bad.tolist() == [False, False, True, False, False, False]
    assert result["weight"].isnan().any()
