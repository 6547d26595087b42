"""What a config will meet and cost, measured before training: data, memory, time, what can pass."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthmed.artifacts import Catalogue, Dataset, Scan
from synthmed.conditions import Conditions
from synthmed.config import Config
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.policy import MIN_HOLDOUT
from synthmed.progress import Progress, clock
from synthmed.stages import train
from synthmed.stages.ingest import ingest
from synthmed.stages.prepare import channels_of, grid_affine
from synthmed.stages.sample import sample_count


def fingerprint(config: Config, device: str, quiet: bool) -> dict[str, Any]:
    """Read the source, try a few steps on noise of the right shape, and extrapolate.

    Nothing is kept: what is read goes to a temporary folder that only this user can open. The
    figures describe real patients and are for the person who plans the run.

    Returns:
        patients, scans and refusals; shapes and voxel sizes; labels; seconds a step and a sample;
        peak memory; and which policy lines cannot pass with this holdout.
    """
    with tempfile.TemporaryDirectory(prefix="synthmed-plan-") as folder:
        facts = ingest(config, Path(folder), progress=Progress("ingest", quiet).update)
        scans = Catalogue.open(Path(folder)).scans
    n_patients = len({s.patient for s in scans})
    n_holdout = round(config.data.holdout * n_patients)
    out: dict[str, Any] = {
        "n_patients": n_patients,
        "n_scans": len(scans),
        "n_quarantined": facts["n_quarantined"],
        "reasons": facts["reasons"],
        "shape": spread([s.shape for s in scans]),
        "spacing_mm": spread([s.spacing_mm for s in scans]),
        "labels": label_counts(config, scans),
        "n_train": n_patients - n_holdout,
        "n_holdout": n_holdout,
        "cannot_pass": cannot_pass(config, n_holdout),
    }
    return out | cost(config, out["n_train"], len(scans), device)


def spread(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Smallest, median and largest value along X, Y, Z."""
    table = np.array(rows, float)
    return {
        name: [round(float(v), 3) for v in f(table, axis=0)]
        for name, f in (("min", np.min), ("median", np.median), ("max", np.max))
    }


def label_counts(config: Config, scans: Sequence[Scan]) -> dict[str, Any]:
    """Patients a category, and the range of every number, among first scans."""
    first = {s.patient: s for s in reversed(scans)}.values()
    out: dict[str, Any] = {}
    for name, condition in config.data.conditions.items():
        values = [s.labels[name] for s in first]
        if condition.kind == "categorical":
            counts = Counter(str(v) for v in values)
            out[name] = {c: counts.get(c, 0) for c in condition.categories}
        else:
            numbers = [float(v) for v in values]
            out[name] = {"min": min(numbers), "max": max(numbers)}
    return out


def cannot_pass(config: Config, n_holdout: int) -> list[str]:
    """Policy lines that are inconclusive whatever is generated, because the holdout is small."""
    if n_holdout >= MIN_HOLDOUT:
        return []
    fidelity = {m.name for m in config.evaluate.metrics} - {"copies", "authenticity", "membership"}
    spoken = {"mmd2_excess": "mmd2", "precision": "prdc", "recall": "prdc", "density": "prdc"}
    spoken["coverage"] = "prdc"
    return sorted(
        {r.estimate for r in config.policy.rules if spoken.get(r.estimate, r.estimate) in fidelity}
    )


def cost(config: Config, n_train: int, n_scans: int, device: str) -> dict[str, Any]:
    """Time and peak memory of training and sampling, from a few steps on noise."""
    loader = Loader(
        _noise(config, min(n_train, 2 * config.train.batch_patients)),
        Conditions(config.data.conditions),
        config.train.batch_patients,
        config.train.augment,
    )
    key = Key.root(config.seed).fold("plan")
    model = train.build(config, loader, key, device)
    seconds = train.seconds_per_step(config, model, loader, key, device)
    if config.train.max_minutes is None:
        steps = config.train.max_steps or 0
    else:
        longest = 60 * config.train.max_minutes / max(seconds)
        steps = int(min(longest, config.train.max_steps or longest))
    batch = train.CANONICAL_BATCH
    conditions = torch.from_numpy(loader.encoded[:1]).repeat(batch, 1).to(device)
    given = torch.zeros(batch, loader.spec.given, *loader.spec.grid, device=device)
    model.sample(conditions, torch.arange(batch), given)
    started = time.monotonic()
    model.sample(conditions, torch.arange(batch), given)
    a_sample = (time.monotonic() - started) / batch
    count = sample_count(config)
    voxels = int(np.prod(config.data.grid)) * len(loader.dataset.channels)
    return {
        "device": device,
        "n_parameters": sum(p.numel() for m in model.modules.values() for p in m.parameters()),
        "steps": steps,
        "seconds_per_step": [round(s, 4) for s in seconds],
        "train_seconds": round(steps * float(np.mean(seconds)), 1),
        "sample_seconds": round(count * a_sample, 1),
        "memory_gib": round(peak_memory(device) / 2**30, 2),
        "disk_gib": round(voxels * 2 * (n_scans * 2 + count * 2) / 2**30, 3),
    }


def peak_memory(device: str) -> int:
    """Bytes at the highest, of the device for CUDA and of the process otherwise."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(facts: Mapping[str, Any]) -> str:
    """The plan as a few lines for a person."""
    reasons = dict(facts["reasons"])
    other = reasons.pop("not_requested", 0)  # label maps and the like: not a fault of theirs
    refused = ", ".join(f"{n} {code}" for code, n in reasons.items())
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
        f"model      {facts['n_parameters'] / 1e6:.1f} M parameters on {facts['device']}",
        f"training   {facts['steps']} steps, about {clock(facts['train_seconds'])}",
        f"sampling   about {clock(facts['sample_seconds'])}",
        f"memory     {facts['memory_gib']:.1f} GiB at the highest",
        f"disk       {facts['disk_gib']:.2f} GiB",
    ]
    if facts["cannot_pass"]:
        lines.append(
            f"note       with {facts['n_holdout']} held-out patients (of {MIN_HOLDOUT} needed) "
            f"these lines stay inconclusive: {', '.join(facts['cannot_pass'])}; "
            "expect REVIEW at best"
        )
    return "\n".join(lines)


def _range(values: Mapping[str, Sequence[float]]) -> str:
    def show(row: Sequence[float]) -> str:
        return "x".join(f"{v:g}" for v in row)

    if values["min"] == values["max"]:
        return show(values["min"])
    return f"{show(values['min'])} to {show(values['max'])}, median {show(values['median'])}"


def _noise(config: Config, n: int) -> Dataset:
    """Patients of pure noise on the config's grid: a step costs the same on them."""
    conditions = Conditions(config.data.conditions)
    channels = channels_of(config.data)
    key = Key.root(config.seed).fold("noise")
    shape = (n, len(channels), *config.data.grid)
    return Dataset(
        volumes=key.numpy().random(shape, np.float32).astype(np.float16),
        patients=np.array([f"noise{i:06d}" for i in range(n)]),
        labels=[conditions.draw(key.fold(i)) for i in range(n)],
        holdout=np.zeros(n, bool),
        channels=channels,
        affine=grid_affine(config.data.grid, config.data.spacing_mm or (1.0, 1.0, 1.0)),
    )
