"""Shared test settings: seeds, poisoned memory, and skipping what this machine cannot run."""

import gc
import importlib.util
import os
import re

import pytest
import torch

# Before anything imports a kernel: without a GPU the Triton kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Hubs are out of reach of the tests; a slip must fail at once and not wait for a connection.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def pytest_unconfigure() -> None:
    gc.unfreeze()  # see _frozen: extension modules look at their end for objects that were not freed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {}
    if "registry" not in config.option.markexpr:
        missing["registry"] = "installs packages: -m registry runs it"
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if not os.environ.get("MEFT_WHISPER"):
        missing["real"] = "needs pretrained Whisper: MEFT_WHISPER names no folder"
    for item in items:
        for mark in missing.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=missing[mark]))


# Of the test environment; where one is missing, a test that fails for want of it is skipped.
PACKAGES = (
    "accelerate",
    "ctranslate2",
    "datasets",
    "espeakng_loader",
    "jiwer",
    "lhotse",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "soundfile",
    "soxr",
    "torchao",
    "webdataset",
)
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    try:
        return (yield)
    except (ImportError, ValueError, AssertionError) as error:
        wanted = [name for name in MISSING if re.search(rf"\b{name}\b", str(error))]
        if not wanted:
            raise
        pytest.skip(f"needs {', '.join(wanted)}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Garbage is looked for among a file's own objects: every ``train()`` of a Trainer has it collected, and
    going through those of PyTorch and Transformers too takes a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def poisoned_memory():
    """Fills what ``torch.empty`` and its like return with NaN, so that memory read unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
