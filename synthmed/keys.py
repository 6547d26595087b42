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

from synthmed.errors import SynthmedError

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
    """A CPU generator seeded with `seed` (0 to 2^63 - 1); draw on it, then move to the device.

    torch's own seeding takes the lower 32 bits alone (its Mersenne twister's `init_genrand`), by
    which two of 100,000 samples would be expected to be one. Here all of the state comes from the
    seed, by Philox.

    Raises:
        SynthmedError: this torch keeps its generator's state in another form.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    state = generator.get_state()
    # its fields: the seed (8 bytes), words left (4), seeded (4), the next word (8), the 624 words,
    # each in 8 bytes, then a normal number that was kept back
    words = state.numpy()[24 : 24 + 8 * 624].view(np.uint64)
    if words[0] != seed & 0xFFFFFFFF:
        raise SynthmedError(
            f"torch {torch.__version__} keeps the state of its random numbers in an unknown form",
            "Install the version of torch that synthmed's README names.",
        )
    words[:] = np.random.Philox(seed).random_raw(312).view(np.uint32)
    generator.set_state(state)
    return generator
