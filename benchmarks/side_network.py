"""`python -m benchmarks.side_network`: side networks forward and backward, ops against readable reference.

Both run round-robin in this process on the CPU and are timed by process-CPU time, so that other load hardly
matters; the figure is the ratio of medians. "kept" is what lies in memory between forward and backward beside
hidden states and parameters, counted over saved storages.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import meft_kernels


def output(side: nn.Module, hidden_states: list[Tensor]) -> Tensor:
    """The call that training makes: pooled where the method pools."""
    return side.pooled(hidden_states) if hasattr(side, "pooled") else side(hidden_states)


def step_seconds(side: nn.Module, hidden_states: list[Tensor]) -> float:
    """Process-CPU seconds of one forward and backward."""
    start = time.process_time()
    output(side, hidden_states).square().mean().backward()
    return time.process_time() - start


def kept_bytes(side: nn.Module, hidden_states: list[Tensor]) -> int:
    """Bytes saved for the backward that are neither hidden states nor parameters."""
    known = {t.untyped_storage().data_ptr() for t in (*hidden_states, *side.parameters())}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = output(side, hidden_states)
    del out
    return sum(size for size, _ in saved.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_network", description=__doc__)
    for name, value in {"width": 768, "layers": 12, "batch": 2, "frames": 1500, "factor": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = options.batch, options.frames, options.width
    hidden_states = [torch.randn(shape) for _ in range(options.layers + 1)]
    print(f"torch {torch.__version__}, {options.threads} threads, fp32, B T D = {shape}, {vars(options)}")
    print(f"{'':<8}{'eager s':>9}{'ops s':>9}{'ratio':>7}{'eager kept MiB':>16}{'ops kept MiB':>14}")
    for method in ("LST", "UniPT", "SHERL"):
        sides = [
            getattr(package, method)(options.width, options.layers, options.factor)
            for package in (meft_kernels.reference, meft_kernels)
        ]
        for side in sides:
            step_seconds(side, hidden_states)
        rounds = [[step_seconds(side, hidden_states) for side in sides] for _ in range(options.repeats)]
        eager, fast = (statistics.median(column) for column in zip(*rounds))
        kept = [kept_bytes(side, hidden_states) / 2**20 for side in sides]
        print(f"{method:<8}{eager:>9.3f}{fast:>9.3f}{fast / eager:>7.2f}{kept[0]:>16.1f}{kept[1]:>14.1f}")


if __name__ == "__main__":
    main()
