"""The policy's table of cases, line by line."""

from __future__ import annotations

from typing import Any

import pytest

from synthmed.config import DEFAULT_POLICY, Policy, Rule
from synthmed.metrics.stats import clopper_pearson
from synthmed.metrics.subgroups import worst
from synthmed.policy import conclude, decide, describe, judge, limits
from synthmed.types import WORST, Estimate, Verdict


def estimate(name: str = "x", group: Any = "memorization", **fields: Any) -> Estimate:
    defaults: dict[str, Any] = {
        "value": 0.03,
        "ci": (0.01, 0.05),
        "n": 60,
        "better": "lower",
        "floor": 0.5,
        "ceiling": 0.25,
        "method": "m.",
        "seed": 0,
    }
    return Estimate(name=name, group=group, **{**defaults, **fields})


def rule(**fields: Any) -> Rule:
    return Rule(estimate="x", **fields)


UPPER = {"bound": "upper", "at_most": 0.06}
CASES = [
    # the rule, the estimate, the status
    ({"at_most": 0.03}, {}, "pass"),
    ({"at_most": 0.02, "review": 0.03}, {}, "review"),
    ({"at_least": 0.03}, {}, "pass"),
    ({"at_least": 0.04, "review": 0.03}, {}, "review"),
    # the value is beyond: fail where the whole interval is, or where there is none
    ({"at_most": 0.029}, {}, "inconclusive"),
    ({"at_most": 0.01}, {}, "inconclusive"),
    ({"at_most": 0.009}, {}, "fail"),
    ({"at_most": 0.005, "review": 0.009}, {}, "fail"),
    ({"at_most": 0.005, "review": 0.02}, {}, "inconclusive"),
    ({"at_most": 0.029}, {"ci": None}, "fail"),
    ({"at_least": 0.031}, {}, "inconclusive"),
    ({"at_least": 0.051}, {}, "fail"),
    ({"at_least": 0.031}, {"group": "utility"}, "inconclusive"),
    ({"at_least": 0.051}, {"group": "utility"}, "fail"),
    ({"at_least": 0.031}, {"ci": None}, "fail"),
    # a bound
    (UPPER, {}, "pass"),
    ({**UPPER, "at_most": 0.05}, {}, "pass"),
    ({**UPPER, "at_most": 0.04, "review": 0.05}, {}, "review"),
    ({"bound": "lower", "at_least": 0.01}, {}, "pass"),
    ({"bound": "lower", "at_least": 0.02}, {}, "inconclusive"),
    ({"bound": "lower", "at_least": 0.04}, {}, "fail"),
    # privacy: the interval is too wide, or the value itself is beyond
    (UPPER, {"value": 0.0, "ci": (0.0, 0.071)}, "inconclusive"),
    (UPPER, {"value": 0.1, "ci": (0.033, 0.218)}, "fail"),
    (UPPER, {"value": 0.061, "ci": (0.0, 0.2)}, "fail"),
    ({**UPPER, "review": 0.1}, {"value": 0.07, "ci": (0.0, 0.2)}, "inconclusive"),
    # quality: only a whole interval beyond the limit fails
    (UPPER, {"group": "fidelity", "value": 0.1, "ci": (0.033, 0.218)}, "inconclusive"),
    (UPPER, {"group": "fidelity", "value": 0.1, "ci": (0.061, 0.218)}, "fail"),
    (UPPER, {"group": "fidelity", "value": 0.1, "ci": (0.06, 0.218)}, "inconclusive"),
    ({"bound": "lower", "at_least": -0.1}, {"group": "utility", "ci": (-0.3, -0.11)}, "fail"),
    ({"bound": "lower", "at_least": -0.1}, {"group": "utility", "ci": (-0.3, 0.1)}, "inconclusive"),
    # relative to the floor or the ceiling
    ({"bound": "upper", "relative_to": "ceiling", "at_most": 0.2}, {}, "pass"),
    ({"bound": "upper", "relative_to": "ceiling", "at_most": 0.19}, {}, "inconclusive"),
    ({"relative_to": "floor", "at_least": 0.9}, {"value": 0.45}, "pass"),
    ({"relative_to": "floor", "at_least": 0.9}, {"value": 0.44}, "fail"),
    ({"relative_to": "floor", "at_least": 0.9}, {"value": 0.4, "ci": (0.3, 0.5)}, "inconclusive"),
    ({"relative_to": "floor", "at_least": 0.9}, {"floor": None}, "inconclusive"),
    ({"relative_to": "floor", "at_least": 0.9}, {"floor": 0.0}, "inconclusive"),
    (
        {"relative_to": "ceiling", "at_most": 0.25},
        {"ceiling": -0.01, "value": -9.0},
        "inconclusive",
    ),
    # what is not there
    ({"at_most": 1}, {"value": None}, "inconclusive"),
    ({"at_most": 1}, {"value": float("nan")}, "inconclusive"),
    ({"at_most": 1}, {"ci": None}, "pass"),
    (UPPER, {"ci": None}, "inconclusive"),
    (UPPER, {"ci": (0.0, float("inf"))}, "inconclusive"),
]


