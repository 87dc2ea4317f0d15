"""Several models of one base: those that leave it alone share it, the others say what would go wrong."""

import copy

import pytest
import torch
from modelling_fixtures import batch, randomise, tiny_whisper, whisper_config
from transformers import WhisperForConditionalGeneration
from whisper_meft import (
    AdapterConfig,
    BitFitConfig,
    FullConfig,
    HeadConfig,
    LoRAConfig,
    LSTConfig,
    MeftModel,
    MeZOConfig,
    UserError,
    get_meft_model,
)

LST = LSTConfig(reduction_factor=4)
LORA = LoRAConfig(r=4, lora_alpha=8)


def logits(model):
    with torch.no_grad():
        return model.eval()(batch()[0]).logits


def train(model):
    features, labels = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(features, labels=labels).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("first", [BitFitConfig(), FullConfig()])
def test_a_base_that_was_trained_is_not_taken_over(first):
    base = tiny_whisper()
    model = get_meft_model(base, first)
    train(model)
    for config in (LST, first, HeadConfig(), LORA):
        with pytest.raises(
            UserError, match=f"base was changed since a model of {first.method}.*load it anew"
        ):
            get_meft_model(base, config)
    merged = model.merge_and_unload()
    del model
    with pytest.raises(UserError, match="base was changed"):  # by whatever became of the model
        get_meft_model(base, LST)
    model = get_meft_model(merged, LST)
    assert torch.isfinite(logits(model)).all()


def test_loading_trained_weights_into_a_base_changes_it(tmp_path):
    model = get_meft_model(tiny_whisper(), BitFitConfig())
    train(model)
    model.config.base_model_name_or_path = "nowhere"
    model.save_pretrained(tmp_path)
    base = tiny_whisper()
    again = MeftModel.from_pretrained(tmp_path, backbone=base)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(UserError, match="base was changed since a model of bitfit"):
        MeftModel.from_pretrained(tmp_path, backbone=base)


@pytest.mark.parametrize(
    "later", [BitFitConfig(), FullConfig(), MeZOConfig(), LORA, AdapterConfig(adapter_dim=4)]
)
def test_a_living_model_is_not_changed_by_a_later_one(later):
    base = tiny_whisper()
    model = get_meft_model(base, LST)
    before = logits(model)
    with pytest.raises(
        UserError, match=f"base is used by a model of lst, and {later.method} trains inside it"
    ):
        get_meft_model(base, later)
    assert torch.equal(logits(model), before)
    del model
    assert logits(get_meft_model(base, later)).shape == before.shape


def test_a_frozen_model_is_not_made_of_what_another_is_about_to_train():
    base = tiny_whisper()
    model = get_meft_model(base, BitFitConfig())
    with pytest.raises(UserError, match="base is used by a model of bitfit, and bitfit trains inside it"):
        get_meft_model(base, LST)
    del model
    get_meft_model(base, LST)


def test_frozen_methods_share_a_base():
    base = tiny_whisper()
    models = [randomise(get_meft_model(base, config)) for config in (LST, LST, HeadConfig())]
    before = logits(models[0])
    for model in models[1:]:
        train(model)
    assert torch.equal(logits(models[0]), before)


@pytest.mark.parametrize("option", [{"backbone_dtype": "bfloat16"}, {"backbone_quantization": "int8"}])
def test_a_later_model_does_not_convert_the_backbone_of_a_living_one(option):
    base = tiny_whisper()
    model = get_meft_model(base, LST)
    before = logits(model)
    ((name, value),) = option.items()
    with pytest.raises(
        UserError, match=f"base is used by a model of lst, whose backbone {name} {value} would change too"
    ):
        get_meft_model(base, HeadConfig(**option))
    assert torch.equal(logits(model), before)
    get_meft_model(base, HeadConfig(backbone_dtype="float32"))  # what it is in already
    del model
    assert torch.isfinite(logits(get_meft_model(base, HeadConfig(**option)))).all()


@pytest.mark.parametrize("config", [FullConfig(), BitFitConfig()])
def test_a_cell_run_twice_leaves_the_base_to_the_later_model(config, tmp_path):
    base = tiny_whisper()
    earlier, later = get_meft_model(base, config), get_meft_model(base, config)
    with pytest.raises(UserError, match="cannot be used any more: a later one was made of the same base"):
        logits(earlier)
    with pytest.raises(UserError, match="cannot be used any more"):
        earlier.save_pretrained(tmp_path)
    train(later)
    assert torch.isfinite(logits(later)).all()
    train(copy.deepcopy(later))


@pytest.mark.parametrize("first", [FullConfig(), BitFitConfig()])
def test_another_number_format_is_not_taken_for_training(first):
    base = tiny_whisper()
    get_meft_model(base, first)
    for config in (
        LSTConfig(reduction_factor=4, backbone_dtype="bfloat16"),
        LSTConfig(reduction_factor=4, backbone_dtype="bfloat16"),
        LSTConfig(reduction_factor=4, backbone_dtype="float32"),
        first,
    ):
        model = get_meft_model(base, config)
        del model
    base.half()
    model = get_meft_model(base, LST)
    with torch.no_grad():
        base.get_encoder().layers[0].fc1.bias.add_(1)
    with pytest.raises(UserError, match=f"base was changed since a model of {first.method}"):
        get_meft_model(base, LST)
    del model


def test_what_was_given_up_is_not_merged_from_the_later_models_weights():
    base = tiny_whisper()
    earlier, later = get_meft_model(base, FullConfig()), get_meft_model(base, FullConfig())
    with pytest.raises(UserError, match="this model of full cannot be used any more"):
        earlier.merge_and_unload()
    later.merge_and_unload()


@pytest.mark.parametrize("config", [LORA, AdapterConfig(adapter_dim=4)])
def test_a_cell_of_what_stays_in_the_base_is_not_run_twice(config):
    base = tiny_whisper()
    get_meft_model(base, config)
    with pytest.raises(UserError, match="base already carries an adapter of an earlier model: load it anew"):
        get_meft_model(base, config)


def test_a_recogniser_whose_decoder_trains_changes_its_base():
    base = WhisperForConditionalGeneration._from_config(whisper_config())
    model = get_meft_model(base, FullConfig(target="decoder"))
    with pytest.raises(UserError, match="base is used by a model of full"):
        get_meft_model(base, LST)
    with torch.no_grad():
        next(p for p in model.decoder.parameters() if p.requires_grad).add_(1)
    with pytest.raises(UserError, match="base was changed since a model of full"):
        get_meft_model(base, LST)


def test_a_recogniser_that_was_given_up_transcribes_no_more():
    base = WhisperForConditionalGeneration._from_config(whisper_config())
    earlier, _ = get_meft_model(base, BitFitConfig()), get_meft_model(base, BitFitConfig())
    with pytest.raises(UserError, match="this model of bitfit cannot be used any more"):
        earlier.generate(batch()[0])
