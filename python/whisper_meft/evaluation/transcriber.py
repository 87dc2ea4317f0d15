"""A model that transcribes: the inference loop of predicting and scoring."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import WhisperForConditionalGeneration

from ..data.examples import Example, ExampleSet, listing
from ..data.features import read_features, true_frames, window_frames
from ..errors import UserError
from ..files import read_json
from ..model.backbone import load_backbone, resolve_backbone
from ..model.kinds import kind_of
from ..model.pretrained import load_tokenizer
from ..model.transcription import MeftForConditionalGeneration
from ..options.generation import GenerationArguments
from ..options.inference import InferenceArguments
from .generating import FRAME, Transcript, ends_of, generate_transcripts, generation_options
from .loaded import LoadedModel, extractor_of, load_trained, usable_device

logger = logging.getLogger(__name__)

_EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_SPELLINGS = "normalizer.json"


class WholeClips(Dataset):
    """Log-mel of clips of any length, (mel bins, frames) float32, for Whisper's long-form generation.

    Args:
        examples: clips longer than the extractor's window. feature_extractor: a ``WhisperFeatureExtractor``.
    """

    def __init__(self, examples: ExampleSet, feature_extractor: Any):
        self.examples = examples
        self.feature_extractor = feature_extractor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> torch.Tensor:
        example, extractor = self.examples[index], self.feature_extractor
        if example.has_features:
            features = read_features(example, extractor.feature_size)
            return torch.from_numpy(np.ascontiguousarray(features[:, : true_frames(features)]))
        wave, _ = example.read(extractor.sampling_rate)
        # The extractor drops a last frame that is not whole.
        wave = np.pad(wave, (0, -len(wave) % extractor.hop_length))
        made = extractor(
            wave,
            sampling_rate=extractor.sampling_rate,
            truncation=False,
            padding="longest",
            return_tensors="pt",
        )
        return made["input_features"][0]


def whole_window(feature_extractor: Any, positions: int) -> Any:
    """The extractor with a window of all ``positions`` of an encoder: one that was saved with fewer, for a
    model with ``max_frames``, would pad with zeros, which are no silence."""
    frames = 2 * positions
    if window_frames(feature_extractor) == frames:
        return feature_extractor
    extractor = copy.deepcopy(feature_extractor)
    extractor.n_samples, extractor.nb_max_frames = frames * extractor.hop_length, frames
    extractor.chunk_length = extractor.n_samples // extractor.sampling_rate
    return extractor


def transcribe_batches(
    model: Any, batches: Iterable[dict[str, torch.Tensor]], tokenizer: Any, **options: Any
) -> list[str]:
    """The text of every clip of some batches, in their order; the model's mode is left as it was.

    Args:
        model: a :class:`whisper_meft.MeftForConditionalGeneration` or a Whisper.
        batches: dicts with ``input_features`` (B, mel bins, frames) of the model's whole window, as
            ``SpeechDataset(..., max_frames="fidelity")`` and its collator make them; other entries are not
            looked at.
        tokenizer: the model's. options: of ``generate``, see :func:`.generation_options`.

    Raises:
        UserError: see :func:`.generation_options` and ``generate_transcripts``.
    """
    options = generation_options(model, **options)
    training = model.training
    model.eval()
    try:
        found = (generate_transcripts(model, b["input_features"], tokenizer, **options) for b in batches)
        return [transcript.text for each in found for transcript in each]
    finally:
        model.train(training)


class Transcriber(LoadedModel):
    """A model that transcribes with its feature extractor and tokenizer, ready to hear examples.

    Args:
        model: a :class:`whisper_meft.MeftForConditionalGeneration` or a Whisper; is put into evaluation mode
            on ``device``.
        feature_extractor, tokenizer: those it was trained with.
        device: torch device; default a GPU if there is one.
        batch_size: clips per batch; those longer than the window are heard one by one.
        num_workers: processes that read audio; 0 reads in this one.
        progress: show progress bars.
        options: of ``generate``, see :func:`.generation_options`.

    Raises:
        UserError: the tokenizer is not the model's, or see :func:`.generation_options`.
    """

    def __init__(
        self,
        model: Any,
        feature_extractor: Any,
        tokenizer: Any,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        progress: bool = True,
        **options: Any,
    ):
        self.options = generation_options(model, **options)
        ends = ends_of(model.generation_config)
        if tokenizer.eos_token_id not in ends:
            raise UserError(
                f"the tokenizer ends a text with token {tokenizer.eos_token_id}, the model with {ends[0]}: "
                "it needs its own (tokenizer.json in its folder)"
            )
        extractor = whole_window(feature_extractor, model.config.max_source_positions)
        super().__init__(model, extractor, device, batch_size, num_workers, progress)
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        arguments: InferenceArguments,
        generation: GenerationArguments | None = None,
        progress: bool = True,
    ) -> "Transcriber":
        """Loads the model in ``model_dir``: a folder, or a name on the hub, of a saved model or of a plain
        Whisper. Where the folder of a saved model has no feature extractor or no tokenizer, the backbone's
        are taken.

        Raises:
            UserError: model, backbone, feature extractor or tokenizer cannot be loaded or do not fit each
                other, or an option is not for this model.
        """
        device = usable_device(arguments.device)
        if kind_of(model_dir) == "whisper":
            for name in ("backbone", "backbone_quantization", "backbone_compile", "attention"):
                if getattr(arguments, name) not in (None, False):
                    raise UserError(f"--{name} is for trained models, and {model_dir} is a plain Whisper")
            model = _whisper(model_dir, arguments.backbone_dtype, "model_dir")
            backbone, max_frames = None, "fidelity"
        else:
            model = load_trained(MeftForConditionalGeneration, model_dir, arguments, device)
            backbone, max_frames = model.config.base_model_name_or_path, model.meft_config.max_frames
        named = arguments.feature_extractor_name
        beside = _first_with(_EXTRACTOR_FILES, model_dir, backbone)
        extractor = extractor_of(beside, named, model.config, max_frames)
        beside = _first_with(_TOKENIZER_FILES, model_dir, backbone)
        tokenizer = load_tokenizer(arguments.tokenizer_name or beside)
        if backbone is not None and tokenizer.english_spelling_normalizer is None:
            # One that transformers saved has lost them.
            tokenizer.english_spelling_normalizer = _spellings(backbone)
        options = {} if generation is None else generation.chosen()
        sizes = arguments.batch_size, arguments.num_workers, progress
        return cls(model, extractor, tokenizer, device, *sizes, **options)

    def zero_shot(self) -> "Transcriber":
        """The backbone alone, loaded once more, in the same number format, with the same options and
        generation config.

        Raises:
            UserError: the model does not name its backbone.
        """
        name = self.model.config.base_model_name_or_path
        if not name:
            raise UserError(
                "the model does not name its backbone, which was to transcribe too: leave that out with "
                "--no_zero_shot"
            )
        model = quantized_as(self.model, _whisper(name, self.model.encoder.dtype, "backbone"))
        model.generation_config = copy.deepcopy(self.model.generation_config)
        sizes = self.batch_size, self.num_workers, self.progress
        return Transcriber(model, self.feature_extractor, self.tokenizer, self.device, *sizes, **self.options)

    @property
    def adapted(self) -> bool:
        """Whether it is more than a plain Whisper."""
        return isinstance(self.model, MeftForConditionalGeneration)

    @property
    def language(self) -> str | None:
        """The code of the language that is written; "en" for a translation and English-only models, None
        where the model guesses it clip by clip."""
        generation = self.model.generation_config
        task = self.options.get("task", getattr(generation, "task", None))
        if task == "translate" or not getattr(generation, "is_multilingual", True):
            return "en"
        return self.options.get("language")

    def transcribe(self, examples: ExampleSet) -> tuple[list[Transcript | None], list[tuple[str, str]]]:
        """Transcripts of all examples in their order, None for those that the model cannot hear, and
        (name, reason) of these.

        Raises:
            UserError: an example cannot be read.
        """
        found: list[Transcript | None] = [None] * len(examples)
        bad = []
        for index, result in self.stream(examples):
            if isinstance(result, Transcript):
                found[index] = result
            else:
                bad.append((index, str(result)))
        return found, [(examples[index].name, reason) for index, reason in sorted(bad)]

    def stream(self, examples: ExampleSet) -> Iterator[tuple[int, Transcript | UserError]]:
        """Index and transcript of each example as they come, or why the model cannot hear it.

        Raises:
            UserError: an example cannot be read.
        """
        if any(example.seconds is None and not example.has_features for example in examples):
            examples, _ = self.check(examples, strict=True)
        lengths = [self._seconds(example) for example in examples]
        window = window_frames(self.feature_extractor) * FRAME
        short = [i for i, length in enumerate(lengths) if length <= window]
        long = [i for i, length in enumerate(lengths) if length > window]
        broken_off = []
        bar = tqdm(total=len(examples), desc="transcribing", unit="clip", disable=not self.progress)
        with bar:
            for indices, features in self._batches(examples, short, long):
                results = self._heard(features, [lengths[i] for i in indices])
                bar.update(len(indices))
                for index, result in zip(indices, results):
                    if isinstance(result, Transcript) and not result.complete:
                        broken_off.append(examples[index].name)
                    yield index, result
        if broken_off:
            logger.warning(
                "%d of %d transcripts break off, because the model came to its most tokens: %s",
                len(broken_off),
                len(examples),
                listing(broken_off, 3),
            )

    def _seconds(self, example: Example) -> float:
        if example.has_features:
            return true_frames(read_features(example, self.feature_extractor.feature_size)) * FRAME
        return example.seconds

    def _batches(
        self, examples: ExampleSet, short: list[int], long: list[int]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Indices of a batch's examples and their features, those of the whole window first."""
        if short:
            order, loader = self.batches(examples.select(short), "fidelity", longest_first=True)
            done = 0
            for batch in loader:
                features = batch["input_features"]
                yield [short[i] for i in order[done : done + len(features)]], features
                done += len(features)
        if long:
            clips = WholeClips(examples.select(long), self.feature_extractor)
            for index, features in zip(long, DataLoader(clips, 1, num_workers=self.num_workers)):
                yield [index], features

    def _heard(self, features: torch.Tensor, seconds: list[float]) -> list[Transcript | UserError]:
        try:
            return generate_transcripts(self.model, features, self.tokenizer, seconds, **self.options)
        except UserError as error:
            if len(features) == 1:
                return [error]
        # One of them is to blame, the others are to be answered.
        return [
            result for clip, length in zip(features, seconds) for result in self._heard(clip[None], [length])
        ]


