"""dcm2niix as a second engine: its voxels, where it and the reader of this package agree on places.

Which files make a volume, whose it is and whether its stack is even is decided here as always;
dcm2niix (Li et al. 2016, doi:10.1016/j.jneumeth.2016.03.001; BSD-2) decodes and scales.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from synthmed.errors import UsageError, pip
from synthmed.formats import nifti, stack
from synthmed.formats.dicom import Slice
from synthmed.formats.nifti import Image
from synthmed.formats.refusal import Refused

TIMEOUT_SECONDS = 600
"""For one series."""
PLACE_MM = 0.01
"""How far a corner of the volume may lie from where the headers put it."""


def binary() -> Path:
    """The program of the package dcm2niix.

    Raises:
        UsageError: it is not installed.
    """
    found = importlib.util.find_spec("dcm2niix")
    if found is None or found.origin is None:
        raise UsageError(
            "data.engine dcm2niix: not installed",
            f"Install it with: {pip('dcm2niix')}, or take data.engine: own.",
        )
    return Path(found.origin).with_name("dcm2niix")


def read(slices: Sequence[Slice], where: Callable[[str], Path]) -> Image:
    """The volume that slices make, in RAS+.

    Args:
        slices: in any order.
        where: a slice's path to its file.

    Raises:
        Refused: they form no even stack, or the program makes another volume of them.
    """
    ordered, affine = stack.geometry(slices)
    rows, columns = ordered[0].pixels[:2]
    claimed = nifti.canonical(np.empty((columns, rows, len(ordered)), np.bool_), affine)
    with tempfile.TemporaryDirectory(prefix="synthmed-dcm2niix-") as folder:
        inputs, outputs = Path(folder, "in"), Path(folder, "out")
        inputs.mkdir()
        outputs.mkdir()
        # names of our own: the program tells what it reads, and files may be named after patients
        for k, path in enumerate(dict.fromkeys(s.path for s in ordered)):
            (inputs / f"{k:06d}.dcm").symlink_to(where(path).resolve())
        # one volume, uncompressed, named alike, no sidecar
        words = ["-b", "n", "-z", "n", "-f", "v", "-o", str(outputs), str(inputs)]
        try:
            subprocess.run(
                [str(binary()), *words],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=TIMEOUT_SECONDS,
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise Refused("engine_failed", "It took too long.") from None
        except subprocess.CalledProcessError:
            raise Refused("engine_failed") from None
        made = sorted(outputs.glob("*.nii"))
        if len(made) != 1:
            raise Refused("engine_failed", f"It made {len(made)} volumes of one.")
        image = nifti.read(made[0])
    far = np.array([[0, 0, 0, 1], [*(n - 1 for n in claimed.data.shape), 1]])
    apart = (image.affine - claimed.affine) @ far.T
    if image.data.shape != claimed.data.shape or np.abs(apart).max() > PLACE_MM:
        raise Refused("engine_failed", "It puts the voxels elsewhere.")
    return image
