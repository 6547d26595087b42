"""DICOM files sorted into series: headers alone, bounded, and every odd one refused by name.

Source: PS3.3 C.7.3.1 (series), C.7.6.2 (image plane), A.4 (MR Image); PS3.10 section 7 (files).
"""

from __future__ import annotations

import io
import math
import posixpath
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from synthmed.formats.refusal import Refused

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
_ENHANCED = {
    "1.2.840.10008.5.1.4.1.1.4.1": "Enhanced MR Image.",
    "1.2.840.10008.5.1.4.1.1.4.3": "Enhanced MR Color Image.",
    "1.2.840.10008.5.1.4.1.1.4.4": "Legacy Converted Enhanced MR Image.",
}
MAX_FILE_BYTES = 1 << 30
"""Bytes of a DICOM file."""
MAX_INFLATED_BYTES = 1 << 26
"""Bytes of a deflated data set, inflated."""

_IMAGES_IN_MOSAIC = 0x0019100A
_TAGS: list[Any] = [
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType",
    "Manufacturer", "MagneticFieldStrength", "PatientID", "PatientName", "PatientBirthDate",
    "PatientAge", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
    "SeriesInstanceUID", "SeriesNumber", "ImageOrientationPatient", "ImagePositionPatient",
    "PixelSpacing", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames",
    "RescaleSlope", "RescaleIntercept", _IMAGES_IN_MOSAIC,
]  # fmt: skip

_MANUFACTURERS = ("SIEMENS", "GE", "PHILIPS", "CANON", "TOSHIBA", "HITACHI", "FUJIFILM",
                  "HYPERFINE", "UNITED IMAGING", "ESAOTE", "BRUKER")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slice:
    """What is kept of one file's header while its series is put together.

    Args:
        path: relative to the source.
        who: PatientID, and with it name and birth date: compared within a series, never stored.
        study: date and time, or the UID where they are missing: what tells sessions apart and
            orders them, never stored.
        number: SeriesNumber, None where it is missing.
        orientation: ImageOrientationPatient, six cosines (LPS).
        position: ImagePositionPatient in millimetres (LPS).
        spacing: PixelSpacing in millimetres: between rows, between columns.
        pixels: rows, columns, bits allocated, bits stored, high bit, pixel representation.
        rescale: slope and intercept.
        scanner: allow-listed technical fields.
        age: in years, and `sex` as the header says; None where missing.
    """

    path: str
    uid: str
    who: tuple[str, str, str]
    study: tuple[str, str]
    series: str
    number: int | None
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    spacing: tuple[float, ...]
    pixels: tuple[int, int, int, int, int, int]
    rescale: tuple[float, float]
    scanner: tuple[tuple[str, str | float], ...]
    age: float | None
    sex: str | None


@dataclass(frozen=True)
class Series:
    """The slices of one series, sorted by path.

    Args:
        regrouped: its files had a SeriesInstanceUID each and were brought together by patient,
            study, series number, orientation and matrix.
    """

    slices: tuple[Slice, ...]
    regrouped: bool = False


class _Clamped:
    """A file that never allocates more than is left in it, whatever length a header claims."""

    def __init__(self, handle: io.BufferedReader, size: int) -> None:
        self._handle, self._size = handle, size
        self.seek, self.tell = handle.seek, handle.tell

    def read(self, n: int = -1) -> bytes:
        left = max(self._size - self._handle.tell(), 0)
        return self._handle.read(left if n is None or n < 0 else min(n, left))


def header(path: Path, relative: str) -> Slice:
    """Read the header of one file of a classic MR series.

    Args:
        path: the file.
        relative: how it is known to the caller.

    Raises:
        Refused: it is no classic MR image, or its header cannot be used.
    """
    data = dataset(path, _TAGS, stop_before_pixels=True)
    try:
        return _slice(data, relative)
    except Refused:
        raise
    except Exception:  # pydicom converts values on access, and a damaged one raises anything
        raise Refused("header_unreadable", "One of its values is malformed.") from None


