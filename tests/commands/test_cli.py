"""The command line: options, JSON files, error lines, exit statuses, and what evaluate and predict write."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from training_fixtures import RATE, TONES, make_audio_folder, make_backbone, tone, train_command
from whisper_meft.commands import train
from whisper_meft.commands.cli import COMMANDS, main
from whisper_meft.errors import UserError, one_line

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, train/, test/ and model/: a trained model that has learnt the tones."""
    folder = tmp_path_factory.mktemp("cli")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=10)
    make_audio_folder(folder / "test", per_class=4, seed=1)
    prepare_bad_inputs(folder)
    assert main(train_command(folder / "backbone", folder / "train", folder / "model")) == 0
    return folder


def run_main(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- help -------------------------------------------------------------------------------------------------


def test_top_level_help_needs_no_heavy_import():
    code = (
        "import sys\nfrom whisper_meft.commands.cli import main\nstatus = main(['--help'])\n"
        "assert status == 0 and 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_its_options(command, capsys):
    status, out, err = run_main(capsys, command, "--help")
    assert status == 0 and err == ""
    assert out.startswith(f"usage: whisper-meft {command} ")
    assert all(len(line) <= 110 for line in out.splitlines())


def test_help_of_train_is_grouped_and_help_all_holds_every_training_argument(capsys):
    _, short, _ = run_main(capsys, "train", "--help")
    for group in ("backbone:", "method:", "data:", "training:"):
        assert f"\n{group}\n" in short
    _, long, _ = run_main(capsys, "train", "--help_all")
    assert "  --adam_beta1 " not in short and "  --adam_beta1 " in long
    assert "--adam_beta1" in short  # named, not described


def test_no_command_prints_the_help_and_fails(capsys):
    status, out, _ = run_main(capsys)
    assert status == 2 and "commands:" in out


# --- mistakes ---------------------------------------------------------------------------------------------

BACKBONE, TRAIN, MODEL, TEST = "{work}/backbone", "{work}/train", "{work}/model", "{work}/test"
FINE = ["train", "--model_name_or_path", BACKBONE, "--train_data", TRAIN, "--output_dir", "{work}/new"]


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["trian"], 2, "unknown command 'trian', accepted are train, evaluate"),
        (["--verbose"], 2, "unknown option '--verbose'"),
        (["train"], 2, "arguments are required: --model_name_or_path"),
        (
            [*FINE, "--reduction_facter", "4"],
            2,
            "unknown option --reduction_facter, did you mean --reduction_factor?",
        ),
        ([*FINE, "--reduction", "4"], 2, "unknown option --reduction,"),
        ([*FINE, "surplus"], 2, "unexpected argument 'surplus'"),
        ([*FINE, "--method", "ia3"], 2, "--method: invalid choice: 'ia3' (choose from"),
        ([*FINE, "--learning_rate", "fast"], 2, "--learning_rate: invalid float value: 'fast'"),
        ([*FINE, "--learning_rate", "-1"], 2, "--learning_rate must be above 0 and finite, got -1.0"),
        ([*FINE, "--eval_strategy", "daily"], 2, "--eval_strategy: invalid choice: 'daily'"),
        ([*FINE, "--lr_scheduler_type", "liner"], 2, "--lr_scheduler_type: invalid choice: 'liner'"),
        (
            [*FINE, "--per_device_train_batch_size", "0"],
            2,
            "--per_device_train_batch_size must be at least 1",
        ),
        ([*FINE, "--num_train_epochs", "0"], 2, "--num_train_epochs must be above 0"),
        ([*FINE, "--max_train_samples", "0"], 2, "--max_train_samples must be at least 1, got 0"),
        ([*FINE, "--dataset_name", "some/name"], 2, "got --train_data and --dataset_name"),
        ([*FINE, "--fp16", "--bf16"], 2, "At most one of fp16 and bf16"),
        ([*FINE, "--early_stopping_patience", "2", "--eval_strategy", "no"], 2, "needs evaluation"),
        (FINE[:-2], 2, "--output_dir is needed"),
        ([*FINE, "--data_format", "zip"], 2, "--data_format: invalid choice: 'zip'"),
        ([*FINE, "--reduction_factor", "0"], 1, "reduction_factor must be a positive integer, got 0"),
        ([*FINE, "--reduction_factor", "64"], 1, "reduction_factor must be at most 32"),
        ([*FINE, "--max_frames", "51"], 1, "max_frames must be "),
        ([*FINE, "--max_frames", "short"], 1, "max_frames must be 'fidelity', 'longest'"),
        ([*FINE, "--layers", "3"], 1, "layers must lie in 1..2"),
        ([*FINE, "--method", "sherl", "--layers", "1"], 1, "'layers' is not an option of sherl"),
        ([*FINE, "--method", "unipt", "--adapter_dim", "8"], 1, "'adapter_dim' is not an option of unipt"),
        ([*FINE, "--validation_fraction", "1.5"], 2, "--validation_fraction must lie between 0 and 1"),
        ([*FINE, "--eval_data", "{work}/nowhere"], 1, "{work}/nowhere"),
        ([*FINE[:4], "{work}/nowhere", *FINE[5:]], 1, "{work}/nowhere"),
        (
            [*FINE[:2], "{work}/nowhere", *FINE[3:]],
            1,
            "model_name_or_path: there is no folder {work}/nowhere",
        ),
        ([*FINE[:2], TRAIN, *FINE[3:]], 1, "train holds no config.json"),
        ([*FINE[:2], MODEL, *FINE[3:]], 1, "is a side network trained by this library"),
        (
            [*FINE[:2], "{work}/bert", *FINE[3:]],
            1,
            "bert is a bert checkpoint, a Whisper checkpoint is needed",
        ),
        ([*FINE[:2], "{work}/cut", *FINE[3:]], 1, "cannot load {work}/cut"),
        ([*FINE[:2], "{work}/mels", *FINE[3:]], 1, "80 mel bins"),
        ([*FINE[:-1], MODEL], 1, "output_dir: {work}/model is not empty"),
        ([*FINE[:-1], "{work}/file"], 1, "output_dir: {work}/file is a file"),
        ([*FINE, "--resume_from_checkpoint", "{work}/none"], 1, "resume_from_checkpoint: there is no folder"),
        (["evaluate", MODEL], 2, "--data is needed"),
        (["evaluate", "{work}/nowhere", "--data", TEST], 1, "nowhere"),
        (["evaluate", BACKBONE, "--data", TEST], 1, "backbone holds a whisper model"),
        (["evaluate", MODEL, "--data", "{work}/other"], 1, "labels that the training data has not"),
        (["evaluate", MODEL, "--data", TEST, "--device", "abacus"], 1, "device: cannot use 'abacus'"),
        (["predict", MODEL], 2, "required: AUDIO_OR_DIR"),
        (["predict", MODEL, "{work}/empty"], 1, "empty holds no audio files"),
        (["predict", MODEL, "{work}/none.wav"], 1, "none.wav does not exist"),
        (
            ["predict", MODEL, TEST, "--output", "out.txt"],
            2,
            "--output must end in .csv or .json, got out.txt",
        ),
        (["predict", MODEL, TEST, "--output", "{work}/file/out.csv"], 1, "cannot write {work}/file/out.csv"),
        (["predict", MODEL, TEST, "--batch_size", "0"], 2, "--batch_size must be at least 1"),
        (["convert", MODEL, "{work}/new"], 1, "is a saved model of this library already"),
        (["convert", "{work}/nowhere", "{work}/new"], 1, "there is no folder {work}/nowhere"),
        (["convert", BACKBONE, TEST], 1, "test is not empty"),
        (["convert", BACKBONE, "{work}/new"], 1, "backbone should hold the tensors of one side network"),
        (["convert", MODEL, "{work}/new", "--to_published", "--method", "lst"], 2, "cannot be given with"),
        (["demo", "--seed", "zero"], 2, "--seed: invalid int value: 'zero'"),
        (["demo", "--output_dir", "{work}/file"], 1, "{work}/file"),
        (["train", "{work}/none.json"], 1, "cannot read {work}/none.json"),
        (["train", "{work}/broken.json"], 1, "broken.json is not valid JSON"),
        (["train", "{work}/list.json"], 1, "list.json must hold one JSON object"),
        (["train", "{work}/misspelt.json"], 2, "unknown option 'metod', did you mean 'method'?"),
    ],
)
def test_mistakes_give_one_line_and_a_status(arguments, status, message, work, capsys):
    got, out, err = run_main(capsys, *(argument.format(work=work) for argument in arguments))
    error = [line for line in err.splitlines() if line.startswith("whisper-meft: error: ")]
    assert len(error) == 1 and err.endswith(f"{error[0]}\n") and "Traceback" not in err, err
    assert message.format(work=work) in error[0]
    assert got == status
    assert not (work / "new").exists()


