"""Bootstrap draws of speakers, or of clips where speakers are not known."""

from collections.abc import Iterator, Sequence

import numpy as np

DRAWS = 1000

# Fewer say nothing of others.
_FEWEST_SPEAKERS = 10

_ENTRIES = 2**22  # of draws that are made at a time


def groups_of(speakers: Sequence[str | None]) -> tuple[np.ndarray, str]:
    """What is drawn together (Bisani and Ney 2004): a speaker with all clips, where all are known and there
    are ten at least. Else each clip alone, and an interval is one for these speakers alone.

    Args:
        speakers: of each clip.

    Returns:
        int64 (N,), the number of each clip's group, from 0; and "speakers" or "clips".
    """
    known = sorted({speaker for speaker in speakers if speaker is not None})
    if None in speakers or len(known) < _FEWEST_SPEAKERS:
        return np.arange(len(speakers)), "clips"
    number = {speaker: i for i, speaker in enumerate(known)}
    return np.array([number[speaker] for speaker in speakers]), "speakers"


def times_drawn(groups: int, draws: int = DRAWS) -> Iterator[np.ndarray]:
    """How often each group is drawn where as many are drawn as there are, with replacement; the same whenever
    it is called.

    Yields:
        int64 (d, groups), some of the ``draws`` at a time.
    """
    rng = np.random.default_rng(0)
    most = max(1, _ENTRIES // groups)
    for done in range(0, draws, most):
        yield rng.multinomial(groups, np.full(groups, 1 / groups), size=min(most, draws - done))


def ends(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Lower and upper end of the 95 % interval of a statistic's values (draws,); None if one is NaN."""
    if not np.isfinite(values).all():
        return None
    lower, upper = np.percentile(values, [2.5, 97.5])
    return float(lower), float(upper)
