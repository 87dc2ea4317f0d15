"""UniPT's ReLU attention in Triton: values and gradients by layers, widths, frames, lengths; dead queries."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from triton_fixtures import DEVICE, assert_as_good_as_reference, run

from meft_kernels import UniPT, use_backend
from meft_kernels.reference import relu_attention as reference
from meft_kernels.testing import Case, relative_error
from meft_kernels.triton_kernels import relu_attention as kernel
from meft_kernels.tune import choice
from meft_kernels.tune.table import TABLE

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_blocks")
TYPES = [torch.float32, torch.float16]
KERNELS = (
    "relu_attention_sum",
    "relu_attention_fwd",
    "relu_attention_bwd_anchor",
    "relu_attention_bwd_features",
)
ORDER = ("anchor", "gate_weight", "gate_bias", "lengths", "features")


@pytest.fixture
def small_blocks():
    """Several blocks of queries and of keys in small cases, of different sizes; on a GPU the table's own."""
    if DEVICE == "cuda":
        yield
        return
    rows = [choice.choose(name, 24) for name in KERNELS]
    small = [replace(row, widths=(1, 192), blocks=dict.fromkeys(row.blocks, 16)) for row in rows]
    small[2].blocks["BLOCK_N"] = 32
    with choice.trial(*small):
        yield


def names(case: Case) -> list[str]:
    return ["anchor", "gate_weight", "gate_bias", *(f"features[{i}]" for i in range(case.layers))]


def draw(case: Case, dtype: torch.dtype, seed: int = 0):
    """Inputs in the order of the kernel's arguments, and an upstream gradient."""
    grad = torch.randn(case.batch, case.frames, case.side, generator=torch.Generator().manual_seed(seed))
    inputs = case.inputs(dtype, DEVICE, seed)
    given = {name: inputs[name] for name in ORDER}
    return given | ({"pool": case.pool} if case.pool > 1 else {}), grad.to(DEVICE, dtype)


def check(case: Case, dtype: torch.dtype, draws: int = 1):
    pairs = [draw(case, dtype, seed) for seed in range(draws)]
    assert_as_good_as_reference(kernel, reference, pairs, names(case))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("side", [5, 24, 48, 80, 96, 160, 192])
def test_widths(side, dtype):
    check(Case("relu_attention", batch=2, frames=21, side=side, layers=2, masked=side != 80), dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("side", [24, 48, 160])
def test_loads_through_pointers(side, masked):
    """As in the rows for every family; the others' kernels use descriptors."""
    rows = [choice.choose(name, side) for name in KERNELS]
    with choice.trial(*(replace(row, descriptors=False) for row in rows)):
        check(Case("relu_attention", batch=2, frames=21, side=side, layers=2, masked=masked), torch.float16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("frames", [1, 12, 32, 37])
def test_frames(frames, dtype):
    """One frame, less than a block, whole blocks, and tails."""
    check(Case("relu_attention", batch=1, frames=frames, side=24, layers=2), dtype)


@pytest.mark.parametrize("layers", [1, 5])
def test_layers(layers):
    check(Case("relu_attention", batch=2, frames=20, side=24, layers=layers, masked=True), torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("frames", "side", "pool", "masked"),
    [(37, 24, 2, False), (21, 48, 4, True), (12, 5, 12, False)],
)
def test_pooled_keys(frames, side, pool, masked, dtype, monkeypatch):
    """Whole groups and last ones of fewer frames, blocks of keys and tails; one key for all."""
    monkeypatch.setattr(reference, "matmul", half_products)  # which rounds the means, as the kernels do
    check(Case("relu_attention", 2, frames, side=side, layers=2, masked=masked, pool=pool), dtype)


def test_pooled_keys_of_clips_of_any_length(monkeypatch):
    """None, one frame, a whole group and one more, a block of keys and one more, and more than there are."""
    case = Case("relu_attention", batch=7, frames=37, side=48, layers=1, pool=2)
    inputs, grad = draw(case, torch.float16)
    inputs["lengths"] = torch.tensor([0, 1, 2, 3, 32, 33, 99], device=DEVICE)
    monkeypatch.setattr(reference, "matmul", half_products)
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], names(case))


