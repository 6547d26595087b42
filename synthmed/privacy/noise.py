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
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from synthmed.metrics.stats import Floats

_PARTS = 4
"""Gaussians that are added up to one."""
_BLOCK = 2**16
"""Normal numbers made at a time: more leave the cache, fewer let threads wait for each other."""


class SecretStream:
    """Numbers that look random to whoever lacks the key.

    Args:
        key: 32 bytes, for this stream alone.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._blocks = 0

    def uniform(self, n: int) -> Floats:
        """(n,) float64 within (0, 1): odd multiples of 2^-54."""
        return self._uniform(self._next(1), n)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float64.

        Each is half the sum of four, so that the pattern of representable numbers no longer tells
        what was added to it (Holohan and Braghin 2021, arXiv:2107.10138; Mironov 2012 for the
        attack; Opacus' `secure_mode` does the same). Blocks of a fixed size are made in parallel;
        the numbers do not depend on by how many threads.
        """
        n = math.prod(shape)
        out = torch.empty(n, dtype=torch.float64)
        n_blocks = -(-n // _BLOCK)
        first = self._next(n_blocks)

        def fill(k: int) -> None:
            part = out[k * _BLOCK : (k + 1) * _BLOCK]
            part[:] = self._normal(first + k, len(part))

        if n_blocks > 1:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(fill, range(n_blocks)))
        elif n_blocks:
            fill(0)
        return out.reshape(tuple(shape))

    def _next(self, n: int) -> int:
        """Number of the first of `n` blocks that nobody has had."""
        first, self._blocks = self._blocks, self._blocks + n
        return first

    def _uniform(self, block: int, n: int) -> Floats:
        # a block is one counter's upper half: none has 2^64 cipher blocks
        counter = (block << 64).to_bytes(16, "big")
        cipher = Cipher(algorithms.AES256(self._key), modes.CTR(counter)).encryptor()
        words = np.frombuffer(cipher.update(bytes(8 * n)), "<u8")
        out: Floats = (words >> np.uint64(11)).astype(np.float64)
        out += 0.5
        out *= 2.0**-53
        return out

    def _normal(self, block: int, n: int) -> Tensor:
        uniform = torch.from_numpy(self._uniform(block, _PARTS * n)).reshape(_PARTS // 2, 2, n)
        total = torch.zeros(n, dtype=torch.float64)
        for a, b in uniform:
            # Box and Muller 1958: two normal numbers from two uniform ones
            angle = 2 * math.pi * b
            total += (-2 * a.log()).sqrt() * (angle.cos() + angle.sin())
        return total / math.sqrt(_PARTS)
