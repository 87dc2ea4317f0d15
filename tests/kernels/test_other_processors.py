"""The decisive numeric checks once more, as processors compute them whose libraries take other paths.

How the terms of a sum are grouped, and so which digits are lost, is up to torch's own vectors, oneDNN and
MKL, and to NumPy's OpenBLAS under Triton's interpreter. Environment variables make this processor take the
paths of older ones. MKL heeds ``MKL_ENABLE_INSTRUCTIONS`` on Intel's processors alone, ``MKL_CBWR`` on all.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meft_kernels import native

ROOT = Path(__file__).parents[2]
PATHS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
FILES = ("native", "native_self_attention", "native_relu_attention", "ops")
CHECKS = "level or digits or nearly_one or as_good_as_torch and (float32 or bfloat16 and test_native)"


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the paths are x86's")
@pytest.mark.skipif(not native.LOADED, reason=native.REASON)
@pytest.mark.parametrize("level", PATHS)
def test_values_and_gradients(level):
    if level == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = [f"tests/kernels/test_{name}.py" for name in FILES]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHECKS, *files],
        env={**environment, **PATHS[level]},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:]
