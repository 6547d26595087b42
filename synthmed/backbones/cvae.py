"""Conditional variational autoencoder with a learned decoder covariance.

Kingma and Welling 2014 (arXiv:1312.6114), Sohn et al. 2015 for the condition; free bits from
Kingma et al. 2016 (arXiv:1606.04934, eq. 15); the learned variance from Rybkin et al. 2021
(arXiv:2006.13202), extended to a learned residual spectrum (nets/noise.py). Sampling draws from
p(x | z, c), not from its mean alone: means of a VAE are smoother than any scan. A further weight
on the total correlation (Chen et al. 2018, arXiv:1802.04942) asks for latents that vary apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor, nn
from torch.func import functional_call

from synthmed.backbones.examining import (
    beside,
    closeness,
    evenly,
    in_chunks,
    scans,
    shares,
    traversal,
    units,
)
from synthmed.backbones.generative import (
    Batch,
    Draws,
    Examination,
    Params,
    Phase,
    Round,
    VolumeSpec,
    refuse_given,
    submodule,
)
from synthmed.backbones.nets.aggregate import AggregatePosterior, gaussian_total_correlation
from synthmed.backbones.nets.mixture import regress
from synthmed.keys import Key, torch_generator

if TYPE_CHECKING:
    from synthmed.config import Optimizer

N_SHOWN = 6
"""Scans of either side, and latents, that are drawn when a model is examined."""
N_DRAWS = 8
"""Latents of a posterior over which the evidence lower bound of a scan is averaged."""


class CVAE(BaseModel):
    """Conditional variational autoencoder with a learned texture.

    Args:
        latent: number of latent dimensions L.
        widths: channels from the finest level (half the grid) to the coarsest.
        beta: weight of the KL term once warmed up; 1 is the evidence lower bound.
        total_correlation: weight of the latents' total correlation on top of its share in the KL
            term (the beta of beta-TCVAE is beta + total_correlation); 0 leaves it out. What
            stands for it are the aggregate posterior's squared correlations, its leading term
            (nets/aggregate.py). It takes a thousand steps or more to tell, and reconstruction
            pays for it.
        warmup: share of training over which both weights rise from 0.
        free_bits: nats per latent dimension below which the KL is not pushed down further.
        noise: `spectral` learns the residual's texture, `white` one deviation a voxel.
        ema: decay of the moving average of the weights that is kept.
        prior: where z is drawn from. `fitted` is a Gaussian, linear in the condition, matched to
            the training patients' posteriors at the end, since on small cohorts these are far
            from N(0, I); the residual is measured on them then as well. It reads patients.
            `standard` is N(0, I).
        factors: most factors of the cohort's Gaussian (mean, labels' shifts, principal components)
            that latents and volumes begin as, so that there are at least as many latents; what the
            networks add starts near nothing. Fitting it reads patients, as the prior does that goes
            with it; 0 begins at nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["cvae"] = "cvae"
    latent: Annotated[int, Field(ge=1, le=1024)] = 32
    widths: Annotated[tuple[Annotated[int, Field(ge=4, le=512)], ...], Field(min_length=2)] = (
        16,
        32,
        64,
    )
    beta: Annotated[float, Field(gt=0, le=100)] = 1.0
    total_correlation: Annotated[float, Field(ge=0, le=1000)] = 0.0
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.3
    free_bits: Annotated[float, Field(ge=0, le=10)] = 0.05
    noise: Literal["spectral", "white"] = "spectral"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    prior: Literal["fitted", "standard"] = "fitted"
    factors: Annotated[int, Field(ge=0, le=256)] = 0

    @model_validator(mode="after")
    def _fitted(self) -> CVAE:
        if self.factors and self.prior == "standard":
            raise ValueError(
                "factors: they are fitted to patients; set prior: fitted, or factors: 0"
            )
        return self

    def build(self, spec: VolumeSpec, optimizer: Optimizer) -> ConditionalVAE:
        """The model for volumes of this kind; weights from torch's global generator.

        Raises:
            UsageError: masks are given, which this family cannot be told.
        """
        refuse_given(self.name, spec)
        return ConditionalVAE(self, spec, optimizer)


