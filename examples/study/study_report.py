"""The study's tables and figures, made from its records, so that no figure in them is typed by hand."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from whisper_meft.errors import UserError
from whisper_meft.evaluation.plots import BLUE, ORANGE, drawing
from whisper_meft.files import write_text

from benchmarks import record
from benchmarks.tables import markdown

Records = dict[str, dict[str, Any]]

GREEN, PURPLE, GREY = "#009E73", "#CC79A7", "#777777"
LEVELS = {"accents-30db": "30 dB", "accents-10db": "10 dB", "accents-0db": "0 dB"}
TASKS = {**LEVELS, "languages": "languages, 10 dB"}
SEARCHED, VARIED = "accents-10db", "accents-0db"
SIDE_NETWORKS = ("lst", "unipt", "sherl")
FACTORS = (2, 4, 8, 16)
PAIRS = (
    ("lst", "full"),
    ("unipt", "full"),
    ("sherl", "full"),
    ("lora", "full"),
    ("lst", "lora"),
    ("lst", "bitfit"),
    ("unipt", "lst"),
    ("sherl", "lst"),
    ("lst", "head"),
    ("full", "head"),
    ("weighted_sum", "head"),
)
RESAMPLES = 2000
AT_CHANCE = 0.3  # below this: 2.5 standard errors above the 25 % of four classes
_MARKED = re.compile(
    r"^<!-- table: (?P<name>\S+) -->\n(?P<old>.*?)^<!-- end of table -->$", re.MULTILINE | re.DOTALL
)


def load(results: Path) -> Records:
    """The study's records by part."""
    return {path.stem: record.read(path) for path in sorted(results.glob("*.json"))}


# --- statistics ---------------------------------------------------------------------------------------------


