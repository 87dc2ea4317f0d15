"""Scoring a model that transcribes beside its backbone alone, and writing scores and transcripts."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.examples import ExampleSet, check_transcribed
from ..errors import UserError, printable
from ..files import write_json, write_text
from .transcriber import Transcriber
from .transcripts import (
    UNKNOWN,
    ErrorCounts,
    TranscriptScores,
    intervals,
    score_transcripts,
    shown_rate,
    word_errors,
)

COLUMNS = ("file", "speaker", "reference", "hypothesis", "zero_shot", "errors", "zero_shot_errors")


@dataclass(frozen=True)
class Recognition:
    """What was heard and how right it is.

    Attributes:
        scores: the model's. zero_shot: the backbone's alone, or None.
        rows: by transcript ``COLUMNS``; errors are of words, after Whisper's normaliser.
        interval: ends of the 95 % interval of ``scores.normalized_wer.rate``; zero_shot_interval,
            difference_interval: likewise, of the model's rate minus the backbone's; None without one.
        drawn: what the intervals are of, "speakers" or "transcripts".
        language: the code, or None where the model guessed it.
        adapted: whether the model is no plain Whisper.
        left_out: name and reason of the examples that could not be heard.
    """

    scores: TranscriptScores
    zero_shot: TranscriptScores | None
    rows: list[dict[str, Any]]
    interval: tuple[float, float]
    zero_shot_interval: tuple[float, float] | None
    difference_interval: tuple[float, float] | None
    drawn: str
    language: str | None
    adapted: bool
    left_out: list[tuple[str, str]]

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON-ready values."""
        values = {"language": self.language, **self.scores.as_dict(), "interval_over": self.drawn}
        values["normalized_wer_interval"] = _finite(self.interval)
        values["zero_shot"] = None
        if self.zero_shot is not None:
            interval = {"normalized_wer_interval": _finite(self.zero_shot_interval)}
            values["zero_shot"] = {**self.zero_shot.as_dict(), **interval}
            values["normalized_wer_difference_interval"] = _finite(self.difference_interval)
        return values

    def as_text(self) -> str:
        """A few lines for people: error rates side by side, for all and for each speaker."""
        said = self.language or "guessed"
        lines = [f"{self.scores.count} transcripts, language {said}, {self.scores.normalizer} normaliser", ""]
        systems = {"adapted" if self.adapted else "zero-shot": self.scores}
        if self.zero_shot is not None:
            systems["zero-shot"] = self.zero_shot
        rows = [["", *systems]]
        for name, rate in _NAMED.items():
            rows.append([name, *(shown_rate(getattr(each, rate)) for each in systems.values())])
        ends = [self.interval, *([self.zero_shot_interval] if self.zero_shot else [])]
        rows.insert(2, ["  95 % interval", *map(_percent, ends)])
        lines += _aligned(rows)
        if self.difference_interval is not None:
            lines.append(
                f"95 % interval of the difference in WER: {_percent(self.difference_interval)} (below 0: the "
                "adapted model is better)"
            )
        lines.append(f"intervals are of draws of {self.drawn}")
        if len(self.scores.per_speaker) > 1:
            rows = [["speaker", "transcripts", *(f"{r} {n}" for n in systems for r in ("WER", "CER"))]]
            for speaker, each in self.scores.per_speaker.items():
                of = (system.per_speaker[speaker] for system in systems.values())
                rates = [shown_rate(r) for s in of for r in (s.normalized_wer, s.normalized_cer)]
                rows.append([printable(speaker), str(each.count), *rates])
            lines += ["", *_aligned(rows)]
        return "\n".join(lines)

    def as_csv(self) -> str:
        """The transcripts, one a line."""
        columns = COLUMNS if self.zero_shot is not None else [c for c in COLUMNS if "zero_shot" not in c]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


_NAMED = {
    "WER": "normalized_wer",
    "CER": "normalized_cer",
    "WER as written": "wer",
    "CER as written": "cer",
}


def _finite(ends: tuple[float, float]) -> list[float] | None:
    return list(ends) if np.isfinite(ends).all() else None


def _percent(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.1%} to {ends[1]:.1%}" if np.isfinite(ends).all() else "no reference"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def evaluate_transcripts(
    transcriber: Transcriber, examples: ExampleSet, zero_shot: Transcriber | None = None
) -> Recognition:
    """Scores what a model hears.

    Args:
        transcriber: the model. examples: with transcripts.
        zero_shot: the backbone alone, to stand beside it.

    Raises:
        UserError: an example has no transcript or cannot be read, or none can be heard.
    """
    check_transcribed(examples)
    systems = [transcriber, *([zero_shot] if zero_shot is not None else [])]
    heard, reasons = [], {}
    for system in systems:
        found, bad = system.transcribe(examples)
        heard.append(found)
        reasons.update({name: reason for name, reason in bad if name not in reasons})
    kept = [i for i in range(len(examples)) if all(found[i] is not None for found in heard)]
    if not kept:
        name, reason = next(iter(reasons.items()))
        raise UserError(f"no example could be transcribed; {name}: {reason}")
    examples = examples.select(kept)
    texts = [[found[i].text for i in kept] for found in heard]
    references = [example.text for example in examples]
    speakers = [example.speaker for example in examples]
    how = (
        transcriber.language or UNKNOWN,
        getattr(transcriber.tokenizer, "english_spelling_normalizer", None),
    )
    scores = [score_transcripts(references, each, how[0], speakers, how[1]) for each in texts]
    counts: list[list[ErrorCounts]] = [word_errors(references, each, *how) for each in texts]
    ends, drawn = intervals(counts, speakers)
    ends = [tuple(map(float, each)) for each in ends]
    rows = []
    for index, example in enumerate(examples):
        row = {"file": example.name, "speaker": example.speaker, "reference": example.text}
        row |= {"hypothesis": texts[0][index], "errors": counts[0][index].errors}
        if zero_shot is not None:
            row |= {"zero_shot": texts[1][index], "zero_shot_errors": counts[1][index].errors}
        rows.append(row)
    both = zero_shot is not None
    return Recognition(
        scores=scores[0],
        zero_shot=scores[1] if both else None,
        rows=rows,
        interval=ends[0],
        zero_shot_interval=ends[1] if both else None,
        difference_interval=ends[2] if both else None,
        drawn=drawn,
        language=transcriber.language,
        adapted=transcriber.adapted,
        left_out=list(reasons.items()),
    )


def write_recognition(result: Recognition, folder: Path, description: str, **more: Any) -> None:
    """Writes eval_results.json, evaluation.txt and transcripts.csv, atomically.

    Args:
        result: what to write. folder: where; made as needed. description: what was scored.
        more: further entries of the JSON file.
    """
    write_text(folder / "transcripts.csv", result.as_csv())
    write_json(folder / "eval_results.json", {"data": description, **more, **result.as_dict()})
    write_text(folder / "evaluation.txt", result.as_text() + "\n")
