"""What the study runs, in which order: rows (a method with its options), and of each row a run on every fold.

A row's learning rate is searched on the validation clips of fold 0 with seed 0; other folds and seeds take
the rate that was found there. The order puts first what the page needs most, so that a study that is stopped
early has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from whisper_meft import MeftConfig
from whisper_meft.comparison.arguments import RATE_FACTOR, parse_method

from .folds import FOLDS, TASKS

BATCH = 16
# Epochs, and the rates that are tried, the likeliest first.
FROZEN = {"epochs": 15, "rates": (1e-3, 3e-3, 1e-2, 3e-4)}
INSIDE = {"epochs": 6, "rates": (1e-3, 3e-4, 1e-4)}
WHOLE = {"epochs": 6, "rates": (1e-4, 3e-5, 3e-4)}  # all of the encoder trains
SEEDS = 3  # of methods beside a frozen encoder; one of the others

TRIMMED, PADDED = "longest", "fidelity"


def run_name(entry: str) -> str:
    """What `whisper-meft compare` calls the folder of an entry's runs."""
    return entry.replace(":", "-").replace("+", "-")


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        task: of ``folds.TASKS``.
        entry: the method and its options as in `whisper-meft compare --methods`, and those of ``training``.
        epochs: of training. rates: to choose from. seeds: how many.
        bf16: train under autocast to bfloat16.
        training: further options of `whisper-meft train`.
    """

    task: str
    entry: str
    epochs: int
    rates: tuple[float, ...]
    seeds: int
    bf16: bool = False
    training: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def method(self) -> str:
        return parse_method(self.entry)[0]

    @property
    def compared(self) -> str:
        """The entry as `whisper-meft compare` takes it, without what is an option of training."""
        method, _, rest = self.entry.partition(":")
        kept = [each for each in rest.split("+") if each.partition("=")[0] not in self.training]
        return f"{method}:{'+'.join(kept)}"

    @property
    def name(self) -> str:
        """What the row is called in files."""
        return run_name(self.entry)

    @property
    def budget(self) -> str:
        """What rows whose runs may lie in one folder have in common."""
        return "-".join(
            [f"epochs{self.epochs}", *(f"{name}{value:g}" for name, value in self.training.items())]
        )

    @property
    def frozen(self) -> bool:
        return MeftConfig.methods()[self.method].frozen_encoder


@dataclass(frozen=True)
class Cell:
    """One training run of a row. ``rate`` None: the one that the search chose."""

    row: Row
    fold: int
    rate: float | None
    seed: int


def row(entry: str, task: str = "accents", training: dict[str, Any] | None = None, **changes: Any) -> Row:
    """A row with the budget of its kind of method, trimmed unless ``entry`` says otherwise."""
    method = parse_method(entry)[0]
    config = MeftConfig.methods()[method]
    budget = FROZEN if config.frozen_encoder else WHOLE if method == "full" else INSIDE
    rates = FROZEN["rates"] if method in RATE_FACTOR else budget["rates"]  # MeZO's are a hundredth of these
    rates = tuple(rate * RATE_FACTOR.get(method, 1) for rate in rates)
    more = [f"{name}={value:g}" for name, value in (training or {}).items()]
    if "max_frames" not in entry:
        more.append(f"max_frames={TRIMMED}")
    entry = "+".join([entry if ":" in entry else f"{entry}:{more.pop(0)}", *more])
    values = {
        "training": training or {},
        "epochs": budget["epochs"],
        "rates": rates,
        "seeds": SEEDS if config.frozen_encoder else 1,
    }
    return Row(task, entry, **{**values, "bf16": not config.frozen_encoder, **changes})


SIDE_NETWORKS = ("lst", "unipt", "sherl")
REFERENCES = ("full", "lora")
OTHERS = ("bitfit", "adapter", "adalora", "lora_plus", "s2_lora", "mezo")
RECIPE = "pooling=statistics"
ATTENTIONS = ("pooled:4", "pooled:8", "linear", "summary")
QUANTIZATIONS = tuple(f"backbone_quantization={kind}" for kind in ("int8", "fp8", "nf4"))
BACKBONES = ("backbone_dtype=bfloat16", *QUANTIZATIONS)
# One option changed; at two rates, but for the head, which costs seconds.
VARIED = (
    *(f"{m}:reduction_factor={factor}" for m in ("lst", "unipt") for factor in (2, 4, 16)),
    *(f"head:{RECIPE}+{options}" for options in BACKBONES),
    *(f"lst:layers={layers}" for layers in ("last:2", "last:3", "[4]", "[3,4]")),
    *(f"{entry}max_frames={PADDED}" for entry in ("head:", f"head:{RECIPE}+", "lst:", f"lst:{RECIPE}+")),
    *(f"lst:{RECIPE}+saved_activations={kind}" for kind in ("int8", "fp8")),
    *(f"lst:{RECIPE}+{options}" for options in QUANTIZATIONS),
)


def folds_of(task: str) -> range:
    return range(1 if TASKS[task].own_split else FOLDS)


def searched(*rows: Row) -> Iterator[Cell]:
    """The search for a rate: every rate on fold 0."""
    return (Cell(one, 0, rate, 0) for one in rows for rate in one.rates)


def tested(*rows: Row) -> Iterator[Cell]:
    """The other folds."""
    return (Cell(one, fold, None, 0) for one in rows for fold in folds_of(one.task)[1:])


def seeded(*rows: Row) -> Iterator[Cell]:
    """The other seeds."""
    return (
        Cell(one, f, None, seed) for one in rows for seed in range(1, one.seeds) for f in folds_of(one.task)
    )


def whole(*rows: Row) -> Iterator[Cell]:
    """Everything about some rows, a row after the other."""
    for one in rows:
        yield from searched(one)
        yield from tested(one)
        yield from seeded(one)


def plan() -> Iterator[Cell]:
    """Every run of the study, the most telling first. A cell may come twice; it is run once."""
    head, weighted_sum, lst, unipt = (row(m) for m in ("head", "weighted_sum", "lst", "unipt"))
    head_recipe, lst_recipe, unipt_recipe = (row(f"{m}:{RECIPE}") for m in ("head", "lst", "unipt"))
    # SHERL's last layer trains with it, six times the cost of LST: one seed.
    sherl, sherl_recipe = (row(entry, seeds=1) for entry in ("sherl", f"sherl:{RECIPE}"))
    full, lora = references = [row(method) for method in REFERENCES]
    for one in (head, head_recipe):
        yield from searched(one)
        yield from tested(one)
    for one in (lst, lora, lst_recipe, full, unipt):  # a first look, before any other rate is tried
        yield Cell(one, 0, one.rates[0], 0)
    yield from seeded(head_recipe, head)
    for one in (lst, lst_recipe, weighted_sum, unipt, unipt_recipe):
        yield from searched(one)
        yield from tested(one)
    yield from searched(*references, sherl_recipe)
    for fold in folds_of("accents")[1:]:
        yield from (Cell(one, fold, None, 0) for one in (*references, sherl_recipe))
    attentions = [row(f"unipt:{RECIPE}+attention={each}", rates=FROZEN["rates"][:2]) for each in ATTENTIONS]
    for one in attentions:
        yield from searched(one)
        yield from tested(one)
    yield from seeded(unipt_recipe, *attentions)
    yield from seeded(lst_recipe, lst, unipt, weighted_sum)
    # What the recipe and a rate of its own for the head do for the others.
    for method in REFERENCES:
        one = row(f"{method}:{RECIPE}", training={"head_learning_rate": 3e-3})
        yield from searched(one)
        yield from tested(one)
    others = [row(method) for method in OTHERS]
    for one in (sherl, others[0]):
        yield from searched(one)
        yield from tested(one)
    yield from searched(*others[1:])
    for entry in VARIED:
        count = 4 if entry.startswith("head") else 2
        one = row(entry, rates=FROZEN["rates"][:count], seeds=1)
        yield from searched(one)
        yield from tested(one)
    for task in ("languages", "countries"):
        for entry in ("head", f"head:{RECIPE}", "lst", f"lst:{RECIPE}", "unipt", "weighted_sum"):
            yield from whole(row(entry, task, seeds=1))
    for method in REFERENCES:
        yield from whole(row(method, "languages"))
    # Last, for three hours more of a thread: what is 20 points behind the recipe, as LoRA is, one fold tells.
    yield from tested(*others[1:])
