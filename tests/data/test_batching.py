"""Batches by length: every clip once, little padding, right under resume and two processes; and a clip's
result beside any neighbours."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from modelling_fixtures import CONFIGS, randomise, tiny_whisper
from process_fixtures import two_processes
from training_fixtures import make_audio_folder, make_backbone, train_command
from whisper_meft import HeadConfig, WeightedSumConfig, data, get_meft_model
from whisper_meft.commands import cli
from whisper_meft.data.batching import BalancedDraw, LengthBatches, LongestFirst, batches_by_length
from whisper_meft.errors import UserError
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.options.inference import InferenceArguments
from whisper_meft.options.training import TrainArguments
from whisper_meft.training import run as train


def clips_like_kespeech(number: int, seed: int = 0) -> list[int]:
    """Lengths in encoder frames: most between 2 and 10 s, about 6 s in the mean."""
    generator = random.Random(seed)
    return [round(50 * min(max(generator.lognormvariate(1.72, 0.4), 1), 30)) for _ in range(number)]


SIZES = [{"batch_size": 8}, {"max_frames": 3000}]


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize("number", [1, 7, 8, 200])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_clip_once_in_each_epoch(options, number, processes):
    lengths = clips_like_kespeech(number)
    batches = LengthBatches(lengths, **options, processes=processes)
    for epoch in range(3):
        batches.set_epoch(epoch)
        made = list(batches)
        assert len(made) == len(batches) and len(made) % processes == 0 and all(made)
        seen = [i for batch in made for i in batch]
        assert set(seen) == set(range(number))
        if number >= processes:
            assert len(seen) == number  # else one is repeated, so that no process waits for ever
        for batch in made:
            longest = max(lengths[i] for i in batch)
            assert len(batch) <= options.get("batch_size", number)
            assert len(batch) * longest <= options.get("max_frames", float("inf"))


@pytest.mark.parametrize("options", SIZES)
def test_little_is_padding_and_batches_are_full(options):
    lengths = clips_like_kespeech(2000)
    assert 5 < sum(lengths) / len(lengths) / 50 < 7
    batches = LengthBatches(lengths, **options)
    assert batches.padding() < 0.04
    generator = random.Random(0)
    order = generator.sample(range(len(lengths)), len(lengths))
    mixed = [[lengths[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
    assert 1 - sum(lengths) / sum(len(b) * max(b) for b in mixed) > 0.2  # what it is without
    if "max_frames" in options:
        used = [len(b) * max(lengths[i] for i in b) / options["max_frames"] for b in batches]
        assert sum(used) / len(used) > 0.85


def test_the_order_is_the_same_in_every_process_and_another_in_each_epoch():
    lengths = clips_like_kespeech(300)
    first, second = (LengthBatches(lengths, 8, seed=3) for _ in range(2))
    assert list(first) == list(second) == list(first)
    second.set_epoch(1)
    assert list(first) != list(second)
    # Not only the batches' order: which clips go together too.
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}
    assert list(LengthBatches(lengths, 8, seed=4)) != list(first)


def test_what_takes_most_memory_comes_first_of_all():
    lengths = clips_like_kespeech(300)
    for options in SIZES:
        made = [(len(b) * max(lengths[i] for i in b)) for b in LengthBatches(lengths, **options)]
        assert made[0] >= 0.97 * max(made)  # to the rounding of lengths
    for seed in range(20):
        first = next(iter(LengthBatches(lengths, 8, seed=seed)))
        assert max(lengths[i] for i in first) >= 0.97 * max(lengths)


def test_processes_get_batches_of_like_length_at_a_time():
    lengths = clips_like_kespeech(400)
    made = list(LengthBatches(lengths, 8, processes=2))
    pairs = [[max(lengths[i] for i in batch) for batch in made[i : i + 2]] for i in range(0, len(made), 2)]
    apart = [abs(a - b) / max(a, b) for a, b in pairs]
    assert sum(apart) / len(apart) < 0.05


CLASSES = [
    ["a"] * 50 + ["b"] * 3 + ["c"],
    ["only"] * 5,
    [str(number) for number in range(7)],
    [number % 3 for number in range(100)] + [9, 9],
]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("seed", [0, 7])
def test_over_any_number_of_epochs_classes_and_their_clips_come_equally_often(classes, seed):
    draw, n, names = BalancedDraw(classes, seed), len(classes), sorted(set(classes), key=str)
    often = np.zeros(n, int)
    for epoch in range(40):
        drawn = draw(epoch)
        assert drawn.shape == (n,) and np.array_equal(drawn, BalancedDraw(classes, seed)(epoch))
        often += np.bincount(drawn, minlength=n)
        for name in names:
            own = often[[each == name for each in classes]]
            assert abs(own.sum() - (epoch + 1) * n / len(names)) < 1
            assert own.max() - own.min() <= 1
    assert BalancedDraw(classes, -1)(0).shape == (n,)  # of any sign, as without
    assert len(names) == n or n < 6 or not np.array_equal(draw(0), BalancedDraw(classes, seed + 1)(0))


def test_a_rare_class_in_much_data_is_drawn_at_once():
    draw = BalancedDraw([0] * 1_000_000 + [1], 3)
    for epoch in (0, 5):
        drawn = draw(epoch)
        assert len(drawn) == 1_000_001 and abs((drawn == 1_000_000).sum() - 500_000) <= 1
        assert 500_001 - len(set(drawn.tolist())) <= 5  # where one order ends and another begins
    assert len(set(draw(0).tolist()) | set(draw(1).tolist())) == 1_000_001


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_drawn_clips_are_batches_by_length_too(processes):
    lengths, classes = clips_like_kespeech(101), [int(number > 90) for number in range(101)]
    draw = BalancedDraw(classes, 2)
    batches = LengthBatches(lengths, 8, processes=processes, seed=2, draw=draw)
    other = LengthBatches(lengths, 8, processes=processes, seed=2, draw=BalancedDraw(classes, 2))
    plain = LengthBatches(lengths, 8, processes=processes, seed=2)
    for epoch in range(4):
        for each in (batches, other, plain):
            each.set_epoch(epoch)
        made = list(batches)
        assert made == list(other) and len(made) == len(plain)
        assert sorted(map(len, made)) == sorted(map(len, plain))
        assert sorted(i for batch in made for i in batch) == sorted(draw(epoch).tolist())
        assert batches.padding() < 0.1
    batches.set_epoch(0)
    costs = [max(lengths[i] for i in batch) * len(batch) for batch in batches]
    assert max(costs[:processes]) >= 0.95 * max(costs)


def test_what_cannot_be_drawn():
    with pytest.raises(UserError, match="there are no clips to draw from"):
        BalancedDraw([])
    with pytest.raises(UserError, match="draw needs batch_size"):
        LengthBatches([3, 4], max_frames=10, draw=BalancedDraw([0, 1]))


def test_what_cannot_be_made_into_batches():
    with pytest.raises(UserError, match="one of batch_size and max_frames"):
        LengthBatches([3, 4])
    with pytest.raises(UserError, match="max_frames_per_batch must be at least 40, .* got 39"):
        LengthBatches([30, 40], max_frames=39)


@pytest.mark.parametrize(
    ("changes", "lengths", "max_frames", "made"),
    [
        ({}, [5, 6, 7], "longest", True),
        ({}, [5, 6, 7], 8, True),
        ({}, [5, 6, 7], "fidelity", False),
        ({}, None, "longest", False),
        ({"bucket_by_length": False}, [5, 6, 7], "longest", False),
        ({"dataloader_drop_last": True}, [5, 6, 7], "longest", False),
        ({"train_sampling_strategy": "sequential"}, [5, 6, 7], "longest", False),
        ({"train_sampling_strategy": "sequential", "bucket_by_length": True}, [5, 6, 7], "longest", True),
    ],
)
def test_when_batches_are_made_by_length(changes, lengths, max_frames, made, tmp_path):
    arguments = TrainArguments(output_dir=str(tmp_path), **changes)
    assert (batches_by_length(lengths, max_frames, arguments) is not None) == made


def test_the_order_is_drawn_from_the_seed_of_the_data(tmp_path):
    lengths = clips_like_kespeech(100)
    orders = []
    for seeds in ({"seed": 1}, {"seed": 2, "data_seed": 1}, {"seed": 2}):
        arguments = TrainArguments(output_dir=str(tmp_path), **seeds)
        orders.append(list(batches_by_length(lengths, "longest", arguments)))
    assert orders[0] == orders[1] != orders[2]


def test_evaluation_goes_from_long_to_short():
    assert list(LongestFirst([3, 9, 1, 9])) == [1, 3, 0, 2]


# --- a clip and its neighbours


@pytest.mark.parametrize("method", [*CONFIGS, "head", "weighted_sum"])
def test_a_clip_does_not_depend_on_its_neighbours_lengths(method):
    config = {"head": HeadConfig, "weighted_sum": WeightedSumConfig}.get(method)
    config = (
        CONFIGS[method](reduction_factor=4, max_frames="longest")
        if config is None
        else config(max_frames="longest")
    )
    model = randomise(get_meft_model(tiny_whisper(), config), std=0.1).eval()
    torch.manual_seed(0)
    frames = [5, 48, 17, 30, 2]
    clips = [torch.randn(12, n) for n in frames]

    def batch(indices: list[int], total: int) -> dict[str, torch.Tensor]:
        pad = torch.nn.functional.pad
        features = torch.stack([pad(clips[i], (0, total - frames[i])) for i in indices])
        mask = torch.stack([(torch.arange(total) < frames[i]).long() for i in indices])
        return {"input_features": features, "attention_mask": mask}

    together = model(**batch(list(range(5)), 48)).logits
    alone = torch.cat([model(**batch([i], n + n % 2)).logits for i, n in enumerate(frames)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(0).min() > 1e-2  # they do differ from each other


# --- training


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batching")
    return make_backbone(folder / "backbone"), make_audio_folder(folder / "audio", 6)


def logged(folder: Path) -> list[float]:
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name[11:]))
    history = json.loads(states[-1].read_text())["log_history"]
    return [entry[k] for entry in history for k in ("loss", "eval_loss") if k in entry]


def test_training_takes_batches_by_length_where_frames_are_trimmed(work, tmp_path, capsys, monkeypatch):
    computed = []
    call = data.Collator.__call__

    def counting(self, items):
        computed.append([item["length"] for item in items])
        return call(self, items)

    monkeypatch.setattr(data.Collator, "__call__", counting)
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "eval_strategy": "no"}
    command = train_command(*work, tmp_path / "a", max_frames="longest", **options)
    assert cli.main(command) == 0
    assert "5 batches by length an epoch" in capsys.readouterr().out
    assert sum(map(len, computed)) == 18 and max(map(len, computed)) == 4
    spread = sum(max(lengths) - min(lengths) for lengths in computed) / len(computed)
    assert spread < 8
    assert cli.main([*command, "--overwrite_output_dir", "--bucket_by_length=False"]) == 0
    assert "by length" not in capsys.readouterr().out
    options["max_frames_per_batch"] = 100
    computed.clear()
    assert cli.main(train_command(*work, tmp_path / "b", max_frames=40, **options)) == 0
    assert sum(map(len, computed)) == 18 and all(len(c) * max(c) <= 100 for c in computed)
    assert max(map(len, computed)) > min(map(len, computed))


def test_inference_takes_clips_by_length_and_answers_in_their_order(work, tmp_path, monkeypatch):
    options = {"num_train_epochs": 1, "eval_strategy": "no", "max_frames": "longest"}
    assert cli.main(train_command(*work, tmp_path / "model", **options)) == 0
    classifier = Classifier.load(tmp_path / "model", InferenceArguments(batch_size=4), progress=False)
    examples, _ = classifier.check(data.load_examples(str(work[1])))
    spread = []
    call = data.Collator.__call__

    def watching(self, items):
        lengths = [item["length"] for item in items]
        spread.append(max(lengths) - min(lengths))
        return call(self, items)

    monkeypatch.setattr(data.Collator, "__call__", watching)
    found = classifier.probabilities(examples)
    assert sum(spread) / len(spread) < 8
    alone = np.concatenate([classifier.probabilities(examples[i : i + 1]) for i in range(len(examples))])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert len({tuple(row) for row in alone.round(4)}) == len(alone)  # so that their order shows


@pytest.mark.parametrize("cached", [False, True])
def test_resuming_in_the_middle_of_an_epoch_goes_on_with_its_batches(cached, work, tmp_path):
    options = {
        "max_frames": "longest",
        "max_frames_per_batch": 150,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 9,
        "eval_strategy": "no",
    }
    if cached:
        options["cache_features"] = tmp_path / "cache"
    assert cli.main(train_command(*work, tmp_path / "whole", **options)) == 0
    whole = tmp_path / "whole"
    steps = sorted(int(p.name[11:]) for p in whole.glob("checkpoint-*"))
    per_epoch = steps[-1] // 2
    middle = next(step for step in steps if per_epoch < step < steps[-1])
    assert middle % per_epoch  # in the second epoch
    (tmp_path / "part").mkdir()
    (whole / f"checkpoint-{middle}").rename(tmp_path / "part" / f"checkpoint-{middle}")
    command = train_command(*work, tmp_path / "part", **options, resume_from_checkpoint=True)
    assert cli.main(command) == 0
    expected, found = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "part")
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    assert logged(tmp_path / "part") == pytest.approx(logged(whole), abs=1e-6)


# Ten clips, three per process: the last batch is not full. The cache is shared.
TWO_PROCESSES = {
    "lst": {"max_frames": "longest", "cache_features": True, "cache_storage": "exact"},
    "unipt": {"max_frames": "longest", "cache_features": True, "cache_storage": "exact"},
    "sherl": {"max_frames": "fidelity"},
}


def test_two_processes_equal_one_on_the_joined_batches(work, tmp_path, monkeypatch):
    def command(method, folder):
        options = {
            "method": method,
            "num_train_epochs": 2,
            "eval_strategy": "no",
            "optim": "sgd",
            "learning_rate": 0.05,
            "max_grad_norm": 0,
            "per_device_train_batch_size": 3,
            "max_train_samples": 10,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            **TWO_PROCESSES[method],
        }
        if "cache_features" in options:
            options["cache_features"] = str(tmp_path / "cache")
        # One process adds up the two batches of each turn.
        options["gradient_accumulation_steps"] = 1 if folder == "two" else 2
        return train_command(*work, tmp_path / folder / method, **options)

    commands = [command(method, "two") for method in TWO_PROCESSES]
    lines = [
        "from whisper_meft.commands.cli import main",
        f"for command in {commands!r}:",
        "    assert main(command) == 0",
    ]
    (tmp_path / "run.py").write_text("\n".join(lines))
    two_processes(tmp_path / "run.py")

    def for_two(lengths, max_frames, arguments, clips, classes):
        pretended = SimpleNamespace(**vars(arguments))
        pretended.train_batch_size, pretended.world_size = 3, 2
        found = batches_by_length(lengths, max_frames, pretended, clips, classes)
        sizes = [len(each) for each in found]
        assert sum(sizes) == clips == 10 and len(sizes) % 2 == 0 and min(sizes) < 3
        return found

    monkeypatch.setattr(train, "batches_by_length", for_two)
    start = safetensors.torch.load_file(work[0] / "model.safetensors")
    for method in TWO_PROCESSES:
        assert cli.main(command(method, "one")) == 0
        expected, found = (
            safetensors.torch.load_file(tmp_path / name / method / "model.safetensors")
            for name in ("one", "two")
        )
        assert not torch.equal(expected["projector.weight"], start["projector.weight"])
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        results = json.loads((tmp_path / "two" / method / "train_results.json").read_text())
        assert results["throughput"]["utterances_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_frames_per_batch": 0, "max_frames": "longest"}, "--max_frames_per_batch must be at least 1"),
        ({"max_frames_per_batch": 30, "max_frames": "longest"}, "max_frames_per_batch must be at least"),
        ({"max_frames_per_batch": 300}, "max_frames is fidelity"),
        ({"bucket_by_length": True}, "bucket_by_length makes batches by the lengths"),
        ({"bucket_by_length": True, "dataloader_drop_last": True}, "--dataloader_drop_last"),
        ({"max_frames_per_batch": 99, "auto_batch": True}, "--auto_batch True cannot be used together"),
        ({"max_frames_per_batch": 99, "bucket_by_length": False}, "--bucket_by_length False cannot"),
    ],
)
def test_options_that_do_not_go_together(options, message, work, tmp_path, capsys):
    assert cli.main(train_command(*work, tmp_path / "out", **options)) != 0
    assert message in capsys.readouterr().err
