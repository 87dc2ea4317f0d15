"""Who prints and writes in a run of several processes."""

import os


def main_process() -> bool:
    """Whether this is the process that prints and writes (the only one, or rank 0 under torchrun)."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Prints a line, from the main process only."""
    if main_process():
        print(text, flush=True)
