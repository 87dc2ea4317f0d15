"""A synthetic accent corpus, made offline with espeak-ng, for the demo, the examples and the tests.

espeak-ng is a formant synthesiser with rules for many accents and about a hundred voice variants. That makes
it a source of real audio with known labels on a machine with no data and no network, and of phoneme times
for free. It is a toy next to human speech: it shows that training works, not how well a method will do.

The engine comes from the optional package ``espeakng-loader`` (``pip install meft-kernels[speech]``), which
is imported on first use only. espeak-ng is GPL-3.0-or-later; nothing else in this library needs it.
"""

import csv
import ctypes
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import read_json
from .sentences import sentences

SAMPLING_RATE = 16_000

ACCENTS = ("en-us", "en-gb-scotland", "en-gb-x-gbclan", "en-029")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Voice variants that serve as speakers. Left out: whispers, robots, the bare Klatt settings, and two whose
# noise comes from the C library's rand(). The two pools are fixed, whatever the seed, because the shipped
# backbone is pretrained on the first and must not know the second; variants that are near copies of each
# other (average spectra closer than 0.35 nepers) are in the same pool.
TRAIN_SPEAKERS = _names(
    "Alex Alicia Denis Diogo Gene Gene2 Henrique Hugo Jacky Marco Mario Mike Nguyen Tweaky adam anika "
    "announcer antonio aunty benjamin david ed edward edward2 f1 f3 f4 grandpa ian iven2 iven3 iven4 "
    "john m2 m4 m5 m6 m7 m8 max michel miguel mike2 norbert paul pedro sandro steph steph2 steph3 "
    "victor zac"
)

TEST_SPEAKERS = _names(
    "Andrea Andy Annie Lee Michael Storm belinda boris f2 f5 grandma gustave kaukovalta linda m1 m3 "
    "marcelo pablo quincy rob robert shelby travis"
)

_NO_ENGINE = (
    "synthetic speech needs the optional package espeakng-loader: pip install meft-kernels[speech] "
    "(or pip install espeakng-loader)"
)

_RATE, _AMPLITUDE, _PITCH, _PITCH_RANGE = 1, 2, 3, 4  # parameter numbers of espeak_SetParameter

_PHONEME_EVENT = 7


