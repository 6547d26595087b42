"""What becomes of each DICOM element: the standard's table, and a layer that closes its gaps.

Source: PS3.15 table E.1-1 (2026c), the Basic Application Level Confidentiality Profile, as the
package dicom-anonymizer transcribes it. The table says nothing about elements that it does not
name; here they stay only where they are numbers, codes, or text of a short list that mentions
nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any

from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.tag import BaseTag, Tag

TABLE = "dicomfields_2026c"
EDITION = "PS3.15 2026c"


class Action(Enum):
    """What is done to an element."""

    REMOVE = "X"
    EMPTY = "Z"
    DUMMY = "D"
    UID = "U"
    KEEP = "K"
    DATE = "date"
    WORDS = "words"


_CATEGORIES: Mapping[str, Action] = {
    # where the table leaves a choice, the value goes and the element stays: whatever kind of
    # object it is, an element it needs is there
    "D_TAGS": Action.DUMMY,
    "Z_TAGS": Action.EMPTY,
    "X_TAGS": Action.REMOVE,
    "U_TAGS": Action.UID,
    "Z_D_TAGS": Action.DUMMY,
    "X_Z_TAGS": Action.EMPTY,
    "X_D_TAGS": Action.DUMMY,
    "X_Z_D_TAGS": Action.DUMMY,
    "X_Z_U_STAR_TAGS": Action.KEEP,  # sequences of references, whose UIDs are replaced inside
}

DEVICE = (
    "StationName", "DeviceSerialNumber", "DeviceUID", "GantryID", "DetectorID",
    "PerformedStationName", "PerformedStationAETitle",
)  # fmt: skip
"""Kept by the option that retains the device (PS3.15 E.3.8)."""
DESCRIPTORS = (
    "StudyDescription", "SeriesDescription", "ProtocolName", "PerformedProcedureStepDescription",
    "RequestedProcedureDescription", "AcquisitionProtocolDescription",
)  # fmt: skip
"""Reduced to words of the trade by the option that cleans descriptors (PS3.15 E.3.6)."""
WORDS = {
    "t1", "t2", "t2star", "pd", "flair", "stir", "dwi", "dti", "adc", "swi", "tof", "mra", "mrv",
    "mprage", "vibe", "dixon", "haste", "tse", "fse", "gre", "se", "epi", "bold", "rest", "fmri",
    "space", "tirm", "mp2rage", "flash", "fgre", "spgr", "ssfp", "trufi", "bssfp", "cine", "lge",
    "perfusion", "asl", "w", "weighted", "fs", "fatsat", "fat", "water", "in", "out", "opp",
    "phase", "mag", "magnitude", "inphase", "map", "mapping", "field", "ax", "axial", "tra",
    "transverse", "sag", "sagittal", "cor", "coronal", "sa", "short", "long", "axis", "oblique",
    "2d", "3d", "4d", "iso", "pre", "post", "km", "gd", "contrast", "native", "dynamic", "dyn",
    "delayed", "arterial", "venous", "early", "late", "head", "brain", "neck", "spine",
    "cervical", "thoracic", "lumbar", "abdomen", "pelvis", "liver", "kidney", "prostate",
    "breast", "heart", "cardiac", "knee", "hip", "shoulder", "ankle", "wrist", "hippocampus",
    "mr", "mri", "localizer", "scout", "survey", "left", "right", "lt", "rt", "b0", "b50", "b400",
    "b500", "b800", "b1000", "thin", "fast", "high", "res", "hires",
}  # fmt: skip
"""What a cleaned descriptor may say."""

TEXT = (
    "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "SequenceName",
    "PulseSequenceName", "ReceiveCoilName", "TransmitCoilName", "ImagedNucleus", "StackID",
    "CodeValue", "CodingSchemeDesignator", "CodingSchemeVersion", "CodeMeaning", "LongCodeValue",
    "RescaleType",
)  # fmt: skip
"""Text that stays: of the elements that the table does not name, what an MR image needs."""
SCHEMES = ("DCM", "SCT", "SRT", "SNM3", "UCUM", "RADLEX", "LN", "FMA", "NCIt", "NEU", "UMLS")
"""Coding schemes whose codes are public; of others, code and meaning are emptied."""

SHIFTED = (
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime",
    "FrameAcquisitionDateTime", "FrameReferenceDateTime", "StartAcquisitionDateTime",
    "EndAcquisitionDateTime", "PerformedProcedureStepStartDate", "PerformedProcedureStepEndDate",
    "PerformedProcedureStepStartDateTime", "PerformedProcedureStepEndDateTime",
)  # fmt: skip
"""Dates of the examination, which are shifted. Any other that were shifted along, such as that of a
device's manufacture, of a calibration or of an export, would give the shift away to whoever knows
it."""
TIMES = (
    "StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime", "PerformedProcedureStepStartTime",
    "PerformedProcedureStepEndTime", "ContrastBolusStartTime", "ContrastBolusStopTime",
)  # fmt: skip
"""Times of day that stay beside them."""

_TEXT, _DEVICE, _DESCRIPTORS, _SHIFTED, _TIMES_OF_DAY = (
    {Tag(n) for n in names} for names in (TEXT, DEVICE, DESCRIPTORS, SHIFTED, TIMES)
)
_NUMBERS_OF_STUDIES = Tag("OtherStudyNumbers")  # whole numbers that somebody typed in
BINARY = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}
_TIMES = {"DA", "DT", "TM"}
_FREE = {"LO", "LT", "SH", "ST", "UC", "UR", "UT"}
_TABLES = {Tag(n) for n in ("ModalityLUTSequence", "VOILUTSequence", "PresentationLUTSequence")}
PIXEL_DATA = Tag("PixelData")


@cache
def _table() -> tuple[dict[int, Action], list[tuple[int, int, Action]]]:
    """Actions by tag; and those of repeating groups by tag and mask."""
    from dicomanonymizer.dicomfields_selector import (  # type: ignore[import-untyped]
        dicom_anonymization_database_selector,
    )

    exact: dict[int, Action] = {}
    masked: list[tuple[int, int, Action]] = []
    tables: Mapping[str, list[Any]] = dicom_anonymization_database_selector(TABLE)
    for category, action in _CATEGORIES.items():
        for entry in tables[category]:
            tag = entry[0] << 16 | entry[1]
            if len(entry) == 4:
                masked.append((tag, entry[2] << 16 | entry[3], action))
            else:
                exact[tag] = action
    return exact, masked


def named(tag: BaseTag) -> Action | None:
    """What the standard's table says of an element; None where it says nothing."""
    exact, masked = _table()
    found = exact.get(int(tag))
    if found is not None:
        return found
    return next((a for t, mask, a in masked if int(tag) & mask == t), None)


