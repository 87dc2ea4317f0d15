"""Whether a fused kernel may be used on this device: it is tried once, against the reference, before it is.

A kernel on a device that it never ran on, from a compiler that it never met, is a guess. So the first call of
an op with new widths or types runs both kernels on small random inputs and compares them with the reference
in float64. A fused kernel that errs much more than the reference does at the same type, or that fails to
compile or to launch, is left alone for the rest of the process, with one warning. Where memory runs out
during the check nothing is known yet: the reference serves that call, and the next one checks again. The
check costs little beside compiling the kernel, which has to be done anyway.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..reference import common, stand_in

# Arguments with one row per frame; the others have fixed shapes.
_ACTIVATIONS = {"grad", "x", "state", "anchor", "y", "features", "code"}
# More frames than any kernel takes at a time, more rows than any group of partial sums, multiples of neither.
CLIPS, FRAMES = 3, 750
DRAWS = 3
# A fused kernel may err so many times as much as the reference at the same type, more where a result has
# few elements and its error is mostly luck, and beyond that so much of the result's size: a few roundings. In
# fp32 it is more than that, since one ReLU that tips the other way weighs more than all rounding.
_FACTOR, _FACTOR_OF_FEW, _FEW = 4.0, 16.0, 8
_FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-4}
_FLOOR_OF_PARTS = 1e-2  # for the worst row and the worst column
_FLOOR_OF_CODES = 3e-2  # 8-bit codes: a value on the border of two may become either

verdicts: dict[tuple, bool] = {}
# Ops whose check had to wait inside a CUDA graph, so that it holds the reference in their place.
left_unchecked: set[str] = set()
_reasons: dict[tuple, str] = {}  # of the verdicts against a kernel


def refused() -> list[str]:
    """The fused kernels that failed their check in this process, each with what it was compiled for and the
    reason, a line each."""
    lines = []
    for key in (key for key, good in verdicts.items() if not good):
        op, *what = (str(part).removeprefix("torch.") for part in key)
        lines.append(f"{op} ({', '.join(what)}): {_reasons.get(key, 'unknown')}")
    return lines


def _key(op: str, names: Sequence[str], arguments: Sequence) -> tuple:
    """What a kernel is compiled for: widths and types, not how many clips or frames there are."""
    key = [op]
    for name, argument in zip(names, arguments):
        if isinstance(argument, list):
            key += [len(argument), argument[0].dtype, argument[0].shape[-1]]
        elif isinstance(argument, Tensor):
            key += [
                argument.dtype,
                argument.shape[-1:] if name in _ACTIVATIONS else argument.ndim,
                argument.device,
            ]
            if name.startswith("weight"):
                key.append(argument.shape)
        else:
            key.append(argument)
    return tuple(key)


def _trial(names: Sequence[str], arguments: Sequence, seed: int) -> list:
    """Random arguments of the same widths and types for a few clips."""
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    # Drawn on the CPU, the same for every device and whatever torch.set_default_device says.
    how = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}

    def normal(*shape: int, like: Tensor, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = mean + scale * torch.randn(shape, **how)
        return (drawn.clamp(-127, 127) if like.dtype == torch.int8 else drawn).to(device, like.dtype)

    small, rows = [], None
    for name, argument in zip(names, arguments):
        if isinstance(argument, list):
            small.append([normal(CLIPS, FRAMES, t.shape[-1], like=t) for t in argument])
        elif name in ("mean", "rstd") and argument is not None:
            small.append(common.row_statistics(rows)[name == "rstd"])
        elif name == "lengths" and argument is not None:
            small.append(torch.tensor([FRAMES, 33, FRAMES // 2][:CLIPS], dtype=argument.dtype, device=device))
        elif name == "active":
            shape = None if argument is None else (CLIPS * FRAMES, argument.shape[-1])
            bits = None if shape is None else torch.randint(256, shape, **how)
            small.append(bits if bits is None else bits.to(argument.device, argument.dtype))
        elif isinstance(argument, Tensor) and name in _ACTIVATIONS:
            # Squares of codes, times a scale and over an rstd: not beyond half precision.
            scale = 8.0 if argument.dtype == torch.int8 else 1.0
            small.append(normal(CLIPS, FRAMES, argument.shape[-1], like=argument, scale=scale, mean=0.3))
            if name in ("x", "code"):
                rows = small[-1] if name == "x" else small[-1].float()
        elif isinstance(argument, Tensor):
            small.append(normal(*argument.shape, like=argument, scale=max(1, argument.shape[-1]) ** -0.5))
        else:
            small.append(argument)
    return small


def _wide(value):
    """Floating-point tensors, also those in lists, in float64."""
    if isinstance(value, list):
        return [_wide(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _results(kernel: Callable, trial: list) -> list[Tensor]:
    """What a kernel gives, and what it leaves of activations, over which it may write; tensors that were not
    asked for are empty."""
    trial = [[each.clone() for each in given] if isinstance(given, list) else given for given in trial]
    trial = [given.clone() if isinstance(given, Tensor) else given for given in trial]
    result = kernel(*trial)
    left = [each for given in trial for each in (given if isinstance(given, list) else [given])]
    left = [each for each in left if isinstance(each, Tensor) and each.is_floating_point() and each.ndim == 3]
    return [*(result if isinstance(result, (list, tuple)) else [result]), *left]


def _worst(table: Tensor) -> list[Tensor]:
    """Norms of a table as a whole, of its largest row and its largest column: a frame and a channel, where it
    is an activation."""
    return [table.norm(), table.norm(dim=1).max(), table.norm(dim=0).max()]


def complaint(names: Sequence[str], arguments: Sequence, plain: Callable, fused: Callable) -> str | None:
    """What is wrong with ``fused``, or None."""
    draws = []
    for seed in range(DRAWS):
        trial = _trial(names, arguments, seed)
        kernels = ((plain, _wide(trial)), (plain, trial), (fused, trial))
        draws.append([_results(kernel, given) for kernel, given in kernels])
        if [t.shape for t in draws[-1][1]] != [t.shape for t in draws[-1][2]]:
            return "it gives other shapes than the reference"
    kinds = {a.dtype for a in trial if isinstance(a, Tensor) and a.is_floating_point() and a.itemsize > 1}
    rounding = max(_FLOOR.get(kind, 1e-4) for kind in kinds)
    for index, like in enumerate(draws[0][2]):
        if not like.numel():
            continue
        # The draws side by side, as more rows of one table.
        truth, expected, found = (
            torch.cat([draw[which][index].double().reshape(-1, like.shape[-1]) for draw in draws])
            for which in range(3)
        )
        if not torch.isfinite(found).all():
            return f"result {index} is not finite"
        factor = _FACTOR_OF_FEW if like.numel() < _FEW else _FACTOR
        floor = _FLOOR_OF_CODES if like.itemsize == 1 else rounding
        floors = (floor, max(floor, _FLOOR_OF_PARTS), max(floor, _FLOOR_OF_PARTS))
        tables = (truth, expected - truth, found - truth)
        for floor, size, yardstick, error in zip(floors, *map(_worst, tables)):
            if error > factor * yardstick + floor * size:
                off = [f"{(each / size).item():.1e}" for each in (error, yardstick)]
                return f"result {index} is off by {off[0]}, the reference at the same type by {off[1]}"
    return None


def _out_of_memory(error: Exception) -> bool:
    """Whether a device's memory ran out, by PyTorch's word or the driver's; not its shared memory, which is
    the kernel's fault."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def choose(op: str, names: Sequence[str], arguments: Sequence, plain: Callable, fused: Callable) -> Callable:
    """``fused`` where it is as good as ``plain`` on this device at these widths and types, else ``plain``.

    Args:
        op: the op's name, for the warning. names: of ``arguments``, which are those of the call.
        plain, fused: the reference kernel and the one to check; both take ``arguments``.
    """
    if stand_in.active():
        return fused
    key = _key(op, names, arguments)
    verdict = verdicts.get(key)
    if verdict is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            left_unchecked.add(op)
            return plain  # nothing can be compared inside a CUDA graph; the next call outside one can
        with torch.no_grad():
            try:
                wrong = complaint(names, arguments, plain, fused)
            except Exception as error:  # a compiler or driver may fail in any way
                if _out_of_memory(error):
                    return plain
                said = (str(error).strip().splitlines() or [""])[0]
                wrong = f"it failed with {type(error).__name__}: {said}"
        verdict = verdicts[key] = wrong is None
        if wrong is not None:
            _reasons[key] = wrong
            device = next(a for a in arguments if isinstance(a, Tensor)).device
            place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            warnings.warn(
                f"the fused kernel of {op} is not used on this device ({place}): {wrong}; the reference "
                "takes its place",
                stacklevel=2,
            )
    return fused if verdict else plain
