"""How fast a training run is: utterances and hours of audio, and what part of the time it waits for data."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


class Throughput(TrainerCallback):
    """Adds up what the training steps of a run do; evaluation, saving and logging lie between them.

    Args:
        seconds: of audio of each training example, None where that is not known. Batches must then carry the
            position of each of theirs as "index".

    Time is the wall clock's. On an accelerator a step ends when its work is handed over, which over many
    steps is the same.
    """

    def __init__(self, seconds: Sequence[float | None] | None = None):
        known = seconds is not None and all(each is not None for each in seconds)
        self._seconds = torch.tensor(seconds, dtype=torch.float64) if known else None
        self._began: float | None = None
        self._whole = dict.fromkeys(("waited", "spent", "utterances", "audio"), 0.0)
        self._since = dict(self._whole)  # the last look

    def fetch(self, next_batches: Callable[[], Any]) -> Any:
        """Calls ``next_batches``, which gives (batches of one step, ...), and times it."""
        self._began = time.perf_counter()
        fetched = next_batches()
        if fetched[0]:
            self._add("waited", time.perf_counter() - self._began)
            self._count(fetched[0])
        return fetched

    def on_step_end(self, args, state, control, **kwargs):
        if self._began is not None:
            self._add("spent", time.perf_counter() - self._began)
            self._began = None

    def take(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float | None]:
        """What was measured since the last call, see :meth:`summary`."""
        values, self._since = self._since, dict.fromkeys(self._since, 0.0)
        return _rates(values, total)

    def summary(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float | None]:
        """What was measured in the whole run.

        Args:
            total: sums a tensor over the processes of the run.

        Returns:
            ``utterances_per_second`` and ``audio_hours_per_hour`` of all processes together, the latter None
            where lengths are not known; ``waiting_for_data``, the share of the time from 0 to 1. Empty before
            the first step.
        """
        return _rates(self._whole, total)

    def _add(self, name: str, value: Any) -> None:
        self._whole[name] = self._whole[name] + value
        self._since[name] = self._since[name] + value

    def _count(self, batches: Sequence[dict[str, Tensor]]) -> None:
        for batch in batches:
            self._add("utterances", len(next(iter(batch.values()))))
            index = batch.get("index")
            if self._seconds is None or index is None:
                self._seconds = None
            else:  # added up where the batch is: reading it would wait for the device
                if self._seconds.device != index.device:
                    self._seconds = self._seconds.to(index.device, torch.float32)
                self._add("audio", self._seconds[index].sum())
        if self._seconds is None:
            self._whole["audio"] = self._since["audio"] = float("nan")


def _rates(values: dict[str, Any], total: Callable[[Tensor], Tensor] | None) -> dict[str, float | None]:
    numbers = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    # Processes run side by side: their work adds up, their time does not.
    processes = torch.ones(1, dtype=torch.float64)
    if total is not None:
        numbers, processes = total(numbers), total(processes)
    waited, spent, utterances, audio = numbers.tolist()
    if not spent:
        return {}
    spent, waited = spent / processes.item(), waited / processes.item()
    return {
        "utterances_per_second": utterances / spent,
        "audio_hours_per_hour": None if audio != audio else audio / spent,
        "waiting_for_data": waited / spent,
    }


def as_text(rates: dict[str, float | None]) -> str:
    """A line for people."""
    audio = rates["audio_hours_per_hour"]
    hours = "" if audio is None else f", {audio:.4g} hours of audio per hour"
    return (
        f"{rates['utterances_per_second']:.4g} utterances/s{hours}, "
        f"{rates['waiting_for_data']:.1%} of the time spent waiting for data"
    )
