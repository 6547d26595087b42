"""Whether intervals cover and p-values are uniform, in docs/benchmarks.md.

    SYNTHMED_REAL_DATA=... python tests/benchmarks/calibration.py

Real scans against real scans, split anew each time, for p-values; Gaussians, whose distance is
known in closed form, for intervals, and for what the policy's line on authenticity says of people
nobody learned from and of cohorts that hold near-copies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import stats as reference
from scipy.spatial.distance import cdist

from synthmed.config import Policy
from synthmed.metrics import (
    KID,
    MMD,
    PRDC,
    Authenticity,
    DiscriminatorAUC,
    Frechet,
    Metric,
    Vendi,
    kernels,
    stats,
)
from synthmed.metrics.descriptor import RESOLUTION
from synthmed.policy import judge
from synthmed.types import Estimate
from tests.benchmarks.cohorts import publish, real_data
from tests.benchmarks.faults import PAGE, hippocampus, phantoms, tabled
from tests.metrics.cohorts import Points

BEGIN, END = "<!-- calibration:begin -->", "<!-- calibration:end -->"
SPLITS = 1000
PERMUTATIONS = 199
POSED = 200
STUDIES, FEWER = 400, 200
"""Of most estimates, and of the one that is slow."""
STUDY = (80, 50, 60)
"""People trained on, held out, and samples of a study."""
RESAMPLES = 200
MEASURED = (MMD(), KID(), PRDC(), Frechet(), Vendi(), Authenticity())
SLOW = (DiscriminatorAUC(),)
SETTINGS = {
    "as people are": (1.0, 0.0),
    "shifted by 0.4": (1.0, 0.4),
    "narrower by 0.3": (0.7, 0.0),
}
"""What samples are like, in standard deviations of every number: width and shift."""
NUMBERS = 5
"""Of the Gaussians; gamma is 0.1."""
BELOW = "value below 0.9 of the floor"
GAMMA = 0.1

Values = npt.NDArray[np.float64]


def p_values(descriptors: Values, seed: int) -> Values:
    """(SPLITS,) permutation p of mmd2 between two random halves of the people."""
    rng = np.random.default_rng(seed)
    scale = np.maximum(descriptors.std(axis=0), RESOLUTION)
    distance = cdist(descriptors / scale, descriptors / scale)
    n = len(descriptors)
    gamma = 1 / (2 * np.median(distance[np.triu_indices(n, 1)]) ** 2)
    kernel = np.exp(-gamma * distance**2)
    out = []
    for _ in range(SPLITS):
        order = rng.permutation(n)
        a, b = order[: n // 2], order[n // 2 :]
        parts = kernel[np.ix_(a, a)], kernel[np.ix_(b, b)], kernel[np.ix_(a, b)]
        null = kernels.permuted_mmd2(*parts, PERMUTATIONS, rng)
        out.append(stats.permutation_p(kernels.mmd2(*parts), null))
    return np.array(out)


def covered(shift: float, seed: int) -> tuple[float, float]:
    """Share of intervals of mmd2 and of mmd2_excess that hold the truth.

    E k(x, y) of N(0, I) and N(shift, I) is (1 + 4 g)^(-d/2) exp(-g |shift|^2 / (1 + 4 g)).
    """
    rng = np.random.default_rng(seed)
    g, d = GAMMA, NUMBERS
    truth = 2 * (1 + 4 * g) ** (-d / 2) * (1 - np.exp(-g * d * shift**2 / (1 + 4 * g)))
    hits = np.zeros(2)
    for _ in range(SPLITS):
        s = rng.standard_normal((60, d)) + shift
        t, h = rng.standard_normal((80, d)), rng.standard_normal((50, d))
        ss, hh, sh, tt, th = (
            np.exp(-g * cdist(a, b) ** 2) for a, b in ((s, s), (h, h), (s, h), (t, t), (t, h))
        )
        value, floor = kernels.mmd2(ss, hh, sh), kernels.mmd2(tt, hh, th)
        own = [
            kernels.without_each(ss) - 2 * kernels.cross_without_each(sh, 0),
            kernels.without_each(hh) - 2 * kernels.cross_without_each(sh, 1),
        ]
        paired = [
            own[0],
            kernels.without_each(tt) - 2 * kernels.cross_without_each(th, 0),
            -2 * kernels.cross_without_each(sh, 1) + 2 * kernels.cross_without_each(th, 1),
        ]
        null = kernels.permuted_mmd2(ss, hh, sh, PERMUTATIONS, rng).std()
        intervals = (
            stats.distance_interval(value, stats.jackknife_se(own), float(null)),
            stats.normal_interval(value - floor, stats.jackknife_se(paired)),
        )
        hits += [low <= truth <= high for low, high in intervals]
    return float(hits[0] / SPLITS), float(hits[1] / SPLITS)


def people(n: int, rng: np.random.Generator) -> Values:
    """(n, 12), some numbers wider than others and some people farther out than others."""
    wide = np.linspace(0.3, 4, 12)
    return rng.standard_normal((n, 12)) * wide * np.exp(0.4 * rng.standard_normal((n, 1)))


def posing(n_train: int, n_holdout: int, n: int, copies: float, seed: int) -> Points:
    """Samples that are other people, a share of them a tenth of the way off a training patient."""
    rng = np.random.default_rng(seed)
    train, holdout, made = (people(k, rng) for k in (n_train, n_holdout, n))
    k = round(copies * n)
    made[:k] = train[rng.integers(0, n_train, k)] + 0.1 * people(k, rng)
    return Points(seed, train=train, holdout=holdout, synthetic=made)


def held(
    widths: float, apart: float, times: int, measured: Sequence[Metric] = MEASURED
) -> dict[str, float]:
    """Share of intervals that hold what the figure is on average, over studies done anew.

    The people trained on are the same in all: a cohort has those of one study, and the widths of
    kernels are theirs.

    Args:
        widths: of the samples' distribution, as a share of the people's.
        apart: by how much of a standard deviation each number of a sample is shifted.
        times: studies, each with others held out and other samples.
        measured: what is asked.
    """
    found: dict[str, list[Estimate]] = {}
    train = np.random.default_rng(0).standard_normal((STUDY[0], NUMBERS))
    for seed in range(1, times + 1):
        rng = np.random.default_rng(seed)
        holdout, made = (rng.standard_normal((n, NUMBERS)) for n in STUDY[1:])
        study = Points(
            seed, RESAMPLES, train=train, holdout=holdout, synthetic=widths * made + apart,
            blurred=0.7 * holdout,
        )  # fmt: skip
        for metric in measured:
            for e in metric.estimate(study.sides, study):
                found.setdefault(e.name, []).append(e)
    return {name: _holding(of) for name, of in found.items()}


def _holding(estimates: Sequence[Estimate]) -> float:
    """Share of the intervals that hold the mean of the values."""
    truth = np.mean([e.value for e in estimates])
    return float(np.mean([e.ci is not None and e.ci[0] <= truth <= e.ci[1] for e in estimates]))


def judged(sizes: tuple[int, int, int], copies: float, times: int) -> dict[str, float]:
    """How often the starting policy's line on authenticity says what, and how often the value of
    authenticity is below 0.9 of its floor."""
    (line,) = [r for r in Policy().rules if r.estimate == "authenticity_excess"]
    said = dict.fromkeys(("pass", "inconclusive", "fail", BELOW), 0.0)
    for seed in range(times):
        points = posing(*sizes, copies, seed)
        share, excess = Authenticity().estimate(points.sides, points)
        said[judge(line, excess, sizes[1]).status] += 1 / times
        if share.value is not None and share.floor is not None:
            said[BELOW] += (share.value < 0.9 * share.floor) / times
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and put them into the page."""
    parser = argparse.ArgumentParser(description="Whether intervals cover, and p is uniform.")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    root = real_data()
    lines = [
        "| real against real | people | p below 0.05 | below 0.1 | below 0.5 | uniform, KS p |",
        "|---|---|---|---|---|---|",
    ]
    for name, cohort in (("phantoms", phantoms()), ("hippocampus", hippocampus(root))):
        p = p_values(tabled(*cohort[:3])["descriptor"], 0)
        below = [f"{100 * np.mean(p <= limit):.1f} %" for limit in (0.05, 0.1, 0.5)]
        # p takes multiples of 1 / 200: a grain of noise makes it continuous
        smooth = p - np.random.default_rng(1).random(len(p)) / (PERMUTATIONS + 1)
        fit = reference.kstest(smooth, "uniform").pvalue
        lines.append(f"| {name} | {len(cohort[0])} | {' | '.join(below)} | {fit:.2f} |")
    lines += [
        "",
        "| Gaussians, shift a number | `mmd2` covered | `mmd2_excess` covered |",
        "|---|---|---|",
    ]
    for shift in (0.0, 0.2, 0.4, 0.8):
        both = [f"{100 * c:.1f} %" for c in covered(shift, round(10 * shift))]
        lines.append(f"| {shift:g} standard deviations | {' | '.join(both)} |")
    lines += ["", f"| estimate, interval covered | {' | '.join(SETTINGS)} |", "|---|---|---|---|"]
    of = [held(*setting, STUDIES) | held(*setting, FEWER, SLOW) for setting in SETTINGS.values()]
    lines += [f"| `{n}` | {' | '.join(f'{100 * o[n]:.1f} %' for o in of)} |" for n in of[0]]
    lines += [
        "",
        "| Gaussians: trained on, held out, samples | near-copies among them | line on "
        f"authenticity: pass | inconclusive | fail | {BELOW} |",
        "|---|---|---|---|---|---|",
    ]
    for sizes in ((15, 6, 20), (24, 13, 50), (60, 30, 100), (100, 60, 200), (300, 300, 300)):
        for copies in (0.0, 0.1, 0.3, 0.6):
            shares = [f"{100 * share:.0f} %" for share in judged(sizes, copies, POSED).values()]
            who = " + ".join(str(k) for k in sizes)
            lines.append(f"| {who} | {100 * copies:.0f} % | {' | '.join(shares)} |")
    who = " + ".join(str(k) for k in STUDY)
    times = (
        f"{SPLITS} times each, every estimate in {STUDIES} studies of {who} (trained on, held out, "
        f"samples; `discriminator_auc` in {FEWER}), the line on authenticity {POSED}"
    )
    text = f"`python tests/benchmarks/calibration.py`, {times}:\n\n" + "\n".join(lines)
    publish(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
