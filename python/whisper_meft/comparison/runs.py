"""Every method on one dataset with one budget, fairly: the runs of a comparison.

Each method gets the same number of epochs and the same number of learning rates to choose from. The rate is
chosen on the validation data, as is the epoch; the test data is looked at once per seed, with what was
chosen. Every run leaves its result in a folder, so an interrupted comparison goes on where it was.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .. import data
from ..data.digest import digest_of
from ..data.examples import ExampleSet, label_inventory, warn_on_shared_speakers
from ..data.splits import split_kinds
from ..encoder.dtypes import parse_dtype
from ..errors import UserError, one_line
from ..evaluation.classifier import Classifier
from ..evaluation.recognition import evaluate_transcripts
from ..evaluation.scoring import evaluate
from ..evaluation.transcriber import Transcriber
from ..files import check_writable, read_json, write_json
from ..methods import MeftConfig
from ..model.pretrained import load_config, load_feature_extractor, resolve_dtype
from ..options.common import DataFormatArguments, ModelArguments
from ..options.generation import GenerationArguments
from ..options.inference import InferenceArguments
from ..options.training import TrainDataArguments, parsed_options
from ..synthetic.shipped import shipped_backbone
from ..training.checkpoints import list_checkpoints
from ..training.data import load_data, usable_examples
from ..training.output_folder import clear_earlier_run, prepare_output_dir
from ..training.run import train
from ..training.settings import make_augmenter, make_task
from ..training.tasks.base import Task, check_method
from .arguments import CompareArguments, options_of, parse_method, rate_factor
from .costs import measure_costs
from .measures import MEASURES

_OF_SOUND = ("dataset_config_name", "audio_column_name", "data_root")

_CACHED_BYTES = 2**31  # of features that are kept in memory between runs


class CachedDataset(Dataset):
    """A dataset whose items are made once."""

    def __init__(self, dataset: Dataset, items: dict[int, Any]):
        self.dataset, self.items = dataset, items
        self.examples = dataset.examples

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index not in self.items:
            self.items[index] = self.dataset[index]
        return self.items[index]


class Comparison:
    """A comparison on disk: ``output_dir/runs/<method>/lr<rate>-seed<seed>/`` and the tables above them."""

    def __init__(self, arguments: CompareArguments):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("compare runs in one process: start it without torchrun")
        self.arguments = arguments
        self.output = Path(arguments.output_dir)
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"output_dir: {self.output} is a file, a folder is needed")
        check_writable(self.output / "compare.json")
        self.backbone = str(arguments.model_name_or_path or shipped_backbone())
        self.device = torch.device("cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu")
        if arguments.bf16 is None:
            arguments.bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        self.source = arguments.train_data or str(self._corpus_folder())
        self.extractor = load_feature_extractor(self.backbone, "model_name_or_path")
        self.config = load_config(ModelArguments(self.backbone))
        self.data_arguments = TrainDataArguments(
            train_data=self.source,
            eval_data=arguments.eval_data,
            validation_fraction=arguments.validation_fraction,
            **{each.name: getattr(arguments, each.name) for each in fields(DataFormatArguments)},
        )
        how = {"progress": False, "feature_extractor": self.extractor}
        self.measure = MEASURES[arguments.task]
        # What is learnt of the data does not depend on the method.
        method = MeftConfig.from_dict({"method": "lst", "max_frames": arguments.max_frames})
        of_task = {"task": arguments.task, "language": arguments.language}
        how_told = {name: getattr(arguments, name) for name in ("num_train_epochs", "seed")}
        how_told |= {**of_task, **arguments.given(), **arguments.augment_given()}
        (self._model, _, _, self._training), sizes = self._any_run(how_told), self.config
        self.task = self._task_of(method)
        # Who names a method hears now that it cannot be; of all of them it gets a row that says why.
        for entry in () if arguments.methods == "all" else arguments.chosen:
            try:
                check_method(self._config(entry), sizes, self.measure.base_class)
            except UserError as error:
                raise UserError(f"{entry}: {error}") from error
        if arguments.train_data is None:
            self._make_corpus()
        self.examples = load_data(self.data_arguments, self.task, True, True, arguments.seed, **how)
        self.task.note(self.examples.training)
        self.labels = label_inventory(self.examples.training) if arguments.task == "classify" else None
        self.test = self._load_test()
        self.settings = {
            "backbone": self.backbone,
            "train_data": self.source,
            "eval_data": arguments.eval_data,
            "test_data": self.test.description,
            "train_examples": len(self.examples.training),
            "validation_examples": len(self.examples.evaluation),
            "test_examples": len(self.test),
            "data_format": self._data_format(),
            "digests": {
                "training": digest_of(self.examples.training, speakers=True),
                "validation": digest_of(self.examples.evaluation, speakers=True),
                "test": digest_of(self.test, speakers=True),
                **self._mixed_in(),
            },
            **({"labels": self.labels} if self.labels is not None else of_task),
            "split_seed": arguments.seed,
            "num_train_epochs": arguments.num_train_epochs,
            "batch_size": arguments.batch_size,
            "max_frames": arguments.max_frames,
            "bf16": arguments.bf16,
            "device": self.device.type,
            **arguments.settled(),
            **arguments.augment_given(),
        }
        clips = len(self.examples.training) + len(self.examples.evaluation)
        window = 2 * self.config.max_source_positions * self.config.num_mel_bins * 4
        small = clips * window < _CACHED_BYTES
        self._cache: dict[tuple[int, int | str], dict[int, Any]] | None = {} if small else None

    def _data_format(self) -> dict[str, Any]:
        """Those of the options of reading that choose between sounds of one name. What others change the
        digests tell."""
        values = {name: getattr(self.arguments, name) for name in _OF_SOUND}
        return {name: value for name, value in values.items() if value is not None}

    def _mixed_in(self) -> dict[str, str]:
        """Digests of the recordings that training clips are mixed with."""
        augment = make_augmenter(self._training, self.arguments.seed, self.extractor)
        found = {} if augment is None else {"noise_dir": augment.noises, "room_dir": augment.rooms}
        return {name: digest_of(each) for name, each in found.items() if each is not None}

    def _corpus_folder(self) -> Path:
        clips = self.arguments.train_clips_per_class, self.arguments.test_clips_per_class
        return self.output / f"corpus_seed{self.arguments.seed}_{clips[0]}_{clips[1]}"

    def _make_corpus(self) -> None:
        from ..synthetic.speech import make_accent_corpus

        make_accent_corpus(
            self._corpus_folder(),
            train_clips_per_class=self.arguments.train_clips_per_class,
            test_clips_per_class=self.arguments.test_clips_per_class,
            seed=self.arguments.seed,
            progress=sys.stderr.isatty(),
        )

    def _config(self, method: str) -> MeftConfig:
        options = options_of(method, self.config.d_model, self.arguments.reduction_factor)
        return MeftConfig.from_dict({"max_frames": self.arguments.max_frames, **options})

    def _task_of(self, method: MeftConfig) -> Task:
        return make_task(self._model, self._training, method, self.config, self.extractor)

    def _load_test(self) -> ExampleSet:
        source = self.arguments.test_data or self.source
        options = self.task.reader_options(self.data_arguments)
        kinds = split_kinds(data.list_splits(source, **options)).values()
        if self.arguments.test_data is None and "test" not in kinds:
            raise UserError(f"--test_data is needed: {source} has no test split")
        test = data.load_examples(source, split="test" if "test" in kinds else None, **options)
        how = {"strict": self.arguments.strict, "progress": False, "feature_extractor": self.extractor}
        test, bad = usable_examples(self.task, self.task.check_read(test), **how)
        self.left_out = self.examples.left_out + bad
        self.task.check(self.examples.training, test)
        warn_on_shared_speakers(self.examples.training, test)
        return test

    def _any_run(self, options: dict[str, Any]) -> tuple:
        """The arguments of `whisper-meft train` of all runs alike."""
        given = {"model_name_or_path": self.backbone, "train_data": self.source, "output_dir": self.output}
        return parsed_options({**given, "use_cpu": self.device.type == "cpu", **options})

    def _parse(self, method: str, rate: float, seed: int, folder: Path) -> tuple:
        """The arguments of `whisper-meft train` for one run."""
        options = options_of(method, self.config.d_model, self.arguments.reduction_factor)
        values = {
            "max_frames": self.arguments.max_frames,
            **options,
            "model_name_or_path": self.backbone,
            "train_data": self.source,
            "output_dir": folder,
            "learning_rate": rate,
            "seed": seed,
            "num_train_epochs": self.arguments.num_train_epochs,
            "per_device_train_batch_size": self.arguments.batch_size,
            "per_device_eval_batch_size": 2 * self.arguments.batch_size,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "save_total_limit": 1,
            "bf16": self.arguments.bf16,
            "use_cpu": self.device.type == "cpu",
            "disable_tqdm": True,
            **self.arguments.given(),
            **self.arguments.augment_given(),
        }
        if self.arguments.task == "transcribe":  # the backbone alone is scored once, on the test data
            values |= {"task": "transcribe", "language": self.arguments.language, "zero_shot": False}
        if self._cache is not None:
            values["dataloader_num_workers"] = 0  # the cache is in this process
        return parsed_options(values)

    def _dataset(self, examples: ExampleSet, *arguments: Any, **more: Any) -> Dataset:
        dataset = data.SpeechDataset(examples, *arguments, **more)
        if self._cache is None or dataset.augment is not None:
            return dataset
        # A method may have a window of its own, of which others' items are not; none has two at a time.
        for key in [key for key in self._cache if key[1] != dataset.max_frames]:
            del self._cache[key]
        return CachedDataset(dataset, self._cache.setdefault((id(examples), dataset.max_frames), {}))

    def run(
        self, method: str, rate: float, seed: int, say: Callable[[str], None] = lambda text: None
    ) -> dict[str, Any]:
        """One run's validation scores; from disk where it is done, from its checkpoint where it was cut off.
        ``say`` is told where there is a run of something else, which goes.

        Raises:
            UserError, ...: whatever makes the run fail.
        """
        name = method.replace(":", "-").replace("+", "-")
        folder = self.output / "runs" / name / f"lr{rate:g}-seed{seed}"
        settings = {**self.settings, "learning_rate": rate, "seed": seed}
        settings["method"] = options_of(method, self.config.d_model, self.arguments.reduction_factor)
        done = folder / "result.json"
        begun = folder / "settings.json"
        known = read_json(begun) if begun.is_file() else None
        same = known == settings
        if same and done.is_file():
            return read_json(done)
        if known is not None and not same:
            why = _differences(known, settings)
            say(f"  {method}: learning rate {rate:g}, seed {seed}: trained anew, {why}")
        parsed = self._parse(method, rate, seed, folder)
        parsed[3].overwrite_output_dir = not same
        parsed[3].resume_from_checkpoint = "True" if same else None
        if not same:
            for name in ("result.json", "test.json"):
                (folder / name).unlink(missing_ok=True)
        prepare_output_dir(parsed[3])
        if not same:
            clear_earlier_run(folder)
        write_json(begun, settings)
        parsed[3].overwrite_output_dir, parsed[3].resume_from_checkpoint = False, "True"
        started = time.perf_counter()
        with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            outcome = train(*parsed, examples=self.examples, make_dataset=self._dataset)
        result = {
            "folder": str(folder.relative_to(self.output)),
            "learning_rate": rate,
            "seed": seed,
            **self.measure.validation(outcome),
            "validation_loss": read_json(folder / "eval_results.json")["loss"],
            "steps": outcome.training["steps"],
            "train_loss": outcome.training["train_loss"],
            "never_moved": outcome.training["gradients"]["never_moved"],
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(done, result)
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        return result

    def _can_score(self, run: dict[str, Any]) -> bool:
        folder = self.output / run["folder"]
        return (folder / "test.json").is_file() or (folder / "model.safetensors").is_file()

    def score_on_test(self, run: dict[str, Any]) -> dict[str, Any]:
        """The test scores of a finished run's model."""
        folder = self.output / run["folder"]
        if (folder / "test.json").is_file():
            return read_json(folder / "test.json")
        scores = self._scores(str(folder))
        write_json(folder / "test.json", scores)
        return scores

    def _scores(self, model_dir: str) -> dict[str, Any]:
        """On the test data."""
        size, device = 2 * self.arguments.batch_size, self.device.type
        # As all of them are trained, and as the baseline hears a clip.
        options = InferenceArguments(batch_size=size, device=device, window="first")
        if self.arguments.task == "classify":
            scores, _ = evaluate(Classifier.load(model_dir, options, progress=False), self.test)
            return scores.as_dict()
        generation = GenerationArguments(language=self.task.speaking.language)
        transcriber = Transcriber.load(model_dir, options, generation, progress=False)
        return evaluate_transcripts(transcriber, self.test).as_dict()

    def zero_shot(self) -> dict[str, Any]:
        """The row of the backbone alone, scored once on the test data."""
        path, settings = self.output / "zero_shot.json", {"backbone": self.backbone}
        names = ("test_data", "test_examples", "language", "data_format")
        settings |= {name: self.settings[name] for name in names}
        settings["digest"] = self.settings["digests"]["test"]
        known = read_json(path) if path.is_file() else {}
        if known.get("settings") != settings:
            known = {"settings": settings, "test": self._scores(self.backbone)}
            write_json(path, known)
        return {"status": "ok", **self.measure.of_test([known["test"]])}

    def compare(self, method: str, say: Callable[[str], None]) -> dict[str, Any]:
        """Everything about one method: search, seeds, test scores, costs."""
        arguments = self.arguments
        search, failures = [], []
        for rate in arguments.learning_rates:
            rate *= rate_factor(arguments.task, parse_method(method)[0])
            try:
                search.append(self.run(method, rate, arguments.seed, say))
            except Exception as error:
                failures.append({"learning_rate": rate, "failed": one_line(error)})
                say(f"  {method}: learning rate {rate:g} failed: {failures[-1]['failed']}")
                continue
            say(
                f"  {method}: learning rate {rate:g}: {self.measure.said(search[-1])}, loss "
                f"{search[-1]['validation_loss']:.3f}, {search[-1]['seconds']:.0f} s"
            )
        if not search:
            raise UserError(failures[0]["failed"])
        best = max(search, key=self.measure.quality)
        if not self._can_score(best):  # its weights went when another rate was best
            (self.output / best["folder"] / "result.json").unlink()
            best = self.run(method, best["learning_rate"], arguments.seed)
        runs = [best]
        for seed in range(arguments.seed + 1, arguments.seed + arguments.seeds):
            runs.append(self.run(method, best["learning_rate"], seed, say))
        tests = [self.score_on_test(run) for run in runs]
        for run in search:
            if run["folder"] != best["folder"]:  # a whole encoder in some methods
                (self.output / run["folder"] / "model.safetensors").unlink(missing_ok=True)
        validation = f"validation_{self.measure.key}"
        return {
            "status": "ok",
            "options": options_of(method, self.config.d_model, arguments.reduction_factor),
            "learning_rate": best["learning_rate"],
            "search": search + failures,
            "seeds": [
                {"seed": run["seed"], validation: run[validation], "test": test}
                for run, test in zip(runs, tests)
            ],
            **self.measure.of_test(tests),
            **self.costs(method),
        }

    def costs(self, method: str) -> dict[str, Any]:
        """Time, memory and parameters of a training step at the comparison's batch."""
        arguments, config, task = self.arguments, self._config(method), self.task
        if config.max_frames != arguments.max_frames:  # a window of its own
            task = self._task_of(config)
            task.note(self.examples.training)
        dataset = task.dataset(self.examples.training, self._dataset)
        size = min(arguments.batch_size, len(dataset))
        items = [dataset[index] for index in range(size)]
        batch = task.collator()(items)
        sizes = type(self.config).from_dict(self.config.to_dict())
        if self.labels is not None:
            sizes.num_labels = len(self.labels)
        dtype = parse_dtype(resolve_dtype("auto", self.device.type == "cpu"))
        autocast = torch.bfloat16 if arguments.bf16 else None
        return measure_costs(sizes, config, batch, self.device, dtype, autocast, self.measure.base_class)


def _differences(known: dict[str, Any], settings: dict[str, Any]) -> str:
    """Why a run with settings ``known`` is not that of ``settings``; earlier versions kept fewer of them."""
    unknown = [name for name in settings if name not in known]
    changed = [
        name for name in {**known, **settings} if name not in unknown and known[name] != settings.get(name)
    ]
    parts = [f"another {', '.join(changed)}"] if changed else []
    parts += [f"{', '.join(unknown)} of the run that is there not known"] if unknown else []
    return "; ".join(parts)
