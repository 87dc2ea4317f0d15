"""Trainings on augmented clips: what is done, recorded, resumed, kept in a feature cache, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from recogniser_fixtures import make_recogniser
from safetensors.torch import load_file
from training_fixtures import RATE, make_audio_folder, make_backbone, make_transcripts, train_command
from transformers import WhisperFeatureExtractor
from whisper_meft import HeadConfig, data, get_meft_model
from whisper_meft.augmentation.settings import Augmentation
from whisper_meft.commands.cli import main
from whisper_meft.comparison.arguments import CompareArguments
from whisper_meft.comparison.runs import Comparison
from whisper_meft.data.augmenter import Augmenter
from whisper_meft.errors import UserError
from whisper_meft.feature_cache.dataset import CachedDataset
from whisper_meft.feature_cache.filling import prepare_cache
from whisper_meft.feature_cache.key import copy_fingerprints, source_of
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.model.backbone import load_backbone, set_labels
from whisper_meft.options.parser import UsageError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A backbone, 12 clips of 3 classes in a folder, and a folder of noise."""
    folder = tmp_path_factory.mktemp("augmentation")
    backbone = make_backbone(folder / "backbone")
    audio = make_audio_folder(folder / "audio", 4)
    (folder / "noise").mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE)
    soundfile.write(folder / "noise" / "hiss.wav", noise, RATE)
    return folder, backbone, audio


