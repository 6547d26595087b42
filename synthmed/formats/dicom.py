"""DICOM files sorted into series: headers alone, bounded, and every odd one refused by name.

Source: PS3.3 C.7.3.1 (series), C.7.6.2 (image plane), A.4 (MR Image); PS3.10 section 7 (files).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import posixpath
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from synthmed.formats import frames
from synthmed.formats.frames import Frame
from synthmed.formats.refusal import Refused

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
_PIXELS = b"\xe0\x7f\x10\x00"
_GZIP = b"\x1f\x8b"
MAX_FILE_BYTES = 1 << 30
"""Bytes of a DICOM file."""
SMALL_FILE_BYTES = 1 << 20
"""A file of so many bytes is read at once, pixels and all."""
MAX_INFLATED_BYTES = 1 << 26
"""Bytes of a deflated data set or a .dcm.gz, inflated."""

_TAGS: list[Any] = [
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType",
    "Manufacturer", "MagneticFieldStrength", "PatientID", "PatientName", "PatientBirthDate",
    "PatientAge", "PatientSex", "FrameOfReferenceUID", "StudyInstanceUID", "StudyDate", "StudyTime",
    "SeriesInstanceUID", "SeriesNumber", "ImageOrientationPatient", "ImagePositionPatient",
    "PixelSpacing", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation",
    "RescaleSlope", "RescaleIntercept", "InstanceNumber", "AcquisitionNumber",
    "TemporalPositionIdentifier", "TriggerTime", "EchoTime", "InversionTime", "FlipAngle",
    "DiffusionBValue", "DiffusionGradientOrientation", "EchoNumbers", "ComplexImageComponent",
    "SeriesDescription", "ProtocolName",
    "ContrastBolusAgent", "RepetitionTime", "BurnedInAnnotation", *frames.TAGS,
]  # fmt: skip

_tag = cache(Tag)
"""Element of a keyword."""
_WANTED = [_tag(t) for t in _TAGS]

_PERSONS = ("PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName")
_NUMBERS = ("PatientID", "OtherPatientIDs", "AccessionNumber")

_MANUFACTURERS = ("SIEMENS", "GE", "PHILIPS", "CANON", "TOSHIBA", "HITACHI", "FUJIFILM",
                  "HYPERFINE", "UNITED IMAGING", "ESAOTE", "BRUKER")  # fmt: skip


_COMPONENTS = (
    ("fieldmap", {"FIELD_MAP", "B0", "B0 MAP"}),
    ("phase", {"P", "PHASE", "PHASE MAP"}),
    ("real", {"R", "REAL"}),
    ("imaginary", {"I", "IMAGINARY"}),
    ("magnitude", {"M", "MAGNITUDE", "M_SE", "M_FFE", "M_IR"}),
)
"""Word for what an image shows, and the values of ImageType that mean it; the first that fits."""


class Moment(NamedTuple):
    """What orders images of one kind at one place; 0 where the header does not say.

    Args:
        time: TemporalPositionIdentifier.
        acquisition: AcquisitionNumber.
        trigger: TriggerTime in milliseconds.
        instance: InstanceNumber.
        image: number of the image in its file.
    """

    time: float
    acquisition: float
    trigger: float
    instance: float
    image: int


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How a series was made, for choosing by it: free text, compared or shown, never stored.

    Args:
        description: SeriesDescription.
        protocol: ProtocolName.
        contrast: whether an agent was given.
        repetition: time in milliseconds; 0 where the header does not say.
    """

    description: str
    protocol: str
    contrast: bool
    repetition: float


