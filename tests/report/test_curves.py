"""The learning curve: put together from its points, and answered in words that follow from them."""

from __future__ import annotations

from typing import Any

import pytest

from synthmed.report.curves import MASKS, curves
from synthmed.report.page import _worst_slices
from tests.report.test_page import Seen, estimate, page
from tests.report.test_page import report as whole_report  # noqa: F401


def point(
    patients: int | None, gain: tuple[float, float], rival: tuple[float, float], start: str = "auc"
) -> list[dict[str, Any]]:
    where = "condition=kind" + ("" if patients is None else f", {patients} patients")
    real = 0.6 if patients is None else 0.5 + patients / 1000
    values = {
        "trtr": (real, None),
        "augmented": (real + sum(gain) / 2, None),
        "classical_augmentation": (real + 0.01, None),
        "augmented_minus_trtr": (sum(gain) / 2, list(gain)),
        "augmented_minus_classical": (sum(rival) / 2, list(rival)),
    }
    return [
        estimate(f"{start}_{name}", "utility", slice=where, value=value, ci=ci, rules=[])
        for name, (value, ci) in values.items()
    ]


HELPS, NOT, HARMS = (0.05, 0.2), (-0.1, 0.1), (-0.3, -0.1)


@pytest.mark.parametrize(
    ("few", "many", "everyone", "answer"),
    [
        ((HELPS, HELPS), (HELPS, NOT), (NOT, NOT),
         "The synthetic scans help with 8 (AUC +0.12 [+0.05, +0.20]) and 16 (AUC +0.12 [+0.05, "
         "+0.20]) real patients; more than altered copies of the real ones do with 8."),
        ((HELPS, HELPS), (NOT, HELPS), (NOT, NOT),
         "The synthetic scans help with 8 (AUC +0.12 [+0.05, +0.20]) real patients, and more than "
         "altered copies of the real ones do."),
        ((HELPS, NOT), (NOT, NOT), (HARMS, HARMS),
         "The synthetic scans help with 8 (AUC +0.12 [+0.05, +0.20]) real patients; it is not "
         "shown that they help more than altered copies of the real ones do. They do harm with all "
         "(-0.20 [-0.30, -0.10])."),
        ((NOT, NOT), (NOT, NOT), (NOT, NOT),
         "At no number of patients do the synthetic scans help beyond what chance would do."),
    ],
)  # fmt: skip
def test_the_answer_follows_from_the_intervals(
    few: Any, many: Any, everyone: Any, answer: str
) -> None:
    entries = point(None, *everyone) + point(16, *many) + point(8, *few)
    (curve,) = curves(entries)
    assert curve.answer == answer
    assert [p.label for p in curve.points] == ["8", "16", "all"]
    places = [p.x for p in curve.points]
    assert places == sorted(places) and 0 < places[0] < places[-1] < 100
    heights = [height for p in curve.points for _, height in p.ways]
    assert min(heights) >= 0 and max(heights) <= 100
    for p in curve.points:
        shares = [(e["value"] - curve.low) / (curve.high - curve.low) for e, _ in p.ways]
        assert [h for _, h in p.ways] == pytest.approx([100 * s for s in shares], abs=0.01)


def test_a_number_has_its_own_curve_and_a_lone_point_none() -> None:
    entries = point(8, HELPS, HELPS, "r") + point(None, NOT, NOT, "r")
    (curve,) = curves(entries)
    assert curve.figure == "correlation" and curve.low == 0
    assert curves(point(None, NOT, NOT)) == []
    assert curves([]) == []


def of_masks(entries: list[dict[str, Any]], ceiling: float) -> list[dict[str, Any]]:
    """The same points as a segmenter gives them: without a condition, beside single regions."""
    own = [{**e, "slice": e["slice"].removeprefix("condition=kind").removeprefix(", ") or None}
           for e in entries]  # fmt: skip
    regions = [{**e, "slice": "region=parts:left"} for e in own if e["slice"] is None]
    return [{**e, "ceiling": ceiling} for e in own + regions]


def test_masks_have_a_curve_beside_that_of_a_label() -> None:
    points = ((8, HELPS, HELPS), (16, NOT, NOT), (None, NOT, NOT))
    entries = [e for p in points for e in of_masks(point(*p, "dice"), 0.45)]
    labels = [e for p in points for e in point(*p)]
    # the label that falls shortest is given again with slice null, and is no point of any curve
    labels += [{**e, "slice": None} for e in point(None, HARMS, HARMS)]
    masks, label = curves(entries + labels)
    assert (masks.condition, masks.figure, masks.low) == (MASKS, "Dice coefficient", 0.45)
    assert [p.label for p in masks.points] == ["8", "16", "all"]
    assert masks.answer.startswith("The synthetic scans help with 8 (Dice coefficient +0.12 ")
    assert label == curves(labels)[0] and label.figure == "AUC"
    met = [{**e, "value": 1.0} for e in of_masks(point(8, NOT, NOT, "dice"), 1.0)]
    met += [{**e, "value": 1.0} for e in of_masks(point(None, NOT, NOT, "dice"), 1.0)]
    (curve,) = curves(met)
    assert {height for p in curve.points for _, height in p.ways} == {100.0}


def test_the_page_draws_it_and_no_point_is_a_subgroup(
    whole_report: dict[str, Any],  # noqa: F811
) -> None:
    more = point(8, HELPS, HELPS) + point(16, NOT, NOT) + point(None, NOT, NOT)
    whole_report["estimates"] += [*more, estimate("mmd2", "fidelity", slice="worst subgroup")]
    text = page(whole_report)
    assert "The synthetic scans help with 8 (AUC +0.12 [+0.05, +0.20]) real patients" in text
    # what the cohort was made of, and how the small subsets were drawn
    assert "the model learned from all training patients, those of each small subset" in text
    assert "evenly over the categories" in text and "drawn at random" not in text
    drawn = [a for tag, a in Seen(text).tags if str(a.get("class", "")).startswith("way ")]
    assert len([a for a in drawn if "cx" in a]) == 9  # three ways at three points
    assert len([a for a in drawn if str(a.get("x1", "")).endswith("%")]) == 6  # two lines each
    shown = _worst_slices(whole_report)
    assert [(e["name"], e["slice"]) for e in shown] == [("mmd2", "worst subgroup")]
