"""The linear denoiser against dense matrices, and its fit against the moments it must match."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from synthmed.backbones.nets.gaussian import _PSEUDO
from synthmed.backbones.nets.wiener import _FLOOR, _LEVELS, Filtered, Wiener

SIGMAS = [1e-3, 1e-2, 0.1, 0.5, 1.0, 7.0, 40.0, 160.0, 1e3]
N, D = 50, 3
EPS = torch.finfo(torch.float32).eps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def volumes(m: int = 80) -> tuple[Tensor, Tensor]:
    """(m, N) with modes, a texture of very unequal strength and a condition, and (m, D)."""
    g = generator()
    c = torch.nn.functional.one_hot(torch.randint(2, (m,), generator=g), 2).float()
    c = torch.cat([c, 2 * torch.rand(m, 1, generator=g) - 1], 1)
    modes = torch.randn(4, N, generator=g)
    texture = torch.logspace(-2.5, 0, N) * torch.randn(m, N, generator=g)
    y = torch.randn(m, 4, generator=g) @ modes + texture + c @ torch.randn(D, N, generator=g)
    return y + torch.linspace(-1, 1, N), c


def fitted(factors: int = 5) -> Wiener:
    wiener = Wiener(N, factors, D)
    wiener.fit(*volumes())
    return wiener


def moments(wiener: Wiener) -> tuple[Tensor, Tensor]:
    """Columns A (n, k) but those of labels, and v (n,), float64."""
    return wiener.factor_nk[:, : wiener.factors].double(), wiener.variance_n.double()


def dense(wiener: Wiener, y: Tensor, sigma: Tensor, c: Tensor) -> Filtered:
    """The whole answer from dense matrices in float64, row by row."""
    known, v = moments(wiener)
    rows = []
    for y_n, s, c_d in zip(y.double(), sigma.double(), c.double(), strict=True):
        mean, a = wiener.mean_n.double(), known
        if c_d.any():
            mean = mean + (c_d - wiener.centre_D.double()) @ wiener.weight_Dn.double()
        else:
            a = wiener.factor_nk.double()
        covariance = a @ a.T + v.diag()
        noisy = covariance + s**2 * torch.eye(len(v), dtype=torch.float64)
        clean = mean + covariance @ torch.linalg.solve(noisy, y_n - mean)
        # texture given the noisy data and the factors, and the factors given the noisy data
        texture = 1 / (1 / v + 1 / s**2)
        doubt = torch.linalg.inv(torch.eye(a.shape[1]).double() + a.T @ (a / (v + s**2)[:, None]))
        unknown = texture + (s**2 / (v + s**2)) ** 2 * (a**2 @ doubt.diagonal())
        rows.append(
            Filtered(
                clean=clean,
                unit=unknown.sqrt(),
                seen=(y_n - mean) / noisy.diagonal().sqrt(),
                guess=(clean - mean) / covariance.diagonal().sqrt(),
                weight=unknown / unknown.mean(),
            )
        )
    return Filtered(*(torch.stack(column) for column in zip(*rows, strict=True)))


def noisy(wiener: Wiener) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each noise level, its sigma, and conditions of which one is all zero."""
    sigma = torch.tensor(SIGMAS)
    y, c = (t[: len(sigma)].clone() for t in volumes())
    c[3] = 0
    return y + sigma[:, None] * torch.randn(y.shape, generator=generator(1)), sigma, c


# --- the filter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [0, 1, 5])
def test_it_is_the_closed_form_at_every_noise_level(factors: int) -> None:
    """To some hundred roundings of float32, in each field's own unit, whatever the noise."""
    wiener = fitted(factors)
    y, sigma, c = noisy(wiener)
    found, exact = wiener(y, sigma, c), dense(wiener, y, sigma, c)
    a, v = moments(wiener)
    sd = (a.square().sum(1) + v).sqrt()
    # what `clean` may differ by: the data's own size, not that of the noise
    size = sd + wiener.centred(c).double().abs()
    scales = {
        "clean": size,
        "unit": exact.unit,
        "seen": 1.0,
        "guess": size / sd,
        "weight": exact.weight,
    }
    for field, scale in scales.items():
        error = (getattr(found, field).double() - getattr(exact, field)).abs() / scale
        assert float(error.max()) < 300 * EPS, f"{field}: {error.amax(1)}"


def test_before_the_fit_the_data_are_taken_for_white_noise() -> None:
    f = Wiener(4, 2, 1)(torch.ones(1, 4), torch.ones(1), torch.ones(1, 1))
    torch.testing.assert_close(f.clean, torch.full((1, 4), 0.5))
    torch.testing.assert_close(f.unit, torch.full((1, 4), math.sqrt(0.5)))
    torch.testing.assert_close(f.weight, torch.ones(1, 4))


