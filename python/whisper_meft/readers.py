"""Finding and reading data: which format a source has, which splits, and the readers of local layouts.

Every reader returns the splits of a source as a dict from split name (``None`` where it has no splits) to a
function that reads that split, so that asking for names reads little. No reader opens an audio file.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from . import columns
from .audio import READABLE_SUFFIXES, UNREADABLE_SUFFIXES
from .errors import UserError
from .examples import Example, ExampleSet, check_labelled, listing

logger = logging.getLogger(__name__)

FORMATS = ("audiofolder", "manifest", "speechbrain", "kaldi", "kespeech", "huggingface")
KESPEECH_PAPER_LABELS = ("Ji-Lu", "Jiang-Huai", "Jiao-Liao", "Lan-Yin", "Southwestern", "Zhongyuan")
# Kaldi files that may hold the class, the most specific first.
_LABEL_FILES = ("utt2subdialect", "utt2dialect", "utt2accent", "utt2lang", "utt2language") + (
    ("utt2label", "utt2class", "utt2category")
)
_SPLIT_ALIASES = {
    "train": ("train", "training", "trn", "tr"),
    "validation": ("validation", "valid", "val", "dev", "development", "cv"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
_CANONICAL = {alias: name for name, aliases in _SPLIT_ALIASES.items() for alias in aliases}
_AUDIO_SUFFIXES = READABLE_SUFFIXES | UNREADABLE_SUFFIXES
_TABLES = (".csv", ".tsv", ".txt")

Splits = dict[str | None, Callable[[], list[Example]]]


@dataclass(frozen=True)
class Options:
    """What :func:`load_examples` passes to the readers."""

    audio_column: str | None = None
    label_column: str | None = None
    speaker_column: str | None = None
    start_column: str | None = None
    stop_column: str | None = None
    data_root: str | None = None
    config: str | None = None
    cache_dir: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    split: str | None = None
    require_labels: bool = True


def load_examples(
    source: Any,
    data_format: str | None = None,
    split: str | None = None,
    *,
    audio_column_name: str | None = None,
    label_column_name: str | None = None,
    speaker_column_name: str | None = None,
    start_column_name: str | None = None,
    stop_column_name: str | None = None,
    data_root: str | os.PathLike | None = None,
    labels: str | Sequence[str] | None = None,
    require_labels: bool = True,
    dataset_config_name: str | None = None,
    cache_dir: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ExampleSet:
    """Reads the names, labels and speakers of a data set; audio is opened later.

    Args:
        source: a path, the name of a data set on the Hugging Face hub, a ``datasets.Dataset`` or
            ``DatasetDict``, or an ``ExampleSet``, which is returned as it is.
        data_format: one of :data:`FORMATS`; found out from ``source`` by default.

            * "audiofolder": ``DIR/<label>/**`` or ``DIR/<split>/<label>/**``.
            * "manifest": CSV or TSV with a header line; columns for path and label, optionally speaker, start
              and end in seconds, and split. Or a folder with ``metadata.csv``, or with one table per split.
            * "speechbrain": ``ID,duration,wav,start,end,dialect``, start and end in samples (ADI-17, ADI-20).
            * "kaldi": a folder with ``wav.scp`` and a label file such as ``utt2dialect``, optionally
              ``utt2spk`` and ``segments``; or a folder of such folders, one per split.
            * "kespeech": the root of KeSpeech, its ``Tasks/ASR``, or one split of that.
            * "huggingface": hub name, ``save_to_disk`` folder, Parquet or Arrow; audio or precomputed
              ``input_features``.
        split: the split to read: its own name, or "train", "validation" or "test" for everything that such a
            name stands for (``dev_phase1`` and ``dev_phase2`` are "validation"). Needed where there are
            several. A hub name also takes slices such as "train[:10%]".
        audio_column_name, label_column_name, speaker_column_name, start_column_name, stop_column_name:
            columns, where the usual names do not find them; ``label_column_name`` is a file for Kaldi.
        data_root: folder that relative paths start from; replaces ``{data_root}`` and ``$data_root`` in
            SpeechBrain manifests. By default the manifest's own folder.
        labels: keep only these labels, or "all". KeSpeech keeps the six of arXiv 2512.02074 by default.
        require_labels: raise where an example has no label.
        dataset_config_name, cache_dir, revision, token: passed to ``datasets.load_dataset``.

    Raises:
        UserError: naming the source and what is wrong with it.
    """
    if isinstance(source, ExampleSet):
        return source
    options = Options(
        audio_column=audio_column_name,
        label_column=label_column_name,
        speaker_column=speaker_column_name,
        start_column=start_column_name,
        stop_column=stop_column_name,
        data_root=None if data_root is None else os.fspath(data_root),
        config=dataset_config_name,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        split=split,
        require_labels=require_labels,
    )
    source, found = _resolve(source, data_format)
    shown = source if isinstance(source, str) else f"the given {type(source).__name__}"
    splits = _read(source, found, options)
    chosen = _choose(splits, split, shown)
    examples = [example for name in chosen for example in splits[name]()]
    named = ", ".join(name for name in chosen if name)
    description = f"{shown} ({named})" if named else shown
    if labels is None:
        labels = KESPEECH_PAPER_LABELS if found == "kespeech" else "all"
    result = ExampleSet(_keep(examples, labels, description), description)
    if require_labels:
        check_labelled(result)
    elif not len(result):
        raise UserError(f"{description} holds no examples")
    return result


def list_splits(source: Any, data_format: str | None = None, **options: Any) -> list[str]:
    """The split names of a source, empty where it has none. ``options`` are those of :func:`load_examples`
    that say where the data is (``dataset_config_name``, ``cache_dir``, ``revision``, ``token``)."""
    if isinstance(source, ExampleSet):
        return []
    options = {"config" if key == "dataset_config_name" else key: value for key, value in options.items()}
    source, found = _resolve(source, data_format)
    splits = _read(source, found, Options(**options, require_labels=False))
    return [name for name in splits if name is not None]


def canonical_split(name: str) -> str | None:
    """The kind of a split, "train", "validation" or "test" (``dev_phase1``, ``test-clean``), or ``None``."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_CANONICAL[word] for word in words if word in _CANONICAL), None)


def list_audio_files(folder: str | os.PathLike) -> list[str]:
    """Every file under ``folder`` with the suffix of an audio format, also of unreadable ones, sorted.

    Names that begin with a dot are passed over; links are followed once.

    Raises:
        UserError: the folder is missing or cannot be listed.
    """
    found, seen, waiting = [], set(), [os.fspath(folder)]
    while waiting:
        current = waiting.pop()
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in seen:  # a link back to a parent
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    if os.path.isdir(entry.path):  # unlike entry.is_dir(), content with a link to itself
                        waiting.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower() in _AUDIO_SUFFIXES:
                        found.append(entry.path)
        except OSError as error:
            raise UserError(f"cannot list {current}: {error.strerror or error}") from error
    return sorted(found)


def _resolve(source: Any, data_format: str | None) -> tuple[Any, str]:
    """The source as a string or dataset object, and its format."""
    if data_format is not None and data_format not in FORMATS:
        raise UserError(f"data_format must be one of {', '.join(FORMATS)}, got {data_format!r}")
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "column_names"):
            raise UserError(
                "data must be a path, the name of a data set on the hub, a datasets.Dataset or an ExampleSet,"
                f" got {type(source).__name__}"
            )
        return source, "huggingface"
    source = os.fspath(source)
    return source, data_format or _detect(source)


def _detect(source: str) -> str:
    path = Path(source)
    if not source or not path.exists():
        # "name" or "owner/name"; not a mistyped path into a folder that is there.
        hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and path.parts[0] not in os.listdir()
        if hub_name and path.suffix.lower() not in (*_TABLES, ".parquet", ".arrow"):
            return "huggingface"
        raise UserError(
            f"no data at {source!r}: it does not exist, and it is not the name of a data set on the hub"
        )
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".parquet", ".arrow"):
            return "huggingface"
        if suffix in _AUDIO_SUFFIXES:
            raise UserError(f"{source} is a single audio file: give a folder of labelled audio or a manifest")
        if path.name == "wav.scp":
            raise UserError(f"{source}: give the folder that holds wav.scp, {path.parent}")
        if suffix in (".json", ".jsonl"):
            raise UserError(f"{source} is a JSON file: a manifest must be a CSV or TSV table")
        return "manifest"
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "huggingface"
    if _kespeech_root(path):
        return "kespeech"
    if _kaldi_folders(path):
        return "kaldi"
    if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")) or any(path.glob("*.arrow")):
        return "huggingface"
    if _tables(path):
        return "manifest"
    return "audiofolder"


def _read(source: Any, data_format: str, options: Options) -> Splits:
    if data_format == "huggingface":
        from .hf_readers import read_huggingface  # datasets takes a second to import

        return read_huggingface(source, options)
    path = Path(source)
    if not path.exists():
        raise UserError(f"no data at {source}: it does not exist")
    if data_format in ("manifest", "speechbrain"):
        return _read_manifests(path, options, samples=True if data_format == "speechbrain" else None)
    if not path.is_dir():
        raise UserError(f'{source} is a file; the format "{data_format}" is a folder')
    return {"audiofolder": _read_folder, "kaldi": _read_kaldi, "kespeech": _read_kespeech}[data_format](
        path, options
    )


def _choose(splits: Splits, split: str | None, shown: str) -> list[str | None]:
    """The keys that ``split`` stands for."""
    names = [name for name in splits if name is not None]
    if split is None:
        if len(splits) > 1:
            raise UserError(
                f"{shown} has several splits ({listing(names)}): name one of them (--split; for training "
                "--train_split_name, --eval_split_name)"
            )
        return list(splits)
    exact = [name for name in names if name.lower() == split.lower()]
    wanted = canonical_split(split) if split.lower() in _CANONICAL else None
    alike = [name for name in names if wanted is not None and canonical_split(name) == wanted]
    if exact or alike:
        return exact or alike
    there = f"it has {listing(names)}" if names else "it has no splits"
    raise UserError(f"{shown} has no split {split!r}: {there}")


def _keep(examples: list[Example], labels: str | Sequence[str], description: str) -> list[Example]:
    if labels == "all":
        return examples
    wanted = {labels} if isinstance(labels, str) else set(labels)
    kept = [example for example in examples if example.label in wanted]
    if not kept:
        there = sorted({str(example.label) for example in examples})
        raise UserError(
            f"{description} has none of the labels {listing(sorted(wanted))}: it has {listing(there)}"
        )
    if len(kept) < len(examples):
        logger.info(
            "%s: %d of %d examples have one of the labels wanted", description, len(kept), len(examples)
        )
    return kept


# --- audio folder ---


def _subfolders(path: Path) -> list[Path]:
    return sorted(
        p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX"
    )


def _read_folder(path: Path, options: Options) -> Splits:
    folders = _subfolders(path)
    splits = [p for p in folders if p.name.lower() in _CANONICAL and _subfolders(p)]
    if not splits:
        return {None: lambda: _labelled_by_folder(path)}
    others = [p.name for p in folders if p not in splits and list_audio_files(p)]
    if others:
        raise UserError(
            f"{path} mixes split folders ({listing(p.name for p in splits)}) with other folders of audio "
            f"({listing(others)}): keep label folders inside the split folders"
        )
    return {p.name: (lambda p=p: _labelled_by_folder(p)) for p in splits}


def _labelled_by_folder(path: Path) -> list[Example]:
    folder = os.fspath(path)
    examples = []
    for file in list_audio_files(folder):
        parts = os.path.relpath(file, folder).split(os.sep)
        examples.append(Example(file, label=parts[0].strip() if len(parts) > 1 else None))
    if not examples:
        tables = [p.name for p in path.iterdir() if p.suffix.lower() in (*_TABLES, ".json", ".jsonl")]
        hint = f"; it holds {listing(tables, 3)}, if that is a manifest give its path" if tables else ""
        raise UserError(f"no audio files were found under {path}{hint}")
    return examples


# --- manifests ---


def _tables(path: Path) -> dict[str | None, Path]:
    """The manifests of a folder by split: metadata.csv as in the hub's audio folders, or one per split."""
    for name in ("metadata.csv", "metadata.tsv"):
        if (path / name).is_file():
            return {None: path / name}
        inside = {
            p.name: p / name
            for p in _subfolders(path)
            if p.name.lower() in _CANONICAL and (p / name).is_file()
        }
        if inside:
            return inside
    tables = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (".csv", ".tsv") and p.is_file()]
    named = {p.stem: p for p in tables if canonical_split(p.stem)}
    return named if "train" in {canonical_split(stem) for stem in named} else {}


def _read_manifests(path: Path, options: Options, samples: bool | None) -> Splits:
    tables = {None: path} if path.is_file() else _tables(path)
    if not tables:
        raise UserError(
            f"{path} holds no metadata.csv and no table per split (train.csv, test.csv): give the file"
        )
    if list(tables) != [None]:
        return {
            split: (lambda t=table: [e for _, e in columns.read_manifest(t, options, samples)])
            for split, table in tables.items()
        }
    table = tables[None]
    read = cache(lambda: columns.read_manifest(table, options, samples))
    return {
        split: (lambda split=split: [example for name, example in read() if name == split])
        for split in columns.manifest_splits(table)
    }


# --- Kaldi and KeSpeech ---


def _kaldi_folders(path: Path) -> dict[str | None, Path]:
    if (path / "wav.scp").is_file():
        return {None: path}
    return {p.name: p for p in _subfolders(path) if (p / "wav.scp").is_file()}


def _read_kaldi(path: Path, options: Options) -> Splits:
    folders = _kaldi_folders(path)
    if not folders:
        raise UserError(f"{path} holds no wav.scp, and no folder in it does")
    return {name: (lambda f=f: read_kaldi_folder(f, options)) for name, f in folders.items()}


def _kespeech_root(path: Path) -> Path | None:
    path = path.absolute()
    if (path / "Tasks" / "ASR").is_dir():
        return path
    for tasks in (path.parent, path.parent.parent):
        if tasks.name == "Tasks" and path.relative_to(tasks).parts[0] == "ASR":
            return tasks.parent
    return None


def _read_kespeech(path: Path, options: Options) -> Splits:
    root = _kespeech_root(path)
    if root is None:
        raise UserError(f"{path} is not KeSpeech: its root, its Tasks/ASR or one split of that is accepted")
    options = replace(
        options,
        data_root=options.data_root or os.fspath(root),
        label_column=options.label_column or "utt2subdialect",
    )
    folders = _kaldi_folders(root / "Tasks" / "ASR" if path.absolute() == root else path)
    if not folders:
        raise UserError(f"{path} holds no split of KeSpeech: wav.scp is missing")
    return {name: (lambda f=f: read_kaldi_folder(f, options)) for name, f in folders.items()}


def read_kaldi_folder(path: Path, options: Options) -> list[Example]:
    """The utterances of a Kaldi data folder, joined by utterance id.

    Raises:
        UserError: missing files, malformed lines, ids given twice, pipes and archives in wav.scp, a segment
            of an unknown recording.
    """
    recordings = _two_columns(path / "wav.scp")
    for name, value in recordings.items():
        if value.endswith("|"):
            raise UserError(
                f"{path / 'wav.scp'}: {name} is a pipe ({value[:60]}), commands are not run: write the audio "
                "to files and list their paths"
            )
        if re.search(r"\.(ark|scp):\d+$", value):
            raise UserError(
                f"{path / 'wav.scp'}: {name} lies in a Kaldi archive; list paths of audio files instead"
            )
    labels = _label_file(path, options)
    speakers = _two_columns(path / "utt2spk") if (path / "utt2spk").is_file() else {}
    root = options.data_root or _root_of(path, next(iter(recordings.values()), ""))

    if not (path / "segments").is_file():
        return [
            Example(os.path.join(root, value), label=labels.get(name), speaker=speakers.get(name))
            for name, value in recordings.items()
        ]
    examples = []
    for name, value in _two_columns(path / "segments").items():
        fields = value.split()
        if len(fields) != 3:
            raise UserError(
                f"{path / 'segments'}: {name} needs a recording, a start and an end, got {value!r}"
            )
        if fields[0] not in recordings:
            raise UserError(
                f"{path / 'segments'}: {name} is in recording {fields[0]}, which wav.scp does not list"
            )
        where = f"{path / 'segments'}, {name}"
        start, stop = columns.number(fields[1], where), columns.number(fields[2], where)
        stop = None if stop is not None and stop < 0 else stop  # Kaldi writes -1 for the end of the recording
        columns.check_segment(start, stop, where)
        examples.append(
            Example(
                os.path.join(root, recordings[fields[0]]),
                label=labels.get(name),
                speaker=speakers.get(name),
                start=start,
                stop=stop,
            )
        )
    return examples


def _label_file(path: Path, options: Options) -> dict[str, str]:
    name = options.label_column
    if name is None:
        name = next((file for file in _LABEL_FILES if (path / file).is_file()), None)
        if name is None and not options.require_labels:
            return {}
        if name is None:
            raise UserError(
                f"{path} has no label file that is known by its name ({listing(_LABEL_FILES)}): it holds "
                f"{listing(sorted(os.listdir(path)), 20)}; name it with label_column_name"
            )
    if not (path / name).is_file():
        raise UserError(
            f"{path} has no label file {name!r}: it holds {listing(sorted(os.listdir(path)), 20)}"
        )
    return _two_columns(path / name)


def _two_columns(path: Path) -> dict[str, str]:
    """Lines of ``<id> <value>``, split at the first white space."""
    table: dict[str, str] = {}
    for number, line in enumerate(columns.read_text(path).splitlines(), 1):
        fields = line.split(maxsplit=1)
        if not fields:
            continue
        if len(fields) < 2:
            raise UserError(f"{path}, line {number}: an id and a value are needed, got {line.strip()!r}")
        if fields[0] in table:
            raise UserError(f"{path}, line {number}: the id {fields[0]} is given twice")
        table[fields[0]] = fields[1].strip()
    return table


def _root_of(path: Path, first: str) -> str:
    """Where relative paths of a Kaldi folder start: in a folder above it, where recipes run, or in it."""
    path = path.absolute()
    candidates: Iterable[Path] = (path, *path.parents[:3], Path.cwd())
    return next((os.fspath(c) for c in candidates if (c / first).is_file()), os.fspath(path))
