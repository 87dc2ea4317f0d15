"""The paper's comparison as a scale model: synthetic accents and languages on the shipped backbone.

    python examples/study/study.py --work DIR            # everything that results/ does not hold yet
    python examples/study/study.py --work DIR --parts accents-5db,reduction
    python examples/study/study.py --report              # tables and figures of README.md from results/

Each part writes ``results/<part>.json`` anew after every method; a run that was cut off goes on where it was.
Corpora and trained models are left in DIR. One thread; the CPU times are those of the process.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
for folder in (HERE, ROOT, ROOT / "python"):  # a plain checkout needs no installation
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import watching  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import WhisperForAudioClassification  # noqa: E402
from whisper_meft import MeftConfig, data, get_meft_model  # noqa: E402
from whisper_meft.commands.compare import make_parser  # noqa: E402
from whisper_meft.comparison import runs as compare  # noqa: E402
from whisper_meft.comparison.arguments import RATE_FACTOR, options_of, parse_method  # noqa: E402
from whisper_meft.comparison.measures import spread  # noqa: E402
from whisper_meft.data.examples import ExampleSet  # noqa: E402
from whisper_meft.errors import UserError, one_line  # noqa: E402
from whisper_meft.evaluation.classifier import Classifier  # noqa: E402
from whisper_meft.evaluation.metrics import score  # noqa: E402
from whisper_meft.files import read_json, write_json  # noqa: E402
from whisper_meft.memory.counting import estimate  # noqa: E402
from whisper_meft.model.backbone import quiet_transformers  # noqa: E402
from whisper_meft.options.inference import InferenceArguments  # noqa: E402
from whisper_meft.synthetic.speech import ACCENTS, make_accent_corpus  # noqa: E402
from whisper_meft.training.tasks.classification import Classification  # noqa: E402

from benchmarks import record, steps, train_step  # noqa: E402

RESULTS = HERE / "results"
SEEDS = 3
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LOWER = {3e-4: 1e-4, 1e-3: 3e-4, 3e-3: 1e-3, 1e-2: 3e-3}
# Voices that read the same English sentences by the rules and with the sounds of their language, two by two
# near each other. The backbone's pretraining had none of the six.
LANGUAGES = ("af", "nb", "lt", "lv", "sk", "sl")
LEVELS = {"accents-30db": 30.0, "accents-10db": 10.0, "accents-0db": 0.0}
SEARCHED = "accents-10db"  # the level where the whole search is made; the others look beside its choice
NEARBY = f"the one chosen in {SEARCHED} and the next lower one"
VARIED = "accents-0db"  # the level of the parts that vary the side networks: it separates methods best
CORPUS = {
    "train_clips_per_class": 80,
    "validation_clips_per_class": 30,
    "test_clips_per_class": 120,
    "seconds": 2.0,
    "seed": 0,
}
BUDGET = {"num_train_epochs": 6.0, "batch_size": 8, "max_frames": "fidelity", "reduction_factor": 8}
# All of them; what the paper says most about comes first.
METHODS = ("lst", "unipt", "sherl", "head", "weighted_sum", "full", "lora", "bitfit", "adapter", "mezo")
METHODS += ("adalora", "lora_plus", "s2_lora")
REDUCTION_FACTORS = (2, 4, 16)  # and 8, which the other parts have
SIDE_NETWORKS = ("lst", "unipt", "sherl")
LONGER = {"num_train_epochs": 16.0}
LONGER_METHODS = ("lst", "unipt", "sherl", "head", "full")
LAYERS = ("every:2", "last:1", "last:2", "last:3", [1], [2], [3])
# At the factor and the rate at which runs of the parts before stayed at chance.
STARTS = (
    "sherl:reduction_factor=4@0.01",
    "sherl:reduction_factor=4+start=even@0.01",
    "sherl:reduction_factor=4+start=zero_shot@0.01",
)
START_SEEDS = 6
# The rates are above those of the search, at which the loss hardly falls.
QUERIES = ("mezo@0.001", "mezo:mezo_queries=4@0.003")
QUERY_SEEDS = 2
# Of UniPT; a model that is trained with the exact one is scored with each of the others too.
ATTENTIONS = ("pooled:4", "pooled:8", "linear", "summary")
ATTENTION_LEVELS = {f"attention-{level}": LEVELS[f"accents-{level}"] for level in ("10db", "0db")}
# Methods trained on clips of one level and heard at all of LEVELS_HEARD, at the rate that the search chose.
AUGMENTED_METHODS = ("lst", "head")
NOISE = {"augment": ["noise:0.5"], "noise_snr": [0.0, 10.0]}
SPEED = {"augment": ["speed", "noise:0.8"], "noise_snr": [-5.0, 10.0]}
# By entry: the level trained on, the epochs, how, and the augmented copies of each clip in the cache.
AUGMENTED = {
    "10 dB, plain": (10.0, 6, {}, 0),
    "10 dB, plain, 16 epochs": (10.0, 16, {}, 0),
    "10 dB, noise": (10.0, 6, NOISE, 4),
    "10 dB, noise, 16 epochs": (10.0, 16, NOISE, 4),
    "10 dB, speed and noise, 16 epochs": (10.0, 16, SPEED, 8),
    "0 dB, noise, 16 epochs": (0.0, 16, NOISE, 4),
    "0 dB, speed, 16 epochs": (0.0, 16, {"augment": ["speed"]}, 16),
    "0 dB, plain, 48 epochs": (0.0, 48, {}, 0),
    "0 dB, speed, 48 epochs": (0.0, 48, {"augment": ["speed"]}, 16),
}
LEVELS_HEARD = (0.0, 10.0)
AUGMENTED_SEEDS = 2
FRAMES = (250, 500, 1000, 1500)
COUNTED = {"model": "small", "batch": 128}
MEASURED = {"model": "base", "batch": 2, "repeats": 3}
LENGTH_METHODS = ("full", "lora", "lst", "unipt", "sherl")


# --- trained cells ------------------------------------------------------------------------------------------


class Study(compare.Comparison):
    """A comparison that keeps each test clip's answer, reads each clip's features once, and trains what
    leaves the encoder frozen from hidden states computed once.

    Attributes:
        reads: attentions that a UniPT trained with the exact one is scored with too.
        also: further test sets of the same clips, by name.
        copies: augmented ones of each clip, where clips are augmented.
    """

    reads: Sequence[str] = ()
    also: dict[str, ExampleSet] = {}
    copies: int = 0

    def _parse(self, method: str, rate: float, seed: int, folder: Path) -> tuple:
        parsed = super()._parse(method, rate, seed, folder)
        name, options = parse_method(method)
        if MeftConfig.methods()[name].frozen_encoder:
            layers = str(options.get("layers", "all")).replace(" ", "").replace(":", "-")
            parsed[3].cache_features = str(self.output / "features" / f"{name}-{layers}")
        if self.copies:  # of one seed, for all runs from the same clips
            source = Path(self.arguments.train_data)
            parsed[3].cache_features = str(source.parent / f"{source.name}-copies")
            parsed[3].cache_copies, parsed[3].data_seed = self.copies, 0
        return parsed

    def answers(self, run: dict[str, Any]) -> dict[str, Any]:
        """Scores of a finished run's model on the test clips, ``predicted``, a digit per clip, of those of
        ``also`` in ``predicted_<name>``, and of ``reads`` in ``read_as`` what another attention gives."""
        path = self.output / run["folder"] / "answers.json"
        if path.is_file():
            return read_json(path)
        predicted = self.predicted(run)
        scores = score(self.reference(), predicted, self.labels)
        found = {
            "accuracy": scores.accuracy,
            "mean_class_accuracy": scores.mean_class_accuracy,
            "predicted": digits(predicted),
            **{f"predicted_{name}": digits(self.predicted(run, sets)) for name, sets in self.also.items()},
        }
        if reads := self.reads if Path(run["folder"]).parent.name == "unipt" else ():
            found["read_as"] = {form: digits(self.predicted(run, attention=form)) for form in reads}
        write_json(path, found)
        (path.parent / "model.safetensors").unlink(missing_ok=True)
        return found

    def predicted(
        self, run: dict[str, Any], examples: ExampleSet | None = None, attention: str | None = None
    ) -> np.ndarray:
        """The class that a finished run's model gives each clip.

        Args:
            examples: by default the test clips.
            attention: of UniPT, where it is to be another one than it was trained with.
        """
        options = InferenceArguments(batch_size=32, device="cpu", window="first", attention=attention)
        classifier = Classifier.load(self.output / run["folder"], options, progress=False)
        frames = classifier.max_frames
        dataset = self._dataset(self.test if examples is None else examples, self.extractor, None, frames)
        loader = DataLoader(dataset, 32, collate_fn=data.Collator(self.extractor, frames))
        with torch.inference_mode():
            logits = torch.cat([classifier.model(**batch).logits.float() for batch in loader])
        if not torch.isfinite(logits).all():
            raise UserError("the model's output is NaN or infinite")
        return logits.argmax(1).numpy()

    def reference(self) -> np.ndarray:
        return np.array([self.labels.index(example.label) for example in self.test])

    def parameters(self, method: str) -> int:
        """How many parameters train."""
        options = options_of(method, self.config.d_model, self.arguments.reduction_factor)
        sizes = type(self.config).from_dict(self.config.to_dict())
        sizes.num_labels = len(self.labels)
        with quiet_transformers():
            base = WhisperForAudioClassification._from_config(sizes)
            model = get_meft_model(base, MeftConfig.from_dict(options))
        return model.get_nb_trainable_parameters()[0]

    def row(self, method: str, rates: Sequence[float]) -> dict[str, Any]:
        """One row of a part: the search, where there is more than one rate, and the seeds."""
        search, failures = [], []
        for rate in rates:
            try:
                search.append(self.run(method, rate, 0))
            except Exception as error:  # such as a loss that is no number any more
                failures.append({"learning_rate": rate, "failed": one_line(error)})
        if not search:
            raise UserError(f"{method}: no learning rate can be used: {failures[0]['failed']}")
        best = max(search, key=lambda run: (run["validation_accuracy"], -run["validation_loss"]))
        runs = [best, *(self.run(method, best["learning_rate"], seed) for seed in range(1, SEEDS))]
        row = self._scored(method, runs)
        for run in search:
            (self.output / run["folder"] / "model.safetensors").unlink(missing_ok=True)
        searched = "learning_rate", "validation_accuracy", "validation_loss"
        found = [{key: run[key] for key in searched} for run in search]
        return {"method": method, **row, "search": found + failures}

    def row_at(self, entry: str, seeds: int) -> dict[str, Any]:
        """A row without a search: of ``"sherl:start=even@0.01"`` that rate, with so many seeds."""
        method, _, rate = entry.rpartition("@")
        runs = [self.run(method, float(rate), seed) for seed in range(seeds)]
        return {"method": entry, **self._scored(method, runs)}

    def _scored(self, method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the runs of one rate gave, on the test clips and while they trained."""
        kept = "seed", "validation_accuracy", "validation_loss", "train_loss"
        seeds = [{key: run[key] for key in kept} | self.answers(run) for run in runs]
        for run, seed in zip(runs, seeds):
            watched = self.output / run["folder"] / "watched.json"
            if watched.is_file():
                seed["watched"] = read_json(watched)
        return {
            "status": "ok",
            "options": options_of(method, self.config.d_model, self.arguments.reduction_factor),
            "learning_rate": runs[0]["learning_rate"],
            "seeds": seeds,
            "accuracy": spread([each["accuracy"] for each in seeds]),
            "mean_class_accuracy": spread([each["mean_class_accuracy"] for each in seeds]),
            "trainable_parameters": self.parameters(method),
        }


