"""Encoder and decoder of a conditional VAE, and the blocks of others, from MONAI's residual units.

The volume is folded by two in space first (2 x 2 x 2 voxels become 8 channels): the finest
convolutions then see an eighth of the voxels, where most of the time would go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from monai.networks.blocks.convolutions import ResidualUnit
from monai.networks.layers.utils import get_act_layer
from torch import Tensor, nn
from torch.nn import functional as F

from synthmed.backbones.nets.conv import Conv3d, exact
from synthmed.backbones.nets.gaussian import LinearCode
from synthmed.backbones.nets.intensity import output

ACT = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})

_QUIET = 0.1
"""Of what a decoder would put out at first, where its volume is begun already."""
_NARROW = -6.0
"""Log variance of a latent at first, where its mean is begun already: the volume it begins with is
one of a Gaussian of hundreds of voxels a latent, which a wide posterior would blur at once."""


def block(channels_in: int, channels_out: int, stride: int | tuple[int, ...] = 1) -> nn.Module:
    """A residual unit: two convolutions, or one where it halves the grid."""
    groups = math.gcd(channels_out, 8)
    unit = ResidualUnit(
        spatial_dims=3,
        in_channels=channels_in,
        out_channels=channels_out,
        strides=stride,
        subunits=2 if stride == 1 else 1,
        act=ACT,
        norm=("group", {"num_groups": groups}),
    )
    return exact(unit)


def fold(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) to (B, 8 C, X/2, Y/2, Z/2): each 2 x 2 x 2 cube becomes channels."""
    b, c, x_, y_, z_ = x.shape
    x = x.reshape(b, c, x_ // 2, 2, y_ // 2, 2, z_ // 2, 2)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, 8 * c, x_ // 2, y_ // 2, z_ // 2)


def unfold(x: Tensor) -> Tensor:
    """The inverse of `fold`."""
    b, c8, x_, y_, z_ = x.shape
    x = x.reshape(b, c8 // 8, 2, 2, 2, x_, y_, z_)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c8 // 8, 2 * x_, 2 * y_, 2 * z_)


class Geometry:
    """How a grid shrinks level by level.

    Args:
        grid: (X, Y, Z) of the data.
        levels: number of widths, each level after the first halving every side above 3.
    """

    def __init__(self, grid: tuple[int, int, int], levels: int) -> None:
        sizes = [math.ceil(n / 2) for n in grid]
        strides: list[tuple[int, ...]] = []
        for _ in range(levels - 1):
            step = tuple(2 if n > 3 else 1 for n in sizes)
            strides.append(step)
            sizes = [math.ceil(n / s) for n, s in zip(sizes, step, strict=True)]
        self.strides = strides
        self.coarse = tuple(sizes)
        full = [2 * n * math.prod(s[i] for s in strides) for i, n in enumerate(sizes)]
        self.padded = tuple(full)
        self.pad = [
            p for n, m in zip(reversed(grid), reversed(full), strict=True) for p in (0, m - n)
        ]
        self.grid = grid

    def expand(self, x: Tensor) -> Tensor:
        """Pad with the edge value up to a size every level divides."""
        return F.pad(x, self.pad, mode="replicate") if any(self.pad) else x

    def crop(self, x: Tensor) -> Tensor:
        """The inverse of `expand`."""
        nx, ny, nz = self.grid
        return x[..., :nx, :ny, :nz]


def encoder_blocks(channels: int, widths: Sequence[int], geometry: Geometry) -> nn.Sequential:
    """From a folded volume to `widths[-1]` channels on the coarsest level."""
    blocks: list[nn.Module] = [Conv3d(8 * channels, widths[0], 3, padding=1)]
    for a, b, stride in zip(widths, widths[1:], geometry.strides, strict=False):
        blocks.append(block(a, b, stride))
    return nn.Sequential(*blocks, block(widths[-1], widths[-1]))


def decoder_blocks(widths: Sequence[int], geometry: Geometry) -> nn.Sequential:
    """From `widths[-1]` channels on the coarsest level to `widths[0]` on the folded grid."""
    blocks: list[nn.Module] = [block(widths[-1], widths[-1])]
    down = list(zip(widths, widths[1:], geometry.strides, strict=False))
    for a, b, stride in reversed(down):
        blocks += [nn.Upsample(scale_factor=stride, mode="nearest"), block(b, a)]
    return nn.Sequential(*blocks)


class Encoder(nn.Module):
    """(B, C, X, Y, Z) and (B, D) to mean and log variance of the latent, (B, L) each."""

    TOLD_LAST: ClassVar = {"head.0.weight": 1}

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int, int],
        widths: Sequence[int],
        condition_width: int,
        latent: int,
    ) -> None:
        super().__init__()
        self.geometry = Geometry(grid, len(widths))
        self.blocks = encoder_blocks(channels, widths, self.geometry)
        size = widths[-1] * math.prod(self.geometry.coarse)
        hidden = 4 * latent
        self.head = nn.Sequential(
            nn.Linear(size + condition_width, hidden),
            get_act_layer(ACT),
            nn.Linear(hidden, 2 * latent),
        )

    def forward(self, x: Tensor, c: Tensor, begun: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Volumes and conditions to the latent's moments.

        Args:
            x: (B, C, X, Y, Z).
            c: (B, D).
            begun: (B, up to L) to go on from as the first latents' means.
        """
        h = self.blocks(fold(self.geometry.expand(x))).flatten(1)
        mean, log_var = self.head(torch.cat([h, c.to(h.dtype)], 1)).float().chunk(2, 1)
        if begun is not None:
            log_var = log_var + _NARROW
        return added(mean, begun), log_var.clamp(-12, 4)


class Decoder(nn.Module):
    """(B, L) latent and (B, D) condition to the mean volume (B, C, X, Y, Z), float32.

    Args:
        channels: C.
        grid: (X, Y, Z).
        widths: channels from the finest level (half the grid) to the coarsest.
        condition_width: D.
        latent: L.
        linear: what volumes begin as, from the first latents and the first numbers of a condition;
            the network then at first adds next to nothing, and no voxel is below 0.
    """

    CONDITIONING = ("head.0",)
    TOLD_LAST: ClassVar = {"head.0.weight": 1, "template": 0}

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int, int],
        widths: Sequence[int],
        condition_width: int,
        latent: int,
        linear: LinearCode | None = None,
    ) -> None:
        super().__init__()
        self.geometry = Geometry(grid, len(widths))
        self.width = widths[-1]
        self.linear = linear
        hidden = 4 * latent
        size = widths[-1] * math.prod(self.geometry.coarse)
        self.head = nn.Sequential(
            nn.Linear(latent + condition_width, hidden),
            get_act_layer(ACT),
            nn.Linear(hidden, size),
        )
        self.blocks = decoder_blocks(widths, self.geometry)
        self.out = Conv3d(widths[0], 8 * channels, 3, padding=1)
        if linear is not None:
            return
        # what all scans share, what each condition shifts and what is linear in the latent needs
        # no network: maps on the grid learn it first, and the decoder cannot leave the condition
        # to the latent
        self.template = nn.Parameter(torch.zeros(1 + condition_width, channels, *grid))
        self.basis = nn.Parameter(torch.zeros(latent, channels, *grid))

    def forward(self, z: Tensor, c: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mean volume, or one with noise (B, C, X, Y, Z) on top."""
        h = self.head(torch.cat([z, c.to(z.dtype)], 1))
        h = h.reshape(-1, self.width, *self.geometry.coarse)
        mean = self.geometry.crop(unfold(self.out(self.blocks(h)))).float()
        if self.linear is not None:
            return gone_on(self.linear, mean, z, c, noise)
        known = torch.cat([c.new_ones(c.shape[0], 1), c], 1).float()
        # Adam moves a parameter by the learning rate a step: with this gain the template is there
        # within tens of steps. The basis has none, or the latent would stay far below unit scale.
        mean = mean + 10 * torch.einsum("bk,kcxyz->bcxyz", known, self.template)
        mean = mean + torch.einsum("bl,lcxyz->bcxyz", z.float(), self.basis)
        return mean if noise is None else mean + noise


def added(code: Tensor, begun: Tensor | None) -> Tensor:
    """Codes (B, L), quietly, on top of the numbers (B, up to L) that they go on from."""
    if begun is None:
        return code
    return _QUIET * code + F.pad(begun, (0, code.shape[1] - begun.shape[1]))


def gone_on(linear: LinearCode, more: Tensor, z: Tensor, c: Tensor, noise: Tensor | None) -> Tensor:
    """Intensities of volumes that the Gaussian begins, with what a network adds, (B, C, X, Y, Z).

    Noise comes before the output's activation too, so that it lights nothing that is black. Black
    is 0, not the little below it where the activation ends, and has the activation's slope still.
    """
    before = linear.begin(z, c).reshape(more.shape) + _QUIET * more
    made = output(before if noise is None else before + noise)
    return made + (made.clamp(min=0) - made).detach()