@dataclass(frozen=True, slots=True)
class Slice:
    """What is kept of one image's header while its series is put together.

    Args:
        path: of its file, relative to the source.
        frame: number of the frame it lies in, among `n_frames` of the file.
        corner: (row, column) of its first pixel in the frame, whose size is `matrix`.
        who: PatientID, and with it name and birth date: compared within a series, never stored.
        reference: FrameOfReferenceUID: series that share it lie in one space, never stored.
        study: date and time, or the UID where they are missing: what tells sessions apart and
            orders them, never stored.
        number: SeriesNumber, None where it is missing.
        orientation: ImageOrientationPatient, six cosines (LPS).
        position: ImagePositionPatient in millimetres (LPS).
        spacing: PixelSpacing in millimetres: between rows, between columns.
        pixels: rows, columns, bits allocated, bits stored, high bit, pixel representation.
        rescale: slope and intercept; `measured` says that a scanner's own scale is in them.
        kind: what a scanner varies within a series, always the same names in the same order.
        moment: what orders images of one kind at one place.
        acquired: how.
        drawn: whether the header says that text is drawn into the pixels.
        scanner: allow-listed technical fields.
        age: in years, and `sex` as the header says; None where missing.
        element: offset of the pixels' element in its file, and whether that has no VR; None where
            the pixels are compressed or the file is large, and it has to be parsed again.
    """

    path: str
    frame: int
    n_frames: int
    corner: tuple[int, int]
    matrix: tuple[int, int]
    uid: str
    who: tuple[str, str, str]
    reference: str
    study: tuple[str, str]
    series: str
    number: int | None
    orientation: tuple[float, ...]
    position: tuple[float, ...]
    spacing: tuple[float, ...]
    pixels: tuple[int, int, int, int, int, int]
    rescale: tuple[float, float]
    measured: bool
    kind: tuple[tuple[str, str | float], ...]
    moment: Moment
    acquired: Acquisition
    drawn: bool
    scanner: tuple[tuple[str, str | float], ...]
    age: float | None
    sex: str | None
    element: tuple[int, bool] | None


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

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self._handle, self._size = handle, size
        self.seek, self.tell = handle.seek, handle.tell

    def read(self, n: int = -1) -> bytes:
        left = max(self._size - self._handle.tell(), 0)
        return self._handle.read(left if n is None or n < 0 else min(n, left))


def slices(path: Path, relative: str) -> list[Slice]:
    """Read the header of one file of an MR series: its image, frames or tiles.

    Args:
        path: the file.
        relative: how it is known to the caller.

    Raises:
        Refused: it is no MR image, or its header cannot be used.
    """
    data, content = _parsed(path, _WANTED, stop_before_pixels=True)
    try:
        types = _check_kind(data)
        element = _element(data, content)
        return [_slice(frame, relative, element) for frame in frames.frames(data, types)]
    except Refused:
        raise
    except Exception:  # pydicom converts values on access, and a damaged one raises anything
        raise Refused("header_unreadable", "One of its values is malformed.") from None


def too_large() -> Refused:
    """The refusal of a file of more than `MAX_FILE_BYTES`."""
    return Refused("oversized", f"The limit is {MAX_FILE_BYTES >> 20} MiB a file.")


def dataset(path: Path, tags: Sequence[Any] | None, stop_before_pixels: bool) -> FileDataset:
    """Parse a file, reading no more of it than there is and inflating no more than allowed.

    Args:
        path: the file.
        tags: elements to read; null for all.
        stop_before_pixels: leave them out.

    Raises:
        Refused: unreadable, oversized or damaged.
    """
    return _parsed(path, tags, stop_before_pixels)[0]


def identity(path: Path) -> tuple[set[str], set[str]]:
    """Names and numbers of the patient in a file's header: of people, and standing for them.

    Raises:
        Refused: the file cannot be read.
    """
    data = dataset(path, ["SpecificCharacterSet", *_PERSONS, *_NUMBERS], stop_before_pixels=True)
    found = []
    for keywords in (_PERSONS, _NUMBERS):
        values: set[str] = set()
        for keyword in keywords:
            with contextlib.suppress(Exception):  # a value that cannot be read is not carried on
                value = data.get(keyword)
                several = value if isinstance(value, MultiValue) else [value]
                values |= {str(v).strip() for v in several if v}
        found.append(values)
    return found[0], found[1]


