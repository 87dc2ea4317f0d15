"""Softmax attention in C++: values and gradients, masks, odd shapes, and which calls it serves."""

import pytest
import torch
from torch.nn import functional

from meft_kernels import native, ops, use_backend
from meft_kernels.self_attention import self_attention
from meft_kernels.testing import relative_error

needs_build = pytest.mark.skipif(not native.has("self_attention"), reason=native.REASON)
NAMES = ("query", "key", "value")
ALL = ("out", *NAMES)


def draw(batch=2, heads=3, queries=37, keys=None, head_dim=16, seed=0, spread=1.0) -> list[torch.Tensor]:
    """Query, key, value as a model has them, (B, T, H * head_dim) in memory, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (queries, keys or queries, keys or queries, queries)
    shapes = [(batch, frames, heads * head_dim) for frames in lengths]
    rows = [spread * torch.randn(shape, generator=generator) for shape in shapes]
    return [each.view(*each.shape[:2], heads, head_dim).transpose(1, 2) for each in rows]


def run(function, query, key, value, upstream, mask=None, scale=None, dtype=None) -> dict[str, torch.Tensor]:
    """Output and gradients; in ``dtype`` if one is given."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (query, key, value)]
    out = function(*leaves, mask, scale=scale)
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(NAMES, grads))}


def torchs(query, key, value, mask=None, scale=None) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def plain(query, key, value, mask=None, scale=None) -> torch.Tensor:
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1) @ value


def padding(lengths: list[int], keys: int) -> torch.Tensor:
    return (torch.arange(keys) < torch.tensor(lengths)[:, None])[:, None, None, :]


def served(out: torch.Tensor) -> bool:
    return "SelfAttention" in type(out.grad_fn).__name__


def assert_good(cases: list[dict]) -> None:
    """Values and gradients as near to float64 as PyTorch's own are, over several draws, twice, and four
    roundings."""
    errors, allowed = dict.fromkeys(ALL, 0.0), dict.fromkeys(ALL, 4 * torch.finfo(torch.float32).eps)
    for case in cases:
        truth = run(plain, **case, dtype=torch.float64)
        own, found = run(torchs, **case), run(self_attention, **case)
        for name in ALL:
            if case["key"].shape[2] == 1 and name in ("query", "key"):  # which are zero then
                assert found[name].abs().max() <= 1e-5 * case["upstream"].abs().max()
                continue
            errors[name] += relative_error(found[name], truth[name]) / len(cases)
            allowed[name] += 2 * relative_error(own[name], truth[name]) / len(cases)
    for name in ALL:
        assert errors[name] <= allowed[name], f"{name}: error {errors[name]:.2e}, allowed {allowed[name]:.2e}"


def drawn(mask=None, scale=None, **shape) -> list[dict]:
    return [
        {**dict(zip((*NAMES, "upstream"), draw(seed=seed, **shape))), "mask": mask, "scale": scale}
        for seed in range(3)
    ]


# --- values and gradients -----------------------------------------------------------------------------------


@needs_build
@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 128, 129, 256, 257, 300, 600])
def test_frames(frames, poisoned_memory):
    """Fewer than a block of queries or a tile of keys, whole ones, and tails of both."""
    assert_good(drawn(batch=1, heads=2, queries=frames))


@needs_build
def test_long_sums_keep_their_digits():
    """Keys and values with a mean, and weights that are all alike: the error is PyTorch's own, also that of
    the queries' gradient, in which sums cancel."""
    *given, upstream = (0.3 + row for row in draw(batch=1, heads=2, queries=1500, head_dim=48, spread=0.3))
    truth = run(plain, *given, upstream, dtype=torch.float64)
    own, found = run(torchs, *given, upstream), run(self_attention, *given, upstream)
    for name in ("out", "query"):
        assert relative_error(found[name], truth[name]) < 1.5 * relative_error(own[name], truth[name]), name


@needs_build
@pytest.mark.parametrize("head_dim", [1, 3, 8, 17, 33, 64, 80, 128])
def test_head_dims(head_dim, poisoned_memory):
    assert_good(drawn(head_dim=head_dim, queries=50))


@needs_build
@pytest.mark.parametrize("queries, keys", [(1, 300), (300, 1), (130, 270)])
def test_another_number_of_keys(queries, keys, poisoned_memory):
    assert_good(drawn(queries=queries, keys=keys))


@needs_build
@pytest.mark.parametrize("scale, spread", [(1.0, 0.5), (0.125, 4.0), (1.0, 4.0), (0.01, 1.0)])
def test_scales(scale, spread, poisoned_memory):
    """Flat attention, attention to a single key, and what underflows."""
    assert_good(drawn(scale=scale, spread=spread, queries=140, head_dim=64))


