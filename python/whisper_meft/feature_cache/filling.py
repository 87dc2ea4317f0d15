"""Filling a feature cache: the backbone run once over the clips that it lacks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from meft_kernels import HiddenState

from ..data.dataset import Collator, SpeechDataset
from ..data.examples import ExampleSet
from ..data.features import window_of
from ..encoder.chunked import automatic_chunk
from ..errors import UserError
from ..model.module import MeftModel
from .store import (
    SHARD_BYTES,
    FeatureCache,
    cache_key,
    check_disk,
    clip_bytes,
    clip_fingerprint,
    pack,
    shuffled_parts,
)

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
