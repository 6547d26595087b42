"""One DICOM object without the person in it: elements, pixels and file written anew.

Nothing of the source's bytes is carried over: the preamble and the file meta information are made
anew, compressed pixels are decoded, bits and bytes beside the stored ones are dropped.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Literal

import numpy as np
from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRLittleEndian

from synthmed import __version__
from synthmed.deid import pixels, profile
from synthmed.deid.needles import Needles
from synthmed.deid.profile import PIXEL_DATA, Action
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.formats import stack
from synthmed.formats.refusal import Refused

IMPLEMENTATION = "2.25.313131313131313131313131313131313131"
"""Of the software that writes the file (PS3.7 D.3.3.2)."""
MAX_DEPTH = 32
"""Levels of sequences within sequences."""
MAX_VALUE_BYTES = 1 << 20
"""Bytes of a value that is no binary data."""
MAX_PIXEL_BYTES = 1 << 29
"""Bytes of an image's pixels, decoded."""
MAX_SHIFT_DAYS = 3650
"""How far dates move back at most."""
FIRST_YEAR = 1980
"""No magnetic resonance image of a patient is older: an earlier date is a placeholder."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_NAMES = ("InstitutionName", "InstitutionalDepartmentName", "RequestingService", "PatientAddress")
_OWN = "synthmed basic profile application confidentiality option clean descriptors retain device"
"""Words that stand in every file that is written."""
_IDENTIFYING = (
    "PatientID", "OtherPatientIDs", "AccessionNumber", "InstitutionName", "InstitutionAddress",
    "PatientAddress", "PatientTelephoneNumbers", "MedicalRecordLocator", "PatientBirthDate",
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "StudyID", "IssuerOfPatientID",
    "AdmissionID", "RequestedProcedureID", "PerformedProcedureStepID", "FrameOfReferenceUID",
)  # fmt: skip
_TEXT = {"AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT", "AS"}
_LARGE = profile.BINARY | {"OB or OW", "SQ"}
_FORM = {
    "DS": re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"),
    "IS": re.compile(r"\s*[+-]?\d+\s*"),
    "TM": re.compile(r"\s*\d{2}(\d{2}){0,2}(\.\d{1,6})?\s*"),
    "AS": re.compile(r"\d{3}[DWMY]"),
    "CS": re.compile(r"[A-Z0-9 _]{0,16}"),
}
"""What a value of a kind looks like (PS3.5 table 6.2-1)."""
_DRAWN = {"DV", "DI", "DF", "WSD", "SD", "SI", "DRW"}
"""Values of ConversionType for what was drawn, scanned or photographed."""
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
    ("113101", "Clean Pixel Data Option"),
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
        text: what becomes of text that is drawn into pixels: kept and not searched for, painted
            over, or a reason to refuse the object.
    """

    dates: bool = False
    device: bool = False
    descriptors: bool = False
    text: Literal["keep", "mask", "refuse"] = "keep"

    @property
    def codes(self) -> list[tuple[str, str]]:
        """Code and meaning of each method that was applied."""
        on = (True, self.text == "mask", self.descriptors, self.dates, self.device)
        return [code for code, applied in zip(_CODES, on, strict=True) if applied]


