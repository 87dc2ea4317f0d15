"""EER and C_avg against other ways to compute them, and values worked by hand."""

import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve
from whisper_meft.errors import UserError
from whisper_meft.evaluation import detection
from whisper_meft.evaluation.detection import (
    Decisions,
    Trials,
    equal_error_rate,
    false_acceptance,
    log_likelihood_ratios,
)


def cost_by_the_plan(accepts, reference, unknown=None):
    """C_avg as the evaluation plan writes it, pair by pair; ``accepts``: bool (N, K)."""
    languages = sorted(set(reference.tolist()))
    outside = 0.0 if unknown is None else 0.2
    total = 0.0
    for target in languages:
        total += 0.5 * np.mean([not accepts[i, target] for i in np.flatnonzero(reference == target)])
        for other in languages:
            if other != target:
                rate = np.mean(accepts[reference == other, target])
                total += (1 - 0.5 - outside) / (len(languages) - 1) * rate
        if unknown is not None:
            total += outside * np.mean(unknown[:, target])
    return total / len(languages)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_ratios_are_of_a_class_to_all_others_together(classes, scale):
    logits = scale * np.random.default_rng(0).standard_normal((20, classes))
    found = log_likelihood_ratios(logits)
    assert np.isfinite(found).all()
    wide = logits.astype(np.longdouble)
    for row, ratios in zip(wide, found):
        for index in range(classes):
            others = np.delete(row, index)
            top = others.max()
            expected = row[index] - top - np.log(np.exp(others - top).sum() / (classes - 1))
            assert ratios[index] == pytest.approx(float(expected), rel=1e-12, abs=1e-12)


def test_an_overwhelming_class_does_not_cancel_the_others():
    found = log_likelihood_ratios(np.array([[100.0, 0.0, 1.0]]))
    assert found[0, 0] == pytest.approx(100 - np.log((1 + np.e) / 2))
    assert found[0, 1] == pytest.approx(-100 + np.log(2))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("decimals", [9, 1])
def test_the_eer_is_where_the_roc_crosses(seed, decimals):
    """Also with many ties."""
    rng = np.random.default_rng(seed)
    targets = np.round(rng.normal(1, 1, 37), decimals)
    others = np.round(rng.normal(0, 1, 113), decimals)
    right = np.r_[np.ones(37), np.zeros(113)]
    false, hit, _ = roc_curve(right, np.r_[targets, others], drop_intermediate=False)
    expected = brentq(lambda x: 1 - x - interp1d(false, hit)(x), 0, 1)
    assert equal_error_rate(targets, others) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("targets", "others", "expected"),
    [
        ([1, 2], [-1, 0], 0),
        ([-1, 0], [1, 2], 1),
        ([0, 0], [0, 0, 0], 0.5),
        ([3, 0], [1, -1], 0.5),
        ([2, 3, 4, 0], [1, -1, -2, -3], 0.25),
        ([], [1], None),
        ([1], [], None),
    ],
)
def test_eers_worked_by_hand(targets, others, expected):
    found = equal_error_rate(targets, others)
    assert np.isnan(found) if expected is None else found == pytest.approx(expected)


def test_weights_are_repetitions():
    rng = np.random.default_rng(3)
    targets, others = np.round(rng.normal(1, 1, 20), 1), np.round(rng.normal(0, 1, 30), 1)
    often = rng.integers(0, 4, 50)
    expected = equal_error_rate(np.repeat(targets, often[:20]), np.repeat(others, often[20:]))
    assert Trials(targets, others).equal_error_rate(often) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(Trials(targets, others).equal_error_rate(np.r_[np.zeros(20), np.ones(30)]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lacks", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_the_average_cost_is_the_plans(seed, lacks, parts, monkeypatch):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((60, 5)) * 2
    reference = rng.integers(0, 4 if lacks else 5, 60)
    reference[:5] = [0, 1, 2, 3, 0 if lacks else 4]
    logits[np.arange(60), reference] += 2
    outside = rng.standard_normal((9, 5))
    ratios, unknown = log_likelihood_ratios(logits), log_likelihood_ratios(outside)
    if parts:
        monkeypatch.setattr(detection, "_ENTRIES", 35)
    decisions = Decisions.of(logits, reference)
    assert decisions.average_cost() == pytest.approx(cost_by_the_plan(ratios > 0, reference))
    accepted = false_acceptance(outside, decisions.present)
    assert decisions.average_cost(false_acceptance=accepted) == pytest.approx(
        cost_by_the_plan(ratios > 0, reference, unknown > 0)
    )
    often = rng.integers(0, 3, 60)
    often[:5] = 1  # every class is there
    repeated = np.repeat(np.arange(60), often)
    again = Decisions.of(logits[repeated], reference[repeated])
    assert decisions.average_cost(often) == pytest.approx(again.average_cost())


def test_average_costs_worked_by_hand():
    reference = np.array([0, 0, 1, 2])
    perfect = np.where(np.eye(3)[reference] > 0, 5.0, -5.0)
    assert Decisions.of(perfect, reference).average_cost() == 0
    assert Decisions.of(-perfect, reference).average_cost() == 1
    accepted = np.array([2, 2, 2, 2])
    everything = Decisions(reference, np.ones(3, bool), np.zeros(4, bool), accepted)
    nothing = Decisions(reference, np.ones(3, bool), np.ones(4, bool), 0 * accepted)
    assert everything.average_cost() == nothing.average_cost() == pytest.approx(0.5)
    # One of the two clips of class 0 is missed (1/3 * 0.5 * 1/2), and taken for class 1 (1/3 * 0.25 * 1/2).
    one_wrong = perfect.copy()
    one_wrong[1] = [-5, 5, -5]
    assert Decisions.of(one_wrong, reference).average_cost() == pytest.approx(0.125)
    assert np.isnan(Decisions.of(perfect[:2], reference[:2]).average_cost())


def test_without_unknown_clips_there_is_no_false_acceptance():
    with pytest.raises(UserError, match="there are no clips of unknown classes"):
        false_acceptance(np.zeros((0, 3)), np.ones(3, bool))
