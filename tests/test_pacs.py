"""Scans from a PACS: the same as from a folder, nothing twice, nothing half, nobody named."""

from __future__ import annotations

import csv
import datetime
import importlib.util
import ipaddress
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
from conftest import ROOT, Result, command, environment
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless
from servers import Liar, Orthanc, multipart, own_network, require_orthanc
from test_leaks import everything, found, spoken, uids

from synthmed.artifacts import Catalogue
from synthmed.errors import InputError, ResourceError, UsageError
from synthmed.formats import dicom, pacs
from synthmed.formats.address import parse
from synthmed.privacy.ledger import Ledger
from synthmed.stages.ingest import ingest

pytestmark = [
    pytest.mark.services,
    # pynetdicom's own, where a server has died; those of this package are of proto=6
    pytest.mark.filterwarnings("ignore:unclosed <socket.*proto=0:ResourceWarning"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(p) is None for p in ("dicomweb_client", "pynetdicom")),
        reason="synthmed[pacs] is not installed",
    ),
]

Cli = Callable[..., Result]
TOKEN = "qZ8-vury.secret_t0ken"
N = 12
"""Patients; ten are a cohort."""
AFFINE = np.diag([2.0, 2, 3, 1])


def patient(k: int) -> dict[str, str]:
    return {"PatientID": f"MRN-77{k:03d}41", "PatientName": f"Quillfeather{k}^Zuleika"}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve patients with a T1 each, one compressed; and what else a PACS holds."""
    folder = tmp_path_factory.mktemp("pacs") / "scans"
    for k in range(N):

        def told(_: int, ds: Dataset, k: int = k) -> None:
            ds.SeriesDescription, ds.ProtocolName = "T1 MPRAGE sag", "anat"
            ds.PatientSex = "FM"[k % 2]
            for name, value in patient(k).items():
                setattr(ds, name, value)
            if k == 1:
                ds.compress(RLELossless, generate_instance_uid=False)

        make.series(folder / f"t1-{k}", make.voxels(k, (14, 12, 10)), AFFINE, told)
    one = patient(0)
    make.series(folder / "t2", make.voxels(50), AFFINE, SeriesDescription="T2 tse",
                ProtocolName="anat", SeriesNumber=4, **one)  # fmt: skip
    # of a description that says nothing the protocol decides
    make.series(folder / "by-protocol", make.voxels(51), AFFINE, SeriesDescription="sag",
                ProtocolName="my T1 protocol", SeriesNumber=5, **one)  # fmt: skip
    make.series(folder / "unnamed", make.voxels(52), AFFINE, SeriesNumber=6, **one)
    make.series(folder / "ct", make.voxels(53), AFFINE, Modality="CT",
                SOPClassUID="1.2.840.10008.5.1.4.1.1.2", **one)  # fmt: skip
    make.series(folder / "captured", make.voxels(54)[..., :1], AFFINE,
                SOPClassUID="1.2.840.10008.5.1.4.1.1.7", **one)  # fmt: skip
    make.enhanced(folder / "multi" / "e.dcm", [(make.voxels(55), {})], AFFINE,
                  lambda ds: setattr(ds, "PatientSex", "F"))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of eleven of them."""
    rows = [
        {"patient_id": patient(k)["PatientID"], "diagnosis": ("control", "atrophy")[k % 2]}
        for k in range(N - 1)
    ]
    return make.table(tmp_path_factory.mktemp("table") / "Quillfeather-labels.csv", rows, ",")


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacs, "PAUSES_SECONDS", (0.01, 0.02))
    monkeypatch.delenv("SYNTHMED_PACS_TOKEN", raising=False)


@pytest.fixture
def liar(scans: Path) -> Liar:
    return Liar(scans)


@pytest.fixture
def network() -> Iterator[None]:
    with own_network():
        yield


@pytest.fixture
def orthanc(scans: Path, tmp_path: Path) -> Iterator[Orthanc]:
    """One that holds everything."""
    require_orthanc()
    with own_network():
        server = Orthanc(tmp_path / "orthanc")
        try:
            server.start().put(scans)
            yield server
        finally:
            server.stop()


