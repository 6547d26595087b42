"""The secret stream: the cipher's own bytes, uniform and normal, and another key another stream."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import kstest

from synthmed.privacy.noise import SecretStream

KEY = bytes(range(32))


def test_the_bytes_are_those_of_the_standard() -> None:
    """AES-256 of a block of zeros under a key of zeros, as NIST's known-answer tests have it."""
    first = SecretStream(bytes(32)).uniform(1)[0]
    word = int.from_bytes(bytes.fromhex("dc95c078a2408989"), "little")
    assert first == ((word >> 11) + 0.5) * 2.0**-53


def test_numbers_are_uniform_and_normal() -> None:
    stream = SecretStream(KEY)
    assert kstest(stream.uniform(200_000), "uniform").pvalue > 1e-3
    normal = stream.normal((400, 500)).numpy().ravel()
    assert kstest(normal, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 4 / np.sqrt(len(normal))
    assert normal.dtype == np.float64


def test_a_stream_repeats_under_its_key_alone() -> None:
    a, b = (SecretStream(KEY).normal((7, 3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (7, 3)
    other = SecretStream(KEY[::-1]).normal((7, 3))
    assert not torch.isclose(a, other).any()
    stream = SecretStream(KEY)
    assert not torch.equal(stream.normal((5,)), stream.normal((5,)))


def test_nothing_is_drawn_for_nothing() -> None:
    assert SecretStream(KEY).normal((0, 4)).shape == (0, 4)
