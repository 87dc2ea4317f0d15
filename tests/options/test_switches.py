"""Booleans on the command line and in a JSON file, for every command."""

import importlib
import json
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

import pytest
from whisper_meft.commands import train
from whisper_meft.commands.cli import COMMANDS
from whisper_meft.options.parser import Parser, UsageError
from whisper_meft.options.training import TrainArguments

NEEDED = ["--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]


@dataclass
class Some:
    """One option of each kind."""

    fast_mode: bool = False
    keep: bool = True
    maybe: bool | None = None
    off_or_kind: str | bool = "no"
    never_or_name: str | None | Literal[False] = None
    folder: str | None = None
    many: list[str] | None = None
    number: float = 0.0


def parser(*positionals: dict) -> Parser:
    made = Parser("try", (Some,), usage="")
    for number, options in enumerate(positionals):
        made.add_argument(f"p{number}", metavar=f"P{number}", **options)
    return made


def parse(*argv: str, positionals: tuple[dict, ...] = ({}, {})):
    return parser(*positionals).parse([str(each) for each in argv])


@pytest.mark.parametrize(
    "given, value",
    [
        (["--fast_mode"], True),
        (["--fast-mode"], True),
        *[([f"--fast_mode={word}"], True) for word in ("true", "True", "TRUE", "1", "yes", "y", "t")],
        *[(["--fast-mode", word], True) for word in ("true", "True", "1", "yes")],
        *[([f"--fast_mode={word}"], False) for word in ("false", "False", "0", "no", "n", "f")],
        *[(["--fast_mode", word], False) for word in ("false", "False", "0", "no")],
        (["--no_fast_mode"], False),
        (["--no-fast-mode"], False),
        (["--fast_mode", "--no_fast_mode"], False),
        (["--no_fast_mode", "--fast_mode", "--number", "-1"], True),
    ],
)
@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_a_boolean_stands_anywhere_in_any_spelling(given, value, where):
    argv = {"before": [*given, "a", "b"], "between": ["a", *given, "b"], "after": ["a", "b", *given]}[where]
    options, rest = parse(*argv)
    assert options.fast_mode is value
    assert (rest.p0, rest.p1) == ("a", "b")


def test_every_kind_of_boolean_can_be_switched_both_ways():
    assert parse("a", "b")[0] == Some(off_or_kind=False)  # "no" is a word for False
    on, _ = parse("--keep", "a", "--maybe", "b", "--off_or_kind")
    assert (on.keep, on.maybe, on.off_or_kind) == (True, True, True)
    off, _ = parse("--no-keep", "a", "--no_maybe", "--no_off_or_kind", "--no_never_or_name", "b")
    assert (off.keep, off.maybe, off.off_or_kind, off.never_or_name) == (False, False, False, False)
    text, _ = parse("a", "b", "--off_or_kind", "all", "--never_or_name", "me/space")
    assert (text.off_or_kind, text.never_or_name) == ("all", "me/space")
    assert parse("a", "b", "--never_or_name", "False")[0].never_or_name is False


def test_a_word_after_a_boolean_is_its_value_only_where_the_command_still_has_its_arguments(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="'true' is the value of --keep, a file of that name is ./true"):
        parse("a", "--keep", "true")
    (tmp_path / "true").mkdir()
    options, rest = parse("--keep", "true", "b")
    assert options.keep is True and (rest.p0, rest.p1) == ("true", "b")
    options, rest = parse("--no_keep", "--fast_mode", "yes", "true", "b")
    assert options.fast_mode is True and (rest.p0, rest.p1) == ("true", "b")
    options, rest = parse("--fast_mode", "./true", "b")
    assert options.fast_mode is True and (rest.p0, rest.p1) == ("./true", "b")
    options, rest = parse("--fast_mode", "--", "true", "--keep")
    assert options.fast_mode is True and (rest.p0, rest.p1) == ("true", "--keep")


def test_a_list_of_files_goes_on_after_a_boolean():
    options, rest = parse("a", "b", "--fast_mode", "c", "--many", "x", "y", positionals=({}, {"nargs": "+"}))
    assert options.fast_mode is True and options.many == ["x", "y"] and rest.p1 == ["b", "c"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--fast_mode=maybe", "a", "b"], "argument --fast_mode: must be True or False, got 'maybe'"),
        (["--fast_mode=", "a", "b"], "argument --fast_mode: must be True or False, got ''"),
        (["--fast_mode", "Ture", "a", "b"], "argument --fast_mode: must be True or False, got 'Ture'"),
        (["a", "b", "--fast-mode", "on"], "argument --fast-mode: must be True or False, got 'on'"),
        (["a", "b", "--no_keep", "false"], "argument --no_keep: takes no value, got 'false'"),
        (["a", "b", "--fast", "true"], "unknown option --fast"),
        (["a", "b", "c"], "unexpected argument 'c'"),
        (["a"], "arguments are required: P1"),
    ],
)
def test_misspelt_booleans_give_one_line(argv, message):
    with pytest.raises(UsageError, match=message):
        parse(*argv)


