"""Ctrl-C during training."""

import os
import signal

import pytest
from whisper_meft.training.interrupts import Interrupts


@pytest.fixture(autouse=True)
def _listening():
    """Python's own handler, which is missing where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Swallows:
    """An object in whose destructor the signal arrives."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallows_ends_the_step():
    interrupts = Interrupts()
    with interrupts:
        interrupts.on_step_end(None, None, None)
        Swallows()
        with pytest.raises(KeyboardInterrupt):
            interrupts.on_step_end(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_whoever_listens_already_goes_on_listening():
    def handler(*_):
        pass

    before = signal.signal(signal.SIGINT, handler)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) is handler
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
