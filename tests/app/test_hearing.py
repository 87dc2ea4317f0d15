"""What is answered to a recording that somebody sends, and what is refused."""

import re

import numpy as np
import pytest
import torch
from page_fixtures import RATE, load_classifier, make_model, sound
from recogniser_fixtures import make_recogniser, noise
from whisper_meft import UserError
from whisper_meft.app.hearing import Classified, Listener, duration
from whisper_meft.data import Example, ExampleSet
from whisper_meft.evaluation.transcriber import Transcriber
from whisper_meft.options.inference import InferenceArguments

soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return load_classifier(make_model(tmp_path_factory.mktemp("hearing")))


def written(path, wave, rate=RATE, **options):
    soundfile.write(path, wave, rate, **options)
    return path


def probabilities(classifier, path):
    return classifier.probabilities(ExampleSet([Example(audio=str(path))]))[0]


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_the_answer_is_the_classifiers(classifier, tmp_path, rate):
    path = written(tmp_path / "short.wav", sound(0.3, 0.4), rate)
    heard = Listener(classifier).hear(path)
    assert np.array_equal(heard.timeline.probabilities, probabilities(classifier, path))
    assert heard.label == classifier.labels[int(heard.timeline.probabilities.argmax())]
    assert len(heard.timeline.segments) == 1 and not heard.rejected and heard.threshold is None
    assert heard.timeline.seconds == pytest.approx(0.7 * RATE / rate, abs=1e-3)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3"])
def test_longer_recordings_are_answered_over_time(classifier, tmp_path, form):
    path = written(tmp_path / f"long.{form}", sound(1.1, 0.9, 1.25))
    heard = Listener(classifier).hear(path)
    assert np.array_equal(heard.timeline.probabilities, probabilities(classifier, path))
    segments = heard.timeline.segments
    assert len(segments) > 4 and segments[0].start == 0
    assert segments[-1].end == pytest.approx(3.25, abs=0.11)


def test_what_is_not_probable_enough_is_rejected(classifier, tmp_path):
    path = written(tmp_path / "a.wav", sound(0.5))
    best = float(probabilities(classifier, path).max())
    for threshold, rejected in ((best, False), (np.nextafter(best, 1), True), (0.0, False)):
        heard = Listener(classifier, reject_below=threshold, reject_label="other").hear(path)
        assert heard.rejected is rejected and (heard.label == "other") is rejected


def test_the_limit_is_of_seconds_at_any_rate(classifier, tmp_path):
    listener = Listener(classifier, max_seconds=2)
    for rate in (8000, RATE, 44100):
        exact = written(tmp_path / "exact.wav", np.resize(sound(2.0), 2 * rate), rate)
        assert isinstance(listener.hear(exact), Classified)
        over = written(tmp_path / "over.wav", np.resize(sound(2.0), int(2.02 * rate)), rate)
        with pytest.raises(UserError, match="^over.wav is longer than 2 seconds, the most that this page"):
            listener.hear(over)


def test_no_more_is_decoded_than_is_accepted(classifier, tmp_path, monkeypatch):
    # Minutes of silence in few bytes: what would take long to decode to its end.
    path = written(tmp_path / "bomb.flac", np.zeros(RATE * 600, np.float32))
    assert path.stat().st_size < 200_000
    decoded = []
    read = soundfile.SoundFile.read

    def counted(self, frames=-1, *args, **options):
        decoded.append(frames)
        return read(self, frames, *args, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    with pytest.raises(UserError, match="is longer than 3 seconds"):
        Listener(classifier, max_seconds=3).hear(path)
    assert 3 * RATE < sum(decoded) <= 4 * RATE


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.wav", b"", "empty.wav is empty (0 bytes)"),
        ("text.wav", b"no audio at all, <b>but text</b>", "text.wav cannot be read as audio"),
        ("video.wav", b"\0\0\0\x20ftypisom" + bytes(200), "video.wav is MPEG-4 audio (m4a, mp4)"),
        ("recorder.webm", b"\x1aE\xdf\xa3" + bytes(200), "recorder.webm is WebM or Matroska audio"),
        ("half.wav", None, "half.wav"),
        ("\x1b[31m\nred.wav", b"", r"\x1b[31m\nred.wav is empty (0 bytes)"),
    ],
)
def test_what_cannot_be_read_is_said_without_its_folder(classifier, tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is None:
        whole = written(tmp_path / "whole.wav", sound(1.0)).read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Listener(classifier).hear(path)
    said = str(caught.value)
    assert said.startswith(sentence) and str(tmp_path) not in said and "\n" not in said


def test_a_microphone_that_is_off(classifier, tmp_path):
    for level in (0.0, 2.0**-17):
        path = written(tmp_path / "audio.wav", np.full(RATE, level, np.float32), subtype="FLOAT")
        with pytest.raises(UserError, match=re.escape("holds nothing but silence: is the microphone on?")):
            Listener(classifier).hear(path)
    quiet = written(tmp_path / "quiet.wav", 1e-3 * sound(1.0))
    assert isinstance(Listener(classifier).hear(quiet), Classified)


def test_outputs_that_are_no_numbers(tmp_path):
    classifier = load_classifier(make_model(tmp_path))
    with torch.no_grad():
        classifier.model.classifier.bias.fill_(float("nan"))
    path = written(tmp_path / "a.wav", sound(0.5))
    with pytest.raises(UserError, match="output for a.wav is NaN or infinite"):
        Listener(classifier).hear(path)


def test_a_model_that_transcribes(tmp_path):
    folder = make_recogniser(tmp_path / "whisper")
    transcriber = Transcriber.load(folder, InferenceArguments(device="cpu"), progress=False)
    for seconds in (0.8, 1.7):
        path = noise(tmp_path / "n.wav", seconds)
        expected, _ = transcriber.transcribe(ExampleSet([Example(audio=str(path))]))
        heard = Listener(transcriber).hear(path)
        assert heard.transcript == expected[0] and heard.seconds == pytest.approx(seconds)


def test_durations_for_people():
    said = [duration(seconds) for seconds in (0.5, 1, 60, 90, 100.5, 120, 600, 3600)]
    assert said == [
        "0.5 seconds",
        "1 second",
        "1 minute",
        "90 seconds",
        "100.5 seconds",
        "2 minutes",
        "10 minutes",
        "60 minutes",
    ]
