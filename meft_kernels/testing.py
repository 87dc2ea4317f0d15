"""The case table that tests, benchmarks and kernel engineers share, and the yardstick for a kernel's error.

Truth is an op's ``definition`` in float64. A kernel may err ``factor`` times as much as PyTorch itself errs
when it computes the same definition in the kernel's type (under autocast for half precision), plus a floor of
a few roundings. No tolerance is chosen per GPU. Errors are taken over several draws of the inputs, since one
draw of a gradient with few elements is mostly luck.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import modules, ops, reference

HALF_TYPES = (torch.float16, torch.bfloat16)


# Ops whose ``x`` is a hidden state of the frozen backbone.
_READS_BACKBONE = ("row_statistics", "eight_bit", "norm_linear", "ladder", "gated_down", "gated_up")


class _Draws:
    """Random activations in ``dtype`` and parameters in at least fp32, drawn on one device for another."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device | str, seed: int, draw_on: torch.device | str
    ) -> None:
        self.dtype, self.device, self.draw_on = dtype, device, torch.device(draw_on)
        self.parameter_dtype = torch.promote_types(dtype, torch.float32)
        on_cpu = self.draw_on.type == "cpu"
        drawn_dtype = torch.float64 if on_cpu else self.parameter_dtype
        generator = None if self.draw_on.type == "meta" else torch.Generator(self.draw_on).manual_seed(seed)
        self._how = {"generator": generator, "dtype": drawn_dtype, "device": self.draw_on}

    def activation(self, batch: int, frames: int, width: int) -> Tensor:
        rows = 0.7 + torch.randn(batch, frames, width, **self._how)
        scale = 0.5 + torch.rand(batch, frames, 1, **self._how)
        return (rows * scale).to(self.device, self.dtype)

    def parameter(self, *shape: int, mean: float = 0.0, std: float = 0.3) -> Tensor:
        return (mean + std * torch.randn(shape, **self._how)).to(self.device, self.parameter_dtype)

    def weight(self, rows: int, columns: int) -> Tensor:
        return self.parameter(rows, columns, std=columns**-0.5)

    def norm(self, prefix: str, width: int) -> dict[str, Tensor]:
        return {
            f"{prefix}norm_weight": self.parameter(width, mean=1.0),
            f"{prefix}norm_bias": self.parameter(width),
        }

    def lengths(self, batch: int, frames: int) -> Tensor:
        how = {**self._how, "dtype": torch.int64}
        return torch.randint(1, frames + 1, (batch,), **how).to(self.device)

    def labels(self, batch: int, tokens: int, vocabulary: int) -> Tensor:
        """Token numbers, of which every third is ignored, but not a clip's first."""
        how = {**self._how, "dtype": torch.int64}
        labels = torch.randint(0, vocabulary, (batch, tokens), **how)
        labels[:, 2::3] = reference.linear_cross_entropy.IGNORED
        return labels.to(self.device)


