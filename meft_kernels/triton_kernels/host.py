"""What launchers share on the host: choosing a row, guarding the device, and products over all frames."""

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..reference import stand_in
from ..reference.common import matmul
from ..tune import choice
from ..tune.row import TORCH_TYPES, Architecture, Row, architecture, architecture_of

POINTERS = {name: f"*{name}" for name in TORCH_TYPES}  # to activations, in Triton's words
ACTIVATION = "activation"  # in a kernel's types, a pointer to the type of the activations
# Long sums are cut into parts that fill so many multiprocessors (an H100's) so many times. The numbers are
# fixed, and not the device's, so that the order of a sum, and with it its bits, is the same on every card.
MULTIPROCESSORS, WAVES = 132, 2
LEAST_ROWS = 128  # of a part of split_product: fewer cost more in partial sums than they gain


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; Triton's ``cdiv`` is written for kernels too and takes microseconds."""
    return -(-a // b)


def row_for(kernel: str, x: Tensor, width: int) -> Row | None:
    """The table's row for a kernel at a width on the device of x, or None where the reference has to serve:
    in float64, and at widths that no row covers."""
    if x.dtype == torch.float64:
        return None
    if stand_in.standing():
        return choice.choose(kernel, width, architecture(stand_in.capability(x.device)))
    where, name = place(x.device)
    # Measured in half precision; with twice the bytes such blocks may be too large.
    return choice.choose(kernel, width, where, None if x.dtype == torch.float32 else name)


@functools.cache
def place(device: torch.device) -> tuple[Architecture, str | None]:
    """Architecture and name of a device, asked for once; off CUDA no name, and Hopper's rows serve."""
    if device.type != "cuda":
        return architecture(None), None
    return architecture_of(device), torch.cuda.get_device_name(device)


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes the device of x current, since Triton launches on the current one. No effect where it is, and off
    CUDA."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


_HERE = nullcontext()


_launched: set[str] | None = None


@contextmanager
def launched() -> Iterator[set[str]]:
    """Collects the names of the kernels that run inside the ``with`` block."""
    global _launched
    before, _launched = _launched, set()
    try:
        yield _launched
    finally:
        _launched = before


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Runs a kernel, but not while memory is counted: then the arguments hold nothing."""
    if _launched is not None:
        _launched.add(kernel.__name__)
    if not stand_in.active():
        kernel[grid](*arguments, **options)


def aligned(x: Tensor, width: int) -> Tensor:
    """x as contiguous rows (N, width) that start at a multiple of 16 bytes, for the widest loads."""
    rows = x.reshape(-1, width).contiguous()
    if stand_in.active():  # an allocation starts at a multiple of 512 bytes
        return rows
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()


def once_per_step(weight: Tensor, dtype: torch.dtype, purpose: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` gives of a weight in another ``dtype`` and of nothing else, made once for all who ask for
    one ``purpose``.

    Kept with the tensor, and only of one that autograd made in this step, such as a folded weight: a
    parameter may be changed in place through ``.data``, which nothing tells.
    """
    if stand_in.active() or weight.is_leaf or weight.dtype == dtype:
        return make()
    key, known = (dtype, purpose, weight._version), weight.__dict__.setdefault("_made_of_it", {})
    if key not in known:
        known[key] = make()
    return known[key]


def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Row statistics (...) as contiguous vectors (N,)."""
    return tuple(tensor.reshape(-1).contiguous() for tensor in tensors)


def split(pieces: int, programs: int = 1, resident: int = 1) -> tuple[int, int]:
    """How a long sum is cut: (pieces per part, parts), for WAVES waves or less than twice as many, where
    there are enough pieces.

    Args:
        pieces: what the sum goes over, such as blocks of rows.
        programs: that work on each part. resident: programs that fit on a multiprocessor at once.
    """
    wanted = max(1, WAVES * MULTIPROCESSORS * resident // programs)
    size = max(1, pieces // wanted)
    return size, ceil_div(pieces, size)


def stacked(tensors: list[Tensor]) -> Tensor:
    """``torch.stack``, without a copy of contiguous tensors that lie one behind the other in one storage."""
    first = tensors[0]
    size, start = first.numel(), first.storage_offset()
    if start * first.itemsize % 16:
        return torch.stack(tensors)
    storage = first.untyped_storage()._cdata
    for index, tensor in enumerate(tensors):
        beside = tensor.untyped_storage()._cdata == storage and tensor.is_contiguous()
        if not beside or tensor.shape != first.shape or tensor.storage_offset() != start + index * size:
            return torch.stack(tensors)
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def split_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a.T @ b`` in fp32 for rows a (N, m) and b (N, n): a weight gradient.

    The sum over N is long and the result small, so it is cut into groups of rows whose partial products,
    in tiles of 128 x 128, fill the GPU and are then added up in a fixed order. The partials are written and
    read, about WAVES * MULTIPROCESSORS tiles of 64 KB: 17 MB each way.
    """
    rows = a.shape[0]
    size = _rows_per_part(rows, ceil_div(a.shape[1], 128) * ceil_div(b.shape[1], 128))
    whole = rows // size * size
    if whole == 0:
        return matmul(a.T, b, dtype)
    parts = [each if whole == rows else each[:whole] for each in (a, b)]
    left, right = (each.view(-1, size, each.shape[1]) for each in parts)
    total = matmul(left.mT, right, dtype).sum(0)
    return total if whole == rows else total.add_(matmul(a[whole:].T, b[whole:], dtype))


@functools.cache
def _rows_per_part(rows: int, tiles: int) -> int:
    """Of a product over ``rows`` with so many tiles: a multiple of 8, so that parts start at multiples of 16
    bytes, that leaves no rest where a few parts less do."""
    size = max(LEAST_ROWS, split(rows, tiles)[0] // 8 * 8)
    for parts in range(rows // size, 3 * rows // (4 * size), -1):
        if rows % (8 * parts) == 0:
            return rows // parts
    return size


def pointer_types(types: dict[str, str], dtype: str) -> dict[str, str]:
    """A kernel's types, by argument, for activations of ``dtype``."""
    return {name: POINTERS[dtype] if kind is ACTIVATION else kind for name, kind in types.items()}


def compile_arguments(function, types: dict, constants: dict) -> tuple:
    """(function, signature, constexprs, attributes) for ``triton.compile``: every pointer at a multiple of 16
    bytes, as in a launch."""
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    constexprs = {(function.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {}
    for name, kind in types.items():
        index = function.arg_names.index(name)
        paths = [(index, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(index,)]
        if "*" in kind[0]:
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    return function, {name: signature[name] for name in function.arg_names}, constexprs, attributes
