"""Memory-efficient side networks for frozen speech encoders: LST, UniPT and SHERL, on fused ops.

>>> from meft_kernels import LST
>>> side = LST(hidden_size=768, num_layers=12, reduction_factor=8)
>>> pooled = side.pooled(hidden_states)  # 13 tensors (B, T, 768) -> (B, 768)
"""

from . import ops, reference
from .modules import (
    LST,
    SHERL,
    CausalUniPT,
    LadderDecoder,
    LadderMemory,
    UniPT,
    UniPTDecoder,
    UniPTMemory,
)
from .ops import linear_cross_entropy, use_backend
from .reference import HiddenState, SidePair

__version__ = "0.1.0"

__all__ = [
    "CausalUniPT",
    "HiddenState",
    "LST",
    "LadderDecoder",
    "LadderMemory",
    "SHERL",
    "SidePair",
    "UniPT",
    "UniPTDecoder",
    "UniPTMemory",
    "linear_cross_entropy",
    "ops",
    "reference",
    "use_backend",
]
