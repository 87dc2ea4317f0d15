"""Decoding every clip once before training, so that a broken one is known before the work begins."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from ..errors import UserError, printable
from .examples import Example, ExampleSet
from .features import read_features

_WINDOW = 1.0  # seconds that are resampled as well: a clip vanishes at any length of them or at none


def check_audio(
    examples: ExampleSet,
    strict: bool = False,
    num_workers: int = 0,
    progress: bool = True,
    checked: Callable[[Example], Example | None] | None = None,
    feature_extractor: Any = None,
) -> tuple[ExampleSet, list[tuple[str, str]]]:
    """Decodes every example once, before training, and sets the unusable ones aside.

    Args:
        examples: what to check.
        strict: raise for the first unusable example instead.
        num_workers: threads (libsndfile decodes outside Python's lock); 0 and 1 mean none.
        progress: show a progress bar.
        checked: gives an example with its length, if it is known to be usable without being decoded.
        feature_extractor: what the examples will be made into features by; 16 kHz and any number of mel bins
            by default.

    Returns:
        the usable examples, each with its length in ``seconds``, and (name, reason) of the others.

    Raises:
        UserError: none is usable; or, when strict, the first is not.
    """
    if not len(examples):
        raise UserError(f"{examples.description} holds no examples")

    rate = getattr(feature_extractor, "sampling_rate", 16_000)

    def inspect(example: Example) -> Example | UserError:
        try:
            if checked is not None and (known := checked(example)) is not None:
                return known
            if example.has_features:
                read_features(example, getattr(feature_extractor, "feature_size", None))
                return example
            # What training and predicting call, over the whole clip: they raise nothing that this does not.
            _, seconds = example.read(rate, longest=_WINDOW, whole=True)
            return replace(example, seconds=seconds)
        except UserError as error:
            return error

    good, bad = [], []
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = pool.map(inspect, examples) if num_workers > 1 else map(inspect, examples)
        bar = tqdm(results, total=len(examples), desc="checking audio", unit="file", disable=not progress)
        for result, example in zip(bar, examples):
            if isinstance(result, Example):
                good.append(result)
                continue
            if strict:
                pool.shutdown(wait=False, cancel_futures=True)
                bar.close()
                raise result
            bad.append((example.name, str(result).removeprefix(example.name).lstrip(": ")))
    if not good:
        raise UserError(
            f"none of the {len(examples)} examples of {examples.description} can be used; the first, "
            f"{bad[0][0]}: {bad[0][1]}"
        )
    return ExampleSet(good, examples.description), bad


def describe_bad(bad: Sequence[tuple[str, str]], total: int | None) -> str:
    """What :func:`check_audio` set aside, one line per file; ``total``: of how many, where that is known."""
    count = len(bad) if total is None else f"{len(bad)} of {total}"
    lines = [f"{count} examples were left out because their audio cannot be used:"]
    return "\n".join(lines + [f"  {printable(name)}: {printable(reason)}" for name, reason in bad])
