"""Filling a feature cache, and batches from it in the place of audio."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from meft_kernels import HiddenState

from .cache import (
    SHARD_BYTES,
    FeatureCache,
    cache_key,
    check_disk,
    clip_bytes,
    clip_fingerprint,
    pack,
    shuffled_parts,
)
from .chunked import automatic_chunk
from .data import Collator, SpeechDataset, window_of
from .errors import UserError
from .examples import ExampleSet, check_known_labels
from .modeling import MeftModel

_BATCH = 8  # clips that are read at a time; the backbone takes as many of them as suit the device


def _nothing(*_: Any) -> None:
    pass


def prepare_cache(
    folder: str,
    model: MeftModel,
    feature_extractor: Any,
    sets: Sequence[ExampleSet],
    storage: str | None = None,
    autocast: str | None = None,
    num_workers: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = _nothing,
    wait_for_everyone: Callable[[], None] = _nothing,
) -> FeatureCache:
    """A cache with the states that ``model`` reads of all clips of ``sets``: what is missing is computed.

    Args:
        folder: of the cache. model: on the device that the backbone is to run on.
        feature_extractor: of the backbone. storage: see :meth:`FeatureCache.create`.
        autocast: "bfloat16" or "float16" where float32 weights are run in that, as training will.
        num_workers: processes that read audio. progress: show a bar. say: takes sentences about what is done.
        wait_for_everyone: called when this process has nothing left to fill.

    Raises:
        UserError: the method trains inside the encoder; the cache is stale; the disk is too small; a clip
            cannot be read.
    """
    layers = model.states_read
    key = cache_key(model.encoder, feature_extractor, model.meft_config.max_frames, autocast)
    cache = FeatureCache.create(folder, key, layers, model.encoder.hidden_size, storage)
    if bad := cache.damaged():
        say(f"{len(bad)} damaged shards of the feature cache are computed again: {', '.join(bad)}")
        cache.remove(bad)
    cache.remove_orphans()
    filler = _Filler(cache, model, feature_extractor, autocast, num_workers, progress)
    for examples in sets:
        filler.fill(examples, say)
    wait_for_everyone()
    cache.scan()
    return cache


class _Filler:
    """Runs the backbone over clips that a cache lacks; arguments as of :func:`prepare_cache`."""

    def __init__(
        self,
        cache: FeatureCache,
        model: MeftModel,
        feature_extractor: Any,
        autocast: str | None,
        num_workers: int,
        progress: bool,
    ):
        self.cache, self.encoder, self.extractor = cache, model.encoder, feature_extractor
        self.max_frames = model.meft_config.max_frames
        self.autocast, self.num_workers, self.progress = autocast, num_workers, progress

    def fill(self, examples: ExampleSet, say: Callable[[str], None]) -> None:
        dataset = SpeechDataset(examples, self.extractor, None, self.max_frames)
        prints = [clip_fingerprint(example) for example in examples]
        missing = {
            (example.name, fingerprint): i
            for i, (example, fingerprint) in enumerate(zip(examples, prints))
            if self.cache.find(example, fingerprint) is None
        }
        if not missing:
            say(f"feature cache {self.cache.folder}: all {len(examples)} clips are there")
            return
        window = window_of(self.extractor, self.max_frames) // 2
        known = None if self.max_frames == "fidelity" else dataset.lengths
        frames = [window] * len(examples) if known is None else known
        todo = sorted(missing.values(), key=lambda i: frames[i])
        about = (len(self.cache.layers), self.encoder.hidden_size, self.cache.storage, self.encoder.dtype)
        sizes = [clip_bytes(frames[i], *about) for i in todo]
        room = check_disk(self.cache.folder, sum(sizes))
        say(
            f"feature cache {self.cache.folder}: {len(todo)} of {len(examples)} clips are missing, as "
            f"{self.cache.storage} they take {room}"
        )
        with tqdm(total=len(todo), desc="caching", unit="clip", disable=not self.progress) as bar:
            for part in shuffled_parts(sizes, SHARD_BYTES):
                self.cache.scan()  # another process may have been here
                chosen = [todo[p] for p in part]
                chosen = [i for i in chosen if self.cache.find(examples[i], prints[i]) is None]
                packed = []
                for i, parts in zip(chosen, self._compute(dataset, chosen)):
                    packed.append((examples[i], prints[i], parts))
                    bar.update()
                bar.update(len(part) - len(chosen))
                if packed:
                    self.cache.write(packed)

    def _compute(self, dataset: SpeechDataset, chosen: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """What is stored of each clip, in this order."""
        whole = self.max_frames == "fidelity"
        collator = Collator(self.extractor, "fidelity" if whole else "longest")
        loader = DataLoader(
            Subset(dataset, chosen), _BATCH, collate_fn=collator, num_workers=self.num_workers
        )
        device = self.encoder.conv1.weight.device
        names = iter([dataset.examples[i].name for i in chosen])
        for batch in loader:
            features = batch["input_features"].to(device)
            mask = batch["attention_mask"].to(device)
            frames = (features.shape[-1] + 1) // 2
            lengths = None if whole else ((mask.sum(-1) + 1) // 2).clamp(1, frames)
            size = automatic_chunk(self.encoder, frames, device)
            for start in range(0, len(features), size):
                part = slice(start, start + size)
                states = self._states(features[part], None if lengths is None else lengths[part])
                for b in range(len(features[part])):
                    length = frames if lengths is None else int(lengths[start + b])
                    name = next(names)
                    try:
                        yield pack([_row(state, b) for state in states], length, self.cache.storage)
                    except UserError as error:
                        raise UserError(f"{name}: {error}") from error

    def _states(self, features: Tensor, lengths: Tensor | None) -> list[Tensor | HiddenState]:
        device, last = features.device.type, self.cache.layers[-1]
        dtype = None if self.autocast is None else getattr(torch, self.autocast)
        found = []
        with nullcontext() if dtype is None else torch.autocast(device, dtype):
            for layer, state in enumerate(self.encoder.stream(features, lengths, statistics=True)):
                if layer in self.cache.layers:
                    found.append(state)
                if layer == last:
                    return found
        return found


def _row(state: Tensor | HiddenState, b: int) -> Tensor | HiddenState:
    return HiddenState(*(part[b] for part in state)) if isinstance(state, HiddenState) else state[b]


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
