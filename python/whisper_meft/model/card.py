"""The README.md that is saved beside a trained model: a header for the model hub, and for people what the
model is for, what it was trained on, its scores and its limits.

What is not known when a model is saved stands between comments and is filled in later; all else is its
reader's to edit.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ..data.digest import digest_of
from ..data.examples import ExampleSet
from ..data.streaming import Stream
from ..data.windows import whole_recordings
from ..errors import UserError, markdown, one_line, printable
from ..files import check_writable, write_text

_TASKS = {
    "classification": ("audio-classification", "Audio Classification"),
    "transcription": ("automatic-speech-recognition", "Automatic Speech Recognition"),
}

# Of results files: the hub's name of a metric, how a card calls it, and what it is multiplied by.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy", 1),
    "mean_class_accuracy": ("recall", "Mean class accuracy (macro-averaged recall)", 1),
    "macro_f1": ("f1", "Macro-F1", 1),
    "normalized_wer": ("wer", "Word error rate after Whisper's normaliser, %", 100),
    "normalized_cer": ("cer", "Character error rate after Whisper's normaliser, %", 100),
}

# Of more classes the numbers of examples are told as a range.
_MOST_CLASSES = 30

_FRAME = 0.02  # seconds


def model_card(config: PreTrainedConfig, language: str | None = None, folder: Path | None = None) -> str:
    """The text of a ``README.md`` for a saved model.

    Args:
        config: a ``MeftModelConfig``. language: of a recogniser, by its name or code; None where it is not
            known. folder: the model's, in which its backbone may lie.
    """
    base, method = config.base_model_name_or_path, config.meft["method"]
    transcribes = config.task == "transcription"
    tag = _TASKS[config.task][0]
    local = base and Path(base).is_absolute()
    where = "" if not base or local else " in `backbone/`" if base == "backbone" else f", {markdown(base)}"
    if "reduction_factor" in config.meft:
        title = f"{method.upper()} side network"
        beside = "" if transcribes else " and classifier"
        of = f"Whisper, beside its {config.meft['placement']}" if transcribes else "Whisper encoder"
        what = (
            f"A {method.upper()} side network{beside} (reduction factor "
            f"{config.meft['reduction_factor']}) for a frozen {of}{where}."
        )
    else:
        target = config.meft.get("target")
        part = f" {target}" if target in ("encoder", "decoder") else ""
        of = f"Whisper{part}{where}" if transcribes else f"Whisper encoder{where}, and a classifier"
        title = f"Whisper {'recogniser' if transcribes else 'classifier'} trained by {method}"
        what = f"What method {method} trains of a {of}."
    hub_base = None if folder is not None and base and (folder / base).exists() else hub_name(base)
    known = {
        "language": _code(language) if transcribes else None,
        "base_model": hub_base,
        "base_model_relation": None if hub_base is None else _relation(method),
    }
    head = ModelCardData(
        library_name="whisper_meft",
        pipeline_tag=tag,
        tags=[tag, "whisper", method],
        **{name: value for name, value in known.items() if value is not None},
    )
    lines = ["---", head.to_yaml(), "---", "", f"# {title}", "", what, "", "## Intended use", ""]
    lines += _use_of_a_recogniser(config, language) if transcribes else _use_of_a_classifier(config)
    name = "MeftForConditionalGeneration" if transcribes else "MeftModel"
    command = "whisper-meft predict path/or/name/of/this/folder recordings/"
    lines += [
        "```python",
        f"from whisper_meft import {name}",
        "",
        f'model = {name}.from_pretrained("path/or/name/of/this/folder")',
        "```",
        "",
        f"or `{command}`. It needs its backbone{where}, which is loaded with it.",
        "",
        "## Data",
        "",
        *_section("data", "Not recorded."),
        "",
        "## Scores",
        "",
        *_section("scores", "None yet."),
        "",
        "## Limits",
        "",
        *(_LIMITS_OF_A_RECOGNISER if transcribes else _section("calibration", _calibration(config))),
        "- The scores hold for speech like that which they were measured on; with other rooms, microphones, "
        "noise, ages and ways of speaking they can be worse.",
        "- The licence of these weights is for whoever publishes them to say; the backbone's and the data's "
        "hold beside it.",
        "",
    ]
    return "\n".join(lines)


def _section(name: str, text: str) -> list[str]:
    return [f"<!-- {name} -->", text, f"<!-- end of {name} -->"]


def _window(config: PreTrainedConfig) -> str:
    most = config.meft.get("max_frames")
    seconds = (most if isinstance(most, int) else config.max_source_positions) * _FRAME
    return f"{seconds:g} s"


def _use_of_a_classifier(config: PreTrainedConfig) -> list[str]:
    heard = (
        "padded to that length" if config.meft.get("max_frames") == "fidelity" else "heard without padding"
    )
    return [
        f"Tells which of {config.num_labels} classes a recording of speech belongs to. It hears at most "
        f"{_window(config)} at a time, longer recordings in windows of that; shorter ones are {heard}.",
        "",
        f"Labels: {', '.join(markdown(v) for v in config.id2label.values())}.",
        "",
        "A class is how a clip sounds. It is no evidence of where a speaker comes from, nor of who they are, "
        "and nothing should be decided about a person by it alone.",
        "",
    ]


def _use_of_a_recogniser(config: PreTrainedConfig, language: str | None) -> list[str]:
    said = f" in the language {markdown(_code(language) or language)}" if language else ""
    return [f"Writes down what is said{said}; it hears at most {_window(config)} at a time.", ""]


def _calibration(config: PreTrainedConfig) -> str:
    """What a classifier's probabilities mean, as two items of a list."""
    temperature, threshold = config.calibration_temperature, config.rejection_threshold
    calibrated = f"are divided by the temperature {temperature:.4g}" if temperature else "are not calibrated"
    rejects = f"; `--reject_below saved` rejects below {threshold:.4g}" if threshold is not None else ""
    items = [
        "- Every recording gets one of the classes, also silence, music and speech of none of them"
        f"{rejects or ', unless `--reject_below` is given'}.",
        f"- Logits {calibrated}: a probability is how sure the model is, "
        f"{'as measured on the calibration data' if temperature else 'not how often it is right'}.",
    ]
    return "\n".join(items)


