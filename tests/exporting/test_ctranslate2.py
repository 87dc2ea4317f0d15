"""`whisper-meft export --format ctranslate2`: merged recognisers say in CTranslate2 what they say here."""

import numpy as np
import pytest
import soundfile
import torch
from modelling_fixtures import randomise
from recogniser_fixtures import make_recogniser, noise
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from whisper_meft import MeftConfig, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.exporting.earlier import COPIED

ctranslate2 = pytest.importorskip("ctranslate2", reason="the extra `ctranslate2` is not installed")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """whisper/; clip.wav, which lasts its window."""
    folder = tmp_path_factory.mktemp("ctranslate2")
    make_recogniser(folder / "whisper")
    noise(folder / "clip.wav", 1.0)
    return folder


def save(work, folder, method, **options):
    whisper = WhisperForConditionalGeneration.from_pretrained(work / "whisper")
    model = get_meft_model(whisper, MeftConfig.from_dict({"method": method, **options}))
    randomise(model, std=0.05)
    model.save_pretrained(folder)
    WhisperProcessor.from_pretrained(work / "whisper").save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("s2_lora", {"r": 4, "lora_alpha": 8}),
        ("bitfit", {}),
        ("lora", {"r": 4, "lora_alpha": 8, "target": "decoder"}),
    ],
)
def test_what_it_says_is_what_the_model_says(method, options, work, tmp_path, capsys):
    if method == "lora":
        pytest.importorskip("peft")
    model = save(work, tmp_path / "model", method, **options)
    command = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "ctranslate2"]
    earlier = ("model.onnx", "model.onnx.data", "model.json", "model.bin", "vocabulary.txt")
    (tmp_path / "out").mkdir()
    for name in (*earlier, "notes.txt"):
        (tmp_path / "out" / name).write_text("old")
    assert main([*command, "--overwrite"]) == 0
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {"model.bin", "config.json", "vocabulary.json", "vocabulary.txt", "notes.txt", *COPIED}
    assert "for CTranslate2: the encoder's output differs from PyTorch's by" in capsys.readouterr().out
    processor = WhisperProcessor.from_pretrained(tmp_path / "out")
    wave, rate = soundfile.read(work / "clip.wav", dtype="float32")
    features = processor.feature_extractor(wave, sampling_rate=rate, return_tensors="np").input_features
    whisper = ctranslate2.models.Whisper(str(tmp_path / "out"), device="cpu")
    prompt = ["<|startoftranscript|>", "<|nl|>", "<|transcribe|>", "<|notimestamps|>"]
    given = ctranslate2.StorageView.from_array(features.astype(np.float32))
    (found,) = whisper.generate(given, [prompt], beam_size=1, max_length=40)  # of which it takes half
    said, tokenizer = found.sequences_ids[0], processor.tokenizer
    before = tokenizer.convert_tokens_to_ids(prompt)
    with torch.no_grad():
        given = torch.tensor([before + said])
        scores = model(torch.from_numpy(features), decoder_input_ids=given).logits[0, len(before) - 1 :]
    scores[:, model.generation_config.suppress_tokens] = -torch.inf
    likeliest = scores.argmax(-1).tolist()
    assert likeliest[:-1] == said and len(set(said)) > 2
    assert len(said) == 20 or likeliest[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("method", ["lst", "sherl", "adapter"])
def test_what_cannot_be_merged(method, work, tmp_path, capsys):
    save(work, tmp_path / "model", method)
    command = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "ctranslate2"]
    capsys.readouterr()
    assert main(command) == 1
    assert capsys.readouterr().err == (
        "whisper-meft: error: CTranslate2 runs the layers of a plain Whisper alone, and what "
        f"{method} trained is a network of its own beside or between them, which cannot be merged into "
        "their weights\n"
    )
    assert not (tmp_path / "out").exists()
