"""Does a private training leak no more than it claims? What its records show, and what canaries do.

The records of the run itself are checked against the mechanism that it claims. Canaries never touch
the cohort: the same mechanism (rate, steps, noise, clip, network) is run on made-up patients of
whom some are canaries, each a gradient of norm C in one parameter, the most that anybody can add
and the easiest to see. An attacker who watches every update guesses which canaries took part, and
the share of right guesses bounds epsilon from below (Steinke, Nasr and Jagielski 2023,
arXiv:2305.08846). And a small network is trained many times in each of two worlds, with one person
and without: how well its weights tell the two apart bounds epsilon as well (Jagielski, Ullman and
Oprea 2020, arXiv:2006.07709).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import beta, binom, chi2, norm
from torch import Tensor, nn
from torch.func import functional_call

from synthmed.keys import Key
from synthmed.privacy.noise import SecretStream
from synthmed.privacy.patient_step import Mechanism, PatientStep, allowed_off

LEVEL = 0.05
"""Chance with which a lower bound may exceed the truth."""
ALARM = 1e-4
"""p-value of a record below which a mechanism is not the one it claims to be."""

Gradients = Callable[[int], tuple[Sequence[Tensor], Tensor] | None]
"""Gradients and losses of the made-up patients of a step; None where nobody is drawn."""


# --- the records of a run -------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One look at the records.

    Args:
        name: what was looked at.
        found: the figure.
        claimed: what it should be.
        p: how likely a figure at least as far off is, if the claim is true; 0 or 1 where certain.
        passed: whether the claim stands.
    """

    name: str
    found: float
    claimed: float
    p: float
    passed: bool


def records(
    lines: Sequence[Mapping[str, float]],
    phase: str,
    mechanism: Mechanism,
    n_patients: int,
    n_parameters: int,
    n_charged: int,
) -> list[Check]:
    """Compare the private log of a phase with the mechanism that was paid for.

    Args:
        lines: of the log, one a step.
        phase: its name.
        mechanism: as claimed.
        n_patients: who may be drawn.
        n_parameters: that get noise.
        n_charged: steps in the ledger.
    """
    mine = [line for line in lines if f"{phase}.noise" in line]
    n = len(mine)
    square = sum(line[f"{phase}.noise"] for line in mine) * n_parameters
    low = float(chi2.cdf(square, n * n_parameters))
    drawn = int(sum(line[f"{phase}.patients"] for line in mine))
    fewer = float(binom.cdf(drawn, n * n_patients, mechanism.sample_rate))
    more = float(binom.sf(drawn - 1, n * n_patients, mechanism.sample_rate))
    largest = max((line[f"{phase}.largest"] for line in mine), default=0.0)
    off = max((line[f"{phase}.off"] for line in mine), default=0.0)
    exact = all(
        line[f"{phase}.off"] <= allowed_off(int(line[f"{phase}.patients"])) for line in mine
    )
    p_noise, p_drawn = 2 * min(low, 1 - low), min(1.0, 2 * min(fewer, more))
    bounded, paid = largest <= mechanism.clip * (1 + 1e-5), n_charged >= n
    return [
        Check("noise variance", square / max(1, n * n_parameters), 1.0, p_noise, p_noise > ALARM),
        Check("largest contribution", largest, mechanism.clip, float(bounded), bounded),
        Check("sum of contributions, off by", off, 0.0, float(exact), exact),
        Check(
            "inclusion rate",
            drawn / max(1, n * n_patients),
            mechanism.sample_rate,
            p_drawn,
            p_drawn > ALARM,
        ),
        Check("steps charged", n_charged, n, float(paid), paid),
    ]


# --- canaries -------------------------------------------------------------------------------------


def lower_bound(n_canaries: int, n_guesses: int, n_right: int, delta: float) -> float:
    """Epsilon that is exceeded with confidence 1 - `LEVEL`, given so many right guesses.

    Under (epsilon, delta) the number of right guesses is, but for delta, no larger than a binomial
    with success e^epsilon / (1 + e^epsilon): theorem 5.2 of the paper, delta entering as in its
    appendix D. 0 where guessing at random would do as well.
    """

    def p_value(eps: float) -> float:
        success = 1 / (1 + math.exp(-eps))
        tail = float(binom.sf(n_right - 1, n_guesses, success))
        below = np.cumsum(binom.pmf(np.arange(n_right - 1, -1, -1), n_guesses, success))
        slope = float((below / np.arange(1, n_right + 1)).max()) if n_right else 0.0
        return min(1.0, tail + 2 * n_canaries * delta * slope)

    if p_value(0.0) >= LEVEL:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(high) < LEVEL:
        low, high = high, 2 * high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) < LEVEL else (low, middle)
    return low


