"""The field of view: found where prepare put it, filled by mirror, drawn as the cohort has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from synthmed import configfile
from synthmed.artifacts import Catalogue, ChannelInfo, Dataset, Scan
from synthmed.conditions import Conditions
from synthmed.config import Augment, Config
from synthmed.formats import nifti
from synthmed.keys import torch_generator
from synthmed.loader import Loader
from synthmed.progress import Progress
from synthmed.stages.prepare import prepare
from synthmed.stages.sample import Sampler
from synthmed.stages.train import train
from synthmed.view import Views, box, cut, fill, measured, view_of

GRID = (10, 12, 9)
SIZE = {"kind": "categorical", "categories": ["small", "large"]}
QUIET = Progress("test", quiet=True)


def config(**data: Any) -> Config:
    tree = {
        "data": {"source": "x", "grid": GRID, "spacing_mm": [2, 2, 2], "holdout": 0.3, **data},
        "backbone": {"name": "cvae", "latent": 2, "widths": [4, 4]},
        "privacy": None,
        "train": {"max_steps": 2, "batch_patients": 4, "precision": "fp32"},
    }
    return configfile.validate(tree, "test")


def bright(
    folder: Path, shape: Sequence[int], affine: np.ndarray, n: int = 4, seed: int = 0
) -> Catalogue:
    """`n` patients whose scans have no dark voxel: what is 0 on the grid was never measured."""
    (folder / "volumes").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    scans = []
    for i in range(n):
        data = rng.uniform(500, 1000, tuple(shape)).astype(np.float32)
        data[tuple(k // 2 for k in shape)] = 0  # the intensity scale begins at a true 0
        canonical = nifti.canonical(data, affine)
        nifti.write(folder / "volumes" / f"{i}.nii.gz", canonical.data, canonical.affine)
        scans.append(
            Scan(
                scan=f"p{i}_s01",
                patient=f"p{i}",
                session=1,
                channels={"T1w": f"{i}.nii.gz"},
                shape=(1, 1, 1),
                spacing_mm=(1, 1, 1),
                orientation="RAS",
            )
        )
    return Catalogue(folder, tuple(scans))


def prepared(folder: Path, conf: Config, catalogue: Catalogue) -> Dataset:
    folder.mkdir()
    prepare(conf, catalogue, folder, QUIET)
    return Dataset.open(folder)


# --- where a scan ends on the grid ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((7, 12, 4), (2.0, 2, 2)),
        ((6, 5, 9), (2.0, 2, 2)),
        ((14, 13, 3), (2.0, 2, 2)),
        ((5, 9, 6), (3.0, 1.5, 2.5)),
        ((4, 4, 4), (4.1, 3.3, 2.0)),
    ],
)
def test_a_view_is_what_prepare_has_filled(
    shape: tuple[int, int, int], spacing: tuple[float, ...], tmp_path: Path
) -> None:
    catalogue = bright(tmp_path / "c", shape, np.diag([*spacing, 1.0]))
    data = prepared(tmp_path / "d", config(intensity={"low_percentile": 0}), catalogue)
    assert data.views is not None
    for volume, view in zip(data.volumes, data.views, strict=True):
        measured = np.argwhere(volume[0] > 0.1)
        inside = box(view, GRID)
        assert [(s.start, s.stop) for s in inside] == [
            (low, high + 1) for low, high in zip(measured.min(0), measured.max(0), strict=True)
        ]


def test_an_empty_frame_in_the_file_is_no_part_of_the_view(tmp_path: Path) -> None:
    """A padded file is prepared as the one that was not, wherever in the padding it lies."""
    rng = np.random.default_rng(0)
    data = rng.uniform(100, 900, (7, 8, 6)).astype(np.float32)
    affine = np.diag([2.0, 2, 2, 1])
    made = []
    for name, pad in {
        "bare": [(0, 0)] * 3,
        "framed": [(1, 2), (4, 0), (3, 3)],
        "wide": [(9, 1), (2, 9), (0, 8)],
    }.items():
        catalogue = bright(tmp_path / name, (4, 4, 4), affine)
        for scan in catalogue.scans:
            nifti.write(catalogue.file(scan, "T1w"), np.pad(data, pad), affine)
        made.append(prepared(tmp_path / f"{name}-data", config(), catalogue))
    bare, *padded = made
    for other in padded:
        np.testing.assert_array_equal(other.volumes, bare.volumes)
        np.testing.assert_array_equal(other.views, bare.views)
    assert bare.views is not None and (bare.views == (7, 8, 6)).all()


def test_darkness_round_an_object_is_no_frame() -> None:
    """A ball, also one that ends at two faces of its file, is not cut out."""
    where = np.indices((20, 22, 18)) - np.array([9.5, 10.5, 8.5])[:, None, None, None]
    ball = ((where**2).sum(0) < 60).astype(np.float32)
    assert measured(ball) == (slice(0, 20), slice(0, 22), slice(0, 18))
    assert measured(ball[:, :, 5:]) == (slice(0, 20), slice(0, 22), slice(0, 13))
    assert measured(np.zeros((3, 4, 5))) == (slice(0, 3), slice(0, 4), slice(0, 5))
    block = np.zeros((20, 22, 18))
    block[3:9, 4:5, :] = 1
    assert measured(block) == (slice(3, 9), slice(4, 5), slice(0, 18))


def test_a_scan_that_is_turned_fills_the_grid(tmp_path: Path) -> None:
    """Its frame has no straight box, and stays a part of the image."""
    affine = np.eye(4)
    affine[:3, :3] = 2 * Rotation.from_euler("z", 12, degrees=True).as_matrix()
    data = prepared(tmp_path / "d", config(), bright(tmp_path / "c", (6, 6, 6), affine))
    assert data.views is not None and (data.views == GRID).all()
    flipped = np.diag([-2.0, 2, 2, 1])
    assert view_of((6, 6, 6), flipped, GRID, np.diag([2.0, 2, 2, 1])) == GRID


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    catalogue = bright(tmp_path / "c", (6, 6, 6), np.diag([2.0, 2, 2, 1]))
    data = prepared(tmp_path / "d", config(view="grid"), catalogue)
    assert data.views is not None and (data.views == GRID).all()
    loader = Loader(data, Conditions({}), 2, Augment())
    assert loader.views is None and loader.spec.condition_width == 0
    batch = loader.watched_batch("train", "cpu")
    assert batch is not None and (batch.x[:, 0, 0, 0] == 0).all()


# --- filling and cutting --------------------------------------------------------------------------


@given(
    views=st.tuples(*(st.integers(1, n) for n in GRID)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_what_is_filled_is_the_mirror_image(views: tuple[int, int, int], seed: int) -> None:
    """numpy's symmetric padding of what is inside; and cutting gives that back."""
    x = np.random.default_rng(seed).random((2, *GRID)).astype(np.float32)
    inside = box(views, GRID)
    pad = [(0, 0), *((s.start, n - s.stop) for s, n in zip(inside, GRID, strict=True))]
    filled = fill(torch.from_numpy(x), views)
    np.testing.assert_array_equal(filled, np.pad(x[(slice(None), *inside)], pad, mode="symmetric"))
    back = cut(filled[None], [views])[0].numpy()
    np.testing.assert_array_equal(back[(slice(None), *inside)], x[(slice(None), *inside)])
    assert np.count_nonzero(back) <= 2 * np.prod(views)


