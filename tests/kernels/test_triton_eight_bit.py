"""8-bit copies in Triton: the conversions bit by bit, then widths, rows, NaN and the way through the ops."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton_fixtures import DEVICE  # noqa: E402

from meft_kernels import ops, reference, use_backend  # noqa: E402
from meft_kernels.ops import self_check  # noqa: E402
from meft_kernels.reference import eight_bit as definition  # noqa: E402
from meft_kernels.testing import relative_error  # noqa: E402
from meft_kernels.triton_kernels import eight_bit as kernel  # noqa: E402
from meft_kernels.tune import choice  # noqa: E402
from meft_kernels.tune.table import TABLE  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TYPES = [torch.float32, torch.float16]
EVERY_CODE = torch.arange(256, dtype=torch.uint8, device=DEVICE)
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])


@contextmanager
def small_groups():
    """Groups of 32 rows, so that few rows are many groups; and the interpreter is slow."""
    rows = (row for row in TABLE if row.kernel.startswith("eight_bit"))
    with choice.trial(*(replace(row, blocks={**row.blocks, "STEPS": 2}) for row in rows)):
        yield


def draw(dtype, *shape):
    """Rows as the backbone's: a mean per channel, some channels large and almost constant."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.randn(shape[-1], generator=generator)
    channels[::5] *= 30
    x = torch.randn(shape, generator=generator) * (0.1 + torch.rand(shape[-1], generator=generator))
    return (x + channels).to(DEVICE, dtype)


def normed(x, mean, rstd):
    return (x.double() - mean[..., None].double()) * rstd[..., None].double()


@triton.jit
def convert_kernel(x_ptr, code_ptr, size, ROOTS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=0.0)
    code = kernel.to_root(x) if ROOTS else kernel.to_e4m3(x)
    tl.store(code_ptr + index, code.to(tl.uint8), mask=index < size)


def converted(x, roots=False):
    code = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    block = 1024 if x.is_cuda else 2**20
    convert_kernel[(triton.cdiv(x.numel(), block),)](x, code, x.numel(), ROOTS=roots, BLOCK=block)
    return code


def boundary_values():
    """All numbers near a code's value or half-way between two, 600 neighbours of each."""
    values = EVERY_CODE[:127].view(torch.float8_e4m3fn).float()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([464.0], device=DEVICE)])
    bits = points.view(torch.int32)[:, None] + torch.arange(-300, 301, device=DEVICE, dtype=torch.int32)
    return bits[bits >= 0].view(torch.float32)


def random_values():
    """Numbers of every exponent in range, then any pattern of bits: subnormal, infinite, NaN."""
    generator = torch.Generator().manual_seed(0)
    exponent = 24 * torch.rand(2**20, generator=generator) - 14
    bits = torch.randint(-(2**31), 2**31, (2**21,), generator=generator).to(torch.int32)
    return torch.cat([torch.exp2(exponent), bits.view(torch.float32)]).to(DEVICE)


@pytest.mark.parametrize("values", [boundary_values, random_values])
def test_conversion_equals_that_of_torch_bit_for_bit(values):
    x = values()
    for signed in (x, -x):
        code, expected = converted(signed), signed.to(torch.float8_e4m3fn).view(torch.uint8)
        in_range, nan = signed.abs() <= 464, signed.isnan()
        assert in_range.sum() > 100_000
        assert torch.equal(code[in_range], expected[in_range])
        assert (code[nan] & 127 == 127).all()
        # Above, newer releases of torch saturate too and older ones give NaN.
        assert (code[~in_range & ~nan] & 127 == 126).all()


