"""Reading checkpoint tensors from untrusted or damaged files."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ..errors import UserError, one_line
from ..files import read_json

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, on the CPU.

    Args:
        folder: holds ``model.safetensors`` or ``pytorch_model.bin``, or an index file of either that names
            shards. Pickled files are read with ``weights_only=True``: they cannot run code.

    Raises:
        UserError: no such file, or one that cannot be read, by name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors.update(_read_file(file))
    return tensors


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold the weights in a checkpoint folder, see :func:`read_weights`.

    Raises:
        UserError: there are none, or an index that names them cannot be used.
    """
    folder = Path(folder)
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)} is there")
    if found.suffix != ".json":
        return [found]
    index = read_json(found)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{found} has no usable weight_map")
    for shard in weight_map.values():
        if Path(shard).name != shard:
            raise UserError(f"{found} names the shard {shard!r}, which is not in the same folder")
    return [folder / shard for shard in sorted(set(weight_map.values()))]


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    except Exception as error:  # every library has its own exceptions for a damaged file
        raise UserError(
            f"cannot read {path}, it is damaged, incomplete or not a weights file: {one_line(error)}"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise UserError(f"cannot use {path}: it holds something else than tensors by name")
    # A view that repeats its values would take its claimed size as soon as it is copied.
    repeating = [n for n, t in tensors.items() if t.numel() * t.element_size() > t.untyped_storage().nbytes()]
    if repeating:
        raise UserError(f"cannot use {path}: it does not hold all values of {repeating[0]}")
    return dict(tensors)


def check_names(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str | Path
) -> None:
    """Compares names and shapes of tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape, by name.
    """
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    problems = [
        f"{some_of(missing)} missing" if missing else "",
        f"{some_of(unknown)} unknown" if unknown else "",
    ]
    for name in sorted(set(expected) & set(found)):
        if found[name].shape != expected[name].shape:
            problems.append(
                f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            )
            break
    integers = [n for n in sorted(set(expected) & set(found)) if not found[n].is_floating_point()]
    if integers:
        problems.append(f"{integers[0]} holds {found[integers[0]].dtype} values instead of floating point")
    problems = [p for p in problems if p]
    if problems:
        raise UserError(f"the weights in {where} do not fit the model: {'; '.join(problems)}")


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# What torch.compile, FSDP and recomputation put between the names of modules.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """A tensor's name in the model itself, without what wrappers around it or in it add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith("module."):  # DistributedDataParallel, and averaged weights
        name = name.removeprefix("module.")
    return name


def load_checked(model: nn.Module, tensors: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Copies the trained tensors of a MeftModel into ``model``; the frozen ones are left alone.

    Raises:
        UserError: see :func:`check_names`.
    """
    saved = model.saved_names()
    own = {name: tensor for name, tensor in model.state_dict().items() if name in saved}
    check_names(tensors, own, where)
    model.load_state_dict(tensors, strict=False)
