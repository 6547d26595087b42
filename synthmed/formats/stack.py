"""A DICOM series as one volume: geometry checked, slices sorted, pixels decoded, LPS to RAS.

The only place that knows LPS. Source: PS3.3 C.7.6.2.1.1 (position and orientation), C.7.6.3
(pixels), C.11.1 (rescaling).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import uid
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from scipy import ndimage

from synthmed.errors import pip
from synthmed.formats import dicom
from synthmed.formats.dicom import Slice
from synthmed.formats.nifti import MAX_VOXELS, Image, canonical, rescale
from synthmed.formats.refusal import Refused
from synthmed.types import Affine

COSINE_TOLERANCE = 1e-3
"""How far direction cosines may be from unit length, right angles and each other (0.06 degrees)."""
SPACING_TOLERANCE = 0.01
"""How far a slice may be from its even place, as a part of the spacing, but 0.01 mm at least."""
TILT_DEGREES = 0.25
"""How far the stack may lean from the slices' normal."""
MAX_TILT_DEGREES = 45.0
"""How far a stack may lean that is resampled."""
SAME_MM = 0.01
"""How far two slices may be apart and still lie at one place."""
SAME_TIME = 0.02
"""How far echo times, inversion times and b-values of one volume may differ, as a part."""
MIN_SLICES = 3
"""Fewer cannot show that they are evenly spaced."""

_CODECS = {
    uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000,
    uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K,
}  # fmt: skip
_PIXEL_TAGS: list[Any] = [
    "SOPClassUID", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "NumberOfFrames",
    "PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation", "PixelData",
]  # fmt: skip


def read(slices: Sequence[Slice], where: Callable[[str], Path], upright: bool = False) -> Image:
    """The volume that slices make, in RAS+.

    Guarantee: the voxels and their places in the patient are those of the files, or the series
    is refused; geometry and size are checked before a pixel is read. The one exception is what
    `upright` asks for.

    Args:
        slices: in any order.
        where: a slice's path to its file.
        upright: resample a tilted stack to one that stands on its slices, linearly within each.

    Raises:
        Refused: with the reason, a code of `REASONS`.
    """
    ordered, affine = geometry(slices, tilted=upright)
    rows, columns = ordered[0].pixels[:2]
    if rows * columns * len(ordered) > MAX_VOXELS:
        raise Refused("oversized", f"The limit is {MAX_VOXELS} voxels.")
    if len({s.measured for s in ordered}) > 1:
        raise Refused("rescale_invalid", "Some of its slices lack their scale slope.")
    try:
        planes = _planes(ordered, where)
    except Refused:
        raise
    except Exception:  # hostile values that only decoding meets: whatever is raised, it is damage
        raise Refused("header_unreadable", "Its pixels cannot be decoded.") from None
    data = np.stack([p.T for p in planes], axis=-1)  # (columns, rows, slices): i, j, k
    if upright:
        data, affine = _upright(data, affine)
    return canonical(data, affine)


def _upright(data: npt.NDArray[Any], affine: Affine) -> tuple[npt.NDArray[Any], Affine]:
    """Shift the slices of a tilted stack within their planes; nothing of them is cut off.

    Args:
        data: (columns, rows, slices).
        affine: of `data`, sheared where it is tilted.
    """
    along, step = affine[:3, :2], affine[:3, 2]
    # how far each slice lies to the side of the one before it, in columns and rows
    lean = np.linalg.lstsq(along, step, rcond=None)[0]
    if np.abs(lean * (data.shape[2] - 1)).max() < 1e-3:
        return data, affine
    shifts = np.arange(data.shape[2])[:, None] * lean  # (slices, 2)
    low, high = np.floor(shifts.min(0)).astype(int), np.ceil(shifts.max(0)).astype(int)
    shape = tuple(n + int(b - a) for n, a, b in zip(data.shape[:2], low, high, strict=True))
    if math.prod(shape) * data.shape[2] > MAX_VOXELS:
        raise Refused("oversized", f"The limit is {MAX_VOXELS} voxels.")
    out = np.zeros((*shape, data.shape[2]), np.float32)
    for k, shift in enumerate(shifts):
        # output column c shows the slice's column c + low - shift
        out[..., k] = ndimage.affine_transform(
            data[..., k].astype(np.float32), [1, 1], low - shift, shape, order=1
        )
    straight = affine.copy()
    straight[:3, 2] = step - along @ lean
    straight[:3, 3] = affine[:3, 3] + along @ low
    return out, straight


