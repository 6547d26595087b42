"""The diffusion model: exact on Gaussians, right on toys, guided, resumed, and examined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from synthmed import configfile
from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.backbones.ddpm import DDPM, Diffusion
from synthmed.backbones.generative import Batch, VolumeSpec, named_parameters
from synthmed.conditions import Conditions
from synthmed.config import Augment, Categorical, Config, Optimizer
from synthmed.errors import UsageError
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.training import Training, named_state, one_step
from tests.backbones.gaussians import Gaussian, moments

GRID = (4, 3, 5)
NUMBERS = 60
D = 2
SPEC = VolumeSpec(1, GRID, D)
VOXEL = {"kind": "voxel"}
LATENT = {
    "kind": "latent",
    "autoencoder": {"widths": (8, 16), "code": {"kind": "map", "channels": 4}},
    "share": 0.5,
}
SPACES: Mapping[str, dict[str, Any]] = {
    "voxel": VOXEL,
    "wavelet": {"kind": "wavelet", "levels": 2},
    "latent": LATENT,
}
SAMPLERS: Mapping[str, dict[str, Any]] = {
    "ancestral": {"name": "ancestral", "steps": 30},
    "ddim": {"name": "ddim", "steps": 20, "spacing": "log_snr", "eta": 0.5},
    "dpm_solver": {"name": "dpm_solver"},
    "heun": {"name": "heun", "steps": 14, "churn": 3},
}


def build(spec: VolumeSpec = SPEC, **settings: Any) -> Diffusion:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tree = {"widths": (4, 8), "depth": 1, "space": VOXEL, **settings}
        return DDPM.model_validate(tree).build(spec, Optimizer(learning_rate=3e-3))


def loud(model: Diffusion) -> Diffusion:
    """The same with weights of usual size, so that everything that it is told shows."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(max(1, p[0].numel())))
    return model


def silent(model: Diffusion) -> Diffusion:
    """The same with a last layer of zeros: the linear denoiser speaks alone."""
    for p in model.network.last[2].parameters():
        nn.init.zeros_(p)
    return model


def cohort(m: int = 60, grid: tuple[int, int, int] = GRID) -> Batch:
    """Volumes with two modes, texture and a condition."""
    g = torch.Generator().manual_seed(0)
    n = math.prod(grid)
    c = torch.nn.functional.one_hot(torch.randint(2, (m,), generator=g), 2).float()
    x = 0.5 + 0.05 * torch.randn(m, n, generator=g) * torch.linspace(0.2, 2, n)
    x = x + 0.1 * torch.randn(m, 2, generator=g) @ torch.randn(2, n, generator=g)
    x = x + c @ torch.randn(2, n, generator=g) / 10
    return Batch(
        x.reshape(m, 1, 1, *grid), c[:, None], torch.zeros(m, 1, 0, *grid), torch.ones(m, 1)
    )


def nothing(n: int, grid: tuple[int, int, int] = GRID) -> Tensor:
    return torch.zeros(n, 0, *grid)


def fitted(**settings: Any) -> Diffusion:
    model = silent(build(factors=4, **settings))
    for r in model.rounds():
        if r.finish is not None:
            r.finish([cohort()])
    return model


def gaussian(model: Diffusion, c: Tensor) -> Gaussian:
    """What the linear denoiser takes the data for, given one condition (D,)."""
    assert model.wiener is not None
    a, v = model.wiener.factor_nk.double(), model.wiener.variance_n.double()
    a = a[:, : model.wiener.factors]  # the condition is known
    return Gaussian(model.wiener.centred(c[None])[0].double(), a @ a.T + v.diag())


# --- with a silent network: samples of the fitted Gaussian ---------------------------------------


