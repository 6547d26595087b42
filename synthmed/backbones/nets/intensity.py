"""Numbers of a network to intensities, with a black that stays black."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# softplus of this sharpness is the identity above 0.2 and keeps the background of a volume at 0,
# where a linear output would leave a haze
_SHARPNESS = 20.0
# what is taken off it again: without, no voxel would be 0 but at minus infinity, with no slope left
_LIFT = 0.005
# and where what samples begin as is black, they begin so far below it that what a network adds at
# first lights nothing: a haze that no scan has is lost on a critic of bounded slope, and a mean
# squared error hardly sees it
_DEPTH = 0.2


def output(x: Tensor) -> Tensor:
    """Any number to an intensity from -0.005 up; what is below 0 is black."""
    lifted: Tensor = F.softplus(x, beta=_SHARPNESS)
    return lifted - _LIFT


def before_output(x: Tensor) -> Tensor:
    """What `output` makes of it is x, or black where x is 0 or less."""
    y = _SHARPNESS * (x.clamp(min=0) + _LIFT)
    # log(exp(y) - 1) without exp(y), which overflows in float32 where x is above 4
    before = (y + torch.log(-torch.expm1(-y))) / _SHARPNESS
    return torch.where(x > 0, before, before - _DEPTH)
