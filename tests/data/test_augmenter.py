"""What is drawn for which clip, the recordings that are mixed in, and augmented sets of examples."""

import logging
import pickle

import numpy as np
import pytest
import soundfile
import torch
from recogniser_fixtures import make_recogniser
from torch.utils.data import DataLoader
from transformers import WhisperFeatureExtractor
from whisper_meft import data
from whisper_meft.augmentation.settings import KINDS, Augmentation
from whisper_meft.augmentation.waves import sounding_power
from whisper_meft.data import Example, ExampleSet, SpeechDataset
from whisper_meft.data.augmenter import Augmenter, recordings
from whisper_meft.data.batching import BalancedDraw, LengthBatches
from whisper_meft.errors import UserError
from whisper_meft.model.pretrained import load_config
from whisper_meft.model.speaking import load_language
from whisper_meft.options.common import ModelArguments

RATE = 16_000
WAVES = [kind for kind in KINDS if kind != "spec"]


def clip(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def sure(*kinds: str, **strengths) -> Augmentation:
    return Augmentation(dict.fromkeys(kinds, 1.0), **strengths)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Recordings of noise at another rate and of two lengths, and rooms of two channels."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "noise" / "deep").mkdir(parents=True)
    (folder / "rooms").mkdir()
    soundfile.write(folder / "noise" / "long.wav", clip(8000 * 3, 7), 8000)
    soundfile.write(folder / "noise" / "deep" / "short.flac", clip(2400, 8), RATE)
    for number in range(3):
        response = np.zeros((900, 2), np.float32)
        response[20 + number, 0] = 0.9
        response[300 * number + 100, 0] = 0.4
        response[5, 1] = 0.9
        soundfile.write(folder / "rooms" / f"{number}.wav", response, RATE)
    return folder


def examples_of(count: int, seconds=(0.5, 0.9)) -> ExampleSet:
    found = []
    for number in range(count):
        length = seconds[0] + (seconds[1] - seconds[0]) * number / max(1, count - 1)
        samples = round(length * RATE)
        source = {"array": clip(samples, number), "sampling_rate": RATE}
        label = "ab"[number % 2]
        found.append(Example(source, label=label, name=f"clip{number}", seconds=samples / RATE))
    return ExampleSet(found, "clips")


EXTRACTOR = WhisperFeatureExtractor(chunk_length=1)


def dataset_of(augment, count=6, max_frames="longest", **options) -> SpeechDataset:
    return SpeechDataset(
        examples_of(count), EXTRACTOR, {"a": 0, "b": 1}, max_frames, augment=augment, **options
    )


# --- what is drawn ----------------------------------------------------------------------------------------


def test_the_same_is_drawn_again_and_something_else_otherwise(folders):
    settings = sure(*KINDS, noise_snr=(0, 5))
    where = {"noise_dir": folders / "noise", "room_dir": folders / "rooms"}
    augment, wave = Augmenter(settings, 3, **where), clip(9000)
    found = augment.wave(wave, "a", "0", 16_000)
    for other in (augment, Augmenter(settings, 3, **where), pickle.loads(pickle.dumps(augment))):
        np.testing.assert_array_equal(other.wave(wave, "a", "0", 16_000), found)
    different = [augment.wave(wave, "a", "1", 16_000), augment.wave(wave, "b", "0", 16_000)]
    different.append(Augmenter(settings, 4, **where).wave(wave, "a", "0", 16_000))
    for each in different:
        assert len(each) != len(found) or np.abs(each - found).max() > 1e-3


def test_kinds_draw_for_themselves():
    """Another kind does not change what the others do."""
    wave = clip(9000)
    alone = Augmenter(sure("gain"), 5).wave(wave, "a", "0", 16_000)
    both = Augmenter(sure("gain", "speed", speed_factors=[1.0]), 5).wave(wave, "a", "0", 16_000)
    np.testing.assert_array_equal(both, alone)


@pytest.mark.parametrize("kind", WAVES)
def test_each_is_as_likely_as_it_is_said_to_be(kind, folders):
    room = folders / "rooms" if kind == "room" else None
    settings = Augmentation({kind: 0.3}, speed_factors=[1.1], gain_db=(3, 3))
    augment, wave = Augmenter(settings, 0, room_dir=room), clip(800)
    found = [augment.wave(wave, f"{n}", "0", 16_000) for n in range(400)]
    changed = [len(each) != len(wave) or np.abs(each - wave).max() > 1e-6 for each in found]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.09)  # four standard errors


