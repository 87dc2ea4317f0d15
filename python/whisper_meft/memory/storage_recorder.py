"""A dispatch mode that sees every storage come and go, and what stands for a GPU while there is none.

What an operator returns is counted from its storage. Our own ops are looked into: their host code runs under
the recorder, so that the workspace of a kernel is what the code that launches it allocates.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from meft_kernels import counting

from ..encoder.quantization import is_in_pieces, pieces
from .caching_allocator import CachingAllocator

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
class _Trace:
    """What one call of an op did: the storages it made, events as in ``StorageRecorder`` with numbers from 0,
    and its outputs as (storage or None, shape, stride, offset, dtype)."""

    kind: type
    storages: list[_Storage]
    events: list[int]
    outputs: list[tuple]


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
        self._traces: dict[tuple, _Trace | None] = {}
        self._events: list[int] = []  # number of a storage made, or its complement when it is freed

    def start(self, phase: str) -> None:
        """Says that what follows belongs to ``phase``."""
        self.phase_starts.append((phase, len(self._events)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        kernel = counting.host_code(function, self._backend, self._device_type)
        if kernel is not None:
            return self._own_op(function, kernel, args)
        result = function(*args, **kwargs)
        if name == "native_layer_norm" and self._device_type == "cuda":
            # CUDA keeps the statistics in float32, which the CPU does not.
            result = (result[0], *(each.float() for each in result[1:]))
        self._note_all(result, name)
        if self._device_type == "cuda" and name in _WORKSPACES:
            nbytes = _WORKSPACES[name](*args)
            self._events += [self._add(nbytes, name, (nbytes,), torch.uint8), ~(len(self.storages) - 1)]
        return result

    def _own_op(self, function, kernel: Callable, args: tuple) -> Any:
        """Runs one of our ops under the recorder. On fake tensors what it allocates depends on its arguments'
        shapes alone: a second call with the same ones repeats the events of the first."""
        key = (function, *map(_signature, args)) if any(isinstance(a, FakeTensor) for a in args) else None
        if self._traces.get(key) is not None:
            return self._repeat(self._traces[key])
        events, storages = len(self._events), len(self.storages)
        with self:
            result = kernel(*args)
        self._note_all(result, function._schema.name)
        if key is not None:
            self._traces[key] = self._trace(result, events, storages)
        return result

    def _trace(self, result: Any, first_event: int, first_storage: int) -> _Trace | None:
        outputs = []
        for tensor in [result] if isinstance(result, Tensor) else result:
            number = self._alive.get(tensor.untyped_storage()._cdata)
            if number is not None and number < first_storage:
                return None  # an argument handed back
            layout = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)
            outputs.append((None if number is None else number - first_storage, *layout))
        # A number below the first is that of a foreign storage in a reference cycle, collected by chance.
        events = [
            event - first_storage if event >= 0 else event + first_storage
            for event in self._events[first_event:]
            if (event if event >= 0 else ~event) >= first_storage
        ]
        storages = self.storages[first_storage:]
        return _Trace(type(result), storages, events, outputs)

    def _repeat(self, trace: _Trace) -> Any:
        # The recorder is not entered here: what is made is entered by hand, in the order of the first call.
        bases: dict[int, Tensor] = {}
        outputs = []
        for local, shape, stride, offset, dtype in trace.outputs:
            if local is None:  # an empty tensor
                outputs.append(torch.empty_strided(shape, stride, dtype=dtype))
                continue
            if local not in bases:
                bases[local] = torch.empty(trace.storages[local].nbytes // dtype.itemsize, dtype=dtype)
            outputs.append(torch.as_strided(bases[local], shape, stride, offset))
        first = len(self.storages)
        self.storages += [replace(storage) for storage in trace.storages]
        for event in trace.events:
            self._events.append(event + first if event >= 0 else event - first)
            if event in bases:
                self._follow(bases[event].untyped_storage(), event + first)
        return outputs[0] if issubclass(trace.kind, Tensor) else trace.kind(outputs)

    def _note_all(self, result: Any, operator: str) -> None:
        if isinstance(result, Tensor):
            self._note(result, operator)
        elif isinstance(result, (tuple, list)):
            for each in tree_leaves(result):
                if isinstance(each, Tensor):
                    self._note(each, operator)

    def _add(self, nbytes: int, operator: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        nbytes = -(-nbytes // self._granularity) * self._granularity
        self.storages.append(_Storage(nbytes, operator, shape, dtype, torch.is_grad_enabled()))
        return len(self.storages) - 1

    def _note(self, tensor: Tensor, operator: str) -> None:
        if is_in_pieces(tensor):  # its own storage is a name; the pieces were made by operators of their own
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive or not storage.nbytes():
            return
        number = self._add(storage.nbytes(), operator, tuple(tensor.shape), tensor.dtype)
        self._events.append(number)
        self._follow(storage, number)

    def _follow(self, storage: torch.UntypedStorage, number: int) -> None:
        self._alive[storage._cdata] = number
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, address: int) -> None:
        self._events.append(~self._alive.pop(address))

    def alive(self) -> list[_Storage]:
        """The storages that are alive now."""
        return [self.storages[number] for number in self._alive.values()]

    def assign(self, contributor: str, tensors: Any) -> None:
        """Says what tensors are for, wherever they are still counted as transient."""
        given = [tensor for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)]
        for tensor in (piece for each in given for piece in pieces(each)):
            number = self._alive.get(tensor.untyped_storage()._cdata)
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

    def reserved(self) -> int:
        """Bytes that torch's CUDA allocator takes from the card to serve all that was recorded."""
        allocator, addresses = CachingAllocator(), {}
        for event in self._events:
            if event >= 0:
                addresses[event] = allocator.allocate(self.storages[event].nbytes)
            else:
                allocator.free(addresses.pop(~event))
        return allocator.reserved

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