def test_each_volume_is_cut_to_its_own_view() -> None:
    x = torch.ones(2, 1, *GRID)
    out = cut(x, [(4, 12, 9), (10, 3, 2)])
    assert out.flatten(1).sum(1).tolist() == [4 * 12 * 9, 10 * 3 * 2]
    assert (x == 1).all()


# --- the cohort's views ---------------------------------------------------------------------------


def test_drawn_views_are_spread_as_the_cohort_and_follow_the_condition() -> None:
    """Against the moments of the distribution that they were fitted to."""
    rng = np.random.default_rng(0)
    grid = (60, 80, 70)
    large = rng.random(4000) < 0.4
    c = np.stack([~large, large], 1).astype(np.float32)
    mixing = np.array([[3.0, 0, 0], [2, 1.5, 0], [0, 0, 2]])
    sizes = np.array([40, 50, 45]) + 8 * large[:, None] + rng.normal(size=(4000, 3)) @ mixing.T
    fitted = Views.fit(np.rint(sizes).astype(np.int64), c, grid)
    assert fitted is not None
    again = Views.from_json(fitted.as_json())
    for label, shift in ((0, 0), (1, 8)):
        told = torch.tensor([1.0 - label, label])
        drawn = np.array([fitted.draw(torch_generator(k), told) for k in range(3000)])
        # four standard errors, and the twelfth of a voxel that rounding adds twice
        error = 4 * np.sqrt(np.diag(mixing @ mixing.T) / 1500)
        assert (np.abs(drawn.mean(0) - [40 + shift, 50 + shift, 45 + shift]) < error + 0.1).all()
        np.testing.assert_allclose(np.cov(drawn.T), mixing @ mixing.T, atol=1.2)
        assert again.draw(torch_generator(5), told) == fitted.draw(torch_generator(5), told)


def test_somebody_scanned_often_shapes_views_once() -> None:
    rng = np.random.default_rng(0)
    sizes, c = rng.integers(4, 9, (30, 3)), rng.random((30, 2)).astype(np.float32)
    rows = np.concatenate([[0, 0], np.arange(30)])
    each = np.where(rows == 0, 1 / 3, 1.0)
    once, often = Views.fit(sizes, c, (8, 8, 8)), Views.fit(sizes[rows], c[rows], (8, 8, 8), each)
    alike = Views.fit(sizes[rows], c[rows], (8, 8, 8))
    assert once is not None and often is not None and alike is not None
    np.testing.assert_allclose(often.mean, once.mean, atol=1e-5)
    np.testing.assert_allclose(often.weight, once.weight, atol=1e-4)
    spread = [v.factor @ v.factor.T for v in (often, once)]
    np.testing.assert_allclose(*spread, atol=1e-4)
    assert np.abs(alike.mean - once.mean).max() > 0.01


