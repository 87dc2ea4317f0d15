"""Hugging Face data sets: from the hub, ``save_to_disk`` folders, Parquet and Arrow files, or objects.

Audio columns are never decoded by ``datasets``, which needs torchcodec for it: they are cast to
``Audio(decode=False)`` and their files or bytes read by :func:`whisper_meft.audio.read_audio`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import LazyPackage, UserError
from ..once import warn_once
from . import columns
from .examples import DatasetCell, Example, listing, say_forms
from .folders import list_audio_files
from .manifests import splits_of_paths, table_examples
from .options import Options
from .paths import Paths
from .segments import Channels, Times
from .splits import Layout, Splits, SplitsOfRows, canonical_split, split_kinds

datasets = LazyPackage("datasets", "a Hugging Face data set")

_FEATURES = "input_features"  # the column of the published preprocessing, with `labels` beside it

_AUDIO = ("audio", *columns.AUDIO)

_TEXT_OR_CLASS = ("string", "large_string", "int8", "int16", "int32", "int64")  # of a class the number

_NAMES = (
    "id",
    "ID",
    "utt_id",
    "utterance_id",
    "audio_id",
    "segment_id",
    "seg_id",
    "SegmentID",
    "file_name",
    "path",
)


def opened(source: Any, load: Callable[[str, Options], Any], options: Options) -> tuple[str, Any]:
    """What a source is called, and the data that ``load`` makes of a path or a name; other sources are data.

    Raises:
        UserError: it cannot be loaded.
    """
    if not isinstance(source, str):
        return f"the given {type(source).__name__}", source
    try:
        return source, load(source, options)
    except UserError:
        raise
    except Exception as error:  # a library of many exceptions; all mean that this source cannot be loaded
        raise UserError(f"{source} cannot be loaded as a data set: {_reason(source, error)}") from error


def read_huggingface(source: Any, options: Options) -> Splits:
    """The splits of a data set; its audio stays on disk. Where it has none of its own, and a column names
    splits, they are that column's; without one a local table of paths has those that the paths lie in, as in
    CSV.

    Raises:
        UserError: it cannot be loaded.
    """
    shown, loaded = opened(source, _load, options)
    options = rooted(source, options)
    of_file = isinstance(source, str) and os.path.exists(source)
    if isinstance(loaded, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise UserError(f"{shown} is streamed; here its length is needed: load it without streaming=True")
    if isinstance(loaded, datasets.DatasetDict):
        if (only := without_splits(loaded)) is not None and (
            found := _divided(only, options, shown, of_file)
        ):
            return found
        return {
            name: (lambda d=d, name=name: _of_split(d, name, options, f"{shown} ({name})"))
            for name, d in loaded.items()
        }
    if not isinstance(loaded, datasets.Dataset):
        raise UserError(
            f"{shown} is a {type(loaded).__name__}, a datasets.Dataset or DatasetDict is accepted"
        )
    if options.split and "[" in options.split:
        return {options.split: lambda: _of_split(loaded, options.split, options, shown)}
    return _divided(loaded, options, shown, of_file) or {
        None: lambda: dataset_examples(loaded, options, shown)
    }


def rooted(source: Any, options: Options) -> Options:
    """The options with the folder that relative paths start from: that of a local file, or a local folder
    itself, where no other was given."""
    if options.data_root is not None or not isinstance(source, str) or not os.path.exists(source):
        return options
    return replace(options, data_root=source if os.path.isdir(source) else os.path.dirname(source))


def without_splits(loaded: Any) -> Any | None:
    """The data set among the splits of one whose only split is "train", as ``datasets`` calls what has none,
    or goes by no split's name; ``None`` for others."""
    name = next(iter(loaded)) if len(loaded) == 1 else None
    return loaded[name] if name == "train" or (name and canonical_split(name) is None) else None


def split_columns(features: Any) -> list[str]:
    """The columns that may say the split of each row: of text, or of classes of which one is called so."""
    usual = [name for name in features if columns.normal(name) in columns.SPLIT]
    return [
        name
        for name, each in features.items()
        if getattr(each, "dtype", None) in _TEXT_OR_CLASS
        and (name in usual or not isinstance(each, datasets.ClassLabel) or split_kinds(each.names))
    ]


