"""Telling one backbone from another by a few of its weights."""

import torch
from torch import nn

_SAMPLES = 64


def fingerprint(encoder: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A few of the weights in hexadecimal, to tell one backbone from another.

    Args:
        encoder: a Whisper encoder or decoder. 64 entries spread over its matrices and convolutions are taken
            as float32; of a quantised one those that it had before. Where they train it gets none. dtype: as
            they would be in it; None: as they are.
    """
    if getattr(encoder, "trains_matrices", False):
        return ""
    if getattr(encoder, "original", None) is not None:
        return encoder.original.fingerprint
    weights = [p for n, p in sorted(own_state(encoder).items()) if p.ndim > 1 and "positions" not in n]
    picked = []
    for i in range(_SAMPLES):
        weight = weights[i * len(weights) // _SAMPLES]
        entry = weight.detach().flatten()[(i * 2654435761) % weight.numel()]
        picked.append(entry.to(dtype or entry.dtype).float())
    return torch.stack(picked).cpu().numpy().astype("<f4").tobytes().hex()


def own_state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The encoder's tensors under their Hugging Face names, without those that a method put in."""
    return getattr(encoder, "backbone_state", encoder.state_dict)()


def same_backbone(encoder: nn.Module, saved: str) -> bool:
    """Whether :func:`fingerprint` of ``encoder`` agrees with ``saved``, up to rounding to half precision."""
    return same_fingerprint(fingerprint(encoder), saved)


def same_fingerprint(found: str, saved: str) -> bool:
    """Whether two fingerprints agree, up to rounding to half precision."""
    try:
        expected = torch.frombuffer(bytearray.fromhex(saved), dtype=torch.float32)
    except (ValueError, TypeError):
        return False
    found = torch.frombuffer(bytearray.fromhex(found), dtype=torch.float32)
    if expected.shape != found.shape:
        return False
    # bfloat16 rounds by 0.2 % (root mean square); training changes weights by more.
    return bool((found - expected).norm() <= 0.006 * expected.norm())
