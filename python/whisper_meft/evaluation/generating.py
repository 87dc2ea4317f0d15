"""Text of a batch by Hugging Face's ``generate``: its options, long form, and what it returns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from ..errors import UserError
from ..model.backbone import quiet_transformers
from ..model.transcription import MeftForConditionalGeneration

# Where a generation config has the tokens of what it names.
_TABLES = {"language": "lang_to_id", "task": "task_to_id"}

FRAME = 0.01  # seconds from one frame of log-mel to the next


@dataclass(frozen=True)
class Segment:
    """A part of a transcript.

    Attributes:
        start, end: seconds from the clip's beginning. text: what is said there.
    """

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What a model heard of a clip.

    Attributes:
        text: all of it, without spaces at its ends.
        segments: its parts with their times; empty unless the model was asked for them.
        complete: False where the model ran out of tokens, so that the text breaks off.
    """

    text: str
    segments: tuple[Segment, ...] = ()
    complete: bool = True


class _Finite(LogitsProcessor):
    """Sees whether all scores are numbers, and leaves them as they are."""

    def __init__(self):
        self._wrong: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Suppressed tokens have -inf. Kept on the device: asking for it would wait for every token.
        wrong = (scores.isnan() | (scores == torch.inf)).any()
        self._wrong = wrong if self._wrong is None else self._wrong | wrong
        return scores

    def check(self) -> None:
        if self._wrong is not None and bool(self._wrong):
            raise UserError("the model's output for it is NaN or infinite")


def language_code(language: str | None, generation: GenerationConfig) -> str | None:
    """Whisper's code of a language that a model knows.

    Args:
        language: a code ("nl"), a name ("dutch") or a token ("<|nl|>"); None stays None.
        generation: the model's.

    Returns:
        the code; None for English of an English-only model, which takes no such option.

    Raises:
        UserError: no language of Whisper's, none of the model's, or the model is English-only or does not say
            which languages it knows.
    """
    if language is None:
        return None
    name = language.lower().removeprefix("<|").removesuffix("|>")
    code = TO_LANGUAGE_CODE.get(name, name)
    if code not in TO_LANGUAGE_CODE.values():
        raise UserError(
            f"language must be a code (nl) or a name (dutch) of Whisper's languages, got {language!r}"
        )
    known = getattr(generation, "lang_to_id", None)
    if getattr(generation, "is_multilingual", None) is False:
        if code == "en":
            return None
        raise UserError(f"language={language!r} was asked for, and the model is English-only: leave it out")
    if not known:
        raise UserError(
            f"language={language!r} cannot be told to this model, whose generation_config.json has no "
            "lang_to_id: leave it out, or take that file from the published Whisper of its size"
        )
    if f"<|{code}|>" not in known:
        raise UserError(f"language={language!r} is none of this model's {len(known)} languages")
    return code


def _forced(model: Any) -> dict[str, str]:
    """The language and the task in ``forced_decoder_ids``, an older way to say them."""
    generation = model.generation_config
    sizes = model.decoder.config if isinstance(model, MeftForConditionalGeneration) else model.config
    of_either = (getattr(config, "forced_decoder_ids", None) for config in (generation, sizes))
    tokens = {token for _, token in next((each for each in of_either if each is not None), ())}
    words = {name: getattr(generation, table, None) or {} for name, table in _TABLES.items()}
    return {name: word for name, known in words.items() for word, token in known.items() if token in tokens}


def generation_options(model: Any, **options: Any) -> dict[str, Any]:
    """Options for a model's ``generate``, checked before any work is done.

    Args:
        model: a :class:`whisper_meft.MeftForConditionalGeneration` or a Whisper.
        options: of ``generate``. ``language`` may be a code or a name; None is the generation config's.

    Returns:
        the options, with the model's own language and task where these are not given.

    Raises:
        UserError: the language or task is none of the model's, it has no times, or more tokens than its
            decoder holds.
    """
    generation = model.generation_config
    for name, table in _TABLES.items():
        said = getattr(generation, name, None)
        if said is not None and not getattr(generation, table, None):
            raise UserError(
                f"the model's generation_config.json has {name}={said!r} and no {table} to look it up in: "
                f"take {name} out of it"
            )
    options = {name: value for name, value in options.items() if value is not None}
    if not any(options.get(name) or getattr(generation, name, None) for name in ("language", "task")):
        options |= _forced(model)  # which ``generate`` reads only where nothing newer is named
    if options.get("return_timestamps"):
        _check_times(generation)
    language = options.pop("language", None) or getattr(generation, "language", None)
    code = language_code(language, generation)
    if code is not None:
        options["language"] = code
    task, tasks = options.get("task"), getattr(generation, "task_to_id", None) or {}
    if task is not None and task not in tasks:
        # An English-only model does nothing else, and takes no such option.
        if task != "transcribe" or getattr(generation, "is_multilingual", False):
            raise UserError(f"task={task!r} is none of this model's ({', '.join(tasks) or 'transcribe'})")
        options.pop("task")
    if not getattr(generation, "is_multilingual", bool(tasks)):
        options.pop("task", None)
    elif tasks and task is None:
        # Where neither is named, ``generate`` leaves the task out of the prompt.
        options["task"] = getattr(generation, "task", None) or "transcribe"
    most = model.config.max_target_positions - 4  # start, language, task and <|notimestamps|>
    if options.get("max_new_tokens", 0) > most:
        raise UserError(
            f"max_new_tokens must be at most {most}, the decoder's positions without the prompt's, got "
            f"{options['max_new_tokens']}"
        )
    return options


