"""Labels as numbers a network takes, and back: the declared conditions of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from synthmed.keys import Key
from synthmed.types import Array, Labels

if TYPE_CHECKING:
    import torch

    from synthmed.config import Categorical, Continuous, Range, Weights


@dataclass(frozen=True)
class Conditions:
    """The declared conditions, in the config's order.

    A category becomes a one-hot vector; a number becomes its place in the declared range, -1 to 1,
    and a 1 that says that it is known. What is not known is all zero, so that the zero vector, the
    null condition of classifier-free guidance, says that nothing is known. All of it depends on
    public constants of the config alone.
    """

    declared: Mapping[str, Categorical | Continuous]

    @property
    def widths(self) -> tuple[int, ...]:
        """How many numbers each condition becomes."""
        return tuple(
            len(c.categories) if c.kind == "categorical" else 2 for c in self.declared.values()
        )

    @property
    def width(self) -> int:
        """Length D of an encoded condition; 0 for an unconditional model."""
        return sum(self.widths)

    @property
    def number_names(self) -> tuple[str, ...]:
        """What each of the D numbers says: `sex F`, `sex M`, `age`, `age known`."""
        names: list[str] = []
        for name, c in self.declared.items():
            if c.kind == "categorical":
                names += [f"{name} {category}" for category in c.categories]
            else:
                names += [name, f"{name} known"]
        return tuple(names)

    def encode(self, labels: Labels) -> Array:
        """(D,) float32 of one scan's labels; a declared condition that they lack stays zero.

        Raises:
            ValueError: a value is outside what is declared.
        """
        out = np.zeros(self.width, np.float32)
        at = 0
        for name, c in self.declared.items():
            value = labels.get(name)
            if c.kind == "categorical":
                if value is not None:
                    if value not in c.categories:
                        raise ValueError(f"condition {name}: {value!r} is not a declared category")
                    out[at + c.categories.index(str(value))] = 1
                at += len(c.categories)
            else:
                if value is not None:
                    number = float(value)
                    if not c.low <= number <= c.high:
                        raise ValueError(f"condition {name}: {number} outside [{c.low}, {c.high}]")
                    out[at : at + 2] = 2 * (number - c.low) / (c.high - c.low) - 1, 1
                at += 2
        return out

    def draw_encoded(self, generator: torch.Generator) -> torch.Tensor:
        """(D,) float32: a condition uniform over what is declared, nothing of it missing.

        Args:
            generator: a CPU generator, all that the result depends on.
        """
        import torch

        parts = []
        for c in self.declared.values():
            if c.kind == "categorical":
                one = torch.randint(len(c.categories), (1,), generator=generator)
                parts.append(torch.nn.functional.one_hot(one, len(c.categories))[0].float())
            else:
                place = 2 * torch.rand(1, generator=generator) - 1
                parts.append(torch.cat([place, torch.ones(1)]))
        return torch.cat(parts) if parts else torch.zeros(0)

    def draw(
        self, key: Key, prior: Mapping[str, Weights | Range] = MappingProxyType({})
    ) -> dict[str, str | float]:
        """One set of labels, none missing; see `rounded` for the decimals of a number.

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
                labels[name] = rounded(float(rng.uniform(low, high)), low, high)
        return labels


def rounded(value: float, low: float, high: float) -> float:
    """A number to as many decimals as tell apart 200 values of [low, high], and inside it.

    >>> rounded(61.23456, 40, 90), rounded(0.0123456, 0, 0.05)
    (61.2, 0.0123)
    """
    decimals = math.ceil(-math.log10((high - low) / 200))
    return min(max(round(value, decimals), low), high)
