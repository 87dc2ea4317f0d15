"""Options of the methods that train inside the encoder: what the side networks are compared with."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .config_base import (
    MeftConfig,
    check_boolean,
    check_number_from_0,
    check_positive_int,
    check_positive_number,
    check_share,
)
from .errors import UserError
from .pooling import LastState

if TYPE_CHECKING:
    from .encoder import FrozenEncoder
    from .tuned_encoder import TunedEncoder


def _targets(value: Any) -> list[str]:
    known = "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"target_modules must be a non-empty list out of {', '.join(known)}, got {value!r}")
    for name in value:
        if name not in known:
            raise UserError(f"target_modules must be out of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(value))


@dataclass(kw_only=True)
class TunedEncoderConfig(MeftConfig):
    """Options of the methods that train inside the encoder, and so backpropagate through it."""

    frozen_encoder: ClassVar[bool] = False
    final_norm: ClassVar[bool] = True

    def build_encoder(self, whisper_encoder: nn.Module) -> "FrozenEncoder":
        from .tuned_encoder import TunedEncoder

        dtype = self.backbone_dtype
        if self.trains_backbone and next(whisper_encoder.parameters()).dtype != torch.float64:
            dtype = "float32"
        return TunedEncoder(whisper_encoder, dtype, self.prepare_encoder)

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return LastState()

    def prepare_encoder(self, encoder: "TunedEncoder") -> None:
        """Unfreezes parameters of a frozen encoder, or puts trained modules into it."""
        raise NotImplementedError


_CONVOLUTIONS = "Whether conv1 and conv2 train too, which keeps their large activations."


@dataclass(kw_only=True)
class FullConfig(TunedEncoderConfig):
    """Full fine-tuning: every parameter of the encoder but its positions, which are constants, in float32."""

    method: ClassVar[str] = "full"
    trains_backbone: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    train_convolutions: bool = field(default=True, metadata={"help": _CONVOLUTIONS})

    def validate(self) -> None:
        super().validate()
        check_boolean("train_convolutions", self.train_convolutions)

    def prepare_encoder(self, encoder: "TunedEncoder") -> None:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(self.trains(name))

    def trains(self, name: str) -> bool:
        """Whether the encoder's parameter of this name trains."""
        if name.startswith("conv"):
            return self.train_convolutions
        return not name.startswith("embed_positions")


@dataclass(kw_only=True)
class BitFitConfig(FullConfig):
    """BitFit (arXiv 2106.10199): the encoder's bias vectors, those of its LayerNorms included."""

    method: ClassVar[str] = "bitfit"

    def trains(self, name: str) -> bool:
        return name.endswith("bias") and super().trains(name)


@dataclass(kw_only=True)
class MeZOConfig(FullConfig):
    """MeZO (arXiv 2305.17333): full fine-tuning by forward passes alone; needs
    :class:`whisper_meft.MeftTrainer`."""

    method: ClassVar[str] = "mezo"

    eps: float = field(
        default=1e-3,
        metadata={"help": "How far from the weights the loss is measured, in units of the random direction."},
    )

    def validate(self) -> None:
        super().validate()
        check_positive_number("eps", self.eps)


@dataclass(kw_only=True)
class AdapterConfig(TunedEncoderConfig):
    """Bottleneck adapters (arXiv 1902.00751) after the attention and the feed-forward block of each layer."""

    method: ClassVar[str] = "adapter"

    adapter_dim: int = field(default=64, metadata={"help": "Inner width of each adapter."})

    def validate(self) -> None:
        super().validate()
        check_positive_int("adapter_dim", self.adapter_dim)

    def prepare_encoder(self, encoder: "TunedEncoder") -> None:
        from .adapters import add_adapters

        add_adapters(encoder, self.adapter_dim, torch.float32)


_TARGETS = "Names of the encoder's linear layers that are adapted."


@dataclass(kw_only=True)
class UpdateConfig(TunedEncoderConfig):
    """Options of the methods that add a low-rank update to weights, the LoRA family."""

    can_merge: ClassVar[bool] = True

    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": _TARGETS}
    )

    def validate(self) -> None:
        super().validate()
        self.target_modules = _targets(self.target_modules)


