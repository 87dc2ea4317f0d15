"""Sets of examples and their rules, checking audio before training, log-mel items and batches."""

import logging
import math
import os
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor
from whisper_meft.data import (
    Collator,
    Example,
    ExampleSet,
    SpeechDataset,
    check_audio,
    check_feature_extractor,
    check_known_labels,
    describe_bad,
    label_inventory,
    load_examples,
    log_mel,
    split_by_speaker,
    true_frames,
    warn_on_shared_audio,
    warn_on_shared_speakers,
)
from whisper_meft.data.examples import sort_labels
from whisper_meft.errors import UserError

RATE = 16_000
LABELS = {"a": 0, "b": 1}


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(RATE * seconds))).astype(np.float32)


def write(path, seconds: float = 0.5, seed: int = 0, rate: int = RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds * rate / RATE, seed), rate)
    return path


def extractor(seconds: float = 2, mels: int = 80, **more) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds, **more)


def make_set(rows: str, description: str = "some data") -> ExampleSet:
    """Examples from words "label:speaker"; an empty part is unknown."""
    examples = []
    for i, row in enumerate(rows.split()):
        label, speaker = row.split(":")
        examples.append(Example(f"{description}/{i}.wav", label or None, speaker or None))
    return ExampleSet(examples, description)


# --- sets ---


def test_example_set_is_a_sequence():
    examples = make_set("a:s1 b:s2 a:")
    assert len(examples) == 3 and examples[-1].label == "a"
    part = examples[1:]
    assert isinstance(part, ExampleSet) and [e.label for e in part] == ["b", "a"]
    assert part.description == "some data"
    assert [e.name for e in examples.select([2, 0])] == ["some data/2.wav", "some data/0.wav"]
    assert examples.label_counts() == {"a": 2, "b": 1} and examples.speakers() == {"s1", "s2"}
    assert pickle.loads(pickle.dumps(examples)).examples == examples.examples


def test_example_names():
    assert Example("x/a.wav").name == "x/a.wav"
    assert Example("a.wav", start=1.5).name == "a.wav [1.5 to end s]"
    assert Example("a.wav", start=0, stop=800, unit="samples").name == "a.wav [0 to 800 samples]"
    assert Example(b"", name="given").name == "given"


def test_labels_written_in_two_ways_are_one():
    examples = ExampleSet([Example("1.wav", "e\u0301te\u0301"), Example("2.wav", "\xe9t\xe9")])
    assert examples.label_counts() == {"\xe9t\xe9": 2}


def test_label_inventory_is_sorted_and_from_train_only():
    assert label_inventory(make_set("b: ä: a: b: Z:")) == ["Z", "a", "b", "ä"]
    assert label_inventory(make_set("10: 9: 2:")) == ["2", "9", "10"]
    assert sort_labels(["10", "9", "x"]) == ["10", "9", "x"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ("", "some data holds no examples"),
        ("a: a:s", r"one label only \(a\); training needs at least two classes"),
        ("a: :s b:", "1 of 3 examples of some data have no label: some data/1.wav"),
    ],
)
def test_sets_that_cannot_train(rows, message):
    with pytest.raises(UserError, match=message):
        label_inventory(make_set(rows))


def test_labels_that_train_has_not():
    check_known_labels(make_set("a: b:"), ["a", "b", "c"])
    with pytest.raises(UserError, match=r"not: c \(2 examples\), d \(1 examples\); known are a, b$"):
        check_known_labels(make_set("a: c: d: c:"), ["a", "b"])


def test_shared_speakers_are_warned_about(caplog):
    train, evaluation = make_set("a:s1 b:s2 a:", "train"), make_set("a:s2 b:s3 b:s2 a:", "test")
    assert warn_on_shared_speakers(train, evaluation) == ["s2"]
    assert "1 of 2 speakers of test are also in train (s2): 50 %" in caplog.text
    caplog.clear()
    assert warn_on_shared_speakers(train, make_set("a:s3 a:")) == []
    assert not caplog.records


