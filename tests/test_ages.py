"""Ages in every unit: read, pooled at ninety years, and declared so that they can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from synthmed import ages
from synthmed.artifacts import Catalogue, Sample
from synthmed.config import Continuous
from synthmed.errors import UsageError
from synthmed.formats import tables
from synthmed.formats.bids_export import participants
from synthmed.stages.ingest import ingest
from tests.formats import make


def number(unit: str, high: float = 1e5) -> Continuous:
    return Continuous(low=0, high=high, unit=unit)


@pytest.mark.parametrize(
    ("name", "unit", "limit"),
    [
        ("age", "years", 90),
        ("age", "1", 90),
        ("patient_age", "yr", 90),
        ("ageAtScan", "months", 1080),
        ("age_months", "Months", 1080),
        ("gestational_age", "days", 90 * 365.25),
        ("age", "weeks", 90 * 365.25 / 7),
        ("disease_duration", "years", 90),  # nobody's is longer, and it is an age in all but name
        ("stage", "1", None),
        ("follow_up", "months", None),
        ("voltage", "1", None),
    ],
)
def test_the_pool_begins_at_ninety_years_in_every_unit(
    name: str, unit: str, limit: float | None
) -> None:
    assert ages.pool(name, number(unit)) == (None if limit is None else pytest.approx(limit))
    old = 2 * (limit or 1e3)
    read = tables.labels({name: f"{old}"}, {name: number(unit)})
    assert read == {name: pytest.approx(limit or old)}
    (row,) = participants(
        [Sample(index=0, labels={name: old}, files={})], {name: number(unit)}
    ).splitlines()[1:]
    assert float(row.split("\t")[1]) == pytest.approx(limit or old, rel=1e-5)


def test_a_child_s_age_in_months_stays_what_it_is() -> None:
    assert tables.labels({"age": "300"}, {"age": number("months")}) == {"age": 300}
    sample = Sample(index=0, labels={"gestational_age": 280.0}, files={})
    assert participants([sample], {"gestational_age": number("days")}).endswith("\t280\n")


@pytest.mark.parametrize(("unit", "expected"), [("months", 18), ("years", 1.5), ("1", 1.5)])
def test_an_age_of_a_header_comes_in_the_unit_that_is_declared(
    tmp_path: Path, unit: str, expected: float
) -> None:
    def child(k: int, ds: Dataset) -> None:
        ds.PatientAge = "018M"

    make.series(tmp_path / "source" / "s", make.voxels(0), np.diag([-1.0, -1, 2, 1]), child)
    age = {"kind": "continuous", "low": 0, "high": 100, "unit": unit}
    config = make.config(tmp_path / "source", format="dicom", conditions={"age": age})
    (tmp_path / "out").mkdir()
    ingest(config, tmp_path / "out", min_patients=1)
    (scan,) = Catalogue.open(tmp_path / "out").scans
    assert scan.labels == {"age": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"low": 0, "high": 1400}, "an age up to 1400 is not in years"),
        ({"low": 0, "high": 90, "unit": "decades"}, "no unit of an age: years, months"),
    ],
)
def test_an_age_of_unknown_unit_is_refused(
    tmp_path: Path, condition: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        make.config(tmp_path, conditions={"bone_age": {"kind": "continuous", **condition}})
