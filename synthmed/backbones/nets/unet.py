"""The network of a diffusion model: a U-Net that knows noise level, condition and place.

Ronneberger et al. 2015 in three dimensions, with residual blocks whose features are scaled and
shifted by what is known (Dhariwal and Nichol 2021, arXiv:2105.05233, adaptive group
normalisation). Not MONAI's: that one takes a class number alone, divides every grid evenly or
fails, and spends most of its time at full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthmed.backbones.nets.conv import Conv3d
from synthmed.backbones.nets.recomputable import Recomputable

_FREQUENCIES = 32  # of the Fourier features of the noise level
_PLACE = 8  # learned maps that tell where a voxel is: anatomy is not the same everywhere
_KNOWN = 128  # features of noise level and condition


class UNet(nn.Module):
    """(B, channels, X, Y, Z) to (B, out, X, Y, Z) on any grid, near 0 at first.

    Args:
        channels: of the input.
        out: channels of the output.
        grid: (X, Y, Z).
        widths: channels from the finest level to the coarsest, each level half the side.
        depth: residual blocks of each level, on the way down and on the way up.
        condition_width: D.
    """

    CONDITIONING = ("known",)
    TOLD_LAST: ClassVar = {"known.0.weight": 1}

    def __init__(
        self,
        channels: int,
        out: int,
        grid: tuple[int, int, int],
        widths: Sequence[int],
        depth: int,
        condition_width: int,
    ) -> None:
        super().__init__()
        self.known = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES + condition_width, _KNOWN),
            nn.SiLU(),
            nn.Linear(_KNOWN, _KNOWN),
            nn.SiLU(),
        )
        self.place = nn.Parameter(0.1 * torch.randn(_PLACE, *grid))
        self.enter = Conv3d(channels + _PLACE, widths[0], 3, padding=1)
        self.down: list[list[_Block]] = []
        self.up: list[list[_Block]] = []
        width = widths[0]
        for w in widths:
            self.down.append(_level(width, w, depth))
            self.up.insert(0, _level(w, w, depth))
            width = w
        # skips are added, not concatenated: on two cores half the time went into the convolutions
        # that take the concatenation in, and the loss at equal steps was no better for it
        self.merge = nn.ModuleList(Conv3d(b, a, 1) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(self._blocks())
        self.last = nn.Sequential(_norm(widths[0]), nn.SiLU(), Conv3d(widths[0], out, 3, padding=1))
        _quiet(self.last[2])
        self.n_dropped = sum(block.width for block in self._blocks())

    def _blocks(self) -> list[_Block]:
        return [b for side in (self.down, self.up) for level in side for b in level]

    def forward(self, x: Tensor, level: Tensor, c: Tensor, keep: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: (B, channels, X, Y, Z).
            level: (B,) log of the noise level.
            c: (B, D) encoded conditions.
            keep: (B, n_dropped) factors of the blocks' channels, for dropout (Srivastava et al.
                2014); None keeps all.
        """
        widths = [b.width for b in self._blocks()]
        kept = iter([] if keep is None else torch.split(keep, widths, 1))
        known = self.known(torch.cat([_fourier(level), c], 1))
        h = self.enter(torch.cat([x, self.place.expand(len(x), -1, -1, -1, -1)], 1))
        skips = []
        for i, blocks in enumerate(self.down):
            if i:
                halved = [min(n, 2) for n in h.shape[2:]]  # a side of 1 stays
                h = F.avg_pool3d(h, halved, ceil_mode=True, count_include_pad=False)
            for block in blocks:
                h = block(h, known, next(kept, None))
            skips.append(h)
        for i, blocks in enumerate(self.up):
            if i:
                finer = len(skips) - 1 - i
                skip = skips[finer]
                x_, y_, z_ = skip.shape[2:]
                # of an odd side the last voxel was pooled alone
                h = F.interpolate(self.merge[finer](h), scale_factor=2, mode="nearest")
                h = h[..., :x_, :y_, :z_] + skip
            for block in blocks:
                h = block(h, known, next(kept, None))
        out: Tensor = self.last(h)
        return out


class _Block(Recomputable):
    """Two convolutions; what is known scales and shifts the features between them."""

    CONDITIONING = ("modulate",)

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Sequential(
            _norm(channels), nn.SiLU(), Conv3d(channels, width, 3, padding=1)
        )
        self.norm = _norm(width)
        self.modulate = nn.Linear(_KNOWN, 2 * width)
        self.second = Conv3d(width, width, 3, padding=1)
        self.skip = Conv3d(channels, width, 1) if channels != width else nn.Identity()
        _quiet(self.second)

    def compute(self, x: Tensor, known: Tensor, keep: Tensor | None) -> Tensor:
        scale, shift = self.modulate(known)[:, :, None, None, None].chunk(2, 1)
        h = F.silu(self.norm(self.first(x)) * (1 + scale) + shift)
        if keep is not None:
            h = h * keep[:, :, None, None, None].to(h.dtype)
        out: Tensor = self.skip(x) + self.second(h)
        return out


def _level(channels: int, width: int, depth: int) -> list[_Block]:
    return [_Block(channels if i == 0 else width, width) for i in range(depth)]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


def _fourier(level: Tensor) -> Tensor:
    """(B, 2 F) sines and cosines of (B,) log noise levels, periods 40 down to 1 e-folds."""
    rates = torch.logspace(
        math.log10(2 * math.pi / 40), math.log10(2 * math.pi), _FREQUENCIES, device=level.device
    )
    angle = level.float()[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], 1)


def _quiet(layer: nn.Module) -> None:
    """Start a layer near 0: a block first passes on what it gets, and the network says nothing."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.01)
