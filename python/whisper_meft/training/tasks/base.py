"""What a training run asks of its task."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, WhisperConfig

from ... import data
from ...audio.windows import Windows
from ...data.examples import Example, ExampleSet
from ...data.streaming import Stream
from ...data.transcripts import TranscriptTokens
from ...errors import UserError
from ...feature_cache.dataset import CachedCollator
from ...feature_cache.store import FeatureCache
from ...methods import MeftConfig
from ...model.base import MeftBase
from ...model.module import get_meft_model
from ...options.common import DataFormatArguments
from ...options.training import TrainDataArguments
from ..trainer import MeftTrainer


def check_method(config: MeftConfig, sizes: WhisperConfig, base_class: type[PreTrainedModel]) -> None:
    """Raises UserError where a method cannot do a task, that of ``base_class``, with a backbone of these
    sizes."""
    plain = MeftConfig.from_dict(config.to_dict() | {"backbone_quantization": None})
    with torch.device("meta"):
        get_meft_model(base_class(copy.deepcopy(sizes)), plain)


class Task:
    """What is learnt of the examples, and how it is scored: the parts of a run that depend on it.

    Attributes:
        backbone_class: the Whisper that the model is made of.
        trainer_class: the Trainer that trains it.
        curve: (name, title) of the score that the learning curve shows, by its name in the Trainer's log.
    """

    backbone_class: ClassVar[type[PreTrainedModel]]
    trainer_class: ClassVar[type[MeftTrainer]] = MeftTrainer
    curve: ClassVar[tuple[str, str]]
    # Whether items are padded to a window of one length, so that batches by length would gain nothing.
    of_one_length: ClassVar[bool] = False
    # Whether examples need a label.
    labelled: ClassVar[bool] = False
    # What makes tokens of transcripts, where there are any.
    tokens: TranscriptTokens | None = None
    # How much an example counts in the loss, by its class, in the order of the classes; None: all alike.
    weights: list[float] | None = None

    def reader_options(self, arguments: DataFormatArguments) -> dict[str, Any]:
        """Keyword arguments of :func:`whisper_meft.data.load_examples`.

        Raises:
            UserError: an option is of another task.
        """
        raise NotImplementedError

    def windows(self, arguments: TrainDataArguments) -> Windows | None:
        """How clips that are longer than the model hears are cut; None: they are not.

        Raises:
            UserError: the task or the model cannot use such windows.
        """
        if arguments.window is not None:
            raise UserError(
                f"window: {arguments.window:g} is for --task classify, as a transcript is of a whole clip"
            )
        return None

    def check_read(self, examples: ExampleSet) -> ExampleSet:
        """Examples as they were read, before their audio is looked at.

        Raises:
            UserError: the task cannot use them.
        """
        return examples

    def usable(self, examples: ExampleSet) -> tuple[ExampleSet, list[tuple[str, str]]]:
        """Of examples whose audio is known to be readable, those that can be used, and (name, reason) of the
        others."""
        return examples, []

    @property
    def counts_classes(self) -> bool:
        """Whether it must be known how many examples each class has."""
        return False

    def check(self, training: ExampleSet | Stream, evaluation: ExampleSet | None) -> None:
        """Raises UserError where the two sets do not go together."""

    def check_streamed(self, example: Example) -> None:
        """Raises UserError where an example of a stream is wrong in a way that :meth:`check_read` and
        :meth:`check` refuse."""
        raise NotImplementedError

    def placeholder(self) -> Example:
        """An example that :meth:`dataset` takes, with nothing to hear."""
        raise NotImplementedError

    def note(self, training: ExampleSet | Stream) -> None:
        """Takes note of what the training examples define, before any dataset is made."""

    def prepare(self, base: PreTrainedModel) -> None:
        """Makes the loaded backbone ready for the method."""

    def check_resumed(self, checkpoint: Path) -> None:
        """Raises UserError where a checkpoint, of a model like this one, was trained for something else."""

    def dataset(self, examples: ExampleSet, make_dataset: Callable[..., Dataset], **more: Any) -> Dataset:
        """The examples as model inputs, by what is called as :class:`whisper_meft.data.SpeechDataset`, with
        ``more`` arguments."""
        raise NotImplementedError

    def collator(self) -> data.Collator:
        """What makes batches of the dataset's items."""
        raise NotImplementedError

    def cached_dataset(
        self, examples: ExampleSet, cache: FeatureCache, model: MeftBase, **more: Any
    ) -> Dataset:
        """The examples as the states in a feature cache that ``model`` reads, with ``more`` arguments of
        :class:`whisper_meft.feature_cache.dataset.CachedDataset`."""
        raise NotImplementedError

    def cached_collator(self) -> CachedCollator:
        """What makes batches of those items."""
        return CachedCollator()

    def counted_step(self, training: ExampleSet | Stream) -> dict[str, Any]:
        """What a step is, for :func:`whisper_meft.memory.counting.estimate`."""
        raise NotImplementedError

    def describe(self, training: ExampleSet | Stream) -> list[str]:
        """Lines about the training examples."""
        raise NotImplementedError

    def classes_to_balance(self, training: ExampleSet) -> list[int] | None:
        """The class of each training example, where each class is to come equally often; else None."""
        return None

    def trainer_options(self, evaluation: ExampleSet | None) -> dict[str, Any]:
        """What :attr:`trainer_class` is given beside what every run gives."""
        raise NotImplementedError

    def score(
        self, trainer: MeftTrainer, evaluation: ExampleSet, load_base: Callable[[], PreTrainedModel]
    ) -> tuple[Any, float | None]:
        """Scores of the trainer's model on its evaluation data, and the loss there; in every process.

        Args:
            load_base: gives the backbone as it was before training.
        """
        raise NotImplementedError

    def summary(self, training: ExampleSet | Stream) -> dict[str, Any]:
        """Entries of train_results.json."""
        raise NotImplementedError

    def write_scores(self, folder: Path, scores: Any) -> dict[str, Any]:
        """Writes evaluation.txt and figures; gives the entries of eval_results.json."""
        raise NotImplementedError
