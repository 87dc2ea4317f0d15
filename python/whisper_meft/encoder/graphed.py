"""A frozen encoder and its reader captured in CUDA graphs for the training step: ``--cuda_graphs``.

A step of a side network launches some thousands of kernels, and on a fast GPU handing them over can take the
host longer than the GPU needs for them. A graph hands over all of them at once. Captured are the encoder, the
reader and the mean over time, forward and backward; what is left outside, head, loss and optimizer, is a few
dozen kernels. A graph repeats what was captured on the same memory, so every batch must have the shape of the
captured one; others run without.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meft_kernels.capturing import chosen_backend, with_checked_kernels

from ..errors import UserError, one_line

WARM_UP = 3  # runs before the capture: kernels are compiled and checked, and libraries take their workspaces


class _Captured:
    """One shape's forward and backward.

    Args:
        read: (features, lengths or None) -> (B, D). parameters: that it is differentiated for.
        features, lengths: of the batch that is captured.
    """

    def __init__(
        self,
        read: Callable[[Tensor, Tensor | None], Tensor],
        parameters: Sequence[Tensor],
        features: Tensor,
        lengths: Tensor | None,
    ):
        self._features, self._lengths = features.clone(), None if lengths is None else lengths.clone()
        given = self._features, self._lengths
        stream = torch.cuda.Stream(features.device)
        stream.wait_stream(torch.cuda.current_stream(features.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                pooled = read(*given)
                if pooled.requires_grad:
                    _gradients(pooled, parameters, torch.ones_like(pooled))
            self._upstream = torch.zeros_like(pooled)
            del pooled
        torch.cuda.synchronize(features.device)
        torch.cuda.empty_cache()  # the graphs take memory of their own
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._gradients: _Gradients | None = None
        # Threads that pin memory go on meanwhile, and the backward runs in one of autograd's.
        mode = {"stream": stream, "capture_error_mode": "thread_local"}
        with with_checked_kernels():
            with torch.cuda.graph(self._forward, **mode):
                self._pooled = read(*given)
            if self._pooled.requires_grad:  # else the head alone trains
                with torch.cuda.graph(self._backward, pool=self._forward.pool(), **mode):
                    self._gradients = _gradients(self._pooled, parameters, self._upstream)
        self._pooled = self._pooled.detach()

    def forward(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """The mean over time (B, D) of a batch of the captured shape."""
        self._features.copy_(features)
        if lengths is not None:
            self._lengths.copy_(lengths)
        self._forward.replay()
        return self._pooled.clone()

    def backward(self, upstream: Tensor) -> list[Tensor | None]:
        """The parameters' gradients for the batch of the last :meth:`forward`. They are the caller's: the
        next step does not write over them."""
        self._upstream.copy_(upstream)
        self._backward.replay()
        return self._gradients.copied()


class _Gradients:
    """Gradients side by side in one tensor, so that one kernel copies them all.

    Args:
        gradients: of one type, None where a parameter has none.
    """

    def __init__(self, gradients: Sequence[Tensor | None]):
        types = {each.dtype for each in gradients if each is not None}
        if len(types) > 1:
            raise UserError(f"trained parameters must be of one type, got {', '.join(map(str, types))}")
        self._shapes = [None if each is None else each.shape for each in gradients]
        self._flat = torch.cat([each.flatten() for each in gradients if each is not None])

    def copied(self) -> list[Tensor | None]:
        """A copy in the shapes of the parameters."""
        sizes = [shape.numel() for shape in self._shapes if shape is not None]
        parts = iter(self._flat.clone().split(sizes))
        return [None if shape is None else next(parts).view(shape) for shape in self._shapes]


def _gradients(pooled: Tensor, parameters: Sequence[Tensor], upstream: Tensor) -> _Gradients:
    return _Gradients(torch.autograd.grad(pooled, parameters, upstream, allow_unused=True))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, captured: _Captured, features: Tensor, lengths: Tensor | None, *parameters: Tensor):
        ctx.captured = captured
        captured.replays += 1
        ctx.replay = captured.replays
        return captured.forward(features, lengths)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        if ctx.replay != ctx.captured.replays:
            raise UserError(
                "cuda_graphs: a step's backward must come once, and before the forward of the next one, "
                "which writes over what it needs; leave the option out"
            )
        ctx.captured.replays += 1
        return None, None, None, *ctx.captured.backward(upstream)


class GraphedReader:
    """Runs ``read`` by CUDA graphs, captured at the first batch; batches of another shape run without.

    Where a parameter was moved, autocast changed, or other kernels were chosen since, it is captured anew.

    Args:
        read: (features, lengths or None) -> (B, D), computed from ``parameters`` and constants, without a
            look at values.
        parameters: that are trained.
        frames: of log-mel, that shorter batches with ``lengths`` are padded to; None for those of the window.
        capture: makes what is replayed, see :class:`_Captured`; for tests.
    """

    def __init__(
        self,
        read: Callable[[Tensor, Tensor | None], Tensor],
        parameters: Sequence[Tensor],
        frames: int | None = None,
        capture: Callable[..., Any] = _Captured,
    ):
        self._read, self._frames, self._capture = read, frames, capture
        self._parameters = list(parameters)
        self._captured: Any = None
        self._shape: tuple | None = None
        self._state: tuple | None = None

    @property
    def in_use(self) -> bool:
        """Whether something is captured."""
        return self._captured is not None

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model runs without: the graphs are of this one's memory."""
        return None

    def __call__(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """As ``read``.

        Raises:
            UserError: it cannot be captured.
        """
        if lengths is not None and self._frames is not None and features.shape[-1] < self._frames:
            features = torch.nn.functional.pad(features, (0, self._frames - features.shape[-1]))
        shape = (features.shape, features.dtype, lengths is None)
        if self._shape not in (None, shape):
            return self._read(features, lengths)
        state = self._now(features)
        if state != self._state:
            self._captured = None  # its memory goes before the next takes some
            try:
                with torch.cuda.device_of(features), _same_autocast(features.device.type):
                    self._captured = self._capture(self._read, self._parameters, features, lengths)
            except Exception as error:  # of a driver, a library or our own
                reason = one_line(error)
                raise UserError(
                    f"cuda_graphs: the step cannot be captured, leave the option out: {reason}"
                ) from error
            self._captured.replays = 0
            self._shape, self._state = shape, state
        return _Replay.apply(self._captured, features, lengths, *self._parameters)

    def _now(self, features: Tensor) -> tuple:
        kind = features.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        places = tuple(parameter.data_ptr() for parameter in self._parameters)
        return features.device, autocast, chosen_backend(), places


def _same_autocast(device_type: str) -> torch.autocast:
    """The autocast that is on, without its cache: what that holds of the warm-up is no part of the graph."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
