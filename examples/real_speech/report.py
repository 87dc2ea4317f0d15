"""The page's tables and figures, and the committed records that they are made from."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from whisper_meft import MeftConfig
from whisper_meft.comparison.arguments import parse_method
from whisper_meft.errors import UserError
from whisper_meft.files import read_json, write_json, write_text

from benchmarks import record
from benchmarks.svg import Picture
from benchmarks.tables import markdown
from examples.study.study_report import difference, filled

from .folds import TASKS
from .plan import PADDED, TRIMMED, Row, plan

if TYPE_CHECKING:
    from .cells import Study

Records = dict[str, dict[str, Any]]
COMMAND = "python -m examples.real_speech run --model MODEL --speech DIR --work DIR"
REFERENCES = ("full", "lora")


# --- taking over what was run -------------------------------------------------------------------------------


def collect(work: Path, results: Path) -> list[Path]:
    """Brings ``results/<task>.json`` up to date with the rows in ``work``; returns what was written.

    Raises:
        UserError: there are no rows, or a record is of other folds.
    """
    if not (work / "rows").is_dir():
        raise UserError(f"--work: there are no rows in {work}")
    written = []
    for folder in sorted((work / "rows").glob("*")):
        path = results / f"{folder.name}.json"
        if take_over(work, folder.name, path, COMMAND):
            written.append(path)
    return written


def take_over(work: Path, task: str, path: Path, command: str) -> bool:
    """Brings a record up to date with the rows of a task in ``work``; whether anything was new.

    Args:
        path: of the record. command: that makes such rows.

    Raises:
        UserError: the record is of other folds.
    """
    shapes = _shapes(work / "folds" / task)
    cells: dict[tuple, dict] = {}
    before = None
    if path.is_file():
        before = record.read(path)
        if before["shapes"] != shapes:
            raise UserError(f"{path} is of other folds than {work}: move it away first")
        cells = {_key(cell): cell for cell in before["figures"]}
    for file in sorted((work / "rows" / task).glob("*/*.json")):
        cells |= {_key(cell): cell for cell in _cells_of(read_json(file))}
    figures = [cells[key] for key in sorted(cells)]
    if before is not None and figures == before["figures"]:
        return False
    record.write(path.stem, figures, command=command, shapes=shapes, device="cpu", path=path)
    return True


def take_up(study: "Study", results: Path) -> int:
    """The inverse of :func:`collect`: the rows of records as files of the study, so that it goes on from what
    was run elsewhere. What the study has stays; logistic regressions, which take seconds, are left out.

    Args:
        results: folder of the records.

    Returns:
        How many rows were taken up.

    Raises:
        UserError: there are no such records, or they are of other folds or of a model of another size.
    """
    rows = {(cell.row.task, cell.row.entry): cell.row for cell in plan()}
    paths = {task: results / f"{task}.json" for task, _ in rows if (results / f"{task}.json").is_file()}
    if not paths:
        raise UserError(f"--records: there are no records of the study in {results}")
    taken = []
    for task, path in paths.items():
        study.task(task)  # which writes the manifests that its shapes are read from
        shapes = _shapes(study.work / "folds" / task)
        found = record.read(path)
        if found["shapes"] != shapes:
            raise UserError(f"--records: {path} is of other folds than the recordings in {study.speech}")
        sizes: dict[Row, int] = {}
        for cell in found["figures"]:
            row = rows.get((task, cell["entry"]))
            if row is None or cell["rate"] is None:
                continue
            if cell["status"] == "ok":
                if row not in sizes:
                    sizes[row] = study.trainable_parameters(row, len(shapes["classes"]))
                if cell["trainable_parameters"] != sizes[row]:
                    raise UserError(
                        f"--records: {path} is of a model of another size than {study.model}: "
                        f"{cell['entry']} trains {cell['trainable_parameters']:,d} parameters there and "
                        f"{sizes[row]:,d} here"
                    )
            file = study.path(row, cell["fold"], cell["rate"], cell["seed"])
            if not file.is_file():
                taken.append((file, {"task": task, **cell}))
    for file, cell in taken:
        write_json(file, cell)
    return len(taken)


def _key(cell: dict[str, Any]) -> tuple:
    how = cell["entry"], cell.get("augment", "")
    return *how, cell["fold"], cell.get("rate") or 0.0, cell.get("seed", 0)


def _cells_of(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a file of ``rows/`` holds, a dictionary for each row."""
    shared = {key: value for key, value in found.items() if key not in ("cells", "task")}
    if "cells" not in found:
        yield shared
    for cell in found.get("cells", ()):
        yield {**shared, **cell, "rate": None, "seed": 0}


