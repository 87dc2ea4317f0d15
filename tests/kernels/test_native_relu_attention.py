"""UniPT's ReLU attention in C++: padding, dead queries, tiles and shares of work cut anywhere."""

import pytest
import torch

from meft_kernels import native, use_backend
from meft_kernels.testing import Case, outputs_and_gradients, relative_error

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.REASON)


def run(case: Case, inputs: dict, backend: str = "native", dtype: torch.dtype | None = None) -> dict:
    upstream = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(3))
    with use_backend(backend):
        return outputs_and_gradients(case.function(), inputs, upstream, dtype)


def assert_close(case: Case, *draws: dict) -> None:
    """As near to float64 as the reference in fp32, and a few roundings; on average where there are draws."""
    errors, allowed = {}, {}
    for inputs in draws:
        truth = run(case, inputs, "reference", torch.float64)
        plain, found = run(case, inputs, "reference"), run(case, inputs)
        for name, exact in truth.items():
            if not exact.any():
                assert not found[name].any(), name
                continue
            limit = 2 * relative_error(plain[name], exact) + 4 * torch.finfo(torch.float32).eps
            allowed[name] = allowed.get(name, 0) + limit / len(draws)
            errors[name] = errors.get(name, 0) + relative_error(found[name], exact) / len(draws)
    for name, error in errors.items():
        assert error <= allowed[name], f"{name}: error {error:.2e}, allowed {allowed[name]:.2e}"


@pytest.mark.parametrize("frames", [15, 16, 64, 65, 128, 200, 300])
def test_frames(frames):
    """Fewer than a block of queries, whole ones, and tails of blocks and of tiles."""
    case = Case("relu_attention", batch=1, frames=frames, side=24, layers=2)
    assert_close(case, case.inputs(torch.float32))


def test_long_sums_keep_their_digits():
    """Sums over a thousand keys err as PyTorch's products do, not as sums of terms one after the other."""
    case = Case("relu_attention", batch=1, frames=1100, side=80, layers=1)
    inputs = case.inputs(torch.float32)
    truth = run(case, inputs, "reference", torch.float64)
    plain, found = run(case, inputs, "reference"), run(case, inputs)
    for name in ("out", "anchor"):
        assert relative_error(found[name], truth[name]) < 1.3 * relative_error(plain[name], truth[name]), name


def leaning(case: Case, by: float, seed: int = 5) -> dict:
    """Inputs around zero, features leaning to the anchor's side: scores' mean is about ``by`` standard
    deviations."""
    inputs = case.inputs(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.frames, case.side)
    lean = case.side**-0.25
    inputs["anchor"] = torch.randn(shape, generator=generator) + lean
    inputs["features"] = [torch.randn(shape, generator=generator) + by * lean for _ in range(case.layers)]
    return inputs


@pytest.mark.parametrize(("by", "least", "most"), [(-1, 0.05, 0.3), (0, 0.4, 0.6), (1, 0.7, 0.9)])
@pytest.mark.parametrize(
    ("frames", "side"),
    [
        (150, 64),  # zeros count whatever their share
        (150, 65),  # a panel that is not full; here and below zeros are left out where they are many
        (209, 96),  # a full panel, blocks of queries and tiles of keys that are cut short
        (129, 150),  # two panels, the second not full
        (300, 384),  # three full panels and larger blocks of queries
    ],
)
def test_shares_of_active_scores(frames, side, by, least, most):
    """Few, half and most scores positive, at widths of one panel and of several."""
    case = Case("relu_attention", batch=1, frames=frames, side=side, layers=2)
    draws = [leaning(case, by, seed) for seed in range(3)]
    for inputs in draws:
        scores = inputs["anchor"] @ inputs["features"][0].mT
        assert least <= (scores > 0).float().mean() <= most
    assert_close(case, *draws)


def test_blocks_with_and_without_zeros():
    """Blocks of queries of either kind in one clip and in clips of any length."""
    case = Case("relu_attention", batch=5, frames=400, side=144, layers=2)
    inputs = leaning(case, 0)
    inputs["features"] = [feature + 0.3 for feature in inputs["features"]]
    inputs["anchor"][:, 128:256] -= 0.6
    inputs["lengths"] = torch.tensor([400, 0, 1, 70, 257])
    scores = (inputs["anchor"] @ inputs["features"][0].mT > 0).float()
    assert scores[:, :128].mean() > 0.8 and scores[:, 128:256].mean() < 0.5
    assert_close(case, inputs)


def test_lengths_from_none_to_all():
    case = Case("relu_attention", batch=5, frames=150, side=17, layers=2)
    inputs = case.inputs(torch.float32)
    inputs["lengths"] = torch.tensor([0, 1, 64, 129, 150])
    assert_close(case, inputs)


