"""Reading audio: every format, depth, rate and channel count, segments, and broken files."""

import io
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper_meft.audio import decode_audio, read_audio
from whisper_meft.errors import UserError

TONE = 440.0


def tone(rate: int, seconds: float = 1.0, frequency: float = TONE) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return 0.2 * np.random.default_rng(seed).standard_normal(samples).clip(-4, 4)


def write(path, wave: np.ndarray, rate: int = 16_000, **how):
    soundfile.write(path, wave, rate, **how)
    return path


def peak_frequency(wave: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 1 << 18))
    return spectrum.argmax() * rate / (1 << 18)


def file_bytes(wave: np.ndarray, rate: int = 16_000, **how) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, **{"format": "WAV", **how})
    return buffer.getvalue()


WAV_CASES = [
    (rate, channels, subtype)
    for rate in (8_000, 16_000, 22_050, 44_100, 48_000)
    for channels, subtype in (
        (1, "PCM_16"),
        (2, "PCM_24"),
        (6, "PCM_U8"),
        (1, "PCM_32"),
        (2, "FLOAT"),
        (1, "DOUBLE"),
    )
]


@pytest.mark.parametrize("rate, channels, subtype", WAV_CASES)
def test_wav_of_any_rate_depth_and_channels_keeps_its_tone(tmp_path, rate, channels, subtype):
    wave = tone(rate)
    path = write(tmp_path / "a.wav", np.stack([wave] * channels, axis=1), rate, subtype=subtype)
    read = read_audio(path)
    assert read.dtype == np.float32 and read.ndim == 1
    assert abs(len(read) - 16_000) <= 1
    assert abs(peak_frequency(read, 16_000) - TONE) < 0.5
    inner = slice(800, -800)  # the ends ring where a resampler meets the cut tone
    error = np.abs(read[inner] - tone(16_000)[: len(read)][inner]).max()
    assert error < (0.01 if subtype == "PCM_U8" else 1e-3)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize(
    "suffix, how",
    [
        ("flac", {"subtype": "PCM_16"}),
        ("flac", {"subtype": "PCM_24"}),
        ("ogg", {}),
        ("opus", {"format": "OGG", "subtype": "OPUS"}),
        ("mp3", {}),
        ("aiff", {}),
        ("au", {}),
    ],
)
def test_compressed_formats(tmp_path, rate, suffix, how):
    if suffix == "opus" and rate == 44_100:
        rate = 48_000  # Opus has no 44.1 kHz
    path = write(tmp_path / f"a.{suffix}", np.stack([tone(rate), tone(rate)], axis=1), rate, **how)
    read = read_audio(path)
    assert abs(len(read) - 16_000) <= 1
    assert abs(peak_frequency(read, 16_000) - TONE) < 0.5
    assert np.sqrt(np.mean(read[800:-800] ** 2)) == pytest.approx(0.4 / np.sqrt(2), rel=0.05)


def test_downsampling_does_not_alias_and_upsampling_adds_nothing():
    high = tone(48_000, frequency=11_000.0)  # above the 8 kHz that 16 kHz sampling can hold
    assert np.abs(read_audio(high, source_rate=48_000)[800:-800]).max() < 1e-3
    low = read_audio(tone(8_000, frequency=1_000.0), source_rate=8_000)
    spectrum = np.abs(np.fft.rfft(low * np.hanning(len(low))))
    above = spectrum[len(spectrum) * 9 // 16 :]  # over 4.5 kHz: images of the tone would stand at 7 kHz
    assert above.max() < 1e-3 * spectrum.max()


def test_channels_are_averaged(tmp_path):
    left, right = noise(4_000, 1), noise(4_000, 2)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    assert np.allclose(read_audio(path), (left + right) / 2, atol=1e-6)


def test_every_kind_of_source_gives_the_same_samples(tmp_path):
    wave = noise(3_000).astype(np.float32)
    path = write(tmp_path / "a.wav", wave, subtype="FLOAT")
    content = path.read_bytes()
    decoder = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(wave)[None], sample_rate=16_000)
    )
    sources = [
        path,
        str(path),
        content,
        bytearray(content),
        memoryview(content),
        io.BytesIO(content),
        {"path": str(path), "bytes": None},
        {"path": "elsewhere.wav", "bytes": content},
        {"array": wave, "sampling_rate": 16_000},
        {"raw": wave.tolist(), "sampling_rate": 16_000},
        wave,
        wave.astype(np.float64),
        torch.from_numpy(wave),
        torch.from_numpy(wave).double()[None],
        np.stack([wave, wave]),
        np.stack([wave, wave], axis=1),
        decoder,
    ]
    for source in sources:
        assert np.allclose(read_audio(source), wave, atol=1e-7), source
    with open(path, "rb") as file:
        assert np.array_equal(read_audio(file), wave)
    assert np.allclose(read_audio(torch.from_numpy(wave).bfloat16()), wave, atol=0.01)


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.array([0, 16384, -32768], np.int16), [0, 0.5, -1]),
        (np.array([128, 192, 0], np.uint8), [0, 0.5, -1]),
        (np.array([0, 2**30, -(2**31)], np.int32), [0, 0.5, -1]),
        (torch.tensor([0, 16384, -32768], dtype=torch.int16), [0, 0.5, -1]),
    ],
)
def test_integers_are_scaled(array, expected):
    assert np.array_equal(read_audio(array), np.array(expected, np.float32))


