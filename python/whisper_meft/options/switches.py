"""Booleans on the command line: ``--flag``, ``--flag false``, ``--flag=no`` and ``--no_flag``."""

import argparse
import dataclasses
import typing
from typing import Any

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

_LETTERS = {"t": True, "y": True, "f": False, "n": False}  # where nothing but a boolean is accepted


def boolean(text: str) -> bool:
    """The value of a word such as true, False, yes or 0.

    Raises:
        argparse.ArgumentTypeError: any other word.
    """
    value = (WORDS | _LETTERS).get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return value


def boolean_or_text(text: str) -> bool | str:
    """The value of a word such as true, False, yes or 0; any other text as it is."""
    return WORDS.get(text.lower(), text)


def false_or_text(text: str) -> bool | str:
    """False of a word for it; any other text as it is."""
    return text if boolean_or_text(text) is not False else False


def spelt_boolean_or_text(text: str) -> str:
    """``"True"`` or ``"False"`` of a word such as yes or 0; any other text as it is."""
    return str(boolean_or_text(text))


def is_boolean(text: str) -> bool:
    """Whether :func:`boolean` takes it."""
    return text.lower() in WORDS | _LETTERS


def type_of(field: dataclasses.Field) -> typing.Callable[[str], Any] | None:
    """What reads the option of a field that can be a boolean: one of the functions above; None for others.

    Args:
        field: its ``type`` is bool, a union with it or with ``Literal[False]``; or str, with
            ``metadata["switch"]``, where True and False are words that its owner understands.
    """
    if field.metadata.get("switch"):
        return spelt_boolean_or_text
    parts = typing.get_args(field.type) or (field.type,)
    if bool in parts:
        return boolean_or_text if str in parts else boolean
    if any(False in typing.get_args(part) for part in parts if typing.get_origin(part) is typing.Literal):
        return false_or_text
    return None


def add_switch(parser: Any, field: dataclasses.Field) -> None:
    """Adds the option of a field that :func:`type_of` knows, and its ``--no_`` twin.

    Args:
        parser: an ``argparse.ArgumentParser`` or one of its groups.
    """
    name, read = field.name, type_of(field)
    default = False if field.default is dataclasses.MISSING else field.default
    alone = {} if read is false_or_text else {"nargs": "?", "const": "True" if _is_text(read) else True}
    parser.add_argument(
        *_spellings(name), type=read, default=default, help=field.metadata.get("help"), **alone
    )
    parser.add_argument(
        *_spellings(f"no_{name}"),
        action="store_const",
        const="False" if _is_text(read) else False,
        dest=name,
        default=default,
        help=argparse.SUPPRESS,  # told once, below all options
    )


def is_plain(action: argparse.Action) -> bool:
    """Whether the option is a boolean and nothing else: a word after it that is none is not its value."""
    return action.type is boolean


def is_twin(action: argparse.Action) -> bool:
    """Whether it is the ``--no_`` form of another option."""
    return action.nargs == 0 and action.option_strings[0].startswith("--no_")


def _is_text(read: Any) -> bool:
    return read is spelt_boolean_or_text


def _spellings(name: str) -> list[str]:
    return [f"--{name}", f"--{name.replace('_', '-')}"] if "_" in name else [f"--{name}"]
