"""What an export leaves in its folder, of either format, and the next one there takes away."""

from collections.abc import Callable
from pathlib import Path

MODEL, DESCRIPTION = "model.onnx", "model.json"

OF_ONNX = frozenset((MODEL, f"{MODEL}.data", DESCRIPTION))

WEIGHTS = "model.bin"  # of CTranslate2

COPIED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")

_VOCABULARY = ("vocabulary.json", "vocabulary.txt")

# Names that many folders have: with the weights beside them they are those of an export.
_BESIDE_WEIGHTS = frozenset(("config.json", *_VOCABULARY, *COPIED))


def of_earlier_export(folder: Path) -> Callable[[str], bool]:
    """Whether a file of this name goes, with the earlier export in ``folder`` that it belongs to."""
    names = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    is_converted = WEIGHTS in names and not names.isdisjoint(_VOCABULARY)
    goes = OF_ONNX | {WEIGHTS} | (_BESIDE_WEIGHTS if is_converted else frozenset())
    return goes.__contains__
