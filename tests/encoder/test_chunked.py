"""A batch in chunks inside one step: the same results and gradients, and nothing left over afterwards."""

import gc

import pytest
import torch
from modelling_fixtures import CONFIGS, LAYERS, WINDOW, batch, randomise, tiny_whisper
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from whisper_meft import HeadConfig, MeftConfig, UserError, WeightedSumConfig, get_meft_model
from whisper_meft.encoder import chunked, frozen, last_layer

from meft_kernels.ops import backends
from meft_kernels.testing import relative_error

READERS = CONFIGS | {"head": HeadConfig, "weighted_sum": WeightedSumConfig}
SIDE = pytest.mark.parametrize("method", CONFIGS)
SIZE = 5


def build(method, dtype=torch.float64, **options):
    model = get_meft_model(tiny_whisper(), READERS[method](**options))
    return randomise(model).to(dtype)


def mask_of(lengths):
    return (torch.arange(2 * WINDOW) < 2 * torch.tensor(lengths)[:, None]).long()


def step(model, **arguments):
    """Loss, scores and gradients of one step."""
    # Those of seed 0 multiply fp32's rounding by hundreds in UniPT, chunks or not.
    features, labels = batch(SIZE, seed=1)
    model.zero_grad()
    output = model(features.to(model.encoder.dtype), labels=labels, **arguments)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return [output.loss, output.logits], grads


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", READERS)
def test_any_chunk_gives_the_same(method, masked, monkeypatch):
    options = {"max_frames": "longest"} if masked else {}
    arguments = {"attention_mask": mask_of([24, 3, 17, 1, 24])} if masked else {}

    monkeypatch.setattr(chunked, "_KEPT_BYTES", 0)

    def errors(dtype, chunk):
        """Of loss, scores and gradients, against the whole batch in float64."""
        monkeypatch.setattr(chunked, "automatic_chunk", lambda *_: chunk)
        scores, grads = step(build(method, dtype, **options), **arguments)
        grads = [grad for name, grad in grads.items() if truth[name].any()]
        if dtype == torch.float32:  # rounding may be most of a small gradient, not of all together
            grads = [torch.cat([grad.flatten() for grad in grads])]
        return [relative_error(a, b) for a, b in zip([*scores, *grads], exact[dtype], strict=True)]

    scores, truth = step(build(method, **options), **arguments)
    grads = [grad for grad in truth.values() if grad.any()]
    assert len(grads) >= len(truth) - 1  # the one that is exactly zero is that of UniPT's gate bias
    together = torch.cat([grad.flatten() for grad in grads])
    exact = {torch.float64: [*scores, *grads], torch.float32: [*scores, together]}
    for chunk in (1, 2, 3, SIZE):
        assert max(errors(torch.float64, chunk)) < 1e-10
        assert max(errors(torch.float32, chunk)) < 1e-5


@SIDE
def test_chunk_size_of_the_config_is_used(method, monkeypatch):
    model = build(method, chunk_size=2)
    sizes = []
    stream = model.encoder.stream
    monkeypatch.setattr(
        model.encoder,
        "stream",
        lambda features, *rest: sizes.append(len(features)) or stream(features, *rest),
    )
    step(model)
    assert sizes == [2, 2, 1]
    assert MeftConfig.from_dict(model.config.meft).chunk_size == 2


def test_automatic_chunks_follow_length_and_device():
    encoder = build("lst").encoder
    inner = encoder.layers[0].fc1.out_features
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device, elements in ((cpu, 2**23), (gpu, 3 * 2**24)):
        chunk = chunked.automatic_chunk(encoder, 1500, device)
        assert chunk * 1500 * inner <= elements < (chunk + 1) * 1500 * inner
    assert chunked.automatic_chunk(encoder, 10**9, cpu) == 1


@SIDE
def test_chunks_without_gradients_and_of_an_empty_batch(method):
    model = build(method, chunk_size=2).eval()
    features, _ = batch(SIZE)
    with torch.no_grad():
        scores = model(features.double()).logits
        alone = torch.cat([model(part.double()).logits for part in features.split(1)])
        assert model(features[:0].double()).logits.shape == (0, scores.shape[1])
    torch.testing.assert_close(scores, alone, rtol=1e-9, atol=1e-12)


