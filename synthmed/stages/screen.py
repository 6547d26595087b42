"""Cohort to screening: samples that copy a training patient are found, dropped and replaced.

The gap test of metrics/copies.py decides. Flagged samples are dropped once and replaced from the
same stream of seeds, with the labels and masks of those they replace; the policy judges what was
sampled before the filter. Replacements are screened like what they replace and never dropped
themselves: one that is flagged keeps the cohort from shipping. All that ships is tested again by
the second similarity (in evaluate).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthmed.artifacts import COPIES, COPIES_REPLACED, Cohort, Dataset, Sample
from synthmed.config import Config
from synthmed.formats import synthetic
from synthmed.keys import Key
from synthmed.metrics.blocks import image_channels
from synthmed.metrics.copies import Copies, ImageTest
from synthmed.metrics.sides import Cases
from synthmed.progress import Progress
from synthmed.stages.sample import Sampler, write_samples
from synthmed.store import write_bytes, write_json


def screen(
    config: Config,
    dataset: Dataset,
    cohort: Cohort,
    sampler: Sampler | None,
    target: Path,
    progress: Progress,
    device: str = "cpu",
) -> dict[str, Any]:
    """Fill `target` with copies.json (a verdict a sample), dropped.json, and the replacements with
    a verdict each in copies-replaced.json.

    Args:
        config: the run's config.
        dataset: the real side.
        cohort: everything that was sampled.
        sampler: draws replacements; None leaves the cohort as it is (made by another tool).
        target: the artifact's folder.
        progress: shown while comparing.
        device: torch device that compares.

    Returns:
        Facts: how many samples were flagged and dropped, how many replacements were flagged, and
        how many patients were copied.
    """
    progress.update(0, 1)
    train, holdout = (real_cases(dataset, held_out=side) for side in (False, True))
    key = Key.root(config.seed).fold("screen")
    test = ImageTest(train, holdout, image_channels(dataset.channels), key, device)

    def found(samples: Sequence[Sample], folder: Path) -> Copies:
        made = synthetic_cases(samples, [folder] * len(samples), dataset)
        return test.find(made, config.screen.false_discovery_rate)

    copies = found(cohort.samples, cohort.path)
    write_bytes(target / COPIES, copies.model_dump_json().encode())
    flagged = [cohort.samples[i] for i in copies.flagged]
    # a filtered selection is no longer pure post-processing of a private model
    drop = sampler is not None and config.screen.filter and config.privacy is None
    dropped = flagged if drop else []
    replacements: list[Sample] = []
    flagged_again = 0
    if sampler is not None and dropped:
        replaced = {len(cohort.samples) + i: s.index for i, s in enumerate(dropped)}
        sampler.stand_in(replaced)
        replacements = sampler.write(sorted(replaced), target, lambda n: None)
        again = found(replacements, target)
        write_bytes(target / COPIES_REPLACED, again.model_dump_json().encode())
        flagged_again = len(again.flagged)
    write_json(target / "dropped.json", [s.index for s in dropped])
    write_samples(target / "replacements.jsonl", replacements)
    return {
        "n_samples": len(cohort.samples),
        "n_flagged": len(flagged),
        "n_dropped": len(dropped),
        "n_flagged_again": flagged_again,
        "n_patients_copied": len(copies.patients),
        "n_under_two_names": len(copies.under_two_names or ()),
    }


def read_copies(path: Path) -> Copies:
    """The verdicts in a screening's folder."""
    return Copies.model_validate_json((path / COPIES).read_bytes())


def real_cases(dataset: Dataset, held_out: bool) -> Cases:
    """One side of the split."""
    rows = np.flatnonzero(dataset.holdout == held_out)
    return Cases(
        dataset.volumes[rows], dataset.patients[rows], [dataset.labels[int(i)] for i in rows]
    )


def synthetic_cases(samples: Sequence[Sample], folders: Sequence[Path], dataset: Dataset) -> Cases:
    """Synthetic scans as metrics take them, each its own patient."""
    return Cases(
        synthetic.read(samples, folders, dataset.channels),
        np.array([f"syn{s.index:06d}" for s in samples]),
        [s.labels for s in samples],
    )


def summary(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    n = facts.get("n_under_two_names", 0)  # an earlier version did not ask
    two = f"; {n} pair{'s' * (n > 1)} of patients may be one person" if n else ""
    if not facts["n_flagged"]:
        return f"none of {facts['n_samples']} samples copies a patient{two}"
    again = facts.get("n_flagged_again", 0)
    still = f", of which {again} cop{'y' if again > 1 else 'ies'} one again" if again else ""
    return (
        f"{facts['n_flagged']} of {facts['n_samples']} samples copy a patient "
        f"({facts['n_patients_copied']} patients); {facts['n_dropped']} dropped and "
        f"replaced{still}{two}"
    )
