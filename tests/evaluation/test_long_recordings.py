"""Classifying recordings that are longer than a model hears at once."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modelling_fixtures import randomise
from training_fixtures import RATE, TONES, make_backbone, tone
from transformers import WhisperFeatureExtractor
from whisper_meft import LSTConfig, get_meft_model
from whisper_meft.audio.windows import Windows
from whisper_meft.data import Example, ExampleSet, check_audio, cut_into_windows
from whisper_meft.data import windows as windows_module
from whisper_meft.data.windows import WindowStream
from whisper_meft.errors import UserError
from whisper_meft.evaluation import plots
from whisper_meft.evaluation.calibration import _windows_and_clips, fit_temperature
from whisper_meft.evaluation.classifier import Classifier, predict
from whisper_meft.evaluation.timeline import Timeline, WindowLogits, pool, softmax
from whisper_meft.model.backbone import load_backbone, set_labels

soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A backbone with a window of 2 seconds."""
    return make_backbone(tmp_path_factory.mktemp("base"), max_source_positions=100)


@pytest.fixture(scope="module", params=["fidelity", "longest", 50])
def classifier(request, backbone):
    return make_classifier(backbone, request.param)


def make_classifier(backbone, max_frames="longest", **options):
    base = load_backbone(backbone)
    torch.manual_seed(0)  # of the new last layer
    set_labels(base, sorted(TONES))
    model = randomise(get_meft_model(base, LSTConfig(max_frames=max_frames, reduction_factor=2)))
    extractor = WhisperFeatureExtractor.from_pretrained(backbone)
    return Classifier(model, extractor, "cpu", batch_size=3, progress=False, **options)


def sounds(*lengths: float) -> np.ndarray:
    """One tone after the other."""
    generator = np.random.default_rng(len(lengths))
    return np.concatenate([tone(300 * 2**i, length, generator) for i, length in enumerate(lengths)])


def window_of(classifier) -> float:
    return 1.0 if classifier.max_frames == 50 else 2.0


def test_a_recording_within_a_window_has_exactly_its_plain_answer(classifier):
    waves = [sounds(0.3), sounds(0.5, 0.49), sounds(1.0)]
    examples = ExampleSet([Example(wave, name=str(i)) for i, wave in enumerate(waves)])
    alone = make_answer(classifier, "first", lambda c: c.probabilities(examples))
    assert np.array_equal(classifier.probabilities(examples), alone)
    for wave in waves:
        plain = make_answer(classifier, "first", lambda c, w=wave: c.probabilities(ExampleSet([Example(w)])))
        timeline = classifier.segments(wave)
        assert np.array_equal(timeline.probabilities, plain[0])
        (segment,) = timeline.segments
        assert np.array_equal(segment.probabilities, plain[0])
        assert (segment.start, segment.end) == (0.0, timeline.seconds) == (0.0, len(wave) / RATE)
        assert segment.label == timeline.label == classifier.labels[int(plain[0].argmax())]


def make_answer(classifier, window, ask):
    """What the same model answers with other windows."""
    other = Classifier(
        classifier.model, classifier.feature_extractor, "cpu", 3, progress=False, window=window
    )
    return ask(other)


def test_a_longer_one_is_its_windows(classifier):
    wave, length = sounds(1.5, 2.0, 1.3), window_of(classifier)
    windows = Windows(length, length / 2)
    checked, _ = check_audio(ExampleSet([Example(wave, label="low", speaker="ann")]), progress=False)
    parts = cut_into_windows(checked, windows)
    expected = make_answer(classifier, "first", lambda c: c.probabilities(parts))
    timeline = classifier.segments(wave)
    starts = [segment.start for segment in timeline.segments]
    assert starts == windows.starts(4.8) and len(starts) > 3
    assert [segment.end for segment in timeline.segments] == pytest.approx([s + length for s in starts])
    found = np.array([segment.probabilities for segment in timeline.segments])
    assert found == pytest.approx(expected, abs=1e-6)
    assert [s.label for s in timeline.segments] == [classifier.labels[i] for i in found.argmax(1)]
    mean = np.average(expected.astype(np.float64), axis=0, weights=windows.shares(4.8))
    assert timeline.probabilities == pytest.approx(mean, abs=1e-6)
    assert timeline.probabilities.sum() == pytest.approx(1, abs=1e-6)
    # Labels, speakers and lengths are those of the recording, and each window has a name of its own.
    assert {(e.label, e.speaker) for e in parts} == {("low", "ann")}
    assert len({e.name for e in parts}) == len(parts)
    assert [e.seconds for e in parts] == pytest.approx([length] * len(parts))
    whole, _ = check_audio(parts, progress=False)
    assert [e.seconds for e in whole] == pytest.approx([length] * len(parts))


