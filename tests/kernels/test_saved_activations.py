"""What side networks keep for the backward: 8-bit hidden states, and statistics that are known already."""

import pytest
import torch
import torch.nn.functional as F

import meft_kernels
from meft_kernels import HiddenState, ops, reference
from meft_kernels.reference import eight_bit, gated_down

METHODS = pytest.mark.parametrize("method", ["LST", "UniPT", "SHERL"])
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])
D, L, FRAMES = 192, 4, 150


def build(method, **options):
    torch.manual_seed(0)
    side = getattr(meft_kernels, method)(D, L, reduction_factor=4, **options)
    with torch.no_grad():
        for parameter in side.parameters():  # away from the zeros of the initialisation
            parameter.add_(0.1 * torch.randn_like(parameter))
    return side


def states(dtype=torch.float32, outlier=0.0):
    """Hidden states as an encoder gives them: a mean per channel, a growing scale, some large channels."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(D, generator=generator)
    mean[::64] += outlier
    stream, state = [], mean + torch.randn(3, FRAMES, D, generator=generator)
    for _ in range(L + 1):
        stream.append(state.to(dtype))
        state = state + 0.7 * torch.randn(state.shape, generator=generator)
    return stream


def output(side, hidden_states):
    return side.pooled(hidden_states) if hasattr(side, "pooled") else side(hidden_states)


def gradients(side, hidden_states):
    out = output(side, hidden_states)
    # The same for all frames of an utterance, as a mean over time hands it down.
    shape = (out.shape[0], 1, D) if out.ndim == 3 else out.shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(out.dtype).expand_as(out)
    names, parameters = zip(*side.named_parameters())
    return out, dict(zip(names, torch.autograd.grad(out, parameters, upstream)))


def kept(side, hidden_states):
    """Bytes saved for the backward that are not parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in side.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = output(side, hidden_states)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def assert_same_direction(exact, rounded, kind):
    # A cosine needs more than one element: the gates of a network are judged together.
    gates = [name for name, grad in exact.items() if grad.numel() == 1 and grad.any()]
    for grads in (exact, rounded) if gates else ():
        grads["gates"] = torch.cat([grads.pop(name).flatten() for name in gates])
    for name, expected in exact.items():
        if not expected.any():
            assert not rounded[name].any(), name
        else:
            cosine = F.cosine_similarity(expected.flatten(), rounded[name].flatten(), dim=0)
            assert cosine >= {"fp8": 0.999, "int8": 0.9999}[kind], f"{name}: {cosine}"
    assert not all(torch.equal(rounded[name], expected) for name, expected in exact.items())


@METHODS
@KINDS
@pytest.mark.parametrize("outlier", [0.0, 60.0])
def test_gradients_from_eight_bits_point_where_exact_ones_do(method, kind, outlier):
    hidden_states = states(outlier=outlier)
    exact_out, exact = gradients(build(method), hidden_states)
    out, rounded = gradients(build(method, saved_activations=kind), hidden_states)
    assert torch.equal(out, exact_out)
    assert_same_direction(exact, rounded, kind)


@pytest.fixture(scope="module")
def speech():
    """An encoder, its hidden states of 32 utterances in two accents, and their labels."""
    pytest.importorskip("espeakng_loader")
    from transformers import WhisperFeatureExtractor, WhisperForAudioClassification
    from whisper_meft import FrozenEncoder
    from whisper_meft.synthetic.shipped import shipped_backbone
    from whisper_meft.synthetic.speech import synthesise

    folder = shipped_backbone()
    whisper = WhisperForAudioClassification.from_pretrained(folder, dtype=torch.float32)
    encoder = FrozenEncoder(whisper.encoder)
    texts = [f"{a} {b} is {c}" for a in ("the old", "a new") for b in ("house", "river") for c in NAMES]
    clips = [synthesise(text, voice).audio[:32000] for text in texts for voice in ("en-us", "en-029")]
    features = WhisperFeatureExtractor.from_pretrained(folder)(
        clips, sampling_rate=16000, return_tensors="pt"
    ).input_features
    return encoder, list(encoder.stream(features)), torch.arange(len(clips)) % 2


NAMES = ("wide", "cold", "far away", "quite green")