def _parsed(
    path: Path, tags: Sequence[Any] | None, stop_before_pixels: bool
) -> tuple[FileDataset, io.BytesIO | None]:
    """A file's data set, and where it is a small one its content, read as far as was parsed."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise too_large()
        if size == 0:
            raise Refused("truncated", "The file is empty.")
        with open(path, "rb") as file:
            zipped = file.read(2) == _GZIP
            file.seek(0)
            stream: Any = _Clamped(file, size)
            content = None
            if zipped:
                stream = io.BytesIO(_unzipped(file))
            elif size <= SMALL_FILE_BYTES:  # a header is read in a thousand small pieces
                stream = content = io.BytesIO(file.read(size))
            if content is None or DeflatedExplicitVRLittleEndian.encode() in content.getvalue():
                _check_deflated(stream)
                stream.seek(0)
            data = pydicom.dcmread(
                stream,
                specific_tags=None if tags is None else list(tags),
                stop_before_pixels=stop_before_pixels,
                force=True,
            )
            return data, content
    except Refused:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise Refused("truncated", "Its compression is damaged.") from None
    except OSError:
        raise Refused("unreadable") from None
    except Exception:  # the parser meets hostile bytes: whatever it raises, the file is damaged
        raise Refused("header_unreadable") from None


def native_pixels(path: Path, element: tuple[int, bool]) -> bytes:
    """The pixel data of a file as `Slice.element` says where they lie.

    Raises:
        Refused: unreadable, or something else lies there now.
    """
    at, implicit = element
    try:
        with open(path, "rb") as file:
            file.seek(at)
            head = file.read(8 if implicit else 12)
            n_bytes = int.from_bytes(head[-4:], "little")
            if head[:4] != _PIXELS or n_bytes > SMALL_FILE_BYTES:
                raise Refused("unreadable", "It changed while it was read.")
            return file.read(n_bytes)
    except OSError:
        raise Refused("unreadable") from None


def _element(data: FileDataset, content: io.BytesIO | None) -> tuple[int, bool] | None:
    """Where the element of unpacked little-endian pixels begins, parsing having stopped there."""
    syntax = data.file_meta.get("TransferSyntaxUID")
    if content is None or syntax not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    at, implicit = content.tell(), syntax == ImplicitVRLittleEndian
    head = content.read(8 if implicit else 12)
    # some files say one thing and hold the other, and what is taken for a length is then a VR
    known = head[:4] == _PIXELS and (head[4:6] in (b"OW", b"OB")) != implicit
    # a length that is not told is all ones
    return (at, implicit) if known and head[-4:] != b"\xff\xff\xff\xff" else None


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


def _unzipped(handle: BinaryIO) -> bytes:
    """A .dcm.gz, inflated no further than allowed."""
    with gzip.GzipFile(fileobj=handle, mode="rb") as inflating:
        found = inflating.read(MAX_INFLATED_BYTES + 1)
    if len(found) > MAX_INFLATED_BYTES:
        raise Refused("oversized", f"The limit is {MAX_INFLATED_BYTES >> 20} MiB inflated.")
    return found


def _check_deflated(handle: Any) -> None:
    """Refuse a deflated data set that inflates beyond the limit (pydicom inflates it whole)."""
    if handle.read(132)[128:] != b"DICM":
        handle.seek(0)  # pydicom reads what stands at the start then
    meta = pydicom.filereader._read_file_meta_info(handle)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(handle.read(), MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise Refused("oversized", f"The limit is {MAX_INFLATED_BYTES >> 20} MiB inflated.")


def _slice(frame: Frame, relative: str, element: tuple[int, bool] | None) -> Slice:
    """Values of the header of one image, checked one at a time."""
    data = frame.data
    if int(_value(data, "SamplesPerPixel", 1)) != 1 or "PALETTE" in _text(
        data, "PhotometricInterpretation"
    ):
        raise Refused("rgb")
    if _text(data, "PhotometricInterpretation") != "MONOCHROME2":
        raise Refused("photometric_unsupported")
    spacing = _numbers(data, "PixelSpacing", 2)
    if not spacing or min(spacing) <= 0:
        raise Refused("no_pixel_spacing")
    orientation = _numbers(data, "ImageOrientationPatient", 6)
    position = _numbers(data, "ImagePositionPatient", 3)
    if not orientation or not position:
        raise Refused("geometry_invalid", "It has no position or orientation.")
    number = _value(data, "SeriesNumber")
    return Slice(
        path=relative,
        frame=frame.number,
        n_frames=frame.n_frames,
        corner=frame.corner,
        matrix=frame.matrix,
        uid=_text(data, "SOPInstanceUID") + (f" {frame.image}" if frame.n_images > 1 else ""),
        who=(_text(data, "PatientID"), _text(data, "PatientName"), _text(data, "PatientBirthDate")),
        reference=_text(data, "FrameOfReferenceUID"),
        study=_study(data),
        series=_text(data, "SeriesInstanceUID"),
        number=None if number is None else int(number),
        orientation=orientation,
        position=position,
        spacing=spacing,
        pixels=_pixels(data),
        rescale=_rescale(data, frame.scale),
        measured=frame.scale is not None,
        kind=_kind(data),
        moment=_moment(data, frame.image),
        acquired=Acquisition(
            description=_text(data, "SeriesDescription"),
            protocol=_text(data, "ProtocolName"),
            contrast=_text(data, "ContrastBolusAgent").upper() not in ("", "NO", "NONE"),
            repetition=_number(data, "RepetitionTime"),
        ),
        drawn="YES" in _words(data, "BurnedInAnnotation"),
        scanner=_scanner(data),
        age=_age(_text(data, "PatientAge")),
        sex=_text(data, "PatientSex") or None,
        element=element,
    )


def _check_kind(data: FileDataset) -> list[str]:
    """Let only MR images pass, and no localizer; the values of ImageType."""
    if len(data) == 0:
        raise Refused("header_unreadable")
    if _text(data, "SOPClassUID") not in {MR_IMAGE, *frames.ENHANCED}:
        raise Refused("not_mr_image")
    types = _words(data, "ImageType")
    if "LOCALIZER" in types:
        raise Refused("localizer")
    if _value(data, "Rows") is None or _value(data, "Columns") is None:
        raise Refused("no_pixels")
    return types


def _words(data: Dataset, name: str) -> list[str]:
    """An element's values in capitals."""
    value = _value(data, name) or ()
    return [str(t).upper().strip() for t in ([value] if isinstance(value, str) else value)]


