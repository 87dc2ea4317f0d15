"""The ops at another git revision of this repository, measured by a process in a temporary worktree."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from whisper_meft.errors import UserError

from meft_kernels.testing import AnyCase

from .contenders import case_to_dict
from .record import ROOT


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise UserError("--base needs git, which is not installed") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["git failed"])[-1]
        raise UserError(f"git {arguments[0]}: {reason.removeprefix('fatal: ')}") from error
    return done.stdout.strip()


def resolve(revision: str) -> str:
    """The commit that a name means.

    Raises:
        UserError: there is no such commit, no repository or no git.
    """
    _git("rev-parse", "--git-dir")
    try:
        return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except UserError as error:
        raise UserError(f"--base must name a commit of this repository, got {revision!r}") from error


class Revision:
    """The worker of one revision."""

    def __init__(self, name: str, commit: str, folder: Path) -> None:
        self.name, self.commit = name, commit
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def ask(self, do: str, **arguments) -> dict:
        """One request and its answer.

        Raises:
            UserError: the worker failed at it, or ended.
        """
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"the process of revision {self.name} ended")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def drop(self) -> None:
        """Frees what the worker holds; a worker that ended holds nothing."""
        with suppress(UserError):
            self.ask("drop")

    def close(self) -> None:
        """Ends the worker."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Remote:
    """The op in one backend at another revision; see ``contenders.Local``."""

    def __init__(
        self,
        revision: Revision,
        case: AnyCase,
        backend: str,
        dtype: torch.dtype,
        device: torch.device,
        warm_up: int,
    ) -> None:
        self.name, self.note = f"ops:{backend}@{revision.name}", ""
        self._revision, self._backend = revision, backend
        revision.ask(
            "prepare",
            case=case_to_dict(case),
            backend=backend,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            threads=torch.get_num_threads(),
            warm_up=warm_up,
        )

    def round(self, index: int) -> dict[str, float]:
        return self._revision.ask("round", backend=self._backend, index=index)

    def memory(self) -> dict[str, int]:
        return self._revision.ask("memory", backend=self._backend)


def build(tree: Path) -> None:
    """Builds the C++ kernels of a checkout in place, which takes minutes.

    Raises:
        UserError: they cannot be built.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # for ninja
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    # setup.py goes on without kernels that do not compile, and says why in its last line.
    if done.returncode or not list((tree / "meft_kernels").glob("_native_*.so")):
        reason = (done.stderr.strip().splitlines() or ["there are none"])[-1]
        raise UserError(f"the C++ kernels of --base cannot be built: {reason}")


@contextmanager
def worktree(revision: str, native: bool = False) -> Iterator[tuple[Path, str]]:
    """A folder with ``meft_kernels`` alone as it is at a revision, and the commit; removed afterwards.

    Args:
        revision: what git calls it.
        native: whether its C++ kernels are built.

    Raises:
        UserError: see ``resolve`` and ``build``.
    """
    commit = resolve(revision)
    folder = Path(tempfile.mkdtemp(prefix="meft-base-"))
    tree, packages = folder / "tree", folder / "packages"
    try:
        _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            if native:
                build(tree)
            packages.mkdir()
            # Nothing else of that tree may be imported: the harness is this tree's.
            (packages / "meft_kernels").symlink_to(tree / "meft_kernels", target_is_directory=True)
            yield packages, commit
        finally:
            _git("worktree", "remove", "--force", str(tree))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def open_revision(revision: str, native: bool = False) -> Iterator[Revision]:
    """The worker of a revision, ended and removed afterwards; see ``worktree``.

    Raises:
        UserError: see ``resolve`` and ``build``.
    """
    with worktree(revision, native) as (packages, commit):
        worker = Revision(revision, commit, packages)
        try:
            yield worker
        finally:
            worker.close()
