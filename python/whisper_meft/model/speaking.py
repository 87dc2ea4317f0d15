"""The tokenizer of a Whisper that transcribes, and the language that it is told to write."""

from transformers import GenerationConfig, WhisperConfig, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ..errors import UserError
from ..options.common import ModelArguments
from .backbone import resolve_backbone
from .pretrained import load_tokenizer

# The vocabulary of the published English-only models, whose tokenizer has all languages' tokens nevertheless.
_ENGLISH_ONLY = 51864


class LanguageOf:
    """A Whisper's tokenizer with its prompt set, for one language.

    Args:
        tokenizer: a ``WhisperTokenizer``; its prompt is changed.
        sizes: the backbone's config. generation: its generation config, or None where it has none.
        language: a code ("nl"), a name ("dutch"), or None.

    Attributes:
        language: its code; None for English-only models.
        suppressed: tokens that the model never generates.

    Raises:
        UserError: the tokenizer is another model's, or the language is needed, unknown or not this model's.
    """

    def __init__(
        self,
        tokenizer: WhisperTokenizer,
        sizes: WhisperConfig,
        generation: GenerationConfig | None,
        language: str | None,
    ):
        self.tokenizer = tokenizer
        known = {code: self._id(f"<|{code}|>") for code in TO_LANGUAGE_CODE.values()}
        self.languages = {code: number for code, number in known.items() if number is not None}
        self.suppressed = frozenset(getattr(generation or sizes, "suppress_tokens", None) or ())
        multilingual = getattr(generation, "is_multilingual", None)
        if multilingual is None:
            multilingual = bool(self.languages) and sizes.vocab_size != _ENGLISH_ONLY
        self.language = self._code(language, multilingual)
        task = "transcribe" if multilingual else None
        tokenizer.language = tokenizer.task = None  # which None in the call would leave as they were saved
        tokenizer.set_prefix_tokens(language=self.language, task=task, predict_timestamps=False)
        _check_tokenizer(tokenizer, sizes)

    def _id(self, token: str) -> int | None:
        return self.tokenizer.get_vocab().get(token)

    def _code(self, language: str | None, multilingual: bool) -> str | None:
        code = None if language is None else language.strip().lower()
        code = TO_LANGUAGE_CODE.get(code, code)
        if not multilingual:
            if code not in (None, "en"):
                raise UserError(
                    f"language: {language!r} cannot be transcribed by this model, which is English-only: "
                    "leave it out, or take a multilingual Whisper"
                )
            return None
        if code is None:
            raise UserError(
                "language is needed to transcribe with a multilingual Whisper, whose prompt names it: a code "
                "(nl) or a name (dutch), one for all transcripts"
            )
        if code not in self.languages:
            raise UserError(
                f"language must be one of this Whisper's, a code (nl) or a name (dutch), got {language!r}"
            )
        return code

    @property
    def spelling(self) -> dict[str, str] | None:
        """British spellings and their American ones, of the checkpoint's English normaliser."""
        return getattr(self.tokenizer, "english_spelling_normalizer", None)

    def describe(self) -> str:
        """The language in a few words."""
        return "English-only" if self.language is None else f"language {self.language}"

    def set_in(self, generation: GenerationConfig) -> None:
        """Makes a generation config name the language and the task, and what generation looks up for that."""
        tokens = self.tokenizer
        generation.forced_decoder_ids = None  # an older way to say the same
        generation.return_timestamps = False  # the prompt that is trained with says that there are none
        prompt = list(tokens.prefix_tokens)
        found = {"decoder_start_token_id": prompt[0], "is_multilingual": False}
        found["no_timestamps_token_id"] = self._id("<|notimestamps|>")
        if self.language is not None:
            found["is_multilingual"] = True
            found["lang_to_id"] = {f"<|{code}|>": number for code, number in self.languages.items()}
            found["task_to_id"] = {task: self._id(f"<|{task}|>") for task in ("transcribe", "translate")}
            generation.language, generation.task = self.language, "transcribe"
        else:  # where one is named, ``generate`` puts it into the prompt
            generation.language = generation.task = None
        for name, value in found.items():
            if getattr(generation, name, None) is None:
                setattr(generation, name, value)
        said = [generation.decoder_start_token_id]
        if self.language is not None:
            said += [generation.lang_to_id.get(f"<|{self.language}|>"), generation.task_to_id["transcribe"]]
        if said != prompt[: len(said)]:
            raise UserError(
                f"the tokenizer's prompt begins with {prompt[: len(said)]}, the model's generation config's "
                f"with {said}: use the tokenizer that belongs to the model"
            )


def _check_tokenizer(tokenizer: WhisperTokenizer, sizes: WhisperConfig) -> None:
    if len(tokenizer) > sizes.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {sizes.vocab_size}: use the tokenizer "
            "that belongs to the model"
        )
    start = list(tokenizer.prefix_tokens)[0]
    pairs = (("end", tokenizer.eos_token_id, sizes.eos_token_id),)
    pairs += (("start", start, sizes.decoder_start_token_id),)
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(
                f"the tokenizer's token for the {name} of a transcript is {ours}, the model's {theirs}: use "
                "the tokenizer that belongs to the model"
            )


def load_language(arguments: ModelArguments, sizes: WhisperConfig, language: str | None) -> LanguageOf:
    """The tokenizer of a backbone, beside it or named, set to a language; see :class:`LanguageOf`.

    Raises:
        UserError: there is no such tokenizer, or see there.
    """
    where = resolve_backbone(arguments.model_name_or_path)
    named = arguments.tokenizer_name
    hub = {
        "revision": arguments.model_revision,
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
    }
    tokenizer = load_tokenizer(named or where, "tokenizer_name" if named else "model_name_or_path", **hub)
    try:
        generation = GenerationConfig.from_pretrained(where, **hub)
    except OSError:  # older folders have none
        generation = None
    return LanguageOf(tokenizer, sizes, generation, language)
