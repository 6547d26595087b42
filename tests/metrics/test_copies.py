"""Planted copies are found and named; honest samplers pass."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as reference
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.ndimage import shift as shift_of_scipy
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from synthmed.keys import Key
from synthmed.metrics import Copied, copies, disguises, moves, similarity
from synthmed.metrics.copies import (
    Bar,
    Copies,
    GapTest,
    ImageTest,
    Matches,
    judge,
    match,
    one_person,
)
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases
from synthmed.metrics.similarity import (
    DescriptorSimilarity,
    ImageSimilarity,
    Looked,
    Scores,
    normal_scores,
)
from tests.benchmarks.faults import hippocampus
from tests.metrics.cohorts import (
    DISGUISES,
    GRID,
    Disguise,
    cases,
    made,
    sides,
)

IMAGE = ImageSimilarity((0,))
TISSUE = ImageSimilarity((0,), tissue=True)

Honest = tuple[GapTest, Matches]


@pytest.fixture(scope="module")
def cohort() -> tuple[Cases, Cases, Cases]:
    rng = np.random.default_rng(0)
    return cases(rng, 60, "t", twice=10), cases(rng, 40, "h", twice=8), cases(rng, 100, "s")


@pytest.fixture(scope="module")
def honest(cohort: tuple[Cases, Cases, Cases]) -> Honest:
    """The test fitted to the cohort, and how alike its honest samples are."""
    test = GapTest(*cohort[:2], IMAGE, Key.root(1))
    return test, test.match(cohort[2])


def plant(
    cohort: tuple[Cases, Cases, Cases], scans: list[int], disguise: Disguise, seed: int = 99
) -> Cases:
    """The honest samples with copies of these training scans in the first places."""
    train, _, honest = cohort
    rng = np.random.default_rng(seed)
    volumes = honest.volumes.astype(np.float32)
    for place, scan in enumerate(scans):
        volumes[place, 0] = disguise(train.volumes[scan, 0].astype(np.float32), rng)
    return made(volumes)


def screen(
    cohort: tuple[Cases, Cases, Cases],
    honest: Honest,
    scans: list[int],
    disguise: Disguise = DISGUISES["exact"],
) -> Copies:
    """Screen 100 samples of which the first few are copies; only those are matched anew."""
    test, others = honest
    planted = plant(cohort, scans, disguise)
    first = Cases(planted.volumes[: len(scans)], planted.patients[: len(scans)], [])
    found = test.match(first)
    both = Matches(
        np.concatenate([found.to_train, others.to_train[len(scans) :]]),
        np.concatenate([found.to_holdout, others.to_holdout[len(scans) :]]),
    )
    return test.find(planted, 0.01, both)


@pytest.mark.parametrize("name", DISGUISES)
@pytest.mark.parametrize("share", [1, 5, 20])
def test_planted_copies_are_found_with_the_right_patient(
    cohort: tuple[Cases, Cases, Cases], honest: Honest, name: str, share: int
) -> None:
    scans = list(range(3, 3 + 3 * share, 3))
    found = screen(cohort, honest, scans, DISGUISES[name])
    assert found.flagged == tuple(range(share))
    named = [found.matches[i].copy_of for i in range(share)]
    assert named == [str(cohort[0].patients[s]) for s in scans]
    assert found.power == 1.0 and (found.n_train, found.n_holdout) == (60, 40)


def test_one_patient_copied_into_one_percent_is_flagged(
    cohort: tuple[Cases, Cases, Cases], honest: Honest
) -> None:
    found = screen(cohort, honest, [17], DISGUISES["combined"])
    assert found.patients == (str(cohort[0].patients[17]),)
    assert Copies.model_validate_json(found.model_dump_json()) == found


def test_honest_samples_are_not_flagged(cohort: tuple[Cases, Cases, Cases], honest: Honest) -> None:
    assert screen(cohort, honest, []).flagged == ()


def test_without_a_holdout_copies_are_still_decided(cohort: tuple[Cases, Cases, Cases]) -> None:
    nobody = cases(np.random.default_rng(0), 0, "h")
    samples = plant(cohort, [3, 40, 41], DISGUISES["flip"])
    test = GapTest(cohort[0], nobody, IMAGE, Key.root(1))
    found = test.find(samples, 0.01)
    assert found.flagged == (0, 1, 2) and found.n_holdout == 0 and found.power == 1.0
    assert found.matches[1].copy_of == str(cohort[0].patients[40])
    assert test.find(cohort[2], 0.01).flagged == ()


def test_nobody_is_matched_with_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patient's own scans, of which there are two, are never the best match."""
    seen = []

    def spy(*given: Any) -> Copies:
        seen.append(given[2])
        return judge(*given)

    monkeypatch.setattr("synthmed.metrics.copies.judge", spy)
    rng = np.random.default_rng(1)
    train, holdout = cases(rng, 20, "t", twice=20), cases(rng, 20, "h", twice=20)
    GapTest(train, holdout, IMAGE, Key.root(1)).find(holdout, 0.01)
    gaps, leads = seen[0].gaps, seen[0].leads
    assert len(gaps) == len(leads) == 40
    # had people of train met themselves, their gaps were far above zero, and others' far below
    assert np.abs(gaps).max() < 0.3 and leads.max() < 0.3


