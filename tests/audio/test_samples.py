"""Samples in memory: the scale of integers of any width, and what is refused because it is not certain."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Sequence, Value
from whisper_meft.audio import read_audio, read_window
from whisper_meft.data import load_examples
from whisper_meft.errors import UserError

WAVE = 0.3 * np.sin(np.arange(4_000) * 0.1)
SIXTEEN = np.round(WAVE * 2**15).astype(np.int16)


def bits(count: int) -> np.ndarray:
    return np.round(WAVE * 2.0 ** (count - 1)).astype(np.int64)


@pytest.mark.parametrize(
    "array",
    [
        SIXTEEN,
        SIXTEEN.tolist(),
        SIXTEEN.astype(np.int64),
        SIXTEEN.astype(np.int32),
        SIXTEEN.astype(np.float64),
        SIXTEEN.astype(np.float32).tolist(),
        torch.from_numpy(SIXTEEN).long(),
        torch.from_numpy(SIXTEEN).int()[None].repeat(2, 1),
        np.stack([SIXTEEN, SIXTEEN], axis=1).tolist(),
        (SIXTEEN.astype(np.int32) + 2**15).astype(np.uint16),
        bits(32).astype(np.int32),
        bits(32).tolist(),
        bits(24).astype(np.int32) << 8,
        (bits(32) >> 9 << 9).astype(np.int32),
    ],
)
def test_integers_of_any_width_are_the_wave_that_was_stored(array):
    assert np.abs(read_audio(array) - WAVE).max() < 1e-4


def test_a_quiet_recording_of_24_bits_in_the_upper_part_of_32_is_told_by_its_empty_low_bits():
    quiet = (bits(24).astype(np.int32) >> 8) << 8
    assert np.abs(quiet).max() < 2**23
    assert np.allclose(read_audio(quiet), WAVE / 256, atol=1e-6)


@pytest.mark.parametrize(
    "values, expected", [([-(2**15), 2**15], [-1, 1]), ([0, 0], [0, 0]), ([3], [3 / 2**15])]
)
def test_the_edges_of_16_bits(values, expected):
    assert np.array_equal(read_audio(values), np.array(expected, np.float32))


@pytest.mark.parametrize(
    "array, message",
    [
        (bits(24), "int64 samples from -251.* whose number of bits cannot be told: give them in the type"),
        (bits(24).astype(np.int32), "int32 samples .* cannot be told"),
        (bits(24).astype(np.float64), "float64 samples .* cannot be told"),
        ((bits(16) + 2**15).tolist(), "cannot be told"),
        ((bits(8) + 128).tolist(), "unsigned bytes must be given as uint8"),
        (bits(40), "int64 samples .* which no recording has"),
        (SIXTEEN.astype(np.uint32), "uint32 samples"),
        (WAVE * 1e12, "that is not audio, which lies in -1 to 1"),
        ([2**70, 1], "is not audio"),
    ],
)
def test_integers_whose_scale_is_not_certain_are_refused(array, message):
    with pytest.raises(UserError, match=f"clip 7 .*{message}"):
        read_audio(array, name="clip 7")


def test_the_scale_is_that_of_the_whole_clip_and_not_of_the_part_that_is_read():
    loud = bits(32)
    loud[:1_000] >>= 20
    assert np.abs(read_audio(loud, stop=1_000, unit="samples")).max() < 1e-6
    assert np.abs(read_window(loud, longest=1_000 / 16_000)[0]).max() < 1e-6


@pytest.mark.parametrize(
    "dtype, width", [("int8", 8), ("uint8", 8), ("int16", 16), ("int32", 32), ("int64", 16)]
)
def test_a_column_of_integers_is_scaled_by_the_type_that_it_was_stored_in(dtype, width):
    values = bits(width) + (128 if dtype == "uint8" else 0)
    audio = {"array": Sequence(Value(dtype)), "sampling_rate": Value("int32")}
    rows = [{"audio": {"array": values.tolist(), "sampling_rate": 16_000}, "label": "a"}]
    data = Dataset.from_list(rows, features=Features({"audio": audio, "label": Value("string")}))
    wave, rate = load_examples(data)[0].decode()
    assert rate == 16_000 and np.abs(wave - WAVE).max() < (0.01 if width == 8 else 1e-4)


def test_floats_that_look_like_integers_after_resampling_are_named(caplog):
    assert np.abs(read_audio(SIXTEEN * 1.001, name="clip 7")).max() > 9_000
    assert "clip 7 holds floats far outside -1 to 1, which are used as they are" in caplog.text
