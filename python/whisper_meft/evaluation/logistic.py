"""Multinomial logistic regression on log-mel statistics: the simple baseline that the demo compares with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError


def mel_statistics(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over time of each mel bin, over the frames that hold sound.

    Args:
        dataset: a :class:`whisper_meft.data.SpeechDataset` with labels.

    Returns:
        float64 (N, 2 * mel bins) and int64 labels (N,).
    """
    rows, labels = [], []
    for index in range(len(dataset)):
        item = dataset[index]
        frames = item["input_features"][:, item["attention_mask"].bool()].double()  # [mels, frames]
        rows.append(torch.cat([frames.mean(dim=1), frames.std(dim=1, correction=0)]))
        labels.append(item["labels"])
    return torch.stack(rows), torch.tensor(labels)


class LogisticRegression:
    """Softmax regression with an L2 penalty, on standardised features, fitted to convergence with L-BFGS.

    Minimises C * sum of cross-entropies + ||W||^2 / 2; the bias is not penalised (scikit-learn's objective).

    Args:
        num_classes: K.
        strength: C; smaller means more regularisation.
        tolerance: of the greatest entry of the gradient of the mean loss, at which the fit is done.
    """

    def __init__(self, num_classes: int, strength: float = 1.0, tolerance: float = 1e-9):
        if num_classes < 2 or strength <= 0:
            raise UserError(
                f"two classes and a positive strength are needed, got {num_classes} and {strength}"
            )
        self.num_classes, self.strength, self.tolerance = num_classes, strength, tolerance

    def fit(self, features: Tensor, labels: Tensor) -> "LogisticRegression":
        """Fits to ``features`` (N, F) and class indices ``labels`` (N,)."""
        features = features.double()
        self.mean = features.mean(dim=0)
        deviation = features.std(dim=0, correction=0)
        self.scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        inputs = (features - self.mean) / self.scale
        weight = torch.zeros(inputs.shape[1], self.num_classes, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(self.num_classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=5000,
            tolerance_grad=self.tolerance,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            fit = torch.nn.functional.cross_entropy(inputs @ weight + bias, labels, reduction="sum")
            # Divided by N * C, so that the tolerances do not depend on the size of the data.
            loss = (fit + weight.square().sum() / (2 * self.strength)) / len(labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        self.weight, self.bias = weight.detach(), bias.detach()
        return self

    def predict(self, features: Tensor) -> Tensor:
        """Class indices int64 (N,) for ``features`` (N, F)."""
        return (((features.double() - self.mean) / self.scale) @ self.weight + self.bias).argmax(dim=1)


def fit_best(
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    num_classes: int,
    strengths: Sequence[float] = (0.001, 0.01, 0.1, 1.0),
    tolerance: float = 1e-9,
) -> tuple[LogisticRegression, dict[str, Any]]:
    """Fits one model per strength and keeps the one with the best accuracy on ``validation``."""
    accuracies = {}
    models = {}
    for strength in strengths:
        models[strength] = LogisticRegression(num_classes, strength, tolerance).fit(*training)
        hits = models[strength].predict(validation[0]) == validation[1]
        accuracies[strength] = float(hits.double().mean())
    best = max(strengths, key=accuracies.get)
    return models[best], {"strength": best, "validation_accuracy": accuracies[best]}