@dataclass(frozen=True)
class Utterance:
    """One synthesised sentence.

    Attributes:
        audio: (samples,) float32 in [-1, 1], mono, 16 kHz.
        phonemes: (espeak's name without stress marks, start in seconds) in order; names that begin with ``_``
            are pauses. A phoneme ends where the next begins, the last one with the audio.
    """

    audio: np.ndarray
    phonemes: list[tuple[str, float]]

    def frame_names(self, num_frames: int, start: float = 0.0, step: float = 0.02) -> list[str]:
        """The phoneme that sounds at ``start + i * step`` seconds for i in 0..num_frames-1.

        0.02 s is the step of a Whisper encoder's frames. Before the first phoneme and past the end of the
        audio the name is ``_``.
        """
        times = start + step * np.arange(num_frames)
        index = np.searchsorted([begin for _, begin in self.phonemes], times, side="right") - 1
        end = len(self.audio) / SAMPLING_RATE
        return [self.phonemes[i][0] if i >= 0 and t < end else "_" for i, t in zip(index, times)]


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):  # espeak_EVENT of speak_lib.h
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Synthesiser:
    """An espeak-ng engine of its own; use it as a context manager, from one thread.

    The library keeps its state in globals (noise, flutter and phase run on from one utterance into the next),
    so the same sentence sounds a little different each time, and a second initialisation does not reset it.
    Each Synthesiser therefore loads a private copy of the library and seeds its noise: engines do not disturb
    each other, and the same calls on a fresh engine give the same samples.

    Raises:
        UserError: espeakng-loader is not installed, or the engine does not start.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise UserError(_NO_ENGINE) from error
        library = Path(espeakng_loader.get_library_path())
        data = Path(espeakng_loader.get_data_path())
        self._speakers = {path.name for path in (data / "voices" / "!v").iterdir()}
        self._folder = Path(tempfile.mkdtemp(prefix="espeak-"))
        self._library = None
        try:
            self._library = ctypes.CDLL(str(shutil.copy(library, self._folder / library.name)))
            # mode 2: synchronous, samples handed to the callback; option 1: phoneme events
            self._rate = self._library.espeak_Initialize(2, 0, os.fsencode(data), 1)
        except OSError as error:
            self.close()
            raise UserError(f"the espeak-ng engine of espeakng-loader does not load: {error}") from error
        if self._rate <= 0:
            self.close()
            raise UserError(f"the espeak-ng engine of espeakng-loader does not start (code {self._rate})")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # it seeds itself with the time of day
        self._chunks: list[np.ndarray] = []
        self._phonemes: list[tuple[str, float]] = []
        self._callback = _Callback(self._receive)  # kept: ctypes does not hold a reference
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == _PHONEME_EVENT:
                raw = ctypes.string_at(ctypes.addressof(events[i].id), 8).split(b"\0")[0]
                name = raw.decode("utf-8", "replace").lstrip("',%=|")
                if name and not name.startswith("("):  # "(en)" marks a change of language, not a sound
                    self._phonemes.append((name, events[i].sample / self._rate))
            i += 1
        return 0

    def __enter__(self) -> "Synthesiser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engine and removes its copy of the library. Safe to call twice."""
        if self._library is not None:
            library, self._library = self._library, None
            library.espeak_Terminate()
            _unload(library)
        shutil.rmtree(self._folder, ignore_errors=True)

    def speak(
        self,
        text: str,
        voice: str = "en-us",
        speaker: str | None = None,
        rate: int = 175,
        pitch: int = 50,
        pitch_range: int = 50,
    ) -> Utterance:
        """Synthesises one sentence.

        Args:
            text: what to say.
            voice: espeak's language or accent, such as "en-us", "en-gb-scotland", "de", "cmn".
            speaker: a voice variant, such as one of TRAIN_SPEAKERS; None for the voice's own speaker.
            rate: words per minute, 80 to 450.
            pitch: 0 to 99.
            pitch_range: how lively the intonation is, 0 to 99.

        Raises:
            UserError: unknown voice, value out of range, or text that gives no sound.
        """
        if self._library is None:
            raise UserError("speak: this Synthesiser is closed")
        for name, value, low, high in (
            ("rate", rate, 80, 450),
            ("pitch", pitch, 0, 99),
            ("pitch_range", pitch_range, 0, 99),
        ):
            if not low <= value <= high:
                raise UserError(f"speak: {name}={value} is outside {low} to {high}")
        full = voice if speaker is None else f"{voice}+{speaker}"
        known = speaker is None or speaker in self._speakers  # espeak passes over an unknown variant
        if not known or self._library.espeak_SetVoiceByName(full.encode()) != 0:
            raise UserError(f"speak: espeak-ng has no voice {full!r}")
        # 40 of 100: some variants saturate the 16-bit output at the default loudness
        for number, value in ((_RATE, rate), (_AMPLITUDE, 40), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
            self._library.espeak_SetParameter(number, int(value), 0)
        self._chunks, self._phonemes = [], []
        data = text.encode()
        flags = 1  # UTF-8
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, flags, None, None)
        if not any(not name.startswith("_") for name, _ in self._phonemes):
            raise UserError(f"speak: espeak-ng gave no sound for {text!r} in voice {full!r}")
        return Utterance(_to_16k(np.concatenate(self._chunks), self._rate), self._phonemes)


def _unload(library: ctypes.CDLL) -> None:
    """Lets go of a loaded library, where Python offers a way, so that many engines can follow each other."""
    import _ctypes

    if hasattr(_ctypes, "dlclose"):
        _ctypes.dlclose(library._handle)
    elif hasattr(_ctypes, "FreeLibrary"):
        _ctypes.FreeLibrary(library._handle)


def _to_16k(samples: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    audio = soxr.resample(samples.astype(np.float32) / 32768.0, rate, SAMPLING_RATE)
    return np.clip(audio, -1.0, 1.0).astype(np.float32, copy=False)


def synthesise(text: str, voice: str = "en-us", speaker: str | None = None, **prosody: int) -> Utterance:
    """``Synthesiser().speak(...)`` on a fresh engine: the same arguments give the same samples."""
    with Synthesiser() as engine:
        return engine.speak(text, voice, speaker, **prosody)


def degrade(
    audio: np.ndarray, rng: np.random.Generator, snr_db: tuple[float, float] = (15.0, 30.0)
) -> np.ndarray:
    """What a microphone and a room might do to a clip: random tone control, coloured noise, random loudness.

    The tone control is a curve through seven random points of ±6 dB, evenly spaced in pitch from 60 Hz to
    8 kHz; the noise has a power spectrum of f**-a with a drawn from 0 to 1; the loudness is -30 to -20 dB
    (rms, relative to full scale), less where the peak would pass 0.95.

    Args:
        audio: (samples,) float32, 16 kHz.
        rng: the source of every choice.
        snr_db: the signal-to-noise ratio is drawn between these two, in dB.

    Returns:
        (samples,) float32, peak at most 0.95.
    """
    count = len(audio)
    if count == 0:
        return audio.astype(np.float32)
    hertz = np.fft.rfftfreq(count, 1 / SAMPLING_RATE)
    octave = np.log2(np.maximum(hertz, 60.0))
    points = np.linspace(np.log2(60.0), np.log2(SAMPLING_RATE / 2), 7)
    gain = 10 ** (np.interp(octave, points, rng.uniform(-6.0, 6.0, 7)) / 20)
    speech = np.fft.irfft(np.fft.rfft(audio) * gain, count)
    noise = np.fft.rfft(rng.standard_normal(count)) * 2.0 ** (-0.5 * rng.uniform(0.0, 1.0) * octave)
    noise = np.fft.irfft(noise, count)
    level = _rms(speech) * 10 ** (-rng.uniform(*snr_db) / 20)
    mixed = speech + noise * (level / max(_rms(noise), 1e-12))
    mixed *= 10 ** (rng.uniform(-30.0, -20.0) / 20) / max(_rms(mixed), 1e-12)
    peak = np.abs(mixed).max(initial=0.0)
    return (mixed * min(1.0, 0.95 / max(peak, 1e-12))).astype(np.float32)


def _rms(signal: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(signal))))


