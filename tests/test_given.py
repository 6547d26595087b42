"""Masks to draw images for: on the grid, in order, and nobody's of the cohort."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY

from synthmed import configfile
from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.config import Config
from synthmed.errors import InputError
from synthmed.given import GivenMasks, given_masks
from synthmed.stages.prepare import conform_labels, grid_affine

GRID = (8, 9, 10)
AFFINE = grid_affine(GRID, (2, 2, 2))
CHANNELS = [
    ChannelInfo("T1w"),
    ChannelInfo("roi:core", "roi", 1, True),
    ChannelInfo("roi:rim", "roi", 7, True),
]


def config(folder: Path, *names: str) -> Config:
    labels = {"core": 1, "rim": 7}
    channels: dict[str, Any] = {"T1w": "image"}
    for name in names or ("roi",):
        channels[name] = {"column": name, "labels": labels, "given": True}
    tree = {**TINY, "data": {**TINY["data"], "channels": channels, "grid": list(GRID)}}
    return configfile.validate({**tree, "sample": {"masks": str(folder)}}, "test")


def labels(seed: int, shape: tuple[int, ...] = GRID) -> np.ndarray:
    return np.random.default_rng(seed).choice([0, 1, 7], shape).astype(np.uint8)


def write(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def masks(folder: Path, *names: str) -> GivenMasks:
    channels = CHANNELS
    if names:
        channels = [
            ChannelInfo(f"{n}:{k}", n, v, True) for n in names for k, v in (("core", 1), ("rim", 7))
        ]
    found = given_masks(config(folder, *names), channels, GRID, AFFINE)
    assert found is not None
    return found


def dataset(*maps: np.ndarray, held_out: int = 0) -> Dataset:
    """A patient a label map."""
    given = np.stack([np.stack([m == 1, m == 7]) for m in maps])
    n = len(maps)
    return Dataset(
        volumes=np.concatenate([np.zeros((n, 1, *GRID)), given], 1).astype(np.float16),
        patients=np.array([f"p{i:016x}" for i in range(n)]),
        labels=[{}] * n,
        holdout=np.arange(n) < held_out,
        channels=CHANNELS,
        affine=AFFINE,
    )


def test_a_mask_is_one_channel_a_label_in_the_order_of_file_names(tmp_path: Path) -> None:
    for name, seed in (("b/2.nii.gz", 2), ("a.nii.gz", 1), ("c.nii", 3)):
        write(tmp_path / name, labels(seed))
    (tmp_path / "README.md").write_text("not a mask")
    write(tmp_path / ".hidden.nii.gz", labels(9))
    found = masks(tmp_path)
    assert len(found) == 3
    for i, seed in enumerate((1, 2, 3)):
        expected = np.stack([labels(seed) == 1, labels(seed) == 7])
        assert np.array_equal(found.read(i), expected)
        assert found.read(i).dtype == np.float32


def test_a_mask_is_brought_to_the_grid_as_training_masks_are(tmp_path: Path) -> None:
    """Stored left to right, twice as fine and elsewhere in space: the same place on the grid."""
    fine = np.kron(labels(4), np.ones((2, 2, 2), np.uint8))
    affine = np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = [70, -30, 5]
    write(tmp_path / "m.nii.gz", fine[::-1].copy(), affine)
    found = masks(tmp_path).read(0)
    assert np.array_equal(found[0] + 7 * found[1], labels(4))
    straight = conform_labels(fine, np.diag([1.0, 1, 1, 1]), GRID, AFFINE)
    assert np.array_equal(straight, labels(4))


@pytest.mark.parametrize("held_out", [0, 1])
def test_a_patients_own_mask_is_refused_without_naming_its_file(
    tmp_path: Path, held_out: int
) -> None:
    """Held out or trained on: it is one anatomy of the cohort."""
    write(tmp_path / "Jane Doe.nii.gz", labels(1))
    write(tmp_path / "other.nii.gz", labels(2))
    found = masks(tmp_path)
    with pytest.raises(InputError) as error:
        found.check(dataset(labels(1), labels(5), held_out=held_out))
    text = str(error.value)
    assert "mask 1 of 2" in text and "the roi mask of patient p0000000000000000" in text
    assert "Jane" not in text
    # the control: one voxel less is another mask
    less = labels(1)
    less[tuple(np.argwhere(less)[0])] = 0
    assert found.check(dataset(less, labels(5), held_out=held_out))


def test_a_patients_mask_in_other_clothes_is_refused(tmp_path: Path) -> None:
    """Stored finer, turned and moved, it is the same on the grid, which is all that ships."""
    affine = np.diag([1.0, -1, 1, 1])
    affine[:3, 3] = [1, 2, 3]
    data = np.kron(labels(6), np.ones((2, 2, 2), np.uint8))[:, ::-1].copy()
    write(tmp_path / "m.nii.gz", data.astype(np.float32), affine)
    with pytest.raises(InputError, match=r"mask 1 of 1.*patient p0000000000000000"):
        masks(tmp_path).check(dataset(labels(6)))


def test_a_mask_for_slices_is_a_slice(tmp_path: Path) -> None:
    """Tilted it is the same slice; of a whole mask nobody knows which one was meant."""
    grid = (8, 9, 1)
    flat, place = labels(3, grid), grid_affine(grid, (2, 2, 2))
    angle = np.deg2rad(10)
    tilted = np.eye(4)
    tilted[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    write(tmp_path / "m.nii.gz", flat, tilted @ np.diag([2.0, 2, 6, 1]))
    found = given_masks(config(tmp_path), CHANNELS, grid, place)
    assert found is not None
    core, rim = found.read(0)
    assert np.array_equal(core + 7 * rim, flat)
    write(tmp_path / "m.nii.gz", labels(3, (8, 9, 4)))
    with pytest.raises(InputError, match="has 4 voxels along an axis of 1 in"):
        found.read(0)


def test_an_empty_mask_is_nobodys(tmp_path: Path) -> None:
    empty = np.zeros(GRID, np.uint8)
    write(tmp_path / "m.nii.gz", empty)
    assert masks(tmp_path).check(dataset(empty, labels(1)))


def test_the_digest_follows_the_voxels_and_not_the_names(tmp_path: Path) -> None:
    real = dataset(labels(9))
    marks = []
    for place, seed in (("a/x.nii.gz", 1), ("b/y.nii", 1), ("c/x.nii.gz", 2)):
        write(tmp_path / place, labels(seed))
        marks.append(masks(tmp_path / place[0]).check(real))
    assert marks[0] == marks[1] != marks[2]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: None, "no such folder"),
        (lambda f: f.mkdir(), "holds no .nii or .nii.gz file"),
        (lambda f: write(f / "m.nii.gz", labels(0) * 2), "mask 1 of 1.*holds the value 2; .*1, 7"),
        (lambda f: write(f / "m.nii.gz", labels(0) + np.float32(0.5)), "holds the value 0.5"),
        (lambda f: (f.mkdir(), (f / "m.nii").write_text("x")), "mask 1 of 1.*: The"),
        (lambda f: write(f / "m.nii.gz", np.stack([labels(0)] * 2, -1)), "not one three-dim"),
    ],
    ids=["missing", "empty", "labels", "fractions", "text", "4d"],
)
def test_a_folder_that_cannot_be_used_says_why(
    tmp_path: Path, make: Callable[[Path], Any], said: str
) -> None:
    make(tmp_path / "masks")
    with pytest.raises(InputError) as error:
        masks(tmp_path / "masks").check(dataset(labels(1)))
    assert str(error.value).startswith("sample.masks")
    assert re.search(said, str(error.value)), error.value


def test_several_given_channels_take_a_folder_each(tmp_path: Path) -> None:
    for k in range(2):
        write(tmp_path / f"roi/{k}.nii.gz", labels(k))
        write(tmp_path / f"organ/{k}.nii.gz", labels(10 + k))
    found = masks(tmp_path, "roi", "organ")
    assert found.read(1).shape == (4, *GRID)
    assert np.array_equal(found.read(1)[2], labels(11) == 1)
    write(tmp_path / "organ/1.nii.gz", labels(11), AFFINE @ np.diag([1.0, 1, 1.5, 1]))
    with pytest.raises(InputError, match=r"mask 2 of 2.*differ in shape or place"):
        found.read(1)
    write(tmp_path / "roi/2.nii.gz", labels(2))
    with pytest.raises(InputError, match="organ: 1 of 3 masks have no file here"):
        masks(tmp_path, "roi", "organ")


def test_without_a_given_channel_there_is_nothing_to_read() -> None:
    plain = configfile.validate(TINY, "test")
    assert given_masks(plain, [ChannelInfo("T1w")], GRID, AFFINE) is None
