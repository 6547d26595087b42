"""One DICOM object without the person in it: elements, pixels and file written anew.

Nothing of the source's bytes is carried over: the preamble and the file meta information are made
anew, compressed pixels are decoded, bits and bytes beside the stored ones are dropped.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import numpy as np
from pydicom._uid_dict import UID_dictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRLittleEndian

from synthmed import __version__
from synthmed.deid import profile
from synthmed.deid.needles import Needles
from synthmed.deid.profile import PIXEL_DATA, Action
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.formats import stack
from synthmed.formats.refusal import Refused

IMPLEMENTATION = "2.25.313131313131313131313131313131313131"
"""Of the software that writes the file (PS3.7 D.3.3.2)."""
MAX_DEPTH = 32
"""Levels of sequences within sequences."""
MAX_SHIFT_DAYS = 3650
"""How far dates move back at most."""
_IDENTIFYING = (
    "PatientID", "OtherPatientIDs", "AccessionNumber", "InstitutionName", "InstitutionAddress",
    "PatientAddress", "PatientTelephoneNumbers", "MedicalRecordLocator", "PatientBirthDate",
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "StudyID", "IssuerOfPatientID",
)  # fmt: skip
_TEXT = {"AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT", "AS"}
_DUMMY: dict[str, Any] = {
    "AS": "000Y", "DA": "19000101", "DT": "19000101000000", "TM": "000000", "DS": "0", "IS": "0",
    "UR": "urn:removed", "PN": "Removed",
    **dict.fromkeys(("AE", "CS", "LO", "LT", "SH", "ST", "UC", "UT"), "REMOVED"),
    **dict.fromkeys(("FD", "FL"), 0.0),
    **dict.fromkeys(("SL", "SS", "SV", "UL", "US", "UV"), 0),
    **dict.fromkeys(("OB", "UN"), b"\0\0"),
}  # fmt: skip
_CODES = (
    ("113100", "Basic Application Confidentiality Profile"),
    ("113105", "Clean Descriptors Option"),
    ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    ("113109", "Retain Device Identity Option"),
)
"""PS3.16 CID 7050."""


@dataclass(frozen=True)
class Options:
    """What is kept beyond the basic profile, by the options of PS3.15 annex E.

    Args:
        dates: shift dates by a number of days of the patient's own instead of dropping them.
        device: keep what names the device.
        descriptors: keep words of the trade in descriptions.
    """

    dates: bool = False
    device: bool = False
    descriptors: bool = False

    @property
    def codes(self) -> list[tuple[str, str]]:
        """Code and meaning of each method that was applied."""
        on = (True, self.descriptors, self.dates, self.device)
        return [code for code, applied in zip(_CODES, on, strict=True) if applied]


@dataclass
class Cleaner:
    """Makes clean objects under one key.

    Args:
        pseudonyms: of people and UIDs.
        options: what is kept.
        counts: what was done to elements, over all objects.
    """

    pseudonyms: Pseudonyms
    options: Options = Options()
    counts: Counter[str] = field(default_factory=Counter)

    def uid(self, value: str) -> str:
        """The UID that stands for an instance's own; UIDs of the standard stand for themselves."""
        if value in UID_dictionary or not value:
            return value
        return f"2.25.{int(self.pseudonyms.digest('uid', value)[:32], 16)}"

    def clean(self, source: Dataset) -> tuple[str, bytes]:
        """The patient's pseudonym, and a file.

        Args:
            source: a whole object; it is changed.

        Raises:
            Refused: it is no image, says that a name is drawn into it, or cannot be cleaned.
        """
        _check(source)
        identity = str(source.get("PatientID") or "").strip()
        if not identity:
            raise Refused("patient_missing", "Its PatientID is empty.")
        person = self.pseudonyms.patient(identity)
        names = set(_names(source))
        pixels = _pixels(source)
        shift = self._shift(identity)
        source.decode()
        self._walk(source, shift, Needles(names), 0)
        source.PixelData = pixels
        source["PixelData"].VR = "OW" if source.BitsAllocated > 8 else "OB"
        self._declare(source, person)
        content = self._file(source)
        if Needles(names).found_in(content[: len(content) - len(pixels)], shortest=4):
            raise Refused("identity_left")
        return person, content

    def _shift(self, identity: str) -> timedelta:
        """Days that a patient's dates move back: 1 to `MAX_SHIFT_DAYS`, the same for all."""
        number = int(self.pseudonyms.digest("dates", identity)[:16], 16)
        return timedelta(days=1 + number % MAX_SHIFT_DAYS)

    def _walk(self, data: Dataset, shift: timedelta, names: Needles, depth: int) -> None:
        """Clean a data set and all below it, in place."""
        if depth > MAX_DEPTH:
            raise Refused("header_unreadable", "Its sequences are nested too deeply.")
        for tag in list(data.keys()):
            if tag == PIXEL_DATA and depth == 0:
                continue
            try:
                element = data[tag]
                vr, value = element.VR, element.value
            except Exception:  # a value that cannot be read is not carried over
                del data[tag]
                self.counts["unreadable"] += 1
                continue
            what = profile.action(tag, vr, **vars(self.options))
            self.counts[what.value] += 1
            if what is Action.KEEP and vr == "SQ":
                for item in value:
                    self._walk(item, shift, names, depth + 1)
            elif what is Action.KEEP:
                if vr in _TEXT and names.found_in(_bytes(value), shortest=4):
                    data.add(DataElement(tag, vr, None))
                    self.counts["name in text"] += 1
            else:
                self._change(data, tag, vr, value, what, shift)

    def _change(
        self, data: Dataset, tag: BaseTag, vr: str, value: Any, what: Action, shift: timedelta
    ) -> None:
        """Do to one element what its action says."""
        if what is Action.REMOVE:
            del data[tag]
        elif what is Action.EMPTY:
            data.add(DataElement(tag, vr, Items() if vr == "SQ" else None))
        elif what is Action.UID:
            data.add(DataElement(tag, "UI", _each(value, lambda v: self.uid(str(v)))))
        elif what is Action.DATE:
            data.add(DataElement(tag, vr, _each(value, lambda v: _shifted(str(v), shift))))
        elif what is Action.WORDS:
            data.add(DataElement(tag, vr, " ".join(_words(str(value or "")))))
        elif vr == "UI":
            data.add(DataElement(tag, vr, _each(value, lambda v: self.uid(str(v)))))
        elif vr == "SQ":
            data.add(DataElement(tag, vr, Items([Dataset()])))
        elif vr in _DUMMY:
            data.add(DataElement(tag, vr, _DUMMY[vr]))
        else:
            del data[tag]

    def _declare(self, data: Dataset, person: str) -> None:
        """Say whose it is not, and what was done (PS3.15 E.1.1)."""
        data.SpecificCharacterSet = "ISO_IR 192"
        data.PatientID = data.PatientName = person
        data.PatientIdentityRemoved = "YES"
        data.DeidentificationMethod = f"synthmed {__version__}, {profile.EDITION} basic profile"
        codes = []
        for value, meaning in self.options.codes:
            code = Dataset()
            code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
            codes.append(code)
        data.DeidentificationMethodCodeSequence = codes
        data.LongitudinalTemporalInformationModified = (
            "MODIFIED" if self.options.dates else "REMOVED"
        )

    def _file(self, data: Dataset) -> bytes:
        """The object as a file of its own, uncompressed."""
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = data.SOPClassUID
        meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.ImplementationClassUID = UID(IMPLEMENTATION)
        meta.ImplementationVersionName = "SYNTHMED"
        fresh = Dataset()
        fresh.update(data)
        fresh.file_meta = meta
        out = io.BytesIO()
        fresh.save_as(out, enforce_file_format=True, little_endian=True, implicit_vr=False)
        return out.getvalue()


