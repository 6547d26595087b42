"""What a config will meet and cost, measured before training: data, memory, time, what can pass."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthmed import memory, origin
from synthmed.artifacts import Catalogue, Scan
from synthmed.config import Config, Rule
from synthmed.formats.quarantine import listed
from synthmed.loader import WATCHED
from synthmed.measure import Request, measure
from synthmed.metrics.authenticity import FEWEST_OTHERS
from synthmed.metrics.stats import Z95, clopper_pearson
from synthmed.metrics.subgroups import FEWEST, cut, tens
from synthmed.policy import MIN_HOLDOUT, judge, limits
from synthmed.progress import Progress, clock
from synthmed.stages.evaluate import SEEN
from synthmed.stages.fetch import FOLDER
from synthmed.stages.ingest import ingest
from synthmed.stages.lines import FLAGGED, START, enough_samples
from synthmed.stages.sample import sample_count
from synthmed.stages.train import CANONICAL_BATCH, parameters
from synthmed.trial import noise_loader
from synthmed.types import HALVES, WORST, Estimate
from synthmed.watch import FORWARD, look_steps

ABOUT_PEOPLE = frozenset(
    {
        *("copies", "copied_patients", "copies_shipped", "authenticity", "authenticity_excess"),
        *("membership_auc", "membership_tpr_at_fpr10"),
        *("singling_out", "linkability", "attribute_inference"),
    }
)
"""Estimates of privacy, which need no `MIN_HOLDOUT`."""


def fingerprint(config: Config, device: str, quiet: bool) -> dict[str, Any]:
    """Read the source, try a few steps on noise of the right shape, and extrapolate.

    Nothing is kept: what is read goes to a temporary folder that only this user can open. The
    figures describe real patients and are for the person who plans the run.

    Returns:
        patients, scans and refusals; shapes and voxel sizes; labels; seconds a step and a sample;
        peak memory; and which policy lines cannot pass with this holdout.
    """
    with tempfile.TemporaryDirectory(prefix="synthmed-plan-") as folder:
        target, work = Path(folder, "ingest"), Path(folder, FOLDER)
        target.mkdir()
        facts = ingest(config, target, work=work, progress=Progress("ingest", quiet).update)
        scans = Catalogue.open(target).scans
    n_patients = len({s.patient for s in scans})
    n_holdout = round(config.data.holdout * n_patients)
    labels = label_counts(config, scans)
    out: dict[str, Any] = {
        "n_patients": n_patients,
        "n_scans": len(scans),
        "n_quarantined": facts["n_quarantined"],
        "reasons": facts["reasons"],
        "shape": spread([s.shape for s in scans]),
        "spacing_mm": spread([s.spacing_mm for s in scans]),
        "labels": labels,
        "n_train": n_patients - n_holdout,
        "n_holdout": n_holdout,
        "n_samples": sample_count(config),
        "cannot_pass": cannot_pass(config, n_patients - n_holdout, n_holdout, labels),
    }
    out |= cost(config, out["n_train"], n_holdout, len(scans), device)
    if config.privacy is not None:
        from synthmed.privacy.outlook import outlook  # imports Opacus: seconds

        # an upper bound: a phase that reads nobody trains some of them
        out["privacy"] = outlook(config.privacy, out["steps"], out["n_trained"])
    return out


def spread(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Smallest, median and largest value along X, Y, Z."""
    table = np.array(rows, float)
    return {
        name: [round(float(v), 3) for v in f(table, axis=0)]
        for name, f in (("min", np.min), ("median", np.median), ("max", np.max))
    }


def label_counts(config: Config, scans: Sequence[Scan]) -> dict[str, Any]:
    """Patients of each part of a label, the range of every number, and what is missing.

    Among first scans. The halves of a number are those of everybody, held out or not; a number that
    no value cuts in two has none.
    """
    first = {s.patient: s for s in reversed(scans)}.values()
    out: dict[str, Any] = {}
    for name, condition in config.data.conditions.items():
        values = [s.labels[name] for s in first if name in s.labels]
        if condition.kind == "categorical":
            counts = Counter(str(v) for v in values)
            out[name] = {c: counts.get(c, 0) for c in condition.categories}
        else:
            numbers = [float(v) for v in values]
            out[name] = {"min": min(numbers), "max": max(numbers)} if numbers else {}
            at = cut(numbers, condition.low, condition.high)
            if at is not None:
                below = sum(v <= at for v in numbers)
                out[name] |= dict(zip(HALVES, (below, len(numbers) - below), strict=True))
        if missing := len(first) - len(values):
            out[name]["missing"] = missing
    return out


