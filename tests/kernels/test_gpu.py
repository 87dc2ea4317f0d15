"""The Triton kernels on a real GPU at real shapes: accuracy, repeatability, independence, training."""

import warnings
from dataclasses import replace

import pytest
import torch

import meft_kernels
from meft_kernels import ops, reference, use_backend
from meft_kernels.ops import self_check
from meft_kernels.ops.registration import WITHOUT_TRITON
from meft_kernels.testing import (
    Case,
    assert_as_good_as_torch,
    flat_tensors,
    outputs_and_gradients,
)

pytestmark = pytest.mark.gpu

WIDTHS = (384, 512, 768, 1024, 1280)
FACTORS = (2, 4, 8, 16)
FUSED = [name for name in ops.OP_NAMES if name != "row_statistics" and name not in WITHOUT_TRITON]


@pytest.fixture(autouse=True)
def _strict_matmul():
    """Truth and yardstick in full fp32: TF32 in the reference makes a right kernel look wrong."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def real_case(op, width, factor, **options):
    shape = {"batch": 2, "frames": 1500, "width": width, "side": width // factor, "adapter_dim": 256}
    return Case(op=op, **{**shape, "layers": 4, "factor": 1.5, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op", FUSED)
def test_error_at_real_shapes(op, width, factor, dtype):
    with use_backend("triton"):
        assert_as_good_as_torch(real_case(op, width, factor), dtype, "cuda", draws=1)


@pytest.mark.parametrize("op", FUSED)
def test_fp32_at_odd_shapes(op):
    for frames in (1, 37, 200):
        case = real_case(op, 768, 8, frames=frames, batch=3, layers=11)
        with use_backend("triton"):
            assert_as_good_as_torch(case, torch.float32, "cuda", draws=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("op", FUSED)
def test_auto_takes_the_fused_kernels(op, factor, dtype, monkeypatch):
    """Every kernel passes the check that users' first calls run: a warning would say which does not."""
    monkeypatch.setattr(self_check, "verdicts", {})
    case = real_case(op, 768, factor, frames=100)
    inputs = case.inputs(dtype, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = case.function()(**inputs)
        outputs_and_gradients(case.function(), inputs, torch.ones_like(out))
    assert self_check.verdicts and all(self_check.verdicts.values())


@pytest.mark.parametrize("op", ["relu_attention"])
def test_masked_lengths(op):
    with use_backend("triton"):
        case = real_case(op, 768, 8, masked=True, batch=5, frames=700)
        assert_as_good_as_torch(case, torch.bfloat16, "cuda", draws=1)


def results(case, dtype, seed=0):
    inputs = case.inputs(dtype, "cuda", seed)
    shape = case.definition()(**inputs).shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    return inputs, upstream, outputs_and_gradients(case.function(), inputs, upstream)


@pytest.mark.parametrize("op", FUSED)
def test_same_bits_on_every_run(op):
    with use_backend("triton"):
        case = real_case(op, 768, 8, batch=4)
        _, _, first = results(case, torch.bfloat16)
        for _ in range(3):
            _, _, again = results(case, torch.bfloat16)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("op", FUSED)
def test_a_sample_does_not_depend_on_its_batch(op):
    with use_backend("triton"):
        case = real_case(op, 768, 8, batch=6)
        inputs, _, together = results(case, torch.bfloat16)
        activations = {n for n, t in flat_tensors(inputs).items() if t.ndim == 3}

        def one(value):
            if isinstance(value, list):
                return [one(item) for item in value]
            return value[3:4] if isinstance(value, torch.Tensor) and value.ndim == 3 else value

        alone = case.function()(**{name: one(value) for name, value in inputs.items()})
        assert activations
        if op in ("relu_attention", "guidance"):
            assert torch.equal(alone, together["out"][3:4])
        else:  # the library's products may choose another order of summation for another number of rows
            torch.testing.assert_close(alone, together["out"][3:4], rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_eight_bit_copies(width, dtype, kind):
    """At real shapes: the reference's codes but for roundings of fp32, the same bits every time, NaN kept."""
    x = 3 * torch.randn(width, device="cuda") + torch.randn(5, 1500, width, device="cuda")
    x = x.to(dtype)
    statistics = ops.row_statistics(x)
    plain, fused = torch.ops.meft_reference, torch.ops.meft_triton
    expected = plain.encode(x, *statistics, kind)
    code, scale, shift = fused.encode(x, *statistics, kind)
    torch.testing.assert_close(scale, expected[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(shift, expected[2], rtol=1e-5, atol=1e-6)
    other = code.view(torch.uint8) != expected[0].view(torch.uint8)
    assert other.float().mean() < 1e-3
    apart = (code.float() - expected[0].float()).abs()
    if kind == "int8":
        assert apart.max() <= 1
    else:
        assert (apart / expected[0].float().abs().clamp(min=2**-6)).max() <= 1 / 8
    for _ in range(3):
        again = fused.encode(x, *statistics, kind)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, (code, scale, shift)))
    for more in ((), statistics):
        results = [op.decode(code, scale, shift, x.new_empty(0), *more) for op in (plain, fused)]
        torch.testing.assert_close(*results, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    x[2, 700, 5] = torch.nan
    spoilt = fused.encode(x, *reference.row_statistics(x), kind)
    assert fused.decode(*spoilt, x.new_empty(0)).isnan().all()


def test_eight_bit_conversions_are_those_of_torch():
    pytest.importorskip("triton")
    from kernels import test_triton_eight_bit as suite

    for values in (suite.boundary_values, suite.random_values):
        suite.test_conversion_equals_that_of_torch_bit_for_bit(values)
    suite.test_roots_are_rounded_to_the_nearest_integer()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for kind in ("int8", "fp8"):
            suite.test_every_code_is_decoded_as_by_torch(dtype, kind)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bit_copies_of_more_elements_than_int32_counts(kind):
    x = torch.zeros(2**31 // 768 + 1000, 768, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(768, device="cuda")
    statistics = torch.zeros(len(x), device="cuda"), torch.ones(len(x), device="cuda")
    encoded = torch.ops.meft_triton.encode(x, *statistics, kind)
    out = torch.ops.meft_triton.decode(*encoded, x.new_empty(0))
    torch.testing.assert_close(out[-1:], x[-1:], rtol=2e-2, atol=1e-5)  # the largest of its channel
    assert out[:-1].abs().max() < 1e-4


def test_new_shapes_do_not_compile_again():
    import triton

    compiled = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["fn"])
    try:
        for op in FUSED:
            with use_backend("triton"):
                results(real_case(op, 768, 8, batch=3, frames=150), torch.bfloat16)
                compiled.clear()
                for batch, frames in ((1, 1), (2, 64), (5, 333)):
                    results(real_case(op, 768, 8, batch=batch, frames=frames), torch.bfloat16)
                assert not compiled, f"{op} compiled again: {compiled}"
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook


def test_more_elements_than_int32_counts():
    """Rows times width past 2^31: offsets must be 64 bits wide."""
    rows = 2**31 // 768 + 1000
    x = torch.zeros(1, rows, 768, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = torch.randn(768, device="cuda")
    case = replace(real_case("norm_linear", 768, 8), batch=1, frames=1)
    parameters = {k: v for k, v in case.inputs(torch.bfloat16, "cuda").items() if k != "x"}
    with use_backend("triton"):
        out = ops.norm_linear(x, **parameters)
    expected = reference.norm_linear.definition(x[:, -1:], **parameters)
    torch.testing.assert_close(out[:, -1:], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["LST", "UniPT", "SHERL"])
def test_loss_curve_follows_eager(method):
    """200 steps on learnable synthetic states: the fused loss stays with the eager one."""
    device, batch, frames, width, layers = "cuda", 16, 100, 256, 4
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, width, generator=generator)

    def data(step):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(5, (batch,), generator=generator)
        noise = torch.randn(layers + 1, batch, frames, width, generator=generator)
        return (noise + centres[labels][:, None]).to(device, torch.bfloat16), labels.to(device)

    curves = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        side = getattr(meft_kernels, method)(width, layers, 8, device=device)
        head = torch.nn.Linear(width, 5, device=device)
        optimizer = torch.optim.Adam([*side.parameters(), *head.parameters()], lr=1e-3)
        losses = []
        for step in range(200):
            states, labels = data(step)
            with use_backend(backend):
                pooled = side(states).mean(1) if method == "SHERL" else side.pooled(states)
                loss = torch.nn.functional.cross_entropy(head(pooled.float()), labels)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves[backend] = torch.tensor(losses)
    eager, fused = curves["reference"], curves["triton"]
    assert eager[-20:].mean() < 0.5 * eager[:5].mean()
    smooth = [c.unfold(0, 20, 20).mean(-1) for c in (eager, fused)]
    assert (smooth[0] - smooth[1]).abs().max() < 0.05 * eager[:5].mean()
