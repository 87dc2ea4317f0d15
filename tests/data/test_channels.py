"""Hearing one channel of a recording."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from whisper_meft.audio import decode_audio, read_windows
from whisper_meft.audio.decoding import BLOCK
from whisper_meft.data import Example
from whisper_meft.errors import UserError

RATE = 16_000
SIDES = np.full((RATE, 2), [0.25, 0.5], np.float32)


def sources(folder) -> dict:
    """The same recording in each way that audio may come."""
    path = folder / "x.wav"
    soundfile.write(path, SIDES, RATE, subtype="FLOAT")
    samples = SimpleNamespace(data=SIDES.T, sample_rate=RATE)
    return {
        "file": path,
        "bytes": path.read_bytes(),
        "object": io.BytesIO(path.read_bytes()),
        "dict": {"array": SIDES.T, "sampling_rate": RATE},
        "decoder": SimpleNamespace(get_all_samples=lambda: samples),
    }


@pytest.mark.parametrize("kind", ["file", "bytes", "object", "dict", "decoder"])
@pytest.mark.parametrize("channel, value", [(None, 0.375), (0, 0.25), (1, 0.5)])
def test_one_channel_of_any_source(tmp_path, kind, channel, value):
    wave, rate = decode_audio(sources(tmp_path)[kind], 0.25, 0.75, channel=channel)
    assert rate == RATE and wave.shape == (RATE // 2,) and wave.dtype == np.float32
    assert np.all(wave == np.float32(value))
    if kind != "object":
        example = Example(sources(tmp_path)[kind], start=0.25, stop=0.75, channel=channel)
        assert np.array_equal(example.decode()[0], wave)


@pytest.mark.parametrize("kind", ["file", "bytes", "dict"])
@pytest.mark.parametrize(
    "level, alone", [(-1.0, True), (-0.98, True), (-0.7, False), (0.0, False), (1.0, False)]
)
def test_channels_that_cancel_each_other(tmp_path, kind, level, alone, caplog):
    """One of a balanced line whose other was soldered the wrong way round: their mean is silence."""
    left = 0.2 * np.random.default_rng(0).standard_normal(3 * RATE).clip(-4, 4).astype(np.float32)
    sides = np.stack([left, np.float32(level) * left], 1)  # [samples, channels]
    path = tmp_path / "x.wav"
    soundfile.write(path, sides, RATE, subtype="FLOAT")
    source = {"file": path, "bytes": path.read_bytes(), "dict": {"array": sides.T, "sampling_rate": RATE}}[
        kind
    ]
    expected = left if alone else sides.mean(axis=1)
    assert np.array_equal(decode_audio(source)[0], expected)
    assert ("has channels that cancel each other" in caplog.text) == alone
    assert np.array_equal(decode_audio(source, 0.5, 2.5)[0], expected[RATE // 2 : 5 * RATE // 2])
    windows = read_windows(source, RATE, [0.0, 1.0, 2.0], 1.0)
    assert np.array_equal(np.concatenate(list(windows)), expected)
    assert np.array_equal(decode_audio(source, channel=1)[0], sides[:, 1])


@pytest.mark.parametrize(
    "how", [{"format": "MP3"}, {"format": "OGG", "subtype": "OPUS"}, {"subtype": "PCM_U8"}]
)
def test_channels_that_cancel_each_other_but_for_what_coding_left(how):
    left = 0.04 * np.random.default_rng(0).standard_normal(3 * RATE).clip(-4, 4).cumsum() / 20
    left -= left.mean()
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([left, -left], 1), RATE, **{"format": "WAV", **how})
    alone = decode_audio(buffer.getvalue(), channel=0)[0]
    assert np.array_equal(decode_audio(buffer.getvalue())[0], alone)


def test_a_silent_channel_is_not_heard_in_place_of_two_that_cancel_each_other():
    left = np.random.default_rng(0).standard_normal(RATE)
    sides = np.stack([0 * left, left, -left])
    assert np.array_equal(decode_audio(sides, source_rate=RATE)[0], left.astype(np.float32))


def test_a_few_samples_behind_a_block_follow_it(tmp_path):
    """Of so few it cannot be told whether they cancel each other."""
    left = 0.1 * np.random.default_rng(0).standard_normal(BLOCK // 2 + 5).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", np.stack([left, -left], 1), RATE, subtype="FLOAT")
    assert np.array_equal(decode_audio(tmp_path / "x.wav")[0], left)
    sides = np.stack([left, 0.5 * left], 1)
    sides[-5:, 1] = -sides[-5:, 0]
    soundfile.write(tmp_path / "y.wav", sides, RATE, subtype="FLOAT")
    assert np.array_equal(decode_audio(tmp_path / "y.wav")[0], sides.mean(axis=1))


@pytest.mark.parametrize("kind", ["file", "dict"])
def test_a_channel_that_is_not_there(tmp_path, kind):
    source = sources(tmp_path)[kind]
    with pytest.raises(UserError, match="has 2 channels, channel 2 .from 0. is not there"):
        decode_audio(source, channel=2)
    mono = write_mono(tmp_path) if kind == "file" else {"array": SIDES[:, 0], "sampling_rate": RATE}
    assert len(decode_audio(mono, channel=0)[0]) == RATE
    with pytest.raises(UserError, match="has 1 channel, channel 1 .from 0. is not there"):
        decode_audio(mono, channel=1)


def write_mono(folder):
    soundfile.write(folder / "mono.wav", SIDES[:, 0], RATE, subtype="FLOAT")
    return folder / "mono.wav"


def test_the_channel_is_in_an_example_s_name():
    assert Example("x.wav", channel=1).name == "x.wav [channel 1]"
