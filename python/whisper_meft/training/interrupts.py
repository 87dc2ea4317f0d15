"""Ctrl-C that is not lost during training."""

import signal
import threading
from typing import Any

from transformers import TrainerCallback


class Interrupts(TrainerCallback):
    """Raises KeyboardInterrupt at the end of a step if the one that SIGINT raised came to nothing: Python
    prints and drops it where it falls into a destructor or a callback from C.

    Also a context manager, which listens while it is entered, in the main thread and where nobody else does.
    """

    def __init__(self):
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> "Interrupts":
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _note(self, *_) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            raise KeyboardInterrupt
