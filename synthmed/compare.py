"""Runs side by side: what each was, what it measured, and what was paid for what.

Everything is read from the restricted reports, so that nothing is computed twice, and the result
stays in the house as they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthmed.errors import InputError, UsageError
from synthmed.report.page import GROUP, environment, number
from synthmed.report.words import words
from synthmed.text import aligned
from synthmed.types import SCHEMA_VERSION

NONE = "\N{EN DASH}"

TRADES = (
    ("epsilon", "mmd2_excess", "Fidelity against epsilon"),
    ("membership_auc", "mmd2_excess", "Fidelity against membership"),
    ("membership_auc", "auc_tstr", "Utility against membership"),
    ("membership_auc", "dice_tstr", "Utility of the masks against membership"),
)
"""Across, up, and title of each plot: what is paid in privacy, and what it buys."""


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """What runs, or assessments, have measured.

    Returns:
        `runs`, each with its name, decision and numbers; `estimates`, each with its name and one
        entry a run (null where a run has none); `same_people`, whether all were judged on one and
        the same dataset, without which floors differ and figures cannot be set against each other.

    Raises:
        UsageError: two of them have the same name, or there is one alone.
        InputError: a folder holds no report.
    """
    names = [run.resolve().name for run in runs]
    if len(runs) < 2:
        raise UsageError("compare: one run alone", "Name two or more.")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UsageError(
            f"compare: two of the folders are called {twice[0]}", "Name each of them differently."
        )
    reports = [_report(run) for run in runs]
    found = [{e["name"]: e for e in r["estimates"] if e["slice"] is None} for r in reports]
    order = list(dict.fromkeys(name for estimates in found for name in estimates))
    datasets = {r["provenance"]["digests"].get("dataset") for r in reports}
    return {
        "runs": [_run(name, r) for name, r in zip(names, reports, strict=True)],
        "same_people": len(datasets) == 1 and None not in datasets,
        "estimates": [
            {
                "name": name,
                "group": next(e[name]["group"] for e in found if name in e),
                "better": next(e[name]["better"] for e in found if name in e),
                "of": [_figures(e.get(name)) for e in found],
            }
            for name in order
        ],
    }


def lines(table: Mapping[str, Any]) -> list[str]:
    """The comparison as text, a run a column."""
    runs = table["runs"]
    rows = [["", *(r["name"] for r in runs)]]
    rows += [[title, *(str(r[key]) for r in runs)] for key, title in _ABOUT]
    rows += [[e["name"], *(_cell(o) for o in e["of"])] for e in table["estimates"]]
    out = aligned(rows)
    if not table["same_people"]:
        out.append(f"note: {DIFFERENT}")
    return out


DIFFERENT = (
    "these were not judged on the same people, so that their figures cannot be set against each "
    "other: compare each with its own floor"
)


def page(table: Mapping[str, Any]) -> str:
    """The comparison as a page that needs nothing but itself."""
    shown = [{**e, "title": words(e["name"]).title} for e in table["estimates"]]
    groups = [
        {"group": group, "estimates": [e for e in shown if e["group"] == group]}
        for group in GROUP
        if any(e["group"] == group for e in shown)
    ]
    return (
        environment()
        .get_template("compare.html")
        .render(
            runs=table["runs"],
            about=_ABOUT,
            groups=groups,
            trades=trades(table),
            warning="" if table["same_people"] else DIFFERENT,
        )
    )


def trades(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plots that can be drawn: those with two runs that have both figures.

    Each has `points` with the run's number, name, and places in percent from the lower left; the
    text of both axes, with their units; the `corner` that is better on both; and `left_out`, runs
    without one of the figures: on an axis of epsilon those that were trained without any.
    """
    by_name = {e["name"]: e["of"] for e in table["estimates"]}
    better = {e["name"]: e["better"] for e in table["estimates"]} | {"epsilon": "lower"}
    out = []
    for across, up, title in TRADES:
        ups = [None if o is None else o["value"] for o in by_name.get(up, [])]
        if across == "epsilon":
            acrosses = [r["epsilon_value"] for r in table["runs"]]
        else:
            acrosses = [None if o is None else o["value"] for o in by_name.get(across, [])]
        both = [
            (i, x, y)
            for i, (x, y) in enumerate(zip(acrosses, ups, strict=False))
            if x is not None and y is not None
        ]
        if len(both) < 2:
            continue
        xs, ys = _axis([x for _, x, _ in both]), _axis([y for _, _, y in both])
        names = [r["name"] for r in table["runs"]]
        out.append(
            {
                "title": title,
                "across": _titled(across, by_name),
                "up": _titled(up, by_name),
                "corner": _corner(better[across], better[up]),
                "of_epsilon": across == "epsilon",
                "x": xs,
                "y": ys,
                "points": [
                    {"number": i + 1, "name": names[i], "x": _at(x, xs), "y": _at(y, ys)}
                    for i, x, y in both
                ],
                "left_out": [n for i, n in enumerate(names) if i not in {b[0] for b in both}],
            }
        )
    return out


_ABOUT = (
    ("decision", "decision"),
    ("backbone", "backbone"),
    ("epsilon", "epsilon"),
    ("n_train", "people trained on"),
    ("n_holdout", "people held out"),
    ("n_synthetic", "synthetic scans"),
    ("n_dropped", "dropped as copies"),
)


def _report(run: Path) -> dict[str, Any]:
    file = run / "private" / "report" / "report.json"
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if report["schema_version"] != SCHEMA_VERSION:
            raise ValueError("another version")
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"compare {run}: no report in this folder",
            "Name the folder of a run of this version that has come to its decision, or of an "
            "assessment.",
        ) from None
    return report


def _run(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    cohort, privacy = report["cohort"], report["privacy"]
    return {
        "name": name,
        "decision": report["decision"] + (" (signed)" if report["signature"] else ""),
        "backbone": report["data"]["backbone"] or NONE,
        "epsilon": number(privacy["epsilon"]) if privacy else "no promise",
        "epsilon_value": privacy["epsilon"] if privacy else None,
        **{k: cohort[k] for k in ("n_train", "n_holdout", "n_synthetic", "n_dropped")},
    }


def _figures(estimate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {k: estimate[k] for k in ("value", "ci", "floor", "ceiling", "status", "rules", "unit")}


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None or figures["value"] is None:
        return NONE
    text = number(figures["value"])
    if figures["ci"]:
        text += f" [{number(figures['ci'][0])}, {number(figures['ci'][1])}]"
    return text + ("" if not figures["rules"] else f" {figures['status']}")


def _titled(name: str, by_name: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> str:
    """What an axis shows, with its unit."""
    if name == "epsilon":
        return "epsilon (without a unit; at the delta of each run)"
    unit = next(o["unit"] for o in by_name[name] if o is not None)
    return f"{words(name).title} ({'without a unit' if unit == '1' else unit})"


def _corner(across: str, up: str) -> str:
    """Where a run is better on both axes, each of which is better `lower` or `higher`."""
    return f"{'upper' if up == 'higher' else 'lower'} {'right' if across == 'higher' else 'left'}"


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """Both ends of an axis, with room for the marks."""
    low, high = min(values), max(values)
    room = 0.12 * ((high - low) or abs(high) or 1.0)
    return low - room, high + room


def _at(value: float, axis: tuple[float, float]) -> float:
    return round(100 * (value - axis[0]) / (axis[1] - axis[0]), 2)
