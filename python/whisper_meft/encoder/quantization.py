"""The frozen backbone's linear layers in 8 bits.

``int8`` (:class:`Int8Linear`): weights in int8 with a scale per output channel, inputs in 8 bits with a step
and a zero point per frame that are found as they come, products in int32; the weights alone on a CPU without
VNNI, where sums of two 8-bit products saturate in 16 bits. ``fp8``, through torchao (the extra
``quantization``): weights and inputs in float8_e4m3 with a scale each on a GPU that multiplies it; on a CPU
the weights alone, which are widened for each product.

The first layer stays as it is, as do convolutions, positions, LayerNorms and attention: on pretrained Whisper
what its rounding moves grows through all the others, which decide there which frames get values in the
hundreds, and was most of the error. An input's step is its own frame's, so clips do not depend on their
neighbours, but where rounding takes an 8-bit code to the next.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from meft_kernels.reference.stand_in import device_type

from ..errors import UserError, one_line

KINDS = ("int8", "fp8")

# What kinds mean: features of another revision are others. 1: all layers, and inputs without a zero point.
REVISION = 2

_FP8_CAPABILITY = (8, 9)

_MULTIPLE = 16  # widths that the 8-bit products take

_CUDA_ROWS = 17  # the fewest that cuBLAS multiplies in int8

# Rows are rounded so many values at a time on the CPU, of the wider of input and output, so that they stay in
# the cache.
_BLOCK_ELEMENTS = 2**20


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
    """Whether any of the module's weights is."""
    return any(map(is_in_pieces, module.parameters())) or any(
        isinstance(each, Int8Linear) for each in module.modules()
    )


