"""Lhotse: cuts in JSON lines, read one by one by the lhotse package, which also makes their sound."""

import gzip
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import LazyPackage, UserError, one_line
from . import columns
from .examples import DatasetCell, Example, Span, listing
from .options import Options
from .splits import are_splits
from .streaming import ShardedExamples

lhotse = LazyPackage("lhotse", "reading Lhotse cuts")

_CUTS = re.compile(r"cuts.*\.jsonl(\.gz)?$", re.I)

# The fields of a supervision beside its custom ones.
_FIELDS = ("language", "speaker", "gender", "text")


def is_cuts(path: Path) -> bool:
    """Whether a file holds Lhotse's cuts in JSON lines."""
    if not path.is_file() or not re.search(r"\.jsonl(\.gz)?$", path.name, re.I):
        return False
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            return re.search(rb'"type": *"(Mono|Multi|Mixed|Padding)Cut"', file.read(1 << 16)) is not None
    except OSError:
        return False


def cut_files(source: str) -> list[str]:
    """The files of cuts that a path means: itself, or those in a folder whose names hold "cuts".

    Raises:
        UserError: there are none.
    """
    path = Path(source)
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"no data at {source}: it does not exist")
        return [source]
    found = sorted(os.fspath(each) for each in path.iterdir() if _CUTS.search(each.name) and each.is_file())
    if not found:
        raise UserError(f"{source} holds no cuts: files such as cuts.jsonl.gz are accepted")
    return found


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut of Lhotse, as a data set of one: its sound is made when it is wanted."""

    cut: Any

    def __getitem__(self, index: int) -> dict[str, dict[str, Any]]:
        if not self.cut.has_recording:
            raise UserError("the cut has no recording")
        try:
            samples = self.cut.load_audio()  # [channels, samples]
        except Exception as error:  # of the library or of what it reads with
            raise UserError(one_line(error)) from error
        return {"audio": {"array": samples, "sampling_rate": int(self.cut.sampling_rate)}}


class LhotseShards(ShardedExamples):
    """The cuts in files, each of which is a shard.

    Args:
        names: paths of the files. options: which fields mean what. description: what messages call them.
    """

    def __init__(self, names: Sequence[str], options: Options, description: str):
        self.names, self.options, self.description = list(names), options, description

    def examples(self, shard: int) -> Iterator[Example]:
        name, seen = self.names[shard], False
        try:
            for cut in lhotse.CutSet.from_jsonl_lazy(name):
                seen = True
                if self.options.data_root is not None:
                    cut = cut.with_recording_path_prefix(self.options.data_root)
                yield self._example(name, cut)
        except UserError:
            raise
        except Exception as error:  # of the library, or of a file that is none of it
            raise UserError(f"{name} cannot be read as Lhotse cuts: {one_line(error)}") from error
        if not seen:
            raise UserError(f"{name} holds no cuts")

    def _example(self, file: str, cut: Any) -> Example:
        name, options = f"{file}: {cut.id}", self.options
        records = _records(cut)

        def values(given: str | None, usual: tuple[str, ...]) -> list[str]:
            found = (columns.field_of(record, given, usual, name) for record in records)
            return [value for value in found if value is not None]

        labels = set(values(options.label_column, columns.LABEL))
        if len(labels) > 1:
            raise UserError(f"{name} has several labels in its supervisions: {listing(sorted(labels))}")
        if not labels and options.require_labels:
            raise UserError(
                f"{name} has no label that is known by its name: its supervisions have "
                f"{listing(dict.fromkeys(chain(*records)), 30)}; name one with label_column_name"
            )
        speakers = set(values(options.speaker_column, columns.SPEAKER))
        return Example(
            DatasetCell(Cut(cut), 0, "audio"),
            labels.pop() if labels else None,
            speakers.pop() if len(speakers) == 1 else None,
            name,
            seconds=float(cut.duration),
            text=(" ".join(values(options.text_column, columns.TEXT)) or None) if options.with_text else None,
            inside=f"{cut.id}: {'; '.join(map(_stretch, _tracks(cut)))}",
            spans=tuple(map(_span, _supervised(cut))),
        )


def _tracks(cut: Any) -> list[Any]:
    """The cuts of single recordings that a cut is mixed of, or it alone."""
    return [track.cut for track in getattr(cut, "tracks", ())] or [cut]


def _supervised(cut: Any) -> list[Any]:
    """Those of a cut's tracks in which somebody is said to speak, beside what may be noise; else all."""
    tracks = [track for track in _tracks(cut) if getattr(track, "recording", None) is not None]
    return [track for track in tracks if track.supervisions] or tracks


def _span(cut: Any) -> Span:
    """Where a cut of a single recording lies: in its one file, before that was slowed down or sped up; else
    in the recording of that name."""
    recording, start, length = cut.recording, cut.start, cut.duration
    for change in reversed(recording.transforms or ()):
        if isinstance(change, dict):
            change = lhotse.augmentation.AudioTransform.from_dict(change)
        start, length = change.reverse_timestamps(start, length, recording.sampling_rate)
    channels = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    files = [source.source for source in recording.sources if source.type == "file"]
    name = files[0] if len(files) == len(recording.sources) == 1 else f"recording {recording.id}"
    return Span(name, start, start + length, channels[0] if len(channels) == 1 else None)


def _stretch(cut: Any) -> str:
    """Which part of which recording a cut is."""
    recording, channel = (getattr(cut, name, None) for name in ("recording_id", "channel"))
    return f"{recording} from {cut.start:.10g} for {cut.duration:.10g} s in {channel}"


def _records(cut: Any) -> list[dict[str, Any]]:
    """What is known of a cut, for each of its supervisions in time."""
    shared, records = getattr(cut, "custom", None) or {}, []
    for each in sorted(cut.supervisions, key=lambda supervision: supervision.start):
        fields = {name: value for name in _FIELDS if (value := getattr(each, name)) is not None}
        records.append({**shared, **(each.custom or {}), **fields})
    return records or [shared]


def split_cuts(source: str, options: Options) -> dict[str | None, LhotseShards]:
    """The files of cuts by split: where their names have one (``cuts_train.jsonl.gz``;
    :func:`.splits.are_splits`), else all together.

    Raises:
        UserError: there are none.
    """
    files = cut_files(source)
    groups: dict[str, list[str]] = {}
    for file in files:
        stem = re.sub(r"\.jsonl(\.gz)?$", "", os.path.basename(file), flags=re.I)
        groups.setdefault(re.sub(r"[-_.]*\d*$", "", stem), []).append(file)
    if len(files) == 1 or not are_splits(groups, source):
        return {None: LhotseShards(files, options, source)}
    return {split: LhotseShards(own, options, f"{source} ({split})") for split, own in groups.items()}
