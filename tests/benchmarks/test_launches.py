"""``benchmarks.launches``: what a step launches, pinned at toy widths, and the command around it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import launches

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

# Kernels of encoder, side network forward and backward, and Triton's in all: 5 clips, 2 at a time, 3 layers.
EXPECTED = {
    ("lst", "exact"): (144, 70, 150, 12),
    ("lst", "fp8"): (138, 81, 184, 21),
    ("unipt", "exact"): (144, 83, 173, 20),
    ("unipt", "fp8"): (138, 94, 207, 29),
    ("unipt", "pooled:8"): (144, 84, 174, 22),
    ("unipt", "linear"): (144, 135, 304, 12),
    ("sherl", "exact"): (113, 25, 80, 10),
    ("sherl", "fp8"): (113, 30, 109, 14),
}

SCRIPT = """
import json
import torch
from transformers import WhisperConfig
from benchmarks.launches import PHASES, count_launches
from whisper_meft.encoder import chunked

chunked._DEFAULT_INNER_ELEMENTS = 2 * 40 * 256
sizes = {"d_model": 192, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 256}
config = WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=40, decoder_layers=1)
options = {saved: {"saved_activations": saved} for saved in ("exact", "fp8")}
attention = {form: {"attention": form} for form in ("pooled:8", "linear")}
for method in ("lst", "unipt", "sherl"):
    for saved, how in {**options, **(attention if method == "unipt" else {})}.items():
        count = count_launches(config, method, 5, repeats=1, **how)
        assert all(count.host[phase] > 0 for phase in PHASES)
        assert count.kernels("optimizer") == 6 and count.triton["encoder"].total() == 0
        found = [count.kernels("encoder"), count.kernels("side network"), count.kernels("backward")]
        print(json.dumps([method, saved, *found, count.triton_launches]))
"""


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_numbers_are_pinned():
    """More than here is more than a step needs: whoever adds a launch says so here."""
    found = {}
    for line in run("-c", SCRIPT).splitlines():
        method, saved, *numbers = json.loads(line)
        found[method, saved] = tuple(numbers)
    assert found == EXPECTED


def test_command_prints_and_records(tmp_path):
    arguments = ["--model", "tiny", "--batch", "2", "--methods", "lst,head", "--output", str(tmp_path)]
    text = run("-m", "benchmarks.launches", *arguments)
    (path,) = tmp_path.glob("launches-*.json")
    lst, head = json.loads(path.read_text())["figures"]
    assert list(lst["phases"]) == list(launches.PHASES)
    assert lst["triton"] > 0 and head["triton"] == 0
    final_norm = 1  # which the head reads the encoder through
    assert head["phases"]["encoder"]["kernels"] == lst["phases"]["encoder"]["kernels"] + final_norm
    assert f"{lst['phases']['backward']['kernels']}, " in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "lst,full"], "--methods must be some of lst, unipt, sherl, head, got 'full'"),
        (["--batch", "0"], "--batch must be a positive integer, got 0"),
        (["--model", "huge"], "model must be one of"),
    ],
)
def test_errors_take_one_line(arguments, message, capsys):
    assert launches.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
