"""The learning curve of a label or of masks: whether the cohort helps, and up to how many patients.

`utility` and `segmentation` give each point as an estimate with a slice of its own; here they are
put together again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WAYS = (
    ("trtr", "real scans"),
    ("augmented", "real and synthetic scans"),
    ("classical_augmentation", "real scans and altered copies"),
)
"""Ending of an estimate's name, and what taught the reader."""

_POINT = re.compile(r"condition=(?P<condition>\w+), (?P<patients>\d+) patients")
_WHOLE = re.compile(r"condition=(?P<condition>\w+)")
_OF_MASKS = re.compile(r"(?P<patients>\d+) patients")
MASKS = "The masks"
"""What stands for the condition where a segmenter is taught; no condition has a space in it."""
FIGURES = {"auc": ("AUC", 0.5), "r": ("correlation", 0.0), "dice": ("Dice coefficient", 0.0)}
"""First word of an estimate's name to what it is called, and who guesses where no ceiling says."""


@dataclass(frozen=True)
class Point:
    """One number of real patients.

    Args:
        label: the number, or "all".
        x: place on the axis in percent.
        ways: of each in `WAYS` the estimate and its place, bottom 0 and top 100 percent.
        gain: real and synthetic scans less real ones.
    """

    label: str
    x: float
    ways: Sequence[tuple[Mapping[str, Any], float]]
    gain: Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A condition's curve.

    Args:
        condition: its name, or `MASKS`.
        figure: what is on the axis.
        low: of the axis.
        high: of it.
        points: from few patients to all.
        answer: whether the cohort helps, in sentences.
    """

    condition: str
    figure: str
    low: float
    high: float
    points: Sequence[Point]
    answer: str


def curves(estimates: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The curves among the entries of report.json's estimates, of two points at least."""
    found: dict[str, dict[int | None, dict[str, Mapping[str, Any]]]] = {}
    for e in estimates:
        place = _place(e)
        if e["group"] == "utility" and place and e["value"] is not None:
            condition, count = place
            found.setdefault(condition, {}).setdefault(count, {})[e["name"]] = e
    out = (_curve(condition, points) for condition, points in found.items())
    return [c for c in out if len(c.points) > 1]


def _place(estimate: Mapping[str, Any]) -> tuple[str, int | None] | None:
    """Condition and number of patients (null for all) of a point; null where it is none."""
    where = estimate["slice"]
    if estimate["name"].startswith("dice_"):
        match = _OF_MASKS.fullmatch(where or "")
        if match is None:
            return (MASKS, None) if where is None else None
        return MASKS, int(match["patients"])
    match = _POINT.fullmatch(where or "") or _WHOLE.fullmatch(where or "")
    if match is None:
        return None
    count = match.groupdict().get("patients")
    return match["condition"], int(count) if count else None


def _curve(condition: str, found: Mapping[int | None, Mapping[str, Mapping[str, Any]]]) -> Curve:
    order = [*sorted(n for n in found if n is not None), *([None] if None in found else [])]
    start = next((s for s in FIGURES if any(f"{s}_trtr" in p for p in found.values())), "r")
    wanted = [f"{start}_{way}" for way, _ in WAYS]
    order = [n for n in order if all(w in found[n] for w in wanted)]
    values = [found[n][w]["value"] for n in order for w in wanted] or [0.0]
    figure, guess = FIGURES[start]
    if start == "dice" and order:
        guess = found[order[0]]["dice_trtr"]["ceiling"] or guess
    low, high = min(guess, *values, 0.99), 1.0  # masks can be met to the voxel
    points = [
        Point(
            label="all" if n is None else str(n),
            x=round(100 * (i + 0.5) / len(order), 2),
            ways=[(found[n][w], round(100 * _share(found[n][w], low, high), 2)) for w in wanted],
            gain=found[n][f"{start}_augmented_minus_trtr"],
        )
        for i, n in enumerate(order)
    ]
    rival = [found[n][f"{start}_augmented_minus_classical"] for n in order]
    return Curve(condition, figure, low, high, points, _answer(points, rival, figure))


def _share(estimate: Mapping[str, Any], low: float, high: float) -> float:
    return float((estimate["value"] - low) / (high - low))


def _answer(points: Sequence[Point], rival: Sequence[Mapping[str, Any]], figure: str) -> str:
    """What a hospital with so many patients of its own gains, and against what."""
    gains = [p for p in points if p.gain["ci"][0] > 0]
    losses = [p for p in points if p.gain["ci"][1] < 0]
    more = {p.label for p, e in zip(points, rival, strict=True) if e["ci"][0] > 0}
    beyond = [p.label for p in gains if p.label in more]
    if not gains:
        said = "At no number of patients do the synthetic scans help beyond what chance would do."
    else:
        helped = _listed([f"{p.label} ({figure} {_by(p)})" for p in gains])
        said = f"The synthetic scans help with {helped} real patients"
        said += _against(beyond, [p.label for p in gains])
    if losses:
        said += f" They do harm with {_listed([f'{p.label} ({_by(p)})' for p in losses])}."
    return said


def _by(point: Point) -> str:
    """The gain at a point, with its interval."""
    low, high = point.gain["ci"]
    return f"{point.gain['value']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _against(beyond: Sequence[str], gains: Sequence[str]) -> str:
    if not beyond:
        return "; it is not shown that they help more than altered copies of the real ones do."
    if len(beyond) == len(gains):
        return ", and more than altered copies of the real ones do."
    return f"; more than altered copies of the real ones do with {_listed(beyond)}."


def _listed(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
