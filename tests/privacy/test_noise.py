"""The secret stream: the cipher's own bytes, uniform and normal, and another key another stream."""

from __future__ import annotations

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.stats import kstest

from synthmed.privacy.noise import SecretStream

KEY = bytes(range(32))


def test_the_bytes_are_those_of_the_standard() -> None:
    """AES-256 of a block of zeros under a key of zeros, as NIST's known-answer tests have it."""
    first = SecretStream(bytes(32)).uniform(1)[0]
    word = int.from_bytes(bytes.fromhex("dc95c078a2408989"), "little")
    assert first == ((word >> 12) + 0.5) * 2.0**-52


def test_numbers_are_uniform_and_normal() -> None:
    stream = SecretStream(KEY)
    assert kstest(stream.uniform(200_000), "uniform").pvalue > 1e-3
    normal = stream.normal((400, 500)).numpy().ravel()
    assert kstest(normal, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 4 / np.sqrt(len(normal))
    assert normal.dtype == np.float64


def test_each_number_is_half_the_sum_of_four_normal_ones() -> None:
    """Box and Muller's four from the words of the cipher, in each block its own counter."""
    n = 2**16 + 1000  # a whole block and part of one
    got = SecretStream(KEY).normal((n,)).numpy()
    for block, first, size in ((0, 0, 2**16), (1, 2**16, 1000)):
        counter = modes.CTR((block << 64).to_bytes(16, "big"))
        words = Cipher(algorithms.AES256(KEY), counter).encryptor().update(bytes(32 * size))
        uniform = ((np.frombuffer(words, "<u8") >> np.uint64(12)) + 0.5) * 2.0**-52
        a, b, s, t = uniform.reshape(4, size)
        pairs = [(np.sqrt(-2 * np.log(r)), 2 * np.pi * angle) for r, angle in ((a, s), (b, t))]
        # an angle of t - pi/4 where a pair is added up: the same law, other numbers
        four = [r * f(angle + np.pi / 4) for r, angle in pairs for f in (np.cos, np.sin)]
        expected = np.sum(four, 0) / 2
        np.testing.assert_allclose(got[first : first + size], expected, rtol=0, atol=1e-12)


def test_numbers_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    try:
        made = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            made.append(SecretStream(KEY).normal((200_000,)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_a_stream_repeats_under_its_key_alone() -> None:
    a, b = (SecretStream(KEY).normal((7, 3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (7, 3)
    other = SecretStream(KEY[::-1]).normal((7, 3))
    assert not torch.isclose(a, other).any()
    stream = SecretStream(KEY)
    assert not torch.equal(stream.normal((5,)), stream.normal((5,)))


def test_nothing_is_drawn_for_nothing() -> None:
    assert SecretStream(KEY).normal((0, 4)).shape == (0, 4)
