"""``pytest benchmarks --benchmark-only``: settings for pytest-benchmark."""

import pytest
import torch
from whisper_meft.errors import UserError

from . import run


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "options of python -m benchmarks.run that choose cases, in one string (CPU default: --quick)"
    parser.addoption("--cases", default="" if torch.cuda.is_available() else "--quick", help=text)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # On a CPU other load must not count: the process's own time, unless another timer is asked for.
    given = any(str(word).startswith("--benchmark-timer") for word in config.invocation_params.args)
    if hasattr(config.option, "benchmark_timer") and not given and not torch.cuda.is_available():
        config.option.benchmark_timer = "time.process_time"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case, peer and direction."""
    if not {"case", "peer", "direction"} <= set(metafunc.fixturenames):
        return
    try:
        options = run.parse(metafunc.config.getoption("--cases").split())
        wanted = run.cases(options)
    except UserError as error:
        raise pytest.UsageError(f"--cases: {error}") from error
    names = [
        *(peer for peer in options.peers if peer != "forms"),
        *(f"ops:{backend}" for backend in options.backend),
    ]
    if options.quick and "compiled" in names:
        names.remove("compiled")
    rows = [
        pytest.param(options, case, peer, direction, id=f"{case.name}-{direction}-{peer}")
        for case in wanted
        for direction in ("forward", "backward", "both")
        for peer in names
    ]
    metafunc.parametrize(("options", "case", "peer", "direction"), rows)