def test_the_unit_is_the_posterior_deviation_where_textures_are_equal() -> None:
    """The factors are orthogonal then, and what is known of one says nothing of another."""
    wiener = fitted()
    wiener.variance_n.fill_(0.02)
    wiener.levels_q.fill_(0.02)
    wiener.inner_qkk.zero_()
    wiener.inner_qkk[0] = wiener.factor_nk.T @ wiener.factor_nk
    y, sigma, c = noisy(wiener)
    c[3] = c[2]  # columns of labels are orthogonal to nothing
    found = wiener(y, sigma, c)
    a, v = moments(wiener)
    covariance = a @ a.T + v.diag()
    for unit, weight, s in zip(found.unit, found.weight, SIGMAS, strict=True):
        noisy_covariance = covariance + s**2 * torch.eye(N)
        # s2 Sigma (Sigma + s2)^-1: Sigma less what is known, without the difference
        left = s**2 * torch.linalg.solve(noisy_covariance, covariance).diagonal()
        torch.testing.assert_close(unit.double(), left.sqrt(), rtol=1e-4, atol=0)
        torch.testing.assert_close(weight.double(), left / left.mean(), rtol=2e-4, atol=0)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_unit_is_near_the_posterior_deviation_where_they_are_not(sigma: float) -> None:
    """What a network has to say is then of size 1 whatever the noise: its targets' mean square,
    for data of the fitted Gaussian, is the ratio of the two."""
    wiener = fitted()
    y, _, c = noisy(wiener)
    unit = wiener(y[:1], torch.tensor([sigma]), c[:1]).unit[0].double()
    a, v = moments(wiener)
    covariance = a @ a.T + v.diag()
    noisy_covariance = covariance + sigma**2 * torch.eye(N)
    left = sigma**2 * torch.linalg.solve(noisy_covariance, covariance).diagonal()
    ratio = left / unit**2
    assert 0.5 < float(ratio.min()) <= float(ratio.max()) < 2
    assert float(left.sum() / unit.square().sum()) == pytest.approx(1, abs=0.25)


def test_no_other_linear_denoiser_errs_less() -> None:
    """On data of the fitted Gaussian its error is the trace of the posterior covariance."""
    wiener = fitted()
    a, v = wiener.factor_nk.double(), wiener.variance_n.double()  # no label is known
    covariance = a @ a.T + v.diag()
    g, draws, s = generator(2), 20_000, 0.3
    x = wiener.mean_n.double() + (
        torch.randn(draws, a.shape[1], generator=g, dtype=torch.float64) @ a.T
        + torch.randn(draws, N, generator=g, dtype=torch.float64) * v.sqrt()
    )
    y = x + s * torch.randn(draws, N, generator=g, dtype=torch.float64)
    found = wiener(y.float(), torch.full((draws,), s), torch.zeros(draws, D)).clean
    errors = (found.double() - x).square().sum(1)
    left = covariance @ torch.linalg.inv(covariance + s**2 * torch.eye(N)) * s**2
    deviation = float(errors.std()) / math.sqrt(draws)
    assert float(errors.mean()) == pytest.approx(float(left.trace()), abs=5 * deviation)
    assert float(left.trace()) < 0.9 * N * s**2, "or nothing would have been removed"


