"""LST, UniPT and SHERL as plain PyTorch modules: parameters, initialisation, checks and the readable forward.

The fast modules in ``meft_kernels.modules`` subclass these and replace the computation alone, so constructors
and ``state_dict`` keys are shared. Symbols: B batch, T frames, D ``hidden_size``, r side width, L
``num_layers``.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from . import (
    adapter,
    causal_attention,
    eight_bit,
    gated_down,
    gated_up,
    guidance,
    ladder,
    linear_attention,
    norm_linear,
    pooled_upsample,
    relu_attention,
    summary_attention,
)
from .common import NORM_EPS

SAVED_ACTIVATIONS = ("exact", *eight_bit.CODE_DTYPES)
SHERL_STARTS = ("published", "even", "zero_shot")
OPEN_GATE = 2.0  # tanh of this over the temperature is one, in float64 too
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class HiddenState(NamedTuple):
    """A hidden state with the row statistics that the frozen block's own LayerNorm computed of it.

    Any entry of the hidden states that a side network reads may be one instead of a plain tensor: the network
    then does not compute the statistics again.

    Attributes:
        values: (B, T, D). mean, rstd: (B, T), fp32 or float64, as ``ops.row_statistics`` gives them.
        again: makes ``values`` again at little cost. A network that keeps 8-bit copies then keeps none of
            them, but the last hidden state as it is, which takes no more than the two copies would.
    """

    values: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    again: Callable[[], Tensor] | None = None

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """``(mean, rstd)``, or None where they are not known."""
        return None if self.mean is None or self.rstd is None else (self.mean, self.rstd)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def parse_attention(attention: str) -> tuple[str, int]:
    """UniPT's ``attention`` as its kind and the frames of a key: ``"pooled:8"`` is ("relu", 8) and
    ``"exact"`` ("relu", 1), by ``relu_attention``; ``"linear"`` and ``"summary"`` have kinds of their own.

    Raises:
        ValueError: another word, or ``p`` of ``"pooled:p"`` is not a positive integer.
    """
    if attention in ("linear", "summary"):
        return attention, 1
    if attention == "exact":
        return "relu", 1
    word, _, number = attention.partition(":") if isinstance(attention, str) else ("", "", "")
    number = number.lstrip("0") or number[:1]
    # At most a clip of all hours that there are, which fits into the ops' integers.
    if word != "pooled" or not (number.isascii() and number.isdecimal() and 0 < int(number[:12]) < 2**31):
        raise ValueError(
            "attention must be 'exact', 'pooled:p' with a positive number p of frames, 'linear' or "
            f"'summary', got {attention!r}"
        )
    return "relu", int(number)


def _taps(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Hidden states read after h_0, checked and sorted."""
    if layers is None:
        return tuple(range(1, num_layers + 1))
    if isinstance(layers, (str, int)) or any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
        raise ValueError(f"layers must be a sequence of integers from 1 to {num_layers}, got {layers!r}")
    taps = sorted(layers)
    if not taps or taps[0] < 1 or taps[-1] > num_layers or len(set(taps)) != len(taps):
        raise ValueError(
            f"layers must hold distinct integers from 1 to {num_layers} (hidden state i is the output of "
            f"encoder layer i; h_0 is always read), got {list(layers)!r}"
        )
    return tuple(taps)


