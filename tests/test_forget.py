"""Forgetting: nothing of the person is left, nobody else is touched, and nothing brings them back.

Every test has a home of its own: the pseudonym key of the session, and a ledger that it may write.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make
import numpy as np
import pytest
from conftest import Finished, Result, in_process
from test_leaks import unpacked

from synthmed import configfile, origin
from synthmed.artifacts import Catalogue
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import InputError, UsageError
from synthmed.pipeline import Line, begin, keep_refusals
from synthmed.privacy.ledger import FILE, Ledger
from synthmed.store import Run

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished) -> Path:
    """The key under which `finished` was read, and its ledger, free to be changed."""
    shutil.copytree(os.environ["SYNTHMED_HOME"], tmp_path / "home")
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def ids(cohort: Path) -> dict[str, str]:
    """Pseudonym to the id that the table has."""
    lines = (cohort / "participants.tsv").read_text().splitlines()
    names = Pseudonyms.load()
    every = [line.split("\t")[0] for line in lines[1:]]
    return {names.patient(i.removeprefix("sub-")): i for i in every}


def side(run: Path, name: str) -> list[str]:
    """The pseudonyms of one side of the split."""
    index = json.loads((run / "private/prepare/dataset.json").read_text())
    return sorted({s["patient"] for s in index["scans"] if s["split"] == name})


def mentions(folder: Path, text: str) -> list[str]:
    """Files whose name or bytes hold a text, whatever they are packed in."""
    needle = text.lower().encode()
    return [
        str(p.relative_to(folder))
        for p in sorted(folder.rglob("*"))
        if needle in p.name.lower().encode()
        or (p.is_file() and needle in unpacked(p.read_bytes()).lower())
    ]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("log.jsonl", ".lock")
    }


def test_a_training_patient_is_taken_out(
    copied: Finished, cohort: Path, home: Path, synthmed: Cli
) -> None:
    run = copied.path
    person = side(run, "train")[0]
    who = ids(cohort)[person]
    assert len(mentions(run / "private", person)) > 3, "the search finds what is there"
    before = tree(run)
    ledger = (home / FILE).read_bytes()
    # other tests of this session may have trained on the same people
    n_open, n_paid = Ledger().without_protection([person]), len(Ledger().runs_of([person]))
    assert n_open >= 1
    result = synthmed("forget", who, "--in", run.parent, "--yes")
    assert result.code == 0, result.err
    assert mentions(run, person) == []
    for label in (who, who.removeprefix("sub-")):
        assert label not in result.out + result.err + (run / "log.jsonl").read_text()
        assert mentions(home, label) == []
    after = tree(run)
    # what is left of the others is what it was, the lists without the person's lines
    changed = {k for k in after if after[k] != before.get(k)}
    assert changed == {
        "manifest.json", "private/model/manifest.json",
        *(f"private/ingest/{n}" for n in ("catalogue.jsonl", "manifest.json", "receipt.json",
                                          "receipt.html")),
    }  # fmt: skip
    kept = [x for x in before["private/ingest/catalogue.jsonl"].splitlines(True)
            if person.encode() not in x]  # fmt: skip
    assert after["private/ingest/catalogue.jsonl"] == b"".join(kept)
    volumes = [k for k in before if k.startswith("private/ingest/volumes/")]
    assert {k for k in volumes if k not in after} == {k for k in volumes if person in k}
    assert {p.name for p in (run / "private").iterdir()} == {".lock", "ingest", "model"}
    # both artifacts are whole, and the model is marked
    assert Run(run).require("catalogue").manifest.facts["n_patients"] == 23
    model = Run(run).require("model").manifest
    assert model.facts["n_forgotten"] == 1 and len(model.facts["trained_on"]) == 17
    assert not (run / "private/model/examination").exists()
    named = json.loads((run / "release/report/report.json").read_text())["provenance"]["digests"]
    assert model.digest() == named["model"], "the release still says which model it came from"
    paid = f"kept in the ledger: {n_paid} private and {n_open} unprotected"
    for text in ("1 person found in 1 of 1 run", "trained on 1 of them", "release/: RELEASE of",
                 "recall", paid):  # fmt: skip
        assert text in result.out
    assert (home / FILE).read_bytes().startswith(ledger), "the ledger has only grown"
    assert Ledger().forgotten >= {person}
    assert Ledger().without_protection([person]) == n_open


def test_a_held_out_patient_leaves_the_model_unmarked(copied: Finished, synthmed: Cli) -> None:
    person = side(copied.path, "holdout")[0]
    result = synthmed("forget", person, "--in", copied.path, "--yes", "--json")
    assert result.code == 0, result.err
    (told,) = result.json()["runs"]
    assert told["n_trained_on"] == 0 and told["n_patients_left"] == 23
    assert told["releases"][0]["folder"] == "release"
    assert "n_forgotten" not in Run(copied.path).require("model").manifest.facts
    assert mentions(copied.path, person) == []


def test_whose_scans_were_all_refused_costs_the_others_nothing(
    copied: Finished, synthmed: Cli
) -> None:
    """Their rows go; what was made of the others still counts as made of them."""
    rows = (copied.path / "private/ingest/quarantine.tsv").read_text().splitlines()[1:]
    person = next(r.split("\t")[1] for r in rows if r.split("\t")[1])
    result = synthmed("forget", person, "--in", copied.path, "--yes")
    assert result.code == 0 and "none of their scans was used" in result.out
    assert mentions(copied.path, person) == []
    again = synthmed("generate", copied.config, "--run", copied.path, "--device", "cpu")
    assert again.code == 0 and again.err.count("(unchanged)") == 7


def test_they_do_not_come_back(
    copied: Finished, cohort: Path, tmp_path: Path, synthmed: Cli
) -> None:
    """A new ingest leaves them out, and finds of the others just what forgetting has left."""
    person, old, new = side(copied.path, "train")[3], copied.path, tmp_path / "new"
    assert synthmed("forget", ids(cohort)[person], "--in", old, "--yes").code == 0
    for run in (old, new):
        result = synthmed("generate", copied.config, "--run", run, "--device", "cpu")
        assert result.code == 0, result.err
        assert "26 scans of 23 patients" in result.err or "25 scans of 23" in result.err
        assert mentions(run, person) == []
    reasons = Run(new).require("catalogue").manifest.facts["reasons"]
    assert reasons["forgotten"] >= 1
    first, second = tree(old / "private"), tree(new / "private")
    same = ["ingest/catalogue.jsonl", "prepare/volumes.npy", "prepare/dataset.json",
            "model/weights.safetensors"]  # fmt: skip
    same += [k for k in second if k.startswith("ingest/volumes/")]
    assert len(same) > 25 and [k for k in same if first[k] != second[k]] == []


def test_the_next_one_is_known_to_have_trained_too(copied: Finished, synthmed: Cli) -> None:
    """The data set that says so is gone by then."""
    for n, person in enumerate(side(copied.path, "train")[:2], 1):
        assert synthmed("forget", person, "--in", copied.path, "--yes").code == 0
        assert Run(copied.path).require("model").manifest.facts["n_forgotten"] == n
        assert mentions(copied.path, person) == []


def test_a_model_that_bears_somebody_starts_no_other(
    copied: Finished, make_config: Callable[..., Path], synthmed: Cli
) -> None:
    config = configfile.load(make_config("heir", train__init=str(copied.path)))
    assert origin.find(config) is not None
    person = side(copied.path, "train")[0]
    assert synthmed("forget", person, "--in", copied.path, "--yes").code == 0
    with pytest.raises(UsageError, match="forgotten since"):
        origin.find(config)


def test_a_run_from_a_backup_is_refused_until_it_is_cleaned(
    copied: Finished, tmp_path: Path, synthmed: Cli
) -> None:
    person, backup = side(copied.path, "train")[0], tmp_path / "backup"
    shutil.copytree(copied.path, backup)
    assert synthmed("forget", person, "--in", copied.path, "--yes").code == 0
    result = synthmed("ingest", backup)
    assert result.code == 2 and "holds 1 of those who were forgotten" in result.err
    assert synthmed("forget", "--in", backup, "--yes").code == 0
    assert mentions(backup, person) == []
    assert synthmed("ingest", backup).code == 0


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], list[str]]]:
    """Let the k-th change of the disk not happen, and everything after it."""

    def from_here(at: int | None) -> list[str]:
        monkeypatch.undo()
        done: list[str] = []
        for name in ("rename", "rmdir", "fsync", "unlink"):
            real = getattr(os, name)

            def step(*args: Any, _real: Any = real, _name: str = name, **options: Any) -> Any:
                # a folder's files go one by one: the last one stands for all of them
                if _name != "unlink" or "dir_fd" not in options:
                    done.append(_name)
                    if at is not None and len(done) > at:
                        raise Killed
                return _real(*args, **options)

            monkeypatch.setattr(os, name, step)
        return done

    yield from_here
    monkeypatch.undo()


@pytest.mark.parametrize("which", ["train", "refused"])
def test_killed_at_any_step_it_ends_the_same(
    which: str,
    finished: Finished,
    tmp_path: Path,
    dying: Callable[[int | None], list[str]],
) -> None:
    rows = (finished.path / "private/ingest/quarantine.tsv").read_text().splitlines()[1:]
    refused = next(r.split("\t")[1] for r in rows if r.split("\t")[1])
    person = side(finished.path, "train")[0] if which == "train" else refused
    homes, run = Path(os.environ["SYNTHMED_HOME"]), tmp_path / "run"

    def call(name: str, at: int | None) -> list[str]:
        dying(None)
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished.path, run)
        home = tmp_path / name
        shutil.copytree(homes, home)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SYNTHMED_HOME", str(home))
            steps = dying(at)
            if at is None:
                assert in_process("forget", person, "--in", run, "--yes").code == 0
                return steps
            with pytest.raises(Killed):
                in_process("forget", person, "--in", run, "--yes")
            dying(None)
            assert in_process("forget", person, "--in", run, "--yes").code == 0
            assert Ledger().forgotten == {person}
        return steps

    n = len(call("whole", None))
    expected, folders = tree(run), {str(p.relative_to(run)) for p in run.rglob("*")}
    assert n > 15
    for at in range(0, n, 1 if which == "refused" else 3):
        call(f"home{at}", at)
        found = tree(run)
        assert {str(p.relative_to(run)) for p in run.rglob("*")} == folders, at
        assert [k for k in expected if expected[k] != found[k]] == [], at


def test_a_run_that_is_half_done_is_not_gone_on_with(copied: Finished, synthmed: Cli) -> None:
    """What was begun for rows alone is more once somebody else is taken out as well."""
    (copied.path / "private/.forgetting").write_text("rows")
    result = synthmed("generate", copied.config, "--run", copied.path, "--device", "cpu")
    assert result.code == 2 and "was cut off in it" in result.err
    person = side(copied.path, "train")[0]
    assert synthmed("forget", person, "--in", copied.path, "--yes").code == 0
    assert {p.name for p in (copied.path / "private").iterdir()} == {".lock", "ingest", "model"}


def test_a_run_in_use_stops_it_before_anything_is_removed(
    copied: Finished, tmp_path: Path, synthmed: Cli
) -> None:
    person, other = side(copied.path, "train")[0], tmp_path / "zz"
    shutil.copytree(copied.path, other)
    before = tree(copied.path)
    with Run(other).lock():
        result = synthmed("forget", person, "--in", copied.path, "--in", other, "--yes")
    assert result.code == 5 and "in use by another process" in result.err
    assert tree(copied.path) == before
    assert person in Ledger().forgotten, "from now on nobody takes them in"
    assert synthmed("forget", person, "--in", copied.path, "--in", other, "--yes").code == 0
    with Run(other).lock():  # it has nothing of them any more, so it may go on
        assert synthmed("forget", person, "--in", other, "--yes").code == 0


def test_nothing_is_done_unasked(copied: Finished, home: Path, synthmed: Cli) -> None:
    person = side(copied.path, "train")[0]
    before = tree(copied.path), tree(home)
    told = synthmed("forget", person, "--in", copied.path, "--dry-run")
    assert told.code == 0 and "would remove: " in told.out and "would be on the list" in told.out
    result = synthmed("forget", person, "--in", copied.path)
    assert result.code == 2 and "--yes" in result.err
    assert (tree(copied.path), tree(home)) == before


def test_an_id_from_stdin(
    copied: Finished, cohort: Path, synthmed: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    two = side(copied.path, "train")[:2]
    lines = "\n".join(f" {ids(cohort)[p]} " for p in two) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    result = synthmed("forget", "-", "--in", copied.path, "--yes", "--json")
    assert result.code == 0, result.err
    assert result.json()["n_found"] == result.json()["n_asked"] == 2
    for person in two:
        assert mentions(copied.path, person) == []
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    assert synthmed("forget", "-", "--in", copied.path, "--yes").code == 2


def test_a_misspelt_id_is_said_loudly(copied: Finished, synthmed: Cli) -> None:
    before = tree(copied.path)
    result = synthmed("forget", "Nosuchperson", "--in", copied.path, "--yes")
    assert result.code == 3 and "1 of 1 were found nowhere" in result.err
    assert "Nosuchperson" not in result.out + result.err
    assert tree(copied.path) == before
    assert Pseudonyms.load().patient("Nosuchperson") in Ledger().forgotten


def test_wrong_folders_are_refused(
    copied: Finished, tmp_path: Path, home: Path, synthmed: Cli
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/run").symlink_to(copied.path)
    moved = tmp_path / "moved"
    shutil.copytree(copied.path, moved)
    (moved / "private/ingest").rename(tmp_path / "elsewhere")
    (moved / "private/ingest").symlink_to(tmp_path / "elsewhere")
    person = side(copied.path, "train")[0]
    before = tree(copied.path), tree(home)
    for name, said in {"none": "no such folder", "empty": "no run", "linked": "a link in it",
                       "linked/run": "or a link", "moved": "lie elsewhere"}.items():  # fmt: skip
        result = synthmed("forget", person, "--in", tmp_path / name, "--dry-run")
        assert result.code == 2 and said in result.err, (name, result)
    assert (tree(copied.path), tree(home)) == before


def test_what_was_withheld_for_naming_them_goes_too(copied: Finished, synthmed: Cli) -> None:
    person, withheld = side(copied.path, "train")[0], copied.path / "withheld"
    (copied.path / "release").rename(withheld)
    (withheld / "README.md").write_text(f"made of {person}")
    result = synthmed("forget", person, "--in", copied.path, "--yes")
    assert result.code == 0 and "made with them, goes" in result.out
    assert not withheld.exists()


# --- clean DICOM --------------------------------------------------------------------------------


def test_clean_dicom_is_taken_away_and_not_written_again(
    tmp_path: Path, phantoms: Any, synthmed: Cli
) -> None:
    source, target = tmp_path / "source", tmp_path / "out/clean"
    phantoms.make_cohort(source, phantoms.Spec("dicom", patients=2, grid=32, seed=3, broken=0))
    target.parent.mkdir()
    assert synthmed("deidentify", source, target, "-q").code == 0
    first, second = sorted(p.name for p in target.iterdir() if p.is_dir())
    other = tree(target / second)
    result = synthmed("forget", first, "--in", target.parent, "--yes")
    assert result.code == 0 and "removed: 1 folder" in result.out
    assert mentions(target.parent, first) == [] and tree(target / second) == other
    again = synthmed("deidentify", source, target, "-q", "--json")
    assert again.code == 0 and again.json()["refused"] == {"forgotten": 32}
    assert mentions(target.parent, first) == [] and tree(target / second) == other


def test_originals_that_a_pacs_gave_go_whoever_they_are_of(copied: Finished, synthmed: Cli) -> None:
    """Their names are digests, so that nobody knows: a fetch that never ended keeps them there."""
    held = copied.path / "private/fetched/ab12/cd34.dcm"
    held.parent.mkdir(parents=True)
    held.write_bytes(b"Doe^Jo")
    shutil.rmtree(copied.path / "private/ingest")
    result = synthmed("forget", "p0123456789abcdef", "--in", copied.path, "--yes")
    assert not held.parent.parent.exists()
    assert "private/fetched" in result.out


def test_who_is_known_for_a_damaged_series_alone(
    copied: Finished, tmp_path: Path, synthmed: Cli
) -> None:
    source = tmp_path / "dicom"
    for k in range(2):
        make.series(source / f"Smith{k}", make.voxels(k), np.diag([2.0, 2, 2, 1]))
    (source / "Smith1/IM9999").write_bytes(b"")
    run = Run(tmp_path / "runs/a")
    config = make.config(source)
    with run.lock():
        begin(run, config, overwrite=False)
        with pytest.raises(InputError):
            Line(run, config, "cpu", quiet=True).artifact("ingest")
        keep_refusals(run)
    listed = next(run.private.rglob("quarantine.tsv"))
    assert listed.read_text().count("missing_slices") == 9
    assert synthmed("forget", "ID-Smith1", "--in", run.path, "--yes").code == 0
    assert "missing_slices" not in listed.read_text()


# --- differential privacy -----------------------------------------------------------------------


def test_what_was_paid_stays_paid(
    make_config: Callable[..., Path], tmp_path: Path, home: Path, synthmed: Cli
) -> None:
    promise = {"epsilon": 6, "sample_rate": 0.5, "patients": 18, "clip": 0.1}
    net = {"name": "cvae", "latent": 2, "widths": [4, 4], "prior": "standard"}
    config = make_config(
        "paid", privacy=promise, backbone=net, data__view="grid", data__patient="participant_id"
    )
    run = tmp_path / "run"
    for stage in ("ingest", "prepare", "train"):
        assert synthmed(stage, run, "--config", config, "-q").code == 0
    person = side(run, "train")[0]
    paid = [(a.run, len(a.charges)) for a in Ledger().runs_of([person])]
    assert len(paid) == 1 and paid[0][1] == 5
    ledger = (home / FILE).read_bytes()
    result = synthmed("forget", person, "--in", run, "--yes")
    assert result.code == 0, result.err
    assert "kept in the ledger: 1 private and" in result.out
    assert "--overwrite, which charges the others again" in result.out
    assert (home / FILE).read_bytes().startswith(ledger)
    now = Ledger()  # reads the chain, and would refuse an altered one
    assert [(a.run, len(a.charges)) for a in now.runs_of([person])] == paid
    assert now.n_lines == ledger.count(b"\n") + 1
    # nobody is charged again unless somebody says so, and the model is still there
    result = synthmed("train", run, "-q")
    assert result.code == 2, result
    again = synthmed("generate", config, "--run", run, "--device", "cpu", "-q")
    assert again.code == 2 and "patients have paid for it" in again.err
    assert Run(run).require("model").manifest.facts["n_forgotten"] == 1
    assert [(a.run, len(a.charges)) for a in Ledger().runs_of([person])] == paid


def test_the_catalogue_of_too_few_is_refused(copied: Finished, synthmed: Cli) -> None:
    everybody = sorted({s.patient for s in Catalogue.open(copied.path / "private/ingest").scans})
    for person in everybody[:-9]:
        Ledger().forget([person])
    result = synthmed("forget", "--in", copied.path, "--yes")
    assert result.code == 0 and "9 patients are left, too few" in result.out
    result = synthmed("ingest", copied.path)
    assert result.code == 3 and "9 of at least 10 patients" in result.err