def _check(data: Dataset) -> None:
    """Let images pass that do not say that somebody's name is drawn into them."""
    if PIXEL_DATA not in data or not data.get("SOPClassUID") or not data.get("SOPInstanceUID"):
        raise Refused("no_pixels")
    if str(data.get("BurnedInAnnotation") or "").upper() == "YES":
        raise Refused("burned_in")
    if str(data.SOPClassUID).startswith("1.2.840.10008.5.1.4.1.1.7"):
        raise Refused("burned_in", "A screenshot (secondary capture).")


def _names(data: Dataset) -> Iterator[str]:
    """Strings of the source that must not be found in what is written."""
    for element in data.iterall():
        try:
            vr, value = element.VR, element.value
        except Exception:  # what cannot be read is not carried over either
            continue
        if vr == "PN":
            for name in value if isinstance(value, MultiValue) else [value]:
                yield from (p for p in re.split(r"[\^= ,]+", str(name or "")) if len(p) >= 4)
        elif element.keyword in _IDENTIFYING and value:
            every = value if isinstance(value, MultiValue) else [value]
            yield from (str(v).strip() for v in every if len(str(v).strip()) >= 4)


def _pixels(data: Dataset) -> bytes:
    """Stored bits of all frames, native and little endian, and nothing beside them.

    Raises:
        Refused: the pixels cannot be decoded, or are not as many as the header says.
    """
    try:
        frames = int(data.get("NumberOfFrames") or 1)
        if data.file_meta.TransferSyntaxUID.is_encapsulated:
            matrix = int(data.Rows), int(data.Columns)
            stack.check_codestreams(bytes(data.PixelData), frames, matrix)
            data.decompress(generate_instance_uid=False)
        n = frames * data.Rows * data.Columns * int(data.get("SamplesPerPixel", 1))
        allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
        signed, high = int(data.PixelRepresentation), int(data.get("HighBit", stored - 1))
        big = data.file_meta.TransferSyntaxUID.is_little_endian is False
    except Refused:
        raise
    except Exception:  # decoders raise anything on damaged pixels
        raise Refused("header_unreadable", "Its pixels cannot be decoded.") from None
    if allocated not in (8, 16, 32) or not 1 <= stored <= high + 1 <= allocated:
        raise Refused("header_unreadable", "Its bit layout is not a possible one.")
    raw = bytes(data.PixelData)
    size = n * allocated // 8
    if len(raw) < size:
        raise Refused("truncated", "Its pixels end early.")
    kind = np.dtype(f"{'>' if big else '<'}{'i' if signed else 'u'}{allocated // 8}")
    values = np.frombuffer(raw, kind, n).astype(kind.newbyteorder("<"))
    # bits outside the stored ones may hold an overlay
    kept = np.right_shift(np.left_shift(values, allocated - 1 - high), allocated - stored)
    data.HighBit = stored - 1
    content: bytes = kept.astype(kind.newbyteorder("<")).tobytes()
    return content + bytes(len(content) % 2)


def _each(value: Any, change: Any) -> Any:
    """A changed value, or each of several."""
    if isinstance(value, MultiValue | list | tuple):
        return [change(v) for v in value]
    return change(value) if value not in (None, "") else None


def _shifted(text: str, shift: timedelta) -> str:
    """A date, or a date and time, moved back; empty where it is no date."""
    found = re.fullmatch(
        r"(\d{4})(\d{2})(\d{2})(\d{0,6}(?:\.\d{1,6})?)(?:[+-]\d{4})?", text.strip()
    )
    if not found:
        return ""
    try:
        day = date(int(found[1]), int(found[2]), int(found[3])) - shift
    except (ValueError, OverflowError):
        return ""
    return f"{day:%Y%m%d}{found[4]}"


def _words(text: str) -> list[str]:
    """Words of the trade in a description, in its order."""
    return [w for w in re.split(r"[^a-z0-9]+", text.lower()) if w in profile.WORDS]


def _bytes(value: Any) -> bytes:
    """A text value as it would be written."""
    every: Iterable[Any] = value if isinstance(value, MultiValue) else [value]
    return "\\".join(str(v) for v in every).encode("utf-8", "replace")