WEB = "dicomweb+http://127.0.0.1:8042/dicom-web"
DIMSE = "dimse://SYNTHMED@127.0.0.1:4242/ARCHIVE"
both = pytest.mark.parametrize("address", [WEB, DIMSE], ids=["dicomweb", "dimse"])
CONDITIONS = {"sex": {"kind": "categorical", "categories": ["F", "M"]}}


def read(source: Any, target: Path, **data: Any) -> dict[str, Any]:
    target.mkdir()
    wanted: dict[str, Any] = {"format": "dicom", "conditions": CONDITIONS, **data}
    return ingest(make.config(source, **wanted), target, work=target.with_name("work"))


def held(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "quarantine.tsv"
    }


def quarantine(file: Path) -> dict[str, str]:
    with open(file, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {r["path"]: r["reason"] for r in rows}


def fetched(address: str, folder: Path, **options: Any) -> Any:
    wanted = {"select": None, "people": lambda person: True, **options}
    return pacs.fetch(parse(address), folder, **wanted)


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: a file that is written again has others."""
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in folder.rglob("*.dcm")
    }


# --- a real PACS ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("select", [None, {"description": ["*t1*", "!*tse*"]}])
def test_a_pacs_is_read_as_a_folder(
    orthanc: Orthanc, scans: Path, tmp_path: Path, address: str, select: Any
) -> None:
    """The control is the same files in a folder; names of files and folders differ."""
    facts = read(scans, tmp_path / "folder", select=select)
    other = read(address, tmp_path / "pacs", select=select)
    assert held(tmp_path / "pacs") == held(tmp_path / "folder")
    assert facts["n_scans"] == other["n_scans"] == (N + 4 if select is None else N + 1)
    shown = quarantine(tmp_path / "pacs/quarantine.tsv")
    named = uids(scans)
    assert all(set(path.split("/")) <= named for path in shown), "found again by their UIDs"
    reasons = sorted(shown.values())
    left = [] if select is None else ["not_requested"] * (1 + 9 + 1)
    # T2 stays there as a series; what the server cannot tell comes, and the reader decides
    assert reasons == sorted(["not_mr_image", *left])


@both
def test_a_server_that_dies_is_gone_on_from(
    orthanc: Orthanc, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthmed.formats.dimse.ANSWER_SECONDS", 5.0)
    folder, n_files = tmp_path / "fetched", N * 10 + 9 * 3 + 1

    def dying(done: int, total: int) -> None:
        if done == 20:
            orthanc.stop()

    with pytest.raises(ResourceError, match=r"(?s)again and again.*the same command goes on"):
        fetched(address, folder, progress=dying)
    before = marks(folder)
    # it answers for a while after it was told to stop
    assert 20 <= len(before) < n_files
    assert not list(folder.rglob("*.part"))
    orthanc.start()
    fetched(address, folder)
    after = marks(folder)
    assert len(after) == n_files
    assert {p: after[p] for p in before} == before, "what was there is not fetched again"


def test_it_asks_who_we_are(scans: Path, tmp_path: Path, synthmed: Cli, network: None) -> None:
    """A real server with passwords, to which no token is known."""
    require_orthanc()
    server = Orthanc(
        tmp_path / "orthanc",
        {"AuthenticationEnabled": True, "RegisteredUsers": {"anna": "hunter2"}},
    )
    try:
        server.start()
        with pytest.raises(InputError, match=r"(?s)HTTP 401.*SYNTHMED_PACS_TOKEN"):
            fetched(WEB, tmp_path / "fetched")
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("dicomweb+http://127.0.0.1:8042/", "no DICOMweb service there"),
        ("dicomweb+http://127.0.0.1:8042/app", "no DICOMweb service there"),
        ("dicomweb+http://127.0.0.1:4242/dicom-web", "no answer"),
        ("dicomweb+http://127.0.0.1:9/dicom-web", "no answer"),
        ("dicomweb://127.0.0.1:8042/dicom-web", "no TLS"),
        ("dimse://ME@127.0.0.1:4242/SOMEBODY", "rejects the association"),
        ("dimse://ME@127.0.0.1:8042/ARCHIVE", "no association"),
        ("dimse://ME@127.0.0.1:9/ARCHIVE", "no answer"),
        ("dimses://ME@127.0.0.1:4242/ARCHIVE", "speaks no TLS"),
    ],
)
def test_what_is_wrong_is_said(
    orthanc: Orthanc, tmp_path: Path, address: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs, "PAUSES_SECONDS", ())
    with pytest.raises(InputError) as caught:
        fetched(address, tmp_path / "fetched")
    assert said in str(caught.value)
    assert address in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "fetched").exists()


@both
def test_nothing_is_there(orthanc: Orthanc, tmp_path: Path, address: str) -> None:
    with pytest.raises(InputError, match="no MR image in 0 of 17 studies"):
        fetched(address, tmp_path / "fetched", people=lambda person: False)


@both
def test_only_people_of_the_table_are_asked_for(
    orthanc: Orthanc, scans: Path, table: Path, tmp_path: Path, address: str
) -> None:
    conditions = {"diagnosis": {"kind": "categorical", "categories": ["control", "atrophy"]}}
    facts = read(address, tmp_path / "pacs", table=str(table), conditions=conditions)
    assert facts["n_patients"] == N - 1
    assert "not_in_table" not in facts["reasons"]
    (tmp_path / "folder").mkdir()
    source = tmp_path / "source"
    source.mkdir()
    for place in scans.iterdir():
        (source / place.name).mkdir()
        for file in place.iterdir():
            os.link(file, source / place.name / file.name)
    (source / "labels.csv").write_bytes(table.read_bytes())
    (tmp_path / "folder").rmdir()
    read(source, tmp_path / "folder", table="labels.csv", conditions=conditions)
    assert held(tmp_path / "pacs") == held(tmp_path / "folder")


@both
def test_who_was_forgotten_is_not_fetched(
    orthanc: Orthanc, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path / "home"))
    every = read(address, tmp_path / "all")
    person = Catalogue.open(tmp_path / "all").scans[0].patient
    Ledger().forget([person])
    fewer = read(address, tmp_path / "fewer")
    assert fewer["n_patients"] == every["n_patients"] - 1
    assert fewer["n_files"] < every["n_files"] and "forgotten" not in fewer["reasons"]


def test_a_whole_run_names_nobody_and_then_needs_no_network(
    orthanc: Orthanc,
    scans: Path,
    table: Path,
    make_config: Callable[..., Path],
    synthmed: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SYNTHMED_PACS_TOKEN", TOKEN)  # which this one does not look at
    config = make_config(
        "pacs", data__source="set by --input", data__format="dicom", data__table=str(table),
        data__select={"description": ["*T1*"]},
    )  # fmt: skip
    run = tmp_path / "run"
    words = ("generate", config, "--run", run, "--input", WEB, "--device", "cpu", "-v")
    assert synthmed(*words, "--dry-run").code == 0
    assert synthmed("check", config, "--set", f"data.source={WEB}").code == 0
    assert "ModalitiesInStudy" not in orthanc.log(), "neither asked the PACS"
    result = synthmed(*words)
    assert "ModalitiesInStudy" in orthanc.log()
    assert result.code in (0, 4), result.err
    assert "11 patients" in result.err
    assert not (run / "private/fetched").exists(), "the originals are gone"
    said = spoken(result)
    people = {v for k in range(N) for v in patient(k).values()}
    names = people | {v.split("^")[0] for v in people} | uids(scans) | {TOKEN}
    assert len(names) > 200
    source = {str(p): p.read_bytes() for p in scans.rglob("*") if p.is_file()}
    assert len({n for _, n in found(source, names)}) > 200, "each could leak"
    files = everything(run)
    config_file = {"config.yaml": files.pop("config.yaml")}
    assert found(files | said, names) == []
    assert found(config_file, names - {"Quillfeather"}) == []
    where = {"dicomweb", "127.0.0.1", "dicom-web"}
    assert found(config_file, where), "it reproduces the run"
    assert found(files | said, where) == [], "and nothing else says where it came from"
    private = run / "private/ingest/quarantine.tsv"
    assert TOKEN.encode() not in private.read_bytes()

    orthanc.stop()
    before = {n: c for n, c in everything(run).items() if n != "log.jsonl"}
    again = synthmed(*words)
    assert again.code == result.code, again.err
    assert "ingest" in again.err and "(unchanged)" in again.err
    assert {n: c for n, c in everything(run).items() if n != "log.jsonl"} == before
    other = synthmed("generate", config, "--run", run, "--input", DIMSE, "--device", "cpu")
    assert other.code == 2
    assert "the config has changed" in other.err


def test_look_and_plan(
    orthanc: Orthanc, make_config: Callable[..., Path], table: Path, synthmed: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("synthmed.plan.cost", lambda *a: {})  # half a minute, and not of a PACS
    shown = synthmed("look", DIMSE, "--json")
    assert shown.code == 0, shown.err
    assert sum(row["n_volumes"] for row in shown.json()["volumes"]) == N + 4
    config = make_config("plan", data__format="dicom", data__table=str(table))
    planned = synthmed("plan", config, "--input", WEB, "--device", "cpu", "--json", "-q")
    assert planned.code == 0, planned.err
    assert planned.json()["n_patients"] == N - 1
    assert [p.name for p in tmp_path.glob("synthmed-*")] == [], "nothing of it is kept"


# --- a service that does it wrong ----------------------------------------------------------------

Answer = tuple[int, dict[str, str], bytes]


def is_file(path: str) -> bool:
    return "/instances/" in path


def lie(kind: str, content: bytes, headers: dict[str, str], body: bytes) -> Answer:
    if kind == "cut off":
        return 200, {**headers, "Content-Length": str(len(body))}, body[: len(body) // 2]
    if kind == "cut off and measured":
        return 200, headers, body[: len(body) // 2]
    if kind == "its last boundary is missing":
        return 200, headers, body[: body.rindex(b"\r\n--")]
    if kind == "its last boundary is not closed":
        return 200, headers, body[:-2]
    if kind == "two files":
        return 200, *multipart([content, content])
    if kind == "no headers within":
        return 200, headers, body.replace(b"\r\n\r\n", b"\n\n", 1)
    if kind == "empty":
        return 200, headers, b""
    if kind == "an empty file":
        return 200, *multipart([b""])
    if kind == "a page":
        return 200, {"Content-Type": "text/html"}, b"<html>log in</html>"
    if kind == "unmeasured":
        return 200, {"Content-Type": "application/dicom", "Connection": "close"}, content[:700]
    return {"gone": 410, "not there": 404, "not acceptable": 406}[kind], {}, b""


LIES = ["cut off", "cut off and measured", "its last boundary is missing",
        "its last boundary is not closed", "two files", "no headers within", "empty",
        "an empty file", "a page", "gone", "not there", "not acceptable"]  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_does_not_come_whole(liar: Liar, tmp_path: Path, kind: str) -> None:
    """Is refused by its UIDs, its series is not taken for a whole one, and the others are read."""
    bad = next(
        own for own, (_, ds) in liar.files.items() if ds.PatientID == patient(3)["PatientID"]
    )

    def change(path: str, answer: Answer) -> Answer:
        if not path.endswith(bad[2]):
            return answer
        return lie(kind, liar.files[bad][0], answer[1], answer[2])

    liar.change = change
    with liar.running():
        facts = read(liar.address, tmp_path / "target", select={"description": ["*T1 MPRAGE*"]})
    shown = quarantine(tmp_path / "target/quarantine.tsv")
    assert shown["/".join(bad)] == "not_fetched"
    beside = [path for path, reason in shown.items() if reason == "missing_slices"]
    assert len(beside) == 9
    assert all(path.startswith("/".join(bad[:2])) for path in beside)
    assert facts["n_patients"] == N - 1 + 0
    assert not list((tmp_path / "work").rglob("*.part"))
    attempts = sum(path.endswith(bad[2]) for path in liar.asked)
    torn = kind.startswith(("cut", "its", "two", "no headers", "empty", "an empty"))
    assert attempts == (3 if torn else 1), "what may be chance is tried again"


def test_a_file_that_breaks_off_once(liar: Liar, tmp_path: Path) -> None:
    seen: set[str] = set()

    def change(path: str, answer: Answer) -> Answer:
        if not is_file(path) or path in seen or "limit" in path:
            return answer
        seen.add(path)
        return answer[0], {**answer[1], "Content-Length": str(len(answer[2]))}, answer[2][:-100]

    liar.change = change
    with liar.running():
        listing = fetched(liar.address, tmp_path / "fetched")
    assert listing.refused.keys() == {
        p for p, reason in listing.refused.items() if reason.code == "not_mr_image"
    }
    original = {content for content, _ in liar.files.values()}
    assert all(listing.path(p).read_bytes() in original for p in listing.sizes)
    assert len(listing.sizes) == len(seen) == 12 * 10 + 9 * 3 + 1


def test_bytes_are_those_of_the_server(liar: Liar, tmp_path: Path) -> None:
    """Also where a file holds what looks like a boundary, and pieces are a byte long."""
    uid = next(iter(liar.files))
    content = liar.files[uid][0] + b"\r\n--b0undar\r\n--b0\r\n\r\n--"
    liar.files = {uid: (content, liar.files[uid][1])}
    for piece in (1, 7, 1 << 20):
        with pytest.MonkeyPatch.context() as patch, liar.running():
            patch.setattr("synthmed.formats.dicomweb._CHUNK", piece)
            listing = fetched(liar.address, tmp_path / str(piece))
        (path,) = listing.sizes
        assert listing.path(path).read_bytes() == content


def test_a_body_that_is_dicom_itself(liar: Liar, tmp_path: Path) -> None:
    """Some servers send it so, against the standard."""

    def change(path: str, answer: Answer) -> Answer:
        uid = path.rpartition("/")[2]
        own = {k[2]: content for k, (content, _) in liar.files.items()}
        return (200, {"Content-Type": "application/dicom"}, own[uid]) if uid in own else answer

    liar.change = change
    with liar.running():
        assert len(fetched(liar.address, tmp_path / "fetched").sizes) == 12 * 10 + 9 * 3 + 1


@pytest.mark.parametrize("protocol", ["dicomweb", "dimse"])
def test_a_file_may_not_be_larger_than_the_reader_takes(
    liar: Liar,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    protocol: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 3000)  # the multi-frame file alone is larger
    if protocol == "dimse":
        request.getfixturevalue("orthanc")
        listing = fetched(DIMSE, tmp_path / "fetched")
    else:
        with liar.running():
            listing = fetched(liar.address, tmp_path / "fetched")
    codes = sorted(reason.code for reason in listing.refused.values())
    assert codes == ["not_mr_image", "oversized"]
    assert len(listing.sizes) == 12 * 10 + 9 * 3
    assert not list((tmp_path / "fetched").rglob("*.part"))


def test_a_service_that_fails_for_a_while(liar: Liar, tmp_path: Path) -> None:
    """Every request is refused once."""
    seen: set[str] = set()

    def change(path: str, answer: Answer) -> Answer:
        if path in seen:
            return answer
        seen.add(path)
        return 503, {}, b""

    liar.change = change
    with liar.running():
        assert len(fetched(liar.address, tmp_path / "fetched").sizes) == 12 * 10 + 9 * 3 + 1


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_service_that_fails_for_good_is_no_fault_of_the_files(
    liar: Liar, tmp_path: Path, synthmed: Cli, make_config: Callable[..., Path], status: int
) -> None:
    """A half of a cohort must not pass for a cohort."""
    n = 0

    def change(path: str, answer: Answer) -> Answer:
        nonlocal n
        n += is_file(path)
        return (status, {}, b"") if n > 115 else answer

    liar.change = change
    config = make_config("failing", data__format="dicom", data__conditions=CONDITIONS)
    run = tmp_path / "run"
    with liar.running():
        result = synthmed("ingest", run, "--config", config, "--input", liar.address)
        assert result.code == 5, result
        assert f"HTTP {status}" in result.err and "goes on" in result.err
        assert not (run / "private/ingest").exists()
        there = {p.name for p in (run / "private/fetched").rglob("*.dcm")}
        assert len(there) == 115
        liar.change = lambda path, answer: answer
        liar.asked.clear()
        assert synthmed("ingest", run).code == 0
    assert sum(map(is_file, liar.asked)) == 12 * 10 + 9 * 3 + 1 - 115


def fetching(
    liar: Liar, config: Path, run: Path, pause: float, n_files: int
) -> subprocess.Popen[str]:
    """An ingest from a server that waits before each file, once some files are there."""

    def slow(path: str, answer: Answer) -> Answer:
        if is_file(path):
            time.sleep(pause)
        return answer

    liar.change = slow
    words = command("ingest", run, "--config", config, "--input", liar.address)
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while len(list((run / "private/fetched").rglob("*.dcm"))) < n_files:
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_a_killed_run_goes_on(
    liar: Liar, tmp_path: Path, make_config: Callable[..., Path], synthmed: Cli
) -> None:
    config = make_config("killed", data__format="dicom", data__conditions=CONDITIONS)
    run = tmp_path / "run"
    with liar.running():
        place = run / "private/fetched"
        process = fetching(liar, config, run, pause=0.05, n_files=30)
        process.kill()
        process.communicate()
        there = marks(place)
        assert 30 <= len(there) < 120
        assert oct(place.stat().st_mode & 0o777) == oct(0o700)
        # no name of a file or folder says whose it is
        text = " ".join(str(p.relative_to(place)) for p in place.rglob("*"))
        assert not any(part in text for own in liar.files for part in own)
        (place / "stray").mkdir()
        (place / "stray/x.dcm").write_bytes(b"of another day")
        liar.asked.clear()
        result = synthmed("ingest", run, "-q")
        assert result.code == 0, result.err
    again = [path for path in liar.asked if is_file(path)]
    assert len(again) == len(set(again)) == 12 * 10 + 9 * 3 + 1 - len(there)
    assert not place.exists()


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C is heeded by what is started, also where a shell in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_it_soon(
    heeded: None, liar: Liar, tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    config = make_config("stopped", data__format="dicom", data__conditions=CONDITIONS)
    with liar.running():
        process = fetching(liar, config, tmp_path / "run", pause=0.1, n_files=5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "interrupted; the same command goes on from what is complete\n"


def test_pages_are_followed_and_a_server_that_ignores_them_does_not_keep_us(
    liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthmed.formats.dicomweb.PAGE", 4)
    with liar.running():
        assert len(fetched(liar.address, tmp_path / "paged").sizes) == 12 * 10 + 9 * 3 + 1
        whole = liar.answer

        def unpaged(path: str, headers: Any) -> Answer:
            return whole(
                path.replace("limit=4", "limit=999").replace("offset=", "offset=0&x="), headers
            )

        monkeypatch.setattr(liar, "answer", unpaged)
        assert len(fetched(liar.address, tmp_path / "unpaged").sizes) == 12 * 10 + 9 * 3 + 1


def test_a_series_of_which_not_all_is_listed(liar: Liar, tmp_path: Path) -> None:
    """Without its last slices it would be a smaller volume, and nobody would know."""
    series = next(own[1] for own, (_, ds) in liar.files.items() if "3" in str(ds.PatientID))

    def change(path: str, answer: Answer) -> Answer:
        if "/series?" not in path:
            return answer
        told = b'"00201209": {"vr": "IS", "Value": [11]}, "0020000E"'
        return (
            answer[0],
            answer[1],
            (answer[2].replace(b'"0020000E"', told) if series.encode() in answer[2] else answer[2]),
        )

    liar.change = change
    with liar.running():
        listing = fetched(liar.address, tmp_path / "fetched")
    (path,) = [p for p, reason in listing.refused.items() if reason.code == "not_fetched"]
    assert listing.names[path].endswith(series)
    assert "lists 10 of its 11" in listing.refused[path].detail
    assert not any(listing.names[p].split("/")[1] == series for p in listing.sizes)


@pytest.mark.parametrize("uid", ["../../../etc", "1.2/3", "", "x", "1." * 40])
@pytest.mark.parametrize("tag", ["0020000D", "0020000E", "00080018"])
def test_a_uid_that_is_none_is_asked_for_by_nobody(
    liar: Liar, tmp_path: Path, uid: str, tag: str
) -> None:
    studies = sorted({own[0] for own in liar.files})[:2]
    liar.files = {own: v for own, v in liar.files.items() if own[0] in studies}
    own = next(k for k in liar.files if k[0] == studies[0])
    real = own[["0020000D", "0020000E", "00080018"].index(tag)].encode()

    def change(path: str, answer: Answer) -> Answer:
        is_json = "json" in answer[1].get("Content-Type", "")
        return (*answer[:2], answer[2].replace(real, uid.encode())) if is_json else answer

    liar.change = change
    with liar.running():
        listing = fetched(liar.address, tmp_path / "fetched")
    assert "header_unreadable" in {reason.code for reason in listing.refused.values()}
    assert not any(".." in path or path.endswith("/x") for path in liar.asked)


@pytest.mark.parametrize("body", [b"<html>", b"{", b"[1]", b'[{"0020000D": 7}]', b'"x"', b"[[]]"])
def test_nonsense_is_no_service(liar: Liar, tmp_path: Path, body: bytes) -> None:
    liar.change = lambda path, answer: (200, {"Content-Type": "application/dicom+json"}, body)
    with liar.running(), pytest.raises(InputError, match="no DICOMweb service there"):
        fetched(liar.address, tmp_path / "fetched")


def test_an_endless_answer_is_cut(
    liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthmed.formats.dicomweb.MAX_ANSWER_BYTES", 1000)
    with liar.running(), pytest.raises(InputError, match="no DICOMweb service there"):
        fetched(liar.address, tmp_path / "fetched")


# --- who may ask, and over what wire -------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_token_that_is_missing_or_wrong(
    liar: Liar, tmp_path: Path, token: str, make_config: Callable[..., Path], synthmed: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    liar.token = TOKEN
    if token:
        monkeypatch.setenv("SYNTHMED_PACS_TOKEN", token)
    config = make_config("token", data__format="dicom", data__conditions=CONDITIONS)
    with liar.running():
        result = synthmed("ingest", tmp_path / "run", "--config", config, "--input", liar.address)
    assert result.code == 3
    assert "HTTP 401" in result.err and "SYNTHMED_PACS_TOKEN" in result.err
    assert len(result.err.splitlines()) == 2
    assert len(liar.asked) == 1, "asking again would lock somebody out"


def test_the_token_is_sent_and_kept_nowhere(
    liar: Liar, tmp_path: Path, make_config: Callable[..., Path], synthmed: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    liar.token = TOKEN
    monkeypatch.setenv("SYNTHMED_PACS_TOKEN", TOKEN)
    config = make_config("token", data__format="dicom", data__conditions=CONDITIONS)
    run = tmp_path / "run"
    with liar.running():
        result = synthmed("ingest", run, "--config", config, "--input", liar.address)
    assert result.code == 0, result.err
    assert set(liar.authorized) == {f"Bearer {TOKEN}"}
    assert set(liar.hosts) == {f"127.0.0.1:{liar.port}"}
    files = {str(p): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert found(files | spoken(result), {TOKEN}) == []


def test_no_token_in_the_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Path], synthmed: Cli
) -> None:
    monkeypatch.setenv("SYNTHMED_PACS_TOKEN", TOKEN)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked for a host"))
    config = make_config("clear", data__format="dicom", data__conditions=CONDITIONS)
    source = "dicomweb+http://pacs.example.org/rs"
    result = synthmed("ingest", tmp_path / "run", "--config", config, "--input", source)
    assert result.code == 2
    assert "unencrypted" in result.err
    assert TOKEN not in result.err


def test_a_password_of_netrc_is_not_sent_in_the_clear(
    liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login anna password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with liar.running():
        fetched(liar.address, tmp_path / "fetched")
    assert set(liar.authorized) == {""}


def test_a_redirection_is_not_followed(liar: Liar, tmp_path: Path) -> None:
    liar.change = lambda path, answer: (302, {"Location": "http://127.0.0.1:9/rs"}, b"")
    with liar.running(), pytest.raises(InputError, match="leads to another address"):
        fetched(liar.address, tmp_path / "fetched")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and self-signed certificate of 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pacs")])
    now = datetime.datetime.now(datetime.UTC)
    own = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(own, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


def server_side(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_a_server_that_nobody_vouches_for_is_refused(
    liar: Liar, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same server, once its certificate is known."""
    monkeypatch.setenv("SYNTHMED_PACS_TOKEN", TOKEN)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    liar.token = TOKEN
    with liar.running(server_side(certificate)):
        address = liar.address.replace("dicomweb+http", "dicomweb")
        with pytest.raises(InputError, match=r"(?s)TLS certificate.*REQUESTS_CA_BUNDLE"):
            fetched(address, tmp_path / "fetched")
        assert liar.asked == [], "nothing was said to it"
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert len(fetched(address, tmp_path / "fetched").sizes) == 12 * 10 + 9 * 3 + 1
        other = address.replace("127.0.0.1", "localhost")
        with pytest.raises(InputError, match="TLS certificate"):
            fetched(other, tmp_path / "other")  # known, and of another name


def test_the_same_over_dimse(
    scans: Path, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_orthanc()
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    settings = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(certificate),
        "DicomTlsPrivateKey": str(certificate),
        "DicomTlsRemoteCertificateRequired": False,
        "DicomTlsTrustedCertificates": str(certificate),
    }
    address = DIMSE.replace("dimse:", "dimses:")
    with own_network():
        server = Orthanc(tmp_path / "orthanc", settings)
        try:
            server.start().put(scans)
            with pytest.raises(InputError, match=r"(?s)TLS certificate.*SSL_CERT_FILE"):
                fetched(address, tmp_path / "fetched")
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            assert len(fetched(address, tmp_path / "fetched").sizes) == 12 * 10 + 9 * 3 + 1
            with pytest.raises(InputError, match="TLS certificate"):
                fetched(address.replace("127.0.0.1", "localhost"), tmp_path / "other")
        finally:
            server.stop()


# --- this side -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["dicomweb", "dimse"])
def test_a_full_disk(
    liar: Liar, request: pytest.FixtureRequest, tmp_path: Path, protocol: str
) -> None:
    """A limit on files stands for it: writing fails part of the way."""
    if protocol == "dimse":
        request.getfixturevalue("orthanc")

    def full(address: str) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
        try:
            with pytest.raises(ResourceError, match=r"(?s)cannot be written.*Free some space"):
                fetched(address, tmp_path / "fetched")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)

    if protocol == "dimse":
        full(DIMSE)
    else:
        with liar.running():
            full(liar.address)
    assert [p for p in (tmp_path / "fetched").rglob("*") if p.is_file()] == []


def test_a_table_that_is_not_there_is_said_before_anything_is_asked(
    liar: Liar, tmp_path: Path, table: Path
) -> None:
    with liar.running():
        with pytest.raises(UsageError, match=r"(?s)data\.table .*a file on this machine"):
            read(liar.address, tmp_path / "a", table=str(tmp_path / "none.csv"))
        with pytest.raises(UsageError, match=r"data\.patient: no column mrn"):
            read(liar.address, tmp_path / "b", table=str(table), patient="mrn")
        with pytest.raises(UsageError, match=r"data\.channels"):
            read(liar.address, tmp_path / "c", channels={"T1w": "image"})
    assert liar.asked == []


def test_without_the_packages_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for address in (WEB, DIMSE):
        with pytest.raises(UsageError, match=r"'\.\[pacs\]'"):
            fetched(address, tmp_path / "fetched")


def test_they_are_loaded_for_an_address_alone() -> None:
    code = (
        "import sys, synthmed.cli, synthmed.stages.ingest; "
        "sys.exit(any(m in sys.modules for m in ('dicomweb_client', 'pynetdicom')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
