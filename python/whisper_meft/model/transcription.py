"""A Whisper that transcribes, and what a method trains of it or beside it, as one Hugging Face model."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSpeechSeq2Seq, GenerationConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from meft_kernels import linear_cross_entropy

from ..decoder.cached import corrected_of_tokens, token_states
from ..decoder.chunked import clips_at_a_time, decoded_in_chunks
from ..decoder.corrected import CorrectedDecoder
from ..encoder.cached import StoredStates, corrected_of_cached, heard_of_cached, states_corrected
from ..encoder.chunked import automatic_chunk, corrected_in_chunks, heard_beside
from ..encoder.fingerprint import fingerprint
from ..errors import UserError
from ..files import write_text
from ..methods import MeftConfig
from ..once import warn_once
from ..padding import frames_with_sound
from .backbone import write_whisper
from .base import MeftBase, check_tensors
from .config import MeftModelConfig
from .loss import refuse_backward, refuse_gradients, with_penalty
from .merging import merged_recogniser

# Of Whisper's forward, what would make the outcome another one, or is waited for by who goes on from it.
_NOT_TAKEN = ("past_key_values", "decoder_inputs_embeds", "decoder_position_ids", "use_cache")


class MeftForConditionalGeneration(MeftBase):
    """A Whisper with a side network that corrects what its decoder hears, or what it writes; or one that a
    method trains inside.

    Made by :func:`get_meft_model` or :meth:`from_pretrained`. ``side_network`` trains and is what is saved;
    ``encoder`` and ``decoder`` are the frozen backbone. Methods that train inside the backbone have no
    parameters in ``side_network``; what they train in ``encoder`` and ``decoder`` is saved. Before training
    it transcribes as the backbone does.

    Args:
        config: sizes and the method's options.
        base: the model whose modules are used; shared, not copied.

    Raises:
        UserError: the options do not fit the backbone, or the method is not there for recognition.
    """

    task = "transcription"
    base_class = WhisperForConditionalGeneration
    # Of the backbone's config, the entries that Trainers and generation look for in a model's own.
    taken_from_base = (
        "decoder_layers",
        "vocab_size",
        "max_target_positions",
        "is_encoder_decoder",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "decoder_start_token_id",
    )

    def check_method(self) -> None:
        config, options = self.config, self.meft_config
        if not options.transcribes:
            able = ", ".join(name for name, each in MeftConfig.methods().items() if each.transcribes)
            raise UserError(f"method must be one of {able} for recognition, got {options.method!r}")
        if options.max_frames == "longest":
            raise UserError(
                "max_frames must be 'fidelity' or a number for recognition, got 'longest': a clip's text "
                "would depend on the other clips of its batch"
            )
        if options.pooling != "mean":
            raise UserError(
                f"pooling is of classification; nothing is pooled for recognition, got {options.pooling!r}"
            )
        layers = config.decoder_layers if self.placement == "decoder" else config.num_hidden_layers
        options.check_backbone(config.hidden_size, layers, config.max_source_positions)

    def build(self, base: WhisperForConditionalGeneration, **place: Any) -> None:
        config, options = self.config, self.meft_config
        self.decoder = options.build_decoder(base, self.encoder)
        sizes = {
            "decoder_layers": self.decoder.num_layers,
            "vocab_size": self.decoder.proj_out.weight.shape[0],
        }
        for name, found in sizes.items():
            if getattr(config, name) != found:
                raise UserError(
                    f"the backbone does not fit the side network: {name} is {found} where "
                    f"{getattr(config, name)} is needed"
                )
        layers = {"encoder": config.num_hidden_layers, "decoder": config.decoder_layers}
        if self.placement is None:
            self.side_network = options.build_side_network(
                config.hidden_size, config.num_hidden_layers, **place
            )
        elif self.placement == "both":
            self.side_network = options.build_pair(config.hidden_size, *layers.values(), **place)
        else:
            self.side_network = options.build_correction(config.hidden_size, layers[self.placement], **place)
        self.generation_config = copy.deepcopy(base.generation_config)
        # Of one that the backbone's config gave, transformers reads nothing back that was set in it later.
        self.generation_config._from_model_config = False

    @property
    def placement(self) -> str | None:
        """Where the side network stands; None: there is none, the method trains inside the backbone."""
        return getattr(self.meft_config, "placement", None)

    @property
    def _at_work(self) -> str | None:
        """:attr:`placement` of a side network that is not disabled."""
        return None if self._adapter_is_off else self.placement

    @property
    def tuned(self) -> nn.Module:
        return self

    def frozen_names(self) -> set[str]:
        return super().frozen_names() | {f"decoder.{name}" for name in self.decoder.frozen_names()}

    def fingerprint(self) -> str:
        return fingerprint(self.encoder) + fingerprint(self.decoder)

    @property
    def states_of(self) -> str:
        """Whose hidden states ``states_read`` counts: the ``"encoder"``'s of frames, or the
        ``"decoder"``'s of tokens."""
        beside = self.placement == "decoder" and not self.meft_config.through_last_layer
        return "decoder" if beside else "encoder"

    @property
    def states_read(self) -> tuple[int, ...]:
        """Indices of the hidden states that can be computed ahead.

        Of the encoder with ``placement="encoder"`` and ``"both"``; of the decoder, given a clip's tokens,
        with ``"decoder"``. SHERL beside the decoder, whose last layer needs the encoder's output as well, and
        methods that train inside the decoder read that alone: the encoder's last state, on which the decoder
        is run again.

        Raises:
            UserError: the method trains inside the encoder, so that its states change with every step.
        """
        if not self.meft_config.frozen_encoder:
            raise UserError(
                f"hidden states cannot be computed ahead for {self.meft_config.method} of the encoder, which "
                "changes with every step: target='decoder' leaves it as it is"
            )
        if self.states_of == "decoder":
            return states_corrected(self.side_network, self.decoder.num_layers)
        if self.placement in ("decoder", None):
            return (self.encoder.num_layers,)
        beside = self.side_network.memory if self.placement == "both" else self.side_network
        return states_corrected(beside, self.encoder.num_layers)

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Chooses the attention of both, see :meth:`whisper_meft.MeftModel.set_attn_implementation`."""
        super().set_attn_implementation(attn_implementation)
        self.decoder.config._attn_implementation = attn_implementation

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """What generation takes for the encoder: called with ``input_features``, gives what the decoder
        reads."""
        return _Encoder(self)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.proj_out

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads to predict ``labels`` (B, U): the start token, then all but the last."""
        config = self.decoder.config
        return shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
        hidden_states: torch.Tensor | None = None,
        hidden_state_lengths: torch.Tensor | None = None,
        hidden_state_statistics: torch.Tensor | None = None,
        hidden_state_scales: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[torch.Tensor, ...]:
        """The mean cross-entropy of ``labels``, and the scores of every token of the vocabulary.

        Args:
            input_features: (B, mel bins, frames) log-mel from the backbone's feature extractor.
            attention_mask: accepted and not read: Whisper hears padding as silence.
            decoder_input_ids: (B, U) tokens that the decoder reads; unset are the labels, shifted.
            decoder_attention_mask: (B, U), 0 for padding on the left of ``decoder_input_ids``.
            encoder_outputs: in place of ``input_features``, what :meth:`get_encoder` gave, or its first entry
                (B, T, D) in a tuple; with ``placement="both"`` (B, T, D + r), the side network's behind.
            labels: (B, U) token numbers; -100 is skipped.
            return_dict: ``False`` gives a tuple.
            num_items_in_batch: what the summed loss is divided by, from Trainer; without it the labels that
                count.
            return_logits: whether to compute scores beside a loss, which does not need them; unset only in
                evaluation mode.
            hidden_states: (B, S, T, D) in place of ``input_features``: the states that ``states_read``
                names, computed earlier (:mod:`whisper_meft.feature_cache`), of the whole window's frames; or,
                where ``states_of`` says "decoder", of the U tokens of ``decoder_input_ids``.
            hidden_state_lengths: (B,) how many of the frames or tokens are a clip's own.
            hidden_state_statistics: (B, S, T, 2) mean and rstd of their rows, where these are known.
            hidden_state_scales: (B, S, 2, D) scale and shift of ``hidden_states`` in 8 bits, int8 or
                float8_e4m3fn.
            kwargs: ``label_smoothing``, the share of the loss's target that is spread over the vocabulary;
                others are ignored, for callers that pass options of other models, but for those of Whisper's
                that read a part of a transcript or keep a cache for the next.

        Returns:
            ``loss`` (a float32 scalar) if ``labels`` are given, and ``logits`` (B, U, vocabulary) unless they
            are left out.

        Raises:
            UserError: wrong shape, dtype, device or label, more tokens than the decoder has positions, sound
                behind ``max_frames``, or an argument of Whisper's that is not taken here.
        """
        for name in _NOT_TAKEN:
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise UserError(
                    f"{name} must be None: forward reads token numbers from the first on and keeps no cache; "
                    "generate does"
                )
        if self.training and self.meft_config.method == "mezo" and torch.is_grad_enabled():
            refuse_gradients()
        self.refuse_training_in_half()
        self._tell_of_hooks()
        self._tell_of_unfrozen()
        if self.training and getattr(self.decoder.config, "apply_spec_augment", False):
            warn_once(
                "The backbone's config asks for SpecAugment in training (apply_spec_augment), which is not "
                "done: augment the clips instead (--augment spec, or data.augmenter.Augmenter)"
            )
        check_tensors(
            input_features=input_features,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            labels=labels,
            hidden_states=hidden_states,
            hidden_state_lengths=hidden_state_lengths,
            hidden_state_statistics=hidden_state_statistics,
            hidden_state_scales=hidden_state_scales,
        )
        if sum(each is not None for each in (input_features, encoder_outputs, hidden_states)) != 1:
            raise UserError(
                "one of input_features, encoder_outputs and hidden_states is needed, and no more of them"
            )
        if labels is None and decoder_input_ids is None:
            raise UserError(
                "labels or decoder_input_ids are needed: to transcribe, call generate; to train with a "
                "Trainer's label_smoothing_factor, which takes labels away, let the collator give "
                "decoder_input_ids too"
            )
        stored = None
        if hidden_states is not None:
            self.refuse_stored()
            given = (hidden_states, hidden_state_lengths, hidden_state_statistics, hidden_state_scales)
            stored = StoredStates(self.states_read, *given)
            along = "tokens" if self.states_of == "decoder" else "frames"
            stored.check(self.encoder.hidden_size, self.encoder.layer_norm.weight.device, along)
        given = input_features if encoder_outputs is None else encoder_outputs[0]
        clips = len(given if hidden_states is None else hidden_states)
        self._check_tokens(clips, labels=labels, decoder_input_ids=decoder_input_ids)
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        elif labels is not None and labels.shape != decoder_input_ids.shape:
            raise UserError(
                f"labels must have the shape of decoder_input_ids, {tuple(decoder_input_ids.shape)}, got "
                f"{tuple(labels.shape)}"
            )
        if stored is not None and self.states_of == "decoder":
            output = self._of_cached_tokens(stored, decoder_input_ids, labels, decoder_attention_mask)
        else:
            if stored is not None:
                heard = self._of_cached_frames(stored)
            elif encoder_outputs is None:
                heard = self._heard(input_features)
            else:
                heard = encoder_outputs[0]
                if self._adapter_is_off:  # what the side network heard stands behind
                    heard = heard[..., : self.encoder.hidden_size]
                heard = iter((heard,))
            if self._at_work in ("decoder", "both"):
                output = self._corrected(decoder_input_ids, heard, decoder_attention_mask)
            else:
                output = decoded_in_chunks(self.decoder, decoder_input_ids, heard, decoder_attention_mask)
        # Not named above: a Trainer takes every argument for labels that is called so, and asks for all.
        smoothing = kwargs.get("label_smoothing", 0.0)
        loss = None if labels is None else self._loss(output, labels, num_items_in_batch, smoothing)
        if loss is not None and self.training:
            loss = with_penalty(loss, self.penalty(), labels, num_items_in_batch)
        logits = None
        if labels is None or (not self.training if return_logits is None else return_logits):
            with self.decoder.weights_as_they_are(output.device):
                logits = self.decoder.proj_out(output)
        trains = self.training and output.requires_grad and not torch.compiler.is_compiling()
        if loss is None and trains and not self.penalty_elsewhere and self.penalty() is not None:
            refuse_backward(logits, self.meft_config.method)
        if return_dict is False:
            return tuple(each for each in (loss, logits) if each is not None)
        return Seq2SeqLMOutput(loss=loss, logits=logits)

    def generate(self, input_features: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Transcribes: Hugging Face's ``WhisperForConditionalGeneration.generate``, with all its arguments
        (beams, language, timestamps, long form) and results. In evaluation mode, whatever the model is in.

        Args:
            input_features: (B, mel bins, frames). args, kwargs: see there; ``encoder_outputs`` are as in
                :meth:`forward`.

        Raises:
            UserError: sound behind ``max_frames``; or an option for which clips are heard again or several
                times, where ``encoder_outputs`` take the place of ``input_features``.
        """
        if kwargs.get("encoder_outputs") is not None:
            config = args[0] if args else kwargs.get("generation_config")
            _check_heard_once(input_features, kwargs, config or self.generation_config)
            kwargs["encoder_outputs"] = _as_encoder_output(kwargs["encoder_outputs"])
        with self._as_whisper() as whisper:
            return whisper.generate(input_features, *args, **kwargs)

    def detect_language(self, input_features: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The token of each clip's language: Hugging Face's ``detect_language``, with its arguments.

        Args:
            input_features, args, kwargs: as of :meth:`generate`.

        Returns:
            (B,) token numbers.
        """
        if kwargs.get("encoder_outputs") is not None:
            kwargs["encoder_outputs"] = _as_encoder_output(kwargs["encoder_outputs"])
        with self._as_whisper() as whisper:
            return whisper.detect_language(input_features, *args, **kwargs)

    @contextmanager
    def _as_whisper(self) -> Iterator[WhisperForConditionalGeneration]:
        """This model, in evaluation mode, as Hugging Face's code that generates takes it."""
        self.check_not_given_up()
        training = self.training
        self.eval()
        self.decoder.prepare_outputs()
        try:
            if self._at_work in ("decoder", "both"):
                decoder = CorrectedDecoder(self.decoder, self._of_the_decoder()).whisper_decoder()
            else:
                decoder = self.decoder.around()
            whisper = self.decoder.whisper(_Encoder(self), decoder)
            whisper.generation_config = self.generation_config
            with self.decoder.weights_as_they_are(self.encoder.conv1.weight.device):
                yield whisper
        finally:
            self.train(training)

    def window(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is computed of log-mel (B, mel bins, frames): the first ``max_frames`` of all clips alike; and
        how many encoder frames that is (B,), or None for the backbone's whole window.

        Raises:
            UserError: sound behind them.
        """
        options, lengths = self.meft_config, None
        if options.max_frames != "fidelity" and features.ndim == 3:
            most = 2 * options.max_frames
            # Fake tensors have no sound to look for.
            real = type(features) is torch.Tensor and not torch.compiler.is_compiling()
            if features.shape[2] > most and real and len(features):
                # Two frames more are the overlap of the last window with a clip that ends there.
                heard = int(frames_with_sound(features).max())
                if heard > most + 2:
                    raise UserError(
                        f"a clip has sound up to frame {heard} of its log-mel, max_frames "
                        f"{options.max_frames} keeps {most} of them: its text would not be what is heard"
                    )
            features = features[..., :most]
            lengths = torch.full(
                (len(features),), (features.shape[2] + 1) // 2, dtype=torch.long, device=features.device
            )
        return features, lengths

    def _heard(self, features: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the decoder reads of the audio, (b, T, D) of some clips after the other."""
        options = self.meft_config
        features, lengths = self.window(features)
        if self._at_work == "encoder":
            given = (self.encoder, self.side_network, features, lengths, options.chunk_size)
            return corrected_in_chunks(*given, options.through_last_layer)
        if self._at_work == "both":
            given = (self.encoder, self.side_network.memory, features, lengths, options.chunk_size)
            return heard_beside(*given)
        if not options.frozen_encoder:
            *_, heard = self.encoder.stream(features, lengths, final_norm=True)
            # A decoder in half precision that does not train is none of autocast's business.
            return iter((heard if self.decoder.dtype == torch.float32 else heard.to(self.decoder.dtype),))
        return self._encoded_in_parts(features, lengths)

    def _clips_at_a_time(self, frames: int, width: int, device: torch.device) -> int:
        """Clips that the frozen decoder listens to at a time; (frames, width) is what each gives it."""
        size = clips_at_a_time(self.decoder, frames, width, device)
        # A backward through the last layer holds the gradients of keys and values beside them.
        return max(1, size // 2) if self.meft_config.through_last_layer else size

    def _encoded_in_parts(
        self, features: torch.Tensor, lengths: torch.Tensor | None
    ) -> Iterator[torch.Tensor]:
        """:meth:`_encoded` of as many clips as the decoder listens to at a time."""
        size = len(features)
        if features.ndim == 3 and not torch.compiler.is_compiling():
            heard = (features.shape[2] + 1) // 2, self.encoder.hidden_size
            size = self._clips_at_a_time(*heard, features.device)
        for start in range(0, max(len(features), 1), max(size, 1)):
            part = slice(start, start + size)
            yield self._encoded(features[part], None if lengths is None else lengths[part])

    @torch.no_grad()
    def _encoded(self, features: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """The frozen encoder's own output (B, T, D)."""
        size = self.meft_config.chunk_size
        if size is None:
            frames = (features.shape[-1] + 1) // 2
            size = automatic_chunk(self.encoder, frames, features.device)
        states = None
        for states in self.encoder.stream(features, lengths, chunk_size=size, overwrite=True):  # noqa: B007
            pass
        return self.encoder.normed_output(states)

    def _of_cached_frames(self, stored: StoredStates) -> Iterator[Any]:
        """What :meth:`_heard` gives, from the encoder's states."""
        options, encoder = self.meft_config, self.encoder
        whole, frames = options.max_frames == "fidelity", stored.values.shape[2]
        most = encoder.max_source_positions if whole else options.max_frames
        stored.check_whole(most, "the backbone's whole window" if whole else "as max_frames says")
        lengths = stored.lengths
        if lengths is not None and _readable(lengths) and bool((lengths != frames).any()):
            raise UserError(
                f"hidden_state_lengths must all be {frames} for recognition, which hears padding as silence, "
                f"got {int(lengths[lengths != frames][0])}"
            )
        alike = torch.full((len(stored.values),), frames, device=stored.values.device)
        stored = replace(stored, lengths=None if whole else alike)
        if self.placement == "encoder":
            given = (encoder, self.side_network, stored, options.chunk_size)
            return corrected_of_cached(*given, options.through_last_layer)
        if self.placement == "both":
            return heard_of_cached(encoder, self.side_network.memory, stored, options.chunk_size)
        return self._encoded_before(stored)

    def _encoded_before(self, stored: StoredStates) -> Iterator[torch.Tensor]:
        """The encoder's output, from its last state, of as many clips as the decoder listens to at a time."""
        encoder, (clips, _, frames, width) = self.encoder, stored.values.shape
        size = clips
        if not torch.compiler.is_compiling():
            size = self._clips_at_a_time(frames, width, stored.values.device)
        for start in range(0, max(clips, 1), max(size, 1)):
            part = stored.clips(slice(start, start + size))
            yield encoder.normed_output(part.state(0, encoder.dtype))

    def _of_cached_tokens(
        self,
        stored: StoredStates,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The corrected output of the decoder (B, U, D), from its states."""
        decoder, tokens = self.decoder, input_ids.shape[1]
        if mask is not None:
            raise UserError(
                "decoder_attention_mask must be None beside hidden_states of the decoder, computed without it"
            )
        if stored.values.shape[2] != tokens:
            raise UserError(
                f"hidden_states must have the {tokens} tokens of decoder_input_ids, got "
                f"{stored.values.shape[2]}: they are of other transcripts"
            )
        lengths = stored.lengths
        if labels is not None and lengths is not None and _readable(labels) and _readable(lengths):
            behind = torch.arange(tokens) >= lengths[:, None]
            if bool((behind & (labels != -100)).any()):
                raise UserError(
                    "labels must be -100 behind hidden_state_lengths, the tokens whose states there are: "
                    "they are of other transcripts"
                )
        states = stored.stream(decoder.dtype, statistics=True)
        return corrected_of_tokens(decoder, self.side_network, states)

    @torch.no_grad()
    def token_states(
        self, features: torch.Tensor, lengths: torch.Tensor | None, input_ids: torch.Tensor
    ) -> list[torch.Tensor]:
        """The frozen decoder's states d_0 to d_L (B, U, D) of tokens (B, U), for what :meth:`window` gave."""
        return token_states(self.decoder, input_ids, self._encoded(features, lengths))

    def _corrected(
        self, input_ids: torch.Tensor, heard: Iterator[torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        if not self.meft_config.through_last_layer:
            return self._of_tokens(input_ids, heard, mask)
        outputs, done = [], 0
        for own in heard:
            rows = slice(done, done + len(own))
            corrected = CorrectedDecoder(self.decoder, self.side_network, clips=len(input_ids))
            of_part = None if mask is None else mask[rows]
            run = corrected.whisper_decoder()
            outputs.append(self.decoder.run(run, input_ids[rows], own, of_part))
            done += len(own)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _of_tokens(
        self, input_ids: torch.Tensor, heard: Iterator[torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As :meth:`_corrected`, of a side network that needs no layer of the decoder: it reads the states of
        all clips at once, and of what was heard no more is kept than its own part."""
        parts, memories, done = [], [], 0
        for part in heard:
            own, memory = part if isinstance(part, tuple) else (part, None)
            if own.shape[-1] > self.encoder.hidden_size:  # get_encoder gives both, one behind the other
                own, memory = own.tensor_split([self.encoder.hidden_size], -1)
            memories.append(memory)
            rows = slice(done, done + len(own))
            of_part = None if mask is None else mask[rows]
            parts.append(token_states(self.decoder, input_ids[rows], own, of_part))
            done += len(own)
        del part, own
        states, memory = parts[0], memories[0]
        if len(parts) > 1:
            states = [torch.cat([part.pop(0) for part in parts]) for _ in range(len(states))]
            memory = None if memory is None else torch.cat(memories)
        del parts, memories
        return corrected_of_tokens(self.decoder, self._of_the_decoder(), states, mask, memory)

    def _of_the_decoder(self) -> nn.Module:
        """The side network that reads the decoder's states."""
        return self.side_network.decoder if self.placement == "both" else self.side_network

    def _loss(
        self,
        output: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        label_smoothing: float,
    ) -> torch.Tensor:
        labels = labels.to(output.device)
        head = self.decoder.proj_out.weight
        losses = linear_cross_entropy(output, head, labels, label_smoothing)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != -100).sum()
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(output.device)
        return losses.sum() / num_items_in_batch

    def _check_tokens(self, clips: int, **arguments: torch.Tensor | None) -> None:
        most, vocabulary = self.decoder.max_target_positions, self.decoder.proj_out.weight.shape[0]
        for name, tokens in arguments.items():
            if tokens is None:
                continue
            if tokens.ndim != 2 or len(tokens) != clips or tokens.dtype not in (torch.int32, torch.int64):
                raise UserError(
                    f"{name} must be token numbers of shape ({clips}, tokens), got {tuple(tokens.shape)} of "
                    f"{tokens.dtype}"
                )
            if not 1 <= tokens.shape[1] <= most:
                raise UserError(
                    f"{name} must hold 1 to {most} tokens, the decoder's positions, got {tokens.shape[1]}"
                )
            if _readable(tokens) and clips:
                counted = tokens[tokens != -100] if name == "labels" else tokens
                wrong = counted[(counted < 0) | (counted >= vocabulary)]
                if len(wrong):
                    raise UserError(
                        f"{name} must lie in 0..{vocabulary - 1}, the vocabulary, got {int(wrong[0])}"
                    )

    def write_backbone(self, folder: str | os.PathLike) -> None:
        config = type(self.decoder.config).from_dict(self.decoder.config.to_dict())
        config.architectures = [type(self).base_class.__name__]
        config.dtype = self.encoder.dtype
        tensors = {f"model.encoder.{name}": t for name, t in self.encoder.backbone_state().items()}
        tied = self.decoder.proj_out.weight is self.decoder.embed_tokens.weight
        for name, tensor in self.decoder.backbone_state().items():
            if not name.startswith("proj_out."):
                tensors[f"model.decoder.{name}"] = tensor
            elif not tied:
                tensors[name] = tensor
        write_whisper(self.encoder, tensors, config, folder)
        write_text(Path(folder) / "generation_config.json", self.generation_config.to_json_string())

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> WhisperForConditionalGeneration:
        """A plain Whisper in float32 that transcribes the same, for methods that only change the backbone's
        weights: the LoRA family, and those that train the weights themselves.

        This model stays as it is. Arguments are ignored, for callers of PEFT.

        Raises:
            UserError: side networks and adapters cannot be merged.
        """
        return merged_recogniser(self)


def _readable(tensor: torch.Tensor) -> bool:
    """Whether looking at the values costs no wait for a device (fake tensors have none)."""
    here = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    return here and not torch.compiler.is_compiling()


def _as_encoder_output(given: Any) -> BaseModelOutput:
    """``encoder_outputs`` as Hugging Face's code that generates takes them, which reads tuples otherwise than
    ``forward`` does.

    Raises:
        UserError: they are neither what an encoder gave nor its first entry (B, T, D) in a tuple.
    """
    heard = given[0] if isinstance(given, (tuple, list, ModelOutput)) and len(given) else None
    if not isinstance(heard, torch.Tensor) or heard.ndim != 3:
        got = tuple(heard.shape) if isinstance(heard, torch.Tensor) else f"a {type(given).__name__}"
        raise UserError(
            "encoder_outputs must be what get_encoder() gave, or its first entry (B, T, D) in a tuple, got "
            f"{got}"
        )
    return given if isinstance(given, BaseModelOutput) else BaseModelOutput(last_hidden_state=heard)


def _check_heard_once(
    features: torch.Tensor | None, options: dict[str, Any], config: GenerationConfig
) -> None:
    """Raises UserError for an option with which ``generate`` goes back to the sound, and would read all of
    ``encoder_outputs`` again: times, behind the last of which the rest of a window is heard; other
    temperatures, for some of the clips; several transcripts of each."""
    if features is not None:
        raise UserError("one of input_features and encoder_outputs is needed, and no more of them")

    def asked(name: str) -> Any:
        value = options.get(name)
        return getattr(config, name, None) if value is None else value

    temperatures = options.get("temperature")
    refused = {
        "return_timestamps": asked("return_timestamps") and not asked("force_unique_generate_call"),
        "num_return_sequences": (asked("num_return_sequences") or 1) > 1,
        "temperature": isinstance(temperatures, (tuple, list)) and len(temperatures) > 1,
    }
    for name, is_wrong in refused.items():
        if is_wrong:
            raise UserError(
                f"{name} cannot be {asked(name)!r} with encoder_outputs, for it has clips heard again: give "
                "input_features"
            )


class _Encoder(nn.Module):
    """A model's encoder and what corrects it, as generation calls an encoder."""

    main_input_name = "input_features"

    def __init__(self, model: MeftForConditionalGeneration):
        super().__init__()
        self.conv1, self.conv2 = model.encoder.conv1, model.encoder.conv2  # for their strides
        self._model = (model,)  # no submodule of this one
        self.config = model.encoder.config

    def forward(self, input_features: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        parts = [
            torch.cat(part, -1) if isinstance(part, tuple) else part
            for part in self._model[0]._heard(input_features)
        ]
        return BaseModelOutput(last_hidden_state=parts[0] if len(parts) == 1 else torch.cat(parts))


AutoModelForSpeechSeq2Seq.register(MeftModelConfig, MeftForConditionalGeneration, exist_ok=True)
