"""All methods on pretrained Whisper: onnxruntime gives on recordings what PyTorch does."""

import os
from pathlib import Path

import pytest
from modelling_fixtures import randomise
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from whisper_meft import MeftConfig, S2LoRAConfig, get_meft_model
from whisper_meft.data.examples import Example, ExampleSet
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.exporting.onnx_folder import PACKAGES, export_onnx
from whisper_meft.model.backbone import load_backbone, set_labels

pytestmark = [pytest.mark.real, pytest.mark.slow]
CLIPS = 4


@pytest.fixture(scope="module")
def examples():
    """Recordings from the shortest to the longest."""
    spoken = os.environ.get("MEFT_SPEECH")
    if not spoken:
        pytest.skip("MEFT_SPEECH names no folder of recordings")
    files = [path for path in Path(spoken).rglob("*") if path.suffix in (".wav", ".flac")]
    files.sort(key=lambda path: (path.stat().st_size, path.name))
    chosen = files[:: max(1, (len(files) - 1) // (CLIPS - 1))][:CLIPS]
    return ExampleSet([Example(audio=str(path), name=path.name) for path in chosen], "recordings")


def classifier_of(method, **options):
    if "lora" in method and method != "s2_lora":
        pytest.importorskip("peft")
    base = load_backbone(os.environ["MEFT_WHISPER"])
    set_labels(base, ["a", "b", "c"])
    model = get_meft_model(base, MeftConfig.from_dict({"method": method, **options}))
    if model.meft_config.frozen_encoder:
        # With larger weights the head alone is sure of one class, whatever it hears.
        randomise(model, std=0.02 if method == "head" else 0.1)
    else:  # what moves pretrained weights far makes noise of them
        randomise(model, std=1e-3)
        randomise(model.projector)
        randomise(model.classifier)
    extractor = WhisperFeatureExtractor.from_pretrained(os.environ["MEFT_WHISPER"])
    return Classifier(model, extractor, "cpu", batch_size=2, progress=False)


@pytest.mark.parametrize("max_frames", ["longest", "fidelity"])
@pytest.mark.parametrize("method", sorted(MeftConfig.methods()))
def test_probabilities_are_within_a_ten_thousandth(method, max_frames, examples, tmp_path):
    for package in PACKAGES:
        pytest.importorskip(package)
    classifier = classifier_of(method, max_frames=max_frames)
    plain, rounded = export_onnx(classifier, tmp_path, examples, quantize=method == "lst")
    size = (tmp_path / "model.onnx").stat().st_size / 2**20
    print(f"\n{method}, {max_frames}: {size:.1f} MiB, {plain}, int8 {rounded}")
    assert plain.clips >= 3 and plain.largest <= 1e-4
    assert classifier.probabilities(examples).std(0).max() > 1e-3  # clips differ


def test_a_merged_recogniser_says_the_same_in_ctranslate2(examples, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    from whisper_meft.exporting.ctranslate2_folder import export_ctranslate2

    folder = os.environ["MEFT_WHISPER"]
    whisper = WhisperForConditionalGeneration.from_pretrained(folder)
    model = get_meft_model(whisper, S2LoRAConfig(r=8, lora_alpha=8)).eval()
    randomise(model, std=0.03)
    processor = WhisperProcessor.from_pretrained(folder)
    error = export_ctranslate2(model, processor.feature_extractor, processor.tokenizer, tmp_path)
    print(f"\nencoder output of CTranslate2: {error:.2g} of its norm away")
    heard = ctranslate2.models.Whisper(str(tmp_path), device="cpu")
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    for example in list(examples)[1:3]:
        wave = example.read(16_000)[0]
        features = processor(wave, sampling_rate=16_000, return_tensors="pt").input_features
        given = ctranslate2.StorageView.from_array(features.numpy())
        (found,) = heard.generate(given, [prompt], beam_size=1)
        ids = model.generate(features, language="en", task="transcribe", num_beams=1)[0]
        texts = [
            processor.tokenizer.decode(each, skip_special_tokens=True)
            for each in (found.sequences_ids[0], ids)
        ]
        print(texts)
        assert len(texts[0]) > 20 and texts[0].strip() == texts[1].strip()
