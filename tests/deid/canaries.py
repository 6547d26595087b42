"""Strings and numbers that stand for an identity, in every element and place that may hold one."""

from __future__ import annotations

from typing import Any

from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag, Tag

from synthmed.deid import profile

CANARY = "Zuleika"
LEFT = (b"zuleika", b"fotheringay", b"862177", b"18621217")
"""What is searched for, in lower case."""
UNNAMED = "FrameAnatomySequence"
"""A sequence that the table says nothing about."""
PREAMBLE = (CANARY * 20).encode()[:128]
_VALUES: dict[str, Any] = {
    "DA": "18621217", "DT": "18621217062121", "TM": "062121", "AS": "062Y", "UR": "http://Zuleika",
    "PN": "Zuleika^Fotheringay", "OB": b"Zuleika!", "UN": b"Zuleika!", "UI": "1.2.862177.1",
    "AE": CANARY, "CS": "ZULEIKA", "LO": CANARY, "LT": CANARY, "SH": CANARY, "ST": CANARY,
    "UC": CANARY, "UT": CANARY, "DS": "8.62177", "IS": "862177", "US": 62177, "SS": 21776,
    "FD": 8.62177, "FL": 8.62177,
}  # fmt: skip


def tags() -> list[BaseTag]:
    """Every element of the standard's table that may be in an image: groups up to 0006 are of
    messages, files and directories."""
    return [t for t in profile.tags() if t.group > 0x0006]


def planted(tag: BaseTag) -> DataElement:
    """An element of the table with a value that can be recognised."""
    vr = dictionary_VR(tag) if dictionary_has_tag(tag) else "LO"
    if vr == "SQ":
        inner = Dataset()
        inner.add(DataElement(Tag("TextValue"), "UT", f"{CANARY} in a sequence"))
        inner.add(DataElement(Tag("CodeMeaning"), "LO", CANARY))
        return DataElement(tag, vr, Items([inner]))
    return DataElement(tag, vr, _VALUES[vr])


def plant(data: Dataset, depth: int) -> None:
    """Put all of them into a data set, or that deep into sequences that the table does not name."""
    for _ in range(depth):
        inner = Dataset()
        setattr(data, UNNAMED, Items([inner]))
        data = inner
    for tag in tags():
        if depth or tag not in (Tag("SOPInstanceUID"), Tag("PatientID")):
            data.add(planted(tag))


def plant_beside(data: Dataset, only: str | None = None) -> None:
    """Plant in places that no table names; `PLACES` lists them.

    Args:
        data: an object with 16-bit pixels.
        only: one of `PLACES`, else all.
    """
    for name, put in PLACES.items():
        if only in (None, name):
            put(data)


def _private(data: Dataset) -> None:
    data.private_block(0x0009, f"{CANARY} CREATOR", create=True).add_new(1, "LO", CANARY)
    data.add_new((0x0087, 0x1234), "LO", CANARY)  # without a creator


def _unknown(data: Dataset) -> None:
    data.add_new((0x0088, 0x7777), "LO", CANARY)


def _overlay(data: Dataset) -> None:
    data.add_new((0x6000, 0x3000), "OW", CANARY.encode() + b"!")
    data.add_new((0x6002, 0x0022), "LO", CANARY)


def _curve(data: Dataset) -> None:
    data.add_new((0x5000, 0x3000), "OW", CANARY.encode() + b"!")


def _deep(data: Dataset) -> None:
    for _ in range(12):
        inner = Dataset()
        setattr(data, UNNAMED, Items([inner]))
        data = inner
    data.PatientName = f"{CANARY}^Fotheringay"
    data.private_block(0x0029, "X", create=True).add_new(1, "OB", CANARY.encode() + b"!")
    data.add_new((0x0028, 0x3006), "OW", CANARY.encode() + b"!")
    data.PixelData = CANARY.encode() + b"!"
    data["PixelData"].VR = "OB"


def _bits(data: Dataset) -> None:
    """One letter a pixel in the four bits above twelve stored ones, and text behind the pixels."""
    data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, 0
    pixels = bytearray(data.PixelData)
    pixels[1::2] = bytes((b & 0x0F) | 0xA0 for b in pixels[1::2])
    data.PixelData = bytes(pixels) + CANARY.encode() + b"!"


def _meta(data: Dataset) -> None:
    data.file_meta.SourceApplicationEntityTitle = CANARY
    data.file_meta.PrivateInformationCreatorUID = "1.2.862177"
    data.file_meta.PrivateInformation = CANARY.encode() + b"!"


def _text(data: Dataset) -> None:
    """The patient's name in an element that the standard keeps."""
    data.PatientName = f"{CANARY}^Fotheringay"
    data.Manufacturer = "Fotheringay Imaging"


PLACES = {
    "private elements": _private,
    "unknown elements": _unknown,
    "overlays": _overlay,
    "curves": _curve,
    "deep sequences": _deep,
    "bits and bytes beside the pixels": _bits,
    "file meta information": _meta,
    "a kept element": _text,
}
