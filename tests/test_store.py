"""The run folder: whole or not there, altered is noticed, one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Finished

from synthmed import store
from synthmed.errors import InputError, ResourceError, UsageError
from synthmed.store import FOLDER, Kind, Manifest, Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def make(run: Run, kind: Kind, content: str = "voxels") -> store.Artifact:
    with run.writing(kind, "c", {"before": "x"}, {"n": 1}) as target:
        (target / "deep").mkdir()
        (target / "deep/file.txt").write_text(content)
    return run.require(kind)


@pytest.fixture
def line(run: Run) -> Run:
    """A run with everything made, and a release."""
    for kind in FOLDER:
        make(run, kind)
    for name in ("release", "withheld", "private/report"):
        (run.path / name).mkdir()
        (run.path / name / "x").write_text("x")
    return run


def test_an_artifact_is_there_once_its_block_ends(run: Run) -> None:
    with run.writing("model", "c", {}, facts := {}) as target:
        (target / "weights").write_bytes(b"1")
        facts["steps"] = 3
        assert run.load("model") is None
        assert not run.folder("model").exists()
    made = run.load("model")
    assert made is not None
    assert made.manifest.facts == {"steps": 3}
    assert set(made.manifest.files) == {"weights"}


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), MemoryError()])
def test_a_failing_block_leaves_what_was_there(run: Run, error: BaseException) -> None:
    make(run, "catalogue", "old")

    def attempt() -> None:
        with run.writing("catalogue", "c", {}, {}) as target:
            (target / "file").write_text("half")
            raise error

    with pytest.raises(type(error)):
        attempt()
    assert (run.folder("catalogue") / "deep/file.txt").read_text() == "old"


@pytest.mark.parametrize("moment", ["inside", "before the rename"])
def test_a_killed_block_leaves_nothing_under_the_final_name(moment: str, tmp_path: Path) -> None:
    """kill -9 while the files are written, and again when only the last rename is missing."""
    place = tmp_path / "run"
    script = f"""
import os, pathlib, signal
from synthmed.store import Run
run = Run(pathlib.Path({str(place)!r}))
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
if {moment!r} != "inside":
    Run.discard = die
with run.writing("model", "c", {{}}, {{}}) as target:
    (target / "weights").write_bytes(b"half")
    if {moment!r} == "inside":
        die()
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == -9
    run = Run(place)
    assert run.load("model") is None
    assert not run.folder("model").exists()
    with pytest.raises(UsageError, match="nothing from the stage train yet"):
        run.require("model")
    assert make(run, "model").manifest.facts == {"n": 1}, "the next attempt is not in its way"
    assert {p.name for p in run.private.iterdir()} == {"model"}


@pytest.mark.parametrize("harm", ["altered", "missing", "longer"])
def test_a_file_that_changed_is_noticed(run: Run, harm: str) -> None:
    file = make(run, "dataset").path / "deep/file.txt"
    assert run.load("dataset") is not None
    match harm:
        case "altered":
            file.write_text("Voxels")
        case "longer":
            file.write_text("voxels and more")
        case "missing":
            file.unlink()
    with pytest.raises(InputError, match=r"file\.txt: missing or altered") as error:
        run.load("dataset")
    assert "--overwrite" in str(error.value)
    make(run, "model")
    run.discard_damaged()
    assert run.load("dataset") is None
    assert run.load("model") is None, "what was made of it is gone too"


def test_a_manifest_of_another_kind_or_version_is_refused(run: Run) -> None:
    made = make(run, "cohort")
    made.path.rename(run.folder("screening"))
    with pytest.raises(InputError, match="holds a cohort of schema 1, expected a screening"):
        run.load("screening")
    file = run.folder("screening") / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"kind": "screening", "schema_version": 2}))
    with pytest.raises(InputError, match="schema 2, expected a screening of schema 1"):
        run.load("screening")
    file.write_text('{"kind": "screening"')
    with pytest.raises(InputError, match="not a manifest"):
        run.load("screening")