def affine_moments(model: Diffusion, c: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance of the model's own sampler, in the numbers of its space."""

    def denoise(x: Tensor, t: float) -> Tensor:
        told, place = c.expand(len(x), -1), nothing(len(x), model.space.shape[1:])
        return model._denoised(x, t, told, place).double()

    with torch.no_grad():
        return moments(
            lambda noise: model.config.sampler.draw(
                lambda x, t: denoise(x.reshape(-1, *model.space.shape), t).flatten(1),
                model.process,
                noise,
            ),
            math.prod(model.space.shape),
        )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_silent_network_s_sampler_is_that_of_the_exact_gaussian(
    schedule: str, sampler: dict[str, Any]
) -> None:
    """Scales, levels and conditions are handed on right: same moments as from float64 matrices."""
    model = fitted(schedule=schedule, sampler=sampler)
    c = torch.tensor([1.0, 0.0])
    data = gaussian(model, c)
    mean, covariance = affine_moments(model, c)
    exact = moments(
        lambda noise: model.config.sampler.draw(data.denoiser(model.process), model.process, noise),
        NUMBERS,
    )
    assert float(((mean - exact[0]) / data.sd).abs().max()) < 1e-3
    outer = data.sd[:, None] * data.sd
    assert float(((covariance - exact[1]) / outer).abs().max()) < 2e-3


@pytest.mark.parametrize(
    ("steps", "at_most"), [(10, 0.1), (20, 0.05), (50, 0.02)], ids=["10", "20", "50"]
)
def test_the_default_sampler_errs_by_a_share_that_falls_with_its_steps(
    steps: int, at_most: float
) -> None:
    """2-Wasserstein distance to the fitted Gaussian, in units of its total deviation."""
    model = fitted(sampler={"name": "dpm_solver", "steps": steps})
    c = torch.tensor([0.0, 1.0])
    data = gaussian(model, c)
    distance = data.wasserstein(*affine_moments(model, c))
    assert distance / float(data.covariance.trace().sqrt()) < at_most


@pytest.mark.parametrize("space", ["voxel", "wavelet"])
def test_samples_of_a_silent_network_follow_the_fitted_gaussian(space: str) -> None:
    """Mean and covariance of some hundred samples, within their own Monte Carlo error."""
    grid, m = (4, 4, 4), 400
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DDPM.model_validate({"widths": (4,), "space": SPACES[space], "factors": 4})
        model = silent(config.build(VolumeSpec(1, grid, D), Optimizer()))
    finish = model.rounds()[0].finish
    assert finish is not None
    finish([cohort(grid=grid)])
    c = torch.tensor([1.0, 0.0])
    data = gaussian(model, c)
    x = model.sample(c.expand(m, -1), torch.arange(m), nothing(m, grid))
    y = model.space.enter(x, c.expand(m, -1)).flatten(1).double()
    error = (y.mean(0) - data.mean) / data.sd * math.sqrt(m)
    assert float(error.abs().max()) < 5
    found = torch.cov(y.T)
    s = data.covariance
    spread = ((s.diagonal()[:, None] * s.diagonal() + s**2) / m).sqrt()
    assert float(((found - s) / spread).abs().max()) < 6
    # and with the other condition the mean is another one, by what the condition weighs
    other = gaussian(model, torch.tensor([0.0, 1.0]))
    assert float(((other.mean - data.mean) / data.sd).abs().max()) > 0.5


# --- with an oracle in place of the network ------------------------------------------------------

MEAN = torch.linspace(-0.5, 0.5, NUMBERS).double()
SD = torch.linspace(0.05, 1.2, NUMBERS).double()
TRUTH = Gaussian(MEAN, (SD**2).diag())


class Oracle(nn.Module):
    """The best possible network for TRUTH, from the noise level that it is told."""

    n_dropped = 0

    def __init__(self, model: Diffusion) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x: Tensor, level: Tensor, c: Tensor, keep: Tensor | None = None) -> Tensor:
        self.calls += 1
        sigma = level.double().exp()
        alpha = (1 / (1 + sigma**2).sqrt())[:, None]
        sigma = sigma[:, None] * alpha
        x_t = x.double().flatten(1)
        gain = alpha * SD**2 / (alpha**2 * SD**2 + sigma**2)
        clean = MEAN + gain * (x_t - alpha * MEAN)
        eps = (x_t - alpha * clean) / sigma
        kind = self.model.config.prediction
        out = {"sample": clean, "epsilon": eps, "v": alpha * eps - sigma * clean}[kind]
        return out.reshape(x.shape).float()


