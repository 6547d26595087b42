"""Denoising diffusion model on volumes.

Ho et al. 2020 (arXiv:2006.11239); the cosine schedule of Nichol and Dhariwal 2021
(arXiv:2102.09672); v-prediction of Salimans and Ho 2022 (arXiv:2202.00512); classifier-free
guidance of Ho and Salimans 2022 (arXiv:2207.12598). Process and samplers stand in diffusion.py and
samplers.py, the spaces in space.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor, nn
from torch.func import functional_call

from synthmed.backbones.autoencoder import MapCode
from synthmed.backbones.diffusion import Process, Schedule
from synthmed.backbones.examining import in_chunks
from synthmed.backbones.generative import (
    Batch,
    Draws,
    Examination,
    Params,
    Phase,
    Round,
    VolumeSpec,
    submodule,
)
from synthmed.backbones.nets.unet import UNet
from synthmed.backbones.nets.wiener import Filtered, Wiener
from synthmed.backbones.samplers import DPMSolver, Sampler
from synthmed.backbones.space import Latent, Space, Wavelet, numbers
from synthmed.inventory import fast_bfloat16
from synthmed.keys import Key, torch_generator

if TYPE_CHECKING:
    from synthmed.config import Optimizer

# with a linear start, the log of the noise level (in units of the data) is drawn from N(m, s^2), as
# in Karras et al. 2022, table 1: far above and below, the linear denoiser leaves nothing to learn
_LOG_SIGMA = (math.log(0.8), 1.6)
_ATTACKED_AT = (0.1, 0.2, 0.5, 1.0)  # noise levels of the membership attack
_ATTACK_DRAWS = 4  # noises at each of them
_LOOKED_AT = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # noise levels of the examination


class DDPM(BaseModel):
    """Denoising diffusion model on voxels, wavelet bands or codes.

    Args:
        space: voxels, wavelet bands or codes of an autoencoder.
        schedule: of the noise over `steps` times.
        steps: T.
        prediction: what the network puts out. `epsilon`, `sample` and `v` are those of the papers,
            with times drawn evenly. `residual` is what the best linear denoiser of the cohort
            leaves (nets/wiener.py), with noise levels drawn where it leaves most: on small
            cohorts and budgets training starts far ahead. Fitting it reads patients.
        factors: most factors of that linear denoiser.
        widths: channels of the network from the finest level to the coarsest.
        depth: residual blocks a level.
        dropout: share of channels that are dropped in each block.
        unconditional: share of training in which the condition is left out, for guidance.
        guidance: w of classifier-free guidance when sampling; 1 is the condition as learned.
        sampler: how samples are drawn.
        ema: decay of the moving average of the weights that is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["ddpm"] = "ddpm"
    space: Space = Wavelet()
    schedule: Schedule = "cosine"
    steps: Annotated[int, Field(ge=10, le=10_000)] = 1000
    prediction: Literal["residual", "v", "epsilon", "sample"] = "residual"
    factors: Annotated[int, Field(ge=0, le=128)] = 24
    widths: Annotated[tuple[Annotated[int, Field(ge=4, le=1024)], ...], Field(min_length=1)] = (
        32,
        96,
        192,
    )
    depth: Annotated[int, Field(ge=1, le=8)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    unconditional: Annotated[float, Field(ge=0, lt=1)] = 0.1
    guidance: Annotated[float, Field(ge=0, le=20)] = 1.0
    sampler: Sampler = DPMSolver()
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999

    @model_validator(mode="after")
    def _consistent(self) -> DDPM:
        if isinstance(self.space, Latent) and not isinstance(self.space.autoencoder.code, MapCode):
            raise ValueError("space.autoencoder.code: a diffusion needs a map; set kind: map")
        if self.guidance != 1 and not self.unconditional:
            raise ValueError(
                "guidance other than 1 needs a model that has seen no condition as well: "
                "set unconditional above 0, 0.1 for instance"
            )
        return self

    def build(self, spec: VolumeSpec, optimizer: Optimizer) -> Diffusion:
        """The model for volumes of this kind; weights from torch's global generator."""
        return Diffusion(self, spec, optimizer)


class Diffusion:
    """The network, its loss and the sampler of one diffusion model."""

    def __init__(self, config: DDPM, spec: VolumeSpec, optimizer: Optimizer) -> None:
        self.config, self.spec, self.optimizer = config, spec, optimizer
        self.process = Process(config.schedule, config.steps)
        self.space = config.space.build(spec, optimizer)
        self.n_labels = spec.n_labels
        shape = self.space.shape
        self.wiener: Wiener | None = None
        inputs = shape[0]
        if config.prediction == "residual":
            size = numbers(self.space)
            self.wiener = Wiener(size, config.factors, self.n_labels, spec.label_widths)
            inputs = 2 * shape[0]  # what is seen, and what the linear denoiser makes of it
        self.network = UNet(
            inputs + self.space.given_channels,
            shape[0],
            shape[1:],
            config.widths,
            config.depth,
            spec.condition_width,
        )

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Network, linear denoiser and what the space has learned."""
        linear = {} if self.wiener is None else {"wiener": self.wiener}
        return {"network": self.network, **linear, **self.space.modules}

    def rounds(self) -> Sequence[Round]:
        """What the space needs, the linear denoiser without a step, then the diffusion."""
        before = self.space.rounds()
        phase = Phase(
            name="denoising",
            trainable=lambda name: name.startswith("network."),
            draw=self._draw,
            loss=self._loss,
            optimizer=self.optimizer,
            reads_patients=True,
            ema=self.config.ema,
        )
        linear = [] if self.wiener is None else [self.wiener.start(self.space.enter)]
        return [*before, *linear, Round([phase], share=1 - sum(r.share for r in before))]

    # --- training -----------------------------------------------------------------------------

    def _draw(self, generator: Generator, n_scans: int) -> Draws:
        draws = {
            "eps_S": torch.randn(n_scans, *self.space.shape, generator=generator),
            "time_S": torch.rand(n_scans, generator=generator),
        }
        if self.config.unconditional:
            told = torch.rand(n_scans, generator=generator) >= self.config.unconditional
            draws["told_S"] = told.float()
        if self.config.dropout:
            kept = torch.rand(n_scans, self.network.n_dropped, generator=generator)
            kept = (kept >= self.config.dropout).float() / (1 - self.config.dropout)
            draws["keep_SW"] = kept
        return draws

    def _loss(self, params: Params, batch: Batch | None, draws: Draws, progress: float) -> Tensor:
        """Squared error of what is predicted, mean over the patient's scans: (B,)."""
        if batch is None:
            raise TypeError("the phase denoising reads patients: batch must not be None")
        b, s = batch.mask.shape
        c = batch.c.flatten(0, 1)
        y = self.space.enter(batch.x.flatten(0, 1), c)
        place = self.space.place(batch.given.flatten(0, 1))
        if "told_S" in draws:
            c = c * self._labels(draws["told_S"].flatten()[:, None])
        eps = draws["eps_S"].flatten(0, 1)
        u = draws["time_S"].flatten()
        keep = draws["keep_SW"].flatten(0, 1) if "keep_SW" in draws else None
        mine = submodule(params, "network")

        def network(x: Tensor, level: Tensor) -> Tensor:
            out: Tensor = functional_call(self.network, mine, (x, level, c, keep))
            return out.float()

        if self.config.prediction == "residual":
            centre, spread = _LOG_SIGMA
            level = centre + spread * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4))
            sigma = level.exp()
            f = self._filtered(y + sigma[:, None, None, None, None] * eps, sigma, c)
            out = network(self._inputs(f, place), level)
            wanted = (y - f.clean) / f.unit
            error = f.weight * (out - wanted) ** 2
        else:
            t = u * (self.config.steps - 1)
            x_t = self.process.diffuse(y, eps, t)
            out = network(torch.cat([x_t, place], 1), self._level(t))
            wanted = self.process.target(self.config.prediction, y, eps, t)
            error = (out - wanted) ** 2
        loss = error.flatten(1).mean(1).reshape(b, s)
        return (loss * batch.mask).sum(1) / batch.mask.sum(1)

    def _labels(self, told: Tensor) -> Tensor:
        """Factors (B, D) for conditions: told (B, 1) for labels, 1 for what tells augmentation."""
        whole = told.new_ones(len(told), self.spec.told_width)
        return torch.cat([told.expand(-1, self.n_labels), whole], 1)

    def _level(self, t: Tensor) -> Tensor:
        """Log of the noise level at times t, float32."""
        return -0.5 * self.process.log_snr(t).float()

    def _filtered(self, y: Tensor, sigma: Tensor, c: Tensor) -> Filtered:
        """The linear denoiser's answer, in the shape of the space."""
        if self.wiener is None:
            raise TypeError("only a model with a linear start has a linear denoiser")
        with torch.autocast(y.device.type, enabled=False):
            flat = self.wiener(y.float().flatten(1), sigma, c[:, : self.n_labels])
        return Filtered(*(v.reshape(y.shape) for v in flat))

    def _inputs(self, f: Filtered, place: Tensor) -> Tensor:
        return torch.cat([f.seen, f.guess, place], 1)

    # --- sampling -----------------------------------------------------------------------------

    def _denoised(self, x_t: Tensor, t: float, c: Tensor, place: Tensor) -> Tensor:
        """The expected clean tensor (B, E, x, y, z), given x_t at one time for all."""
        time = torch.full((len(x_t),), t, dtype=torch.float64, device=x_t.device)
        level = self._level(time)
        if self.config.prediction == "residual":
            alpha, _ = self.process.alpha_sigma(time[0])
            f = self._filtered(x_t / float(alpha), level.exp(), c)
            residual: Tensor = self.network(self._inputs(f, place), level, c).float()
            return f.clean + f.unit * residual
        out = self.network(torch.cat([x_t, place], 1), level, c).float()
        return self.process.estimates(self.config.prediction, out, x_t, time)[0]

    @torch.no_grad()
    def sample(self, conditions: Tensor, keys: Tensor, given: Tensor) -> Tensor:
        """Draw by the configured sampler: (B, C, X, Y, Z)."""
        device = conditions.device
        generators = [torch_generator(int(k)) for k in keys]

        def normal(shape: Sequence[int]) -> Tensor:
            return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)

        place = self.space.place(given)
        nothing = conditions * self._labels(torch.zeros_like(conditions[:, :1]))
        w = self.config.guidance
        if torch.equal(nothing, conditions):  # whatever its weight, it is the same answer
            w = 1.0

        def denoise(x_t: Tensor, t: float) -> Tensor:
            told = self._denoised(x_t, t, conditions, place)
            if w == 1:
                return told
            untold = self._denoised(x_t, t, nothing, place)
            return untold + w * (told - untold)

        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device.type)):
            y = self.config.sampler.draw(denoise, self.process, lambda: normal(self.space.shape))
        white = normal((self.spec.channels, *self.spec.grid))
        return self.space.leave(y, conditions, white)

    # --- what is seen of it -------------------------------------------------------------------

    @torch.no_grad()
    def membership_scores(
        self, x: Tensor, c: Tensor, given: Tensor, key: Key
    ) -> Mapping[str, Tensor]:
        """Minus the log of the denoising error, mean over noise levels; of codes also theirs.

        The error at a level is the squared one of the clean tensor, mean over its numbers and over
        draws: whatever the network puts out, it is the loss of Ho et al. 2020, eq. 14 times a
        constant of the level, which the log takes out, so that levels count alike. The levels are
        the middle ones: with little noise everything is denoised from itself, with much from what
        all scans have in common.

        Source: Carlini et al. 2023 (arXiv:2301.13188), Matsumoto et al. 2023
        (arXiv:2302.03262); on the times Duan et al. 2023 (arXiv:2302.01316).
        """
        y, place = self.space.enter(x, c), self.space.place(given)
        score = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for i, sigma in enumerate(_ATTACKED_AT):
            t = float(self.process.time_of_sigma(torch.tensor(sigma, dtype=torch.float64)))
            alpha, noise = (float(v) for v in self.process.alpha_sigma(torch.tensor(t)))
            error = torch.zeros_like(score)
            for k in range(_ATTACK_DRAWS):
                eps = torch.randn(self.space.shape, generator=key.fold("noise", i, k).torch())
                clean = self._denoised(alpha * y + noise * eps.to(y.device), t, c, place)
                error += (clean.double() - y.double()).square().flatten(1).mean(1)
            score -= (error / _ATTACK_DRAWS).clamp(min=1e-30).log() / len(_ATTACKED_AT)
        return {"denoising loss": score, **self.space.membership_scores(x, c)}

    def remarks(
        self, recent: Sequence[Mapping[str, float]], figures: Mapping[str, float]
    ) -> Sequence[str]:
        """Nothing: its loss has no state of collapse, and memorising is watched by the loop."""
        return []

    @torch.no_grad()
    def examine(self, train: Batch, holdout: Batch | None) -> Examination:
        """How well patients of either side are denoised, by noise level: memorising shows here."""
        rows = []
        for sigma in _LOOKED_AT:
            row: dict[str, float | str] = {"noise": sigma}
            for side, batch in (("train", train), ("holdout", holdout)):
                if batch is not None:
                    row |= self._error(batch, sigma, side)
            rows.append(row)
        return Examination(tables={"denoising": rows})

    def _error(self, batch: Batch, sigma: float, side: str) -> dict[str, float | str]:
        """Root mean squared errors of model and linear denoiser, in units of the space."""
        device = batch.x.device
        t = float(self.process.time_of_sigma(torch.tensor(sigma, dtype=torch.float64)))
        alpha, noise = (float(v) for v in self.process.alpha_sigma(torch.tensor(t)))
        key = Key.root(0).fold("examine", side)
        x, c, given = batch.x[:, 0], batch.c[:, 0], batch.given[:, 0]
        each = [torch.randn(self.space.shape, generator=key.fold(i).torch()) for i in range(len(x))]
        y = in_chunks(self.space.enter, x, c)
        x_t = alpha * y + noise * torch.stack(each).to(device)

        def denoised(part: Tensor, known: Tensor, masks: Tensor) -> Tensor:
            return self._denoised(part, t, known, self.space.place(masks))

        clean = {"model": in_chunks(denoised, x_t, c, given)}
        if self.wiener is not None:
            level = torch.full((len(x),), noise / alpha, device=device)
            clean["linear"] = in_chunks(
                lambda *rows: self._filtered(*rows).clean, x_t / alpha, level, c
            )
        return {
            f"{who}_{side}": round(float((made - y).square().mean().sqrt()), 5)
            for who, made in clean.items()
        }
