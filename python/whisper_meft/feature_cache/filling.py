"""Filling a feature cache: the backbone run once over the clips that it lacks."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from meft_kernels import HiddenState

from ..data.augmenter import Augmenter
from ..data.dataset import Collator, SpeechDataset
from ..data.examples import ExampleSet
from ..data.features import window_of
from ..data.transcripts import TranscriptTokens
from ..encoder.chunked import automatic_chunk
from ..errors import UserError
from ..model.base import MeftBase
from .claims import Claims
from .key import copy_fingerprints, key_of, token_fingerprint
from .shards import clip_bytes, pack
from .store import FeatureCache

# A shard is held in memory while it is filled, and is what an interrupted run loses.
SHARD_BYTES = 128 * 2**20

_BATCH = 8  # clips that are read at a time; the backbone takes as many of them as suit the device

_MARGIN_BYTES = 64 * 2**20  # to be left free on the disk

_WAIT_SECONDS = 0.5


def _nothing(*_: Any) -> None:
    pass


def prepare_cache(
    folder: str,
    model: MeftBase,
    feature_extractor: Any,
    sets: Sequence[ExampleSet],
    storage: str | None = None,
    autocast: str | None = None,
    num_workers: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = _nothing,
    wait_for_everyone: Callable[[], None] = _nothing,
    tokens: TranscriptTokens | None = None,
    augment: Augmenter | None = None,
    copies: int = 1,
) -> FeatureCache:
    """A cache with the states that ``model`` reads of all clips of ``sets``: what is missing is computed.

    Args:
        folder: of the cache. model: on the device that the backbone is to run on.
        feature_extractor: of the backbone. storage: see :meth:`FeatureCache.create`.
        autocast: "bfloat16" or "float16" where float32 weights are run in that, as training will.
        num_workers: processes that read audio. progress: show a bar. say: takes sentences about what is done.
        wait_for_everyone: called when this process has nothing left to fill.
        tokens: of the transcripts, of which a recogniser with ``placement="decoder"`` reads states.
        augment: changes the clips of the first of ``sets``, the training clips. copies: versions of each of
            them, those of the first epochs of a run that augments without a cache.

    Raises:
        UserError: the method trains inside the encoder; the cache is stale; the disk is too small; a clip
            cannot be read, or its transcript cannot be used.
    """
    layers = model.states_read
    key = key_of(model, feature_extractor, autocast, tokens)
    cache = FeatureCache.create(folder, key, layers, model.encoder.hidden_size, storage)
    if bad := cache.damaged():
        say(f"{len(bad)} damaged shards of the feature cache are computed again: {', '.join(bad)}")
        cache.remove(bad)
    with Claims(folder) as claims:
        with suppress(OSError), claims.locked():
            cache.remove_leftovers(alone=not claims.of_others())
        given = (model, feature_extractor, autocast, num_workers, progress, tokens)
        filler = _Filler(cache, claims, *given)
        for number, examples in enumerate(sets):
            filler.fill(examples, say, *((augment, copies) if number == 0 else ()))
    wait_for_everyone()
    cache.scan()
    return cache


class _Copies(Dataset):
    """Augmented copies of a dataset's items: all of the first, then all of the next."""

    def __init__(self, dataset: SpeechDataset, copies: int):
        self.dataset, self.copies = dataset, copies
        self.examples = ExampleSet(dataset.examples.examples * copies, dataset.examples.description)

    @property
    def lengths(self) -> list[int] | None:
        known = self.dataset.lengths
        return None if known is None else known * self.copies

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        copy, index = divmod(number, len(self.dataset))
        return self.dataset.item(index, str(copy))


