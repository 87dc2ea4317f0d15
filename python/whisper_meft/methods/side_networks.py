"""The side networks beside a frozen encoder: LST, UniPT and SHERL."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

import meft_kernels
from meft_kernels.reference import SAVED_ACTIVATIONS, SHERL_STARTS, parse_attention

from ..errors import UserError
from .base import MeftConfig
from .checks import check_positive_int

PLACEMENTS = ("encoder", "decoder", "both")

_LAYERS_HELP = (
    "Layers to tap, of the encoder or of the part that placement names: their numbers from 1; 'every:k' for "
    "the last layer and every k-th before it; 'last:n' for the last n. Unset taps all. The embedding is "
    "always read, and layers of a classifier's encoder behind the last tapped one are not run."
)


def _rule(text: str) -> tuple[str, int]:
    """``"every:3"`` as ("every", 3)."""
    word, _, number = text.partition(":")
    if word not in ("every", "last") or not number.isdecimal() or int(number) < 1:
        raise UserError(
            "layers must be None, a list of layer numbers, 'every:k' or 'last:n' with a positive integer, "
            f"got {text!r}"
        )
    return word, int(number)


def tapped_layers(layers: list[int] | str | None, num_layers: int) -> list[int] | None:
    """The layer numbers that ``layers`` of a config stands for, in a backbone of ``num_layers``.

    Raises:
        UserError: 'every:k' or 'last:n' of more layers than there are.
    """
    if not isinstance(layers, str):
        return layers
    word, number = _rule(layers)
    if number > num_layers:
        raise UserError(f"layers={layers!r} asks for more than the backbone's {num_layers} layers")
    if word == "last":
        return list(range(num_layers - number + 1, num_layers + 1))
    return list(range(num_layers, 0, -number))[::-1]


@dataclass(kw_only=True)
class SideNetworkConfig(MeftConfig):
    """Options of the methods that put a narrow network beside a frozen encoder or decoder."""

    transcribes: ClassVar[bool] = True
    # Whether it stands beside encoder and decoder at once, too.
    makes_pairs: ClassVar[bool] = False

    reduction_factor: int = field(
        default=8,
        metadata={"help": "Width of the side network: the backbone's width divided by this, rounded down."},
    )
    saved_activations: str = field(
        default="exact",
        metadata={
            "help": "How hidden states are kept for the backward: 'exact' as they are, 'int8' and 'fp8' as "
            "normalised copies of 8 bits, from which the weight gradients are made (half the memory); 'int8' "
            "errs by a quarter of what 'fp8' does."
        },
    )
    chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Clips that the backbone and the side network take at a time within a step; the result "
            "is the same. Unset chooses by the length of the clips and the device."
        },
    )

    placement: str = field(
        default="encoder",
        metadata={
            "help": "Where the side network stands: of a recogniser 'encoder' corrects what the decoder "
            "hears, 'decoder' what it writes, 'both' (lst and unipt) what it writes, by a hearing of its "
            "own; a classifier has an encoder alone."
        },
    )

    def build_correction(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        """The side network of a recogniser, which adds to the output of the encoder or the decoder: new,
        float32, such that it adds nothing yet. Arguments as for :meth:`build_side_network`, of the part that
        it reads."""
        raise NotImplementedError

    def build_pair(
        self, hidden_size: int, encoder_layers: int, decoder_layers: int, **place: Any
    ) -> meft_kernels.SidePair:
        """The side networks of a recogniser with ``placement="both"``, new, float32, such that they add
        nothing yet."""
        raise NotImplementedError

    def validate(self) -> None:
        super().validate()
        if self.placement not in PLACEMENTS:
            accepted = " or ".join(map(repr, PLACEMENTS))
            raise UserError(f"placement must be {accepted}, got {self.placement!r}")
        if self.placement == "both" and not self.makes_pairs:
            raise UserError(f"placement must be 'encoder' or 'decoder' for {self.method}, got 'both'")
        if self.placement == "both" and getattr(self, "layers", None) is not None:
            raise UserError(f"layers must be None for placement='both', which reads all, got {self.layers!r}")
        check_positive_int("reduction_factor", self.reduction_factor)
        if self.saved_activations not in SAVED_ACTIVATIONS:
            accepted = ", ".join(map(repr, SAVED_ACTIVATIONS))
            raise UserError(f"saved_activations must be one of {accepted}, got {self.saved_activations!r}")
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)
        layers = getattr(self, "layers", None)
        if isinstance(layers, str):
            _rule(layers)
        elif layers is not None:
            if not isinstance(layers, (list, tuple)) or not layers:
                raise UserError(
                    "layers must be None or a non-empty list of layer numbers, 'every:k' or 'last:n', got "
                    f"{layers!r}"
                )
            for layer in layers:
                check_positive_int("every entry of layers", layer)
            if sorted(set(layers)) != list(layers):
                raise UserError(f"layers must be in increasing order without repeats, got {list(layers)}")
            self.layers = list(layers)

    def check_backbone(self, hidden_size: int, num_layers: int, max_source_positions: int) -> None:
        super().check_backbone(hidden_size, num_layers, max_source_positions)
        if hidden_size // self.reduction_factor < 1:
            raise UserError(
                f"reduction_factor must be at most {hidden_size}, the backbone's width, got "
                f"{self.reduction_factor}"
            )
        layers = tapped_layers(getattr(self, "layers", None), num_layers)
        if layers and layers[-1] > num_layers:
            raise UserError(f"layers must lie in 1..{num_layers}, the backbone's layers, got {layers}")


@dataclass(kw_only=True)
class LSTConfig(SideNetworkConfig):
    """Ladder Side-Tuning: a narrow ladder beside the encoder, one gated rung per layer."""

    method: ClassVar[str] = "lst"
    makes_pairs: ClassVar[bool] = True

    adapter_dim: int = field(default=256, metadata={"help": "Inner width of each rung's adapter."})
    layers: list[int] | str | None = field(default=None, metadata={"help": _LAYERS_HELP})

    def validate(self) -> None:
        super().validate()
        check_positive_int("adapter_dim", self.adapter_dim)

    def build_pair(
        self, hidden_size: int, encoder_layers: int, decoder_layers: int, **place: Any
    ) -> meft_kernels.SidePair:
        sizes = {"reduction_factor": self.reduction_factor, "adapter_dim": self.adapter_dim, **place}
        memory = meft_kernels.LadderMemory(
            hidden_size, encoder_layers, saved_activations=self.saved_activations, **sizes
        )
        return meft_kernels.SidePair(memory, meft_kernels.LadderDecoder(hidden_size, decoder_layers, **sizes))

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return meft_kernels.LST(
            hidden_size,
            num_layers,
            reduction_factor=self.reduction_factor,
            adapter_dim=self.adapter_dim,
            layers=tapped_layers(self.layers, num_layers),
            saved_activations=self.saved_activations,
            **place,
        )

    def build_correction(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return self.build_side_network(hidden_size, num_layers, correction=True, **place)


@dataclass(kw_only=True)
class UniPTConfig(SideNetworkConfig):
    """Universal Parallel Tuning: attention of the last tapped layer over all others, weighted by
    confidence."""

    method: ClassVar[str] = "unipt"
    makes_pairs: ClassVar[bool] = True
    # A softmax does not see a shift.
    without_gradient: ClassVar[tuple[str, ...]] = (
        "side_network.gate.bias",
        "side_network.memory.gate.bias",
        "side_network.decoder.gate.bias",
    )

    layers: list[int] | str | None = field(default=None, metadata={"help": _LAYERS_HELP})
    attention: str = field(
        default="exact",
        metadata={
            "help": "How frames attend to those of other layers: 'exact' as published, work with the square "
            "of the length; 'pooled:p' to means of p frames, a p-th of it; 'linear' with the ReLU before the "
            "product, linear in the length; 'summary' to the mean over time alone. What was trained with one "
            "can be run with another. Of placement='both' that beside the encoder; beside a decoder 'exact'."
        },
    )

    def validate(self) -> None:
        super().validate()
        try:
            is_exact = parse_attention(self.attention) == parse_attention("exact")
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.placement == "decoder" and not is_exact:
            raise UserError(
                "attention must be 'exact' for placement='decoder', where no token may see what follows it, "
                f"got {self.attention!r}"
            )

    def build_pair(
        self, hidden_size: int, encoder_layers: int, decoder_layers: int, **place: Any
    ) -> meft_kernels.SidePair:
        options = {"reduction_factor": self.reduction_factor, "saved_activations": self.saved_activations}
        memory = {**options, "attention": self.attention}
        return meft_kernels.SidePair(
            meft_kernels.UniPTMemory(hidden_size, encoder_layers, **memory, **place),
            meft_kernels.UniPTDecoder(hidden_size, decoder_layers, **options, **place),
        )

    def build_correction(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return self.build_side_network(hidden_size, num_layers, correction=True, **place)

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        # Beside a decoder no token may see the next.
        kind = meft_kernels.UniPT if self.placement == "encoder" else meft_kernels.CausalUniPT
        return kind(
            hidden_size,
            num_layers,
            reduction_factor=self.reduction_factor,
            layers=tapped_layers(self.layers, num_layers),
            saved_activations=self.saved_activations,
            attention=self.attention,
            **place,
        )


@dataclass(kw_only=True)
class SHERLConfig(SideNetworkConfig):
    """SHERL: merges all but the last layer's output into a new input of the last encoder layer."""

    method: ClassVar[str] = "sherl"
    through_last_layer: ClassVar[bool] = True

    start: str | None = field(
        default=None,
        metadata={
            "help": "Where it starts: 'published'; 'even' with the layers' scores away from zero, where the "
            "published start's gradient is ill-conditioned; 'zero_shot' the same, and the last layer reads "
            "what it always read. Unset is 'published' for classification and 'zero_shot' for recognition."
        },
    )

    def validate(self) -> None:
        super().validate()
        if self.start not in (None, *SHERL_STARTS):
            raise UserError(f"start must be None, {' or '.join(map(repr, SHERL_STARTS))}, got {self.start!r}")

    def build_correction(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return self._build(hidden_size, num_layers, self.start or "zero_shot", **place)

    def check_backbone(self, hidden_size: int, num_layers: int, max_source_positions: int) -> None:
        super().check_backbone(hidden_size, num_layers, max_source_positions)
        if num_layers < 2:
            raise UserError(f"sherl needs a backbone of at least 2 layers, got {num_layers}")

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return self._build(hidden_size, num_layers, self.start or "published", **place)

    def _build(self, hidden_size: int, num_layers: int, start: str, **place: Any) -> nn.Module:
        return meft_kernels.SHERL(
            hidden_size,
            num_layers,
            reduction_factor=self.reduction_factor,
            saved_activations=self.saved_activations,
            start=start,
            **place,
        )
