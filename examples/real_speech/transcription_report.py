"""The tables of the page on transcription, and the committed record that they are made from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from whisper_meft.comparison.arguments import parse_method
from whisper_meft.errors import UserError
from whisper_meft.files import read_json, write_text

from benchmarks import record
from benchmarks.tables import markdown
from examples.study.study_report import filled

from .transcription_cells import KINDS, numbers
from .transcription_plan import (
    FULL,
    LANGUAGES,
    LORA,
    LST,
    SHERL,
    TESTED,
    UNIPT,
    ZERO_SHOT,
    Row,
    plan,
)

NAME = "transcription"
COMMAND = "python -m examples.real_speech transcribe --model MODEL --speech DIR --work DIR"
RESAMPLES = 2000
NOTHING = "(no results yet)"
WITHOUT_SPACE = "+leading_space=false"

Found = dict[str, Any]


# --- taking over what was run -------------------------------------------------------------------------------


def collect(work: Path, results: Path) -> list[Path]:
    """Brings ``results/transcription.json`` up to date with the rows in ``work``; returns what was written.

    Raises:
        UserError: there are no rows, or the record is of other clips.
    """
    folder = work / "transcription"
    files = sorted(folder.glob("rows/*/*/*.json"))
    if not files:
        raise UserError(f"--work: there are no rows in {work}")
    shapes, path = read_json(folder / "shapes.json"), results / f"{NAME}.json"
    cells = {}
    if path.is_file():
        before = record.read(path)
        if before["shapes"] != shapes:
            raise UserError(f"{path} is of other clips than {work}: move it away first")
        cells = {_key(cell): cell for cell in before["figures"]}
    cells |= {_key(cell): cell for cell in map(read_json, files)}
    figures = [cells[key] for key in sorted(cells)]
    if path.is_file() and figures == before["figures"]:
        return []
    record.write(NAME, figures, command=COMMAND, shapes=shapes, device="cpu", path=path)
    return [path]


def _key(cell: Found) -> tuple:
    return cell["language"], cell["entry"], cell["rate"] or 0.0, cell["seed"]


# --- rows ---------------------------------------------------------------------------------------------------


class Run:
    """A row as far as it was run.

    Attributes:
        language, entry: of the row. tried: the runs of the search by rate. rate: the one chosen so far.
        seeds: the runs whose test clips were heard.
    """

    def __init__(self, cells: Sequence[Found]):
        self.language, self.entry = cells[0]["language"], cells[0]["entry"]
        good = [cell for cell in cells if cell["status"] == "ok"]
        self.failed = [cell for cell in cells if cell["status"] != "ok"]
        self.tried = {cell["rate"]: cell for cell in good if cell["seed"] == 0}
        best = min(self.tried.values(), key=lambda cell: cell["dev_rate"], default=None)
        self.rate = None if best is None else best["rate"]
        self.seeds = [cell for cell in good if cell["rate"] == self.rate and "tests" in cell]

    def errors(self, name: str, kind: str) -> np.ndarray:
        """Edits (seeds, clips) of a set."""
        return np.array([numbers(cell["tests"][name][kind]) for cell in self.seeds])


def runs_of(found: Found) -> dict[tuple[str, str], Run]:
    """The rows of a record by language and entry."""
    by_row: dict[tuple[str, str], list] = {}
    for cell in found["figures"]:
        by_row.setdefault((cell["language"], cell["entry"]), []).append(cell)
    return {key: Run(cells) for key, cells in by_row.items() if WITHOUT_SPACE not in key[1]}


def without_space(found: Found) -> dict[tuple[str, str], list[Found]]:
    """The runs that trained on transcripts that do not begin with a space, by the row that they are of."""
    by_row: dict[tuple[str, str], list] = {}
    for cell in found["figures"]:
        if WITHOUT_SPACE in cell["entry"]:
            key = cell["language"], cell["entry"].replace(WITHOUT_SPACE, "")
            by_row.setdefault(key, []).append(cell)
    return by_row


def rates(found: Found, run: Run, name: str, kind: str) -> np.ndarray:
    """The error rate of each seed, in percent."""
    lengths = numbers(found["shapes"]["sets"][name]["lengths"][kind])
    return 100 * run.errors(name, kind).sum(axis=1) / sum(lengths)


def difference(found: Found, one: Run, other: Run, name: str, kind: str) -> dict[str, float]:
    """How much higher one row's error rate is than another's on a set, in points.

    Returns:
        ``mean``; ``low`` and ``high``: the middle 95 % over draws, with replacement, of the clips (the same
        ones for both rows) and of each row's seeds.
    """
    lengths = np.array(numbers(found["shapes"]["sets"][name]["lengths"][kind]))
    generator = np.random.default_rng(0)
    clips = generator.integers(len(lengths), size=(RESAMPLES, len(lengths)))
    sums, means = [], []
    for run in (one, other):
        errors = run.errors(name, kind)
        seeds = generator.integers(len(errors), size=(RESAMPLES, len(errors)))
        drawn = errors[seeds].mean(axis=1)  # (draws, clips)
        sums.append(np.take_along_axis(drawn, clips, axis=1).sum(axis=1))
        means.append(errors.mean(axis=0).sum())
    draws = 100 * (sums[0] - sums[1]) / lengths[clips].sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": 100 * (means[0] - means[1]) / lengths.sum(), "low": float(low), "high": float(high)}


def label(entry: str) -> str:
    """An entry as the tables show it: without what all rows share."""
    method, options = parse_method(entry)
    place = options.pop("placement", options.pop("target", None))
    if method in ("lst", "unipt", "sherl") and options.get("reduction_factor") == 4:
        options.pop("reduction_factor")
    shown = [method.replace("_", "-"), *([place] if place else [])]
    shown += [f"{name}={value}" for name, value in options.items()]
    return ", ".join("padded to 30 s" if each == "max_frames=fidelity" else each for each in shown)


def _shown(values: np.ndarray) -> str:
    text = f"{values.mean():.1f}"
    return text if len(values) < 2 else f"{text} ± {values.std(ddof=1):.1f}"


def _interval(gap: dict[str, float]) -> str:
    text = f"{gap['mean']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})"
    return f"**{text}**" if gap["low"] > 0 or gap["high"] < 0 else text


def _planned() -> dict[tuple[str, str], Row]:
    return {(cell.row.language, cell.row.entry): cell.row for cell in plan()}


def _heard(found: Found, language: str) -> list[Run]:
    """The rows of a language whose test clips were heard, the fewest errors first; among them zero-shot,
    which is one for all languages."""
    own = TESTED[language][0]
    runs = [
        run
        for (trained_on, _), run in runs_of(found).items()
        if run.seeds and (trained_on == language or parse_method(run.entry)[0] == ZERO_SHOT)
    ]
    return sorted(runs, key=lambda run: rates(found, run, own, "cer").mean())


# --- tables -------------------------------------------------------------------------------------------------


def sizes(found: Found) -> str:
    lines = []
    for name, each in found["shapes"]["sets"].items():
        minutes = f"{each['seconds'] / 60:.1f}"
        lines.append([name, str(each["clips"]), str(each["left_out"]), minutes, str(each["speakers"])])
    return markdown(["set", "clips", "longer than the window", "minutes", "speakers"], lines)


def _methods(language: str) -> Callable[[Found], str]:
    def table(found: Found) -> str:
        own = TESTED[language][0]
        runs, lines = runs_of(found), []
        full, zero_shot = runs.get((language, FULL)), runs.get(("nl", ZERO_SHOT))
        for run in _heard(found, language):
            gaps = [
                _interval(difference(found, run, other, own, "cer"))
                if other is not None and other.seeds and other.entry != run.entry
                else ""
                for other in (zero_shot, full)
            ]
            trained = run.seeds[0].get("trainable_parameters")
            seconds = [cell["cpu_seconds"] for cell in run.seeds if cell.get("cpu_seconds")]
            endless = sum(cell["tests"][own]["to_the_last_token"] for cell in run.seeds) / len(run.seeds)
            lines.append(
                [
                    label(run.entry),
                    f"{trained:,}" if trained else "0",
                    f"{run.rate:g}" if run.rate else "",
                    *(_shown(rates(found, run, own, kind)) for kind in KINDS),
                    *gaps,
                    f"{endless:.1f}" if endless % 1 else f"{endless:.0f}",
                    f"{np.median(seconds):.0f}" if seconds else "",
                    str(len(run.seeds)),
                ]
            )
        if not lines:
            return NOTHING
        header = ["method", "trained", "rate", "WER", "CER", "WER, normalised", "CER, normalised"]
        header += ["CER − zero-shot", "CER − full decoder", "endless", "CPU s a run", "seeds"]
        return markdown(header, lines)

    return table


def _elsewhere(language: str) -> Callable[[Found], str]:
    """What a model that was trained on one language's reader hears of others."""

    def table(found: Found) -> str:
        zero_shot, lines = runs_of(found).get(("nl", ZERO_SHOT)), []
        others = TESTED[language][1:]
        for run in _heard(found, language):
            cells = [label(run.entry)]
            for name in others:
                for kind in ("wer", "cer"):
                    cells.append(_shown(rates(found, run, name, kind)))
                is_it = zero_shot is None or run.entry == ZERO_SHOT
                cells.append("" if is_it else _interval(difference(found, run, zero_shot, name, "cer")))
            lines.append(cells)
        if not lines:
            return NOTHING
        header = ["method"]
        for name in others:
            header += [f"{name}: WER", "CER", "CER − zero-shot"]
        return markdown(header, lines)

    return table


