"""The methods that the side networks are compared with: one table, the same demands on each."""

import copy
import dataclasses
import json
import sys
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from modelling_fixtures import LAYERS, WIDTH, ToyClips, batch, mel_mask, randomise, tiny_whisper
from process_fixtures import two_processes
from torch._subclasses.fake_tensor import FakeTensorMode
from training_fixtures import make_audio_folder, make_backbone, train_command
from transformers import TrainerCallback, TrainingArguments, WhisperConfig, WhisperForAudioClassification
from whisper_meft import (
    AdaLoRAConfig,
    FullConfig,
    LoRAConfig,
    MeftConfig,
    MeftModel,
    MeftTrainer,
    MeZOConfig,
    S2LoRAConfig,
    SHERLConfig,
    UserError,
    get_meft_model,
)
from whisper_meft.commands.cli import main
from whisper_meft.methods.mezo import MeZO
from whisper_meft.model.published import to_published
from whisper_meft.options.common import MethodArguments
from whisper_meft.training.gradients import GradientReport, group_of

# Of each method: options, learning rate, and which of the encoder's tensors train.
TABLE = {
    "full": ({}, 5e-3, lambda name: "embed_positions" not in name),
    "head": ({}, 2e-2, lambda name: False),
    "weighted_sum": ({}, 2e-2, lambda name: False),
    "bitfit": ({}, 5e-3, lambda name: name.endswith("bias")),
    "adapter": ({"adapter_dim": 5}, 5e-3, lambda name: ".down." in name or ".up." in name),
    "lora": ({"r": 4, "lora_alpha": 8}, 5e-3, lambda name: "lora_" in name),
    "lora_plus": ({"r": 4, "lora_alpha": 8}, 2e-3, lambda name: "lora_" in name),
    "adalora": ({"init_r": 6, "target_r": 3}, 5e-3, lambda name: "lora_" in name),
    "s2_lora": (
        {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "fc1"]},
        5e-3,
        lambda name: "lora_" in name or "coefficients" in name,
    ),
    "mezo": ({}, 1e-3, lambda name: "embed_positions" not in name),
}
METHODS = list(TABLE)
HALF_BACKBONE = [m for m in METHODS if not MeftConfig.methods()[m].trains_backbone]
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def config_of(method, **options) -> MeftConfig:
    return MeftConfig.from_dict({"method": method, **TABLE[method][0], **options})


def model_of(method, dtype=None, **options) -> MeftModel:
    torch.manual_seed(5)  # what a method adds is drawn
    return get_meft_model(tiny_whisper(dtype=dtype, **STILL), config_of(method, **options))


def trained(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def frozen(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def assert_same(first: dict, second: dict, tolerance=0.0) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=tolerance, atol=tolerance, msg=name)


def trainer_of(model, folder, callbacks=None, masks=False, size=24, **options) -> MeftTrainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 12,
        "learning_rate": TABLE[model.meft_config.method][1],
        "max_steps": 40,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 10,
        "seed": 3,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }
    return MeftTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=ToyClips(size, masks=masks),
        eval_dataset=ToyClips(12, seed=1, masks=masks),
        callbacks=callbacks,
    )