def _shapes(folds: Path) -> dict[str, Any]:
    """What all rows of a task share: its classes, and each fold's test clips."""
    found: dict[str, Any] = {"folds": []}
    for folder in sorted(folds.glob("*"), key=lambda path: int(path.name)):
        clips = {split: _manifest(folder / f"{split}.csv") for split in ("train", "dev", "test")}
        labels = sorted({label for label, _ in clips["train"]})
        found["classes"] = labels
        found["folds"].append(
            {
                "train_clips": len(clips["train"]),
                "validation_clips": len(clips["dev"]),
                "test_reference": "".join(str(labels.index(label)) for label, _ in clips["test"]),
                "test_speakers": " ".join(speaker for _, speaker in clips["test"]),
            }
        )
    return found


def _manifest(path: Path) -> list[tuple[str, str]]:
    rows = path.read_text(encoding="utf-8").splitlines()[1:]
    return [tuple(row.rsplit(",", 2)[1:]) for row in rows]


# --- rows ---------------------------------------------------------------------------------------------------


class Found:
    """A row as far as it was run.

    Attributes:
        entry: the method and its options. rate: the one chosen so far, None where there is none to choose.
        tried: the rates that were tried on fold 0. answers: the digits of each seed's and fold's test clips.
        cells: what was recorded of those.
    """

    def __init__(self, entry: str, cells: Sequence[dict[str, Any]]):
        self.entry = entry
        good = [cell for cell in cells if cell["status"] == "ok"]
        first = [cell for cell in good if cell["fold"] == 0 and cell["seed"] == 0]
        self.tried = sorted(cell["rate"] for cell in first if cell["rate"] is not None)
        self.rate = None
        if self.tried:
            best = max(first, key=lambda cell: (cell["validation_accuracy"], -cell["validation_loss"]))
            self.rate = best["rate"]
        self.cells = [cell for cell in good if cell["rate"] == self.rate]
        self.answers = {(cell["seed"], cell["fold"]): cell["predicted"] for cell in self.cells}

    @property
    def folds(self) -> set[int]:
        """The folds that seed 0 was run on."""
        return {fold for seed, fold in self.answers if seed == 0}

    def seeds(self, folds: set[int]) -> list[int]:
        """The seeds that were run on all of ``folds``."""
        return [s for s in sorted({s for s, _ in self.answers}) if all((s, f) in self.answers for f in folds)]

    def as_row(self, folds: set[int], seeds: Sequence[int] | None = None) -> dict[str, Any]:
        """What ``study_report.difference`` takes, of all seeds that were run or of these."""
        order = sorted(folds)
        return {
            "seeds": [
                {"predicted": "".join(self.answers[seed, fold] for fold in order)}
                for seed in (self.seeds(folds) if seeds is None else seeds)
            ]
        }


def rows_of(found: dict[str, Any]) -> dict[str, Found]:
    """The rows of a record that have at least one fold's answers, by entry."""
    by_entry: dict[str, list] = {}
    for cell in found["figures"]:
        by_entry.setdefault(cell["entry"], []).append(cell)
    rows = {entry: Found(entry, cells) for entry, cells in by_entry.items()}
    return {entry: row for entry, row in rows.items() if row.folds}


def clips_of(found: dict[str, Any], folds: set[int]) -> dict[str, str]:
    """Reference and speakers of the test clips of some folds, as ``difference`` takes them."""
    parts = [found["shapes"]["folds"][fold] for fold in sorted(folds)]
    return {
        "test_reference": "".join(part["test_reference"] for part in parts),
        "test_speakers": " ".join(part["test_speakers"] for part in parts),
    }


