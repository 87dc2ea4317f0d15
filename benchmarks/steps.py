"""One training step of every method on Whisper with random weights, built to be measured.

The weights are drawn, not downloaded: time and memory depend on sizes alone.
"""

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForAudioClassification, WhisperForConditionalGeneration
from whisper_meft import FrozenEncoder, MeftConfig, get_meft_model
from whisper_meft.decoder.frozen import FrozenDecoder
from whisper_meft.encoder.sizes import WHISPER_SIZES, whisper_config
from whisper_meft.errors import UserError
from whisper_meft.methods.adalora import RankAllocation
from whisper_meft.methods.mezo import MeZO
from whisper_meft.methods.side_networks import PLACEMENTS, SideNetworkConfig
from whisper_meft.methods.tuned import TARGETS

import meft_kernels

from . import published

# No Whisper, but sizes to try the benchmarks themselves.
TOY = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
TOY |= {"num_mel_bins": 12, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
MODELS = ("toy", *WHISPER_SIZES)
CLASSES = 6  # as in the paper
HEAD = ("projector.", "classifier.")
PUBLISHED = {
    "published_lst": published.PublishedLST,
    "published_unipt": published.PublishedUniPT,
    "published_sherl": published.PublishedSHERL,
}


@dataclass(frozen=True)
class Setting:
    """What a training step is measured at.

    Attributes:
        model: a name in ``MODELS``. batch: clips. frames: encoder frames of each clip, the whole window.
        reduction_factor: of the side networks. dtype: of the computation; float32 means everywhere, a half
            type means frozen weights in it and autocast to it over float32 masters. device: where.
        task: ``"classify"`` or ``"transcribe"``; tokens: of each transcript then.
        backend: of the ops, see ``meft_kernels.use_backend``. cuda_graphs: capture the step, where the method
            runs beside a frozen encoder.

    Raises:
        UserError: a value that cannot be used.
    """

    model: str = "small"
    batch: int = 128
    frames: int = 1500
    reduction_factor: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backend: str = "auto"
    cuda_graphs: bool = False
    task: str = "classify"
    tokens: int = 64

    def __post_init__(self):
        if self.task not in ("classify", "transcribe"):
            raise UserError(f"task must be classify or transcribe, got {self.task!r}")
        if self.model not in MODELS:
            raise UserError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        for name in ("batch", "frames", "reduction_factor", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be a positive integer, got {getattr(self, name)}")
        most = self.config().max_target_positions
        if self.tokens > most:
            raise UserError(f"tokens must be at most {most}, the decoder's positions, got {self.tokens}")
        width = self.config().d_model
        if self.reduction_factor > width:
            raise UserError(
                f"reduction_factor must be at most {width}, the width of {self.model}, got "
                f"{self.reduction_factor}"
            )

    def config(self) -> WhisperConfig:
        """The model's sizes, with a window of ``frames``."""
        model = WhisperConfig(**TOY) if self.model == "toy" else self.model
        return whisper_config(model, num_labels=CLASSES, frames=self.frames, decoder=self.transcribes)

    @property
    def transcribes(self) -> bool:
        return self.task == "transcribe"

    def base(self) -> WhisperForAudioClassification | WhisperForConditionalGeneration:
        """A classifier or a recogniser with drawn float32 weights."""
        kind = WhisperForConditionalGeneration if self.transcribes else WhisperForAudioClassification
        with torch.device(self.device):
            return kind._from_config(self.config(), attn_implementation="sdpa")

    def batch_of_clips(self) -> dict[str, Tensor]:
        """``input_features``, random log-mel (B, mel bins, 2 * frames) in float32, and ``labels`` (B,); to
        transcribe ``labels`` and ``decoder_input_ids`` (B, tokens)."""
        generator = torch.Generator().manual_seed(0)
        config = self.config()
        shape = self.batch, config.num_mel_bins, 2 * self.frames
        batch = {"input_features": torch.randn(shape, generator=generator)}
        if self.transcribes:
            tokens = self.batch, self.tokens
            for name in ("decoder_input_ids", "labels"):
                batch[name] = torch.randint(config.vocab_size, tokens, generator=generator)
        else:
            batch["labels"] = torch.arange(self.batch) % CLASSES
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def autocast(self) -> AbstractContextManager:
        """The precision of a training step."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=self.dtype)


def methods() -> list[str]:
    """Every method: full fine-tuning, the head alone and the side networks first, then the others of
    ``whisper_meft``, then the side networks in the structure that was published."""
    kinds = MeftConfig.methods()
    side_networks = [name for name, kind in kinds.items() if issubclass(kind, SideNetworkConfig)]
    return list(dict.fromkeys(["full", "head", *side_networks, *kinds, *PUBLISHED]))


def recognisers() -> list[str]:
    """Every side network in every placement that it has, and full fine-tuning and LoRA of each part."""
    kinds = {name: kind for name, kind in MeftConfig.methods().items() if kind.transcribes}
    side = {name: kind for name, kind in kinds.items() if issubclass(kind, SideNetworkConfig)}
    found = [f"{name}:placement={place}" for place in PLACEMENTS[:2] for name in side]
    found += [f"{name}:placement=both" for name, kind in side.items() if kind.makes_pairs]
    return found + [f"{name}:target={part}" for name in ("full", "lora") for part in TARGETS]


def options_of(method: str) -> dict[str, Any]:
    """What a method as written on the command line says: ``lst:saved_activations=fp8+chunk_size=16``.

    Raises:
        UserError: no such method, or not of that form.
    """
    name, _, rest = method.partition(":")
    if name not in methods():
        raise UserError(f"methods must be all or some of {', '.join(methods())}, got {name!r}")
    options: dict[str, Any] = {"method": name}
    if rest and name in PUBLISHED:
        raise UserError(f"{name} has no options, got {method!r}")
    for assignment in rest.split("+") if rest else ():
        key, equals, value = assignment.partition("=")
        if not equals or key == "method":
            raise UserError(f"{name}'s options are written {name}:option=value+option=value, got {method!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def config_of(method: str, setting: Setting) -> MeftConfig | None:
    """The config of a method at a setting; None for the published structures, which have none.

    Raises:
        UserError: no such method, or its options cannot be used or do not fit the encoder.
    """
    chosen = options_of(method)
    if chosen["method"] in PUBLISHED:
        if setting.transcribes:
            raise UserError(f"{method} classifies: no such structure was published to transcribe with")
        return None
    kind = MeftConfig.methods()[chosen["method"]]
    defaults: dict[str, Any] = {"reduction_factor": setting.reduction_factor}
    if not kind.trains_backbone:  # whose weights are float32 masters
        defaults["backbone_dtype"] = str(setting.dtype).removeprefix("torch.")
    known = {field.name for field in fields(kind)}
    config = MeftConfig.from_dict({k: v for k, v in defaults.items() if k in known} | chosen)
    sizes = setting.config()
    config.check_backbone(sizes.d_model, sizes.encoder_layers, sizes.max_source_positions)
    return config


def check_backend(name: str, device: str) -> None:
    """Raises UserError unless the ops have kernels called ``name`` that run on the device here."""
    try:
        with meft_kernels.use_backend(name):
            pass
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("backend 'triton' needs --device cuda (or TRITON_INTERPRET=1), got cpu")


def build(method: str, setting: Setting) -> nn.Module:
    """A model in training mode, called with ``input_features`` and ``labels``; its output has ``loss``.

    Raises:
        UserError: no such method, or its options do not fit the model.
    """
    config = config_of(method, setting)
    torch.manual_seed(0)
    if config is None:
        with torch.device(setting.device):
            return PUBLISHED[method.rstrip(":")](setting.config(), setting.reduction_factor).train()
    return get_meft_model(setting.base(), config)


class TrainingStep:
    """A method's training step on one fixed batch: forward, backward, Adam.

    Args:
        method: one of :func:`methods`. setting: sizes, precision, device.
    """

    def __init__(self, method: str, setting: Setting):
        self.setting = setting
        self.model = build(method, setting)
        if setting.cuda_graphs:
            if method in PUBLISHED:
                raise UserError(f"{method} cannot be captured in CUDA graphs")
            self.model.use_cuda_graphs()
        self.batch = setting.batch_of_clips()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        kind = torch.device(setting.device).type
        # Fused, as Trainer's default is on both: one pass, and no temporary copies of the parameters.
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(kind, enabled=setting.dtype == torch.float16)
        self.allocation = None
        config = getattr(self.model, "meft_config", None)
        if config is not None and config.method == "adalora":
            # As Trainer calls it; in the warm-up of so long a run ranks are rated, which costs the same.
            self.allocation = RankAllocation(self.model.tuned, config)
            self.state = SimpleNamespace(max_steps=10**6, global_step=0)
            self.allocation.on_train_begin(None, self.state, None)

    def backward(self) -> Tensor:
        """Fresh gradients in the parameters (scaled under float16); returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with meft_kernels.use_backend(self.setting.backend):
            with self.setting.autocast():
                loss = self.model(**self.batch).loss
            self.scaler.scale(loss).backward()
        return loss.detach()

    def __call__(self) -> None:
        self.backward()
        self._update()

    def _update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.allocation is not None:
            self.allocation.on_optimizer_step(None, self.state, None, optimizer=self.optimizer)
            self.state.global_step += 1

    def gradient_norms(self) -> dict[str, float | None]:
        """Takes a step; returns its loss and the norms of the gradients of the head and of all else.

        Returns:
            ``loss``; ``gradient_norm`` over what the method itself trains, None if that is the head alone;
            ``head_gradient_norm``, None where there is no new head.
        """
        loss = self.backward().item()
        self.scaler.unscale_(self.optimizer)
        squares = {True: [], False: []}
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                squares[name.startswith(HEAD)].append(parameter.grad.double().square().sum())
        norms = {head: torch.stack(s).sum().sqrt().item() if s else 0.0 for head, s in squares.items()}
        self._update()
        only_head = all(name.startswith(HEAD) for name in self.trained)
        own = None if only_head else norms[False]
        head = norms[True] if squares[True] else None
        return {"loss": loss, "gradient_norm": own, "head_gradient_norm": head}


class MeZOStep(TrainingStep):
    """MeZO's step: forward passes and no gradient."""

    def __init__(self, method: str, setting: Setting):
        super().__init__(method, setting)
        config = self.model.meft_config
        self.optimizer = MeZO(self.trained.values(), 1e-7, config.eps, queries=config.mezo_queries)

    def _loss(self) -> Tensor:
        with meft_kernels.use_backend(self.setting.backend), self.setting.autocast():
            return self.model(**self.batch).loss

    def __call__(self) -> None:
        self.optimizer.measure(self._loss)
        self.optimizer.step()

    def gradient_norms(self) -> dict[str, float | None]:
        """As the other methods'; the gradient's norm is its slope along the step's directions."""
        loss = self.optimizer.measure(self._loss).item()
        self.optimizer.step()
        slope = float(self.optimizer.last_slopes.abs().mean())
        return {"loss": loss, "gradient_norm": slope, "head_gradient_norm": None}


def training_step(method: str, setting: Setting) -> TrainingStep:
    """The training step of a method; arguments as for :class:`TrainingStep`."""
    kind = MeZOStep if options_of(method)["method"] == "mezo" else TrainingStep
    return kind(method, setting)


class InferenceForward:
    """The frozen encoder's forward at the precision of the training step, keeping no hidden state; to
    transcribe with the decoder's behind it, without its head.

    Args:
        hugging_face: run it by Hugging Face's own code, as whoever does not use this project would.
    """

    def __init__(self, setting: Setting, hugging_face: bool = False):
        torch.manual_seed(0)
        base = setting.base()
        batch = setting.batch_of_clips()
        self.features, self.tokens = batch["input_features"], batch.get("decoder_input_ids")
        self.hugging_face = hugging_face
        if hugging_face:
            base.to(setting.dtype).eval()
            self.features = self.features.to(setting.dtype)
            self.whisper = base.model if setting.transcribes else base.encoder
            return
        self.encoder = FrozenEncoder(base.get_encoder(), dtype=setting.dtype)
        self.decoder = FrozenDecoder(base, setting.dtype) if setting.transcribes else None

    @torch.inference_mode()
    def __call__(self) -> None:
        if self.hugging_face:
            tokens = {} if self.tokens is None else {"decoder_input_ids": self.tokens, "use_cache": False}
            self.whisper(self.features, **tokens)
            return
        for state in self.encoder.stream(self.features):  # noqa: B007
            pass
        if self.decoder is not None:
            heard = self.encoder.normed_output(state)
            self.decoder.run(self.decoder.around(), self.tokens, heard)