def geometry(slices: Sequence[Slice], tilted: bool = False) -> tuple[list[Slice], Affine]:
    """Slices in the order of their places, and the affine from (column, row, slice) to RAS mm.

    Args:
        slices: in any order.
        tilted: let a leaning stack pass, whose affine is sheared.

    Raises:
        Refused: they do not form one even, upright stack of one volume.
    """
    if len(slices) == 1:
        raise Refused("single_slice")
    first = slices[0]
    if any(s.pixels != first.pixels or not _near(s.spacing, first.spacing) for s in slices):
        raise Refused("mixed_matrix")
    turns = np.array([s.orientation for s in slices])  # (n, 6)
    if np.abs(turns - turns[0]).max() > COSINE_TOLERANCE:
        raise Refused("mixed_orientation")
    along_row, along_column = turns[0].reshape(2, 3)
    right = (along_row @ along_row - 1, along_column @ along_column - 1, along_row @ along_column)
    if np.abs(right).max() > COSINE_TOLERANCE:
        raise Refused("geometry_invalid", "Its direction cosines are not at right angles.")
    normal = np.cross(along_row, along_column)
    places = np.array([s.position for s in slices])  # (n, 3) LPS mm
    order = np.argsort(places @ normal, kind="stable")
    ordered, places = [slices[i] for i in order], places[order]
    _check_repeats(ordered, places @ normal)
    _check_one_image(ordered)
    _check_even(places, normal, tilted)
    step = (places[-1] - places[0]) / (len(places) - 1)
    affine = np.eye(4)
    affine[:3, 0] = along_row * first.spacing[1]  # one column further is along the row
    affine[:3, 1] = along_column * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = places[0]
    return ordered, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def levels(heights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Number of each height's place from the lowest up; what is within `SAME_MM` is one place."""
    order = np.argsort(heights, kind="stable")
    steps = np.cumsum(np.diff(heights[order]) > SAME_MM)
    out = np.empty(len(heights), np.int64)
    out[order] = np.concatenate([[0], steps])
    return out


def _check_repeats(ordered: Sequence[Slice], heights: npt.NDArray[np.float64]) -> None:
    """Refuse slices at one place: copies, volumes one after the other, or a mixture."""
    if len({s.uid for s in ordered}) < len(ordered):
        raise Refused("duplicate_positions", "The same images occur more than once.")
    level = levels(heights)
    counts = set(Counter(level.tolist()).values())
    if counts == {1}:
        return
    if len(counts) == 1 and level[-1] > 0:
        raise Refused("is_4d", f"{counts.pop()} images at each of {level[-1] + 1} positions.")
    raise Refused("duplicate_positions")


def _check_one_image(slices: Sequence[Slice]) -> None:
    """Refuse slices of several images that lie at different places, as one volume's do.

    Some exports give every file a study or a frame of reference of its own: that says nothing.
    """
    for told in ({s.reference for s in slices}, {s.study for s in slices}):
        if 1 < len(told) < len(slices):
            raise Refused("mixed_series")
    kinds = [dict(s.kind) for s in slices]
    if len({dicom.component(str(kind["type"])) for kind in kinds}) > 1:
        raise Refused("mixed_series", "Some show another component of the signal.")
    for name in ("echo", "inversion", "b"):
        values = np.array([kind[name] for kind in kinds], np.float64)
        if np.ptp(values) > SAME_TIME * np.abs(values).max():
            raise Refused("mixed_series", "Their echo time, inversion time or b-value differ.")


def _check_even(
    places: npt.NDArray[np.float64], normal: npt.NDArray[np.float64], tilted: bool
) -> None:
    """Refuse gaps, uneven spacing and a leaning stack; `places` (n, 3) are sorted."""
    if len(places) < MIN_SLICES:
        raise Refused("too_few_slices")
    gaps = np.diff(places @ normal)
    spacing = float(np.median(gaps))
    allowed = max(0.01, SPACING_TOLERANCE * spacing)
    if np.abs(gaps - spacing).max() > allowed:
        # judged by the smallest gap: where most slices are missing, the median is a gap itself
        multiples = gaps / gaps.min()
        if np.abs(multiples - multiples.round()).max() < 0.05:
            raise Refused("missing_slices", f"At {int((multiples > 1.5).sum())} places.")
        raise Refused("uneven_slices")
    step = (places[-1] - places[0]) / (len(places) - 1)
    lean = np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1)))
    if lean > (MAX_TILT_DEGREES if tilted else TILT_DEGREES):
        raise Refused("gantry_tilt", f"It leans by {lean:.1f} degrees.")
    even = places[0] + np.arange(len(places))[:, None] * step
    if np.linalg.norm(places - even, axis=1).max() > allowed:
        raise Refused("uneven_slices", "Slices are shifted sideways.")


