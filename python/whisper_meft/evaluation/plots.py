"""The two figures a training run leaves behind: confusion matrix and learning curve.

Drawn with matplotlib's object interface on the Agg canvas, so no display and no global state is involved.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import printable
from ..files import replacing

# Two entries of the Okabe-Ito palette, told apart under the common kinds of colour blindness.
BLUE, ORANGE = "#0072B2", "#D55E00"

# Class names may be in any script; matplotlib's own font lacks Chinese, Japanese, Korean and Arabic.
FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")


@contextmanager
def drawing(width: float, height: float, path: str | os.PathLike) -> Iterator[Any]:
    """Yields an empty figure of this size in inches and writes it to ``path`` afterwards."""
    from matplotlib import font_manager, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in FONTS if font in installed)]
    with rc_context({"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def plot_confusion(
    confusion: np.ndarray, labels: Sequence[str], path: str | os.PathLike, title: str = ""
) -> None:
    """Draws a confusion matrix as PNG: counts as text, shade = share of the reference class.

    Args:
        confusion: int (K, K), row = reference class, column = predicted class.
        labels: K class names.
        path: PNG file to write (atomically).
        title: line above the figure.

    Raises:
        UserError: the file cannot be written.
    """
    confusion = np.asarray(confusion)
    support = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, support, out=np.zeros(confusion.shape), where=support > 0)
    labels = [printable(label) for label in labels]
    size = len(labels)
    longest = max(len(label) for label in labels)
    width, height = 2.6 + 0.09 * longest + 0.62 * size, 2.0 + 0.07 * longest + 0.55 * size
    with drawing(width, height, path) as figure:
        axes = figure.add_subplot()
        # One hue from white to dark: the order survives any colour vision and a grey print.
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        font = 10 if size <= 12 else 7
        for row in range(size):
            for column in range(size):
                text = str(int(confusion[row, column]))
                shade = "white" if share[row, column] > 0.55 else "black"
                axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=font)
        steep = longest * size > 36
        # parse_math: a dollar sign in a class name is not the start of a formula
        slant = {"rotation": 45, "ha": "right"} if steep else {}
        axes.set_xticks(range(size), labels, parse_math=False, **slant)
        axes.set_yticks(range(size), labels, parse_math=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("reference")
        axes.set_title(printable(title), fontsize=11, parse_math=False)
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("share of the reference class")


def plot_learning_curve(
    history: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str = ""
) -> None:
    """Draws training loss and evaluation accuracy over epochs as PNG.

    Args:
        history: `trainer.state.log_history`: dicts with "epoch" and "loss" or "eval_loss", "eval_accuracy".
        path: PNG file to write (atomically).
        title: line above the figure.

    Raises:
        UserError: the file cannot be written.
    """

    def series(key: str) -> tuple[list[float], list[float]]:
        points = {entry["epoch"]: entry[key] for entry in history if key in entry and "epoch" in entry}
        return list(points), list(points.values())

    with drawing(9, 3.8, path) as figure:
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        loss_axes.plot(*series("loss"), color=BLUE, linewidth=1.5, label="training")
        epochs, values = series("eval_loss")
        if epochs:
            loss_axes.plot(epochs, values, color=ORANGE, marker="o", linestyle="--", label="evaluation")
        loss_axes.set_ylabel("cross-entropy loss")
        loss_axes.set_ylim(bottom=0)
        loss_axes.legend(frameon=False)
        epochs, values = series("eval_accuracy")
        if epochs:
            accuracy_axes.plot(epochs, values, color=ORANGE, marker="o", linestyle="--")
        else:
            accuracy_axes.text(
                0.5, 0.5, "no evaluation in this run", ha="center", transform=accuracy_axes.transAxes
            )
        accuracy_axes.set_ylabel("evaluation accuracy")
        accuracy_axes.set_ylim(0, 1)
        for axes in (loss_axes, accuracy_axes):
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, fontsize=11)