def with_oracle(**settings: Any) -> Diffusion:
    model = build(**settings)
    model.network = Oracle(model)  # type: ignore[assignment]
    return model


PAPERS = ["epsilon", "sample", "v"]


@pytest.mark.parametrize("prediction", PAPERS)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_an_oracle_s_samples_follow_the_truth(prediction: str, schedule: str) -> None:
    model = with_oracle(prediction=prediction, schedule=schedule, sampler={"name": "dpm_solver"})
    mean, covariance = affine_moments(model, torch.zeros(D))
    data = TRUTH
    exact = moments(
        lambda noise: model.config.sampler.draw(data.denoiser(model.process), model.process, noise),
        NUMBERS,
    )
    assert float(((mean - exact[0]) / SD).abs().max()) < 5e-3
    assert float(((covariance - exact[1]) / (SD[:, None] * SD)).abs().max()) < 5e-3
    assert data.wasserstein(mean, covariance) / float(SD.square().sum().sqrt()) < 0.05


@pytest.mark.parametrize("prediction", PAPERS)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_loss_of_an_oracle_is_the_least_there_is(prediction: str, schedule: str) -> None:
    """The mean over even times of the target's variance given what is seen."""
    model = with_oracle(prediction=prediction, schedule=schedule)
    t = torch.linspace(0, 999, 4001, dtype=torch.float64)
    alpha, sigma = (v[:, None] for v in model.process.alpha_sigma(t))
    left = (SD * sigma) ** 2 / (alpha**2 * SD**2 + sigma**2)  # of the clean data
    times = {"sample": 1, "epsilon": (alpha / sigma) ** 2, "v": 1 / sigma**2}[prediction]
    expected = float((left * times).mean())
    losses = loss_on(model, TRUTH)
    deviation = float(losses.std()) / math.sqrt(len(losses))
    assert float(losses.mean()) == pytest.approx(expected, abs=5 * deviation)
    assert 5 * deviation < 0.1 * expected


def loss_on(model: Diffusion, data: Gaussian, patients: int = 200, scans: int = 60) -> Tensor:
    """(patients,) losses of the model's phase on draws from a Gaussian."""
    g = torch.Generator().manual_seed(5)
    unit = torch.randn(patients * scans, NUMBERS, generator=g, dtype=torch.float64)
    y = data.mean + unit @ torch.linalg.cholesky(data.covariance).T
    x = ((y + 1) / 2).float().reshape(patients, scans, 1, *GRID)
    phase = model.rounds()[-1].phases[0]
    each = [phase.draw(torch.Generator().manual_seed(i), scans) for i in range(patients)]
    draws = {k: torch.stack([d[k] for d in each]) for k in each[0]}
    zeros = torch.zeros(patients, scans, D)
    batch = Batch(x, zeros, torch.zeros(patients, scans, 0, *GRID), torch.ones(patients, scans))
    with torch.no_grad():
        return phase.loss(named_parameters(model), batch, draws, 0.0).double()


def test_a_silent_network_s_loss_is_near_one_on_its_own_gaussian() -> None:
    """Whatever the noise: the posterior's variance over that of the units, exactly."""
    model = fitted()
    assert model.wiener is not None
    data = gaussian(model, torch.zeros(D))
    levels = torch.linspace(math.log(0.02), math.log(40), 301).double()
    ratios = []
    for s in levels.exp():
        noisy = data.covariance + s**2 * torch.eye(NUMBERS)
        left = s**2 * torch.linalg.solve(noisy, data.covariance).trace()
        zeros = torch.zeros(1, NUMBERS)
        unit = model.wiener(zeros, s[None].float(), torch.zeros(1, D)).unit
        ratios.append(float(left / unit.double().square().sum()))
    expected = sum(ratios) / len(ratios)
    assert 0.8 < expected < 1.25
    losses = loss_on(model, data)
    deviation = float(losses.std()) / math.sqrt(len(losses))
    assert float(losses.mean()) == pytest.approx(expected, abs=5 * deviation)
    assert 5 * deviation < 0.1


# --- guidance, and what is not known -------------------------------------------------------------


