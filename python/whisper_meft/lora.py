"""The LoRA family, by peft: putting its layers into an encoder and taking them out again."""

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .errors import UserError

ADAPTER = "default"  # peft's name for the only one

if TYPE_CHECKING:
    from .configs import LoRAConfig
    from .tuned_encoder import TunedEncoder


def require_peft(method: str) -> ModuleType:
    """The peft package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"method {method} needs the peft package: pip install peft") from error
    return peft


def add_lora(encoder: "TunedEncoder", config: "LoRAConfig") -> None:
    """Puts trained LoRA layers, float32, in the place of ``config.target_modules``."""
    peft = require_peft(config.method)
    options = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
    )
    # Made without storage first: peft would give the parameters the frozen weights' number format. Its code
    # cannot run on fake tensors.
    with unset_fake_temporarily():
        peft.inject_adapter_in_model(options, encoder, low_cpu_mem_usage=True)
    allocate(encoder, torch.float32)
    for module in encoder.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.reset_lora_parameters(ADAPTER, True)


def allocate(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Gives the trained parameters of ``encoder`` that have no storage yet uninitialised storage beside the
    frozen ones."""
    device = encoder.conv1.weight.device
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(empty))
