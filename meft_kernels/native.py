"""Finds and loads the C++ CPU kernels of ``csrc/``, and says which calls they serve.

``setup.py`` builds one library for each level of vector instructions and names it after the torch it was
built for: C++ has no stable interface between releases of torch, so one for another release is not loaded.
The kernels are registered under ``torch.ops.meft_csrc``, whose ops ``ops.registration`` defines.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import native_sources
from ._ops import ops
from .reference.stand_in import device_type

_FOLDER = Path(__file__).parent
NAMESPACE = f"{ops.name}_csrc"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _level() -> str:
    """The instructions that torch's own kernels use here; the environment can lower it."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    return level if level in ("avx512", "avx2") else "default"


def file_name(level: str, release: str) -> str:
    """What ``setup.py`` calls the library for a level of instructions and a release of torch."""
    return f"_native_{level}_torch_{release.replace('.', '_')}.so"


def _warned(reason: str) -> str:
    warnings.warn(f"{reason}; the reference takes their place", RuntimeWarning, stacklevel=2)
    return reason


def load_from(folder: Path) -> tuple[bool, str]:
    """Loads the library for this torch and this CPU: whether that was possible, and a reason in words."""
    release, level = torch.__version__.partition("+")[0], _level()
    built = sorted(folder.glob(file_name("*", "*")))
    if not built:
        return False, "the C++ kernels were not built with this installation"
    path = folder / file_name(level, release)
    if path not in built:
        others = sorted({each.stem.partition("_torch_")[2].replace("_", ".") for each in built} - {release})
        if not others:
            return False, f"the C++ kernels were not built for {level}"
        return False, _warned(
            f"the C++ kernels were built for torch {' and '.join(others)}, and this is torch {release}"
        )
    try:
        sources = native_sources.digest(folder.parent)
        stale = sources is not None and native_sources.of_library(path) != sources
    except OSError as error:
        return False, _warned(f"the C++ kernels cannot be loaded: {error}")
    if stale:
        return False, _warned(
            "the C++ kernels were built from other sources than this checkout has: "
            "run python setup.py build_ext --inplace"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return False, _warned(f"the C++ kernels cannot be loaded: {str(error).splitlines()[0]}")
    return True, f"a C++ kernel, built for {level}"


def load(keeping: Iterable[str]) -> tuple[bool, str]:
    """Loads the kernels, once the ops of ``NAMESPACE`` are defined.

    Args:
        keeping: the ops that may have a kernel which hands a projection on to their backward.

    Returns:
        Whether they were loaded, and a reason in words.
    """
    global LOADED, REASON, KEEPING
    LOADED, REASON = load_from(_FOLDER)
    KEEPING = frozenset(name for name in keeping if has(f"{name}_keeping"))
    return LOADED, REASON


LOADED, REASON = False, "the C++ kernels have not been looked for"
KEEPING: frozenset[str] = frozenset()  # the ops that can hand a projection on to their backward


def has(name: str) -> bool:
    """Whether an op has a kernel here."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


def serves(arguments: Sequence) -> bool:
    """Whether the kernels take these arguments: on the CPU, in fp32, bf16 or fp16, and nothing empty."""
    for argument in arguments:
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            if not isinstance(tensor, Tensor):
                continue
            if not tensor.is_cpu or not tensor.numel():
                return False
            if tensor.is_floating_point() and tensor.dtype not in DTYPES:
                return False
    return True


def keeps_projection(name: str, arguments: Sequence) -> bool:
    """Whether an op's forward hands the projection of its hidden state on to the backward: where a C++ kernel
    serves it, in fp32. In half precision, which is chosen to save memory, it is computed again."""
    if name not in KEEPING:
        return False
    x = arguments[0]
    return x.dtype == torch.float32 and device_type(x.device) == "cpu" and serves(arguments)


def kernel(name: str) -> Callable:
    """A C++ kernel as an operator."""
    return getattr(getattr(torch.ops, NAMESPACE), name)


def chosen(name: str, plain: Callable) -> Callable:
    """The C++ kernel of an op for the calls that it serves, ``plain`` for the others."""
    fast = kernel(name)

    def run(*arguments):
        return (fast if serves(arguments) else plain)(*arguments)

    return run
