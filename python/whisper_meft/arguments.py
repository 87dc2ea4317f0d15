"""Command-line parsing shared by all subcommands: HfArgumentParser with one-line errors, options from a JSON
file, and the option groups that several subcommands have in common. Imports neither torch nor the Trainer."""

import argparse
import difflib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers.hf_argparser import HfArgumentParser

from .errors import UserError
from .files import read_json


class UsageError(UserError):
    """A command line that cannot be understood; the exit status is 2 instead of 1."""

    exit_status = 2


_LONG = 60  # characters of a list of choices that still fit beside the option


class HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of each option and its default where there is one worth showing."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.metavar or action.dest
        name = action.option_strings[0]
        if action.nargs == 0:
            return name
        return f"{name} {self._format_args(action, action.dest.upper())}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "__name__", "value").upper().replace("STRING_TO_BOOL", "BOOL")

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.choices is not None:
            choices = ",".join(map(str, action.choices))
            return "{" + choices + "}" if len(choices) <= _LONG else "NAME"
        return super()._format_args(action, action.metavar or self._get_default_metavar_for_optional(action))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.choices is not None and len(",".join(map(str, action.choices))) > _LONG:
            text += " One of " + ", ".join(map(str, action.choices)) + "."
        hidden = (None, False, "", argparse.SUPPRESS)
        shown = action.option_strings and not any(action.default is value for value in hidden)
        if shown and action.nargs != 0 and "default" not in text:
            text += " (default: %(default)s)"
        return text


class Parser(HfArgumentParser):
    """HfArgumentParser for one subcommand: raises UsageError instead of exiting, suggests the nearest option
    for a misspelt one, and reads options from a JSON file given as the first argument."""

    def __init__(self, command: str, dataclass_types: Sequence[type], usage: str, **kwargs: Any):
        super().__init__(
            dataclass_types,
            prog=f"whisper-meft {command}",
            usage=f"whisper-meft {command} {usage}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        # Each option has a dashed twin (--a_b/--a-b); one spelling is enough in a message.
        message = re.sub(r"(--\w+)((?:/|, )--[\w-]+)+", r"\1", message)
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Parses the arguments of the subcommand into its dataclasses, plus a namespace of the positionals.

        A first argument that ends in .json and is the only positional one is read as a JSON object of
        options; options after it on the command line win over the file's.

        Raises:
            UsageError: unknown options, wrong values, missing arguments.
            UserError: the JSON file cannot be read.
        """
        argv = list(argv)
        if argv and argv[0].endswith(".json") and (len(argv) == 1 or argv[1].startswith("-")):
            argv = self._expand(Path(argv[0])) + argv[1:]
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            self._refuse(unknown[0])
        # HfArgumentParser builds the dataclasses from strings only; hand it what was parsed already.
        outputs = []
        values = vars(namespace)
        for dtype in self.dataclass_types:
            names = [each for each in dtype.__dataclass_fields__ if dtype.__dataclass_fields__[each].init]
            chosen = {name: values.pop(name) for name in names}
            try:
                outputs.append(dtype(**chosen))
            except UserError:
                raise
            except (ValueError, TypeError, ImportError) as error:
                self.error(str(error))
        if values:
            outputs.append(argparse.Namespace(**values))
        return tuple(outputs)

    def _refuse(self, unknown: str) -> NoReturn:
        if not unknown.startswith("-"):
            self.error(f"unexpected argument {unknown!r}")
        name = unknown.split("=")[0].replace("-", "_").replace("__", "--", 1)
        known = [option for action in self._actions for option in action.option_strings[:1]]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        self.error(
            f"unknown option {unknown.split('=')[0]}" + (f", did you mean {close[0]}?" if close else "")
        )

    def _expand(self, path: Path) -> list[str]:
        """The options of a JSON file as command-line arguments, so that both are checked in the same way."""
        options = read_json(path)
        if not isinstance(options, dict):
            raise UserError(f"{path} must hold one JSON object of options, got {type(options).__name__}")
        positionals = [action.dest for action in self._actions if not action.option_strings]
        dests = {action.dest for action in self._actions}
        first: dict[str, list[str]] = {}
        rest: list[str] = []
        for name, value in options.items():
            if name not in dests or name == "help":
                close = difflib.get_close_matches(name, dests, n=1, cutoff=0.7)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise UsageError(f"{path} holds an unknown option {name!r}{hint}")
            if value is None:
                continue
            items = [_as_text(item) for item in (value if isinstance(value, list) else [value])]
            if name in positionals:
                first[name] = items
            elif isinstance(value, list):
                rest += [f"--{name}", *items]
            else:
                # The = keeps values that begin with a dash in one piece.
                rest.append(f"--{name}={items[0]}")
        return [item for name in positionals for item in first.get(name, [])] + rest


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value)


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
    backbone_quantization: Literal["int8", "fp8"] | None = field(
        default=None,
        metadata={
            "help": "hold the frozen linear layers in 8 bits and multiply in them, through torchao; methods "
            "that train inside the encoder cannot"
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
    saved_activations: Literal["exact", "fp8"] | None = field(
        default=None,
        metadata={
            "help": "how side networks keep hidden states for the backward: as they are, or as 8-bit "
            "copies (default: exact)"
        },
    )
    chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "clips that backbone and side network take at a time within a step (default: by "
            "length and device)"
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "layers that are adapted, out of q_proj k_proj v_proj out_proj fc1 fc2; lora family "
            "(default: q_proj v_proj)"
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
        Literal["audiofolder", "manifest", "speechbrain", "kaldi", "kespeech", "huggingface"] | None
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
    speaker_column_name: str | None = field(
        default=None, metadata={"help": "column that holds the speaker (default: detected)"}
    )
    start_column_name: str | None = field(
        default=None, metadata={"help": "column with the start of the segment (default: detected)"}
    )
    stop_column_name: str | None = field(
        default=None, metadata={"help": "column with the end of the segment (default: detected)"}
    )
    data_root: str | None = field(
        default=None,
        metadata={"help": "folder that relative audio paths start from (default: the manifest's)"},
    )
    labels: list[str] | None = field(
        default=None,
        metadata={"help": "keep only examples of these classes (default: all; for KeSpeech the paper's six)"},
    )
    dataset_cache_dir: str | None = field(
        default=None, metadata={"help": "where data sets from the hub are kept"}
    )
    strict: bool = field(
        default=False, metadata={"help": "stop at the first unreadable audio file instead of leaving it out"}
    )

    def reader_options(self) -> dict[str, Any]:
        """These options as keyword arguments of :func:`whisper_meft.data.load_examples`."""
        names = (
            "data_format dataset_config_name audio_column_name label_column_name speaker_column_name "
            "start_column_name stop_column_name data_root"
        )
        options = {name: getattr(self, name) for name in names.split()}
        labels = self.labels[0] if self.labels == ["all"] else self.labels
        return {**options, "labels": labels, "cache_dir": self.dataset_cache_dir}


def hide_options(parser: Parser, group_title: str, shown: Sequence[str]) -> list[str]:
    """Leaves only the options in ``shown`` in the help of one group; returns the names of the others."""
    hidden = []
    for group in parser._action_groups:
        if group.title != group_title:
            continue
        for action in group._group_actions:
            if action.dest not in shown:
                action.help = argparse.SUPPRESS
                if action.option_strings[0] not in hidden and not action.option_strings[0].startswith(
                    "--no_"
                ):
                    hidden.append(action.option_strings[0])
    return hidden
