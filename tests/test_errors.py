"""Packages that only some of the work needs."""

import subprocess
import sys

import pytest
from whisper_meft.errors import LazyPackage, UserError

WITHOUT = """
import sys
for name in ("soundfile", "soxr", "datasets", "torchao", "peft", "matplotlib", "espeakng_loader"):
    sys.modules[name] = None  # an import of it fails, as where it is not installed
import meft_kernels
from whisper_meft import LSTConfig, MeftTrainer, UserError, get_meft_model
from whisper_meft.audio import read_audio
from whisper_meft.commands import cli
from whisper_meft.data import load_examples
for call in (lambda: read_audio(sys.argv[1]), lambda: load_examples("some/dataset")):
    try:
        call()
    except UserError as error:
        print(error)
"""


def test_only_what_needs_a_package_asks_for_it(tmp_path):
    file = tmp_path / "clip.wav"
    file.write_bytes(b"RIFF")
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "reading audio needs the soundfile package: pip install soundfile",
        "a Hugging Face data set needs the datasets package: pip install datasets",
    ]


def test_a_package_is_what_it_is_when_imported():
    assert LazyPackage("json", "this").loads("[1]") == [1]
    assert not hasattr(LazyPackage("json", "this"), "nothing_of_that_name")
    with pytest.raises(UserError, match="^this needs the no_such_one package: pip install no_such_one$"):
        LazyPackage("no_such_one", "this").load()