def _check_times(generation: GenerationConfig) -> None:
    if getattr(generation, "no_timestamps_token_id", None) is None:
        raise UserError(
            "the model's generation_config.json names no no_timestamps_token_id, without which it has no "
            "timestamps and hears no clip longer than its window"
        )


@torch.no_grad()  # not inference_mode: what a model keeps of this may be used in training
def generate_transcripts(
    model: Any,
    input_features: torch.Tensor,
    tokenizer: Any,
    seconds: Sequence[float] | None = None,
    **options: Any,
) -> list[Transcript]:
    """Transcribes a batch.

    Args:
        model: a :class:`whisper_meft.MeftForConditionalGeneration` or a Whisper, in evaluation mode.
        input_features: (B, mel bins, frames) log-mel: the model's window, padded as Whisper does, or one clip
            (B = 1) with more frames, which is transcribed window by window (long form).
        tokenizer: the model's.
        seconds: lengths of the clips, to which times are held; else those of the features.
        options: what :func:`.generation_options` gave.

    Raises:
        UserError: sound behind the model's ``max_frames``, or an output that is not finite.
    """
    sizes, generation = model.config, model.generation_config
    long = input_features.shape[-1] > 2 * sizes.max_source_positions
    if long and len(input_features) > 1:
        raise UserError("clips longer than the model's window are transcribed one by one")
    timed = long or bool(options.get("return_timestamps", getattr(generation, "return_timestamps", False)))
    if timed:
        _check_times(generation)
    place = next(model.parameters())
    # Our model casts what it hears itself.
    dtype = torch.float32 if isinstance(model, MeftForConditionalGeneration) else place.dtype
    features = input_features.to(place.device, dtype)
    if timed:
        options = options | {"return_timestamps": True}
    watch = _Finite()
    with quiet_transformers():
        found = model.generate(
            features, logits_processor=LogitsProcessorList([watch]), return_segments=True, **options
        )
    watch.check()
    if seconds is None:
        seconds = [features.shape[-1] * FRAME] * len(features)
    tokens = found["sequences"].long().tolist()
    texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    begin = generation.no_timestamps_token_id + 1 if timed else sizes.vocab_size
    transcripts = []
    for text, parts, length in zip(texts, found["segments"], seconds):
        pairs = zip(parts, [*parts[1:], None])
        complete = not any(_breaks_off(*pair, generation, begin) for pair in pairs)
        segments = tuple(_segments(parts, tokenizer, length)) if timed else ()
        transcripts.append(Transcript(text, segments, complete))
    return transcripts


def ends_of(generation: GenerationConfig) -> list[int]:
    """The tokens that end a text."""
    end = generation.eos_token_id
    return end if isinstance(end, list) else [end]


def _breaks_off(
    part: dict[str, Any], following: dict[str, Any] | None, generation: GenerationConfig, begin: int
) -> bool:
    """Whether the model had no tokens left to say all of a window that ends with ``part``; where it had said
    the time of a part's end, generation goes on from there.

    Args:
        part, following: segments of ``generate``. begin: the first timestamp's token.
    """
    result = part["result"]
    if following is not None and following["result"] is result:
        return False
    sequence = result if isinstance(result, torch.Tensor) else result["sequences"]
    if int(sequence[-1]) in (generation.pad_token_id, *ends_of(generation)):
        return False
    last = part["tokens"][-2:].tolist()
    return not (len(last) == 2 and min(last) >= begin)


def _segments(parts: list[dict[str, Any]], tokenizer: Any, seconds: float) -> list[Segment]:
    """Segments of ``generate`` in whole milliseconds, one after the other and within ``seconds``; the text of
    one that no time is left for goes to its neighbour."""
    last = math.floor(seconds * 1000 + 1e-6) / 1000
    found: list[Segment] = []
    early = ""
    for part in parts:
        said = tokenizer.decode(part["tokens"], skip_special_tokens=True).strip()
        text, early = " ".join(filter(None, (early, said))), ""
        begin = round(min(max(float(part["start"]), found[-1].end if found else 0.0), last), 3)
        end = round(min(float(part["end"]), last), 3)
        if not text:
            continue
        if end > begin:
            found.append(Segment(begin, end, text))
        elif found:
            found[-1] = replace(found[-1], text=f"{found[-1].text} {text}")
        else:
            early = text
    return [Segment(0.0, last, early)] if early else found