class SideNetwork(nn.Module):
    """What the three side networks share: sizes, checks, initialisation, and reading the stream.

    Layers inside are never called, their parameters are read: by ``torch.nn.utils.parametrize`` these may be
    computed, but a layer of another class raises ``TypeError``, and one whose weights a forward hook computes
    ``ValueError``.

    Args:
        hidden_size: D, the backbone's width.
        num_layers: L, the number of encoder layers; there are L + 1 hidden states.
        reduction_factor: the side width is r = D // reduction_factor.
        layers: indices into the hidden states, from 1 to L, that are read besides h_0. Default: all.
        saved_activations: ``"exact"`` keeps the hidden states for the backward as they are, ``"int8"``
            and ``"fp8"`` as normalised copies in 8 bits (see ``eight_bit``: ``"int8"`` errs by a quarter of
            what ``"fp8"`` does), from which weight gradients are made; outputs are the same. The readable
            modules accept it and keep what autograd keeps.

    Raises:
        ValueError: a size is not a positive integer, ``reduction_factor`` leaves no width, ``layers`` is not
            a sequence of distinct indices in range, or ``saved_activations`` is another word.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        reduction_factor: int,
        layers: Sequence[int] | None,
        saved_activations: str = "exact",
    ) -> None:
        super().__init__()
        self.hidden_size = _positive("hidden_size", hidden_size)
        self.num_layers = _positive("num_layers", num_layers)
        self.reduction_factor = _positive("reduction_factor", reduction_factor)
        self.side_size = hidden_size // reduction_factor
        if self.side_size == 0:
            raise ValueError(
                f"reduction_factor must be at most hidden_size ({hidden_size}), got {reduction_factor}"
            )
        self.taps = _taps(layers, num_layers)
        if saved_activations not in SAVED_ACTIVATIONS:
            accepted = ", ".join(map(repr, SAVED_ACTIVATIONS))
            raise ValueError(f"saved_activations must be one of {accepted}, got {saved_activations!r}")
        self.saved_activations = saved_activations

    @property
    def last_layer(self) -> int:
        """Index of the last hidden state that is read; a streaming backbone can stop after it."""
        return self.taps[-1]

    def extra_repr(self) -> str:
        text = f"hidden_size={self.hidden_size}, num_layers={self.num_layers}, side_size={self.side_size}"
        if self.taps != tuple(range(1, self.num_layers + 1)):
            text += f", layers={list(self.taps)}"
        return text + self._saved_repr()

    def _saved_repr(self) -> str:
        return "" if self.saved_activations == "exact" else f", saved_activations={self.saved_activations!r}"

    def reset_parameters(self) -> None:
        """Linear weights N(0, 0.02^2), biases 0, LayerNorm 1 and 0, gates 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            for name, parameter in module.named_parameters(recurse=False):
                if name == "gate":
                    nn.init.zeros_(parameter)

    def read(self, hidden_states: Iterable[Tensor | HiddenState]) -> Iterator[HiddenState]:
        """Yields h_0 and the tapped hidden states, checked, and pulls nothing after the last of them.

        Raises:
            TypeError: an entry is neither a floating-point tensor nor a ``HiddenState``.
            ValueError: too few or too many entries, or an entry of another shape, type or device than h_0.
        """
        stacked = isinstance(hidden_states, Tensor) and hidden_states.ndim == 4  # (L + 1, B, T, D)
        if isinstance(hidden_states, Tensor) and not stacked:
            raise TypeError(
                "hidden_states must be an iterable of tensors (B, T, D), one per layer, got one tensor of "
                f"shape {tuple(hidden_states.shape)}"
            )
        expected = self.num_layers + 1
        # Whoever stops the backbone early hands over a shorter list; a longer one is another model's.
        sized = stacked or isinstance(hidden_states, (list, tuple))
        if sized and not self.last_layer < len(hidden_states) <= expected:
            raise ValueError(
                f"hidden_states must hold {expected} tensors, the embedding output and one per layer, of "
                f"which the first {self.last_layer + 1} are read; got {len(hidden_states)}"
            )
        first, wanted, index = None, (0, *self.taps), -1
        for index, entry in enumerate(hidden_states):
            if index in wanted:
                hidden_state = entry if isinstance(entry, HiddenState) else HiddenState(entry)
                self._check(index, hidden_state.values, first)
                self._check_statistics(index, hidden_state)
                first = hidden_state.values if first is None else first
                yield hidden_state
            if index == self.last_layer:
                return
        raise ValueError(
            f"hidden_states ended after {index + 1} tensors; layers up to {self.last_layer} are read, so at "
            f"least {self.last_layer + 1} are needed"
        )

    def _check(self, index: int, hidden_state: Tensor, first: Tensor | None) -> None:
        name = f"hidden_states[{index}]"
        if not isinstance(hidden_state, Tensor):
            raise TypeError(
                f"{name} must be a tensor (B, T, {self.hidden_size}), got {type(hidden_state).__name__}"
            )
        if hidden_state.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {hidden_state.dtype}")
        if hidden_state.ndim != 3 or hidden_state.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{name} must have shape (B, T, {self.hidden_size}), got {tuple(hidden_state.shape)}"
            )
        if hidden_state.shape[1] == 0:
            raise ValueError(f"{name} must hold at least one frame, got shape {tuple(hidden_state.shape)}")
        if first is None:
            # A replica of torch.nn.DataParallel has tensors in their place.
            parameter = next(self.parameters(), None)
            if parameter is not None and hidden_state.device != parameter.device:
                raise ValueError(
                    f"{name} is on {hidden_state.device} but the parameters of {type(self).__name__} are on "
                    f"{parameter.device}; move one to the other's device"
                )
        elif hidden_state.shape != first.shape or hidden_state.dtype != first.dtype:
            raise ValueError(
                f"{name} must match hidden_states[0], {tuple(first.shape)} {first.dtype}, got "
                f"{tuple(hidden_state.shape)} {hidden_state.dtype}"
            )
        elif hidden_state.device != first.device:
            raise ValueError(f"{name} is on {hidden_state.device}, hidden_states[0] on {first.device}")

    @staticmethod
    def _check_statistics(index: int, hidden_state: HiddenState) -> None:
        for name in ("mean", "rstd"):
            value, shape = getattr(hidden_state, name), hidden_state.values.shape[:-1]
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"hidden_states[{index}].{name} must have shape {tuple(shape)}, got {tuple(value.shape)}"
                )

    def check_lengths(self, lengths: Tensor | None, like: Tensor) -> None:
        """Checks ``lengths`` against a (B, T, ...) tensor.

        Values are looked at on the CPU alone, since reading them from a GPU would stall it.

        Raises:
            TypeError: not an integer tensor.
            ValueError: not of shape (B,), on another device, or outside 1..T.
        """
        if lengths is None:
            return
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            given = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"lengths must be an int32 or int64 tensor of valid frames, got {given}")
        batch, frames = like.shape[:2]
        if lengths.shape != (batch,):
            raise ValueError(
                f"lengths must have shape ({batch},), one per utterance, got {tuple(lengths.shape)}"
            )
        if lengths.device != like.device:
            raise ValueError(f"lengths is on {lengths.device}, the hidden states on {like.device}")
        readable = type(lengths) is Tensor and lengths.device.type == "cpu"
        if readable and not torch.compiler.is_compiling() and batch:
            low, high = int(lengths.min()), int(lengths.max())
            if low < 1 or high > frames:
                raise ValueError(
                    f"lengths must lie between 1 and the {frames} frames given, got {low} to {high}"
                )


