"""WebDataset: tar files of which consecutive members that differ only in their suffix are one example.

Members are found with :mod:`tarfile`. Of a plain tar file on disk the sound is passed over and read when it
is heard, so that labels are read fast, and what waits to be mixed takes no memory. From an address, or a
compressed file, it is read as it comes; addresses are opened by the webdataset package.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LazyPackage, UserError, one_line
from ..once import warn_once
from . import columns
from .examples import DatasetCell, Example, listing
from .folders import AUDIO_SUFFIXES, subfolders
from .options import Options
from .splits import are_splits, canonical_split
from .streaming import ShardedExamples

webdataset = LazyPackage("webdataset", "a pattern or an address of tar files")

_SHARD = re.compile(r"\.(tar|tar\.gz|tgz)(\?.*)?$", re.I)
_ADDRESS = re.compile(r"(\w+):")

# What the webdataset package opens; `pipe:` would run a command.
_SCHEMES = ("http", "https", "ftps", "sftp", "hf", "gs", "ais")

# Names of members that are no example's, as the webdataset package passes over them.
_META = re.compile(r"__[^/]*__($|/)")

# The usual suffixes of the class and of the transcript come before the keys of the JSON member.
LABEL, TEXT = ("cls", *columns.LABEL), ("txt", *columns.TEXT)

_LARGEST_TEXT = 1 << 24  # bytes of a member that is no sound


def is_shards(source: str) -> bool:
    """Whether a source is a tar file, or a pattern or an address of some."""
    return _SHARD.search(source) is not None


def shards_in(folder: Path) -> list[str]:
    """The tar files in a folder, and in folders in it that are called like splits, sorted."""
    splits = [each for each in subfolders(folder) if canonical_split(each.name)]
    found = [os.path.join(each, name) for each in (folder, *splits) for name in os.listdir(each)]
    return sorted(each for each in found if is_shards(each) and os.path.isfile(each))


@dataclass(frozen=True, slots=True)
class Member:
    """A part of a file that is read each time it is wanted, as a data set of one."""

    path: str
    offset: int
    size: int

    def __getitem__(self, index: int) -> dict[str, bytes]:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.path} is shorter than it was")
        return {"audio": content}


class TarShards(ShardedExamples):
    """Examples in tar files.

    Args:
        names: paths and addresses of the files. options: which members, or keys of a JSON one, mean what.
        description: what messages call them together.
    """

    def __init__(self, names: Sequence[str], options: Options, description: str):
        self.names, self.options, self.description = list(names), options, description

    def examples(self, shard: int) -> Iterator[Example]:
        name = self.names[shard]
        file = os.path.basename(_SHARD.sub(r".\1", name))  # without what an address asks for
        seen = False
        for key, members in _samples(name):
            seen = True
            yield self._example(f"{name}: {key}", members, f"{file}: {key}")
        if not seen:
            raise UserError(f"{name} holds no examples: members such as 0001.wav and 0001.cls are accepted")

    def _example(self, name: str, members: dict[str, Any], inside: str) -> Example:
        options = self.options
        fields = {suffix: value for suffix, value in members.items() if not _is_audio(suffix)}
        if "json" in fields:
            fields = {**_object(fields.pop("json"), name), **fields}
        if parts := _parts_of_files(tuple(fields)):
            # Most times are those of a longer recording, out of which the sound was cut before it was packed.
            warn_once(
                f"{self.description}: what its examples say of {listing(parts)} is not used, sounds in "
                "shards are heard whole"
            )
        label = columns.field_of(fields, options.label_column, LABEL, name)
        if label is None and options.require_labels:
            raise UserError(
                f"{name} has no label that is known by its name: it has {listing(members, 30)}"
                + (f", in json {listing(set(fields) - set(members), 30)}" if "json" in members else "")
                + "; name one with label_column_name"
            )
        speaker = columns.field_of(fields, options.speaker_column, columns.SPEAKER, name)
        text = columns.field_of(fields, options.text_column, TEXT, name) if options.with_text else None
        audio = self._audio(name, members)
        return Example(audio, label, speaker, name, text=text, inside=inside)

    def _audio(self, name: str, members: dict[str, Any]) -> Any:
        given = self.options.audio_column
        found = [given] if given in members else [suffix for suffix in members if _is_audio(suffix)]
        if given is not None and found != [given]:
            raise UserError(f"{name} has no member {given!r}: it has {listing(members, 30)}")
        if len(found) > 1:
            raise UserError(f"{name} has several sounds ({listing(found)}): name one with audio_column_name")
        # Without any it is as a row whose file is missing: it is left out by its name.
        sound = members[found[0]] if found else b""
        return DatasetCell(sound, 0, "audio") if isinstance(sound, Member) else sound


@lru_cache(maxsize=256)  # examples of a source mostly have the same
def _parts_of_files(names: tuple[str, ...]) -> list[str]:
    """Those among the names of fields that would say which part of a file a row of a table is."""
    return [name for name in names if columns.names_a_part(name)]


def _is_audio(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in AUDIO_SUFFIXES


def _samples(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The examples of one shard: key, and members by their suffix in lower case: bytes, or sound on disk."""
    key, members = None, {}
    for path, value in _members(name):
        found, dot, suffix = _divided(path)
        if not dot:
            continue
        if found != key:
            if members:
                yield key, members
            key, members = found, {}
        suffix = suffix.lower()
        if suffix in members:
            raise UserError(f"{name} holds the member {path} twice")
        members[suffix] = value
    if members:
        yield key, members


