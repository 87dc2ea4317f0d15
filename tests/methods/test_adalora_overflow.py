"""AdaLoRA's ranks where fp16's gradients overflow: such steps are skipped, and tell nothing of importance."""

import pytest
import torch
from transformers import TrainerCallback

from tests.methods.test_methods import model_of, singular_values, trainer_of


class Overflow(TrainerCallback):
    """Gradients with an infinity, which a GradScaler finds, before some of the steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            parameter = next(p for n, p in model.named_parameters() if "lora_A" in n)
            parameter.grad.view(-1)[0] = torch.inf


# The first has nothing to go on from, the ranks are due after each, and after the last for good.
@pytest.mark.parametrize("steps", [[0], [2], [0, 1, 2], [7], [1, 8]])
def test_ranks_are_allocated_all_the_same(steps, tmp_path):
    model = model_of("adalora", tinit=1, tfinal=2, allocation_interval=1)
    trainer = trainer_of(
        model, tmp_path, callbacks=[Overflow(steps)], max_steps=10, optim="adamw_torch", max_grad_norm=0
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 4.0 / 2 ** len(steps)  # as often it has skipped
    ranks = [int((values != 0).sum()) for values in singular_values(model).values()]
    assert sum(ranks) == 3 * len(ranks)
    for state in trainer.optimizer.state.values():
        assert all(value.isfinite().all() for value in state.values())
