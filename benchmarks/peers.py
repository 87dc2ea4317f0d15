"""The implementations that are measured side by side: ours in a backend, eager PyTorch, its torch.compile,
and published building blocks."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from meft_kernels import ops, reference, use_backend
from meft_kernels.testing import HALF_TYPES, AnyCase, flat_tensors

from .timing import Step


@dataclass(frozen=True)
class Peer:
    """One implementation of a case: ``call(**inputs)`` after ``prepare(inputs)``, which is not timed."""

    name: str
    call: Callable[..., Tensor]
    prepare: Callable[[dict], dict] = dict
    note: str = ""

    def step(self, inputs: dict, frozen: frozenset[str]) -> Step:
        """The measured step on one set of inputs; those not ``frozen`` get gradients."""
        prepared = self.prepare(inputs)
        flat = flat_tensors(prepared)
        leaves = [t.detach().requires_grad_() for n, t in flat.items() if n.split("[")[0] not in frozen]
        replaced = dict(zip((id(t) for n, t in flat.items() if n.split("[")[0] not in frozen), leaves))

        def swap(value):
            if isinstance(value, list):
                return [swap(item) for item in value]
            return replaced.get(id(value), value)

        arguments = {name: swap(value) for name, value in prepared.items()}

        def call() -> Tensor:
            return self.call(**arguments)

        if not leaves:
            return Step(call, [], None)
        with torch.no_grad():
            out = call()
        upstream = torch.randn(out.shape, device=out.device, dtype=torch.float32).to(out.dtype)
        return Step(call, leaves, upstream)


def eager(case: AnyCase, dtype: torch.dtype, device: torch.device) -> Peer:
    """The reference's definition, under autocast for half precision."""
    return Peer("eager", _with_autocast(case.definition(), dtype, device))


def compiled(case: AnyCase, dtype: torch.dtype, device: torch.device) -> Peer:
    """``torch.compile`` of the same definition, specialised to the shapes."""
    torch._dynamo.reset()
    function = torch.compile(case.definition(), dynamic=False)
    return Peer("compiled", _with_autocast(function, dtype, device))


def why_no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot run here, or None where it can."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile on a CPU needs a C++ compiler and none is installed"
    return None


POOLS = (4, 8)


def forms(case: AnyCase) -> dict[str, tuple[Callable[..., Tensor], AnyCase | None]]:
    """Of ``relu_attention`` the other forms of UniPT's attention by name, which take the same inputs and
    compute something else: each with the case whose work it is, None where it has no products."""
    if case.op != "relu_attention" or case.pool > 1:
        return {}
    found = {f"pooled:{pool}": replace(case, pool=pool) for pool in POOLS if pool < case.frames}
    functions = {name: (partial(ops.relu_attention, pool=each.pool), each) for name, each in found.items()}
    functions["linear"] = (ops.linear_attention, replace(case, op="linear_attention"))
    functions["summary"] = (reference.summary_attention.definition, None)
    return functions


def ours(case: AnyCase, backend: str) -> Peer:
    """The op, or the side network on the ops, in one backend."""
    return Peer(f"ops:{backend}", _in_backend(case.function(), backend))


def other_form(case: AnyCase, name: str, backend: str) -> Peer:
    """One of ``forms`` in one backend."""
    call = _in_backend(forms(case)[name][0], backend)
    return Peer(f"{name}:{backend}", call, note="another function than relu_attention")


