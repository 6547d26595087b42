"""What the starting policy says of a cohort with a fault, in docs/benchmarks.md.

    SYNTHMED_REAL_DATA=... python tests/benchmarks/decisions.py

The faults of faults.py, once each, judged as a run judges: the estimates with their intervals, and
the default policy. Real scans pose as synthetic ones; others are trained on and held out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from synthmed.artifacts import ChannelInfo
from synthmed.config import Policy
from synthmed.keys import Key
from synthmed.metrics import DEFAULT_METRICS
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.stats import Ints
from synthmed.policy import Decision, decide
from synthmed.progress import Progress
from synthmed.stages.evaluate import judge
from synthmed.types import Labels
from tests.benchmarks.cohorts import NONE, publish, real_data
from tests.benchmarks.faults import (
    AGES,
    CHANGES,
    COLLAPSE,
    COPIES,
    DROPPED,
    PAGE,
    REGION,
    TORQUE,
    Volume,
    hippocampus,
    phantoms,
    spoilt,
)

BEGIN, END = "<!-- decisions:begin -->", "<!-- decisions:end -->"
PEOPLE, PHANTOM_SIDES = 330, (110, 110)
"""Phantoms, and how many of them are the cohort, and held out; the others are trained on."""
HIPPOCAMPUS_SIDES = (42, 42)
NOTHING = "nothing"
RESAMPLES = 200
ASKED = ("copies", "authenticity", "mmd2", "prdc", "region_volume_smd", "utility")
"""Metrics that the starting policy asks."""


def cases(scans: Sequence[Volume], masks: Sequence[Volume], labels: Sequence[Labels]) -> Cases:
    """People with one scan each: the image, then the labels of its mask."""
    volumes = [
        np.concatenate([x[None], m.astype(np.float32)]) for x, m in zip(scans, masks, strict=True)
    ]
    names = np.array([f"person{i:04d}" for i in range(len(scans))])
    return Cases(np.stack(volumes).astype(np.float16), names, labels)


def some(of: Cases, rows: Ints, prefix: str) -> Cases:
    """Some people; those of a cohort get names of their own."""
    names = (
        np.array([f"{prefix}{i:04d}" for i in range(len(rows))]) if prefix else of.patients[rows]
    )
    return Cases(of.volumes[rows], names, [of.labels[i] for i in rows])


def decided(
    people: Mapping[str, Cases], sizes: tuple[int, int], n_labels: int, seed: int
) -> dict[str, Decision]:
    """Fault to what the starting policy says of it.

    Args:
        people: fault to everybody, spoilt; "" to everybody as they are.
        sizes: people in the cohort, and held out.
        n_labels: of the masks.
        seed: draws who is where.
    """
    real = people[""]
    kinds = np.array([v["kind"] for v in real.labels])
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(real))
    cohort, holdout, train = np.split(order, np.cumsum(sizes))
    lost = min(kinds)
    out = {}
    for fault in (NOTHING, *(f for f in people if f), COLLAPSE, COPIES, DROPPED):
        own, rows = people.get(fault, real), cohort
        if fault == COLLAPSE:
            rows = rng.choice(cohort[:5], len(cohort))
        elif fault == COPIES:
            rows = rng.choice(train, len(cohort), replace=len(train) < len(cohort))
        made = some(own, rows, "sample")
        if fault in (COLLAPSE, COPIES):  # never twice the same bytes: a copy has noise of its own
            noise = 0.005 * rng.standard_normal(made.volumes[:, :1].shape)
            volumes = made.volumes.astype(np.float32)
            volumes[:, :1] += noise
            made = Cases(volumes.astype(np.float16), made.patients, made.labels)
        if fault == DROPPED:  # asked for as often as ever, and shown as somebody of another kind
            others = rng.permutation(cohort[kinds[cohort] != lost])
            shown = iter(np.resize(others, int(np.sum(kinds[cohort] == lost))))
            rows = np.array([next(shown) if kinds[r] == lost else r for r in cohort])
            made = Cases(own.volumes[rows], made.patients, [own.labels[r] for r in cohort])
        sides = Sides(
            train=some(real, train, ""),
            holdout=some(real, holdout, ""),
            synthetic=made,
            channels=[
                ChannelInfo("T1w"),
                *(
                    ChannelInfo(f"part:{k}", mask="part", label_value=k + 1)
                    for k in range(n_labels)
                ),
            ],
            spacing_mm=(1.0, 1.0, 1.0),
            categorical={"kind": tuple(sorted(set(kinds)))},
            continuous={"age": AGES} if "age" in real.labels[0] else {},
            key=Key.root(seed).fold("decisions"),
            seed=seed,
            resamples=RESAMPLES,
        )
        metrics = [m for m in DEFAULT_METRICS if m.name in ASKED]
        found = judge(sides, Shared(sides), metrics, Progress(fault, quiet=True))
        out[fault] = decide(Policy().rules, found, n_holdout=len(holdout))
        print(fault, out[fault].decision, lines(out[fault], "fail"), file=sys.stderr, flush=True)
    return out


def lines(decision: Decision, *status: str) -> str:
    """The lines of a policy that ended in one of these."""
    named = (
        f"`{v.estimate}`" + (f" {v.slice}" if v.slice else "")
        for v in decision.verdicts
        if v.status in status
    )
    return ", ".join(named) or NONE


def table(decisions: Mapping[str, Decision]) -> str:
    """A fault a row: decision, the lines that failed, and those left open."""
    rows = ["| | decision | not met | inconclusive, or for review |", "|---|---|---|---|"]
    rows += [
        f"| {fault} | {d.decision} | {lines(d, 'fail')} | {lines(d, 'inconclusive', 'review')} |"
        for fault, d in decisions.items()
    ]
    return "\n".join(rows)


def everybody(
    scans: Sequence[Volume], masks: Sequence[Volume], labels: Sequence[Labels]
) -> dict[str, Cases]:
    """All people as they are, under "", and spoilt in every way."""
    rng = np.random.default_rng(0)
    out = {fault: cases(*spoilt(scans, masks, fault, rng), labels) for fault in CHANGES}
    return {"": cases(scans, masks, labels), **out}


def of_phantoms() -> str:
    """Phantoms that lean to one side, so that mirroring them is a change."""
    scans, masks, labels, grown = phantoms(TORQUE, n=PEOPLE)
    people = everybody(scans, masks, labels)
    people[REGION] = cases([x for x, _ in grown], [m for _, m in grown], labels)
    return table(decided(people, PHANTOM_SIDES, 1, 0))


def of_hippocampus(root: Path) -> str:
    """Fewer than 50 are held out: no line about quality can pass."""
    scans, masks, labels, _ = hippocampus(root)
    return table(decided(everybody(scans, masks, labels), HIPPOCAMPUS_SIDES, 2, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and put them into the page."""
    parser = argparse.ArgumentParser(description="What the starting policy says of faults.")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    root = real_data()
    (made, held), (few, kept) = PHANTOM_SIDES, HIPPOCAMPUS_SIDES
    rest = PEOPLE - made - held
    texts = [f"phantoms: {rest} trained on, {held} held out, {made} samples\n\n{of_phantoms()}"]
    texts.append(f"hippocampus: {kept} held out, {few} samples\n\n{of_hippocampus(root)}")
    text = "\n\n".join(texts)
    publish(options.page, f"`python tests/benchmarks/decisions.py`:\n\n{text}", BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
