"""What is judged on CUDA is judged as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthmed.metrics import moves
from synthmed.metrics.shared import Shared
from synthmed.metrics.similarity import ImageSimilarity
from tests.metrics.cohorts import cases, sides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("tissue", [False, True])
def test_scans_are_as_alike_on_cuda(tissue: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cpu, cuda = (ImageSimilarity((0,), tissue, device) for device in ("cpu", "cuda"))
    scans = cpu.features(cases(rng, 30, "t"))
    expected = np.tanh(cpu.compare(scans, scans[:20]).best)
    assert np.abs(np.tanh(cuda.compare(scans, scans[:20]).best) - expected).max() < 1e-5
    monkeypatch.setattr(moves, "CHUNK_CUDA", 7)
    assert np.abs(np.tanh(cuda.compare(scans, scans[:20]).best) - expected).max() < 1e-5


def test_the_same_samples_are_copies_on_cuda() -> None:
    rng = np.random.default_rng(1)
    train, holdout, made = (cases(rng, n, name) for n, name in ((30, "t"), (20, "h"), (15, "s")))
    made.volumes[:2] = train.volumes[[4, 9]]
    of = [Shared(sides(train, holdout, made, device=device)) for device in ("cpu", "cuda")]
    on_cpu, on_cuda = (shared.as_sampled() for shared in of)
    assert on_cuda.flagged == on_cpu.flagged == (0, 1)
    assert on_cuda.patients == on_cpu.patients
