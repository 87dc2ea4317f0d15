"""What saving refuses, so that nothing is lost, and what it writes whatever it is given."""

import json

import pytest
import torch
from modelling_fixtures import ToyClips, batch, randomise, tiny_whisper
from recognition_fixtures import clips, recogniser
from transformers import Trainer, TrainingArguments, WhisperForAudioClassification
from whisper_meft import (
    BitFitConfig,
    FullConfig,
    HeadConfig,
    LoRAConfig,
    LSTConfig,
    MeftModel,
    MeZOConfig,
    SHERLConfig,
    UserError,
    get_meft_model,
)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded_whisper(folder):
    tiny_whisper().save_pretrained(folder)
    return WhisperForAudioClassification.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(batch()[0]).logits


@pytest.mark.parametrize("save_backbone", [False, True])
def test_the_folder_of_the_backbone_is_not_written_over(save_backbone, tmp_path, monkeypatch):
    folder = tmp_path / "whisper"
    monkeypatch.chdir(tmp_path)
    model = get_meft_model(loaded_whisper("whisper"), LSTConfig(reduction_factor=4))
    (tmp_path / "other name").symlink_to(folder)
    before = content(folder)
    for name in ("whisper", folder, tmp_path / "other name"):
        with pytest.raises(UserError, match="it is the folder of the backbone"):
            model.save_pretrained(name, save_backbone=save_backbone)
    assert content(folder) == before


def test_a_folder_that_holds_its_backbone_can_be_written_again(tmp_path):
    model = get_meft_model(loaded_whisper(tmp_path / "whisper"), LSTConfig(reduction_factor=4))
    model.save_pretrained(tmp_path / "ours", save_backbone=True)
    again = randomise(MeftModel.from_pretrained(tmp_path / "ours"))
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "ours")), logits(again))
    again.save_pretrained(tmp_path / "ours", save_backbone=True)
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "ours")), logits(again))


def test_what_was_unfrozen_is_not_lost_in_silence(tmp_path):
    model = get_meft_model(tiny_whisper(), LoRAConfig(r=4, lora_alpha=8))
    counted = model.get_nb_trainable_parameters()
    layer = model.encoder.layers[1].fc1.requires_grad_(True)
    named = "encoder.layers.1.fc1.weight, encoder.layers.1.fc1.bias would train, but lora"
    with pytest.raises(UserError, match=named):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[], max_steps=1)
    with pytest.raises(UserError, match=named):
        Trainer(model, arguments, train_dataset=ToyClips(2)).train()
    randomise(model)
    model.save_pretrained(tmp_path / "whole", save_backbone=True)
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "whole")), logits(model))
    layer.requires_grad_(False)
    assert model.get_nb_trainable_parameters() == counted
    model.config.base_model_name_or_path = "elsewhere"
    model.save_pretrained(tmp_path / "lora")


@pytest.mark.parametrize("config", [LoRAConfig(r=4, lora_alpha=8), BitFitConfig(), FullConfig()])
def test_all_of_a_model_unfrozen(config, tmp_path):
    model = get_meft_model(tiny_whisper(), config)
    model.requires_grad_(True)
    with pytest.raises(UserError, match=f"and .* more would train, but {config.method}|embed_positions"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "base, config, refused",
    [
        (tiny_whisper, LSTConfig(reduction_factor=4), False),
        (tiny_whisper, HeadConfig(pooling="statistics"), False),
        (tiny_whisper, SHERLConfig(reduction_factor=4), True),
        (recogniser, SHERLConfig(reduction_factor=4, placement="decoder"), False),
        (recogniser, LoRAConfig(r=4, lora_alpha=8, target="decoder"), False),
    ],
)
def test_a_frozen_encoder_trains_where_a_gradient_enters_it(base, config, refused, tmp_path):
    model = get_meft_model(base(), config)
    counted, of_all = model.get_nb_trainable_parameters()
    model.encoder.requires_grad_(True)
    features, labels = batch() if base is tiny_whisper else clips()
    model(features, labels=labels).loss.backward()
    reached = [p for p in model.encoder.parameters() if p.grad is not None]
    assert bool(reached) == refused
    expected = counted + sum(parameter.numel() for parameter in reached)
    assert model.get_nb_trainable_parameters() == (expected, of_all)
    if not refused:
        model.save_pretrained(tmp_path)
        return
    with pytest.raises(UserError, match=r"encoder.layers.2.* and .* more would train, but sherl"):
        model.save_pretrained(tmp_path)
    model.encoder.layers[-1].requires_grad_(False)
    model.encoder.layer_norm.requires_grad_(False)
    model.save_pretrained(tmp_path)