def test_roots_are_rounded_to_the_nearest_integer():
    x = torch.cat([127.0**2 * torch.rand(2**20, generator=torch.Generator().manual_seed(0)), torch.zeros(1)])
    borders = (torch.arange(127.0) + 0.5).square()
    x = torch.cat([x, borders * (1 + 1e-5), borders * (1 - 1e-5)]).to(DEVICE)
    for signed in (x, -x):
        code = converted(signed, roots=True).view(torch.int8)
        root = signed.double().abs().sqrt() * signed.sign()
        # In fp32 a root may lie on the border of two.
        assert (code.double() - root).abs().max() <= 0.5 + 1e-5 and code.abs().max() == 127
    beyond = torch.tensor([1e30, torch.inf, -torch.inf, torch.nan], device=DEVICE)
    assert converted(beyond, roots=True).view(torch.int8).tolist() == [127, 127, -127, 0]


@KINDS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_code_is_decoded_as_by_torch(dtype, kind):
    code = EVERY_CODE.view(definition.CODE_DTYPES[kind])[None]
    scale, shift = torch.ones(256, device=DEVICE), torch.zeros(256, device=DEVICE)
    decoded = kernel.decode(code, scale, shift, torch.empty(0, dtype=dtype, device=DEVICE))
    expected = code.float() * code.float().abs() if kind == "int8" else code.float()
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


def check(x, kind, mean=None, rstd=None):
    """Scale and shift as good as the reference's, and each code the right one for them."""
    if mean is None:
        mean, rstd = reference.row_statistics(x)
    with small_groups():
        code, scale, shift = kernel.encode(x, mean, rstd, kind)
        again = kernel.encode(x, mean, rstd, kind)
        decoded = kernel.decode(code, scale, shift, x.new_empty(0))
        restored = kernel.decode(code, scale, shift, x.new_empty(0), mean, rstd)
    assert (
        code.dtype == definition.CODE_DTYPES[kind]
        and code.shape == decoded.shape == restored.shape == x.shape
    )
    assert decoded.dtype == restored.dtype == x.dtype
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, (code, scale, shift)))
    rows = normed(x, mean, rstd)
    exact = [value.double() for value in definition.encode(x.double(), mean.double(), rstd.double(), kind)]
    plain = definition.encode(x, mean, rstd, kind)
    for value, truth, yardstick in zip((scale, shift), exact[1:], plain[1:]):
        assert value.shape == truth.shape and value.dtype == torch.float32
        assert relative_error(value, truth) <= 2 * relative_error(yardstick, truth) + 1e-6
    # Only where rounding in fp32 crosses a boundary may a code be the neighbour.
    deviation = (rows - shift.double()) / scale.double()
    spread = rows.abs().amax() * 2**-21 / scale.double()  # of n in fp32
    if kind == "int8":
        root = deviation.sign() * deviation.abs().sqrt()
        error = (code.double() - root).abs()
        spread = torch.minimum(spread / root.abs().clamp(min=1e-9), spread.sqrt())
    else:
        steps = torch.exp2(deviation.abs().clamp(min=2**-6).log2().floor() - 3)
        error, spread = (code.double() - deviation).abs() / steps, spread / steps
    assert (error <= 0.5 + spread + 1e-4).all()
    # Decoding is exact but for the result's own rounding.
    back = definition.values(code, torch.float64) * scale.double() + shift.double()
    both = (back, decoded), (back / rstd[..., None].double() + mean[..., None].double(), restored)
    for truth, value in both:
        assert relative_error(value, truth) < 2 * torch.finfo(x.dtype).eps


@KINDS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [3, 64, 129, 384])
def test_widths(width, dtype, kind):
    check(draw(dtype, 1, 37, width), kind)


@KINDS
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 12, 48), (2, 64, 48), (5, 33, 48), (70, 48)])
def test_rows(shape, kind):
    check(draw(torch.float32, *shape), kind)


@KINDS
def test_blocks_of_the_table(kind):
    """Groups as large as on a device: rows left over in the last one count nowhere."""
    x = draw(torch.float16, 300, 40) + 5  # no channel's normed rows need to reach 0
    statistics = torch.full((300,), 2.0, device=DEVICE), torch.full((300,), 0.5, device=DEVICE)
    code, scale, shift = kernel.encode(x, *statistics, kind)
    expected = definition.encode(x.double(), *(value.double() for value in statistics), kind)
    assert relative_error(scale, expected[1]) < 1e-6 and relative_error(shift, expected[2]) < 1e-6
    assert (code.float() != expected[0].float()).float().mean() < 1e-3