def gap(found: dict[str, Any], one: Found, other: Found, same_seeds: bool = False) -> dict[str, float] | None:
    """How much more accurate one row is than another, in points, on the folds that both were tested on:
    ``mean``, and ``low`` and ``high`` over draws of speakers and seeds. None without such a fold.

    ``same_seeds`` leaves out the seeds that only one of them has: what one option changes is then not
    mixed with what another start changes.
    """
    folds = one.folds & other.folds
    if not folds:
        return None
    seeds = [seed for seed in one.seeds(folds) if seed in other.seeds(folds)] if same_seeds else None
    compared = (row.as_row(folds, seeds) for row in (one, other))
    return {**difference(clips_of(found, folds), *compared), "folds": len(folds)}


def accuracies(found: dict[str, Any], row: Found) -> list[float]:
    """The share of right answers of each seed, over the folds that were run."""
    reference = clips_of(found, row.folds)["test_reference"]
    return [
        float(np.mean([a == b for a, b in zip(seed["predicted"], reference)]))
        for seed in row.as_row(row.folds)["seeds"]
    ]


def label(entry: str) -> str:
    """An entry as the tables show it: without what all rows of the table share."""
    method, _, options = entry.partition(":")
    kept = [each for each in options.split("+") if each and each != "max_frames=longest"]
    kept = ["padded" if each == "max_frames=fidelity" else each.replace("backbone_", "") for each in kept]
    return method if not kept else f"{method}, {', '.join(kept)}"


def _accuracy(found: dict[str, Any], row: Found) -> str:
    shares = [100 * share for share in accuracies(found, row)]
    text = f"{np.mean(shares):.1f}"
    if len(shares) > 1:
        text += f" ± {np.std(shares, ddof=1):.1f}"
    return text


def interval(difference: dict[str, float] | None, all_folds: int | None = None) -> str:
    """A difference with its interval, and on how many folds where that are not ``all_folds``."""
    if difference is None:
        return ""
    text = f"{difference['mean']:+.1f} ({difference['low']:+.1f} to {difference['high']:+.1f})"
    text = f"**{text}**" if difference["low"] > 0 or difference["high"] < 0 else text
    if all_folds is not None and difference["folds"] < all_folds:
        text += f", {difference['folds']} fold{'s' * (difference['folds'] != 1)}"
    return text


def _done(found: dict[str, Any], row: Found, planned: dict[str, Row]) -> str:
    """How far a row has come: folds, seeds and rates tried."""
    folds, rates = f"{len(row.folds)}/{len(found['shapes']['folds'])}", ""
    if row.entry in planned:
        rates = f", {len(row.tried)}/{len(planned[row.entry].rates)} rates"
    seeds = len(row.seeds(row.folds))
    return f"{folds} folds, {seeds} seed{'s' * (seeds != 1)}{rates}"


def _planned(task: str) -> dict[str, Row]:
    return {cell.row.entry: cell.row for cell in plan() if cell.row.task == task}


def _costs(row: Found) -> tuple[str, str, str]:
    """CPU seconds of a run, hours of audio in an hour of CPU time, GiB of peak memory, medians over runs."""
    timed = [cell for cell in row.cells if cell.get("cpu_seconds")]
    if not timed:
        return "", "", ""
    seconds = float(np.median([cell["cpu_seconds"] for cell in timed]))
    audio = [cell["audio_seconds"] / cell["cpu_seconds"] for cell in timed if "audio_seconds" in cell]
    peaks = [cell["peak_bytes"] / 2**30 for cell in timed if cell.get("peak_bytes")]
    return (
        f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}",
        f"{np.median(audio):.0f}" if audio else "",
        f"{np.median(peaks):.2f}" if peaks else "",
    )


# --- tables -------------------------------------------------------------------------------------------------

NOTHING = "(no results yet)"
_MAIN = "accents"


def _ordered(found: dict[str, Any], rows: dict[str, Found]) -> list[Found]:
    return sorted(rows.values(), key=lambda row: -float(np.mean(accuracies(found, row))))


def _is_main(entry: str) -> bool:
    """Whether a row is a method with no other option than the paper's."""
    options = parse_method(entry)[1]
    return parse_method(entry)[0] in MeftConfig.methods() and options == {"max_frames": "longest"}


