"""What is said about a classifier beside its accuracy: for whom, how surely, and on what it does not know."""

import json
from collections import Counter

import numpy as np
import pytest
from whisper_meft.errors import UserError
from whisper_meft.evaluation import assessment, detection
from whisper_meft.evaluation.assessment import assess_logits, write_assessment
from whisper_meft.evaluation.calibration import log_loss
from whisper_meft.evaluation.detection import Decisions, log_likelihood_ratios
from whisper_meft.evaluation.resampling import groups_of, times_drawn

LABELS = ["a", "b", "c"]


def case(clips=90, speakers=15, seed=0):
    """(logits, reference, speakers); a speaker is of one class, and some are hard."""
    rng = np.random.default_rng(seed)
    who = np.arange(clips) % speakers
    reference = who % 3
    hard = rng.random(speakers) < 0.4
    logits = rng.standard_normal((clips, 3)) + rng.standard_normal((speakers, 3))[who]
    logits[np.arange(clips), reference] += np.where(hard[who], 0.3, 3)
    return logits, reference, [f"speaker{number}" for number in who]


def test_everything_is_what_it_is_called():
    logits, reference, speakers = case()
    seconds = [(1.0, 3.0, 5.0, 10.0, 20.0, 31.0)[i // 3 % 6] for i in range(90)]  # a class is i % 3
    found = assess_logits(logits, reference, LABELS, speakers, seconds, temperature=1.5)
    right = logits.argmax(1) == reference
    assert found.scores.accuracy == right.mean()
    assert found.log_loss == pytest.approx(log_loss(logits, reference).mean())
    assert found.average_cost == Decisions.of(logits, reference).average_cost()
    for label, index in zip(LABELS, range(3)):
        assert 0 < found.per_class_error_rate[label] < 0.5 and (reference == index).any()
    assert {n: p.count for n, p in found.per_duration.items()} == {
        "up to 3 s": 30,
        "3 to 10 s": 30,
        "10 to 30 s": 15,
        "over 30 s": 15,
    }
    short = np.array(seconds) <= 3
    assert found.per_duration["up to 3 s"].accuracy == right[short].mean()
    by_class = [right[short & (reference == c)].mean() for c in range(3)]
    assert found.per_duration["up to 3 s"].mean_class_accuracy == pytest.approx(np.mean(by_class))
    assert {n: p.count for n, p in found.per_speaker.items()} == Counter(speakers)
    one = np.array(speakers) == "speaker3"
    assert found.per_speaker["speaker3"].accuracy == right[one].mean()
    assert found.open_set is None and found.temperature == 1.5
    text = found.as_text()
    for shown in (
        "EER",
        "C_avg",
        "ECE",
        "log loss",
        "draws of speakers",
        "accuracy by length",
        "temperature 1.5",
    ):
        assert shown in text
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["eer"] == found.equal_error_rate


def test_intervals_are_of_draws_of_speakers_with_all_their_clips():
    logits, reference, speakers = case()
    found = assess_logits(logits, reference, LABELS, speakers)
    assert found.drawn == "speakers"
    right, who = logits.argmax(1) == reference, np.arange(90) % 15
    names = sorted(set(speakers))
    order = [names.index(speaker) for speaker in speakers]
    accuracies, costs = [], []
    for times in times_drawn(15):
        for row in times:
            drawn = np.repeat(np.arange(90), row[order])
            accuracies.append(right[drawn].mean())
            if len(costs) < 20 and len(set(reference[drawn])) == 3:
                costs.append(drawn)
    assert found.intervals["accuracy"] == pytest.approx(np.percentile(accuracies, [2.5, 97.5]))
    low, high = found.intervals["accuracy"]
    assert low < found.scores.accuracy < high
    alone = assess_logits(logits, reference, LABELS)
    assert alone.drawn == "clips" and alone.per_speaker == {}
    # Clips of one speaker are alike, so that speakers say less than as many clips.
    assert high - low > 1.2 * np.subtract(*alone.intervals["accuracy"][::-1])
    assert set(found.intervals) == {"accuracy", "mean_class_accuracy", "log_loss", "cavg", "eer"}
    for name, value in (("eer", found.equal_error_rate), ("cavg", found.average_cost)):
        low, high = found.intervals[name]
        assert low < value < high
    assert len(set(who)) == 15


def test_draws_are_the_same_in_blocks_of_any_size(monkeypatch):
    from whisper_meft.evaluation import resampling

    whole = np.concatenate(list(times_drawn(30, 100)))
    monkeypatch.setattr(resampling, "_ENTRIES", 70)
    parts = list(times_drawn(30, 100))
    assert len(parts) == 50 and np.array_equal(np.concatenate(parts), whole)
    assert (whole.sum(1) == 30).all()


@pytest.mark.parametrize(
    ("speakers", "drawn", "groups"),
    [
        (["b", "a"] * 10, "clips", 20),
        ([f"s{i % 10}" for i in range(30)], "speakers", 10),
        ([*(f"s{i % 10}" for i in range(30)), None], "clips", 31),
    ],
)
def test_what_is_drawn(speakers, drawn, groups):
    found, name = groups_of(speakers)
    assert name == drawn and found.max() + 1 == groups and len(found) == len(speakers)


def test_a_draw_may_lack_a_class():
    """The class with one speaker is in about two thirds of the draws."""
    logits, reference, speakers = case(clips=60, speakers=12)
    kept = np.array([i for i in range(60) if reference[i] != 2 or i % 12 == 2])
    found = assess_logits(logits[kept], reference[kept], LABELS, [speakers[i] for i in kept])
    assert all(each is not None for each in found.intervals.values()) or found.drawn == "clips"
    assert found.intervals["mean_class_accuracy"] is not None


@pytest.mark.parametrize(("classes", "reference"), [(1, [0, 0, 0]), (3, [1, 1, 1])])
def test_clips_of_one_class_have_no_detection(classes, reference):
    logits = np.random.default_rng(0).standard_normal((3, classes))
    found = assess_logits(logits, np.array(reference), LABELS[:classes])
    assert found.equal_error_rate is None and found.average_cost is None
    assert set(found.per_class_error_rate.values()) == {None}
    assert "clips of two classes are needed" in found.as_text()
    json.dumps(found.as_dict(), allow_nan=False)


def test_too_many_trials_have_no_eer_and_the_rest_is_the_same(monkeypatch):
    logits, reference, speakers = case()
    whole = assess_logits(logits, reference, LABELS, speakers).as_dict()
    monkeypatch.setattr(assessment, "_MOST_SORTED", 100)
    monkeypatch.setattr(detection, "_ENTRIES", 50)
    found = assess_logits(logits, reference, LABELS, speakers)
    assert "EER                  too many trials" in found.as_text()
    found = found.as_dict()
    assert found["eer"] is None and set(found["per_class_eer"].values()) == {None}
    del whole["intervals"]["eer"]
    rest = set(whole) - {"eer", "per_class_eer"}
    assert {name: found[name] for name in rest} == {name: whole[name] for name in rest}


def test_unknown_classes_and_thresholds():
    logits, reference, _ = case()
    outside = np.random.default_rng(5).standard_normal((40, 3))
    unknown = (outside, ["x"] * 10 + ["y"] * 30)
    chosen = assess_logits(logits, reference, LABELS, unknown=unknown).open_set
    assert chosen.origin == "keeps 95 % of the known clips here" and 0.95 <= chosen.kept <= 0.97
    assert chosen.unknown == 40 and set(chosen.per_class) == {"x", "y"}
    accepts = log_likelihood_ratios(outside) > 0
    closed = Decisions.of(logits, reference)
    assert chosen.average_cost == closed.average_cost(false_acceptance=accepts.mean())
    given = assess_logits(logits, reference, LABELS, threshold=0.9).open_set
    assert given.threshold == 0.9 and given.unknown == 0 and given.false_acceptance is None
    found = assess_logits(logits, reference, LABELS, unknown=unknown, threshold=0.9)
    assert found.open_set.false_acceptance < chosen.false_acceptance
    assert found.scores.count == 90 and "rejecting below 0.9 (given)" in found.as_text()
    assert json.loads(json.dumps(found.as_dict()))["open_set"]["known"] == 90


def test_many_speakers_are_not_all_told():
    logits, reference, _ = case(clips=200, speakers=100)
    found = assess_logits(logits, reference, LABELS, [f"s{i % 100:03}" for i in range(200)])
    assert "accuracy of the worst 20 of 100 speakers" in found.as_text()
    assert found.as_text(whole=True).count("  s0") == 100


def test_what_is_written(tmp_path):
    logits, reference, speakers = case()
    found = assess_logits(logits, reference, LABELS, [f"\x1b[31m{each}" for each in speakers])
    assert "\x1b" not in found.as_text()
    write_assessment(found, tmp_path, "some data", model="m")
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert (
        results["data"] == "some data" and results["model"] == "m" and results["cavg"] == found.average_cost
    )
    assert sum(each["count"] for each in results["reliability"]) == 90
    for name in ("confusion_matrix.png", "reliability.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "evaluation.txt").read_text() == found.as_text(whole=True) + "\n"


def test_nothing_to_score():
    with pytest.raises(UserError, match="there are no examples to score"):
        assess_logits(np.zeros((0, 3)), np.zeros(0, int), LABELS)
