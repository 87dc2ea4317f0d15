"""The case table that tests, benchmarks and kernel engineers share, and the yardstick for a kernel's error.

Truth is an op's ``definition`` in float64. A kernel may err ``factor`` times as much as PyTorch itself errs
when it computes the same definition in the kernel's type (under autocast for half precision), plus a floor of
a few roundings. No tolerance is chosen per GPU. Errors are taken over several draws of the inputs, since one
draw of a gradient with few elements is mostly luck.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops, reference

# Sizes that whisper-small (D 768) and its relatives give are odd in both axes; so are the cases.
HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One op at one shape: B ``batch``, T ``frames``, D ``width``, r ``side``, adapter width ``adapter_dim``,
    ``layers`` tensors where the op takes a list, and whether utterances have ``lengths``."""

    op: str
    batch: int = 2
    frames: int = 37
    width: int = 64
    side: int = 24
    adapter_dim: int = 40
    layers: int = 3
    masked: bool = False
    factor: float = 2.0

    @property
    def name(self) -> str:
        masked = "-masked" if self.masked else ""
        return f"{self.op}-B{self.batch}-T{self.frames}-D{self.width}-r{self.side}-n{self.layers}{masked}"

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict:
        """Arguments of the public function by name: activations in ``dtype``, parameters in fp32 (float64 if
        ``dtype`` is), with means away from zero and values of order one."""
        generator = torch.Generator().manual_seed(seed)
        parameter_dtype = torch.promote_types(dtype, torch.float32)

        def draw(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

        def activation(width: int) -> Tensor:
            rows = draw(self.batch, self.frames, width, mean=0.7)
            scale = 0.5 + torch.rand(self.batch, self.frames, 1, generator=generator, dtype=torch.float64)
            return (rows * scale).to(device, dtype)

        def parameter(*shape: int, mean: float = 0.0, std: float = 0.3) -> Tensor:
            return draw(*shape, mean=mean, std=std).to(device, parameter_dtype)

        def weight(rows: int, columns: int) -> Tensor:
            return parameter(rows, columns, std=columns**-0.5)

        def norm(prefix: str, width: int) -> dict[str, Tensor]:
            return {
                f"{prefix}norm_weight": parameter(width, mean=1.0),
                f"{prefix}norm_bias": parameter(width),
            }

        def adapter() -> dict[str, Tensor]:
            hidden = self.adapter_dim
            return {
                **norm("", r),
                "weight_1": weight(hidden, r),
                "bias_1": parameter(hidden),
                "weight_2": weight(r, hidden),
                "bias_2": parameter(r),
            }

        d, r = self.width, self.side
        lengths = None
        if self.masked:
            lengths = torch.randint(1, self.frames + 1, (self.batch,), generator=generator).to(device)
        if self.op == "norm_linear":
            return {"x": activation(d), **norm("", d), "weight": weight(r, d), "bias": parameter(r)}
        if self.op == "adapter":
            return {"x": activation(r), **adapter()}
        if self.op == "ladder":
            down = {**norm("down_", d), "down_weight": weight(r, d), "down_bias": parameter(r)}
            gate = {"gate": parameter(1, std=0.1)}
            return {"x": activation(d), "state": activation(r), **down, **gate, **adapter()}
        if self.op == "pooled_upsample":
            up = {"weight": weight(d, r), "bias": parameter(d)}
            shared = {"x": activation(r), **norm("", r), **up, **norm("out_", d)}
            return {**shared, "lengths": lengths, "relu": self.layers % 2 == 0}
        if self.op == "relu_attention":
            gate = {"gate_weight": weight(1, r), "gate_bias": parameter(1)}
            features = [activation(r) for _ in range(self.layers)]
            return {"anchor": activation(r), **gate, "features": features, "lengths": lengths}
        if self.op == "gated_down":
            first = {"x": activation(d), "weight_1": weight(r, d), "bias_1": parameter(r)}
            second = {"weight_2": weight(r, r), "bias_2": parameter(r)}
            return {**first, **second, "weight_3": weight(r, r), "bias_3": parameter(r)}
        if self.op == "guidance":
            features = [activation(r) - 0.7 for _ in range(self.layers)]
            return {"weight": weight(1, r), "bias": parameter(1), "features": features}
        if self.op == "gated_up":
            out = {"weight": weight(d, r), "bias": parameter(d), "gate": parameter(1, std=0.1)}
            return {"x": activation(d), "y": activation(r) - 0.7, **out}
        raise ValueError(f"op must be one of {', '.join(map(repr, ops.OP_NAMES[1:]))}, got {self.op!r}")

    def function(self) -> Callable[..., Tensor]:
        """The public op, called with ``**inputs``."""
        return getattr(ops, self.op)

    def definition(self) -> Callable[..., Tensor]:
        """The reference's definition, called with ``**inputs``."""
        return getattr(reference, self.op).definition


def _cases() -> list[Case]:
    shapes = [
        {},
        {"batch": 1, "frames": 1, "layers": 1},
        {"batch": 3, "frames": 64, "width": 96, "side": 48, "adapter_dim": 64, "layers": 4},
        {"batch": 2, "frames": 13, "width": 33, "side": 5, "adapter_dim": 7, "layers": 2},
    ]
    cases = [Case(op=name, **shape) for name in ops.OP_NAMES[1:] for shape in shapes]
    masked = [
        replace(case, masked=True) for case in cases if case.op in ("pooled_upsample", "relu_attention")
    ]
    return cases + masked


CASES = _cases()


def flat_tensors(inputs: dict) -> dict[str, Tensor]:
    """The floating-point tensors among an op's inputs by name, lists as ``name[i]``."""
    flat = {}
    for name, value in inputs.items():
        for index, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(item, Tensor) and item.is_floating_point():
                flat[name if index is None else f"{name}[{index}]"] = item
    return flat


def _cast(inputs: dict, dtype: torch.dtype | None) -> dict:
    """Detached copies that require gradients, in ``dtype`` if given."""

    def copy(value):
        if isinstance(value, list):
            return [copy(item) for item in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
        return value

    return {name: copy(value) for name, value in inputs.items()}


def outputs_and_gradients(
    function: Callable[..., Tensor], inputs: dict, upstream: Tensor, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """``function(**inputs)`` under the name ``out`` and the gradient of every floating-point input."""
    copies = _cast(inputs, dtype)
    out = function(**copies)
    flat = flat_tensors(copies)
    grads = torch.autograd.grad(out, list(flat.values()), upstream.to(out.dtype), allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(flat.values(), grads))
    return {"out": out.detach(), **dict(zip(flat, zeros))}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Root mean square error over the root mean square of ``truth``; infinite if either is not finite."""
    if not torch.isfinite(value).all():
        return float("inf")
    error = (value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
    return error.item() if torch.isfinite(error) else float("inf")


def assert_as_good_as_torch(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", draws: int = 4
) -> None:
    """Checks values and every gradient of an op in the current backend against float64.

    Raises:
        AssertionError: naming the case, the tensor, its error and the error allowed.
    """

    def with_autocast(**arguments) -> Tensor:
        enabled = dtype in HALF_TYPES
        with torch.autocast(torch.device(device).type, dtype=dtype if enabled else None, enabled=enabled):
            return case.definition()(**arguments)

    truth, yardstick, computed = [], [], []
    for seed in range(draws):
        inputs = case.inputs(dtype, device, seed)
        shape = case.definition()(**inputs).shape
        # The upstream gradient is rounded to the type first, so that every side sees the same one.
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        truth.append(outputs_and_gradients(case.definition(), inputs, upstream, torch.float64))
        yardstick.append(outputs_and_gradients(with_autocast, inputs, upstream))
        computed.append(outputs_and_gradients(case.function(), inputs, upstream))

    def joined(results: list[dict[str, Tensor]], name: str) -> Tensor:
        return torch.cat([result[name].double().flatten() for result in results])

    for name in truth[0]:
        exact, values = joined(truth, name), joined(computed, name)
        if name == "gate_bias":  # zero in exact arithmetic, rounding noise in the definition
            assert not values.any(), f"{case.name}: the gradient of gate_bias must be exactly zero"
            continue
        if not exact.any():
            assert not values.any(), f"{case.name} {dtype} {name}: must be exactly zero"
            continue
        floor = 4 * torch.finfo(dtype).eps
        allowed = case.factor * relative_error(joined(yardstick, name), exact) + floor
        error = relative_error(values, exact)
        assert error <= allowed, f"{case.name} {dtype} {name}: error {error:.2e}, allowed {allowed:.2e}"
