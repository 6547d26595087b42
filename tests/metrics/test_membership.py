"""Membership attacks: exact where nothing leaks, awake where something does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference
from scipy.spatial.distance import cdist

from synthmed.keys import Key
from synthmed.metrics import Membership
from synthmed.metrics.attacks import Attack, Ratio, by_scores, descriptor_scores, ratio
from synthmed.metrics.membership import (
    CONTROL,
    DENSITY,
    DESCRIPTOR,
    by_chance,
    named,
    patient_scores,
)
from synthmed.metrics.principal import MOST, axes
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.stats import auc, auc_permutation_p, clopper_pearson, wins
from synthmed.types import Estimate
from tests.metrics.cohorts import cases, made, sides
from tests.metrics.people import GRID, copied, people

DRAWS, PERMUTATIONS = 200, 99
AUC, TPR = "membership_auc", "membership_tpr_at_fpr10"


def estimates(of: Sides) -> dict[tuple[str, str | None], Estimate]:
    return {(e.name, e.slice): e for e in Membership().estimate(of, Shared(of))}


@pytest.fixture(scope="module")
def cohort() -> tuple[Cases, Cases, Cases]:
    rng = np.random.default_rng(1)
    return cases(rng, 40, "t", twice=3), cases(rng, 24, "h", twice=3), cases(rng, 50, "s")


def test_every_attack_sees_copies_of_its_kind_and_accuses_no_honest_cohort(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    train, holdout, honest = cohort
    noise = 0.03 * np.random.default_rng(3).standard_normal(train.volumes.shape)
    found = estimates(sides(train, holdout, honest))
    noisy = estimates(sides(train, holdout, made(train.volumes + noise)))
    # noise in every voxel hides a copy from the descriptor, a mirror from the density
    mirrored = estimates(sides(train, holdout, made(train.volumes[:, :, ::-1])))
    for where, stored in ((None, noisy), (DENSITY, noisy), (DESCRIPTOR, mirrored)):
        fair, tail = found[AUC, where], found[TPR, where]
        assert fair.ci[0] <= 0.5 <= fair.ci[1] and fair.floor == 0.5
        assert tail.ci[0] <= 0.2 and tail.floor == 3 / 25  # two of 24 may exceed the threshold
        assert stored[AUC, where].ci[0] > 0.7 and "p = 0.0099" in stored[AUC, where].note
        assert stored[TPR, where].ci[0] > 0.5
        assert (stored[AUC, where].n, stored[AUC, where].n_holdout) == (40, 24)
        # the ceiling belongs to the people, not to the cohort
        assert set(found) == set(stored)
        assert fair.ceiling == stored[AUC, where].ceiling > 0.9
    assert noisy[AUC, CONTROL].ci[0] < 0.5 < noisy[AUC, CONTROL].ci[1]
    assert mirrored[AUC, DENSITY].ci[0] < 0.5 and noisy[AUC, DESCRIPTOR].ci[0] < 0.5


def test_a_patient_scores_by_the_best_of_their_scans() -> None:
    scores = np.array([[0.1, 0.5, 0.2], [0.3, 0.0, 0.4]])
    found = patient_scores(scores, np.array(["b", "a", "b"]))
    assert found.tolist() == [0.5, 0.4]


def test_who_is_named_is_above_a_threshold_that_a_tenth_of_the_others_exceed() -> None:
    rng = np.random.default_rng(0)
    for n, m in ((30, 24), (12, 9), (40, 10), (5, 60)):
        members, others = rng.integers(0, 9, n) + 0.5, rng.integers(0, 9, m) + 0.5
        passing = [t for t in {*others} if np.sum(others > t) <= int(0.1 * m)]
        assert named(wins(members, others)) == np.sum(members > min(passing))


@pytest.mark.parametrize("m", [5, 9, 10, 15, 24])
def test_where_nothing_leaks_the_share_of_the_named_is_its_floor(m: int) -> None:
    """Over every place that one member may take among m others, and in draws of seven."""
    others = np.arange(m) + 0.0
    places = [named(wins(np.array([rank - 0.5]), others)) for rank in range(m + 1)]
    assert np.mean(places) == pytest.approx(by_chance(m), abs=1e-12)
    rng = np.random.default_rng(m)
    shares = [named(wins(*np.split(rng.random(7 + m), [7]))) / 7 for _ in range(2000)]
    assert abs(np.mean(shares) - by_chance(m)) < 4 * np.std(shares) / np.sqrt(2000)


def naive_ratio_wins(of: Sides, shared: Shared) -> np.ndarray:
    """The definition, pair by pair: both densities by loops over people and their scans."""
    space = axes(shared.small("synthetic", 12))
    assert space is not None
    at = {s: space.of(shared.small(s, 12)) for s in ("train", "holdout", "synthetic")}
    people_of = {s: [at[s][g] for g in shared.patients(s)] for s in ("train", "holdout")}
    m, k = len(people_of["holdout"]), at["train"].shape[1]
    wide = (m - 1) ** (-1 / (k + 4))

    def kernel(a: np.ndarray, b: np.ndarray, width: float) -> float:
        return float(
            np.mean([np.exp(-np.sum((x - y) ** 2) / (2 * width**2)) for x in a for y in b])
        )

    def score(person: np.ndarray, others: list[np.ndarray]) -> float:
        made = np.mean([kernel(person, s[None], wide / 2) for s in at["synthetic"]])
        return float(np.log(made) - np.log(np.mean([kernel(person, o, wide) for o in others])))

    out = np.zeros((len(people_of["train"]), m))
    for j, stranger in enumerate(people_of["holdout"]):
        rest = [p for i, p in enumerate(people_of["holdout"]) if i != j]
        own = score(stranger, rest)
        for i, member in enumerate(people_of["train"]):
            out[i, j] = score(member, rest) > own
    return out


def test_the_ratio_of_densities_is_that_of_a_loop_and_neither_is_in_the_reference() -> None:
    rng = np.random.default_rng(2)
    train, holdout, made_up = cases(rng, 8, "t", 2), cases(rng, 7, "h", 3), cases(rng, 25, "s")
    of = sides(train, holdout, made_up)
    shared = Shared(of)
    found = ratio(shared, "synthetic")
    assert found is not None
    np.testing.assert_array_equal(found.wins(), naive_ratio_wins(of, shared))


def test_the_reference_without_the_nearest_is_exact_however_far_the_rest() -> None:
    """One stranger among the members, the others far: 1 and 1e-20 to 1e-80, by their logarithms."""
    rng = np.random.default_rng(3)
    far = 14 * np.exp(1j * np.linspace(0, 5, 5))
    at = np.concatenate([rng.normal(0, 0.3, (7, 2)), np.stack([far.real, far.imag], axis=1)])
    log = -cdist(at, at, "sqeuclidean") / 2
    np.fill_diagonal(log, -np.inf)
    near, inside = rng.normal(0, 3, 12), np.arange(12) < 6
    expected = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            rest = [k for k in range(6, 12) if k != 6 + j]
            mine, theirs = (np.logaddexp.reduce(log[p, rest]) for p in (i, 6 + j))
            expected[i, j] = near[i] - mine > near[6 + j] - theirs
    assert 0 < expected[:, 0].mean() < 1
    np.testing.assert_array_equal(Ratio(near, np.exp(log), inside).wins(), expected)


def test_axes_are_those_of_the_cohort_in_its_standard_deviations() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((250, 30)) * np.linspace(3, 0.1, 30)
    space = axes(x)
    assert space is not None and space.directions.shape == (30, MOST)
    np.testing.assert_allclose(space.of(x).std(axis=0, ddof=1), 1, rtol=1e-9)
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1][:MOST]
    lengths = 1 / np.linalg.norm(space.directions, axis=0) ** 2
    np.testing.assert_allclose(lengths, values, rtol=1e-9)
    few = axes(x[:25])
    assert few is not None and few.directions.shape == (30, 2)
    assert axes(np.ones((20, 30))) is None and axes(x[:1]) is None


@pytest.fixture(scope="module")
def exchangeable() -> dict[str, np.ndarray]:
    """(DRAWS, 2) AUC and p of each attack where a cohort has nothing to do with train."""
    out: dict[str, list[tuple[float, float]]] = {"density": [], "descriptor": [], "by train": []}
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        of = sides(people(rng, 12, "t"), people(rng, 9, "h"), people(rng, 20, "s"))
        shared, key = Shared(of), Key.root(seed)
        density = ratio(shared, "synthetic")
        assert density is not None
        found: dict[str, Attack] = {
            "density": density.attack(PERMUTATIONS, key),
            "descriptor": by_scores(*descriptor_scores(shared, "synthetic"), PERMUTATIONS, key),
        }
        for name, attack in found.items():
            out[name].append((float(attack.wins.mean()), attack.p))
        near = [-shared.distances(s, "synthetic").min(axis=1) for s in ("train", "holdout")]
        p = auc_permutation_p(near[0], near[1], PERMUTATIONS, key.numpy())
        out["by train"].append((auc(near[0], near[1]), p))
    return {name: np.array(values) for name, values in out.items()}


@pytest.mark.parametrize("name", ["density", "descriptor"])
def test_where_nothing_leaks_p_is_uniform_and_the_auc_a_half(
    exchangeable: dict[str, np.ndarray], name: str
) -> None:
    value, p = exchangeable[name].T
    # p takes multiples of 1 / 100: a grain of noise makes it continuous
    smooth = p - np.random.default_rng(0).random(DRAWS) / (PERMUTATIONS + 1)
    assert reference.kstest(smooth, "uniform").pvalue > 1e-3
    assert abs(value.mean() - 0.5) < 4 * value.std() / np.sqrt(DRAWS)


def test_a_scale_learned_on_train_would_accuse_honest_cohorts(
    exchangeable: dict[str, np.ndarray],
) -> None:
    """Why `descriptor_scores` does not use the z-scores of `Shared`."""
    value, p = exchangeable["by train"].T
    assert value.mean() - 0.5 > 4 * value.std() / np.sqrt(DRAWS)
    assert reference.kstest(p, "uniform").pvalue < 1e-4


def test_over_all_labellings_of_the_same_people_the_mean_auc_is_a_half_exactly() -> None:
    """And with references of their own, all non-members for a member, it would not be."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(5)
    kernel = np.exp(-((x[:, None] - x) ** 2))
    np.fill_diagonal(kernel, 0)
    near = rng.standard_normal(5)
    every = [np.isin(np.arange(5), [i, j]) for i in range(5) for j in range(i)]
    means = [Ratio(near, kernel, inside).wins().mean() for inside in every]
    assert np.mean(means) == pytest.approx(0.5, abs=1e-12)
    own = []
    for inside in every:
        others = np.where(inside, 3, 2)  # whom the sum is over: a non-member is not in its own
        score = near - np.log(kernel[:, ~inside].sum(axis=1) / others)
        own.append(auc(score[inside], score[~inside]))
    assert np.mean(own) != pytest.approx(0.5, abs=1e-9)


