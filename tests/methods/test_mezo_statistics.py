"""MeZO measures slopes of one function: what follows the batches is the same on both sides of a direction."""

import copy

import pytest
import torch
from modelling_fixtures import ToyClips, batch, tiny_whisper
from recognition_fixtures import recogniser
from transformers import TrainingArguments
from whisper_meft import MeftTrainer, MeZOConfig, get_meft_model
from whisper_meft.methods.mezo import MeZO

STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0}


def statistics_model(**options):
    return get_meft_model(tiny_whisper(**STILL), MeZOConfig(pooling="statistics", **options))


@torch.no_grad()
def loss_of(model):
    features, labels = batch()
    return model(features, labels=labels).loss


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("seen", [0, 4])
def test_slopes_are_those_of_the_loss(seen):
    model = statistics_model()
    if seen:
        loss_of(model)
    start, eps = copy.deepcopy(model), 1e-2
    optimizer = MeZO(trained(model), lr=0.0, eps=eps, queries=3, buffers=list(model.buffers()))
    optimizer.measure(lambda: loss_of(model))
    assert model.standardisation.clips == seen + 4  # once, not for each pass
    optimizer.step()
    expected = []
    for query in range(3):
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(start)
            replay = MeZO(trained(moved), lr=0.0, eps=eps, queries=3)
            with torch.no_grad():
                replay._shift(query, sign)
            values.append(loss_of(moved))
        expected.append((values[0] - values[1]) / (2 * eps))
    torch.testing.assert_close(optimizer.last_slopes, torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_the_trainer_tells_which_buffers_follow(tmp_path):
    model = statistics_model(mezo_queries=2)
    options = {"max_steps": 2, "per_device_train_batch_size": 3, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=1e-6, **options)
    trainer = MeftTrainer(model, arguments, train_dataset=ToyClips(6))
    trainer.train()
    assert model.standardisation.clips == 6
    assert len(trainer.optimizer.optimizer.buffers) == 3


def test_weights_that_are_buffers_are_not_copied_in_every_step(tmp_path):
    """Those of an encoder in 8 bits."""
    config = MeZOConfig(target="decoder", backbone_quantization="int8")
    model = get_meft_model(recogniser(), config)
    assert sum(buffer.numel() for buffer in model.buffers()) > 1000
    trainer = MeftTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert trainer.create_optimizer().buffers == ()
