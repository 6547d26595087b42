"""The loop of rounds and phases fits what is to come: a WGAN-GP, a latent model, a late mixture.

Three tiny models, each trained by the same `one_step` and `Training` as the real backbones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, vmap

from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.backbones.generative import Batch, Draws, Params, Phase, Round, submodule
from synthmed.conditions import Conditions
from synthmed.config import Augment, Config, Optimizer
from synthmed.keys import Key, torch_generator
from synthmed.loader import Loader
from synthmed.training import Training, named_state, one_step

GRID = (8, 8, 8)
VOXELS = 512
ADAM = Optimizer(learning_rate=5e-3, betas=(0.5, 0.9), weight_decay=0.0)


class TinyWGAN:
    """Critic and generator; the penalty's gradient by vmap, one patient at a time."""

    def __init__(self) -> None:
        self.critic = nn.Sequential(
            nn.Flatten(), nn.Linear(VOXELS, 16), nn.SiLU(), nn.Linear(16, 1)
        )
        self.generator = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, VOXELS))

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}

    def rounds(self) -> Sequence[Round]:
        critic = Phase("critic", _starts("critic"), self._draw, self._critic_loss, ADAM, True)
        generator = Phase(
            "generator", _starts("generator"), self._draw, self._generator_loss, ADAM, False,
            ema=0.9, every=2,
        )  # fmt: skip
        return [Round([critic, generator])]

    def _draw(self, g: Generator, n_scans: int) -> Draws:
        return {"z": torch.randn(n_scans, 2, generator=g), "t": torch.rand(n_scans, generator=g)}

    def _fake(self, params: Params, z: Tensor) -> Tensor:
        made: Tensor = functional_call(self.generator, submodule(params, "generator"), (z,))
        return made.reshape(-1, 1, *GRID)

    def _critic_loss(
        self, params: Params, batch: Batch | None, draws: Draws, progress: float
    ) -> Tensor:
        assert batch is not None
        mine = submodule(params, "critic")

        def score(x: Tensor) -> Tensor:
            value: Tensor = functional_call(self.critic, mine, (x[None],))
            return value[0, 0]

        real = batch.x.flatten(0, 1)
        fake = self._fake(params, draws["z"].flatten(0, 1)).detach()
        t = draws["t"].flatten()[:, None, None, None, None]
        slope = vmap(grad(score))(t * real + (1 - t) * fake).flatten(1).norm(dim=1)
        loss = vmap(score)(fake) - vmap(score)(real) + 10 * (slope - 1) ** 2
        return loss.reshape(batch.mask.shape).mean(1)

    def _generator_loss(
        self, params: Params, batch: Batch | None, draws: Draws, progress: float
    ) -> Tensor:
        assert batch is None
        fake = self._fake(params, draws["z"].flatten(0, 1))
        value: Tensor = functional_call(self.critic, submodule(params, "critic"), (fake,))
        return -value[:, 0]

    def sample(self, conditions: Tensor, keys: Tensor) -> Tensor:
        z = torch.stack([torch.randn(2, generator=torch_generator(int(k))) for k in keys])
        return self._fake({f"generator.{k}": v for k, v in self.generator.named_parameters()}, z)


class Scale(nn.Module):
    """The latent's scale: a buffer that `finish` sets."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones(()))


class TinyLatent:
    """Round one: an autoencoder, whose finish measures the scale. Round two: a latent denoiser."""

    def __init__(self) -> None:
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(VOXELS, 3))
        self.decoder = nn.Linear(3, VOXELS)
        self.scale = Scale()
        self.denoiser = nn.Linear(3, 3)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "scale": self.scale,
            "denoiser": self.denoiser,
        }

    def rounds(self) -> Sequence[Round]:
        code = Phase(
            "code", lambda n: n.startswith(("encoder", "decoder")), self._nothing, self._code_loss,
            ADAM, True,
        )  # fmt: skip
        latent = Phase("latent", _starts("denoiser"), self._noise, self._latent_loss, ADAM, True)
        return [
            Round([code], share=0.5, finish=self._measure, finish_privacy="charged"),
            Round([latent], share=0.5),
        ]

    def _nothing(self, g: Generator, n_scans: int) -> Draws:
        return {"unused": torch.zeros(n_scans)}

    def _noise(self, g: Generator, n_scans: int) -> Draws:
        return {"eps": torch.randn(n_scans, 3, generator=g)}

    def _latent(self, params: Params, batch: Batch) -> Tensor:
        z: Tensor = functional_call(
            self.encoder, submodule(params, "encoder"), (batch.x.flatten(0, 1),)
        )
        return z

    def _code_loss(
        self, params: Params, batch: Batch | None, draws: Draws, progress: float
    ) -> Tensor:
        assert batch is not None
        z = self._latent(params, batch)
        x = functional_call(self.decoder, submodule(params, "decoder"), (z,))
        return (x - batch.x.flatten(2)[:, 0]).square().mean(1)

    @torch.no_grad()
    def _measure(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        z = torch.cat([self.encoder(b.x.flatten(0, 1)) for b in batches])
        self.scale.value.copy_(z.std())
        return {"latent_sd": float(z.std())}

    def _latent_loss(
        self, params: Params, batch: Batch | None, draws: Draws, progress: float
    ) -> Tensor:
        assert batch is not None
        z = self._latent(params, batch) / self.scale.value
        eps = draws["eps"].flatten(0, 1)
        out = functional_call(self.denoiser, submodule(params, "denoiser"), (z + eps,))
        return (out - eps).square().mean(1)

    def sample(self, conditions: Tensor, keys: Tensor) -> Tensor:
        raise AssertionError("not under test")


class Mixture(nn.Module):
    """A Gaussian mixture of the latent, held in buffers so that it is saved with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, 3))
        self.register_buffer("weight", torch.zeros(2))


