"""A MeftTrainer as scripts make their own of it: with a loss, or with model_init."""

import warnings

import pytest
import torch
from modelling_fixtures import ToyClips, randomise, tiny_whisper
from torch.nn.functional import cross_entropy
from whisper_meft import LSTConfig, MeftTrainer, MeZOConfig, get_meft_model

from tests.training.test_trainer import arguments, assert_same, model_of, trained

STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


class Weighted(MeftTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels, reduction="none").mul(labels + 1).mean()
        return (loss, outputs) if return_outputs else loss


class WeightedAndSaid(Weighted):
    loss_is_scaled_for_ga = False


class Noted(MeftTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def run(kind, folder, accumulated, method="lst"):
    options = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 8 // accumulated}
    args = arguments(folder, max_steps=3, optim="sgd", max_grad_norm=0, **options)
    model = model_of("lst") if method == "lst" else get_meft_model(tiny_whisper(**STILL), MeZOConfig())
    trainer = kind(model=model, args=args, train_dataset=ToyClips(24))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        trainer.train()
    return trained(trainer.model), [w for w in told if "loss_is_scaled_for_ga" in str(w.message)]


@pytest.mark.parametrize("method", ["lst", "mezo"])
def test_a_loss_of_its_own_that_counts_as_often_as_gradients_accumulate_is_told_of(method, tmp_path):
    expected, told = run(Weighted, tmp_path, 1, method)
    assert not told
    often, told = run(Weighted, tmp_path, 2, method)
    assert len(told) == 1
    assert any(not torch.allclose(often[name], expected[name], atol=1e-3) for name in expected)
    once, told = run(WeightedAndSaid, tmp_path, 2, method)  # what the warning says
    assert not told
    assert_same(once, expected, 1e-3 if method == "mezo" else 1e-5)
    for kind in (MeftTrainer, Noted):
        assert not run(kind, tmp_path, 2, method)[1]


def test_models_of_model_init(tmp_path):
    made = []

    def make():
        made.append(get_meft_model(tiny_whisper(), LSTConfig(reduction_factor=2 + len(made))))
        return randomise(made[-1], std=0.1)

    args = arguments(tmp_path, max_steps=2)
    trainer = MeftTrainer(model_init=make, args=args, train_dataset=ToyClips(24))
    trainer.train()
    assert trainer.model is made[-1] and len(made) == 2
    assert trainer.method.reduction_factor == 3
    with pytest.raises(RuntimeError, match="model_init"):
        MeftTrainer(args=args)


def test_arguments_by_position_are_the_stock_trainers(tmp_path):
    def collate(clips):
        raise AssertionError("collated")

    trainer = MeftTrainer(model_of("lst"), arguments(tmp_path), collate, train_dataset=ToyClips(8))
    with pytest.raises(AssertionError, match="collated"):
        trainer.train()
    with pytest.raises(TypeError, match="positional"):
        MeftTrainer(model_of("lst"), arguments(tmp_path), None, ToyClips(8))
