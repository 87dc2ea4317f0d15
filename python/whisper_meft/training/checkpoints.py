"""Telling a complete training checkpoint from one that a crash cut short.

The Trainer writes a checkpoint folder file by file. If the process dies on the way, the newest folder is
missing files or holds the first part of one; resuming from it would fail or, worse, start from garbage. So a
marker is written into it first and removed last: a folder with the marker is removed at the next start. One
that lacks something without being marked is not ours to remove: it may be a model that somebody keeps.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ..encoder.fingerprint import same_fingerprint
from ..encoder.quantization import REVISION
from ..errors import UserError
from ..files import read_json
from ..methods import MeftConfig

# The name that transformers' own checkpoints at a signal use.
MARKER = "checkpoint-is-incomplete.txt"

_NAME = re.compile(r"^checkpoint-(\d+)$")
# What a run, or `evaluate` of a checkpoint, leaves in its folder.
_CONTENT = re.compile(
    r"^(config\.json|model\.safetensors|README\.md|preprocessor_config\.json|training_args\.bin|"
    r"generation_config\.json|tokenizer(_config)?\.json|normalizer\.json|"
    r"trainer_state\.json|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|evaluation|"
    rf"global_step\d+|latest|zero_to_fp32\.py|{re.escape(MARKER)})$|^\."
)
_REMOVED = re.compile(r"^\.checkpoint-\d+-removed$")


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


@contextmanager
def being_written(checkpoint: Path, main: bool, wait: Callable[[], None]) -> Iterator[None]:
    """Marks a checkpoint folder, made as needed, as half-written until all processes have left this.

    Args:
        checkpoint: its folder. main: whether this is the process that makes it.
        wait: returns when all processes have called it.
    """
    if main:
        if checkpoint.is_symlink():  # what it links to is somebody else's
            checkpoint.unlink()
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / MARKER).write_text("This checkpoint is being written.\n", encoding="utf-8")
    wait()
    yield
    wait()
    if main:
        (checkpoint / MARKER).unlink()


def half_written(checkpoint: Path) -> bool:
    """Whether a crash is known to have cut the writing of a checkpoint short: it is marked, or empty."""
    return (checkpoint / MARKER).exists() or not any(checkpoint.iterdir())


def not_ours(checkpoint: Path) -> list[str]:
    """The names in a checkpoint folder that no training run wrote."""
    return sorted(each.name for each in checkpoint.iterdir() if not _CONTENT.match(each.name))


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint folder so that nobody ever sees half of it; of a link only the link."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    gone = checkpoint.with_name(f".{checkpoint.name}-removed")
    if gone.exists():
        shutil.rmtree(gone)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint folder so that it does not count as one any more; returns the new path."""
    aside, number = checkpoint.with_name(f"aside-{checkpoint.name}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = checkpoint.with_name(f"aside{number}-{checkpoint.name}")
    return checkpoint.rename(aside)


def sweep(output_dir: Path, say: Callable[[str], None]) -> None:
    """Removes what a crash left in ``output_dir``: half-written and half-removed checkpoints.

    Args:
        output_dir: folder with checkpoint-N folders.
        say: called with one sentence per half-written checkpoint.
    """
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if _REMOVED.match(path.name) and path.is_dir():
            shutil.rmtree(path)
    for checkpoint in list_checkpoints(output_dir):
        if half_written(checkpoint):
            say(f"{checkpoint} was cut off while it was written; it is removed")
            remove(checkpoint)


def rotate(output_dir: Path, limit: int | None, kept: list[str | Path | None]) -> None:
    """Removes the oldest checkpoints until at most ``limit`` are left, but none of ``kept`` and none that
    holds something that no run wrote; no limit is None or 0."""
    if not limit or limit < 0:
        return
    present = list_checkpoints(output_dir)
    steps = {checkpoint_step(Path(each)) for each in kept if each is not None}
    spare = [each for each in reversed(present) if checkpoint_step(each) not in steps]
    for checkpoint in spare[: max(len(present) - limit, 0)]:
        if checkpoint.is_symlink() or not not_ours(checkpoint):
            remove(checkpoint)


def holds_model_only(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved whole, but without what training goes on from (`--save_only_model`)."""
    names = ("config.json", "model.safetensors", "trainer_state.json")
    return all((checkpoint / name).is_file() for name in names) and not any(
        (checkpoint / name).exists() for name in (MARKER, "optimizer.pt", "scheduler.pt")
    )


def problem_with(checkpoint: Path, processes: int = 1) -> str | None:
    """What keeps training from resuming at a checkpoint, in a few words; None if it is complete.

    Every file the Trainer reads is opened: JSON is parsed, the safetensors header is compared with the file
    size, and the checksums inside the .pt and .pth files (zip archives) are verified.

    Args:
        checkpoint: folder written by `transformers.Trainer`.
        processes: number of processes that will resume; each has its own random-state file.
    """
    from safetensors import SafetensorError, safe_open

    if (checkpoint / MARKER).exists():
        return "it was cut off while it was written"
    if holds_model_only(checkpoint):
        return "it holds the model only, as --save_only_model True leaves it"
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

    Newer ones that are marked as half-written are removed, and others that lack something are renamed, each
    with a message: training will write these steps again, and a left-over would be counted when old
    checkpoints are rotated.

    Args:
        output_dir: folder with checkpoint-N folders.
        say: called with one sentence per incomplete checkpoint.
        processes: number of processes that will resume.

    Raises:
        UserError: the newest one holds a model only.
    """
    sweep(output_dir, say)
    incomplete = {}
    for checkpoint in list_checkpoints(output_dir):
        problem = problem_with(checkpoint, processes)
        if problem is None or holds_model_only(checkpoint):
            break
        incomplete[checkpoint] = problem
    else:
        checkpoint = None
    if checkpoint is not None and holds_model_only(checkpoint):
        raise UserError(_model_only(checkpoint, processes))
    for damaged, problem in incomplete.items():
        aside = set_aside(damaged)
        say(f"{damaged} is not complete ({problem}); it is kept as {aside} and an earlier one is used")
    return checkpoint


def _model_only(checkpoint: Path, processes: int) -> str:
    whole = [
        each
        for each in list_checkpoints(checkpoint.parent)
        if checkpoint_step(each) < checkpoint_step(checkpoint) and problem_with(each, processes) is None
    ]
    else_ = f"name an earlier one, --resume_from_checkpoint {whole[0]}, or " if whole else ""
    return (
        f"resume_from_checkpoint: {checkpoint} holds the model only, as --save_only_model True leaves it, so "
        f"training cannot go on from it; {else_}name another output_dir, or start anew with "
        "--overwrite_output_dir True without --resume_from_checkpoint"
    )


def require_complete(checkpoint: Path, processes: int = 1) -> Path:
    """Returns ``checkpoint`` if training can resume from it.

    Raises:
        UserError: it does not exist, is not a checkpoint folder, or is incomplete.
    """
    if not checkpoint.is_dir():
        raise UserError(f"resume_from_checkpoint: there is no folder {checkpoint}")
    if checkpoint_step(checkpoint) is None and checkpoint_step(checkpoint.resolve()) is not None:
        checkpoint = checkpoint.resolve()  # a link such as `newest`
    if checkpoint_step(checkpoint) is None:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is not a checkpoint-N folder of a training run"
        )
    problem = problem_with(checkpoint, processes)
    if problem is not None and holds_model_only(checkpoint):
        raise UserError(_model_only(checkpoint, processes))
    if problem is not None:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is not complete ({problem}); "
            "--resume_from_checkpoint True takes the newest complete one"
        )
    return checkpoint


