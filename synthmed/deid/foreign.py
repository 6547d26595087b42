"""Names in the files of a cohort that another tool has made: in paths, tables, text and headers.

Voxels and pixels are not searched: names occur there by chance.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from synthmed.deid.needles import MIN_TEXT, Needles
from synthmed.deid.scan import MIN_BINARY
from synthmed.formats.listing import Listing, is_auxiliary, kind, walk

HEAD_BYTES = 1 << 16
"""Bytes at the start of an image that may be its header."""
MAX_TEXT_BYTES = 1 << 26
"""Bytes of a table or text that are searched."""
_GZIP, _NAMED = b"\x1f\x8b", 0b1000
_PIXELS = b"\xe0\x7f\x10\x00"


def naming(folder: Path, *sets: Collection[str]) -> list[list[str]]:
    """For each set of names the files, relative to the folder, that hold one of them.

    In their path, text or header. Each file is read once.
    """
    # patients may be numbered on either side, by the same words
    needles = [Needles(names, ending=True) for names in sets]
    listing = walk(folder)
    found: list[list[str]] = [[] for _ in sets]
    for path in sorted([*listing.sizes, *listing.refused]):
        texts = [(os.fsencode(path), MIN_TEXT), *_texts(listing, path)]
        for own, paths in zip(needles, found, strict=True):
            if any(own.found_in(text, shortest=shortest) for text, shortest in texts):
                paths.append(path)
    return found


def _texts(listing: Listing, path: str) -> list[tuple[bytes, int]]:
    """What a file says, and the characters of the shortest name that is searched for in it."""
    if path in listing.refused:
        return []
    what = "text" if is_auxiliary(path) else kind(listing, path)
    try:
        with open(listing.path(path), "rb") as handle:
            content = handle.read(MAX_TEXT_BYTES if what in ("text", "other") else HEAD_BYTES)
    except OSError:  # ingest says so
        return []
    stored = b""
    if content[:2] == _GZIP:
        if content[3:4] and content[3] & _NAMED:
            stored = content[10:].partition(b"\0")[0]
        content = _inflated(content)
    binary = what == "other" and b"\0" in content[:HEAD_BYTES]
    return [(stored, MIN_TEXT), (_said(what, content), MIN_BINARY if binary else MIN_TEXT)]


def _said(what: str, content: bytes) -> bytes:
    """What of a file is no voxel: a header of NIfTI-1 or 2 with its extensions, or of DICOM."""
    if what == "dicom":
        return content.partition(_PIXELS)[0]
    if what == "nifti" and len(content) >= 352:
        order: Literal["little", "big"] = "little" if content[0] else "big"
        size = int.from_bytes(content[:4], order)
        code, at = ("f", 108) if size == 348 else ("q", 168)  # vox_offset
        (begin,) = struct.unpack_from(f"{'<' if order == 'little' else '>'}{code}", content, at)
        end = int(begin) if 352 <= begin <= len(content) else 352
        return content[:end]
    return content


def _inflated(content: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(content, MAX_TEXT_BYTES)
    except zlib.error:  # damaged: ingest says so
        return b""
