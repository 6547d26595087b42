"""The cohort's Gaussian against the moments of the scans it was fitted to, in closed form.

Its fit is that of the Wiener filter, and tested there with labels that are missing and people who
count by weight (test_wiener.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from synthmed.backbones.generative import VolumeSpec
from synthmed.backbones.nets.gaussian import _PSEUDO, CohortGaussian, LinearCode
from synthmed.backbones.nets.intensity import output

N, M = 40, 12


def scans() -> tuple[Tensor, Tensor]:
    """(M, N) volumes and (M, 2) labels, half of either category."""
    g = torch.Generator().manual_seed(0)
    c = torch.eye(2).repeat(M // 2, 1)
    return torch.randn(M, N, generator=g) + c @ torch.tensor([[-1.0], [2.0]]) + 3, c


def columns(gaussian: CohortGaussian, label: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N,) and A (N, k) of what is drawn for one label (2,), float64: a draw is linear in its
    numbers, so that these are all of it."""
    wide = label.expand(gaussian.columns, -1)
    mean = gaussian.draw(torch.zeros(1, gaussian.columns), label[None])[0]
    return mean.double(), (gaussian.draw(torch.eye(gaussian.columns), wide) - mean).T.double()


def test_with_a_factor_a_person_it_has_the_whole_covariance() -> None:
    y, c = scans()
    gaussian = CohortGaussian(N, M, 2)
    assert gaussian.fit(y.clone(), c) == pytest.approx(1, abs=1e-6)
    rest = y.double() - torch.stack([columns(gaussian, k)[0] for k in c])
    for label in torch.eye(2):
        mean, a = columns(gaussian, label)
        own = y[c @ label > 0].double().mean(0)
        # shifted by the difference of the classes' means, shrunk by five people's doubt
        middle = y.double().mean(0)
        shrunk = (M / 2) / (M / 2 + _PSEUDO)
        torch.testing.assert_close(mean, middle + shrunk * (own - middle), atol=1e-5, rtol=0)
        torch.testing.assert_close(a @ a.T, rest.T @ rest / M, atol=1e-5, rtol=0)


def test_fewer_factors_are_the_strongest_components_and_the_share_says_what_is_missing() -> None:
    y, c = scans()
    whole, part = CohortGaussian(N, M, 2), CohortGaussian(N, 3, 2)
    whole.fit(y.clone(), c)
    share = part.fit(y.clone(), c)
    (_, every), (_, few) = columns(whole, c[0]), columns(part, c[0])
    wanted = torch.linalg.eigvalsh(every.T @ every)[-3:]
    torch.testing.assert_close(torch.linalg.eigvalsh(few.T @ few)[-3:], wanted)
    missing = float((every.square().sum() - few.square().sum()) * M)
    total = float((y - y.mean(0)).square().sum())
    assert share == pytest.approx(1 - missing / total, abs=1e-5)


def test_a_label_that_is_unknown_is_drawn_along() -> None:
    y, c = scans()
    gaussian = CohortGaussian(N, 4, 2)
    gaussian.fit(y, c)
    mean, a = columns(gaussian, torch.zeros(2))
    known = [columns(gaussian, label) for label in torch.eye(2)]
    apart = (known[0][0] - known[1][0]) / 2
    torch.testing.assert_close(mean, (known[0][0] + known[1][0]) / 2, atol=1e-5, rtol=0)
    for _, b in known:
        torch.testing.assert_close(a @ a.T, b @ b.T + torch.outer(apart, apart), atol=1e-4, rtol=0)


def test_people_that_a_factor_needs() -> None:
    y, c = scans()
    for needed in (1, 3, 5):
        gaussian = CohortGaussian(N, 64, 2, per_factor=needed)
        gaussian.fit(y.clone(), c)
        # twelve people less their mean have a rank of eleven
        rank = int(torch.linalg.matrix_rank(columns(gaussian, c[0])[1], atol=1e-3))
        assert rank == min(M // needed, M - 1)


def test_nobody_it_was_fitted_to_is_at_a_distance_and_others_are() -> None:
    """The distance is that of a least squares fit of everything a draw is made of."""
    y, c = scans()
    gaussian = CohortGaussian(N, M, 2)
    gaussian.fit(y.clone(), c)
    assert gaussian.distance(y, c).max() < 1e-9
    other = torch.randn(3, N, generator=torch.Generator().manual_seed(1))
    for label in (torch.tensor([1.0, 0.0]), torch.zeros(2)):
        mean, a = columns(gaussian, label)
        wide = (other.double() - mean).T.numpy()
        fit = np.linalg.lstsq(a.numpy(), wide, rcond=1e-4)[0]
        wanted = ((wide - a.numpy() @ fit) ** 2).mean(0)
        found = gaussian.distance(other, label.expand(3, -1))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
        assert (found > 0.1).all()


# --- codes --------------------------------------------------------------------------------------


def test_a_code_is_the_least_squares_fit_of_what_counts() -> None:
    y, c = scans()
    linear = LinearCode(N, 3, 2)
    linear.fit(y.clone(), c)
    other = torch.randn(3, N, generator=torch.Generator().manual_seed(1)) + 3
    for label in (torch.tensor([1.0, 0.0]), torch.zeros(2)):
        mean, a = columns(linear, label)
        fit = np.linalg.lstsq(a.numpy(), (other.double() - mean).T.numpy(), rcond=1e-4)[0]
        code = linear.code(other, label.expand(3, -1))
        np.testing.assert_allclose(code.T.double().numpy(), fit, rtol=1e-3, atol=1e-4)
        drawn = linear.draw(code, label.expand(3, -1))
        torch.testing.assert_close(
            drawn.double(), mean + (a @ torch.from_numpy(fit)).T, atol=1e-3, rtol=0
        )


def test_who_it_was_fitted_to_has_standard_codes_and_is_given_back() -> None:
    """With a factor for everybody, whatever else a condition holds behind the labels."""
    y, c = scans()
    linear = LinearCode(N, 64, 2)
    linear.fit(y.clone(), c)
    told = torch.cat([c, torch.rand(M, 3, generator=torch.Generator().manual_seed(2))], 1)
    code = linear.code(y, told)
    used = code.square().mean(0) > 0.5
    assert int(used.sum()) == M - 1
    torch.testing.assert_close(code[:, used].mean(0), torch.zeros(M - 1), atol=1e-3, rtol=0)
    torch.testing.assert_close(code[:, used].square().mean(0), torch.ones(M - 1), atol=2e-3, rtol=0)
    assert not code[:, linear.factors :].any(), "labels are known, and their columns do not count"
    begun = linear.begin(torch.cat([code, torch.full((M, 2), 9.0)], 1), told)
    torch.testing.assert_close(output(begun), y.clamp(min=0), atol=5e-3, rtol=0)


def test_before_it_is_fitted_every_code_is_nothing() -> None:
    y, c = scans()
    assert not LinearCode(N, 4, 2).code(y, c).any()


def test_volumes_of_a_kind_have_one_where_they_have_factors() -> None:
    spec = VolumeSpec(2, (3, 4, 5), 6, told_width=1, label_widths=(3, 2))
    linear = LinearCode.of(spec, 7)
    assert linear is not None
    assert linear.factor_nk.shape == (2 * 3 * 4 * 5, 7 + 5)
    assert linear.label_widths == (3, 2)
    assert LinearCode.of(spec, 0) is None