class Int8Linear(nn.Module):
    """A frozen linear layer in int8, without gradient.

        code_k = round(x_k / step) + zero,   step = (max x - min x) / 254 over the row and 0
        y_n = step scale_n (sum_k code_k W_nk - zero sum_k W_nk) + bias_n

    Zero has a code of its own, so values that are nearly all zero do not move the sum. Sums are exact.

    Args:
        linear: the layer in floating point, (in, out) of any size. products: whether inputs are rounded and
            multiplied in int8; else the weights are widened to the inputs' type.
    """

    def __init__(self, linear: nn.Linear, products: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.products = linear.in_features, linear.out_features, products
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.register_buffer("codes", torch.round(weight / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("total", self.codes.sum(1, dtype=torch.float32))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, products={self.products}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) in any floating type -> (..., out) in that type."""
        return project(x, self)[0]

    def of_codes(self, codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        """What rows (N, in) in int8 with their steps and zeros (N, 1) give: (N, out) in float32."""
        sums = _product(codes, self.codes)
        # In place, or it would be the time of the product once more.
        sums = sums.addcmul_(zero, self.total, value=-1).mul_(step).mul_(self.scale)
        return sums if self.bias is None else sums.add_(self.bias)

    def of_wide_weights(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), multiplied in the type of ``x``."""
        y = nn.functional.linear(x, self.codes.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What linear layers make of the same input (..., in), (..., out) each; it is rounded once for all of
    them.

    Raises:
        RuntimeError: a layer in int8, and ``x`` wants a gradient.
    """
    if not all(isinstance(layer, Int8Linear) for layer in layers):
        return tuple(layer(x) for layer in layers)
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a layer in int8 gives no gradient to its input")
    if not layers[0].products:
        return tuple(layer.of_wide_weights(x) for layer in layers)
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or device_type(x.device) != "cpu":
        rounded = _rounded(rows)
        found = [layer.of_codes(*rounded).to(x.dtype) for layer in layers]
    else:
        widest = max(layers[0].in_features, *(layer.out_features for layer in layers))
        size = max(1, _BLOCK_ELEMENTS // widest)
        found = [rows.new_empty(rows.shape[0], layer.out_features) for layer in layers]
        for start in range(0, rows.shape[0], size):
            rounded = _rounded(rows[start : start + size])
            for layer, target in zip(layers, found):
                target[start : start + size] = layer.of_codes(*rounded)
    return tuple(each.view(*x.shape[:-1], each.shape[-1]) for each in found)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, K) in int8, and the step and the zero point of each, (N, 1) in float32."""
    # Two passes: aminmax is slower than both.
    low, high = rows.amin(-1, keepdim=True).float(), rows.amax(-1, keepdim=True).float()
    low, high = low.clamp(max=0), high.clamp(min=0)
    # 254 and not 255 steps, so that both ends stay in range however they are rounded.
    step = ((high - low) / 254).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = 1 / step
    zero = torch.round(low * -inverse)
    # Cutting a positive number off is rounding it half a step before; flipping the top bit takes 128 from it.
    codes = (rows * inverse).add_(zero + 0.5).to(torch.uint8).view(torch.int8).bitwise_xor_(-128)
    return codes, step, zero - 128


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """(N, K) by (M, K), both int8, -> (N, M) in float32."""
    count = rows.shape[0]
    if device_type(rows.device) == "cuda" and count < _CUDA_ROWS:
        rows = nn.functional.pad(rows, (0, 0, 0, _CUDA_ROWS - count))
    return torch._int_mm(rows, columns.t())[:count].float()


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
    """Replaces all linear layers in ``layers`` but the first, on the device where they are.

    Args:
        layers: of a frozen Whisper encoder, in float32, bfloat16 or float16. kind: "int8" or "fp8".

    Returns:
        What was done: ``kind``, or "int8 weights" or "fp8 weights" where products are made in the type
        that the weights had.

    Raises:
        UserError: torchao is missing for fp8 or does not go with this torch; the device cannot; no layer
            beside the first, float64 weights, or widths that 8-bit products do not take.
    """
    check_kind(kind)
    if len(layers) < 2:
        raise UserError(
            f"backbone_quantization={kind} needs a backbone with layers beside the first"
            " (and for sherl the last), which stay as they are: this one has none"
        )
    weight = layers[0].fc1.weight
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"backbone_quantization={kind} needs backbone_dtype float32, bfloat16 or float16, got "
            f"{str(weight.dtype).removeprefix('torch.')}"
        )
    layers = layers[1:]
    scheme = _to_int8(layers) if kind == "int8" else _to_fp8(layers)
    layers.requires_grad_(False)
    if not is_quantized(layers):
        raise UserError(
            f"backbone_quantization={kind} needs a backbone with widths that are multiples of {_MULTIPLE}, "
            f"got {layers[0].fc1.in_features} and {layers[0].fc1.out_features}"
        )
    return scheme


def _fits(module: nn.Module, name: str = "") -> bool:
    """Whether it is a linear layer of widths that 8-bit products take."""
    widths = getattr(module, "in_features", 1), getattr(module, "out_features", 1)
    return isinstance(module, nn.Linear) and not any(width % _MULTIPLE for width in widths)


def _to_int8(layers: nn.ModuleList) -> str:
    products = layers[0].fc1.weight.device.type != "cpu" or multiplies_int8_exactly()
    for parent in list(layers.modules()):
        for name, module in list(parent.named_children()):
            if _fits(module):
                setattr(parent, name, Int8Linear(module, products))
    return "int8" if products else "int8 weights"


def _to_fp8(layers: nn.ModuleList) -> str:
    scheme, config = _fp8_scheme(layers[0].fc1.weight)
    from torchao.quantization import quantize_

    try:
        quantize_(layers, config, filter_fn=_fits)
    except Exception as error:
        raise UserError(f"backbone_quantization=fp8 failed: {one_line(error)}") from error
    return scheme


def _fp8_scheme(weight: Tensor) -> tuple[str, Any]:
    """The name of what is done to weights like ``weight``, and torchao's options for it."""
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise UserError(
            "backbone_quantization=fp8 needs torchao (pip install 'meft-kernels[quantization]'): "
            f"{one_line(error)}"
        ) from error
    if weight.device.type != "cuda":
        return "fp8 weights", ao.Float8WeightOnlyConfig()
    capability = torch.cuda.get_device_capability(weight.device)
    if torch.version.hip is None and capability < _FP8_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (_FP8_CAPABILITY, capability))
        raise UserError(
            f"backbone_quantization=fp8 needs a GPU of compute capability {needed} or newer, "
            f"{torch.cuda.get_device_name(weight.device)} has {found}: use int8"
        )
    return "fp8", ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