def _split_column(dataset: Any, options: Options, where: str, say: bool = False) -> str | None:
    def values(name: str, most: int | None) -> list[str | None]:
        return _texts(dataset if most is None else dataset.take(min(most, len(dataset))), name)

    return columns.split_column(split_columns(dataset.features), options.columns(), values, where, say)


def _divided(dataset: Any, options: Options, where: str, of_file: bool) -> Splits | None:
    """The splits that a column of the data set names, or those that the paths in a file lie in (``of_file``);
    ``None`` where there are none."""
    column = _split_column(dataset, options, where, say=True)
    values = dict.fromkeys(_texts(dataset, column))
    there = [value for value in values if value is not None]
    by_paths = column is None and of_file
    if by_paths:
        values = dict.fromkeys(_splits_of_paths(dataset, options, where))
        if not values:
            return None
    elif not any(map(canonical_split, there)):
        if len(there) > 1:
            warn_once(f"{where}: its column {column!r} names no splits and is not used ({listing(there)})")
        return None
    pairs = cache(lambda: _divided_examples(dataset, options, where, by_paths))
    return SplitsOfRows(
        (value, lambda value=value: [example for part, example in pairs() if part == value])
        for value in values
    )


def _of_split(dataset: Any, split: str, options: Options, where: str) -> list[Example]:
    """The examples of one of the splits that a data set has; a warning where a column says another split."""
    column = _split_column(dataset, options, where)
    of = {value: canonical_split(value) for value in set(_texts(dataset, column)) - {None}}
    own, kinds = canonical_split(split), set(of.values()) - {None}
    if kinds - {own} if own else len(kinds) > 1:
        warn_once(
            f"{where}: its column {column!r} has {listing(sorted(of))}; it is not used, as the data set has "
            "splits of its own"
        )
    return dataset_examples(dataset, options, where)


def table_of(folder: Path) -> Path | None:
    """The one Parquet file of a folder of audio, whose table it is (``metadata.parquet``). ``datasets`` would
    take the folder for one of audio."""
    found = list(folder.rglob("*.parquet"))
    return found[0] if len(found) == 1 and found[0].parent == folder and list_audio_files(folder) else None


def say_unread(folder: Path, options: Options) -> None:
    """Warns of Parquet files in a folder that ``datasets`` leaves out, as it finds splits in the names of
    others. What a card (README.md) or a configuration chooses is meant."""
    files = [path for path in folder.rglob("*.parquet") if not path.name.startswith((".", "_"))]
    if len(files) < 2 or options.config is not None or (folder / "README.md").exists():
        return
    builder = datasets.load_dataset_builder(os.fspath(folder), cache_dir=options.cache_dir)
    read = {os.path.realpath(each) for part in (builder.config.data_files or {}).values() for each in part}
    unread = sorted(str(path.relative_to(folder)) for path in files if os.path.realpath(path) not in read)
    if unread and read:
        warn_once(
            f"{folder}: {listing(unread)} are not read, as others are called like splits "
            f"({listing(builder.config.data_files)}) and these are not"
        )


def _load(source: str, options: Options) -> Any:
    path = Path(source)
    if path.is_dir() and (table := table_of(path)):
        return _load(os.fspath(table), options)
    if path.is_file():
        if path.suffix.lower() == ".arrow":
            return datasets.Dataset.from_file(source)
        return datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=options.cache_dir)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return datasets.load_from_disk(source)
        if not any(path.rglob("*.parquet")) and any(path.glob("*.arrow")):
            parts = [datasets.Dataset.from_file(os.fspath(p)) for p in sorted(path.glob("*.arrow"))]
            return datasets.concatenate_datasets(parts)
        say_unread(path, options)
        return datasets.load_dataset(source, options.config, cache_dir=options.cache_dir)
    split = options.split if options.split and "[" in options.split else None
    return datasets.load_dataset(
        source,
        options.config,
        split=split,
        cache_dir=options.cache_dir,
        revision=options.revision,
        token=options.token,
    )


