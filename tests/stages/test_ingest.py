"""Ingest: nothing is lost, nothing leaks, nobody is mixed up, and the same in is the same out."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import os
import random
import shutil
import signal
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, generate_uid

from synthmed import processes
from synthmed.artifacts import Catalogue, Scan
from synthmed.config import Privacy
from synthmed.errors import InputError, UsageError
from synthmed.formats import candidates
from synthmed.formats.refusal import REASONS, quiet
from synthmed.stages.ingest import ingest, source_fingerprint, summary

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
import make

SEX = {"sex": {"kind": "categorical", "categories": ["F", "M"]}}
PROMISE = Privacy(epsilon=8, delta=1e-5, sample_rate=0.5, patients=100)
AGE = {"age": {"kind": "continuous", "low": 18, "high": 90, "unit": "years"}}


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("SYNTHMED_HOME", str(path))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make.cohort(tmp_path / "source", sex=lambda i: "FM"[i % 2], age=lambda i: 40 + 6 * i)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def quarantine(target: Path) -> dict[str, str]:
    with open(target / "quarantine.tsv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert all(r["explanation"].startswith(REASONS[r["reason"]]) for r in rows)
    return {r["path"]: r["reason"] for r in rows}


def scans(target: Path) -> list[Scan]:
    return list(Catalogue.open(target).scans)


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_cohort_becomes_a_catalogue(source: Path, target: Path) -> None:
    calls: list[tuple[int, int]] = []
    facts = ingest(
        make.config(source, conditions=SEX | AGE),
        target,
        progress=lambda done, total: calls.append((done, total)),
    )
    found = scans(target)
    assert facts == {
        "format": "nifti",
        "modality": "T1w",
        "n_files": 11,
        "n_bytes": sum(p.stat().st_size for p in source.rglob("*") if p.is_file()),
        "n_auxiliary": 1,
        "n_scans": 10,
        "n_patients": 10,
        "n_quarantined": 0,
        "reasons": {},
        "orientations": {"RAS": 10},
        "n_undeclared_mask_voxels": {},
        "n_mask_voxels_removed": {},
        "n_labels_missing": {},
        "text": "keep",
        "n_ids_alike": 0,
        "n_text_masked": 0,
        "patient_columns": ["participant_id"],
        "n_tables": 1,
    }
    json.dumps(facts)
    assert calls[-1] == (10, 10)
    assert [s.scan for s in found] == sorted(s.scan for s in found)
    assert Counter(s.labels["sex"] for s in found) == {"F": 5, "M": 5}
    assert max(float(s.labels["age"]) for s in found) == 90  # 94 is pooled
    catalogue = Catalogue.open(target)
    stored = {np.asarray(nib.load(catalogue.file(s, "T1w")).dataobj).tobytes() for s in found}
    assert stored == {make.voxels(i).tobytes() for i in range(10)}
    assert {s.shape for s in found} == {(12, 10, 9)}
    assert {s.spacing_mm for s in found} == {(2.0, 2.0, 2.0)}


def test_the_order_of_the_file_system_does_not_matter(tmp_path: Path) -> None:
    orders = [list(range(12)), random.Random(3).sample(range(12), 12)]
    outputs = []
    for k, order in enumerate(orders):
        folder = make.cohort(tmp_path / f"source{k}", 12, order, sex=lambda i: "FM"[i % 2])
        target = tmp_path / f"target{k}"
        target.mkdir()
        facts = ingest(make.config(folder, conditions=SEX), target)
        outputs.append((facts, everything(target)))
    assert outputs[0] == outputs[1]
    again = tmp_path / "again"
    again.mkdir()
    ingest(make.config(tmp_path / "source0", conditions=SEX), again)
    assert everything(again) == outputs[0][1]


def test_every_file_is_used_auxiliary_or_in_quarantine(source: Path, target: Path) -> None:
    (source / "notes.txt").write_text("text")
    (source / "README").write_text("text")
    (source / ".hidden").write_text("text")
    (source / "sidecar.json").write_text("{}")
    (source / "images/scan00.nii.gz").write_bytes(b"")
    (source / "images/scan01.nii.gz").write_text("only text")
    make.nifti(source / "images/scan02.nii.gz", make.voxels(2)[:3])
    make.nifti(source / "images/scan03.nii.gz", make.voxels(3) * 0 + 7)
    make.nifti(source / "images/stranger.nii.gz", make.voxels(99))
    make.nifti(source / "images/sub-05_T2w.nii.gz", make.voxels(98))
    make.nifti(source / "derivatives/sub-05_T1w.nii.gz", make.voxels(97))
    make.nifti(source / "odd\tname\n.nii.gz", make.voxels(96))
    make.series(source / "dicom", make.voxels(95), np.eye(4))
    os.mkfifo(source / "pipe.nii.gz")
    facts = ingest(make.config(source), target, min_patients=6)
    refused = quarantine(target)
    assert refused == {
        "notes.txt": "not_an_image",
        "images/scan00.nii.gz": "truncated",
        "images/scan01.nii.gz": "header_unreadable",
        "images/scan02.nii.gz": "too_small",
        "images/scan03.nii.gz": "constant",
        "images/stranger.nii.gz": "not_in_table",
        "images/sub-05_T2w.nii.gz": "not_requested",
        "derivatives/sub-05_T1w.nii.gz": "not_requested",
        "odd\\tname\\n.nii.gz": "not_in_table",
        "pipe.nii.gz": "not_an_image",
        **{str(p.relative_to(source)): "not_requested" for p in (source / "dicom").iterdir()},
    }
    assert facts["n_files"] == facts["n_auxiliary"] + facts["n_scans"] + len(refused)
    assert facts["reasons"] == dict(Counter(refused.values()))


def test_links_are_followed_inside_the_source_alone(source: Path, target: Path) -> None:
    outside = make.nifti(source.parent / "outside.nii.gz", make.voxels(50))
    image = source / "images/scan00.nii.gz"
    image.rename(source / "images/real.nii.gz")
    image.symlink_to("real.nii.gz")
    (source / "images/scan01.nii.gz").unlink()
    (source / "images/scan01.nii.gz").symlink_to(outside)
    (source / "images/loop").symlink_to(source)
    (source / "images/away").symlink_to(source.parent)
    facts = ingest(make.config(source), target, min_patients=1)
    assert quarantine(target) == {
        "images/real.nii.gz": "not_in_table",
        "images/scan01.nii.gz": "outside_source",
        "images/away": "outside_source",
    }
    assert facts["n_patients"] == 9


def test_a_table_cannot_reach_out(source: Path, target: Path) -> None:
    make.nifti(source.parent / "outside.nii.gz", make.voxels(50))
    table = source / "participants.tsv"
    table.write_text(
        table.read_text()
        .replace("images/scan00.nii.gz", "../outside.nii.gz")
        .replace("images/scan01.nii.gz", str(source.parent / "outside.nii.gz"))
        .replace("images/scan02.nii.gz", "images/none.nii.gz")
        .replace("images/scan03.nii.gz", "")
    )
    facts = ingest(make.config(source), target, min_patients=1)
    assert facts["n_patients"] == 6
    assert facts["reasons"] == {"not_in_table": 4, "channel_missing": 2, "outside_source": 2}


def test_copies(source: Path, target: Path, tmp_path: Path) -> None:
    """Of one person the first is kept; of several people none, whoever they are."""
    rows = [
        {"participant_id": f"sub-{i:02d}", "patient": f"P{i // 2}", "image": f"images/s{i}.nii.gz"}
        for i in range(12)
    ]
    content = [0, 0, 2, 3, 4, 5, 6, 2, 8, 9, 10, 11]  # 0 = 1 of P0; 2 of P1 = 7 of P3
    for i, seed in enumerate(content):
        affine = np.diag([2.0, 2, 2, 1])
        data = make.voxels(seed)
        if i == 7:  # stored the other way round, it is still a copy
            data, affine[0, 0] = data[::-1], -2
        make.nifti(source / f"images/s{i}.nii.gz", data, affine)
    make.table(source / "participants.tsv", rows)
    facts = ingest(make.config(source), target, min_patients=1)
    refused = {p for p, code in quarantine(target).items() if code == "duplicate_scan"}
    assert refused == {"images/s1.nii.gz", "images/s2.nii.gz", "images/s7.nii.gz"}
    assert facts["n_scans"] == 9
    assert len(list((target / "volumes").iterdir())) == 9
    kept = tmp_path / "kept"
    kept.mkdir()
    facts = ingest(make.config(source), kept, min_patients=1, allow_copies=True)
    assert facts["n_scans"] == 12
    assert facts["patient_columns"] == ["patient"]


def test_the_same_voxels_with_two_labels_say_neither(source: Path, target: Path) -> None:
    """One file in two rows, and a copy of another; where a label is only missing, one is kept."""
    table = source / "participants.tsv"
    head, *rows = table.read_text().splitlines()
    cells = [row.split("\t") for row in rows]
    images = [c[1] for c in cells]
    for new, old in enumerate((cells[0], cells[1], cells[2])):
        again = list(old)
        again[2] = {0: "M" if old[2] == "F" else "F", 1: old[2], 2: "n/a"}[new]
        if new == 1:
            again[1] = "images/again.nii.gz"
            shutil.copyfile(source / images[1], source / again[1])
            again[3] = str(int(old[3]) + 1)
        cells.append(again)
    table.write_text("\n".join([head, *("\t".join(c) for c in cells)]) + "\n")
    config = make.config(source, conditions=SEX | AGE, missing_labels="keep")
    facts = ingest(config, target, min_patients=1)
    assert quarantine(target) == {
        images[0]: "label_ambiguous",
        images[1]: "label_ambiguous",
        "images/again.nii.gz": "label_ambiguous",
        images[2]: "duplicate_scan",
    }
    assert facts["n_scans"] == len(rows) - 2
    assert len(list((target / "volumes").iterdir())) == len(rows) - 2
    assert all(len(scan.labels) == 2 for scan in scans(target)), "the one with most labels is kept"
    private = target.parent / "private"
    private.mkdir()
    promised = make.config(
        source, conditions=SEX | AGE, missing_labels="keep", patient="participant_id",
        view="grid", spacing_mm=[2, 2, 2],
    ).model_copy(update={"privacy": PROMISE})  # fmt: skip
    # nobody's scans remove another's, but a contradiction is one person's own
    facts = ingest(promised, private, min_patients=1)
    assert set(quarantine(private).values()) == {"label_ambiguous"}
    assert facts["n_scans"] == len(rows) - 1


def test_labels_that_cannot_be_used(source: Path, target: Path) -> None:
    table = source / "participants.tsv"
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    for row, sex, age in [(1, "n/a", "40"), (2, "X", "40"), (3, "F", "7"), (4, "F", "")]:
        rows[row][2:] = [sex, age]
    table.write_text("\n".join("\t".join(r) for r in rows) + "\n")
    ingest(make.config(source, conditions=SEX | AGE), target, min_patients=6)
    assert quarantine(target) == {
        "images/scan00.nii.gz": "label_missing",
        "images/scan01.nii.gz": "label_unknown",
        "images/scan02.nii.gz": "label_out_of_range",
        "images/scan03.nii.gz": "label_missing",
    }


def test_labels_that_are_missing_may_be_kept(source: Path, target: Path) -> None:
    """Only what is missing: a value that is there and wrong is refused as ever."""
    table = source / "participants.tsv"
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    for row, sex, age in [(1, "n/a", "40"), (2, "X", "40"), (3, "F", "7"), (4, "NaN", "")]:
        rows[row][2:] = [sex, age]
    table.write_text("\n".join("\t".join(r) for r in rows) + "\n")
    config = make.config(source, conditions=SEX | AGE, missing_labels="keep")
    facts = ingest(config, target, min_patients=8)
    assert quarantine(target) == {
        "images/scan01.nii.gz": "label_unknown",
        "images/scan02.nii.gz": "label_out_of_range",
    }
    kept = [dict(s.labels) for s in scans(target)]
    assert len(kept) == 8
    assert sorted(map(sorted, kept), key=len)[:2] == [[], ["age"]]
    assert facts["n_labels_missing"] == {"sex": 2, "age": 1}
    assert summary(facts).endswith("kept with labels missing: 2 without sex, 1 without age")


def test_a_condition_that_nobody_has_is_an_error(source: Path, target: Path) -> None:
    table = source / "participants.tsv"
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    text = "\n".join("\t".join([*r[:3], "n/a" if i else r[3]]) for i, r in enumerate(rows)) + "\n"
    table.write_text(text)
    config = make.config(source, conditions=SEX | AGE, missing_labels="keep")
    with pytest.raises(InputError, match=r"data.conditions.age: no usable scan has a value"):
        ingest(config, target)


CHANNELS = {"T1w": "image", "mask": {"path": "masks/{participant_id}.nii.gz", "labels": {"a": 1}}}


def test_masks(source: Path, target: Path) -> None:
    affine = np.diag([2.0, 2, 2, 1])
    moved = affine.copy()
    moved[0, 3] = 0.5
    rng = np.random.default_rng(0)
    for i in range(10):
        mask = rng.integers(0, 3, (12, 10, 9)).astype(np.uint8)
        if i == 1:
            make.nifti(source / "masks/sub-01.nii.gz", mask, moved)
        elif i == 2:
            make.nifti(source / "masks/sub-02.nii.gz", mask[:-1], affine)
        elif i == 3:
            make.nifti(source / "masks/sub-03.nii.gz", mask + np.float32(0.5), affine)
        elif i == 5:  # stored the other way round: the same place
            make.nifti(source / "masks/sub-05.nii.gz", mask[:, ::-1], affine @ flip(10))
            turned = mask
        elif i != 4:
            make.nifti(source / f"masks/sub-{i:02d}.nii.gz", mask, affine)
    make.nifti(source / "images/scan00.nii.gz", make.voxels(0) * np.float32("nan"))
    facts = ingest(make.config(source, channels=CHANNELS), target, min_patients=5)
    assert quarantine(target) == {
        "images/scan00.nii.gz": "not_finite",
        "masks/sub-00.nii.gz": "not_finite",
        "images/scan01.nii.gz": "channels_disagree",
        "masks/sub-01.nii.gz": "channels_disagree",
        "images/scan02.nii.gz": "channels_disagree",
        "masks/sub-02.nii.gz": "channels_disagree",
        "images/scan03.nii.gz": "mask_not_integers",
        "masks/sub-03.nii.gz": "mask_not_integers",
        "images/scan04.nii.gz": "channel_missing",
        "masks/sub-04.nii.gz": "channel_missing",
    }
    assert facts["n_undeclared_mask_voxels"]["mask"] > 0
    catalogue = Catalogue.open(target)
    stored = [np.asarray(nib.load(catalogue.file(s, "mask")).dataobj) for s in catalogue.scans]
    assert all(set(np.unique(m)) == {0, 1} for m in stored)
    assert any(np.array_equal(m, turned == 1) for m in stored)


def flip(n: int) -> np.ndarray:
    step = np.eye(4)
    step[1, 1], step[1, 3] = -1, n - 1
    return step


def test_a_broken_image_is_called_broken_though_its_mask_is_missing(
    source: Path, target: Path
) -> None:
    for i in range(1, 10):
        make.nifti(source / f"masks/sub-{i:02d}.nii.gz", make.voxels(i) % 2)
    (source / "images/scan00.nii.gz").write_text("only text")
    ingest(make.config(source, channels=CHANNELS), target, min_patients=9)
    assert quarantine(target) == {"images/scan00.nii.gz": "header_unreadable"}


def test_people_sessions_and_splits(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    rows = [
        {
            "participant_id": f"sub-{i}",
            "session_id": session,
            "subject_group": f"g{i // 2}",
            "split": "holdout" if i > 1 else "train",
            "image": f"{i}-{session}.nii.gz",
        }
        for i in range(4)
        for session in ("ses-10", "ses-2")
    ]
    for k, row in enumerate(rows):
        # the shape tells them apart afterwards
        make.nifti(source / str(row["image"]), make.voxels(k, (8 + k, 9, 10)))
    make.table(source / "participants.tsv", rows)
    facts = ingest(make.config(source), target, min_patients=2, use_split=True)
    assert facts["n_patients"] == 2
    by_shape = {s.shape[0] - 8: s for s in scans(target)}
    # rows: 0 sub-0 ses-10, 1 sub-0 ses-2, 2 sub-1 ses-10, 3 sub-1 ses-2
    assert [by_shape[k].session for k in (1, 0, 3, 2)] == [1, 2, 3, 4]
    assert len({by_shape[k].patient for k in range(4)}) == 1
    assert {s.split for k, s in by_shape.items() if k < 4} == {"train"}
    assert {s.split for k, s in by_shape.items() if k > 3} == {"holdout"}


def test_two_tables_may_use_the_same_ids_for_different_people(tmp_path: Path, target: Path) -> None:
    for site in ("east", "west"):
        for i in range(5):
            make.nifti(tmp_path / f"source/{site}/i{i}.nii.gz", make.voxels(hash_of(site, i)))
        rows = [{"participant_id": f"sub-{i}", "image": f"i{i}.nii.gz"} for i in range(5)]
        make.table(tmp_path / f"source/{site}/participants.tsv", rows)
    assert ingest(make.config(tmp_path / "source"), target)["n_patients"] == 10


def hash_of(site: str, i: int) -> int:
    return i + 100 * (site == "west")


def test_sources_with_nothing_usable(tmp_path: Path, target: Path) -> None:
    def message(source: Path, **data: Any) -> str:
        with pytest.raises(InputError) as error:
            ingest(make.config(source, **data), target)
        assert len(str(error.value).splitlines()) <= 2
        return str(error.value)

    assert "no such folder" in message(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "expected a folder" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "empty" in message(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / f"texts/{i}.txt").write_text("text")
    assert "not_an_image 3" in message(tmp_path / "texts")
    assert len(quarantine(target)) == 3


def test_too_few_patients_keep_the_quarantine(tmp_path: Path, target: Path) -> None:
    source = make.cohort(tmp_path / "source", 11)
    for i in range(2):
        (source / f"images/scan{i:02d}.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"9 of at least 10 patients .* truncated 2"):
        ingest(make.config(source), target)
    assert len(quarantine(target)) == 2


def test_images_without_a_table_have_no_owner(tmp_path: Path, target: Path) -> None:
    make.nifti(tmp_path / "source/a.nii.gz", make.voxels(0))
    with pytest.raises(InputError, match=r"(?s)not_in_table 1.*participants.tsv"):
        ingest(make.config(tmp_path / "source"), target)


def test_columns_that_are_not_there(source: Path, target: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.patient: no column mrn .*image, participant_id"):
        ingest(make.config(source, patient="mrn"), target)
    grade = {"grade": {"kind": "continuous", "low": 0, "high": 1}}
    with pytest.raises(UsageError, match=r"data\.conditions\.grade: .*columns: age, image"):
        ingest(make.config(source, conditions=grade), target)


def test_a_run_inside_the_source_is_refused(source: Path) -> None:
    (source / "run").mkdir()
    with pytest.raises(UsageError, match="inside"):
        ingest(make.config(source), source / "run")


NAMES = ("Fotheringay", "Zuleika", "MRN771199")


def assert_nobody_is_named(target: Path, facts: dict[str, Any], printed: str) -> None:
    blobs = everything(target)
    listed = blobs.pop("quarantine.tsv")
    assert any(name.encode() in listed for name in NAMES)  # the one place
    texts = [json.dumps(facts).encode(), printed.encode()]
    for name, content in blobs.items():
        texts += [name.encode(), content]
        if name.endswith(".gz"):
            texts.append(gzip.decompress(content))
    for text in texts:
        assert not any(n.lower().encode() in text.lower() for n in NAMES)


def test_no_identity_passes_from_nifti(
    tmp_path: Path, target: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "Fotheringay"

    def plant(header: Any) -> None:
        header["descrip"], header["db_name"] = b"Zuleika Fotheringay", b"MRN771199"
        header["aux_file"], header["intent_name"] = b"Zuleika", b"Fotheringay"

    rows = [
        {
            "participant_id": f"sub-Fotheringay{i}",
            "sex": "F",
            "name": "Zuleika",
            "image": f"MRN771199/Zuleika{i}.nii.gz",
        }
        for i in range(11)
    ]
    for i, row in enumerate(rows):
        make.nifti(source / str(row["image"]), make.voxels(i), change=plant)
    (source / "MRN771199/Zuleika3.nii.gz").write_bytes(b"Zuleika")
    make.table(source / "participants.tsv", rows)
    facts = ingest(make.config(source, conditions=SEX), target)
    assert_nobody_is_named(target, facts, "".join(capfd.readouterr()))


def dicom_cohort(folder: Path, n: int = 4, **elements: Any) -> Path:
    for i in range(n):
        make.series(folder / f"s{i}", make.voxels(i), np.diag([2.0, 2, 2, 1]), **elements)
    return folder


def test_no_identity_passes_from_dicom(
    tmp_path: Path, target: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = dicom_cohort(
        tmp_path / "Fotheringay",
        PatientName="Fotheringay^Zuleika",
        OtherPatientIDs="MRN771199",
        SeriesDescription="Zuleika",
        Manufacturer="Fotheringay Imaging",
        StudyDate="20200102",
        ImageComments="MRN771199",
    )
    (source / "s3/Fotheringay.dcm").write_text("only text")
    facts = ingest(make.config(source), target, min_patients=3)
    assert_nobody_is_named(target, facts, "".join(capfd.readouterr()))
    assert b"20200102" not in b"".join(everything(target).values())


def test_a_medium_is_read_by_its_files_and_not_by_its_index(tmp_path: Path, target: Path) -> None:
    """The DICOMDIR names a patient who is not there, and is neither a scan nor a damaged slice."""
    source = dicom_cohort(tmp_path / "source")
    index = Dataset()
    index.file_meta = FileMetaDataset()
    index.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    index.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    index.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    index.FileSetID = "EXPORT"
    patient = Dataset()
    patient.DirectoryRecordType, patient.PatientID = "PATIENT", "ID-s9"
    patient.PatientName = "Fotheringay^Zuleika"
    index.DirectoryRecordSequence = [patient]
    ingest(make.config(source), target, min_patients=4)
    without = everything(target)
    other = target.parent / "other"
    other.mkdir()
    index.save_as(source / "DICOMDIR", enforce_file_format=True)
    index.save_as(source / "s1/DICOMDIR", enforce_file_format=True)
    facts = ingest(make.config(source), other, min_patients=4)
    assert facts["n_auxiliary"] == 2 and facts["n_quarantined"] == 0
    assert len(scans(other)) == 4 and everything(other) == without


def test_no_file_is_named_by_a_tag(tmp_path: Path, target: Path) -> None:
    """What tags say of places outside, or of files that are there already, is written nowhere."""
    (tmp_path / "evil").write_text("untouched")
    places = ("../evil", "../../evil", str(tmp_path / "evil"), "..\\evil")
    for i, place in enumerate(places):
        with quiet():  # pydicom warns of UIDs that are none
            make.series(
                tmp_path / f"source/s{i}",
                make.voxels(i),
                np.diag([2.0, 2, 2, 1]),
                **dict.fromkeys(("PatientID", "PatientName", "SeriesDescription"), place),
                **dict.fromkeys(("SeriesInstanceUID", "StudyInstanceUID"), f"{place}{i}"),
            )
    before = {str(p) for p in tmp_path.rglob("*")}
    ingest(make.config(tmp_path / "source"), target, min_patients=4)
    made = {str(p) for p in tmp_path.rglob("*")} - before
    assert len(scans(target)) == 4
    assert all(path.startswith(f"{target}/") for path in made)
    assert not [path for path in made if "evil" in path]
    assert (tmp_path / "evil").read_text() == "untouched"


def test_dicom_labels_from_a_table_or_the_header(tmp_path: Path, target: Path) -> None:
    source = dicom_cohort(tmp_path / "source")
    rows = [{"patient_id": f"ID-s{i}", "sex": "M", "note": i} for i in (0, 1, 2, 2)]
    make.table(source / "labels.csv", rows, ",")
    facts = ingest(make.config(source, conditions=SEX | AGE), target, min_patients=3)
    assert [dict(s.labels) for s in scans(target)] == [{"sex": "M", "age": 67.0}] * 3
    assert {s.scanner["manufacturer"] for s in scans(target)} == {"SIEMENS"}
    assert facts["reasons"] == {"not_in_table": 9}
    assert facts["patient_columns"] == ["patient_id"]
    make.table(source / "labels.csv", [*rows, {"patient_id": "ID-s0", "sex": "F", "note": 1}], ",")
    other = target.parent / "other"
    other.mkdir()
    ingest(make.config(source, conditions=SEX), other, min_patients=2)
    assert set(quarantine(other).values()) == {"label_ambiguous", "not_in_table"}
    site = {"site": {"kind": "categorical", "categories": ["a", "b"]}}
    with pytest.raises(UsageError, match=r"data\.conditions\.site.*age, sex"):
        ingest(make.config(source, conditions=site), other)
    with pytest.raises(UsageError, match=r"data\.channels"):
        ingest(make.config(source, channels={"T1w": "image"}), other)


def test_an_empty_cell_leaves_it_to_the_header(tmp_path: Path, target: Path) -> None:
    source = dicom_cohort(tmp_path / "source")
    rows = [{"patient_id": f"ID-s{i}", "sex": "", "age": "n/a"} for i in range(3)]
    rows.append({"patient_id": "ID-s3", "sex": "M", "age": "50"})
    make.table(source / "labels.csv", rows, ",")
    ingest(make.config(source, conditions=SEX | AGE), target, min_patients=3)
    found = sorted((str(s.labels["sex"]), s.labels["age"]) for s in scans(target))
    assert found == [("F", 67.0)] * 3 + [("M", 50.0)]


def test_nobody_is_called_n_a(tmp_path: Path, target: Path) -> None:
    rows = []
    for i in range(6):
        make.nifti(tmp_path / f"source/scan{i}.nii.gz", make.voxels(i))
        person = "n/a" if i < 3 else f"A{i}"
        rows.append({"patient": person, "image": f"scan{i}.nii.gz"})
    make.table(tmp_path / "source/participants.tsv", rows)
    facts = ingest(make.config(tmp_path / "source"), target, min_patients=3)
    assert facts["n_patients"] == 3 and facts["reasons"] == {"patient_missing": 3}


def test_an_id_is_one_person_s_however_its_accents_are_stored(tmp_path: Path, target: Path) -> None:
    ids = [unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD")] + ["01", "1"]
    rows = []
    for i, person in enumerate(ids):
        make.nifti(tmp_path / f"source/scan{i}.nii.gz", make.voxels(i))
        rows.append({"patient": person, "image": f"scan{i}.nii.gz"})
    make.table(tmp_path / "source/participants.tsv", rows)
    facts = ingest(make.config(tmp_path / "source"), target, min_patients=1)
    assert facts["n_patients"] == 3 and len({s.scan for s in scans(target)}) == 4
    assert facts["n_ids_alike"] == 2
    assert "2 ids differ in case or zeros alone" in summary(facts)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("participant_id\timage\nMüller\tscan.nii.gz\n".encode("cp1252"), "not UTF-8 text"),
        (b"participant_id\timage\timage\nA\tscan.nii.gz\t\n", "have one name"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(
    tmp_path: Path, target: Path, content: bytes, said: str
) -> None:
    make.nifti(tmp_path / "source/scan.nii.gz", make.voxels(0))
    (tmp_path / "source/participants.tsv").write_bytes(content)
    with pytest.raises(InputError, match=f"participants.tsv: .*{said}"):
        ingest(make.config(tmp_path / "source", conditions=SEX), target)


@pytest.mark.parametrize("side", ["test", ""])
def test_a_side_of_the_split_that_is_not_known(tmp_path: Path, target: Path, side: str) -> None:
    rows = []
    for i in range(4):
        make.nifti(tmp_path / f"source/scan{i}.nii.gz", make.voxels(i))
        name = side if i == 2 else "train"
        rows.append({"participant_id": f"A{i}", "image": f"scan{i}.nii.gz", "Split": name})
    make.table(tmp_path / "source/participants.tsv", rows)
    config = make.config(tmp_path / "source")
    with pytest.raises(UsageError, match="column split: 1 scans are neither train nor holdout"):
        ingest(config, target, min_patients=1, use_split=True)
    ingest(config, target, min_patients=1)  # a run of our own draws its split itself


def test_dicom_sessions_follow_the_dates(tmp_path: Path, target: Path) -> None:
    for i, day in enumerate(("20210101", "20190101", "20200101", "20200101")):
        make.series(
            tmp_path / f"source/s{i}",
            make.voxels(i, (9 + i, 10, 11)),
            np.diag([-2.0, -2, 2, 1]),
            PatientID="one",
            StudyDate=day,
            SeriesNumber=i,
        )
    ingest(make.config(tmp_path / "source"), target, min_patients=1)
    by_shape = {s.shape[0] - 9: s for s in scans(target)}
    assert [by_shape[i].session for i in range(4)] == [3, 1, 2, 2]
    assert by_shape[3].scan == by_shape[2].scan + "_r02"


@pytest.mark.parametrize("content", [b"only text", b""])
def test_a_damaged_file_beside_a_series_may_be_its_end(
    tmp_path: Path, target: Path, content: bytes
) -> None:
    """A slice lost at the end leaves no gap, so only the damaged file tells of it."""
    source = dicom_cohort(tmp_path / "source")
    (source / "s1/IM0000").write_bytes(content)  # the first slice
    (source / "s2/report.txt").write_bytes(content)  # no slice by its ending
    ingest(make.config(source), target, min_patients=3)
    found = quarantine(target)
    assert found.pop("s2/report.txt") == "not_an_image"
    assert found.pop("s1/IM0000") == "not_an_image"
    assert set(found.values()) == {"missing_slices"}
    assert {path[:2] for path in found} == {"s1"}


def test_a_series_of_several_volumes_is_refused_or_split(tmp_path: Path, target: Path) -> None:
    """Into a scan each, of one session, with the name that tells them apart."""
    affine = np.diag([2.0, 2, 2, 1])
    for i in range(3):
        stacks = [
            (make.voxels(10 * i + k), {"types": [t, "NONE"]}) for k, t in enumerate(("M", "P"))
        ]
        make.enhanced(tmp_path / f"source/{i}.dcm", stacks, affine)
    constant = [(make.voxels(90), {"echo": 4.0}), (make.voxels(91) * 0, {"echo": 2.0})]
    make.enhanced(tmp_path / "source/3.dcm", constant, affine)
    source = tmp_path / "source"
    with pytest.raises(InputError, match="is_4d 4"):
        ingest(make.config(source), target, min_patients=3)
    other = target.parent / "split"
    other.mkdir()
    facts = ingest(make.config(source, volumes="split"), other, min_patients=3)
    found = scans(other)
    assert facts["n_scans"] == 7 and facts["n_patients"] == 4
    assert Counter(s.volume for s in found) == {"magnitude": 3, "phase": 3, "echo-2": 1}
    assert all(s.session == 1 for s in found) and len({s.scan for s in found}) == 7
    assert quarantine(other) == {"3.dcm": "constant"}
    assert "Said of its volume echo-1." in (other / "quarantine.tsv").read_text()


def test_a_tilted_series_is_refused_or_resampled(tmp_path: Path, target: Path) -> None:
    affine = np.diag([-2.0, -2, 3, 1])
    affine[0, 2] = 1.0
    for i in range(3):
        make.series(tmp_path / f"source/s{i}", make.voxels(i), affine)
    source = tmp_path / "source"
    with pytest.raises(InputError, match="gantry_tilt"):
        ingest(make.config(source), target, min_patients=3)
    other = target.parent / "resampled"
    other.mkdir()
    ingest(make.config(source, tilted="resample"), other, min_patients=3)
    assert {s.shape for s in scans(other)} == {(16, 10, 9)}
    assert {s.spacing_mm for s in scans(other)} == {(2.0, 2.0, 3.0)}


def test_a_damaged_file_beside_files_that_are_whole_takes_nothing_with_it(
    tmp_path: Path, target: Path
) -> None:
    affine = np.diag([2.0, 2, 2, 1])
    make.enhanced(tmp_path / "source/0/a.dcm", [(make.voxels(0), {})], affine)
    (tmp_path / "source/0/b.dcm").write_bytes(b"only text")
    ingest(make.config(tmp_path / "source"), target, min_patients=1)
    assert quarantine(target) == {"0/b.dcm": "header_unreadable"}


class Deadly:
    """A read that takes its process with it, as a decoder may."""

    def __call__(self) -> Any:
        os.kill(os.getpid(), signal.SIGSEGV)


def test_processes_change_nothing(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several read what one would, and a crash in one of them costs its scan alone."""
    source = dicom_cohort(tmp_path / "source", 6)
    (source / "s3/broken.dcm").write_text("only text")
    (tmp_path / "alone").mkdir()
    facts = ingest(make.config(source), tmp_path / "alone", min_patients=3)
    monkeypatch.setattr(candidates, "MANY_FILES", 1)
    monkeypatch.setattr(processes, "how_many", lambda: 2)
    assert ingest(make.config(source), target, min_patients=3) == facts
    assert everything(target) == everything(tmp_path / "alone")

    def planned(*args: Any) -> candidates.Plan:
        plan = found(*args)
        plan.candidates[1] = dataclasses.replace(plan.candidates[1], read=Deadly())
        return plan

    found = candidates.find
    monkeypatch.setattr(candidates, "find", planned)
    (tmp_path / "again").mkdir()
    fewer = ingest(make.config(source), tmp_path / "again", min_patients=3)
    assert fewer["n_scans"] == facts["n_scans"] - 1
    died = [p for p, reason in quarantine(tmp_path / "again").items() if reason == "reader_died"]
    assert len(died) == 9 and len({p.split("/")[0] for p in died}) == 1
    left = everything(tmp_path / "again")
    volumes = {name for name in left if name.startswith("volumes/")}
    assert len(volumes) == facts["n_scans"] - 1
    assert all(left[name] == everything(target)[name] for name in volumes)


