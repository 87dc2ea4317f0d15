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
from ..once import warn_once
from .examples import Example, ExampleSet, check_labelled, check_transcribed, listing, sort_labels
from .folders import AUDIO_SUFFIXES, list_audio_files, read_audio_folder
from .kaldi import kaldi_folders, kespeech_root, read_kaldi, read_kespeech
from .lhotse import is_cuts, split_cuts
from .librispeech import librispeech_splits, read_librispeech
from .manifests import read_manifests
from .names import alike, composed, folded
from .options import FORMATS, KESPEECH_PAPER_LABELS, STREAMED, Options
from .splits import LAYOUTS, Splits, choose_splits
from .streaming import ShardedExamples
from .table_folders import check_tables_beside, find_tables
from .tables import TABLE_SUFFIXES, table_name
from .webdataset import is_shards, shards_in, split_shards

logger = logging.getLogger(__name__)


def load_examples(
    source: Any,
    data_format: str | None = None,
    split: str | None = None,
    *,
    audio_column_name: str | None = None,
    label_column_name: str | None = None,
    text_column_name: str | None = None,
    speaker_column_name: str | None = None,
    start_column_name: str | None = None,
    stop_column_name: str | None = None,
    channel_column_name: str | None = None,
    layout: str | None = None,
    data_root: str | os.PathLike | None = None,
    labels: str | Sequence[str] | None = None,
    every_label: bool = False,
    require_labels: bool | None = None,
    require_text: bool = False,
    dataset_config_name: str | None = None,
    cache_dir: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ExampleSet:
    """Reads the names, labels or transcripts, and speakers of a data set; audio is opened later.

    Args:
        source: a path, the name of a data set on the Hugging Face hub, a ``datasets.Dataset`` or
            ``DatasetDict``, or an ``ExampleSet``, which is returned as it is.
        data_format: one of :data:`FORMATS`; found out from ``source`` by default.

            * "audiofolder": ``DIR/<label>/**``, ``DIR/<split>/<label>/**`` or ``DIR/<label>/**/<split>/**``.
            * "manifest": CSV or TSV with a header line, or JSON lines, also gzipped; columns for path and
              label, optionally speaker, split, channel, start and end or duration (seconds; milliseconds or
              samples where the name ends in ``_ms`` or ``_samples``). Or a folder with ``metadata.csv``,
              ``.tsv`` or ``.jsonl``, also one in each folder, or with one table per split.
            * "speechbrain": ``ID,duration,wav,start,end,dialect``, start and end in samples (ADI-17, ADI-20).
            * "kaldi": a folder with ``wav.scp`` and a label file such as ``utt2dialect``, optionally
              ``text``, ``utt2spk`` and ``segments``; or a folder of such folders, one per split.
            * "librispeech": ``<split>/<speaker>/<chapter>/*.trans.txt`` with the audio beside them, or one
              split of that; it has transcripts and no labels.
            * "kespeech": the root of KeSpeech, its ``Tasks/ASR``, or one split of that.
            * "huggingface": hub name, ``save_to_disk`` folder, Parquet or Arrow; audio or precomputed
              ``input_features``.
            * "webdataset": tar files, or a folder of them, with members such as ``0001.flac`` and
              ``0001.cls`` or ``0001.json``; a pattern such as ``train-{000..099}.tar``.
            * "lhotse": a file of cuts in JSON lines, or a folder of such (``cuts*.jsonl.gz``).
        split: the split to read: its own name, or "train", "validation" or "test" for everything that such a
            name stands for (``dev_phase1`` and ``dev_phase2`` are "validation"). Needed where there are
            several. A hub name also takes slices such as "train[:10%]".
        audio_column_name, label_column_name, text_column_name, speaker_column_name: columns, where the usual
            names do not find them; those of labels and text are files for Kaldi.
        start_column_name, stop_column_name, channel_column_name: likewise, for the part of a file that is
            meant.
        layout: what the folders of an "audiofolder", or the tables of a folder, are: "class" (no splits),
            "split/class" or "class/split". By default names such as train and test tell, where they come
            together; one that is also a language code (``tr``, ``cv``, ``dev``) only beside one that is not.
        data_root: folder that relative paths start from; replaces ``{data_root}`` and ``$data_root`` in
            SpeechBrain manifests. By default the manifest's own folder.
        labels: keep only these labels, or "all". KeSpeech keeps the six of arXiv 2512.02074 by default,
            where transcripts are not what is wanted.
        every_label: raise where one of ``labels`` has no example, as training data must not; by default a
            warning names it.
        require_labels: raise where an example has no label; by default, unless transcripts are required.
        require_text: read transcripts, and raise where an example has none. Without it ``text`` is ``None``.
        dataset_config_name, cache_dir, revision, token: passed to ``datasets.load_dataset``.

    Raises:
        UserError: naming the source and what is wrong with it.
    """
    if isinstance(source, ExampleSet):
        return source
    if text_column_name is not None and not require_text:
        raise UserError(
            f"text_column_name={text_column_name!r} is of transcripts; give require_text=True too"
        )
    require_labels = not require_text if require_labels is None else require_labels
    options = Options(
        audio_column=audio_column_name,
        label_column=label_column_name,
        text_column=text_column_name,
        speaker_column=speaker_column_name,
        start_column=start_column_name,
        stop_column=stop_column_name,
        channel_column=channel_column_name,
        layout=layout,
        data_root=None if data_root is None else os.fspath(data_root),
        config=dataset_config_name,
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        split=split,
        require_labels=require_labels,
        with_text=require_text,
    )
    source, found = _resolve(source, data_format, options)
    shown = source if isinstance(source, str) else f"the given {type(source).__name__}"
    splits = _read(source, found, options)
    chosen = choose_splits(splits, split, shown)
    examples = [example for name in chosen for example in splits[name]()]
    named = ", ".join(name for name in chosen if name)
    description = f"{shown} ({named})" if named else shown
    absent = None if labels is None else "error" if every_label else "warning"
    if labels is None:
        labels = KESPEECH_PAPER_LABELS if found == "kespeech" and not require_text else "all"
    result = ExampleSet(_keep(examples, labels, description, absent), description)
    _say_alike(result)
    if require_text:
        check_transcribed(result)
    if require_labels:
        check_labelled(result)
    elif not len(result):
        raise UserError(f"{description} holds no examples")
    return result


def load_shards(
    source: Any,
    data_format: str | None = None,
    split: str | None = None,
    *,
    labels: str | Sequence[str] | None = None,
    **options: Any,
) -> ShardedExamples:
    """A data set in shards that are read as they come, and never held: for what does not fit.

    Args:
        source: tar files, Lhotse cuts, what ``datasets.load_dataset(..., streaming=True)`` takes, or what it
            gives.
        data_format, split, options: as for :func:`load_examples`.
        labels: not looked at: which there may be is for whoever reads them.

    Raises:
        UserError: naming the source and what is wrong with it.
    """
    given = _as_options({"require_labels": not options.get("require_text", False), **options, "split": split})
    source, found = _resolve(source, data_format, given)
    splits, shown = _sharded(source, found, given)
    chosen = choose_splits(splits, split, shown)
    if len(chosen) > 1:
        raise UserError(f"{shown} has several splits {split!r} ({listing(chosen)}): name one of them")
    return splits[chosen[0]]


# By format, what divides a source in shards into splits.
_SPLIT_SHARDS = {"webdataset": split_shards, "lhotse": split_cuts}


_CUTTING = ("start_column", "stop_column", "channel_column")

# By format, the options that mean nothing for it, beside those that it says itself or refuses.
_UNUSED = {
    "audiofolder": ("data_root", "config"),
    "manifest": ("config",),
    "speechbrain": ("config",),
    "kaldi": ("audio_column", "speaker_column", *_CUTTING, "config"),
    "kespeech": ("audio_column", "speaker_column", *_CUTTING, "config"),
    "librispeech": ("audio_column", "label_column", "text_column", "speaker_column", *_CUTTING)
    + ("data_root", "config"),
    "webdataset": ("config",),
    "lhotse": ("audio_column", "config"),
}


def _sharded(source: Any, data_format: str, options: Options) -> tuple[dict[str | None, Any], str]:
    """The splits of a source in shards, and what messages call it."""
    shown = source if isinstance(source, str) else f"the given {type(source).__name__}"
    if data_format not in STREAMED:
        raise UserError(
            f'{shown} has the format "{data_format}", which is not streamed ({", ".join(STREAMED)} are): its '
            "sound is read when it is heard anyway, so leave streaming out"
        )
    _check_whole(options, shown, data_format)
    _say_unused(source, data_format, options)
    if data_format == "huggingface":
        from .huggingface_streams import stream_huggingface  # datasets takes a second to import

        return stream_huggingface(source, options), shown
    return _SPLIT_SHARDS[data_format](source, options), shown


def _check_whole(options: Options, shown: str, data_format: str) -> None:
    """Raises UserError where what is given is not for data in shards."""
    given = [options.start_column, options.stop_column, options.channel_column]
    given += [options.data_root if data_format == "webdataset" else None]
    if given := [name for name in given if name is not None]:
        raise UserError(
            f"{shown}: {listing(given)} cannot be used, clips in shards are read whole as they are"
        )


def list_splits(
    source: Any, data_format: str | None = None, streaming: bool = False, **options: Any
) -> list[str]:
    """The split names of a source, empty where it has none. ``options``: those of :func:`load_examples`;
    ``streaming``: for :func:`load_shards`, without reading what is in them."""
    if isinstance(source, ExampleSet):
        return []
    given = _as_options({**options, "require_labels": False})
    source, found = _resolve(source, data_format, given)
    splits = _sharded(source, found, given)[0] if streaming else _read(source, found, given)
    return [name for name in splits if name is not None]


def _as_options(options: dict[str, Any]) -> Options:
    """Keyword arguments of :func:`load_examples` as the readers are told them."""
    ours = {"dataset_config_name": "config", "require_labels": "require_labels", "require_text": "with_text"}
    named = {ours.get(name, name.removesuffix("_name")): value for name, value in options.items()}
    for of_examples in ("labels", "every_label"):
        named.pop(of_examples, None)
    return Options(**named)


def _resolve(source: Any, data_format: str | None, options: Options) -> tuple[Any, str]:
    """The source as a string or dataset object, and its format."""
    if data_format is not None and data_format not in FORMATS:
        raise UserError(f"data_format must be one of {', '.join(FORMATS)}, got {data_format!r}")
    if options.layout is not None and options.layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {options.layout!r}")
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "column_names"):
            raise UserError(
                "data must be a path, the name of a data set on the hub, a datasets.Dataset or an ExampleSet,"
                f" got {type(source).__name__}"
            )
        found = "huggingface"
    else:
        source = os.fspath(source)
        found = data_format or _detect(source, options)
    if options.layout is not None and found not in ("audiofolder", "manifest", "speechbrain"):
        raise UserError(f'layout says what folders of audio or tables are; the format here is "{found}"')
    return source, found


