"""Contrasts of a session as channels: in one place by their headers, or refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset

from synthmed.artifacts import Catalogue
from synthmed.errors import InputError, UsageError
from synthmed.stages.ingest import ingest, look

CHANNELS = {
    "T1w": {"select": {"description": ["*t1*"]}},
    "T2w": {"select": {"description": ["*t2*"]}},
}
FIRST = np.array([[-2.0, 0, 0, 20], [0, 1.5, 0, -11], [0, 0, 4, 3], [0, 0, 0, 1]])
# turned by 20 degrees about x, with smaller voxels, and larger than the first
TURN = np.array([[1, 0, 0], [0, np.cos(0.35), -np.sin(0.35)], [0, np.sin(0.35), np.cos(0.35)]])


def ramp(places: np.ndarray) -> np.ndarray:
    """A value for each place (..., 3) in mm; linear, so that linear interpolation is exact."""
    return 500 + places @ [3.0, -4.0, 5.0]


def places(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return indices @ affine[:3, :3].T + affine[:3, 3]


def second(spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    """The affine of a turned grid round the first one's middle."""
    affine = np.eye(4)
    affine[:3, :3] = TURN @ np.diag(spacing)
    middle = FIRST @ [7.5, 9.5, 4.5, 1]
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def session(
    folder: Path,
    person: str,
    change: Callable[[str, Dataset], None] = lambda name, ds: None,
    names: tuple[str, ...] = ("t1", "t2"),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    shape: tuple[int, int, int] = (60, 70, 80),
) -> None:
    """Series of one session; t1 on `FIRST`, others finer and turned."""
    for k, name in enumerate(names):
        affine = FIRST if name == "t1" else second(spacing, shape)
        size = (16, 20, 10) if name == "t1" else shape
        data = np.rint(100 * ramp(places(size, affine))).astype(np.int32)
        if name == "t1":
            data += hash_of(person)
        words: dict[str, Any] = {
            "PatientID": person,
            "SeriesDescription": f"{name} ax",
            "StudyInstanceUID": f"1.2.{hash_of(person)}",
            "SeriesNumber": k + 1,
            "FrameOfReferenceUID": f"1.2.3.{hash_of(person)}",
            "RescaleSlope": "0.01",
            "RescaleIntercept": "0",
        }
        make.series(
            folder / f"{person}-{k}-{name}",
            data,
            affine,
            lambda _, ds, name=name: change(name, ds),  # type: ignore[misc]
            **words,
        )


def hash_of(person: str) -> int:
    return sum(person.encode())


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path_factory.mktemp("home")))


def ingested(source: Path, target: Path, **data: Any) -> tuple[dict[str, Any], Catalogue]:
    target.mkdir()
    config = make.config(source, **{"channels": CHANNELS, **data})
    return ingest(config, target, min_patients=1), Catalogue.open(target)


def test_the_second_channel_lies_on_the_grid_of_the_first(tmp_path: Path) -> None:
    source = tmp_path / "source"
    session(source, "A")
    session(source, "B")
    facts, catalogue = ingested(source, tmp_path / "target")
    assert facts["n_scans"] == 2 and not facts["reasons"]
    for scan in catalogue.scans:
        images = {n: nib.load(catalogue.file(scan, n)) for n in ("T1w", "T2w")}
        assert list(scan.channels) == ["T1w", "T2w"]
        assert np.allclose(images["T1w"].affine, images["T2w"].affine)
        affine = images["T1w"].affine
        truth = ramp(places(scan.shape, affine))
        # blurred before, and a ramp stays one but where the blur reaches over the edge
        inner = (slice(2, -2),) * 3
        error = np.abs(np.asarray(images["T2w"].dataobj) - truth)[inner]
        assert error.max() < 0.05, error.max()


def test_channels_on_one_grid_are_kept_bit_for_bit(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("t1", "t2"):
        make.series(
            source / f"x-{name}",
            make.voxels(hash_of(name)),
            FIRST,
            PatientID="A",
            SeriesDescription=name,
            StudyInstanceUID="1.2.3",
            FrameOfReferenceUID="1.2.4",
        )
    _, catalogue = ingested(source, tmp_path / "target")
    (scan,) = catalogue.scans
    found = np.asarray(nib.load(catalogue.file(scan, "T2w")).dataobj)
    assert np.array_equal(found[::-1], make.voxels(hash_of("t2")))


def test_a_grid_that_is_nearly_the_same_is_interpolated(tmp_path: Path) -> None:
    """A pixel size that one header rounds is no reason to refuse."""
    for name, side in (("t1", 0.9375), ("t2", 0.938)):
        make.series(
            tmp_path / "source" / name,
            make.voxels(hash_of(name), (64, 64, 6)),
            np.diag([-side, -side, 3, 1]),
            PatientID="A",
            SeriesDescription=name,
            StudyInstanceUID="1.2.3",
            FrameOfReferenceUID="1.2.4",
        )
    facts, _ = ingested(tmp_path / "source", tmp_path / "target")
    assert facts["n_scans"] == 1 and not facts["reasons"]


def test_one_channel_needs_no_frame_of_reference(tmp_path: Path) -> None:
    session(tmp_path / "source", "A", nowhere, names=("t1",))
    one = {"T1w": CHANNELS["T1w"]}
    facts, _ = ingested(tmp_path / "source", tmp_path / "target", channels=one)
    assert facts["n_scans"] == 1


def other_space(name: str, ds: Dataset) -> None:
    if name == "t2":
        ds.FrameOfReferenceUID = "1.2.9"


def nowhere(name: str, ds: Dataset) -> None:
    del ds.FrameOfReferenceUID


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        ({"names": ("t1",)}, {"channel_missing": 10}),
        ({"names": ("t1", "t2", "t2 again")}, {"channel_ambiguous": 170}),
        ({"names": ("t1", "t1 and t2")}, {"channel_ambiguous": 80, "channel_missing": 10}),
        ({"change": other_space}, {"channels_disagree": 90}),
        ({"change": nowhere}, {"channels_disagree": 90}),
        ({"shape": (60, 12, 80)}, {"channels_disagree": 90}),
        ({"names": ("t1", "t2", "flair")}, {"not_requested": 80}),
    ],
    ids=["missing", "two", "both", "other space", "no space", "slab", "not asked for"],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, words: dict[str, Any], reasons: dict[str, int]
) -> None:
    source = tmp_path / "source"
    session(source, "A")
    session(source, "B", **words)
    facts, _ = ingested(source, tmp_path / "target")
    assert facts["n_scans"] == (2 if "not_requested" in reasons else 1)
    assert facts["reasons"] == reasons


def test_look_tells_which_series_are_channels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    session(source, "A")
    session(source, "B", names=("t1",))
    found = look(make.config(source, channels=CHANNELS))
    assert Counter(v["becomes"] for v in found["volumes"]) == {"read": 2, "channel_missing": 1}


def test_what_a_config_cannot_ask_for(tmp_path: Path) -> None:
    session(tmp_path / "dicom", "A")
    with pytest.raises(UsageError, match=r"data\.channels\.T1w: a DICOM series"):
        ingested(tmp_path / "dicom", tmp_path / "a", channels={"T1w": "image"})
    make.cohort(tmp_path / "nifti")
    with pytest.raises(UsageError, match=r"data\.channels\.T1w\.select"):
        ingested(tmp_path / "nifti", tmp_path / "b")
    for bad in ({"select": {}, "column": "image"}, {"select": {}, "labels": {"x": 1}}):
        with pytest.raises((UsageError, InputError), match="select"):
            make.config(tmp_path, channels={"T1w": "image", "M": bad})
