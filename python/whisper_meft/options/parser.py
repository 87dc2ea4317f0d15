"""Command-line parsing: HfArgumentParser with one-line errors and options from a JSON file.

Imports neither torch nor the Trainer.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers.hf_argparser import HfArgumentParser

from ..errors import UserError
from ..files import read_json
from .switches import WORDS, add_switch, is_boolean, is_plain, is_twin, type_of


class UsageError(UserError):
    """A command line that cannot be understood; the exit status is 2 instead of 1."""

    exit_status = 2


# A value that begins with a dash, as Python writes numbers; argparse's own pattern has no exponents.
_NEGATIVE = re.compile(r"-(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf(?:inity)?|nan)$", re.IGNORECASE)

_LONG = 60  # characters of a list of choices that still fit beside the option

SWITCHES = (
    "An option that is on or off is given as --option or --option True, and --no_option or --option False."
)


class HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of each option and its default where there is one worth showing."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.metavar or action.dest
        name = action.option_strings[0]
        if action.nargs == 0 or is_plain(action):
            return name
        return f"{name} {self._format_args(action, action.dest.upper())}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        name = getattr(action.type, "__name__", "value").upper()
        return "TEXT" if name.endswith("_OR_TEXT") else name

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.choices is not None:
            choices = ",".join(map(str, action.choices))
            return "{" + choices + "}" if len(choices) <= _LONG else "NAME"
        return super()._format_args(action, action.metavar or self._get_default_metavar_for_optional(action))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.choices is not None and len(",".join(map(str, action.choices))) > _LONG:
            text += " One of " + ", ".join(map(str, action.choices)) + "."
        hidden = (None, False, "", argparse.SUPPRESS)
        shown = action.option_strings and not any(action.default is value for value in hidden)
        if shown and action.nargs != 0 and "default" not in text:
            text += " (default: %(default)s)"
        return text


class Parser(HfArgumentParser):
    """HfArgumentParser for one subcommand: raises UsageError instead of exiting, suggests the nearest option
    for a misspelt one, and reads options from a JSON file given as the first argument."""

    def __init__(self, command: str, dataclass_types: Sequence[type], usage: str, **kwargs: Any):
        super().__init__(
            dataclass_types,
            prog=f"whisper-meft {command}",
            usage=f"whisper-meft {command} {usage}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )
        self._negative_number_matcher = _NEGATIVE
        # Options by the name of a preset, the value of --preset; options that are given win over them.
        self.presets: Mapping[str, Mapping[str, Any]] = {}
        # Options of other commands that one may look for here, by their names without dashes: why not.
        self.absent: Mapping[str, str] = {}
        if any(map(is_plain, self._actions)):
            self.epilog = SWITCHES

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        if type_of(field) is None:
            HfArgumentParser._parse_dataclass_field(parser, field)
        else:
            add_switch(parser, field)

    def error(self, message: str) -> NoReturn:
        # Each option has a dashed twin (--a_b/--a-b); one spelling is enough in a message.
        message = re.sub(r"(--\w+)((?:/|, )--[\w-]+)+", r"\1", message)
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Parses the arguments of the subcommand into its dataclasses, plus a namespace of the positionals.

        A first argument that ends in .json and is the only positional one is read as a JSON object of
        options; options after it on the command line win over the file's, and both over a preset's.

        Raises:
            UsageError: unknown options, wrong values, missing arguments.
            UserError: the JSON file cannot be read.
        """
        argv = list(argv)
        if argv and argv[0].endswith(".json") and (len(argv) == 1 or argv[1].startswith("-")):
            argv = self._expand(Path(argv[0])) + argv[1:]
        argv = self._preset(argv) + argv
        namespace, unknown = self.parse_known_args(self._sorted(argv))
        unknown = [each for each in unknown if each != "--"]
        if unknown:
            self._refuse(unknown[0])
        # HfArgumentParser builds the dataclasses from strings only; hand it what was parsed already.
        outputs = []
        values = vars(namespace)
        for dtype in self.dataclass_types:
            names = [each for each in dtype.__dataclass_fields__ if dtype.__dataclass_fields__[each].init]
            chosen = {name: values.pop(name) for name in names}
            try:
                outputs.append(dtype(**chosen))
            except UserError:
                raise
            except (ValueError, TypeError, ImportError) as error:
                self.error(str(error))
        if values:
            outputs.append(argparse.Namespace(**values))
        return tuple(outputs)

    def _preset(self, argv: Sequence[str]) -> list[str]:
        """The options of the preset that is asked for last; an unknown name is for argparse to refuse."""
        name = None
        for place, token in enumerate(argv):
            if token == "--":
                break
            option, equals, value = token.partition("=")
            if option == "--preset" and (equals or place + 1 < len(argv)):
                name = value if equals else argv[place + 1]
        return [f"--{option}={value}" for option, value in self.presets.get(name, {}).items()]

    def _sorted(self, argv: Sequence[str]) -> list[str]:
        """The same arguments with the options first, so that those without a name may stand anywhere.

        The word after a boolean option is its value where it is one, and where the command then still has
        its positional arguments; else it is one of those.

        Raises:
            UsageError: a word that is neither.
        """
        split = _Split(self._option_string_actions, argv)
        least, most = self._positional_range()
        missing = least - len(split.positionals)
        if missing > 0 and split.values:
            files = [place for place in split.values if Path(argv[place]).exists()]
            if len(files) != missing:
                place, option = next(iter(split.values.items()))
                names = ", ".join(a.metavar or a.dest for a in self._actions if not a.option_strings)
                self.error(
                    f"{names} are required: {argv[place]!r} is the value of {option}, a file of that name is "
                    f"./{argv[place]}"
                )
            split = _Split(self._option_string_actions, argv, files)
        surplus = len(split.positionals) > most
        for place, option in split.after.items():
            word = argv[place]
            misspelt = most == math.inf and difflib.get_close_matches(word.lower(), WORDS, cutoff=0.7)
            if surplus or (misspelt and not Path(word).exists()):
                twin = is_twin(self._option_string_actions[option])
                accepted = "takes no value" if twin else "must be True or False"
                self.error(f"argument {option}: {accepted}, got {word!r}")
        return [*split.options, *(["--", *split.positionals] if split.positionals else [])]

    def _positional_range(self) -> tuple[int, float]:
        """How many arguments without a name the command takes at least and at most."""
        counts = [action.nargs for action in self._actions if not action.option_strings]
        least = sum(count not in ("?", "*") for count in counts)
        return least, math.inf if {"+", "*"} & set(counts) else len(counts)

    def _refuse(self, unknown: str) -> NoReturn:
        if not unknown.startswith("-"):
            self.error(f"unexpected argument {unknown!r}")
        name = unknown.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if reason := self.absent.get(name.removeprefix("--")):
            self.error(f"{name} is no option of this command: {reason}")
        known = [option for action in self._actions for option in action.option_strings[:1]]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        self.error(
            f"unknown option {unknown.split('=')[0]}" + (f", did you mean {close[0]}?" if close else "")
        )

    def _expand(self, path: Path) -> list[str]:
        """The options of a JSON file as command-line arguments, so that both are checked in the same way."""
        options = read_json(path)
        if not isinstance(options, dict):
            raise UserError(f"{path} must hold one JSON object of options, got {type(options).__name__}")
        positionals = [action.dest for action in self._actions if not action.option_strings]
        dests = {action.dest for action in self._actions}
        first: dict[str, list[str]] = {}
        rest: list[str] = []
        switches = {action.dest for action in self._actions if action.option_strings and is_twin(action)}
        repeated = {action.dest for action in self._actions if isinstance(action, argparse._AppendAction)}
        for name, value in options.items():
            given, name = name, name.replace("-", "_")
            if name not in dests and name.removeprefix("no_") in switches and isinstance(value, bool):
                name, value = name.removeprefix("no_"), not value
            if reason := self.absent.get(name):
                raise UsageError(f"{path}: {given} is no option of this command: {reason}")
            if name not in dests or name == "help":
                close = difflib.get_close_matches(name, dests, n=1, cutoff=0.7)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise UsageError(f"{path} holds an unknown option {given!r}{hint}")
            if value is None:
                continue
            items = [_as_text(item) for item in (value if isinstance(value, list) else [value])]
            if name in positionals:
                first[name] = items
            elif isinstance(value, list) and name in repeated:
                rest += [f"--{name}={item}" for item in items]
            elif isinstance(value, list):
                rest += [f"--{name}", *items]
            else:
                # The = keeps values that begin with a dash in one piece.
                rest.append(f"--{name}={items[0]}")
        return [item for name in positionals for item in first.get(name, [])] + rest


