"""Conditional generative adversarial network on volumes.

The default is the WGAN-GP of Gulrajani et al. 2017 (arXiv:1704.00028) with the condition given to
generator and critic, learning rates of its own for each (two time scales, Heusel et al. 2017,
arXiv:1706.08500) and an averaged generator. The classical loss is that of Goodfellow et al. 2014
(arXiv:1406.2661), the generator's in its non-saturating form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from synthmed.backbones.examining import in_chunks, scans
from synthmed.backbones.generative import (
    Batch,
    Draws,
    Examination,
    Params,
    Phase,
    Round,
    VolumeSpec,
    known,
    submodule,
)
from synthmed.backbones.nets.altered import altered, draw
from synthmed.errors import UsageError
from synthmed.keys import Key, torch_generator

if TYPE_CHECKING:
    from synthmed.config import Optimizer

Rate = Annotated[float, Field(gt=0, le=1)]

_WATCHED = 64  # training scans that the closing figures look at
_FIXED_KEYS = 12  # samples drawn to see, while training, whether they still differ


class CGAN(BaseModel):
    """Conditional generative adversarial network, by default a WGAN-GP.

    Its two learning rates and its betas stand in for those of train.optimizer, of which only the
    warm-up counts; weights do not decay.

    Args:
        loss: `wasserstein`, or `bce`, the binary cross-entropy of the first GAN.
        lipschitz: what bounds the critic's slope: `penalty` pulls it to 1 on lines between
            training and synthetic volumes, `clip` clamps its weights, `spectral` divides each by
            its largest singular value, at half the penalty's cost; `none` with bce alone.
        penalty: weight of the gradient penalty.
        clip: bound on each weight of the critic, for `clip`; 1 is a weight's first deviation.
        critic_steps: steps of the critic for one of the generator.
        generator_rate: learning rate of the generator's Adam; weights begin as unit normal
            numbers, so that 0.01 moves each by about a hundredth of its size a step.
        critic_rate: learning rate of the critic's Adam; at twice the default its loss ran away on
            phantoms, at four times on hearts.
        betas: of both; no momentum, since the other side moves.
        latent: L, dimensions of the latent vector.
        widths: channels from the finest level (half the grid) to the coarsest, of both networks.
        hidden: H, features of the critic that the condition is projected on.
        dropout: share of these that is dropped, for cohorts so small that the critic learns them
            by heart.
        alter: whether the critic sees scans and samples moved, brightened and partly hidden, the
            same kinds of change on both: few scans are then not learned by heart so soon
            (`nets.altered`).
        variety: weight of how far two samples of one condition are apart, which the generator then
            raises beside what the critic asks of it; for cohorts so small that samples would be
            alike (Mao et al. 2019, arXiv:1903.05628, by the logarithm of a distance of coarse
            shapes). A second pass of the generator in each of its steps.
        factors: most factors of the cohort's Gaussian (mean, labels' shifts, principal components)
            that samples begin as: what the generator adds to it starts at nothing and is learned
            from the critic. A start for cohorts and budgets too small to learn anatomy from noise.
            Fitting it reads patients; 0 begins at nothing.
        ema: decay of the moving average of the generator that is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["cgan"] = "cgan"
    loss: Literal["wasserstein", "bce"] = "wasserstein"
    lipschitz: Literal["penalty", "clip", "spectral", "none"] = "penalty"
    penalty: Annotated[float, Field(gt=0, le=1000)] = 10.0
    clip: Annotated[float, Field(gt=0, le=10)] = 0.5
    critic_steps: Annotated[int, Field(ge=1, le=100)] = 5
    generator_rate: Rate = 2e-3
    critic_rate: Rate = 5e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.0,
        0.9,
    )
    latent: Annotated[int, Field(ge=1, le=1024)] = 64
    widths: Annotated[tuple[Annotated[int, Field(ge=4, le=512)], ...], Field(min_length=2)] = (
        16,
        32,
        64,
    )
    hidden: Annotated[int, Field(ge=4, le=4096)] = 128
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    alter: bool = True
    variety: Annotated[float, Field(ge=0, le=10)] = 0.0
    factors: Annotated[int, Field(ge=0, le=256)] = 0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995

    @model_validator(mode="after")
    def _bounded(self) -> CGAN:
        if self.loss == "wasserstein" and self.lipschitz == "none":
            raise ValueError(
                "loss wasserstein needs a critic of bounded slope: "
                "set lipschitz to penalty, clip or spectral (none goes with bce)"
            )
        return self

    def build(self, spec: VolumeSpec, optimizer: Optimizer) -> ConditionalGAN:
        """The model for volumes of this kind; weights from torch's global generator.

        Raises:
            UsageError: masks are given, where a Gaussian that cannot be told them would begin.
        """
        if self.factors and spec.given:
            raise UsageError(
                "backbone cgan: the Gaussian that its samples begin as cannot be told a mask",
                "Set backbone.factors: 0.",
            )
        return ConditionalGAN(self, spec, optimizer)


