"""NIfTI: geometry survives, bounds hold, and every broken file is refused for its own reason."""

from __future__ import annotations

import gzip
import itertools
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import make
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthmed.formats import nifti
from synthmed.formats.refusal import REASONS, Refused

ORIENTATIONS = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (a for a in range(3) if a != axis)
        step = np.eye(3)
        step[[i, j], [i, j]] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def refused(path: Path) -> str:
    with pytest.raises(Refused) as reason:
        nifti.read(path)
    assert reason.value.code in REASONS
    return reason.value.code


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    orientation=st.sampled_from(ORIENTATIONS),
    degrees=st.tuples(*[st.floats(-20, 20)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    origin=st.tuples(*[st.floats(-150, 150)] * 3),
    planted=st.tuples(*[st.integers(0, 7)] * 3),
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
    data = np.zeros((8, 9, 10), dtype=np.int16)
    data[planted] = 700
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ np.eye(3)[:, axes] * np.array(signs) * np.array(spacing)
    affine[:3, 3] = origin
    path = make.nifti(tmp_path_factory.getbasetemp() / "planted.nii", data, affine)
    stored = nib.load(path).affine  # single precision
    image = nifti.read(path)
    found = np.argwhere(image.data == 700)
    assert len(found) == 1
    np.testing.assert_allclose(
        image.affine[:3] @ [*found[0], 1], stored[:3] @ [*planted, 1], atol=1e-3
    )
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.orientation == "".join(nib.aff2axcodes(stored))
    oracle = nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(image.data, np.asarray(oracle.dataobj))
    np.testing.assert_allclose(image.affine, oracle.affine, atol=1e-6)


def test_left_stays_left(tmp_path: Path) -> None:
    data = make.voxels(1)
    data[0] = 5000  # the first plane of an L-to-R axis is on the left
    las = np.diag([-1.0, 1, 1, 1])
    image = nifti.read(make.nifti(tmp_path / "las.nii.gz", data, las))
    assert image.orientation == "LAS"
    assert (image.data[-1] == 5000).all()
    x = image.affine @ [len(image.data) - 1, 0, 0, 1]
    np.testing.assert_allclose(x, las @ [0, 0, 0, 1])


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
def test_every_type_is_read_as_nibabel_reads_it(
    tmp_path: Path, kind: str, order: str, version: int
) -> None:
    data = np.random.default_rng(3).integers(0, 120, (8, 8, 8)).astype(kind)
    cls, header = (
        (nib.Nifti1Image, nib.Nifti1Header(endianness=order))
        if version == 1
        else (nib.Nifti2Image, nib.Nifti2Header(endianness=order))
    )
    image = cls(data, np.diag([3.0, 2, 1, 1]), header, dtype=data.dtype)
    image.set_sform(image.affine, 1)
    path = tmp_path / "typed.nii.gz"
    path.write_bytes(gzip.compress(image.to_bytes()))
    found = nifti.read(path)
    assert found.data.dtype == np.uint8
    np.testing.assert_array_equal(found.data, data)


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(0, 255, "u1"), (-1, 255, "i2"), (0, 256, "i2"), (0, 40000, "f4"), (-40000, 0, "f4")],
)
def test_storage_is_the_smallest_exact_one(low: int, high: int, kind: str) -> None:
    data = np.array([low, high] * 4, dtype=np.float64)
    assert nifti.compact(data).dtype == np.dtype(kind)
    assert nifti.compact(data + 0.5).dtype == np.float32


@pytest.mark.parametrize(("slope", "inter"), [(0.5, -3), (0, 7), (np.nan, 7), (1, 0)])
def test_scaling_follows_the_standard(tmp_path: Path, slope: float, inter: float) -> None:
    def scale(header: Any) -> None:
        header["scl_slope"], header["scl_inter"] = slope, inter

    data = make.voxels(2)
    image = nifti.read(make.nifti(tmp_path / "scaled.nii", data, change=scale))
    expected = data * slope + inter if slope == 0.5 else data
    np.testing.assert_array_equal(image.data, expected)


