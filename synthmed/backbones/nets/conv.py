"""Convolutions that know of grids of one or two voxels along an axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` for single slices, and in float32 on a CPU where bfloat16 would be wrong.

    Along an axis of one voxel only the middle of the kernel meets anything but padding: the rest is
    left out, which is the same and of a slice a third of the work.

    With oneDNN's kernels for AVX512-BF16 (torch 2.13) the weight's gradient of a convolution of
    3 x 3 x 3 is whatever lay in memory where the first side of the grid is 2, and where it steps
    over an axis of one voxel, which also writes beyond its memory. The former are the coarsest
    grids of a network, where float32 costs next to nothing.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding = list(self.stride), [int(n) for n in self.padding]
        for axis, (side, kernel) in enumerate(zip(input.shape[-3:], self.kernel_size, strict=True)):
            if side == 1:
                weight = weight.narrow(axis - 3, kernel // 2, 1)
                stride[axis], padding[axis] = 1, 0
        if input.device.type != "cpu" or input.shape[-3] != 2:
            return F.conv3d(input, weight, bias, stride, padding)
        with torch.autocast("cpu", enabled=False):
            full = None if bias is None else bias.float()
            return F.conv3d(input.float(), weight.float(), full, stride, padding)


def exact(module: nn.Module) -> nn.Module:
    """A module of another library, its convolutions turned into these.

    Raises:
        ValueError: one is not of an odd kernel with zeros round the grid, half a kernel wide.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv3d:
            half = tuple(n // 2 for n in layer.kernel_size)
            plain = all(n % 2 for n in layer.kernel_size) and layer.padding == half
            if not plain or layer.groups > 1 or max(layer.dilation) > 1:
                raise ValueError(f"{layer} is no plain convolution")
            layer.__class__ = Conv3d
    return module