@pytest.mark.parametrize("pool", [1, 5])
def test_gradients_of_a_query_with_one_key_do_not_cancel(pool):
    """Products are exact in fp32, and one key behind the first has all of each query's weight."""
    generator = torch.Generator().manual_seed(0)
    anchor, feature = torch.zeros(1, 40, 8), torch.randint(-15, 16, (1, 40, 8), generator=generator) / 8
    anchor[..., 0] = 0.5 ** torch.randint(0, 16, (1, 40), generator=generator)
    feature = feature[:, ::pool].repeat_interleave(pool, 1)
    feature[..., 0] = -1
    feature[:, 20 : 20 + pool, 0] = 1
    grad = torch.randint(-15, 16, (1, 40, 8), generator=generator) / 8
    gate, given = (torch.zeros(1, 8), torch.zeros(1), None), (grad, anchor, feature)
    exact = [tensor.double() for tensor in given]
    truth = reference.backward(*exact[:2], *gate, [exact[2]], pool)  # in float64
    first = [tensor.to(DEVICE) for tensor in (grad, anchor, *gate[:2])]
    found = kernel.backward(*first, None, [feature.to(DEVICE)], pool)
    for index in (0, 3):
        error = (found[index].cpu().double() - truth[index]).norm(dim=-1)
        assert (error <= 1e-5 * truth[index].norm(dim=-1)).all(), index


def test_weights_far_below_the_epsilon_round_no_delta():
    """One key's E is large and its weight next to nothing beside the epsilon: delta is as small as that."""
    generator = torch.Generator().manual_seed(0)
    anchor, feature, grad = torch.randn(3, 2, 40, 8, generator=generator)
    anchor, feature = 1e-6 * anchor, 1e-6 * feature
    anchor[..., -1], feature[:, 0, -1] = 0, 1e6
    gate = torch.zeros(1, 8), torch.zeros(1), None
    truth = reference.backward(grad.double(), anchor.double(), *gate, [feature.double()], 1)  # in float64
    first = [tensor.to(DEVICE) for tensor in (grad, anchor, *gate[:2])]
    found = kernel.backward(*first, None, [feature.to(DEVICE)], 1)
    for index in (0, 3):
        error = (found[index].cpu().double() - truth[index]).norm(dim=-1)
        assert (error <= 1e-5 * truth[index].norm(dim=-1)).all(), index


def test_blocks_of_the_table():
    """The table's own block sizes, with tails behind them."""
    small = {name: choice.choose(name, 24).blocks for name in KERNELS}
    with choice.trial(*(row for row in TABLE if row.kernel in KERNELS)):
        for name, blocks in small.items():
            assert choice.choose(name, 24).blocks != blocks or DEVICE == "cuda"
        check(Case("relu_attention", batch=1, frames=150, side=24, layers=2, masked=True), torch.float16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_lengths_at_the_edges(dtype):
    """A clip without frames, one frame, a whole block, one more, all frames, and more than there are."""
    case = Case("relu_attention", batch=6, frames=20, side=24, layers=2)
    inputs, grad = draw(case, dtype)
    inputs["lengths"] = torch.tensor([0, 1, 16, 17, 20, 99], device=DEVICE)
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], names(case))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("special", ["dead query", "all negative", "one positive", "equal rows", "one gate"])
def test_degenerate_scores(special, dtype):
    case = Case("relu_attention", batch=1, frames=20, side=24, layers=2)
    pairs = []
    for seed in range(2):
        inputs, grad = draw(case, dtype, seed)
        if special == "dead query":
            inputs["anchor"][:, 3:18] = 0
        elif special == "all negative":
            inputs["anchor"] = -inputs["anchor"].abs()
            inputs["features"] = [feature.abs() for feature in inputs["features"]]
        elif special == "one positive":
            inputs["anchor"] = inputs["anchor"].abs()
            for index, feature in enumerate(inputs["features"]):
                feature.copy_(-feature.abs())
                feature[:, 17 + index].neg_()
        elif special == "equal rows":
            inputs["features"][1][:] = inputs["features"][1][:, :1]
        else:
            inputs["gate_weight"] *= 100
        pairs.append((inputs, grad))
    assert_as_good_as_reference(kernel, reference, pairs, names(case))


def test_dead_queries_pass_nothing_on():
    """Without a positive score only C_l F_l and C_l dM are left."""
    case = Case("relu_attention", batch=1, frames=40, side=24, layers=1)
    inputs, grad = draw(case, torch.float32)
    inputs["anchor"] = torch.zeros_like(inputs["anchor"])
    result = run(kernel, inputs, grad, names(case))
    assert torch.equal(result["out"], inputs["features"][0])
    assert torch.equal(result["features[0]"], grad)
    assert not result["anchor"].any() and not result["gate_weight"].any()


