"""Candidates to scans: read, checked and written, by one process or several."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synthmed import processes
from synthmed.artifacts import Scan
from synthmed.config import Channel
from synthmed.deid import deface, pixels
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import ResourceError
from synthmed.formats import candidates, contrasts, nifti
from synthmed.formats.candidates import Candidate, FileRefused
from synthmed.formats.grid import corners_apart
from synthmed.formats.listing import Listing
from synthmed.formats.nifti import Image
from synthmed.formats.quarantine import Quarantine
from synthmed.formats.refusal import Refused, quiet
from synthmed.formats.stack import SAME_MM

MIN_SIDE = 4
"""Voxels on a side of a usable volume; a short-axis stack of the heart has as few as six slices."""
INTEGER_TOLERANCE = 1e-3
"""How far a mask's values may be from whole numbers (scaled storage rounds)."""
MANY_BYTES = 1 << 28
"""From so many bytes or files on, scans are read by several processes."""

Progress = Callable[[int, int], None]
"""Called with (done, total) after each scan."""


def how_many(listing: Listing, found: Sequence[Candidate]) -> int:
    """How many processes are worth their start."""
    files = [path for candidate in found for path in candidate.files]
    n_bytes = sum(listing.sizes[path] for path in files)
    much = len(files) >= candidates.MANY_FILES or n_bytes >= MANY_BYTES
    return processes.how_many() if much else 1


@dataclass
class Reading:
    """Candidates to scans: read, check, write; duplicates are taken out at the end.

    Args:
        reader: of one scan.
        pseudonyms: of people and scans.
        quarantine: where refused files are entered.
        target: the folder of the catalogue.
        allow_copies: keep scans with the same voxels.
        private: whether patients are promised something: one person's scans then remove nobody
            else's.
        n_processes: that read.
        undeclared: name of a mask to voxels with another value than its labels', over all scans.
        removed: name of a mask to voxels that were taken away with faces, over all scans.
    """

    reader: Reader
    pseudonyms: Pseudonyms
    quarantine: Quarantine
    target: Path
    allow_copies: bool
    private: bool
    n_processes: int
    undeclared: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)

    def scans(self, found: Sequence[Candidate], progress: Progress | None) -> list[Scan]:
        """The usable ones, sorted by name."""
        kept: dict[str, tuple[Candidate, Scan]] = {}
        same: dict[str, list[str]] = defaultdict(list)
        (self.target / "volumes").mkdir()
        if self.reader.faces:
            (self.target / "faces").mkdir()
        named = sorted(self._named(found), key=lambda s: s.name)
        results = processes.spread(self.reader, named, self.n_processes, candidates.IMPORTS)
        for done, (scan, result) in enumerate(zip(named, results, strict=True), 1):
            if isinstance(result, _Read):
                kept[scan.name] = scan.candidate, result.record
                same[result.content].append(scan.name)
                self.undeclared += result.undeclared
                self.removed += result.removed
            elif isinstance(result, FileRefused):
                code = result.reason.code
                self.quarantine.add(result.path, result.reason, scan.patient)
                self._refuse(scan, Refused(code, "Said of another file of its scan."))
            else:
                self._refuse(
                    scan, result if isinstance(result, Refused) else Refused("reader_died")
                )
            if progress:
                progress(done, len(found))
        for names in same.values():
            self._without_copies(names, kept)
        return [record for _, record in kept.values()]

    def _named(self, found: Sequence[Candidate]) -> list[_Named]:
        """Candidates with pseudonyms, sessions counted by visit and series by order."""
        people: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in found:
            people[self.pseudonyms.patient(candidate.person)].append(candidate)
        named = []
        for patient, own in people.items():
            ordered = sorted(own, key=lambda c: (_natural(*c.visit), _natural(c.order)))
            visits = itertools.groupby(ordered, key=lambda c: c.visit)
            for session, (_, visit) in enumerate(visits, 1):
                for series, candidate in enumerate(visit, 1):
                    name = self.pseudonyms.scan(patient, session, series)
                    named.append(_Named(name, patient, session, candidate))
        return named

    def _refuse(self, scan: _Named, reason: Refused) -> None:
        """Enter every file of a scan."""
        volume = scan.candidate.volume
        said = f"{reason.detail} Said of its volume {volume}." if volume else reason.detail
        for path in scan.candidate.files:
            self.quarantine.add(path, Refused(reason.code, said.strip()), scan.patient)

    def _without_copies(
        self, names: Sequence[str], kept: dict[str, tuple[Candidate, Scan]]
    ) -> None:
        """Of scans with the same voxels keep one person's first; of several people's, none.

        None either of a person of whom one has another label than another: which is right is
        unknown. The first of those that have most labels.
        """
        if self.allow_copies:
            return
        people: dict[str, list[str]] = defaultdict(list)
        for name in names:
            people[kept[name][1].patient].append(name)
        if len(people) > 1 and not self.private:
            detail = "They are said to be of different patients, so whose they are is unknown."
            self._remove(names, kept, Refused("duplicate_scan", detail))
            return
        for own in people.values():
            labels = {item for name in own for item in kept[name][1].labels.items()}
            if len(labels) > len({condition for condition, _ in labels}):
                detail = "They are of scans with exactly the same voxels."
                self._remove(own, kept, Refused("label_ambiguous", detail))
            elif not self.private:
                best = max(own, key=lambda name: len(kept[name][1].labels))
                detail = "It is of the same patient, of whom another one is kept."
                rest = [name for name in own if name != best]
                self._remove(rest, kept, Refused("duplicate_scan", detail))

    def _remove(
        self, names: Sequence[str], kept: dict[str, tuple[Candidate, Scan]], reason: Refused
    ) -> None:
        """Take scans out that were written already."""
        for name in names:
            candidate, record = kept.pop(name)
            (self.target / "faces" / f"{name}.png").unlink(missing_ok=True)
            for file in record.channels.values():
                (self.target / "volumes" / file).unlink()
            for path in candidate.files:
                self.quarantine.add(path, reason, record.patient)


