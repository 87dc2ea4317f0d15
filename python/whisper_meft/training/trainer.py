"""The Trainer of all methods: the stock one with what LoRA+ and MeZO need, and batches by length."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import seed_worker

from ..data.batching import LengthBatches, LongestFirst
from ..errors import UserError, is_full_disk, one_line
from ..methods import MeftConfig
from ..methods.mezo import MeZO
from ..model.loss import with_penalty
from ..model.module import MeftModel
from ..model.saving import extractor_to_save
from . import checkpoints
from .criterion import ClassLoss
from .interrupts import Interrupts, Stopped
from .resuming import Batches, RunRecord
from .streaming import StreamedTraining
from .throughput import Throughput


class _TellsEpoch(TrainerCallback):
    """Tells batches and dataset which epoch it is, also in the middle of one that is gone on with."""

    def __init__(self, *told: Any):
        self.told = told

    def on_epoch_begin(self, args, state, control, **kwargs):
        for each in self.told:
            each.set_epoch(math.floor((state.epoch or 0) + 1e-6))


class MeftTrainer(Trainer):
    """``transformers.Trainer`` that trains every method as it is meant; arguments as there.

    All methods but MeZO, which needs the training step that is made here, train the same way with the stock
    Trainer. There, a loss that the Trainer computes (label smoothing, ``compute_loss_func``) is refused for
    the methods with a penalty, AdaLoRA and S2-LoRA; here it holds the penalty.

    Args:
        model, args, data_collator, kwargs: as there.
        length_batches: what training batches are made of, instead of the batch size and a random order.
            Where it is given, evaluation goes from the longest clip to the shortest, if the evaluation data
            has a property ``lengths``: predictions and labels then come in that order.
        evaluation_in_order: evaluation goes in the order of its data in any case.
        windows, augmentation: how clips were cut into examples, in words, and changed, for whoever resumes.
        throughput: measures the training steps; what it finds goes into the log beside the loss.
        interrupts: asks for a stop, which comes after a step, with a checkpoint, as ``Stopped``.
        streamed: what training batches are read from in the place of ``train_dataset``'s own loader.
        before_first_save: called in the main process before the first checkpoint is written.

    Raises:
        UserError: a training argument does not go with the method.
    """

    # What newer Trainers ask where a class has a loss of its own: is it divided by what counts in a step?
    loss_is_scaled_for_ga: bool | None = None

    def __init__(
        self,
        model: MeftModel | None = None,
        args: Any = None,
        data_collator: Any = None,
        *,
        length_batches: LengthBatches | None = None,
        evaluation_in_order: bool = False,
        windows: str | None = None,
        augmentation: dict[str, Any] | None = None,
        throughput: Throughput | None = None,
        interrupts: Interrupts | None = None,
        streamed: StreamedTraining | None = None,
        before_first_save: Callable[[], None] | None = None,
        **kwargs: Any,
    ):
        extractor = kwargs.get("processing_class")
        if extractor is not None and model is not None:
            kwargs["processing_class"] = extractor_to_save(extractor, model.meft_config.max_frames)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        if self.loss_is_scaled_for_ga is not None and not hasattr(Trainer, "loss_is_scaled_for_ga"):
            self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga  # which older ones go by
        if extractor is not None and model is None:  # model_init has made it now
            self.processing_class = extractor_to_save(extractor, self.method.max_frames)
        self.length_batches, self.throughput, self.streamed = length_batches, throughput, streamed
        self.evaluation_in_order, self.windows = evaluation_in_order, windows
        self.augmentation = augmentation
        self.interrupts, self._before_first_save = interrupts, before_first_save
        self.record = RunRecord()
        self.add_callback(self.record)
        # Those that the record's sum does not have yet.
        self._losses = torch.zeros((), device=self.args.device)
        self.first_step, self._saved_step = 0, None
        if interrupts is not None:
            self.add_callback(interrupts)
        if throughput is not None:
            self.add_callback(throughput)
        if streamed is not None:
            self.add_callback(streamed)
        told = [each for each in (length_batches, self.train_dataset) if hasattr(each, "set_epoch")]
        self.add_callback(_TellsEpoch(*told))
        if self.method.method == "mezo" and self.args.fp16:
            raise UserError("fp16 cannot be used with mezo, which has no gradients to scale; use bf16")
        own = self.compute_loss_func is None or isinstance(self.compute_loss_func, ClassLoss)
        # What takes -100 for a label that does not count; another loss may take it for anything.
        self._skips_labels = own and type(self).compute_loss is MeftTrainer.compute_loss
        self._loss_is_ours = True
        # A loss that the Trainer computes from the scores lacks the method's penalty.
        if self.label_smoother is not None:
            self.label_smoother = self._with_penalty(self.label_smoother)
        if self.compute_loss_func is not None:
            self.compute_loss_func = self._with_penalty(self.compute_loss_func)

    @property
    def method(self) -> MeftConfig:
        """The options of the model's method: ``model_init`` may make another model for each training."""
        return self.model.meft_config

    def _with_penalty(self, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def computed(outputs: Any, labels: Any, num_items_in_batch: Any = None, **more: Any) -> torch.Tensor:
            loss = compute(outputs, labels, num_items_in_batch=num_items_in_batch, **more)
            counts = num_items_in_batch if labels is not None else None
            return with_penalty(loss, self.model.penalty(), labels, counts) if self.model.training else loss

        return computed

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch.save gives the second for a full disk
            if isinstance(error, OSError) or is_full_disk(error):
                where = f"the checkpoint of step {self.state.global_step} in {self.args.output_dir}"
                raise UserError(f"cannot write {where}: {one_line(error)}") from error
            raise

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._loss_is_ours = True
        before = self.model.penalty_elsewhere
        self.model.penalty_elsewhere |= self.label_smoother is not None or self.compute_loss_func is not None
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            self.model.penalty_elsewhere = before

    def get_train_dataloader(self) -> DataLoader:
        if self.streamed is not None:
            return self.streamed.loader()
        if self.length_batches is None:
            return super().get_train_dataloader()
        arguments = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.length_batches,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=arguments.dataloader_num_workers, rank=arguments.process_index
            ),
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        fetch = partial(super().get_batch_samples, *args, **kwargs)
        fetched = fetch() if self.throughput is None else self.throughput.fetch(fetch)
        if self.streamed is not None:
            self.streamed.take(fetched[0])
        return fetched

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.throughput is not None and "loss" in logs:
            logs |= self.throughput.take(self.over_processes)
        super().log(logs, *args, **kwargs)

    def over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes of the run; all of them must call it."""
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if self.evaluation_in_order:  # which group_by_length would change
            return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
        lengths = None if self.length_batches is None else getattr(eval_dataset, "lengths", None)
        return super()._get_eval_sampler(eval_dataset) if lengths is None else LongestFirst(lengths)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As there, but in several processes the loss is the mean over all that the step holds, each once.

        Where the loss is not one of the project's own, which skip labels, a clip that fills up the last batch
        counts in the mean of that batch, which then weighs as much as what it is there for."""
        labels = inputs.get("labels")
        if self.args.world_size == 1 or labels is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        if self._skips_labels and labels.ndim == 1 and not labels.is_floating_point():
            labels, clips = self._labels_once(labels)
            counted = (labels != -100).sum() if clips else 0.0
        else:
            counted = self._clips_once(find_batch_size(labels))
        averaged, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            found = super().prediction_step(model, {**inputs, "labels": labels}, *args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = averaged
        return (self._mean_over_processes(found[0], counted), *found[1:])

    def _clips_once(self, size: int) -> int:
        """How many of the ``size`` clips of a batch of evaluation have not come before: the others only fill
        up the last batches of several processes, and come last."""
        state = self.accelerator.gradient_state
        # The Trainer gathers batches in the order of the processes, and cuts off all behind the remainder.
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(max(state.remainder - self.args.process_index * size, 0), size)

    def _labels_once(self, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The labels of a batch of evaluation, with -100 for the clips that :meth:`_clips_once` does not
        count, and how many it does. Where there are none, the labels stay: a loss over nothing would be
        NaN."""
        clips = self._clips_once(len(labels))
        if 0 < clips < len(labels):
            labels = labels.clone()
            labels[clips:] = -100
        return labels, clips

    def _mean_over_processes(self, loss: torch.Tensor, counted: torch.Tensor | float) -> torch.Tensor:
        """The mean of the losses of all processes, weighted by how much each is the mean of."""
        if self.args.world_size == 1:
            return loss
        weight = torch.as_tensor(counted, dtype=torch.float64, device=loss.device)
        both = torch.stack([torch.where(weight > 0, loss.double() * weight, 0.0), weight])
        total, weights = self.accelerator.reduce(both, reduction="sum")
        return (total / weights).to(loss.dtype)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        new = self.optimizer is None
        if self.optimizer is None and self.method.method == "mezo":
            trained = [p for p in self.model.parameters() if p.requires_grad]
            rate, decay = self.args.learning_rate, self.args.weight_decay
            options = {"seed": self.args.seed, "queries": self.method.mezo_queries}
            # All that a forward pass changes; of a quantised encoder the weights are buffers too.
            standardisation = getattr(self.model, "standardisation", None)
            options["buffers"] = [] if standardisation is None else list(standardisation.buffers())
            self.optimizer = MeZO(trained, rate, self.method.eps, decay, **options)
        elif self.optimizer is None and self.method.method == "lora_plus":
            self.optimizer = self._lora_plus_optimizer()
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = getattr(self.args, "head_learning_rate", None)
        if new and rate is not None:
            self._set_head_rate(optimizer, rate)
        return optimizer

    def _set_head_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Moves the head's parameters into groups with a rate of their own."""
        head = {id(p) for part in (self.model.projector, self.model.classifier) for p in part.parameters()}
        for group in list(optimizer.param_groups):
            chosen = [p for p in group["params"] if id(p) in head]
            rest = [p for p in group["params"] if id(p) not in head]
            if not rest:
                group["lr"] = rate if chosen else group["lr"]
            elif chosen:
                group["params"] = rest
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})

    def _lora_plus_optimizer(self) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        optimizer = create_loraplus_optimizer(
            self.model.tuned,
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
                for part in ("projector", "classifier")
                if hasattr(self.model, part)  # a recogniser has no head of its own
                for name, parameter in getattr(self.model, part).named_parameters()
                if (name != "bias") == decays
            ]
            if not head:
                continue
            decay = self.args.weight_decay if decays else 0.0
            optimizer.add_param_group({"params": head, "lr": self.args.learning_rate, "weight_decay": decay})
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As there; a crash on the way can be told by the marker in the folder, or by nothing being there."""
        self.prepare_to_save()
        self._add_up_losses()
        if self.streamed is not None:
            self.record.stream = self.streamed.state()
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):  # the Trainer fails where a resumed run had no such one
                self.state.stateful_callbacks.setdefault(type(each).__name__, each.state())
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        main, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with self._own_rotation() as limit:
            with checkpoints.being_written(folder, main, wait):
                self._write_checkpoint(model, trial)
            self._saved_step = self.state.global_step
            if main:
                checkpoints.rotate(output_dir, limit, [folder, self.state.best_model_checkpoint])

    def prepare_to_save(self) -> None:
        """Makes room for what the run writes, once."""
        if self._before_first_save is not None and self.args.should_save:
            self._before_first_save()
        self._before_first_save = None

    @property
    def has_saved(self) -> bool:
        """Whether a checkpoint was written since training began here."""
        return self._saved_step is not None

    def _add_up_losses(self) -> None:
        """Brings the record's sum of losses up to date; all processes must call it."""
        losses = self.over_processes(self._losses.detach().cpu()) / self.args.world_size
        if self.record.loss_sum is not None:
            self.record.loss_sum += float(losses)
        self._losses = torch.zeros_like(self._losses)

    def mean_loss(self) -> float | None:
        """The mean loss of all steps of the run, also of those before it was resumed; None where these are
        not known. All processes must call it."""
        self._add_up_losses()
        if self.record.loss_sum is None:
            return None
        return self.record.loss_sum / max(self.state.global_step, 1)

    @cached_property
    def batches(self) -> Batches:
        """Which clips come in which step."""
        if self.streamed is not None:
            stream, steps = self.streamed.batches.stream, self.streamed.steps_per_pass or 0
            count = steps * self.args.gradient_accumulation_steps
            return Batches.of(self.args, stream.size or 0, count, False)
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed
            loader = self.get_train_dataloader()
        by_length = self.length_batches is not None
        return Batches.of(
            self.args, len(self.train_dataset), len(loader), by_length, self.windows, self.augmentation
        )

    def total_steps(self) -> int:
        """How many the whole run has, if nothing stops it early."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self.batches.steps_per_epoch)

    def take_over(self, checkpoint: Path) -> None:
        """Takes over a checkpoint at which training was over: its state, and the model to be left.

        Raises:
            UserError: the best checkpoint, which is to be left, is not there any more.
        """
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.state = self.callback_handler.state = state
        self.record.loss_sum = RunRecord.loss_sum_of(state)
        self.record.forget_other_choice(state)
        if self.args.load_best_model_at_end and state.best_global_step:
            best = checkpoint.with_name(f"checkpoint-{state.best_global_step}")
            if checkpoints.problem_with(best) is not None:
                raise UserError(
                    f"resume_from_checkpoint: training was over at {checkpoint}, but the best checkpoint, "
                    f"{best}, is not there any more; --load_best_model_at_end False takes the last"
                )
            checkpoint, state.best_model_checkpoint = best, str(best)
        self.load(checkpoint)

    def load(self, folder: Path) -> None:
        """Loads what was trained from a folder into the model."""
        self._load_from_checkpoint(str(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The saved rates are of the schedule as it was then: at the end of a finished run they may be 0.
        scheduler = self.lr_scheduler
        if checkpoint is None or not isinstance(scheduler, LambdaLR):
            return
        step = scheduler.last_epoch
        rates = [rate * share(step) for rate, share in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _load_scaler(self, checkpoint: str | None) -> None:
        # Another number format than before has nothing to scale.
        if getattr(self.accelerator, "scaler", None) is not None:
            super()._load_scaler(checkpoint)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        due = control.should_log or control.should_save or control.should_evaluate
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.interrupts is not None and self._stop_is_asked_for(due):
            self._stop()

    def _stop_is_asked_for(self, due: bool) -> bool:
        asked = self.interrupts.asked is not None
        if self.args.world_size > 1:
            # All must stop after the same step. They agree where they wait for each other anyway.
            asked = due and bool(self.over_processes(torch.tensor([float(asked)])))
        if not asked or self.control.should_training_stop:
            return False
        # What belongs to the end of an epoch comes first, so that the resumed run need not know of it. A run
        # from a stream has one end alone.
        return (
            self.streamed is not None
            or self.interrupts.epoch_over
            or not float(self.state.epoch).is_integer()
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the stock Trainer's, where :meth:`save_model` has not written a card: what that says is kept."""
        if not (Path(self.args.output_dir) / "README.md").exists():
            super().create_model_card(*args, **kwargs)

    def _stop(self) -> None:
        if self._saved_step != self.state.global_step and not self.args.save_only_model:
            self._save_checkpoint(self.model, trial=None)
        raise Stopped

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        with self._own_rotation() as limit:
            outcome = super()._finalize_training(trial, *args, **kwargs)
            best = self.state.best_model_checkpoint
            if limit == 1 and best is not None and self.args.should_save:
                checkpoints.rotate(Path(self._get_output_dir(trial=trial)), limit, [best])
        return outcome

    @contextmanager
    def _own_rotation(self) -> Iterator[int | None]:
        """Keeps the stock Trainer from removing checkpoints, which leaves half of one if a crash comes then,
        and before the new one is known to be whole; gives the number to keep."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self._loss_is_ours = False
        loss = self._training_step(model, inputs, num_items_in_batch)
        if not self._loss_is_ours:
            self._tell_of_accumulation()
        self._losses += loss.detach()
        return loss

    def _tell_of_accumulation(self) -> None:
        """Warns of a ``compute_loss`` that is not this class's where nobody has said what it is the mean of:
        the model divides its own loss by what counts in the whole step, so nothing else does."""
        steps = self.args.gradient_accumulation_steps
        if steps > 1 and self.loss_is_scaled_for_ga is None:
            warnings.warn(
                f"if {type(self).__name__}.compute_loss gives the mean over its own clips, it counts {steps} "
                "times, by gradient_accumulation_steps: set loss_is_scaled_for_ga = False in the class, or "
                "True if it divides by num_items_in_batch",
                stacklevel=3,
            )

    def _training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> torch.Tensor:
        if self.method.method != "mezo":
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        whole = self.loss_is_scaled_for_ga
        if whole is None:
            whole = num_items_in_batch is not None or self.compute_loss_func is not None
        share = 1 if whole else self.current_gradient_accumulation_steps

        def loss() -> torch.Tensor:
            with self.compute_loss_context_manager():
                # A copy: where the Trainer computes the loss it takes the labels out.
                value = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            return value.mean() / share

        model.train()
        return getattr(self.optimizer, "optimizer", self.optimizer).measure(loss)
