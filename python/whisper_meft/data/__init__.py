"""Data: audio files, the layouts they come in, rules for sets of examples, log-mel features and batches."""

from ..audio import read_audio
from .checking import check_audio, describe_bad
from .dataset import Collator, SpeechDataset
from .examples import (
    DatasetCell,
    Example,
    ExampleSet,
    check_known_labels,
    check_labelled,
    check_transcribed,
    label_inventory,
    split_by_speaker,
    warn_on_shared_audio,
    warn_on_shared_speakers,
)
from .features import check_feature_extractor, log_mel, true_frames, window_of
from .folders import list_audio_files
from .readers import list_splits, load_examples, load_shards
from .streaming import ShardedExamples, Stream, StreamedBatches
from .transcripts import TranscriptTokens
from .windows import cut_into_windows

__all__ = [
    "Collator",
    "DatasetCell",
    "Example",
    "ExampleSet",
    "ShardedExamples",
    "SpeechDataset",
    "Stream",
    "StreamedBatches",
    "TranscriptTokens",
    "check_audio",
    "check_feature_extractor",
    "check_known_labels",
    "check_labelled",
    "check_transcribed",
    "cut_into_windows",
    "describe_bad",
    "label_inventory",
    "list_audio_files",
    "list_splits",
    "load_examples",
    "load_shards",
    "log_mel",
    "read_audio",
    "split_by_speaker",
    "true_frames",
    "warn_on_shared_audio",
    "warn_on_shared_speakers",
    "window_of",
]