def _reason(source: str, error: Exception) -> str:
    chain, link = [], error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any("torchcodec" in str(link) for link in chain):
        if os.path.exists(source):
            return (
                "it is a folder of audio files, of which one table in Parquet beside them is read, or tables "
                "as metadata.csv or metadata.jsonl in its folders: write these"
            )
        return (
            "it is made of audio files that `datasets` reads with torchcodec only; download it "
            f"(`hf download --repo-type dataset {source} --local-dir DIR`) and give the folder"
        )
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text if os.path.exists(source) else f"{text} (and no local path has this name)"


def dataset_examples(dataset: Any, options: Options, where: str) -> list[Example]:
    """The examples of one ``datasets.Dataset``; rows are read when they are needed.

    Raises:
        UserError: no audio or label column, or columns of types that mean nothing here.
    """
    return [example for _, example in _divided_examples(dataset, options, where)]


def _splits_of_paths(dataset: Any, options: Options, where: str) -> list[str]:
    """The split that the path of each row lies in; nothing where these are no paths or name none."""
    audio = _audio_column(dataset, options, where)
    files = _files(dataset.with_format(None), audio)
    if files is None or None in files:
        return []
    return splits_of_paths(files, options, where) or []


def _divided_examples(
    dataset: Any, options: Options, where: str, by_paths: bool = False
) -> list[tuple[str | None, Example]]:
    """:func:`dataset_examples`, each with the split that a column says, or ``by_paths`` its path."""
    dataset = dataset.with_format(None)
    names = dataset.column_names
    audio = _audio_column(dataset, options, where)
    split = None if by_paths else _split_column(dataset, options, where)
    if (files := _files(dataset, audio)) is not None:
        layout = None if by_paths else "class"
        return _examples_of_files(dataset, audio, files, options, where, layout, split)
    find = columns.need_column if options.require_labels else columns.find_column
    label = find([n for n in names if n != audio], options.label_column, columns.LABEL, where)
    speaker = columns.find_column(names, options.speaker_column, columns.SPEAKER, where)
    texts = _transcripts(dataset, options, where)
    language = columns.language_column(names) if options.with_text else None
    if language and getattr(dataset.features[language], "dtype", "") in ("string", "large_string"):
        columns.say_languages(language, _texts(dataset, language), where)
    labels = _label_names(dataset, label, where)
    say_forms(labels, where)
    speakers = _texts(dataset, speaker)
    cells = _cells(dataset, audio, options, where)
    cuts = _cuts(dataset, audio, options, where)
    parts = _texts(dataset, split)
    return [
        (parts[i], Example(cell, label=labels[i], speaker=speakers[i], text=texts[i], **named, **cut))
        for i, ((cell, named), cut) in enumerate(zip(cells, cuts))
    ]


def _transcripts(dataset: Any, options: Options, where: str) -> list[str | None]:
    """The transcript of every row, ``None`` where they are not wanted or a row has none."""
    if not options.with_text:
        return [None] * len(dataset)
    column = columns.need_column(dataset.column_names, options.text_column, columns.TEXT, where)
    dtype = str(getattr(dataset.features[column], "dtype", dataset.features[column]))
    if dtype not in ("string", "large_string"):
        raise UserError(f"{where}: the text column {column!r} is of type {dtype}; text is accepted")
    return [(text or "").strip() or None for text in _texts(dataset, column)]


def _files(dataset: Any, audio: str) -> list[str] | None:
    """The paths of a column of paths, or of one of audio where rows share a file; ``None`` for others."""
    if getattr(dataset.features[audio], "dtype", None) in ("string", "large_string"):
        return _texts(dataset, audio)
    files = _paths_alone(dataset, audio)
    return files if files is not None and len(set(files)) < len(files) else None


def _paths_alone(dataset: Any, audio: str) -> list[str | None] | None:
    """The paths of a column of audio that holds these alone, and no sound; ``None`` for others."""
    if not isinstance(dataset.features[audio], datasets.Audio) or not len(dataset):
        return None
    flat = dataset.select_columns([audio]).cast_column(audio, datasets.Audio(decode=False)).flatten()
    stored, path = f"{audio}.bytes", f"{audio}.path"
    if path not in flat.column_names or (
        stored in flat.column_names and flat.data.column(stored).null_count < len(flat.data)
    ):
        return None
    return _texts(flat, path)


