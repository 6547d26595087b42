"""De-identification: every element of the standard's table, and every place beside them."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from pydicom.datadict import dictionary_has_tag
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, RLELossless
from typer.testing import CliRunner

from synthmed import cli
from synthmed.deid import profile
from synthmed.deid.clean import Cleaner, Options
from synthmed.deid.profile import Action
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.deidentify import RECEIPT, deidentify, refused_list
from synthmed.errors import InputError, ResourceError, UsageError
from synthmed.formats import dicom, stack
from synthmed.formats.refusal import Refused, quiet

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
import canaries
import make
from canaries import CANARY

AFFINE = np.diag([-2.0, 1.5, 3, 1])
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with quiet():
        yield


def image(folder: Path, change: Any = lambda ds: None, **words: Any) -> Dataset:
    """One slice of a series, as it is read from its file."""
    data = make.voxels(0)[..., :1]
    make.series(folder, data, AFFINE, lambda k, ds: change(ds), **words)
    (path,) = folder.iterdir()
    return dicom.dataset(path, None, stop_before_pixels=False)


def cleaned(data: Dataset, options: Options = Options()) -> tuple[Dataset, bytes]:
    _, content = Cleaner(Pseudonyms(KEY), options).clean(data)
    return pydicom.dcmread(io.BytesIO(content)), content


# what the codes of PS3.15 table E.1-1 allow; of two choices either, as the kind of object needs
ALLOWED = {
    "D_TAGS": {"replaced"},
    "Z_TAGS": {"emptied", "replaced"},
    "X_TAGS": {"gone"},
    "U_TAGS": {"replaced"},
    "Z_D_TAGS": {"emptied", "replaced"},
    "X_Z_TAGS": {"gone", "emptied", "replaced"},
    "X_D_TAGS": {"gone", "replaced"},
    "X_Z_D_TAGS": {"gone", "emptied", "replaced"},
    "X_Z_U_STAR_TAGS": {"gone", "emptied", "replaced"},
}


def became(tag: BaseTag, found: Dataset) -> str:
    """What a canary has become."""
    before = canaries.planted(tag)
    if tag not in found:
        return "gone"
    after = found[tag]
    if after.value in (None, "", b"") or (after.VR == "SQ" and not after.value):
        return "emptied"
    return "unchanged" if after.value == before.value else "replaced"


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_every_element_of_the_standard_s_table(tmp_path: Path, depth: int) -> None:
    """As canaries, at the top and in sequences that the table does not name."""
    tables = dicom_anonymization_database_selector(profile.TABLE)
    rules = {Tag(e[0], e[1]): name for name in ALLOWED for e in tables[name] if len(e) == 2}
    tags = canaries.tags()
    assert len(tags) > 600 and Tag(canaries.UNNAMED) not in rules
    assert set(tags) == {tag for tag in rules if tag.group > 0x0006}
    change = lambda ds: canaries.plant(ds, depth)  # noqa: E731
    # named so that none of the values is a number of its own patient
    found, content = cleaned(image(tmp_path / "s", change, PatientID="A7"))
    for _ in range(depth):
        found = found[canaries.UNNAMED].value[0]
    outcomes = {tag: became(tag, found) for tag in tags}
    assert "unchanged" not in outcomes.values()
    for tag, outcome in outcomes.items():
        # what no dictionary knows may hold anything, and goes whatever the table says
        unknown = outcome == "gone" and not dictionary_has_tag(tag)
        assert unknown or outcome in ALLOWED[rules[tag]], (tag, rules[tag], outcome)
    for needle in (b"uleik", b"ULEIK", b"Fothering", b"862177", b"18621217"):
        assert needle not in content


def test_places_that_no_table_names(tmp_path: Path) -> None:
    """Preamble, file meta, private and unknown groups, overlays, curves, deep sequences, padding,
    bits beside the stored ones, and text of an element that the standard keeps."""

    def change(ds: Dataset) -> None:
        canaries.plant_beside(ds)
        ds.Manufacturer = "Fotheringay Imaging"
        ds.PatientName = "Fotheringay^Zuleika"

    source = image(tmp_path / "s", change)
    source.preamble = canaries.PREAMBLE
    found, content = cleaned(source)
    low = content.lower()
    assert b"zuleika" not in low and b"fotheringay" not in low and b"862177" not in low
    assert content[:128] == bytes(128)
    assert not any(e.tag.is_private for e in found.iterall())
    assert found.Manufacturer == ""
    assert max(np.frombuffer(found.PixelData, "<u2")) < 1 << 12
    # the depth itself is kept
    assert content.count(b"\x20\x00\x71\x90SQ") == 12


def test_bytes_behind_the_pixels_are_cut_off(tmp_path: Path) -> None:
    def change(ds: Dataset) -> None:
        ds.PixelData += CANARY.encode() + b"!"

    _, content = cleaned(image(tmp_path / "s", change))
    assert CANARY.encode() not in content


def test_what_is_declared(tmp_path: Path) -> None:
    found, content = cleaned(image(tmp_path / "s"))
    assert found.PatientID == str(found.PatientName) == Pseudonyms(KEY).patient("ID-s")
    assert found.PatientIdentityRemoved == "YES"
    assert "2026c" in found.DeidentificationMethod
    assert [c.CodeValue for c in found.DeidentificationMethodCodeSequence] == ["113100"]
    assert found.LongitudinalTemporalInformationModified == "REMOVED"
    assert b"20200102" not in content and not found.get("StudyDate")
    every = Options(dates=True, device=True, descriptors=True)
    found, _ = cleaned(image(tmp_path / "t"), every)
    codes = [c.CodeValue for c in found.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113105", "113107", "113109"]
    assert found.LongitudinalTemporalInformationModified == "MODIFIED"


def test_references_still_lead_where_they_led(tmp_path: Path) -> None:
    one = image(tmp_path / "one")
    uid, study = one.SOPInstanceUID, one.StudyInstanceUID

    def refer(ds: Dataset) -> None:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = make.MR_IMAGE, uid
        ds.ReferencedImageSequence = Items([item])
        ds.StudyInstanceUID = study

    other, _ = cleaned(image(tmp_path / "other", refer))
    one, content = cleaned(one)
    item = other.ReferencedImageSequence[0]
    assert item.ReferencedSOPInstanceUID == one.SOPInstanceUID != uid
    assert one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID
    assert item.ReferencedSOPClassUID == make.MR_IMAGE == one.SOPClassUID
    assert other.StudyInstanceUID == one.StudyInstanceUID != study
    assert one.SOPInstanceUID.is_valid and uid.encode() not in content
    elsewhere, _ = Cleaner(Pseudonyms(KEY[::-1])).clean(image(tmp_path / "three"))
    assert elsewhere != Pseudonyms(KEY).patient("ID-three")


def test_dates_are_shifted_together(tmp_path: Path) -> None:
    def of(name: str, day: str, **words: Any) -> Dataset:
        data = image(tmp_path / name, StudyDate=day, AcquisitionDateTime=f"{day}101500.5", **words)
        return cleaned(data, Options(dates=True))[0]

    first = of("a", "20200131", PatientID="one")
    second = of("b", "20200302", PatientID="one")
    other = of("c", "20200131", PatientID="two")
    days = [np.datetime64(f"{d[:4]}-{d[4:6]}-{d[6:]}") for d in (first.StudyDate, second.StudyDate)]
    assert days[1] - days[0] == np.timedelta64(31, "D")
    assert first.StudyDate != "20200131" and other.StudyDate != first.StudyDate
    assert first.AcquisitionDateTime == f"{first.StudyDate}101500.5"
    assert first.StudyTime == "101112"
    assert not first.get("PatientBirthDate")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DateOfLastCalibration", "19000101"),
        ("DateOfManufacture", "20110405"),
        ("InstanceCreationDate", "20240506"),  # of an export of many patients
        ("ContentDate", "19000101"),
        ("AcquisitionDateTime", "19700101000000"),
        ("TimeOfLastCalibration", "101500"),
    ],
)
def test_no_date_that_others_know_gives_the_shift_away(
    tmp_path: Path, name: str, value: str
) -> None:
    data = image(tmp_path / "a", StudyDate="20200131", **{name: value})
    found = cleaned(data, Options(dates=True))[0]
    # where the standard wants a value, the same for everybody
    assert found.StudyDate and str(found.get(name) or "") in ("", "19000101")


def test_a_description_keeps_words_of_the_trade_alone(tmp_path: Path) -> None:
    told = {"SeriesDescription": "T1_tse ax Dr. Fotheringay 2mm", "ProtocolName": "Zuleika^HEAD"}
    plain, _ = cleaned(image(tmp_path / "a", **told))
    assert not plain.get("SeriesDescription")
    found, content = cleaned(image(tmp_path / "b", **told), Options(descriptors=True))
    assert found.SeriesDescription == "t1 tse ax" and found.ProtocolName == "head"
    assert b"otheringay" not in content


def test_the_device_is_kept_when_asked(tmp_path: Path) -> None:
    words = {"StationName": "MR-7", "DeviceSerialNumber": "40123"}
    plain, _ = cleaned(image(tmp_path / "a", **words))
    assert plain.get("StationName") != "MR-7" and plain.get("DeviceSerialNumber") != "40123"
    kept, _ = cleaned(image(tmp_path / "b", **words), Options(device=True))
    assert kept.StationName == "MR-7" and kept.DeviceSerialNumber == "40123"


@pytest.mark.parametrize("kind", ["i2", "u2", "u1"])
@pytest.mark.parametrize("layout", ["plain", "big", JPEG2000Lossless, RLELossless])
def test_the_pixels_are_those_of_the_source(tmp_path: Path, kind: str, layout: str) -> None:
    data = np.add.outer(np.add.outer(np.arange(64), 2 * np.arange(48)), 7 * np.arange(4))
    data = data.astype(kind) - (100 if kind == "i2" else 0)
    syntax = ExplicitVRBigEndian if layout == "big" else None

    def change(k: int, ds: Dataset) -> None:
        if layout in (JPEG2000Lossless, RLELossless):
            ds.compress(layout, generate_instance_uid=False)
        elif layout == "big" and kind != "u1":
            ds.PixelData = np.frombuffer(ds.PixelData, kind).astype(f">{kind}").tobytes()

    make.series(tmp_path / "s", data, AFFINE, change, **({"syntax": syntax} if syntax else {}))
    deidentify(tmp_path / "s", tmp_path / "clean", quiet_progress=True)
    volumes = []
    for folder in ("s", "clean"):
        files = sorted(p for p in (tmp_path / folder).rglob("*") if p.stem != "receipt")
        slices = [s for f in files if f.is_file() for s in dicom.slices(f, str(f))]
        volumes.append(stack.read(slices, Path))
    np.testing.assert_array_equal(volumes[0].data, volumes[1].data)
    np.testing.assert_allclose(volumes[0].affine, volumes[1].affine)


def test_an_enhanced_image_stays_one(tmp_path: Path) -> None:
    stacks = [(make.voxels(k), {"echo": 2.0 + k, "slope": 0.5}) for k in range(2)]
    name = lambda ds: ds.SharedFunctionalGroupsSequence[0].__setattr__("PatientName", CANARY)  # noqa: E731
    make.enhanced(tmp_path / "s" / "e.dcm", stacks, AFFINE, name)
    source = dicom.slices(tmp_path / "s" / "e.dcm", "e")
    deidentify(tmp_path / "s", tmp_path / "clean", quiet_progress=True)
    (file,) = (tmp_path / "clean").rglob("*.dcm")
    found = dicom.slices(file, "e")
    told = [(s.position, s.orientation, s.spacing, s.rescale, s.kind) for s in source]
    assert told == [(s.position, s.orientation, s.spacing, s.rescale, s.kind) for s in found]
    assert CANARY.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda ds: setattr(ds, "BurnedInAnnotation", "YES"), "burned_in"),
        (lambda ds: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"), "burned_in"),
        (lambda ds: delattr(ds, "PixelData"), "no_pixels"),
        (lambda ds: setattr(ds, "PatientID", ""), "patient_missing"),
        (lambda ds: setattr(ds, "PixelData", bytes(8)), "truncated"),
        (lambda ds: setattr(ds, "BitsStored", 40), "header_unreadable"),
    ],
)
def test_what_is_not_written(tmp_path: Path, change: Any, code: str) -> None:
    source = image(tmp_path / "s", change)
    with pytest.raises(Refused) as refused:
        cleaned(source)
    assert refused.value.code == code


def test_a_name_that_a_rule_let_through_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look is at bytes: a planted hole in the rules is found."""
    rules = profile.action
    monkeypatch.setattr(
        profile, "action", lambda t, vr, **o: Action.KEEP if vr == "PN" else rules(t, vr, **o)
    )
    source = image(tmp_path / "s", ReferringPhysicianName="Fotheringay^Zuleika")
    with pytest.raises(Refused, match="identity_left"):
        Cleaner(Pseudonyms(KEY)).clean(source)


