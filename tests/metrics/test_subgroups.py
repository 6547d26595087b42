"""Subgroups: a cohort that fails a few is seen to, and its few are named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from synthmed import configfile
from synthmed.config import Config, Policy, Rule
from synthmed.metrics import (
    DEFAULT_METRICS,
    MMD,
    Authenticity,
    ConditionAccuracy,
    Copied,
    IntensityW1,
    Membership,
    RegionVolumeSMD,
    Utility,
)
from synthmed.metrics.anatomy import scan_volumes, thresholds
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.subgroups import Part, cut, subgroups, too_small, worst
from synthmed.policy import decide
from synthmed.progress import Progress
from synthmed.report.build import build
from synthmed.report.facts import CohortFacts
from synthmed.report.page import render
from synthmed.stages.evaluate import judge
from synthmed.types import WORST, Estimate
from tests.metrics.cohorts import cases, made, sides


def two(rng: np.random.Generator, n: int, prefix: str, n_rare: int, twice: int = 0) -> Cases:
    """People of two kinds, the rare ones first."""
    plain = cases(rng, n, prefix, twice)
    people = sorted(set(plain.patients))
    rare = set(people[:n_rare])
    return Cases(
        plain.volumes,
        plain.patients,
        [{"kind": "rare" if p in rare else "common"} for p in plain.patients],
    )


def given(spoilt: bool, n_rare: int = 14) -> Sides:
    rng = np.random.default_rng(7)
    train = two(rng, 50, "t", n_rare, twice=5)
    holdout = two(rng, 44, "h", n_rare)
    honest = two(rng, 48, "s", n_rare)
    volumes = honest.volumes.copy()
    if spoilt:
        volumes[:n_rare] += 0.04 * rng.standard_normal(volumes[:n_rare].shape).astype(np.float16)
    cohort = made(volumes, list(honest.labels))
    return sides(train, holdout, cohort, categorical={"kind": ("common", "rare")})


def estimates(of: Sides) -> dict[tuple[str, str | None], Estimate]:
    found = judge(of, Shared(of), (MMD(),), Progress("evaluate", quiet=True))
    assert len({(e.name, e.slice) for e in found}) == len(found)
    return {(e.name, e.slice): e for e in found}


def test_a_spoilt_subgroup_is_the_worst_and_named() -> None:
    honest, spoilt = estimates(given(False)), estimates(given(True))
    rare, common = ("mmd2_excess", "kind=rare"), ("mmd2_excess", "kind=common")
    assert honest[rare].ci[0] < 0 < honest[rare].ci[1]
    assert spoilt[rare].ci[0] > 0.05
    assert spoilt[common].value == honest[common].value
    worst = spoilt["mmd2_excess", WORST]
    assert (worst.value, worst.ci) == (spoilt[rare].value, spoilt[rare].ci)
    assert "kind=rare" in worst.note and worst.n == 14 and worst.n_holdout == 14


def test_a_part_is_the_same_as_a_cohort_of_those_people_on_the_same_scale() -> None:
    of = given(False)
    whole = Shared(of)
    people = subgroups(of)["kind=rare"]
    part = Part(whole, "kind=rare", people)
    rows = {
        side: [i for i, p in enumerate(c.patients) if p in people[side]]
        for side, c in (("train", of.train), ("holdout", of.holdout), ("synthetic", of.synthetic))
    }
    assert [len(r) for r in rows.values()] == [19, 14, 14]  # five of train have two scans
    assert [len(part.patients(side)) for side in rows] == [14, 14, 14]
    for a in ("train", "holdout", "synthetic"):
        for b in ("train", "blurred"):
            own = rows["holdout" if b == "blurred" else b]
            expected = whole.distances(a, b)[np.ix_(rows[a], own)]
            np.testing.assert_array_equal(part.distances(a, b), expected)
        np.testing.assert_array_equal(part.features(a), whole.features(a)[rows[a]])
    assert sum(len(g) for g in part.patients("train")) == 19


def test_subgroups_read_no_scan_again_and_share_the_classes_of_tissue() -> None:
    of = given(False)
    whole = Shared(of)
    part = Part(whole, "kind=rare", subgroups(of)["kind=rare"])
    metrics = (IntensityW1(), RegionVolumeSMD())
    for metric in metrics:
        metric.estimate(of, whole)
    for side in (of.train, of.holdout, of.synthetic):
        side.volumes[:] = np.nan  # whoever reads now, sees nothing of people
    found = [e for metric in metrics for e in metric.estimate(part.sides, part)]
    assert all(e.value is not None and 0 <= e.value < 2 for e in found)
    assert found[0].value > 0 and any(e.value > 0.01 for e in found[1:])
    assert (thresholds(part) == thresholds(whole)).all()
    voxels = [scan_volumes(s, "train", (), thresholds(s)) for s in (part, whole)]
    mine = [i for i, p in enumerate(of.train.patients) if p in part._people["train"]]
    np.testing.assert_array_equal(voxels[0], voxels[1][mine])


def test_people_with_two_labels_or_none_are_in_no_subgroup() -> None:
    rng = np.random.default_rng(1)
    plain = cases(rng, 3, "t", twice=1)
    labels = [{"kind": "a"}, {"kind": "b"}, {"kind": "a"}, {"kind": None}]
    train = Cases(plain.volumes, plain.patients, labels)
    of = sides(
        train, train, made(plain.volumes[:1], [{"kind": "a"}]), categorical={"kind": ("a", "b")}
    )
    found = subgroups(of)
    assert found["kind=a"]["train"] == {"t001"}
    assert found["kind=b"]["train"] == frozenset()
    assert too_small(found["kind=b"]) == "fewer than 10 training, held-out, synthetic"


def aged(plain: Cases, ages: Sequence[float | None]) -> Cases:
    """The same scans of people of these ages, a scan each."""
    return Cases(plain.volumes, plain.patients, [{} if a is None else {"age": a} for a in ages])


def test_numbers_make_two_subgroups_of_about_as_many() -> None:
    rng = np.random.default_rng(2)
    train = aged(cases(rng, 5, "t", twice=1), [30, 60, 50, 40, 70, None])  # 30 and 60 are one's
    holdout = aged(cases(rng, 3, "h"), [45, 45.5, 90])
    of = sides(train, holdout, aged(cases(rng, 1, "s"), [20]), continuous={"age": (0.0, 100.0)})
    found = subgroups(of)
    assert list(found) == ["age=lower half", "age=upper half"]
    low, high = found.values()
    # 45, 50, 40 and 70 are cut at 45, a multiple of five; who was 30 and 60 is in neither half
    assert (low["train"], high["train"]) == ({"t002"}, {"t001", "t003"})
    assert (low["holdout"], high["holdout"]) == ({"h000"}, {"h001", "h002"})
    assert (low["synthetic"], high["synthetic"]) == ({"s000"}, frozenset())
    alike = aged(train, [40.0] * 6)
    assert subgroups(sides(alike, holdout, holdout, continuous={"age": (0.0, 100.0)})) == {}
    nobody = aged(train, [None] * 6)
    assert subgroups(sides(nobody, holdout, holdout, continuous={"age": (0.0, 100.0)})) == {}


@pytest.mark.parametrize(
    ("values", "low", "high", "expected"),
    [
        ([1.5] * 20 + [3.0] * 30, 0.5, 7.0, 1.8),  # the median is the larger one's
        ([1.5] * 30 + [3.0] * 20, 0.5, 7.0, 1.8),
        ([70.0, 71, 72, 73], 20, 100, 72.0),  # of 68 and 72
        ([70.0, 71, 72, 73, 74], 0, 100, 70.0),  # of 70 and 75
        ([61.3, 64.9, 66.0], 0, 100, 65.0),
        ([3.0] * 9, 0, 10, None),
        ([], 0, 10, None),
    ],
)
def test_where_a_number_is_cut(
    values: list[float], low: float, high: float, expected: float | None
) -> None:
    """Beside a loop over all places; nobody's own value is one unless it is a round one."""
    best, found = 0, None
    for k in range(1, 20):
        place = low + k * (high - low) / 20
        fewer = min(sum(v <= place for v in values), sum(v > place for v in values))
        if fewer > best:
            best, found = fewer, place
    assert cut(values, low, high) == found
    assert found == (expected if expected is None else pytest.approx(expected))