@dataclass(frozen=True)
class _Named:
    """A candidate under its pseudonyms."""

    name: str
    patient: str
    session: int
    candidate: Candidate


@dataclass(frozen=True)
class _Read:
    """A scan that was written: its record, a digest of its first image, and what was left out.

    Args:
        undeclared: name of a mask to voxels with another value than its labels'.
        removed: name of a mask to voxels that were taken away with the face.
    """

    record: Scan
    content: str
    undeclared: Counter[str]
    removed: Counter[str]


@dataclass(frozen=True)
class Reader:
    """Reads, checks and writes one scan, in whichever process.

    `flat` is the axis along which scans are single slices; None for volumes.
    """

    channels: Mapping[str, Channel]
    target: Path
    use_split: bool
    text: str
    faces: bool
    dicom: bool
    flat: int | None

    def __call__(self, scan: _Named) -> _Read | FileRefused | Refused:
        """The scan as it is kept, or why it is not."""
        with quiet():
            try:
                return self._scan(scan)
            except (FileRefused, Refused) as reason:
                return reason
            except MemoryError:
                return Refused("oversized", "The memory at hand is too small.")

    def _scan(self, scan: _Named) -> _Read:
        candidate = scan.candidate
        labels = candidate.labels
        if isinstance(labels, Refused) and labels.code == "not_in_table":
            raise labels
        images = dict(candidate.read())
        if isinstance(labels, Refused):
            raise labels
        if self.dicom:
            # text is searched for in slices as they were stored, so before they are moved
            images, text_masked = self._without_text(images, candidate.drawn)
            images = contrasts.together(images)
            _check_together(images, self.flat)
        else:
            _check_together(images, self.flat)
            images, text_masked = self._without_text(images, candidate.drawn)
        undeclared: Counter[str] = Counter()
        for name, image in images.items():
            if values := self._mask_values(name):
                images[name], undeclared[name] = _mask(image, values)
            elif image.data.min() == image.data.max():
                raise Refused("constant")
        cut = None
        if self.faces:
            cut = deface.remove(images, [name for name in images if self._mask_values(name)])
            images = cut.images
        first = next(image for name, image in images.items() if not self._mask_values(name))
        files = {name: f"{scan.name}_{name}.nii.gz" for name in images}
        with _disk():
            for name, image in images.items():
                nifti.write(self.target / "volumes" / files[name], image.data, image.affine)
            if cut:
                (self.target / "faces" / f"{scan.name}.png").write_bytes(cut.picture)
        x, y, z = first.data.shape
        record = Scan(
            scan=scan.name,
            patient=scan.patient,
            session=scan.session,
            channels=files,
            shape=(x, y, z),
            spacing_mm=first.spacing_mm,
            orientation=first.orientation,
            scanner=candidate.scanner,
            labels=labels,
            split=candidate.split if self.use_split else None,
            volume=candidate.volume,
            sequence=candidate.sequence,
            text_masked=text_masked,
            brain_ml=cut.brain_ml if cut else None,
            removed_share=cut.removed_share if cut else None,
        )
        removed = cut.n_mask_voxels if cut else Counter[str]()
        return _Read(record, _content(first.data), undeclared, removed)

    def _without_text(
        self, images: Mapping[str, Image], drawn: Collection[str]
    ) -> tuple[dict[str, Image], bool]:
        """What `data.text` makes of images, and whether something was painted over.

        Those that are `drawn` into, as their headers say, have to hold something to paint over.
        """
        out, any_text = dict(images), False
        for name, image in images.items():
            if self._mask_values(name) or self.text == "keep":
                continue
            if self.text == "mask":
                out[name], found = pixels.painted_volume(image, self.dicom)
                if name in drawn and not found:
                    raise Refused("burned_in", "It says so, and the search does not find it.")
                any_text |= found
            elif pixels.found_in_volume(image, self.dicom):
                raise Refused("burned_in")
        return out, any_text

    def _mask_values(self, name: str) -> set[int]:
        """The declared labels of a channel that is a mask, none of an image."""
        channel = self.channels.get(name)
        return set(channel.labels.values()) if channel and channel.labels else set()


