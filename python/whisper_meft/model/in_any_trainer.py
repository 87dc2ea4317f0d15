"""What a method needs of a Trainer beside its loss, in whichever Trainer a model is given to."""

import sys
from typing import Any

from transformers import TrainerCallback

from ..methods import MeftConfig


class MethodCallback(TrainerCallback):
    """Hands a Trainer's events on to the callback of its model's method (``MeftConfig.trainer_callback``),
    and checks before training that the model can be saved; does nothing for a model of another kind."""

    def __init__(self):
        self.callback: TrainerCallback | None = None

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
        config = getattr(model, "meft_config", None)
        self.callback = None
        if isinstance(config, MeftConfig):
            if args.save_strategy != "no":
                model.check_frozen()  # before anything is lost: saving would refuse
            self.callback = config.trainer_callback(model.tuned)
        if self.callback is not None:
            self.callback.on_train_begin(args, state, control, model=model, **kwargs)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.callback is not None:
            self.callback.on_optimizer_step(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.callback is not None:
            self.callback.on_train_end(args, state, control, **kwargs)


def serve_in_every_trainer(at_once: bool = False) -> None:
    """Gives every Trainer that is made from now on a :class:`MethodCallback`.

    ``Trainer(model=model, ...)`` asks a model for nothing but its loss, so a method that needs more would
    silently be another one there. The list of default callbacks is the one place that all Trainers read.

    Args:
        at_once: load the module of transformers' Trainers, which whoever only runs a model does without. Else
            this is done where it is loaded, and if it is not, when it is (``whisper_meft.auto_classes``).
    """
    if at_once:
        import transformers.trainer  # noqa: F401
    trainers = sys.modules.get("transformers.trainer")
    if trainers is not None and MethodCallback not in trainers.DEFAULT_CALLBACKS:
        trainers.DEFAULT_CALLBACKS.append(MethodCallback)
