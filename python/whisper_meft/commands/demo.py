"""`whisper-meft demo`: the whole job on a small synthetic task, on the code paths that real data takes.

Synthesises an accent corpus, trains LST on the shipped backbone, scores it on speakers and sentences that
were never heard next to chance and to logistic regression, and classifies one file.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .. import data
from ..data.examples import split_by_speaker
from ..errors import UserError
from ..evaluation.classifier import Classifier, predict
from ..evaluation.logistic import fit_best, mel_statistics
from ..evaluation.metrics import Scores, score
from ..evaluation.scoring import evaluate, write_scores
from ..files import write_json
from ..model.pretrained import load_feature_extractor
from ..options.parser import Parser
from ..options.training import parsed_options
from ..synthetic.shipped import shipped_backbone
from ..synthetic.speech import ACCENTS, make_accent_corpus
from ..training.output_folder import check_output_dir
from ..training.run import train
from .predict import as_table

# Settings of the training run, as `whisper-meft train` takes them; the rest, the paper's learning rate and
# reduction factor included, are that command's defaults.
TRAINING = {
    "method": "lst",
    "num_train_epochs": 8,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
}


@dataclass
class DemoArguments:
    """The demo's few options."""

    _argument_group_name = "demo"

    output_dir: str = field(
        default="demo_output", metadata={"help": "folder for corpus, trained model and results"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the corpus and of the training run"})
    train_clips_per_class: int = field(default=500, metadata={"help": "training clips of each accent"})
    test_clips_per_class: int = field(default=100, metadata={"help": "test clips of each accent"})
    num_train_epochs: float = field(default=TRAINING["num_train_epochs"], metadata={"help": "epochs"})


def baseline(corpus: Path, validation_fraction: float, seed: int, labels: Sequence[str]) -> Scores:
    """Logistic regression on log-mel statistics, its regularisation chosen on the validation speakers that
    the training run uses too; scored on the test set."""
    extractor = load_feature_extractor(str(shipped_backbone()))
    label2id = {label: index for index, label in enumerate(labels)}
    examples = data.load_examples(str(corpus), split="train")
    training, validation = split_by_speaker(examples, validation_fraction, seed)
    test = data.load_examples(str(corpus), split="test")
    statistics = [
        mel_statistics(data.SpeechDataset(part, extractor, label2id, "longest"))
        for part in (training, validation, test)
    ]
    model, _ = fit_best(statistics[0], statistics[1], len(labels))
    return score(statistics[2][1].numpy(), model.predict(statistics[2][0]).numpy(), labels)


def comparison(rows: dict[str, tuple[float, float, float]]) -> str:
    """A table of (accuracy, mean class accuracy, macro-F1) per system."""
    width = max(map(len, rows))
    lines = [f"{'':<{width}}  accuracy  mean class accuracy  macro-F1"]
    for name, (accuracy, mean, f1) in rows.items():
        lines.append(f"{name:<{width}}  {accuracy:>8.1%}  {mean:>19.1%}  {f1:>8.3f}")
    return "\n".join(lines)


def chance(reference: np.ndarray, labels: Sequence[str]) -> tuple[float, float, float]:
    """Expected scores of guessing each class with the same probability."""
    generator = np.random.default_rng(0)
    guesses = [
        score(reference, generator.integers(len(labels), size=len(reference)), labels) for _ in range(200)
    ]
    return tuple(
        float(np.mean([getattr(each, name) for each in guesses]))
        for name in ("accuracy", "mean_class_accuracy", "macro_f1")
    )


def run(argv: Sequence[str]) -> int:
    """`whisper-meft demo`; returns the exit status: 1 if LST does not beat both chance and the baseline."""
    (arguments,) = make_parser().parse(argv)
    threads = torch.get_num_threads()
    # A model this small gains little from a second thread, and loses much where the cores are busy.
    torch.set_num_threads(1)
    try:
        return _demo(arguments)
    finally:
        torch.set_num_threads(threads)


def _demo(arguments: DemoArguments) -> int:
    started = time.perf_counter()
    output = Path(arguments.output_dir)
    options = _training_options(arguments, output / f"corpus_seed{arguments.seed}")
    parsed = parsed_options(options)
    _check_ours(output)
    check_output_dir(options["output_dir"], {})
    print(
        "This is a small synthetic task: formant-synthesised English in a few accents, 2-second clips and\n"
        "a tiny backbone. It shows that the pipeline works and learns; it says nothing about how well the\n"
        "methods do on human speech.\n"
    )
    corpus = make_accent_corpus(
        options["train_data"],
        train_clips_per_class=arguments.train_clips_per_class,
        test_clips_per_class=arguments.test_clips_per_class,
        seed=arguments.seed,
        progress=True,
    )
    print("\nwhisper-meft train " + " ".join(f"--{name} {value}" for name, value in options.items()) + "\n")
    result = train(*parsed)

    print("\nscoring on the test set: speakers and sentences that training never heard")
    test = data.load_examples(str(corpus), split="test")
    classifier = Classifier(
        result.model, result.feature_extractor, batch_size=32, progress=sys.stderr.isatty()
    )
    scores, _ = evaluate(classifier, test)
    write_scores(scores, output / "evaluation", test.description)
    print(scores.as_text())
    simple = baseline(
        corpus, parsed[2].validation_fraction, arguments.seed, list(result.model.config.label2id)
    )
    rows = _systems(scores, simple)
    print(f"\n{comparison(rows)}\n")

    example = random.Random(arguments.seed).choice(list(test))
    answers, _ = predict(classifier, [str(example.audio)])
    print(f"whisper-meft predict {output / 'model'} {example.audio}")
    print(f"{as_table(answers)}\ntrue label: {example.label}")

    seconds = time.perf_counter() - started
    _write_results(output, rows, scores.count, seconds)
    *others, lst = (accuracy for accuracy, _, _ in rows.values())
    if lst <= max(others):
        print("whisper-meft: error: LST did not beat both chance and logistic regression", file=sys.stderr)
        return 1
    return 0


def _check_ours(output: Path) -> None:
    """Raises UserError where the folder holds a model, or scores, that no demo left there."""
    configs = [*output.glob("model/config.json"), *output.glob("model/checkpoint-*/config.json")]
    strange = [path for path in configs if not _is_of_a_demo(path)]
    if not any(output.glob("corpus_seed*/corpus.json")) and not (output / "demo_results.json").is_file():
        strange += output.glob("evaluation/eval_results.json")
    if strange:
        raise UserError(
            f"output_dir: {output} holds {strange[0].relative_to(output)}, which no demo made and which "
            "would be lost; name another folder"
        )


def _is_of_a_demo(path: Path) -> bool:
    try:
        config = json.loads(path.read_bytes())
        method, backbone = config["meft"]["method"], config["base_model_name_or_path"]
        labels = set(config["id2label"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return (method, backbone, labels) == (TRAINING["method"], shipped_backbone().name, set(ACCENTS))


def _training_options(arguments: DemoArguments, corpus: Path) -> dict[str, object]:
    return {
        **TRAINING,
        "num_train_epochs": arguments.num_train_epochs,
        "model_name_or_path": shipped_backbone(),
        "train_data": corpus,
        "output_dir": Path(arguments.output_dir) / "model",
        "overwrite_output_dir": True,
        "seed": arguments.seed,
    }


def _systems(lst: Scores, simple: Scores) -> dict[str, tuple[float, float, float]]:
    """(accuracy, mean class accuracy, macro-F1) of chance, the baseline and LST, in this order."""
    labels = lst.labels
    reference = np.repeat(np.arange(len(labels)), lst.confusion.sum(axis=1))
    return {
        "chance": chance(reference, labels),
        "logistic regression on log-mel statistics": (
            simple.accuracy,
            simple.mean_class_accuracy,
            simple.macro_f1,
        ),
        "LST on the frozen encoder": (lst.accuracy, lst.mean_class_accuracy, lst.macro_f1),
    }


def _write_results(
    output: Path, rows: dict[str, tuple[float, float, float]], test_clips: int, seconds: float
) -> None:
    """Writes ``demo_results.json`` and says where everything is."""
    write_json(
        output / "demo_results.json",
        {
            "note": "a small synthetic task; says nothing about human speech",
            "systems": {
                name: dict(zip(("accuracy", "mean_class_accuracy", "macro_f1"), row))
                for name, row in rows.items()
            },
            "test_clips": test_clips,
            "seconds": round(seconds, 1),
        },
    )
    print(
        f"\nadapter            {output / 'model'}\n"
        f"learning curve     {output / 'model' / 'learning_curve.png'}\n"
        f"confusion matrix   {output / 'evaluation' / 'confusion_matrix.png'}\n"
        f"done in {seconds:.0f} seconds"
    )


def make_parser() -> Parser:
    """The parser of `whisper-meft demo`."""
    return Parser(
        "demo",
        (DemoArguments,),
        usage="[--output_dir demo_output] [--seed 0]",
        description="Synthesises a small accent corpus, trains LST on the shipped backbone, shows its scores "
        "next to chance and logistic regression, and classifies one file. Takes a few minutes on two cores.",
    )
