"""Files of many images: enhanced MR and Siemens mosaics, taken apart and put together again."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import make
import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from test_nifti import ORIENTATIONS, rotation

from synthmed.formats import dicom, stack
from synthmed.formats.nifti import Image
from synthmed.formats.refusal import REASONS, Refused, quiet
from synthmed.formats.volumes import volumes

AFFINE = np.diag([2.0, 1.5, 3, 1])
DATA = make.voxels(0)


def found(folder: Path) -> dict[str, Image | str]:
    """Volumes of the series in a folder by their names, or why there are none."""
    slices, refused, where = make.headers(folder)
    out: dict[str, Image | str] = dict(refused)
    with quiet():
        for number, group in enumerate(dicom.series(slices)):
            try:
                every = volumes(group.slices)
            except Refused as reason:
                out[f"series {number}"] = reason.code
                continue
            for v in every:
                assert v.name not in out
                try:
                    out[v.name] = stack.read(v.slices, where)
                except Refused as reason:
                    out[v.name] = reason.code
    assert all(v in REASONS for v in out.values() if isinstance(v, str))
    return out


def check(image: Image | str, data: np.ndarray, affine: np.ndarray) -> None:
    """The voxels, and where they are."""
    assert isinstance(image, Image), image
    oracle = nib.as_closest_canonical(nib.Nifti1Image(data.astype(np.float64), affine))
    np.testing.assert_allclose(image.data, oracle.get_fdata(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(image.affine, oracle.affine, atol=1e-5)


@pytest.mark.parametrize("write", [make.mosaic, None])
@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
def test_any_orientation(tmp_path: Path, orientation: Any, write: Any) -> None:
    """As mosaic and as enhanced image: the same voxels in the same places."""
    axes, signs = orientation
    affine = np.eye(4)
    sides = np.array([1.25, 2.0, 3.5])
    affine[:3, :3] = rotation((8, -5, 12)) @ np.eye(3)[:, axes] * np.array(signs) * sides
    affine[:3, 3] = -30.5, 12.25, 7
    if np.linalg.det(affine[:3, :3]) * np.linalg.det(np.diag([-1.0, -1, 1])) < 0 and write:
        # the slices of a mosaic follow its normal; the normal may point either way
        affine[:3, 2] *= -1
    if write:
        write(tmp_path / "s" / "m.dcm", DATA, affine)
    else:
        make.enhanced(tmp_path / "s" / "e.dcm", [(DATA, {})], affine)
    (image,) = found(tmp_path).values()
    check(image, DATA, affine)


def test_a_mosaic_whose_normal_points_the_other_way(tmp_path: Path) -> None:
    affine = AFFINE.copy()
    affine[:3, 2] *= -1
    make.mosaic(tmp_path / "a" / "m.dcm", DATA, affine)
    check(found(tmp_path / "a")[""], DATA, affine)
    make.mosaic(tmp_path / "b" / "m.dcm", DATA, AFFINE)
    check(found(tmp_path / "b")[""], DATA, AFFINE)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian])
def test_compressed_frames(tmp_path: Path, syntax: str) -> None:
    smooth = np.add.outer(np.add.outer(np.arange(64), 2 * np.arange(48)), 7 * np.arange(4))
    data = smooth.astype(np.int16)
    if syntax == DeflatedExplicitVRLittleEndian:
        make.enhanced(tmp_path / "e.dcm", [(data, {})], AFFINE, syntax=syntax)
    else:
        compress = lambda ds: ds.compress(syntax, generate_instance_uid=False)  # noqa: E731
        make.enhanced(tmp_path / "e.dcm", [(data, {})], AFFINE, compress)
    check(found(tmp_path)[""], data, AFFINE)


def test_a_zipped_file(tmp_path: Path) -> None:
    plain = make.enhanced(tmp_path / "e.dcm", [(DATA, {})], AFFINE)
    (tmp_path / "z.dcm.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    check(found(tmp_path)[""], DATA, AFFINE)


def test_a_zipped_file_that_is_cut_or_too_large(tmp_path: Path) -> None:
    plain = make.enhanced(tmp_path / "e.dcm", [(DATA, {})], AFFINE)
    zipped = gzip.compress(plain.read_bytes())
    plain.unlink()
    (tmp_path / "cut.dcm.gz").write_bytes(zipped[: len(zipped) // 2])
    (tmp_path / "bomb.dcm.gz").write_bytes(gzip.compress(bytes(dicom.MAX_INFLATED_BYTES + 1), 9))
    assert found(tmp_path) == {"cut.dcm.gz": "truncated", "bomb.dcm.gz": "oversized"}


def test_frames_are_told_apart_by_what_the_scanner_varied(tmp_path: Path) -> None:
    stacks = [
        (make.voxels(1), {"types": ["M", "NONE"], "echo": 2.5}),
        (make.voxels(2), {"types": ["M", "NONE"], "echo": 5.0}),
        (make.voxels(3), {"types": ["P", "NONE"], "echo": 2.5}),
        (make.voxels(4), {"types": ["P", "NONE"], "echo": 5.0, "slope": 0.5, "intercept": -100}),
    ]
    make.enhanced(tmp_path / "e.dcm", stacks, AFFINE)
    images = found(tmp_path)
    assert set(images) == {f"{t}_echo-{k}" for t in ("magnitude", "phase") for k in (1, 2)}
    for name, (data, _) in zip(
        ["magnitude_echo-1", "magnitude_echo-2", "phase_echo-1"], stacks[:3], strict=True
    ):
        check(images[name], data, AFFINE)
    check(images["phase_echo-2"], stacks[3][0] * 0.5 - 100, AFFINE)


def test_times_and_b_values(tmp_path: Path) -> None:
    stacks = [
        (make.voxels(1), {"b": 0.0, "time": 1}),
        (make.voxels(2), {"b": 1000.0, "time": 3}),
        (make.voxels(3), {"b": 1000.0, "time": 2}),
    ]
    make.enhanced(tmp_path / "e.dcm", stacks, AFFINE)
    images = found(tmp_path)
    assert set(images) == {"b-0", "b-1000_time-1", "b-1000_time-2"}
    check(images["b-1000_time-1"], stacks[2][0], AFFINE)
    check(images["b-1000_time-2"], stacks[1][0], AFFINE)


def test_a_type_that_is_free_text_is_counted_not_named(tmp_path: Path) -> None:
    stacks = [(make.voxels(k), {"types": [text, "X"]}) for k, text in enumerate(("DOE", "JO"))]
    make.enhanced(tmp_path / "e.dcm", stacks, AFFINE)
    assert set(found(tmp_path)) == {"type-1", "type-2"}


def test_mosaics_over_time(tmp_path: Path) -> None:
    for k in range(3):
        order = lambda ds, k=k: setattr(ds, "AcquisitionNumber", 3 - k)  # noqa: E731
        make.mosaic(tmp_path / "s" / f"m{k}.dcm", make.voxels(k), AFFINE, order)
    images = found(tmp_path)
    assert list(images) == ["time-1", "time-2", "time-3"]
    for k in range(3):
        check(images[f"time-{3 - k}"], make.voxels(k), AFFINE)


def test_a_classic_series_of_two_echoes(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    for number, echo in ((0, 9.0), (1, 4.0)):

        def change(k: int, ds: Dataset, number: int = number, echo: float = echo) -> None:
            ds.EchoTime, ds.InstanceNumber = str(echo), 2 * k + number
            ds.SOPInstanceUID = f"2.25.{1000 * number + k + 1}"

        make.series(folder, make.voxels(number), AFFINE, change)
        for path in list(folder.iterdir()):
            path.rename(tmp_path / f"{number}-{path.name}")
        folder.rmdir()
    images = found(tmp_path)
    assert set(images) == {"echo-1", "echo-2"}
    check(images["echo-1"], make.voxels(1), AFFINE)
    check(images["echo-2"], make.voxels(0), AFFINE)


def without(*names: str) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for name in names:
            delattr(ds, name)

    return change


def put(**elements: Any) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for name, value in elements.items():
            setattr(ds, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (without("PerFrameFunctionalGroupsSequence"), "enhanced_unsupported"),
        (put(NumberOfFrames=5), "enhanced_unsupported"),
        (put(NumberOfFrames=10**9), "header_unreadable"),
        (without("SharedFunctionalGroupsSequence"), "no_pixel_spacing"),
        (put(PixelData=bytes(100)), "truncated"),
        (put(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "rgb"),
        (lambda ds: ds.PerFrameFunctionalGroupsSequence[2].clear(), "geometry_invalid"),
    ],
)
def test_a_damaged_enhanced_file(
    tmp_path: Path, change: Callable[[Dataset], None], code: str
) -> None:
    make.enhanced(tmp_path / "e.dcm", [(DATA, {})], AFFINE, change)
    assert list(found(tmp_path).values()) == [code]


@pytest.mark.parametrize(
    ("change", "n", "code"),
    [
        (lambda ds: ds.private_block(0x29, "SIEMENS CSA HEADER").__delitem__(0x10), None,
         "mosaic_unsupported"),
        (without("SpacingBetweenSlices"), None, "geometry_invalid"),
        (put(ImageOrientationPatient=[1, 0, 0, 0, 0, 1]), None, "geometry_invalid"),
        (lambda ds: None, 10**6, "mosaic_unsupported"),
        (lambda ds: None, 0, "mosaic_unsupported"),
        (lambda ds: None, 2, "too_few_slices"),
        (put(SpacingBetweenSlices="-3"), None, "geometry_invalid"),
    ],
)  # fmt: skip
def test_a_damaged_mosaic(
    tmp_path: Path, change: Callable[[Dataset], None], n: int | None, code: str
) -> None:
    make.mosaic(tmp_path / "s" / "m.dcm", DATA, AFFINE, change, n)
    assert list(found(tmp_path).values()) == [code]


def test_a_place_that_lacks_an_image_is_not_guessed(tmp_path: Path) -> None:
    for k in range(2):
        make.mosaic(tmp_path / "s" / f"m{k}.dcm", make.voxels(k), AFFINE)
    data = make.voxels(2)[..., :5]
    make.mosaic(tmp_path / "s" / "m2.dcm", data, AFFINE)
    assert set(found(tmp_path).values()) == {"duplicate_positions"}


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ([{"stack": "1"}, {"stack": "2"}], {"stack-1", "stack-2"}),
        ([{"b": 700.0, "towards": [1.0, 0, 0]}, {"b": 700.0, "towards": [0, 1.0, 0]}],
         {"direction-1", "direction-2"}),
    ],
)  # fmt: skip
def test_what_else_tells_stacks_of_one_place_apart(
    tmp_path: Path, told: list[dict[str, Any]], names: set[str]
) -> None:
    make.enhanced(tmp_path / "e.dcm", [(make.voxels(k), t) for k, t in enumerate(told)], AFFINE)
    images = found(tmp_path)
    assert set(images) == names
    made = [np.sort(i.data.ravel()) for i in images.values() if isinstance(i, Image)]
    for k in range(2):
        assert any(np.array_equal(np.sort(make.voxels(k).ravel()), m) for m in made)


def test_frames_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    """Which of two frames of a place belongs to which volume is not guessed by their order."""
    make.enhanced(tmp_path / "e.dcm", [(make.voxels(0), {}), (make.voxels(1), {})], AFFINE)
    assert set(found(tmp_path).values()) == {"duplicate_positions"}


def test_a_frame_without_its_time_is_not_guessed(tmp_path: Path) -> None:
    def forget(ds: Dataset) -> None:
        contents = [f.FrameContentSequence[0] for f in ds.PerFrameFunctionalGroupsSequence]
        del next(c for c in contents if c.TemporalPositionIndex == 2).TemporalPositionIndex

    stacks = [(make.voxels(k), {"time": k + 1}) for k in range(2)]
    make.enhanced(tmp_path / "e.dcm", stacks, AFFINE, forget)
    assert set(found(tmp_path).values()) == {"duplicate_positions"}


def several(folder: Path, change: Callable[[int, int, Dataset], None], n: int = 2) -> None:
    """A classic series of `n` volumes; `change` is told volume and slice."""
    for number in range(n):

        def each(k: int, ds: Dataset, number: int = number) -> None:
            ds.SOPInstanceUID = f"2.25.{1000 * number + k + 1}"
            change(number, k, ds)

        make.series(folder / "s", make.voxels(number), AFFINE, each)
        for path in list((folder / "s").iterdir()):
            path.rename(folder / f"{number}-{path.name}")
        (folder / "s").rmdir()


@pytest.mark.parametrize(
    "instance",
    [lambda v, k: 9 * v + k, lambda v, k: 2 * k + v, lambda v, k: 2 * (8 - k) + v],
)
def test_instance_numbers_that_run_through_say_what_belongs_together(
    tmp_path: Path, instance: Callable[[int, int], int]
) -> None:
    several(tmp_path, lambda v, k, ds: setattr(ds, "InstanceNumber", instance(v, k)))
    images = found(tmp_path)
    for v in range(2):
        check(images[f"time-{v + 1}"], make.voxels(v), AFFINE)


@pytest.mark.parametrize(
    "instance",
    [
        lambda v, k: k,  # begins anew in each volume
        lambda v, k: 3 * k + (v if k % 2 else 1 - v) if k < 5 else 40 + 9 * v + k,
        lambda v, k: 1,
    ],
)
def test_instance_numbers_that_do_not_are_no_guide(
    tmp_path: Path, instance: Callable[[int, int], int]
) -> None:
    several(tmp_path, lambda v, k, ds: setattr(ds, "InstanceNumber", instance(v, k)))
    assert set(found(tmp_path).values()) == {"duplicate_positions"}


def test_a_volume_that_lacks_slices_of_the_others_is_refused(tmp_path: Path) -> None:
    several(tmp_path, lambda v, k, ds: setattr(ds, "EchoTime", str(3 + 2 * v)))
    echo = [p for p in tmp_path.iterdir() if p.name.startswith("1-")]
    heights = {p: float(dicom.slices(p, "x")[0].position[2]) for p in echo}
    for p in sorted(heights, key=lambda p: heights[p])[-3:]:
        p.unlink()
    assert set(found(tmp_path).values()) == {"duplicate_positions"}


def test_one_that_varies_from_slice_to_slice_does_not_make_volumes(tmp_path: Path) -> None:
    """Inversion by the parity of the slice, at two times."""
    several(tmp_path, lambda v, k, ds: ds.__setattr__("InversionTime", str(100 + 50 * (k % 2))))
    assert set(found(tmp_path).values()) == {"duplicate_positions"}


@pytest.mark.parametrize("n", [5, 8, 10, 16])
def test_a_mosaic_of_another_number_of_slices(tmp_path: Path, n: int) -> None:
    """Nine there are: fewer leave filled tiles, more do not divide the matrix."""
    make.mosaic(tmp_path / "s" / "m.dcm", DATA + 1, AFFINE, n=n)
    assert set(found(tmp_path).values()) == {"mosaic_unsupported"}


@pytest.mark.parametrize("scale", [0.0, float("nan"), -1.0, None])
def test_a_scale_that_one_slice_lacks(tmp_path: Path, scale: float | None) -> None:
    def change(k: int, ds: Dataset) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = "2.5", "-5"
        if k != 3 or scale is not None:
            block = ds.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
            block.add_new(0x0E, "FL", scale if k == 3 else 0.125)

    make.series(tmp_path / "s", DATA, AFFINE, change)
    assert "rescale_invalid" in found(tmp_path).values()
    assert not any(isinstance(v, Image) for v in found(tmp_path).values())


@pytest.mark.parametrize("step", [10.0, 1e9])
def test_a_stack_that_leans_too_far_is_not_resampled(tmp_path: Path, step: float) -> None:
    affine = np.diag([-1.0, -1, 3, 1])
    affine[0, 2] = step
    make.series(tmp_path / "s", DATA[..., :3], affine)
    slices, _, where = make.headers(tmp_path)
    with pytest.raises(Refused, match="gantry_tilt"):
        stack.read(slices, where, upright=True)


def test_philips_scales_are_undone(tmp_path: Path) -> None:
    """What the scanner measured is the displayed value over slope and scale slope."""

    def change(k: int, ds: Dataset) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = "2.5", "-5"
        block = ds.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", 0.125)

    make.series(tmp_path / "s", DATA, AFFINE, change)
    check(found(tmp_path)[""], (DATA * 2.5 - 5) / (2.5 * 0.125), AFFINE)


# --- tilted stacks --------------------------------------------------------------------------------


def field(points: np.ndarray) -> np.ndarray:
    """A smooth image in space: (..., 3) millimetres to values."""
    x, y, z = np.moveaxis(points, -1, 0)
    return 500 + 200 * np.sin(x / 9) + 150 * np.cos(y / 11 + 0.3) + 4 * z


def sampled(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return field(index @ affine[:3, :3].T + affine[:3, 3])


@pytest.mark.parametrize("lean", [(0.0, 0.4), (-0.7, 0.3)])
def test_a_tilted_stack_is_shifted_back(tmp_path: Path, lean: tuple[float, float]) -> None:
    """Against the field itself at the places that the resampled volume claims."""
    affine = np.diag([-1.0, -1.0, 3, 1])
    affine[:3, 3] = 20, 15, -10
    affine[:2, 2] = lean
    data = sampled(affine, (40, 32, 9))
    make.series(tmp_path / "s", np.rint(8 * data).astype(np.int16), affine)
    assert list(found(tmp_path).values()) == ["gantry_tilt"]
    slices, _, where = make.headers(tmp_path)
    image = stack.read(slices, where, upright=True)
    np.testing.assert_allclose(image.affine[:3, :3], np.diag([1.0, 1, 3]), atol=1e-6)
    expected = sampled(image.affine, image.data.shape)
    within = image.data > 0  # beyond a slice's edge is nothing
    assert within[..., 0].sum() >= 39 * 31  # a slice between its first and last pixels
    edge = np.abs(image.data / 8 - expected) > 4  # half a voxel at the edge mixes with nothing
    assert (within & edge).mean() < 0.05
    kept = within & ~edge
    assert np.abs(image.data / 8 - expected)[kept].max() < 1.0  # of 200: linear interpolation


def test_an_upright_stack_is_not_touched(tmp_path: Path) -> None:
    make.series(tmp_path / "s", DATA, AFFINE)
    slices, _, where = make.headers(tmp_path)
    plain = stack.read(slices, where)
    again = stack.read(slices, where, upright=True)
    np.testing.assert_array_equal(again.data, plain.data)
    np.testing.assert_array_equal(again.affine, plain.affine)


# --- real files -----------------------------------------------------------------------------------

REAL = os.environ.get("SYNTHMED_REAL_DATA")
VENDORS = Path(str(REAL)) / "dicom" / "vendors"


def references(file: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The volumes of a NIfTI file in RAS+, one after the other."""
    image = nib.load(file)
    data = np.asanyarray(image.dataobj).astype(np.float64)
    every = [data] if data.ndim == 3 else [data[..., t] for t in range(data.shape[3])]
    turned = [nib.as_closest_canonical(nib.Nifti1Image(d, image.affine)) for d in every]
    return [(t.get_fdata(), t.affine) for t in turned]


