"""Registration of every op under ``torch.ops``, in the namespace of each backend, and with it the kernels
that serve each device.

On CUDA ``auto`` is Triton's kernel, once it has passed its check there (``self_check``) and unless the vendor
library is faster (``backends.library_is_faster``), on the CPU the C++ one, where it was built (``native``),
and everywhere else the reference.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native, reference
from ..reference.common import in_autocast
from . import schemas, self_check
from .backends import HAS_TRITON, NAMESPACES, library_is_faster

# Without a Triton kernel: nearly all of their time are products that PyTorch does well.
WITHOUT_TRITON = {"pooled_upsample", "linear_attention", "linear_cross_entropy"}


class HostCode(NamedTuple):
    """The Python code behind a registered op.

    Attributes:
        op: the stem of its files.
        plain, fused: the reference's function and the Triton launcher.
    """

    op: str
    plain: Callable
    fused: Callable


HOST_CODE: dict[str, HostCode] = {}


def _without_autocast(kernel: Callable) -> Callable:
    """A reference kernel sets its own precisions, whatever autocast says about the operators in it."""

    @functools.wraps(kernel)
    def run(first: Tensor, *arguments):
        if not in_autocast(first.device):
            return kernel(first, *arguments)
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *arguments)

    return run


def _triton_kernel(name: str, function: str) -> Callable:
    """A function of ``triton_kernels.<name>``, imported, and Triton with it, when it is first called."""

    @functools.cache
    def module() -> ModuleType:
        return importlib.import_module(f"..triton_kernels.{name}", __package__)

    return lambda *arguments: getattr(module(), function)(*arguments)


def _checked(schema: str, op: str, plain: Callable, fused: Callable) -> Callable:
    """``fused`` on devices where it passes its check against ``plain`` at first use, ``plain`` on others and
    where it cannot be the faster one."""
    name, arguments = schema.split(") ->")[0].split("(", 1)
    names = [argument.split()[-1].split("=")[0] for argument in arguments.split(", ")]

    def run(*given):
        if library_is_faster(op, given):
            return plain(*given)
        return self_check.choose(name, names, given, plain, fused)(*given)

    return run


def _checked_in_place(plain: Callable, fused: Callable) -> Callable:
    """``relu_attention_bwd_`` where ``relu_attention_bwd``, the same kernels, passes its check: a check of
    its own would write over its arguments."""
    row = next(row for row in schemas.REGISTERED if row.name == "relu_attention_bwd")
    not_in_place = HOST_CODE[row.name]
    arguments = row.schema.split(") ->")[0].split("(", 1)[1].split(", ")
    names = [argument.split()[-1].split("=")[0] for argument in arguments]
    slab_at = names.index("features")

    def run(*given):
        listed = (*given[:slab_at], list(given[slab_at].unbind(0)), *given[slab_at + 1 :])
        chosen = self_check.choose(row.name, names, listed, not_in_place.plain, not_in_place.fused)
        return (fused if chosen is not_in_place.fused else plain)(*given)

    return run


def _native_kernel(name: str, plain: Callable) -> Callable:
    """The C++ kernel of an op for the calls that it serves, ``plain`` for the others."""
    fast = native.chosen(name, plain)
    if "pool" not in schemas.ARGUMENT_NAMES.get(name.removesuffix("_bwd"), ()):
        return fast
    called = f"{name.removesuffix('_bwd')}_pooled{'_bwd' if name.endswith('_bwd') else ''}"
    pooled = native.chosen(called, plain) if native.has(called) else plain

    def run(*given):
        *others, pool = given if isinstance(given[-1], int) else (*given, 1)
        return fast(*others) if pool == 1 else pooled(*others, pool)

    return run


def _reference_kernel(op: str, function: str) -> Callable:
    kernel = reference.row_statistics if op == "row_statistics" else getattr(getattr(reference, op), function)
    return _without_autocast(kernel)


def _register() -> list[torch.library.Library]:
    """Defines every op in each namespace: the reference for all devices, and the kernels made for one."""
    libraries = {
        name: torch.library.Library(name, "DEF") for name in (native.NAMESPACE, *NAMESPACES.values())
    }
    kernels = libraries[native.NAMESPACE]
    for row in schemas.REGISTERED:
        for library in libraries.values():
            schema = row.schema.replace(schemas.NOT_NATIVE, "") if library is kernels else row.schema
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for row in schemas.REGISTERED_NATIVE:
        kernels.define(row.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{native.NAMESPACE}::{row.name}", row.fake, lib=kernels)
    native.load(schemas.PROJECTION_KEPT)
    for row in schemas.REGISTERED:
        name, plain = row.name, _reference_kernel(row.op, row.function)
        fused = _without_autocast(_triton_kernel(row.op, row.function))
        HOST_CODE[name] = HostCode(row.op, plain, fused)
        for backend, namespace in NAMESPACES.items():
            library = libraries[namespace]
            use_fused = backend == "triton" and row.op not in WITHOUT_TRITON
            library.impl(name, fused if use_fused else plain, "CompositeExplicitAutograd")
            if backend == "auto" and HAS_TRITON and row.op not in WITHOUT_TRITON:
                in_place = row.function == "backward_in_place"
                checked = (
                    _checked_in_place(plain, fused)
                    if in_place
                    else _checked(row.schema, row.op, plain, fused)
                )
                library.impl(name, checked, "CUDA")
            if backend in ("auto", "native") and native.has(name):
                library.impl(name, _without_autocast(_native_kernel(name, plain)), "CPU")
            torch.library.register_fake(f"{namespace}::{name}", row.fake, lib=library)
    return list(libraries.values())


_libraries = _register()  # kept alive: an op lives as long as its library


def host_code(name: str, backend: str, device_type: str) -> Callable | None:
    """The Python function that serves an op, for whoever counts what it allocates.

    Args:
        name: as registered, such as ``"ladder"`` or ``"ladder_bwd"``.
        backend: see ``use_backend``. device_type: ``"cpu"`` or ``"cuda"``.

    Returns:
        None where the kernel is not Python.
    """
    op, plain, fused = HOST_CODE[name]
    on_cuda = device_type == "cuda"
    if backend in ("auto", "native") and not on_cuda:
        return None if native.has(name) else plain
    if op in WITHOUT_TRITON or not (backend == "triton" or (backend == "auto" and on_cuda and HAS_TRITON)):
        return plain
    if backend == "triton":
        return fused
    return lambda *given: (plain if library_is_faster(op, given) else fused)(*given)
