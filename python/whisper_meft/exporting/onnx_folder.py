"""A trained classifier as a folder with an ONNX graph, compared with PyTorch before anybody sees it."""

import copy
import importlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.dataset import Collator, SpeechDataset
from ..data.examples import Example, ExampleSet
from ..data.features import window_of
from ..errors import UserError
from ..evaluation.classifier import Classifier
from ..files import write_json
from ..model.whole_folder import whole_folder
from .earlier import DESCRIPTION, MODEL, of_earlier_export
from .graph import ClassifierGraph, WaveformGraph

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# Between the graph's probabilities and PyTorch's.
LARGEST_DIFFERENCE = 1e-4

_OPSET = 18  # of 2022: what every runtime in use has

# Clips that are run at a time where the graph is compared: more than one, so that padding is too.
_TOGETHER = 2


@dataclass(frozen=True)
class Difference:
    """Between the probabilities of PyTorch and those of a graph.

    Attributes:
        clips: that were compared. largest: of one probability. labels: clips whose most probable class
            changes.
    """

    clips: int
    largest: float
    labels: int


def require(packages: tuple[str, ...]) -> None:
    """Raises UserError unless all of the extra ``export`` is there."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"export needs the {name} package: pip install {name}") from error


def export_onnx(
    classifier: Classifier,
    folder: str | os.PathLike,
    examples: ExampleSet | None = None,
    features: bool = False,
    quantize: bool = False,
    external_data: bool | None = None,
) -> tuple[Difference, Difference | None]:
    """Writes ``model.onnx`` and ``model.json``, which says what goes in and what comes out.

    Args:
        classifier: on the CPU, weights in float32 and not quantised.
        folder: what is written; the files of an earlier export as ONNX in it go.
        examples: recordings on which the graph is compared with PyTorch; None makes some up.
        features: the graph takes log-mel in place of waveforms.
        quantize: the encoder's linear layers, but for the first layer's, multiply in int8 with scales that
            are found as they run.
        external_data: whether weights go to a file of their own; None: where the graph is too large for one.

    Returns:
        How far the probabilities are from PyTorch's, and how far those of int8 are, if asked for.

    Raises:
        UserError: a package is missing, the model cannot be exported, the graph differs by more than
            ``LARGEST_DIFFERENCE``, or the folder cannot be written.
    """
    require(PACKAGES)
    model = classifier.model
    if model.encoder.quantization is not None or model.encoder.dtype != torch.float32:
        raise UserError(
            f"export needs weights in float32, got {model.encoder.quantization or model.encoder.dtype}: load "
            "the model with dtype='float32' and quantization='none'"
        )
    examples = made_up(classifier) if examples is None else examples
    beginning = copy.copy(classifier)
    beginning.windows = None  # of a longer recording the graph hears the beginning
    expected = beginning.probabilities(examples)
    program = _program(classifier, features)
    linears = _encoder_linears(program.model)
    if quantize and not linears:
        raise UserError(
            "quantize: the graph holds no layer of the encoder but the first, which stays in float32: leave "
            "it out"
        )
    with whole_folder(folder, of_earlier_export(Path(folder))) as beside:
        path, description = beside / MODEL, _description(classifier, features)
        _describe(program.model, description)
        program.save(path, external_data=external_data)
        del program
        plain = _difference(expected, path, classifier, examples, features)
        if not plain.largest <= LARGEST_DIFFERENCE:
            raise UserError(
                f"the graph's probabilities differ from PyTorch's by up to {plain.largest:.2g}, more than "
                f"{LARGEST_DIFFERENCE:g}: nothing was written"
            )
        rounded = None
        if quantize:
            _quantize(path, linears)
            rounded = _difference(expected, path, classifier, examples, features)
        differences = {"float32": plain.largest} | ({} if rounded is None else {"int8": rounded.largest})
        write_json(
            beside / DESCRIPTION,
            {**description, "quantization": "int8" if quantize else None, "largest_difference": differences},
        )
    return plain, rounded


def made_up(classifier: Classifier) -> ExampleSet:
    """Sounds with the pitch and the pauses of a voice: a short one, a longer one, and a window's full."""
    rate, generator = classifier.feature_extractor.sampling_rate, np.random.default_rng(0)
    examples = []
    for index, share in enumerate((0.07, 0.4, 1.0)):
        samples = max(1, int(share * _max_samples(classifier)))
        time = np.arange(samples) / rate
        phase = 2 * np.pi * np.cumsum(150 + 40 * np.sin(2 * np.pi * (0.3 + 0.2 * index) * time)) / rate
        wave = sum(np.sin(k * phase + index) / k for k in range(1, 12)) * np.sin(2 * np.pi * 1.7 * time) ** 2
        wave = 0.1 * wave + 0.003 * generator.standard_normal(samples)
        sound = {"array": wave.astype(np.float32), "sampling_rate": rate}
        examples.append(Example(audio=sound, name=f"made-up sound {index + 1}"))
    return ExampleSet(examples, "made-up sounds")


def _max_samples(classifier: Classifier) -> int:
    extractor = classifier.feature_extractor
    return window_of(extractor, classifier.max_frames) * extractor.hop_length