def test_a_condition_of_zeros_says_nothing() -> None:
    wiener = fitted()
    c = torch.zeros(2, D)
    c[1, 0] = 1
    centred = wiener.centred(c)
    assert torch.equal(centred[0], wiener.mean_n)
    shift = (c[1] - wiener.centre_D) @ wiener.weight_Dn
    torch.testing.assert_close(centred[1], wiener.mean_n + shift)
    assert float(shift.norm()) > 0.1


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_a_label_that_is_unknown_leaves_its_cohort_mean(missing: float) -> None:
    """Of two labels, one of them rare in one category; some patients may lack it."""
    g, m = generator(), 4000
    rare = torch.nn.functional.one_hot((torch.rand(m, generator=g) < 0.2).long(), 2).float()
    even = torch.nn.functional.one_hot(torch.randint(2, (m,), generator=g), 2).float()
    of_rare, of_even = torch.randn(2, 2, N, generator=g)
    y = rare @ of_rare + even @ of_even + 0.1 * torch.randn(m, N, generator=g)
    rare[torch.rand(m, generator=g) < missing] = 0
    wiener = Wiener(N, 0, 4, (2, 2))
    wiener.fit(y, torch.cat([rare, even], 1))
    kept = 0.8 * of_rare[0] + 0.2 * of_rare[1]
    # a mean over the cohort, of categories that are up to 5 apart
    near = {"atol": 5 * 5 * 0.4 / math.sqrt(m), "rtol": 0.0}
    for i in range(2):
        c = torch.zeros(1, 4)
        c[0, 2 + i] = 1
        torch.testing.assert_close(wiener.centred(c)[0], kept + of_even[i], **near)
        c[0, 1] = 1
        torch.testing.assert_close(wiener.centred(c)[0], of_rare[1] + of_even[i], **near)
    torch.testing.assert_close(wiener.centre_D[:2].sum(), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_a_row_depends_on_itself_alone() -> None:
    wiener = fitted()
    y, sigma, c = noisy(wiener)
    before = wiener(y, sigma, c)
    y[2], sigma[2], c[2] = 5.0, 0.7, 0.5
    after = wiener(y, sigma, c)
    others = [i for i in range(len(y)) if i != 2]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[others], b[others])
        assert not torch.equal(a[2], b[2])


def test_gradients_by_row_under_vmap_are_those_of_the_dense_filter() -> None:
    wiener = fitted()
    y, sigma, c = noisy(wiener)
    direction = torch.randn(N, generator=generator(3))

    def along(y_n: Tensor, s: Tensor, c_d: Tensor) -> Tensor:
        clean: Tensor = wiener(y_n[None], s[None], c_d[None]).clean[0]
        return clean @ direction

    found = vmap(grad(along))(y, sigma, c).double()
    known, v = moments(wiener)
    for row, s, told in zip(found, SIGMAS, c, strict=True):
        a = known if told.any() else wiener.factor_nk.double()
        covariance = a @ a.T + v.diag()
        noisy_covariance = covariance + s**2 * torch.eye(N)
        exact = torch.linalg.solve(noisy_covariance, covariance @ direction.double())
        # the gain's columns mix numbers of deviations 0.003 to 3: errors are in units of the whole
        assert float((row - exact).norm() / exact.norm()) < 1e-3

    def total(y_n: Tensor, s: Tensor, c_d: Tensor) -> Tensor:
        return sum(field.sum() for field in wiener(y_n[None], s[None], c_d[None]))  # type: ignore

    for gradient in vmap(grad(total, argnums=(0, 1)))(y, sigma, c):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("sigma", [1e-3, 160.0, 2e4])
def test_single_precision_suffices_where_numbers_never_vary(sigma: float) -> None:
    """A background that is constant has the smallest variance there is, beside large factors."""
    y, c = volumes()
    y[:, :20] = -1
    wiener = Wiener(N, 5, D)
    wiener.fit(y.clone(), c)
    assert float(wiener.variance_n[:20].max()) == pytest.approx(_FLOOR**2, rel=1e-4)
    s = torch.full((len(y),), sigma)
    seen = y + sigma * torch.randn(y.shape, generator=generator(4))
    found, exact = wiener(seen, s, c), dense(wiener, seen, s, c)
    for field in found:
        assert torch.isfinite(field).all()
    a, v = moments(wiener)
    sd = (a.square().sum(1) + v).sqrt()
    error = (found.clean - exact.clean).abs() / (sd + exact.clean.abs())
    assert float(error.max()) < 300 * EPS
    assert float((found.clean[:, :20] + 1).abs().max()) < 10 * _FLOOR, "nothing is put there"


