"""Whether training does anything: gradient norms by group of parameters, and which parameters never moved."""

import math
import re
import zlib
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..errors import UserError

HEAD = ("projector", "classifier")

# What started at zero has not moved while it is smaller: that does nothing to a result in any number format.
LEAST = 1e-12


def group_of(name: str) -> str:
    """The group that a parameter is reported in: its layer where it is in a numbered one, else its module.

    ``encoder.layers.3.fc1.bias`` -> ``encoder.layers.3``; ``classifier.weight`` -> ``classifier``.
    """
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


class GradientReport(TrainerCallback):
    """A callback for the stock Trainer that watches what the optimizer sees and does.

    Gradient norms are taken in the first step and whenever the Trainer logs, after clipping. Parameters are
    compared with their start by checksum, those that start at zero with ``LEAST``, until each has moved.

    Args:
        model: a MeftModel, before training.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.norms: dict[str, list[float]] = {}
        self.still: dict[str, int] = {}
        self.zeros: set[str] = set()
        self.trained = 0
        self.steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin()

    def begin(self) -> None:
        """Takes the parameters as they are for their start."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.trained = len(named)
        self.still = {name: _checksum(p) for name, p in named}
        self.zeros = {name for name, p in named if not p.detach().any()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step + 1
        if step != 1 and step % max(int(state.logging_steps), 1):
            return
        squares: dict[str, list[torch.Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                squares.setdefault(group_of(name), []).append(parameter.grad.detach().float().square().sum())
        for group, values in squares.items():
            self.norms.setdefault(group, []).append(math.sqrt(float(torch.stack(values).sum())))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.steps += 1
        slopes = getattr(getattr(optimizer, "optimizer", optimizer), "last_slopes", None)
        if slopes is not None:  # MeZO has no gradients, only slopes along a few directions
            self.norms.setdefault("slope", []).append(math.sqrt(float(slopes.square().mean())))
        if self.still and (control.should_log or control.should_training_stop or self.steps <= 2):
            self.look()

    def on_train_end(self, args, state, control, **kwargs):
        self.look()

    def look(self) -> None:
        """Compares the parameters that have not moved yet with their start."""
        named = dict(self.model.named_parameters())

        def is_still(name: str) -> bool:
            now = named[name].detach()
            if name in self.zeros:
                return bool((now.abs() < LEAST).all())
            return _checksum(now) == self.still[name]

        self.still = {name: start for name, start in self.still.items() if is_still(name)}

    def report(self) -> dict[str, Any]:
        """For the results file: of each group the first, mean and last gradient norm, after clipping; and the
        trained tensors that never moved."""
        norms = {
            group: {"first": values[0], "mean": sum(values) / len(values), "last": values[-1]}
            for group, values in self.norms.items()
        }
        return {
            "gradient_norms": norms,
            "trained_tensors": self.trained,
            "never_moved": sorted(set(self.still) - set(self.model.meft_config.without_gradient)),
        }

    def describe(self) -> str:
        """The report in one sentence."""
        report = self.report()
        last = {group: values["last"] for group, values in report["gradient_norms"].items()}
        if not last:
            return "no step was taken"
        low, high = min(last, key=last.get), max(last, key=last.get)
        text = f"gradient norms at the end: {last[low]:.3g} ({low}) to {last[high]:.3g} ({high})"
        still = report["never_moved"]
        if still:
            text += f"; {len(still)} of {self.trained} trained tensors never moved, the first is {still[0]}"
        return text

    def check(self, learning_rate: float | None = None) -> None:
        """Raises UserError if the head or the method's own parameters are all where they were before."""
        if not self.steps:  # nothing was to move
            return
        for part, belongs in (("head", True), ("method", False)):
            named = [name for name, p in self.model.named_parameters() if p.requires_grad]
            names = [name for name in named if (name.split(".")[0] in HEAD) == belongs]
            if names and all(name in self.still for name in names):
                what = f"the {part}'s {len(names)} trained tensors (the first is {names[0]})"
                raise UserError(
                    f"{what} never moved in {self.steps} steps: nothing was learnt there, so this run is not "
                    f"called successful; the learning rate was {learning_rate}"
                )
