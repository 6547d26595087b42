"""NIfTI in and out: bounded before anything is allocated, RAS+ inside, a fresh header outside.

Source: the NIfTI-1 and NIfTI-2 headers (nifti1.h, nifti2.h of the NIfTI Data Format Working
Group).
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import nibabel
import numpy as np
import numpy.typing as npt

from synthmed.formats.refusal import Refused
from synthmed.types import Affine

nib: Any = nibabel  # its functions carry no types
Voxels = npt.NDArray[np.uint8 | np.int16 | np.float32]

MAX_SIDE = 4096
"""Voxels on a side."""
MAX_VOXELS = 1 << 27
"""Voxels of a volume: 512 x 512 x 512."""
MAX_BYTES = 1 << 29
"""Bytes of a volume's voxels as stored."""
MAX_OFFSET = 1 << 24
"""Bytes of header and extensions before the voxels."""
SLACK_BYTES = 1 << 16
"""Bytes behind the voxels that are tolerated."""
MAX_DEFLATE_RATIO = 1032
"""Deflate cannot expand more than this (zlib's technical details)."""
SPACING_MM = (1e-3, 1e3)
"""Voxel sizes that can be meant."""
_CHUNK_BYTES = 1 << 22

_DTYPES: Mapping[int, str] = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8",
    256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_COMPLEX_OR_RGB = {32, 128, 1792, 2048, 2304}
_UNIT_MM: Mapping[int, float] = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}


@dataclass(frozen=True)
class Image:
    """One volume as read.

    Args:
        data: (X, Y, Z), RAS+; uint8 or int16 where every value is such an integer, else float32.
        affine: (4, 4) voxel index to millimetres, RAS+.
        orientation: axis codes as stored, such as "LAS".
    """

    data: Voxels
    affine: Affine
    orientation: str

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along X, Y, Z."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


