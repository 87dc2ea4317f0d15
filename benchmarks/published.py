"""The methods in the structure that was published (arXiv 2512.02074), as baselines for memory and time.

Plain PyTorch on Hugging Face's encoder in float32, to be run under autocast: every hidden state and every
intermediate of the side network is kept by autograd, as there. Written from the paper's formulas; the weights
are as they come. A model is called with ``input_features`` (B, mel bins, frames) and ``labels`` (B,).
"""

import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForAudioClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from meft_kernels.reference.common import ATTENTION_EPS, GATE_TEMPERATURE, GUIDANCE_EPS

ADAPTER_DIM = 256
LORA_RANK, LORA_ALPHA, LORA_TARGETS = 64, 512, ["q_proj", "v_proj"]


def _norm_linear(in_size: int, out_size: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_size), nn.Linear(in_size, out_size))


class Adapter(nn.Module):
    """LayerNorm, Linear, GELU, Linear."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear_1, self.linear_2 = nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.norm(x))))


class Published(nn.Module):
    """A frozen Whisper encoder, a side network and Hugging Face's head, which pools after the projector.

    Args:
        config: the backbone's sizes. reduction_factor: of the side network.
    """

    def __init__(self, config: WhisperConfig, reduction_factor: int = 8):
        super().__init__()
        base = WhisperForAudioClassification._from_config(config)
        self.encoder = base.encoder.requires_grad_(False).eval()
        self.projector, self.classifier = base.projector, base.classifier
        width = config.d_model
        self.build(width, width // reduction_factor, config.encoder_layers)

    def build(self, width: int, size: int, layers: int) -> None:
        """Makes the side network of ``size`` beside ``layers`` layers of ``width``."""
        raise NotImplementedError

    def side(self, hidden_states: Iterator[Tensor]) -> tuple[Tensor, ...]:
        """From h_0 and the raw layer outputs, (B, T, D), to what takes the encoder's place, (B, T, D), and
        what else the encoder returns and the head leaves unread."""
        raise NotImplementedError

    def hidden_states(self, features: Tensor) -> Iterator[Tensor]:
        encoder = self.encoder
        states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).permute(0, 2, 1)
        states = states + encoder.embed_positions.weight
        yield states
        for layer in encoder.layers:
            states = self.run_layer(layer, states)
            yield states

    @staticmethod
    def run_layer(layer: nn.Module, states: Tensor) -> Tensor:
        output = layer(states, None)
        return output if isinstance(output, Tensor) else output[0]

    def train(self, mode: bool = True) -> "Published":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, input_features: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        outputs = self.side(self.hidden_states(input_features))
        logits = self.classifier(self.projector(outputs[0]).mean(1))
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


class PublishedLST(Published):
    def build(self, width: int, size: int, layers: int) -> None:
        self.first = _norm_linear(width, size)
        self.down = nn.ModuleList(_norm_linear(width, size) for _ in range(layers))
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(layers))
        self.adapters = nn.ModuleList(Adapter(size, ADAPTER_DIM) for _ in range(layers))
        self.up, self.norm = _norm_linear(size, width), nn.LayerNorm(width)

    def side(self, hidden_states: Iterator[Tensor]) -> tuple[Tensor, ...]:
        state = self.first(next(hidden_states))
        for down, gate, adapter, hidden in zip(self.down, self.gates, self.adapters, hidden_states):
            keep = torch.sigmoid(gate / GATE_TEMPERATURE)
            mixed = keep * state + (1 - keep) * down(hidden)
            state = mixed + adapter(mixed)
        unread = self.encoder.layer_norm(hidden)
        return self.norm(self.up(state)), unread


class PublishedUniPT(Published):
    def build(self, width: int, size: int, layers: int) -> None:
        self.down = nn.ModuleList(_norm_linear(width, size) for _ in range(layers + 1))
        self.gate = nn.Linear(size, 1)
        self.adapter = Adapter(size, width)
        self.up_norm, self.up, self.norm = nn.LayerNorm(size), nn.Linear(size, width), nn.LayerNorm(width)

    def side(self, hidden_states: Iterator[Tensor]) -> tuple[Tensor, ...]:
        *features, anchor = [down(h) for down, h in zip(self.down, hidden_states, strict=True)]
        merged, scores = [], []
        for feature in features:
            attention = F.relu(anchor @ feature.mT)
            attention = attention / (attention.sum(-1, keepdim=True) + ATTENTION_EPS)
            merged.append(attention @ feature + feature)
            scores.append(self.gate(anchor.mean(1) * feature.mean(1)))
        gates = torch.softmax(torch.stack(scores, 1), 1)
        merged = (gates[..., None] * torch.stack(merged, 1)).sum(1)
        state = anchor + self.adapter(merged)
        return (self.norm(self.up(F.relu(self.up_norm(state)))),)


class GatedDown(nn.Module):
    """SHERL's down-projection."""

    def __init__(self, in_size: int, out_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_size, out_size)
        self.linear_2, self.linear_3 = nn.Linear(out_size, out_size), nn.Linear(out_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.linear_1(x))
        return (self.linear_2(hidden) + hidden) * torch.sigmoid(self.linear_3(hidden))