def _divided(path: str) -> tuple[str, str, str]:
    """A member's name at the first dot of its last part, where there is something before it."""
    folder, slash, file = path.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return (folder + slash + stem, dot, suffix) if stem else (path, "", "")


def _members(name: str) -> Iterator[tuple[str, bytes | Member]]:
    """(name, content) of the files in a shard, in order; sound that can be read later as :class:`Member`."""
    try:
        with _opened(name) as file:
            yield from _members_of(file, name)
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = one_line(error)
        if (ended := re.search(r"\bexit (-?\d+) ", reason)) and _scheme(name) is not None:
            # The rest is the command, in which there may be a secret.
            reason = f"what fetches it ended with status {ended.group(1)}"
        raise UserError(f"{name} cannot be read as a tar file: {reason}") from None


def _members_of(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes | Member]]:
    plain = isinstance(file, io.BufferedReader) and re.search(r"\.tar$", name, re.I) is not None
    with tarfile.open(fileobj=file, mode="r:" if plain else "r|*") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # which would grow with the shard
            path = member.name.removeprefix("./")
            if not member.isreg() or _META.match(path):
                continue
            sound = _is_audio(path.rpartition("/")[2].partition(".")[2].lower())
            if not sound and member.size > _LARGEST_TEXT:
                raise UserError(f"{name}: its member {path} of {member.size} bytes is no sound")
            if sound and plain and not member.issparse():
                yield path, Member(name, member.offset_data, member.size)
            else:
                yield path, archive.extractfile(member).read()
        # tarfile takes a file that was cut between two members for a shorter one.
        if archive.fileobj.tell() < archive.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it was cut, the mark of its end is missing")


def _opened(name: str) -> BinaryIO:
    try:
        return open(name, "rb") if _scheme(name) is None else webdataset.gopen(name)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = (_scheme(name) is None and getattr(error, "strerror", None)) or one_line(error)
        raise UserError(f"{name} cannot be opened: {reason}") from error


def _scheme(name: str) -> str | None:
    """The scheme of an address, ``None`` of a path."""
    match = _ADDRESS.match(name)
    return match.group(1).lower() if match and not os.path.exists(name) else None


def _object(value: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except ValueError as error:
        raise UserError(f"{name}: its json member is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{name}: its json member must hold an object, got {type(found).__name__}")
    return found


def find_shards(source: str) -> list[str]:
    """The tar files that a folder, a path, an address or a pattern such as ``data-{000..099}.tar`` means, in
    order.

    Raises:
        UserError: there are none, one is missing, or one is a command.
    """
    path = Path(source)
    if path.is_dir():
        if not (names := shards_in(path)):
            raise UserError(f"{source} holds no tar files")
        return names
    names = [source] if path.is_file() else _expanded(source)
    for name in names:
        scheme = _scheme(name)
        if scheme is not None and scheme not in _SCHEMES:
            what = "would run a command" if scheme == "pipe" else "is of no kind that is read"
            raise UserError(f"{name} {what}: paths and {', '.join(_SCHEMES)} addresses are accepted")
        if scheme is None and not os.path.isfile(name):
            raise UserError(f"{source}: there is no shard {name}")
    return names


def _expanded(pattern: str) -> list[str]:
    """The names that braces and ``::`` in a pattern stand for."""
    if "{" not in pattern and "::" not in pattern:
        return [pattern]
    return list(webdataset.shardlists.expand_urls(pattern))


def split_shards(source: str, options: Options) -> dict[str | None, TarShards]:
    """The tar files by split: where the names before their numbers, or their folders, are those of splits
    (``train-000.tar``, ``dev/000.tar``; :func:`.splits.are_splits`); all together where they are not.

    Raises:
        UserError: there are no shards.
    """
    names = find_shards(source)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, source), []).append(name)
    if not are_splits(groups, source):
        return {None: TarShards(names, options, source)}
    return {split: TarShards(own, options, f"{source} ({split})") for split, own in groups.items()}


def _group(name: str, source: str) -> str:
    """What may be the split of a shard."""
    *folders, file = name.split("/")
    inside = os.path.isdir(source) and Path(name).parent != Path(source)
    if inside and canonical_split(folders[-1]):
        return folders[-1]
    return re.sub(r"[-_.]*\d*$", "", _SHARD.sub("", file))