# --- what a reviewer broke -----------------------------------------------------------------------


def put(**elements: Any) -> Any:
    """Set elements."""
    return lambda ds: [setattr(ds, name, value) for name, value in elements.items()]


def item(**elements: Any) -> Items:
    inner = Dataset()
    put(**elements)(inner)
    return Items([inner])


def injected(folder: Path, tag: int, vr: bytes, value: bytes, **words: Any) -> Dataset:
    """An element of another kind than the standard's, put into the file as bytes."""
    image(folder, **words)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    value += b" " * (len(value) % 2)
    long = vr in (b"OB", b"UN", b"UT")
    size = (b"\0\0" + struct.pack("<I", len(value))) if long else struct.pack("<H", len(value))
    element = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr + size + value
    at = 132 + 12 + int.from_bytes(content[140:144], "little")
    path.write_bytes(content[:at] + element + content[at:])
    return dicom.dataset(path, None, stop_before_pixels=False)


@pytest.mark.parametrize(
    ("elements", "needle"),
    [
        ({"PatientBirthDateInAlternativeCalendar": "Showa 15"}, "showa"),
        ({"IssuerOfAccessionNumberSequence": item(LocalNamespaceEntityID="SPRINGFIELD")},
         "springfield"),
        ({"PlacerOrderNumberProcedure": "ORD-778899"}, "778899"),
        ({"RetrieveURL": "http://pacs.stmary.org/p"}, "stmary"),
        ({"CommentsOnTheScheduledProcedureStep": "mayor of Springfield"}, "mayor"),
        ({"RequestedProcedureCodeSequence": item(CodeValue="X1", CodingSchemeDesignator="99ST",
          CodeMeaning="head of the mayor")}, "mayor"),
        ({"PatientName": "Fotheringay^Jo", "Manufacturer": "Praxis\u00a0Fotheringay"}, "fothering"),
        ({"PatientName": "Fotheringay-Smythe^Jo", "Manufacturer": "DrFotheringay"}, "fothering"),
        ({"PatientName": "M\u00fcller^Jo", "Manufacturer": "MU\u0308LLER AG"}, "ller"),
        ({"PatientName": "\u3084\u307e\u3060", "Manufacturer": "\u60a3\u8005\u3084\u307e\u3060"},
         "\u3084\u307e"),
        ({"PatientID": "0012345", "Manufacturer": "Pat.12345"}, "12345"),
        ({"SequenceName": "li^kim", "PatientName": "Kim^Li"}, "kim"),
        ({"PatientName": "M\u00fcller^Jo", "Manufacturer": "Praxis Mueller"}, "mueller"),
        ({"PatientName": "Mueller^Jo", "Manufacturer": "Praxis M\u00fcller"}, "ller"),
        ({"PatientName": "Ng^Jo", "Manufacturer": "Dr. Ng, Praxis"}, "praxis"),
        ({"PatientID": "FOTHERINGAY_ANNA", "Manufacturer": "Praxis Fotheringay"}, "fothering"),
        ({"WindowCenterWidthExplanation": "as the mayor likes it"}, "mayor"),
        ({"OtherStudyNumbers": "8812"}, "8812"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "mrs. meier"]}, "meier"),
    ],
)  # fmt: skip
def test_identities_in_text_that_no_table_names(
    tmp_path: Path, elements: dict[str, Any], needle: str
) -> None:
    """An order number, a namespace, an address, a comment, and names however they are spelt."""
    _, content = cleaned(image(tmp_path / "s", put(SpecificCharacterSet="ISO_IR 192", **elements)))
    assert needle.encode() not in content.decode("utf-8", "replace").lower().encode()