@dataclass
class Cleaner:
    """Makes clean objects under one key.

    Args:
        pseudonyms: of people and UIDs.
        options: what is kept.
        counts: what was done to elements, over all objects.
        n_text_masked: objects in which text was painted over.
    """

    pseudonyms: Pseudonyms
    options: Options = Options()
    counts: Counter[str] = field(default_factory=Counter)
    n_text_masked: int = 0

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
            Refused: it is no image, has a name drawn into it that stays, or cannot be cleaned.
            UsageError: text is to be searched for, and what does that is not installed.
        """
        _check_depth(source)
        _check(source, drawn=self.options.text == "mask")
        identity = str(source.get("PatientID") or "").strip()
        if not identity:
            raise Refused("patient_missing", "Its PatientID is empty.")
        person = self.pseudonyms.patient(identity)
        names = _Names(source)
        stored = self._without_text(source, _pixels(source))
        shift = self._shift(identity)
        source.decode()
        self._walk(source, shift, names, 0)
        source.PixelData = stored
        source["PixelData"].VR = "OW" if source.BitsAllocated > 8 else "OB"
        self._declare(source, person)
        content = self._file(source)
        if names.needles.found_in(content[: len(content) - len(stored)], shortest=4):
            raise Refused("identity_left")
        return person, content

    def _without_text(self, data: Dataset, stored: bytes) -> bytes:
        """Pixels without the text that is drawn into them, as far as it is searched for."""
        if self.options.text == "keep":
            return stored
        samples = int(data.get("SamplesPerPixel") or 1)
        kind = f"<{'i' if data.PixelRepresentation else 'u'}{int(data.BitsAllocated) // 8}"
        size = int(data.get("NumberOfFrames") or 1) * samples * int(data.Rows) * int(data.Columns)
        values = np.frombuffer(stored, kind, size)
        # each colour is looked through by itself: (images, rows, columns)
        apart = samples > 1 and not data.get("PlanarConfiguration")
        shape = (-1, int(data.Rows), int(data.Columns))
        planes = values.reshape(shape)
        if apart:
            planes = np.moveaxis(values.reshape(*shape, samples), -1, 1).reshape(shape)
        if self.options.text == "refuse":
            if pixels.found(planes):
                raise Refused("burned_in")
            return stored
        clean, masked = pixels.painted(planes)
        if "YES" in _values(data, "BurnedInAnnotation") and not masked.any():
            raise Refused("burned_in", "It says so, and the search does not find it.")
        if not masked.any():
            return stored
        self.n_text_masked += 1
        if samples > 1:  # what is drawn in one colour may show a little in the others
            colours = clean.reshape(-1, samples, *shape[1:])
            letters = masked.reshape(colours.shape).any(1, keepdims=True)
            dark = colours.min(axis=(2, 3), keepdims=True)
            clean = np.where(letters, dark, colours).reshape(planes.shape)
        if apart:
            clean = np.moveaxis(clean.reshape(-1, samples, *shape[1:]), 1, -1)
        return clean.tobytes() + stored[clean.nbytes :]

    def _shift(self, identity: str) -> timedelta:
        """Days that a patient's dates move back: 1 to `MAX_SHIFT_DAYS`, the same for all."""
        number = int(self.pseudonyms.digest("dates", identity)[:16], 16)
        return timedelta(days=1 + number % MAX_SHIFT_DAYS)

    def _walk(self, data: Dataset, shift: timedelta, names: _Names, depth: int) -> None:
        """Clean a data set and all below it, in place."""
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
            what = profile.action(
                tag,
                vr,
                dates=self.options.dates,
                device=self.options.device,
                descriptors=self.options.descriptors,
            )
            self.counts[what.value] += 1
            if what is Action.KEEP and vr == "SQ":
                for item in value:
                    self._walk(item, shift, names, depth + 1)
            elif what is Action.KEEP:
                texts = [str(v) for v in _several(value)]
                if vr in _FORM and not all(_FORM[vr].fullmatch(t) for t in texts):
                    data.add(DataElement(tag, vr, None))
                    self.counts["not of its kind"] += 1
                elif vr in _TEXT and any(names.occur_in(t) for t in texts):
                    data.add(DataElement(tag, vr, None))
                    self.counts["name in text"] += 1
            else:
                self._change(data, tag, vr, value, what, shift)
        if "CodeMeaning" in data and data.get("CodingSchemeDesignator") not in profile.SCHEMES:
            for name in ("CodeValue", "LongCodeValue", "CodeMeaning"):
                if name in data:
                    data[name].value = None
            self.counts["code of a private scheme"] += 1

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
            data.add(DataElement(tag, vr, _each(value, lambda v: _shifted(str(v), shift, vr))))
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
        if self.options.text != "keep":
            data.BurnedInAnnotation = "NO"
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


_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"})


