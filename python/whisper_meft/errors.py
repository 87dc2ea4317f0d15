"""The exception for mistakes that a user can mend, and text that a terminal can be given."""

import importlib
import re
from typing import Any


class UserError(ValueError):
    """Input that cannot be used: its message is one sentence that names the argument, what was given and
    what is accepted. The command line prints it as one line and exits with a non-zero status."""


class LazyPackage:
    """A package of the ``whisper`` extra, imported when something of it is first used: whoever has tensors
    already can train and classify without it.

    Args:
        name: as it is imported. purpose: what needs it, for the message.

    Raises:
        UserError: on use, where it is not installed.
    """

    def __init__(self, name: str, purpose: str):
        self._name, self._purpose = name, purpose

    def __getattr__(self, attribute: str) -> Any:
        try:
            package = importlib.import_module(self._name)
        except ModuleNotFoundError as error:
            missing = (error.name or self._name).partition(".")[0]  # or what that needs itself
            raise UserError(f"{self._purpose} needs the {missing} package: pip install {missing}") from error
        return getattr(package, attribute)


# What a terminal acts on instead of showing it: control characters, line ends, changes of direction. And what
# is no character, but a byte of a file name that is no UTF-8.
_ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: object, keep: str = "") -> str:
    """A label, a file name or other text from outside as one line that shows what it holds and does nothing.

    Control characters, line ends, changes of the writing direction and bytes that are no UTF-8 become
    escapes, as Python writes them (``\\n``, ``\\x1b``, ``\\udce9``). Everything that is printed, drawn or
    written into a page goes through here; JSON and CSV files hold the true value.

    Args:
        text: what to show. keep: characters that stay as they are.
    """

    def escaped(match: re.Match) -> str:
        character = match.group()
        return character if character in keep else character.encode("unicode_escape").decode("ascii")

    return _ACTING.sub(escaped, str(text))


def markdown(text: object) -> str:
    """:func:`printable` text that is shown as it is on a Markdown page: no formatting, no HTML."""
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", printable(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_LONGEST = 600  # characters of a foreign message; what libraries say past that is advice to programmers

_FULL_DISK = re.compile(
    r"inline_container\.cc.*(unexpected pos|write failed)|PytorchStreamWriter failed writing", re.DOTALL
)

# How libraries say things whose cause a user cannot see from it: a mark in their message, what it means.
_MEANINGS = (
    (_FULL_DISK, "the disk is full, or over its quota"),
    (
        # torch's own message advises to switch the protection off.
        re.compile(r"weights_only|Weights only load failed"),
        "the file holds more than tensors, which could run code when it is loaded, or it is damaged",
    ),
)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of torch.save says that it could not write, which it does in its own words."""
    return _FULL_DISK.search(str(error)) is not None


def one_line(error: BaseException) -> str:
    """An exception as one line of text, with its type where the message alone does not say what went wrong.

    An error from a data-loading process arrives with the traceback of that process as its message; the last
    line of that is what went wrong.
    """
    text = str(error).strip()
    if text.startswith("Caught ") and "DataLoader worker" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    text = printable(" ".join(text.split()))
    if isinstance(error, UserError):
        return text
    for mark, meaning in _MEANINGS:
        if mark.search(text):
            return meaning
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    name = type(error).__name__
    if text and type(error) in (OSError, ValueError, ImportError):
        return text
    return f"{name}: {text}" if text else name