@pytest.mark.parametrize(
    ("tag", "vr", "value"),
    [
        (0x00104000, b"TM", b"the mayor"),  # comments as a time
        (0x00081140, b"OB", b"the mayor"),  # a sequence as bytes
        (0x00180080, b"DS", b"the mayor"),  # text as a number
        (0x00180080, b"LO", b"the mayor"),
        (0x00081010, b"OB", b"the mayor"),
        (0x00080030, b"TM", b"the mayor"),
    ],
)
def test_what_claims_to_be_of_another_kind(
    tmp_path: Path, tag: int, vr: bytes, value: bytes
) -> None:
    source = injected(tmp_path / "s", tag, vr, value)
    _, content = cleaned(source, Options(dates=True, device=True, descriptors=True))
    assert b"mayor" not in content


@pytest.mark.parametrize(
    "elements",
    [
        {"PatientBirthDate": "19000101", "ContentDate": "20200101"},
        {"PatientName": "REMOVED", "DeviceSerialNumber": "1", "AccessionNumber": "2"},
        {"StudyID": "2000", "RepetitionTime": "2000"},
        {"PatientName": "Basic^Profile"},
    ],
)
def test_our_own_words_and_small_numbers_are_nobody(
    tmp_path: Path, elements: dict[str, Any]
) -> None:
    """Files that were anonymised before are full of them."""
    found, _ = cleaned(image(tmp_path / "s", put(**elements)))
    assert found.PatientIdentityRemoved == "YES"


