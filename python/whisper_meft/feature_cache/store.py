"""Hidden states of the frozen backbone on disk, computed once and read in every epoch.

A cache is a folder. ``cache.json`` says what its states are of: the backbone's weights, the feature
extractor and so on; states of anything else are refused. ``shard-*.safetensors`` hold the clips, and beside
each lies its index ``shard-*.json``: the clips in it, their sources' fingerprints and the file's checksum.
Every file is written beside its place and renamed, shards have names of their own and an index comes after
its shard: so several processes may fill one cache, and an interrupted one is gone on with.
"""

import hashlib
import json
import os
import random
import shutil
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meft_kernels import HiddenState
from meft_kernels.reference.common import row_statistics
from meft_kernels.reference.eight_bit import encode

from ..audio import VERSION as READING
from ..data.examples import Example
from ..encoder.frozen import FrozenEncoder
from ..encoder.quantization import weights_digest
from ..errors import UserError
from ..files import read_json, replacing, write_json

FORMAT = 1

STORAGES = ("exact", "bfloat16", "fp8")

# A shard is held in memory while it is filled, and is what an interrupted run loses.
SHARD_BYTES = 128 * 2**20

_ORPHAN_SECONDS = 3600

_MARGIN_BYTES = 64 * 2**20  # to be left free on the disk

_KEY_NAMES = {
    "format": "the format of the cache",
    "reading": "the version of how audio is read",
    "backbone": "the backbone's weights",
    "backbone_dtype": "backbone_dtype",
    "backbone_quantization": "backbone_quantization",
    "autocast": "autocast (bf16, fp16)",
    "feature_extractor": "the feature extractor",
    "max_frames": "max_frames",
}


def cache_key(
    encoder: FrozenEncoder, feature_extractor: Any, max_frames: int | str, autocast: str | None = None
) -> dict[str, Any]:
    """What the states of a clip depend on beside the clip itself; plain JSON values.

    Args:
        encoder: the frozen backbone; all its weights are hashed, as they were before
            quantisation. feature_extractor: a
            ``WhisperFeatureExtractor``. max_frames: as in :class:`whisper_meft.MeftConfig`.
        autocast: number format that float32 weights are run in, or None.

    Raises:
        UserError: features that are different each time.
    """
    if getattr(feature_extractor, "dither", 0.0):
        raise UserError(
            f"features cannot be cached with dither={feature_extractor.dither} in the feature extractor: it "
            "makes them different in every epoch; set dither to 0"
        )
    ignored = ("feature_extractor_type", "processor_class", "return_attention_mask", "padding_side")
    options = {k: v for k, v in feature_extractor.to_dict().items() if k not in ignored}
    return {
        "format": FORMAT,
        "reading": READING,
        "backbone": encoder.original.digest if encoder.original else weights_digest(encoder.backbone_state()),
        "backbone_dtype": str(encoder.dtype).removeprefix("torch."),
        "backbone_quantization": encoder.quantization,
        "autocast": autocast if encoder.dtype == torch.float32 and not encoder.quantization else None,
        "feature_extractor": json.loads(json.dumps(options, sort_keys=True, default=str)),
        "max_frames": max_frames,
    }


def clip_fingerprint(example: Example) -> str:
    """What tells a clip's source from another of the same name: size and time of change of its file, or a
    hash of its content where it comes from elsewhere; and the segment of it.

    Raises:
        UserError: the source cannot be read.
    """
    source = example.value()
    if isinstance(source, dict):
        source = next((source[k] for k in ("bytes", "array", "raw", "path") if source.get(k) is not None), "")
    segment = f"{example.start} {example.stop} {example.unit}"
    if example.channel is not None:
        segment += f" channel {example.channel}"
    if isinstance(source, str | os.PathLike):
        try:
            about = os.stat(source)
        except OSError as error:
            raise UserError(f"{example.name}: cannot read the file: {error.strerror}") from error
        return f"{about.st_size} bytes of {about.st_mtime_ns}, {segment}"
    content = source if isinstance(source, bytes) else np.ascontiguousarray(source).tobytes()
    return f"{hashlib.sha256(content).hexdigest()}, {segment}"


