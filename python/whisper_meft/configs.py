"""What a user chooses about a side network: one dataclass per method.

The classes follow PEFT's habits: keyword arguments with defaults, every field documented in its metadata,
plain JSON on disk. Every value is checked when a config is made, so a mistake is reported where it was typed.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import meft_kernels

from .errors import UserError
from .files import read_json, write_json

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

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


@dataclass(kw_only=True)
class MeftConfig:
    """Options that all methods share. Make one of the subclasses, or call :meth:`from_dict`.

    Raises:
        UserError: a value that cannot be used, named with what is accepted.
    """

    method: ClassVar[str] = ""
    # SHERL's gradient crosses the last encoder layer; the other methods never touch the backbone again.
    through_last_layer: ClassVar[bool] = False

    reduction_factor: int = field(
        default=8,
        metadata={"help": "Width of the side network: the backbone's width divided by this, rounded down."},
    )
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
            "float64; unset keeps the one it was loaded in. The side network and the head stay in float32."
        },
    )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _METHODS[cls.method] = cls

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """Checks every field; see the class for what is raised."""
        if not self.method:
            raise UserError(
                f"MeftConfig is a base class, use {' or '.join(c.__name__ for c in _METHODS.values())}"
            )
        _positive_int("reduction_factor", self.reduction_factor)
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
        """Checks the options that depend on the backbone.

        Args:
            hidden_size: width of the encoder. num_layers: its layers. max_source_positions: its window in
                frames.

        Raises:
            UserError: the side network would have no width, a layer does not exist, or the window is too
                short.
        """
        if hidden_size // self.reduction_factor < 1:
            raise UserError(
                f"reduction_factor must be at most {hidden_size}, the backbone's width, got "
                f"{self.reduction_factor}"
            )
        layers = getattr(self, "layers", None)
        if layers and layers[-1] > num_layers:
            raise UserError(f"layers must lie in 1..{num_layers}, the backbone's layers, got {layers}")
        if isinstance(self.max_frames, int) and self.max_frames > max_source_positions:
            raise UserError(
                f"max_frames must be at most {max_source_positions}, the backbone's window, got "
                f"{self.max_frames}"
            )

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        """A new side network for an encoder of this width and depth, float32, initialised as published."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All options and the method's name as plain JSON values; :meth:`from_dict` reads it back."""
        return {"method": self.method, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MeftConfig":
        """Makes the config that ``values`` describes.

        Args:
            values: options by name. ``method`` (``"lst"``, ``"unipt"`` or ``"sherl"``) picks the class; it
                may be left out when called on one of the subclasses.

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
class LSTConfig(MeftConfig):
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
            **place,
        )


@dataclass(kw_only=True)
class UniPTConfig(MeftConfig):
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
            hidden_size, num_layers, reduction_factor=self.reduction_factor, layers=self.layers, **place
        )


@dataclass(kw_only=True)
class SHERLConfig(MeftConfig):
    """SHERL: merges all but the last layer's output into a new input of the last encoder layer."""

    method: ClassVar[str] = "sherl"
    through_last_layer: ClassVar[bool] = True

    def check_backbone(self, hidden_size: int, num_layers: int, max_source_positions: int) -> None:
        super().check_backbone(hidden_size, num_layers, max_source_positions)
        if num_layers < 2:
            raise UserError(f"sherl needs a backbone of at least 2 layers, got {num_layers}")

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return meft_kernels.SHERL(hidden_size, num_layers, reduction_factor=self.reduction_factor, **place)
