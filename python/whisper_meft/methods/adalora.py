"""AdaLoRA (arXiv 2303.10512) by peft: its layers, its regulariser, and its rank allocation while training."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import TrainerCallback

from ..errors import UserError
from .checks import check_number_from_0, check_positive_int, check_positive_number, check_share
from .lora import ADAPTER, allocate, device_of, require_peft
from .low_rank import UpdateConfig


@dataclass(kw_only=True)
class AdaLoRAConfig(UpdateConfig):
    """AdaLoRA (arXiv 2303.10512) by peft: an update in the form of a singular value decomposition whose ranks
    are allocated by importance while a Trainer trains it."""

    method: ClassVar[str] = "adalora"

    init_r: int = field(default=256, metadata={"help": "Rank of each update at the start."})
    target_r: int = field(default=64, metadata={"help": "Mean rank of the updates at the end."})
    lora_alpha: float = field(
        default=512, metadata={"help": "The update is scaled by this number divided by init_r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Share of the update's inputs that are dropped in training."}
    )
    tinit: int | None = field(
        default=None,
        metadata={"help": "Steps before ranks fall; unset: 1000, or a tenth of the run if that is less."},
    )
    tfinal: int | None = field(
        default=None, metadata={"help": "Steps at the end with fixed ranks; unset: a tenth of the run."}
    )
    allocation_interval: int = field(default=10, metadata={"help": "Steps between two allocations."})
    orth_reg_weight: float = field(
        default=0.5, metadata={"help": "Weight of the penalty that keeps the factors orthogonal."}
    )

    def validate(self) -> None:
        super().validate()
        for name in ("init_r", "target_r", "allocation_interval"):
            check_positive_int(name, getattr(self, name))
        if self.target_r >= self.init_r:
            raise UserError(f"target_r must be below init_r, {self.init_r}, got {self.target_r}")
        check_positive_number("lora_alpha", self.lora_alpha)
        check_share("lora_dropout", self.lora_dropout)
        for name in ("tinit", "tfinal"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise UserError(f"{name} must be None or an integer of at least 0, got {value!r}")
        check_number_from_0("orth_reg_weight", self.orth_reg_weight)

    def prepare(self, part: nn.Module, beside: nn.Module | None = None) -> None:
        add_adalora(part, self)

    def penalty(self, tuned: nn.Module) -> torch.Tensor | None:
        return self.orth_reg_weight * orthogonality_penalty(tuned) if self.orth_reg_weight else None

    def trainer_callback(self, tuned: nn.Module) -> TrainerCallback:
        return RankAllocation(tuned, self)


_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # peft's names of the moving averages


def _peft_options(config: "AdaLoRAConfig", tinit: int, tfinal: int, total_step: int) -> Any:
    return require_peft(config.method).AdaLoraConfig(
        init_r=config.init_r,
        target_r=config.target_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        tinit=tinit,
        tfinal=tfinal,
        deltaT=config.allocation_interval,
        total_step=total_step,
    )


def add_adalora(part: nn.Module, config: "AdaLoRAConfig") -> None:
    """Puts trained AdaLoRA layers, float32, in the place of ``config.target_modules``."""
    peft = require_peft(config.method)
    with unset_fake_temporarily():  # see add_lora
        options = _peft_options(config, tinit=0, tfinal=0, total_step=1)  # the run's length is not known yet
        peft.inject_adapter_in_model(options, part, low_cpu_mem_usage=True)
    allocate(part, torch.float32)
    for module in part.modules():
        if isinstance(module, peft.tuners.adalora.AdaLoraLayer):
            module.reset_lora_parameters(ADAPTER)
            # peft keeps the rank, a constant of the scaling, as a parameter on the CPU.
            rank = torch.full((1,), float(config.init_r), device=device_of(part))
            module.ranknum[ADAPTER] = nn.Parameter(rank, requires_grad=False)


def orthogonality_penalty(tuned: nn.Module) -> Tensor:
    """The mean over all factors P of ||P P^T - I|| (Frobenius), a scalar."""
    norms = []
    for name, factor in tuned.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], device=gram.device)))
    return torch.stack(norms).mean()


def _finite_gradients(optimizer: torch.optim.Optimizer) -> bool:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())


class RankAllocation(TrainerCallback):
    """Allocates the ranks after each optimizer step: warm-up, cubic decrease to the target, final phase.

    The moving averages of the weights' importance live in the optimizer's state, so checkpoints hold them and
    a resumed run goes on exactly.

    Args:
        tuned: with AdaLoRA layers, which share one budget. config: whose schedule is used.
    """

    def __init__(self, tuned: nn.Module, config: "AdaLoRAConfig"):
        self.tuned, self.config = tuned, config

    def on_train_begin(self, args, state, control, **kwargs):
        from peft.tuners.adalora.layer import RankAllocator

        total = state.max_steps
        tinit = min(1000, total // 10) if self.config.tinit is None else self.config.tinit
        tfinal = total // 10 if self.config.tfinal is None else self.config.tfinal
        if tinit + tfinal >= total:
            raise UserError(
                f"tinit + tfinal must be below the number of training steps, {total}, got {tinit} + {tfinal}"
            )
        options = _peft_options(self.config, tinit, tfinal, total)
        self.allocator = RankAllocator(self.tuned, options, ADAPTER)
        self.last_allocation = total - tfinal
        self.pattern = self._pattern()  # for a run that resumes in the final phase

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        step = state.global_step + 1
        if step > self.last_allocation:
            self.allocator.mask_using_rank_pattern(self.tuned, self.pattern)
            return
        factors = {n: p for n, p in self.tuned.named_parameters() if "lora_" in n and p.requires_grad}
        for name in _AVERAGES:
            kept = {n: optimizer.state[p][name] for n, p in factors.items() if name in optimizer.state[p]}
            setattr(self.allocator, name, kept)
        self.allocator.ipt = dict(self.allocator.exp_avg_ipt)  # only its keys are read
        if getattr(optimizer, "scaler", None) is not None and not _finite_gradients(optimizer):
            self._allocate_as_known(step)  # skipped, in fp16: NaN would stay in the averages for good
        else:
            if not self.allocator.ipt:
                self.allocator.update_ipt(self.tuned)
            self.allocator.update_and_allocate(self.tuned, step, force_mask=step == self.last_allocation)
        for name in _AVERAGES:
            for n, value in getattr(self.allocator, name).items():
                optimizer.state[factors[n]][name] = value
        if step == self.last_allocation:
            self.pattern = self._pattern()

    def _allocate_as_known(self, step: int) -> None:
        """Allocates what is due after ``step`` by the averages of the steps before, where there are any."""
        budget, due = self.allocator.budget_schedule(step)
        if self.allocator.ipt and (due or step == self.last_allocation):
            self.allocator.mask_to_budget(self.tuned, budget)

    def _pattern(self) -> dict[str, list[bool]]:
        """Which singular values are kept: the others were set to zero."""
        named = self.tuned.named_parameters()
        return {n: (p != 0).flatten().tolist() for n, p in named if f"lora_E.{ADAPTER}" in n}
