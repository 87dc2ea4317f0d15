"""Batches from a feature cache, in the place of audio."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.examples import ExampleSet, check_known_labels
from ..errors import UserError
from ..model.module import MeftModel
from .store import FeatureCache


class CachedDataset(Dataset):
    """Examples as hidden states from a cache, in the place of :class:`whisper_meft.data.SpeechDataset`.

    Args:
        examples: labelled, unless ``label2id`` is None. cache: holds all of them.
        model: whose states they are. label2id: class ids by name.

    Items are dicts of ``hidden_states`` (S, T, D), ``hidden_state_statistics`` (S, T, 2), where those are
    8-bit codes ``hidden_state_scales`` (S, 2, D), ``length`` (int, T) and ``labels`` (int).

    Raises:
        UserError: the cache lacks a clip or has it of another file; unknown or missing labels.
    """

    def __init__(
        self,
        examples: ExampleSet,
        cache: FeatureCache,
        model: MeftModel,
        label2id: dict[str, int] | None = None,
    ):
        if label2id is not None:
            check_known_labels(examples, list(label2id))
        found = [cache.find(example) for example in examples]
        missing = [example.name for example, clip in zip(examples, found) if clip is None]
        if missing:
            raise UserError(
                f"the cache in {cache.folder} lacks {len(missing)} of {len(examples)} clips of "
                f"{examples.description}, the first is {missing[0]}: fill it with whisper-meft cache"
            )
        self.examples, self.cache, self.clips, self.label2id = examples, cache, found, label2id
        self.layers = model.states_read

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def lengths(self) -> list[int]:
        """Encoder frames of every item, for batching by length."""
        return [clip.frames for clip in self.clips]

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.cache.read(self.clips[index], self.layers)
        item = {
            "hidden_states": clip.states,
            "hidden_state_statistics": clip.statistics,
            "length": clip.states.shape[1],
        }
        if clip.scales is not None:
            item["hidden_state_scales"] = clip.scales
        if self.label2id is not None:
            item["labels"] = self.label2id[self.examples[index].label]
        return item


@dataclass
class CachedCollator:
    """Stacks items of :class:`CachedDataset`; picklable.

    Returns a dict of ``hidden_states`` (B, S, T, D), 0 past a clip's end, laid out so that one layer's are
    contiguous, ``hidden_state_statistics`` (B, S, T, 2), ``hidden_state_lengths`` (B,) int64 and, where the
    items have them, ``hidden_state_scales`` (B, S, 2, D) and ``labels`` (B,) int64.
    """

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(item["length"] for item in items)

        def stack(key: str, padding: Sequence[float]) -> Tensor:
            layers, _, width = items[0][key].shape
            out = torch.empty(layers, len(items), longest, width, dtype=items[0][key].dtype)
            for b, item in enumerate(items):
                out[:, b, : item["length"]] = item[key]
                out[:, b, item["length"] :] = torch.tensor(padding, dtype=out.dtype)
            return out.transpose(0, 1)

        batch = {
            "hidden_states": stack("hidden_states", [0.0]),
            "hidden_state_statistics": stack("hidden_state_statistics", [0.0, 1.0]),
            "hidden_state_lengths": torch.tensor([item["length"] for item in items]),
        }
        if "hidden_state_scales" in items[0]:
            batch["hidden_state_scales"] = torch.stack([item["hidden_state_scales"] for item in items])
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([int(item["labels"]) for item in items])
        return batch
