"""Word and character error rates of transcripts, as written and as Whisper's normalisers leave them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ..errors import UserError
from .resampling import groups_of, times_drawn

# Written without spaces between words: their normaliser sets each letter apart, so that WER is CER
# (Radford et al. 2023, appendix C).
WITHOUT_SPACES = frozenset(("zh", "ja", "th", "lo", "my", "yue"))

UNKNOWN = "und"  # ISO 639-2 for a language that is not determined


@dataclass(frozen=True)
class ErrorCounts:
    """Edits between hypotheses and references, over words or characters.

    Attributes:
        length: words or characters of the references. substitutions, deletions, insertions: the fewest edits
            that make the references of the hypotheses.
    """

    length: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per word or character of the references; NaN where these are empty. It may exceed 1."""
        return self.errors / self.length if self.length else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; a rate that is no number is ``None``."""
        return {"rate": self.rate if self.length else None, **asdict(self)}


@dataclass(frozen=True)
class TranscriptScores:
    """Error rates of a set of transcripts, edits summed over all of them before they are divided.

    Attributes:
        count: number of transcripts.
        wer, cer: as written, any white space as one blank. normalized_wer, normalized_cer: after Whisper's
            normaliser.
        normalizer: "english" or "basic".
        per_speaker: the same by speaker, where speakers are known.
    """

    count: int
    wer: ErrorCounts
    cer: ErrorCounts
    normalized_wer: ErrorCounts
    normalized_cer: ErrorCounts
    normalizer: str
    per_speaker: dict[str, "TranscriptScores"]

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON-ready values."""
        return {
            "count": self.count,
            **{name: getattr(self, name).as_dict() for name in _RATES},
            "normalizer": self.normalizer,
            "per_speaker": {name: scores.as_dict() for name, scores in self.per_speaker.items()},
        }

    def as_text(self) -> str:
        """A few lines for people."""
        lines = [
            f"transcripts     {self.count}",
            f"WER             {shown_rate(self.normalized_wer)} ({self.normalizer} normaliser), "
            f"{shown_rate(self.wer)} as written",
            f"CER             {shown_rate(self.normalized_cer)} ({self.normalizer} normaliser), "
            f"{shown_rate(self.cer)} as written",
        ]
        if len(self.per_speaker) > 1:
            width = max(map(len, self.per_speaker))
            lines += ["", f"{'speaker':<{width}}  transcripts     WER     CER"]
            for name, each in self.per_speaker.items():
                wer, cer = shown_rate(each.normalized_wer), shown_rate(each.normalized_cer)
                lines.append(f"{name:<{width}}  {each.count:>11}  {wer:>6}  {cer:>6}")
        return "\n".join(lines)


_RATES = ("wer", "cer", "normalized_wer", "normalized_cer")


def shown_rate(counts: ErrorCounts) -> str:
    """An error rate for people."""
    return f"{counts.rate:.1%}" if counts.length else "no reference"


def whisper_normalizer(
    language: str | None, spelling: dict[str, str] | str | Path | None = None
) -> tuple[Callable[[str], str], str]:
    """Whisper's text normaliser for a language, and its name (Radford et al. 2023, appendix C).

    Args:
        language: a code ("nl") or a name ("dutch"); ``None`` for English-only models, ``"und"`` where
            it may be any.
        spelling: of English, British spellings with their American ones: a mapping, or the
            ``normalizer.json`` beside a checkpoint's tokenizer. Without it spellings stay as they are.

    Raises:
        UserError: no language of Whisper's, or the file of spellings cannot be read.
    """
    language = None if language is None else language.lower()
    language = TO_LANGUAGE_CODE.get(language, language)
    if language == UNKNOWN:
        return BasicTextNormalizer(), "basic"
    if language not in (None, *TO_LANGUAGE_CODE.values()):
        raise UserError(
            f"language={language!r} is none of Whisper's: a code (nl) or a name (dutch) is accepted"
        )
    if language in (None, "en"):
        if isinstance(spelling, str | Path):
            try:
                spelling = json.loads(Path(spelling).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"the spellings in {spelling} cannot be read: {error}") from error
        return EnglishTextNormalizer(spelling or {}), "english"
    return BasicTextNormalizer(split_letters=language in WITHOUT_SPACES), "basic"


