"""What an autoencoder's encoder is shown instead of the scan, to learn to undo it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from synthmed.backbones.generative import Draws, VolumeSpec


class Untouched(BaseModel):
    """The scan as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["none"] = "none"

    def draw(self, spec: VolumeSpec, generator: Generator, n_scans: int) -> Draws:
        """Nothing."""
        return {}

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """The same scans."""
        return x


class Noise(BaseModel):
    """Independent Gaussian noise: a denoising autoencoder (Vincent et al. 2008).

    Args:
        sd: standard deviation, in prepared intensity (images about 0 to 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["noise"] = "noise"
    sd: Annotated[float, Field(gt=0, le=2)] = 0.1

    def draw(self, spec: VolumeSpec, generator: Generator, n_scans: int) -> Draws:
        """Standard normal numbers, (S, C, X, Y, Z)."""
        shape = (n_scans, spec.channels, *spec.grid)
        return {"noise_SCXYZ": torch.randn(shape, generator=generator)}

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Noisy scans (B S, C, X, Y, Z)."""
        return x + self.sd * draws["noise_SCXYZ"].flatten(0, 1)


class Erase(BaseModel):
    """Cuboids set to 0 in all channels: the encoder learns to complete (Pathak et al. 2016).

    Each scan loses 0 to `blocks` cuboids (arXiv:1604.07379 for the task), so that whole scans
    stay among what the encoder knows.

    Args:
        blocks: the most cuboids a scan loses.
        side: length of a cuboid's sides, as shares of the grid's, drawn uniformly between the two.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["erase"] = "erase"
    blocks: Annotated[int, Field(ge=1, le=16)] = 3
    side: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.2,
        0.5,
    )

    def draw(self, spec: VolumeSpec, generator: Generator, n_scans: int) -> Draws:
        """What is kept: 1, and 0 inside a cuboid, (S, 1, X, Y, Z)."""
        kept = torch.ones(n_scans, 1, *spec.grid)
        low, high = min(self.side), max(self.side)
        for scan in kept:
            number = int(torch.randint(self.blocks + 1, (), generator=generator))
            for _ in range(number):
                block = []
                for n in spec.grid:
                    share, place = torch.rand(2, generator=generator).tolist()
                    length = max(1, round((low + (high - low) * share) * n))
                    start = int(place * (n - length + 1))
                    block.append(slice(start, start + length))
                scan[(0, *block)] = 0
        return {"kept_S1XYZ": kept}

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Scans with holes (B S, C, X, Y, Z)."""
        return x * draws["kept_S1XYZ"].flatten(0, 1)


Corruption = Annotated[Untouched | Noise | Erase, Field(discriminator="kind")]
