"""The feature cache: what it stores, that it refuses what is stale and repairs what is damaged, and training
from it."""

import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from process_fixtures import Running
from safetensors import safe_open
from training_fixtures import make_audio_folder, make_backbone, train_command
from transformers import WhisperFeatureExtractor
from whisper_meft import (
    HeadConfig,
    LSTConfig,
    SHERLConfig,
    UniPTConfig,
    WeightedSumConfig,
    data,
    get_meft_model,
)
from whisper_meft.commands import cli
from whisper_meft.data import Example, ExampleSet
from whisper_meft.encoder.cached import decoded
from whisper_meft.errors import UserError
from whisper_meft.feature_cache import filling as cached_data
from whisper_meft.feature_cache.claims import Claims
from whisper_meft.feature_cache.dataset import CachedCollator, CachedDataset
from whisper_meft.feature_cache.filling import check_disk, first_part, prepare_cache
from whisper_meft.feature_cache.key import cache_key, clip_fingerprint
from whisper_meft.feature_cache.shards import clip_bytes, pack, unpack
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.model.backbone import load_backbone, set_labels

METHODS = {
    "lst": LSTConfig(reduction_factor=2),
    "lst_layers": LSTConfig(reduction_factor=2, layers=[2]),
    "unipt": UniPTConfig(reduction_factor=2),
    "sherl": SHERLConfig(reduction_factor=2),
    "head": HeadConfig(),
    "weighted_sum": WeightedSumConfig(),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A backbone of 3 layers with a window of 1 s, 12 clips of 3 classes, the extractor and the labels."""
    folder = tmp_path_factory.mktemp("cache")
    backbone = make_backbone(folder / "backbone", encoder_layers=3)
    audio = make_audio_folder(folder / "audio", 4)
    examples, _ = data.check_audio(data.load_examples(str(audio)), progress=False)
    extractor = WhisperFeatureExtractor.from_pretrained(backbone)
    return backbone, audio, examples, extractor, {"high": 0, "low": 1, "middle": 2}


def model_of(work, config, max_frames="longest", dtype=None):
    base = load_backbone(work[0])
    set_labels(base, list(work[4]))
    torch.manual_seed(1)
    config = type(config).from_dict(config.to_dict() | {"max_frames": max_frames, "backbone_dtype": dtype})
    model = get_meft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def online_batch(work, max_frames):
    dataset = data.SpeechDataset(work[2], work[3], work[4], max_frames)
    return data.Collator(work[3], max_frames)([dataset[i] for i in range(len(dataset))])


def cached_batch(work, model, folder, storage):
    cache = prepare_cache(folder, model, work[3], [work[2]], storage, progress=False)
    dataset = CachedDataset(work[2], cache, model, work[4])
    return CachedCollator()([dataset[i] for i in range(len(dataset))])


def gradients(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    named = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
    return output, torch.cat([g.flatten() for n, g in named if n not in model.meft_config.without_gradient])


@pytest.mark.parametrize("max_frames", ["fidelity", "longest", 30])
@pytest.mark.parametrize("method", METHODS)
def test_cached_states_give_the_same_scores_loss_and_gradients(method, max_frames, work, tmp_path):
    model = model_of(work, METHODS[method], max_frames)
    expected, wanted = gradients(model, online_batch(work, max_frames))
    batch = cached_batch(work, model, tmp_path / "c", "exact")
    assert "input_features" not in batch
    output, found = gradients(model, batch)
    torch.testing.assert_close(output.logits, expected.logits, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-5, atol=2e-5)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert expected.logits.std(0).min() > 1e-3  # the clips do differ, or nothing is shown


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 0.01), ("int8", 0.03), ("fp8", 0.1)])
@pytest.mark.parametrize("method", ["lst", "unipt", "sherl", "head"])
def test_rounded_states_give_nearly_the_same(method, storage, tolerance, work, tmp_path):
    model = model_of(work, METHODS[method])
    expected, wanted = gradients(model, online_batch(work, "longest"))
    batch = cached_batch(work, model, tmp_path / "c", storage)
    output, found = gradients(model, batch)
    assert (output.logits - expected.logits).norm() <= tolerance * expected.logits.norm()
    assert (found - wanted).norm() <= 3 * tolerance * wanted.norm()
    assert not torch.equal(output.logits, expected.logits)  # they are rounded


def test_a_half_precision_backbone_is_kept_as_it_is(work, tmp_path):
    model = model_of(work, METHODS["lst"], dtype="bfloat16")
    expected = model(**online_batch(work, "longest"))
    batch = cached_batch(work, model, tmp_path / "c", None)
    assert FeatureCache(tmp_path / "c").storage == "exact" and batch["hidden_states"].dtype == torch.bfloat16
    output = model(**batch)
    torch.testing.assert_close(output.logits, expected.logits, rtol=2e-2, atol=2e-2)


def test_the_backbone_is_not_run_from_a_cache(work, tmp_path, monkeypatch):
    for name in ("lst", "sherl"):
        model = model_of(work, METHODS[name])
        batch = cached_batch(work, model, tmp_path / name, "exact")
        ran = []
        # Layers are run by their modules, not always by themselves.
        for module in (model.encoder.conv1, *(layer.fc1 for layer in model.encoder.layers)):
            module.register_forward_hook(lambda module, *_, ran=ran: ran.append(module))
        with torch.no_grad():
            model(**batch)
        assert ran == ([] if name == "lst" else [model.encoder.layers[-1].fc1])


def test_only_what_is_read_is_stored_and_trimmed(work, tmp_path):
    model = model_of(work, METHODS["lst_layers"])
    prepare_cache(tmp_path / "c", model, work[3], [work[2]], "bfloat16", progress=False)
    cache = FeatureCache(tmp_path / "c")
    assert cache.layers == (0, 2) and len(cache) == len(work[2])
    lengths = data.SpeechDataset(work[2], work[3], None, "longest").lengths
    assert len(set(lengths)) > 3
    for example, length in zip(work[2], lengths):
        clip = cache.find(example)
        states = cache.read(clip, cache.layers).states
        assert states.shape == (2, length, 32) and states.dtype == torch.bfloat16 and clip.frames == length
    predicted = sum(clip_bytes(t, 2, 32, "bfloat16", torch.float32) for t in lengths)
    assert 0.8 * predicted < cache.bytes_on_disk <= predicted


def test_a_cache_of_all_layers_serves_a_method_that_reads_some(work, tmp_path):
    cached_batch(work, model_of(work, METHODS["weighted_sum"]), tmp_path / "c", "exact")
    for name in ("lst_layers", "sherl", "head", "unipt"):
        model = model_of(work, METHODS[name])
        expected = model(**online_batch(work, "longest")).logits
        output = model(**cached_batch(work, model, tmp_path / "c", None)).logits
        torch.testing.assert_close(output, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("storage", "dtype", "percent"), [("int8", torch.int8, 1), ("fp8", torch.float8_e4m3fn, 3)]
)
def test_8_bits_keep_each_clip_to_some_percent_of_its_channels_spread(storage, dtype, percent):
    torch.manual_seed(0)
    states = [torch.randn(40, 64) * torch.linspace(0.1, 5, 64) + 10 * torch.randn(64) for _ in range(3)]
    parts = pack(states, 30, storage)
    assert parts["states"].dtype == dtype and parts["states"].shape == (3, 30, 64)
    clip = unpack(parts)
    assert clip.scales.shape == (3, 2, 64)
    for found, state in zip(decoded(clip.states, clip.statistics, clip.scales, torch.float32), states):
        mean, std = state[:30].mean(-1, keepdim=True), state[:30].std(-1, keepdim=True)
        normed, error = (state[:30] - mean) / std, (found - state[:30]) / std
        error = error.square().mean(0).sqrt() / normed.std(0)
        assert 0 < error.max() < 0.02 * percent and error.mean() < 0.01 * percent


def test_states_that_are_not_finite_are_not_stored():
    state = torch.randn(5, 8)
    state[3, 2] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        pack([torch.randn(5, 8), state], 5, "exact")
    pack([state], 3, "exact")  # what lies behind the clip's end does not count


def key_of(work, **changes):
    model = model_of(work, METHODS["lst"], **changes)
    return cache_key(model.encoder, work[3], model.meft_config.max_frames)


def test_a_stale_cache_is_refused_and_what_differs_is_named(work, tmp_path):
    key = key_of(work)
    FeatureCache.create(tmp_path / "c", key, (0, 2), 32)
    FeatureCache.create(tmp_path / "c", key, (2,), 32)  # reads less: fine
    other = model_of(work, METHODS["lst"])
    with torch.no_grad():
        other.encoder.layers[1].fc1.bias[3] += 1e-3  # no few samples of the weights would show it
    extractor = WhisperFeatureExtractor.from_pretrained(work[0], sampling_rate=8000)
    cases = [
        (key_of(work, dtype="bfloat16"), (0,), "backbone_dtype was float32, now it is bfloat16"),
        (key_of(work, max_frames=20), (0,), "max_frames was longest, now it is 20"),
        (cache_key(other.encoder, work[3], "longest"), (0,), "stale: the backbone's weights are others;"),
        (
            cache_key(other.encoder, extractor, "longest"),
            (0,),
            "extractor's sampling_rate was 16000, now it is 8000",
        ),
        (cache_key(other.encoder, work[3], "longest", "bfloat16"), (0,), "autocast .* was None"),
        (key, (0, 1, 2), "lacks layers 1 "),
    ]
    for changed, layers, message in cases:
        with pytest.raises(UserError, match=message):
            FeatureCache.create(tmp_path / "c", changed, layers, 32)
    with pytest.raises(UserError, match="storage was bfloat16, now it is fp8"):
        FeatureCache.create(tmp_path / "c", key, (0, 2), 32, "fp8")
    with pytest.raises(UserError, match="storage must be one of"):
        FeatureCache.create(tmp_path / "c", key, (0, 2), 32, "int4")


def test_a_cache_made_when_audio_was_read_otherwise_is_stale(work, tmp_path):
    key = key_of(work)
    FeatureCache.create(tmp_path / "c", {**key, "reading": key["reading"] - 1}, (0,), 32)
    FeatureCache.create(tmp_path / "d", {name: key[name] for name in key if name != "reading"}, (0,), 32)
    for folder in ("c", "d"):
        with pytest.raises(
            UserError, match=f"stale: the version of how audio is read was (None|{key['reading'] - 1}), now"
        ):
            FeatureCache.create(tmp_path / folder, key, (0,), 32)


def test_channels_of_one_recording_are_different_clips(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"x")
    prints = {clip_fingerprint(Example(path, "a", name="clip", channel=channel)) for channel in (None, 0, 1)}
    assert len(prints) == 3


def test_what_the_weights_do_not_show_is_in_the_key(work, tmp_path):
    folder = make_backbone(tmp_path / "backbone", encoder_layers=3)
    model = model_of((folder, *work[1:]), METHODS["head"])
    prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    heads = config["encoder_attention_heads"]
    for name, value in (("encoder_attention_heads", 2 * heads), ("activation_function", "relu")):
        path.write_text(json.dumps(config | {name: value}))
        other = model_of((folder, *work[1:]), METHODS["head"])
        with pytest.raises(UserError, match=f"the backbone's config's {name} was .*, now it is {value}"):
            prepare_cache(tmp_path / "c", other, work[3], [work[2]], progress=False)


def altered(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def swap(rows, a, b, column=slice(None)):
    rows[a][column], rows[b][column] = rows[b][column], rows[a][column]


@pytest.mark.parametrize(
    "change",
    [
        lambda clips: swap(clips, 0, 1),
        lambda clips: swap(clips, 0, 1, 0),  # the names alone
        lambda clips: swap(clips, 0, 1, 1),  # the fingerprints alone
        lambda clips: clips.pop(0),
        lambda clips: clips.pop(),
        lambda clips: clips.insert(0, clips[-1]),
        lambda clips: clips[0].__setitem__(2, clips[0][2] - 1),
        lambda clips: clips[0].__setitem__(3, 99.0),
    ],
)
def test_an_index_that_was_altered_is_not_believed(change, work, tmp_path):
    model = model_of(work, METHODS["head"])
    whole = cached_batch(work, model, tmp_path / "c", "exact")
    (path,) = (tmp_path / "c").glob("shard-*.json")
    altered(path, lambda index: change(index["clips"]))
    cache = FeatureCache(tmp_path / "c")
    assert len(cache) == 0 and cache.damaged() == [path.stem]
    assert cache.checked(work[2][0]) is None
    again = cached_batch(work, model, tmp_path / "c", None)
    torch.testing.assert_close(again["hidden_states"], whole["hidden_states"], rtol=1e-5, atol=1e-5)
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layers": [2, 1, 0, 3]},
            "cache.json was altered since it was written: name another folder, or rem",
        ),
        ({"layers": [1, 2, 3]}, "cache.json was altered"),
        ({"storage": "bfloat16"}, "cache.json was altered"),
        ({"hidden_size": 16}, "cache.json was altered"),
        ({"digest": None}, "cache.json was altered"),
        ({"key": {"format": 2}}, "cache.json was altered"),
        ({"key": {"format": 1}}, "is of format 1, and this version can only check format 2: name another fo"),
        ({"key": {}}, "is of format None, .* or remove it and it is computed again"),
        ({"key": "lst"}, "is of format None"),
    ],
)
def test_a_description_that_was_altered_or_is_of_an_old_format_is_refused(change, message, work, tmp_path):
    model = model_of(work, METHODS["weighted_sum"])
    prepare_cache(tmp_path / "c", model, work[3], [work[2][:2]], "exact", progress=False)
    altered(tmp_path / "c" / "cache.json", lambda about: about.update(change))
    before = sorted((tmp_path / "c").iterdir())
    with pytest.raises(UserError, match=message):
        prepare_cache(tmp_path / "c", model, work[3], [work[2][:2]], progress=False)
    assert sorted((tmp_path / "c").iterdir()) == before  # nothing is deleted


def test_shards_of_another_cache_are_refused(work, tmp_path):
    for name, max_frames in (("a", "longest"), ("b", 30)):
        model = model_of(work, METHODS["head"], max_frames)
        prepare_cache(tmp_path / name, model, work[3], [work[2]], progress=False)
    for path in (tmp_path / "a").glob("shard-*"):
        path.rename(tmp_path / "b" / path.name)
    with pytest.raises(UserError, match="belongs to another cache than .*b/cache.json describes: move it"):
        prepare_cache(tmp_path / "b", model, work[3], [work[2]], progress=False)


@pytest.mark.parametrize("to", ["cut", "longer", "gone", "empty"])
def test_a_shard_that_changes_while_it_is_trained_from_is_named(to, work, tmp_path):
    model = model_of(work, METHODS["head"])
    cache = prepare_cache(tmp_path / "c", model, work[3], [work[2]], "exact", progress=False)
    dataset = CachedDataset(work[2], cache, model)
    assert dataset[len(dataset) - 1]["hidden_states"].isfinite().all()
    (path,) = (tmp_path / "c").glob("shard-*.safetensors")
    size = path.stat().st_size
    if to == "gone":
        path.unlink()
    else:
        os.truncate(path, {"cut": size // 2, "longer": size + 1, "empty": 0}[to])
    with pytest.raises(UserError, match=rf"{path.name} is damaged \(.*\): start again, and damaged shards"):
        dataset[len(dataset) - 1]


def test_a_file_with_other_content_of_the_same_size_and_date_is_stale(work, tmp_path):
    audio = make_audio_folder(tmp_path / "audio", 2)
    examples = data.load_examples(str(audio))
    model = model_of(work, METHODS["head"])
    prepare_cache(tmp_path / "c", model, work[3], [examples], progress=False)
    path = audio / "low" / "low1.wav"
    about, content = path.stat(), bytearray(path.read_bytes())
    content[-100:] = bytes(100)
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(UserError, match=r"stale: .*low1.wav has"):
        prepare_cache(tmp_path / "c", model, work[3], [examples], progress=False)


def test_several_fills_at_once_compute_each_clip_once(work, tmp_path, monkeypatch):
    monkeypatch.setattr(cached_data, "SHARD_BYTES", 6000)
    monkeypatch.setattr(cached_data, "_WAIT_SECONDS", 0.01)
    write, written = FeatureCache.write, []

    def slowly(self, clips):
        time.sleep(0.05)
        written.extend(example.name for example, *_ in clips)
        write(self, clips)

    monkeypatch.setattr(FeatureCache, "write", slowly)
    models = [model_of(work, METHODS["head"]) for _ in range(3)]

    def fill(model):
        return len(prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(fill, models)) == [12, 12, 12]  # each waits for what the others compute
    assert sorted(written) == sorted(example.name for example in work[2])
    assert len(list((tmp_path / "c").glob("shard-*.json"))) > 3
    assert {path.name[:6] for path in (tmp_path / "c").iterdir()} == {"cache.", "shard-"}


def test_claims_of_killed_and_stalled_processes_are_free(work, tmp_path):
    FeatureCache.create(tmp_path / "c", key_of(work), (0,), 32)
    with Claims(tmp_path / "c") as ours, Claims(tmp_path / "c") as theirs:
        with theirs.locked():
            theirs.claim(["a", "b"])
        with ours.locked():
            assert ours.of_others() == [{"a", "b"}]
            os.utime(theirs.path, (1, 1))
            assert ours.of_others() == [set()]  # it lives, but does not get on
            theirs.touch()
            assert ours.of_others() == [{"a", "b"}]
            theirs._file.close()  # as a killed process leaves it
            assert ours.of_others() == [] and not theirs.path.exists()


def test_a_complete_cache_in_a_folder_that_cannot_be_written_serves(work, tmp_path, monkeypatch):
    model = model_of(work, METHODS["head"])
    prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False)
    monkeypatch.setattr(Claims, "__enter__", lambda self: self)  # what root's rights would hide
    cache = prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False)
    assert len(cache) == 12


def test_folders_that_are_no_cache(work, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        FeatureCache.create(tmp_path / "full", key_of(work), (0,), 32)
    with pytest.raises(UserError, match="holds no feature cache"):
        FeatureCache(tmp_path / "full")
    (tmp_path / "full" / "cache.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe"):
        FeatureCache(tmp_path / "full")


def test_a_changed_file_is_stale_and_a_new_one_is_added(work, tmp_path):
    audio = make_audio_folder(tmp_path / "audio", 2)
    examples = data.load_examples(str(audio))
    model = model_of(work, METHODS["lst"])
    cache = prepare_cache(tmp_path / "c", model, work[3], [examples[:4]], progress=False)
    with pytest.raises(UserError, match="lacks 2 of 6 clips .* the first is .*middle0.wav"):
        CachedDataset(examples, cache, model)
    cache = prepare_cache(tmp_path / "c", model, work[3], [examples], progress=False)
    assert len(cache) == 6
    path = audio / "low" / "low1.wav"
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=r"stale: .*low1.wav has another size, date or segment"):
        prepare_cache(tmp_path / "c", model, work[3], [examples], progress=False)


def test_clips_in_memory_are_told_apart_by_content(work, tmp_path):
    torch.manual_seed(0)
    waves = [
        {"array": np.random.default_rng(i).normal(size=8000) * 0.1, "sampling_rate": 16000} for i in (0, 1)
    ]
    examples = ExampleSet([Example(wave, name="same") for wave in waves])
    model = model_of(work, METHODS["lst"])
    cache = prepare_cache(tmp_path / "c", model, work[3], [examples], "exact", progress=False)
    first, second = (cache.read(cache.find(e), (0,)).states for e in examples)
    assert first.shape == second.shape and not torch.equal(first, second)


def test_what_the_samples_mean_tells_clips_apart_too():
    samples = np.arange(8, dtype=np.int32)
    clips = [
        {"array": samples, "sampling_rate": 16000},
        {"array": samples, "sampling_rate": 8000},
        {"array": samples.view(np.float32), "sampling_rate": 16000},
        {"array": samples.reshape(2, 4), "sampling_rate": 16000},
        {"bytes": samples.tobytes(), "path": None},
    ]
    prints = [clip_fingerprint(Example(clip, name="same")) for clip in clips]
    prints += [clip_fingerprint(Example(clips[0], name="same", start=1.0, stop=stop)) for stop in (2.0, None)]
    prints.append(clip_fingerprint(Example(clips[0], name="same", start=1.0, unit="samples")))
    assert len(set(prints)) == len(prints)
    again = Example({"array": samples.copy(), "sampling_rate": 16000}, "label", "speaker", "another")
    assert clip_fingerprint(again) == prints[0]
    # As it was said before: a word more, and every cache that is there is stale.
    assert prints[0].partition(", ")[2] == "None None seconds None at 16000 Hz int32 (8,)"


def test_audio_that_was_checked_when_it_was_cached_is_known(work, tmp_path):
    audio = make_audio_folder(tmp_path / "audio", 2)
    raw = data.load_examples(str(audio))
    examples, _ = data.check_audio(raw, progress=False)
    model = model_of(work, METHODS["lst"])
    cache = prepare_cache(tmp_path / "c", model, work[3], [examples[:4]], progress=False)
    read = []

    def checked(example):
        found = cache.checked(example)
        read.extend([example.name] if found is None else [])
        return found

    broken = audio / "low" / "low1.wav"  # has changed since, as has the first
    broken.write_bytes(b"")
    os.utime(audio / "high" / "high0.wav", (1, 1))
    good, bad = data.check_audio(raw, progress=False, checked=checked)
    assert [e.seconds for e in good] == [e.seconds for e in examples if e.name != str(broken)]
    assert [name for name, _ in bad] == [str(broken)]
    assert read == [examples[0].name, *(e.name for e in examples[3:])]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "index"])
def test_damaged_shards_are_found_and_computed_again(damage, work, tmp_path, monkeypatch):
    monkeypatch.setattr(cached_data, "SHARD_BYTES", 20_000)
    model = model_of(work, METHODS["lst"])
    whole = cached_batch(work, model, tmp_path / "c", "exact")
    cache = FeatureCache(tmp_path / "c")
    shards = sorted((tmp_path / "c").glob("shard-*.safetensors"))
    assert len(shards) > 3 and not cache.damaged()
    if damage == "cut":
        os.truncate(shards[1], shards[1].stat().st_size - 10)
    elif damage == "flip":
        content = bytearray(shards[1].read_bytes())
        content[-5] ^= 1
        shards[1].write_bytes(content)
    elif damage == "gone":
        shards[1].unlink()
    else:
        shards[1].with_suffix(".json").write_text('{"clips": [[1')
    assert FeatureCache(tmp_path / "c").damaged() == [shards[1].stem]
    said = []
    prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False, say=said.append)
    assert shards[1].stem in said[0] and not FeatureCache(tmp_path / "c").damaged()
    assert not shards[1].exists() and len(list((tmp_path / "c").glob("shard-*.json"))) == len(shards)
    again = cached_batch(work, model, tmp_path / "c", None)
    torch.testing.assert_close(again["hidden_states"], whole["hidden_states"], rtol=1e-5, atol=1e-5)


def test_an_interrupted_fill_keeps_its_shards(work, tmp_path, monkeypatch):
    monkeypatch.setattr(cached_data, "SHARD_BYTES", 20_000)
    model = model_of(work, METHODS["lst"])
    write, left = FeatureCache.write, [2]

    def interrupted(self, clips):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, clips)

    monkeypatch.setattr(FeatureCache, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False)
    done = len(FeatureCache(tmp_path / "c"))
    assert 0 < done < len(work[2])
    counted = []

    def counting(self, clips):
        counted.append(len(clips))
        write(self, clips)

    monkeypatch.setattr(FeatureCache, "write", counting)
    prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False)
    assert sum(counted) == len(work[2]) - done


LEFT = (
    ".shard-1-abc.safetensors",
    "shard-1.safetensors",
    ".shard-1-abc.json",
    ".cache-1.json",
    "..cache-1-2.json",
)


def test_what_killed_processes_left_is_removed_once_nobody_writes_it(work, tmp_path):
    cache = FeatureCache.create(tmp_path / "c", key_of(work), (0,), 32)
    paths = [tmp_path / "c" / name for name in LEFT]

    def left(alone, seconds):
        for path in paths:
            path.write_bytes(b"1")
            os.utime(path, (time.time() - seconds,) * 2)
        cache.remove_leftovers(alone)
        return [path.name for path in paths if path.exists()]

    assert left(False, 1800) == list(LEFT)
    assert left(False, 4000) == []
    assert left(True, 5) == [".cache-1.json", "..cache-1-2.json"]  # of a process that has just begun
    assert left(True, 100) == [] and (tmp_path / "c" / "cache.json").exists()


def test_filling_sweeps_what_a_killed_process_left(work, tmp_path):
    model = model_of(work, METHODS["head"])
    prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False)
    whole = sorted(path.name for path in (tmp_path / "c").iterdir())
    for name in (*LEFT[:3], ".claim-1.json"):  # nobody holds that claim
        (tmp_path / "c" / name).write_text("[]")
    prepare_cache(tmp_path / "c", model, work[3], [work[2]], progress=False)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == whole


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(work, tmp_path, monkeypatch):
    assert "GiB are free" in check_disk(tmp_path / "a" / "b", 1)
    with pytest.raises(UserError, match="needs .* GiB are free: name a folder on another disk"):
        check_disk(tmp_path, 2**60)
    monkeypatch.setattr(
        "whisper_meft.feature_cache.filling.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})
    )
    with pytest.raises(UserError, match="GiB are free"):
        prepare_cache(tmp_path / "c", model_of(work, METHODS["lst"]), work[3], [work[2]], progress=False)
    assert not list((tmp_path / "c").glob("shard-*"))


def test_a_part_holds_what_fits_and_at_least_one():
    assert first_part([7, 3, 9], [5, 5, 5], 12) == [7, 3]
    assert first_part([7, 3], [30, 1], 12) == [7]
    assert first_part([], [], 12) == []


def test_workers_read_the_cache(work, tmp_path):
    model = model_of(work, METHODS["lst"])
    cache = prepare_cache(tmp_path / "c", model, work[3], [work[2]], "int8", num_workers=1, progress=False)
    dataset = CachedDataset(work[2], cache, model, work[4])
    dataset[0]  # opens a shard before the fork
    collator = pickle.loads(pickle.dumps(CachedCollator()))
    loader = torch.utils.data.DataLoader(dataset, 5, collate_fn=collator, num_workers=2)
    copied = pickle.loads(pickle.dumps(dataset))  # what a spawned worker gets
    for batch, start in zip(loader, (0, 5, 10), strict=True):
        alone = collator([copied[i] for i in range(start, min(start + 5, 12))])
        for name, value in alone.items():
            assert torch.equal(batch[name], value), name


def test_wrong_hidden_states_are_named(work, tmp_path):
    model = model_of(work, METHODS["lst"])
    states, lengths = torch.randn(2, 4, 10, 32), torch.tensor([10, 4])
    features = torch.randn(2, 80, 20)
    cases = [
        ({}, "one of input_features and hidden_states"),
        ({"input_features": features, "hidden_states": states}, "and not both"),
        ({"hidden_states": states[:, :3], "hidden_state_lengths": lengths}, "the layers 0, 1, 2, 3"),
        ({"hidden_states": states[0], "hidden_state_lengths": lengths}, "floating-point tensor of shape"),
        ({"hidden_states": states.long(), "hidden_state_lengths": lengths}, "torch.int64"),
        ({"hidden_states": states, "hidden_state_lengths": lengths[:1]}, "hidden_state_lengths must be 2"),
        ({"hidden_states": states}, "whole window"),
        (
            {
                "hidden_states": states,
                "hidden_state_lengths": lengths,
                "hidden_state_statistics": torch.ones(2, 4, 9, 2),
            },
            "hidden_state_statistics must have shape",
        ),
        (
            {
                "hidden_states": states.to(torch.float8_e4m3fn),
                "hidden_state_lengths": lengths,
                "hidden_state_statistics": torch.ones(2, 4, 10, 2),
            },
            "hidden_state_scales are needed for hidden_states of 8 bits",
        ),
        (
            {
                "hidden_states": states.to(torch.int8),
                "hidden_state_lengths": lengths,
                "hidden_state_statistics": torch.ones(2, 4, 10, 2),
            },
            "hidden_state_scales are needed for hidden_states of 8 bits, got torch.int8",
        ),
        (
            {
                "hidden_states": states,
                "hidden_state_lengths": lengths,
                "hidden_state_scales": torch.ones(2, 4, 2, 32),
            },
            "hidden_state_scales only go with hidden_states of 8 bits, got torch.float32",
        ),
        (
            {
                "hidden_states": states.to(torch.float8_e4m3fn),
                "hidden_state_lengths": lengths,
                "hidden_state_scales": torch.ones(2, 4, 2, 32),
            },
            "and hidden_state_statistics, got no hidden_state_statistics",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            model(**arguments)
    from whisper_meft import BitFitConfig

    trained = model_of(work, BitFitConfig())
    with pytest.raises(UserError, match="bitfit, which trains inside the encoder"):
        trained(hidden_states=states, hidden_state_lengths=lengths)


def test_dither_is_refused(work):
    extractor = WhisperFeatureExtractor.from_pretrained(work[0], dither=0.1)
    with pytest.raises(UserError, match="dither"):
        cache_key(model_of(work, METHODS["lst"]).encoder, extractor, "longest")


# --- the command line


def losses(folder: Path) -> list[float]:
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    history = json.loads(states[-1].read_text())["log_history"]
    return [entry[k] for entry in history for k in ("loss", "eval_loss") if k in entry]


@pytest.mark.parametrize(("method", "max_frames"), [("lst", "longest"), ("sherl", "fidelity")])
def test_training_from_a_cache_gives_the_same_losses(method, max_frames, work, tmp_path, capsys):
    options = {"method": method, "max_frames": max_frames, "num_train_epochs": 2, "logging_steps": 1}
    assert cli.main(train_command(work[0], work[1], tmp_path / "online", **options)) == 0
    options |= {"cache_features": tmp_path / "cache", "cache_storage": "exact"}
    assert cli.main(train_command(work[0], work[1], tmp_path / "cached", **options)) == 0
    said = capsys.readouterr().out
    assert "clips are missing" in said and "GiB are free" in said
    expected, found = losses(tmp_path / "online"), losses(tmp_path / "cached")
    assert len(expected) > 4
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    results = json.loads((tmp_path / "cached" / "train_results.json").read_text())
    assert results["feature_cache"] == str(tmp_path / "cache")


def test_the_cache_command_then_training_computes_nothing(work, tmp_path, capsys, monkeypatch):
    cache = ["cache", f"--model_name_or_path={work[0]}", f"--train_data={work[1]}", "--disable_tqdm=True"]
    cache += ["--max_frames=longest", f"--output_dir={tmp_path / 'c'}"]
    assert cli.main(cache) == 0
    first = capsys.readouterr().out
    assert "are missing, as bfloat16 they take" in first and "12 clips" in first
    assert cli.main(cache) == 0
    assert "are missing" not in capsys.readouterr().out

    def refused(*_):
        raise AssertionError("the backbone was run")

    monkeypatch.setattr(cached_data._Filler, "_compute", refused)
    monkeypatch.setattr(data.SpeechDataset, "__getitem__", refused)
    monkeypatch.setattr(Example, "read", refused)  # nor is the audio checked again
    options = {"max_frames": "longest", "cache_features": tmp_path / "c", "num_train_epochs": 1}
    assert cli.main(train_command(work[0], work[1], tmp_path / "out", **options)) == 0
    assert cli.main([*cache, "--max_frames=20"]) == 1
    assert "stale: max_frames was longest, now it is 20" in capsys.readouterr().err


def test_the_cache_is_in_output_dir_when_no_folder_is_named(work, tmp_path, capsys):
    command = train_command(work[0], work[1], tmp_path / "out", num_train_epochs=1, max_frames="longest")
    assert cli.main([*command, "--cache_features"]) == 0
    assert len(FeatureCache(tmp_path / "out" / "feature_cache")) == 12


def test_methods_that_train_the_encoder_are_refused_before_the_data_is_read(work, tmp_path, capsys):
    command = train_command(
        work[0], tmp_path / "none", tmp_path / "out", method="bitfit", reduction_factor=None
    )
    assert cli.main([*command, f"--cache_features={tmp_path / 'c'}"]) == 1
    assert "bitfit" in capsys.readouterr().err and not (tmp_path / "c").exists()


@pytest.mark.parametrize("command", ["cache", "train"])
def test_a_place_that_cannot_be_a_cache_is_refused_before_the_data_is_read(command, work, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for name, reason in (
        ("file", "is a file, and a feature cache is a folder"),
        ("file/below", "is not a folder"),
        ("full", "is not empty and holds no feature cache"),
    ):
        place = tmp_path / name
        more = [f"--output_dir={place}"]
        if command == "train":
            more = [f"--output_dir={tmp_path / 'out'}", f"--cache_features={place}"]
        given = [f"--model_name_or_path={work[0]}", "--train_data=nowhere", "--reduction_factor=2"]
        assert cli.main([command, *given, *more]) == 1
        error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(error) == 1 and str(place) in error[0] and reason in error[0]
    assert sorted(each.name for each in tmp_path.rglob("*") if each.is_file()) == ["file", "mine"]


def test_two_processes_fill_one_cache(work, tmp_path):
    command = ["-m", "whisper_meft", "cache", f"--model_name_or_path={work[0]}"]
    command += [f"--train_data={work[1]}", f"--output_dir={tmp_path / 'c'}", "--disable_tqdm=True"]
    with Running(*command) as one, Running(*command) as other:
        for each in (one, other):
            assert each.wait() == 0, each.stderr
    cache = FeatureCache(tmp_path / "c")
    assert len(cache) == 12 and not cache.damaged()
    assert {path.name[:6] for path in (tmp_path / "c").iterdir()} == {"cache.", "shard-"}
    for path in (tmp_path / "c").glob("shard-*.safetensors"):
        with safe_open(path, "pt") as file:
            assert len(list(file.keys())) >= 2