def right_answers(shapes: dict[str, Any], row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Right answers (seeds, speakers) of a row and the number of test clips of each speaker (speakers,)."""
    reference = np.array(list(shapes["test_reference"]))
    answers = np.array([list(seed["predicted"]) for seed in row["seeds"]])
    _, speaker = np.unique(shapes["test_speakers"].split(), return_inverse=True)
    member = np.eye(speaker.max() + 1)[speaker]  # (clips, speakers)
    return (answers == reference) @ member, member.sum(axis=0)


def difference(
    shapes: dict[str, Any], one: dict[str, Any], other: dict[str, Any], same_runs: bool = False
) -> dict[str, float]:
    """How much more accurate one row is than another on the same test clips, in points.

    Args:
        same_runs: the rows are of the same trained models, seed by seed.

    Returns:
        ``mean``; ``low`` and ``high``: the middle 95 % over draws, with replacement, of the test speakers
        (the same ones for both rows) and of each row's seeds (the same for both with ``same_runs``).
    """
    (first, clips), (second, _) = right_answers(shapes, one), right_answers(shapes, other)
    rng = np.random.default_rng(0)
    speakers = rng.integers(len(clips), size=(RESAMPLES, len(clips)))
    sums, seeds = [], None
    for right in (first, second):
        if seeds is None or not same_runs:
            seeds = rng.integers(len(right), size=(RESAMPLES, len(right)))
        means = right[seeds].mean(axis=1)  # (draws, speakers)
        sums.append(np.take_along_axis(means, speakers, axis=1).sum(axis=1))
    draws = 100 * (sums[0] - sums[1]) / clips[speakers].sum(axis=1)
    mean = 100 * (first.mean(axis=0).sum() - second.mean(axis=0).sum()) / clips.sum()
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _rows(found: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The finished rows of a training part by entry."""
    figures = found["figures"] if found else []
    return {row["method"]: row for row in figures if row["status"] == "ok"}


def _interval(gap: dict[str, float]) -> str:
    return f"{gap['mean']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})"


def _accuracy(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']['mean']:.1f} ± {100 * row['accuracy']['std']:.1f}"


# --- tables -------------------------------------------------------------------------------------------------


def accuracy(records: Records) -> str:
    """Test accuracy of every method at every level, with the learning rate of the 10 dB accents."""
    parts = [part for part in TASKS if part in records]
    found = {part: _rows(records[part]) for part in parts}
    searched = found.get(SEARCHED, {})
    order = sorted(searched, key=lambda m: -searched[m]["accuracy"]["mean"])
    lines = []
    for method in order:
        row = searched[method]
        cells = [method, f"{row['trainable_parameters']:,}", f"{row['learning_rate']:g}"]
        for part in parts:
            if method not in found[part]:
                cells.append("")
                continue
            text = _accuracy(found[part][method])
            if method != "full" and "full" in found[part]:
                gap = difference(records[part]["shapes"], found[part][method], found[part]["full"])
                text += " ▼" if gap["high"] < 0 else " ▲" if gap["low"] > 0 else ""
            cells.append(text)
        lines.append(cells)
    for part in parts:
        for row in records[part]["figures"]:
            if row["status"] != "ok":
                cells = [row["method"], row["status"].replace("|", "\\|")]
                lines.append(cells + [""] * (1 + len(parts)))
    header = ["method", "trained", "rate, 10 dB", *(TASKS[part] for part in parts)]
    return markdown(header, lines)


def sizes(records: Records) -> str:
    """Clips, chance and the sampling error of each part."""
    lines = []
    for part, name in TASKS.items():
        if part in records:
            shapes, rows = records[part]["shapes"], _rows(records[part])
            middle = float(np.median([row["accuracy"]["mean"] for row in rows.values()]))
            error = 100 * (middle * (1 - middle) / shapes["test_clips"]) ** 0.5
            voices = len(set(shapes["test_speakers"].split()))
            clips = [str(shapes[f"{split}_clips"]) for split in ("train", "validation", "test")]
            chance = f"{100 / len(shapes['classes']):.0f} %"
            lines.append([name, *clips, str(voices), chance, f"{error:.1f}"])
    header = ["", "training clips", "validation", "test", "test voices", "chance"]
    return markdown([*header, "binomial standard error, points"], lines)


def pairs(records: Records) -> str:
    """Differences between methods on the same test clips, in points, with their intervals."""
    parts = [part for part in TASKS if part in records]
    lines = []
    for one, other in PAIRS:
        cells = [f"{one} − {other}"]
        for part in parts:
            rows = _rows(records[part])
            if one in rows and other in rows:
                gap = difference(records[part]["shapes"], rows[one], rows[other])
                text = _interval(gap)
                cells.append(f"**{text}**" if gap["low"] > 0 or gap["high"] < 0 else text)
            else:
                cells.append("")
        lines.append(cells)
    return markdown(["points", *(TASKS[part] for part in parts)], lines)


def _factor_rows(records: Records) -> Iterator[tuple[str, dict[int, dict[str, Any]]]]:
    """Each side network with its rows by reduction factor."""
    usual, varied = (_rows(records.get(part)) for part in (VARIED, "reduction"))
    for method in SIDE_NETWORKS:
        names = {
            f: (usual, method) if f == 8 else (varied, f"{method}:reduction_factor={f}") for f in FACTORS
        }
        yield method, {f: rows[name] for f, (rows, name) in names.items() if name in rows}


def reduction(records: Records) -> str:
    """Test accuracy by reduction factor."""
    if "reduction" not in records:
        return "(no results yet)"
    shapes, lines = records["reduction"]["shapes"], []
    for method, rows in _factor_rows(records):
        cells = [method]
        for factor in FACTORS:
            row = rows.get(factor)
            cells.append(f"{_accuracy(row)} ({row['trainable_parameters']:,})" if row else "")
        gap = difference(shapes, rows[2], rows[16]) if {2, 16} <= rows.keys() else None
        cells.append(_interval(gap) if gap else "")
        lines.append(cells)
    return markdown(["", *map(str, FACTORS), "2 − 16, points"], lines)


def layers(records: Records) -> str:
    """LST's choices of layers, best first."""
    if "layers" not in records:
        return "(no results yet)"
    shapes = records["layers"]["shapes"]
    all_layers = _rows(records.get(VARIED)).get("lst")
    rows = {"all": all_layers} if all_layers else {}
    rows |= {name.partition("=")[2]: row for name, row in _rows(records["layers"]).items()}
    lines = []
    for choice in sorted(rows, key=lambda c: -rows[c]["accuracy"]["mean"]):
        row = rows[choice]
        cells = [choice, str(_last_layer(choice)), f"{row['trainable_parameters']:,}", _accuracy(row)]
        if choice == "all" or not all_layers:
            cells.append("")
        else:
            gap = difference(shapes, row, all_layers)
            cells.append(_interval(gap))
        lines.append(cells)
    return markdown(["layers", "layers run, of 4", "trained", "accuracy", "− all, points"], lines)


def longer(records: Records) -> str:
    """Test accuracy with more epochs, beside that of the usual number."""
    if "longer" not in records:
        return "(no results yet)"
    shapes = records["longer"]["shapes"]
    usual, more = (_rows(records.get(part)) for part in (VARIED, "longer"))
    lines = []
    for method in more:
        if method in usual:
            gaps = [_interval(difference(shapes, more[method], usual[method]))]
            for other in ("full", "lst"):
                known = other in more and other != method
                gaps.append(_interval(difference(shapes, more[method], more[other])) if known else "")
            lines.append([method, _accuracy(usual[method]), _accuracy(more[method]), *gaps])
    epochs = [f"{records[part]['shapes']['num_train_epochs']:g} epochs" for part in (VARIED, "longer")]
    return markdown(["", *epochs, "gain, points", f"− full, {epochs[1]}", f"− lst, {epochs[1]}"], lines)


def _at(row: dict[str, Any]) -> list[str]:
    """Method, reduction factor and rate of an entry ``method:options@rate``."""
    options = row["options"]
    name = options["method"] + (f", {options['start']}" if "start" in options else "")
    return [name, str(options.get("reduction_factor", "")), f"{row['learning_rate']:g}"]


def _stayed(row: dict[str, Any]) -> tuple[list[dict], list[dict]]:
    """The seeds of a row that stayed at chance, and the others."""
    both = ([], [])
    for seed in row["seeds"]:
        both[seed["accuracy"] >= AT_CHANCE].append(seed)
    return both


def starts(records: Records) -> str:
    """How many runs stay at chance, by the start."""
    lines = []
    for row in _rows(records.get("starts")).values():
        stayed, others = _stayed(row)
        of_others = [100 * seed["accuracy"] for seed in others]
        text = f"{np.mean(of_others):.1f} ± {np.std(of_others, ddof=1):.1f}" if len(others) > 1 else ""
        lines.append([*_at(row), f"{len(stayed)} of {len(row['seeds'])}", text, _accuracy(row)])
    header = ["", "reduction factor", "rate", "runs at chance", "accuracy of the others", "of all"]
    return markdown(header, lines) if lines else "(no results yet)"


def collapse(records: Records) -> str:
    """What the runs of SHERL look like inside, those that stay at chance and the others."""
    lines = []
    for row in _rows(records.get("starts")).values():
        for seeds, outcome in zip(_stayed(row), ("at chance", "learns")):
            for looks in zip(*(seed["watched"] for seed in seeds)):
                mean = {key: float(np.mean([abs(look[key]) for look in looks])) for key in looks[0]}
                start = row["options"].get("start", "published")
                what = [start, f"{outcome} ({len(seeds)})", f"{mean['step']:g}", f"{mean['loss']:.2f}"]
                shares = [f"{100 * mean[key]:.0f} %" for key in ("guided", "constant")]
                sizes = [f"{mean[key]:.2g}" for key in ("gate", "input", "spread", "side_gradient")]
                lines.append([*what, *shares, *sizes])
    header = ["start", "runs", "step", "loss", "frames guided", "input constant", "gate, absolute"]
    return markdown([*header, "input", "spread", "gradient"], lines) if lines else "(no results yet)"


def queries(records: Records) -> str:
    """MeZO by the number of its directions, beside the head alone at the same level."""
    if "queries" not in records:
        return "(no results yet)"
    lines, epochs = [], records["queries"]["shapes"]["num_train_epochs"]
    head = _rows(records.get(SEARCHED)).get("head")
    for row in [*_rows(records["queries"]).values(), *([head] if head else [])]:
        mezo = row["options"]["method"] == "mezo"
        asked = row["options"].get("mezo_queries", 1)
        losses = [seed["validation_loss"] for seed in row["seeds"] if "validation_loss" in seed]
        cells = [row["options"]["method"], str(asked) if mezo else "", f"{row['learning_rate']:g}"]
        cells += [f"{epochs * (2 * asked if mezo else 1):g}", _accuracy(row)]
        lines.append([*cells, f"{np.mean(losses):.3f}" if losses else ""])
    header = ["", "directions", "rate", "forward passes of each clip", "accuracy", "validation loss"]
    return markdown(header, lines)


def augmentation(records: Records) -> str:
    """What augmenting training clips does at 0 dB and at 10 dB, beside what was trained there without."""
    if "augmentation" not in records:
        return "(no results yet)"
    shapes, rows = records["augmentation"]["shapes"], _rows(records["augmentation"])
    reference, usual, lines = np.array(list(shapes["test_reference"])), _rows(records.get(SEARCHED)), []
    known = {"0 dB, plain": VARIED, "0 dB, plain, 16 epochs": "longer"}
    for method in dict.fromkeys(name.partition(", ")[0] for name in rows):
        own = {name.partition(", ")[2]: row for name, row in rows.items() if name.startswith(f"{method}, ")}
        own |= {name: _rows(records[part])[method] for name, part in known.items() if part in records}
        whole = 100 * usual[method]["accuracy"]["mean"]

        def about(name: str) -> tuple[str, str, int]:
            level, how, *epochs = name.split(", ")
            return level, how, int((epochs or ["6"])[0].split()[0])

        # The level trained on, then the epochs, then without before with.
        for name in sorted(own, key=lambda n: (-int(n.split()[0]), about(n)[2], "plain" not in n)):
            row, louder = own[name], ""
            level, how, epochs = about(name)
            if "predicted_10db" in row["seeds"][0]:
                answers = [np.array(list(seed["predicted_10db"])) for seed in row["seeds"]]
                shares = [100 * float((each == reference).mean()) for each in answers]
                louder = f"{np.mean(shares):.1f} ± {np.std(shares, ddof=1):.1f}"
            lost = whole - 100 * row["accuracy"]["mean"]
            text = [method, level, how, str(epochs), str(len(row["seeds"]))]
            lines.append([*text, _accuracy(row), louder, f"{lost:.1f}"])
    header = ["method", "trained at", "augmented", "epochs", "seeds", "heard at 0 dB", "heard at 10 dB"]
    return markdown([*header, "lost, points"], lines)


def _last_layer(choice: str) -> int:
    numbers = [int(number) for number in re.findall(r"\d+", choice)]
    return max(numbers) if choice.startswith("[") else 4


def _length_cells(records: Records) -> dict[str, dict[int, dict[str, Any]]]:
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for row in records["lengths"]["figures"] if "lengths" in records else []:
        if row["status"] == "ok":
            by_method.setdefault(row["method"], {})[row["frames"]] = row
    return by_method


def _lengths_table(records: Records, cell: Callable[[dict, dict], str]) -> str:
    """A row per method, a column per length. ``cell`` makes text of a row and full fine-tuning's."""
    by_method = _length_cells(records)
    if "full" not in by_method:
        return "(no results yet)"
    frames = records["lengths"]["shapes"]["frames"]
    lines = []
    for method, rows in by_method.items():
        full = by_method["full"]
        lines.append([method, *(cell(rows[f], full[f]) if f in rows and f in full else "" for f in frames)])
    return markdown(["", *(f"{f} frames ({f / 50:g} s)" for f in frames)], lines)


def lengths_memory(records: Records) -> str:
    """Memory of a training step counted for a GPU, by length."""

    def cell(row: dict, full: dict) -> str:
        share = row["gpu_peak_gib"] / full["gpu_peak_gib"]
        return f"{row['gpu_peak_gib']:.2f}" + ("" if row is full else f" (−{100 * (1 - share):.0f} %)")

    return _lengths_table(records, cell)


def lengths_cpu_memory(records: Records) -> str:
    """Memory of a training step measured on a CPU, by length."""

    def cell(row: dict, full: dict) -> str:
        share = row["cpu_peak_gib"] / full["cpu_peak_gib"]
        return f"{row['cpu_peak_gib']:.2f}" + ("" if row is full else f" (−{100 * (1 - share):.0f} %)")

    return _lengths_table(records, cell)


def lengths_time(records: Records) -> str:
    """Time of a training step by length: over the encoder's inference, and how much faster than full."""

    def cell(row: dict, full: dict) -> str:
        faster = "" if row is full else f" ({full['ratio'] / row['ratio']:.2f} ×)"
        return f"{row['ratio']:.2f}{faster}"

    return _lengths_table(records, cell)


def sources(records: Records) -> str:
    """Where each part comes from."""
    lines = []
    for part, found in records.items():
        where = found["environment"]
        commit = (where["commit"] or "unknown")[:9] + (" with changes" if where["dirty"] else "")
        versions = f"torch {where['torch']}, transformers {where['transformers']}"
        lines.append([part, commit, where["date"][:10], f"{where['device']}, {versions}"])
    return markdown(["part", "commit", "date", "machine"], lines)


TABLES: dict[str, Callable[[Records], str]] = {
    "accuracy": accuracy,
    "sizes": sizes,
    "pairs": pairs,
    "reduction": reduction,
    "layers": layers,
    "longer": longer,
    "starts": starts,
    "collapse": collapse,
    "queries": queries,
    "augmentation": augmentation,
    "lengths_memory": lengths_memory,
    "lengths_cpu_memory": lengths_cpu_memory,
    "lengths_time": lengths_time,
    "sources": sources,
}


def filled(text: str, records: Records, tables: dict[str, Callable[[Records], str]] | None = None) -> str:
    """``text`` with the content of every marked table written from the records.

    Args:
        tables: what makes each table; default ``TABLES``.

    Raises:
        UserError: an unknown table, or a marker without its end.
    """

    tables = TABLES if tables is None else tables

    def table(match: re.Match) -> str:
        if match["name"] not in tables:
            raise UserError(f"table must be one of {', '.join(tables)}, got {match['name']!r}")
        return f"<!-- table: {match['name']} -->\n{tables[match['name']](records)}\n<!-- end of table -->"

    result = _MARKED.sub(table, text)
    if result.count("<!-- table:") != result.count("<!-- end of table -->"):
        raise UserError("every <!-- table: NAME --> must be followed by <!-- end of table -->")
    return result


# --- figures ------------------------------------------------------------------------------------------------


def _bare(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_accuracy(records: Records, path: Path) -> bool:
    """Accuracy of every method at every level: a dot per seed, a line at the mean. False without records."""
    parts = [part for part in TASKS if part in records]
    searched = _rows(records.get(SEARCHED))
    if not searched:
        return False
    order = sorted(searched, key=lambda m: searched[m]["accuracy"]["mean"])
    with drawing(10.5, 4.0, path) as figure:
        for index, (axes, part) in enumerate(
            zip(figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], parts)
        ):
            rows = _rows(records[part])
            for height, method in enumerate(order):
                if method not in rows:
                    continue
                values = [100 * value for value in rows[method]["accuracy"]["values"]]
                colour = ORANGE if method in SIDE_NETWORKS else BLUE
                axes.scatter(values, [height] * len(values), color=colour, s=16, zorder=3)
                axes.plot([np.mean(values)] * 2, [height - 0.35, height + 0.35], color=colour, linewidth=1.5)
            axes.axvline(100 / len(records[part]["shapes"]["classes"]), color=GREY, linestyle=":")
            axes.set_title(TASKS[part], fontsize=10)
            if index == 0:
                axes.set_yticks(range(len(order)), order)
            _bare(axes)
        figure.supxlabel("test accuracy in percent; dots: seeds; dotted: chance", fontsize=9)
    return True


def draw_reduction(records: Records, path: Path) -> bool:
    """Accuracy over the reduction factor. False without records."""
    if "reduction" not in records:
        return False
    with drawing(5, 3.2, path) as figure:
        axes = figure.add_subplot()
        colours = dict(zip(SIDE_NETWORKS, (BLUE, ORANGE, GREEN)))
        for shift, (method, rows) in enumerate(_factor_rows(records)):
            means = [100 * row["accuracy"]["mean"] for row in rows.values()]
            errors = [100 * row["accuracy"]["std"] for row in rows.values()]
            places = [np.log2(factor) + 0.06 * (shift - 1) for factor in rows]
            axes.errorbar(places, means, errors, marker="o", capsize=3, color=colours[method], label=method)
        axes.set_xticks([np.log2(f) for f in FACTORS], FACTORS)
        axes.set_xlabel("reduction factor")
        axes.set_ylabel("test accuracy in percent")
        axes.legend(frameon=False)
        _bare(axes)
    return True


def draw_lengths(records: Records, path: Path) -> bool:
    """Memory and time over the length of the clips. False without records."""
    by_method = _length_cells(records)
    if not by_method:
        return False
    shapes = records["lengths"]["shapes"]
    counted, measured = shapes["counted"], shapes["measured"]
    colours = dict(zip(by_method, (GREY, PURPLE, BLUE, ORANGE, GREEN)))
    with drawing(9, 3.4, path) as figure:
        memory, times = figure.subplots(1, 2)
        for method, rows in by_method.items():
            frames = list(rows)
            style = {"marker": "o", "markersize": 4, "color": colours[method], "label": method}
            memory.plot(frames, [rows[f]["gpu_peak_gib"] for f in frames], **style)
            times.plot(frames, [rows[f]["ratio"] for f in frames], **style)
        memory.set_ylabel("GiB, counted for a GPU")
        memory.set_title(f"whisper-{counted['model']}, batch {counted['batch']}", fontsize=10)
        times.set_ylabel("step ÷ encoder's inference")
        times.set_title(f"whisper-{measured['model']}, batch {measured['batch']}, CPU", fontsize=10)
        for axes in (memory, times):
            axes.set_xlabel("encoder frames of 20 ms")
            axes.set_ylim(bottom=0)
            _bare(axes)
        memory.legend(frameon=False, fontsize=8)
    return True


FIGURES: dict[str, Callable[[Records, Path], bool]] = {
    "accuracy": draw_accuracy,
    "reduction": draw_reduction,
    "lengths": draw_lengths,
}


def write(results: Path, folder: Path, figures: Sequence[str] = tuple(FIGURES)) -> list[Path]:
    """Rewrites the tables of ``folder/README.md`` and draws the figures; returns what was written."""
    records = load(results)
    if not records:
        raise UserError(f"there are no records in {results}: run the study first")
    page = folder / "README.md"
    write_text(page, filled(page.read_text(encoding="utf-8"), records))
    drawn = [folder / f"{name}.png" for name in figures if FIGURES[name](records, folder / f"{name}.png")]
    return [page, *drawn]
