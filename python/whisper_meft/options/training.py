"""The options of `whisper-meft train`: data, and TrainingArguments with defaults for this task."""

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from .augmentation import AugmentArguments, check_copies
from .common import DataFormatArguments, MethodArguments, ModelArguments
from .inference import check_windows
from .parser import Parser, UsageError
from .skew import DEFAULTS as SKEW_DEFAULTS
from .skew import SkewArguments
from .task import TaskArguments

# The learning rates of the paper's scripts: this for all methods but those named below. For MeZO it is far
# too high, because its directions have unit variance in every weight: its own paper's rate is used.
LEARNING_RATE = 1e-4

LEARNING_RATES = {"lst": 5e-4, "mezo": 1e-6}

# Of recognition, where no published code of these methods says any: that of side networks is of trials with
# whisper-base, those of LoRA and adapters are of Fan et al. (Interspeech 2024) with whisper-small, that of
# full fine-tuning is the usual one.
TRANSCRIPTION_RATE = 1e-3

TRANSCRIPTION_RATES = {"full": 1e-5, "adapter": 1e-4, "mezo": 1e-6}


def default_learning_rate(task: str, method: str) -> float:
    """What a run takes where no learning rate is given."""
    if task == "transcribe":
        return TRANSCRIPTION_RATES.get(method, TRANSCRIPTION_RATE)
    return LEARNING_RATES.get(method, LEARNING_RATE)


# Options under one name; recommended is the recipe of examples/real_speech. The defaults are the paper's.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "method": "head",
        "pooling": "statistics",
        "max_frames": "longest",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 15,
    }
}


def _told(options: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in options.items())


TASKS = ("classify", "transcribe")

# What the best checkpoint can be chosen by: the first where nothing is said. To transcribe all but the loss
# take generating the transcripts of the evaluation data.
METRICS = {
    "classify": ("accuracy", "mean_class_accuracy", "macro_f1", "loss"),
    "transcribe": ("loss", "wer", "cer", "normalized_wer", "normalized_cer"),
}

# Options that one of the tasks alone has, with the value that is none.
OF_ONE_TASK: dict[str, dict[str, Any]] = {
    "classify": {
        "preset": None,
        "head_learning_rate": None,
        "bucket_by_length": None,
        "max_frames_per_batch": None,
        "cuda_graphs": False,
        **SKEW_DEFAULTS,
    },
    "transcribe": {
        "language": None,
        "predict_with_generate": None,
        "zero_shot": True,
        "generation_max_length": None,
        "generation_num_beams": None,
    },
}

# Why an option is not there for transcription, where that is not plain.
_REASONS = {
    "preset": "its options were found on dialects, and transcription has none yet",
    "head_learning_rate": "there is no head that starts from nothing",
    "bucket_by_length": "a clip is heard in a window of one length, whatever its own",
    "max_frames_per_batch": "a clip is heard in a window of one length, whatever its own",
    "cuda_graphs": "batches of transcripts have many shapes",
    **dict.fromkeys(SKEW_DEFAULTS, "transcripts have no classes"),
}


