"""Memory-efficient fine-tuning of Whisper encoders for Hugging Face users.

The names below are loaded when they are first used, so that importing the package is cheap.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "FrozenEncoder": "encoder",
    "FullConfig": "configs",
    "HeadConfig": "configs",
    "LoRAConfig": "configs",
    "WeightedSumConfig": "configs",
    "LSTConfig": "configs",
    "MeftConfig": "configs",
    "MeftModel": "modeling",
    "MeftModelConfig": "modeling",
    "SHERLConfig": "configs",
    "UniPTConfig": "configs",
    "UserError": "errors",
    "get_meft_model": "modeling",
}

__all__ = [
    "FrozenEncoder",
    "FullConfig",
    "HeadConfig",
    "LoRAConfig",
    "WeightedSumConfig",
    "LSTConfig",
    "MeftConfig",
    "MeftModel",
    "MeftModelConfig",
    "SHERLConfig",
    "UniPTConfig",
    "UserError",
    "get_meft_model",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