def _signature(value: Any) -> Any:
    """All of an argument that what an op allocates can depend on, hashable."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(map(_signature, value)) if isinstance(value, (list, tuple)) else value


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

    widen_inputs = _names(
        "layer_norm", "group_norm", "cross_entropy", "nll_loss", "mse_loss", "norm", "exp", "log", "pow",
        "rsqrt", "reciprocal", "softplus", "cosine_similarity",
    )  # fmt: skip
    widen_output = _names("softmax", "log_softmax", "sum", "prod", "cumsum")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if function in self.widen_inputs:
                args, kwargs = tree_map(_widened, (args, kwargs))
            elif function in self.widen_output and _is_half(args[0]):
                kwargs = {"dtype": torch.float32, **kwargs}
        return function(*args, **kwargs)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _widened(value: Any) -> Any:
    return value.float() if _is_half(value) else value


def _convert(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of ``nn.Module._apply``, behind ``Module.to`` and the like, which swaps what a parameter holds
    and cannot for a fake one: here it gets a new parameter, where the conversion changes anything."""
    for child in module.children() if recurse else ():
        _convert(child, convert)
    for name, parameter in module._parameters.items():
        converted = parameter if parameter is None else convert(parameter.detach())
        if parameter is not None and (converted.dtype, converted.device) != (
            parameter.dtype,
            parameter.device,
        ):
            module._parameters[name] = nn.Parameter(converted, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else convert(buffer)
    return module


@contextmanager
def _convertible_modules() -> Iterator[None]:
    original, nn.Module._apply = nn.Module._apply, _convert
    try:
        yield
    finally:
        nn.Module._apply = original


@contextmanager
def standing_for(device_type: str, capability: tuple[int, int] | None) -> Iterator[None]:
    """Fake tensors, and CUDA's rules where they stand for a GPU's."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_convertible_modules())
        stack.enter_context(counting.standing_for(device_type, capability))
        if device_type == "cuda":
            stack.enter_context(_CudaAutocastRules())
        yield
