"""Telling sets of examples apart by what is listed of them; no audio is read."""

import hashlib
import os
from collections.abc import Sequence

from .examples import Example
from .names import composed


def digest_of(examples: Sequence[Example], in_order: bool = False, speakers: bool = False) -> str:
    """Eight digits that tell sets of examples apart: by names below the folder that all have in common, or
    inside a shard or data set, so that data may be moved as a whole, by labels or transcripts, and by which
    part of a recording is meant.

    Args:
        examples: in any order. in_order: the same examples in another order are another set.
        speakers: those of other speakers are another set.
    """
    parts = [composed(each.inside or each.name).replace(os.sep, "/").split("/") for each in examples]
    # A folder inside a shard is moved with it, and no other: it may be what tells two apart.
    moved = all(os.path.isabs(each.inside) for each in examples if each.inside)
    root = len(os.path.commonprefix([names[:-1] for names in parts])) if moved else 0
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


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
