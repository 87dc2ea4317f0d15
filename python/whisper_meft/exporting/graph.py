"""A trained classifier as one module of plain operations, for torch.onnx: the readable forwards, with no
custom op, no chunks and no branch on a size."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import meft_kernels
from meft_kernels import reference
from meft_kernels.reference.common import ATTENTION_EPS, frame_weights, masked_mean

from ..encoder.cached import states_read
from ..encoder.pooling import LastState, mean_and_deviation_at_once, mean_over_time
from ..model.merging import merged_tensors
from ..model.module import MeftModel
from .log_mel import LogMel


def first(x: Tensor, size: int, axis: int) -> Tensor:
    """The first ``size`` along an axis, which are there: of a slice an exporter asks whether it cuts."""
    return x.index_select(axis, torch.arange(size))


class ExportedUniPT(reference.UniPT):
    """UniPT with keys that are means of frames, whose number is not known."""

    def merge(self, anchor: Tensor, features: list[Tensor], lengths: Tensor | None) -> Tensor:
        """G (B, T, r), as ``reference.relu_attention`` defines it."""
        kind, pool = self._attention
        if kind != "relu" or pool == 1:
            return super().merge(anchor, features, lengths)
        batch, frames, _ = anchor.shape
        valid = frame_weights(lengths, batch, frames, anchor)
        groups = (frames + pool - 1) // pool

        def sums(x: Tensor) -> Tensor:
            """(B, T, r) -> (B, K, r), over groups of frames."""
            x = F.pad(x.masked_fill((valid == 0)[..., None], 0), (0, 0, 0, pool))
            x = first(x, groups * pool, 1)
            return x.reshape(batch, groups, pool, x.shape[-1]).sum(2)

        members = sums(torch.ones_like(anchor[..., :1]))
        merged, confidences = [], []
        for feature in features:
            keys = sums(feature) / members.clamp(min=1)
            scores = torch.relu(anchor @ keys.mT) * members.mT
            merged.append(scores @ keys / (scores.sum(-1, keepdim=True) + ATTENTION_EPS) + feature)
            confidences.append(self.gate(masked_mean(anchor, valid) * masked_mean(feature, valid)))
        gates = torch.softmax(torch.cat(confidences, -1), -1)
        return torch.einsum("bl,lbtr->btr", gates, torch.stack(merged))


_READABLE = {
    meft_kernels.LST: reference.LST,
    meft_kernels.UniPT: ExportedUniPT,
    meft_kernels.SHERL: reference.SHERL,
}


def _readable(network: nn.Module) -> nn.Module:
    """The same parameters under the readable forward."""
    twin = copy.copy(network)
    twin.__class__ = _READABLE.get(type(network), type(network))
    return twin


def _with_updates(encoder: nn.Module) -> nn.Module:
    """The encoder with what the LoRA family trained added to the weights."""
    if not any(hasattr(module, "get_delta_weight") for module in encoder.modules()):
        return encoder
    with torch.device("meta"):
        plain = WhisperEncoder(copy.deepcopy(encoder.config))
    plain.load_state_dict(merged_tensors(encoder, "", torch.float32), assign=True)
    return plain.eval()


def _layer(layer: nn.Module, states: Tensor, mask: Tensor | None) -> Tensor:
    """A ``WhisperEncoderLayer`` in evaluation mode, (B, T, D) to (B, T, D)."""
    attention, normed = layer.self_attn, layer.self_attn_layer_norm(states)
    split = (*states.shape[:2], attention.num_heads, attention.head_dim)
    projected = (
        attention.q_proj(normed) * attention.scaling,
        attention.k_proj(normed),
        attention.v_proj(normed),
    )
    query, key, value = (each.reshape(split).transpose(1, 2) for each in projected)
    scores = query @ key.mT
    scores = scores if mask is None else scores + mask
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(states.shape)
    states = states + attention.out_proj(mixed)
    return states + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(states))))


class ClassifierGraph(nn.Module):
    """Log-mel to class probabilities: what a trained model gives in evaluation mode.

    Args:
        model: a classifier whose weights are float32, and not quantised. It stays as it is.
    """

    def __init__(self, model: MeftModel):
        super().__init__()
        self.options, self.temperature = model.meft_config, model.config.calibration_temperature
        self.window = model.encoder.max_source_positions
        self.encoder = _with_updates(model.encoder)
        self.side_network = _readable(model.side_network)
        self.standardisation = getattr(model, "standardisation", None)
        self.projector, self.classifier = model.projector, model.classifier
        self.last_state = states_read(model.side_network, model.encoder.num_layers)[-1]
        self.eval()

    @property
    def max_frames(self) -> int:
        """The encoder frames of a clip that are heard at most."""
        return self.options.max_frames if isinstance(self.options.max_frames, int) else self.window

    def forward(self, input_features: Tensor, frames: Tensor | None) -> tuple[Tensor, Tensor]:
        """Probabilities and what the softmax is taken of, (B, classes) each.

        Args:
            input_features: (B, mel bins, F) float32; with max_frames "fidelity" F is the whole window's.
            frames: (B,) int64, the mel frames of each clip that hold sound, or None with "fidelity". A clip
                of none has no answer: NaN, since a graph cannot refuse it.
        """
        features, lengths, mask = input_features, None, None
        unheard = None if frames is None else frames < 1
        if self.options.max_frames != "fidelity":
            features = first(features, torch.sym_min(features.shape[2], 2 * self.max_frames), 2)
            frames = torch.minimum(frames, torch.full_like(frames, features.shape[2])).clamp(min=1)
            lengths = (frames + 1) // 2
            past_end = torch.arange(features.shape[2]) >= frames[:, None]
            features = features.masked_fill(past_end[:, None], 0)
            past_end = torch.arange((features.shape[2] + 1) // 2) >= lengths[:, None]
            mask = torch.zeros_like(past_end, dtype=features.dtype).masked_fill(past_end, -torch.inf)
            mask = mask[:, None, None]
        states, statistics = self._states(features, mask), []
        if self.standardisation is not None:
            states = self._watched(states, lengths, statistics)
        if self.options.through_last_layer:
            last = _layer(self.encoder.layers[-1], self.side_network(states, lengths), mask)
            pooled = mean_over_time(self.encoder.layer_norm(last), lengths)
        else:
            pooled = self.side_network.pooled(states, lengths)
        if self.standardisation is not None:
            alone = isinstance(self.side_network, LastState)  # whose mean is among them
            pooled = self.standardisation(torch.cat([*([] if alone else [pooled]), *statistics], -1))
        logits = self.classifier(self.projector(pooled))
        logits = logits if self.temperature is None else logits / self.temperature
        logits = logits if unheard is None else logits.masked_fill(unheard[:, None], torch.nan)
        return logits.softmax(-1), logits

    def _states(self, features: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """h_0 to h_L, as ``FrozenEncoder.stream``."""
        encoder, positions = self.encoder, self.encoder.embed_positions.weight
        if mask is not None:  # the last frame sees what it would see in a longer batch
            features = F.pad(features, (0, 1))
        states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).mT
        if mask is not None:
            frames = mask.shape[-1]
            states, positions = first(states, frames, 1), first(positions, frames, 0)
        states = states + positions
        yield states
        for layer in encoder.layers:
            states = _layer(layer, states, mask)
            if self.options.final_norm and layer is encoder.layers[-1]:
                states = encoder.layer_norm(states)
            yield states

    def _watched(self, states: Iterator[Tensor], lengths: Tensor | None, taken: list) -> Iterator[Tensor]:
        """The states as they are; statistics of the last that is read go to ``taken``."""
        for index, state in enumerate(states):
            if index == self.last_state:
                taken.append(mean_and_deviation_at_once(state, lengths))
            yield state


class WaveformGraph(nn.Module):
    """As :class:`ClassifierGraph`, of waveforms.

    Args:
        graph: what reads the log-mel. feature_extractor: what it was trained with.
    """

    def __init__(self, graph: ClassifierGraph, feature_extractor: Any):
        super().__init__()
        whole = graph.options.max_frames == "fidelity"
        samples = min(2 * graph.max_frames * feature_extractor.hop_length, int(feature_extractor.n_samples))
        self.log_mel, self.reader = LogMel(feature_extractor, samples, whole), graph

    def forward(self, waveform: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and what the softmax is taken of, (B, classes) each.

        Args:
            waveform: (B, S) float32. samples: (B,) int64, those of each clip; what lies behind is not read.
        """
        return self.reader(*self.log_mel(waveform, samples))
