"""Tar shards that tests of streams write and know again."""

import io
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from data_fixtures import RATE, wave


def sound(index: int, seconds: float = 0.1, kind: str = "WAV") -> bytes:
    """The content of a file with the clip of data_fixtures."""
    buffer = io.BytesIO()
    subtype = "FLOAT" if kind == "WAV" else None
    soundfile.write(buffer, wave(index % 90, seconds), RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_shards(
    folder: Path, sizes: list[int], labels: str = "abc", prefix: str = "train", seconds: float = 0.1
) -> Path:
    """Writes a folder of shards with clips 00000, 00001, ..., whose labels take turns."""
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            label = labels[number % len(labels)].encode()
            members += [(f"{number:05}.wav", sound(number, seconds)), (f"{number:05}.cls", label)]
            number += 1
        tar(folder / f"{prefix}-{shard:03}.tar", members)
    return folder


def shards_of_folder(audio_folder: Path, shards: Path, count: int) -> Path:
    """Packs a folder of audio, class by class, into so many shards."""
    files = sorted(audio_folder.rglob("*.wav"), key=lambda file: (file.stem[-1], file.stem))
    for shard, part in enumerate(np.array_split(np.arange(len(files)), count)):
        members = []
        for file in (files[i] for i in part):
            members += [
                (f"{file.stem}.wav", file.read_bytes()),
                (f"{file.stem}.cls", file.parent.name.encode()),
            ]
        tar(shards / f"train-{shard:03}.tar", members)
    return shards
