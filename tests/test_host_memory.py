"""Freed memory is kept for the next batch in programs, and only there."""

import os
import subprocess
import sys

import pytest

TOUCH_TWICE = """
import resource, sys
import torch
from whisper_meft import cli, host_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**20 // 4)  # more than glibc ever keeps of its own accord
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{change}
faults()
print(faults())
"""


def faults(change: str, **environment: str) -> int:
    """Pages that the system hands out for a block of 48 MiB when one of its size was just freed."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    plain |= {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "-c", TOUCH_TWICE.format(change=change)]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return int(done.stdout.split()[-1])


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc's allocator alone"
)


def test_a_program_keeps_what_it_freed():
    run_as_program = "sys.argv = ['whisper-meft', 'predict', '--help']; cli.main()"
    assert faults("pass") > 500
    assert faults(run_as_program) < 100


def test_a_library_call_leaves_the_process_as_it_is():
    assert faults("cli.main(['predict', '--help'])") > 500


def test_the_environment_has_the_last_word():
    change = "assert not host_memory.keep_freed_blocks()"
    assert faults(change, MALLOC_TRIM_THRESHOLD_="65536") > 500
