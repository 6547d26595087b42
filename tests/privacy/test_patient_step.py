"""One private step against its definition, and the bugs it must not have, planted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from synthmed.privacy.gradients import finite_only, norms_of
from synthmed.privacy.noise import SecretStream
from synthmed.privacy.patient_step import Mechanism, PatientStep

MECHANISM = Mechanism(sample_rate=0.3, noise_multiplier=1.5, clip=0.7, divisor=12.0)
SHAPES = [(40, 30), (30,), (5, 4, 3)]
KEY = bytes(range(32))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(s)) for s in SHAPES]


def gradients(n: int, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = scale * torch.rand(n, generator=g) * 0.1
    each = [torch.randn(n, *s, generator=g) for s in SHAPES]
    return [sizes.reshape(-1, *[1] * (e.ndim - 1)) * e for e in each]


def chunked(all_of: Sequence[Tensor], size: int) -> list[tuple[list[Tensor], Tensor]]:
    n = len(all_of[0])
    return [
        ([g[at : at + size] for g in all_of], torch.arange(at, min(at + size, n)).float())
        for at in range(0, n, size)
    ]


def update(
    chunks: Iterable[tuple[list[Tensor], Tensor]], mechanism: Mechanism = MECHANISM
) -> Tensor:
    """What one step of plain gradient descent at rate 1 subtracts."""
    mine = parameters()
    step = PatientStep(torch.optim.SGD(mine, lr=1.0), mechanism)
    step.take(chunks, SecretStream(KEY))
    return -torch.cat([p.detach().flatten() for p in mine])


def by_definition(all_of: Sequence[Tensor]) -> Tensor:
    """A loop over patients in float64."""
    total = np.zeros(sum(int(np.prod(s)) for s in SHAPES))
    for i in range(len(all_of[0])):
        flat = np.concatenate([g[i].double().numpy().ravel() for g in all_of])
        total += flat * min(1.0, MECHANISM.clip / np.linalg.norm(flat))
    noise = SecretStream(KEY).normal(total.shape).numpy()
    deviation = MECHANISM.noise_multiplier * MECHANISM.clip
    return torch.from_numpy((total + deviation * noise) / MECHANISM.divisor)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_step_is_what_the_definition_says(size: int) -> None:
    """Some patients are clipped, some are not; chunks make no difference."""
    each = gradients(20)
    norms = norms_of(each)
    assert 3 < (norms > MECHANISM.clip).sum() < 17
    torch.testing.assert_close(
        update(chunked(each, size)).double(), by_definition(each), rtol=1e-5, atol=1e-6
    )


def test_half_precision_around_it_does_not_loosen_the_bound() -> None:
    """Sums in bfloat16 would be off by some thousandths of C."""
    each = gradients(20)
    with torch.autocast("cpu", torch.bfloat16):
        found = update(chunked(each, 3))

        def within() -> Iterator[tuple[list[Tensor], Tensor]]:
            for chunk in chunked(each, 3):
                with torch.autocast("cpu", torch.bfloat16):  # still entered at the yield
                    yield chunk

        suspended = update(within())
    torch.testing.assert_close(found.double(), by_definition(each), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(suspended, found, rtol=1e-5, atol=1e-6)


def test_an_empty_step_is_noise_alone() -> None:
    torch.testing.assert_close(
        update([]).double(), by_definition([g[:0] for g in gradients(1)]), rtol=1e-5, atol=1e-6
    )


def test_no_patient_adds_more_than_the_bound() -> None:
    """Ten thousand random patients, from tiny to enormous, each alone in a step without noise."""
    silent = Mechanism(0.3, 0.0, MECHANISM.clip, 1.0)
    mine = parameters()
    step = PatientStep(torch.optim.SGD(mine, lr=1.0), silent)
    worst = 0.0
    for scale in 10.0 ** np.linspace(-6, 6, 20):
        each = gradients(500, float(scale), seed=int(1e3 * scale) % 2**31)
        for i in range(500):
            with torch.no_grad():
                for p in mine:
                    p.zero_()
            taken = step.take([([g[i : i + 1] for g in each], torch.zeros(1))], SecretStream(KEY))
            size = float(torch.cat([p.detach().double().flatten() for p in mine]).norm())
            worst = max(worst, size)
            assert taken.largest <= MECHANISM.clip * (1 + 1e-5)
    assert worst <= MECHANISM.clip * (1 + 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_patient_whose_gradient_is_no_number_adds_nothing(value: float) -> None:
    each = gradients(4)
    broken = [g.clone() for g in each]
    broken[1][2, 7] = value
    others = [0, 1, 3]
    kept = update(chunked(broken, 4))
    assert kept.isfinite().all()
    torch.testing.assert_close(kept, update(chunked([g[others] for g in each], 3)))
    zeroed, norms = finite_only(broken)
    assert (zeroed[0][2] == 0).all() and norms[2] == 0 and (norms[others] > 0).all()


def test_the_divisor_is_a_constant() -> None:
    """Not the number of patients that happened to be drawn."""
    silent = Mechanism(0.3, 0.0, 1e9, 10.0)
    one = gradients(1)
    twice = [torch.cat([g, g]) for g in one]
    torch.testing.assert_close(
        update(chunked(twice, 2), silent), 2 * update(chunked(one, 1), silent)
    )


def test_the_noise_has_its_deviation() -> None:
    """Its sum of squares is chi-square; and what the log is told of it is that."""
    mine = parameters()
    step = PatientStep(torch.optim.SGD(mine, lr=1.0), MECHANISM)
    told, squares, n = [], [], sum(p.numel() for p in mine)
    for k in range(20):
        with torch.no_grad():
            for p in mine:
                p.zero_()
        taken = step.take([], SecretStream(k.to_bytes(32, "big")))
        seen = torch.cat([p.detach().flatten() for p in mine]).double()
        unit = seen * MECHANISM.divisor / (MECHANISM.noise_multiplier * MECHANISM.clip)
        squares.append(float(unit.square().sum()))
        told.append(taken.noise * n)
    np.testing.assert_allclose(told, squares, rtol=1e-5)
    p = chi2.cdf(sum(squares), 20 * n)
    assert 1e-3 < p < 1 - 1e-3


def test_many_small_gradients_that_agree_are_added_up_right() -> None:
    """Opacus divides by the norm and a millionth: of small ones that is seen in a large sum."""
    mechanism = Mechanism(sample_rate=1.0, noise_multiplier=0.0, clip=0.01, divisor=1.0)
    one = gradients(1, scale=1.0)
    size = float(norms_of(one)[0])
    each = [(g * 0.012 / size).repeat(400, *[1] * (g.ndim - 1)) for g in one]
    mine = parameters()
    taken = PatientStep(torch.optim.SGD(mine, lr=1.0), mechanism).take(
        chunked(each, 100), SecretStream(KEY)
    )
    assert taken.off < 1e-3
    moved = float(torch.cat([p.detach().flatten() for p in mine]).norm())
    assert 0.9999 * 400 * 0.01 < moved <= 400 * 0.01 * (1 + 1e-5)


def test_the_norm_of_millions_is_right_and_so_is_the_bound() -> None:
    """A few large numbers, then many small ones: added up in float32 the norm comes out small."""
    n = 3_000_000
    g = torch.full((1, n), 3e-4)
    g[0, :100] = 1.0
    exact = float(np.sqrt(np.square(g[0].double().numpy()).sum()))
    single = float(torch.linalg.vector_norm(g, dim=1)[0])
    assert single < exact * (1 - 1e-4), "the control: float32 is off"
    assert float(norms_of([g])[0]) == pytest.approx(exact, rel=2e-6)
    mechanism = Mechanism(sample_rate=1.0, noise_multiplier=0.0, clip=0.7, divisor=1.0)
    mine = [nn.Parameter(torch.zeros(n))]
    step = PatientStep(torch.optim.SGD(mine, lr=1.0), mechanism)
    step.take([([g], torch.zeros(1))], SecretStream(KEY))
    moved = float(np.sqrt(np.square(mine[0].detach().double().numpy()).sum()))
    assert moved <= 0.7 * (1 + 1e-5)
