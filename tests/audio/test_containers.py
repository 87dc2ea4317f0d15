"""Files that hold less or more than their headers say are read to the end or named, never read in part."""

import io
import struct

import numpy as np
import pytest
import soundfile
from whisper_meft.audio import decode_audio
from whisper_meft.errors import UserError

WAVE = 0.2 * np.random.default_rng(0).standard_normal(48_000)
PCM = (WAVE * 2**15).astype("<i2").tobytes()
FORMATS = [
    ("WAV", "PCM_16"),
    ("WAVEX", "PCM_24"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("CAF", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AIFF", "FLOAT"),
    ("AU", "PCM_16"),
    ("NIST", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
]


def encode(kind: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, 16_000, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("kind, subtype", FORMATS)
def test_a_cut_file_is_named_wherever_it_is_cut(kind, subtype):
    content = encode(kind, subtype)
    whole = decode_audio(content)[0]
    assert len(whole) == len(WAVE) or subtype == "IMA_ADPCM"
    for length in (len(content) // 2, len(content) * 9 // 10, len(content) - 1):
        with pytest.raises(UserError, match=r"^a\.x is truncated"):
            decode_audio(content[:length], name="a.x")
    if kind not in ("CAF",):  # of which libsndfile opens no part
        part = decode_audio(content[: len(content) * 9 // 10], stop=0.5)[0]
        assert np.array_equal(part, whole[:8_000])


@pytest.mark.parametrize("kind, subtype", FORMATS)
def test_joined_files_are_named(kind, subtype):
    content = encode(kind, subtype)
    with pytest.raises(
        UserError, match="a.x (is several recordings joined|holds .* more bytes than .*joined)"
    ):
        decode_audio(content + content, name="a.x")
    assert len(decode_audio(content + content, start=1.0, stop=2.0)[0]) == 16_000 if kind == "FLAC" else True


@pytest.mark.parametrize("kind, subtype", [each for each in FORMATS if each[0] not in ("W64", "NIST")])
@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), bytes(1_000)], ids=["ID3", "zeros"])
def test_a_tag_or_padding_at_the_end_is_no_audio(kind, subtype, tail):
    content = encode(kind, subtype)
    assert np.array_equal(decode_audio(content + tail)[0], decode_audio(content)[0])


def wav(size: int, before: bytes = b"", after: bytes = b"") -> bytes:
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    return b"RIFF\x24\0\0\0" + head + before + b"data" + struct.pack("<I", size) + PCM + after


LIST = b"LIST" + struct.pack("<I", 6) + b"INFO\0\0"


@pytest.mark.parametrize("before", [b"", LIST])
def test_a_wav_that_was_never_closed_is_read_and_named(tmp_path, before, caplog):
    path = tmp_path / "never.wav"
    path.write_bytes(wav(0, before))
    expected = np.frombuffer(PCM, "<i2") / np.float32(2**15)
    assert np.array_equal(decode_audio(path)[0], expected)
    assert f"{path} states no length (it was never finished); the 96000 bytes" in caplog.text
    assert np.array_equal(decode_audio(path, 1.0, 2.0)[0], expected[16_000:32_000])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_of_unknown_length_is_whole(size):
    assert len(decode_audio(wav(size))[0]) == len(WAVE)


def test_a_wav_whose_header_states_less_than_there_is_is_refused(caplog):
    with pytest.raises(
        UserError, match=r"a\.wav holds 95000 more bytes than the 1000 bytes .* never finished"
    ):
        decode_audio(wav(1_000), name="a.wav")
    assert len(decode_audio(wav(1_000), stop=500, unit="samples")[0]) == 500
    for after in (LIST, LIST[:7], LIST[:4] + b"\xff\xff\0\0" + LIST[8:]):
        assert len(decode_audio(wav(len(PCM), after=after))[0]) == len(WAVE)
    with pytest.raises(UserError, match="holds no samples"):
        decode_audio(wav(0)[:44] + LIST)
    assert not caplog.records


def flac(samples: int) -> bytes:
    content = bytearray(encode("FLAC", "PCM_16"))
    content[21:26] = bytes([content[21] & 0xF0 | samples >> 32]) + struct.pack(">I", samples & 0xFFFFFFFF)
    return bytes(content)


@pytest.mark.parametrize("samples", [0, 1, 20_000, 47_999])
def test_a_flac_is_read_to_the_end_of_its_frames(samples, caplog):
    wave = decode_audio(flac(samples), name="a.flac")[0]
    assert np.array_equal(wave, decode_audio(flac(len(WAVE)))[0])
    assert np.array_equal(decode_audio(flac(samples), 30_000, 31_000, unit="samples")[0], wave[30_000:31_000])
    assert ("a.flac states a length" in caplog.text) == (samples > 0)
    with pytest.raises(UserError, match="truncated"):
        decode_audio(flac(samples)[:-1_000])


@pytest.mark.parametrize("samples", [48_001, 2**35])
def test_a_flac_that_promises_more_than_its_frames_is_named(samples):
    with pytest.raises(UserError, match="is truncated or damaged: the .* that its header promises"):
        decode_audio(flac(samples))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_without_its_last_pages_is_named(subtype, caplog):
    content = encode("OGG", subtype)
    pages = [i for i in range(len(content)) if content[i : i + 4] == b"OggS"]
    wave = decode_audio(content[: pages[-1]], name=f"{subtype}.ogg")[0]
    assert 0 < len(wave) < len(WAVE) and f"{subtype}.ogg has no end mark" in caplog.text
    with pytest.raises(UserError, match="is damaged: pages are missing"):
        decode_audio(content[: pages[-3]] + content[pages[-2] :])
    with pytest.raises(UserError, match="is damaged: byte .* should begin an Ogg page"):
        decode_audio(content[: pages[-2]] + b"xyz" + content[pages[-2] :])


@pytest.mark.parametrize("samples", [1, 16, 4_095, 4_097, 200_000])
def test_a_flac_of_silence_has_the_shortest_frames_and_is_whole(samples):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(samples), 16_000, format="FLAC")
    content = bytearray(buffer.getvalue())
    assert len(decode_audio(bytes(content))[0]) == samples
    content[22:26] = bytes(4)
    assert len(decode_audio(bytes(content))[0]) == samples
