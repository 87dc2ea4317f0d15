"""`whisper-meft app`: a page in the browser on which a trained model can be tried."""

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..app.about import about
from ..app.hearing import Listener
from ..errors import UserError
from ..evaluation.classifier import Classifier
from ..evaluation.transcriber import Transcriber
from ..model.kinds import kind_of
from ..options.generation import GenerationArguments
from ..options.inference import InferenceArguments, check_threshold, threshold_of
from ..options.parser import Parser, UsageError


@dataclass
class AppArguments:
    """The page, who may ask for it, and what may be sent."""

    _argument_group_name = "page"

    host: str = field(
        default="127.0.0.1",
        metadata={
            "help": "address to listen on; any other than this machine's own lets everybody in who reaches "
            "it: there is no password"
        },
    )
    port: int = field(default=7860, metadata={"help": "port to listen on; 0 is any that is free"})
    title: str | None = field(
        default=None, metadata={"help": "heading of the page (default: the name of the model's folder)"}
    )
    max_minutes: float = field(default=10.0, metadata={"help": "longer recordings are refused"})
    max_megabytes: int = field(default=200, metadata={"help": "larger files are refused"})
    top: int | None = field(
        default=None,
        metadata={
            "help": "classes that are shown, the most probable ones (default: 5); of models that classify"
        },
    )
    reject_below: str | None = field(
        default=None,
        metadata={
            "help": "answer with --reject_label where the most probable class has a lower probability: a "
            "number from 0 to 1, or saved, what `whisper-meft calibrate` chose; of models that classify"
        },
    )
    reject_label: str | None = field(
        default=None,
        metadata={"help": "what is said of recordings that are rejected (default: none of these)"},
    )

    def __post_init__(self):
        if not self.host:
            raise UsageError("--host is empty, an address is needed")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be from 0 to 65535, got {self.port}")
        if not (self.max_minutes > 0 and math.isfinite(self.max_minutes)):
            raise UsageError(f"--max_minutes must be above 0 and finite, got {self.max_minutes}")
        for name in ("max_megabytes", "top"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        check_threshold(self.reject_below)
        if self.reject_label is not None and self.reject_below is None:
            raise UsageError(f"--reject_label {self.reject_label} is for --reject_below, which is not given")
        self.reject_label = "none of these" if self.reject_label is None else self.reject_label


def make_parser() -> Parser:
    """The parser of `whisper-meft app`."""
    parser = Parser(
        "app",
        (InferenceArguments, GenerationArguments, AppArguments),
        usage="MODEL_DIR [options]",
        description="Serves a page on which a model can be tried: a recording or the microphone goes in, "
        "probabilities come out, over time where it is longer than the model's window, or a transcript. The "
        "page is for this machine alone unless --host says otherwise, and needs no network. Ctrl-C ends it. "
        "Needs the app extra.",
    )
    help = "folder (or hub name) of a trained model, or of a plain Whisper"
    parser.add_argument("model_dir", metavar="MODEL_DIR", help=help)
    return parser


def run(argv: Sequence[str]) -> int:
    """`whisper-meft app`; returns the exit status."""
    inference, generation, page, where = make_parser().parse(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio, of the app extra: pip install 'meft-kernels[app]'")
    if inference.window == "first":
        raise UsageError("--window first is not for a page, which shows what is said over time")
    transcribes = kind_of(where.model_dir) != "classification"
    inference.check_kind(transcribes)
    for name in ("reject_below", "top"):
        if transcribes and getattr(page, name) is not None:
            raise UsageError(f"--{name} is for models that classify, and this one transcribes")
    if not transcribes:
        generation.refuse_for_classes()
    if transcribes:
        model = Transcriber.load(where.model_dir, inference, generation, progress=False)
        labels, threshold = None, None
    else:
        model = Classifier.load(where.model_dir, inference, progress=False)
        labels = model.labels
        if page.reject_below is not None and page.reject_label in labels:
            raise UserError(f"--reject_label: {page.reject_label!r} is a class of the model: name another")
        threshold = threshold_of(page.reject_below, model.model.config, where.model_dir)
    listener = Listener(model, 60 * page.max_minutes, threshold, page.reject_label)
    told, max_bytes = about(where.model_dir, model.model, labels, page.title), page.max_megabytes * 2**20

    from ..app.page import build
    from ..app.serving import serve

    serve(
        lambda: build(listener, told, max_bytes, 5 if page.top is None else page.top),
        page.host,
        page.port,
        max_bytes,
        lambda address: print(f"the page is at {address} (Ctrl-C ends it)", flush=True),
    )
    print("the page is closed", file=sys.stderr)
    return 0
