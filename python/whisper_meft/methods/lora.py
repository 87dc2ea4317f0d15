"""LoRA and LoRA+, by peft: their options, and putting peft's layers into a part of the backbone."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import TrainerCallback

from ..errors import UserError
from .checks import check_positive_int, check_positive_number, check_share
from .low_rank import UpdateConfig


@dataclass(kw_only=True)
class LoRAConfig(UpdateConfig):
    """LoRA (arXiv 2106.09685) by peft: W + lora_alpha / r * B A, with B zero at the start."""

    method: ClassVar[str] = "lora"

    r: int = field(default=64, metadata={"help": "Rank of the update of each adapted weight."})
    lora_alpha: float = field(
        default=512, metadata={"help": "The update is scaled by this number divided by the rank."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Share of the update's inputs that are dropped in training."}
    )

    def validate(self) -> None:
        super().validate()
        check_positive_int("r", self.r)
        check_positive_number("lora_alpha", self.lora_alpha)
        check_share("lora_dropout", self.lora_dropout)

    def prepare(self, part: nn.Module, beside: nn.Module | None = None) -> None:
        add_lora(part, self)


@dataclass(kw_only=True)
class LoRAPlusConfig(LoRAConfig):
    """LoRA+ (arXiv 2402.12354): LoRA whose B learns faster than its A, in any Trainer; a loop of your own
    needs peft's ``create_loraplus_optimizer``."""

    method: ClassVar[str] = "lora_plus"

    loraplus_lr_ratio: float = field(
        default=16.0, metadata={"help": "Learning rate of B divided by that of A and of the head."}
    )

    def validate(self) -> None:
        super().validate()
        check_positive_number("loraplus_lr_ratio", self.loraplus_lr_ratio)

    def trainer_callback(self, tuned: nn.Module) -> TrainerCallback:
        return FasterB(tuned, self.loraplus_lr_ratio)


class FasterB(TrainerCallback):
    """Multiplies what each optimizer step does to B of LoRA, which is the same as a learning rate that many
    times as high, for optimizers whose step is proportional to it (weight decay included). One that has rates
    of its own for B is left alone.

    Args:
        tuned: with LoRA layers. ratio: of the rates.
    """

    def __init__(self, tuned: nn.Module, ratio: float):
        self.tuned, self.ratio = tuned, ratio
        self.hooks: list[Any] = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        rates = {id(p): g.get("initial_lr", g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        named = [(name, p) for name, p in self.tuned.named_parameters() if id(p) in rates]
        slow = {rates[id(p)] for name, p in named if "lora_A" in name}
        factors = [p for name, p in named if "lora_B" in name and rates[id(p)] in slow]
        before: list[torch.Tensor] = []

        def keep(*_: Any) -> None:
            before[:] = [factor.detach().clone() for factor in factors]

        @torch.no_grad()
        def extend(*_: Any) -> None:
            for factor, start in zip(factors, before):
                factor.copy_(torch.lerp(start, factor, self.ratio))
            before.clear()

        self.hooks = [optimizer.register_step_pre_hook(keep), optimizer.register_step_post_hook(extend)]

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()


ADAPTER = "default"  # peft's name for the only one


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


def add_lora(part: nn.Module, config: "LoRAConfig") -> None:
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
        peft.inject_adapter_in_model(options, part, low_cpu_mem_usage=True)
    allocate(part, torch.float32)
    for module in part.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.reset_lora_parameters(ADAPTER, True)


def device_of(part: nn.Module) -> torch.device:
    """Where the weights of a part of the backbone are."""
    return part.layer_norm.weight.device


def allocate(part: nn.Module, dtype: torch.dtype) -> None:
    """Gives the trained parameters of ``part`` that have no storage yet uninitialised storage beside the
    frozen ones."""
    device = device_of(part)
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(empty))
