"""Shapes that do not fit each other are refused before memory is touched."""

import pytest
import torch

from meft_kernels import native
from meft_kernels.testing import Case

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.REASON)

# Of each op: an argument, what it is replaced by, and what the error says.
WRONG = [
    ("guidance", "weight", lambda t: t[:, :-1], "weight must have shape"),
    ("guidance", "features", lambda t: [t[0][:, :-1], *t[1:]], "every feature must have shape"),
    ("relu_attention", "gate_weight", lambda t: t[:, :-1], "gate_weight must have shape"),
    ("relu_attention", "features", lambda t: [t[0][:, :-1], *t[1:]], "every feature must have shape"),
    ("gated_down", "x", lambda t: t[..., :-1], "x must have rows of width"),
    ("gated_down", "weight_3", lambda t: t[:-1], "weight_3 must have shape"),
    ("gated_up", "y", lambda t: t[:, :-1], "y without its last axis must have shape"),
    ("gated_up", "weight", lambda t: t[:-1], "weight must have shape"),
]


@pytest.mark.parametrize("op, name, change, message", WRONG, ids=[f"{op}-{name}" for op, name, *_ in WRONG])
def test_wrong_shapes(op, name, change, message):
    inputs = Case(op).inputs(torch.float32)
    grad = torch.zeros_like(Case(op).definition()(**inputs))
    inputs[name] = change(inputs[name])
    if "lengths" in inputs:  # where the schema has it, before the features
        inputs["features"] = inputs.pop("features")
    arguments = list(inputs.values())
    flag = (False,) if op.startswith("gated") else ()
    kernels = torch.ops.meft_csrc
    with pytest.raises(ValueError, match=message):
        getattr(kernels, op)(*arguments)
    with pytest.raises(ValueError, match=message):
        getattr(kernels, f"{op}_bwd")(grad, *arguments, *flag)


@pytest.mark.parametrize("op", ["guidance", "relu_attention", "gated_down", "gated_up"])
def test_wrong_upstream_gradient(op):
    inputs = Case(op).inputs(torch.float32)
    grad = torch.zeros_like(Case(op).definition()(**inputs))[:, :-1]
    if "lengths" in inputs:
        inputs["features"] = inputs.pop("features")
    flag = (False,) if op.startswith("gated") else ()
    with pytest.raises(ValueError, match="grad must have shape"):
        getattr(torch.ops.meft_csrc, f"{op}_bwd")(grad, *inputs.values(), *flag)


@pytest.mark.parametrize("op", ["guidance", "relu_attention"])
def test_no_features(op):
    inputs = Case(op).inputs(torch.float32) | {"features": []}
    with pytest.raises(ValueError, match="features must hold at least one tensor"):
        Case(op).function()(**inputs)
    if "lengths" in inputs:
        inputs["features"] = inputs.pop("features")
    with pytest.raises(ValueError, match="features must hold at least one tensor"):
        getattr(torch.ops.meft_csrc, op)(*inputs.values())
