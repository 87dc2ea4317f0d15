"""What a training step of a method costs: time beside the frozen encoder's inference, and memory."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerState,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from ..memory.counting import count_step
from ..methods import MeftConfig
from ..methods.mezo import MeZO
from ..model.backbone import quiet_transformers
from ..model.base import MeftBase
from ..model.module import get_meft_model

_REPEATS = 7


def measure_costs(
    config: WhisperConfig,
    method: MeftConfig,
    batch: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    base_class: type[PreTrainedModel] = WhisperForAudioClassification,
) -> dict[str, Any]:
    """Time and memory of a training step on a model with drawn weights: neither depends on their values.

    Args:
        config: the backbone's sizes and the number of labels. method: what trains.
        batch: keyword arguments of the model's forward, ``labels`` included; on any device.
        device: where. dtype: of frozen weights. autocast: its type in the forward, or None.
        base_class: transformers' Whisper model of the task.

    Returns:
        ``trainable_parameters``, ``all_parameters``; ``step_time_ratio``: a step's median time divided by
        that of the frozen backbone's forward in inference, measured in turn, on a CPU by the process's CPU
        time; ``counted_mib``: peak memory of a step counted on fake tensors; ``measured_mib``: of a real
        step, by the allocator on CUDA and by watching every storage on a CPU.
    """
    weights = torch.float32 if method.trains_backbone else dtype

    def build() -> MeftBase:
        return get_meft_model(base_class._from_config(config, dtype=weights), method)

    # On a CPU: fake tensors there stand for those of any device.
    given = {name: t.cpu() for name, t in batch.items()}
    with quiet_transformers():
        model = build().to(device)
        batch = {name: t.to(device) for name, t in batch.items()}
        encoder = get_meft_model(
            base_class._from_config(config, dtype=dtype), _hardly_any(config, method, base_class)
        )
        encoder = encoder.to(device).eval()
        step = _step(model, batch, device, autocast)
        ratio = _time_ratio(step, lambda: _inference(encoder, batch), device)
        trainable, total = model.get_nb_trainable_parameters()
        costs = {"trainable_parameters": trainable, "all_parameters": total, "step_time_ratio": ratio}
        encoder.to("meta")  # out of the way
        options = {"hidden_size": config.d_model, "device_type": device.type, "autocast": autocast}
        options["gradients"] = method.method != "mezo"
        costs["counted_mib"] = count_step(build, _fake_inputs(given), fake=True, **options).peak / 2**20
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            costs["measured_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            del model, step
            real = count_step(build, lambda: {n: t.clone() for n, t in given.items()}, fake=False, **options)
            costs["measured_mib"] = real.peak / 2**20
    return costs


def _hardly_any(config: WhisperConfig, method: MeftConfig, base_class: type[PreTrainedModel]) -> MeftConfig:
    """A method that takes hardly any time in inference beside the frozen backbone."""
    options: dict[str, Any] = {"method": "head"}
    if base_class is WhisperForConditionalGeneration:
        options = {"method": "lst", "placement": "decoder", "adapter_dim": 1}
        options["reduction_factor"] = config.d_model
    return MeftConfig.from_dict({**options, "max_frames": method.max_frames})


def _fake_inputs(given: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Makes tensors like ``given``, inside whatever mode is active."""
    return lambda: {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in given.items()}


def _inference(model: MeftBase, batch: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        model(**{name: t for name, t in batch.items() if name != "labels"})


def _step(
    model: MeftBase, batch: dict[str, Tensor], device: torch.device, autocast: torch.dtype | None
) -> Callable[[], None]:
    """One whole training step: forward, backward, optimizer, and what the method does beside them."""
    method = model.meft_config
    trained = [p for p in model.parameters() if p.requires_grad]
    context = nullcontext if autocast is None else lambda: torch.autocast(device.type, dtype=autocast)

    def loss() -> Tensor:
        with context():
            return model(**batch).loss

    if method.method == "mezo":
        zeroth = MeZO(trained, lr=1e-9, eps=method.eps, queries=method.mezo_queries)

        def zeroth_step() -> None:
            zeroth.measure(loss)
            zeroth.step()

        return zeroth_step
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)
    state, allocation = TrainerState(max_steps=10**6), None
    if method.method == "adalora":
        from ..methods.adalora import RankAllocation

        allocation = RankAllocation(model.tuned, method)
        allocation.on_train_begin(None, state, None)

    def step() -> None:
        loss().backward()
        optimizer.step()
        if allocation is not None:
            allocation.on_optimizer_step(None, state, None, optimizer=optimizer)
            state.global_step += 1
        optimizer.zero_grad(set_to_none=True)

    return step


def _time_ratio(step: Callable[[], None], inference: Callable[[], None], device: torch.device) -> float:
    # Process time on a CPU: what else runs on the machine hardly changes it.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[Callable, list[float]] = {step: [], inference: []}
    for repeat in range(_REPEATS + 2):  # the first two warm up
        for call, values in times.items():
            started = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= 2:
                values.append(clock() - started)
    return statistics.median(times[step]) / statistics.median(times[inference])
