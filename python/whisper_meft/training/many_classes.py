"""What keeps a run with thousands of classes within memory and its output within a screen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import printable

_MOST_COUNTS, _FEWEST = 30, 10


def predicted_classes(logits: Any, labels: Any = None) -> Tensor:
    """For the Trainer's ``preprocess_logits_for_metrics``: class indices int64 (B,), -1 of rows that are not
    finite. The logits (B, K) of a whole evaluation are copied with every batch, and may not fit into memory.
    """
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    finite = torch.isfinite(logits).all(dim=-1)
    return logits.argmax(dim=-1).masked_fill(~finite, -1)


def counts_text(counts: Mapping[str, int], labels: Sequence[str]) -> str:
    """Examples per class on one line: of all, or of more than 30 classes the fewest."""
    if len(labels) <= _MOST_COUNTS:
        return ", ".join(f"{printable(label)}: {counts[label]}" for label in labels)
    rising = sorted(labels, key=lambda label: counts[label])
    fewest = ", ".join(f"{printable(label)}: {counts[label]}" for label in rising[:_FEWEST])
    return f"{counts[rising[0]]} to {counts[rising[-1]]} of each, the fewest of {fewest} ..."


def weights_text(weights: Sequence[float], labels: Sequence[str]) -> str:
    """How much an example counts, by its class, on one line; of more than 30 classes from where to where."""
    if len(labels) <= _MOST_COUNTS:
        return ", ".join(f"{printable(label)}: {weight:.3g}" for label, weight in zip(labels, weights))
    return f"{min(weights):.3g} to {max(weights):.3g}"