def run(work, output: Path, augment: str | None = "speed,noise,gain,spec", **options):
    """Weights and record of a run of `whisper-meft train`."""
    given = {"num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "no", "max_frames": "longest"}
    given |= {"per_device_train_batch_size": 4, **options}
    assert main(train_command(work[1], work[2], output, augment=augment, **given)) == 0
    record = json.loads((output / "train_results.json").read_text())
    return load_file(output / "model.safetensors"), record


def apart(one, other) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_run_is_the_same_whatever_reads_for_it(work, tmp_path):
    weights, record = run(work, tmp_path / "a")
    kinds = {"speed": 1.0, "noise": 0.5, "gain": 1.0, "spec": 1.0}
    assert record["augmentation"]["kinds"] == kinds and record["augmentation"]["seed"] == 1
    assert record["augmentation"]["noise_snr"] == [0.0, 20.0] and record["cache_copies"] is None
    again, _ = run(work, tmp_path / "b", dataloader_num_workers=2)
    assert apart(weights, again) == 0
    plain, record = run(work, tmp_path / "c", augment=None)
    assert apart(weights, plain) > 1e-4 and record["augmentation"] is None


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_clips(work, tmp_path, capsys):
    """In the middle of its second epoch."""
    options = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    whole, _ = run(work, tmp_path / "whole", **options)
    argv = train_command(work[1], work[2], tmp_path / "part", augment="speed,noise,gain,spec", **options)
    argv += ["--eval_strategy=no", "--max_frames=longest", "--per_device_train_batch_size=4"]
    assert main([*argv, "--num_train_epochs=2", "--max_steps=4"]) == 0
    assert main([*argv, "--num_train_epochs=2", "--resume_from_checkpoint=True"]) == 0
    assert apart(whole, load_file(tmp_path / "part" / "model.safetensors")) == 0
    changed = [each.replace("speed,noise,gain,spec", "gain") for each in argv]
    assert main([*changed, "--num_train_epochs=3", "--resume_from_checkpoint=True"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "trained with augmentation {" in error and "'speed': 1.0" in error
    assert "(now {'kinds': {'gain': 1.0}, 'gain_db': [-10.0, 10.0]})" in error


@pytest.mark.slow
def test_copies_in_a_cache_are_what_epochs_would_have(work, tmp_path, capsys):
    """Of one window, so that the batches are the same ones."""
    options = {"max_frames": "fidelity", "num_train_epochs": 3}
    cached = {**options, "cache_features": tmp_path / "cache", "cache_storage": "exact"}
    plain, _ = run(work, tmp_path / "plain", **options)
    three, record = run(work, tmp_path / "three", cache_copies=3, **cached)
    assert record["cache_copies"] == 3 and apart(plain, three) < 1e-4
    assert "36 of 36 clips are missing" in capsys.readouterr().out
    two, _ = run(work, tmp_path / "two", cache_copies=2, **cached)
    assert "all 24 clips are there" in capsys.readouterr().out
    assert apart(three, two) > 1e-4
    # The cache holds the clips as they are too, when these are needed; and none of another seed.
    for copies in ("12 of 12 clips are missing", "all 12 clips are there"):
        run(work, tmp_path / copies.replace(" ", "_"), augment=None, cache_copies=1, **cached)
        assert copies in capsys.readouterr().out
    run(work, tmp_path / "seed", cache_copies=1, **cached, seed=2)
    assert "12 of 12 clips are missing" in capsys.readouterr().out


def test_a_run_without_augmentation_takes_an_old_cache(work):
    """Fingerprints of clips as they are have not changed."""
    examples = data.load_examples(str(work[2]))
    augment = Augmenter(Augmentation({"noise": 1.0}), noise_dir=work[0] / "noise")
    plain, copies = copy_fingerprints(examples), copy_fingerprints(examples, augment, 2)
    assert all("augmented" not in each for each in plain)
    assert [source_of(each) for each in copies] == 2 * plain and len(set(copies)) == 24
    hiss = work[0] / "noise" / "hiss.wav"
    other = Augmenter(Augmentation({"noise": 1.0}, noise_snr=(0, 19)), noise_dir=hiss.parent)
    assert not set(copies) & set(copy_fingerprints(examples, other, 2))


def test_the_cache_command_makes_what_training_takes(work, tmp_path, capsys):
    where = [f"--model_name_or_path={work[1]}", f"--train_data={work[2]}", f"--eval_data={work[2]}"]
    argv = ["cache", *where, f"--output_dir={tmp_path / 'cache'}", "--max_frames=longest", "--seed=1"]
    how = ["--augment", "noise:0.9", "spec", f"--noise_dir={work[0] / 'noise'}", "--disable_tqdm"]
    assert main([*argv, *how, "--cache_copies=2"]) == 0
    assert "holds 36 clips" in capsys.readouterr().out
    options = {"cache_features": tmp_path / "cache", "cache_copies": 2, "noise_dir": work[0] / "noise"}
    _, record = run(work, tmp_path / "run", augment="spec,noise:0.9", eval_data=work[2], **options)
    assert capsys.readouterr().out.count("clips are there") == 2
    assert record["augmentation"]["noise_files"] == 1
    assert main([*argv, *how]) == 2 and "--cache_copies says how many" in capsys.readouterr().err


def test_cached_copies_are_taken_in_turn(work, tmp_path):
    base = load_backbone(work[1])
    set_labels(base, ["high", "low", "middle"])
    extractor = WhisperFeatureExtractor.from_pretrained(work[1])
    model = get_meft_model(base, HeadConfig(max_frames="longest"))
    examples, _ = data.check_audio(data.load_examples(str(work[2])), progress=False)
    augment = Augmenter(Augmentation({"speed": 1.0, "noise": 1.0}), 3)
    cache = prepare_cache(
        tmp_path / "c", model, extractor, [examples], "exact", progress=False, augment=augment, copies=3
    )
    assert len(cache) == 3 * len(examples)
    ids = {"high": 0, "low": 1, "middle": 2}
    dataset = CachedDataset(examples, FeatureCache(tmp_path / "c"), model, ids, augment=augment, copies=3)
    online = data.SpeechDataset(examples, extractor, ids, "longest", augment=augment)
    lengths = []
    for epoch in range(5):
        dataset.set_epoch(epoch)
        online.set_epoch(epoch % 3)
        lengths.append([dataset[i]["length"] for i in range(12)])
        assert lengths[-1] == [online[i]["length"] for i in range(12)]
        assert torch.equal(
            dataset[(4, 2)]["hidden_states"],
            dataset.cache.read(dataset.copies[(epoch + 2) % 3][4], dataset.layers).states,
        )
    assert np.max(lengths, axis=0).tolist() == dataset.lengths
    with pytest.raises(UserError, match="lacks 12 of 48 augmented clips"):
        CachedDataset(examples, cache, model, ids, augment=augment, copies=4)
    with pytest.raises(UserError, match="lacks 12 of 12 clips"):
        CachedDataset(examples, cache, model, ids)


@pytest.mark.slow
def test_rare_clips_come_again_in_another_way(work, tmp_path):
    weights, _ = run(work, tmp_path / "a", "noise:1", sampling="balanced", max_frames="fidelity")
    cached = {"cache_features": tmp_path / "cache", "cache_copies": 2, "max_frames": "fidelity"}
    # States in 16 bits would move a weight by up to a hundredth, depending on the noise that is drawn.
    cached |= {"cache_storage": "exact"}
    found, _ = run(work, tmp_path / "b", "noise:1", sampling="balanced", **cached)
    assert apart(weights, found) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_recognisers_are_trained_on_augmented_clips(work, tmp_path, cached, capsys):
    whisper = make_recogniser(tmp_path / "whisper")
    table = make_transcripts(tmp_path / "said.csv", work[2])
    options = {"cache_features": tmp_path / "cache", "cache_copies": 2} if cached else {}
    _, record = run(
        (work[0], whisper, table),
        tmp_path / "run",
        task="transcribe",
        language="nl",
        max_frames=None,
        zero_shot=False,
        **options,
    )
    assert set(record["augmentation"]["kinds"]) == {"speed", "noise", "gain", "spec"}
    assert "augmented by speed, noise (50%), gain, spec" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--augment", "echo"],
            "--augment must be some of speed, room, noise, telephone, gain, spec, got 'echo'",
        ),
        (["--augment", "noise", "--noise_snr", "20", "0"], "--noise_snr must be two numbers of dB"),
        (
            ["--augment", "noise", "--noise_snr", "quiet"],
            "argument --noise_snr: invalid float value: 'quiet'",
        ),
        (["--noise_snr", "0", "20"], "--noise_snr 0.0 20.0 is for --augment noise, which is not given"),
        (["--augment", "speed", "--spec_bins", "5"], "--spec_bins 5 is for --augment spec, which is not"),
        (["--augment", "room"], "--augment room needs --room_dir, a folder of room impulse responses"),
        (
            ["--augment", "noise", "--noise_dir", "gone"],
            "--noise_dir must be a folder of recordings, got 'gone'",
        ),
        (["--augment", "spec", "--spec_bins", "80"], "spec_bins must be below the 80 mel bins"),
        (["--augment", "noise", "--noise_dir", "EMPTY"], "noise_dir: no audio files were found under"),
        (
            ["--augment", "noise", "--cache_features"],
            "--cache_copies says how many versions of each training",
        ),
        (["--augment", "noise", "--cache_copies", "3"], "--cache_copies 3 needs --cache_features"),
        (
            ["--cache_features", "--cache_copies", "2"],
            "--cache_copies 2 needs --augment: without it all copies",
        ),
        (
            ["--augment", "gain", "--cache_features", "--cache_copies", "0"],
            "--cache_copies must be at least 1",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(work, tmp_path, capsys, options, message):
    (tmp_path / "empty").mkdir()
    options = [str(tmp_path / "empty") if each == "EMPTY" else each for each in options]
    assert main([*train_command(work[1], work[2], tmp_path / "run"), *options]) in (1, 2)
    out, err = capsys.readouterr()
    assert message in err and len([line for line in err.splitlines() if "error" in line]) == 1
    assert "Traceback" not in err and not (tmp_path / "run" / "config.json").exists()


def test_a_comparison_hands_it_to_every_run(work, tmp_path):
    common = {"train_data": str(work[2]), "test_data": str(work[2]), "model_name_or_path": str(work[1])}
    common |= {
        "methods": "head",
        "seeds": 1,
        "learning_rates": [1e-3],
        "num_train_epochs": 2,
        "use_cpu": True,
    }
    arguments = CompareArguments(
        output_dir=str(tmp_path / "c"),
        augment=["noise", "spec"],
        noise_snr=[0.0, 5.0],
        batch_size=4,
        **common,
    )
    comparison = Comparison(arguments)
    assert comparison.settings["augment"] == ["noise", "spec"]
    folder = tmp_path / "c" / comparison.run("head", 1e-3, 0)["folder"]
    augmented = json.loads((folder / "train_results.json").read_text())["augmentation"]
    assert augmented["noise_snr"] == [0.0, 5.0] and list(augmented["kinds"]) == ["noise", "spec"]
    # Only clips as they are, those that are chosen on, may stay in memory from run to run.
    assert [examples for examples, _ in comparison._cache] == [id(comparison.examples.evaluation)]
    with pytest.raises(UsageError, match="--augment must be some of"):
        CompareArguments(output_dir=str(tmp_path / "d"), augment=["echo"], **common)