def scores(model, features) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(features).logits


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("method", METHODS)
def test_trains_saves_reloads_and_merges(method, tmp_path):
    model = model_of(method)
    start, still, report = trained(model), frozen(model), GradientReport(model)
    assert {n for n in start if n.startswith("encoder.")} == {
        f"encoder.{n}" for n, _ in model.encoder.named_parameters() if TABLE[method][2](n)
    }
    trainer = trainer_of(model, tmp_path / "run", [report])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < (0.9 if method == "mezo" else 0.3) * before
    assert_same(frozen(model), still)
    assert not [name for name, tensor in trained(model).items() if torch.equal(tensor, start[name])]

    report.check()
    norms = report.report()["gradient_norms"]
    expected = {"slope"} if method == "mezo" else {group_of(name) for name in start}
    assert set(norms) == expected and all(values["mean"] > 0 for values in norms.values())

    features, _ = batch()
    model.save_pretrained(tmp_path / "saved")
    tensors = safetensors.torch.load_file(tmp_path / "saved/model.safetensors")
    ranks = {n for n in model.state_dict() if "ranknum" in n}  # AdaLoRA's scaling
    positions = {"encoder.embed_positions.weight"} if method in ("full", "mezo") else set()
    assert set(tensors) - positions == set(start) | ranks
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    loaded = MeftModel.from_pretrained(tmp_path / "saved", backbone=tiny_whisper(**STILL))
    assert torch.equal(scores(loaded, features), scores(model, features))
    assert trained(loaded).keys() == start.keys()  # what trained goes on training

    if not model.meft_config.can_merge:
        with pytest.raises(UserError, match="cannot be merged.*lora"):
            model.merge_and_unload()
        return
    plain = model.merge_and_unload()
    assert type(plain) is WhisperForAudioClassification
    assert plain.config.id2label == model.config.id2label
    torch.testing.assert_close(scores(plain, features), scores(model, features), rtol=1e-5, atol=1e-5)
    fresh = scores(tiny_whisper(**STILL), features)
    assert (scores(plain, features) - fresh).abs().max() > 0.1  # merged is not merely untouched
    plain.save_pretrained(tmp_path / "plain")
    again = WhisperForAudioClassification.from_pretrained(tmp_path / "plain")
    assert torch.equal(scores(again, features), scores(plain, features))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "mezo"])
@pytest.mark.parametrize("max_frames", ["fidelity", "longest"])
def test_gradients_are_where_they_should_be(method, max_frames):
    model = randomise(model_of(method, max_frames=max_frames), std=0.05)
    features, labels = batch()
    model(features, attention_mask=mel_mask([48, 30, 11, 2], 48), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.norm() > 0, name


@pytest.mark.parametrize("method", METHODS)
def test_autocast_keeps_float32_masters(method, tmp_path):
    model = model_of(method)
    trainer_of(model, tmp_path, bf16=True, max_steps=4).train()
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        half = scores(model, batch()[0])
    torch.testing.assert_close(half, scores(model, batch()[0]), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("method", "autocast"), [*((m, True) for m in HALF_BACKBONE), ("lora", False), ("adapter", False)]
)
def test_frozen_weights_in_half_precision(method, autocast, tmp_path):
    model = model_of(method, backbone_dtype="bfloat16")
    assert {p.dtype for p in frozen(model).values()} <= {torch.bfloat16, torch.float32}
    assert model.encoder.conv1.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    trainer = trainer_of(model, tmp_path, bf16=autocast, max_steps=25)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    ("method", "stop"),
    [("full", 4), ("lora_plus", 4), ("adalora", 4), ("adalora", 10), ("mezo", 4), ("mezo queries", 4)],
)
def test_resume_equals_the_uninterrupted_run(method, stop, tmp_path):
    """AdaLoRA in its schedule and, at step 10, in its final phase."""
    extra = {"allocation_interval": 2, "tfinal": 3} if method == "adalora" else {}
    if method == "mezo queries":
        method, extra = "mezo", {"mezo_queries": 3}
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = model_of(method, **extra)
    trainer_of(whole, tmp_path / "whole", **options).train()
    stopped = model_of(method, **extra)
    trainer_of(stopped, tmp_path / "parts", callbacks=[StopAt(stop)], **options).train()
    resumed = model_of(method, **extra)
    trainer_of(resumed, tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    assert_same(trained(resumed), trained(whole))
    assert not torch.equal(trained(resumed)["classifier.weight"], trained(stopped)["classifier.weight"])


@pytest.mark.parametrize("method", ["full", "adalora", "s2_lora", "mezo"])
def test_gradient_accumulation_equals_the_whole_batch(method, tmp_path):
    """Also of the penalties and of MeZO's slopes, with parts of unequal size: 20 clips are 8, 8 and 4."""
    results = []
    extra = {"mezo_queries": 2} if method == "mezo" else {}
    for batch_size, parts in ((20, 1), (8, 3)):
        model = model_of(method, **extra)
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": parts}
        trainer_of(model, tmp_path, size=20, max_steps=3, optim="sgd", **options).train()
        results.append(trained(model))
    assert_same(*results, tolerance=2e-5)


# The last one's loss comes from the Trainer.
DDP_METHODS = {"full": {}, "adalora": {}, "mezo": {}, "s2_lora": {"label_smoothing_factor": 0.2}}
DDP_CONFIGS = {"mezo": {"mezo_queries": 3}}
DDP_OPTIONS = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0, "masks": True}
DDP_SCRIPT = """
import sys
import torch

tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
from test_methods import DDP_CONFIGS, DDP_METHODS, DDP_OPTIONS, model_of, trained, trainer_of

for method, more in DDP_METHODS.items():
    model = model_of(method, max_frames="longest", **DDP_CONFIGS.get(method, {}))
    trainer_of(model, folder, per_device_train_batch_size=4, **DDP_OPTIONS, **more).train()
    torch.save(trained(model), f"{folder}/{method}-{torch.distributed.get_rank()}.pt")
"""


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    (tmp_path / "run.py").write_text(DDP_SCRIPT)
    two_processes(tmp_path / "run.py", Path(__file__).parent, tmp_path)
    for method, more in DDP_METHODS.items():
        single = model_of(method, max_frames="longest", **DDP_CONFIGS.get(method, {}))
        start = trained(single)
        trainer_of(single, tmp_path, **DDP_OPTIONS, **more).train()
        assert not torch.equal(trained(single)["classifier.weight"], start["classifier.weight"])
        ranks = [torch.load(tmp_path / f"{method}-{rank}.pt") for rank in (0, 1)]
        assert_same(ranks[0], ranks[1])
        assert_same(ranks[0], trained(single), tolerance=2e-5)


