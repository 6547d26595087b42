"""How to split a step's patients so that training stays under `train.memory_gib`.

Peak memory grows by a constant for each patient that is worked on at once. Trials with pieces of
two and of four patients give that line, it gives the fewest pieces that fit, and a last trial of
those decides. Pieces cost next to nothing, so activations are recomputed only where no pieces fit
without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from synthmed.config import Config
from synthmed.errors import ResourceError
from synthmed.loader import WATCHED, Loader
from synthmed.measure import Measured, Request, held_bytes, measure

GIB = 2**30
CLOSING = 64
"""Patients that a trial has at least where there are as many: no fit or look that is bounded reads
more."""
RECOMPUTED = frozenset({"ddpm"})
"""Backbones with `Recomputable` blocks."""


class Fitting(NamedTuple):
    """How a step is taken so that it fits.

    Args:
        pieces: into how many a step's patients are split.
        recompute: whether blocks compute their inside again on the way back (`Recomputable`).
    """

    pieces: int = 1
    recompute: bool = False


def fitting(
    config: Config,
    loader: Loader,
    device: str,
    train_scans: int | None = None,
    n_holdout: int | None = None,
) -> Fitting:
    """How to take a step: all at once where nothing bounds the memory.

    A piece is never one patient on a CPU, where a Conv3d of batch 1 takes a slow path. Scans
    mapped from the disk are not counted: the system takes their pages back when it needs them.

    Args:
        config: bounds it.
        loader: of the cohort, or of one as large as what is watched.
        device: where to train.
        train_scans: of the cohort; by default the loader's.
        n_holdout: patients held out; by default the loader's.

    Raises:
        ResourceError: not even the smallest pieces fit, or what is fitted to all scans at the end.
    """
    if config.train.memory_gib is None:
        return Fitting()
    data, asked = loader.dataset, loader.asked
    # what is promised to patients is promised about how many they are, too
    n = asked if config.privacy else loader.batch_patients
    scan_bytes = 4 * math.prod(data.volumes.shape[1:])
    if train_scans is None:
        train_scans = int((~data.holdout).sum())
    held_out = len(data.holdout_patients()) if n_holdout is None else n_holdout
    here = held_bytes(device)
    limit = config.train.memory_gib * GIB

    def needs(size: int, recompute: bool) -> int:
        # two pieces show what there is to gather; the rest of the batch only lies there, twice:
        # the next one is drawn while this one is trained on
        patients = min(n, 2 * size)
        # a phase that reads nobody splits what is asked for into as many pieces
        drawn = max(patients, min(asked, 2 * math.ceil(asked / math.ceil(n / size))))
        request = Request(
            # what ends a training looks at many at once, whatever the pieces
            n_patients=max(patients, min(CLOSING, len(loader.patients))),
            n_holdout=min(held_out, WATCHED),
            batch_patients=drawn,
            pieces=1 if size == n else 2,
            recompute=recompute,
            steps=3,
            samples=False,
            device=device,
            threads=torch.get_num_threads(),
            n_read=patients,
        )
        measured = measure(config, request)
        more = 0 if device.startswith("cuda") else max(0, here - measured.built_bytes)
        left = asked - drawn if measured.reads_nobody else n - patients
        _require_fit(measured, train_scans, more, limit)
        return measured.peak_bytes + more + 2 * left * (scan_bytes + measured.draw_bytes)

    smallest = 1 if device.startswith("cuda") else 2
    try:
        return Fitting(fewest(n, smallest, limit, lambda size: needs(size, False)))
    except _TooLarge:
        # a private gradient, one a patient, is a pass of its own
        if config.privacy is not None or config.backbone.name not in RECOMPUTED:
            raise
    return Fitting(fewest(n, smallest, limit, lambda size: needs(size, True)), recompute=True)


class _TooLarge(ResourceError):
    """Not even the smallest pieces of a step fit."""


def _require_fit(measured: Measured, train_scans: int, more: int, limit: float) -> None:
    """Refuse a fit to all scans at once, after the steps, that no pieces make smaller.

    Raises:
        ResourceError: it is larger than the limit.
    """
    # two moments and an average of each number that was trained are still there
    fit = measured.built_bytes + 12 * measured.n_trained + measured.finish_bytes * train_scans
    if measured.finish_bytes and fit + more > limit:
        raise ResourceError(
            f"train.memory_gib {limit / GIB:.3g}: what is fitted to all {train_scans} training "
            f"scans takes {(fit + more) / GIB:.2g} GiB",
            "Raise train.memory_gib, or use a smaller grid, another backbone, or of ddpm another "
            "backbone.prediction.",
        )


def fewest(n: int, smallest: int, limit: float, needs: Callable[[int], int]) -> int:
    """The fewest pieces of a batch of `n` whose largest fits.

    Args:
        n: patients of a batch.
        smallest: patients that a piece must hold at least.
        limit: bytes.
        needs: bytes that training with pieces of so many patients takes, measured.

    Raises:
        ResourceError: none fits.
    """
    counts = range(1, max(1, n // smallest) + 1)
    measured: dict[int, int] = {}

    def known(size: int) -> int:
        if size not in measured:
            measured[size] = needs(size)
        return measured[size]

    low, high = math.ceil(n / counts[-1]), min(n, 2 * math.ceil(n / counts[-1]))
    slope = (known(high) - known(low)) / (high - low) if high > low else 0.0
    for count in counts:
        size = math.ceil(n / count)
        if known(low) + slope * (size - low) <= limit and known(size) <= limit:
            return count
    raise _TooLarge(
        f"train.memory_gib {limit / GIB:.3g}: training takes {known(low) / GIB:.2g} GiB even with "
        f"{low} patients at once",
        "Raise train.memory_gib, or use a smaller model or grid.",
    )
