"""Faces taken off heads, and what is no head refused: the table in docs/benchmarks.md.

    apt-get install mricron-data; pip install --no-deps pydeface
    SYNTHMED_REAL_DATA=... python tests/benchmarks/faces.py

Heads: Colin27 (MRIcron's `ch2`, one man scanned 27 times; cut off under the nose), whose brain is
known from BET (`ch2bet`) and his face by its distance from that; and pydeface's template (a mean
of heads), whose face is known from pydeface's mask. Both also turned, coarse and noisy. Brains
without a skull, hearts and phantoms come from SYNTHMED_REAL_DATA.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import distance_transform_edt, rotate

from synthmed.deid import deface
from synthmed.formats.nifti import Image
from synthmed.formats.refusal import Refused
from tests.benchmarks.cohorts import publish, real_data

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- faces:begin -->", "<!-- faces:end -->"
MRICRON = Path("/usr/share/mricron/templates")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A volume, and what is known of it: its brain, its face."""

    name: str
    data: Array
    spacing_mm: tuple[float, ...]
    brain: Array | None = None
    face: Array | None = None

    def changed(self, name: str, change: Callable[[Array], Array], axes: str = "xyz") -> Case:
        """The same, turned: `axes` says where the old axes lie."""
        known = (None if m is None else change(m) for m in (self.brain, self.face))
        spacing = tuple(self.spacing_mm["xyz".index(a)] for a in axes)
        return Case(f"{self.name}, {name}", change(self.data), spacing, *known)


def read(file: Path) -> tuple[Array, tuple[float, ...]]:
    """The first volume of a NIfTI file in RAS+, and its voxel size."""
    image: Any = nib.as_closest_canonical(nib.load(file))
    data = np.asarray(image.dataobj, dtype=np.float32)
    data = data[..., 0] if data.ndim == 4 else data
    return data, tuple(np.linalg.norm(image.affine[:3, :3], axis=0))


def colin(folder: Path) -> Iterator[Case]:
    """One man's head."""
    data, spacing = read(folder / "ch2.nii.gz")
    brain = read(folder / "ch2bet.nii.gz")[0] > 0
    # what lies 1 cm and more before or under the brain: brow, eyes, root of the nose
    far = distance_transform_edt(~brain) > 10
    place = np.argwhere(brain)
    front = np.indices(data.shape)[1] > place[:, 1].mean()
    face = far & front & (data > 0.1 * data.max())
    head = Case("Colin27", data, spacing, brain, face)
    yield head
    noise = np.random.default_rng(0).normal(0, 12, data.shape).astype(np.float32)
    yield Case("Colin27, noisy", np.abs(data + noise), spacing, brain, face)
    thick = Case("Colin27", data, (4, 1, 1), brain, face)
    yield thick.changed("sagittal slices of 4 mm", lambda m: m[::4])
    thick = Case("Colin27", data, (1, 1, 5), brain, face)
    yield thick.changed("axial slices of 5 mm", lambda m: m[:, :, ::5])
    inverted = np.where(data > 10, np.percentile(data, 99.9) - data, 0).clip(0)
    yield Case("Colin27, inverted contrast", inverted, spacing, brain, face)


def template() -> Iterator[Case]:
    """A mean of heads."""
    found = find_spec("pydeface")
    folder = Path(str(found.origin if found else "")).parent / "data"
    data, spacing = read(folder / "mean_reg2mean.nii.gz")
    face = (read(folder / "facemask.nii.gz")[0] == 0) & (data > np.percentile(data, 75))
    head = Case("template", data, spacing, face=face)
    yield head
    yield head.changed("turned by 25 degrees", lambda m: _turned(m, 25))
    yield head.changed("turned by 90 degrees", lambda m: np.rot90(m, axes=(0, 1)), "yxz")
    yield head.changed("lying on its back", lambda m: np.rot90(m, axes=(1, 2)), "xzy")
    yield head.changed("upside down", lambda m: m[:, :, ::-1])
    yield head.changed("back to front", lambda m: m[:, ::-1])
    yield head.changed("lower half", lambda m: m[:, :, :110])


def _turned(values: Array, degrees: float) -> Array:
    """About the axis from foot to head, as a scan with an oblique affine is stored."""
    order = 0 if values.dtype == bool else 1
    out: Array = rotate(values, degrees, axes=(0, 1), reshape=False, order=order)
    return out


def others(root: Path) -> Iterator[Case]:
    """Brains without a skull, slabs, and what is no head."""
    for k, file in enumerate(sorted((root / "brain3mm/images").iterdir())[::8]):
        data, spacing = read(file)
        yield Case(f"brain3mm, no. {8 * k + 1}", data, spacing, data > 0)
    vendors = root / "dicom/vendors"
    for name, path in {
        "EPI, whole brain": "dcm_qa_12bit/Ref/2.nii",
        "EPI, slab of 75 mm": "dcm_qa_nih/Ref/DCM2NIIX_regression_test_4.nii",
        "phantom, ball": "dcm_qa_nih/Ref/EPI_PE=AP_3.nii",
        "phantom, cylinder": "dcm_qa_enh/Ref/Philips_WIP_B0_NS_801_e1.nii",
        "noise": "dicom2nifti/hyperfine/anatomical/001_ground_truth.nii.gz",
    }.items():
        yield Case(name, *read(vendors / path))
    for name in ("acdc", "hippocampus"):
        yield Case(name, *read(min((root / name / "images").iterdir())))
    radius = np.sqrt(((np.indices((60, 60, 60)) - 29.5) ** 2).sum(0))
    noise = np.random.default_rng(0).normal(0, 3, radius.shape)
    yield Case("even ball", (radius < 22) * 100 + noise, (3, 3, 3))


def row(case: Case, folder: Path) -> list[str]:
    """What became of a case: outcome, ml, how much of its brain stays and of its face is left."""
    data = np.ascontiguousarray(case.data, dtype=np.float32)
    image = Image(data, np.diag([*case.spacing_mm, 1.0]), "RAS")
    started = time.perf_counter()
    try:
        cut = deface.remove({"T1w": image}, ())
    except Refused as reason:
        return [case.name, "refused", reason.detail.split(";")[0].rstrip("."), "", ""]
    taken = time.perf_counter() - started
    (folder / f"{case.name.replace(' ', '-')}.png").write_bytes(cut.picture)
    # removed voxels lose their value; where that was background's already, nothing was there
    removed = cut.images["T1w"].data != data
    kept, left = "", ""
    if case.brain is not None:
        kept = f"{100 * (1 - removed[case.brain].mean()):.2f} %"
    if case.face is not None:
        left = f"{100 * (1 - removed[case.face].mean()):.2f} %"
    print(f"{taken:.1f} s", case.name, file=sys.stderr)
    return [case.name, "cut", f"{cut.brain_ml:.0f} ml", kept, left]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and put it into the page."""
    parser = argparse.ArgumentParser(description="Faces taken off heads.")
    parser.add_argument("--mricron", type=Path, default=MRICRON, help=f"default: {MRICRON}")
    parser.add_argument("--pictures", type=Path, help="an empty folder to keep the pictures in")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [colin(options.mricron), template(), others(real_data())]
    lines = ["| | | brain | brain that stays | face that is left |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.pictures or temporary)
        for case in (c for each in cases for c in each):
            lines.append("| " + " | ".join(row(case, folder)) + " |")
            print(lines[-1], file=sys.stderr)
    text = f"`python tests/benchmarks/faces.py`, deepbet {version('deepbet')}:\n\n"
    publish(options.page, text + "\n".join(lines), BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
