"""The backbone stays what it was: bit for bit under training, and what `disable_adapter()` gives back."""

import copy

import pytest
import torch
from modelling_fixtures import CLASSES, ToyClips, batch, mel_mask, randomise, tiny_whisper
from recognition_fixtures import clips, ids_of, logits, recogniser
from safetensors.torch import load_file
from torch.utils.data import Dataset
from training_fixtures import make_audio_folder, make_backbone, train_command
from transformers import TrainingArguments
from whisper_meft import MeftConfig, MeftModel, MeftTrainer, UserError, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.training.transcribing import TranscriptionTrainer

OPTIONS = {
    "lst": {"reduction_factor": 4},
    "unipt": {"reduction_factor": 4},
    "sherl": {"reduction_factor": 4},
    "head": {},
    "weighted_sum": {},
    "adapter": {"adapter_dim": 5},
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"], "lora_dropout": 0.2},
    "lora_plus": {"r": 4, "lora_alpha": 8},
    "adalora": {"init_r": 6, "target_r": 3},
    "s2_lora": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "fc1"]},
}
# Those whose backbone is frozen, all of it.
FROZEN = [name for name, each in MeftConfig.methods().items() if not each.trains_backbone]
INSIDE = [m for m in FROZEN if "target" in MeftConfig.methods()[m].__dataclass_fields__]
WHOLE = ["full", "bitfit", "mezo"]
RECOGNISERS = [
    *((m, {"placement": p}) for m in ("lst", "unipt", "sherl") for p in ("encoder", "decoder")),
    *((m, {"placement": "both"}) for m in ("lst", "unipt")),
    *((m, {"target": t}) for m in INSIDE for t in ("encoder", "decoder", "both")),
]
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
IDS = [f"{method}-{'-'.join(map(str, options.values()))}" for method, options in RECOGNISERS]


def test_every_method_is_here():
    assert set(FROZEN) == set(OPTIONS) and set(FROZEN) | set(WHOLE) == set(MeftConfig.methods())


def config_of(method, **options) -> MeftConfig:
    return MeftConfig.from_dict({"method": method, **OPTIONS.get(method, {}), **options})


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def backbone_of(model) -> dict[str, torch.Tensor]:
    """The backbone's tensors by the names that they have in Hugging Face's models."""
    found = {f"encoder.{name}": tensor for name, tensor in model.encoder.backbone_state().items()}
    if hasattr(model, "decoder"):
        found |= {f"decoder.{name}": tensor for name, tensor in model.decoder.backbone_state().items()}
    return found


def assert_backbone(model, before: dict[str, torch.Tensor], dtype=None) -> None:
    """Every tensor of Whisper, its layers inside other layers' too, is what it was."""
    found = backbone_of(model)
    prefix = "model." if "model.encoder.conv1.weight" in before else ""
    expected = {name.removeprefix(prefix): t for name, t in before.items() if "encoder." in name}
    expected |= {name.removeprefix(prefix): t for name, t in before.items() if "decoder." in name}
    if "proj_out.weight" in before:  # the embedding's, which has one name where parts of it train
        assert model.decoder.proj_out.weight is model.decoder.embed_tokens.weight
        found.pop("decoder.proj_out.weight", None)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        old = expected[name] if dtype is None else expected[name].to(dtype)
        assert tensor.dtype == old.dtype and torch.equal(tensor, old), name


class Said(Dataset):
    """Clips with tokens."""

    def __init__(self, size=8):
        self.features, self.labels = clips(size)
        self.labels[:] = self.labels[0]  # as learnable as can be

    def __len__(self):
        return len(self.features)

    def __getitem__(self, i):
        return {"input_features": self.features[i], "labels": self.labels[i]}


def train(model, folder, **options) -> None:
    """Some steps at a high rate, with weight decay, which no frozen tensor may feel either."""
    recognises = model.task == "transcription"
    arguments = {
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "weight_decay": 0.1,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        **options,
    }
    kind = TranscriptionTrainer if recognises else MeftTrainer
    data = Said() if recognises else ToyClips(8, masks=model.meft_config.max_frames != "fidelity")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    kind(model, TrainingArguments(output_dir=str(folder), **arguments), train_dataset=data).train()
    moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert len(moved) > 0.5 * len(before)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("method", FROZEN)
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"max_frames": "longest", "pooling": "statistics"}, {"gradient_accumulation_steps": 2}),
        ({"backbone_dtype": "bfloat16"}, {"bf16": True}),
        ({}, {"gradient_checkpointing": True}),
    ],
    ids=["plain", "longest", "half", "checkpointing"],
)
def test_training_a_classifier_moves_no_bit_of_the_backbone(method, changes, options, tmp_path):
    base = tiny_whisper()
    before = bits(base)
    model = get_meft_model(base, config_of(method, **changes))
    train(model, tmp_path, **options)
    assert_backbone(model, before, torch.bfloat16 if "backbone_dtype" in changes else None)


