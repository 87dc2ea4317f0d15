"""MP3 is read to its true end: without a tag, with a wrong one, joined, with tags and junk around it."""

import io
import struct

import numpy as np
import pytest
import soundfile
from whisper_meft.audio import decode_audio, read_window
from whisper_meft.audio.mpeg import survey
from whisper_meft.errors import UserError

RATE = 16_000


def encode(wave: np.ndarray, rate: int = RATE, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([wave] * channels, axis=1), rate, format="MP3", bitrate_mode="VARIABLE")
    return buffer.getvalue()


def noise(samples: int) -> np.ndarray:
    """Quiet at first, so that a guess from the first frames is far too short or too long."""
    wave = 0.2 * np.random.default_rng(0).standard_normal(samples)
    wave[: samples // 2] *= 1e-3
    return wave


LONG, SHORT = noise(4 * RATE), 0.3 * np.sin(np.arange(2 * RATE) * 0.1)
CONTENT, SECOND = encode(LONG), encode(SHORT)
FOUND = survey(io.BytesIO(CONTENT), "x")
BARE = CONTENT[FOUND.runs[0][0] :]  # the frames without the tag
FRAME = FOUND.first.samples
TAG = next(CONTENT.find(word) for word in (b"Xing", b"Info") if word in CONTENT)
ID3 = b"ID3\4\0\0" + bytes([0, 0, 40, 0]) + CONTENT[400:404] * 1_280  # frames' heads inside are none
JUNK = bytes(range(200)) * 30


def stating(frames: int) -> bytes:
    content = bytearray(CONTENT)
    content[TAG + 8 : TAG + 12] = struct.pack(">I", frames)
    return bytes(content)


def guess(content: bytes) -> int:
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        return file.frames


def test_the_encoder_and_its_decoder_behave_as_these_tests_need():
    assert FOUND.tags[0].frames == FOUND.count and FOUND.tags[0].delay > 0
    assert guess(CONTENT) == len(LONG) and guess(BARE) < 0.8 * FOUND.count * FRAME


@pytest.mark.parametrize(
    "channels, rate", [(1, 8_000), (2, 16_000), (1, 22_050), (2, 32_000), (1, 44_100), (2, 48_000)]
)
def test_without_a_tag_every_frame_is_read(channels, rate):
    content = encode(LONG, rate, channels)
    found = survey(io.BytesIO(content), "x")
    bare = content[found.runs[0][0] :]
    wave, read_rate = decode_audio(bare)
    assert read_rate == rate and len(wave) == found.count * found.first.samples
    # The same sound as behind the tag, which takes the encoder's and the decoder's delay off.
    late = found.tags[0].delay + 529
    whole = decode_audio(content)[0]
    assert len(whole) == len(LONG)
    assert np.abs(wave[late:][: len(LONG) - 2_000] - whole[: len(LONG) - 2_000]).max() < 1e-5


@pytest.mark.parametrize("start, stop", [(0, 300), (500, 5_000), (40_000, 41_000), (60_000, None)])
@pytest.mark.parametrize("content", [BARE, stating(FOUND.count // 2), CONTENT + SECOND, CONTENT], ids="abcd")
def test_a_segment_is_that_part_of_the_whole(content, start, stop):
    whole = decode_audio(content)[0]
    part = decode_audio(content, start, stop, unit="samples")[0]
    assert len(part) and np.array_equal(part, whole[start:stop])


@pytest.mark.parametrize("frames", [0, 1, FOUND.count // 2, FOUND.count - 1])
def test_a_tag_that_states_too_little_is_not_believed(frames):
    assert np.allclose(decode_audio(stating(frames))[0], decode_audio(CONTENT)[0], atol=1e-6)


@pytest.mark.parametrize("frames", [FOUND.count + 1, 3 * FOUND.count])
def test_a_tag_that_states_more_than_there_is_tells_of_a_cut(frames):
    with pytest.raises(UserError, match=r"x\.mp3 is truncated or damaged: 4\..* are there of the "):
        decode_audio(stating(frames), name="x.mp3")
    assert len(decode_audio(stating(frames), stop=1.0)[0]) == RATE


@pytest.mark.parametrize("between", [b"", ID3, JUNK, ID3 + JUNK, b"TAG" + bytes(125)])
@pytest.mark.parametrize("first", [CONTENT, BARE], ids=["tagged", "bare"])
def test_joined_files_are_read_to_the_end(first, between):
    wave = decode_audio(first + between + SECOND)[0]
    both = len(decode_audio(first)[0]) + len(SHORT)
    assert both <= len(wave) <= both + 5 * FRAME
    tail = decode_audio(SECOND)[0][-RATE:]
    ends = len(wave) - (0 if first is CONTENT else survey(io.BytesIO(SECOND), "x").tags[0].padding - 529)
    assert np.abs(wave[ends - RATE : ends] - tail)[: RATE - FRAME].max() < 1e-3


@pytest.mark.parametrize(
    "around",
    [
        lambda c: ID3 + c,
        lambda c: ID3 + ID3 + c,
        lambda c: c + b"TAG" + bytes(125),
        lambda c: c + JUNK,
        lambda c: c + bytes(3_000),
        lambda c: c + b"APETAGEX" + struct.pack("<IIII", 2_000, 60, 1, 1 << 29) + bytes(1_976 + 32),
    ],
)
def test_tags_and_junk_around_the_frames_change_nothing(around):
    for content in (CONTENT, BARE):
        assert np.allclose(decode_audio(around(content))[0], decode_audio(content)[0], atol=1e-6)


def test_a_cut_file_is_named(caplog):
    with pytest.raises(UserError, match="cut.mp3 is truncated or damaged"):
        decode_audio(CONTENT[: len(CONTENT) // 2], name="cut.mp3")
    cut = len(BARE) - 10
    wave = decode_audio(BARE[:cut], name="bare cut.mp3")[0]
    assert "bare cut.mp3 ends within a frame" in caplog.text
    assert np.array_equal(wave, decode_audio(BARE)[0][: len(wave)])
    decode_audio(BARE[:cut], name="bare cut.mp3")
    assert len(caplog.records) == 1
    decode_audio(BARE + JUNK + BARE, name="hole.mp3")
    assert "hole.mp3 has 6000 bytes in the middle that are no MP3" in caplog.text


@pytest.mark.parametrize(
    "rate, channels, words", [(24_000, 1, "24000 Hz mono"), (RATE, 2, "16000 Hz stereo")]
)
def test_joined_files_of_two_kinds_are_refused(rate, channels, words):
    with pytest.raises(UserError, match=f"x.mp3 changes after 4.* s from 16000 Hz mono to {words}.*ffmpeg"):
        decode_audio(CONTENT + encode(SHORT, rate, channels), name="x.mp3")


def test_a_window_of_a_long_file_is_found_without_counting_all_of_it(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "whisper_meft.audio.mpeg.survey",
        lambda *arguments: seen.append(survey(*arguments)) or seen[-1],
    )
    wave, seconds = read_window(BARE * 4, longest=0.5)
    assert len(wave) == 8_000 and seconds == 0.5
    assert len(seen) == 1 and not seen[0].whole and seen[0].count < FOUND.count
    assert read_window(BARE * 4, longest=0.5, whole=True)[1] * RATE == 4 * FOUND.count * FRAME
