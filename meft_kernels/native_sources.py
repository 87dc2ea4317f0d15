"""Which sources a C++ library was built from: ``setup.py`` writes it into it, ``native`` reads it there.

A library that stays behind when the sources move on has other kernels than the reference beside it, or ops
with other arguments, which ends the interpreter where it is loaded. Nothing is imported here but the standard
library: ``setup.py`` runs this file by itself.
"""

import hashlib
import re
from pathlib import Path

SCHEMAS = Path("meft_kernels/ops/schemas.py")
_MARK = "meft_kernels sources "


def digest(root: Path) -> str | None:
    """The digest of the kernels' sources under a checkout: those of ``csrc/`` and the ops' schemas, which are
    Python's. None where ``root`` is no checkout, such as the folder of an installed wheel."""
    files = sorted((root / "csrc").glob("[!.]*.cpp")) + sorted((root / "csrc").glob("[!.]*.h"))
    if not (root / "csrc" / "bindings.cpp").is_file() or not (root / SCHEMAS).is_file():
        return None
    found = hashlib.sha256()
    for path in [*files, root / SCHEMAS]:
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def written(root: Path) -> str:
    """A C++ source whose only content is the digest."""
    symbol = 'extern "C" __attribute__((visibility("default"), used)) const char meft_kernels_sources[]'
    return f'// Written by setup.py.\n{symbol} = "{_MARK}{digest(root)}";\n'


def of_library(path: Path) -> str | None:
    """The digest that a library was built with; None where it says nothing."""
    found = re.search(_MARK.encode() + rb"([0-9a-f]{64})", path.read_bytes())
    return found and found[1].decode()
