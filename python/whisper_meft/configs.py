"""What a user chooses about a method: one dataclass per method.

The classes follow PEFT's habits: keyword arguments with defaults, every field documented in its metadata,
plain JSON on disk. Every value is checked when a config is made, so a mistake is reported where it was typed.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

import meft_kernels
from meft_kernels.reference import SAVED_ACTIVATIONS

from .errors import UserError
from .files import read_json, write_json
from .pooling import LastState, WeightedSum

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

if TYPE_CHECKING:
    from .encoder import FrozenEncoder
    from .tuned_encoder import TunedEncoder

_METHODS: dict[str, type["MeftConfig"]] = {}


def parse_dtype(value: str | torch.dtype | None, argument: str = "dtype") -> torch.dtype | None:
    """Turns ``"bfloat16"``, ``"torch.bfloat16"`` or ``torch.bfloat16`` into the dtype; ``None`` stays
    ``None``.

    Raises:
        UserError: anything but float32, bfloat16, float16 and float64.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{argument} must be one of {', '.join(DTYPES)} or None, got {value!r}")
    return DTYPES[name]


def _positive_int(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{argument} must be a positive integer, got {value!r}")


def _positive_number(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"{argument} must be a finite number above 0, got {value!r}")


def _share(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{argument} must be a number from 0 to below 1, got {value!r}")


def _boolean(argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{argument} must be True or False, got {value!r}")


def _targets(value: Any) -> list[str]:
    known = "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"target_modules must be a non-empty list out of {', '.join(known)}, got {value!r}")
    for name in value:
        if name not in known:
            raise UserError(f"target_modules must be out of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(value))


@dataclass(kw_only=True)
class MeftConfig:
    """Options that all methods share. Make one of the subclasses, or call :meth:`from_dict`.

    Raises:
        UserError: a value that cannot be used, named with what is accepted.
    """

    method: ClassVar[str] = ""
    # SHERL's gradient crosses the last encoder layer; the other side networks never touch the backbone again.
    through_last_layer: ClassVar[bool] = False
    # Whether the backbone is one that no gradient enters: it then runs in chunks of the batch.
    frozen_encoder: ClassVar[bool] = True
    chunk_size: ClassVar[int | None] = None
    # Whether h_L is read after the encoder's final LayerNorm (as transformers' classifier does) or before it.
    final_norm: ClassVar[bool] = False
    # The backbone's own weights train: they are float32 masters.
    trains_backbone: ClassVar[bool] = False
    # The result is an encoder of the backbone's own form, so a plain Whisper classifier can be made of it.
    can_merge: ClassVar[bool] = False

    max_frames: int | str = field(
        default="fidelity",
        metadata={
            "help": "Encoder frames (20 ms each) to compute per clip: 'fidelity' is the backbone's whole "
            "window with padding treated as sound, as published; 'longest' is the longest clip of the "
            "batch; a number is the most frames per clip. The last two ignore padding."
        },
    )
    backbone_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Number format of the frozen backbone's weights: float32, bfloat16, float16 or "
            "float64; unset keeps the one it was loaded in. What trains stays in float32."
        },
    )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.method:
            _METHODS[cls.method] = cls

    @staticmethod
    def methods() -> dict[str, type["MeftConfig"]]:
        """The config class of every method by its name."""
        return dict(_METHODS)

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """Checks every field; see the class for what is raised."""
        if not self.method:
            raise UserError(
                f"{type(self).__name__} is a base class, use "
                f"{' or '.join(c.__name__ for c in _METHODS.values())}"
            )
        if isinstance(self.max_frames, str) and self.max_frames.isdecimal():
            self.max_frames = int(self.max_frames)  # what a command line hands over
        if self.max_frames not in ("fidelity", "longest"):
            if isinstance(self.max_frames, str):
                raise UserError(
                    f"max_frames must be 'fidelity', 'longest' or a positive integer, got {self.max_frames!r}"
                )
            _positive_int("max_frames", self.max_frames)
        dtype = parse_dtype(self.backbone_dtype, "backbone_dtype")
        self.backbone_dtype = None if dtype is None else str(dtype).removeprefix("torch.")
        if self.trains_backbone and dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"backbone_dtype must be None or float32 for {self.method}, which trains the backbone's own "
                f"weights, got {self.backbone_dtype}; train under autocast (bf16 or fp16) instead"
            )

    def check_backbone(self, hidden_size: int, num_layers: int, max_source_positions: int) -> None:
        """Checks the options that depend on the backbone.

        Args:
            hidden_size: width of the encoder. num_layers: its layers. max_source_positions: its window in
                frames.

        Raises:
            UserError: the side network would have no width, a layer does not exist, or the window is too
                short.
        """
        if isinstance(self.max_frames, int) and self.max_frames > max_source_positions:
            raise UserError(
                f"max_frames must be at most {max_source_positions}, the backbone's window, got "
                f"{self.max_frames}"
            )

    def build_encoder(self, whisper_encoder: nn.Module) -> "FrozenEncoder":
        """The encoder that the method reads; shares its modules with ``whisper_encoder``."""
        from .encoder import FrozenEncoder

        return FrozenEncoder(whisper_encoder, dtype=self.backbone_dtype)

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        """What turns the hidden states of an encoder of this width and depth into the clip's vector: a new
        side network, float32, initialised as published, or what takes its place."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All options and the method's name as plain JSON values; :meth:`from_dict` reads it back."""
        return {"method": self.method, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MeftConfig":
        """Makes the config that ``values`` describes.

        Args:
            values: options by name. ``method`` (``"lst"``, ``"lora"``, ...) picks the class; it may be left
                out when called on one of the subclasses.

        Raises:
            UserError: unknown option or method, or a value that cannot be used.
        """
        if not isinstance(values, dict):
            raise UserError(f"a method's options must be a JSON object, got {type(values).__name__}")
        values = dict(values)
        method = values.pop("method", cls.method)
        known = ", ".join(sorted(_METHODS))
        if method not in _METHODS:
            raise UserError(f"method must be one of {known}, got {method!r}")
        target = _METHODS[method]
        if not issubclass(target, cls):
            raise UserError(f"{cls.__name__} has method {cls.method!r}, got options for {method!r}")
        accepted = [f.name for f in fields(target)]
        for name in values:
            if name not in accepted:
                raise UserError(f"{name!r} is not an option of {method}, accepted are {', '.join(accepted)}")
        return target(**values)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes ``meft_config.json`` into a folder (a saved model has the same in its ``config.json``)."""
        write_json(Path(save_directory) / "meft_config.json", self.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "MeftConfig":
        """Reads the options from a folder written by :meth:`save_pretrained` or
        ``MeftModel.save_pretrained``.

        Raises:
            UserError: no config there, or one that cannot be used.
        """
        own = Path(directory) / "meft_config.json"
        if own.is_file():
            return cls.from_dict(read_json(own))
        saved = read_json(Path(directory) / "config.json")
        if not isinstance(saved, dict) or "meft" not in saved:
            raise UserError(f"{Path(directory) / 'config.json'} does not describe a side network")
        return cls.from_dict(saved["meft"])


@dataclass(kw_only=True)
class SideNetworkConfig(MeftConfig):
    """Options of the methods that put a narrow network beside a frozen encoder."""

    reduction_factor: int = field(
        default=8,
        metadata={"help": "Width of the side network: the backbone's width divided by this, rounded down."},
    )
    saved_activations: str = field(
        default="exact",
        metadata={
            "help": "How hidden states are kept for the backward: 'exact' as they are, 'fp8' as normalised "
            "copies of 8 bits, from which the weight gradients are made (half the memory)."
        },
    )
    chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Clips that the backbone and the side network take at a time within a step; the result "
            "is the same. Unset chooses by the length of the clips and the device."
        },
    )

    def validate(self) -> None:
        super().validate()
        _positive_int("reduction_factor", self.reduction_factor)
        if self.saved_activations not in SAVED_ACTIVATIONS:
            accepted = " or ".join(map(repr, SAVED_ACTIVATIONS))
            raise UserError(f"saved_activations must be {accepted}, got {self.saved_activations!r}")
        if self.chunk_size is not None:
            _positive_int("chunk_size", self.chunk_size)
        layers = getattr(self, "layers", None)
        if layers is not None:
            if not isinstance(layers, (list, tuple)) or not layers:
                raise UserError(f"layers must be None or a non-empty list of layer numbers, got {layers!r}")
            for layer in layers:
                _positive_int("every entry of layers", layer)
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
        layers = getattr(self, "layers", None)
        if layers and layers[-1] > num_layers:
            raise UserError(f"layers must lie in 1..{num_layers}, the backbone's layers, got {layers}")


@dataclass(kw_only=True)
class LSTConfig(SideNetworkConfig):
    """Ladder Side-Tuning: a narrow ladder beside the encoder, one gated rung per layer."""

    method: ClassVar[str] = "lst"

    adapter_dim: int = field(default=256, metadata={"help": "Inner width of each rung's adapter."})
    layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Encoder layers to tap, counted from 1; unset taps all. The embedding is always read."
        },
    )

    def validate(self) -> None:
        super().validate()
        _positive_int("adapter_dim", self.adapter_dim)

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return meft_kernels.LST(
            hidden_size,
            num_layers,
            reduction_factor=self.reduction_factor,
            adapter_dim=self.adapter_dim,
            layers=self.layers,
            saved_activations=self.saved_activations,
            **place,
        )


@dataclass(kw_only=True)
class UniPTConfig(SideNetworkConfig):
    """Universal Parallel Tuning: attention of the last tapped layer over all others, weighted by
    confidence."""

    method: ClassVar[str] = "unipt"

    layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Encoder layers to tap, counted from 1; unset taps all. The embedding is always read."
        },
    )

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return meft_kernels.UniPT(
            hidden_size,
            num_layers,
            reduction_factor=self.reduction_factor,
            layers=self.layers,
            saved_activations=self.saved_activations,
            **place,
        )


@dataclass(kw_only=True)
class SHERLConfig(SideNetworkConfig):
    """SHERL: merges all but the last layer's output into a new input of the last encoder layer."""

    method: ClassVar[str] = "sherl"
    through_last_layer: ClassVar[bool] = True

    def check_backbone(self, hidden_size: int, num_layers: int, max_source_positions: int) -> None:
        super().check_backbone(hidden_size, num_layers, max_source_positions)
        if num_layers < 2:
            raise UserError(f"sherl needs a backbone of at least 2 layers, got {num_layers}")

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return meft_kernels.SHERL(
            hidden_size,
            num_layers,
            reduction_factor=self.reduction_factor,
            saved_activations=self.saved_activations,
            **place,
        )


@dataclass(kw_only=True)
class HeadConfig(MeftConfig):
    """Only the head trains, on the output of the frozen encoder."""

    method: ClassVar[str] = "head"
    final_norm: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return LastState()


@dataclass(kw_only=True)
class WeightedSumConfig(HeadConfig):
    """A learned softmax-weighted sum of all hidden states of the frozen encoder, and the head."""

    method: ClassVar[str] = "weighted_sum"
    can_merge: ClassVar[bool] = False

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return WeightedSum(num_layers + 1, **place)


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
        _boolean("train_convolutions", self.train_convolutions)

    def prepare_encoder(self, encoder: "TunedEncoder") -> None:
        for name, parameter in encoder.named_parameters():
            fixed = name.startswith("embed_positions") or (
                name.startswith("conv") and not self.train_convolutions
            )
            parameter.requires_grad_(not fixed)


_TARGETS = "Names of the encoder's linear layers that are adapted."


@dataclass(kw_only=True)
class LoRAConfig(TunedEncoderConfig):
    """LoRA (arXiv 2106.09685) by peft: W + alpha / r * B A, with B zero at the start."""

    method: ClassVar[str] = "lora"
    can_merge: ClassVar[bool] = True

    r: int = field(default=64, metadata={"help": "Rank of the update of each adapted weight."})
    lora_alpha: float = field(
        default=512, metadata={"help": "The update is scaled by this number divided by the rank."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Share of the update's inputs that are dropped in training."}
    )
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": _TARGETS}
    )

    def validate(self) -> None:
        super().validate()
        _positive_int("r", self.r)
        _positive_number("lora_alpha", self.lora_alpha)
        _share("lora_dropout", self.lora_dropout)
        self.target_modules = _targets(self.target_modules)

    def prepare_encoder(self, encoder: "TunedEncoder") -> None:
        from .lora import add_lora

        add_lora(encoder, self)