def counted(model: Diffusion) -> list[int]:
    """A list that grows by the rows of every call of the network."""
    calls: list[int] = []
    model.network.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("prediction", ["residual", "v"])
def test_guidance_of_one_asks_once_a_step_and_of_zero_forgets_the_condition(
    prediction: str,
) -> None:
    told = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys, none = torch.arange(2), nothing(2)

    def draw(c: Tensor, w: float, **sampler: Any) -> tuple[Tensor, int]:
        settings = {"name": "dpm_solver", "steps": 5, **sampler}
        model = loud(build(prediction=prediction, guidance=w, sampler=settings))
        if model.wiener is not None:
            linear = model.rounds()[0].finish
            assert linear is not None
            linear([cohort()])
        calls = counted(model)
        return model.sample(c, keys, none), len(calls)

    plain, once = draw(told, 1)
    unknown, _ = draw(torch.zeros(2, D), 1)
    forgotten, twice = draw(told, 0)
    assert (once, twice) == (5, 10)
    assert torch.equal(forgotten, unknown)
    nobody, spared = draw(torch.zeros(2, D), 3)
    assert spared == 5, "with nothing to leave out, both answers are one"
    assert torch.equal(nobody, unknown)
    assert not torch.equal(plain, unknown)
    # of a single step the sample is the denoised estimate, which is linear in w
    one, zero, double = (draw(told, w, steps=1)[0] for w in (1, 0, 2))
    torch.testing.assert_close(double, 2 * one - zero, atol=1e-4, rtol=1e-4)


def test_guidance_needs_training_without_the_condition() -> None:
    with pytest.raises(ValueError, match="set unconditional above 0"):
        DDPM(guidance=2, unconditional=0)
    assert "told_S" not in build(unconditional=0).rounds()[-1].phases[0].draw(torch.Generator(), 1)


def test_the_condition_is_left_out_of_the_share_of_scans_asked_for() -> None:
    model = loud(build(unconditional=0.25, prediction="v"))
    phase = model.rounds()[-1].phases[0]
    told = phase.draw(torch.Generator().manual_seed(0), 4000)["told_S"]
    assert set(told.tolist()) == {0, 1}
    # of 4000 throws the share is within 5 deviations of 0.0068
    assert float(1 - told.mean()) == pytest.approx(0.25, abs=0.035)
    # and where it is left out, it makes no difference
    data = cohort(2)
    draws = {k: v[None].expand(2, *v.shape) for k, v in phase.draw(torch.Generator(), 1).items()}
    changed = data._replace(c=1 - data.c)
    for told_ in (0.0, 1.0):
        d = {**draws, "told_S": torch.full((2, 1), told_)}
        a, b = (phase.loss(named_parameters(model), x, d, 0.5) for x in (data, changed))
        assert torch.equal(a, b) == (told_ == 0)


def test_what_was_done_to_a_scan_is_always_told() -> None:
    """Augmentation is no label: dropping the condition and guidance leave it in."""
    spec = VolumeSpec(1, GRID, D + 1, told_width=1)

    def fresh(**settings: Any) -> Diffusion:
        return loud(build(spec, sampler={"name": "dpm_solver", "steps": 3}, **settings))

    model = fresh()
    assert model.wiener is not None
    assert model.wiener.weight_Dn.shape[0] == D, "it is fitted where nothing is done"
    phase = model.rounds()[-1].phases[0]
    data = cohort(2)
    data = data._replace(c=torch.cat([data.c, torch.zeros(2, 1, 1)], 2))
    draws = {k: v[None].expand(2, *v.shape) for k, v in phase.draw(torch.Generator(), 1).items()}
    draws["told_S"] = torch.zeros(2, 1)
    turned, relabelled = data.c.clone(), data.c.clone()
    turned[..., D:] = 1
    relabelled[..., :D] = 1 - relabelled[..., :D]
    plain, of_turn, of_label = (
        phase.loss(named_parameters(model), data._replace(c=c), draws, 0.5)
        for c in (data.c, turned, relabelled)
    )
    assert torch.equal(plain, of_label)
    assert not torch.equal(plain, of_turn)
    # at guidance 0 no label is left, and what was done still is
    told = torch.tensor([[1.0, 0.0, 1.0]])
    found = fresh(guidance=0).sample(told, torch.arange(1), nothing(1))
    without = torch.tensor([[0.0, 0.0, 1.0]])
    assert torch.equal(found, fresh().sample(without, torch.arange(1), nothing(1)))
    assert not torch.equal(found, fresh().sample(torch.zeros(1, 3), torch.arange(1), nothing(1)))


