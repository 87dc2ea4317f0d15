"""Paths as tables give them: relative ones, those of Windows, and names composed in another way."""

import os
import re
from functools import cache
from pathlib import Path

from ..errors import UserError
from ..once import warn_once
from .names import composed

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")

# Where tables that give bare file names keep the audio: Common Voice, LJSpeech and their like.
_AUDIO_FOLDERS = ("clips", "audio", "wavs", "wav")


class RealPaths:
    """Files by one path each, however a table writes it: absolute, without links and detours, composed.

    Args:
        links: whether links that are files, and not folders, are followed too; each file is asked for it.
    """

    def __init__(self, links: bool = False):
        self.links = links
        self._folder = cache(os.path.realpath)

    def __call__(self, file: str | os.PathLike) -> str:
        folder, name = os.path.split(os.fsdecode(file))
        path = os.path.join(self._folder(folder), name)
        return composed(os.path.realpath(path) if self.links and os.path.islink(path) else path)


class Paths:
    """Finds the files that a table names, and counts what it took for them.

    Args:
        root: folder that relative paths start from.
        where: the table, for messages.
        search: whether bare file names may also lie in a folder such as ``clips`` below ``root``.
    """

    def __init__(self, root: str, where: str, search: bool = False):
        self.root, self.where = root, where
        folders = (os.path.join(root, name) for name in _AUDIO_FOLDERS if search)
        # Where there is one, every entry is tried until one is found: many may be missing.
        self._folders = [folder for folder in folders if os.path.isdir(folder)]
        self._entries = cache(_entries)
        self._other_form: list[str] = []
        self._windows: list[str] = []

    def __call__(self, file: str, at: str) -> str:
        """The path of ``file``.

        Raises:
            UserError: naming ``at``, a path of Windows that is not here.
        """
        if self._folders and (folder := self._audio_folder(file)) is not None:
            self.root, self._folders = folder, []
        path = os.path.join(self.root, file)
        foreign = os.name != "nt" and ("\\" in file or _DRIVE.match(file))
        if (file.isascii() and not foreign) or os.path.lexists(path):
            return path
        if foreign:
            path = self._in_other_form(os.path.join(self.root, file.replace("\\", "/")))
            if path is None or _DRIVE.match(file):
                raise UserError(
                    f"{at}: {file} is a path of Windows: write it with / and from the folder that "
                    "--data_root names (default: the table's)"
                )
            self._windows.append(file)
            return path
        found = self._in_other_form(path)
        if found is None:
            return path
        self._other_form.append(file)
        return found

    def say(self) -> None:
        """Says what was taken for what, in a line each."""
        if self._other_form:
            warn_once(
                f"{self.where}: {len(self._other_form)} paths have their letters composed in another way "
                f"than their files (NFC, NFD), which were found nevertheless: {self._other_form[0]}"
            )
        if self._windows:
            warn_once(
                f"{self.where}: {len(self._windows)} paths are written with \\ and were read with /: "
                f"{self._windows[0]}"
            )

    def _audio_folder(self, file: str) -> str | None:
        """The folder that the file lies in by its name alone; ``None`` where it lies in none."""
        if os.path.basename(file) != file or os.path.lexists(os.path.join(self.root, file)):
            return self.root
        for folder in self._folders:
            if os.path.lexists(os.path.join(folder, file)) or composed(file) in self._entries(folder):
                return folder
        return None

    def _in_other_form(self, path: str) -> str | None:
        """The file that is there under a name of the same letters."""
        if os.path.lexists(path):
            return path
        current = ""
        for part in Path(path).parts:
            step = os.path.join(current, part)
            if not os.path.lexists(step):
                name = self._entries(current or ".").get(composed(part))
                if name is None:
                    return None
                step = os.path.join(current, name)
            current = step
        return current


def _entries(folder: str) -> dict[str, str]:
    try:
        return {composed(name): name for name in sorted(os.listdir(folder)) if not name.isascii()}
    except OSError:
        return {}
