"""The loss without the logits, beyond the shared case table: chunks, ignored tokens, memory."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meft_kernels import ops
from meft_kernels.reference import linear_cross_entropy as reference


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages made inside, at their most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet()

    def _free(self, nbytes):
        self.now -= nbytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in given and storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out


def draw(tokens, width, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::4] = -100
    return x, weight, labels


def loss_and_gradient(function, x, weight, labels, **options):
    x = x.detach().requires_grad_()
    counted = (labels != -100).sum()
    loss = function(x, weight, labels, **options).sum() / counted
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [1, 95, 97, 700])
def test_as_exact_as_float64_in_any_number_of_chunks(tokens, label_smoothing, monkeypatch):
    monkeypatch.setattr(reference, "LEAST_ROWS", 7)
    x, weight, labels = draw(tokens, 48, 1013)
    labels[0] = 5
    truth = loss_and_gradient(
        reference.definition, x.double(), weight.double(), labels, label_smoothing=label_smoothing
    )
    found = loss_and_gradient(ops.linear_cross_entropy, x, weight, labels, label_smoothing=label_smoothing)
    assert abs(found[0] - truth[0]) < 1e-6 * truth[0]
    assert (found[1] - truth[1]).norm() < 1e-6 * truth[1].norm()


def test_the_definition_is_torchs_cross_entropy():
    x, weight, labels = draw(50, 8, 31, torch.float64)
    for smoothing in (0.0, 0.3):
        expected = F.cross_entropy(x @ weight.T, labels, label_smoothing=smoothing)
        loss, _ = loss_and_gradient(reference.definition, x, weight, labels, label_smoothing=smoothing)
        assert torch.allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_a_twentieth_of_the_logits(dtype):
    """As many tokens for each column of the vocabulary as 8192 of Whisper's 51865, in small."""
    x, weight, labels = draw(4096, 32, 2593, dtype)
    labels[:] = 7  # all count
    x.requires_grad_()
    with PeakMemory() as memory:
        ops.linear_cross_entropy(x, weight, labels).sum().backward()
    logits = 4 * labels.numel() * weight.shape[0]
    assert x.grad.nbytes < memory.most <= logits / 20
    with PeakMemory() as eager:  # what the yardstick is one of
        F.cross_entropy(F.linear(x, weight).float(), labels).backward()
    assert eager.most > logits


def test_no_gradient_is_computed_where_none_is_asked_for():
    x, weight, labels = draw(200, 32, 500)
    with PeakMemory() as with_gradient:
        ops.linear_cross_entropy(x.clone().requires_grad_(), weight, labels)
    with PeakMemory() as without:
        ops.linear_cross_entropy(x, weight, labels)
    assert without.most < with_gradient.most - x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_only_the_gradient_of_x_is_kept(dtype):
    x, weight, labels = draw(64, 16, 100, dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear_cross_entropy(x.requires_grad_(), weight, labels).sum()
    assert [(t.shape, t.dtype) for t in saved if t.numel() > 1] == [(x.shape, dtype)]


def test_autocast_keeps_half_a_gradient_and_gives_a_wide_loss():
    x, weight, labels = draw(64, 16, 100)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ops.linear_cross_entropy(x, weight, labels)
    assert loss.dtype == torch.float32 and all(t.dtype != torch.float32 for t in saved if t.shape == x.shape)
    loss.sum().backward()
    assert x.grad.dtype == torch.float32 and torch.isfinite(x.grad).all()


def test_ignored_tokens_are_never_computed():
    x, weight, labels = draw(40, 16, 100)
    clean = loss_and_gradient(ops.linear_cross_entropy, x, weight, labels)
    x[labels == -100] = torch.nan
    loss, gradient = loss_and_gradient(ops.linear_cross_entropy, x, weight, labels)
    assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1])
    assert not gradient[labels == -100].any()
    labels[:] = -100
    assert not ops.linear_cross_entropy(x, weight, labels).any()


def test_a_sure_token_keeps_a_gradient_in_half_precision():
    """1 - p of 4e-4 is less than the rounding of p; rounding softmax before subtracting one would lose it."""
    x, weight = torch.tensor([[8.0]]), torch.tensor([[1.0], [0.0]])
    labels = torch.tensor([0])
    _, truth = loss_and_gradient(reference.definition, x.double(), weight.double(), labels)
    for dtype in (torch.float16, torch.bfloat16):
        _, found = loss_and_gradient(ops.linear_cross_entropy, x.to(dtype), weight.to(dtype), labels)
        assert abs(found.double() / truth - 1) < 8e-3, dtype


def test_logits_of_any_size_are_finite():
    x, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0], [0.5]])
    loss, gradient = loss_and_gradient(ops.linear_cross_entropy, x, weight, torch.tensor([1]))
    assert loss == 2e4 and gradient == 2.0


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"labels": torch.tensor([0, 1, 9])}, ValueError, r"labels must lie in 0..4 or be -100, got 9"),
        ({"labels": torch.tensor([0, 1, -1])}, ValueError, r"labels must lie in 0..4 or be -100, got -1"),
        ({"labels": torch.tensor([0, 1])}, ValueError, r"labels must have shape \(3,\), got \(2,\)"),
        ({"labels": torch.ones(3)}, TypeError, "labels must be int32 or int64 token numbers"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"x must have shape \(..., D\) and weight \(V, D\)"),
        ({"x": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "x and weight must be floating point"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be from 0 to below 1, got 1.0"),
    ],
)
def test_what_does_not_fit_is_named(changed, error, message):
    good = {"x": torch.ones(3, 2), "weight": torch.ones(5, 2), "labels": torch.tensor([0, 4, -100])}
    assert ops.linear_cross_entropy(**good).shape == (3,)
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(**(good | changed))
