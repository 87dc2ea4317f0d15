"""Telling a complete training checkpoint from one that a crash cut short.

The Trainer writes a checkpoint folder file by file. If the process dies on the way, the newest folder is
missing files or holds the first part of one; resuming from it would fail or, worse, start from garbage.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig

from ..errors import UserError
from ..files import read_json

_NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoint_step(folder: Path) -> int | None:
    """The step in the name of a checkpoint folder, or None if the name is not of that form."""
    match = _NAME.match(folder.name)
    return int(match.group(1)) if match else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in ``output_dir``, newest first."""
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.iterdir() if path.is_dir() and checkpoint_step(path) is not None]
    return sorted(folders, key=checkpoint_step, reverse=True)


def problem_with(checkpoint: Path, processes: int = 1) -> str | None:
    """What keeps training from resuming at a checkpoint, in a few words; None if it is complete.

    Every file the Trainer reads is opened: JSON is parsed, the safetensors header is compared with the file
    size, and the checksums inside the .pt and .pth files (zip archives) are verified.

    Args:
        checkpoint: folder written by `transformers.Trainer`.
        processes: number of processes that will resume; each has its own random-state file.
    """
    from safetensors import SafetensorError, safe_open

    names = ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
    if processes == 1 and (checkpoint / "rng_state.pth").exists():
        names.append("rng_state.pth")
    else:
        names += sorted(path.name for path in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]
    if (checkpoint / "scaler.pt").exists():
        names.append("scaler.pt")
    for name in names:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if name == "trainer_state.json" and content.get("global_step") != checkpoint_step(checkpoint):
                    return f"{name} does not belong to step {checkpoint_step(checkpoint)}"
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as tensors:
                    tensors.keys()
            else:
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return f"{name} is damaged"
        except (OSError, ValueError, AttributeError, zipfile.BadZipFile, SafetensorError):
            return f"{name} is incomplete"
    return None


def newest_complete(output_dir: Path, say: Callable[[str], None], processes: int = 1) -> Path | None:
    """The newest checkpoint that training can resume from, or None if there is none.

    Newer checkpoints that are incomplete are removed, each with a message: training will write these steps
    again, and a left-over would be counted when old checkpoints are rotated.

    Args:
        output_dir: folder with checkpoint-N folders.
        say: called with one sentence per incomplete checkpoint.
        processes: number of processes that will resume.
    """
    for checkpoint in list_checkpoints(output_dir):
        problem = problem_with(checkpoint, processes)
        if problem is None:
            return checkpoint
        say(f"{checkpoint} is not complete ({problem}); it is removed and an earlier one is used")
        shutil.rmtree(checkpoint)
    return None


def require_complete(checkpoint: Path, processes: int = 1) -> Path:
    """Returns ``checkpoint`` if training can resume from it.

    Raises:
        UserError: it does not exist, is not a checkpoint folder, or is incomplete.
    """
    if not checkpoint.is_dir():
        raise UserError(f"resume_from_checkpoint: there is no folder {checkpoint}")
    if checkpoint_step(checkpoint) is None:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is not a checkpoint-N folder of a training run"
        )
    problem = problem_with(checkpoint, processes)
    if problem is not None:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is not complete ({problem}); "
            "--resume_from_checkpoint True takes the newest complete one"
        )
    return checkpoint


def check_steps_left(checkpoint: Path, max_steps: int) -> None:
    """Raises UserError if a checkpoint is at the last step already: the Trainer would do one step more."""
    if 0 < max_steps <= (checkpoint_step(checkpoint) or 0):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is at the last step (max_steps {max_steps}) already; "
            "evaluate and predict take it as a model, a larger --max_steps goes on from it"
        )


def check_same_model(checkpoint: Path, config: PreTrainedConfig) -> None:
    """Raises UserError if a checkpoint was written with another method, other sizes or other labels
    than those of ``config``, a ``MeftModelConfig``."""
    saved, now = read_json(checkpoint / "config.json"), config.to_dict()
    pairs = [
        (name, saved.get(name), now.get(name)) for name in ("label2id", "hidden_size", "num_hidden_layers")
    ]
    pairs += [(name, (saved.get("meft") or {}).get(name), value) for name, value in now["meft"].items()]
    for name, before, after in pairs:
        if before != after:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} has {name}={before!r}, but now it is {after!r}"
            )
