"""A tiny random Whisper that transcribes, with all that a published one has beside its weights."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from tokens_fixtures import spelling_tokenizer
from training_fixtures import make_backbone
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

RATE = 16_000


def noise(path: Path, seconds: float, seed: int = 0) -> Path:
    """Writes a clip of noise that rises and falls."""
    generator = np.random.default_rng(seed)
    loudness = np.repeat(generator.uniform(0.01, 0.3, int(seconds * 20) + 1), RATE // 20)
    soundfile.write(
        path, generator.standard_normal(round(seconds * RATE)) * loudness[: round(seconds * RATE)], RATE
    )
    return path


def make_recogniser(folder: Path, multilingual: bool = True, seed: int = 3, **changes) -> Path:
    """Writes a random Whisper with a window of a second (or that of ``max_source_positions``) that says up to
    20 letters, and a tokenizer that spells. Text depends on the sound, and many a text breaks off."""
    tokenizer = spelling_tokenizer(None, None, multilingual)
    id_of = tokenizer.convert_tokens_to_ids
    end, first = tokenizer.eos_token_id, id_of("<|notimestamps|>") + 1
    ids = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end}
    ids["decoder_start_token_id"] = id_of("<|startoftranscript|>")
    sizes = {"max_target_positions": 24, "decoder_layers": 2, "init_std": 0.6, **ids, **changes}
    # Behind the tokenizer's own tokens those of the times in the window.
    sizes["vocab_size"] = first + 1 + sizes.get("max_source_positions", 50)
    make_backbone(folder, **sizes)
    torch.manual_seed(seed)
    whisper = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(folder))
    known = {"no_timestamps_token_id": first - 1, "is_multilingual": multilingual, **ids}
    known["max_length"] = sizes["max_target_positions"]
    if multilingual:
        known["lang_to_id"] = {f"<|{code}|>": id_of(f"<|{code}|>") for code in LANGUAGES}
        known["task_to_id"] = {task: id_of(f"<|{task}|>") for task in ("transcribe", "translate")}
    # A trained one generates neither what is no text nor halves of letters.
    letters = {id_of(letter) for letter in [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]}
    known["suppress_tokens"] = [i for i in range(first - 1) if i not in letters and i != end]
    whisper.generation_config = GenerationConfig(**known)
    whisper.save_pretrained(folder)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return folder
