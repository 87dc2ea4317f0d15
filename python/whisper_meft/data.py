"""From examples to batches: checking audio before training, log-mel features, and padding.

``load_examples`` and the rules for sets of examples are exported here too, so that this is the one module to
import for data.
"""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .audio import read_audio, resample
from .errors import UserError
from .examples import (
    DatasetCell,
    Example,
    ExampleSet,
    check_known_labels,
    check_labelled,
    label_inventory,
    split_by_speaker,
    warn_on_shared_audio,
    warn_on_shared_speakers,
)
from .readers import list_audio_files, list_splits, load_examples

__all__ = [
    "Collator",
    "DatasetCell",
    "Example",
    "ExampleSet",
    "SpeechDataset",
    "check_audio",
    "check_feature_extractor",
    "check_known_labels",
    "check_labelled",
    "describe_bad",
    "label_inventory",
    "list_audio_files",
    "list_splits",
    "load_examples",
    "log_mel",
    "read_audio",
    "split_by_speaker",
    "true_frames",
    "warn_on_shared_audio",
    "warn_on_shared_speakers",
]

logger = logging.getLogger(__name__)

MaxFrames = str | int  # "fidelity", "longest" or a number of encoder frames


def check_audio(
    examples: ExampleSet,
    strict: bool = False,
    num_workers: int = 0,
    progress: bool = True,
    checked: Callable[[Example], Example | None] | None = None,
) -> tuple[ExampleSet, list[tuple[str, str]]]:
    """Decodes every example once, before training, and sets the unusable ones aside.

    Args:
        examples: what to check.
        strict: raise for the first unusable example instead.
        num_workers: threads (libsndfile decodes outside Python's lock); 0 and 1 mean none.
        progress: show a progress bar.
        checked: gives an example with its length, if it is known to be usable without being decoded.

    Returns:
        the usable examples, each with its length in ``seconds``, and (name, reason) of the others.

    Raises:
        UserError: none is usable; or, when strict, the first is not.
    """
    if not len(examples):
        raise UserError(f"{examples.description} holds no examples")

    def inspect(example: Example) -> Example | UserError:
        try:
            if checked is not None and (known := checked(example)) is not None:
                return known
            if example.has_features:
                _finite_features(example)
                return example
            wave, rate = example.decode()
            return replace(example, seconds=len(wave) / rate)
        except UserError as error:
            return error

    good, bad = [], []
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = pool.map(inspect, examples) if num_workers > 1 else map(inspect, examples)
        bar = tqdm(results, total=len(examples), desc="checking audio", unit="file", disable=not progress)
        for result, example in zip(bar, examples):
            if isinstance(result, Example):
                good.append(result)
                continue
            if strict:
                pool.shutdown(wait=False, cancel_futures=True)
                bar.close()
                raise result
            bad.append((example.name, str(result).removeprefix(example.name).lstrip(": ")))
    if not good:
        raise UserError(
            f"none of the {len(examples)} examples of {examples.description} can be used; the first, "
            f"{bad[0][0]}: {bad[0][1]}"
        )
    return ExampleSet(good, examples.description), bad


def describe_bad(bad: Sequence[tuple[str, str]], total: int) -> str:
    """What :func:`check_audio` set aside, one line per file."""
    lines = [f"{len(bad)} of {total} examples were left out because their audio cannot be used:"]
    return "\n".join(lines + [f"  {name}: {reason}" for name, reason in bad])


def check_feature_extractor(feature_extractor: Any, config: Any, max_frames: MaxFrames = "fidelity") -> None:
    """Checks that features of ``feature_extractor`` fit a backbone.

    Args:
        feature_extractor: a ``WhisperFeatureExtractor``.
        config: the backbone's ``WhisperConfig`` (``num_mel_bins``, ``max_source_positions``).
        max_frames: as in :class:`SpeechDataset`.

    Raises:
        UserError: other mel bins, a window that is not the encoder's, or more frames than it has positions.
    """
    bins, window = feature_extractor.feature_size, _window_frames(feature_extractor)
    if bins != config.num_mel_bins:
        raise UserError(
            f"the feature extractor makes {bins} mel bins, the model reads {config.num_mel_bins}: use the "
            "feature extractor that belongs to the model (preprocessor_config.json in its folder)"
        )
    positions = config.max_source_positions
    if max_frames == "fidelity" and window != 2 * positions:
        raise UserError(
            f"the feature extractor makes {window} mel frames (chunk_length {feature_extractor.chunk_length} "
            f"s), the encoder reads {2 * positions}: use the model's own feature extractor"
        )
    if max_frames != "fidelity" and window_of(feature_extractor, max_frames) > 2 * positions:
        raise UserError(
            f"max_frames={max_frames!r} with this feature extractor allows "
            f"{window_of(feature_extractor, max_frames) // 2} encoder frames, the encoder has {positions} "
            f"positions: set max_frames to {positions} or less"
        )


