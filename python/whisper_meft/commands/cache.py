"""`whisper-meft cache`: runs the frozen backbone once over the data, for trainings from its states."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .. import data
from ..data.transcripts import TranscriptTokens
from ..errors import UserError
from ..evaluation.loaded import usable_device
from ..feature_cache.filling import prepare_cache
from ..feature_cache.store import check_place
from ..methods import MeftConfig
from ..model.module import get_meft_model
from ..model.pretrained import load_whisper, resolve_dtype
from ..model.speaking import load_language
from ..options.augmentation import AugmentArguments, check_copies
from ..options.common import MethodArguments, ModelArguments
from ..options.parser import Parser, UsageError
from ..options.task import TaskArguments
from ..options.training import TrainDataArguments
from ..training.console import say
from ..training.data import load_data
from ..training.settings import load_sizes_and_extractor, make_augmenter, method_config
from ..training.tasks.base import Task
from ..training.tasks.classification import Classification
from ..training.tasks.transcription import Transcription


@dataclass
class CacheArguments:
    """Where the cache goes and how it is made."""

    _argument_group_name = "cache"

    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the cache; one that was interrupted is gone on with"}
    )
    storage: Literal["exact", "bfloat16", "int8", "fp8"] | None = field(
        default=None,
        metadata={
            "help": "how states are kept: as computed, in 16 or in 8 bits, of which int8 errs less than fp8 "
            "(default: 16 bits, or what is there)"
        },
    )
    autocast: Literal["bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "run float32 weights in this, as train --bf16 and --fp16 do"}
    )
    cache_copies: int | None = field(
        default=None,
        metadata={"help": "augmented versions of each training clip that are kept (needed by augment)"},
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1 ... (default: a GPU if there is one)"}
    )
    num_workers: int = field(default=0, metadata={"help": "processes that read audio"})
    seed: int = field(
        default=42,
        metadata={"help": "of the choice of max_*_samples and of augment; that of the training to come"},
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "show no progress bars"})

    def __post_init__(self):
        if not self.output_dir:
            raise UsageError("--output_dir is needed")
        if self.num_workers < 0:
            raise UsageError(f"--num_workers must be 0 or more, got {self.num_workers}")


def make_parser() -> Parser:
    """The parser of `whisper-meft cache`."""
    return Parser(
        "cache",
        (
            ModelArguments,
            TaskArguments,
            MethodArguments,
            TrainDataArguments,
            AugmentArguments,
            CacheArguments,
        ),
        usage="--model_name_or_path NAME_OR_DIR --train_data PATH_OR_NAME --output_dir DIR ...",
        description="Computes once what the side network reads of the frozen backbone, for `train "
        "--cache_features DIR`. Of the method's options only --layers, --max_frames, --method, --placement "
        "and --target matter.",
    )


def run(argv: Sequence[str]) -> int:
    """`whisper-meft cache`; returns the exit status."""
    models, task_arguments, methods, sources, augment, options = make_parser().parse(argv)
    augment.check_augment()
    check_copies(options.cache_copies, True, augment.augment is not None)
    check_place(options.output_dir)
    device = usable_device(options.device)
    dtype = models.backbone_dtype
    if dtype == "auto" and MeftConfig.methods()[methods.method].trains_backbone:
        dtype = "float32"  # as train has it
    dtype = resolve_dtype(dtype, device.type == "cpu")
    config = method_config(methods, dtype, models.backbone_quantization)
    if not config.frozen_encoder:
        raise UserError(f"method: {config.method} trains inside the encoder, so there is nothing to cache")
    sizes, extractor = load_sizes_and_extractor(models, config)
    task, tokens = _task(task_arguments, models, config, sizes, extractor)
    show = not options.disable_tqdm
    augmenter = make_augmenter(augment, options.seed, extractor, options.num_workers, show)
    base = load_whisper(models, dtype, task.backbone_class, bool(models.backbone_quantization))
    model = get_meft_model(base.to(device), config)
    if models.backbone_compile:
        model.encoder.compile_layers()
    how = (options.num_workers, show, options.output_dir, extractor)
    examples = load_data(sources, task, True, False, options.seed, *how)
    sets = [part for part in (examples.training, examples.evaluation) if part is not None]
    how = (options.storage, options.autocast, options.num_workers, show, say)
    augmented = {"augment": augmenter, "copies": options.cache_copies or 1}
    cache = prepare_cache(options.output_dir, model, extractor, sets, *how, tokens=tokens, **augmented)
    of = " of the decoder" if model.states_of == "decoder" else ""
    say(
        f"{options.output_dir} holds {len(cache)} clips, layers {', '.join(map(str, cache.layers))}{of} as "
        f"{cache.storage}, {cache.bytes_on_disk / 2**30:.3g} GiB"
    )
    if examples.left_out:
        say(data.describe_bad(examples.left_out, len(examples.left_out) + sum(map(len, sets))))
    return 0


def _task(
    arguments: TaskArguments, models: ModelArguments, config: MeftConfig, sizes: Any, extractor: Any
) -> tuple[Task, TranscriptTokens | None]:
    """What the states are for, and what makes the tokens of transcripts."""
    if arguments.task == "transcribe":
        task = Transcription(config, sizes, extractor, load_language(models, sizes, arguments.language))
        return task, task.tokens
    if arguments.language is not None:
        raise UserError(f"language: {arguments.language!r} is of transcripts: give --task transcribe")
    if models.tokenizer_name is not None:
        raise UserError(
            f"tokenizer_name: {models.tokenizer_name!r} is of transcripts: give --task transcribe"
        )
    return Classification(config, sizes, extractor), None