def _is_recipe(entry: str) -> bool:
    """Whether a row is a method with other pooling or rates, trimmed and in full precision."""
    method, options = parse_method(entry)
    changed = options.keys() & {"pooling", "head_learning_rate"}
    other = options.keys() - changed - {"max_frames"}
    return method in MeftConfig.methods() and bool(changed) and not other and "longest" in entry


def _reference(rows: dict[str, Found], method: str) -> Found | None:
    return rows.get(f"{method}:max_frames=longest")


def _rate(row: Found) -> str:
    """The chosen rate; an arrow where it is the last one of several that were tried, and the next might do
    better."""
    if not row.rate:
        return ""
    end = {row.tried[0]: " ↓", row.tried[-1]: " ↑"} if len(row.tried) > 1 else {}
    return f"{row.rate:g}{end.get(row.rate, '')}"


def _comparison(found: dict[str, Any], rows: Sequence[Found], everything: dict[str, Found]) -> str:
    planned, lines = _planned(found["name"]), []
    for row in rows:
        against = [_reference(everything, method) for method in REFERENCES]
        gaps = [gap(found, row, other) if other and other.entry != row.entry else None for other in against]
        trained = row.cells[0].get("trainable_parameters")
        lines.append(
            [
                label(row.entry),
                f"{trained:,}" if trained else "",
                _rate(row),
                _accuracy(found, row),
                *(interval(each, len(found["shapes"]["folds"])) for each in gaps),
                *_costs(row),
                _done(found, row, planned),
            ]
        )
    header = ["method", "trained", "rate", "accuracy, %", "− full, points", "− LoRA, points"]
    return markdown([*header, "CPU s a run", "h of audio per CPU h", "peak GiB", "run so far"], lines)


def methods(records: Records) -> str:
    """The methods as published on the accents."""
    if _MAIN not in records:
        return NOTHING
    found = records[_MAIN]
    rows = rows_of(found)
    return _comparison(found, _ordered(found, {e: r for e, r in rows.items() if _is_main(e)}), rows)


def recipes(records: Records) -> str:
    """What departs from the published recipe, on the accents."""
    if _MAIN not in records:
        return NOTHING
    found = records[_MAIN]
    rows = rows_of(found)
    chosen = {entry: row for entry, row in rows.items() if _is_recipe(entry)}
    return _comparison(found, _ordered(found, chosen), rows) if chosen else NOTHING


def varied(records: Records) -> str:
    """Rows with one option changed, beside those without it, on the folds and seeds of both."""
    if _MAIN not in records:
        return NOTHING
    found = records[_MAIN]
    rows, lines = rows_of(found), []
    for entry, row in sorted(rows.items()):
        method, options = parse_method(entry)
        if _is_main(entry) or _is_recipe(entry) or method == "logistic" or "attention" in options:
            continue  # another attention has a page of its own
        kept = [f"pooling={options['pooling']}"] if "pooling" in options else []
        base = rows.get(f"{method}:{'+'.join([*kept, f'max_frames={TRIMMED}'])}")
        gaps = gap(found, row, base, same_seeds=True) if base else None
        cells = [
            label(entry),
            f"{row.cells[0]['trainable_parameters']:,}",
            _accuracy(found, row),
            interval(gaps, len(found["shapes"]["folds"])),
        ]
        lines.append([*cells, *_costs(row), _done(found, row, _planned(_MAIN))])
    header = ["row", "trained", "accuracy, %", "− without it, points", "CPU s a run", "h of audio per CPU h"]
    return markdown([*header, "peak GiB", "run so far"], lines) if lines else NOTHING


def layers(records: Records) -> str:
    """Logistic regression by layer."""
    if _MAIN not in records:
        return NOTHING
    found = records[_MAIN]
    rows, lines = rows_of(found), []
    numbers = sorted({parse_method(e)[1]["layer"] for e in rows if e.startswith("logistic")})
    for layer in numbers:
        each = [rows.get(f"logistic:layer={layer}+pooling={pooling}") for pooling in ("mean", "statistics")]
        gaps = [
            gap(found, row, other) for row in each if row for other in [_reference(rows, "full")] if other
        ]
        cells = [_accuracy(found, row) if row else "" for row in each]
        between = interval(gap(found, each[1], each[0])) if all(each) else ""
        lines.append(
            [str(layer), *cells, between, interval(gaps[-1], len(found["shapes"]["folds"])) if gaps else ""]
        )
    header = ["layer", "mean", "mean and deviation", "gain, points", "second − full, points"]
    return markdown(header, lines) if lines else NOTHING


