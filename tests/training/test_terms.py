"""What of the options and of the data must be as it was where a run is gone on with."""

import json
import shutil
from types import SimpleNamespace

import pytest
from recogniser_fixtures import make_recogniser
from training_fixtures import make_audio_folder, make_backbone, make_transcripts, train_command
from whisper_meft.commands.train import make_parser
from whisper_meft.training.run import read_examples
from whisper_meft.training.settings import settle
from whisper_meft.training.terms import free_terms, terms_of


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terms")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=2)
    make_audio_folder(folder / "noise", per_class=1, seed=1)
    make_audio_folder(folder / "other_noise", per_class=2, seed=1)
    shutil.copytree(folder / "noise", folder / "elsewhere" / "moved")
    return folder


@pytest.mark.parametrize(
    "options, chooses",
    [
        ({}, True),
        ({"load_best_model_at_end": False}, False),
        ({"load_best_model_at_end": False, "save_strategy": "best"}, True),
        ({"load_best_model_at_end": False, "lr_scheduler_type": "reduce_lr_on_plateau"}, True),
    ],
)
def test_scores_are_compared_where_something_comes_of_them(options, chooses, work):
    command = train_command(work / "backbone", work / "train", work / "out", **options)
    arguments = make_parser().parse(command[1:])[-1]
    named = {"metric_for_best_model", "greater_is_better", "names and labels of eval_data"}
    given = dict.fromkeys([*named, "learning_rate", "names and labels of train_data"])
    assert free_terms(arguments, given) == (set() if chooses else named)


def terms(work, storage=None, **options) -> dict:
    command = train_command(work / "backbone", work / "train", work / "out", eval_strategy="no", **options)
    model, method, data_arguments, training = make_parser().parse(command[1:])
    settings = settle(model, method, training)
    examples = read_examples(data_arguments, settings)
    settings.task.note(examples.training)
    cache = {} if storage is None else {"cache": SimpleNamespace(storage=storage)}
    found = terms_of(settings, examples, SimpleNamespace(**cache))
    assert json.loads(json.dumps(found)) == found
    return found


def differing(one: dict, other: dict) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


def test_recordings_that_are_mixed_in_and_what_a_cache_keeps(work):
    augmented = {"augment": "noise", "cache_features": True, "cache_copies": 2, "noise_dir": work / "noise"}
    before = terms(work, "bfloat16", **augmented)
    assert before["cache_copies"] == 2 and before["cache_features"] == "bfloat16"
    moved = terms(work, "bfloat16", **{**augmented, "noise_dir": work / "elsewhere" / "moved"})
    assert moved == before
    for change, storage, named in (
        ({"cache_copies": 3}, "bfloat16", {"cache_copies"}),
        ({"noise_dir": work / "other_noise"}, "bfloat16", {"recordings in noise_dir"}),
        ({"noise_dir": None}, "bfloat16", {"recordings in noise_dir"}),
        ({"cache_features": None, "cache_copies": None}, None, {"cache_copies", "cache_features"}),
        ({}, "fp8", {"cache_features"}),
    ):
        assert differing(before, terms(work, storage, **{**augmented, **change})) == named
    # As they would be computed: a cache that keeps that changes nothing.
    assert terms(work, "exact", cache_features=True) == terms(work)


def test_weights_are_known_by_their_values(work, tmp_path):
    for name, values in (("a", (1, 2, 3)), ("b", (1.0, 2.0, 3.0)), ("c", (1, 2, 4))):
        weights = dict(zip(("high", "low", "middle"), values))
        (tmp_path / f"{name}.json").write_text(json.dumps(weights))
    a, b, c = (terms(work, class_weights=tmp_path / f"{name}.json") for name in "abc")
    assert a == b and differing(a, c) == {"class_weights"}
    assert terms(work, class_weights="balanced")["class_weights"].startswith("balanced ")


def test_transcripts_are_told_by_what_is_said(tmp_path):
    backbone = make_recogniser(tmp_path / "backbone")
    make_audio_folder(tmp_path / "audio", per_class=2)
    listed = make_transcripts(tmp_path / "clips.csv", tmp_path / "audio")

    def found(**options) -> dict:
        options = {"task": "transcribe", "eval_data": listed, **options}
        command = train_command(backbone, listed, tmp_path / "out", **options)
        model, method, data_arguments, training = make_parser().parse([*command[1:], "--language=english"])
        settings = settle(model, method, training)
        return terms_of(settings, read_examples(data_arguments, settings), None)

    before, scored = found(), {"metric_for_best_model": "wer"}
    assert found(generation_num_beams=2) == before  # a loss is of no generated transcript
    beams = found(**scored, generation_num_beams=2)
    assert differing(found(**scored), beams) == {"generation_num_beams"}
    listed.write_text(listed.read_text().replace(",low,", ",slow,"))
    assert differing(before, found()) == {
        "names and transcripts of train_data",
        "names and transcripts of eval_data",
    }
