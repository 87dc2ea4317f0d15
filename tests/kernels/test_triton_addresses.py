"""Every Triton kernel on tensors of more than 2^31 elements, by its addresses.

The launchers run at such sizes on the meta device. The tensors that they hand to a kernel are then made of
address space alone, whose pages are zero and take no memory until they are written, and the last program of
the grid runs on them in the interpreter. Each address that it reads or writes has to lie in a tensor: an
offset that was computed in 32 bits falls 2^32 elements short, into the gap before it. And each large tensor
has to be reached beyond its first 2^31 elements, or a row number has overflown and all was masked.
"""

import ctypes
import importlib
import math
import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from meft_kernels import ops
from meft_kernels.ops.registration import WITHOUT_TRITON
from meft_kernels.reference import stand_in
from meft_kernels.testing import Case
from meft_kernels.triton_kernels import adapter, gated_down, guidance
from meft_kernels.tune import choice
from meft_kernels.tune.static_check import MODULES, module_name
from meft_kernels.tune.table import TABLE

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted here")

MANY = 2**31 + 2**22
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python 3.11 has no name for
GAP = 2**36  # bytes between tensors: more than 2^32 of the widest elements
FRAMES = 40
LAYERS, WIDEST = 33, 640


def is_large(value) -> bool:
    """Whether an argument is, or holds, a tensor of more than 2^31 elements."""
    if isinstance(value, tuple):
        return any(map(is_large, value))
    tensor = value.base if isinstance(value, TensorDescriptor) else value
    return isinstance(tensor, torch.Tensor) and tensor.numel() > 2**31


