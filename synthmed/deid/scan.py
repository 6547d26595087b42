"""The identifier scan: does anything in a release folder point at a person?

It looks at bytes, not at what a library shows of them: every file is read whole, .gz files and
the images and volumes inside a page are unpacked first. A finding never repeats the text that was
found, and a file name is shown only when it follows our own scheme.

| looked at | a finding when |
|---|---|
| paths | not of the release's own scheme; a link |
| every byte | a forbidden string (any case; UTF-8, Latin-1, UTF-16) or a pseudonym |
| text files | a DICOM UID, a DICOM person name (FAMILY^GIVEN), a DICOM file mark |
| gzip | a stored name, comment or time; more than the bound when unpacked; damage |
| NIfTI | a header that is not NIfTI-1, text in any text field, an extension |
| PNG | a text, time or EXIF chunk |
| JSON sidecars | a key outside the exporter's allow-list |

Limits: an identifier that is neither in the caller's list nor of these patterns is not seen, nor
is text drawn into the voxels. Inside binary data only strings of `MIN_BINARY` characters or more
are searched, since shorter ones occur there by chance.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from synthmed.deid.needles import MIN_TEXT, Needles
from synthmed.formats.bids_export import DATASET_KEYS, SIDECAR_KEYS
from synthmed.types import Frozen

__all__ = ["MIN_BINARY", "MIN_TEXT", "Finding", "scan"]

MIN_BINARY = 8
"""Characters of the shortest forbidden string that is searched in voxels and compressed images."""

MAX_INFLATED_BYTES = 1 << 30

_SUB = r"sub-syn\d{4,}"
_SCHEME = re.compile(
    r"(dataset_description\.json|participants\.(tsv|json)|README\.md|\.bidsignore|MODEL_CARD\.md"
    r"|DATASHEET\.md|croissant\.json|SHA256SUMS|report|report/report\.(json|html)|report/images"
    rf"|report/images/synthetic-\d+\.png|report/viewer|report/viewer/synthetic-\d+\.nii\.gz|{_SUB}|{_SUB}/[a-z0-9]+"
    rf"|(?P<sub>{_SUB})/[a-z0-9]+/(?P=sub)(_seg-[A-Za-z0-9]+)?_[A-Za-z0-9]+\.(nii\.gz|json|tsv))"
)
_OURS = re.compile(rf"{_SUB}(?![0-9])".encode())
_PSEUDONYM = re.compile(rb"(?<![0-9a-zA-Z])p[0-9a-f]{16}(?![0-9a-zA-Z])")
_UID = re.compile(rb"(?<![0-9.])[012](\.(0|[1-9]\d*)){5,}(?![0-9.]*\d)")
_PERSON = re.compile(rb"[A-Za-z\x80-\xff]{2,}\^[A-Za-z\x80-\xff]{2,}")
_EMBEDDED = re.compile(rb"data:image/png;base64,([A-Za-z0-9+/=]+)")
_EMBEDDED_GZIP = re.compile(rb'"(H4sI[A-Za-z0-9+/=]+)"')  # how the first three bytes of gzip read
_NIFTI_TEXT = (  # name, offset, bytes: the text fields of the 348-byte NIfTI-1 header
    ("data_type", 4, 10),
    ("db_name", 14, 18),
    ("descrip", 148, 80),
    ("aux_file", 228, 24),
    ("intent_name", 328, 16),
)


class Finding(Frozen):
    """One thing that blocks a release.

    Args:
        path: file inside the folder; "(foreign name)" after its folder where the name itself may
            identify someone.
        kind: short and fixed, fit to be counted.
        detail: what it is, without the text that was found.
    """

    path: str
    kind: str
    detail: str


@dataclass(frozen=True)
class _Found:
    kind: str
    detail: str


def scan(
    folder: Path, *, forbidden: Collection[str] = (), own: Collection[bytes] = ()
) -> list[Finding]:
    """Search a release folder for identifiers; an empty list lets it pass.

    Args:
        folder: the release.
        forbidden: strings that must not occur, such as pseudonyms and the source's file names;
            those shorter than `MIN_TEXT` characters are not searched.
        own: long texts of this program, such as a viewer, that may stand in a file whole; a file
            name of the source may well be a word of theirs.

    Returns:
        Findings in the order of their paths.
    """
    needles = Needles(forbidden)
    findings = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        ours = _SCHEME.fullmatch(name) is not None
        parent = path.parent.relative_to(folder).as_posix()
        shown = name if ours else "(foreign name)"
        if not ours and _SCHEME.fullmatch(parent):
            shown = f"{parent}/(foreign name)"
        found: list[_Found] = []
        if not ours:
            found.append(_Found("file name", "a name that this program does not give"))
        if path.is_symlink():
            found.append(_Found("link", "a symbolic link"))
        elif path.is_file():
            content = path.read_bytes()
            for text in own:
                content = content.replace(text, b"")
            found += dict.fromkeys(_in_file(name, content, needles))
        findings += [Finding(path=shown, kind=f.kind, detail=f.detail) for f in found]
    return findings


def mentions(text: str, forbidden: Collection[str]) -> bool:
    """Whether a text that is about to be released holds an identifier."""
    return any(True for _ in _in_text("", text.encode(), Needles(forbidden)))


def _in_file(name: str, content: bytes, needles: Needles) -> Iterator[_Found]:
    if content[:2] == b"\x1f\x8b":
        yield from _in_gzip(name, content, needles)
    elif content[:8] == b"\x89PNG\r\n\x1a\n":
        yield from _in_png(content, needles)
    elif name.endswith(".nii"):
        yield from _in_nifti(content, needles)
    else:
        yield from _in_text(name, content, needles)


def _in_text(name: str, content: bytes, needles: Needles) -> Iterator[_Found]:
    for match in _EMBEDDED.finditer(content):
        try:
            yield from _in_png(base64.b64decode(match[1], validate=True), needles)
        except binascii.Error:
            yield _Found("damaged", "an embedded image that cannot be decoded")
    for match in _EMBEDDED_GZIP.finditer(content):
        try:
            volume = base64.b64decode(match[1], validate=True)
            yield from _in_gzip("embedded.nii.gz", volume, needles)
        except binascii.Error:
            yield _Found("damaged", "an embedded volume that cannot be decoded")
    content = _EMBEDDED_GZIP.sub(b"", _EMBEDDED.sub(b"", content))
    yield from _everywhere(content, needles, shortest=MIN_TEXT)
    if content[128:132] == b"DICM":
        yield _Found("DICOM", "a DICOM file")
    if _UID.search(content):
        yield _Found("DICOM UID", "something that reads as a DICOM UID")
    if _PERSON.search(content):
        yield _Found("person name", "something that reads as a DICOM person name")
    if name.endswith(".json"):
        yield from _in_json(name, content)


def _in_json(name: str, content: bytes) -> Iterator[_Found]:
    """Keys of sidecars and of dataset_description.json; the other JSON files are free of both."""
    allowed = SIDECAR_KEYS if name.startswith("sub-") else DATASET_KEYS
    if not name.startswith("sub-") and name != "dataset_description.json":
        return
    keys: list[str] = []

    def collect(pairs: list[tuple[str, object]]) -> None:
        keys.extend(key for key, _ in pairs)

    try:
        json.loads(content, object_pairs_hook=collect)
    except (ValueError, RecursionError):
        yield _Found("damaged", "not valid JSON")
    n = sum(key not in allowed for key in keys)
    if n:
        yield _Found("JSON key", f"{n} keys outside the allow-list")


def _in_gzip(name: str, content: bytes, needles: Needles) -> Iterator[_Found]:
    if len(content) < 18 or content[3] & 0b11100 or content[4:8] != b"\0\0\0\0":
        yield _Found("gzip header", "a stored file name, comment, extra field or time")
    unpack = zlib.decompressobj(wbits=31)
    try:
        inner = unpack.decompress(content, MAX_INFLATED_BYTES)
    except zlib.error:
        yield _Found("damaged", "a gzip file that cannot be unpacked")
        return
    if unpack.unconsumed_tail:
        yield _Found("too large", f"unpacks to more than {MAX_INFLATED_BYTES} bytes")
    elif not unpack.eof or unpack.unused_data:
        yield _Found("damaged", "a gzip file that is cut off or followed by other bytes")
    if name.endswith(".nii.gz"):
        yield from _in_nifti(inner, needles)
    else:
        yield from _in_text(name.removesuffix(".gz"), inner, needles)


def _in_nifti(content: bytes, needles: Needles) -> Iterator[_Found]:
    if len(content) < 352 or content[344:348] != b"n+1\0":
        yield _Found("NIfTI header", "not a single-file NIfTI-1")
        yield from _everywhere(content, needles, shortest=MIN_TEXT)
        return
    for field, offset, size in _NIFTI_TEXT:
        if content[offset : offset + size].strip(b"\0"):
            yield _Found("NIfTI header", f"text in {field}")
    order = "<" if content[:4] == b"\x5c\x01\0\0" else ">"
    begin = int(struct.unpack(f"{order}f", content[108:112])[0])
    if content[348:352] != b"\0\0\0\0" or begin != 352:
        yield _Found("NIfTI header", "an extension, or bytes between header and voxels")
    yield from _everywhere(content[:352], needles, shortest=MIN_TEXT)
    yield from _everywhere(content[352:], needles, shortest=MIN_BINARY)


def _in_png(content: bytes, needles: Needles) -> Iterator[_Found]:
    position = 8
    while position + 8 <= len(content):
        (size,) = struct.unpack(">I", content[position : position + 4])
        kind = content[position + 4 : position + 8]
        if kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            yield _Found("PNG chunk", "a chunk that is not pixels")
        position += 12 + size
    yield from _everywhere(content, needles, shortest=MIN_BINARY)


def _everywhere(content: bytes, needles: Needles, *, shortest: int) -> Iterator[_Found]:
    content = _OURS.sub(b" ", content)  # the 0001 of sub-syn0001 is nobody's number
    if needles.found_in(content, shortest=shortest):
        yield _Found("forbidden text", "a string of the list that must not leave")
    if _PSEUDONYM.search(content):
        yield _Found("pseudonym", "something that reads as a patient's pseudonym")
