"""The README.md of a saved model: what the hub reads of it, and what it says of use, data, scores and limits.

The hub's own check of a header is a request to its server. What is here is what huggingface_hub does itself:
its parser, its types, the model index there and back, and the names that it checks.
"""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from modelling_fixtures import tiny_whisper
from recognition_fixtures import recogniser
from training_fixtures import make_audio_folder, make_backbone, train_command
from whisper_meft import LSTConfig, MeftConfig, UserError, get_meft_model
from whisper_meft.audio.windows import Windows
from whisper_meft.commands.cli import main
from whisper_meft.data import cut_into_windows
from whisper_meft.data.digest import digest_of
from whisper_meft.data.examples import Example, ExampleSet
from whisper_meft.data.windows import whole_recordings
from whisper_meft.model import card
from whisper_meft.model.backbone import load_backbone
from whisper_meft.model.config import MeftModelConfig

# huggingface.co/tasks, /metrics and the relations of /docs/hub/model-cards.
TASKS = {"audio-classification", "automatic-speech-recognition"}
METRICS = {"accuracy", "recall", "f1", "wer", "cer"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
TEXT = {"library_name", "pipeline_tag", "base_model", "base_model_relation", "language"}
LISTS = {"tags", "datasets", "metrics"}


def check_header(path) -> dict:
    """A card's header as the hub's library reads it, of the types and names that the hub knows."""
    found = ModelCard.load(path)
    header = metadata_load(path)
    assert header.keys() <= TEXT | LISTS | {"model-index"}
    assert all(isinstance(header[name], str) for name in TEXT & header.keys())
    for name in LISTS & header.keys():
        assert header[name] and all(isinstance(each, str) for each in header[name])
        assert len(set(header[name])) == len(header[name])
    assert header["library_name"] == "whisper_meft" and header["pipeline_tag"] in TASKS
    assert set(header.get("metrics", [])) <= METRICS
    assert header.get("base_model_relation", "adapter") in RELATIONS
    assert ("base_model" in header) == ("base_model_relation" in header)
    for name in [header.get("base_model"), *header.get("datasets", [])]:
        if name is not None:
            validate_repo_id(name)
            assert name.count("/") == 1
    assert re.fullmatch("[a-z]{2,3}", header.get("language", "en"))
    if "model-index" in header:
        name, results = model_index_to_eval_results(header["model-index"])
        assert eval_results_to_model_index(name, results) == header["model-index"]
        assert {each.task_type for each in results} == {header["pipeline_tag"]}
        assert {each.metric_type for each in results} <= set(header["metrics"])
        assert all(isinstance(each.metric_value, float) for each in results)
        assert found.data.eval_results == results
    assert yaml.safe_load(path.read_text().split("---\n")[1]) == header
    return header


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "home" / "me" / "corpus" / "train", per_class=6)
    make_audio_folder(folder / "home" / "me" / "corpus" / "test", per_class=2, seed=1)
    data = folder / "home" / "me" / "corpus" / "train"
    assert main(train_command(folder / "backbone", data, folder / "tones", num_train_epochs=2)) == 0
    return folder


def test_after_training_it_tells_data_scores_use_and_limits(work):
    path = work / "tones" / "README.md"
    header, text = check_header(path), path.read_text()
    scores = json.loads((work / "tones" / "eval_results.json").read_text())
    run = json.loads((work / "tones" / "train_results.json").read_text())
    (index,) = header["model-index"]
    (result,) = index["results"]
    assert index["name"] == "tones" and result["task"]["type"] == "audio-classification"
    found = {each["type"]: each["value"] for each in result["metrics"]}
    names = {"accuracy": "accuracy", "recall": "mean_class_accuracy", "f1": "macro_f1"}
    assert found == pytest.approx({metric: scores[name] for metric, name in names.items()}, abs=1e-6)
    assert result["dataset"]["type"] == "local"
    assert f"{scores['count']} examples" in result["dataset"]["name"]
    assert "base_model" not in header and "license" not in header
    for part in ("Intended use", "Data", "Scores", "Limits"):
        assert text.count(f"\n## {part}\n") == 1
    assert f"{run['train_examples']} examples" in text and "| high | 5 |" in text
    assert f"| Accuracy | {scores['accuracy']:.4g} |" in text
    assert "Labels: high, low, middle." in text and "at most 1 s at a time" in text
    assert f"{run['trainable_parameters']:,} of" in text and "optimistic" in text
    assert str(work) not in text and "home" not in text and "Not recorded" not in text


