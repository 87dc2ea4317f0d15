"""`whisper-meft`: finds the subcommand, runs it, and turns every failure into one line and an exit status.

Exit status: 0 success; 1 something failed; 2 the command line makes no sense; 130 interrupted. Set
WHISPER_MEFT_DEBUG=1 to see tracebacks.
"""

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from ..errors import one_line, printable

# Subcommand -> (module of this folder with a function run(argv) -> exit status, one line of help).
COMMANDS = {
    "train": ("train", "train a side network on a frozen Whisper: with a head for classes, or to transcribe"),
    "evaluate": ("evaluate", "score a trained model on labelled or transcribed audio"),
    "calibrate": ("calibrate", "make a classifier's probabilities right, and choose what to reject"),
    "predict": ("predict", "classify or transcribe audio files"),
    "app": ("app", "a page in the browser to try a trained model on"),
    "cache": ("cache", "run the frozen backbone once, for epochs of the side network alone"),
    "compare": ("compare", "train every method on the same data with the same budget"),
    "memory": ("memory", "count what training takes of a GPU, and what would fit, without one"),
    "export": ("export", "write a trained model for ONNX or CTranslate2, to run without PyTorch"),
    "convert": ("convert", "convert checkpoints of the published code into ours, and back"),
    "demo": ("demo", "synthesise a small accent corpus, train LST on it and show the scores"),
}

USAGE = "usage: whisper-meft COMMAND [options]\n       whisper-meft COMMAND CONFIG.json [options]\n"


def help_text() -> str:
    """The top-level help; made without importing anything heavy."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return (
        f"{USAGE}\nMemory-efficient fine-tuning of Whisper for audio classification and transcription.\n\n"
        "commands:\n"
        + "\n".join(lines)
        + "\n\n`whisper-meft COMMAND --help` describes the options of a command; every option can also come\n"
        "from a JSON file. `whisper-meft --version` prints the version.\n"
    )


def _complain(message: str) -> None:
    if "tqdm" in sys.modules:
        # A progress bar that was cut off stays on its line: the message goes to the next.
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"[process {rank}] "
    print(f"whisper-meft: {where}{printable(message)}", file=sys.stderr, flush=True)


class Terminal:
    """A stream that shows control characters instead of sending them: text from files and data can then not
    act on a terminal, whoever prints it. Line ends pass, and what progress bars move the cursor by."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        moves = re.fullmatch(r"(\n|\r|\x1b\[A)*", text)
        self._stream.write(text if moves else printable(text, keep="\n\r\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Prints the package's log messages and Python warnings as single lines, from the main process only."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if os.environ.get("RANK", "0") == "0":
                # Through tqdm, which redraws a running progress bar below the line.
                from tqdm import tqdm

                text = printable(" ".join(record.getMessage().split()))
                tqdm.write(f"whisper-meft: {record.levelname.lower()}: {text}", file=sys.stderr)

    logger, handler = logging.getLogger("whisper_meft"), Handler()
    # It reports every attempt to reach the hub with two lines; the error in the end says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False

    def show(message, category, filename, lineno, file=None, line=None):
        logger.warning("%s", message)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def version() -> str:
    """The installed version, or a note when running from a plain checkout."""
    from importlib import metadata

    try:
        return metadata.version("meft-kernels")
    except metadata.PackageNotFoundError:
        return "unknown (running from a checkout that is not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status.

    Args:
        argv: arguments without the program name; default sys.argv[1:].
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # File names and labels that the terminal's encoding cannot show must not end a run.
            stream.reconfigure(errors="backslashreplace")
    debug = os.environ.get("WHISPER_MEFT_DEBUG", "0") not in ("", "0")
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(help_text(), end="")
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"whisper-meft {version()}")
            return 0
        if argv[0] not in COMMANDS:
            kind = "option" if argv[0].startswith("-") else "command"
            _complain(f"error: unknown {kind} {argv[0]!r}, accepted are {', '.join(COMMANDS)}")
            return 2
        module = importlib.import_module(f".{COMMANDS[argv[0]][0]}", __package__)
        streams = redirect_stdout(Terminal(sys.stdout)), redirect_stderr(Terminal(sys.stderr))
        with streams[0], streams[1], _one_line_warnings():
            return module.run(argv[1:])
    except KeyboardInterrupt:
        if debug:
            raise
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:
        # argparse leaves this way after --help.
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if debug:
            raise
        _complain(f"error: {one_line(error)}")
        return getattr(error, "exit_status", 1)


if __name__ == "__main__":
    sys.exit(main())
