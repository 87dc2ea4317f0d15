"""Benchmarks: ``python -m benchmarks.<name>`` from the root of a checkout, installed or not."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("whisper_meft") is None:  # a plain checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import whisper_meft  # noqa: F401  before transformers, whose torchao has remarks that it filters
