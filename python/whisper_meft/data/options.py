"""How a source is to be read: the formats there are, and what the readers are told."""

from dataclasses import dataclass

FORMATS = ("audiofolder", "manifest", "speechbrain", "kaldi", "kespeech", "librispeech", "huggingface") + (
    "webdataset",
    "lhotse",
)

STREAMED = ("huggingface", "webdataset", "lhotse")  # those that are also read as they come

KESPEECH_PAPER_LABELS = ("Ji-Lu", "Jiang-Huai", "Jiao-Liao", "Lan-Yin", "Southwestern", "Zhongyuan")


@dataclass(frozen=True)
class Options:
    """What :func:`load_examples` passes to the readers."""

    audio_column: str | None = None
    label_column: str | None = None
    text_column: str | None = None
    speaker_column: str | None = None
    start_column: str | None = None
    stop_column: str | None = None
    channel_column: str | None = None
    layout: str | None = None
    data_root: str | None = None
    config: str | None = None
    cache_dir: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    split: str | None = None
    require_labels: bool = True
    with_text: bool = False  # transcripts are what is wanted, and labels are not looked for

    def columns(self) -> list[str]:
        """The names of columns that were given."""
        given = (
            self.audio_column,
            self.label_column,
            self.text_column,
            self.speaker_column,
            self.start_column,
            self.stop_column,
        )
        return [name for name in (*given, self.channel_column) if name is not None]
