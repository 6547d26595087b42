"""region_volume_smd: closed forms, and regions that are planted too large."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from synthmed.artifacts import ChannelInfo
from synthmed.metrics import RegionVolumeSMD, anatomy
from synthmed.metrics.adjusted import encoded, without_labels
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.types import Estimate
from tests.metrics.cohorts import GRID, cases, made, sides


def balls(seed: int, n: int, prefix: str, growth: float = 1.0) -> Cases:
    """An image, a drawn mask of two labels, the second `growth` times as large, and a given one."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, k) for k in GRID), indexing="ij")
    volumes = np.zeros((n, 4, *GRID), np.float16)
    for i in range(n):
        for channel, middle, factor in ((1, -0.4, 1.0), (2, 0.4, growth)):
            radius = (0.3 + 0.03 * rng.standard_normal()) * factor ** (1 / 3)
            distance = np.sqrt((x - middle) ** 2 + y**2 + z**2)
            volumes[i, channel] = np.clip((radius - distance) / 0.1 + 0.5, 0, 1)
        volumes[i, 0] = 0.4 * volumes[i, 1] + 0.8 * volumes[i, 2]
        volumes[i, 3] = 1 - volumes[i, 1]
    names = np.array([f"{prefix}{i:03d}" for i in range(n)])
    return Cases(volumes, names, [{} for _ in names])


CHANNELS = (
    ChannelInfo("T1w"),
    ChannelInfo("parts:left", mask="parts", label_value=1),
    ChannelInfo("parts:right", mask="parts", label_value=2),
    ChannelInfo("frame:all", mask="frame", label_value=1, given=True),
)


def measured(synthetic: Cases, with_masks: bool = True) -> dict[str | None, Estimate]:
    of = sides(balls(1, 50, "t"), balls(2, 40, "h"), synthetic)
    if with_masks:
        of = Sides(**{**of.__dict__, "channels": CHANNELS})
    return {e.slice: e for e in RegionVolumeSMD().estimate(of, Shared(of))}


def test_the_difference_is_the_t_statistic_for_equal_counts() -> None:
    """d = t sqrt(2 / n), with scipy's t of two samples."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 1, 30), rng.normal(3.5, 1.4, 30)
    d, (low, high) = anatomy.smd(x, y)
    assert d == pytest.approx(abs(reference.ttest_ind(x, y).statistic) * np.sqrt(2 / 30), rel=1e-12)
    assert 0 <= low < d < high
    assert anatomy.smd(np.ones(5), np.ones(7))[0] == 0


@pytest.mark.parametrize("truth", [0.0, 0.8])
def test_the_interval_covers_the_truth(truth: float) -> None:
    """At no difference the size of d is above 0 and its interval begins there."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        _, (low, high) = anatomy.smd(rng.normal(truth, 1, 40), rng.normal(0, 1, 60))
        covered += low <= truth <= high
    assert covered >= 0.92 * 400


@pytest.mark.parametrize(("spread", "n", "m"), [(0.3, 1000, 60), (0.5, 500, 60), (1, 60, 60)])
@pytest.mark.parametrize("truth", [0.0, 0.6])
def test_the_interval_covers_where_a_cohort_is_less_various(
    spread: float, n: int, m: int, truth: float
) -> None:
    """In units of the root of the mean variance. With equal variances assumed, 85 % at 0.3."""
    rng = np.random.default_rng(2)
    shift = truth * np.sqrt((1 + spread**2) / 2)
    made_up, people = rng.normal(shift, spread, (3000, n)), rng.normal(0, 1, (3000, m))
    ends = [anatomy.smd(x, y)[1] for x, y in zip(made_up, people, strict=True)]
    covered = np.mean([low <= truth <= high for low, high in ends])
    assert 0.935 <= covered <= 0.965  # 0.95, and nearly four standard errors


def test_the_least_spread_stands_for_that_of_both_samples() -> None:
    """Regions that are all alike: as with normal samples of that spread, never a point."""
    d, (low, high) = anatomy.smd(np.full(30, 1.02), np.full(20, 1.0), 0.1)
    reach = 1.959964 * np.sqrt(1 / 30 + 1 / 20 + d**2 * (1 / 29 + 1 / 19) / 8)
    assert d == pytest.approx(0.2) and low == 0 and high == pytest.approx(d + reach, rel=1e-6)


def test_a_region_that_is_too_large_is_named() -> None:
    found = measured(made(balls(3, 40, "s", growth=1.5).volumes))
    assert set(found) == {None, "region=parts:left", "region=parts:right"}  # not what was given
    right, left = found["region=parts:right"], found["region=parts:left"]
    assert right.ci[0] > 0.3 and left.ci[0] < 0.3
    assert found[None].value == right.value
    assert found[None].note.startswith("worst of 2: region=parts:right")
    honest = measured(made(balls(4, 40, "s").volumes))[None]
    assert honest.ci[0] < 0.3
    assert honest.floor < honest.ceiling


