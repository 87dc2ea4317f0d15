"""``python -m benchmarks.launches``: how many kernels a training step launches, counted without a GPU, and
what launching them costs the host.

Counting, the real step runs on tensors of the meta device, which hold nothing, at its real shapes and with
the decisions that a GPU would bring: chunks, blocks of rows, kernels. Counted are ATen's operators, but for
views and empty tensors, which launch nothing, and Triton's launches: those go their whole way through
Triton's host code to a driver that launches nothing. An operator counts once, even where a library launches
two kernels.

"host" is the process-CPU time of a step, the least of several, of a narrow encoder with one frame per clip on
the CPU, which launches as much and computes next to nothing: without oneDNN, and with zeros for
half-precision products that are wanted in fp32. What a driver or cuBLAS would take for a launch is not in it,
nor PyTorch's dispatch of our own operators. ``benchmarks.profiled`` shows what really runs on a GPU.
"""

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperConfig, WhisperForAudioClassification
from whisper_meft import MeftConfig, get_meft_model
from whisper_meft.encoder import chunked, layer
from whisper_meft.encoder.dtypes import parse_dtype
from whisper_meft.encoder.frozen import FrozenEncoder
from whisper_meft.encoder.sizes import WHISPER_SIZES, whisper_config
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable
from whisper_meft.methods.side_networks import SideNetworkConfig
from whisper_meft.model.backbone import quiet_transformers

from meft_kernels import counting, ops
from meft_kernels.ops import backends
from meft_kernels.reference import SAVED_ACTIVATIONS

from . import record

CAPABILITY = (9, 0)
CLASSES = 6
# The encoder's part of the forward, the rest of it with the head and the loss, the backward, the update.
PHASES = ("encoder", "side network", "backward", "optimizer")
REPEATS = 10

# Operators that launch nothing though their schema calls them no views.
_SILENT = {
    "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "promote_types", "split", "split_with_sizes", "squeeze_",
    "transpose_", "unbind", "unsqueeze_", "view_as_real",
}  # fmt: skip


@dataclass
class LaunchCount:
    """What :func:`count_launches` found, by phase (see ``PHASES``).

    Attributes:
        aten, triton: launches by operator and by kernel. host: process-CPU seconds.
    """

    aten: dict[str, Counter] = field(default_factory=lambda: {phase: Counter() for phase in PHASES})
    triton: dict[str, Counter] = field(default_factory=lambda: {phase: Counter() for phase in PHASES})
    host: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def kernels(self, phase: str) -> int:
        """All launches of a phase."""
        return self.aten[phase].total() + self.triton[phase].total()

    @property
    def triton_launches(self) -> int:
        return sum(counted.total() for counted in self.triton.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            phase: {
                "kernels": self.kernels(phase),
                "triton": self.triton[phase].total(),
                "host_seconds": self.host[phase],
            }
            for phase in PHASES
        }


