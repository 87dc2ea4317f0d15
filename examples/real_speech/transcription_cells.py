"""One run of the study of transcription: trained with the package's models and loss, heard, recorded."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from whisper_meft import LSTConfig, MeftForConditionalGeneration, data, get_meft_model
from whisper_meft.errors import UserError
from whisper_meft.evaluation.transcriber import transcribe_batches
from whisper_meft.evaluation.transcripts import score_transcripts
from whisper_meft.feature_cache.dataset import CachedCollator, CachedDataset
from whisper_meft.feature_cache.filling import prepare_cache
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.files import read_json, write_json
from whisper_meft.model.backbone import quiet_transformers

from benchmarks import record

from .cells import ORIGIN, cache_seconds
from .transcription_plan import BACKBONE, BATCH, FOLDER, LANGUAGES, MOST_TOKENS, TESTED, WINDOW, Cell, Row

KINDS = ("wer", "cer", "normalized_wer", "normalized_cer")
FRAMES_A_SECOND = 50
HEARD_BATCH = 40


@dataclass(frozen=True)
class Clips:
    """The clips of a manifest that the window holds, and how many it does not."""

    examples: data.ExampleSet
    left_out: int


def errors_of(references: Sequence[str], heard: Sequence[str], language: str) -> dict[str, Any]:
    """Edits of every clip, of each of ``KINDS``: a list of numbers in text, as short as it goes."""
    keys = [f"{i:06d}" for i in range(len(references))]
    found = score_transcripts(references, heard, LANGUAGES[language], keys).per_speaker
    return {kind: " ".join(str(getattr(found[key], kind).errors) for key in keys) for kind in KINDS}


def lengths_of(references: Sequence[str], language: str) -> dict[str, str]:
    """Words or characters of every clip's transcript, as ``errors_of``."""
    keys = [f"{i:06d}" for i in range(len(references))]
    found = score_transcripts(references, references, LANGUAGES[language], keys).per_speaker
    return {kind: " ".join(str(getattr(found[key], kind).length) for key in keys) for kind in KINDS}


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split()]


def held_rate(errors: dict[str, str], lengths: dict[str, str], kind: str = "cer") -> float:
    """The error rate with a clip's errors counted up to its own length, so that one text that repeats itself
    to the last token does not outweigh all others: what a rate is chosen by."""
    counted = list(zip(numbers(errors[kind]), numbers(lengths[kind])))
    return sum(min(pair) for pair in counted) / sum(length for _, length in counted)


