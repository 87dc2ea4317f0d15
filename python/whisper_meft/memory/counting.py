"""How much memory a training step takes, counted before anything is trained.

The real step (forward with labels, backward, optimizer) runs on fake tensors, which have shapes and hold
nothing, under a dispatch mode that sees every storage come and go. Nothing is estimated by formula: what an
operator returns is counted from its shape, what our own ops allocate inside is counted by running their host
code, and a kernel's launch is all that is left out. It takes seconds and no GPU.

For a GPU, fake CPU tensors stand for CUDA ones, and the rules that differ are followed: what autocast casts
to float32 there, attention's workspace, the allocator's granularity, and which kernels our ops use.

Two figures come out. ``peak`` is what is alive at once, ``torch.cuda.max_memory_allocated()``; ``reserved``
is what the allocator takes from the card for it, its rules being followed, ``max_memory_reserved()``. Not
counted: the CUDA context with its loaded kernels (about half a GiB), and the workspaces of cuBLAS and cuDNN.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForAudioClassification, WhisperForConditionalGeneration

import meft_kernels
from meft_kernels import counting
from meft_kernels.reference.eight_bit import CODE_DTYPES

from ..encoder.dtypes import parse_dtype
from ..encoder.sizes import whisper_config
from ..errors import UserError
from ..methods import MeftConfig
from ..model.backbone import quiet_transformers
from ..model.module import get_meft_model
from .storage_recorder import (
    BACKBONE,
    GRADIENTS,
    HIDDEN,
    INPUTS,
    OPTIMIZER,
    SAVED,
    TRAINABLE,
    TRANSIENT,
    StorageRecorder,
    Usage,
    standing_for,
)

GIB = 2**30

CONTEXT = GIB // 2  # what a CUDA context and its loaded kernels take beside the allocator

PHASES = ("load", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class MemoryCount:
    """What :func:`count_step` found.

    Attributes:
        phases: usage by phase: ``load`` (the model as built), ``forward``, ``backward``, ``optimizer``. The
            optimizer's state exists from the start, as from the second step on.
        trainable_parameters, parameters: their numbers.
        reserved: bytes that the CUDA allocator takes from the card, or the peak off CUDA.
        left_alive: bytes that are alive after the step beyond weights, optimizer state and inputs.
    """

    phases: dict[str, Usage]
    trainable_parameters: int
    parameters: int
    reserved: int
    left_alive: int

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].total)

    @property
    def peak(self) -> int:
        """The most bytes that are alive at once."""
        return self.phases[self.peak_phase].total

    @property
    def contributors(self) -> dict[str, int]:
        """Bytes by contributor at the peak."""
        return self.phases[self.peak_phase].contributors

    def to_dict(self) -> dict[str, Any]:
        """The figures in GiB, as plain values."""
        return {
            "peak_gib": self.peak / GIB,
            "reserved_gib": self.reserved / GIB,
            "peak_phase": self.peak_phase,
            "phases_gib": {phase: usage.total / GIB for phase, usage in self.phases.items()},
            "contributors_gib": {name: nbytes / GIB for name, nbytes in self.contributors.items()},
            "trainable_parameters": self.trainable_parameters,
            "parameters": self.parameters,
        }


def count_step(
    build: Callable[[], nn.Module],
    inputs: Callable[[], dict[str, Tensor]],
    *,
    hidden_size: int | None = None,
    device_type: str = "cuda",
    capability: tuple[int, int] | None = (9, 0),
    backend: str = "auto",
    autocast: torch.dtype | None = None,
    gradients: bool = True,
    fake: bool = True,
) -> MemoryCount:
    """Runs one training step and counts what is alive at its peak.

    Args:
        build: makes the model, which returns an output with ``loss`` from ``inputs``.
        inputs: makes the keyword arguments of the model's forward.
        hidden_size: the backbone's width: saved tensors that wide which no gradient led to are its hidden
            states.
        device_type: ``"cuda"`` or ``"cpu"``: where the step is to run. capability: of that GPU.
        backend: of our ops there, see ``meft_kernels.use_backend``.
        autocast: autocast's type in the forward, or None without.
        gradients: whether the step has a backward and Adam; without it only measures the loss, as MeZO does.
        fake: run on fake tensors; otherwise on real ones on the CPU, which takes as long as it takes and
            counts the same.

    Returns:
        The peaks. The optimizer is Adam in torch's fused form, Trainer's default; its state is there from the
        start.
    """
    recorder = StorageRecorder(device_type, backend)
    capability = capability if device_type == "cuda" else None
    place = standing_for(device_type, capability) if fake else nullcontext()
    with place, counting.assume_backend(backend), recorder:
        recorder.start("load")
        model = build()
        trainable = [p for p in model.parameters() if p.requires_grad]
        recorder.assign(TRAINABLE, trainable)
        recorder.assign(BACKBONE, [list(model.parameters()), list(model.buffers())])
        recorder.start("before")
        optimizer = torch.optim.Adam(trainable, lr=1e-4, fused=True) if gradients else None
        if gradients:
            for parameter in trainable:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recorder.assign(OPTIMIZER, [list(state.values()) for state in optimizer.state.values()])
        given = inputs()
        recorder.assign(INPUTS, given)

        recorder.start("forward")
        context = torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext()
        with context, torch.set_grad_enabled(gradients):
            loss = model(**given).loss
        for storage in recorder.alive():
            if storage.contributor == TRANSIENT:
                is_wide = bool(storage.shape) and storage.shape[-1] == hidden_size
                is_code = storage.dtype in CODE_DTYPES.values()
                hidden = is_wide and (is_code or not storage.under_grad)
                storage.contributor = HIDDEN if hidden else SAVED
        recorder.start("backward")
        if gradients:
            loss.backward()
        recorder.assign(GRADIENTS, [p.grad for p in trainable if p.grad is not None])
        recorder.start("optimizer")
        del loss
        if gradients:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            for parameter in trainable:  # a random direction, drawn anew for each
                torch.randn_like(parameter)
        kept = (BACKBONE, TRAINABLE, OPTIMIZER, INPUTS)
        left = sum(s.nbytes for s in recorder.alive() if s.contributor not in kept)
        usage = recorder.usage()
        numbers = sum(p.numel() for p in trainable), sum(p.numel() for p in model.parameters())
    count = MemoryCount({phase: usage[phase] for phase in PHASES}, *numbers, 0, left)
    return replace(count, reserved=recorder.reserved() if device_type == "cuda" else count.peak)


def estimate(
    model: str | WhisperConfig = "small",
    method: str = "lst",
    batch_size: int = 16,
    *,
    dtype: str | torch.dtype = "bfloat16",
    autocast: str | torch.dtype | None = None,
    frames: int | None = None,
    num_labels: int = 2,
    task: str = "classify",
    tokens: int = 64,
    device_type: str = "cuda",
    capability: tuple[int, int] = (9, 0),
    backend: str = "auto",
    **options: Any,
) -> MemoryCount:
    """Counts a training step of a method on a Whisper of the given sizes. Downloads nothing.

    Args:
        model: a name in ``WHISPER_SIZES``, or a backbone's config.
        method: ``"lst"``, ``"lora"``, ...; ``options``: its options, as ``MeftConfig.from_dict`` takes them.
        batch_size: clips. frames: encoder frames (20 ms) of the backbone's window, default its own.
        dtype: number format of the frozen weights; weights that train are float32.
        autocast: what the step runs under: None, ``"bfloat16"`` or ``"float16"`` (``--bf16``, ``--fp16``).
        num_labels: classes. task: ``"classify"`` or ``"transcribe"``; tokens: that the decoder then reads of
            every clip, prompt and padding included.
        device_type, capability, backend: see :func:`count_step`.

    Raises:
        UserError: an argument that cannot be used.
    """
    if task not in ("classify", "transcribe"):
        raise UserError(f"task must be classify or transcribe, got {task!r}")
    transcribes = task == "transcribe"
    config = whisper_config(model, num_labels=num_labels, frames=frames, decoder=transcribes)
    for name, value in (("batch_size", batch_size), ("num_labels", num_labels), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} must be a positive integer, got {value!r}")
    if device_type not in ("cpu", "cuda"):
        raise UserError(f"device_type must be cpu or cuda, got {device_type!r}")
    if backend not in meft_kernels.ops.BACKENDS:
        raise UserError(f"backend must be one of {', '.join(meft_kernels.ops.BACKENDS)}, got {backend!r}")
    method_config = MeftConfig.from_dict({"method": method, **options})
    weights = parse_dtype(dtype) or torch.float32
    if method_config.trains_backbone:
        weights = torch.float32

    if transcribes and tokens > config.max_target_positions:
        raise UserError(f"tokens must be at most {config.max_target_positions}, the decoder's, got {tokens}")
    kind = WhisperForConditionalGeneration if transcribes else WhisperForAudioClassification

    def build() -> nn.Module:
        return get_meft_model(kind._from_config(config, dtype=weights), method_config)

    def inputs() -> dict[str, Tensor]:
        shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        labels = (batch_size, tokens) if transcribes else (batch_size,)
        given = {"input_features": torch.zeros(shape), "labels": torch.zeros(labels, dtype=torch.long)}
        if transcribes:
            return given | {"decoder_input_ids": torch.zeros(labels, dtype=torch.long)}
        if method_config.max_frames != "fidelity":
            given["attention_mask"] = torch.ones(shape[0], shape[2], dtype=torch.long)
        return given

    with quiet_transformers():
        return count_step(
            build,
            inputs,
            hidden_size=config.d_model,
            device_type=device_type,
            capability=capability,
            backend=backend,
            autocast=parse_dtype(autocast, "autocast"),
            gradients=method != "mezo",
        )


MOST = 512  # clips: where a search for the largest batch stops


def largest_batch(limit: int, most: int = MOST, **arguments: Any) -> tuple[int, MemoryCount | None]:
    """The largest batch whose training step fits, to a few per cent, and its count.

    Args:
        limit: bytes of the device, of which a CUDA context takes ``CONTEXT``.
        most: where to stop looking.
        arguments: of :func:`estimate`, without ``batch_size``.

    Returns:
        Clips and their count; ``most`` itself where that fits; 0 and None where not even one clip fits.
    """
    counts: dict[int, MemoryCount] = {}
    room = limit - (CONTEXT if arguments.get("device_type", "cuda") == "cuda" else 0)

    def fits(batch: int) -> bool:
        counts[batch] = estimate(batch_size=batch, **arguments)
        return counts[batch].reserved <= room

    if not fits(1):
        return 0, None
    low, high = 1, most + 1  # low fits, high does not
    guess = min(most, 16)
    while high - low > 1 + low // 16:
        low, high = (guess, high) if fits(guess) else (low, guess)
        if len(counts) == 2 and 3 * guess < high:  # two points far enough apart to see what a clip takes
            guess *= 3
            continue
        first, last = sorted(counts)[min(1, len(counts) - 2)], max(counts)
        slope = max(1, (counts[last].reserved - counts[first].reserved) // (last - first))
        reach = low + (room - counts[low].reserved) // slope
        if reach >= most and most not in counts:
            guess = most
            continue
        if reach - low <= 1 + low // 16:
            break
        # Chunks make steps: a little less than the line says, so that it fits at the first try.
        guess = reach - reach // 64
        if not low < guess < high:
            guess = (low + high) // 2
    if 0 < most - low <= 1 + low // 16 and most not in counts and fits(most):
        low = most
    return low, counts[low]
