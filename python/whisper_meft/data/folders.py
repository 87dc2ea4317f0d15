"""Folders of audio whose subfolders are the classes."""

import os
from pathlib import Path

from ..audio import READABLE_SUFFIXES, UNREADABLE_SUFFIXES
from ..errors import UserError
from .examples import Example, listing
from .options import Options
from .splits import CANONICAL, Splits

AUDIO_SUFFIXES = READABLE_SUFFIXES | UNREADABLE_SUFFIXES

TABLE_SUFFIXES = (".csv", ".tsv", ".txt")


def list_audio_files(folder: str | os.PathLike) -> list[str]:
    """Every file under ``folder`` with the suffix of an audio format, also of unreadable ones, sorted.

    Names that begin with a dot are passed over; links are followed once.

    Raises:
        UserError: the folder is missing or cannot be listed.
    """
    found, seen, waiting = [], set(), [os.fspath(folder)]
    while waiting:
        current = waiting.pop()
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in seen:  # a link back to a parent
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    if os.path.isdir(entry.path):  # unlike entry.is_dir(), content with a link to itself
                        waiting.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower() in AUDIO_SUFFIXES:
                        found.append(entry.path)
        except OSError as error:
            raise UserError(f"cannot list {current}: {error.strerror or error}") from error
    return sorted(found)


def subfolders(path: Path) -> list[Path]:
    return sorted(
        p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX"
    )


def read_audio_folder(path: Path, options: Options) -> Splits:
    folders = subfolders(path)
    splits = [p for p in folders if p.name.lower() in CANONICAL and subfolders(p)]
    if not splits:
        return {None: lambda: _labelled_by_folder(path)}
    others = [p.name for p in folders if p not in splits and list_audio_files(p)]
    if others:
        raise UserError(
            f"{path} mixes split folders ({listing(p.name for p in splits)}) with other folders of audio "
            f"({listing(others)}): keep label folders inside the split folders"
        )
    return {p.name: (lambda p=p: _labelled_by_folder(p)) for p in splits}


def _labelled_by_folder(path: Path) -> list[Example]:
    folder = os.fspath(path)
    examples = []
    for file in list_audio_files(folder):
        parts = os.path.relpath(file, folder).split(os.sep)
        examples.append(Example(file, label=parts[0].strip() if len(parts) > 1 else None))
    if not examples:
        tables = [p.name for p in path.iterdir() if p.suffix.lower() in (*TABLE_SUFFIXES, ".json", ".jsonl")]
        hint = f"; it holds {listing(tables, 3)}, if that is a manifest give its path" if tables else ""
        raise UserError(f"no audio files were found under {path}{hint}")
    return examples