@KINDS
def test_rows_in_bfloat16_are_encoded(kind):
    """Not decoded here: the interpreter cannot round to bfloat16."""
    x = draw(torch.bfloat16, 2, 25, 96)
    statistics = reference.row_statistics(x)
    with small_groups():
        results = [kernel.encode(values, *statistics, kind) for values in (x, x.float())]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(*results))


@KINDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_spoil_their_channel_and_no_other(bad, kind):
    x = torch.randn(70, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[41, 7] = bad
    statistics = torch.zeros(70, device=DEVICE), torch.ones(70, device=DEVICE)
    with small_groups():
        code, scale, shift = kernel.encode(x, *statistics, kind)
        decoded = kernel.decode(code, scale, shift, x.new_empty(0))
    assert kind == "int8" or code.float().isnan().all(0).nonzero().tolist() == [[7]]
    assert decoded.isnan().all(0).nonzero().tolist() == [[7]]
    assert torch.isfinite(decoded[:, :7]).all() and torch.isfinite(decoded[:, 8:]).all()
    assert not torch.isfinite(shift[7]) and not torch.isfinite(scale[7])


@KINDS
def test_nan_in_a_hidden_state_does_not_vanish(kind):
    x = draw(torch.float32, 2, 30, 40)
    x[1, 3, 5] = torch.nan
    with small_groups():
        encoded = kernel.encode(x, *reference.row_statistics(x), kind)
        for statistics in ((), reference.row_statistics(x)):
            assert kernel.decode(*encoded, x.new_empty(0), *statistics).isnan().all()


@KINDS
@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30, 1e-37, 1e-44])
def test_constant_channels_and_single_spikes_come_back(value, kind):
    """A spread that vanishes or is all but zero: no division by it, and nothing that is not finite."""
    x = torch.zeros(40, 24, device=DEVICE)
    x[:, 3] = value
    x[7, 4] = value  # the others are 1/40 of it away from the mean, of which 1/16 is lost
    statistics = torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE)
    with small_groups():
        decoded = kernel.decode(*kernel.encode(x, *statistics, kind), x.new_empty(0))
    torch.testing.assert_close(decoded[:, :4], x[:, :4], rtol=1e-6, atol=0)
    torch.testing.assert_close(decoded, x, rtol=1e-6, atol=value / 640 + 1e-35)


@KINDS
def test_strided_and_unaligned_inputs(kind):
    x = draw(torch.float32, 3, 8, 40)
    statistics = reference.row_statistics(x)
    moved = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in (x, *statistics)]
    shifted = torch.empty(x.numel() + 1, device=DEVICE)[1:].view(x.shape).copy_(x)
    with small_groups():
        expected = kernel.encode(x, *statistics, kind)
        for arguments in (moved, (shifted, *statistics)):
            found = kernel.encode(*arguments, kind)
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected))
        code, *channels = expected
        for given in (code.transpose(0, 1).contiguous().transpose(0, 1), _unaligned(code)):
            for more in ((), moved[1:]):
                restored = kernel.decode(given, *channels, x.new_empty(0), *more)
                plain = kernel.decode(*expected, x.new_empty(0), *(statistics if more else ()))
                assert torch.equal(restored, plain)


def _unaligned(code):
    bytes_ = torch.empty(code.numel() + 1, dtype=torch.uint8, device=code.device)[1:]
    return bytes_.copy_(code.view(torch.uint8).flatten()).view(code.dtype).view(code.shape)


@KINDS
def test_no_rows(kind):
    x = torch.empty(2, 0, 24, device=DEVICE)
    code, scale, shift = kernel.encode(x, *reference.row_statistics(x), kind)
    assert code.shape == x.shape and scale.shape == shift.shape == (24,)
    assert kernel.decode(code, scale, shift, x.new_empty(0)).shape == x.shape


