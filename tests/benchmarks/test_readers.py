"""The table of DICOM readers: what counts as right, refused and wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.benchmarks.readers import Case, Volume, outcome, same

AFFINE = np.diag([2.0, 2, 3, 1])


def volume(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((5, 4, 3)) * 100


def moved(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[1, 3] += mm
    return affine


def test_the_same_volume_may_be_scaled_but_not_moved() -> None:
    a = volume(0)
    assert same((a, AFFINE), (3 * a, moved(1e-3)))
    assert not same((a, AFFINE), (a, moved(0.1)))
    assert not same((a, AFFINE), (a[::-1], AFFINE))
    assert not same((a, AFFINE), (a[:4], AFFINE))
    assert not same((a, AFFINE), (a + 0.1, AFFINE))


def raises() -> list[Volume]:
    raise ValueError


@pytest.mark.parametrize(
    ("reader", "of_two", "of_none"),
    [
        (lambda: [(volume(1), AFFINE), (2 * volume(0), AFFINE)], "right", "wrong"),
        (lambda: [(volume(0), AFFINE)], "wrong", "wrong"),  # one is lost without a word
        (lambda: [(volume(0), AFFINE), (volume(2), AFFINE)], "wrong", "wrong"),
        (lambda: [(volume(0), AFFINE)] * 2, "wrong", "wrong"),
        (lambda: [], "refused", "right"),
        (raises, "refused", "right"),
    ],
)
def test_what_counts(
    tmp_path: Path, reader: Callable[[], list[Volume]], of_two: str, of_none: str
) -> None:
    file = tmp_path / "dicom/vendors/two.nii"
    file.parent.mkdir(parents=True)
    data = np.stack([volume(0), volume(1)], -1).astype(np.float32)
    nib.save(nib.Nifti1Image(data, AFFINE), file)
    assert outcome(lambda folder: reader(), Case("x", "f", ("two.nii",)), tmp_path) == of_two
    assert outcome(lambda folder: reader(), Case("x", "f"), tmp_path) == of_none
