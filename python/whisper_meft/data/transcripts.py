"""Transcripts as the decoder's tokens."""

from dataclasses import dataclass
from typing import Any

from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ..errors import UserError
from .examples import Example, ExampleSet, check_transcribed

# <|endoftext|> of the published English-only models, whose tokenizer has all languages' tokens nevertheless;
# that of the others is the next.
_ENGLISH_ONLY = 50256


@dataclass(frozen=True)
class TranscriptTokens:
    """What the decoder reads and what it is to say for a transcript; picklable.

    For the prompt ``<|startoftranscript|><|nl|><|transcribe|><|notimestamps|>`` and a transcript of n tokens

        decoder_input_ids   prompt, n tokens
        labels              -100 for all of the prompt but its last, n tokens, <|endoftext|>

    so that ``labels[i]`` is what follows ``decoder_input_ids[i]``, and the prompt is not in the loss
    (Radford et al. 2023, section 2.3).

    Args:
        tokenizer: a ``WhisperTokenizer`` whose ``language`` and ``task`` are set, where it has languages.
        longest: positions that the decoder has (``config.max_target_positions``).
        leading_space: whether a transcript begins with a space, as pretrained Whisper writes it in languages
            with spaces between words: where it should go on writing so, the first word is then no surprise.

    Raises:
        UserError: the tokenizer has a language set and no token for it, or is that of the published
            English-only models and has a language or a task set.
    """

    tokenizer: Any
    longest: int = 448
    leading_space: bool = False

    def __post_init__(self):
        said = self.tokenizer.language
        if self.end == _ENGLISH_ONLY and (said, self.tokenizer.task) != (None, None):
            raise UserError(
                f"the tokenizer has language={said!r} and task={self.tokenizer.task!r} set, and is that of "
                "the English-only Whispers, whose prompt names neither: set both to None"
            )
        # The tokenizer counts the language's place from <|startoftranscript|>, whatever stands there.
        if said is not None:
            there = self.tokenizer.convert_ids_to_tokens(self.prompt[1])
            if there != f"<|{TO_LANGUAGE_CODE.get(said, said)}|>":
                raise UserError(
                    f"the tokenizer has no token for language={said!r}: an English-only model takes none"
                )

    @property
    def prompt(self) -> list[int]:
        """The tokens before a transcript."""
        return list(self.tokenizer.prefix_tokens)

    @property
    def end(self) -> int:
        """The token after a transcript, which also pads ``decoder_input_ids``."""
        return self.tokenizer.eos_token_id

    def __call__(self, example: Example) -> dict[str, list[int]]:
        """``decoder_input_ids`` and ``labels`` of an example, of one length.

        Raises:
            UserError: it has no transcript, one of more tokens than the decoder has positions, or one in
                which a special token such as ``<|endoftext|>`` is spelt out.
        """
        if not example.text:
            raise UserError(f"{example.name} has no transcript")
        prompt = self.prompt
        text = f" {example.text.lstrip()}" if self.leading_space else example.text
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        special = next((token for token in tokens if token >= self.end), None)
        if special is not None:
            raise UserError(
                f"the transcript of {example.name} holds {self.tokenizer.decode([special])}, which is one of "
                "Whisper's own marks and no speech: take it out"
            )
        if len(prompt) + len(tokens) > self.longest:
            raise UserError(
                f"the transcript of {example.name} has {len(tokens)} tokens; with the prompt's {len(prompt)} "
                f"the decoder reads at most {self.longest}: cut the clip into shorter ones"
            )
        labels = [-100] * (len(prompt) - 1) + tokens + [self.end]
        return {"decoder_input_ids": prompt + tokens, "labels": labels}

    def check(self, examples: ExampleSet) -> None:
        """Makes the tokens of all examples, so that what is wrong with one is known before any work is done.

        Raises:
            UserError: see :meth:`__call__`; also where there are no examples.
        """
        check_transcribed(examples)
        for example in examples:
            self(example)