def _description(classifier: Classifier, features: bool) -> dict[str, Any]:
    """What whoever runs the graph has to know."""
    config, extractor = classifier.model.config, classifier.feature_extractor
    return {
        "method": classifier.model.meft_config.method,
        "labels": classifier.labels,
        "input": "input_features" if features else "waveform",
        "sampling_rate": extractor.sampling_rate,
        "max_samples": _max_samples(classifier),
        "mel_bins": config.num_mel_bins,
        "max_frames": classifier.max_frames,
        "calibration_temperature": config.calibration_temperature,
        "rejection_threshold": config.rejection_threshold,
    }


def _describe(model: Any, description: dict[str, Any]) -> None:
    """The description goes into the graph too; what torch notes there of its making, paths among it, goes."""
    for each in (model, model.graph, *model.graph, *model.graph.inputs, *model.graph.outputs):
        each.metadata_props.clear()
        each.doc_string = None
    for name, value in description.items():
        model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)


def _program(classifier: Classifier, features: bool) -> Any:
    """The graph, a ``torch.onnx.ONNXProgram``.

    Raises:
        UserError: torch cannot make one.
    """
    model, extractor = classifier.model, classifier.feature_extractor
    graph, whole = ClassifierGraph(model), classifier.max_frames == "fidelity"
    window = window_of(extractor, classifier.max_frames)
    frames = torch.tensor([window, max(1, window // 3)])
    if not features:
        module = WaveformGraph(graph, extractor).eval()
        example = torch.zeros(2, window // 2 * extractor.hop_length + 7), frames * (extractor.hop_length // 2)
        shapes = ({0: "batch", 1: "samples"}, {0: "batch"})
        names = ["waveform", "samples"]
    elif whole:
        module, example = graph, (torch.zeros(2, model.config.num_mel_bins, window), None)
        shapes, names = ({0: "batch"}, None), ["input_features"]
    else:
        module, example = graph, (torch.zeros(2, model.config.num_mel_bins, window // 2 + 1), frames // 2 + 1)
        shapes, names = ({0: "batch", 2: "frames"}, {0: "batch"}), ["input_features", "frames"]
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=names,
                output_names=["probabilities", "logits"],
                opset_version=_OPSET,
                verbose=False,
            )
    except Exception as error:  # whatever torch's exporter meets
        raise UserError(
            f"torch {torch.__version__} cannot make an ONNX graph of this model: {_cause(error)}"
        ) from error
    return program


def _cause(error: BaseException) -> str:
    """The first line of what began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to programmers that the libraries give."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _encoder_linears(model: Any) -> list[str]:
    """Names of the products with weights in the encoder's layers, but the first's: on pretrained Whisper that
    layer's rounding error grows through all others."""
    names = []
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        if node.op_type == "MatMul" and ".layers." in scopes and ".layers.0." not in scopes:
            names.append(node.name)
    return names


def _quantize(path: Path, names: list[str]) -> None:
    """Rounds the weights of these nodes of the graph at ``path``, which it replaces."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = path.parent / "float32"
    whole.mkdir()
    data = path.with_name(f"{path.name}.data")  # whose name the graph holds
    external = data.exists()
    for each in (path, data) if external else (path,):
        each.rename(whole / each.name)
    with _quiet():
        quantize_dynamic(
            whole / path.name,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=names,
            per_channel=True,
            reduce_range=True,  # or the sums of pairs saturate on processors without VNNI, and say nothing
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
        )
    shutil.rmtree(whole)


def _difference(
    expected: np.ndarray, path: Path, classifier: Classifier, examples: ExampleSet, features: bool
) -> Difference:
    """Of the graph at ``path`` from the probabilities that PyTorch gives, ``expected`` (clips, classes)."""
    found = run_onnx(path, classifier, examples, features)
    same = np.isnan(found) == np.isnan(expected)  # what is NaN in both is alike
    distance = np.where(same, np.nan_to_num(np.abs(found - expected)), np.inf)
    changed = int((found.argmax(-1) != expected.argmax(-1)).sum())
    return Difference(len(expected), float(distance.max()), changed)


def run_onnx(
    path: str | os.PathLike, classifier: Classifier, examples: ExampleSet, features: bool
) -> np.ndarray:
    """The graph's probabilities (clips, classes), by onnxruntime on the CPU, of examples as they are read."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    give = _features if features else _waveforms
    rows = []
    for start in range(0, len(examples), _TOGETHER):
        given = give(classifier, examples.select(range(start, min(start + _TOGETHER, len(examples)))))
        wanted = {each.name: given[each.name] for each in session.get_inputs()}
        rows.append(session.run(["probabilities"], wanted)[0])
    return np.concatenate(rows)


def _features(classifier: Classifier, examples: ExampleSet) -> dict[str, np.ndarray]:
    extractor, max_frames = classifier.feature_extractor, classifier.max_frames
    dataset = SpeechDataset(examples, extractor, None, max_frames)
    batch = Collator(extractor, max_frames)([dataset[index] for index in range(len(dataset))])
    frames = batch["attention_mask"].sum(-1)
    return {"input_features": batch["input_features"].numpy(), "frames": frames.numpy()}


def _waveforms(classifier: Classifier, examples: ExampleSet) -> dict[str, np.ndarray]:
    rate, longest = classifier.feature_extractor.sampling_rate, _max_samples(classifier)
    waves = [example.read(rate, longest=longest / rate + 0.1)[0] for example in examples]
    samples = np.array([len(wave) for wave in waves])
    stacked = np.full((len(waves), samples.max()), np.nan, np.float32)  # which the graph does not read
    for row, wave in zip(stacked, waves):
        row[: len(wave)] = wave
    return {"waveform": stacked, "samples": samples}
