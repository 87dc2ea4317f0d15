"""`whisper-meft export --format onnx`, and the example that runs what it writes without PyTorch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from modelling_fixtures import randomise
from recogniser_fixtures import make_recogniser
from training_fixtures import RATE, make_audio_folder, make_backbone
from transformers import WhisperFeatureExtractor
from whisper_meft import LSTConfig, MeftConfig, UserError, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.data import load_examples
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.exporting import earlier, onnx_folder
from whisper_meft.exporting.onnx_folder import Difference, export_onnx, run_onnx
from whisper_meft.model.backbone import load_backbone, set_labels

onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")

EXAMPLE = (
    next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file()) / "examples/onnx"
)
LABELS = ["high", "low", "middle"]


def make(backbone, method, **options):
    base = load_backbone(backbone)
    set_labels(base, LABELS)
    config = MeftConfig.from_dict({"method": method, **options})
    model = randomise(get_meft_model(base, config), std=0.1)
    model.config.calibration_temperature = 1.5
    return model.eval()


def classifier_of(folder, model):
    extractor = WhisperFeatureExtractor.from_pretrained(folder / "backbone")
    return Classifier(model, extractor, "cpu", progress=False, window="first")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """model/: LST; exported/: its graph of waveforms; clips/<label>/: sounds of several lengths; said: what
    was printed."""
    folder = tmp_path_factory.mktemp("export")
    make_backbone(folder / "backbone")
    model = make(folder / "backbone", "lst", reduction_factor=4, adapter_dim=8, max_frames="longest")
    model.config.rejection_threshold = 0.4
    model.save_pretrained(folder / "model")
    WhisperFeatureExtractor.from_pretrained(folder / "backbone").save_pretrained(folder / "model")
    make_audio_folder(folder / "clips", per_class=2)
    noise = 0.1 * np.random.default_rng(0).standard_normal((RATE + 4000, 2))  # longer than the window, stereo
    soundfile.write(folder / "clips" / "high" / "long.wav", noise, RATE)
    exported = ["export", str(folder / "model"), str(folder / "exported")]
    assert main([*exported, "--compare_on", str(folder / "clips")]) == 0
    return folder


def predictions(work, tmp_path):
    """What `whisper-meft predict` says of the clips, by file; of the long one's beginning."""
    command = ["predict", str(work / "model"), str(work / "clips"), "--window", "first"]
    assert main([*command, "--output", str(tmp_path / "p.json")]) == 0
    return {row["file"]: row["probabilities"] for row in json.loads((tmp_path / "p.json").read_text())}


def test_what_is_written(work):
    assert sorted(path.name for path in (work / "exported").iterdir()) == ["model.json", "model.onnx"]
    about = json.loads((work / "exported" / "model.json").read_text())
    differences = about.pop("largest_difference")
    assert list(differences) == ["float32"] and 0 <= differences["float32"] < 1e-5
    assert about == {
        "method": "lst",
        "labels": LABELS,
        "input": "waveform",
        "sampling_rate": RATE,
        "max_samples": RATE,
        "mel_bins": 80,
        "max_frames": "longest",
        "calibration_temperature": 1.5,
        "rejection_threshold": 0.4,
        "quantization": None,
    }
    graph = onnx.load(work / "exported" / "model.onnx")
    held = {each.key: each.value for each in graph.metadata_props}
    assert held["method"] == "lst" and json.loads(held["labels"]) == LABELS
    assert {each.domain for each in graph.opset_import} == {""}  # operators that every runtime has
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    assert str(work).encode() not in (work / "exported" / "model.onnx").read_bytes()
    onnx.checker.check_model(graph)


def test_probabilities_are_those_of_predict(work, tmp_path):
    expected = predictions(work, tmp_path)
    session = onnxruntime.InferenceSession(work / "exported" / "model.onnx")
    assert [each.name for each in session.get_outputs()] == ["probabilities", "logits"]
    waves = [soundfile.read(file, dtype="float32", always_2d=True)[0].mean(axis=1) for file in expected]
    samples = np.array([len(wave) for wave in waves])
    batch = np.zeros((len(waves), samples.max()), np.float32)
    for row, wave in zip(batch, waves):
        row[: len(wave)] = wave
    together, logits = session.run(None, {"waveform": batch, "samples": samples})
    odds = np.exp(logits)
    np.testing.assert_allclose(odds / odds.sum(-1, keepdims=True), together, atol=1e-6)
    for index, (wave, row) in enumerate(zip(waves, expected.values())):
        wanted = [row[label] for label in LABELS]
        alone = session.run(None, {"waveform": wave[None], "samples": samples[index : index + 1]})[0][0]
        np.testing.assert_allclose(together[index], wanted, atol=1e-5)
        np.testing.assert_allclose(alone, wanted, atol=1e-5)
    assert together.std(0).max() > 1e-3
    nothing = {"waveform": np.zeros((1, 0), np.float32), "samples": np.array([0])}
    assert all(np.isnan(found).all() for found in session.run(None, nothing))


