"""What every saved model needs to be run on examples: its device, its feature extractor, and batches."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .. import data
from ..audio.windows import Windows
from ..data.batching import LongestFirst
from ..data.examples import ExampleSet
from ..data.windows import WindowCollator, WindowStream
from ..errors import UserError
from ..model.backbone import quiet_transformers
from ..model.pretrained import load_feature_extractor
from ..options.inference import InferenceArguments


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; None is a GPU if there is one.

    Raises:
        UserError: there is no such device, or it computes nothing.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(1, device=device).device
        reason = None if found.type != "meta" else "it computes nothing"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    if reason is not None:
        name = str(device)
        raise UserError(
            f"device: cannot use {name!r}, cpu or a GPU such as cuda or cuda:0 is needed: {reason}"
        )
    return found


def extractor_of(model_dir: str | Path, named: str | None, config: Any, max_frames: int | str) -> Any:
    """The feature extractor ``named``, or else the one in ``model_dir``, which fits the model.

    Args:
        model_dir: folder or hub name of the model. named: folder or hub name, or None.
        config: the model's sizes (``num_mel_bins``, ``max_source_positions``).
        max_frames: as in :class:`whisper_meft.MeftConfig`.

    Raises:
        UserError: there is none, or its features do not fit the model.
    """
    if named is not None:
        extractor = load_feature_extractor(named)
    else:
        extractor = load_feature_extractor(str(model_dir), "model_dir")
    data.check_feature_extractor(extractor, config, max_frames)
    return extractor


def load_trained(kind: type[Any], model_dir: Any, arguments: InferenceArguments, device: torch.device) -> Any:
    """The trained model, of class ``kind``, in ``model_dir``, a folder or a name on the hub; several on one
    pass are in several.

    Raises:
        UserError: model or backbone cannot be loaded or do not fit each other.
    """
    with quiet_transformers():
        model = kind.from_pretrained(
            model_dir,
            backbone=arguments.backbone,
            dtype=arguments.backbone_dtype,
            quantization=arguments.backbone_quantization,
            device=device,
            attention=arguments.attention,
        )
    if arguments.backbone_compile:
        model.encoder.compile_layers()
    return model


class LoadedModel:
    """A model and its feature extractor, with what reading examples for it takes.

    Args:
        model: is put into evaluation mode on ``device``.
        feature_extractor: the one it was trained with.
        device: torch device; default a GPU if there is one.
        batch_size: clips per batch.
        num_workers: processes that read audio; 0 reads in this one.
        progress: show progress bars.

    Attributes:
        say_cut: whether a warning says of clips that only their beginning is heard.
    """

    say_cut = True

    def __init__(
        self,
        model: Any,
        feature_extractor: Any,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        progress: bool = True,
    ):
        self.device = usable_device(device)
        self.model = model.to(self.device).eval()
        self.feature_extractor = feature_extractor
        self.batch_size, self.num_workers, self.progress = batch_size, num_workers, progress

    def check(self, examples: ExampleSet, strict: bool = False) -> tuple[ExampleSet, list[tuple[str, str]]]:
        """:func:`whisper_meft.data.check_audio` with this model's workers and progress bar."""
        extractor = self.feature_extractor
        return data.check_audio(examples, strict, self.num_workers, self.progress, None, extractor)

    def batches(
        self, examples: ExampleSet, max_frames: int | str, longest_first: bool
    ) -> tuple[list[int], DataLoader]:
        """Batches of inputs, and the index in ``examples`` of each clip in them.

        Args:
            max_frames: as in :class:`whisper_meft.data.SpeechDataset`.
            longest_first: put clips of like length together, where all lengths are known.
        """
        dataset = data.SpeechDataset(examples, self.feature_extractor, None, max_frames, say_cut=self.say_cut)
        collator = data.Collator(self.feature_extractor, max_frames)
        lengths = dataset.lengths if longest_first else None
        order = list(range(len(dataset)) if lengths is None else LongestFirst(lengths))
        loader = DataLoader(
            dataset, self.batch_size, sampler=order, collate_fn=collator, num_workers=self.num_workers
        )
        return order, loader

    def over_windows(
        self,
        examples: ExampleSet,
        windows: Windows,
        max_frames: int | str,
        of_batch: Callable[[dict[str, torch.Tensor]], np.ndarray],
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Hears long recordings in windows, a batch of windows at a time.

        Args:
            examples: of known length, not features computed earlier.
            windows, max_frames: as in :class:`whisper_meft.data.windows.WindowStream`.
            of_batch: float32 (B, K) of a batch of inputs.

        Yields:
            index in ``examples``, what ``of_batch`` gave (windows, K), and whether each window is muted, bool
            (windows,), the moment that a recording is heard to its end.
        """
        counts = [len(windows.starts(example.seconds)) for example in examples]
        stream = WindowStream(examples, windows, self.feature_extractor, max_frames)
        collate = WindowCollator(data.Collator(self.feature_extractor, max_frames))
        loader = DataLoader(stream, self.batch_size, collate_fn=collate, num_workers=self.num_workers)
        held: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        left = counts.copy()
        with tqdm(total=sum(counts), desc="classifying", unit="window", disable=not self.progress) as bar:
            for places, batch in loader:
                for (index, number, silent), row in zip(places, of_batch(batch)):
                    if index not in held:
                        count = counts[index]
                        held[index] = np.empty((count, len(row)), np.float32), np.zeros(count, bool)
                    rows, muted = held[index]
                    rows[number], muted[number] = row, silent
                    left[index] -= 1
                    if not left[index]:
                        yield index, *held.pop(index)
                bar.update(len(places))
