"""Nothing of a patient's identity gets past ingest: every byte of a run is searched for it.

The phantoms carry invented identities in every place where real files have them. What is searched
for is known to be in the source (the control), and would be found in a run (the other control).
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from conftest import Finished, Result

Files = dict[str, bytes]


def unpacked(content: bytes) -> bytes:
    """Bytes, and what they inflate to: gzip as a whole, and every zlib stream of a PNG."""
    out = content
    if content[:2] == b"\x1f\x8b":
        out += gzip.decompress(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        packed = b"".join(re.findall(rb"IDAT(.*?)(?=....IEND|....IDAT)", content, re.S))
        inflate = zlib.decompressobj()
        out += inflate.decompress(packed)
    return out


def everything(run: Path) -> Files:
    """Name and content of each file of a run but the one list that may name what was refused."""
    allowed = run / "private/ingest/quarantine.tsv"
    assert allowed.is_file()
    files = [p for p in run.rglob("*") if p.is_file() and p != allowed]
    return {str(p.relative_to(run)): unpacked(p.read_bytes()) for p in files}


def found(files: Files, needles: Iterable[str]) -> list[tuple[str, str]]:
    """(file, string) for each string in a name or in the bytes, in any case."""
    hits = []
    wanted = sorted({n.lower() for n in needles})
    for name, content in files.items():
        low = name.lower().encode() + b"\0" + content.lower()
        for needle in wanted:
            for encoding in ("utf-8", "utf-16-le"):
                if needle.encode(encoding) in low:
                    hits.append((name, needle))
    return hits


def stems(source: Path) -> set[str]:
    """File names without what follows the first dot, those that say something."""
    plain = {"participants", "dataset_description", "complete", "labels", "dseg"}
    return (
        {
            p.name.split(".")[0]
            for p in source.rglob("*")
            if p.is_file() and not p.name.startswith(".")
        }
        - plain
        - {"COMPLETE"}
    )


def planted(phantoms: Any, folder: Path, layout: str) -> set[str]:
    """Every invented string of a cohort's identities, and the ids they are listed under."""
    marker = json.loads((folder / "COMPLETE.json").read_text())
    by_person = phantoms.identities(phantoms.Spec(**marker["parameters"]))
    assert marker["parameters"]["layout"] == layout
    return set(by_person) | {s for strings in by_person.values() for s in strings}


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """The control: plain, compressed, in another case or encoding, and in a file's name."""
    (tmp_path / "private/ingest").mkdir(parents=True)
    (tmp_path / "private/ingest/quarantine.tsv").write_text("Quillfeather")
    (tmp_path / "clean").write_text("nothing")
    assert found(everything(tmp_path), {"Quillfeather"}) == []
    (tmp_path / "plain").write_bytes(b"\0\1xxQUILLFEATHERxx")
    (tmp_path / "packed.nii.gz").write_bytes(gzip.compress(b"\0" * 400 + b"Quillfeather"))
    (tmp_path / "wide").write_bytes("Quillfeather".encode("utf-16-le"))
    (tmp_path / "sub-Quillfeather1").write_bytes(b"")
    hits = {name for name, _ in found(everything(tmp_path), {"Quillfeather"})}
    assert hits == {"plain", "packed.nii.gz", "wide", "sub-Quillfeather1"}


def test_a_bids_cohort_leaves_no_trace(finished: Finished, cohort: Path, phantoms: Any) -> None:
    needles = planted(phantoms, cohort, "bids") | stems(cohort)
    assert len(needles) > 300
    source = {
        str(p.relative_to(cohort)): unpacked_or_not(p) for p in cohort.rglob("*") if p.is_file()
    }
    in_source = {needle for _, needle in found(source, needles)}
    assert in_source == {n.lower() for n in needles}, "each is in the source, so that it could leak"
    assert found(everything(finished.path), needles) == []
    assert found(spoken(finished.result), needles) == []


def unpacked_or_not(path: Path) -> bytes:
    """The content of a source file, some of which are damaged on purpose."""
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    return raw + zlib.decompressobj(wbits=31).decompress(raw)