@pytest.mark.parametrize(("pool", "side"), [(2, 24), (7, 144), (40, 5), (150, 17), (999, 16)])
def test_pooled_keys(pool, side):
    """Clips of any length: no key, one, whole groups, last ones of fewer frames; all frames in one."""
    case = Case("relu_attention", batch=6, frames=150, side=side, layers=2, pool=pool)
    inputs = case.inputs(torch.float32)
    inputs["lengths"] = torch.tensor([0, 1, 64, 80, 129, 150])
    assert_close(case, inputs)


@pytest.mark.parametrize("side", [5, 24, 100])
def test_linear_attention(side):
    """Blocks of frames and tails, clips of any length, and what NaN in padding reaches."""
    case = Case("linear_attention", batch=5, frames=230, side=side, layers=3)
    draws = [case.inputs(torch.float32, seed=seed) for seed in range(4)]
    for inputs in draws:
        inputs["lengths"] = torch.tensor([0, 1, 96, 97, 230])
    assert_close(case, *draws)
    with use_backend("native"):
        expected = case.function()(**inputs)
        inputs["features"][0][2, 96:] = torch.nan
        found = case.function()(**inputs)
    assert torch.equal(found[2, :96], expected[2, :96]) and found[2, 96:].isnan().all()
    assert torch.equal(found[3:], expected[3:])


@pytest.mark.parametrize("where", ["anchor", "feature"])
def test_linear_attention_hands_on_nan(where):
    case = Case("linear_attention", batch=2, frames=40, side=8, layers=2)
    inputs = case.inputs(torch.float32)
    (inputs["anchor"] if where == "anchor" else inputs["features"][1])[0, 5, 2] = torch.nan
    found = run(case, inputs)
    assert found["out"][0].isnan().any() and found["anchor"][0].isnan().any()
    assert found["features[1]"][0].isnan().any() and found["gate_weight"].isnan().any()
    assert torch.isfinite(found["out"][1]).all() and torch.isfinite(found["anchor"][1]).all()


def test_padding_does_not_count():
    """Whatever stands in padded frames, NaN too, valid frames come out the same."""
    case = Case("relu_attention", batch=2, frames=70, side=8, layers=2)
    inputs = case.inputs(torch.float32)
    inputs["lengths"] = torch.tensor([33, 70])
    with use_backend("native"):
        expected = case.function()(**inputs)
        inputs["features"][0][0, 33:] = torch.nan
        found = case.function()(**inputs)
    assert torch.equal(found[0, :33], expected[0, :33]) and torch.equal(found[1], expected[1])
    assert found[0, 33:].isnan().all()


def test_queries_without_a_positive_score():
    case = Case("relu_attention", batch=1, frames=90, side=8, layers=3)
    inputs = case.inputs(torch.float32)
    inputs["features"] = [feature.abs() for feature in inputs["features"]]
    inputs["anchor"][:, ::3] = -inputs["anchor"][:, ::3].abs()
    found = run(case, inputs)
    assert_close(case, inputs)
    gates_share = found["anchor"][:, 0]
    assert torch.allclose(found["anchor"][:, ::3], gates_share[:, None].expand(-1, 30, -1), rtol=1e-6)


@pytest.mark.parametrize("side", [8, 96])
@pytest.mark.parametrize("where", ["anchor", "feature"])
def test_nan_is_not_hidden(where, side):
    case = Case("relu_attention", batch=2, frames=40, side=side, layers=2)
    inputs = case.inputs(torch.float32)
    (inputs["anchor"] if where == "anchor" else inputs["features"][1])[0, 5, 2] = torch.nan
    found = run(case, inputs)
    assert found["out"][0].isnan().any() and found["anchor"][0].isnan().any()
    assert found["features[1]"][0].isnan().any() and found["gate_weight"].isnan().any()
    assert torch.isfinite(found["out"][1]).all() and torch.isfinite(found["anchor"][1]).all()


@pytest.mark.parametrize("threads", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("op", "side", "pool"),
    [
        ("relu_attention", 12, 1),
        ("relu_attention", 144, 1),
        ("relu_attention", 12, 4),
        ("linear_attention", 12, 1),
    ],
)
def test_clips_split_between_threads(threads, op, side, pool):
    """Shares of work that begin and end in the middle of a clip, and more threads than work."""
    case = Case(op, batch=2, frames=33, side=side, layers=3, pool=pool)
    inputs = case.inputs(torch.float32)
    before = torch.get_num_threads()
    alone = run(case, inputs)
    try:
        torch.set_num_threads(threads)
        found, again = run(case, inputs), run(case, inputs)
    finally:
        torch.set_num_threads(before)
    for name, value in found.items():
        assert torch.equal(value, again[name])
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5, msg=name)
