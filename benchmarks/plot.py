"""``python -m benchmarks.plot``: the documentation's tables and figures, from the records of runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from whisper_meft.errors import UserError, one_line
from whisper_meft.files import write_text

from . import figures, pages, record

STUDY = record.ROOT / "examples" / "study" / "results"
FIGURES = record.ROOT / "docs" / "figures"


def read_records(results: Path, study: Path) -> list[dict]:
    """The records of the benchmarks and of the study, in order of their dates each.

    Raises:
        UserError: ``results`` is no folder, or a file is no record.
    """
    if not results.is_dir():
        raise UserError(f"results must be a folder of records, there is none at {results}")
    return record.load_all(results) + record.load_all(study)


def written(records: list[dict], paths: Sequence[Path], folder: Path) -> dict[Path, str]:
    """What is kept in the repository, as the records give it: pages with tables, and figures in ``folder``.

    Raises:
        UserError: a page cannot be read, or has an unknown table.
    """
    found = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}") from error
        found[path] = pages.filled(text, records)
    drawn = {folder / f"{name}.svg": draw(records) for name, draw in figures.FIGURES.items()}
    return found | {path: text for path, text in drawn.items() if text is not None}


def _is_new(path: Path, text: str) -> bool:
    return not path.is_file() or path.read_text(encoding="utf-8") != text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the records")
    parser.add_argument("--study", type=Path, default=STUDY, help="folder of the study's records")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=pages.PAGES, help="files whose marked tables are rewritten"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a table or a figure is out of date"
    )
    options = parser.parse_args(argv)
    try:
        records = read_records(options.results, options.study)
        new = written(records, options.pages, options.figures)
        stale = [path for path, text in new.items() if _is_new(path, text)]
        if options.check:
            if stale:
                names = ", ".join(map(str, stale))
                raise UserError(f"out of date: {names}: run python -m benchmarks.plot")
            return 0
        for path, text in new.items():
            if path in stale:
                write_text(path, text)
            print(f"{path}: {'rewritten' if path in stale else 'up to date'}, {len(records)} records")
    except UserError as error:
        print(f"benchmarks.plot: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
