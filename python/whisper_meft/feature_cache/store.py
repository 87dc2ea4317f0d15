"""Hidden states of the frozen backbone on disk, computed once and read in every epoch.

A cache is a folder. ``cache.json`` says what its states are of: the backbone's weights, the feature
extractor and so on; states of anything else are refused. ``shard-*.safetensors`` hold the clips, and beside
each lies its index ``shard-*.json``: the clips in it, their sources' fingerprints and the file's checksum.
Descriptions and indices hold a checksum of themselves, and an index that of the description it goes with.
Every file is written beside its place and renamed, shards have names of their own and an index comes after
its shard: so several processes may fill one cache, and an interrupted one is gone on with.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..data.examples import Example
from ..errors import UserError
from ..files import check_writable, read_json, replacing, write_json
from .key import FORMAT, KEY_NAMES, WEIGHTS, clip_fingerprint, source_of
from .shards import STORAGES, CachedClip, checksum, parts_of, read_header, read_rows, unpack

# What nobody who fills the cache is known to be writing, see FeatureCache.remove_leftovers.
_ABANDONED_SECONDS = 3600

_CREATING_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Clip:
    """Where a clip's states are: the ``number``-th of a shard's; ``frames`` per layer, or tokens.
    ``seconds``: the length of its audio, None where that was not known."""

    shard: str
    number: int
    frames: int
    fingerprint: str
    seconds: float | None


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
        self._check_description(about)
        self.digest = about["digest"]
        self.key, self.layers, self.storage = about["key"], tuple(about["layers"]), about["storage"]
        self.hidden_size = about["hidden_size"]
        self._clips: dict[str, dict[str, Clip]] = {}
        self._seen: set[str] = set()
        self._sizes: dict[str, int] = {}  # bytes of each shard
        self._headers: dict[str, dict[str, Any]] = {}
        self.scan()

    def _check_description(self, about: Any) -> None:
        path = self.folder / "cache.json"
        if not isinstance(about, dict) or not {"key", "layers", "storage", "hidden_size"} <= set(about):
            raise UserError(f"{path} does not describe a feature cache")
        found = about["key"].get("format") if isinstance(about["key"], dict) else None
        if found != FORMAT:
            raise UserError(
                f"the cache in {self.folder} is of format {found}, and this version can only check format "
                f"{FORMAT}: name another folder, or remove it and it is computed again"
            )
        if about.get("digest") != _digest(about):
            raise UserError(
                f"{path} was altered since it was written: name another folder, or remove the whole cache "
                "and it is computed again"
            )

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
            hidden_size: their width. storage: "exact" keeps the states' dtype, "bfloat16" rounds to it,
                "int8" and "fp8" keep 8 bits (``meft_kernels.reference.eight_bit``); None takes what is
                there, or for a new cache 16 bits.

        Raises:
            UserError: the folder holds something else, or a cache of something else, which is named.
        """
        if storage not in (None, *STORAGES):
            raise UserError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        check_place(folder)
        path = Path(folder) / "cache.json"
        if not path.is_file():
            half = key["backbone_dtype"] in ("bfloat16", "float16")
            chosen = storage or ("exact" if half else "bfloat16")
            about = {"key": key, "layers": list(layers), "hidden_size": hidden_size, "storage": chosen}
            _write_new(path, about | {"digest": _digest(about)})
        cache = cls(folder)
        cache.check(key, layers)
        if storage not in (None, cache.storage):
            raise UserError(
                f"the cache in {folder} is stale: storage was {cache.storage}, now it is {storage}"
            )
        return cache

    def check(self, key: dict[str, Any], layers: Sequence[int]) -> None:
        """Raises UserError, naming what differs, unless the cache is of these states."""
        self.check_states_of(key.get("states", "encoder"))
        different = []
        for name, meaning in KEY_NAMES.items():
            before, now = self.key.get(name), key.get(name)
            if before == now:
                continue
            if name in WEIGHTS:
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

    def check_states_of(self, part: str) -> None:
        """Raises UserError unless the states are those of this part, ``"encoder"`` or ``"decoder"``."""
        found = self.key.get("states", "encoder")
        if found != part:
            raise UserError(
                f"the cache in {self.folder} holds states of the {found}, those of the {part} are "
                "needed: name another folder"
            )

    def scan(self) -> None:
        """Reads the indices of shards that were written since the last look.

        Raises:
            UserError: one is that of another cache.
        """
        for path in sorted(self.folder.glob("shard-*.json")):
            if path.stem in self._seen:
                continue
            try:
                index, clips = _read_index(path)
            except (UserError, TypeError, ValueError, KeyError):
                continue  # `damaged` names it
            if index["cache"] != self.digest:
                raise UserError(
                    f"{path} belongs to another cache than {self.folder / 'cache.json'} describes: move it "
                    "and its .safetensors file away, or name another folder"
                )
            self._seen.add(path.stem)
            self._sizes[path.stem] = index["bytes"]
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
        if fingerprint in versions:
            return versions[fingerprint]
        # Another transcript of the same clip makes nothing stale.
        changed = versions and source_of(fingerprint) not in map(source_of, versions)
        if changed and isinstance(example.audio, str | os.PathLike):
            raise UserError(
                f"the cache in {self.folder} is stale: {example.name} has another size, date or segment than "
                "when its states were computed; name another folder or remove it"
            )
        return None

    def checked(self, example: Example) -> Example | None:
        """The example with its length in ``seconds``, if its states are here: its audio was decoded when
        they were made, and has not changed since."""
        versions = self._clips.get(example.name, {})
        try:
            source = clip_fingerprint(example) if versions else None
        except UserError:  # whoever checks the audio says it better
            return None
        clip = next((each for found, each in versions.items() if source_of(found) == source), None)
        if clip is None or (clip.seconds is None and not example.has_features):
            return None
        return replace(example, seconds=clip.seconds)

    def damaged(self) -> list[str]:
        """Names of the shards whose file or index is missing, cut off or altered. Reads every byte."""
        bad = []
        for path in sorted(self.folder.glob("shard-*.json")):
            try:
                index, _ = _read_index(path)
                fine = checksum(path.with_suffix(".safetensors")) == (index["bytes"], index["crc32"])
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
            self._headers.pop(shard, None)
        gone = set(shards)
        for name, versions in list(self._clips.items()):
            self._clips[name] = {f: c for f, c in versions.items() if c.shard not in gone}
        self._seen.clear()  # a clip may be in another shard too
        self.scan()

    def remove_leftovers(self, alone: bool) -> None:
        """Deletes what processes that were killed left behind: half-written files and shards without index.

        Args:
            alone: no other process is filling the cache. Otherwise only what is so old that nobody writes it.
        """
        patterns = {".shard-*": 0, "shard-*.safetensors": 0, ".cache-*": _CREATING_SECONDS}
        patterns["..cache-*"] = _CREATING_SECONDS  # written by processes that have not yet begun to fill
        for pattern, age in patterns.items():
            for path in self.folder.glob(pattern):
                try:
                    old = time.time() - path.stat().st_mtime >= (age if alone else _ABANDONED_SECONDS)
                    if old and (path.name.startswith(".") or not path.with_suffix(".json").exists()):
                        path.unlink()
                except OSError:  # gone, or a folder that cannot be written
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
            size, crc = checksum(temporary)
        rows = [[e.name, found, parts["states"].shape[1], e.seconds] for e, found, parts in clips]
        index = {"cache": self.digest, "bytes": size, "crc32": crc, "clips": rows}
        write_json(self.folder / f"{shard}.json", index | {"digest": _digest(index)})
        self.scan()

    def read(self, clip: Clip, layers: Sequence[int]) -> CachedClip:
        """A clip's states of some layers.

        Args:
            clip: from :meth:`find`. layers: some of the cache's.

        Raises:
            UserError: the shard is not what was written, or cannot be read.
        """
        rows = [self.layers.index(layer) for layer in layers]
        path = self.folder / f"{clip.shard}.safetensors"
        try:
            with open(path, "rb", buffering=0) as file:
                size, written = os.fstat(file.fileno()).st_size, self._sizes[clip.shard]
                if size != written:
                    raise OSError(f"it has {size} bytes of the {written} that were written")
                if clip.shard not in self._headers:
                    if hasattr(os, "posix_fadvise"):  # the whole shard will be needed: have it read ahead
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
                    self._headers[clip.shard] = read_header(file)
                header = self._headers[clip.shard]
                names = {part: f"{part}.{clip.number}" for part in parts_of(self.storage)}
                parts = {part: read_rows(file, header[name], rows) for part, name in names.items()}
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{path} is damaged ({reason}): start again, and damaged shards are computed anew"
            ) from error
        return unpack(parts)


def _digest(value: dict[str, Any]) -> str:
    """SHA-256 in hexadecimal of JSON values, the entry ``digest`` left out."""
    kept = {name: each for name, each in value.items() if name != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def check_place(folder: str | os.PathLike) -> None:
    """Raises UserError where ``folder`` holds no cache and none can be made in it."""
    folder = Path(folder)
    path = folder / "cache.json"
    if path.is_file():
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a feature cache is a folder: name another")
    others = folder.is_dir() and any(each.name[0] != "." for each in folder.iterdir())
    if others and not path.is_file():  # another process may just have made it
        raise UserError(f"{folder} is not empty and holds no feature cache: name another folder")
    check_writable(path)


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


def _read_index(path: Path) -> tuple[dict[str, Any], list[tuple[str, Clip]]]:
    """An index and the clips in it, with their names.

    Raises:
        UserError, TypeError, ValueError, KeyError: it is not what was written.
    """
    index = read_json(path)
    if index["digest"] != _digest(index):
        raise ValueError(f"{path} was altered")
    clips = []
    for i, (name, found, frames, seconds) in enumerate(index["clips"]):
        clips.append((name, Clip(path.stem, i, frames, found, seconds)))
    return index, clips
