"""``python -m examples.real_speech``: the studies on recordings of people, and their pages.

    python -m examples.real_speech run --model openai/whisper-base --speech DIR --work DIR
    python -m examples.real_speech report --work DIR      # results/, this folder's README.md and its figures
    python -m examples.real_speech noise --model openai/whisper-base --speech DIR --work DIR
    python -m examples.real_speech report --noise --work DIR      # results/ and NOISE.md
    python -m examples.real_speech transcribe --model openai/whisper-base --speech DIR --work DIR
    python -m examples.real_speech report --transcription --work DIR      # results/ and TRANSCRIPTION.md
    python -m examples.real_speech report --attention      # ATTENTION.md, of this study and examples/study

``run`` (of classification), ``noise`` and ``transcribe`` go through their plan (``--list`` shows it) and
write a file into ``--work`` for every run that ends; whatever stops them, the same command goes on where it
was, a run of classification that was cut off from its last epoch. A file called ``stop`` in ``--work`` ends
them before the next run.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
for folder in (ROOT, ROOT / "python"):  # a plain checkout needs no installation
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import torch  # noqa: E402
from whisper_meft.errors import UserError, one_line  # noqa: E402


def run(options: argparse.Namespace) -> int:
    from .cells import Study
    from .plan import plan
    from .pooled import run_logistic
    from .report import take_up

    study = Study(options.model, options.speech, options.work)
    if options.records is not None:
        print(f"took up {take_up(study, options.records)} rows of {options.records}")

    def name(cell: Any) -> str:
        return f"{cell.row.task} {cell.row.entry} fold {cell.fold}"

    def work(cell: Any) -> str:
        if not options.rows:
            run_logistic(study, cell.row.task)
        found = study.run(cell)
        told = f"{name(cell)} rate {found['rate']:g} seed {found['seed']}"
        if found["status"] == "ok":
            score = f"validation {found['validation_accuracy']:.1%}"
            return f"{told}: {score}, {found['cpu_seconds']} s of CPU time"
        return f"{told}: {found['status']}"

    return _go_through(options, study, plan(), name, name, work)


def transcribe(options: argparse.Namespace) -> int:
    from .transcription_cells import Recognition
    from .transcription_plan import plan

    study = Recognition(options.model, options.speech, options.work)

    def name(cell: Any) -> str:
        return f"{cell.row.language} {cell.row.entry}"

    def work(cell: Any) -> str:
        found = study.run(cell)
        told = name(cell) + ("" if found["rate"] is None else f" rate {found['rate']:g} seed {found['seed']}")
        if found["status"] == "ok":
            return (
                f"{told}: validation CER {found['dev_rate']:.1%}, {found.get('cpu_seconds', 0)} s of CPU time"
            )
        return f"{told}: {found['status']}"

    return _go_through(options, study, plan(), name, name, work)


def noise(options: argparse.Namespace) -> int:
    from .noise_cells import NoiseStudy
    from .noise_plan import plan

    study = NoiseStudy(options.model, options.speech, options.work)

    def name(cell: Any) -> str:
        return f"{cell.row.entry} augment {cell.row.how} fold {cell.fold}"

    def work(cell: Any) -> str:
        found = study.run(cell)
        if found["status"] != "ok":
            return f"{name(cell)}: {found['status']}"
        right = [
            sum(a == b for a, b in zip(answers, found["validation_reference"])) / len(answers)
            for answers in found["validation"].values()
        ]
        shares = ", ".join(f"{what} {share:.1%}" for what, share in zip(found["validation"], right))
        return f"{name(cell)}: validation {shares}, {found['cpu_seconds']} s of CPU time"

    return _go_through(options, study, plan(), lambda cell: cell.row.entry, name, work)


def _go_through(
    options: argparse.Namespace,
    study: Any,
    cells: Iterable[Any],
    begins: Callable[[Any], str],
    name: Callable[[Any], str],
    work: Callable[[Any], str],
) -> int:
    """Runs what is open of a plan.

    Args:
        begins: of a cell, what ``--rows`` is the beginning of. name: what ``--list`` calls it.
        work: runs a cell; gives the line that is said of it.
    """
    rows = [each for each in (options.rows or "").split(",") if each]
    cells = [cell for cell in cells if not rows or begins(cell).startswith(tuple(rows))]
    if not cells:
        raise UserError(f"--rows: no row of the plan begins with {options.rows!r}")
    if options.list:
        for cell in dict.fromkeys(cells):
            rate = "found" if cell.rate is None else f"{cell.rate:g}"
            print(f"{'done' if study.done(cell) else 'open'}  {name(cell)} rate {rate} seed {cell.seed}")
        return 0
    started = time.monotonic()
    for cell in cells:
        if (options.work / "stop").exists():
            print("stopped: there is a file called stop")
            return 0
        if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
            print(f"stopped: {options.minutes:g} minutes are over")
            return 0
        if study.possible(cell) and not study.done(cell):
            print(time.strftime("%H:%M"), work(cell), flush=True)
    return 0


def report(options: argparse.Namespace) -> int:
    name = "README.md"
    if options.transcription:
        from . import transcription_report as pages

        name = "TRANSCRIPTION.md"
    elif options.noise:
        from . import noise_report as pages

        name = "NOISE.md"
    elif options.attention:
        from . import attention_report as pages

        name = "ATTENTION.md"
    else:
        from . import report as pages

    page = options.page or HERE / name
    for path in pages.write(options.work, options.results, page):
        print(f"wrote {path.name}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.real_speech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = parser.add_subparsers(dest="command", required=True)
    named = {
        "run": "task and entry begin",
        "noise": "entry begins",
        "transcribe": "language and entry begin",
    }
    for name, begins in named.items():
        runs = chosen.add_parser(name, help="go through the plan")
        runs.add_argument(
            "--model", default="openai/whisper-base", help="Whisper, a folder or a name on the hub"
        )
        runs.add_argument("--speech", type=Path, required=True, help="folder of recordings and manifests")
        runs.add_argument("--work", type=Path, required=True, help="folder for rows, features and runs")
        runs.add_argument("--rows", help=f"only rows whose {begins} with one of these, with commas between")
        runs.add_argument("--minutes", type=float, help="begin nothing after so many")
        runs.add_argument("--list", action="store_true", help="show the plan, run nothing")
        if name == "run":
            runs.add_argument(
                "--records",
                type=Path,
                help="go on from this folder's records (such as results/), of the same model and recordings",
            )
    pages = chosen.add_parser("report", help="write the results, the page's tables and the figures")
    pages.add_argument("--work", type=Path, help="take over the rows that ended there")
    pages.add_argument("--results", type=Path, default=HERE / "results", help="folder of the records")
    pages.add_argument("--page", type=Path, help="the page (default: the one beside this)")
    which = pages.add_mutually_exclusive_group()
    which.add_argument("--transcription", action="store_true", help="those of transcription")
    which.add_argument("--noise", action="store_true", help="those of training for noise")
    which.add_argument("--attention", action="store_true", help="those of UniPT's attention, from results/")
    options = parser.parse_args(argv)
    try:
        return {"run": run, "noise": noise, "transcribe": transcribe, "report": report}[options.command](
            options
        )
    except UserError as error:
        print(f"examples.real_speech: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("examples.real_speech: interrupted; run again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(main())
