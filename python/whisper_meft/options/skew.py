"""What is done in training about classes that come unequally often: the options that commands share."""

import math
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import read_json
from .parser import UsageError

# The gamma of Lin et al. (2017).
GAMMA = 2.0

# Of a class, so that their products with losses stay within float32.
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6

COMPUTED_WEIGHTS = ("balanced", "inverse_sqrt")

# By option, the value that changes nothing.
DEFAULTS: dict[str, Any] = {
    "class_weights": None,
    "loss": "cross_entropy",
    "focal_gamma": None,
    "sampling": "natural",
}


@dataclass
class SkewArguments:
    """What is done about classes that come unequally often."""

    class_weights: str | None = field(
        default=None,
        metadata={
            "help": "how much an example counts in the loss, by its class: balanced (n / (k * n_c), of n "
            "examples, k classes and n_c of the class), inverse_sqrt (in proportion to 1 / sqrt(n_c), 1 on "
            "average over the examples), or a JSON file of a weight for each class (default: all alike)"
        },
    )
    loss: Literal["cross_entropy", "focal"] = field(
        default="cross_entropy",
        metadata={
            "help": "focal: the cross-entropy times (1 - p)^focal_gamma, where p is the probability of the "
            "right class, so that what is known well counts little"
        },
    )
    focal_gamma: float | None = field(
        default=None, metadata={"help": "exponent of the focal loss (default: 2)"}
    )
    sampling: Literal["natural", "balanced"] = field(
        default="natural",
        metadata={
            "help": "which clips an epoch has: natural, each once; balanced, as many, but equally many of "
            "each class"
        },
    )

    def given(self) -> dict[str, Any]:
        """Those of the options that change something, by name."""
        return {name: getattr(self, name) for name in DEFAULTS if getattr(self, name) != DEFAULTS[name]}

    def settled(self) -> dict[str, Any]:
        """As :meth:`given`, with the weights that a file holds.

        Raises:
            UserError: the file cannot be used.
        """
        given = self.given()
        if self.class_weights not in (None, *COMPUTED_WEIGHTS):
            given["class_weights"] = read_class_weights(self.class_weights)
        return given

    def gamma(self) -> float:
        """The exponent of the loss; that of the cross-entropy is 0."""
        if self.loss == "cross_entropy":
            return 0.0
        return GAMMA if self.focal_gamma is None else self.focal_gamma

    def check_skew(self) -> None:
        """Raises UsageError for values that cannot be used, or not together."""
        if self.focal_gamma is not None:
            if self.loss != "focal":
                raise UsageError(
                    f"--focal_gamma {self.focal_gamma:g} is for --loss focal, which is not given"
                )
            if not 0 <= self.focal_gamma < math.inf:
                raise UsageError(f"--focal_gamma must be 0 or more and finite, got {self.focal_gamma}")
        if self.class_weights not in (None, *COMPUTED_WEIGHTS) and not Path(self.class_weights).is_file():
            raise UsageError(
                f"--class_weights must be {', '.join(COMPUTED_WEIGHTS)} or a JSON file of a weight for each "
                f"class, got {self.class_weights!r}, and there is no such file"
            )


def read_class_weights(path: str | Path) -> dict[str, float]:
    """The weights in a file, by class.

    Raises:
        UserError: it cannot be read, names a class twice, or is no JSON object of numbers from 1e-6 to 1e6.
    """
    values = read_json(path, once=True)
    if not isinstance(values, dict) or not values:
        raise UserError(f"class_weights: {path} must hold a JSON object of a weight for each class")
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not LEAST_WEIGHT <= value <= MOST_WEIGHT:
            shown = str(value) if not number or abs(value) < 10 * MOST_WEIGHT else "more"
            raise UserError(
                f"class_weights: the weight of {name} in {path} must be a number from {LEAST_WEIGHT:g} to "
                f"{MOST_WEIGHT:g}, got {shown}"
            )
    # Labels are composed (NFC) wherever they are read.
    found = {unicodedata.normalize("NFC", name): float(value) for name, value in values.items()}
    if len(found) < len(values):
        raise UserError(f"class_weights: {path} names a class twice, in letters composed and not")
    return found
