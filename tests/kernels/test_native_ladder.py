"""LST's rung and its parts in C++ beyond the shared table: real widths, special rows, gates near their ends,
parameters of other types, and arguments that do not fit."""

from types import SimpleNamespace

import pytest
import torch
from triton_fixtures import assert_as_good_as_reference, run

from meft_kernels import native, reference
from meft_kernels.testing import Case, relative_error

pytestmark = pytest.mark.skipif(
    not (native.LOADED and native.has("ladder")), reason=f"no C++ kernel: {native.REASON}"
)
ADAPTER = ["norm_weight", "norm_bias", "weight_1", "bias_1", "weight_2", "bias_2"]
NAMES = {
    "norm_linear": ["x", "weight", "bias"],
    "adapter": ["x", *ADAPTER],
    "ladder": ["x", "state", "weight", "bias", "gate", *ADAPTER],
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def kernel(op: str) -> SimpleNamespace:
    """The C++ forward and backward of an op in the form of a module of the reference."""
    ops = getattr(torch.ops, native.NAMESPACE)
    return SimpleNamespace(forward=getattr(ops, op), backward=getattr(ops, f"{op}_bwd"))


def draw(case: Case, dtype: torch.dtype, seed: int = 0, change=lambda given: None):
    """The kernel's arguments and an upstream gradient; ``change`` may alter the public op's, in place."""
    given = case.inputs(dtype, "cpu", seed)
    change(given)
    grad = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(seed))
    if case.op == "adapter":
        return given, grad.to(dtype)
    prefix = "down_" if case.op == "ladder" else ""
    down = (given[f"{prefix}{name}"] for name in ("norm_weight", "norm_bias", "weight", "bias"))
    weight, bias = reference.norm_linear.fold(*down)
    mean, rstd = reference.row_statistics(given["x"])
    inputs = {"x": given["x"]}
    if case.op == "ladder":
        inputs["state"] = given["state"]
    inputs |= {"weight": weight, "bias": bias, "mean": mean, "rstd": rstd}
    if case.op == "ladder":
        inputs |= {name: given[name] for name in ("gate", *ADAPTER)}
    return inputs, grad.to(dtype)


def check(case: Case, dtype: torch.dtype, draws: int = 2, change=lambda given: None) -> None:
    pairs = [draw(case, dtype, seed, change) for seed in range(draws)]
    assert_as_good_as_reference(kernel(case.op), getattr(reference, case.op), pairs, NAMES[case.op], True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [96, 384])
@pytest.mark.parametrize("op", list(NAMES))
def test_real_widths(op, side, dtype, poisoned_memory):
    """Several blocks of rows and a shorter one at the end."""
    check(Case(op, batch=1, frames=215, width=768, side=side, adapter_dim=256), dtype, draws=1)


