"""``python -m benchmarks.saved_activations``: does training on 8-bit copies of hidden states learn the same?

The demo's task (synthetic accents, the shipped backbone): every method is trained with
``saved_activations="exact"``, ``"int8"`` and ``"fp8"`` from the same start on the same batches, for several
seeds. What is compared is the loss along the way and the accuracy on the test set at the end, with the spread
over seeds as the yardstick, and the cosine of exact with rounded gradients at the start and at the end.
"""

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperForAudioClassification
from whisper_meft import LSTConfig, SHERLConfig, UniPTConfig, get_meft_model
from whisper_meft.data import SpeechDataset, load_examples
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable
from whisper_meft.synthetic.shipped import shipped_backbone
from whisper_meft.synthetic.speech import make_accent_corpus

from meft_kernels.reference.eight_bit import CODE_DTYPES as ROUNDED

from . import record

CONFIGS = {"lst": LSTConfig, "unipt": UniPTConfig, "sherl": SHERLConfig}
COUNTS = {"seeds": 3, "steps": 200, "batch": 32, "reduction_factor": 4, "clips": 300, "test_clips": 100}


def features_and_labels(corpus: Path, split: str) -> tuple[Tensor, Tensor, int]:
    """Log-mel (N, mel bins, frames), class numbers (N,) and the number of classes of a split."""
    examples = load_examples(str(corpus), split=split)
    names = sorted({example.label for example in examples})
    label2id = {name: index for index, name in enumerate(names)}
    extractor = WhisperFeatureExtractor.from_pretrained(shipped_backbone())
    items = list(SpeechDataset(examples, extractor, label2id, "fidelity"))
    features = torch.stack([item["input_features"] for item in items])
    return features, torch.tensor([item["labels"] for item in items]), len(names)


