"""Builds the C++ CPU kernels of ``csrc/`` where torch and a compiler are at hand; see also pyproject.toml.

The same sources become one library for each level of vector instructions, and ``meft_kernels.native`` loads
the one that torch itself would use on the machine, so that nothing in them has to ask. Where they cannot be
built the install is pure Python, after one line that says why. pip has to let the build see the installed
torch: ``pip install --no-build-isolation .``

MEFT_KERNELS_NATIVE=0 leaves them out.
"""

import os
import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
# How torch names the levels, and what a compiler is told for each. Those of x86 first.
X86_LEVELS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
BASELINE = "DEFAULT"
STAMP = Path("build", "native_sources.cpp")  # says in every library which sources it was built from


def _skip(reason: str) -> None:
    first = (reason.strip().splitlines() or [""])[0]
    print(f"meft_kernels: installing without the C++ CPU kernels: {first}", file=sys.stderr)


def _levels() -> dict[str, list[str]]:
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**(X86_LEVELS if on_x86 else {}), BASELINE: []}


def _extensions(cpp_extension, version: str) -> list[Extension]:
    # torch's own build of "2.13.0" is the same library with or without CUDA beside it.
    release = version.partition("+")[0].replace(".", "_")
    return [
        Extension(
            f"meft_kernels._native_{level.lower()}_torch_{release}",
            [*SOURCES, str(STAMP)],
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            include_dirs=cpp_extension.include_paths(),
            library_dirs=cpp_extension.library_paths(),
            libraries=["c10", "torch_cpu"],
            # OpenMP is compiled for and not linked: torch has loaded its own runtime, and one pool of threads
            # is enough.
            extra_compile_args=[
                "-O3",
                "-g0",
                # As torch itself: without them a loop with a choice or a root in it does not vectorise.
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fopenmp",
                "-fvisibility=hidden",
                f"-DCPU_CAPABILITY={level}",
                f"-DCPU_CAPABILITY_{level}",
                *flags,
            ],
        )
        for level, flags in _levels().items()
    ]


def _write_stamp() -> None:
    text = runpy.run_path("meft_kernels/native_sources.py")["written"](Path())
    STAMP.parent.mkdir(exist_ok=True)
    if not STAMP.is_file() or STAMP.read_text() != text:  # else nothing would have to be compiled
        STAMP.write_text(text)


def _native() -> dict:
    """What ``setup`` is told about the kernels: nothing where they cannot be built."""
    if os.environ.get("MEFT_KERNELS_NATIVE") == "0":
        return {}
    if os.name != "posix":
        _skip(f"they are not built on {platform.system()}")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch fails in any way
        _skip(f"torch cannot be imported ({type(error).__name__}); see --no-build-isolation in the README")
        return {}

    class build_ext(cpp_extension.BuildExtension):
        """Puts each level's objects in a folder of its own, and goes on without the kernels if a compiler
        fails."""

        def build_extensions(self) -> None:
            try:
                _write_stamp()
                super().build_extensions()
            except (Exception, SystemExit) as error:
                _skip(f"{type(error).__name__}: {error}")
                self.extensions = []

        def build_extension(self, extension: Extension) -> None:
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
            try:
                super().build_extension(extension)
            finally:
                self.build_temp = shared

    build = build_ext.with_options(no_python_abi_suffix=True)
    return {"ext_modules": _extensions(cpp_extension, torch.__version__), "cmdclass": {"build_ext": build}}


setup(**_native())
