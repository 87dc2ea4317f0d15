"""Freed memory stays with the process for a while, unless the environment has its own way."""

import os
import subprocess
import sys

import pytest
from whisper_meft.training import heap

# Blocks that have no mapping of their own are freed at the heap's top: how many pages the next ones fault in,
# and how much of them is left when it is over.
ROUNDS = """
import resource, runpy, sys

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with runpy.run_path(sys.argv[1])["freed_memory_kept"]() as kept:
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(2**22) for _ in range(32)]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        most = resident()
        del blocks
    held = resident()
print(kept, faults, most, held, resident())
"""


def test_freed_memory_is_kept_and_given_back():
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ROUNDS, heap.__file__]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, check=True)
    kept, *found = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    faults, most, held, after = map(int, found)
    blocks = 32 * 2**22
    assert faults < blocks / 4096 / 8  # an eighth of the pages
    assert most - held < blocks / 8
    assert most - after > blocks * 7 / 8


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_has_its_way(name, monkeypatch):
    monkeypatch.setenv(name, "65536")
    with heap.freed_memory_kept() as kept:
        assert not kept


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with heap.freed_memory_kept() as kept:
        assert not kept
