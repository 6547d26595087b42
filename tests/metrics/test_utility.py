"""utility and discriminator_auc: planted cohorts whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats as reference
from sklearn.metrics import roc_auc_score

from synthmed.keys import Key
from synthmed.metrics import (
    DiscriminatorAUC,
    Utility,
    discriminator,
    reader,
    taught,
    utility,
)
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.types import Estimate
from tests.metrics.cohorts import GRID, Points, cases, made, sides


def labelled(seed: int, n: int, prefix: str, signal: float = 0.5, swap: bool = False) -> Cases:
    """People of two kinds, one of which has a bright spot, and an age that brightens another."""
    rng = np.random.default_rng(seed)
    plain = cases(rng, n, prefix)
    volumes = plain.volumes.astype(np.float32)
    labels = []
    for i in range(n):
        ill, age = i % 2 == 1, float(rng.uniform(40, 80))
        spot = signal * (0.4 + 0.6 * rng.random())
        if ill != swap:
            volumes[i, 0, 4:9, 8:14, 8:12] += spot
        volumes[i, 0, 12:16, 8:14, 8:12] += signal * (age - 60) / 20
        labels.append({"kind": "ill" if ill else "well", "age": age})
    return Cases(volumes.astype(np.float16), plain.patients, labels)


def as_made(given: Cases) -> Cases:
    return made(given.volumes, list(given.labels))


CONDITIONS = {
    "categorical": {"kind": ("ill", "well")},
    "continuous": {"age": (40.0, 80.0)},
}


def measured(synthetic: Cases, resamples: int = 100) -> dict[tuple[str, str | None], Estimate]:
    given = sides(labelled(1, 40, "t"), labelled(2, 24, "h"), synthetic, resamples, **CONDITIONS)
    return {(e.name, e.slice): e for e in Utility(draws=2).estimate(given, Shared(given))}


def test_an_honest_cohort_teaches_and_one_with_swapped_labels_misleads() -> None:
    honest = measured(as_made(labelled(3, 40, "s")))
    swapped = measured(as_made(labelled(3, 40, "s", swap=True)))
    noise = measured(as_made(labelled(3, 40, "s", signal=0.0)))
    here = "condition=kind"
    assert honest["auc_trtr", here].value > 0.9
    assert honest["auc_tstr", here].value > 0.9
    assert swapped["auc_tstr", here].value < 0.2
    assert swapped["auc_tstr_minus_trtr", here].ci[1] < -0.5
    low, high = noise["auc_tstr", here].ci
    assert low < 0.5 < high or abs(noise["auc_tstr", here].value - 0.5) < 0.2
    assert honest["r_trtr", "condition=age"].value > 0.5
    assert honest["r_tstr", "condition=age"].value > 0.4
    # the yardstick knows nothing of the cohort
    assert honest["auc_trtr", here] == swapped["auc_trtr", here]
    assert honest["auc_tstr", here].floor == honest["auc_trtr", here].value
    gap = honest["auc_tstr", here].value - honest["auc_trtr", here].value
    assert honest["auc_tstr_minus_trtr", here].value == pytest.approx(gap, abs=1e-12)


def test_the_whole_is_the_condition_that_falls_shortest() -> None:
    found = measured(as_made(labelled(3, 40, "s", swap=True)))
    assert found["auc_tstr", None].value == found["auc_tstr", "condition=kind"].value
    assert found["auc_tstr", None].note.startswith("condition=kind")


def test_the_whole_is_judged_by_the_lower_end_as_a_policy_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One falls shorter as measured, the other may fall further short; a third has no interval."""
    ends: dict[str, tuple[float, tuple[float, float] | None]] = {
        "sure": (-0.08, (-0.1, -0.06)), "unsure": (-0.02, (-0.3, 0.2)), "unknown": (0.1, None)
    }  # fmt: skip
    few = sides(*(cases(np.random.default_rng(i), 1, "ths"[i]) for i in range(3)))
    start = Estimate(
        name="auc_tstr_minus_trtr", group="utility", value=0.0, ci=None, n=1, better="higher",
        floor=0.0, ceiling=None, method="", seed=0,
    )  # fmt: skip

    def found(metric: Utility, condition: str, *rest: Any) -> Any:
        value, ci = ends[condition]
        update = {"value": value, "ci": ci, "slice": f"condition={condition}"}
        own = [start.model_copy(update=update)]
        return utility._Found(own, own)

    monkeypatch.setattr(Utility, "_condition", found)
    for asked, first in ((["sure", "unsure"], "unsure"), (list(ends), "unknown")):
        given = Sides(**{**few.__dict__, "categorical": dict.fromkeys(asked, ("a", "b"))})
        (whole,) = [e for e in Utility().estimate(given, Shared(given)) if e.slice is None]
        assert (whole.value, whole.ci) == ends[first] and whole.note == f"condition={first}"


