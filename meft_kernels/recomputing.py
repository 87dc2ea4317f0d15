"""What a backward computes again, in place of having it kept: by the kernels of its forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .ops.backends import assume_backend, current


def recomputed(function: Callable, *arguments: Any, **options: Any) -> Any:
    """``function(*arguments, **options)``, of which only the arguments are kept: the backward runs it again,
    on the backend that is chosen now, wherever it runs. Under ``torch.compile``, by what was compiled."""
    backend = current()

    def run(*arguments, **options):
        with assume_backend(backend):
            return function(*arguments, **options)

    chosen = function if torch.compiler.is_compiling() else run
    return checkpoint(chosen, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
