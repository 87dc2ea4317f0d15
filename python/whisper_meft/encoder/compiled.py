"""One encoder layer compiled for all: ``--backbone_compile``."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UserError, one_line
from .layer import finish_layer


def compiled_layer(backend: str | Callable, device: torch.device) -> Callable[..., torch.Tensor]:
    """:func:`whisper_meft.encoder.layer.finish_layer` compiled with lengths and batch sizes left open.

    Weights are arguments of what is compiled, so layers of one shape and type share it.

    Args:
        backend: of torch.compile. device: of the weights.

    Raises:
        UserError: there is no such backend, or it has no compiler for the device.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        raise UserError(f"backend must be one of {', '.join(known)}, got {backend!r}")
    if backend == "inductor":
        _check_compiler(device)
    # torchao's tensors; without it compilations are not kept from one process to the next.
    warnings.filterwarnings("ignore", message=".*does not implement _stable_hash_for_caching")
    compiled = torch.compile(finish_layer, dynamic=True, backend=backend)

    def run(
        layer: nn.Module, states: Tensor, normed: Tensor, mask: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        # The embedding is laid out as the convolution left it, which would be compiled for once more.
        finished = compiled(layer, states.contiguous(), normed, mask)
        return finished if out is None else out.copy_(finished)

    return run


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("backbone_compile needs triton for this GPU: pip install triton, or leave it out")
    elif device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # of several kinds, by version and system
            raise UserError(
                "backbone_compile needs a C++ compiler on a CPU: install g++ (or name one in the environment "
                f"variable CXX), or leave it out: {one_line(error)}"
            ) from error