def guesses(n_canaries: int, mechanism: Mechanism, n_steps: int, delta: float) -> int:
    """How many canaries to guess, fixed beforehand from public constants: those that should bound
    epsilon best if scores were exactly Gaussian."""
    apart = _apart(mechanism, n_steps)
    best, chosen = -1.0, 2
    some = np.unique(np.geomspace(4, n_canaries, 40).astype(int) // 2 * 2)
    for n in map(int, some):
        # half are guessed in, from the top; the rest out, from the bottom: alike by symmetry
        share = n / 2 / n_canaries
        at = float(_mixture_quantile(1 - share, apart))
        inside = float(norm.sf(at - apart)) / 2 / share
        expected = lower_bound(n_canaries, n, int(n * min(inside, 1.0)), delta)
        if expected > best:
            best, chosen = expected, n
    return chosen


def _apart(mechanism: Mechanism, n_steps: int) -> float:
    """What a contribution of norm C moves their sum by in all steps, in deviations of that sum."""
    q, sigma = mechanism.sample_rate, mechanism.noise_multiplier
    return q * n_steps / math.sqrt(n_steps * (sigma**2 + q * (1 - q)))


def _mixture_quantile(p: float, apart: float) -> float:
    """Of a half-and-half mixture of N(0, 1) and N(apart, 1)."""
    low, high = -10.0, apart + 10.0
    for _ in range(60):
        middle = (low + high) / 2
        if (norm.cdf(middle) + norm.cdf(middle - apart)) / 2 < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class _Watching(torch.optim.SGD):
    """Plain descent that adds up what the canaries' parameters were told."""

    def __init__(self, params: Sequence[torch.nn.Parameter], rate: float, at: Tensor) -> None:
        super().__init__(params, lr=rate)
        self.at = at
        self.seen = torch.zeros(len(at), dtype=torch.float64)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        flat = torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]])
        self.seen += flat[self.at].double().cpu()
        super().step(closure)


