"""One run of the study of noise: trained as in the study of clean recordings, from a cache of augmented clips
where the row says so, and heard through each noise."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from whisper_meft import MeftConfig, get_meft_model
from whisper_meft.augmentation.settings import Augmentation
from whisper_meft.augmentation.waves import coloured_noise, sounding_power
from whisper_meft.data import Example, ExampleSet
from whisper_meft.data.augmenter import Augmenter
from whisper_meft.feature_cache.filling import prepare_cache
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.files import read_json, write_json
from whisper_meft.model.backbone import quiet_transformers
from whisper_meft.model.pretrained import load_whisper
from whisper_meft.options.common import ModelArguments
from whisper_meft.training.settings import make_augmenter

from .cells import Fold, Study, digits
from .folds import Clip, load_task
from .noise_plan import DTYPE, HEARD, TRAININGS, Row, copies_of
from .plan import TRIMMED, Cell

RATE = 16_000
# Recordings of noise: how many of a kind, how long, and of how many voices at once.
RECORDINGS, SECONDS, VOICES = 24, 20, 5
TRAINING_SEED, TEST_SEED = 0, 1000  # of what is drawn for a clip


# --- recordings of noise ------------------------------------------------------------------------------------


def babble(clips: Sequence[Clip], generator: random.Random) -> np.ndarray:
    """``VOICES`` speakers at once, all as loud, each of whom says one clip after the other; float32
    (samples,), 20 dB below full scale."""
    by_speaker: dict[str, list[Clip]] = {}
    for clip in sorted(clips, key=lambda clip: clip.key):
        by_speaker.setdefault(clip.speaker, []).append(clip)
    mixed = np.zeros(SECONDS * RATE)
    for speaker in generator.sample(sorted(by_speaker), min(VOICES, len(by_speaker))):
        parts, long = [], 0
        while long < len(mixed):
            said, _ = Example(str(generator.choice(by_speaker[speaker]).path)).read(RATE)
            parts.append(said / max(np.sqrt(sounding_power(said, RATE)), 1e-6))
            long += len(said)
        mixed += np.concatenate(parts)[: len(mixed)]
    return (0.1 * mixed / np.sqrt(np.square(mixed).mean())).astype(np.float32)


def make_noises(folder: Path, speech: Path) -> None:
    """``folder/test`` with babble, ``folder/train`` with babble of other people and coloured noise, and
    ``folder/voices`` with four times as much babble of those and nothing else.

    The people are those of the languages, none of whom is in the accents. What is there stays, with the time
    of its change, by which a cache knows it.
    """
    people = load_task(speech, "languages")
    for part, of, count in (
        ("train", "train", RECORDINGS),
        ("test", "test", RECORDINGS),
        ("voices", "train", 4 * RECORDINGS),
    ):
        for number in range(count):
            path = folder / part / f"babble{number:02}.wav"
            if not path.is_file():
                _write(path, babble(people[of], random.Random(f"{part} {number}")))
    for number in range(RECORDINGS):
        path = folder / "train" / f"coloured{number:02}.wav"
        if not path.is_file():
            generator = np.random.default_rng(number)
            exponent = generator.uniform(0, 2)
            _write(path, 0.1 * coloured_noise(SECONDS * RATE, exponent, RATE, generator))


def _write(path: Path, wave: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    soundfile.write(unfinished, wave, RATE, format="WAV", subtype="FLOAT")
    unfinished.replace(path)


# --- runs ---------------------------------------------------------------------------------------------------


class NoisyFold(Fold):
    """A fold whose training clips are augmented as its row says.

    What is drawn for a clip depends on its name: that of its file alone, wherever the recordings lie.
    """

    def __init__(self, study: "NoiseStudy", row: Row, fold: int):
        super().__init__(study, row, fold)
        training, evaluation = map(_named, (self.examples.training, self.examples.evaluation))
        self.examples = replace(self.examples, training=training, evaluation=evaluation)
        self.test = _named(self.test)

    def _parse(self, method: str, rate: float, seed: int, folder: Path) -> tuple:
        parsed = super()._parse(method, rate, seed, folder)
        if parsed[3].augment is not None:
            parsed[3].cache_copies, parsed[3].data_seed = copies_of(self.row.how), TRAINING_SEED
        return parsed

    @property
    def augment(self) -> Augmenter | None:
        """What changes the training clips."""
        parsed = self._parse(self.row.compared, 1e-3, 0, self.output)
        return make_augmenter(parsed[3], TRAINING_SEED, self.extractor)

    @property
    def heard(self) -> dict[str, ExampleSet]:
        """The clips that models are asked about."""
        return {"validation": self.examples.evaluation, "test": self.test}


def _named(examples: ExampleSet) -> ExampleSet:
    return ExampleSet([replace(each, name=Path(each.audio).stem) for each in examples], examples.description)


class NoiseStudy(Study):
    """The study on disk, all of it in ``work/noise``; see :class:`examples.real_speech.cells.Study`."""

    fold_class = NoisyFold

    def __init__(self, model: str, speech: Path, work: Path):
        super().__init__(model, speech, work / "noise")

    def options(self, row: Row) -> list[str]:
        given = []
        for name, value in TRAININGS[row.how].items():
            if name == "noise_dir":
                value = self.noises / value
            given += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return given

    @property
    def noises(self) -> Path:
        return self.work / "noises"

    @cached_property
    def tests(self) -> dict[str, Augmenter]:
        """What makes each noise of ``HEARD`` of a clip: the same stretch at every level."""
        found = {}
        for name, (kind, level) in HEARD.items():
            settings = Augmentation({"noise": 1.0}, noise_snr=(level, level))
            folder = self.noises / "test" if kind == "babble" else None
            found[name] = Augmenter(settings, TEST_SEED, folder, sampling_rate=RATE)
        return found

    def run(self, cell: Cell) -> dict[str, Any]:
        make_noises(self.noises, self.speech)
        self._fill(cell.row, cell.fold)
        return super().run(cell)

    def fill_cache(self, row: Row) -> None:
        """Nothing: what a fold reads is made before it is run."""

    @property
    def _costs(self) -> Path:
        return self.work / "features.json"

    def _fill(self, row: Row, number: int) -> None:
        """Makes what the row's fold reads."""
        fold = self._fold_of(row, number)
        wanted = [(fold.examples.training, fold.augment, copies_of(row.how))]
        for examples in fold.heard.values():
            wanted += [(examples, augment, 1) for augment in (None, *self.tests.values())]
        told = read_json(self._costs) if self._costs.is_file() else {"cpu_seconds": 0.0, "clips": 0}
        reader, folder = self._reader, self.cache_folder(row)
        for examples, augment, copies in wanted:
            before = len(FeatureCache(folder)) if folder.is_dir() else 0
            started = time.process_time()
            made = prepare_cache(
                str(folder),
                reader,
                fold.extractor,
                [examples],
                progress=False,
                augment=augment,
                copies=copies,
            )
            if new := len(made) - before:
                told["cpu_seconds"] += time.process_time() - started
                told["clips"] += new
                write_json(self._costs, told)

    @cached_property
    def _reader(self) -> Any:
        """A model that reads all layers."""
        with quiet_transformers():
            base = load_whisper(ModelArguments(self.model), "float32")
            options = {"method": "weighted_sum", "max_frames": TRIMMED, "backbone_dtype": DTYPE}
            return get_meft_model(base, MeftConfig.from_dict(options))

    def _answers(self, fold: NoisyFold, folder: Path) -> dict[str, Any]:
        classifier = fold.classifier(folder)
        heard = {"clean": None, **self.tests}
        answers = {
            part: {
                name: digits(fold.cached_answers(classifier, examples, augment))
                for name, augment in heard.items()
            }
            for part, examples in fold.heard.items()
        }
        labels = {label: str(i) for i, label in enumerate(fold.labels)}
        reference = "".join(labels[each.label] for each in fold.examples.evaluation)
        told = read_json(self._costs)
        return {
            "augment": fold.row.how,
            **answers,
            "validation_reference": reference,
            # Of the frozen encoder, for one version of a clip.
            "version_cpu_seconds": round(told["cpu_seconds"] / told["clips"], 3),
        }