_LIMITS_OF_A_RECOGNISER = [
    "- As every Whisper, it can write what nobody said, above all of silence, noise and music, and names and "
    "numbers wrongly.",
]


def _relation(method: str) -> str:
    """How the hub says that a model comes from its base: weights of the base's own, or beside them."""
    return "finetune" if method in ("full", "bitfit", "mezo") else "adapter"


def _code(language: str | None) -> str | None:
    """The ISO 639 code of a language as Whisper names it; None for anything else."""
    if language is None:
        return None
    word = str(language).strip("<|> ").lower()
    code = TO_LANGUAGE_CODE.get(word, word)
    return code if re.fullmatch("[a-z]{2,3}", code) else None


def hub_name(name: Any) -> str | None:
    """``name`` where it can be that of a repository on the hub, user and all, and is no local folder."""
    if not isinstance(name, str) or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


# ---------------------------------------------------------------- data and scores


@dataclass(frozen=True)
class DataUsed:
    """A set of examples as a card tells of it: those that were cut into windows count as one recording.

    Attributes:
        name: where it is from, without folders above it. hub_name: of the data set on the hub, or None.
        count: examples, None where a stream was not counted. seconds: of all of them, or None. speakers:
            their number, 0 where not known.
        classes: examples of each class. digest: of what is listed of them
            (:func:`whisper_meft.data.digest.digest_of`); "" of a stream.
    """

    name: str
    hub_name: str | None
    count: int | None
    seconds: float | None
    speakers: int
    classes: dict[str, int]
    digest: str = ""

    @classmethod
    def of(cls, examples: ExampleSet | Stream) -> "DataUsed":
        """Of a set that was read, or of a stream as far as it is known."""
        names = without_folders(examples.description), _hub_data(examples.description)
        if isinstance(examples, Stream):
            return cls(*names, examples.size, None, 0, dict(sorted((examples.counts or {}).items())))
        examples = whole_recordings(examples)
        seconds = [example.seconds for example in examples]
        return cls(
            *names,
            len(examples),
            None if None in seconds else sum(seconds),
            len(examples.speakers()),
            dict(sorted(examples.label_counts().items())),
            digest_of(examples),
        )

    def as_text(self) -> str:
        """A sentence, without a full stop."""
        parts = ["a stream that was not counted" if self.count is None else f"{self.count} examples"]
        if self.seconds is not None:
            hours = self.seconds / 3600
            parts.append(f"{hours:.1f} hours" if hours >= 1 else f"{self.seconds / 60:.1f} minutes")
        if self.speakers:
            parts.append(f"{self.speakers} speakers")
        return f"{markdown(self.name)}: {', '.join(parts)}"


