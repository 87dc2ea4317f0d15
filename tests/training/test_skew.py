"""Classes that come unequally often: weights, the focal loss, and drawing each class equally often."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from modelling_fixtures import CLASSES, ToyClips, randomise, tiny_whisper
from process_fixtures import two_processes
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from training_fixtures import make_audio_folder, make_backbone, train_command
from transformers import TrainingArguments
from whisper_meft import MeftConfig, MeftTrainer, UserError, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.commands.train import make_parser
from whisper_meft.comparison.arguments import CompareArguments
from whisper_meft.comparison.runs import Comparison
from whisper_meft.options.parser import UsageError
from whisper_meft.training import run as train
from whisper_meft.training.criterion import ClassLoss, computed_weights
from whisper_meft.training.settings import settle

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}


# --- the losses -------------------------------------------------------------------------------------------


def case(clips=9, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(clips, classes, generator=generator, dtype=dtype)
    labels = torch.randint(0, classes, (clips,), generator=generator)
    weights = torch.rand(classes, generator=generator, dtype=dtype) + 0.1
    return logits, labels, weights


def of(logits, labels, num_items_in_batch=None, **options):
    return ClassLoss(**options)({"logits": logits}, labels, num_items_in_batch)


@pytest.mark.parametrize("counts", [[7, 1, 40], [1], [3, 3], list(range(1, 60))])
def test_computed_weights(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    balanced = computed_weights(counts, "balanced")
    assert balanced == pytest.approx(compute_class_weight("balanced", classes=np.unique(labels), y=labels))
    for kind, power in (("balanced", 1), ("inverse_sqrt", 0.5)):
        weights = np.array(computed_weights(counts, kind))
        assert weights[labels].mean() == pytest.approx(1)
        assert weights / weights[0] == pytest.approx((counts[0] / np.array(counts)) ** power)


@pytest.mark.parametrize(("counts", "kind"), [([3, 0], "balanced"), ([], "balanced"), ([3, 1], "sqrt")])
def test_weights_that_cannot_be_computed(counts, kind):
    with pytest.raises(UserError, match="every class needs an example|balanced or inverse_sqrt"):
        computed_weights(counts, kind)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_cross_entropy_is_the_sum_over_examples_by_their_number(smoothing, weighted):
    logits, labels, weights = case()
    labels[[1, 4]] = -100
    minus_log, k = -logits.log_softmax(-1), logits.shape[1]
    w = weights if weighted else torch.ones(k, dtype=logits.dtype)
    losses = []
    for row, label in zip(minus_log, labels.tolist()):
        if label != -100:
            losses.append((1 - smoothing) * w[label] * row[label] + smoothing / k * (w * row).sum())
    options = {"weights": weights.tolist() if weighted else None, "label_smoothing": smoothing}
    found = of(logits, labels, **options)
    torch.testing.assert_close(found, torch.stack(losses).sum() / 7)
    torch.testing.assert_close(of(logits, labels, 20, **options), found * 7 / 20)
    torch.testing.assert_close(of(logits, labels, torch.tensor(20), **options), found * 7 / 20)
    parts = [of(logits[rows], labels[rows], 7, **options) for rows in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(sum(parts), found)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
def test_the_focal_loss_is_the_papers(gamma):
    logits, labels, weights = case()
    labels[2] = -100
    p, counts = logits.softmax(-1), labels != -100
    right = p[counts, labels[counts]]
    expected = -(weights[labels[counts]] * (1 - right) ** gamma * right.log()).sum() / 8
    logits.requires_grad_()
    found = of(logits, labels, weights=weights.tolist(), gamma=gamma)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda x: of(x, labels, weights=weights.tolist(), gamma=gamma), logits)
    plain = of(logits, labels, gamma=gamma)
    torch.testing.assert_close(plain, of(logits, labels, weights=[1.0] * 5, gamma=gamma))
    if not gamma:
        torch.testing.assert_close(plain, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_certainty_gives_nan(gamma, dtype):
    logits = torch.tensor([[1e4, 0, 0], [0, 1e4, 0], [0, 0, 0], [20.0, 0, 0]], dtype=dtype).requires_grad_()
    loss = of(logits, torch.tensor([0, 0, 1, 0]), gamma=gamma, weights=[1.0, 2.0, 3.0])
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad[1].any() and not logits.grad[0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 0.0, 1.0]}, "weights must be numbers above 0"),
        ({"weights": [1.0, float("nan"), 1.0]}, "weights must be numbers above 0"),
        ({"weights": [1.0, 2.0]}, "there are 2 weights for 3 classes"),
        ({"gamma": -1}, "gamma must be 0 or more"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie between"),
        ({"gamma": 2, "label_smoothing": 0.1}, "label_smoothing must be 0 with the focal loss"),
    ],
)
def test_what_cannot_be_a_loss(options, message):
    with pytest.raises(UserError, match=message):
        of(torch.zeros(2, 3), torch.tensor([0, 1]), **options)


def test_wrong_labels_are_named():
    with pytest.raises(UserError, match=r"labels must lie in 0..2, the model has 3 labels, got 3"):
        of(torch.zeros(2, 3), torch.tensor([0, 3]), gamma=2)


# --- in the Trainer ---------------------------------------------------------------------------------------

OPTIONS = {"adalora": {"init_r": 4, "target_r": 2}, "s2_lora": {"r": 4, "l1_weight": 0.1}}


def trainer_of(method, folder, loss, **options) -> MeftTrainer:
    torch.manual_seed(0)
    config = MeftConfig.from_dict({"method": method, **OPTIONS.get(method, {})})
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = randomise(get_meft_model(tiny_whisper(**still), config), std=0.1)
    defaults = {
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_grad_norm": 0,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return MeftTrainer(model, arguments, train_dataset=ToyClips(20), compute_loss_func=loss)


def losses_and_weights(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_parts_of_a_step_are_one_batch(gamma, tmp_path):
    loss = ClassLoss([0.2, 3.0, 1.0], gamma)
    whole = losses_and_weights(trainer_of("lst", tmp_path, loss, per_device_train_batch_size=20))
    parts = losses_and_weights(
        trainer_of("lst", tmp_path, loss, per_device_train_batch_size=8, gradient_accumulation_steps=3)
    )
    assert parts[0] == pytest.approx(whole[0], abs=2e-3)
    for name, tensor in whole[1].items():
        torch.testing.assert_close(parts[1][name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["s2_lora", "mezo", "adalora"])
def test_methods_keep_their_penalty_and_their_step(method, tmp_path):
    """With weights of 1 the run is the one without."""
    options = {"max_steps": 4, "learning_rate": 1e-3}
    plain = losses_and_weights(trainer_of(method, tmp_path, None, **options))
    found = losses_and_weights(trainer_of(method, tmp_path, ClassLoss([1.0] * CLASSES), **options))
    assert found[0] == pytest.approx(plain[0], abs=2e-3)
    for name, tensor in plain[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-4)


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, test/, and train/ with 12, 6 and 2 clips of the classes high, low, middle."""
    folder = tmp_path_factory.mktemp("skew")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=12)
    make_audio_folder(folder / "test", per_class=3, seed=1)
    for label, kept in {"low": 6, "middle": 2}.items():
        for path in sorted((folder / "train" / label).iterdir())[kept:]:
            path.unlink()
    return folder


