"""Pretrained weights and recordings: what ``benchmarks.backbones`` and ``benchmarks.run`` measure on them.

``python -m benchmarks.recordings --model_name_or_path MODEL --audio SOURCE FILE`` writes the hidden states of
a few clips to FILE, for ``benchmarks.run --states FILE``. SOURCE is anything ``whisper_meft.data`` reads;
keep FILE where the recordings may be kept.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from whisper_meft import FrozenEncoder
from whisper_meft.data import ExampleSet, SpeechDataset, load_examples
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable, replacing
from whisper_meft.model.backbone import load_backbone
from whisper_meft.model.pretrained import load_feature_extractor

import meft_kernels
from meft_kernels import ops
from meft_kernels.reference.modules import gated_down_params, norm_linear_params
from meft_kernels.testing import AnyCase, NetworkCase, flat_tensors


def choose(source: str, number: int | None = None) -> ExampleSet:
    """``number`` examples of a source in a random order that is always the same; None: all as they come.

    Raises:
        UserError: it cannot be read, or has several splits: name a manifest, or a folder without them.
    """
    examples = load_examples(source)
    if number is None:
        return examples
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    return examples.select(order[:number])


def log_mel(model: str, examples: ExampleSet) -> tuple[Tensor, Tensor]:
    """Log-mel padded to the window (N, mel bins, frames), and the encoder frames of each clip that hold sound
    (N,).

    Raises:
        UserError: no feature extractor, or audio that cannot be read.
    """
    items = list(SpeechDataset(examples, load_feature_extractor(model), None, "fidelity"))
    features = torch.stack([item["input_features"] for item in items])
    return features, torch.tensor([item["length"] for item in items])


def trimmed(features: Tensor, lengths: Tensor) -> Tensor:
    """The features up to the end of the longest clip."""
    return features[..., : 2 * int(lengths.max())]


@torch.no_grad()
def last_states(
    encoder: FrozenEncoder, features: Tensor, lengths: Tensor | None, size: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """h_L raw and after the final norm, (frames, D) in float32 each, of one clip after the other; of its own
    frames alone where there are ``lengths``."""
    for start in range(0, len(features), size):
        part, of_part = features[start : start + size], None
        if lengths is not None:
            of_part = lengths[start : start + size]
            part = trimmed(part, of_part)
        *_, last = encoder.stream(part, of_part)
        for row, state in enumerate(last):
            state = state if of_part is None else state[: of_part[row]]
            yield state.float(), encoder.layer_norm(state).float()


def write_states(path: Path, states: Sequence[Tensor], lengths: Tensor) -> None:
    """Writes hidden states (B, T, D) of all layers and the lengths (B,) of the clips as safetensors."""
    named = {f"h_{index}": state.contiguous() for index, state in enumerate(states)}
    with replacing(path) as temporary:
        save_file({**named, "lengths": lengths}, temporary)


def read_states(path: str | Path) -> tuple[list[Tensor], Tensor]:
    """What ``write_states`` wrote: h_0 to h_L, (B, T, D) each, and the lengths (B,).

    Raises:
        UserError: no such file, or another one.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of several kinds
        raise UserError(f"--states: cannot read {path}: {one_line(error)}") from error
    lengths = found.pop("lengths", None)
    states = [found.get(f"h_{index}") for index in range(len(found))]
    shapes = {None if state is None else tuple(state.shape) for state in states}
    if lengths is None or len(states) < 2 or len(shapes) != 1 or len(min(shapes, key=str) or ()) != 3:
        raise UserError(f"--states must be a file that benchmarks.recordings wrote, got {path}")
    return states, lengths


def valid_states(states: Sequence[Tensor], lengths: Tensor) -> list[Tensor]:
    """The states of the frames that all clips have."""
    return [state[:, : int(lengths.min())].contiguous() for state in states]


# These read the decoder's output, of which nothing is recorded.
OF_THE_DECODER = frozenset({"linear_cross_entropy"})