# Claims of the paper and goals of the recipe: text, one entry and another, and how many points the first may
# be below the second.
LEVEL = 0.67  # the paper's gap between its best side network and full fine-tuning
_RECIPE = "head:pooling=statistics"
_PADDED = f"max_frames={PADDED}"
_WITH_IT = "pooling=statistics+head_learning_rate=0.003"  # what a method that trains inside gets of it
CLAIMS = (
    ("LST is level with full fine-tuning (within 0.67 points)", "lst", "full", LEVEL),
    ("UniPT is level with full fine-tuning", "unipt", "full", LEVEL),
    ("SHERL is level with full fine-tuning", "sherl", "full", LEVEL),
    ("LST is level with LoRA", "lst", "lora", LEVEL),
    ("LST is ahead of BitFit", "lst", "bitfit", 0.0),
    ("the last layer is ahead of a weighted sum of all", "head", "weighted_sum", 0.0),
    ("LST is ahead of the head alone", "lst", "head", 0.0),
    ("UniPT is ahead of the head alone", "unipt", "head", 0.0),
    ("SHERL is ahead of the head alone", "sherl", "head", 0.0),
    ("padding to 30 seconds, as published, costs the head nothing", f"head:{_PADDED}", "head", LEVEL),
    ("padding costs LST nothing", f"lst:{_PADDED}", "lst", LEVEL),
    ("the recommended recipe is ahead of full fine-tuning", _RECIPE, "full", 0.0),
    ("the recommended recipe is ahead of LoRA", _RECIPE, "lora", 0.0),
    (
        "the recommended recipe is ahead of full fine-tuning with its pooling",
        _RECIPE,
        f"full:{_WITH_IT}",
        0.0,
    ),
    ("the recommended recipe is ahead of LoRA with its pooling", _RECIPE, f"lora:{_WITH_IT}", 0.0),
    ("the recommended recipe is ahead of the head as published", _RECIPE, "head", 0.0),
    ("LST gains from the recipe's pooling", "lst:pooling=statistics", "lst", 0.0),
    ("UniPT with it is at least at the published head's level", "unipt:pooling=statistics", "head", 0.0),
    ("SHERL with it is at least at the published head's level", "sherl:pooling=statistics", "head", 0.0),
    ("LST with it is ahead of the recommended recipe", "lst:pooling=statistics", _RECIPE, 0.0),
    ("SHERL with it is ahead of the recommended recipe", "sherl:pooling=statistics", _RECIPE, 0.0),
)


def _trimmed(entry: str) -> str:
    return entry if _PADDED in entry else f"{entry}{'+' if ':' in entry else ':'}max_frames={TRIMMED}"


def verdict(between: dict[str, float] | None, below: float) -> str:
    """What a difference says about the claim that the first is at most ``below`` points under the second, or
    above it where ``below`` is 0."""
    if between is None:
        return "not run yet"
    if between["low"] > -below:
        return "holds"
    return "does not hold" if between["high"] < -below else "cannot be told"


def claims(records: Records) -> str:
    """What the accents say about each claim."""
    if _MAIN not in records:
        return NOTHING
    found = records[_MAIN]
    rows, planned, lines = rows_of(found), _planned(_MAIN), []
    for text, one, other, below in CLAIMS:
        each = [rows.get(_trimmed(entry)) for entry in (one, other)]
        between = gap(found, *each) if all(each) else None
        said = verdict(between, below)
        if between and any(len(r.tried) < len(planned[r.entry].rates) for r in each if r.entry in planned):
            said += ", as far as rates were tried"
        folds = f"{between['folds']}/{len(found['shapes']['folds'])}" if between else ""
        lines.append([text, interval(between), folds, said])
    return markdown(["claim", "difference, points", "folds", "on these recordings"], lines)


