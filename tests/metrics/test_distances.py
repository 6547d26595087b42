"""mmd2, prdc, intensity_w1, spectrum_distance and authenticity against naive and library forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.fid import compute_frechet_distance
from prdc import compute_prdc
from scipy import stats as reference
from scipy.fft import dctn
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from synthmed.metrics import (
    KID,
    MMD,
    PRDC,
    Authenticity,
    Frechet,
    IntensityW1,
    SpectrumDistance,
    authenticity,
    frechet,
    intensity,
    kernels,
    prdc,
    stats,
)
from synthmed.metrics.equal import compare
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases
from tests.benchmarks import calibration
from tests.metrics.cohorts import GRID, Points, cases, made, sides


@pytest.fixture(scope="module")
def cohort() -> tuple[Cases, Cases, Cases]:
    rng = np.random.default_rng(0)
    return cases(rng, 40, "t", twice=8), cases(rng, 24, "h", twice=4), cases(rng, 30, "s")


def naive_mmd2(x: np.ndarray, y: np.ndarray, gamma: float) -> float:
    k_xx, k_yy, k_xy = rbf_kernel(x, x, gamma), rbf_kernel(y, y, gamma), rbf_kernel(x, y, gamma)
    n, m = len(x), len(y)
    xx = sum(k_xx[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k_yy[i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * k_xy.mean()


def test_mmd2_is_sklearns_kernel_in_a_loop() -> None:
    rng = np.random.default_rng(1)
    train, holdout, made_ = (cases(rng, n, p) for n, p in ((20, "t"), (12, "h"), (15, "s")))
    given = sides(train, holdout, made_)
    shared = Shared(given)
    value, excess = MMD().estimate(given, shared)
    t, h, s = (shared.features(side) for side in ("train", "holdout", "synthetic"))
    distances = cdist(t, t)[np.triu_indices(20, 1)]
    gamma = 1 / (2 * np.median(distances) ** 2)
    assert value.value == pytest.approx(naive_mmd2(s, h, gamma), abs=1e-12)
    assert value.floor == pytest.approx(naive_mmd2(t, h, gamma), abs=1e-12)
    blurred = shared.features("blurred")
    assert value.ceiling == pytest.approx(naive_mmd2(blurred, t, gamma), abs=1e-12)
    assert excess.value == pytest.approx(value.value - value.floor, abs=1e-12)
    assert (value.n, value.n_holdout, value.seed) == (15, 12, 0)


def test_kid_is_sklearns_cubic_kernel_in_a_loop() -> None:
    rng = np.random.default_rng(1)
    train, holdout, made_ = (cases(rng, n, p) for n, p in ((20, "t"), (12, "h"), (15, "s")))
    given = sides(train, holdout, made_)
    shared = Shared(given)
    (found,) = KID().estimate(given, shared)
    sides_ = ("synthetic", "train", "holdout", "blurred")
    s, t, h, b = (shared.features(side) for side in sides_)

    def expected(x: np.ndarray, y: np.ndarray) -> float:
        k = [polynomial_kernel(*p, degree=3, gamma=1 / 53, coef0=1) for p in ((x, x), (y, y))]
        within = sum((m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in k)
        return within - 2 * polynomial_kernel(x, y, degree=3, gamma=1 / 53, coef0=1).mean()

    assert found.value == pytest.approx(expected(s, h), rel=1e-12)
    assert found.floor == pytest.approx(expected(t, h), rel=1e-12, abs=1e-12)
    assert found.ceiling == pytest.approx(expected(b, t), rel=1e-12)
    assert found.ci[0] < found.value < found.ci[1]


def test_kid_is_torchmetrics() -> None:
    """Which knows sides of one size alone."""
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((14, 53)), 0.3 + rng.standard_normal((14, 53))
    cubic = [(a @ b.T / 53 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    expected = poly_mmd(torch.from_numpy(x), torch.from_numpy(y), degree=3, gamma=1 / 53, coef=1.0)
    assert kernels.mmd2(*cubic) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("n", "d", "within"), [(200, 8, 1e-9), (12, 30, 1e-6)])
def test_frechet_is_monais_and_torchmetrics(n: int, d: int, within: float) -> None:
    """Also where there are fewer samples than numbers, and the root of a product is delicate."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    y = rng.standard_normal((n + 3, d)) @ rng.standard_normal((d, d)) + 0.5
    moments = [m for v in (x, y) for m in (v.mean(axis=0), np.cov(v, rowvar=False))]
    mean_x, cov_x, mean_y, cov_y = (torch.from_numpy(m) for m in moments)
    expected = compute_frechet_distance(mean_x, cov_x, mean_y, cov_y, epsilon=0.0).item()
    assert frechet.frechet(x, y) == pytest.approx(expected, rel=within)
    other = _compute_fid(mean_x, cov_x, mean_y, cov_y).item()
    assert frechet.frechet(x, y) == pytest.approx(other, rel=within)
    assert frechet.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_of_shifted_gaussians_is_the_closed_form() -> None:
    """Same spread, another mean: the squared distance of the means, and the bias beside it."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((20_000, 3))
    assert frechet.frechet(x, x + np.array([1.0, 2.0, 0.0])) == pytest.approx(5, rel=1e-9)
    y = 2 * rng.standard_normal((20_000, 3))
    assert frechet.frechet(x, y) == pytest.approx(3, rel=0.03)  # (2 - 1)^2 a coordinate


def test_frechet_shows_its_bias_in_the_floor() -> None:
    rng = np.random.default_rng(4)
    given = sides(cases(rng, 60, "t"), cases(rng, 40, "h"), cases(rng, 40, "s"))
    (found,) = Frechet().estimate(given, Shared(given))
    assert found.floor > 0.1  # equal distributions
    assert found.value == pytest.approx(found.floor, rel=0.5)
    assert found.ceiling > 2 * found.floor
    assert "4 principal components" in found.method


def test_kernel_of_patients_is_the_mean_over_every_draw_of_one_scan(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    train, holdout, _ = cohort
    few = Cases(holdout.volumes[:6], holdout.patients[:6], holdout.labels[:6])  # 3 people, 2 scans
    shared = Shared(sides(train, few, few))
    full = np.exp(-0.01 * shared.distances("holdout", "holdout") ** 2)
    k = kernels.by_patient(shared, "holdout", "holdout", full.copy())
    draws = [
        np.mean([full[a, b] for a, b in ((x, y), (y, z), (x, z))])
        for x in (0, 1)
        for y in (2, 3)
        for z in (4, 5)
    ]
    off = k[np.triu_indices(3, 1)]
    assert off.mean() == pytest.approx(np.mean(draws), abs=1e-12)


def test_leave_one_out_forms_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(2)
    a = rng.random((7, 7))
    a = a + a.T
    cross = rng.random((7, 5))
    for i in range(7):
        kept = np.delete(np.arange(7), i)
        sub = a[np.ix_(kept, kept)]
        assert kernels.without_each(a)[i] == pytest.approx((sub.sum() - np.trace(sub)) / 30)
        assert kernels.cross_without_each(cross, 0)[i] == pytest.approx(cross[kept].mean())
    assert kernels.cross_without_each(cross, 1)[2] == pytest.approx(np.delete(cross, 2, 1).mean())


def points(rng: np.random.Generator, n: int, shift: float) -> np.ndarray:
    return rng.standard_normal((n, 5)) + shift


def three(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rbf_kernel(x, x, 0.1), rbf_kernel(y, y, 0.1), rbf_kernel(x, y, 0.1)


def test_permutation_p_of_mmd2_is_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(3)
    p = []
    for _ in range(300):
        k = three(points(rng, 20, 0), points(rng, 14, 0))
        p.append(stats.permutation_p(kernels.mmd2(*k), kernels.permuted_mmd2(*k, 99, rng)))
    assert reference.kstest(p, "uniform").pvalue > 1e-3
    k = three(points(rng, 20, 1.5), points(rng, 14, 0))
    assert stats.permutation_p(kernels.mmd2(*k), kernels.permuted_mmd2(*k, 99, rng)) == 0.01


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_interval_of_mmd2_excess_covers_the_truth(shift: float) -> None:
    """95 % intervals of MMD2(S, H) - MMD2(T, H) in 200 cohorts; the truth from the closed form."""
    # E k(x, y) of N(0, I) and N(shift, I): (1 + 4 g)^(-d/2) exp(-g |shift|^2 / (1 + 4 g))
    g, d = 0.1, 5
    truth = 2 * (1 + 4 * g) ** (-d / 2) * (1 - np.exp(-g * d * shift**2 / (1 + 4 * g)))
    rng = np.random.default_rng(4)
    covered, estimates = 0, []
    for _ in range(200):
        s, t, h = points(rng, 60, shift), points(rng, 80, 0), points(rng, 30, 0)
        k_ss, k_hh, k_sh = three(s, h)
        k_tt, _, k_th = three(t, h)
        excess = kernels.mmd2(k_ss, k_hh, k_sh) - kernels.mmd2(k_tt, k_hh, k_th)
        se = stats.jackknife_se(
            [
                kernels.without_each(k_ss) - 2 * kernels.cross_without_each(k_sh, 0),
                kernels.without_each(k_tt) - 2 * kernels.cross_without_each(k_th, 0),
                -2 * kernels.cross_without_each(k_sh, 1) + 2 * kernels.cross_without_each(k_th, 1),
            ]
        )
        low, high = stats.normal_interval(excess, se)
        covered += low <= truth <= high
        estimates.append(excess)
    assert covered >= 180
    # unbiased at unequal sizes: within four standard errors of the mean of 200
    assert abs(np.mean(estimates) - truth) <= 4 * np.std(estimates) / np.sqrt(200)


def test_prdc_is_the_reference_package() -> None:
    rng = np.random.default_rng(5)
    for _ in range(10):
        r, s = rng.standard_normal((40, 6)), 0.8 * rng.standard_normal((40, 6)) + 0.3
        expected = compute_prdc(r, s, nearest_k=5)
        found = prdc.prdc(cdist(r, r), cdist(s, s), cdist(r, s), 5)
        names = ("precision", "recall", "density", "coverage")
        assert found == pytest.approx([expected[n] for n in names], abs=1e-12)


def test_prdc_estimates_use_equal_counts_and_see_a_collapsed_sampler(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    train, holdout, honest = cohort
    given = sides(train, holdout, honest)
    fair = {e.name: e for e in PRDC().estimate(given, Shared(given))}
    assert set(fair) == set(prdc.FIGURES)
    assert "24 a side" in fair["recall"].method
    rng = np.random.default_rng(6)
    mean = train.volumes.astype(np.float32).mean(axis=0)
    collapsed = made(mean + 0.02 * rng.standard_normal((30, 1, *GRID)))
    given = sides(train, holdout, collapsed)
    poor = {e.name: e for e in PRDC().estimate(given, Shared(given))}
    for name in ("recall", "coverage"):
        assert fair[name].floor is not None and fair[name].floor > 0.5
        assert fair[name].value >= 0.7 * fair[name].floor
        assert poor[name].value <= 0.1
        low, high = fair[name].ci
        assert low <= fair[name].value <= high


def test_intensity_w1_is_scipys_on_the_binned_values(cohort: tuple[Cases, Cases, Cases]) -> None:
    train, _, honest = cohort
    a, b = (c.volumes[:4].astype(np.float32) for c in (train, honest))
    bins, width = 500, 2.5 / 500
    gap = intensity.cdfs(a, bins).mean(axis=0) - intensity.cdfs(b, bins).mean(axis=0)
    found = np.abs(gap).mean() * 2.5
    centre = [(np.floor((v.ravel() + 0.5) / width) + 0.5) * width - 0.5 for v in (a, b)]
    assert found == pytest.approx(reference.wasserstein_distance(*centre), abs=1e-6)
    raw = reference.wasserstein_distance(a.ravel(), b.ravel())
    assert found == pytest.approx(raw, abs=width)


def test_intensity_and_spectrum_see_planted_changes(cohort: tuple[Cases, Cases, Cases]) -> None:
    train, holdout, honest = cohort
    noisy = made(
        honest.volumes + 0.03 * np.random.default_rng(7).standard_normal(honest.volumes.shape)
    )
    bright = made(honest.volumes * 1.15)
    for metric, changed in ((IntensityW1(), bright), (SpectrumDistance(), noisy)):
        given = sides(train, holdout, honest)
        (fair,) = metric.estimate(given, Shared(given))
        given = sides(train, holdout, changed)
        (poor,) = metric.estimate(given, Shared(given))
        assert fair.ci[0] <= fair.floor * 1.5 and fair.value < poor.ci[0]
        assert poor.value > 2 * fair.floor
        assert fair.floor == poor.floor and fair.ceiling == poor.ceiling


def test_spectrum_is_that_of_a_loop_over_coefficients(cohort: tuple[Cases, Cases, Cases]) -> None:
    train, holdout, _ = cohort
    one = Cases(train.volumes[:1], train.patients[:1], train.labels[:1])
    two = [Cases(c.volumes[-2:], c.patients[-2:], c.labels[-2:]) for c in (holdout, train)]
    given = sides(one, two[0], two[1])
    shared = Shared(given)

    def spectrum(volume: np.ndarray) -> np.ndarray:
        power = dctn(volume.astype(np.float64), norm="ortho") ** 2
        bins: list[list[float]] = [[] for _ in range(21)]
        for index in np.ndindex(*GRID):
            radius = np.sqrt(sum((k / (2 * n)) ** 2 for k, n in zip(index, GRID, strict=True)))
            if radius > 0:
                bins[min(int(np.ceil(radius * 40)), 21) - 1].append(power[index])
        return np.array([np.log(1e-6 + np.mean(b)) for b in bins])

    loop = spectrum(two[1].volumes[0, 0])
    assert shared.descriptors("synthetic")[0, :21] == pytest.approx(loop, abs=2e-3)


def naive_authenticity(samples: np.ndarray, train: np.ndarray) -> float:
    authentic = 0
    for y in samples:
        distance = [np.linalg.norm(y - x) for x in train]
        i = int(np.argmin(distance))
        others = [np.linalg.norm(train[i] - x) for j, x in enumerate(train) if j != i]
        authentic += distance[i] > min(others)
    return authentic / len(samples)


def test_authenticity_is_its_definition_and_falls_to_zero_for_copies(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    rng = np.random.default_rng(8)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((25, 4))
    assert authenticity.authentic_share(cdist(y, x), cdist(x, x)) == naive_authenticity(y, x)
    train, holdout, honest = cohort
    given = sides(train, holdout, honest)
    fair, excess = Authenticity().estimate(given, Shared(given))
    assert fair.ci[0] <= fair.floor <= fair.ci[1] and 0.2 < fair.floor < 0.8
    assert excess.value == pytest.approx(fair.value - fair.floor)
    assert excess.ci[0] < excess.value < excess.ci[1]
    assert (excess.floor, excess.ceiling) == (0.0, -fair.floor)
    _, first = np.unique(train.patients, return_index=True)
    given = sides(
        Cases(train.volumes[first], train.patients[first], []), holdout, made(train.volumes[first])
    )
    stored, excess = Authenticity().estimate(given, Shared(given))
    assert stored.value == 0.0 and stored.ceiling == 0.0
    assert excess.value == excess.ceiling == -stored.floor and excess.ci[1] < 0


def test_few_honest_samples_are_not_condemned_and_many_copies_are() -> None:
    honest, copied = (
        [calibration.judged(sizes, share, 20) for sizes in ((15, 6, 20), (24, 13, 50))]
        for share in (0.0, 1.0)
    )
    for few in honest:
        assert few["fail"] <= 0.05 and few["pass"] > 0.4 and few["inconclusive"] > 0
    # the value alone would have failed what is inconclusive; and copies never pass
    for few in copied:
        assert few["pass"] == 0
    assert copied[1]["fail"] > 0.5


def test_the_interval_of_the_excess_covers_nothing_where_nothing_differs() -> None:
    covered = 0
    for seed in range(60):
        points = calibration.posing(60, 30, 40, 0.0, seed)
        _, excess = Authenticity().estimate(points.sides, points)
        covered += excess.ci[0] <= 0 <= excess.ci[1]
    assert covered >= 55  # of 57 expected at 95 %; two standard deviations below


@pytest.mark.parametrize(("n_train", "n_holdout", "n"), [(5, 9, 9), (9, 3, 9), (9, 9, 3)])
def test_an_excess_without_an_interval_is_no_excess(n_train: int, n_holdout: int, n: int) -> None:
    points = calibration.posing(n_train, n_holdout, n, 0.0, 0)
    share, excess = Authenticity().estimate(points.sides, points)
    assert share.value is not None and share.floor is not None
    assert excess.value is None and excess.note.startswith("no interval with fewer than 6")


def test_without_a_holdout_there_is_a_figure_but_no_floor(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    train, _, honest = cohort
    given = sides(train, cases(np.random.default_rng(0), 0, "h"), honest)
    shared = Shared(given)
    found = [
        e for m in (MMD(), PRDC(), IntensityW1(), Authenticity()) for e in m.estimate(given, shared)
    ]
    for e in found:
        assert e.floor is None and e.n_holdout is None and "no held-out" in e.note
        assert (e.value is None) == (e.name in ("mmd2_excess", "authenticity_excess"))


def test_too_few_patients_is_a_reason_not_an_error(cohort: tuple[Cases, Cases, Cases]) -> None:
    train, holdout, honest = cohort
    two = Cases(honest.volumes[:2], honest.patients[:2], honest.labels[:2])
    given = sides(train, holdout, two)
    for e in [*MMD().estimate(given, Shared(given)), *PRDC().estimate(given, Shared(given))]:
        assert e.value is None and e.ci is None and "fewer than" in e.note


def test_all_patients_are_used_where_two_equal_sides_are_cut_by_a_third() -> None:
    """Thirty and thirty of whom ten are compared, train having ten: draws until all were seen."""
    rng = np.random.default_rng(10)
    people = {"train": 10, "holdout": 30, "synthetic": 30, "blurred": 30}
    given = Points(0, **{side: rng.standard_normal((n, 2)) for side, n in people.items()})
    seen: dict[str, list[int]] = {side: [] for side in people}

    def first(a: str, i: np.ndarray, b: str, j: np.ndarray) -> np.ndarray:
        seen[a] += list(i)
        seen[b] += list(j)
        return np.array([float(len(i))])

    found = compare(given, first, "test", 20, 6)
    assert found is not None and found.count == 10 and found.value == 10
    assert len(seen["synthetic"]) == 200 and set(seen["synthetic"]) == set(range(30))


def test_none_and_all_have_an_interval() -> None:
    """One mean scan over and over, and strangers: every half says the same of them."""
    rng = np.random.default_rng(11)
    bound, smaller = (1 - 0.025 ** (1 / n) for n in (40, 24))
    # from the middle everybody is nearer than they are to each other
    middle = 1e-3 * rng.standard_normal((64, 40))
    mean = Points(0, train=np.eye(40), holdout=middle[:24], synthetic=middle[24:], blurred=middle)
    share, excess = Authenticity().estimate(mean.sides, mean)
    assert (share.value, excess.value) == (0, 0)
    assert share.ci == (0, pytest.approx(bound))
    assert excess.ci == (pytest.approx(-bound - smaller), pytest.approx(bound + smaller))
    ring = np.eye(40)
    within = Points(0, train=ring, holdout=ring[:24], synthetic=middle[24:], blurred=ring)
    far = Points(0, train=ring, holdout=ring[:24], synthetic=middle[24:] + 50, blurred=ring)
    share, _ = Authenticity().estimate(far.sides, far)
    assert share.value == 1 and share.ci == (pytest.approx(1 - bound), 1)
    for points_, none in ((within, {"recall"}), (far, set(prdc.FIGURES))):
        for e in PRDC().estimate(points_.sides, points_):
            most = 24 / 5 if e.name == "density" else 1  # of five each sample is in all the balls
            assert e.value == pytest.approx(0 if e.name in none else most)
            ends = (0, smaller) if e.name in none else (1 - smaller, 1)
            assert e.ci == pytest.approx((ends[0] * most, ends[1] * most))


def test_half_interval_covers_the_expected_figure() -> None:
    """Coverage of the interval of `compare` for a smooth statistic with a known expectation."""
    rng = np.random.default_rng(9)
    values: dict[str, np.ndarray] = {}

    class Fake:
        has_holdout = False
        reference = "train"

        def __init__(self, seed: int) -> None:
            self.sides = sides(EMPTY, EMPTY, EMPTY, resamples=100, seed=seed)

        def patients(self, side: str) -> list[np.ndarray]:
            return [np.array([i]) for i in range(len(values[side]))]

    covered = 0
    for seed in range(100):
        values.update(train=rng.standard_normal(40), synthetic=rng.standard_normal(40) + 1)
        found = compare(
            Fake(seed),
            lambda a, i, b, j: np.array([values[b][j].mean() - values[a][i].mean()]),
            "test",
            1,
            2,
        )
        low, high = stats.normal_interval(found.value[0], found.se[0])
        covered += low <= 1 <= high
    assert covered >= 88


EMPTY = cases(np.random.default_rng(0), 0, "e")
