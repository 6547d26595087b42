"""Convolutions in bfloat16: gradients are those of float64, on grids of few voxels, too."""

import pytest
import torch
from torch import nn

from synthmed.backbones.nets.conv import Conv3d, exact
from synthmed.backbones.nets.convolutional import block


def _leave_garbage() -> None:
    """Large numbers in memory that is handed out next: what reads it unset then shows."""
    for power in range(12, 21, 2):
        torch.full((2**power,), 3e33)


@pytest.mark.parametrize(
    ("grid", "stride"),
    [
        *[((2, 2, 2), 1), ((2, 4, 4), 1), ((2, 2, 1), 1), ((2, 6, 1), 1), ((4, 4, 1), 1)],
        *[((1, 1, 1), 2), ((4, 1, 4), 2), ((3, 1, 1), 2), ((2, 4, 4), 2), ((4, 4, 4), 2)],
        *[((4, 1, 4), (1, 2, 2)), ((3, 1, 1), (1, 2, 2)), ((8, 8, 1), (2, 2, 1))],
    ],
)
def test_gradients_in_bfloat16_are_right(
    grid: tuple[int, ...], stride: int | tuple[int, int, int]
) -> None:
    """To the precision of bfloat16 (eight bits) of the largest: a wrong one is 1e33 or NaN."""
    torch.manual_seed(3)
    conv = Conv3d(16, 32, 3, stride, padding=1)
    oracle = nn.Conv3d(16, 32, 3, stride, padding=1).double()
    oracle.load_state_dict(conv.state_dict())
    x = torch.randn(5, 16, *grid)
    known = oracle(x.double())
    towards = torch.randn(known.shape)
    known.backward(towards.double())
    for _ in range(3):
        _leave_garbage()
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x)
        out.float().backward(towards)
        for own, true in ((conv.weight, oracle.weight), (conv.bias, oracle.bias)):
            assert own is not None and own.grad is not None and true.grad is not None
            assert (own.grad - true.grad).abs().max() < 0.03 * true.grad.abs().max()


def test_bfloat16_is_left_where_it_is_right() -> None:
    conv, strided = Conv3d(8, 8, 3, padding=1), Conv3d(8, 8, 3, 2, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        kinds = {
            grid: (conv(x := torch.randn(2, 8, *grid)).dtype, strided(x).dtype)
            for grid in ((4, 4, 4), (3, 2, 2), (4, 4, 1), (2, 4, 4))
        }
    half, full = torch.bfloat16, torch.float32
    assert kinds == {
        (4, 4, 4): (half, half),
        (3, 2, 2): (half, half),
        (4, 4, 1): (half, half),
        (2, 4, 4): (full, full),
    }


def test_the_blocks_of_monai_are_made_of_them() -> None:
    """And what could not be turned into one is refused."""
    torch.manual_seed(5)
    own = block(8, 16, (1, 2, 2))
    convolutions = [m for m in own.modules() if isinstance(m, nn.Conv3d)]
    assert len(convolutions) == 2 and all(isinstance(m, Conv3d) for m in convolutions)
    for layer in (nn.Conv3d(3, 4, 3), nn.Conv3d(3, 4, 3, padding=1, dilation=2)):
        with pytest.raises(ValueError, match="no plain convolution"):
            exact(layer)


@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2)])
@pytest.mark.parametrize("grid", [(5, 4, 6), (5, 4, 1), (5, 1, 6), (1, 4, 6), (1, 1, 6), (1, 1, 1)])
def test_what_is_left_out_along_an_axis_of_one_voxel_is_nothing(
    grid: tuple[int, ...], stride: int | tuple[int, int, int]
) -> None:
    torch.manual_seed(4)
    plain = nn.Sequential(nn.Conv3d(3, 4, 3, stride, padding=1), nn.SiLU()).double()
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    before = plain(x)
    wanted = torch.autograd.grad(before.square().sum(), list(plain.parameters()))
    after = exact(plain)(x)
    torch.testing.assert_close(after, before)
    found = torch.autograd.grad(after.square().sum(), list(plain.parameters()))
    torch.testing.assert_close(found, wanted)