def _window_frames(feature_extractor: Any) -> int:
    return int(feature_extractor.n_samples) // feature_extractor.hop_length


def window_of(feature_extractor: Any, max_frames: MaxFrames) -> int:
    """Mel frames (10 ms each) that a clip may have at most.

    Raises:
        UserError: ``max_frames`` is none of "fidelity", "longest" and an integer from 1 to the window's
            encoder frames.
    """
    window = _window_frames(feature_extractor)
    if max_frames in ("fidelity", "longest"):
        return window
    integer = isinstance(max_frames, int) and not isinstance(max_frames, bool)
    if not integer or not 1 <= max_frames <= window // 2:
        raise UserError(
            f'max_frames must be "fidelity", "longest" or an integer from 1 to {window // 2} (encoder frames '
            f"of 20 ms), got {max_frames!r}"
        )
    return 2 * max_frames


def log_mel(wave: np.ndarray, feature_extractor: Any, full_window: bool = False) -> np.ndarray:
    """Whisper's log-mel of one clip.

    The clip is followed by silence, as it is in a padded window, so the frames of a trimmed clip are those of
    the padded one. Only the frames that hold sound are computed: what follows them is one constant.

    Args:
        wave: float32 ``(samples,)`` at the extractor's rate, not longer than its window.
        full_window: all frames of the window instead of the ``ceil(samples / hop_length)`` of the clip.

    Returns:
        float32 ``(mel bins, frames)``.
    """
    hop = feature_extractor.hop_length
    frames, window = math.ceil(len(wave) / hop), _window_frames(feature_extractor)
    # Enough silence behind the clip that the last frame computed sees nothing else, also not by reflection.
    padded = (frames + math.ceil(feature_extractor.n_fft / hop)) * hop
    short = not getattr(feature_extractor, "dither", 0.0)  # dithered silence is no constant
    if short:
        wave = np.pad(wave, (0, padded - len(wave)))
    mel = feature_extractor(
        wave,
        sampling_rate=feature_extractor.sampling_rate,
        padding="longest" if short else "max_length",
        return_tensors="np",
    )["input_features"][0]
    if full_window:
        return np.pad(mel, ((0, 0), (0, window - mel.shape[1])), mode="edge")
    return mel[:, :frames]


def true_frames(features: np.ndarray) -> int:
    """Frames of ``(mel bins, frames)`` log-mel before its padding, at least 1.

    Padded silence is one constant over all bins and frames. Silence recorded at the end of a clip can look
    the same and is then taken for padding; the last window's overlap makes the result up to 2 frames long.
    """
    constant = (features == features[:1, -1:]).all(axis=0)  # [frames]
    sound = np.flatnonzero(~constant)
    return int(sound[-1]) + 1 if len(sound) else 1


