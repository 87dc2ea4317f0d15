"""What the options of all methods have in common: saving, loading and checking them.

The classes follow PEFT's habits: keyword arguments with defaults, every field documented in its metadata,
plain JSON on disk. Every value is checked when a config is made, so a mistake is reported where it was typed.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import TrainerCallback, WhisperForConditionalGeneration

from ..decoder.frozen import FrozenDecoder
from ..encoder.dtypes import HALF, parse_dtype
from ..encoder.frozen import FrozenEncoder
from ..encoder.pooling import POOLINGS
from ..encoder.quantization import check_kind
from ..errors import UserError
from ..files import read_json, write_json
from .checks import check_positive_int

_METHODS: dict[str, type["MeftConfig"]] = {}


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
    # Whether the method is there for recognition too, beside classification.
    transcribes: ClassVar[bool] = False
    # Trained tensors whose gradient is identically zero.
    without_gradient: ClassVar[tuple[str, ...]] = ()

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

    backbone_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Hold the frozen backbone's linear weights, but the first layer's, in 8 bits: int8, or "
            "fp8 through torchao; or in 4: nf4. Unset keeps them as they are. Methods that train inside the "
            "encoder cannot."
        },
    )

    pooling: str = field(
        default="mean",
        metadata={
            "help": "What the head reads of a clip: 'mean', as published, is the mean over time of what the "
            "method makes; 'statistics' adds mean and deviation over time of the last hidden state that the "
            "method reads, normalised frame by frame, and standardises all by what was seen in training."
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
            check_positive_int("max_frames", self.max_frames)
        dtype = parse_dtype(self.backbone_dtype, "backbone_dtype")
        self.backbone_dtype = None if dtype is None else str(dtype).removeprefix("torch.")
        check_kind(self.backbone_quantization)
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling must be {' or '.join(map(repr, POOLINGS))}, got {self.pooling!r}")
        if self.backbone_quantization and not self.frozen_encoder:
            raise UserError(
                f"backbone_quantization must be None for {self.method}, which trains inside the encoder, got "
                f"{self.backbone_quantization!r}: it is for methods beside a frozen one"
            )
        if self.trains_backbone and dtype in HALF:
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

    def build_encoder(self, whisper_encoder: nn.Module) -> FrozenEncoder:
        """The encoder that the method reads; shares its modules with ``whisper_encoder``."""
        # A gradient goes through SHERL's last layer, which 8-bit products do not give.
        return FrozenEncoder(
            whisper_encoder, self.backbone_dtype, self.backbone_quantization, self.through_last_layer
        )

    def build_decoder(self, whisper: WhisperForConditionalGeneration, encoder: nn.Module) -> FrozenDecoder:
        """The decoder of a recogniser; shares its modules with ``whisper``. ``encoder``: what
        :meth:`build_encoder` gave."""
        return FrozenDecoder(whisper, parse_dtype(self.backbone_dtype))

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        """What turns the hidden states of an encoder of this width and depth into the clip's vector: a new
        side network, float32, initialised as published, or what takes its place."""
        raise NotImplementedError

    def penalty(self, tuned: nn.Module) -> torch.Tensor | None:
        """What the method adds to the loss in training, a scalar, or None. ``tuned``: a module that holds
        all that the method has prepared."""
        return None

    def switched_off(self, tuned: nn.Module) -> AbstractContextManager[None]:
        """Until it is left, nothing that the method has put into the backbone has an effect; ``tuned`` as for
        :meth:`penalty`.

        Raises:
            UserError: the backbone's own weights train.
        """
        return nullcontext()

    def trainer_callback(self, tuned: nn.Module) -> TrainerCallback | None:
        """What the method does in training beside its loss, or None; ``tuned`` as for :meth:`penalty`. Its
        ``on_train_begin`` and ``on_optimizer_step`` are called as in a Trainer."""
        return None

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
        if not isinstance(method, str) or method not in _METHODS:
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
