"""Whether a fused kernel may be used on this device: it is tried once, against the reference, before it is.

A kernel on a device that it never ran on, from a compiler that it never met, is a guess. So the first call of
an op with new widths or types runs both kernels on small random inputs and compares them with the reference
in float64. A fused kernel that errs much more than the reference does at the same type, or that fails to
compile or to launch, is left alone for the rest of the process, with one warning. The check costs little
beside compiling the kernel, which has to be done anyway.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference import common, stand_in

# Arguments with one row per frame; the others have fixed shapes.
_ACTIVATIONS = {"grad", "x", "state", "anchor", "y", "features", "code"}
_CLIPS, _FRAMES = 2, 70  # more than a block of frames and not a multiple of one
_FACTOR, _ROUNDINGS = 4.0, 16.0

_verdicts: dict[tuple, bool] = {}


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


def _small(names: Sequence[str], arguments: Sequence) -> list:
    """Random arguments of the same widths and types for a few frames."""
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, like: Tensor, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=generator)).to(device, like.dtype)

    small, rows = [], None
    for name, argument in zip(names, arguments):
        if isinstance(argument, list):
            small.append([normal(_CLIPS, _FRAMES, t.shape[-1], like=t) for t in argument])
        elif name in ("mean", "rstd") and argument is not None:
            small.append(common.row_statistics(rows)[name == "rstd"])
        elif name == "lengths" and argument is not None:
            small.append(torch.tensor([_FRAMES, 33], dtype=argument.dtype, device=device))
        elif name == "active":
            small.append(None)  # bits of rows that are not here; the reference serves them in any case
        elif isinstance(argument, Tensor) and name in _ACTIVATIONS:
            small.append(normal(_CLIPS, _FRAMES, argument.shape[-1], like=argument, mean=0.3))
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


def _joined(result) -> list[Tensor]:
    """Results as float64 vectors. Scalars, whose error is mostly luck, join the tensor before them."""
    vectors: list[Tensor] = []
    for tensor in result if isinstance(result, (list, tuple)) else [result]:
        flat = tensor.double().flatten()
        if flat.numel() == 1 and vectors:
            vectors[-1] = torch.cat([vectors[-1], flat])
        elif flat.numel():
            vectors.append(flat)
    return vectors


def _complaint(names: Sequence[str], arguments: Sequence, plain: Callable, fused: Callable) -> str | None:
    """What is wrong with ``fused``, or None."""
    small = _small(names, arguments)
    exact, expected = _joined(plain(*_wide(small))), _joined(plain(*small))
    result = fused(*small)
    found = _joined(result)
    if [v.numel() for v in found] != [v.numel() for v in expected]:
        return "it gives other shapes than the reference"
    floats = [a.dtype for a in small if isinstance(a, Tensor) and a.is_floating_point() and a.itemsize > 1]
    eps = max(torch.finfo(dtype).eps for dtype in floats)
    if isinstance(result, tuple) and any(t.itemsize == 1 and t.is_floating_point() for t in result):
        eps = max(eps, 2**-10)  # a value on the border of two codes may get either, an eighth away
    for index, (truth, plain_value, value) in enumerate(zip(exact, expected, found)):
        if not torch.isfinite(value).all():
            return f"result {index} is not finite"
        size = truth.norm()
        error, yardstick = (value - truth).norm(), (plain_value - truth).norm()
        if error > _FACTOR * yardstick + _ROUNDINGS * eps * size:
            errors = [f"{(each / size).item():.1e}" for each in (error, yardstick)]
            return f"result {index} is off by {errors[0]}, the reference at the same type by {errors[1]}"
    return None


def choose(op: str, names: Sequence[str], arguments: Sequence, plain: Callable, fused: Callable) -> Callable:
    """``fused`` where it is as good as ``plain`` on this device at these widths and types, else ``plain``.

    Args:
        op: the op's name, for the warning. names: of ``arguments``, which are those of the call.
        plain, fused: the reference kernel and the one to check; both take ``arguments``.
    """
    if stand_in.active():
        return fused
    key = _key(op, names, arguments)
    verdict = _verdicts.get(key)
    if verdict is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return plain  # nothing can be compared inside a CUDA graph; the next call outside one can
        with torch.no_grad():
            try:
                complaint = _complaint(names, arguments, plain, fused)
            except Exception as error:  # a compiler or driver may fail in any way
                said = (str(error).strip().splitlines() or [""])[0]
                complaint = f"it failed with {type(error).__name__}: {said}"
        verdict = _verdicts[key] = complaint is None
        if complaint is not None:
            device = next(a for a in arguments if isinstance(a, Tensor)).device
            place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            warnings.warn(
                f"the fused kernel of {op} is not used on this device ({place}): {complaint}; the reference "
                "takes its place",
                stacklevel=2,
            )
    return fused if verdict else plain