class _Recorder(TorchDispatchMode):
    """Knows which phase runs, what it launches and how long it takes. Entered as a mode it counts ATen's
    operators too, which makes the times meaningless."""

    def __init__(self):
        super().__init__()
        self.count = LaunchCount()
        self.phase: str | None = None

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The time of a phase inside another one is its own alone."""
        outer, self.phase = self.phase, phase
        start = time.process_time()
        try:
            yield
        finally:
            taken = time.process_time() - start
            self.count.host[phase] += taken
            if outer is not None:
                self.count.host[outer] -= taken
            self.phase = outer

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if self.phase is not None and not function.is_view and name not in _SILENT:
            self.count.aten[self.phase][name] += 1
        return function(*args, **(kwargs or {}))

    def launched(self, kernel: str) -> None:
        if self.phase is not None:
            self.count.triton[self.phase][kernel] += 1


class _Driver:
    """In place of Triton's: a device of a known architecture where launching does nothing."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _launching_nothing(recorder: _Recorder) -> Iterator[None]:
    """Triton takes every kernel for compiled, and its launch for what only counts it."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def compiled(self, key, signature, device, *rest):
        name = self.__name__
        kernel = SimpleNamespace(
            run=lambda *_: recorder.launched(name),
            launch_metadata=lambda *_: None,
            function=None,
            packed_metadata=None,
        )
        self.device_caches[device][0][key] = kernel
        return kernel

    before = driver._active
    driver.set_active(_Driver())
    try:
        with mock.patch.object(JITFunction, "_do_compile", compiled), warnings.catch_warnings():
            # Of Triton 3.9, about what it would compile.
            warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
            yield
    finally:
        driver._active = before
        for function in _jit_functions():
            function.device_caches.clear()


def _jit_functions() -> list:
    from triton.runtime.jit import JITFunction

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("meft_kernels.triton_kernels.")]
    return [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """What PyTorch chooses on a GPU, which it does not on the meta device."""
    if not query.is_meta:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=scale)[0]


def _of_the_cpu(function: Callable) -> Callable:
    """A function of a device's type that does not know the meta device."""

    def call(device_type: str = "cpu", *args, **kwargs):
        return function("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    return call


def _marked(recorder: _Recorder, original: Callable) -> Callable:
    """``FrozenEncoder.stream`` whose work counts as the encoder's."""

    def stream(self, *args, **kwargs):
        states = original(self, *args, **kwargs)
        while True:
            with recorder.during("encoder"):
                state = next(states, None)
            if state is None:
                return
            yield state
            del state

    return stream


def _marked_call(recorder: _Recorder, original: Callable) -> Callable:
    """``FrozenEncoder.last_layer`` likewise, where it is not run again in the backward."""

    def call(self, *args, **kwargs):
        with recorder.during("backward" if recorder.phase == "backward" else "encoder"):
            return original(self, *args, **kwargs)

    return call


@contextlib.contextmanager
def _as_on_a_gpu(recorder: _Recorder) -> Iterator[None]:
    adam = sys.modules[torch.optim.Adam.__module__]

    def kernel(name: str, backend: str | None = None) -> Callable:
        return ops.host_code(name, "auto", "cuda")

    with contextlib.ExitStack() as stack:
        stack.enter_context(counting.standing_for("cuda", CAPABILITY, launching=True))
        stack.enter_context(_launching_nothing(recorder))
        for place, name, replacement in (
            (backends, "kernel", kernel),
            (torch, "autocast", _of_the_cpu(torch.autocast)),
            (torch, "is_autocast_enabled", _of_the_cpu(torch.is_autocast_enabled)),
            (layer, "self_attention", _flash_attention),
            (adam, "_device_dtype_check_for_fused", lambda *_, **__: None),  # it knows no meta
            (FrozenEncoder, "stream", _marked(recorder, FrozenEncoder.stream)),
            (FrozenEncoder, "last_layer", _marked_call(recorder, FrozenEncoder.last_layer)),
        ):
            stack.enter_context(mock.patch.object(place, name, replacement))
        yield


def _step(model: nn.Module, optimizer: Any, given: dict[str, Tensor], recorder: _Recorder) -> None:
    with recorder.during("side network"):
        loss = model(**given).loss
    with recorder.during("backward"):
        loss.backward()
    with recorder.during("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _built(config: WhisperConfig, chosen: MeftConfig, batch: int, dtype: torch.dtype, device: str) -> tuple:
    """Model, optimizer and inputs of a step."""
    with quiet_transformers(), torch.device(device):
        base = WhisperForAudioClassification._from_config(config, dtype=dtype, attn_implementation="sdpa")
        model = get_meft_model(base, chosen)
        shape = batch, config.num_mel_bins, 2 * config.max_source_positions
        given = {"input_features": torch.zeros(shape), "labels": torch.zeros(batch, dtype=torch.long)}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
    return model, optimizer, given


def _widening(multiply: Callable) -> Callable:
    """A matrix product of CPU tensors. Half precision with a result in fp32, which a CPU has not, gives zeros
    in the time of a product of single numbers: PyTorch's own bf16 product would take ten times as long."""
    one = torch.ones((1,) * (2 if multiply is torch.mm else 3))

    def call(a: Tensor, b: Tensor, *args, out_dtype: torch.dtype | None = None, **kwargs):
        if out_dtype is None:
            return multiply(a, b, *args, **kwargs)
        multiply(one, one)
        return a.new_zeros((*a.shape[:-1], b.shape[-1]), dtype=out_dtype)

    return call


@contextlib.contextmanager
def _computing_little(chunk: int, slab: int, part: int | None) -> Iterator[None]:
    """For CPU tensors of one frame in place of many, which come in the same chunks, slabs and parts."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(chunked, "automatic_chunk", lambda *_: chunk))
        stack.enter_context(mock.patch.object(chunked, "automatic_slab", lambda *_: slab))
        stack.enter_context(mock.patch.object(chunked, "automatic_backward_part", lambda *_: part))
        # oneDNN takes longer to look up what it made for a shape than PyTorch for all else around a product.
        stack.callback(torch.backends.mkldnn.set_flags, *torch.backends.mkldnn.set_flags(False)[:1])
        for name in ("mm", "bmm"):
            stack.enter_context(mock.patch.object(torch, name, _widening(getattr(torch, name))))
        yield


def count_launches(
    model: str | WhisperConfig = "small",
    method: str = "lst",
    batch_size: int = 128,
    *,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = REPEATS,
    **options: Any,
) -> LaunchCount:
    """Counts the launches of a training step and times the host.

    Args:
        model: a name in ``WHISPER_SIZES``, or a backbone's config. method: a side network; ``options``: its
            options. batch_size: clips. dtype: of the frozen weights. repeats: steps that are timed.

    Raises:
        UserError: an argument that cannot be used.
    """
    config = whisper_config(model, num_labels=CLASSES)
    chosen = MeftConfig.from_dict({"method": method, **options})
    recorder = _Recorder()
    with _as_on_a_gpu(recorder):
        built = _built(config, chosen, batch_size, dtype, "meta")
        _step(*built, recorder)  # makes the optimizer's state
        recorder.count = counted = LaunchCount()
        with recorder:
            _step(*built, recorder)
        encoder, frames, device = built[0].encoder, config.max_source_positions, torch.device("meta")
        chunk = chunked.automatic_chunk(encoder, frames, device)
        slab = chunked.automatic_slab(built[0].side_network, batch_size, chunk, device)
        part = None
        if chosen.through_last_layer:
            states = torch.empty(frames, encoder.hidden_size, dtype=dtype, device=device)
            part = chunked.automatic_backward_part(encoder, built[0].side_network, batch_size, states)
        narrow = whisper_config(config, frames=1)
        narrow.d_model, narrow.encoder_attention_heads, narrow.encoder_ffn_dim = 16, 2, 16
        narrow.num_mel_bins = 1
        chosen.reduction_factor = 1  # kernels take 16 columns or more
        with _computing_little(chunk, slab, part):
            built = _built(narrow, chosen, batch_size, dtype, "cpu")
            recorder.count = LaunchCount()
            _step(*built, recorder)
            host: list[dict[str, float]] = []
            for _ in range(repeats):
                recorder.count = LaunchCount()
                _step(*built, recorder)
                host.append(recorder.count.host)
    counted.host = {phase: min((each[phase] for each in host), default=0.0) for phase in PHASES}
    return counted


def measure(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """One figure of the record."""
    known = MeftConfig.methods()[method].__dataclass_fields__
    chosen = {"reduction_factor": options.reduction_factor, "saved_activations": options.saved}
    chosen = {name: value for name, value in chosen.items() if name in known}
    dtype = parse_dtype(options.dtype)
    counted = count_launches(options.model, method, options.batch, dtype=dtype, **chosen)
    return {"method": method, "phases": counted.to_dict(), "triton": counted.triton_launches}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Kernels and the host's milliseconds of each phase."""
    header = ["method", *PHASES, "of all, Triton's"]
    cells = [header, ["", *("kernels, host ms" for _ in PHASES), ""]]
    for row in rows:
        phases = [f"{p['kernels']}, {1e3 * p['host_seconds']:.1f}" for p in row["phases"].values()]
        cells.append([row["method"], *phases, str(row["triton"])])
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)).rstrip() for line in cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--model", default="small", help=f"one of {', '.join(WHISPER_SIZES)}")
    parser.add_argument("--batch", type=int, default=128, help="clips per step")
    parser.add_argument("--methods", default="lst,unipt,sherl", help="names with commas between")
    parser.add_argument("--saved", choices=SAVED_ACTIVATIONS, default="exact", help="how states are kept")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights")
    parser.add_argument("--reduction_factor", type=int, default=8, help="of the side networks")
    parser.add_argument("--output", help="folder of a record (default: none is written)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    kinds = MeftConfig.methods()
    known = [name for name, kind in kinds.items() if issubclass(kind, SideNetworkConfig)] + ["head"]
    try:
        methods = options.methods.split(",")
        for name in methods:
            if name not in known:
                raise UserError(f"--methods must be some of {', '.join(known)}, got {name!r}")
        if options.batch < 1:
            raise UserError(f"--batch must be a positive integer, got {options.batch}")
        if not backends.HAS_TRITON:
            raise UserError("the triton package is not installed, whose launches are to be counted")
        if options.output:
            check_writable(Path(options.output) / "launches.json")
        rows = [measure(options, name) for name in methods]
        print(f"whisper-{options.model}, batch {options.batch}, {options.dtype}; launches of a step")
        print(table(rows))
        if options.output:
            path = record.write(
                "launches",
                rows,
                command=" ".join(["python -m benchmarks.launches", *argv]),
                shapes={name: vars(options)[name] for name in ("model", "batch", "dtype", "saved")},
                directory=options.output,
                device="cpu",
            )
            print(f"wrote {os.path.relpath(path)}")
    except UserError as error:
        print(f"benchmarks.launches: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