def _finite_features(example: Example) -> np.ndarray:
    """Precomputed log-mel of an example, float32 ``(mel bins, frames)``."""
    try:
        features = np.asarray(example.value(), dtype=np.float32)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{example.name}: input_features is not an array of numbers: {error}") from error
    if features.ndim != 2 or not features.size:
        raise UserError(
            f"{example.name}: input_features must be (mel bins, frames), got shape {features.shape}"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{example.name}: input_features holds values that are not finite (NaN or infinite)")
    return features


class SpeechDataset(torch.utils.data.Dataset):
    """Examples as model inputs.

    Args:
        examples: labelled, unless ``label2id`` is ``None``.
        feature_extractor: a ``WhisperFeatureExtractor``.
        label2id: class ids by name; ``None`` gives items without ``labels``.
        max_frames: "fidelity" gives every item the full window, padded as Whisper does; "longest" the frames
            of the clip; an integer the same, of at most that many encoder frames (20 ms each). Longer clips
            are cut to the window, and a warning says so once.

    Items are dicts of ``input_features`` (float32 ``(mel bins, frames)``), ``attention_mask`` (int64
    ``(frames,)``, 1 where a frame holds sound), ``labels`` (int) and ``length`` (int, encoder frames that
    hold sound: half the mask's sum, rounded up).

    Raises:
        UserError: no examples, unknown or missing labels, ``max_frames`` out of range; on reading an item:
            naming it, when its audio cannot be read or its features have other mel bins.
    """

    def __init__(
        self,
        examples: ExampleSet,
        feature_extractor: Any,
        label2id: dict[str, int] | None = None,
        max_frames: MaxFrames = "fidelity",
    ):
        if label2id is not None:
            check_known_labels(examples, list(label2id))
        elif not len(examples):
            raise UserError(f"{examples.description} holds no examples")
        self.examples = examples
        self.feature_extractor = feature_extractor
        self.label2id = label2id
        self.max_frames = max_frames
        self._window = window_of(feature_extractor, max_frames)
        self._seconds = self._window * feature_extractor.hop_length / feature_extractor.sampling_rate
        known = [example.seconds for example in examples if example.seconds is not None]
        long = sum(seconds > self._seconds for seconds in known)
        self._warned = len(known) == len(examples)
        if long:
            logger.warning(
                "%d of %d clips of %s are longer than %.1f s; only their first %.1f s are used",
                long,
                len(examples),
                examples.description,
                self._seconds,
                self._seconds,
            )
            self._warned = True

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> list[int] | None:
        """Encoder frames of every item, for batching by length; ``None`` unless all are known."""
        if any(example.seconds is None for example in self.examples):
            return None
        return [max(1, math.ceil(min(e.seconds, self._seconds) * 50 - 1e-6)) for e in self.examples]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        features, frames = self._features(example) if example.has_features else self._log_mel(example)
        item = {
            "input_features": torch.from_numpy(np.ascontiguousarray(features)),
            "attention_mask": (torch.arange(features.shape[1]) < frames).long(),
            "length": (frames + 1) // 2,
        }
        if self.label2id is not None:
            item["labels"] = self.label2id[example.label]
        return item

    def _log_mel(self, example: Example) -> tuple[np.ndarray, int]:
        extractor = self.feature_extractor
        # A little more than the window: enough to see that a clip is longer, and for resampling its edge.
        wave, rate = example.decode(longest=self._seconds + 0.1)
        wave = resample(wave, rate, extractor.sampling_rate, example.name)
        window = self._window * extractor.hop_length
        if len(wave) > window:
            self._say_cut(example)
            wave = wave[:window]
        mel = log_mel(wave, extractor, full_window=self.max_frames == "fidelity")
        return mel, math.ceil(len(wave) / extractor.hop_length)

    def _features(self, example: Example) -> tuple[np.ndarray, int]:
        features = _finite_features(example)
        bins = self.feature_extractor.feature_size
        if len(features) != bins:
            raise UserError(
                f"{example.name}: input_features has shape {features.shape}, {bins} mel bins are expected"
            )
        frames = true_frames(features)
        if frames > self._window:
            self._say_cut(example)
            frames = self._window
        if self.max_frames != "fidelity":
            return features[:, :frames], frames
        features = features[:, : self._window]
        # Whisper's padding: log10 of its floor 1e-10, or 8 decades under the loudest bin, then (x + 4) / 4.
        silence = max(-1.5, float(features.max()) - 2.0)
        missing = self._window - features.shape[1]
        return np.pad(features, ((0, 0), (0, missing)), constant_values=silence), frames

    def _say_cut(self, example: Example) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s is longer than %.1f s; of it and other such clips only the first %.1f s are used",
                example.name,
                self._seconds,
                self._seconds,
            )


@dataclass
class Collator:
    """Stacks items of :class:`SpeechDataset`; picklable.

    With "longest" and with an integer a batch is as long as its longest clip, rounded up to whole encoder
    frames. Features are padded with 0 and the mask with 0.

    Returns a dict of ``input_features`` (float32 ``(batch, mel bins, frames)``), ``attention_mask`` (int64
    ``(batch, frames)``) and, where the items have them, ``labels`` (int64 ``(batch,)``).
    """

    feature_extractor: Any
    max_frames: MaxFrames = "fidelity"

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
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([int(item["labels"]) for item in items])
        return batch
