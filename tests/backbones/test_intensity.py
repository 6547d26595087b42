"""What stands between a network's numbers and intensities, in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from synthmed.backbones.nets.intensity import _LIFT, _SHARPNESS, before_output, output


def test_before_the_output_is_the_inverse_of_the_output() -> None:
    x = torch.tensor([1e-6, 0.001, 0.05, 0.2, 1, 4, 40], dtype=torch.float64)
    torch.testing.assert_close(output(before_output(x)), x)
    dark = before_output(torch.tensor([-1.0, 0.0]))
    assert torch.isfinite(dark).all() and dark[0] == dark[1]
    # without the lift, float32 would already be lost here
    assert torch.isfinite(before_output(torch.tensor(100.0)))


def test_the_output_bends_near_black_alone() -> None:
    """Softplus less its lift: the identity from 0.2 on, and black at a number with a slope left."""
    x = torch.tensor([-5, -0.3, 0.2, 1.0], dtype=torch.float64)
    closed = (1 + (_SHARPNESS * x).exp()).log() / _SHARPNESS - _LIFT
    torch.testing.assert_close(output(x), closed)
    assert (output(x)[2:] - x[2:]).abs().max() <= _LIFT
    black = before_output(torch.full((), 1e-12, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(output(black), black)
    assert float(slope) == pytest.approx(1 - math.exp(-_SHARPNESS * _LIFT))


def test_what_begins_black_stays_black_under_small_changes() -> None:
    """Ten times as large as the network's first ones. What is lit already changes with them."""
    x = before_output(torch.tensor([-1, 0, 0.001, 0.5], dtype=torch.float64))
    brighter = output(x + 0.1).clamp(min=0)
    assert (brighter[:2] == 0).all()
    assert brighter[2] > 0.02 and brighter[3] == pytest.approx(0.6, abs=1e-4)
