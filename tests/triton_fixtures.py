"""Judges a Triton forward and backward, called directly, by the reference's own error at the same type."""

from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor

from meft_kernels.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(module: ModuleType, inputs: dict, grad: Tensor, names: Iterable[str], *flags: bool) -> dict:
    """The output and all gradients of a module's ``forward`` and ``backward`` by name."""
    arguments = tuple(inputs.values())
    out = module.forward(*arguments)
    grads = module.backward(grad, *arguments, *flags)
    names = list(names)
    assert len(grads) == len(names)
    return {"out": out, **dict(zip(names, grads))}


def convert(inputs: dict, change: Callable[[Tensor], Tensor]) -> dict:
    """The inputs with every floating-point tensor, also those in lists, changed."""

    def changed(value):
        if isinstance(value, list):
            return [changed(item) for item in value]
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: changed(value) for name, value in inputs.items()}


def assert_as_good_as_reference(
    kernel: ModuleType,
    reference: ModuleType,
    draws: list[tuple[dict, Tensor]],
    names: Iterable[str],
    *flags: bool,
    factor: float = 2.0,
) -> None:
    """Compares with the reference in float64, over several draws of inputs and upstream gradients.

    The yardstick is the reference run at the inputs' type; a few roundings are allowed beyond it. A gradient
    of one element, whose error is mostly luck, is judged as one vector with the gradient before it.
    """
    results: dict[str, tuple[list, list, list]] = {}
    for inputs, grad in draws:
        exact = run(reference, convert(inputs, Tensor.double), grad.double(), names, *flags)
        plain = run(reference, inputs, grad, names, *flags)
        fused = run(kernel, inputs, grad, names, *flags)
        group = ""
        for name, truth in exact.items():
            assert fused[name].shape == plain[name].shape and fused[name].dtype == plain[name].dtype, name
            group = group if truth.numel() == 1 else name
            results.setdefault(group, ([], [], []))
            parts = results[group]
            for part, value in zip(parts, (truth, plain[name], fused[name])):
                part.append(value.double().flatten())
        dtype = fused["out"].dtype
    for name, parts in results.items():
        truth, plain, fused = (torch.cat(part) for part in parts)
        assert torch.isfinite(fused).all(), f"{name} is not finite"
        if not truth.any():
            assert not fused.any(), f"{name} must be exactly zero"
            continue
        allowed = factor * relative_error(plain, truth) + 4 * torch.finfo(dtype).eps
        error = relative_error(fused, truth)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