def with_rare(given: Cases, n: int) -> Cases:
    """The cases with another label, which so many of the ill have, and age."""
    ill = [i for i, v in enumerate(given.labels) if v["kind"] == "ill"]
    labels = [{**v, "mark": "yes" if i in ill[:n] else "no"} for i, v in enumerate(given.labels)]
    return Cases(given.volumes, given.patients, labels)


def test_with_fewer_than_ten_of_a_category_nothing_is_there_to_be_judged() -> None:
    made_up = with_rare(as_made(labelled(3, 40, "s")), 15)
    for n, trained in ((9, 15), (10, 15), (0, 15)):
        given = sides(
            with_rare(labelled(1, 40, "t"), trained), with_rare(labelled(2, 24, "h"), n), made_up,
            100, categorical={"kind": ("ill", "well"), "mark": ("yes", "no")},
        )  # fmt: skip
        found = {(e.name, e.slice): e for e in Utility(draws=1).estimate(given, Shared(given))}
        few = "a category has fewer than 10 held-out patients"
        for name in taught.names("auc"):
            whole, own = found[name, None], found[name, "condition=mark"]
            assert (whole.value is None) == (n < 10) and (few in own.note) == (0 < n < 10)
            if n < 10:
                assert (whole.ci, whole.floor, whole.n_holdout) == (None, None, None)
                assert "condition=mark; " in whole.note and "9" not in whole.note
        # for reading there are figures, and the label that has enough people is judged in a part
        assert (found["auc_tstr", "condition=mark"].value is None) == (n == 0)
        assert found["auc_tstr", "kind=ill"].value is not None
    alone = {"categorical": {"mark": ("yes", "no")}}
    given = sides(given.train, with_rare(labelled(2, 24, "h"), 9), made_up, 100, **alone)
    found = {(e.name, e.slice): e for e in Utility(draws=1).estimate(given, Shared(given))}
    assert all(e.value is None for (_, where), e in found.items() if where in (None, "mark=no"))


def test_the_interval_covers_however_few_there_are_of_a_category() -> None:
    """Of a difference of two readers, one of whom hears more noise: at least 93 of 100 hold it.

    Percentiles as they are hold it 82 times with three of a category, 89 with ten.
    """
    truth_of = [reference.norm.cdf(1 / np.sqrt(2 * (1 + s**2))) for s in (0.3, 1.0)]
    covered = {}
    for few in (3, 10, 20):
        truth = np.array(["a"] * few + ["b"] * (60 - few))
        hits = 0
        for seed in range(400):
            rng = np.random.default_rng(seed)
            judge = utility.Judge(truth, "category", 200, rng)
            seen = (truth == "a") + rng.standard_normal(60)
            said = [seen + s * rng.standard_normal(60) for s in (0.3, 1.0)]
            a, b = (judge.figures(np.stack([x, -x], axis=1)) for x in said)
            low, high = taught.interval(a - b, judge, -1.0)
            hits += low <= truth_of[0] - truth_of[1] <= high
        covered[few] = hits / 400
    assert min(covered.values()) >= 0.93, covered


