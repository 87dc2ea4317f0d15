"""The results of `whisper-meft compare` as JSON, as a Markdown table and as figures."""

from pathlib import Path
from typing import Any

from ..errors import markdown
from ..evaluation.plots import BLUE, ORANGE, drawing
from ..files import write_json, write_text
from .measures import MEASURES, Measure

ZERO_SHOT = "zero-shot"  # the row of the backbone alone


def _measure(results: dict[str, Any]) -> Measure:
    return MEASURES[results.get("settings", {}).get("task", "classify")]


def _best_first(rows: dict[str, Any], measure: Measure) -> list[str]:
    """The methods that have a score."""
    good = [method for method in rows if rows[method]["status"] == "ok"]
    return sorted(good, key=lambda m: rows[m][measure.key]["mean"], reverse=measure.higher_is_better)


def table(results: dict[str, Any]) -> str:
    """One Markdown row per method, best first, failed ones last with their reason."""
    measure = _measure(results)
    head = [
        "method",
        measure.column,
        measure.second[1],
        "trained parameters",
        "step time",
        "memory, counted",
        "memory, measured",
        "learning rate",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    rows = results["methods"]
    for method in _best_first(rows, measure):
        row = rows[method]
        scores = [method, _percent(row[measure.key]), _percent(row[measure.second[0]])]
        if "trainable_parameters" not in row:  # nothing is trained
            lines.append("| " + " | ".join(scores) + " |" + " |" * (len(head) - len(scores)))
            continue
        share = row["trainable_parameters"] / row["all_parameters"]
        cells = [
            *scores,
            f"{row['trainable_parameters']:,} ({share:.2%})",
            f"{row['step_time_ratio']:.2f} x",
            f"{row['counted_mib']:.1f} MiB",
            f"{row['measured_mib']:.1f} MiB",
            f"{row['learning_rate']:g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for method, row in rows.items():
        if row["status"] == "failed":
            reason = markdown(row["reason"])
            lines.append(f"| {method} | failed: {reason} |" + " |" * (len(head) - 2))
    return "\n".join(lines)


def _percent(values: dict[str, Any]) -> str:
    spread = "" if values["std"] is None else f" ± {100 * values['std']:.1f}"
    return f"{100 * values['mean']:.1f}{spread} %"


def page(results: dict[str, Any]) -> str:
    """The table with what its figures mean."""
    settings, measure = results["settings"], _measure(results)
    how = "the CUDA allocator" if settings["device"] == "cuda" else "every storage of a real step"
    frozen = "encoder" if "labels" in settings else "Whisper"
    less = "mezo" if "labels" in settings else "mezo and full"
    if "labels" in settings:
        of = f"of {len(settings['labels'])} classes (chance {1 / len(settings['labels']):.0%})"
    else:
        of = f"with transcripts, language {settings['language'] or 'en'}"
    return "\n".join(
        [
            "# Comparison of methods",
            "",
            table(results),
            "",
            f"- Data: {settings['train_examples']} training, {settings['validation_examples']} validation "
            f"and {settings['test_examples']} test clips {of}; backbone "
            f"{markdown(Path(settings['backbone']).name)}.",
            f"- Budget of each run: {settings['num_train_epochs']:g} epochs in batches of "
            f"{settings['batch_size']}. Learning rate out of "
            f"{', '.join(f'{rate:g}' for rate in settings['learning_rates'])} ({less}: a hundredth of each) "
            "and epoch are chosen on the validation clips; the test clips are scored once per seed, "
            "with what was chosen.",
            f"- {measure.title.capitalize()}: mean over {settings['seeds']} seeds, ± standard deviation over "
            "them."
            if settings["seeds"] > 1
            else f"- {measure.title.capitalize()}: of one seed, so without a spread: small differences mean "
            "nothing.",
            *_sampling_error(results),
            f"- Step time: a training step divided by the frozen {frozen}'s forward in inference, in turn on "
            f"the same batch{'' if settings['device'] == 'cuda' else ', in CPU time of the process'}.",
            "- Memory: peak of a training step at that batch, counted on fake tensors, and measured on real "
            f"ones ({how}).",
            "",
            f"![{measure.title}]({measure.key}.png)",
            "",
            "![costs](costs.png)",
            "",
        ]
    )


def _sampling_error(results: dict[str, Any]) -> list[str]:
    """A line on what the number of test clips alone leaves open; none where no method has a score."""
    if _measure(results).key != "accuracy":
        return [
            "- WER and CER: after Whisper's normaliser, edits summed over all test clips; those as written "
            "are in compare.json, with the 95 % interval of each run's WER."
        ]
    means = [row["accuracy"]["mean"] for row in results["methods"].values() if row["status"] == "ok"]
    if not means:
        return []
    clips, best = results["settings"]["test_examples"], max(means)
    error = 100 * (best * (1 - best) / clips) ** 0.5
    return [
        f"- Beyond the seeds, {clips} test clips leave the best accuracy a binomial standard error of "
        f"{error:.1f} points; clips of the same speaker are alike, so that it is rather more."
    ]


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes compare.json, compare.md, accuracy.png (or wer.png) and costs.png, each atomically."""
    write_json(folder / "compare.json", results)
    measure, labels = _measure(results), results["settings"].get("labels")
    rows = {method: row for method, row in results["methods"].items() if row["status"] == "ok"}
    trained = {method: row for method, row in rows.items() if "trainable_parameters" in row}
    if labels is not None:
        level = ("chance", 1 / len(labels))
    else:
        level = (ZERO_SHOT, rows[ZERO_SHOT][measure.key]["mean"]) if ZERO_SHOT in rows else None
    if trained:
        _plot_scores(trained, measure, level, folder / f"{measure.key}.png")
        _plot_costs(trained, measure, folder / "costs.png")
    write_text(folder / "compare.md", page(results))


def _plot_scores(rows: dict[str, Any], measure: Measure, level: tuple[str, float] | None, path: Path) -> None:
    """The score on test data by method: a dot per seed, a bar at the mean; ``level``: what to beat."""
    order = _best_first(rows, measure)[::-1]
    with drawing(7, 1.4 + 0.32 * len(order), path) as figure:
        axes = figure.add_subplot()
        for height, method in enumerate(order):
            score = rows[method][measure.key]
            values = [100 * value for value in score["values"]]
            axes.scatter(values, [height] * len(values), color=BLUE, s=28, zorder=3)
            axes.plot([100 * score["mean"]] * 2, [height - 0.3, height + 0.3], color=ORANGE)
        if level is not None:
            axes.axvline(100 * level[1], color="grey", linestyle=":", label=level[0])
            axes.legend(frameon=False)
        axes.set_yticks(range(len(order)), order)
        axes.set_xlabel(f"test {measure.title} in percent; dots: seeds, line: their mean")
        _tidy(axes)


def _plot_costs(rows: dict[str, Any], measure: Measure, path: Path) -> None:
    """Counted memory and step time, each against the score on test data."""
    with drawing(10, 4.4, path) as figure:
        for axes, key, label in zip(
            figure.subplots(1, 2),
            ("counted_mib", "step_time_ratio"),
            ("peak memory of a training step in MiB", "training step ÷ backbone's inference forward"),
        ):
            points = {m: (row[key], 100 * row[measure.key]["mean"]) for m, row in rows.items()}
            axes.scatter(*zip(*points.values()), color=BLUE, s=28, zorder=3)
            axes.margins(0.12)
            axes.set_xlim(left=0)
            axes.set_xlabel(label)
            axes.set_ylabel(f"test {measure.title} in percent")
            _tidy(axes)
            _name_points(axes, points)


# Where a name may stand beside its point, in points: right, left, above, below, and further off.
_PLACES = [(6, -3), (-6, -3), (6, 5), (-6, 5), (6, -11), (-6, -11), (6, 14), (-6, 14), (6, -20), (-6, -20)]


def _name_points(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Writes each point's name at the first place where it covers neither a point nor another name."""
    scale = 72 / axes.figure.dpi
    at = {name: axes.transData.transform(point) * scale for name, point in points.items()}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at.values()]
    for name, (x, y) in at.items():
        width = 4.7 * len(name)
        boxes = []
        for right, up in _PLACES:
            left = x + right if right > 0 else x + right - width
            boxes.append((left, y + up - 1, left + width, y + up + 8))
        free = [i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)]
        chosen = free[0] if free else 0
        taken.append(boxes[chosen])
        side = "left" if _PLACES[chosen][0] > 0 else "right"
        axes.annotate(name, points[name], _PLACES[chosen], textcoords="offset points", fontsize=8, ha=side)


def _overlap(one: tuple, other: tuple) -> bool:
    """Whether two boxes (left, bottom, right, top) share any area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