def test_views_that_all_fill_the_grid_are_not_drawn() -> None:
    assert Views.fit(np.full((4, 3), 8), np.zeros((4, 0), np.float32), (8, 8, 8)) is None


def test_a_whole_grid_is_told_as_zero_and_views_stay_inside_it() -> None:
    views = np.array([[10, 12, 9], [10, 11, 9], [9, 12, 9], [10, 12, 9]])
    fitted = Views.fit(views, np.zeros((4, 0), np.float32), GRID)
    assert fitted is not None
    assert (fitted.encode([GRID]) == 0).all() and (fitted.encode([(5, 6, 3)]) < -1).all()
    drawn = [fitted.draw(torch_generator(k), torch.zeros(0)) for k in range(200)]
    assert max(x for x, _, _ in drawn) == 10 and max(y for _, y, _ in drawn) == 12


# --- training and sampling ------------------------------------------------------------------------


def cohort(n: int = 30) -> Dataset:
    """Small scans of label small, larger ones of label large; nothing is 0 inside a view."""
    rng = np.random.default_rng(1)
    labels = [{"size": "small" if i % 2 else "large"} for i in range(n)]
    views = np.array([(5, 6, 4) if i % 2 else (8, 11, 7) for i in range(n)])
    views = views + rng.integers(0, 2, (n, 3))
    volumes = np.zeros((n, 1, *GRID), np.float16)
    for volume, view in zip(volumes, views, strict=True):
        volume[(0, *box(view, GRID))] = rng.uniform(0.3, 1, view)
    return Dataset(
        volumes=volumes,
        patients=np.array([f"p{i:02d}" for i in range(n)]),
        labels=labels,
        holdout=np.arange(n) >= 24,
        channels=[ChannelInfo("T1w")],
        affine=np.diag([2.0, 2, 2, 1]),
        views=views,
    )


def test_a_model_sees_no_frame_and_is_told_the_view() -> None:
    data = cohort()
    assert data.views is not None
    conditions = Conditions(config(conditions={"size": SIZE}).data.conditions)
    loader = Loader(data, conditions, 4, Augment(shift_voxels=1))
    assert (loader.spec.condition_width, loader.spec.told_width) == (8, 6)
    assert loader.views is not None
    for batch in loader.all_train("cpu"):
        assert (batch.x > 0.2).all()
        assert (batch.c[:, 0, 2:5].min(1).values < 0).all() and (batch.c[:, 0, 5:] == 0).all()
    watched = loader.watched_batch("holdout", "cpu")
    assert watched is not None
    rows = loader.watched("holdout")
    np.testing.assert_array_equal(watched.c[:, 0, 2:5], loader.views.encode(data.views[rows]))
    # held-out people shape nothing that is drawn
    other = replace(data, views=np.where(data.holdout[:, None], 1, data.views))
    moved = Loader(other, conditions, 4, Augment(shift_voxels=1))
    assert moved.description() == loader.description()


def test_what_a_generator_is_told_without_a_patient_is_spread_alike() -> None:
    loader = Loader(
        cohort(), Conditions(config(conditions={"size": SIZE}).data.conditions), 4, Augment()
    )
    assert loader.spec.draw_condition is not None
    told = torch.stack([loader.spec.draw_condition(torch_generator(k)) for k in range(400)])
    assert told.shape == (400, 5)
    small, large = (told[told[:, i] == 1, 2:].mean(0) for i in (0, 1))
    assert (large - small > 0.4).all()


def test_samples_end_where_their_view_ends(tmp_path: Path) -> None:
    """Small ones for small, each a box of its own, the same for a sample however it is drawn."""
    conf, data = config(conditions={"size": SIZE}), cohort()
    loader = Loader(data, Conditions(conf.data.conditions), 4, Augment())
    model, partial = tmp_path / "model", tmp_path / "partial"
    model.mkdir()
    partial.mkdir()
    train(conf, loader, partial, model, QUIET, "cpu")
    sampler = Sampler(conf, model, "cpu", lambda k: {"size": "small" if k % 2 else "large"})
    volumes = sampler.canonical_batch(0)[:, 0]
    sides = []
    for volume in volumes:
        inside = np.argwhere(volume > 0)
        assert len(inside) > 20
        sides.append(inside.max(0) - inside.min(0) + 1)
        # a box of the grid's middle, as prepare makes it
        assert (np.abs(inside.min(0) + inside.max(0) + 1 - GRID) <= 1).all()
    assert np.mean(sides[0::2], 0) == pytest.approx([8.5, 11.5, 7.5], abs=1)
    assert np.mean(sides[1::2], 0) == pytest.approx([5.5, 6.5, 4.5], abs=1)
    assert len({tuple(s) for s in sides[0::2]}) > 1
    np.testing.assert_array_equal(volumes, sampler.canonical_batch(0)[:, 0])