def _examples_of_files(
    dataset: Any,
    audio: str,
    files: list[str | None],
    options: Options,
    where: str,
    layout: Layout | None,
    split: str | None,
) -> list[tuple[str | None, Example]]:
    """The rows as those of a table of paths, whose columns may say which part of a file is meant. The paths
    name no splits where the layout is "class"; the column ``split`` does."""
    if None in files:
        raise UserError(f"{where}: row {files.index(None)} has no audio path in its column {audio!r}")
    plain = ("string", "large_string", "int", "uint", "float", "double", "decimal", "bool")
    types = {name: str(getattr(feature, "dtype", feature)) for name, feature in dataset.features.items()}
    names = [name for name, dtype in types.items() if name == audio or dtype.startswith(plain)]
    for name in (name for name in types if name not in names):
        if name in options.columns():
            raise UserError(
                f"{where}: the column {name!r} is of type {types[name]}; text and numbers are accepted"
            )
        if columns.names_a_part(name) or columns.normal(name) in (*columns.SPEAKER, *columns.SPLIT):
            warn_once(f"{where}: its column {name!r} is not used, as it is of type {types[name]}")
    find = columns.need_column if options.require_labels else columns.find_column
    label = find([n for n in dataset.column_names if n != audio], options.label_column, columns.LABEL, where)
    values = {audio: files, **{name: _texts(dataset, name) for name in names if name not in (audio, label)}}
    if label is not None:
        values[label] = _label_names(dataset, label, where)
    rows = enumerate([field or "" for field in row] for row in zip(*values.values()))
    given = replace(options, audio_column=audio, label_column=label, layout=layout)
    paths = Paths(options.data_root or "", where)
    return table_examples([*values], rows, given, where, paths, unit="row", split=split)


def _cuts(dataset: Any, audio: str, options: Options, where: str) -> list[dict[str, Any]]:
    """Segments and channels of audio that is in the data set, where their columns were named."""
    given = options.start_column, options.stop_column, options.channel_column
    if not any(given):
        # Sound that is in the data set was cut out of what such columns tell of before it was put there.
        timed = [name for name in dataset.column_names if columns.names_a_part(name)]
        if timed and _paths_alone(dataset, audio) is not None:
            warn_once(
                f"{where}: its column{'s'[: len(timed) > 1]} {listing(map(repr, timed))} may say which part "
                "of a file is meant; as each row has a file of its own they are heard whole unless such are "
                "named (--start_column_name, --stop_column_name, --channel_column_name)"
            )
        return [{}] * len(dataset)
    if audio == _FEATURES or _is_nested_list(dataset.features[audio]):
        raise UserError(f"{where}: features cannot be cut, {listing(filter(None, given))} cannot be used")
    names = [columns.find_column(dataset.column_names, name, (), where) for name in given if name is not None]
    rows = list(zip(*(_texts(dataset, name) for name in names)))
    times = Times(names, options, None, where)
    channels = Channels(names, options.channel_column, where)

    def field(row: tuple, name: str | None) -> str:
        return "" if name is None else row[names.index(name)] or ""

    channels.check((str(i), field(row, channels.column)) for i, row in enumerate(rows))
    cuts = []
    for i, row in enumerate(rows):
        start, stop, unit = times.of(row, field, f"{where}, row {i}")
        channel = channels.of(field(row, channels.column))
        cuts.append({"start": start, "stop": stop, "unit": unit, "channel": channel})
    return cuts


def _audio_column(dataset: Any, options: Options, where: str) -> str:
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Audio)]
    if options.audio_column is None and typed:
        known = typed[0] if len(typed) == 1 else columns.find_column(typed, None, _AUDIO, where)
        if known is None:
            raise UserError(
                f"{where} has several columns of audio ({listing(typed)}): name one with audio_column_name"
            )
        return known
    if options.audio_column is None and _FEATURES in dataset.column_names:
        return _FEATURES
    return columns.need_column(dataset.column_names, options.audio_column, _AUDIO, where)


