"""The windows of recordings that are longer than a model hears at once, as examples and as its input."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..audio.windows import Windows
from .dataset import Collator, SpeechDataset
from .examples import Example, ExampleSet
from .features import MaxFrames, window_of

_WINDOW_NAME = re.compile(r" \[window \S+ to \S+ s\]$")  # what a window's name has behind its recording's

_SILENCE = 1e-4  # of full scale, -80 dB: three steps of 16 bits


def cut_into_windows(examples: ExampleSet, windows: Windows) -> ExampleSet:
    """Examples in the place of those that are longer than a window, one for each window: with label, speaker
    and transcript of the whole, in order. Those of unknown length, and features computed earlier, stay as
    they are."""
    parts = (part for example in examples for part in _parts(example, windows))
    return ExampleSet(parts, examples.description)


def _parts(example: Example, windows: Windows) -> list[Example]:
    if example.has_features or not windows.needed(example.seconds):
        return [example]
    parts, before = [], 0.0 if example.window is None else example.window[0]
    for start in windows.starts(example.seconds):
        end = min(start + windows.length, example.seconds)
        name = f"{example.name} [window {start:.10g} to {end:.10g} s]"
        window = (round(before + start, 6), windows.length)
        seconds = min(windows.length, example.seconds - start)
        parts.append(replace(example, name=name, window=window, seconds=seconds))
    return parts


def recordings_of(examples: ExampleSet) -> list[list[int]]:
    """The indices of each recording's windows, as :func:`cut_into_windows` leaves them; of an example that
    was not cut its own."""
    groups: list[list[int]] = []
    before = None
    for index, each in enumerate(examples):
        of = None if each.window is None else (id(each.audio), each.start, each.stop, each.unit, each.channel)
        if of is not None and of == before and each.window[0] > examples[index - 1].window[0]:
            groups[-1].append(index)
        else:
            groups.append([index])
        before = of
    return groups


def whole_recordings(examples: ExampleSet) -> ExampleSet:
    """The examples that :func:`cut_into_windows` made these of, one for each recording; its seconds are those
    that windows hold."""
    found = []
    for group in recordings_of(examples):
        first, last = examples[group[0]], examples[group[-1]]
        name = _WINDOW_NAME.sub("", first.name)
        if first.window is not None and name != first.name:
            seconds = None
            if last.seconds is not None:
                seconds = last.window[0] - first.window[0] + last.seconds
            first = replace(first, name=name, window=None, seconds=seconds)
        found.append(first)
    return ExampleSet(found, examples.description)


def is_muted(wave: np.ndarray) -> bool:
    """Whether there is nothing to hear in a float32 wave (samples,): no sample above -80 dB of full scale."""
    return max(float(wave.max()), -float(wave.min())) < _SILENCE


def longest_window(feature_extractor: Any, max_frames: MaxFrames) -> float:
    """Seconds that a model hears at most; arguments as of :func:`whisper_meft.data.window_of`."""
    frames = window_of(feature_extractor, max_frames)
    return frames * feature_extractor.hop_length / feature_extractor.sampling_rate


class WindowStream(IterableDataset):
    """The windows of long recordings as model inputs, each recording decoded once; with several workers each
    has recordings of its own.

    Args:
        examples: of known length, not features. windows: how they are cut.
        feature_extractor, max_frames: as of :class:`whisper_meft.data.SpeechDataset`.

    Items are those of ``SpeechDataset`` with ``index``, of the example, ``number``, of its window, and
    ``muted``, whether nothing in the window is louder than -80 dB of full scale.
    """

    def __init__(self, examples: ExampleSet, windows: Windows, feature_extractor: Any, max_frames: MaxFrames):
        self.examples, self.windows = examples, windows
        parts = ExampleSet([replace(e, seconds=min(e.seconds, windows.length)) for e in examples])
        self.dataset = SpeechDataset(parts, feature_extractor, None, max_frames)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rate = self.dataset.feature_extractor.sampling_rate
        for index in range(first, len(self.examples), step):
            example = self.examples[index]
            starts = self.windows.starts(example.seconds)
            for number, wave in enumerate(example.read_windows(rate, starts, self.windows.length)):
                muted = is_muted(wave)
                place = {"index": index, "number": number, "muted": muted}
                yield self.dataset.item_of_wave(wave) | place


@dataclass
class WindowCollator:
    """Stacks items of :class:`WindowStream`: index, number and muted of each, and the model's inputs."""

    collator: Collator

    def __call__(self, items: Sequence[dict[str, Any]]) -> tuple[list[tuple], dict[str, torch.Tensor]]:
        return [(item["index"], item["number"], item["muted"]) for item in items], self.collator(items)
