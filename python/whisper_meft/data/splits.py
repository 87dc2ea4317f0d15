"""Splits: the names that they go by, where they stand in a path, and choosing among them."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

from ..errors import UserError
from ..once import warn_once
from .examples import Example, listing
from .names import folded

_SPLIT_ALIASES = {
    "train": ("train", "training", "trn", "tr"),
    "validation": ("validation", "valid", "val", "dev", "development", "cv"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}

CANONICAL = {alias: name for name, aliases in _SPLIT_ALIASES.items() for alias in aliases}

# Also languages: Turkish, Chuvash (ISO 639-1), Trinitario, Vehes, Domung, Tondi Songway Kiini (ISO 639-3).
_CODES = frozenset(("tr", "cv", "trn", "val", "dev", "tst"))

LAYOUTS = ("class", "split/class", "class/split")

Layout = Literal["class", "split/class", "class/split"]

LAYOUT_HINT = (
    "--layout class takes the first folders as classes, split/class as splits, class/split the second ones"
)

Splits = dict[str | None, Callable[[], list[Example]]]


class SplitsOfRows(Splits):
    """Splits that the rows of a table say, each for itself: one may be written in several ways, or be empty
    (``None``)."""


def _split_words(name: str) -> list[str]:
    """The words of a name that stand for a split; two letters do only when they are the whole name."""
    name = folded(name)
    if name in CANONICAL:
        return [name]
    return [word for word in re.split(r"[\W\d_]+", name) if word in CANONICAL and len(word) > 2]


def canonical_split(name: str) -> str | None:
    """The kind of a split, "train", "validation" or "test" (``dev_phase1``, ``test-clean``), or ``None``."""
    return next((CANONICAL[word] for word in _split_words(name)), None)


def is_code(name: str) -> bool:
    """Whether a split's name is also a language's (``tr``, ``dev``)."""
    words = _split_words(name)
    return bool(words) and all(word in _CODES for word in words)


def split_kinds(names: Iterable[str]) -> dict[str, str]:
    """ "train", "validation" or "test" for each of the names side by side that is a split's.

    A name that is also a language code (``tr``, ``cv``, ``dev``) is a split's only beside one that is not.
    """
    kinds = {name: kind for name in names if (kind := canonical_split(name))}
    sure = any(not is_code(name) for name in kinds)
    return {name: kind for name, kind in kinds.items() if sure or not is_code(name)}


def are_splits(names: Collection[str], where: str) -> bool:
    """Whether files that are called so, side by side, are in splits: all names are a split's, or that for
    training or two kinds are among them. The others are then splits of their own, which a warning says.

    Raises:
        UserError: all names may be languages as well as splits.
    """
    kinds = split_kinds(names)
    if len(codes := code_pairs(names)) == len(names):
        shown = f"{where}: {listing(codes)}"
        if any(len(name) > 2 for name in codes):
            raise UserError(
                f"{shown} may be splits or languages: call splits by their names (train, dev, test), and "
                "languages in another way"
            )
        warn_once(f"{shown} are read together, as languages are called so; call splits train, dev, test")
    several = "train" in kinds.values() or len(set(kinds.values())) > 1
    others = sorted(name for name in names if name not in kinds)
    if several and others:
        warn_once(
            f"{where} holds {listing(map(repr, others))} beside the splits {listing(sorted(kinds))}: each is "
            "a split of its own, and part of none of them"
        )
    return several or not others


def code_pairs(names: Iterable[str]) -> list[str]:
    """Those of the names that are language codes and, as splits, would be training data and its partner."""
    codes = sorted(name for name in set(names) if is_code(name))
    kinds = {canonical_split(name) for name in codes}
    return codes if "train" in kinds and len(kinds) > 1 else []


def split_level(paths: Sequence[tuple[str, ...]], layout: Layout | None, where: str) -> int | None:
    """Which part of the paths is the split, or ``None``: the first whose names are splits and their partners.

    Args:
        paths: the folders that each file lies in, the outermost first.
        layout: what was said of it; found out by default.
        where: for messages.

    Raises:
        UserError: splits beside what is none, or names that may be languages as well as splits.
    """
    if layout == "class":
        return None
    if layout == "split/class":
        return 0
    deepest = max(map(len, paths), default=0)
    if layout == "class/split":
        for level in range(1, deepest):
            if all(len(path) > level and canonical_split(path[level]) for path in paths):
                return level
        raise UserError(
            f"{where}: the layout class/split needs a folder such as train or test in every class folder"
        )
    for level in range(deepest):
        names = {path[level] for path in paths if len(path) > level}
        _check_beside_classes(names, paths, level, where)
        kinds = split_kinds(names)
        if len(set(kinds.values())) > 1 or (level == 0 and kinds and len(names) == 1):
            if _are_splits(names, kinds, paths, level, where):
                return level
        elif level == 0:
            _check_alone(names, kinds, paths, where)
        _check_codes(names, paths, level, where)
    return None


def _are_splits(names, kinds, paths, level: int, where: str) -> bool:
    exact = {name for name in kinds if folded(name) in CANONICAL}
    shorter = sum(len(path) <= level for path in paths)
    if len(kinds) == len(names) and not shorter:
        flat = [path for path in paths if len(path) == level + 1]
        if level or not flat:
            return True
        if len(flat) == len(paths) and (len(names) == 1 or "train" not in kinds.values()):
            return False  # classes that are called like splits
        raise UserError(
            f"{where}: {listing(sorted(names))} are called like splits, and {len(flat)} audio files lie in "
            f"them without a class folder: give a table of their labels ({LAYOUT_HINT})"
        )
    if len({kinds[name] for name in exact}) < 2:
        return False
    others = sorted(names - set(kinds)) or ["files without such a folder"]
    raise UserError(
        f"{where} mixes split folders ({listing(sorted(exact))}) with other folders of audio "
        f"({listing(others)}): keep label folders inside the split folders, or splits in every label folder "
        f"({LAYOUT_HINT})"
    )


def _check_alone(names, kinds, paths, where: str) -> None:
    """A train folder with folders in it, beside others: neither surely a split nor surely a class."""
    deeper = sorted({p[0] for p in paths if len(p) > 1 and p[0] in kinds and folded(p[0]) in CANONICAL})
    if deeper and len(names) > 1:
        raise UserError(
            f"{where} mixes split folders ({listing(deeper)}) with other folders of audio "
            f"({listing(sorted(names - set(deeper)))}): keep label folders inside the split folders "
            f"({LAYOUT_HINT})"
        )


def _check_beside_classes(names, paths, level: int, where: str) -> None:
    """VoxLingua107 as it is unpacked: the languages, and beside them ``dev`` with the languages in it."""
    if level or len(names) < 2:
        return
    for name in sorted(name for name in names if canonical_split(name)):
        inside = {path[1] for path in paths if len(path) > 1 and path[0] == name}
        if inside & names and len(inside & names) * 2 > len(inside):
            raise UserError(
                f"{where}: {name} holds folders called like those beside it "
                f"({listing(sorted(inside & names))}), as a split beside classes: move the classes into a "
                f"folder train ({LAYOUT_HINT})"
            )


def _check_codes(names, paths, level: int, where: str) -> None:
    codes = code_pairs(names)
    if not codes or split_kinds(names):
        return
    around = defaultdict(set)  # what is shared among splits: the classes inside them, or those that hold them
    for path in paths:
        if len(path) > level:
            around[path[level]].add(path[level - 1] if level else path[1] if len(path) > 1 else "")
    splits = {name for name in set().union(*around.values()) if canonical_split(name) and not is_code(name)}
    first, *rest = (around[name] - splits - {""} for name in codes)
    shared = first.intersection(*rest)
    if not shared or (level and len(shared) < 2):
        return
    if level or (len(codes) == len(names) and any(len(name) > 2 for name in codes)):
        raise UserError(
            f"{where}: the folders {listing(codes)} may be splits or languages: say which ({LAYOUT_HINT})"
        )
    warn_once(
        f"{where}: the folders {listing(codes)} are taken as classes, as languages are called so; if they "
        "are splits, say --layout split/class"
    )


def _say_left_out(splits: Splits, names: list[str | None], shown: str) -> None:
    counts = {"none" if name is None else repr(name): len(splits[name]()) for name in names}
    if counts:
        told = listing(f"{name} ({count})" for name, count in counts.items())
        warn_once(f"{shown}: {sum(counts.values())} rows are of no split and are left out; theirs is {told}")


def choose_splits(splits: Splits, split: str | None, shown: str) -> list[str | None]:
    """The keys that ``split`` stands for.

    Folders and tables of that very name go before others of the kind, such as Kaldi's ``train_sp`` beside
    ``train``; of rows, those whose split is another word for it (``training``) belong to it, and names of
    more words (``train_noisy``) count where there is none of these. Rows of no kind are named in a warning.

    Raises:
        UserError: there are none, or several and no ``split``.
    """
    names = [name for name in splits if name is not None]
    if split is None:
        if len(splits) > 1:
            raise UserError(
                f"{shown} has several splits ({listing(names)}): name one of them (--split; for training "
                "--train_split_name, --eval_split_name)"
            )
        return list(splits)
    exact = [name for name in names if folded(name) == folded(split)]
    wanted = CANONICAL.get(folded(split))
    kinds = split_kinds(names) if len(names) > 1 else {name: canonical_split(name) for name in names}
    alike = [name for name in names if wanted is not None and kinds.get(name) == wanted]
    if (exact or alike) and isinstance(splits, SplitsOfRows):
        plain = [name for name in names if name in exact or (name in alike and folded(name) in CANONICAL)]
        chosen = plain or alike
        _say_left_out(splits, [name for name in splits if name not in kinds and name not in chosen], shown)
        return chosen
    if exact or alike:
        return exact or alike
    there = f"it has {listing(names)}" if names else "it has no splits"
    maybe = [name for name in names if wanted is not None and canonical_split(name) == wanted]
    hint = (
        f"; {listing(maybe)} may be a language: name the splits themselves (--train_split_name, "
        "--eval_split_name, --split)"
        if maybe
        else ""
    )
    raise UserError(f"{shown} has no split {split!r}: {there}{hint}")
