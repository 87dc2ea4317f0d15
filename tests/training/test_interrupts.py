"""Ctrl-C and SIGTERM: what is taken as a request, and what ends a process at once."""

import os
import signal
import time

import pytest
from whisper_meft.training import interrupts as module
from whisper_meft.training.interrupts import Interrupts


@pytest.fixture(autouse=True)
def _listening():
    """Python's own handlers, which are missing where a shell started the tests in the background."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Swallows:
    """An object in whose destructor the signal arrives: what is raised there is lost."""

    def __init__(self, number: int = signal.SIGINT):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)


def test_a_request_during_training_is_kept_until_the_step_ends(capfd):
    with Interrupts() as interrupts:
        interrupts.on_train_begin(None, None, None)
        assert interrupts.asked is None
        Swallows()
        assert interrupts.asked == signal.SIGINT
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            interrupts.leave()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_ctrl_c_ends_it_at_once_and_a_second_sigterm_does_not():
    with Interrupts() as interrupts:
        interrupts.on_train_begin(None, None, None)
        for _ in range(2):  # a cluster may send it to a process and to its parent, who hands it on
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.asked == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_training_either_ends_it_at_once(capfd):
    with Interrupts() as interrupts:
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 143 and "stopped by SIGTERM" in capfd.readouterr().err
        interrupts.on_train_begin(None, None, None)
        interrupts.on_train_end(None, None, None)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_whoever_listens_already_goes_on_listening():
    def handler(*_):
        pass

    signal.signal(signal.SIGINT, handler)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) is handler
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sigterm_that_was_lost_comes_again(monkeypatch):
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.2)
    with pytest.raises(SystemExit) as ended, Interrupts() as interrupts:
        Swallows(signal.SIGTERM)  # its SystemExit is lost
        assert interrupts.asked == signal.SIGTERM
        time.sleep(20)
    assert ended.value.code == 143
    time.sleep(0.5)  # and does not come once more: the handler is the one that ends a process


def test_a_process_that_leaves_is_left_alone(monkeypatch):
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.1)
    with pytest.raises(SystemExit), Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.4)
