"""The page about UniPT's attention: tables from the records of both studies, people and synthetic speech."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from whisper_meft.errors import UserError
from whisper_meft.files import write_text

from benchmarks.tables import markdown
from examples.study import study_report
from examples.study.study_report import difference, filled

from .plan import ATTENTIONS, RECIPE
from .report import NOTHING, Found, Records, clips_of, load, rows_of

SYNTHETIC = Path(study_report.__file__).parent / "results"
EXACT = f"unipt:{RECIPE}+max_frames=longest"
LEVELS = {"attention-10db": "10 dB", "attention-0db": "0 dB"}
HEADER = ("attention", "trained with it, %", "− exact, points", "trained exact, run with it, %")
HEADER += ("− exact, points", "answers changed")


def _trained_with(attention: str) -> str:
    return f"unipt:{RECIPE}+attention={attention}+max_frames=longest"


def _share(clips: dict[str, str], row: dict[str, Any]) -> str:
    """The accuracy of a row, mean and deviation over its seeds."""
    reference = clips["test_reference"]
    shares = [
        100 * float(np.mean([a == b for a, b in zip(each["predicted"], reference)])) for each in row["seeds"]
    ]
    text = f"{np.mean(shares):.1f}"
    return text if len(shares) < 2 else f"{text} ± {np.std(shares, ddof=1):.1f}"


def _gap(clips: dict[str, str], one: dict[str, Any], other: dict[str, Any], same_runs: bool = False) -> str:
    found = difference(clips, one, other, same_runs)
    text = f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def _changed(exact: dict[str, Any], read: dict[str, Any]) -> str:
    pairs = [(a["predicted"], b["predicted"]) for a, b in zip(exact["seeds"], read["seeds"])]
    return f"{100 * np.mean([x != y for one, other in pairs for x, y in zip(one, other)]):.1f} %"


def _table(
    clips: dict[str, str],
    exact: dict[str, Any],
    trained: dict[str, dict[str, Any]],
    reads: dict[str, dict[str, Any]],
    seconds: dict[str, str],
) -> str:
    """A line for each attention.

    Args:
        exact: the row that learned with the exact attention. trained: rows that learned with another, by it.
        reads: the answers that the models of ``exact`` give with another. seconds: a run's CPU time.
    """
    costs = [] if not seconds else [seconds.get("exact", "")]
    lines = [["exact", _share(clips, exact), "", "", "", "", *costs]]
    for attention in ATTENTIONS:
        cells = [attention, "", "", "", "", ""]
        if row := trained.get(attention):
            cells[1:3] = _share(clips, row), _gap(clips, row, exact)
        if read := reads.get(attention):
            cells[3:] = _share(clips, read), _gap(clips, read, exact, same_runs=True), _changed(exact, read)
        lines.append([*cells, *([seconds.get(attention, "")] if seconds else [])])
    return markdown([*HEADER, *(["CPU s a run"] if seconds else [])], lines)


def _read(row: Found, attention: str) -> Found | None:
    """The row as it answers when its models are run with another attention; None where that was not asked."""
    cells = [
        {**cell, "predicted": cell["read_as"][attention]}
        for cell in row.cells
        if attention in cell.get("read_as", {})
    ]
    return Found(row.entry, cells) if len(cells) == len(row.cells) else None


def people(records: Records, _: Records) -> str:
    """The accents of people."""
    found = records.get("accents")
    rows = rows_of(found) if found else {}
    if EXACT not in rows:
        return NOTHING
    exact = rows[EXACT]
    every = exact.folds
    known = {form: rows[entry] for form in ATTENTIONS if (entry := _trained_with(form)) in rows}
    trained = {form: row.as_row(every) for form, row in known.items() if row.folds >= every}
    reads = {form: read.as_row(every) for form in ATTENTIONS if (read := _read(exact, form))}
    seconds = {
        form: f"{np.median([cell['cpu_seconds'] for cell in row.cells if cell['cpu_seconds']]):.0f}"
        for form, row in {"exact": exact, **known}.items()
    }
    return _table(clips_of(found, every), exact.as_row(every), trained, reads, seconds)


def synthetic(records: Records, study: Records) -> str:
    """The synthetic accents, a table for each level of noise."""
    tables = []
    for part, title in LEVELS.items():
        if part not in study:
            continue
        rows = {row["method"]: row for row in study[part]["figures"] if row["status"] == "ok"}
        if "unipt" not in rows:
            continue
        exact = rows["unipt"]
        trained = {f: rows[entry] for f in ATTENTIONS if (entry := f"unipt:attention={f}") in rows}
        reads = {
            form: {"seeds": [{"predicted": seed["read_as"][form]} for seed in exact["seeds"]]}
            for form in ATTENTIONS
        }
        table = _table(study[part]["shapes"], exact, trained, reads, {})
        tables.append(f"{title}:\n\n{table}")
    return "\n\n".join(tables) if tables else NOTHING


TABLES: dict[str, Callable[[Records, Records], str]] = {"people": people, "synthetic": synthetic}


def text_of(text: str, records: Records, study: Records) -> str:
    """``text`` with its tables made from the records of people and those of the study on synthetic speech."""
    tables = {name: (lambda found, make=make: make(found, study)) for name, make in TABLES.items()}
    return filled(text, records, tables)


def write(work: Path | None, results: Path, page: Path) -> list[Path]:
    """Rewrites the page's tables.

    Args:
        work: must be None; `report` without ``--attention`` takes over what was run.

    Raises:
        UserError: there are no records, or ``work`` is given.
    """
    if work is not None:
        raise UserError("--work: --attention reads results/ alone; run report --work DIR without it first")
    records = load(results)
    if not records:
        raise UserError(f"there are no records in {results}: run the study first")
    write_text(page, text_of(page.read_text(encoding="utf-8"), records, study_report.load(SYNTHETIC)))
    return [page]
