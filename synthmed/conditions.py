"""Labels as numbers a network takes, and back: the declared conditions of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from synthmed.keys import Key
from synthmed.types import Array, Labels

if TYPE_CHECKING:
    from synthmed.config import Categorical, Continuous, Range, Weights


@dataclass(frozen=True)
class Conditions:
    """The declared conditions, in the config's order.

    A category becomes a one-hot vector, a number is mapped from its declared range to [-1, 1];
    both depend on public constants of the config alone.
    """

    declared: Mapping[str, Categorical | Continuous]

    @property
    def width(self) -> int:
        """Length D of an encoded condition; 0 for an unconditional model."""
        return sum(
            len(c.categories) if c.kind == "categorical" else 1 for c in self.declared.values()
        )

    def encode(self, labels: Labels) -> Array:
        """(D,) float32 of one scan's labels.

        Raises:
            ValueError: a declared condition is missing, or its value is outside what is declared.
        """
        out = np.zeros(self.width, np.float32)
        at = 0
        for name, c in self.declared.items():
            if name not in labels:
                raise ValueError(f"condition {name}: missing")
            value = labels[name]
            if c.kind == "categorical":
                if value not in c.categories:
                    raise ValueError(f"condition {name}: {value!r} is not a declared category")
                out[at + c.categories.index(str(value))] = 1
                at += len(c.categories)
            else:
                number = float(value)
                if not c.low <= number <= c.high:
                    raise ValueError(f"condition {name}: {number} outside [{c.low}, {c.high}]")
                out[at] = 2 * (number - c.low) / (c.high - c.low) - 1
                at += 1
        return out

    def draw(
        self, key: Key, prior: Mapping[str, Weights | Range] = MappingProxyType({})
    ) -> dict[str, str | float]:
        """One set of labels (numbers to one decimal).

        Args:
            key: all that it depends on beside the prior.
            prior: weights of categories, or a range of numbers; uniform for what it leaves out.
        """
        labels: dict[str, str | float] = {}
        for name, c in self.declared.items():
            rng = key.fold("condition", name).numpy()
            wanted = prior.get(name)
            if c.kind == "categorical":
                weights = np.array(
                    [
                        wanted.get(k, 0.0) if isinstance(wanted, Mapping) else 1.0
                        for k in c.categories
                    ]
                )
                at = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(), "right")
                labels[name] = c.categories[int(at)]
            else:
                low, high = wanted if isinstance(wanted, tuple) else (c.low, c.high)
                labels[name] = round(float(rng.uniform(low, high)), 1)
        return labels
