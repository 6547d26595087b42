"""Conformed geometry against points whose place is known, and splits that keep people apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from synthmed import configfile
from synthmed.artifacts import Catalogue, ChannelInfo, Dataset, Scan
from synthmed.config import Config
from synthmed.errors import InputError, UsageError
from synthmed.formats import nifti
from synthmed.keys import Key
from synthmed.progress import Progress
from synthmed.stages.prepare import (
    CLIP,
    channels_of,
    conform,
    conform_labels,
    grid_affine,
    prepare,
    split_by_hash,
    split_stratified,
)

QUIET = Progress("prepare", quiet=True)
KEY = Key.root(5)


def config(**data: Any) -> Config:
    tree = {
        "data": {"source": "x", "grid": [32, 32, 32], "spacing_mm": [3, 3, 3], **data},
        "backbone": {"name": "cvae"},
        "privacy": None,
        "train": {"max_steps": 1},
    }
    return configfile.validate(tree, "test")


def catalogue(
    folder: Path, images: dict[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[Catalogue, Scan]:
    """A catalogue of one scan with these channels, as ingest writes them (axes closest to RAS)."""
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    for name, (data, affine) in images.items():
        canonical = nifti.canonical(data, affine)
        nifti.write(folder / "volumes" / f"{name}.nii.gz", canonical.data, canonical.affine)
    scan = Scan(
        scan="p0_s01", patient="p0", session=1, channels={n: f"{n}.nii.gz" for n in images},
        shape=(1, 1, 1), spacing_mm=(1, 1, 1), orientation="RAS",
    )  # fmt: skip
    return Catalogue(folder, (scan,)), scan


def blob(shape: Sequence[int], affine: np.ndarray, world: np.ndarray, mm: float) -> np.ndarray:
    """A Gaussian spot at a world point, evaluated at each voxel's own place."""
    index = np.indices(shape).reshape(3, -1)
    places = affine[:3, :3] @ index + affine[:3, 3:]
    distance = ((places - world[:, None]) ** 2).sum(0)
    return np.asarray(1000 * np.exp(-distance / (2 * mm**2)), np.float32).reshape(shape)