@needs_build
def test_lengths(poisoned_memory):
    lengths = [1, 16, 100, 256, 257, 290]
    mask = padding(lengths, 290)
    assert_good(drawn(mask, batch=len(lengths), heads=1, queries=290))
    found = run(self_attention, *draw(batch=len(lengths), heads=1, queries=290), mask)
    for clip, length in enumerate(lengths):
        assert found["value"][clip, 0, :length].any(-1).all()
        assert not found["key"][clip, :, length:].any() and not found["value"][clip, :, length:].any()


@needs_build
def test_any_mask_of_keys_and_one_for_all_clips(poisoned_memory):
    kept = torch.rand(2, 1, 1, 80, generator=torch.Generator().manual_seed(5)) < 0.4
    assert_good(drawn(kept, queries=80))
    assert_good(drawn(kept[:1], queries=80))


@needs_build
def test_a_clip_that_looks_at_nothing():
    mask = padding([0, 9], 20)
    found, own = (run(function, *draw(queries=20), mask) for function in (self_attention, torchs))
    assert not own["out"][0].any()
    for name in ALL:
        assert not found[name][0].any() and torch.isfinite(found[name][1]).all() and found[name][1].any()


@needs_build
def test_masked_frames_do_not_count():
    """Whatever stands in them, NaN too, the bits are those of the clip alone."""
    query, key, value, upstream = draw(queries=70)
    expected = run(self_attention, *(tensor[:1, :, :40] for tensor in (query, key, value, upstream)))
    key[0, :, 40:], value[0, :, 40:], upstream[0, :, 40:] = torch.nan, torch.inf, 0
    found = run(self_attention, query, key, value, upstream, padding([40, 70], 70))
    for name in ALL:
        torch.testing.assert_close(found[name][:1, :, :40], expected[name], rtol=1e-5, atol=1e-6)
    assert torch.isfinite(found["out"]).all()


@needs_build
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", NAMES)
def test_nan_and_infinity_are_not_hidden(where, bad):
    given = dict(zip((*NAMES, "upstream"), draw(queries=40)))
    given[where][0, 1, 5, 2] = bad
    found, own = (run(function, **given) for function in (self_attention, torchs))
    assert not torch.isfinite(found["out"][0, 1]).all() and found["query"][0, 1].isnan().any()
    for name in ALL:
        assert torch.isfinite(found[name][1]).all() and torch.isfinite(found[name][0, 0]).all()
        assert (torch.isfinite(own[name]) | ~torch.isfinite(found[name])).all(), name


@needs_build
def test_strides():
    """Views of any strides give the bits that contiguous tensors give."""
    given = draw(queries=45)
    expected = run(self_attention, *(tensor.contiguous() for tensor in given))
    wide = [torch.full((*tensor.shape[:-1], 40), torch.nan) for tensor in given]
    for tensor, storage in zip(given, wide):
        storage[..., 8:24] = tensor
    for views in (given, [storage[..., 8:24] for storage in wide]):
        found = run(self_attention, *views)
        for name in ALL:
            assert torch.equal(found[name], expected[name]), name
    query, key, value, upstream = given
    one_row = upstream[:, :, :1, :1].expand_as(upstream)  # as after a sum
    found, own = (run(f, query, key, value, one_row) for f in (self_attention, torchs))
    for name in ("query", "key", "value"):
        torch.testing.assert_close(found[name], own[name], rtol=1e-4, atol=1e-5)


@needs_build
def test_results_lie_as_the_projections_wrote():
    found = run(self_attention, *draw(queries=45))
    for name in ALL:
        assert found[name].transpose(1, 2).is_contiguous()


@needs_build
def test_threads():
    """The same bits for every number of threads: no sum is shared between them."""
    given = draw(batch=3, heads=2, queries=150)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            found[threads] = run(self_attention, *given)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 5, 16):
        for name in ALL:
            assert torch.equal(found[threads][name], found[1][name]), (threads, name)


@needs_build
def test_a_clip_is_the_same_alone_and_with_and_without_gradient():
    query, key, value, upstream = draw(batch=3, queries=50)
    together = run(self_attention, query, key, value, upstream)
    alone = run(self_attention, *(tensor[1:2] for tensor in (query, key, value, upstream)))
    for name in ALL:
        assert torch.equal(together[name][1:2], alone[name]), name
    assert torch.equal(self_attention(query, key, value), together["out"])
    with torch.inference_mode():
        assert torch.equal(self_attention(query, key, value), together["out"])


