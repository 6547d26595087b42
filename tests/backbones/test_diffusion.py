"""The process: its tables against the papers and `diffusers`, its conversions against algebra."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from synthmed.backbones.diffusion import Prediction, Process, Schedule
from synthmed.errors import UsageError

SCHEDULES = get_args(Schedule)
PREDICTIONS = get_args(Prediction)
schedules = st.sampled_from(SCHEDULES)
steps = st.sampled_from([2, 3, 10, 50, 1000, 4000])


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_linear_is_that_of_the_paper() -> None:
    """Ho et al. 2020, section 4: betas from 1e-4 to 0.02; alpha_bar by a plain loop."""
    process = Process("linear", 1000)
    product = 1.0
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        product *= 1 - beta
        assert float(process.betas[t]) == pytest.approx(beta, rel=1e-12)
        assert float(process.alpha_bars[t]) == pytest.approx(product, rel=1e-10)


def test_cosine_is_that_of_the_paper() -> None:
    """Nichol and Dhariwal 2021, eq. 17: alpha_bar(t) = f(t) / f(0), until the clip of beta."""
    process = Process("cosine", 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    for t in range(999):
        assert float(process.alpha_bars[t]) == pytest.approx(f[t + 1] / f[0], rel=1e-9)
    assert float(process.betas[-1]) == 0.999
    assert float(process.betas[:-1].max()) < 0.999


def test_other_lengths_are_the_same_process_in_larger_steps() -> None:
    """At the same share of the way alpha_bar agrees: exactly for cosine, before its clip."""
    for k in (20, 50, 100, 150, 180):
        few, many = (Process("cosine", n).alpha_bars for n in (200, 1000))
        assert float(few[k - 1]) == pytest.approx(float(many[5 * k - 1]), rel=1e-9)
    for k in (20, 50, 100, 150, 180):
        coarse, fine = (Process("linear", n) for n in (200, 1000))
        gap = (coarse.alpha_bars[k - 1].log() - fine.alpha_bars[5 * k - 1].log()).abs()
        # sums of a rising beta(t) differ from its integral by at most one step, and
        # |log(1 - beta) + beta| < beta^2 for beta < 1/2
        bound = coarse.betas[k] + fine.betas[5 * k] + (coarse.betas[:k] ** 2).sum()
        assert gap < bound


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_tables_agree_with_diffusers(schedule: Schedule, theirs: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the extra `test`")
    reference = diffusers.DDPMScheduler(beta_schedule=theirs)
    process = Process(schedule)
    np.testing.assert_allclose(process.betas, reference.betas, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(process.alpha_bars, reference.alphas_cumprod, rtol=2e-4)


@given(schedule=schedules, n=steps)
@settings(deadline=None)
def test_noise_only_grows(schedule: Schedule, n: int) -> None:
    process = Process(schedule, n)
    t = torch.linspace(0, n - 1, 997, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t)
    assert (process.log_snr(t).diff() < 0).all()
    assert (process.sigma_edm(t).diff() > 0).all()
    assert (alpha.diff() < 0).all() and (sigma.diff() >= 0).all()
    assert (process.alpha_bars.diff() < 0).all()
    assert ((process.betas > 0) & (process.betas <= 0.999)).all()
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-15)
    torch.testing.assert_close(process.sigma_edm(t), sigma / alpha, rtol=1e-12, atol=0)


@given(schedule=schedules, n=steps)
@settings(deadline=None)
def test_whole_times_are_the_table_and_the_rest_lies_on_the_line_between(
    schedule: Schedule, n: int
) -> None:
    process = Process(schedule, n)
    whole = torch.arange(n)
    alpha, _ = process.alpha_sigma(whole)
    torch.testing.assert_close(alpha**2, process.alpha_bars, rtol=1e-12, atol=0)
    between = whole[:-1] + 0.25
    log_snr = process.log_snr(whole)
    expected = 0.75 * log_snr[:-1] + 0.25 * log_snr[1:]
    torch.testing.assert_close(process.log_snr(between), expected, rtol=1e-12, atol=1e-13)


@given(schedule=schedules, n=steps, share=st.floats(0, 1))
@settings(deadline=None)
def test_time_is_found_from_its_noise(schedule: Schedule, n: int, share: float) -> None:
    process = Process(schedule, n)
    t = f64(share * (n - 1))
    assert float(process.time(process.log_snr(t))) == pytest.approx(float(t), abs=1e-9 * n)
    assert float(process.time_of_sigma(process.sigma_edm(t))) == pytest.approx(
        float(t), abs=1e-9 * n
    )


def test_times_outside_count_as_the_nearer_end() -> None:
    process = Process("cosine", 100)
    ends = process.log_snr(f64(0, 99))
    assert torch.equal(process.log_snr(f64(-3, 99.5)), ends)
    assert process.time(f64(50, -50)).tolist() == [0, 99]


@given(
    schedule=schedules,
    prediction=st.sampled_from(PREDICTIONS),
    times=st.lists(st.floats(0, 999), min_size=3, max_size=3),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_a_perfect_output_gives_data_and_noise_back(
    schedule: Schedule, prediction: Prediction, times: list[float], seed: int
) -> None:
    process = Process(schedule)
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 2, 4, 4, 4, generator=generator, dtype=torch.float64)
    t = f64(*times)
    x_t = process.diffuse(x0, eps, t)
    output = process.target(prediction, x0, eps, t)
    found = process.estimates(prediction, output, x_t, t)
    # 1 / alpha of the cosine's last step is 20 000
    torch.testing.assert_close(found[0], x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[1], eps, rtol=0, atol=1e-10)


@given(
    schedule=schedules,
    prediction=st.sampled_from(PREDICTIONS),
    t=st.floats(0, 999),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_any_output_is_split_without_remainder(
    schedule: Schedule, prediction: Prediction, t: float, seed: int
) -> None:
    """x_t = alpha x0_hat + sigma eps_hat whatever the network says; and in float32."""
    process = Process(schedule)
    generator = torch.Generator().manual_seed(seed)
    x_t, output = torch.randn(2, 1, 50, generator=generator)
    x0, eps = process.estimates(prediction, output, x_t, torch.tensor(t))
    assert x0.dtype == eps.dtype == torch.float32
    # the coefficients as float32 has them: where alpha is 0.01, rounding t moves it by 1e-5 of it
    alpha, sigma = (k.float().double() for k in process.alpha_sigma(torch.tensor(t)))
    # both terms are sums of two products of numbers below 6
    again = alpha * x0.double() + sigma * eps.double()
    torch.testing.assert_close(again, x_t.double(), rtol=0, atol=1e-5)


def test_errors_of_an_output_grow_as_documented() -> None:
    """By 1/alpha, by 1/sigma, and under v not at all."""
    nought, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    growth = {}
    for schedule in SCHEDULES:
        process = Process(schedule)
        for prediction in PREDICTIONS:
            ends = [process.estimates(prediction, one, nought, f64(t)) for t in (0.0, 999.0)]
            growth[schedule, prediction] = max(float(e.abs()) for pair in ends for e in pair)
    assert growth["linear", "epsilon"] == pytest.approx(157, abs=1)
    assert growth["cosine", "epsilon"] == pytest.approx(20_000, rel=0.02)
    assert growth["linear", "sample"] == pytest.approx(100, abs=1)
    assert growth["cosine", "sample"] == pytest.approx(156, abs=1)
    assert growth["linear", "v"] <= 1 and growth["cosine", "v"] <= 1


def test_v_turns_data_and_noise_by_a_right_angle() -> None:
    """(alpha, sigma) . (x0, eps) and v are orthonormal coordinates: norms are preserved."""
    process = Process("cosine")
    x0, eps = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0, 999, 5)
    x_t, v = process.diffuse(x0, eps, t), process.target("v", x0, eps, t)
    torch.testing.assert_close(x_t**2 + v**2, x0**2 + eps**2)


def test_each_row_has_its_own_time_also_under_vmap() -> None:
    process = Process("cosine")
    x0, eps = torch.randn(2, 4, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 3.5, 500.25, 999.0])
    together = process.diffuse(x0, eps, t)
    apart = torch.cat(
        [process.diffuse(x0[i : i + 1], eps[i : i + 1], t[i : i + 1]) for i in range(4)]
    )
    assert torch.equal(together, apart)
    assert torch.equal(vmap(process.diffuse)(x0, eps, t), together)
    alpha = vmap(grad(lambda a, e, s: process.diffuse(a, e, s).sum()))(x0, eps, t)
    torch.testing.assert_close(alpha[:, 0, 0, 0, 0].double(), process.alpha_sigma(t)[0])


def test_tables_made_in_inference_mode_serve_training() -> None:
    process = Process("cosine", 77)  # a length no other test has put into the cache
    with torch.inference_mode():
        process.log_snr(f64(3))
    x0 = torch.ones(1, 2, requires_grad=True)
    t = torch.tensor([3.5], requires_grad=True)
    process.diffuse(x0, torch.ones(1, 2), t).sum().backward()
    assert x0.grad is not None and t.grad is not None


def test_a_process_of_one_step_is_refused() -> None:
    with pytest.raises(UsageError, match="1 steps"):
        Process("linear", 1)