@pytest.mark.parametrize(
    ("method", "place", "half"),
    [
        *(pytest.param(*case, False, id=name) for case, name in zip(RECOGNISERS, IDS)),
        *(pytest.param(m, {}, True, id=f"{m}-half") for m in ("lst", "sherl", "lora", "adapter")),
    ],
)
def test_training_a_recogniser_moves_no_bit_of_the_backbone(method, place, half, tmp_path):
    base = recogniser(**STILL)
    before = bits(base)
    dtype = "bfloat16" if half else None
    model = get_meft_model(base, config_of(method, **place, backbone_dtype=dtype))
    train(model, tmp_path, bf16=half)
    assert_backbone(model, before, torch.bfloat16 if half else None)


@pytest.mark.parametrize("method", ["lst", "sherl", "head"])
def test_quantised_weights_stay_too(method, tmp_path):
    model = get_meft_model(tiny_whisper(), config_of(method, backbone_quantization="int8"))
    before = bits(model.encoder)
    train(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_leaves_the_backbones_files_and_refers_to_them(cached, tmp_path):
    backbone = make_backbone(tmp_path / "backbone")
    make_audio_folder(tmp_path / "audio", per_class=4)
    files = {path.name: path.read_bytes() for path in backbone.iterdir()}
    more = {"cache_features": True} if cached else {}
    options = {"num_train_epochs": 2, "eval_strategy": "no", "weight_decay": 0.1, **more}
    assert main(train_command(backbone, tmp_path / "audio", tmp_path / "out", **options)) == 0
    assert {path.name: path.read_bytes() for path in backbone.iterdir()} == files
    loaded = backbone_of(MeftModel.from_pretrained(tmp_path / "out"))
    weights = load_file(backbone / "model.safetensors")
    assert loaded and all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


# ---------------------------------------------------------------- disable_adapter


def plain_states(base, features) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return base.eval().get_encoder()(features, output_hidden_states=True).hidden_states


def assert_same_states(found, expected, tolerance=1e-5) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pooling", ["mean", "statistics"])
@pytest.mark.parametrize("method", FROZEN)
def test_a_trained_classifier_gives_plain_whispers_hidden_states(method, pooling, tmp_path):
    base = tiny_whisper(**STILL)
    plain = copy.deepcopy(base)
    model = get_meft_model(base, config_of(method, pooling=pooling))
    train(model, tmp_path)
    features, labels = batch()
    expected = plain_states(plain, features)
    model.eval()
    with torch.no_grad():
        before = model(features).logits
        with model.disable_adapter():
            found = model(features, labels=labels, output_hidden_states=True)
            assert_same_states(found.hidden_states, expected)
            assert_same_states(model.encoder(features, output_hidden_states=True).hidden_states, expected)
            last = model.encoder(features).last_hidden_state
            torch.testing.assert_close(last, expected[-1], rtol=1e-5, atol=1e-5)
            assert found.logits.shape == (len(features), CLASSES) and found.loss.isfinite()
            if pooling == "mean":
                head = model.classifier(model.projector(expected[-1].mean(1)))
                torch.testing.assert_close(found.logits, head, rtol=1e-4, atol=1e-4)
            assert torch.equal(model(features).logits, found.logits)
            parts = model(features, return_dict=False, output_hidden_states=True)
            assert len(parts) == 2 and torch.equal(parts[0], found.logits)
        assert torch.equal(model(features).logits, before)
        assert model(features, output_hidden_states=True).hidden_states is None
    if method == "head":
        torch.testing.assert_close(found.logits, before, rtol=1e-5, atol=1e-5)
    else:
        assert not torch.allclose(found.logits, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "place"), RECOGNISERS, ids=IDS)