def likeness(n: int, seed: int = 6) -> np.ndarray:
    """(n, n) scores of people, each of whom is a little more alike some than others."""
    scores = 0.5 + 0.05 * np.random.default_rng(seed).standard_normal((n, n))
    scores = np.maximum(scores, scores.T)
    np.fill_diagonal(scores, -np.inf)
    return scores


def test_one_person_under_two_names_stands_out() -> None:
    names = np.array([f"p{i:02d}" for i in range(30)])
    scores = likeness(30)
    assert one_person(scores, names, names) == ()
    for i, j in ((3, 21), (8, 9)):
        scores[i, j] = scores[j, i] = 1.4
    assert set(one_person(scores, names, names)) == {("p03", "p21"), ("p08", "p09")}
    # a third name of theirs, or a third person as near: nobody stands out
    scores[[3, 21], 14] = scores[14, [3, 21]] = 1.3
    assert one_person(scores, names, names) == (("p08", "p09"),)
    # two scans a person, and some who do not play
    wide = np.hstack([scores, likeness(30, 7), np.full((30, 2), 0.9)])
    assert one_person(wide, names, np.concatenate([names, names, ["q", "r"]])) == (("p08", "p09"),)


def test_of_few_people_nobody_can_tell() -> None:
    for n, found in ((11, None), (12, (("p00", "p01"),))):
        scores = likeness(n)
        scores[0, 1] = scores[1, 0] = 1.4
        names = np.array([f"p{i:02d}" for i in range(n)])
        assert one_person(scores, names, names) == found


@pytest.mark.parametrize("n_pairs", [10, 14, 15])
def test_all_may_be_under_two_names(n_pairs: int) -> None:
    """As where data.patient names the visit: nobody, or hardly anybody, is left to compare with."""
    names = np.array([f"p{i:02d}" for i in range(30)])
    scores = likeness(30)
    for i in range(0, 2 * n_pairs, 2):
        scores[i, i + 1] = scores[i + 1, i] = 1.4 + 0.001 * i
    pairs = {(names[i], names[i + 1]) for i in range(0, 2 * n_pairs, 2)}
    assert set(one_person(scores, names, names)) == pairs


@pytest.mark.parametrize("value", [0.0, 0.5, similarity.ImageSimilarity((0,)).same])
def test_people_who_are_all_as_alike_are_nobody_twice(value: float) -> None:
    names = np.array([f"p{i:02d}" for i in range(14)])
    scores = np.full((14, 14), value)
    np.fill_diagonal(scores, -np.inf)
    assert one_person(scores, names, names) == ()


