"""One run of the study: trained as `whisper-meft train` does, scored on its fold's test clips, recorded."""

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import WhisperForAudioClassification
from whisper_meft import MeftConfig, data, get_meft_model
from whisper_meft.commands.compare import make_parser
from whisper_meft.comparison.arguments import options_of
from whisper_meft.comparison.runs import Comparison
from whisper_meft.data.augmenter import Augmenter
from whisper_meft.errors import UserError
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.feature_cache.dataset import CachedCollator, CachedDataset
from whisper_meft.feature_cache.filling import prepare_cache
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.files import read_json, write_json
from whisper_meft.model.backbone import quiet_transformers
from whisper_meft.model.pretrained import load_config, load_whisper
from whisper_meft.options.common import ModelArguments
from whisper_meft.options.inference import InferenceArguments
from whisper_meft.training.checkpoints import list_checkpoints

from benchmarks import record

from .folds import TASKS, folds, load_task, write_manifests
from .plan import ATTENTIONS, BATCH, Cell, Row, run_name

# What of the machine and the code a row says that it was run on.
ORIGIN = ("commit", "dirty", "date", "device", "cores", "threads", "python", "torch", "transformers")


class Fold(Comparison):
    """One fold of a task: what `whisper-meft compare` does, with the frozen encoder's states from a cache."""

    def __init__(self, study: "Study", row: Row, fold: int):
        manifests = study.work / "folds" / row.task / str(fold)
        runs = study.work / "runs" / row.task / str(fold) / row.budget
        argv = [f"--{split}_data={manifests / file}.csv" for split, file in _SOURCES]
        argv += [f"--model_name_or_path={study.model}", f"--output_dir={runs}", "--use_cpu=True"]
        argv += [f"--num_train_epochs={row.epochs}", f"--batch_size={BATCH}", f"--bf16={row.bf16}"]
        argv += study.options(row)
        (arguments,) = make_parser().parse(argv)
        super().__init__(arguments)
        self.study, self.row = study, row

    def _parse(self, method: str, rate: float, seed: int, folder: Path) -> tuple:
        parsed = super()._parse(method, rate, seed, folder)
        for name, value in self.row.training.items():
            setattr(parsed[3], name, value)
        if self.row.frozen:
            parsed[3].cache_features = str(self.study.cache_folder(self.row))
        return parsed

    def answers(self, folder: Path, attention: str | None = None) -> list[int]:
        """The class that a finished run's model gives each test clip.

        Args:
            attention: of UniPT, where it is to be another one than it was trained with.
        """
        classifier = self.classifier(folder, attention)
        if not self.row.frozen:
            return classifier.probabilities(self.test).argmax(1).tolist()
        return self.cached_answers(classifier, self.test)

    def classifier(self, folder: Path, attention: str | None = None) -> Classifier:
        """A finished run's model."""
        options = InferenceArguments(batch_size=BATCH, device="cpu", window="first", attention=attention)
        return Classifier.load(folder, options, progress=False)

    def cached_answers(
        self, classifier: Classifier, examples: data.ExampleSet, augment: Augmenter | None = None
    ) -> list[int]:
        """The class that a model gives each clip, of states in the cache: of the clips as they are, or of
        what ``augment`` makes of them."""
        cache = FeatureCache(self.study.cache_folder(self.row))
        dataset = CachedDataset(examples, cache, classifier.model, augment=augment)
        with torch.inference_mode():
            batches = DataLoader(dataset, BATCH, collate_fn=CachedCollator())
            logits = torch.cat([classifier.model(**batch).logits for batch in batches])
        if not torch.isfinite(logits).all():
            raise UserError("the model's output is NaN or infinite")
        return logits.argmax(1).tolist()


def cache_seconds(folder: Path, sets: Iterable[data.ExampleSet]) -> float | None:
    """CPU seconds that the states in ``folder`` took; None where there are none. States of recordings that
    have changed since are removed."""
    done = folder.with_suffix(".json")
    if not done.is_file():
        return None
    cache = FeatureCache(folder)
    if all(cache.checked(example) is not None for examples in sets for example in examples):
        return read_json(done)["cpu_seconds"]
    done.unlink()
    shutil.rmtree(folder)
    return None


_SOURCES = (("train", "train"), ("eval", "dev"), ("test", "test"))


