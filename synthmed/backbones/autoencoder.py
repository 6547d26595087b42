"""Deep convolutional autoencoder: penalties, corruptions, and a density fitted to its codes.

Hinton and Salakhutdinov 2006 (doi:10.1126/science.1127647) for the deep autoencoder; Vincent et
al. 2008 (doi:10.1145/1390156.1390294) for denoising; Ghosh et al. 2020 (arXiv:1903.12436) for the
regularised autoencoder that becomes generative by a density fitted after training. Its `Compressor`
is also what a latent model encodes with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from synthmed.backbones.corruption import Corruption, Untouched
from synthmed.backbones.examining import (
    closeness,
    evenly,
    in_chunks,
    likeness,
    scans,
    shares,
    sheet,
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
from synthmed.keys import Key, torch_generator

if TYPE_CHECKING:
    from synthmed.config import Optimizer

N_SHOWN = 6
"""Scans of either side whose reconstruction is drawn."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VectorCode(_Part):
    """A vector of `length` numbers."""

    kind: Literal["vector"] = "vector"
    length: Annotated[int, Field(ge=1, le=1024)] = 32


class MapCode(_Part):
    """A map of `channels` numbers at each place of the coarsest level."""

    kind: Literal["map"] = "map"
    channels: Annotated[int, Field(ge=1, le=64)] = 4


class Unpenalised(_Part):
    """No penalty."""

    kind: Literal["none"] = "none"


class WeightPenalty(_Part):
    """L2 on all weights, as the optimizer's decoupled decay in place of the run's own.

    Not as a term of the loss: Adam would rescale it weight by weight (Loshchilov and Hutter 2019,
    arXiv:1711.05101), and under differential privacy it would be clipped with the patient's.
    Weights shrink by weight times the learning rate a step: by default to a quarter in 8000 steps.
    """

    kind: Literal["l2"] = "l2"
    weight: Annotated[float, Field(gt=0, le=1)] = 0.3


class ActivationPenalty(_Part):
    """L1 on the code's activations, which are then not negative: a sparse code.

    The penalty is the code's L1 norm over sqrt(K) times its L2 norm, which does not change with
    the code's scale: 1/sqrt(K) for one active unit, 1 for equal ones (Hoyer 2004, JMLR 5:1457),
    and 0 for a code without any. The bare norm would be evaded by a small code and a large
    decoder. In nats a voxel, like the rest of the loss.
    """

    kind: Literal["l1"] = "l1"
    weight: Annotated[float, Field(gt=0, le=100)] = 0.3


class Autoencoder(_Part):
    """Deep convolutional autoencoder, its codes drawn from a Gaussian mixture.

    Args:
        widths: channels from the finest level (half the grid) to the coarsest.
        code: a vector, or a map on the coarsest level.
        penalty: on nothing, on weights (l2) or on the code's activations (l1).
        corruption: what the encoder sees in training: the scan, noise on it, or holes in it.
        shrink: weight of the code's squared norm (Ghosh et al. 2020, eq. 9): keeps codes bounded.
        residual: what a sample has on top of the decoder's mean, which is smoother than any scan:
            noise with the residual's learned texture, independent noise, or nothing.
        components: most components of the mixture fitted to the codes.
        directions: most principal directions of the codes that are sampled; with factors all.
        factors: most factors of the cohort's Gaussian (mean, labels' shifts, principal components)
            that a vector and its volume begin as, so that it has at least as many numbers; what
            the networks add starts near nothing. 0 begins at nothing.
        ema: decay of the moving average of the weights that is kept.
    """

    name: Literal["autoencoder"] = "autoencoder"
    widths: Annotated[tuple[Annotated[int, Field(ge=4, le=512)], ...], Field(min_length=2)] = (
        16,
        32,
        64,
    )
    code: Annotated[VectorCode | MapCode, Field(discriminator="kind")] = VectorCode()
    penalty: Annotated[
        Unpenalised | WeightPenalty | ActivationPenalty, Field(discriminator="kind")
    ] = Unpenalised()
    corruption: Corruption = Untouched()
    shrink: Annotated[float, Field(ge=0, le=100)] = 1.0
    residual: Literal["spectral", "white", "none"] = "spectral"
    components: Annotated[int, Field(ge=1, le=64)] = 8
    directions: Annotated[int, Field(ge=1, le=256)] = 64
    factors: Annotated[int, Field(ge=0, le=256)] = 0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995

    @model_validator(mode="after")
    def _linear(self) -> Autoencoder:
        if self.factors and isinstance(self.code, MapCode):
            raise ValueError("factors: a map cannot begin as a Gaussian; set code.kind: vector")
        if self.factors and isinstance(self.penalty, ActivationPenalty):
            raise ValueError("factors: a sparse code has no sign; use another penalty, or none")
        return self

    def build(self, spec: VolumeSpec, optimizer: Optimizer) -> GenerativeAutoencoder:
        """The model for volumes of this kind; weights from torch's global generator.

        Raises:
            UsageError: masks are given, which this family cannot be told.
        """
        refuse_given(self.name, spec)
        return GenerativeAutoencoder(self, spec, optimizer)


