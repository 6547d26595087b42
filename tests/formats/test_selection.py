"""What is wanted of a DICOM source, and the table that shows what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
from typer.testing import CliRunner

from synthmed import cli
from synthmed.errors import InputError, UsageError
from synthmed.stages.ingest import ingest, look

AFFINES = {
    "axial": np.diag([-1.0, -1, 3, 1]),
    "coronal": np.array([[-1.0, 0, 0, 0], [0, 0, 3, 0], [0, -1, 0, 0], [0, 0, 0, 1]]),
    "sagittal": np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]),
}


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three patients with three planes each, of which one with a contrast agent."""
    folder = tmp_path / "source"
    for i in range(3):
        for n, (plane, affine) in enumerate(AFFINES.items()):
            make.series(
                folder / f"{plane}-{i}",
                make.voxels(10 * i + n),
                affine,
                PatientID=f"ID-{i}",
                SeriesDescription=f"T{n + 1} {plane} tse" if i < 2 or n else "Zuleika F.",
                ProtocolName=f"head^{plane}",
                ContrastBolusAgent="Gd" if n == 2 else "",
                RepetitionTime=str(500 + 1000 * n),
                EchoTime=str(10 + 40 * n),
                SeriesNumber=n + 1,
            )
    return folder


@pytest.mark.parametrize(
    ("select", "planes"),
    [
        ({}, {"axial", "coronal", "sagittal"}),
        ({"plane": "coronal"}, {"coronal"}),
        ({"contrast": True}, {"sagittal"}),
        ({"contrast": False}, {"axial", "coronal"}),
        ({"description": ["t2*"]}, {"coronal"}),
        ({"description": ["*SAGITTAL", "t2*"]}, {"coronal", "sagittal"}),
        ({"description": ["!*axial*", "!zuleika*"]}, {"coronal", "sagittal"}),
        ({"max_spacing_mm": 3}, {"axial", "coronal", "sagittal"}),
        ({"echo_ms": [40, 60]}, {"coronal"}),
        ({"repetition_ms": [0, 1500]}, {"axial", "coronal"}),
        ({"plane": "axial", "repetition_ms": [0, 1500]}, {"axial"}),
    ],
)
def test_volumes_are_chosen(
    source: Path, tmp_path: Path, select: dict[str, Any], planes: set[str]
) -> None:
    (tmp_path / "target").mkdir()
    facts = ingest(make.config(source, select=select), tmp_path / "target", min_patients=2)
    assert facts["n_scans"] == 3 * len(planes)
    refused = (tmp_path / "target" / "quarantine.tsv").read_text().splitlines()[1:]
    assert len(refused) == 9 * 3 * (3 - len(planes))  # nine slices a series
    assert {line.split("-")[0] for line in refused} == set(AFFINES) - planes
    for line in refused:
        assert line.split("\t")[2] == "not_requested"
        assert any(f"data.select.{key}." in line for key in select)
    found = look(make.config(source, select=select))
    read = [row for row in found["volumes"] if row["becomes"] == "read"]
    assert {row["plane"] for row in read} == planes


def test_nothing_is_wanted(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(InputError, match="not_requested 81"):
        ingest(make.config(source, select={"max_spacing_mm": 2.9}), tmp_path / "target")


def test_a_split_volume_is_chosen_by_its_name(tmp_path: Path) -> None:
    for i in range(3):
        stacks = [
            (make.voxels(10 * i + k), {"types": [t, "NONE"]}) for k, t in enumerate(("M", "P"))
        ]
        make.enhanced(tmp_path / f"source/{i}.dcm", stacks, np.diag([2.0, 2, 2, 1]))
    select = {"volume": ["magnitude*"]}
    config = make.config(tmp_path / "source", volumes="split", select=select)
    (tmp_path / "target").mkdir()
    assert ingest(config, tmp_path / "target", min_patients=3)["n_scans"] == 3
    text = (tmp_path / "target" / "quarantine.tsv").read_text()
    assert text.count("Its volume phase does not fit data.select.volume.") == 3


def test_nifti_files_are_not_chosen_so(tmp_path: Path) -> None:
    folder = make.cohort(tmp_path / "source")
    (tmp_path / "target").mkdir()
    with pytest.raises(UsageError, match=r"data\.select"):
        ingest(make.config(folder, select={"plane": "axial"}), tmp_path / "target")


def test_the_table_counts_what_looks_alike(source: Path) -> None:
    make.series(source / "scout", make.voxels(99)[..., :1], AFFINES["axial"], PatientID="ID-0")
    (source / "note.txt").write_text("text")
    found = look(make.config(source))
    rows = {(r["plane"], r["description"], r["becomes"]): r for r in found["volumes"]}
    coronal = rows["coronal", "T2 coronal tse", "read"]
    assert coronal["n_volumes"] == coronal["n_patients"] == 3
    assert coronal["matrix"] == [12, 10, 9] and coronal["spacing_mm"] == [1.0, 1.0, 3.0]
    assert coronal["times_ms"] == [1500.0, 50.0, 0.0] and not coronal["contrast"]
    assert rows["axial", "", "single_slice"]["n_volumes"] == 1
    assert found["refused"] == {"not_an_image": 1}
    json.dumps(found)


def test_free_text_that_few_share_is_not_shown(source: Path) -> None:
    """T1 is shared by two, and one is somebody's name."""
    shown = {r["description"] for r in look(make.config(source))["volumes"]}
    assert shown == {"", "T2 coronal tse", "T3 sagittal tse"}
    every = {r["description"] for r in look(make.config(source), True)["volumes"]}
    assert {"Zuleika F.", "T1 axial tse"} <= every


def test_the_command_prints_it(source: Path) -> None:
    run = CliRunner()
    shown = run.invoke(cli.app, ["look", str(source)])
    assert shown.exit_code == 0, shown.output
    head, *rows = shown.output.splitlines()
    assert head.split() == [
        "volumes", "patients", "matrix", "mm", "plane", "TR/TE/TI", "scanner", "what", "becomes",
    ]  # fmt: skip
    assert len(rows) == 3 and all(row.endswith("read") for row in rows)
    assert "Zuleika" not in shown.output and "ID-0" not in shown.output
    assert sum("contrast agent" in row for row in rows) == 1
    chosen = run.invoke(
        cli.app, ["look", str(source), "--set", "data.select.plane=axial", "--json"]
    )
    becomes = [(r["plane"], r["becomes"]) for r in json.loads(chosen.output)["volumes"]]
    assert sorted(becomes) == [
        ("axial", "read"), ("coronal", "not_requested"), ("sagittal", "not_requested"),
    ]  # fmt: skip


def test_a_folder_without_dicom_says_so(tmp_path: Path) -> None:
    make.cohort(tmp_path / "source")
    with pytest.raises(InputError, match="no DICOM file"):
        look(make.config(tmp_path / "source", format="dicom"))
