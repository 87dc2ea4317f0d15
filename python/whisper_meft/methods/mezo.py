"""MeZO: training by forward passes alone (arXiv 2305.17333, algorithm 1)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .checks import check_positive_number
from .full import FullConfig


@dataclass(kw_only=True)
class MeZOConfig(FullConfig):
    """MeZO (arXiv 2305.17333): full fine-tuning by forward passes alone; needs
    :class:`whisper_meft.MeftTrainer`."""

    method: ClassVar[str] = "mezo"

    eps: float = field(
        default=1e-3,
        metadata={"help": "How far from the weights the loss is measured, in units of the random direction."},
    )

    def validate(self) -> None:
        super().validate()
        check_positive_number("eps", self.eps)


class MeZO(torch.optim.Optimizer):
    """Zeroth-order SGD. The direction z ~ N(0, I) of a step is never stored: its seed is replayed.

    ``measure`` estimates the slope along z of each part of a batch, ``step`` then moves all parameters by
    -lr * (slope * z + weight_decay * parameter). In a distributed run the processes share z and average their
    slopes.

    Args:
        params: what moves. lr: learning rate; the scale of z makes it much smaller than SGD's.
        eps: how far the two measured points are from the parameters, in units of z.
        weight_decay: as in SGD. seed: of the directions; equal on all processes.
    """

    def __init__(self, params: Any, lr: float, eps: float = 1e-3, weight_decay: float = 0.0, seed: int = 0):
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        # In the groups, because those are saved and restored.
        for group in self.param_groups:
            group.update(seed=seed, steps_done=0)
        self._slope: Tensor | float = 0.0
        self.last_slope = 0.0

    def _directions(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """(group, parameter, its part of this step's z), the same in each pass over one step."""
        generators: dict[torch.device, torch.Generator] = {}
        first = self.param_groups[0]
        state = np.random.SeedSequence([first["seed"], first["steps_done"]]).generate_state(1, np.uint64)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.device not in generators:
                    generator = torch.Generator(parameter.device)
                    generators[parameter.device] = generator.manual_seed(int(state[0] >> np.uint64(1)))
                options = {"device": parameter.device, "dtype": parameter.dtype}
                z = torch.randn(parameter.shape, generator=generators[parameter.device], **options)
                yield group, parameter, z

    def _shift(self, share: float) -> None:
        for group, parameter, z in self._directions():
            parameter.add_(z, alpha=share * group["eps"])

    @torch.no_grad()
    def measure(self, loss: Callable[[], Tensor]) -> Tensor:
        """Evaluates a loss on both sides and adds to the slope; parameters are put back, to rounding.

        Args:
            loss: gives a scalar. The losses of the parts of a batch are summed.

        Returns:
            The mean of the two values.
        """
        self._shift(1)
        devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        with torch.random.fork_rng(devices):  # dropout, if any, is the same on both sides
            above = loss()
        self._shift(-2)
        below = loss()
        self._shift(1)
        self._slope = self._slope + (above - below).float() / (2 * self.param_groups[0]["eps"])
        return (above + below) / 2

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves along the direction whose slope was measured."""
        slope = torch.as_tensor(self._slope, dtype=torch.float32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(slope)
            slope = slope / torch.distributed.get_world_size()
        for group, parameter, z in self._directions():
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(group["lr"] * slope.to(z) * z)
        for group in self.param_groups:
            group["steps_done"] += 1
        self._slope, self.last_slope = 0.0, slope