@pytest.mark.parametrize(("given", "fields", "status"), CASES)
def test_table_of_cases(given: dict[str, Any], fields: dict[str, Any], status: str) -> None:
    verdict = judge(rule(**given), estimate(**fields), n_holdout=50)
    assert verdict.status == status, verdict.reason


def test_no_estimate_is_inconclusive() -> None:
    assert judge(rule(at_most=1), None, 99).status == "inconclusive"


@pytest.mark.parametrize("group", ["fidelity", "utility"])
def test_few_held_out_patients_cap_quality(group: str) -> None:
    few = estimate(group=group)
    assert judge(rule(**UPPER), few, 49).status == "inconclusive"
    assert judge(rule(at_most=0.02, review=0.04), few, 49).status == "inconclusive"
    assert judge(rule(at_most=0.009), few, 49).status == "fail"
    assert judge(rule(**UPPER), few, 50).status == "pass"
    subgroup = estimate(group=group, n_holdout=20)
    assert judge(rule(**UPPER), subgroup, 80).status == "inconclusive"


def test_few_held_out_patients_leave_privacy_alone() -> None:
    assert judge(rule(**UPPER), estimate(), 5).status == "pass"


def test_a_rule_finds_its_own_slice() -> None:
    whole, part = estimate(value=0.0), estimate(value=1.0, ci=(0.8, 1.0), slice="sex=F")
    rules = [rule(at_most=0.5), rule(at_most=0.5, slice="sex=F"), rule(at_most=0.5, slice="sex=M")]
    verdicts = decide(rules, [part, whole], n_holdout=60).verdicts
    assert [v.status for v in verdicts] == ["pass", "fail", "inconclusive"]
    assert verdicts[1].reason.startswith("x [sex=F]: ")


@pytest.mark.parametrize(
    ("parts", "status", "named"),
    [
        # the larger bound is the smaller share of its ceiling
        ({"F": ((0.06, 0.11), 0.30), "M": ((0.07, 0.10), 0.12)}, "fail", "sex=M"),
        # the wider interval hides that the other is beyond its limit for sure
        ({"F": ((-0.1, 0.4), 0.2), "M": ((0.2, 0.3), 0.2)}, "fail", "sex=M"),
        ({"F": ((0.0, 0.05), 0.2), "M": ((0.0, 0.08), 0.2)}, "pass", "sex=M"),
        ({"F": ((0.0, 0.05), 0.2), "M": ((0.0, 0.04), None)}, "inconclusive", "sex=M"),
    ],
)
def test_every_subgroup_answers_for_the_worst(
    parts: dict[str, tuple[tuple[float, float], float | None]], status: str, named: str
) -> None:
    found = [
        estimate("mmd2_excess", "fidelity", slice=f"sex={k}", value=sum(ci) / 2, ci=ci, ceiling=c)
        for k, (ci, c) in parts.items()
    ]
    attack = estimate("mmd2_excess", "fidelity", slice="features=regions", ci=(0.5, 0.9))
    evidence = [*found, attack, *worst(found, "mmd2_excess", [str(e.slice) for e in found], {})]
    asked = Rule(
        estimate="mmd2_excess", slice=WORST, bound="upper", relative_to="ceiling", at_most=0.5
    )
    (verdict,) = decide([asked], evidence, n_holdout=100).verdicts
    assert verdict.status == status
    assert verdict.reason.startswith(f"mmd2_excess [worst subgroup, {named}]: ")


def test_a_subgroup_that_nobody_looked_at_is_among_the_worst() -> None:
    """With fewer people the answer gets no better."""
    whole, men = (
        estimate("mmd2_excess", "fidelity", slice=part, value=0.01, ci=(0.0, 0.02), ceiling=0.2)
        for part in (None, "sex=M")
    )
    asked = Rule(
        estimate="mmd2_excess", slice=WORST, bound="upper", relative_to="ceiling", at_most=0.5
    )
    both = [whole, men, *worst([whole, men], "mmd2_excess", ["sex=M"], {})]
    assert decide([asked], both, n_holdout=100).decision == "RELEASE"
    few = {"sex=F": "fewer than 10 held-out"}
    both = [whole, men, *worst([whole, men], "mmd2_excess", ["sex=M"], few)]
    (verdict,) = decide([asked], both, n_holdout=100).verdicts
    assert verdict.status == "inconclusive"
    assert verdict.reason == (
        "mmd2_excess [worst subgroup, sex=F]: has no value (fewer than 10 held-out)."
    )
    failing = men.model_copy(update={"value": 0.3, "ci": (0.2, 0.4)})
    both = [whole, failing, *worst([whole, failing], "mmd2_excess", ["sex=M"], few)]
    assert decide([asked], both, n_holdout=100).decision == "WITHHELD"


