"""The Trainer of models that transcribe, and what they write in a run of several processes."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..data.examples import ExampleSet
from ..evaluation.generating import Transcript
from ..evaluation.transcriber import Transcriber
from .together import gathered
from .trainer import MeftTrainer


class TranscriptionTrainer(MeftTrainer):
    """:class:`.trainer.MeftTrainer` of transcripts: no scores of the vocabulary are kept, label smoothing is
    the model's, and evaluation can score what is generated.

    Args:
        tokens_per_clip: how many labels of a clip of the evaluation data count, on average: the loss there is
            then the mean over all of its tokens, however they are dealt out to batches.
        rates: gives scores, by name, of what a model writes for the evaluation data; called in all processes.
            Without it evaluation gives the loss alone.
        kwargs: as there.
    """

    def __init__(
        self,
        *args: Any,
        tokens_per_clip: float | None = None,
        rates: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.label_smoother = None  # it would take the scores of all tokens
        self.tokens_per_clip, self.rates = tokens_per_clip, rates

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, **self._how()}, *args, **kwargs)

    def _how(self) -> dict[str, Any]:
        return {"label_smoothing": self.args.label_smoothing_factor, "return_logits": False}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        labels, clips = self._labels_once(inputs["labels"])
        share = None if self.tokens_per_clip is None else (clips or len(labels)) * self.tokens_per_clip
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**{**inputs, "labels": labels}, **self._how(), num_items_in_batch=share).loss
        counted = (labels != -100).sum() if share is None else share
        loss = self._mean_over_processes(loss, counted if clips else 0.0)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> EvalLoopOutput:
        found = super().evaluation_loop(
            dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        if self.rates is not None:
            rates = self.rates(self.model)
            found.metrics.update({f"{metric_key_prefix}_{name}": rate for name, rate in rates.items()})
        return found

    def evaluation_loss(self) -> float:
        """The loss of the evaluation data; all processes must call it."""
        rates, self.rates = self.rates, None
        try:
            return self.predict(self.eval_dataset, metric_key_prefix="eval").metrics["eval_loss"]
        finally:
            self.rates = rates


class SharedTranscriber(Transcriber):
    """:class:`whisper_meft.evaluation.transcriber.Transcriber` whose work the processes of a run share: all
    of them must call it, and all get the whole."""

    def transcribe(self, examples: ExampleSet) -> tuple[list[Transcript | None], list[tuple[str, str]]]:
        state = PartialState()
        if state.num_processes == 1:
            return super().transcribe(examples)
        mine = range(state.process_index, len(examples), state.num_processes)
        hear = super().transcribe
        parts = gathered(lambda: (mine, *(hear(examples.select(mine)) if mine else ([], []))))
        by_place = {place: each for places, found, _ in parts for place, each in zip(places, found)}
        reasons = {name: reason for *_, failed in parts for name, reason in failed}
        names = [example.name for example in examples if example.name in reasons]
        return [by_place[i] for i in range(len(examples))], [(name, reasons[name]) for name in names]
