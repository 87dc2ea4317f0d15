"""The Trainer of all methods: the stock one with what LoRA+, AdaLoRA and MeZO need."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .errors import UserError
from .mezo import MeZO
from .modeling import MeftModel


class MeftTrainer(Trainer):
    """``transformers.Trainer`` that trains every method as it is meant; arguments as there.

    The side networks and most other methods train the same way with the stock Trainer. LoRA+ needs the
    optimizer that is made here, AdaLoRA its rank allocation after each step, MeZO its training step.

    Raises:
        UserError: a training argument does not go with the method.
    """

    def __init__(self, model: MeftModel, args: Any = None, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        self.method = model.meft_config
        if self.method.method == "mezo" and self.args.fp16:
            raise UserError("fp16 cannot be used with mezo, which has no gradients to scale; use bf16")
        if self.method.method == "adalora":
            from .adalora import RankAllocation

            self.add_callback(RankAllocation(model.encoder, self.method))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None and self.method.method == "mezo":
            trained = [p for p in self.model.parameters() if p.requires_grad]
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = MeZO(trained, rate, self.method.eps, decay, seed=self.args.seed)
        elif self.optimizer is None and self.method.method == "lora_plus":
            self.optimizer = self._lora_plus_optimizer()
        return super().create_optimizer(*args, **kwargs)

    def _lora_plus_optimizer(self) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        optimizer = create_loraplus_optimizer(
            self.model.encoder,
            optimizer_class,
            lr=options.pop("lr"),
            loraplus_lr_ratio=self.method.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        # The head learns at the plain rate; its biases do not decay, as anywhere.
        for decays in (True, False):
            head = [
                parameter
                for part in (self.model.projector, self.model.classifier)
                for name, parameter in part.named_parameters()
                if (name != "bias") == decays
            ]
            decay = self.args.weight_decay if decays else 0.0
            optimizer.add_param_group({"params": head, "lr": self.args.learning_rate, "weight_decay": decay})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if self.method.method != "mezo":
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        share = 1 if num_items_in_batch is not None else self.current_gradient_accumulation_steps

        def loss() -> torch.Tensor:
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return value.mean() / share

        model.train()
        return getattr(self.optimizer, "optimizer", self.optimizer).measure(loss)
