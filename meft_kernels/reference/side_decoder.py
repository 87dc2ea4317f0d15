"""LST beside a whole encoder-decoder, as on T5: a ladder that hears, and one that writes and listens to it.

    S   = LN(s_L) of the encoder's ladder                                      (``LadderMemory``)
    m_i = g_i s_{i-1} + (1 - g_i) D_i;   m_i += Self(LN m_i);   m_i += Cross(LN m_i, S)
    s_i = m_i + W2_i gelu(W1_i LN(m_i) + b1_i) + b2_i;   out = Wu LN(s_L) + bu  (``LadderDecoder``)

All attention is at the side width r, in heads of about 32. Unlike in the T5 code (arXiv 2206.06522) the
output is added to the backbone's, from zero on.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import adapter, norm_linear
from .common import GATE_TEMPERATURE, NORM_EPS, accumulation_dtype
from .modules import (
    LST,
    Rung,
    SideNetwork,
    adapter_params,
    check_memory,
    linear_params,
    norm_linear_params,
    norm_params,
    read_only,
)

Cache = Callable[[int, bool, Callable[[], tuple[Tensor, Tensor]]], tuple[Tensor, Tensor]]


class LadderMemory(LST):
    """``LST`` whose output is S = LN(s_L), (B, T, r): what a decoder's ladder listens to.

    Args:
        as ``LST``, without ``correction``.
    """

    def _build_up(self, correction: bool, device, dtype) -> None:
        if correction:
            raise ValueError("correction must be False: the output stays at the side width")
        self.correction, self.up = False, None
        self.norm = nn.LayerNorm(self.side_size, eps=NORM_EPS, device=device, dtype=dtype)

    def widen(self, state: Tensor) -> Tensor:
        """S (B, T, r) from the side state (B, T, r)."""
        wide = accumulation_dtype(state.dtype)
        weight, bias = (tensor.to(wide) for tensor in norm_params(self.norm))
        return F.layer_norm(state.to(wide), state.shape[-1:], weight, bias, NORM_EPS).to(state.dtype)

    def pool_params(self) -> tuple[Tensor, ...]:
        raise ValueError("pooled is not for LadderMemory: a decoder looks at every frame")


class SideAttention(nn.Module):
    """Attention at the side width, with its LayerNorm before it: ``Linear(attend(LN x))``.

    Args:
        size: r. device, dtype: of the parameters.
    """

    def __init__(self, size: int, device=None, dtype=None) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.heads = next(heads for heads in range(max(1, size // 32), 0, -1) if size % heads == 0)
        self.norm = nn.LayerNorm(size, eps=NORM_EPS, **place)
        self.query, self.value, self.out = (nn.Linear(size, size, **place) for _ in range(3))
        self.key = nn.Linear(size, size, bias=False, **place)  # a softmax does not see a bias of its keys

    def split(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """(B, U, r) -> (B, heads, U, r / heads), projected, in the type of ``x``."""
        weight, bias = linear_params(linear)
        projected = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def normed(self, x: Tensor) -> Tensor:
        """LN(x) in the type of ``x``."""
        wide = accumulation_dtype(x.dtype)
        weight, bias = (tensor.to(wide) for tensor in norm_params(self.norm))
        return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, NORM_EPS).to(x.dtype)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What normed rows x (B, U, r) get of keys and values (B, heads, K, r / heads)."""
        read_only(self)
        query = self.split(x, self.query)
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, keys, values, mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        weight, bias = linear_params(self.out)
        return F.linear(mixed, weight.to(x.dtype), bias.to(x.dtype))