@dataclass(frozen=True)
class _Header:
    """What is read of a header."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    affine: Affine

    @property
    def n_bytes(self) -> int:
        return self.offset + int(np.prod(self.shape)) * self.dtype.itemsize


def read(path: Path) -> Image:
    """Read one 3D NIfTI-1 or NIfTI-2 file (.nii or .nii.gz, told apart by content) into RAS+.

    Guarantee: at most `MAX_BYTES` and a header are inflated, in time linear in them, and nothing
    is allocated before the header's claims were checked. The sform is used where its code is
    set, else the qform; a file with neither is refused, since left and right are unknown.

    Raises:
        Refused: with a code of `REASONS`; any voxel that is NaN or infinite is enough.
    """
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, io.SEEK_END)
            handle.seek(0)
            zipped = handle.read(2) == b"\x1f\x8b"
            handle.seek(0)
            if not zipped:
                return _image(handle, size)
            with gzip.GzipFile(fileobj=handle, mode="rb") as inflated:
                return _image(inflated, size * MAX_DEFLATE_RATIO)
    except EOFError:
        raise Refused("truncated", "The compressed data end early.") from None
    except (gzip.BadGzipFile, zlib.error):
        raise Refused("truncated", "The compressed data are damaged.") from None
    except OSError:
        raise Refused("unreadable") from None


def write(path: Path, data: Voxels, affine: Affine) -> None:
    """Write a NIfTI-1 .nii.gz with a fresh header: equal input gives equal bytes.

    Args:
        path: ends in .nii.gz.
        data: (X, Y, Z) uint8, int16 or float32.
        affine: (4, 4) voxel index to millimetres, RAS+.
    """
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm")
    image = nib.Nifti1Image(data, affine, header=header, dtype=data.dtype)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    with open(path, "wb") as handle, gzip.GzipFile("", "wb", 1, handle, mtime=0) as zipped:
        zipped.write(image.to_bytes())


def canonical(data: npt.NDArray[Any], affine: Affine) -> Image:
    """Turn axes to RAS+ by flips and swaps alone, without interpolation.

    Args:
        data: (I, J, K) in any order of axes.
        affine: (4, 4) voxel index of `data` to RAS millimetres.

    Raises:
        Refused: the affine is not invertible or the voxels are not finite.
    """
    _check_affine(affine)
    turn = nib.orientations.io_orientation(affine)
    if np.isnan(turn).any():
        raise Refused("geometry_invalid", "Two of its axes run along one direction.")
    turned = nib.orientations.apply_orientation(data, turn)
    code = "".join(nib.orientations.ornt2axcodes(turn))
    return Image(compact(turned), affine @ nib.orientations.inv_ornt_aff(turn, data.shape), code)


def compact(data: npt.NDArray[Any]) -> Voxels:
    """`data` as uint8 or int16 where that holds every value exactly, else as float32.

    Raises:
        Refused: a value is not finite, or not in float32's range.
    """
    # minimum and maximum pass NaN on: two reductions tell finiteness and range
    low, high = (float(f(data)) for f in (np.min, np.max))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Refused("not_finite")
    fits: type[np.uint8 | np.int16] | None = None
    if low >= 0 and high <= 255:
        fits = np.uint8
    elif low >= -32768 and high <= 32767:
        fits = np.int16
    if fits is not None:
        whole = data.astype(fits)
        if data.dtype.kind in "iu" or np.array_equal(whole, data):
            return np.ascontiguousarray(whole)
    if max(-low, high) > float(np.finfo(np.float32).max):
        raise Refused("not_finite", "Its values are beyond single precision.")
    return np.ascontiguousarray(data, dtype=np.float32)


def rescale(data: npt.NDArray[Any], slope: float, intercept: float) -> npt.NDArray[Any]:
    """`data * slope + intercept` as float32, computed in double precision slab by slab."""
    if slope == 1 and intercept == 0:
        return data
    out = np.empty(data.shape, dtype=np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused as not finite
        for k in range(data.shape[-1]):
            out[..., k] = data[..., k].astype(np.float64) * slope + intercept
    return out


def _image(stream: BinaryIO | gzip.GzipFile, limit: int) -> Image:
    """Read header and voxels from `stream`, which cannot hold more than `limit` bytes."""
    head = stream.read(544)
    header = _header(head)
    if header.n_bytes > limit:
        raise Refused("truncated")
    body = _read_exactly(stream, head, header.n_bytes)
    # reading to the end also makes gzip compare its checksum
    rest = sum(len(stream.read(SLACK_BYTES // 4)) for _ in range(4))
    rest += max(len(head) - header.n_bytes, 0)
    if rest >= SLACK_BYTES or stream.read(1):
        raise Refused("oversized", "It holds far more data than its header says.")
    flat = np.frombuffer(body, dtype=header.dtype, offset=header.offset)
    data = flat.reshape(header.shape, order="F")
    return canonical(rescale(data, header.slope, header.intercept), header.affine)


def _read_exactly(stream: BinaryIO | gzip.GzipFile, head: bytes, n_bytes: int) -> bytearray:
    """`head` and what follows it up to `n_bytes` in all, growing only with what is there."""
    body = bytearray(head[:n_bytes])
    while len(body) < n_bytes:
        chunk = stream.read(min(_CHUNK_BYTES, n_bytes - len(body)))
        if not chunk:
            raise Refused("truncated")
        body += chunk
    return body


def _header(head: bytes) -> _Header:
    """Check and parse the first bytes of a file."""
    order, version = _version(head)
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    length = 348 if version == 1 else 540
    if len(head) < length:
        raise Refused("truncated", "It ends within its header.")
    h = kind(head[:length], endianness=order, check=False)
    shape = _shape([int(n) for n in h["dim"]])
    dtype = _dtype(int(h["datatype"])).newbyteorder(order)
    offset = float(h["vox_offset"])
    first = 352 if version == 1 else 544
    if not (first <= offset <= MAX_OFFSET and offset == int(offset)):
        raise Refused("header_unreadable", "The voxels' offset is not a possible one.")
    slope, intercept = _scaling(float(h["scl_slope"]), float(h["scl_inter"]))
    if int(np.prod(shape)) * dtype.itemsize > MAX_BYTES:
        raise Refused("oversized", f"The limit is {MAX_BYTES >> 20} MiB of voxels.")
    return _Header(shape, dtype, int(offset), slope, intercept, _affine(h))


def _version(head: bytes) -> tuple[Literal["<", ">"], int]:
    """Byte order and version of a single-file header."""
    if not head:
        raise Refused("truncated", "The file is empty.")
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        size = int.from_bytes(head[:4], "little" if order == "<" else "big")
        if size == 348 and head[344:348] == b"n+1\0":
            return order, 1
        if size == 540 and head[4:12] == b"n+2\0\r\n\x1a\n":
            return order, 2
    if head[344:348] == b"ni1\0":
        raise Refused("header_unreadable", "Header and voxels in two files are not read.")
    raise Refused("header_unreadable", "It does not begin as a NIfTI file does.")


def _shape(dim: list[int]) -> tuple[int, int, int]:
    """The three sides: trailing axes of length one are dropped, and a slice's is added."""
    n = dim[0]
    if not 1 <= n <= 7 or any(side < 1 for side in dim[1 : n + 1]):
        raise Refused("header_unreadable", "Its dimensions are not possible ones.")
    sides = dim[1 : n + 1]
    if max(sides) > MAX_SIDE and n <= 3:
        raise Refused("oversized", f"The limit is {MAX_SIDE} voxels on a side.")
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    if len(sides) == 2:
        sides.append(1)
    if len(sides) != 3:
        raise Refused("not_3d", f"It has {len(sides)} axes.")
    x, y, z = sides
    if max(sides) > MAX_SIDE or x * y * z > MAX_VOXELS:
        raise Refused("oversized", f"The limit is {MAX_VOXELS} voxels.")
    return x, y, z