@pytest.mark.real_data
@pytest.mark.skipif(REAL is None, reason="SYNTHMED_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("dcm_qa_12bit/In", ["dcm_qa_12bit/Ref/4.nii", "dcm_qa_12bit/Ref/2.nii",
                             "dcm_qa_12bit/Ref/3.nii"]),
        ("dcm_qa_enh/In/Philips", ["dcm_qa_enh/Ref/Philips_WIP_B0_NS_801_e2_fieldmaphz.nii",
                                   "dcm_qa_enh/Ref/Philips_WIP_B0_NS_801_e1.nii"]),
        ("dcm_qa_enh/In/Siemens", ["dcm_qa_enh/Ref/Siemens_REST1_w_SMS_PF7-8_6.nii"]),
        *((f"dcm_qa_nih/In/20180918Si/mr_000{n}", [f"dcm_qa_nih/Ref/EPI_PE={d}_{n}.nii"])
          for n, d in ((3, "AP"), (4, "PA"), (5, "RL"), (6, "LR"))),
        *((f"dcm_qa_nih/In/20180918GE/mr_000{n}",
           [f"dcm_qa_nih/Ref/DCM2NIIX_regression_test_{n}.nii"]) for n in (4, 5, 6, 7)),
        ("dicom2nifti/hyperfine/anatomical/001",
         ["dicom2nifti/hyperfine/anatomical/001_ground_truth.nii.gz"]),
        ("dicom2nifti/siemens_multiframe/anatomical/001",
         ["dicom2nifti/siemens_multiframe/anatomical/001_ground_truth.nii.gz"]),
    ],
)  # fmt: skip
def test_volumes_of_scanners_equal_their_references(folder: str, files: list[str]) -> None:
    """In the order of time: voxels to 2e-5 of the largest, places to 2e-4 mm."""
    images = found(VENDORS / folder)
    expected = [v for f in files for v in references(VENDORS / f)]
    assert len(images) == len(expected)
    for image, (data, affine) in zip(images.values(), expected, strict=True):
        assert isinstance(image, Image), image
        np.testing.assert_allclose(image.data, data, rtol=0, atol=2e-5 * np.abs(data).max())
        np.testing.assert_allclose(image.affine, affine, atol=2e-4)
