"""The samplers on Gaussian data, where their results are known exactly, and against `diffusers`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from synthmed.backbones.diffusion import Prediction, Process, Schedule
from synthmed.backbones.samplers import DDIM, Ancestral, DPMSolver, Heun, Sampler, Spacing
from tests.backbones.gaussians import Gaussian, moments

SCHEDULES = get_args(Schedule)
SPACINGS = get_args(Spacing)
SD = [0.1, 0.5, 1.0, 3.0]
WIDE = Gaussian.diagonal([0.5, -1.0, 0.25, 2.0], SD)

EACH = [
    Ancestral(steps=6),
    Ancestral(steps=6, data_sd=0.7),
    DDIM(steps=6),
    DDIM(steps=6, eta=0.5),
    DPMSolver(steps=6),
    Heun(steps=6),
    Heun(steps=6, churn=4, churn_noise=1.003),
]
each = pytest.mark.parametrize("sampler", EACH, ids=lambda s: " ".join(map(str, dict(s).values())))


def with_(sampler: Sampler, **fields: object) -> Sampler:
    return sampler.model_copy(update=fields)


class Walk:
    """A draw on zeros: the times it asks the denoiser for, and how often it asks for noise."""

    def __init__(self, sampler: Sampler, process: Process) -> None:
        self.times: list[float] = []
        self.noises = 0
        self.result = sampler.draw(self._denoise, process, self._noise)

    def _denoise(self, x: Tensor, t: float) -> Tensor:
        self.times.append(t)
        return x

    def _noise(self) -> Tensor:
        self.noises += 1
        return torch.zeros(1, 1)


# --- what every sampler does ---


@each
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_it_walks_from_the_start_to_zero(
    sampler: Sampler, schedule: Schedule, spacing: Spacing, steps: int
) -> None:
    sampler = with_(sampler, steps=steps, spacing=spacing)
    process = Process(schedule)
    walk = Walk(sampler, process)
    assert len(walk.times) == sampler.evaluations
    assert all(isinstance(t, float) and 0 <= t <= 999 for t in walk.times)
    if not getattr(sampler, "churn", 0):
        assert walk.times == sorted(walk.times, reverse=True)
    start = float(process.sigma_edm(torch.tensor(walk.times[0])))
    if spacing == "time":
        assert walk.times[0] == 999
    else:
        assert start == pytest.approx(157.4 if schedule == "linear" else 160, rel=1e-3)
    if steps > 1:
        assert walk.times[-1] == 0


def test_times_are_spaced_as_named() -> None:
    process = Process("cosine")
    for steps in (2, 5, 40):
        walks = {s: Walk(DDIM(steps=steps, spacing=s), process).times for s in SPACINGS}
        evenly = torch.linspace(999, 0, steps, dtype=torch.float64)
        np.testing.assert_allclose(walks["time"], evenly, atol=1e-9)
        rises = process.log_snr(torch.tensor(walks["log_snr"], dtype=torch.float64)).diff()
        np.testing.assert_allclose(rises, rises.mean().expand(steps - 1), rtol=1e-6)
        # Karras et al. 2022, eq. 5
        low, high = float(process.sigma_edm(torch.tensor(0.0))) ** (1 / 7), 160 ** (1 / 7)
        expected = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
        sigma = process.sigma_edm(torch.tensor(walks["karras"], dtype=torch.float64))
        np.testing.assert_allclose(sigma, expected, rtol=1e-6)


def test_a_full_chain_visits_every_whole_time() -> None:
    walk = Walk(Ancestral(steps=1000), Process("linear"))
    np.testing.assert_allclose(walk.times, np.arange(999, -1, -1), atol=1e-9)
    assert walk.noises == 1000


def test_noise_is_asked_for_as_documented() -> None:
    process = Process("linear")
    counts = {
        Ancestral(steps=9): 9,
        DDIM(steps=9): 1,
        DDIM(steps=9, eta=0.1): 9,
        DPMSolver(steps=9): 1,
        Heun(steps=9): 1,
        Heun(steps=9, churn=1, churn_min=0, churn_max=1e9): 10,
    }
    for sampler, count in counts.items():
        assert Walk(sampler, process).noises == count


@each
def test_the_last_step_is_the_denoised_estimate_itself(sampler: Sampler) -> None:
    """Nothing is added after it: data in a single point are drawn exactly, whatever the noise."""
    point = Gaussian(WIDE.mean, torch.zeros(4, 4, dtype=torch.float64))
    process = Process("cosine")
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 2, 6):
        found = with_(sampler, steps=steps).draw(
            point.denoiser(process),
            process,
            lambda: torch.randn(3, 4, generator=generator, dtype=torch.float64),
        )
        torch.testing.assert_close(found, point.mean.expand(3, 4), rtol=0, atol=1e-12)


@each
def test_a_sample_depends_on_its_own_noise_alone(sampler: Sampler) -> None:
    process = Process("cosine")

    def denoise(x: Tensor, t: float) -> Tensor:
        return torch.tanh(x) * 0.9 + t / 1e4

    def draw(seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return sampler.draw(
            denoise,
            process,
            lambda: torch.stack([torch.randn(2, 4, 4, 4, generator=g) for g in generators]),
        )

    together, alone, others = draw([5, 6, 7]), draw([6]), draw([8, 6, 9])
    assert together.dtype == torch.float32 and together.shape == (3, 2, 4, 4, 4)
    assert torch.equal(together[1], alone[0]) and torch.equal(together[1], others[1])
    assert not torch.equal(together[0], together[1])


@each
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_single_precision_suffices(sampler: Sampler, schedule: Schedule, spacing: Spacing) -> None:
    """No coefficient amplifies rounding: float32 and float64 agree to some hundred roundings.

    Heun even in time is beside the point: its first step leaps from sigma 20 000 to 30 (cosine).
    """
    spacing = "karras" if sampler.name == "heun" and spacing == "time" else spacing
    sampler = with_(sampler, steps=18, spacing=spacing)
    process = Process(schedule)

    def draw(dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        bounded = lambda x, t: torch.tanh(x)  # noqa: E731
        return sampler.draw(
            bounded, process, lambda: torch.randn(64, generator=generator).to(dtype)
        )

    exact, found = draw(torch.float64), draw(torch.float32).double()
    scale = float(exact.abs().max())
    assert float((found - exact).abs().max()) < 200 * torch.finfo(torch.float32).eps * scale


# --- against derivations of another kind, on one coordinate of the data ---
#
# Each takes (alpha, sigma) at the visited levels, the noise-free end last, and a denoiser
# D(x) = a + b x at each, and gives mean and variance of x.


Affine = tuple[float, float]


def ancestral(levels: list[Affine], clean: list[Affine], fields: dict[str, Any]) -> Affine:
    """Condition the joint Gaussian of (x_s, x_t) given x_0 = D on x_t."""
    assert fields["data_sd"] == 0
    mean, variance = 0.0, 1.0
    for (at, st), (as_, ss), (a, b) in zip(levels, levels[1:], clean, strict=False):
        step = at / as_  # x_t = step x_s + noise, q(x_t | x_s)
        cross = step * ss**2
        total = step**2 * ss**2 + (st**2 - step**2 * ss**2)
        # x_s | x_t = as D + cross / total (x_t - at D), D = a + b x_t
        gain = as_ * b + cross / total * (1 - at * b)
        shift = as_ * a - cross / total * at * a
        mean = shift + gain * mean
        variance = gain**2 * variance + ss**2 - cross**2 / total
    return mean, variance


def ddim(levels: list[Affine], clean: list[Affine], fields: dict[str, Any]) -> Affine:
    """Song et al. 2021, eq. 12 and 16, in alpha_bar."""
    mean, variance = 0.0, 1.0
    for (at, _), (as_, _), (a, b) in zip(levels, levels[1:], clean, strict=False):
        bar_t, bar_s = at**2, as_**2
        sd = fields["eta"] * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))
        along = math.sqrt(max(1 - bar_s - sd**2, 0) / (1 - bar_t))
        gain = as_ * b + along * (1 - at * b)
        mean = as_ * a - along * at * a + gain * mean
        variance = gain**2 * variance + sd**2
    return mean, variance


def dpm_solver(levels: list[Affine], clean: list[Affine], fields: dict[str, Any]) -> Affine:
    """The exact integral with D constant, taken on the line through the last two at mid-step."""
    mean, gain = 0.0, 1.0
    past: list[tuple[float, float, float]] = []  # half log SNR, and D as shift and gain of x_T
    for (at, st), (as_, ss), (a, b) in zip(levels, levels[1:], clean, strict=False):
        now = math.log(at / st)
        past.append((now, a + b * mean, b * gain))
        if ss == 0:
            _, mean, gain = past[-1]
            break
        middle = (now + math.log(as_ / ss)) / 2
        if len(past) == 1:
            shift, slope = past[0][1:]
        else:
            xs = [p[0] for p in past[-2:]]
            shift, slope = (
                float(np.polyval(np.polyfit(xs, [p[i] for p in past[-2:]], 1), middle))
                for i in (1, 2)
            )
        # x / sigma grows by the integral of e^lambda D
        rise = as_ / ss - at / st
        mean, gain = ss * (mean / st + rise * shift), ss * (gain / st + rise * slope)
    return mean, gain**2


def heun(levels: list[Affine], clean: list[Affine], fields: dict[str, Any]) -> Affine:
    """Karras et al. 2022, algorithm 1, on the affine map of the first noise."""
    assert fields["churn"] == 0
    mean, gain = 0.0, 1 / levels[0][0]
    bars = [s / a for a, s in levels]
    for i, sigma in enumerate(bars[:-1]):
        to = bars[i + 1]

        def slope(m: float, g: float, j: int, level: float) -> Affine:
            a, b = clean[j]
            b = b * levels[j][0]  # D of x_t = alpha x
            return (m - a - b * m) / level, (g - b * g) / level

        first = slope(mean, gain, i, sigma)
        euler = mean + (to - sigma) * first[0], gain + (to - sigma) * first[1]
        if to == 0:
            mean, gain = euler
            break
        second = slope(*euler, i + 1, to)
        mean += (to - sigma) * (first[0] + second[0]) / 2
        gain += (to - sigma) * (first[1] + second[1]) / 2
    return mean, gain**2


ORACLES: list[tuple[Sampler, Callable[..., Affine]]] = [
    (Ancestral(), ancestral),
    (DDIM(), ddim),
    (DDIM(eta=0.6), ddim),
    (DDIM(eta=1), ddim),
    (DPMSolver(), dpm_solver),
    (Heun(), heun),
]


@pytest.mark.parametrize(("sampler", "oracle"), ORACLES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 11, 60])
def test_mean_and_variance_are_those_of_the_derivation(
    sampler: Sampler,
    oracle: Callable[..., Affine],
    schedule: Schedule,
    spacing: Spacing,
    steps: int,
) -> None:
    process = Process(schedule)
    sampler = with_(sampler, steps=steps, spacing=spacing)
    mean, covariance = moments(lambda n: sampler.draw(WIDE.denoiser(process), process, n), 4)
    times = sorted(set(Walk(sampler, process).times), reverse=True)
    pairs = process.alpha_sigma(torch.tensor(times, dtype=torch.float64))
    levels = [*zip(*(p.tolist() for p in pairs), strict=True), (1.0, 0.0)]
    for i, (m, s) in enumerate(zip(WIDE.mean.tolist(), SD, strict=True)):
        gains = [a * s**2 / (a**2 * s**2 + n**2) for a, n in levels[:-1]]
        clean = [(m - g * a * m, g) for g, (a, _) in zip(gains, levels, strict=False)]
        expected = oracle(levels, clean, dict(sampler))
        scale = max(1.0, math.sqrt(expected[1]))
        assert float(mean[i]) == pytest.approx(expected[0], rel=1e-7, abs=1e-8 * scale)
        assert float(covariance[i, i]) == pytest.approx(expected[1], rel=1e-6)
    off = covariance - covariance.diagonal().diag()
    assert off.abs().max() < 1e-8 * covariance.abs().max()


@each
def test_a_full_covariance_is_drawn_as_its_principal_axes_are(sampler: Sampler) -> None:
    q, _ = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    )
    turned = Gaussian(q @ WIDE.mean, q @ WIDE.covariance @ q.T)
    process = Process("cosine")
    straight = moments(lambda n: sampler.draw(WIDE.denoiser(process), process, n), 4)
    found = moments(lambda n: sampler.draw(turned.denoiser(process), process, n), 4)
    scale = float(straight[1].abs().max())
    torch.testing.assert_close(found[0], q @ straight[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[1], q @ straight[1] @ q.T, rtol=1e-7, atol=1e-9 * scale)


@each
def test_random_draws_have_the_moments_that_were_read_off(sampler: Sampler) -> None:
    """Mean and variance of 20 000 draws, within five of their standard errors."""
    n, process = 20_000, Process("linear")
    mean, covariance = moments(lambda z: sampler.draw(WIDE.denoiser(process), process, z), 4)
    generator = torch.Generator().manual_seed(11)
    x = sampler.draw(
        WIDE.denoiser(process),
        process,
        lambda: torch.randn(n, 4, generator=generator, dtype=torch.float64),
    )
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    assert ((x.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / n)).all()


# --- ancestral sampling with strides has the right variance ---


def last_estimate(data: Gaussian, process: Process) -> Tensor:
    """Standard deviation of E[x_0 | x_t] at t = 0, what an exact chain returns."""
    alpha, sigma = process.alpha_sigma(torch.tensor(0.0))
    variance = data.sd**2
    return alpha * variance / (alpha**2 * variance + sigma**2).sqrt()


def sd_of(sampler: Sampler, data: Gaussian, process: Process) -> Tensor:
    _, covariance = moments(
        lambda n: sampler.draw(data.denoiser(process), process, n), len(data.mean)
    )
    return covariance.diagonal().sqrt()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sd", [0.1, 0.5, 1.0])
def test_a_chain_that_knows_the_spread_is_exact_at_any_stride(
    schedule: Schedule, spacing: Spacing, sd: float
) -> None:
    """What remains is the start, N(0, I) for N(alpha m, alpha^2 sd^2 + sigma^2), alpha < 1/150."""
    data, process = Gaussian.diagonal([0.0], [sd]), Process(schedule)
    for steps in (2, 5, 25, 250):
        found = sd_of(Ancestral(steps=steps, spacing=spacing, data_sd=sd), data, process)
        expected = last_estimate(data, process)
        torch.testing.assert_close(found, expected, rtol=1 / 150**2, atol=0)
        assert float(found) == pytest.approx(sd, rel=float(0.006 / sd))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [3, 25, 250])
def test_the_two_variances_of_the_paper_bracket_the_truth(schedule: Schedule, steps: int) -> None:
    """Ho et al. 2020, section 3.2: bounds for data of standard deviation up to 1."""
    data, process = Gaussian.diagonal([0.0] * 3, [0.1, 0.5, 0.9]), Process(schedule)
    exact = last_estimate(data, process)
    assert (sd_of(Ancestral(steps=steps), data, process) < exact).all()
    assert (sd_of(Ancestral(steps=steps, data_sd=1), data, process) > exact).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("data_sd", [0, 1])
@pytest.mark.parametrize("sd", [0.5, 3.0])
def test_ancestral_error_halves_with_the_stride(
    schedule: Schedule, data_sd: float, sd: float
) -> None:
    """First order in the rise of log SNR a step; the next term is of that rise's relative size."""
    data, process = Gaussian.diagonal([0.0], [sd]), Process(schedule)
    exact = last_estimate(data, process)
    errors = [
        float(sd_of(Ancestral(steps=n, spacing="log_snr", data_sd=data_sd), data, process) - exact)
        for n in (64, 128, 256)
    ]
    assert np.sign(errors).tolist() == [np.sign(errors[0])] * 3
    orders = np.log2(np.abs(errors[:-1]) / np.abs(errors[1:]))
    rise = 20 / 128
    np.testing.assert_allclose(orders, 1, atol=rise)


