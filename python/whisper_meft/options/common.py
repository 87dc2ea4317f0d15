"""The option groups that several commands share: model, method, and how data is read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import lines_of, read_json


@dataclass
class ModelArguments:
    """Which pretrained backbone to use and where to find it."""

    _argument_group_name = "backbone"

    model_name_or_path: str = field(
        metadata={
            "help": "Whisper checkpoint: a name on the hub or a folder, for example openai/whisper-small"
        }
    )
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "feature extractor, if not the one beside the model"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer, if not the one beside the model; to transcribe"}
    )
    model_revision: str = field(
        default="main", metadata={"help": "branch, tag or commit of the model on the hub"}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads from the hub are kept"})
    token: str | None = field(
        default=None, metadata={"help": "hub access token; else the one of hf auth login"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "allow code from the hub repository to run"}
    )
    backbone_dtype: Literal["auto", "float32", "float16", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "type the frozen weights are held in; auto is half precision on a GPU, else float32"
        },
    )
    backbone_quantization: Literal["int8", "fp8", "nf4"] | None = field(
        default=None,
        metadata={
            "help": "hold the frozen linear layers, but the first layer's, in 8 bits and multiply in them "
            "(fp8 through torchao), or in 4 bits (nf4); methods that train inside the encoder cannot"
        },
    )
    backbone_compile: bool = field(
        default=False,
        metadata={
            "help": "compile one frozen encoder layer and run all by it (the first batch takes longer); "
            "methods that train inside the encoder cannot"
        },
    )


@dataclass
class MethodArguments:
    """What trains. Options that are not given are the method's own defaults."""

    _argument_group_name = "method"

    method: Literal[
        "lst",
        "unipt",
        "sherl",
        "full",
        "head",
        "bitfit",
        "adapter",
        "lora",
        "lora_plus",
        "adalora",
        "s2_lora",
        "weighted_sum",
        "mezo",
    ] = field(
        default="lst",
        metadata={
            "help": "side networks beside the frozen encoder: lst, unipt, sherl; to compare them with: "
            "full fine-tuning, the head alone, bitfit (biases), bottleneck adapters, LoRA, LoRA+ and AdaLoRA "
            "(these need peft), Sparsely Shared LoRA, a weighted sum of all layers, MeZO (no backward pass)"
        },
    )
    reduction_factor: int | None = field(
        default=None,
        metadata={"help": "backbone width divided by side-network width, side networks only (default: 8)"},
    )
    adapter_dim: int | None = field(
        default=None, metadata={"help": "hidden width of each adapter (default: 256 for lst, 64 for adapter)"}
    )
    layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "encoder layers to tap: numbers from 1, every:k (the last and every k-th before it) or "
            "last:n; lst and unipt only (default: all)"
        },
    )
    saved_activations: Literal["exact", "int8", "fp8"] | None = field(
        default=None,
        metadata={
            "help": "how side networks keep hidden states for the backward: as they are, or as 8-bit "
            "copies, of which int8 errs less than fp8 (default: exact)"
        },
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "how unipt's frames attend to other layers': exact, work with the square of the length; "
            "pooled:p, to means of p frames; linear, with the ReLU before the product; summary, to the mean "
            "over time (default: exact)"
        },
    )
    start: Literal["published", "even", "zero_shot"] | None = field(
        default=None,
        metadata={
            "help": "where sherl starts: as published, with even scores of the layers, or with those and the "
            "last layer's usual input (default: published; to transcribe zero_shot)"
        },
    )
    chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "clips that backbone and side network take at a time within a step (default: by "
            "length and device)"
        },
    )
    placement: Literal["encoder", "decoder", "both"] | None = field(
        default=None,
        metadata={
            "help": "where the side network of a recogniser stands: beside the encoder, the decoder, or both "
            "(lst and unipt); a classifier has an encoder alone (default: encoder)"
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "layers that are adapted, out of q_proj k_proj v_proj out_proj fc1 fc2; lora family "
            "(default: q_proj v_proj)"
        },
    )
    target: Literal["encoder", "decoder", "both"] | None = field(
        default=None,
        metadata={
            "help": "what trains of a recogniser, of the methods that train inside the backbone; a "
            "classifier has an encoder alone (default: both)"
        },
    )
    r: int | None = field(
        default=None,
        metadata={"help": "rank of the update of each weight; lora, lora_plus, s2_lora (default: 64)"},
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "the update is scaled by lora_alpha / rank; lora family (default: 512)"},
    )
    lora_dropout: float | None = field(
        default=None,
        metadata={"help": "dropout on the update's input; lora, lora_plus, adalora (default: 0)"},
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "learning rate of B divided by that of A; lora_plus (default: 16)"}
    )
    init_r: int | None = field(
        default=None, metadata={"help": "rank of each update at the start; adalora (default: 256)"}
    )
    target_r: int | None = field(
        default=None, metadata={"help": "mean rank of the updates at the end; adalora (default: 64)"}
    )
    tinit: int | None = field(
        default=None,
        metadata={"help": "steps before ranks fall; adalora (default: 1000, at most a tenth of the run)"},
    )
    tfinal: int | None = field(
        default=None,
        metadata={"help": "steps at the end with fixed ranks; adalora (default: a tenth of the run)"},
    )
    allocation_interval: int | None = field(
        default=None, metadata={"help": "steps between two allocations of ranks; adalora (default: 10)"}
    )
    orth_reg_weight: float | None = field(
        default=None, metadata={"help": "weight of the orthogonality penalty; adalora (default: 0.5)"}
    )
    l1_weight: float | None = field(
        default=None,
        metadata={"help": "weight of the penalty on the rank coefficients; s2_lora (default: 1e-4)"},
    )
    train_convolutions: bool | None = field(
        default=None, metadata={"help": "train the two convolutions too; full, bitfit, mezo (default: True)"}
    )
    eps: float | None = field(
        default=None, metadata={"help": "distance at which the loss is measured; mezo (default: 1e-3)"}
    )
    mezo_queries: int | None = field(
        default=None,
        metadata={
            "help": "random directions of a step, two forward passes each, whose estimates are averaged; "
            "mezo (default: 1)"
        },
    )
    pooling: Literal["mean", "statistics"] | None = field(
        default=None,
        metadata={
            "help": "what the head reads of a clip: the mean over time of what the method makes, as "
            "published, or with it mean and deviation of the last hidden state that it reads, all "
            "standardised (default: mean)"
        },
    )
    max_frames: str = field(
        default="fidelity",
        metadata={
            "help": "encoder frames (20 ms each) to compute: fidelity = always the full 30 s window as the "
            "published code does, longest = as many as the longest clip of the batch, or a number"
        },
    )

    def __post_init__(self):
        if self.layers is not None:
            layers = [int(each) if str(each).isdecimal() else each for each in self.layers]
            self.layers = layers[0] if len(layers) == 1 and isinstance(layers[0], str) else layers

    def chosen(self) -> dict[str, Any]:
        """The options that were given, by name; :meth:`whisper_meft.MeftConfig.from_dict` takes them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class DataFormatArguments:
    """How examples are read; the same for training and evaluation."""

    _argument_group_name = "data format"

    data_format: (
        Literal[
            "audiofolder",
            "manifest",
            "speechbrain",
            "kaldi",
            "kespeech",
            "librispeech",
            "huggingface",
            "webdataset",
            "lhotse",
        ]
        | None
    ) = field(default=None, metadata={"help": "layout of the data (default: recognised from what is there)"})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "configuration name of a dataset from the hub"}
    )
    audio_column_name: str | None = field(
        default=None, metadata={"help": "column that holds the audio (default: detected)"}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "column that holds the class (default: detected)"}
    )
    text_column_name: str | None = field(
        default=None,
        metadata={"help": "column that holds the transcript, of Kaldi the file (default: detected)"},
    )
    speaker_column_name: str | None = field(
        default=None, metadata={"help": "column that holds the speaker (default: detected)"}
    )
    start_column_name: str | None = field(
        default=None, metadata={"help": "column with the start of the segment (default: detected)"}
    )
    stop_column_name: str | None = field(
        default=None, metadata={"help": "column with the end of the segment (default: detected)"}
    )
    channel_column_name: str | None = field(
        default=None,
        metadata={"help": "column with the channel to hear (default: detected; without one, their mean)"},
    )
    layout: Literal["class", "split/class", "class/split"] | None = field(
        default=None,
        metadata={
            "help": "what folders of audio (or tables in a folder) are, from the outside in; class has no "
            "splits (default: names such as train and test are splits where they come together; tr, cv, val, "
            "dev, trn and tst, which are languages too, only beside another such as train)"
        },
    )
    data_root: str | None = field(
        default=None,
        metadata={"help": "folder that relative audio paths start from (default: the manifest's)"},
    )
    labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "keep only examples of these classes, or of those in a file, .txt with one on each line "
            "or .json with a list (default: all; for KeSpeech the paper's six)"
        },
    )
    dataset_cache_dir: str | None = field(
        default=None, metadata={"help": "where data sets from the hub are kept"}
    )
    strict: bool = field(
        default=False, metadata={"help": "stop at the first unreadable audio file instead of leaving it out"}
    )

    def reader_options(self) -> dict[str, Any]:
        """These options as keyword arguments of :func:`whisper_meft.data.load_examples`.

        Raises:
            UserError: ``labels`` is a file that cannot be read.
        """
        names = (
            "data_format dataset_config_name audio_column_name label_column_name text_column_name "
            "speaker_column_name start_column_name stop_column_name channel_column_name layout data_root"
        )
        options = {name: getattr(self, name) for name in names.split()}
        labels = "all" if self.labels == ["all"] else listed_labels(self.labels)
        return {**options, "labels": labels, "cache_dir": self.dataset_cache_dir}


def listed_labels(given: list[str] | None) -> list[str] | None:
    """The classes that ``--labels`` names: themselves, or a file of one on each line, or of a JSON list.

    Raises:
        UserError: the file cannot be read, or holds something else or none.
    """
    if given is None or len(given) != 1 or Path(given[0]).suffix.lower() not in (".txt", ".json"):
        return given
    path = Path(given[0])
    if path.suffix.lower() == ".json":
        found = read_json(path)
        if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
            raise UserError(f"labels: {path} must hold a JSON list of classes")
    else:
        try:
            found = lines_of(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"labels: cannot read {path}: {reason}") from error
    found = [label.strip() for label in found if label.strip()]
    if not found:
        raise UserError(f"labels: {path} names no classes")
    return found
