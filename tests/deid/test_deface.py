"""Faces: of a head the brain stays and the face goes; what is no head, or stands on it, is refused.

The network itself is asked about a head of ellipsoids; what ingest makes of its answers is tested
with one that takes what is bright for the brain.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from synthmed.artifacts import Catalogue
from synthmed.deid import deface
from synthmed.errors import InputError, UsageError
from synthmed.forget import forget
from synthmed.formats.nifti import Image
from synthmed.formats.refusal import Refused, quiet
from synthmed.pipeline import Line, begin
from synthmed.stages.ingest import ingest, summary
from synthmed.store import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
import make

from tests.deid import heads

here = pytest.mark.skipif(importlib.util.find_spec("deepbet") is None, reason="no deepbet")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path / "home"))


# --- the network ----------------------------------------------------------------------------------


@here
def test_the_face_goes_and_the_brain_stays() -> None:
    data, brain, face = heads.head()
    second = np.random.default_rng(1).integers(100, 200, data.shape).astype(np.float32)
    labels = np.where(brain, 1, np.where(face, 2, 0)).astype(np.uint8)
    # the brain is looked for in the first image, which is not the first channel here
    given = {"seg": labels, "T1w": data, "T2w": second}
    images = {name: Image(d, heads.affine(), "RAS") for name, d in given.items()}
    with quiet():
        cut = deface.remove(images, ("seg",))
    out = cut.images
    assert list(out) == ["seg", "T1w", "T2w"]
    air = np.percentile(data, 0.5, method="lower")
    stays = out["T1w"].data != air
    assert stays[brain].mean() > 0.99
    assert not stays[face].any()
    assert stays.sum() < 1.06 * brain.sum()
    for name, image in out.items():
        assert image.data.dtype == given[name].dtype
        assert (image.data == given[name])[stays].all()
    dark = out["T2w"].data == np.percentile(second, 0.5, method="lower")
    assert dark[~stays & face].all() and dark[face].all()
    assert not (out["seg"].data == 2).any()
    assert cut.brain_ml == pytest.approx(brain.sum() * 0.027, rel=0.05)
    assert cut.removed_share == pytest.approx(1 - stays.mean(), abs=0.01)
    lost = int((out["seg"].data != labels).sum())
    assert cut.n_mask_voxels == {"seg": lost} and lost >= face.sum()
    assert cut.picture.startswith(b"\x89PNG")


@here
def test_thick_slices_and_an_oblique_affine() -> None:
    data, brain, face = (a[:, :, ::2] for a in heads.head(3))
    c, s = np.cos(0.4), np.sin(0.4)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn * [3, 3, 6]
    with quiet():
        cut = deface.remove({"T1w": Image(np.ascontiguousarray(data), affine, "RAS")}, ())
    stays = cut.images["T1w"].data != np.percentile(data, 0.5, method="lower")
    assert stays[brain].mean() > 0.98
    assert not stays[face].any()
    assert cut.brain_ml == pytest.approx(brain.sum() * 0.054, rel=0.05)


@here
def test_an_affine_that_stands_the_head_on_its_top() -> None:
    data, brain, face = (a[:, :, ::-1] for a in heads.head())
    with quiet():
        image = Image(np.ascontiguousarray(data), heads.affine(), "RAS")
        out = deface.remove({"T1w": image}, ()).images
    stays = out["T1w"].data != np.percentile(data, 0.5, method="lower")
    assert stays[brain].mean() > 0.98
    assert not stays[face].any()


def even_ball() -> np.ndarray:
    radius = np.sqrt(((np.indices((60, 60, 60)) - 29.5) ** 2).sum(0))
    noise = np.random.default_rng(0).normal(0, 3, radius.shape)
    return ((radius < 22) * 100 + noise).astype(np.float32)


@here
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (np.zeros((40, 40, 40), np.int16), ""),
        (even_ball(), "as even as a ball"),
        (heads.head()[0][:, :, :32], ""),
        (make.voxels(0, (64, 64, 64)), ""),
    ],
    ids=["empty", "ball", "lower face alone", "noise"],
)
def test_no_head_is_refused(data: np.ndarray, why: str) -> None:
    with quiet(), pytest.raises(Refused, match="brain_not_found") as refused:
        deface.remove({"T1w": Image(np.ascontiguousarray(data), heads.affine(), "RAS")}, ())
    assert why in refused.value.detail


# --- in ingest ------------------------------------------------------------------------------------


class Bright:
    """Takes what is bright for the brain."""

    def run_model(self, data: np.ndarray) -> np.ndarray:
        return (data > 500).astype(np.float32)

    def postprocess(self, mask: np.ndarray) -> np.ndarray:
        return mask


BRAIN = (slice(2, 14),) * 3
"""885 ml in volumes of 16 voxels of 8 mm a side."""


def head(seed: int, low: int = 600) -> np.ndarray:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 400, (16, 16, 16)).astype(np.int16)
    data[BRAIN] = rng.integers(low, 1000, (12, 12, 12))
    return data


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(deface, "_network", Bright)
    folder = make.cohort(tmp_path / "source", 12)
    for i in range(12):
        write(folder, i, head(i))
    return folder


def write(source: Path, i: int, data: np.ndarray, kind: str = "images") -> None:
    make.nifti(source / kind / f"scan{i:02d}.nii.gz", data, np.diag([8.0, 8, 8, 1]))


def run(source: Path, target: Path, **data: Any) -> dict[str, Any]:
    target.mkdir()
    return ingest(make.config(source, **{"faces": "remove", **data}), target)


def volumes(target: Path, channel: str = "T1w") -> dict[str, np.ndarray]:
    catalogue = Catalogue.open(target)
    return {
        s.scan: np.asarray(nib.load(catalogue.file(s, channel)).dataobj) for s in catalogue.scans
    }


def test_ingest_keeps_brains_alone(source: Path, tmp_path: Path) -> None:
    facts = run(source, tmp_path / "a")
    assert facts["n_faces_removed"] == facts["n_scans"] == 12
    assert facts["removed_share"] == [round(1 - 12**3 / 16**3, 4)] * 3
    assert facts["brain_ml"] == [885] * 3
    assert "faces removed from 12" in summary(facts)
    kept = volumes(tmp_path / "a")
    assert {v[BRAIN].tobytes() for v in kept.values()} == {
        head(i)[BRAIN].tobytes() for i in range(12)
    }
    for volume in kept.values():
        outside = np.ones(volume.shape, bool)
        outside[BRAIN] = False
        assert len(np.unique(volume[outside])) == 1 and volume[outside].max() < 10
    assert {p.stem for p in (tmp_path / "a/faces").iterdir()} == set(kept)
    with open(tmp_path / "a/faces.tsv", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [r["scan"] for r in rows] == sorted(kept)
    assert all(p.stat().st_size < 200_000 for p in (tmp_path / "a/faces").iterdir())
    run(source, tmp_path / "b")
    assert all(
        (tmp_path / "b" / p.relative_to(tmp_path / "a")).read_bytes() == p.read_bytes()
        for p in (tmp_path / "a").rglob("*")
        if p.is_file()
    )


def test_a_scan_whose_brain_is_not_found_is_in_quarantine(source: Path, tmp_path: Path) -> None:
    write(source, 3, head(3) // 4)  # dark: nothing is found
    small = head(4)
    small[:9] //= 4
    write(source, 4, small)
    facts = run(source, tmp_path / "a")
    assert facts["reasons"] == {"brain_not_found": 2} and facts["n_faces_removed"] == 10
    text = (tmp_path / "a/quarantine.tsv").read_text()
    assert "so its face cannot be removed. It would have 369 ml; 700 to 2200 are possible." in text
    assert len(list((tmp_path / "a/volumes").iterdir())) == 10
    assert len(list((tmp_path / "a/faces").iterdir())) == 10


class Left(Bright):
    """Is blind on the right quarter of whatever it is shown."""

    def run_model(self, data: np.ndarray) -> np.ndarray:
        found = super().run_model(data)
        found[len(data) * 3 // 4 :] = 0
        return found


def test_two_looks_must_agree(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deface, "_network", Left)
    with pytest.raises(InputError, match="brain_not_found 12"):
        run(source, tmp_path / "a")
    text = (tmp_path / "a/quarantine.tsv").read_text()
    assert text.count("Two looks agree in 0.91; 0.95 is the least.") == 12
    assert not list((tmp_path / "a/volumes").iterdir())


def test_nothing_is_left_of_a_copy(source: Path, tmp_path: Path) -> None:
    write(source, 1, head(0))
    facts = run(source, tmp_path / "a")
    assert facts["reasons"] == {"duplicate_scan": 2} and facts["n_faces_removed"] == 10
    assert {p.stem for p in (tmp_path / "a/faces").iterdir()} == set(volumes(tmp_path / "a"))
    assert len((tmp_path / "a/faces.tsv").read_text().splitlines()) == 11


def test_channels_share_the_mask_and_masks_are_cut(source: Path, tmp_path: Path) -> None:
    for i in range(12):
        write(source, i, 1000 - head(i + 50), "t2")
        write(source, i, np.full((16, 16, 16), 1 + i % 2, np.int16), "seg")
    table = source / "participants.tsv"
    lines = table.read_text().splitlines()
    table.write_text(
        "\n".join(
            [lines[0] + "\tt2\tseg"]
            + [f"{line}\tt2/scan{i:02d}.nii.gz\tseg/scan{i:02d}.nii.gz"
               for i, line in enumerate(lines[1:])]
        )
        + "\n"
    )  # fmt: skip
    channels = {
        "seg": {"column": "seg", "labels": {"a": 1, "b": 2}},
        "T1w": {"column": "image"},
        "T2w": {"column": "t2"},
    }
    facts = run(source, tmp_path / "a", channels=channels)
    assert facts["n_scans"] == 12
    assert facts["n_mask_voxels_removed"] == {"seg": 12 * (16**3 - 12**3)}
    for name in channels:
        for volume in volumes(tmp_path / "a", name).values():
            outside = np.ones(volume.shape, bool)
            outside[BRAIN] = False
            assert len(np.unique(volume[outside])) == 1
            assert name != "seg" or (volume[outside].max() == 0 and volume[BRAIN].min() > 0)


def test_without_the_extra(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path / "home"))
    deface._network.cache_clear()
    monkeypatch.setitem(sys.modules, "deepbet", None)
    with pytest.raises(UsageError, match=r"(?s)data\.faces.*'\.\[faces\]'"):
        run(source, tmp_path / "a")
    facts = run(source, tmp_path / "b", faces="keep")
    assert "n_faces_removed" not in facts
    assert not (tmp_path / "b/faces").exists()


def test_who_is_forgotten_leaves_no_picture(source: Path, tmp_path: Path) -> None:
    config = make.config(source, faces="remove")
    place = Run(tmp_path / "run")
    with place.lock():
        begin(place, config, overwrite=False)
        there = Line(place, config, "cpu", quiet=True).artifact("ingest").path
    person = Catalogue.open(there).scans[4].patient
    assert len(list((there / "faces").iterdir())) == 12
    forget([person], [place.path])
    held = [p.name for p in there.rglob("*")]
    assert len([n for n in held if n.endswith(".png")]) == 11
    assert not any(person in name for name in held)
    assert person not in (there / "faces.tsv").read_text()
    anew = run(source, tmp_path / "anew")
    assert anew["reasons"] == {"forgotten": 1} and anew["n_faces_removed"] == 11
    assert (tmp_path / "anew/faces.tsv").read_bytes() == (there / "faces.tsv").read_bytes()
    assert place.require("catalogue").manifest.facts["n_faces_removed"] == 11
