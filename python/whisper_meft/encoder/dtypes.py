"""Number formats by name."""

import torch

from ..errors import UserError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

HALF = (torch.bfloat16, torch.float16)


def parse_dtype(value: str | torch.dtype | None, argument: str = "dtype") -> torch.dtype | None:
    """Turns ``"bfloat16"``, ``"torch.bfloat16"`` or ``torch.bfloat16`` into the dtype; ``None`` stays
    ``None``.

    Raises:
        UserError: anything but float32, bfloat16, float16 and float64.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{argument} must be one of {', '.join(DTYPES)} or None, got {value!r}")
    return DTYPES[name]