def _planes(ordered: Sequence[Slice], where: Callable[[str], Path]) -> list[npt.NDArray[Any]]:
    """(rows, columns) of each slice: integers, or float32 where it is rescaled."""
    out: list[npt.NDArray[Any]] = [np.empty(0)] * len(ordered)
    files: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(ordered):
        files[s.path].append(i)
    for path, own in files.items():  # each file is read once, and so are frames of many slices
        first = ordered[own[0]]
        data = decoder = None
        if first.element:
            encoded = dicom.native_pixels(where(path), first.element)
        else:
            data = dicom.dataset(where(path), _PIXEL_TAGS, stop_before_pixels=False)
            if "PixelData" not in data:
                raise Refused("no_pixels")
            encoded = pixel_bytes(data)
            decoder = _decoder(data, encoded, first)
        big_endian = data is not None and not syntax_of(data).is_little_endian
        covered = np.zeros(first.matrix, np.bool_)
        shown = -1
        for i in own:
            s = ordered[i]
            if s.frame != shown:
                if decoder is None:
                    frame = _native(encoded, s, big_endian)
                else:
                    frame = _decoded(data, decoder, s)
                shown = s.frame
            tile = tuple(slice(c, c + n) for c, n in zip(s.corner, s.pixels[:2], strict=True))
            out[i] = rescale(stored_values(frame[tile], *s.pixels[2:]), *s.rescale)
            covered[tile] = True
        if frame[~covered].any():  # of a mosaic: what lies beside its tiles must be empty
            raise Refused("mosaic_unsupported", "It holds more slices than it claims.")
    return out


def syntax_of(data: Any) -> uid.UID:
    """The transfer syntax of a file; the standard's default where it does not say."""
    found: uid.UID = data.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    return found