class Recognition:
    """The study on disk.

    Args:
        model: the Whisper backbone, a folder or a name on the hub. speech: the recordings' folder.
        work: gets ``transcription/``: a file for each run, what was heard, states and trained models.
    """

    def __init__(self, model: str, speech: Path, work: Path):
        self.model, self.speech, self.work = model, speech, work / "transcription"
        self.extractor = WhisperFeatureExtractor.from_pretrained(model)
        self._clips: dict[str, Clips] = {}
        self._filled: dict[Path, float | None] = {}  # seconds that a cache took, once it was looked at
        self._mels: dict[str, tuple] = {}

    # --- data -----------------------------------------------------------------------------------------------

    def clips(self, name: str) -> Clips:
        """Those of a manifest such as ``nl_test``."""
        if name not in self._clips:
            manifest = self.speech / FOLDER / f"{name}.csv"
            examples = data.load_examples(str(manifest), require_text=True)
            examples, _ = data.check_audio(examples, strict=True, progress=False)
            held = [i for i, each in enumerate(examples) if each.seconds * FRAMES_A_SECOND <= WINDOW]
            self._clips[name] = Clips(examples.select(held), len(examples) - len(held))
        return self._clips[name]

    def tokenizer(self, language: str) -> WhisperTokenizer:
        return WhisperTokenizer.from_pretrained(self.model, language=LANGUAGES[language], task="transcribe")

    def tokens(self, row: Row) -> data.TranscriptTokens:
        """Of the transcripts that the row trains on."""
        tokenizer = self.tokenizer(row.language)
        return data.TranscriptTokens(tokenizer, leading_space=row.training["leading_space"])

    def shapes(self) -> dict[str, Any]:
        """What all rows share: the clips of every set, their speakers, and their transcripts' lengths."""
        found = {}
        for language, tested in TESTED.items():
            for name in (f"{language}_train", f"{language}_dev", *tested):
                clips = self.clips(name)
                texts = [each.text for each in clips.examples]
                found[name] = {
                    "clips": len(texts),
                    "left_out": clips.left_out,
                    "seconds": round(sum(each.seconds for each in clips.examples), 1),
                    "speakers": len(clips.examples.speakers()),
                    **({} if name.endswith("_train") else {"lengths": lengths_of(texts, name[:2])}),
                }
        return {"window": WINDOW, "most_tokens": MOST_TOKENS, "batch": BATCH, "sets": found}

    # --- rows -----------------------------------------------------------------------------------------------

    def path(self, row: Row, rate: float | None, seed: int) -> Path:
        rated = "" if rate is None else f"lr{rate:g}-"
        return self.work / "rows" / row.language / row.name / f"{rated}seed{seed}.json"

    def rate_of(self, row: Row) -> float | None:
        """The rate that the search has chosen so far; None before it began, and where there is none."""
        tried = [read_json(path) for rate in row.rates if (path := self.path(row, rate, 0)).is_file()]
        good = [found for found in tried if found["status"] == "ok"]
        return min(good, key=lambda found: found["dev_rate"])["rate"] if good else None

    def done(self, cell: Cell) -> bool:
        rate = self.rate_of(cell.row) if cell.rate is None else cell.rate
        path = self.path(cell.row, rate, cell.seed)
        if not path.is_file():
            return False
        found = read_json(path)
        return cell.rate is not None or "tests" in found or found["status"] != "ok"

    def possible(self, cell: Cell) -> bool:
        """Whether it has a rate: not where all of a search failed."""
        return cell.rate is not None or cell.row.zero_shot or self.rate_of(cell.row) is not None

    def run(self, cell: Cell) -> dict[str, Any]:
        """Runs a cell and writes its file.

        Raises:
            UserError: no rate is known yet; the data or the model cannot be used.
        """
        row = cell.row
        if not self._clips:
            write_json(self.work / "shapes.json", self.shapes())
        rate = self.rate_of(row) if cell.rate is None else cell.rate
        if rate is None and not row.zero_shot:
            raise UserError(f"{row.language} {row.entry}: no learning rate could be used")
        path = self.path(row, rate, cell.seed)
        found = read_json(path) if path.is_file() else None
        try:
            if found is None:
                found = self._trained(row, rate, cell.seed)
            if cell.rate is None:
                found = self._tested(row, found)
        except (UserError, RuntimeError, ValueError) as error:
            if found is None:
                found = self._about(row, rate, cell.seed)
            found["status"] = f"failed: {error}".splitlines()[0]
        write_json(path, found)
        if cell.rate is None:
            shutil.rmtree(self._model_folder(row, rate, cell.seed), ignore_errors=True)
        return found

    def _about(self, row: Row, rate: float | None, seed: int) -> dict[str, Any]:
        origin = {key: value for key, value in record.environment("cpu").items() if key in ORIGIN}
        about = {"language": row.language, "entry": row.entry, "rate": rate, "seed": seed}
        return {**about, **row.training, "batch": BATCH, "origin": origin}

    def _model_folder(self, row: Row, rate: float | None, seed: int) -> Path:
        return self.work / "models" / row.language / row.name / f"lr{rate}-seed{seed}"

    # --- training -------------------------------------------------------------------------------------------

    def _made(self, row: Row) -> MeftForConditionalGeneration:
        with quiet_transformers():
            base = WhisperForConditionalGeneration.from_pretrained(self.model)
            return get_meft_model(base, row.config)

    def _trained(self, row: Row, rate: float | None, seed: int) -> dict[str, Any]:
        """A run's record with its validation clips; its model lies in its folder."""
        set_seed(seed)
        model = self._made(row)
        found = self._about(row, rate, seed)
        if not row.zero_shot:
            found["cache_cpu_seconds"] = self._fill_cache(row, model) if row.config.frozen_encoder else None
            started = time.process_time()
            found["train_losses"] = self._train(row, model, rate, seed)
            found["cpu_seconds"] = round(time.process_time() - started, 1)
            found["trainable_parameters"] = model.get_nb_trainable_parameters()[0]
            with quiet_transformers():
                model.save_pretrained(self._model_folder(row, rate, seed))
        name = f"{row.language}_dev"
        started = time.process_time()
        found["dev"] = self._heard(row, model, name, f"lr{rate}-seed{seed}")
        found["dev_cpu_seconds"] = round(time.process_time() - started, 1)
        texts = [each.text for each in self.clips(name).examples]
        found["dev_rate"] = held_rate(found["dev"], lengths_of(texts, row.language))
        found["status"] = "ok"
        return found

    def _batches(self, row: Row, model: MeftForConditionalGeneration, seed: int) -> DataLoader:
        """The training clips, in another order in each pass."""
        examples, tokens = self.clips(f"{row.language}_train").examples, self.tokens(row)
        if row.config.frozen_encoder:
            cache = FeatureCache(self._cache_folder(row, model))
            dataset = CachedDataset(examples, cache, model, tokens=tokens)
            collate = CachedCollator(pad_token_id=tokens.end)
        else:
            dataset = data.SpeechDataset(examples, self.extractor, tokens=tokens)
            collate = data.Collator(self.extractor, pad_token_id=tokens.end)
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(dataset, BATCH, shuffle=True, generator=generator, collate_fn=collate)

    def _train(self, row: Row, model: MeftForConditionalGeneration, rate: float, seed: int) -> list[float]:
        """Trains; gives the mean loss of each epoch's batches."""
        options, batches = row.training, self._batches(row, model, seed)
        steps = options["epochs"] * len(batches)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=options["weight_decay"])
        warmup = round(options["warmup"] * steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        losses = []
        for epoch in range(options["epochs"]):
            model.train()
            total, count = 0.0, 0
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=row.autocast):
                    loss = model(**batch).loss
                if not torch.isfinite(loss):
                    raise UserError(f"the loss is {loss.item()} in epoch {epoch + 1}")
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total, count = total + loss.item(), count + 1
            losses.append(round(total / count, 4))
        return losses

    # --- states computed once -------------------------------------------------------------------------------

    def _cache_folder(self, row: Row, model: MeftForConditionalGeneration) -> Path:
        dtype = str(model.encoder.dtype).removeprefix("torch.")
        layers = "last" if row.autocast else "all"
        # Of the decoder: the states of a transcript.
        spaces = "-space" if model.states_of == "decoder" and row.training["leading_space"] else ""
        return self.work / "features" / row.language / f"{model.states_of}-{layers}-{dtype}{spaces}"

    def _fill_cache(self, row: Row, model: MeftForConditionalGeneration) -> float:
        """Makes the states that the row's training reads; gives the CPU seconds that it took."""
        folder = self._cache_folder(row, model)
        examples = self.clips(f"{row.language}_train").examples
        if folder not in self._filled:
            self._filled[folder] = cache_seconds(folder, [examples])
        if self._filled[folder] is None:
            if not row.autocast:  # side networks share theirs, of all layers, which LST reads
                kept = {"max_frames": WINDOW, "backbone_dtype": BACKBONE}
                with quiet_transformers():
                    base = WhisperForConditionalGeneration.from_pretrained(self.model)
                    model = get_meft_model(base, LSTConfig(placement=model.states_of, **kept))
            started = time.process_time()
            prepare_cache(
                str(folder), model, self.extractor, [examples], tokens=self.tokens(row), progress=False
            )
            self._filled[folder] = round(time.process_time() - started, 1)
            write_json(folder.with_suffix(".json"), {"cpu_seconds": self._filled[folder]})
        return self._filled[folder]

    # --- hearing --------------------------------------------------------------------------------------------

    def _tested(self, row: Row, found: dict[str, Any]) -> dict[str, Any]:
        """The record of a run, and what its model hears of the test clips."""
        if row.zero_shot:
            model = self._made(row)
        else:
            with quiet_transformers():
                folder = self._model_folder(row, found["rate"], found["seed"])
                model = MeftForConditionalGeneration.from_pretrained(folder)
        started = time.process_time()
        run = f"lr{found['rate']}-seed{found['seed']}"
        tests = {name: self._heard(row, model, name, run) for name in TESTED[row.language]}
        return {**found, "tests": tests, "test_cpu_seconds": round(time.process_time() - started, 1)}

    def _log_mel(self, name: str) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
        """The clips of a set in the order of their lengths, and batches of them, made once."""
        if name not in self._mels:
            examples = self.clips(name).examples
            order = sorted(range(len(examples)), key=lambda i: examples[i].seconds)
            dataset = data.SpeechDataset(examples.select(order), self.extractor)
            collate = data.Collator(self.extractor)
            self._mels[name] = order, list(DataLoader(dataset, HEARD_BATCH, collate_fn=collate))
        return self._mels[name]

    def _heard(self, row: Row, model: MeftForConditionalGeneration, name: str, run: str) -> dict[str, Any]:
        """What a model hears of a set, greedily, with its language given: the edits of every clip, and how
        many texts ran to the last token allowed. The texts themselves stay in ``work``."""
        examples, language = self.clips(name).examples, name[:2]
        order, batches = self._log_mel(name)
        tokenizer = self.tokenizer(language)
        with torch.autocast("cpu", torch.bfloat16, enabled=row.autocast):
            said = transcribe_batches(
                model,
                batches,
                tokenizer,
                language=language,
                task="transcribe",
                num_beams=1,
                max_new_tokens=MOST_TOKENS,
            )
        heard = [text for _, text in sorted(zip(order, said))]
        folder = self.work / "heard" / row.language / row.name
        write_json(folder / f"{run}-{name}.json", heard)
        lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in heard]
        to_the_end = sum(length >= MOST_TOKENS - 1 for length in lengths)
        references = [each.text for each in examples]
        return {**errors_of(references, heard, language), "to_the_last_token": to_the_end}
