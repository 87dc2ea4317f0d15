"""MeZO: training by forward passes alone (arXiv 2305.17333, algorithm 1)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .checks import check_positive_int, check_positive_number
from .full import FullConfig


@dataclass(kw_only=True)
class MeZOConfig(FullConfig):
    """MeZO (arXiv 2305.17333): full fine-tuning by forward passes alone, 2 ``mezo_queries`` of them a step;
    needs :class:`whisper_meft.MeftTrainer`."""

    method: ClassVar[str] = "mezo"

    eps: float = field(
        default=1e-3,
        metadata={"help": "How far from the weights the loss is measured, in units of the random direction."},
    )

    mezo_queries: int = field(
        default=1,
        metadata={
            "help": "Random directions of a step, whose estimates are averaged: the variance falls and the "
            "time, two forward passes for each, rises in proportion; the memory stays."
        },
    )

    def validate(self) -> None:
        super().validate()
        check_positive_number("eps", self.eps)
        check_positive_int("mezo_queries", self.mezo_queries)


class MeZO(torch.optim.Optimizer):
    """Zeroth-order SGD. The directions z_1 ... z_q ~ N(0, I) of a step are never stored: their seeds are
    replayed.

    ``measure`` estimates the slope along each z_i of each part of a batch, ``step`` then moves all parameters
    by -lr * (mean of slope_i * z_i + weight_decay * parameter): the paper's n-SPSA with n = q. In a
    distributed run the processes share the directions and average their slopes.

    Args:
        params: what moves. lr: learning rate; the scale of z makes it much smaller than SGD's.
        eps: how far the two measured points are from the parameters, in units of z.
        weight_decay: as in SGD. seed: of the directions; equal on all processes.
        queries: q, directions of a step; each costs two evaluations of the loss.
        buffers: what else the loss changes when it is evaluated, such as running statistics: all evaluations
            of a measurement begin at the same values, and what the last one leaves stays.

    Attributes:
        last_slopes: (q,) slopes of the last step, None before the first.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        queries: int = 1,
        buffers: Sequence[Tensor] = (),
    ):
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        # In the groups, because those are saved and restored.
        for group in self.param_groups:
            group.update(seed=seed, steps_done=0, queries=queries)
        self.buffers = tuple(buffers)
        self._slopes: Tensor | None = None
        self.last_slopes: Tensor | None = None

    @property
    def queries(self) -> int:
        return self.param_groups[0].get("queries", 1)  # a state that was saved before there was a choice

    def _directions(self, query: int) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """(group, parameter, its part of one of this step's z), the same in each pass over one step."""
        generators: dict[torch.device, torch.Generator] = {}
        first = self.param_groups[0]
        entropy = [first["seed"], first["steps_done"], query]
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.device not in generators:
                    generator = torch.Generator(parameter.device)
                    generators[parameter.device] = generator.manual_seed(int(state[0] >> np.uint64(1)))
                options = {"device": parameter.device, "dtype": parameter.dtype}
                z = torch.randn(parameter.shape, generator=generators[parameter.device], **options)
                yield group, parameter, z

    def _shift(self, query: int, share: float) -> None:
        for group, parameter, z in self._directions(query):
            parameter.add_(z, alpha=share * group["eps"])

    @torch.no_grad()
    def measure(self, loss: Callable[[], Tensor]) -> Tensor:
        """Evaluates a loss on both sides in every direction and adds to the slopes; parameters are put back,
        to rounding.

        Args:
            loss: gives a scalar. The losses of the parts of a batch are summed.

        Returns:
            The mean of the values.
        """
        devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        slopes, values = [], []
        before = [buffer.clone() for buffer in self.buffers]

        def evaluated() -> Tensor:
            # Else the two sides would be values of two functions, and their difference no slope.
            for buffer, value in zip(self.buffers, before):
                buffer.copy_(value)
            return loss()

        for query in range(self.queries):
            self._shift(query, 1)
            with torch.random.fork_rng(devices):  # dropout, if any, is the same on both sides
                above = evaluated()
            self._shift(query, -2)
            below = evaluated()
            self._shift(query, 1)
            slopes.append((above - below).float() / (2 * self.param_groups[0]["eps"]))
            values.append((above + below) / 2)
        found = torch.stack(slopes)
        self._slopes = found if self._slopes is None else self._slopes + found
        return torch.stack(values).mean()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves along the directions whose slopes were measured; without any, only decays."""
        slopes = torch.zeros(self.queries) if self._slopes is None else self._slopes
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(slopes)
            slopes = slopes / torch.distributed.get_world_size()
        for query, slope in enumerate(slopes / self.queries):
            for group, parameter, z in self._directions(query):
                if query == 0 and group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * slope.to(z) * z)
        for group in self.param_groups:
            group["steps_done"] += 1
        self._slopes, self.last_slopes = None, slopes