class PublishedSHERL(Published):
    def build(self, width: int, size: int, layers: int) -> None:
        self.down = nn.ModuleList(GatedDown(width, size) for _ in range(layers))
        self.guide, self.out = nn.Linear(size, 1), nn.Linear(size, width)
        self.gate = nn.Parameter(torch.zeros(1))

    def side(self, hidden_states: Iterator[Tensor]) -> tuple[Tensor, ...]:
        taps = list(itertools.islice(hidden_states, len(self.down)))
        *shallow, deep = [down(h) for down, h in zip(self.down, taps, strict=True)]
        shallow = torch.stack(shallow, -2)  # (B, T, K, r)
        direction = shallow / (shallow.norm(dim=-1, keepdim=True) + GUIDANCE_EPS)
        redundancy = F.relu(direction @ direction.mT).sum(-1)
        scores = F.relu(self.guide(shallow * deep[..., None, :]).squeeze(-1)) / redundancy
        weights = scores / (scores.abs().sum(-1, keepdim=True) + GUIDANCE_EPS)
        merged = (weights[..., None] * shallow).sum(-2) + deep
        last = self.out(F.relu(merged)) + torch.tanh(self.gate / GATE_TEMPERATURE) * taps[-1]
        return (self.encoder.layer_norm(self.run_layer(self.encoder.layers[-1], last)),)


def full(config: WhisperConfig) -> nn.Module:
    """Full fine-tuning as published: all of the encoder but its convolutions and positions, and the head."""
    model = WhisperForAudioClassification._from_config(config)
    for part in (model.encoder.conv1, model.encoder.conv2, model.encoder.embed_positions):
        part.requires_grad_(False)
    return model.eval()  # Whisper has no dropout, and LayerDrop's coin toss would need a value


def lora(config: WhisperConfig) -> nn.Module:
    """LoRA with the paper's rank, scale and targets, and the head."""
    from peft import LoraConfig, get_peft_model

    model = WhisperForAudioClassification._from_config(config)
    options = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=LORA_TARGETS)
    with warnings.catch_warnings():  # peft uses a name that transformers has given up
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, options)
    for part in (model.projector, model.classifier):  # by hand: peft would copy them
        part.requires_grad_(True)
    return adapted.eval()


def head(config: WhisperConfig) -> nn.Module:
    """The head alone on the frozen encoder."""
    model = WhisperForAudioClassification._from_config(config)
    model.encoder.requires_grad_(False)
    return model.eval()


METHODS: dict[str, Callable[[WhisperConfig], nn.Module]] = {
    "full": full,
    "lora": lora,
    "head": head,
    "lst": PublishedLST,
    "unipt": PublishedUniPT,
    "sherl": PublishedSHERL,
}
# GiB on an H100, whisper-small, batch 128, fp16 autocast.
PAPER_GIB = {"full": 76.14, "lora": 53.14, "lst": 20.39}