# Goals: text, and two rows, of which the first is to make fewer errors.
CLAIMS = (
    ("LST beside the encoder makes fewer errors than zero-shot", LST["encoder"], ZERO_SHOT),
    ("LST beside the encoder makes fewer than full fine-tuning of the decoder", LST["encoder"], FULL),
    ("LST beside the encoder makes fewer than LoRA in the decoder", LST["encoder"], LORA),
    ("LST beside both makes fewer errors than zero-shot", LST["both"], ZERO_SHOT),
    ("LST beside the decoder makes fewer errors than zero-shot", LST["decoder"], ZERO_SHOT),
    ("UniPT beside the encoder makes fewer errors than zero-shot", UNIPT, ZERO_SHOT),
    ("SHERL beside the encoder makes fewer errors than zero-shot", SHERL, ZERO_SHOT),
    ("LoRA in the decoder makes fewer errors than zero-shot", LORA, ZERO_SHOT),
    ("full fine-tuning of the decoder makes fewer errors than zero-shot", FULL, ZERO_SHOT),
)


def claims(found: Found) -> str:
    """Goals of the methods on each language's own test clips, by CER as written."""
    runs, lines = runs_of(found), []
    for language, name in LANGUAGES.items():
        for text, *entries in CLAIMS:
            first, second = (runs.get((language if entry != ZERO_SHOT else "nl", entry)) for entry in entries)
            if first is None or second is None or not first.seeds or not second.seeds:
                lines.append([name, text, "", "not run yet"])
                continue
            gap = difference(found, first, second, TESTED[language][0], "cer")
            verdict = "holds" if gap["high"] < 0 else "does not hold" if gap["low"] > 0 else "cannot be told"
            lines.append([name, text, _interval(gap), verdict])
    return markdown(["language", "claim", "CER, points", "on these clips"], lines)


