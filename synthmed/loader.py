"""Batches of patients from a dataset, each keyed by (step, patient)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, overload

import numpy as np
import torch

from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.augment import apply, augmented_width, draw_change, encode
from synthmed.backbones.generative import Batch, Draws, Phase, VolumeSpec
from synthmed.conditions import Conditions
from synthmed.config import Augment
from synthmed.keys import Key
from synthmed.types import Array
from synthmed.view import Views, fill

WATCHED = 32
"""Patients of either side that the watch on memorising and the examination look at."""

READ = 16
"""Volumes of a batch of `Loader.all_train`, but for somebody who has more."""

Side = Literal["train", "holdout"]


class Loader:
    """Streams training patients from the memory map.

    Held-out patients are read by `watched_batch("holdout", ...)` and `read` alone, which no
    training step calls: their batches only feed a warning, the private examination and the audit,
    and select nothing.

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
        self.asked = batch_patients
        self.scans = {
            p: np.flatnonzero((dataset.patients == p) & ~dataset.holdout) for p in self.patients
        }
        encoded = np.stack([conditions.encode(x) for x in dataset.labels])
        self.views, views = None, dataset.views
        if views is not None:
            train = ~dataset.holdout
            _, at, n = np.unique(dataset.patients[train], return_inverse=True, return_counts=True)
            self.views = Views.fit(views[train], encoded[train], dataset.grid, 1 / n[at])
        told = self.views.encode(views) if self.views is not None and views is not None else None
        self.encoded = unaugmented(encoded, told, augment)
        self.spec = spec_of(dataset.channels, dataset.grid, conditions, self.views, augment)
        self.images = torch.tensor([c.mask is None for c in dataset.channels])
        self._pool: ThreadPoolExecutor | None = None
        self._next: dict[str, tuple[tuple[bytes, int, str], Future[Host]]] = {}

    def draw(self, phase: Phase, key: Key, step: int, device: str) -> tuple[Batch | None, Draws]:
        """One step's batch (None for a phase that reads no patients) and its randomness."""
        wanted = (key.digest, step, device)
        ahead = self._next.pop(phase.name, None)
        if ahead is not None and ahead[0] == wanted:
            batch, draws = ahead[1].result()
        else:
            batch, draws = self._draw(phase, key, step, device)
        if self._pool is not None:
            coming = step + phase.every
            future = self._pool.submit(self._draw, phase, key, coming, device)
            self._next[phase.name] = ((key.digest, coming, device), future)
        if batch is not None:
            batch = Batch(*(t.to(device, non_blocking=True) for t in batch))
        return batch, {k: v.to(device, non_blocking=True) for k, v in draws.items()}

    def private_batch(
        self, phase: Phase, key: Key, names: Sequence[str], repeats: int, device: str
    ) -> tuple[Batch, Draws]:
        """All scans of these patients, each `repeats` times with changes and draws of its own.

        What a patient is shown with depends on its own key and scans alone: padding to the longest
        of the others comes after.
        """
        parts = [self._whole(phase, key.fold(name), name, repeats) for name in names]
        batch = _together([own for own, _ in parts], device)
        longest = batch.mask.shape[1]
        each = [{k: _padded(v[None], longest) for k, v in draws.items()} for _, draws in parts]
        return batch, {k: torch.cat([d[k] for d in each]).to(device) for k in each[0]}

    def _whole(self, phase: Phase, key: Key, name: str, repeats: int) -> tuple[Batch, Draws]:
        """One patient's scans in one row, and its draws."""
        turns = [(int(row), k) for k in range(repeats) for row in self.scans[name]]
        shown = [self._changed(row, key.fold("scan", row, k)) for row, k in turns]
        scans = self._batch([x for x, _ in shown], np.stack([c for _, c in shown]))
        return _of_one(scans), phase.draw(key.fold("draw").torch(), len(turns))

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Draw each phase's next batch in a thread while the last one is trained on.

        What is drawn depends on key and step alone, so the batches are the same bit for bit.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            self._pool = pool
            try:
                yield
            finally:
                self._pool = None
                for _, future in self._next.values():
                    future.cancel()
                self._next.clear()

    def _draw(self, phase: Phase, key: Key, step: int, device: str) -> Host:
        """`draw` in the machine's own memory, pinned where the device is another one."""
        if phase.reads_patients:
            names = self.order(key, step)
            scans = [self._scan(key.fold(step, name), name) for name in names]
            batch = self._batch([x for x, _ in scans], np.stack([c for _, c in scans]))
        else:
            # not clamped: how many people there are is theirs
            names = [str(i) for i in range(self.asked)]
            batch = None
        each = [phase.draw(key.fold(step, name, "draw").torch(), 1) for name in names]
        draws = {k: torch.stack([d[k] for d in each]) for k in each[0]}
        if device.startswith("cuda"):
            batch = None if batch is None else Batch(*(t.pin_memory() for t in batch))
            draws = {k: v.pin_memory() for k, v in draws.items()}
        return batch, draws

    def order(self, key: Key, step: int) -> list[str]:
        """The patients of a step: each epoch is a keyed shuffle, cut into whole batches."""
        per_epoch = len(self.patients) // self.batch_patients
        epoch, at = divmod(step, per_epoch)
        shuffled = key.fold("epoch", epoch).numpy().permutation(len(self.patients))
        chosen = shuffled[at * self.batch_patients : (at + 1) * self.batch_patients]
        return [self.patients[i] for i in chosen]

    def all_train(self, device: str, most: int | None = None) -> Sequence[Batch]:
        """Every training scan once, unchanged, in a fixed order, one patient a row.

        A batch is read when it is asked for, so that a cohort need not fit into memory.

        Args:
            device: where the batches shall be.
            most: the first scans of so many patients at most, evenly spread over all of them; None
                for all scans of all.
        """
        people = [self.scans[name].tolist() for name in self.patients]
        if most is not None:
            at = np.linspace(0, len(people) - 1, min(len(people), most)).round().astype(int)
            people = [people[i][:1] for i in at]
        return _Batches(self, _packed(people), device)

    def watched(self, side: Side) -> list[int]:
        """Rows of the first scans of up to `WATCHED` patients of a side, in a fixed order.

        Which patients they are depends on the cohort alone, so that looks at any step compare.
        """
        data = self.dataset
        patients = self.patients if side == "train" else data.holdout_patients()
        spread = np.linspace(0, len(patients) - 1, min(WATCHED, len(patients))).round().astype(int)
        return [int(np.flatnonzero(data.patients == patients[i])[0]) for i in spread]

    def watched_batch(self, side: Side, device: str, part: slice = slice(None)) -> Batch | None:
        """The scans of `watched`, or a part of them, unchanged; None where the side has none."""
        rows = self.watched(side)[part]
        return self.read(rows, device) if rows else None

    def description(self) -> dict[str, Any]:
        """What sampling has to know of the data beside the config: nothing of a patient."""
        return {
            "grid": list(self.dataset.grid),
            "affine": self.dataset.affine.tolist(),
            "channels": [asdict(c) for c in self.dataset.channels],
            "condition_width": self.spec.condition_width,
            "views": self.views.as_json() if self.views else None,
        }

    def _scan(self, key: Key, patient: str) -> tuple[torch.Tensor, Array]:
        """One scan of a patient, augmented: (C, X, Y, Z), and its encoded condition."""
        rows = self.scans[patient]
        return self._changed(int(rows[key.fold("scan").integer() % len(rows)]), key)

    def _changed(self, row: int, key: Key) -> tuple[torch.Tensor, Array]:
        """A scan, augmented, and its encoded condition."""
        change = draw_change(self.augment, key.fold("augment").torch())
        x = apply(change, self._voxels(row), self.dataset.spacing_mm, self.images)
        # a mask that is given is 0 or 1 when sampling, so interpolation must not soften it here
        x[self.spec.channels :] = (x[self.spec.channels :] > 0.5).float()
        told = encode(self.augment, change).numpy()
        c = self.encoded[row].copy()
        c[len(c) - len(told) :] = told
        return x, c

    def _voxels(self, row: int) -> torch.Tensor:
        x = torch.from_numpy(self.dataset.volumes[row].astype(np.float32))
        if self.views is None or self.dataset.views is None:
            return x
        return fill(x, self.dataset.views[row].tolist())

    def read(self, rows: Sequence[int], device: str) -> Batch:
        """These scans, unchanged, one a row."""
        batch = self._batch([self._voxels(i) for i in rows], self.encoded[list(rows)])
        return Batch(*(t.to(device) for t in batch))

    def read_people(self, people: Sequence[Sequence[int]], device: str) -> Batch:
        """The scans of each, unchanged, one patient a row."""
        return _together([_of_one(self.read(rows, "cpu")) for rows in people], device)

    def _batch(self, x: Sequence[torch.Tensor], c: Array) -> Batch:
        all_channels = torch.stack(list(x))[:, None]
        return Batch(
            x=all_channels[:, :, : self.spec.channels],
            c=torch.from_numpy(c)[:, None],
            given=all_channels[:, :, self.spec.channels :],
            mask=torch.ones(len(x), 1),
        )