def test_more_patients_than_players(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthmed.metrics.copies.MOST_PLAYERS", 8)
    rng = np.random.default_rng(4)
    train, holdout = cases(rng, 12, "t", twice=12), cases(rng, 3, "h", twice=2)
    for seed in range(4):
        for side in (holdout, cases(rng, 0, "h")):
            found = GapTest(train, side, IMAGE, Key.root(seed)).find(train, 0.01)
            assert 0 <= found.power <= 1 and found.n_train == 12


class Vectors:
    """How near vectors are, for what does not depend on images."""

    name = "vectors"
    same = float(-np.log(0.1))

    def features(self, side: Cases) -> np.ndarray:
        return side.volumes[:, 0, :, 0, 0].astype(np.float64)

    def fit(self, train: np.ndarray) -> Vectors:
        return self

    def compare(self, queries: np.ndarray, references: np.ndarray) -> Scores:
        return Scores(-np.log(cdist(queries, references) + 0.1))

    def closer(self, found: Scores, queries: Looked, references: Looked) -> np.ndarray:
        return found.best


def vectors(of: np.ndarray, prefix: str) -> Cases:
    names = np.array([f"{prefix}{i:03d}" for i in range(len(of))])
    return Cases(of[:, None, :, None, None], names, [])


@pytest.mark.parametrize(("n_names", "holdout"), [(1, True), (2, True), (1, False), (2, False)])
def test_power_is_how_often_an_exact_copy_alone_is_found(n_names: int, holdout: bool) -> None:
    """Also where three people have as many names on each side, so that nobody stands out."""
    rng = np.random.default_rng(3)
    n, d = 40, 10
    of = {side: rng.standard_normal((n, d)) for side in "ths"}
    for i in range(3):
        for name in range(n_names):
            for side in "th":
                if (side, name) != ("t", 0):
                    near = of["t"][4 * i] + 0.05 * rng.standard_normal(d)
                    of[side][4 * i + name] = near if n_names > 1 else of[side][4 * i]
    train = vectors(of["t"], "t")
    held = vectors(of["h"] if holdout else np.zeros((0, d)), "h")
    test = GapTest(train, held, Vectors(), Key.root(0))
    found = []
    for i in range(n):
        planted = of["s"].copy()
        planted[7] = of["t"][i]
        copies = test.find(vectors(planted, "s"), 0.01)
        found.append(copies.matches[7].copy_of == str(train.patients[i]))
    assert copies.power == np.mean(found)
    assert (copies.power == 1) == (n_names == 1)


def test_many_copies_are_rare_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that learned twenty people by heart: each sample alone may be by chance.

    More than three quarters of the cohorts are found, of which fewer than half were.
    """

    def flagged(seed: int) -> dict[str, set[str | None]]:
        rng = np.random.default_rng(seed)
        d, n = 10, 60
        of = rng.standard_normal((20, d))
        train = vectors(of, "t")
        test = GapTest(train, vectors(rng.standard_normal((40, d)), "h"), Vectors(), Key.root(seed))
        tens = np.stack([of[rng.permutation(20)[:10]].mean(axis=0) for _ in range(n)])
        sources = rng.integers(0, 20, n)
        samples = {
            "copies": of[sources] + 0.6 * rng.standard_normal((n, d)),
            "people": rng.standard_normal((n, d)),
            "averages of ten": tens,
            "averages with noise": tens + 0.3 * rng.standard_normal((n, d)),
        }
        found = {name: test.find(vectors(x, "s"), 0.01).matches for name, x in samples.items()}
        right = [
            m.copy_of == str(train.patients[i])
            for m, i in zip(found["copies"], sources, strict=True)
        ]
        n_named = sum(m.copy_of is not None for m in found["copies"])
        assert sum(right) >= 0.9 * n_named
        return {name: {m.copy_of for m in of} - {None} for name, of in found.items()}

    together = [flagged(seed) for seed in range(40)]
    monkeypatch.setattr(copies, "TOGETHER", 0.0)
    alone = [flagged(seed) for seed in range(40)]
    alarms = {
        name: [sum(bool(found[name]) for found in of) for of in (alone, together)]
        for name in together[0]
    }
    assert alarms["copies"][0] <= 20 and alarms["copies"][1] >= 30
    assert all(was == now <= 1 for name, (was, now) in alarms.items() if name != "copies"), alarms


@pytest.mark.parametrize(
    ("n_players", "n_samples", "n_beyond", "of", "flagged"),
    [
        (60, 60, 30, 20, 30),
        (60, 60, 30, 10, 30),
        (60, 60, 30, 7, 0),  # chance 0.007, of which a tenth of 0.01 is too little
        (60, 60, 30, 1, 0),  # samples that resemble one another
        (80, 24, 6, 6, 6),
        (80, 24, 5, 5, 0),  # of 24 honest samples 0.3 would be there
        (60, 600, 300, 20, 300),  # of 600 people all 20 would be nearest to somebody beyond
        (60, 0, 0, 1, 0),
    ],
)
def test_what_makes_many_rare_together(
    n_players: int, n_samples: int, n_beyond: int, of: int, flagged: int
) -> None:
    """All just beyond the null, so that no sample is rare by itself."""
    null = np.linspace(0, 1, n_players)
    gap = np.where(np.arange(n_samples) * n_beyond % max(n_samples, 1) < n_beyond, 1.001, 0.5)
    assert (gap > 1).sum() == n_beyond
    to_train = np.zeros((n_samples, 20))
    to_train[np.arange(n_samples), np.cumsum(gap > 1) % of] = 1
    names = np.array([f"t{i:02d}" for i in range(20)])
    nobody = (np.zeros(0), np.zeros(0))
    found = judge(to_train, (gap, gap), Bar(null, null), nobody, names, names[:0], 0.01, "made up")
    assert len(found.flagged) == flagged
    assert len(found.patients) == (of if flagged else 0)


def test_copies_in_disguise_are_said_to_be_seen_as_often_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each planted alone among honest samples, the first of two scans of a patient or the only."""
    monkeypatch.setattr("synthmed.metrics.copies.IN_DISGUISE", 5)
    monkeypatch.setattr("synthmed.metrics.disguises.NOISE", 0.13)
    rng = np.random.default_rng(8)
    train, holdout = cases(rng, 16, "t", twice=4), cases(rng, 12, "h")
    samples = cases(rng, 6, "s")
    test = ImageTest(train, holdout, (0,), Key.root(2))
    said = test.find(samples, 0.01).disguised
    assert set(said) == set(disguises.DISGUISES)
    rows = [int(np.flatnonzero(train.patients == f"t{i:03d}")[0]) for i in (0, 3, 7, 11, 15)]
    for name, how in disguises.DISGUISES.items():
        key = Key.root(2).fold("disguised").fold(name)
        copies = disguises.disguised(train, np.array(rows), how, key)
        found = []
        for i, row in enumerate(rows):
            volumes = samples.volumes.copy()
            volumes[2] = copies.volumes[i]
            verdict = test.find(Cases(volumes, samples.patients, []), 0.01).matches[2]
            found.append(verdict.copy_of == train.patients[row])
        assert said[name] == np.mean(found), name
    assert 0 < np.mean(list(said.values())) < 1, "neither blind nor without fail"


def test_disguises_do_what_they_are_called() -> None:
    x = np.random.default_rng(0).random((2, 10, 11, 12)) * 300 + 50
    rng = np.random.default_rng(1)
    noise = disguises.noisy(x, rng) - x
    assert np.allclose(noise.std(axis=(1, 2, 3)), 0.05 * np.ptp(x, axis=(1, 2, 3)), rtol=0.1)
    moved = disguises.moved(x, rng)
    assert np.array_equal(moved, shift_of_scipy(x, (0, 1, -2, 1), order=0, mode="nearest"))
    altered = disguises.altered(x, rng)
    assert np.ptp(altered) < 0.75 * np.ptp(x)
    inside, there = altered[:, 1:, :-2, 1:], x[:, ::-1][:, :-1, 2:, :-1]
    for a, b in zip(inside, there, strict=True):
        assert np.array_equal(np.argsort(a, axis=None), np.argsort(b, axis=None))


def test_a_single_training_patient_gives_no_power() -> None:
    """With one patient nobody can be told from a second, so nothing is ever flagged."""
    rng = np.random.default_rng(5)
    one, holdout = cases(rng, 1, "t"), cases(rng, 40, "h")
    found = GapTest(one, holdout, IMAGE, Key.root(1)).find(one, 0.01)
    assert found.flagged == () and found.power == 0


def test_a_screen_without_power_says_so() -> None:
    rng = np.random.default_rng(2)
    train, holdout, samples = cases(rng, 6, "t"), cases(rng, 3, "h"), cases(rng, 10, "s")
    given = sides(train, holdout, samples)
    by_name = {e.name: e for e in Copied().estimate(given, Shared(given))}
    assert by_name["copied_patients"].value == 0 and by_name["copied_patients"].ci == (0.0, 1.0)
    assert "in 0% of cases" in by_name["copied_patients"].note
    assert by_name["copies_shipped"].value is None, "a test that sees nothing finds nothing"


def test_estimates_count_samples_before_the_filter_and_patients_once(
    cohort: tuple[Cases, Cases, Cases], honest: Honest
) -> None:
    twice = [int(i) for i in np.nonzero(cohort[0].patients == "t003")[0]]
    as_sampled = screen(cohort, honest, [*twice, 50])
    given = sides(cohort[0], cohort[1], cohort[2])
    by_name = {e.name: e for e in Copied().estimate(given, Shared(given, as_sampled))}
    assert by_name["copies"].value == 0.03 and by_name["copies"].n == 100
    assert by_name["copied_patients"].value == pytest.approx(2 / 60)
    exact = reference.binomtest(2, 60).proportion_ci(method="exact")
    assert by_name["copied_patients"].ci == pytest.approx((exact.low, exact.high))
    assert by_name["copies_shipped"].value == 0


def test_a_copy_that_ships_is_seen_by_the_second_similarity(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    given = sides(cohort[0], cohort[1], plant(cohort, [5, 30], DISGUISES["flip"]))
    found = Shared(given).as_shipped()
    assert found.flagged == (0, 1) and found.similarity == "descriptor"


def test_similarity_is_invariant_where_it_promises(cohort: tuple[Cases, Cases, Cases]) -> None:
    train = cohort[0]
    one = train.volumes[:1, 0].astype(np.float32)
    features = IMAGE.features(train)
    itself = IMAGE.compare(features[:1], features).best
    assert itself[0, 0] == pytest.approx(IMAGE.same, abs=1e-3) and itself[0].argmax() == 0
    flipped = IMAGE.features(made(one[:, None, ::-1]))
    assert IMAGE.compare(flipped, features).best[0, 0] == pytest.approx(IMAGE.same, abs=1e-3)
    ranks = normal_scores(one[None])
    assert normal_scores(np.exp(2 * one[None])) == pytest.approx(ranks, abs=0.25)
    flat = IMAGE.features(made(np.full((1, 1, *GRID), 0.5)))
    assert (IMAGE.compare(flat, features).best == 0).all()


def affine_by_scipy(x: np.ndarray) -> list[np.ndarray]:
    """Scaled by 0.95 and 1.05, turned by -6 and 6 degrees about each axis."""
    linear = [np.eye(3) / s for s in (0.95, 1.05)]
    for axis in range(3):
        for degrees in (-6, 6):
            turned = Rotation.from_rotvec(degrees * np.eye(3)[axis], degrees=True)
            linear.append(turned.as_matrix())
    extent, middle = np.array(x.shape), (np.array(x.shape) - 1) / 2
    out = []
    for m in linear:
        m = np.diag(extent) @ m @ np.diag(1 / extent)  # shares of the field of view
        out.append(affine_transform(x, m, middle - m @ middle, order=1, mode="grid-constant"))
    return out


def test_affine_moves_are_those_of_scipy() -> None:
    scans = np.random.default_rng(5).standard_normal((2, 1, 8, 7, 6)).astype(np.float32)
    found = [m.numpy() for m in moves.affines(torch.from_numpy(scans))]
    for k in range(2):
        expected = affine_by_scipy(scans[k, 0])
        mine = [m[k, 0] for m in found]
        assert len(mine) == len(expected) == 8
        # in any order of senses and axes: each is one of them, and none is left over
        order = [int(np.argmin([np.abs(e - m).max() for m in mine])) for e in expected]
        assert sorted(order) == list(range(8))
        for i, e in zip(order, expected, strict=True):
            assert mine[i] == pytest.approx(e, abs=1e-5)


def test_similarity_is_the_largest_pearson_correlation_of_a_loop() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 1, 1, 1, 8, 7, 6)).astype(np.float32)
    best = -1.0
    for flip in (False, True):
        x = a[0, 0, 0, ::-1] if flip else a[0, 0, 0]
        for s in np.ndindex(5, 5, 5):
            shift = np.array(s) - 2
            out = np.zeros_like(x)
            for i in np.ndindex(*x.shape):
                j = tuple(np.array(i) - shift)
                if all(0 <= k < n for k, n in zip(j, x.shape, strict=True)):
                    out[i] = x[j]
            best = max(best, np.corrcoef(out.ravel(), b.ravel())[0, 1])
    centred = b - b.mean()
    for flip in (False, True):
        x = a[0, 0, 0, ::-1] if flip else a[0, 0, 0]
        for moved in affine_by_scipy(x):
            for s in np.vstack([np.zeros((1, 3), int), np.eye(3, dtype=int)]):
                for sign in (-1, 1):
                    out = shift_of_scipy(moved, sign * s, order=0, mode="constant")
                    best = max(best, np.corrcoef(out.ravel(), b.ravel())[0, 1])
    assert np.tanh(IMAGE.compare(a, centred).best[0, 0]) == pytest.approx(best, abs=1e-5)
    shifted = np.zeros_like(b)
    shifted[..., 2:, :-1, :] = b[..., :-2, 1:, :]
    direct = np.corrcoef(shifted.ravel(), shifted.ravel())[0, 1]
    assert np.tanh(IMAGE.compare(shifted, shifted - shifted.mean()).best[0, 0]) == pytest.approx(
        min(direct, 0.9999), abs=1e-4
    )