@dataclass(frozen=True, slots=True)
class Clip:
    """Where a clip's states are: the ``number``-th of a shard's; ``frames`` of them per layer. ``seconds``:
    the length of its audio, None where that was not known."""

    shard: str
    number: int
    frames: int
    fingerprint: str
    seconds: float | None


@dataclass
class CachedClip:
    """A clip's hidden states, as they are stored.

    Attributes:
        states: (S, T, D), floating point or 8-bit codes. statistics: (S, T, 2) mean and rstd of their rows.
        scales: (S, 2, D) scale and shift of 8-bit codes (:func:`whisper_meft.encoder.cached.decoded`), or
            None.
    """

    states: Tensor
    statistics: Tensor
    scales: Tensor | None


class FeatureCache:
    """A folder with the hidden states of clips, see the module.

    Args:
        folder: made by :meth:`create`.

    Raises:
        UserError: there is no cache in ``folder``, or its description cannot be used.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        about = read_json(self.folder / "cache.json") if (self.folder / "cache.json").is_file() else None
        if about is None:
            raise UserError(
                f"{self.folder} holds no feature cache (cache.json); whisper-meft cache makes one"
            )
        if not isinstance(about, dict) or not {"key", "layers", "storage", "hidden_size"} <= set(about):
            raise UserError(f"{self.folder / 'cache.json'} does not describe a feature cache")
        self.key, self.layers, self.storage = about["key"], tuple(about["layers"]), about["storage"]
        self.hidden_size = about["hidden_size"]
        self._clips: dict[str, dict[str, Clip]] = {}
        self._seen: set[str] = set()
        self._open: dict[tuple[int, str], Any] = {}
        self.scan()

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        key: dict[str, Any],
        layers: Sequence[int],
        hidden_size: int,
        storage: str | None = None,
    ) -> "FeatureCache":
        """The cache in ``folder`` for the states that ``key`` describes, made if there is none.

        Args:
            key: from :func:`cache_key`. layers: indices of the hidden states that are needed.
            hidden_size: their width. storage: "exact" keeps the states' dtype, "bfloat16" rounds to it, "fp8"
                keeps 8 bits (``meft_kernels.reference.eight_bit``); None takes what is there, or for a new
                cache 16 bits.

        Raises:
            UserError: the folder holds something else, or a cache of something else, which is named.
        """
        if storage not in (None, *STORAGES):
            raise UserError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        path = Path(folder) / "cache.json"
        if not path.is_file():
            others = Path(folder).is_dir() and any(each.name[0] != "." for each in Path(folder).iterdir())
            if others and not path.is_file():  # another process may just have made it
                raise UserError(f"{folder} is not empty and holds no feature cache: name another folder")
            half = key["backbone_dtype"] in ("bfloat16", "float16")
            chosen = storage or ("exact" if half else "bfloat16")
            about = {"key": key, "layers": list(layers), "hidden_size": hidden_size, "storage": chosen}
            _write_new(path, about)
        cache = cls(folder)
        cache.check(key, layers)
        if storage not in (None, cache.storage):
            raise UserError(
                f"the cache in {folder} is stale: storage was {cache.storage}, now it is {storage}"
            )
        return cache

    def check(self, key: dict[str, Any], layers: Sequence[int]) -> None:
        """Raises UserError, naming what differs, unless the cache is of these states."""
        different = []
        for name, meaning in _KEY_NAMES.items():
            before, now = self.key.get(name), key.get(name)
            if before == now:
                continue
            if name == "backbone":
                different.append(f"{meaning} are others")
            elif isinstance(before, dict):
                for each in sorted(before.keys() | now.keys()):
                    if before.get(each) != now.get(each):
                        change = f"was {before.get(each)}, now it is {now.get(each)}"
                        different.append(f"{meaning}'s {each} {change}")
            else:
                different.append(f"{meaning} was {before}, now it is {now}")
        if missing := sorted(set(layers) - set(self.layers)):
            different.append(f"it lacks layers {', '.join(map(str, missing))} of the hidden states")
        if different:
            raise UserError(
                f"the cache in {self.folder} is stale: {'; '.join(different)}; name another folder or remove "
                "it"
            )

    def scan(self) -> None:
        """Reads the indices of shards that were written since the last look."""
        for path in sorted(self.folder.glob("shard-*.json")):
            if path.stem in self._seen:
                continue
            try:
                clips = _clips_of(read_json(path), path.stem)
            except (UserError, TypeError, ValueError, KeyError):
                continue  # `damaged` names it
            self._seen.add(path.stem)
            for name, clip in clips:
                self._clips.setdefault(name, {}).setdefault(clip.fingerprint, clip)

    def __len__(self) -> int:
        return sum(len(versions) for versions in self._clips.values())

    @property
    def bytes_on_disk(self) -> int:
        """Size of all shards."""
        return sum(path.stat().st_size for path in self.folder.glob("shard-*.safetensors"))

    def find(self, example: Example, fingerprint: str | None = None) -> Clip | None:
        """Where the clip's states are, or None.

        Args:
            example: the clip. fingerprint: what :func:`clip_fingerprint` gives, if it is known.

        Raises:
            UserError: there are only those that its file had before it was changed.
        """
        versions = self._clips.get(example.name, {})
        fingerprint = fingerprint or clip_fingerprint(example)
        if versions and fingerprint not in versions and isinstance(example.audio, str | os.PathLike):
            raise UserError(
                f"the cache in {self.folder} is stale: {example.name} has another size, date or segment than "
                "when its states were computed; name another folder or remove it"
            )
        return versions.get(fingerprint)

    def checked(self, example: Example) -> Example | None:
        """The example with its length in ``seconds``, if its states are here: its audio was decoded when
        they were made, and has not changed since."""
        versions = self._clips.get(example.name)
        try:
            clip = versions.get(clip_fingerprint(example)) if versions else None
        except UserError:  # whoever checks the audio says it better
            return None
        if clip is None or (clip.seconds is None and not example.has_features):
            return None
        return replace(example, seconds=clip.seconds)

    def damaged(self) -> list[str]:
        """Names of the shards whose file or index is missing, cut off or altered. Reads every byte."""
        bad = []
        for path in sorted(self.folder.glob("shard-*.json")):
            try:
                index = read_json(path)
                _clips_of(index, path.stem)
                fine = _checksum(path.with_suffix(".safetensors")) == (index["bytes"], index["crc32"])
            except (UserError, OSError, TypeError, ValueError, KeyError):
                fine = False
            if not fine:
                bad.append(path.stem)
        return bad

    def remove(self, shards: Iterable[str]) -> None:
        """Deletes shards; their clips are then missing."""
        for shard in shards:
            (self.folder / f"{shard}.json").unlink(missing_ok=True)  # first: no index without its shard
            (self.folder / f"{shard}.safetensors").unlink(missing_ok=True)
            self._seen.discard(shard)
            self._open.pop((os.getpid(), shard), None)
        gone = set(shards)
        for name, versions in list(self._clips.items()):
            self._clips[name] = {f: c for f, c in versions.items() if c.shard not in gone}
        self._seen.clear()  # a clip may be in another shard too
        self.scan()

    def remove_orphans(self) -> None:
        """Deletes what processes that were killed left behind, once it is so old that nobody writes it."""
        for path in [*self.folder.glob(".shard-*"), *self.folder.glob("shard-*.safetensors")]:
            try:
                alone = path.name.startswith(".") or not path.with_suffix(".json").exists()
                if alone and time.time() - path.stat().st_mtime > _ORPHAN_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                pass

    def write(self, clips: Sequence[tuple[Example, str, dict[str, Tensor]]]) -> None:
        """Adds a shard.

        Args:
            clips: the example, its fingerprint and what :func:`pack` gave, of each clip.

        Raises:
            UserError: it cannot be written.
        """
        shard = f"shard-{uuid.uuid4().hex[:16]}"
        tensors = {f"{part}.{i}": t for i, (*_, parts) in enumerate(clips) for part, t in parts.items()}
        path = self.folder / f"{shard}.safetensors"
        with replacing(path) as temporary:
            save_file(tensors, temporary)
            size, crc = _checksum(temporary)
        rows = [[e.name, found, parts["states"].shape[1], e.seconds] for e, found, parts in clips]
        write_json(self.folder / f"{shard}.json", {"bytes": size, "crc32": crc, "clips": rows})
        self.scan()

    def read(self, clip: Clip, layers: Sequence[int]) -> CachedClip:
        """A clip's states of some layers, memory-mapped: pages are only read when the values are used.

        Args:
            clip: from :meth:`find`. layers: some of the cache's.

        Raises:
            UserError: the shard cannot be read.
        """
        try:
            file = self._shard(clip.shard)
            parts = {name: file.get_tensor(f"{name}.{clip.number}") for name in _parts(self.storage)}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / clip.shard}.safetensors cannot be read ({error}): fill the cache again"
            ) from error
        if tuple(layers) != self.layers:
            wanted = torch.tensor([self.layers.index(layer) for layer in layers])
            parts = {name: tensor[wanted] for name, tensor in parts.items()}
        return unpack(parts)

    def _shard(self, shard: str) -> Any:
        # By process: a mapping that was opened before a fork is opened again.
        opened = self._open.get((os.getpid(), shard))
        if opened is None:
            path = self.folder / f"{shard}.safetensors"
            if hasattr(os, "posix_fadvise"):  # the whole shard will be needed: have it read ahead
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                os.close(descriptor)
            opened = self._open[os.getpid(), shard] = safe_open(path, framework="pt")
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # for workers that are not forked


def _write_new(path: Path, value: Any) -> None:
    """Writes a JSON file unless there is one, whoever else is trying to."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.json")
    write_json(temporary, value)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _clips_of(index: dict[str, Any], shard: str) -> list[tuple[str, Clip]]:
    clips = []
    for i, (name, found, frames, *more) in enumerate(index["clips"]):
        seconds = float(more[0]) if more and more[0] is not None else None
        clips.append((str(name), Clip(shard, i, int(frames), str(found), seconds)))
    return clips


