"""The loss of a classifier, whole or of a part of a batch."""

import torch
from torch import nn

from ..errors import UserError


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """The cross-entropy, a float32 scalar.

    Args:
        logits: (B, classes). labels: (B,) class numbers; -100 is skipped.
        num_items_in_batch: what the summed loss is divided by; ``None``: the labels that count.

    Raises:
        UserError: a wrong shape, dtype or class number.
    """
    labels = checked_labels(logits, labels)
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(logits.float(), labels)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / num_items_in_batch


def checked_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``labels`` as int64 beside ``logits``; arguments and errors as of :func:`classification_loss`."""
    if not isinstance(labels, torch.Tensor):
        raise UserError(f"labels must be a tensor of class numbers, got {type(labels).__name__}")
    if labels.ndim != 1 or labels.shape[0] != logits.shape[0] or labels.is_floating_point():
        raise UserError(
            f"labels must be {logits.shape[0]} class numbers, got shape {tuple(labels.shape)} of "
            f"{labels.dtype}"
        )
    # Only where looking at the values costs no wait for a device (fake tensors have no values).
    if type(labels) is torch.Tensor and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = [x for x in labels.tolist() if x != -100 and not 0 <= x < logits.shape[1]]
        if wrong:
            raise UserError(
                f"labels must lie in 0..{logits.shape[1] - 1}, the model has {logits.shape[1]} labels, "
                f"got {wrong[0]}"
            )
    return labels.to(logits.device, torch.long)


def refuse_gradients() -> None:
    """Raises UserError: of a method that trains by forward passes alone."""
    raise UserError(
        "mezo trains without gradients: use whisper_meft.MeftTrainer, or MeZO.measure of "
        "whisper_meft.methods.mezo in a loop of your own"
    )


def refuse_backward(logits: torch.Tensor, method: str) -> None:
    """Makes the backward pass of a loss that is computed from ``logits`` raise UserError: it would lack the
    method's penalty. Looking at the scores alone is not refused."""

    def refuse(gradient: torch.Tensor) -> None:
        raise UserError(
            f"{method} adds a penalty to the loss, which a loss computed outside the model lacks (label "
            "smoothing, compute_loss_func, a loop of your own): train with whisper_meft.MeftTrainer, or give "
            "labels to the model, or add model.penalty() to your loss and set model.penalty_elsewhere = True"
        )

    logits.register_hook(refuse)


def with_penalty(
    loss: torch.Tensor,
    penalty: torch.Tensor | None,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """The loss and a method's penalty, which counts once for the whole batch, however many parts it comes in.

    Args:
        loss: of this part. penalty: a scalar or ``None``. labels: (B,) of this part.
        num_items_in_batch: as in :func:`classification_loss`.
    """
    if penalty is None:
        return loss
    share = 1 if num_items_in_batch is None else (labels != -100).sum().to(loss) / num_items_in_batch
    return loss + share * penalty
