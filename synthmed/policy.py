"""The policy: rules on estimates, and the decision that follows from them.

A rule compares one number b of an estimate (its value, or one bound of its interval) with a limit
L, which is a plain number or a share of the estimate's own floor or ceiling. With `review`, a
looser limit R opens a band in which a person may sign. Read `at_most` below; `at_least` mirrors it.

| case, the first that holds | status |
|---|---|
| no estimate of that name and slice, and the rule is not `required` | no line |
| no estimate of that name and slice | inconclusive |
| a value, bound, floor or ceiling that the rule needs is null or not finite | inconclusive |
| the floor or ceiling is 0 or less, so that a share of it means nothing | inconclusive |
| b <= L | pass |
| b <= R | review |
| b is the value, and there is no interval | fail |
| b is a bound, a privacy estimate, and the value itself is beyond R (L without `review`) | fail |
| the whole interval is beyond R (or L) | fail |
| the rest: the interval is too wide to tell | inconclusive |

So a rule on the value takes the best guess and fails a cohort only on evidence, and a rule on a
bound passes it only on evidence. Privacy estimates are those of the groups memorization, membership
and audit; quality estimates those of fidelity and utility: under a bound a privacy doubt counts
against the cohort, while a lack of quality has to be shown. So 0 copied of 50 patients, whose
interval reaches 7 %, is inconclusive under a limit of 5 % and never a pass; 5 of 50 fails, although
its interval begins at 3 %.

An estimate that is the worst of several (subgroups, those with too few people to measure included;
conditions; regions) is so by one number. A rule on it is judged on each of them
(`Estimate.stands_for`), and the worst answer stands.

Below `MIN_HOLDOUT` held-out patients a pass or review of a quality estimate becomes inconclusive;
a fail stays a fail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from synthmed.config import RESERVED, Config, Rule
from synthmed.errors import UsageError
from synthmed.report.words import WORDS
from synthmed.types import WORST, Decision, Estimate, Verdict

MIN_HOLDOUT = 50
"""Held-out patients below which fidelity and utility cannot pass."""

QUALITY = frozenset({"fidelity", "utility"})
"""Groups that say whether the cohort is good; the other groups say whether it is safe."""

_ORDER = {"fail": 0, "review": 1, "inconclusive": 2, "pass": 3}
_SIDE = {"lower": "lower bound", "upper": "upper bound", "value": "value"}


def verify(config: Config) -> None:
    """See that rules that may be left out name what there can be.

    One that is required and names nothing is inconclusive; one that is not would be left out for
    good by a slip of the pen.

    Raises:
        UsageError: no estimate, or no part of the cohort, has such a name.
    """
    for rule in config.policy.rules:
        if rule.required:
            continue
        if rule.estimate not in WORDS:
            raise UsageError(
                f"policy.rules: {rule.estimate}: no estimate is called so",
                f"Known: {', '.join(sorted(WORDS))}.",
            )
        part = rule.slice
        parts = (None, WORST, *config.data.subgroups)
        if part not in parts and str(part).split("=")[0] not in RESERVED:
            raise UsageError(
                f"policy.rules: {_subject(rule, None)}: this config makes no such part",
                f"Known: {', '.join(str(p) for p in parts[1:])}.",
            )


def decide(rules: Sequence[Rule], estimates: Sequence[Estimate], *, n_holdout: int) -> Decision:
    """Judge every rule and conclude: RELEASE, REVIEW or WITHHELD.

    Args:
        rules: the policy.
        estimates: the evidence; at most one for each name and slice.
        n_holdout: held-out patients of the run; an estimate that says how many are behind it
            (`Estimate.n_holdout`) is judged by the smaller of the two.

    Raises:
        ValueError: two estimates share a name and a slice, so that a rule could not tell them.
    """
    known: dict[tuple[str, str | None], Estimate] = {}
    for e in estimates:
        if (e.name, e.slice) in known:
            raise ValueError(f"estimates: two are called {e.name} with slice {e.slice}")
        known[e.name, e.slice] = e
    asked = [r for r in rules if r.required or (r.estimate, r.slice) in known]
    return conclude([_judged(r, known, n_holdout) for r in asked])


def conclude(verdicts: Sequence[Verdict]) -> Decision:
    """The decision that a set of verdicts amounts to; an empty one decides nothing (REVIEW)."""
    if not verdicts:
        reason = "The policy has no rules, so a person has to decide."
        return Decision(decision="REVIEW", reasons=[reason], verdicts=[])
    open_lines = sorted((v for v in verdicts if v.status != "pass"), key=lambda v: _ORDER[v.status])
    if not open_lines:
        n = len(verdicts)
        reason = (
            "The one line of the policy is met."
            if n == 1
            else f"All {n} lines of the policy are met."
        )
        return Decision(decision="RELEASE", reasons=[reason], verdicts=list(verdicts))
    failed = open_lines[0].status == "fail"
    return Decision(
        decision="WITHHELD" if failed else "REVIEW",
        reasons=[v.reason for v in open_lines],
        verdicts=list(verdicts),
    )


def _judged(
    rule: Rule, known: Mapping[tuple[str, str | None], Estimate], n_holdout: int
) -> Verdict:
    """One line of the policy, on the estimates of that name and slice."""
    named = known.get((rule.estimate, rule.slice))
    if named is None:
        return judge(rule, None, n_holdout)

    parts = [e for p in named.stands_for if (e := known.get((rule.estimate, p))) is not None]
    # of equal answers that of the part which the evidence calls the worst
    parts.sort(key=lambda e: e.ci != named.ci)
    asked = [*parts, named] if rule.slice == WORST else [named, *parts]
    answers = [_doubted(rule, e, judge(rule, e, n_holdout)) for e in asked]
    return min(answers, key=lambda v: _ORDER[v.status])


def _doubted(rule: Rule, estimate: Estimate | None, verdict: Verdict) -> Verdict:
    """The verdict, which passes nothing by a rule that asks for the worse side of an estimate."""
    wrong = {"lower": rule.at_least, "higher": rule.at_most}
    if estimate is None or wrong.get(estimate.better) is None or verdict.status == "fail":
        return verdict
    said = f"{verdict.reason} But the rule is the wrong way round: {estimate.better} is better."
    return verdict.model_copy(update={"status": "inconclusive", "reason": said})


def judge(rule: Rule, estimate: Estimate | None, n_holdout: int) -> Verdict:
    """One line of the policy, by the table of this module."""
    status, said = _compare(rule, estimate)
    if estimate is not None and estimate.group in QUALITY and status in ("pass", "review"):
        n = min(n_holdout, estimate.n_holdout if estimate.n_holdout is not None else n_holdout)
        if n < MIN_HOLDOUT:
            status = "inconclusive"
            # not how many: a reason is printed in what leaves the house
            said += f", but fewer than {MIN_HOLDOUT} held-out patients are too few to decide"
    return Verdict.model_validate(
        {
            "estimate": rule.estimate,
            "slice": rule.slice,
            "rule": describe(rule),
            "status": status,
            "reason": f"{_subject(rule, estimate)}: {said}.",
        }
    )


def describe(rule: Rule) -> str:
    """The rule as a phrase: `upper bound at most 0.25 x ceiling`."""
    word, limit = _limit(rule)
    times = f" x {rule.relative_to}" if rule.relative_to else ""
    band = "" if rule.review is None else f" (review to {_n(rule.review)}{times})"
    return f"{_SIDE[rule.bound]} {word} {_n(limit)}{times}{band}"


def limits(rule: Rule, estimate: Estimate) -> tuple[float | None, float | None]:
    """The limit and the review limit in the estimate's own unit; null where they have none."""
    scale = _reference(rule, estimate)
    if scale is None or scale <= 0:
        return None, None
    limit = _limit(rule)[1] * scale
    return limit, None if rule.review is None else rule.review * scale


