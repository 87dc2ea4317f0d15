"""What a classifier is trained to minimise where its classes come unequally often."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..model.loss import checked_labels


def computed_weights(counts: Sequence[int], kind: str) -> list[float]:
    """How much an example counts in the loss, by its class; 1 on average over the examples.

    Of n examples of k classes, n_c of class c:

        balanced      w_c = n / (k n_c), as scikit-learn's class_weight="balanced"
        inverse_sqrt  w_c = n / (sqrt(n_c) sum_j sqrt(n_j)), halfway to it: a class counts as sqrt(n_c)

    Args:
        counts: n_c. kind: one of these names.

    Raises:
        UserError: a class without examples, or another name.
    """
    if not counts or min(counts) < 1:
        raise UserError(f"every class needs an example for its weight, got counts {list(counts)}")
    power = {"balanced": 1.0, "inverse_sqrt": 0.5}.get(kind)
    if power is None:
        raise UserError(f"weights must be balanced or inverse_sqrt, got {kind!r}")
    total = sum(count ** (1 - power) for count in counts)
    return [sum(counts) / (total * count**power) for count in counts]


class ClassLoss:
    """The loss of a batch, for the Trainer's ``compute_loss_func``:

        sum_i w_{y_i} (1 - p_i)^gamma (-log p_i) / n

    where p_i is the probability that the model gives the class y_i of example i, and n their number (with
    gradient accumulation, or over several processes, that of the whole step). It is not divided by the sum of
    the batch's weights, as torch's mean is: an example's gradient then does not depend on what else its batch
    holds. With gamma above 0 it is the focal loss (Lin et al. 2017, arXiv 1708.02002, equation 5, whose alpha
    is w), with gamma 0 the cross-entropy, also with label smoothing e, as torch has it:

        sum_i ((1 - e) w_{y_i} (-log p_{i,y_i}) + e / K sum_c w_c (-log p_{i,c})) / n

    Args:
        weights: w, of each of the K classes; None: all 1.
        gamma: how little what is known well counts; 2 in the paper.
        label_smoothing: e, from 0 to below 1; 0 with a gamma above 0.

    Raises:
        UserError: values that cannot be used, or not together.
    """

    def __init__(
        self, weights: Sequence[float] | None = None, gamma: float = 0.0, label_smoothing: float = 0.0
    ):
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        if self.weights is not None and not bool(
            (self.weights > 0).all() and self.weights.isfinite().all() and self.weights.ndim == 1
        ):
            raise UserError(f"weights must be numbers above 0 and finite, one for each class, got {weights}")
        if not 0 <= gamma < float("inf"):
            raise UserError(f"gamma must be 0 or more and finite, got {gamma}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must lie between 0 and 1, got {label_smoothing}")
        if gamma and label_smoothing:
            raise UserError(
                "label_smoothing must be 0 with the focal loss, which is of one right class, got "
                f"{label_smoothing}"
            )
        self.gamma, self.label_smoothing = gamma, label_smoothing

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss, a scalar in at least float32.

        Args:
            outputs: of the model, with ``logits`` (B, K). labels: (B,) class numbers; -100 is skipped.
            num_items_in_batch: n; None: the labels that count.

        Raises:
            UserError: wrong labels, or weights of another number of classes.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[-1]
        labels = checked_labels(logits, labels)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = self._sum(logits, labels)
        counted = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (counted.to(total.device) if isinstance(counted, Tensor) else counted)

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None
        if self.weights is not None:
            if len(self.weights) != logits.shape[1]:
                raise UserError(f"there are {len(self.weights)} weights for {logits.shape[1]} classes")
            weights = self.weights.to(logits.device, logits.dtype)
        if not self.gamma:
            smoothing = self.label_smoothing
            return F.cross_entropy(logits, labels, weight=weights, reduction="sum", label_smoothing=smoothing)
        minus_log = F.cross_entropy(logits, labels, reduction="none")  # (B,), 0 where skipped
        # 1 - p without cancellation; away from 0, where a gamma below 1 has no finite derivative.
        missing = -torch.expm1(-minus_log)
        losses = missing.clamp(min=torch.finfo(logits.dtype).tiny) ** self.gamma * minus_log
        if weights is not None:
            losses = losses * weights[labels.clamp(min=0)]
        return losses.sum()