def tags() -> list[BaseTag]:
    """Every element that the table names singly, sorted."""
    return [Tag(t) for t in sorted(_table()[0])]


def action(
    tag: BaseTag, vr: str, *, dates: bool = False, device: bool = False, descriptors: bool = False
) -> Action:
    """What becomes of an element.

    Args:
        tag: of the element.
        vr: its value representation.
        dates: shift the dates of the examination instead of dropping them.
        device: keep what names the device.
        descriptors: keep the words of the trade of what describes a series.
    """
    group = tag.group
    if tag.is_private or tag.element == 0 or group <= 0x0006:
        return Action.REMOVE
    if 0x5000 <= group <= 0x50FF or 0x6000 <= group <= 0x60FF:
        return Action.REMOVE  # curves and overlays, drawn by somebody
    if not dictionary_has_tag(tag):
        return Action.REMOVE
    if vr not in _kinds(tag):
        return Action.REMOVE  # what claims to be of another kind than the standard's
    if device and tag in _DEVICE:
        return Action.KEEP
    if descriptors and tag in _DESCRIPTORS:
        return Action.WORDS
    if dates and tag in _SHIFTED:
        return Action.DATE
    if dates and tag in _TIMES_OF_DAY:
        return Action.KEEP
    if tag == _NUMBERS_OF_STUDIES:
        return Action.REMOVE
    found = named(tag)
    if found is not None:
        return found
    if vr == "PN":
        return Action.EMPTY
    if vr in _TIMES:
        return Action.REMOVE
    if vr == "UI":
        return Action.UID
    if vr in BINARY:  # an image's own pixels are made anew; those of icons and tables go
        return Action.REMOVE
    if tag in _TABLES or tag == Tag("SpecificCharacterSet"):
        return Action.REMOVE
    if vr in _FREE and tag not in _TEXT:
        return Action.EMPTY
    return Action.KEEP


@cache
def _kinds(tag: BaseTag) -> frozenset[str]:
    """Value representations that the standard allows an element."""
    return frozenset(dictionary_VR(tag).split(" or "))