def test_volumes_are_millimetres_of_soft_masks_and_a_patient_counts_once() -> None:
    one = balls(1, 6, "t")
    twice = Cases(one.volumes, np.array(["a", "a", "b", "c", "d", "e"]), one.labels)
    of = Sides(
        **{**sides(twice, one, one).__dict__, "channels": CHANNELS, "spacing_mm": (2.0, 1.0, 3.0)}
    )
    found = anatomy._volumes(Shared(of), "train", [1, 2], None)
    expected = one.volumes[:, 1:3].astype(np.float64).sum(axis=(2, 3, 4)) * 6
    np.testing.assert_allclose(found[1:], expected[2:], rtol=1e-3)
    np.testing.assert_allclose(found[0], expected[:2].mean(axis=0), rtol=1e-3)


def test_without_masks_tissue_classes_are_told_apart() -> None:
    rng = np.random.default_rng(5)
    train, holdout = cases(rng, 40, "t"), cases(rng, 30, "h")
    honest = cases(rng, 30, "s").volumes
    spoilt = np.where(honest > 0.5, honest * np.float16(1.15), honest)  # brighter white matter
    found = []
    for volumes in (honest, spoilt):
        of = sides(train, holdout, made(volumes))
        estimates = {e.slice: e for e in RegionVolumeSMD().estimate(of, Shared(of))}
        assert set(estimates) == {None, *(f"region={name}" for name in anatomy.CLASSES)}
        found.append(estimates)
    assert found[0][None].ci[0] < 0.3
    assert found[1]["region=bright tissue"].ci[0] > 0.3
    assert found[1][None].ci[0] > 0.3


def labelled(seed: int, n: int, prefix: str) -> Cases:
    """Balls whose right part is six times as large in the ill half of the people."""
    rng = np.random.default_rng(seed)
    well, ill = balls(seed, n // 2, "a"), balls(seed + 1, n // 2, "b", growth=6.0)
    names = np.array([f"{prefix}{i:03d}" for i in range(2 * (n // 2))])
    labels = [
        {"kind": ["well", "ill"][i >= n // 2], "age": float(rng.uniform(20, 80))}
        for i in range(len(names))
    ]
    return Cases(np.concatenate([well.volumes, ill.volumes]), names, labels)


def given_labels(synthetic: Cases) -> dict[str | None, Estimate]:
    of = sides(
        labelled(11, 60, "t"),
        labelled(21, 50, "h"),
        made(synthetic.volumes, list(synthetic.labels)),
        categorical={"kind": ("well", "ill")},
        continuous={"age": (20.0, 80.0)},
    )
    of = Sides(**{**of.__dict__, "channels": CHANNELS})
    return {e.slice: e for e in RegionVolumeSMD().estimate(of, Shared(of))}


RIGHT = "region=parts:right"


def test_given_labels_a_smaller_difference_is_seen() -> None:
    """People differ by their label sixfold, so that a fifth more is lost in it and seen beside."""
    honest = labelled(31, 80, "s")
    found = given_labels(honest)
    assert found[RIGHT].ci[0] == 0 and found[f"{RIGHT}, given labels"].ci[0] == 0
    volumes = honest.volumes.copy()
    volumes[:, 2] *= 1.3
    grown = given_labels(Cases(volumes, honest.patients, honest.labels))
    alone, beside = grown[RIGHT], grown[f"{RIGHT}, given labels"]
    assert alone.ci[0] == 0 and beside.ci[0] > 0
    assert beside.value > 1.5 * alone.value
    assert beside.floor < beside.value and beside.ceiling > beside.floor


def test_what_labels_leave_is_what_a_regression_leaves() -> None:
    """statsmodels is not here: the normal equations by hand, in another order of operations."""
    rng = np.random.default_rng(5)
    labels = [{"kind": "ab"[i % 2], "age": float(rng.uniform(0, 10))} for i in range(30)]
    labels[3] = {"age": 4.0}
    design = encoded(labels, {"kind": ("a", "b")}, {"age": (0.0, 10.0)})
    assert design[3].tolist() == [1, 0, 1, 0.4, 0]
    volumes = np.exp(rng.normal(5, 0.1, (30, 2)))
    left = without_labels(design, volumes)
    assert left is not None
    used = design[:, :4]
    weights = np.linalg.inv(used.T @ used) @ used.T @ np.log1p(volumes)
    np.testing.assert_allclose(left(design, volumes), np.log1p(volumes) - used @ weights, atol=1e-9)
    np.testing.assert_allclose(used.T @ left(design, volumes), 0, atol=1e-8)
    assert without_labels(design[:19], volumes[:19]) is None
