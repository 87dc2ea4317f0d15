"""``--head_learning_rate``: the head in groups of its own, everything else as it was."""

import pytest
import torch
from modelling_fixtures import ToyClips, tiny_whisper
from training_fixtures import make_audio_folder, make_backbone, train_command
from transformers import TrainingArguments
from whisper_meft import MeftConfig, MeftTrainer, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.options.training import TrainArguments

OPTIONS = {"adalora": {"init_r": 4, "target_r": 2}}
METHODS = [method for method in MeftConfig.methods() if method != "mezo"]


def trainer_of(method: str, folder, **options) -> MeftTrainer:
    torch.manual_seed(0)
    config = MeftConfig.from_dict({"method": method, **OPTIONS.get(method, {})})
    arguments = TrainArguments(
        output_dir=str(folder),
        learning_rate=1e-3,
        weight_decay=0.1,
        save_strategy="no",
        use_cpu=True,
        **options,
    )
    return MeftTrainer(get_meft_model(tiny_whisper(), config), arguments, train_dataset=ToyClips())


@pytest.mark.parametrize("method", METHODS)
def test_the_head_has_its_rate_and_all_else_what_it_had(method, tmp_path):
    plain = trainer_of(method, tmp_path).create_optimizer()
    trainer = trainer_of(method, tmp_path, head_learning_rate=5e-2)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    model = trainer.model
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    before = [(p.shape, group) for group in plain.param_groups for p in group["params"]]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = found[id(parameter)]
            is_head = name.startswith(("projector", "classifier"))
            if is_head:
                assert group["lr"] == 5e-2
            else:
                assert any(g["lr"] == group["lr"] and shape == parameter.shape for shape, g in before)
            assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.1) or not is_head


def test_the_same_rate_trains_the_same(tmp_path):
    states = []
    for options in ({}, {"head_learning_rate": 1e-3}, {"head_learning_rate": 1e-1}):
        trainer = trainer_of("lst", tmp_path, max_steps=4, **options)
        trainer.train()
        states.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=0)
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


def test_arguments_of_the_stock_trainer_have_none(tmp_path):
    model = get_meft_model(tiny_whisper(), MeftConfig.from_dict({"method": "head"}))
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=2e-3, use_cpu=True)
    groups = MeftTrainer(model, arguments, train_dataset=ToyClips()).create_optimizer().param_groups
    assert {group["lr"] for group in groups if group["params"]} == {2e-3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_learning_rate": 0}, "--head_learning_rate must be above 0 and finite, got 0.0"),
        (
            {"head_learning_rate": 1e-3, "method": "mezo", "reduction_factor": None},
            "mezo has one rate for all",
        ),
    ],
)
def test_mistakes_give_one_line(options, message, tmp_path, capsys):
    make_backbone(tmp_path / "backbone")
    make_audio_folder(tmp_path / "audio", per_class=2)
    argv = train_command(tmp_path / "backbone", tmp_path / "audio", tmp_path / "out", **options)
    assert main(argv) != 0
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and not any("Traceback" in line for line in error)