class ConditionalVAE:
    """The networks, the loss and the sampler of one conditional VAE."""

    def __init__(self, config: CVAE, spec: VolumeSpec, optimizer: Optimizer) -> None:
        from synthmed.backbones.nets.convolutional import Decoder, Encoder  # imports MONAI: seconds
        from synthmed.backbones.nets.gaussian import LinearCode
        from synthmed.backbones.nets.noise import SpectralNoise

        self.config = config
        self.number_names = spec.number_names
        self.shape = (spec.channels, *spec.grid)
        self.optimizer = optimizer
        self.linear = LinearCode.of(spec, config.factors)
        self.n_latent = max(config.latent, 0 if self.linear is None else self.linear.columns)
        sizes = (spec.channels, spec.grid, config.widths, spec.condition_width, self.n_latent)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes, linear=self.linear)
        self.noise = SpectralNoise(
            spec.channels, spec.grid, spectral=config.noise == "spectral", masks=spec.masks
        )
        self.prior = LatentPrior(spec.condition_width, self.n_latent)
        self.aggregate = AggregatePosterior(spec.condition_width, self.n_latent)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Encoder, decoder, observation noise and prior; sampling needs all but the first.

        With a weight on the total correlation also the aggregate posterior it is measured by.
        """
        modules: dict[str, nn.Module] = {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "noise": self.noise,
            "prior": self.prior,
        }
        return modules | ({"aggregate": self.aggregate} if self.config.total_correlation else {})

    def rounds(self) -> Sequence[Round]:
        """The Gaussian without a step, where there is one; then a round of one phase, whose end
        fits the prior and reports collapse."""
        phase = Phase(
            name="vae",
            trainable=lambda name: True,
            draw=self._draw,
            loss=self._loss,
            optimizer=self.optimizer,
            reads_patients=True,
            ema=self.config.ema,
        )
        # N(0, I) leaves `finish` with figures for the private log alone
        cost: Literal["refused", "none"] = "refused" if self.config.prior == "fitted" else "none"
        learned = Round([phase], finish=self._finish, finish_privacy=cost)
        return [learned] if self.linear is None else [self.linear.start(lambda x, c: x), learned]

    def _draw(self, generator: Generator, n_scans: int) -> Draws:
        return {"eps_SL": torch.randn(n_scans, self.n_latent, generator=generator)}

    def _begun(self, x: Tensor, c: Tensor) -> Tensor | None:
        return None if self.linear is None else self.linear.code(x.flatten(1), c)

    def _loss(self, params: Params, batch: Batch | None, draws: Draws, progress: float) -> Tensor:
        """What is minimised, in nats a voxel, mean over the patient's scans.

        The negative evidence lower bound under one deviation a channel, with `beta` and free bits,
        plus what fits the full covariance to the residual as given (`noise`). The bound of the
        model that is sampled is in `membership_scores`.
        """
        if batch is None:
            raise TypeError("the phase vae reads patients: batch must not be None")
        b, s = batch.mask.shape
        x, c = batch.x.flatten(0, 1), batch.c.flatten(0, 1)
        seen = (x, c, self._begun(x, c))
        mean, log_var = functional_call(self.encoder, submodule(params, "encoder"), seen)
        z = mean + (0.5 * log_var).exp() * draws["eps_SL"].flatten(0, 1)
        decoded = functional_call(self.decoder, submodule(params, "decoder"), (z, c))
        nll, fit = functional_call(self.noise, submodule(params, "noise"), (x - decoded,))
        # KL(q(z|x,c) || N(0, I)) a dimension, in nats
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var)
        kl = kl.clamp(min=self.config.free_bits).sum(1)
        warm = min(1.0, progress / max(self.config.warmup, 1e-9))
        loss: Tensor = nll + warm * self.config.beta * kl + fit
        if self.config.total_correlation:
            dependence, learned = functional_call(
                self.aggregate, submodule(params, "aggregate"), (mean, log_var.exp(), c)
            )
            loss = loss + warm * self.config.total_correlation * dependence + learned
        loss = (loss / x[0].numel()).reshape(b, s)
        return (loss * batch.mask).sum(1) / batch.mask.sum(1)

    @torch.no_grad()
    def _finish(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Fit the prior, and tell how much of the latent is used (Burda et al. 2016)."""
        posteriors, conditions = [], []
        for batch in batches:
            x, known, _ = scans(batch)
            posteriors.append(self._posterior(x, known))
            conditions.append(known)
        rows = evenly(batches)
        mean, log_var = torch.cat(posteriors)[rows].chunk(2, 1)
        c = torch.cat(conditions)[rows]
        if self.config.prior == "fitted":
            self.prior.fit(mean, log_var.exp(), c)
            self.noise.measure(lambda: map(self._residual, batches, posteriors))
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var)
        *_, rest = regress(mean, c)
        covariance = rest.T @ rest / len(rest) + log_var.exp().mean(0).double().cpu().diag()
        active = int((mean.var(0) > 0.01).sum())
        return {
            "latent_active": active,
            "latent": self.n_latent,
            "kl_nats": float(kl.sum(1).mean()),
            "total_correlation": gaussian_total_correlation(covariance),
            "noise_sd": float(self.noise.scale().median()),
        }

    def remarks(
        self, recent: Sequence[Mapping[str, float]], figures: Mapping[str, float]
    ) -> Sequence[str]:
        """Posterior collapse, once the round has ended."""
        if figures.get("latent_active", 2) < 2:
            return ["COLLAPSED: the latent is not used, samples will all look alike"]
        return []

    @torch.no_grad()
    def examine(self, train: Batch, holdout: Batch | None) -> Examination:
        """Reconstructions of either side, and what each latent does."""

        def rebuilt(x: Tensor, c: Tensor) -> Tensor:
            return in_chunks(self.decoder, self._posterior(x, c).chunk(2, 1)[0], c)

        what = "the decoder's mean for it"
        figures, pictures = beside(train, holdout, rebuilt, "reconstructions", what, N_SHOWN)
        x, c, _ = scans(train)
        mean, log_var = self._posterior(x, c).chunk(2, 1)
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean(0)
        sd = (mean.var(0, correction=0) + log_var.exp().mean(0)).sqrt()
        typical = c.mean(0)

        def decode(z: Tensor) -> Tensor:
            volume: Tensor = self.decoder(z, typical.expand(len(z), -1))
            return volume

        table = units(decode, mean, sd, x, c, {"kl_nats": kl}, self.number_names)
        strongest = [int(row["unit"]) - 1 for row in table[:N_SHOWN]]
        pictures["latents"] = (
            traversal(decode, mean, sd, strongest),
            f"Latents {', '.join(str(u + 1) for u in strongest)} from -2 to 2 standard deviations "
            "of the aggregate posterior, the others at their mean.",
        )
        return Examination(figures=figures, tables={"latents": table}, pictures=pictures)

    def _residual(self, batch: Batch, posterior: Tensor) -> tuple[Tensor, Tensor]:
        """How much each scan of a batch counts (n,), and what the decoder's mean lacks of it."""
        x, c, _ = scans(batch)
        return shares(batch), x - in_chunks(self.decoder, posterior.chunk(2, 1)[0], c)

    def _posterior(self, x: Tensor, c: Tensor) -> Tensor:
        """Mean and log variance of q(z | x, c) beside each other, (n, 2 L)."""
        return in_chunks(lambda a, k: torch.cat(self.encoder(a, k, self._begun(a, k)), 1), x, c)

    @torch.no_grad()
    def membership_scores(
        self, x: Tensor, c: Tensor, given: Tensor, key: Key
    ) -> Mapping[str, Tensor]:
        """The evidence lower bound in nats a voxel, and the reconstruction at the posterior mean.

        The bound is that of the model that is sampled: E_q log p(x | z, c) under the learned
        covariance, less KL(q(z | x, c) || p(z | c)) from the prior as it was fitted. With factors
        also minus the log of a scan's distance from all draws of the Gaussian; the bound then takes
        noise near black for larger than it is drawn, which is before the output's activation.

        Source: Hilprecht et al. 2019 (arXiv:1906.03006), the reconstruction attack.
        """
        mean, log_var = self._posterior(x, c).chunk(2, 1)
        bound = -self.prior.divergence(mean, log_var, c)
        for k in range(N_DRAWS):
            eps = torch.randn(self.n_latent, generator=key.fold("posterior", k).torch())
            z = mean + (0.5 * log_var).exp() * eps.to(mean.device)
            bound -= self.noise.full(x - self.decoder(z, c)).double() / N_DRAWS
        rebuilt = self.decoder(mean, c)
        scores = {
            "evidence lower bound": bound / x[0].numel(),
            "reconstruction": closeness(x, rebuilt),
        }
        return scores if self.linear is None else scores | {"gaussian": self.linear.closeness(x, c)}

    @torch.no_grad()
    def sample(self, conditions: Tensor, keys: Tensor, given: Tensor) -> Tensor:
        """Draw from p(x | z, c) with z from the prior: (B, C, X, Y, Z)."""
        device = conditions.device
        generators = [torch_generator(int(k)) for k in keys]
        unit = torch.stack([torch.randn(self.n_latent, generator=g) for g in generators])
        white = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
        z = self.prior(unit.to(device), conditions)
        made: Tensor = self.decoder(z, conditions, self.noise.sample(white.to(device)))
        return made


