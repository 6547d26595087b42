"""authenticity: do samples keep the distance from patients that patients keep from each other."""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthmed.metrics.base import Base
from synthmed.metrics.shared import Shared, Side, pick
from synthmed.metrics.sides import Sides
from synthmed.metrics.stats import Floats, Ints, half, half_se, normal_interval
from synthmed.types import Estimate


class Authenticity(Base):
    """Share of samples farther from their nearest training patient than that patient's neighbour.

    Sample y with nearest training patient x is authentic when |y - x| > |x - x'|, x' the nearest
    other training patient of x; distances between z-scored descriptors, one scan a patient. Higher
    is better up to the floor, which is the share among held-out patients posing as samples (about
    a half for honest samples); its own interval is in the note. Near-copies go to 0, the ceiling
    (train itself posing as samples). Sharing x between samples is respected: the interval comes
    from halves of the patients of both sides.

    Args:
        draws: picks of one scan a patient that the figure is averaged over.

    Source: Alaa et al. 2022, section 4.3 (in the nearest-neighbour form of synthcity).
    """

    name: Literal["authenticity"] = "authenticity"
    draws: int = 20

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """One estimate; null with fewer than three training patients or no sample."""
        n = len(shared.patients("synthetic"))
        n_train = len(shared.patients("train"))
        value = ci = floor = None
        note = "fewer than three training patients, or no sample"
        if n_train >= 3 and n >= 1:
            value, ci = self._share(sides, shared, "synthetic")
            note = "no held-out patients: no floor"
            if shared.has_holdout:
                floor, held_out = self._share(sides, shared, "holdout")
                note = "too few held-out patients for an interval of the floor"
                if held_out is not None:
                    note = f"held-out patients: {held_out[0]:.2f} to {held_out[1]:.2f}"
        return [
            Estimate(
                name="authenticity",
                group="memorization",
                value=value,
                ci=ci,
                unit="share of samples",
                n=n,
                better="higher",
                floor=floor,
                ceiling=0.0,
                method=(
                    "Share of samples farther from their nearest training patient than that "
                    "patient's nearest neighbour, in descriptors; floor: held-out patients posing "
                    "as samples; ceiling: exact copies; interval from halves of the patients."
                ),
                seed=sides.seed,
                note=note,
                n_holdout=shared.n_holdout,
            )
        ]

    def _share(
        self, sides: Sides, shared: Shared, side: Side
    ) -> tuple[float, tuple[float, float] | None]:
        train, made = shared.patients("train"), shared.patients(side)
        to_train, within = shared.distances(side, "train"), shared.distances("train", "train")
        key = sides.key.fold("authenticity", side)

        def share(a: list[Ints], b: list[Ints], rng: np.random.Generator) -> float:
            x, y = pick(a, rng), pick(b, rng)
            return authentic_share(to_train[np.ix_(y, x)], within[np.ix_(x, x)])

        rng = key.fold("value").numpy()
        value = float(np.mean([share(train, made, rng) for _ in range(self.draws)]))
        if len(made) < 4 or len(train) < 6:
            return value, None
        halves = np.empty(sides.resamples)
        for i in range(sides.resamples):
            rng = key.fold("half", i).numpy()
            a = [train[j] for j in half(len(train), rng)]
            b = [made[j] for j in half(len(made), rng)]
            halves[i] = share(a, b, rng)
        return value, normal_interval(value, half_se(halves), 0.0, 1.0)


def authentic_share(to_train: Floats, within: Floats) -> float:
    """The share from distances (n_samples, n_train) and (n_train, n_train)."""
    neighbour = within.copy()
    np.fill_diagonal(neighbour, np.inf)
    nearest = np.argmin(to_train, axis=1)
    return float(np.mean(to_train.min(axis=1) > neighbour.min(axis=1)[nearest]))
