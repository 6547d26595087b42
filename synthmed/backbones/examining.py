"""Figures and pictures that show what a trained model does to scans, for the private side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from synthmed.backbones.generative import Batch

CHUNK = 16
"""Volumes that go through a network at once when a model is examined."""

MOST_ROWS = 12
"""Scans of a patient that a fit without gradients looks at."""

MOST_UNITS = 64
"""Numbers of a code that are looked at one by one: those that carry most."""

_STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # of a traversal, in standard deviations
_GAP = 2
_SMALLEST = 48  # pixels a plane's side has at least


def scans(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """All scans of a batch but the padding, (n, C, X, Y, Z), conditions (n, D) and masks."""
    keep = batch.mask.flatten() > 0
    x, c, given = (t.flatten(0, 1)[keep] for t in (batch.x, batch.c, batch.given))
    return x, c, given


def shares(batch: Batch) -> Tensor:
    """(n,) how much each of a batch's `scans` counts in people: those of a person add up to 1."""
    share = batch.mask / batch.mask.sum(1, keepdim=True)
    return share[batch.mask > 0]


def evenly(batches: Sequence[Batch]) -> Tensor:
    """Rows of the batches' `scans` put together, by which every patient counts alike.

    Somebody scanned ten times is one person: a fit to all scans would be mostly theirs. Each
    patient has as many rows as the one with most scans, `MOST_ROWS` at most, their scans in turn.
    """
    counts = [int(n) for batch in batches for n in batch.mask.sum(1)]
    width = min(max(counts), MOST_ROWS)
    starts = itertools.accumulate(counts, initial=0)
    each = [
        [s + i * n // width for i in range(width)] for s, n in zip(starts, counts, strict=False)
    ]
    return torch.tensor(each).flatten()


def in_chunks(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The function on a few rows at a time, put together again.

    Parts differ by one row at most: one that is left over would be convolved alone, which takes
    some ten times longer a volume on CPU.
    """
    n = max(1, math.ceil(len(rows[0]) / CHUNK))
    parts = zip(*(torch.tensor_split(r, n) for r in rows), strict=True)
    return torch.cat([function(*part) for part in parts])


def closeness(x: Tensor, copy: Tensor) -> Tensor:
    """Minus the log of the mean squared error of volumes (n, C, X, Y, Z): (n,) float64."""
    error = (copy.double() - x.double()).square().flatten(1).mean(1)
    return -error.clamp(min=1e-30).log()


def likeness(original: Tensor, copy: Tensor, side: str) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM over volumes (n, C, X, Y, Z), data range 1: `psnr_SIDE`, `ssim_SIDE`.

    SSIM as Wang et al. 2004 (doi:10.1109/TIP.2003.819861) in three dimensions, windows of seven
    voxels, mean over channels; of slices in two.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    axes = tuple(axis for axis in (2, 3, 4) if original.shape[axis] == 1)
    sides = (x.float().cpu().numpy().squeeze(axes) for x in (original, copy))
    pairs = list(zip(*sides, strict=True))
    psnr = [
        peak_signal_noise_ratio(a, b, data_range=1.0)  # type: ignore[no-untyped-call]
        for a, b in pairs
    ]
    ssim = [
        structural_similarity(  # type: ignore[no-untyped-call]
            a, b, data_range=1.0, channel_axis=0
        )
        for a, b in pairs
    ]
    return {f"psnr_{side}": float(np.mean(psnr)), f"ssim_{side}": float(np.mean(ssim))}


def beside(
    train: Batch,
    holdout: Batch | None,
    copy: Callable[[Tensor, Tensor], Tensor],
    name: str,
    what: str,
    n_shown: int,
) -> tuple[dict[str, float], dict[str, tuple[npt.NDArray[np.uint8], str]]]:
    """Scans of either side beside what a model makes of them.

    Args:
        train, holdout: patients of either side; there may be none held out.
        copy: scans (n, C, X, Y, Z) and conditions (n, D) to volumes of that shape.
        name: of the pictures, `NAME_SIDE`.
        what: stands beside each scan, for the caption.
        n_shown: scans of a side that are drawn.

    Returns:
        `likeness` of either side, and a picture with its caption.
    """
    figures: dict[str, float] = {}
    pictures = {}
    for side, batch in (("train", train), ("holdout", holdout)):
        if batch is None:
            continue
        x, c, _ = scans(batch)
        made = copy(x, c)
        figures |= likeness(x, made, side)
        who = {"train": "Training patients", "holdout": "Held-out patients"}[side]
        rows = [[x[i, 0], made[i, 0]] for i in range(min(len(x), n_shown))]
        pictures[f"{name}_{side}"] = (sheet(rows), f"{who}: each scan beside {what}.")
    return figures, pictures


def units(
    decode: Callable[[Tensor], Tensor],
    z: Tensor,
    sd: Tensor,
    x: Tensor,
    c: Tensor,
    carried: Mapping[str, Tensor],
    names: Sequence[str] = (),
) -> list[dict[str, float | str]]:
    """What each number of a code does, the one that moves the decoder most first.

    Args:
        decode: codes (m, L) to volumes (m, C, X, Y, Z), for one condition.
        z: (n, L), the codes of n scans.
        sd: (L,), how far a code varies: one step of what is decoded.
        x: (n, C, X, Y, Z), the scans.
        c: (n, D), their encoded conditions.
        carried: columns of the model's own, (L,) each; the first picks the `MOST_UNITS` shown.
        names: of the D numbers of a condition; empty where they have none.

    Returns:
        Rows with `unit` (from 1), what is carried, `decoded_variance` (the share of the decoder's
        variance that one step to either side moves, the other numbers at their mean), and
        correlations over the scans with each number of the condition, with brightness (mean of
        what is brighter than 0.1) and volume (its share of the grid) in the first channel, and
        with the mean of every further channel (of a mask: its volume).
    """
    first = next(iter(carried.values()))
    chosen = first.sort(descending=True, stable=True).indices[:MOST_UNITS]
    steps = sd[chosen, None] * torch.eye(z.shape[1], device=z.device)[chosen]
    centre = z.mean(0)

    def move(step: Tensor) -> Tensor:
        difference: Tensor = decode(centre + step) - decode(centre - step)
        return (difference / 2).square().flatten(1).mean(1)

    moved = in_chunks(move, steps).double()
    share = moved / moved.sum().clamp(min=1e-30)
    bright = (x[:, 0] > 0.1).flatten(1)
    called = names or [str(i + 1) for i in range(c.shape[1])]
    seen = {f"condition_{name}": c[:, i] for i, name in enumerate(called)}
    seen["brightness"] = (x[:, 0].flatten(1) * bright).sum(1) / bright.sum(1).clamp(min=1)
    seen["volume"] = bright.double().mean(1)
    seen |= {f"channel_{i + 1}": x[:, i].flatten(1).mean(1) for i in range(1, x.shape[1])}
    rows: list[dict[str, float | str]] = []
    for place in share.sort(descending=True, stable=True).indices.tolist():
        unit = int(chosen[place])
        row: dict[str, float | str] = {"unit": unit + 1}
        row |= {name: round(float(v[unit]), 4) for name, v in carried.items()}
        row["decoded_variance"] = round(float(share[place]), 4)
        row |= {name: round(_correlation(z[:, unit], v), 3) for name, v in seen.items()}
        rows.append(row)
    return rows


def traversal(
    decode: Callable[[Tensor], Tensor], z: Tensor, sd: Tensor, strongest: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """A row for each unit (from 0): its number from -2 to 2 deviations, the others at their mean.

    Args:
        decode: as for `units`.
        z: (n, L).
        sd: (L,).
        strongest: the units.
    """
    centre = z.mean(0)
    rows = []
    for unit in strongest:
        codes = centre.repeat(len(_STEPS), 1)
        codes[:, unit] += sd[unit] * torch.tensor(_STEPS, device=z.device)
        rows.append(list(decode(codes)[:, 0]))
    return sheet(rows)


def sheet(rows: Sequence[Sequence[Tensor]]) -> npt.NDArray[np.uint8]:
    """Rows of volumes (X, Y, Z) as one grey picture, three central slices each.

    All share one grey scale, black 0 and white 1, so that differences of brightness show. Planes
    lie as in the reports: axial, coronal, sagittal, the person's right on the left.
    """
    lines = [_beside([_planes(v) for v in row], axis=1) for row in rows]
    grey = _beside(lines, axis=0)
    return np.rint(255 * np.clip(grey, 0, 1)).astype(np.uint8)


def _planes(volume: Tensor) -> npt.NDArray[np.float32]:
    v = volume.float().cpu().numpy()
    x, y, z = (n // 2 for n in v.shape)
    side = max(v.shape)
    times = -(-_SMALLEST // side)
    squares = []
    for plane in (v[::-1, ::-1, z].T, v[::-1, y, ::-1].T, v[x, ::-1, ::-1].T):
        if min(plane.shape) == 1:  # of a single slice its own plane alone
            continue
        square = np.zeros((side, side), np.float32)
        top, left = ((side - n) // 2 for n in plane.shape)
        square[top : top + plane.shape[0], left : left + plane.shape[1]] = plane
        squares.append(square.repeat(times, 0).repeat(times, 1))
    return np.concatenate(squares, 1)


def _beside(parts: Sequence[npt.NDArray[np.float32]], axis: int) -> npt.NDArray[np.float32]:
    """Parts with a white line between them."""
    shape = list(parts[0].shape)
    shape[axis] = _GAP
    line = np.ones(shape, np.float32)
    woven = [x for part in parts for x in (line, part)][1:]
    return np.concatenate(woven, axis)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, and 0 where one of the two does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else 0.0