def test_short_and_long_ones_together_keep_their_places(backbone):
    classifier = make_classifier(backbone)
    waves = [sounds(3.1), sounds(0.4), sounds(1.0, 4.0), sounds(1.9, 0.1), sounds(2.0, 1.0, 2.5)]
    examples = ExampleSet([Example(wave, name=str(i)) for i, wave in enumerate(waves)])
    together = classifier.probabilities(examples)
    for wave, row in zip(waves, together):
        assert classifier.segments(wave).probabilities == pytest.approx(row, abs=1e-6)
    held = {}
    logits = classifier.answers(examples, done=held.__setitem__)
    assert sorted(held) == [0, 2, 4]
    assert np.array_equal(softmax(logits), together)


def test_workers_share_recordings(backbone, monkeypatch):
    classifier = make_classifier(backbone)
    examples = ExampleSet([Example(sounds(2.5 + i), seconds=2.5 + i) for i in range(5)])
    stream = WindowStream(examples, Windows(2, 1), classifier.feature_extractor, "longest")
    alone = [(item["index"], item["number"]) for item in stream]
    dealt = []
    for worker in range(2):
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr(windows_module, "get_worker_info", lambda info=info: info)
        dealt.append([(item["index"], item["number"]) for item in stream])
    assert sorted(dealt[0] + dealt[1]) == sorted(alone) and len(set(alone)) == len(alone)
    assert {index for index, _ in dealt[1]} == {1, 3}


def test_other_windows_and_none(backbone, tmp_path):
    classifier, wave = make_classifier(backbone), sounds(1.0, 1.0, 1.0)
    assert [s.start for s in classifier.segments(wave, 1.0).segments] == [0, 0.5, 1, 1.5, 2]
    assert [s.start for s in classifier.segments(wave, 1.0, 1.0).segments] == [0, 1, 2]
    assert [s.start for s in classifier.segments(wave, hop=0.6).segments] == pytest.approx([0, 0.6, 1.0])
    assert [s.start for s in make_classifier(backbone, window=1, hop=0.8).segments(wave).segments] == (
        pytest.approx([0, 0.8, 1.6, 2.0])
    )
    first = make_classifier(backbone, window="first").probabilities(ExampleSet([Example(wave)]))
    assert first[0] == pytest.approx(classifier.segments(wave[: 2 * RATE]).probabilities, abs=1e-6)
    assert np.abs(first[0] - classifier.segments(wave).probabilities).max() > 1e-3
    soundfile.write(tmp_path / "long.wav", wave, RATE)
    for window, ends in (("first", [2.0]), (None, [2.0, 3.0])):
        timelines = []
        other = make_classifier(backbone, window=window)
        predict(other, [str(tmp_path / "long.wav")], done=lambda _, found, each=timelines: each.append(found))
        assert [segment.end for segment in timelines[0].segments] == ends and timelines[0].seconds == 3
    for given, message in (
        ({"window": 2.5}, "window must be at most the 2 seconds that the model hears, got 2.5"),
        ({"window": 1, "hop": 1.5}, "hop must be above 0 and at most the window's 1 seconds, got 1.5"),
        ({"hop": 0}, "hop must be at least 0.1 seconds, got 0"),
    ):
        with pytest.raises(UserError) as error:
            classifier.segments(wave, **given)
        assert str(error.value) == message
        with pytest.raises(UserError) as error:
            make_classifier(backbone, **given)
        assert str(error.value) == message


