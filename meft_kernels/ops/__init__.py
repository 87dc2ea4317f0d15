"""Every op: its public function, and the choice of the kernels that serve it.

This is the one place that registers an op or chooses a backend. ``schemas`` says what each op takes and
gives, ``backends`` which kernels are chosen, ``registration`` puts them under ``torch.ops``, ``autograd``
ties forward and backward together, and ``functions`` are what the modules call.
"""

from .backends import BACKENDS, assume_backend, backend_status, use_backend, uses_native
from .functions import (
    adapter,
    eight_bit,
    fold,
    folded_ladder,
    folded_linear,
    gated_down,
    gated_up,
    gated_up_gradients,
    gated_up_sums_,
    guidance,
    ladder,
    linear_attention,
    linear_cross_entropy,
    norm_linear,
    pooled_upsample,
    relu_attention,
    row_statistics,
)
from .registration import host_code
from .schemas import OP_NAMES

__all__ = [
    "BACKENDS",
    "OP_NAMES",
    "adapter",
    "assume_backend",
    "backend_status",
    "eight_bit",
    "fold",
    "folded_ladder",
    "folded_linear",
    "gated_down",
    "gated_up",
    "gated_up_gradients",
    "gated_up_sums_",
    "guidance",
    "host_code",
    "ladder",
    "linear_attention",
    "linear_cross_entropy",
    "norm_linear",
    "pooled_upsample",
    "relu_attention",
    "row_statistics",
    "use_backend",
    "uses_native",
]
