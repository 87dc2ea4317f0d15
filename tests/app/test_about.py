"""What is told of a model, and that it tells nothing of the machine."""

import pytest
from modelling_fixtures import tiny_whisper
from page_fixtures import load_classifier, make_model
from recogniser_fixtures import make_recogniser
from whisper_meft import FullConfig, HeadConfig, LoRAConfig, SHERLConfig, UniPTConfig, get_meft_model
from whisper_meft.app.about import about
from whisper_meft.evaluation.transcriber import Transcriber
from whisper_meft.model.card import model_card
from whisper_meft.options.inference import InferenceArguments


def test_of_a_classifier(tmp_path):
    folder = make_model(tmp_path)
    model = load_classifier(folder).model
    found = about(folder, model, ("high", "low", "middle"))
    assert found.title == "tones"
    assert found.summary == "LST side network on a frozen Whisper · 3 classes: high, low, middle"
    assert found.card.startswith("# LST side network") and "library_name" not in found.card
    assert str(tmp_path) not in f"{found}"
    assert about(f"{folder}/", model, ("a", "b"), "Tones").title == "Tones"
    model.config.calibration_temperature = 2.0
    many = about(folder, model, [f"c{i}" for i in range(14)])
    assert many.summary.endswith(
        "14 classes: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11 and 2 more · calibrated"
    )
    (folder / "README.md").unlink()
    assert about(folder, model, ("a", "b")).card is None


@pytest.mark.parametrize(
    ("config", "summary"),
    [
        (UniPTConfig(reduction_factor=4), "UNIPT side network on a frozen Whisper · 2 classes: a, b"),
        (SHERLConfig(reduction_factor=4), "SHERL side network on a frozen Whisper · 2 classes: a, b"),
        (HeadConfig(), "Whisper, method head · 2 classes: a, b"),
        (FullConfig(), "Whisper, method full · 2 classes: a, b"),
        (LoRAConfig(), "Whisper, method lora · 2 classes: a, b"),
    ],
    ids=lambda each: getattr(each, "method", None),
)
def test_of_every_kind_of_method(config, summary):
    assert about("someone/tones", get_meft_model(tiny_whisper(), config), ("a", "b")).summary == summary


def test_a_backbone_is_named_unless_it_is_a_place(tmp_path):
    model = load_classifier(make_model(tmp_path)).model
    for base, told in (("openai/whisper-small", True), (str(tmp_path), False), ("backbone", False)):
        model.config.base_model_name_or_path = base
        summary = about("someone/tones", model, ("a", "b")).summary
        assert (base in summary) is told and summary.startswith("LST side network on a frozen Whisper")


def test_of_a_plain_whisper(tmp_path):
    folder = make_recogniser(tmp_path / "whisper-tiny")
    model = Transcriber.load(folder, InferenceArguments(device="cpu"), progress=False).model
    found = about(folder, model, None)
    assert (found.title, found.summary, found.card) == ("whisper-tiny", "Plain Whisper", None)


def test_of_a_name_on_the_hub_that_is_not_there(tmp_path):
    model = load_classifier(make_model(tmp_path)).model
    found = about("someone/tones", model, ("a", "b"))
    assert found.title == "someone/tones" and found.card is None


def test_a_card_is_read_whole_and_no_further(tmp_path):
    folder = make_model(tmp_path)
    model = load_classifier(folder).model
    (folder / "README.md").write_bytes(model_card(model.config).encode() + b"\xff\xfe" + b"x" * 200_000)
    card = about(folder, model, ("a", "b")).card
    assert len(card) <= 100_000 and "\ufffd" in card
    (folder / "README.md").write_text("---\na: 1\n")
    assert about(folder, model, ("a", "b")).card == "---\na: 1"