def test_evaluating_adds_scores_and_takes_the_place_of_those_on_the_same_data(work, tmp_path, capsys):
    model = shutil.copytree(work / "tones", tmp_path / "model")
    path, test = model / "README.md", work / "home" / "me" / "corpus" / "test"
    path.write_text(path.read_text().replace("## Limits", "## Thanks\n\nTo all who sang.\n\n## Limits"))
    before = path.read_text()
    arguments = ["evaluate", str(model), "--data", str(test)]
    assert main(arguments) == 0
    assert path.read_text() == before
    assert main([*arguments, "--card"]) == 0
    first = path.read_text()
    header = check_header(path)
    names = [each["dataset"]["name"] for each in header["model-index"][0]["results"]]
    assert len(names) == 2 and names[1] == "test, 6 examples" and "To all who sang." in first
    assert main([*arguments, "--card"]) == 0
    assert path.read_text() == first
    assert main([*arguments, "--card", "--max_eval_samples=4"]) == 0
    names = [each["dataset"]["name"] for each in check_header(path)["model-index"][0]["results"]]
    assert names[1:] == ["test, 6 examples", "test, 4 examples"]  # other data: four of them
    other = work / "elsewhere" / "test"
    make_audio_folder(other, per_class=3, seed=2)
    assert main(["evaluate", str(model), "--data", str(other), "--card"]) == 0
    names = [each["dataset"]["name"] for each in check_header(path)["model-index"][0]["results"]]
    assert names[1:] == ["test, 6 examples", "test, 4 examples", "test, 9 examples"]
    path.write_bytes(b"\xef\xbb\xbf" + first.encode())  # as some editors save it
    assert main([*arguments, "--card"]) == 0 and path.read_text() == first
    path.write_text(first)
    capsys.readouterr()
    for change, message in (
        (lambda text: text.replace("<!-- scores -->", ""), "no one place for them, between <!-- scores -->"),
        (lambda text: text + "<!-- data -->", "no one place for them, between <!-- data -->"),
        (lambda text: text.replace("library_name:", "library_name: ["), "its header cannot be read"),
        (lambda text: "---\n- a\n---\n" + text, "its header cannot be read"),
    ):
        path.write_text(change(first))
        changed = path.read_text()
        assert main([*arguments, "--card"]) == 1
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
        assert path.read_text() == changed
    path.unlink()
    assert main([*arguments, "--card"]) == 0 and "| test, 6 examples |" in path.read_text()
    check_header(path)
    assert main(["evaluate", "user/model", "--data", str(test), "--card"]) == 1
    assert "--card: user/model is not a local folder" in capsys.readouterr().err


def test_windows_are_told_as_their_recordings(tmp_path):
    """Scores are of recordings; a later evaluation, which is given these, is of the same data."""
    whole = [
        Example(f"corpus/train/{label}{number}.wav", label, speaker=label, seconds=seconds)
        for label in "ab"
        for number, seconds in enumerate((0.8, 2.5, 2.05))
    ]
    whole.append(Example("corpus/train/long.wav", "b", speaker="c", start=3.0, stop=5.0, seconds=2.0))
    whole = ExampleSet(whole, "corpus/train")
    cut = cut_into_windows(whole, Windows(1.0, 0.5))
    assert len(cut) == 2 * (1 + 4 + 3) + 3
    again = whole_recordings(cut)
    assert [replace(each, seconds=None) for each in again] == [replace(each, seconds=None) for each in whole]
    # The last 0.05 s are in no window.
    assert [each.seconds for each in again] == pytest.approx([0.8, 2.5, 2.0] * 2 + [2.0])
    assert digest_of(whole_recordings(cut)) == digest_of(whole) != digest_of(cut)
    used = card.DataUsed.of(cut)
    assert (used.count, used.classes, used.speakers) == (7, {"a": 3, "b": 4}, 3)
    run = {
        "method": {"method": "lst", "reduction_factor": 8},
        "steps": 9,
        "learning_rate": 1e-3,
        "trainable_parameters": 10,
        "all_parameters": 100,
    }
    told = card.describe_data(cut, cut, 0, "a note", run | {"windows": {"length": 1.0, "hop": 0.5}})
    amount = "7 examples, 0.2 minutes, 3 speakers; cut into 19 windows of 1 s, one every 0.5 s"
    assert told.count(amount) == 2 and "| b | 4 |" in told
    assert "windows" not in card.describe_data(whole, whole, 0, "a note", run | {"windows": None})


