"""Counted memory: against real runs, by hand, against the paper, and the command that prints it."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import WhisperConfig, WhisperForAudioClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from whisper_meft import MeftConfig, get_meft_model
from whisper_meft.commands import cli
from whisper_meft.commands.memory import parse_size
from whisper_meft.encoder.sizes import WHISPER_SIZES, whisper_config
from whisper_meft.errors import UserError
from whisper_meft.memory import counting as counter
from whisper_meft.memory import storage_recorder
from whisper_meft.memory.caching_allocator import CachingAllocator
from whisper_meft.memory.counting import (
    CONTEXT,
    GIB,
    PHASES,
    MemoryCount,
    count_step,
    estimate,
    largest_batch,
)
from whisper_meft.memory.storage_recorder import StorageRecorder, Usage, standing_for

from benchmarks import memory as benchmark
from benchmarks.published import PAPER_GIB
from meft_kernels import triton_kernels
from meft_kernels.reference import common

MIB = 2**20
WIDTH, MELS, FRAMES, BATCH = 32, 8, 40, 5
METHODS = [
    ("lst", {}),
    ("lst", {"saved_activations": "fp8"}),
    ("lst", {"chunk_size": 2}),
    ("unipt", {}),
    ("unipt", {"chunk_size": 3, "saved_activations": "int8"}),
    ("unipt", {"attention": "pooled:6"}),
    ("unipt", {"attention": "linear", "chunk_size": 2}),
    ("unipt", {"attention": "summary"}),
    ("sherl", {"chunk_size": 2}),
    ("sherl", {"max_frames": 30}),
    ("head", {}),
    ("full", {}),
]
ON_GPU = [("lst", {}), ("lst", {"saved_activations": "fp8"}), ("unipt", {}), ("sherl", {}), ("lora", {})]
ON_GPU += [("unipt", {"attention": "pooled:8"}), ("unipt", {"attention": "linear"})]


def tiny(**changes) -> WhisperConfig:
    sizes = {"d_model": WIDTH, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    sizes |= {"num_mel_bins": MELS, "max_source_positions": FRAMES, "decoder_layers": 1, "num_labels": 3}
    return WhisperConfig(**{**sizes, **changes})


def count(method, options, fake=True, dtype=torch.float32, clips=BATCH, **settings):
    """The step of a method on the tiny model, counted on fake or on real tensors."""
    config = MeftConfig.from_dict({"method": method, **options})

    def build():
        return get_meft_model(WhisperForAudioClassification._from_config(tiny(), dtype=dtype), config)

    def inputs():
        given = {"input_features": torch.randn(clips, MELS, 2 * FRAMES)}
        given["labels"] = torch.zeros(clips, dtype=torch.long)
        if config.max_frames != "fidelity":
            given["attention_mask"] = torch.ones(clips, 2 * FRAMES, dtype=torch.long)
        return given

    settings = {"device_type": "cpu", **settings}
    return count_step(build, inputs, hidden_size=WIDTH, fake=fake, **settings)


# --- against real runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_fake_run_counts_what_a_real_run_does(method, options, monkeypatch):
    dtype = torch.bfloat16 if options else torch.float32
    monkeypatch.setitem(common.BLOCK_ELEMENTS, "cpu", 1000)  # many blocks of rows in every op
    fake, real = (count(method, options, fake, dtype) for fake in (True, False))
    for phase in PHASES:
        assert fake.phases[phase].total == real.phases[phase].total, phase
        assert fake.phases[phase].contributors == real.phases[phase].contributors, phase
    assert fake.left_alive == real.left_alive == 0


@pytest.mark.parametrize("method", ["lst", "unipt", "sherl"])
def test_a_kernels_workspace_is_that_of_its_launcher(method, monkeypatch):
    pytest.importorskip("triton")
    launched = []
    names = [name.name for name in pkgutil.iter_modules(triton_kernels.__path__)]
    # All are imported before one is patched: else some would keep the patched launch of another.
    for module in [importlib.import_module(f"{triton_kernels.__name__}.{name}") for name in names]:
        if hasattr(module, "launch"):  # results stay unwritten: allocations do not depend on them
            monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    settings = {"backend": "triton"}
    fake, real = (count(method, {}, fake, **settings) for fake in (True, False))
    assert len(set(launched)) > 3
    assert {k: u.total for k, u in fake.phases.items()} == {k: u.total for k, u in real.phases.items()}
    reference = count(method, {}, **{**settings, "backend": "reference"})
    if method != "sherl":  # whose peak lies in the last encoder layer
        assert fake.phases["backward"].total != reference.phases["backward"].total


_RESIDENT = """
import gc, json, sys
from pathlib import Path
import torch
from transformers import WhisperForAudioClassification
from whisper_meft import MeftConfig, get_meft_model
from whisper_meft.memory.counting import count_step
from whisper_meft.encoder.sizes import whisper_config