def _dtype(code: int) -> np.dtype[Any]:
    """The type of a voxel."""
    if code in _COMPLEX_OR_RGB:
        raise Refused("complex_or_rgb")
    if code not in _DTYPES:
        raise Refused("header_unreadable", "Its data type is not one that is read.")
    return np.dtype(_DTYPES[code])


def _scaling(slope: float, intercept: float) -> tuple[float, float]:
    """Slope and intercept; a slope of zero means none (nifti1.h), and so does NaN in practice."""
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise Refused("header_unreadable", "Its intensity scaling is not a finite number.")
    return slope, intercept


def _affine(h: Any) -> Affine:
    """Voxel index to RAS millimetres: the sform where its code is set, else the qform."""
    if int(h["sform_code"]) > 0:
        affine = np.asarray(h.get_sform(), dtype=np.float64)
        # the qform's handedness is the sign of pixdim[0] alone (nifti1.h, method 2)
        if int(h["qform_code"]) > 0 and np.linalg.det(affine[:3, :3]) * _handedness(h) < 0:
            raise Refused(
                "geometry_invalid", "Its sform and qform disagree about which side is left."
            )
    elif int(h["qform_code"]) > 0:
        sides = np.asarray(h["pixdim"][1:4], dtype=np.float64)
        if not (np.isfinite(sides).all() and (sides > 0).all()):
            raise Refused("geometry_invalid", "Its voxel size is not positive.")
        try:
            affine = np.asarray(h.get_qform(), dtype=np.float64)
        except (ValueError, nib.spatialimages.HeaderDataError):
            raise Refused("geometry_invalid", "Its quaternion is not a rotation.") from None
    else:
        raise Refused("geometry_invalid", "Neither sform nor qform is set: left is unknown.")
    unit = _UNIT_MM.get(int(h["xyzt_units"]) & 7)
    if unit is None:
        raise Refused("geometry_invalid", "Its unit of length is not a known one.")
    affine[:3] *= unit
    _check_affine(affine)
    return affine


def _handedness(h: Any) -> int:
    return -1 if float(h["pixdim"][0]) < 0 else 1


def _check_affine(affine: Affine) -> None:
    """Refuse what is not finite, not invertible or of impossible voxel size."""
    if not np.isfinite(affine).all():
        raise Refused("geometry_invalid")
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if sides.min() < SPACING_MM[0] or sides.max() > SPACING_MM[1]:
        raise Refused("geometry_invalid", "Its voxel size is not a possible one.")
    # of unit columns: the volume of the cell, 1 for right angles
    if abs(np.linalg.det(affine[:3, :3] / sides)) < 0.1:
        raise Refused("geometry_invalid", "Its axes nearly lie in one plane.")
