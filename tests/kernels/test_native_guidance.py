"""SHERL's guidance in C++: degenerate frames, NaN, many layers."""

import pytest
import torch

from meft_kernels import native, use_backend
from meft_kernels.testing import Case, outputs_and_gradients, relative_error

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.REASON)


def run(case: Case, inputs: dict, backend: str = "native", dtype: torch.dtype | None = None) -> dict:
    upstream = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(3))
    with use_backend(backend):
        return outputs_and_gradients(case.function(), inputs, upstream, dtype)


def assert_close(case: Case, inputs: dict) -> None:
    """As near to float64 as the reference in fp32, and a few roundings. The bias' gradient is one number,
    whose error is mostly luck: it is judged as one vector with the weight's."""
    sides = [run(case, inputs, *how) for how in (("reference", torch.float64), ("reference",), ("native",))]
    for side in sides:
        side["weight"] = torch.cat([side["weight"].flatten(), side.pop("bias")])
    truth, plain, found = sides
    for name, exact in truth.items():
        allowed = 2 * relative_error(plain[name], exact) + 4 * torch.finfo(torch.float32).eps
        error = relative_error(found[name], exact)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("layers", [2, 5, 12, 32])
@pytest.mark.parametrize("side", [3, 16, 96])
def test_layers_and_widths(layers, side):
    case = Case("guidance", batch=1, frames=19, side=side, layers=layers)
    inputs = case.inputs(torch.float32)
    inputs["bias"] = inputs["bias"].abs() + 0.1
    assert_close(case, inputs)


@pytest.mark.parametrize("special", ["zero", "all zero", "identical", "opposite", "short", "tiny"])
def test_degenerate_frames(special):
    """The cosines of zero vectors, of copies and of opposites; norms near the epsilon and far below."""
    case = Case("guidance", batch=1, frames=21, layers=5)
    inputs = case.inputs(torch.float32)
    inputs["bias"] = inputs["bias"].abs() + 0.1
    shallow = inputs["features"][:-1]
    if special == "zero":
        shallow[1][:, 2:5] = 0
    elif special == "all zero":
        for feature in shallow:
            feature[:, 4] = 0
    elif special == "identical":
        shallow[2][:, 3:] = shallow[0][:, 3:]
    elif special == "opposite":
        shallow[2][:, 3:] = -shallow[0][:, 3:]
    else:
        shallow[0][:, 1::2] *= {"short": 1e-6, "tiny": 1e-15}[special]
    assert_close(case, inputs)


def test_no_positive_logit():
    """Only the deep feature and its gradient are left, bit for bit."""
    case = Case("guidance", frames=18, layers=4)
    inputs = case.inputs(torch.float32)
    inputs["bias"] = torch.full_like(inputs["bias"], -1e4)
    found = run(case, inputs)
    assert torch.equal(found["out"], inputs["features"][-1])
    upstream = torch.randn(case.batch, 18, case.side, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found["features[3]"], upstream)
    assert not any(found[name].any() for name in ("weight", "bias", "features[0]", "features[1]"))


@pytest.mark.parametrize("where", [0, -1])
def test_nan_stays_in_its_frame(where):
    case = Case("guidance", batch=1, frames=20, layers=4)
    inputs = case.inputs(torch.float32)
    inputs["features"][where][0, 2, 3] = torch.nan
    found = run(case, inputs)
    others = torch.arange(20) != 2
    assert found["out"][0, 2].isnan().any() and found["weight"].isnan().any()
    assert torch.isfinite(found["out"][0, others]).all()
    assert torch.isfinite(found["features[1]"][0, others]).all()


def test_frames_are_independent():
    """A frame's results do not depend on which frames share its vectors."""
    case = Case("guidance", batch=3, frames=21, side=40, layers=4)
    inputs = case.inputs(torch.float32)
    with use_backend("native"):
        together = case.function()(**inputs)
        for clip in range(3):
            one = {**inputs, "features": [f[clip : clip + 1] for f in inputs["features"]]}
            assert torch.equal(case.function()(**one), together[clip : clip + 1])
