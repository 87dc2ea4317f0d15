"""SHERL's guidance of shallow vectors so short that their squares leave float32: every backend is near the
definition in float64, which takes what is shorter than a bound for zero."""

import pytest
import torch

from meft_kernels import native, ops, reference
from meft_kernels.reference.common import GUIDANCE_SHORT
from meft_kernels.testing import relative_error

# Norms, the bound among them.
LENGTHS = [3e-38, 1.5e-27, 1e-25, 1e-22, 1e-16, 0.99e-14, 1.01e-14, 1e-12, 1e-10, 1e-7]
BACKENDS = [
    "definition",
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.LOADED, reason="not built")),
]


def results(features: list, upstream: torch.Tensor, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    width = features[0].shape[-1]
    given = [(0.2 * torch.randn(1, width)).to(dtype), torch.ones(1, dtype=dtype)]
    given = [each.requires_grad_() for each in (*given, *(each.to(dtype) for each in features))]
    if backend == "definition":
        out = reference.guidance.definition(*given[:2], given[2:])
    else:
        with ops.use_backend(backend):
            out = ops.guidance(*given[:2], given[2:])
    return [out.detach(), *torch.autograd.grad(out, given, upstream.to(dtype), allow_unused=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("others", [0, 1, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_near_float64(length, others, backend):
    torch.manual_seed(0)
    short = torch.randn(4, 24)
    short *= length / short.norm(dim=-1, keepdim=True)
    features = [short, *torch.randn(others, 4, 24), torch.randn(4, 24)]
    upstream = torch.randn(4, 24)
    # The definition's own gradients cancel: those of one layer by all digits.
    truth = results(features, upstream, "reference", torch.float64)
    truth[0] = results(features, upstream, "definition", torch.float64)[0]
    found = results(features, upstream, backend, torch.float32)
    for place, (one, exact) in enumerate(zip(found, truth)):
        assert one.isfinite().all(), place
        if backend != "definition" or place == 0:
            small = max(one.abs().max(), exact.abs().max()) < 1e-30
            assert small or relative_error(one, exact) < 1e-4, place


@pytest.mark.parametrize("backend", BACKENDS)
def test_shorter_than_the_bound_is_as_zero(backend):
    torch.manual_seed(0)
    features = [torch.full((4, 24), GUIDANCE_SHORT / 100), *torch.randn(3, 4, 24)]
    zero = [torch.zeros(4, 24), *features[1:]]
    upstream = torch.randn(4, 24)
    found, expected = (results(each, upstream, backend, torch.float32) for each in (features, zero))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
