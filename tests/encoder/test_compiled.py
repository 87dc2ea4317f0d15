"""One compiled encoder layer for all layers, lengths and batch sizes."""

import pytest
import torch
from modelling_fixtures import CONFIGS, LAYERS, WINDOW, batch, mel_mask, randomise, tiny_whisper
from training_fixtures import make_audio_folder, make_backbone, train_command
from whisper_meft import FrozenEncoder, LoRAConfig, get_meft_model
from whisper_meft.commands import cli
from whisper_meft.encoder import compiled
from whisper_meft.encoder import frozen as encoder
from whisper_meft.errors import UserError

from meft_kernels import HiddenState


@pytest.fixture
def graphs():
    """A backend that runs what it is given as it is, and a list with a graph for each compilation."""
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    yield backend, found
    torch._dynamo.reset()


def model_of(method, backend=None, **options):
    torch.manual_seed(1)
    config = CONFIGS[method](reduction_factor=2, max_frames="longest", **options)
    model = randomise(get_meft_model(tiny_whisper(), config))
    if backend is not None:
        model.encoder.compile_layers(backend)
    return model


# (clips, mel frames): lengths of every parity, the window itself, batches of more and fewer clips.
SHAPES = [(4, 2 * WINDOW), (4, 31), (3, 20), (5, 2 * WINDOW), (2, 7), (6, 26)]


@pytest.mark.parametrize("method", CONFIGS)
def test_one_graph_serves_all_layers_lengths_and_batches(method, graphs):
    backend, found = graphs
    plain, model = model_of(method), model_of(method, backend)
    for clips, frames in SHAPES:
        features, labels = batch(clips, frames)
        lengths = torch.randint(1, frames + 1, (clips,), generator=torch.Generator().manual_seed(frames))
        mask = mel_mask(lengths.tolist(), frames)
        gradients = []
        for each in (plain, model):
            each.zero_grad()
            each(features, attention_mask=mask, labels=labels).loss.backward()
            named = [(n, p.grad) for n, p in each.named_parameters() if p.requires_grad]
            gradients.append(torch.cat([g.flatten() for _, g in named]))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
        assert len(found) == 1, (clips, frames)
    # The attention and both products of the feed-forward block are in that one graph.
    text = found[0].print_readable(print_output=False)
    assert "scaled_dot_product_attention" in text and text.count("linear(") == 6
    # A single clip is the one other size that is compiled for.
    features, labels = batch(1)
    mask = mel_mask([9], 2 * WINDOW)
    with torch.no_grad():
        expected = plain(features, attention_mask=mask).logits
        torch.testing.assert_close(model(features, attention_mask=mask).logits, expected)
        grown = len(found)
        model(features[..., :30], attention_mask=mask[:, :30])
    assert grown == len(found) <= 3


def test_statistics_are_shared_as_without(graphs):
    backend, found = graphs
    features, _ = batch()
    plain, fast = (FrozenEncoder(tiny_whisper().encoder) for _ in "ab")
    fast.compile_layers(backend)
    states = list(fast.stream(features, statistics=True))
    for state, expected in zip(states, plain.stream(features, statistics=True), strict=True):
        assert isinstance(state, HiddenState) == isinstance(expected, HiddenState)
        pairs = zip(state, expected) if isinstance(state, HiddenState) else [(state, expected)]
        for a, b in pairs:
            torch.testing.assert_close(a, b)
    assert sum(isinstance(state, HiddenState) for state in states) == LAYERS and len(found) == 1


def test_inductor_compiles_it():
    torch._dynamo.reset()
    try:
        plain, model = model_of("lst"), model_of("lst", "inductor")
    except UserError:
        pytest.skip("needs a C++ compiler")
    for frames in (2 * WINDOW, 20):
        features, labels = batch(3, frames)
        losses = [each(features, labels=labels).loss for each in (plain, model)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_the_commands_compile(tmp_path, capsys, monkeypatch, graphs):
    backend, found = graphs
    make = compiled.compiled_layer
    monkeypatch.setattr(encoder, "compiled_layer", lambda _, device: make(backend, device))
    backbone, audio = make_backbone(tmp_path / "backbone"), make_audio_folder(tmp_path / "audio", 4)
    options = {"num_train_epochs": 1, "max_frames": "longest", "backbone_compile": True}
    assert cli.main(train_command(backbone, audio, tmp_path / "out", **options)) == 0
    after = len(found)
    assert after
    for command in (
        ["evaluate", str(tmp_path / "out"), f"--data={audio}"],
        ["cache", f"--model_name_or_path={backbone}", f"--train_data={audio}", f"--output_dir={tmp_path}/c"],
    ):
        torch._dynamo.reset()
        before = len(found)
        assert cli.main(command) == 0 and len(found) == before
        extra = [f"--output_dir={tmp_path}/d"] if command[0] == "cache" else []
        assert cli.main([*command, "--backbone_compile=True", *extra]) == 0 and len(found) > before
    capsys.readouterr()
    command = train_command(backbone, audio, tmp_path / "full", method="full", reduction_factor=None)
    assert cli.main([*command, "--backbone_compile=True"]) == 1
    assert "backbone_compile: full trains inside the encoder" in capsys.readouterr().err


def test_what_cannot_be_compiled_is_named(monkeypatch):
    one = FrozenEncoder(tiny_whisper().encoder)
    with pytest.raises(UserError, match="backend must be one of .*inductor.*, got 'quick'"):
        one.compile_layers("quick")
    with pytest.raises(UserError, match="this one trains inside it"):
        get_meft_model(tiny_whisper(), LoRAConfig(r=2)).encoder.compile_layers("eager")

    def missing():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(UserError, match="needs a C.. compiler on a CPU: install g.. .*No working"):
        one.compile_layers()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match="needs triton"):
        compiled.compiled_layer("inductor", torch.device("cuda"))