@dataclass
class TrainDataArguments(DataFormatArguments):
    """What to train and evaluate on."""

    _argument_group_name = "data"

    train_data: str | None = field(
        default=None,
        metadata={
            "help": "training data: a folder with one sub-folder per class, a CSV or TSV file, a Kaldi "
            "directory, a KeSpeech folder, a saved dataset, or the name of a dataset on the hub; to "
            "transcribe also LibriSpeech"
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "same as train_data, for a dataset on the hub"}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "same as train_data, for a CSV or TSV file"}
    )
    eval_data: str | None = field(
        default=None,
        metadata={
            "help": "data to choose the best epoch on and to score at the end (default: the validation split "
            "of train_data if there is one, else speakers set aside from the training data)"
        },
    )
    eval_file: str | None = field(default=None, metadata={"help": "same as eval_data, for a CSV or TSV file"})
    train_split_name: str | None = field(
        default=None, metadata={"help": "split to train on (default: train, where there are splits)"}
    )
    eval_split_name: str | None = field(
        default=None, metadata={"help": "split to evaluate on (default: validation, where there are splits)"}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "share of each class to set aside where there is no evaluation data"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on at most this many examples, chosen at random"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "evaluate on at most this many examples, chosen at random"}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read the training data as it comes and hold none of it: WebDataset tar files, Lhotse "
            "cuts and Hugging Face datasets; --labels then lists all classes (or names a .txt or .json file "
            "of them), which with --max_steps spares a first pass over the labels"
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={
            "help": "clips of a stream that wait in each process that reads, to be mixed (0: the order in "
            "which they are stored)"
        },
    )

    window: float | None = field(
        default=None,
        metadata={
            "help": "cut longer clips into windows of so many seconds, each an example of the clip's class "
            "and speaker (default: of longer clips the beginning alone is heard); to classify"
        },
    )
    hop: float | None = field(
        default=None,
        metadata={
            "help": "with --window: seconds from the beginning of a window to that of the next (default: the "
            "window, so that they do not overlap)"
        },
    )

    def __post_init__(self):
        if self.hop is not None and self.window is None:
            raise UsageError(f"--hop {self.hop:g} is from window to window: give --window too")
        check_windows(self.window, self.hop)
        if self.shuffle_buffer < 0:
            raise UsageError(f"--shuffle_buffer must be 0 or more, got {self.shuffle_buffer}")
        sources = [name for name in ("train_data", "dataset_name", "train_file") if getattr(self, name)]
        if len(sources) != 1:
            given = " and ".join(f"--{name}" for name in sources) or "none of them"
            raise UsageError(f"one of --train_data, --dataset_name and --train_file is needed, got {given}")
        self.train_data = getattr(self, sources[0])
        if self.eval_data and self.eval_file:
            raise UsageError("only one of --eval_data and --eval_file can be given, got both")
        self.eval_data = self.eval_data or self.eval_file
        if not 0 < self.validation_fraction < 1:
            got = self.validation_fraction
            raise UsageError(f"--validation_fraction must lie between 0 and 1, got {got}")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")


