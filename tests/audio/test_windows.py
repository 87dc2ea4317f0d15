"""Windows of long recordings: where they lie, what they answer for, and reading them in one pass."""

import io
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from whisper_meft.audio import decoding, read_audio, read_window, read_windows
from whisper_meft.audio.windows import Windows
from whisper_meft.errors import UserError

soundfile = pytest.importorskip("soundfile")


def sound(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    generator = np.random.default_rng(round(seconds * rate))
    return 0.1 * generator.standard_normal((round(seconds * rate), channels)).astype(np.float32)


def written(wave: np.ndarray, rate: int, form: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "length", "hop", "expected"),
    [
        (3, 30, 15, [0]),
        (30, 30, 15, [0]),
        (30.1, 30, 15, [0]),
        (30.2, 30, 15, [0, 0.2]),
        (45, 30, 15, [0, 15]),
        (45.05, 30, 15, [0, 15]),
        (50, 30, 15, [0, 15, 20]),
        (65, 30, 30, [0, 30, 35]),
        (1.02, 1, 1, [0]),
        (0.22, 0.2, 0.1, [0]),
        (0.23, 0.2, 0.1, [0, 0.03]),
        (3600, 30, 15, [*range(0, 3571, 15)]),
    ],
)
def test_where_windows_begin(seconds, length, hop, expected):
    assert Windows(length, hop).starts(seconds) == pytest.approx(expected)


def test_all_of_a_recording_is_heard_and_every_second_counts_once():
    generator = np.random.default_rng(0)
    for _ in range(60):
        length = float(generator.uniform(0.3, 30))
        windows = Windows(length, float(generator.uniform(0.1, 1)) * length)
        seconds = float(generator.uniform(0.1, 20)) * length
        starts, shares = windows.starts(seconds), windows.shares(seconds)
        ends = [min(start + length, seconds) for start in starts]
        assert starts[0] == 0 and all(b > a for a, b in pairwise(starts))
        assert all(b <= a for a, b in zip(ends, starts[1:])), "sound between two windows"
        assert all(end - start == pytest.approx(min(length, seconds)) for start, end in zip(starts, ends))
        assert seconds - ends[-1] <= 0.1 + 1e-9
        # By counting on a grid what each moment is shared among.
        moments = (np.arange(4_000) + 0.5) / 4_000 * ends[-1]
        inside = [(moments >= start) & (moments < end) for start, end in zip(starts, ends)]
        grid = [float((each / np.sum(inside, axis=0)).mean() * ends[-1]) for each in inside]
        assert shares == pytest.approx(grid, abs=4e-3 * ends[-1])
        assert shares.sum() == pytest.approx(ends[-1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 30.5}, "window must be at most the 30 seconds that the model hears, got 30.5"),
        ({"length": 0}, "window must be at least 0.1 seconds, got 0"),
        ({"length": float("nan")}, "window must be at least 0.1 seconds, got nan"),
        ({"hop": 0}, "hop must be at least 0.1 seconds, got 0"),
        ({"hop": -1}, "hop must be at least 0.1 seconds, got -1"),
        ({"length": 10, "hop": 10.5}, "hop must be above 0 and at most the window's 10 seconds, got 10.5"),
        ({"hop": float("inf")}, "hop must be above 0 and at most the window's 30 seconds, got inf"),
    ],
)
def test_windows_that_cannot_be(given, message):
    with pytest.raises(UserError) as error:
        Windows.within(30, **given)
    assert str(error.value) == message


def test_a_model_that_hears_little_has_short_windows():
    windows = Windows.within(0.02, overlap=0.5)
    assert (windows.length, windows.hop) == (0.02, 0.01)
    assert Windows.within(10) == Windows(10, 10)
    assert Windows.within(10, hop=2.5) == Windows(10, 2.5)


FORMATS = [
    ("WAV", "PCM_16", 16_000, 1),
    ("WAV", "FLOAT", 44_100, 2),
    ("FLAC", "PCM_24", 8_000, 2),
    ("OGG", "VORBIS", 22_050, 1),
    ("MP3", None, 44_100, 1),
]


@pytest.mark.parametrize(("form", "subtype", "rate", "channels"), FORMATS)
def test_windows_read_in_one_pass_are_those_read_one_by_one(form, subtype, rate, channels):
    content = written(sound(7.3, rate, channels), rate, form, subtype)
    _, seconds = read_window(content, whole=True)
    windows = Windows(2.0, 0.7)
    starts = windows.starts(seconds)
    found = list(read_windows(content, 16_000, starts, windows.length))
    assert len(found) == len(starts)
    for start, wave in zip(starts, found):
        alone, _ = read_window(content, window=(start, windows.length))
        assert np.array_equal(wave, alone)
        if rate == 16_000:
            whole = read_audio(content)
            assert np.array_equal(wave, whole[round(start * rate) :][: 2 * rate])
    assert len(found[-1]) == pytest.approx(32_000, abs=1)


def test_windows_within_a_segment():
    content = written(sound(9, 8_000, 2), 8_000, "WAV")
    part = {"start": 8_000, "stop": 60_000, "unit": "samples", "channel": 1}
    wave, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    expected = wave[8_000:60_000, 1]
    starts = [0.0, 1.5, 4.5]
    for start, each in zip(starts, read_windows(content, rate, starts, 2.0, **part)):
        first = round(start * rate)
        assert np.array_equal(each, expected[first : first + 2 * rate])
        alone, seconds = read_window(content, rate, window=(start, 2.0), whole=True, **part)
        assert np.array_equal(each, alone) and seconds == 2.0
    first, seconds = read_window(content, rate, window=(6.0, 2.0), whole=True, **part)
    assert np.array_equal(first, expected[48_000:]) and seconds == 0.5
    with pytest.raises(UserError, match="ends before the 7 s that are passed over"):
        read_window(content, rate, window=(7.0, 2.0), **part)
    with pytest.raises(UserError, match="ends before the 6.5 s that are passed over"):
        list(read_windows(content, rate, [0.0, 6.5], 2.0, **part))


def test_a_broken_recording_is_an_error_where_it_is_reached():
    content = written(sound(3, 16_000), 16_000, "WAV")
    with pytest.raises(UserError, match="truncated"):
        list(read_windows(content[:-40_000], 16_000, [0.0, 2.0], 1.0))
    wave = sound(3, 16_000)[:, 0]
    wave[-1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        list(read_windows(wave, 16_000, [0.0, 2.0], 1.0))


@pytest.mark.parametrize("form", ["FLAC", pytest.param("MP3", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_recording(form, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK", 2**17)  # 16 seconds, so that few minutes are many blocks
    peaks = []
    for minutes in (3, 9):
        path = tmp_path / f"{minutes}.{form.lower()}"
        with soundfile.SoundFile(path, "w", 8_000, 1, format=form) as file:
            for _ in range(minutes):
                file.write(0.01 * sound(60, 8_000))
        starts = Windows(30, 15).starts(60 * minutes)
        next(read_windows(path, 16_000, starts, 30.0))  # what is imported and cached at first use
        tracemalloc.start()
        assert sum(1 for _ in read_windows(path, 16_000, starts, 30.0)) == len(starts)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
