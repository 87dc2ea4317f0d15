"""SHERL's passage through the frozen last layer: the backward by hand against autograd."""

import pytest
import torch
from modelling_fixtures import LAYERS, WIDTH, tiny_whisper
from whisper_meft.encoder import last_layer
from whisper_meft.encoder.frozen import FrozenEncoder
from whisper_meft.encoder.last_layer import pooled_through_last_layer, states_through_last_layer

from meft_kernels import SHERL, counting, use_backend
from meft_kernels.ops import backends
from meft_kernels.testing import relative_error

CLIPS, FRAMES = 5, 11


def parts_of(dtype, attention="sdpa", **changes):
    """Encoder and SHERL with a gate that lets h through, h, y and the weights of a loss."""
    torch.manual_seed(0)
    encoder = FrozenEncoder(tiny_whisper(attn_implementation=attention, dtype=dtype, **changes).encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases and LayerNorms too
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    side = SHERL(WIDTH, LAYERS, reduction_factor=2, dtype=dtype)
    torch.nn.init.constant_(side.gate, 0.03)
    states = (torch.randn(CLIPS, FRAMES, WIDTH, dtype=torch.float64) + 0.3).to(dtype)
    merged = torch.randn(CLIPS, FRAMES, side.side_size, dtype=torch.float64).to(dtype)
    return encoder, side, states, merged, torch.randn(CLIPS, WIDTH, dtype=torch.float64)


def gradients(parts, lengths, backward_part, frugal=False, retain=False):
    """The pooled result, and gradients of y and of the parameters that the passage reads."""
    encoder, side, states, merged, upstream = parts
    merged = merged.clone().requires_grad_()
    pooled = pooled_through_last_layer(encoder, side, states, merged, lengths, 2, backward_part, frugal)
    wanted = [merged, side.out.weight, side.out.bias, side.gate]
    loss = (pooled * upstream).sum()
    return pooled.detach(), *torch.autograd.grad(loss, wanted, retain_graph=retain)


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("lengths", [None, [11, 1, 4, 9, 11]])
def test_gradients_are_those_of_autograd(lengths, size, frugal):
    parts = parts_of(torch.float64)
    lengths = None if lengths is None else torch.tensor(lengths)
    expected = gradients(parts, lengths, None)
    found = gradients(parts, lengths, size, frugal)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))
    if lengths is not None:
        past_end = torch.arange(FRAMES) >= lengths[:, None]
        assert not found[1][past_end].any()