def _checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _parts(storage: str) -> tuple[str, ...]:
    return ("states", "statistics", "scale", "shift") if storage == "fp8" else ("states", "statistics")


def clip_bytes(frames: int, layers: int, hidden_size: int, storage: str, dtype: torch.dtype) -> int:
    """Bytes that a clip of so many frames takes, with states that are computed in ``dtype``."""
    each = {"exact": dtype.itemsize, "bfloat16": 2, "fp8": 1}[storage]
    constants = 8 * hidden_size if storage == "fp8" else 0
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return layers * (frames * (each * hidden_size + 2 * wide) + constants) + 400  # 400: names, header, index


def pack(states: Sequence[Tensor | HiddenState], frames: int, storage: str) -> dict[str, Tensor]:
    """What is stored of a clip.

    Args:
        states: (T', D) of each layer. frames: T, those that hold sound. storage: see
            :meth:`FeatureCache.create`.

    Returns:
        ``states`` (S, T, D), ``statistics`` (S, T, 2), and for fp8 ``scale`` and ``shift`` (S, D); on the
        CPU.

    Raises:
        UserError: a state is NaN or infinite.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in _parts(storage)}
    for state in states:
        values, *known = state if isinstance(state, HiddenState) else (state, None, None)
        values = values[:frames]
        mean, rstd = row_statistics(values) if known[0] is None else (s[:frames] for s in known)
        if storage == "fp8":
            values, scale, shift = encode(values, mean, rstd)
            parts["scale"].append(scale)
            parts["shift"].append(shift)
        elif storage == "bfloat16":
            values = values.to(torch.bfloat16)
        parts["states"].append(values)
        parts["statistics"].append(torch.stack([mean, rstd], -1))
    stacked = {name: torch.stack(tensors).cpu() for name, tensors in parts.items()}
    if not torch.isfinite(stacked["statistics"]).all():
        raise UserError("the backbone's hidden states are NaN or infinite")
    return stacked


def unpack(parts: dict[str, Tensor]) -> CachedClip:
    """The states that :func:`pack` was given, but for their rounding."""
    scales = torch.stack([parts["scale"], parts["shift"]], 1) if "scale" in parts else None
    return CachedClip(parts["states"], parts["statistics"], scales)


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
            "layers (--layers) or 8 bits (fp8)"
        )
    return said


def shuffled_parts(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Positions cut into runs of about ``limit`` bytes, in an order of this process's own: processes that
    fill the same cache then meet rarely."""
    parts, room = [], 0
    for position, size in enumerate(sizes):
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(position)
        room -= size
    random.Random(uuid.uuid4().int).shuffle(parts)
    return parts