def test_strengths_are_drawn_from_their_whole_range():
    wave, lengths, gains, levels = clip(4400), [], [], []
    speed, gain = Augmenter(sure("speed")), Augmenter(sure("gain", gain_db=(-4, 8)))
    noise = Augmenter(sure("noise", noise_snr=(5, 15)))
    for number in range(200):
        lengths.append(len(speed.wave(wave, f"{number}", "0", 16_000)))
        louder = gain.wave(wave, f"{number}", "0", 16_000)
        gains.append(20 * np.log10(np.abs(louder).max() / np.abs(wave).max()))
        added = noise.wave(wave, f"{number}", "0", 16_000).astype(np.float64) - wave
        levels.append(10 * np.log10(sounding_power(wave, RATE) / np.square(added).mean()))
    assert set(lengths) == {4888, 4400, 4000} and min(map(lengths.count, lengths)) > 40
    assert -4 <= min(gains) < -3 and 7 < max(gains) <= 8.001
    assert 4.99 <= min(levels) < 6 and 14 < max(levels) <= 15.01


def test_noise_is_a_stretch_of_a_recording(folders):
    augment = Augmenter(sure("noise", noise_snr=(0, 0)), 1, noise_dir=folders / "noise")
    assert [example.name.rsplit("/", 1)[1] for example in augment.noises] == ["short.flac", "long.wav"]
    short, long = (example.read(RATE)[0].astype(np.float64) for example in augment.noises)
    wave, seen, starts = clip(8000), [], []
    for number in range(24):
        added = augment.wave(wave, f"{number}", "0", 16_000).astype(np.float64) - wave
        repeated = np.corrcoef(added, np.resize(short, len(wave)))[0, 1]
        size = len(long) + len(added)
        lag = np.fft.irfft(np.fft.rfft(long, size) * np.fft.rfft(added, size).conj(), size).argmax()
        stretch = long[lag : lag + len(added)]
        cut = len(stretch) == len(added) and np.corrcoef(added, stretch)[0, 1]
        seen.append("short" if repeated > 0.99 else "long" if cut > 0.95 else "neither")
        starts.append(int(lag) if seen[-1] == "long" else None)
    assert set(seen) == {"short", "long"} and len(set(starts)) > 5


def test_rooms_have_their_first_channel(folders):
    augment, wave = Augmenter(sure("room"), 1, room_dir=folders / "rooms"), clip(3000)
    found = []
    for number in range(12):
        heard = augment.wave(wave, f"{number}", "0", 16_000)
        plain = []
        for room in range(3):
            response = np.zeros(900)
            response[[20 + room, 300 * room + 100]] = 0.9, 0.4
            expected = np.convolve(wave, response)[20 + room :][: len(wave)]
            plain.append(np.corrcoef(heard, expected)[0, 1])
        assert max(plain) > 0.9999
        found.append(int(np.argmax(plain)))
    assert set(found) == {0, 1, 2}


def test_nothing_is_longer_than_the_window():
    augment = Augmenter(sure("speed", speed_factors=[0.8]))
    assert len(augment.wave(clip(1000), "a", "0", 1100)) == 1100
    # All of a clip with a transcript is to be heard.
    wave = clip(1000)
    np.testing.assert_array_equal(augment.wave(wave, "a", "0", 1100, whole=True), wave)
    assert len(augment.wave(wave, "a", "0", 1250, whole=True)) == 1250


# --- what is wrong ----------------------------------------------------------------------------------------