class _Names:
    """What would give away whose an object is.

    Args:
        data: the object as it came.
    """

    def __init__(self, data: Dataset) -> None:
        people: set[str] = set()
        numbers: set[str] = set()
        for element in data.iterall():
            try:
                vr, value = element.VR, element.value
            except Exception:  # what cannot be read is not carried over either
                continue
            every = [str(v).strip() for v in _several(value)]
            named = "PN" in (vr, dictionary_VR(element.tag) if element.keyword else "")
            if named or element.keyword in _NAMES:
                people |= {part for v in every for part in re.split(r"[^\w]+|_", v)}
            elif element.keyword in _IDENTIFYING and value:
                numbers |= set(every)
        spelt = {f for p in people for f in _foldings(p)}
        self._folded = {f for f in spelt if len(f) >= (3 if f.isascii() else 2)}
        # shorter ones as words of their own: Ng, Li
        short = {f for f in spelt - self._folded if f.isalpha() and (len(f) > 1 or not f.isascii())}
        self._words = short - profile.WORDS
        self._folded |= {f for n in numbers if len(f := _folded(n).lstrip("0")) >= 4}
        # numbers that are names: MUELLER_ANNA
        parts = {part for n in numbers for part in re.findall(r"[^\W\d_]{5,}", n)}
        self._folded |= {f for part in parts for f in _foldings(part)}
        # short numbers and words of our own are in any file
        own = {_folded(str(v)) for v in _DUMMY.values()} | set(_OWN.split())
        kept = {n for n in people | numbers if len(n) >= 4 and _folded(n) not in own}
        self.needles = Needles({n for n in kept if not _common(n)})

    def occur_in(self, text: str) -> bool:
        """Whether a text that would stay holds a part of them, however it is spelt."""
        words = {f for word in re.split(r"[\W_]+", text) for f in _foldings(word)}
        whole = _foldings(text)
        return bool(words & self._words) or any(n in f for f in whole for n in self._folded)


def _common(number: str) -> bool:
    """Whether a number, or a UID of few digits, is found in any file by chance."""
    return number.replace(".", "").isdigit() and len(number) < (12 if "." in number else 6)


def _foldings(text: str) -> set[str]:
    """Without case and accents, an umlaut as one letter or as two."""
    spelt = unicodedata.normalize("NFC", text.casefold()).translate(_UMLAUTS)
    return {_folded(text), _folded(spelt)}


def _folded(text: str) -> str:
    """Letters and digits alone, without case and accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in plain if c.isalnum())


def _check_depth(data: Dataset) -> None:
    """Refuse deep nesting and huge values before anything looks at all of them.

    Libraries recurse over sequences and convert values as a whole.
    """
    level: list[Dataset] = [data]
    for _ in range(MAX_DEPTH + 1):
        below: list[Dataset] = []
        for one in level:
            for tag in list(one.keys()):
                raw = one.get_item(tag)
                vr = getattr(raw, "VR", None)
                length = getattr(raw, "length", 0) or 0
                known = dictionary_VR(tag) if dictionary_has_tag(tag) else "UN"
                kind = known if vr in ("UN", None) else vr  # what it will be converted to
                if kind not in _LARGE and 0xFFFFFFFF > length > MAX_VALUE_BYTES:
                    raise Refused("oversized", f"The limit is {MAX_VALUE_BYTES >> 20} MiB a value.")
                if vr in ("SQ", "UN", None):
                    element = one[tag]
                    below += element.value if element.VR == "SQ" else []
        if not below:
            return
        level = below
    raise Refused("header_unreadable", "Its sequences are nested too deeply.")


def _check(data: Dataset, drawn: bool) -> None:
    """Let images pass that do not say that somebody's name is drawn into them.

    Args:
        drawn: let those pass that say so in `BurnedInAnnotation`.
    """
    if PIXEL_DATA not in data or not data.get("SOPClassUID") or not data.get("SOPInstanceUID"):
        raise Refused("no_pixels")
    kind, *more = _values(data, "SOPClassUID")
    if not drawn and "YES" in _values(data, "BurnedInAnnotation"):
        raise Refused("burned_in")
    if more or kind == SECONDARY_CAPTURE or kind.startswith(f"{SECONDARY_CAPTURE}."):
        raise Refused("burned_in", "A screenshot (secondary capture).")
    screen = _DRAWN & {*_values(data, "ConversionType")}
    if screen or any("SCREEN" in t for t in _values(data, "ImageType")):
        raise Refused("burned_in", "A screenshot or a scanned image.")
    if "PALETTE COLOR" in _values(data, "PhotometricInterpretation"):
        raise Refused("rgb", "Its palette is not carried over.")
    if "ModalityLUTSequence" in data:
        raise Refused("photometric_unsupported", "Its lookup table is not carried over.")


def _values(data: Dataset, name: str) -> list[str]:
    """An element's values as stripped text in capitals."""
    return [str(v).strip().upper() for v in _several(data.get(name))]