def centre_mm(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Centre of mass in millimetres."""
    index = np.indices(volume.shape).reshape(3, -1)
    mean = (index * volume.ravel()).sum(1) / volume.sum()
    return np.asarray(affine[:3, :3] @ mean + affine[:3, 3])


AXES = {
    "RAS": np.eye(3),
    "LAS": np.diag([-1.0, 1, 1]),
    "LPI": np.diag([-1.0, -1, -1]),
    "permuted": np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]]),
    "oblique": Rotation.from_euler("xyz", [8, -6, 9], degrees=True).as_matrix(),
}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("spacing", [(3, 3, 3), (2, 3, 4.5)], ids=["same", "anisotropic"])
def test_a_point_lands_where_it_was(axes: str, spacing: tuple[float, ...], tmp_path: Path) -> None:
    """Left stays left: the spot is off centre along every axis, and each axis differs."""
    shape = (36, 30, 26)
    affine = np.eye(4)
    affine[:3, :3] = AXES[axes] * spacing
    affine[:3, 3] = [140, -60, 33]
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    offset = np.array([12.0, -7.0, 4.0])
    data = blob(shape, affine, middle + offset, mm=6)
    conf = config()
    found, scan = catalogue(tmp_path, {"T1w": (data, affine)})
    grid = grid_affine(conf.data.grid, (3, 3, 3))
    out = conform(found, scan, conf.data, channels_of(conf.data), grid).volume
    # the grid's origin is the middle of the scan's field of view
    np.testing.assert_allclose(centre_mm(np.where(out[0] > 0.1, out[0], 0), grid), offset, atol=0.6)


def test_a_grid_that_coincides_is_copied(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 4000, (20, 24, 22)).astype(np.float32)
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = [7, 8, 9]
    conf = config(grid=[16, 24, 26], spacing_mm=[2, 2, 2])
    found, scan = catalogue(tmp_path, {"T1w": (data, affine)})
    out = conform(
        found, scan, conf.data, channels_of(conf.data), grid_affine((16, 24, 26), (2, 2, 2))
    ).volume
    low, high = np.percentile(data, [0.5, 99.5])
    expected = np.zeros((16, 24, 26), np.float32)
    expected[:, :, 2:24] = np.clip((data - low) / (high - low), 0, CLIP)[2:18]
    np.testing.assert_allclose(out[0], expected, atol=1e-6)
    # what interpolation would make of it: the control that copying was not by chance
    assert np.abs(gaussian_filter(expected, 0.3) - expected).max() > 0.01


@pytest.mark.parametrize("flat", [0, 1, 2])
def test_a_slice_is_copied_however_it_is_tilted_and_thick(flat: int, tmp_path: Path) -> None:
    """As acquired: turned out of the axes' planes, and thicker than others."""
    rng = np.random.default_rng(0)
    sides = [20, 20, 20]
    sides[flat] = 1
    data = rng.uniform(0, 4000, sides).astype(np.float32)
    angle = np.deg2rad(12)
    turn = np.eye(3)
    turn[1, 1] = turn[2, 2] = np.cos(angle)
    turn[1, 2], turn[2, 1] = -np.sin(angle), np.sin(angle)
    voxel = np.full(3, 2.0)
    voxel[flat] = 7.5
    affine = np.eye(4)
    affine[:3, :3] = turn * voxel
    affine[:3, 3] = [31, -8, 55]
    conf = config(grid=sides, spacing_mm=[5 if a == flat else 2 for a in range(3)])
    found, scan = catalogue(tmp_path, {"T1w": (data, affine)})
    out, view = conform(
        found, scan, conf.data, channels_of(conf.data),
        grid_affine(conf.data.grid, conf.data.spacing_mm or ()),
    )  # fmt: skip
    low, high = np.percentile(data, [0.5, 99.5])
    expected = np.clip((data - low) / (high - low), 0, CLIP)
    np.testing.assert_allclose(out[0], expected, atol=1e-6)
    assert view == tuple(sides)
    labels = (data > 3000).astype(np.uint8)
    place = grid_affine(conf.data.grid, conf.data.spacing_mm or ())
    np.testing.assert_array_equal(conform_labels(labels, affine, conf.data.grid, place), labels)


def test_a_scan_of_odd_length_on_an_even_grid_is_not_blurred(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.uniform(100, 4000, (15, 24, 19)).astype(np.float32)
    conf = config(grid=[16, 24, 16], spacing_mm=[2, 2, 2])
    found, scan = catalogue(tmp_path, {"T1w": (data, np.diag([2.0, 2, 2, 1]))})
    grid = grid_affine((16, 24, 16), (2, 2, 2))
    out = conform(found, scan, conf.data, channels_of(conf.data), grid).volume[0]
    low, high = np.percentile(data, [0.5, 99.5])
    whole = np.clip((data - low) / (high - low), 0, CLIP)
    # (15 - 16) / 2 and (19 - 16) / 2 voxels aside, rounded to the even
    np.testing.assert_allclose(out[:15], whole[:, :, 2:18], atol=1e-6)
    assert (out[15] == 0).all()


@pytest.mark.parametrize("axis", range(3))
def test_a_coarser_grid_does_not_alias(axis: int, tmp_path: Path) -> None:
    """A wave of 1.25 target voxels would come back as one of 5 at full height."""
    shape = [40, 40, 40]
    wave = np.sin(2 * np.pi * np.arange(40) / 5)
    data = (500 + 400 * wave.reshape([-1 if i == axis else 1 for i in range(3)])) * np.ones(shape)
    found, scan = catalogue(tmp_path, {"T1w": (data.astype(np.float32), np.eye(4))})
    spacing = [4.0 if i == axis else 1.0 for i in range(3)]
    grid = [10 if i == axis else 40 for i in range(3)]
    conf = config(grid=grid, spacing_mm=spacing)
    out = conform(
        found, scan, conf.data, channels_of(conf.data), grid_affine(grid, spacing)
    ).volume[0]
    inner = out[2:-2, 2:-2, 2:-2]
    assert np.ptp(inner) < 0.25, "the wave is gone, not folded"
    assert abs(inner.mean() - 0.5) < 0.1
    # without the blur, taking every fourth voxel keeps its height
    raw = np.take(data, range(0, 40, 4), axis)
    assert np.ptp(raw) / np.ptp(data) > 0.9


def test_masks_stay_between_0_and_1_and_keep_their_volume(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1, 1, 1])
    index = np.indices((40, 40, 40)) - 19.5
    ball = ((index**2).sum(0) < 100).astype(np.float32)
    data = np.where(ball > 0, 2, np.where(index[0] > 12, 5, 0)).astype(np.uint8)
    channels = {
        "T1w": {"column": "image"},
        "seg": {"column": "mask", "labels": {"ball": 2, "wall": 5}},
    }
    conf = config(grid=[20, 20, 20], spacing_mm=[2, 2, 2], channels=channels)
    infos = channels_of(conf.data)
    assert [c.name for c in infos] == ["T1w", "seg:ball", "seg:wall"]
    image = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32)
    found, scan = catalogue(tmp_path, {"T1w": (image, affine), "seg": (data, affine)})
    out = conform(found, scan, conf.data, infos, grid_affine((20, 20, 20), (2, 2, 2))).volume
    assert out[1:].min() >= 0
    assert out[1:].max() <= 1
    assert out[1].sum() * 8 == pytest.approx(ball.sum(), rel=0.02)
    assert (out[1] + out[2]).max() <= 1 + 1e-5
    assert out[0].max() <= CLIP