def digits(values: Iterable[int]) -> str:
    return "".join(map(str, values))


def open_study(
    work: Path, labels: Sequence[str], snr_db: float, **changes: float
) -> tuple[Study, dict[str, Any]]:
    """The comparison of a part, its corpus made as needed, and what the record says about both.

    Args:
        changes: of ``BUDGET``.
    """
    name = f"{'languages' if tuple(labels) == LANGUAGES else 'accents'}-{snr_db:g}db"
    corpus = make_accent_corpus(work / name, accents=labels, snr_db=(snr_db, snr_db), **CORPUS)
    runs = "-".join([name, *(f"{key}{value:g}" for key, value in changes.items())])
    argv = [f"--train_data={corpus}", f"--output_dir={work / 'runs' / runs}", "--use_cpu=True"]
    argv += [f"--{key}={value}" for key, value in {**BUDGET, **changes}.items()]
    (arguments,) = make_parser().parse(argv)
    study = Study(arguments)
    shapes = {
        "classes": study.labels,
        "snr_db": snr_db,
        **CORPUS,
        **BUDGET,
        **changes,
        "seeds": SEEDS,
        "train_clips": len(study.examples.training),
        "validation_clips": len(study.examples.evaluation),
        "test_clips": len(study.test),
        "test_reference": digits(study.reference()),
        "test_speakers": " ".join(str(example.speaker) for example in study.test),
    }
    return study, shapes


