"""False alarms of the copies test: honest samplers, many cohorts.

`python -m tests.proofs.screen_sampler 300` prints the alarms of each sampler; at most 6 in 300
are allowed (2 %, of a nominal 1 %).
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.copies import GapTest, ImageTest
from synthmed.metrics.sides import Cases
from synthmed.metrics.similarity import DescriptorSimilarity
from tests.metrics.cohorts import GRID, Grid, cases, made

N_TRAIN, N_HOLDOUT, N_SAMPLES = 30, 20, 16
FDR, ALLOWED = 0.01, 0.02
FINE: Grid = (40, 44, 40)
"""Which the views average, and on which they look closer (`ImageSimilarity.closer`)."""


def samplers(rng: np.random.Generator, train: Cases, grid: Grid) -> dict[str, Cases]:
    """What a generator that copied nobody may produce."""
    volumes = train.volumes.astype(np.float32)
    mean = volumes.mean(axis=0)
    noise = rng.standard_normal((N_SAMPLES, 1, *grid))
    # a scan a patient: who is in an average twice has twice the weight
    _, first = np.unique(train.patients, return_index=True)
    groups = [rng.permutation(first)[:10] for _ in range(N_SAMPLES)]
    averages = np.stack([volumes[g].mean(axis=0) for g in groups])
    return {
        "held-out people": cases(rng, N_SAMPLES, "s", grid=grid),
        "mean and noise": made(mean + 0.02 * noise),
        "averages of ten": made(averages),
        "averages, moved": made(np.roll(averages, (1, -2, 1), (2, 3, 4))),
        "mean image": made(np.repeat(mean[None], N_SAMPLES, axis=0)),
    }


FIRST_SEED = 1000
"""Seeds below this one were seen while the test was made: they prove nothing."""


def alarms(seed: int, grid: Grid = GRID) -> dict[str, bool]:
    """Whether anything at all is flagged in one fresh cohort, per sampler and similarity."""
    rng = Key.root(seed).fold("proof", "screen_sampler").numpy()
    train = cases(rng, N_TRAIN, "t", twice=5, grid=grid)
    holdout = cases(rng, N_HOLDOUT, "h", twice=4, grid=grid)
    key = Key.root(seed)
    tests = {
        "image": ImageTest(train, holdout, (0,), key),
        "descriptor": GapTest(train, holdout, DescriptorSimilarity((0,)), key),
    }
    return {
        f"{name}, {kind}": bool(test.find(samples, FDR).flagged)
        for name, samples in samplers(rng, train, grid).items()
        for kind, test in tests.items()
    }


def run(n: int, first: int = FIRST_SEED, grid: Grid = GRID) -> dict[str, int]:
    """In how many of n fresh cohorts there is an alarm, per sampler and similarity."""
    # one process a core, each with one thread: fresh processes, so that the setting holds
    one = patch.dict(os.environ, OMP_NUM_THREADS="1")
    with one, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        each = list(pool.map(alarms, range(first, first + n), [grid] * n))
    return {label: sum(seen[label] for seen in each) for label in each[0]}


if __name__ == "__main__":
    cohorts = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    table = run(cohorts)
    for sampler, count in table.items():
        print(f"{sampler}: {count} alarms in {cohorts}")
    sys.exit(any(count > ALLOWED * cohorts for count in table.values()))
