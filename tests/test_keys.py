"""Keyed randomness: what a generator's numbers depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from synthmed.errors import SynthmedError
from synthmed.keys import Key, torch_generator


@pytest.mark.parametrize("high", [1, 2**10, 2**30])
def test_every_bit_of_a_seed_counts(high: int) -> None:
    """torch's own seeding takes the lower 32 alone."""
    own = [torch.Generator().manual_seed(s) for s in (5, 5 + high * 2**32)]
    assert torch.equal(*(torch.randn(8, generator=g) for g in own))
    ours = [torch_generator(s) for s in (5, 5 + high * 2**32)]
    assert not torch.equal(*(torch.randn(8, generator=g) for g in ours))


def test_the_numbers_are_those_of_a_mersenne_twister_with_the_state_of_the_seed() -> None:
    """numpy's Mersenne twister is the reference."""
    reference = np.random.MT19937()
    state = reference.state
    state["state"]["key"] = np.random.Philox(2**40 + 3).random_raw(312).view(np.uint32)
    state["state"]["pos"] = 624  # none of the state is used up
    reference.state = state
    drawn = torch.randint(2**24, (2000,), generator=torch_generator(2**40 + 3))
    assert np.array_equal(drawn.numpy(), reference.random_raw(2000) % 2**24)


def test_the_first_numbers_of_neighbouring_seeds_are_uniform() -> None:
    first = [float(torch.rand(1, generator=torch_generator(seed))) for seed in range(4000)]
    assert kstest(first, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 4 / np.sqrt(4000)


def test_a_generator_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved(torch.Generator):
        def get_state(self) -> torch.Tensor:
            return torch.cat([torch.zeros(8, dtype=torch.uint8), super().get_state()])

    monkeypatch.setattr(torch, "Generator", Moved)
    with pytest.raises(SynthmedError, match="unknown form"):
        torch_generator(7)


def test_one_key_one_stream() -> None:
    key = Key.root(1).fold("sample", 3)
    assert torch.equal(*(torch.randn(5, generator=key.torch()) for _ in range(2)))
    other = Key.root(1).fold("sample", 4)
    assert not torch.equal(*(torch.randn(5, generator=k.torch()) for k in (key, other)))