PAIRS = (
    ("lst", "head"),
    ("unipt", "head"),
    ("sherl", "head"),
    ("lst", "bitfit"),
    ("unipt", "lst"),
    ("sherl", "lst"),
    ("weighted_sum", "head"),
    ("lora", "full"),
    ("full", "head"),
)


def pairs(records: Records) -> str:
    """Differences between methods as published."""
    if _MAIN not in records:
        return NOTHING
    found = records[_MAIN]
    rows, lines = rows_of(found), []
    for one, other in PAIRS:
        each = [_reference(rows, method) for method in (one, other)]
        if all(each) and (between := gap(found, *each)):
            lines.append([f"{one} − {other}", interval(between), f"{between['folds']}"])
    return markdown(["points", "difference", "folds"], lines) if lines else NOTHING


def tasks(records: Records) -> str:
    """The other tasks."""
    lines = []
    for task, found in records.items():
        if task != _MAIN:
            rows = rows_of(found)
            head = _reference(rows, "head")
            for row in _ordered(found, rows):
                between = gap(found, row, head) if head and row is not head else None
                told = interval(between), _done(found, row, _planned(task))
                lines.append([TASKS[task].title, label(row.entry), _accuracy(found, row), *told])
    header = ["task", "method", "accuracy, %", "− head, points", "run so far"]
    return markdown(header, lines, text=2) if lines else NOTHING


def sizes(records: Records) -> str:
    """Clips of each task."""
    lines = []
    for task, found in records.items():
        folds = found["shapes"]["folds"]
        tested = "".join(fold["test_reference"] for fold in folds)
        speakers = len({speaker for fold in folds for speaker in fold["test_speakers"].split()})
        most = max(tested.count(digit) for digit in set(tested)) / len(tested)
        sizes = [str(folds[0][key]) for key in ("train_clips", "validation_clips")]
        cells = [TASKS[task].title, str(len(folds)), *sizes, str(len(tested)), str(speakers)]
        lines.append([*cells, str(len(found["shapes"]["classes"])), f"{100 * most:.0f} %"])
    header = ["", "folds", "training clips", "validation", "test, all folds", "test speakers", "classes"]
    return markdown([*header, "most frequent class"], lines)


def missing(records: Records) -> str:
    """Rows of the plan that were not begun, or not finished."""
    lines = []
    for task in TASKS:
        rows = rows_of(records[task]) if task in records else {}
        folds = len(records[task]["shapes"]["folds"]) if task in records else None
        begun, absent = [], []
        for entry, planned in _planned(task).items():
            row = rows.get(entry)
            if row is None:
                absent.append(label(entry))
            elif (
                len(row.folds) < folds
                or len(row.tried) < len(planned.rates)
                or len(row.seeds(row.folds)) < planned.seeds
            ):
                begun.append(label(entry))
        lines.append([TASKS[task].title, ", ".join(begun) or "none", ", ".join(absent) or "none"])
    return markdown(["task", "begun, not finished", "not run yet"], lines, text=3)


def sources(records: Records) -> str:
    """What the rows were run on."""
    seen: dict[tuple, list] = {}
    for task, found in records.items():
        for cell in found["figures"]:
            where = cell["origin"]
            machine = f"{where['device']}, {where['threads']} thread{'s' * (where['threads'] != 1)}"
            versions = f"torch {where['torch']}, transformers {where['transformers']}"
            commit = (where["commit"] or "unknown")[:9]
            seen.setdefault((task, f"{machine}, {versions}", where["date"][:10], commit), []).append(cell)
    lines = [
        [task, commit, date, machine, str(len(cells))]
        for (task, machine, date, commit), cells in sorted(seen.items())
    ]
    return markdown(["task", "commit", "date", "machine", "runs"], lines)


TABLES: dict[str, Callable[[Records], str]] = {
    "sizes": sizes,
    "methods": methods,
    "pairs": pairs,
    "claims": claims,
    "recipes": recipes,
    "layers": layers,
    "varied": varied,
    "tasks": tasks,
    "missing": missing,
    "sources": sources,
}


# --- figures ------------------------------------------------------------------------------------------------


