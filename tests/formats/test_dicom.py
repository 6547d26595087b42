"""DICOM through bytes: voxels where they belong, or a refusal that says why."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import make
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from test_nifti import ORIENTATIONS, rotation

from synthmed.formats import dicom, stack
from synthmed.formats.nifti import Image
from synthmed.formats.refusal import REASONS, Refused, quiet

AFFINE = np.diag([2.0, 1.5, 3, 1])
DATA = make.voxels(0)
# large and smooth enough for every encoder, different under every flip and swap
SMOOTH = np.add.outer(np.add.outer(np.arange(64), 2 * np.arange(48)), 7 * np.arange(4))


def read(folder: Path) -> list[Image | str]:
    """What becomes of each series and each refused file in a folder."""
    slices, refused, where = make.headers(folder)
    with quiet():
        volumes = [_volume(group, where) for group in dicom.series(slices)]
    found: list[Image | str] = [*refused.values(), *volumes]
    assert all(f in REASONS for f in found if isinstance(f, str))
    return found


def _volume(group: dicom.Series, where: Callable[[str], Path]) -> Image | str:
    try:
        dicom.patient(group)
        return stack.read(group.slices, where)
    except Refused as reason:
        return reason.code


def volume(folder: Path) -> Image:
    (found,) = read(folder)
    assert isinstance(found, Image), found
    return found


def codes(folder: Path) -> set[str]:
    found = read(folder)
    assert all(isinstance(f, str) for f in found)
    return {str(f) for f in found}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    orientation=st.sampled_from(ORIENTATIONS),
    degrees=st.tuples(*[st.floats(-20, 20)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 6)] * 3),
    origin=st.tuples(*[st.floats(-150, 150)] * 3),
    planted=st.tuples(*[st.integers(0, 4)] * 3),
)
def test_a_bright_voxel_stays_where_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    orientation: Any,
    degrees: Any,
    spacing: Any,
    origin: Any,
    planted: Any,
) -> None:
    axes, signs = orientation
    data = np.zeros((5, 6, 7), dtype=np.int16)
    data[planted] = 700
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ np.eye(3)[:, axes] * np.array(signs) * np.array(spacing)
    affine[:3, 3] = origin
    image = volume(make.series(tmp_path_factory.mktemp("planted"), data, affine))
    found = np.argwhere(image.data == 700)
    assert len(found) == 1
    np.testing.assert_allclose(
        image.affine[:3] @ [*found[0], 1], affine[:3] @ [*planted, 1], atol=1e-5
    )
    oracle = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    np.testing.assert_array_equal(image.data, np.asarray(oracle.dataobj))
    np.testing.assert_allclose(image.affine, oracle.affine, atol=1e-5)


def test_left_is_where_dicom_says_right_is_not(tmp_path: Path) -> None:
    """Written out by hand, without the helper: x grows to the patient's left in DICOM."""

    def place(k: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [0, 0, 3 * k]

    data = DATA.copy()
    data[-1] = 5000  # the last column: 11 columns towards +x, the patient's left
    image = volume(make.series(tmp_path / "s", data, AFFINE, place))
    assert (image.data[0] == 5000).all()
    assert image.affine[0, 3] == pytest.approx(-22)  # RAS: left is negative
    assert image.orientation == "LPS"


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_uncompressed_syntaxes_agree(tmp_path: Path, syntax: str) -> None:
    if syntax == ExplicitVRBigEndian:
        swap: Callable[[int, Dataset], None] = lambda k, ds: setattr(  # noqa: E731
            ds, "PixelData", np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()
        )
    else:
        swap = lambda k, ds: None  # noqa: E731
    image = volume(make.series(tmp_path / "s", DATA, AFFINE, swap, syntax))
    np.testing.assert_array_equal(np.sort(image.data.ravel()), np.sort(DATA.ravel()))
    plain = volume(make.series(tmp_path / "plain", DATA, AFFINE))
    np.testing.assert_array_equal(image.data, plain.data)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("kind", ["i2", "u2", "u1"])
def test_compressed_syntaxes_agree(tmp_path: Path, syntax: str, kind: str) -> None:
    data = SMOOTH.astype(kind)
    if kind == "i2" and syntax != JPEGLSLossless:
        data -= 100
    compress = lambda k, ds: ds.compress(syntax, generate_instance_uid=False)  # noqa: E731
    folder = make.series(tmp_path / "s", data, AFFINE, compress)
    plain = volume(make.series(tmp_path / "plain", data, AFFINE))
    np.testing.assert_array_equal(volume(folder).data, plain.data)


def test_a_codestream_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    def lie(k: int, ds: Dataset) -> None:
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        at = ds.PixelData.index(b"\xff\x4f\xff\x51") + 8
        ds.PixelData = ds.PixelData[:at] + b"\x00\x00\xff\xff" * 2 + ds.PixelData[at + 8 :]

    folder = make.series(tmp_path / "s", SMOOTH.astype(np.int16), AFFINE, lie)
    assert codes(folder) == {"header_unreadable"}


@pytest.mark.parametrize(
    ("stored", "signed", "raw", "expected"),
    [
        (12, 0, 0xF123, 0x123),  # the high bits hold an overlay
        (12, 1, 0x0FFF, -1),
        (12, 1, 0xF7FF, 2047),
        (16, 1, 0xFFFE, -2),
        (16, 0, 0xFFFE, 0xFFFE),
    ],
)
def test_stored_bits(tmp_path: Path, stored: int, signed: int, raw: int, expected: int) -> None:
    data = np.zeros((8, 8, 8), dtype=np.uint16)
    data[2, 3, 4] = raw
    folder = make.series(
        tmp_path / "s", data, AFFINE,
        BitsStored=stored, HighBit=stored - 1, PixelRepresentation=signed,
    )  # fmt: skip
    image = volume(folder)
    assert sorted(set(image.data.ravel().tolist())) == sorted({0, expected})


def test_each_slice_has_its_own_scaling(tmp_path: Path) -> None:
    def scale(k: int, ds: Dataset) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = str(0.5 + k), str(-3 * k)

    affine = np.diag([-2.0, -1.5, 3, 1])  # the axes of an upright axial DICOM series
    image = volume(make.series(tmp_path / "s", DATA, affine, scale))
    k = np.arange(DATA.shape[2])
    expected = DATA * (0.5 + k) - 3 * k
    np.testing.assert_allclose(image.data, expected[::-1, ::-1], rtol=1e-6)


def each(**elements: Any) -> Callable[[int, Dataset], None]:
    """Set elements in every slice; None removes one."""

    def change(k: int, ds: Dataset) -> None:
        for name, value in elements.items():
            if value is None:
                delattr(ds, name)
            else:
                setattr(ds, name, value)

    return change


def one(index: int, **elements: Any) -> Callable[[int, Dataset], None]:
    """Set elements in one slice."""
    return lambda k, ds: each(**elements)(k, ds) if k == index else None


def odd(**elements: Any) -> Callable[[int, Dataset], None]:
    """Set elements in every other slice."""
    return lambda k, ds: each(**elements)(k, ds) if k % 2 else None


def place(of: Callable[[int], Sequence[float]]) -> Callable[[int, Dataset], None]:
    """Put slice k of an upright stack somewhere."""

    def change(k: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [float(v) for v in of(k)]

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (place(lambda k: (0, 0.3 * k, 3 * k)), "gantry_tilt"),
        (place(lambda k: (0, 0, 3 * k + (k == 4))), "uneven_slices"),
        (place(lambda k: (0.5 * (k == 4), 0, 3 * k)), "uneven_slices"),
        (place(lambda k: (0, 0, 3 * k + 3 * (k > 4))), "missing_slices"),
        (place(lambda k: (0, 0, 3 * k + 6 * (k % 2))), "missing_slices"),
        (place(lambda k: (0, 0, 3 * (k - (k == 5)))), "duplicate_positions"),
        (place(lambda k: (0, 0, 3 * (k // 3))), "is_4d"),
        (place(lambda k: (0, 0, 0)), "duplicate_positions"),
        (one(4, ImageOrientationPatient=[1, 0, 0, 0, 0, 1]), "mixed_orientation"),
        (each(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "geometry_invalid"),
        (each(ImageOrientationPatient=[2, 0, 0, 0, 1, 0]), "geometry_invalid"),
        (each(ImageOrientationPatient=None), "geometry_invalid"),
        (each(ImagePositionPatient=None), "geometry_invalid"),
        (one(4, PixelSpacing=[1, 1]), "mixed_matrix"),
        (one(4, Rows=12, Columns=10), "mixed_matrix"),
        (odd(EchoTime=90), "mixed_series"),
        (odd(InversionTime=900), "mixed_series"),
        (odd(DiffusionBValue=1000.0), "mixed_series"),
        (odd(ImageType=["ORIGINAL", "PRIMARY", "P", "ND"]), "mixed_series"),
        (odd(FrameOfReferenceUID="1.2.3"), "mixed_series"),
        (odd(StudyDate="20190501", StudyTime="101500"), "mixed_series"),
        (each(PixelSpacing=None), "no_pixel_spacing"),
        (each(PixelSpacing=[0, 1]), "no_pixel_spacing"),
        (one(4, PatientID="ID-other"), "two_patients"),
        (one(4, PatientName="Else^Somebody"), "two_patients"),
        (each(PatientID=""), "patient_missing"),
        (each(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        (each(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "mosaic_unsupported"),
        (each(SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1"), "enhanced_unsupported"),
        (each(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "not_mr_image"),
        (each(SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), "not_mr_image"),
        (each(NumberOfFrames=4), "enhanced_unsupported"),
        (each(PhotometricInterpretation="RGB", SamplesPerPixel=3), "rgb"),
        (each(PhotometricInterpretation="PALETTE COLOR"), "rgb"),
        (each(PhotometricInterpretation="MONOCHROME1"), "photometric_unsupported"),
        (each(Rows=None), "no_pixels"),
        (each(PixelData=None), "no_pixels"),
        (each(PixelData=bytes(20)), "truncated"),
        (each(PixelData=bytes(2000)), "header_unreadable"),
        (each(Rows=60000, Columns=60000), "oversized"),
        (each(BitsAllocated=12), "header_unreadable"),
        (each(BitsStored=20), "header_unreadable"),
        (each(RescaleSlope="0"), "rescale_invalid"),
    ],
)
def test_a_planted_fault_is_refused_by_name(
    tmp_path: Path, change: Callable[[int, Dataset], None], code: str
) -> None:
    assert codes(make.series(tmp_path / "s", DATA, AFFINE, change)) == {code}


@pytest.mark.parametrize(
    "change",
    [
        lambda k, ds: setattr(ds, "FrameOfReferenceUID", f"1.2.{k + 1}"),
        lambda k, ds: each(StudyDate="", StudyInstanceUID=f"1.2.{k + 1}")(k, ds),
        lambda k, ds: setattr(ds, "EchoTime", 4.6 + 0.001 * k),
    ],
)
def test_what_some_exports_write_into_every_file_mixes_nothing(
    tmp_path: Path, change: Callable[[int, Dataset], None]
) -> None:
    (found,) = read(make.series(tmp_path / "s", DATA, AFFINE, change))
    assert not isinstance(found, str)


@pytest.mark.parametrize(("n", "code"), [(1, "single_slice"), (2, "too_few_slices")])
def test_too_few_slices(tmp_path: Path, n: int, code: str) -> None:
    assert codes(make.series(tmp_path / "s", DATA[..., :n], AFFINE)) == {code}


def recoded(folder: Path, old: str, new: str) -> Path:
    """Claim another transfer syntax, of as many characters, in every file."""
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(old.encode(), new.encode(), 1))
    return folder


def test_a_codec_that_is_not_there_is_named(tmp_path: Path) -> None:
    compress = lambda k, ds: ds.compress(JPEG2000Lossless, generate_instance_uid=False)  # noqa: E731
    folder = make.series(tmp_path / "j", SMOOTH.astype(np.int16), AFFINE, compress)
    assert codes(recoded(folder, JPEG2000Lossless, JPEGLosslessSV1)) <= {
        "compressed_unsupported",
        "truncated",  # where python-gdcm is installed and finds no JPEG
    }


@pytest.mark.parametrize("shape", [(32, 40, 6), (149, 75, 6)], ids=["small", "as long as OW"])
def test_a_syntax_that_lies_about_representations(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Said to be implicit, and explicit in truth: a VR is no length."""
    data = make.voxels(0, shape)
    folder = make.series(tmp_path / "s", data, np.diag([-1.0, -1, 2, 1]))
    for file in folder.iterdir():
        content = file.read_bytes()
        assert content.count(b"1.2.840.10008.1.2.1\0") == 1
        file.write_bytes(content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"))
    slices, refused, where = make.headers(folder)
    assert not refused
    with quiet():
        assert np.array_equal(stack.read(slices, where).data, data[::-1, ::-1])


def test_an_unknown_transfer_syntax_is_refused(tmp_path: Path) -> None:
    folder = make.series(tmp_path / "s", DATA, AFFINE)
    for path in folder.iterdir():
        path.write_bytes(
            path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
        )
    assert len(codes(folder)) == 1


def test_files_with_a_series_each_are_brought_together(tmp_path: Path) -> None:
    def alone(k: int, ds: Dataset) -> None:
        ds.SeriesInstanceUID = f"2.25.{k + 1}"
        ds.StudyInstanceUID = f"2.25.{k + 100}"

    folder = make.series(tmp_path / "s", DATA, AFFINE, alone)
    plain = volume(make.series(tmp_path / "plain", DATA, AFFINE))
    np.testing.assert_array_equal(volume(folder).data, plain.data)


def test_a_series_exported_twice_is_two_volumes(tmp_path: Path) -> None:
    make.series(tmp_path / "a" / "s", DATA, AFFINE)
    make.series(tmp_path / "b" / "s", DATA, AFFINE)
    first, second = read(tmp_path)
    assert isinstance(first, Image)
    assert isinstance(second, Image)
    np.testing.assert_array_equal(first.data, second.data)


@pytest.mark.parametrize("preamble", [True, False])
def test_a_deflate_bomb_is_refused(tmp_path: Path, preamble: bool) -> None:
    folder = make.series(
        tmp_path / "s", DATA[..., :1], AFFINE, syntax=DeflatedExplicitVRLittleEndian
    )
    (path,) = folder.iterdir()
    content = path.read_bytes()
    length = int.from_bytes(content[140:144], "little")
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = content[: 144 + length] + squeeze.compress(bytes(100 << 20)) + squeeze.flush()
    path.write_bytes(bomb[0 if preamble else 132 :])
    assert codes(folder) == {"oversized"}


def test_deep_nesting_and_long_lengths_are_refused_or_read(tmp_path: Path) -> None:
    def nest(k: int, ds: Dataset) -> None:
        for _ in range(60):
            outer = Dataset()
            outer.ReferencedStudySequence = Items([ds.copy() if "Rows" not in ds else Dataset()])
            ds.ReferencedStudySequence = Items([outer])

    assert isinstance(read(make.series(tmp_path / "s", DATA, AFFINE, nest))[0], Image)
    (path, *_) = (tmp_path / "s").iterdir()
    # an element that claims 4 GiB costs no more than the file has
    path.write_bytes(
        path.read_bytes()[:144] + b"\x08\x00\x05\x00UT\0\0\xf0\xff\xff\xff" + bytes(20)
    )
    assert len([f for f in read(tmp_path / "s") if isinstance(f, str)]) >= 1


def test_scanner_fields_are_allow_listed(tmp_path: Path) -> None:
    for maker, known in [
        ("GE MEDICAL SYSTEMS", "GE"),
        ("Siemens Healthineers", "SIEMENS"),
        ("Dr Jane Doe", "other"),
        ("GERTRUDE", "other"),
    ]:
        folder = make.series(tmp_path / maker, DATA[..., :1], AFFINE, Manufacturer=maker)
        (path,) = folder.iterdir()
        (image,) = dicom.slices(path, "x")
        found = dict(image.scanner)
        assert found == {"manufacturer": known, "field_strength_t": 3.0}


@pytest.mark.parametrize(("text", "years"), [("067Y", 67), ("006M", 0.5), ("", None), ("67", None)])
def test_ages(text: str, years: float | None) -> None:
    assert dicom._age(text) == years


REAL = os.environ.get("SYNTHMED_REAL_DATA")
real_data = pytest.mark.skipif(REAL is None, reason="SYNTHMED_REAL_DATA is not set")


@pytest.mark.real_data
@real_data
@pytest.mark.filterwarnings("ignore")
def test_vendor_series_equal_their_references() -> None:
    """Each classic 3D series against the NIfTI that came with it, voxels and affine."""
    n = 0
    for truth in sorted(Path(str(REAL)).glob("dicom/vendors/dicom2nifti/**/*_ground_truth.nii.gz")):
        (found,) = read(truth.parent / truth.name.removesuffix("_ground_truth.nii.gz"))[:1]
        if isinstance(found, str):
            assert found in {"not_mr_image", "single_slice", "compressed_unsupported"}, truth
            continue
        oracle = nib.as_closest_canonical(nib.load(truth))
        np.testing.assert_allclose(found.data, oracle.get_fdata(), rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(found.affine, oracle.affine, atol=1e-4)
        n += 1
    assert n == 16


@pytest.mark.real_data
@real_data
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("dicom/vendors/dcm_qa_nih/In/20180918GE/mr_0004", {"is_4d"}),
        ("dicom/vendors/dcm_qa_nih/In/20180918Si/mr_0003", {"is_4d"}),
        ("dicom/vendors/dcm_qa_12bit/In", {"mixed_matrix"}),
        ("dicom/vendors/dcm_qa_enh/In", {"is_4d"}),
        ("dicom/refuse/gantrytilting", {"not_mr_image"}),
        ("dicom/refuse/slicecount/001", {"too_few_slices"}),
        ("dicom/refuse/sliceorientation", {"mixed_matrix"}),
        ("hostile/dicom/duplicate_position", {"duplicate_positions"}),
        ("hostile/dicom/missing_middle_slices", {"missing_slices"}),
        ("hostile/dicom/no_pixelspacing", {"no_pixel_spacing"}),
        ("hostile/dicom/two_patients_one_series", {"two_patients"}),
        ("hostile/dicom/path_traversal_ids", {"read"}),
        ("hostile/dicom/phi_in_private_and_sequences", {"read"}),
    ],
)
def test_real_series_are_refused_by_name(folder: str, expected: set[str]) -> None:
    found = read(Path(str(REAL)) / folder)
    assert {f if isinstance(f, str) else "read" for f in found} == expected


@pytest.mark.real_data
@real_data
@pytest.mark.filterwarnings("ignore")
def test_a_tilted_stack_is_refused_though_it_is_ct(tmp_path: Path) -> None:
    folder = Path(str(REAL)) / "dicom/refuse/gantrytilting/001"
    for path in folder.iterdir():
        content = path.read_bytes()
        ct, mr = b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.840.10008.5.1.4.1.1.4\0"
        (tmp_path / path.name).write_bytes(content.replace(ct, mr))
    assert codes(tmp_path) == {"gantry_tilt"}


@pytest.mark.real_data
@real_data
@pytest.mark.filterwarnings("ignore")
def test_hostile_bytes_never_become_a_volume() -> None:
    assert codes(Path(str(REAL)) / "hostile/dicom/bytes")
