"""Every op: device registration, ``torch.autograd.Function`` and public function.

This is the one place that registers an op or chooses a backend. Under ``torch.ops.meft`` the reference serves
every device; a faster kernel registered on a device's dispatch key takes over with no change here or above.
On CUDA that is Triton's, once it has passed its check there (``self_check``), on the CPU the C++ one, where
it was built (``native``). ``torch.ops.meft_reference``, ``meft_native`` and ``meft_triton`` hold the same ops
for ``use_backend``, with one kernel for all that it can serve.

Each op saves its inputs for the backward and nothing else: what the forward computed is recomputed. Only the
C++ kernels keep, of fp32 activations, the projection (..., r) of a hidden state as well: that is most of what
there is to recompute (``native.keeps_projection``). With ``saved_activations="fp8"`` the leading input x, a
hidden state, is kept as an 8-bit normalised copy instead.
Under autocast, fp32 activations are cast on entry; parameters stay fp32 masters and are cast inside.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import native, reference, schemas, self_check
from .reference import SAVED_ACTIVATIONS
from .second_derivative import refuses_second_derivative

OP_NAMES = ("row_statistics", *schemas.ARGUMENTS)
BACKENDS = ("auto", "reference", "native", "triton")
_NAMESPACES = {
    "auto": "meft",
    "reference": "meft_reference",
    "native": "meft_native",
    "triton": "meft_triton",
}
_backend = "auto"


# --- registration -------------------------------------------------------------------------------------------


def _without_autocast(kernel: Callable) -> Callable:
    """A reference kernel sets its own precisions, whatever autocast says about the operators in it."""

    @functools.wraps(kernel)
    def run(first: Tensor, *arguments):
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *arguments)

    return run


# Without a kernel of their own: the quadratic form is a few small products.
_PLAIN = {"pooled_upsample"}


def _triton_kernel(name: str, function: str) -> Callable:
    """A function of ``triton_kernels.<name>``, imported, and Triton with it, when it is first called."""

    def run(*arguments):
        module = importlib.import_module(f".triton_kernels.{name}", __package__)
        return getattr(module, function)(*arguments)

    return run


# Of each registered op: its module's name, the reference's function and the Triton launcher.
_HOST_CODE: dict[str, tuple[str, Callable, Callable]] = {}


def _checked(schema: str, plain: Callable, fused: Callable) -> Callable:
    """``fused`` on devices where it passes its check against ``plain`` at first use, ``plain`` on others."""
    name, arguments = schema.split(") ->")[0].split("(", 1)
    names = [argument.split()[-1].split("=")[0] for argument in arguments.split(", ")]

    def run(*given):
        return self_check.choose(name, names, given, plain, fused)(*given)

    return run


def _reference_kernel(op: str, function: str) -> Callable:
    kernel = reference.row_statistics if op == "row_statistics" else getattr(getattr(reference, op), function)
    return _without_autocast(kernel)


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _register() -> list[torch.library.Library]:
    """Defines every op in each namespace: the reference for all devices, and the kernels made for one."""
    libraries = {
        name: torch.library.Library(name, "DEF") for name in (native.NAMESPACE, *_NAMESPACES.values())
    }
    for row in schemas.REGISTERED:
        for library in libraries.values():
            library.define(row.schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = libraries[native.NAMESPACE]
    for row in schemas.REGISTERED_NATIVE:
        kernels.define(row.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{native.NAMESPACE}::{row.name}", row.fake, lib=kernels)
    native.load()
    for row in schemas.REGISTERED:
        name, plain = row.name, _reference_kernel(row.op, row.function)
        fused = _without_autocast(_triton_kernel(row.op, row.function))
        _HOST_CODE[name] = (row.op, plain, fused)
        for backend, namespace in _NAMESPACES.items():
            library = libraries[namespace]
            use_fused = backend == "triton" and row.op not in _PLAIN
            library.impl(name, fused if use_fused else plain, "CompositeExplicitAutograd")
            if backend == "auto" and _HAS_TRITON and row.op not in _PLAIN:
                library.impl(name, _checked(row.schema, plain, fused), "CUDA")
            if backend in ("auto", "native") and native.has(name):
                library.impl(name, _without_autocast(native.chosen(name, plain)), "CPU")
            torch.library.register_fake(f"{namespace}::{name}", row.fake, lib=library)
    return list(libraries.values())


_libraries = _register()  # kept alive: an op lives as long as its library


def _kernel(backend: str, name: str) -> Callable:
    return getattr(getattr(torch.ops, _NAMESPACES[backend]), name)


def host_code(name: str, backend: str, device_type: str) -> Callable | None:
    """The Python function that serves an op, for whoever counts what it allocates.

    Args:
        name: as registered, such as ``"ladder"`` or ``"ladder_bwd"``.
        backend: see ``use_backend``. device_type: ``"cpu"`` or ``"cuda"``.

    Returns:
        None where the kernel is not Python.
    """
    op, plain, fused = _HOST_CODE[name]
    on_cuda = device_type == "cuda"
    if backend in ("auto", "native") and not on_cuda:
        return None if native.has(name) else plain
    use_fused = backend == "triton" or (backend == "auto" and on_cuda and _HAS_TRITON)
    return fused if use_fused and op not in _PLAIN else plain


def backend_status() -> dict[str, tuple[str, str]]:
    """For every op, and for the 8-bit copies, the backend that ``auto`` uses here and, in words, why."""
    status = {}
    for name in (*OP_NAMES, "eight_bit"):
        registered = "encode" if name == "eight_bit" else name
        has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"meft::{registered}")
        if torch.cuda.is_available() and has("CUDA"):
            status[name] = ("triton", "each kernel is checked against the reference at its first use")
        elif has("CPU"):
            status[name] = ("native", native.REASON)
        else:
            none = "no faster kernel is registered for this device"
            status[name] = ("reference", none if native.LOADED else native.REASON)
    return status


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the kernels of every op called inside the ``with`` block; its backward follows the forward.

    Args:
        name: ``"auto"`` (the fastest that is registered for the tensors' device), ``"reference"`` (plain
            PyTorch), ``"native"`` (C++) or ``"triton"``.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend has no kernels in this installation.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name == "native" and not native.LOADED:
        raise RuntimeError(f"backend 'native' has no kernels in this installation: {native.REASON}")
    if name == "triton" and not _HAS_TRITON:
        raise RuntimeError("backend 'triton' needs the triton package, which is not installed")
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "backend 'triton' needs a CUDA device (or TRITON_INTERPRET=1 to interpret it on the CPU)"
        )
    with assume_backend(name):
        yield


@contextmanager
def assume_backend(name: str) -> Iterator[None]:
    """``use_backend`` whether or not the backend can run here, for whoever counts what it would allocate."""
    global _backend
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def uses_native() -> bool:
    """Whether the current choice of kernels takes the C++ ones on the CPU, where they were built."""
    return _backend in ("auto", "native")


# --- autograd -----------------------------------------------------------------------------------------------


def _pack(name: str, arguments: Sequence) -> tuple:
    """Arguments as the op takes them: a list, which comes last, was passed on one tensor at a time."""
    names = schemas.ARGUMENT_NAMES[name]
    fixed = len(names) - 1
    return (*arguments[:fixed], list(arguments[fixed:])) if names[-1] == "features" else tuple(arguments)


def _make_function(name: str) -> type[torch.autograd.Function]:
    """The autograd Function of an op; its first arguments are the backend and whether x is kept in 8 bits."""
    names = schemas.ARGUMENT_NAMES[name]
    has_flag = names[-1] == "relu"
    takes_need_x = names[0] == "x"
    differentiable = [argument not in schemas.CONSTANT for argument in names if argument != "features"]

    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(backend: str, in_8_bits: bool, *arguments):
            if backend in ("auto", "native") and not in_8_bits and native.keeps_projection(name, arguments):
                return native.kernel(f"{name}_keeping")(*arguments)
            return _kernel(backend, name)(*_pack(name, arguments))

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            ctx.backend, ctx.in_8_bits, *arguments = inputs
            if has_flag:
                *arguments, ctx.flag = arguments
            if ctx.in_8_bits:
                arguments = _encoded(ctx.backend, names, arguments)
            ctx.keeping = isinstance(output, tuple)
            if ctx.keeping:
                projection = output[1]
                ctx.mark_non_differentiable(projection)
                ctx.set_materialize_grads(False)  # not a tensor of zeros for the projection
                arguments = [*arguments, projection]
            ctx.save_for_backward(*arguments)

        @staticmethod
        @refuses_second_derivative
        def backward(ctx, grad, *_):
            arguments = ctx.saved_tensors
            extra = ()
            kernel = _kernel(ctx.backend, f"{name}_bwd")
            if ctx.keeping:
                *arguments, projection = arguments
                extra, kernel = (projection,), native.kernel(f"{name}_keeping_bwd")
            if ctx.in_8_bits:
                arguments, extra = _decoded(ctx.backend, names, arguments, grad)
            if has_flag:
                arguments = (*arguments, ctx.flag)
            packed = _pack(name, arguments)
            if takes_need_x:
                packed = (*packed, ctx.needs_input_grad[2], *extra)
            computed = list(kernel(grad, *packed))
            if takes_need_x and not ctx.needs_input_grad[2]:
                computed[0] = None
            grads = [None, None]
            for is_differentiable in differentiable:
                grads.append(computed.pop(0) if is_differentiable else None)
            return (*grads, *computed)

    OpFunction.__name__ = OpFunction.__qualname__ = f"{name.title().replace('_', '')}Function"
    return OpFunction


def _encoded(backend: str, names: list[str], arguments: list) -> list:
    """Arguments with x as an 8-bit copy, and at the end what the backward needs to make do with it."""
    x, *rest = arguments
    given = dict(zip(names, arguments))
    if "mean" in given:  # the backward takes the normalised x for x: its statistics are 0 and 1
        code, *channels = _kernel(backend, "encode")(x, given["mean"], given["rstd"])
        return [code, *(None if n in ("mean", "rstd") else t for n, t in zip(names[1:], rest)), *channels]
    mean, rstd = _kernel(backend, "row_statistics")(x)
    code, *channels = _kernel(backend, "encode")(x, mean, rstd)
    active = reference.gated_down.active_bits(x, given["weight_1"], given["bias_1"])
    return [code, *rest, *channels, mean, rstd, active]


def _decoded(backend: str, names: list[str], saved: Sequence, grad: Tensor) -> tuple[list, tuple]:
    """The arguments that ``_encoded`` was given, with x from its 8-bit copy, and what the backward takes
    after them; ``grad`` has the type of x."""
    code, *rest = saved
    count = len(names) - 1
    rest, (scale, shift, *more) = rest[:count], rest[count:]
    statistics, extra = more[:2], tuple(more[2:])
    x = _kernel(backend, "decode")(code, scale, shift, grad.new_empty(0), *statistics)
    if not statistics:
        zero = scale.new_zeros(code.shape[:-1])
        standard = {"mean": zero, "rstd": torch.ones_like(zero)}
        rest = [standard.get(name, argument) for name, argument in zip(names[1:], rest)]
    return [x, *rest], extra


_FUNCTIONS = {name: _make_function(name) for name in schemas.ARGUMENTS}


def _call(name: str, *arguments, saved_activations: str = "exact") -> Tensor:
    """Runs an op with autograd where a gradient is asked for, else its kernel alone."""
    if saved_activations not in SAVED_ACTIVATIONS:
        accepted = " or ".join(map(repr, SAVED_ACTIVATIONS))
        raise ValueError(f"saved_activations must be {accepted}, got {saved_activations!r}")
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        # A gradient to x itself would need the exact x.
        in_8_bits = saved_activations == "fp8" and not arguments[0].requires_grad
        out = _FUNCTIONS[name].apply(_backend, in_8_bits, *arguments)
        return out[0] if isinstance(out, tuple) else out
    return _kernel(_backend, name)(*_pack(name, arguments))


def _activation(x: Tensor) -> Tensor:
    """Casts fp32 activations to autocast's type where autocast is on."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _check_features(features: Sequence[Tensor]) -> None:
    if not features:
        raise ValueError("features must hold at least one tensor, got none")