@pytest.mark.parametrize("inner_parts", [2, 3])
def test_the_inner_width_may_be_computed_in_parts(inner_parts, monkeypatch):
    parts = parts_of(torch.float64)
    expected = gradients(parts, None, None)
    monkeypatch.setattr(last_layer, "_INNER_PARTS", {"cpu": inner_parts})
    found = gradients(parts, None, 2)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("inner_parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_types_err_as_autograd_does(dtype, inner_parts, monkeypatch):
    monkeypatch.setattr(last_layer, "_INNER_PARTS", {"cpu": inner_parts})
    parts, (encoder, side, *_) = parts_of(dtype), parts_of(torch.float64)
    encoder.load_state_dict(parts[0].state_dict())
    side.load_state_dict(parts[1].state_dict())
    truth = gradients((encoder, side, *(each.double() for each in parts[2:])), None, None)
    kept, found = (
        [relative_error(a, b) for a, b in zip(gradients(parts, None, size), truth)] for size in (None, 2)
    )
    assert all(error <= 2 * yardstick + torch.finfo(dtype).eps for error, yardstick in zip(found, kept))


def test_clamped_states_pass_no_gradient():
    """In fp16 a layer's output is clamped, and where it is its gradient is zero."""
    parts = parts_of(torch.float16)
    fc2 = parts[0].layers[-1].fc2
    with torch.no_grad():
        fc2.bias[::3] = 65000.0
    expected, found = (gradients(parts, None, size) for size in (None, 2))
    assert all(relative_error(a, b) < 2e-2 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_is_not_derived_is_left_to_autograd(attention, monkeypatch):
    parts = parts_of(torch.float64, attention)
    expected = gradients(parts, None, None)
    if attention == "sdpa":
        parts[0].layers[-1].activation_fn = torch.nn.GELU()
    monkeypatch.setattr(last_layer, "_LayerAgain", None)
    found = gradients(parts, None, 2)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("whole", [False, True], ids=["pooled", "states"])
def test_what_is_computed_again_follows_the_backend_of_the_forward(whole, monkeypatch):
    encoder, side, states, merged, _ = parts_of(torch.float32, "eager")
    called, kernel = set(), backends.kernel

    def recording(name, backend=None):
        called.add(backend or backends.current())
        return kernel(name, backend)

    monkeypatch.setattr(backends, "kernel", recording)
    through = states_through_last_layer if whole else pooled_through_last_layer
    with use_backend("reference"):
        out = through(encoder, side, states, merged.requires_grad_(), None, 2, *([] if whole else [2]))
    called.clear()
    out.sum().backward()
    assert called == {"reference"}


def test_a_graph_that_is_kept_gives_the_same_again():
    encoder, side, states, merged, upstream = parts_of(torch.float64)
    merged.requires_grad_()
    pooled = pooled_through_last_layer(encoder, side, states, merged, None, 2, 2)
    loss = (pooled * upstream).sum()
    first, second = (torch.autograd.grad(loss, [merged, side.gate], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_the_second_derivative_is_refused():
    encoder, side, states, merged, _ = parts_of(torch.float64)
    pooled = pooled_through_last_layer(encoder, side, states, merged.requires_grad_(), None, 2, 2)
    (grad,) = torch.autograd.grad(pooled.square().sum(), merged, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


def test_without_gradient_the_clips_go_in_parts(monkeypatch):
    encoder, side, states, merged, _ = parts_of(torch.float64)
    sizes, run = [], encoder.last_layer
    monkeypatch.setattr(encoder, "last_layer", lambda x, *rest: sizes.append(len(x)) or run(x, *rest))
    expected = pooled_through_last_layer(encoder, side, states, merged, None, 2, None)
    with torch.no_grad():
        found = pooled_through_last_layer(encoder, side, states, merged, None, 2, None)
    assert sizes == [5, 2, 2, 1] and relative_error(found, expected) < 1e-12
    assert pooled_through_last_layer(encoder, side, states[:0], merged[:0], None, 2, 1).shape == (0, WIDTH)


@pytest.mark.parametrize("frugal", [False, True])
def test_on_a_gpu_gradients_take_the_place_of_what_was_kept(frugal):
    """Unless the graph is kept: then the backward can run again."""
    encoder, side, first, _, upstream = parts_of(torch.float64)
    states = [first + layer for layer in range(LAYERS)]

    def run(times=1):
        deepest, merged = side.merge(states)
        pooled = pooled_through_last_layer(encoder, side, deepest, merged, None, 2, 2, frugal)
        loss = (pooled * upstream).sum()
        kept = [left > 1 for left in range(times, 0, -1)]
        return [torch.autograd.grad(loss, list(side.parameters()), retain_graph=keep) for keep in kept]

    (expected,) = run()
    with counting.standing_for("cuda", (9, 0), launching=True), use_backend("reference"):
        found = [*run(), *run(times=3)]
    for grads in found:
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    "place, register",
    [
        ("", "register_forward_hook"),
        ("", "register_forward_pre_hook"),
        ("self_attn", "register_forward_hook"),
        ("self_attn.out_proj", "register_forward_hook"),
        ("fc2", "register_forward_hook"),
        ("fc2", "register_forward_pre_hook"),
        ("final_layer_norm", "register_forward_hook"),
    ],
)
def test_gradients_go_through_what_hooks_change(place, register):
    parts = parts_of(torch.float64)

    def changed(_, *values):
        value = values[-1]
        return (value[0] / 3, *value[1:]) if isinstance(value, tuple) else value / 3

    getattr(parts[0].layers[-1].get_submodule(place), register)(changed)
    expected = gradients(parts, None, None)
    found = gradients(parts, None, 2)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))
