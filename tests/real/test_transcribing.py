"""Real speech, real Whisper: evaluate, predict and transformers' pipeline by an untrained side network."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline
from whisper_meft import LSTConfig, get_meft_model
from whisper_meft.commands.cli import main

pytestmark = [pytest.mark.real, pytest.mark.slow]
RATE = 16_000


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """lst/, untrained; said.csv: eight clips of the Dutch test set; joined.wav: twelve of them, over 30 s."""
    manifest = Path(os.environ.get("MEFT_SPEECH", "nowhere"), "asr_de_nl", "nl_test.csv")
    if not manifest.is_file():
        pytest.skip("MEFT_SPEECH names no folder with asr_de_nl")
    folder = tmp_path_factory.mktemp("transcribing")
    whisper = WhisperForConditionalGeneration.from_pretrained(os.environ["MEFT_WHISPER"])
    model = get_meft_model(whisper, LSTConfig())
    model.generation_config.language = "nl"
    model.save_pretrained(folder / "lst")
    WhisperProcessor.from_pretrained(os.environ["MEFT_WHISPER"]).save_pretrained(folder / "lst")
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file))[:12]
    waves = [soundfile.read(manifest.parent / row["path"], dtype="float32")[0] for row in rows]
    gap = np.zeros(RATE // 2, np.float32)
    soundfile.write(
        folder / "joined.wav", np.concatenate([part for wave in waves for part in (wave, gap)]), RATE
    )
    with open(folder / "said.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "speaker"])
        writer.writerows([manifest.parent / row["path"], row["text"], row["speaker"]] for row in rows[:8])
    return folder


def test_evaluate_finds_the_rates_of_the_backbone(work):
    command = ["evaluate", work / "lst", "--data", work / "said.csv", "--output_dir", work / "scores"]
    assert main([*map(str, command)]) == 0
    values = json.loads((work / "scores/eval_results.json").read_text())
    assert 0.05 < values["normalized_wer"]["rate"] < 0.4 and values["cer"]["rate"] < 0.15
    assert values["wer"] == values["zero_shot"]["wer"]


def test_subtitles_of_a_long_recording(work):
    assert main(["predict", *map(str, (work / "lst", work / "joined.wav")), "--output", f"{work}/x.srt"]) == 0
    written = (work / "x.srt").read_text()
    clock = r"(\d\d):(\d\d):(\d\d),(\d{3})"
    times = [
        [*map(int, t)] for pair in re.findall(f"{clock} --> {clock}", written) for t in (pair[:4], pair[4:])
    ]
    seconds = [h * 3600 + m * 60 + s + ms / 1000 for h, m, s, ms in times]
    length = soundfile.info(work / "joined.wav").duration
    assert length > 30 and seconds == sorted(seconds) and length - 3 < seconds[-1] <= length
    assert len(seconds) >= 20


@pytest.mark.parametrize(
    "options",
    [{"return_timestamps": True}, {"return_timestamps": "word"}, {"chunk_length_s": 20}],
)
def test_a_pipeline_hears_what_whisper_does(options, work):
    wave = soundfile.read(work / "joined.wav", dtype="float32")[0]
    how = {"generate_kwargs": {"language": "nl", "num_beams": 1}, **options}
    ours, theirs = (
        pipeline("automatic-speech-recognition", model=str(model), device="cpu")(wave.copy(), **how)
        for model in (work / "lst", os.environ["MEFT_WHISPER"])
    )
    assert len(ours["text"]) > 200 and ours == theirs
