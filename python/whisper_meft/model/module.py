"""A Whisper encoder, what a method trains of it or beside it, and a head as one Hugging Face model."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ..encoder.cached import StoredStates, pooled_of_cached, states_read
from ..encoder.chunked import pooled_in_chunks
from ..encoder.frozen import as_output
from ..encoder.graphed import GraphedReader
from ..encoder.pooling import (
    LastState,
    RunningStandardisation,
    StatisticsOf,
    WeightedSum,
    mean_over_time,
)
from ..errors import UserError
from ..methods import MeftConfig
from .backbone import resolve_backbone
from .base import MeftBase, check_tensors
from .config import MeftModelConfig
from .declared import checked_labels
from .loss import classification_loss, refuse_backward, refuse_gradients, with_penalty
from .merging import merged_classifier
from .transcription import MeftForConditionalGeneration


class MeftModel(MeftBase):
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

    task = "classification"
    base_class = WhisperForAudioClassification

    def check_method(self) -> None:
        if getattr(self.meft_config, "placement", "encoder") != "encoder":
            raise UserError(
                "placement must be 'encoder' for classification, which has no decoder, got "
                f"{self.meft_config.placement!r}"
            )
        if getattr(self.meft_config, "target", None) not in (None, "encoder"):
            raise UserError(
                "target must be None or 'encoder' for classification, which has no decoder, got "
                f"{self.meft_config.target!r}"
            )
        super().check_method()

    def build(self, base: WhisperForAudioClassification, **place: Any) -> None:
        config = self.config
        sizes = config.hidden_size, config.num_hidden_layers
        self.side_network = self.meft_config.build_side_network(*sizes, **place)
        read = self._features_read
        if self.meft_config.pooling == "statistics":
            self.standardisation = RunningStandardisation(read, **place)
        self.projector = nn.Linear(read, config.classifier_proj_size, **place)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels, **place)
        for linear in (self.projector, self.classifier):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self._graphed: GraphedReader | None = None

    @property
    def _features_read(self) -> int:
        """How many features the projector reads."""
        if self.meft_config.pooling != "statistics":
            return self.config.hidden_size
        return (2 if isinstance(self.side_network, LastState) else 3) * self.config.hidden_size

    def check_config(self, tensors: Mapping[str, torch.Tensor]) -> None:
        config = self.config
        checked_labels(config.id2label, "the config")
        projected, classes = config.classifier_proj_size, config.num_labels
        shapes = {
            "projector.weight": (projected, self._features_read),
            "projector.bias": (projected,),
            "classifier.weight": (classes, projected),
            "classifier.bias": (classes,),
        }
        for name, shape in shapes.items():
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise UserError(
                    f"{name} must have shape {shape}, by the config's classifier_proj_size={projected} and "
                    f"num_labels={classes}, to be loaded again, got {found or 'no such tensor'}: change the "
                    "config's id2label with the head"
                )

    def use_cuda_graphs(self, use: bool = True) -> None:
        """Captures what a training step computes between log-mel and the clip's vector, forward and backward,
        in CUDA graphs at the first batch, and replays them for every batch of its shape; others run without.

        With a number for ``max_frames`` batches are padded to it, so that they are of one shape.

        Raises:
            UserError: the method trains inside the encoder, batches have no fixed shape, or there is no CUDA
                device under the model.
        """
        if not use:
            self._graphed = None
            return
        options, device = self.meft_config, self.encoder.conv1.weight.device
        reason = graphs_refused(options)
        if reason is None and device.type != "cuda":
            reason = f"they need a CUDA device, the model is on {device}"
        if reason is not None:
            raise UserError(f"cuda_graphs: {reason}")
        frames = 2 * options.max_frames if isinstance(options.max_frames, int) else None
        trained = [p for p in self.side_network.parameters() if p.requires_grad]
        self._graphed = GraphedReader(self._read, trained, frames)

    def _read(
        self, features: torch.Tensor, lengths: torch.Tensor | None, taken: StatisticsOf | None = None
    ) -> torch.Tensor:
        """The clips' vectors (B, D) from log-mel; ``taken`` takes statistics of the states that pass by."""
        options = self.meft_config
        reading = (options.chunk_size, options.final_norm, options.through_last_layer, taken)
        return pooled_in_chunks(self.encoder, self.side_network, features, lengths, *reading)

    def statistics_taken(self) -> StatisticsOf | None:
        """What takes statistics of the last hidden state that is read, for :meth:`scores`; None where the
        method's pooling has none."""
        if self.meft_config.pooling != "statistics":
            return None
        return StatisticsOf(states_read(self.side_network, self.encoder.num_layers)[-1])

    def scores(self, pooled: torch.Tensor, taken: StatisticsOf | None) -> torch.Tensor:
        """Logits (B, classes) of the clips' vectors (B, D); ``taken``: what :meth:`statistics_taken` gave, of
        the same clips."""
        # Mean, then project: the projector is linear. On (B, D) half precision would gain nothing.
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = pooled.to(self.projector.weight.dtype)
            if taken is not None:
                statistics = taken.taken().to(pooled.dtype)
                alone = isinstance(self.side_network, LastState)  # whose mean is among them
                statistics = statistics if alone else torch.cat([pooled, statistics], dim=-1)
                pooled = self.standardisation(statistics, follow=not self._adapter_is_off)
            logits = self.classifier(self.projector(pooled))
            if self.config.calibration_temperature is not None and not self.training:
                logits = logits / self.config.calibration_temperature
        return logits

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
            num_items_in_batch: what the summed loss is divided by, from Trainer; without it the labels that
                count.
            hidden_states: (B, S, T, D) in place of ``input_features``: the states that :attr:`states_read`
                names, computed earlier (:mod:`whisper_meft.feature_cache`). The backbone is not run.
            hidden_state_lengths: (B,) their valid frames. Only read when ``max_frames`` is not "fidelity".
            hidden_state_statistics: (B, S, T, 2) mean and rstd of their rows, where these are known.
            hidden_state_scales: (B, S, 2, D) scale and shift of ``hidden_states`` in 8 bits, int8 or
                float8_e4m3fn.
            kwargs: in :meth:`disable_adapter`, ``output_hidden_states=True``; others are ignored, for callers
                that pass options of other models.

        Returns:
            ``loss`` (a float32 scalar) if ``labels`` are given, ``logits`` (B, classes) in the head's dtype
            and, if asked for, ``hidden_states``.

        Raises:
            UserError: wrong shape, dtype, device or label.
        """
        options = self.meft_config
        if self.training and options.method == "mezo" and torch.is_grad_enabled():
            refuse_gradients()
        self.refuse_training_in_half()
        self._tell_of_hooks()
        self._tell_of_unfrozen()
        if (input_features is None) == (hidden_states is None):
            raise UserError("one of input_features and hidden_states is needed, and not both")
        check_tensors(
            input_features=input_features,
            attention_mask=attention_mask,
            labels=labels,
            hidden_states=hidden_states,
            hidden_state_lengths=hidden_state_lengths,
            hidden_state_statistics=hidden_state_statistics,
            hidden_state_scales=hidden_state_scales,
        )
        taken, plain = self.statistics_taken(), None
        if hidden_states is not None:
            self.refuse_stored()
            lengths = None if options.max_frames == "fidelity" else hidden_state_lengths
            given = (hidden_states, lengths, hidden_state_statistics, hidden_state_scales)
            stored = StoredStates(self.states_read, *given)
            reading = (options.final_norm, options.through_last_layer, taken)
            pooled = pooled_of_cached(self.encoder, self.side_network, stored, *reading)
        elif self._adapter_is_off:
            features, lengths = self._frames_to_compute(input_features, attention_mask)
            states = self.encoder.stream(features, lengths, final_norm=True)
            states = states if taken is None else taken.watch(states, lengths)
            plain = as_output(states, bool(kwargs.get("output_hidden_states")))
            pooled = mean_over_time(plain.last_hidden_state, lengths)
        elif options.frozen_encoder:
            features, lengths = self._frames_to_compute(input_features, attention_mask)
            graphed = self.training and torch.is_grad_enabled() and self._graphed is not None
            pooled = self._graphed(features, lengths) if graphed else self._read(features, lengths, taken)
        else:
            features, lengths = self._frames_to_compute(input_features, attention_mask)
            states = self.encoder.stream(features, lengths, options.final_norm)
            states = states if taken is None else taken.watch(states, lengths)
            pooled = self.side_network.pooled(states, lengths)
        logits = self.scores(pooled, taken)
        with torch.autocast(logits.device.type, enabled=False):
            loss = None if labels is None else classification_loss(logits, labels, num_items_in_batch)
            if loss is not None and self.training:
                loss = with_penalty(loss, self.penalty(), labels, num_items_in_batch)
        trains = self.training and logits.requires_grad and not torch.compiler.is_compiling()
        if loss is None and trains and not self.penalty_elsewhere and self.penalty() is not None:
            refuse_backward(logits, options.method)
        found = None if plain is None else plain.hidden_states
        if return_dict is False:
            return tuple(each for each in (loss, logits, found) if each is not None)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=found)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> WhisperForAudioClassification:
        """A plain Whisper classifier in float32 with the same scores, for methods that only change the
        encoder's weights: the LoRA family, and those that train the weights themselves.

        This model stays as it is. Arguments are ignored, for callers of PEFT.

        Raises:
            UserError: side networks and adapters cannot be merged.
        """
        return merged_classifier(self)


def graphs_refused(config: MeftConfig) -> str | None:
    """Why a training step of a method cannot be captured in CUDA graphs, or None."""
    if not config.frozen_encoder:
        return f"{config.method} trains inside the encoder, whose step is not captured"
    if config.max_frames == "longest":
        return "max_frames 'longest' gives batches of many shapes, 'fidelity' or a number is accepted"
    if config.pooling != "mean":
        return f"pooling {config.pooling!r} takes statistics of states that a graph keeps to itself"
    return None


def get_meft_model(
    base: WhisperForAudioClassification | WhisperForConditionalGeneration, config: MeftConfig
) -> MeftModel | MeftForConditionalGeneration:
    """Makes the model that a method trains out of a Whisper classifier or recogniser.

    Args:
        base: gives the encoder (shared with it and frozen but for what the method trains, cast if
            ``config.backbone_dtype`` says so); a classifier the start values of the head (copied, as float32;
            of a weighted sum of layers its weights too) and the labels, a recogniser the decoder (shared,
            frozen, cast) and how it generates. Methods with a frozen encoder may share one; a method that
            trains inside it needs one of its own.
        config: :class:`LSTConfig`, :class:`LoRAConfig`, :class:`FullConfig` ...: the method and its options.

    Returns:
        A model in training mode, ready for ``transformers.Trainer``.

    Raises:
        UserError: ``base`` or ``config`` is of another kind, or they do not fit each other; the labels of
            ``base`` are not the names of classes 0, 1, ..., each another; ``base`` was trained by an earlier
            model, or one that lives uses it and either would change the other: by training inside it, or by
            another ``backbone_dtype`` or ``backbone_quantization``.
    """
    transcribes = isinstance(base, WhisperForConditionalGeneration)
    if not transcribes and not isinstance(base, WhisperForAudioClassification):
        raise UserError(
            "base must be a WhisperForAudioClassification or a WhisperForConditionalGeneration, got "
            f"{type(base).__name__}"
        )
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
    )
    if transcribes:
        model_config.task = MeftForConditionalGeneration.task
        for name in MeftForConditionalGeneration.taken_from_base:
            setattr(model_config, name, getattr(sizes, name))
        return MeftForConditionalGeneration(model_config, base).train()
    model_config.classifier_proj_size = sizes.classifier_proj_size
    model_config.id2label = checked_labels(sizes.id2label, "base")
    model_config.label2id = dict(sizes.label2id)
    model = MeftModel(model_config, base)
    with torch.no_grad():
        for part in ("projector", "classifier"):
            ours, theirs = getattr(model, part), getattr(base, part)
            if ours.weight.shape == theirs.weight.shape:  # the projector of statistics is another
                ours.weight.copy_(theirs.weight)
                ours.bias.copy_(theirs.bias)
        weights = getattr(base, "layer_weights", None) if sizes.use_weighted_layer_sum else None
        if weights is not None and isinstance(model.side_network, WeightedSum):
            model.side_network.weights.copy_(weights)
        elif weights is not None:
            warnings.warn(
                f"use_weighted_layer_sum of base's config is for WeightedSumConfig, {config.method} does not "
                "sum its layers: what is copied of base's head was made for that sum",
                stacklevel=2,
            )
    return model.train()


# `import whisper_meft` has made these names known (auto_classes.py); here are the classes, by the public way.
AutoConfig.register(MeftModelConfig.model_type, MeftModelConfig, exist_ok=True)
AutoModelForAudioClassification.register(MeftModelConfig, MeftModel, exist_ok=True)
