"""What a critic sees of a scan: the same kinds of random change on scans and on samples.

A critic that has few scans learns them by heart and then teaches the generator nothing. When both
sides are moved, brightened and partly hidden at random it cannot, and since the generator's
gradient passes through the change, its samples do not learn the changes (Zhao et al. 2020,
arXiv:2006.10738).

Axes: N scans, C channels, K given mask channels, X Y Z voxels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

SHIFT = 0.125
"""Of each side, the furthest a scan is moved."""
BRIGHTER = 0.1
"""The most that is added to, or taken from, every intensity."""
CONTRAST = 0.25
"""The most that contrast about a scan's mean is raised or lowered by."""
HOLE = 0.5
"""Of each side, what is hidden."""


def draw(generator: Generator, n: int) -> dict[str, Tensor]:
    """What is random of n changes: shift, tone and hole, (n, 3), (n, 2) and (n, 3)."""
    return {
        "move_S": 2 * torch.rand(n, 3, generator=generator) - 1,
        "tone_S": 2 * torch.rand(n, 2, generator=generator) - 1,
        "hole_S": torch.rand(n, 3, generator=generator),
    }


def altered(
    x: Tensor, given: Tensor, draws: Mapping[str, Tensor], masks: int = 0
) -> tuple[Tensor, Tensor]:
    """(N, C, X, Y, Z) scans and (N, K, X, Y, Z) masks after a change each, from draws (N, ...).

    Moved by whole voxels, zero where nothing moves in; tone for images alone, which the last
    `masks` of the C channels are not.
    """
    move, tone, hole = (draws[k] for k in ("move_S", "tone_S", "hole_S"))
    channels = x.shape[1]
    images, drawn = x[:, : channels - masks], x[:, channels - masks :]
    mean = images.mean((1, 2, 3, 4), keepdim=True)
    bright, sharp = (t[:, None, None, None, None] for t in tone.unbind(1))
    images = mean + (1 + CONTRAST * sharp) * (images - mean) + BRIGHTER * bright
    both = torch.cat([images, drawn, given.to(x.dtype)], 1)
    seen = both.new_ones(())
    for axis, size in enumerate(both.shape[2:]):
        at = torch.arange(size, device=both.device)
        by = (move[:, axis] * SHIFT * size).round()[:, None, None]
        # a matrix and no index: a batched gradient cannot index by what was drawn
        matrix = (at[:, None] - at[None, :] == by).to(both.dtype)
        letter = "xyz"[axis]
        both = torch.einsum(f"nij,nc{'xyz'.replace(letter, 'j')}->nc{'xyz'.replace(letter, 'i')}",
                            matrix, both)  # fmt: skip
        centre = hole[:, axis, None] * size
        inside = ((at + 0.5 - centre).abs() < HOLE * size / 2).to(both.dtype)
        shape = [len(inside), 1, 1, 1, 1]
        shape[2 + axis] = size
        seen = seen * inside.reshape(shape)
    both = both * (1 - seen)
    return both[:, :channels], both[:, channels:]
