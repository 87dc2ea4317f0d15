"""SHERL's guidance in Triton: values and gradients by layers, widths and frames; degenerate frames."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from triton_fixtures import DEVICE, assert_as_good_as_reference, convert, run

from meft_kernels.reference import guidance as reference
from meft_kernels.testing import Case
from meft_kernels.triton_kernels import guidance as kernel
from meft_kernels.tune import choice

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_groups")
TYPES = [torch.float32, torch.float16]


@pytest.fixture
def few_groups(monkeypatch):
    """Two tiles of frames per program: more than one of either in small cases."""
    monkeypatch.setattr(kernel, "split", lambda pieces, **_: (2, -(-pieces // 2)))


def names(case: Case) -> list[str]:
    return ["weight", "bias", *(f"features[{i}]" for i in range(case.layers))]


def draw(case: Case, dtype: torch.dtype, seed: int = 0):
    """Inputs and an upstream gradient.

    Where the logits' positive parts add up to next to nothing, their rounding is divided by next to nothing,
    in the reference as here, and the error would be luck: such frames get a zero deep feature, which leaves
    the bias for every logit.
    """
    inputs = case.inputs(dtype, DEVICE, seed)
    inputs["bias"] = inputs["bias"].abs() + 0.1
    *shallow, deep = (feature.double() for feature in inputs["features"])
    weight, bias = inputs["weight"].double(), inputs["bias"].double()
    total = sum(((x * deep) @ weight[0] + bias).relu() for x in shallow)
    if shallow:
        inputs["features"][-1][(total > 0) & (total < 0.1)] = 0
    grad = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(seed))
    return inputs, grad.to(DEVICE, dtype)


def check(case: Case, dtype: torch.dtype, draws: int = 2, **options):
    pairs = [draw(case, dtype, seed) for seed in range(draws)]
    assert_as_good_as_reference(kernel, reference, pairs, names(case), **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [9, 24, 48, 80, 96, 160, 192])
def test_widths(side, dtype):
    check(Case("guidance", batch=2, frames=5, side=side, layers=4), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layers", [2, 3, 11, 18, 31])
def test_layers(layers, dtype):
    check(Case("guidance", batch=1, frames=7, side=48, layers=layers), dtype)


@pytest.mark.parametrize("batch, frames", [(1, 1), (1, 3), (2, 4), (1, 64), (2, 37)])
def test_frames(batch, frames):
    """Fewer than a tile, exactly one program, and tails in the middle of a program."""
    check(Case("guidance", batch=batch, frames=frames, side=24), torch.float32)


def test_single_feature_is_copied():
    case = Case("guidance", layers=1)
    inputs, grad = draw(case, torch.float32)
    result = run(kernel, inputs, grad, names(case))
    assert torch.equal(result["out"], inputs["features"][0])
    assert result["out"].data_ptr() != inputs["features"][0].data_ptr()
    assert torch.equal(result["features[0]"], grad)
    assert not result["weight"].any() and not result["bias"].any()


def test_no_frames():
    case = Case("guidance", batch=0)
    inputs, grad = draw(case, torch.float16)
    result = run(kernel, inputs, grad, names(case))
    assert result["out"].shape == (0, case.frames, case.side)
    assert not result["weight"].any() and not result["bias"].any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("special", ["zero", "all zero", "identical", "opposite", "short", "long"])
def test_degenerate_frames(special, dtype):
    """The cosines of zero vectors, of copies and of opposites; norms near the epsilon and near fp16's end."""
    case = Case("guidance", batch=1, frames=9, side=24, layers=5)
    pairs = []
    for seed in range(2):
        inputs, grad = draw(case, dtype, seed)
        shallow, deep = inputs["features"][:-1], inputs["features"][-1]
        if special == "zero":
            shallow[1][:, 2:5] = 0
        elif special == "all zero":
            for feature in shallow:
                feature[:, 4] = 0
        elif special == "identical":
            shallow[2][:, 3:] = shallow[0][:, 3:]
        elif special == "opposite":
            shallow[2][:, 3:] = -shallow[0][:, 3:]
        elif special == "short":
            shallow[0][:, 1::2] *= 1e-3
        else:
            deep *= 100
            shallow[0][:, 1::2] *= 1000
            inputs["weight"] /= 1e4
        pairs.append((inputs, grad))
    assert_as_good_as_reference(kernel, reference, pairs, names(case))