def canaries(
    params: Sequence[torch.nn.Parameter],
    mechanism: Mechanism,
    n_steps: int,
    n_canaries: int,
    delta: float,
    key: Key,
    patients: Gradients = lambda step: None,
) -> dict[str, float]:
    """Run the mechanism with canaries in it, and guess who took part.

    Args:
        params: of the network; moved a little as in training.
        mechanism: of the run.
        n_steps: T.
        n_canaries: m; each takes part with probability one half.
        delta: of the claim.
        key: all that it depends on.
        patients: gradients of made-up patients, for company.

    Returns:
        `epsilon_lower_bound` at confidence 0.95; `best_possible` if every guess were right; and the
        counts behind them.
    """
    rng = key.fold("canaries").numpy()
    size = sum(p.numel() for p in params)
    if n_canaries > size:
        raise ValueError(f"{n_canaries} canaries need as many parameters; there are {size}")
    at = torch.from_numpy(rng.permutation(size)[:n_canaries])
    taken = rng.random(n_canaries) < 0.5
    watching = _Watching(params, 1e-3, at)
    step = PatientStep(watching, mechanism)
    shapes = [p.shape for p in params]
    ends = np.cumsum([p.numel() for p in params])[:-1].tolist()

    def shown(number: int) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
        company = patients(number)
        if company is not None:
            yield company
        drawn = np.flatnonzero(taken & (rng.random(n_canaries) < mechanism.sample_rate))
        for some in np.array_split(drawn, max(1, math.ceil(len(drawn) / 16))):
            if len(some):
                flat = torch.zeros(len(some), size)
                flat[torch.arange(len(some)), at[some]] = mechanism.clip
                parts = torch.tensor_split(flat, ends, dim=1)
                each = [g.reshape(-1, *s) for g, s in zip(parts, shapes, strict=True)]
                yield each, torch.zeros(len(some))

    for number in range(n_steps):
        step.take(shown(number), SecretStream(key.fold("noise", number).digest))
    n = guesses(n_canaries, mechanism, n_steps, delta)
    order = np.argsort(watching.seen.numpy())
    right = int(taken[order[-(n // 2) :]].sum() + (~taken[order[: n // 2]]).sum())
    return {
        "epsilon_lower_bound": lower_bound(n_canaries, n, right, delta),
        "best_possible": lower_bound(n_canaries, n, n, delta),
        "n_canaries": n_canaries,
        "n_guesses": n,
        "n_right": right,
    }


# --- two worlds -----------------------------------------------------------------------------------

WIDTH, HIDDEN, OTHERS = 16, 8, 12
"""Inputs and hidden units of the small network, and the people who are in both worlds."""
_FAR = 1e4
"""Target of the person whose world it is."""
_CENTRE = 5
"""Trainings without noise that say where the world without the person lies."""
_PACE = 0.01
"""What a clipped gradient moves: little, so that the person's gradient keeps its direction."""


def two_worlds(
    mechanism: Mechanism, n_steps: int, delta: float, n_trials: int, key: Key
) -> dict[str, float]:
    """Train a small network with and without one person, `n_trials` times each, and guess which.

    The person is as far from all others as can be: an input of its own with a target that no
    network reaches, so that its gradient is clipped at every step. Clipping, noise, rate and steps
    are the run's own. What is looked at is how far the trained weights lie along that gradient from
    where they began, as an attacker sees it who knows everybody else; the threshold is set before
    any trial.

    Args:
        mechanism: of the run.
        n_steps: T.
        delta: of the claim.
        n_trials: trainings in each world.
        key: all that it depends on.

    Returns:
        `epsilon_lower_bound` at confidence 0.95, `best_possible` if every guess were right, and how
        often "with" was guessed in either world.
    """
    worlds = key.fold("worlds")

    def moved(present: bool, by: Mechanism, trial: Key) -> float:
        return _moved(present, by, n_steps, worlds, trial.fold(present))

    silent = replace(mechanism, noise_multiplier=0.0)
    centre = np.mean([moved(False, silent, key.fold("centre", k)) for k in range(_CENTRE)])
    deviation = _PACE * mechanism.noise_multiplier * math.sqrt(n_steps)
    threshold = _threshold(n_trials, _apart(mechanism, n_steps), delta)
    at = float(centre) + deviation * threshold
    trials = [key.fold("trial", k) for k in range(n_trials)]
    n_without, n_with = (
        sum(int(moved(present, mechanism, trial) > at) for trial in trials)
        for present in (False, True)
    )
    return {
        "epsilon_lower_bound": worlds_bound(n_with, n_without, n_trials, delta),
        "best_possible": worlds_bound(n_trials, 0, n_trials, delta),
        "n_trials": n_trials,
        "guessed_with": n_with,
        "guessed_without": n_without,
    }


def worlds_bound(n_true: int, n_false: int, n: int, delta: float) -> float:
    """Epsilon that is exceeded with confidence 1 - `LEVEL`, given the guesses "with" of n each.

    Under (epsilon, delta) the rate of a guess in one world is at most e^epsilon times that in the
    other, plus delta. Both rates by Clopper and Pearson, at half the level each, and either guess
    counts, so that each of the two has a half of that again.
    """

    def bound(hits: int, misses: int) -> float:
        at = LEVEL / 4
        low = float(beta.ppf(at, hits, n - hits + 1)) if hits else 0.0
        high = float(beta.ppf(1 - at, misses + 1, n - misses)) if misses < n else 1.0
        return math.log((low - delta) / high) if low > delta else 0.0

    return max(0.0, bound(n_true, n_false), bound(n - n_false, n - n_true))


def _threshold(n: int, apart: float, delta: float) -> float:
    """In deviations above the world without: where n guesses in each would bound epsilon best if
    the two were Gaussians so far apart."""

    def worth(at: float) -> float:
        hits, misses = n * float(norm.sf(at - apart)), n * float(norm.sf(at))
        return worlds_bound(round(hits), round(misses), n, delta)

    return float(max(np.linspace(-2, apart + 4, 121), key=worth))


def _moved(present: bool, mechanism: Mechanism, n_steps: int, worlds: Key, trial: Key) -> float:
    """How far one training in one of the worlds has moved along the person's first gradient."""
    g = worlds.torch()
    network = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    names = dict(network.named_parameters())
    with torch.no_grad():
        for p in names.values():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(WIDTH))
    x = torch.randn(OTHERS, WIDTH, generator=g)
    x[:, 0] = 0  # the first input is the person's own
    y = torch.randn(OTHERS, generator=g)
    person = torch.zeros(1, WIDTH)
    person[0, 0] = 3.0

    def loss(params: Mapping[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = functional_call(network, dict(params), (a[None],))
        return (out.squeeze() - b).square()

    each = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0))
    everyone, targets = torch.cat([x, person]), torch.cat([y, torch.tensor([_FAR])])
    start = {k: p.detach().clone() for k, p in names.items()}
    alone, _ = each(start, everyone[-1:], targets[-1:])
    # a clipped gradient moves the weights by `_PACE`, whatever the public divisor
    rate = _PACE * mechanism.divisor / mechanism.clip
    step = PatientStep(torch.optim.SGD(network.parameters(), lr=rate), mechanism)
    draw = trial.torch()
    for number in range(n_steps):
        drawn = torch.rand(len(everyone), generator=draw) < mechanism.sample_rate
        drawn[-1] &= present
        chunks = []
        if drawn.any():
            now = {k: p.detach() for k, p in names.items()}
            gradients, losses = each(now, everyone[drawn], targets[drawn])
            chunks = [([gradients[k] for k in names], losses)]
        step.take(chunks, SecretStream(trial.fold("noise", number).digest))
    along = sum(float(((start[k] - p.detach()) * alone[k][0]).sum()) for k, p in names.items())
    return along / math.sqrt(sum(float(a.square().sum()) for a in alone.values()))
