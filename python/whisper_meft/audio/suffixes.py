"""File names that are known to be audio."""

READABLE_SUFFIXES = frozenset(
    (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd")
    + (".sph", ".nist", ".caf", ".w64", ".rf64")
)

# Known to be audio, and not read by libsndfile: listed so that they are reported instead of passed over.
UNREADABLE_SUFFIXES = frozenset(
    [".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".wma", ".amr", ".3gp", ".ac3", ".ape"]
)