class _Filler:
    """Runs the backbone over clips that a cache lacks; arguments as of :func:`prepare_cache`."""

    def __init__(
        self,
        cache: FeatureCache,
        claims: Claims,
        model: MeftBase,
        feature_extractor: Any,
        autocast: str | None,
        num_workers: int,
        progress: bool,
        tokens: TranscriptTokens | None,
    ):
        self.cache, self.claims, self.model, self.extractor = cache, claims, model, feature_extractor
        self.encoder = model.encoder
        self.transcribes = model.task == "transcription"
        # A recogniser hears padding, and cuts the window itself.
        self.max_frames = "fidelity" if self.transcribes else model.meft_config.max_frames
        self.transcripts = tokens if self.transcribes else None
        self.tokens = tokens if model.states_of == "decoder" else None
        self.autocast, self.num_workers, self.progress = autocast, num_workers, progress

    def fill(
        self,
        examples: ExampleSet,
        say: Callable[[str], None],
        augment: Augmenter | None = None,
        copies: int = 1,
    ) -> None:
        prints = copy_fingerprints(examples, augment, copies)
        dataset = SpeechDataset(examples, self.extractor, None, self.max_frames, self.transcripts, augment)
        if augment is not None:
            dataset = _Copies(dataset, copies)
            examples = dataset.examples
        if self.tokens is not None:
            said = [self.tokens(example)["decoder_input_ids"] for example in examples]
            prints = [token_fingerprint(*both) for both in zip(prints, said)]
        missing = {
            (example.name, fingerprint): i
            for i, (example, fingerprint) in enumerate(zip(examples, prints))
            if self.cache.find(example, fingerprint) is None
        }
        if not missing:
            say(f"feature cache {self.cache.folder}: all {len(examples)} clips are there")
            return
        if self.tokens is not None:
            frames = [len(ids) for ids in said]
        else:
            window = window_of(self.extractor, self.model.meft_config.max_frames) // 2
            known = None if self.max_frames == "fidelity" else dataset.lengths
            frames = [window] * len(examples) if known is None else known
        about = (len(self.cache.layers), self.encoder.hidden_size, self.cache.storage, self.encoder.dtype)
        todo = {i: clip_bytes(frames[i], *about) for i in sorted(missing.values(), key=lambda i: frames[i])}
        room = check_disk(self.cache.folder, sum(todo.values()))
        say(
            f"feature cache {self.cache.folder}: {len(todo)} of {len(examples)} clips are missing, as "
            f"{self.cache.storage} they take {room}"
        )
        names = {i: hashlib.sha256(f"{examples[i].name} {prints[i]}".encode()).hexdigest() for i in todo}
        with tqdm(total=len(todo), desc="caching", unit="clip", disable=not self.progress) as bar:
            while todo:
                chosen = self._next(examples, prints, todo, names)
                bar.update(bar.total - len(todo) - bar.n)
                if chosen:
                    packed = []
                    for i, parts in zip(chosen, self._compute(dataset, chosen, frames)):
                        packed.append((examples[i], prints[i], parts))
                        self.claims.touch()
                        bar.update()
                    self.cache.write(packed)
                elif todo:  # others compute the rest
                    time.sleep(_WAIT_SECONDS)

    def _next(
        self, examples: ExampleSet, prints: Sequence[str], todo: dict[int, int], names: dict[int, str]
    ) -> list[int]:
        """Claims the clips of the next shard, and takes out of ``todo`` (bytes by number) what is there.
        ``names``: of the clips in claims."""
        try:
            with self.claims.locked():
                taken = set().union(*self.claims.of_others())
                self.cache.scan()
                for i in [i for i in todo if self.cache.find(examples[i], prints[i]) is not None]:
                    del todo[i]
                free = [i for i in todo if names[i] not in taken]
                chosen = first_part(free, [todo[i] for i in free], SHARD_BYTES)
                self.claims.claim(names[i] for i in chosen)
        except OSError as error:
            raise UserError(f"cannot write in {self.cache.folder}: {error.strerror}") from error
        return chosen

    def _compute(
        self, dataset: "SpeechDataset | _Copies", chosen: Sequence[int], expected: Sequence[int]
    ) -> Iterator[dict[str, Tensor]]:
        """What is stored of each of the ``chosen`` clips, in this order; ``expected``: frames or tokens of
        every clip."""
        whole = self.max_frames == "fidelity"
        collator = Collator(self.extractor, "fidelity" if whole else "longest")
        if self.transcripts is not None:
            collator.pad_token_id = self.transcripts.end
        loader = DataLoader(
            Subset(dataset, chosen), _BATCH, collate_fn=collator, num_workers=self.num_workers
        )
        device = self.encoder.conv1.weight.device
        numbers = iter(chosen)
        for batch in loader:
            clips = [next(numbers) for _ in batch["input_features"]]
            names = [dataset.examples[i].name for i in clips]
            batch = {name: each.to(device) for name, each in batch.items()}
            features, lengths = self._window(batch, whole, names)
            frames = (features.shape[-1] + 1) // 2
            kept = [frames] * len(clips) if lengths is None else lengths.tolist()
            if self.tokens is not None:
                kept = [expected[i] for i in clips]
            size = automatic_chunk(self.encoder, frames, device)
            for start in range(0, len(features), size):
                part = slice(start, start + size)
                given = [None if each is None else each[part] for each in (features, lengths)]
                states = self._states(*given, batch["decoder_input_ids"][part] if self.tokens else None)
                for b, (name, length) in enumerate(zip(names[part], kept[part])):
                    try:
                        yield pack([_row(state, b) for state in states], length, self.cache.storage)
                    except UserError as error:
                        raise UserError(f"{name}: {error}") from error

    def _window(
        self, batch: dict[str, Tensor], whole: bool, names: Sequence[str]
    ) -> tuple[Tensor, Tensor | None]:
        """The features that are computed of a batch of clips, and the clips' lengths, or None."""
        features = batch["input_features"]
        if not self.transcribes:
            frames = (features.shape[-1] + 1) // 2
            return features, None if whole else ((batch["attention_mask"].sum(-1) + 1) // 2).clamp(1, frames)
        for name, clip in zip(names, features.split(1)):
            try:
                self.model.window(clip)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        return self.model.window(features)

    def _states(
        self, features: Tensor, lengths: Tensor | None, input_ids: Tensor | None
    ) -> list[Tensor | HiddenState]:
        """The cache's layers of some clips, or of their tokens ``input_ids``."""
        device, last = features.device.type, self.cache.layers[-1]
        dtype = None if self.autocast is None else getattr(torch, self.autocast)
        found = []
        with nullcontext() if dtype is None else torch.autocast(device, dtype):
            if input_ids is not None:
                states = self.model.token_states(features, lengths, input_ids)
                return [states[layer] for layer in self.cache.layers]
            for layer, state in enumerate(self.encoder.stream(features, lengths, statistics=True)):
                if layer in self.cache.layers:
                    found.append(state)
                if layer == last:
                    return found
        return found


def _row(state: Tensor | HiddenState, b: int) -> Tensor | HiddenState:
    if not isinstance(state, HiddenState):
        return state[b]
    return HiddenState(state.values[b], *(each[b] for each in state.statistics or ()))


def check_disk(folder: str | os.PathLike, needed: int) -> str:
    """Says how much ``needed`` bytes and the free disk are.

    Raises:
        UserError: there is not enough room.
    """
    place = Path(folder)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    said = f"{needed / 2**30:.3g} GiB; {free / 2**30:.3g} GiB are free"
    if needed + _MARGIN_BYTES > free:
        raise UserError(
            f"the feature cache in {folder} needs {said}: name a folder on another disk, or keep fewer "
            "layers (--layers) or 8 bits (int8)"
        )
    return said


def first_part(items: Sequence[int], sizes: Sequence[int], limit: int) -> list[int]:
    """As many of the first items as are together at most ``limit``, at least one where there are any."""
    part, room = [], limit
    for item, size in zip(items, sizes):
        room -= size
        if part and room < 0:
            break
        part.append(item)
    return part
