"""``python -m benchmarks.plot``: figures and the README's tables from the records of benchmark runs."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whisper_meft.errors import UserError, one_line
from whisper_meft.files import replacing, write_text

from . import record, tables, train_step
from .published import PAPER_GIB

# Okabe and Ito's palette, told apart under the common kinds of colour blindness.
BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#999999", "#CC79A7"
README = record.ROOT / "README.md"
FIGURES = record.ROOT / "benchmarks" / "figures"


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Axes of a figure of this size in inches, written to ``path`` afterwards."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("figures need matplotlib (pip install matplotlib), or give --no-figures") from error
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _where(found: dict) -> str:
    return f"{found['environment']['device']}, {found['environment']['date'][:10]}"


def roofline(records: list[dict], path: Path) -> bool:
    """Every op's rate over its arithmetic intensity, under the measured ceilings; False without records."""
    runs = tables.newest(records, "run")
    if not runs:
        return False
    found = runs[0]
    top = found["figures"]["ceilings"]
    bandwidth, rate = top["copy_bandwidth"], top["matmul_rate"]
    rows = [r for r in found["figures"]["rows"] if r["direction"] in ("forward", "backward") and r["flops"]]
    rows = [r for r in rows if r["bytes"] and (r["peer"] == "eager" or r["peer"].startswith("ops:"))]
    with _figure(path, 8, 5) as axes:
        markers = {"forward": "o", "backward": "s"}
        colours = {}
        for row in rows:
            colour = colours.setdefault(row["peer"], (GREY, BLUE, ORANGE, GREEN, PURPLE)[len(colours) % 5])
            x, y = row["flops"] / row["bytes"], row["flops"] / row["median"]
            axes.plot(x, y, markers[row["direction"]], color=colour, markersize=5)
            if row["peer"] != "eager" and row["direction"] == "forward":
                axes.annotate(row["op"], (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        intensities = [row["flops"] / row["bytes"] for row in rows] or [1.0]
        left, right = (f([*intensities, rate / bandwidth]) for f in (min, max))
        left, right = left / 3, right * 3
        axes.plot([left, rate / bandwidth, right], [left * bandwidth, rate, rate], color="black", linewidth=1)
        for peer, colour in colours.items():
            axes.plot([], [], "o", color=colour, label=peer)
        for direction, marker in markers.items():
            axes.plot([], [], marker, color="black", fillstyle="none", label=direction)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="FLOP per second")
        axes.set_title(f"Ops under copy bandwidth and matrix-product rate\n{_where(found)}", fontsize=10)
        axes.legend(fontsize=8)
    return True


def speedup(records: list[dict], path: Path) -> bool:
    """Each method's step over the encoder's inference; False without records."""
    found = next(iter(tables.newest(records, "train_step")), None)
    rows = [row for row in found["figures"] if row["status"] == "ok" and "ratio" in row] if found else []
    if not rows:
        return False
    with _figure(path, 8, 0.9 + 0.35 * len(rows)) as axes:
        names = [row["method"] for row in rows]
        bars = axes.barh(names, [row["ratio"] for row in rows], color=BLUE)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel("time of a training step / time of the frozen encoder's inference forward")
        axes.set_title(f"{_setting(found)}\n{_where(found)}", fontsize=10)
    return True


def memory(records: list[dict], path: Path) -> bool:
    """Peak memory of each method's step, measured, counted and the paper's; False without records.

    Drawn from a training-step table measured on a GPU, else from a count, else from a table of a CPU.
    """
    steps, counts = (tables.newest(records, name) for name in ("train_step", "memory"))
    if counts and not (steps and steps[0]["environment"]["device_type"] == "cuda"):
        found, kinds = counts[0], ["counted", "paper"]
        rows = [row for row in found["figures"] if row["batch"] == found["shapes"]["batch"]]
        sizes = {row["method"]: (row["peak_gib"], row["paper_gib"]) for row in rows}
    elif steps:
        found, kinds = steps[0], ["measured", "counted", "paper"]
        shapes = found["shapes"]
        papers = (shapes["model"], shapes["batch"], shapes["frames"]) == ("small", 128, 1500)
        sizes = {}
        for row in found["figures"]:
            if row["status"] == "ok":
                paper = PAPER_GIB.get(row["method"].removeprefix("published_")) if papers else None
                own = [n and n / train_step.GIBIBYTE for n in (row["peak_bytes"], row["counted_bytes"])]
                sizes[row["method"]] = (*own, paper)
    else:
        return False
    with _figure(path, 8, 1 + 0.25 * len(kinds) * len(sizes)) as axes:
        for index, (kind, colour) in enumerate(zip(kinds, (BLUE, GREY, ORANGE))):
            places = [i + 0.8 * ((index + 0.5) / len(kinds) - 0.5) for i in range(len(sizes))]
            column = [values[index] or 0 for values in sizes.values()]
            bars = axes.barh(places, column, 0.8 / len(kinds), label=kind, color=colour)
            axes.bar_label(bars, [f"{s:.2f}" if s else "" for s in column], fontsize=7, padding=2)
        axes.set_yticks(range(len(sizes)), list(sizes))
        axes.invert_yaxis()
        axes.set_xlabel("peak memory of a training step, GiB")
        where = _where(found) if found["name"] == "train_step" else "counted for CUDA without a GPU"
        axes.set_title(f"{_setting(found)}\n{where}", fontsize=10)
        axes.legend(fontsize=8, loc="lower right")
    return True


def _setting(found: dict) -> str:
    shapes = found["shapes"]
    dtype = f", {shapes['dtype']}" if found["name"] == "train_step" else ""  # a count has several
    return f"Whisper-{shapes['model']}, batch {shapes['batch']}, {shapes['frames']} frames{dtype}"


DRAWINGS = {"roofline": roofline, "speedup": speedup, "memory": memory}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the records")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the figures")
    parser.add_argument("--readme", type=Path, default=README, help="file whose marked tables are rewritten")
    parser.add_argument("--no-figures", action="store_true", help="the tables alone")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a table is out of date"
    )
    options = parser.parse_args(argv)
    try:
        if not options.results.is_dir():
            raise UserError(f"results must be a folder of records, there is none at {options.results}")
        records = record.load_all(options.results)
        try:
            text = options.readme.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {options.readme}: {one_line(error)}") from error
        new = tables.filled(text, records)
        if options.check:
            if new != text:
                raise UserError(f"{options.readme} is out of date: run python -m benchmarks.plot")
            return 0
        if not options.no_figures:
            for name, draw in DRAWINGS.items():
                path = options.out / f"{name}.png"
                print(f"wrote {path}" if draw(records, path) else f"no records for {name}")
        if new != text:
            write_text(options.readme, new)
        print(f"{options.readme}: {'rewritten' if new != text else 'up to date'}, {len(records)} records")
    except UserError as error:
        print(f"benchmarks.plot: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
