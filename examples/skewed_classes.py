"""What weights, the focal loss and balanced sampling do on classes that come 20:1.

Synthetic accents of the shipped backbone, so that it runs anywhere: its scores say nothing about people. Each
of the options trains from the same feature cache with the same budget, the last weights are scored on a test
set in which all classes come equally often, and nothing is chosen on that.

    python examples/skewed_classes.py --work DIR [--clips 200] [--seeds 3] [--epochs 20]
"""

import argparse
import contextlib
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from whisper_meft.files import write_json
from whisper_meft.options.training import parsed_options
from whisper_meft.synthetic.shipped import shipped_backbone
from whisper_meft.synthetic.speech import make_accent_corpus
from whisper_meft.training.run import train

RATIO = 20
OPTIONS = {
    "plain": {},
    "class_weights inverse_sqrt": {"class_weights": "inverse_sqrt"},
    "class_weights balanced": {"class_weights": "balanced"},
    "loss focal": {"loss": "focal"},
    "loss focal, class_weights balanced": {"loss": "focal", "class_weights": "balanced"},
    "sampling balanced": {"sampling": "balanced"},
}


def skew(corpus: Path, ratio: float) -> Path:
    """A table of the corpus' training clips in which each class has fewer than the one before, the last one
    ``ratio`` times as few as the first; evenly spaced, so that all have the same speakers."""
    with open(corpus / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in rows})
    kept = []
    for number, label in enumerate(labels):
        own = [row for row in rows if row["label"] == label]
        count = max(1, round(len(own) * ratio ** (-number / (len(labels) - 1))))
        kept += [own[int(place)] for place in np.linspace(0, len(own) - 1, count)]
    table = corpus / "skewed.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "label", "speaker"])
        writer.writeheader()
        writer.writerows(kept)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus, runs and results")
    parser.add_argument("--clips", type=int, default=200, help="training clips of the most frequent class")
    parser.add_argument("--test_clips", type=int, default=50, help="test clips of each class")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each option")
    parser.add_argument("--epochs", type=int, default=20, help="of each run")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # the shipped model is too small to gain from a second one
    corpus = make_accent_corpus(
        given.work / "corpus",
        train_clips_per_class=given.clips,
        test_clips_per_class=given.test_clips,
        seed=0,
    )
    table, results = skew(corpus, RATIO), {}
    for name, options in OPTIONS.items():
        recalls, seconds = [], []
        for seed in range(given.seeds):
            folder = given.work / "runs" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            arguments = parsed_options(
                {
                    "model_name_or_path": shipped_backbone(),
                    "method": "lst",
                    "reduction_factor": 4,
                    "adapter_dim": 32,
                    "learning_rate": 3e-3,
                    "train_data": table,
                    "eval_data": corpus / "test.csv",
                    "cache_features": given.work / "states",
                    "output_dir": folder,
                    "num_train_epochs": given.epochs,
                    "per_device_train_batch_size": 16,
                    "save_strategy": "no",
                    "eval_strategy": "steps",
                    "eval_steps": 10**6,  # at the end alone
                    "seed": seed,
                    "disable_tqdm": True,
                    "overwrite_output_dir": True,
                    **options,
                }
            )
            started = time.process_time()
            with contextlib.redirect_stdout(None):
                scores = train(*arguments).scores
            seconds.append(time.process_time() - started)
            recalls.append(scores.per_class_accuracy.tolist())
        means, by_class = np.mean(recalls, axis=1), np.mean(recalls, axis=0)
        results[name] = {"recalls": recalls, "cpu_seconds": seconds}
        shown = " ".join(f"{recall:6.1%}" for recall in by_class)
        print(
            f"{name:<36} mean recall {means.mean():6.1%} +- {means.std():.1%}   by class {shown}   "
            f"{min(seconds):.1f} CPU s",
            flush=True,
        )
    write_json(
        given.work / "results.json", {"settings": json.loads(json.dumps(vars(given), default=str)), **results}
    )


if __name__ == "__main__":
    main()
