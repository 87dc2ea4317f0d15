"""Reading audio: any source that a user may hold becomes a float32 mono waveform at one sampling rate.

Decoding is libsndfile's (WAV, FLAC, OGG Vorbis and Opus, MP3, AIFF, NIST SPHERE and more) through soundfile,
resampling is soxr's. torchcodec is never needed; a decoder object of its kind is read when one is passed.
"""

from .reading import VERSION, decode_audio, describe_source, read_audio, read_window, read_windows
from .suffixes import READABLE_SUFFIXES, UNREADABLE_SUFFIXES

__all__ = [
    "READABLE_SUFFIXES",
    "UNREADABLE_SUFFIXES",
    "VERSION",
    "decode_audio",
    "describe_source",
    "read_audio",
    "read_window",
    "read_windows",
]
