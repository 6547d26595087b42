"""What the decision says of cohorts whose making is known: people posing as synthetic, and a
diffusion model that has learned twenty people by heart.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "sample_data"))

OVERFIT = """\
data:
  source: {source}
  patient: participant_id
  modality: T1w
  conditions:
    diagnosis: {{kind: categorical, categories: [control, atrophy]}}
  grid: [32, 32, 32]
  spacing_mm: [6, 6, 6]
  holdout: 0.67
backbone: {{name: ddpm}}
privacy: null
train: {{max_steps: {steps}, batch_patients: 8, watch: false}}
sample: {{count: 60}}
evaluate: {{resamples: 100}}
"""
"""Sixty people, of whom twenty are trained on."""


@dataclass(frozen=True)
class Judged:
    """A decision, and the lines of the policy that failed."""

    decision: str
    failed: tuple[str, ...]
    n_train: int
    n_holdout: int

    @classmethod
    def of(cls, out: Path) -> Judged:
        report = json.loads((out / "private/report/report.json").read_text(encoding="utf-8"))
        failed = [v["estimate"] for v in report["policy"] if v["status"] == "fail"]
        cohort = report["cohort"]
        return cls(report["decision"], tuple(failed), cohort["n_train"], cohort["n_holdout"])


def called(folder: Path, *words: str | Path) -> None:
    """`synthmed` with a home of its own; 0 and 4 are decisions, anything else is an error."""
    environment = {**os.environ, "SYNTHMED_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "synthmed.cli", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 4):
        raise RuntimeError(f"synthmed {words[0]} ended with {done.returncode}: {done.stderr}")


def phantoms(folder: Path, patients: int, seed: int) -> Path:
    """A cohort of made-up heads; other seeds are other people.

    None of its files is broken: what cannot be read leaves every decision to a person.
    """
    from phantoms import Spec, make_cohort  # of sample_data

    out = folder / f"phantoms-{seed}"
    make_cohort(out, Spec("bids", patients, grid=32, seed=seed, broken=0))
    return out


def posing(folder: Path, seed: int, n_train: int, n_holdout: int, n_posing: int) -> Judged:
    """Made-up people whom nobody trained on, handed in as a synthetic cohort."""
    sides = [
        phantoms(folder, n, 100 * seed + k)
        for k, n in enumerate((n_train, n_holdout, n_posing), start=1)
    ]
    return assessed(folder, sides, folder / f"posing-{seed}")


def assessed(folder: Path, sides: Sequence[Path], out: Path, *options: str) -> Judged:
    """The decision on train, holdout and cohort, made once: a proof that was stopped goes on."""
    if not (out / "private/report/report.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        train, holdout, cohort = sides
        also = ("--holdout", holdout, "--out", out, "--quiet", *options)
        called(folder, "assess", train, cohort, *also)
    return Judged.of(out)


REAL = {"hippocampus": "subject_group", "acdc": "participant_id", "brain3mm": "subject_group"}
"""Open cohorts and the column that names one person."""


def real_posing(data: Path, cohort: str, folder: Path, seed: int) -> Judged:
    """A third of the people of a real cohort as train, as holdout and as synthetic cohort."""
    column = REAL[cohort]
    table = pd.read_csv(data / cohort / "participants.tsv", sep="\t", dtype=str)
    people = np.array(sorted(set(table[column])))
    which = np.random.default_rng(seed).permutation(len(people)) % 3
    sides = []
    for k, name in enumerate(("train", "holdout", "posing")):
        side = folder / f"{cohort}-{seed}-{name}"
        shutil.rmtree(side, ignore_errors=True)
        some = table[table[column].isin(people[which == k])]
        for image in some["image"]:
            (side / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / cohort / image, side / image)
        some.to_csv(side / "participants.tsv", sep="\t", index=False)
        sides.append(side)
    return assessed(folder, sides, folder / f"{cohort}-{seed}-out", "--patient", column)


def overfit(folder: Path, steps: int) -> Judged:
    """A diffusion model trained on twenty people far beyond what they can teach."""
    config = folder / "overfit.yaml"
    source = phantoms(folder, 60, 901)
    config.write_text(OVERFIT.format(source=source, steps=steps), encoding="utf-8")
    run = folder / "overfit"
    called(folder, "generate", config, "--run", run, "--device", "cpu", "--quiet")
    return Judged.of(run)


def said(found: Sequence[Judged]) -> str:
    """How many of each decision, and what failed."""
    counts = {d: sum(j.decision == d for j in found) for d in ("RELEASE", "REVIEW", "WITHHELD")}
    text = ", ".join(f"{d} {n}" for d, n in counts.items() if n)
    failed = sorted({name for j in found for name in j.failed})
    return text + (f" (failed: {', '.join(failed)})" if failed else "")
