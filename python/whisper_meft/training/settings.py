"""What a run is told, settled before any data is read: the method's options and the backbone they are for."""

from dataclasses import dataclass

from transformers import WhisperConfig, WhisperFeatureExtractor

from .. import data
from ..data.augmenter import Augmenter
from ..errors import UserError
from ..feature_cache.store import check_place
from ..methods import MeftConfig
from ..model.backbone import found_here_alone
from ..model.module import graphs_refused
from ..model.pretrained import load_config, load_feature_extractor, resolve_dtype
from ..model.speaking import load_language
from ..options.augmentation import AugmentArguments
from ..options.common import MethodArguments, ModelArguments
from ..options.training import TrainArguments, default_learning_rate
from .console import main_process
from .tasks.base import Task
from .tasks.classification import Classification
from .tasks.transcription import Transcription


@dataclass
class Settings:
    """A run's options, checked against each other and against the backbone.

    Attributes:
        model, training: the option groups.
        config: the method.
        dtype: number format of the frozen weights.
        backbone: the encoder's config.
        extractor: the backbone's feature extractor.
        task: what is learnt.
        augment: changes training clips, or None.
    """

    model: ModelArguments
    training: TrainArguments
    config: MeftConfig
    dtype: str
    backbone: WhisperConfig
    extractor: WhisperFeatureExtractor
    task: Task
    augment: Augmenter | None = None


def settle(model: ModelArguments, method: MethodArguments, training: TrainArguments) -> Settings:
    """Settles what the options leave open; sets ``training.learning_rate`` where none is given.

    What is quick to check is checked here: a wrong name should not cost a pass over the data.

    Raises:
        UserError: options contradict each other, or the backbone cannot be used.
    """
    if training.push_to_hub and found_here_alone(model.model_name_or_path):
        raise UserError(
            f"push_to_hub: the backbone {model.model_name_or_path} is not on the model hub, so nobody could "
            "load the upload: leave it out, and upload with the model's push_to_hub(..., save_backbone=True)"
        )
    dtype = model.backbone_dtype
    if dtype == "auto" and MeftConfig.methods()[method.method].trains_backbone:
        dtype = "float32"
    dtype = resolve_dtype(dtype, training.use_cpu)
    config = method_config(method, dtype, model.backbone_quantization)
    if training.learning_rate is None:
        training.learning_rate = default_learning_rate(training.task, config.method)
    if training.head_learning_rate is not None and config.method == "mezo":
        raise UserError("head_learning_rate: mezo has one rate for all that it trains; leave it out")
    if training.cache_features and not config.frozen_encoder:
        raise UserError(
            f"cache_features: {config.method} trains inside the encoder, so its hidden states cannot be kept"
        )
    if training.cache_features:
        check_place(training.cache_features)
    if model.backbone_compile and not config.frozen_encoder:
        raise UserError(
            f"backbone_compile: {config.method} trains inside the encoder; use --torch_compile True instead"
        )
    if training.cuda_graphs and (reason := _graphs_refused(config, training)):
        raise UserError(f"cuda_graphs: {reason}")
    sizes, extractor = load_sizes_and_extractor(model, config)
    task = make_task(model, training, config, sizes, extractor)
    seed = training.seed if training.data_seed is None else training.data_seed
    how = (training.dataloader_num_workers, not training.disable_tqdm and main_process())
    augment = make_augmenter(training, seed, extractor, *how)
    return Settings(model, training, config, dtype, sizes, extractor, task, augment)


def make_task(
    model: ModelArguments,
    training: TrainArguments,
    config: MeftConfig,
    sizes: WhisperConfig,
    extractor: WhisperFeatureExtractor,
) -> Task:
    """What is learnt by a method on a backbone.

    Raises:
        UserError: the method, the backbone or its tokenizer is not for that.
    """
    if training.task == "classify" and model.tokenizer_name is not None:
        raise UserError(
            f"tokenizer_name: {model.tokenizer_name!r} is of transcripts; classes need none: give --task "
            "transcribe, or leave it out"
        )
    if training.task == "classify":
        return Classification(config, sizes, extractor, training)
    return Transcription(config, sizes, extractor, load_language(model, sizes, training.language), training)


def make_augmenter(
    arguments: AugmentArguments,
    seed: int,
    extractor: WhisperFeatureExtractor,
    num_workers: int = 0,
    progress: bool = False,
) -> Augmenter | None:
    """What changes training clips, its recordings found and checked; None where nothing does.

    Args:
        arguments: how. seed: of all choices. extractor: the backbone's feature extractor.
        num_workers: threads that check the recordings. progress: show a bar.

    Raises:
        UserError: a folder of recordings, or a value, cannot be used.
    """
    settings = arguments.augmentation()
    if settings is None:
        return None
    folders = (arguments.noise_dir, arguments.room_dir)
    found = Augmenter(settings, seed, *folders, extractor.sampling_rate, num_workers, progress)
    found.check_bins(extractor.feature_size)
    return found


def _graphs_refused(config: MeftConfig, training: TrainArguments) -> str | None:
    """Why the steps of a run cannot be captured in CUDA graphs, or None."""
    if (reason := graphs_refused(config)) is not None:
        return reason
    others = ("cache_features", "max_frames_per_batch", "gradient_checkpointing", "torch_compile")
    for name in others:
        if getattr(training, name):
            return f"they cannot be used together with {name}"
    if training.device.type != "cuda":
        return f"they need a CUDA device, this run is on {training.device.type}"
    devices = max(training.world_size, training.n_gpu)
    if devices > 1:
        return f"they are for one GPU, this run is on {devices}"
    return None


def method_config(
    arguments: MethodArguments, backbone_dtype: str, backbone_quantization: str | None = None
) -> MeftConfig:
    """The method's configuration; an option that the method does not have is an error."""
    backbone = {"backbone_dtype": backbone_dtype, "backbone_quantization": backbone_quantization}
    return MeftConfig.from_dict({**arguments.chosen(), **backbone})


def load_sizes_and_extractor(
    arguments: ModelArguments, config: MeftConfig
) -> tuple[WhisperConfig, WhisperFeatureExtractor]:
    """The backbone's config and its feature extractor, checked against each other and the method's options.

    Raises:
        UserError: one of them cannot be loaded, or they do not fit each other.
    """
    sizes = load_config(arguments)
    extractor = load_feature_extractor(
        arguments.feature_extractor_name or arguments.model_name_or_path,
        "feature_extractor_name" if arguments.feature_extractor_name else "model_name_or_path",
        revision=arguments.model_revision,
        cache_dir=arguments.cache_dir,
        token=arguments.token,
    )
    data.check_feature_extractor(extractor, sizes, config.max_frames)
    config.check_backbone(sizes.d_model, sizes.encoder_layers, sizes.max_source_positions)
    return sizes, extractor
