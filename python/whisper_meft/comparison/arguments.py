"""What is compared: the options of `whisper-meft compare`, and those of each method in it."""

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ..methods import MeftConfig
from ..options.augmentation import AugmentArguments
from ..options.common import DataFormatArguments
from ..options.parser import UsageError
from ..options.skew import SkewArguments
from ..options.task import TaskArguments

# MeZO's directions have unit variance in every weight; its own paper's rates are a hundredth of the others'.
# Whisper's decoder, which classification does not train, is fine-tuned at 1e-5 as a rule.
RATE_FACTOR = {"mezo": 0.01}
TRANSCRIPTION_RATE_FACTOR = {"mezo": 0.01, "full": 0.01}

# The paper's ranks and widths are for 768 channels; narrower backbones get proportionally less.
PAPER_WIDTH = 768

_COMMA = re.compile(r",(?![^\[]*\])")  # outside a list's brackets


@dataclass
class CompareArguments(TaskArguments, SkewArguments, AugmentArguments, DataFormatArguments):
    """What is compared, and on what."""

    _argument_group_name = "comparison"

    methods: str = field(
        default="all",
        metadata={
            "help": "all of the task, or some of them with commas between, options behind a colon: "
            "lora,lst,lst:reduction_factor=2,adalora:init_r=32+target_r=8,lst:placement=both"
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder for the runs and the results; an earlier comparison goes on"}
    )
    quick: bool = field(
        default=False, metadata={"help": "a small corpus, few epochs and rates, one seed: a few minutes"}
    )
    seeds: int | None = field(
        default=None, metadata={"help": "runs per method, with different seeds (default: 3; quick: 1)"}
    )
    seed: int = field(default=0, metadata={"help": "the first seed, and that of corpus and validation split"})
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "rates to choose from; mezo, and to transcribe full too, gets a hundredth of each "
            "(default: 3e-4 1e-3 3e-3; quick: 5e-4 3e-3)"
        },
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "passes over the training data of each run (default: 8; quick: 4)"}
    )
    batch_size: int = field(default=16, metadata={"help": "clips per step"})
    reduction_factor: int = field(default=8, metadata={"help": "of the side networks"})
    max_frames: str = field(default="fidelity", metadata={"help": "as for train"})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "train under autocast to bfloat16 (default: on a GPU that has it)"},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Whisper checkpoint (default: the tiny one that is shipped, which classifies alone)"
        },
    )
    train_data: str | None = field(
        default=None,
        metadata={
            "help": "training data (default: a corpus of synthetic accents is made; needed to transcribe)"
        },
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "validation data (default: speakers set aside from the training data)"},
    )
    test_data: str | None = field(
        default=None, metadata={"help": "data for the final scores (default: the test split of train_data)"}
    )
    validation_fraction: float = field(
        default=0.2, metadata={"help": "share to set aside where there is no validation data"}
    )
    train_clips_per_class: int | None = field(
        default=None, metadata={"help": "size of the synthetic corpus (default: 500; quick: 60)"}
    )
    test_clips_per_class: int | None = field(
        default=None, metadata={"help": "size of its test part (default: 100; quick: 50)"}
    )
    use_cpu: bool = field(default=False, metadata={"help": "leave a GPU alone"})

    def __post_init__(self):
        if not self.output_dir:
            raise UsageError("--output_dir is needed")
        defaults = {
            "seeds": (3, 1),
            "learning_rates": ([3e-4, 1e-3, 3e-3], [5e-4, 3e-3]),
            "num_train_epochs": (8.0, 4.0),
            "train_clips_per_class": (500, 60),
            "test_clips_per_class": (100, 50),
        }
        for name, (usual, quick) in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, quick if self.quick else usual)
        self.check_skew()
        self.check_augment()
        for name in ("seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not all(0 < rate < float("inf") for rate in self.learning_rates):
            raise UsageError(f"--learning_rates must be above 0 and finite, got {self.learning_rates}")
        if self.task == "transcribe":
            for name in ("model_name_or_path", "train_data"):
                if getattr(self, name) is None:
                    raise UsageError(f"--{name} is needed with --task transcribe")
            for name in self.given():
                raise UsageError(
                    f"--{name} cannot be used with --task transcribe: transcripts have no classes"
                )
        elif self.language is not None:
            raise UsageError("--language cannot be used with --task classify: it is of --task transcribe")
        methods = MeftConfig.methods()
        known = [name for name in methods if self.task == "classify" or methods[name].transcribes]
        self.chosen = known if self.methods == "all" else split_methods(self.methods)
        for entry in self.chosen:
            name, options = parse_method(entry)
            if name not in known:
                raise UsageError(f"--methods must be all or some of {','.join(known)}, got {name!r}")
            MeftConfig.from_dict({"method": name, **options})
        if not self.chosen:
            raise UsageError("--methods is empty")
        self.chosen = list(dict.fromkeys(self.chosen))


def split_methods(methods: str) -> list[str]:
    """The entries of ``"lora,lst:layers=[1,2]"``."""
    return [entry for entry in _COMMA.split(methods) if entry]


def rate_factor(task: str, method: str) -> float:
    """What the learning rates of a comparison are multiplied by for a method."""
    return (RATE_FACTOR if task == "classify" else TRANSCRIPTION_RATE_FACTOR).get(method, 1)


def parse_method(entry: str) -> tuple[str, dict[str, Any]]:
    """``"lst:reduction_factor=2+adapter_dim=64"`` -> ``("lst", {"reduction_factor": 2, "adapter_dim": 64})``.

    Raises:
        UsageError: not of that form.
    """
    name, _, rest = entry.partition(":")
    options: dict[str, Any] = {}
    for assignment in rest.split("+") if rest else ():
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(
                f"--methods: options are written {name}:option=value+option=value, got {entry!r}"
            )
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def options_of(entry: str, width: int, reduction_factor: int) -> dict[str, Any]:
    """The method and the options that it is compared with: the given ones, else the paper's, with ranks and
    adapter widths in proportion to the backbone's ``width`` where that is below whisper-small's."""
    share = min(1.0, width / PAPER_WIDTH)
    method, given = parse_method(entry)
    defaults = {each.name: each.default for each in fields(MeftConfig.methods()[method])}
    options: dict[str, Any] = {"method": method}
    for name, default in defaults.items():
        if name in ("r", "init_r", "target_r", "adapter_dim"):
            options[name] = max(2, round(default * share))
        elif name == "reduction_factor":
            options[name] = reduction_factor
    options |= given
    rank = options.get("r", options.get("init_r"))
    if rank is not None and "lora_alpha" not in given:  # the same scale of the update at every rank
        options["lora_alpha"] = defaults["lora_alpha"] / defaults.get("r", defaults.get("init_r")) * rank
    return options