def search(found: Found) -> str:
    """What the search saw of the validation clips."""
    lines = []
    for (language, entry), run in sorted(runs_of(found).items()):
        for rate, cell in sorted(run.tried.items(), key=lambda both: both[0] or 0.0):
            losses = cell.get("train_losses")
            lines.append(
                [
                    language,
                    label(entry),
                    f"{rate:g}" if rate else "",
                    f"{losses[-1]:.2f}" if losses else "",
                    f"{100 * cell['dev_rate']:.1f}",
                    "chosen" if rate and rate == run.rate else "",
                ]
            )
        lines += [
            [language, label(entry), f"{cell['rate']:g}", "", cell["status"].replace("|", "\\|"), ""]
            for cell in run.failed
        ]
    header = ["language", "method", "rate", "loss, last epoch", "validation CER, held", ""]
    return markdown(header, lines) if lines else NOTHING


def spaces(found: Found) -> str:
    """Runs whose transcripts do not begin with a space (Dutch), beside those at the same rate whose do."""
    runs, lines = runs_of(found), []
    for (language, entry), cells in sorted(without_space(found).items()):
        for cell in sorted(cells, key=lambda cell: cell["rate"]):
            run = runs.get((language, entry))
            pair = cell, run.tried.get(cell["rate"]) if run else None
            shown = [f"{100 * each['dev_rate']:.1f}" if each else "" for each in pair]
            for name in TESTED["nl"]:
                length = sum(numbers(found["shapes"]["sets"][name]["lengths"]["cer"]))
                for each in pair:
                    heard = each and "tests" in each
                    errors = sum(numbers(each["tests"][name]["cer"])) if heard else 0
                    shown.append(f"{100 * errors / length:.1f}" if heard else "")
            shown += [f"{each['train_losses'][0]:.2f}" if each else "" for each in pair]
            lines.append([label(entry), f"{cell['rate']:g}", *shown])
    if not lines:
        return NOTHING
    header = ["method", "rate"]
    for name in ("validation", *TESTED["nl"]):
        header += [f"{name}, without", "with"]
    return markdown([*header, "loss of epoch 1, without", "with"], lines)