def test_shifts_by_half_voxels_make_a_ball() -> None:
    for mirrored in (False, True):
        bank = [m for m in moves.shifts(8) if m.mirrored == mirrored]
        side = -1 if mirrored else 1
        by = [
            tuple(np.array(m.shift) - np.array(similarity.HALVES[m.grid]) * (side, 1, 1) / 2)
            for m in bank
        ]
        assert by == [m.place for m in bank]
        assert len(by) == len(set(by)) == 257
        assert max(np.linalg.norm(x) for x in by) == 2
        assert {(0.5, -1.5, 0.5), (0, 0, 0), (-2, 0, 0)} <= set(by)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_copy_moved_by_half_voxels_of_the_averaged_grid_is_the_same_scan(mirrored: bool) -> None:
    """Two voxels of the scan are one of the grid; one voxel is half a voxel and stays sharp."""
    rng = np.random.default_rng(6)
    field = gaussian_filter(rng.standard_normal((54, 54, 54)), 1.0)
    a, b = field[3:51, 3:51, 3:51], field[2:50, 4:52, 6:54]
    copy = b[::-1] if mirrored else b
    scans = [0.5 + 0.1 * x[None, None] / field.std() for x in (a, copy)]
    first, second = (TISSUE.features(made(x)) for x in scans)
    # what moved in at the edges is new, one voxel in 12 an axis, so the match is not perfect
    assert np.tanh(TISSUE.compare(second, first).best[0, 0]) > 0.9
    assert np.tanh(TISSUE.compare(second[:, :1], first[:, :1]).best[0, 0]) < 0.7


