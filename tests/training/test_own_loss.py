"""A MeftTrainer as scripts make their own of it: with a loss, or with model_init."""

import pytest
from modelling_fixtures import ToyClips, randomise, tiny_whisper
from whisper_meft import LSTConfig, MeftTrainer, get_meft_model

from tests.training.test_trainer import arguments


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
