"""Hearing one channel of a recording."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from whisper_meft.audio import decode_audio
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
