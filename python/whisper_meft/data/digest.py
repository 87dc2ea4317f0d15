"""Telling sets of examples apart by what is listed of them; no audio is read."""

import hashlib
import os
from collections.abc import Sequence

from .examples import DatasetCell, Example
from .names import composed


def digest_of(examples: Sequence[Example], in_order: bool = False, speakers: bool = False) -> str:
    """Eight digits that tell sets of examples apart: by names below the folder that all have in common, so
    that data may be moved as a whole, by labels or transcripts, and by which part of a recording is meant.

    Args:
        examples: in any order. in_order: the same examples in another order are another set.
        speakers: those of other speakers are another set.
    """
    parts = [composed(_name(each)).replace(os.sep, "/").split("/") for each in examples]
    root = len(os.path.commonprefix([names[:-1] for names in parts]))
    told = [
        repr(
            ("/".join(names[root:]), each.label, each.text, *map(_number, (each.start, each.stop)), each.unit)
            + (each.channel, each.window and tuple(map(_number, each.window)))
            + ((each.speaker,) if speakers else ())
        )
        for names, each in zip(parts, examples)
    ]
    told = "\n".join(told if in_order else sorted(told))
    return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:8]


def _name(example: Example) -> str:
    if not isinstance(example.audio, DatasetCell):
        return example.name
    # "row 7 of folder/of/corpus, clip.wav": where the data set lies stands in the middle.
    return f"row {example.audio.index}, {example.name.rpartition(', ')[2] if ', ' in example.name else ''}"


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