@dataclass(frozen=True)
class Manner:
    """Who says what and how: everything about a clip but the accent."""

    sentence: str
    speaker: str
    rate: int
    pitch: int
    pitch_range: int


def manners(which: str, speakers: Sequence[str], rng: np.random.Generator) -> Iterator[Manner]:
    """Yields speaking manners without end: speakers in turn, each with a tempo and a pitch of their own.

    Args:
        which: the set of sentences, see whisper_meft.synthetic.sentences.
        speakers: voice variants.
        rng: the source of every choice.
    """
    order = [speakers[i] for i in rng.permutation(len(speakers))]
    habits = {s: (rng.integers(150, 191), rng.integers(35, 66), rng.integers(35, 66)) for s in order}
    for i, sentence in enumerate(sentences(which, rng)):
        speaker = order[i % len(order)]
        rate, pitch, pitch_range = (int(habit + rng.integers(-8, 9)) for habit in habits[speaker])
        yield Manner(sentence, speaker, rate, pitch, pitch_range)


def cut(utterance: Utterance, seconds: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A random stretch of ``seconds`` out of the spoken part (all of it where it is shorter).

    Returns:
        ((samples,) float32, start of the stretch in seconds).
    """
    spoken = [time for name, time in utterance.phonemes if not name.startswith("_")] or [0.0]
    pauses = [time for name, time in utterance.phonemes if name.startswith("_") and time > spoken[-1]]
    first = int(spoken[0] * SAMPLING_RATE)
    last = min(len(utterance.audio), int(pauses[0] * SAMPLING_RATE) if pauses else len(utterance.audio))
    length = round(seconds * SAMPLING_RATE)
    first += int(rng.integers(max(0, last - first - length) + 1))
    return utterance.audio[first : min(first + length, last)], first / SAMPLING_RATE


def make_accent_corpus(
    output_dir: str | os.PathLike,
    accents: Sequence[str] = ACCENTS,
    train_clips_per_class: int = 300,
    test_clips_per_class: int = 100,
    seconds: float = 2.0,
    snr_db: tuple[float, float] = (15.0, 30.0),
    seed: int = 0,
    progress: bool = False,
    validation_clips_per_class: int = 0,
) -> Path:
    """Writes a small accent-classification corpus: 16 kHz wav files in one folder per accent, and manifests.

    ::

        OUT/train/<accent>/<speaker>_<number>.wav     OUT/train.csv   path (relative to OUT),label,speaker
        OUT/test/<accent>/<speaker>_<number>.wav      OUT/test.csv
        OUT/validation/...                            OUT/validation.csv, where it is asked for
        OUT/corpus.json                               the settings that made it

    Speakers (voice variants) and sentences of train and test are disjoint. Within a split, clip n of every
    accent has the same sentence, speaker, tempo and pitch, so only the accent tells the classes apart; the
    stretch cut out of the sentence, the tone control, the noise and the loudness are drawn for each clip
    (see ``degrade``).

    The same settings give the same samples. The folder appears complete or not at all, and is left as it is
    when it already holds the corpus of these settings.

    Args:
        output_dir: the folder to make.
        accents: two or more espeak voices: the labels.
        train_clips_per_class, test_clips_per_class: clips of each accent, at least 1.
        seconds: longest clip, 0.5 to 30; shorter only where the sentence itself is.
        snr_db: range of signal-to-noise ratios, in dB.
        seed: the source of every choice.
        progress: show a progress bar.
        validation_clips_per_class: clips of each accent for choosing on, of speakers that neither the other
            splits nor the shipped backbone's pretraining have: every third of TEST_SPEAKERS, which the test
            split then goes without. 0 for no such split.

    Returns:
        The folder.

    Raises:
        UserError: a bad setting, espeakng-loader missing, or a folder that holds something else.
    """
    settings = _checked_settings(accents, train_clips_per_class, test_clips_per_class, seconds, snr_db, seed)
    parts = [("train", train_clips_per_class, TRAIN_SPEAKERS), ("test", test_clips_per_class, TEST_SPEAKERS)]
    if validation_clips_per_class:
        _check_clips("validation_clips_per_class", validation_clips_per_class)
        settings["validation_clips_per_class"] = validation_clips_per_class
        chosen_on = TEST_SPEAKERS[::3]
        heldout = tuple(speaker for speaker in TEST_SPEAKERS if speaker not in chosen_on)
        parts[1:] = [("test", test_clips_per_class, heldout)]
        parts.append(("validation", validation_clips_per_class, chosen_on))
    output = Path(output_dir)
    if _is_complete(output, settings):
        return output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    try:
        with Synthesiser() as engine:
            said: set[str] = set()
            for split, clips, speakers in parts:
                said |= _write_split(engine, building, split, clips, speakers, settings, said, progress)
        (building / "corpus.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        building.chmod(0o755)  # mkdtemp makes it private
        building.replace(output)  # an empty folder of that name gives way
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return output


def _write_split(
    engine: Synthesiser,
    folder: Path,
    split: str,
    clips: int,
    speakers: Sequence[str],
    settings: dict[str, Any],
    avoid: set[str],
    progress: bool,
) -> set[str]:
    """Writes one split, with no sentence of ``avoid``; returns the sentences that it has."""
    import soundfile
    from tqdm.auto import tqdm

    accents, stream = settings["accents"], {"train": 0, "test": 1, "validation": 2}[split]
    which = "train" if split == "train" else "test"
    manner_rng = np.random.default_rng([settings["seed"], stream, 0])
    clip_rng = np.random.default_rng([settings["seed"], stream, 1])
    fresh = (m for m in manners(which, speakers, manner_rng) if m.sentence not in avoid)
    rows, said = [], set()
    for accent in accents:
        (folder / split / accent).mkdir(parents=True)
    bar = tqdm(total=clips * len(accents), desc=f"synthesising {split}", unit="clip", disable=not progress)
    with bar:
        for number, manner in zip(range(clips), fresh):
            said.add(manner.sentence)
            for accent in accents:
                spoken = engine.speak(
                    manner.sentence, accent, manner.speaker, manner.rate, manner.pitch, manner.pitch_range
                )
                audio, _ = cut(spoken, settings["seconds"], clip_rng)
                path = f"{split}/{accent}/{manner.speaker}_{number:04d}.wav"
                clip = degrade(audio, clip_rng, tuple(settings["snr_db"]))
                content = io.BytesIO()  # soundfile's own error does not say that the disk is full
                soundfile.write(content, clip, SAMPLING_RATE, format="WAV", subtype="PCM_16")
                (folder / path).write_bytes(content.getvalue())
                rows.append((path, accent, manner.speaker))
                bar.update()
    with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "speaker"), *sorted(rows)])
    return said


def _checked_settings(
    accents: Sequence[str], train_clips: int, test_clips: int, seconds: float, snr_db: Any, seed: int
) -> dict[str, Any]:
    if isinstance(accents, str) or len(set(accents)) < 2 or len(set(accents)) != len(accents):
        raise UserError(
            f"accents={accents!r}: two or more different espeak voices are needed, such as {ACCENTS}"
        )
    for name, value in (("train_clips_per_class", train_clips), ("test_clips_per_class", test_clips)):
        _check_clips(name, value)
    if not 0.5 <= seconds <= 30:
        raise UserError(f"seconds={seconds!r} is outside 0.5 to 30")
    if len(snr_db) != 2 or not snr_db[0] <= snr_db[1]:
        raise UserError(f"snr_db={snr_db!r} is not a pair (low, high) in dB")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed={seed!r} is not a whole number of at least 0")
    return {
        "kind": "whisper_meft synthetic accent corpus",
        "version": 1,
        "accents": list(accents),
        "train_clips_per_class": train_clips,
        "test_clips_per_class": test_clips,
        "seconds": float(seconds),
        "snr_db": [float(value) for value in snr_db],
        "seed": seed,
    }


def _check_clips(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r} is not a whole number of at least 1")


def _is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """True where ``folder`` holds this corpus; False where nothing is there; UserError for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not folder.is_dir():
        raise UserError(f"cannot write {folder}: it is a file, a folder name is needed")
    marker = folder / "corpus.json"
    if marker.is_file() and read_json(marker) == settings:
        return True
    raise UserError(
        f"{folder} already holds something else, or a corpus of other settings: remove it or name another"
    )
