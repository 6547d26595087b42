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
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from synthmed.metrics.stats import Floats

Words = npt.NDArray[np.uint64]
_WORD = np.dtype("<u8")
_SPARE = 2
"""Words of room beyond its output that the cipher asks for."""
_PARTS = 4
"""Gaussians that are added up to one."""
_BLOCK = 2**16
"""Normal numbers made at a time: more leave the cache, fewer let threads wait for each other."""
_ZEROS = memoryview(bytes(8 * _PARTS * _BLOCK))
"""What a cipher turns into its key stream."""


class SecretStream:
    """Numbers that look random to whoever lacks the key.

    Args:
        key: 32 bytes, for this stream alone.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._blocks = 0

    def uniform(self, n: int) -> Floats:
        """(n,) float64 within (0, 1): odd multiples of 2^-53."""
        return _fractions(self._words(self._next(1), bytes(8 * n), np.empty(n + _SPARE, _WORD)))

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

        def fill(blocks: range) -> None:
            room = np.empty(_PARTS * _BLOCK + _SPARE, _WORD)
            for k in blocks:
                part = out[k * _BLOCK : (k + 1) * _BLOCK]
                zeros = _ZEROS[: 8 * _PARTS * len(part)]
                _normal(_fractions(self._words(first + k, zeros, room)), part)

        n_threads = min(torch.get_num_threads(), n_blocks)
        shares = [range(i, n_blocks, n_threads) for i in range(n_threads)]
        if n_threads > 1:
            with ThreadPoolExecutor(n_threads) as pool:
                list(pool.map(fill, shares))
        else:
            for share in shares:
                fill(share)
        return out.reshape(tuple(shape))

    def _next(self, n: int) -> int:
        """Number of the first of `n` blocks that nobody has had."""
        first, self._blocks = self._blocks, self._blocks + n
        return first

    def _words(self, block: int, zeros: bytes | memoryview, room: Words) -> Words:
        """The key stream of a block, as long as `zeros`, in `room`."""
        # a block is one counter's upper half: none has 2^64 cipher blocks
        counter = (block << 64).to_bytes(16, "big")
        cipher = Cipher(algorithms.AES256(self._key), modes.CTR(counter)).encryptor()
        cipher.update_into(zeros, room.data.cast("B"))
        return room[: len(zeros) // 8]


def _fractions(words: Words) -> Floats:
    """Odd multiples of 2^-53 within (0, 1) from 52 bits of each word, in its place."""
    words >>= np.uint64(12)
    words |= np.uint64(0x3FF) << np.uint64(52)  # of a double: sign and exponent of [1, 2)
    out = words.view(np.float64)
    out -= 1 - 2.0**-53
    return out


def _normal(uniform: Floats, out: Tensor) -> None:
    """Normal numbers from four times as many uniform ones, which are overwritten.

    The two of one pair (Box and Muller 1958) are r cos t and r sin t; their sum is
    sqrt(2) r cos(t - pi/4), and t - pi/4 is an angle like t.
    """
    radii, angles = torch.from_numpy(uniform).reshape(2, _PARTS // 2, len(out))
    out.zero_()
    for radius, angle in zip(radii, angles, strict=True):
        radius.log_().neg_().sqrt_()
        out += radius.mul_(angle.mul_(2 * math.pi).cos_())