def strangers(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 1, 70, 70, 70) fields of whose detail 24 voxels a side show half."""
    fields = gaussian_filter(rng.standard_normal((n, 70, 70, 70)), (0, 2.2, 2.2, 2.2))
    return 0.5 + 0.1 * fields[:, None] / fields.std()


def looked(side: Cases, features: np.ndarray) -> Looked:
    return Looked(side, np.arange(len(side)), features)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("by", [(1, -2, 1), (3, 1, -1)])
def test_a_closer_look_moves_a_copy_to_its_place(mirrored: bool, by: tuple[int, int, int]) -> None:
    """A voxel of the averaged grid is 2.67 of the scan: no shift by whole ones comes near."""
    rng = np.random.default_rng(8)
    fields = strangers(rng, 20)
    train = made(fields[:, :, 3:67, 3:67, 3:67])
    a, b, c = (slice(3 - s, 67 - s) for s in by)
    moved = fields[:4, :, a, b, c]
    copies = made(moved[:, :, ::-1] if mirrored else moved)
    real, queries = IMAGE.features(train), IMAGE.features(copies)
    found = IMAGE.compare(queries, real)
    closer = IMAGE.closer(found, looked(copies, queries), looked(train, real))
    own = np.arange(4)
    # what came in from outside is a 24th an axis, so the match is not perfect
    assert np.tanh(found.best[own, own]).max() < 0.89
    assert np.tanh(closer[own, own]).min() > 0.94
    assert (closer >= found.best).all()
    others = ~np.eye(4, 20, dtype=bool)
    assert (closer[others] - found.best[others]).max() < 0.1
    assert np.count_nonzero((closer > found.best).any(axis=0)) <= 4 * moves.ANEW


def test_a_closer_look_leaves_out_who_is_nobody_to_look_at() -> None:
    rng = np.random.default_rng(9)
    train = made(strangers(rng, 5)[:, :, :40, :40, :40])
    real = IMAGE.features(train)
    found = IMAGE.compare(real, real)
    nobody = np.full_like(found.best, -np.inf)
    nobody[0, 3] = found.best[0, 3]
    people = looked(train, real)
    again = IMAGE.closer(found._replace(best=nobody), people, people)
    assert np.isinf(again).sum() == 24 and again[0, 3] >= nobody[0, 3]
    itself = IMAGE.closer(found, people, people)
    assert (np.diag(itself) == np.diag(found.best)).all()
    with pytest.raises(ValueError, match="compare"):
        IMAGE.closer(found._replace(where=None), people, people)


def test_a_closer_look_is_at_one_scan_a_patient() -> None:
    """Twelve scans of one person take no place of others."""
    fields = strangers(np.random.default_rng(12), 14)[:, :, :48, :48, :48]
    names = np.array(["often"] * 12 + ["second", "third"])
    train = Cases(fields.astype(np.float16), names, [{}] * 14)
    moved = made(np.roll(fields[12:13], (1, 1, 1), (2, 3, 4)))
    real, query = IMAGE.features(train), IMAGE.features(moved)
    found = IMAGE.compare(query, real)
    # all the scans of one are nearer at the first look
    first = found._replace(best=np.where(names == "often", 2.0, found.best))
    again = IMAGE.closer(first, looked(moved, query), looked(train, real))
    assert again[0, 12] > found.best[0, 12] + 0.2


def test_what_is_known_of_samples_is_looked_at_closer_as_well() -> None:
    """Membership asks for the first look, and the copies test goes on from it."""
    fields = strangers(np.random.default_rng(10), 16)
    train, holdout = made(fields[:8, :, :40, :40, :40]), made(fields[8:12, :, :40, :40, :40])
    samples = made(np.concatenate([fields[:2], fields[12:]])[:, :, 1:41, 1:41, 1:41])
    first = match(train, holdout, samples, IMAGE)
    test = GapTest(train, holdout, IMAGE, Key.root(0))
    anew, again = test.match(samples), test.match(samples, first)
    assert (again.to_train == anew.to_train).all()
    assert (again.to_holdout == anew.to_holdout).all()
    assert (again.to_train > first.matches.to_train).any()
    nothing_to_average = made(fields[:3, :, :24, :24, :24])
    small = IMAGE.features(nothing_to_average)
    found = IMAGE.compare(small, small)
    people = looked(nothing_to_average, small)
    assert IMAGE.closer(found, people, people) is found.best
    tissue = TISSUE.features(train)
    found = TISSUE.compare(tissue, tissue)
    people = looked(train, tissue)
    assert TISSUE.closer(found, people, people) is found.best


def test_moved_averages_are_nobodys_copy() -> None:
    """Each is as near to the fifth of those it is made of as to the first, once in its place."""
    fields = strangers(np.random.default_rng(13), 30)[:, :, :48, :48, :48]
    train, holdout = made(fields[:20]), made(fields[20:])
    few = np.stack([fields[k : k + 6].mean(axis=0) for k in (0, 6, 12, 14)])
    samples = made(np.roll(few, (1, -1, 1), (2, 3, 4)))
    test = GapTest(train, holdout, IMAGE, Key.root(0))
    found = test.match(samples)
    assert test.find(samples, 0.005, found).flagged == ()
    copies = made(np.roll(fields[:4], (1, -1, 1), (2, 3, 4)))
    assert test.find(copies, 0.005).flagged == (0, 1, 2, 3)


def test_the_view_of_tissue_does_not_see_the_background(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    """Noise where there is no tissue, below a tenth of the range: one view is lost, one is not."""
    rng = np.random.default_rng(7)
    head = cohort[0].volumes[:1, 0].astype(np.float32)
    clean = np.where(head > 0.15, head, 0)
    noisy = np.where(head > 0.15, head, 0.03 * np.abs(rng.standard_normal(head.shape)))
    found = {}
    for view in (False, True):
        look = ImageSimilarity((0,), view)
        a, b = (look.features(made(x[:, None])) for x in (clean, noisy))
        found[look.name] = float(look.compare(a, b).best[0, 0])
    assert found["tissue"] > found["image"] + 0.5


@pytest.mark.parametrize("name", ["exact", "flip", "intensity"])
def test_the_view_of_tissue_finds_planted_copies_too(
    cohort: tuple[Cases, Cases, Cases], name: str
) -> None:
    """Of these heads, which are alike but for a little tissue; of real ones see below."""
    scans = [3, 20, 44]
    few = plant(cohort, scans, DISGUISES[name])
    samples = Cases(few.volumes[:20], few.patients[:20], [{}] * 20)
    found = GapTest(cohort[0], cohort[1], TISSUE, Key.root(1)).find(samples, 0.01)
    assert found.flagged == (0, 1, 2) and found.similarity == "tissue"
    named = [found.matches[i].copy_of for i in range(3)]
    assert named == [str(cohort[0].patients[s]) for s in scans]


def crops(rng: np.random.Generator, n: int, prefix: str) -> Cases:
    """Fields of view full of tissue, each person's own, and finer than the grid is wide."""
    fields = gaussian_filter(rng.standard_normal((n, *GRID)), (0, 0.7, 0.7, 0.7))
    volumes = (0.5 + 0.1 * fields / fields.std())[:, None].astype(np.float16)
    return Cases(volumes, np.array([f"{prefix}{i:03d}" for i in range(n)]), [{}] * n)