def prepare_bad_inputs(work: Path) -> None:
    """Everything that the table of mistakes refers to."""
    (work / "empty").mkdir()
    (work / "bert").mkdir()
    (work / "bert" / "config.json").write_text('{"model_type": "bert"}')
    make_backbone(work / "cut")
    weights = work / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    make_backbone(work / "mels", num_mel_bins=128)
    (work / "mels" / "preprocessor_config.json").write_bytes(
        (work / "backbone" / "preprocessor_config.json").read_bytes()
    )
    make_audio_folder(work / "other", per_class=2)
    (work / "other" / "low").rename(work / "other" / "unheard")
    (work / "broken.json").write_text("{")
    (work / "list.json").write_text("[]")
    (work / "misspelt.json").write_text('{"metod": "lst"}')
    (work / "file").write_text("")


def test_debug_variable_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("WHISPER_MEFT_DEBUG", "1")
    with pytest.raises(UserError, match="--output_dir is needed"):
        main(["train", "--model_name_or_path", "x", "--train_data", "y"])


def test_an_error_from_a_data_loading_process_is_reduced_to_its_last_line():
    message = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nwhisper_meft.errors.UserError: a.wav is empty'
    )
    assert one_line(UserError(message)) == "a.wav is empty"
    assert one_line(KeyError("x")) == "KeyError: 'x'"


