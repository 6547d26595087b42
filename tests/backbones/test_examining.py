"""What an examination of a model is put together from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthmed.backbones.examining import CHUNK, in_chunks


@pytest.mark.parametrize("n", [0, 1, 2, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 49])
def test_no_row_is_left_to_itself(n: int) -> None:
    rows, factors = torch.arange(n, dtype=torch.float32), torch.arange(n) + 2.0
    sizes = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a))
        return a * b

    assert torch.equal(in_chunks(product, rows, factors), rows * factors)
    assert max(sizes) <= CHUNK and max(sizes) - min(sizes) <= 1
    assert n < 2 or min(sizes) > 1