def spoken(result: Result) -> Files:
    """What the terminal showed."""
    return {"stdout": result.out.encode(), "stderr": result.err.encode()}


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory, phantoms: Any) -> Path:
    """Series of twelve patients, and three that are broken."""
    folder = tmp_path_factory.mktemp("source") / "dicom"
    phantoms.make_cohort(folder, phantoms.Spec("dicom", patients=12, grid=32, seed=3, broken=3))
    return folder


def uids(folder: Path) -> set[str]:
    """Every UID that names something of a patient's (not a class or a transfer syntax)."""
    named: set[str] = set()
    for file in folder.rglob("*"):
        if file.is_file() and file.read_bytes()[128:132] == b"DICM":
            for element in pydicom.dcmread(file, stop_before_pixels=True).iterall():
                if element.VR == "UI" and not str(element.value).startswith("1.2.840.10008."):
                    named.add(str(element.value))
    return named


def test_a_dicom_cohort_leaves_no_trace(
    dicom: Path,
    make_config: Callable[..., Path],
    phantoms: Any,
    synthmed: Callable[..., Result],
    tmp_path: Path,
) -> None:
    series = uids(dicom)
    names = planted(phantoms, dicom, "dicom") | {p.name for p in dicom.glob("ST*")}
    # eight digits alone occur by chance among thousands of decimals; their spelling is checked
    # below as a word of its own
    dates = {n for n in names if n.isdigit()}
    needles = (names - dates) | series
    assert len(series) > 30
    assert len(needles) > 100
    config = make_config(
        "dicom", data__source=str(dicom), data__format="dicom", data__table="labels.csv",
        data__patient="patient_id",
    )  # fmt: skip
    run = tmp_path / "run"
    result = synthmed("generate", config, "--run", run, "--device", "cpu", "-v")
    assert result.code in (0, 4), result.err
    assert "12 patients" in result.err, "the broken series are refused"
    files = everything(run) | spoken(result)
    assert found(files, needles) == []
    for name, content in files.items():
        for date in dates:
            assert not re.search(rb"(?<![0-9.])%s(?![0-9])" % date.encode(), content), (name, date)


def test_refusals_and_faults_speak_in_pseudonyms(
    cohort: Path,
    make_config: Callable[..., Path],
    phantoms: Any,
    synthmed: Callable[..., Result],
    tmp_path: Path,
) -> None:
    """Messages of failing commands name nobody either."""
    needles = planted(phantoms, cohort, "bids") | stems(cohort)
    said: Files = {}
    codes = []
    faults: tuple[dict[str, Any], ...] = (
        {"data__conditions__age__high": 41},  # next to nobody is in the declared range
        {"data__patient": "no_such_column"},
        {"sample__count": 3},
    )
    for i, changes in enumerate(faults):
        config = make_config("faulty", **changes)
        run = tmp_path / str(i)
        result = synthmed("generate", config, "--run", run, "--device", "cpu", "-v")
        codes.append(result.code)
        said |= {f"{i} {k}": v for k, v in spoken(result).items()}
        said |= {f"{i} {k.name}": k.read_bytes() for k in run.glob("*") if k.is_file()}
    assert codes[:2] == [3, 2]
    assert found(said, needles) == []


REAL = os.environ.get("SYNTHMED_REAL_DATA", "")


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="SYNTHMED_REAL_DATA is not set")
def test_real_scans_leave_no_trace(
    make_config: Callable[..., Path], synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    """The hippocampus cohort: participants, groups and file names."""
    folder = Path(REAL) / "hippocampus"
    with open(folder / "participants.tsv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    columns = ("participant_id", "subject_group")
    needles = {r[c] for r in rows for c in columns} | stems(folder / "images")
    kept = distinctive(needles)
    assert len(kept) > 100
    config = make_config(
        "hippocampus", data__source=str(folder), data__patient="subject_group",
        data__conditions={
            "volume_class": {"kind": "categorical", "categories": ["small", "medium", "large"]}
        },
        data__grid=[16, 24, 16], data__spacing_mm=[2, 2, 2],
    )  # fmt: skip
    run = tmp_path / "run"
    result = synthmed("generate", config, "--run", run, "--device", "cpu", "-v")
    assert result.code in (0, 4), result.err
    assert found(everything(run) | spoken(result), kept) == []


def distinctive(names: Collection[str]) -> set[str]:
    """Names of five characters or more: shorter ones occur in any bytes."""
    return {n for n in names if len(n) >= 5}