# --- order of convergence ---


@pytest.mark.parametrize(("sampler", "order"), [(DDIM(), 1), (DPMSolver(), 2), (Heun(), 2)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sd", SD)
def test_deterministic_samplers_converge_to_the_flow_at_their_order(
    sampler: Sampler, order: int, schedule: Schedule, sd: float
) -> None:
    """The error falls as n^-order (1 + O(h)), h the rise of log(alpha / sigma) a step."""
    data, process = Gaussian.diagonal([0.5], [sd]), Process(schedule)
    denoise = data.denoiser(process)
    x = torch.tensor([[1.0], [-0.3]], dtype=torch.float64)
    counts = [128, 256, 512]
    errors = []
    for n in counts:
        found = with_(sampler, steps=n, spacing="log_snr")
        start = Walk(found, process).times[0]
        exact = denoise(data.flow(x, process, start, 0.0), 0.0)
        errors.append(float((found.draw(denoise, process, lambda: x) - exact).norm()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    h = math.log(160 / 0.006) / counts[0]
    np.testing.assert_allclose(orders, order, atol=h)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_sampler_comes_to_the_data(schedule: Schedule) -> None:
    """With many steps: what is left is the start's mean, and the shrinking of the last estimate."""
    data = Gaussian.diagonal([0.5, -1.0], [0.5, 1.5])
    process = Process(schedule)
    samplers: list[Sampler] = [
        Ancestral(steps=1000, spacing="log_snr"),
        DDIM(steps=1000, spacing="log_snr"),
        DPMSolver(steps=100),
        Heun(steps=100),
        Heun(steps=300, churn=40),
    ]
    for sampler in samplers:
        mean, covariance = moments(
            lambda n, s=sampler: s.draw(data.denoiser(process), process, n),  # type: ignore[misc]
            2,
        )
        assert ((mean - data.mean).abs() < 0.01 * data.sd).all(), sampler
        assert ((covariance.diagonal().sqrt() / data.sd - 1).abs() < 0.01).all(), sampler


def test_ddim_at_eta_one_is_the_ancestral_chain() -> None:
    process = Process("linear")
    for steps in (1, 4, 50):
        draws = []
        for sampler in (DDIM(steps=steps, eta=1), Ancestral(steps=steps)):
            generator = torch.Generator().manual_seed(2)
            draws.append(
                sampler.draw(
                    WIDE.denoiser(process),
                    process,
                    lambda g=generator: torch.randn(5, 4, generator=g, dtype=torch.float64),  # type: ignore[misc]
                )
            )
        torch.testing.assert_close(*draws, rtol=1e-9, atol=1e-9)


# --- against diffusers: the same times, the same outputs, its own update rules ---

# of 1000 steps: strides of 37 that include both ends, as whole times
STEPS, STRIDE = 28, 37
VISITED = list(range(999, -1, -STRIDE))


def network(x: Tensor, t: float) -> Tensor:
    """Something nonlinear in both, as a network is."""
    return torch.sin(x) + 0.5 * torch.cos(x.roll(1, -1) + t / 200)


def ours(sampler: Sampler, process: Process, prediction: Prediction) -> Tensor:
    generator = torch.Generator().manual_seed(4)

    def denoise(x: Tensor, t: float) -> Tensor:
        when = torch.tensor(t, dtype=torch.float64)
        return process.estimates(prediction, network(x, round(t)), x, when)[0]

    return sampler.draw(
        denoise, process, lambda: torch.randn(3, 8, generator=generator, dtype=torch.float64)
    )


KINDS: dict[Prediction, str] = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}
predictions = pytest.mark.parametrize("prediction", list(KINDS))
both = pytest.mark.parametrize("schedule", SCHEDULES)
their_array = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def theirs(name: str, schedule: Schedule, prediction: Prediction, **options: object) -> Any:
    """Their scheduler on our float64 tables: theirs are float32, wrong by 6e-4 at t = 0."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra `test`")
    scheduler = getattr(diffusers, name)(
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        prediction_type=KINDS[prediction],
        **options,
    )
    process = Process(schedule)
    scheduler.betas, scheduler.alphas_cumprod = process.betas, process.alpha_bars
    scheduler.alphas = 1 - process.betas
    return scheduler


def in_double(scheduler: Any, schedule: Schedule) -> None:
    """Their sigmas, which they round to float32, once more from the float64 tables."""
    wanted = Process(schedule).sigma_edm(torch.tensor(VISITED))
    if len(scheduler.sigmas) > STEPS + 1:  # each twice but the first and the last
        wanted = torch.cat([wanted[:1], wanted[1:].repeat_interleave(2)])
    wanted = torch.cat([wanted, torch.zeros(1)])
    torch.testing.assert_close(scheduler.sigmas.double(), wanted, rtol=1e-6, atol=0)
    scheduler.sigmas = wanted


def start() -> tuple[torch.Generator, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return generator, torch.randn(3, 8, generator=generator, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@both
@predictions
@pytest.mark.parametrize("stride", [1, STRIDE])
def test_ancestral_agrees_with_diffusers(
    schedule: Schedule, prediction: Prediction, stride: int
) -> None:
    scheduler = theirs("DDPMScheduler", schedule, prediction, clip_sample=False)
    visited = list(range(999, -1, -stride))
    scheduler.set_timesteps(timesteps=visited)
    generator, x = start()
    for t in visited:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
    close(ours(Ancestral(steps=len(visited)), Process(schedule), prediction), x)


@both
@predictions
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_agrees_with_diffusers(schedule: Schedule, prediction: Prediction, eta: float) -> None:
    scheduler = theirs("DDIMScheduler", schedule, prediction, clip_sample=False)
    scheduler.set_timesteps(1000 // STRIDE)  # for its stride alone: the times are ours
    generator, x = start()
    for t in VISITED:
        noise = None
        if eta:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) if t else 0 * x
        x = scheduler.step(network(x, t), t, x, eta=eta, variance_noise=noise).prev_sample
    close(ours(DDIM(steps=STEPS, eta=eta), Process(schedule), prediction), x)


@both
@predictions
@their_array
def test_dpm_solver_agrees_with_diffusers(schedule: Schedule, prediction: Prediction) -> None:
    scheduler = theirs(
        "DPMSolverMultistepScheduler",
        schedule,
        prediction,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=VISITED)
    in_double(scheduler, schedule)
    _, x = start()
    for t in VISITED:
        x = scheduler.step(network(x, t), t, x).prev_sample
    # their step rounds the state to float32
    close(ours(DPMSolver(steps=STEPS, spacing="time"), Process(schedule), prediction), x, 1e-5)


@both
@predictions
@their_array
def test_heun_agrees_with_diffusers(schedule: Schedule, prediction: Prediction) -> None:
    scheduler = theirs("HeunDiscreteScheduler", schedule, prediction)
    scheduler.set_timesteps(timesteps=VISITED)
    in_double(scheduler, schedule)
    process = Process(schedule)
    alpha, _ = process.alpha_sigma(torch.tensor(999.0))
    _, x = start()
    x = x / alpha  # it walks in units of the data
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(scaled, round(float(t))), t, x).prev_sample
    close(ours(Heun(steps=STEPS, spacing="time"), process, prediction), x)


# --- settings ---


def test_a_sampler_is_chosen_by_name() -> None:
    adapter: TypeAdapter[Sampler] = TypeAdapter(Sampler)
    for sampler in EACH:
        assert adapter.validate_python(sampler.model_dump()) == sampler
    with pytest.raises(ValidationError, match="'ancestral', 'ddim', 'dpm_solver', 'heun'"):
        adapter.validate_python({"name": "euler"})
    for wrong in (
        {"name": "ddim", "eta": 1.5},
        {"name": "heun", "steps": 0},
        {"name": "ddim", "x": 1},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
