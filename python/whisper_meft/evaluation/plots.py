"""The figures of training, scoring and predicting: confusion matrix, reliability, learning curve, classes
over time.

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
from .metrics import Confusion

# Entries of the Okabe-Ito palette, told apart under the common kinds of colour blindness.
BLUE, ORANGE = "#0072B2", "#D55E00"
_PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

# What is drawn of classes for which there is no colour left.
_OTHERS = {"facecolor": "white", "edgecolor": "#999999", "hatch": "////", "linewidth": 0}

# Class names may be in any script; matplotlib's own font lacks Chinese, Japanese, Korean and Arabic.
FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")


# A matrix has numbers in its cells up to so many classes, and is drawn at all up to so many.
_MOST_WITH_NUMBERS, _MOST_IN_MATRIX = 25, 100

_PAIRS = 30  # that are drawn in the place of a matrix

_LABEL_CHARACTERS = 40  # of a class name


@contextmanager
def drawing(width: float, height: float, path: str | os.PathLike) -> Iterator[Any]:
    """Yields an empty figure of this size in inches and writes it to ``path`` afterwards, as PNG or, where
    its name says so, as SVG."""
    from matplotlib import font_manager, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in FONTS if font in installed)]
    # Of an SVG the text stays text, and the same figure gives the same file.
    how = {"font.family": fonts, "svg.fonttype": "none", "svg.hashsalt": "whisper-meft"}
    with rc_context(how), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        form = "svg" if os.fsdecode(path).lower().endswith(".svg") else "png"
        with replacing(path) as temporary:
            figure.savefig(temporary, format=form, metadata={"Date": None} if form == "svg" else None)


def plot_confusion(
    confusion: np.ndarray | Confusion, labels: Sequence[str], path: str | os.PathLike, title: str = ""
) -> None:
    """Draws a confusion matrix as PNG: shade = share of the reference class, with counts as text where there
    are few classes. Of more than 100 classes the accuracies and the pairs that are confused most are drawn.

    Args:
        confusion: int (K, K), row = reference class, column = predicted class.
        labels: K class names; long ones are cut.
        path: PNG file to write (atomically).
        title: line above the figure.

    Raises:
        UserError: the file cannot be written.
    """
    confusion = Confusion.of(confusion)
    cut = _LABEL_CHARACTERS
    labels = [printable(label) for label in labels]
    labels = [label if len(label) <= cut else f"{label[: cut - 1]}…" for label in labels]
    draw = _draw_matrix if len(labels) <= _MOST_IN_MATRIX else _draw_pairs
    draw(confusion, labels, path, title)


def _draw_matrix(confusion: Confusion, labels: Sequence[str], path: str | os.PathLike, title: str) -> None:
    counts = np.asarray(confusion)
    support = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, support, out=np.zeros(counts.shape), where=support > 0)
    size = len(labels)
    longest = max(len(label) for label in labels)
    numbers = size <= _MOST_WITH_NUMBERS
    each = (0.62, 0.55) if numbers else (0.14, 0.14)
    width, height = 2.6 + 0.09 * longest + each[0] * size, 2.0 + 0.07 * longest + each[1] * size
    with drawing(width, height, path) as figure:
        axes = figure.add_subplot()
        # One hue from white to dark: the order survives any colour vision and a grey print.
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, column in np.ndindex(counts.shape) if numbers else ():
            text = str(int(counts[row, column]))
            shade = "white" if share[row, column] > 0.55 else "black"
            font = 10 if size <= 12 else 7
            axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=font)
        steep = longest * size > 36
        # parse_math: a dollar sign in a class name is not the start of a formula
        slant = {"rotation": 45 if numbers else 90, "ha": "right" if numbers else "center"} if steep else {}
        font = None if numbers else 6
        axes.set_xticks(range(size), labels, parse_math=False, fontsize=font, **slant)
        axes.set_yticks(range(size), labels, parse_math=False, fontsize=font)
        axes.set_xlabel("predicted")
        axes.set_ylabel("reference")
        axes.set_title(printable(title), fontsize=11, parse_math=False)
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("share of the reference class")


def _draw_pairs(confusion: Confusion, labels: Sequence[str], path: str | os.PathLike, title: str) -> None:
    support = confusion.sum(axis=1)
    accuracies = confusion.right[support > 0] / support[support > 0]
    pairs = confusion.worst(_PAIRS)
    with drawing(13, 2 + 0.2 * _PAIRS, path) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
        left.hist(accuracies, bins=20, range=(0, 1), color=BLUE)
        left.set_xlabel("accuracy of a class")
        left.set_ylabel("classes")
        if len(pairs):
            names = [f"{labels[reference]} as {labels[predicted]}" for reference, predicted, _ in pairs]
            right.barh(range(len(pairs)), pairs[:, 2], color=ORANGE)
            right.set_yticks(range(len(pairs)), names, parse_math=False, fontsize=7)
            right.set_ylim(len(pairs) - 0.5, -0.5)  # the worst on top
            right.set_xlabel("examples")
        else:
            right.set_axis_off()
        right.set_title(
            "most frequent mistakes" if len(pairs) else "no class was taken for another", fontsize=10
        )
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(printable(title), fontsize=11, parse_math=False)


def plot_reliability(bins: Any, path: str | os.PathLike, title: str = "") -> None:
    """Draws a reliability diagram as PNG: how often the class that is said is right, by its probability,
    above how many clips have such a one.

    Args:
        bins: a :class:`.calibration.Reliability`.
        path: PNG file to write (atomically).
        title: line above the figure.

    Raises:
        UserError: the file cannot be written.
    """
    filled = bins.counts > 0
    middles, width = (bins.edges[1:] + bins.edges[:-1]) / 2, bins.edges[1] - bins.edges[0]
    with drawing(4.6, 5.4, path) as figure:
        rates, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        rates.bar(
            middles[filled], bins.accuracy[filled], width, color=BLUE, edgecolor="white", label="accuracy"
        )
        at = {
            "color": ORANGE,
            "marker": "o",
            "linestyle": "",
            "zorder": 3,
            "label": "at its mean probability",
        }
        rates.plot(bins.confidence[filled], bins.accuracy[filled], **at)
        rates.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--", label="as often as it says")
        rates.set_ylim(0, 1)
        rates.set_ylabel("share that is right")
        rates.legend(frameon=False, loc="upper left")
        counts.bar(middles[filled], bins.counts[filled], width, color=BLUE, edgecolor="white")
        counts.set_ylabel("clips")
        counts.set_xlabel("probability of the class that is said")
        counts.set_xlim(0, 1)
        for axes in (rates, counts):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(printable(title), fontsize=11, parse_math=False)


def plot_learning_curve(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    title: str = "",
    score: str = "eval_accuracy",
    named: str = "evaluation accuracy",
) -> None:
    """Draws training loss and a score of the evaluation data over epochs as PNG.

    Args:
        history: `trainer.state.log_history`: dicts with "epoch" and "loss", or "eval_loss" and the score.
        path: PNG file to write (atomically).
        title: line above the figure.
        score: the score's key in the history. named: what the figure calls it.

    Raises:
        UserError: the file cannot be written.
    """

    def series(key: str) -> tuple[list[float], list[float]]:
        points = {entry["epoch"]: entry[key] for entry in history if key in entry and "epoch" in entry}
        return list(points), list(points.values())

    with drawing(9, 3.8, path) as figure:
        loss_axes, score_axes = figure.subplots(1, 2)
        loss_axes.plot(*series("loss"), color=BLUE, linewidth=1.5, label="training")
        epochs, values = series("eval_loss")
        evaluated = bool(epochs)
        if evaluated:
            loss_axes.plot(epochs, values, color=ORANGE, marker="o", linestyle="--", label="evaluation")
        loss_axes.set_ylabel("cross-entropy loss")
        loss_axes.set_ylim(bottom=0)
        loss_axes.legend(frameon=False)
        epochs, values = series(score)
        if epochs:
            score_axes.plot(epochs, values, color=ORANGE, marker="o", linestyle="--")
        else:
            why = "not measured while training" if evaluated else "no evaluation in this run"
            score_axes.text(0.5, 0.5, why, ha="center", transform=score_axes.transAxes)
        score_axes.set_ylabel(named)
        score_axes.set_ylim(0, max([1, *(value for value in values if value == value)]))
        for axes in (loss_axes, score_axes):
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(printable(title), fontsize=11, parse_math=False)


def plot_timeline(
    timeline: Any, path: str | os.PathLike, title: str = "", reject_below: float | None = None
) -> None:
    """Draws the probabilities of a recording's most probable classes over time, each at the middle of its
    window, above the class that is said of each part; where that has no line it is hatched.

    Args:
        timeline: a :class:`.timeline.Timeline`.
        path: PNG or SVG file to write (atomically).
        title: line above the figure.
        reject_below: a threshold to draw; parts below it have no class.

    Raises:
        UserError: the file cannot be written.
    """
    segments, labels = timeline.segments, [printable(label) for label in timeline.labels]
    values = np.array([segment.probabilities for segment in segments])  # [windows, classes]
    unit, scale = ("minutes", 60.0) if timeline.seconds > 180 else ("seconds", 1.0)
    middles = np.array([(segment.start + segment.end) / 2 for segment in segments]) / scale
    end = timeline.seconds / scale
    # From halfway to the window before to halfway to the next.
    edges = np.concatenate([[0.0], (middles[1:] + middles[:-1]) / 2, [end]])
    heard = np.array([segment.label is not None for segment in segments])
    said = np.where(heard, np.nan_to_num(values).argmax(axis=1), -1)
    if reject_below is not None:
        said[heard & (np.nan_to_num(values).max(axis=1) < reject_below)] = -1
    # Those that are said first, the most frequent of them before the others; then by their highest value.
    often = np.array([(said == index).sum() for index in range(len(labels))])
    shown = np.lexsort((-np.nan_to_num(values).max(axis=0), -often))[: len(_PALETTE)]
    with drawing(10, 4.2, path) as figure:
        lines, strip = figure.subplots(2, 1, sharex=True, height_ratios=(8, 1))
        for color, index in zip(_PALETTE, shown):
            cut = labels[index] if len(labels[index]) <= _LABEL_CHARACTERS else f"{labels[index][:39]}…"
            # Where there is one window it is the whole; a point alone would hardly be seen.
            at, value = (middles, values[:, index]) if len(segments) > 1 else (edges, values[[0, 0], index])
            dots = "." if 1 < len(segments) <= 120 else ""
            (line,) = lines.plot(at, value, color=color, marker=dots, linewidth=1.5)
            line.set_label(f" {cut}")  # one that begins with "_" would be left out
            for number in np.flatnonzero(said == index):
                strip.axvspan(edges[number], edges[number + 1], color=color, linewidth=0)
        others = np.flatnonzero((said >= 0) & ~np.isin(said, shown))
        for number in others:  # of more classes than can be told apart; white is what has none
            strip.axvspan(edges[number], edges[number + 1], **_OTHERS)
        if len(others):
            lines.fill_between([], [], [], **_OTHERS, label=" another class")
        if reject_below is not None:
            lines.axhline(reject_below, color="black", linewidth=1, linestyle="--", label="rejected below")
        lines.set_ylim(-0.02, 1.02)
        lines.set_ylabel("probability")
        legend = lines.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
        strip.set_yticks([])
        strip.set_xlim(0, end)
        strip.set_xlabel(unit)
        strip.set_ylabel("class", rotation=0, ha="right", va="center")
        for axes in (lines, strip):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(printable(title), fontsize=11, parse_math=False)
