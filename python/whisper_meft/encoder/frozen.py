"""The frozen Whisper encoder as a stream of hidden states."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.modeling_outputs import BaseModelOutput

from meft_kernels import HiddenState

from ..errors import UserError
from .compiled import compiled_layer
from .dtypes import parse_dtype
from .fingerprint import fingerprint
from .layer import finish_layer, is_listened_to, norm_with_statistics, run_with_gradient
from .quantization import Original, cast, is_in_pieces, is_quantized, quantize_layers, weights_digest


def row_parts(rows: int, parts: int) -> list[slice]:
    """Slices that cover ``range(rows)``, as many as asked for and not empty, that differ by one row at most,
    longer ones first: an allocator then has the memory of one for the next."""
    size, longer = divmod(rows, parts)
    edges = [size * index + min(index, longer) for index in range(parts + 1)]
    return [slice(start, end) for start, end in zip(edges, edges[1:]) if start < end]


def as_output(states: Iterator[torch.Tensor], all_of_them: bool = False) -> BaseModelOutput:
    """Hidden states h_0, ... as Hugging Face's encoders give them: the last, or all as ``hidden_states``."""
    if all_of_them:
        kept = tuple(states)
        return BaseModelOutput(last_hidden_state=kept[-1], hidden_states=kept)
    last = None
    for last in states:  # noqa: B007  earlier ones are freed as the next is made
        pass
    return BaseModelOutput(last_hidden_state=last)


