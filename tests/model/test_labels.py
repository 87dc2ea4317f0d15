"""A backbone that is a classifier already: its head's rows belong to classes by their names."""

import logging

import pytest
import torch
from transformers import WhisperForAudioClassification
from whisper_meft.commands.cli import main
from whisper_meft.model.backbone import load_backbone, set_labels

from tests.modelling_fixtures import randomise, tiny_whisper, whisper_config
from tests.training_fixtures import make_audio_folder, make_backbone, train_command


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder of a trained classifier of b, a and c."""
    names = dict(enumerate("bac"))
    model = tiny_whisper(id2label=names, label2id={v: k for k, v in names.items()})
    randomise(model.classifier)
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    return folder, {name: model.classifier.weight[row].detach().clone() for row, name in names.items()}


@pytest.mark.parametrize("labels", ["bac", "abc", "cab", "ca"])
def test_rows_follow_their_classes(labels, classifier, caplog):
    base = load_backbone(classifier[0])
    bias = dict(zip("bac", base.classifier.bias.tolist()))
    set_labels(base, list(labels))
    assert base.classifier.out_features == len(labels) and not caplog.records
    for row, label in enumerate(labels):
        assert torch.equal(base.classifier.weight[row], classifier[1][label])
        assert base.classifier.bias[row].item() == bias[label]
    assert base.config.id2label == dict(enumerate(labels))
    assert base.classifier.weight.requires_grad


@pytest.mark.parametrize("labels", [["a", "b", "d"], ["x", "y", "z"], ["a", "b", "c", "d"], ["A", "b", "c"]])
def test_other_classes_get_a_new_last_layer_and_a_line(labels, classifier, caplog):
    base = load_backbone(classifier[0])
    projector = base.projector.weight.clone()
    with caplog.at_level(logging.WARNING):
        set_labels(base, labels)
    assert f"classifier of other classes (b, a, c): the data's {len(labels)} classes" in caplog.text
    assert base.classifier.out_features == len(labels) and torch.equal(base.projector.weight, projector)
    known = list(classifier[1].values())
    assert not any(torch.allclose(row, each, atol=0.05) for row in base.classifier.weight for each in known)


@pytest.mark.parametrize("count", [2, 3])
def test_a_head_without_names_is_a_start_value(count, tmp_path, caplog):
    """As before: neither a random head nor one that the checkpoint lacks has rows to be matched."""
    torch.manual_seed(0)
    base = WhisperForAudioClassification(whisper_config())
    weight = base.classifier.weight
    set_labels(base, ["x", "y", "z"][:count])
    assert (base.classifier.weight is weight) == (count == 3) and not caplog.records
    base.base_model_prefix = "model"
    state = {k: v for k, v in base.state_dict().items() if not k.startswith(("projector", "classifier"))}
    base.save_pretrained(tmp_path, state_dict=state)
    loaded = load_backbone(tmp_path)
    assert loaded.head_is_new
    set_labels(loaded, ["p", "q", "r"])
    assert not caplog.records


def test_the_command_line_says_so(tmp_path, capsys):
    names = {0: "north", 1: "south", 2: "west"}
    backbone = make_backbone(tmp_path / "base", id2label=names, label2id={v: k for k, v in names.items()})
    audio = make_audio_folder(tmp_path / "audio", per_class=2)
    command = train_command(backbone, audio, tmp_path / "out", max_steps=1)
    assert main(command) == 0
    assert "the backbone is a classifier of other classes (north, south, west)" in capsys.readouterr().err
