"""A peer at one case with its inputs: prepared and warmed up, run in rounds, asked for its memory."""

import functools
from collections.abc import Callable
from dataclasses import asdict

import torch

from meft_kernels import use_backend
from meft_kernels.testing import AnyCase, Case, NetworkCase, assert_as_good_as_torch, flat_tensors, small

from . import peers
from .timing import measure_memory, rotations, time_step


class Inputs:
    """Sets of inputs of one case, enough of them that none stays in the cache; shared by all peers.

    ``change`` makes others of the random ones that are drawn, given the number of the set too.
    """

    def __init__(
        self,
        case: AnyCase,
        dtype: torch.dtype,
        device: torch.device,
        change: Callable[[dict, int], dict] | None = None,
    ) -> None:
        self.case, self.dtype, self.device, self._change = case, dtype, device, change
        first = self._draw(0)
        count = rotations(sum(t.nbytes for t in flat_tensors(first).values()), device)
        self.sets = [first, *(self._draw(seed) for seed in range(1, count))]

    def _draw(self, seed: int) -> dict:
        drawn = self.case.inputs(self.dtype, self.device, seed, draw_on=self.device)
        return drawn if self._change is None else self._change(drawn, seed)


class Local:
    """A peer in this process."""

    def __init__(self, peer: peers.Peer, inputs: Inputs, warm_up: int) -> None:
        self.name, self.note = peer.name, peer.note
        self._device = inputs.device
        self._steps = [peer.step(values, inputs.case.frozen) for values in inputs.sets]
        self._known = list(flat_tensors(inputs.sets[0]).values())
        self._wait = 1e-3
        for index in range(max(1, warm_up)):
            self.round(index)

    def round(self, index: int) -> dict[str, float]:
        """Seconds of one forward, backward and both; ``index`` picks the set of inputs."""
        seconds = time_step(self._steps[index % len(self._steps)], self._device, self._wait)
        self._wait = min(max(1e-3, 1.5 * seconds.get("host", 0)), 20e-3)
        return seconds

    def memory(self) -> dict[str, int]:
        """See ``timing.measure_memory``."""
        return measure_memory(self._steps[0], self._device, self._known)


def check(case: AnyCase, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Compares every op that a case calls, at its widths and few frames, with float64 in one backend.

    A side network's own output is compared in fp32: in half precision one rounding at a ReLU's kink can turn
    SHERL's weights over.

    Raises:
        AssertionError: as ``assert_as_good_as_torch``.
    """
    if isinstance(case, NetworkCase):
        for part in dict.fromkeys(map(small, case.parts())):
            _check(part, backend, dtype, device)
        _check(small(case), backend, torch.float32, device)
    else:
        _check(small(case), backend, dtype, device)


@functools.cache  # the networks share most of their ops
def _check(case: AnyCase, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with use_backend(backend):
            # Many draws: of a gradient with one element, a few are mostly luck.
            assert_as_good_as_torch(case, dtype, device, draws=16)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def case_to_dict(case: AnyCase) -> dict:
    """A case as JSON's types, for a worker process."""
    return {"kind": type(case).__name__, **asdict(case)}


def case_from_dict(fields: dict) -> AnyCase:
    """The inverse of ``case_to_dict``."""
    fields = dict(fields)
    return {"Case": Case, "NetworkCase": NetworkCase}[fields.pop("kind")](**fields)