def test_source_rate_of_arrays():
    assert len(read_audio(noise(8_000), source_rate=8_000)) == 16_000
    assert len(read_audio({"array": noise(8_000), "sampling_rate": 8_000})) == 16_000
    assert len(read_audio(noise(8_000))) == 8_000
    assert len(read_audio(noise(8_000), sampling_rate=8_000)) == 8_000


# --- segments ---


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus", "mp3"])
@pytest.mark.parametrize("wave", [tone(16_000, 2.0), noise(32_000)], ids=["tone", "noise"])
def test_a_segment_is_that_part_of_the_whole(tmp_path, suffix, wave):
    how = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    path = write(tmp_path / f"a.{suffix}", wave, **how)
    whole = read_audio(path)
    for start, stop in ((0.0, 0.25), (0.5, 1.0), (1.75, None), (None, 0.1), (1.5, 99.0)):
        part = whole[round((start or 0) * 16_000) : None if stop is None else round(stop * 16_000)]
        assert np.array_equal(read_audio(path, start=start, stop=stop), part), (start, stop)
    assert np.array_equal(read_audio(path, start=100, stop=612, unit="samples"), whole[100:612])


@pytest.mark.parametrize(
    "subtype, seconds, rate",
    [("VORBIS", 3, 16_000), ("VORBIS", 9, 16_000), ("VORBIS", 3, 44_100), ("OPUS", 3, 48_000)],
)
def test_a_segment_near_the_end_of_ogg_is_in_its_place(subtype, seconds, rate):
    content = file_bytes(noise(seconds * rate), rate, format="OGG", subtype=subtype)
    whole = decode_audio(content)[0]
    for start in (0.25, *(seconds - left for left in (0.5, 0.375, 0.25, 0.125))):
        part = decode_audio(content, start, start + 0.1)[0]
        assert len(part) == rate // 10
        assert np.array_equal(part, whole[round(start * rate) :][: len(part)])
        assert np.array_equal(part, decode_audio(content, window=(start, 0.1))[0])


def test_a_segment_in_samples_counts_at_the_files_own_rate(tmp_path):
    path = write(tmp_path / "a.wav", noise(8_000), 8_000)
    wave, rate = decode_audio(path, 1_000, 3_000, unit="samples")
    assert rate == 8_000 and len(wave) == 2_000
    assert len(read_audio(path, start=1_000, stop=3_000, unit="samples")) == 4_000
    assert len(read_audio({"array": noise(8_000), "sampling_rate": 8_000}, start=0.25, stop=0.5)) == 4_000


@pytest.mark.parametrize("suffix", ["flac", "ogg"])
def test_a_segment_of_a_long_file_is_read_without_the_rest(suffix, tmp_path, monkeypatch):
    path = str(tmp_path / f"long.{suffix}")
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:  # Vorbis takes no minute at once
        for second in range(60):
            file.write(noise(16_000, second))
    whole = read_audio(path)
    frames = []
    read = soundfile.SoundFile.read

    def counting(self, *args, **kwargs):
        block = read(self, *args, **kwargs)
        frames.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    for start in (1, 20.0001, 29.95, 31, 45, 58.99):
        part = read_audio(path, start=start, stop=start + 1.0)
        assert np.array_equal(part, whole[round(start * 16_000) :][:16_000])
        # Of Vorbis the last half minute is decoded from its beginning.
        before = max(0, start - 30) if suffix == "ogg" else 0
        assert sum(frames) == round((before + 1) * 16_000)
        frames.clear()