class Largest(TorchDispatchMode):
    """Notes the numbers of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_no_tensor_has_batch_times_numbers_times_factors() -> None:
    n, k, b = 90_000, 24, 16
    wiener = Wiener(n, k, 2)
    wiener.factor_nk.normal_(generator=generator())
    with torch.no_grad(), Largest() as seen:
        wiener(torch.zeros(b, n), torch.ones(b), torch.ones(b, 2))
    assert seen.numel <= n * max(k + 2, b)


# --- the fit -------------------------------------------------------------------------------------


def numpy_fit(
    y: npt.NDArray[Any], c: npt.NDArray[Any], k: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Condition weights by ridge regression, rank-k covariance by SVD, and what it leaves."""
    x = c - c.mean(0)
    stacked = np.concatenate([x, math.sqrt(_PSEUDO) * np.eye(x.shape[1])])
    wanted = np.concatenate([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(stacked, wanted)[0]
    rest = y - y.mean(0) - x @ weight
    _, s, vt = np.linalg.svd(rest / math.sqrt(len(y)), full_matrices=False)
    low_rank = (vt[:k].T * s[:k] ** 2) @ vt[:k]
    return weight, low_rank, np.square(rest).mean(0) - low_rank.diagonal()


def test_the_fit_is_that_of_a_regression_and_a_singular_value_decomposition() -> None:
    y, c = volumes()
    wiener = Wiener(N, 5, D)
    explained = wiener.fit(y.clone(), c)
    weight, low_rank, left = numpy_fit(y.double().numpy(), c.double().numpy(), 5)
    a, v = moments(wiener)
    np.testing.assert_allclose(wiener.mean_n.numpy(), y.double().mean(0).numpy(), atol=1e-6)
    np.testing.assert_allclose(wiener.weight_Dn.numpy(), weight, atol=1e-5)
    np.testing.assert_allclose((a @ a.T).numpy(), low_rank, atol=1e-5)
    # variances are rounded to levels that are even in the logarithm: by half a step at most
    step = (np.log(left.max()) - np.log(left.min())) / (_LEVELS - 1)
    assert np.abs(np.log(v.numpy()) - np.log(left)).max() <= 0.5 * step + 1e-3
    total = float((y - y.mean(0)).square().sum()) / len(y)
    assert explained == pytest.approx(1 - left.sum() / total, abs=1e-3)


def test_what_a_label_shifts_is_unknown_where_the_label_is() -> None:
    """Two labels, of two numbers and of one: the covariance of whoever lacks either or both."""
    y, c = volumes(400)
    told = c.clone()
    told[:40, :2] = 0  # these lack the first
    wiener = Wiener(N, 5, D, (2, 1))
    wiener.fit(y.clone(), told)
    w = wiener.weight_Dn.double()
    of_first = np.cov(c[40:, :2].double().T.numpy(), bias=True)
    of_second = float(c[:, 2].double().var(correction=0))
    a, v = moments(wiener)
    within = a @ a.T + v.diag()
    first = w[:2].T @ torch.from_numpy(of_first) @ w[:2]
    second = of_second * torch.outer(w[2], w[2])
    assert first.diagonal().mean() > 0.1 and second.diagonal().mean() > 0.1  # or it says nothing
    sigma = torch.full((4,), 0.7)
    asked = c[:4].clone()
    asked[1, :2], asked[2, 2], asked[3] = 0, 0, 0
    expected = (within, within + first, within + second, within + first + second)
    found = wiener(y[:4], sigma, asked)
    for i, covariance in enumerate(expected):
        mean = wiener.centred(asked)[i].double()
        total = covariance + 0.49 * torch.eye(N, dtype=torch.float64)
        clean = mean + covariance @ torch.linalg.solve(total, y[i].double() - mean)
        torch.testing.assert_close(found.clean[i].double(), clean, rtol=1e-3, atol=1e-3)
        seen = (y[i].double() - mean) / total.diagonal().sqrt()
        torch.testing.assert_close(found.seen[i].double(), seen, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lacking", [0.0, 0.1, 0.3, 0.5])
def test_people_without_a_label_do_not_make_its_shift_texture(lacking: float) -> None:
    """The true covariances, of whoever is known and of whoever is not, at any share without."""
    g, m, n = generator(5), 4000, 30
    shift = 2 * torch.randn(n, generator=g)
    a = torch.randn(n, 2, generator=g)
    c = torch.nn.functional.one_hot(torch.randint(2, (m,), generator=g), 2).float()
    y = (
        c[:, :1] * shift
        + torch.randn(m, 2, generator=g) @ a.T
        + 0.3 * torch.randn(m, n, generator=g)
    )
    told = c.clone()
    told[: round(lacking * m)] = 0
    wiener = Wiener(n, 4, 2)
    wiener.fit(y.clone(), told)
    within = (a @ a.T + 0.09 * torch.eye(n)).double()
    factors, v = moments(wiener)
    known = factors @ factors.T + v.diag()
    every = wiener.factor_nk.double()
    unknown = every @ every.T + v.diag()
    truth = within + 0.25 * torch.outer(shift, shift).double()
    assert float(known.trace() / within.trace()) == pytest.approx(1, abs=0.06)
    assert float(unknown.trace() / truth.trace()) == pytest.approx(1, abs=0.06)


def test_somebody_scanned_often_counts_as_one_person() -> None:
    """The same scan three times, a third each, is that scan once."""
    y, c = volumes()
    once, often = Wiener(N, 5, D), Wiener(N, 5, D)
    explained = once.fit(y.clone(), c)
    rows = torch.cat([torch.zeros(2, dtype=torch.long), torch.arange(len(y))])
    weight = torch.ones(len(rows))
    weight[rows == 0] = 1 / 3
    assert often.fit(y[rows], c[rows], weight) == pytest.approx(explained, abs=1e-5)
    (a, v), (b, w) = moments(once), moments(often)
    torch.testing.assert_close(often.mean_n, once.mean_n, atol=1e-5, rtol=0)
    torch.testing.assert_close(often.weight_Dn, once.weight_Dn, atol=1e-4, rtol=0)
    torch.testing.assert_close(b @ b.T, a @ a.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(w, v, rtol=0.1, atol=0)  # a level further at most
    alike = Wiener(N, 5, D)
    alike.fit(y[rows], c[rows])
    assert (alike.mean_n - once.mean_n).abs().max() > 0.01


def test_a_known_gaussian_is_recovered_from_many_samples() -> None:
    """Equal texture everywhere, so that the covariance's own directions are those of A."""
    g, m, n, k = generator(), 1500, 12, 2
    basis = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    a = basis * torch.tensor([2.0, 1.0], dtype=torch.float64)
    mean, weight, texture = torch.linspace(-1, 1, n).double(), torch.linspace(0, 1, n).double(), 0.1
    c = torch.randint(2, (m, 1), generator=g).double() * 2 - 1
    x = mean + c * weight + torch.randn(m, k, generator=g, dtype=torch.float64) @ a.T
    x = x + texture * torch.randn(m, n, generator=g, dtype=torch.float64)
    wiener = Wiener(n, k, 1)
    wiener.fit(x.float(), c.float())
    found, v = moments(wiener)
    # of a mean, a slope and a covariance of m samples with deviations up to 2
    error = 2 / math.sqrt(m)
    at_zero = wiener.mean_n.double() - wiener.centre_D.double() @ wiener.weight_Dn.double()
    torch.testing.assert_close(at_zero, mean, atol=5 * error, rtol=0)
    torch.testing.assert_close(wiener.weight_Dn[0].double(), weight, atol=5 * error, rtol=0)
    # the factors take the texture along their directions with them
    expected = a @ a.T + texture**2 * basis @ basis.T
    torch.testing.assert_close(found @ found.T, expected, atol=5 * 2 * error, rtol=0)
    left = texture**2 * (1 - basis.square().sum(1))
    torch.testing.assert_close(v, left, rtol=5 * math.sqrt(2 / m), atol=0)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_few_patients_give_few_factors(m: int) -> None:
    """At most a third as many as there are volumes: one patient must not become a direction."""
    y, c = (t[:m] for t in volumes())
    wiener = Wiener(N, 24, D)
    explained = wiener.fit(y.clone(), c)
    assert int(moments(wiener)[0].any(0).sum()) == m // 3
    assert 0 <= explained <= 1
    f = wiener(y, torch.full((m,), 0.5), c)
    assert all(torch.isfinite(field).all() for field in f)
    torch.testing.assert_close(wiener.mean_n, y.mean(0))


def test_volumes_that_are_all_the_same_are_explained_by_their_mean() -> None:
    y = torch.linspace(-1, 1, N).expand(9, N)
    wiener = Wiener(N, 4, D)
    explained = wiener.fit(y.clone(), torch.ones(9, D))
    assert 0 <= explained <= 1
    f = wiener(y + 3, torch.full((9,), 1.0), torch.ones(9, D))
    torch.testing.assert_close(f.clean, y, atol=10 * _FLOOR, rtol=0)
    assert all(torch.isfinite(field).all() for field in f)


def test_without_conditions_the_rest_is_the_same() -> None:
    y, c = volumes()
    plain, told = Wiener(N, 5, 0), Wiener(N, 5, D)
    plain.fit(y.clone(), c[:, :0])
    told.fit(y.clone(), torch.zeros_like(c))
    for name in ("mean_n", "variance_n"):
        torch.testing.assert_close(getattr(plain, name), getattr(told, name))
    s = torch.full((len(y),), 0.5)
    torch.testing.assert_close(plain(y, s, c[:, :0]).clean, told(y, s, c).clean)


def test_a_second_fit_leaves_nothing_of_the_first() -> None:
    """Of a model that goes on from another's weights, whose factors may have been more."""
    y, c = volumes()
    again, once = fitted(), Wiener(N, 5, D)
    again.fit(y[:6].clone(), c[:6])
    once.fit(y[:6].clone(), c[:6])
    for a, b in zip(again.buffers(), once.buffers(), strict=True):
        assert torch.equal(a, b)
