"""What one DICOM file shows: an image, the frames of an enhanced one, or the tiles of a mosaic.

Whatever it is, each image comes out as a flat data set in the words of a classic MR image, so that
nothing else has to know how it was stored. Source: PS3.3 A.36 and C.7.6.16 (enhanced MR and its
functional groups); Siemens' mosaics have no standard, their private header is read by nibabel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from synthmed.formats.refusal import Refused

ENHANCED = {
    "1.2.840.10008.5.1.4.1.1.4.1",  # Enhanced MR
    "1.2.840.10008.5.1.4.1.1.4.3",  # Enhanced MR Color
    "1.2.840.10008.5.1.4.1.1.4.4",  # Legacy Converted Enhanced MR
}
MAX_FRAMES = 1 << 16
"""Frames of a file."""
MAX_TILES = 1024
"""Slices of a mosaic."""

_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
_GROUP_TAGS = {Tag(name) for name in (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
    "PixelValueTransformationSequence", "FrameContentSequence", "TemporalPositionSequence",
    "MRImageFrameTypeSequence", "MREchoSequence", "MRModifierSequence", "MRDiffusionSequence",
    "MRTimingAndRelatedParametersSequence", "CardiacSynchronizationSequence",
)}  # fmt: skip
_DIRECTION = "DiffusionGradientDirectionSequence"
"""Lies within the group of diffusion."""
_CLASSIC = {
    "FrameType": "ImageType",
    "EffectiveEchoTime": "EchoTime",
    "InversionTimes": "InversionTime",
    "TemporalPositionIndex": "TemporalPositionIdentifier",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "NominalCardiacTriggerDelayTime": "TriggerTime",
}
"""Element of an enhanced image to that of a classic one."""
_N_IN_MOSAIC = Tag(0x0019, 0x100A)
_MOSAIC_TAGS: list[BaseTag] = [
    Tag(0x0019, 0x0010), _N_IN_MOSAIC,
    *(Tag(0x0029, e) for e in (0x0010, 0x0011, 0x0012, 0x1010, 0x1110, 0x1210)),
]  # fmt: skip
"""What says how a mosaic is laid out, with the blocks' creators."""
_PHILIPS = "Philips MR Imaging DD 001"
_PHILIPS_ITEMS = Tag(0x2005, 0x140F)
_SCALE_TAGS = [Tag(0x2005, e) for b in range(0x10, 0x18) for e in (b, b << 8 | 0x0E)]
TAGS = [_SHARED, _PER_FRAME, "NumberOfFrames", "SpacingBetweenSlices", *_MOSAIC_TAGS, *_SCALE_TAGS]
"""Elements needed here beside those of an image."""


@dataclass(frozen=True)
class Frame:
    """One image of a file.

    Args:
        data: its elements, named as in a classic MR image; Rows and Columns are its own.
        number: of the frame in the file's pixel data, from 0.
        n_frames: in the file.
        image: number of the image in the file, from 0: a frame, or a tile of one.
        n_images: in the file.
        corner: (row, column) of its first pixel within the frame.
        matrix: (rows, columns) of the frame.
        scale: Philips' scale slope: the stored values divided by it, about their zero, are those
            the scanner measured, which one scan can be compared with another in.
    """

    data: Dataset
    number: int
    n_frames: int
    image: int
    n_images: int
    corner: tuple[int, int]
    matrix: tuple[int, int]
    scale: float | None = None


def frames(data: Dataset, types: Sequence[str]) -> Iterator[Frame]:
    """Every image in a file, one after the other: a file can claim very many.

    Args:
        data: its header.
        types: values of ImageType.

    Raises:
        Refused: it cannot be told what the file holds, or where.
    """
    count = int(data.get("NumberOfFrames") or 1)
    if not 1 <= count <= MAX_FRAMES:
        raise Refused("header_unreadable", f"It claims {count} frames.")
    matrix = int(data.Rows), int(data.Columns)
    if data.get("SOPClassUID") in ENHANCED:
        yield from _enhanced(data, count, matrix)
        return
    if count != 1:
        raise Refused("enhanced_unsupported", "A multi-frame file of another kind.")
    if "MOSAIC" in types or _N_IN_MOSAIC in data:
        yield from _mosaic(data, matrix)
    else:
        yield Frame(data, 0, 1, 0, 1, (0, 0), matrix, _scale(data))


