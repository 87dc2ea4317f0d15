"""The folder of a run: what it may hold before the run begins, and what is left in it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from ..files import check_writable
from ..options.training import TrainArguments
from . import checkpoints
from .console import main_process, say
from .lock import LOCK

# What a finished run leaves beside its checkpoints.
RESULT_FILES = [
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "normalizer.json",
    "training_args.bin",
    "README.md",
    "train_results.json",
    "eval_results.json",
    "evaluation.txt",
    "transcripts.csv",
    "confusion_matrix.png",
    "learning_curve.png",
]

# What `evaluate` of the model leaves, in a folder of this name.
EVALUATION = "evaluation"
EVALUATION_FILES = [
    "eval_results.json",
    "evaluation.txt",
    "confusion_matrix.png",
    "reliability.png",
    "transcripts.csv",
]

# Files that are being written, see whisper_meft.files.
_TEMPORARY = re.compile(
    rf"^\.({'|'.join({re.escape(Path(name).stem) for name in RESULT_FILES})})-[a-z0-9_]{{8}}\.\w+$"
)


def check_output_dir(folder: Path, inputs: Mapping[str, str | None]) -> None:
    """Checks that a run can write into its folder, and that it writes over nothing that it reads.

    Args:
        folder: of the run. inputs: what it reads, by the name of the option that says so.

    Raises:
        UserError: it cannot, or it would.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file, a folder is needed")
    if main_process():
        check_writable(folder / RESULT_FILES[0])
        for name, value in inputs.items():
            _check_apart(folder, name, value)


def prepare_output_dir(arguments: TrainArguments) -> Path | None:
    """Checks the output folder against what is asked for and finds the checkpoint to resume from, if any.

    Nothing of an earlier run is removed, see :func:`make_room`; what a crash left is.

    Raises:
        UserError: the folder holds something and neither resuming nor overwriting was asked for, or something
            that no run wrote and this one would write over; the named checkpoint cannot be resumed from.
    """
    folder = Path(arguments.output_dir)
    # One process at a time, the main one first: it may remove half-written checkpoints.
    with arguments.main_process_first(local=False, desc="looking for checkpoints"):
        if main_process():
            _sweep_temporaries(folder)
        return _checkpoint_to_resume(folder, arguments)


def _checkpoint_to_resume(folder: Path, arguments: TrainArguments) -> Path | None:
    wanted, processes = (arguments.resume_from_checkpoint or "").strip(), arguments.world_size
    if goes_on(arguments):
        _check_ours(folder, resuming=True)
        return checkpoints.newest_complete(folder, say, processes)
    named = None
    if wanted.lower() not in ("", "false"):
        named = checkpoints.require_complete(Path(wanted), processes)
        if named.resolve().parent == folder.resolve():
            return named
    # Only the main process looks: it has not written anything yet when the others come here.
    if _is_empty(folder):
        return named
    if not arguments.overwrite_output_dir:
        raise UserError(
            f"output_dir: {folder} is not empty; name another folder, or go on with the run in it by "
            "--resume_from_checkpoint True, or start anew with --overwrite_output_dir True"
        )
    _check_ours(folder, resuming=False)
    return named


def clear_earlier_run(folder: Path) -> None:
    """Removes checkpoints and results of an earlier run, and nothing else."""
    for checkpoint in checkpoints.list_checkpoints(folder):
        checkpoints.remove(checkpoint)
    for name in RESULT_FILES:
        if name != "README.md" or _is_model_card(folder / name):
            (folder / name).unlink(missing_ok=True)
    _clear_evaluation(folder / EVALUATION)


def _clear_evaluation(folder: Path) -> None:
    """Removes the scores of an earlier run's model, and their folder if nothing else is in it."""
    if folder.is_symlink() or not (folder / EVALUATION_FILES[0]).is_file():
        return
    for name in EVALUATION_FILES:
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def make_room(arguments: TrainArguments, resume_from: Path | None) -> None:
    """What is done when a run is about to save for the first time, and not before: an earlier run that it
    overwrites goes, and checkpoints later than the one it resumes from, another course, are set aside."""
    folder = Path(arguments.output_dir)
    if resume_from is not None and resume_from.resolve().parent == folder.resolve():
        for checkpoint in checkpoints.list_checkpoints(folder):
            if checkpoints.checkpoint_step(checkpoint) > checkpoints.checkpoint_step(resume_from):
                aside = checkpoints.set_aside(checkpoint)
                say(f"{checkpoint} is later than {resume_from.name}, gone back to; it is now {aside}")
    elif arguments.overwrite_output_dir and not goes_on(arguments):
        clear_earlier_run(folder)


def goes_on(arguments: TrainArguments) -> bool:
    """Whether the run in the folder is to be gone on with, from its newest checkpoint if there is one."""
    return (arguments.resume_from_checkpoint or "").strip().lower() in ("true", "latest")


def _is_empty(folder: Path) -> bool:
    return not folder.is_dir() or all(each.name == LOCK for each in folder.iterdir())


def _sweep_temporaries(folder: Path) -> None:
    """Removes the files that a kill left half-written."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.match(path.name) and path.is_file():
            path.unlink()


def _check_apart(folder: Path, name: str, value: str | None) -> None:
    """Refuses a folder that a run reads, or where it reads what it writes over."""
    try:
        if not value or not Path(value).exists():
            return  # a name on the hub
    except OSError:
        return
    source, here = Path(value).resolve(), folder.resolve()
    if source == here:
        raise UserError(f"output_dir: {folder} is {name}, and would be written over; name another folder")
    if here in source.parents:
        first, *below = source.relative_to(here).parts
        scores = first == EVALUATION and below[:1] and below[0] in EVALUATION_FILES
        if scores or first in RESULT_FILES or checkpoints.checkpoint_step(here / first) is not None:
            raise UserError(
                f"output_dir: {name} is {value}, which this run would write over; name another folder"
            )
    if source in here.parents and not _is_empty(folder) and not _signs_of_a_run(folder):
        raise UserError(f"output_dir: {folder} is a part of {name}, {value}; name another folder")


def _signs_of_a_run(folder: Path) -> bool:
    return (
        (folder / "train_results.json").is_file()
        or _is_our_config(folder / "config.json")
        or bool(checkpoints.list_checkpoints(folder))
    )


def _check_ours(folder: Path, resuming: bool) -> None:
    """Refuses a folder that holds something else where a run writes or, unless it goes on, removes."""
    config = folder / "config.json"
    present = [name for name in RESULT_FILES if (folder / name).exists()]
    strange = [] if _signs_of_a_run(folder) else present
    if config.exists() and not _is_our_config(config):
        strange = ["config.json"]
    for checkpoint in checkpoints.list_checkpoints(folder):
        if not resuming and not checkpoint.is_symlink():
            strange += [f"{checkpoint.name}/{name}" for name in checkpoints.not_ours(checkpoint)]
    if strange:
        raise UserError(
            f"output_dir: {folder} holds {strange[0]}, which no training run wrote and which would be "
            "lost; name another folder"
        )


def _is_our_config(path: Path) -> bool:
    try:
        return "meft" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _is_model_card(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        return re.search(r'^library_name: ("?)whisper_meft\1$', text, re.MULTILINE) is not None
    except (OSError, ValueError):
        return False
