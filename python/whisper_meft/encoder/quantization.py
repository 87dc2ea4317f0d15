"""The frozen backbone's linear layers in 8 or 4 bits.

``int8`` (:class:`Int8Linear`): weights in int8, inputs in 8 bits with a step and a zero point that are found
as they come, products in int32. On a CPU groups of 128 neighbouring inputs have a scale for each output and a
step for each frame ("int8"); on a GPU, where every group is a pass over memory more, a whole row has ("int8
rows"). The weights alone on a CPU without VNNI, where sums of two 8-bit products saturate in 16 bits ("int8
weights"). ``fp8``, through torchao (the extra ``quantization``): weights and inputs in float8_e4m3 with a
scale each on a GPU that multiplies it; on a CPU the weights alone, which are widened for each product.
``nf4`` (:class:`whisper_meft.encoder.nf4.NF4Linear`): the weights alone, in 4 bits.

The first layer stays as it is, as do convolutions, positions, LayerNorms and attention: on pretrained Whisper
what its rounding moves grows through all the others, which decide there which frames get values in the
hundreds, and was most of the error. An input's step is its own frame's, so clips do not depend on their
neighbours, but where rounding takes an 8-bit code to the next.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from meft_kernels.int8_linear import int8_linear
from meft_kernels.reference.stand_in import device_type

from ..errors import UserError, one_line
from .nf4 import NF4Linear, unchanged_type

KINDS = ("int8", "fp8", "nf4")

# What kinds mean: features of another revision are others. 1: all layers, and inputs without a zero point.
# 2: scales and steps of whole rows on the CPU too.
REVISION = 3

_FP8_CAPABILITY = (8, 9)

_MULTIPLE = 16  # widths that the 8-bit products take

# On the CPU, whose kernel takes them nearly for free, neighbouring inputs share scales and steps in groups so
# wide at most.
_GROUP, _LEAST_GROUP = 128, 64


@dataclass(frozen=True)
class Original:
    """What is still known of the weights that were quantised.

    Attributes:
        fingerprint: of :mod:`whisper_meft.encoder.fingerprint`. digest: of :func:`weights_digest`.
    """

    fingerprint: str
    digest: str


def check_kind(value: Any) -> None:
    """Raises UserError unless ``value`` is None, "int8", "fp8" or "nf4"."""
    if value is not None and value not in KINDS:
        raise UserError(
            f"backbone_quantization must be None, {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {value!r}"
        )


def is_in_pieces(tensor: Tensor) -> bool:
    """Whether several plain tensors hold this one, as torchao's quantised ones."""
    return hasattr(tensor, "__tensor_flatten__")


def is_quantized(module: nn.Module) -> bool:
    """Whether any of the module's weights is."""
    return any(map(is_in_pieces, module.parameters())) or any(
        isinstance(each, (Int8Linear, NF4Linear)) for each in module.modules()
    )


