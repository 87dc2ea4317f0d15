"""A Whisper tokenizer that spells every byte, with Whisper's own marks: no vocabulary is downloaded."""

from tokenizers import pre_tokenizers
from transformers import AddedToken, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES


def spelling_tokenizer(
    language: str | None = "dutch",
    task: str | None = "transcribe",
    multilingual: bool = True,
    unused: int = 0,
) -> WhisperTokenizer:
    """Ids 0 to 255 are bytes, ``unused`` ones follow, then ``<|endoftext|>`` and the other marks in Whisper's
    order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    languages = [f"<|{code}|>" for code in LANGUAGES] if multilingual else []
    marks = ["<|startoftranscript|>", *languages, "<|translate|>", "<|transcribe|>"]
    marks += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    letters += [f"unused {number}" for number in range(unused)]
    tokenizer = WhisperTokenizer(
        vocab={letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}, merges=[]
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(mark, normalized=False, special=True) for mark in marks]}
    )
    tokenizer.set_prefix_tokens(language=language, task=task)
    return tokenizer