def test_the_qform_stands_in_for_the_sform(tmp_path: Path) -> None:
    image = nib.Nifti1Image(make.voxels(4), np.eye(4))
    affine = np.eye(4)
    affine[:3, :3] = rotation((10, 5, 0)) * [-2, 1, 3]
    image.set_sform(None, 0)
    image.set_qform(affine, 1)
    path = tmp_path / "q.nii"
    path.write_bytes(image.to_bytes())
    oracle = nib.as_closest_canonical(nib.load(path))
    np.testing.assert_allclose(nifti.read(path).affine, oracle.affine, atol=1e-5)


def test_metres_and_micrometres_are_millimetres(tmp_path: Path) -> None:
    for unit, factor in ((1, 1000), (3, 0.001)):
        affine = np.diag([2 / factor] * 3 + [1.0])
        path = make.nifti(
            tmp_path / "u.nii",
            make.voxels(5),
            affine,
            lambda h, u=unit: h.__setitem__("xyzt_units", u),
        )
        assert nifti.read(path).spacing_mm == pytest.approx((2, 2, 2))


def test_trailing_axes_of_one_are_dropped(tmp_path: Path) -> None:
    data = make.voxels(6)[..., None]
    assert nifti.read(make.nifti(tmp_path / "x.nii", data)).data.shape == data.shape[:3]