@dataclass(frozen=True)
class Case:
    """One op at one shape: B ``batch``, T ``frames``, D ``width``, r ``side``, adapter width ``adapter_dim``,
    ``layers`` tensors where the op takes a list, and whether utterances have ``lengths``. Of
    ``linear_cross_entropy`` ``frames`` are tokens and ``side`` is the vocabulary; of ``relu_attention``
    ``pool`` frames are one key."""

    op: str
    batch: int = 2
    frames: int = 37
    width: int = 64
    side: int = 24
    adapter_dim: int = 40
    layers: int = 3
    masked: bool = False
    factor: float = 2.0
    pool: int = 1

    @property
    def name(self) -> str:
        more = f"-p{self.pool}" if self.pool > 1 else ""
        more += "-masked" if self.masked else ""
        return f"{self.op}-B{self.batch}-T{self.frames}-D{self.width}-r{self.side}-n{self.layers}{more}"

    @property
    def frozen(self) -> frozenset[str]:
        """Inputs that carry no gradient in training: hidden states of the frozen backbone."""
        if self.op == "linear_cross_entropy":  # the head
            return frozenset({"weight"})
        return frozenset({"x"} if self.op in _READS_BACKBONE else ())

    def inputs(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
        draw_on: torch.device | str = "cpu",
    ) -> dict:
        """Arguments of the public function by name: activations in ``dtype``, parameters in fp32 (float64 if
        ``dtype`` is), with means away from zero and values of order one.

        ``draw_on`` is where the numbers are drawn: the same ones for every device by default; on a GPU they
        are others, at real sizes in a fraction of the time; ``"meta"`` gives shapes alone.
        """
        draws = _Draws(dtype, device, seed, draw_on)

        def activation(width: int) -> Tensor:
            return draws.activation(self.batch, self.frames, width)

        parameter, weight, norm = draws.parameter, draws.weight, draws.norm

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
            lengths = draws.lengths(self.batch, self.frames)
        if self.op in ("row_statistics", "eight_bit"):
            return {"x": activation(d)}
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
        if self.op in ("relu_attention", "linear_attention"):
            gate = {"gate_weight": weight(1, r), "gate_bias": parameter(1)}
            # About half of the scores are positive, as they are on speech.
            features = [activation(r) - 0.7 for _ in range(self.layers)]
            given = {"anchor": activation(r) - 0.7, **gate, "features": features, "lengths": lengths}
            return given | ({"pool": self.pool} if self.pool > 1 else {})
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
        if self.op == "linear_cross_entropy":
            labels = draws.labels(self.batch, self.frames, r)
            smoothing = 0.1 if self.layers % 2 == 0 else 0.0
            return {
                "x": activation(d),
                "weight": weight(r, d),
                "labels": labels,
                "label_smoothing": smoothing,
            }
        raise ValueError(f"op must be one of {', '.join(map(repr, ops.OP_NAMES[1:]))}, got {self.op!r}")

    def function(self) -> Callable[..., Tensor]:
        """The public op, called with ``**inputs``; row statistics as one tensor (2, ...)."""
        if self.op == "row_statistics":
            return lambda x: torch.stack(ops.row_statistics(x))
        return getattr(ops, self.op)

    def definition(self) -> Callable[..., Tensor]:
        """The reference's definition, called with ``**inputs``."""
        if self.op == "row_statistics":
            return _row_statistics
        return getattr(reference, self.op).definition

    def cost(self, dtype: torch.dtype, backward: bool = False) -> "Cost":
        """What the forward, or the backward in training, cannot do without."""
        return _cost(self, dtype, backward)

    def _products(self) -> tuple[int, int]:
        """Multiply-adds of the matrix products in the forward and in the backward.

        The backward gets the inputs and no intermediate result, so what it recomputes counts; no gradient
        goes to frozen inputs. ReLU attention's backward computes scores and their gradients once for the
        queries and once for the keys, since it uses no atomics.
        """
        rows, d, r, a, n = self.batch * self.frames, self.width, self.side, self.adapter_dim, self.layers
        scores = self.batch * self.frames * -(-self.frames // self.pool) * r * n
        states = rows * r * r * n
        shallow = n - 1
        return {
            "row_statistics": (0, 0),
            "norm_linear": (rows * d * r, rows * d * r),
            "adapter": (2 * rows * r * a, 5 * rows * r * a),
            "ladder": (rows * (d * r + 2 * r * a), rows * (2 * d * r + 5 * r * a)),
            "pooled_upsample": (rows * (r * r + 2 * r), rows * (2 * r * r + 4 * r)),
            "relu_attention": (2 * scores, 8 * scores),
            "linear_attention": (2 * states, 5 * states),
            "gated_down": (rows * (d * r + 2 * r * r), rows * (2 * d * r + 6 * r * r)),
            "guidance": (
                rows * (shallow * shallow * r + 2 * shallow * r),
                rows * (2 * shallow * shallow * r + 4 * shallow * r),
            ),
            "gated_up": (rows * d * r, 2 * rows * d * r),
            # The frozen head's gradient needs no logits again: the forward has it.
            "linear_cross_entropy": (rows * d * r, rows * d * r),
        }[self.op]


def _row_statistics(x: Tensor) -> Tensor:
    """Mean and reciprocal standard deviation of each row, (..., D) -> (2, ...), as autograd-free PyTorch."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(-1)
    variance = (x - mean[..., None]).square().mean(-1)
    return torch.stack((mean, torch.rsqrt(variance + reference.common.NORM_EPS)))


@dataclass(frozen=True)
class NetworkCase:
    """A whole side network at one shape: ``method`` LST, UniPT or SHERL on ``layers`` encoder layers."""

    method: str
    batch: int = 2
    frames: int = 37
    width: int = 64
    reduction_factor: int = 8
    layers: int = 3
    factor: float = 2.0

    frozen = frozenset({"hidden_states"})

    @property
    def op(self) -> str:
        return self.method

    @property
    def side(self) -> int:
        return self.width // self.reduction_factor

    @property
    def name(self) -> str:
        return f"{self.method}-B{self.batch}-T{self.frames}-D{self.width}-r{self.side}-n{self.layers}"

    def _network(self, package, device: torch.device | str = "meta") -> nn.Module:
        """The network with what training calls as its forward: the pooled output where the method pools."""
        side = getattr(package, self.method)(self.width, self.layers, self.reduction_factor, device=device)
        return _Called(side)

    def inputs(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
        draw_on: torch.device | str = "cpu",
    ) -> dict:
        """``hidden_states`` in ``dtype`` and every parameter by its name; see ``Case.inputs``."""
        draws = _Draws(dtype, device, seed, draw_on)
        shape = self.batch, self.frames, self.width
        values: dict = {"hidden_states": [draws.activation(*shape) for _ in range(self.layers + 1)]}
        for name, parameter in self._network(reference).named_parameters():
            if parameter.ndim == 2:
                values[name] = draws.weight(*parameter.shape)
            elif name.endswith("norm.weight"):
                values[name] = draws.parameter(*parameter.shape, mean=1.0)
            else:
                std = 0.1 if name.endswith("gate") else 0.3
                values[name] = draws.parameter(*parameter.shape, std=std)
        return values

    def _function(self, package) -> Callable[..., Tensor]:
        network = self._network(package)

        def call(hidden_states: list[Tensor], **parameters: Tensor) -> Tensor:
            return torch.func.functional_call(network, parameters, (hidden_states,))

        return call

    def function(self) -> Callable[..., Tensor]:
        """The network on the ops, called with ``**inputs``."""
        return self._function(modules)

    def definition(self) -> Callable[..., Tensor]:
        """The readable network, called with ``**inputs``."""
        return self._function(reference)

    def parts(self) -> list[Case]:
        """The ops that one forward calls, in order."""

        def part(op: str, layers: int = 1, adapter_dim: int = 256) -> Case:
            return Case(op, self.batch, self.frames, self.width, self.side, adapter_dim, layers)

        count = self.layers
        if self.method == "LST":
            return [part("norm_linear"), *[part("ladder")] * count, part("pooled_upsample")]
        if self.method == "UniPT":
            merge = [part("relu_attention", count), part("adapter", adapter_dim=self.width)]
            return [*[part("norm_linear")] * (count + 1), *merge, part("pooled_upsample", 2)]
        return [*[part("gated_down")] * count, part("guidance", count), part("gated_up")]

    def cost(self, dtype: torch.dtype, backward: bool = False) -> "Cost":
        """The sum over ``parts``."""
        costs = [part.cost(dtype, backward) for part in self.parts()]
        return Cost(sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs))


class _Called(nn.Module):
    """A side network whose forward is the call that training makes."""

    def __init__(self, side: nn.Module) -> None:
        super().__init__()
        self.side = side

    def forward(self, hidden_states: list[Tensor]) -> Tensor:
        return self.side.pooled(hidden_states) if hasattr(self.side, "pooled") else self.side(hidden_states)


@dataclass(frozen=True)
class Cost:
    """The least that a computation must do: ``bytes`` between memory and chip, every input read once and
    every result written once, and ``flops`` of its matrix products, a multiply-add being two."""

    bytes: int
    flops: int


def _cost(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    if backward and case.op == "row_statistics":
        return Cost(0, 0)
    inputs = case.inputs(dtype, "meta", draw_on="meta")
    out = case.definition()(**inputs).nbytes
    flat = flat_tensors(inputs)
    read = sum(tensor.nbytes for tensor in flat.values())
    # The backward reads the output's gradient in place of writing the output, and writes the inputs'.
    written = sum(t.nbytes for name, t in flat.items() if name not in case.frozen) if backward else 0
    return Cost(read + out + written, 2 * case._products()[backward])


def _cases() -> list[Case]:
    shapes = [
        {},
        # One frame with several layers: weights that are all one have no gradient but rounding.
        {"batch": 1, "frames": 1, "layers": 3},
        {"batch": 2, "frames": 7, "layers": 1},
        {"batch": 3, "frames": 64, "width": 96, "side": 48, "adapter_dim": 64, "layers": 4},
        {"batch": 2, "frames": 13, "width": 33, "side": 5, "adapter_dim": 7, "layers": 2},
    ]
    cases = [Case(op=name, **shape) for name in ops.OP_NAMES[1:] for shape in shapes]
    attention = [case for case in cases if case.op == "relu_attention"]
    # Whole groups, and smaller last ones. The fourth has as many keys as without pooling: of few a query
    # has often one alone, and its gradient is rounding over what may be nearly zero, alike nowhere.
    attention[3] = replace(attention[3], frames=256)
    cases += [replace(case, pool=pool) for case, pool in zip(attention, (5, 2, 3, 4, 3), strict=True)]
    with_lengths = ("pooled_upsample", "relu_attention", "linear_attention")
    return cases + [replace(case, masked=True) for case in cases if case.op in with_lengths]


CASES = _cases()

SIDE_NETWORKS = ("LST", "UniPT", "SHERL")
AnyCase = Case | NetworkCase


def real_case(
    op: str, batch: int, frames: int = 1500, width: int = 768, side: int = 96, layers: int = 12
) -> AnyCase:
    """An op, or a side network by its method's name, with the sizes it has on a Whisper encoder.

    Args:
        op: a name of ``ops.OP_NAMES`` or of ``SIDE_NETWORKS``.
        batch, frames: of the hidden states; Whisper's window has 1500 frames.
        width, side: D and r; a side network needs r = D // reduction factor.
        layers: of the encoder. ReLU attention merges as many features, guidance too.

    Raises:
        ValueError: no such op, or a side network with no reduction factor that gives ``side``.
    """
    if op in SIDE_NETWORKS:
        factor = max(1, width // side)
        if width // factor != side:
            raise ValueError(f"side must be width // reduction_factor for {op}, got {side} of {width}")
        return NetworkCase(op, batch, frames, width, factor, layers)
    if op not in ops.OP_NAMES:
        names = ", ".join(map(repr, (*ops.OP_NAMES, *SIDE_NETWORKS)))
        raise ValueError(f"op must be one of {names}, got {op!r}")
    # UniPT's adapter is as wide as the backbone; LST's, inside its rungs, has a width of its own.
    adapter_dim = width if op == "adapter" else 256
    return Case(op, batch, frames, width, side, adapter_dim, layers)


def small(case: AnyCase) -> AnyCase:
    """A case with the same widths, for the same kernels, that float64 gets through at once."""
    return replace(case, batch=min(case.batch, 2), frames=min(case.frames, 37), layers=min(case.layers, 4))


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
    function: Callable[..., Tensor],
    inputs: dict,
    upstream: Tensor,
    dtype: torch.dtype | None = None,
    differentiable: bool = True,
) -> dict[str, Tensor]:
    """``function(**inputs)`` under the name ``out`` and, if ``differentiable``, the gradient of every
    floating-point input."""
    copies = _cast(inputs, dtype)
    out = function(**copies)
    if not differentiable:
        return {"out": out.detach()}
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
    case: AnyCase, dtype: torch.dtype, device: torch.device | str = "cpu", draws: int = 4
) -> None:
    """Checks values and every gradient of an op in the current backend against float64.

    Of a side network the output alone: where a ReLU's argument is nearly zero, whole gradients turn on one
    rounding. Its ops' gradients are checked one op at a time.

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
        generator = torch.Generator("cpu").manual_seed(seed)
        upstream = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
        for results, function, type_ in (
            (truth, case.definition(), torch.float64),
            (yardstick, with_autocast, None),
            (computed, case.function(), None),
        ):
            differentiable = isinstance(case, Case) and case.op != "row_statistics"
            results.append(outputs_and_gradients(function, inputs, upstream, type_, differentiable))

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
