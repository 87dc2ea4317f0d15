"""Checkpoint folders: whole, half-written, models only, links, and what is removed when."""

import shutil

import pytest
from training_fixtures import make_audio_folder, make_backbone, train_command
from whisper_meft.commands.cli import main
from whisper_meft.errors import UserError
from whisper_meft.training import checkpoints


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, train/, out/ with checkpoints 2, 4 and 6 of 6, and models/ with models of these steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=4)
    assert run(folder, folder / "out") == 0
    assert run(folder, folder / "models", save_only_model=True) == 0
    return folder


def run(work, output, **options) -> int:
    options = {
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 5,
        "max_steps": 6,
        "lr_scheduler_type": "constant",
    } | options
    return main(train_command(work / "backbone", work / "train", output, **options))


def contents(folder) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def steps(folder) -> list[int]:
    return [checkpoints.checkpoint_step(each) for each in checkpoints.list_checkpoints(folder)]


def test_models_without_optimizer_are_no_checkpoints_to_resume_from_and_stay(work, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(work / "models", out)
    before = contents(out)
    for wanted in (True, out / "checkpoint-6"):
        assert run(work, out, max_steps=10, resume_from_checkpoint=wanted) == 1
        err = capsys.readouterr().err
        assert "checkpoint-6 holds the model only, as --save_only_model True leaves it" in err
        assert contents(out) == before
    # An earlier whole one is named, not taken: what it leads to would be written over the models.
    shutil.rmtree(out / "checkpoint-4")
    shutil.copytree(work / "out" / "checkpoint-4", out / "checkpoint-4")
    assert run(work, out, max_steps=10, resume_from_checkpoint=True) == 1
    assert f"--resume_from_checkpoint {out / 'checkpoint-4'}" in capsys.readouterr().err


def test_only_what_is_marked_as_half_written_is_removed(work, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(work / "out", out)
    (out / "checkpoint-6" / checkpoints.MARKER).touch()
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    (out / "checkpoint-8").mkdir()  # killed before the marker was in it
    (out / ".checkpoint-0-removed").mkdir()
    said = []
    assert checkpoints.newest_complete(out, said.append) == out / "checkpoint-2"
    assert [line.split(" ", 1)[0] for line in said] == [str(out / f"checkpoint-{n}") for n in (8, 6, 4)]
    kept = {each.name for each in out.iterdir() if each.is_dir()}
    assert kept == {"checkpoint-2", "aside-checkpoint-4"}
    assert (out / "aside-checkpoint-4" / "model.safetensors").is_file()


def test_a_checkpoint_is_marked_while_it_is_written_and_no_longer(tmp_path):
    folder, waited = tmp_path / "checkpoint-3", []
    with checkpoints.being_written(folder, True, lambda: waited.append(checkpoints.half_written(folder))):
        assert waited == [True] and "cut off" in checkpoints.problem_with(folder)
        (folder / "file").touch()
    assert waited == [True, True]  # the others are waited for before the marker goes
    assert not checkpoints.half_written(folder)
    with pytest.raises(OSError), checkpoints.being_written(folder, True, lambda: None):
        raise OSError("disk full")
    assert checkpoints.half_written(folder)


def test_a_linked_checkpoint_is_resumed_from_and_never_followed_to_be_removed(work, tmp_path, capsys):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(work / "out", out)
    (out / "checkpoint-6").rename(elsewhere)
    (out / "checkpoint-6").symlink_to(elsewhere)
    before = contents(elsewhere)
    options = {"max_steps": 10, "save_total_limit": 1, "resume_from_checkpoint": True}
    assert run(work, out, **options) == 0
    assert f"resuming from {out / 'checkpoint-6'}" in capsys.readouterr().out
    assert steps(out) == [10]
    assert contents(elsewhere) == before
    (tmp_path / "newest").symlink_to(out / "checkpoint-10")
    assert checkpoints.require_complete(tmp_path / "newest") == out / "checkpoint-10"
    with pytest.raises(UserError, match="is not a checkpoint-N folder"):
        checkpoints.require_complete(elsewhere)


def test_old_checkpoints_go_but_not_the_ones_that_are_kept(tmp_path):
    for step in (2, 4, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.rotate(tmp_path, None, [])
    assert steps(tmp_path) == [100, 10, 4, 2]
    checkpoints.rotate(tmp_path, 3, [tmp_path / "checkpoint-100", tmp_path / "checkpoint-2"])
    assert steps(tmp_path) == [100, 10, 2]
    checkpoints.rotate(tmp_path, 1, [tmp_path / "checkpoint-100", tmp_path / "checkpoint-2", None])
    assert steps(tmp_path) == [100, 2]
    assert {each.name for each in tmp_path.iterdir()} == {"checkpoint-100", "checkpoint-2"}
    (tmp_path / "checkpoint-2" / "my notes.txt").touch()
    checkpoints.rotate(tmp_path, 1, [tmp_path / "checkpoint-100"])
    assert steps(tmp_path) == [100, 2]
