"""Compiles the Triton kernels ahead of time, without a GPU, and reads what the compiler made of them.

Each ``triton_kernels`` module gives its launches (``static_launches``); a row of the table compiles to
registers, spills, shared memory and matrix instructions per architecture.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .choice import best_of
from .row import FAMILIES, SHARED_MEMORY, Architecture, Row
from .table import TABLE

MODEL_WIDTHS = (384, 512, 768, 1024, 1280)  # of Whisper's hidden states
# Side widths that they give at reduction factors 2, 4, 8 and 16.
WIDTHS = (24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640)
MODULES = (
    "row_statistics",
    "norm_linear",
    "adapter",
    "ladder",
    "relu_attention",
    "gated_down",
    "guidance",
    "gated_up",
    "eight_bit",
)

_THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
_SHARED_PER_SM = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
_REGISTERS_PER_SM = 65536
SPILL_LIMIT = 32  # bytes, stores plus loads; of the table's rows, on Hopper up to width 192


@dataclass(frozen=True)
class Compiled:
    """One kernel of one row on one architecture.

    Attributes:
        row, kernel, width, dtype, arch: what was compiled.
        registers: per thread. spill_stores, spill_loads, shared: bytes.
        wgmma, mma: Hopper's and the older matrix instructions in the code (tcgen05 counts as wgmma, AMD's as
            mma).
        blocks_per_sm: as many as registers, threads and shared memory allow.
        serialised: whether the assembler waits for each wgmma before the next (its messages C7510 to C7519).
        problem: why the row may not ship, or "".
    """

    row: Row
    kernel: str
    width: int
    dtype: str
    arch: Architecture
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    wgmma: int = 0
    mma: int = 0
    blocks_per_sm: int = 0
    serialised: bool = False
    problem: str = field(default="")


def module_name(kernel: str) -> str:
    """The op that a kernel belongs to: ``ladder_fwd`` is ``ladder``'s.

    Raises:
        ValueError: there is no such op.
    """
    module = next((m for m in sorted(MODULES, key=len, reverse=True) if kernel.startswith(m)), None)
    if module is None:
        raise ValueError(f"kernel {kernel!r} belongs to no module of triton_kernels")
    return module


def name_of(arch: Architecture) -> str:
    """An architecture in its maker's words: sm_90, gfx942."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def serving_widths(row: Row, arch: Architecture, ends: bool) -> list[int]:
    """The widths of Whisper at which the table chooses this row on an architecture, and with ``ends`` the
    least and the largest that it is written for."""
    family = FAMILIES[arch]
    # These kernels read hidden states, the others states of a side network.
    known = MODEL_WIDTHS if row.kernel.startswith(("row_statistics", "eight_bit")) else WIDTHS
    widths = {w for w in (*known, *(row.widths if ends else ())) if row.widths[0] <= w <= row.widths[1]}
    return [w for w in sorted(widths) if best_of(TABLE, row.kernel, w, family) is row]


def check_row(row: Row, arch: Architecture, width: int, dtype: str = "bf16") -> Iterator[Compiled]:
    """Compiles the kernels of a row at a width; one result per kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    amd = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    module = importlib.import_module(f"..triton_kernels.{module_name(row.kernel)}", __package__)
    for function, signature, constexprs, attrs in module.static_launches(row, dtype, width):
        name = function.__name__
        what = {"row": row, "kernel": name, "width": width, "dtype": dtype, "arch": arch}
        try:
            source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attrs)
            binary = compile(source, target=target, options=row.options)
        except Exception as error:  # the compiler has many; each means that the row does not compile
            text = str(error).strip().splitlines() or [type(error).__name__]
            yield Compiled(**what, problem=f"does not compile: {text[0]}")
            continue
        read = _read_amd if amd else _read_nvidia
        result = Compiled(**what, shared=binary.metadata.shared, **read(binary, arch, row.num_warps))
        yield replace(result, problem=problem(result))


def _total(pattern: str, text: str) -> int:
    return sum(map(int, re.findall(pattern, text)))


def _read_nvidia(binary, sm: int, warps: int) -> dict:
    """Fields of ``Compiled`` from PTX and its assembler."""
    ptx, threads = binary.asm["ptx"], 32 * warps
    report = _assembler_report(ptx, sm)
    registers = max(map(int, re.findall(r"Used (\d+) registers", report)), default=0)
    by_shared = _SHARED_PER_SM[sm] // (binary.metadata.shared + 1024)
    by_registers = _REGISTERS_PER_SM // max(1, -(-registers // 8) * 8 * threads)
    return {
        "registers": registers,
        "spill_stores": _total(r"(\d+) bytes spill stores", report),
        "spill_loads": _total(r"(\d+) bytes spill loads", report),
        "wgmma": ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "serialised": bool(re.search(r"C751\d|wgmma.* serialized", report)),
        "blocks_per_sm": min(by_shared, by_registers, _THREADS[sm] // threads),
    }


def _read_amd(binary, arch: str, warps: int) -> dict:
    """Fields of ``Compiled`` from AMD's assembly, whose comments tell spills and the waves that fit a SIMD;
    four of those are a multiprocessor, with the shared memory of one block."""
    text = binary.asm["amdgcn"]
    waves = 4 * _total(r"; Occupancy: (\d+)", text)
    return {
        "registers": _total(r"\.vgpr_count: +(\d+)", text),
        "spill_stores": _total(r"(\d+)-byte Folded Spill", text),
        "spill_loads": _total(r"(\d+)-byte Folded Reload", text),
        "mma": len(re.findall(r"\bv_mfma", text)),
        "blocks_per_sm": min(SHARED_MEMORY[arch] // max(1, binary.metadata.shared), waves // warps),
    }


def problem(result: Compiled) -> str:
    """Why the row may not ship, or ""."""
    limit = SHARED_MEMORY[result.arch]
    if result.shared > limit:
        return f"needs {result.shared} bytes of shared memory, {name_of(result.arch)} has {limit}"
    if result.arch == 90 and result.width <= 192:
        spill = result.spill_stores + result.spill_loads
        if spill > SPILL_LIMIT:
            return f"spills {spill} bytes, at most {SPILL_LIMIT} are allowed"
        if result.dtype != "fp32" and result.row.mma == "wgmma" and result.mma and not result.wgmma:
            return "its products do not use wgmma"
        if result.serialised:
            return "its wgmma run one at a time (ptxas C7515)"
    return ""


def _assembler_report(ptx: str, sm: int) -> str:
    """What ptxas says of registers, spills and wgmma."""
    from triton.backends.nvidia.compiler import get_ptxas

    executable = get_ptxas(sm).path  # the one that Triton compiled for
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [executable, "-v", f"--gpu-name={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


HEADER = (
    f"{'kernel':<36}{'width':>6}{'arch':>7}{'reg':>5}{'spill st/ld':>13}{'smem KB':>9}{'wgmma':>7}"
    f"{'mma':>6}{'blocks/SM':>11}  "
)


def line(result: Compiled) -> str:
    """A result as one row of the printed table."""
    spill = f"{result.spill_stores}/{result.spill_loads}"
    fine = "ok, but its wgmma run one at a time" if result.serialised else "ok"
    return (
        f"{result.kernel:<36}{result.width:>6}{name_of(result.arch):>7}{result.registers:>5}{spill:>13}"
        f"{result.shared / 1024:>9.1f}{result.wgmma:>7}{result.mma:>6}{result.blocks_per_sm:>11}  "
        f"{result.problem or fine}"
    )
