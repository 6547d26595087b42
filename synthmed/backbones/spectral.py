"""A conditional Gaussian of released moments: for promises under which a network learns nothing.

Mean: an image, which conditions shift smoothly. Covariance: a map of deviations times a stationary
texture, whose spectrum has a value a band. Every parameter is the mean over patients of something
that a scan shows, and the loss is the squared distance to it: gradient steps average patients, and
clipping and noise bound and hide each of them. What is released is a noisy mean of descriptors;
images are kept as coefficients of a cosine transform, where noise is flat and anatomy is not, so
that noise can be left out beyond the lowest frequencies, or taken out band by band (James and Stein
1961; in bands: Cavalier and Tsybakov 2001). Like sampling, that comes after the release and costs
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from synthmed.backbones.examining import beside
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
"""Scans of either side that are drawn when a model is examined."""
_FAINT = 0.03
_CORNER = 0.9
"""Share of the longest frequency above which there is nothing but noise."""
_FLOOR = 1e-6
"""Energy of a band below which its square root has no useful slope."""


class Spectral(BaseModel):
    """Gaussian of a mean a condition and a stationary texture.

    Args:
        coefficients: of the mean along the grid's longest side, the other sides in proportion;
            at most the side, which is all. Fewer are less noise and a softer mean.
        shift_coefficients: of what each condition shifts, likewise.
        map_coefficients: of the map of deviations, likewise.
        bands: of the texture's spectrum, and of the shrinkage.
        learning_rate: of plain gradient descent; the loss curves by 1 at most, so that below 2 it
            is safe.
        ema: decay of the moving average of the weights that is kept: it averages the noise of
            private steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["spectral"] = "spectral"
    coefficients: Annotated[int, Field(ge=1, le=512)] = 512
    shift_coefficients: Annotated[int, Field(ge=1, le=512)] = 6
    map_coefficients: Annotated[int, Field(ge=1, le=512)] = 12
    bands: Annotated[int, Field(ge=2, le=64)] = 16
    learning_rate: Annotated[float, Field(gt=0, lt=2)] = 1.5
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def build(self, spec: VolumeSpec, optimizer: Optimizer) -> SpectralGaussian:
        """The model for volumes of this kind; faint grain round zero at first.

        Raises:
            UsageError: masks are given, which this family cannot be told.
        """
        refuse_given(self.name, spec)
        return SpectralGaussian(self, spec, optimizer)


