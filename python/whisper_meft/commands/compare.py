"""`whisper-meft compare`: every method on one dataset with one budget, fairly."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from .. import data
from ..comparison import report as compare_report
from ..comparison.arguments import CompareArguments
from ..comparison.measures import Measure
from ..comparison.runs import Comparison
from ..errors import one_line
from ..options.parser import Parser

_BEGINNING = "it trains and scores on the beginning of longer clips, which train --window cuts into examples"
_NO_CACHE = "it times each method with its pass of the backbone; train --cache_features keeps what that gives"

# What train has and a comparison has not.
ABSENT = {
    **dict.fromkeys(("window", "hop"), _BEGINNING),
    **dict.fromkeys(("cache_features", "cache_storage", "cache_copies"), _NO_CACHE),
}


def make_parser() -> Parser:
    """The parser of `whisper-meft compare`."""
    parser = Parser(
        "compare",
        (CompareArguments,),
        usage="--output_dir DIR [--methods all|a,b,c] [--quick] [--seeds 3] [options]",
        description="Trains every method on one dataset with the same budget and the same search for a "
        "learning rate, chosen on validation data, and writes test accuracy (to transcribe error rates of "
        "words and characters, beside those of the backbone alone) with its spread over seeds, step time, "
        "memory and trained parameters as JSON, Markdown and figures. Run again to go on.",
    )
    parser.absent = ABSENT
    return parser


def run(argv: Sequence[str]) -> int:
    """`whisper-meft compare`; returns the exit status: 1 if a method failed."""
    (arguments,) = make_parser().parse(argv)
    threads = torch.get_num_threads()
    if arguments.model_name_or_path is None:
        torch.set_num_threads(1)  # the shipped model is too small to gain from a second one
    try:
        return _run(arguments)
    finally:
        torch.set_num_threads(threads)


def _test_score(measure: Measure, row: dict[str, Any]) -> str:
    score = f"{row[measure.key]['mean']:.1%}"
    return f"WER {score} on the test clips" if measure.key == "wer" else f"{score} of the test clips"


def _run(arguments: CompareArguments) -> int:
    started = time.perf_counter()
    comparison = Comparison(arguments)
    if arguments.train_data is None:
        print("The corpus is synthetic speech: its scores say nothing about how well methods do on people.")
    print(
        f"{len(arguments.chosen)} methods x ({len(arguments.learning_rates)} learning rates + "
        f"{arguments.seeds - 1} more seeds), {arguments.num_train_epochs:g} epochs of "
        f"{len(comparison.examples.training)} clips each; chosen on {len(comparison.examples.evaluation)} "
        f"validation clips, scored on {len(comparison.test)} test clips",
        flush=True,
    )
    if comparison.left_out:
        parts = (comparison.examples.training, comparison.examples.evaluation, comparison.test)
        total = len(comparison.left_out) + sum(map(len, parts))
        print(data.describe_bad(comparison.left_out, total), flush=True)
    rows: dict[str, Any] = {}
    if arguments.task == "transcribe":
        rows[compare_report.ZERO_SHOT] = comparison.zero_shot()
        print(f"zero-shot: {_test_score(comparison.measure, rows[compare_report.ZERO_SHOT])}", flush=True)
    results = {"settings": {**comparison.settings, "seeds": arguments.seeds}, "methods": rows}
    results["settings"]["learning_rates"] = arguments.learning_rates
    for method in arguments.chosen:
        try:
            rows[method] = comparison.compare(method, lambda text: print(text, flush=True))
        except Exception as error:
            rows[method] = {"status": "failed", "reason": one_line(error)}
            print(f"{method}: failed: {rows[method]['reason']}", flush=True)
        else:
            row = rows[method]
            print(
                f"{method}: {_test_score(comparison.measure, row)} at learning rate "
                f"{row['learning_rate']:g}, {row['step_time_ratio']:.2f} x the frozen backbone's inference, "
                f"{row['counted_mib']:.0f} MiB",
                flush=True,
            )
        compare_report.write(results, comparison.output)
    failed = [method for method, row in rows.items() if row["status"] == "failed"]
    print(f"\n{compare_report.table(results)}\n")
    print(f"results are in {comparison.output}; {time.perf_counter() - started:.0f} seconds")
    if failed:
        print(f"whisper-meft: error: {', '.join(failed)} failed, see the table", file=sys.stderr)
    return 1 if failed else 0
