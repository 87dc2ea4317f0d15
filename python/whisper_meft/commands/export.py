"""`whisper-meft export`: trained models for runtimes without PyTorch, ONNX and CTranslate2."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.examples import Example, ExampleSet
from ..errors import UserError, printable
from ..evaluation.classifier import Classifier
from ..evaluation.loaded import load_trained
from ..exporting import ctranslate2_folder, earlier, onnx_folder
from ..files import check_writable
from ..model.backbone import resolve_backbone
from ..model.kinds import kind_of
from ..model.pretrained import load_feature_extractor, load_tokenizer
from ..model.transcription import MeftForConditionalGeneration
from ..model.weights import WEIGHT_FILES
from ..options.inference import InferenceArguments
from ..options.parser import Parser, UsageError
from .predict import find_audio


@dataclass
class ExportArguments:
    """What to write."""

    _argument_group_name = "export"

    format: Literal["onnx", "ctranslate2"] = field(
        default="onnx",
        metadata={
            "help": "onnx, of models that classify; ctranslate2, of models that transcribe and can be merged "
            "into a plain Whisper"
        },
    )
    quantize: Literal["int8"] | None = field(
        default=None,
        metadata={
            "help": "int8: the weights of linear layers in 8 bits; of onnx those of the encoder's layers but "
            "the first, multiplied in int8 (dynamic quantisation)"
        },
    )
    graph_input: Literal["waveform", "features"] = field(
        default="waveform",
        metadata={
            "help": "what the onnx graph takes: waveforms, whose log-mel it makes, or log-mel features"
        },
    )
    compare_on: list[str] | None = field(
        default=None,
        metadata={
            "help": "recordings, files and folders, on which the onnx graph is compared with PyTorch "
            "(default: three sounds that are made up)"
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "write into OUT even if it holds something; an earlier export goes"}
    )
    backbone: str | None = field(
        default=None, metadata={"help": "backbone to use instead of the one that the model names"}
    )
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "feature extractor, if not the one saved with the model"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer, if not the one saved with the model; of ctranslate2"}
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "export a unipt model with another attention: exact, pooled:p, linear or summary "
            "(default: as in training)"
        },
    )

    def __post_init__(self):
        if self.format == "ctranslate2":
            for name, usual in (("graph_input", "waveform"), ("compare_on", None), ("attention", None)):
                if getattr(self, name) != usual:
                    raise UsageError(f"--{name} is for --format onnx")
        elif self.tokenizer_name is not None:
            raise UsageError("--tokenizer_name is for --format ctranslate2")

    def loading(self) -> InferenceArguments:
        """How the model is loaded: in full precision, on the CPU."""
        return InferenceArguments(
            backbone=self.backbone,
            feature_extractor_name=self.feature_extractor_name,
            backbone_dtype="float32",
            backbone_quantization="none",
            attention=self.attention,
            device="cpu",
            batch_size=1,
        )


def make_parser() -> Parser:
    """The parser of `whisper-meft export`."""
    parser = Parser(
        "export",
        (ExportArguments,),
        usage="MODEL_DIR OUT [options]",
        description="Writes a trained model for a runtime that needs no PyTorch. --format onnx: a model that "
        "classifies, of any method, as OUT/model.onnx, encoder, side network and head in one graph from "
        "waveform to probabilities, with OUT/model.json to say what goes in and comes out. --format "
        "ctranslate2: a model that transcribes, merged. What was written is compared with PyTorch first.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder (or hub name) of a trained model")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    return parser


def run(argv: Sequence[str]) -> int:
    """`whisper-meft export`; returns the exit status."""
    arguments, where = make_parser().parse(argv)
    # Whole, because the folder takes the place of an earlier one, which another way to it may lead through.
    kind, out = kind_of(where.model_dir), Path(os.path.realpath(where.out))
    if kind == "whisper":
        raise UserError(
            f"MODEL_DIR: {where.model_dir} is a plain Whisper, which ct2-transformers-converter and optimum "
            "export; a model that this library trained is needed"
        )
    if arguments.format == "onnx" and kind == "transcription":
        raise UserError(
            f"--format onnx is for models that classify, and {where.model_dir} transcribes: --format "
            "ctranslate2 is for those, where the method can be merged"
        )
    if arguments.format == "ctranslate2" and kind == "classification":
        raise UserError(
            f"--format ctranslate2 is for models that transcribe, and {where.model_dir} classifies: --format "
            "onnx is for those"
        )
    if Path.cwd().is_relative_to(out):
        raise UserError(f"OUT: {out} is the folder that you are in, or above it; name another")
    if os.path.realpath(out) == os.path.realpath(resolve_backbone(where.model_dir)):
        raise UserError(f"OUT: {out} is the model itself; name another folder")
    held = [each.name for each in out.iterdir()] if out.is_dir() else []
    if weights := next((name for name in held if name in WEIGHT_FILES), None):
        raise UserError(f"OUT: {out} holds a model ({weights}), which would go; name another folder")
    if held and not arguments.overwrite:
        raise UserError(f"OUT: {out} is not empty; name another folder, or add --overwrite")
    if arguments.format == "onnx" and earlier.holds_converted(out):
        raise UserError(f"OUT: {out} holds a model for CTranslate2 ({earlier.WEIGHTS}); name another folder")
    check_writable(out / earlier.DESCRIPTION)
    if arguments.format == "onnx":
        _onnx(where.model_dir, out, arguments)
    else:
        _ctranslate2(where.model_dir, out, arguments)
    return 0


def _onnx(model_dir: str, out: Path, arguments: ExportArguments) -> None:
    onnx_folder.require(onnx_folder.PACKAGES)
    classifier = Classifier.load(model_dir, arguments.loading(), progress=sys.stderr.isatty())
    examples = None
    if arguments.compare_on is not None:
        files = find_audio(arguments.compare_on)
        examples = ExampleSet([Example(audio=file, name=file) for file in files], "the recordings")
        examples, _ = classifier.check(examples, strict=True)
    plain, rounded = onnx_folder.export_onnx(
        classifier,
        out,
        examples,
        features=arguments.graph_input == "features",
        quantize=arguments.quantize == "int8",
    )
    clips = f"{plain.clips} {'made-up sounds' if examples is None else 'recordings'}"
    line = f"probabilities within {plain.largest:.1g} of PyTorch's on {clips}"
    if rounded is not None:
        line += f"; in int8 within {rounded.largest:.2g}, {rounded.labels} of {rounded.clips} labels change"
    print(f"wrote {printable(out / earlier.MODEL)}, {_mebibytes(out)}: {line}")


def _ctranslate2(model_dir: str, out: Path, arguments: ExportArguments) -> None:
    onnx_folder.require(("ctranslate2",))
    loading = arguments.loading()
    model = load_trained(MeftForConditionalGeneration, model_dir, loading, "cpu")
    ctranslate2_folder.check_runs(model)
    extractor = _beside(load_feature_extractor, arguments.feature_extractor_name, model_dir)
    tokenizer = _beside(load_tokenizer, arguments.tokenizer_name, model_dir)
    quantize = arguments.quantize == "int8"
    error = ctranslate2_folder.export_ctranslate2(model, extractor, tokenizer, out, quantize)
    print(
        f"wrote {printable(out)}, {_mebibytes(out)}, for CTranslate2: the encoder's output differs from "
        f"PyTorch's by {error:.1g} of its norm"
    )


def _beside(load: Callable[..., Any], named: str | None, model_dir: str) -> Any:
    """What is named, or else lies beside the model."""
    return load(model_dir, "model_dir") if named is None else load(named)


def _mebibytes(folder: Path) -> str:
    """What the files of an export take."""
    written = (folder / name for name in (*earlier.OF_ONNX, earlier.WEIGHTS))
    size = sum(path.stat().st_size for path in written if path.is_file())
    return f"{size / 2**20:.1f} MiB"
