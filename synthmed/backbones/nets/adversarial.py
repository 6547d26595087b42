"""Generator and critic of a conditional GAN on volumes.

Both work on the volume folded by two (2 x 2 x 2 voxels become 8 channels), so that the finest
convolutions see an eighth of the voxels. Neither mixes samples: no batch norm, no batch statistic.

Axes: B samples, C image channels, K given mask channels, X Y Z voxels, D condition, L latent,
W width of a level, H hidden features of the critic.
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
from synthmed.backbones.nets.convolutional import fold, unfold
from synthmed.backbones.nets.intensity import output

Size = tuple[int, int, int]

_SLOPE = 0.2
# Adam moves a parameter by the learning rate a step; with this gain the maps that volumes share
# cross the range of intensities within some hundred steps
_GAIN = 0.5
# those of a condition move less: the steps of several maps add up in a voxel, as grain
_SHIFT = 0.3
# and noise comes slower than anatomy, or it takes anatomy's place
_TEXTURE = 0.1
# what differs between volumes begins at the size it has in scans, a tenth of their range
_VARIATION = 0.1
# and beside a volume that is begun already it is hardly seen at first; Adam's steps are as large
_QUIET = 0.1
# the critic's last layers follow a generator that moves; its convolutions need not be as fast
_HEAD = 4.0


def level_sizes(grid: Size, levels: int) -> list[Size]:
    """Size of each level, the finest (half the grid, rounded up) first; sides above 3 are halved.

    >>> level_sizes((9, 12, 40), 3)
    [(5, 6, 20), (3, 3, 10), (3, 3, 5)]
    """
    sizes: list[Size] = [_halved(grid, 0)]
    for _ in range(levels - 1):
        sizes.append(_halved(sizes[-1], 3))
    return sizes


def _halved(size: Size, above: int) -> Size:
    x, y, z = (math.ceil(n / 2) if n > above else n for n in size)
    return x, y, z


def unchecked(x: Tensor) -> Tensor:
    """Volumes (B, C, X, Y, Z) under the binomial filter (1, 2, 1) / 4 along every axis.

    Voxels of a cube of two come from channels of their own, so a generator can draw a pattern of
    period two everywhere at once, and a critic of bounded slope hardly minds. The filter has its
    zero at that frequency: no such pattern is left, whatever the weights (Zhang 2019,
    arXiv:1904.11486).
    """
    for axis, n in enumerate(x.shape[2:], start=2):
        if n > 1:
            inner = x.narrow(axis, 1, n - 1), x.narrow(axis, 0, n - 1)
            # mirrored at the edges, where the pattern would otherwise stay
            before = torch.cat([x.narrow(axis, 1, 1), inner[1]], axis)
            after = torch.cat([inner[0], x.narrow(axis, n - 2, 1)], axis)
            x = x / 2 + (before + after) / 4
    return x


def even(x: Tensor) -> Tensor:
    """Repeat the last plane of every odd side, so that `fold` can halve it."""
    pad = [p for n in reversed(x.shape[-3:]) for p in (0, n % 2)]
    return F.pad(x, pad, mode="replicate") if any(pad) else x


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)


class _Conv(Conv3d):
    """Convolution with unit normal weights that are scaled by He's constant when they are used.

    Adam then changes each layer by the same share a step, however many inputs it has (Karras et
    al. 2018, arXiv:1710.10196, sec. 4.1); without it, wide layers run away.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        stride: Size = (1, 1, 1),
        bias: bool = True,
        gain: float = 1.0,
        equal: bool = True,
    ) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, kernel // 2, bias=bias)
        scale = _begin(self, gain)
        self.scale = scale if equal else 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, self.weight * self.scale, self.bias)
        return out


