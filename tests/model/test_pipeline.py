"""transformers' pipeline hears by a saved recogniser as by the Whisper in it: long recordings, timestamps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from modelling_fixtures import randomise
from recogniser_fixtures import make_recogniser, noise
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)
from whisper_meft import LSTConfig, MeftForConditionalGeneration, get_meft_model

ROOT = Path(__file__).parents[2]
TASK = "automatic-speech-recognition"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """whisper/, untrained/, and trained/, with extractor and tokenizer saved one by one, for Dutch."""
    folder = tmp_path_factory.mktemp("pipeline")
    whisper = WhisperForConditionalGeneration.from_pretrained(make_recogniser(folder / "whisper"))
    processor = WhisperProcessor.from_pretrained(folder / "whisper")
    model = get_meft_model(whisper, LSTConfig(reduction_factor=4, placement="both"))
    model.save_pretrained(folder / "untrained")
    processor.save_pretrained(folder / "untrained")
    model.generation_config.language = "dutch"
    randomise(model, std=0.1).save_pretrained(folder / "trained", save_backbone=True)
    processor.feature_extractor.save_pretrained(folder / "trained")
    processor.tokenizer.save_pretrained(folder / "trained")
    for name, seconds in {"short": 0.7, "long": 2.5}.items():
        noise(folder / f"{name}.wav", seconds, seed=4)
    return folder


@pytest.fixture(scope="module")
def heard(work):
    """Transcribes work/<clip>.wav by the pipeline of a folder."""
    names = ("whisper", "untrained", "trained")
    pipes = {name: pipeline(TASK, model=str(work / name), device="cpu") for name in names}

    def hear(name, clip, **options):
        wave = soundfile.read(work / f"{clip}.wav", dtype="float32")[0]
        return pipes[name](wave, generate_kwargs={"language": "nl", "num_beams": 1}, **options)

    return hear


@pytest.mark.parametrize(
    ("clip", "options"),
    [
        ("short", {}),
        ("short", {"return_timestamps": True}),
        ("long", {}),
        ("long", {"return_timestamps": True}),
        ("long", {"chunk_length_s": 1}),
        ("long", {"chunk_length_s": 1, "return_timestamps": True}),
    ],
)
def test_an_untrained_one_hears_what_whisper_does(clip, options, heard):
    found = heard("untrained", clip, **options)
    assert found == heard("whisper", clip, **options) and found["text"]
    assert ("chunks" in found) == ("return_timestamps" in options)
    assert found != heard("trained", clip, **options)


def test_what_is_loaded_already_does_too(work, heard):
    model = MeftForConditionalGeneration.from_pretrained(work / "trained")
    extractor = WhisperFeatureExtractor.from_pretrained(work / "trained")
    tokenizer = WhisperTokenizer.from_pretrained(work / "trained")
    pipe = pipeline(TASK, model=model, tokenizer=tokenizer, feature_extractor=extractor, device="cpu")
    wave = soundfile.read(work / "long.wav", dtype="float32")[0]
    found = pipe(wave, generate_kwargs={"num_beams": 1})
    assert found == heard("trained", "long")  # in the language that it was saved with
    plain = AutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=tokenizer, feature_extractor=extractor, device="cpu"
    )
    assert plain(wave, generate_kwargs={"num_beams": 1}) == found and plain.type == "seq2seq_whisper"


def test_other_models_keep_their_type(work):
    whisper = pipeline(TASK, model=str(work / "whisper"), device="cpu")
    assert whisper.type == "seq2seq_whisper" and type(whisper) is AutomaticSpeechRecognitionPipeline
    whisper.type = "seq2seq"
    assert whisper.type == "seq2seq"


@pytest.mark.parametrize("folder", ["untrained", "trained"])
def test_the_auto_classes_find_all_of_a_folder(folder, work):
    assert isinstance(AutoProcessor.from_pretrained(work / folder), WhisperProcessor)
    assert isinstance(AutoTokenizer.from_pretrained(work / folder), WhisperTokenizer)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(work / folder)
    assert isinstance(model, MeftForConditionalGeneration)


def test_a_pipeline_that_was_imported_first_does_too(work):
    code = (
        "import sys\nfrom transformers import AutomaticSpeechRecognitionPipeline, pipeline\n"
        f"import whisper_meft\nprint(pipeline('{TASK}', model=sys.argv[1], device='cpu').type)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "python"]))}
    command = [sys.executable, "-c", code, str(work / "untrained")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["seq2seq_whisper"], result.stderr
