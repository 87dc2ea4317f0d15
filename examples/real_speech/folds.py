"""The tasks of the study as manifests, divided into folds over speakers.

A task with no test set of its own is divided so that every speaker is tested in exactly one fold: a fold's
test speakers are a fifth of each class, and of the others a fifth of each class is its validation data. Which
speakers these are depends on their names and on nothing else.
"""

import csv
import io
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from whisper_meft.errors import UserError
from whisper_meft.files import write_text

FOLDS = 5
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Clip:
    """A row of a manifest: the file, its class, who speaks, and how long."""

    path: Path
    label: str
    speaker: str
    seconds: float

    @property
    def key(self) -> str:
        """What records call the clip: the file's name, which no folder is part of."""
        return self.path.stem


@dataclass(frozen=True)
class Task:
    """Clips to be told apart.

    Attributes:
        folder, prefix: the manifests are ``<folder>/<prefix>{train,dev,test}.csv``.
        own_split: whether these three are kept; otherwise they are put together and divided anew.
        limits: what must be said with every figure.
    """

    folder: str
    prefix: str
    own_split: bool
    title: str
    limits: str


TASKS = {
    "accents": Task(
        "english_accents_saa",
        "l1_",
        False,
        "accent of English, nine first languages",
        "one clip a speaker, the first 8 s of one paragraph that all read, from a copy at 8 kHz; labels "
        "checked by machine only",
    ),
    "countries": Task(
        "english_accents_saa",
        "native_",
        False,
        "native English by country",
        "as above; few clips of some countries, so that chance is far above a quarter",
    ),
    "languages": Task(
        "languages_debian",
        "",
        True,
        "ten languages",
        "one or two voices per language in training, other corpora in the test: it can be solved as speaker "
        "or corpus identification, and validation clips share speakers with training",
    ),
}


def read_manifest(path: Path) -> list[Clip]:
    """The clips of a CSV manifest with the columns path, label, speaker, seconds.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [Clip(path.parent / r["path"], r["label"], r["speaker"], float(r["seconds"])) for r in rows]
    except OSError as error:
        raise UserError(f"--speech: cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--speech: {path} must have the columns path, label, speaker and seconds: {error}"
        ) from error


def load_task(speech: Path, name: str) -> dict[str, list[Clip]]:
    """The clips of a task by the split that its manifests put them in.

    Raises:
        UserError: a manifest cannot be read.
    """
    task = TASKS[name]
    return {split: read_manifest(speech / task.folder / f"{task.prefix}{split}.csv") for split in SPLITS}


def deal(clips: Iterable[Clip], parts: int, seed: str) -> dict[str, int]:
    """Which of ``parts`` each speaker goes to, so that each part has a like share of every class.

    A speaker of several classes is dealt once, with the class that comes first in the alphabet.
    """
    by_class: dict[str, set[str]] = defaultdict(set)
    seen: set[str] = set()
    for clip in sorted(clips, key=lambda clip: (clip.label, clip.speaker)):
        if clip.speaker not in seen:
            seen.add(clip.speaker)
            by_class[clip.label].add(clip.speaker)
    part, place = {}, 0
    for label, speakers in sorted(by_class.items()):
        order = sorted(speakers)
        random.Random(f"{seed} {label}").shuffle(order)
        for speaker in order:
            part[speaker] = place % parts
            place += 1
    return part


def folds(splits: dict[str, list[Clip]], own_split: bool) -> list[dict[str, list[Clip]]]:
    """Training, validation and test clips of each fold; one fold where the task keeps its own split."""
    if own_split:
        return [splits]
    clips = sorted((clip for part in splits.values() for clip in part), key=lambda clip: clip.key)
    tested = deal(clips, FOLDS, "test")
    found = []
    for fold in range(FOLDS):
        rest = [clip for clip in clips if tested[clip.speaker] != fold]
        validated = deal(rest, FOLDS, f"validation {fold}")
        found.append(
            {
                "train": [clip for clip in rest if validated[clip.speaker] != 0],
                "dev": [clip for clip in rest if validated[clip.speaker] == 0],
                "test": [clip for clip in clips if tested[clip.speaker] == fold],
            }
        )
    return found


def write_manifests(fold: dict[str, list[Clip]], folder: Path) -> None:
    """``folder/{train,dev,test}.csv``, which the readers of `whisper-meft train` take."""
    for split, clips in fold.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "speaker"])
        writer.writerows([str(clip.path.resolve()), clip.label, clip.speaker] for clip in clips)
        path = folder / f"{split}.csv"
        if not path.is_file() or path.read_text(encoding="utf-8") != text.getvalue():
            write_text(path, text.getvalue())
