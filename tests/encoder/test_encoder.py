"""FrozenEncoder: the same states as Hugging Face's encoder, one at a time, frozen, and free of neighbours."""

import copy
import pickle

import pytest
import torch
from modelling_fixtures import LAYERS, MELS, WIDTH, WINDOW, batch, tiny_whisper
from torch._subclasses.fake_tensor import FakeTensorMode
from whisper_meft import FrozenEncoder, UserError
from whisper_meft.encoder import layer as frozen_layer

from meft_kernels import HiddenState, ops, use_backend


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_window_equals_hugging_face_exactly(attention):
    whisper = tiny_whisper(attn_implementation=attention).eval()
    features, _ = batch()
    with torch.no_grad():
        expected = whisper.encoder(features, output_hidden_states=True).hidden_states
    encoder = FrozenEncoder(whisper.encoder)
    with use_backend("reference"):  # the C++ attention rounds in another order
        states = list(encoder.stream(features))
    assert len(states) == LAYERS + 1
    for state, other in zip(states[:-1], expected[:-1], strict=True):
        assert torch.equal(state, other)
    for state, other in zip(list(encoder.stream(features))[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)
    # The last entry of Hugging Face's tuple is after the final LayerNorm, ours before it.
    assert not torch.equal(states[-1], expected[-1])
    assert torch.equal(encoder.layer_norm(states[-1]), expected[-1])


def test_stream_is_lazy():
    encoder = FrozenEncoder(tiny_whisper().encoder)
    calls = []
    for i, layer in enumerate(encoder.layers):
        layer.fc1.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    stream = encoder.stream(batch()[0])
    assert calls == []
    next(stream)
    assert calls == []
    next(stream)
    assert calls == [0]
    del stream
    assert calls == [0]


def test_train_never_turns_dropout_on():
    whisper = tiny_whisper()
    encoder = FrozenEncoder(whisper.encoder)
    features, _ = batch()
    expected = list(encoder.stream(features))
    for switch in (encoder.train, whisper.train):  # the modules are shared with the model they came from
        switch()
        assert not encoder.training
        for state, other in zip(encoder.stream(features), expected, strict=True):
            assert torch.equal(state, other)
        switch()
        x = expected[-2].clone().requires_grad_()
        assert torch.equal(encoder.last_layer(x), encoder.last_layer(x))


def test_grad_mode_and_autocast_do_not_leak_through_the_generator():
    encoder = FrozenEncoder(tiny_whisper().encoder, dtype="bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for state in encoder.stream(batch()[0]):
            assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
            assert not state.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_a_clip_does_not_depend_on_its_neighbours(attention, dtype, tolerance):
    encoder = FrozenEncoder(tiny_whisper(attn_implementation=attention).encoder, dtype=dtype)
    lengths = torch.tensor([20, 7, 1, 13])
    features, _ = batch(frames=39, dtype=dtype)  # an odd number of frames: 20 encoder frames
    together = list(encoder.stream(features, lengths))
    assert together[0].shape == (4, 20, WIDTH)
    # What lies past a clip's end must not matter, not even a NaN.
    disturbed = features.clone()
    for i, length in enumerate(lengths):
        disturbed[i, :, 2 * length :] = float("nan")
    for i, length in enumerate(lengths.tolist()):
        alone = list(encoder.stream(features[i : i + 1, :, : 2 * length], torch.tensor([length])))
        for state, other, third in zip(together, alone, encoder.stream(disturbed, lengths), strict=True):
            torch.testing.assert_close(state[i, :length], other[0], rtol=tolerance, atol=tolerance)
            assert torch.equal(third[i, :length], state[i, :length])


def test_more_frames_change_the_states():
    """The converse of the test above: what counts as sound does reach the earlier frames."""
    encoder = FrozenEncoder(tiny_whisper().encoder)
    features, _ = batch(size=1, frames=40)
    short = list(encoder.stream(features, torch.tensor([7])))[-1][0, :7]
    long = list(encoder.stream(features, torch.tensor([20])))[-1][0, :7]
    assert (short - long).abs().max() > 1e-2


def test_full_lengths_equal_the_full_window():
    encoder = FrozenEncoder(tiny_whisper().encoder)
    features, _ = batch()
    full = torch.full((4,), WINDOW)
    for state, other in zip(encoder.stream(features), encoder.stream(features, full), strict=True):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, torch.tensor([24, 9, 3, 1])])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_weights_run_as_they_are(dtype, lengths, attention):
    whisper = tiny_whisper(attn_implementation=attention)
    features, _ = batch()
    exact = list(FrozenEncoder(copy.deepcopy(whisper).encoder).stream(features, lengths))
    encoder = FrozenEncoder(whisper.encoder, dtype=dtype)
    assert all(p.dtype == dtype for p in encoder.parameters())
    seen = []
    for layer in encoder.layers:
        layer.fc1.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = list(encoder.stream(features, lengths))
    assert seen == [(dtype, dtype)] * LAYERS
    for state, other in zip(states, exact, strict=True):
        assert state.dtype == dtype
        kept = torch.arange(WINDOW) < (torch.full((4,), WINDOW) if lengths is None else lengths)[:, None]
        error = (state.float() - other)[kept].norm() / other[kept].norm()
        assert error < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_float32_weights_follow_autocast():
    encoder = FrozenEncoder(tiny_whisper().encoder)
    seen = []
    encoder.layers[0].fc1.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for lengths in (None, torch.tensor([24, 9, 3, 1])):
            assert all(torch.isfinite(state).all() for state in encoder.stream(batch()[0], lengths))
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_last_layer_passes_gradient_to_its_input_only(attention):
    whisper = tiny_whisper(attn_implementation=attention, dtype=torch.float64)
    encoder = FrozenEncoder(whisper.encoder)
    features, _ = batch(dtype=torch.float64)
    before = list(encoder.stream(features))[-2]
    with torch.no_grad():
        expected = whisper.encoder.eval()(features).last_hidden_state
    torch.testing.assert_close(encoder.last_layer(before), expected, rtol=1e-12, atol=1e-12)
    x = before[:1, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: encoder.last_layer(x, torch.tensor([3]))[:, :3], (x,))
    encoder.last_layer(x, torch.tensor([3]))[:, :3].square().sum().backward()
    assert x.grad[:, :3].abs().min() > 0
    assert x.grad[:, 3:].abs().max() == 0
    assert all(p.grad is None for p in encoder.parameters())


