"""Classes as detectors, as language recognition is evaluated: every clip is a trial of every class.

A class's score for a clip is the log-likelihood ratio of that class to all others taken together, classes
being as likely as each other beforehand; softmax outputs stand for likelihoods. A model that was trained on
classes of unequal number has learnt that too, and it shows here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import UserError

# Of NIST's language recognition evaluations of 2007 and 2009; misses and false alarms cost 1 each.
P_TARGET, P_OUT_OF_SET = 0.5, 0.2


# So many scores in float64 are there at a time, where they need not be kept.
_ENTRIES = 2**22


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover the rows of a matrix, few enough at a time."""
    size = max(1, _ENTRIES // max(columns, 1))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def log_likelihood_ratios(logits: np.ndarray) -> np.ndarray:
    """float64 (N, K): log p_c - log(sum over j other than c of p_j / (K - 1)), p being the softmax.

    Args:
        logits: (N, K), K >= 2, finite.
    """
    logits = np.asarray(logits, np.float64)
    clips, classes = logits.shape
    # Sums of what stands before and behind each class: to subtract p_c from the whole would cancel.
    below = np.full((clips, classes), -np.inf)
    above = np.full((clips, classes), -np.inf)
    below[:, 1:] = np.logaddexp.accumulate(logits[:, :-1], axis=1)
    above[:, :-1] = np.logaddexp.accumulate(logits[:, :0:-1], axis=1)[:, ::-1]
    return logits - np.logaddexp(below, above) + np.log(classes - 1)


class Trials:
    """Scores of targets and of others, sorted once for any weights.

    Args:
        targets: (n,) scores of trials of the right class. others: (m,) of all others.
    """

    def __init__(self, targets: np.ndarray, others: np.ndarray):
        scores = np.concatenate([targets, others])
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._last = np.append(ordered[1:] > ordered[:-1], True)  # of those of one score
        self._target = self._order < len(targets)

    def equal_error_rate(self, weights: np.ndarray | None = None) -> float:
        """The rate at which misses and false alarms are equally frequent: where the line through the points
        (P_FA, P_miss), one for each threshold between two scores, crosses P_FA = P_miss.

        Args:
            weights: (n + m,) how often each trial counts, targets first; None: once.

        Returns:
            From 0 to 1; NaN where there are no targets or no others.
        """
        if not len(self._order):
            return float("nan")
        often = np.ones(len(self._order)) if weights is None else np.asarray(weights, float)[self._order]
        missed = np.cumsum(np.where(self._target, often, 0.0))
        refused = np.cumsum(np.where(self._target, 0.0, often))
        if not missed[-1] or not refused[-1]:
            return float("nan")
        miss = np.append(0.0, missed[self._last] / missed[-1])
        false = np.append(1.0, 1 - refused[self._last] / refused[-1])
        gap = miss - false  # from -1 to 1, never falling
        above = int(np.argmax(gap >= 0))
        share = gap[above - 1] / (gap[above - 1] - gap[above])
        return float(miss[above - 1] + share * (miss[above] - miss[above - 1]))


def equal_error_rate(targets: np.ndarray, others: np.ndarray) -> float:
    """The rate at which misses and false alarms are equally frequent, by linear interpolation of the ROC.

    Args:
        targets: (n,) scores of trials of the right class. others: (m,) of all others.

    Returns:
        From 0 to 1; NaN where there are none of one kind.
    """
    return Trials(np.asarray(targets, float), np.asarray(others, float)).equal_error_rate()


@dataclass(frozen=True)
class Decisions:
    """What is accepted at the threshold that costs least where scores are right: a ratio above 0 (the prior
    odds of target and other are even).

    Attributes:
        reference: int64 (N,) the class of each clip. present: bool (K,) which classes there are clips of.
        missed: bool (N,) whether the clip's own class was refused. accepted: int64 (N,) how many of the other
            classes that there are clips of were accepted.
    """

    reference: np.ndarray
    present: np.ndarray
    missed: np.ndarray
    accepted: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, reference: np.ndarray) -> "Decisions":
        """Of logits (N, K), K >= 2, and class indices (N,)."""
        reference = np.asarray(reference)
        present = np.bincount(reference, minlength=logits.shape[1]) > 0
        missed, accepted = [np.zeros(0, bool)], [np.zeros(0, np.int64)]
        for rows in row_slices(*logits.shape):
            accepts = log_likelihood_ratios(logits[rows]) > 0
            own = accepts[np.arange(len(accepts)), reference[rows]]
            missed.append(~own)
            accepted.append((accepts & present).sum(1) - own)
        return cls(reference, present, np.concatenate(missed), np.concatenate(accepted))

    def average_cost(self, weights: np.ndarray | None = None, false_acceptance: float | None = None) -> float:
        """C_avg of NIST's Language Recognition Evaluations of 2007 and 2009 (evaluation plans, "performance
        metrics"; score_lre07), with C_miss = C_FA = 1 and P_target = 0.5:

            C_avg = 1/K sum_T [ P_target P_miss(T) + sum_{N != T} P_nontarget P_FA(T, N)
                                + P_out_of_set P_FA(T, O) ]

        P_miss(T) is the share of the clips of T in which T is refused, P_FA(T, N) that of the clips of N in
        which T is accepted, and P_nontarget = (1 - P_target - P_out_of_set) / (K - 1). P_out_of_set is 0 for
        a closed set, and 0.2 where there are clips of classes that are not known, O. K and the sums are over
        the classes that there are clips of.

        Args:
            weights: (N,) how often each clip counts; None: once.
            false_acceptance: the mean over T of P_FA(T, O); None: a closed set.

        Returns:
            From 0 to 1; 0.5 for a system that accepts everything or nothing, NaN for less than two classes.
        """
        classes = int(self.present.sum())
        if classes < 2:
            return float("nan")
        size = len(self.present)
        count = np.bincount(self.reference, weights, size)
        there = count > 0  # a draw of clips may lack one
        often = 1.0 if weights is None else weights
        miss = np.bincount(self.reference, self.missed * often, size)[there] / count[there]
        # Over T first: the classes accepted in the clips of N, all the same share of them.
        false = np.bincount(self.reference, self.accepted * often, size)[there] / count[there] / (classes - 1)
        outside = 0.0 if false_acceptance is None else P_OUT_OF_SET
        others = (1 - P_TARGET - outside) * false.mean()
        return float(P_TARGET * miss.mean() + others + outside * (false_acceptance or 0.0))


def false_acceptance(logits: np.ndarray, present: np.ndarray) -> float:
    """The mean over the classes that are ``present``, bool (K,), of the share of clips of unknown classes, of
    logits (U, K), in which they are accepted."""
    if not len(logits):
        raise UserError("there are no clips of unknown classes")
    parts = (log_likelihood_ratios(logits[rows]) > 0 for rows in row_slices(*logits.shape))
    return float(np.concatenate([accepts[:, present].mean(1) for accepts in parts]).mean())