class _Split:
    """Arguments told apart.

    Args:
        actions: by their option strings. argv: the arguments.
        not_values: places in ``argv`` of words that are positional although they could be a boolean's value.

    Attributes:
        options: with their values; a boolean's is joined to it by an =. positionals: all others.
        values: option by the place of the word that was taken for its value, of booleans.
        after: option by the place of the positional argument that follows it, of booleans.
    """

    def __init__(
        self, actions: dict[str, argparse.Action], argv: Sequence[str], not_values: Sequence[int] = ()
    ):
        self.options: list[str] = []
        self.positionals: list[str] = []
        self.values: dict[int, str] = {}
        self.after: dict[int, str] = {}
        place = 0
        while place < len(argv):
            token = argv[place]
            place += 1
            if token == "--":
                self.positionals += argv[place:]
                return
            if not _is_option(token):
                self.positionals.append(token)
                continue
            action = actions.get(token)
            word = argv[place] if place < len(argv) and not _is_option(argv[place]) else None
            if action is not None and is_plain(action) and word and is_boolean(word):
                if place not in not_values:
                    self.values[place] = token
                    token, place = f"{token}={word}", place + 1
            elif action is not None and word and (is_plain(action) or is_twin(action)):
                self.after[place] = token
            self.options.append(token)
            room = 0 if action is None or is_plain(action) else {0: 0, "+": math.inf}.get(action.nargs, 1)
            while room and place < len(argv) and not _is_option(argv[place]):
                self.options.append(argv[place])
                place, room = place + 1, room - 1


def _is_option(token: str) -> bool:
    if not token.startswith("-") or token == "-" or _NEGATIVE.match(token):
        return False
    return " " not in token.split("=")[0]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value)


def hide_options(parser: Parser, group_title: str, shown: Sequence[str]) -> list[str]:
    """Leaves only the options in ``shown`` in the help of one group; returns the names of the others."""
    hidden = []
    for group in parser._action_groups:
        if group.title != group_title:
            continue
        for action in group._group_actions:
            if action.dest not in shown and not is_twin(action):
                action.help = argparse.SUPPRESS
                hidden.append(action.option_strings[0])
    return hidden