class ConditionalGAN:
    """The networks, both losses and the sampler of one conditional GAN.

    The critic reads patients; the generator sees them through the critic alone, with conditions
    drawn from what is declared, so under differential privacy it costs nothing. These conditions
    are complete, so the generator never learns what a label that is unknown would look like: for
    a scan that lacks one it gets a drawn label, and the critic alone is told that none is known.
    Where masks are given this does not hold: the generator then takes masks and conditions from
    the patients' batch as they are, and its phase is privatised as well.
    """

    def __init__(self, config: CGAN, spec: VolumeSpec, optimizer: Optimizer) -> None:
        # imports MONAI: seconds
        from synthmed.backbones.nets.adversarial import Critic
        from synthmed.backbones.nets.adversarial import Generator as Network
        from synthmed.backbones.nets.gaussian import CohortGaussian
        from synthmed.backbones.nets.lipschitz import Spectral

        self.config = config
        self.spec = spec
        self.optimizer = optimizer
        self.n_labels = spec.n_labels
        shared = (spec.channels, spec.given, spec.grid, config.widths, spec.condition_width)
        self.linear = (
            CohortGaussian(
                spec.channels * math.prod(spec.grid),
                config.factors,
                self.n_labels,
                spec.label_widths,
            )
            if config.factors
            else None
        )
        self.generator = Network(*shared, latent=config.latent, begun=self.linear is not None)
        spectral = config.lipschitz == "spectral"
        bias = config.loss == "bce"
        self.critic = Critic(*shared, hidden=config.hidden, bias=bias, equal=not spectral)
        self.spectral = Spectral(self.critic) if spectral else None

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Generator, critic and its singular vectors, and the Gaussian that samples begin as.

        Sampling needs the first and the last.
        """
        modules: dict[str, nn.Module] = {"generator": self.generator, "critic": self.critic}
        if self.spectral is not None:
            modules["spectral"] = self.spectral
        if self.linear is not None:
            modules["linear"] = self.linear
        return modules

    def rounds(self) -> Sequence[Round]:
        """The Gaussian without a step, where there is one; then a round of two phases, whose end
        measures how varied the samples are."""
        projects: dict[str, Callable[[], None]] = {"clip": self._clip, "spectral": self._iterate}
        critic = Phase(
            name="critic",
            trainable=lambda name: name.startswith("critic."),
            draw=self._draw_critic,
            loss=self._critic_loss,
            optimizer=self._adam(self.config.critic_rate),
            reads_patients=True,
            project=projects.get(self.config.lipschitz),
        )
        generator = Phase(
            name="generator",
            trainable=lambda name: name.startswith("generator."),
            draw=self._draw_generator,
            loss=self._generator_loss,
            optimizer=self._adam(self.config.generator_rate),
            reads_patients=self.spec.given > 0,
            ema=self.config.ema,
            every=self.config.critic_steps,
        )
        adversarial = Round([critic, generator], finish=self._finish, finish_scans=_WATCHED)
        if self.linear is None:
            return [adversarial]
        return [self.linear.start(lambda x, c: x), adversarial]

    @property
    def n_latent(self) -> int:
        """Numbers of a latent: the network reads the first L of them, the Gaussian the first as
        many as it has columns, so that the network knows which volume it goes on from."""
        return max(self.config.latent, 0 if self.linear is None else self.linear.columns)

    def _adam(self, rate: float) -> Optimizer:
        return self.optimizer.model_copy(
            update={
                "rule": "adamw",
                "learning_rate": rate,
                "betas": self.config.betas,
                "weight_decay": 0.0,
            }
        )

    # --- what is random -----------------------------------------------------------------------

    def _draw_latent(self, generator: Generator, n: int) -> Draws:
        shapes = self.generator.noise_shapes
        draws = {"z_SL": torch.randn(n, self.n_latent, generator=generator)}
        for i, shape in enumerate(shapes):
            draws[f"noise{i}_S"] = torch.randn(n, *shape, generator=generator)
        return draws

    def _draw_both(self, generator: Generator, n: int) -> dict[str, Tensor]:
        draws = dict(self._draw_latent(generator, n))
        if self.config.dropout:
            kept = torch.rand(n, self.config.hidden, generator=generator) >= self.config.dropout
            draws["keep_SH"] = kept / (1 - self.config.dropout)
        if self.config.alter:
            draws.update({f"made_{k}": v for k, v in draw(generator, n).items()})
        return draws

    def _draw_critic(self, generator: Generator, n_scans: int) -> Draws:
        draws = self._draw_both(generator, n_scans)
        draws["between_S"] = torch.rand(n_scans, generator=generator)
        if self.config.alter:
            draws.update({f"scan_{k}": v for k, v in draw(generator, n_scans).items()})
        if not self.spec.given:
            conditions = [self._draw_condition(generator) for _ in range(n_scans)]
            draws["labels_SD"] = torch.stack(conditions)[:, : self.n_labels]
        return draws

    def _draw_generator(self, generator: Generator, n_scans: int) -> Draws:
        draws = self._draw_both(generator, n_scans)
        if not self.spec.given:
            draws["c_SD"] = torch.stack([self._draw_condition(generator) for _ in range(n_scans)])
        if self.config.variety:
            draws["other_SL"] = torch.randn(n_scans, self.n_latent, generator=generator)
        return draws

    def _draw_condition(self, generator: Generator) -> Tensor:
        if self.spec.draw_condition is None:
            return torch.zeros(self.spec.condition_width)
        return self.spec.draw_condition(generator)

    def _completed(self, c: Tensor, drawn: Tensor) -> Tensor:
        """Conditions (n, D), of each unknown label the drawn one: `drawn` are (n, n_labels)."""
        labels, told = c[:, : self.n_labels], c[:, self.n_labels :]
        labels = torch.where(known(labels, self.spec.label_widths), labels, drawn)
        return torch.cat([labels, told], 1)

    # --- the losses ---------------------------------------------------------------------------

    def _made(self, params: Params, draws: Draws, c: Tensor, given: Tensor) -> Tensor:
        """Synthetic volumes for (n, D) conditions and (n, K, X, Y, Z) masks, from draws (B, S)."""
        noises = [
            draws[f"noise{i}_S"].flatten(0, 1) for i in range(len(self.generator.noise_shapes))
        ]
        z = draws["z_SL"].flatten(0, 1)
        out: Tensor = functional_call(
            self.generator,
            submodule(params, "generator"),
            (z[:, : self.config.latent], c, noises, given, self._begun(z, c)),
        )
        return out

    def _begun(self, z: Tensor, c: Tensor) -> Tensor | None:
        """The volumes of the Gaussian, (n, C, X, Y, Z), before the output's activation."""
        if self.linear is None:
            return None
        begun = self.linear.begin(z, c)
        return begun.reshape(len(z), self.spec.channels, *self.spec.grid)

    def _scorer(self, params: Params) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
        mine: Mapping[str, Tensor] = submodule(params, "critic")
        if self.spectral is not None:
            mine = self.spectral.normalised(mine)

        def score(x: Tensor, c: Tensor, given: Tensor, keep: Tensor | None) -> Tensor:
            out: Tensor = functional_call(self.critic, dict(mine), (x, c, given, keep))
            return out

        return score

    def _altered(self, x: Tensor, given: Tensor, draws: Draws, side: str) -> tuple[Tensor, Tensor]:
        """What the critic sees of (B S, ...) volumes and their masks."""
        if not self.config.alter:
            return x, given
        drawn = {
            k.removeprefix(f"{side}_"): v.flatten(0, 1)
            for k, v in draws.items()
            if k.startswith(f"{side}_")
        }
        return altered(x, given, drawn, self.spec.masks)

    def _critic_loss(
        self, params: Params, batch: Batch | None, draws: Draws, progress: float
    ) -> Tensor:
        """Mean over the patient's scans of D(synthetic) - D(scan) and the penalty."""
        from synthmed.backbones.nets.lipschitz import gradient_penalty

        if batch is None:
            raise TypeError("the phase critic reads patients: batch must not be None")
        x, c, given = (t.flatten(0, 1) for t in (batch.x, batch.c, batch.given))
        keep = draws["keep_SH"].flatten(0, 1) if "keep_SH" in draws else None
        asked = c if self.spec.given else self._completed(c, draws["labels_SD"].flatten(0, 1))
        with torch.no_grad():
            made = self._made(params, draws, asked, given)
        made, given_made = self._altered(made, given, draws, "made")
        x, given = self._altered(x, given, draws, "scan")
        score = self._scorer(params)
        # one pass for both: the convolutions see twice the batch
        kept = keep if keep is None else torch.cat([keep, keep])
        both = torch.cat([x, made]), torch.cat([c, c]), torch.cat([given, given_made])
        scores = score(*both, kept)
        of_scan, of_made = scores.chunk(2)
        if self.config.loss == "wasserstein":
            loss = of_made - of_scan
        else:
            loss = softplus(-of_scan) + softplus(of_made)
        if self.config.lipschitz == "penalty":
            t = draws["between_S"].flatten()[:, None, None, None, None]
            between = t * x + (1 - t) * made
            # moved apart, either side has a mask of its own: it lies on the line as well
            between_masks = t * given + (1 - t) * given_made
            slopes = gradient_penalty(lambda v: score(v, c, between_masks, keep), between)
            loss = loss + self.config.penalty * slopes
        return _mean_scan(loss, batch.mask)

    def _generator_loss(
        self, params: Params, batch: Batch | None, draws: Draws, progress: float
    ) -> Tensor:
        """Mean over a patient's scans, or over the draws, of what the critic finds wrong, less what
        variety counts for."""
        b, s = draws["z_SL"].shape[:2]
        if batch is None:
            mask = draws["z_SL"].new_ones(b, s)
            c = draws["c_SD"].flatten(0, 1)
            given = c.new_zeros(b * s, 0, *self.spec.grid)
        else:
            mask, c, given = batch.mask, batch.c.flatten(0, 1), batch.given.flatten(0, 1)
        keep = draws["keep_SH"].flatten(0, 1) if "keep_SH" in draws else None
        made = self._made(params, draws, c, given)
        seen, given_seen = self._altered(made, given, draws, "made")
        scores = self._scorer(params)(seen, c, given_seen, keep)
        loss = -scores if self.config.loss == "wasserstein" else softplus(-scores)
        if self.config.variety:
            from synthmed.backbones.nets.diversity import apart

            other = self._made(params, {**draws, "z_SL": draws["other_SL"]}, c, given)
            loss = loss - self.config.variety * apart(made, other)
        return _mean_scan(loss, mask)

    @torch.no_grad()
    def _clip(self) -> None:
        from synthmed.backbones.nets.lipschitz import clip_weights

        clip_weights(self.critic, self.config.clip)

    def _iterate(self) -> None:
        if self.spectral is not None:
            self.spectral.follow(dict(self.critic.named_parameters()))

    # --- what is seen of it -------------------------------------------------------------------

    @torch.no_grad()
    def _finish(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Figures for the private log alone: variety beside the training scans, and the gap."""
        return self._compare(*map(torch.cat, zip(*map(scans, batches), strict=True)))

    def _compare(self, x: Tensor, c: Tensor, given: Tensor) -> dict[str, float]:
        """Variety and critic gap of samples for the conditions of (n, C, X, Y, Z) scans."""
        from synthmed.backbones.nets.diversity import compare

        made = self._sampled(c if self.spec.given else self._completed(c, self._labels(c)), given)
        gap = self._scores(x, c, given).mean() - self._scores(made, c, given).mean()
        return {**compare(x, made), "critic_gap": float(gap)}

    def _labels(self, c: Tensor) -> Tensor:
        """(n, n_labels) labels for n samples, the same at every look."""
        key = Key.root(0).fold("labels")
        each = [self._draw_condition(key.fold(i).torch()) for i in range(len(c))]
        return torch.stack(each)[:, : self.n_labels].to(c.device)

    def _sampled(self, c: Tensor, given: Tensor) -> Tensor:
        return in_chunks(self.sample, c, torch.arange(len(c)), given)

    def _scores(self, x: Tensor, c: Tensor, given: Tensor) -> Tensor:
        score = self._scorer({f"critic.{k}": p for k, p in self.critic.named_parameters()})
        return in_chunks(lambda v, k, m: score(v, k, m, None), x, c, given)

    @torch.no_grad()
    def remarks(
        self, recent: Sequence[Mapping[str, float]], figures: Mapping[str, float]
    ) -> Sequence[str]:
        """Collapsed modes, a critic that wins or learns nothing, gradients out of range."""
        from synthmed.backbones.nets.watch import of_figures, of_losses, of_samples

        n_weights = sum(p.numel() for p in self.generator.parameters())
        n_values = self.spec.channels * math.prod(self.spec.grid)
        said = of_losses(self.config, recent, n_weights, n_values)
        if "critic_gap" in figures:  # the round has ended
            return [*of_figures(figures), *said]
        if self.spec.given:  # no mask to draw samples for
            return said
        device = next(self.generator.parameters()).device
        one = self._draw_condition(torch_generator(0)).to(device).expand(_FIXED_KEYS, -1)
        samples = self._sampled(one, one.new_zeros(_FIXED_KEYS, 0, *self.spec.grid))
        return [*of_samples(samples, recent), *said]

    @torch.no_grad()
    def examine(self, train: Batch, holdout: Batch | None) -> Examination:
        """Variety and critic gap on a fixed subset; with held-out patients, how much of the gap is
        the critic's memory of its training scans: D(train) - D(holdout) over the gap."""
        sides = [scans(batch) for batch in (train, holdout) if batch is not None]
        figures = self._compare(*sides[0])
        if len(sides) > 1:
            apart = self._scores(*sides[0]).mean() - self._scores(*sides[1]).mean()
            figures["critic_gap_holdout"] = float(apart)
        return Examination(figures=figures)

    @torch.no_grad()
    def membership_scores(
        self, x: Tensor, c: Tensor, given: Tensor, key: Key
    ) -> Mapping[str, Tensor]:
        """The critic's score under the scan's own condition and mask, nothing dropped.

        The critic is kept beside the generator as it was last trained: it has no average. Where
        samples begin as a Gaussian, also minus the log of a scan's distance from all of its draws.

        Source: Hayes et al. 2019 (arXiv:1705.07663), the white-box attack.
        """
        scores = {"critic": self._scores(x, c, given).double()}
        if self.linear is not None:
            scores["gaussian"] = self.linear.closeness(x, c)
        return scores

    @torch.no_grad()
    def sample(self, conditions: Tensor, keys: Tensor, given: Tensor) -> Tensor:
        """One pass of the generator for keyed latent and noise: (B, C, X, Y, Z)."""
        each = [self._draw_latent(torch_generator(int(k)), 1) for k in keys]
        draws = {k: torch.stack([d[k] for d in each]).to(conditions.device) for k in each[0]}
        params = {f"generator.{k}": p for k, p in self.generator.named_parameters()}
        # a critic sees the little below black that the output has; a scan has none
        return self._made(params, draws, conditions, given).clamp(min=0)


def _mean_scan(loss: Tensor, mask: Tensor) -> Tensor:
    """(B S,) losses to the mean of each patient's scans, (B,)."""
    return (loss.reshape(mask.shape) * mask).sum(1) / mask.sum(1)