def command(work, output, **options):
    options = {"eval_data": work / "test", "num_train_epochs": 2, "reduction_factor": 2, **options}
    if options.get("method", "lst") not in ("lst", "unipt", "sherl"):
        options["reduction_factor"] = None
    return train_command(work / "backbone", work / "train", output, **options)


def results_of(folder):
    return json.loads((folder / "train_results.json").read_text())


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def prepared(work, output, **options):
    """(settings, examples, Trainer) of a run."""
    *groups, training = make_parser().parse(command(work, output, **options)[1:])
    settings = settle(groups[0], groups[1], training)
    examples = train.read_examples(groups[2], settings)
    model = train.build_model(train.load_base(settings), settings, examples)
    sets = train.build_datasets(model, settings, examples, train.data.SpeechDataset)
    with train.Interrupts() as interrupts:
        trainer, _ = train.build_trainer(model, settings, examples, *sets, interrupts, None)
    return settings, examples, trainer


def test_without_the_options_nothing_is_in_the_way(work, tmp_path):
    settings, _, trainer = prepared(work, tmp_path / "out")
    assert trainer.compute_loss_func is None and trainer.length_batches is None
    assert settings.task.weights is None and settings.training.given() == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"class_weights": "balanced"}, [20 / 36, 20 / 18, 20 / 6]),
        ({"class_weights": "inverse_sqrt", "label_smoothing_factor": 0.1}, None),
        ({"class_weights": "weights.json", "loss": "focal"}, [0.5, 1, 4]),
        ({"loss": "focal", "focal_gamma": 0.5}, "none"),
    ],
)
def test_the_loss_of_a_run(options, expected, work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("weights.json").write_text('{"middle": 4, "low": 1, "high": 0.5}')
    settings, examples, trainer = prepared(work, tmp_path / "out", **options)
    loss = trainer.compute_loss_func
    criterion = settings.task.criterion
    assert (
        criterion.gamma
        == {"cross_entropy": 0, "focal": options.get("focal_gamma", 2)}[options.get("loss", "cross_entropy")]
    )
    assert criterion.label_smoothing == options.get("label_smoothing_factor", 0)
    if expected == "none":
        assert criterion.weights is None
    elif expected:
        assert criterion.weights.tolist() == pytest.approx(expected)
    assert loss is not None
    # What the Trainer minimises in a step is it, and what evaluation reports too.
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 13, 19)])
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(batch["input_features"]).logits
    torch.testing.assert_close(found, criterion({"logits": logits}, batch["labels"]))
    outcome = trainer.predict(trainer.eval_dataset)
    model = trainer.model.eval()
    items = [trainer.eval_dataset[i] for i in range(len(trainer.eval_dataset))]
    batch = trainer.data_collator(items)
    with torch.no_grad():
        expected = criterion({"logits": model(batch["input_features"]).logits}, batch["labels"])
    assert outcome.metrics["test_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_says_and_saves_what_it_did(work, tmp_path, capsys):
    options = {"class_weights": "balanced", "loss": "focal", "sampling": "balanced"}
    assert main(command(work, tmp_path / "out", **options)) == 0
    out = capsys.readouterr().out
    assert "weights in the loss (balanced): high: 0.556, low: 1.11, middle: 3.33" in out
    assert "an epoch draws 6.667 examples of each class" in out
    results = results_of(tmp_path / "out")
    assert results["loss"] == "focal" and results["focal_gamma"] == 2
    assert results["class_weights"]["middle"] == pytest.approx(20 / 6)
    assert results["batches"]["sampling"] == "balanced"
    assert main(command(work, tmp_path / "plain")) == 0
    plain = results_of(tmp_path / "plain")
    assert (plain["loss"], plain["focal_gamma"], plain["class_weights"]) == ("cross_entropy", None, None)
    assert plain["batches"]["sampling"] == "natural"


def test_a_focal_loss_with_gamma_0_is_told_in_the_card(work, tmp_path):
    options = {"loss": "focal", "focal_gamma": 0, "max_steps": 1, "eval_strategy": "no"}
    assert main(command(work, tmp_path / "out", **options)) == 0
    results = results_of(tmp_path / "out")
    assert results["loss"] == "focal" and results["focal_gamma"] == 0
    assert "The loss is the focal loss with gamma 0." in (tmp_path / "out" / "README.md").read_text()


def test_weights_find_the_rare_class(work, tmp_path):
    """Of a class that nothing distinguishes from another, weights decide which is said."""
    data = tmp_path / "data"
    for label, count in {"often": 10, "rare": 2}.items():
        (data / label).mkdir(parents=True)
        for number in range(count):
            source = work / "train" / "high" / f"high{number % 2}.wav"
            (data / label / f"{number}.wav").write_bytes(source.read_bytes())
    options = {"eval_data": data, "num_train_epochs": 12, "method": "head", "learning_rate": 3e-2}
    options |= {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 1000}
    recalls = {}
    for name, more in {
        "plain": {},
        "weights": {"class_weights": '{"often": 1, "rare": 20}'},
        "balanced": {"sampling": "balanced", "class_weights": '{"often": 1, "rare": 4}'},
    }.items():
        if "class_weights" in more:
            (tmp_path / f"{name}.json").write_text(more["class_weights"])
            more = {**more, "class_weights": tmp_path / f"{name}.json"}
        argv = command(work, tmp_path / name, **{**options, **more})
        argv[2] = f"--train_data={data}"
        assert main(argv) == 0
        scores = json.loads((tmp_path / name / "eval_results.json").read_text())
        recalls[name] = scores["per_class_accuracy"]["rare"]
    assert recalls["plain"] == 0 and recalls["weights"] == recalls["balanced"] == 1


# --- drawing ----------------------------------------------------------------------------------------------


def drawn(trainer, epoch) -> list[int]:
    trainer.length_batches.set_epoch(epoch)
    return [index for batch in trainer.length_batches for index in batch]


@pytest.mark.parametrize("max_frames", ["fidelity", "longest"])
def test_each_class_comes_equally_often_with_either_window(max_frames, work, tmp_path):
    options = {"sampling": "balanced", "max_frames": max_frames, "per_device_train_batch_size": 4}
    _, examples, trainer = prepared(work, tmp_path / "out", **options)
    assert len(trainer.length_batches) == 5 and trainer.total_steps() == 10
    everything = []
    for epoch in range(3):
        indices = drawn(trainer, epoch)
        everything += indices
        counts = Counter(examples.training[index].label for index in indices)
        assert len(indices) == 20 and set(counts.values()) <= {6, 7}
    counts = Counter(examples.training[index].label for index in everything)
    assert set(counts.values()) == {20}
    often = Counter(everything)
    assert {often[i] for i in range(12)} <= {1, 2} and {often[i] for i in (18, 19)} == {10}
    loaded = [i for batch in trainer.get_train_dataloader() for i in batch["index"].tolist()]
    assert loaded == drawn(trainer, 0) != drawn(trainer, 1)


@pytest.mark.parametrize("cached", [False, True])
def test_a_stopped_run_goes_on_with_the_same_draws(cached, work, tmp_path, monkeypatch, capsys):
    options = {
        "sampling": "balanced",
        "class_weights": "inverse_sqrt",
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "no",
        "num_train_epochs": 3,
        "cache_features": True if cached else None,
    }
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(command(work, whole, **options)) == 0
    seen = []
    step = MeftTrainer.training_step

    def stopping(self, model, inputs, *arguments):
        seen.append(inputs["index"].tolist())
        if len(seen) == 8:  # in the second epoch, two steps behind a checkpoint
            raise KeyboardInterrupt
        return step(self, model, inputs, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MeftTrainer, "training_step", stopping)
        assert main(command(work, halves, **options)) == 130
    assert main(command(work, halves, **options, resume_from_checkpoint=True)) == 0
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(halves)[name]), name
    refused = command(work, halves, **{**options, "sampling": None}, resume_from_checkpoint=True)
    assert main([*refused, "--overwrite_output_dir=False"]) == 1
    assert "sampling balanced (now natural)" in capsys.readouterr().err


