"""Folders of audio whose subfolders are the classes."""

import os
from pathlib import Path

from ..audio import READABLE_SUFFIXES, UNREADABLE_SUFFIXES
from ..errors import UserError
from ..once import warn_once
from .examples import Example, listing, say_forms
from .options import Options
from .splits import Splits, split_level
from .tables import tables_in

_NOISE = "_background_noise_"  # what Speech Commands calls the folder of its recordings of no class

AUDIO_SUFFIXES = READABLE_SUFFIXES | UNREADABLE_SUFFIXES


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
    """The folders in a folder, sorted; names that begin with a dot are passed over."""
    with os.scandir(path) as entries:
        # Only of links it must be asked what they are; a folder may hold a million files.
        inside = [e.name for e in entries if (os.path.isdir(e.path) if e.is_symlink() else e.is_dir())]
    return [path / name for name in sorted(inside) if name[0] != "." and name != "__MACOSX"]


def read_audio_folder(path: Path, options: Options) -> Splits:
    """The examples of ``<class>/**``, ``<split>/<class>/**`` or ``<class>/**/<split>/**`` by split; a folder
    of noise beside the classes, as in Speech Commands, is left out with a warning.

    Raises:
        UserError: it is not certain which of these it is, or there is no audio.
    """
    files = [(file, os.path.relpath(file, path).split(os.sep)[:-1]) for file in list_audio_files(path)]
    if not files:
        tables = [table.name for table in tables_in(path)]
        hint = f"; it holds {listing(tables, 3)}, if that is a manifest give its path" if tables else ""
        raise UserError(f"no audio files were found under {path}{hint}")
    classed = [(file, folders) for file, folders in files if _NOISE not in folders]
    if 0 < len(classed) < len(files):
        warn_once(
            f"{path}: {len(files) - len(classed)} files in {_NOISE} are left out, as whoever reads "
            "Speech Commands leaves them out (rename that folder if it is a class)"
        )
        files = classed
    if options.with_text:
        raise UserError(
            f"{path} is a folder of audio without transcripts: give a manifest with a column of text, a "
            "Kaldi folder with its file text, or LibriSpeech with its *.trans.txt"
        )
    if options.columns():
        warn_once(f"{path} is read by its folders, without the columns {listing(options.columns())}")
    level = split_level([tuple(folders) for _, folders in files], options.layout, os.fspath(path))
    found: dict[str | None, list[Example]] = {}
    for file, folders in files:
        split = folders[level] if level is not None and len(folders) > level else None
        classes = folders[1:] if level == 0 else folders
        found.setdefault(split, []).append(Example(file, label=classes[0].strip() if classes else None))
    say_forms([name for _, folders in files for name in folders[level == 0 :][:1]], os.fspath(path))
    if level:
        warn_once(
            f"{path}: its folders are taken as classes, and {listing(found)} in them as splits (--layout)"
        )
    return {split: (lambda split=split: found[split]) for split in found}
