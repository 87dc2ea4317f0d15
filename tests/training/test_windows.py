"""Training on windows of clips that are longer than the model hears."""

import csv
import json

import numpy as np
import pytest
import torch
from training_fixtures import RATE, TONES, make_backbone, tone, train_command
from whisper_meft.audio.windows import Windows
from whisper_meft.commands.cli import main
from whisper_meft.data import Example, ExampleSet, cut_into_windows, load_examples, split_by_speaker
from whisper_meft.data.windows import recordings_of
from whisper_meft.errors import UserError
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.evaluation.scoring import evaluate
from whisper_meft.feature_cache.key import clip_fingerprint
from whisper_meft.options.inference import InferenceArguments
from whisper_meft.training.tasks.classification import Recordings, scores_of

soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, with a window of 1 s, and train.csv: of each class two clips of each of three speakers, of
    0.6 and 2.5 s; of long ones the first second is noise."""
    folder = tmp_path_factory.mktemp("windows")
    make_backbone(folder / "backbone")
    rng = np.random.default_rng(0)
    with open(folder / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "speaker"])
        for label, frequency in TONES.items():
            for speaker in range(3):
                noise = 0.1 * rng.standard_normal(RATE).astype(np.float32)
                clips = tone(frequency, 0.6, rng), np.concatenate([noise, tone(frequency, 1.5, rng)])
                for number, wave in enumerate(clips):
                    soundfile.write(folder / f"{label}{speaker}{number}.wav", wave, RATE)
                    writer.writerow([f"{label}{speaker}{number}.wav", label, f"{label}-{speaker}"])
    return folder


def trained(work, out, **options):
    options = {"num_train_epochs": 6, "max_frames": "longest", "validation_fraction": 0.3, **options}
    return main(train_command(work / "backbone", work / "train.csv", out, **options))


def results_of(folder, name="train"):
    return json.loads((folder / f"{name}_results.json").read_text())


def test_windows_of_long_clips_are_examples_and_recordings_are_scored(work, tmp_path, capsys):
    out = tmp_path / "out"
    assert trained(work, out, window=1, hop=0.75) == 0
    said = capsys.readouterr().out
    # Of each class two speakers with a short clip and one of three windows train; one is set aside.
    assert "training on 24 examples of 3 classes, windows of 12 recordings" in said
    assert "high: 8, low: 8, middle: 8" in said
    assert "evaluating on 12 examples" in said
    results = results_of(out)
    assert results["train_examples"] == 24 and results["windows"] == {"length": 1.0, "hop": 0.75}
    scores = results_of(out, "eval")
    assert sum(map(sum, scores["confusion_matrix"])) == 6  # recordings, not windows
    text = (out / "README.md").read_text()
    assert "12 examples, 0.3 minutes, 6 speakers; cut into 24 windows of 1 s, one every 0.75 s" in text
    assert "6 examples, 0.2 minutes, 3 speakers; cut into 12 windows" in text and ", 6 examples |" in text
    # Scored as evaluate does it, in the same windows.
    arguments = InferenceArguments(window="1", hop=0.75)
    classifier = Classifier.load(out, arguments, progress=False)
    # Those that were set aside, which the same seed chooses again.
    _, held = split_by_speaker(load_examples(str(work / "train.csv")), 0.3, 1)
    again, _ = evaluate(classifier, held)
    assert again.as_dict()["confusion_matrix"] == scores["confusion_matrix"]


def test_a_feature_cache_holds_windows(work, tmp_path, capsys):
    where = [f"--model_name_or_path={work / 'backbone'}", f"--train_data={work / 'train.csv'}"]
    how = ["--window=1", "--validation_fraction=0.3", "--max_frames=longest", "--seed=1", "--disable_tqdm"]
    assert main(["cache", *where, *how, "--reduction_factor=2", f"--output_dir={tmp_path / 'cache'}"]) == 0
    # Windows at 0, 1 and 1.5 of nine clips, and nine short ones.
    assert "holds 36 clips" in capsys.readouterr().out
    options = {
        "window": 1,
        "cache_features": tmp_path / "cache",
        "num_train_epochs": 2,
        "cache_storage": None,
    }
    assert trained(work, tmp_path / "cached", **options) == 0
    assert "holds" not in capsys.readouterr().err
    assert trained(work, tmp_path / "plain", window=1, num_train_epochs=2) == 0
    cached, plain = (results_of(tmp_path / name)["train_loss"] for name in ("cached", "plain"))
    assert cached == pytest.approx(plain, rel=2e-2)  # states are kept in 16 bits


def test_what_tells_windows_apart_in_a_cache(work):
    path = work / "low00.wav"
    whole = Example(str(path), seconds=2.5)
    parts = cut_into_windows(ExampleSet([whole]), Windows(1.0))
    prints = [clip_fingerprint(each) for each in (whole, *parts)]
    assert len(set(prints)) == len(prints) == 4
    assert "window" not in prints[0]  # caches that are there already stay good


def test_resuming_with_other_windows_is_refused(work, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "epoch"}
    assert trained(work, out, window=1, hop=0.75, **options) == 0
    options |= {"num_train_epochs": 2, "resume_from_checkpoint": True}
    assert trained(work, out, window=1, hop=0.76, **options) == 1
    assert "windows 1 s every 0.75 s (now 1 s every 0.76 s)" in capsys.readouterr().err
    assert trained(work, out, window=1, hop=0.75, **options) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 2}, "window must be at most the 1 seconds that the model hears, got 2"),
        ({"window": 31}, "--window must be at most the 30 seconds that the model hears, got 31"),
        ({"window": 0.7, "max_frames": 25}, "window must be at most the 0.5 seconds that the model hears"),
        ({"window": 1, "hop": 2}, "--hop must be above 0 and at most the window's 1 seconds, got 2"),
        ({"hop": 0.5}, "--hop 0.5 is from window to window: give --window too"),
    ],
)
def test_windows_that_cannot_be(work, tmp_path, capsys, options, message):
    assert trained(work, tmp_path / "out", **options) != 0
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"whisper-meft: error: {message}") and "\n" not in error


def test_which_windows_belong_together():
    rng = np.random.default_rng(0)
    sounds = [tone(300, seconds, rng) for seconds in (2.5, 2.5, 0.5)]
    examples = ExampleSet(
        [
            Example({"array": sound, "sampling_rate": RATE}, "a", name=f"{number}", seconds=len(sound) / RATE)
            for number, sound in enumerate(sounds)
        ]
    )
    parts = cut_into_windows(examples, Windows(1.0))
    assert recordings_of(parts) == [[0, 1, 2], [3, 4, 5], [6]]
    assert recordings_of(examples) == [[0], [1], [2]]
    assert Recordings.of(examples, RATE) is None
    found = Recordings.of(parts, RATE)
    assert found.seconds[0] == pytest.approx([1, 0.75, 0.75])
    # The first recording's last two windows have it, the second's first is sure; each counts its seconds.
    probabilities = np.array(
        [[0.9, 0.1], [0.2, 0.8], [0.2, 0.8], [0.99, 0.01], [0.45, 0.55], [0.45, 0.55], [0.5, 0.6]]
    )
    scores = scores_of(np.log(probabilities), np.array([1, 1, 1, 0, 0, 0, 1]), ["a", "b"], found)
    assert np.asarray(scores.confusion).tolist() == [[1, 0], [0, 2]]
    broken = np.log(probabilities)
    broken[1, 0] = np.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        scores_of(broken, np.zeros(7, int), ["a", "b"], found)
    assert torch.tensor(found.seconds[2]).item() == 1
    sounds[0][RATE:] = 0  # nothing to hear in the second window and the third
    assert Recordings.of(parts, RATE).seconds[0] == pytest.approx([1, 0, 0])
    sounds[0][:] = 0
    assert Recordings.of(parts, RATE).seconds[0] == pytest.approx([1, 0.75, 0.75])


@pytest.mark.parametrize("hop", [0.3, 0.9, 1 / 3])
def test_the_same_place_is_the_same_window_with_any_hop(work, hop):
    whole = ExampleSet([Example(str(work / "low01.wav"), seconds=2.5)])
    tenths = {each.name: clip_fingerprint(each) for each in cut_into_windows(whole, Windows(1.0, 0.1))}
    for each in cut_into_windows(whole, Windows(1.0, hop)):
        assert tenths.get(each.name, clip_fingerprint(each)) == clip_fingerprint(each)
        assert each.seconds <= 1.0  # a rounding above that is a clip too long for the model


def test_batches_by_length_leave_windows_with_their_recordings(work, tmp_path):
    """Transformers' own way to sort by length sorts the evaluation data too."""
    scores = []
    for name, options in (("plain", {}), ("by_length", {"train_sampling_strategy": "group_by_length"})):
        assert trained(work, tmp_path / name, window=1, hop=0.5, num_train_epochs=1, **options) == 0
        classifier = Classifier.load(tmp_path / name, InferenceArguments(window="1", hop=0.5), progress=False)
        _, held = split_by_speaker(load_examples(str(work / "train.csv")), 0.3, 1)
        scores.append(evaluate(classifier, held)[0].as_dict()["confusion_matrix"])
        assert results_of(tmp_path / name, "eval")["confusion_matrix"] == scores[-1]