@pytest.mark.parametrize(
    "elements",
    [
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
        {"BurnedInAnnotation": ["YES", "NO"]},
        {"BurnedInAnnotation": " YES"},
        {"ConversionType": "WSD"},
    ],
)
def test_screenshots_of_every_kind_are_refused(tmp_path: Path, elements: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="burned_in"):
        cleaned(image(tmp_path / "s", put(**elements)))


@pytest.mark.parametrize("levels", [100, 450])
def test_deep_nesting_is_refused_at_once(tmp_path: Path, levels: int) -> None:
    """Sequences of known length, which a library would go down one in another."""
    image(tmp_path / "s")
    (path,) = (tmp_path / "s").iterdir()
    content, parts, length = path.read_bytes(), [], 0
    for _ in range(levels):
        parts.append(
            b"\x08\0\x40\x11SQ\0\0" + struct.pack("<I", length + 8)
            + b"\xfe\xff\0\xe0" + struct.pack("<I", length)
        )  # fmt: skip
        length += 20
    at = content.find(b"\x10\0\x10\0PN")
    path.write_bytes(content[:at] + b"".join(reversed(parts)) + content[at:])
    with pytest.raises(Refused, match="header_unreadable"):
        cleaned(dicom.dataset(path, None, stop_before_pixels=False))