def dataset(path: Path, tags: Sequence[Any], stop_before_pixels: bool) -> FileDataset:
    """Parse a file, reading no more of it than there is and inflating no more than allowed.

    Raises:
        Refused: unreadable, oversized or damaged.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise Refused("oversized", f"The limit is {MAX_FILE_BYTES >> 20} MiB a file.")
        if size == 0:
            raise Refused("truncated", "The file is empty.")
        with open(path, "rb") as handle:
            _check_deflated(handle)
            handle.seek(0)
            stream: Any = _Clamped(handle, size)
            return pydicom.dcmread(
                stream,
                specific_tags=list(tags),
                stop_before_pixels=stop_before_pixels,
                force=True,
            )
    except Refused:
        raise
    except OSError:
        raise Refused("unreadable") from None
    except Exception:  # the parser meets hostile bytes: whatever it raises, the file is damaged
        raise Refused("header_unreadable") from None


def series(slices: Iterable[Slice]) -> list[Series]:
    """Group slices by SeriesInstanceUID, or where every file has its own, by what they share.

    A series that was exported into several folders is one series in each. The order is that of
    the first path in each.
    """
    by_uid: dict[str, list[Slice]] = defaultdict(list)
    for s in slices:
        by_uid[s.series or f"none {s.path}"].append(s)
    shared: dict[Any, list[Slice]] = defaultdict(list)
    for group in by_uid.values():
        s = group[0]
        if len(group) == 1 and s.number is not None:
            turn = tuple(round(v, 3) + 0.0 for v in s.orientation)
            shared[s.who, s.study, s.number, turn, s.pixels[:2]].append(s)
    moved = {s.path for group in shared.values() if len(group) > 1 for s in group}
    found = [
        Series(_sorted(part))
        for group in by_uid.values()
        if group[0].path not in moved
        for part in _exports(group)
    ]
    found += [Series(_sorted(g), regrouped=True) for g in shared.values() if len(g) > 1]
    return sorted(found, key=lambda g: g.slices[0].path)


def _exports(group: list[Slice]) -> list[list[Slice]]:
    """A series whose images occur again in another folder, taken apart by folder."""
    if len({s.uid for s in group}) == len(group) or len({s.who for s in group}) > 1:
        return [group]
    by_folder: dict[str, list[Slice]] = defaultdict(list)
    for s in group:
        by_folder[posixpath.dirname(s.path)].append(s)
    return list(by_folder.values())


def patient(group: Series) -> str:
    """The PatientID of a series.

    Raises:
        Refused: there is none, or there are two people.
    """
    people = {s.who for s in group.slices}
    if len(people) > 1:
        raise Refused("two_patients")
    identity = next(iter(people))[0]
    if not identity:
        raise Refused("patient_missing", "Its PatientID is empty.")
    return identity


def _sorted(group: list[Slice]) -> tuple[Slice, ...]:
    return tuple(sorted(group, key=lambda s: s.path))


def _check_deflated(handle: io.BufferedReader) -> None:
    """Refuse a deflated data set that inflates beyond the limit (pydicom inflates it whole)."""
    head = handle.read(132)
    if head[128:] != b"DICM":
        return
    meta = pydicom.filereader._read_file_meta_info(handle)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(handle.read(), MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise Refused("oversized", f"The limit is {MAX_INFLATED_BYTES >> 20} MiB inflated.")


def _slice(data: FileDataset, relative: str) -> Slice:
    """The header's values, checked one file at a time."""
    _check_kind(data)
    if "Rows" not in data or "Columns" not in data:
        raise Refused("no_pixels")
    if int(data.get("SamplesPerPixel", 1)) != 1 or "PALETTE" in _text(
        data, "PhotometricInterpretation"
    ):
        raise Refused("rgb")
    if _text(data, "PhotometricInterpretation") != "MONOCHROME2":
        raise Refused("photometric_unsupported")
    if int(data.get("NumberOfFrames") or 1) != 1:
        raise Refused("enhanced_unsupported", "A multi-frame file of another kind.")
    spacing = _numbers(data, "PixelSpacing", 2)
    if not spacing or min(spacing) <= 0:
        raise Refused("no_pixel_spacing")
    orientation = _numbers(data, "ImageOrientationPatient", 6)
    position = _numbers(data, "ImagePositionPatient", 3)
    if not orientation or not position:
        raise Refused("geometry_invalid", "It has no position or orientation.")
    number = data.get("SeriesNumber")
    return Slice(
        path=relative,
        uid=_text(data, "SOPInstanceUID"),
        who=(_text(data, "PatientID"), _text(data, "PatientName"), _text(data, "PatientBirthDate")),
        study=_study(data),
        series=_text(data, "SeriesInstanceUID"),
        number=None if number is None else int(number),
        orientation=orientation,
        position=position,
        spacing=spacing,
        pixels=_pixels(data),
        rescale=_rescale(data),
        scanner=_scanner(data),
        age=_age(_text(data, "PatientAge")),
        sex=_text(data, "PatientSex") or None,
    )


