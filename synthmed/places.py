"""Where people are held: runs, and folders of clean DICOM; found below the folders one is given."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from synthmed.errors import UsageError
from synthmed.receipt import RECEIPT


def find(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Runs and targets of `deidentify`, at any depth, sorted; links are not followed.

    Raises:
        UsageError: one of the folders is not there, is or holds a link, or neither is nor holds
            any of them.
    """
    runs: set[Path] = set()
    targets: set[Path] = set()
    for folder in folders:
        if not folder.is_dir() or folder.is_symlink():
            raise UsageError(f"{folder}: no such folder, or a link", "Name the folder itself.")
        before = len(runs) + len(targets)
        for place, below, _ in os.walk(folder, onerror=_unreadable):
            path = Path(place)
            linked = [path / n for n in below if (path / n).is_symlink()]
            if any(is_run(p) or is_target(p) for p in linked):
                raise UsageError(
                    f"{path}: a link in it leads to a run or to clean DICOM",
                    "Name the folder that it leads to, and take the link out.",
                )
            if is_run(path):
                runs.add(path)
            elif is_target(path):
                targets.add(path)
            else:
                continue
            below.clear()
        if len(runs) + len(targets) == before:
            raise UsageError(
                f"{folder}: no run and no folder of clean DICOM in it",
                "Name a folder that holds some, each once.",
            )
    return sorted(runs), sorted(targets)


def _unreadable(error: OSError) -> None:
    """A folder that is closed to us may hold what is looked for."""
    raise UsageError(f"{error.filename}: cannot be read ({error.strerror})") from None


def is_run(path: Path) -> bool:
    """Whether a folder is a run: it holds what every command that makes one has left in it."""
    return (path / "config.yaml").is_file() and (path / "private/.lock").is_file()


def is_target(path: Path) -> bool:
    """Whether a folder was written by `deidentify`."""
    try:
        return {"complete", "options"} <= set(json.loads((path / RECEIPT).read_bytes()))
    except (OSError, ValueError, TypeError):
        return False


def refuse_links(path: Path) -> None:
    """See that all that is to be removed lies below `path` itself.

    Raises:
        UsageError: `path` or something below it is a link.
    """
    # rglob does not enter linked folders
    if path.is_symlink() or any(p.is_symlink() for p in path.rglob("*")):
        raise UsageError(
            f"{path}: is a link or holds one, so some of the data lie elsewhere",
            "Remove what it leads to, and the link; then call again.",
        )
