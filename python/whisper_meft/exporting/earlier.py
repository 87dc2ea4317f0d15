"""What an export leaves in its folder, and which of it the next one there takes away or refuses."""

from collections.abc import Callable
from pathlib import Path

MODEL, DESCRIPTION = "model.onnx", "model.json"

OF_ONNX = frozenset((MODEL, f"{MODEL}.data", DESCRIPTION))

WEIGHTS = "model.bin"  # of CTranslate2

VOCABULARIES = frozenset(("vocabulary.json", "vocabulary.txt"))  # of CTranslate2, the second of other models

COPIED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def of_earlier_export(folder: Path) -> Callable[[str], bool]:
    """Whether a file of this name goes, with the export as ONNX in ``folder`` that it belongs to.

    What has the name of a file that is written is replaced in any case. Nothing else of a model for
    CTranslate2 goes: its files do not say whether an export of this library wrote them.
    """
    names = _names(folder)
    return OF_ONNX.__contains__ if {MODEL, DESCRIPTION} <= names else frozenset().__contains__


def holds_converted(folder: Path) -> bool:
    """Whether a model for CTranslate2 is in a folder, whoever wrote it."""
    names = _names(folder)
    return WEIGHTS in names and not names.isdisjoint(VOCABULARIES)


def _names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()} if folder.is_dir() else set()