def _in_backend(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    def call(**inputs) -> Tensor:
        with use_backend(backend):
            return function(**inputs)

    return call


def backends(device: torch.device) -> list[str]:
    """Backends whose time means something on a device: no interpreted ones."""
    found = []
    for name in ops.BACKENDS[1:]:
        if (name == "triton") > (device.type == "cuda") or (name == "native") > (device.type == "cpu"):
            continue
        try:
            with use_backend(name):
                found.append(name)
        except RuntimeError:
            continue
    return found


def _with_autocast(function: Callable[..., Tensor], dtype: torch.dtype, device: torch.device):
    if dtype not in HALF_TYPES:
        return function

    def call(**inputs) -> Tensor:
        with torch.autocast(device.type, dtype=dtype):
            return function(**inputs)

    return call


# --- published building blocks ------------------------------------------------------------------------------
#
# Made of torch's own modules' functions on tensors that are all in the computation's type beforehand: no fp32
# master weights and no casts, which flatters them.


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _norm_linear(x, norm_weight, norm_bias, weight, bias):
    return F.linear(_norm(x, norm_weight, norm_bias), weight, bias)


def _adapter(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2):
    hidden = F.gelu(F.linear(_norm(x, norm_weight, norm_bias), weight_1, bias_1))
    return F.linear(hidden, weight_2, bias_2)


def _ladder(x, state, down_norm_weight, down_norm_bias, down_weight, down_bias, gate, **adapter):
    down = _norm_linear(x, down_norm_weight, down_norm_bias, down_weight, down_bias)
    mixed = torch.lerp(down, state, torch.sigmoid(10 * gate))
    return mixed + _adapter(mixed, **adapter)


def _pooled_upsample(x, norm_weight, norm_bias, weight, bias, out_norm_weight, out_norm_bias, lengths, relu):
    normed = _norm(x, norm_weight, norm_bias)
    up = F.linear(torch.relu(normed) if relu else normed, weight, bias)
    return _norm(up, out_norm_weight, out_norm_bias).mean(1)


def _relu_attention(anchor, gate_weight, gate_bias, features, lengths):
    query, out = anchor[:, None], 0
    for feature in features:
        keys = feature[:, None]
        out = out + F.scaled_dot_product_attention(query, keys, keys)
    return out.squeeze(1)


def _gated_down(x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3):
    hidden = torch.relu(F.linear(x, weight_1, bias_1))
    return (F.linear(hidden, weight_2, bias_2) + hidden) * torch.sigmoid(F.linear(hidden, weight_3, bias_3))


def _gated_up(x, y, weight, bias, gate):
    return torch.addcmul(F.linear(torch.relu(y), weight, bias), torch.tanh(10 * gate), x)


def _linear_cross_entropy(x, weight, labels, label_smoothing):
    logits = F.linear(x, weight).flatten(0, -2)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    return F.cross_entropy(logits, labels.flatten(), **options).view(labels.shape)


_BLOCKS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "row_statistics": (
        lambda x: torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)[0],
        "torch.nn.LayerNorm, which also writes the normalised rows",
    ),
    "norm_linear": (_norm_linear, "torch.nn.LayerNorm and Linear in the input's type"),
    "adapter": (_adapter, "torch.nn.LayerNorm, Linear, GELU, Linear in the input's type"),
    "ladder": (
        _ladder,
        "torch.nn.LayerNorm, Linear, lerp, then as adapter, in the input's type",
    ),
    "pooled_upsample": (_pooled_upsample, "torch.nn.LayerNorm, Linear, LayerNorm, mean in the input's type"),
    "relu_attention": (
        _relu_attention,
        "scaled_dot_product_attention for each feature: not the same function (softmax, no gate)",
    ),
    "gated_down": (_gated_down, "three torch.nn.Linear, ReLU and sigmoid in the input's type"),
    "gated_up": (_gated_up, "torch.nn.Linear and addcmul in the input's type"),
    "linear_cross_entropy": (
        _linear_cross_entropy,
        "torch.nn.Linear and cross_entropy in the input's type, all logits kept",
    ),
}


def block(case: AnyCase, dtype: torch.dtype) -> Peer | None:
    """The published building block nearest to an op, or None: SHERL's guidance and the networks have none."""
    if case.op not in _BLOCKS:
        return None
    function, note = _BLOCKS[case.op]

    def cast(value):
        if isinstance(value, list):
            return [cast(item) for item in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return Peer("block", function, lambda inputs: {n: cast(v) for n, v in inputs.items()}, note)
