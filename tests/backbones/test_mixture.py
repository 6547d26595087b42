"""The density fitted to codes: closed forms, a planted mixture, and its sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from synthmed.backbones.nets.mixture import CodeMixture, regress

N, SIZE = 240, 5


def planted(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two clusters of codes along the first axis, shifted by a condition along the second."""
    rng = np.random.default_rng(seed)
    group = rng.random(n) < 0.3
    c = rng.uniform(-1, 1, (n, 1))
    z = rng.standard_normal((n, SIZE)) * [0.3, 0.5, 0.1, 0.2, 0.4]
    z[:, 0] += np.where(group, 4, -1)
    z[:, 1] += 3 * c[:, 0]
    return torch.tensor(z, dtype=torch.float32), torch.tensor(c, dtype=torch.float32)


def drawn(mixture: CodeMixture, c: Tensor, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    n = len(c)
    return mixture(torch.rand(n, generator=g), torch.randn(n, mixture.n_numbers, generator=g), c)


def test_the_regression_is_that_of_the_normal_equations_when_the_condition_varies() -> None:
    z, c = planted()
    weight, bias, rest = regress(z, c)
    design = np.c_[np.ones(N), c.double().numpy()]
    expected, *_ = np.linalg.lstsq(design, z.double().numpy(), rcond=None)
    np.testing.assert_allclose(bias, expected[0], rtol=0.01, atol=0.002)
    np.testing.assert_allclose(weight[0], expected[1], rtol=0.01, atol=0.002)
    torch.testing.assert_close(rest, z.double() - c.double() @ weight - bias)


def test_a_condition_that_never_varies_steers_nothing() -> None:
    z, _ = planted()
    weight, bias, _ = regress(z, torch.ones(N, 2))
    assert (weight == 0).all()
    torch.testing.assert_close(bias, z.double().mean(0))


def test_one_gaussian_is_recovered_in_closed_form() -> None:
    """With one component EM ends at the sample's own mean and covariance."""
    rng = np.random.default_rng(3)
    root = rng.standard_normal((SIZE, SIZE))
    z = torch.tensor(rng.standard_normal((N, SIZE)) @ root.T + 2, dtype=torch.float32)
    mixture = CodeMixture(SIZE, 0, components=1, directions=SIZE)
    figures = mixture.fit(z, torch.zeros(N, 0))
    assert figures == {"mixture_components": 1, "mixture_explained": 1.0}
    u = mixture.directions_QN.double()
    factor = mixture.factor_MQQ[0].double()
    covariance = u.T @ factor @ factor.T @ u
    expected = torch.cov(z.double().T, correction=0)
    torch.testing.assert_close(covariance, expected, rtol=1e-4, atol=1e-3)
    centre = mixture.mean_MQ[0].double() @ u + mixture.bias_N.double()
    torch.testing.assert_close(centre, z.double().mean(0), rtol=1e-4, atol=1e-4)


def test_a_planted_mixture_is_found_and_sampled_given_its_condition() -> None:
    """Each cluster's mean and covariance are those of its own patients, moved by the condition."""
    z, c = planted()
    mixture = CodeMixture(SIZE, 1, components=6, directions=SIZE)
    assert mixture.fit(z, c)["mixture_components"] == 2
    weight, bias, rest = regress(z, c)
    high = z[:, 0] > 1.5
    for value in (-0.8, 0.5):
        s = drawn(mixture, torch.full((20_000, 1), value)).double()
        shift = value * weight[0] + bias
        split = shift[0] + (rest[high, 0].mean() + rest[~high, 0].mean()) / 2
        upper = s[:, 0] > split
        # the two clusters, and nothing between them
        assert ((s[:, 0] - split).abs() < 1).double().mean() < 0.002
        assert float(upper.double().mean()) == pytest.approx(float(high.double().mean()), abs=0.01)
        for mine, theirs in ((upper, high), (~upper, ~high)):
            expected = rest[theirs] + shift
            torch.testing.assert_close(s[mine].mean(0), expected.mean(0), atol=0.03, rtol=0)
            # along the principal directions, since the covariances chosen may be diagonal there
            along = torch.nn.functional.normalize(mixture.directions_QN.double(), dim=1)
            torch.testing.assert_close(
                (s[mine] @ along.T).var(0),
                (expected @ along.T).var(0, correction=0),
                atol=0.002,
                rtol=0.05,
            )


def test_the_choice_is_that_of_the_least_bic_among_reference_fits() -> None:
    """Against scikit-learn on the codes themselves, whose BIC turning the axes leaves alone."""
    z, _ = planted()
    x = (z - z.mean(0)).numpy().astype(float)
    bic = [
        GaussianMixture(m, covariance_type="full", random_state=0, max_iter=500).fit(x).bic(x)
        for m in (1, 2, 3)
    ]
    assert np.argmin(bic) == 1
    mixture = CodeMixture(SIZE, 0, components=3, directions=SIZE)
    assert mixture.fit(z, torch.zeros(N, 0))["mixture_components"] == 2


def test_one_gaussian_is_not_split() -> None:
    z = torch.tensor(np.random.default_rng(0).standard_normal((N, SIZE)), dtype=torch.float32)
    mixture = CodeMixture(SIZE, 0, components=8, directions=SIZE)
    assert mixture.fit(z, torch.zeros(N, 0))["mixture_components"] == 1


@pytest.mark.parametrize("n", [4, 12, 40])
def test_no_component_rests_on_a_handful_of_patients(n: int) -> None:
    """As many clusters as patients would fit best, and would be those patients."""
    rng = np.random.default_rng(0)
    spots = rng.standard_normal((4, 16)) * 10
    z = torch.tensor(spots[np.arange(n) % 4] + 1e-3 * rng.standard_normal((n, 16)))
    mixture = CodeMixture(16, 0, components=8, directions=16)
    figures = mixture.fit(z.float(), torch.zeros(n, 0))
    shares = mixture.share_M[mixture.share_M > 0]
    assert len(shares) == figures["mixture_components"]
    assert len(shares) == 1 or float(shares.min()) * n >= 9.99
    assert torch.isfinite(drawn(mixture, torch.zeros(50, 0))).all()


def test_no_component_rests_on_scans_of_few_people() -> None:
    """Forty codes, ten each of four people."""
    rng = np.random.default_rng(0)
    spots = rng.standard_normal((4, SIZE)) * 10
    z = torch.tensor(np.repeat(spots, 10, axis=0) + 1e-3 * rng.standard_normal((40, SIZE)))
    counted = {}
    for people in (4, None):
        mixture = CodeMixture(SIZE, 0, components=4, directions=SIZE)
        counted[people] = mixture.fit(z.float(), torch.zeros(40, 0), people)["mixture_components"]
    assert counted == {4: 1, None: 4}


def test_as_many_codes_of_each_person_change_nothing() -> None:
    z, c = planted()
    once, twice = (CodeMixture(SIZE, 1, components=4, directions=SIZE) for _ in range(2))
    figures = once.fit(z, c)
    assert twice.fit(z.repeat(2, 1), c.repeat(2, 1), len(z)) == figures
    for name in ("weight_DN", "bias_N", "share_M"):
        torch.testing.assert_close(getattr(twice, name), getattr(once, name), atol=1e-3, rtol=1e-3)


def test_directions_hold_the_most_variance_there_is() -> None:
    rng = np.random.default_rng(0)
    sd = np.array([5, 3, 1, 0.5, 0.1])
    z = torch.tensor(rng.standard_normal((N, SIZE)) * sd, dtype=torch.float32)
    mixture = CodeMixture(SIZE, 0, components=1, directions=2)
    explained = mixture.fit(z, torch.zeros(N, 0))["mixture_explained"]
    values = np.linalg.eigvalsh(np.cov(z.numpy().T))
    assert explained == pytest.approx(values[-2:].sum() / values.sum(), abs=1e-4)
    s = drawn(mixture, torch.zeros(20_000, 0))
    assert float(s[:, 0].std()) == pytest.approx(5, rel=0.1)
    assert float(s[:, 4].std()) < 0.1


def test_with_few_people_the_whole_variance_is_drawn_and_shape_along_the_strongest_alone() -> None:
    """Thirty people of two clusters along the first of twenty axes: ten directions may have a
    shape, the other ten their variance."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 20)) * np.linspace(1, 0.2, 20)
    x[:, 0] = np.where(np.arange(30) < 15, 5, -5) + 0.1 * rng.standard_normal(30)
    z = torch.tensor(x, dtype=torch.float32)
    mixture = CodeMixture(20, 0, components=4, directions=20)
    assert mixture.fit(z, torch.zeros(30, 0)) == {
        "mixture_components": 2,
        "mixture_explained": 1.0,
    }
    s = drawn(mixture, torch.zeros(40_000, 0)).double()
    assert (s[:, 0].abs() > 3).all(), "two clusters and nothing between them"
    # along the principal directions themselves, whose variances are the codes' own
    u = torch.nn.functional.normalize(mixture.directions_QN.double(), dim=1)
    found, wanted = (v.double() @ u.T for v in (s, z))
    torch.testing.assert_close(found.var(0), wanted.var(0, correction=0), rtol=0.05, atol=1e-3)
    weak = torch.corrcoef(found.T)[10:, :]
    assert float((weak - torch.eye(20)[10:]).abs().max()) < 0.03


def test_a_component_without_a_share_is_never_drawn() -> None:
    mixture = CodeMixture(1, 0, components=3, directions=1)
    mixture.share_M.copy_(torch.tensor([0.25, 0.75, 0.0]))
    mixture.mean_MQ.copy_(torch.tensor([[1.0], [2.0], [9.0]]))
    u = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-24])
    got = mixture(u, torch.zeros(4, 1), torch.zeros(4, 0))
    assert got[:, 0].tolist() == [1, 1, 2, 2]


def test_the_same_codes_give_the_same_bits_and_are_saved() -> None:
    a, b = (CodeMixture(SIZE, 1, components=4, directions=3) for _ in range(2))
    a.fit(*planted())
    b.fit(*planted())
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    fresh = CodeMixture(SIZE, 1, components=4, directions=3)
    fresh.load_state_dict(a.state_dict())
    c = torch.linspace(-1, 1, 7)[:, None]
    assert torch.equal(drawn(fresh, c), drawn(a, c))