@pytest.mark.parametrize(
    "elements",
    [
        {"Rows": 60000, "Columns": 60000},
        {"WindowCenter": ["1.5"] * 300_000},
        {"NumberOfFrames": "-1", "Rows": 1, "Columns": 1},
        {"SamplesPerPixel": 3, "Rows": 30000, "Columns": 30000},
    ],
)
def test_claims_beyond_the_limits_are_refused(tmp_path: Path, elements: dict[str, Any]) -> None:
    source = image(tmp_path / "s", put(**elements))
    with pytest.raises(Refused, match="oversized"):
        cleaned(source)


def test_words_of_two_pixels_are_swapped(tmp_path: Path) -> None:
    """PS3.5 annex A.3: 8-bit pixels as OW in big endian lie in pairs the other way round."""
    pixels = np.arange(120, dtype=np.uint8)

    def change(ds: Dataset) -> None:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.PixelData = pixels.view(np.uint16).byteswap().tobytes()
        ds["PixelData"].VR = "OW"

    found, _ = cleaned(image(tmp_path / "s", change, syntax=ExplicitVRBigEndian))
    np.testing.assert_array_equal(found.pixel_array.ravel(), pixels)


def test_two_objects_that_claim_one_uid_are_two_files(tmp_path: Path) -> None:
    for n in range(3):
        make.series(
            tmp_path / "source" / f"{n}", make.voxels(min(n, 1))[..., :2], AFFINE,
            lambda k, ds: setattr(ds, "SOPInstanceUID", f"2.25.77{k}"),
            StudyInstanceUID="2.25.9", SeriesInstanceUID="2.25.8", PatientID="one",
        )  # fmt: skip
    receipt = deidentify(tmp_path / "source", tmp_path / "clean", quiet_progress=True)
    assert receipt["n_written"] == 4 == len(list((tmp_path / "clean").rglob("*.dcm")))
    assert receipt["n_same_twice"] == 2 and receipt["n_series"] == 1


