"""`whisper-meft memory`: what a training step takes of a card, and what fits, before anything is trained."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..options.common import MethodArguments, ModelArguments
from ..options.parser import Parser, UsageError

if TYPE_CHECKING:
    from ..memory.counting import MemoryCount


_UNITS = {"": 2**30, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_FEW = 64


@dataclass
class MemoryArguments:
    """What is counted."""

    _argument_group_name = "training step"

    model: str = field(
        default="small",
        metadata={"help": "a Whisper: tiny, base, small, medium, large, large-v2, large-v3"},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "instead: a checkpoint on the hub or a folder, of which only the config is read"},
    )
    batch: int | None = field(
        default=None,
        metadata={"help": "clips per step and device (default: 16, or what fits into --gpu_memory)"},
    )
    gpu_memory: str | None = field(
        default=None, metadata={"help": "size of the card, such as 8GiB; says what fits and what would help"}
    )
    num_labels: int | None = field(default=None, metadata={"help": "classes (classify; default: 2)"})
    task: Literal["classify", "transcribe"] = field(
        default="classify",
        metadata={"help": "classify clips, or transcribe them (which takes a whole Whisper)"},
    )
    tokens: int | None = field(
        default=None,
        metadata={"help": "tokens of a transcript, prompt and padding included (transcribe; default: 64)"},
    )
    methods: str | None = field(
        default=None,
        metadata={
            "help": "several methods in a table, with commas between and options behind a colon: "
            "lst,lst:placement=decoder,lora:r=8+target=decoder; other options go to those that have them"
        },
    )
    backbone_dtype: Literal["auto", "float32", "float16", "bfloat16"] = field(
        default="auto",
        metadata={"help": "type the frozen weights are held in; auto is bfloat16 on cuda, else float32"},
    )
    backbone_quantization: Literal["int8", "fp8", "nf4"] | None = field(
        default=None,
        metadata={"help": "count the frozen linear layers in 8 or 4 bits, as a CPU runs them"},
    )
    bf16: bool = field(default=False, metadata={"help": "train under autocast to bfloat16"})
    fp16: bool = field(default=False, metadata={"help": "train under autocast to float16"})
    device: Literal["cuda", "cpu"] = field(default="cuda", metadata={"help": "where training is to run"})
    backend: Literal["auto", "reference", "triton"] = field(
        default="auto", metadata={"help": "kernels of the side networks"}
    )

    def __post_init__(self):
        if self.bf16 and self.fp16:
            raise UsageError("--bf16 and --fp16 cannot be given both")
        if self.tokens is not None and self.task == "classify":
            raise UsageError("--tokens goes with --task transcribe")
        if self.num_labels is not None and self.task == "transcribe":
            raise UsageError("--num_labels goes with --task classify")
        if self.methods is not None and self.gpu_memory is not None:
            raise UsageError("--gpu_memory is for one method, see --method, and not for --methods")
        for name in ("batch", "tokens", "num_labels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be a positive integer, got {value}")


def parse_size(text: str) -> int:
    """Bytes of ``"8GiB"``, ``"8GB"``, ``"8192M"`` or ``"8"`` (GiB). Cards are sold by powers of two, so GB
    means GiB.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UsageError(f"--gpu_memory must be a size such as 8GiB or 8192MiB, got {text!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def size_text(size: int) -> str:
    """Bytes as a person reads them: ``"80 GiB"``, ``"512 MiB"``, ``"1 KiB"``, ``"7 bytes"``."""
    unit = next((unit for unit in "GMK" if size >= _UNITS[unit]), None)
    return f"{size / _UNITS[unit]:.4g} {unit}iB" if unit else f"{size} bytes"


def make_parser() -> Parser:
    """The parser of `whisper-meft memory`."""
    parser = Parser(
        "memory",
        (MemoryArguments, MethodArguments),
        usage="[options]",
        description="Counts the memory of a training step from the sizes of the model alone: every tensor of "
        "the real step, on imagined tensors. Needs no GPU and downloads no weights.",
    )
    method = parser._option_string_actions["--method"]
    method.default, method.help = None, f"{method.help} (default: {method.default})"  # None: it is not given
    return parser


def run(argv: Sequence[str]) -> int:
    """`whisper-meft memory`; returns the exit status."""
    arguments, method = make_parser().parse(argv)[:2]
    if arguments.methods is not None and method.method is not None:
        raise UsageError(
            f"--method {method.method} is for one method: name it among --methods, or leave it out"
        )
    method.method = method.method or MethodArguments.method
    size = None if arguments.gpu_memory is None else parse_size(arguments.gpu_memory)
    if size is not None and arguments.device == "cpu":
        raise UsageError("--gpu_memory goes with --device cuda")
    asked = _settings(arguments, method)

    from ..memory.counting import estimate

    if arguments.methods is not None:
        for line in compared(arguments.methods, arguments.batch or 16, asked):
            print(line, flush=True)
    elif size is None:
        batch = arguments.batch or 16
        print(describe(estimate(batch_size=batch, **asked), batch, asked))
    elif arguments.batch is not None:
        count = estimate(batch_size=arguments.batch, **asked)
        print(describe(count, arguments.batch, asked))
        print(_verdict(count, size))
    if size is not None:
        print(advice(size, asked))
    return 0


def _settings(arguments: MemoryArguments, method: MethodArguments) -> dict[str, Any]:
    """What :func:`whisper_meft.memory.counting.estimate` takes, but for the batch."""
    model: Any = arguments.model
    if arguments.model_name_or_path is not None:
        from ..model.pretrained import load_config

        model = load_config(ModelArguments(model_name_or_path=arguments.model_name_or_path))
    dtype = arguments.backbone_dtype
    if dtype == "auto":
        dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    return {
        "model": model,
        "dtype": dtype,
        "autocast": "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None,
        "num_labels": 2 if arguments.num_labels is None else arguments.num_labels,
        "task": arguments.task,
        "tokens": 64 if arguments.tokens is None else arguments.tokens,
        "device_type": arguments.device,
        "backend": arguments.backend,
        "backbone_quantization": arguments.backbone_quantization,
        **method.chosen(),
    }


def describe(count: "MemoryCount", batch: int, asked: dict[str, Any]) -> str:
    """The count as a few lines of text."""
    from ..memory.counting import CONTEXT, GIB

    on_gpu = asked["device_type"] == "cuda"
    lines = [
        f"{_called(asked)} on {_step(asked, batch)}: {count.trainable_parameters:,d} of "
        f"{count.parameters:,d} parameters train",
        "",
        f"  {count.peak / GIB:8.2f} GiB  most in use at once, in the {count.peak_phase} phase",
    ]
    if on_gpu:
        lines += [
            f"  {count.reserved / GIB:8.2f} GiB  taken from the card by torch's allocator",
            f"  {(count.reserved + CONTEXT) / GIB:8.2f} GiB  with the CUDA context",
        ]
    lines += ["", "what is in use at the peak:"]
    for contributor, nbytes in sorted(count.contributors.items(), key=lambda item: -item[1]):
        if nbytes:
            lines.append(f"  {nbytes / GIB:8.3f} GiB  {contributor}")
    lines += ["", "peak by phase:"]
    lines += [f"  {usage.total / GIB:8.3f} GiB  {phase}" for phase, usage in count.phases.items()]
    return "\n".join(lines)


def _step(asked: dict[str, Any], batch: int) -> str:
    """What a step is of, in words."""
    name = asked["model"] if isinstance(asked["model"], str) else "the given model"
    tokens = f", {asked['tokens']} tokens" if asked["task"] == "transcribe" else ""
    return f"{name}, batch {batch}{tokens}"


def _called(asked: dict[str, Any]) -> str:
    """A method in words, with what tells it from itself elsewhere."""
    if asked["task"] == "classify":
        return asked["method"]
    options = _option_names(asked["method"])
    if "placement" in options:
        return f"{asked['method']}, {asked.get('placement') or 'encoder'}"
    return f"{asked['method']}, {asked.get('target') or 'both'}" if "target" in options else asked["method"]


def compared(methods: str, batch: int, asked: dict[str, Any]) -> Iterator[str]:
    """Lines of a table of methods counted alike: GiB in use at once, GiB taken from the card, and how
    many parameters train.

    Args:
        methods: as ``compare`` takes them. batch, asked: as for :func:`describe`.

    Raises:
        UsageError: no such method, or an option that none of them has.
    """
    from ..comparison.arguments import parse_method, split_methods
    from ..memory.counting import GIB, estimate
    from ..methods import MeftConfig

    entries = [parse_method(entry) for entry in split_methods(methods)]
    unknown = [name for name, _ in entries if name not in MeftConfig.methods()]
    if unknown or not entries:
        known = ", ".join(sorted(MeftConfig.methods()))
        raise UsageError(f"--methods: {unknown[0] if unknown else ''!r} is none of {known}")
    shared = {name: value for name, value in asked.items() if name in _all_option_names()}
    for name in shared:
        if not any(name in _option_names(method) for method, _ in entries):
            raise UsageError(f"--{name} is an option of none of {', '.join(name for name, _ in entries)}")
    rest = {name: value for name, value in asked.items() if name not in shared and name != "method"}
    heading = f"{_step(asked, batch)}: GiB in use at once, GiB taken from the card, parameters that train"
    for number, (method, own) in enumerate(entries):
        given = {name: value for name, value in shared.items() if name in _option_names(method)} | own
        settings = {**rest, "method": method, **given}
        count = estimate(batch_size=batch, **settings)
        if number == 0:  # what cannot be counted has no heading
            yield heading
        extra = [f"{k}={v}" for k, v in own.items() if k not in ("placement", "target")]
        called = ", ".join([_called(settings), *extra])
        numbers = f"{count.peak / GIB:8.2f} {count.reserved / GIB:8.2f} {count.trainable_parameters:13,d}"
        yield f"  {called:<28}{numbers}"


def _all_option_names() -> set[str]:
    from ..methods import MeftConfig

    return set().union(*(_option_names(method) for method in MeftConfig.methods()))


def _verdict(count: "MemoryCount", size: int) -> str:
    from ..memory.counting import CONTEXT, GIB

    needed = count.reserved + CONTEXT
    text = "fits" if needed <= size else "does not fit"
    return f"\n{needed / GIB:.2f} GiB {text} into {size_text(size)}.\n"


def advice(size: int, asked: dict[str, Any]) -> str:
    """Largest batches that fit a card of ``size`` bytes: with the settings as given and with leaner ones.

    Raises:
        UserError: not even one clip fits with any of them; says how much the leanest needs.
    """
    from ..memory.counting import CONTEXT, GIB, MOST, estimate, largest_batch

    lines = [f"largest batch that fits into {size_text(size)} (to about 5 %):"]
    tried: list[tuple[str, dict[str, Any], int]] = []

    def try_with(text: str, **options: Any) -> int:
        batch, count = largest_batch(size, **{**asked, **options})
        needed = "" if count is None else f" ({(count.reserved + CONTEXT) / GIB:.2f} GiB)"
        shown = f"at least {batch}" if batch == MOST else batch or "none"
        lines.append(f"  {shown:>6}  {text}{needed}")
        tried.append((text, options, batch))
        return batch

    batch = try_with("as given")
    if "saved_activations" in _option_names(asked["method"]):
        lean = {"saved_activations": "int8"}
        if asked.get("saved_activations", "exact") == "exact":
            batch = try_with("with --saved_activations int8", **lean)
        if batch < _FEW and asked.get("chunk_size") != 1:  # beyond, a chunk's share of the memory is small
            try_with("with --saved_activations int8 --chunk_size 1", **lean, chunk_size=1)
    batches = [batch for _, _, batch in tried]
    if not any(batches):
        needs = [
            (estimate(batch_size=1, **{**asked, **options}).reserved, text) for text, options, _ in tried
        ]
        least, text = min(needs)
        enough = math.ceil(100 * (least + CONTEXT) / GIB) / 100  # rounded up, so that it fits if given
        raise UserError(
            f"--gpu_memory: not even one clip fits into {size_text(size)}; the least that {asked['method']} "
            f"needs is {enough:.2f} GiB, {text}"
        )
    if MOST in batches:
        lines.append(f"The search stops at {MOST} clips, so more may fit where it says at least.")
    lines.append(
        "No method mixes clips, so --gradient_accumulation_steps makes up for a smaller batch exactly."
    )
    return "\n".join(lines)


def _option_names(method: str) -> set[str]:
    from dataclasses import fields

    from ..methods import MeftConfig

    return {each.name for each in fields(MeftConfig.methods()[method])}