def test_bias_does_not_count():
    case = Case("relu_attention", batch=1, frames=20, layers=2)
    inputs, grad = draw(case, torch.float32)
    result = run(kernel, inputs, grad, names(case))
    moved = run(kernel, {**inputs, "gate_bias": inputs["gate_bias"] + 3}, grad, names(case))
    assert all(torch.equal(moved[name], result[name]) for name in result)
    assert not result["gate_bias"].any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_padding_reaches_no_valid_frame(dtype):
    """What stands behind a clip's end, NaN included, changes nothing in front of it, bit for bit."""
    case = Case("relu_attention", batch=2, frames=21, side=24, layers=2, masked=True)
    inputs, grad = draw(case, dtype)
    inputs["lengths"] = torch.tensor([9, 17], device=DEVICE)
    grad[0, 9:] = grad[1, 17:] = 0
    expected = run(kernel, inputs, grad, names(case))
    for feature in inputs["features"]:
        feature[0, 9:] = torch.nan
        feature[1, 17:] = torch.nan
    result = run(kernel, inputs, grad, names(case))
    for clip, length in enumerate((9, 17)):
        assert torch.equal(result["out"][clip, :length], expected["out"][clip, :length])
    assert result["out"][0, 9:].isnan().all()


@pytest.mark.parametrize("where", ["anchor", "features"])
def test_nan_stays(where):
    case = Case("relu_attention", batch=2, frames=20, side=24, layers=2)
    inputs, grad = draw(case, torch.float32)
    tensor = inputs["anchor"] if where == "anchor" else inputs["features"][0]
    tensor[0, 18, 3] = torch.nan
    result = run(kernel, inputs, grad, names(case))
    assert result["out"][0, 18].isnan().all()
    assert torch.isfinite(result["out"][1]).all()
    assert result["gate_weight"].isnan().any()
    assert result["anchor"][0].isnan().any() and result["features[0]"][0].isnan().any()


def test_strided_and_unaligned_inputs():
    case = Case("relu_attention", batch=2, frames=20, side=24, layers=2)
    inputs, grad = draw(case, torch.float16)
    strange = dict(inputs)
    strange["anchor"] = inputs["anchor"].mT.contiguous().mT
    strange["gate_weight"] = inputs["gate_weight"].repeat(2, 1).T[:, :1].T
    first, second = inputs["features"]
    strange["features"] = [
        first.transpose(0, 1).contiguous().transpose(0, 1),
        second.repeat(1, 1, 2)[..., :24],
    ]
    expected = run(kernel, inputs, grad, names(case))
    unaligned = torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape)
    got = run(kernel, strange, unaligned, names(case))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_clips_are_independent_and_runs_repeat():
    case = Case("relu_attention", batch=3, frames=21, side=48, layers=2, masked=True)
    inputs, grad = draw(case, torch.float16)
    together = run(kernel, inputs, grad, names(case))
    again = run(kernel, inputs, grad, names(case))
    assert all(torch.equal(together[name], again[name]) for name in together)
    one = {name: [f[1:2] for f in value] if name == "features" else value for name, value in inputs.items()}
    one |= {"anchor": inputs["anchor"][1:2], "lengths": inputs["lengths"][1:2]}
    alone = run(kernel, one, grad[1:2], names(case))
    assert torch.equal(alone["out"], together["out"][1:2])


@pytest.mark.parametrize("shape", [{"batch": 0}, {"frames": 0}], ids=["no clips", "no frames"])
def test_nothing_to_do(shape):
    case = Case("relu_attention", **shape)
    inputs, grad = draw(case, torch.float16)
    result = run(kernel, inputs, grad, names(case))
    assert result["out"].shape == grad.shape and result["features[2]"].shape == grad.shape
    assert not result["gate_weight"].any() and not result["gate_bias"].any()


def test_half_precision_parameters():
    case = Case("relu_attention", frames=20)
    inputs, grad = draw(case, torch.float16)
    inputs |= {name: inputs[name].half() for name in ("gate_weight", "gate_bias")}
    assert_as_good_as_reference(kernel, reference, [(inputs, grad)], names(case))


@pytest.mark.parametrize("missing", [None, *KERNELS])
def test_what_no_row_serves_goes_to_the_reference(missing, monkeypatch):
    case = Case("relu_attention", frames=10)
    inputs, grad = draw(case, torch.float64 if missing is None else torch.float32)
    if missing is not None:
        choose = choice.choose
        monkeypatch.setattr(choice, "choose", lambda name, *a: None if name == missing else choose(name, *a))
    expected = run(reference, inputs, grad, names(case))
    got = run(kernel, inputs, grad, names(case))
    served = ["out"] if missing == "relu_attention_fwd" else names(case)
    assert all(torch.equal(got[name], expected[name]) for name in served)


def half_products(a, b, dtype):
    """``matmul`` as on CUDA: operands rounded to the activations' type, fp32 results."""
    wide = torch.promote_types(dtype, torch.float32)
    return a.to(dtype).to(wide) @ b.to(dtype).to(wide)