class Int8Linear(nn.Module):
    """A frozen linear layer in int8, without gradient (:func:`meft_kernels.int8_linear.int8_linear`).

    Args:
        linear: the layer in floating point, (in, out) of any size. products: whether inputs are rounded and
            multiplied in int8; else the weights are widened to the inputs' type. groups: of inputs with
            scales and steps of their own, a divisor of in; each takes a pass over the outputs more.
    """

    def __init__(self, linear: nn.Linear, products: bool = True, groups: int = 1):
        super().__init__()
        self.in_features, self.out_features, self.products = linear.in_features, linear.out_features, products
        weight = linear.weight.detach().float().unflatten(1, (groups, -1))
        scale = (weight.abs().amax(2) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        codes = torch.round(weight / scale[:, :, None]).to(torch.int8)
        self.register_buffer("codes", codes.flatten(1))
        self.register_buffer("scale", scale.t().contiguous())  # (groups, out)
        self.register_buffer("total", codes.sum(2, dtype=torch.float32).t() * self.scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def _apply(self, *arguments: Any, **options: Any) -> "Int8Linear":
        with unchanged_type(self, "scale", "total"):
            return super()._apply(*arguments, **options)

    def extra_repr(self) -> str:
        groups = self.scale.shape[0]
        return f"{self.in_features}, {self.out_features}, products={self.products}, groups={groups}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) in any floating type -> (..., out) in that type."""
        return project(x, self)[0]

    def of_wide_weights(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), multiplied in the type of ``x``."""
        weight = self.codes.unflatten(1, (self.scale.shape[0], -1)) * self.scale.t()[:, :, None]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight.flatten(1).to(x.dtype), bias)


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
    held = ([getattr(layer, name) for layer in layers] for name in ("codes", "scale", "total", "bias"))
    found = int8_linear(x.reshape(-1, x.shape[-1]), *held)
    return tuple(each.view(*x.shape[:-1], each.shape[-1]) for each in found)


def pieces(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold ``tensor``: itself, or a quantised one's codes and scales."""
    if not is_in_pieces(tensor):
        return [tensor]
    return [each for name in tensor.__tensor_flatten__()[0] for each in pieces(getattr(tensor, name))]


def nbytes(module: nn.Module) -> int:
    """Bytes that a module's parameters and buffers take, quantised ones as they are held."""
    held = [*module.parameters(), *module.buffers()]
    return sum(piece.numel() * piece.element_size() for tensor in held for piece in pieces(tensor))


def weights_digest(state: dict[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 in hexadecimal of plain tensors with their names, shapes and types, as they would be in
    ``dtype``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().to(dtype or tensor.dtype)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
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


def quantize_layers(layers: nn.ModuleList, kind: str, dtype: torch.dtype | None = None) -> str:
    """Replaces all linear layers in ``layers`` but the first, on the device where they are. Layer after layer
    is brought to ``dtype`` and replaced, so that no more than one of them is held in it.

    Args:
        layers: of a frozen Whisper encoder. kind: "int8", "fp8" or "nf4". dtype: float32, bfloat16 or
            float16, what all layers are to be in; None: what they are in.

    Returns:
        What was done: ``kind``, or "int8 rows", "int8 weights" or "fp8 weights" (see above).

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
    dtype = dtype or weight.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"backbone_quantization={kind} needs backbone_dtype float32, bfloat16 or float16, got "
            f"{str(dtype).removeprefix('torch.')}"
        )
    if not any(map(_fits, layers[1].modules())):
        raise UserError(
            f"backbone_quantization={kind} needs a backbone with widths that are multiples of {_MULTIPLE}, "
            f"got {layers[0].fc1.in_features} and {layers[0].fc1.out_features}"
        )
    scheme, replace = _scheme(kind, weight)
    for index, layer in enumerate(layers):
        cast(layer, dtype)
        if index:
            replace(layer)
            layer.requires_grad_(False)
    return scheme


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Brings parameters to ``dtype`` and freezes them; they are new, one by one: Module.to() cannot convert
    fake tensors in place."""
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            if parameter.dtype != dtype:
                setattr(each, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def _fits(module: nn.Module, name: str = "") -> bool:
    """Whether it is a linear layer of widths that 8-bit products take."""
    widths = getattr(module, "in_features", 1), getattr(module, "out_features", 1)
    return isinstance(module, nn.Linear) and not any(width % _MULTIPLE for width in widths)


def _groups(width: int) -> int:
    """How many groups a layer's inputs are in on the CPU: 1 where no fitting number divides them."""
    sizes = range(_GROUP, _LEAST_GROUP - 1, -_MULTIPLE)
    return next((width // size for size in sizes if width % size == 0), 1)


def _scheme(kind: str, weight: Tensor) -> tuple[str, Callable[[nn.Module], None]]:
    """The name of what is done to weights like ``weight``, and what does it to a layer."""
    if kind == "fp8":
        return _fp8_scheme(weight)
    if kind == "nf4":
        return kind, functools.partial(_replace, make=NF4Linear)
    if device_type(weight.device) != "cpu":
        return "int8 rows", functools.partial(_replace, make=Int8Linear)
    products = multiplies_int8_exactly()
    make = lambda linear: Int8Linear(linear, products, _groups(linear.in_features))  # noqa: E731
    return ("int8" if products else "int8 weights"), functools.partial(_replace, make=make)


def _replace(layer: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for parent in [each for each in layer.modules() if not isinstance(each, nn.Linear)]:
        for name, module in list(parent.named_children()):
            if _fits(module):
                setattr(parent, name, make(module))


def _fp8_scheme(weight: Tensor) -> tuple[str, Callable[[nn.Module], None]]:
    try:
        from torchao import quantization as ao
    except ImportError as error:
        raise UserError(
            "backbone_quantization=fp8 needs torchao (pip install 'meft-kernels[quantization]'): "
            f"{one_line(error)}"
        ) from error
    if weight.device.type != "cuda":
        return "fp8 weights", functools.partial(_to_fp8, config=ao.Float8WeightOnlyConfig())
    capability = torch.cuda.get_device_capability(weight.device)
    if torch.version.hip is None and capability < _FP8_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (_FP8_CAPABILITY, capability))
        raise UserError(
            f"backbone_quantization=fp8 needs a GPU of compute capability {needed} or newer, "
            f"{torch.cuda.get_device_name(weight.device)} has {found}: use int8"
        )
    config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    return "fp8", functools.partial(_to_fp8, config=config)


def _to_fp8(layer: nn.Module, config: Any) -> None:
    from torchao.quantization import quantize_

    try:
        quantize_(layer, config, filter_fn=_fits)
    except Exception as error:
        raise UserError(f"backbone_quantization=fp8 failed: {one_line(error)}") from error
