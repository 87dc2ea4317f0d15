"""Log loss, ECE, temperature and threshold, against independent ways to get them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score
from whisper_meft.errors import UserError
from whisper_meft.evaluation import calibration
from whisper_meft.evaluation.calibration import (
    bin_of,
    calibrate,
    fit_temperature,
    log_loss,
    log_softmax,
    reliability,
    threshold_that_keeps,
)
from whisper_meft.evaluation.open_set import area_under_roc, score_rejection


def case(clips=200, classes=4, seed=0, sharpness=3.0):
    """Logits that are ``sharpness`` times what they should be."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((clips, classes)) * 1.5
    p = np.exp(log_softmax(logits))
    reference = np.array([rng.choice(classes, p=row) for row in p])
    return sharpness * logits, reference


def test_log_probabilities_of_any_size():
    logits = np.array([[0.0, 1.0, -2.0], [1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]])
    expected = torch.tensor(logits).log_softmax(-1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-12)
    logits, reference = case()
    expected = sklearn_log_loss(reference, np.exp(log_softmax(logits)), labels=range(4))
    assert log_loss(logits, reference).mean() == pytest.approx(expected)


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_the_calibration_error_is_the_papers(bins):
    logits, reference = case()
    confidences, right = np.exp(log_softmax(logits).max(1)), logits.argmax(1) == reference
    expected = 0.0
    for m in range(1, bins + 1):
        inside = (confidences > (m - 1) / bins) & (confidences <= m / bins)
        if inside.any():
            expected += inside.sum() / 200 * abs(right[inside].mean() - confidences[inside].mean())
    found = reliability(confidences, right, bins)
    assert found.error == pytest.approx(expected)
    assert found.counts.sum() == 200 and len(found.edges) == bins + 1
    often = np.random.default_rng(1).integers(0, 3, 200)
    again = reliability(np.repeat(confidences, often), np.repeat(right, often), bins)
    weighted = reliability(confidences, right, bins, often)
    assert weighted.error == pytest.approx(again.error)
    np.testing.assert_allclose(weighted.accuracy, again.accuracy)


def test_bins_hold_their_upper_ends():
    assert bin_of([0.0, 0.2, 0.2000001, 0.6, 1.0], 5).tolist() == [0, 0, 1, 2, 4]


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_the_temperature_has_the_least_loss(sharpness, classes):
    logits, reference = case(classes=classes, sharpness=sharpness)
    found = fit_temperature(logits, reference)
    best = minimize_scalar(
        lambda log: log_loss(logits / np.exp(log), reference).mean(), bounds=(-8, 8), method="bounded"
    )
    assert log_loss(logits / found, reference).mean() <= best.fun + 1e-12
    assert found == pytest.approx(np.exp(best.x), rel=1e-3)
    assert found == pytest.approx(sharpness, rel=0.35)  # what made them wrong
    assert (logits / found).argmax(1).tolist() == logits.argmax(1).tolist()
    # The derivative with respect to 1 / T is zero there.
    p = np.exp(log_softmax(logits / found))
    slope = ((p * logits).sum(1) - logits[np.arange(200), reference]).mean()
    assert abs(slope) < 1e-10 * np.abs(logits).mean()


def test_where_there_is_no_temperature():
    logits = np.array([[3.0, 0, 0], [0, 2.0, 0]])
    with pytest.raises(UserError, match="all 2 examples are recognised, so the sharper the better"):
        fit_temperature(logits, np.array([0, 1]))
    with pytest.raises(UserError, match="on these 2 examples the model does no better than the same prob"):
        fit_temperature(logits, np.array([1, 0]))
    with pytest.raises(UserError, match="no better than the same probability"):
        fit_temperature(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))
    with pytest.raises(UserError, match="there are no examples to calibrate on"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, int))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("clips", [1, 7, 20, 100])
def test_the_threshold_keeps_the_share_and_no_more_than_it_must(share, clips):
    confidences = np.random.default_rng(clips).uniform(0.2, 1, clips)
    threshold = threshold_that_keeps(confidences, share)
    assert (confidences >= threshold).mean() >= share
    higher = np.sort(confidences[confidences >= threshold])[0] + 1e-6
    assert (confidences >= higher).mean() < share
    assert threshold == pytest.approx(round(threshold, 6), abs=1e-12)


def test_twenty_clips_at_95_percent_lose_one():
    assert threshold_that_keeps(np.arange(1, 21) / 20, 0.95) == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(4))
def test_rejection(seed):
    rng = np.random.default_rng(seed)
    confidences, right = np.round(rng.uniform(0.3, 1, 50), 1), rng.random(50) < 0.8
    outside, names = np.round(rng.uniform(0.2, 0.9, 30), 1), rng.choice(["x", "y"], 30).tolist()
    found = score_rejection(0.6, "given", confidences, right, outside, names, 0.25)
    assert found.kept == np.mean(confidences >= 0.6)
    assert found.kept_accuracy == right[confidences >= 0.6].mean()
    assert found.false_acceptance == np.mean(outside >= 0.6)
    for name in "xy":
        assert found.per_class[name] == np.mean(outside[np.array(names) == name] >= 0.6)
    expected = roc_auc_score(np.r_[np.ones(50), np.zeros(30)], np.r_[confidences, outside])
    assert found.area == pytest.approx(expected) == area_under_roc(confidences, outside)
    text = "\n".join(found.as_text())
    assert f"{found.false_acceptance:.2%} of 30 clips are kept" in text and "C_avg with unknown" in text
    assert found.as_dict()["known"] == 50


def test_rejection_of_everything_and_of_nothing_unknown():
    found = score_rejection(1.0, "given", np.array([0.5, 0.6]), np.array([True, False]))
    assert found.kept == 0 and found.kept_accuracy is None
    assert found.false_acceptance is None and found.area is None and found.per_class == {}
    assert "of 2 clips are kept" in "\n".join(found.as_text())


def test_a_calibration_that_fails_changes_nothing(monkeypatch):
    config = SimpleNamespace(calibration_temperature=1.7, rejection_threshold=0.4)
    classifier = SimpleNamespace(model=SimpleNamespace(config=config))
    seen = []

    def answers(outcome):
        def give(*_):
            seen.append(config.calibration_temperature)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(calibration, "logits_and_classes", give)

    logits, reference = case()
    for outcome in (
        UserError("unreadable"),
        (logits, (logits.argmax(1) + 1) % 4),
        (logits, logits.argmax(1)),
    ):
        answers(outcome)
        with pytest.raises(UserError):
            calibrate(classifier, None)
        assert (config.calibration_temperature, config.rejection_threshold) == (1.7, 0.4)
    answers((logits, reference))
    found = calibrate(classifier, None)
    assert (config.calibration_temperature, config.rejection_threshold) == (
        found.temperature,
        found.reject_below,
    )
    assert seen == [None] * 4  # raw logits