def test_no_positive_logit():
    """Only the deep feature and its gradient are left, bit for bit."""
    case = Case("guidance", frames=6, layers=4)
    inputs, grad = draw(case, torch.float32)
    inputs["bias"] = torch.full_like(inputs["bias"], -1e4)
    result = run(kernel, inputs, grad, names(case))
    assert torch.equal(result["out"], inputs["features"][-1])
    assert torch.equal(result["features[3]"], grad)
    assert not any(result[name].any() for name in ("weight", "bias", "features[0]", "features[1]"))


@pytest.mark.parametrize("where", [0, -1])
def test_nan_stays(where):
    case = Case("guidance", batch=1, frames=6, layers=4)
    inputs, grad = draw(case, torch.float32)
    inputs["features"][where][0, 2, 3] = torch.nan
    result = run(kernel, inputs, grad, names(case))
    assert result["out"][0, 2].isnan().any()
    assert torch.isfinite(result["out"][0, [0, 1, 3, 4, 5]]).all()
    assert result["weight"].isnan().any()


def test_strided_and_unaligned_inputs():
    case = Case("guidance", batch=2, frames=5, side=24)
    inputs, grad = draw(case, torch.float16)
    strange = convert(inputs, lambda t: t.clone())
    first, second, third = inputs["features"]
    unaligned = torch.cat([second.new_zeros(1), second.flatten()])[1:].view(second.shape)
    strange["features"] = [first.mT.contiguous().mT, unaligned, third.repeat(1, 1, 2)[..., :24]]
    expected = run(kernel, inputs, grad, names(case))
    got = run(kernel, strange, grad.mT.contiguous().mT, names(case))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_frames_are_independent_and_runs_repeat():
    case = Case("guidance", batch=3, frames=5, side=48, layers=4)
    inputs, grad = draw(case, torch.float16)
    together = run(kernel, inputs, grad, names(case))
    again = run(kernel, inputs, grad, names(case))
    assert all(torch.equal(together[name], again[name]) for name in together)
    one = {**inputs, "features": [f[1:2] for f in inputs["features"]]}
    alone = run(kernel, one, grad[1:2], names(case))
    assert torch.equal(alone["out"], together["out"][1:2])
    assert torch.equal(alone["features[0]"], together["features[0]"][1:2])


def test_half_precision_parameters():
    case = Case("guidance", frames=5)
    inputs, grad = draw(case, torch.float16)
    inputs |= {name: inputs[name].half() for name in ("weight", "bias")}
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], names(case))


def test_what_no_row_serves_goes_to_the_reference(monkeypatch):
    case = Case("guidance", frames=3)
    others = replace(case, layers=40), replace(case, side=100), replace(case, side=16, layers=20)
    for change, dtype in ((case, torch.float64), *((other, torch.float32) for other in others)):
        inputs, grad = draw(change, dtype)
        expected = run(reference, inputs, grad, names(change))
        got = run(kernel, inputs, grad, names(change))
        gradients = expected.keys() - {"out"}  # of some the forward has a row
        assert all(torch.equal(got[name], expected[name]) for name in gradients)
    monkeypatch.setattr(choice, "choose", lambda *_: None)
    inputs, grad = draw(case, torch.float32)
    expected = run(reference, inputs, grad, names(case))
    got = run(kernel, inputs, grad, names(case))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64], ids=str)
@pytest.mark.parametrize("module", [kernel, reference])
@pytest.mark.parametrize("layout", ["rows", "strided", "unaligned"])
def test_gradients_over_the_features(layout, module, dtype):
    case = Case("guidance", batch=2, frames=5, side=24, layers=4)
    inputs, grad = draw(case, dtype)
    expected = module.backward(grad, *inputs.values())
    features = [each.clone() for each in inputs["features"]]
    if layout == "strided":
        features[0] = features[0].mT.contiguous().mT
    elif layout == "unaligned":
        features[1] = torch.cat([grad.new_zeros(1), features[1].flatten()])[1:].view(grad.shape)
    found = module.backward_(grad, inputs["weight"], inputs["bias"], features)
    assert all(torch.equal(a, b) for a, b in zip([*found, *features], expected, strict=True))


@pytest.mark.parametrize("length", [1e-27, 0.99e-14, 1.01e-14, 1e-10])
def test_vectors_about_the_bound_below_which_they_count_as_zero(length):
    case = Case("guidance", batch=1, frames=4, side=24, layers=4)
    inputs, grad = draw(case, torch.float32)
    first = inputs["features"][0]
    first *= length / first.norm(dim=-1, keepdim=True)
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], names(case))
