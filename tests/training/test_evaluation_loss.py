"""The loss of the evaluation data, of one process and of several: the mean over it all, each clip once."""

import json
from pathlib import Path

import pytest
import torch
from modelling_fixtures import MELS, WINDOW, ToyClips, randomise, tiny_whisper
from process_fixtures import two_processes
from recognition_fixtures import VOCABULARY, recogniser
from transformers import TrainingArguments
from whisper_meft import LSTConfig, MeftTrainer, get_meft_model
from whisper_meft.training.criterion import ClassLoss
from whisper_meft.training.transcribing import TranscriptionTrainer

# Numbers of clips and sizes of batches.
CASES = ((12, 8), (12, 5), (9, 8), (3, 2), (1, 4))
WEIGHTS = [0.2, 3.0, 1.0]
KINDS = ("plain", "smoothed", "weighted", "focal", "not averaged", "transcripts", "transcripts of batches")
OTHERS = ("soft", "one-hot", "overridden")  # losses that know no label that does not count
SCRIPT = """
import json, sys

import torch

tests, folder = sys.argv[1:]
sys.path.insert(0, tests)
from test_evaluation_loss import KINDS, OTHERS, evaluated

found = {kind: evaluated(kind, folder) for kind in KINDS + OTHERS}
with open(f"{folder}/{torch.distributed.get_rank()}.json", "w") as file:
    json.dump(found, file)
"""


class Sentences(torch.utils.data.Dataset):
    """Clips with texts of 1 to 7 tokens."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(4)
        self.features = torch.randn(size, MELS, 2 * WINDOW, generator=generator)
        self.labels = torch.randint(4, VOCABULARY - 1, (size, 7), generator=generator)
        for i in range(size):
            self.labels[i, 1 + 3 * i % 7 :] = -100

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"input_features": self.features[i], "labels": self.labels[i]}


class SoftClips(ToyClips):
    """Labels (3,) of probabilities."""

    def __init__(self, size, seed):
        super().__init__(size, seed)
        self.labels = 0.8 * torch.nn.functional.one_hot(self.labels, 3) + 0.2 / 3

    def __getitem__(self, i):
        return {"input_features": self.features[i], "labels": self.labels[i]}


def soft(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels)


def one_hot(outputs, labels, num_items_in_batch=None):
    own = torch.nn.functional.one_hot(labels, 3) * torch.log_softmax(outputs["logits"], -1)
    return -own.sum(-1).mean()


class Overridden(MeftTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["input_features"])
        loss = one_hot(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def data_of(kind, clips):
    if kind.startswith("transcripts"):
        return Sentences(clips)
    return (SoftClips if kind == "soft" else ToyClips)(clips, seed=1)


def metrics(found):
    return {"both": [found.label_ids.tolist(), found.predictions.argmax(-1).tolist()]}


def trainer_of(kind, folder) -> MeftTrainer:
    options = {"label_smoothing_factor": 0.1} if kind == "smoothed" else {}
    options |= {"average_tokens_across_devices": False} if kind == "not averaged" else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    config = LSTConfig(reduction_factor=4, max_frames="fidelity")
    if kind.startswith("transcripts"):
        model = randomise(get_meft_model(recogniser(), config), std=0.3)
        return TranscriptionTrainer(model, arguments)
    losses = {"weighted": ClassLoss(WEIGHTS), "focal": ClassLoss(WEIGHTS, gamma=2.0)}
    loss = (losses | {"soft": soft, "one-hot": one_hot}).get(kind)
    model = randomise(get_meft_model(tiny_whisper(), config), std=1.0)
    trainer_class = Overridden if kind == "overridden" else MeftTrainer
    return trainer_class(model, arguments, compute_loss_func=loss, compute_metrics=metrics)


def scores(trainer, kind, clips, size) -> list:
    """[the loss, what the metrics were given]"""
    data, trainer.args.per_device_eval_batch_size = data_of(kind, clips), size
    if kind == "transcripts":
        trainer.tokens_per_clip = int((data.labels != -100).sum()) / clips
    found = trainer.evaluate(data)
    return [found["eval_loss"], found.get("eval_both")]


def evaluated(kind, folder) -> list[list]:
    trainer = trainer_of(kind, folder)
    return [scores(trainer, kind, *case) for case in CASES]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "run.py").write_text(SCRIPT)
    two_processes(folder / "run.py", Path(__file__).parent, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def whole(kind, trainer, clips) -> float:
    """The loss of all clips as one batch, as it is documented."""
    data, model = data_of(kind, clips), trainer.model.eval()
    features, labels = data.features, torch.as_tensor(data.labels)
    with torch.no_grad():
        if kind.startswith("transcripts"):
            return model(input_features=features, labels=labels).loss.item()
        logits = model(input_features=features).logits
    if kind in ("plain", "not averaged", "smoothed"):
        smoothing = 0.1 if kind == "smoothed" else 0.0
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing).item()
    own = torch.log_softmax(logits, -1)[torch.arange(clips), labels]
    missing = 1.0 if kind == "weighted" else (1 - own.exp()) ** 2
    return (torch.tensor(WEIGHTS)[labels] * missing * -own).mean().item()


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_it_is_of_each_clip_once_however_many_processes_and_batches(kind, of_two, tmp_path):
    trainer = trainer_of(kind, tmp_path)
    assert scores(trainer, kind, 12, 5)[0] == pytest.approx(whole(kind, trainer, 12), rel=2e-6)
    for case, (loss, _) in zip(CASES, of_two[0][kind]):
        assert loss == pytest.approx(whole(kind, trainer, case[0]), rel=2e-6), case
    assert of_two[0][kind] == of_two[1][kind]


@pytest.mark.parametrize("kind", OTHERS)
def test_labels_of_another_loss_stay_as_they_are(kind, of_two, tmp_path):
    """What fills up a batch, the first clips again, is then in the mean of that batch."""
    trainer = trainer_of(kind, tmp_path)
    loss_of = soft if kind == "soft" else one_hot
    for (clips, size), (loss, _) in zip(CASES, of_two[0][kind]):
        data, total = data_of(kind, clips), 0.0
        with torch.no_grad():
            logits = trainer.model.eval()(input_features=data.features).logits
        for start in range(0, clips, size):
            chosen = torch.arange(start, start + size) % clips
            mean = loss_of({"logits": logits[chosen]}, data.labels[chosen])
            total += min(size, clips - start) * mean.item()
        assert loss == pytest.approx(total / clips, rel=2e-6), (clips, size)
    assert of_two[0][kind] == of_two[1][kind]


def test_batches_of_two_processes_count_as_one_where_tokens_are_not_counted(of_two, tmp_path):
    kind = "transcripts of batches"
    trainer = trainer_of(kind, tmp_path)
    for case, (loss, _) in zip(CASES, of_two[0][kind]):
        if 2 * case[1] >= case[0]:
            assert loss == pytest.approx(whole(kind, trainer, case[0]), rel=2e-6), case


def test_metrics_are_of_each_clip_once_and_in_order(of_two, tmp_path):
    trainer = trainer_of("plain", tmp_path)
    for case, (_, both) in zip(CASES, of_two[0]["plain"]):
        assert both == scores(trainer, "plain", *case)[1]
        assert both[0] == data_of("plain", case[0]).labels.tolist()