def without_folders(description: str) -> str:
    """A description of data in which a path that is absolute, or begins with dots, is cut down to its last
    part."""
    description = re.sub(r"(?<![\w.~:/-])\.{1,2}/(?:[^/\n()]*/)*([^/\n()]+)", r"\1", description)
    return re.sub(r"(?<![\w.~:/-])~?/(?:[^/\n()]*/)*([^/\n()]+)", r"\1", description)


def _hub_data(description: str) -> str | None:
    found = re.fullmatch(r"(?:(?:training|validation) part of )?(\S+?)(?: \([^()]*\))?", description)
    return hub_name(found[1]) if found else None


def describe_data(
    training: ExampleSet | Stream,
    evaluation: ExampleSet | None,
    left_out: int,
    note: str,
    run: Mapping[str, Any],
) -> str:
    """What a model was trained and chosen on, and how, as Markdown.

    Args:
        training, evaluation: the examples. left_out: how many could not be used. note: how the evaluation
            data came to be. run: the content of ``train_results.json``.
    """
    used, windows = DataUsed.of(training), run.get("windows")
    lines = [f"Trained on {used.as_text()}{_cut(training, windows)}."]
    if left_out:
        lines[0] += f" {left_out} examples could not be used and were left out."
    counts, weights = used.classes, run.get("class_weights") or {}
    if counts and len(counts) <= _MOST_CLASSES:
        heads = ["class", "examples", *(["weight in the loss"] if weights else [])]
        lines += ["", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        for name, count in counts.items():
            cells = [markdown(name), str(count), *([f"{weights[name]:.4g}"] if weights else [])]
            lines.append(f"| {' | '.join(cells)} |")
    elif counts:
        lines[0] += f" {len(counts)} classes of {min(counts.values())} to {max(counts.values())} examples."
    if evaluation is not None:
        evaluated = f"{DataUsed.of(evaluation).as_text()}{_cut(evaluation, windows)}"
        lines += ["", f"Evaluated after training on {evaluated}; {markdown(note)}."]
    options = {name: value for name, value in run["method"].items() if value is not None and name != "method"}
    told = ", ".join(f"{name} {markdown(value)}" for name, value in options.items())
    epochs = run.get("epochs")
    lines += [
        "",
        f"Method {run['method']['method']} ({told}); {run['steps']} steps"
        f"{'' if epochs is None else f', {epochs:.4g} epochs'}, learning rate {run['learning_rate']:g}; "
        f"{run['trainable_parameters']:,} of {run['all_parameters']:,} parameters trained.",
        *(f"{line}." for line in _how_trained(run)),
    ]
    return "\n".join(lines)


def _cut(examples: ExampleSet | Stream, windows: Mapping[str, float] | None) -> str:
    """How examples were cut, to stand behind how many there are; nothing where they were not."""
    if windows is None or isinstance(examples, Stream):
        return ""
    return f"; cut into {len(examples)} windows of {windows['length']:g} s, one every {windows['hop']:g} s"


def _how_trained(run: Mapping[str, Any]) -> list[str]:
    """What else decides what is learnt, in sentences without full stops; nothing of what is as usual."""
    lines = []
    if run.get("loss") == "focal":
        lines.append(f"The loss is the focal loss with gamma {run['focal_gamma']:g}")
    if values := (run.get("class_weights") or {}).values():
        lines.append(f"Classes have weights of {min(values):.4g} to {max(values):.4g} in the loss")
    if (run.get("batches") or {}).get("sampling") == "balanced":
        lines.append("In an epoch each class comes equally often")
    if augmentation := run.get("augmentation"):
        kinds = [f"{name} ({share:.0%})" for name, share in augmentation["kinds"].items()]
        copies = run.get("cache_copies")
        options = {name: value for name, value in augmentation.items() if name not in ("kinds", "seed")}
        for name in ("noise_dir", "room_dir"):
            if name in options:
                options[name] = Path(options[name]).name
        told = [f"{markdown(name)} {markdown(value)}" for name, value in options.items()]
        behind = f" ({', '.join(told)})" if told else ""
        lines.append(
            f"Training clips were augmented by {', '.join(kinds)}"
            f"{f' in {copies} copies of each' if copies else ''}{behind}"
        )
    return lines


def results_of(config: PreTrainedConfig, examples: ExampleSet, scores: Mapping[str, Any]) -> list[EvalResult]:
    """Scores on labelled examples in the hub's form: accuracy, recall and F1 from 0 to 1, error rates in %.

    Args:
        config: the model's. examples: that were scored. scores: as in ``eval_results.json``.
    """
    tag, name = _TASKS[config.task]
    data, found = DataUsed.of(examples), []
    for key, (metric, shown, factor) in _METRICS.items():
        value = scores.get(key)
        value = value.get("rate") if isinstance(value, Mapping) else value
        if value is None or not math.isfinite(value):
            continue
        found.append(
            EvalResult(
                task_type=tag,
                task_name=name,
                dataset_type=data.hub_name or "local",
                dataset_name=f"{printable(data.name)}, {scores['count']} examples",
                # The hub tells data apart by this, not by the name; two sets may have the same.
                dataset_config=f"{printable(data.name)} {data.digest}",
                metric_type=metric,
                metric_name=shown,
                metric_value=round(factor * float(value), 6),
            )
        )
    return found


def with_results(
    text: str,
    name: str,
    results: Sequence[EvalResult],
    data: str | None = None,
    hub_data: str | None = None,
    afresh: bool = False,
) -> str:
    """A card's text with scores, which take the places of earlier ones on the same data, in its header and in
    the section between the comments, and with what is known of the data.

    Args:
        text: of a card that :func:`model_card` made and a person may have edited. name: of the model.
        results: of :func:`results_of`. data: of :func:`describe_data`; None leaves what is there.
        hub_data: name of the training data on the hub. afresh: drop the scores that there are, which are of
            other weights.

    Raises:
        UserError: the card has no such sections, or its header cannot be read.
    """
    try:
        card = ModelCard(text)
        earlier = card.data.eval_results or []
    except Exception as error:  # whatever YAML's and the hub's own checks raise
        raise UserError(f"its header cannot be read: {one_line(error)}") from error
    replaced = {each.unique_identifier for each in results}
    kept = [] if afresh else [each for each in earlier if each.unique_identifier not in replaced]
    everything = [*kept, *results]
    none = "None yet." if afresh else None
    body = _filled(card.text, "scores", _scores_table(everything) if everything else none)
    if afresh:
        card.data.eval_results = None
    if everything:
        card.data.model_name = card.data.model_name or printable(name)
        card.data.eval_results = everything
        metrics = [*(card.data.metrics or []), *(each.metric_type for each in results)]
        card.data.metrics = list(dict.fromkeys(metrics))
    if hub_data is not None:
        card.data.datasets = [hub_data]
    body = _filled(body, "data", data)
    return f"---\n{card.data.to_yaml()}\n---\n{body}"


def _filled(body: str, name: str, content: str | None) -> str:
    """The page with ``content`` in a section; None leaves what is there."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, after = body.partition(start)
    if body.count(start) != 1 or after.count(end) != 1:
        raise UserError(f"it has no one place for them, between {start} and {end}")
    inside, _, after = after.partition(end)
    inside = inside if content is None else f"\n{content}\n"
    return f"{before}{start}{inside}{end}{after}"


def _scores_table(results: Sequence[EvalResult]) -> str:
    lines = ["| data | score | value |", "|---|---|---:|"]
    for each in results:
        value = each.metric_value
        shown = f"{value:.4g}" if isinstance(value, int | float) else markdown(value)
        score = markdown(each.metric_name or each.metric_type)
        lines.append(f"| {markdown(each.dataset_name)} | {score} | {shown} |")
    return "\n".join(lines)


def write_results_into_card(
    folder: Path,
    config: PreTrainedConfig,
    results: Sequence[EvalResult],
    data: str | None = None,
    hub_data: str | None = None,
    afresh: bool = False,
) -> None:
    """:func:`with_results` of the README.md in a model's folder, which is made where there is none.

    Raises:
        UserError: it cannot be read, changed or written.
    """
    write_text(folder / "README.md", _with_results(folder, config, results, data, hub_data, afresh))


def calibrated_card(folder: Path, config: PreTrainedConfig) -> str | None:
    """The README.md of a model's folder that says what its probabilities mean now; None where there is none,
    or none that has a place for it.

    Raises:
        UserError: it cannot be read, or has more than one place.
    """
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
        return _filled(text, "calibration", _calibration(config)) if "<!-- calibration -->" in text else None
    except (OSError, ValueError) as error:
        raise UserError(f"the calibration cannot be written into {path}: {one_line(error)}") from error


def check_card(folder: Path, config: PreTrainedConfig) -> None:
    """Raises UserError where :func:`write_results_into_card` would."""
    _with_results(folder, config, [])
    check_writable(folder / "README.md")


def _with_results(folder: Path, config: PreTrainedConfig, *given: Any) -> str:
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else model_card(config, folder=folder)
        return with_results(text, folder.resolve().name, *given)
    except (OSError, ValueError) as error:
        raise UserError(f"scores cannot be written into {path}: {one_line(error)}") from error