@pytest.mark.parametrize("there, here", [("007", "7"), ("7.0", "7"), ("7", "007"), ("0", "0.0")])
def test_speakers_that_are_numbers_are_compared_as_such(there, here, caplog):
    train, evaluation = make_set(f"a:{there} b:x", "train"), make_set(f"a:{here} b:70", "test")
    assert warn_on_shared_speakers(train, evaluation) == [here]
    assert f"1 of 2 speakers of test are also in train ({here}): 50 %" in caplog.text
    assert warn_on_shared_speakers(train, make_set("a:7.5 b:x7 a:")) == []


def test_shared_audio_is_warned_about(caplog):
    train = ExampleSet([Example("a.wav"), Example("b.wav", start=0, stop=1)], "train")
    evaluation = ExampleSet([Example("b.wav", start=1, stop=2), Example("a.wav")], "test")
    assert warn_on_shared_audio(train, evaluation) == ["a.wav"]
    assert "1 utterances of test are also in train: a.wav" in caplog.text


def test_shared_audio_is_found_however_its_path_is_written(tmp_path, monkeypatch, caplog):
    clip = write(tmp_path / "corpus" / "a" / "0.wav")
    (tmp_path / "folder").symlink_to(tmp_path / "corpus")
    (tmp_path / "file.wav").symlink_to(clip)
    monkeypatch.chdir(tmp_path / "corpus")
    train = ExampleSet([Example("a/0.wav"), Example("a/1.wav", start=1, stop=2, channel=0)], "train")
    for same in (str(clip), clip, "./a/0.wav", "../corpus/a/0.wav", "../folder/a/0.wav", "../file.wav"):
        evaluation = ExampleSet([Example(same), Example("b/0.wav")], "test")
        assert warn_on_shared_audio(train, evaluation) == [str(same)]
    written = [
        Example("./a/0.wav", start=0, unit="samples"),
        Example("./a/1.wav", start=1, stop=2, channel=0),
    ]
    assert len(warn_on_shared_audio(train, ExampleSet(written))) == 2
    caplog.clear()
    other = [Example("./a/1.wav", start=1, stop=2, channel=1), Example("0.wav"), Example("a/0.flac")]
    assert warn_on_shared_audio(train, ExampleSet(other)) == [] and not caplog.text


@pytest.mark.parametrize(
    "first, second, overlap",
    [
        ((0, 2), (1, 3), True),
        ((0, 1), (1, 2), False),
        ((0, 0.1 + 0.2), (0.3, 1), False),  # 0.30000000000000004
        ((0, 9), (3, 4), True),
        ((3, None), (0, 4), True),
        ((3, None), (0, 3), False),
        ((None, None), (16000, 32000, "samples"), True),
        ((0, 32000, "samples"), (16000, 48000, "samples"), True),
        ((1, 3, "seconds", 0), (1, 2, "seconds", 1), False),
        ((1, 3, "seconds", 1), (1, 2, "seconds", 1), True),
        ((1, 3, "seconds", 1), (1, 2), True),
        ((1, 3), (1, 2, "seconds", 1), True),
    ],
)
def test_segments_that_overlap_are_warned_about(first, second, overlap, caplog):
    def part(path, start, stop, unit="seconds", channel=None):
        return Example(path, start=start, stop=stop, unit=unit, channel=channel)

    near = [part("x.wav", 100 * i + 50, 100 * i + 60) for i in range(9) if None not in (*first, *second)]
    for one, other in ((first, second), (second, first)):
        caplog.clear()
        train = ExampleSet([*near[:5], part("./x.wav", *one), *near[5:]], "train")
        test = ExampleSet([part("x.wav", *other), part("y.wav", *other)], "test")
        assert warn_on_shared_audio(train, test) == [test[0].name] * overlap
        assert ("1 utterances of test overlap in time with recordings in train" in caplog.text) == overlap


def many(labels: int, speakers: int, clips: int) -> ExampleSet:
    return make_set(
        " ".join(
            f"l{label}:l{label}s{s}" for label in range(labels) for s in range(speakers) for _ in range(clips)
        )
    )