def test_folders_that_cannot_be_used(tmp_path, folders, caplog):
    noise, room = sure("noise"), sure("room")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.wav").write_text("no audio")
    (tmp_path / "file").write_text("")
    for folder, message in {
        "gone": "noise_dir: .*gone does not exist",
        "file": "noise_dir: .*file is a file, a folder is needed",
        "empty": "noise_dir: no audio files were found under .*empty",
        "bad": "none of the 1 examples of noise_dir .*bad can be used; the first, .*a.wav",
    }.items():
        with pytest.raises(UserError, match=message):
            Augmenter(noise, noise_dir=tmp_path / folder)
    with pytest.raises(UserError, match="room_dir is needed by augment room"):
        Augmenter(room)
    with pytest.raises(UserError, match="noise_dir is for augment noise, which is not given"):
        Augmenter(room, noise_dir=folders / "noise", room_dir=folders / "rooms")
    soundfile.write(tmp_path / "bad" / "b.wav", clip(100), RATE)
    with caplog.at_level(logging.WARNING):
        assert len(Augmenter(noise, noise_dir=tmp_path / "bad").noises) == 1
    assert "a.wav cannot be used" in caplog.text and caplog.text.count("\n") == 1
    assert recordings("noise_dir", str(tmp_path / "bad"), RATE)[0].seconds == 100 / RATE


def test_sets_that_cannot_be_augmented_so():
    with pytest.raises(UserError, match="spec_bins must be below the 80 mel bins that there are, got 80"):
        dataset_of(Augmenter(sure("spec", spec_bins=80)))
    with pytest.raises(UserError, match="augment is for 8000 Hz, the feature extractor for 16000"):
        dataset_of(Augmenter(sure("gain"), sampling_rate=8000))


def test_log_mel_that_is_given_takes_spec_augment_alone():
    from datasets import Dataset

    features = np.random.default_rng(0).standard_normal((4, 80, 60)).tolist()
    source = Dataset.from_dict({"input_features": features, "label": ["a", "b", "a", "b"]})
    examples = data.load_examples(source)
    for kinds in (["noise"], ["spec", "speed", "gain"]):
        with pytest.raises(
            UserError, match="cannot be used with log-mel that was computed earlier .*; spec can"
        ):
            SpeechDataset(examples, EXTRACTOR, None, "longest", augment=Augmenter(sure(*kinds)))
    plain = SpeechDataset(examples, EXTRACTOR, None, "longest")
    changed = SpeechDataset(examples, EXTRACTOR, None, "longest", augment=Augmenter(sure("spec")))
    assert all(bool((changed[i]["input_features"] != plain[i]["input_features"]).any()) for i in range(4))
    torch.testing.assert_close(plain[0]["input_features"], torch.tensor(features[0]))


# --- in sets of examples ----------------------------------------------------------------------------------


def items(dataset, epoch=0, workers=0, **options):
    dataset.set_epoch(epoch)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, **options)
    return [item["input_features"] for item in loader]


def same(one, other) -> bool:
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(one, other, strict=True))


def test_epochs_differ_and_workers_do_not(folders):
    augment = Augmenter(sure("speed", "noise", "spec"), 2, noise_dir=folders / "noise")
    dataset = dataset_of(augment)
    first, second = items(dataset), items(dataset, 1)
    assert not any(same([a], [b]) for a, b in zip(first, second))
    assert not any(same([a], [b]) for a, b in zip(first, items(dataset_of(None))))
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch, expected in ((1, second), (0, first), (1, second)):  # that outlive an epoch
        dataset.set_epoch(epoch)
        assert same([item["input_features"] for item in loader], expected)
    assert same(items(dataset_of(augment), 1), second)


@pytest.mark.slow
def test_processes_that_were_spawned_see_the_epoch():
    dataset = dataset_of(Augmenter(sure("noise")))
    found = items(dataset, 1, workers=1, multiprocessing_context="spawn")
    assert same(found, items(dataset, 1)) and not same(found, items(dataset, 0))