def test_intensities_are_scaled_by_the_scan_alone(tmp_path: Path) -> None:
    """Gain and offset of a scanner vanish; what is far brighter than all else is clipped."""
    rng = np.random.default_rng(1)
    data = rng.gamma(2, 100, (32, 32, 32)).astype(np.float32)
    conf = config()
    grid = grid_affine((32, 32, 32), (3, 3, 3))
    outs = []
    for name, values in {"a": data, "b": 7 * data + 300}.items():
        found, scan = catalogue(tmp_path / name, {"T1w": (values, np.diag([3.0, 3, 3, 1]))})
        outs.append(conform(found, scan, conf.data, channels_of(conf.data), grid).volume)
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-4)
    assert np.mean(outs[0] > 1) == pytest.approx(0.005, abs=0.001)
    assert outs[0].max() == CLIP


# --- splits --------------------------------------------------------------------------------------


def scan_of(patient: str, session: int = 1, **fields: Any) -> Scan:
    return Scan(
        scan=f"{patient}_s{session:02d}", patient=patient, session=session, channels={},
        shape=(8, 8, 8), spacing_mm=(1, 1, 1), orientation="RAS", **fields,
    )  # fmt: skip


cohorts = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from("AB"), st.sampled_from("FM")),
    min_size=10,
    max_size=60,
).map(
    lambda people: [
        # a later session may carry another label; the first one counts
        scan_of(f"p{i:04d}", k, labels={"dx": dx if k == 1 else "A", "sex": sex, "age": 40.0 + i})
        for i, (n, dx, sex) in enumerate(people)
        for k in range(1, n + 1)
    ]
)


def test_given_masks_come_last_and_keep_whole_labels(tmp_path: Path) -> None:
    """What is told to the model is 0 or 1, by the rule that sampling will use; what it draws is
    soft at the edge."""
    channels = {
        "roi": {"column": "roi", "labels": {"a": 3}, "given": True},
        "T1w": {"column": "image"},
        "seg": {"column": "mask", "labels": {"ball": 2}},
    }
    tree = config().model_dump(mode="json")
    tree["data"] |= {"grid": [20, 20, 20], "spacing_mm": [2, 2, 2], "channels": channels}
    conf = configfile.validate({**tree, "sample": {"masks": "m"}}, "test")
    infos = channels_of(conf.data)
    assert [(c.name, c.given) for c in infos] == [
        ("T1w", False), ("seg:ball", False), ("roi:a", True),
    ]  # fmt: skip
    ball = ((np.indices((40, 41, 40)) - 19.5) ** 2).sum(0) < 100
    image = np.random.default_rng(0).random(ball.shape).astype(np.float32)
    maps = {"seg": (2 * ball).astype(np.uint8), "roi": (3 * ball).astype(np.uint8)}
    affine = np.diag([1.0, 1, 1, 1])
    found, scan = catalogue(tmp_path, {k: (v, affine) for k, v in {"T1w": image, **maps}.items()})
    grid = grid_affine((20, 20, 20), (2, 2, 2))
    out = conform(found, scan, conf.data, infos, grid).volume
    assert set(np.unique(out[2])) == {0, 1}
    assert len(np.unique(out[1])) > 10
    assert np.abs(out[1] - out[2]).max() < 1, "the same ball in the same place"
    alone = conform_labels(maps["roi"], affine, (20, 20, 20), grid)
    assert np.array_equal(out[2], alone == 3)
    # an independent nearest neighbour: the value at each voxel's own place
    index = np.stack(np.meshgrid(*[2 * (np.arange(20) - 9.5)] * 3, indexing="ij"))
    at = [index[0] + 19.5, index[1] + 20, index[2] + 19.5]
    near = [maps["roi"][tuple(f(a).astype(int) for a in at)] for f in (np.floor, np.ceil)]
    sure = near[0] == near[1]
    assert sure.mean() > 0.9
    assert np.array_equal(alone[sure], near[0][sure])