def test_split_by_speaker_keeps_speakers_apart_and_labels_balanced(caplog):
    examples = many(labels=3, speakers=10, clips=7)
    train, validation = split_by_speaker(examples, 0.2, seed=1)
    assert not train.speakers() & validation.speakers()
    assert sorted(e.name for e in (*train, *validation)) == sorted(e.name for e in examples)
    assert validation.label_counts() == {"l0": 14, "l1": 14, "l2": 14}
    assert train.description == "training part of some data"
    again = split_by_speaker(examples, 0.2, seed=1)
    assert [e.name for e in again[1]] == [e.name for e in validation]
    other = split_by_speaker(examples, 0.2, seed=2)[1]
    assert other.speakers() != validation.speakers()
    assert not caplog.records


def test_split_without_speakers_is_stratified_and_says_so(caplog):
    train, validation = split_by_speaker(make_set("a: " * 20 + "b: " * 10), 0.2)
    assert validation.label_counts() == {"a": 4, "b": 2} and len(train) == 24
    assert "names no speakers" in caplog.text


def test_split_with_some_speakers(caplog):
    examples = make_set("a:s1 a:s1 a:s1 a: a: b:s2 b: b: b:s2")
    train, validation = split_by_speaker(examples, 0.3)
    assert not train.speakers() & validation.speakers()
    assert set(train.label_counts()) == set(validation.label_counts()) == {"a", "b"}
    assert "4 of 9 examples of some data have no speaker" in caplog.text


def test_segments_of_unknown_speakers_stay_together_by_recording(caplog):
    examples = ExampleSet(
        Example(path, label, start=start, stop=start + 1, channel=channel)
        for start in range(5)
        for label in "ab"
        for path, channel in ((f"{label}/1.wav", None), (f"./{label}/2.wav", 0), (f"{label}/2.wav", 1))
    )
    train, validation = split_by_speaker(examples, 0.3)

    def recordings(part):
        return {(os.path.normpath(example.audio), example.channel) for example in part}

    assert not recordings(train) & recordings(validation)
    assert train.label_counts() == {"a": 10, "b": 10} and validation.label_counts() == {"a": 5, "b": 5}
    assert "no label of" not in caplog.text
    # One recording of each label has nothing to spare but its segments.
    train, validation = split_by_speaker(ExampleSet(e for e in examples if "1" in e.audio), 0.2)
    assert train.label_counts() == {"a": 4, "b": 4} and validation.label_counts() == {"a": 1, "b": 1}
    assert "training and validation hold the same recordings" in caplog.text
    with pytest.raises(UserError, match="a single speaker .or recording"):
        split_by_speaker(ExampleSet(e for e in examples if "1" in e.audio and e.start == 0))
    with pytest.raises(UserError, match="a single speaker"):
        split_by_speaker(ExampleSet(replace(e, speaker=e.label) for e in examples))


def test_split_leaves_a_label_of_one_speaker_in_train(caplog):
    train, validation = split_by_speaker(make_set("a:s1 a:s2 a:s3 b:s4 b:s4"), 0.3)
    assert validation.label_counts() == {"a": 1} and train.label_counts() == {"a": 2, "b": 2}
    assert "not in the validation set: b" in caplog.text
    with pytest.raises(UserError, match="every label has a single speaker"):
        split_by_speaker(make_set("a:s1 b:s2 a:s1 b:s2"))


def test_split_of_uneven_speakers_takes_a_small_one():
    examples = make_set("a:big " * 90 + "a:small " * 10 + "b:x b:y")
    validation = split_by_speaker(examples, 0.1)[1]
    assert "small" in validation.speakers() and "big" not in validation.speakers()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_fraction(fraction):
    with pytest.raises(UserError, match="between 0 and 1"):
        split_by_speaker(many(2, 2, 1), fraction)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["s1", "s2", "s3", "s4", None])), min_size=1
    ),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_split_invariants(rows, fraction, seed):
    logging.disable(logging.WARNING)
    try:
        examples = ExampleSet(Example(f"{i}.wav", label, speaker) for i, (label, speaker) in enumerate(rows))
        train, validation = split_by_speaker(examples, fraction, seed)
    except UserError:
        return
    finally:
        logging.disable(logging.NOTSET)
    assert len(validation) and len(train) + len(validation) == len(rows)
    assert not train.speakers() & validation.speakers()
    assert set(train.label_counts()) == set(examples.label_counts())