@KINDS
@pytest.mark.parametrize(
    "dtype, statistics_dtype, width",
    [
        (torch.float64, torch.float64, 24),
        (torch.float32, torch.float64, 24),
        (torch.float32, torch.float32, 2049),
    ],
)
def test_what_the_kernels_do_not_cover_is_left_to_the_reference(dtype, statistics_dtype, width, kind):
    x = draw(dtype, 2, 5, width)
    statistics = [value.to(statistics_dtype) for value in reference.row_statistics(x)]
    encoded, expected = (module.encode(x, *statistics, kind) for module in (kernel, definition))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(encoded, expected))
    for more in ((), statistics):
        results = [module.decode(*expected, x.new_empty(0), *more) for module in (kernel, definition)]
        assert torch.equal(*results) and results[0].dtype == dtype


@KINDS
@pytest.mark.parametrize("op", ["folded_linear", "gated_down"])
def test_gradients_of_an_op_come_from_the_kernels(op, kind, monkeypatch):
    """With statistics of LayerNorm, and of an op that needs x itself."""
    width, side = 48, 24
    x = draw(torch.float32, 2, 30, width)
    shapes = [(side, width), (side,)] + ([(side, side), (side,)] * 2 if op == "gated_down" else [])
    parameters = [torch.randn(shape).div_(5).to(DEVICE).requires_grad_() for shape in shapes]
    upstream = torch.randn(2, 30, side).to(DEVICE)
    calls = []
    for name in ("encode", "decode"):
        original = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, o=original, n=name: calls.append(n) or o(*a))
    grads = []
    for backend in ("reference", "triton"):
        assert not calls
        with use_backend(backend), small_groups():
            out = getattr(ops, op)(x, *parameters, saved_activations=kind)
            grads.append(torch.autograd.grad(out, parameters, upstream))
    assert calls == ["encode", "decode"]
    for plain, fused in zip(*grads):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


@KINDS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kernels_pass_the_check_at_first_use_and_worse_ones_do_not(dtype, kind, monkeypatch):
    # The interpreter is slow; with `small_groups` these are still several groups.
    monkeypatch.setattr(self_check, "FRAMES", 70)
    monkeypatch.setattr(self_check, "DRAWS", 2)
    x = draw(dtype, 2, 5, 40)
    statistics = reference.row_statistics(x)
    encoded = definition.encode(x, *statistics, kind)
    names = ["code", "scale", "shift", "like", "mean", "rstd"]
    given = ["x", "mean", "rstd", "kind"], (x, *statistics, kind)
    calls = [("encode", *given, lambda c, s, m: (c, 1.05 * s, m))]
    for more in ((), statistics):
        calls.append(("decode", names, (*encoded, x.new_empty(0), *more), lambda out: 1.05 * out))
    for name, names, arguments, worse in calls:
        plain, fused = getattr(definition, name), getattr(kernel, name)

        def broken(*given, fused=fused, worse=worse):
            result = fused(*given)
            return worse(*result) if isinstance(result, tuple) else worse(result)

        with small_groups():
            assert self_check.complaint(names, arguments, plain, fused) is None
            assert "is off by" in self_check.complaint(names, arguments, plain, broken)


@KINDS
def test_ops_of_the_kernels_have_right_fakes(kind):
    x = draw(torch.float16, 2, 5, 24)
    statistics = reference.row_statistics(x)
    checks = ("test_faketensor",)  # the others multiply tensors: not in 8 bits
    torch.library.opcheck(torch.ops.meft_triton.encode, (x, *statistics, kind), test_utils=checks)
    code, scale, shift = torch.ops.meft_triton.encode(x, *statistics, kind)
    for more in ((), statistics):
        arguments = (code, scale, shift, x.new_empty(0), *more)
        torch.library.opcheck(torch.ops.meft_triton.decode, arguments, test_utils=checks)