def test_a_misspelt_boolean_is_not_taken_for_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = ({}, {"nargs": "+"})
    with pytest.raises(UsageError, match="--fast_mode: must be True or False, got 'flase'"):
        parse("a", "b", "--fast_mode", "flase", positionals=many)
    (tmp_path / "flase").write_text("")
    assert parse("a", "b", "--fast_mode", "flase", positionals=many)[1].p1 == ["b", "flase"]


def test_booleans_of_a_json_file(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(
        json.dumps(
            {"fast-mode": "yes", "no_keep": True, "maybe": 0, "off_or_kind": "all", "p0": 1, "p1": "b"}
        )
    )
    options, rest = parse(path)
    assert options == Some(fast_mode=True, keep=False, maybe=False, off_or_kind="all")
    assert (rest.p0, rest.p1) == ("1", "b")
    assert parse(path, "--keep")[0].keep is True
    path.write_text('{"p0": "a", "p1": "b", "fast_mode": "Ture"}')
    with pytest.raises(UsageError, match="--fast_mode: must be True or False, got 'Ture'"):
        parse(path)


def test_every_boolean_of_train_takes_every_form():
    hints = get_type_hints(TrainArguments)
    names = [each.name for each in fields(TrainArguments) if each.init]
    booleans = [name for name in names if hints[name] is bool or bool in get_args(hints[name])]
    assert len(booleans) > 40
    options = train.make_parser()._option_string_actions
    made = train.make_parser()
    for name in booleans:
        dashed = name.replace("_", "-")
        for argv, value in (
            ([f"--{name}"], True),
            ([f"--{dashed}", "yes"], True),
            ([f"--{name}=0"], False),
            ([f"--no_{name}"], False),
            ([f"--no-{dashed}"], False),
        ):
            found, unknown = made.parse_known_args(made._sorted([*NEEDED, *argv]))
            assert getattr(found, name) is value and not unknown, argv
        assert options[f"--no_{name}"].dest == name


def test_options_that_are_a_boolean_or_a_folder():
    def given(*argv):
        arguments = train.make_parser().parse([*NEEDED, *argv])[3]
        return arguments.cache_features, arguments.resume_from_checkpoint

    assert given("--cache_features", "--resume_from_checkpoint") == ("o/feature_cache", "True")
    assert given("--cache-features=yes", "--resume_from_checkpoint", "1") == ("o/feature_cache", "True")
    assert given("--no_cache_features", "--no-resume-from-checkpoint") == (None, "False")
    assert given("--cache_features", "c", "--resume_from_checkpoint", "o/checkpoint-3") == (
        "c",
        "o/checkpoint-3",
    )


def test_a_misspelt_word_of_an_option_with_words_and_booleans_is_refused():
    assert train.make_parser().parse([*NEEDED, "--include_num_input_tokens_seen", "all"])[3]
    with pytest.raises(UsageError, match="--include_num_input_tokens_seen must be .* got 'flase'"):
        train.make_parser().parse([*NEEDED, "--include_num_input_tokens_seen", "flase"])


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"demo"}))  # which has none
def test_help_names_a_boolean_once_and_says_how_to_switch_it(command):
    module = importlib.import_module(f"whisper_meft.commands.{COMMANDS[command][0]}")
    text = module.make_parser().format_help()
    assert " --no_option " in " ".join(text.split())
    assert "BOOL" not in text and "\n  --no_" not in text