def test_the_manifest_has_a_version_and_no_time(finished: Finished) -> None:
    """So that equal means equal: nothing in it is a time, a host or a path of this machine."""
    for kind, folder in FOLDER.items():
        text = (finished.path / "private" / folder / "manifest.json").read_text()
        content = json.loads(text)
        assert content["schema_version"] == 1
        assert content["kind"] == kind
        assert set(content) == set(Manifest.model_fields)
        assert not {"time", "date", "created", "host"} & set(content["facts"])
        assert str(finished.path.parent) not in text
        for own in content["files"]:
            text = text.replace(own, "")
        assert "/" not in text, "no path but those of its own files"


def test_the_digest_covers_every_part() -> None:
    base = Manifest(kind="model", config="c", inputs={"a": "b"}, files={"f": "1"}, facts={"n": 1})
    others = [
        base.model_copy(update=change)
        for change in (
            {"kind": "cohort"}, {"config": "d"}, {"inputs": {"a": "c"}}, {"files": {"f": "2"}},
            {"facts": {"n": 2}}, {"schema_version": 2},
        )
    ]  # fmt: skip
    assert len({m.digest() for m in [base, *others]}) == 7
    same = Manifest(facts={"n": 1}, files={"f": "1"}, inputs={"a": "b"}, config="c", kind="model")
    assert same.digest() == base.digest()


def test_a_second_process_is_kept_off(run: Run) -> None:
    script = f"""
import pathlib, sys
from synthmed.store import Run
with Run(pathlib.Path({str(run.path)!r})).lock():
    print("held", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ResourceError) as error, run.lock():
        pass
    assert "in use by another process" in str(error.value)
    assert error.value.exit_code == 5
    other.kill()  # the system lets go of a dead process's lock
    other.communicate()
    with run.lock():
        pass


@pytest.mark.parametrize("first", FOLDER)
def test_discard_takes_all_later_ones_and_what_leaves(first: Kind, line: Run) -> None:
    (line.private / "model.partial").mkdir()
    line.discard(first)
    order = list(FOLDER)
    kept = order[: order.index(first)]
    assert [k for k in order if line.load(k)] == kept
    for name in ("release", "withheld", "private/report"):
        assert not (line.path / name).exists()
    assert (line.private / "model.partial").exists() == ("model" in kept)
    assert not list(line.private.glob(".removed*"))


def test_a_new_artifact_takes_the_old_and_the_later_ones_with_it(line: Run) -> None:
    partial = line.work("cohort")
    (partial / "half.nii.gz").write_text("")
    make(line, "dataset", "new")
    assert [k for k in FOLDER if line.load(k)] == ["catalogue", "dataset"]
    assert (line.folder("dataset") / "deep/file.txt").read_text() == "new"
    assert not partial.exists(), "samples of a model that is no more"
    assert not (line.path / "release").exists()


def test_a_failed_ingest_is_nothing_made(run: Run) -> None:
    """Only its list of refusals stands: a corrected config need not overwrite anything."""
    run.folder("catalogue").mkdir()
    (run.folder("catalogue") / "quarantine.tsv").write_text("path\n")
    assert run.load("catalogue") is None
    assert not run.holds("catalogue")
    run.work("model")
    assert run.holds("model"), "a begun training would be lost"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    store.write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        store.write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("torn", ['{"time": "2026-1', "x", '{"time": "now", "event": "release"}'])
def test_a_log_whose_last_line_was_cut_off_goes_on(run: Run, torn: str) -> None:
    run.log("release", decision="REVIEW")
    with open(run.path / "log.jsonl", "a") as handle:
        handle.write(torn)
    run.log("release", decision="RELEASE")
    said = [entry.get("decision") for entry in run.logged("release")]
    assert [s for s in said if s] == ["REVIEW", "RELEASE"]
    assert run.count("evaluate") == 0


def test_a_place_that_cannot_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be made") as error:
        Run(tmp_path / "file/run")
    assert "Name another run folder" in str(error.value)


def test_a_run_of_somebody_else(run: Run) -> None:
    """What stands for a folder without permission, which root does not know."""
    (run.private / ".lock").mkdir()
    with pytest.raises(ResourceError, match="cannot be written") as error, run.lock():
        pass
    assert str(run.path) in str(error.value)
