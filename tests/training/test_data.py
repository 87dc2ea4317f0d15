"""Reading the examples of a run."""

import pytest
from modelling_fixtures import whisper_config
from training_fixtures import make_audio_folder
from transformers import WhisperFeatureExtractor
from whisper_meft import LSTConfig
from whisper_meft.data import Example, ExampleSet
from whisper_meft.errors import UserError
from whisper_meft.options.training import TrainDataArguments
from whisper_meft.training.data import load_data
from whisper_meft.training.tasks.classification import Classification


def test_labels_must_be_in_the_training_data_and_are_named_of_the_evaluation_data(tmp_path, caplog):
    for split, number in (("train", 2), ("test", 1)):
        make_audio_folder(tmp_path / split, per_class=number)
    for each in (tmp_path / "test" / "low").iterdir():
        each.unlink()

    def load(labels):
        sources = {"train_data": str(tmp_path / "train"), "eval_data": str(tmp_path / "test")}
        arguments = TrainDataArguments(**sources, labels=labels, data_format="audiofolder")
        task = Classification(LSTConfig(reduction_factor=2), whisper_config(), None)
        return load_data(arguments, task, True, False, 0, progress=False)

    with pytest.raises(UserError, match="train has no examples of lwo, which labels names: it has high, low"):
        load(["high", "middle", "lwo"])
    found = load(["high", "low"])
    assert found.labels == ["high", "low"] and found.evaluation.label_counts() == {"high": 1}
    assert "test has no examples of low, which labels names: it has high, middle" in caplog.text


@pytest.mark.parametrize(
    ("max_frames", "seconds", "said"),
    [
        ("fidelity", (2.0, 4.0), True),
        ("fidelity", (2.0, 20.0), False),
        ("fidelity", (2.0, None), False),
        ("longest", (2.0, 4.0), False),
    ],
)
def test_a_window_that_is_mostly_padding_is_told_of(max_frames, seconds, said):
    config = LSTConfig(reduction_factor=2, max_frames=max_frames)
    task = Classification(config, whisper_config(), WhisperFeatureExtractor(chunk_length=20))
    found = ExampleSet(
        [Example(f"{i}.wav", f"class{i}", seconds=each) for i, each in enumerate(seconds)], "clips"
    )
    task.note(found)
    told = [line for line in task.describe(found) if "--max_frames longest" in line]
    assert len(told) == said
    assert not told or told[0].startswith("  they are 3 s long on average and padded to 20 s")