def test_from_the_cache_it_is_the_same_run(work, tmp_path):
    options = {"sampling": "balanced", "class_weights": "balanced", "loss": "focal"}
    assert main(command(work, tmp_path / "audio", **options)) == 0
    more = {"cache_features": True, "cache_storage": "exact"}
    assert main(command(work, tmp_path / "cache", **options, **more)) == 0
    for name, tensor in weights_of(tmp_path / "audio").items():
        torch.testing.assert_close(tensor, weights_of(tmp_path / "cache")[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_draw_as_one(work, tmp_path):
    options = {
        "sampling": "balanced",
        "class_weights": "balanced",
        "optim": "sgd",
        "learning_rate": 1e-2,
        "eval_strategy": "no",
    }
    one = command(work, tmp_path / "one", **options, per_device_train_batch_size=4)
    two = command(work, tmp_path / "two", **options, per_device_train_batch_size=2)
    assert main(one) == 0
    two_processes("-m", "whisper_meft", *two)
    for name, tensor in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(tensor, weights_of(tmp_path / "two")[name], rtol=1e-4, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"class_weights": "balancd"}, 2, "must be balanced, inverse_sqrt or a JSON file of a weight"),
        ({"loss": "hinge"}, 2, "argument --loss: invalid choice"),
        ({"focal_gamma": 2}, 2, "--focal_gamma 2 is for --loss focal, which is not given"),
        ({"loss": "focal", "focal_gamma": -1}, 2, "--focal_gamma must be 0 or more and finite, got -1.0"),
        ({"loss": "focal", "focal_gamma": "nan"}, 2, "--focal_gamma must be 0 or more and finite, got nan"),
        ({"loss": "focal", "label_smoothing_factor": 0.1}, 2, "cannot be used with --loss focal"),
        (
            {"sampling": "balanced", "max_frames": "longest", "max_frames_per_batch": 400},
            2,
            "--max_frames_per_batch 400 cannot be used with --sampling balanced",
        ),
        ({"sampling": "balanced", "dataloader_drop_last": True}, 2, "--dataloader_drop_last True cannot be"),
        (
            {"sampling": "balanced", "train_sampling_strategy": "sequential"},
            2,
            "--train_sampling_strategy sequential cannot be used with --sampling balanced",
        ),
        ({"class_weights": "list.json"}, 1, "list.json must hold a JSON object"),
        ({"class_weights": "text.json"}, 1, "text.json is not valid JSON"),
        (
            {"class_weights": "zero.json"},
            1,
            "the weight of low in zero.json must be a number from 1e-06 to 1e+06, got 0",
        ),
        ({"class_weights": "true.json"}, 1, "the weight of low in true.json must be a number from"),
        ({"class_weights": "huge.json"}, 1, "the weight of low in huge.json must be a number from"),
        ({"class_weights": "twice.json"}, 1, "twice.json is not valid JSON: 'low' comes twice"),
        ({"class_weights": "letters.json"}, 1, "letters.json names a class twice"),
        ({"class_weights": "few.json"}, 1, "few.json has no weight of middle, the classes are high, low, m"),
        ({"class_weights": "more.json"}, 1, "more.json has a weight of other, the classes are high, low, m"),
    ],
)
def test_mistakes_are_one_line(options, status, message, work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = {"high": 1, "low": 1, "middle": 1}
    files = {
        "list": [1, 2],
        "zero": weights | {"low": 0},
        "true": weights | {"low": True},
        "huge": weights | {"low": 10**400},
        "letters": weights | {"\u00e9": 1, "e\u0301": 2},
        "few": {"high": 1, "low": 1},
        "more": weights | {"other": 1},
    }
    for name, content in files.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    Path("text.json").write_text("{")
    Path("twice.json").write_text('{"low": 1, "low": 2}')
    assert main(command(work, tmp_path / "out", **options)) == status
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and not any("Traceback" in line for line in error)


@pytest.mark.parametrize(
    ("name", "value"),
    [("class_weights", "balanced"), ("loss", "focal"), ("sampling", "balanced")],
)
def test_transcripts_have_no_classes(name, value, work, tmp_path, capsys):
    said = f"--{name} cannot be used with --task transcribe: transcripts have no classes"
    assert main(command(work, tmp_path / "out", task="transcribe", **{name: value})) == 2
    assert said in capsys.readouterr().err
    more = {"model_name_or_path": "whisper", "train_data": "data", "task": "transcribe", name: value}
    with pytest.raises(UsageError, match=said):
        CompareArguments(output_dir="out", **more)


# --- compare ----------------------------------------------------------------------------------------------


def test_a_comparison_has_them_too(work, tmp_path):
    (tmp_path / "weights.json").write_text('{"high": 1, "low": 2, "middle": 3}')
    given = {
        "output_dir": str(tmp_path / "compared"),
        "methods": "head",
        "learning_rates": [1e-2],
        "seeds": 1,
        "num_train_epochs": 1,
        "model_name_or_path": str(work / "backbone"),
        "train_data": str(work / "train"),
        "eval_data": str(work / "test"),
        "test_data": str(work / "test"),
        "use_cpu": True,
    }
    plain = Comparison(CompareArguments(**given))
    assert not {"class_weights", "loss", "focal_gamma", "sampling"} & set(plain.settings)
    weights = str(tmp_path / "weights.json")
    comparison = Comparison(CompareArguments(**given, class_weights=weights, sampling="balanced"))
    assert comparison.settings["class_weights"] == {"high": 1, "low": 2, "middle": 3}
    result = comparison.run("head", 1e-2, 0)
    results = results_of(tmp_path / "compared" / result["folder"])
    assert results["class_weights"] == {"high": 1, "low": 2, "middle": 3}
    assert results["batches"]["sampling"] == "balanced"
