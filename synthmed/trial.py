"""A few steps of a config's training and a few samples, on noise: the process of a trial.

It reads what to try from standard input and prints what that took; measure.py starts it.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthmed.artifacts import Dataset
from synthmed.backbones.generative import Phase, named_parameters
from synthmed.conditions import Conditions
from synthmed.config import Config
from synthmed.errors import ResourceError, SynthmedError
from synthmed.given import GivenMasks
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.measure import Measured, Request, held_bytes, peak_bytes
from synthmed.memory import Fitting
from synthmed.stages import train
from synthmed.stages.prepare import channels_of, grid_affine
from synthmed.stages.sample import Sampler
from synthmed.trainable import merge, n_trained
from synthmed.types import Array

HELD = 1 << 26
"""Bytes of noise that a trial may hold."""
PATIENCE = 30.0
"""Seconds of a batch of samples above which a second one is not waited for."""


def noise(config: Config, n_train: int, n_holdout: int = 0) -> Dataset:
    """Patients of pure noise on the config's grid: a step costs the same on them.

    Many large ones are one noise, a voxel further for each: a run maps its scans from the disk,
    where they are no memory.
    """
    n = n_train + n_holdout
    conditions = Conditions(config.data.conditions)
    channels = channels_of(config.data)
    key = Key.root(config.seed).fold("noise")
    shape = (len(channels), *config.data.grid)
    voxels, apart = math.prod(shape), 2 * n * math.prod(shape) <= HELD
    line = key.numpy().random(voxels * n if apart else voxels + n, np.float32).astype(np.float16)
    further = line.itemsize * (voxels if apart else 1)
    strides = (further, *line[:voxels].reshape(shape).strides)
    return Dataset(
        volumes=np.lib.stride_tricks.as_strided(line, (n, *shape), strides, writeable=False),
        patients=np.array([f"noise{i:06d}" for i in range(n)]),
        labels=[conditions.draw(key.fold(i)) for i in range(n)],
        holdout=np.arange(n) >= n_train,
        channels=channels,
        affine=grid_affine(config.data.grid, config.data.spacing_mm or (1.0, 1.0, 1.0)),
    )


def noise_loader(config: Config, n_train: int, batch_patients: int, n_holdout: int = 0) -> Loader:
    """Batches of patients of noise."""
    conditions = Conditions(config.data.conditions)
    data = noise(config, n_train, n_holdout)
    return Loader(data, conditions, batch_patients, config.train.augment)


class _Blank(GivenMasks):
    """A mask without any label, for the samples of a model that is given masks."""

    def __len__(self) -> int:
        return 1

    def read(self, i: int) -> Array:
        return np.zeros((len(self.channels), *self.grid), np.float32)


def perform(config: Config, request: Request) -> Measured:
    """The trial itself, in this process."""
    device, fitting = request.device, Fitting(request.pieces, request.recompute)
    loader = noise_loader(config, request.n_patients, request.batch_patients, request.n_holdout)
    if request.n_read is not None:
        loader.batch_patients = request.n_read
    key = Key.root(config.seed).fold("trial")
    started = time.monotonic()
    model = train.build(config, loader, key, device)
    train.restricted(model, config, key)
    build_seconds = time.monotonic() - started
    built = held_bytes(device)
    amp = train.precision(config, device)
    seconds = []
    finishing = examining = 0.0
    rounds = model.rounds()
    with train.arithmetic(device, amp), loader.ahead():
        for i, current in enumerate(rounds):
            seconds.append(
                train.round_seconds(config, model, i, loader, key, device, fitting, request.steps)
            )
            if request.n_holdout and current.finish is not None:
                started = time.monotonic()
                current.finish(loader.all_train(device, current.finish_scans))
                read = min(request.n_patients, current.finish_scans or request.n_patients)
                finishing += (time.monotonic() - started) / read
    if request.n_holdout:
        started = time.monotonic()
        train.examine(model, loader, device)
        examining = time.monotonic() - started
    steps = tuple(train.steps_within(config, model, seconds))
    trained = n_trained(model)
    merge(model)
    n_parameters = sum(p.numel() for p in named_parameters(model).values())
    times = [0.0, 0.0]
    if request.samples:
        with tempfile.TemporaryDirectory(prefix="synthmed-trial-") as folder:
            place = Path(folder)
            train.write_model(place, config, model, loader, None)
            del model
            times = _sampled(config, loader, place, device)
    return Measured(
        n_parameters=n_parameters,
        n_trained=trained,
        build_seconds=build_seconds,
        seconds_per_step=tuple(seconds),
        steps=steps,
        finish_seconds=finishing,
        finish_scans=_most(r.finish_scans for r in rounds if r.finish is not None),
        finish_bytes=4 * max(r.finish_floats for r in rounds),
        draw_bytes=max(sum(_drawn_bytes(p) for p in r.phases) for r in rounds),
        reads_nobody=any(not p.reads_patients for r in rounds for p in r.phases),
        examine_seconds=examining,
        first_batch_seconds=times[0],
        batch_seconds=times[1],
        built_bytes=built,
        peak_bytes=peak_bytes(device),
    )


def _most(counts: Iterable[int | None]) -> int | None:
    """The largest; None, which stands for all, if one of them is."""
    found = list(counts)
    return None if None in found or not found else max(n for n in found if n is not None)


def _drawn_bytes(phase: Phase) -> int:
    """Bytes of what a phase draws for one scan."""
    return sum(t.nbytes for t in phase.draw(torch.Generator(), 1).values())


def _sampled(config: Config, loader: Loader, place: Path, device: str) -> list[float]:
    """Seconds of the sampler with its first batch, and of a second batch."""
    data, times = loader.dataset, []
    given = [c for c in data.channels if c.given]
    masks = _Blank([], given, data.grid, data.affine) if given else None
    started = time.monotonic()
    sampler = Sampler(config, place, device, lambda k: data.labels[0], masks)
    for number in range(2):
        indices = range(number * sampler.batch, (number + 1) * sampler.batch)
        sampler.write(indices, place, lambda n: None)
        times.append(time.monotonic() - started)
        if times[-1] > PATIENCE:
            break
        started = time.monotonic()
    return [times[0], times[-1]]


def main() -> None:
    """Read a trial from standard input, print what it took."""
    import synthmed.pipeline  # noqa: F401  (a run has loaded all of it)

    sent: dict[str, Any] = json.load(sys.stdin)
    request = Request(**sent["request"])
    torch.set_num_threads(request.threads)
    try:
        answer = asdict(perform(Config.model_validate(sent["config"]), request))
    except torch.OutOfMemoryError:
        answer = {"code": ResourceError.exit_code, "error": "memory: the device has too little"}
    except SynthmedError as error:
        answer = {"code": error.exit_code, "error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
