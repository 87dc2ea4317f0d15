"""The definitions against formulas worked out again from scratch, and the derived backwards by gradcheck."""

import math

import numpy as np
import pytest
import torch

from meft_kernels import ops, reference
from meft_kernels.testing import CASES, flat_tensors

SMALL = {"batch": 2, "frames": 5, "width": 7, "side": 4, "adapter_dim": 3, "layers": 3}


def small_cases():
    from dataclasses import replace

    seen = {}
    for case in CASES:
        pool = min(case.pool, 2)
        seen.setdefault((case.op, case.masked, pool), replace(case, **SMALL, pool=pool))
    seen["pooled_upsample-relu"] = replace(seen["pooled_upsample", False, 1], layers=2)
    seen["guidance-alone"] = replace(seen["guidance", False, 1], layers=1)
    return list(seen.values())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_gradcheck(case, backend):
    inputs = case.inputs(torch.float64)
    names = list(flat_tensors(inputs))

    def call(*tensors):
        given = dict(zip(names, tensors))
        arguments = {
            name: [given[f"{name}[{i}]"] for i in range(len(value))] if isinstance(value, list) else value
            for name, value in inputs.items()
        }
        arguments.update({name: tensor for name, tensor in given.items() if "[" not in name})
        return case.function()(**arguments)

    tensors = [tensor.requires_grad_() for tensor in flat_tensors(inputs).values()]
    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(call, tensors)


# --- the three modules, frame by frame in numpy, from the formulas of arXiv 2512.02074 ----------------------


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Weights:
    """State-dict entries as float64 arrays; ``linear`` and ``norm`` apply the pair under a prefix."""

    def __init__(self, module):
        self.arrays = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}

    def __getitem__(self, name):
        return self.arrays[name]

    def linear(self, prefix, x):
        return x @ self[f"{prefix}.weight"].T + self[f"{prefix}.bias"]

    def norm(self, prefix, x):
        return layer_norm(x, self[f"{prefix}.weight"], self[f"{prefix}.bias"])


def lst(w, hidden_states):
    state = w.linear("down.0.linear", w.norm("down.0.norm", hidden_states[0]))
    for i, hidden_state in enumerate(hidden_states[1:]):
        down = w.linear(f"down.{i + 1}.linear", w.norm(f"down.{i + 1}.norm", hidden_state))
        gate = sigmoid(w[f"rungs.{i}.gate"] / 0.1)
        mixed = gate * state + (1 - gate) * down
        hidden = gelu(w.linear(f"rungs.{i}.linear_1", w.norm(f"rungs.{i}.norm", mixed)))
        state = mixed + w.linear(f"rungs.{i}.linear_2", hidden)
    return w.norm("norm", w.linear("up.linear", w.norm("up.norm", state)))


def unipt(w, hidden_states, length):
    *features, anchor = (
        w.linear(f"down.{i}.linear", w.norm(f"down.{i}.norm", h)) for i, h in enumerate(hidden_states)
    )
    merged, confidences = [], []
    for feature in features:
        scores = np.maximum(anchor @ feature[:length].T, 0)
        attended = (scores / (scores.sum(-1, keepdims=True) + 1e-7)) @ feature[:length]
        merged.append(attended + feature)
        means = anchor[:length].mean(0) * feature[:length].mean(0)
        confidences.append((w["gate.weight"][0] @ means + w["gate.bias"])[0])
    weights = np.exp(confidences) / np.exp(confidences).sum()
    guide = sum(weight * part for weight, part in zip(weights, merged))
    hidden = gelu(w.linear("adapter.linear_1", w.norm("adapter.norm", guide)))
    state = anchor + w.linear("adapter.linear_2", hidden)
    return w.norm("norm", w.linear("up.linear", np.maximum(w.norm("up.norm", state), 0)))


def sherl(w, hidden_states):
    gated = []
    for i, hidden_state in enumerate(hidden_states[:-1]):
        p = np.maximum(w.linear(f"down.{i}.linear_1", hidden_state), 0)
        gated.append((w.linear(f"down.{i}.linear_2", p) + p) * sigmoid(w.linear(f"down.{i}.linear_3", p)))
    rows = []
    for frame in range(hidden_states[0].shape[0]):
        *shallow, deep = (z[frame] for z in gated)
        directions = [z / (np.linalg.norm(z) + 1e-6) for z in shallow]
        scores = []
        for z, direction in zip(shallow, directions):
            redundancy = sum(max(direction @ other, 0) for other in directions)
            logit = max((w["guide.weight"][0] @ (z * deep) + w["guide.bias"])[0], 0)
            scores.append(logit / redundancy if redundancy > 0 else 0.0)
        total = sum(abs(score) for score in scores) + 1e-6
        rows.append(sum(score / total * z for score, z in zip(scores, shallow)) + deep)
    up = w.linear("out", np.maximum(np.stack(rows), 0))
    return up + np.tanh(w["gate"] / 0.1) * hidden_states[-2]


def randomized(module):
    """Parameters away from their initial zeros and ones, where mistakes hide."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if name.endswith("gate") else 0.3))
    return module


@pytest.mark.parametrize("package", ["reference", "ops"])
@pytest.mark.parametrize("method", ["LST", "UniPT", "SHERL"])
def test_modules_follow_the_formulas(method, package):
    import meft_kernels

    cls = getattr(reference if package == "reference" else meft_kernels, method)
    side = randomized(cls(hidden_size=12, num_layers=3, reduction_factor=3, dtype=torch.float64))
    hidden_states = [0.5 + torch.randn(2, 6, 12, dtype=torch.float64) for _ in range(4)]
    lengths = torch.tensor([6, 4])
    w = Weights(side)
    out = side(hidden_states, lengths).detach().numpy()
    for clip, length in enumerate(lengths.tolist()):
        states = [h[clip].numpy() for h in hidden_states]
        if method == "LST":
            expected = lst(w, states)
        elif method == "UniPT":
            expected = unipt(w, states, length)
        else:
            expected = sherl(w, states)
        np.testing.assert_allclose(out[clip], expected, rtol=1e-10, atol=1e-12)
        if method != "SHERL":
            pooled = side.pooled(hidden_states, lengths)[clip].detach().numpy()
            np.testing.assert_allclose(pooled, expected[:length].mean(0), rtol=1e-10, atol=1e-12)


def test_sherl_silent_frame_is_zero_and_not_nan():
    side = reference.SHERL(hidden_size=8, num_layers=3, reduction_factor=2)
    out = side([torch.zeros(1, 2, 8)] * 3)
    out.sum().backward()
    assert not out.any()
    assert all(torch.isfinite(p.grad).all() for p in side.parameters())
