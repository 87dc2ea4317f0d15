"""Stops training at the first NaN or infinity, before it reaches a checkpoint."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ..data.epochs import drawn
from ..errors import UserError


class NonFiniteError(UserError):
    """A NaN or infinity turned up in the features, the loss or the parameters."""


class Indexed(Dataset):
    """A dataset whose items also carry their position, as "index", so that a batch can be traced to files."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lengths(self) -> list[int] | None:
        """The dataset's lengths, for batching by length; None where it does not know them."""
        return getattr(self.dataset, "lengths", None)

    def set_epoch(self, epoch: int) -> None:
        """Tells the dataset, where its items differ from epoch to epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return {**self.dataset[key], "index": drawn(key)[0]}


class IndexedCollator:
    """Wraps a collator: stacks the "index" of the items to an int64 tensor (B,) beside what it makes."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        indices = torch.tensor([item["index"] for item in items])
        batch = self.collator([{k: v for k, v in item.items() if k != "index"} for item in items])
        return {**batch, "index": indices}


class FiniteGuard(TrainerCallback):
    """A callback for the stock Trainer that raises NonFiniteError naming the step and the files.

    It hooks the model: the position of each example is taken out of the inputs before the model sees them,
    and features and loss are checked after each forward pass. On the CPU the check is at once, so no gradient
    of a bad loss ever reaches the parameters. On an accelerator the verdict is copied without waiting and
    read one step later, but always before anything is saved; before a save and at the end the parameters are
    checked too.

    Args:
        model: the model that is trained; hooks are removed by `close`.
        training_names, evaluation_names: example names, in the order of the datasets.
    """

    def __init__(self, model: nn.Module, training_names: Sequence[str], evaluation_names: Sequence[str] = ()):
        self.model = model
        self.names = {True: training_names, False: evaluation_names}
        self.step = 0
        # By thread: nn.DataParallel runs replicas of the model, hooks included, side by side.
        self._current: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._pending: list[tuple] = []
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def close(self) -> None:
        """Removes the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    # Not compiled with the model: they look at values.
    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        index = kwargs.pop("index", None)
        features = kwargs.get("input_features")
        if features is not None:
            fine = torch.isfinite(features.detach()).flatten(1).all(dim=1)  # [B]
            self._current[threading.get_ident()] = (index, fine)
        elif kwargs.get("hidden_states") is not None:  # from a cache, which holds finite numbers only
            states = kwargs["hidden_states"]
            fine = torch.ones(states.shape[0], dtype=torch.bool, device=states.device)
            self._current[threading.get_ident()] = (index, fine)
        return args, kwargs

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: dict[str, Any]) -> None:
        index, fine = self._current.pop(threading.get_ident(), (None, None))
        if fine is None:
            return
        # Where the Trainer computes the loss itself (label smoothing), the logits tell.
        loss = output["loss"] if output.get("loss") is not None else output["logits"]
        loss_fine = torch.isfinite(loss.detach()).all()
        if fine.is_cuda:
            # Everything that is needed goes to the CPU without making the host wait for the device.
            verdict = [part.to("cpu", non_blocking=True) for part in (fine, loss_fine)]
            event = torch.cuda.Event()
            event.record()
        else:
            verdict, event = [fine, loss_fine], None
        self._pending.append((self.step, module.training, index, *verdict, event))
        if event is None:
            self._resolve()
        elif len(self._pending) > 1:
            self._resolve(keep=1)

    def _resolve(self, keep: int = 0) -> None:
        """Reads the verdicts of all passes but the last ``keep`` and raises at the first bad one."""
        while len(self._pending) > keep:
            step, training, index, fine, loss_fine, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            if bool(fine.all()) and bool(loss_fine):
                continue
            self._pending.clear()
            where = f"at step {step}" if training else f"in the evaluation after step {step}"
            names = self.names[training]
            suspects = [True] * len(fine) if bool(fine.all()) else (~fine).tolist()
            files = []
            if index is not None:
                files = [names[i] for i, bad in zip(index.tolist(), suspects) if bad and i < len(names)]
            what = "the loss is" if bool(fine.all()) else "the features are"
            files_text = f"; files: {', '.join(files)}" if files else ""
            raise NonFiniteError(f"{what} NaN or infinite {where}{files_text}")

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or control.should_log:
            self._resolve()
        if control.should_save:
            self._check_parameters(state.global_step)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        self._resolve()
        self._check_parameters(state.global_step)  # they are saved next

    def _check_parameters(self, step: int) -> None:
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        if trained and bool(torch.stack([torch.isfinite(value).all() for _, value in trained]).all()):
            return
        for name, value in trained:
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(
                    f"parameter {name} became NaN or infinite at step {step}, try a lower learning_rate"
                )