@needs_build
def test_only_the_gradients_that_are_needed():
    query, key, value, upstream = draw()
    leaf = key.detach().requires_grad_()
    out = self_attention(query, leaf, value)
    assert served(out)
    (found,) = torch.autograd.grad(out, leaf, upstream)
    assert torch.equal(found, run(self_attention, query, key, value, upstream)["key"])


@needs_build
def test_no_second_derivative():
    query, key, value, _ = draw(queries=8)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = self_attention(*leaves)
    (grad,) = torch.autograd.grad(out.sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


# --- which calls --------------------------------------------------------------------------------------------


def _leaves(**shape) -> list[torch.Tensor]:
    return [tensor.detach().requires_grad_() for tensor in draw(**shape)[:3]]


OTHERS = {
    "another type": lambda q, k, v: self_attention(q.double(), k.double(), v.double()),
    "half precision": lambda q, k, v: self_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()),
    "three axes": lambda q, k, v: self_attention(q[0], k[0], v[0]),
    "a mask of queries": lambda q, k, v: self_attention(q, k, v, torch.ones(37, 37, dtype=torch.bool).tril()),
    "an additive mask": lambda q, k, v: self_attention(q, k, v, torch.zeros(2, 1, 1, 37)),
    "a wider value": lambda q, k, v: self_attention(q, k, torch.cat((v, v), -1)),
    "a negative scale": lambda q, k, v: self_attention(q, k, v, scale=-0.5),
    "no clip": lambda q, k, v: self_attention(q[:0], k[:0], v[:0]),
}


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_other_calls_are_torchs(call):
    given = _leaves()
    out = call(*given)
    assert out.grad_fn is not None and not served(out)
    with torch.no_grad():
        assert torch.equal(call(*given), out)


def test_choices_are_followed():
    given = _leaves()
    with use_backend("reference"):
        assert not served(self_attention(*given))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not served(self_attention(*given))
    with torch.no_grad():
        assert self_attention(*given).grad_fn is None
    assert self_attention(*given).grad_fn is not None
    assert served(self_attention(*given)) == native.has("self_attention")


def test_without_the_kernel_it_is_torchs(monkeypatch):
    """As with a library that was built before the kernel was written."""
    monkeypatch.setattr(native, "has", lambda name: False)
    given = draw()
    found, own = run(self_attention, *given), run(torchs, *given)
    for name, value in own.items():
        assert torch.equal(found[name], value)


def test_under_transforms_and_autocast():
    query, key, value, _ = draw(queries=9)
    grads = torch.func.grad(lambda q: self_attention(q, key, value).square().sum())(query)
    leaf = query.detach().requires_grad_()
    self_attention(leaf, key, value).square().sum().backward()
    torch.testing.assert_close(grads, leaf.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert self_attention(leaf, key, value).dtype == torch.bfloat16


def test_compiled():
    given = draw(queries=33)
    compiled = torch.compile(self_attention, fullgraph=True, backend="aot_eager")
    found, own = run(compiled, *given), run(torchs, *given)
    for name, value in own.items():
        torch.testing.assert_close(found[name], value)


@needs_build
@pytest.mark.parametrize("masked", [False, True])
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(masked):
    given = draw(batch=2, queries=21, keys=30)
    mask = padding([30, 4], 30) if masked else None
    real = run(self_attention, *given, mask)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in given]
        fake = run(self_attention, *fakes, mode.from_tensor(mask) if masked else None)
    for name in ALL:
        assert fake[name].shape == real[name].shape and fake[name].stride() == real[name].stride(), name


@needs_build
@pytest.mark.parametrize(
    "position, message",
    [(0, "grad must have shape"), (2, "key must have shape"), (3, "value must have shape")]
    + [(4, "out must have shape"), (5, "logsumexp must have shape"), (6, "mask must have shape")],
)
def test_shapes_that_do_not_fit(position, message):
    query, key, value, upstream = draw()
    mask = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    arguments = [upstream, query, key, value, query, query[..., 0], mask, 0.5]
    native.kernel("self_attention_bwd")(*arguments)
    arguments[position] = arguments[position][:1, :, :1]
    if position == 6:
        arguments[position] = mask[..., 1:]
    with pytest.raises(ValueError, match=message):
        native.kernel("self_attention_bwd")(*arguments)
    if position in (2, 3, 6):
        with pytest.raises(ValueError, match=message):
            native.kernel("self_attention")(*arguments[1:4], *arguments[6:])


def test_registered_for_cpp_alone():
    assert ops.uses_native() and not hasattr(torch.ops.meft, "self_attention_bwd")