def _check_kind(data: FileDataset) -> None:
    """Let only classic MR images pass, and no localizer or mosaic."""
    if len(data) == 0:
        raise Refused("header_unreadable")
    kind = _text(data, "SOPClassUID")
    if kind in _ENHANCED:
        raise Refused("enhanced_unsupported", _ENHANCED[kind])
    if kind != MR_IMAGE:
        raise Refused("not_mr_image")
    types = {str(t).upper().strip() for t in data.get("ImageType") or ()}
    if "LOCALIZER" in types:
        raise Refused("localizer")
    if "MOSAIC" in types or _IMAGES_IN_MOSAIC in data:
        raise Refused("mosaic_unsupported")


def _pixels(data: FileDataset) -> tuple[int, int, int, int, int, int]:
    """Matrix and bit layout, of a kind that can be decoded (PS3.5 section 8.1.1)."""
    rows, columns = int(data.Rows), int(data.Columns)
    allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
    high, signed = int(data.get("HighBit", stored - 1)), int(data.get("PixelRepresentation", 0))
    if not (1 <= rows <= 4096 and 1 <= columns <= 4096):
        raise Refused("oversized", "The limit is 4096 pixels on a side.")
    if allocated not in (8, 16, 32) or not 1 <= stored <= high + 1 <= allocated or signed > 1:
        raise Refused("header_unreadable", "Its bit layout is not a possible one.")
    return rows, columns, allocated, stored, high, signed


def _rescale(data: FileDataset) -> tuple[float, float]:
    """Rescale slope and intercept; 1 and 0 where missing. Private scale factors are not used."""
    slope, intercept = (
        default if data.get(name) is None else float(data[name].value)
        for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise Refused("rescale_invalid")
    return slope, intercept


def _scanner(data: FileDataset) -> tuple[tuple[str, str | float], ...]:
    """Manufacturer from a known list and field strength as a number: no free text passes."""
    name = _text(data, "Manufacturer").upper()
    maker = next((m for m in _MANUFACTURERS if name == m or name.startswith(m + " ")), "other")
    fields: list[tuple[str, str | float]] = [("manufacturer", maker)]
    strength = _numbers(data, "MagneticFieldStrength", 1)
    if strength and 0 < strength[0] <= 30:
        fields.append(("field_strength_t", round(strength[0], 2)))
    return tuple(fields)


def _age(text: str) -> float | None:
    """Years of a DICOM age string such as 045Y (PS3.5 table 6.2-1, AS)."""
    years = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
    if len(text) == 4 and text[:3].isdigit() and text[3] in years:
        return int(text[:3]) * years[text[3]]
    return None


def _study(data: FileDataset) -> tuple[str, str]:
    """Date and time of a study; some exports give every file a StudyInstanceUID of its own."""
    day, time = _text(data, "StudyDate"), _text(data, "StudyTime")
    return (day, time) if day and time else (day, _text(data, "StudyInstanceUID"))


def _text(data: FileDataset, name: str) -> str:
    """An element as stripped text, empty where it is missing."""
    value = data.get(name)
    return "" if value is None else str(value).strip().strip("\0")


def _numbers(data: FileDataset, name: str, n: int) -> tuple[float, ...]:
    """An element's `n` finite numbers, none where it does not have as many."""
    value = data.get(name)
    if value is None or value == "":
        return ()
    found = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if found.shape != (n,) or not np.isfinite(found).all():
        return ()
    return tuple(float(v) for v in found)
