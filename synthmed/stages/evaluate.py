"""Screening to evidence: every metric of the config, on what would ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthmed.artifacts import Dataset, ScreenedCohort
from synthmed.config import Config
from synthmed.keys import Key
from synthmed.metrics import Metric
from synthmed.metrics.base import of_subgroup
from synthmed.metrics.copies import Copies
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Sides
from synthmed.metrics.subgroups import Part, subgroups, too_small, worst
from synthmed.progress import Progress
from synthmed.stages.screen import real_cases, synthetic_cases
from synthmed.store import write_bytes
from synthmed.types import Estimate

SEEN = "mmd2_excess"
"""By what every subgroup is judged and the worst is found."""


def evaluate(
    config: Config,
    dataset: Dataset,
    shipped: ScreenedCohort,
    copies: Copies,
    target: Path,
    progress: Progress,
    device: str = "cpu",
) -> dict[str, Any]:
    """Fill `target` with estimates.jsonl, one estimate a line.

    Args:
        config: the run's config.
        dataset: the real side.
        shipped: what would be released.
        copies: the screening of everything that was sampled, before the filter.
        target: the artifact's folder.
        progress: counts metrics.
        device: torch device that compares images with images.

    Returns:
        Facts: how many estimates there are.
    """
    sides = Sides(
        train=real_cases(dataset, held_out=False),
        holdout=real_cases(dataset, held_out=True),
        synthetic=synthetic_cases(shipped.samples, shipped.folders, dataset),
        channels=dataset.channels,
        spacing_mm=dataset.spacing_mm,
        categorical={
            k: c.categories for k, c in config.data.conditions.items() if c.kind == "categorical"
        },
        continuous={
            k: (c.low, c.high) for k, c in config.data.conditions.items() if c.kind == "continuous"
        },
        key=Key.root(config.seed).fold("evaluate"),
        seed=config.seed,
        resamples=config.evaluate.resamples,
        device=device,
    )
    shared = Shared(sides, copies, config.screen.false_discovery_rate)
    estimates = judge(sides, shared, config.evaluate.asked, progress)
    write_bytes(
        target / "estimates.jsonl", "".join(e.model_dump_json() + "\n" for e in estimates).encode()
    )
    return {"n_estimates": len(estimates)}


def judge(
    sides: Sides, shared: Shared, metrics: Sequence[Metric], progress: Progress
) -> list[Estimate]:
    """Every figure of the whole cohort, then those of its subgroups, then the worst of these.

    Args:
        sides: what is compared.
        shared: its caches.
        metrics: in the order of the report.
        progress: counts metrics.
    """
    estimates: list[Estimate] = []
    for i, metric in enumerate(metrics):
        progress.update(i, len(metrics), metric.name)
        estimates += metric.estimate(sides, shared)
    groups = subgroups(sides)
    small = {name: few for name, people in groups.items() if (few := too_small(people))}
    large = [name for name in groups if name not in small]
    for name in large:
        part = Part(shared, name, groups[name])
        for metric in metrics:
            if metric.by_subgroup:
                progress.update(len(metrics), len(metrics), f"{metric.name}, {name}")
                found = metric.estimate(part.sides, part)
                whole = [e for e in found if e.slice is None]
                estimates += [of_subgroup(e, name) for e in whole]
    return estimates + worst(estimates, SEEN, large, small)


def read_estimates(path: Path) -> list[Estimate]:
    """The estimates in an evidence folder."""
    lines = (path / "estimates.jsonl").read_text(encoding="utf-8").splitlines()
    return [Estimate.model_validate_json(line) for line in lines]


def summary(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    return f"{facts['n_estimates']} estimates"
