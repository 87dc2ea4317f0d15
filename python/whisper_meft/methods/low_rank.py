"""What the methods that add a low-rank update to weights have in common."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import UserError
from .tuned import TunedConfig


def _targets(value: Any) -> list[str]:
    known = "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"target_modules must be a non-empty list out of {', '.join(known)}, got {value!r}")
    for name in value:
        if name not in known:
            raise UserError(f"target_modules must be out of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(value))


_TARGETS = (
    "Names of the linear layers that are adapted, wherever they are: in a decoder those of the attention to "
    "itself and of that to the encoder."
)


@dataclass(kw_only=True)
class UpdateConfig(TunedConfig):
    """Options of the methods that add a low-rank update to weights, the LoRA family."""

    can_merge: ClassVar[bool] = True

    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": _TARGETS}
    )

    def validate(self) -> None:
        super().validate()
        self.target_modules = _targets(self.target_modules)