@METHODS
@KINDS
@pytest.mark.parametrize("steps", [0, 10])
def test_on_real_hidden_states(method, kind, steps, speech):
    """Gradients of a classification loss, at the start and after some training."""
    encoder, hidden_states, labels = speech
    width = hidden_states[0].shape[-1]
    torch.manual_seed(0)
    side, head = getattr(meft_kernels, method)(width, encoder.num_layers, 4), torch.nn.Linear(width, 2)

    def loss():
        out = output(side, hidden_states)
        return F.cross_entropy(head(encoder.last_layer(out).mean(1) if method == "SHERL" else out), labels)

    optimizer = torch.optim.Adam([*side.parameters(), *head.parameters()], 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    names, parameters = zip(*side.named_parameters())
    found = []
    for keep in ("exact", kind):
        side.saved_activations = keep
        found.append(dict(zip(names, torch.autograd.grad(loss(), parameters))))
    assert_same_direction(*found, kind)


@METHODS
@KINDS
def test_eight_bits_of_an_empty_batch(method, kind):
    side = build(method, saved_activations=kind)
    output(side, [h[:0] for h in states()]).sum().backward()
    assert all(not parameter.grad.any() for parameter in side.parameters())


@METHODS
@KINDS
def test_eight_bits_keep_half_of_what_half_precision_keeps(method, kind):
    hidden_states = states(torch.bfloat16)
    exact, small = (
        kept(build(method), hidden_states),
        kept(build(method, saved_activations=kind), hidden_states),
    )
    read = L if method == "SHERL" else L + 1
    one = hidden_states[0].numel()
    rows, channels = 4 * 3 * FRAMES, 2 * 4 * D
    copies = read - 1 if method == "SHERL" else read  # SHERL keeps the deepest as it is
    statistics = 2 * rows if method == "SHERL" else -2 * rows  # stored for decoding, or no longer needed
    bits = 3 * FRAMES * D // 4 // 8 if method == "SHERL" else 0
    assert exact - small == copies * (one - statistics - channels - bits)


@KINDS
def test_encoding_rounds_deviations_and_never_saturates(kind):
    rows = 100 * states()[0]
    rows[..., 5] = rows[..., 6] = 0
    rows[0, 0, 6] = 1e4  # one spike in a channel that is constant otherwise
    mean, rstd = ops.row_statistics(rows)
    code, scale, shift = eight_bit.encode(rows, mean, rstd, kind)
    assert code.dtype == eight_bit.CODE_DTYPES[kind] and code.shape == rows.shape
    assert scale.shape == shift.shape == (D,)
    normed = (rows - mean[..., None]) * rstd[..., None]
    deviation = normed - normed.mean((0, 1))
    back = eight_bit.decode(code, scale, shift, rows.new_empty(0))
    error = (back - normed).abs()
    if kind == "fp8":  # half a step of a 3-bit mantissa, or half of the smallest subnormal step
        assert (error <= deviation.abs() * 2**-4 + scale * 2**-10 + 1e-5).all()
        assert error.max() > 0.01
    else:  # half a step of the square root, d (s +- 1/2)^2 = s +- 1/4
        assert (error <= (deviation.abs() * scale).sqrt() + 0.25 * scale + 1e-5).all()
        assert code.abs().amax((0, 1)).eq(127).sum() > D / 2 and error.max() > 0.001


def test_int8_errs_by_a_quarter_of_fp8():
    for outlier in (0.0, 60.0):
        rows = states(outlier=outlier)[-1]
        normed = F.layer_norm(rows, (D,))
        deviation = normed - normed.mean((0, 1))
        errors = [
            ((ops.eight_bit(rows, kind) - normed).norm() / deviation.norm()).item()
            for kind in ("int8", "fp8")
        ]
        assert errors[0] < 0.0085 and 0.024 < errors[1] < 0.029, (outlier, errors)
    with pytest.raises(ValueError, match="kind must be 'int8' or 'fp8', got 'int4'"):
        ops.eight_bit(rows, "int4")


@KINDS
def test_decoding_gives_the_rows_themselves_where_their_statistics_are_given(kind):
    rows = 100 * states()[0] + 7
    statistics = ops.row_statistics(rows)
    encoded = eight_bit.encode(rows, *statistics, kind)
    mean, rstd = (value[..., None].double() for value in statistics)
    expected = eight_bit.decode(*encoded, rows.new_empty(0, dtype=torch.float64)) / rstd + mean
    restored = eight_bit.decode(*encoded, rows.new_empty(0), *statistics)
    torch.testing.assert_close(restored.double(), expected, rtol=1e-6, atol=1e-4)
    half = eight_bit.decode(*encoded, rows.new_empty(0, dtype=torch.float16), *statistics)
    assert torch.equal(half, restored.half())  # rounded once


@KINDS
@pytest.mark.parametrize("shape", [(1, 1, D), (0, 7, D)])
def test_encoding_of_one_frame_and_of_none(shape, kind):
    rows = states()[0][:1, :1].expand(1, 1, D)[: shape[0]] if shape[0] else torch.zeros(shape)
    code, scale, shift = eight_bit.encode(rows, *ops.row_statistics(rows), kind)
    back = eight_bit.decode(code, scale, shift, rows.new_empty(0))
    assert back.shape == rows.shape
    torch.testing.assert_close(back, F.layer_norm(rows, (D,)))


@KINDS
def test_encoding_keeps_a_nan(kind):
    rows = states()[0]
    rows[0, 0, 0] = float("nan")
    code, scale, shift = eight_bit.encode(rows, *ops.row_statistics(rows), kind)
    assert eight_bit.decode(code, scale, shift, rows.new_empty(0))[0, 0].isnan().all()


@pytest.mark.parametrize("width", [1, 5, 8, 24, 33])
def test_active_bits_are_the_signs_of_the_exact_projection(width):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 16), torch.randn(width, 16), torch.randn(width)
    bits = gated_down.active_bits(x, weight, bias)
    assert bits.dtype == torch.uint8 and bits.shape == (14, -(-width // 8))
    assert torch.equal(gated_down._unpacked(bits, width), (F.linear(x, weight, bias) > 0).view(14, width))
    params = [weight, bias, *(torch.randn(s) for s in ((width, width), (width,)) * 2)]
    grad = torch.randn(2, 7, width)
    exact = gated_down.backward(grad, x, *params, True)
    for found, expected in zip(gated_down.backward(grad, x, *params, True, bits), exact, strict=True):
        assert torch.equal(found, expected)


@KINDS
def test_a_gradient_to_the_hidden_state_keeps_it_exact(kind):
    side, (x, *_) = build("SHERL"), states()
    down = side.down[0]
    parameters = [
        t for n in (1, 2, 3) for t in (getattr(down, f"linear_{n}").weight, getattr(down, f"linear_{n}").bias)
    ]
    grads = []
    for keep in ("exact", kind):
        x = x.detach().requires_grad_()
        grads.append(torch.autograd.grad(ops.gated_down(x, *parameters, keep).sum(), [x, *parameters]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@METHODS
def test_statistics_that_are_given_are_not_computed_again(method, monkeypatch):
    side, hidden_states = build(method), states()
    expected = gradients(side, hidden_states)
    measured = [HiddenState(h, *ops.row_statistics(h)) for h in hidden_states]
    if method != "SHERL":  # it has no LayerNorm on what it reads
        monkeypatch.setattr(ops, "row_statistics", lambda x: pytest.fail("computed again"))
    out, grads = gradients(side, measured)
    assert torch.equal(out, expected[0])
    assert all(torch.equal(grads[name], grad) for name, grad in expected[1].items())
    plain = getattr(reference, method)(D, L, reduction_factor=4)
    assert torch.equal(output(plain, measured), output(plain, hidden_states))


def test_given_statistics_are_used():
    side, hidden_states = build("LST"), states()
    wrong = [HiddenState(h, torch.zeros(h.shape[:2]), torch.ones(h.shape[:2])) for h in hidden_states]
    assert not torch.allclose(side.pooled(wrong), side.pooled(hidden_states))


@METHODS
def test_bad_values_are_named(method):
    accepted = "saved_activations must be one of 'exact', 'int8', 'fp8', got 'int4'"
    with pytest.raises(ValueError, match=accepted):
        build(method, saved_activations="int4")
    h = states()
    bad = HiddenState(h[0], torch.zeros(3, 1), torch.zeros(3, FRAMES))
    with pytest.raises(ValueError, match=r"hidden_states\[0\].mean must have shape \(3, 150\), got \(3, 1\)"):
        build(method)([bad, *h[1:]])


@METHODS
@KINDS
def test_eight_bits_compile_as_one_graph_and_follow_shapes(method, kind):
    torch._dynamo.reset()
    side = build(method, saved_activations=kind)
    compiled = torch.compile(output, backend="aot_eager", fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters["stats"]
    graphs = []
    for batch, frames in ((3, 150), (2, 77), (3, 41), (2, 99)):
        hidden_states = [h[:batch, :frames].contiguous() for h in states()]
        results = []
        for call in (output, compiled):
            side.zero_grad()
            call(side, hidden_states).square().sum().backward()
            results.append([parameter.grad for parameter in side.parameters()])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        graphs.append(counter["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[3]  # the second made both axes dynamic


@KINDS
def test_ops_of_the_copy_have_right_fakes_and_write_into_no_argument(kind):
    x = states(torch.float16)[0]
    arguments = (x, *ops.row_statistics(x))
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")  # the others multiply outputs: not in 8 bits
    torch.library.opcheck(torch.ops.meft.encode, (*arguments, kind), test_utils=checks)
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = states(dtype)[0]
        arguments = (x, *ops.row_statistics(x))
        before = [argument.clone() for argument in arguments]
        encoded = torch.ops.meft.encode(*arguments, kind)
        again = [encoded[0].float(), *encoded[1:]]
        decoded = torch.ops.meft.decode(*encoded, x.new_empty(0))
        restored = torch.ops.meft.decode(*encoded, x.new_empty(0), *arguments[1:])
        assert decoded.dtype == restored.dtype == dtype
        after = [*arguments, encoded[0].float(), *encoded[1:]]
        assert all(torch.equal(a, b) for a, b in zip(after, [*before, *again], strict=True))