def _compare(rule: Rule, estimate: Estimate | None) -> tuple[str, str]:
    """Status and the middle of the sentence, before the number of held-out patients is asked."""
    if estimate is None:
        return "inconclusive", "was not computed in this run"
    because = f" ({estimate.note.rstrip('.')})" if estimate.note else ""
    value = _finite(estimate.value)
    if value is None:
        return "inconclusive", f"has no value{because}"
    interval = _interval(estimate)
    if rule.bound == "value":
        bound = value
    elif interval is not None:
        bound = interval[1] if rule.bound == "upper" else interval[0]
    else:
        return "inconclusive", f"has no interval, and the rule asks for its bound{because}"
    scale = _reference(rule, estimate)
    if scale is None:
        return "inconclusive", f"has no {rule.relative_to} to be compared with{because}"
    if scale <= 0:
        return "inconclusive", f"its {rule.relative_to} is {_n(scale)}: a share of it is no limit"

    sign = 1.0 if rule.at_most is not None else -1.0  # sign * b <= sign * L is "within" either way
    limit = _limit(rule)[1] * scale
    last = limit if rule.review is None else rule.review * scale
    of = f" ({_n(_limit(rule)[1])} x {rule.relative_to} {_n(scale)})" if rule.relative_to else ""
    is_beyond = "is above" if sign > 0 else "is below"
    named = f"{_SIDE[rule.bound]} {_n(bound)}"
    if sign * bound <= sign * limit:
        return "pass", f"{named} meets the limit {_n(limit)}{of}"
    if sign * bound <= sign * last:
        return "review", f"{named} {is_beyond} the limit {_n(limit)}{of}, within the review band"
    beyond = f"{named} {is_beyond} the limit {_n(limit)}{of}"
    if interval is None:
        return "fail", beyond
    doubt_counts = rule.bound != "value" and estimate.group not in QUALITY
    best = value if doubt_counts else interval[0 if sign > 0 else 1]
    if sign * best > sign * last:
        return "fail", beyond
    return "inconclusive", f"{beyond}, and the interval is too wide to tell"


def _reference(rule: Rule, estimate: Estimate) -> float | None:
    """What the rule's numbers are a share of: 1 for an absolute rule."""
    if rule.relative_to is None:
        return 1.0
    return _finite(estimate.floor if rule.relative_to == "floor" else estimate.ceiling)


def _limit(rule: Rule) -> tuple[str, float]:
    """The rule's comparison and number. The config guarantees one; without it nothing passes."""
    if rule.at_most is not None:
        return "at most", rule.at_most
    return "at least", math.inf if rule.at_least is None else rule.at_least


def _subject(rule: Rule, estimate: Estimate | None) -> str:
    named = rule.slice if estimate is None else estimate.slice
    if rule.slice is None:
        return rule.estimate if named is None else f"{rule.estimate} [{named}]"
    one = f", {named}" if named != rule.slice else ""
    return f"{rule.estimate} [{rule.slice}{one}]"


def _interval(estimate: Estimate) -> tuple[float, float] | None:
    """The interval, if both of its ends are numbers."""
    if estimate.ci is None or not all(map(math.isfinite, estimate.ci)):
        return None
    return estimate.ci


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _n(x: float) -> str:
    """Up to three significant digits, no exponent for everyday numbers."""
    return f"{x:.3g}"