class Study:
    """The study on disk.

    Args:
        model: the Whisper backbone, a folder or a name on the hub. speech: the recordings' folder.
        work: gets ``rows/`` (a file for each run), features and unfinished runs.
    """

    fold_class: type[Fold] = Fold

    def __init__(self, model: str, speech: Path, work: Path):
        self.model, self.speech, self.work = model, speech, work
        self._fold: tuple[Any, Fold] | None = None
        self._tasks: dict[str, list[dict[str, list]]] = {}
        self._filled: dict[Path, float] = {}  # seconds that a cache took, once it was looked at

    # --- data -----------------------------------------------------------------------------------------------

    def task(self, name: str) -> list[dict[str, list]]:
        """The folds of a task; their manifests lie in ``work``."""
        if name not in self._tasks:
            self._tasks[name] = folds(load_task(self.speech, name), TASKS[name].own_split)
            for number, fold in enumerate(self._tasks[name]):
                write_manifests(fold, self.work / "folds" / name / str(number))
        return self._tasks[name]

    def options(self, row: Row) -> list[str]:
        """Further options of `whisper-meft compare` for a row."""
        return []

    def cache_folder(self, row: Row) -> Path:
        options = options_of(row.compared, 1, 1)
        kind = [
            str(options[k])
            for k in ("max_frames", "backbone_dtype", "backbone_quantization")
            if options.get(k)
        ]
        if row.method == "sherl" and options.get("backbone_quantization"):
            kind.append("sherl")  # whose last layer is not quantised
        return self.work / "features" / row.task / "-".join(kind)

    def fill_cache(self, row: Row) -> float:
        """Makes the states that the row reads, of all clips of its task; gives the CPU seconds it took."""
        folder = self.cache_folder(row)
        fold = self.task(row.task)[0]
        manifests = self.work / "folds" / row.task / "0"
        if folder not in self._filled:
            sets = [data.load_examples(str(manifests / f"{split}.csv")) for split in fold]
            seconds = cache_seconds(folder, sets)
            self._filled[folder] = self._make_cache(row, folder, sets) if seconds is None else seconds
        return self._filled[folder]

    def _make_cache(self, row: Row, folder: Path, sets: list[data.ExampleSet]) -> float:
        kept = ("max_frames", "backbone_dtype", "backbone_quantization")
        options = {key: value for key, value in options_of(row.compared, 1, 1).items() if key in kept}
        method = "sherl" if folder.name.endswith("sherl") else "weighted_sum"  # which reads all layers
        reader = self._fold_of(row, 0)
        with quiet_transformers():
            base = load_whisper(ModelArguments(self.model), "float32")
            model = get_meft_model(base, MeftConfig.from_dict({"method": method, **options}))
        started = time.process_time()
        sets = [
            data.check_audio(each, progress=False, feature_extractor=reader.extractor)[0] for each in sets
        ]
        prepare_cache(str(folder), model, reader.extractor, sets, progress=False)
        seconds = time.process_time() - started
        write_json(folder.with_suffix(".json"), {"cpu_seconds": seconds})
        return seconds

    def _fold_of(self, row: Row, fold: int) -> Fold:
        """The fold that runs the row; the last one is kept."""
        self.task(row.task)
        key = row.task, fold, row.budget, row.bf16
        if self._fold is None or self._fold[0] != key:
            self._fold = key, self.fold_class(self, row, fold)
        found = self._fold[1]
        found.row = row
        return found

    # --- rows -----------------------------------------------------------------------------------------------

    def path(self, row: Row, fold: int, rate: float, seed: int) -> Path:
        return self.work / "rows" / row.task / row.name / f"fold{fold}-lr{rate:g}-seed{seed}.json"

    def rate_of(self, row: Row) -> float | None:
        """The rate that the search has chosen so far; None before it began."""
        tried = [read_json(path) for rate in row.rates if (path := self.path(row, 0, rate, 0)).is_file()]
        good = [cell for cell in tried if cell["status"] == "ok"]
        if not good:
            return None
        return max(good, key=lambda cell: (cell["validation_accuracy"], -cell["validation_loss"]))["rate"]

    def possible(self, cell: Cell) -> bool:
        """Whether it has a rate: not where all of the row's failed."""
        return cell.rate is not None or self.rate_of(cell.row) is not None

    def done(self, cell: Cell) -> bool:
        rate = self.rate_of(cell.row) if cell.rate is None else cell.rate
        return rate is not None and self.path(cell.row, cell.fold, rate, cell.seed).is_file()

    def run(self, cell: Cell) -> dict[str, Any]:
        """Runs a cell and writes its file.

        Raises:
            UserError: no rate is known yet; the data or the model cannot be used.
            KeyboardInterrupt, SystemExit: a signal came; the run can be gone on with.
        """
        row = cell.row
        rate = self.rate_of(row) if cell.rate is None else cell.rate
        if rate is None:
            raise UserError(f"{row.task} {row.entry}: no learning rate could be used")
        filled = self.fill_cache(row) if row.frozen else None
        fold = self._fold_of(row, cell.fold)
        folder = fold.output / "runs" / run_name(row.compared) / f"lr{rate:g}-seed{cell.seed}"
        begun = folder.is_dir() and bool(list_checkpoints(folder))
        base = _reset_peak()
        started = time.process_time()
        about = {"task": row.task, "entry": row.entry, "fold": cell.fold, "rate": rate, "seed": cell.seed}
        budget = {"epochs": row.epochs, "batch": BATCH, "bf16": row.bf16, "training": row.training}
        origin = {key: value for key, value in record.environment("cpu").items() if key in ORIGIN}
        try:
            result = fold.run(row.compared, rate, cell.seed)
            seconds, peak = time.process_time() - started, _peak(base)
            answers = self._answers(fold, fold.output / result["folder"])
        except (UserError, RuntimeError, ValueError) as error:
            found = {**about, **budget, "status": f"failed: {error}".splitlines()[0], "origin": origin}
        else:
            trained = self.task(row.task)[cell.fold]["train"]
            found = {
                **about,
                **budget,
                "status": "ok",
                **answers,
                "validation_accuracy": result["validation_accuracy"],
                "validation_loss": result["validation_loss"],
                "train_loss": result["train_loss"],
                "steps": result["steps"],
                "trainable_parameters": self.trainable_parameters(row, len(fold.labels)),
                # Of a run that was gone on with only the last part was measured.
                "cpu_seconds": None if begun else round(seconds, 1),
                "cache_cpu_seconds": filled,
                "audio_seconds": round(row.epochs * sum(clip.seconds for clip in trained), 1),
                "peak_bytes": peak,
                "bytes_before": base,
                "origin": origin,
            }
            (fold.output / result["folder"] / "model.safetensors").unlink(missing_ok=True)
        write_json(self.path(row, cell.fold, rate, cell.seed), found)
        return found

    def _answers(self, fold: Fold, folder: Path) -> dict[str, Any]:
        """What a run's record holds of its model's answers, ``predicted`` being those to the test clips."""
        predicted = {"predicted": digits(fold.answers(folder))}
        if fold.row.method != "unipt" or "attention=" in fold.row.entry:
            return predicted
        # What a model costs in accuracy that is run with a cheaper attention than it learned with.
        return {**predicted, "read_as": {form: digits(fold.answers(folder, form)) for form in ATTENTIONS}}

    def trainable_parameters(self, row: Row, classes: int) -> int:
        """How many parameters train in a row's runs."""
        sizes = load_config(ModelArguments(self.model))
        sizes.num_labels = classes
        with quiet_transformers(), torch.device("meta"):
            base = WhisperForAudioClassification._from_config(sizes)
            kept = options_of(row.compared, sizes.d_model, 8)
            kept.pop("backbone_quantization", None)  # no matter here
            model = get_meft_model(base, MeftConfig.from_dict(kept))
        return model.get_nb_trainable_parameters()[0]


def digits(values: Iterable[int]) -> str:
    return "".join(map(str, values))


def _reset_peak() -> int | None:
    """Has Linux count the process's peak memory anew; gives the resident bytes now, None where it cannot."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status("VmRSS")
    return None


def _peak(base: int | None) -> int | None:
    """The peak resident bytes since ``_reset_peak``, which gave ``base``: Linux counts pages for each
    processor by itself, and its peak may be a few below what it said before."""
    return None if base is None else max(base, _status("VmHWM"))


def _status(key: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    return None
