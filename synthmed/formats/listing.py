"""The source folder as a list of relative paths: the only truth about which files exist.

Paths that tables and configs give are looked up here and never handed to the file system, so
that none can lead out of the source.
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from synthmed.formats.refusal import Refused

Kind = Literal["nifti", "dicom", "other"]

_AUXILIARY_ENDING = (".json", ".tsv", ".csv", ".bval", ".bvec")
_AUXILIARY_STEM = re.compile(r"^(README|LICENSE|LICENCE|CHANGES|CITATION|DICOMDIR)(\.\w+)?$", re.I)
_VALUE_REPRESENTATIONS = re.compile(rb"[A-Z]{2}")


@dataclass(frozen=True)
class Listing:
    """Every file below a folder.

    Args:
        root: the folder, resolved.
        sizes: path relative to `root` (with /) to bytes, sorted; what may be opened.
        refused: paths that may not be opened, with the reason, sorted.
        names: what a person finds a file by, where its path says nothing.
    """

    root: Path
    sizes: Mapping[str, int]
    refused: Mapping[str, Refused]
    names: Mapping[str, str] = field(default_factory=dict)
    _tree: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Arrange the paths as a tree, which patterns are matched against."""
        for path in self.sizes:
            *folders, name = path.split("/")
            node = self._tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[name] = None

    def path(self, relative: str) -> Path:
        """Where a listed file lies."""
        return self.root / relative

    def match(self, pattern: str) -> list[str]:
        """Listed files that match; `*`, `?` and `[]` match within one folder level."""
        segments = [s for s in pattern.split("/") if s not in ("", ".")]
        return sorted(p for p, leaf in _walk_tree(self._tree, segments) if leaf is None)

    def folders(self, pattern: str) -> list[str]:
        """Folders that match, as `match` does for files."""
        segments = [s for s in pattern.split("/") if s not in ("", ".")]
        return sorted(p for p, leaf in _walk_tree(self._tree, segments) if leaf is not None)

    def every_folder(self) -> list[str]:
        """All folders that hold files at some depth, the root ("") first."""
        found = {""}
        for path in self.sizes:
            while path := posixpath.dirname(path):
                found.add(path)
        return sorted(found)


def walk(root: Path) -> Listing:
    """List `root`: links out of it, what is no regular file and closed folders are refused.

    Hidden folders are not entered. A link to a folder is not followed: what it leads to inside
    the source is listed where it lies. Nothing is opened.
    """
    root = root.resolve()
    sizes: dict[str, int] = {}
    refused: dict[str, Refused] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda e: e.name)
        except OSError:
            refused[folder or "."] = Refused("unreadable", "Give the folder read permission.")
            continue
        for entry in entries:
            path = posixpath.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    folders.append(path)
                continue
            try:
                found = _size(root, entry)
            except Refused as reason:
                refused[path] = reason
                continue
            except OSError:
                refused[path] = Refused("unreadable")
                continue
            if found is not None:
                sizes[path] = found
    return Listing(root, dict(sorted(sizes.items())), dict(sorted(refused.items())))


def join(folder: str, cell: str) -> str:
    """A table's `cell` as a path relative to the source, `folder` being the table's.

    Raises:
        Refused: it is absolute or leads out of the source.
    """
    text = cell.strip().replace("\\", "/")
    path = posixpath.normpath(posixpath.join(folder, text))
    if text.startswith("/") or re.match(r"^[A-Za-z]:", text) or path.split("/")[0] == "..":
        raise Refused("outside_source")
    return path


def is_auxiliary(path: str) -> bool:
    """Whether a file accompanies images: sidecars, tables, gradients, readmes, hidden files."""
    name = posixpath.basename(path)
    return (
        name.startswith(".")
        or name.lower().endswith(_AUXILIARY_ENDING)
        or _AUXILIARY_STEM.match(name) is not None
    )


def kind(listing: Listing, path: str) -> Kind:
    """What a file is, by its ending and then by its first bytes.

    NIfTI: the ending, or the magic of NIfTI-1/2. DICOM: "DICM" at byte 128, the ending .dcm or
    .ima (or that and .gz), or a first element of group 0002 or 0008 (PS3.10 section 7.1 without
    its preamble).
    """
    name = path.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if name.endswith((".dcm", ".ima", ".dcm.gz", ".ima.gz")):
        return "dicom"
    try:
        with open(listing.path(path), "rb") as handle:
            head = handle.read(352)
    except OSError:
        return "other"
    if head[128:132] == b"DICM" or _is_dataset(head):
        return "dicom"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] == b"n+2\0":
        return "nifti"
    return "other"


def _is_dataset(head: bytes) -> bool:
    """Whether the bytes begin like a DICOM data set without preamble."""
    if len(head) < 16:
        return False
    group, element = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    explicit = _VALUE_REPRESENTATIONS.fullmatch(head[4:6]) is not None
    length = int.from_bytes(head[6:8] if explicit else head[4:8], "little")
    return group in (0x0002, 0x0008) and element <= 0x0070 and length <= 256


def _walk_tree(tree: dict[str, Any], segments: list[str]) -> Iterator[tuple[str, Any]]:
    """Nodes of the tree at a pattern given by its segments."""
    if not segments:
        return
    first, *rest = segments
    if re.search(r"[*?[]", first):
        names = [n for n in sorted(tree) if fnmatch.fnmatchcase(n, first)]
    else:
        names = [first] if first in tree else []
    for name in names:
        child = tree[name]
        if not rest:
            yield name, child
        elif child is not None:
            for below, leaf in _walk_tree(child, rest):
                yield f"{name}/{below}", leaf


def _size(root: Path, entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file; None for a link to a folder inside the source."""
    if entry.is_symlink():
        target = Path(os.path.realpath(entry.path))
        if not target.is_relative_to(root) or not target.exists():
            raise Refused("outside_source", "A link is followed only to what lies in the source.")
        if target.is_dir():
            return None
    info = entry.stat()
    if not stat.S_ISREG(info.st_mode):
        raise Refused("not_an_image", "It is a device, a pipe or a socket.")
    return info.st_size