class FrozenEncoder(nn.Module):
    """Drives the submodules of a Hugging Face ``WhisperEncoder`` without gradients, one layer at a time.

    The modules are shared with the encoder that is passed in, not copied, and keep their names, so the state
    dict has the encoder's own keys. Frozen means frozen: no parameter requires a gradient, and neither
    ``train()`` here nor on the encoder it came from turns on dropout or LayerDrop.

    Weights in half precision, and quantised ones, run as they are, also under autocast: inputs are cast to
    them. Weights in float32 follow autocast.

    Args:
        whisper_encoder: ``transformers.models.whisper.modeling_whisper.WhisperEncoder``.
        dtype: number format to hold the weights in (``"bfloat16"`` or ``torch.bfloat16``, ...); ``None``
            keeps it.
        quantization: ``"int8"``, ``"fp8"`` or ``"nf4"`` holds the linear weights of all layers but the first
            in 8 or 4 bits (:mod:`whisper_meft.encoder.quantization`), in the modules that are shared, where
            they are: put ``whisper_encoder`` on its device first. They then run as they are, also under
            autocast. Layers are brought to ``dtype`` and quantised one after the other.
        whole_last_layer: the last layer is not quantised, so that a gradient can go through it.

    Attributes:
        quantization: what was done: None, "int8", "fp8" or "nf4", "int8 rows" on a GPU, or "int8 weights" or
            "fp8 weights" where the device multiplies in the weights' own type.
        original: what is still known of weights that were quantised, else None.

    Raises:
        UserError: not a Whisper encoder, an unknown dtype, or quantisation that is not possible here.
    """

    def __init__(
        self,
        whisper_encoder: nn.Module,
        dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        whole_last_layer: bool = False,
    ):
        super().__init__()
        for name in ("config", "conv1", "conv2", "embed_positions", "layers", "layer_norm"):
            if not hasattr(whisper_encoder, name):
                raise UserError(
                    "whisper_encoder must be a Hugging Face WhisperEncoder, got "
                    f"{type(whisper_encoder).__name__}"
                )
        self.config = whisper_encoder.config
        self.conv1 = whisper_encoder.conv1
        self.conv2 = whisper_encoder.conv2
        self.embed_positions = whisper_encoder.embed_positions
        self.layers = whisper_encoder.layers
        self.layer_norm = whisper_encoder.layer_norm
        dtype = parse_dtype(dtype)
        self.requires_grad_(False)
        self.quantization: str | None = None
        self.original: Original | None = None
        self._finish: Callable[..., torch.Tensor] = finish_layer
        if is_quantized(self.layers):
            raise UserError(
                "base is quantised already, by a model that was made of it earlier: load it anew for another"
            )
        if quantization is not None:
            self._quantize(quantization, whole_last_layer, dtype)
        if dtype is not None:
            cast(self, dtype)
        self.eval()

    def _quantize(self, kind: str, whole_last_layer: bool, dtype: torch.dtype | None) -> None:
        weight = self.conv1.weight
        if not (isinstance(weight, FakeTensor) or weight.is_meta):  # which hold nothing to know them by
            digest = weights_digest(self.backbone_state(), dtype)
            self.original = Original(fingerprint(self, dtype), digest)
        layers = self.layers[:-1] if whole_last_layer else self.layers
        self.quantization = quantize_layers(layers, kind, dtype)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return self.conv2.out_channels

    @property
    def num_mel_bins(self) -> int:
        return self.conv1.in_channels

    @property
    def max_source_positions(self) -> int:
        """The window in encoder frames (1500 for the published models, 20 ms each)."""
        return self.embed_positions.num_embeddings

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stays in evaluation mode whatever is asked for."""
        return super().train(False)

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """The backbone's own tensors by the names they have in the Hugging Face encoder."""
        return self.state_dict()

    def frozen_names(self) -> set[str]:
        """Which tensors of ``state_dict`` stay as they were loaded, so that they need not be saved."""
        return set(self.state_dict())

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Compiles one layer with torch.compile and runs all layers by it, for any number and length of clips
        (a single clip, and a mask where there was none, are compiled anew). The first batch takes longer.

        Not compiled: the LayerNorm whose statistics side networks share, layers under autocast of float32
        weights, and SHERL's last layer, which has a gradient.

        Args:
            backend: of torch.compile.

        Raises:
            UserError: there is no compiler for the device of the weights.
        """
        self._finish = compiled_layer(backend, self.conv1.weight.device)

    def stream(
        self,
        input_features: torch.Tensor,
        lengths: torch.Tensor | None = None,
        final_norm: bool = False,
        statistics: bool = False,
        chunk_size: int | None = None,
        overwrite: bool = False,
        first_again: bool = False,
    ) -> Iterator[torch.Tensor | HiddenState]:
        """Yields h_0 (embedding) to h_L (raw output of the last layer), computing each when it is asked for.

        h_L is taken before the encoder's final LayerNorm; Hugging Face's ``output_hidden_states[-1]`` after
        it.

        Args:
            input_features: (B, mel bins, frames) log-mel, any floating dtype, on the encoder's device.
            lengths: (B,) integers, valid encoder frames of each clip, from 1 to ceil(frames / 2). Without it
                the frames must fill the window exactly, and padding counts as sound (the published
                behaviour). With it any number of frames up to the window is computed, and a clip's valid
                states are those it would have alone, to rounding: the mel is zeroed from frame 2 * length on
                and the attention never looks there. States past a clip's end mean nothing.
            final_norm: put the final LayerNorm on h_L, as Hugging Face does.
            statistics: yield ``meft_kernels.HiddenState`` where the row statistics come for free with the
                next layer's own LayerNorm, whose output of all chunks then waits for that layer.
            chunk_size: clips that a layer takes at a time at most, so that its transients are theirs alone;
                the results are the same. None: all.
            overwrite: with several chunks, write each state over the one before it, for whoever keeps none
                but the last.
            first_again: with several chunks, yield h_0 with what makes it again
                (``meft_kernels.HiddenState.again``), where that is possible.

        Yields:
            (B, T, hidden size) in the weights' dtype (for float32 weights under autocast in what that gives),
            without gradient; T = ceil(frames / 2).

        Raises:
            UserError: wrong shape, dtype or device of an argument, or too many frames; a backbone in fp8 was
                cast to another number format.
        """
        self._check_features(input_features, lengths)
        self._check_cast()
        self._to_evaluation()
        clips = input_features.shape[0]
        if chunk_size is None or clips <= chunk_size:
            return self._states(input_features, lengths, final_norm, statistics)
        parts = row_parts(clips, -(-clips // chunk_size))
        reading = (final_norm, statistics, parts, overwrite, first_again)
        return self._states_in_parts(input_features, lengths, *reading)

    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """What Hugging Face's ``WhisperEncoder`` gives, from :meth:`stream`.

        Args:
            input_features: (B, mel bins, frames), the whole window.
            attention_mask, kwargs: accepted and not read, as there.
            output_hidden_states: give all hidden states too.

        Returns:
            ``last_hidden_state`` (B, T, hidden size), after the final LayerNorm, and if asked for
            ``hidden_states``: h_0 to h_{L-1}, and the same last one.

        Raises:
            UserError: see :meth:`stream`.
        """
        return as_output(self.stream(input_features, final_norm=True), output_hidden_states)

    def last_layer(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The last encoder layer and the final LayerNorm, frozen, with gradient to the input.

        Args:
            hidden_states: (B, T, hidden size), a replacement of h_{L-1}. lengths: as for :meth:`stream`.

        Returns:
            (B, T, hidden size) in the weights' dtype.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise UserError(
                f"hidden_states must have shape (batch, frames, {self.hidden_size}), got "
                f"{tuple(hidden_states.shape)}"
            )
        self._to_evaluation()
        with self._weights_as_they_are(hidden_states.device):
            hidden_states = hidden_states.to(self.dtype)
            mask = self._attention_mask(lengths, hidden_states.shape[1])
            layer = self.layers[-1]
            if not self._runs_alone(hidden_states, layer):
                states = self._run(layer, hidden_states, mask)
            elif torch.is_grad_enabled() and hidden_states.requires_grad:
                states = run_with_gradient(layer, hidden_states, mask)
            else:
                states = finish_layer(layer, hidden_states, layer.self_attn_layer_norm(hidden_states), mask)
            return self.layer_norm(states)

    def normed_output(self, last_state: torch.Tensor) -> torch.Tensor:
        """The encoder's output, from the raw output of its last layer: the final LayerNorm, without gradient.

        Args:
            last_state: (B, T, hidden size), what :meth:`stream` yields last.
        """
        with torch.no_grad(), self._weights_as_they_are(last_state.device):
            return self.layer_norm(last_state)

    # Each step has its own no_grad: one that spanned a yield would leak into the consumer's code.
    def _states(
        self,
        input_features: torch.Tensor,
        lengths: torch.Tensor | None,
        final_norm: bool,
        statistics: bool,
    ) -> Iterator[torch.Tensor | HiddenState]:
        device = input_features.device
        with torch.no_grad(), self._weights_as_they_are(device):
            states = self._embed(input_features, lengths)
            mask = self._attention_mask(lengths, states.shape[1])
        for layer in self.layers:
            known = normed = None
            if statistics:
                with torch.no_grad(), self._weights_as_they_are(device):
                    if self._runs_alone(states, layer):
                        normed, known = norm_with_statistics(layer.self_attn_layer_norm, states)
            yield HiddenState(states, *known) if known else states
            with torch.no_grad(), self._weights_as_they_are(device):
                if self._runs_alone(states, layer):
                    normed = layer.self_attn_layer_norm(states) if normed is None else normed
                    states, normed = self._finish(layer, states, normed, mask), None
                else:
                    states = self._run(layer, states, mask)
                if final_norm and layer is self.layers[-1]:
                    states = self.layer_norm(states)
        yield states

    def _states_in_parts(
        self,
        input_features: torch.Tensor,
        lengths: torch.Tensor | None,
        final_norm: bool,
        statistics: bool,
        parts: Sequence[slice],
        overwrite: bool,
        first_again: bool,
    ) -> Iterator[torch.Tensor | HiddenState]:
        """As ``_states``, layer by layer, each written part by part into one slab."""
        device, states = input_features.device, None
        part_lengths = [None if lengths is None else lengths[part] for part in parts]
        with torch.no_grad(), self._weights_as_they_are(device):
            for part, of_part in zip(parts, part_lengths):
                embedded = self._embed(input_features[part], of_part)
                if states is None:
                    states = embedded.new_empty(input_features.shape[0], *embedded.shape[1:])
                states[part] = embedded
            del embedded
            again = self._embed_again(input_features, lengths) if first_again else None
            masks = [self._attention_mask(of_part, states.shape[1]) for of_part in part_lengths]
        for layer in self.layers:
            alone = self._runs_alone(states, layer)
            known, waiting = None, [None] * len(parts)
            if statistics and alone:
                with torch.no_grad(), self._weights_as_they_are(device):
                    norm = layer.self_attn_layer_norm
                    waiting, known = map(
                        list, zip(*(norm_with_statistics(norm, states[part]) for part in parts))
                    )
                    known = None if known[0] is None else [torch.cat(each) for each in zip(*known)]
            mean, rstd = known or (None, None)
            yield HiddenState(states, mean, rstd, again) if known or again else states
            again = mean = rstd = known = None
            with torch.no_grad(), self._weights_as_they_are(device):
                target = states if overwrite else torch.empty_like(states)
                for part, mask in zip(parts, masks):
                    normed = waiting.pop(0)
                    if alone:
                        normed = layer.self_attn_layer_norm(states[part]) if normed is None else normed
                        self._finish(layer, states[part], normed, mask, target[part])
                        del normed
                    else:
                        target[part] = self._run(layer, states[part], mask)
                    if final_norm and layer is self.layers[-1]:
                        target[part] = self.layer_norm(target[part])
                states = target
                del target
        last = [states]
        del states
        yield last.pop()  # whose memory is the reader's to free

    def _embed_again(
        self, input_features: torch.Tensor, lengths: torch.Tensor | None
    ) -> Callable[[], torch.Tensor] | None:
        """What makes h_0 again later; None where it would run under another autocast there."""
        follows = isinstance(self._weights_as_they_are(input_features.device), nullcontext)
        if follows and torch.is_autocast_enabled(input_features.device.type):
            return None
        given = [tensor for tensor in (input_features, lengths) if tensor is not None]
        versions = [None if tensor.is_inference() else tensor._version for tensor in given]

        def again() -> torch.Tensor:
            if versions != [None if tensor.is_inference() else tensor._version for tensor in given]:
                raise RuntimeError(
                    "input_features or lengths were changed in place between forward and backward, which "
                    "reads them again with saved_activations='int8' or 'fp8'"
                )
            states = None
            with torch.no_grad(), self._weights_as_they_are(input_features.device):
                # In quarters: the first convolution's output then takes the memory of an 8-bit state.
                for part in row_parts(input_features.shape[0], 4):
                    embedded = self._embed(input_features[part], None if lengths is None else lengths[part])
                    if states is None:
                        states = embedded.new_empty(input_features.shape[0], *embedded.shape[1:])
                    states[part] = embedded
            return states

        return again

    @staticmethod
    def _runs_alone(states: torch.Tensor, layer: nn.Module) -> bool:
        """Whether a layer needs nothing of Hugging Face's code around its modules: under autocast the types
        of the sums matter, an empty batch is not for its reshapes, and hooks run there alone."""
        if is_listened_to(layer):
            return False
        return states.shape[0] > 0 and not torch.is_autocast_enabled(states.device.type)

    def _to_evaluation(self) -> None:
        if any(layer.training for layer in self.layers):  # train() was called on the model that shares them
            self.eval()

    def _embed(self, input_features: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        features = input_features.to(self.dtype)
        if lengths is not None:
            if features.shape[-1] % 2:  # so that the last frame sees what it would see in a longer batch
                features = nn.functional.pad(features, (0, 1))
            past_end = torch.arange(features.shape[-1], device=features.device) >= 2 * lengths[:, None]
            features = features.masked_fill(past_end[:, None, :], 0)
        features = nn.functional.gelu(self.conv1(features))
        features = nn.functional.gelu(self.conv2(features)).permute(0, 2, 1)
        return features + self.embed_positions.weight[: features.shape[1]]

    def _attention_mask(self, lengths: torch.Tensor | None, frames: int) -> torch.Tensor | None:
        """Which keys may be looked at, in the form that the attention implementation reads; None for all."""
        if lengths is None:
            return None
        keep = torch.arange(frames, device=lengths.device) < lengths[:, None]
        implementation = self.config._attn_implementation
        if implementation == "sdpa":
            return keep[:, None, None, :]
        if implementation in ("eager", None):
            mask = torch.zeros(keep.shape, dtype=self.dtype, device=keep.device)
            return mask.masked_fill(~keep, torch.finfo(self.dtype).min)[:, None, None, :]
        if implementation.startswith("flash_attention"):
            return keep
        raise UserError(
            f"attn_implementation {implementation!r} cannot skip padding: use 'sdpa' or 'eager', or "
            "max_frames='fidelity'"
        )

    @staticmethod
    def _run(layer: nn.Module, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if not states.shape[0]:  # the layer's reshapes cannot handle an empty batch
            return states
        output = layer(states, mask)
        return (
            output if isinstance(output, torch.Tensor) else output[0]
        )  # a tuple in some transformers versions

    def _weights_as_they_are(self, device: torch.device) -> AbstractContextManager:
        as_they_are = self.quantization or self.dtype in (torch.float16, torch.bfloat16, torch.float64)
        if as_they_are and device.type != "meta":
            return torch.autocast(device.type, enabled=False)
        return nullcontext()

    def _check_cast(self) -> None:
        """Refuses a number format that the quantised weights were not brought to with the others: torchao's
        stay in their own, which they are widened to where the device does not multiply in fp8."""
        if self.quantization != "fp8 weights":
            return
        held = {weight.dtype for weight in self.layers.parameters() if is_in_pieces(weight)} - {self.dtype}
        if held:
            was, now = (str(dtype).removeprefix("torch.") for dtype in (held.pop(), self.dtype))
            raise UserError(
                f"the backbone was cast to {now} after backbone_quantization='fp8' had made its weights of "
                f"{was}, which they stay in: give backbone_dtype={now!r} with it (from_pretrained: dtype) "
                "instead of a cast"
            )

    def _check_features(self, features: torch.Tensor, lengths: torch.Tensor | None) -> None:
        if not isinstance(features, torch.Tensor) or features.ndim != 3:
            got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise UserError(f"input_features must be a tensor of shape (batch, mel bins, frames), got {got}")
        if not features.is_floating_point():
            raise UserError(f"input_features must be floating point, got {features.dtype}")
        if features.shape[1] != self.num_mel_bins:
            raise UserError(
                f"input_features must have {self.num_mel_bins} mel bins, the backbone's number, got "
                f"{features.shape[1]}: use the feature extractor that belongs to the backbone"
            )
        weight = self.conv1.weight
        if features.device != weight.device and weight.device.type != "meta":
            raise UserError(f"input_features are on {features.device}, the backbone is on {weight.device}")
        frames, window = features.shape[2], 2 * self.max_source_positions
        if lengths is None:
            if frames != window:
                raise UserError(
                    f"input_features must have {window} frames, the backbone's whole window, got {frames}: "
                    "pad them, or compute fewer frames with lengths (max_frames='longest' or a number in "
                    "the config)"
                )
            return
        if not 1 <= frames <= window:
            raise UserError(f"input_features must have 1 to {window} frames, got {frames}")
        if lengths.shape != features.shape[:1] or lengths.dtype not in (torch.int64, torch.int32):
            raise UserError(
                f"lengths must be {features.shape[0]} integers, one per clip, got shape "
                f"{tuple(lengths.shape)} of {lengths.dtype}"
            )
        if lengths.device != features.device:
            raise UserError(f"lengths are on {lengths.device}, input_features are on {features.device}")
