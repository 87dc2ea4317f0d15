"""UniPT beside a whole encoder-decoder: one that hears, and one that writes and listens to it.

    S   = A + W2 gelu(W1 LN(G) + b1) + b2, of the encoder's states              (``UniPTMemory``)
    R_i = relu(F_i S^T);   X_i = R_i / (rowsum(R_i) + 1e-7) S
    F_i += LN(Wx_i X_i + bx_i), i < L;   A = F_L;   G = causal_attention(A, F_0 .. F_{L-1})
    Z = A + W2 gelu(W1 LN(G) + b1) + b2;   out = Wu LN(Z) + bu                  (``UniPTDecoder``)

As in the published code for an encoder-decoder (arXiv 2308.14316, its grounding task) the anchor does not
listen, and each layer's features listen through a projection of their own. There the decoder's queries see
each other; here a token looks at none behind it, and its confidence is its own (``causal_attention``). The
output is added to the backbone's, from zero on.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import ATTENTION_EPS, NORM_EPS, accumulation_dtype
from .modules import CausalUniPT, UniPT, check_memory, linear_params, norm_params


class UniPTMemory(UniPT):
    """``UniPT`` whose output is S = Z, (B, T, r): what a decoder's ``UniPTDecoder`` listens to.

    Args:
        as ``UniPT``, without ``correction``.
    """

    def _build_up(self, correction: bool, device, dtype) -> None:
        if correction:
            raise ValueError("correction must be False: the output stays at the side width")
        self.correction, self.up, self.norm = False, None, None

    def widen(self, state: Tensor) -> Tensor:
        """S (B, T, r): the side state as it is."""
        return state

    def pool_params(self) -> tuple[Tensor, ...]:
        raise ValueError("pooled is not for UniPTMemory: a decoder looks at every frame")


class LinearNorm(nn.Module):
    """Linear(r, r), then LayerNorm(r).

    Args:
        size: r. device, dtype: of the parameters.
    """

    def __init__(self, size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(size, eps=NORM_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, U, r) in its type, computed in at least fp32."""
        wide = accumulation_dtype(x.dtype)
        given = (*linear_params(self.linear), *norm_params(self.norm))
        weight, bias, norm_weight, norm_bias = (tensor.to(wide) for tensor in given)
        projected = F.linear(x.to(wide), weight, bias)
        return F.layer_norm(projected.to(wide), x.shape[-1:], norm_weight, norm_bias, NORM_EPS).to(x.dtype)


def heard(features: Tensor, memory: Tensor) -> Tensor:
    """X_i (B, U, r) of features F_i (B, U, r) and S (B, T, r); a token without a positive score hears
    nothing, which is zero."""
    wide = accumulation_dtype(features.dtype)
    query, memory = features.to(wide), memory.to(wide)
    scores = torch.relu(query @ memory.mT).to(wide)
    return ((scores / (scores.sum(-1, keepdim=True) + ATTENTION_EPS)) @ memory).to(features.dtype)


class UniPTDecoder(CausalUniPT):
    """``CausalUniPT`` that listens to a ``UniPTMemory`` beside the encoder and corrects the decoder's output.

    Args:
        as ``UniPT``; ``correction`` is always true.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        reduction_factor: int = 8,
        saved_activations: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_size, num_layers, reduction_factor, None, saved_activations, correction=True, **place
        )
        self.listening = nn.ModuleList(LinearNorm(self.side_size, **place) for _ in self.taps)
        self.reset_parameters()

    def state(
        self,
        hidden_states: Iterable[Tensor],
        lengths: Tensor | None,
        memory: Tensor | None = None,
        past: Callable[[list[Tensor]], list[Tensor]] | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Z, (B, U, r).

        Args:
            hidden_states, lengths: as ``forward``'s. memory: S (B, T, r), or of one clip that all listen to.
            past, valid: as for ``CausalUniPT.state``; the features that ``past`` is given have listened.

        Raises:
            ValueError: no ``memory``, or of another shape.
        """
        *features, anchor = self.features(hidden_states)
        self.check_lengths(lengths, anchor)
        check_memory(memory, anchor)
        features = [
            each + listening(self.hear(each, memory)) for each, listening in zip(features, self.listening)
        ]
        return self.attend(anchor, features, past, valid)

    def hear(self, features: Tensor, memory: Tensor) -> Tensor:
        """X_i, (B, U, r)."""
        return heard(features, memory)
