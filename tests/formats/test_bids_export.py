"""The exporter: valid BIDS by the reference validator, bytes untouched, nothing unscreened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthmed.artifacts import Cohort, Sample, ScreenedCohort
from synthmed.config import Categorical, Continuous
from synthmed.formats import nifti
from synthmed.formats.bids_export import SIDECAR_KEYS, Naming, export, participants

CONDITIONS = {
    "diagnosis": Categorical(categories=("control", "atrophy")),
    "age": Continuous(low=20, high=100, unit="year"),
}
MASKS = {"left_ventricle": {"cavity": 1, "wall": 2}}


def cohort(folder: Path, files: Sequence[str]) -> ScreenedCohort:
    samples = []
    for k in (0, 1, 3):  # sample 2 was dropped
        names = {}
        for i, name in enumerate(files):
            data = np.full((6, 7, 8), k + i, dtype=np.int16 if name in MASKS else np.float32)
            names[name] = f"{k:06d}_{name}.nii.gz"
            nifti.write(folder / names[name], data, np.diag([2.0, 2, 2, 1]))
        labels: dict[str, Any] = {"diagnosis": "control", "age": 88.5 + k}
        samples.append(Sample(index=k, labels=labels, files=names))
    return ScreenedCohort(samples, [folder] * 3, [])


def exported(tmp_path: Path, modality: str, files: Sequence[str]) -> Path:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    export(
        cohort(source, files),
        out,
        title="Demo",
        license="CC0",
        conditions=CONDITIONS,
        naming=Naming(modality, MASKS),
        readme="# Demo\n\nSynthetic volumes for a test of the exporter, and for nothing else.\n"
        * 3,
    )
    return out


KINDS = [
    ("T1w", ["image"], "anat/sub-syn0003_T1w.nii.gz"),
    ("bold", ["T1w", "FLAIR", "left_ventricle"], "anat/sub-syn0003_FLAIR.nii.gz"),
    ("T1w", ["image", "left_ventricle"], "anat/sub-syn0003_seg-leftVentricle_dseg.nii.gz"),
    ("cine", ["image", "left_ventricle"], "cine/sub-syn0003_cine.nii.gz"),
    ("dwi", ["image"], "dwiimage/sub-syn0003_dwi.nii.gz"),
]


@pytest.mark.parametrize(("modality", "files", "one"), KINDS)
def test_names_and_bytes(tmp_path: Path, modality: str, files: list[str], one: str) -> None:
    out = exported(tmp_path, modality, files)
    image = next(f for f in files if f in one) if modality == "bold" else files[0]
    if "dseg" in one:
        image = "left_ventricle"
    written = (out / "sub-syn0003" / one).read_bytes()
    assert written == (tmp_path / "source" / f"000003_{image}.nii.gz").read_bytes()
    assert len(list(out.rglob("*.nii.gz"))) == 3 * len(files)
    if "anat/" not in one:
        assert not list(out.rglob("*_T1w*"))


@pytest.mark.parametrize(("modality", "files", "one"), KINDS)
def test_validator_finds_no_error(
    tmp_path: Path, modality: str, files: list[str], one: str
) -> None:
    found = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    tool = found or shutil.which("bids-validator-deno")
    if tool is None:
        pytest.skip("bids-validator-deno is not installed")
    out = exported(tmp_path, modality, files)
    done = subprocess.run([tool, "--json", str(out)], capture_output=True, check=False, timeout=60)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [i for i in issues if i["severity"] == "error"] == []
    # the validator must be looking: without this file it complains
    (out / "dataset_description.json").unlink()
    again = subprocess.run([tool, "--json", str(out)], capture_output=True, check=False, timeout=60)
    issues = json.loads(again.stdout)["issues"]["issues"]
    assert [i for i in issues if i["severity"] == "error"] != []


def test_a_label_that_is_not_known_is_n_a(tmp_path: Path) -> None:
    known = Sample(index=0, labels={"age": 61.0}, files={})
    nothing = Sample(index=1, labels={}, files={})
    assert participants([known, nothing], CONDITIONS).splitlines()[1:] == [
        "sub-syn0001\tn/a\t61",
        "sub-syn0002\tn/a\tn/a",
    ]


def test_participants_pool_old_age(tmp_path: Path) -> None:
    out = exported(tmp_path, "T1w", ["image"])
    assert (out / "participants.tsv").read_text() == (
        "participant_id\tdiagnosis\tage\n"
        "sub-syn0001\tcontrol\t88.5\n"
        "sub-syn0002\tcontrol\t89.5\n"
        "sub-syn0003\tcontrol\t90\n"
    )
    columns = json.loads((out / "participants.json").read_text())
    assert columns["age"]["Units"] == "year"
    assert "90 and over" in columns["age"]["Description"]
    assert columns["diagnosis"]["Levels"] == {"control": "control", "atrophy": "atrophy"}


def test_sidecars_say_synthetic(tmp_path: Path) -> None:
    out = exported(tmp_path, "T1w", ["image", "left_ventricle"])
    sidecars = list(out.glob("sub-*/*/*.json"))
    assert len(sidecars) == 6
    assert all(json.loads(s.read_text())["Synthetic"] is True for s in sidecars)
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "synthmed"
    table = out / "sub-syn0001/anat/sub-syn0001_seg-leftVentricle_dseg.tsv"
    assert table.read_text() == "index\tname\n0\tbackground\n1\tcavity\n2\twall\n"


def test_a_given_mask_is_not_called_synthetic(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    export(
        cohort(source, ["image", "left_ventricle"]),
        out,
        title="Demo",
        license="CC0",
        conditions=CONDITIONS,
        naming=Naming("T1w", MASKS, given=["left_ventricle"]),
        readme="# Demo\n",
    )
    stem = "sub-syn0001/anat/sub-syn0001_seg-leftVentricle_dseg"
    told = json.loads((out / f"{stem}.json").read_text())
    assert "given, not generated" in told["Description"]
    assert "Synthetic" not in told
    assert set(told) <= SIDECAR_KEYS
    assert (out / f"{stem}.tsv").read_text() == "index\tname\n0\tbackground\n1\tcavity\n2\twall\n"


def test_an_unscreened_cohort_is_refused(tmp_path: Path) -> None:
    screened = cohort(tmp_path, ["image"])
    with pytest.raises(TypeError, match="was not screened"):
        export(
            Cohort(tmp_path, screened.samples),  # type: ignore[arg-type]
            tmp_path,
            title="",
            license="",
            conditions={},
            naming=Naming("T1w", {}),
            readme="",
        )
    assert not (tmp_path / "participants.tsv").exists()


def test_a_file_outside_the_cohort_is_refused(tmp_path: Path) -> None:
    sample = Sample(index=0, labels={}, files={"image": "../secret.nii.gz"})
    outside = ScreenedCohort([sample], [tmp_path], [])
    with pytest.raises(ValueError, match="not a plain name"):
        export(
            outside,
            tmp_path,
            title="",
            license="",
            conditions={},
            naming=Naming("T1w", {}),
            readme="",
        )
