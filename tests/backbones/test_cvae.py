"""The VAE's total correlation against closed forms, and what it shows of itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.func import grad, vmap

from synthmed.backbones.cvae import CVAE, ConditionalVAE
from synthmed.backbones.examining import scans, shares, units
from synthmed.backbones.generative import Batch, VolumeSpec, named_parameters
from synthmed.backbones.nets.aggregate import (
    _FAST,
    _GAIN,
    AggregatePosterior,
    gaussian_total_correlation,
)
from synthmed.backbones.nets.convolutional import _NARROW
from synthmed.backbones.nets.noise import _FLOOR
from synthmed.config import Optimizer
from synthmed.errors import UsageError
from synthmed.keys import Key, torch_generator

GRID, L, D = (9, 12, 10), 3, 2


def posteriors(n: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and conditions of n posteriors; the latents are correlated."""
    g = torch.Generator().manual_seed(seed)
    root = torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [-0.3, 0.4, 0.7]])
    c = torch.randn(n, D, generator=g)
    mean = torch.randn(n, L, generator=g) @ root.T + c @ torch.tensor([[1.0, 0, 2], [0, -1, 0.5]])
    return mean.double(), (0.01 + 0.1 * torch.rand(n, L, generator=g)).double(), c.double()


def moments(mean: Tensor, variance: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regression on the condition, and the covariance of what it leaves, noise included."""
    design = torch.cat([torch.ones(len(c), 1).to(c), c], 1)
    solution = torch.linalg.lstsq(design, mean).solution
    rest = mean - design @ solution
    return solution[0], solution[1:], rest.T @ rest / len(rest) + variance.mean(0).diag()


def fitted(mean: Tensor, variance: Tensor, c: Tensor) -> AggregatePosterior:
    """The module at its optimum: the moments of the posteriors."""
    bias, weight, covariance = moments(mean, variance, c)
    sd = covariance.diagonal().sqrt()
    r = AggregatePosterior(D, L).double()
    r.mean_L.data.copy_(bias / _GAIN)
    r.weight_DL.data.copy_(weight / _GAIN)
    r.log_sd_L.data.copy_(sd.log() / _GAIN)
    r.correlation_LL.data.copy_((covariance / sd / sd[:, None]).tril(-1) / _FAST)
    return r


def closed_form(mean: Tensor, variance: Tensor, c: Tensor) -> Tensor:
    """Total correlation of a Gaussian: -1/2 log det of its correlations."""
    *_, covariance = moments(mean, variance, c)
    sd = covariance.diagonal().sqrt()
    return -0.5 * torch.linalg.slogdet(covariance / sd / sd[:, None]).logabsdet


def half_squares(mean: Tensor, variance: Tensor, c: Tensor) -> Tensor:
    """1/2 sum_(i<j) of the squared covariances, in units of the deviations as they stand."""
    *_, covariance = moments(mean, variance, c)
    sd = covariance.diagonal().sqrt().detach()
    return 0.5 * (covariance / sd / sd[:, None]).tril(-1).square().sum()


def test_the_mean_penalty_is_its_closed_form_once_fitted() -> None:
    q = posteriors()
    with torch.no_grad():
        penalty, fit = fitted(*q)(*q)
    assert penalty.shape == fit.shape == (50,)
    assert float(penalty.mean()) == pytest.approx(float(half_squares(*q)), rel=1e-6)
    assert float(penalty.mean()) > 0.3


def test_that_is_the_leading_term_of_a_gaussian_s_total_correlation() -> None:
    """-1/2 log det(1 + E) = 1/4 tr E^2 - 1/6 tr E^3 + ... for the off-diagonal part E."""
    mean, variance, c = posteriors(4000)
    apart = torch.linalg.cholesky(torch.linalg.inv(moments(mean, 0 * variance, c)[2]))
    white = (mean - mean.mean(0)) @ apart
    for size in (0.1, 0.01):
        mixed = white + size * white.roll(1, 1)
        part = half_squares(mixed, 0 * variance, c) / closed_form(mixed, 0 * variance, c)
        assert abs(float(part) - 1) < 2 * size


def test_its_gradient_is_that_of_the_closed_form_though_the_moments_are_held_fixed() -> None:
    mean, variance, c = posteriors()
    leaves = [mean.requires_grad_()]
    (expected,) = torch.autograd.grad(half_squares(mean, variance, c), leaves)
    penalty, _ = fitted(mean.detach(), variance, c)(mean, variance, c)
    (got,) = torch.autograd.grad(penalty.mean(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert expected.abs().max() > 1e-3


def test_the_fit_has_no_slope_at_the_moments_and_one_beside_them() -> None:
    q = posteriors()
    r = fitted(*q)
    slopes = torch.autograd.grad(r(*q)[1].mean(), list(r.parameters()))
    assert all(s.abs().max() < 1e-5 for s in slopes)
    for p in r.parameters():
        p.data += 0.001
        assert any(
            s.abs().max() > 1e-2 for s in torch.autograd.grad(r(*q)[1].mean(), list(r.parameters()))
        )
        p.data -= 0.001


def test_neither_part_teaches_what_the_other_is_for() -> None:
    mean, variance, c = posteriors()
    mean.requires_grad_()
    r = AggregatePosterior(D, L).double()
    penalty, fit = r(mean, variance, c)
    reached = torch.autograd.grad(penalty.sum(), list(r.parameters()), allow_unused=True)
    assert all(g is None for g in reached)
    assert torch.autograd.grad(fit.sum(), mean, allow_unused=True)[0] is None


def test_a_known_gaussian_s_correlation_is_learned_from_single_patients() -> None:
    """By the gradient a training run uses, at its learning rate, from draws of a known Gaussian."""
    correlation, sd = 0.9, torch.tensor([0.2, 3.0])
    r = AggregatePosterior(0, 2)
    optimizer = torch.optim.Adam(r.parameters(), lr=2e-3)
    g = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
        u = torch.randn(n, 2, generator=g)
        second = correlation * u[:, 0] + math.sqrt(1 - correlation**2) * u[:, 1]
        return torch.stack([u[:, 0], second], 1) * sd, torch.zeros(n, 2), torch.zeros(n, 0)

    assert float(r(*draw(4000))[0].mean()) == 0
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 800)
        optimizer.zero_grad()
        r(*draw(16))[1].mean().backward()
        optimizer.step()
    measured = r(*draw(20_000))[0].detach().mean()
    assert float(measured) == pytest.approx(0.5 * correlation**2, rel=0.1)


def test_the_pull_on_a_patient_is_bounded_by_its_distance() -> None:
    """However far the moments lag behind: this is what keeps training from running away."""
    mean, variance, c = posteriors()
    r = fitted(mean, variance, c)
    r.correlation_LL.data.mul_(100)
    far = (mean * 1000).requires_grad_()
    (pull,) = torch.autograd.grad(r(far, variance, c)[0].sum(), far)
    sd = (_GAIN * r.log_sd_L).exp().detach()
    u = (far.detach() - _GAIN * (r.mean_L + c @ r.weight_DL).detach()) / sd
    assert (pull * sd).norm(dim=1).le((L - 1) * u.norm(dim=1)).all()


@pytest.mark.parametrize("weight", [0.0, 20.0])
def test_the_penalty_pulls_latents_apart_while_the_moments_follow(weight: float) -> None:
    """Free posteriors tied to where they began; measured by the whole closed form."""
    start, variance, c = (t.float() for t in posteriors(200))
    mean = start.clone().requires_grad_()
    r = AggregatePosterior(D, L)
    optimizer = torch.optim.Adam([mean, *r.parameters()], lr=2e-3)
    for _ in range(600):
        penalty, fit = r(mean, variance, c)
        loss = (0.5 * ((mean - start) ** 2).sum(1) + weight * penalty + fit).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after = (
        float(closed_form(start, variance, c)),
        float(closed_form(mean.detach(), variance, c)),
    )
    assert before > 0.5
    assert after < 0.1 * before if weight else after == pytest.approx(before, rel=1e-4)


def test_training_with_a_strong_weight_does_not_run_away() -> None:
    """What the whole of -1/2 log det R did within a hundred steps, by its narrow directions."""
    g = torch.Generator().manual_seed(0)
    s = torch.randn(96, 4, generator=g)
    s[:, 1] = 0.9 * s[:, 0] + 0.44 * s[:, 1]
    maps = torch.nn.functional.interpolate(
        torch.randn(4, 1, 3, 3, 3, generator=g), (8, 8, 8), mode="trilinear"
    )
    x = 0.5 + 0.1 * torch.einsum("nk,kcxyz->ncxyz", s, maps)
    data = Batch(
        x[:, None], torch.zeros(96, 1, 0), torch.zeros(96, 1, 0, 8, 8, 8), torch.ones(96, 1)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CVAE(latent=6, widths=(4, 8), warmup=0.1, total_correlation=50)
        vae = config.build(VolumeSpec(1, (8, 8, 8), 0), Optimizer())
    loss = vae.rounds()[0].phases[0].loss
    params = named_parameters(vae)
    own = [p for p in params.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=2e-3, betas=(0.9, 0.99))
    for step in range(200):
        at = torch.randperm(96, generator=g)[:16]
        noise = {"eps_SL": torch.randn(16, 1, 6, generator=g)}
        optimizer.zero_grad()
        loss(params, Batch(*(t[at] for t in data)), noise, step / 200).mean().backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
    figures = vae._finish([data])
    assert figures["kl_nats"] < 100
    assert figures["latent_active"] >= 2
    assert vae.examine(data, None).figures["psnr_train"] > 15


def test_a_gaussian_with_independent_parts_has_none() -> None:
    assert gaussian_total_correlation(torch.tensor([0.1, 2.0, 30.0]).diag()) == pytest.approx(
        0, abs=1e-6
    )


# --- in the model --------------------------------------------------------------------------------


def model(**settings: Any) -> ConditionalVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CVAE(widths=(4, 8), latent=4, **settings)
        return config.build(VolumeSpec(2, GRID, D), Optimizer())


def batch(patients: int = 3, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(patients, 2)
    mask[0, 1] = 0
    return Batch(
        torch.rand(patients, 2, 2, *GRID, generator=g),
        torch.rand(patients, 2, D, generator=g),
        torch.zeros(patients, 2, 0, *GRID),
        mask,
    )


def draws(vae: ConditionalVAE) -> dict[str, Tensor]:
    phase = vae.rounds()[0].phases[0]
    each = [phase.draw(torch.Generator().manual_seed(i), 2) for i in range(3)]
    return {k: torch.stack([d[k] for d in each]) for k in each[0]}


def test_without_a_weight_nothing_of_it_is_there() -> None:
    assert "aggregate" not in model().modules
    assert "aggregate" in model(total_correlation=1.0).modules


def test_with_a_weight_one_patient_s_loss_is_its_own() -> None:
    vae = model(total_correlation=5.0)
    loss = vae.rounds()[0].phases[0].loss
    params = named_parameters(vae)
    first, other = batch(), batch(seed=1)
    mixed = first._replace(x=first.x.clone(), c=first.c.clone())
    mixed.x[1], mixed.c[1] = other.x[1], other.c[1]
    a, b = (loss(params, x, draws(vae), 0.5) for x in (first, mixed))
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert a[1] != b[1]


def test_with_a_weight_gradients_by_patient_equal_a_loop_and_reach_r() -> None:
    vae = model(total_correlation=5.0)
    loss = vae.rounds()[0].phases[0].loss
    params = {k: p.detach() for k, p in named_parameters(vae).items()}
    x, d = batch(), draws(vae)

    def one(p: dict[str, Tensor], b: Batch, r: dict[str, Tensor]) -> Tensor:
        return loss(p, Batch(*(t[None] for t in b)), {k: v[None] for k, v in r.items()}, 0.5)[0]

    each = vmap(grad(one), in_dims=(None, 0, 0))(params, x, d)
    for i in range(3):
        alone = grad(one)(params, Batch(*(t[i] for t in x)), {k: v[i] for k, v in d.items()})
        size = torch.stack([g.norm() for g in alone.values()]).norm()
        assert all((each[k][i] - g).norm() <= 1e-4 * size for k, g in alone.items())
    assert each["aggregate.correlation_LL"].abs().max() > 0


def test_given_masks_are_refused_with_the_families_that_take_them() -> None:
    with pytest.raises(UsageError, match="cvae: cannot draw an image for a mask") as error:
        CVAE().build(VolumeSpec(1, GRID, 0, given=1), Optimizer())
    assert "ddpm or cgan" in str(error.value)


def test_finish_tells_the_closed_form_of_the_posteriors() -> None:
    vae = model()
    figures = vae._finish([batch(40)])
    x = batch(40)
    keep = x.mask.flatten() > 0
    mean, log_var = vae.encoder(x.x.flatten(0, 1)[keep], x.c.flatten(0, 1)[keep])
    expected = closed_form(
        mean.detach().double(), log_var.detach().exp().double(), x.c.flatten(0, 1)[keep].double()
    )
    # the regression of `finish` has a small ridge
    assert figures["total_correlation"] == pytest.approx(float(expected), rel=0.02, abs=1e-3)


def test_examine_shows_reconstruction_and_every_latent() -> None:
    vae = model()
    seen = vae.examine(batch(), batch(seed=1))
    assert {"psnr_train", "psnr_holdout", "ssim_train", "ssim_holdout"} <= set(seen.figures)
    x, c = batch().x.flatten(0, 1), batch().c.flatten(0, 1)
    keep = batch().mask.flatten() > 0
    with torch.no_grad():
        copy = vae.decoder(vae.encoder(x[keep], c[keep])[0], c[keep])
    # PSNR by its definition, data range 1
    error = ((copy - x[keep]) ** 2).flatten(1).mean(1).double()
    assert seen.figures["psnr_train"] == pytest.approx(
        float((-10 * error.log10()).mean()), abs=1e-4
    )
    table = seen.tables["latents"]
    assert sorted(int(r["unit"]) for r in table) == [1, 2, 3, 4]
    assert sum(float(r["decoded_variance"]) for r in table) == pytest.approx(1, abs=1e-3)
    assert len({frozenset(r) for r in table}) == 1
    assert {"condition_1", "condition_2", "brightness", "volume", "channel_2"} <= set(table[0])
    assert set(seen.pictures) == {"latents", "reconstructions_train", "reconstructions_holdout"}
    assert "psnr_holdout" not in vae.examine(batch(), None).figures


def test_a_unit_s_row_says_what_it_moves() -> None:
    """Codes planted: unit 2 is the brightness and moves four times unit 1's amplitude."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(30, 3, generator=g)
    c = torch.stack([z[:, 0], torch.ones(30)], 1)
    x = (0.5 + 0.05 * z[:, 1])[:, None, None, None, None].expand(30, 1, 8, 8, 8)
    gain = torch.tensor([1.0, 4.0, 0.0])

    def decode(code: Tensor) -> Tensor:
        return (code * gain).sum(1)[:, None, None, None, None].expand(-1, 1, 8, 8, 8)

    rows = units(decode, z, torch.ones(3), x, c, {"kl_nats": torch.tensor([3.0, 2.0, 1.0])})
    assert [r["unit"] for r in rows] == [2, 1, 3]
    assert [r["decoded_variance"] for r in rows] == pytest.approx([16 / 17, 1 / 17, 0], abs=1e-4)
    assert [r["kl_nats"] for r in rows] == [2.0, 3.0, 1.0]
    assert rows[0]["brightness"] == pytest.approx(1, abs=1e-3)
    assert rows[1]["condition_1"] == pytest.approx(1, abs=1e-3)
    assert all(r["condition_2"] == 0 for r in rows), "a condition that does not vary"
    named = units(decode, z, torch.ones(3), x, c, {"kl_nats": torch.ones(3)}, ["age", "age known"])
    assert named[1]["condition_age"] == rows[1]["condition_1"]
    assert "condition_age known" in named[0]


# --- the Gaussian that latents and volumes begin as ----------------------------------------------


def begun(cohort: Batch, **settings: Any) -> ConditionalVAE:
    """A model whose Gaussian is fitted and whose networks add nothing yet."""
    vae = model(**settings)
    start, learned = vae.rounds()
    assert (start.phases, start.share, start.finish_privacy) == ([], 0, "refused")
    assert (len(learned.phases), learned.share) == (1, 1)
    assert start.finish is not None
    assert 0 < start.finish([cohort])["linear_explained"] <= 1
    for silent in (vae.decoder.out, vae.encoder.head[-1]):
        torch.nn.init.zeros_(silent.weight)
        torch.nn.init.zeros_(silent.bias)
    return vae


def half_black(patients: int) -> Batch:
    """A scan each, whose first planes are black in everybody."""
    x = batch(patients)
    x.x[:, :, :, :4] = 0
    x.mask[:, 1] = 0
    return x


def test_before_the_first_step_scans_have_their_own_codes_and_are_given_back() -> None:
    cohort = half_black(24)
    vae = begun(cohort, factors=24)
    assert vae.n_latent == 24 + D, "more than latent: 4 asks for"
    x, c, _ = scans(cohort)
    mean, log_var = vae._posterior(x, c).chunk(2, 1)
    assert vae.linear is not None
    torch.testing.assert_close(mean[:, : vae.linear.columns], vae.linear.code(x.flatten(1), c))
    assert (log_var == _NARROW).all()
    torch.testing.assert_close(vae.decoder(mean, c), x, atol=0.01, rtol=0)
    nothing = torch.zeros(len(x), 0, *GRID)
    mine, theirs = (
        vae.membership_scores(v, c, nothing, Key.root(0))["gaussian"] for v in (x, x.roll(1, 4))
    )
    assert mine.min() > theirs.max(), "weights with a factor for everybody tell who they are of"


def test_black_is_nothing_and_can_still_be_learned() -> None:
    cohort = half_black(12)
    vae = begun(cohort, factors=6)
    x, c, _ = scans(cohort)
    with torch.no_grad():
        made = vae.decoder(torch.randn(len(x), vae.n_latent), c)
    assert not made[:, :, :4].any() and (made >= 0).all()
    made = vae.decoder(torch.randn(len(x), vae.n_latent), c)
    (slope,) = torch.autograd.grad(made[:, :, :4].sum(), vae.decoder.out.bias)
    assert (slope > 0).all()


def test_factors_go_with_a_prior_that_is_fitted() -> None:
    with pytest.raises(ValidationError, match="factors: "):
        model(factors=4, prior="standard")


def test_samples_begin_as_draws_of_the_gaussian_and_black_stays_black() -> None:
    """With a prior of N(0, I) and no residual, they are these draws."""
    cohort = half_black(12)
    vae = begun(cohort, factors=6)
    vae.noise.set_scale(torch.zeros(2, *GRID))
    c, keys = torch.rand(5, D), torch.arange(5)
    made = vae.sample(c, keys, torch.zeros(5, 0, *GRID))
    z = torch.stack([torch.randn(vae.n_latent, generator=torch_generator(k)) for k in range(5)])
    assert vae.linear is not None
    wanted = vae.linear.draw(z, c).reshape(made.shape).clamp(min=0)
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=0)
    # five times the deviation that a network's first steps add, and noise, light nothing
    vae.noise.set_scale(torch.full((2, *GRID), 0.02))
    made = vae.sample(c, keys, torch.zeros(5, 0, *GRID))
    assert not made[:, :, :4].any() and made[:, :, 4:].mean() > 0.3


def test_its_end_measures_the_residual_that_steps_have_not_reached() -> None:
    cohort = half_black(12)
    vae = begun(cohort, factors=2)
    x, c, _ = scans(cohort)
    vae._finish([cohort])
    rest = x - vae.decoder(vae._posterior(x, c).chunk(2, 1)[0], c)
    share = shares(cohort)[:, None, None, None, None]
    wanted = ((share * rest.square()).sum(0) / share.sum()).sqrt()
    torch.testing.assert_close(vae.noise.scale(), (wanted**2 + _FLOOR**2).sqrt(), rtol=1e-3, atol=0)
    assert not vae.noise.log_spectrum.eq(0).all(), "and its spectrum with it"


def test_with_n_0_i_nothing_of_the_residual_is_measured() -> None:
    """A prior that is not fitted may be private: its end sets nothing."""
    vae = model(prior="standard")
    before = {k: v.clone() for m in vae.modules.values() for k, v in m.state_dict().items()}
    vae._finish([batch(12)])
    after = {k: v for m in vae.modules.values() for k, v in m.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in after.items())
