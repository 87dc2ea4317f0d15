"""What the study of transcription runs, in which order: rows (a method with its options on a language), and
of each row a run for every rate and seed.

A row's rate is searched on the language's validation clips with seed 0; the other seeds take the rate that
was found there, and test clips are heard by models with that rate alone. The order puts first what the page
needs most, so that a study that is stopped early has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from whisper_meft import MeftConfig
from whisper_meft.comparison.arguments import parse_method

BATCH = 16
WARMUP = 0.05
WEIGHT_DECAY = 0.01
WINDOW = 400  # encoder frames: 8 s
# What a model may say of a clip: about twice what the longest clip of 8 s holds.
MOST_TOKENS = 60
BACKBONE = "bfloat16"  # the frozen weights' format; what trains is float32

LANGUAGES = {"nl": "dutch", "de": "german"}
FOLDER = "asr_de_nl"
# What is heard after training on a language: its own test clips first.
TESTED = {"nl": ("nl_test", "nl_test_other", "de_test"), "de": ("de_test", "nl_test", "nl_test_other")}

ZERO_SHOT = "zero_shot"
PADDED = "max_frames=fidelity"

# Rates that are tried, the likeliest first.
SIDE_RATES = (3e-3, 1e-2)
OWN_RATES = (3e-5, 1e-4)  # the backbone's own weights train
INSIDE_RATES = (1e-3, 3e-4)
SEEDS = 3


@dataclass(frozen=True)
class Row:
    """A method on a language.

    Attributes:
        language: of ``LANGUAGES``.
        entry: the method and its options as `whisper-meft compare --methods` takes them, ``epochs`` and
            ``weight_decay`` among them; or ``zero_shot``.
        rates: to choose from. seeds: how many.
    """

    language: str
    entry: str
    rates: tuple[float, ...] = ()
    seeds: int = SEEDS

    @property
    def method(self) -> str:
        return parse_method(self.entry)[0]

    @property
    def options(self) -> dict[str, Any]:
        """Of the method's config."""
        found = {**_shared(self.method), **parse_method(self.entry)[1]}
        return {name: value for name, value in found.items() if name not in TRAINING}

    @property
    def training(self) -> dict[str, Any]:
        """Of the training loop."""
        given = parse_method(self.entry)[1]
        return {name: given.get(name, value) for name, value in TRAINING.items()}

    @property
    def zero_shot(self) -> bool:
        return self.method == ZERO_SHOT

    @property
    def config(self) -> MeftConfig:
        """The method's; of zero-shot that of a side network, which adds nothing before it is trained."""
        method = "lst" if self.zero_shot else self.method
        return MeftConfig.from_dict({"method": method, **self.options})

    @property
    def autocast(self) -> bool:
        """Whether the method trains inside the backbone: then under autocast to bfloat16."""
        return not hasattr(self.config, "placement")

    @property
    def name(self) -> str:
        """What the row is called in files."""
        return self.entry.replace(":", "-").replace("+", "-").replace("/", "")


# Options of training that an entry may name, with what they are otherwise.
TRAINING = {"epochs": 3, "weight_decay": WEIGHT_DECAY, "warmup": WARMUP, "leading_space": True}


def _shared(method: str) -> dict[str, Any]:
    given: dict[str, Any] = {"max_frames": WINDOW}
    if method == ZERO_SHOT or not MeftConfig.methods()[method].trains_backbone:
        given["backbone_dtype"] = BACKBONE
    return given


@dataclass(frozen=True)
class Cell:
    """One run of a row: ``rate`` None is the one that the search chose, whose test clips are heard too."""

    row: Row
    rate: float | None
    seed: int


def row(entry: str, language: str = "nl", **changes: Any) -> Row:
    """A row with the rates of its kind of method."""
    method = parse_method(entry)[0]
    if method == ZERO_SHOT:
        return Row(language, entry, (), 1)
    config = MeftConfig.methods()[method]
    rates = SIDE_RATES if config.frozen_encoder else OWN_RATES if config.trains_backbone else INSIDE_RATES
    return Row(language, entry, **{"rates": rates, **changes})


def first(*rows: Row) -> Iterator[Cell]:
    """A first look, at the likeliest rate."""
    return (Cell(one, one.rates[0], 0) for one in rows)


def searched(*rows: Row) -> Iterator[Cell]:
    """The search for a rate."""
    return (Cell(one, rate, 0) for one in rows for rate in one.rates)


def tested(*rows: Row) -> Iterator[Cell]:
    """The first seed's model with the rate that was found, on test clips."""
    return (Cell(one, None, 0) for one in rows)


def seeded(*rows: Row) -> Iterator[Cell]:
    """The other seeds."""
    return (Cell(one, None, seed) for one in rows for seed in range(1, one.seeds))


LST = {place: f"lst:placement={place}+reduction_factor=4" for place in ("encoder", "decoder", "both")}
UNIPT, SHERL = "unipt:placement=encoder+reduction_factor=4", "sherl:placement=encoder+reduction_factor=4"
FULL, LORA = "full:target=decoder", "lora:target=decoder"
LONGER_LST, LONGER_FULL = f"{LST['encoder']}+epochs=6", f"{FULL}+epochs=6"


def plan() -> Iterator[Cell]:
    """Every run of the study, the most telling first. A cell may come twice; it is run once."""
    encoder, longer = (row(entry, rates=(1e-2, 3e-3)) for entry in (LST["encoder"], LONGER_LST))
    decoder, both = (row(LST[place], rates=(1e-3, 3e-3)) for place in ("decoder", "both"))
    others = map(row, (UNIPT, SHERL, FULL, LORA))
    dutch = [encoder, *others, both, decoder]
    german = [replace(each, language="de") for each in dutch]
    yield from tested(row(ZERO_SHOT))
    for one in dutch:
        yield from first(one)
    for rows in (dutch, german):
        for one in rows:
            yield from searched(one)
            yield from tested(one)
        yield from seeded(*rows)
    yield from tested(row(f"{ZERO_SHOT}:{PADDED}"))
    for one in (longer, row(LONGER_FULL, rates=OWN_RATES[:1])):
        yield from searched(one)
        yield from tested(one)
        yield from seeded(one)