# --- checking audio ---


@pytest.fixture
def mixed(tmp_path):
    """Two good clips and three bad ones."""
    write(tmp_path / "a" / "good.wav", 0.5)
    write(tmp_path / "b" / "good.flac", 0.25, rate=8_000)
    (tmp_path / "a" / "empty.wav").write_bytes(b"")
    (tmp_path / "b" / "text.mp3").write_text("not audio at all")
    whole = write(tmp_path / "b" / "half.wav").read_bytes()
    (tmp_path / "b" / "half.wav").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 3])
def test_check_audio_sets_bad_files_aside(mixed, workers):
    examples = load_examples(mixed)
    good, bad = check_audio(examples, num_workers=workers, progress=False)
    assert [(e.label, e.seconds) for e in good] == [("a", 0.5), ("b", 0.25)]
    assert good.description == examples.description
    assert [name for name, _ in bad] == [
        str(mixed / "a" / "empty.wav"),
        str(mixed / "b" / "half.wav"),
        str(mixed / "b" / "text.mp3"),
    ]
    assert bad[0][1] == "is empty (0 bytes)" and bad[1][1].startswith("is truncated")
    report = describe_bad(bad, len(examples))
    assert report.splitlines()[0].startswith("3 of 5 examples") and f"{bad[2][0]}: cannot be read" in report


@pytest.mark.parametrize("workers", [0, 3])
def test_check_audio_strict(mixed, workers):
    with pytest.raises(UserError, match=r"empty\.wav is empty"):
        check_audio(load_examples(mixed), strict=True, num_workers=workers, progress=False)


def test_check_audio_shows_progress(mixed, capsys):
    check_audio(load_examples(mixed))
    assert "checking audio: 100%" in capsys.readouterr().err


def test_check_audio_with_nothing_left(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 examples .* can be used; .*x.wav: is empty"):
        check_audio(load_examples(tmp_path), progress=False)
    with pytest.raises(UserError, match="holds no examples"):
        check_audio(ExampleSet([]), progress=False)


def test_check_audio_of_features():
    rows = np.zeros((3, 4, 6), np.float32)
    rows[1, 0, 0] = np.nan
    data = Dataset.from_dict({"input_features": list(rows), "labels": [0, 1, 1]})
    good, bad = check_audio(load_examples(data), progress=False)
    assert len(good) == 2 and "not finite" in bad[0][1] and "row 1" in bad[0][0]


# --- log-mel ---


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 161, 320, 4_321, 16_000, 31_599, 31_600, 31_999, 32_000])
@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_whispers_own(samples, mels):
    wave = noise(2)[:samples]
    made = extractor(mels=mels)
    whole = made(wave, sampling_rate=RATE, return_tensors="np", return_attention_mask=True)
    expected = whole["input_features"][0]
    assert np.allclose(log_mel(wave, made, full_window=True), expected, atol=1e-5)
    trimmed = log_mel(wave, made)
    assert trimmed.shape == (mels, math.ceil(samples / 160)) == (mels, whole["attention_mask"].sum())
    assert np.allclose(trimmed, expected[:, : trimmed.shape[1]], atol=1e-5)


def test_log_mel_of_silence_and_with_dither():
    assert np.array_equal(log_mel(np.zeros(1_000, np.float32), extractor(), True), np.full((80, 200), -1.5))
    dithered = log_mel(np.zeros(1_000, np.float32), extractor(dither=0.01), True)
    assert dithered[:, -1].std() > 0  # silence is not constant then