class _Linear(nn.Linear):
    """The same for a linear layer."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        bias: bool = True,
        gain: float = 1.0,
        rate: float = 1.0,
        equal: bool = True,
    ) -> None:
        super().__init__(size_in, size_out, bias)
        scale = _begin(self, gain, rate)
        self.scale = scale if equal else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def _begin(layer: nn.Conv3d | nn.Linear, gain: float, rate: float = 1.0) -> float:
    """Draw the weights, and give He's constant (arXiv:1502.01852, eq. 14) times `gain`.

    A layer with `rate` above 1 learns that much faster than the others.
    """
    nn.init.normal_(layer.weight, std=1 / rate)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return gain * rate * math.sqrt(2 / (1 + _SLOPE**2) / layer.weight[0].numel())


class Generator(nn.Module):
    """Latent, noise, condition and given masks to volumes.

    From a coarse grid upwards, each level repeats its input on the next finer grid (nearest
    neighbour and a convolution: no checkerboard), adds a learned constant, noise and the given
    masks, and passes residual blocks whose scale and shift come from latent and condition (style
    and noise as in Karras et al. 2019, arXiv:1812.04948).

    Args:
        channels: C.
        given: K.
        grid: (X, Y, Z).
        widths: W from the finest level to the coarsest.
        condition_width: D.
        latent: L.
        begun: whether volumes are begun by something else, to which the network at first adds
            next to nothing.
    """

    CONDITIONING = ("style",)
    TOLD_LAST: ClassVar = {"style.0.weight": 1, "template": 0}

    def __init__(
        self,
        channels: int,
        given: int,
        grid: Size,
        widths: Sequence[int],
        condition_width: int,
        latent: int,
        begun: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.sizes = level_sizes(grid, len(widths))
        # at the finest level the noise is a full volume, folded: texture down to the voxel
        self.noise_shapes = [(8 * channels if i == 0 else 1, *n) for i, n in enumerate(self.sizes)]
        style = 2 * latent
        self.style = nn.Sequential(
            _Linear(latent + condition_width, style),
            nn.LeakyReLU(_SLOPE),
            _Linear(style, style),
            nn.LeakyReLU(_SLOPE),
        )
        coarser = [*widths[1:], widths[-1]]
        self.start = (widths[-1], *self.sizes[-1])
        self.coarse = _Linear(style, math.prod(self.start))
        self.levels = nn.ModuleList(
            _GeneratorLevel(a, b, shape, 8 * given if i == 0 else given, style)
            for i, (a, b, shape) in enumerate(zip(coarser, widths, self.noise_shapes, strict=True))
        )
        self.out = _Conv(widths[0], 8 * channels)
        # the eight voxels of a cube start alike, or the first volumes are grain (Aitken et al.
        # 2017, arXiv:1707.02937); what tells them apart is learned
        cube = self.out.weight.data.view(channels, 8, *self.out.weight.shape[1:])
        cube.copy_(cube[:, :1].expand_as(cube).clone())
        if begun:
            cube.mul_(_QUIET)
        # what all volumes share and what each condition shifts needs no network
        self.template = nn.Parameter(torch.zeros(1 + condition_width, channels, *grid))

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        noises: Sequence[Tensor],
        given: Tensor,
        begun: Tensor | None = None,
    ) -> Tensor:
        """Volumes (B, C, X, Y, Z), from -0.005 up.

        Args:
            z: (B, L).
            c: (B, D).
            noises: a (B, *shape) for each of `noise_shapes`.
            given: (B, K, X, Y, Z).
            begun: (B, C, X, Y, Z) to go on from, before the output's activation.
        """
        style = self.style(torch.cat([z, c.to(z.dtype)], 1))
        h = self.coarse(style).reshape(-1, *self.start)
        masks = self._masks(given)
        for level, noise, mask in reversed(list(zip(self.levels, noises, masks, strict=True))):
            h = level(h, style, noise, mask)
        nx, ny, nz = self.grid
        raw = unchecked(unfold(self.out(_activate(h)))[..., :nx, :ny, :nz].float())
        told = torch.cat([c.new_ones(len(c), 1), _SHIFT * c], 1).float()
        with torch.autocast(raw.device.type, enabled=False):
            shared = torch.einsum("bk,kcxyz->bcxyz", told, self.template)
        total = _VARIATION * raw + _GAIN * shared
        if begun is not None:
            total = total + begun
        return output(total)

    def _masks(self, given: Tensor) -> list[Tensor] | list[None]:
        """The given masks at each level, whole at the finest (folded), averaged below."""
        if not given.shape[1]:
            return [None] * len(self.noise_shapes)
        whole = fold(even(given))
        rest = [F.adaptive_avg_pool3d(given, size) for size in self.sizes[1:]]
        return [whole, *rest]


class _GeneratorLevel(nn.Module):
    """(B, W coarser, ...) to (B, W, X, Y, Z) of this level."""

    def __init__(
        self, coarser: int, width: int, noise_shape: tuple[int, ...], given: int, style: int
    ) -> None:
        super().__init__()
        self.size = noise_shape[1:]
        self.reduce = _Conv(coarser, width, 1)
        self.constant = nn.Parameter(torch.randn(width, *self.size))
        self.noise = _Conv(noise_shape[0], width, 1, bias=False, gain=_TEXTURE)
        nn.init.zeros_(self.noise.weight)
        self.given = _Conv(given, width, 1, bias=False) if given else None
        self.blocks = nn.ModuleList(_Styled(width, style) for _ in range(2))

    def forward(self, h: Tensor, style: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        # reducing the channels before the repetition gives the same as after it, for less
        h = F.interpolate(self.reduce(h), size=self.size, mode="nearest")
        h = h + self.constant.to(h.dtype) + self.noise(noise)
        if self.given is not None:
            h = h + self.given(mask)
        for block in self.blocks:
            h = block(h, style)
        return h


class _Styled(nn.Module):
    """Residual block: group norm, scale and shift by the style, activation, convolution."""

    CONDITIONING = ("film",)

    def __init__(self, width: int, style: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(width, 8), width, affine=False)
        self.film = _Linear(style, 2 * width, gain=0.3)
        self.conv = _Conv(width, width, gain=0.5)

    def forward(self, h: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.film(style)[:, :, None, None, None].chunk(2, 1)
        out: Tensor = h + self.conv(_activate(self.norm(h) * (1 + scale) + shift))
        return out


class Critic(nn.Module):
    """Volumes, condition and given masks to one score each.

    The condition enters by projection: score = w . h + v(c) . h (Miyato and Koyama 2018,
    arXiv:1802.05637, eq. 3), where h are features of the volume and its masks.

    Args:
        channels: C.
        given: K.
        grid: (X, Y, Z).
        widths: W from the finest level to the coarsest.
        condition_width: D.
        hidden: H.
        bias: whether the score has a constant; under a Wasserstein loss it cancels.
        equal: scale weights by He's constants and the score to a small slope; not where every
            weight is divided by its own norm.
    """

    CONDITIONING = ("score", "embed")
    gain: Tensor

    def __init__(
        self,
        channels: int,
        given: int,
        grid: Size,
        widths: Sequence[int],
        condition_width: int,
        hidden: int,
        bias: bool,
        equal: bool = True,
    ) -> None:
        super().__init__()
        sizes = level_sizes(grid, len(widths))
        self.stem = _Conv(8 * (channels + given), widths[0], equal=equal)
        levels = []
        for i, (a, b) in enumerate(pairwise(widths)):
            sx, sy, sz = (2 if n > 3 else 1 for n in sizes[i])
            levels.append(_CriticLevel(a, b, (sx, sy, sz), equal))
        self.levels = nn.Sequential(*levels)
        size = widths[-1] * math.prod(sizes[-1])
        self.features = _Linear(size, hidden, rate=_HEAD, equal=equal)
        self.score = _Linear(hidden, 1, bias=bias, rate=_HEAD, equal=equal)
        self.embed = (
            _Linear(condition_width, hidden, bias=False, rate=_HEAD, equal=equal)
            if condition_width
            else None
        )
        if self.embed is not None and equal:  # as the score, whose weights it shifts
            self.embed.scale = self.score.scale
        self.register_buffer("gain", torch.ones(()))
        if equal:
            self._start_gently(channels, given, grid, condition_width)

    def _start_gently(self, channels: int, given: int, grid: Size, condition_width: int) -> None:
        """Set the score's unit so that slopes begin at a tenth, whatever the grid.

        Steep ones take hundreds of steps to undo. At slope 1, half of all critics begin with the
        wrong sign, and the penalty keeps them from turning it: the way leads through slope 0.
        """
        x = torch.rand(4, channels, *grid, requires_grad=True)
        total = self(x, torch.zeros(4, condition_width), torch.zeros(4, given, *grid)).sum()
        (slope,) = torch.autograd.grad(total, x)
        self.gain.fill_(0.3 / slope.flatten(1).norm(dim=1).mean())

    def forward(self, x: Tensor, c: Tensor, given: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, X, Y, Z), (B, D), (B, K, X, Y, Z) and (B, H) factors on the features: (B,)."""
        h = self.stem(fold(even(torch.cat([x, given.to(x.dtype)], 1))))
        h = _activate(self.features(_activate(self.levels(h)).flatten(1)))
        # in float32 from here: a score far from 0 would lose its digits in bfloat16
        h = h.float() if keep is None else h.float() * keep
        with torch.autocast(x.device.type, enabled=False):
            score: Tensor = self.score(h)[:, 0]
            if self.embed is not None:
                score = score + (self.embed(c.float()) * h).sum(1)
        return self.gain * score


class _CriticLevel(nn.Module):
    """Strided convolution to the next level and a residual one there."""

    def __init__(self, finer: int, width: int, stride: Size, equal: bool) -> None:
        super().__init__()
        self.down = _Conv(finer, width, stride=stride, equal=equal)
        self.conv = _Conv(width, width, gain=0.5, equal=equal)

    def forward(self, h: Tensor) -> Tensor:
        h = self.down(_activate(h))
        out: Tensor = h + self.conv(_activate(h))
        return out