@dataclass
class TrainArguments(TaskArguments, SkewArguments, AugmentArguments, TrainingArguments):
    """transformers.TrainingArguments with defaults for these tasks."""

    _argument_group_name = "training"

    output_dir: str | None = field(
        default=None, metadata={"help": "folder for checkpoints, the trained model and the results"}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "start anew where output_dir holds an earlier run, whose checkpoints and results go when "
            "this one saves for the first time"
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "a checkpoint to go on from (without a name: the newest complete one in output_dir)",
            "switch": True,
        },
    )
    preset: Literal["recommended"] | None = field(
        default=None,
        metadata={
            "help": "options to begin with, over which those that are given win; recommended: what was found "
            "best on validation data of recordings of people (" + _told(PRESETS["recommended"]) + ")"
        },
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "passes over the training data"})
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "where per_device_train_batch_size does not fit the device's memory by the count of "
            "`whisper-meft memory`, add up smaller parts by gradient accumulation: the gradient is the same"
        },
    )
    bucket_by_length: bool | None = field(
        default=None,
        metadata={
            "help": "train on batches of clips of like length, so that little padding is computed (default: "
            "where max_frames is not fidelity and all lengths are known)"
        },
    )
    max_frames_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "instead of per_device_train_batch_size, the most encoder frames (20 ms each) of a "
            "training batch, padding included"
        },
    )
    cache_features: str | None = field(
        default=None,
        metadata={
            "help": "run the frozen backbone once and train from its states in this folder, filling it as "
            "needed (without a name: feature_cache in output_dir); see `whisper-meft cache`",
            "switch": True,
        },
    )
    cache_storage: Literal["exact", "bfloat16", "int8", "fp8"] | None = field(
        default=None,
        metadata={
            "help": "how cached states are kept: as computed, in 16 or in 8 bits, of which int8 errs less "
            "than fp8 (default: 16 bits, or what is there)"
        },
    )
    cache_copies: int | None = field(
        default=None,
        metadata={
            "help": "augmented versions of each training clip that the cache keeps; epochs take them in turn "
            "(needed to augment with cache_features)"
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "hand a training step's kernels to the GPU as one CUDA graph, for batches of one shape "
            "(max_frames fidelity, or a number that clips are then padded to) beside a frozen encoder"
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "initial learning rate (default: 5e-4 for lst, 1e-6 for mezo, else 1e-4; to transcribe "
            "1e-5 for full, 1e-4 for adapter, 1e-6 for mezo, else 1e-3)"
        },
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "initial learning rate of the head (projector and classifier), which starts from nothing "
            "where the rest is pretrained (default: learning_rate; mezo cannot)"
        },
    )
    eval_strategy: Literal["no", "steps", "epoch"] | None = field(
        default=None, metadata={"help": "when to evaluate (default: whenever a checkpoint is saved)"}
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = field(
        default="epoch", metadata={"help": "when to save a checkpoint"}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "checkpoints to keep; the best one is always among them"}
    )
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={"help": "finish with the best checkpoint, not the last (default: if there are both)"},
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "on the evaluation data; classify: accuracy (default), mean_class_accuracy, macro_f1 or "
            "loss; transcribe: loss (default), or wer, cer, normalized_wer or normalized_cer, for which each "
            "evaluation generates transcripts"
        },
    )
    predict_with_generate: bool | None = field(
        default=None,
        metadata={
            "help": "transcribe: generate transcripts in every evaluation and score them, which takes many "
            "times as long as the loss (default: if metric_for_best_model is one of their scores); at the "
            "end they are generated in any case"
        },
    )
    zero_shot: bool = field(
        default=True,
        metadata={"help": "transcribe: at the end score the backbone alone too, which takes as long again"},
    )
    generation_max_length: int | None = field(
        default=None,
        metadata={
            "help": "transcribe: most tokens of a generated transcript with its prompt (default: the model's)"
        },
    )
    generation_num_beams: int | None = field(
        default=None,
        metadata={"help": "transcribe: beams of generation (default: the model's, 1 of Whisper's)"},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after this many evaluations in a row without improvement"}
    )
    logging_steps: float = field(
        default=0.02, metadata={"help": "log every so many steps; below 1 a share of the whole run"}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "leave NaN out of logged losses"})
    report_to: list[str] | None = field(
        default=None,
        metadata={"help": "experiment trackers: tensorboard, wandb, trackio ... (default: none)"},
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "processes that read audio (default: cores - 2 per process, between 0 and 4)"},
    )
    dataloader_persistent_workers: bool | None = field(
        default=None,
        metadata={"help": "keep those processes from one epoch to the next (default: where there are any)"},
    )
    dataloader_prefetch_factor: int | None = field(
        default=None,
        metadata={"help": "batches that each of those processes reads ahead (default: 4)"},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave at False"})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "leave at False: every trained parameter is used in each step"}
    )

    def __post_init__(self):
        if not self.output_dir:
            raise UsageError("--output_dir is needed")
        self._check_task()
        self._check_skew_with_others()
        self.check_augment()
        for name in ("learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name} must be above 0 and finite, got {value}")
        self._check_optimization()
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UsageError(f"--max_steps must be at least 1, or -1 for no limit, got {self.max_steps}")
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise UsageError(f"--num_train_epochs must be above 0 and finite, got {self.num_train_epochs}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**32:
                raise UsageError(f"--{name} must lie between 0 and 2^32 - 1, got {value}")
        for name in ("save_steps", "eval_steps", "logging_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name} must be above 0 and finite, got {value}")
        if self.dataloader_num_workers is not None and self.dataloader_num_workers < 0:
            raise UsageError(f"--dataloader_num_workers must be 0 or more, got {self.dataloader_num_workers}")
        for name in ("remove_unused_columns", "prediction_loss_only"):
            if getattr(self, name):
                raise UsageError(f"--{name} cannot be True: scores and checks need what it leaves out")
        if self.max_frames_per_batch is not None:
            if self.max_frames_per_batch < 1:
                raise UsageError(
                    f"--max_frames_per_batch must be at least 1, got {self.max_frames_per_batch}"
                )
            if self.auto_batch or self.bucket_by_length is False:
                other = "--auto_batch True" if self.auto_batch else "--bucket_by_length False"
                raise UsageError(f"--max_frames_per_batch and {other} cannot be used together")
        if self.dataloader_drop_last and (self.bucket_by_length or self.max_frames_per_batch):
            raise UsageError(
                "--dataloader_drop_last True cannot be used with batches by length: the same clips would "
                "always be left out"
            )
        metric = self.metric_for_best_model
        self._choose_metric()
        if self.eval_strategy is None:
            self.eval_strategy = "epoch" if self.save_strategy == "best" else self.save_strategy
            if self.eval_strategy == "steps" and self.eval_steps is None:
                self.eval_steps = self.save_steps
        if self.eval_strategy == "no":
            self._check_without_evaluation(metric)
        if self.load_best_model_at_end is None:
            together = self.eval_strategy == self.save_strategy or self.save_strategy == "best"
            if together and self.eval_strategy == "steps":
                together = bool(self.eval_steps) and self.save_steps % self.eval_steps == 0
            self.load_best_model_at_end = together and self.eval_strategy != "no"
        if self.dataloader_num_workers is None:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self.dataloader_num_workers = max(0, min(4, (os.cpu_count() or 1) // processes - 2))
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.dataloader_prefetch_factor is None and self.dataloader_num_workers > 0:
            self.dataloader_prefetch_factor = 4
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise UsageError(
                    f"--early_stopping_patience must be at least 1, got {self.early_stopping_patience}"
                )
            if not self.load_best_model_at_end:
                raise UsageError("--early_stopping_patience needs evaluation and --load_best_model_at_end")
        if (self.cache_features or "").lower() in ("false", ""):
            self.cache_features = None
        elif self.cache_features.lower() == "true":
            self.cache_features = os.path.join(self.output_dir, "feature_cache")
        if self.cache_storage is not None and self.cache_features is None:
            raise UsageError(f"--cache_storage {self.cache_storage} needs --cache_features")
        check_copies(self.cache_copies, self.cache_features is not None, self.augment is not None)
        if self.include_num_input_tokens_seen not in (True, False, "all", "non_padding", "no"):
            raise UsageError(
                "--include_num_input_tokens_seen must be all, non_padding, True or False, got "
                f"{self.include_num_input_tokens_seen!r}"
            )
        if self.report_to is None:
            self.report_to = "none"
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            self.use_cpu = True
        super().__post_init__()
        # Every run does these by itself: see training/interrupts.py and resuming.py.
        self.enable_jit_checkpoint = self.restore_callback_states_from_checkpoint = False

    def _check_optimization(self) -> None:
        """Refuses values with which training would do something else than what is asked for, or fail late."""
        for name in ("weight_decay", "adam_epsilon", "warmup_steps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"--{name} must be 0 or more and finite, got {value}")
        for name in ("label_smoothing_factor", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UsageError(f"--{name} must be at least 0 and below 1, got {value}")
        if self.max_grad_norm is not None and not self.max_grad_norm >= 0:
            raise UsageError(f"--max_grad_norm must be above 0, or 0 for no limit, got {self.max_grad_norm}")

    def _check_task(self) -> None:
        """Refuses an option of the other task, instead of ignoring it."""
        if self.task not in TASKS:
            raise UsageError(f"--task must be {' or '.join(TASKS)}, got {self.task!r}")
        (other,) = set(TASKS) - {self.task}
        for name, none in OF_ONE_TASK[other].items():
            value = getattr(self, name)
            if value != none and not (name == "bucket_by_length" and value is False):
                reason = _REASONS.get(name, f"it is of --task {other}")
                raise UsageError(f"--{name} cannot be used with --task {self.task}: {reason}")
        for name in ("generation_max_length", "generation_num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")

    def _check_skew_with_others(self) -> None:
        """Refuses what cannot be used beside the options for skewed classes."""
        self.check_skew()
        if self.loss == "focal" and self.label_smoothing_factor:
            raise UsageError(
                f"--label_smoothing_factor {self.label_smoothing_factor:g} cannot be used with --loss focal, "
                "which is of one right class"
            )
        if self.sampling == "natural":
            return
        others = {
            "max_frames_per_batch": (None, "the number of batches would change with every epoch"),
            "dataloader_drop_last": (False, "the batches of an epoch are dealt out whole"),
            "train_sampling_strategy": ("random", "it is another order"),
        }
        for name, (none, reason) in others.items():
            if (value := getattr(self, name)) != none:
                raise UsageError(f"--{name} {value} cannot be used with --sampling {self.sampling}: {reason}")

    def _check_without_evaluation(self, metric: str | None) -> None:
        """Refuses what nothing would come of; ``metric``: that which was given."""
        if self.save_strategy == "best":
            raise UsageError(
                "--save_strategy best saves when an evaluation is the best so far: it cannot be used with "
                "--eval_strategy no"
            )
        if metric is not None:
            why = "" if self.save_strategy != "no" else ", the default with --save_strategy no"
            raise UsageError(
                f"--metric_for_best_model {metric} chooses among evaluations: it cannot be used with "
                f"--eval_strategy no{why}"
            )

    def _choose_metric(self) -> None:
        metrics = METRICS[self.task]
        metric = (self.metric_for_best_model or metrics[0]).removeprefix("eval_")
        if metric not in metrics:
            raise UsageError(
                f"--metric_for_best_model must be one of {', '.join(metrics)}, got {metric}"
                + (f" (with --task {self.task})" if any(metric in each for each in METRICS.values()) else "")
            )
        self.metric_for_best_model = metric
        if self.task == "classify":
            return
        if self.greater_is_better:
            raise UsageError(f"--greater_is_better True is wrong of {metric}: leave it out")
        self.greater_is_better = False
        generated = metric != "loss"
        if self.predict_with_generate is None:
            self.predict_with_generate = generated
        elif generated and not self.predict_with_generate:
            raise UsageError(
                f"--metric_for_best_model {metric} needs transcripts: leave --predict_with_generate False out"
            )


# The TrainingArguments that `whisper-meft train --help` describes; --help_all describes the others too.
COMMON_TRAINING_OPTIONS = [
    "task",
    "language",
    "preset",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "head_learning_rate",
    "class_weights",
    "loss",
    "focal_gamma",
    "sampling",
    "augment",
    "speed_factors",
    "noise_dir",
    "noise_snr",
    "room_dir",
    "gain_db",
    "spec_masks",
    "spec_bins",
    "spec_frames",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "auto_batch",
    "bucket_by_length",
    "max_frames_per_batch",
    "cache_features",
    "cache_storage",
    "cache_copies",
    "cuda_graphs",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "metric_for_best_model",
    "predict_with_generate",
    "zero_shot",
    "generation_max_length",
    "generation_num_beams",
    "label_smoothing_factor",
    "early_stopping_patience",
    "logging_steps",
    "report_to",
    "seed",
    "use_cpu",
    "dataloader_num_workers",
    "disable_tqdm",
]


# All option groups of a training run, in the order that :func:`whisper_meft.training.run.train` takes them.
GROUPS = (ModelArguments, MethodArguments, TrainDataArguments, TrainArguments)


def parsed_options(
    values: dict[str, Any],
) -> tuple[ModelArguments, MethodArguments, TrainDataArguments, TrainArguments]:
    """The option groups of a run whose options are ``values``, read as on the command line of `train`.

    Args:
        values: options by name; ``None`` leaves an option at its default, a list is one of several values.

    Raises:
        UsageError: an unknown option, or a value that it cannot have.
    """
    argv = []
    for name, value in values.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")
    parser = Parser("train", GROUPS, usage="")
    parser.presets = PRESETS
    return parser.parse(argv)