def test_a_missing_label_is_a_stratum_of_its_own() -> None:
    """And `x` as one label is not `x` as another."""
    labels = [{"dx": "x", "sex": "F"}, {"dx": "x"}, {"sex": "x"}, {"age": 3.0}]
    scans = [scan_of(f"p{i:04d}", labels=labels[i % 4]) for i in range(80)]
    held = split_stratified(scans, 0.25, KEY)
    assert Counter(int(p[1:]) % 4 for p in held) == {0: 5, 1: 5, 2: 5, 3: 5}


@given(cohorts, st.floats(0.01, 0.89))
@settings(max_examples=60, deadline=None)
def test_every_stratum_gives_its_share_and_the_total_is_exact(
    scans: list[Scan], share: float
) -> None:
    held = split_stratified(scans, share, KEY)
    people = {s.patient for s in scans}
    assert held <= people
    assert len(held) == round(share * len(people))
    strata = defaultdict(set)
    for s in scans:
        if s.session == 1:
            strata[s.labels["dx"], s.labels["sex"]].add(s.patient)
    for members in strata.values():
        assert abs(len(held & members) - share * len(members)) < 1 + 1e-9
    assert split_stratified(scans[::-1], share, KEY) == held, "the order of scans does not matter"


@given(cohorts, st.floats(0.1, 0.8), st.data())
@settings(max_examples=60, deadline=None)
def test_by_hash_nobody_moves_another(scans: list[Scan], share: float, data: Any) -> None:
    held = split_by_hash(scans, share, KEY)
    gone = data.draw(st.sampled_from(sorted({s.patient for s in scans})))
    fewer = [s for s in scans if s.patient != gone]
    assert split_by_hash(fewer, share, KEY) == held - {gone}
    more = [*scans, scan_of("pnew", labels={"dx": "B", "sex": "F", "age": 1.0})]
    assert split_by_hash(more, share, KEY) - {"pnew"} == held


def test_by_hash_the_share_is_right_on_average() -> None:
    scans = [scan_of(f"p{i:05d}") for i in range(4000)]
    # four standard deviations of a binomial share
    assert len(split_by_hash(scans, 0.3, KEY)) / 4000 == pytest.approx(0.3, abs=0.03)
    assert split_by_hash(scans, 0.3, Key.root(6)) != split_by_hash(scans, 0.3, KEY)


@pytest.mark.parametrize("split", [split_stratified, split_by_hash])
def test_a_prescribed_split_is_kept(split: Any) -> None:
    sides = ["holdout", "train", "train", None, "holdout"]
    scans = [scan_of(f"p{i}", labels={"dx": "A"}, split=side) for i, side in enumerate(sides)]
    scans.append(scan_of("p0", 2, split="holdout"))
    assert split(scans, 0.5, KEY) == {"p0", "p4"}


@pytest.mark.parametrize("split", [split_stratified, split_by_hash])
def test_a_person_on_both_sides_is_refused(split: Any) -> None:
    scans = [scan_of("p0", 1, split="train"), scan_of("p0", 2, split="holdout"), scan_of("p1")]
    with pytest.raises(InputError, match="patient p0 is in train and in holdout"):
        split(scans, 0.5, KEY)


# --- the stage -----------------------------------------------------------------------------------


