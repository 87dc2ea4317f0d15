"""The frozen backbone's linear layers in 8 bits, through torchao (optional: the extra ``quantization``).

``int8``: weights in int8 with a scale per output channel, inputs in int8 with a scale per frame that is found
as they come, products in int32. ``fp8``: the same in float8_e4m3 on a GPU that multiplies it; on a CPU the
weights alone, which are widened for each product. So are int8's on a CPU without VNNI, where sums of two
8-bit products saturate in 16 bits. Convolutions, positions, LayerNorms and attention stay as they are. An
input's scale is its own frame's, so clips do not depend on their neighbours, but where rounding takes an
8-bit code to the next.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..errors import UserError, one_line

KINDS = ("int8", "fp8")

_FP8_CAPABILITY = (8, 9)

_MULTIPLE = 16  # widths that the 8-bit products take


@dataclass(frozen=True)
class Original:
    """What is still known of the weights that were quantised.

    Attributes:
        fingerprint: of :mod:`whisper_meft.encoder.fingerprint`. digest: of :func:`weights_digest`.
    """

    fingerprint: str
    digest: str


def check_kind(value: Any) -> None:
    """Raises UserError unless ``value`` is None, "int8" or "fp8"."""
    if value is not None and value not in KINDS:
        raise UserError(f"backbone_quantization must be None, {' or '.join(KINDS)}, got {value!r}")


def is_in_pieces(tensor: Tensor) -> bool:
    """Whether several plain tensors hold this one, as torchao's quantised ones."""
    return hasattr(tensor, "__tensor_flatten__")


def is_quantized(module: nn.Module) -> bool:
    """Whether any of the module's parameters is."""
    return any(map(is_in_pieces, module.parameters()))


def pieces(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold ``tensor``: itself, or a quantised one's codes and scales."""
    if not is_in_pieces(tensor):
        return [tensor]
    return [each for name in tensor.__tensor_flatten__()[0] for each in pieces(getattr(tensor, name))]


def nbytes(module: nn.Module) -> int:
    """Bytes that a module's parameters and buffers take, quantised ones as they are held."""
    held = [*module.parameters(), *module.buffers()]
    return sum(piece.numel() * piece.element_size() for tensor in held for piece in pieces(tensor))


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 in hexadecimal of plain tensors with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@functools.cache
def multiplies_int8_exactly() -> bool:
    """Whether torch's products of int8 matrices are exact on this CPU. oneDNN's without VNNI are not: hidden
    states erred by a sixth."""
    with unset_fake_temporarily():
        rows = torch.full((32, 64), 127, dtype=torch.int8)
        columns = torch.full((64, 32), 127, dtype=torch.int8)
        positive = torch.arange(64) % 4 < 2  # both signs, alike in pairs
        rows[1::2, positive] = -127
        columns[~positive, ::2] = -127
        exact = rows.float() @ columns.float()  # below 2^24
        return torch.equal(torch._int_mm(rows, columns).float(), exact)


def quantize_layers(layers: nn.ModuleList, kind: str) -> str:
    """Replaces the weights of all linear layers in ``layers``, on the device where they are.

    Args:
        layers: of a frozen Whisper encoder, in float32, bfloat16 or float16. kind: "int8" or "fp8".

    Returns:
        What was done: ``kind``, or "int8 weights" or "fp8 weights" where products are made in the type
        that the weights had.

    Raises:
        UserError: torchao is missing or does not go with this torch; the device cannot; float64 weights, or
            widths that 8-bit products do not take.
    """
    check_kind(kind)
    weight = layers[0].fc1.weight
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"backbone_quantization={kind} needs backbone_dtype float32, bfloat16 or float16, got "
            f"{str(weight.dtype).removeprefix('torch.')}"
        )
    scheme, config = _scheme(kind, weight)

    def fits(module: nn.Module, name: str) -> bool:
        widths = getattr(module, "in_features", 1), getattr(module, "out_features", 1)
        return isinstance(module, nn.Linear) and not any(width % _MULTIPLE for width in widths)

    from torchao.quantization import quantize_

    try:
        quantize_(layers, config, filter_fn=fits)
    except Exception as error:
        raise UserError(f"backbone_quantization={kind} failed: {one_line(error)}") from error
    layers.requires_grad_(False)
    if not is_quantized(layers):
        raise UserError(
            f"backbone_quantization={kind} needs a backbone with widths that are multiples of {_MULTIPLE}, "
            f"got {layers[0].fc1.in_features} and {layers[0].fc1.out_features}"
        )
    return scheme


def _scheme(kind: str, weight: Tensor) -> tuple[str, Any]:
    """The name of what is done to weights like ``weight``, and torchao's options for it."""
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise UserError(
            f"backbone_quantization={kind} needs torchao (pip install 'meft-kernels[quantization]'): "
            f"{one_line(error)}"
        ) from error
    if kind == "int8":
        if weight.device.type == "cpu" and not multiplies_int8_exactly():
            return "int8 weights", ao.Int8WeightOnlyConfig()
        return kind, ao.Int8DynamicActivationInt8WeightConfig()
    if weight.device.type != "cuda":
        return "fp8 weights", ao.Float8WeightOnlyConfig()
    capability = torch.cuda.get_device_capability(weight.device)
    if torch.version.hip is None and capability < _FP8_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (_FP8_CAPABILITY, capability))
        raise UserError(
            f"backbone_quantization=fp8 needs a GPU of compute capability {needed} or newer, "
            f"{torch.cuda.get_device_name(weight.device)} has {found}: use int8"
        )
    return kind, ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