def test_true_frames():
    made = extractor()
    for samples in (800, 4_321, 16_000, 31_000):
        mel = made(noise(2)[:samples], sampling_rate=RATE, return_tensors="np")["input_features"][0]
        assert 0 <= true_frames(mel) - math.ceil(samples / 160) <= 2
    full = made(noise(2), sampling_rate=RATE, return_tensors="np")["input_features"][0]
    assert true_frames(full) == 200
    assert true_frames(np.full((80, 50), -1.13, np.float32)) == 1


# --- items ---


@pytest.fixture
def clips(tmp_path):
    write(tmp_path / "a" / "1.wav", 0.5, 1)
    write(tmp_path / "a" / "2.wav", 1.25, 2, rate=8_000)
    write(tmp_path / "b" / "3.flac", 0.123, 3)
    return load_examples(tmp_path)


def test_items_in_fidelity_mode(clips):
    made = extractor()
    items = list(SpeechDataset(clips, made, LABELS))
    for example, item, label in zip(clips, items, (0, 0, 1)):
        wave = soundfile.read(example.audio, dtype="float32")[0]
        assert item["labels"] == label and item["input_features"].shape == (80, 200)
        assert item["input_features"].dtype == torch.float32 and item["attention_mask"].dtype == torch.int64
        if "2.wav" not in example.name:
            expected = made(wave, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
            assert torch.allclose(item["input_features"], expected["input_features"][0], atol=1e-4)
            assert torch.equal(item["attention_mask"], expected["attention_mask"][0].long())
    assert [item["length"] for item in items] == [25, 63, 7]


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("more, told", [(1 / RATE, False), (0.009, False), (0.02, True)])
def test_less_than_a_frame_over_the_window_is_not_told(more, told, checked, tmp_path, caplog):
    examples = ExampleSet([Example(write(tmp_path / "0.wav", 2.0 + more), "a")], "data")
    if checked:
        examples = check_audio(examples, progress=False)[0]
    item = SpeechDataset(examples, extractor(), LABELS)[0]
    assert item["length"] == 100 and bool(caplog.records) == told


@pytest.mark.parametrize("max_frames", ["longest", 40])
def test_trimmed_items_are_the_clip_alone(clips, max_frames):
    made = extractor()
    full = SpeechDataset(clips, made, LABELS)
    trimmed = SpeechDataset(clips, made, LABELS, max_frames)
    for i, seconds in enumerate((0.5, 1.25, 0.123)):
        item = trimmed[i]
        frames = min(math.ceil(seconds * 100), 80 if max_frames == 40 else 200)
        assert (
            item["input_features"].shape == (80, frames) and item["attention_mask"].tolist() == [1] * frames
        )
        assert item["length"] == math.ceil(frames / 2)
        if max_frames == "longest":
            assert torch.allclose(item["input_features"], full[i]["input_features"][:, :frames], atol=1e-5)


def test_a_long_clip_is_cut_to_the_window_and_told_once(tmp_path, caplog):
    paths = [write(tmp_path / f"{i}.wav", 3.0, i) for i in range(3)]
    examples = ExampleSet([Example(p, "a") for p in paths], "long data")
    data = SpeechDataset(examples, extractor(), LABELS)
    items = [data[i] for i in range(3)]
    assert len(caplog.records) == 1 and "0.wav is longer than 2.0 s" in caplog.text
    start = SpeechDataset(ExampleSet([Example(paths[0], "a", stop=2.0)]), extractor(), LABELS)[0]
    assert torch.equal(items[0]["input_features"], start["input_features"]) and items[0]["length"] == 100
    caplog.clear()
    checked = check_audio(examples, progress=False)[0]
    data = SpeechDataset(checked, extractor(), LABELS)
    assert len(caplog.records) == 1 and "3 of 3 clips of long data are longer than 2.0 s" in caplog.text
    data[0]
    assert len(caplog.records) == 1
    assert data.lengths == [100] * 3
    assert SpeechDataset(checked, extractor(), LABELS, 20).lengths == [20] * 3
    assert SpeechDataset(examples, extractor(), LABELS).lengths is None


def test_a_long_clip_is_not_decoded_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "long.wav", 30.0)
    frames = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda *args, **kwargs: frames.append(len(b := read(*args, **kwargs))) or b,
    )
    SpeechDataset(ExampleSet([Example(path, "a")]), extractor(), LABELS)[0]
    assert sum(frames) < 2.2 * RATE