@dataclass(kw_only=True)
class LoRAConfig(UpdateConfig):
    """LoRA (arXiv 2106.09685) by peft: W + lora_alpha / r * B A, with B zero at the start."""

    method: ClassVar[str] = "lora"

    r: int = field(default=64, metadata={"help": "Rank of the update of each adapted weight."})
    lora_alpha: float = field(
        default=512, metadata={"help": "The update is scaled by this number divided by the rank."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Share of the update's inputs that are dropped in training."}
    )

    def validate(self) -> None:
        super().validate()
        check_positive_int("r", self.r)
        check_positive_number("lora_alpha", self.lora_alpha)
        check_share("lora_dropout", self.lora_dropout)

    def prepare_encoder(self, encoder: "TunedEncoder") -> None:
        from .lora import add_lora

        add_lora(encoder, self)


@dataclass(kw_only=True)
class LoRAPlusConfig(LoRAConfig):
    """LoRA+ (arXiv 2402.12354): LoRA whose B learns faster than its A; needs
    :class:`whisper_meft.MeftTrainer`."""

    method: ClassVar[str] = "lora_plus"

    loraplus_lr_ratio: float = field(
        default=16.0, metadata={"help": "Learning rate of B divided by that of A and of the head."}
    )

    def validate(self) -> None:
        super().validate()
        check_positive_number("loraplus_lr_ratio", self.loraplus_lr_ratio)


@dataclass(kw_only=True)
class AdaLoRAConfig(UpdateConfig):
    """AdaLoRA (arXiv 2303.10512) by peft: an update in the form of a singular value decomposition whose ranks
    are allocated by importance while it trains; needs :class:`whisper_meft.MeftTrainer`."""

    method: ClassVar[str] = "adalora"

    init_r: int = field(default=256, metadata={"help": "Rank of each update at the start."})
    target_r: int = field(default=64, metadata={"help": "Mean rank of the updates at the end."})
    lora_alpha: float = field(
        default=512, metadata={"help": "The update is scaled by this number divided by init_r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Share of the update's inputs that are dropped in training."}
    )
    tinit: int | None = field(
        default=None,
        metadata={"help": "Steps before ranks fall; unset: 1000, or a tenth of the run if that is less."},
    )
    tfinal: int | None = field(
        default=None, metadata={"help": "Steps at the end with fixed ranks; unset: a tenth of the run."}
    )
    allocation_interval: int = field(default=10, metadata={"help": "Steps between two allocations."})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "Weight of the penalty that keeps the factors orthogonal."}
    )

    def validate(self) -> None:
        super().validate()
        for name in ("init_r", "target_r", "allocation_interval"):
            check_positive_int(name, getattr(self, name))
        if self.target_r >= self.init_r:
            raise UserError(f"target_r must be below init_r, {self.init_r}, got {self.target_r}")
        check_positive_number("lora_alpha", self.lora_alpha)
        check_share("lora_dropout", self.lora_dropout)
        for name in ("tinit", "tfinal"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise UserError(f"{name} must be None or an integer of at least 0, got {value!r}")
        check_number_from_0("orth_reg_weight", self.orth_reg_weight)

    def prepare_encoder(self, encoder: "TunedEncoder") -> None:
        from .adalora import add_adalora

        add_adalora(encoder, self)

    def penalty(self, encoder: nn.Module) -> torch.Tensor:
        from .adalora import orthogonality_penalty

        return self.orth_reg_weight * orthogonality_penalty(encoder)


@dataclass(kw_only=True)
class S2LoRAConfig(UpdateConfig):
    """S2-LoRA (arXiv 2309.11756): low-rank factors shared by all weights of a shape, sparse rank coefficients
    for each weight."""

    method: ClassVar[str] = "s2_lora"

    r: int = field(default=64, metadata={"help": "Rank of the shared factors."})
    lora_alpha: float = field(
        default=512, metadata={"help": "The update is scaled by this number divided by the rank."}
    )
    l1_weight: float = field(
        default=1e-4,
        metadata={"help": "Weight in the loss of the sum of the rank coefficients' absolute values."},
    )

    def validate(self) -> None:
        super().validate()
        check_positive_int("r", self.r)
        check_positive_number("lora_alpha", self.lora_alpha)
        check_number_from_0("l1_weight", self.l1_weight)

    def prepare_encoder(self, encoder: "TunedEncoder") -> None:
        from .s2_lora import add_s2_lora

        add_s2_lora(encoder, self.target_modules, self.r, self.lora_alpha / self.r, torch.float32)

    def penalty(self, encoder: nn.Module) -> torch.Tensor:
        from .s2_lora import l1_penalty

        return self.l1_weight * l1_penalty(encoder)