def at_sites(given: Cases, swapped: str = "") -> Cases:
    """The cases at two sites of both kinds; at one of them the kinds may be written wrongly."""
    other = {"ill": "well", "well": "ill"}
    labels = []
    for i, label in enumerate(given.labels):
        site = "ab"[i // 2 % 2]
        kind = str(label["kind"])
        labels.append({**label, "site": site, "kind": other[kind] if site == swapped else kind})
    return Cases(given.volumes, given.patients, labels)


def test_a_subgroup_is_asked_of_its_own_held_out_patients() -> None:
    """A cohort with swapped kinds misleads at one site; at the other the truth is swapped too."""
    given = sides(
        at_sites(labelled(1, 40, "t")),
        at_sites(labelled(2, 48, "h"), swapped="b"),
        at_sites(as_made(labelled(3, 40, "s", swap=True))),
        100,
        categorical={"kind": ("ill", "well"), "site": ("a", "b")},
    )
    every = Utility(draws=1).estimate(given, Shared(given))
    found = {(e.name, e.slice): e for e in every}
    assert len(found) == len(every)
    real, made = found["auc_trtr", "site=a"], found["auc_tstr", "site=a"]
    assert real.value > 0.8 and made.value < 0.2 and made.floor == real.value
    assert real.note.startswith("condition=kind") and real.n_holdout == 24
    assert found["auc_tstr_minus_trtr", "site=a"].ci[1] < -0.5
    # there the cohort is right about the kind, so the site itself falls shorter
    assert found["auc_tstr_minus_trtr", "site=b"].note.startswith("condition=site")


def test_a_category_is_told_from_all_others() -> None:
    found = measured(as_made(labelled(3, 40, "s")))
    for name in ("auc_trtr", "auc_tstr", "auc_augmented_minus_classical"):
        whole = found[name, "condition=kind"]
        for kind in ("ill", "well"):  # of two each is told from the other, as in the whole
            own = found[name, f"kind={kind}"]
            assert own.value == pytest.approx(whole.value, abs=1e-12)
            assert (own.n_holdout, whole.n_holdout) == (12, 24)


def test_the_curve_takes_some_patients_evenly_and_ends_below_all() -> None:
    found = measured(as_made(labelled(3, 40, "s")))
    points = {s for _, s in found if s and "patients" in s}
    expected = {f"condition={c}, {n} patients" for c in ("kind", "age") for n in (8, 16, 32)}
    assert points == expected
    few = found["auc_trtr", "condition=kind, 8 patients"]
    both = found["auc_augmented", "condition=kind, 8 patients"]
    gain = found["auc_augmented_minus_trtr", "condition=kind, 8 patients"]
    assert gain.value == pytest.approx(both.value - few.value, abs=1e-12)
    assert both.value > few.value  # forty more scans with the same signal help eight


def test_a_draw_is_even_over_the_categories() -> None:
    person = np.array([f"p{i}" for i in range(30)])
    truth = np.array(["rare"] * 4 + ["common"] * 26)
    for d in range(5):
        chosen = taught.draw(person, truth, "category", 8, Key.root(d))
        assert len(set(chosen)) == 8
        assert sum(int(p[1:]) < 4 for p in chosen) == 4


def test_figures_are_scikit_learns_and_resampled_as_in_a_loop() -> None:
    rng = np.random.default_rng(0)
    truth = np.array(list("aabbbcccccaabb"))
    judge = utility.Judge(truth, "category", 50, np.random.default_rng(1))
    said = rng.random((len(truth), 3))
    figures = judge.figures(said)
    expected = np.mean([roc_auc_score(truth == c, said[:, k]) for k, c in enumerate("abc")])
    assert figures[0] == pytest.approx(expected, abs=1e-12)
    for b in (1, 17, 50):
        times = judge.weights[b].astype(int)
        assert [times[truth == c].sum() for c in "abc"] == [4, 5, 5]
        rows = np.repeat(np.arange(len(truth)), times)
        again = np.mean(
            [roc_auc_score(truth[rows] == c, said[rows, k]) for k, c in enumerate("abc")]
        )
        assert figures[b] == pytest.approx(again, abs=1e-12)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_who_taught_counts_in_an_interval(k: int) -> None:
    """Lessons and patients both matter: the variance of the resampled mean is that of the mean.

    A lesson moves a figure by N(0, 1), the patients who are asked move all of them by N(0, 0.2^2):
    the mean of k lessons varies by 1 / k + 0.04.
    """
    spread, hits, narrow = [], 0, 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        asked = rng.standard_normal() * 0.2 + np.r_[0, 0.2 * rng.standard_normal(300)]
        each = [asked + lesson for lesson in rng.standard_normal(k)]
        values = taught.over_lessons(each, Key.root(seed))
        assert values[0] == pytest.approx(np.mean([e[0] for e in each]), abs=1e-12)
        spread.append(values[1:].var())
        low, high = np.quantile(values[1:], [0.025, 0.975])
        hits += low <= 0 <= high
        low, high = np.quantile(np.mean(each, axis=0)[1:], [0.025, 0.975])
        narrow += low <= 0 <= high
    assert np.mean(spread) == pytest.approx(1 / k + 0.04, rel=0.1)
    # of few lessons how far they lie apart is hardly known; without them it is far too little
    assert hits > {2: 280, 3: 320, 6: 350}[k] and narrow < 0.75 * hits


def test_two_ways_are_compared_by_the_same_lessons_and_one_lesson_is_itself() -> None:
    rng = np.random.default_rng(2)
    each = [rng.random(51) for _ in range(3)]
    a = taught.over_lessons(each, Key.root(1))
    b = taught.over_lessons([e + 0.1 for e in each], Key.root(1))
    np.testing.assert_allclose(b - a, 0.1, atol=1e-12)
    np.testing.assert_array_equal(taught.over_lessons(each[:1], Key.root(1)), each[0])


def test_correlations_are_numpys() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(20)
    judge = utility.Judge(truth, "number", 30, np.random.default_rng(1))
    said = truth + rng.standard_normal(20)
    figures = judge.figures(said[:, None])
    for b in (0, 1, 30):
        rows = np.repeat(np.arange(20), judge.weights[b].astype(int))
        assert figures[b] == pytest.approx(np.corrcoef(said[rows], truth[rows])[0, 1], abs=1e-12)


def test_altered_copies_keep_their_scan_and_differ_from_it() -> None:
    given = sides(labelled(1, 12, "t"), labelled(2, 12, "h"), as_made(labelled(3, 12, "s")))
    block = given.train.volumes.astype(np.float32)
    copies = [taught.altered(block, 0, given, copy, flip=False) for copy in (0, 1)]
    assert all(c.shape == (12, 1, *GRID) for c in copies)
    for i in range(12):
        own = np.corrcoef(copies[0][i].ravel(), block[i].ravel())[0, 1]
        assert 0.7 < own < 0.9999
    assert not np.array_equal(copies[0], copies[1])
    # the same scan is altered alike, wherever its block begins
    np.testing.assert_array_equal(taught.altered(block[5:], 5, given, 0, flip=False), copies[0][5:])


def test_altered_copies_weigh_as_much_as_the_synthetic_scans_at_every_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty patients and sixty samples: with eight patients as much is added as with all."""
    people = labelled(1, 20, "t"), labelled(2, 12, "h"), as_made(labelled(3, 60, "s"))
    given = sides(*people, 100, categorical=CONDITIONS["categorical"])
    weighed: list[tuple[int, float]] = []

    def fit(x: Any, y: Any, w: Any, *rest: Any) -> Any:
        weighed.append((len(x), float(w.sum())))
        return reader.fit(x, y, w, *rest)

    monkeypatch.setattr(utility, "fit", fit)
    utility.Utility(draws=1).estimate(given, Shared(given))
    # trtr, tstr, augmented, classical of all patients; then trtr, augmented, classical of points
    assert [w for _, w in weighed[:4]] == pytest.approx([20, 60, 80, 80])
    assert [w for _, w in weighed[4:]] == pytest.approx([8, 68, 68, 16, 76, 76])
    assert weighed[6][0] == 8 * (1 + taught.FEWEST_COPIES)


def test_the_interval_of_a_difference_is_paired() -> None:
    """Two readers that say the same differ by exactly nothing, however few are asked."""
    truth = np.array(list("ab" * 6))
    judge = utility.Judge(truth, "category", 100, np.random.default_rng(1))
    said = np.random.default_rng(0).random((12, 2))
    assert np.ptp(judge.figures(said) - judge.figures(said)) == 0
    assert np.ptp(judge.figures(said)) > 0.1


def test_a_discriminator_sees_noise_and_not_another_draw_of_people() -> None:
    rng = np.random.default_rng(5)
    train, holdout = cases(rng, 50, "t"), cases(rng, 40, "h")
    same = cases(rng, 40, "s").volumes
    found = []
    for volumes in (same, same + 0.05 * rng.standard_normal(same.shape)):
        given = sides(train, holdout, made(volumes))
        (e,) = DiscriminatorAUC().estimate(given, Shared(given))
        found.append(e)
    honest, noisy = found
    assert noisy.value > 0.95
    assert honest.ci[0] < 0.6 and honest.value < 0.75
    assert honest.ceiling > honest.floor


def test_the_interval_of_a_discriminator_is_that_of_halves() -> None:
    """Eight people on a side are the fewest that have halves; of n told apart in all halves the
    end away from 1 is the exact bound for n of n."""
    rng = np.random.default_rng(6)

    def told(n: int, apart: float) -> Estimate:
        points = {side: rng.standard_normal((n, 4)) for side in ("train", "holdout", "blurred")}
        given = Points(0, **points, synthetic=rng.standard_normal((n, 4)) + apart)
        (e,) = DiscriminatorAUC(halves=20).estimate(given.sides, given)
        return e

    few = told(7, 0.0)
    assert few.value is not None and few.ci is None and "too few" in few.note
    perfect = told(16, 20.0)
    assert perfect.value == 1.0 and perfect.ci == (pytest.approx(0.025 ** (1 / 16)), 1.0)
    low, high = told(16, 0.3).ci
    assert 0.1 < high - low < 0.9


def test_a_discriminator_that_is_perfect_in_one_draw_keeps_an_interval() -> None:
    """Its halves are of that draw, and all 1, while the mean over draws is a little less."""
    nearly = np.array([1.0] * 99 + [0.9375])
    for halves in (np.ones(20), nearly):
        low, high = discriminator._interval(0.9995, halves, 16)
        assert low == pytest.approx(0.025 ** (1 / 16)) and high >= 0.9995
    assert discriminator._interval(0.96, nearly, 16)[0] > 0.94


def test_values_that_are_all_equal_say_nothing_of_a_reader() -> None:
    """The r of a constant would be 0, and its difference to another 0 as well: no evidence."""
    equal, apart = np.full(12, 3.0), np.array([1.5] + [3.0] * 11)
    assert utility._untestable("number", equal, 10) == "all values are equal in holdout"
    assert utility._untestable("number", apart, 10) == ""


def test_a_figure_without_spread_keeps_an_interval() -> None:
    """Ten of ten right: the exact bound of the smaller category; of a difference, both ways."""
    truth = np.array(list("a" * 10 + "b" * 30))
    judge = utility.Judge(truth, "category", 100, np.random.default_rng(1))
    said = np.stack([truth == "a", truth == "b"], axis=1).astype(float)
    perfect = judge.figures(said)
    low = 0.025 ** (1 / 10)
    assert taught.interval(perfect, judge) == (pytest.approx(low), 1.0)
    nothing = taught.interval(perfect - perfect, judge, -1.0)
    assert nothing == (pytest.approx(low - 1), pytest.approx(1 - low))