def test_odd_batches():
    encoder = FrozenEncoder(tiny_whisper().encoder)
    features, _ = batch()
    assert [s.shape for s in encoder.stream(features[:0])] == [(0, WINDOW, WIDTH)] * (LAYERS + 1)
    assert encoder.last_layer(torch.zeros(0, 4, WIDTH)).shape == (0, 4, WIDTH)
    one = list(encoder.stream(features[:, :, :1], torch.ones(4, dtype=torch.long)))
    assert one[-1].shape == (4, 1, WIDTH) and torch.isfinite(one[-1]).all()
    strided = torch.cat([features, features], -1)[..., ::2]
    for state, other in zip(encoder.stream(strided), encoder.stream(strided.contiguous()), strict=True):
        assert torch.equal(state, other)


def test_copies_and_keys():
    whisper = tiny_whisper()
    encoder = FrozenEncoder(whisper.encoder)
    assert set(encoder.state_dict()) == set(whisper.encoder.state_dict())
    features, _ = batch()
    expected = list(encoder.stream(features))[-1]
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(list(other.stream(features))[-1], expected)
    assert encoder.layers is whisper.encoder.layers  # shared, not copied


def test_fake_tensors():
    with FakeTensorMode():
        encoder = FrozenEncoder(tiny_whisper().encoder)
        lengths = torch.ones(2, dtype=torch.long)
        states = list(encoder.stream(torch.zeros(2, MELS, 20), lengths))
        assert states[-1].shape == (2, 10, WIDTH)