def train_part(
    options: argparse.Namespace, part: str, study: Study, shapes: dict, rates: dict[str, list[float]]
) -> None:
    """Fills ``results/<part>.json`` with a row per entry of ``rates``: methods as compare's ``--methods`` has
    them, and the learning rates to choose from."""
    make_rows(options, part, shapes, rates, lambda entry: study.row(entry, rates[entry]))


def make_rows(
    options: argparse.Namespace,
    part: str,
    shapes: dict,
    entries: Iterable[str],
    make_row: Callable[[str], dict[str, Any]],
) -> None:
    """Fills ``results/<part>.json`` with the rows of those entries that it does not have yet."""
    path = options.results / f"{part}.json"
    rows: list[dict[str, Any]] = []
    if path.is_file():
        found = record.read(path)
        if found["shapes"] != json.loads(json.dumps(shapes)):
            raise UserError(f"{path} was made with other settings: move it away first")
        rows = [row for row in found["figures"] if row["status"] == "ok"]
    for entry in entries:
        if any(row["method"] == entry for row in rows):
            continue
        try:
            row = make_row(entry)
            told = (
                f"{row['accuracy']['mean']:.1%} of the test clips at learning rate {row['learning_rate']:g}"
            )
        except Exception as error:  # one method must not cost the others their rows
            told = f"failed: {one_line(error)}"
            row = {"method": entry, "status": told}
        rows.append(row)
        print(f"{part} {entry}: {told}", flush=True)
        save(options, part, rows, shapes, path)


