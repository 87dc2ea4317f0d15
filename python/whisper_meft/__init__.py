"""Memory-efficient fine-tuning of Whisper encoders for Hugging Face users.

The names below are loaded when they are first used, so that importing the package is cheap. It makes
transformers' Auto classes and ``pipeline`` know saved models.
"""

import logging
from importlib import import_module
from typing import Any

from .auto_classes import register_when_loaded


def _about_something_here(record: logging.LogRecord) -> bool:
    # transformers imports torchao wherever it is installed, which warns of kernels for other machines.
    return not record.getMessage().startswith("Failed to load ")


def _no_deprecation(record: logging.LogRecord) -> bool:
    return "Enum subclass" not in record.getMessage()


logging.getLogger("torchao").addFilter(_about_something_here)
logging.getLogger("torch.utils._pytree").addFilter(_no_deprecation)

_PLACES = {
    "AdaLoRAConfig": "methods",
    "AdapterConfig": "methods",
    "BitFitConfig": "methods",
    "FrozenEncoder": "encoder.frozen",
    "FullConfig": "methods",
    "HeadConfig": "methods",
    "LSTConfig": "methods",
    "LoRAConfig": "methods",
    "LoRAPlusConfig": "methods",
    "MeZOConfig": "methods",
    "MeftConfig": "methods",
    "MeftForConditionalGeneration": "model.transcription",
    "MeftModel": "model.module",
    "MeftModelConfig": "model.config",
    "MeftTrainer": "training.trainer",
    "MultiHead": "model.multi_head",
    "S2LoRAConfig": "methods",
    "SHERLConfig": "methods",
    "UniPTConfig": "methods",
    "UserError": "errors",
    "WeightedSumConfig": "methods",
    "get_meft_model": "model.module",
}

__all__ = [
    "AdaLoRAConfig",
    "AdapterConfig",
    "BitFitConfig",
    "FrozenEncoder",
    "FullConfig",
    "HeadConfig",
    "LSTConfig",
    "LoRAConfig",
    "LoRAPlusConfig",
    "MeZOConfig",
    "MeftConfig",
    "MeftForConditionalGeneration",
    "MeftModel",
    "MeftModelConfig",
    "MeftTrainer",
    "MultiHead",
    "S2LoRAConfig",
    "SHERLConfig",
    "UniPTConfig",
    "UserError",
    "WeightedSumConfig",
    "get_meft_model",
]

register_when_loaded()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
