"""Training for what is said in a clip."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from ... import data
from ...data.examples import Example, ExampleSet, listing
from ...data.features import read_features, true_frames, window_of
from ...data.streaming import Stream
from ...errors import UserError
from ...evaluation.recognition import Recognition, evaluate_transcripts
from ...evaluation.transcriber import quantized_as
from ...evaluation.transcripts import WITHOUT_SPACES
from ...feature_cache.dataset import CachedCollator, CachedDataset
from ...feature_cache.store import FeatureCache
from ...files import read_json, write_json, write_text
from ...methods import MeftConfig
from ...model.base import MeftBase
from ...model.speaking import LanguageOf
from ...options.common import DataFormatArguments
from ...options.training import METRICS, TrainArguments
from ..console import main_process, say
from ..transcribing import SharedTranscriber, TranscriptionTrainer
from .base import Task, check_method

_RATES = METRICS["transcribe"][1:]


class Transcription(Task):
    """Transcripts in one language.

    Args:
        config: the method. sizes: the backbone's. extractor: its feature extractor.
        speaking: its tokenizer and language. arguments: of the run.

    Raises:
        UserError: these do not go together.
    """

    backbone_class = WhisperForConditionalGeneration
    trainer_class = TranscriptionTrainer
    of_one_length = True
    curve = ("eval_normalized_wer", "WER, normalised")

    def __init__(
        self,
        config: MeftConfig,
        sizes: WhisperConfig,
        extractor: WhisperFeatureExtractor,
        speaking: LanguageOf,
        arguments: TrainArguments | None = None,
    ):
        check_method(config, sizes, self.backbone_class)
        self.config, self.extractor, self.speaking = config, extractor, speaking
        self.tokens = data.TranscriptTokens(
            speaking.tokenizer, sizes.max_target_positions, speaking.language not in WITHOUT_SPACES
        )
        most = sizes.max_target_positions
        longest = getattr(arguments, "generation_max_length", None)
        if (longest or 0) > most:
            raise UserError(
                f"generation_max_length must be at most {most}, the decoder's positions, got {longest}"
            )
        given = {"max_length": longest, "num_beams": getattr(arguments, "generation_num_beams", None)}
        self.generation = {name: value for name, value in given.items() if value is not None}
        self.arguments = arguments

    def reader_options(self, arguments: DataFormatArguments) -> dict[str, Any]:
        for name in ("label_column_name", "labels"):
            if (value := getattr(arguments, name)) is not None:
                raise UserError(f"{name}: {value!r} is of classes; transcripts have none: leave it out")
        return {**arguments.reader_options(), "require_text": True}

    def check_read(self, examples: ExampleSet) -> ExampleSet:
        self.tokens.check(examples)
        # A class that the data happens to have says nothing about how to set speakers aside.
        return ExampleSet((replace(each, label=None) for each in examples), examples.description)

    def usable(self, examples: ExampleSet) -> tuple[ExampleSet, list[tuple[str, str]]]:
        hop, rate = self.extractor.hop_length, self.extractor.sampling_rate
        window = window_of(self.extractor, self.config.max_frames) * hop / rate
        good, bad = [], []
        for example in examples:
            seconds = example.seconds
            if example.has_features:
                # Up to two frames are the overlap of the last window with the sound.
                seconds = (true_frames(read_features(example)) - 2) * hop / rate
            if seconds is not None and seconds > window + hop / rate:
                reason = (
                    f"{seconds:.2f} s are longer than the window of {window:g} s, so that its transcript "
                    "tells of what would not be heard"
                )
                bad.append((example.name, reason))
            else:
                good.append(example)
        if not good:
            raise UserError(
                f"none of the {len(examples)} examples of {examples.description} can be used; the first, "
                f"{bad[0][0]}: {bad[0][1]}"
            )
        return ExampleSet(good, examples.description), bad

    def check_streamed(self, example: Example) -> None:
        self.tokens(example)

    def placeholder(self) -> Example:
        return Example(b"", text="-")

    def prepare(self, base: PreTrainedModel) -> None:
        self.speaking.set_in(base.generation_config)

    def check_resumed(self, checkpoint: Path) -> None:
        saved = read_json(checkpoint / "generation_config.json").get("language")
        if saved != self.speaking.language:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} has language={saved!r}, but now it is "
                f"{self.speaking.language!r}"
            )

    def dataset(self, examples: ExampleSet, make_dataset: Callable[..., Dataset], **more: Any) -> Dataset:
        return make_dataset(examples, self.extractor, None, self.config.max_frames, self.tokens, **more)

    def collator(self) -> data.Collator:
        return data.Collator(self.extractor, self.config.max_frames, self.tokens.end)

    def cached_dataset(
        self, examples: ExampleSet, cache: FeatureCache, model: MeftBase, **more: Any
    ) -> Dataset:
        return CachedDataset(examples, cache, model, tokens=self.tokens, **more)

    def cached_collator(self) -> CachedCollator:
        return CachedCollator(self.tokens.end)

    def counted_step(self, training: ExampleSet | Stream) -> dict[str, Any]:
        if isinstance(training, Stream):  # of transcripts that have not come yet
            return {"task": "transcribe", "tokens": self.tokens.longest}
        longest = max(len(self.tokens(example)["labels"]) for example in training)
        return {"task": "transcribe", "tokens": longest}

    def describe(self, training: ExampleSet | Stream) -> list[str]:
        if isinstance(training, Stream):
            return [f"training on a stream of transcripts, {training.amount()}; {self.speaking.describe()}"]
        words = sum(len(example.text.split()) for example in training)
        speakers = training.speakers()
        of = f" of {len(speakers)} speakers" if speakers else ""
        found = f"training on {len(training)} transcripts{of}, {words:,} words; {self.speaking.describe()}"
        return [found, *self._never_written(training)]

    def _never_written(self, training: ExampleSet) -> list[str]:
        """A line on what of the transcripts is never generated, however well it is learnt, or none."""
        speaking, clips = self.speaking, 0
        left_out: Counter[int] = Counter()
        for example in training:
            tokens = speaking.suppressed.intersection(self.tokens(example)["labels"])
            left_out.update(tokens)
            clips += bool(tokens)
        if not clips:
            return []
        marks = dict.fromkeys(speaking.tokenizer.decode([each]).strip() for each, _ in left_out.most_common())
        return [
            f"{clips} of them hold what is never written, as suppress_tokens of the generation config say: "
            f"{listing(map(repr, marks))}"
        ]

    def trainer_options(self, evaluation: ExampleSet | None) -> dict[str, Any]:
        def rates(model: nn.Module) -> dict[str, float]:
            scores = evaluate_transcripts(self._transcriber(model), evaluation).scores
            return {name: getattr(scores, name).rate for name in _RATES}

        return {
            "processing_class": SavedTogether(self.extractor, self.speaking.tokenizer),
            "tokens_per_clip": None if evaluation is None else self._tokens_per_clip(evaluation),
            "rates": rates if self.arguments.predict_with_generate else None,
        }

    def _tokens_per_clip(self, examples: ExampleSet) -> float:
        """How many tokens of a clip count in the loss, on average."""
        counted = [sum(label != -100 for label in self.tokens(each)["labels"]) for each in examples]
        return sum(counted) / len(counted)

    def score(
        self, trainer: TranscriptionTrainer, evaluation: ExampleSet, load_base: Callable[[], PreTrainedModel]
    ) -> tuple[Recognition, float]:
        also = " and by the backbone as it was" if self.arguments.zero_shot else ""
        say(f"transcribing {len(evaluation)} examples by the trained model{also}")
        loss, zero_shot = trainer.evaluation_loss(), None
        if self.arguments.zero_shot:
            before = quantized_as(trainer.model, load_base())
            self.speaking.set_in(before.generation_config)
            zero_shot = self._transcriber(before)
        return evaluate_transcripts(self._transcriber(trainer.model), evaluation, zero_shot), loss

    def _transcriber(self, model: nn.Module) -> SharedTranscriber:
        """What hears as ``whisper-meft evaluate`` does."""
        arguments = self.arguments
        show = main_process() and not arguments.disable_tqdm
        how = (arguments.device, arguments.per_device_eval_batch_size, arguments.dataloader_num_workers, show)
        return SharedTranscriber(model, self.extractor, self.speaking.tokenizer, *how, **self.generation)

    def summary(self, training: ExampleSet | Stream) -> dict[str, Any]:
        return {"task": "transcribe", "language": self.speaking.language}

    def write_scores(self, folder: Path, scores: Recognition) -> dict[str, Any]:
        write_text(folder / "transcripts.csv", scores.as_csv())
        write_text(folder / "evaluation.txt", scores.as_text() + "\n")
        return {"generation": self.generation, **scores.as_dict()}


class SavedTogether:
    """A feature extractor and a tokenizer, saved beside a model as published Whispers have them."""

    def __init__(self, *parts: Any):
        self.parts = parts

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        for part in self.parts:
            part.save_pretrained(folder, **kwargs)
            # transformers reads the spellings of its English normaliser there, and does not write them.
            if spelling := getattr(part, "english_spelling_normalizer", None):
                write_json(Path(folder) / "normalizer.json", spelling)
