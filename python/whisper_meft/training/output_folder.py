"""The folder of a run: what it may hold before the run begins, and what is left in it."""

import shutil
from pathlib import Path

from ..errors import UserError
from ..files import check_writable
from ..options.training import TrainArguments
from . import checkpoints
from .console import main_process, say

# What a finished run leaves beside its checkpoints.
RESULT_FILES = [
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "training_args.bin",
    "README.md",
    "train_results.json",
    "eval_results.json",
    "evaluation.txt",
    "confusion_matrix.png",
    "learning_curve.png",
]


def prepare_output_dir(arguments: TrainArguments) -> Path | None:
    """Checks the output folder against what is asked for and finds the checkpoint to resume from, if any.

    Raises:
        UserError: the folder holds something and neither resuming nor overwriting was asked for, or the named
            checkpoint cannot be resumed from.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file, a folder is needed")
    wanted = (arguments.resume_from_checkpoint or "").strip()
    processes = arguments.world_size
    # One process at a time, the main one first: it may remove half-written checkpoints.
    with arguments.main_process_first(local=False, desc="looking for checkpoints"):
        if main_process():
            check_writable(folder / RESULT_FILES[0])
        if wanted.lower() in ("true", "latest"):
            found = checkpoints.newest_complete(folder, say, processes)
            if found is None:
                say(f"{folder} holds no complete checkpoint: training starts from the beginning")
            return found
        if wanted.lower() not in ("", "false"):
            return checkpoints.require_complete(Path(wanted), processes)
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        if not arguments.overwrite_output_dir:
            # Only the main process looks: it has not written anything yet when the others come here.
            raise UserError(
                f"output_dir: {folder} is not empty; name another folder, or go on with the run in it by "
                "--resume_from_checkpoint True, or start anew with --overwrite_output_dir True"
            )
        if main_process():
            for checkpoint in checkpoints.list_checkpoints(folder):
                shutil.rmtree(checkpoint)
            for name in RESULT_FILES:
                (folder / name).unlink(missing_ok=True)
    return None
