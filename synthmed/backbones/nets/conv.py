"""Convolutions whose gradient is right in bfloat16 on small grids, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d`, in float32 on a CPU where bfloat16 would be wrong.

    With oneDNN's kernels for AVX512-BF16 (torch 2.13) the weight's gradient of a convolution of
    3 x 3 x 3 is whatever lay in memory where the first side of the grid is 2, and where it steps
    over an axis of one voxel, which also writes beyond its memory. Such grids are the coarsest of
    a network, where float32 costs next to nothing.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor
        if input.device.type != "cpu" or not _small(input.shape[-3:], self.stride):
            out = super()._conv_forward(input, weight, bias)
        else:
            with torch.autocast("cpu", enabled=False):
                full = None if bias is None else bias.float()
                out = super()._conv_forward(input.float(), weight.float(), full)
        return out


def _small(grid: Sequence[int], stride: Sequence[int]) -> bool:
    return grid[0] == 2 or any(n == 1 < s for n, s in zip(grid, stride, strict=True))


def exact(module: nn.Module) -> nn.Module:
    """A module of another library, its convolutions turned into these."""
    for layer in module.modules():
        if type(layer) is nn.Conv3d:
            layer.__class__ = Conv3d
    return module