@pytest.mark.parametrize("sides_of", ["apart", "together", "without a holdout"])
def test_a_rescan_under_another_name_is_told(sides_of: str) -> None:
    rng = np.random.default_rng(11)
    train, holdout, nobody = (
        crops(rng, 30, "t"),
        crops(rng, 20, "h"),
        Cases(np.zeros((0, 1, *GRID), np.float16), np.zeros(0, str), []),
    )
    noise = 0.05 * rng.standard_normal(GRID)
    again = Cases((train.volumes[:1] + noise).astype(np.float16), np.array(["z"]), [{}])
    if sides_of == "apart":
        of = train, added(holdout, again)
    else:
        of = added(train, again), holdout if sides_of == "together" else nobody
    samples = crops(rng, 3, "s")
    found = ImageTest(*of, (0,), Key.root(1)).find(samples, 0.01)
    assert [set(pair) for pair in found.under_two_names] == [{"t000", "z"}]
    honest = ImageTest(train, holdout, (0,), Key.root(1)).find(samples, 0.01)
    assert honest.under_two_names == ()


def added(one: Cases, more: Cases) -> Cases:
    return Cases(
        np.concatenate([one.volumes, more.volumes]),
        np.concatenate([one.patients, more.patients]),
        [*one.labels, *more.labels],
    )


