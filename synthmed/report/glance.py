"""The first screen of a report: one line for each question, beside the decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from synthmed.report.words import words
from synthmed.types import WORST

WORST_FIRST = ("fail", "review", "inconclusive", "pass")
_SAFETY = ("memorization", "membership", "audit")
_IN_HOUSE = "measured on real patients, and not told here"


class Line(NamedTuple):
    """One question.

    Args:
        title: the question.
        section: id of the part of the page that says more.
        status: the worst of what the policy asks about it; null where it asks nothing.
        text: the answer.
    """

    title: str
    section: str
    status: str | None
    text: str


def glance(report: Mapping[str, Any], number: Callable[[float | None], str]) -> list[Line]:
    """What a reader wants to know first, in the order of the page.

    Args:
        report: the content of report.json, of either kind.
        number: a figure as text.
    """
    judged = [e for e in report["estimates"] if e["rules"]]
    whole = [e for e in judged if e["slice"] != WORST]
    private = report["privacy"]
    told = report["cohort"]["n_train"] is not None

    def asked(estimates: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
        """Status and words for lines of the policy: the worst of them, and how many are met."""
        if not estimates:
            return None, "the policy asks nothing about it" if told else _IN_HOUSE
        e = min(estimates, key=lambda e: WORST_FIRST.index(e["status"]))
        n_met = sum(e["status"] == "pass" for e in estimates)
        met = f"; {n_met} of {len(estimates)} met" if len(estimates) > 1 else ""
        return e["status"], f"{_figure(e, number)}{met}"

    status, text = asked([e for e in whole if e["group"] in _SAFETY])
    promise = (
        f"\N{GREEK SMALL LETTER EPSILON} = {number(private['epsilon'])} at "
        f"\N{GREEK SMALL LETTER DELTA} = {private['delta']} for each {private['unit']}"
        if private
        else "no formal guarantee"
        if report["data"]["backbone"]
        else "no formal guarantee known"
    )
    n_found = report["identifier_scan"]["n_findings"]
    found = f"{n_found} findings of the identifier scan" if n_found else "no identifier found"
    # what the policy does not ask about, and everybody wants to know
    more = [
        _figure(e, number)
        for name in ("copies", "membership_auc")
        for e in report["estimates"]
        if (e["name"], e["slice"]) == (name, None) and not e["rules"]
    ]
    privacy = "; ".join([promise, *([text, *more] if told else []), found])
    answers = [Line("Privacy", "privacy", "fail" if n_found else status, privacy)]
    for title, group in (("Fidelity", "fidelity"), ("Utility", "utility")):
        mine = [e for e in whole if e["group"] == group]
        there = any(e["group"] == group and e["slice"] is None for e in report["estimates"])
        answers.append(Line(title, group if there else "fidelity", *asked(mine)))
    answers.append(Line("Worst subgroup", "fidelity", *_worst(report, judged, asked)))
    answers.append(Line("Inconclusive", "inconclusive", None, _open(report, told)))
    use = "for software, teaching and rehearsal; never for a decision about a person"
    return [*answers, Line("Use", "use", None, use)]


def _figure(estimate: Mapping[str, Any], number: Callable[[float | None], str]) -> str:
    part = estimate["slice"]
    title = words(estimate["name"]).title + (f" [{part}]" if part and part != WORST else "")
    if estimate["value"] is None:
        return f"{title}: no value"
    ci = estimate["ci"]
    interval = f" [{number(ci[0])}, {number(ci[1])}]" if ci else ""
    floor = estimate["floor"]
    best = f", best attainable {number(floor)}" if floor is not None else ""
    colon = "" if title.endswith("?") else ":"
    return f"{title}{colon} {number(estimate['value'])}{interval}{best}"


def _worst(
    report: Mapping[str, Any],
    judged: Sequence[Mapping[str, Any]],
    asked: Callable[[Sequence[Mapping[str, Any]]], tuple[str | None, str]],
) -> tuple[str | None, str]:
    found = [e for e in judged if e["slice"] == WORST]
    if not found and not report["data"]["conditions"]:
        return None, "no labels to tell subgroups by"
    status, text = asked(found)
    notes = [e["note"].rstrip(".") for e in found if e["note"]]
    return status, "; ".join([text, *notes])


def _open(report: Mapping[str, Any], told: bool) -> str:
    if not told:
        return _IN_HOUSE
    names = [
        v["estimate"] + (f" [{v['slice']}]" if v["slice"] else "")
        for v in report["policy"]
        if v["status"] == "inconclusive"
    ]
    if not names:
        return "nothing: every line of the policy could be decided"
    lines = f"{len(names)} of {len(report['policy'])} lines"
    return f"{lines}: {', '.join(dict.fromkeys(names))}"