class SpectralGaussian:
    """The moments, their loss and the sampler."""

    def __init__(self, config: Spectral, spec: VolumeSpec, optimizer: Optimizer) -> None:
        self.config = config
        self.optimizer = optimizer.model_copy(
            update={
                "rule": "sgd",
                "learning_rate": config.learning_rate,
                "weight_decay": 0.0,
                "warmup": 0.0,
            }
        )
        self.moments = Moments(config, spec)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The moments alone."""
        return {"moments": self.moments}

    def rounds(self) -> Sequence[Round]:
        """One round of one phase; its end takes out noise, and reads no patient for it."""
        phase = Phase(
            name="moments",
            trainable=lambda name: True,
            draw=lambda generator, n_scans: {},
            loss=self._loss,
            optimizer=self.optimizer,
            reads_patients=True,
            ema=self.config.ema,
        )
        return [Round([phase], finish=self._finish)]

    @torch.no_grad()
    def _finish(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        return {"kept_of_mean": self.moments.shrink()}

    def _loss(self, params: Params, batch: Batch | None, draws: Draws, progress: float) -> Tensor:
        """Half the squared distance to what the scans show, in squared intensity a voxel."""
        if batch is None:
            raise TypeError("the phase moments reads patients: batch must not be None")
        b, s = batch.mask.shape
        x, c = batch.x.flatten(0, 1), batch.c.flatten(0, 1)
        mine = submodule(params, "moments")
        with torch.autocast(x.device.type, enabled=False):  # sums of squares, in full
            loss = self.moments.distance(mine, x, c).reshape(b, s)
        return (loss * batch.mask).sum(1) / batch.mask.sum(1)

    def remarks(
        self, recent: Sequence[Mapping[str, float]], figures: Mapping[str, float]
    ) -> Sequence[str]:
        """Nothing: a convex loss has no way to fail but noise, which the fidelity report shows."""
        return []

    @torch.no_grad()
    def examine(self, train: Batch, holdout: Batch | None) -> Examination:
        """Each scan beside the mean for its condition."""

        def mean(x: Tensor, c: Tensor) -> Tensor:
            return self.moments.volume(c)

        what = "the mean for its condition"
        figures, pictures = beside(train, holdout, mean, "means", what, N_SHOWN)
        return Examination(figures=figures, pictures=pictures)

    @torch.no_grad()
    def membership_scores(
        self, x: Tensor, c: Tensor, given: Tensor, key: Key
    ) -> Mapping[str, Tensor]:
        """Minus the squared distance of what a scan shows to the moments: its training loss."""
        mine = dict(self.moments.named_parameters())
        return {"distance to the moments": -self.moments.distance(mine, x, c).double()}

    @torch.no_grad()
    def sample(self, conditions: Tensor, keys: Tensor, given: Tensor) -> Tensor:
        """The mean for a condition plus texture: (B, C, X, Y, Z)."""
        shape = (self.moments.channels, *self.moments.grid)
        white = torch.stack([torch.randn(shape, generator=torch_generator(int(k))) for k in keys])
        texture = self.moments.texture(white.to(conditions.device))
        return self.moments.volume(conditions) + texture


class Moments(nn.Module):
    """What is learned, in units of intensity: D conditions, C channels, B bands.

    `mean` (C, K, L, M): the lowest coefficients of the scan. `shift` (D, C, ...): what each
    condition adds. `deviation` (C, ...): of the residual's absolute value. `amplitude` (C, B): root
    of the residual's energy in each band. Coefficients are those of the orthonormal transform over
    the root of the number of voxels, so that the norm of a scan's is its root mean square.
    """

    cosines_0: Tensor
    cosines_1: Tensor
    cosines_2: Tensor
    band_XYZ: Tensor
    member_VB: Tensor
    corner_XYZ: Tensor
    drawn_C: Tensor

    def __init__(self, config: Spectral, spec: VolumeSpec) -> None:
        super().__init__()
        self.grid, self.channels = spec.grid, spec.channels
        self.unit = math.sqrt(math.prod(spec.grid))
        low, lower, outline = (
            corner(spec.grid, n)
            for n in (config.coefficients, config.shift_coefficients, config.map_coefficients)
        )
        self.mean = nn.Parameter(torch.zeros(spec.channels, *low))
        self.shift = nn.Parameter(torch.zeros(spec.condition_width, spec.channels, *lower))
        self.amplitude = nn.Parameter(torch.zeros(spec.channels, config.bands))
        self.deviation = nn.Parameter(torch.zeros(spec.channels, *outline))
        with torch.no_grad():  # a faint grain to begin with: of nothing, all samples are alike
            self.shift.normal_(std=1e-2 * _FAINT)
            self.amplitude.fill_(_FAINT)
            self.deviation[:, 0, 0, 0] = _FAINT
        for axis, n in enumerate(spec.grid):
            self.register_buffer(f"cosines_{axis}", cosines(n), persistent=False)
        length = lengths(spec.grid)
        band = (length / length.max() * config.bands).long().clamp(max=config.bands - 1)
        member = nn.functional.one_hot(band.flatten(), config.bands).float()
        self.register_buffer("band_XYZ", band, persistent=False)
        self.register_buffer("member_VB", member, persistent=False)
        self.register_buffer("corner_XYZ", length > _CORNER * length.max(), persistent=False)
        drawn = torch.arange(spec.channels) < spec.channels - spec.masks
        self.register_buffer("drawn_C", drawn.float(), persistent=False)

    def distance(self, params: Params, x: Tensor, c: Tensor) -> Tensor:
        """(n,) losses of scans (n, C, X, Y, Z) with conditions (n, D) under these parameters.

        Each moment is fitted to what the scan shows as the other moments are now: the residual
        that texture and map describe is not moved by their loss.
        """
        seen = self.to_frequencies(x)
        residual = seen - self.expected(params["mean"], params["shift"], c)
        # mean and shift together move by the residual times (1, c): over its squared length the
        # loss curves by 1 at most, however many conditions there are
        length = 1 + c.float().square().sum(1)
        loss = residual.square().sum((1, 2, 3, 4)) / length
        with torch.no_grad():
            roots = self.energies(residual).clamp(min=_FLOOR).sqrt()
            outline = self.to_frequencies(self.to_voxels(residual).abs())
        deviation = padded(params["deviation"], self.grid)
        outline = outline * padded(torch.ones_like(params["deviation"]), self.grid)
        loss = loss + (roots - params["amplitude"]).square().sum((1, 2))
        loss = loss + (outline - deviation).square().sum((1, 2, 3, 4))
        return loss / 2

    def expected(self, mean: Tensor, shift: Tensor, c: Tensor) -> Tensor:
        """(n, C, X, Y, Z) coefficients of the mean for conditions (n, D)."""
        shifted = torch.einsum("nd,dcklm->ncklm", c.float(), shift)
        return padded(mean, self.grid) + padded(shifted, self.grid)

    def to_frequencies(self, x: Tensor) -> Tensor:
        """(..., X, Y, Z) voxels to coefficients."""
        return self._along(x, [self.cosines_0, self.cosines_1, self.cosines_2]) / self.unit

    def to_voxels(self, coefficients: Tensor) -> Tensor:
        """The inverse of `to_frequencies`."""
        inverse = [self.cosines_0.T, self.cosines_1.T, self.cosines_2.T]
        return self._along(coefficients, inverse) * self.unit

    @staticmethod
    def _along(x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        for one in maps:
            x = torch.tensordot(x, one, dims=([-3], [1]))  # the new axis comes last: a rotation
        return x

    def energies(self, coefficients: Tensor) -> Tensor:
        """(..., X, Y, Z) to (..., B): squares summed by band."""
        return coefficients.square().flatten(-3) @ self.member_VB

    @torch.no_grad()
    def shrink(self) -> float:
        """Take noise out of the mean, where all its coefficients are kept; the energy's share left.

        The noise is what stands at the highest frequencies of all three axes together, where
        the mean of many scans has nothing left. A band keeps the share of its energy above it.
        """
        if self.mean.shape[1:] != self.grid:
            return 1.0
        noise = self.mean[:, self.corner_XYZ].square().mean(-1, keepdim=True)
        energy = self.energies(self.mean)
        share = 1 - noise * self.member_VB.sum(0) / energy.clamp(min=1e-30)
        before = self.mean.square().sum()
        self.mean.mul_(share.clamp(min=0)[:, self.band_XYZ])
        return float(self.mean.square().sum() / before)

    def volume(self, c: Tensor) -> Tensor:
        """The mean for conditions (n, D): (n, C, X, Y, Z)."""
        return self.to_voxels(self.expected(self.mean, self.shift, c))

    def texture(self, white: Tensor) -> Tensor:
        """Residuals (n, C, X, Y, Z) from standard normal numbers of that shape.

        The map is that of the mean absolute value, sqrt(2 / pi) deviations of a Gaussian; noise of
        a private training may turn an amplitude or a place of the map negative: that is 0.
        """
        power = self.amplitude.clamp(min=0).square()
        power = power / power.sum(1, keepdim=True).clamp(min=1e-12)
        each = (power / self.member_VB.sum(0).clamp(min=1))[:, self.band_XYZ]
        # a cosine is largest at the grid's faces; deviations are the map's alone to say
        squared = [c.T.square() for c in (self.cosines_0, self.cosines_1, self.cosines_2)]
        variance = self._along(each, squared) * self.unit**2
        stationary = self.to_voxels(white * each.sqrt()) / variance.clamp(min=1e-12).sqrt()
        scale = self.to_voxels(padded(self.deviation, self.grid)).clamp(min=0)
        scale = scale * math.sqrt(math.pi / 2)
        return stationary * scale * self.drawn_C[:, None, None, None]


def corner(grid: Sequence[int], longest: int) -> tuple[int, ...]:
    """How many of the lowest frequencies of each axis are kept: of equal wavelength in voxels.

    >>> corner((40, 56, 40), 8), corner((40, 56, 40), 99)
    ((6, 8, 6), (40, 56, 40))
    """
    return tuple(min(n, max(1, round(longest * n / max(grid)))) for n in grid)


def padded(low: Tensor, grid: Sequence[int]) -> Tensor:
    """(..., K, L, M) lowest coefficients to all (..., X, Y, Z), the rest 0."""
    missing = [n - k for n, k in zip(grid, low.shape[-3:], strict=True)]
    return nn.functional.pad(low, [p for n in reversed(missing) for p in (0, n)])


def cosines(n: int) -> Tensor:
    """(n, n) the orthonormal cosine transform of type II, a frequency a row.

    Example:
        >>> float((cosines(5) @ cosines(5).T - torch.eye(5)).abs().max()) < 1e-6
        True
    """
    k, at = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = (math.pi / n * (at + 0.5) * k).cos() * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis.float()


def lengths(grid: Sequence[int]) -> Tensor:
    """(X, Y, Z) length of each frequency, in the Nyquist frequency of an axis."""
    sides = [(torch.arange(n, dtype=torch.float64) / n).square() for n in grid]
    x, y, z = sides
    return (x[:, None, None] + y[:, None] + z).sqrt().float()