def overfit_in_the_tail(rng: np.random.Generator) -> Sides:
    """Six modes of shape; a quarter of people are unusual, and only these were copied."""
    modes = np.linalg.qr(rng.standard_normal((512, 6)))[0].T

    def drawn(n: int, prefix: str) -> tuple[np.ndarray, np.ndarray]:
        unusual = rng.random(n) < 0.25
        return rng.standard_normal((n, 6)) * np.where(unusual, 2.5, 0.5)[:, None], unusual

    def shown(z: np.ndarray, prefix: str) -> Cases:
        volumes = (0.5 + 0.3 * z @ modes).reshape(-1, 1, *GRID).astype(np.float16)
        names = np.array([f"{prefix}{i:03d}" for i in range(len(z))])
        return Cases(volumes, names, [{} for _ in names])

    (t, rare), (h, _), (s, odd) = drawn(50, "t"), drawn(40, "h"), drawn(60, "s")
    s[odd] = t[rng.choice(np.nonzero(rare)[0], odd.sum())]
    return sides(shown(t, "t"), shown(h, "h"), shown(s, "s"))


def test_overfitting_where_people_are_few_hides_from_the_density_and_not_from_the_ratio() -> None:
    plain, found = [], []
    for seed in range(16):
        shared = Shared(overfit_in_the_tail(np.random.default_rng(seed)))
        density = ratio(shared, "synthetic")
        space = axes(shared.small("synthetic", 12))
        assert density is not None and space is not None
        at = [space.of(shared.small(s, 12)) for s in ("train", "holdout", "synthetic")]
        width = len(at[2]) ** (-1 / 10)
        logs = [
            np.log(np.exp(-cdist(x, at[2], "sqeuclidean") / (2 * width**2)).mean(1)) for x in at
        ]
        plain.append(auc(logs[0], logs[1]))
        found.append(density.wins().mean())
    gain = np.array(found) - plain
    assert gain.mean() > 4 * gain.std() / np.sqrt(len(gain))
    assert abs(np.mean(plain) - 0.5) < 0.08 < np.mean(found) - 0.5


