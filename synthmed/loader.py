"""Batches of patients from a dataset, each keyed by (step, patient)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.augment import apply_transforms, draw_intensity, draw_transform, is_geometric
from synthmed.backbones.generative import Batch, Draws, Phase, VolumeSpec
from synthmed.conditions import Conditions
from synthmed.config import Augment
from synthmed.keys import Key


class Loader:
    """Streams training patients from the memory map; reads no held-out patient.

    Args:
        dataset: the prepared cohort.
        conditions: how labels are encoded.
        batch_patients: patients a step; fewer where the cohort is smaller.
        augment: random changes of each scan.
    """

    def __init__(
        self, dataset: Dataset, conditions: Conditions, batch_patients: int, augment: Augment
    ) -> None:
        self.dataset = dataset
        self.conditions = conditions
        self.augment = augment
        self.patients = dataset.train_patients()
        self.batch_patients = min(batch_patients, len(self.patients))
        self.scans = {
            p: np.flatnonzero((dataset.patients == p) & ~dataset.holdout) for p in self.patients
        }
        self.encoded = np.stack([conditions.encode(x) for x in dataset.labels])
        self.spec = spec_of(dataset.channels, dataset.grid, conditions)

    def draw(self, phase: Phase, key: Key, step: int, device: str) -> tuple[Batch | None, Draws]:
        """One step's batch (None for a phase that reads no patients) and its randomness."""
        if phase.reads_patients:
            names = self.order(key, step)
            rows = [self._scan(key.fold(step, name), name) for name in names]
            batch = self._batch([r[0] for r in rows], [r[1] for r in rows], device)
        else:
            names = [str(i) for i in range(self.batch_patients)]
            batch = None
        draws = [phase.draw(key.fold(step, name, "draw").torch(), 1) for name in names]
        return batch, {
            k: torch.stack([d[k] for d in draws]).to(device, non_blocking=True) for k in draws[0]
        }

    def order(self, key: Key, step: int) -> list[str]:
        """The patients of a step: each epoch is a keyed shuffle, cut into whole batches."""
        per_epoch = len(self.patients) // self.batch_patients
        epoch, at = divmod(step, per_epoch)
        shuffled = key.fold("epoch", epoch).numpy().permutation(len(self.patients))
        chosen = shuffled[at * self.batch_patients : (at + 1) * self.batch_patients]
        return [self.patients[i] for i in chosen]

    def all_train(self, device: str) -> list[Batch]:
        """Every training scan once, unchanged, in a fixed order, one scan a row."""
        rows = np.flatnonzero(~self.dataset.holdout)
        return [
            self._batch(
                [torch.from_numpy(self.dataset.volumes[i].astype(np.float32)) for i in part],
                list(part),
                device,
            )
            for part in np.array_split(rows, max(1, len(rows) // 16))
        ]

    def description(self) -> dict[str, Any]:
        """What sampling has to know of the data beside the config: nothing of a patient."""
        return {
            "grid": list(self.dataset.grid),
            "affine": self.dataset.affine.tolist(),
            "channels": [asdict(c) for c in self.dataset.channels],
            "condition_width": self.conditions.width,
        }

    def _scan(self, key: Key, patient: str) -> tuple[torch.Tensor, int]:
        """One scan of a patient, augmented: (C, X, Y, Z), and its row."""
        rows = self.scans[patient]
        row = int(rows[key.fold("scan").integer() % len(rows)])
        x = torch.from_numpy(self.dataset.volumes[row].astype(np.float32))
        g = key.fold("augment").torch()
        if is_geometric(self.augment):
            change = draw_transform(self.augment, self.dataset.grid, self.dataset.spacing_mm, g)
            x = apply_transforms(x[None], change[None])[0]
        if self.augment.intensity:
            gain, power = draw_intensity(self.augment, g)
            image = torch.tensor([c.mask is None for c in self.dataset.channels])
            x[image] = x[image].clamp(min=0) ** power * gain
        return x, row

    def _batch(self, x: Sequence[torch.Tensor], rows: Sequence[int], device: str) -> Batch:
        all_channels = torch.stack(list(x))[:, None].to(device, non_blocking=True)
        return Batch(
            x=all_channels[:, :, : self.spec.channels],
            c=torch.from_numpy(self.encoded[list(rows)])[:, None].to(device),
            given=all_channels[:, :, self.spec.channels :],
            mask=torch.ones(len(rows), 1, device=device),
        )


def spec_of(
    channels: Sequence[ChannelInfo], grid: tuple[int, int, int], conditions: Conditions
) -> VolumeSpec:
    """What a model has to draw for these channels, and what it is told."""
    given = sum(c.given for c in channels)
    return VolumeSpec(len(channels) - given, grid, conditions.width, given)