def test_a_cohort_that_fails_the_old_is_seen_to() -> None:
    rng = np.random.default_rng(7)
    ages = {"t": 50, "h": 44, "s": 48}
    given = {
        k: aged(cases(rng, n, k), [(40.0 if i < n // 2 else 70.0) + i % 9 for i in range(n)])
        for k, n in ages.items()
    }
    volumes = given["s"].volumes.copy()
    volumes[24:] += 0.04 * rng.standard_normal(volumes[24:].shape).astype(np.float16)
    cohort = made(volumes, list(given["s"].labels))
    of = sides(given["t"], given["h"], cohort, continuous={"age": (20.0, 90.0)})
    found = estimates(of)
    old, young = (found["mmd2_excess", f"age={half}"] for half in ("upper half", "lower half"))
    assert old.ci[0] > 0.05 and young.ci[0] < 0 < young.ci[1]
    assert "age=upper half" in found["mmd2_excess", WORST].note
    # a reader of ages is asked in each half about ages there
    told = {(e.name, e.slice): e for e in Utility(draws=1).estimate(of, Shared(of))}
    assert told["r_tstr", "age=upper half"].n_holdout == 22


def test_too_few_people_are_named_and_neither_judged_nor_counted() -> None:
    """What leaves names a small subgroup and never says how small, nor lets it be subtracted."""
    of = given(False, n_rare=9)
    found = judge(of, Shared(of), (MMD(),), Progress("evaluate", quiet=True))
    by_slice = {(e.name, e.slice): e for e in found}
    rare = by_slice["mmd2_excess", "kind=rare"]
    assert (rare.value, rare.ci, rare.n, rare.n_holdout) == (None, None, 0, None)
    assert rare.note == "fewer than 10 training, held-out, synthetic"
    assert ("mmd2", "kind=rare") not in by_slice
    worst = by_slice["mmd2_excess", WORST]
    few = "kind=rare (fewer than 10 training, held-out, synthetic)"
    assert worst.note == f"worst of 1: kind=common; too few people to judge: {few}"
    assert worst.n_holdout == 35, "of 44: nine are the rare ones"
    config = made_config()
    decision = decide(config.policy.rules, found, n_holdout=44)
    facts = CohortFacts(
        n_patients=94, n_scans=99, n_train=50, n_holdout=44, n_synthetic=48, n_dropped=0
    )
    for kind, told in (("restricted", 35), ("shareable", 30)):
        report = build(
            kind, config, decision, found, facts,
            findings=[], n_searched=0, images=[], volumes=[],
        )  # fmt: skip
        (line,) = [e for e in report["estimates"] if e["slice"] == WORST]
        assert line["n_holdout"] == told
        assert line["n"] == (39 if kind == "restricted" else 30)
        whole = [e["n_holdout"] for e in report["estimates"] if e["slice"] is None]
        assert set(whole) == {44}
    assert "30 or more held-out patients" in render(report, {})


@pytest.mark.parametrize("kind", ["restricted", "shareable"])
def test_nothing_that_leaves_counts_the_people_of_a_subgroup(kind: str) -> None:
    """Of 50 trained on and 44 held out, three and seven are rare: 47 and 37 would give them away.

    Whatever the policy asks of the common ones, no sentence and no field says how many they are.
    """
    rng = np.random.default_rng(11)
    of = sides(
        two(rng, 50, "t", 3),
        two(rng, 44, "h", 7),
        made(two(rng, 43, "s", 12).volumes, list(two(rng, 43, "s", 12).labels)),
        20,
        categorical={"kind": ("common", "rare")},
    )
    found = judge(of, Shared(of), DEFAULT_METRICS, Progress("evaluate", quiet=True))
    mine = [e for e in found if e.slice == "kind=common"]
    assert {"kid", "prdc", "vendi", "discriminator_auc", "copied_patients", "membership_auc"} <= {
        "prdc" if e.name == "coverage" else e.name for e in mine
    }
    rules = [{"estimate": e.name, "slice": e.slice, "at_most": 1e9} for e in mine]
    config = made_config({"policy": {"rules": rules}})
    decision = decide(config.policy.rules, found, n_holdout=44)
    facts = CohortFacts(
        n_patients=94, n_scans=94, n_train=50, n_holdout=44, n_synthetic=43, n_dropped=0
    )
    report = build(
        kind, config, decision, found, facts,
        findings=[], n_searched=0, images=[], volumes=[],
    )  # fmt: skip
    told = [e for e in report["estimates"] if e["slice"] == "kind=common"]
    assert len(told) == len(mine)
    counts = re.compile(r"\b(47|37)\b")
    for e in told:
        assert not counts.search(f"{e['note']} {e['method']}"), e
        if kind == "shareable":
            assert not {e["n"], e["n_holdout"]} & {47, 37}, e
    (stored,) = [e for e in told if e["name"] == "copied_patients"]
    assert stored["n"] == 40 and (stored["value"] or 0) * 40 % 1 == 0


def test_thinned_to_too_few_a_subgroup_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers are asked about the scans that are looked at, of which a large cohort has few."""
    of = given(False, n_rare=10)
    monkeypatch.setattr("synthmed.metrics.shared.MAX_PATIENTS", 20)
    found = {(e.name, e.slice): e for e in Utility(draws=1).estimate(of, Shared(of))}
    rare = found["auc_tstr", "kind=rare"]
    assert rare.value is None and "fewer than 10 held-out patients to ask" in rare.note
    # to be told from the rare, of whom so few are left
    assert found["auc_tstr", "kind=common"].value is None


def test_a_label_with_too_few_people_is_in_nobodys_stead() -> None:
    """Its slices have values for who looks; their intervals are too narrow to withhold by."""
    (rule,) = [r for r in Policy().rules if r.estimate == "auc_tstr_minus_trtr"]
    for n_rare, stands_for, status in ((6, (), "inconclusive"), (14, ("condition=kind",), "fail")):
        of = given(False, n_rare=n_rare)
        found = [
            e.model_copy(update={"ci": (-0.9, -0.8), "value": -0.85})
            if e.slice == "condition=kind"
            else e
            for e in Utility(draws=1).estimate(of, Shared(of))
            if e.name == rule.estimate
        ]
        (whole,) = [e for e in found if e.slice is None]
        assert whole.stands_for == stands_for and (whole.value is None) == (n_rare == 6)
        (verdict,) = decide([rule], found, n_holdout=100).verdicts
        assert verdict.status == status


def test_a_rule_on_the_worst_category_is_not_asked_of_a_number() -> None:
    """One is an accuracy, the other a correlation, and the whole is the worst of the categories."""
    of = given(False)
    rng = np.random.default_rng(0)
    with_age = [
        replace(s, labels=[{**row, "age": float(rng.uniform(20, 60))} for row in s.labels])
        for s in (of.train, of.holdout, of.synthetic)
    ]
    of = sides(
        *with_age, categorical={"kind": ("common", "rare")}, continuous={"age": (20.0, 60.0)}
    )
    found = {(e.name, e.slice): e for e in ConditionAccuracy().estimate(of, Shared(of))}
    assert ("condition_accuracy", "condition=age") in found
    assert found["condition_accuracy", None].stands_for == ("condition=kind",)


def test_a_subgroups_worst_region_does_not_stand_for_everybodys() -> None:
    """Its slices have everybody's names: a rule on the subgroup is asked of the subgroup alone."""
    of = given(False)
    found = judge(of, Shared(of), (RegionVolumeSMD(),), Progress("evaluate", quiet=True))
    by_slice = {e.slice: e for e in found}
    regions = by_slice[None].stands_for
    assert regions and set(regions) <= set(by_slice)
    spoilt = [
        e.model_copy(update={"value": 9.0, "ci": (8.0, 10.0)}) if e.slice in regions else e
        for e in found
    ]
    asked = [
        Rule(estimate="region_volume_smd", slice=part, bound="upper", at_most=5.0)
        for part in (None, "kind=common")
    ]
    everybody, common = decide(asked, spoilt, n_holdout=100).verdicts
    assert everybody.status == "fail"
    # thirty of them are held out: its own figure meets the limit, and is of too few
    assert common.status == "inconclusive" and "meets the limit 5" in common.reason


def made_config(more: Mapping[str, Any] = {}) -> Config:
    tree = {
        "data": {
            "source": "x",
            "conditions": {"kind": {"kind": "categorical", "categories": ["common", "rare"]}},
            "grid": [8, 8, 8],
        },
        "backbone": {"name": "cvae"},
        "privacy": None,
        "train": {"max_steps": 1},
        **more,
    }
    return configfile.validate(tree, "of a test")


def test_a_policy_sees_that_no_subgroup_can_be_judged() -> None:
    rng = np.random.default_rng(3)
    few = [two(rng, 12, prefix, 4) for prefix in "ths"]
    of = sides(few[0], few[1], few[2], categorical={"kind": ("common", "rare")})
    worst = estimates(of)["mmd2_excess", WORST]
    assert worst.value is None and "kind=common (fewer than 10 training" in worst.note
    rules = [r for r in Policy().rules if r.slice == WORST]
    assert [v.status for v in decide(rules, [worst], n_holdout=60).verdicts] == ["inconclusive"]
    # without labels there is no such line
    assert not decide(rules, [], n_holdout=60).verdicts


def test_only_subgroups_are_among_the_worst() -> None:
    other = estimates(given(False))["mmd2_excess", None].model_copy(
        update={"slice": "features=x", "ci": (5.0, 6.0)}
    )
    assert worst([other], "mmd2_excess", [], {}) == []


def test_every_metric_that_says_so_can_be_asked_of_a_part() -> None:
    of = given(False)
    whole = Shared(of)
    part = Part(whole, "kind=common", subgroups(of)["kind=common"])
    asked = [m for m in DEFAULT_METRICS if m.by_subgroup]
    assert len(asked) >= 8
    for metric in asked:
        for e in metric.estimate(part.sides, part):
            assert e.value is not None and e.n == 34
            assert e.n_holdout in (30, None)


def test_membership_of_a_leaked_minority_shows_in_its_own_figure() -> None:
    """Copies of the rare ones alone: among all it is diluted, among them it is plain."""
    rng = np.random.default_rng(3)
    of = given(False)
    volumes = of.synthetic.volumes.copy()
    rare = subgroups(of)["kind=rare"]["train"]
    leaked = [list(of.train.patients).index(p) for p in sorted(rare)]
    volumes[:14] = of.train.volumes[leaked] + 0.01 * rng.standard_normal((14, *volumes.shape[1:]))
    of = Sides(**{**of.__dict__, "synthetic": made(volumes, list(of.synthetic.labels))})
    found = {(e.name, e.slice): e for e in Membership().estimate(of, Shared(of))}
    few, many = (found["membership_auc", f"kind={k}"] for k in ("rare", "common"))
    assert few.value > 0.95 > found["membership_auc", None].value
    assert many.ci[0] < 0.5 < many.ci[1]
    assert (few.n, few.n_holdout) == (14, 14)
    # so do the patients who were copied
    stored = {e.slice: e for e in Copied().estimate(of, Shared(of)) if e.name == "copied_patients"}
    assert (stored["kind=rare"].value, stored["kind=rare"].n) == (1.0, 10)
    assert (stored["kind=common"].value, stored["kind=common"].n) == (0.0, 30)
    assert stored[None].value == 14 / 50
    # and of exact copies how near to them they are
    volumes[:14] = of.train.volumes[leaked]
    of = Sides(**{**of.__dict__, "synthetic": made(volumes, list(of.synthetic.labels))})
    asked = judge(of, Shared(of), (Authenticity(),), Progress("evaluate", quiet=True))
    near = {e.slice: e for e in asked if e.name == "authenticity_excess"}
    assert near["kind=rare"].ci[1] < 0 < near[None].ci[1]
    assert near["kind=common"].ci[0] < 0 < near["kind=common"].ci[1]


@pytest.mark.parametrize("n_holdout", [0, 2])
def test_without_enough_held_out_people_nothing_is_said_of_subgroups(n_holdout: int) -> None:
    rng = np.random.default_rng(5)
    train, cohort = two(rng, 30, "t", 12), two(rng, 30, "s", 12)
    of = sides(train, two(rng, n_holdout, "h", 1), cohort, categorical={"kind": ("common", "rare")})
    found = judge(of, Shared(of), (MMD(),), Progress("evaluate", quiet=True))
    sliced = [e for e in found if e.slice is not None]
    assert all(e.ci is not None and not e.n_holdout for e in sliced if e.value is not None)
