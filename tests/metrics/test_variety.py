"""vendi and ms_ssim_diversity against closed forms and MONAI."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ms_ssim, compute_ssim_and_cs
from scipy import stats as reference
from scipy.ndimage import gaussian_filter

from synthmed.metrics import MSSSIMDiversity, Vendi, diversity, vendi
from synthmed.metrics.shared import Shared
from tests.metrics.cohorts import cases, made, sides


def test_vendi_of_clusters_counts_them() -> None:
    """c clusters of equal size, alike within and unlike between: exactly c."""
    for c, size in ((1, 6), (2, 5), (4, 3), (7, 1)):
        kernel = np.kron(np.eye(c), np.ones((size, size)))
        assert vendi.vendi(kernel) == pytest.approx(c, rel=1e-12)


def test_vendi_of_a_constant_likeness_is_the_closed_form() -> None:
    """Eigenvalues of (1 - r) I + r 1 1^T over n: (1 + (n - 1) r) / n once, (1 - r) / n else."""
    n, r = 9, 0.3
    values = np.array([(1 + (n - 1) * r) / n] + [(1 - r) / n] * (n - 1))
    expected = np.exp(-np.sum(values * np.log(values)))
    kernel = (1 - r) * np.eye(n) + r * np.ones((n, n))
    assert vendi.vendi(kernel) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("shape", "levels"), [((20, 22, 20), 1), ((24, 30, 40), 2),
                                               ((44, 46, 50), 3)])  # fmt: skip
def test_ms_ssim_is_monais(shape: tuple[int, int, int], levels: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        np.clip(gaussian_filter(rng.random(shape), 1.5) * 4 - 1.5, -0.2, 1.2).astype(np.float32)
        for _ in range(2)
    )
    b = (0.7 * a + 0.3 * b).astype(np.float32)
    weights = np.array(diversity.WEIGHTS[:levels]) / sum(diversity.WEIGHTS[:levels])
    x, y = (torch.from_numpy(v.clip(0, 1))[None, None] for v in (a, b))
    # level by level: compute_ms_ssim asks for a larger picture than its windows need
    expected = 1.0
    for level, weight in enumerate(weights):
        ssim, contrast = compute_ssim_and_cs(x, y, 3, (11,) * 3, (1.5,) * 3)
        term = (ssim if level == levels - 1 else contrast).mean().item()
        expected *= max(term, 0) ** weight
        x, y = (torch.nn.functional.avg_pool3d(v, 2) for v in (x, y))
    assert diversity.ms_ssim(a, b) == pytest.approx(expected, abs=5e-5)  # MONAI's is float32
    assert diversity.ms_ssim(a, a) == pytest.approx(1, abs=1e-6)
    if levels == 1:
        whole = [torch.from_numpy(v.clip(0, 1))[None, None] for v in (a, b)]
        reference = compute_ms_ssim(*whole, 3, weights=(1.0,)).item()
        assert diversity.ms_ssim(a, b) == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_ms_ssim_of_slices_is_monais_in_two_dimensions(axis: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (np.clip(gaussian_filter(rng.random((24, 30)), 1.5) * 4 - 1.5, 0, 1) for _ in range(2))
    a, b = a.astype(np.float32), (0.7 * a + 0.3 * b).astype(np.float32)
    weights = np.array(diversity.WEIGHTS[:2]) / sum(diversity.WEIGHTS[:2])
    x, y = (torch.from_numpy(v)[None, None] for v in (a, b))
    _, contrast = compute_ssim_and_cs(x, y, 2, (11,) * 2, (1.5,) * 2)
    x, y = (torch.nn.functional.avg_pool2d(v, 2) for v in (x, y))
    ssim, _ = compute_ssim_and_cs(x, y, 2, (11,) * 2, (1.5,) * 2)
    expected = contrast.mean().item() ** weights[0] * ssim.mean().item() ** weights[1]
    slices = (np.expand_dims(v, axis) for v in (a, b))
    assert diversity.ms_ssim(*slices) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("n", [2, 4, 10])
def test_the_interval_of_few_pairs_is_students_and_covers(n: int) -> None:
    rng = np.random.default_rng(n)
    covered = 0
    for x in rng.normal(0.5, 0.01, (2000, n)):
        found = diversity.mean_interval(x)
        expected = reference.t.interval(0.95, n - 1, x.mean(), reference.sem(x))
        assert found == pytest.approx(np.clip(expected, 0, 1), abs=1e-12)
        covered += found[0] <= 0.5 <= found[1]
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_a_cohort_of_one_scan_is_one_and_noise_is_beyond_its_target() -> None:
    rng = np.random.default_rng(1)
    train, holdout = cases(rng, 30, "t"), cases(rng, 20, "h")
    honest = made(cases(rng, 24, "s").volumes)
    collapsed = made(np.repeat(honest.volumes[:1], 24, axis=0))
    noise = made(rng.random((24, *honest.volumes.shape[1:])))
    found = {}
    for name, cohort in (("honest", honest), ("collapsed", collapsed), ("noise", noise)):
        given = sides(train, holdout, cohort)
        (score,) = Vendi().estimate(given, Shared(given))
        (apart,) = MSSSIMDiversity().estimate(given, Shared(given))
        found[name] = score, apart
    for k in (0, 1):
        e = found["honest"][k]
        assert e.ci[0] <= e.target <= e.ci[1] and e.floor == e.target
    assert found["noise"][1].value > 1.1 * found["honest"][1].target
    assert found["collapsed"][0].value == pytest.approx(1, abs=1e-9)
    assert found["collapsed"][0].ceiling == 1
    assert found["collapsed"][1].value == pytest.approx(0, abs=1e-6)


def test_of_people_with_several_scans_more_pairs_than_one_count() -> None:
    """Two people, each with two scans: four pairs, whose mean is the difference of the two."""
    rng = np.random.default_rng(4)
    twice = cases(rng, 4, "p", twice=4)
    given = sides(twice, twice, twice)
    groups = Shared(given).patients("train")
    each = {
        tuple(sorted((i, j))): np.mean(
            [1 - diversity.ms_ssim(twice.volumes[a, 0], twice.volumes[b, 0])
             for a in groups[i] for b in groups[j]]
        )
        for i in range(4) for j in range(i)
    }  # fmt: skip
    pairings = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    expected = [np.mean([each[p] for p in pairs]) for pairs in pairings]
    (e,) = MSSSIMDiversity().estimate(given, Shared(given))
    assert min(abs(e.value - x) for x in expected) < 1e-7
    (one,) = MSSSIMDiversity(draws=1).estimate(given, Shared(given))
    assert min(abs(one.value - x) for x in expected) > 1e-6
