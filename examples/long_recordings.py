"""How right a classifier is on recordings longer than its clips, and what answers for the whole.

Clips of a table are joined, those of a class into recordings of one class, some of each into one that goes
from class to class. Asked are the first window alone, the mean of the windows' probabilities (what predict
gives), their product, and a vote of the windows.

    python examples/long_recordings.py MODEL_DIR TABLE --work DIR [--seconds 30] [--window 5] [--hop 5]
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
from whisper_meft.data import Example, ExampleSet, check_known_labels, load_examples
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.evaluation.plots import plot_timeline
from whisper_meft.evaluation.timeline import Timeline, WindowLogits
from whisper_meft.files import write_json
from whisper_meft.options.inference import InferenceArguments

RATE = 16_000


def join(examples: ExampleSet, seconds: float, folder: Path) -> tuple[list[Example], Path, list[tuple]]:
    """Recordings of one class, each of so many seconds at least; the file of one that changes its class; and
    (class, start, end) of each part of that."""
    waves = defaultdict(list)
    for example in examples:
        waves[example.label].append(example.read(RATE)[0])
    recordings, parts, mixed, at = [], [], [], 0
    for label, clips in sorted(waves.items()):
        first, held = True, []
        for clip in clips:
            held.append(clip)
            if sum(map(len, held)) >= seconds * RATE:
                wave = np.concatenate(held)
                recordings.append(Example(wave, label=label, name=f"{label} {len(recordings)}"))
                if first:
                    mixed.append(wave)
                    parts.append((label, at / RATE, (at + len(wave)) / RATE))
                    at += len(wave)
                first, held = False, []
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "mixed.flac", np.concatenate(mixed), RATE)
    with open(folder / "mixed.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "start", "end"), *parts])
    return recordings, folder / "mixed.flac", parts


def answers_of(found: WindowLogits) -> dict[str, int]:
    """The class that each way says."""
    votes = np.bincount(found.logits.argmax(1), found.weights, found.logits.shape[1])
    return {
        "first window": int(found.logits[0].argmax()),
        "mean of probabilities": int(found.pooled().argmax()),
        # The sum of their logs differs from that of logits by the same for all classes.
        "product of probabilities": int(np.average(found.logits, axis=0, weights=found.weights).argmax()),
        "vote of windows": int(votes.argmax()),
    }


def score_recordings(classifier: Classifier, recordings: list[Example]) -> dict[str, float]:
    """Of each way the share of recordings that it is right about, and of all windows that of those."""
    held: dict[int, WindowLogits] = {}
    classifier.answers(ExampleSet(recordings, "recordings of one class"), done=held.__setitem__)
    right, windows = defaultdict(list), []
    for index, found in held.items():
        label = classifier.labels.index(recordings[index].label)
        windows += (found.logits.argmax(1) == label).tolist()
        for name, answer in answers_of(found).items():
            right[name].append(answer == label)
    return {
        "recordings": len(held),
        "windows": len(windows),
        "a window": float(np.mean(windows)),
        **{name: float(np.mean(each)) for name, each in right.items()},
    }


def score_timeline(timeline: Timeline, parts: list[tuple]) -> dict[str, float]:
    """How a recording that changes its class is told: the share of windows right of those within a part, and
    by how much the probabilities of the whole differ from the shares of the time, on average over classes."""
    inside = []
    for segment in timeline.segments:
        label = next((name for name, a, b in parts if a <= segment.start and segment.end <= b), None)
        if label is not None:
            inside.append(segment.label == label)
    share = dict.fromkeys(timeline.labels, 0.0)
    for name, start, end in parts:
        share[name] += (end - start) / timeline.seconds
    error = np.abs(timeline.probabilities - np.array([share[name] for name in timeline.labels])).mean()
    right = float(np.mean(inside))
    return {"windows within a class": len(inside), "of them right": right, "error of shares": float(error)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", help="a trained model that classifies")
    parser.add_argument("table", help="labelled clips that it was not trained on")
    parser.add_argument("--work", type=Path, required=True, help="folder for recordings and results")
    parser.add_argument("--seconds", type=float, default=30, help="least length of a recording")
    parser.add_argument("--window", type=float, default=5, help="seconds of a window")
    parser.add_argument("--hop", type=float, default=5, help="seconds from window to window")
    given = parser.parse_args(argv)
    arguments = InferenceArguments(window=given.window, hop=given.hop)
    classifier = Classifier.load(given.model_dir, arguments, progress=False)
    examples = load_examples(given.table)
    check_known_labels(examples, classifier.labels)
    recordings, mixed, parts = join(examples, given.seconds, given.work)
    timeline = classifier.segments(mixed)
    plot_timeline(timeline, given.work / "mixed.svg", "one recording, a new class every half minute or so")
    found = {**score_recordings(classifier, recordings), **score_timeline(timeline, parts)}
    write_json(given.work / "results.json", found)
    for name, value in found.items():
        print(f"{name:<26}{value if isinstance(value, int) else f'{value:.3f}'}")


if __name__ == "__main__":
    main()
