"""What is stored of a clip, and the files that hold clips.

They are read by ordinary reads and not mapped: a file that is cut while it is mapped kills the process.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from meft_kernels import HiddenState
from meft_kernels.reference.common import row_statistics
from meft_kernels.reference.eight_bit import CODE_DTYPES, encode

from ..errors import UserError

STORAGES = ("exact", "bfloat16", *CODE_DTYPES)

# By the names of safetensors.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}


@dataclass
class CachedClip:
    """A clip's hidden states, as they are stored.

    Attributes:
        states: (S, T, D), floating point or 8-bit codes. statistics: (S, T, 2) mean and rstd of their rows.
        scales: (S, 2, D) scale and shift of 8-bit codes (:func:`whisper_meft.encoder.cached.decoded`), or
            None.
    """

    states: Tensor
    statistics: Tensor
    scales: Tensor | None


def checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Where the tensors of a safetensors file are: by name their ``dtype``, ``shape`` and ``place`` in bytes
    from the file's beginning.

    Raises:
        ValueError, KeyError: it is none.
    """
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError("its header is cut off")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: {
            "dtype": _DTYPES[about["dtype"]],
            "shape": tuple(about["shape"]),
            "place": 8 + size + about["data_offsets"][0],
        }
        for name, about in header.items()
    }


def read_rows(file: BinaryIO, about: dict[str, Any], rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, which are along its first axis.

    Args:
        file: open without a buffer. about: of the tensor, from :func:`read_header`. rows: their numbers.

    Raises:
        OSError: the file ends before them.
    """
    out = torch.empty((len(rows), *about["shape"][1:]), dtype=about["dtype"])
    content = memoryview(out.view(torch.uint8).numpy().reshape(-1))
    size = len(content) // len(rows)
    together = list(rows) == list(range(rows[0], rows[0] + len(rows)))
    for i in [0] if together else range(len(rows)):
        file.seek(about["place"] + rows[i] * size)
        wanted = content if together else content[i * size : (i + 1) * size]
        while wanted:
            read = file.readinto(wanted)
            if not read:
                raise OSError("it ends too early")
            wanted = wanted[read:]
    return out


def parts_of(storage: str) -> tuple[str, ...]:
    return ("states", "statistics", *(("scale", "shift") if storage in CODE_DTYPES else ()))


def clip_bytes(frames: int, layers: int, hidden_size: int, storage: str, dtype: torch.dtype) -> int:
    """Bytes that a clip of so many frames takes, with states that are computed in ``dtype``."""
    coded = storage in CODE_DTYPES
    each = 1 if coded else {"exact": dtype.itemsize, "bfloat16": 2}[storage]
    constants = 8 * hidden_size if coded else 0
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return layers * (frames * (each * hidden_size + 2 * wide) + constants) + 400  # 400: names, header, index


def pack(states: Sequence[Tensor | HiddenState], frames: int, storage: str) -> dict[str, Tensor]:
    """What is stored of a clip.

    Args:
        states: (T', D) of each layer. frames: T, those that hold sound. storage: see
            :meth:`FeatureCache.create`.

    Returns:
        ``states`` (S, T, D), ``statistics`` (S, T, 2), and of 8 bits ``scale`` and ``shift`` (S, D); on the
        CPU.

    Raises:
        UserError: a state is NaN or infinite.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in parts_of(storage)}
    for state in states:
        state = state if isinstance(state, HiddenState) else HiddenState(state)
        values, known = state.values[:frames], state.statistics
        mean, rstd = row_statistics(values) if known is None else (s[:frames] for s in known)
        if storage in CODE_DTYPES:
            values, scale, shift = encode(values, mean, rstd, storage)
            parts["scale"].append(scale)
            parts["shift"].append(shift)
        elif storage == "bfloat16":
            values = values.to(torch.bfloat16)
        parts["states"].append(values)
        parts["statistics"].append(torch.stack([mean, rstd], -1))
    stacked = {name: torch.stack(tensors).cpu() for name, tensors in parts.items()}
    if not torch.isfinite(stacked["statistics"]).all():
        raise UserError("the backbone's hidden states are NaN or infinite")
    return stacked


def unpack(parts: dict[str, Tensor]) -> CachedClip:
    """The states that :func:`pack` was given, but for their rounding."""
    scales = torch.stack([parts["scale"], parts["shift"]], 1) if "scale" in parts else None
    return CachedClip(parts["states"], parts["statistics"], scales)