def test_either_view_makes_a_copy(cohort: tuple[Cases, Cases, Cases]) -> None:
    """Moved by half voxels a copy stands out in one view; by its background in the other."""
    rng = np.random.default_rng(8)
    train, holdout, people = crops(rng, 30, "t"), crops(rng, 30, "h"), crops(rng, 20, "s")
    volumes = people.volumes.astype(np.float32)
    for place, scan in enumerate((4, 9)):
        original = train.volumes[scan, 0].astype(np.float32)
        apart = shift_of_scipy(original, (0.5, -1.5, 0.5), order=3, mode="nearest")
        volumes[place, 0] = apart + 0.05 * rng.standard_normal(GRID)
    pairs = [((train, holdout, made(volumes)), "tissue", [train.patients[i] for i in (4, 9)])]
    few = plant(cohort, [3, 20], DISGUISES["noise"])
    samples = Cases(few.volumes[:20], few.patients[:20], [{}] * 20)
    pairs.append(((*cohort[:2], samples), "image", [cohort[0].patients[i] for i in (3, 20)]))
    for of, by, copied in pairs:
        each = {
            v.name: GapTest(*of[:2], v, Key.root(1)).find(of[2], 0.005)
            for v in (ImageSimilarity((0,)), ImageSimilarity((0,), True))
        }
        other = each["image" if by == "tissue" else "tissue"]
        assert each[by].flagged == (0, 1)
        assert all(each[by].matches[i].gap > other.matches[i].gap for i in (0, 1))
        test = ImageTest(*of[:2], (0,), Key.root(1))
        both = test.find(of[2], 0.01)
        assert both.flagged == (0, 1) and both.false_discovery_rate == 0.01
        assert [both.matches[i].copy_of for i in (0, 1)] == [str(p) for p in copied]
        assert both.power == max(e.power for e in each.values())
        honest = Cases(of[2].volumes[2:], of[2].patients[2:], [{}] * 18)
        assert test.find(honest, 0.01).flagged == ()