def test_the_interval_of_the_ratio_covers_and_is_never_a_point() -> None:
    """The AUC of exchangeable people is 0.5; of wholly separate ones the exact bound is left."""
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(1000 + seed)
        real, made_up = rng.standard_normal((50, 3)), rng.standard_normal((40, 3))
        near = np.log(np.exp(-cdist(real, made_up, "sqeuclidean")).mean(axis=1))
        kernel = np.exp(-cdist(real, real, "sqeuclidean") / 2)
        np.fill_diagonal(kernel, 0)
        low, high = Ratio(near, kernel, np.arange(50) < 28).attack(100, Key.root(seed)).ci
        hits += low <= 0.5 <= high
    # 3 standard errors below 95 % of 60
    assert hits >= 52
    near = np.array([9.0] * 8 + [1.0] * 6)
    sure = Ratio(near, 1 - np.eye(14), np.arange(14) < 8).attack(100, Key.root(0))
    assert sure.wins.mean() == 1 and sure.ci == (clopper_pearson(6, 6)[0], 1.0)


def test_the_nearest_sample_is_the_nearest_over_a_patients_scans_on_a_scale_of_everybody(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    of = sides(*cohort)
    shared = Shared(of)
    members, others = descriptor_scores(shared, "synthetic")
    assert (len(members), len(others)) == (40, 24)
    # exchanging the sides exchanges the scores, to the last bit but for the order of sums
    back = descriptor_scores(Shared(sides(cohort[1], cohort[0], cohort[2])), "synthetic")
    np.testing.assert_allclose(back[1], members, rtol=1e-6)
    np.testing.assert_allclose(back[0], others, rtol=1e-6)
    assert (descriptor_scores(shared, "train")[0] == 0).all()


@pytest.mark.parametrize("stored", [False, True])
def test_the_members_only_control_is_a_half_whatever_the_cohort(stored: bool) -> None:
    """So it is no test of the attack, and says that it is none."""
    silent = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        train, holdout = people(rng, 12, "t"), people(rng, 8, "h")
        made_up = copied(train, 0.01, rng) if stored else people(rng, 12, "s")
        found = estimates(sides(train, holdout, made_up))
        control, share = found[AUC, CONTROL], found[TPR, CONTROL]
        silent += control.ci[0] <= 0.5 <= control.ci[1] and abs(control.value - 0.5) < 0.05
        assert control.floor == 0.5 and control.n == 12 and control.n_holdout is None
        assert "0.5 on average whatever the attack" in control.method
        # of six against six nobody may exceed: the best of seven is a member once in seven
        assert share.floor == pytest.approx(1 / 7) and "its floor on average" in share.method
        assert share.ci[0] <= share.floor <= share.ci[1] and abs(share.value - share.floor) < 0.08
        assert f"members-only control {share.ci[0]:.2f} to" in found[TPR, None].note
    assert silent >= 19


def test_without_people_or_with_one_scan_over_and_over_it_says_why() -> None:
    rng = np.random.default_rng(6)
    train, holdout, honest = people(rng, 12, "t"), people(rng, 8, "h"), people(rng, 12, "s")
    for few in (people(rng, 0, "h"), people(rng, 1, "h")):
        found = estimates(sides(train, few, honest))
        assert set(found) == {(n, s) for n in (AUC, TPR) for s in (None, DENSITY, DESCRIPTOR)}
        assert all(e.value is None and e.note == "too few patients" for e in found.values())
    for same in (np.zeros_like(honest.volumes), np.repeat(honest.volumes[:1], 12, axis=0)):
        found = estimates(sides(train, holdout, made(same)))
        assert found[AUC, DENSITY].value is None and "alike" in found[AUC, DENSITY].note
        assert found[AUC, DESCRIPTOR].value is not None
    # far from everybody: densities below the smallest double are still told apart
    shared = Shared(sides(train, holdout, made(0.02 * honest.volumes.astype(float) + 0.5)))
    far = ratio(shared, "synthetic")
    assert far is not None and np.sum(far.wins() == 0.5) == 0
