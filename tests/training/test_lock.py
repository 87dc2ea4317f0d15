"""The lock on a run's folder: kept by one, gone with its holder."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from whisper_meft.errors import UserError
from whisper_meft.training import lock

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}

CHILD = """
import multiprocessing, os, sys, time
from pathlib import Path
from whisper_meft.training.lock import locked

def work():
    print(os.getpid(), flush=True)  # from the child itself: it is well past the fork then
    time.sleep(60)

with locked(Path(sys.argv[1])):
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    time.sleep(60)
"""


def test_a_killed_run_leaves_no_lock_not_even_in_its_children(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, out]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(UserError, match=f"process {process.pid} on"), lock.locked(out):
                pass
            process.kill()
            process.wait()
            os.kill(child, 0)  # it lives
            assert (out / lock.LOCK).exists()
            with lock.locked(out):
                pass
        finally:
            process.kill()
            os.kill(child, 9)
    assert list(out.iterdir()) == []


def test_without_locks_in_the_file_system_a_run_goes_on(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with lock.locked(tmp_path / "out"):
        assert (tmp_path / "out" / lock.LOCK).is_file()
    assert not (tmp_path / "out").exists()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    original, calls = fcntl.flock, []

    def removed_once(descriptor, how):
        original(descriptor, how)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / lock.LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", removed_once)
    with lock.locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError, match="another run"), lock.locked(tmp_path):
            pass