def test_what_is_muted_does_not_count(backbone):
    classifier = make_classifier(backbone)
    wave = np.concatenate([sounds(4.0), np.zeros(6 * RATE, np.float32)])
    wave[8 * RATE] = 5e-5  # a last bit or so
    timeline = classifier.segments(wave, 2.0, 2.0)
    assert [segment.label is None for segment in timeline.segments] == [False] * 2 + [True] * 3
    assert all(np.isnan(segment.probabilities).all() for segment in timeline.segments[2:])
    heard = classifier.segments(wave[: 4 * RATE], 2.0, 2.0)
    assert timeline.probabilities == pytest.approx(heard.probabilities, abs=1e-6)
    told = timeline.as_dict()["segments"]
    assert told[3] == {"start": 6.0, "end": 8.0, "label": None, "probabilities": None}
    assert told[0]["probabilities"][timeline.segments[0].label] == pytest.approx(
        timeline.segments[0].probabilities.max()
    )
    # Of a recording without any sound the answer is that of its silence, as within a window.
    silent = classifier.segments(np.zeros(5 * RATE, np.float32), 2.0, 2.0)
    assert silent.label is not None and all(segment.label for segment in silent.segments)


def test_windows_without_sound_do_not_count_in_the_temperature():
    logits = np.array([[[9.0, 0], [0, 9.0]]], np.float32)  # the second window is muted, and wrong
    parts = {0: WindowLogits(logits[0], np.array([False, True]), np.ones(2), np.arange(2), np.arange(1, 3))}
    given, classes, weights = _windows_and_clips(logits[:, 0], np.array([0]), parts)
    assert (given.tolist(), classes.tolist(), weights.tolist()) == ([[9, 0]], [0], [1])
    with pytest.raises(UserError, match="all 1 examples are recognised"):
        fit_temperature(given, classes, weights)


def test_the_windows_of_a_classifier_are_kept_with_another_hop(backbone):
    found = make_classifier(backbone, window=0.5).segments(sounds(1.2), hop=0.25)
    assert {round(each.end - each.start, 6) for each in found.segments} == {0.5}


def test_an_output_that_is_not_finite(backbone, tmp_path):
    classifier = make_classifier(backbone)
    with torch.no_grad():
        classifier.model.classifier.bias[0] = torch.nan
    soundfile.write(tmp_path / "long.wav", sounds(5.0), RATE)
    with pytest.raises(UserError, match="long.wav is NaN or infinite"):
        classifier.segments(tmp_path / "long.wav")
    with pytest.raises(UserError, match="no file could be classified; .*long.wav: the model's output"):
        predict(classifier, [str(tmp_path / "long.wav")])


def test_pooling_counts_seconds():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    logits = np.log(probabilities) + [[5], [-3], [0]]
    assert np.exp(pool(logits, np.array([1.0, 3.0, 0.0]))) == pytest.approx([0.375, 0.625])
    assert np.exp(pool(logits[:1], np.array([30.0]))) == pytest.approx(probabilities[0])
    # Far below the least float.
    assert pool(np.array([[0.0, -2000.0], [0.0, -1000.0]]), np.ones(2)) == pytest.approx(
        [0, -1000 - np.log(2)]
    )
    assert np.isnan(pool(np.array([[0.0, np.nan], [0.0, 1.0]]), np.ones(2))).any()


@pytest.mark.parametrize(("classes", "rejected"), [(8, False), (11, False), (11, True)])
def test_a_figure_shows_of_each_part_whether_a_class_is_said(classes, rejected, tmp_path, monkeypatch):
    """Of more classes than there are colours too; what is rejected alone stays white."""
    original, figures = plots.drawing, []

    @contextmanager
    def drawing(*arguments):
        with original(*arguments) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(plots, "drawing", drawing)
    logits = 5 * np.eye(classes, dtype=np.float32)
    logits[-1] *= not rejected
    windows = Windows(1.0)
    found = WindowLogits.of(logits, np.zeros(classes, bool), windows, float(classes))
    labels = [f"class {number}" for number in range(classes)]
    timeline = Timeline.of(labels, float(classes), found.pooled(), found)
    plots.plot_timeline(timeline, tmp_path / "time.svg", reject_below=0.5 if rejected else None)
    lines, strip = figures[0].axes
    parts = sorted((each.get_x(), each.get_x() + each.get_width()) for each in strip.patches)
    assert parts == [(number, number + 1) for number in range(classes - rejected)]
    told = [text.get_text().strip() for text in lines.get_legend().get_texts()]
    assert ("another class" in told) == (classes > 8)
    assert sum(bool(each.get_hatch()) for each in strip.patches) == classes - 8 - rejected