torch.set_num_threads(1)


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def step(batch):
    def build():
        base = WhisperForAudioClassification._from_config(whisper_config("tiny"), dtype=torch.float32)
        return get_meft_model(base, MeftConfig.from_dict({"method": sys.argv[1]}))

    def inputs():  # drawn, because zeros take no memory until they are written
        return {"input_features": torch.randn(batch, 80, 3000), "labels": torch.zeros(batch).long()}

    return count_step(build, inputs, device_type="cpu", fake=False)


step(1)  # loads what is loaded when it is first used
gc.collect()
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
counted = step(6).peak
print(json.dumps([counted, resident("VmHWM") - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
@pytest.mark.parametrize("method", ["lst", "unipt"])
def test_resident_memory_of_a_real_step(method):
    # Blocks from 64 KiB on are mapped, and so given back as soon as they are freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", _RESIDENT, method]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    counted, resident = json.loads(done.stdout)
    assert counted > 80 * MIB
    assert resident == pytest.approx(counted, rel=0.04)


@pytest.mark.gpu
@pytest.mark.parametrize("method, options", ON_GPU, ids=str)
def test_the_allocators_peak_on_a_gpu(method, options):
    batch = 32
    with torch.device("cuda"):
        base = WhisperForAudioClassification._from_config(whisper_config("small"), dtype=torch.bfloat16)
        model = get_meft_model(base, MeftConfig.from_dict({"method": method, **options}))
        given = {"input_features": torch.randn(batch, 80, 3000), "labels": torch.zeros(batch).long()}
    del base
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, fused=True)
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert before > 0
    counted = estimate("small", method, batch, capability=torch.cuda.get_device_capability(), **options)
    assert counted.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.05)


# --- against the paper --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "lst"])
def test_the_papers_figures(method):
    if method == "lora":
        pytest.importorskip("peft")
    counted = benchmark.count_published(method, "small", 128)
    assert counted.peak / GIB == pytest.approx(PAPER_GIB[method], rel=0.12)
    assert counted.peak < counted.reserved
    assert counted.reserved / GIB == pytest.approx(PAPER_GIB[method], rel=0.06)


def test_side_networks_need_what_the_hidden_states_take():
    exact, eight_bit = (estimate("small", "lst", 128, saved_activations=how) for how in ("exact", "fp8"))
    state = 128 * 1500 * 768 * 2
    assert exact.contributors[counter.HIDDEN] == pytest.approx(13 * state, rel=0.01)
    assert eight_bit.contributors[counter.HIDDEN] == pytest.approx(13 * state / 2, rel=0.04)
    assert exact.peak < 4.6 * GIB and eight_bit.peak < 2.8 * GIB


# --- the recorder by hand -----------------------------------------------------------------------------------


def peaks(device_type, run, fake=True):
    """Total at the peak of a function's only phase."""
    recorder = StorageRecorder(device_type)
    with standing_for(device_type, (9, 0)) if fake else nullcontext(), recorder:
        recorder.start("run")
        kept = run()
        usage = recorder.usage()["run"]
        del kept
    return usage


@pytest.mark.parametrize("fake", [True, False])
def test_views_count_once_and_freed_storages_not_at_all(fake):
    def run():
        x = torch.empty(1000)  # 4000 bytes
        view = x[10:].view(2, -1).t()
        y = x + 1
        del y
        return view, x * 2

    assert peaks("cpu", run, fake).total == 8000


def test_allocations_are_rounded_as_the_gpus_are():
    assert peaks("cuda", lambda: [torch.empty(1), torch.empty(129)]).total == 512 + 1024


def test_autocast_follows_the_gpus_rules():
    def run():
        x = torch.empty(4, 8)
        linear, norm = nn.Linear(8, 8), nn.LayerNorm(8)
        with torch.autocast("cpu", dtype=torch.float16):
            half = linear(x)
            assert half.dtype == torch.float16
            assert norm(half).dtype == torch.float32
            assert nn.functional.layer_norm(half, (8,)).dtype == torch.float32
            assert half.sum(-1).dtype == half.softmax(-1).dtype == torch.float32
            assert nn.functional.gelu(half).dtype == torch.float16
            assert (x + half).dtype == torch.float32
        assert norm(half.float()).dtype == torch.float32
        assert half.sum(-1).dtype == torch.float16  # autocast is over
        return x

    peaks("cuda", run)


def test_attention_keeps_no_scores_and_flash_attention_has_its_workspace():
    query = (2, 4, 300, 64)

    def run():
        q = torch.empty(query, dtype=torch.float16, requires_grad=True)
        out = nn.functional.scaled_dot_product_attention(q, q, q)
        out.sum().backward()
        return out

    used = peaks("cuda", run)
    workspace = 2 * 4 * 384 * 65 * 4  # float32 gradients and sums of the queries, frames rounded up to 128
    assert used.total < 2 * 4 * 300 * 300 * 2 + workspace + 10 * 2 * 4 * 300 * 64 * 2
    assert workspace in [nbytes for nbytes, text in used.largest]


def test_a_repeated_op_counts_as_if_it_ran(monkeypatch):
    fast = count("unipt", {"chunk_size": 1}, device_type="cuda")
    monkeypatch.setattr(StorageRecorder, "_trace", lambda self, *_: None)
    slow = count("unipt", {"chunk_size": 1}, device_type="cuda")
    assert fast == slow


def test_contributors_by_hand():
    """One linear layer without autocast: everything is known."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.trained = nn.Linear(16, 32), nn.Linear(32, 64)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return SequenceClassifierOutput(loss=self.trained(torch.relu(self.frozen(x))).sum())

    settings = {"hidden_size": None, "device_type": "cpu"}
    counted = count_step(Model, lambda: {"x": torch.empty(10, 16)}, **settings)
    trained = 4 * (32 * 64 + 64)
    shares = counted.phases["optimizer"].contributors
    assert shares[counter.BACKBONE] == 4 * (16 * 32 + 32)
    assert shares[counter.TRAINABLE] == shares[counter.GRADIENTS] == trained
    assert shares[counter.OPTIMIZER] == 2 * trained + 2 * 4  # two moments, and a step count of each parameter
    assert shares[counter.INPUTS] == 4 * 10 * 16
    assert counted.phases["backward"].contributors[counter.SAVED] >= 4 * 10 * 32
    assert counted.trainable_parameters == 32 * 64 + 64
    assert counted.left_alive == 0
    assert counted.reserved == counted.peak == max(usage.total for usage in counted.phases.values())


# --- the allocator ------------------------------------------------------------------------------------------


def test_segments_of_the_caching_allocator():
    allocator = CachingAllocator()
    small = allocator.allocate(100)
    assert allocator.reserved == 2 * MIB
    allocator.allocate(MIB)  # what is left of the first segment will do
    assert allocator.reserved == 2 * MIB
    allocator.allocate(MIB + 1)
    assert allocator.reserved == 22 * MIB
    large = allocator.allocate(25 * MIB + 1)
    assert allocator.reserved == 48 * MIB
    allocator.free(large)
    assert allocator.allocate(20 * MIB) == large  # cut from the free block
    assert allocator.reserved == 48 * MIB
    allocator.allocate(7 * MIB)  # the rest of 6 MiB is too little, the small segments' 18 MiB are not
    assert allocator.reserved == 48 * MIB
    allocator.free(small)
    assert allocator.allocate(512) == small


def test_free_neighbours_become_one_block():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    assert allocator.reserved == 20 * MIB
    for index in (0, 2, 1):
        allocator.free(blocks[index])
    assert allocator.allocate(12 * MIB) == blocks[0]
    assert allocator.reserved == 20 * MIB
    for block in (blocks[0], blocks[4], blocks[3]):
        allocator.free(block)
    allocator.allocate(20 * MIB - 512)
    assert allocator.reserved == 20 * MIB


@pytest.mark.gpu
def test_the_caching_allocator_is_torchs():
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved()
    generator = torch.Generator().manual_seed(3)
    allocator, alive = CachingAllocator(), []
    for _ in range(400):
        if alive and torch.rand((), generator=generator) < 0.45:
            address, tensor = alive.pop(int(torch.randint(len(alive), (), generator=generator)))
            allocator.free(address)
            del tensor
        else:
            size = int(2 ** (8 + 18 * torch.rand((), generator=generator)))
            alive.append((allocator.allocate(size), torch.empty(size, dtype=torch.uint8, device="cuda")))
    # What the tests before left in cached segments may serve a few of the requests.
    assert torch.cuda.memory_reserved() - start == pytest.approx(allocator.reserved, rel=0.05)


# --- estimates ----------------------------------------------------------------------------------------------


def test_a_half_precision_backbone_needs_half_the_states():
    full, half = (
        estimate(tiny(), "lst", 4, dtype=dtype, device_type="cpu", backend="reference")
        for dtype in ("float32", "bfloat16")
    )
    assert half.contributors[counter.HIDDEN] * 2 == full.contributors[counter.HIDDEN] > 0


def test_mezo_needs_no_gradients_and_no_optimizer_state():
    mezo, full = (estimate(tiny(), method, 8, dtype="float32") for method in ("mezo", "full"))
    assert mezo.contributors[counter.GRADIENTS] == mezo.contributors[counter.OPTIMIZER] == 0
    assert mezo.peak < full.peak / 2


def test_every_published_size_is_transformers_own():
    assert set(WHISPER_SIZES) >= {"tiny", "base", "small", "medium", "large-v3"}
    small = whisper_config("openai/whisper-small")
    assert (small.d_model, small.encoder_layers, small.num_mel_bins) == (768, 12, 80)
    counted = estimate("small", "head", 1)
    assert counted.parameters == pytest.approx(88.2e6, rel=0.005)  # the encoder's, and the head


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "smal"}, "model must be one of tiny, .*, got 'smal'"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"method": "mesh"}, "method must be one of .*lst.*, got 'mesh'"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
        ({"autocast": "fp64"}, "autocast must be one of .*, got 'fp64'"),
        ({"device_type": "tpu"}, "device_type must be cpu or cuda, got 'tpu'"),
        ({"backend": "cuda"}, "backend must be one of auto, .*, got 'cuda'"),
        ({"frames": 0}, "frames must be a positive integer, got 0"),
        ({"reduction_factor": 10**6}, "reduction_factor must be at most 768"),
        ({"depth": 3}, "'depth' is not an option of lst"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(UserError, match=message):
        estimate(**arguments)


def test_largest_batch_fits_and_a_larger_one_does_not():
    arguments = {"model": tiny(), "method": "head", "dtype": "float32", "device_type": "cpu"}
    limit = estimate(batch_size=50, **arguments).peak
    batch, counted = largest_batch(limit, **arguments)
    assert 46 <= batch <= 50
    assert counted == estimate(batch_size=batch, **arguments)
    assert largest_batch(1000, **arguments) == (0, None)


def stepwise(asked, monkeypatch):
    """Replaces ``estimate`` by 1 GiB and 1/8 GiB for each clip, in steps of four; notes the batches."""

    def counted(batch_size, saved_activations="exact", chunk_size=4, **_):
        clips = -(-batch_size // chunk_size) * chunk_size
        total = GIB + clips * GIB // (8 if saved_activations == "exact" else 16)
        asked.append(batch_size)
        usage = Usage(total, dict.fromkeys(storage_recorder.CONTRIBUTORS, 0), [])
        return MemoryCount(dict.fromkeys(PHASES, usage), 1, 2, total, 0)

    monkeypatch.setattr(counter, "estimate", counted)


@pytest.mark.parametrize("clips", [0, 1, 2, 3, 7, 12, 36, 100, 333, 512, 900])
def test_largest_batch_takes_few_counts(clips, monkeypatch):
    asked = []
    stepwise(asked, monkeypatch)
    batch, counted = largest_batch(CONTEXT + GIB + clips * GIB // 8)
    fits = clips // 4 * 4  # whole chunks
    assert batch <= min(fits, 512)
    assert batch >= min(fits, 512) * 15 // 16 - 2
    assert (batch == 512) == (fits >= 512)
    assert (counted is None) == (batch == 0)
    assert len(asked) <= 8


@pytest.mark.parametrize("most", [1, 3, 16, 17, 50, 100])
def test_largest_batch_reaches_the_most_where_that_fits(most, monkeypatch):
    stepwise([], monkeypatch)
    assert largest_batch(CONTEXT + GIB + 104 * GIB // 8, most)[0] == most


# --- the commands -------------------------------------------------------------------------------------------


def test_command_says_where_the_memory_goes(capsys):
    assert cli.main(["memory", "--model", "tiny", "--batch", "2", "--method", "unipt"]) == 0
    text = capsys.readouterr().out
    counted = estimate("tiny", "unipt", 2)
    assert f"{counted.peak / GIB:.2f} GiB  most in use at once" in text
    assert f"{(counted.reserved + CONTEXT) / GIB:.2f} GiB  with the CUDA context" in text
    assert "GiB  hidden states" in text and "GiB  backward" in text


def test_command_suggests_what_fits(capsys, monkeypatch):
    stepwise([], monkeypatch)
    assert cli.main(["memory", "--gpu_memory", "3GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "largest batch that fits into 3 GiB (to about 5 %):"
    assert lines[1].split()[:3] == ["11", "as", "given"]
    assert lines[2].split()[:3] == ["24", "with", "--saved_activations"]
    assert "--chunk_size 1" in lines[3]
    assert cli.main(["memory", "--gpu_memory", "1.8GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["none", "as", "given"] and 1 <= int(lines[2].split()[0]) <= 4


def test_command_says_that_its_search_stopped(capsys, monkeypatch):
    stepwise([], monkeypatch)
    assert cli.main(["memory", "--gpu_memory", "40GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 290 <= int(lines[1].split()[0]) <= 308
    assert lines[2].startswith("  at least 512  with --saved_activations int8 (33.50 GiB)")
    assert lines[3] == "The search stops at 512 clips, so more may fit where it says at least."


@pytest.mark.parametrize(
    "method, least",
    [("lst", "1.57 GiB, with --saved_activations int8 --chunk_size 1"), ("head", "2.00 GiB, as given")],
)
@pytest.mark.parametrize(
    "size, text", [("1KiB", "1 KiB"), ("1GiB", "1 GiB"), ("0.5", "512 MiB"), ("0.001K", "1 bytes")]
)
def test_command_refuses_a_card_that_holds_no_clip(size, text, method, least, capsys, monkeypatch):
    stepwise([], monkeypatch)
    assert cli.main(["memory", "--gpu_memory", size, "--method", method]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    assert f"not even one clip fits into {text}; the least that {method} needs is {least}" in captured.err


def test_command_says_whether_a_batch_fits(capsys, monkeypatch, tmp_path):
    tiny().save_pretrained(tmp_path)
    stepwise([], monkeypatch)
    command = ["memory", "--model_name_or_path", str(tmp_path), "--batch", "16", "--gpu_memory"]
    assert cli.main([*command, "3.5GiB"]) == 0
    assert "3.50 GiB fits into 3.5 GiB." in capsys.readouterr().out
    assert cli.main([*command, "3GiB"]) == 0
    assert "3.50 GiB does not fit into 3 GiB." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--gpu_memory", "8QiB"], 2, "--gpu_memory must be a size such as 8GiB or 8192MiB, got '8QiB'"),
        (["--batch", "0"], 2, "--batch must be a positive integer, got 0"),
        (["--bf16", "True", "--fp16", "True"], 2, "--bf16 and --fp16 cannot be given both"),
        (["--gpu_memory", "8GiB", "--device", "cpu"], 2, "--gpu_memory goes with --device cuda"),
        (["--model", "huge"], 1, "model must be one of tiny, "),
        (["--model_name_or_path", "/nowhere/at/all"], 1, "model_name_or_path"),
    ],
)
def test_command_errors_take_one_line(arguments, status, message, capsys):
    assert cli.main(["memory", *arguments]) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "text, size", [("8GiB", 8 * GIB), ("8gb", 8 * GIB), ("1.5", 1.5 * GIB), ("300M", 300 * MIB)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_benchmark_prints_and_records(capsys, tmp_path):
    arguments = ["--model", "tiny", "--batch", "2", "--methods", "lst", "--published", "lst"]
    assert benchmark.main([*arguments, "--micro-batches", "2,1", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    (path,) = tmp_path.glob("memory-*.json")
    figures = json.loads(path.read_text())["figures"]
    assert [(row["method"], row["batch"]) for row in figures[:3]] == [
        ("published lst", 2),
        ("lst exact", 2),
        ("lst fp8", 2),
    ]
    assert len(figures) == 6
    exact = estimate("tiny", "lst", 2, num_labels=benchmark.CLASSES, reduction_factor=8)
    assert figures[1]["peak_gib"] == exact.peak / GIB
    assert f"{figures[0]['peak_gib']:.2f}" in text and "micro-batch" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "lst,nothing"], "--methods must be all, none or some of .*, got 'nothing'"),
        (["--batch", "many"], "--batch must be positive integers with commas between, got 'many'"),
        (["--batch", "4,2"], "--batch must be one number, got '4,2'; --micro-batches takes several"),
        (["--model", "huge"], "model must be one of"),
        (["--backend", "native"], "--backend must be one of auto, reference, triton, got 'native'"),
        (["--methods", "none", "--published", "none"], "--methods, --published and --saved leave nothing to"),
        (["--methods", "lst", "--published", "none", "--saved", "none"], "leave nothing to count"),
        (["--output", __file__], "is not a folder"),
    ],
)
def test_benchmark_errors_take_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", None)  # all is said before anything is counted
    assert benchmark.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