class TinyMixture(TinyLatent):
    """An autoencoder whose density is fitted once, at the end, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixture()

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder, "mixture": self.mixture}

    def rounds(self) -> Sequence[Round]:
        first, _ = super().rounds()
        return [Round(first.phases, finish=self._fit, finish_privacy="refused")]

    @torch.no_grad()
    def _fit(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        z = torch.cat([self.encoder(b.x.flatten(0, 1)) for b in batches]).numpy()
        fitted = GaussianMixture(2, random_state=0, reg_covar=1e-3).fit(z)
        self.mixture.mean.copy_(torch.from_numpy(fitted.means_))
        self.mixture.weight.copy_(torch.from_numpy(fitted.weights_))
        return {"log_likelihood": float(fitted.score(z))}


def _starts(module: str) -> Any:
    return lambda name: name.startswith(module + ".")


@pytest.fixture
def loader() -> Loader:
    """24 patients in two groups, bright and dark."""
    rng = np.random.default_rng(0)
    level = np.repeat([0.2, 0.8], 12)[:, None, None, None, None]
    volumes = (level + 0.05 * rng.standard_normal((24, 1, *GRID))).astype(np.float16)
    dataset = Dataset(
        volumes=volumes,
        patients=np.array([f"p{i:02d}" for i in range(24)]),
        labels=[{}] * 24,
        holdout=np.zeros(24, bool),
        channels=[ChannelInfo("T1w")],
        affine=np.eye(4),
    )
    return Loader(dataset, Conditions({}), 8, Augment())


@pytest.fixture
def config() -> Config:
    return Config.model_validate(
        {
            "data": {"source": "x", "grid": GRID},
            "backbone": {"name": "cvae"},
            "privacy": None,
            "train": {"max_steps": 1},
        }
    )


def run(
    state: Training, loader: Loader, config: Config, stop_at: int = 10**9
) -> list[dict[str, Any]]:
    """The loop of stages/train.py without its files and signals."""
    seen = []
    while state.round < len(state.rounds) and len(seen) < stop_at:
        while state.step < state.steps[state.round] and len(seen) < stop_at:
            seen.append(one_step(state, loader, config, Key.root(0), "cpu", amp=False))
            state.step += 1
        if state.step == state.steps[state.round]:
            state.end_round(loader.all_train("cpu"))
    return seen


def seeded(kind: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def test_a_wgan_gp_interleaves_two_phases_and_learns(loader: Loader, config: Config) -> None:
    model = seeded(TinyWGAN)
    keys = torch.arange(64)
    with torch.no_grad():
        before = model.sample(torch.zeros(64, 0), keys).mean()
    seen = run(Training(model, [300]), loader, config)
    assert sum("generator" in s for s in seen) == 150
    assert sum("critic" in s for s in seen) == 300
    with torch.no_grad():
        after = model.sample(torch.zeros(64, 0), keys).mean()
    # the data's mean is 0.5, an untrained generator's is about 0
    assert abs(after - 0.5) < 0.5 * abs(before - 0.5)


def test_only_the_critic_reads_patients_and_its_gradient_is_one_patient_s(
    loader: Loader, config: Config
) -> None:
    model = seeded(TinyWGAN)
    critic, generator = model.rounds()[0].phases
    assert loader.draw(generator, Key.root(0), 0, "cpu")[0] is None
    batch, draws = loader.draw(critic, Key.root(0), 0, "cpu")
    assert batch is not None
    params = {
        f"{m}.{k}": p.detach()
        for m, mod in model.modules.items()
        for k, p in mod.named_parameters()
    }

    def one(p: Params, b: Batch, d: Draws) -> Tensor:
        return critic.loss(
            p, Batch(*(t[None] for t in b)), {k: v[None] for k, v in d.items()}, 0.0
        )[0]

    each = vmap(grad(one), in_dims=(None, 0, 0))(params, batch, draws)
    for i in range(8):
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        loss = one(leaves, Batch(*(t[i] for t in batch)), {k: v[i] for k, v in draws.items()})
        brute = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for k, g in zip(leaves, brute, strict=True):
            expected = torch.zeros_like(leaves[k]) if g is None else g
            torch.testing.assert_close(each[k][i], expected, rtol=1e-4, atol=1e-6)


def test_a_latent_model_trains_its_second_round_on_the_first_one_s_scale(
    loader: Loader, config: Config
) -> None:
    model = seeded(TinyLatent)
    state = Training(model, [60, 20])
    run(state, loader, config, stop_at=60)
    assert state.round == 1
    assert state.figures["latent_sd"] == pytest.approx(float(model.scale.value))
    assert model.scale.value != 1
    encoder = {k: v.clone() for k, v in named_state(model).items() if k.startswith("encoder")}
    denoiser = model.denoiser.weight.detach().clone()
    run(state, loader, config)
    assert all(torch.equal(v, named_state(model)[k]) for k, v in encoder.items())
    assert not torch.equal(denoiser, model.denoiser.weight)


def test_a_mixture_fitted_at_the_end_finds_both_groups_and_is_saved(
    loader: Loader, config: Config
) -> None:
    model = seeded(TinyMixture)
    run(Training(model, [150]), loader, config)
    decoded = model.decoder(model.mixture.mean).mean(1)
    assert sorted(decoded.tolist()) == pytest.approx([0.2, 0.8], abs=0.1)
    assert "mixture.mean" in named_state(model)


@pytest.mark.parametrize("kind", [TinyWGAN, TinyLatent, TinyMixture])
@pytest.mark.parametrize("stop_at", [1, 7, 10, 11, 17])
def test_stopped_anywhere_and_resumed_ends_in_the_same_weights(
    loader: Loader, config: Config, tmp_path: Path, kind: Any, stop_at: int
) -> None:
    steps = [20] if kind is not TinyLatent else [10, 10]
    whole = Training(seeded(kind), steps)
    run(whole, loader, config)
    first = Training(seeded(kind), steps)
    run(first, loader, config, stop_at)
    first.save(tmp_path / "checkpoint")
    second = Training.restore(seeded(kind), tmp_path / "checkpoint")
    run(second, loader, config)
    expected, got = named_state(whole.model), named_state(second.model)
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert second.figures == whole.figures


@pytest.mark.filterwarnings("ignore")  # Opacus warns of its own defaults on import
def test_opacus_takes_the_critic_s_per_patient_gradients(loader: Loader, config: Config) -> None:
    """Its optimizer clips each patient whole, penalty included, and divides by a constant."""
    from opacus.grad_sample import GradSampleModuleNoOp
    from opacus.optimizers import DPOptimizer

    model = seeded(TinyWGAN)
    critic = model.rounds()[0].phases[0]
    batch, draws = loader.draw(critic, Key.root(0), 0, "cpu")
    assert batch is not None
    generator = {f"generator.{k}": p.detach() for k, p in model.generator.named_parameters()}
    before = {f"critic.{k}": p.detach().clone() for k, p in model.critic.named_parameters()}

    def one(p: Params, b: Batch, d: Draws) -> Tensor:
        alone = Batch(*(t[None] for t in b))
        return critic.loss({**generator, **p}, alone, {k: v[None] for k, v in d.items()}, 0.0)[0]

    each = vmap(grad(one), in_dims=(None, 0, 0))(before, batch, draws)
    wrapped = GradSampleModuleNoOp(model.critic)
    for name, p in wrapped._module.named_parameters():
        p.grad_sample = each[f"critic.{name}"]
    clip, divisor, rate = 0.5, 10, 0.1
    sgd = torch.optim.SGD(wrapped.parameters(), lr=rate)
    optimizer = DPOptimizer(
        sgd, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=divisor
    )
    optimizer.step()

    norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
    assert (norms > clip).any()  # or clipping would not be seen
    factor = (clip / (norms + 1e-6)).clamp(max=1)
    for name, p in model.critic.named_parameters():
        total = torch.einsum("b,b...->...", factor, each[f"critic.{name}"])
        expected = before[f"critic.{name}"] - rate * total / divisor
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