def _detect(source: str, options: Options) -> str:
    path = Path(source)
    if source and is_shards(source) and not path.is_dir():
        return "webdataset"
    if not source or not path.exists():
        # "name" or "owner/name"; not a mistyped path into a folder that is there.
        hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and path.parts[0] not in os.listdir()
        if hub_name and table_name(path)[1] not in (*TABLE_SUFFIXES, ".parquet", ".arrow"):
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
        return "lhotse" if is_cuts(path) else "manifest"
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "huggingface"
    if kespeech_root(path):
        return "kespeech"
    if kaldi_folders(path):
        return "kaldi"
    if options.with_text and librispeech_splits(path):  # else its folders may be classes
        return "librispeech"
    if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")) or any(path.glob("*.arrow")):
        return "huggingface"
    if any(map(is_cuts, path.glob("cuts*.jsonl*"))):
        return "lhotse"
    if find_tables(path, options):
        return "manifest"
    if options.layout is None:
        check_tables_beside(path, options)
    if shards_in(path) and not list_audio_files(path):
        return "webdataset"
    return "audiofolder"


def _say_unused(source: str, data_format: str, options: Options) -> None:
    """Says which options mean nothing for a format; they may be meant for other data of the same run."""
    named = {"config": "dataset_config_name", "data_root": "data_root"}
    unused = _UNUSED.get(data_format, ())
    if given := [named.get(name, f"{name}_name") for name in unused if getattr(options, name) is not None]:
        warn_once(f'{source} is read as "{data_format}", without {listing(given)}')