@pytest.mark.parametrize("method", ["full", "bitfit", "lora", "s2_lora"])
def test_saved_with_its_backbone_a_model_needs_nothing_else(method, tmp_path):
    model = randomise(model_of(method), std=0.05)
    features, _ = batch()
    model.save_pretrained(tmp_path, save_backbone=True)
    names = safetensors.torch.load_file(tmp_path / "backbone/model.safetensors").keys()
    assert names == {f"encoder.{n}" for n in tiny_whisper().encoder.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: the backbone has other weights
        loaded = MeftModel.from_pretrained(tmp_path)
    assert torch.equal(scores(loaded, features), scores(model, features))


def test_another_backbone_is_noticed(tmp_path):
    model_of("lora").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has other weights than the one"):
        MeftModel.from_pretrained(tmp_path, backbone=tiny_whisper(seed=1))


def test_only_side_networks_convert_to_the_published_form(tmp_path):
    model_of("lora").save_pretrained(tmp_path / "ours", save_backbone=True)
    with pytest.raises(UserError, match="was trained by lora: the published code loads side networks only"):
        to_published(tmp_path / "ours", tmp_path / "theirs")


# ---------------------------------------------------------------- against other implementations


def test_full_and_weighted_sum_compute_what_transformers_computes():
    features, labels = batch()
    for method, changes in (("full", {}), ("weighted_sum", {"use_weighted_layer_sum": True})):
        theirs = tiny_whisper(**STILL, **changes, encoder_layerdrop=0.0).train()
        if method == "weighted_sum":
            torch.nn.init.normal_(theirs.layer_weights)
        theirs(features, labels=labels).loss.backward()
        ours = get_meft_model(tiny_whisper(**STILL, **changes), config_of(method))
        if method == "weighted_sum":
            ours.side_network.weights.data.copy_(theirs.layer_weights.data)
        ours.load_state_dict(theirs.state_dict(), strict=False)
        ours(features, labels=labels).loss.backward()
        torch.testing.assert_close(scores(ours, features), scores(theirs.eval(), features))
        expected = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            other = expected.get(name.replace("side_network.weights", "layer_weights"))
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def small_on_meta(method, **options) -> MeftModel:
    sizes = {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
    with torch.device("meta"):
        base = WhisperForAudioClassification(WhisperConfig(**sizes, decoder_layers=1, num_labels=6))
    return get_meft_model(base, MeftConfig.from_dict({"method": method, **options}))


def test_trainable_parameters_of_whisper_small():
    head = 768 * 256 + 256 + 256 * 6 + 6
    per_layer = 2 * 768 + 3 * 768 + 3072 + 768  # biases: two LayerNorms; q, v, out (k has none); fc1; fc2
    expected = {
        "head": head,
        "weighted_sum": head + 13,
        "bitfit": head + 12 * per_layer + 768 + 2 * 768,
        "adapter": head + 12 * 2 * (2 * 768 * 64 + 64 + 768),
        "lora": head + 12 * 2 * 2 * 768 * 64,
        "lora_plus": head + 12 * 2 * 2 * 768 * 64,
        "adalora": head + 12 * 2 * (2 * 768 * 256 + 256),
        "s2_lora": head + 2 * 768 * 64 + 12 * 2 * 64,
    }
    for method, count in expected.items():
        assert small_on_meta(method).get_nb_trainable_parameters()[0] == count, method
    trainable, total = small_on_meta("lora").get_nb_trainable_parameters()
    assert round(100 * trainable / total, 2) == 2.82  # as the paper says
    trainable, total = small_on_meta("full").get_nb_trainable_parameters()
    assert total - trainable == 1500 * 768  # the positions


@pytest.mark.parametrize("method", METHODS)
def test_can_be_counted_on_fake_tensors(method):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of(method)
        features = torch.empty(2, 12, 48)
        with torch.set_grad_enabled(method != "mezo"):
            loss = model(features, labels=torch.zeros(2, dtype=torch.long)).loss
        if method != "mezo":
            loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------- memory


def saved_bytes(model) -> int:
    """Bytes of activations that autograd keeps in a forward pass, parameters left out."""
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    features, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(features, labels=labels).loss
    del loss
    return sum(kept.values())


def test_nothing_is_kept_below_the_first_trained_part():
    frame = 4 * 24 * WIDTH * 4  # one hidden state of the batch
    kept = {method: saved_bytes(model_of(method)) for method in METHODS if method != "mezo"}
    assert kept["head"] < frame and kept["weighted_sum"] < frame
    assert kept["lora"] < kept["full"] and kept["bitfit"] < kept["full"]
    assert kept["full"] > 8 * LAYERS * frame
    without = saved_bytes(model_of("bitfit", train_convolutions=False))
    assert without <= kept["bitfit"] - frame


def test_checkpointing_gives_the_same_gradients_for_less():
    features, labels = batch()
    grads, kept = [], []
    for checkpointing in (False, True):
        model = model_of("lora")
        if checkpointing:
            model._set_gradient_checkpointing(True, partial_checkpoint(use_reentrant=False))
        kept.append(saved_bytes(model))
        model(features, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert_same(*grads, tolerance=1e-6)
    assert kept[1] < kept[0] / 2
    with pytest.raises(UserError, match="use_reentrant=True would lose the gradients"):
        model._set_gradient_checkpointing(True, partial_checkpoint(use_reentrant=True))


@pytest.mark.parametrize("method", ["full", "adapter", "adalora", "s2_lora"])
def test_checkpointing_by_the_trainer(method, tmp_path):
    results = []
    for checkpointing in (False, True):
        model = model_of(method)
        trainer_of(model, tmp_path, max_steps=3, gradient_checkpointing=checkpointing).train()
        results.append(trained(model))
    assert_same(*results, tolerance=1e-6)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(UserError, match="use_reentrant=True would lose the gradients"):
        trainer_of(model_of(method), tmp_path, max_steps=1, **reentrant).train()


def partial_checkpoint(**options):
    from functools import partial

    return partial(torch.utils.checkpoint.checkpoint, **options)


# ---------------------------------------------------------------- what is peculiar to one method


def test_mezo_moves_along_its_direction_by_the_slope():
    target = torch.linspace(-1, 1, 7, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer = MeZO([weight], lr=0.1, eps=1e-4, seed=4)
    moves = []
    for _ in range(2):
        before = weight.detach().clone()
        gradient = 2 * (before - target)
        value = optimizer.measure(lambda: ((weight - target) ** 2).sum())
        torch.testing.assert_close(weight.detach(), before)
        torch.testing.assert_close(value, ((before - target) ** 2).sum(), rtol=1e-4, atol=1e-4)
        optimizer.step()
        move = weight.detach() - before
        # -lr (g.z) z: parallel to z, and its product with the gradient is -lr (g.z)^2.
        (slope,) = optimizer.last_slopes.double()
        torch.testing.assert_close(move @ gradient, -0.1 * slope**2, rtol=1e-4, atol=1e-6)
        moves.append(move / move.norm())
    assert abs(moves[0] @ moves[1]) < 0.999  # each step has a direction of its own


def test_mezo_averages_its_queries():
    """Against estimates made one by one by the formula, along the directions of algorithm 1 in the paper's
    extension to several: each from the same parameters, applied as their mean, over two parts of a batch."""
    target = torch.linspace(-1, 1, 7, dtype=torch.float64)
    start, rate, eps, decay, queries = torch.full_like(target, 0.3), 0.1, 1e-3, 0.2, 5
    weight = torch.nn.Parameter(start.clone())
    optimizer = MeZO([weight], lr=rate, eps=eps, weight_decay=decay, seed=4, queries=queries)

    def part(scale: float, at: torch.Tensor) -> torch.Tensor:
        return scale * ((at - target) ** 4).sum()

    for steps_done in range(3):
        before = weight.detach().clone()
        estimates = []
        for query in range(queries):
            entropy = np.random.SeedSequence([4, steps_done, query])
            seed = int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
            generator = torch.Generator().manual_seed(seed)
            z = torch.randn(7, generator=generator, dtype=torch.float64)
            sides = [sum(part(scale, before + sign * eps * z) for scale in (0.5, 2.0)) for sign in (1, -1)]
            estimates.append((sides[0] - sides[1]) / (2 * eps) * z)
        assert len({float(estimate[0]) for estimate in estimates}) == queries
        values = [optimizer.measure(lambda scale=scale: part(scale, weight)) for scale in (0.5, 2.0)]
        torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-12)
        torch.testing.assert_close(sum(values), part(2.5, before), rtol=1e-4, atol=0)
        optimizer.step()
        expected = before - rate * (decay * before + torch.stack(estimates).mean(0))
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)  # slopes are float32
        assert optimizer.last_slopes.shape == (queries,)


def test_mezo_queries_near_the_gradient_as_they_grow():
    """The mean of q estimates is unbiased, and its squared error falls with 1/q."""
    gradient = torch.linspace(-1, 2, 5, dtype=torch.float64)
    errors = []
    for queries in (1, 100):
        found = []
        for seed in range(20):
            weight = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
            optimizer = MeZO([weight], lr=1.0, seed=seed, queries=queries)
            optimizer.measure(lambda weight=weight: weight @ gradient)
            optimizer.step()
            found.append(-weight.detach())
        errors.append(float((torch.stack(found) - gradient).square().sum(1).mean()))
    assert 30 < errors[0] / errors[1] < 300


def test_mezo_goes_on_with_its_queries():
    """Also from the state of an optimizer that knew no queries."""

    def steps(optimizer: MeZO, weight: torch.nn.Parameter, count: int) -> None:
        for _ in range(count):
            optimizer.measure(lambda: (weight**2).sum())
            optimizer.step()

    for queries in (1, 3):
        weight = torch.nn.Parameter(torch.ones(4))
        whole = MeZO([weight], lr=0.01, seed=2, queries=queries)
        steps(whole, weight, 2)
        state, parameters = copy.deepcopy(whole.state_dict()), weight.detach().clone()
        steps(whole, weight, 2)
        if queries == 1:
            for group in state["param_groups"]:
                del group["queries"]
        other = torch.nn.Parameter(parameters)
        resumed = MeZO([other], lr=0.5, seed=9, queries=2)
        resumed.load_state_dict(state)
        steps(resumed, other, 2)
        assert resumed.queries == queries and torch.equal(weight, other)


def test_mezo_sees_the_same_dropout_on_both_sides():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = MeZO([weight], lr=0.0, eps=1e-9)
    optimizer.measure(lambda: torch.nn.functional.dropout(torch.ones(100)).sum())
    optimizer.step()
    assert optimizer.last_slopes == 0


def test_mezo_keeps_no_activation(tmp_path):
    kept = []
    model = model_of("mezo")
    trainer = trainer_of(model, tmp_path, max_steps=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        trainer.train()
    assert not kept and all(p.grad is None for p in model.parameters())


def test_mezo_refuses_a_backward_pass():
    features, labels = batch()
    with pytest.raises(UserError, match="mezo trains without gradients: use whisper_meft.MeftTrainer"):
        model_of("mezo")(features, labels=labels)


def test_mezo_refuses_fp16(tmp_path):
    model = model_of("mezo")
    arguments = trainer_of(model, tmp_path).args
    arguments.fp16 = True
    with pytest.raises(UserError, match="fp16 cannot be used with mezo"):
        MeftTrainer(model=model, args=arguments)


def singular_values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().flatten() for n, p in model.named_parameters() if "lora_E" in n}


def test_adalora_allocates_its_ranks_in_every_step(tmp_path, monkeypatch):
    from peft.tuners.adalora.layer import RankAllocator

    calls = []
    original = RankAllocator.update_and_allocate
    monkeypatch.setattr(
        RankAllocator, "update_and_allocate", lambda *a, **k: calls.append(a[2]) or original(*a, **k)
    )
    model = model_of("adalora", tinit=4, tfinal=5, allocation_interval=3)
    trainer_of(model, tmp_path, max_steps=20).train()
    assert calls == list(range(1, 16))
    ranks = [int((values != 0).sum()) for values in singular_values(model).values()]
    assert sum(ranks) == 3 * len(ranks)  # the target, not the 6 each has at the start
    with pytest.raises(UserError, match=r"tinit \+ tfinal must be below the number of training steps, 9"):
        trainer_of(model_of("adalora", tinit=4, tfinal=5), tmp_path, max_steps=9).train()


def test_adalora_with_a_single_step(tmp_path):
    model = model_of("adalora")
    trainer_of(model, tmp_path, max_steps=1).train()
    assert sum(int((values != 0).sum()) for values in singular_values(model).values()) == 3 * 2 * LAYERS


def test_lora_plus_has_a_higher_rate_for_b(tmp_path):
    model = model_of("lora_plus", loraplus_lr_ratio=8)
    optimizer = trainer_of(model, tmp_path, learning_rate=1e-3, weight_decay=0.1).create_optimizer()
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(trained(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate, decay = rates[id(parameter)]
            assert rate == pytest.approx(8e-3 if "lora_B" in name else 1e-3), name
            assert (decay == 0) == name.endswith("bias"), name


def test_s2_lora_shares_its_factors_by_shape():
    model = model_of("s2_lora", target_modules=["q_proj", "v_proj", "fc1", "fc2"])
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "shared_factors" in n}
    assert {n.split(".")[2] for n in shapes} == {f"{WIDTH}x{WIDTH}", f"48x{WIDTH}", f"{WIDTH}x48"}
    assert shapes[f"encoder.shared_factors.48x{WIDTH}.lora_A"] == (4, WIDTH)
    coefficients = [p for n, p in model.named_parameters() if "coefficients" in n]
    assert len(coefficients) == 4 * LAYERS and all(p.shape == (4,) for p in coefficients)


def test_s2_lora_penalty_makes_coefficients_small(tmp_path):
    sizes = []
    for weight in (0.0, 0.3):
        model = model_of("s2_lora", l1_weight=weight)
        features, labels = batch()
        plain, total = (model.train(mode)(features, labels=labels).loss for mode in (False, True))
        assert torch.equal(plain, total)  # all coefficients start at zero
        trainer_of(model, tmp_path).train()
        sizes.append(sum(p.abs().sum().item() for n, p in model.named_parameters() if "coefficients" in n))
        plain, total = (model.train(mode)(features, labels=labels).loss.item() for mode in (False, True))
        assert total - plain == pytest.approx(weight * sizes[-1], abs=1e-5)
    assert sizes[1] < 0.3 * sizes[0]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora", "r": 0}, "r must be a positive integer, got 0"),
        ({"method": "lora", "lora_alpha": float("nan")}, "lora_alpha must be a finite number above 0"),
        ({"method": "lora", "lora_dropout": 1.0}, "lora_dropout must be a number from 0 to below 1, got 1.0"),
        ({"method": "lora", "target_modules": ["q"]}, "target_modules must be out of q_proj, k_proj"),
        ({"method": "lora", "target_modules": "q_proj"}, "target_modules must be a non-empty list"),
        ({"method": "adalora", "target_r": 256}, "target_r must be below init_r, 256, got 256"),
        ({"method": "adalora", "tinit": -1}, "tinit must be None or an integer of at least 0, got -1"),
        ({"method": "s2_lora", "l1_weight": -1}, "l1_weight must be a finite number of at least 0, got -1"),
        ({"method": "adapter", "adapter_dim": 0}, "adapter_dim must be a positive integer, got 0"),
        ({"method": "full", "train_convolutions": 1}, "train_convolutions must be True or False, got 1"),
        ({"method": "mezo", "eps": 0}, "eps must be a finite number above 0, got 0"),
        ({"method": "mezo", "mezo_queries": 0}, "mezo_queries must be a positive integer, got 0"),
        ({"method": "mezo", "mezo_queries": 2.0}, "mezo_queries must be a positive integer, got 2.0"),
        ({"method": "full", "mezo_queries": 2}, "'mezo_queries' is not an option of full"),
        (
            {"method": "lora_plus", "loraplus_lr_ratio": -2},
            "loraplus_lr_ratio must be a finite number above 0",
        ),
        ({"method": "full", "backbone_dtype": "bfloat16"}, "backbone_dtype must be None or float32 for full"),
        ({"method": "head", "reduction_factor": 8}, "'reduction_factor' is not an option of head"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError) as caught:
        MeftConfig.from_dict(options)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [LoRAConfig, AdaLoRAConfig])
def test_without_peft_one_line_says_so(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=f"method {config.method} needs the peft package: pip install peft"):
        get_meft_model(tiny_whisper(), config())


def test_an_encoder_that_carries_an_adapter_is_refused():
    base = tiny_whisper()
    get_meft_model(base, S2LoRAConfig())
    with pytest.raises(UserError, match="base already carries an adapter"):
        get_meft_model(base, FullConfig())


def test_a_config_of_peft_is_refused_by_name():
    import peft

    with pytest.raises(UserError, match="LoRAConfig.* got peft's LoraConfig"):
        get_meft_model(tiny_whisper(), peft.LoraConfig())


def test_full_fine_tuning_of_half_precision_weights_has_float32_masters():
    for config in (FullConfig(), MeZOConfig()):
        model = get_meft_model(tiny_whisper(dtype=torch.bfloat16), config)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_method_and_option_is_on_the_command_line():
    hints = typing.get_type_hints(MethodArguments)
    assert set(typing.get_args(hints["method"])) == set(MeftConfig.methods())
    for config in MeftConfig.methods().values():
        of_the_backbone = {"backbone_dtype", "backbone_quantization"}
        names = {field.name for field in dataclasses.fields(config)} - of_the_backbone
        assert names <= set(hints), config.method
        for field in dataclasses.fields(config):
            assert len(field.metadata["help"]) > 20, (config, field.name)
            given = getattr(config(), field.name)
            assert MeftConfig.from_dict(config().to_dict()) == config(), given


# ---------------------------------------------------------------- gradient honesty


class Deaf(TrainerCallback):
    """Takes away the gradients of parameters whose names hold one of ``parts``."""

    def __init__(self, *parts):
        self.parts = parts

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if any(part in name for part in self.parts):
                parameter.grad = None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["lora_"], "the method's 12 trained tensors (the first is encoder.layers.0.self_attn"),
        (["projector", "classifier"], "the head's 4 trained tensors (the first is projector.weight)"),
    ],
)
def test_a_part_that_never_moved_is_no_success(parts, message, tmp_path):
    model = model_of("lora")
    report = GradientReport(model)
    trainer_of(model, tmp_path, [Deaf(*parts), report], max_steps=3).train()
    with pytest.raises(UserError) as caught:
        report.check(1e-4)
    assert message in str(caught.value) and "never moved in 3 steps" in str(caught.value)