def test_an_item_is_that_of_its_changed_clip():
    augment = Augmenter(sure("speed", "gain", "spec"))
    for max_frames in ("fidelity", "longest", 20):
        dataset = dataset_of(augment, 3, max_frames)
        window = {"fidelity": 100, "longest": 100, 20: 40}[max_frames]
        for epoch in range(2):
            dataset.set_epoch(epoch)
            for index, example in enumerate(dataset.examples):
                wave = augment.wave(example.read(RATE)[0], example.name, f"{epoch}", window * 160)
                mel = data.log_mel(wave, EXTRACTOR, max_frames == "fidelity")
                frames = -(-len(wave) // 160)
                item = dataset[index]
                assert int(item["attention_mask"].sum()) == frames <= window
                assert item["length"] == (frames + 1) // 2
                expected = augment.log_mel(mel, frames, example.name, f"{epoch}")
                np.testing.assert_array_equal(item["input_features"], expected)


def test_lengths_are_the_most_that_items_have():
    dataset = dataset_of(Augmenter(sure("speed", speed_factors=[0.8, 1.0])), 5)
    most = np.zeros(5, int)
    for epoch in range(6):
        dataset.set_epoch(epoch)
        most = np.maximum(most, [dataset[i]["length"] for i in range(5)])
    assert most.tolist() == dataset.lengths
    assert dataset_of(Augmenter(sure("gain"))).lengths == dataset_of(None).lengths


def test_a_faster_clip_has_what_lies_behind_the_window():
    long = ExampleSet([Example({"array": clip(3 * RATE), "sampling_rate": RATE}, label="a", name="long")])
    dataset = SpeechDataset(
        long, EXTRACTOR, None, "longest", augment=Augmenter(sure("speed", speed_factors=[1.5]))
    )
    assert dataset[0]["length"] == 50 and int(dataset[0]["attention_mask"].sum()) == 100


def test_a_clip_that_is_drawn_again_is_changed_in_another_way():
    dataset = dataset_of(Augmenter(sure("noise", "gain")))
    once, again, third = (dataset[key]["input_features"] for key in ((1, 0), (1, 1), (1, 2)))
    assert same([once], [dataset[1]["input_features"]])
    assert not same([once], [again]) and not same([again], [third])
    draw = BalancedDraw([0] * 9 + [1], seed=1)
    plain = LengthBatches([1] * 10, 2, seed=1, draw=draw)
    numbered = LengthBatches([1] * 10, 2, seed=1, draw=draw)
    numbered.numbered = True
    for epoch in range(3):
        plain.set_epoch(epoch), numbered.set_epoch(epoch)
        keys = [key for batch in numbered for key in batch]
        positions = [key[0] if isinstance(key, tuple) else key for key in keys]
        assert positions == [position for batch in plain for position in batch]
        assert len(set(keys)) == 10 and (9, 4) in keys and numbered.padding() == 0
    once = LengthBatches([1] * 10, 3)
    expected, once.numbered = list(once), True
    assert list(once) == expected


def test_transcripts_are_heard_whole(tmp_path):
    """A slower clip that would not fit the window is left as fast as it is."""
    folder = make_recogniser(tmp_path / "whisper")
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    seconds = extractor.n_samples / RATE
    models = ModelArguments(str(folder))
    spoken = load_language(models, load_config(models), "nl")
    tokens = data.TranscriptTokens(spoken.tokenizer, 40, True)
    sounds = {name: clip(round(part * seconds * RATE)) for name, part in (("fits", 0.6), ("full", 0.97))}
    examples = ExampleSet(
        Example({"array": wave, "sampling_rate": RATE}, name=name, text="ja") for name, wave in sounds.items()
    )
    augment = Augmenter(sure("speed", speed_factors=[0.8]))
    dataset = SpeechDataset(examples, extractor, None, "fidelity", tokens, augment)
    frames = [int(dataset[i]["attention_mask"].sum()) for i in range(2)]
    window = extractor.n_samples // 160
    assert frames == [round(0.75 * window), round(0.97 * window)]