@pytest.fixture
def twelve(tmp_path: Path) -> Catalogue:
    """Twelve patients, the last with two scans, each volume filled with its own number."""
    folder = tmp_path / "ingest"
    (folder / "volumes").mkdir(parents=True)
    scans = []
    for i in range(13):
        patient, session = (f"p{min(i, 11):02d}", 2 if i == 12 else 1)
        data = np.zeros((10, 10, 10), np.int16)
        data[2:8, 2:8, 2:8] = 100
        data[4, 4, 4] = 100 + i
        nifti.write(folder / "volumes" / f"{i}.nii.gz", data, np.diag([2.0, 2, 2, 1]))
        scans.append(
            Scan(
                scan=f"{patient}_s{session:02d}",
                patient=patient,
                session=session,
                channels={"T1w": f"{i}.nii.gz"},
                shape=(10, 10, 10),
                spacing_mm=(2, 2, 2 + i / 10),
                orientation="RAS",
                labels={"dx": "AB"[i % 2]},
            )
        )
    return Catalogue(folder, tuple(scans[::-1]))


def test_the_dataset_is_indexed_by_patient(twelve: Catalogue, tmp_path: Path) -> None:
    target = tmp_path / "prepare"
    target.mkdir()
    conf = config(grid=[8, 8, 8], spacing_mm=[2, 2, 2], holdout=0.25)
    facts = prepare(conf, twelve, target, QUIET)
    data = Dataset.open(target)
    assert (facts["n_scans"], facts["n_train"], facts["n_holdout"]) == (13, 9, 3)
    assert data.volumes.shape == (13, 1, 8, 8, 8)
    assert data.volumes.dtype == np.float16
    assert not set(data.train_patients()) & set(data.holdout_patients())
    assert len(set(data.holdout[data.patients == "p11"])) == 1, "both scans on one side"
    channels = channels_of(conf.data)
    for i, scan in enumerate(sorted(twelve.scans, key=lambda s: s.scan)):
        assert data.patients[i] == scan.patient
        assert data.labels[i] == scan.labels
        expected = conform(
            twelve, scan, conf.data, channels, grid_affine((8, 8, 8), (2, 2, 2))
        ).volume
        np.testing.assert_array_equal(data.volumes[i], expected.astype(np.float16))
    # the file is what numpy itself would have written
    again = tmp_path / "again.npy"
    np.save(again, np.asarray(data.volumes))
    assert again.read_bytes() == (target / "volumes.npy").read_bytes()
    assert json.loads((target / "dataset.json").read_text())["scans"][0]["patient"] == "p00"


def test_the_median_voxel_size_unless_privacy_forbids(twelve: Catalogue, tmp_path: Path) -> None:
    conf = config(grid=[8, 8, 8], spacing_mm=None)
    facts = prepare(conf, twelve, tmp_path, QUIET)
    assert facts["spacing_mm"] == [2, 2, 2.6]
    promise = {"epsilon": 3, "sample_rate": 0.5, "patients": 9}
    tree = conf.model_dump(mode="json") | {"privacy": promise}
    tree["data"] |= {"view": "grid", "patient": "patient"}
    with pytest.raises(UsageError, match=r"data\.spacing_mm: null takes the cohort's median"):
        configfile.validate(tree, "test")


def test_nobody_left_to_train_on(twelve: Catalogue, tmp_path: Path) -> None:
    all_out = Catalogue(
        twelve.path, tuple(s.model_copy(update={"split": "holdout"}) for s in twelve.scans)
    )
    with pytest.raises(InputError, match="no patient is left to train on"):
        prepare(config(grid=[8, 8, 8]), all_out, tmp_path, QUIET)


def test_strata_are_balanced_in_the_finished_run(finished: Any) -> None:
    """On the phantoms, whose groups are balanced by design."""
    data = Dataset.open(finished.path / "private/prepare")
    first = {p: labels["diagnosis"] for p, labels in zip(data.patients, data.labels, strict=True)}
    counts = Counter(first[p] for p in data.holdout_patients())
    assert abs(counts["control"] - counts["atrophy"]) <= 2


def test_channels_need_no_mask() -> None:
    assert channels_of(config().data) == [ChannelInfo("T1w")]


def test_the_grid_is_centred() -> None:
    affine = grid_affine((9, 10, 11), (1, 2, 3))
    corners = affine @ np.array([[0, 0, 0, 1], [8, 9, 10, 1]]).T
    np.testing.assert_allclose(corners.sum(1)[:3], 0)
    assert (np.diag(affine) > 0).all()
