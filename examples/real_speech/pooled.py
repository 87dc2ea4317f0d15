"""The plain rival: logistic regression on the frozen encoder's states, pooled over time, layer by layer."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from whisper_meft import data
from whisper_meft.evaluation.logistic import fit_best
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.files import write_json

from benchmarks import record

from .cells import ORIGIN, Study, digits
from .plan import row

STRENGTHS = (1e-4, 1e-3, 1e-2)
TOLERANCE = 1e-5
POOLINGS = {"mean": ("mean",), "statistics": ("mean", "deviation")}


def pooled_states(study: Study, task: str) -> dict[str, dict[str, Tensor]]:
    """``mean`` and ``deviation`` over time of every clip's layer-normed states, (layers + 1, D), by clip."""
    reader = row("weighted_sum", task)
    study.fill_cache(reader)
    path = study.work / "pooled" / f"{task}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    cache = FeatureCache(study.cache_folder(reader))
    found = {}
    for split in ("train", "dev", "test"):
        for example in data.load_examples(str(study.work / "folds" / task / "0" / f"{split}.csv")):
            clip = cache.read(cache.find(example), cache.layers)
            states = torch.nn.functional.layer_norm(clip.states.float(), clip.states.shape[-1:])
            found[Path(example.audio).stem] = {
                "mean": states.mean(1),
                "deviation": states.std(1, correction=0),
            }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def run_logistic(study: Study, task: str) -> None:
    """A row for every layer and pooling, and for the layer that each fold's validation clips choose."""
    folds = study.task(task)
    layers = None
    for number, fold in enumerate(folds):
        path = study.work / "rows" / task / "logistic" / f"fold{number}.json"
        if path.is_file():
            continue
        states = pooled_states(study, task)
        layers = len(next(iter(states.values()))["mean"])
        labels = sorted({clip.label for clip in fold["train"]})
        classes = {split: torch.tensor([labels.index(clip.label) for clip in fold[split]]) for split in fold}
        cells = []
        for pooling, parts in POOLINGS.items():
            for layer in range(layers):
                vectors = {split: _vectors(states, fold[split], layer, parts) for split in fold}
                started = time.process_time()
                sets = [(vectors[split], classes[split]) for split in ("train", "dev")]
                model, chosen = fit_best(*sets, len(labels), STRENGTHS, TOLERANCE)
                cells.append(
                    {
                        "entry": f"logistic:layer={layer}+pooling={pooling}",
                        **chosen,
                        "predicted": digits(model.predict(vectors["test"]).tolist()),
                        "cpu_seconds": round(time.process_time() - started, 1),
                        "trainable_parameters": len(labels) * (vectors["train"].shape[1] + 1),
                    }
                )
        origin = {key: value for key, value in record.environment("cpu").items() if key in ORIGIN}
        write_json(path, {"task": task, "fold": number, "status": "ok", "cells": cells, "origin": origin})
        best = max(cells, key=lambda cell: cell["validation_accuracy"])
        print(
            f"{task} logistic fold {number}: {best['entry']}, validation {best['validation_accuracy']:.1%}",
            flush=True,
        )


def _vectors(
    states: dict[str, dict[str, Tensor]], clips: Sequence[Any], layer: int, parts: Sequence[str]
) -> Tensor:
    return torch.stack([torch.cat([states[clip.key][part][layer] for part in parts]) for clip in clips])