def _enhanced(data: Dataset, count: int, matrix: tuple[int, int]) -> Iterator[Frame]:
    """Each frame with what holds for all of them and what holds for it alone."""
    each = data.get(_PER_FRAME)
    if not each or len(each) != count:
        raise Refused("enhanced_unsupported", "It does not say where each of its frames lies.")
    base = Dataset()
    base.update({e.tag: e for e in data if e.keyword not in (_SHARED, _PER_FRAME)})
    for group in data.get(_SHARED) or ():
        _take(base, group)
    for k, group in enumerate(each):
        flat = Dataset()
        flat.update(base)
        _take(flat, group)
        items = group[_PHILIPS_ITEMS].value if _PHILIPS_ITEMS in group else ()
        scale = _scale(items[0]) if items else None
        yield Frame(flat, k, count, k, count, (0, 0), matrix, scale)


def _scale(data: Dataset) -> float | None:
    """Philips' private scale slope; None where there is none."""
    try:
        value = float(data.private_block(0x2005, _PHILIPS)[0x0E].value)
    except KeyError:
        return None
    if not math.isfinite(value) or value <= 0:
        raise Refused("rescale_invalid", "Its scale slope is not a usable number.")
    return value


def _take(flat: Dataset, group: Dataset) -> None:
    """Put the elements of known functional groups into a flat data set."""
    for tag in group.keys() & _GROUP_TAGS:
        for item in (group[tag].value or ())[:1]:
            for source in (item, *(item.get(_DIRECTION) or ())[:1]):
                for element in source:
                    if element.VR != "SQ" and element.keyword:
                        _put(flat, _CLASSIC.get(element.keyword, element.keyword), element.value)


def _put(flat: Dataset, keyword: str, value: Any) -> None:
    """Set an element; what is assigned to one that is there changes every data set it is in."""
    tag = Tag(keyword)
    flat.add_new(tag, dictionary_VR(tag), value)


def _mosaic(data: Dataset, matrix: tuple[int, int]) -> Iterator[Frame]:
    """The slices of a Siemens mosaic: tiles row by row, one above the other along the normal."""
    n, normal = _layout(data)
    turn = np.asarray(data.get("ImageOrientationPatient") or (), float)
    corner = np.asarray(data.get("ImagePositionPatient") or (), float)
    sides = np.asarray(data.get("PixelSpacing") or (), float)
    apart = float(data.get("SpacingBetweenSlices") or 0)
    if n is None or normal is None or not 1 <= n <= MAX_TILES:
        raise Refused("mosaic_unsupported", "Its private header does not say how it is laid out.")
    if not (turn.shape == (6,) and corner.shape == (3,) and sides.shape == (2,) and apart > 0):
        raise Refused("geometry_invalid", "A mosaic without position, orientation or spacing.")
    along_row, along_column = turn.reshape(2, 3)
    lengths = np.array([abs(np.cross(along_row, along_column) @ normal), np.linalg.norm(normal)])
    if np.abs(lengths - 1).max() > 1e-3:
        raise Refused("geometry_invalid", "Its slices' normal does not fit their orientation.")
    side = math.ceil(math.sqrt(n))  # tiles in a row and in a column
    rows, columns = (size // side for size in matrix)
    if rows < 1 or columns < 1 or matrix[0] % side or matrix[1] % side:
        raise Refused("mosaic_unsupported", "Its matrix does not hold as many slices as it claims.")
    # its position is that of a plane as large as the mosaic, about the middle of its slices
    corner = corner + along_row * sides[1] * (matrix[1] - columns) / 2
    corner = corner + along_column * sides[0] * (matrix[0] - rows) / 2
    for k in range(n):
        tile = Dataset()
        tile.update(data)
        _put(tile, "Rows", rows)
        _put(tile, "Columns", columns)
        place = corner + k * apart * normal
        _put(tile, "ImagePositionPatient", [float(v) for v in place])
        yield Frame(tile, 0, 1, k, n, (k // side * rows, k % side * columns), matrix)


def _layout(data: Dataset) -> tuple[int | None, npt.NDArray[np.float64] | None]:
    """Number of slices and their normal, as the private header has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel calls its DICOM part experimental
        from nibabel.nicom import csareader
    read: Any = csareader
    private = read.get_csa_header(data, "image")
    if private is None:
        return None, None
    n, normal = read.get_n_mosaic(private), read.get_slice_normal(private)
    return (n and int(n)), (None if normal is None else np.asarray(normal, np.float64))