def test_steps_too_small_to_matter_are_no_success(tmp_path):
    """Only what starts at zero can take such a step: everything else is rounded back to where it was."""
    model = model_of("head")
    report = GradientReport(model)
    trainer_of(model, tmp_path, [report], max_steps=3, learning_rate=1e-30).train()
    with pytest.raises(UserError, match="never moved in 3 steps"):
        report.check(1e-30)


def test_a_single_tensor_that_never_moved_is_reported(tmp_path):
    model = model_of("lora")
    report = GradientReport(model)
    deaf = "layers.1.self_attn.q_proj.lora_B"
    trainer_of(model, tmp_path, [Deaf(deaf), report], max_steps=3).train()
    report.check()
    still = report.report()["never_moved"]  # without B no gradient reaches A
    assert still == [f"encoder.layers.1.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"]
    assert "2 of 16 trained tensors never moved" in report.describe()


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=8)
    make_audio_folder(folder / "test", per_class=3, seed=1)
    return folder


def command(work, output, method, **options) -> list[str]:
    options = {"reduction_factor": None, "method": method, "eval_data": work / "test", **options}
    return train_command(work / "backbone", work / "train", output, **options)


def test_a_run_from_the_command_line_and_its_continuation(work, tmp_path, capsys):
    options = {"init_r": 6, "target_r": 3, "learning_rate": 1e-2, "num_train_epochs": 4}
    out = tmp_path / "out"
    assert main(command(work, out, "adalora", **options)) == 0
    results = json.loads((out / "train_results.json").read_text())
    assert results["method"]["method"] == "adalora" and results["method"]["init_r"] == 6
    assert results["gradients"]["never_moved"] == []
    assert results["gradients"]["gradient_norms"]["encoder.layers.1"]["last"] > 0
    assert "gradient norms at the end: " in capsys.readouterr().out
    scored = json.loads((out / "eval_results.json").read_text())
    assert main(["evaluate", str(out), "--data", str(work / "test")]) == 0
    again = json.loads((out / "evaluation" / "eval_results.json").read_text())
    assert again["confusion_matrix"] == scored["confusion_matrix"]
    assert main(["predict", str(out), str(work / "test")]) == 0
    # It is at its end: going on does nothing, and that is no failure.
    assert main(command(work, out, "adalora", **options, resume_from_checkpoint=True)) == 0
    options["target_r"] = 2
    assert main(command(work, out, "adalora", **options, resume_from_checkpoint=True)) == 1
    assert "has target_r=3, but now it is 2" in capsys.readouterr().err