@torch.no_grad()
def on_states(case: AnyCase, states: Sequence[Tensor], inputs: dict, seed: int) -> dict:
    """A case's random inputs with recorded hidden states in the place of the random ones, and in the place of
    random side states what the side networks make of them at their published start.

    Args:
        case: of the sizes of ``states``. states: h_0 to h_L, (B, T, D). inputs: as ``case.inputs`` gave them.
        seed: chooses the layer that an op of one layer reads, and the parameters of the side states.
    """
    flat = flat_tensors(inputs)
    like = next(flat[name] for name in ("x", "hidden_states[0]", "features[0]") if name in flat)
    real = [state.to(like) for state in states]
    if isinstance(case, NetworkCase):
        return inputs | {"hidden_states": real}
    layer = seed % len(real)
    if case.op in ("row_statistics", "eight_bit", "norm_linear"):
        return inputs | {"x": real[layer]}
    torch.manual_seed(seed)
    sizes = {"hidden_size": case.width, "num_layers": len(real) - 1}
    sizes["reduction_factor"] = case.width // case.side
    if case.op in ("gated_down", "guidance", "gated_up"):
        side = meft_kernels.SHERL(**sizes, device=like.device)
        layer = min(layer, len(real) - 2)  # h_L is not read
        if case.op == "gated_down":
            return inputs | {"x": real[layer]}
        features = [
            ops.gated_down(state, *gated_down_params(down)) for state, down in zip(real[:-1], side.down)
        ]
        if case.op == "guidance":
            return inputs | {"features": features[-case.layers :]}
        merged = ops.guidance(side.guide.weight, side.guide.bias, features)
        return inputs | {"x": real[-2], "y": merged}
    if case.op in ("relu_attention", "linear_attention") or (case.op == "pooled_upsample" and inputs["relu"]):
        side = meft_kernels.UniPT(**sizes, device=like.device)
        if case.op == "pooled_upsample":
            return inputs | {"x": side.state(real, None)}
        down = [norm_linear_params(each) for each in side.down]
        *features, anchor = (ops.norm_linear(state, *of) for state, of in zip(real, down))
        return inputs | {"anchor": anchor, "features": features[-case.layers :]}
    layer = max(layer, 1)
    side = meft_kernels.LST(**sizes, layers=range(1, layer + 1), device=like.device)
    if case.op != "ladder":
        return inputs | {"x": side.state(real, None)}
    state = ops.norm_linear(real[0], *norm_linear_params(side.down[0]))
    return inputs | {"x": real[layer], "state": state}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recordings", description=__doc__.partition("\n\n")[2].strip()
    )
    parser.add_argument("--model_name_or_path", required=True, help="Whisper folder or hub name")
    parser.add_argument("--audio", required=True, help="recordings: folder, manifest or data set")
    parser.add_argument("--clips", type=int, default=2, help="default: 2")
    parser.add_argument("--padded", action="store_true", help="to the whole window, padding being sound")
    parser.add_argument("file", type=Path, help="safetensors file to write")
    options = parser.parse_args(argv)
    try:
        if options.clips < 1:
            raise UserError(f"clips must be a positive integer, got {options.clips}")
        check_writable(options.file)
        features, lengths = log_mel(options.model_name_or_path, choose(options.audio, options.clips))
        base = load_backbone(options.model_name_or_path, dtype=torch.float32, argument="model_name_or_path")
        encoder = FrozenEncoder(base.encoder)
        if options.padded:
            states = list(encoder.stream(features))
            lengths = torch.full_like(lengths, states[0].shape[1])
        else:
            states = list(encoder.stream(trimmed(features, lengths), lengths))
        write_states(options.file, states, lengths)
    except UserError as error:
        print(f"benchmarks.recordings: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"{options.file}: {len(states)} hidden states of {tuple(states[0].shape)}")
    return 0


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||."""
    return ((found - exact).norm() / exact.norm()).item()


def errors(found: Sequence[tuple[Tensor, Tensor]], exact: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """How far last states are from the exact ones, as :func:`last_states` gives them: ``raw`` and ``normed``
    over all frames, ``median`` and ``worst`` over the frames' own normed errors, and ``pooled``: the error of
    a clip's mean relative to how far the clips are apart (root mean squares)."""
    raw, normed = (
        tuple(torch.cat([clip[which] for clip in clips]) for clips in (found, exact)) for which in (0, 1)
    )
    rows = (normed[0] - normed[1]).norm(dim=-1) / normed[1].norm(dim=-1)
    means = [torch.stack([clip[1].mean(0) for clip in clips]) for clips in (found, exact)]
    apart = (means[1] - means[1].mean(0)).norm()
    return {
        "raw": relative(*raw),
        "normed": relative(*normed),
        "median": rows.median().item(),
        "worst": rows.max().item(),
        "pooled": ((means[0] - means[1]).norm() / apart).item(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