Host = tuple[Batch | None, Draws]
People = list[list[int]]
"""Rows of the scans of each patient."""


def _packed(people: People) -> list[People]:
    """Patients in their order, put together while they fill at most `READ` places, padding too."""
    parts: list[People] = []
    for rows in people:
        longest = max(map(len, [rows, *(parts[-1] if parts else [])]))
        if parts and (len(parts[-1]) + 1) * longest <= READ:
            parts[-1].append(rows)
        else:
            parts.append([rows])
    return parts


def _of_one(scans: Batch) -> Batch:
    """Scans that are all of one patient, in one row."""
    return Batch(*(t.transpose(0, 1) for t in scans))


def _together(patients: Sequence[Batch], device: str) -> Batch:
    """A row each, padded to the longest."""
    longest = max(p.mask.shape[1] for p in patients)
    rows = [[_padded(t, longest) for t in p] for p in patients]
    return Batch(*(torch.cat(fields).to(device) for fields in zip(*rows, strict=True)))


def _padded(t: torch.Tensor, length: int) -> torch.Tensor:
    """(1, S, ...) to (1, length, ...), zeros behind."""
    missing = t.new_zeros(1, length - t.shape[1], *t.shape[2:])
    return torch.cat([t, missing], 1)


class _Batches(Sequence[Batch]):
    """Batches of patients that are read anew each time they are asked for."""

    def __init__(self, loader: Loader, parts: Sequence[People], device: str) -> None:
        self.loader, self.parts, self.device = loader, parts, device

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, at: int) -> Batch: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Batch]: ...
    def __getitem__(self, at: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(at, slice):
            return _Batches(self.loader, self.parts[at], self.device)
        return self.loader.read_people(self.parts[at], self.device)


def unaugmented(encoded: Array, views: Array | None, augment: Augment) -> Array:
    """Encoded conditions (n, D) of scans that nothing was done to, as the model takes them.

    Args:
        encoded: (n, .) labels.
        views: (n, 3) encoded sizes of view, where the model is told them.
        augment: what it is told of changes.
    """
    nothing = np.zeros((len(encoded), augmented_width(augment)), np.float32)
    parts = (encoded, views, nothing)
    return np.concatenate([p for p in parts if p is not None], axis=1, dtype=np.float32)


def spec_of(
    channels: Sequence[ChannelInfo],
    grid: tuple[int, int, int],
    conditions: Conditions,
    views: Views | None,
    augment: Augment,
) -> VolumeSpec:
    """What a model has to draw for these channels, and what it is told."""
    given = sum(c.given for c in channels)
    masks = sum(c.mask is not None and not c.given for c in channels)

    def draw_condition(generator: torch.Generator) -> torch.Tensor:
        c = conditions.draw_encoded(generator)
        parts = [c]
        if views is not None:
            parts.append(torch.from_numpy(views.encode([views.draw(generator, c)])[0]))
        return torch.cat([*parts, encode(augment, draw_change(augment, generator))])

    told = augmented_width(augment) + (0 if views is None else views.WIDTH)
    return VolumeSpec(
        channels=len(channels) - given,
        grid=grid,
        condition_width=conditions.width + told,
        given=given,
        draw_condition=draw_condition,
        masks=masks,
        told_width=told,
        label_widths=conditions.widths,
        number_names=(*conditions.number_names, *(f"told {i + 1}" for i in range(told))),
    )
