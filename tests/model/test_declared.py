"""Sizes in a config are compared with the weights before anything is made of them."""

import json
import pickle
import resource
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from whisper_meft import LoRAConfig, LSTConfig, MeftModel, UserError, get_meft_model
from whisper_meft.model.backbone import load_backbone
from whisper_meft.model.declared import header_shapes
from whisper_meft.model.pretrained import load_config
from whisper_meft.model.published import convert, to_published
from whisper_meft.options.common import ModelArguments

from tests.modelling_fixtures import tiny_whisper
from tests.training_fixtures import make_backbone

HUGE = 10**9
SIZES = ("d_model", "encoder_layers", "encoder_ffn_dim", "num_mel_bins", "max_source_positions", "num_labels")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.fixture(autouse=True)
def little_memory():
    """What is allocated by a wrong size must fail here, not fill the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("size", [*SIZES, "classifier_proj_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [HUGE, 3])
def test_a_backbones_sizes(size, value, tmp_path):
    folder = change(make_backbone(tmp_path / "base"), **{size: value})
    if (size, value) == ("num_labels", 3):  # its labels are named, and there are two
        return
    for load in (load_backbone, lambda name: load_config(ModelArguments(model_name_or_path=str(name)))):
        with pytest.raises(UserError, match=r"config.json cannot be used: \w+ (is|must be at most) \d+"):
            load(folder)


def test_a_head_that_is_not_in_the_weights_has_a_limit(tmp_path):
    folder = make_backbone(tmp_path / "base")
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "encoder." in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_backbone(change(folder, classifier_proj_size=24)).projector.out_features == 24
    with pytest.raises(UserError, match="classifier_proj_size must be at most 65536, got 1000000000"):
        load_backbone(change(folder, classifier_proj_size=HUGE))
    with pytest.raises(UserError, match="must be a positive integer, got '8'"):
        load_backbone(change(folder, classifier_proj_size="8"))


@pytest.mark.parametrize(
    ("config", "option", "tensor"),
    [(LSTConfig(), "adapter_dim", "linear_1"), (LoRAConfig(r=4), "r", "lora_A")],
)
def test_a_saved_models_options(config, option, tensor, tmp_path):
    get_meft_model(tiny_whisper(), config).save_pretrained(tmp_path, save_backbone=True)
    saved = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path, meft=saved["meft"] | {option: 2 * HUGE})
    with pytest.raises(UserError, match=f"do not fit the model: .*{tensor}.* has shape"):
        MeftModel.from_pretrained(tmp_path)
    change(tmp_path, meft=saved["meft"])
    MeftModel.from_pretrained(tmp_path)
    for values in ({"classifier_proj_size": 60_000}, {"num_hidden_layers": HUGE}, {"num_labels": HUGE}):
        (tmp_path / "config.json").write_text(json.dumps(saved | values))
        with pytest.raises(UserError, match=r"classifier|must be at most"):
            MeftModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [*SIZES, "classifier_proj_size"])
def test_a_published_checkpoints_sizes(size, tmp_path):
    get_meft_model(tiny_whisper(), LSTConfig()).save_pretrained(tmp_path / "ours", save_backbone=True)
    to_published(tmp_path / "ours", tmp_path / "published")
    change(tmp_path / "published", **{size: HUGE})
    with pytest.raises(UserError, match=rf"config.json cannot be used: {size} (is|must be at most)"):
        convert(tmp_path / "published", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_integers_are_no_weights(tmp_path):
    folder = make_backbone(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.conv1.weight"] = tensors["encoder.conv1.weight"].long()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"encoder.conv1.weight in .* holds I64 values, weights must be"):
        load_backbone(folder)
    get_meft_model(tiny_whisper(), LSTConfig()).save_pretrained(tmp_path / "out", save_backbone=True)
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["projector.bias"] = tensors["projector.bias"].long()
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(UserError, match=r"projector.bias holds torch.int64 values instead of floating point"):
        MeftModel.from_pretrained(tmp_path / "out")


def test_a_pickle_that_claims_more_than_it_holds(tmp_path):
    get_meft_model(tiny_whisper(), LSTConfig()).save_pretrained(tmp_path, save_backbone=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors | {"projector.bias": torch.zeros(1).expand(HUGE)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="it does not hold all values of projector.bias"):
        MeftModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, struct.pack("<Q", 2) + b"{}x", struct.pack("<Q", 4) + b"[[]]"]
)
def test_headers_that_are_none(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    if content.endswith(b"{}x"):
        assert header_shapes(tmp_path / "x.safetensors") == {}
        return
    with pytest.raises(UserError, match="cannot read .*x.safetensors, it is damaged"):
        header_shapes(tmp_path / "x.safetensors")


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("whole", [True, False])
def test_a_pickle_is_refused_without_advice_to_run_it(whole, tmp_path, capsys):
    folder = make_backbone(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    if whole:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    else:
        torch.save({"encoder.conv1.weight": Runs()}, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="holds more than tensors, which could run code .* or it is damaged"
    ) as e:
        load_backbone(folder)
    assert "weights_only" not in str(e.value) and "code ran" not in capsys.readouterr().out