def test_segments_become_items(tmp_path):
    path = write(tmp_path / "x.wav", 1.5)
    whole = soundfile.read(path, dtype="float32")[0]
    for unit, start, stop in (("seconds", 0.5, 1.0), ("samples", 8_000, 16_000)):
        example = Example(path, "b", start=start, stop=stop, unit=unit)
        item = SpeechDataset(ExampleSet([example]), extractor(), LABELS, "longest")[0]
        assert np.allclose(item["input_features"], log_mel(whole[8_000:16_000], extractor()), atol=1e-6)


def test_items_without_labels(clips):
    unlabelled = ExampleSet([Example(clips[0].audio)])
    assert "labels" not in SpeechDataset(unlabelled, extractor())[0]
    with pytest.raises(UserError, match="have no label"):
        SpeechDataset(unlabelled, extractor(), LABELS)
    with pytest.raises(UserError, match="labels that the training data has not: b"):
        SpeechDataset(clips, extractor(), {"a": 0})
    with pytest.raises(UserError, match="holds no examples"):
        SpeechDataset(ExampleSet([]), extractor())


def test_a_file_that_breaks_after_the_check_is_named(clips):
    checked = check_audio(clips, progress=False)[0]
    data = SpeechDataset(checked, extractor(), LABELS)
    with open(clips[0].audio, "wb") as file:
        file.write(b"RIFF")
    with pytest.raises(UserError, match="1.wav cannot be read as audio"):
        data[0]


@pytest.mark.parametrize("value", ["full", "Longest", 0, -1, 101, 1.5, True, None])
def test_max_frames_out_of_range(clips, value):
    with pytest.raises(UserError, match="max_frames must be .* integer from 1 to 100"):
        SpeechDataset(clips, extractor(), LABELS, value)


def test_precomputed_features_become_items(caplog):
    made = extractor()
    waves = [noise(0.5, 1), noise(1.0, 2)]
    features = [made(w, sampling_rate=RATE, return_tensors="np")["input_features"][0] for w in waves]
    examples = load_examples(Dataset.from_dict({"input_features": features, "labels": [0, 1]}))
    ids = {"0": 0, "1": 1}
    full = SpeechDataset(examples, made, ids)[0]
    assert np.array_equal(full["input_features"], features[0]) and 50 <= full["attention_mask"].sum() <= 52
    trimmed = SpeechDataset(examples, made, ids, "longest")[1]
    frames = trimmed["input_features"].shape[1]
    assert 100 <= frames <= 102 and np.array_equal(trimmed["input_features"], features[1][:, :frames])
    cut = SpeechDataset(examples, made, ids, 30)[1]
    assert cut["input_features"].shape == (80, 60) and "longer than 0.6 s" in caplog.text


def test_short_precomputed_features_are_padded_as_whisper_pads():
    made = extractor()
    expected = made(noise(0.5), sampling_rate=RATE, return_tensors="np")["input_features"][0]
    data = Dataset.from_dict({"input_features": [expected[:, :60]], "labels": [0]})
    item = SpeechDataset(load_examples(data), made, {"0": 0})[0]
    assert np.allclose(item["input_features"], expected, atol=1e-6)


def test_precomputed_features_of_another_size():
    data = Dataset.from_dict({"input_features": [np.zeros((80, 10), np.float32)], "labels": [0]})
    with pytest.raises(UserError, match=r"row 0 .* shape \(80, 10\), 128 mel bins are expected"):
        SpeechDataset(load_examples(data), extractor(mels=128), {"0": 0})[0]


