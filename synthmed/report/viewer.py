"""Volumes that a reader can leaf through: small copies beside the report, and the viewer in it.

The viewer is NiiVue (`vendor`), inlined with its licence. What the page may run is named by digest
in its Content-Security-Policy, so that nothing else in it can: no text of a config, no caption.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from synthmed.types import Affine

nib: Any = nibabel  # its functions carry no types

MAX_VOLUMES = 6
MAX_SIDE = 96
"""Voxels a side; a longer one is averaged down by a whole number."""
MARKUP_BYTES = 10_000
"""Room for the buttons and what else stands round the viewer in a page."""
TOP_PERCENT = 99.8
"""Brightness that becomes white."""


def small_copy(data: npt.NDArray[np.generic], affine: Affine) -> bytes:
    """A volume as .nii.gz of uint8, at most `MAX_SIDE` voxels a side; equal volumes, equal bytes.

    Args:
        data: (X, Y, Z).
        affine: (4, 4), voxels to millimetres.
    """
    values = np.asarray(data, dtype=np.float32)
    steps = [-(-n // MAX_SIDE) for n in values.shape]
    values = _averaged(values, steps)
    affine = affine @ _coarser(steps)
    low, high = float(values.min()), float(np.percentile(values, TOP_PERCENT))
    grey = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    image = nib.Nifti1Image((255 * grey).round().astype(np.uint8), affine)
    return gzip.compress(image.to_bytes(), mtime=0)


@dataclass(frozen=True)
class Scripts:
    """What a page with a viewer holds.

    Args:
        volumes: JSON list of base64 texts, safe inside a script element.
        library: NiiVue.
        program: what starts it.
        policy: digests of the two, for the Content-Security-Policy.
    """

    volumes: str
    library: str
    program: str
    policy: str


def scripts(contents: Sequence[bytes]) -> Scripts | None:
    """The scripts for volumes in the order of their buttons; null without any."""
    if not contents:
        return None
    texts = library(), _program()
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return Scripts(
        volumes=json.dumps([base64.b64encode(c).decode("ascii") for c in contents]),
        library=texts[0],
        program=texts[1],
        policy=" ".join(f"'sha256-{base64.b64encode(d).decode('ascii')}'" for d in digests),
    )


def cost(contents: Sequence[bytes]) -> int:
    """Bytes that the viewer of these volumes adds to a page."""
    if not contents:
        return 0
    texts = sum(len(text.encode()) for text in (library(), _program()))
    return texts + sum(-(-len(c) // 3) * 4 for c in contents) + MARKUP_BYTES


@cache
def library() -> str:
    """NiiVue as a page holds it, behind the licences that have to go with it."""
    return f"/*!\n{_text('vendor/LICENSES.txt')}*/\n{_text('vendor/niivue.js')}"


@cache
def _program() -> str:
    return _text("templates/viewer.js")


def _text(name: str) -> str:
    """A script that can stand inside an element of its own.

    Raises:
        ValueError: it holds what ends such an element, or changes when it is parsed.
    """
    text = files("synthmed.report").joinpath(name).read_text(encoding="utf-8")
    if "</script" in text.lower() or "<!--" in text or "\r" in text or "\0" in text:
        raise ValueError(f"{name}: cannot be inlined")
    return text


def _averaged(values: npt.NDArray[np.float32], steps: Sequence[int]) -> npt.NDArray[np.float32]:
    """Means of blocks of voxels; what is left over at the ends is cut off."""
    for axis, step in enumerate(steps):
        n = values.shape[axis] // step
        kept = np.moveaxis(values, axis, 0)[: n * step]
        means = kept.reshape(n, step, *kept.shape[1:]).mean(axis=1)
        values = np.moveaxis(means, 0, axis)
    return values


def _coarser(steps: Sequence[int]) -> Affine:
    """Voxels of the averaged grid to those of the full one: centres of blocks."""
    out = np.diag([*map(float, steps), 1.0])
    out[:3, 3] = (np.array(steps) - 1) / 2
    return out
