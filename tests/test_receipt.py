"""The receipt of an ingest: it counts right, says why, singles nobody out and names nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Result
from hypothesis import given
from hypothesis import strategies as st
from test_leaks import found, planted, spoken

from synthmed.artifacts import Catalogue, Scan
from synthmed.formats.refusal import REASONS
from synthmed.receipt import PAGE, RARE, RECEIPT, lines, of_ingest, write
from synthmed.store import Run

Cli = Callable[..., Result]
FACTS: dict[str, Any] = {
    "format": "dicom", "modality": "T1w", "n_files": 200, "n_bytes": 50_000_000, "n_auxiliary": 1,
    "n_scans": 0, "n_patients": 0, "n_quarantined": 3, "reasons": {"rgb": 2, "forgotten": 1},
}  # fmt: skip


def scan(k: int, patient: int, **fields: Any) -> Scan:
    given = {"shape": (4, 4, 4), "spacing_mm": (1.04, 1.0, 1.2), "orientation": "RAS", **fields}
    return Scan(scan=f"s{k}", patient=f"p{patient}", session=1, channels={}, **given)


def test_rows_are_counts_and_the_rare_ones_are_together() -> None:
    maker = {"manufacturer": "SIEMENS", "field_strength_t": 3.0}
    scans = [scan(k, k, scanner=maker) for k in range(3)]
    # ten scans of one person, and two people with a scanner each
    scans += [scan(10 + k, 7, scanner={"manufacturer": "GE"}) for k in range(10)]
    scans += [scan(30, 8, scanner={"field_strength_t": 7.0}), scan(31, 9)]
    receipt = of_ingest(FACTS, scans)
    assert receipt["scanner"] == [
        {"value": "SIEMENS 3 T", "n_scans": 3, "n_patients": 3},
        {"value": RARE, "n_scans": 12, "n_patients": 3},
    ]
    assert receipt["voxel_mm"] == [{"value": "1x1x1.2", "n_scans": 15, "n_patients": 6}]
    assert receipt["refused"][0] == {"reason": "rgb", "n": 2, "explanation": REASONS["rgb"]}


def test_times_are_rounded_so_that_they_tell_no_single_scan() -> None:
    times = [{"repetition_ms": 2301.5 + k, "echo_ms": 2.98} for k in range(4)]
    receipt = of_ingest(FACTS, [scan(k, k, sequence=t) for k, t in enumerate(times)])
    assert receipt["sequence"] == [{"value": "2300/3/-", "n_scans": 4, "n_patients": 4}]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["RAS", "LPS", "LIP", "PIR"]))))
def test_no_row_is_of_one_or_two_people(pairs: list[tuple[int, str]]) -> None:
    scans = [scan(k, who, orientation=axes) for k, (who, axes) in enumerate(pairs)]
    rows = of_ingest(FACTS, scans)["orientation"]
    assert sum(r["n_scans"] for r in rows) == len(scans)
    assert all(r["n_patients"] >= 3 for r in rows if r["value"] != RARE)
    for row in rows:
        own = {p for p, axes in pairs if axes == row["value"]}
        assert row["value"] == RARE or row["n_patients"] == len(own)


def test_the_table_says_how_fast(tmp_path: Path) -> None:
    receipt = of_ingest(FACTS, [scan(k, k) for k in range(3)])
    text = "\n".join(lines(receipt, 10.0))
    assert "20 files/s, 5 MB/s, 0:10" in text and "1 forgotten" in text
    assert REASONS["rgb"] in text
    assert "files/s" not in "\n".join(lines(receipt, None))


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    receipt = of_ingest(FACTS | {"modality": "<b>T1"}, [scan(k, k) for k in range(3)])
    write(tmp_path, receipt)
    assert json.loads((tmp_path / RECEIPT).read_text()) == receipt
    page = (tmp_path / PAGE).read_text()
    assert "default-src 'none'" in page and "&lt;b&gt;T1" in page and "<b>T1" not in page
    assert not re.search(r"<script|<link|\bsrc=|url\(|https?:|\bon\w+=", page)
    for row in receipt["refused"]:
        assert row["explanation"] in page


def test_a_run_has_one_that_its_catalogue_bears_out(finished: Finished) -> None:
    folder = finished.path / "private/ingest"
    receipt = json.loads((folder / RECEIPT).read_text())
    scans = Catalogue.open(folder).scans
    rows = (folder / "quarantine.tsv").read_text().splitlines()[1:]
    assert receipt["n_scans"] == len(scans) == 27
    assert receipt["n_refused"] == len(rows) == sum(r["n"] for r in receipt["refused"])
    for name in ("scanner", "sequence", "voxel_mm", "orientation"):
        assert sum(r["n_scans"] for r in receipt[name]) == 27
    named = Run(finished.path).require("catalogue").manifest.files
    assert {RECEIPT, PAGE} <= set(named), "it is hashed, so no time may be in it"
    (event,) = Run(finished.path).logged("ingest")
    assert event["seconds"] > 0 and event["n_bytes"] == receipt["n_bytes"]


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory, phantoms: Any) -> Path:
    """Twelve patients whose names stand in descriptions of series, studies and requests."""
    folder = tmp_path_factory.mktemp("source") / "dicom"
    phantoms.make_cohort(folder, phantoms.Spec("dicom", patients=12, grid=32, seed=3, broken=3))
    return folder


def test_no_name_is_in_it_or_said(
    dicom: Path, make_config: Callable[..., Path], phantoms: Any, synthmed: Cli, tmp_path: Path
) -> None:
    """Names, ids, dates and what descriptions say of them, in files and on the terminal."""
    needles = planted(phantoms, dicom, "dicom")
    source = {str(p.relative_to(dicom)): p.read_bytes() for p in dicom.rglob("*") if p.is_file()}
    assert {n for _, n in found(source, needles)} == {n.lower() for n in needles}, "the control"
    config = make_config(
        "receipt", data__source=str(dicom), data__format="dicom", data__table="labels.csv",
        data__patient="patient_id",
    )  # fmt: skip
    result = synthmed("ingest", tmp_path / "run", "--config", config)
    assert result.code == 0, result.err
    assert "14 scans of 12 patients" in result.out and "2300/3/900" in result.out
    assert re.search(r"files/s, [\d.]+ MB/s", result.out)
    assert REASONS["two_patients"] in result.out
    files = {n: (tmp_path / "run/private/ingest" / n).read_bytes() for n in (RECEIPT, PAGE)}
    files["log"] = (tmp_path / "run/log.jsonl").read_bytes()
    assert found(files | spoken(result), needles) == []
    again = synthmed("ingest", tmp_path / "run", "--json")
    assert again.json()["n_patients"] == 12
