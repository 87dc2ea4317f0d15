"""``python -m examples.real_speech``: the study on recordings of people, and its page.

    python -m examples.real_speech run --model openai/whisper-base --speech DIR --work DIR
    python -m examples.real_speech report --work DIR      # results/, this folder's README.md and its figures

``run`` goes through the plan (``--list`` shows it) and writes a file into ``--work`` for every run that ends;
whatever stops it, the same command goes on where it was, a run that was cut off from its last epoch. A file
called ``stop`` in ``--work`` ends it before the next run.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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

    study = Study(options.model, options.speech, options.work)
    rows = [each for each in (options.rows or "").split(",") if each]
    cells = [cell for cell in plan() if not rows or cell.row.entry.startswith(tuple(rows))]
    if not cells:
        raise UserError(f"--rows: no row of the plan begins with {options.rows!r}")
    if options.list:
        for cell in dict.fromkeys(cells):
            rate = "found" if cell.rate is None else f"{cell.rate:g}"
            told = f"{cell.row.task} {cell.row.entry} fold {cell.fold} rate {rate} seed {cell.seed}"
            print(f"{'done' if study.done(cell) else 'open'}  {told}")
        return 0
    started = time.monotonic()
    for cell in cells:
        if (options.work / "stop").exists():
            print("stopped: there is a file called stop")
            return 0
        if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
            print(f"stopped: {options.minutes:g} minutes are over")
            return 0
        no_rate = cell.rate is None and study.rate_of(cell.row) is None  # all of the row's failed
        if no_rate or study.done(cell):
            continue
        if not rows:
            run_logistic(study, cell.row.task)
        found = study.run(cell)
        told = "{task} {entry} fold {fold} rate {rate:g} seed {seed}".format(**found)
        if found["status"] == "ok":
            told += f": validation {found['validation_accuracy']:.1%}, {found['cpu_seconds']} s of CPU time"
        else:
            told += f": {found['status']}"
        print(time.strftime("%H:%M"), told, flush=True)
    return 0


def report(options: argparse.Namespace) -> int:
    from . import report as pages

    for path in pages.write(options.work, options.results, options.page):
        print(f"wrote {path.name}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.real_speech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="go through the plan")
    runs.add_argument("--model", default="openai/whisper-base", help="Whisper, a folder or a name on the hub")
    runs.add_argument("--speech", type=Path, required=True, help="folder of recordings and manifests")
    runs.add_argument("--work", type=Path, required=True, help="folder for rows, features and runs")
    runs.add_argument("--rows", help="only rows whose entry begins with one of these, with commas between")
    runs.add_argument("--minutes", type=float, help="begin nothing after so many")
    runs.add_argument("--list", action="store_true", help="show the plan, run nothing")
    pages = commands.add_parser("report", help="write the results, the page's tables and the figures")
    pages.add_argument("--work", type=Path, help="take over the rows that ended there")
    pages.add_argument("--results", type=Path, default=HERE / "results", help="folder of the records")
    pages.add_argument("--page", type=Path, default=HERE / "README.md", help="the page")
    options = parser.parse_args(argv)
    try:
        return {"run": run, "report": report}[options.command](options)
    except UserError as error:
        print(f"examples.real_speech: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("examples.real_speech: interrupted; run again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(main())
