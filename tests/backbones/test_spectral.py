"""The Gaussian of released moments, against closed forms and SciPy's transform."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

from synthmed.backbones.generative import Batch, VolumeSpec, named_parameters
from synthmed.backbones.spectral import Moments, Spectral, SpectralGaussian, corner
from synthmed.config import Optimizer

GRID = (6, 8, 5)
ALL = {"coefficients": 512, "shift_coefficients": 512, "map_coefficients": 512}


def build(grid: tuple[int, int, int] = GRID, width: int = 2, **settings: Any) -> SpectralGaussian:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Spectral(**settings).build(VolumeSpec(1, grid, width), Optimizer())


def cohort(n: int = 40, grid: tuple[int, int, int] = GRID, seed: int = 0) -> Batch:
    """Two categories with means of their own; a scan a patient."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.arange(n) % 2
    means = torch.rand(2, *grid, generator=g)
    x = means[kind] + 0.1 * torch.randn(n, *grid, generator=g)
    c = torch.nn.functional.one_hot(kind, 2).float()
    return Batch(x[:, None, None], c[:, None], torch.zeros(n, 1, 0, *grid), torch.ones(n, 1))


def fitted(model: SpectralGaussian, batch: Batch, steps: int = 400) -> None:
    """Plain gradient descent on the whole cohort, as without privacy at rate 1."""
    phase = model.rounds()[0].phases[0]
    params = named_parameters(model)
    for _ in range(steps):
        loss = phase.loss(params, batch, {}, 0.0).mean()
        for p, g in zip(
            params.values(), torch.autograd.grad(loss, list(params.values())), strict=True
        ):
            p.data -= 0.7 * g


def test_the_transform_is_scipys() -> None:
    x = np.random.default_rng(0).random((3, 1, *GRID)).astype(np.float32)
    model = build().moments
    ours = model.to_frequencies(torch.from_numpy(x))
    theirs = dctn(x, type=2, axes=(2, 3, 4), norm="ortho") / math.sqrt(math.prod(GRID))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
    np.testing.assert_allclose(model.to_voxels(ours).numpy(), x, atol=1e-5)


def test_the_moments_are_the_cohorts() -> None:
    """Means a category, energy a band and the map of absolute residuals, by their definitions."""
    model, batch = build(**ALL), cohort()
    fitted(model, batch)
    x, kind = batch.x[:, 0, 0], batch.c[:, 0].argmax(1)
    means = torch.stack([x[kind == k].mean(0) for k in (0, 1)])
    np.testing.assert_allclose(model.moments.volume(torch.eye(2))[:, 0].detach(), means, atol=1e-3)
    residual = (x - means[kind])[:, None]
    seen = model.moments.to_frequencies(residual)
    roots = model.moments.energies(seen).sqrt().mean(0)
    np.testing.assert_allclose(model.moments.amplitude.detach(), roots, atol=1e-4)
    map_ = model.moments.to_voxels(model.moments.deviation.detach())
    np.testing.assert_allclose(map_[0], residual.abs().mean(0)[0], atol=1e-3)


def test_few_coefficients_are_the_best_smooth_mean() -> None:
    model, batch = (
        build(coefficients=3, shift_coefficients=1, map_coefficients=1, width=0),
        cohort(),
    )
    batch = batch._replace(c=batch.c[..., :0])
    fitted(model, batch)
    low = corner(GRID, 3)
    assert tuple(model.moments.mean.shape) == (1, *low)
    mean = model.moments.to_frequencies(batch.x[:, 0].mean(0))
    np.testing.assert_allclose(
        model.moments.mean.detach(), mean[:, : low[0], : low[1], : low[2]], atol=1e-4
    )


def test_samples_have_the_moments_that_were_set() -> None:
    grid = (12, 12, 12)
    model = build(grid, width=0, bands=6, **ALL)
    g = torch.Generator().manual_seed(1)
    outline = 0.05 + 0.1 * torch.rand(1, *grid, generator=g)
    power = torch.tensor([[5.0, 3, 2, 1, 0.5, 0.1]])
    with torch.no_grad():
        model.moments.mean.copy_(model.moments.to_frequencies(torch.rand(1, *grid, generator=g)))
        model.moments.deviation.copy_(model.moments.to_frequencies(outline))
        model.moments.amplitude.copy_(power.sqrt())
    n = 600
    made = model.sample(torch.zeros(n, 0), torch.arange(n), torch.zeros(n, 0, *grid))
    mean = model.moments.volume(torch.zeros(1, 0)).detach()
    assert float((made.mean(0) - mean[0]).abs().max()) < 5 * 0.2 / math.sqrt(n)
    residual = made - mean
    # of a Gaussian the mean absolute value is sqrt(2 / pi) deviations
    found = residual.abs().mean(0)
    assert float((found / outline).mean()) == pytest.approx(1, abs=0.01)
    assert float((found / outline).std()) < 3 / math.sqrt(n)
    flat = residual / (outline * math.sqrt(math.pi / 2))
    energy = model.moments.energies(model.moments.to_frequencies(flat)).mean(0)
    # evening out what cosines have at the faces moves a little energy between bands
    np.testing.assert_allclose(energy / energy.sum(), power / power.sum(), atol=0.03)


def smooth(grid: tuple[int, int, int]) -> Tensor:
    axes = [torch.linspace(-1, 1, n) for n in grid]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return (-3 * (x**2 + 2 * y**2 + z**2)).exp()[None]


def test_shrinking_takes_noise_out_and_leaves_a_clean_mean_alone() -> None:
    grid = (16, 16, 16)
    model = build(grid, width=0)
    truth = model.moments.to_frequencies(smooth(grid))
    g = torch.Generator().manual_seed(2)
    noise = 0.002 * torch.randn(truth.shape, generator=g)
    with torch.no_grad():
        model.moments.mean.copy_(truth + noise)
    kept = model.moments.shrink()
    assert 0 < kept < 1
    assert float((model.moments.mean.detach() - truth).norm()) < 0.4 * float(noise.norm())
    with torch.no_grad():
        model.moments.mean.copy_(truth)
    assert model.moments.shrink() > 0.9999
    assert float((model.moments.mean.detach() - truth).norm() / truth.norm()) < 1e-2


def test_a_mean_that_was_cut_off_is_not_shrunk() -> None:
    """Its highest frequencies are anatomy, not noise."""
    moments: Moments = build(coefficients=3, width=0).moments
    with torch.no_grad():
        moments.mean.fill_(0.1)
    assert moments.shrink() == 1.0
    assert float(moments.mean.detach().min()) == pytest.approx(0.1)


def test_noise_that_turns_a_moment_negative_makes_no_negative_deviation() -> None:
    model = build(width=0, **ALL)
    with torch.no_grad():
        model.moments.deviation.fill_(-0.1)
        model.moments.amplitude.fill_(-0.1)
    made = model.sample(torch.zeros(2, 0), torch.arange(2), torch.zeros(2, 0, *GRID))
    assert torch.isfinite(made).all()
    assert torch.equal(made, model.moments.volume(torch.zeros(2, 0)))
