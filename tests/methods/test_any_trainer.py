"""A method is itself in every Trainer and with every loss, or says that it cannot be."""

import re

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer
from whisper_meft import MeftTrainer, UserError

from tests.methods.test_methods import assert_same, config_of, model_of, singular_values, trained, trainer_of
from tests.modelling_fixtures import ToyClips, batch

PENALISED = {"s2_lora": {"l1_weight": 0.3}, "adalora": {"orth_reg_weight": 0.5, "tinit": 1, "tfinal": 1}}


def run(method, folder, trainer=MeftTrainer, loss=None, optimizers=(None, None), options=None, **training):
    model = model_of(method, **(options or {}))
    arguments = trainer_of(model, folder, **{"max_steps": 6, **training}).args
    extra = {"train_dataset": ToyClips(24), "optimizers": optimizers, "compute_loss_func": loss}
    trainer(model=model, args=arguments, **extra).train()
    return model


def plain_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs["logits"].float(), labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_lora_plus_is_itself_in_the_stock_trainer(schedule, tmp_path):
    training = {"weight_decay": 0.1, "lr_scheduler_type": schedule, "warmup_steps": 2}
    stock = run("lora_plus", tmp_path, Trainer, **training)
    ours = run("lora_plus", tmp_path, **training)
    assert_same(trained(stock), trained(ours), 1e-4)
    lora = trained(run("lora", tmp_path, Trainer, **training))
    moved = [
        name for name, value in trained(stock).items() if not torch.allclose(value, lora[name], atol=1e-2)
    ]
    assert any("lora_B" in name for name in moved)


def test_an_optimizer_with_rates_of_its_own_is_left_alone(tmp_path):
    class WithOurOptimizer(Trainer):
        def create_optimizer(self, *_):
            self.optimizer = MeftTrainer(model=self.model, args=self.args).create_optimizer()
            return self.optimizer

    assert_same(trained(run("lora_plus", tmp_path, WithOurOptimizer)), trained(run("lora_plus", tmp_path)))


def test_adalora_allocates_in_the_stock_trainer(tmp_path):
    options = {"tinit": 1, "tfinal": 1, "allocation_interval": 1}
    stock, ours = (run("adalora", tmp_path, kind, options=options) for kind in (Trainer, MeftTrainer))
    assert_same(trained(stock), trained(ours))
    ranks = [int((values != 0).sum()) for values in singular_values(stock).values()]
    assert sum(ranks) == 3 * len(ranks)


@pytest.mark.parametrize("method", ["s2_lora", "adalora", "lora", "mezo"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loss_that_the_trainer_computes_holds_what_the_models_own_does(method, accumulated, tmp_path):
    training = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 8 // accumulated}
    kept = {"options": PENALISED.get(method), **training}
    expected = trained(run(method, tmp_path, **kept))
    assert_same(trained(run(method, tmp_path, loss=plain_loss, **kept)), expected, 1e-6)
    smoothed = trained(run(method, tmp_path, label_smoothing_factor=0.3, **kept))
    assert any(not torch.equal(smoothed[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("method", "weight"), [("s2_lora", "l1_weight"), ("adalora", "orth_reg_weight")])
def test_label_smoothing_keeps_the_penalty(method, weight, tmp_path):
    def penalty(value):
        model = run(method, tmp_path, options={weight: value}, label_smoothing_factor=0.1, max_steps=40)
        return config_of(method, **{weight: 1.0}).penalty(model.encoder).item()

    assert penalty(1.0) < 0.7 * penalty(0.0)


@pytest.mark.parametrize("method", PENALISED)
def test_a_loss_that_would_lack_the_penalty_is_refused(method, tmp_path):
    for options in ({"label_smoothing_factor": 0.1}, {"loss": plain_loss}):
        with pytest.raises(UserError, match=f"{method} adds a penalty to the loss, .*MeftTrainer, or give"):
            run(method, tmp_path, Trainer, **options)
    features, labels = batch()
    model = model_of(method)
    scores = model(features).logits  # looking at them is fine
    with pytest.raises(UserError, match="adds a penalty"):
        cross_entropy(scores, labels).backward()
    model.penalty_elsewhere = True
    (cross_entropy(model(features).logits, labels) + model.penalty()).backward()
    given = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(features, labels=labels).loss.backward()
    torch.testing.assert_close(given, [p.grad for p in model.parameters() if p.requires_grad])
    without = model_of(
        method, **dict.fromkeys(PENALISED[method].keys() & {"l1_weight", "orth_reg_weight"}, 0.0)
    )
    cross_entropy(without(features).logits, labels).backward()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    original = torch.save
    monkeypatch.setattr(torch, "save", lambda value, *_, **__: original(value, "/dev/full"))
    model = model_of("head")
    message = f"cannot write the checkpoint of step 2 in {tmp_path}: the disk is full, or over its quota"
    with pytest.raises(UserError, match=re.escape(message)):
        trainer_of(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
