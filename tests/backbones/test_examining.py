"""What an examination of a model is put together from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthmed.backbones.examining import CHUNK, MOST_ROWS, evenly, in_chunks, scans
from synthmed.backbones.generative import Batch


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


@pytest.mark.parametrize("most", [1, 3, 40])
def test_every_patient_has_as_many_rows(most: int) -> None:
    """Each the patient's own, and all of its scans where there is room."""
    batches = []
    for b, counts in enumerate([(1, most), (2 if most > 1 else 1,)]):
        mask = torch.zeros(len(counts), max(counts))
        x = torch.zeros(*mask.shape, 1, 1, 1, 1)
        for i, n in enumerate(counts):
            mask[i, :n] = 1
            x[i, :n] = 10 * b + i
        batches.append(Batch(x, mask[..., None], x, mask))
    together = torch.cat([scans(batch)[0] for batch in batches]).flatten()
    rows = evenly(batches)
    n = min(most, MOST_ROWS)
    assert together[rows].tolist() == [0.0] * n + [1.0] * n + [10.0] * n
    assert len(set(rows.tolist())) == 1 + n + min(2, n)