def missing(found: Found) -> str:
    """What of the plan was not run."""
    runs, lines = runs_of(found), []
    for language, name in LANGUAGES.items():
        begun, open_ = [], []
        for (of, entry), row in _planned().items():
            if of != language:
                continue
            run = runs.get((of, entry))
            if run is None:
                open_.append(label(entry))
            elif len(run.seeds) < row.seeds or len(run.tried) + len(run.failed) < len(row.rates):
                begun.append(
                    f"{label(entry)} ({len(run.seeds)}/{row.seeds} seeds, "
                    f"{len(run.tried)}/{len(row.rates)} rates)"
                )
        lines.append([name, "; ".join(begun) or "none", "; ".join(open_) or "none"])
    return markdown(["language", "begun, not finished", "not run yet"], lines)


def sources(found: Found) -> str:
    counted: dict[tuple, int] = {}
    for cell in found["figures"]:
        origin = cell["origin"]
        threads = f"{origin['threads']} thread{'s' * (origin['threads'] != 1)}"
        machine = f"{origin['device']}, {threads}, torch {origin['torch']}"
        machine += f", transformers {origin['transformers']}"
        commit = (origin["commit"] or "unknown")[:9] + (" with changes" if origin["dirty"] else "")
        key = commit, origin["date"][:10], machine
        counted[key] = counted.get(key, 0) + 1
    lines = [[*key, str(count)] for key, count in sorted(counted.items())]
    return markdown(["commit", "date", "machine", "runs"], lines)


TABLES: dict[str, Callable[[Found], str]] = {
    "sizes": sizes,
    "methods_nl": _methods("nl"),
    "elsewhere_nl": _elsewhere("nl"),
    "methods_de": _methods("de"),
    "elsewhere_de": _elsewhere("de"),
    "claims": claims,
    "search": search,
    "spaces": spaces,
    "missing": missing,
    "sources": sources,
}


def write(work: Path | None, results: Path, page: Path) -> list[Path]:
    """Takes over the rows in ``work``, if it is given, and rewrites the page's tables.

    Raises:
        UserError: there is no record.
    """
    written = [] if work is None else collect(work, results)
    path = results / f"{NAME}.json"
    if not path.is_file():
        raise UserError(f"there is no {NAME}.json in {results}: run the study first")
    write_text(page, filled(page.read_text(encoding="utf-8"), record.read(path), TABLES))
    return [*written, page]
