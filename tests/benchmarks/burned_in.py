"""Text drawn into pixels: what of it is found, what stays readable, and false alarms.

    SYNTHMED_REAL_DATA=... python tests/benchmarks/burned_in.py

MR slices with fake identities drawn into them, each with a list of the boxes of its text, and
slices of scanners and cohorts without any. A box counts where half of it lies inside the picture.
It is *found* where nine tenths of what lies inside are painted over. It is *readable* where the
recogniser of rapidocr, told where to look, gives at least half of the listed characters back: text
drawn in white on white is listed as well. (This part needs OpenCV, and so a graphics library.)

The constants of synthmed/deid/pixels.py that raise an alarm were chosen on one series with text and
on every other series without; the table says which. What is painted round an alarm was chosen with
all series in view.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom

from synthmed.deid import pixels
from synthmed.formats import dicom, nifti, stack
from synthmed.formats.refusal import Refused, quiet
from synthmed.formats.volumes import volumes
from tests.benchmarks.cohorts import publish, real_data
from tests.formats import make

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- burned-in:begin -->", "<!-- burned-in:end -->"
CHOSEN_ON = "abdomen_siemens_24"
"""The series with text that the constants of an alarm were chosen on."""
FOUND = 0.9
"""Part of a box that is painted over."""
READ = 0.5
"""Likeness of what is read to what is listed (difflib's ratio of letters and digits)."""
COHORTS = {"brain3mm": 20, "hippocampus": 15, "acdc": 20}
"""Scans of each that slices are drawn from."""

Plane = npt.NDArray[Any]
Box = tuple[int, int, int, int]


def listed(root: Path) -> Iterator[tuple[str, Plane, list[tuple[Box, str]]]]:
    """Series, picture, and (left, top, right, bottom) and text of each box in it."""
    for path in sorted((root / "dicom" / "phi").glob("*/*.dcm")):
        plane = pydicom.dcmread(path).pixel_array
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["annotation"]
        parts = [part for entry in told for part in (entry["key"], entry["value"])]
        boxes = [(p["bbox"], p["text"]) for p in parts if any(p.get("bbox", ()))]
        inside = []
        for (left, top, right, bottom), text in boxes:
            if plane[top:bottom, left:right].size >= (right - left) * (bottom - top) / 2:
                inside.append(((left, top, right, bottom), text))
        yield path.parent.name, plane, inside


def clean(root: Path) -> list[tuple[str, str, Plane]]:
    """Group, series and picture of slices without text: a seeded sample, sorted by series."""
    rng = np.random.default_rng(0)
    out = []
    for folder in (root / "dicom" / "vendors", *sorted((root / "dicom" / "refuse").iterdir())):
        slices, _, where = make.headers(folder)
        for group in dicom.series(slices):
            try:
                every = volumes(group.slices)
            except Refused:
                continue
            for k in sorted(rng.choice(len(every), min(4, len(every)), replace=False)):
                try:
                    image = stack.read(every[k].slices, where)
                except Refused:
                    continue
                (planes,) = pixels._slicings(image, stored=True)
                name = f"{Path(every[k].slices[0].path).parent} {group.slices[0].series}"
                for z in sorted(rng.choice(len(planes), min(12, len(planes)), replace=False)):
                    out.append((sized(planes[z]), name, planes[z]))
    for cohort, n in COHORTS.items():
        files = sorted((root / cohort / "images").glob("*.nii*"))
        files = files or sorted((root / cohort).rglob("*.nii*"))
        for k in sorted(rng.choice(len(files), min(n, len(files)), replace=False)):
            data = nifti.read(files[k]).data
            middle = np.arange(data.shape[2] // 5, data.shape[2] * 4 // 5)
            for z in sorted(rng.choice(middle, 5, replace=False)):
                out.append((cohort, f"{cohort} {files[k].name}", data[:, :, z].T))
    return sorted(out, key=lambda o: o[1])


def sized(plane: Plane) -> str:
    """What the table calls a scanner's slice."""
    return "scanners, 28 to 72 pixels" if max(plane.shape) < 100 else "scanners, 112 to 256 pixels"


class Reader:
    """The recogniser, told where to look."""

    def __init__(self) -> None:
        import cv2  # type: ignore[import-not-found,unused-ignore]
        from rapidocr_onnxruntime import RapidOCR  # type: ignore[import-untyped,unused-ignore]

        self._resize = lambda a: cv2.resize(a, None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC)
        self._engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def reads(self, plane: Plane, box: Box, text: str) -> bool:
        """Whether the text of a box comes out, from it or from its negative."""
        left, top, right, bottom = box
        own = plane[top:bottom, left:right].astype(np.float32)
        if own.min() == own.max():
            return False
        padded = np.pad(plane, 3, mode="edge")[top : bottom + 6, left : right + 6]
        grey = np.clip((padded - own.min()) / (own.max() - own.min()), 0, 1) * 255
        for shown in (grey, 255 - grey):
            picture = np.stack([self._resize(shown.astype(np.uint8))] * 3, -1)
            said = self._engine.text_rec([picture])[0][0][0]
            if difflib.SequenceMatcher(None, plain(text), plain(said)).ratio() >= READ:
                return True
        return False


def plain(text: str) -> str:
    """Letters and digits."""
    return "".join(c for c in text.lower() if c.isalnum())


def of_text(root: Path) -> str:
    """A row a series: slices with an alarm, boxes found, boxes readable before and after."""
    reader = Reader()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for series, plane, boxes in listed(root):
        row = counts[series]
        row["slices"] += 1
        row["alarms"] += pixels.found(plane[None])
        painted, mask = pixels.painted(plane[None])
        row["again"] += pixels.found(painted)
        beside = mask[0].copy()
        for box, text in boxes:
            left, top, right, bottom = box
            beside[max(0, top - 6) : bottom + 6, max(0, left - 6) : right + 6] = False
            found = bool(mask[0, top:bottom, left:right].mean() >= FOUND)
            readable = reader.reads(plane, box, text)
            row["boxes"] += 1
            row["found"] += found
            row["readable"] += readable
            row["readable found"] += found and readable
            row["left"] += readable and reader.reads(painted[0], box, text)
        row["beside, 1/10000"] += round(10000 * float(beside.mean()))
        print(series, dict(row), file=sys.stderr)
    head = ["series", "slices", "with an alarm", "alarm after masking", "boxes found",
            "readable boxes found", "readable after masking", "masked beside text"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    for series, n in counts.items():
        name = series + (" (chosen on)" if series == CHOSEN_ON else "")
        cells = [name, n["slices"], n["alarms"], n["again"], f"{n['found']} of {n['boxes']}",
                 share(n["readable found"], n["readable"]), n["left"],
                 f"{n['beside, 1/10000'] / n['slices'] / 100:.1f} %"]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def without_text(root: Path) -> str:
    """A row a group: slices, and how many raise an alarm."""
    every = clean(root)
    chosen_on = set(sorted({series for _, series, _ in every})[0::2])
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for group, series, plane in every:
        side = "chosen" if series in chosen_on else "other"
        counts[group][side] += 1
        begun = time.perf_counter()
        counts[group][f"{side} alarms"] += pixels.found(plane[None])
        counts[group]["ms"] += round(1000 * (time.perf_counter() - begun))
    lines = ["| without text | false alarms | on series of the choice | ms a slice |",
             "|---|---|---|---|"]  # fmt: skip
    for group, n in sorted(counts.items()):
        cells = [group, f"{n['other alarms']} of {n['other']}",
                 f"{n['chosen alarms']} of {n['chosen']}",
                 f"{n['ms'] / (n['chosen'] + n['other']):.0f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(part: int, whole: int) -> str:
    """Part, whole, and per cent.

    >>> share(19, 20)
    '19 of 20 (95 %)'
    """
    return f"{part} of {whole}" + (f" ({100 * part / whole:.0f} %)" if whole else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and put them into the page."""
    parser = argparse.ArgumentParser(description="Text drawn into pixels.")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    root = real_data()
    versions = ", ".join(f"{n} {version(n)}" for n in ("rapidocr-onnxruntime", "onnxruntime"))
    with quiet():
        text = f"{without_text(root)}\n\n{of_text(root)}"
    command = "`python tests/benchmarks/burned_in.py`"
    publish(options.page, f"{command}, {versions}, one thread:\n\n{text}", BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