class Compressor:
    """Encoder, decoder and residual of an autoencoder, trained by one phase.

    Args:
        config: its settings; the mixture's are not looked at.
        spec: of the volumes.
        optimizer: of the run.
    """

    def __init__(self, config: Autoencoder, spec: VolumeSpec, optimizer: Optimizer) -> None:
        from synthmed.backbones.nets.codec import (  # imports MONAI: seconds
            CodeDecoder,
            CodeEncoder,
            CodeScale,
        )
        from synthmed.backbones.nets.gaussian import LinearCode
        from synthmed.backbones.nets.noise import SpectralNoise

        self.config, self.spec = config, spec
        self.linear = LinearCode.of(spec, config.factors)
        code, penalty = config.code, config.penalty
        vector = isinstance(code, VectorCode)
        numbers = code.length if isinstance(code, VectorCode) else code.channels
        if self.linear is not None:
            numbers = max(numbers, self.linear.columns)
        self.rectified = isinstance(penalty, ActivationPenalty)
        self.encoder = CodeEncoder(spec, config.widths, numbers, vector=vector)
        self.decoder = CodeDecoder(
            spec,
            config.widths,
            numbers,
            vector=vector,
            rectified=self.rectified,
            linear=self.linear,
        )
        self.noise = SpectralNoise(
            spec.channels, spec.grid, spectral=config.residual == "spectral", masks=spec.masks
        )
        self.scale = CodeScale(numbers)
        self.code_shape: tuple[int, ...] = self.encoder.shape
        self.optimizer = (
            optimizer.model_copy(update={"weight_decay": penalty.weight})
            if isinstance(penalty, WeightPenalty)
            else optimizer
        )

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """What is trained or measured; `loss` expects these names among the parameters."""
        return {
            "encoder": self.encoder,
            "decoder": self.decoder,
            "noise": self.noise,
            "scale": self.scale,
        }

    def encode(self, x: Tensor, c: Tensor) -> Tensor:
        """Codes (B, K, x, y, z) of volumes (B, C, X, Y, Z), each channel in units of its scale.

        Args:
            x: images about 0 to 1.
            c: (B, D) encoded conditions.
        """
        return self.scale.normalise(self._raw(x, c))

    def _raw(self, x: Tensor, c: Tensor) -> Tensor:
        code: Tensor = self.encoder(x, c, self._begun(x, c))
        return code

    def _begun(self, x: Tensor, c: Tensor) -> Tensor | None:
        return None if self.linear is None else self.linear.code(x.flatten(1), c)

    def decode(self, code: Tensor, c: Tensor, white: Tensor | None = None) -> Tensor:
        """Volumes (B, C, X, Y, Z) of codes as `encode` gives them: the decoder's mean, or with
        white noise (B, C, X, Y, Z) a sample, which has texture that the mean leaves out."""
        if white is None or self.config.residual == "none":
            texture = None
        else:
            texture = self.noise.sample(white)
        volume: Tensor = self.decoder(self.scale.restore(code), c, texture)
        return volume

    def membership_scores(self, x: Tensor, c: Tensor) -> Mapping[str, Tensor]:
        """Minus the log of a scan's reconstruction error (n,), nothing of it spoilt; with factors
        also minus the log of its distance from all draws of the Gaussian.

        Source: Hilprecht et al. 2019 (arXiv:1906.03006), the reconstruction attack.
        """
        scores = {"reconstruction": closeness(x, self.decode(self.encode(x, c), c))}
        return scores if self.linear is None else scores | {"gaussian": self.linear.closeness(x, c)}

    def phase(self) -> Phase:
        """The phase that trains encoder, decoder and residual together."""
        return Phase(
            name="reconstruction",
            trainable=lambda name: name.split(".")[0] in ("encoder", "decoder", "noise"),
            draw=lambda g, n_scans: self.config.corruption.draw(self.spec, g, n_scans),
            loss=self.loss,
            optimizer=self.optimizer,
            reads_patients=True,
            ema=self.config.ema,
        )

    def loss(self, params: Params, batch: Batch | None, draws: Draws, progress: float) -> Tensor:
        """Reconstruction of the scan from what the encoder saw, in nats a voxel: (B,).

        Squared error under one learned deviation a channel (its optimum is half the log of the
        mean squared error), so images and masks weigh alike whatever their contrast. Its target
        is the conditional mean; sharpness is the residual's part, fitted beside it.
        """
        if batch is None:
            raise TypeError("the phase reconstruction reads patients: batch must not be None")
        b, s = batch.mask.shape
        x, c = batch.x.flatten(0, 1), batch.c.flatten(0, 1)
        seen = self.config.corruption.apply(x, draws)
        begun = self._begun(seen, c)
        code = functional_call(self.encoder, submodule(params, "encoder"), (seen, c, begun))
        decoded = functional_call(self.decoder, submodule(params, "decoder"), (code, c))
        nll, fit = functional_call(self.noise, submodule(params, "noise"), (x - decoded,))
        norm = (code**2).flatten(1).sum(1)
        loss: Tensor = (nll + fit + 0.5 * self.config.shrink * norm) / x[0].numel()
        if isinstance(self.config.penalty, ActivationPenalty):
            loss = loss + self.config.penalty.weight * density_of(code.relu().flatten(1))
        loss = loss.reshape(b, s)
        return (loss * batch.mask).sum(1) / batch.mask.sum(1)

    def measure(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Set the scale, and the residual's deviations.

        Args:
            batches: over all training patients; read twice, one at a time.

        Returns:
            Codes (n, K, x, y, z) in units of the scale, conditions (n, D), and figures.
        """
        codes, conditions = [], []
        for batch in batches:
            x, known, _ = scans(batch)
            codes.append(in_chunks(self._raw, x, known))
            conditions.append(known)
        raw, c = torch.cat(codes), torch.cat(conditions)
        self.scale.fit(raw[evenly(batches)])
        if self.config.residual != "none":
            # of scans as they are: steps saw what could not be restored of spoilt ones
            self.noise.measure(lambda: map(self._residual, batches, codes))
        code = self.scale.normalise(raw)
        active = self.active(code.flatten(1))
        figures = {
            "latent": active.shape[1],
            "latent_active": int(active.any(0).sum()),
            "active_share": round(float(active.double().mean()), 4),
            "noise_sd": float(self.noise.scale().median()),
        }
        return code, c, figures

    def _residual(self, batch: Batch, code: Tensor) -> tuple[Tensor, Tensor]:
        """How much each scan of a batch counts (n,), and what the decoder's mean lacks of it."""
        x, c, _ = scans(batch)
        return shares(batch), x - in_chunks(self.decoder, code, c)

    def active(self, code: Tensor) -> Tensor:
        """Which numbers of codes (n, N) in units of the scale are at work, (n, N).

        Of a sparse code those that are positive; of others all that vary over the codes by more
        than a hundredth of what the most varying one does.
        """
        raw = self.scale.restore(code.reshape(-1, *self.code_shape)).flatten(1)
        if self.rectified:
            return raw > 0
        sd = raw.std(0, correction=0)
        return (sd > 0.01 * sd.max()).expand_as(raw)


def density_of(activations: Tensor) -> Tensor:
    """L1 over sqrt(K) times L2 norm of activations (B, K): (B,) from 1/sqrt(K) for one unit to 1
    for all alike, and 0 where none is active."""
    k = activations.shape[1]
    return activations.abs().sum(1) / (math.sqrt(k) * (activations.square().sum(1) + 1e-12).sqrt())


class GenerativeAutoencoder:
    """A compressor and a Gaussian mixture of its codes."""

    def __init__(self, config: Autoencoder, spec: VolumeSpec, optimizer: Optimizer) -> None:
        from synthmed.backbones.nets.mixture import CodeMixture

        self.config, self.spec = config, spec
        self.compressor = Compressor(config, spec, optimizer)
        size = math.prod(self.compressor.code_shape)
        linear = self.compressor.linear
        # those of a Gaussian's code vary alike: none of them may be left out
        directions = max(config.directions, 0 if linear is None else linear.columns)
        self.mixture = CodeMixture(size, spec.condition_width, config.components, directions)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The compressor's, and the mixture; sampling needs all but the encoder."""
        return {**self.compressor.modules, "mixture": self.mixture}

    def rounds(self) -> Sequence[Round]:
        """The Gaussian without a step, where there is one; then a round of one phase, whose end
        measures the codes and fits the mixture."""
        learned = Round([self.compressor.phase()], finish=self._finish, finish_privacy="refused")
        linear = self.compressor.linear
        return [learned] if linear is None else [linear.start(lambda x, c: x), learned]

    @torch.no_grad()
    def _finish(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        code, c, figures = self.compressor.measure(batches)
        rows, people = evenly(batches), sum(len(batch.mask) for batch in batches)
        return {**figures, **self.mixture.fit(code.flatten(1)[rows], c[rows], people)}

    def remarks(
        self, recent: Sequence[Mapping[str, float]], figures: Mapping[str, float]
    ) -> Sequence[str]:
        """A code that is not used, or that the mixture does not cover."""
        out = []
        if figures.get("latent_active", 2) < min(2, figures.get("latent", 2)):
            out.append("COLLAPSED: the code is not used, samples will all look alike")
        elif figures.get("mixture_explained", 1.0) < 0.8:
            share = figures["mixture_explained"]
            out.append(
                f"the mixture holds {share:.0%} of the codes' variance, samples will lack detail: "
                "use a smaller code, or more backbone.directions"
            )
        return out

    @torch.no_grad()
    def examine(self, train: Batch, holdout: Batch | None) -> Examination:
        """Reconstructions of either side, also from spoilt scans; what each unit of a code does."""
        figures: dict[str, float] = {}
        pictures = {}
        for side, batch in (("train", train), ("holdout", holdout)):
            if batch is None:
                continue
            x, c, _ = scans(batch)
            shown = [x, self._restored(x, c)]
            figures |= likeness(x, shown[-1], side)
            words = "each scan beside its reconstruction"
            if self.config.corruption.kind != "none":
                spoilt = self._spoilt(x, side)
                shown += [spoilt, self._restored(spoilt, c)]
                hurt = (spoilt != x).flatten(1).any(1)  # not every scan gets a hole
                if hurt.any():
                    figures |= likeness(x[hurt], spoilt[hurt], f"spoilt_{side}")
                    figures |= likeness(x[hurt], shown[-1][hurt], f"repaired_{side}")
                words += ", the scan spoilt as in training, and what is made of that"
            rows = [[v[i, 0] for v in shown] for i in range(min(len(x), N_SHOWN))]
            who = {"train": "Training patients", "holdout": "Held-out patients"}[side]
            pictures[f"reconstructions_{side}"] = (sheet(rows), f"{who}: {words}.")
        x, c, _ = scans(train)
        code = in_chunks(self.compressor.encode, x, c).flatten(1)
        active = self.compressor.active(code)
        figures["active_units"] = float(active.any(0).sum())
        figures["active_share"] = round(float(active.double().mean()), 4)
        tables = {}
        if isinstance(self.config.code, VectorCode):
            typical = c.mean(0)

            def decode(z: Tensor) -> Tensor:
                wide = z.reshape(-1, *self.compressor.code_shape)
                return self.compressor.decode(wide, typical.expand(len(z), -1))

            sd = code.std(0, correction=0)
            carried = {"active_share": active.double().mean(0)}
            tables["units"] = units(decode, code, sd, x, c, carried, self.spec.number_names)
            strongest = [int(row["unit"]) - 1 for row in tables["units"][:N_SHOWN]]
            pictures["units"] = (
                traversal(decode, code, sd, strongest),
                f"Units {', '.join(str(u + 1) for u in strongest)} of the code from -2 to 2 "
                "standard deviations, the others at their mean.",
            )
        return Examination(figures=figures, tables=tables, pictures=pictures)

    def _restored(self, x: Tensor, c: Tensor) -> Tensor:
        both = self.compressor
        return in_chunks(lambda a, k: both.decode(both.encode(a, k), k), x, c)

    def _spoilt(self, x: Tensor, side: str) -> Tensor:
        """Every scan corrupted as in training, by numbers of its own."""
        key = Key.root(0).fold("examine", side)
        corruption = self.config.corruption
        each = [corruption.draw(self.spec, key.fold(i).torch(), 1) for i in range(len(x))]
        draws = {k: torch.stack([d[k] for d in each]).to(x.device) for k in each[0]}
        return corruption.apply(x, draws)

    @torch.no_grad()
    def membership_scores(
        self, x: Tensor, c: Tensor, given: Tensor, key: Key
    ) -> Mapping[str, Tensor]:
        """The compressor's."""
        return self.compressor.membership_scores(x, c)

    @torch.no_grad()
    def sample(self, conditions: Tensor, keys: Tensor, given: Tensor) -> Tensor:
        """Decode codes drawn from the mixture, and add the residual: (B, C, X, Y, Z)."""
        device = conditions.device
        generators = [torch_generator(int(k)) for k in keys]
        uniform = torch.stack([torch.rand((), generator=g) for g in generators]).to(device)
        unit = torch.stack([torch.randn(self.mixture.n_numbers, generator=g) for g in generators])
        shape = (self.spec.channels, *self.spec.grid)
        white = torch.stack([torch.randn(shape, generator=g) for g in generators])
        code = self.mixture(uniform, unit.to(device), conditions)
        code = code.reshape(-1, *self.compressor.code_shape)
        return self.compressor.decode(code, conditions, white.to(device))