def test_dropout_factors_are_unbiased_and_only_there_when_asked_for() -> None:
    model = build(dropout=0.3)
    keep = model.rounds()[-1].phases[0].draw(torch.Generator().manual_seed(0), 2000)["keep_SW"]
    assert keep.shape == (2000, model.network.n_dropped)
    values = keep.unique()
    torch.testing.assert_close(values, torch.tensor([0, 1 / 0.7]))
    spread = math.sqrt(0.3 / 0.7 / keep.numel())
    assert float(keep.mean()) == pytest.approx(1, abs=5 * spread)
    assert "keep_SW" not in build().rounds()[-1].phases[0].draw(torch.Generator(), 1)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("prediction", ["residual", "v"])
def test_samples_without_a_condition_are_samples(space: str, prediction: str) -> None:
    spec = VolumeSpec(1, (8, 8, 8), D)
    model = loud(build(spec, space=SPACES[space], prediction=prediction))
    keys = torch.arange(3)
    known = torch.tensor([[1.0, 0.0]]).expand(3, -1)
    x = model.sample(torch.zeros(3, D), keys, nothing(3, spec.grid))
    assert x.shape == (3, 1, 8, 8, 8)
    assert torch.isfinite(x).all()
    assert not torch.equal(x, model.sample(known, keys, nothing(3, spec.grid)))
    bare = build(VolumeSpec(1, (8, 8, 8), 0), space=SPACES[space], prediction=prediction)
    assert bare.sample(torch.zeros(3, 0), keys, nothing(3, spec.grid)).shape == (3, 1, 8, 8, 8)


# --- reproducible --------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_sample_is_the_same_again_and_its_row_s_alone(
    sampler: dict[str, Any], space: str
) -> None:
    spec = VolumeSpec(1, (8, 8, 8), D, given=1)
    few = {**sampler, "steps": 3}
    g = torch.Generator().manual_seed(0)
    c, keys = torch.rand(4, D, generator=g), torch.tensor([5, 6, 7, 8])
    given = torch.rand(4, 1, 8, 8, 8, generator=g)
    a, again = (
        loud(build(spec, space=SPACES[space], sampler=few)).sample(c, keys, given) for _ in range(2)
    )
    assert torch.equal(a, again)
    model = loud(build(spec, space=SPACES[space], sampler=few))
    for change in ("c", "keys", "given"):
        rows = {"c": c.clone(), "keys": keys.clone(), "given": given.clone()}
        rows[change][2] = 99 if change == "keys" else 1 - rows[change][2]
        b = model.sample(rows["c"], rows["keys"], rows["given"])
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])
        assert not torch.equal(a[2], b[2]), change


# --- rounds and settings -------------------------------------------------------------------------


def test_rounds_say_what_reads_patients() -> None:
    """(share, phases, what the finish costs) of every round."""

    def plan(**settings: Any) -> list[tuple[float, list[str], str]]:
        rounds = build(VolumeSpec(1, (8, 8, 8), D), **settings).rounds()
        return [(round(r.share, 6), [p.name for p in r.phases], r.finish_privacy) for r in rounds]

    train = (1.0, ["denoising"], "none")
    linear = (0.0, [], "refused")
    assert plan(prediction="v") == [train]
    assert plan(space=SPACES["wavelet"]) == [linear, train]
    encode = (0.5, ["reconstruction"], "refused")
    assert plan(space=LATENT, prediction="v") == [encode, (0.5, ["denoising"], "none")]
    assert plan(space=LATENT) == [encode, linear, (0.5, ["denoising"], "none")]
    for settings in ({}, {"space": LATENT}):
        for r in build(VolumeSpec(1, (8, 8, 8), D), **settings).rounds():
            assert (r.finish is None) == (r.finish_privacy == "none")
            assert all(p.reads_patients for p in r.phases)