# --- public functions ---------------------------------------------------------------------------------------


def eight_bit(x: Tensor) -> Tensor:
    """What a backward reads in place of x with ``saved_activations="fp8"``, without gradient: the normalised
    rows, in 8 bits and back; see ``reference.eight_bit``.

    Args:
        x: (..., D).

    Returns:
        (..., D) in the type of x.
    """
    x = x.detach()
    encoded = _kernel(_backend, "encode")(x, *row_statistics(x))
    return _kernel(_backend, "decode")(*encoded, x.new_empty(0))


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each row, as LayerNorm needs them, without gradient.

    Args:
        x: (..., D).

    Returns:
        Two tensors (...), fp32 for half precision and fp32, float64 for float64.
    """
    return _kernel(_backend, "row_statistics")(x.detach())


def fold(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine part and centring folded into a projection: one weight and bias for any number of
    calls of ``folded_linear`` or ``folded_ladder``; see ``reference.norm_linear``.

    Args:
        norm_weight, norm_bias: (D,). weight: (r, D). bias: (r,).

    Returns:
        Weight (r, D) and bias (r,), with gradient to all four.
    """
    return reference.norm_linear.fold(norm_weight, norm_bias, weight, bias)


def norm_linear(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``Linear(LayerNorm(x))`` that keeps x and never a normalised copy; see ``reference.norm_linear``.

    Args:
        x: (..., D). norm_weight, norm_bias: (D,). weight: (r, D). bias: (r,).

    Returns:
        (..., r) in the type of x.
    """
    return folded_linear(x, *fold(norm_weight, norm_bias, weight, bias))


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor] | None = None,
    saved_activations: str = "exact",
) -> Tensor:
    """``norm_linear`` with parameters that ``fold`` gave.

    Args:
        x: (..., D). weight: (r, D). bias: (r,).
        statistics: what ``row_statistics(x)`` would give, where it is known already.
        saved_activations: ``"exact"`` keeps x for the backward, ``"fp8"`` an 8-bit copy of the normalised x.

    Returns:
        (..., r) in the type of x.

    Raises:
        ValueError: another ``saved_activations``.
    """
    x, statistics = _activation(x), statistics or row_statistics(x)
    return _call("norm_linear", x, weight, bias, *statistics, saved_activations=saved_activations)


def adapter(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """``Linear_2(gelu(Linear_1(LayerNorm(x))))`` without the residual; see ``reference.adapter``.

    Args:
        x: (..., r). norm_weight, norm_bias, bias_2: (r,). weight_1: (a, r). bias_1: (a,). weight_2: (r, a).

    Returns:
        (..., r) in the type of x.
    """
    parameters = (norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    return _call("adapter", _activation(x), *parameters)


def ladder(
    x: Tensor,
    state: Tensor,
    down_norm_weight: Tensor,
    down_norm_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """One rung of LST: project x, gate it with the state below, adapt; see ``reference.ladder``.

    Args:
        x: hidden state (..., D). state: side state (..., r), taken in the type of x.
        down_norm_weight, down_norm_bias: (D,). down_weight: (r, D). down_bias: (r,).
        gate: (1,), before the sigmoid and its temperature.
        norm_weight … bias_2: the adapter's, as in ``adapter``.

    Returns:
        The next side state, (..., r) in the type of x.
    """
    folded = fold(down_norm_weight, down_norm_bias, down_weight, down_bias)
    parameters = (gate, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    return folded_ladder(x, state, *folded, *parameters)


def folded_ladder(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    statistics: tuple[Tensor, Tensor] | None = None,
    saved_activations: str = "exact",
) -> Tensor:
    """``ladder`` with a projection that ``fold`` gave.

    Args:
        x, state, gate, norm_weight … bias_2: as in ``ladder``. weight: (r, D). bias: (r,).
        statistics, saved_activations: as in ``folded_linear``.

    Returns:
        The next side state, (..., r) in the type of x.

    Raises:
        ValueError: another ``saved_activations``.
    """
    x, statistics = _activation(x), statistics or row_statistics(x)
    parameters = (gate, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    arguments = (x, state.to(x.dtype), weight, bias, *statistics, *parameters)
    return _call("ladder", *arguments, saved_activations=saved_activations)


def pooled_upsample(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    lengths: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Mean over time of ``LayerNorm(Linear(f(LayerNorm(x))))``, never writing the (B, T, D) tensor inside.

    See ``reference.pooled_upsample``.

    Args:
        x: (B, T, r). norm_weight, norm_bias: (r,). weight: (D, r).
        bias, out_norm_weight, out_norm_bias: (D,).
        lengths: (B,) valid frames, or None for all T.
        relu: whether f is ReLU (UniPT) or the identity (LST).

    Returns:
        (B, D) in the type of x.
    """
    parameters = (norm_weight, norm_bias, weight, bias, out_norm_weight, out_norm_bias)
    return _call("pooled_upsample", _activation(x), *parameters, lengths, relu)


def relu_attention(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor | None = None,
) -> Tensor:
    """UniPT's parallel interaction of all layers with the anchor, without T x T memory; see
    ``reference.relu_attention``.

    Args:
        anchor: (B, T, r). gate_weight: (1, r). gate_bias: (1,). features: at least one tensor (B, T, r).
        lengths: (B,) valid frames, or None for all T.

    Returns:
        (B, T, r) in the type of anchor.

    Raises:
        ValueError: no features.
    """
    _check_features(features)
    anchor = _activation(anchor)
    features = [feature.to(anchor.dtype) for feature in features]
    return _call("relu_attention", anchor, gate_weight, gate_bias, lengths, *features)


def gated_down(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
    saved_activations: str = "exact",
) -> Tensor:
    """SHERL's gated down-projection of one hidden state; see ``reference.gated_down``.

    Args:
        x: (..., D). weight_1: (r, D). weight_2, weight_3: (r, r). bias_1, bias_2, bias_3: (r,).
        saved_activations: ``"exact"`` keeps x for the backward, ``"fp8"`` an 8-bit normalised copy.

    Returns:
        (..., r) in the type of x.
    """
    parameters = (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)
    return _call("gated_down", _activation(x), *parameters, saved_activations=saved_activations)


def guidance(weight: Tensor, bias: Tensor, features: Sequence[Tensor]) -> Tensor:
    """SHERL's redundancy-guided merge of shallow layers into the deepest; see ``reference.guidance``.

    Args:
        weight: (1, r). bias: (1,). features: the shallow layers' and last the deep
            one, each (..., r), taken in the type of the last.

    Returns:
        (..., r) in the type of the last feature.

    Raises:
        ValueError: no features.
    """
    _check_features(features)
    deep = _activation(features[-1])
    features = [*(feature.to(deep.dtype) for feature in features[:-1]), deep]
    return _call("guidance", weight, bias, *features)


def gated_up(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """``Linear(relu(y)) + tanh(gate / 0.1) * x``, SHERL's input to the last encoder layer; see
    ``reference.gated_up``.

    Args:
        x: hidden state (..., D). y: (..., r), taken in the type of x. weight: (D, r). bias: (D,). gate: (1,).

    Returns:
        (..., D) in the type of x.
    """
    x = _activation(x)
    return _call("gated_up", x, y.to(x.dtype), weight, bias, gate)
