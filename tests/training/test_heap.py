"""Freed memory stays with the process, unless the environment has its own way."""

import os
import subprocess
import sys

import pytest
from whisper_meft.training import heap

# Blocks that have no mapping of their own are freed at the heap's top; how many pages the next ones fault in.
ROUNDS = """
import resource, runpy, sys

print(runpy.run_path(sys.argv[1])["keep_freed_memory"]())
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(2**22) for _ in range(32)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del blocks
print(faults)
"""


def test_freed_memory_is_kept():
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ROUNDS, heap.__file__]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, check=True)
    said, faults = done.stdout.split()
    if said == "False":
        pytest.skip("this C library has no mallopt")
    assert int(faults) < 32 * 2**22 / 4096 / 8  # an eighth of the pages


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_has_its_way(name, monkeypatch):
    monkeypatch.setenv(name, "65536")
    assert not heap.keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not heap.keep_freed_memory()
