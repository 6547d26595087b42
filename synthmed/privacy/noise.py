"""The random numbers of a private training: from a cipher whose key nobody outside can have.

Who knows the noise can subtract it, so it comes from AES-256 in counter mode (NIST SP 800-38A) and
not from a generator whose state a few outputs betray. The key of a stream is derived, with
HMAC-SHA256, from the key in SYNTHMED_HOME and from the state a step begins in: the same step from
the same state sees the same numbers, and any other state sees others. A training that is resumed
thus repeats its steps, and one that comes back another way never uses a noise twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from synthmed.metrics.stats import Floats

_PARTS = 4
"""Gaussians that are added up to one."""


class SecretStream:
    """Numbers that look random to whoever lacks the key.

    Args:
        key: 32 bytes, for this stream alone.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, n: int) -> Floats:
        """(n,) float64 within (0, 1): odd multiples of 2^-54."""
        words = np.frombuffer(self._cipher.update(bytes(8 * n)), "<u8")
        return np.asarray(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float64.

        Each is half the sum of four, so that the pattern of representable numbers no longer tells
        what was added to it (Holohan and Braghin 2021, arXiv:2107.10138; Mironov 2012 for the
        attack; Opacus' `secure_mode` does the same).
        """
        n = math.prod(shape)
        total = np.zeros(n)
        for _ in range(_PARTS // 2):
            # Box and Muller 1958: two normal numbers from two uniform ones
            radius = np.sqrt(-2 * np.log(self.uniform(n)))
            angle = 2 * np.pi * self.uniform(n)
            total += radius * (np.cos(angle) + np.sin(angle))
        return torch.from_numpy(total / math.sqrt(_PARTS)).reshape(tuple(shape))
