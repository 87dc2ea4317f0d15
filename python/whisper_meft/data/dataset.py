"""From examples to batches: log-mel features of one clip, and padding of several."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .augmenter import Augmenter
from .epochs import SharedEpoch, drawn
from .examples import Example, ExampleSet, check_known_labels, check_transcribed
from .features import MaxFrames, log_mel, read_features, true_frames, window_of
from .transcripts import TranscriptTokens

logger = logging.getLogger(__name__)


class SpeechDataset(torch.utils.data.Dataset):
    """Examples as model inputs.

    Args:
        examples: labelled, unless ``label2id`` is ``None``; transcribed, if ``tokens`` is given.
        feature_extractor: a ``WhisperFeatureExtractor``.
        label2id: class ids by name; ``None`` gives items without ``labels``.
        max_frames: "fidelity" gives every item the full window, padded as Whisper does; "longest" the frames
            of the clip; an integer the same, of at most that many encoder frames (20 ms each). Longer clips
            are cut to the window, and a warning says so once, unless ``say_cut`` is False.
        tokens: makes items of their transcripts; with ``label2id`` ``None``. With an integer every item then
            has that window, since Whisper hears padding; a longer clip is an error, for its transcript tells
            of what would not be heard.

    Items are dicts of ``input_features`` (float32 ``(mel bins, frames)``), ``attention_mask`` (int64
    ``(frames,)``, 1 where a frame holds sound), ``labels`` (int) and ``length`` (int, encoder frames that
    hold sound: half the mask's sum, rounded up). With ``tokens``, ``labels`` and
    ``decoder_input_ids`` are int64 ``(tokens,)`` (:class:`TranscriptTokens`). A key ``(index, again)`` gives
    the item of a clip that came ``again`` times before in the epoch, augmented in another way.

    Raises:
        UserError: no examples, unknown or missing labels, ``max_frames`` out of range, or ``augment`` is for
            waveforms and an example holds log-mel; on reading an item:
            naming it, when its audio cannot be read, its features have other mel bins, or it has a transcript
            and is longer than the window.
    """

    def __init__(
        self,
        examples: ExampleSet,
        feature_extractor: Any,
        label2id: dict[str, int] | None = None,
        max_frames: MaxFrames = "fidelity",
        tokens: TranscriptTokens | None = None,
        augment: Augmenter | None = None,
        say_cut: bool = True,
    ):
        if label2id is not None and tokens is not None:
            raise UserError("label2id is for classes and tokens for transcripts: give one of them")
        if label2id is not None:
            check_known_labels(examples, list(label2id))
        elif tokens is not None:
            check_transcribed(examples)
        elif not len(examples):
            raise UserError(f"{examples.description} holds no examples")
        self.examples = examples
        self.feature_extractor = feature_extractor
        self.label2id = label2id
        self.tokens = tokens
        self.augment, self._epoch = augment, None
        if augment is not None:
            _check_augment(augment, examples, feature_extractor)
            self._epoch = SharedEpoch()
        self.max_frames = max_frames
        self._whole_window = max_frames == "fidelity" or (tokens is not None and max_frames != "longest")
        self._window = window_of(feature_extractor, max_frames)
        self._seconds = self._window * feature_extractor.hop_length / feature_extractor.sampling_rate
        known = [example.seconds for example in examples if example.seconds is not None]
        frame = feature_extractor.hop_length / feature_extractor.sampling_rate
        long = sum(seconds > self._seconds + frame for seconds in known)
        self._warned = len(known) == len(examples) or not say_cut
        if long and tokens is None and say_cut:
            warn_of_cut(long, len(examples), examples.description, self._seconds)
            self._warned = True

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> list[int] | None:
        """Encoder frames of every item, the most where speeds are drawn, for batching by length; ``None``
        unless all are known."""
        if any(example.seconds is None for example in self.examples):
            return None
        slowest = 1.0 if self.augment is None else self.augment.speeds[0]
        seconds = (min(example.seconds / slowest, self._seconds) for example in self.examples)
        return [max(1, math.ceil(each * 50 - 1e-6)) for each in seconds]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose augmentation items have, also in processes that read already."""
        if self._epoch is not None:
            self._epoch.set(epoch)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, again = drawn(key)
        if self.augment is None:
            return self.item(index)
        return self.item(index, f"{self._epoch.get()}.{again}" if again else f"{self._epoch.get()}")

    def item(self, index: int, version: str | None = None) -> dict[str, Any]:
        """An item by the name of its augmentation: of an epoch its number; None for a clip as it is."""
        example = self.examples[index]
        if example.has_features:
            features, frames = self._features(example)
        else:
            features, frames = self._log_mel(example, version)
        if version is not None:
            features = self.augment.log_mel(features, frames, example.name, version)
        item = self._item(features, frames)
        if self.label2id is not None:
            item["labels"] = self.label2id[example.label]
        if self.tokens is not None:
            item |= {name: torch.tensor(ids) for name, ids in self.tokens(example).items()}
        return item

    def item_of_wave(self, wave: np.ndarray) -> dict[str, Any]:
        """The input that sound alone gives, without labels, tokens and augmentation.

        Args:
            wave: float32 ``(samples,)`` at the extractor's rate, cut to the window.
        """
        wave = wave[: self._window * self.feature_extractor.hop_length]
        return self._item(*self._log_mel_of(wave))

    @staticmethod
    def _item(features: np.ndarray, frames: int) -> dict[str, Any]:
        return {
            "input_features": torch.from_numpy(np.ascontiguousarray(features)),
            "attention_mask": (torch.arange(features.shape[1]) < frames).long(),
            "length": (frames + 1) // 2,
        }

    def _log_mel(self, example: Example, version: str | None) -> tuple[np.ndarray, int]:
        extractor = self.feature_extractor
        fastest = 1.0 if version is None else self.augment.speeds[1]
        # A little more than the window: enough to see that a clip is longer, and for resampling its edge.
        wave, _ = example.read(extractor.sampling_rate, longest=self._seconds * fastest + 0.1)
        window = self._window * extractor.hop_length
        if len(wave) > window:
            self._say_cut(example, len(wave) / extractor.hop_length)
        if version is not None:
            whole = self.tokens is not None
            wave = self.augment.wave(wave, example.name, version, window, whole)
        return self._log_mel_of(wave[:window])

    def _log_mel_of(self, wave: np.ndarray) -> tuple[np.ndarray, int]:
        mel = log_mel(wave, self.feature_extractor, full_window=self._whole_window)
        return mel[:, : self._window], math.ceil(len(wave) / self.feature_extractor.hop_length)

    def _features(self, example: Example) -> tuple[np.ndarray, int]:
        features = read_features(example, self.feature_extractor.feature_size)
        frames = true_frames(features)
        if frames > self._window:
            self._say_cut(example, frames - 2)  # the last window's overlap with the sound
            frames = self._window
        if not self._whole_window:
            return features[:, :frames], frames
        features = features[:, : self._window]
        # Whisper's padding: log10 of its floor 1e-10, or 8 decades under the loudest bin, then (x + 4) / 4.
        silence = max(-1.5, float(features.max()) - 2.0)
        missing = self._window - features.shape[1]
        return np.pad(features, ((0, 0), (0, missing)), constant_values=silence), frames

    def _say_cut(self, example: Example, frames: float) -> None:
        if frames <= self._window + 1:  # what resampling makes longer is no speech
            return
        if self.tokens is not None:
            raise UserError(
                f"{example.name} is longer than the window of {self._seconds:g} s, so its transcript "
                "tells of what would not be heard: cut it, or leave it out"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s is longer than %.1f s; of it and other such clips only the first %.1f s are used",
                example.name,
                self._seconds,
                self._seconds,
            )


def warn_of_cut(long: int, clips: int, description: str, seconds: float) -> None:
    """Says of how many of so many clips only the first ``seconds`` are used."""
    logger.warning(
        "%d of %d clips of %s are longer than %.1f s; only their first %.1f s are used",
        long,
        clips,
        description,
        seconds,
        seconds,
    )


def _check_augment(augment: Augmenter, examples: ExampleSet, extractor: Any) -> None:
    """Raises UserError where the examples cannot be augmented so."""
    augment.check_bins(extractor.feature_size)
    computed = next((example for example in examples if example.has_features), None)
    if augment.of_waves and computed is not None:
        raise UserError(
            f"augment {', '.join(augment.of_waves)} cannot be used with log-mel that was computed earlier "
            f"({computed.name} of {examples.description}); spec can"
        )
    if augment.of_waves and augment.sampling_rate != extractor.sampling_rate:
        raise UserError(
            f"augment is for {augment.sampling_rate} Hz, the feature extractor for {extractor.sampling_rate}"
        )


@dataclass
class Collator:
    """Stacks items of :class:`SpeechDataset`; picklable.

    With "longest" and with an integer a batch is as long as its longest clip, rounded up to whole encoder
    frames (with an integer transcripts' items are of one length). Features are padded with 0 and the mask
    with 0, the decoder's input with ``pad_token_id`` (``TranscriptTokens.end``), which nothing before it
    attends to.

    Returns a dict of ``input_features`` (float32 ``(batch, mel bins, frames)``), ``attention_mask`` (int64
    ``(batch, frames)``) and, where the items have them, ``labels`` (int64 ``(batch,)``); of transcripts
    ``decoder_input_ids`` and ``labels`` (int64 ``(batch, tokens)``, labels padded with -100).
    """

    feature_extractor: Any
    max_frames: MaxFrames = "fidelity"
    pad_token_id: int = 50257

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(item["input_features"].shape[1] for item in items)
        window = window_of(self.feature_extractor, self.max_frames)
        if longest > window:
            raise UserError(
                f"an item has {longest} mel frames and max_frames={self.max_frames!r} of the collator allows "
                f"{window}: give the dataset and the collator the same"
            )
        frames = window if self.max_frames == "fidelity" else longest + longest % 2

        def stack(key: str) -> torch.Tensor:
            rows = (item[key] for item in items)
            return torch.stack([torch.nn.functional.pad(row, (0, frames - row.shape[-1])) for row in rows])

        batch = {"input_features": stack("input_features"), "attention_mask": stack("attention_mask")}
        return batch | labels_of(items, self.pad_token_id)


def labels_of(items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """What a batch holds beside audio: ``labels`` (B,) of classes; or of transcripts ``decoder_input_ids``
    (B, U), padded with ``pad_token_id``, and ``labels`` (B, U), padded with -100; or nothing."""
    if "decoder_input_ids" in items[0]:
        batch = {}
        for name, padding in (("decoder_input_ids", pad_token_id), ("labels", -100)):
            rows = [item[name] for item in items]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        return batch
    if "labels" in items[0]:
        return {"labels": torch.tensor([int(item["labels"]) for item in items])}
    return {}