def _default(option: Field) -> Any:
    """The default of a dataclass's field; ``MISSING`` where it has none."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def check_same_model(checkpoint: Path, config: PreTrainedConfig, fingerprint: str = "") -> None:
    """Raises UserError if a checkpoint was written with another method, other sizes or other labels
    than those of ``config``, a ``MeftModelConfig``, or beside another backbone.

    Args:
        fingerprint: of the backbone's weights, empty where they train and so come from the checkpoint.
    """
    saved, now = read_json(checkpoint / "config.json"), config.to_dict()
    pairs = [("task", saved.get("task", "classification"), now["task"])]
    names = ["hidden_size", "num_hidden_layers", *(["label2id"] if now["task"] == "classification" else [])]
    pairs += [(name, saved.get(name), now.get(name)) for name in names]
    # An option that was added since was what it is by default.
    method = MeftConfig.methods()[now["meft"]["method"]]
    older = {each.name: value for each in fields(method) if (value := _default(each)) is not MISSING}
    options = older | (saved.get("meft") or {})
    pairs += [(name, options.get(name), value) for name, value in now["meft"].items()]
    if now["meft"].get("backbone_quantization"):
        pairs.append(("quantization_revision", saved.get("quantization_revision"), REVISION))
    for name, before, after in pairs:
        if before != after:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} has {name}={before!r}, but now it is {after!r}"
            )
    trained_beside = saved.get("base_model_fingerprint")
    if trained_beside and fingerprint and not same_fingerprint(fingerprint, trained_beside):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} was trained beside "
            f"{saved.get('base_model_name_or_path') or 'a backbone'}, which has other weights than "
            f"{config.base_model_name_or_path or 'the backbone of now'}: give the same --model_name_or_path"
        )