def test_a_run_in_which_nothing_moved_fails(work, tmp_path, capsys):
    """The first step of a warm-up has learning rate 0."""
    options = {"max_steps": 1, "warmup_steps": 10, "eval_data": None, "eval_strategy": "no"}
    assert main(command(work, tmp_path / "out", "head", **options)) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1 and "never moved in 1 steps" in error[0]
    assert not (tmp_path / "out" / "train_results.json").exists()


def test_a_run_in_which_nothing_moved_fails_again_when_it_is_resumed(work, tmp_path, capsys):
    options = {"max_steps": 1, "warmup_steps": 10, "resume_from_checkpoint": True}
    for _ in range(2):
        assert main(command(work, tmp_path / "out", "head", **options)) == 1
        captured = capsys.readouterr()
        error = [line for line in captured.err.splitlines() if "error:" in line]
        assert len(error) == 1 and "never moved in 1 steps" in error[0]
        assert not (tmp_path / "out" / "train_results.json").exists()
    assert "training was over at" in captured.out


def test_an_option_of_another_method_is_named(work, tmp_path, capsys):
    assert main(command(work, tmp_path / "out", "full", r=8)) == 1
    assert "'r' is not an option of full, accepted are max_frames" in capsys.readouterr().err
    assert main(command(work, tmp_path / "out", "full", backbone_dtype="bfloat16")) == 1
    assert "backbone_dtype must be None or float32 for full" in capsys.readouterr().err


def test_sherl_starts_where_it_is_told():
    features, labels = batch(3)
    base = tiny_whisper()
    expected = base.encoder.eval()(features).last_hidden_state
    model = get_meft_model(base, SHERLConfig(reduction_factor=2, start="zero_shot"))
    *_, deepest = [state for state, _ in zip(model.encoder.stream(features), range(LAYERS))]
    assert torch.equal(model.side_network([*model.encoder.stream(features)][:LAYERS]), deepest)
    torch.testing.assert_close(model.encoder.last_layer(deepest), expected)
    model(features, labels=labels).loss.backward()
    assert model.side_network.out.weight.grad.norm() > 0
    assert MeftConfig.from_dict(model.meft_config.to_dict()).start == "zero_shot"
    with pytest.raises(UserError, match="start must be None, 'published' or 'even' or 'zero_shot', got"):
        SHERLConfig(start="none")
