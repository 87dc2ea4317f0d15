"""What loading accepts as transformers does, and damaged configs that it names in one sentence."""

import json

import pytest
import torch
from modelling_fixtures import tiny_whisper
from transformers import AutoModelForAudioClassification, WhisperForAudioClassification
from whisper_meft import LSTConfig, MeftConfig, MeftModel, UserError, get_meft_model


@pytest.fixture
def folder(tmp_path):
    tiny_whisper().save_pretrained(tmp_path / "whisper")
    base = WhisperForAudioClassification.from_pretrained(tmp_path / "whisper")
    get_meft_model(base, LSTConfig(reduction_factor=4)).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def test_the_auto_class_chooses_the_attention(folder):
    for name in ("eager", "sdpa"):
        model = AutoModelForAudioClassification.from_pretrained(folder, attn_implementation=name)
        assert model.encoder.config._attn_implementation == name
    assert MeftModel.from_pretrained(folder).encoder.config._attn_implementation == "sdpa"


def test_the_earlier_name_of_dtype(folder):
    model = MeftModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert model.encoder.dtype == torch.bfloat16
    assert MeftModel.from_pretrained(folder, torch_dtype="auto").encoder.dtype == torch.float32
    model = AutoModelForAudioClassification.from_pretrained(folder, torch_dtype="float16")
    assert model.encoder.dtype == torch.float16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be text or null, got 5"),
        ({"base_model_fingerprint": [1]}, r"base_model_fingerprint must be text or null, got \[1\]"),
        ({"meft": {"method": ["lst"]}}, r"method must be one of .*, got \['lst'\]"),
        (
            {"id2label": {"0": "a", "2": "b", "5": "c"}},
            "id2label must name the classes 0 to 2, none left out",
        ),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "id2label names two classes 'a'"),
        # transformers 5.17 looks at them itself.
        (
            {"id2label": {"0": "a", "1": 1, "2": "b"}},
            "names in id2label must be text, got 1|id2label.*'1': 1",
        ),
    ],
)
def test_a_damaged_config_is_named(folder, changes, message):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        MeftModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "device, message", [("meta", "one that holds weights"), ("nonsense", "the name of a")]
)
def test_a_device_that_holds_nothing(folder, device, message):
    with pytest.raises(UserError, match=f"device must be {message}"):
        MeftModel.from_pretrained(folder, device=device)


@pytest.mark.parametrize("place", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_a_device_map_of_one_device(folder, place):
    kwargs = {"device_map": place, "low_cpu_mem_usage": True, "use_safetensors": True}
    model = AutoModelForAudioClassification.from_pretrained(folder, **kwargs)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_config_is_that_of_a_saved_model(folder):
    model = MeftModel.from_pretrained(folder, config=None)
    model.config.id2label = {0: "x", 1: "y", 2: "z"}
    assert MeftModel.from_pretrained(folder, config=model.config).config.id2label[2] == "z"
    for given in (model.encoder.config, str(folder), model.config.to_dict(), LSTConfig(reduction_factor=2)):
        message = f"config must be None or the MeftModelConfig of a saved model, got {type(given).__name__}"
        with pytest.raises(UserError, match=message):
            MeftModel.from_pretrained(folder, config=given)


def test_any_device_is_the_accelerator_or_the_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(MeftModel, "to", lambda self, device: setattr(self, "went_to", device) or self)
    assert MeftModel.from_pretrained(folder, device_map="auto").went_to == "cpu"


def test_a_model_is_not_divided_among_devices(folder):
    for place in ({"encoder": 0, "head": 1}, {}):
        with pytest.raises(UserError, match="device_map must be one device, 'auto' or {'': device}"):
            MeftModel.from_pretrained(folder, device_map=place)
    with pytest.raises(UserError, match="give device or device_map, not both"):
        MeftModel.from_pretrained(folder, device="cpu", device_map="auto")
    with pytest.raises(UserError, match="got unknown arguments: quantization_config"):
        MeftModel.from_pretrained(folder, quantization_config={})


def test_labels_of_the_base():
    for labels, message in (
        ({0: "a", 2: "b", 5: "c"}, "id2label must name the classes 0 to 2, none left out, got 0, 2, 5"),
        ({0: "a", 1: "a", 2: "b"}, "id2label names two classes 'a'"),
        ({0: "a", 1: None, 2: "b"}, "the names in id2label must be text, got None"),
    ):
        base = tiny_whisper()
        vars(base.config)["id2label"] = labels  # where transformers 5.17 would not take all of them
        with pytest.raises(UserError, match=message):
            get_meft_model(base, LSTConfig(reduction_factor=4))
    base = tiny_whisper()
    base.config.id2label = {"2": "c", "0": "a", "1": "b"}  # as many a script writes it
    model = get_meft_model(base, LSTConfig(reduction_factor=4))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_only_attention_that_there_is():
    model = get_meft_model(tiny_whisper(), LSTConfig(reduction_factor=4))
    for name in ("nonsense", None, {"": "sdpa"}):
        with pytest.raises(UserError, match="attn_implementation must be one of eager, .*sdpa"):
            model.set_attn_implementation(name)
    model.set_attn_implementation("eager")
    assert model.encoder.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="method must be one of"):
        MeftConfig.from_dict({"method": {}})