def _kind(data: Dataset) -> tuple[tuple[str, str | float], ...]:
    """What a scanner varies within a series, and what tells stacks of one place apart."""
    types = "\\".join([*_words(data, "ImageType"), _text(data, "ComplexImageComponent").upper()])
    towards = _numbers(data, "DiffusionGradientOrientation", 3)
    return (
        ("type", types),
        ("echo", _number(data, "EchoTime")),
        ("inversion", _number(data, "InversionTime")),
        ("flip", _number(data, "FlipAngle")),
        ("b", _number(data, "DiffusionBValue")),
        ("direction", " ".join(f"{v:.4f}" for v in towards)),
        ("echonumber", _number(data, "EchoNumbers")),
        ("stack", _text(data, "StackID")),
    )


def component(image_type: str) -> str:
    """What an image shows of a signal (magnitude, phase, ...), by the `type` of its kind; or ""."""
    parts = set(image_type.split("\\"))
    return next((word for word, known in _COMPONENTS if parts & known), "")


def _moment(data: Dataset, image: int) -> Moment:
    return Moment(
        time=_number(data, "TemporalPositionIdentifier"),
        acquisition=_number(data, "AcquisitionNumber"),
        trigger=_number(data, "TriggerTime"),
        instance=_number(data, "InstanceNumber"),
        image=image,
    )


def _number(data: Dataset, name: str) -> float:
    """The first of an element's numbers; 0 where there is none."""
    value = _value(data, name)
    first = np.atleast_1d(np.asarray(0.0 if value is None or value == "" else value, np.float64))
    return float(first[0]) if first.size and np.isfinite(first[0]) else 0.0


def _pixels(data: Dataset) -> tuple[int, int, int, int, int, int]:
    """Matrix and bit layout, of a kind that can be decoded (PS3.5 section 8.1.1)."""
    names = ("Rows", "Columns", "BitsAllocated", "BitsStored")
    rows, columns, allocated, stored = (int(_value(data, name)) for name in names)
    high = int(_value(data, "HighBit", stored - 1))
    signed = int(_value(data, "PixelRepresentation", 0))
    if not (1 <= rows <= 4096 and 1 <= columns <= 4096):
        raise Refused("oversized", "The limit is 4096 pixels on a side.")
    if allocated not in (8, 16, 32) or not 1 <= stored <= high + 1 <= allocated or signed > 1:
        raise Refused("header_unreadable", "Its bit layout is not a possible one.")
    return rows, columns, allocated, stored, high, signed


def _rescale(data: Dataset, scale: float | None) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 where missing.

    Philips scales each image to its storage and then to a display: with the scale slope known,
    what the scanner measured is (stored * slope + intercept) / (slope * scale).
    """
    slope, intercept = (
        default if (value := _value(data, name)) is None else float(value)
        for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise Refused("rescale_invalid")
    if scale is not None:
        return 1 / scale, intercept / (slope * scale)
    return slope, intercept


def _scanner(data: Dataset) -> tuple[tuple[str, str | float], ...]:
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


def _study(data: Dataset) -> tuple[str, str]:
    """Date and time of a study; some exports give every file a StudyInstanceUID of its own."""
    day, time = _text(data, "StudyDate"), _text(data, "StudyTime")
    return (day, time) if day and time else (day, _text(data, "StudyInstanceUID"))


def _value(data: Dataset, name: str, default: Any = None) -> Any:
    """An element's value: what Dataset.get gives, without an exception for each missing one."""
    tag = _tag(name)
    return data[tag].value if tag in data.keys() else default  # noqa: SIM118 (a plain dictionary's)


def _text(data: Dataset, name: str) -> str:
    """An element as stripped text, empty where it is missing."""
    value = _value(data, name)
    return "" if value is None else str(value).strip().strip("\0")


def _numbers(data: Dataset, name: str, n: int) -> tuple[float, ...]:
    """An element's `n` finite numbers, none where it does not have as many."""
    value = _value(data, name)
    if value is None or value == "":
        return ()
    found = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if found.shape != (n,) or not np.isfinite(found).all():
        return ()
    return tuple(float(v) for v in found)
