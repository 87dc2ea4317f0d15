"""Splits: the names that they go by, and choosing among them."""

import re
from collections.abc import Callable

from ..errors import UserError
from .examples import Example, listing

_SPLIT_ALIASES = {
    "train": ("train", "training", "trn", "tr"),
    "validation": ("validation", "valid", "val", "dev", "development", "cv"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}

CANONICAL = {alias: name for name, aliases in _SPLIT_ALIASES.items() for alias in aliases}

Splits = dict[str | None, Callable[[], list[Example]]]


def canonical_split(name: str) -> str | None:
    """The kind of a split, "train", "validation" or "test" (``dev_phase1``, ``test-clean``), or ``None``."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((CANONICAL[word] for word in words if word in CANONICAL), None)


def choose_splits(splits: Splits, split: str | None, shown: str) -> list[str | None]:
    """The keys that ``split`` stands for."""
    names = [name for name in splits if name is not None]
    if split is None:
        if len(splits) > 1:
            raise UserError(
                f"{shown} has several splits ({listing(names)}): name one of them (--split; for training "
                "--train_split_name, --eval_split_name)"
            )
        return list(splits)
    exact = [name for name in names if name.lower() == split.lower()]
    wanted = canonical_split(split) if split.lower() in CANONICAL else None
    alike = [name for name in names if wanted is not None and canonical_split(name) == wanted]
    if exact or alike:
        return exact or alike
    there = f"it has {listing(names)}" if names else "it has no splits"
    raise UserError(f"{shown} has no split {split!r}: {there}")
