"""The folder of a run: locked, swept, and never emptied of what is not the run's."""

import os
import shutil

import pytest
from training_fixtures import make_audio_folder, make_backbone, train_command
from whisper_meft import MeftTrainer
from whisper_meft.commands.cli import main
from whisper_meft.training import lock, output_folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, train/ and finished/, a run of two steps."""
    folder = tmp_path_factory.mktemp("folders")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=4)
    assert run(folder, folder / "finished") == 0
    return folder


def run(work, output, train_data=None, backbone=None, **options) -> int:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"} | options
    backbone, train_data = backbone or work / "backbone", train_data or work / "train"
    return main(train_command(backbone, train_data, output, **options))


def contents(folder) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


# --- overwriting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        {"train_data": "no such data"},
        {"backbone": "no such model"},
        {"method": "nonsense"},
        {"learning_rate": 1e30},  # known in the first step
        {"resume_from_checkpoint": "no such checkpoint"},
    ],
)
def test_an_earlier_run_survives_one_that_comes_to_nothing(mistake, work, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    before = contents(out)
    options = {"save_strategy": "no"} | mistake
    assert run(work, out, overwrite_output_dir=True, **options) != 0
    assert contents(out) == before


def test_what_stops_before_it_saves_names_no_checkpoint_of_an_earlier_run(
    work, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    assert run(work, out, overwrite_output_dir=True, learning_rate=1e30, save_steps=9, max_steps=9) == 1
    err = capsys.readouterr().err
    assert "NaN or infinite" in err and "there is none of this run yet" in err and "checkpoint-" not in err

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(MeftTrainer, "training_step", interrupted)
    assert run(work, out, overwrite_output_dir=True) == 130
    assert "there is no checkpoint of this run to go on from" in capsys.readouterr().out
    # Going back, or coming from elsewhere, it is that which was named.
    first = out / "checkpoint-1"
    for folder in (out, tmp_path / "new"):
        assert run(work, folder, resume_from_checkpoint=first) == 130
        assert f"go on with --resume_from_checkpoint {first} --output_dir" in capsys.readouterr().out
    assert run(work, out, resume_from_checkpoint=True, max_steps=3) == 130
    assert "go on with --resume_from_checkpoint True --output_dir" in capsys.readouterr().out


def test_an_earlier_run_goes_when_the_new_one_saves(work, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("my own words")
    (out / "eval_results.json").write_text("of the earlier run")
    evaluate = ["evaluate", str(out), "--data", str(work / "train")]
    assert main(evaluate) == 0 and len(contents(out / "evaluation")) == 4
    assert run(work, out, overwrite_output_dir=True, max_steps=1) == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1"}
    assert not (out / "eval_results.json").exists() and not (out / "evaluation").exists()
    assert (out / "notes.txt").read_text() == "mine" and (out / "README.md").read_text() == "my own words"


def test_what_is_beside_the_scores_of_an_earlier_model_stays(work, tmp_path, capsys):
    out = tmp_path / "out"
    for name in ("eval_results.json", "evaluation.txt", "reliability.png", "transcripts.csv", "mine.csv"):
        (out / "evaluation").mkdir(parents=True, exist_ok=True)
        (out / "evaluation" / name).write_text(name)
    read = out / "evaluation" / "transcripts.csv"
    assert run(work, out, train_data=read, overwrite_output_dir=True) == 1
    assert "train_data is" in capsys.readouterr().err
    output_folder.clear_earlier_run(out)
    assert contents(out) == {"evaluation/mine.csv": b"mine.csv"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "eval_results.json").touch()
    shutil.rmtree(out / "evaluation")
    (out / "evaluation").symlink_to(tmp_path / "other")
    output_folder.clear_earlier_run(out)
    assert (out / "evaluation" / "eval_results.json").exists()  # a link's target is somebody else's


@pytest.mark.parametrize("how", [{"overwrite_output_dir": True}, {"resume_from_checkpoint": True}])
def test_a_folder_that_is_read_or_holds_something_else_is_refused(how, work, tmp_path, capsys):
    backbone, audio, other = tmp_path / "backbone", tmp_path / "train", tmp_path / "other"
    shutil.copytree(work / "backbone", backbone)
    shutil.copytree(work / "backbone", other)
    shutil.copytree(work / "train", audio)
    (tmp_path / "link").symlink_to(backbone)
    page = tmp_path / "page"
    page.mkdir()
    (page / "README.md").write_text("a project")
    mixed = tmp_path / "mixed"
    shutil.copytree(work / "finished", mixed)
    (mixed / "checkpoint-1" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    for folder, message in (
        (backbone, "is model_name_or_path, and would be written over"),
        (tmp_path / "link", "is model_name_or_path, and would be written over"),
        (audio, "is train_data, and would be written over"),
        (audio / "high", "is a part of train_data"),
        (other, "holds config.json, which no training run wrote"),
        (page, "holds README.md, which no training run wrote"),
        (mixed, "holds checkpoint-1/thesis.tex, which no training run wrote"),
    ):
        if folder == mixed and "resume_from_checkpoint" in how:
            continue  # that removes nothing
        assert run(work, folder, train_data=audio, backbone=backbone, **how) == 1
        assert message in capsys.readouterr().err
        assert contents(tmp_path) == before


def test_what_is_read_from_a_folder_that_is_written_over_is_refused(work, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    shutil.copytree(work / "train", out / "checkpoint-7" / "train")
    assert run(work, out, train_data=out / "checkpoint-7" / "train", overwrite_output_dir=True) == 1
    assert "train_data is" in capsys.readouterr().err
    # Beside the run's own things it may lie.
    shutil.move(out / "checkpoint-7" / "train", out / "train")
    shutil.rmtree(out / "checkpoint-7")
    assert run(work, out, train_data=out / "train", overwrite_output_dir=True) == 0


def test_a_checkpoint_of_another_folder_does_not_open_this_one(work, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(work / "finished", out)
    before = contents(out)
    elsewhere = work / "finished" / "checkpoint-1"
    assert run(work, out, resume_from_checkpoint=elsewhere) == 1
    assert "is not empty" in capsys.readouterr().err and contents(out) == before
    assert run(work, tmp_path / "new", resume_from_checkpoint=elsewhere) == 0


def test_what_a_kill_left_is_swept_and_nothing_else(work, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".train_results-ab12_cd9.json").touch()
    (out / ".model-abcdefgh.safetensors").touch()
    (out / lock.LOCK).write_text("process 1 on another machine")
    assert run(work, out) == 0  # that is an empty folder
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for name in (".mine-abcdefgh.json", ".model-short.safetensors", ".gitignore"):
        (out / name).touch()
    assert run(work, out, overwrite_output_dir=True) == 0
    assert len([path for path in out.iterdir() if path.name.startswith(".")]) == 3


# --- one run at a time ------------------------------------------------------------------------------------


def test_two_runs_do_not_write_into_one_folder(work, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with lock.locked(out):
        assert run(work, out) == 1
        err = capsys.readouterr().err
        assert f"another run is writing into {out} (process {os.getpid()} on " in err
        assert "tasks" not in err
        monkeypatch.setenv("SLURM_NTASKS", "4")
        assert run(work, out) == 1
        assert "4 tasks were started without torchrun" in capsys.readouterr().err
        with lock.locked(out, main=False):  # another process of the same run
            pass
    assert not out.exists()
    assert run(work, out) == 0 and not (out / lock.LOCK).exists()