def config(backbone: Mapping[str, Any]) -> Config:
    return configfile.validate(
        {
            "data": {"source": "x", "grid": [8, 8, 8]},
            "backbone": {"name": "ddpm", **backbone},
            "privacy": None,
            "train": {"max_steps": 1},
        },
        "x.yaml",
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"space": {"kind": "latent", "autoencoder": {"code": {"kind": "vector"}}}},
            "space.autoencoder.code: a diffusion needs a map; set kind: map",
        ),
        ({"guidance": 3, "unconditional": 0}, "set unconditional above 0, 0.1 for instance"),
        ({"space": {"kind": "wavelet", "levels": 3}}, "backbone.space.levels"),
        ({"space": {"kind": "wavelet", "level": 1}}, "level: unknown key; did you mean levels?"),
        ({"space": {"kind": "fourier"}}, "backbone.space.kind: unknown name 'fourier'"),
        ({"sampler": {"name": "euler"}}, "backbone.sampler.name: unknown name 'euler'"),
        ({"prediction": "score"}, "backbone.prediction"),
        ({"widths": []}, "backbone.widths"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_with_what_to_do(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        config(wrong)
    text = str(error.value)
    assert text.startswith("config x.yaml: backbone")
    assert said in text
    assert len(text.splitlines()) <= 2


# --- training on toys ----------------------------------------------------------------------------

TOY = (8, 8, 8)
RUN = config({})


def loader(
    x: np.ndarray[Any, Any],
    labels: Sequence[str] | None = None,
    given: np.ndarray[Any, Any] | None = None,
    batch: int = 32,
) -> Loader:
    """One scan a patient, none held out; x and given (m, X, Y, Z)."""
    channels = [ChannelInfo("T1w")]
    volumes = [x]
    if given is not None:
        channels.append(ChannelInfo("seg:a", mask="seg", label_value=1, given=True))
        volumes.append(given)
    data = Dataset(
        volumes=np.stack(volumes, 1).astype(np.float16),
        patients=np.array([f"p{i:02d}" for i in range(len(x))]),
        labels=[{"dx": k} for k in labels] if labels else [{}] * len(x),
        holdout=np.zeros(len(x), bool),
        channels=channels,
        affine=np.eye(4),
    )
    declared = {"dx": Categorical(categories=("A", "B"))} if labels else {}
    return Loader(data, Conditions(declared), batch, Augment())


def train(state: Training, source: Loader, stop_at: int = 10**9) -> Training:
    """The loop of stages/train.py without its files and signals."""
    seen = 0
    while state.round < len(state.rounds) and seen < stop_at:
        while state.step < state.steps[state.round] and seen < stop_at:
            one_step(state, source, RUN, Key.root(0), "cpu", amp=False)
            state.step += 1
            seen += 1
        if state.step == state.steps[state.round]:
            state.end_round(source.all_train("cpu"))
    return state


def trained(source: Loader, steps: int = 150, **settings: Any) -> Diffusion:
    # voxels are many, and need features of a wider view and not of many bands
    widths = (8, 16) if settings["space"] == VOXEL else (32,)
    model = build(source.spec, **{"widths": widths, "ema": 0.98, **settings})
    counts = [round(r.share * steps) if r.phases else 0 for r in model.rounds()]
    train(Training(model, counts), source)
    return model


def classes(m: int = 40) -> Loader:
    """Class A has a bright slab in x, class B a dark one in z, on grey with texture."""
    rng = np.random.default_rng(0)
    x = np.full((m, *TOY), 0.5)
    x[::2, :3] = 0.9
    x[1::2, :, :, 5:] = 0.1
    return loader(x + 0.05 * rng.standard_normal(x.shape), ["A", "B"] * (m // 2), batch=20)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("prediction", ["residual", "v"])
def test_each_class_has_its_own_structure(space: str, prediction: str) -> None:
    """The mean of each part of a volume by class: a contrast of 0.4, told apart by a quarter."""
    model = trained(classes(), 200, space=SPACES[space], prediction=prediction)
    n = 32
    for c, slab, plate in (([1.0, 0.0], 0.9, 0.5), ([0.0, 1.0], 0.5, 0.1)):
        x = model.sample(torch.tensor([c] * n), torch.arange(n), nothing(n, TOY))[:, 0]
        found = [x[:, :3, :, :5].mean(), x[:, 3:, :, 5:].mean(), x[:, 3:, :, :5].mean()]
        assert [float(v) for v in found] == pytest.approx([slab, plate, 0.5], abs=0.1)


def bright_or_dark(m: int = 32) -> Loader:
    """A cube that is black or white, on grey with texture."""
    rng = np.random.default_rng(0)
    x = np.full((m, *TOY), 0.5)
    x[:, 4:, 4:, 4:] = (np.arange(m) % 2)[:, None, None, None]
    return loader(x + 0.05 * rng.standard_normal(x.shape))


def test_what_no_gaussian_can_say_is_learned_on_top_of_one() -> None:
    """A cube that is black or white comes out so; from the linear start alone also grey."""
    source, n = bright_or_dark(), 96

    def grey_and_white(steps: int) -> tuple[float, float, float]:
        model = trained(source, steps, space=SPACES["wavelet"])
        x = model.sample(torch.zeros(n, 0), torch.arange(n), nothing(n, TOY))[:, 0]
        cube = x[:, 4:, 4:, 4:].mean((1, 2, 3))
        grey = ((cube - 0.5).abs() < 0.25).float().mean()
        return float(grey), float((cube > 0.5).float().mean()), float(x[:, :4].std())

    # of a Gaussian with the cube's mean and deviation, 38 % lie in the grey half between the two
    grey, _, texture = grey_and_white(0)
    assert grey == pytest.approx(0.383, abs=5 * math.sqrt(0.383 * 0.617 / n))
    assert texture == pytest.approx(0.05, rel=0.1)
    grey, white, texture = grey_and_white(200)
    assert grey < 0.05
    assert white == pytest.approx(0.5, abs=0.2)
    assert texture == pytest.approx(0.05, rel=0.2), "and the rest stays as it was"


def boxes(m: int, seed: int) -> np.ndarray[Any, Any]:
    """Masks (m, X, Y, Z): a box of random place and size."""
    rng = np.random.default_rng(seed)
    out = np.zeros((m, *TOY))
    for mask in out:
        low = rng.integers(0, 4, 3)
        high = low + rng.integers(3, 5, 3)
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
    return out


@pytest.mark.parametrize(
    "space", [VOXEL, {"kind": "wavelet", "levels": 1}], ids=["voxel", "wavelet"]
)
@pytest.mark.parametrize("prediction", ["residual", "v"])
def test_images_follow_masks_that_were_never_seen(space: dict[str, Any], prediction: str) -> None:
    masks = boxes(64, 0)
    texture = 0.03 * np.random.default_rng(1).standard_normal(masks.shape)
    source = loader(0.2 + 0.6 * masks + texture, given=masks, batch=20)
    model = trained(source, 120, space=space, prediction=prediction)
    new = torch.from_numpy(boxes(16, 9)).float()[:, None]
    x = model.sample(torch.zeros(16, 0), torch.arange(16), new)
    inside = (x * new).sum() / new.sum()
    outside = (x * (1 - new)).sum() / (1 - new).sum()
    assert float(inside - outside) == pytest.approx(0.6, abs=0.15)
    # each follows its own mask more than any other one
    flat = [(v - v.mean((1, 2, 3, 4), keepdim=True)).flatten(1) for v in (x, new)]
    likeness = torch.nn.functional.normalize(flat[0]) @ torch.nn.functional.normalize(flat[1]).T
    assert torch.equal(likeness.argmax(1), torch.arange(16))


# --- stopped and gone on with --------------------------------------------------------------------


def test_a_given_mask_lies_where_the_voxels_of_a_code_lie() -> None:
    """36 voxels are padded to 40 at their far end: the last of five cells holds the last four."""
    spec = dataclasses.replace(SPEC, grid=(36, 40, 40), given=1)
    space = {"kind": "latent", "autoencoder": {"widths": [4, 4, 4], "code": {"kind": "map"}}}
    model = build(spec, space=space)
    given = torch.zeros(1, 1, 36, 40, 40)
    given[:, :, 32:] = 1
    placed = model.space.place(given)
    assert placed.shape[2:] == (5, 5, 5)
    assert (placed[0, 0, 4] == 1).all() and not placed[0, 0, :4].any()


@pytest.mark.parametrize("space", ["wavelet", "latent"])
@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_stopped_anywhere_and_resumed_ends_in_the_same_weights(
    space: str, stop_at: int, tmp_path: Path
) -> None:
    """Before the linear fit, right after it, and amid the diffusion, whose average is under way."""
    source = classes(20)

    def fresh() -> Diffusion:
        return build(source.spec, space=SPACES[space], dropout=0.2)

    steps = [4, 0, 4] if space == "latent" else [0, 8]
    whole = train(Training(fresh(), steps), source)
    first = train(Training(fresh(), steps), source, stop_at)
    first.save(tmp_path / "checkpoint")
    second = Training.restore(fresh(), tmp_path / "checkpoint")
    assert (second.round, second.step) == (first.round, first.step)
    train(second, source)
    expected, got = named_state(whole.model), named_state(second.model)
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert second.figures == whole.figures
    assert 0 < second.figures["linear_explained"] < 1
    assert got["wiener.mean_n"].any()


# --- examination ---------------------------------------------------------------------------------


def white(m: int, seed: int) -> Batch:
    """Patients of white noise: nothing of one tells anything of another."""
    g = torch.Generator().manual_seed(seed)
    x = (1 + torch.randn(m, 1, 1, *TOY, generator=g)) / 2
    return Batch(x, torch.zeros(m, 1, 0), torch.zeros(m, 1, 0, *TOY), torch.ones(m, 1))


def test_the_examination_tells_the_error_of_the_denoiser_by_noise_level() -> None:
    """White noise of deviation 1, untrained and unfitted: sigma / sqrt(1 + sigma^2)."""
    model = silent(build(VolumeSpec(1, TOY, 0)))
    rows = model.examine(white(20, 0), white(20, 1)).tables["denoising"]
    for row in rows:
        sigma = float(row["noise"])
        for side in ("train", "holdout"):
            # of 10 000 numbers
            exact = sigma / math.hypot(1, sigma)
            assert row[f"linear_{side}"] == pytest.approx(exact, rel=0.04)
            assert row[f"model_{side}"] == row[f"linear_{side}"], "the network says nothing"
    alone = model.examine(white(20, 0), None).tables["denoising"]
    assert [set(r) for r in alone] == [{"noise", "model_train", "linear_train"}] * len(rows)
    assert all(a["model_train"] == r["model_train"] for a, r in zip(alone, rows, strict=True))
    papers = build(VolumeSpec(1, TOY, 0), prediction="v").examine(white(4, 0), None)
    assert set(papers.tables["denoising"][0]) == {"noise", "model_train"}


def test_memorising_shows_in_the_examination() -> None:
    """A model that has learned four patients of white noise by heart denoises them better."""
    source = loader(white(4, 0).x[:, 0, 0].numpy(), batch=4)
    rows = {}
    for steps in (0, 150):
        model = trained(source, steps, space=SPACES["wavelet"], factors=0)
        seen = model.examine(white(4, 0), white(20, 1))
        rows[steps] = next(r for r in seen.tables["denoising"] if r["noise"] == 1.0)
    before, after = (float(r["model_train"]) / float(r["model_holdout"]) for r in rows.values())
    assert after < 0.8 * before
    assert rows[150]["model_train"] < rows[150]["linear_train"]
    assert rows[150]["model_holdout"] > rows[150]["linear_holdout"]


def test_the_network_never_sees_a_single_volume_when_it_is_examined() -> None:
    """One volume at a time takes a path several times slower on a CPU."""
    model = build(VolumeSpec(1, TOY, 0))
    calls = counted(model)
    model.examine(white(20, 0), None)
    assert min(calls) > 1
