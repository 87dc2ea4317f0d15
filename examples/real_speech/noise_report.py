"""The page about noise: tables from the record of people's accents heard through it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from whisper_meft.errors import UserError
from whisper_meft.files import write_text

from benchmarks import record
from benchmarks.tables import markdown
from examples.study.study_report import RESAMPLES, filled, right_answers

from .noise_plan import HEARD, KINDS, LEVELS, METHODS, TRAININGS, copies_of, row
from .report import Found, Records, accuracies, clips_of, gap, interval, label, sources, take_over

NAME = "noise"
COMMAND = "python -m examples.real_speech noise --model MODEL --speech DIR --work DIR"
CONDITIONS = ("clean", *HEARD)
CHANGED = [how for how in TRAININGS if how != "none"]
HALF = 0.5


def heard_rows(found: dict[str, Any], method: str, how: str) -> dict[str, Found]:
    """A row's answers to the test clips, by what they were heard through; empty where none was run."""
    entry = row(method, how).entry
    cells = [
        cell
        for cell in found["figures"]
        if (cell["entry"], cell["augment"], cell["status"]) == (entry, how, "ok")
    ]
    if not any(cell["fold"] == 0 for cell in cells):
        return {}
    return {
        name: Found(entry, [{**cell, "predicted": cell["test"][name]} for cell in cells])
        for name in CONDITIONS
    }


def on_folds(rows: dict[str, Found], folds: set[int]) -> dict[str, Found]:
    """The same rows, of these folds only."""
    return {
        name: Found(each.entry, [cell for cell in each.cells if cell["fold"] in folds])
        for name, each in rows.items()
    }


def kept_loss(
    found: dict[str, Any],
    plain: dict[str, Found],
    augmented: dict[str, Found],
    noise: str,
    from_plain: bool = False,
) -> dict[str, float]:
    """How much of the loss through a noise is left with augmentation, on the folds that both were run on.

    Args:
        from_plain: what is left counts from what the model without augmentation gets right of clean clips,
            not from what the augmented one does: what clean clips pay is a loss too.

    Returns:
        ``share`` that is left; ``mean``, ``low`` and ``high`` of what is left beyond half of it, in points,
        over draws of test speakers: below 0 it is more than halved.
    """
    folds = plain["clean"].folds & augmented["clean"].folds
    clips = clips_of(found, folds)

    def right(rows: dict[str, Found], name: str) -> np.ndarray:
        return right_answers(clips, rows[name].as_row(folds))[0].mean(axis=0)

    _, counts = right_answers(clips, plain["clean"].as_row(folds))
    before = right(plain, "clean") - right(plain, noise)
    after = right(plain if from_plain else augmented, "clean") - right(augmented, noise)
    beyond = after - HALF * before
    speakers = np.random.default_rng(0).integers(len(counts), size=(RESAMPLES, len(counts)))
    draws = 100 * beyond[speakers].sum(axis=1) / counts[speakers].sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "share": float(after.sum() / before.sum()) if before.sum() else float("nan"),
        "mean": float(100 * beyond.sum() / counts.sum()),
        "low": float(low),
        "high": float(high),
    }


def verdict(beyond: dict[str, float]) -> str:
    """Whether a loss is halved, as far as its interval tells."""
    if beyond["high"] <= 0:
        return "yes"
    if beyond["low"] > 0:
        return "no"
    return "yes, but not beyond doubt" if beyond["mean"] <= 0 else "no, but not beyond doubt"


def _each(found: dict[str, Any], hows: list[str]) -> list[tuple[str, str, dict[str, Found]]]:
    """(method, how, rows) of what was run."""
    every = [(method, how, heard_rows(found, method, how)) for method in METHODS for how in hows]
    return [each for each in every if each[2]]


def _common(found: dict[str, Any]) -> list[tuple[str, str, dict[str, Found], dict[str, Found]]]:
    """(method, how, plain, augmented) of what was run both ways, on the folds of both."""
    pairs = []
    for method, how, rows in _each(found, CHANGED):
        if plain := heard_rows(found, method, "none"):
            folds = plain["clean"].folds & rows["clean"].folds
            pairs.append((method, how, on_folds(plain, folds), on_folds(rows, folds)))
    return pairs


def _share(found: dict[str, Any], each: Found) -> str:
    return f"{100 * np.mean(accuracies(found, each)):.1f}"


