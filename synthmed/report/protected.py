"""What a report may say under differential privacy, and what it has to.

Epsilon speaks of the model. A figure computed on real patients and printed beside it would not be
covered, so what leaves then holds public constants and what the synthetic cohort shows by itself.
The decision is the exception: it looked at patients, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from synthmed.config import Privacy, Rule
from synthmed.policy import describe
from synthmed.types import COPIES_THAT_SHIP

NOT_COVERED = (
    "the decision whether to release: it looked at real patients and tells one bit an attempt, two "
    "where somebody signed for it",
    "what anybody learns about a patient who was never in the cohort, such as how a disease looks",
    "time, memory and the number of people in a step, for whoever watches the machine that trained",
    "earlier runs without protection on the same patients, if there were any",
    "the restricted report, which stays in the house",
)

_DECIDED = {
    "RELEASE": "Every line of the policy is met. Its figures were computed on real patients and "
    "stay in the house.",
    "REVIEW": "Nothing failed, but not every line of the policy is met. The figures were computed "
    "on real patients and stay in the house.",
    "WITHHELD": "A line of the policy failed. The figures were computed on real patients and stay "
    "in the house.",
}


def stated(
    statement: Mapping[str, Any] | None, promise: Privacy | None, attempts: int
) -> dict[str, Any] | None:
    """The privacy block of a report; null where nothing was promised.

    Args:
        statement: `Session.statement`.
        promise: the config's.
        attempts: cohorts of this run that were looked at, for a decision or before one.
    """
    if statement is None or promise is None:
        return None
    more = {
        "declared_patients": promise.patients,
        "attempts": attempts,
        "runs_charged": statement["lifetime"]["runs_charged"],
    }
    return {**statement, **more, "not_covered": list(NOT_COVERED)}


def protected(report: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, Any]:
    """A shareable report without anything that was computed on real patients.

    Args:
        report: the whole content, with a privacy block.
        rules: the policy. All of them are listed: whether one that is not `required` was judged
            tells whether a subgroup has ten people.
    """
    counts = ("n_patients", "n_scans", "n_train", "n_holdout", "n_dropped")
    asked = [(r.estimate, r.slice, describe(r)) for r in rules]
    standing = [
        line
        for found in report["policy"]
        if (line := (found["estimate"], found["slice"], found["rule"])) not in asked
        and found["estimate"] != COPIES_THAT_SHIP  # a line where there are any
    ]
    policy = [
        {"estimate": estimate, "slice": part, "rule": rule, "status": None, "reason": ""}
        for estimate, part, rule in asked + standing
    ]
    provenance = report["provenance"]
    digests = {k: v for k, v in provenance["digests"].items() if k == "config"}
    return {
        **report,
        "reasons": [_DECIDED[report["decision"]]],
        "cohort": {**report["cohort"], **dict.fromkeys(counts)},
        "estimates": [],
        "policy": policy,
        # who has paid in which other runs tells who is in this one
        "privacy": {k: v for k, v in report["privacy"].items() if k != "lifetime"}
        | {"runs_charged": None},
        "identifier_scan": {**report["identifier_scan"], "n_searched": None},
        "provenance": {**provenance, "digests": digests},
    }
