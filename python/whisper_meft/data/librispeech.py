"""LibriSpeech and what is laid out like it: a file of transcripts in the folder of each chapter."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..audio import READABLE_SUFFIXES
from ..errors import UserError
from ..files import lines_of
from .examples import Example, listing
from .folders import subfolders
from .options import Options
from .splits import Splits
from .tables import read_text

_ENDING = ".trans.txt"


def librispeech_splits(path: Path) -> dict[str | None, Path]:
    """The folders of splits (``train-clean-100``) by name, or ``path`` itself under ``None``; empty where
    ``path`` is no such tree. Looks into one chapter of each split alone."""
    if _has_chapters(path):
        return {None: path}
    return {folder.name: folder for folder in subfolders(path) if _has_chapters(folder)}


def _has_chapters(split: Path) -> bool:
    """Whether the first chapter of the first speaker has transcripts."""
    speaker = next(iter(subfolders(split)), None)
    chapter = next(iter(subfolders(speaker)), None) if speaker else None
    return chapter is not None and any(name.endswith(_ENDING) for name in os.listdir(chapter))


def read_librispeech(path: Path, options: Options) -> Splits:
    """The splits of a LibriSpeech tree.

    Raises:
        UserError: it is no such tree, or labels are wanted, of which it has none.
    """
    splits = librispeech_splits(path)
    if not splits:
        raise UserError(f"{path} is not LibriSpeech: <split>/<speaker>/<chapter>/*{_ENDING} is accepted")
    if options.require_labels:
        raise UserError(f"{path} is LibriSpeech, which has transcripts and no labels (--task transcribe)")
    return {name: (lambda folder=folder: _read_split(folder)) for name, folder in splits.items()}


def _read_split(split: Path) -> list[Example]:
    return [
        example
        for speaker in subfolders(split)
        for chapter in subfolders(speaker)
        for example in _read_chapter(chapter, speaker.name)
    ]


def _read_chapter(chapter: Path, speaker: str) -> Iterator[Example]:
    """The utterances of a chapter: lines of an id, a space and a transcript.

    Raises:
        UserError: no transcripts, an id given twice, or audio and transcripts that are not of each other.
    """
    tables = sorted(name for name in os.listdir(chapter) if name.endswith(_ENDING))
    audio = {
        os.path.splitext(name)[0]: chapter / name
        for name in sorted(os.listdir(chapter))
        if os.path.splitext(name)[1].lower() in READABLE_SUFFIXES and not name.startswith(".")
    }
    texts: dict[str, str] = {}
    for table in tables:
        for number, line in enumerate(lines_of(read_text(chapter / table)), 1):
            if not line.strip():
                continue
            name, _, text = line.strip().partition(" ")
            if name in texts:
                raise UserError(f"{chapter / table}, line {number}: the id {name} is given twice")
            texts[name] = text.strip()
    without = sorted(audio.keys() - texts.keys())
    if without:
        raise UserError(f"{chapter} has audio without a transcript: {listing(without, 3)}")
    silent = sorted(texts.keys() - audio.keys())
    if silent:
        raise UserError(f"{chapter} has transcripts without audio: {listing(silent, 3)}")
    for name, text in texts.items():
        yield Example(os.fspath(audio[name]), speaker=speaker, text=text)
