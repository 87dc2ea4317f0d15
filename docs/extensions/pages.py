"""The parts of the documentation that are made from the code, as Markdown, so that they cannot go stale."""

import argparse
import importlib
import inspect
import re
from collections.abc import Callable

import torch
from whisper_meft.commands.cli import COMMANDS

from meft_kernels import reference, testing
from meft_kernels.tune.table import TABLE

GPUS = {"H100": 3.35e12, "H200": 4.8e12}  # bytes per second
PRODUCTS = 990e12  # FLOP per second of either, dense bf16
BATCH, FRAMES = 128, 1500
TOKENS, VOCABULARY = 64, 51865
FACTORS = (16, 8, 4, 2)
WIDTH, LAYERS = 768, 12  # of whisper-small


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _docstring(op: str) -> str:
    thing = reference.row_statistics if op == "row_statistics" else getattr(reference, op)
    return inspect.getdoc(thing) or ""


def maths(op: str) -> str:
    """The docstring of the reference: what the op computes, and its gradient."""
    parts = []
    for block in _docstring(op).split("\n\n"):
        if block.startswith("    "):
            parts.append(f"```text\n{inspect.cleandoc(block)}\n```")
        else:
            parts.append(re.sub(r"``([^`]*)``", r"`\1`", _escaped(block)))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    return re.sub(r"(?<!`)([*_<>\[\]|])(?!`)", r"\\\1", text)


def floors(op: str) -> str:
    """What an op cannot do without on whisper-small, for each reduction factor that makes a difference."""
    text = (
        f"What no kernel can do without, at {BATCH} clips of {FRAMES} frames in bfloat16 on Whisper-small; "
        "see [how to read it](index.md#floors)."
    )
    if op == "eight_bit":
        return f"{text}\n\n{_eight_bit_floors()}"
    if op == "linear_cross_entropy":
        return _head_floors()
    one = op == "row_statistics"  # the side width does not matter, and there is no backward
    rows = []
    for side in [WIDTH // factor for factor in FACTORS[: 1 if one else None]]:
        case = testing.real_case(op, BATCH, FRAMES, WIDTH, side, LAYERS)
        directions = [case.cost(torch.bfloat16, backward) for backward in (False, True)[: 1 if one else None]]
        rows.append((str(side), *(cell for cost in directions for cell in _bounds(cost.bytes, cost.flops))))
    header = ("r", *(f"forward, {_BOUNDS[0]}", *_BOUNDS[1:]), *(f"backward, {_BOUNDS[0]}", *_BOUNDS[1:]))
    if one:
        header, rows = header[1:5], [row[1:] for row in rows]
    return f"{text}\n\n{_table(header, rows)}"


_BOUNDS = ("MB", "GFLOP", *(f"ms on {gpu}" for gpu in GPUS))


def _bounds(nbytes: int, flops: int) -> list[str]:
    """The cells under ``_BOUNDS``; M and C say what bounds, memory or computing."""
    cells = [f"{nbytes / 1e6:,.0f}", f"{flops / 1e9:,.1f}" if flops else ""]
    for bandwidth in GPUS.values():
        moved, computed = nbytes / bandwidth, flops / PRODUCTS
        cells.append(f"{1e3 * max(moved, computed):.3f} {'M' if moved >= computed else 'C'}")
    return cells


def _eight_bit_floors() -> str:
    """It is none of the case table's ops: it makes no products and has no gradient."""
    elements = BATCH * FRAMES * WIDTH
    half, code = 2, 1
    return _table(
        ("", *_BOUNDS),
        [
            # A channel's shift and scale must be known before its first code: the states are read twice.
            ("encode", *_bounds(elements * (2 * half + code), 0)),
            ("decode", *_bounds(elements * (code + half), 0)),
        ],
    )


def _head_floors() -> str:
    """Of the decoder's head, with a gradient to its input alone."""
    case = testing.Case("linear_cross_entropy", BATCH, TOKENS, WIDTH, VOCABULARY)
    costs = [case.cost(torch.bfloat16, backward) for backward in (False, True)]
    return (
        f"What no kernel can do without, at {BATCH} clips of {TOKENS} tokens, {VOCABULARY} to choose from, "
        f"in bfloat16 on Whisper-small, no token ignored; see [how to read it](index.md#floors).\n\n"
        + _table(
            ("", *_BOUNDS),
            [(name, *_bounds(cost.bytes, cost.flops)) for name, cost in zip(("forward", "backward"), costs)],
        )
    )


def blocks(op: str) -> str:
    """The rows of the table of block sizes that serve the op's kernels."""
    found = [row for row in TABLE if row.kernel == op or row.kernel.startswith(f"{op}_")]
    if not found:
        return "This op has no Triton kernel, and so no block sizes."
    rows = []
    for row in sorted(found, key=lambda row: row.kernel):
        sizes = ", ".join(f"{name.removeprefix('BLOCK_')} {size}" for name, size in row.blocks.items())
        widths = "–".join(map(str, row.widths))
        launch = f"{row.num_warps}, {row.num_stages}"
        rows.append((f"`{row.kernel}`", widths, row.family, sizes, launch, _escaped(row.reason)))
    header = ("kernel", "widths", "family", "block sizes", "warps, stages", "reason")
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def commands() -> str:
    """The subcommands with a line about each."""
    return "\n".join(f"- [`whisper-meft {name}`](#{name}): {text}" for name, (_, text) in COMMANDS.items())


def options(command: str) -> str:
    """Usage, description and options of a subcommand, from its parser."""
    return _described(importlib.import_module(f"whisper_meft.commands.{COMMANDS[command][0]}").make_parser())


def module_options(name: str) -> str:
    """The same of a module that is run by ``python -m``."""
    return _described(importlib.import_module(f"{name}.__main__")._parser())


def _described(parser: argparse.ArgumentParser) -> str:
    parts = [_escaped(parser.description or ""), f"```text\n{parser.format_usage().strip()}\n```"]
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        shown = [action for action in shown if not isinstance(action, argparse._HelpAction)]
        if not shown:
            continue
        if group.title not in ("options", "positional arguments"):
            parts.append(f"**{group.title}**")
        parts += [_option(parser, action) for action in shown]
    return "\n\n".join(parts)


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    name = formatter._format_action_invocation(action)
    text = _escaped(" ".join(formatter._expand_help(action).split())) if action.help else ""
    return f"`{name}`\n: {text}"


PARTS: dict[str, Callable[..., str]] = {
    "maths": maths,
    "floors": floors,
    "blocks": blocks,
    "commands": commands,
    "options": options,
    "module_options": module_options,
}