def test_the_boost_is_a_power_of_two_of_at_least_the_frames():
    for frames, boost in ((0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048), (1500, 2048)):
        assert reference.boost(frames) == boost


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("module", [kernel, reference], ids=["kernel", "reference as on CUDA"])
def test_fp16_gradients_do_not_underflow(module, mean, monkeypatch):
    """30 seconds, features with a common mean, and the gradients of about 4e-4 that a loss scale of 65536
    leaves: the scores' gradients, about 1e-5 of them, are too small for fp16."""
    frames, side, generator = 1500, 24, torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    grad = 5e-4 * normal(1, 1, side) + 5e-5 * normal(1, frames, side)
    anchor, *features = (mean + normal(1, frames, side) for _ in range(2))
    half = [tensor.half().to(DEVICE) for tensor in (grad, anchor, *features)]
    gate = [tensor.to(DEVICE) for tensor in (0.1 * normal(1, side), torch.zeros(1))]
    exact = [tensor.double() for tensor in half]
    truth = reference.backward(*exact[:2], *(g.double() for g in gate), None, exact[2:])
    monkeypatch.setattr(reference, "matmul", half_products)
    rows = [choice.choose(name, side) for name in KERNELS]
    large = [replace(row, widths=(1, 192), blocks=dict.fromkeys(row.blocks, 512)) for row in rows]
    with choice.trial(*(large if DEVICE == "cpu" else rows)):  # the interpreter's time is that of its tiles
        found = module.backward(*half[:2], *gate, None, half[2:])
    for name, expected, got in zip(("anchor", "weight", "bias", "feature"), truth, found):
        assert relative_error(got, expected) < 2e-3 or name == "bias", name


def test_nan_in_a_score_stays():
    """A padding query is no part of any mean, so its NaN reaches the result through its scores alone."""
    case = Case("relu_attention", batch=1, frames=21, side=24, layers=2, masked=True)
    inputs, _ = draw(case, torch.float32)
    inputs["lengths"] = torch.tensor([18], device=DEVICE)
    inputs["anchor"][0, 20, 3] = torch.nan
    out = kernel.forward(*inputs.values())
    assert out[0, 20].isnan().all() and torch.isfinite(out[0, :20]).all()


@pytest.mark.parametrize(("masked", "pool"), [(False, 1), (True, 1), (True, 4)])
def test_gradients_over_the_features_are_those_beside_them(masked, pool):
    inputs, grad = draw(Case("relu_attention", batch=3, frames=37, layers=4, masked=masked), torch.float32)
    *given, features = inputs.values()
    slab = torch.stack(features)
    expected = kernel.backward(grad, *given, list(slab.clone().unbind(0)), pool)
    found = kernel.backward_in_place(grad, *given, slab, pool)
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip([*found, *slab], expected, strict=True))


@pytest.mark.parametrize(("keep", "attention"), [("exact", "exact"), ("fp8", "exact"), ("exact", "pooled:5")])
def test_a_graph_that_is_kept_gives_its_gradients_twice(keep, attention):
    """The features' slab is then left alone; without, it takes the gradients, which are the same."""
    torch.manual_seed(0)
    side = UniPT(96, 3, 4, saved_activations=keep, device=DEVICE, attention=attention)
    states = [0.5 + torch.randn(2, 21, 96, device=DEVICE) for _ in range(4)]
    parameters = list(side.parameters())
    with use_backend("triton"):
        out = side.pooled(states)
        upstream = torch.randn_like(out)
        once, twice = (torch.autograd.grad(out, parameters, upstream, retain_graph=True) for _ in range(2))
        last = torch.autograd.grad(out, parameters, upstream)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, parameters, upstream)
        with torch.no_grad():
            torch.testing.assert_close(side.pooled(states), out)
    for grads in (twice, last):
        assert all(torch.equal(a, b) for a, b in zip(grads, once, strict=True))


def test_hidden_states_of_unipt_may_need_gradients():
    torch.manual_seed(0)
    side = UniPT(96, 3, 4, device=DEVICE)
    states = [torch.randn(2, 21, 96, device=DEVICE, requires_grad=True) for _ in range(4)]
    expected = torch.autograd.grad(side.pooled(states).square().sum(), states)
    with use_backend("triton"):
        found = torch.autograd.grad(side.pooled(states).square().sum(), states)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_the_gradient_of_a_single_hidden_state_is_its_own(keep_graph):
    """Of features in one slab, beside others that take none."""
    torch.manual_seed(0)
    side = UniPT(32, 2, 4, device=DEVICE)
    side.down.requires_grad_(False)
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    states = [torch.randn(2, 5, 32, device=DEVICE) for _ in range(3)]
    states[1].requires_grad_()
    expected = torch.autograd.grad(side.pooled(states).square().sum(), states[1])
    with use_backend("triton"):
        out = side.pooled(states).square().sum()
        found = torch.autograd.grad(out, states[1], retain_graph=keep_graph)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
