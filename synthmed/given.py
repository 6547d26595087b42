"""Masks that a model is given to draw images for: label maps of `sample.masks`, on a run's grid.

They come from a folder of the user's, never from the training patients: what is released would
show whose anatomy it is. Files are known by their place in the order of their names, and so are
they named in messages, since a file that should not be there may be called after a patient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.config import Config
from synthmed.configfile import masks_folder
from synthmed.errors import InputError
from synthmed.formats import nifti
from synthmed.formats.nifti import Image
from synthmed.formats.refusal import Refused
from synthmed.stages.prepare import conform_labels
from synthmed.types import Affine, Array

LabelMap = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GivenMasks:
    """The label maps of a folder, read one at a time.

    Args:
        files: per set, in the order of file names: mask name to file.
        channels: the given channels, in the dataset's order.
        grid: (X, Y, Z) they are brought to.
        affine: (4, 4) of the grid.
    """

    files: Sequence[Mapping[str, Path]]
    channels: Sequence[ChannelInfo]
    grid: tuple[int, int, int]
    affine: Affine

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> Array:
        """(K, X, Y, Z), 0 or 1: set i, one channel a declared label.

        Raises:
            InputError: a file cannot be read, holds labels that are not declared, or the files of
                the set do not lie on one grid.
        """
        maps = self._maps(i)
        one_hot = [maps[c.mask or ""] == c.label_value for c in self.channels]
        return np.stack(one_hot).astype(np.float32)

    def check(self, dataset: Dataset) -> str:
        """Check every file, and that none is a mask of a real patient; returns a digest of all.

        A mask without any label is nobody's. Held-out patients count as well: their anatomy is
        no more to be released than that of those who were trained on.

        Raises:
            InputError: a file is not usable, or on the grid it equals a mask of the dataset.
        """
        owners = _owners(dataset)
        seen = hashlib.sha256()
        for i in range(len(self)):
            for name, labels in self._maps(i).items():
                mark = _mark(name, labels)
                seen.update(mark)
                if labels.any() and mark in owners:
                    raise InputError(
                        f"{self._place(i)} is the {name} mask of patient {owners[mark]}",
                        "Take the cohort's own masks out: their anatomy would be released.",
                    )
        return seen.hexdigest()

    def _maps(self, i: int) -> dict[str, LabelMap]:
        """Mask name to its label map on the grid."""
        images: dict[str, Image] = {}
        for name, file in self.files[i].items():
            try:
                images[name] = nifti.read(file)
            except Refused as reason:
                raise InputError(f"{self._place(i)}: {reason.explanation}") from None
            self._check_labels(i, name, images[name])
            thick = [n for n, side in zip(images[name].data.shape, self.grid, strict=True)
                     if side == 1 < n]  # fmt: skip
            if thick:
                raise InputError(
                    f"{self._place(i)} has {thick[0]} voxels along an axis of 1 in data.grid",
                    "Give single slices, as the model was trained on.",
                )
        first = next(iter(images.values()))
        for image in images.values():
            same = image.data.shape == first.data.shape
            if not same or not np.allclose(image.affine, first.affine, atol=0.01):
                raise InputError(f"{self._place(i)}: its files differ in shape or place")
        return {
            name: conform_labels(np.rint(image.data), image.affine, self.grid, self.affine)
            for name, image in images.items()
        }

    def _check_labels(self, i: int, name: str, image: Image) -> None:
        declared = sorted(c.label_value or 0 for c in self.channels if c.mask == name)
        found = np.unique(image.data)
        strange = [v for v in found if not np.isclose([0, *declared], v, atol=1e-3).any()]
        if strange:
            raise InputError(
                f"{self._place(i)} holds the value {strange[0]:g}; data.channels.{name}.labels "
                f"declares {', '.join(map(str, declared))}",
                "Give label maps with the values that the model was trained on.",
            )

    def _place(self, i: int) -> str:
        return f"sample.masks: mask {i + 1} of {len(self)}, in the order of file names,"


def given_masks(
    config: Config, channels: Sequence[ChannelInfo], grid: tuple[int, int, int], affine: Affine
) -> GivenMasks | None:
    """The masks of `sample.masks`; null where no channel is given.

    Args:
        config: the run's config.
        channels: all channels of the dataset.
        grid: (X, Y, Z) of the dataset.
        affine: (4, 4) of the grid.

    Raises:
        InputError: the folder is not there or holds no label map, or, where several channels are
            given, its folders do not hold the same names.
    """
    given = [c for c in channels if c.given]
    names = list(dict.fromkeys(c.mask or "" for c in given))
    folder = masks_folder(config)
    if not given or folder is None:
        return None
    remedy = "Set it to a folder of NIfTI label maps, or pass --masks FOLDER."
    found: dict[str, dict[str, Path]] = {}
    for name in names:
        place = folder if len(names) == 1 else folder / name
        if not place.is_dir():
            raise InputError(f"sample.masks {place}: no such folder", remedy)
        found[name] = _files(place)
        if not found[name]:
            raise InputError(f"sample.masks {place}: holds no .nii or .nii.gz file", remedy)
    every = sorted({file for files in found.values() for file in files})
    for name, files in found.items():
        if lacking := len(every) - len(files):
            raise InputError(
                f"sample.masks {folder / name}: {lacking} of {len(every)} masks have no file here",
                f"Use the same file names in each of {', '.join(names)}.",
            )
    sets = [{name: files[file] for name, files in found.items()} for file in every]
    return GivenMasks(sets, given, grid, affine)


def _files(folder: Path) -> dict[str, Path]:
    """NIfTI files at any depth, by their path below the folder; hidden ones are left out."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: path
        for name, path in found.items()
        if name.lower().endswith((".nii", ".nii.gz"))
        and not any(part.startswith(".") for part in name.split("/"))
    }


def _owners(dataset: Dataset) -> dict[bytes, str]:
    """Marks of every given mask of the dataset to the patient whose it is."""
    owners: dict[bytes, str] = {}
    names = dict.fromkeys(c.mask or "" for c in dataset.channels if c.given)
    for name in names:
        rows = [i for i, c in enumerate(dataset.channels) if c.given and c.mask == name]
        for scan, patient in enumerate(dataset.patients):
            labels = np.zeros(dataset.grid, np.uint8)
            for i in rows:
                labels[dataset.volumes[scan, i] > 0.5] = dataset.channels[i].label_value or 0
            owners[_mark(name, labels)] = str(patient)
    return owners


def _mark(name: str, labels: LabelMap) -> bytes:
    """A digest of one label map: equal for equal maps of one mask."""
    return hashlib.sha256(name.encode() + b"\0" + labels.tobytes()).digest()
