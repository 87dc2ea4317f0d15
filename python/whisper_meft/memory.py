"""How much memory a training step takes, counted before anything is trained.

The real step (forward with labels, backward, optimizer) runs on fake tensors, which have shapes and hold
nothing, under a dispatch mode that sees every storage come and go. Nothing is estimated by formula: what an
operator returns is counted from its shape, what our own ops allocate inside is counted by running their host
code, and a kernel's launch is all that is left out. It takes seconds and no GPU.

For a GPU, fake CPU tensors stand for CUDA ones, and the rules that differ are followed: what autocast casts
to float32 there, attention's workspace, the allocator's granularity, and which kernels our ops use.

Not counted: the CUDA context and loaded kernels (0.3 to 0.6 GiB, outside the allocator), workspaces of cuBLAS
and cuDNN (usually 8 to 100 MiB), and blocks that the allocator holds but cannot use.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from meft_kernels import counting

GIB = 2**30
PHASES = ("load", "forward", "backward", "optimizer")
BACKBONE, TRAINABLE = "backbone weights", "trainable weights"
OPTIMIZER, GRADIENTS = "optimizer state", "gradients"
HIDDEN, SAVED = "hidden states", "side states and other saved activations"
INPUTS, TRANSIENT = "input features", "transients and workspace"
CONTRIBUTORS = (BACKBONE, TRAINABLE, OPTIMIZER, GRADIENTS, HIDDEN, SAVED, INPUTS, TRANSIENT)

_GRANULARITY = {"cpu": 1, "cuda": 512}  # bytes that the allocator rounds up to


@dataclass(slots=True)
class _Storage:
    """One allocation. ``operator`` made it, with ``shape`` and ``dtype`` as first seen."""

    nbytes: int
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    under_grad: bool
    contributor: str = TRANSIENT


@dataclass(frozen=True)
class Usage:
    """Live bytes at the peak of a phase.

    Attributes:
        total: bytes. contributors: bytes by contributor, see ``CONTRIBUTORS``.
        largest: the largest transients, as (bytes, description).
    """

    total: int
    contributors: dict[str, int]
    largest: list[tuple[int, str]]


@dataclass(frozen=True)
class MemoryCount:
    """What :func:`count_step` found.

    Attributes:
        phases: usage by phase: ``load`` (the model as built), ``forward``, ``backward``, ``optimizer``. The
            optimizer's state exists from the start, as from the second step on.
        trainable_parameters, parameters: their numbers.
        left_alive: bytes that are alive after the step beyond weights, optimizer state and inputs.
    """

    phases: dict[str, Usage]
    trainable_parameters: int
    parameters: int
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
            "peak_phase": self.peak_phase,
            "phases_gib": {phase: usage.total / GIB for phase, usage in self.phases.items()},
            "contributors_gib": {name: nbytes / GIB for name, nbytes in self.contributors.items()},
            "trainable_parameters": self.trainable_parameters,
            "parameters": self.parameters,
        }


class StorageRecorder(TorchDispatchMode):
    """Records every storage that operators make and when each is freed; views count once.

    Works on real tensors as on fake ones (entered inside a ``FakeTensorMode``). Our own ops are looked into:
    their host code runs under the recorder.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``, where the tensors are or what they stand for.
        backend: of our ops, see ``meft_kernels.use_backend``.
    """

    def __init__(self, device_type: str = "cpu", backend: str = "auto"):
        super().__init__()
        self.storages: list[_Storage] = []
        self.phase_starts: list[tuple[str, int]] = []
        self._device_type, self._backend = device_type, backend
        self._granularity = _GRANULARITY[device_type]
        self._alive: dict[int, int] = {}  # address of the storage -> its number
        self._events: list[int] = []  # number of a storage made, or its complement when it is freed

    def start(self, phase: str) -> None:
        """Says that what follows belongs to ``phase``."""
        self.phase_starts.append((phase, len(self._events)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        kernel = counting.host_code(function, self._backend, self._device_type)
        if kernel is None:
            result = function(*args, **kwargs)
        else:
            with self:
                result = kernel(*args, **kwargs)
        if isinstance(result, Tensor):
            self._note(result, name)
        elif isinstance(result, (tuple, list)):
            for each in tree_leaves(result):
                if isinstance(each, Tensor):
                    self._note(each, name)
        if self._device_type == "cuda" and name in _WORKSPACES:
            nbytes = _WORKSPACES[name](*args)
            self._events += [self._add(nbytes, name, (nbytes,), torch.uint8), ~(len(self.storages) - 1)]
        return result

    def _add(self, nbytes: int, operator: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        nbytes = -(-nbytes // self._granularity) * self._granularity
        self.storages.append(_Storage(nbytes, operator, shape, dtype, torch.is_grad_enabled()))
        return len(self.storages) - 1

    def _note(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive or not storage.nbytes():
            return
        number = self._add(storage.nbytes(), operator, tuple(tensor.shape), tensor.dtype)
        self._alive[address] = number
        self._events.append(number)
        weakref.finalize(storage, self._free, address).atexit = False

    def _free(self, address: int) -> None:
        self._events.append(~self._alive.pop(address))

    def alive(self) -> list[_Storage]:
        """The storages that are alive now."""
        return [self.storages[number] for number in self._alive.values()]

    def assign(self, contributor: str, tensors: Any) -> None:
        """Says what tensors are for, wherever they are still counted as transient."""
        for tensor in tree_leaves(tensors):
            number = self._alive.get(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else None
            if number is not None and self.storages[number].contributor == TRANSIENT:
                self.storages[number].contributor = contributor

    def usage(self) -> dict[str, Usage]:
        """Peak of every phase, and what was alive there."""
        peaks = {}
        ends = [start for _, start in self.phase_starts[1:]] + [len(self._events)]
        live: set[int] = set()
        total = position = 0
        for (phase, start), end in zip(self.phase_starts, ends):
            at, best, snapshot_total = start, -1, total
            # Two passes: where the peak is, then what is alive there.
            for index in range(start, end):
                event = self._events[index]
                total += self.storages[event].nbytes if event >= 0 else -self.storages[~event].nbytes
                if total > best:
                    best, at = total, index + 1
            if snapshot_total >= best:
                best, at = snapshot_total, start
            while position < end:
                if position == at:
                    peaks[phase] = self._snapshot(best, live)
                event = self._events[position]
                live.add(event) if event >= 0 else live.remove(~event)
                position += 1
            if at == end:
                peaks[phase] = self._snapshot(best, live)
        return peaks

    def _snapshot(self, total: int, live: set[int]) -> Usage:
        by_contributor = dict.fromkeys(CONTRIBUTORS, 0)
        transients: Counter = Counter()
        counts: Counter = Counter()
        for number in live:
            storage = self.storages[number]
            by_contributor[storage.contributor] += storage.nbytes
            if storage.contributor == TRANSIENT:
                dtype = str(storage.dtype).removeprefix("torch.")
                text = f"{storage.operator} {tuple(storage.shape)} {dtype}"
                transients[text] += storage.nbytes
                counts[text] += 1
        largest = [(nbytes, f"{counts[text]} x {text}") for text, nbytes in transients.most_common(8)]
        return Usage(total, by_contributor, largest)


def _flash_backward_workspace(grad: Tensor, query: Tensor, *_) -> int:
    """What CUDA's flash attention allocates in its backward: query gradients and row sums in float32."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return 0
    batch, heads, frames, size = query.shape
    rounded, width = -(-frames // 128) * 128, -(-size // 32) * 32
    return batch * heads * rounded * (width + 1) * 4


_WORKSPACES = {"_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward_workspace}


def _names(*functions: str) -> set:
    """The functions of these names in all the places that Python code calls them from."""
    places = (torch, torch.nn.functional, Tensor)
    return {getattr(place, name) for name in functions for place in places if hasattr(place, name)}


class _CudaAutocastRules(TorchFunctionMode):
    """Adds to the CPU's autocast what CUDA's runs in float32."""

    functions = _names(
        "layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss", "norm",
        "sum", "prod", "cumsum", "exp", "log", "pow", "rsqrt", "reciprocal", "softplus", "cosine_similarity",
    )  # fmt: skip

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.functions and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
        return function(*args, **kwargs)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


@contextmanager
def _standing_for(device_type: str, capability: tuple[int, int] | None) -> Iterator[None]:
    """Fake tensors, and CUDA's rules where they stand for a GPU's."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(counting.standing_for(device_type, capability))
        if device_type == "cuda":
            stack.enter_context(_CudaAutocastRules())
        yield


def count_step(
    build: Callable[[], nn.Module],
    inputs: Callable[[], dict[str, Tensor]],
    *,
    hidden_size: int | None = None,
    device_type: str = "cuda",
    capability: tuple[int, int] | None = (9, 0),
    backend: str = "auto",
    autocast: torch.dtype | None = None,
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
        fake: run on fake tensors; otherwise on real ones on the CPU, which takes as long as it takes and
            counts the same.

    Returns:
        The peaks. The optimizer is Adam in torch's fused form, Trainer's default; its state is there from the
        start.
    """
    recorder = StorageRecorder(device_type, backend)
    place = (
        _standing_for(device_type, capability if device_type == "cuda" else None) if fake else nullcontext()
    )
    with place, recorder:
        recorder.start("load")
        model = build()
        trainable = [p for p in model.parameters() if p.requires_grad]
        recorder.assign(TRAINABLE, trainable)
        recorder.assign(BACKBONE, [list(model.parameters()), list(model.buffers())])
        recorder.start("before")
        optimizer = torch.optim.Adam(trainable, lr=1e-4, fused=True)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.assign(OPTIMIZER, [list(state.values()) for state in optimizer.state.values()])
        given = inputs()
        recorder.assign(INPUTS, given)

        recorder.start("forward")
        context = torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext()
        with context:
            loss = model(**given).loss
        for storage in recorder.alive():
            if storage.contributor == TRANSIENT:
                is_wide = bool(storage.shape) and storage.shape[-1] == hidden_size
                is_code = storage.dtype.itemsize == 1 and storage.dtype.is_floating_point
                hidden = is_wide and (is_code or not storage.under_grad)
                storage.contributor = HIDDEN if hidden else SAVED
        recorder.start("backward")
        loss.backward()
        recorder.assign(GRADIENTS, [p.grad for p in trainable if p.grad is not None])
        recorder.start("optimizer")
        del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept = (BACKBONE, TRAINABLE, OPTIMIZER, INPUTS)
        left = sum(s.nbytes for s in recorder.alive() if s.contributor not in kept)
        usage = recorder.usage()
        numbers = sum(p.numel() for p in trainable), sum(p.numel() for p in model.parameters())
    return MemoryCount({phase: usage[phase] for phase in PHASES}, *numbers, left)
