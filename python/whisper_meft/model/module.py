"""A Whisper encoder, what a method trains of it or beside it, and a head as one Hugging Face model."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    PreTrainedModel,
    WhisperForAudioClassification,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as hf_logging

from ..encoder.cached import pooled_of_cached, states_read
from ..encoder.chunked import pooled_in_chunks
from ..encoder.frozen import FrozenEncoder
from ..encoder.pooling import LastState, RunningStandardisation, StatisticsOf
from ..errors import UserError
from ..methods import MeftConfig
from ..padding import frames_of_mask, frames_with_sound
from .backbone import resolve_backbone
from .config import MeftModelConfig
from .in_any_trainer import serve_in_every_trainer
from .loading import load
from .loss import classification_loss, refuse_backward, with_penalty
from .merging import merged_classifier
from .saving import save, upload

logger = hf_logging.get_logger("whisper_meft")


class MeftModel(PreTrainedModel):
    """A Whisper encoder, a side network that reads its hidden states, and a classifier.

    Made by :func:`get_meft_model` or :meth:`from_pretrained`. ``side_network``, ``projector`` and
    ``classifier`` train and are what is saved; ``encoder`` is the frozen backbone
    (:class:`whisper_meft.FrozenEncoder`). Methods that train inside the encoder
    (:class:`whisper_meft.encoder.tuned.TunedEncoder`) have no parameters in ``side_network``; what they train
    in ``encoder`` is saved too.

    Args:
        config: sizes, labels and the method's options.
        base: the model whose ``encoder`` is used. Its modules are shared, not copied.

    Raises:
        UserError: the options do not fit the backbone.
    """

    config_class = MeftModelConfig
    base_model_prefix = "meft"  # names no attribute: nothing of this model is a stock base model
    main_input_name = "input_features"
    # A frozen backbone saves no activations and recomputes nothing, a tuned one recomputes layer by layer.
    supports_gradient_checkpointing = True
    # forward takes num_items_in_batch: gradient accumulation then gives the gradient of the whole batch.
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MeftModelConfig, base: WhisperForAudioClassification):
        super().__init__(config)
        self.meft_config = MeftConfig.from_dict(config.meft)
        if any(name.endswith("base_layer") for name, _ in base.encoder.named_modules()):
            raise UserError(
                "base already carries an adapter of an earlier model: load it anew, or merge that model first"
            )
        self.encoder = self.meft_config.build_encoder(base.encoder)
        check_sizes(config, self.encoder)
        self.meft_config.check_backbone(
            config.hidden_size, config.num_hidden_layers, config.max_source_positions
        )
        # Masters in float32 whatever the backbone's number format.
        place = {"device": self.encoder.conv1.weight.device, "dtype": torch.float32}
        sizes = config.hidden_size, config.num_hidden_layers
        self.side_network = self.meft_config.build_side_network(*sizes, **place)
        read = config.hidden_size
        if self.meft_config.pooling == "statistics":
            read = (2 if isinstance(self.side_network, LastState) else 3) * config.hidden_size
            self.standardisation = RunningStandardisation(read, **place)
        self.projector = nn.Linear(read, config.classifier_proj_size, **place)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels, **place)
        for linear in (self.projector, self.classifier):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.post_init()
        if type(self.meft_config).trainer_callback is not MeftConfig.trainer_callback:
            serve_in_every_trainer()
        # Whether whoever trains the model adds `penalty()` to the loss, where it computes one itself.
        self.penalty_elsewhere = False
        # Trainer compares with the exact names when it loads a checkpoint, and then reports none missing.
        self._keys_to_ignore_on_save = {f"encoder.{name}" for name in self.encoder.frozen_names()}
        # Every process loads the backbone itself; torch's DistributedDataParallel need not send it around.
        self._ddp_params_and_buffers_to_ignore = sorted(self._keys_to_ignore_on_save)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every part initialises itself, and the backbone is already loaded."""

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.conv1

    def saved_names(self) -> set[str]:
        """Names of the tensors that :meth:`save_pretrained` writes: all but those that stay as loaded."""
        return set(self.state_dict()) - self._keys_to_ignore_on_save

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise UserError(
                "gradient checkpointing with use_reentrant=True would lose the gradients behind frozen "
                "layers; use_reentrant=False is accepted"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @property
    def states_read(self) -> tuple[int, ...]:
        """Indices of the hidden states that the method reads; h_0 is the embedding, h_i layer i's output.

        Raises:
            UserError: the method trains inside the encoder, so that its states change with every step.
        """
        if not self.meft_config.frozen_encoder:
            raise UserError(
                f"hidden states cannot be computed ahead for {self.meft_config.method}, which trains inside "
                "the encoder"
            )
        return states_read(self.side_network, self.encoder.num_layers)

    @property
    def _last_state(self) -> int:
        """Index of the last hidden state that is read."""
        return states_read(self.side_network, self.encoder.num_layers)[-1]

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Chooses the encoder's attention: ``"sdpa"``, ``"eager"`` or ``"flash_attention_2"``."""
        self.encoder.config._attn_implementation = attn_implementation

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        hidden_states: torch.Tensor | None = None,
        hidden_state_lengths: torch.Tensor | None = None,
        hidden_state_statistics: torch.Tensor | None = None,
        hidden_state_scales: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Class scores, and the cross-entropy when ``labels`` are given.

        Args:
            input_features: (B, mel bins, frames) log-mel from the backbone's feature extractor.
            attention_mask: (B, frames) or (B, samples), 1 for sound, then 0 for padding, as
                ``WhisperFeatureExtractor(return_attention_mask=True)`` gives. Only read when the config's
                ``max_frames`` is not ``"fidelity"``; without it the padding is what
                :func:`whisper_meft.padding.frames_with_sound` finds.
            labels: (B,) class numbers; -100 is skipped.
            return_dict: ``False`` gives a tuple.
            num_items_in_batch: what the summed loss is divided by, from Trainer; without it the batch size.
            hidden_states: (B, S, T, D) in place of ``input_features``: the states that :attr:`states_read`
                names, computed earlier (:mod:`whisper_meft.feature_cache`). The backbone is not run.
            hidden_state_lengths: (B,) their valid frames. Only read when ``max_frames`` is not "fidelity".
            hidden_state_statistics: (B, S, T, 2) mean and rstd of their rows, where these are known.
            hidden_state_scales: (B, S, 2, D) scale and shift of ``hidden_states`` in 8 bits, float8_e4m3fn.
            kwargs: ignored, for callers that pass options of other models.

        Returns:
            ``loss`` (a float32 scalar) if ``labels`` are given, and ``logits`` (B, classes) in the head's
            dtype.

        Raises:
            UserError: wrong shape, dtype, device or label.
        """
        options = self.meft_config
        if self.training and options.method == "mezo" and torch.is_grad_enabled():
            raise UserError(
                "mezo trains without gradients: use whisper_meft.MeftTrainer, or MeZO.measure of "
                "whisper_meft.methods.mezo in a loop of your own"
            )
        if (input_features is None) == (hidden_states is None):
            raise UserError("one of input_features and hidden_states is needed, and not both")
        _check_tensors(
            input_features=input_features,
            attention_mask=attention_mask,
            labels=labels,
            hidden_states=hidden_states,
            hidden_state_lengths=hidden_state_lengths,
            hidden_state_statistics=hidden_state_statistics,
            hidden_state_scales=hidden_state_scales,
        )
        taken = StatisticsOf(self._last_state) if options.pooling == "statistics" else None
        if hidden_states is not None:
            lengths = None if options.max_frames == "fidelity" else hidden_state_lengths
            given = (self.states_read, hidden_states, lengths, hidden_state_statistics, hidden_state_scales)
            reading = (options.final_norm, options.through_last_layer)
            pooled = pooled_of_cached(self.encoder, self.side_network, *given, *reading, taken)
        elif options.frozen_encoder:
            features, lengths = self._frames_to_compute(input_features, attention_mask)
            reading = (options.chunk_size, options.final_norm, options.through_last_layer)
            pooled = pooled_in_chunks(self.encoder, self.side_network, features, lengths, *reading, taken)
        else:
            features, lengths = self._frames_to_compute(input_features, attention_mask)
            states = self.encoder.stream(features, lengths, options.final_norm)
            states = states if taken is None else taken.watch(states, lengths)
            pooled = self.side_network.pooled(states, lengths)
        # Mean, then project: the projector is linear. On (B, D) half precision would gain nothing.
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = pooled.to(self.projector.weight.dtype)
            if taken is not None:
                statistics = taken.taken().to(pooled.dtype)
                alone = isinstance(self.side_network, LastState)  # whose mean is among them
                pooled = self.standardisation(
                    statistics if alone else torch.cat([pooled, statistics], dim=-1)
                )
            logits = self.classifier(self.projector(pooled))
            loss = None if labels is None else classification_loss(logits, labels, num_items_in_batch)
            if loss is not None and self.training:
                loss = with_penalty(loss, self.penalty(), labels, num_items_in_batch)
        trains = self.training and logits.requires_grad and not torch.compiler.is_compiling()
        if loss is None and trains and not self.penalty_elsewhere and self.penalty() is not None:
            refuse_backward(logits, options.method)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def penalty(self) -> torch.Tensor | None:
        """What the method adds to the loss in training, a scalar, or None.

        The loss that :meth:`forward` returns holds it. Where you compute another from the scores, add it
        there and say so by ``penalty_elsewhere = True``.
        """
        return self.meft_config.penalty(self.encoder)

    def _frames_to_compute(
        self, features: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features to encode, and the clips' lengths (B,) in encoder frames or None if padding counts."""
        max_frames = self.meft_config.max_frames
        if max_frames == "fidelity" or not isinstance(features, torch.Tensor) or features.ndim != 3:
            return features, None  # the encoder reports a wrong shape
        # The encoder counts pairs of frames: what lies behind the clip's end in the last pair is cut here.
        if attention_mask is None:
            frames = frames_with_sound(features)
        else:
            frames = frames_of_mask(attention_mask, features)
        if isinstance(max_frames, int):
            features = features[..., : 2 * max_frames]
        past_end = torch.arange(features.shape[2], device=features.device) >= frames[:, None]
        features = features.masked_fill(past_end[:, None, :], 0)
        # A clip without sound counts as one frame, so that means and softmaxes stay finite.
        return features, ((frames + 1) // 2).clamp(1, max((features.shape[2] + 1) // 2, 1))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Prints how much of the model trains, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: "
            f"{100 * trainable / total:.4f}"
        )

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> WhisperForAudioClassification:
        """A plain Whisper classifier in float32 with the same scores, for methods that only change the
        encoder's weights: the LoRA family, and those that train the weights themselves.

        This model stays as it is. Arguments are ignored, for callers of PEFT.

        Raises:
            UserError: side networks and adapters cannot be merged.
        """
        return merged_classifier(self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        save_backbone: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes what was trained, the options and the labels; the frozen backbone only when asked to.

        Each file is written beside its place and renamed, so there is never half a file.

        Args:
            save_directory: folder, made as needed. Gets ``config.json``, ``model.safetensors`` and a
                ``README.md`` where there is none.
            is_main_process: ``False`` writes nothing (other processes of a distributed run).
            state_dict: tensors to save instead of the model's own, such as those gathered from several
                processes.
            push_to_hub: upload the folder afterwards; ``repo_id`` and :meth:`push_to_hub`'s options in
                ``kwargs``.
            save_backbone: also write the encoder to ``backbone/`` and refer to it there: the folder then
                needs nothing else.
            kwargs: options of ``PreTrainedModel.save_pretrained`` that have no meaning here are ignored.

        Raises:
            UserError: the folder cannot be written.
        """
        if is_main_process:
            save(self, Path(save_directory), state_dict, save_backbone)
            if push_to_hub:
                known = ("commit_message", "private", "token", "revision")
                options = {name: kwargs[name] for name in known if name in kwargs}
                repo_id = kwargs.get("repo_id") or Path(save_directory).name
                self.push_to_hub(repo_id, save_backbone=save_backbone, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        save_backbone: bool = False,
        commit_message: str = "Upload side network",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Uploads what :meth:`save_pretrained` writes to the model hub.

        Args:
            repo_id: name of the repository, made as needed. save_backbone: see :meth:`save_pretrained`.
            commit_message, private, token, revision, create_pr: see ``huggingface_hub.HfApi``.
            kwargs: other options of ``PreTrainedModel.push_to_hub`` are ignored.

        Raises:
            UserError: the backbone is a local folder, which nobody else could find.
        """
        options = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
        return upload(self, repo_id, save_backbone, private, token, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        backbone: str | os.PathLike | nn.Module | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        quantization: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "MeftModel":
        """Loads a saved model and the backbone that it belongs to.

        Args:
            pretrained_model_name_or_path: folder that :meth:`save_pretrained` wrote, or its name on the model
                hub.
            backbone: hub name, folder, or loaded ``WhisperForAudioClassification`` to use instead of the one
                that the saved config names.
            dtype: number format of the backbone's weights; unset takes the saved one. The rest is float32.
            attn_implementation: the backbone's attention, as in transformers.
            quantization: of the backbone, ``"int8"``, ``"fp8"`` or ``"none"``; unset takes the saved one.
            device: where the model goes; the backbone is quantised there.
            kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``;
                ``subfolder`` of a local folder; ``config`` is accepted for the Auto classes.

        Returns:
            The model in evaluation mode.

        Raises:
            UserError: folder, config, weights or backbone are missing, damaged or do not belong together.
        """
        return load(
            cls,
            pretrained_model_name_or_path,
            backbone=backbone,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization=quantization,
            device=device,
            **kwargs,
        )


def get_meft_model(base: WhisperForAudioClassification, config: MeftConfig) -> MeftModel:
    """Makes the model that a method trains out of a Whisper classifier.

    Args:
        base: gives the encoder (shared with it and frozen but for what the method trains, cast if
            ``config.backbone_dtype`` says so), the start values of the head (copied, as float32) and the
            labels.
        config: :class:`LSTConfig`, :class:`LoRAConfig`, :class:`FullConfig` ...: the method and its options.

    Returns:
        A model in training mode, ready for ``transformers.Trainer``.

    Raises:
        UserError: ``base`` or ``config`` is of another kind, or they do not fit each other.
    """
    if not isinstance(base, WhisperForAudioClassification):
        raise UserError(f"base must be a WhisperForAudioClassification, got {type(base).__name__}")
    if not isinstance(config, MeftConfig):
        known = ", ".join(each.__name__ for each in MeftConfig.methods().values())
        raise UserError(
            f"config must be LSTConfig or another of whisper_meft's ({known}), got "
            f"{type(config).__module__.partition('.')[0]}'s {type(config).__name__}"
        )
    name = base.config._name_or_path
    sizes = base.config
    model_config = MeftModelConfig(
        meft=config.to_dict(),
        base_model_name_or_path=resolve_backbone(name) if name else None,
        hidden_size=sizes.d_model,
        num_hidden_layers=sizes.encoder_layers,
        num_mel_bins=sizes.num_mel_bins,
        max_source_positions=sizes.max_source_positions,
        classifier_proj_size=sizes.classifier_proj_size,
        id2label=dict(sizes.id2label),
        label2id=dict(sizes.label2id),
    )
    model = MeftModel(model_config, base)
    with torch.no_grad():
        for part in ("projector", "classifier"):
            ours, theirs = getattr(model, part), getattr(base, part)
            if ours.weight.shape == theirs.weight.shape:  # the projector of statistics is another
                ours.weight.copy_(theirs.weight)
                ours.bias.copy_(theirs.bias)
    return model.train()


def _check_tensors(**arguments: Any) -> None:
    """Raises UserError, by name, for one of forward's arguments that is neither a tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, torch.Tensor):
            kind = type(value)
            raise UserError(
                f"{name} must be a torch.Tensor, got {kind.__module__.partition('.')[0]}'s {kind.__name__}: "
                "turn arrays and lists into tensors first (return_tensors='pt' of the feature extractor)"
            )


def check_sizes(config: PreTrainedConfig, encoder: FrozenEncoder) -> None:
    """Raises UserError unless ``encoder`` has the sizes in ``config``, a MeftModelConfig or WhisperConfig."""
    expected = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_mel_bins": config.num_mel_bins,
        "max_source_positions": config.max_source_positions,
    }
    found = {
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_mel_bins": encoder.num_mel_bins,
        "max_source_positions": encoder.max_source_positions,
    }
    wrong = [f"{k} is {found[k]} where {expected[k]} is needed" for k in expected if found[k] != expected[k]]
    if wrong:
        raise UserError(f"the backbone does not fit the side network: {', '.join(wrong)}")


# `import whisper_meft` has made these names known (auto_classes.py); here are the classes, by the public way.
AutoConfig.register(MeftModelConfig.model_type, MeftModelConfig, exist_ok=True)
AutoModelForAudioClassification.register(MeftModelConfig, MeftModel, exist_ok=True)