@pytest.mark.parametrize(
    "rows, side", [*((n, 20) for n in (1, 2, 95, 96, 97, 192)), *((n, 256) for n in (96, 191, 192, 193))]
)
def test_rows_around_a_block(rows, side):
    check(Case("ladder", batch=1, frames=rows, width=40, side=side, adapter_dim=17), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", ["shifted", "far", "outlier", "large", "constant"])
def test_special_rows(special, dtype):
    def change(given):
        x = given["x"]
        if special in ("shifted", "far"):
            x += 10 if special == "shifted" else 100
        elif special == "outlier":
            x[..., 7] += 300
        elif special == "large":
            x *= 1e4 / x.abs().max()
        else:
            x[:, ::2] = 3

    check(Case("ladder", side=96, width=96, frames=11), dtype, change=change)


@pytest.mark.parametrize("gate", [1.0, -1.0])
def test_gradients_through_an_almost_shut_gate(gate):
    """1 - u is computed and not subtracted: what passes keeps all its digits."""
    inputs, grad = draw(Case("ladder"), torch.float32, change=lambda given: given["gate"].fill_(gate))
    wide = {name: value.double() for name, value in inputs.items()}
    exact = run(reference.ladder, wide, grad.double(), NAMES["ladder"], True)
    found = run(kernel("ladder"), inputs, grad, NAMES["ladder"], True)
    for name in ("state", "weight", "bias", "gate"):
        assert relative_error(found[name], exact[name]) < 1e-5, name


def test_gelu_over_its_range():
    """Far into both tails, where the derivative is 0 or 1, and through the middle."""
    inputs, grad = draw(Case("adapter", batch=1, frames=2000, side=1, adapter_dim=1), torch.float32)
    inputs |= {name: torch.ones_like(inputs[name]) for name in ("norm_weight", "weight_1", "weight_2")}
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("bias_1", "bias_2")}
    for value in torch.linspace(-30, 30, 121):
        inputs["norm_bias"] = value.reshape(1)  # a row of one element is its own mean: LN(x) is norm_bias
        found = run(kernel("adapter"), inputs, grad, NAMES["adapter"], False)
        point = value.double().requires_grad_()
        exact = torch.nn.functional.gelu(point)
        (slope,) = torch.autograd.grad(exact, point)
        assert abs(found["out"].double() - exact).max() <= 1e-6 * max(1, abs(value))
        expected = slope * grad.double().sum()
        assert abs(found["norm_bias"].double() - expected).item() <= 1e-4 * grad.abs().sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_another_type(dtype):
    """Half parameters with fp32 activations: widened inside, gradients in the parameter's type."""
    inputs, grad = draw(Case("ladder"), torch.float32)
    half = {
        name: value if name in ("x", "state", "mean", "rstd") else value.to(dtype)
        for name, value in inputs.items()
    }
    found = run(kernel("ladder"), half, grad, NAMES["ladder"], True)
    same = run(kernel("ladder"), {n: v.float() for n, v in half.items()}, grad, NAMES["ladder"], True)
    for name, value in same.items():
        expected = value.to(dtype) if name in half and half[name].dtype == dtype else value
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("broken", ["x", "state"])
def test_nan_stays_in_its_row(broken):
    inputs, grad = draw(Case("ladder", batch=1, frames=6), torch.float32)
    inputs[broken][0, 2, 3] = torch.nan
    inputs["mean"], inputs["rstd"] = reference.row_statistics(inputs["x"])
    found = run(kernel("ladder"), inputs, grad, NAMES["ladder"], True)
    for name in ("out", "state"):
        assert found[name][0].isnan().any(-1).tolist() == [False, False, True, False, False, False]
    assert all(found[name].isnan().any() for name in ("weight", "gate", "weight_1", "weight_2"))


def test_gradients_hold_no_memory_but_their_own():
    inputs, grad = draw(Case("ladder"), torch.float32)
    found = run(kernel("ladder"), inputs, grad, NAMES["ladder"], True)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in found.values())


WRONG = {
    "x": lambda x: x[..., :-1],
    "state": lambda state: state[..., :-1],
    "mean": lambda mean: mean[:, :-1],
    "rstd": lambda rstd: rstd[:1],
    "bias": lambda bias: bias[:-1],
    "gate": lambda gate: gate.repeat(2),
    "norm_weight": lambda weight: weight[:-1],
    "weight_1": lambda weight: weight[:, :-1],
    "bias_1": lambda bias: bias[:-1],
    "weight_2": lambda weight: weight[:-1],
    "bias_2": lambda bias: bias[:-1],
}


@pytest.mark.parametrize("name", list(WRONG))
def test_arguments_that_do_not_fit(name):
    """Refused before memory is touched."""
    inputs, grad = draw(Case("ladder"), torch.float32)
    inputs[name] = WRONG[name](inputs[name])
    with pytest.raises(ValueError, match="must"):
        kernel("ladder").forward(*inputs.values())
    with pytest.raises(ValueError, match="must"):
        kernel("ladder").backward(grad, *inputs.values(), False)


def test_upstream_gradient_that_does_not_fit():
    inputs, grad = draw(Case("ladder"), torch.float32)
    with pytest.raises(ValueError, match="grad must have shape"):
        kernel("ladder").backward(grad[:, :-1], *inputs.values(), False)