def test_a_slice_whose_header_kills_its_process_is_a_lost_one(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a stack without its last slice would pass for a whole one."""

    def spread(work: Any, items: Any, n: int, imports: Any = ()) -> Any:
        for item in items:
            yield processes.Died() if item == doomed else work(item)

    source = dicom_cohort(tmp_path / "source", 4)
    doomed = "s2/" + max((source / "s2").iterdir(), key=instance).name
    monkeypatch.setattr(processes, "spread", spread)
    facts = ingest(make.config(source), target, min_patients=3)
    assert facts["n_scans"] == 3
    assert facts["reasons"] == {"missing_slices": 8, "reader_died": 1}


def instance(file: Path) -> int:
    return int(pydicom.dcmread(file).InstanceNumber)


def test_the_fingerprint_sees_names_sizes_and_tables(
    source: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make.config(source)
    seen = [source_fingerprint(config)]
    assert source_fingerprint(config) == seen[0]

    def differs() -> bool:
        seen.append(source_fingerprint(config))
        return len(set(seen)) == len(seen)

    (source / "new.json").write_text("{}")
    assert differs()
    (source / "new.json").rename(source / "other.json")
    assert differs()
    table = source / "participants.tsv"
    table.write_text(table.read_text().replace("F", "M", 1))
    assert differs()
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path / "elsewhere"))
    assert differs()
    with pytest.raises(InputError):
        source_fingerprint(make.config(tmp_path / "none"))


REAL = os.environ.get("SYNTHMED_REAL_DATA")


@pytest.mark.real_data
@pytest.mark.skipif(REAL is None, reason="SYNTHMED_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("name", "data", "n_scans", "n_patients"),
    [
        (
            "acdc",
            {
                "channels": {
                    "cine": "image",
                    "heart": {
                        "path": "segs/{participant_id}_ED_seg.nii.gz",
                        "labels": {"right": 1, "muscle": 2, "left": 3},
                    },
                }
            },
            70,
            70,
        ),
        ("hippocampus", {"patient": "subject_group"}, 181, 118),
        ("brain3mm", {"conditions": SEX}, 47, 44),
    ],
)
def test_real_cohorts(
    name: str, data: dict[str, Any], n_scans: int, n_patients: int, target: Path
) -> None:
    facts = ingest(make.config(Path(str(REAL)) / name, **data), target)
    assert (facts["n_scans"], facts["n_patients"]) == (n_scans, n_patients)