def test_a_real_process_gives_the_exit_statuses():
    command = [sys.executable, "-m", "whisper_meft"]
    result = subprocess.run([*command, "nonsense"], env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("whisper-meft: error: unknown command 'nonsense'")
    assert result.stderr.count("\n") == 1
    result = subprocess.run([*command, "--version"], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("whisper-meft ")


def test_interrupting_a_training_run_ends_it_with_one_line_and_status_130(work, tmp_path):
    arguments = train_command(
        work / "backbone",
        work / "train",
        tmp_path / "out",
        max_steps=100_000,
        save_strategy="steps",
        save_steps=10,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "whisper_meft", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 120
    while not (tmp_path / "out" / "checkpoint-20").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "whisper-meft: interrupted"
    assert "Traceback" not in err
    assert "--resume_from_checkpoint True" in out


# --- JSON files -------------------------------------------------------------------------------------------


def test_options_from_a_json_file_equal_those_from_the_command_line(tmp_path):
    options = {
        "model_name_or_path": "some/model",
        "train_data": "data",
        "output_dir": str(tmp_path),
        "method": "lst",
        "layers": [1, 2],
        "adapter_dim": 32,
        "learning_rate": 1e-4,
        "strict": True,
        "load_best_model_at_end": False,
        "labels": ["a", "b c"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "token": None,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(options))
    from_file = train.make_parser().parse([str(path)])
    line = (
        f"--model_name_or_path some/model --train_data data --output_dir {tmp_path} --method lst "
        "--layers 1 2 --adapter_dim 32 --learning_rate 0.0001 --strict "
        "--load_best_model_at_end False --labels a"
    ).split()
    from_line = train.make_parser().parse([*line, "b c", "--lr_scheduler_kwargs", '{"num_cycles": 2}'])
    for one, other in zip(from_file, from_line, strict=True):
        one, other = vars(one), vars(other)
        different = {name for name in one if str(one[name]) != str(other[name])}
        assert different <= {"accelerator_config", "logging_dir"}
    assert from_file[1].layers == [1, 2] and from_file[3].lr_scheduler_kwargs == {"num_cycles": 2}


def test_the_command_line_wins_over_the_json_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "train_data": "d", "output_dir": "o", "seed": 1}))
    arguments = train.make_parser().parse([str(path), "--seed", "2"])
    assert arguments[3].seed == 2 and arguments[3].output_dir == "o"


def test_a_json_file_can_hold_positional_arguments(work, tmp_path, capsys):
    path = tmp_path / "config.json"
    audio = sorted(str(file) for file in (work / "test").rglob("*.wav"))[:2]
    output = tmp_path / "out.json"
    path.write_text(json.dumps({"audio": audio, "model_dir": str(work / "model"), "output": str(output)}))
    status, _, err = run_main(capsys, "predict", path)
    assert status == 0, err
    assert [row["file"] for row in json.loads(output.read_text())] == audio


# --- evaluate ---------------------------------------------------------------------------------------------


def test_evaluate_writes_scores_that_agree_with_the_predictions(work, tmp_path, capsys):
    status, out, err = run_main(
        capsys, "evaluate", work / "model", "--data", work / "test", "--output_dir", tmp_path / "scores"
    )
    assert status == 0, err
    results = json.loads((tmp_path / "scores" / "eval_results.json").read_text())
    status, _, _ = run_main(
        capsys, "predict", work / "model", work / "test", "--output", tmp_path / "out.json"
    )
    rows = json.loads((tmp_path / "out.json").read_text())
    reference = [Path(row["file"]).parent.name for row in rows]
    right = [row["label"] == label for row, label in zip(rows, reference)]
    assert results["count"] == len(rows) == 12
    assert results["accuracy"] == pytest.approx(np.mean(right))
    assert results["accuracy"] > 0.8  # the tones are learnt
    for label in TONES:
        mine = [good for good, name in zip(right, reference) if name == label]
        assert results["per_class_accuracy"][label] == pytest.approx(np.mean(mine))
    assert results["mean_class_accuracy"] == pytest.approx(
        np.mean(list(results["per_class_accuracy"].values()))
    )
    assert results["labels"] == sorted(TONES)
    assert sum(map(sum, results["confusion_matrix"])) == 12
    assert f"accuracy             {results['accuracy']:7.2%}" in out
    assert (tmp_path / "scores" / "confusion_matrix.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluate_writes_beside_the_model_and_names_what_it_left_out(work, tmp_path, capsys):
    data = make_audio_folder(tmp_path / "data", per_class=2, seed=2)
    (data / "low" / "broken.wav").write_bytes(b"RIFF")
    status, _, err = run_main(capsys, "evaluate", work / "model", "--data", data)
    assert status == 0
    assert "1 of 7 examples were left out" in err and "broken.wav" in err
    results = json.loads((work / "model" / "evaluation" / "eval_results.json").read_text())
    assert results["count"] == 6
    assert [Path(each["file"]).name for each in results["left_out"]] == ["broken.wav"]
    status, _, err = run_main(capsys, "evaluate", work / "model", "--data", data, "--strict")
    assert status == 1 and "broken.wav" in err


# --- predict ----------------------------------------------------------------------------------------------


def make_mixed_folder(folder: Path) -> Path:
    """Nested audio in several formats and rates, two unreadable files, and one that is no audio."""
    generator = np.random.default_rng(5)
    (folder / "deep" / "er").mkdir(parents=True)
    for name, label in (("a.mp3", "low"), ("deep/b.flac", "high"), ("deep/er/c.ogg", "middle")):
        wave = tone(TONES[label], 0.8, generator)
        soundfile.write(folder / name, np.stack([wave, wave], axis=1), RATE)  # two channels
    (folder / "empty.wav").write_bytes(b"")
    (folder / "deep" / "text.flac").write_text("this is not audio")
    (folder / "notes.txt").write_text("ignored")
    return folder


def test_predict_answers_good_files_and_names_bad_ones(work, tmp_path, capsys):
    folder = make_mixed_folder(tmp_path / "mixed")
    output = tmp_path / "out.json"
    status, out, err = run_main(
        capsys,
        "predict",
        work / "model",
        folder,
        tmp_path / "gone.wav",
        "--output",
        output,
        "--batch_size",
        "2",
    )
    assert status == 1
    assert out == ""
    for name in ("empty.wav", "text.flac", "gone.wav"):
        assert sum(name in line for line in err.splitlines()) == 1, err
    assert "notes.txt" not in err
    rows = json.loads(output.read_text())
    assert [Path(row["file"]).name for row in rows] == ["a.mp3", "b.flac", "c.ogg"]
    for row in rows:
        assert list(row) == ["file", "label", "probabilities"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    # The same sound as plain wav files is classified alike.
    for row in rows:
        wave, rate = soundfile.read(row["file"], dtype="float32")
        soundfile.write(tmp_path / "plain.wav", wave.mean(axis=1), rate, subtype="FLOAT")
        assert run_main(capsys, "predict", work / "model", tmp_path / "plain.wav", "--output", output)[0] == 0
        plain = json.loads(output.read_text())[0]["probabilities"]
        assert plain == pytest.approx(row["probabilities"], abs=1e-4)


def test_predict_writes_csv_and_prints_a_table(work, tmp_path, capsys):
    files = sorted((work / "test").rglob("*.wav"))
    status, out, _ = run_main(capsys, "predict", work / "model", *files)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["file", "label", "probability", "next"]
    assert [line.split()[0] for line in lines[1:]] == [str(file) for file in files]
    status, _, _ = run_main(capsys, "predict", work / "model", *files, "--output", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "label", *sorted(TONES)]
    assert [row["label"] for row in rows] == [line.split()[1] for line in lines[1:]]


def test_predictions_do_not_depend_on_the_batch(work, tmp_path, capsys):
    outputs = []
    for size in ("1", "5"):
        path = tmp_path / f"{size}.json"
        assert (
            run_main(
                capsys, "predict", work / "model", work / "test", "--output", path, "--batch_size", size
            )[0]
            == 0
        )
        outputs.append(json.loads(path.read_text()))
    for one, other in zip(*outputs, strict=True):
        assert one["file"] == other["file"]
        for label, p in one["probabilities"].items():
            assert other["probabilities"][label] == pytest.approx(p, abs=1e-5)


# --- convert ----------------------------------------------------------------------------------------------


def test_convert_goes_to_the_published_form_and_back(work, tmp_path, capsys):
    status, _, err = run_main(capsys, "convert", "--to_published", work / "model", tmp_path / "published")
    assert status == 0, err
    status, out, err = run_main(
        capsys, "convert", tmp_path / "published", tmp_path / "back", "--method", "lst"
    )
    assert status == 0, err
    assert "LST, reduction factor 2, adapter width 256, classes high, low, middle" in out
    answers = []
    for model in (work / "model", tmp_path / "back"):
        assert run_main(capsys, "predict", model, work / "test", "--output", tmp_path / "out.json")[0] == 0
        answers.append(json.loads((tmp_path / "out.json").read_text()))
    for one, other in zip(*answers, strict=True):
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
    status, _, err = run_main(capsys, "convert", tmp_path / "published", tmp_path / "x", "--method", "sherl")
    assert status == 1 and "holds a lst side network, not sherl" in err