class Memory:
    """Tensors in address space, and who reads and writes there."""

    def __init__(self):
        self.space, self.tensors, self.ranges, self.reached = {}, [], [], {}

    def tensor(self, like: torch.Tensor) -> torch.Tensor:
        """One of the same shape, strides and type; of one storage where the tensors given are."""
        storage = like.untyped_storage()
        if storage._cdata not in self.space:
            size = max(1, storage.nbytes())
            space = mmap.mmap(-1, size + 2 * GAP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
            start = ctypes.addressof(ctypes.c_char.from_buffer(space)) + GAP
            self.space[storage._cdata] = space
            self.ranges.append((start, start + size))
        space = self.space[storage._cdata]
        count = storage.nbytes() // like.itemsize
        flat = torch.frombuffer(space, dtype=like.dtype, count=count, offset=GAP)
        tensor = flat.as_strided(like.shape, like.stride(), like.storage_offset())
        if not like.is_floating_point() and like.numel() < MANY:
            tensor.fill_(FRAMES)  # lengths
        self.tensors.append(tensor)
        return tensor

    def argument(self, value):
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, TensorDescriptor):
            return replace(value, base=self.tensor(value.base))
        return tuple(map(self.argument, value)) if isinstance(value, tuple) else value

    def note(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        addresses, mask = np.broadcast_arrays(addresses, mask)
        used = addresses[mask.astype(bool)].astype(np.uint64)
        inside = np.zeros(used.shape, bool)
        for start, end in self.ranges:
            here = (used >= np.uint64(start)) & (used < np.uint64(end))
            if here.any():
                reached = self.reached.get((start, end), 0)
                self.reached[start, end] = max(reached, int(used[here].max()))
            inside |= here
        assert inside.all(), "an address lies in no tensor"

    def assert_all_reached(self, name: str) -> None:
        for tensor in filter(is_large, self.tensors):
            start, end = next(r for r in self.ranges if r[0] <= tensor.data_ptr() < r[1])
            reached = self.reached.get((start, end), start)
            least = max(2**31, tensor.numel() - 2**30)
            assert reached >= start + least * tensor.itemsize, f"{name} does not reach {tuple(tensor.shape)}"


class Checked:
    """The interpreter's loads and stores, noted first."""

    def __init__(self, memory: Memory, original):
        self.memory, self.original = memory, original

    def __getattr__(self, name):
        return getattr(self.original, name)

    def load(self, addresses, mask, *rest):
        self.memory.note(addresses, mask)
        return self.original.load(addresses, mask, *rest)

    def store(self, addresses, values, mask):
        self.memory.note(addresses, mask)
        return self.original.store(addresses, values, mask)


def run_last_program(kernel, grid, arguments, options) -> None:
    """The last program of a launch on meta tensors, in the interpreter."""
    memory, builder = Memory(), interpreter.interpreter_builder
    last = [size - 1 for size in (*grid, 1, 1)[:3]]
    with pytest.MonkeyPatch.context() as patch:
        set_index, set_dimensions = builder.set_grid_idx, builder.set_grid_dim
        patch.setattr(builder, "set_grid_idx", lambda *_: set_index(*last))
        patch.setattr(builder, "set_grid_dim", lambda *_: set_dimensions(*(*grid, 1, 1)[:3]))
        patch.setattr(interpreter, "_interpreter", Checked(memory, interpreter._interpreter))
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # copies all of them
        kernel[(1,)](*map(memory.argument, arguments), **options)
    memory.assert_all_reached(kernel.__name__)


def check(launched: list[tuple], kernels: set[str]) -> None:
    """Runs the launches on large tensors, among which are such of each of the ``kernels``."""
    launched = [launch for launch in launched if any(map(is_large, launch[2]))]
    assert {kernel.__name__ for kernel, *_ in launched} >= {f"{name}_kernel" for name in kernels}
    for launch in launched:
        run_last_program(*launch)


def launches_of(op: str, case: Case | None, dtype: torch.dtype, capability=(8, 0)) -> list[tuple]:
    """What an op's forward and backward launch on an architecture."""
    module, launched = importlib.import_module(f"meft_kernels.triton_kernels.{op}"), []

    def launch(kernel, grid, *arguments, **options):
        launched.append((kernel, grid, arguments, options))

    with pytest.MonkeyPatch.context() as patch, stand_in.standing_for("cuda", capability, launching=True):
        for name in MODULES:
            patch.setattr(importlib.import_module(f"meft_kernels.triton_kernels.{name}"), "launch", launch)
        # Sums of many rows in many parts: no program walks through millions.
        for each in (adapter, guidance):
            patch.setattr(each, "split", lambda pieces, *_, **__: (32, math.ceil(pieces / 32)))
        patch.setattr(gated_down, "BLOCK_BYTES", 2**60)
        patch.setattr(adapter, "row_blocks", lambda rows, *_: [slice(0, rows)])
        if op in ("row_statistics", "eight_bit"):
            rows = torch.empty(MANY // 640, 640, dtype=dtype, device="meta")
            statistics = [torch.empty(len(rows), device="meta") for _ in range(2)]
            if op == "row_statistics":
                module.forward(rows)
            else:
                encoded = module.encode(rows, *statistics)
                module.decode(*encoded, rows.new_empty(0), *statistics)
            return launched
        inputs = case.inputs(dtype, "meta", draw_on="meta")
        if op in ("norm_linear", "ladder"):
            prefix = "" if op == "norm_linear" else "down_"
            names = [prefix + name for name in ("norm_weight", "norm_bias", "weight", "bias")]
            folded = ops.fold(*(inputs.pop(name) for name in names))
            statistics = [torch.empty(case.batch, case.frames, device="meta") for _ in range(2)]
            x = [inputs.pop(name) for name in ("x", "state") if name in inputs]
            arguments = [*x, *folded, *statistics, *inputs.values()]
        elif op == "relu_attention":
            arguments = [inputs[n] for n in ("anchor", "gate_weight", "gate_bias", "lengths", "features")]
        else:
            arguments = list(inputs.values())
        out = module.forward(*arguments)
        flags = [] if op in ("relu_attention", "guidance") else [True]
        module.backward(torch.empty_like(out), *arguments, *flags)
    return launched


def case_of(op: str, side: int, width: int = 8, adapter_dim: int = 16) -> Case:
    """Rows so many that a tensor of the side's width has more than 2^31 elements."""
    columns = width if op == "gated_up" else side
    return Case(op, 1, MANY // columns, width, side, adapter_dim, 3)


# Fused and split backwards, and of gated_up both the side's and the backbone's width past the limit.
CASES = {
    "norm_linear": [case_of("norm_linear", 96)],
    "adapter": [case_of("adapter", 24), case_of("adapter", 640, adapter_dim=1280)],
    "ladder": [case_of("ladder", 96), case_of("ladder", 640, adapter_dim=1280)],
    "gated_down": [case_of("gated_down", 96), case_of("gated_down", 160)],
    "guidance": [case_of("guidance", 160)],
    "gated_up": [case_of("gated_up", 96, width=192)],
    "row_statistics": [None],
    "eight_bit": [None],
}


@pytest.mark.parametrize("op", CASES)
def test_offsets_are_wide_enough(op):
    launched = [launch for case in CASES[op] for launch in launches_of(op, case, torch.float16)]
    check(launched, {row.kernel for row in TABLE if module_name(row.kernel) == op})


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("layers", [LAYERS, 2])
def test_attention(layers, capability):
    """All layers' features past the limit, or each of two layers'."""
    batch = math.ceil(MANY / ((layers if layers > 2 else 1) * FRAMES * WIDEST))
    case = Case("relu_attention", batch, FRAMES, WIDEST, WIDEST, 16, layers)
    rows = {row.kernel: row for row in TABLE if module_name(row.kernel) == "relu_attention"}
    blocks = {"descriptors": capability == (9, 0), "widths": (WIDEST, WIDEST), "family": "any"}
    with choice.trial(*(replace(row, **blocks) for row in rows.values())):
        launched = launches_of("relu_attention", case, torch.float16, capability)
    described = any(isinstance(each, TensorDescriptor) for _, _, given, _ in launched for each in given)
    assert described == (capability == (9, 0))
    check(launched, {*rows})


def test_every_op_is_here():
    assert {*CASES, "relu_attention"} == {*MODULES} >= {*ops.OP_NAMES} - WITHOUT_TRITON
