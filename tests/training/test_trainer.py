"""The stock transformers.Trainer with a MeftModel: learning, precision, resume, best model, two processes."""

import json
import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch
from modelling_fixtures import CONFIGS, ToyClips, randomise, tiny_whisper
from process_fixtures import two_processes
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from whisper_meft import MeftModel, get_meft_model

METHODS = list(CONFIGS)


def model_of(method="lst", max_frames="fidelity", **options) -> MeftModel:
    config = CONFIGS[method](reduction_factor=4, max_frames=max_frames, **options)
    return randomise(get_meft_model(tiny_whisper(), config), std=0.1)


def arguments(folder, **options) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 5e-3,
        "max_steps": 6,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(model, folder, callbacks=None, size=24, masks=False, **options) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=ToyClips(size, masks=masks),
        eval_dataset=ToyClips(12, seed=1, masks=masks),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def backbone(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def assert_same(first: dict, second: dict, tolerance=0.0) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_frames", ["fidelity", "longest"])
def test_learns_and_leaves_the_backbone_bit_for_bit(method, max_frames, tmp_path):
    model = model_of(method, max_frames)
    frozen, start = backbone(model), trained(model)
    trainer = trainer_of(model, tmp_path, max_steps=40, masks=max_frames == "longest")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before and after["eval_accuracy"] > 0.8
    assert_same(backbone(model), frozen)
    for name, tensor in trained(model).items():
        # A softmax does not see a shift, so UniPT's confidence bias gets no gradient; weight decay is off.
        assert torch.equal(tensor, start[name]) == (name == "side_network.gate.bias" and method == "unipt"), (
            name
        )
    names = {
        n
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        for n, q in model.named_parameters()
        if q is p
    }
    assert names == set(start)  # no optimizer state for the backbone


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"]
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_precision_and_checkpointing(method, options, dtype, tmp_path, recwarn):
    model = model_of(method, backbone_dtype=dtype)
    trainer = trainer_of(model, tmp_path, max_steps=40, **options)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.8
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    assert not [
        w for w in recwarn if "requires_grad" in str(w.message)
    ]  # what recomputation without inputs says


@pytest.mark.parametrize("method", METHODS)
def test_gradient_accumulation_equals_the_whole_batch(method, tmp_path):
    """Also with parts of unequal size: 20 clips are batches of 8, 8 and 4."""
    results = []
    for batch_size, parts in ((20, 1), (8, 3)):
        model = model_of(method)
        trainer = trainer_of(
            model,
            tmp_path,
            size=20,
            max_steps=3,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=parts,
            optim="sgd",
        )
        trainer.train()
        results.append((trained(model), [e["loss"] for e in trainer.state.log_history if "loss" in e]))
    assert_same(results[0][0], results[1][0], tolerance=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-3)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_the_uninterrupted_run(method, tmp_path, caplog):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}
    whole = model_of(method)
    trainer_of(whole, tmp_path / "whole", **options).train()
    stopped = model_of(method)
    trainer_of(stopped, tmp_path / "parts", callbacks=[StopAt(4)], **options).train()
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    try:
        resumed = model_of(method)
        trainer_of(resumed, tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    finally:
        logging.getLogger("transformers").propagate = False
    assert not [r.getMessage() for r in caplog.records if "key" in r.getMessage()]
    assert_same(trained(resumed), trained(whole))
    assert not torch.equal(resumed.classifier.weight, stopped.classifier.weight)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_side_network_and_head_only(method, tmp_path):
    model = model_of(method)
    trainer_of(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    tensors = safetensors.torch.load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert_same(tensors, trained(model))
    bytes_needed = 4 * sum(t.numel() for t in tensors.values())
    assert (tmp_path / "checkpoint-2/model.safetensors").stat().st_size < bytes_needed + 20_000


class Spoil(TrainerCallback):
    """Ruins the model after the first evaluation, so that the best checkpoint is not the last."""

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.classifier.weight.mul_(-3)


def test_best_model_and_early_stopping(tmp_path, caplog):
    model = model_of()
    trainer = trainer_of(
        model,
        tmp_path,
        callbacks=[Spoil(), EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=200,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=20,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    try:
        trainer.train()
    finally:
        logging.getLogger("transformers").propagate = False
    assert not [r.getMessage() for r in caplog.records if "key" in r.getMessage()]
    assert trainer.state.global_step < 200  # stopped early
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{trainer.state.global_step}"
    assert_same(trained(model), safetensors.torch.load_file(best / "model.safetensors"))
    loaded = MeftModel.from_pretrained(best, backbone=tiny_whisper())
    assert_same(trained(loaded), trained(model))


DDP_OPTIONS = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "masks": True}
DDP_SCRIPT = """
import sys
import torch

tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
from test_trainer import DDP_OPTIONS, METHODS, model_of, trained, trainer_of

for method in METHODS:
    model = model_of(method, "longest")
    trainer = trainer_of(
        model,
        f"{folder}/{method}",
        per_device_train_batch_size=4,
        ddp_find_unused_parameters=False,
        save_strategy="steps",
        save_steps=3,
        **DDP_OPTIONS,
    )
    trainer.train()
    torch.save(trained(model), f"{folder}/{method}-{torch.distributed.get_rank()}.pt")
"""


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """The folder and the messages of one run that trains every method on two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "run.py").write_text(DDP_SCRIPT)
    ranks = two_processes(folder / "run.py", Path(__file__).parent, folder)
    return folder, "".join(each.stderr for each in ranks)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_on_the_joined_batch(method, trained_by_two, tmp_path):
    folder, messages = trained_by_two
    assert "find_unused_parameters" not in messages and "missing keys" not in messages
    single = model_of(method, "longest")
    trainer_of(single, tmp_path, per_device_train_batch_size=8, **DDP_OPTIONS).train()
    start = trained(model_of(method, "longest"))
    assert not torch.equal(trained(single)["classifier.weight"], start["classifier.weight"])
    ranks = [torch.load(folder / f"{method}-{rank}.pt") for rank in (0, 1)]
    assert_same(ranks[0], ranks[1])
    assert_same(ranks[0], trained(single), tolerance=1e-5)
    assert_same(safetensors.torch.load_file(folder / method / "checkpoint-3/model.safetensors"), ranks[0])
    config = json.loads((folder / method / "checkpoint-3/config.json").read_text())
    assert config["meft"]["method"] == method