def test_long_audio_is_put_together_from_blocks(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", np.stack([noise(10_000, 1), noise(10_000, 2)], axis=1))
    whole = read_audio(path)
    monkeypatch.setattr("whisper_meft.audio.decoding.BLOCK", 999)
    assert len(whole) == 10_000 and np.array_equal(read_audio(path), whole)
    assert np.array_equal(read_audio(path, start=0.1, stop=0.3), whole[1_600:4_800])


@pytest.mark.parametrize(
    "start, stop, message",
    [
        (0.5, 0.5, "empty"),
        (0.5, 0.2, "empty"),
        (2.0, None, "begins at 2.00 s, the audio ends at 1.00 s"),
        (1.0, 1.5, "begins at 1.00 s"),
        (-1.0, None, "0 or more"),
        (float("nan"), None, "0 or more"),
        (0.0, float("nan"), "stop a number"),
        (0.0, 1e-6, "holds no sample"),
        ("a", None, "numbers"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "array"])
def test_bad_segments(tmp_path, start, stop, message, kind):
    source = write(tmp_path / "one second.wav", noise(16_000)) if kind == "file" else noise(16_000)
    with pytest.raises(UserError, match=message) as error:
        read_audio(source, start=start, stop=stop)
    assert ("one second.wav" in str(error.value)) == (kind == "file")


# --- files that are not what they claim ---


def broken_files(folder) -> dict:
    """Path to the words that must be in the message."""
    wave = noise(16_000)
    whole = file_bytes(wave)
    contents = {
        "empty.wav": (b"", "is empty"),
        "header only.wav": (whole[:44], "truncated"),
        "half header.wav": (whole[:20], "cannot be read as audio"),
        "no samples.wav": (file_bytes(wave[:0]), "holds no samples"),
        "half.wav": (whole[: len(whole) // 2], "truncated: its header promises 32000 bytes of audio, 1"),
        "half.aiff": (file_bytes(wave, format="AIFF")[:9_000], "truncated"),
        "half.au": (file_bytes(wave, format="AU")[:9_000], "truncated"),
        "half.flac": (file_bytes(wave, format="FLAC")[:9_000], "cannot be read as audio|truncated"),
        "half.ogg": (file_bytes(wave, format="OGG")[:3_000], "cannot be read as audio|truncated"),
        "half.mp3": (file_bytes(wave, format="MP3")[:2_000], "truncated or damaged"),
        "text.mp3": (b"this is text\n" * 10_000, "cannot be read as audio"),
        "text.wav": (b"this is text\n", "cannot be read as audio"),
        "random.flac": (np.random.default_rng(0).bytes(5_000), "cannot be read as audio"),
        "zeros.ogg": (bytes(5_000), "cannot be read as audio"),
        "phone.m4a": (b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(500), "m4a.*ffmpeg"),
        "browser.webm": (b"\x1aE\xdf\xa3" + bytes(500), "WebM.*ffmpeg"),
        "voice.amr": (b"#!AMR\n" + bytes(500), "AMR.*ffmpeg"),
        "pointer.wav": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "samples.raw": (bytes(5_000), "no header"),
        "nan.wav": (file_bytes(np.r_[wave, np.nan], subtype="FLOAT"), "not finite"),
        "inf.wav": (file_bytes(np.r_[wave, np.inf], subtype="DOUBLE"), "not finite"),
        "huge.wav": (file_bytes(np.r_[wave, 1e300], subtype="DOUBLE"), "not finite"),
        "slow.wav": (file_bytes(wave, 10), "sampling rate of 10 Hz"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.wav").mkdir()
    (folder / "dangling.wav").symlink_to(folder / "gone.wav")
    return {folder / name: words for name, (_, words) in contents.items()} | {
        folder / "folder.wav": "is a folder",
        folder / "missing.wav": "does not exist",
        folder / "dangling.wav": "link to a file that does not exist",
    }


def test_broken_files_are_named_with_their_reason(tmp_path):
    for path, words in broken_files(tmp_path).items():
        with pytest.raises(UserError, match=f"(?s){words}") as error:
            read_audio(path)
        assert str(error.value).startswith(str(path)), path
        assert "\n" not in str(error.value)


def test_broken_bytes_have_a_reason_too(tmp_path):
    for path in broken_files(tmp_path):
        if path.is_file() and path.suffix != ".raw":  # that one is told by its name
            with pytest.raises(UserError) as error:
                read_audio({"path": path.name, "bytes": path.read_bytes()})
            assert str(error.value).startswith(path.name)


def test_a_good_segment_of_a_truncated_file_is_read(tmp_path):
    whole = file_bytes(noise(16_000))
    (tmp_path / "half.wav").write_bytes(whole[: len(whole) // 2])
    assert np.array_equal(read_audio(tmp_path / "half.wav", stop=0.25), read_audio(whole, stop=0.25))
    with pytest.raises(UserError, match="truncated"):
        read_audio(tmp_path / "half.wav", start=0.25, stop=0.75)


def test_a_wav_written_to_a_pipe_has_no_length_and_is_whole():
    whole = bytearray(file_bytes(noise(16_000)))
    whole[4:8] = whole[40:44] = b"\xff\xff\xff\xff"
    assert np.array_equal(read_audio(bytes(whole)), read_audio(file_bytes(noise(16_000))))


def test_an_mp3_without_a_length_tag_is_not_called_truncated():
    how = {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.5}
    content = file_bytes(noise(16_000 * 3), **how)
    with pytest.raises(UserError, match="truncated or damaged"):
        read_audio(content[: len(content) // 2])
    for tag in (b"Xing", b"Info"):
        content = content.replace(tag, bytes(4))
    whole, half = read_audio(content), read_audio(content[: len(content) // 2])
    assert 20_000 < len(half) < 28_000 < 48_000 <= len(whole)


def test_a_damaged_header_cannot_ask_for_terabytes(tmp_path):
    content = bytearray(file_bytes(noise(16_000), format="FLAC"))
    assert content[:4] == b"fLaC"
    content[21] |= 0x0F  # the 36 bits of the total number of samples
    content[22:26] = b"\xff" * 4
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(UserError, match="a.flac"):
        read_audio(tmp_path / "a.flac")


@pytest.mark.parametrize(
    "source, message",
    [
        (3, "is not audio"),
        (None, "is not audio"),
        (np.array(["a"]), "is not audio"),
        (np.zeros((2, 3, 4)), "is not audio"),
        (np.zeros(4, complex), "is not audio"),
        (np.zeros(4, bool), "is not audio"),
        ([[1.0, 2.0], [3.0]], "not an array"),
        (np.zeros(0), "no samples"),
        (np.array([0.0, np.nan]), "not finite"),
        (np.array([0.0, 1e300]), "not finite"),
        ({}, "needs `bytes`"),
        ({"path": None, "bytes": None}, "needs `bytes`"),
        ({"array": [0.0, 1.0]}, "sampling_rate"),
        ({"array": [0.0, 1.0], "sampling_rate": "fast"}, "sampling rate of 'fast'"),
        ({"array": [0.0, 1.0], "sampling_rate": 0}, "sampling rate of 0"),
        (b"", "is empty"),
        ("", "does not exist"),
        (io.StringIO("text"), "binary mode"),
    ],
)
def test_sources_that_are_no_audio(source, message):
    with pytest.raises(UserError, match=message):
        read_audio(source)


@pytest.mark.parametrize("rate", [0, -1, 16_000.5, "16000", None, True])
def test_bad_target_rates(rate):
    with pytest.raises(UserError, match="sampling_rate must be a positive integer"):
        read_audio(noise(100), sampling_rate=rate)


def test_a_closed_file_and_a_decoder_that_fails():
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(UserError, match="cannot read"):
        read_audio(closed)

    def fail():
        raise RuntimeError("no frames")

    with pytest.raises(UserError, match="cannot decode.*no frames"):
        read_audio(SimpleNamespace(get_all_samples=fail))


def test_one_sample_is_audio_unless_resampling_leaves_none():
    assert len(read_audio(np.array([0.5]))) == 1
    with pytest.raises(UserError, match="too short"):
        read_audio(np.array([0.5]), source_rate=192_000)


@pytest.mark.parametrize("name", ["späte Grüße 北京 .wav", "a b.wav", "-dash.wav", "%s{0}.wav"])
def test_odd_names(tmp_path, name):
    path = write(tmp_path / name, noise(1_000))
    assert len(read_audio(path)) == 1_000
    link = tmp_path / f"link to {name}"
    os.symlink(path, link)
    assert len(read_audio(link)) == 1_000


def test_reading_from_threads_gives_each_its_own(tmp_path):
    paths = [write(tmp_path / f"{i}.flac", noise(8_000, i)) for i in range(16)]
    expected = [read_audio(path) for path in paths]
    found = [None] * len(paths)

    def work(first):
        for i in range(first, len(paths), 4):
            found[i] = read_audio(paths[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=200),
    head=st.sampled_from([b"", b"RIFF\x40\0\0\0WAVEfmt ", b"fLaC\0\0\0\x22", b"OggS\0"]),
)
def test_arbitrary_bytes_never_raise_anything_else(content, head):
    try:
        wave = read_audio(head + content)
    except UserError:
        return
    assert wave.dtype == np.float32 and len(wave) and np.isfinite(wave).all()


@settings(max_examples=60, deadline=None)
@given(
    position=st.integers(0, 2_000),
    value=st.integers(0, 255),
    kind=st.sampled_from(["WAV", "FLAC", "OGG", "MP3"]),
)
def test_a_damaged_byte_never_raises_anything_else(position, value, kind):
    content = bytearray(file_bytes(noise(4_000), format=kind))
    content[position % len(content)] = value
    try:
        wave = read_audio(bytes(content))
    except UserError:
        return
    assert len(wave) and np.isfinite(wave).all()