def test_a_trained_recogniser_is_the_plain_whisper(method, place, tmp_path):
    base = recogniser(**STILL)
    plain = copy.deepcopy(base).eval()
    model = randomise(get_meft_model(base, config_of(method, **place))).eval()
    features, labels = clips()
    ids = ids_of(model, labels)
    before, said = logits(model, features, ids), model.generate(features)
    with model.disable_adapter():
        found = logits(model, features, ids)
        torch.testing.assert_close(found, logits(plain, features, ids), rtol=1e-4, atol=1e-4)
        heard = model.get_encoder()(features)
        with torch.no_grad():
            torch.testing.assert_close(
                heard[0], plain.get_encoder()(features).last_hidden_state, rtol=1e-5, atol=1e-5
            )
        assert torch.equal(logits(model, None, ids, encoder_outputs=heard), found)
        torch.testing.assert_close(
            model(features, labels=labels).loss, plain(features, labels=labels).loss, rtol=1e-4, atol=1e-5
        )
        for beams in (1, 3):
            assert torch.equal(
                model.generate(features, num_beams=beams), plain.generate(features, num_beams=beams)
            )
        assert torch.equal(model.generate(encoder_outputs=heard), plain.generate(features))
        assert_same_states(
            model.encoder(features, output_hidden_states=True).hidden_states, plain_states(plain, features)
        )
    assert not torch.allclose(found, before, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(model, features, ids), before)
    assert torch.equal(model.generate(features), said)


def test_what_the_side_network_heard_is_left_out():
    model = randomise(get_meft_model(recogniser(**STILL), config_of("lst", placement="both"))).eval()
    features, labels = clips()
    ids = ids_of(model, labels)
    both = model.get_encoder()(features)
    assert both[0].shape[-1] > model.encoder.hidden_size
    with model.disable_adapter():
        torch.testing.assert_close(
            logits(model, None, ids, encoder_outputs=both), logits(model, features, ids), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("method", FROZEN)
def test_behind_it_all_is_as_before_whatever_happens_inside(method):
    model = get_meft_model(tiny_whisper(**STILL), config_of(method, pooling="statistics"))
    randomise(model)
    frozen_by_hand = next(p for p in model.parameters() if p.requires_grad)
    frozen_by_hand.requires_grad_(False)
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    before, mode = bits(model), {n: m.training for n, m in model.named_modules()}
    features, labels = batch()
    with pytest.raises(KeyError), model.disable_adapter(), model.disable_adapter():
        model(features, labels=labels)
        raise KeyError
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    assert {n: m.training for n, m in model.named_modules()} == mode
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.eval()
        first = model(features).logits
        with model.disable_adapter():
            with model.disable_adapter():
                inner = model(features).logits
            assert torch.equal(model(features).logits, inner)  # the outer one holds on
        assert torch.equal(model(features).logits, first)


@pytest.mark.parametrize("method", ["adalora", "s2_lora"])
def test_no_penalty_is_on_what_does_nothing(method):
    model = randomise(get_meft_model(tiny_whisper(**STILL), config_of(method))).train()
    features, labels = batch()
    with model.disable_adapter():
        loss = model(features, labels=labels)
        assert torch.equal(loss.loss, torch.nn.functional.cross_entropy(loss.logits, labels))
    assert model.penalty() > 0


def test_short_clips_have_the_states_that_they_would_have_alone():
    base = tiny_whisper(**STILL)
    plain = copy.deepcopy(base).eval()
    model = randomise(get_meft_model(base, config_of("lst", max_frames="longest"))).eval()
    features, _ = batch(size=2)
    total = features.shape[-1]
    with torch.no_grad(), model.disable_adapter():
        whole = model(features, mel_mask([total, total], total), output_hidden_states=True).hidden_states
        assert_same_states(whole, plain_states(plain, features))
        mask = mel_mask([total, 20], total)
        mixed = model(features, mask, output_hidden_states=True)
        last = mixed.hidden_states[-1]
        alone = model(features[1:, :, :20], mask[1:, :20], output_hidden_states=True)
    torch.testing.assert_close(last[1:, :10], alone.hidden_states[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.logits[1:], alone.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("make", [tiny_whisper, recogniser])
def test_a_backbone_that_trains_is_not_there_any_more(method, make):
    model = get_meft_model(make(), config_of(method))
    with pytest.raises(UserError, match=f"the backbone's own weights as they are, {method} trains them"):
        with model.disable_adapter():
            pass


def test_cached_states_are_refused(tmp_path):
    model = randomise(get_meft_model(tiny_whisper(**STILL), config_of("lst"))).eval()
    features, _ = batch(size=2)
    states = torch.stack(list(model.encoder.stream(features)), 1)[:, list(model.states_read)]
    given = states.transpose(0, 1).contiguous().transpose(0, 1)
    model(hidden_states=given)
    refused = pytest.raises(UserError, match="hidden_states cannot be used in disable_adapter")
    with refused, model.disable_adapter():
        model(hidden_states=given)


def test_merging_without_what_was_trained_is_refused():
    for base in (tiny_whisper(), recogniser()):
        model = get_meft_model(base, config_of("lora"))
        with model.disable_adapter(), pytest.raises(UserError, match="switched off by disable_adapter"):
            model.merge_and_unload()
        assert model.merge_and_unload() is not None