def _read(source: Any, data_format: str, options: Options) -> Splits:
    _say_unused(source, data_format, options)
    if data_format == "huggingface":
        from .huggingface import read_huggingface  # datasets takes a second to import

        return read_huggingface(source, options)
    if data_format in _SPLIT_SHARDS:
        _check_whole(options, source, data_format)
        splits = _SPLIT_SHARDS[data_format](source, options)
        return {name: (lambda shards=shards: list(shards)) for name, shards in splits.items()}
    path = Path(source)
    if not path.exists():
        raise UserError(f"no data at {source}: it does not exist")
    if data_format in ("manifest", "speechbrain"):
        return read_manifests(path, options, samples=True if data_format == "speechbrain" else None)
    if not path.is_dir():
        raise UserError(f'{source} is a file; the format "{data_format}" is a folder')
    read = {
        "audiofolder": read_audio_folder,
        "kaldi": read_kaldi,
        "kespeech": read_kespeech,
        "librispeech": read_librispeech,
    }
    return read[data_format](path, options)


def _keep(
    examples: list[Example], labels: str | Sequence[str], description: str, absent: str | None
) -> list[Example]:
    """The examples of these labels; ``absent``: what one of them that has none is, "error" or "warning"."""
    if labels == "all":
        return examples
    wanted = {composed(label) for label in ([labels] if isinstance(labels, str) else labels)}
    kept = [example for example in examples if example.label in wanted]
    there = {str(example.label) for example in examples}
    if not kept:
        hint = _written_otherwise(wanted, there)
        raise UserError(
            f"{description} has none of the labels {listing(sorted(wanted))}: it has "
            f"{listing(sorted(there))}{hint}"
        )
    missing = wanted - there
    if hint := _written_otherwise(missing, there):
        raise UserError(f"{description} has not all of the labels {listing(sorted(wanted))}{hint}")
    if missing and absent is not None:
        told = (
            f"{description} has no examples of {listing(sorted(missing))}, which labels names: it has "
            f"{listing(sort_labels(there), 30)}"
        )
        if absent == "error":
            raise UserError(told)
        warn_once(told)
    if len(kept) < len(examples):
        logger.info(
            "%s: %d of %d examples have one of the labels wanted", description, len(kept), len(examples)
        )
    return kept


def _written_otherwise(wanted: set[str], there: set[str]) -> str:
    """A hint at labels that are there in another case, width or spacing."""
    close = [(a, b) for a in sorted(wanted) for b in sorted(there) if a != b and folded(a) == folded(b)]
    return f"; {close[0][0]!r} is written {close[0][1]!r} there" if close else ""


def _say_alike(examples: ExampleSet) -> None:
    groups = alike(examples.label_counts())
    if groups:
        shown = listing(" and ".join(map(repr, group)) for group in groups)
        warn_once(
            f"{examples.description} has labels that differ only in case, width, white space or what cannot "
            f"be seen, each a class of its own: {shown}"
        )
