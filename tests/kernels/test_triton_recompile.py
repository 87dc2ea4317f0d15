"""No kernel compiles again when the batch or the number of frames changes.

Needs no GPU: Triton is asked for its own cache key of every launch, and nothing is compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import importlib, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class NoDevice:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0

driver.set_active(NoDevice())
from meft_kernels import ops
from meft_kernels.ops.registration import WITHOUT_TRITON
from meft_kernels.reference import stand_in
from meft_kernels.testing import Case
from meft_kernels.triton_kernels import eight_bit

keys = {}

def key(kernel, grid, *arguments, **options):
    binder = kernel.device_caches[0][-1]
    options = {"debug": False, "instrumentation_mode": "", **options}
    _, specialization, chosen = binder(*arguments, **options)
    found = str(specialization), str(sorted(chosen.items()))
    keys.setdefault(f"{dtype} {kernel.fn.__name__}", set()).add(found)

shapes = [(2, 37), (1, 1), (1, 16), (4, 64), (3, 129), (16, 375)]
stand_in.capability = lambda device: (9, 0)
eight_bit.launch = key
for dtype in (torch.bfloat16, torch.float32):
    for op in ops.OP_NAMES:
        if op in WITHOUT_TRITON:
            continue
        module = importlib.import_module(f"meft_kernels.triton_kernels.{op}")
        module.launch = key
        for batch, frames in shapes:
            case = Case(op if op != "row_statistics" else "norm_linear", batch, frames, 192, 48, 256, 3)
            inputs = case.inputs(dtype)
            if op == "row_statistics":
                module.forward(inputs["x"])
                continue
            if op in ("norm_linear", "ladder"):
                prefix = "" if op == "norm_linear" else "down_"
                names = [prefix + name for name in ("norm_weight", "norm_bias", "weight", "bias")]
                folded = ops.fold(*(inputs.pop(name) for name in names))
                statistics = (torch.zeros(batch, frames), torch.ones(batch, frames))
                x = [inputs.pop(name) for name in ("x", "state") if name in inputs]
                arguments = [*x, *folded, *statistics, *inputs.values()]
            else:
                arguments = list(inputs.values())
            if op == "relu_attention":
                arguments = [inputs[n] for n in ("anchor", "gate_weight", "gate_bias", "lengths", "features")]
            out = module.forward(*arguments)
            flags = [] if op in ("relu_attention", "guidance") else [op == "adapter"]  # need_x
            module.backward(torch.zeros_like(out), *arguments, *flags)
    for batch, frames in shapes:
        statistics = (torch.zeros(batch, frames), torch.ones(batch, frames))
        encoded = eight_bit.encode(torch.zeros(batch, frames, 192, dtype=dtype), *statistics)
        eight_bit.decode(*encoded, torch.empty(0, dtype=dtype))
        eight_bit.decode(*encoded, torch.empty(0, dtype=dtype), *statistics)
for name, found in sorted(keys.items()):
    print(name, len(found))
    if len(found) > 1:
        print("\\n".join(map(str, found)), file=sys.stderr)
"""


def test_one_cache_key_per_kernel_whatever_batch_and_frames():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    keys: dict[str, dict[str, str]] = {"torch.bfloat16": {}, "torch.float32": {}}
    for dtype, name, count in map(str.split, result.stdout.splitlines()):
        keys[dtype][name] = count
    for found in keys.values():
        assert len(found) >= 18
        several = {name: count for name, count in found.items() if count != "1"}
        # The former's forward and backward calls differ in what is None, the latter gives n or x.
        assert several == {"relu_attention_sum_kernel": "2", "eight_bit_decode_kernel": "2"}