def check_memory(memory: Tensor | None, like: Tensor) -> None:
    """Checks what a decoder's network (B, U, r) listens to.

    Raises:
        ValueError: none, or not of shape (B or 1, T, r).
    """
    batch, width = like.shape[0], like.shape[-1]
    shape = None if memory is None else tuple(memory.shape)
    if shape is None or len(shape) != 3 or shape[0] not in (1, batch) or shape[2] != width:
        raise ValueError(
            f"memory must be the encoder's side state, of shape ({batch} or 1, T, {width}), got {shape}"
        )


class NormLinear(nn.Module):
    """LayerNorm(D), then Linear(D, r)."""

    def __init__(self, in_size: int, out_size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_size, eps=NORM_EPS, device=device, dtype=dtype)
        self.linear = nn.Linear(in_size, out_size, device=device, dtype=dtype)


class Adapter(nn.Module):
    """LayerNorm(r), Linear(r, a), GELU, Linear(a, r)."""

    def __init__(self, size: int, adapter_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=NORM_EPS, device=device, dtype=dtype)
        self.linear_1 = nn.Linear(size, adapter_dim, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(adapter_dim, size, device=device, dtype=dtype)


class Rung(Adapter):
    """An adapter with the gate (1,) that mixes the side state into it."""

    def __init__(self, size: int, adapter_dim: int, device=None, dtype=None) -> None:
        super().__init__(size, adapter_dim, device=device, dtype=dtype)
        self.gate = nn.Parameter(torch.empty(1, device=device, dtype=dtype))


class GatedDown(nn.Module):
    """Linear(D, r) and two Linear(r, r)."""

    def __init__(self, in_size: int, out_size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, out_size, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(out_size, out_size, device=device, dtype=dtype)
        self.linear_3 = nn.Linear(out_size, out_size, device=device, dtype=dtype)


def read_only(part: nn.Module, kind: type[nn.Module] | None = None) -> None:
    """Refuses a part that is more than its parameters, since the ops read those and nobody calls the part. Of
    forward hooks that only look on, as tools put on every module, a warning says that they do not run.

    Raises:
        TypeError: a layer of another class than ``kind``. One with ``torch.nn.utils.parametrize`` is fine.
        ValueError: forward hooks that compute weights: the old spectral_norm, weight_norm and pruning.
    """
    if (part._forward_hooks or part._forward_pre_hooks) and not torch.compiler.is_compiling():
        _refuse_or_tell(part)
    if kind is not None and type(part) is not kind and type_before_parametrizations(part) is not kind:
        raise TypeError(
            f"a layer in a side network must be a torch.nn.{kind.__name__}, got {type(part).__name__}: its "
            "parameters are read and it is never called, so that its own forward would not run"
        )


def _refuse_or_tell(part: nn.Module) -> None:
    what, why = f"{type(part).__name__} in a side network", "its parameters are read and it is never called"
    for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
        if type(hook).__module__.startswith("torch.nn.utils."):
            raise ValueError(
                f"the weights of a {what} must not be computed by {type(hook).__name__}, a forward hook: "
                f"{why}; torch.nn.utils.parametrize can compute them"
            )
    warnings.warn(f"forward hooks of a {what} do not run: {why}", stacklevel=4)


def norm_params(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a LayerNorm, in the order the ops take them.

    Raises:
        TypeError: a layer of another class. ValueError: forward hooks that compute weights. So below.
    """
    read_only(norm, nn.LayerNorm)
    return norm.weight, norm.bias


def linear_params(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a Linear, in the order the ops take them."""
    read_only(linear, nn.Linear)
    return linear.weight, linear.bias


def norm_linear_params(module: NormLinear) -> tuple[Tensor, ...]:
    """The four parameters of a ``NormLinear`` in the order the ops take them."""
    read_only(module)
    return (*norm_params(module.norm), *linear_params(module.linear))


def adapter_params(module: Adapter) -> tuple[Tensor, ...]:
    """The six parameters of an ``Adapter`` in the order the ops take them."""
    read_only(module)
    return (*norm_params(module.norm), *linear_params(module.linear_1), *linear_params(module.linear_2))


def gated_down_params(module: GatedDown) -> tuple[Tensor, ...]:
    """The six parameters of a ``GatedDown`` in the order the ops take them."""
    read_only(module)
    layers = (module.linear_1, module.linear_2, module.linear_3)
    return tuple(parameter for layer in layers for parameter in linear_params(layer))


class _Upsampled(SideNetwork):
    """A side network whose output is LN(Wu f(LN(s)) + bu) of a side state s, f being identity or ReLU.

    As a ``correction`` it is Wu LN(s) + bu, with Wu and bu zero at the start: what is added to the backbone's
    own output, which it leaves as it is until it has learned something. There is no LayerNorm behind it."""

    relu_before_up: bool
    correction: bool
    up: NormLinear
    norm: nn.LayerNorm | None

    def _build_up(self, correction: bool, device, dtype) -> None:
        self.correction = correction
        self.up = NormLinear(self.side_size, self.hidden_size, device=device, dtype=dtype)
        self.norm = (
            None if correction else nn.LayerNorm(self.hidden_size, eps=NORM_EPS, device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.correction:
            nn.init.zeros_(self.up.linear.weight)

    def state(self, hidden_states: Iterable[Tensor], lengths: Tensor | None) -> Tensor:
        """The side state (B, T, r) that the output is made from."""
        raise NotImplementedError

    def forward(self, hidden_states: Iterable[Tensor], lengths: Tensor | None = None) -> Tensor:
        """The side network's output, a replacement for the encoder's or, as a ``correction``, what is added
        to that.

        Args:
            hidden_states: h_0 to h_L, raw layer outputs (B, T, D); any iterable, consumed as a stream.
            lengths: valid frames of each utterance, (B,) integers; default all T.

        Returns:
            (B, T, D) in the hidden states' type.

        Raises:
            TypeError, ValueError: see ``read`` and ``check_lengths``.
        """
        return self.widen(self.state(hidden_states, lengths))

    def widen(self, state: Tensor) -> Tensor:
        """The output (B, T, D) from the side state (B, T, r)."""
        if self.correction:
            return norm_linear.definition(state, *norm_linear_params(self.up))
        read_only(self.up)
        normed = nn.functional.layer_norm(
            state.to(self.up.norm.weight.dtype), (self.side_size,), *norm_params(self.up.norm), NORM_EPS
        )
        up = self.up.linear(torch.relu(normed) if self.relu_before_up else normed)
        return self.norm(up).to(state.dtype)

    def pooled(self, hidden_states: Iterable[Tensor], lengths: Tensor | None = None) -> Tensor:
        """The mean of ``forward`` over each utterance's valid frames, (B, D); arguments as there.

        Raises:
            ValueError: of a ``correction``, as which it has no mean of its own.
        """
        state = self.state(hidden_states, lengths)
        return pooled_upsample.definition(state, *self.pool_params(), lengths, self.relu_before_up)

    def pool_params(self) -> tuple[Tensor, ...]:
        if self.correction:
            raise ValueError(
                "pooled is for correction=False: a correction is added to an output frame by frame"
            )
        return (*norm_linear_params(self.up), *norm_params(self.norm))


class LST(_Upsampled):
    """Ladder Side-Tuning (arXiv 2206.06522) in the form that arXiv 2512.02074 gives it for Whisper.

        s_0 = W0 LN(h_0) + b0
        m_i = g_i s_{i-1} + (1 - g_i) (Wd_i LN(h_i) + bd_i),   g_i = sigmoid(gate_i / 0.1)
        s_i = m_i + W2_i gelu(W1_i LN(m_i) + b1_i) + b2_i
        out = LN(Wu LN(s_L) + bu)

    Args:
        hidden_size, num_layers, reduction_factor, layers, saved_activations: see ``SideNetwork``. A layer
            left out of ``layers`` has no rung.
        adapter_dim: width of each rung's adapter.
        correction: ``out = Wu LN(s_L) + bu``, zero at the start, to be added to the backbone's own output.
        device, dtype: of the parameters; fp32 masters are meant to be kept beside half-precision states.
    """

    relu_before_up = False

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        reduction_factor: int = 8,
        adapter_dim: int = 256,
        layers: Sequence[int] | None = None,
        saved_activations: str = "exact",
        correction: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_layers, reduction_factor, layers, saved_activations)
        self.adapter_dim = _positive("adapter_dim", adapter_dim)
        place = {"device": device, "dtype": dtype}
        size, rungs = self.side_size, len(self.taps)
        self.down = nn.ModuleList(NormLinear(hidden_size, size, **place) for _ in range(rungs + 1))
        self.rungs = nn.ModuleList(Rung(size, adapter_dim, **place) for _ in range(rungs))
        self._build_up(correction, **place)
        self.reset_parameters()

    def state(self, hidden_states: Iterable[Tensor], lengths: Tensor | None) -> Tensor:
        """s_L, (B, T, r)."""
        stream = (hidden_state.values for hidden_state in self.read(hidden_states))
        first = next(stream)
        self.check_lengths(lengths, first)
        state = norm_linear.definition(first, *norm_linear_params(self.down[0]))
        for hidden_state, down, rung in zip(stream, self.down[1:], self.rungs):
            state = ladder.definition(
                hidden_state, state, *norm_linear_params(down), rung.gate, *adapter_params(rung)
            )
        return state


class UniPT(_Upsampled):
    """Universal Parallel Tuning (arXiv 2308.14316) in the form that arXiv 2512.02074 gives it for Whisper.

        F_i = W_i LN(h_i) + b_i;   A = F_L
        M_i = rowl1(relu(A F_i^T)) F_i + F_i,  i < L;   G = sum_i softmax_i(w . (mean A * mean F_i) + b) M_i
        Z = A + W2 gelu(W1 LN(G) + b1) + b2;   out = LN(Wu relu(LN(Z)) + bu)

    The anchor A comes from the last tapped layer. With ``lengths`` the means, scores and row sums run over
    valid frames.

    Args:
        hidden_size, num_layers, reduction_factor, layers, saved_activations, correction, device, dtype: see
            ``LST``. The correction has no ReLU: ``out = Wu LN(Z) + bu``.
        attention: how M_i is made of A and F_i: ``"exact"`` as published, whose work grows with the square of
            the length; ``"pooled:p"`` with keys that are means of p frames (``reference.relu_attention``), a
            p-th of it; ``"linear"`` with the ReLU before the product (``reference.linear_attention``);
            ``"summary"`` with the features' mean over time in the place of what is attended to
            (``reference.summary_attention``). Parameters are the same, so that what was trained with one can
            be run with another.

    Raises:
        ValueError: see ``SideNetwork``, or ``attention`` is none of these.
    """

    relu_before_up = True
    causal = False  # whether time runs one way, as beside a decoder

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        reduction_factor: int = 8,
        layers: Sequence[int] | None = None,
        saved_activations: str = "exact",
        correction: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "exact",
    ) -> None:
        super().__init__(hidden_size, num_layers, reduction_factor, layers, saved_activations)
        self.attention = attention
        place = {"device": device, "dtype": dtype}
        size = self.side_size
        self.down = nn.ModuleList(NormLinear(hidden_size, size, **place) for _ in range(len(self.taps) + 1))
        # No attribute here is called "gate": reset_parameters zeroes bare gates, and this one is a Linear.
        self.gate = nn.Linear(size, 1, **place)
        self.adapter = Adapter(size, hidden_size, **place)
        self._build_up(correction, **place)
        self.reset_parameters()

    @property
    def attention(self) -> str:
        """May be set to another word at any time.

        Raises:
            ValueError: when set to another word than the class takes.
        """
        return self.__dict__["attention"]

    @attention.setter
    def attention(self, attention: str) -> None:
        parsed = parse_attention(attention)
        if self.causal and parsed != ("relu", 1):
            raise ValueError(
                f"attention must be 'exact' where no token may see what follows it, got {attention!r}"
            )
        self.__dict__["attention"], self._attention = attention, parsed

    def state(self, hidden_states: Iterable[Tensor], lengths: Tensor | None) -> Tensor:
        """Z, (B, T, r)."""
        features = []
        for down, hidden_state in zip(self.down, self.read(hidden_states), strict=True):
            features.append(norm_linear.definition(hidden_state.values, *norm_linear_params(down)))
        *features, anchor = features
        self.check_lengths(lengths, anchor)
        merged = self.merge(anchor, features, lengths)
        return anchor + adapter.definition(merged, *adapter_params(self.adapter))

    def merge(self, anchor: Tensor, features: list[Tensor], lengths: Tensor | None) -> Tensor:
        """G (B, T, r) from A and F_0 .. F_{L-1}, by ``attention``."""
        given = (anchor, *linear_params(self.gate), lengths, features)
        kind, pool = self._attention
        if kind == "relu":
            return relu_attention.definition(*given, pool)
        return (linear_attention if kind == "linear" else summary_attention).definition(*given)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.attention == "exact" else f"{text}, attention={self.attention!r}"


class CausalUniPT(UniPT):
    """``UniPT`` beside a decoder, where no token may see what follows it: see ``reference.causal_attention``.

        F_i = W_i LN(d_i) + b_i;   A = F_L;   G = causal_attention(A, F_0 .. F_{L-1})
        Z = A + W2 gelu(W1 LN(G) + b1) + b2;   out as UniPT's

    Args:
        as ``UniPT``; ``attention`` is always ``"exact"``.
    """

    causal = True

    def state(
        self,
        hidden_states: Iterable[Tensor],
        lengths: Tensor | None,
        past: Callable[[list[Tensor]], list[Tensor]] | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Z, (B, U, r).

        Args:
            hidden_states, lengths: as ``forward``'s. past: given the features F_0 .. F_{L-1}, each (B, U, r),
                of these tokens, gives those of all tokens so far, (B, K, r); None: there are no others.
            valid: (B, K), true for tokens that may be looked at; None: all.
        """
        *features, anchor = self.features(hidden_states)
        self.check_lengths(lengths, anchor)
        return self.attend(anchor, features, past, valid)

    def attend(
        self,
        anchor: Tensor,
        features: list[Tensor],
        past: Callable[[list[Tensor]], list[Tensor]] | None,
        valid: Tensor | None,
    ) -> Tensor:
        """Z, (B, U, r), from A and F_0 .. F_{L-1}."""
        keys = None if past is None else past(features)
        gate = linear_params(self.gate)
        merged = causal_attention.definition(anchor, *gate, features, keys, valid)
        return anchor + self.adapt(merged)

    def features(self, hidden_states: Iterable[Tensor]) -> list[Tensor]:
        """F_0 to F_L, each (B, U, r)."""
        stream = zip(self.down, self.read(hidden_states), strict=True)
        return [norm_linear.definition(state.values, *norm_linear_params(down)) for down, state in stream]

    def adapt(self, merged: Tensor) -> Tensor:
        """W2 gelu(W1 LN(G) + b1) + b2, (B, U, r)."""
        return adapter.definition(merged, *adapter_params(self.adapter))

    def pool_params(self) -> tuple[Tensor, ...]:
        raise ValueError("pooled is not for CausalUniPT: each token's output is its own")


class SHERL(SideNetwork):
    """SHERL (arXiv 2407.07523) in the form that arXiv 2512.02074 gives it for Whisper.

        p_i = relu(V1_i h_i + a1_i);   z_i = (V2_i p_i + a2_i + p_i) * sigmoid(V3_i p_i + a3_i),  i = 0..L-1
        y = redundancy-guided sum of z_0..z_{L-2} plus z_{L-1}     (see ``reference.guidance``)
        x = Wo relu(y) + bo + tanh(gate / 0.1) h_{L-1}

    x is the input of the frozen last encoder layer, through which gradients flow back to this module. h_L is
    not read. With the gate at its initial 0, h_{L-1} does not reach the last layer at step 0, as in the
    published code.

    The published start is ill-conditioned: scores e = relu(w . (z * q) + b) / rho begin near 0 on either side
    of the kink, and their gradient goes with 1 / (sum e + 1e-6), up to a million times larger on the frames
    where all of them are small. Other starts leave the formula as it is and set b to 1, so that the weights
    begin at about 1 / rho each. With its shut gate the last layer hears a small new input alone, which a high
    learning rate may drive into one direction for all frames; ``"zero_shot"`` did not show that.

    Args:
        hidden_size, num_layers, reduction_factor, saved_activations, device, dtype: see ``LST``.
        start: of the parameters: ``"published"``; ``"even"`` with b = 1; ``"zero_shot"`` with b = 1, an open
            gate, where tanh(gate / 0.1) is 1, and Wo and bo zero, so that x = h_{L-1} until it has learned
            something.

    Raises:
        ValueError: see ``SideNetwork``, or ``start`` is another word.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        reduction_factor: int = 8,
        saved_activations: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        start: str = "published",
    ) -> None:
        super().__init__(hidden_size, num_layers, reduction_factor, None, saved_activations)
        self.start = start
        self.taps = tuple(range(1, num_layers))
        place = {"device": device, "dtype": dtype}
        size = self.side_size
        self.down = nn.ModuleList(GatedDown(hidden_size, size, **place) for _ in range(num_layers))
        self.guide = nn.Linear(size, 1, **place)
        self.out = nn.Linear(size, hidden_size, **place)
        self.gate = nn.Parameter(torch.empty(1, **place))
        self.reset_parameters()

    @property
    def start(self) -> str:
        """May be set to another word at any time, for the next ``reset_parameters``.

        Raises:
            ValueError: when set to another word than the class takes.
        """
        return self.__dict__["start"]

    @start.setter
    def start(self, start: str) -> None:
        if start not in SHERL_STARTS:
            accepted = " or ".join(map(repr, SHERL_STARTS))
            raise ValueError(f"start must be {accepted}, got {start!r}")
        self.__dict__["start"] = start

    def reset_parameters(self) -> None:
        """As ``SideNetwork.reset_parameters``, and what ``start`` says."""
        super().reset_parameters()
        if self.start != "published":
            nn.init.ones_(self.guide.bias)
        if self.start == "zero_shot":
            nn.init.constant_(self.gate, OPEN_GATE)
            nn.init.zeros_(self.out.weight)

    @property
    def last_layer(self) -> int:
        """Index of the last hidden state that is read: h_{L-1}."""
        return self.num_layers - 1

    def extra_repr(self) -> str:
        sizes = f"hidden_size={self.hidden_size}, num_layers={self.num_layers}, side_size={self.side_size}"
        return sizes + self._saved_repr()

    def forward(self, hidden_states: Iterable[Tensor], lengths: Tensor | None = None) -> Tensor:
        """The input of the last encoder layer.

        Args:
            hidden_states: h_0 to h_{L-1}, raw layer outputs (B, T, D); any iterable, consumed as a stream.
            lengths: accepted for a uniform interface and checked; every frame is computed on its own.

        Returns:
            (B, T, D) in the hidden states' type.

        Raises:
            TypeError, ValueError: see ``read`` and ``check_lengths``.
        """
        features = []
        for down, hidden_state in zip(self.down, self.read(hidden_states), strict=True):
            features.append(gated_down.definition(hidden_state.values, *gated_down_params(down)))
        self.check_lengths(lengths, hidden_state.values)
        merged = guidance.definition(*linear_params(self.guide), features)
        return gated_up.definition(hidden_state.values, merged, *linear_params(self.out), self.gate)
