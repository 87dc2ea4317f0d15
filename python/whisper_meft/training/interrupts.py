"""Ctrl-C and SIGTERM during training: the step is finished, and a checkpoint written."""

import os
import signal
import threading
from typing import Any

from transformers import TrainerCallback

from .console import main_process

# Seconds after which a process that should have ended is told again: an exception that a signal raises is
# lost where Python happens to run a destructor or a weak reference's callback.
AGAIN_SECONDS = 10.0


class Stopped(Exception):
    """Training was stopped on request, at a step from which it can go on."""


class Interrupts(TrainerCallback):
    """Takes SIGINT and SIGTERM as a request to stop after the step, which :class:`.trainer.MeftTrainer` does.

    A second SIGINT stops at once, as does either of them outside training. Listens while it is entered, in
    the main thread and where nobody else does.

    Attributes:
        asked: the signal that came, or None.
        epoch_over: whether the last step of an epoch lies behind, and what belongs to its end is done.
    """

    def __init__(self):
        self.asked: int | None = None
        self.epoch_over = False
        self._training = False
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()
        self._again: threading.Timer | None = None

    def __enter__(self) -> "Interrupts":
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():
            for number, handler in usual.items():
                if signal.getsignal(number) is handler:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._tell_again(None)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # one that reads data: it ends with this one
        again, self.asked = self.asked is not None, number
        if not self._training or (again and number == signal.SIGINT):
            if main_process() and number == signal.SIGTERM:
                os.write(2, b"\nstopped by SIGTERM; where there is a checkpoint, resuming goes on from it\n")
            self.leave()
        if main_process() and not again:
            # Not print, which may be at work in the code that the signal interrupted.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C stops at once\n")

    def leave(self) -> None:
        """Ends the process as the signal would: by KeyboardInterrupt, or by SystemExit with status 143."""
        if self.asked == signal.SIGTERM:
            if signal.SIGTERM in self._previous:
                self._tell_again(signal.SIGTERM)
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _tell_again(self, number: int | None) -> None:
        """Sends the process that signal in a while, unless it has left by then; None: no more."""
        if self._again is not None:
            self._again.cancel()
        self._again = None
        if number is not None:
            self._again = threading.Timer(AGAIN_SECONDS, os.kill, (self._process, number))
            self._again.daemon = True
            self._again.start()

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch_over = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epoch_over = True

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