def test_how_it_was_trained_is_told():
    examples = ExampleSet([Example(f"{label}.wav", label) for label in "ab"], "corpus")
    run = {
        "method": {"method": "lst"},
        "steps": 9,
        "learning_rate": 1e-3,
        "trainable_parameters": 10,
        "all_parameters": 100,
        "loss": "cross_entropy",
        "class_weights": None,
        "augmentation": None,
        "batches": {"sampling": "natural"},
    }
    plain = card.describe_data(examples, None, 0, "", run)
    assert plain.endswith("parameters trained.")
    for change, said in (
        ({"loss": "focal", "focal_gamma": 2.0}, "The loss is the focal loss with gamma 2."),
        ({"class_weights": {"a": 0.5, "b": 2.0}}, "Classes have weights of 0.5 to 2 in the loss."),
        ({"batches": {"sampling": "balanced"}}, "In an epoch each class comes equally often."),
    ):
        assert card.describe_data(examples, None, 0, "", run | change).endswith(f"\n{said}")
    weighted = card.describe_data(examples, None, 0, "", run | {"class_weights": {"a": 0.5, "b": 2.0}})
    assert "| class | examples | weight in the loss |\n|---|---:|---:|\n| a | 1 | 0.5 |\n" in weighted
    augmentation = {
        "kinds": {"speed": 1.0, "noise": 0.3},
        "speed_factors": [0.9, 1.1],
        "noise_dir": "/home/me/street noise",
        "noise_files": 12,
        "seed": 0,
    }
    told = card.describe_data(examples, None, 0, "", run | {"augmentation": augmentation, "cache_copies": 2})
    said = "Training clips were augmented by speed (100%), noise (30%) in 2 copies of each (speed\\_factors "
    assert said in told and "noise\\_dir street noise" in told and "home" not in told and "seed" not in told