def test_sherl_computes_its_last_layer_again_only_where_keeping_it_is_dear(monkeypatch):
    model = build("sherl", chunk_size=2)
    calls, again = [], []
    last, backward = model.encoder.last_layer, last_layer._LayerAgain.backward

    def recorded(self, x, *rest):
        again.append(len(x))
        return backward(self, x, *rest)

    monkeypatch.setattr(
        model.encoder, "last_layer", lambda states, *rest: calls.append(len(states)) or last(states, *rest)
    )
    monkeypatch.setattr(last_layer._LayerAgain, "backward", recorded)
    kept_scores, kept = step(model)
    assert calls == [2, 2, 1] and not again
    calls.clear()
    monkeypatch.setattr(chunked, "_KEPT_BYTES", 0)
    monkeypatch.setattr(chunked, "automatic_chunk", lambda *_: 4)
    scores, grads = step(model)
    assert calls == [2, 2, 1] and again == [1] * 5  # a fourth of a chunk at a time in the backward
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(scores, kept_scores))
    assert all(relative_error(grads[name], grad) < 1e-10 for name, grad in kept.items())


@SIDE
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bit_copies_in_chunks(method, kind):
    exact_scores, exact = step(build(method, torch.float32, chunk_size=2))
    scores, grads = step(build(method, torch.float32, chunk_size=2, saved_activations=kind))
    assert all(torch.equal(a, b) for a, b in zip(scores, exact_scores))
    flat = [torch.cat([g.flatten() for g in found.values()]) for found in (exact, grads)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.995  # 5 tiny clips; test_saved_activations has more
    assert not torch.equal(*flat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
        ({"chunk_size": "4"}, "chunk_size must be a positive integer, got '4'"),
        (
            {"saved_activations": "int4"},
            "saved_activations must be one of 'exact', 'int8', 'fp8', got 'int4'",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        READERS["lst"](**options)


@pytest.fixture
def older_objects_left_out():
    """What other tests left behind is not looked through: it may be millions of objects."""
    gc.freeze()


def live_storages():
    found = {}
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not is_fake(thing):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@SIDE
@pytest.mark.parametrize("keep", ["exact", "fp8"])
def test_nothing_of_the_backbone_survives_the_step(method, keep, older_objects_left_out):
    model = build(method, torch.float32, chunk_size=2, saved_activations=keep)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    before = live_storages()
    features, labels = batch(SIZE)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(features, labels=labels).loss
        loss.backward()
        optimizer.step()
    new = {pointer: size for pointer, size in live_storages().items() if pointer not in before}
    trained = [p for p in model.parameters() if p.requires_grad]
    allowed = {t.untyped_storage().data_ptr() for t in (features, labels, loss)}
    allowed |= {p.grad.untyped_storage().data_ptr() for p in trained}
    states = [t for state in optimizer.state.values() for t in state.values()]
    allowed |= {t.untyped_storage().data_ptr() for t in states}
    assert set(new) <= allowed
    assert all(p.grad is None for p in model.encoder.parameters())
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained}


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@SIDE
def test_no_transient_is_larger_than_a_chunk(method):
    features, labels = batch(32)
    model = build(method, torch.float32, chunk_size=2)
    with LargestTensor() as largest:
        model(features, labels=labels).loss.backward()
    inner = model.encoder.layers[0].fc1.out_features
    stem = 2 * WINDOW * model.encoder.hidden_size  # the first convolution works at twice the frame rate
    attention = LAYERS * WINDOW * WINDOW * 4
    assert largest.size <= max(features.numel(), 2 * stem, 2 * WINDOW * inner, 2 * attention)


@pytest.fixture
def slabs(monkeypatch):
    """As on a GPU: slabs of 3 clips, of which the encoder takes 2 at a time."""
    monkeypatch.setattr(chunked, "automatic_chunk", lambda *_: 2)
    monkeypatch.setattr(chunked, "automatic_slab", lambda *_: 3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", READERS)
def test_slabs_give_the_same(method, masked, request):
    options = {"max_frames": "longest"} if masked else {}
    arguments = {"attention_mask": mask_of([24, 3, 17, 1, 24])} if masked else {}
    scores, truth = step(build(method, **options), **arguments)
    request.getfixturevalue("slabs")
    model = build(method, **options)
    found_scores, grads = step(model, **arguments)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(found_scores, scores))
    assert all(relative_error(grads[name], grad) < 1e-10 for name, grad in truth.items() if grad.any())
    again_scores, again = step(model, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(again_scores, found_scores))
    assert all(torch.equal(again[name], grad) for name, grad in grads.items())


@SIDE
@pytest.mark.parametrize("keep", ["exact", "fp8"])
def test_a_side_network_reads_slabs_and_the_encoder_runs_chunks(method, keep, slabs, monkeypatch):
    model = build(method, torch.float32, saved_activations=keep)
    read, run = [], []
    stream, finish = model.encoder.stream, model.encoder._finish

    def states(*args):
        for state in stream(*args):
            read.append(len(state[0] if isinstance(state, tuple) else state))
            yield state

    monkeypatch.setattr(model.encoder, "stream", states)
    monkeypatch.setattr(
        model.encoder, "_finish", lambda layer, *rest: run.append(len(rest[0])) or finish(layer, *rest)
    )
    step(model)
    layers = LAYERS - 1 if method == "sherl" else LAYERS
    assert read == [3] * (layers + 1) + [2] * (layers + 1)
    assert run == [2, 1] * layers + [2] * layers


@SIDE
def test_copies_in_8_bits_leave_the_scores_as_they_are_in_slabs(method, slabs):
    """There each hidden state is written over the one before it."""
    exact_scores, exact = step(build(method))
    scores, grads = step(build(method, saved_activations="fp8"))
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(scores, exact_scores))
    flat = [torch.cat([g.flatten() for g in found.values()]) for found in (exact, grads)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.995
    with torch.no_grad():
        logits = build(method)(batch(SIZE, seed=1)[0].double()).logits
    assert relative_error(logits, exact_scores[1]) < 1e-10


def test_a_slab_is_the_batch_where_a_side_network_reads_it_on_a_gpu():
    side = build("lst", torch.float32).side_network
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunked.automatic_slab(side, 128, 7, cpu) == 7
    assert chunked.automatic_slab(torch.nn.Identity(), 128, 7, gpu) == 7
    assert chunked.automatic_slab(side, 128, 7, gpu) == 128
    assert chunked.automatic_slab(side, 0, 7, gpu) == 1


@pytest.mark.parametrize("rows, parts", [(128, 13), (13, 4), (3, 4), (1, 1), (0, 4)])
def test_parts_of_rows_are_nearly_equal_and_the_longest_come_first(rows, parts):
    slices = frozen.row_parts(rows, parts)
    assert [row for part in slices for row in range(rows)[part]] == list(range(rows))
    sizes = [part.stop - part.start for part in slices]
    assert len(sizes) == min(rows, parts) and sizes == sorted(sizes, reverse=True)
    assert not sizes or sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_embedding_is_made_again_where_copies_in_8_bits_are_kept(method, masked, slabs, monkeypatch):
    """Its projection then has the exact gradient, and so has that of the last state, which is kept."""
    options = {"max_frames": "longest"} if masked else {}
    arguments = {"attention_mask": mask_of([24, 3, 17, 1, 24])} if masked else {}
    _, truth = step(build(method, **options), **arguments)
    monkeypatch.setattr(chunked, "automatic_slab", lambda *_: SIZE)
    model = build(method, saved_activations="fp8", **options)
    encoded = []
    encode = backends.kernel("encode")

    def kernel(name, backend=None, original=backends.kernel):
        return (
            (lambda *given: encoded.append(1) or encode(*given))
            if name == "encode"
            else original(name, backend)
        )

    monkeypatch.setattr(backends, "kernel", kernel)
    _, grads = step(model, **arguments)
    count = len(model.side_network.down)  # SHERL reads one state less
    assert len(encoded) == count - 2
    first = () if method == "lst" else ("side_network.down.0.",)
    exact = [name for name in grads if name.startswith((*first, f"side_network.down.{count - 1}."))]
    assert exact
    for name in exact:
        assert relative_error(grads[name], truth[name]) < 1e-10
    if count > 2:
        weight = "side_network.down.1.linear" + ("_1.weight" if method == "sherl" else ".weight")
        assert relative_error(grads[weight], truth[weight]) > 1e-6


def test_features_that_change_before_the_backward_are_noticed(slabs):
    model = build("lst", saved_activations="fp8")
    features, labels = batch(SIZE, seed=1)
    features = features.double()
    loss = model(features, labels=labels).loss
    features.mul_(2)
    with pytest.raises(RuntimeError, match="input_features or lengths were changed in place"):
        loss.backward()