def cannot_pass(
    config: Config, n_train: int, n_holdout: int, labels: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Policy lines that stay inconclusive whatever is generated: of too few people, or samples.

    Each line is judged on the best evidence that so many people could give. Weights to start from
    which nothing says whom they have seen are among them.

    Args:
        config: its policy is asked.
        n_train: patients to train on.
        n_holdout: patients held out.
        labels: of `label_counts`.
    """
    parts = config.data.subgroups
    counts = {
        part: labels[name].get(category, 0)
        for part, (name, category) in parts.items()
        # a number that no value cuts in two makes none
        if category in labels[name] or config.data.conditions[name].kind == "categorical"
    }
    rules = [r for r in config.policy.rules if r.required or counts]
    best = [_best(rule, config, n_train, n_holdout, counts) for rule in rules]
    verdicts = [judge(r, e, n_holdout) for r, e in zip(rules, best, strict=True)]
    names = {
        v.estimate if v.slice is None else f"{v.estimate} [{v.slice}]"
        for r, e, v in zip(rules, best, verdicts, strict=True)
        # of a subgroup too small to be measured this alone has a line, unless it is required
        if v.status != "pass"
        and (r.required or r.slice not in counts or r.estimate == SEEN or e.value is not None)
    }
    if sample_count(config) < enough_samples(config):
        names.add(FLAGGED)
    if config.privacy is None and (start := origin.find(config)) and not start.learned_from:
        names.add(START)
    return sorted(names)


def _best(
    rule: Rule, config: Config, n_train: int, n_holdout: int, counts: Mapping[str, float]
) -> Estimate:
    """The evidence that a rule is best met with: at its limit, as sure as so many people allow.

    Args:
        counts: patients of each subgroup.
    """
    held_out, enough = n_holdout, True
    if rule.slice is not None and rule.slice in config.data.subgroups:
        n = counts.get(rule.slice, 0)
        held_out = round(config.data.holdout * n)
        n_train = round(n) - held_out
        enough = min(held_out, n_train) >= FEWEST
    start = Estimate(
        name=rule.estimate,
        group="memorization" if rule.estimate in ABOUT_PEOPLE else "fidelity",
        slice=rule.slice,
        value=None,
        ci=None,
        n=n_train,
        better="lower",
        floor=1.0,
        ceiling=1.0,
        method="",
        seed=config.seed,
    )
    value = limits(rule, start)[0]
    ci = None if value is None else (value, value)
    if not enough:
        value = None
    elif rule.slice != WORST and rule.estimate in ("copies", "copied_patients"):
        # of a subgroup they are counted in tens
        trained_on = n_train if rule.slice is None else tens(n_train)
        n = trained_on if rule.estimate == "copied_patients" else sample_count(config)
        value, ci = 0.0, clopper_pearson(0, n)
    elif rule.estimate == "region_volume_smd" and rule.slice is None:
        # where there is no difference the interval of one region reaches so far
        far = Z95 * math.sqrt(1 / max(1, n_holdout) + 1 / sample_count(config))
        value, ci = 0.0, (0.0, far)
    elif rule.estimate == "authenticity_excess" and held_out < FEWEST_OTHERS:
        value = None
    elif rule.slice == WORST:
        parts = [(n, round(config.data.holdout * n)) for n in counts.values()]
        # all are judged, and each has to pass; samples have the labels of the patients
        held_out = min((h for _, h in parts), default=0)
        share = sample_count(config) / (n_train + n_holdout)
        sizes = [min(h, n - h, round(share * n)) for n, h in parts]
        value = value if min(sizes, default=0) >= FEWEST else None
    elif rule.slice is None and rule.estimate.startswith("auc_") and counts:
        # a category with fewer has no utility that could be judged
        categories = [
            round(config.data.holdout * counts[part])
            for part, (name, _) in config.data.subgroups.items()
            if config.data.conditions[name].kind == "categorical"
        ]
        value = value if min(categories, default=FEWEST) >= FEWEST else None
    return start.model_copy(update={"value": value, "ci": ci, "n_holdout": held_out})


def cost(config: Config, n_train: int, n_holdout: int, n_scans: int, device: str) -> dict[str, Any]:
    """Time and peak memory of training and sampling, from a trial on noise."""
    asked = config.train.batch_patients  # what a phase draws that reads nobody
    batch = min(asked, n_train)
    n_trial = min(n_train, max(2 * batch, WATCHED))
    loader = noise_loader(config, n_trial, asked)
    train_scans = round(n_scans * n_train / (n_train + n_holdout))
    how = memory.fitting(config, loader, device, train_scans, n_holdout)
    threads = torch.get_num_threads()
    held_out = min(n_holdout, WATCHED)
    measured = measure(config, Request(n_trial, held_out, asked, *how, 6, True, device, threads))
    seconds, steps = measured.seconds_per_step, measured.steps
    n_watched = 2 * min(WATCHED, n_train, n_holdout) if config.train.watch else 0
    looks = [len(look_steps(n, batch, n_watched)) if n_watched else 0 for n in steps]
    a_look = FORWARD * n_watched / batch  # in steps
    training = sum((n + k * a_look) * s for n, k, s in zip(steps, looks, seconds, strict=True))
    training += measured.build_seconds + measured.examine_seconds
    training += measured.finish_seconds * min(train_scans, measured.finish_scans or math.inf)
    # the trial's cohort is small: what a fit holds of the whole one comes on top of the model
    fitting = measured.built_bytes + measured.finish_bytes * train_scans
    count = sample_count(config)
    further = math.ceil(count / CANONICAL_BATCH) - 1
    voxels = int(np.prod(config.data.grid)) * len(loader.dataset.channels)
    return {
        "device": device,
        "n_parameters": measured.n_parameters,
        "n_trained": measured.n_trained,
        "steps": sum(steps),
        "steps_by_round": list(steps),
        **how._asdict(),
        "seconds_per_step": [round(s, 4) for s in seconds],
        "train_seconds": round(training, 1),
        "sample_seconds": round(measured.first_batch_seconds + further * measured.batch_seconds, 1),
        "memory_gib": round(max(measured.peak_bytes, fitting) / 2**30, 2),
        "disk_gib": round(voxels * 2 * (n_scans * 2 + count * 2) / 2**30, 3),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The plan as a few lines for a person."""
    reasons = dict(facts["reasons"])
    other = reasons.pop("not_requested", 0)  # label maps and the like: not a fault of theirs
    refused = listed(reasons)
    lines = [
        f"patients   {facts['n_patients']} ({facts['n_scans']} scans); "
        f"{facts['n_train']} to train on, {facts['n_holdout']} held out",
        f"refused    {sum(reasons.values())}"
        + (f" ({refused})" if refused else "")
        + (f"; {other} files not asked for" if other else ""),
        f"voxels     {_range(facts['shape'])}",
        f"size mm    {_range(facts['spacing_mm'])}",
    ]
    for name, values in facts["labels"].items():
        lines.append(f"label      {name}: " + ", ".join(f"{k} {v:g}" for k, v in values.items()))
    lines += [
        f"model      {parameters(facts)} on {facts['device']}",
        f"training   {facts['steps']} steps, about {clock(facts['train_seconds'])}",
        f"sampling   about {clock(facts['sample_seconds'])}",
        f"memory     {facts['memory_gib']:.1f} GiB at the highest, in training and sampling",
        f"disk       {facts['disk_gib']:.2f} GiB",
    ]
    if "privacy" in facts:
        from synthmed.privacy import outlook

        lines.append(outlook.describe(facts["privacy"]))
    if facts["cannot_pass"]:
        lines.append(
            f"note       with {facts['n_train']} patients to train on, {facts['n_holdout']} held "
            f"out (of {MIN_HOLDOUT} needed, in a subgroup that is judged too) and "
            f"{facts['n_samples']} samples these lines stay inconclusive: "
            f"{', '.join(facts['cannot_pass'])}; expect REVIEW at best"
        )
    return "\n".join(lines)


def _range(values: Mapping[str, Sequence[float]]) -> str:
    def show(row: Sequence[float]) -> str:
        return "x".join(f"{v:g}" for v in row)

    if values["min"] == values["max"]:
        return show(values["min"])
    return f"{show(values['min'])} to {show(values['max'])}, median {show(values['median'])}"