class LatentPrior(nn.Module):
    """p(z | c) = N(A c + b, L L^T), held in buffers; N(0, I) until `fit`."""

    weight_DL: Tensor
    bias_L: Tensor
    factor_LL: Tensor

    def __init__(self, condition_width: int, latent: int) -> None:
        super().__init__()
        self.register_buffer("weight_DL", torch.zeros(condition_width, latent))
        self.register_buffer("bias_L", torch.zeros(latent))
        self.register_buffer("factor_LL", torch.eye(latent))

    def fit(self, mean: Tensor, variance: Tensor, c: Tensor) -> None:
        """Match the moments of the aggregate posterior given the condition.

        Args:
            mean: (n, L) posterior means.
            variance: (n, L) posterior variances.
            c: (n, D) encoded conditions.
        """
        weight, bias, rest = regress(mean, c)
        # no shrinkage: the posteriors are a hundred times narrower than the prior, so the decoder
        # resolves directions of little variance, which shrinking would inflate
        covariance = rest.T @ rest / len(rest) + variance.double().cpu().mean(0).diag()
        self.weight_DL.copy_(weight)
        self.bias_L.copy_(bias)
        self.factor_LL.copy_(torch.linalg.cholesky(covariance))

    def divergence(self, mean: Tensor, log_var: Tensor, c: Tensor) -> Tensor:
        """KL(N(mean, diag(exp(log_var))) || p(z | c)) in nats, (n,) float64.

        Args:
            mean: (n, L).
            log_var: (n, L).
            c: (n, D) encoded conditions.
        """
        centre = c.double() @ self.weight_DL.double() + self.bias_L.double()
        factor = self.factor_LL.double()
        inverse = torch.linalg.solve_triangular(
            factor, torch.eye(len(factor)).to(factor), upper=False
        )
        apart = (mean.double() - centre) @ inverse.T
        variance = log_var.double().exp() @ inverse.square().sum(0)
        log_det = 2 * factor.diagonal().log().sum() - log_var.double().sum(1)
        kl: Tensor = 0.5 * (variance + apart.square().sum(1) - len(factor) + log_det)
        return kl

    def forward(self, unit: Tensor, c: Tensor) -> Tensor:
        """(B, L) latents from standard normal numbers and (B, D) conditions."""
        return unit @ self.factor_LL.T + c @ self.weight_DL + self.bias_L
