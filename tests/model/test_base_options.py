"""What the base's config asks for is taken over, or a warning says that it is not."""

import warnings

import pytest
import torch
from modelling_fixtures import batch, tiny_whisper
from whisper_meft import HeadConfig, LoRAConfig, LSTConfig, WeightedSumConfig, get_meft_model


def warnings_of(base, config):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = get_meft_model(base, config)
    return model, [str(each.message) for each in told]


def test_a_weighted_sum_goes_on_from_the_bases():
    features, _ = batch()
    base = tiny_whisper(use_weighted_layer_sum=True).eval()
    torch.nn.init.normal_(base.layer_weights, std=2)
    with torch.no_grad():
        expected = base(features).logits
        model, told = warnings_of(base, WeightedSumConfig())
        torch.testing.assert_close(model.eval()(features).logits, expected)
    assert not told


@pytest.mark.parametrize("config", [HeadConfig(), LSTConfig(reduction_factor=4), LoRAConfig(r=2)])
def test_other_methods_say_that_they_do_not_sum_layers(config):
    _, told = warnings_of(tiny_whisper(use_weighted_layer_sum=True), config)
    assert len(told) == 1 and f"{config.method} does not sum its layers" in told[0]
    assert not warnings_of(tiny_whisper(), config)[1]