def pixel_bytes(data: Any) -> bytes:
    """The pixel data of a file; words of two 8-bit pixels in the order of the pixels."""
    encoded = bytes(data.PixelData)
    big = not syntax_of(data).is_little_endian
    if big and data["PixelData"].VR == "OW" and data.BitsAllocated == 8:
        words = np.frombuffer(encoded[: len(encoded) // 2 * 2], np.uint16)
        encoded = words.byteswap().tobytes() + encoded[len(encoded) // 2 * 2 :]
    return encoded


def stored_values(
    raw: npt.NDArray[Any], allocated: int, stored: int, high: int, signed: int
) -> npt.NDArray[Any]:
    """What the stored bits of pixels say.

    Bits outside the stored ones may hold overlays, and the sign is the highest stored bit.
    """
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    out: npt.NDArray[Any] = np.right_shift(
        np.left_shift(raw.astype(kind), allocated - 1 - high), allocated - stored
    )
    return out


def _native(encoded: bytes, s: Slice, big_endian: bool) -> npt.NDArray[Any]:
    """The frame of a slice in uncompressed pixels."""
    rows, columns = s.matrix
    kind = np.dtype(f"{'>' if big_endian else '<'}u{s.pixels[2] // 8}")
    n_bytes = rows * columns * kind.itemsize
    if len(encoded) < s.n_frames * n_bytes:
        raise Refused("truncated", "Its pixels end early.")
    if len(encoded) > s.n_frames * n_bytes + 1:  # one byte pads to an even length
        raise Refused("header_unreadable", "It holds more pixels than its matrix.")
    plane = np.frombuffer(encoded, kind, rows * columns, s.frame * n_bytes).reshape(rows, columns)
    return (
        plane.view(plane.dtype.newbyteorder("="))
        if not big_endian
        else plane.astype(kind.newbyteorder("="))
    )


def _decoder(data: Any, encoded: bytes, s: Slice) -> Any:
    """pydicom's decoder of a file's pixels; None where they are not compressed."""
    syntax = syntax_of(data)
    if not syntax.is_compressed or syntax.is_deflated:
        return None
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Refused("compressed_unsupported") from None
    if not decoder.is_available:
        package = pip("codecs") if syntax in _CODECS else "pip install python-gdcm"
        raise Refused("compressed_unsupported", f"{syntax.name} needs: {package}.")
    check_codestreams(encoded, s.n_frames, s.matrix)
    return decoder


def _decoded(data: Any, decoder: Any, s: Slice) -> npt.NDArray[Any]:
    """The frame of a slice in compressed pixels."""
    try:
        plane, _ = decoder.as_array(data, raw=True, index=s.frame)
    except Exception:  # decoders raise anything on damaged pixels
        raise Refused("truncated", "Its compressed pixels are damaged.") from None
    if plane.shape != s.matrix:
        raise Refused("header_unreadable", "Its compressed pixels have another matrix.")
    unsigned = np.dtype(f"u{s.pixels[2] // 8}")
    out: npt.NDArray[Any] = plane.astype(unsigned)
    return out


def check_codestreams(encoded: bytes, n_frames: int, matrix: tuple[int, int]) -> None:
    """Refuse compressed frames that claim another matrix: decoders allocate what they claim.

    Args:
        encoded: the encapsulated pixel data.
        n_frames: that it holds.
        matrix: (rows, columns) of a frame.
    """
    try:
        frames = generate_frames(encoded, number_of_frames=n_frames)
        claimed = {codestream_size(frame) for frame in frames}
    except Exception:  # damaged encapsulation raises anything
        raise Refused("truncated", "Its compressed pixels are damaged.") from None
    if claimed - {None, matrix}:
        raise Refused("header_unreadable", "Its compressed pixels have another matrix.")


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 stream claims; None for other kinds.

    Read before decoding, because decoders allocate what the stream claims.
    """
    if frame[:4] == b"\xff\x4f\xff\x51":  # SOC, SIZ (ISO/IEC 15444-1 A.5.1)
        x, y, x0, y0 = (int.from_bytes(frame[i : i + 4], "big") for i in (8, 12, 16, 20))
        return y - y0, x - x0
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:  # markers up to SOF (ISO/IEC 10918-1 B.1.1)
        marker = frame[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = (int.from_bytes(frame[at + i : at + i + 2], "big") for i in (5, 7))
            return rows, columns
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether pixel sizes are equal to a part in ten thousand."""
    return bool(np.allclose(a, b, rtol=1e-4, atol=0))
