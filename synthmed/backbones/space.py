"""Where a diffusion model works: on voxels, on their wavelet bands, or on an autoencoder's codes.

A space turns volumes into the tensors that are noised and denoised, and back. Images from 0 to 1
become numbers from -1 to 1 first, so that the data lie about 0 at a scale of about 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from synthmed.backbones.autoencoder import Autoencoder, Compressor, MapCode
from synthmed.backbones.generative import Batch, Round, VolumeSpec
from synthmed.backbones.nets.haar import Haar, crop_to, pad_to

if TYPE_CHECKING:
    from synthmed.config import Optimizer


class Room(Protocol):
    """A space for volumes of one kind.

    `shape` is that of a volume's tensor, (E, x, y, z); `given_channels` how many a given mask
    has there.
    """

    shape: tuple[int, int, int, int]
    given_channels: int

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """What has to be trained and kept."""
        ...

    def rounds(self) -> Sequence[Round]:
        """What is trained before the diffusion."""
        ...

    def enter(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, E, x, y, z) of volumes (B, C, X, Y, Z)."""
        ...

    def leave(self, y: Tensor, c: Tensor, white: Tensor) -> Tensor:
        """The inverse; `white` are (B, C, X, Y, Z) normal numbers for what `enter` has lost."""
        ...

    def membership_scores(self, x: Tensor, c: Tensor) -> Mapping[str, Tensor]:
        """What its own networks know of volumes, by name (B,); nothing where it has none."""
        ...

    def place(self, given: Tensor) -> Tensor:
        """(B, given_channels, x, y, z) of masks (B, K, X, Y, Z)."""
        ...


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Voxel(_Part):
    """The voxels themselves: nothing is lost, every step costs most."""

    kind: Literal["voxel"] = "voxel"

    def build(self, spec: VolumeSpec, optimizer: Optimizer) -> Room:
        """The space for volumes of this kind."""
        return Bands(spec, 0)


class Wavelet(_Part):
    """Bands of an orthonormal Haar transform: nothing is lost, an eighth of the places a level.

    Two levels make a step cheaper, but a network on two cores learns more slowly from them: a
    convolution over places of 4 x 4 x 4 voxels knows less of what lies beside what.

    Args:
        levels: 1 or 2.
    """

    kind: Literal["wavelet"] = "wavelet"
    levels: Annotated[int, Field(ge=1, le=2)] = 1

    def build(self, spec: VolumeSpec, optimizer: Optimizer) -> Room:
        """The space for volumes of this kind."""
        return Bands(spec, self.levels)


class Latent(_Part):
    """Codes of an autoencoder that is trained first (Rombach et al. 2022, arXiv:2112.10752).

    Args:
        autoencoder: its settings; the code must be a map.
        share: of the training budget that it gets.
    """

    kind: Literal["latent"] = "latent"
    autoencoder: Autoencoder = Autoencoder(code=MapCode())
    share: Annotated[float, Field(gt=0, lt=1)] = 0.3

    def build(self, spec: VolumeSpec, optimizer: Optimizer) -> Room:
        """The space for volumes of this kind; its weights come from torch's global generator."""
        return Codes(spec, self, optimizer)


Space = Annotated[Voxel | Wavelet | Latent, Field(discriminator="kind")]


class Bands:
    """Wavelet bands on a padded grid; at 0 levels the voxels."""

    def __init__(self, spec: VolumeSpec, levels: int) -> None:
        self.spec = spec
        self.haar = Haar(levels)
        self.padded = self.haar.padded(spec.grid)
        x, y, z = (n // 2**levels for n in self.padded)
        self.shape = (spec.channels * 8**levels, x, y, z)
        self.given_channels = spec.given * 8**levels

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """None: nothing is learned."""
        return {}

    def rounds(self) -> Sequence[Round]:
        """None."""
        return []

    def enter(self, x: Tensor, c: Tensor) -> Tensor:
        """Bands of the padded volume from -1 to 1."""
        return self.haar.forward(pad_to(2 * x - 1, self.padded))

    def leave(self, y: Tensor, c: Tensor, white: Tensor) -> Tensor:
        """The volume, exactly."""
        return (crop_to(self.haar.inverse(y), self.spec.grid) + 1) / 2

    def membership_scores(self, x: Tensor, c: Tensor) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def place(self, given: Tensor) -> Tensor:
        """Bands of the masks."""
        if not self.spec.given:
            return given.new_zeros(len(given), 0, *self.shape[1:])
        return self.haar.forward(pad_to(given, self.padded))


class Codes:
    """Codes of an autoencoder, each channel in units of its own deviation over the cohort."""

    def __init__(self, spec: VolumeSpec, config: Latent, optimizer: Optimizer) -> None:
        self.spec, self.config = spec, config
        self.compressor = Compressor(config.autoencoder, spec, optimizer)
        k, x, y, z = self.compressor.code_shape
        self.shape = (k, x, y, z)
        self.given_channels = spec.given

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The autoencoder's."""
        return self.compressor.modules

    def rounds(self) -> Sequence[Round]:
        """The autoencoder's training; its end measures the scale of the codes."""
        return [
            Round(
                [self.compressor.phase()],
                share=self.config.share,
                finish=self._measure,
                finish_privacy="refused",
            )
        ]

    @torch.no_grad()
    def _measure(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        return self.compressor.measure(batches)[2]

    @torch.no_grad()
    def enter(self, x: Tensor, c: Tensor) -> Tensor:
        """The codes; the autoencoder is not trained through them."""
        return self.compressor.encode(x, c)

    def leave(self, y: Tensor, c: Tensor, white: Tensor) -> Tensor:
        """The decoded volume, with the texture that the decoder leaves out."""
        return self.compressor.decode(y, c, white)

    @torch.no_grad()
    def membership_scores(self, x: Tensor, c: Tensor) -> Mapping[str, Tensor]:
        """The autoencoder's."""
        return self.compressor.membership_scores(x, c)

    def place(self, given: Tensor) -> Tensor:
        """Means of the masks over the voxels that a place of the code stands for."""
        if not self.spec.given:
            return given.new_zeros(len(given), 0, *self.shape[1:])
        whole = self.compressor.encoder.geometry.expand(given)
        return F.adaptive_avg_pool3d(whole, self.shape[1:])


def numbers(room: Room) -> int:
    """How many numbers a volume has in a space."""
    return math.prod(room.shape)
