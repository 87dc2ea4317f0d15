"""The cases of ``python -m benchmarks.run`` under pytest-benchmark, one test for each peer and direction.

Peers do not take turns here, so compare figures of ``benchmarks.run`` where it matters. Ours are checked
against float64 before they are timed.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from . import contenders, peers, run


def make(name: str, case, dtype: torch.dtype, device: torch.device) -> peers.Peer:
    if name == "eager":
        return peers.eager(case, dtype, device)
    if name == "compiled":
        if reason := peers.why_no_compiler(device):
            pytest.skip(reason)
        return peers.compiled(case, dtype, device)
    if name == "block":
        return peers.block(case, dtype) or pytest.skip("no published building block is near this case")
    backend = name.removeprefix("ops:")
    contenders.check(case, backend, dtype, device)
    return peers.ours(case, backend)


def test_case(benchmark, options, case, peer, direction):
    device, dtype = torch.device(options.device), run.DTYPES[options.dtype]
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    inputs = case.inputs(dtype, device, draw_on=device)
    step = make(peer, case, dtype, device).step(inputs, case.frozen)
    if not step.leaves and direction != "forward":
        pytest.skip(f"{case.op} has no gradient")

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def forward() -> torch.Tensor:
        out = step.forward()
        wait()
        return out

    def backward(out: torch.Tensor) -> None:
        step.backward(out)
        wait()

    def both() -> None:
        step.backward(step.forward())
        wait()

    costs = {"forward": [False], "backward": [True], "both": [False, True]}[direction]
    benchmark.group = f"{case.name} {direction}"
    benchmark.extra_info |= {
        "bytes": sum(case.cost(dtype, half).bytes for half in costs),
        "flops": sum(case.cost(dtype, half).flops for half in costs),
        "dtype": options.dtype,
    }
    how = {"rounds": options.repeats, "warmup_rounds": 1}
    if direction == "backward":
        benchmark.pedantic(backward, setup=lambda: ((forward(),), {}), **how)
    else:
        benchmark.pedantic(forward if direction == "forward" else both, **how)
