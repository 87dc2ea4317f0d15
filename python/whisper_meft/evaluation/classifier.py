"""A trained model that classifies: the inference loop of predicting and scoring."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.examples import Example, ExampleSet
from ..errors import UserError
from ..model.module import MeftModel
from ..options.inference import InferenceArguments
from .loaded import LoadedModel, extractor_of, load_trained, usable_device


class Classifier(LoadedModel):
    """A trained model with its feature extractor, ready to classify examples.

    Args:
        model: trained model; is put into evaluation mode on ``device``.
        feature_extractor: the one it was trained with.
        device: torch device; default a GPU if there is one.
        batch_size: clips per batch.
        num_workers: processes that read audio; 0 reads in this one.
        progress: show progress bars.
    """

    def __init__(
        self,
        model: MeftModel,
        feature_extractor: Any,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        progress: bool = True,
    ):
        super().__init__(model, feature_extractor, device, batch_size, num_workers, progress)
        self.max_frames = model.meft_config.max_frames
        names = model.config.id2label
        self.labels = [names[index] for index in range(model.config.num_labels)]

    @classmethod
    def load(
        cls, model_dir: str | Path, arguments: InferenceArguments, progress: bool = True
    ) -> "Classifier":
        """Loads the model in ``model_dir`` (a folder, or a name on the hub).

        Raises:
            UserError: model, backbone or feature extractor cannot be loaded or do not fit each other.
        """
        device = usable_device(arguments.device)
        model = load_trained(MeftModel, model_dir, arguments, device)
        named, max_frames = arguments.feature_extractor_name, model.meft_config.max_frames
        extractor = extractor_of(model_dir, named, model.config, max_frames)
        return cls(model, extractor, device, arguments.batch_size, arguments.num_workers, progress)

    def probabilities(self, examples: ExampleSet) -> np.ndarray:
        """Class probabilities, float32 (N, K), rows in the order of ``examples``; NaN where the model's
        output was not finite.

        Raises:
            UserError: an example cannot be read.
        """
        return torch.from_numpy(self.logits(examples)).softmax(dim=-1).numpy()

    def logits(self, examples: ExampleSet) -> np.ndarray:
        """What the model's softmax is taken of, as :meth:`probabilities`."""
        order, loader = self.batches(examples, self.max_frames, self.max_frames != "fidelity")
        rows = []
        with torch.inference_mode():
            for batch in tqdm(loader, desc="classifying", unit="batch", disable=not self.progress):
                logits = self.model(**{name: value.to(self.device) for name, value in batch.items()}).logits
                rows.append(logits.float().cpu().numpy())
        return np.concatenate(rows)[np.argsort(order)]


def predict(
    classifier: Classifier,
    files: Sequence[str],
    reject_below: float | None = None,
    reject_label: str = "unknown",
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Classifies audio files; those that cannot be read do not stop the others.

    Args:
        reject_below: a clip whose most probable class has a lower probability gets the label
            ``reject_label`` instead.

    Returns:
        one {"file", "label", "probabilities": {label: p}} per readable file, in order, with a threshold also
        "rejected"; and (file, reason) of the unreadable ones.

    Raises:
        UserError: not one file is readable.
    """
    examples = ExampleSet([Example(audio=file, name=file) for file in files], "the files to classify")
    # The error of a single file says it all; of several the good ones are answered.
    good, bad = classifier.check(examples, strict=len(examples) == 1)
    probabilities = classifier.probabilities(good)
    rows = []
    for example, row in zip(good, probabilities):
        if not np.isfinite(row).all():
            bad.append((example.name, "the model's output for it is NaN or infinite"))
            continue
        named = {label: float(p) for label, p in zip(classifier.labels, row)}
        answer = {"file": example.name, "label": classifier.labels[int(row.argmax())], "probabilities": named}
        if reject_below is not None:
            answer["rejected"] = bool(float(row.max()) < reject_below)
            if answer["rejected"]:
                answer["label"] = reject_label
        rows.append(answer)
    if not rows:
        raise UserError(f"no file could be classified; {bad[0][0]}: {bad[0][1]}")
    return rows, bad