def save(options: argparse.Namespace, part: str, rows: list[dict], shapes: dict, path: Path) -> None:
    command = f"python examples/study/study.py --work DIR --parts {part}"
    record.write(part, rows, command=command, shapes=shapes, device="cpu", path=path)


def search_rates() -> dict[str, list[float]]:
    return {m: [rate * RATE_FACTOR.get(m, 1) for rate in RATES] for m in METHODS}


def _searched(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The finished rows of the part that searches all rates."""
    path = options.results / f"{SEARCHED}.json"
    rows = record.read(path)["figures"] if path.is_file() else []
    return [row for row in rows if row["status"] == "ok"]


def nearby_rates(options: argparse.Namespace, entries: Iterable[str]) -> dict[str, list[float]]:
    """The rate that the search chose for the method of each entry, and the next lower one."""
    path = options.results / f"{SEARCHED}.json"
    found = {row["method"]: row["learning_rate"] for row in _searched(options)}
    missing = {entry.partition(":")[0] for entry in entries} - found.keys()
    if missing:
        raise UserError(
            f"{path} has no learning rate for {', '.join(sorted(missing))}: run --parts {SEARCHED} first"
        )
    rates = {}
    for entry in entries:
        method = entry.partition(":")[0]
        factor = RATE_FACTOR.get(method, 1)
        chosen = min(RATES, key=lambda rate: abs(rate * factor - found[method]))
        rates[entry] = [chosen * factor, LOWER[chosen] * factor]
    return rates


def level(options: argparse.Namespace, part: str) -> None:
    searched = part == SEARCHED
    rates = search_rates() if searched else nearby_rates(options, METHODS)
    _train(options, part, rates, ACCENTS, LEVELS[part], list(RATES) if searched else None)


def languages(options: argparse.Namespace, part: str) -> None:
    _train(options, part, nearby_rates(options, METHODS), LANGUAGES, LEVELS[SEARCHED])


def reduction(options: argparse.Namespace, part: str) -> None:
    entries = [f"{m}:reduction_factor={f}" for f in REDUCTION_FACTORS for m in SIDE_NETWORKS]
    _train(options, part, nearby_rates(options, entries), ACCENTS, LEVELS[VARIED])


def layers(options: argparse.Namespace, part: str) -> None:
    choices = [choice if isinstance(choice, str) else str(choice).replace(" ", "") for choice in LAYERS]
    entries = [f"lst:layers={choice}" for choice in choices]
    _train(options, part, nearby_rates(options, entries), ACCENTS, LEVELS[VARIED])


def longer(options: argparse.Namespace, part: str) -> None:
    _train(options, part, nearby_rates(options, LONGER_METHODS), ACCENTS, LEVELS[VARIED], **LONGER)


def _train(
    options: argparse.Namespace,
    part: str,
    rates: dict[str, list[float]],
    labels: Sequence[str],
    snr_db: float,
    searched: list[float] | None = None,
    **changes: float,
) -> None:
    study, shapes = open_study(options.work, labels, snr_db, **changes)
    shapes["learning_rates"] = searched or NEARBY
    train_part(options, part, study, shapes, rates)


def attention(options: argparse.Namespace, part: str) -> None:
    """UniPT by its attention: trained with each, and trained with the exact one and run with the others."""
    entries = ["unipt", *(f"unipt:attention={form}" for form in ATTENTIONS)]
    study, shapes = open_study(options.work, ACCENTS, ATTENTION_LEVELS[part])
    study.output, study.reads = study.output.with_name(part), ATTENTIONS
    shapes["learning_rates"] = NEARBY
    train_part(options, part, study, shapes, nearby_rates(options, entries))


def starts(options: argparse.Namespace, part: str) -> None:
    """SHERL at the highest rate, by its start, with more seeds."""
    study, shapes = open_study(options.work, ACCENTS, LEVELS[VARIED])
    shapes |= {"seeds": START_SEEDS, "learning_rates": "that of the entry"}
    study.output = study.output.with_name(part)  # whose runs are watched
    with mock.patch.object(Classification, "trainer_class", watching.Watched):
        make_rows(options, part, shapes, STARTS, lambda entry: study.row_at(entry, START_SEEDS))


def queries(options: argparse.Namespace, part: str) -> None:
    """MeZO by the number of its directions."""
    study, shapes = open_study(options.work, ACCENTS, LEVELS[SEARCHED])
    shapes |= {"seeds": QUERY_SEEDS, "learning_rates": "that of the entry"}
    make_rows(options, part, shapes, QUERIES, lambda entry: study.row_at(entry, QUERY_SEEDS))


def augmentation(options: argparse.Namespace, part: str) -> None:
    """What augmenting the training clips does to accuracy under noise, in training and out of it."""
    corpora = {level: options.work / f"accents-{level:g}db" for level in LEVELS_HEARD}
    for level, corpus in corpora.items():
        make_accent_corpus(corpus, accents=ACCENTS, snr_db=(level, level), **CORPUS)
    chosen = {row["method"]: row["learning_rate"] for row in _searched(options)}
    heard, *also = LEVELS_HEARD
    studies: dict[str, Study] = {}
    for name, (level, epochs, how, copies) in AUGMENTED.items():
        argv = {**BUDGET, "num_train_epochs": epochs, "use_cpu": True, "train_data": corpora[level]}
        argv |= {"test_data": corpora[heard], "output_dir": options.work / "runs" / part / name}
        given = [f"--{key}={value}" for key, value in argv.items()]
        for key, values in how.items():
            given += [f"--{key}", *map(str, values)]
        (arguments,) = make_parser().parse(given)
        studies[name] = Study(arguments)
        studies[name].copies = copies
        studies[name].also = {
            f"{other:g}db": data.load_examples(str(corpora[other]), split="test") for other in also
        }
    study = studies[next(iter(studies))]
    for each in studies.values():
        for examples in each.also.values():
            same = [(Path(e.audio).name, e.label) for e in examples]
            if same != [(Path(e.audio).name, e.label) for e in each.test]:
                raise UserError(f"the test clips of {examples.description} are others than at {heard:g} dB")
    shapes = {
        "classes": study.labels,
        "levels_heard": list(LEVELS_HEARD),
        **CORPUS,
        **BUDGET,
        "entries": {name: list(each) for name, each in AUGMENTED.items()},
        "seeds": AUGMENTED_SEEDS,
        "learning_rates": f"those chosen in {SEARCHED}",
        "train_clips": len(study.examples.training),
        "test_clips": len(study.test),
        "test_reference": digits(study.reference()),
        "test_speakers": " ".join(str(example.speaker) for example in study.test),
    }
    entries = [f"{method}, {name}" for method in AUGMENTED_METHODS for name in AUGMENTED]

    def make_row(entry: str) -> dict[str, Any]:
        method, _, name = entry.partition(", ")
        runs = [studies[name].run(method, chosen[method], seed) for seed in range(AUGMENTED_SEEDS)]
        return {**studies[name]._scored(method, runs), "method": entry}

    make_rows(options, part, shapes, entries, make_row)


# --- length of the clips ------------------------------------------------------------------------------------


def lengths(options: argparse.Namespace, part: str) -> None:
    """Memory counted for a GPU, and time and memory measured here, by encoder frames."""
    shapes = {"frames": list(FRAMES), "counted": COUNTED, "measured": MEASURED, "reduction_factor": 8}
    path = options.results / f"{part}.json"
    rows = record.read(path)["figures"] if path.is_file() else []
    for frames in FRAMES:
        for method in LENGTH_METHODS:
            if any((row["frames"], row["method"]) == (frames, method) for row in rows):
                continue
            rows.append({"frames": frames, "method": method, **_length_row(method, frames)})
            print(f"{part} {method} {frames}", flush=True)
            save(options, part, rows, shapes, path)


def _length_row(method: str, frames: int) -> dict[str, Any]:
    inside = not MeftConfig.methods()[method].frozen_encoder
    count = estimate(
        COUNTED["model"],
        method,
        COUNTED["batch"],
        dtype="bfloat16",
        autocast="bfloat16" if inside else None,  # where the encoder's weights train or carry gradients
        frames=frames,
        num_labels=steps.CLASSES,
    )
    setting = steps.Setting(model=MEASURED["model"], batch=MEASURED["batch"], frames=frames)
    measured = train_step.measure(method, setting, MEASURED["repeats"])
    return {
        "gpu_peak_gib": count.peak / 2**30,
        "gpu_reserved_gib": count.reserved / 2**30,
        "status": measured["status"],
        "cpu_peak_gib": measured["peak_bytes"] / 2**30,
        "cpu_counted_gib": measured["counted_bytes"] / 2**30,
        "step_ms": measured["step_ms"],
        "encoder_ms": measured["encoder_ms"],
        "ratio": measured["ratio"],
    }


# --- the command --------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace, str], None]] = {
    **dict.fromkeys((SEARCHED, VARIED, *LEVELS), level),
    "reduction": reduction,
    "layers": layers,
    "longer": longer,
    "lengths": lengths,
    "languages": languages,
    "starts": starts,
    "queries": queries,
    **dict.fromkeys(ATTENTION_LEVELS, attention),
    "augmentation": augmentation,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="folder for corpora and models; needed for all but --report"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--report", action="store_true", help="write README.md's tables and the figures")
    options = parser.parse_args(argv)
    try:
        if options.report:
            import study_report

            for path in study_report.write(options.results, HERE):
                print(f"wrote {path.name}")
            return 0
        if options.work is None:
            raise UserError("--work is needed: a folder for corpora and trained models")
        names = [name for name in options.parts.split(",") if name]
        for name in names:
            if name not in PARTS:
                raise UserError(f"--parts must be some of {','.join(PARTS)}, got {name!r}")
        for name in names:
            PARTS[name](options, name)
    except UserError as error:
        print(f"study.py: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("study.py: interrupted; run again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    sys.exit(main())
