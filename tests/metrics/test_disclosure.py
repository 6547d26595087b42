"""Singling out, linkability, inference: silent where nothing leaks, loud where copies ship."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as reference
from sklearn.neighbors import KNeighborsClassifier

from synthmed.metrics import Disclosure
from synthmed.metrics.inference import inference
from synthmed.metrics.linkability import linkability, linked
from synthmed.metrics.records import Records, Targets, targets
from synthmed.metrics.risk import Outcome, Rate, of_patients, of_trials, risk, wilson
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.singling_out import Columns, alone, columns, describe, singling_out
from synthmed.types import Estimate
from tests.metrics.cohorts import sides
from tests.metrics.people import CONDITIONS, copied, people

NAMES = ("singling_out", "linkability", "attribute_inference")


def estimates(of: Sides) -> dict[tuple[str, str | None], Estimate]:
    return {(e.name, e.slice): e for e in Disclosure().estimate(of, Shared(of))}


def drawn(seed: int, n_train: int = 36, n_holdout: int = 24, n_made: int = 40) -> Sides:
    rng = np.random.default_rng(seed)
    train, holdout = people(rng, n_train, "t"), people(rng, n_holdout, "h")
    return sides(train, holdout, people(rng, n_made, "s"), seed=seed, **CONDITIONS)


def tables(of: Sides) -> Targets:
    found = targets(Shared(of), "synthetic")
    assert found is not None
    return found


def test_wilson_is_scipys_and_takes_fractions() -> None:
    for k, n in ((0, 50), (3, 24), (24, 24), (70, 100)):
        exact = reference.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert wilson(2, 24)[0] < wilson(2.5, 24)[0] < wilson(3, 24)[0]
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


@pytest.mark.parametrize(
    ("train", "control"), [((9, 40), (3, 24)), ((40, 40), (3, 24)), ((0, 40), (23, 24))]
)
def test_the_risk_is_anonymeters_and_its_limits_solve_their_equations(
    train: tuple[int, int], control: tuple[int, int]
) -> None:
    t, c = of_trials(*train), of_trials(*control)
    found = risk(Outcome(t, c, 0.1, train[1], control[1]))
    assert found is not None
    value, (low, high) = found
    assert value == pytest.approx((t.value - c.value) / (1 - c.value), abs=1e-12)
    assert low <= value <= high <= 1
    q_t, q_c = 1 - t.value, 1 - c.value
    # the larger ratio of failures is the smaller risk
    for ratio, end_t, end_c in (
        (1 - low, 1 - t.ci[0], 1 - c.ci[1]),
        (1 - high, 1 - t.ci[1], 1 - c.ci[0]),
    ):
        left, right = (q_t - ratio * q_c) ** 2, (end_t - q_t) ** 2 + (ratio * (q_c - end_c)) ** 2
        assert left == pytest.approx(right, abs=1e-9)


def test_an_attack_that_succeeds_on_every_stranger_tells_no_risk() -> None:
    assert risk(Outcome(of_trials(40, 40), of_trials(24, 24), 0.5, 40, 24)) is None


@pytest.mark.parametrize(("p_train", "p_control"), [(0.1, 0.1), (0.6, 0.6), (0.7, 0.2)])
def test_the_interval_of_the_risk_covers(p_train: float, p_control: float) -> None:
    rng = np.random.default_rng(0)
    truth, hits = (p_train - p_control) / (1 - p_control), 0
    for _ in range(400):
        t, c = of_trials(rng.binomial(60, p_train), 60), of_trials(rng.binomial(40, p_control), 40)
        found = risk(Outcome(t, c, 0.0, 60, 40))
        assert found is not None
        hits += found[1][0] <= truth <= found[1][1]
    assert hits >= 0.93 * 400


def test_honest_cohorts_are_not_accused() -> None:
    """The image teaches the label of anybody; that is no risk of those who were in."""
    hits, n = dict.fromkeys((*NAMES, "kind", "age"), 0), 70
    control = []
    for seed in range(n):
        found = estimates(drawn(seed))
        chosen = {
            "singling_out": found["singling_out", None],
            "linkability": found["linkability", None],
            "attribute_inference": found["attribute_inference", None],
            "kind": found["attribute_inference", "condition=kind"],
            "age": found["attribute_inference", "condition=age"],
        }
        for name, e in chosen.items():
            hits[name] += e.ci[0] <= 0 <= e.ci[1]
        control.append(inference(tables(drawn(seed)), "kind"))
    assert sum(hits.values()) >= 0.93 * n * len(hits), hits
    # each one: a true coverage of 95 % falls below this once in a thousand times
    assert min(hits.values()) >= reference.binom.ppf(1e-3, n, 0.95), hits
    rates = [o.control.value - o.baseline for o in control if o is not None]
    assert np.mean(rates) > 0.05  # the label can be read off a stranger's image too


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_cohort_of_copies_is_accused_by_every_attack(noise: float) -> None:
    of = drawn(3)
    stored = copied(of.train, noise, np.random.default_rng(4))
    found = estimates(Sides(**{**of.__dict__, "synthetic": stored}))
    assert set(found) == {(n, None) for n in NAMES} | {
        ("attribute_inference", f"condition={c}") for c in ("kind", "age")
    }
    for e in found.values():
        assert e.ci[0] > 0 and e.value > 0.15 and "too weak" not in e.note
        assert (e.n, e.n_holdout, e.floor) == (36, 24, 0.0)
        if noise == 0:
            assert e.value == pytest.approx(e.ceiling, abs=1e-9)
    assert found["linkability", None].value > 0.9
    # what copies would do is known without the cohort
    for key, e in estimates(of).items():
        assert e.ceiling == pytest.approx(found[key].ceiling, abs=1e-9)


def test_one_record_in_a_hundred_people_fits_as_often_as_all_choices_of_them_say() -> None:
    rng = np.random.default_rng(5)
    fits = rng.random((30, 7)) < 0.2
    for m in (2, 4, 6):
        chosen = list(itertools.combinations(range(7), m))
        exactly = np.mean([[row[list(c)].sum() == 1 for c in chosen] for row in fits])
        assert alone(fits, m).value == pytest.approx(exactly, abs=1e-12)
    without = [alone(np.delete(fits, i, axis=1), 4).value for i in range(7)]
    expected = of_patients(alone(fits, 4).value, np.array(without))
    assert alone(fits, 4).ci == pytest.approx(expected.ci, abs=1e-12)
    nobody = alone(np.zeros((30, 7), dtype=bool), 4)
    assert nobody == Rate(0.0, wilson(0, 7))


def test_descriptions_fit_whom_a_loop_says_and_always_the_sample_they_are_of() -> None:
    found = tables(drawn(6))
    cohort, train = columns(found.cohort, found), columns(found.train, found)
    told = describe(cohort, np.random.default_rng(0), whole=True)
    fits = told.fit(train)
    for p, i in itertools.product(range(0, len(fits), 23), range(len(found.train))):
        inside = all(
            (lo == -np.inf and hi == np.inf) or lo - 1e-9 <= x <= hi + 1e-9
            for lo, hi, x in zip(told.low[p], told.high[p], train.numbers[i], strict=True)
        )
        same = all(
            c < 0 or c == x for c, x in zip(told.category[p], train.categories[i], strict=True)
        )
        assert fits[p, i] == (inside and same)
    asked = np.isfinite(told.low) | np.isfinite(told.high)
    assert told.fit(cohort).any(axis=1).all() and asked.any(axis=1).all()
    guessed = describe(cohort, np.random.default_rng(0), whole=False)
    assert not guessed.fit(cohort).any(axis=1).all()
    # who lacks a value is never found by it
    blank = Columns(np.full_like(train.numbers, np.nan), np.full_like(train.categories, -1))
    assert not told.fit(blank).any()


def test_halves_are_linked_as_in_a_loop() -> None:
    found = tables(drawn(7))
    cohort, train = found.cohort, found.train
    sd = np.std([r["age"] for r in cohort.labels])
    expected = []
    for i in range(len(train)):
        above = [
            np.sum((train.upper[i] - cohort.upper[j]) ** 2)
            + ((train.labels[i]["age"] - cohort.labels[j]["age"]) / sd) ** 2
            + (train.labels[i]["kind"] != cohort.labels[j]["kind"])
            for j in range(len(cohort))
        ]
        below = np.sum((train.lower[i] - cohort.lower) ** 2, axis=1)
        expected.append(bool(np.argmin(above) == np.argmin(below)))
    assert linked(found, train).tolist() == expected
    outcome = linkability(found)
    assert outcome.train == of_trials(sum(expected), len(train))
    assert outcome.baseline == 1 / len(cohort)


def test_labels_are_guessed_as_by_scikit_learn_and_numbers_within_a_tenth() -> None:
    found = tables(drawn(8))
    own = [str(r["kind"]) for r in found.train.labels]
    made_of = [str(r["kind"]) for r in found.cohort.labels]
    near = KNeighborsClassifier(1).fit(found.cohort.image, made_of)
    told = inference(found, "kind")
    assert told is not None
    assert told.train.value == pytest.approx(np.mean(near.predict(found.train.image) == own))
    shares = [np.mean([c == o for c in made_of]) for o in own]
    assert told.baseline == pytest.approx(np.mean(shares))
    age = inference(found, "age")
    assert age is not None
    at = near.kneighbors(found.train.image, return_distance=False)[:, 0]
    apart = [
        abs(float(found.cohort.labels[j]["age"]) - float(r["age"]))
        for j, r in zip(at, found.train.labels, strict=True)
    ]
    assert age.train.value == pytest.approx(np.mean(np.array(apart) <= 4.0))


def test_without_conditions_the_image_is_linked_and_nothing_inferred() -> None:
    of = drawn(9)
    bare = Sides(**{**of.__dict__, "categorical": {}, "continuous": {}})
    assert [n for n, _ in estimates(bare)] == ["singling_out", "linkability"]
    stored = copied(of.train, 0.0, np.random.default_rng(0))
    found = estimates(Sides(**{**bare.__dict__, "synthetic": stored}))
    assert found["linkability", None].value > 0.9 and found["singling_out", None].ci[0] > 0


def test_a_patient_scanned_twice_is_one_record_and_unknown_labels_are_left_out() -> None:
    of = drawn(10)
    twice = Cases(
        np.concatenate([of.train.volumes, of.train.volumes[:5]]),
        np.concatenate([of.train.patients, of.train.patients[:5]]),
        [
            *({"age": v["age"]} if i < 4 else v for i, v in enumerate(of.train.labels)),
            {},
            {},
            {},
            {},
            {},
        ],
    )
    found = estimates(Sides(**{**of.__dict__, "train": twice}))
    assert found["singling_out", None].n == 36
    assert found["attribute_inference", "condition=kind"].n == 32
    assert found["attribute_inference", "condition=age"].n == 36
    nobody = Cases(of.holdout.volumes, of.holdout.patients, [{} for _ in of.holdout.labels])
    found = estimates(Sides(**{**of.__dict__, "holdout": nobody}))
    e = found["attribute_inference", "condition=kind"]
    assert e.value is None and "known labels" in e.note and found["linkability", None].ci


def test_a_declared_number_that_no_sample_has_describes_nobody() -> None:
    of = drawn(13)
    labels = [{"kind": v["kind"]} for v in of.synthetic.labels]
    silent = Cases(of.synthetic.volumes, of.synthetic.patients, labels)
    of = Sides(**{**of.__dict__, "synthetic": silent})
    found = estimates(of)
    assert found["singling_out", None].ci is not None
    assert found["attribute_inference", "condition=age"].value is None
    given = tables(of)
    bare = replace(given, continuous={})
    many, few = (describe(columns(t.cohort, t), rng, whole=True) for t, rng in (
        (given, np.random.default_rng(0)), (bare, np.random.default_rng(0))))  # fmt: skip
    # nothing is asked of the number, and no description is made of it alone
    assert np.isneginf(many.low[:, -1]).all() and np.isposinf(many.high[:, -1]).all()
    assert len(many.low) == len(few.low)


@pytest.mark.parametrize("case", ["no holdout", "two held out", "one sample", "collapsed"])
def test_what_cannot_be_computed_says_why(case: str) -> None:
    of = drawn(11)
    few: dict[str, Cases] = {}
    if case == "no holdout":
        few["holdout"] = people(np.random.default_rng(0), 0, "h")
    if case == "two held out":
        few["holdout"] = people(np.random.default_rng(0), 2, "h")
    if case == "one sample":
        few["synthetic"] = people(np.random.default_rng(0), 1, "s")
    if case == "collapsed":
        blank = np.zeros_like(of.synthetic.volumes)
        few["synthetic"] = Cases(blank, of.synthetic.patients, of.synthetic.labels)
    found = estimates(Sides(**{**of.__dict__, **few}))
    assert [n for n, _ in found] == list(NAMES)
    for e in found.values():
        assert e.value is None and e.ci is None and e.note and e.ceiling is None


def test_a_weak_attack_says_so() -> None:
    rng = np.random.default_rng(12)

    def strangers(n: int) -> Records:
        image, lower, upper = rng.standard_normal((3, n, 4))
        return Records(image, lower, upper, [{} for _ in range(n)])

    given = Targets(strangers(40), strangers(30), strangers(20), {}, {})
    outcomes = singling_out(given, rng), linkability(given)
    assert all(o.is_weak for o in outcomes)
    given = Targets(given.train, given.train, given.holdout, {}, {})
    outcomes = singling_out(given, rng), linkability(given)
    assert not any(o.is_weak for o in outcomes)
