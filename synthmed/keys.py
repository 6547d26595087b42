"""Keyed randomness: every random number of a run is a function of where it is used.

A stage never reads global random state. It folds what identifies a draw (stage, step, patient,
sample index) into a key and makes a generator from it, so that shards, resumed runs and other
batch sizes see the same numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Key:
    """A 256-bit key; `fold` derives another that depends on every part folded in, in order.

    >>> Key.root(7).fold("train", 3) == Key.root(7).fold("train", 3)
    True
    >>> Key.root(7).fold("train", 3) == Key.root(7).fold("train", 31)
    False
    """

    digest: bytes

    @classmethod
    def root(cls, seed: int) -> Key:
        """The key of a run's root seed."""
        return cls(hashlib.sha256(f"synthmed seed {seed}".encode()).digest())

    def fold(self, *parts: str | int) -> Key:
        """The key for `parts` under this one; a part's type and length are part of it."""
        h = hashlib.sha256(self.digest)
        for part in parts:
            # numpy's strings and integers count as Python's
            text = f"{'text' if isinstance(part, str) else 'number'}:{part}".encode()
            h.update(len(text).to_bytes(4, "big") + text)
        return Key(h.digest())

    def integer(self) -> int:
        """63 bits of the key as a non-negative integer, fit for an int64 tensor."""
        return int.from_bytes(self.digest[:8], "big") >> 1

    def numpy(self) -> np.random.Generator:
        """A fresh numpy generator for this key."""
        return np.random.Generator(np.random.Philox(int.from_bytes(self.digest[:16], "big")))

    def torch(self) -> torch.Generator:
        """A fresh CPU generator for this key."""
        return torch_generator(self.integer())


def torch_generator(seed: int) -> torch.Generator:
    """A CPU generator seeded with `seed` (0 to 2^63 - 1); draw on it, then move to the device."""
    import torch

    return torch.Generator().manual_seed(seed)