def draw_accuracy(records: Records) -> str | None:
    """Accuracy of the rows that were tested on every fold, with the interval over speakers."""
    found = records.get(_MAIN)
    if found is None:
        return None
    every = set(range(len(found["shapes"]["folds"])))
    rows = [
        row
        for row in _ordered(found, rows_of(found))
        if row.folds == every and not row.entry.startswith("logistic")
    ]
    if not rows:
        return None
    clips, left, width, line = clips_of(found, every), 230, 640, 24
    picture = Picture(width, 64 + line * len(rows))
    picture.text(16, 24, "Test accuracy on people: nine accents of English", "title")
    picture.text(16, 42, "dot: mean over seeds; line: middle 95 % over draws of speakers and seeds", "note")
    nothing = {"seeds": [{"predicted": "x" * len(clips["test_reference"])}]}

    def place(share: float) -> float:
        return left + (width - left - 30) * share / 100

    for number, row in enumerate(rows):
        y = 64 + line * number
        spread = difference(clips, row.as_row(every), nothing)
        picture.text(left - 12, y + 4, label(row.entry), anchor="end")
        picture.line((place(spread["low"]), y), (place(spread["high"]), y))
        inside = not MeftConfig.methods()[parse_method(row.entry)[0]].frozen_encoder
        picture.dot(place(spread["mean"]), y, "orange" if inside else "blue")
        picture.text(place(spread["high"]) + 8, y + 4, f"{spread['mean']:.1f}", "note")
    told = "; ".join(f"{label(row.entry)} {_accuracy(found, row)}" for row in rows)
    return picture.render("Test accuracy on people", f"In percent: {told}.")


def draw_layers(records: Records) -> str | None:
    """Logistic regression by layer."""
    found = records.get(_MAIN)
    rows = rows_of(found) if found else {}
    numbers = sorted({parse_method(e)[1]["layer"] for e in rows if e.startswith("logistic")})
    if not numbers:
        return None
    picture, told = Picture(480, 266), []
    picture.text(16, 24, "Which layers hold accent", "title")
    picture.text(16, 42, "test accuracy in percent of logistic regression on pooled states", "note")

    def place(layer: int, share: float) -> tuple[float, float]:
        return 56 + 390 * layer / max(numbers), 220 - 160 * share / 80

    for share in (0, 20, 40, 60, 80):
        picture.line(place(0, share), place(max(numbers), share), kind="grid")
        picture.text(44, place(0, share)[1] + 4, str(share), "note", "end")
    for layer in numbers:
        picture.text(place(layer, 0)[0], 238, str(layer), "note", "middle")
    for pooling, kind in (("mean", "grey"), ("statistics", "blue")):
        shares = {
            n: 100 * float(np.mean(accuracies(found, rows[e])))
            for n in numbers
            if (e := f"logistic:layer={n}+pooling={pooling}") in rows
        }
        picture.line(*(place(*point) for point in shares.items()))
        for point in shares.items():
            picture.dot(*place(*point), kind)
        told.append(f"{pooling}: " + ", ".join(f"layer {n} {share:.1f}" for n, share in shares.items()))
    picture.text(446, 254, "layer; grey: mean, blue: mean and deviation", "note", "end")
    return picture.render("Accuracy by layer", "; ".join(told) + ".")


FIGURES: dict[str, Callable[[Records], str | None]] = {"accuracy": draw_accuracy, "layers": draw_layers}


def load(results: Path) -> Records:
    """The study's records by task, in the order of ``TASKS``."""
    return {task: record.read(path) for task in TASKS if (path := results / f"{task}.json").is_file()}


def write(work: Path | None, results: Path, page: Path) -> list[Path]:
    """Takes over the rows in ``work``, if it is given, and rewrites the page's tables and figures.

    Raises:
        UserError: there are no records.
    """
    written = [] if work is None else collect(work, results)
    records = load(results)
    if not records:
        raise UserError(f"there are no records in {results}: run the study first")
    write_text(page, filled(page.read_text(encoding="utf-8"), records, TABLES))
    written.append(page)
    for name, draw in FIGURES.items():
        if (text := draw(records)) is not None:
            write_text(page.parent / f"{name}.svg", text)
            written.append(page.parent / f"{name}.svg")
    return written
