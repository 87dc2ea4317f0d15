"""Kaldi data folders, and KeSpeech, which is made of them."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..errors import UserError
from ..files import lines_of
from . import columns, tables
from .examples import Example, listing, say_forms
from .folders import subfolders
from .options import Options
from .paths import Paths
from .segments import Channels
from .splits import Splits

# Kaldi files that may hold the class, the most specific first.
_LABEL_FILES = ("utt2subdialect", "utt2dialect", "utt2accent", "utt2lang", "utt2language") + (
    ("utt2label", "utt2class", "utt2category")
)


def kaldi_folders(path: Path) -> dict[str | None, Path]:
    if (path / "wav.scp").is_file():
        return {None: path}
    return {p.name: p for p in subfolders(path) if (p / "wav.scp").is_file()}


def read_kaldi(path: Path, options: Options) -> Splits:
    folders = kaldi_folders(path)
    if not folders:
        raise UserError(f"{path} holds no wav.scp, and no folder in it does")
    return {name: (lambda f=f: read_kaldi_folder(f, options)) for name, f in folders.items()}


def kespeech_root(path: Path) -> Path | None:
    path = path.absolute()
    if (path / "Tasks" / "ASR").is_dir():
        return path
    for tasks in (path.parent, path.parent.parent):
        if tasks.name == "Tasks" and path.relative_to(tasks).parts[0] == "ASR":
            return tasks.parent
    return None


def read_kespeech(path: Path, options: Options) -> Splits:
    root = kespeech_root(path)
    if root is None:
        raise UserError(f"{path} is not KeSpeech: its root, its Tasks/ASR or one split of that is accepted")
    options = replace(
        options,
        data_root=options.data_root or os.fspath(root),
        label_column=options.label_column or "utt2subdialect",
    )
    folders = kaldi_folders(root / "Tasks" / "ASR" if path.absolute() == root else path)
    if not folders:
        raise UserError(f"{path} holds no split of KeSpeech: wav.scp is missing")
    return {name: (lambda f=f: read_kaldi_folder(f, options)) for name, f in folders.items()}


def read_kaldi_folder(path: Path, options: Options) -> list[Example]:
    """The utterances of a Kaldi data folder, joined by utterance id.

    Raises:
        UserError: missing files, malformed lines, ids given twice, pipes and archives in wav.scp, a segment
            of an unknown recording.
    """
    recordings = _two_columns(path / "wav.scp")
    for name, value in recordings.items():
        if value.endswith("|"):
            raise UserError(
                f"{path / 'wav.scp'}: {name} is a pipe ({value[:60]}), commands are not run: write the audio "
                "to files and list their paths"
            )
        if re.search(r"\.(ark|scp):\d+$", value):
            raise UserError(
                f"{path / 'wav.scp'}: {name} lies in a Kaldi archive; list paths of audio files instead"
            )
    labels = _label_file(path, options)
    texts = _text_file(path, options) if options.with_text else {}
    speakers = _two_columns(path / "utt2spk") if (path / "utt2spk").is_file() else {}
    say_forms(labels.values(), os.fspath(path))
    paths = Paths(options.data_root or _root_of(path, recordings.values()), os.fspath(path / "wav.scp"))
    files = {name: paths(value, f"{paths.where}, {name}") for name, value in recordings.items()}
    paths.say()
    channels = _channels(path, files)
    if not (path / "segments").is_file():
        return [
            Example(
                file,
                label=labels.get(name),
                speaker=speakers.get(name),
                channel=channels.get(name),
                text=texts.get(name),
            )
            for name, file in files.items()
        ]
    examples = []
    for name, value in _two_columns(path / "segments").items():
        fields = value.split()
        if len(fields) != 3:
            raise UserError(
                f"{path / 'segments'}: {name} needs a recording, a start and an end, got {value!r}"
            )
        if fields[0] not in recordings:
            raise UserError(
                f"{path / 'segments'}: {name} is in recording {fields[0]}, which wav.scp does not list"
            )
        where = f"{path / 'segments'}, {name}"
        start, stop = columns.number(fields[1], where), columns.number(fields[2], where)
        stop = None if stop is not None and stop < 0 else stop  # Kaldi writes -1 for the end of the recording
        columns.check_segment(start, stop, where)
        examples.append(
            Example(
                files[fields[0]],
                label=labels.get(name),
                speaker=speakers.get(name),
                start=start,
                stop=stop,
                channel=channels.get(fields[0]),
                text=texts.get(name),
            )
        )
    return examples


def _channels(path: Path, files: dict[str, str]) -> dict[str, int | None]:
    """The channels of recordings that are several in one file, as ``reco2file_and_channel`` has them."""
    several = Counter(files.values())
    shared = [name for name, file in files.items() if several[file] > 1]
    if not shared:
        return {}
    where = path / "reco2file_and_channel"
    if not where.is_file():
        raise UserError(
            f"{path / 'wav.scp'}: {listing(shared, 3)} are the same file, and no {where.name} says by which "
            "channel they are told apart: give each recording once, and its parts in segments"
        )
    written = {name: value.split()[-1] for name, value in _two_columns(where).items() if name in files}
    channels = Channels(["channel"], "channel", os.fspath(where))
    channels.check((files[name], value) for name, value in written.items())
    return {name: channels.of(value) for name, value in written.items()}


def _label_file(path: Path, options: Options) -> dict[str, str]:
    name = options.label_column
    if name is None:
        name = next((file for file in _LABEL_FILES if (path / file).is_file()), None)
        if name is None and not options.require_labels:
            return {}
        if name is None:
            raise UserError(
                f"{path} has no label file that is known by its name ({listing(_LABEL_FILES)}): it holds "
                f"{listing(sorted(os.listdir(path)), 20)}; name it with label_column_name"
            )
    if not (path / name).is_file():
        raise UserError(
            f"{path} has no label file {name!r}: it holds {listing(sorted(os.listdir(path)), 20)}"
        )
    return _two_columns(path / name)


def _text_file(path: Path, options: Options) -> dict[str, str]:
    where = path / (options.text_column or "text")
    if not where.is_file():
        raise UserError(
            f"{path} has no file {where.name!r} of transcripts: it holds "
            f"{listing(sorted(os.listdir(path)), 20)}; name it with text_column_name"
        )
    # An utterance in which nothing is said stands there with its id alone.
    return _two_columns(where, empty=True)


def _two_columns(path: Path, empty: bool = False) -> dict[str, str]:
    """Lines of ``<id> <value>``, split at the first white space; with ``empty`` the value may be missing."""
    table: dict[str, str] = {}
    for number, line in enumerate(lines_of(tables.read_text(path)), 1):
        fields = line.split(maxsplit=1)
        if not fields:
            continue
        if len(fields) < 2 and not empty:
            raise UserError(f"{path}, line {number}: an id and a value are needed, got {line.strip()!r}")
        if fields[0] in table:
            raise UserError(f"{path}, line {number}: the id {fields[0]} is given twice")
        table[fields[0]] = " ".join(fields[1:]).strip()
    return table


def _root_of(path: Path, files: Iterable[str]) -> str:
    """Where relative paths of a Kaldi folder start: in a folder above it, where recipes run, or in it. The
    first of the files that is in one of them decides."""
    path = path.absolute()
    candidates = [os.fspath(each) for each in (path, *path.parents[:3], Path.cwd())]

    @cache
    def in_use(folder: str) -> list[str]:
        """The candidates in which there is such a folder: many of the files may be missing."""
        return [each for each in candidates if os.path.isdir(os.path.join(each, folder))]

    there = (
        each
        for file in files
        for each in in_use(os.path.dirname(file))
        if os.path.isfile(os.path.join(each, file))
    )
    return next(there, os.fspath(path))