def _several(value: Any) -> list[Any]:
    """An element's values, none where it is empty."""
    every = value if isinstance(value, MultiValue | list | tuple) else [value]
    return [v for v in every if v is not None]


def _pixels(data: Dataset) -> bytes:
    """Stored bits of all frames, native and little endian, and nothing beside them.

    Raises:
        Refused: the pixels cannot be decoded, or are not as many as the header says.
    """
    try:
        syntax = stack.syntax_of(data)
        sizes = [int(data.get(k) or 1) for k in ("NumberOfFrames", "SamplesPerPixel")]
        sizes += [int(data.Rows), int(data.Columns)]
        n = math.prod(sizes)
        if min(sizes) < 1 or n * int(data.BitsAllocated) // 8 > MAX_PIXEL_BYTES:
            raise Refused("oversized", f"The limit is {MAX_PIXEL_BYTES >> 20} MiB of pixels.")
        if syntax.is_encapsulated:
            stack.check_codestreams(bytes(data.PixelData), sizes[0], (sizes[2], sizes[3]))
            data.decompress(generate_instance_uid=False)
        allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
        signed, high = int(data.PixelRepresentation), int(data.get("HighBit", stored - 1))
        big = not syntax.is_encapsulated and not syntax.is_little_endian
        raw = stack.pixel_bytes(data)
    except Refused:
        raise
    except Exception:  # decoders raise anything on damaged pixels
        raise Refused("header_unreadable", "Its pixels cannot be decoded.") from None
    if allocated not in (8, 16, 32) or not 1 <= stored <= high + 1 <= allocated:
        raise Refused("header_unreadable", "Its bit layout is not a possible one.")
    size = n * allocated // 8
    if len(raw) < size:
        raise Refused("truncated", "Its pixels end early.")
    values = np.frombuffer(raw, f"{'>' if big else '<'}u{allocated // 8}", n)
    kept = stack.stored_values(values, allocated, stored, high, signed)
    data.HighBit = stored - 1
    content: bytes = kept.astype(kept.dtype.newbyteorder("<")).tobytes()
    return content + bytes(len(content) % 2)


def _each(value: Any, change: Any) -> Any:
    """A changed value, or each of several."""
    if isinstance(value, MultiValue | list | tuple):
        return [change(v) for v in value]
    return change(value) if value not in (None, "") else None


def _shifted(text: str, shift: timedelta, vr: str) -> str:
    """A date, or a date and time, moved back; empty where it is none of a scan.

    Placeholders such as 1900-01-01, moved along, would say by how much.
    """
    found = re.fullmatch(
        r"(\d{4})(\d{2})(\d{2})(\d{0,6}(?:\.\d{1,6})?)(?:[+-]\d{4})?", text.strip()
    )
    if not found or (vr == "DA" and found[4]) or int(found[1]) < FIRST_YEAR:
        return ""
    try:
        day = date(int(found[1]), int(found[2]), int(found[3])) - shift
    except (ValueError, OverflowError):
        return ""
    return f"{day:%Y%m%d}{found[4]}"


def _words(text: str) -> list[str]:
    """Words of the trade in a description, in its order."""
    return [w for w in re.split(r"[^a-z0-9]+", text.lower()) if w in profile.WORDS]
