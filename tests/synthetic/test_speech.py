"""The synthetic accent corpus and the backbone that ships with the library, on freshly made speech."""

import csv
import errno
import importlib.util
import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
from whisper_meft.errors import UserError
from whisper_meft.synthetic.sentences import SETS, sentences
from whisper_meft.synthetic.shipped import shipped_backbone
from whisper_meft.synthetic.speech import (
    ACCENTS,
    SAMPLING_RATE,
    TEST_SPEAKERS,
    TRAIN_SPEAKERS,
    Synthesiser,
    Utterance,
    cut,
    degrade,
    make_accent_corpus,
    manners,
    synthesise,
)

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed"
)
# fmt: off
PARKED = ["D", "@2", "f", "A@", "m", "3", "p", "A@", "k", "t", "h", "I", "z", "k", "A@"]
# fmt: on
SMALL = {"train_clips_per_class": 6, "test_clips_per_class": 4, "seconds": 1.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_accent_corpus(tmp_path_factory.mktemp("speech") / "corpus", **SMALL)


def rows(manifest: Path) -> list[dict[str, str]]:
    with open(manifest, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def samples(corpus: Path) -> dict[str, bytes]:
    return {str(p.relative_to(corpus)): p.read_bytes() for p in sorted(corpus.rglob("*.wav"))}


# --- text and speakers ---------------------------------------------------------------------------------


def test_sentence_sets_are_large_and_disjoint():
    drawn = {which: set(islice(sentences(which, np.random.default_rng(5)), 4000)) for which in SETS}
    assert all(len(found) == 4000 for found in drawn.values()), "no repeats among the first 4000"
    assert not drawn["train"] & drawn["test"]
    assert not drawn["pretrain"] & (drawn["train"] | drawn["test"])
    first_words = [{sentence.split()[0] for sentence in found} for found in drawn.values()]
    assert not any(a & b for i, a in enumerate(first_words) for b in first_words[:i])


def test_unknown_sentence_set():
    with pytest.raises(UserError, match="'dev' is not one of train, test, pretrain"):
        next(sentences("dev", np.random.default_rng(0)))


def test_speaker_pools_are_disjoint():
    assert len(set(TRAIN_SPEAKERS)) == len(TRAIN_SPEAKERS) >= 40
    assert len(set(TEST_SPEAKERS)) == len(TEST_SPEAKERS) >= 20
    assert not set(TRAIN_SPEAKERS) & set(TEST_SPEAKERS)


# --- one utterance -------------------------------------------------------------------------------------


@needs_espeak
def test_every_speaker_and_accent_has_a_voice():
    with Synthesiser() as engine:
        for speaker in TRAIN_SPEAKERS + TEST_SPEAKERS:
            assert np.abs(engine.speak("Far", speaker=speaker).audio).max() > 0.01, speaker
        spoken = {tuple(engine.speak("Our farmer thought.", a).phonemes) for a in ACCENTS}
    assert len(spoken) == len(ACCENTS), "the accents must differ"


@needs_espeak
def test_an_utterance_is_16k_mono_with_ordered_phonemes():
    spoken = synthesise("The farmer parked his car.", "en-us", "f1", rate=160)
    assert spoken.audio.dtype == np.float32 and spoken.audio.ndim == 1
    assert np.isfinite(spoken.audio).all() and 0.01 < np.abs(spoken.audio).max() < 1.0
    seconds = len(spoken.audio) / SAMPLING_RATE
    assert 1.0 < seconds < 3.0
    names, times = zip(*spoken.phonemes)
    assert all(a <= b for a, b in zip(times, times[1:])) and times[0] >= 0 and times[-1] < seconds + 1e-3
    assert [n for n in names if not n.startswith("_")] == PARKED


@needs_espeak
def test_phoneme_times_match_the_sound():
    # "s" is a hiss: its stretch must hold more high frequencies than the vowel before it.
    spoken = synthesise("ice", "en-us", "m1")
    marks = spoken.phonemes
    vowel, hiss = (next(i for i, (name, _) in enumerate(marks) if name == wanted) for wanted in ("aI", "s"))

    def brightness(i: int) -> float:
        begin, end = (int(marks[j][1] * SAMPLING_RATE) for j in (i, i + 1))
        power = np.abs(np.fft.rfft(spoken.audio[begin:end])) ** 2
        return power[len(power) * 3 // 8 :].sum() / power.sum()

    assert brightness(hiss) > 0.5 > 0.1 > brightness(vowel)


@needs_espeak
def test_engines_do_not_disturb_each_other():
    def second_sentence() -> bytes:
        with Synthesiser() as engine:
            engine.speak("Nobody heard it.", "en-029", "Alicia")
            return engine.speak("Nobody heard it.", "en-029", "Alicia").audio.tobytes()

    with Synthesiser() as other:
        expected = second_sentence()
        other.speak("Something else altogether.", "en-us", "f2")
        assert second_sentence() == expected
        assert other.speak("It still speaks.").audio.size > 0


@needs_espeak
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hi", "xx"), "no voice 'xx'"),
        (("hi", "en-us", "f99"), "no voice 'en-us\\+f99'"),
        (("hi", "en-us", "../f1"), "no voice"),
        (("", "en-us"), "no sound for ''"),
        (("...", "en-us"), "no sound"),
    ],
)
def test_what_cannot_be_said(arguments, message):
    with pytest.raises(UserError, match=message):
        synthesise(*arguments)


@needs_espeak
def test_prosody_out_of_range_and_closed_engine():
    with Synthesiser() as engine:
        for prosody in ({"rate": 20}, {"pitch": 100}, {"pitch_range": -1}):
            with pytest.raises(UserError, match=f"{next(iter(prosody))}="):
                engine.speak("hi", **prosody)
    with pytest.raises(UserError, match="closed"):
        engine.speak("hi")
    engine.close()


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install meft-kernels\[speech\]"):
        synthesise("hi")
    with pytest.raises(UserError, match=r"pip install meft-kernels\[speech\]"):
        make_accent_corpus(tmp_path / "corpus", **SMALL)
    assert list(tmp_path.iterdir()) == []


# --- pieces --------------------------------------------------------------------------------------------


def test_frame_names():
    spoken = Utterance(np.zeros(1600, np.float32), [("a", 0.01), ("b", 0.05)])  # 0.1 s
    assert spoken.frame_names(7) == ["_", "a", "a", "b", "b", "_", "_"]
    assert spoken.frame_names(2, start=0.045) == ["a", "b"]


def test_cut_stays_inside_the_spoken_part():
    audio = np.arange(16000, dtype=np.float32)
    spoken = Utterance(audio, [("_", 0.0), ("a", 0.25), ("_:", 0.5), ("b", 0.6), ("_", 0.75)])
    rng = np.random.default_rng(0)
    whole, start = cut(spoken, 2.0, rng)
    assert start == 0.25 and np.array_equal(whole, audio[4000:12000])
    starts = set()
    for _ in range(20):
        part, start = cut(spoken, 0.3, rng)
        assert len(part) == 4800 and part[0] == round(start * 16000) >= 4000 and part[-1] < 12000
        starts.add(start)
    assert len(starts) > 10


def test_degrade_gives_the_asked_signal_to_noise_ratio():
    rng = np.random.default_rng(0)
    time = np.arange(32000) / SAMPLING_RATE
    tone = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    noisy = degrade(tone, rng, (20.0, 20.0))
    assert noisy.dtype == np.float32 and noisy.shape == tone.shape
    power = np.abs(np.fft.rfft(noisy)) ** 2
    signal = power[880]  # 440 Hz; the bins are 0.5 Hz apart
    assert 10 * np.log10(signal / (power.sum() - signal)) == pytest.approx(20.0, abs=0.3)


@pytest.mark.parametrize("audio", [np.zeros(1600, np.float32), np.zeros(0, np.float32)])
def test_degrade_of_nothing_is_finite(audio):
    out = degrade(audio, np.random.default_rng(0))
    assert out.shape == audio.shape and np.isfinite(out).all()


def test_degrade_never_clips():
    spike = np.zeros(32000, np.float32)
    spike[100] = 1.0  # the highest ratio of peak to loudness there is
    assert np.abs(degrade(spike, np.random.default_rng(0))).max() == pytest.approx(0.95, abs=1e-6)


# --- the corpus ----------------------------------------------------------------------------------------


@needs_espeak
def test_corpus_layout_and_manifests(corpus):
    for split, per_class in (("train", 6), ("test", 4)):
        listed = rows(corpus / f"{split}.csv")
        on_disk = {str(p.relative_to(corpus)) for p in (corpus / split).rglob("*.wav")}
        assert {row["path"] for row in listed} == on_disk and len(listed) == len(on_disk) == 4 * per_class
        for row in listed:
            _, label, name = row["path"].split("/")
            assert label == row["label"] and name.rsplit("_", 1)[0] == row["speaker"]
        assert sorted(row["label"] for row in listed) == sorted(ACCENTS * per_class)


@needs_espeak
def test_corpus_audio(corpus):
    for path in corpus.rglob("*.wav"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        audio, _ = soundfile.read(path, dtype="float32")
        assert 0.5 < len(audio) / 16000 <= 1.0
        assert np.isfinite(audio).all() and 0.01 < np.abs(audio).max() <= 0.951
        assert 10 ** (-31 / 20) < np.sqrt(np.mean(audio**2)) * 1.5 < 10 ** (-15 / 20)


@needs_espeak
def test_splits_share_no_speaker_and_no_sentence(corpus):
    speakers = {
        split: {row["speaker"] for row in rows(corpus / f"{split}.csv")} for split in ("train", "test")
    }
    assert speakers["train"] <= set(TRAIN_SPEAKERS) and speakers["test"] <= set(TEST_SPEAKERS)
    said = {
        split: {m.sentence for m in islice(manners(split, pool, np.random.default_rng([0, stream, 0])), 200)}
        for stream, (split, pool) in enumerate((("train", TRAIN_SPEAKERS), ("test", TEST_SPEAKERS)))
    }
    assert len(said["train"]) == len(said["test"]) == 200 and not said["train"] & said["test"]


@needs_espeak
def test_a_validation_split_shares_no_speaker_and_no_sentence_with_the_others(tmp_path, monkeypatch):
    said = {}
    original = Synthesiser.speak

    def listen(self, sentence, voice, speaker, *prosody):
        said.setdefault(speaker, set()).add(sentence)
        return original(self, sentence, voice, speaker, *prosody)

    monkeypatch.setattr(Synthesiser, "speak", listen)
    settings = {**SMALL, "accents": ACCENTS[:2], "test_clips_per_class": 15, "seconds": 0.5}
    folder = make_accent_corpus(tmp_path / "corpus", **settings, validation_clips_per_class=8)
    splits = ["train", "test", "validation"]
    speakers = [{row["speaker"] for row in rows(folder / f"{split}.csv")} for split in splits]
    sentences = [set().union(*(said[speaker] for speaker in each)) for each in speakers]
    for sets in (speakers, sentences):
        assert sum(map(len, sets)) == len(set().union(*sets))
    assert speakers[1] | speakers[2] == set(TEST_SPEAKERS)
    assert [len(each) for each in sentences[1:]] == [15, 8]
    assert len(rows(folder / "validation.csv")) == 16
    with pytest.raises(UserError, match="other settings"):
        make_accent_corpus(folder, **settings)


@needs_espeak
def test_corpus_is_fixed_by_its_seed(corpus, tmp_path):
    assert samples(make_accent_corpus(tmp_path / "again", **SMALL)) == samples(corpus)
    other = samples(make_accent_corpus(tmp_path / "other", seed=1, **SMALL))
    assert not set(other.values()) & set(samples(corpus).values())


@needs_espeak
def test_a_complete_corpus_is_left_alone_and_others_are_refused(corpus, tmp_path, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*")}
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # nothing may be synthesised
    assert make_accent_corpus(str(corpus), **SMALL) == corpus
    with pytest.raises(UserError, match="other settings"):
        make_accent_corpus(corpus, **{**SMALL, "seconds": 2.0})
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*")} == before
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds something else"):
        make_accent_corpus(tmp_path, **SMALL)
    with pytest.raises(UserError, match="it is a file"):
        make_accent_corpus(tmp_path / "note.txt", **SMALL)


@needs_espeak
def test_an_interrupted_corpus_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def stop(*_args, **_kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        make_accent_corpus(tmp_path / "corpus", **SMALL)
    assert len(calls) == 5 and list(tmp_path.iterdir()) == []


@needs_espeak
def test_a_full_disk_is_named_as_what_it_is(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write .*corpus: No space left on device"):
        make_accent_corpus(tmp_path / "corpus", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"accents": ["en-us"]}, "two or more"),
        ({"accents": "en-us"}, "two or more"),
        ({"accents": ["en-us", "en-us"]}, "two or more"),
        ({"train_clips_per_class": 0}, "train_clips_per_class=0"),
        ({"test_clips_per_class": 1.5}, "test_clips_per_class=1.5"),
        ({"validation_clips_per_class": -1}, "validation_clips_per_class=-1"),
        ({"seconds": 0.1}, "seconds=0.1"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"snr_db": (30, 15)}, "snr_db"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings(setting, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_accent_corpus(tmp_path / "corpus", **setting)
    assert list(tmp_path.iterdir()) == []


@needs_espeak
def test_an_unknown_accent_is_named(tmp_path):
    with pytest.raises(UserError, match="no voice 'en-xx"):
        make_accent_corpus(tmp_path / "corpus", accents=["en-us", "en-xx"], **SMALL)
    assert list(tmp_path.iterdir()) == []


# --- the backbone --------------------------------------------------------------------------------------


def test_the_shipped_backbone_is_an_ordinary_folder(caplog):
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForAudioClassification

    folder = shipped_backbone()
    model, info = WhisperForAudioClassification.from_pretrained(
        folder, num_labels=4, output_loading_info=True
    )
    head = {"projector.weight", "projector.bias", "classifier.weight", "classifier.bias"}
    assert set(info["missing_keys"]) <= head and not info["unexpected_keys"]
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    assert extractor.feature_size == model.config.num_mel_bins
    assert extractor.nb_max_frames == 2 * model.config.max_source_positions
    features = extractor(np.zeros(16000, np.float32), sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        assert model.float()(features).logits.shape == (1, 4)
    assert (folder / "model.safetensors").stat().st_size < 3_500_000


@needs_espeak
def test_the_shipped_backbone_hears_phonemes():
    import json

    import torch
    from safetensors.torch import load_file
    from transformers import WhisperFeatureExtractor, WhisperForAudioClassification

    folder = shipped_backbone()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    encoder = WhisperForAudioClassification.from_pretrained(folder, dtype=torch.float32).encoder.eval()
    head = load_file(folder / "phonemes.safetensors")
    phonemes = json.loads((folder / "phonemes.json").read_text())
    rng = np.random.default_rng(1)
    audio, names = [], []
    with Synthesiser() as engine:
        for i, manner in zip(range(24), manners("test", TEST_SPEAKERS, rng)):
            spoken = engine.speak(manner.sentence, ACCENTS[i % 4], manner.speaker)
            clip, start = cut(spoken, extractor.chunk_length, rng)
            audio.append(degrade(clip, rng))
            names += spoken.frame_names(encoder.config.max_source_positions, start)
    features = extractor(audio, sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        states = encoder(features).last_hidden_state
        guess = (states @ head["weight"].float().T + head["bias"].float()).argmax(-1).flatten()
    right = np.mean([phonemes[g] == name for g, name in zip(guess.tolist(), names)])
    most_frequent = max(names.count(name) for name in set(names)) / len(names)
    assert right > 0.5 > 3 * most_frequent
