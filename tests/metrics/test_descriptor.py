"""The descriptor sees what it must see, and a blur, a checkerboard or more noise does not hide."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import affine_transform, gaussian_filter

from synthmed.artifacts import ChannelInfo
from synthmed.metrics import MMD, descriptor
from synthmed.metrics.blocks import block_means, blocks, image_channels
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases
from tests.metrics.cohorts import cases, made, sides

Change = Callable[[np.ndarray], np.ndarray]


def scaled(volume: np.ndarray) -> np.ndarray:
    """3 % larger about the centre."""
    middle = (np.array(volume.shape) - 1) / 2
    return affine_transform(volume, np.full(3, 1 / 1.03), middle * (1 - 1 / 1.03), order=3)


def checkered(volume: np.ndarray) -> np.ndarray:
    return volume + 0.02 * (1 - 2 * (np.indices(volume.shape).sum(axis=0) % 2))


CHANGES: dict[str, Change] = {
    "blur of 0.4 voxel": lambda x: gaussian_filter(x, 0.4),
    "checkerboard of 2 %": checkered,
    "scale of 3 %": scaled,
    "contrast of 5 %": lambda x: x.mean() + 1.05 * (x - x.mean()),
}


def test_it_has_53_numbers_a_channel_in_the_stated_order() -> None:
    volume = np.random.default_rng(0).random((2, 2, 12, 10, 8)).astype(np.float32)
    found = descriptor.describe(volume)
    assert found.shape == (2, 106) and descriptor.LENGTH == 53 == len(descriptor.RESOLUTION)
    one = volume[1, 1]
    levels = np.quantile(one, descriptor.INTENSITY_LEVELS, method="nearest")
    assert found[1, 53 + 21 : 53 + 36] == pytest.approx(levels, abs=2e-3)
    share = [np.log(1e-4 + np.mean(one > t)) for t in (0.15, 0.4, 0.7)]
    assert found[1, 53 + 44 : 53 + 47] == pytest.approx(share)
    x = (np.nonzero(one > 0.15)[0] + 0.5) / 12
    assert found[1, 53 + 47] == pytest.approx(x.std())


def test_empty_constant_and_broken_volumes_have_finite_descriptors() -> None:
    volumes = np.zeros((3, 1, 8, 8, 8), dtype=np.float32)
    volumes[1] = 1.0
    volumes[2, 0, 0, 0, 0] = np.nan
    names = np.array(["a", "b", "c"])
    found = [descriptor.describe(b) for b in blocks(Cases(volumes, names, [{}] * 3), [0])]
    assert np.isfinite(np.concatenate(found)).all()


def test_masks_are_not_described() -> None:
    channels = [ChannelInfo("T1w"), ChannelInfo("seg", "seg", 1), ChannelInfo("T2w")]
    assert image_channels(channels) == (0, 2)


def test_block_means_average_areas_also_at_fractional_ratios() -> None:
    volume = np.random.default_rng(1).random((1, 1, 5, 6, 4)).astype(np.float32)
    found = block_means(volume, (2, 3, 8))
    assert found.shape == (1, 1, 2, 3, 4)
    first = (volume[0, 0, 0] + volume[0, 0, 1] + 0.5 * volume[0, 0, 2]) / 2.5
    assert found[0, 0, 0] == pytest.approx((first[0::2] + first[1::2]) / 2, abs=1e-6)


def test_block_means_on_a_grid_that_lies_ahead() -> None:
    volume = np.random.default_rng(1).random((1, 1, 5, 6, 4)).astype(np.float32)
    found = block_means(volume, (2, 3, 4), (0.5, 0.0, 0.5))
    assert found.shape == (1, 1, 2, 3, 4)
    along_x = volume[0, 0].copy()
    # 2.5 voxels a voxel of the grid, 1.25 ahead; the last averages the 1.25 that are left
    first = (0.75 * along_x[1] + along_x[2] + 0.75 * along_x[3]) / 2.5
    last = (0.25 * along_x[3] + along_x[4]) / 1.25
    for row, expected in enumerate((first, last)):
        pairs = (expected[0::2] + expected[1::2]) / 2
        half = np.concatenate([(pairs[:, :-1] + pairs[:, 1:]) / 2, pairs[:, -1:]], axis=1)
        assert found[0, 0, row] == pytest.approx(half, abs=1e-6)


def test_values_beyond_float16_are_judged_not_infinite() -> None:
    volumes = np.array([1e6, -1e6, np.inf, np.nan], dtype=np.float32).reshape(1, 1, 2, 2, 1)
    (block,) = blocks(Cases(volumes, np.array(["s"]), [{}]), (0,))
    assert block.ravel().tolist() == [65504, -65504, 0, 0]


def seen(train: Cases, holdout: Cases, changed: np.ndarray) -> tuple[float, float]:
    """(lower bound, permutation p) of mmd2 of a changed holdout against train."""
    given = sides(train, train, made(changed), resamples=199)
    (found, _) = MMD().estimate(given, Shared(given))
    return found.ci[0], float(found.note.split("p = ")[1].split(" ")[0])


@pytest.fixture(scope="module")
def phantoms() -> tuple[Cases, Cases]:
    rng = np.random.default_rng(2)
    return cases(rng, 80, "t"), cases(rng, 60, "h")


def test_an_untouched_holdout_is_not_seen(phantoms: tuple[Cases, Cases]) -> None:
    low, p = seen(*phantoms, phantoms[1].volumes)
    assert low <= 0 and p > 0.01


@pytest.mark.parametrize("name", [*CHANGES, "50 % more noise"])
def test_planted_changes_are_seen(phantoms: tuple[Cases, Cases], name: str) -> None:
    volumes = phantoms[1].volumes[:, 0].astype(np.float32)
    if name in CHANGES:
        changed = np.stack([CHANGES[name](v) for v in volumes])
    else:  # the phantoms' noise is 0.02: its variance grows by 1.5^2 - 1
        rng = np.random.default_rng(3)
        changed = volumes + 0.02 * np.sqrt(1.25) * rng.standard_normal(volumes.shape)
    low, p = seen(*phantoms, changed[:, None])
    assert low > 0 and p <= 0.01


@pytest.mark.real_data
@pytest.mark.skipif("SYNTHMED_REAL_DATA" not in os.environ, reason="SYNTHMED_REAL_DATA is not set")
@pytest.mark.parametrize("name", ["blur of 0.4 voxel", "checkerboard of 2 %"])
def test_planted_changes_are_seen_in_real_hippocampi(name: str) -> None:
    nib = pytest.importorskip("nibabel")
    folder = Path(os.environ["SYNTHMED_REAL_DATA"]) / "hippocampus"
    with (folder / "participants.tsv").open() as handle:
        table = list(csv.DictReader(handle, delimiter="\t"))
    first = {row["subject_group"]: row["image"] for row in reversed(table)}
    volumes = []
    for image in first.values():
        raw = np.asarray(nib.load(folder / image).dataobj, dtype=np.float32)
        low, high = np.percentile(raw, [0.5, 99.5])
        volumes.append(np.clip((raw - low) / (high - low), -0.2, 1.5)[None])
    x = np.stack(volumes).astype(np.float16)
    people = np.array(list(first))
    order = np.random.default_rng(4).permutation(len(x))
    train, holdout = (Cases(x[i], people[i], [{}] * len(i)) for i in (order[:66], order[66:]))
    assert seen(train, holdout, holdout.volumes)[1] > 0.01
    changed = np.stack([CHANGES[name](v.astype(np.float32)) for v in holdout.volumes[:, 0]])
    low, p = seen(train, holdout, changed[:, None])
    assert low > 0 and p <= 0.01
