"""Making a training step fit the device: `--auto_batch`, and what is said when it did not."""

import os
from typing import Any

import torch

from ..errors import UserError
from ..methods import MeftConfig
from ..options.training import TrainArguments

# What a training step is, as further arguments of memory.counting.estimate; or its number of classes.
Step = dict[str, Any] | int


def device_memory(use_cpu: bool) -> int:
    """Bytes that training may use: the GPU's memory, or what the machine has free."""
    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def split_batch(batch: int, fitting: int) -> tuple[int, int]:
    """``batch`` in the fewest equal parts of at most ``fitting`` clips, as (clips, parts)."""
    clips = next(size for size in range(min(batch, fitting), 0, -1) if batch % size == 0)
    return clips, batch // clips


def largest_fitting(
    config: MeftConfig, backbone_config, arguments: TrainArguments, dtype: str, step: Step, memory: int
) -> int:
    """The most clips per step that fit into ``memory`` bytes, up to the batch that is asked for; 0 if none.

    Args:
        config: the method. backbone_config: the encoder's. arguments: of the run.
        dtype: number format of the frozen weights. step: what else is counted. memory: bytes.
    """
    from ..memory.counting import largest_batch

    step = {"num_labels": step} if isinstance(step, int) else step
    options = config.to_dict() | {"backbone_dtype": None}
    frames = options["max_frames"] if isinstance(options["max_frames"], int) else None
    if frames is not None:
        # Of a window that is as short; transcripts are heard in all of it.
        options["max_frames"] = "fidelity" if "tokens" in step else "longest"
    on_gpu = not arguments.use_cpu and torch.cuda.is_available()
    place = {"device_type": "cuda" if on_gpu else "cpu"}
    if on_gpu:
        place["capability"] = torch.cuda.get_device_capability()
    autocast = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
    found, _ = largest_batch(
        memory,
        most=arguments.per_device_train_batch_size,
        model=backbone_config,
        dtype=dtype,
        autocast=autocast,
        frames=frames,
        **step,
        **place,
        **options,
    )
    return found


def fit_batch(
    config: MeftConfig, backbone_config, arguments: TrainArguments, dtype: str, step: Step
) -> str | None:
    """Splits the batch into the fewest equal parts that fit the device, added up by gradient accumulation:
    the gradient is the same, since no method mixes clips. Changes ``arguments``.

    Args: see :func:`largest_fitting`.

    Returns:
        What was changed, in a sentence; None if nothing had to be.

    Raises:
        UserError: not even one clip fits.
    """
    memory, batch = device_memory(arguments.use_cpu), arguments.per_device_train_batch_size
    fitting = largest_fitting(config, backbone_config, arguments, dtype, step, memory)
    if not fitting:
        raise UserError(
            f"auto_batch: not even one clip fits into {memory / 2**30:.3g} GiB; see `whisper-meft memory`"
            + (" and --saved_activations int8" if hasattr(config, "saved_activations") else "")
        )
    clips, parts = split_batch(batch, fitting)
    if parts == 1:
        return None
    arguments.per_device_train_batch_size = clips
    arguments.gradient_accumulation_steps *= parts
    return (
        f"auto_batch: a batch of {batch} is computed as {parts} times {clips} clips; at most {fitting} fit "
        f"into {memory / 2**30:.3g} GiB, and the gradient is the same"
    )


def out_of_memory(
    config: MeftConfig, backbone_config, arguments: TrainArguments, dtype: str, step: Step
) -> UserError:
    """What to say when the device ran out of memory: what would have fitted, by the count."""
    memory, batch = device_memory(arguments.use_cpu), arguments.per_device_train_batch_size
    fitting = largest_fitting(config, backbone_config, arguments, dtype, step, memory)
    if fitting >= batch:  # then it is something else that fills the device
        fitting = batch // 2
    said = f"the device's {memory / 2**30:.3g} GiB do not hold a step of {batch} clips"
    if not fitting:
        return UserError(f"{said}, nor of one; see `whisper-meft memory`")
    clips, parts = split_batch(batch, fitting)
    total = parts * arguments.gradient_accumulation_steps
    lean = getattr(config, "saved_activations", None) == "exact"
    return UserError(
        f"{said}: the same result comes from --per_device_train_batch_size {clips} "
        f"--gradient_accumulation_steps {total} (--auto_batch True finds that by itself)"
        + ("; --saved_activations int8 halves what is kept" if lean else "")
    )
