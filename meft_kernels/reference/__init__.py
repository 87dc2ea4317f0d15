"""The definition of every op and module in plain PyTorch.

One file per op: ``definition`` says what it means and is differentiated by autograd; ``forward`` and
``backward`` are the same maths with the hand-derived gradient and little memory, and serve every device that
has no kernel of its own. ``LST``, ``UniPT`` and ``SHERL`` are the readable modules.
"""

from . import (
    adapter,
    causal_attention,
    eight_bit,
    gated_down,
    gated_up,
    guidance,
    ladder,
    linear_attention,
    linear_cross_entropy,
    norm_linear,
    pooled_upsample,
    relu_attention,
    side_decoder,
    summary_attention,
    unipt_decoder,
)
from .common import accumulation_dtype, row_statistics
from .modules import (
    LST,
    SAVED_ACTIVATIONS,
    SHERL,
    SHERL_STARTS,
    CausalUniPT,
    HiddenState,
    UniPT,
    parse_attention,
)
from .side_decoder import LadderDecoder, LadderMemory, SidePair
from .unipt_decoder import UniPTDecoder, UniPTMemory

__all__ = [
    "CausalUniPT",
    "HiddenState",
    "LST",
    "LadderDecoder",
    "LadderMemory",
    "SAVED_ACTIVATIONS",
    "SHERL",
    "SHERL_STARTS",
    "SidePair",
    "UniPT",
    "UniPTDecoder",
    "UniPTMemory",
    "accumulation_dtype",
    "adapter",
    "causal_attention",
    "eight_bit",
    "gated_down",
    "gated_up",
    "guidance",
    "ladder",
    "linear_attention",
    "linear_cross_entropy",
    "norm_linear",
    "parse_attention",
    "pooled_upsample",
    "relu_attention",
    "row_statistics",
    "side_decoder",
    "summary_attention",
    "unipt_decoder",
]
