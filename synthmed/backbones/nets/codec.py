"""A volume to a code and back, without noise: a vector, or a map on the coarsest level.

Both have the shape (B, K, x, y, z), a vector with x = y = z = 1, so that whatever models codes
(a mixture, a diffusion) need not ask which it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from monai.networks.layers.utils import get_act_layer
from torch import Tensor, nn

from synthmed.backbones.generative import VolumeSpec
from synthmed.backbones.nets.conv import Conv3d
from synthmed.backbones.nets.convolutional import (
    ACT,
    Geometry,
    added,
    decoder_blocks,
    encoder_blocks,
    fold,
    gone_on,
    unfold,
)
from synthmed.backbones.nets.gaussian import LinearCode


class CodeEncoder(nn.Module):
    """(B, C, X, Y, Z) and (B, D) to a code (B, K, x, y, z), float32.

    Args:
        spec: of the volumes.
        widths: channels from the finest level (half the grid) to the coarsest.
        numbers: K, length of the vector or channels of the map.
        vector: whether the code is a vector.
    """

    TOLD_LAST: ClassVar = {"head.0.weight": 1, "head.weight": 1}

    def __init__(
        self, spec: VolumeSpec, widths: Sequence[int], numbers: int, *, vector: bool
    ) -> None:
        super().__init__()
        self.geometry = Geometry(spec.grid, len(widths))
        self.vector = vector
        self.shape = (numbers, *((1, 1, 1) if vector else self.geometry.coarse))
        self.blocks = encoder_blocks(spec.channels, widths, self.geometry)
        if vector:
            size = widths[-1] * math.prod(self.geometry.coarse)
            self.head: nn.Module = nn.Sequential(
                nn.Linear(size + spec.condition_width, 4 * numbers),
                get_act_layer(ACT),
                nn.Linear(4 * numbers, numbers),
            )
        else:
            self.head = Conv3d(widths[-1] + spec.condition_width, numbers, 1)

    def forward(self, x: Tensor, c: Tensor, begun: Tensor | None = None) -> Tensor:
        """The code of (B, C, X, Y, Z) and (B, D); of a vector the first numbers go on from
        `begun` (B, up to K)."""
        h = self.blocks(fold(self.geometry.expand(x)))
        h = h.flatten(1) if self.vector else h
        code: Tensor = self.head(_with_condition(h, c))
        return added(code.float(), begun).reshape(-1, *self.shape)


class CodeDecoder(nn.Module):
    """A code (B, K, x, y, z) and (B, D) to a volume (B, C, X, Y, Z), float32.

    Args:
        spec: of the volumes.
        widths: channels from the finest level (half the grid) to the coarsest.
        numbers: K, length of the vector or channels of the map.
        vector: whether the code is a vector.
        rectified: whether negative numbers of a code count as 0 (a sparse code).
        linear: what volumes begin as, as for the VAE's decoder; of a vector alone.
    """

    TOLD_LAST: ClassVar = {"head.0.weight": 1, "head.weight": 1, "template": 0}

    def __init__(
        self,
        spec: VolumeSpec,
        widths: Sequence[int],
        numbers: int,
        *,
        vector: bool,
        rectified: bool = False,
        linear: LinearCode | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.geometry = Geometry(spec.grid, len(widths))
        self.vector, self.rectified, self.width = vector, rectified, widths[-1]
        if vector:
            size = widths[-1] * math.prod(self.geometry.coarse)
            self.head: nn.Module = nn.Sequential(
                nn.Linear(numbers + spec.condition_width, 4 * numbers),
                get_act_layer(ACT),
                nn.Linear(4 * numbers, size),
            )
        else:
            self.head = Conv3d(numbers + spec.condition_width, widths[-1], 3, padding=1)
        self.blocks = decoder_blocks(widths, self.geometry)
        self.out = Conv3d(widths[0], 8 * spec.channels, 3, padding=1)
        if linear is not None:
            return
        # as in the VAE's decoder: what is shared, and what is linear in the condition or in a
        # vector, stands in maps on the grid, which are learned long before the network
        known = 1 + spec.condition_width
        self.template = nn.Parameter(torch.zeros(known, spec.channels, *spec.grid))
        self.basis = (
            nn.Parameter(torch.zeros(numbers, spec.channels, *spec.grid)) if vector else None
        )

    def active(self, code: Tensor) -> Tensor:
        """What of a code is read: all of it, or its positive part."""
        return code.relu() if self.rectified else code

    def forward(self, code: Tensor, c: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mean volume, or one with noise (B, C, X, Y, Z) on top."""
        a = self.active(code)
        h = self.head(_with_condition(a.flatten(1) if self.vector else a, c))
        h = h.reshape(-1, self.width, *self.geometry.coarse)
        mean = self.geometry.crop(unfold(self.out(self.blocks(h)))).float()
        if self.linear is not None:
            return gone_on(self.linear, mean, code.flatten(1), c, noise)
        known = torch.cat([c.new_ones(c.shape[0], 1), c], 1).float()
        mean = mean + 10 * torch.einsum("bk,kcxyz->bcxyz", known, self.template)
        if self.basis is not None:
            mean = mean + torch.einsum("bl,lcxyz->bcxyz", a.flatten(1).float(), self.basis)
        return mean if noise is None else mean + noise


class CodeScale(nn.Module):
    """Mean and standard deviation of each of a code's K channels, in buffers, set by `fit`."""

    mean_K: Tensor
    sd_K: Tensor

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.register_buffer("mean_K", torch.zeros(numbers))
        self.register_buffer("sd_K", torch.ones(numbers))

    def fit(self, codes: Tensor) -> None:
        """Measure on codes (n, K, x, y, z), over patients and places; a channel that does not
        vary keeps deviation 1."""
        wide = codes.double().transpose(0, 1).flatten(1)
        sd = wide.std(1, correction=0)
        self.mean_K.copy_(wide.mean(1))
        self.sd_K.copy_(torch.where(sd > 1e-6, sd, torch.ones_like(sd)))

    def normalise(self, code: Tensor) -> Tensor:
        """Codes (B, K, x, y, z) with mean 0 and deviation 1 in every channel."""
        return (code - _wide(self.mean_K)) / _wide(self.sd_K)

    def restore(self, code: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return code * _wide(self.sd_K) + _wide(self.mean_K)


def _wide(per_channel: Tensor) -> Tensor:
    return per_channel[:, None, None, None]


def _with_condition(h: Tensor, c: Tensor) -> Tensor:
    """(B, K, ...) with the condition's D numbers as further channels, the same everywhere."""
    wide = c.to(h.dtype).reshape(*c.shape, *(1 for _ in h.shape[2:]))
    return torch.cat([h, wide.expand(*c.shape, *h.shape[2:])], 1)