def test_mezo_moves_what_was_unfrozen_without_a_gradient(tmp_path):
    model = get_meft_model(recogniser(), MeZOConfig(target="decoder"))
    counted, _ = model.get_nb_trainable_parameters()
    bias = model.encoder.layers[0].fc1.bias.requires_grad_(True)
    assert model.get_nb_trainable_parameters()[0] == counted + bias.numel()
    with pytest.raises(UserError, match="encoder.layers.0.fc1.bias would train, but mezo"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config, dtype",
    [(FullConfig(), torch.float16), (BitFitConfig(), torch.bfloat16), (MeZOConfig(), torch.bfloat16)],
)
def test_a_trained_backbone_in_half_precision_is_saved_and_loaded(config, dtype, tmp_path):
    model = randomise(get_meft_model(loaded_whisper(tmp_path / "whisper"), config), std=0.02)
    model.save_pretrained(tmp_path / "float32")
    expected = logits(model)
    model.to(dtype).save_pretrained(tmp_path / "half")
    again = MeftModel.from_pretrained(tmp_path / "half")
    assert again.encoder.dtype == torch.float32 and again.meft_config.backbone_dtype == "float32"
    torch.testing.assert_close(logits(again), expected, rtol=0.05, atol=0.05)
    runs = MeftModel.from_pretrained(tmp_path / "float32", dtype=dtype)
    assert runs.encoder.dtype == dtype and runs.classifier.weight.dtype == torch.float32
    torch.testing.assert_close(logits(runs), expected, rtol=0.1, atol=0.1)
    with pytest.raises(UserError, match="load it without dtype to train it"), torch.no_grad():
        runs.train()(batch()[0])
    runs.save_pretrained(tmp_path / "again")
    assert MeftModel.from_pretrained(tmp_path / "again").encoder.dtype == torch.float32
    # What earlier versions wrote.
    file = tmp_path / "float32/config.json"
    values = json.loads(file.read_text())
    values["meft"]["backbone_dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(values))
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "float32")), expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_a_wrappers_state_dict_is_saved_by_the_names_of_the_model(prefix, tmp_path):
    base = loaded_whisper(tmp_path / "whisper")
    model = randomise(get_meft_model(base, LSTConfig(reduction_factor=4, pooling="statistics")))
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "ours", state_dict=tensors)
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "ours")), logits(model))
    for lost in ("standardisation.mean", "classifier.weight", "side_network.up.linear.bias"):
        fewer = {name: tensor for name, tensor in tensors.items() if not name.endswith(lost)}
        with pytest.raises(UserError, match=f"state_dict must hold all that lst trains, it lacks {lost}"):
            model.save_pretrained(tmp_path / "lost", state_dict=fewer)
    with pytest.raises(UserError, match=r"it lacks .* and \d+ more"):
        model.save_pretrained(tmp_path / "lost", state_dict={})
    assert not (tmp_path / "lost").exists()


def test_a_compiled_part_is_saved_as_itself(tmp_path):
    model = randomise(get_meft_model(loaded_whisper(tmp_path / "whisper"), LSTConfig(reduction_factor=4)))
    expected = logits(model)
    model.side_network = torch.compile(model.side_network, backend="eager")
    model.encoder = torch.compile(model.encoder, backend="eager")
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "ours")), expected)


def test_a_head_that_the_config_does_not_describe_is_not_saved(tmp_path):
    model = get_meft_model(loaded_whisper(tmp_path / "whisper"), LSTConfig(reduction_factor=4))
    model.classifier = torch.nn.Linear(10, 5)
    with pytest.raises(
        UserError, match=r"classifier.weight must have shape \(3, 10\).*num_labels=3.*\(5, 10\)"
    ):
        model.save_pretrained(tmp_path / "ours")
    model.config.id2label = dict(enumerate("abcde"))
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(MeftModel.from_pretrained(tmp_path / "ours")), logits(model))
    model.config.num_labels = 4
    with pytest.raises(UserError, match=r"classifier.weight must have shape \(4, 10\)"):
        model.save_pretrained(tmp_path / "ours")
    model.config.id2label = {0: "a", 1: "a", 2: "b", 3: "c", 4: "d"}
    with pytest.raises(UserError, match="the config: id2label names two classes 'a'"):
        model.save_pretrained(tmp_path / "ours")