@pytest.mark.real_data
@pytest.mark.skipif("SYNTHMED_REAL_DATA" not in os.environ, reason="SYNTHMED_REAL_DATA is not set")
def test_noisy_smoothed_and_mirrored_copies_of_real_scans_are_found() -> None:
    """The view of all voxels finds less than half of the noisy ones."""
    scans = np.stack(hippocampus(Path(os.environ["SYNTHMED_REAL_DATA"]))[0])[:, None]
    order = np.random.default_rng(0).permutation(len(scans))
    train, holdout, others = (
        Cases(scans[rows].astype(np.float16), np.array([f"{rows[0]}-{i}" for i in rows]), [])
        for rows in (order[:40], order[40:80], order[80:100])
    )
    rng = np.random.default_rng(1)
    for name in ("noise", "blur", "flip"):
        copies = [DISGUISES[name](train.volumes[i, 0].astype(np.float32), rng) for i in range(4)]
        samples = made(np.concatenate([np.stack(copies)[:, None], others.volumes]))
        found = ImageTest(train, holdout, (0,), Key.root(1)).find(samples, 0.01)
        assert found.flagged == (0, 1, 2, 3), name
        assert [m.copy_of for m in found.matches[:4]] == [str(p) for p in train.patients[:4]]


def test_descriptor_similarity_must_be_fitted() -> None:
    with pytest.raises(ValueError, match="call fit"):
        DescriptorSimilarity((0,)).compare(np.zeros((1, 53)), np.zeros((1, 53)))


def test_screening_is_the_same_every_time(cohort: tuple[Cases, Cases, Cases]) -> None:
    few = Cases(cohort[2].volumes[:5], cohort[2].patients[:5], [{}] * 5)
    fresh = ImageSimilarity((0,))
    first, second = (GapTest(few, few, fresh, Key.root(1)).find(few, 0.01) for _ in range(2))
    assert first == second


def test_the_naive_binomial_test_over_rejects() -> None:
    """Why the test is by gaps: samples share patients, so 'closer to train' is no coin toss.

    An honest sampler, equal sizes; the usual test asks whether more than half the samples are
    closer to train. It alarms far above its nominal 1 %.
    """
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(300):
        train, holdout = rng.standard_normal((2, 40, 8))
        samples = rng.standard_normal((200, 8))
        near = [np.linalg.norm(samples[:, None] - s, axis=2).min(axis=1) for s in (train, holdout)]
        closer = int(np.sum(near[0] < near[1]))
        alarms += reference.binomtest(closer, 200, 0.5, alternative="greater").pvalue < 0.01
    assert alarms / 300 > 0.05
