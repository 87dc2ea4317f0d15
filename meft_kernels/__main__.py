"""``python -m meft_kernels``: versions, devices, and the backend of each op with the reason for it."""

import platform
from importlib import metadata

import torch

from . import __version__, ops
from .ops.backends import HAS_TRITON


def report() -> str:
    """The text that the command prints."""
    rows = [
        ("meft_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", metadata.version("triton") if HAS_TRITON else "not installed"),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            size = f"{device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
            rows.append((f"cuda:{index}", f"{device.name}, {size}"))
    else:
        rows.append(("cuda", "not available"))
    lines = [f"{name:<16}{value}" for name, value in rows]
    lines += ["", f"{'op':<16}{'backend':<12}reason"]
    lines += [f"{op:<16}{backend:<12}{why}" for op, (backend, why) in ops.backend_status().items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