def test_a_target_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its receipt knows fewer options; those that came since were off."""
    source, target = folder_of(tmp_path / "source"), tmp_path / "clean"
    deidentify(source, target, Options(device=True), quiet_progress=True)
    receipt = json.loads((target / RECEIPT).read_text())
    del receipt["options"]["text"]
    (target / RECEIPT).write_text(json.dumps(receipt))
    assert deidentify(source, target, Options(device=True), quiet_progress=True)["complete"]


def test_other_options_need_another_target(tmp_path: Path) -> None:
    source, target = folder_of(tmp_path / "source"), tmp_path / "clean"
    deidentify(source, target, Options(device=True), quiet_progress=True)
    with pytest.raises(UsageError, match="other options"):
        deidentify(source, target, quiet_progress=True)
    shutil.rmtree(source / "Fotheringay0")
    receipt = deidentify(source, target, Options(device=True), quiet_progress=True)
    assert receipt["n_written"] == 18 and receipt["n_of_earlier_calls"] == 9


def test_two_calls_on_one_target_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = folder_of(tmp_path / "source"), tmp_path / "clean"
    clean, seen = Cleaner.clean, []

    def meanwhile(self: Cleaner, data: Dataset) -> Any:
        if not seen:
            with pytest.raises(ResourceError) as error:
                deidentify(source, target, quiet_progress=True)
            seen.append(error.value)
        return clean(self, data)

    monkeypatch.setattr(Cleaner, "clean", meanwhile)
    assert deidentify(source, target, quiet_progress=True)["n_written"] == 27
    assert "in use by another process" in str(seen[0]) and seen[0].exit_code == 5
    assert {p.name for p in tmp_path.iterdir()} == {"source", "clean", "clean-refused.tsv"}


def test_a_call_that_was_killed_stands_in_no_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = folder_of(tmp_path / "source"), tmp_path / "clean"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr(Cleaner, "clean", stop)
        with pytest.raises(KeyboardInterrupt):
            deidentify(source, target, quiet_progress=True)
    assert deidentify(source, target, quiet_progress=True)["n_written"] == 27


def test_where_the_list_of_refused_files_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "source")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    deidentify(source, Path(), quiet_progress=True)
    assert (tmp_path / "here-refused.tsv").is_file()
    (tmp_path / "mine-refused.tsv").write_text("a table of my own")
    with pytest.raises(UsageError, match="in the way"):
        deidentify(source, tmp_path / "mine", quiet_progress=True)


# --- folders --------------------------------------------------------------------------------------


def folder_of(place: Path) -> Path:
    for i in range(3):
        make.series(place / f"Fotheringay{i}", make.voxels(i), AFFINE, PatientName="Zuleika^Doe")
    (place / "Zuleika.txt").write_text("text")
    return place


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_and_its_receipt(tmp_path: Path) -> None:
    source, target = folder_of(tmp_path / "source"), tmp_path / "clean"
    receipt = deidentify(source, target, quiet_progress=True)
    assert receipt["n_written"] == 27 and receipt["n_patients"] == receipt["n_series"] == 3
    assert receipt["refused"] == {"not_an_image": 1}
    assert json.loads((target / RECEIPT).read_text()) == receipt
    made = files(target)
    assert len(made) == 29
    for name, content in made.items():
        for needle in ("otheringay", "uleika", "19400101", "20200102"):
            assert needle not in name and needle.encode() not in content
    assert "Zuleika.txt\t" in refused_list(target).read_text()
    assert refused_list(target).stat().st_mode & 0o077 == 0  # it names patients' files
    assert not refused_list(target).is_relative_to(target)
    again = deidentify(source, target, quiet_progress=True)
    assert again == receipt and files(target) == made


def test_a_call_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = folder_of(tmp_path / "source"), tmp_path / "clean"
    whole = tmp_path / "whole"
    deidentify(source, whole, quiet_progress=True)
    made = 0
    clean = Cleaner.clean

    def tired(self: Cleaner, data: Dataset) -> tuple[str, bytes]:
        nonlocal made
        made += 1
        if made > 10:
            raise KeyboardInterrupt
        return clean(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Cleaner, "clean", tired)
        with pytest.raises(KeyboardInterrupt):
            deidentify(source, target, quiet_progress=True)
    assert json.loads((target / RECEIPT).read_text())["complete"] is False
    part = files(target)
    assert len(part) == 11 and part.keys() < files(whole).keys()
    deidentify(source, target, quiet_progress=True)
    assert files(target) == files(whole)


def test_targets_that_are_not_taken(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source")
    with pytest.raises(UsageError, match="inside the source"):
        deidentify(source, source / "clean")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("text")
    with pytest.raises(UsageError, match="something else"):
        deidentify(source, tmp_path / "full")
    with pytest.raises(InputError, match="no such folder"):
        deidentify(tmp_path / "nothing", tmp_path / "clean")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image"):
        deidentify(tmp_path / "empty", tmp_path / "clean", quiet_progress=True)


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source")
    words = ["deidentify", str(source), str(tmp_path / "clean"), "-q"]
    said = CliRunner().invoke(cli.app, words)
    assert said.exit_code == 0, said.output
    assert "27 files of 3 series, 3 studies and 3 patients" in said.output
    assert "1 not_an_image" in said.output and "stays in the house" in said.output
    assert "uleika" not in said.output.replace(str(source), "")


REAL = os.environ.get("SYNTHMED_REAL_DATA")


@pytest.mark.real_data
@pytest.mark.skipif(REAL is None, reason="SYNTHMED_REAL_DATA is not set")
def test_no_planted_identity_of_real_headers_is_left(tmp_path: Path) -> None:
    """TCIA's pseudo-identities: names, numbers, addresses, dates, institutions."""
    source = Path(str(REAL)) / "dicom" / "phi"
    receipt = deidentify(source, tmp_path / "clean", quiet_progress=True)
    assert receipt["n_written"] >= 50 and receipt["n_refused"] == 0
    known = set()
    for path in source.rglob("*.dcm"):
        for element in pydicom.dcmread(path, stop_before_pixels=True).iterall():
            if element.VR == "PN":
                known |= {part for part in str(element.value).split("^") if len(part) > 3}
            if element.keyword in (
                "PatientID", "PatientBirthDate", "StudyDate", "InstitutionName", "PatientAddress",
                "AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID",
                "OtherPatientIDs", "PatientTelephoneNumbers", "InstitutionAddress",
            ) and len(str(element.value)) > 3:  # fmt: skip
                known.add(str(element.value))
    assert len(known) > 100
    for path in (tmp_path / "clean").rglob("*.dcm"):
        data = pydicom.dcmread(path)
        header = path.read_bytes()[: -len(data.PixelData)].lower()
        assert not [k for k in known if k.lower().encode() in header]


@pytest.mark.real_data
@pytest.mark.skipif(REAL is None, reason="SYNTHMED_REAL_DATA is not set")
def test_hostile_files_are_refused_or_cleaned(tmp_path: Path) -> None:
    receipt = deidentify(Path(str(REAL)) / "hostile" / "dicom", tmp_path / "c", quiet_progress=True)
    assert receipt["n_written"] > 0 and receipt["n_refused"] > 0
    for path in (tmp_path / "c").rglob("*"):
        assert path.resolve().is_relative_to((tmp_path / "c").resolve())
    assert {p.parent for p in tmp_path.rglob("*.dcm")} <= set((tmp_path / "c").rglob("*"))