def _cells(dataset: Any, audio: str, options: Options, where: str) -> list[tuple[Any, dict[str, str]]]:
    """(audio, names) of every row."""
    feature = dataset.features[audio]
    names = _row_names(dataset, audio, where)
    if audio == _FEATURES or _is_nested_list(feature):
        rows = dataset.select_columns([audio]).with_format("numpy")
        return [(DatasetCell(rows, i, audio, "features"), named) for i, named in enumerate(names)]
    if isinstance(feature, datasets.Audio):
        rows = dataset.select_columns([audio]).cast_column(audio, datasets.Audio(decode=False))
    elif isinstance(feature, dict) and set(feature) & {"bytes", "path", "array"}:
        rows = dataset.select_columns([audio])
    else:
        raise UserError(
            f"{where}: the column {audio!r} is of type {feature}; audio, paths, {{bytes, path}}, "
            "{array, sampling_rate} or input_features are accepted"
        )
    root = options.data_root or ""
    return [(DatasetCell(rows, i, audio, root=root), named) for i, named in enumerate(names)]


def _is_nested_list(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return isinstance(feature, datasets.Array2D) or getattr(inner, "feature", None) is not None


def _row_names(dataset: Any, audio: str, where: str) -> list[dict[str, str]]:
    """What messages call each row, and its name inside the data set (``name`` and ``inside`` of an example).
    Paths inside data sets are often bare file names, so the row is added."""
    feature = dataset.features[audio]
    texts: list[str | None] = [None] * len(dataset)
    ids = next((name for name in _NAMES if name in dataset.column_names and name != audio), None)
    if isinstance(feature, datasets.Audio):
        # Flattened, the paths can be read without the bytes beside them.
        flat = dataset.select_columns([audio]).cast_column(audio, datasets.Audio(decode=False)).flatten()
        if f"{audio}.path" in flat.column_names:
            texts = _texts(flat, f"{audio}.path")
    if ids is not None and all(text is None for text in texts):
        texts = _texts(dataset, ids)
    named = []
    for i, text in enumerate(texts):
        folder, file = os.path.split(text or "")
        inside = os.path.join(folder, f"row {i}, {file}")
        named.append({"name": f"row {i} of {where}" + (f", {text}" if text else ""), "inside": inside})
    return named


def _column(dataset: Any, name: str) -> list[Any]:
    """One column as Python values, without touching the others; order and selection of the data set apply."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()


def _texts(dataset: Any, name: str | None) -> list[str | None]:
    if name is None:
        return [None] * len(dataset)
    feature = dataset.features[name]
    if isinstance(feature, datasets.ClassLabel):
        return _label_names(dataset, name, name)
    return [columns.value_as_text(value) for value in _column(dataset, name)]


def _label_names(dataset: Any, name: str | None, where: str) -> list[str | None]:
    """Labels as names: a ClassLabel's own, text as it is, integers in digits."""
    if name is None:
        return [None] * len(dataset)
    return label_names(_column(dataset, name), name, dataset.features, where)


def label_names(values: list[Any], name: str, features: Any, where: str) -> list[str | None]:
    """The values of a column of labels as names: a ClassLabel's own, text as it is, integers in digits, none
    for NaN.

    Args:
        name: of the column. features: of all columns. where: what messages call the data set.

    Raises:
        UserError: no such labels.
    """
    feature = features[name]
    if isinstance(feature, datasets.ClassLabel):
        known = feature.names
        wrong = [value for value in values if value is not None and not -1 <= value < len(known)]
        if wrong:
            raise UserError(
                f"{where}: label id {wrong[0]} in column {name!r}, which has {len(known)} classes"
            )
        return [None if value is None or value < 0 else known[value] for value in values]
    dtype = str(getattr(feature, "dtype", feature))
    floats = dtype.startswith("float") and all(
        value is None or math.isnan(value) or float(value).is_integer() for value in values
    )
    if floats or dtype in ("string", "large_string") or dtype.startswith(("int", "uint", "bool")):
        return [columns.value_as_text(value) for value in values]
    raise UserError(
        f"{where}: the label column {name!r} is of type {dtype}; text, integers or ClassLabel are accepted "
        f"(columns: {listing(features, 30)})"
    )