@pytest.mark.parametrize(
    ("part", "more", "decision"),
    [
        # what leads cannot be told, and must not hide that another fails
        ("condition=diagnosis", {}, "WITHHELD"),
        # it does not stand for this one
        ("condition=diagnosis, 20 patients", {}, "REVIEW"),
        # one that is too uncertain or passes says no more than what leads
        ("condition=diagnosis", {"ci": (-0.6, 0.1)}, "REVIEW"),
        ("condition=diagnosis", {"value": 0.1, "ci": (0, 0.2)}, "REVIEW"),
    ],
)
@pytest.mark.parametrize("leads", [{"value": None, "ci": None}, {"ci": (-0.9, 0.9)}])
def test_what_leads_does_not_hide_a_failure(
    part: str, more: dict[str, Any], decision: str, leads: dict[str, Any]
) -> None:
    low = {"value": -0.45, "ci": (-0.55, -0.35), "better": "higher"}
    stands_for = ("condition=diagnosis", "condition=scanner")
    whole = estimate("x", "utility", **{**low, **leads}, stands_for=stands_for)
    of = estimate("x", "utility", slice=part, **{**low, **more})
    found = decide([rule(bound="lower", at_least=-0.1)], [whole, of], n_holdout=100)
    assert found.decision == decision
    if decision == "WITHHELD":
        assert found.reasons[0].startswith(f"x [{part}]: lower bound -0.55")


@pytest.mark.parametrize(
    ("better", "limit", "status"),
    [
        ("lower", {"at_least": 0.0}, "inconclusive"),
        ("higher", {"at_most": 0.5}, "inconclusive"),
        ("lower", {"at_most": 0.5}, "pass"),
        ("match", {"at_least": 0.0}, "pass"),
        ("lower", {"at_least": 0.9}, "fail"),
    ],
)
def test_a_rule_in_the_wrong_direction_passes_nothing(
    better: str, limit: dict[str, float], status: str
) -> None:
    (verdict,) = decide([rule(**limit)], [estimate(better=better)], n_holdout=60).verdicts
    assert verdict.status == status
    assert ("the wrong way round" in verdict.reason) == (status == "inconclusive")


@pytest.mark.parametrize(
    "wrong", [{"bound": "lower", "at_most": 0.1}, {"bound": "upper", "at_least": 0.1}]
)
def test_a_bound_that_proves_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the other bound"):
        rule(**wrong)


def test_two_estimates_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two are called x"):
        decide([], [estimate(), estimate()], n_holdout=60)


@pytest.mark.parametrize(
    ("statuses", "decision"),
    [
        (["pass", "pass"], "RELEASE"),
        (["pass", "review"], "REVIEW"),
        (["inconclusive", "pass"], "REVIEW"),
        (["inconclusive", "pass", "fail", "review"], "WITHHELD"),
        ([], "REVIEW"),
    ],
)
def test_conclusion(statuses: list[Any], decision: str) -> None:
    lines = [
        Verdict(estimate=f"e{i}", slice=None, rule="r", status=s, reason=f"{s}.")
        for i, s in enumerate(statuses)
    ]
    concluded = conclude(lines)
    assert concluded.decision == decision
    assert concluded.verdicts == lines
    if decision == "WITHHELD":
        assert list(concluded.reasons) == ["fail.", "review.", "inconclusive."]
    if decision == "RELEASE":
        assert list(concluded.reasons) == ["All 2 lines of the policy are met."]


def test_reason_reads_as_a_sentence() -> None:
    given = Rule(estimate="mmd2_excess", bound="upper", relative_to="ceiling", at_most=0.25)
    far = estimate("mmd2_excess", "fidelity", value=0.2, ci=(0.09, 0.31))
    assert judge(given, far, 60).reason == (
        "mmd2_excess: upper bound 0.31 is above the limit 0.0625 (0.25 x ceiling 0.25)."
    )
    assert describe(given) == "upper bound at most 0.25 x ceiling"
    assert limits(given, far) == (0.0625, None)
    gone = estimate(value=None, note="Needs a mask.")
    assert judge(rule(at_most=1), gone, 60).reason == "x: has no value (Needs a mask)."


def test_one_copy_among_many_that_ship_fails() -> None:
    low, high = clopper_pearson(1, 10_000)
    shipped = estimate("copies_shipped", value=1.0, ci=(1e4 * low, 1e4 * high))
    (line,) = [r for r in Policy().rules if r.estimate == "copies_shipped"]
    assert judge(line, shipped, 60).status == "fail"


def test_nothing_at_all_never_releases() -> None:
    assert len(Policy().rules) == len(DEFAULT_POLICY)
    assert decide(Policy().rules, [], n_holdout=500).decision == "REVIEW"