def test_the_example_needs_no_torch(work, tmp_path):
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'whisper_meft'])); "
        f"sys.argv[0] = {str(EXAMPLE / 'classify.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    expected = predictions(work, tmp_path)
    command = [sys.executable, "-c", code, str(work / "exported"), *expected]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert said.returncode == 0, said.stderr
    assert "long.wav: heard are the first 1 seconds" in said.stderr and said.stderr.count("\n") == 1
    rows = [line.split("  ") for line in said.stdout.splitlines()]
    assert [row[0] for row in rows] == list(expected)
    for file, *named in rows:
        found = {label: float(value) for label, value in (each.split() for each in named)}
        assert found == pytest.approx(expected[file], abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    soundfile.write(tmp_path / "other.wav", np.zeros(800), 8000)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound")
    refusals = {
        "other.wav": "has 8000 samples a second, resample it to 16000\n",
        "none.wav": "holds no samples\n",
        "nan.wav": "holds samples that are NaN or infinite\n",
        "text.wav": "cannot be read: ",
    }
    for file, refusal in refusals.items():
        said = subprocess.run([*command[:4], file], capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert (said.returncode, said.stdout, said.stderr.count("\n")) == (1, "", 1)
        assert said.stderr.startswith(f"{file} {refusal}")


def test_int8_of_features_in_files_of_their_own(work, tmp_path):
    model = make(work / "backbone", "head")  # of the whole window
    classifier, clips = classifier_of(work, model), load_examples(work / "clips")
    plain, rounded = export_onnx(  # which hears the beginning of clips, whatever the classifier does
        Classifier(model, classifier.feature_extractor, "cpu", progress=False),
        tmp_path / "out",
        clips,
        features=True,
        quantize=True,
        external_data=True,
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["model.json", "model.onnx", "model.onnx.data"]
    assert plain.clips == rounded.clips == len(clips) and plain.largest < 1e-5 < rounded.largest < 0.05
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert about["quantization"] == "int8" and about["input"] == "input_features"
    assert about["largest_difference"] == {"float32": plain.largest, "int8": rounded.largest}
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    assert sum(node.op_type == "MatMulInteger" for node in graph.graph.node) == 6  # of the second layer
    found = run_onnx(tmp_path / "out" / "model.onnx", classifier, clips, features=True)
    assert np.abs(found - classifier.probabilities(clips)).max() == pytest.approx(rounded.largest)


def test_int8_of_nothing_is_refused(work, tmp_path):
    model = make(work / "backbone", "lst", layers=[1], reduction_factor=4, adapter_dim=8)
    with pytest.raises(UserError, match="quantize: the graph holds no layer of the encoder but the first"):
        export_onnx(classifier_of(work, model), tmp_path / "out", quantize=True)
    assert not (tmp_path / "out").exists()


def stubbed(monkeypatch, found):
    """Exporting without a graph: the file is empty, and onnxruntime's answer is ``found``."""
    program = SimpleNamespace(model=(), save=lambda path, external_data: path.write_bytes(b"new"))
    monkeypatch.setattr(onnx_folder, "_program", lambda classifier, features: program)
    monkeypatch.setattr(onnx_folder, "_encoder_linears", lambda model: [])
    monkeypatch.setattr(onnx_folder, "_describe", lambda model, description: None)
    monkeypatch.setattr(onnx_folder, "run_onnx", lambda path, classifier, *_: found(classifier))


@pytest.mark.parametrize("wrong", [1.1e-4, np.nan])
def test_a_graph_that_differs_is_not_written(wrong, work, tmp_path, monkeypatch):
    stubbed(monkeypatch, lambda c: c.probabilities(onnx_folder.made_up(c)) + np.float32(wrong))
    with pytest.raises(UserError, match=r"differ from PyTorch's by up to .*, more than 0.0001: nothing was"):
        export_onnx(classifier_of(work, make(work / "backbone", "head")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_goes_and_the_rest_stays(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.onnx", "model.onnx.data", "model.json", "model.bin", "notes.txt"):
        (out / name).write_text("old")
    stubbed(monkeypatch, lambda c: c.probabilities(onnx_folder.made_up(c)))
    command = ["export", str(work / "model"), str(out)]
    assert main(command) == 1
    assert capsys.readouterr().err == (
        f"whisper-meft: error: OUT: {out} is not empty; name another folder, or add --overwrite\n"
    )
    assert main([*command, "--overwrite"]) == 0
    held = {path.name: path.read_bytes() for path in out.iterdir()}
    assert json.loads(held.pop("model.json"))["method"] == "lst"
    # A model.bin alone is anybody's.
    assert held == {"model.onnx": b"new", "model.bin": b"old", "notes.txt": b"old"}
    assert "on 3 made-up sounds" in capsys.readouterr().out


@pytest.mark.parametrize("vocabulary", ["vocabulary.json", "vocabulary.txt"])
def test_a_model_for_the_other_runtime_stays(vocabulary, work, tmp_path, capsys):
    """Whoever converted it: nothing in its folder says."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.bin", vocabulary, "config.json"):
        (out / name).write_text("old")
    assert main(["export", str(work / "model"), str(out), "--overwrite"]) == 1
    said = f"OUT: {out} holds a model for CTranslate2 (model.bin); name another folder"
    assert capsys.readouterr().err == f"whisper-meft: error: {said}\n"
    assert {path.read_text() for path in out.iterdir()} == {"old"} and len(list(out.iterdir())) == 3


@pytest.mark.parametrize("name", ["model.json", "model.onnx"])
def test_files_of_half_an_export_stay(name, tmp_path):
    (tmp_path / name).write_text("old")
    assert not earlier.of_earlier_export(tmp_path)(name)


def test_one_difference_tells_labels_too(work, monkeypatch):
    expected = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], np.float32)
    moved = expected + np.array([[0, 0, 0], [0, 0.01, -0.01]], np.float32)
    monkeypatch.setattr(onnx_folder, "run_onnx", lambda *_: moved)
    found = onnx_folder._difference(expected, None, None, None, False)
    assert found == Difference(2, pytest.approx(0.01, rel=1e-4), 1)


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--format", "ctranslate2"], 1, "--format ctranslate2 is for models that transcribe, and "),
        (["--format", "torchscript"], 2, "invalid choice: 'torchscript'"),
        (["--quantize", "int4"], 2, "invalid choice: 'int4'"),
        (["--tokenizer_name", "x"], 2, "--tokenizer_name is for --format ctranslate2"),
        (["--format", "ctranslate2", "--attention", "linear"], 2, "--attention is for --format onnx"),
        (["--compare_on", "nowhere.wav"], 1, "nowhere.wav"),
        (["--attention", "linear"], 1, "attention"),
    ],
)
def test_what_cannot_be_asked_for(more, status, says, work, tmp_path, capsys):
    assert main(["export", str(work / "model"), str(tmp_path / "out"), *more]) == status
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folders_that_are_not_written_over(work, tmp_path, capsys):
    for out, says in (
        (work / "model", f"OUT: {work / 'model'} is the model itself"),
        (work / "backbone", f"OUT: {work / 'backbone'} holds a model (model.safetensors), which would go"),
    ):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert main(["export", str(work / "model"), str(out), "--overwrite"]) == 1
        assert says in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").write_text("")
    assert main(["export", str(work / "model"), str(tmp_path / "file" / "out")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_a_model_that_transcribes(tmp_path, capsys):
    make_recogniser(tmp_path / "whisper")
    assert main(["export", str(tmp_path / "whisper"), str(tmp_path / "out")]) == 1
    assert "is a plain Whisper, which ct2-transformers-converter and optimum" in capsys.readouterr().err
    shutil.copytree(tmp_path / "whisper", tmp_path / "model")
    config = {"model_type": "whisper_meft", "task": "transcription"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "--format onnx is for models that classify, and" in capsys.readouterr().err


def test_weights_that_are_no_float32(work, tmp_path):
    model = get_meft_model(load_backbone(work / "backbone"), LSTConfig(backbone_dtype="bfloat16"))
    with pytest.raises(UserError, match=r"export needs weights in float32, got torch\.bfloat16: load"):
        export_onnx(classifier_of(work, model), tmp_path / "out")


def test_a_package_that_is_not_there(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(work / "model"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error == "whisper-meft: error: export needs the onnxscript package: pip install onnxscript\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("unipt", {"reduction_factor": 4}),
        ("unipt", {"reduction_factor": 4, "attention": "pooled:3"}),
        ("unipt", {"reduction_factor": 4, "attention": "linear", "max_frames": "fidelity"}),
        ("sherl", {"reduction_factor": 4, "pooling": "statistics", "max_frames": 30}),
        ("weighted_sum", {}),
        ("lst", {"reduction_factor": 4, "layers": [1], "max_frames": "fidelity"}),
        ("adapter", {"adapter_dim": 6, "max_frames": "fidelity"}),
        ("s2_lora", {"r": 4, "lora_alpha": 8, "max_frames": 30}),
    ],
)
def test_methods(method, options, work, tmp_path):
    """Each way that a method takes through the graph; that all give what they should: test_graph.py."""
    make_backbone(tmp_path / "backbone", encoder_layers=1 + (method in ("lst", "sherl")))
    model = make(tmp_path / "backbone", method, **{"max_frames": "longest", **options})
    torch.nn.init.normal_(model.classifier.weight)
    classifier, clips = classifier_of(work, model), load_examples(work / "clips")
    features = method in ("weighted_sum", "adapter")
    plain, _ = export_onnx(classifier, tmp_path / "out", clips, features=features)
    assert plain.clips == 7 and plain.largest < 2e-5
    assert classifier.probabilities(clips).std(0).max() > 1e-3
    shapes = [tuple(each.dims) for each in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer]
    assert shapes.count((32, 64)) == 1 + (method == "sherl")  # fc1 of the layers that are read, and no more