def choice(records: Records) -> str:
    """The validation clips of fold 0, heard through the noises."""
    found, lines = records[NAME], []
    for method, how, rows in _each(found, list(TRAININGS)):
        (cell,) = [cell for cell in rows["clean"].cells if cell["fold"] == 0]
        reference = cell["validation_reference"]
        shares = {
            name: 100 * np.mean([a == b for a, b in zip(answers, reference)])
            for name, answers in cell["validation"].items()
        }
        mean = np.mean([shares[name] for name in HEARD])
        lines.append([_method(method), how, *(f"{shares[name]:.1f}" for name in CONDITIONS), f"{mean:.1f}"])
    return markdown(["method", "augmented", *CONDITIONS, "mean of the noisy"], lines, text=2)


def accuracy(records: Records) -> str:
    """Test accuracy through each noise."""
    found, lines = records[NAME], []
    for method, how, rows in _each(found, list(TRAININGS)):
        lines.append(
            [
                _method(method),
                how,
                *(_share(found, rows[name]) for name in CONDITIONS),
                str(len(rows["clean"].folds)),
            ]
        )
    return markdown(["method", "augmented", *CONDITIONS, "folds"], lines, text=2)


def losses(records: Records) -> str:
    """What noise costs, with and without augmentation."""
    found, lines = records[NAME], []
    for method, how, plain, augmented in _common(found):
        for name in (f"{kind} {min(LEVELS):g} dB" for kind in KINDS):
            own = [interval(gap(found, rows["clean"], rows[name])) for rows in (plain, augmented)]
            of_plain = interval(gap(found, plain["clean"], augmented[name]))
            left = [kept_loss(found, plain, augmented, name, from_plain) for from_plain in (False, True)]
            told = [(f"{100 * each['share']:.0f} %", verdict(each)) for each in left]
            folds = str(len(plain["clean"].folds))
            lines.append([_method(method), how, name, *own, *told[0], of_plain, *told[1], folds])
    header = ["method", "augmented", "noise", "lost without", "lost with", "left", "halved?"]
    header += ["lost with, from clean without", "left", "halved?", "folds"]
    return markdown(header, lines, text=3)


def gains(records: Records) -> str:
    """What augmentation gives, of the same clips."""
    found, lines = records[NAME], []
    for method, how, plain, augmented in _common(found):
        gained = [interval(gap(found, augmented[name], plain[name])) for name in CONDITIONS]
        lines.append([_method(method), how, *gained, str(len(plain["clean"].folds))])
    return markdown(["method", "augmented", *CONDITIONS, "folds"], lines, text=2)


def costs(records: Records) -> str:
    """CPU time of a run, and of the encoder before it."""
    found, lines = records[NAME], []
    clips = found["shapes"]["folds"][0]["train_clips"]
    for method, how, rows in _each(found, list(TRAININGS)):
        cells = rows["clean"].cells
        seconds = np.median([cell["cpu_seconds"] for cell in cells if cell["cpu_seconds"]])
        versions = clips * copies_of(how)
        encoder = versions * np.median([cell["version_cpu_seconds"] for cell in cells])
        lines.append([_method(method), how, f"{seconds:.0f}", str(versions), f"{encoder:.0f}"])
    header = ["method", "augmented", "CPU s a run", "versions of clips", "CPU s of the encoder, once"]
    return markdown(header, lines, text=2)


def _method(method: str) -> str:
    return label(method).replace("pooling=statistics", "statistics")


TABLES: dict[str, Callable[[Records], str]] = {
    "choice": choice,
    "accuracy": accuracy,
    "losses": losses,
    "gains": gains,
    "costs": costs,
    "sources": sources,
}


def text_of(text: str, found: dict[str, Any]) -> str:
    """``text`` with its tables made from the record."""
    return filled(text, {NAME: found}, TABLES)


def write(work: Path | None, results: Path, page: Path) -> list[Path]:
    """Takes over the rows in ``work``, if it is given, and rewrites the page's tables.

    Raises:
        UserError: there are no rows, or no record.
    """
    path, written = results / f"{NAME}.json", []
    if work is not None:
        if not (work / NAME / "rows").is_dir():
            raise UserError(f"--work: there are no rows in {work / NAME}")
        if take_over(work / NAME, "accents", path, COMMAND):
            written.append(path)
    if not path.is_file():
        raise UserError(f"there is no record {path}: run the study first")
    write_text(page, text_of(page.read_text(encoding="utf-8"), record.read(path)))
    return [*written, page]