def transcribe_files(
    transcriber: Transcriber, files: Sequence[str], done: Callable[[str, Transcript], None]
) -> list[tuple[str, str]]:
    """Transcribes audio files; those that cannot be heard do not stop the others.

    Args:
        done: called with each file and its transcript the moment it is there, in any order.

    Returns:
        (file, reason) of the others.

    Raises:
        UserError: not one file can be heard.
    """
    examples = ExampleSet([Example(audio=file, name=file) for file in files], "the files to transcribe")
    # The error of a single file says it all; of several the good ones are answered.
    good, bad = transcriber.check(examples, strict=len(examples) == 1)
    heard = 0
    for index, result in transcriber.stream(good):
        if isinstance(result, Transcript):
            heard += 1
            done(good[index].name, result)
        else:
            bad.append((good[index].name, str(result)))
    if not heard:
        raise UserError(f"no file could be transcribed; {bad[0][0]}: {bad[0][1]}")
    return bad


def _has(files: tuple[str, ...], name: str) -> bool:
    """Whether a folder has one of some files; a name on the hub may."""
    folder = Path(resolve_backbone(name))
    return not folder.is_dir() or any((folder / file).is_file() for file in files)


def _first_with(files: tuple[str, ...], model_dir: str | Path, backbone: str | None) -> str:
    """Of a model's folder and its backbone's the first that has one of some files; else the model's."""
    names = [str(model_dir), *([backbone] if backbone else [])]
    return next((name for name in names if _has(files, name)), names[0])


def _spellings(name: str) -> dict[str, str] | None:
    """British spellings and their American ones that are beside a backbone's tokenizer, or None."""
    path = Path(resolve_backbone(name)) / _SPELLINGS
    try:
        if not path.parent.is_dir():
            path = Path(hf_hub_download(name, _SPELLINGS))
    except Exception:  # there is no such file, or no way to the hub
        return None
    return read_json(path) if path.is_file() else None


def quantized_as(
    model: MeftForConditionalGeneration, whisper: WhisperForConditionalGeneration
) -> WhisperForConditionalGeneration:
    """``whisper``, the backbone of ``model`` loaded once more, its encoder quantised in place as the model's
    is: beside each other they tell what was learnt, not what rounding does."""
    if model.encoder.quantization:
        encoder = whisper.get_encoder().to(model.encoder.conv1.weight.device)
        model.meft_config.build_encoder(encoder)
    return whisper


def _whisper(name: str | Path, dtype: Any, argument: str) -> WhisperForConditionalGeneration:
    """A plain Whisper; ``dtype`` as in ``load_backbone``, or a name."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return load_backbone(name, dtype=dtype, argument=argument, kind=WhisperForConditionalGeneration)