BAD = {
    "mel bins": (lambda f: f[:, :-1], None, "12 mel bins"),
    "rank": (lambda f: f[0], None, "shape (batch, mel bins, frames)"),
    "type": (lambda f: f.long(), None, "floating point"),
    "no tensor": (lambda f: [f], None, "list"),
    "short": (lambda f: f[..., :-2], None, "must have 48 frames"),
    "long": (lambda f: torch.cat([f, f], -1), torch.ones(4, dtype=torch.long), "1 to 48 frames"),
    "lengths shape": (lambda f: f, torch.ones(3, dtype=torch.long), "lengths must be 4 integers"),
    "lengths type": (lambda f: f, torch.ones(4), "lengths must be 4 integers"),
    "device": (lambda f: f.to("meta"), None, "input_features are on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, lengths, message = BAD[name]
    encoder = FrozenEncoder(tiny_whisper().encoder)
    with pytest.raises(UserError) as caught:
        encoder.stream(change(batch()[0]), lengths)  # at once, not at the first state
    assert message in str(caught.value)


def test_bad_construction_is_named():
    with pytest.raises(UserError, match="must be a Hugging Face WhisperEncoder, got Linear"):
        FrozenEncoder(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="dtype must be one of .*int8"):
        FrozenEncoder(tiny_whisper().encoder, dtype=torch.int8)
    with pytest.raises(UserError, match="hidden_states must have shape"):
        FrozenEncoder(tiny_whisper().encoder).last_layer(torch.zeros(2, 3))
    encoder = FrozenEncoder(tiny_whisper().encoder)
    encoder.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="cannot skip padding"):
        next(encoder.stream(batch()[0], torch.ones(4, dtype=torch.long)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_statistics_are_those_of_the_states(dtype):
    encoder = FrozenEncoder(tiny_whisper().encoder, dtype=dtype)
    features, lengths = batch()
    plain = list(encoder.stream(features))
    entries = list(encoder.stream(features, statistics=True))
    # The CPU rounds the statistics of half precision to half precision: then they are not handed on.
    known = [isinstance(entry, HiddenState) for entry in entries]
    assert known == [dtype == "float32"] * LAYERS + [False]
    for entry, state in zip(entries, plain, strict=True):
        if isinstance(entry, HiddenState):
            assert torch.equal(entry.values, state)
            for found, expected in zip(entry.statistics, ops.row_statistics(state)):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(entry, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not any(
            isinstance(e, HiddenState)
            for e in FrozenEncoder(tiny_whisper().encoder).stream(features, statistics=True)
        )


def test_another_epsilon_gives_no_statistics():
    encoder = FrozenEncoder(tiny_whisper().encoder)
    for layer in encoder.layers:
        layer.self_attn_layer_norm.eps = 1e-3
    assert not any(isinstance(e, HiddenState) for e in encoder.stream(batch()[0], statistics=True))


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_feed_forward_in_blocks_equals_hugging_face(activation, monkeypatch):
    monkeypatch.setitem(frozen_layer._INNER_ELEMENTS, "cpu", 999)
    whisper = tiny_whisper(activation_function=activation).eval()
    features, _ = batch()
    with torch.no_grad():
        expected = whisper.encoder(features, output_hidden_states=True).hidden_states
    found = list(FrozenEncoder(whisper.encoder).stream(features))
    for state, other in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)


def test_a_yielded_state_is_not_written_into_afterwards():
    encoder = FrozenEncoder(tiny_whisper().encoder)
    states, copies = [], []
    for state in encoder.stream(batch()[0]):
        states.append(state)
        copies.append(state.clone())
    assert all(torch.equal(a, b) for a, b in zip(states, copies, strict=True))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("place", ["", "self_attn", "self_attn_layer_norm", "activation_fn"])
def test_hooks_on_a_layer_run_and_change_what_it_gives(place, chunk_size):
    whisper = tiny_whisper().eval()
    features, _ = batch()
    encoder = FrozenEncoder(whisper.encoder)
    before = list(encoder.stream(features, statistics=True, chunk_size=chunk_size))
    seen = []

    def halved(_, given, out):
        seen.append(len(out[0]))
        return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2

    hook = encoder.layers[1].get_submodule(place).register_forward_hook(halved)
    found = list(encoder.stream(features, statistics=True, chunk_size=chunk_size))
    assert seen
    with torch.no_grad():
        expected = whisper.encoder(features).last_hidden_state
    torch.testing.assert_close(encoder.layer_norm(found[-1]), expected, rtol=1e-4, atol=1e-4)
    hook.remove()
    assert not torch.allclose(found[-1], before[-1], atol=1e-2)
    again = list(encoder.stream(features, statistics=True, chunk_size=chunk_size))
    assert torch.equal(again[-1], before[-1])


def test_what_transformers_leaves_on_the_layers_does_not_slow_them_down(monkeypatch):
    whisper = tiny_whisper().eval()
    features, _ = batch()
    whisper.encoder(features, output_hidden_states=True)
    encoder = FrozenEncoder(whisper.encoder)
    monkeypatch.setattr(encoder, "_run", None)  # Hugging Face's code around a layer's modules
    list(encoder.stream(features))