def test_what_a_user_wrote_stays_when_training_writes_its_card(work, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    command = train_command(
        work / "backbone", work / "home" / "me" / "corpus" / "train", out, max_steps=1, eval_strategy="no"
    )
    assert main(command) == 0
    (out / "README.md").write_text("my own words")
    assert main([*command, "--overwrite_output_dir=True"]) == 0
    assert (out / "README.md").read_text() == "my own words"
    assert "scores cannot be written into" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("openai/whisper-small", "openai/whisper-small"),
        ("phoneme-tiny", None),
        ("backbone", None),
        ("/home/me/whisper", None),
        ("a/b/c", None),
        ("open ai/whisper", None),
        ("-x/y", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("method", sorted(MeftConfig.methods()))
def test_the_header_of_every_method(method, base, expected, tmp_path):
    options = MeftConfig.from_dict({"method": method}).to_dict()
    config = MeftModelConfig(meft=options, base_model_name_or_path=base, id2label={0: "a", 1: "b"})
    path = tmp_path / "README.md"
    path.write_text(card.model_card(config))
    header = check_header(path)
    assert header.get("base_model") == expected
    assert header.get("base_model_relation") == (
        None if expected is None else "finetune" if method in ("full", "bitfit", "mezo") else "adapter"
    )
    assert header["tags"] == ["audio-classification", "whisper", method]
    assert "/home" not in path.read_text()


@pytest.mark.parametrize(
    ("language", "code"),
    [("dutch", "nl"), ("<|nl|>", "nl"), ("nl", "nl"), (None, None), ("klingon: [", None), ("haw", "haw")],
)
def test_a_recogniser_says_its_language(language, code, tmp_path):
    model = get_meft_model(recogniser(), MeftConfig.from_dict({"method": "lst"}))
    model.generation_config.language = language
    model.save_pretrained(tmp_path)
    header = check_header(tmp_path / "README.md")
    assert header.get("language") == code and header["pipeline_tag"] == "automatic-speech-recognition"
    rates = {"count": 3, "normalized_wer": {"rate": 0.1234567891}, "normalized_cer": {"rate": None}}
    examples = ExampleSet([Example(audio="a", text="x")] * 3, "user/corpus (test)")
    results = card.results_of(model.config, examples, rates)
    card.write_results_into_card(tmp_path, model.config, results, hub_data="user/corpus")
    header = check_header(tmp_path / "README.md")
    (result,) = header["model-index"][0]["results"]
    named = {
        "name": "user/corpus (test), 3 examples",
        "config": f"user/corpus (test) {card.DataUsed.of(examples).digest}",
    }
    assert result["dataset"] == {**named, "type": "user/corpus"}
    assert [(each["type"], each["value"]) for each in result["metrics"]] == [("wer", 12.345679)]
    assert header["datasets"] == ["user/corpus"] and header["metrics"] == ["wer"]


def test_calibration_and_rejection_are_told(tmp_path):
    model = get_meft_model(tiny_whisper(), MeftConfig.from_dict({"method": "head"}))
    assert "Logits are not calibrated" in card.model_card(model.config)
    model.config.calibration_temperature, model.config.rejection_threshold = 1.5, 0.25
    text = card.model_card(model.config)
    assert "divided by the temperature 1.5" in text and "`--reject_below saved` rejects below 0.25" in text


def test_calibrating_and_training_on_leave_nothing_that_was_so(work, tmp_path):
    model = shutil.copytree(work / "tones", tmp_path / "model")
    config = MeftModelConfig.from_pretrained(model)
    config.calibration_temperature, config.rejection_threshold = 1.5, 0.25
    (model / "README.md").write_text(card.calibrated_card(model, config))
    text = (model / "README.md").read_text()
    assert "divided by the temperature 1.5" in text and "not calibrated" not in text
    check_header(model / "README.md")
    card.write_results_into_card(model, config, [], "Trained on.", afresh=True)  # other weights, not scored
    text = (model / "README.md").read_text()
    assert "None yet." in text and "| Accuracy |" not in text and "Trained on." in text
    assert "model-index" not in metadata_load(model / "README.md")
    (model / "README.md").write_text("My own page.")
    assert card.calibrated_card(model, config) is None


@pytest.mark.parametrize(
    "name", ["<!-- end of data -->", "a\n---\nb: c", "x: [", "| b |", "<b>", "\u202e`x`"]
)
def test_hostile_names_stay_text(name, tmp_path):
    config = MeftModelConfig(
        meft=MeftConfig.from_dict({"method": "lst"}).to_dict(), id2label={0: name, 1: "b"}
    )
    training = ExampleSet([Example(audio="a", label=name, speaker="s"), Example(audio="b", label="b")], name)
    run = {"method": config.meft | {"layers": None}, "steps": 1, "learning_rate": 0.1}
    run |= {"trainable_parameters": 1, "all_parameters": 2}
    told = card.describe_data(training, training, 1, name, run)
    scores = {"count": 2, "accuracy": 0.5, "macro_f1": float("nan")}
    results = card.results_of(config, training, scores)
    card.write_results_into_card(tmp_path, config, results, told)
    header = check_header(tmp_path / "README.md")
    assert header["metrics"] == ["accuracy"]
    body = ModelCard.load(tmp_path / "README.md").text
    assert body.count("<!-- end of data -->") == 1 and "<b>" not in body and "\u202e" not in body
    again = card.with_results((tmp_path / "README.md").read_text(), "x", results)
    assert again == (tmp_path / "README.md").read_text()


def test_a_backbone_in_the_models_folder_is_not_one_of_the_hub(work, tmp_path):
    shutil.copytree(work / "backbone", tmp_path / "model" / "backbones" / "tiny")
    model = get_meft_model(
        load_backbone(tmp_path / "model" / "backbones" / "tiny"), LSTConfig(reduction_factor=4)
    )
    model.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["base_model_name_or_path"] == "backbones/tiny"  # from the model's folder
    assert "base_model" not in check_header(tmp_path / "model" / "README.md")


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("/home/me/corpus/train", "train"),
        ("validation part of /home/me/my corpus/dev (validation)", "validation part of dev (validation)"),
        ("corpus/train", "corpus/train"),
        ("../me/corpus", "corpus"),
        ("test part of ./data/corpus (test)", "test part of corpus (test)"),
        ("~/corpus/x", "x"),
        ("user/data (train)", "user/data (train)"),
        ("the given Dataset", "the given Dataset"),
    ],
)
def test_folders_above_the_data_are_left_out(description, expected):
    assert card.without_folders(description) == expected


def test_a_card_that_is_no_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    config = MeftModelConfig(meft=MeftConfig.from_dict({"method": "lst"}).to_dict())
    with pytest.raises(UserError, match=r"scores cannot be written into .*README.md"):
        card.check_card(tmp_path, config)
