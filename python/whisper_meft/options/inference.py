"""How a trained model is run: the options of predicting and scoring."""

from dataclasses import dataclass, field
from typing import Literal

from .parser import UsageError


@dataclass
class InferenceArguments:
    """How a trained model is run."""

    _argument_group_name = "model"

    backbone: str | None = field(
        default=None, metadata={"help": "backbone to use instead of the one that the model names"}
    )
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "feature extractor, if not the one saved with the model"}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "tokenizer, if not the one saved with the model; of models that transcribe"},
    )
    backbone_dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None, metadata={"help": "type to hold the frozen weights in (default: as in training)"}
    )
    backbone_quantization: Literal["int8", "fp8", "none"] | None = field(
        default=None,
        metadata={"help": "hold the frozen linear layers in 8 bits (default: as in training)"},
    )
    backbone_compile: bool = field(
        default=False,
        metadata={"help": "compile one encoder layer and run all by it; pays for many clips"},
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1 ... (default: a GPU if there is one)"}
    )
    batch_size: int = field(default=8, metadata={"help": "clips per batch"})
    num_workers: int = field(default=0, metadata={"help": "processes that read audio"})

    def __post_init__(self):
        if self.batch_size < 1:
            raise UsageError(f"--batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers < 0:
            raise UsageError(f"--num_workers must be 0 or more, got {self.num_workers}")
