"""Synthetic volumes on disk: what is written is what is read, images and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from synthmed.artifacts import ChannelInfo, Sample
from synthmed.formats import synthetic

CHANNELS = (
    ChannelInfo("T1w"),
    ChannelInfo("FLAIR"),
    ChannelInfo("seg:a", mask="seg", label_value=2),
    ChannelInfo("seg:b", mask="seg", label_value=7),
)
SHAPE = (4, 8, 9, 10)


def volume(seed: int = 0) -> np.ndarray:
    """Random images within the prepared range, and hard masks."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1.25, SHAPE).astype(np.float32)
    owner = rng.integers(0, 3, SHAPE[1:])
    x[2], x[3] = owner == 1, owner == 2
    return x


def test_a_mask_is_one_file_whatever_its_labels() -> None:
    assert synthetic.volume_names(CHANNELS) == ["T1w", "FLAIR", "seg"]


def test_masks_come_back_exactly_and_images_to_half_a_unit() -> None:
    x = volume()
    back = synthetic.decode(synthetic.encode(x, CHANNELS), CHANNELS)
    assert back.shape == x.shape
    np.testing.assert_array_equal(back[2:], x[2:])
    # half a unit of the integers, and the rounding of float16
    assert np.abs(back[:2] - x[:2]).max() <= 0.5 / synthetic.UNIT + 2**-11 * 1.25


@given(hnp.arrays(np.int16, (3, 3, 3), elements=st.integers(0, 1250)))
def test_a_second_round_changes_nothing(values: np.ndarray) -> None:
    """What was once written is a fixed point: screening and release see the same numbers."""
    image = (ChannelInfo("T1w"),)
    once = synthetic.decode({"T1w": values}, image)
    twice = synthetic.encode(once.astype(np.float32), image)["T1w"]
    np.testing.assert_array_equal(twice, values)


def test_a_voxel_takes_its_largest_label() -> None:
    """Against a loop over voxels, the background being what the labels leave."""
    rng = np.random.default_rng(3)
    x = np.zeros((4, 4, 4, 4), np.float32)
    x[2:] = rng.dirichlet((1, 1, 1), (4, 4, 4)).transpose(3, 0, 1, 2)[:2]
    seg = synthetic.encode(x, CHANNELS)["seg"]
    for at in np.ndindex(4, 4, 4):
        a, b = x[2][at], x[3][at]
        expected = max((1 - a - b, 0), (a, 2), (b, 7))[1]
        assert seg[at] == expected


def test_files_hold_integers_geometry_and_nothing_else(tmp_path: Path) -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = [-8, -13, -18]
    files = {name: f"syn-000000_{name}.nii.gz" for name in synthetic.volume_names(CHANNELS)}
    synthetic.write(tmp_path, files, volume(), CHANNELS, affine)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files.values())
    for name, file in files.items():
        image: Any = nib.load(tmp_path / file)
        np.testing.assert_allclose(image.affine, affine)
        stored = np.asarray(image.dataobj)
        np.testing.assert_array_equal(stored, synthetic.encode(volume(), CHANNELS)[name])
        assert not image.header.extensions
        assert bytes(image.header["descrip"]).strip(b"\0") == b""


def test_samples_are_read_in_their_order_and_from_their_folders(tmp_path: Path) -> None:
    folders, samples = [], []
    for k in (3, 1):
        folder = tmp_path / f"place{k}"
        folder.mkdir()
        files = {n: f"syn-{k:06d}_{n}.nii.gz" for n in synthetic.volume_names(CHANNELS)}
        synthetic.write(folder, files, volume(k), CHANNELS, np.eye(4))
        folders.append(folder)
        samples.append(Sample(index=k, labels={}, files=files))
    read = synthetic.read(samples, folders, CHANNELS)
    assert read.shape == (2, *SHAPE)
    assert read.dtype == np.float16
    for row, k in zip(read, (3, 1), strict=True):
        expected = synthetic.decode(synthetic.encode(volume(k), CHANNELS), CHANNELS)
        np.testing.assert_array_equal(row, expected)


def test_an_unfinished_write_has_no_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the way of the first file: the second is not written, the first not half."""
    (tmp_path / ".a.nii.gz").mkdir()
    with pytest.raises(OSError, match="directory"):
        synthetic.write(tmp_path, {"T1w": "a.nii.gz"}, volume()[:1], CHANNELS[:1], np.eye(4))
    assert not (tmp_path / "a.nii.gz").exists()