def set_(**fields: Any) -> Any:
    def change(header: Any) -> None:
        for name, value in fields.items():
            header[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (set_(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "oversized"),
        (set_(dim=[3, 4096, 4096, 4096, 1, 1, 1, 1]), "oversized"),
        (set_(dim=[3, -12, 10, 9, 1, 1, 1, 1]), "header_unreadable"),
        (set_(dim=[3, 12, 10, 0, 1, 1, 1, 1]), "header_unreadable"),
        (set_(dim=[99, 12, 10, 9, 1, 1, 1, 1]), "header_unreadable"),
        (set_(dim=[3, 12, 10, 90, 1, 1, 1, 1]), "truncated"),
        (set_(dim=[4, 12, 10, 3, 3, 1, 1, 1]), "not_3d"),
        (set_(dim=[1, 12, 1, 1, 1, 1, 1, 1]), "not_3d"),
        (set_(datatype=32), "complex_or_rgb"),
        (set_(datatype=128), "complex_or_rgb"),
        (set_(datatype=999), "header_unreadable"),
        (set_(vox_offset=-352), "header_unreadable"),
        (set_(vox_offset=np.nan), "header_unreadable"),
        (set_(vox_offset=1e30), "header_unreadable"),
        (set_(scl_slope=np.inf), "header_unreadable"),
        (set_(scl_slope=2, scl_inter=np.nan), "header_unreadable"),
        (set_(sform_code=0), "geometry_invalid"),
        (set_(srow_x=[0, 0, 0, 0]), "geometry_invalid"),
        (set_(srow_x=[np.nan, 0, 0, 0]), "geometry_invalid"),
        (set_(srow_x=[2, 2, 0, 0], srow_y=[2, 2.01, 0, 0]), "geometry_invalid"),
        (set_(sform_code=0, qform_code=1, pixdim=[1, -2, 2, 2, 0, 0, 0, 0]), "geometry_invalid"),
        (
            set_(sform_code=0, qform_code=1, pixdim=[1, np.nan, 2, 2, 0, 0, 0, 0]),
            "geometry_invalid",
        ),
        (set_(sform_code=0, qform_code=1, quatern_b=7), "geometry_invalid"),
        # the other way round than the sform
        (set_(qform_code=1, pixdim=[-1, 2, 2, 2, 0, 0, 0, 0]), "geometry_invalid"),
        (set_(sizeof_hdr=349), "header_unreadable"),
        (set_(magic=b"ni1"), "header_unreadable"),
    ],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_lying_header_is_refused(tmp_path: Path, change: Any, code: str, ending: str) -> None:
    assert refused(make.nifti(tmp_path / f"bad{ending}", make.voxels(7), change=change)) == code


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_not_finite_is_enough(tmp_path: Path, bad: float) -> None:
    data = make.voxels(8).astype(np.float32)
    data[3, 3, 3] = bad
    assert refused(make.nifti(tmp_path / "bad.nii.gz", data)) == "not_finite"


def test_damaged_bytes_are_refused(tmp_path: Path) -> None:
    whole = make.nifti(tmp_path / "whole.nii.gz", make.voxels(9)).read_bytes()
    path = tmp_path / "bad.nii.gz"
    for content, code in [
        (b"", "truncated"),
        (b"only text", "header_unreadable"),
        (whole[: len(whole) // 2], "truncated"),
        (whole[:-8] + b"\0\0\0\0" + whole[-4:], "truncated"),
        (gzip.compress(b"only text"), "header_unreadable"),
        (gzip.compress(gzip.decompress(whole)[:300]), "header_unreadable"),
        (gzip.compress(gzip.decompress(whole) + bytes(1 << 17)), "oversized"),
        (b"\x1f\x8b" + os.urandom(500), "truncated"),
    ]:
        path.write_bytes(content)
        assert refused(path) == code


@pytest.mark.parametrize("claimed", [(12, 10, 9), (500, 500, 500)])
def test_a_gzip_bomb_stays_within_bounds(tmp_path: Path, claimed: tuple[int, int, int]) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(claimed)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    path = tmp_path / "bomb.nii.gz"
    with gzip.open(path, "wb", 9) as bomb:
        bomb.write(header.binaryblock + bytes(4))
        for _ in range(64):
            bomb.write(bytes(1 << 20))
    started = time.monotonic()
    tracemalloc.start()
    code = refused(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == ("oversized" if claimed[0] == 12 else "truncated")
    assert peak < 100 << 20
    assert time.monotonic() - started < 10


def test_what_is_written_is_fresh_and_repeatable(tmp_path: Path) -> None:
    affine = np.diag([1.5, 2, 2.5, 1])
    affine[:3, 3] = [-10, 20, 30]
    for name in ("a.nii.gz", "b.nii.gz"):
        nifti.write(tmp_path / name, make.voxels(10), affine)
    first, second = ((tmp_path / n).read_bytes() for n in ("a.nii.gz", "b.nii.gz"))
    assert first == second
    assert first[3] == 0  # no file name in the gzip header
    assert first[4:8] == bytes(4)  # nor a time
    header = nib.load(tmp_path / "a.nii.gz").header
    assert header.extensions == []
    assert not any(header[f].item().strip(b"\0") for f in ("descrip", "aux_file", "db_name"))
    again = nifti.read(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(again.data, make.voxels(10))
    np.testing.assert_allclose(again.affine, affine)


@pytest.mark.real_data
@pytest.mark.skipif("SYNTHMED_REAL_DATA" not in os.environ, reason="SYNTHMED_REAL_DATA is not set")
def test_hostile_files_are_refused_or_read_rightly() -> None:
    folder = Path(os.environ["SYNTHMED_REAL_DATA"]) / "hostile/nifti"
    outcome = {}
    for path in sorted(folder.iterdir()):
        started = time.monotonic()
        try:
            image = nifti.read(path)
        except Refused as reason:
            outcome[path.name] = reason.code
        else:
            outcome[path.name] = "read"
            content = path.read_bytes()
            if content[:2] == b"\x1f\x8b":
                content = gzip.decompress(content)
            oracle = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(content))
            np.testing.assert_allclose(image.data, oracle.get_fdata(), rtol=1e-6)
            np.testing.assert_allclose(image.affine, oracle.affine, atol=1e-5)
        assert time.monotonic() - started < 10
    read = {name for name, code in outcome.items() if code == "read"}
    assert read <= {
        "1vox.nii.gz", "anisotropic_0.1x9.nii.gz", "bigendian.nii.gz", "not_gzip.nii.gz",
        "phi_in_descrip.nii.gz", "pixdim_neg.nii.gz",
    }  # fmt: skip