@contextmanager
def _disk() -> Iterator[None]:
    """Say what to do where something cannot be written."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"ingest: a volume cannot be written ({error.strerror})",
            "Free some space, or name another run folder.",
        ) from None


def _check_together(images: Mapping[str, Image], flat: int | None) -> None:
    """Check size, and that the channels lie on one grid."""
    first, *others = images.values()
    sides = list(first.data.shape)
    if flat is not None and sides.pop(flat) != 1:
        raise Refused("not_a_slice")
    if min(sides) < MIN_SIDE:
        asked = " For single slices data.grid has a side of 1." if min(sides) == 1 else ""
        raise Refused("too_small", f"The least is {MIN_SIDE}.{asked}")
    for other in others:
        if other.data.shape != first.data.shape:
            raise Refused("channels_disagree", "Their shapes differ.")
        apart = corners_apart(first.data.shape, other.affine, first.affine)
        if apart > SAME_MM:
            raise Refused("channels_disagree", "They lie in different places.")


def _mask(image: Image, values: set[int]) -> tuple[Image, int]:
    """A mask with its declared labels alone, and how many voxels had others."""
    whole = np.rint(image.data)
    if np.abs(image.data - whole).max() > INTEGER_TOLERANCE:
        raise Refused("mask_not_integers")
    declared = np.isin(whole, sorted(values))
    labels = np.where(declared, whole, 0).astype(np.uint8)
    return replace(image, data=labels), int(((whole != 0) & ~declared).sum())


def _content(data: npt.NDArray[Any]) -> str:
    """Digest of the voxels: equal for equal volumes, since equal values are stored alike."""
    head = f"{data.dtype.str} {data.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(data).tobytes()).hexdigest()


def _natural(*texts: str) -> list[Any]:
    """A sort key that counts: ses-2 before ses-10."""
    parts = (re.split(r"(\d+)", text) for text in texts)
    return [[int(p) if p.isdecimal() else p for p in text] for text in parts]
