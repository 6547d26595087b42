"""A report and a release as folders of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from synthmed.report.build import Report
from synthmed.report.images import Picture
from synthmed.report.page import render
from synthmed.store import file_sha256, sync, write_bytes, write_json

SUMS = "SHA256SUMS"
"""The file that closes a release folder: it is written last and lists all the others."""


def write_report(folder: Path, report: Report, pictures: Sequence[Picture]) -> None:
    """report.json, its images and volumes, and the page, into a folder that is there."""
    write_json(folder / "report.json", report)
    (folder / "images").mkdir(exist_ok=True)
    for picture in pictures:
        (folder / picture.file).parent.mkdir(exist_ok=True)
        write_bytes(folder / picture.file, picture.content)
    write_page(folder)


def write_page(folder: Path) -> None:
    """report.html of a folder that holds report.json, its images and its volumes."""
    report: Report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    # a report that was made before there were volumes has none
    files = [i["file"] for i in (*report["images"], *report.get("volumes", []))]
    content = {file: (folder / file).read_bytes() for file in files}
    write_bytes(folder / "report.html", render(report, content).encode())


def sums(folder: Path) -> str:
    """The text of SHA256SUMS, as `sha256sum -c` reads it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / SUMS)
    return "".join(f"{file_sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)


def close(folder: Path) -> None:
    """Write SHA256SUMS and flush everything: from here the folder is complete."""
    write_bytes(folder / SUMS, sums(folder).encode())
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def empty(path: Path) -> Path:
    """`path` as a new folder, whatever was there before."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path
