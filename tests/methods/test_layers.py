"""Tapping a part of the layers: by number, every k-th, or the last n; and stopping after the last of them."""

import pytest
import torch
from modelling_fixtures import LAYERS, batch, tiny_whisper
from whisper_meft import LSTConfig, MeftConfig, MeftModel, UniPTConfig, get_meft_model
from whisper_meft.errors import UserError
from whisper_meft.methods.side_networks import tapped_layers
from whisper_meft.options.common import MethodArguments


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, None),
        ([2, 5], [2, 5]),
        ("every:1", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ("every:3", [3, 6, 9, 12]),
        ("every:5", [2, 7, 12]),
        ("every:12", [12]),
        ("last:1", [12]),
        ("last:4", [9, 10, 11, 12]),
    ],
)
def test_rules_name_layers(layers, expected):
    assert tapped_layers(layers, 12) == expected


@pytest.mark.parametrize("text", ["every", "every:", "every:0", "last:-1", "last:x", "first:3", "3", ""])
def test_other_words_are_refused(text):
    with pytest.raises(UserError, match="'every:k' or 'last:n'"):
        LSTConfig(layers=text)


@pytest.mark.parametrize("text", ["every:4", "last:4"])
def test_more_layers_than_there_are(text):
    with pytest.raises(UserError, match="more than the backbone's 3 layers"):
        get_meft_model(tiny_whisper(), UniPTConfig(reduction_factor=4, layers=text))


@pytest.mark.parametrize("config", [LSTConfig, UniPTConfig])
@pytest.mark.parametrize(("layers", "taps"), [("every:2", (1, 3)), ("last:2", (2, 3)), ([1, 2], (1, 2))])
def test_models_tap_them_and_remember(config, layers, taps, tmp_path):
    torch.manual_seed(0)
    model = get_meft_model(tiny_whisper(), config(reduction_factor=4, layers=layers)).eval()
    assert model.side_network.taps == taps
    model.save_pretrained(tmp_path, save_backbone=True)
    loaded = MeftModel.from_pretrained(tmp_path)
    assert loaded.meft_config.layers == layers and loaded.side_network.taps == taps
    features = batch()[0]
    assert torch.equal(loaded(features).logits, model(features).logits)
    explicit = get_meft_model(tiny_whisper(), config(reduction_factor=4, layers=list(taps))).eval()
    explicit.load_state_dict(model.state_dict())
    assert torch.equal(explicit(features).logits, model(features).logits)


@pytest.mark.parametrize("config", [LSTConfig, UniPTConfig])
@pytest.mark.parametrize("last", range(1, LAYERS + 1))
def test_layers_behind_the_last_tapped_one_are_not_run(config, last):
    model = get_meft_model(tiny_whisper(), config(reduction_factor=4, layers=[last]))
    ran = set()
    for number, layer in enumerate(model.encoder.layers, 1):
        layer.fc1.register_forward_hook(lambda *_, number=number: ran.add(number))
    features, labels = batch()
    model(features, labels=labels).loss.backward()
    assert ran == set(range(1, last + 1))


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["every:2"], "every:2"), (["1", "3"], [1, 3]), (["2"], [2]), ([1, 2], [1, 2]), (None, None)],
)
def test_the_command_line_takes_both(given, expected):
    arguments = MethodArguments(layers=given)
    assert arguments.layers == expected
    assert MeftConfig.from_dict(arguments.chosen()).layers == expected


def test_a_rule_among_numbers_is_refused():
    with pytest.raises(UserError, match="every entry of layers must be a positive integer, got 'last:2'"):
        MeftConfig.from_dict(MethodArguments(layers=["1", "last:2"]).chosen())
