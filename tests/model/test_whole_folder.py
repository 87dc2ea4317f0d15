"""Converting into a folder that holds something: all of the new model or all of the old one, and nothing else
of the user's is touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import WhisperFeatureExtractor
from whisper_meft import LSTConfig, MeftModel, UserError, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.model import whole_folder as module
from whisper_meft.model.published import convert, to_published
from whisper_meft.model.saving import extractor_to_save
from whisper_meft.model.whole_folder import whole_folder

from tests.modelling_fixtures import randomise, tiny_whisper


def labels(names):
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


@pytest.fixture
def published(tmp_path):
    """Two published checkpoints of other labels, old and new."""
    for seed, (name, classes) in enumerate({"old": "abc", "new": "xyz"}.items()):
        model = get_meft_model(tiny_whisper(seed, **labels(classes)), LSTConfig())
        randomise(model, seed).save_pretrained(tmp_path / "ours", save_backbone=True)
        to_published(tmp_path / "ours", tmp_path / name)
        shutil.rmtree(tmp_path / "ours")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_model_takes_the_old_ones_place(exchange, published, monkeypatch, capsys):
    if not exchange:  # as where the system cannot swap folders
        monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: None)
    dst = published / "dst"
    convert(published / "old", dst)
    (dst / "notes").mkdir()
    (dst / "notes/a.txt").write_text("mine")
    (dst / "link").symlink_to("notes")
    (dst / "model-00001-of-00002.safetensors").write_text("a shard of another model")
    assert main(["convert", str(published / "new"), str(dst)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["convert", str(published / "new"), str(dst), "--overwrite", "True"]) == 0
    convert(published / "new", published / "fresh")
    expected = contents(published / "fresh")
    assert "Labels: x, y, z." in expected["README.md"].decode()
    found = contents(dst)
    assert found.pop("notes/a.txt") == b"mine" and (dst / "link").is_symlink()
    assert found == expected
    assert (dst.stat().st_mode & 0o777) == (published / "old").stat().st_mode & 0o777
    assert not [each for each in os.listdir(published) if each.startswith(".")]


def test_a_failure_leaves_the_old_model(published, monkeypatch):
    dst = published / "dst"
    convert(published / "old", dst)
    before = contents(dst)
    for step in ("_write_feature_extractor", "get_meft_model"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="full"):
            patch.setattr(
                f"whisper_meft.model.published.{step}", lambda *_: (_ for _ in ()).throw(UserError("full"))
            )
            convert(published / "new", dst)
        assert contents(dst) == before
    assert not [each for each in os.listdir(published) if each.startswith(".")]


KILLED = """
import os, signal, sys
from whisper_meft.model.published import convert
count = int(sys.argv[3])
def audit(event, args):
    global count
    if event in ("os.rename", "ctypes.dlopen"):
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
import ctypes, torch, safetensors.torch, transformers, peft
sys.addaudithook(audit)
convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("renames", [0, 3, 6])
def test_killed_at_any_rename_a_folder_is_never_of_two_models(renames, published):
    dst = published / "dst"
    convert(published / "old", dst)
    convert(published / "new", published / "fresh")
    possible = [contents(dst), contents(published / "fresh")]
    command = [sys.executable, "-c", KILLED, published / "new", dst, str(renames)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [root, root / "python"]))}
    result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    assert contents(dst) in possible


def test_what_is_read_is_never_overwritten(published):
    convert(published / "old", published / "x")
    inside = published / "x/backbone"
    cases = [
        (convert, inside, published / "x", {}, "the source is .*backbone, writing .* would overwrite it"),
        (to_published, published / "x", inside, {}, "the source is .*x, writing .*backbone would overwrite"),
    ]
    shutil.copytree(inside, published / "base")
    named = {"backbone": published / "base"}
    cases.append((convert, published / "old", published / "base", named, "the backbone"))
    refers = published / "refers"
    convert(published / "old", refers, **named)
    cases.append((to_published, refers, published / "base", {}, "the backbone of the model is .*base"))
    before = contents(published)
    for function, src, dst, options, message in cases:
        with pytest.raises(UserError, match=message):
            function(src, dst, **options)
    assert contents(published) == before
    to_published(published / "x", published / "x/published")  # a new folder takes nothing away
    MeftModel.from_pretrained(published / "x")


def test_the_published_form_has_the_whole_window(tmp_path):
    """Our extractor's settings say what padding is; the published code counts it as sound."""
    base = tiny_whisper(max_source_positions=100)
    get_meft_model(base, LSTConfig(max_frames=50)).save_pretrained(tmp_path / "ours", save_backbone=True)
    extractor = WhisperFeatureExtractor(feature_size=12, chunk_length=2)
    extractor_to_save(extractor, 50).save_pretrained(tmp_path / "ours")
    to_published(tmp_path / "ours", tmp_path / "published")
    values = json.loads((tmp_path / "published/preprocessor_config.json").read_text())
    assert (values["chunk_length"], values["n_samples"], values["return_attention_mask"]) == (2, 32000, False)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/out"), whole_folder(tmp_path / "file/out"):
        pass