def score_transcripts(
    references: Sequence[str],
    hypotheses: Sequence[str],
    language: str | None = None,
    speakers: Sequence[str | None] | None = None,
    spelling: dict[str, str] | str | Path | None = None,
) -> TranscriptScores:
    """Scores transcripts.

    Args:
        references: what was said. hypotheses: what was recognised, in the same order.
        language, spelling: choose the normaliser (:func:`.whisper_normalizer`).
        speakers: of each, or ``None``.

    Raises:
        UserError: there are none, or lists of different lengths.
    """
    if not len(references) or len(references) != len(hypotheses):
        raise UserError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: equally many are needed"
        )
    normalize, name = whisper_normalizer(language, spelling)
    pairs = list(zip(references, hypotheses))
    by_speaker: dict[str, list[tuple[str, str]]] = {}
    for pair, speaker in zip(pairs, speakers or ()):
        if speaker is not None:
            by_speaker.setdefault(speaker, []).append(pair)

    def scores(of: list[tuple[str, str]], within: dict[str, TranscriptScores]) -> TranscriptScores:
        normalized = [(normalize(reference).strip(), normalize(said).strip()) for reference, said in of]
        return TranscriptScores(
            len(of), *_rates(of), *_rates(normalized), normalizer=name, per_speaker=within
        )

    return scores(pairs, {speaker: scores(of, {}) for speaker, of in sorted(by_speaker.items())})


def word_errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    language: str | None = None,
    spelling: dict[str, str] | str | Path | None = None,
) -> list[ErrorCounts]:
    """Of each transcript its word errors after Whisper's normaliser; arguments as in
    :func:`score_transcripts`, whose ``normalized_wer`` is their sum."""
    normalize, _ = whisper_normalizer(language, spelling)
    normalized = [[normalize(text).strip() for text in texts] for texts in (references, hypotheses)]
    return [_rates([pair])[0] for pair in zip(*normalized)]


def intervals(
    counts: Sequence[Sequence[ErrorCounts]], speakers: Sequence[str | None], draws: int = 1000
) -> tuple[np.ndarray, str]:
    """95 % bootstrap intervals of error rates, and what is drawn: see :func:`.resampling.groups_of`.

    Args:
        counts: of each system, of each transcript, as ``word_errors`` gives.
        speakers: of each transcript.

    Returns:
        float64 (systems + 1, 2), lower and upper ends: of each system's rate, and of the first one's minus
        the last one's, by the same draws; NaN where a draw has no word. And "speakers" or "transcripts".
    """
    groups, drawn = groups_of(speakers)
    drawn = "transcripts" if drawn == "clips" else drawn
    drawn_of = int(groups.max()) + 1
    # Sums of a group: of its words, and of each system's errors.
    sums = np.zeros((1 + len(counts), drawn_of))
    np.add.at(sums[0], groups, [each.length for each in counts[0]])
    for row, system in enumerate(counts, 1):
        np.add.at(sums[row], groups, [each.errors for each in system])
    totals = np.concatenate([sums @ times.T for times in times_drawn(drawn_of, draws)], axis=1)
    if not totals[0].all():
        return np.full((len(counts) + 1, 2), np.nan), drawn
    rates = totals[1:] / totals[0]
    return np.percentile([*rates, rates[0] - rates[-1]], [2.5, 97.5], axis=1).T, drawn


def _rates(pairs: list[tuple[str, str]]) -> tuple[ErrorCounts, ErrorCounts]:
    # Of white space jiwer takes blanks alone for the ends of words, and a line's end or a tab for a letter.
    references, hypotheses = ([" ".join(text.split()) for text in texts] for texts in zip(*pairs))
    return tuple(
        ErrorCounts(
            found.hits + found.substitutions + found.deletions,
            found.substitutions,
            found.deletions,
            found.insertions,
        )
        for found in (
            jiwer.process_words(references, hypotheses),
            jiwer.process_characters(references, hypotheses),
        )
    )
