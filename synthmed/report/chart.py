"""Where the marks of an estimate's chart lie, in percent of its width.

The chart holds no text, so that it can shrink to a phone; the page prints its key below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """Positions in percent; null where the estimate has no such figure.

    Args:
        low: the number at the left edge.
        high: the number at the right edge.
        value: the estimate.
        ci: both ends of the interval.
        floor: best attainable.
        ceiling: known-bad control.
        target: the ideal value.
        bands: (begin, width) of what meets each rule.
        limits: the limit of each rule.
        zero: where 0 lies when it is inside.
    """

    low: float
    high: float
    value: float | None
    ci: tuple[float, float] | None
    floor: float | None
    ceiling: float | None
    target: float | None
    bands: list[tuple[float, float]]
    limits: list[float]
    zero: float | None


def chart(estimate: Mapping[str, Any]) -> Chart | None:
    """The chart of one entry of report.json's estimates; null when it has no value."""
    if estimate["value"] is None:
        return None
    rules = [r for r in estimate["rules"] if r["limit"] is not None]
    target = estimate["target"] if estimate["better"] == "match" else None
    marks = [estimate["value"], estimate["floor"], estimate["ceiling"], target]
    marks += [*(estimate["ci"] or ()), *(r["limit"] for r in rules)]
    low, high = _ends([float(m) for m in marks if m is not None])

    def sure(x: float) -> float:
        return round((float(x) - low) / (high - low) * 100, 2)

    def at(x: float | None) -> float | None:
        return None if x is None else sure(x)

    bands = []
    for rule in rules:
        edge = sure(rule["limit"])
        bands.append((0.0, edge) if rule["side"] == "at_most" else (edge, round(100 - edge, 2)))
    ci = estimate["ci"]
    return Chart(
        low=low,
        high=high,
        value=at(estimate["value"]),
        ci=None if ci is None else (sure(ci[0]), sure(ci[1])),
        floor=at(estimate["floor"]),
        ceiling=at(estimate["ceiling"]),
        target=at(target),
        bands=bands,
        limits=[sure(r["limit"]) for r in rules],
        zero=at(0.0) if low < 0 < high else None,
    )


def _ends(marks: list[float]) -> tuple[float, float]:
    """Round numbers around all marks, with room for the marks' own width."""
    low, high = min(marks), max(marks)
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step *= next(m for m in (0.1, 0.2, 0.5, 1.0) if span / (m * step) <= 10)
    # what cannot be below 0 begins there when that wastes less than half of the axis
    begin = 0.0 if 0 <= low <= span else math.floor((low - 0.02 * span) / step) * step
    return begin, math.ceil((high + 0.02 * span) / step) * step
