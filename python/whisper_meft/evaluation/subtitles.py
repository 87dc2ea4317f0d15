"""Transcripts as text, SubRip (.srt) and WebVTT (.vtt), and the names of such files."""

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from .generating import Segment, Transcript


def as_txt(transcript: Transcript) -> str:
    """One line for each segment where there are some, else one line."""
    parts = [each.text for each in transcript.segments] or [transcript.text]
    return "".join(f"{_line(part)}\n" for part in parts)


def as_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues with ``00:00:01,500 --> 00:00:02,000``."""
    # There is no way to write an arrow, by which readers find the times.
    lines = ((each, re.sub("--+>", "->", _line(each.text))) for each in transcript.segments)
    cues = [(each, text) for each, text in lines if text]
    return "\n".join(f"{n}\n{_times(each, ',')}\n{text}\n" for n, (each, text) in enumerate(cues, 1))


def as_vtt(transcript: Transcript) -> str:
    """WebVTT: cues with ``00:00:01.500 --> 00:00:02.000``; ``&``, ``<`` and ``>`` of a text are escaped."""
    cues = [(each, text) for each in transcript.segments if (text := escape(_line(each.text), quote=False))]
    return "".join(["WEBVTT\n", *(f"\n{_times(each, '.')}\n{text}\n" for each, text in cues)])


WRITERS: dict[str, Callable[[Transcript], str]] = {"txt": as_txt, "srt": as_srt, "vtt": as_vtt}


def _line(text: str) -> str:
    """A text on one line: a line end, also a blank line, would end a cue."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split())


def _times(segment: Segment, point: str) -> str:
    return f"{_clock(segment.start, point)} --> {_clock(segment.end, point)}"


def _clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds; hours have two digits or more."""
    rest, milliseconds = divmod(round(seconds * 1000), 1000)
    rest, second = divmod(rest, 60)
    hour, minute = divmod(rest, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d}{point}{milliseconds:03d}"


def output_names(files: Sequence[str]) -> list[Path]:
    """A relative path without suffix for the transcript of each file, different for different files.

    It is the file's name without suffix, as Whisper's own command writes it. Files that would meet there
    (also on a file system that takes upper case for lower case) have the folders in front that tell them
    apart, or keep their suffix.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    folder = os.path.commonpath([path.parent for path in paths])
    # From the shortest to one that no two files share.
    forms = []
    for path in paths:
        below = path.relative_to(folder)
        forms.append((Path(path.stem), below.with_name(path.stem), below))
    chosen = [0] * len(paths)
    while True:
        names = [each[number] for each, number in zip(forms, chosen)]
        meeting: dict[str, set[Path]] = {}
        for name, path in zip(names, paths):
            meeting.setdefault(unicodedata.normalize("NFC", str(name)).casefold(), set()).add(path)
        crowded = {path for each in meeting.values() if len(each) > 1 for path in each}
        longer = [i for i, path in enumerate(paths) if path in crowded and chosen[i] < 2]
        if not longer:
            return names
        for i in longer:
            chosen[i] += 1