def build(method: str, kind: str, classes: int, factor: int, seed: int) -> torch.nn.Module:
    base = WhisperForAudioClassification.from_pretrained(
        shipped_backbone(), num_labels=classes, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    torch.manual_seed(seed)  # after loading, which draws numbers for the head that it replaces
    for linear in (base.projector, base.classifier):
        torch.nn.init.normal_(linear.weight, std=0.02)
        torch.nn.init.zeros_(linear.bias)
    return get_meft_model(base, CONFIGS[method](reduction_factor=factor, saved_activations=kind))


def gradients(model: torch.nn.Module, kind: str, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the side network, by name; a scalar gate joins one vector with the others."""
    side = model.side_network
    kept, side.saved_activations = side.saved_activations, kind
    model.zero_grad()
    model(features, labels=labels).loss.backward()
    side.saved_activations = kept
    grads = {name: p.grad.clone() for name, p in side.named_parameters() if p.grad.any()}
    gates = [grads.pop(name).flatten() for name in list(grads) if grads[name].numel() == 1]
    return grads | ({"gates": torch.cat(gates)} if len(gates) > 1 else {})


def least_cosines(
    model: torch.nn.Module, kinds: list[str], features: Tensor, labels: Tensor
) -> dict[str, tuple[float, str]]:
    """For each kind of codes the smallest cosine between exact and 8-bit gradients over the side network's
    tensors, and whose."""
    exact, found = gradients(model, "exact", features, labels), {}
    for kind in kinds:
        rounded = gradients(model, kind, features, labels)
        flat = {name: (grad.flatten(), rounded[name].flatten()) for name, grad in exact.items()}
        found[kind] = min((F.cosine_similarity(*pair, dim=0).item(), name) for name, pair in flat.items())
    return found


def accuracy(model: torch.nn.Module, features: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(part).logits for part in features.split(64)])
    model.train()
    return (scores.argmax(-1) == labels).float().mean().item()


def train(method: str, kind: str, seed: int, data: dict, options: argparse.Namespace) -> dict:
    """One run; its losses, accuracy on the test set, and gradient cosines before and after."""
    features, labels, classes = data["train"]
    model = build(method, kind, classes, options.reduction_factor, seed)
    probed = partial(least_cosines, kinds=options.kinds, features=features[:64], labels=labels[:64])
    row = {"method": method, "saved": kind, "seed": seed, "least_cosine_before": probed(model)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(options.steps):
        batch = torch.randint(len(features), (options.batch,), generator=generator)
        optimizer.zero_grad()
        loss = model(features[batch], labels=labels[batch]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    row |= {"losses": losses, "accuracy": accuracy(model, *data["test"][:2])}
    return row | {"least_cosine_after": probed(model)}


def summary(rows: list[dict], rounded: list[str]) -> list[dict]:
    """Per method: mean and spread of the final loss (last tenth) and accuracy, exact against 8 bits."""
    kinds = ["exact", *rounded]
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        entry = {"method": method}
        by_kind = {kind: [r for r in rows if r["method"] == method and r["saved"] == kind] for kind in kinds}
        for kind, runs in by_kind.items():
            last = [statistics.mean(run["losses"][-max(1, len(run["losses"]) // 10) :]) for run in runs]
            scores = [run["accuracy"] for run in runs]
            for name, values in (("loss", last), ("accuracy", scores)):
                entry[f"{kind}_{name}"] = statistics.mean(values)
                entry[f"{kind}_{name}_spread"] = max(values) - min(values)
        for kind in rounded:
            pairs = list(zip(by_kind["exact"], by_kind[kind], strict=True))
            entry[f"{kind}_largest_accuracy_difference"] = max(
                abs(a["accuracy"] - b["accuracy"]) for a, b in pairs
            )
            entry[f"{kind}_mean_loss_difference"] = statistics.mean(
                abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"])
            )
            entry[f"{kind}_least_cosine"], entry[f"{kind}_least_cosine_of"] = min(
                run[key][kind]
                for run in by_kind["exact"]
                for key in ("least_cosine_before", "least_cosine_after")
            )
        found.append(entry)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saved_activations", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--methods", default="lst,unipt,sherl", help="comma-separated")
    parser.add_argument("--kinds", default=",".join(ROUNDED), help="of 8-bit copies, comma-separated")
    for name, value in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--corpus", help="folder to keep the corpus in (default: a temporary one)")
    parser.add_argument("--output", help="folder of the record (default: benchmarks/results)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    try:
        path = compared(options, " ".join(["python -m benchmarks.saved_activations", *argv]))
    except UserError as error:
        print(f"benchmarks.saved_activations: error: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"\n{path}")
    return 0


def compared(options: argparse.Namespace, command: str) -> Path:
    """Trains all that the options ask for, prints the table and writes the record; returns its path.

    Raises:
        UserError: an option that makes no sense, or a record that cannot be written, before any work.
    """
    methods = options.methods.split(",")
    if unknown := [method for method in methods if method not in CONFIGS]:
        raise UserError(f"--methods must be out of {', '.join(CONFIGS)}, got {unknown[0]!r}")
    options.kinds = options.kinds.split(",")
    if unknown := [kind for kind in options.kinds if kind not in ROUNDED]:
        raise UserError(f"--kinds must be out of {', '.join(ROUNDED)}, got {unknown[0]!r}")
    for name in COUNTS:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be a positive integer, got {getattr(options, name)}")
    check_writable(Path(options.output or record.RESULTS) / "saved_activations.json")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_accent_corpus(
            Path(options.corpus or folder) / "corpus",
            train_clips_per_class=options.clips,
            test_clips_per_class=options.test_clips,
            seed=0,
        )
        data = {split: features_and_labels(corpus, split) for split in ("train", "test")}
    rows = []
    for method in methods:
        for seed in range(options.seeds):
            for kind in ("exact", *options.kinds):
                rows.append(train(method, kind, seed, data, options))
                print(f"{method} {kind} seed {seed}: accuracy {rows[-1]['accuracy']:.1%}", flush=True)
    entries = summary(rows, options.kinds)
    print(f"\n{'':<8}{'':<8}{'loss':>8}{'accuracy':>16}  least cosine of a gradient")
    for e in entries:
        for kind in ("exact", *options.kinds):
            cosine = e.get(f"{kind}_least_cosine")
            of = "" if cosine is None else f"  {cosine:.5f} {e[f'{kind}_least_cosine_of']}"
            print(
                f"{e['method']:<8}{kind:<8}{e[f'{kind}_loss']:>8.4f}{e[f'{kind}_accuracy']:>8.1%} ± "
                f"{e[f'{kind}_accuracy_spread'] / 2:>5.1%}{of}"
            )
    shapes = {k: v for k, v in vars(options).items() if k not in ("corpus", "output")}
    return record.write(
        "saved_activations",
        {"summary": entries, "rows": rows},
        command=command,
        shapes=shapes,
        device="cpu",
        directory=options.output,
    )


if __name__ == "__main__":
    raise SystemExit(main())
