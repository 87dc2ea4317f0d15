"""Reading a data set from any source: which format it has, which splits, and its examples.

Every reader returns the splits of a source as a dict from split name (``None`` where it has no splits) to a
function that reads that split, so that asking for names reads little. No reader opens an audio file.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .examples import Example, ExampleSet, check_labelled, listing
from .folders import AUDIO_SUFFIXES, TABLE_SUFFIXES, read_audio_folder
from .kaldi import kaldi_folders, kespeech_root, read_kaldi, read_kespeech
from .manifests import find_tables, read_manifests
from .options import FORMATS, KESPEECH_PAPER_LABELS, Options
from .splits import Splits, choose_splits

logger = logging.getLogger(__name__)


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
    chosen = choose_splits(splits, split, shown)
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
        if hub_name and path.suffix.lower() not in (*TABLE_SUFFIXES, ".parquet", ".arrow"):
            return "huggingface"
        raise UserError(
            f"no data at {source!r}: it does not exist, and it is not the name of a data set on the hub"
        )
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".parquet", ".arrow"):
            return "huggingface"
        if suffix in AUDIO_SUFFIXES:
            raise UserError(f"{source} is a single audio file: give a folder of labelled audio or a manifest")
        if path.name == "wav.scp":
            raise UserError(f"{source}: give the folder that holds wav.scp, {path.parent}")
        if suffix in (".json", ".jsonl"):
            raise UserError(f"{source} is a JSON file: a manifest must be a CSV or TSV table")
        return "manifest"
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "huggingface"
    if kespeech_root(path):
        return "kespeech"
    if kaldi_folders(path):
        return "kaldi"
    if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")) or any(path.glob("*.arrow")):
        return "huggingface"
    if find_tables(path):
        return "manifest"
    return "audiofolder"


def _read(source: Any, data_format: str, options: Options) -> Splits:
    if data_format == "huggingface":
        from .huggingface import read_huggingface  # datasets takes a second to import

        return read_huggingface(source, options)
    path = Path(source)
    if not path.exists():
        raise UserError(f"no data at {source}: it does not exist")
    if data_format in ("manifest", "speechbrain"):
        return read_manifests(path, options, samples=True if data_format == "speechbrain" else None)
    if not path.is_dir():
        raise UserError(f'{source} is a file; the format "{data_format}" is a folder')
    return {"audiofolder": read_audio_folder, "kaldi": read_kaldi, "kespeech": read_kespeech}[data_format](
        path, options
    )


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
