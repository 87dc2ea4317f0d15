"""LST's rung in Triton: values and gradients by widths and rows, gates near their ends, special rows."""

import pytest
import torch

pytest.importorskip("triton")

from triton_fixtures import DEVICE, assert_as_good_as_reference, run

from meft_kernels import reference
from meft_kernels.reference import ladder as definition
from meft_kernels.testing import Case, relative_error
from meft_kernels.triton_kernels import host
from meft_kernels.triton_kernels import ladder as kernel
from meft_kernels.tune import choice

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TYPES = [torch.float32, torch.float16]
ADAPTER = ["norm_weight", "norm_bias", "weight_1", "bias_1", "weight_2", "bias_2"]
NAMES = ["x", "state", "weight", "bias", "gate", *ADAPTER]
SPLIT_SIDES = (160, 208)  # above the widths of ladder_bwd, within and above those of adapter_bwd


def draw(case: Case, dtype: torch.dtype, seed: int = 0, change=lambda given: None):
    """The folded op's arguments; ``change`` may alter the public op's, in place."""
    given = case.inputs(dtype, DEVICE, seed)
    change(given)
    down = (given[f"down_{name}"] for name in ("norm_weight", "norm_bias", "weight", "bias"))
    weight, bias = reference.norm_linear.fold(*down)
    mean, rstd = reference.row_statistics(given["x"])
    inputs = {"x": given["x"], "state": given["state"], "weight": weight, "bias": bias}
    inputs |= {"mean": mean, "rstd": rstd, **{name: given[name] for name in ("gate", *ADAPTER)}}
    grad = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(seed))
    return inputs, grad.to(DEVICE, dtype)


def check(case: Case, dtype: torch.dtype, draws: int = 2, need_x: bool = True, change=lambda given: None):
    pairs = [draw(case, dtype, seed, change) for seed in range(draws)]
    assert_as_good_as_reference(kernel, definition, pairs, NAMES, need_x)


def test_all_backwards_are_covered():
    inner, outer = SPLIT_SIDES
    assert choice.choose("ladder_bwd", 96) and not choice.choose("ladder_bwd", inner)
    assert choice.choose("adapter_bwd", inner) and not choice.choose("adapter_bwd", outer)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [5, 24, 48, 80, 96, 128, *SPLIT_SIDES, 192, 384, 640])
def test_widths(side, dtype):
    check(Case("ladder", batch=1, frames=37, width=side + 9, side=side), dtype)


@pytest.mark.parametrize("side", [24, *SPLIT_SIDES])
@pytest.mark.parametrize("batch, frames", [(1, 1), (1, 12), (1, 64), (2, 37), (1, 100)])
def test_frames(batch, frames, side):
    case = Case("ladder", batch=batch, frames=frames, width=33, side=side)
    check(case, torch.float32, draws=1 if side in SPLIT_SIDES else 2)  # wide gradients need fewer


@pytest.mark.parametrize("hidden", [1, 64, 200])
def test_hidden_widths(hidden):
    check(Case("ladder", batch=1, frames=12, side=48, adapter_dim=hidden), torch.float16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_several_blocks_of_rows_per_split(dtype, monkeypatch):
    monkeypatch.setattr(host, "MULTIPROCESSORS", 2)
    check(Case("ladder", batch=1, frames=210, side=48, adapter_dim=70), dtype, draws=1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [24, SPLIT_SIDES[0]])
@pytest.mark.parametrize("gate", [1.0, -1.0])
def test_gate_near_its_ends(gate, side, dtype):
    """u within 5e-5 of 1 and of 0."""
    check(Case("ladder", side=side, frames=11), dtype, change=lambda given: given["gate"].fill_(gate))


@pytest.mark.parametrize("gate", [1.0, -1.0])
def test_gradients_through_an_almost_shut_gate(gate):
    """1 - u is computed and not subtracted: what passes keeps all its digits."""
    inputs, grad = draw(Case("ladder"), torch.float32, change=lambda given: given["gate"].fill_(gate))
    exact = run(definition, {n: t.double() for n, t in inputs.items()}, grad.double(), NAMES, True)
    result = run(kernel, inputs, grad, NAMES, True)
    for name in ("state", "weight", "bias", "gate"):
        assert relative_error(result[name], exact[name]) < 1e-5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("special", ["shifted", "far", "outlier", "large", "constant"])
def test_special_rows(special, dtype):
    def change(given):
        x = given["x"]
        if special == "shifted":
            x += 10
        elif special == "far":
            x += 100
        elif special == "outlier":
            x[..., 7] += 300
        elif special == "large":
            x *= 1e4 / x.abs().max()
        else:
            x[:, ::2] = 3

    check(Case("ladder", side=96, width=96, frames=11), dtype, change=change)


def test_gradient_of_x_on_request_only():
    inputs, grad = draw(Case("ladder"), torch.float32)
    with_x, without = (run(kernel, inputs, grad, NAMES, need) for need in (True, False))
    assert without["x"].shape == (0,)
    assert all(torch.equal(with_x[name], without[name]) for name in NAMES[1:])


def test_strided_inputs():
    inputs, grad = draw(Case("ladder", batch=3, frames=8), torch.float32)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in inputs.items()}
    result = run(kernel, strided, grad[:1, :1].expand_as(grad), NAMES, True)
    same = run(kernel, inputs, grad[:1, :1].expand_as(grad).contiguous(), NAMES, True)
    for name, value in same.items():  # the library's products may sum in another order
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-4)


def test_gradients_are_contiguous():
    inputs, grad = draw(Case("ladder"), torch.float16)
    assert all(value.is_contiguous() for value in run(kernel, inputs, grad, NAMES, True).values())


def test_no_rows():
    inputs, grad = draw(Case("ladder", batch=0), torch.float16)
    result = run(kernel, inputs, grad, NAMES, True)
    assert result["out"].shape == result["state"].shape == grad.shape
    assert result["x"].shape == inputs["x"].shape
    assert not any(result[name].any() for name in NAMES[2:])


def test_float64_and_unlisted_widths_use_the_reference():
    wide = Case("ladder", batch=1, frames=2, width=16, side=1300, adapter_dim=3)
    for inputs, grad in (draw(Case("ladder"), torch.float64), draw(wide, torch.float32)):
        expected = run(definition, inputs, grad, NAMES, True)
        for name, value in run(kernel, inputs, grad, NAMES, True).items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("broken", ["x", "state"])
@pytest.mark.parametrize("side", [24, *SPLIT_SIDES])
def test_nan_stays_in_its_row(side, broken):
    inputs, grad = draw(Case("ladder", batch=1, frames=6, side=side), torch.float32)
    inputs[broken][0, 2, 3] = torch.nan
    inputs["mean"], inputs["rstd"] = reference.row_statistics(inputs["x"])
    result = run(kernel, inputs, grad, NAMES, True)
    for name in ("out", "state"):
        assert result[name][0].isnan().any(-1).tolist() == [False, False, True, False, False, False]
    assert all(result[name].isnan().any() for name in ("weight", "gate", "weight_1", "weight_2"))
