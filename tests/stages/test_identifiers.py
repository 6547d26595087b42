"""What a release is searched for: who a source names, and not what the report says anyway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from synthmed.config import Config
from synthmed.deid.scan import mentions
from synthmed.stages.identifiers import SourceNames, identifiers, source_names
from synthmed.store import Run
from tests.formats import make

SEX = {"sex": {"kind": "categorical", "categories": ["F", "M"]}}


def searched(tmp_path: Path, config: Config) -> set[str]:
    return identifiers(Run(tmp_path / "run"), config, (), source_names(config))


def dicom_source(folder: Path, **elements: Any) -> Path:
    def change(k: int, ds: Dataset) -> None:
        for name, value in elements.items():
            setattr(ds, name, value)

    make.series(folder / "IM", make.voxels(0), np.diag([-1.0, -1, 2, 1]), change)
    return folder


def test_the_people_of_dicom_headers_are_searched(tmp_path: Path) -> None:
    source = dicom_source(
        tmp_path / "source",
        SpecificCharacterSet="ISO_IR 192",
        PatientName="Müllerström^Jürgen",
        PatientID="PID88003",
        OtherPatientIDs=["X-4711-A", "0001"],
    )
    found = searched(tmp_path, make.config(source, format="dicom"))
    for text in (
        "the scan of Jürgen Müllerström",
        "MÜLLERSTRÖM^JÜRGEN",
        "PID88003 was left out",
        "known as X-4711-A",
    ):
        assert mentions(text, found), text
    assert not mentions("sub-syn0001 of an examination", found)


@pytest.mark.parametrize("where", ["name", "license"])
def test_a_patient_in_what_the_config_says_is_found(tmp_path: Path, where: str) -> None:
    """Title and licence count for words of file names, never for people."""
    source = dicom_source(tmp_path / "source", PatientName="Quillfeather^Anna")
    config = make.config(source, format="dicom")
    said = config.model_copy(
        update={"export": config.export.model_copy(update={where: "Scans like Quillfeather's"})}
    )
    assert mentions("Scans like Quillfeather's", searched(tmp_path, said))


def test_words_of_file_names_but_for_those_that_everybody_uses(tmp_path: Path) -> None:
    for name in ("Quillfeather_Anna_0001", "Dr.Holloway.T1w", "oasis_image_brain_train"):
        make.nifti(tmp_path / "source" / f"{name}.nii.gz", make.voxels(0))
    config = make.config(tmp_path / "source")
    terms = config.export.model_copy(update={"license": "OASIS data-use terms"})
    found = searched(tmp_path, config.model_copy(update={"export": terms}))
    assert mentions("a scan of Anna Quillfeather", found)
    assert mentions("seen by Holloway", found)
    assert mentions("oasis_image_brain_train", found)
    assert not mentions("OASIS data-use terms: an image of a brain to train on", found)


def test_tables_name_people_in_more_than_one_column(tmp_path: Path) -> None:
    make.nifti(tmp_path / "source" / "a.nii.gz", make.voxels(0))
    make.table(
        tmp_path / "source" / "participants.tsv",
        [
            {
                "participant_id": "A-17-x",
                "surname": "Quillfeather",
                "patient_name": "Holloway, Zelda",
                "file_name": "brain.nii",
                "sex": "F",
            }
        ],
    )
    found = searched(tmp_path, make.config(tmp_path / "source", conditions=SEX))
    for text in ("A-17-x", "of quillfeather", "Zelda Holloway"):
        assert mentions(text, found), text
    assert not mentions("a brain", found)


def test_a_source_that_is_not_at_hand_is_not_complete(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    assert source_names(make.config(tmp_path / "source")).complete
    assert not source_names(make.config(tmp_path / "gone")).complete
    assert not source_names(make.config("dicomweb://pacs.example.org/dicom-web")).complete
    for i in range(4):
        make.nifti(tmp_path / f"layout/imagesTr/case_{i}.nii", make.voxels(i))
    assert source_names(make.config(tmp_path / "layout")).layout == {"imagesTr"}
    one, other = SourceNames(frozenset({"Anna"})), SourceNames(complete=False)
    assert one | other == SourceNames(frozenset({"Anna"}), complete=False)
