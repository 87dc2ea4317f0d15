"""CUDA graphs of a training step: on a GPU; and without one what they would compute, and that nothing in them
looks at a value."""

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments
from whisper_meft import (
    HeadConfig,
    LoRAConfig,
    LSTConfig,
    MeftTrainer,
    SHERLConfig,
    UniPTConfig,
    UserError,
    get_meft_model,
)
from whisper_meft.encoder import graphed
from whisper_meft.model import module

from meft_kernels.ops import self_check
from tests.modelling_fixtures import WINDOW, ToyClips, batch, randomise, tiny_whisper

ROOT = Path(__file__).parents[2]
CONFIGS = {"lst": LSTConfig, "unipt": UniPTConfig, "sherl": SHERLConfig}
KINDS = [(method, saved) for method in CONFIGS for saved in ("exact", "fp8")]


def model_of(method, saved="exact", dtype=None, device="cpu", **options):
    torch.manual_seed(0)
    config = CONFIGS[method](reduction_factor=2, saved_activations=saved, backbone_dtype=dtype, **options)
    return randomise(get_meft_model(tiny_whisper().to(device), config)).train()


# --- without a GPU ------------------------------------------------------------------------------------------


class Graph(TorchDispatchMode):
    """A CUDA graph on the CPU: the operators of the capture, run again on the very same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = function(*args, **kwargs)
        new = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        made = [t.untyped_storage()._cdata not in given for t in new]
        self.calls.append((function, args, kwargs, out, made))
        return out

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out, made in self.calls:
                again = function(*args, **kwargs)
                tensors = ([t for t in tree_leaves(o) if torch.is_tensor(t)] for o in (out, again))
                for place, value, is_new in zip(*tensors, made, strict=True):
                    if is_new:
                        place.detach().copy_(value)

    def pool(self):
        return 0


@pytest.fixture
def emulated(monkeypatch):
    """``torch.cuda``'s graphs on the CPU; yields the graphs that were captured."""
    captured = []

    @contextlib.contextmanager
    def capture(graph, **options):
        captured.append(graph)
        with graph:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (
        ("Stream", lambda device: stream),
        ("current_stream", lambda device: stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("synchronize", lambda device: None),
        ("empty_cache", lambda: None),
        ("CUDAGraph", Graph),
        ("graph", capture),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return captured


def with_graphs(model, **options):
    trained = [p for p in model.side_network.parameters() if p.requires_grad]
    model._graphed = graphed.GraphedReader(model._read, trained, **options)
    return model


def step(model, features, labels, **given):
    loss = model(features, labels=labels, **given).loss
    loss.backward()
    return loss.detach()


def assert_same_gradients(model, other):
    for (name, parameter), (_, expected) in zip(model.named_parameters(), other.named_parameters()):
        assert (parameter.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            assert torch.allclose(parameter.grad, expected.grad, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("method, saved", KINDS)
def test_replays_compute_what_steps_compute(method, saved, emulated):
    """Three updates, each of two batches' added gradients, and one of another size in between."""
    eager = model_of(method, saved)
    model = with_graphs(copy.deepcopy(eager))
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (eager, model)]
    for update in range(3):
        losses = []
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        for part in range(2):
            features, labels = batch(3, seed=2 * update + part)
            losses.append([step(m, features, labels) for m in (eager, model)])
        features, labels = batch(2, seed=100 + update)
        losses.append([step(m, features, labels) for m in (eager, model)])
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in losses)
        assert_same_gradients(model, eager)
        for optimizer in optimizers:
            optimizer.step()
    assert len(emulated) == 2 and all(graph.calls for graph in emulated)


@pytest.mark.parametrize("method, accumulation", [("lst", 1), ("sherl", 2)])
def test_the_trainer_trains_the_same(method, accumulation, emulated, tmp_path):
    """Two epochs of batches of four and a last one of three: gradients are added up and clipped, and the rate
    falls."""
    pytest.importorskip("accelerate")
    eager = model_of(method)
    model = with_graphs(copy.deepcopy(eager))
    losses = []
    for each, folder in ((eager, "eager"), (model, "graphs")):
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            learning_rate=1e-2,
            max_grad_norm=0.1,
            report_to="none",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = MeftTrainer(each, arguments, train_dataset=ToyClips(19))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 2 * -(-5 // accumulation)
    assert len(emulated) == 2
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5), name


def test_gradients_are_not_written_over_by_the_next_step(emulated):
    model = with_graphs(model_of("lst"))
    step(model, *batch(2, seed=0))
    first = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    before = {name: grad.clone() for name, grad in first.items()}
    model.zero_grad(set_to_none=True)
    step(model, *batch(2, seed=1))
    assert all(torch.equal(first[name], before[name]) for name in first)


def test_the_head_alone_is_captured_without_a_backward(emulated):
    torch.manual_seed(0)
    eager = randomise(get_meft_model(tiny_whisper(), HeadConfig())).train()
    model = with_graphs(copy.deepcopy(eager))
    for seed in range(2):
        features, labels = batch(2, seed=seed)
        assert torch.allclose(step(model, features, labels), step(eager, features, labels))
    assert len(emulated) == 1
    assert_same_gradients(model, eager)


def test_evaluation_runs_without(emulated):
    model = with_graphs(model_of("lst"))
    features, labels = batch(2)
    with torch.no_grad():
        model(features, labels=labels)
    model.eval()(features, labels=labels)
    assert not model._graphed.in_use


def test_it_is_captured_anew_where_parameters_moved_or_autocast_changed(emulated):
    model = with_graphs(model_of("lst"))
    features, labels = batch(2)
    step(model, features, labels)
    model.zero_grad(set_to_none=True)
    step(model, features, labels)
    assert len(emulated) == 2
    for parameter in model.side_network.parameters():
        parameter.data = parameter.data.clone()
    step(model, features, labels)
    assert len(emulated) == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, features, labels)
        step(model, features, labels)
    assert len(emulated) == 6


def test_a_copied_model_runs_without(emulated):
    model = with_graphs(model_of("lst"))
    step(model, *batch(2))
    other = copy.deepcopy(model)
    assert other._graphed is None
    step(other, *batch(2))


def test_backward_out_of_turn_is_refused(emulated):
    model = with_graphs(model_of("lst"))
    features, labels = batch(2)
    first = model(features, labels=labels).loss
    model(features, labels=labels)
    with pytest.raises(UserError, match="backward must come once, and before the forward of the next"):
        first.backward()
    again = model(features, labels=labels).loss
    again.backward(retain_graph=True)
    with pytest.raises(UserError, match="backward must come once"):
        again.backward()


def test_shorter_batches_are_padded_to_the_number(monkeypatch):
    """With max_frames a number there is one shape, and the padding changes nothing."""
    model = model_of("lst", max_frames=WINDOW)
    features, labels = batch(2)
    short = features[..., : WINDOW - 6].contiguous()
    mask = torch.ones(2, short.shape[-1], dtype=torch.long)
    expected = step(model, short, labels, attention_mask=mask)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    shapes = []

    class Read:
        def __init__(self, read, parameters, features, lengths):
            self.read, self.parameters = read, parameters

        def forward(self, features, lengths):
            shapes.append(features.shape[-1])
            with torch.enable_grad():
                self.pooled = self.read(features, lengths)
            return self.pooled.detach()

        def backward(self, upstream):
            return torch.autograd.grad(self.pooled, self.parameters, upstream, allow_unused=True)

    with_graphs(model, frames=2 * WINDOW, capture=Read)
    model.zero_grad()
    loss = step(model, short, labels, attention_mask=mask)
    assert shapes == [2 * WINDOW]
    assert torch.allclose(loss, expected, rtol=1e-4)
    for name, parameter in model.named_parameters():
        if name in grads:
            assert torch.allclose(parameter.grad, grads[name], rtol=1e-3, atol=1e-5), name


def test_what_cannot_be_captured_is_named(emulated, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = with_graphs(model_of("lst"), capture=fail)
    with pytest.raises(UserError, match="^cuda_graphs: the step cannot be captured, .*: RuntimeError: op"):
        step(model, *batch(2))


def test_a_kernel_that_was_not_checked_is_no_part_of_a_graph(emulated, monkeypatch):
    model = with_graphs(model_of("lst"))
    read = model._graphed._read

    def reading(*given):
        if emulated:
            self_check.left_unchecked.add("ladder")
        return read(*given)

    monkeypatch.setattr(model._graphed, "_read", reading)
    with pytest.raises(UserError, match="the kernels of ladder could not be checked before the capture"):
        step(model, *batch(2))
    self_check.left_unchecked.clear()


@pytest.mark.parametrize(
    "config, message",
    [
        (LoRAConfig(), "lora trains inside the encoder, whose step is not captured"),
        (LSTConfig(max_frames="longest"), "max_frames 'longest' gives batches of many shapes"),
        (LSTConfig(), "they need a CUDA device, the model is on cpu"),
    ],
)
def test_where_there_are_none(config, message):
    place = SimpleNamespace(conv1=SimpleNamespace(weight=torch.empty(1)))
    model = SimpleNamespace(meft_config=config, encoder=place)
    with pytest.raises(UserError, match=f"^cuda_graphs: {message}"):
        module.MeftModel.use_cuda_graphs(model)


NO_HOST_READS = """
import itertools
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import WhisperConfig
from benchmarks import launches
from whisper_meft import MeftConfig
from whisper_meft.encoder import chunked

READS = {"_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "masked_select", "unique", "_unique2",
         "is_nonzero", "equal", "repeat_interleave", "bincount"}


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        assert name not in READS, f"{name} makes the host wait"
        if name in ("index", "index_put", "index_put_"):
            indices = [t for t in tree_leaves(args[1]) if torch.is_tensor(t)]
            assert all(t.dtype not in (torch.bool, torch.uint8) for t in indices), f"{name} by a mask"
        out = function(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        found = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        if any(t.is_meta for t in given):
            assert all(t.is_meta for t in found), f"{name} copies to the host"
        if any(t.is_meta for t in given + found):  # a number may be an argument of a kernel
            assert all(t.is_meta or not t.ndim for t in given), f"{name} copies from the host"
        return out


x = torch.ones(3, device="meta")
for read in (
    lambda: x[0].item(), lambda: bool(x[0]), lambda: x.tolist(), lambda: x.nonzero(), lambda: x[x > 0],
    lambda: x.masked_select(x > 0), lambda: x.cpu(), lambda: x.numpy(), lambda: x.to("cpu"),
    lambda: torch.ones(3).to("meta"), lambda: x.copy_(torch.ones(3)),
):
    try:
        with NoHostReads():
            read()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError):
        continue
    raise SystemExit("a read was not noticed")

chunked._DEFAULT_INNER_ELEMENTS = 2 * 40 * 256
chunked._KEPT_BYTES = 0  # SHERL's last layer is computed again, as in a large batch
sizes = {"d_model": 192, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 256}
config = WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=40, decoder_layers=1, num_labels=4)
recorder = launches._Recorder()
kinds = itertools.product(("lst", "unipt", "sherl"), ("exact", "fp8"), ("fidelity", 30))
for method, saved, frames in kinds:
    chosen = MeftConfig.from_dict({"method": method, "saved_activations": saved, "max_frames": frames})
    with launches._as_on_a_gpu(recorder):
        model, optimizer, given = launches._built(config, chosen, 5, torch.bfloat16, "meta")
        if frames != "fidelity":
            given["attention_mask"] = torch.ones(5, 80, dtype=torch.long, device="meta")
        with NoHostReads():
            launches._step(model, optimizer, given, recorder)
    print(method, saved, frames)
"""


def test_a_step_makes_the_host_wait_for_nothing():
    """On tensors that hold nothing, and with every decision that a GPU would bring."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", NO_HOST_READS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 12


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method, saved", KINDS)
def test_graphs_give_what_eager_steps_give(method, saved, dtype):
    """Losses and gradients of several updates; the library's products may add up in another order."""
    eager = model_of(method, saved, dtype, "cuda", chunk_size=2).to("cuda")
    model = copy.deepcopy(eager)
    model.use_cuda_graphs()
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, fused=True) for m in (eager, model)]
    rtol = 1e-5 if dtype == "float32" else 1e-2
    autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    for update in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        for part in range(2):
            features, labels = (t.cuda() for t in batch(5, seed=2 * update + part))
            with autocast:
                losses = [m(features, labels=labels).loss for m in (eager, model)]
            for loss in losses:
                loss.backward()
            torch.testing.assert_close(losses[1], losses[0], rtol=rtol, atol=0)
        for (name, ours), theirs in zip(model.named_parameters(), eager.parameters()):
            if theirs.grad is not None:
                error = (ours.grad - theirs.grad).norm()
                assert error <= rtol * theirs.grad.norm() + 1e-7, name
        for optimizer in optimizers:
            optimizer.step()
    assert model._graphed.in_use