class LadderDecoder(LST):
    """LST beside a decoder that listens to a ``LadderMemory`` beside the encoder; its output corrects the
    decoder's.

    Args:
        as ``LST``; ``correction`` is always true.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        reduction_factor: int = 8,
        adapter_dim: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        super().__init__(hidden_size, num_layers, reduction_factor, adapter_dim, correction=True, **place)
        self.listening = nn.ModuleList(SideAttention(self.side_size, **place) for _ in self.taps)
        self.speaking = nn.ModuleList(SideAttention(self.side_size, **place) for _ in self.taps)
        self.reset_parameters()

    def state(
        self,
        hidden_states: Iterable[Tensor],
        lengths: Tensor | None,
        memory: Tensor | None = None,
        cache: Cache | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """s_L, (B, U, r).

        Args:
            hidden_states, lengths: as ``forward``'s. memory: S (B, T, r), or of one clip that all listen to.
            cache: called as ``cache(rung, listens, make)``, where ``make()`` gives keys and values
                (B, heads, ..., r / heads) of these tokens, or of S where it ``listens``; gives those of all
                tokens so far, or of S. None: there are no others.
            valid: (B, K), true for tokens that may be looked at; None: all.

        Raises:
            ValueError: no ``memory``, or of another shape.
        """
        stream = (state.values for state in self.read(hidden_states))
        first = next(stream)
        self.check_lengths(lengths, first)
        state = self.project(0, first)
        check_memory(memory, state)
        memory, mask = memory.to(state.dtype), None
        if cache is None:
            mask = _mask(state.shape[1], state.shape[1], valid, state.device)
        for i, hidden_state in enumerate(stream):
            down = self.project(i + 1, hidden_state)
            state = self.climb(i, state, down, memory, mask, cache, valid)
        return state

    def climb(
        self,
        index: int,
        state: Tensor,
        down: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        cache: Cache | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """s_i, (B, U, r), from s_{i-1} and D_i.

        Args:
            index: of the rung, i - 1. memory, cache, valid: as ``state``'s. mask: which token looks at which,
                None: made of what ``cache`` gives.
        """
        rung, speaking, listening = self.rungs[index], self.speaking[index], self.listening[index]
        keep = cache or (lambda rung, listens, make: make())
        gate = torch.sigmoid(rung.gate / GATE_TEMPERATURE).to(down.dtype)
        state = gate * state + (1 - gate) * down
        normed = speaking.normed(state)
        keys, values = keep(index, False, lambda: _keys_and_values(speaking, normed))
        if mask is None:
            mask = _mask(state.shape[1], keys.shape[2], valid, state.device)
        state = state + speaking.attend(normed, keys, values, mask)
        keys, values = keep(index, True, lambda: _keys_and_values(listening, memory))
        state = state + listening.attend(listening.normed(state), keys, values, None)
        return state + self.adapt(rung, state)

    def project(self, index: int, hidden_state: Tensor) -> Tensor:
        """D_i, (B, U, r)."""
        return norm_linear.definition(hidden_state, *norm_linear_params(self.down[index]))

    def adapt(self, rung: Rung, state: Tensor) -> Tensor:
        """W2 gelu(W1 LN(m) + b1) + b2, (B, U, r)."""
        return adapter.definition(state, *adapter_params(rung))


def _keys_and_values(attention: SideAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    return attention.split(x, attention.key), attention.split(x, attention.value)


def _mask(tokens: int, seen: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """(1 or B, 1, U, K), true where a token may look: at itself and before it, and at what is valid."""
    reach = torch.arange(seen - tokens, seen, device=device)
    mask = (torch.arange(seen, device=device) <= reach[:, None])[None, None]
    if valid is None:
        return mask
    itself = torch.arange(seen, device=device) == reach[:, None]  # so that a row of padding is not empty
    return (mask & valid[:, None, None, :]) | itself


class SidePair(nn.Module):
    """What hears beside the encoder, and what writes beside the decoder and listens to it.

    Args:
        memory: a ``LadderMemory`` or ``UniPTMemory``. decoder: a ``LadderDecoder`` or ``UniPTDecoder``.
    """

    def __init__(self, memory: SideNetwork, decoder: SideNetwork) -> None:
        super().__init__()
        self.memory, self.decoder = memory, decoder
