"""Sentences for the synthetic speech corpora: templates filled from word lists, written for this project.

Three sets never share a sentence: ``train`` and ``test`` of the accent corpus, and ``pretrain`` of the
shipped backbone. They are apart by construction: no sentence of one set can begin with a word that begins a
sentence of another. The other words are shared; many were picked because accents of English differ in them
(car, bath, thought, boat, near, house, water, think, hurry).
"""

from collections.abc import Iterator

import numpy as np

from ..errors import UserError

_WORDS = {
    "person": (
        "farmer teacher lawyer barber waiter carpenter daughter brother mother father neighbour stranger "
        "soldier painter driver fisherman gardener doctor sister cousin girl boy nurse actor author clerk "
        "miller singer baker"
    ),
    "thing": (
        "car boat house garden basket window ladder bottle letter hammer mirror carpet jar door chair "
        "table drawer bird horse lamb cow goat bear path bath glass grass corn flower cloud tower road "
        "stone coat rope bucket button paper parcel purse shirt thorn wheel apple orange tomato potato "
        "pie plate kettle spoon cup clock saw board feather cloth bell book hood boot towel moon nose "
        "rose fairground lighthouse cart barn"
    ),
    "quality": (
        "dark large small old young cold hot dirty pretty yellow purple brown sour burnt hard soft sharp "
        "thin thick third fourth other poor pure quiet noisy hollow narrow heavy bitter blunt tired curly "
        "early round broad calm rare fair clear weird loud short long wooden golden northern southern"
    ),
    "place": (
        "harbour market park farm church school hospital river forest border castle bridge station "
        "theatre office corner cellar orchard quarry valley village mountain island shore airport library "
        "kitchen bathroom hallway garage"
    ),
    "did": (
        "carried, found, bought, caught, saw, heard, stirred, turned, burned, measured, gathered, "
        "followed, borrowed, hurried past, walked around, looked for, asked about, thought of, laughed "
        "at, talked about, worked on, painted, washed, parked, started, finished, covered, wore, tore, "
        "threw, drew, cut, pushed"
    ),
    "how": (
        "quietly, slowly, hardly, rarely, barely, loudly, calmly, carefully, sharply, softly, proudly, "
        "poorly, clearly, thoroughly, hurriedly, bitterly, warmly, awkwardly, after all, once more, for "
        "hours, for sure"
    ),
    "time": (
        "on Thursday, on Saturday, on the third of March, this morning, last August, at four o'clock, at "
        "half past ten, after dark, before dawn, during the storm, in the summer, every winter, later on, "
        "all afternoon, since October"
    ),
}

# Each entry is one template; {x} takes a word of that list.
_TEMPLATES = {
    "train": (
        "The {quality} {person} {did} the {quality} {thing} near the {place}.",
        "{time} our {person} {did} a {thing} and a {quality} {thing}.",
        "Nobody thought the {person} from the {place} ever {did} that {thing}.",
        "They {did} their {quality} {thing} {how}, just outside the {place}.",
        "If you ask the {person}, the {thing} is far too {quality} for a {place}.",
        "There were thirty {quality} {person}s waiting at the {place} {time}.",
        "I heard the {person} talking {how} about north {place} water.",
        "Put your {quality} {thing} over there, by the {thing} in the {place}.",
    ),
    "test": (
        "My {person} always {did} another {quality} {thing} behind the {place}.",
        "What a {quality} {thing} you are carrying, said the {person} {how}.",
        "We drove four hours to the {place} and {did} one {thing} {time}.",
        "Her father's {thing} was worth more than the {quality} {place}.",
        "Both of us saw how the {person} {did} his {thing} {time}.",
        "Without the {thing}, the {quality} {place} would look rather {quality}.",
    ),
    "pretrain": (
        "Some {person}s never {did} any {quality} {thing} at this {place}.",
        "Under the {thing} lay a {quality} {thing} that no {person} owned.",
        "Please bring me forty {thing}s and the {quality} {thing} {time}.",
        "Is it true that a {person} {did} every {thing} {how}?",
        "She would rather own a {quality} {place} than two {thing}s.",
        "Its {quality} {place} turned {quality} {time}, and so did the {thing}.",
        "Go past the {place}, turn right, then look for a {quality} {thing}.",
        "How {quality} the {thing} of the {person} must have been {time}!",
    ),
}

SETS = tuple(_TEMPLATES)

_LISTS = {
    name: tuple(words.split(", ") if ", " in words else words.split()) for name, words in _WORDS.items()
}


def sentences(which: str, rng: np.random.Generator) -> Iterator[str]:
    """Yields sentences of one set without end and, until they run out, without repeats.

    Args:
        which: "train", "test" or "pretrain"; sets never share a sentence.
        rng: the source of every choice.

    Raises:
        UserError: ``which`` is none of these.
    """
    if which not in _TEMPLATES:
        raise UserError(f"sentences: which={which!r} is not one of {', '.join(SETS)}")
    templates, seen, misses = _TEMPLATES[which], set(), 0
    while True:
        sentence = _fill(templates[rng.integers(len(templates))], rng)
        misses = misses + 1 if sentence in seen else 0
        if misses and misses < 100:  # tens of thousands exist: 100 repeats in a row mean they are used up
            continue
        seen.add(sentence)
        yield sentence


def _fill(template: str, rng: np.random.Generator) -> str:
    parts = []
    for piece in template.split("{"):
        name, brace, rest = piece.partition("}")
        if not brace:
            parts.append(piece)
            continue
        words = _LISTS[name]
        parts.append(words[rng.integers(len(words))] + rest)
    sentence = "".join(parts)
    return sentence[0].upper() + sentence[1:]