@pytest.mark.parametrize(
    "bins, positions, max_frames, message",
    [
        (128, 100, "fidelity", "makes 80 mel bins, the model reads 128"),
        (80, 1500, "fidelity", "makes 200 mel frames .chunk_length 2 s., the encoder reads 3000"),
        (80, 50, "longest", "allows 100 encoder frames, the encoder has 50 positions"),
        (80, 50, 60, "allows 60 encoder frames, the encoder has 50 positions"),
        (80, 100, 101, "integer from 1 to 100"),
    ],
)
def test_feature_extractor_of_another_model(bins, positions, max_frames, message):
    config = SimpleNamespace(num_mel_bins=bins, max_source_positions=positions)
    with pytest.raises(UserError, match=message):
        check_feature_extractor(extractor(), config, max_frames)


@pytest.mark.parametrize(
    "max_frames, positions", [("fidelity", 100), ("longest", 100), ("longest", 1500), (60, 80)]
)
def test_feature_extractor_that_fits(max_frames, positions):
    config = SimpleNamespace(num_mel_bins=80, max_source_positions=positions)
    check_feature_extractor(extractor(), config, max_frames)


# --- batches ---


@pytest.mark.parametrize("max_frames, frames", [("fidelity", 200), ("longest", 126), (40, 80), (70, 126)])
def test_batches(clips, max_frames, frames):
    made = extractor()
    data = SpeechDataset(clips, made, LABELS, max_frames)
    batch = Collator(made, max_frames)([data[0], data[1], data[2]])
    assert set(batch) == {"input_features", "attention_mask", "labels"}
    assert batch["input_features"].shape == (3, 80, frames) and batch["attention_mask"].shape == (3, frames)
    assert batch["labels"].tolist() == [0, 0, 1] and batch["labels"].dtype == torch.int64
    lengths = (batch["attention_mask"].sum(1) + 1) // 2
    assert lengths.tolist() == [data[i]["length"] for i in range(3)]
    if max_frames != "fidelity":
        padding = batch["attention_mask"][:, None] == 0
        assert not batch["input_features"].masked_select(padding).any()


def test_longest_rounds_up_to_whole_encoder_frames(clips):
    made = extractor()
    item = SpeechDataset(clips, made, LABELS, "longest")[2]
    assert item["input_features"].shape[1] == 13
    assert Collator(made, "longest")([item])["input_features"].shape[2] == 14


def test_batches_without_labels_and_of_two_minds(clips):
    made = extractor()
    item = SpeechDataset(clips, made)[0]
    assert set(Collator(made)([item])) == {"input_features", "attention_mask"}
    with pytest.raises(UserError, match="200 mel frames and max_frames=40 of the collator allows 80"):
        Collator(made, 40)([item])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loading_with_workers(clips, context):
    made = extractor()
    data = SpeechDataset(clips, made, LABELS, "longest")
    one = next(iter(torch.utils.data.DataLoader(data, 3, collate_fn=Collator(made, "longest"))))
    loader = torch.utils.data.DataLoader(
        data, 3, collate_fn=Collator(made, "longest"), num_workers=1, multiprocessing_context=context
    )
    for key, value in next(iter(loader)).items():
        assert torch.allclose(value.float(), one[key].float(), atol=1e-5)


def test_an_error_in_a_worker_names_the_file(clips):
    with open(clips[0].audio, "wb"):
        pass
    loader = torch.utils.data.DataLoader(
        SpeechDataset(clips, extractor(), LABELS), 3, collate_fn=Collator(extractor()), num_workers=1
    )
    with pytest.raises(UserError, match=r"1\.wav is empty"):
        next(iter(loader))


def test_a_full_window_of_30_seconds(tmp_path):
    made = WhisperFeatureExtractor()
    examples = ExampleSet([Example(write(tmp_path / "x.wav", 1.0), "a")])
    item = SpeechDataset(examples, made, LABELS)[0]
    expected = made(
        soundfile.read(examples[0].audio, dtype="float32")[0], sampling_rate=RATE, return_tensors="pt"
    )
    assert item["input_features"].shape == (80, 3000) and item["length"] == 50
    assert torch.allclose(item["input_features"], expected["input_features"][0], atol=1e-5)
