"""The line from end to end: decision, skipping, determinism, and runs that were stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import STAGES, Finished, Result, command, environment

from synthmed import configfile
from synthmed.pipeline import DEPENDS, stale_stages
from synthmed.store import Run


def test_the_line_ends_in_a_decision_and_one_folder(finished: Finished) -> None:
    result = finished.result
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "RELEASE"
    assert (finished.path / "release").is_dir()
    assert not (finished.path / "withheld").exists()
    assert (finished.path / "private/report/report.html").is_file()
    report = json.loads((finished.path / "private/report/report.json").read_text())
    assert report["decision"] == "RELEASE"
    cohort = report["cohort"]
    assert (cohort["n_patients"], cohort["n_train"], cohort["n_holdout"]) == (24, 18, 6)
    assert cohort["n_synthetic"] == 18
    assert len(list((finished.path / "release").rglob("*_T1w.nii.gz"))) == 18


def test_nothing_is_left_of_the_work(finished: Finished) -> None:
    """Neither a temporary folder nor a checkpoint outlives a run that ended."""
    names = {p.name for p in (finished.path / "private").iterdir()}
    assert names == {".lock", *STAGES}
    assert {p.name for p in finished.path.iterdir()} == {
        "config.yaml", "manifest.json", "log.jsonl", "private", "release",
    }  # fmt: skip


def test_everything_is_for_its_owner_alone(finished: Finished) -> None:
    """The process began with umask 022, so the modes are the program's doing."""
    wrong = {
        str(p): oct(mode)
        for p in [finished.path, *finished.path.rglob("*")]
        if (mode := stat.S_IMODE(p.stat().st_mode)) != (0o700 if p.is_dir() else 0o600)
    }
    assert not wrong
    home = Path(os.environ["SYNTHMED_HOME"])
    assert stat.S_IMODE((home / "pseudonym.key").stat().st_mode) == 0o600


def test_a_second_call_touches_no_artifact(
    copied: Finished, synthmed: Callable[..., Result]
) -> None:
    def seen() -> dict[str, tuple[int, int, bytes]]:
        files = [p for p in copied.path.rglob("*") if p.is_file()]
        kept = [p for p in files if p.name not in ("log.jsonl", "config.yaml", ".lock")]
        return {
            str(p): (p.stat().st_mtime_ns, p.stat().st_ino, p.read_bytes()) for p in sorted(kept)
        }

    before = seen()
    result = synthmed("generate", copied.config, "--run", copied.path, "--device", "cpu")
    assert result.code == 0, result.err
    assert seen() == before
    assert result.err.count("(unchanged)") == 7


def test_two_folders_have_the_same_bytes(
    finished: Finished,
    tmp_path: Path,
    synthmed: Callable[..., Result],
    bytes_of: Callable[..., dict[str, bytes]],
) -> None:
    """Another folder, another process, this one warm: every artifact is the same."""
    place = tmp_path / "another/name"
    result = synthmed("generate", finished.config, "--run", place, "--device", "cpu", "-q")
    assert result.code == 0, result.err
    assert result.err == ""
    first, second = bytes_of(finished.path), bytes_of(place)
    assert sorted(first) == sorted(second)
    assert [k for k in first if first[k] != second[k]] == []
    assert len(first) > 100


def test_another_seed_is_another_cohort(
    finished: Finished,
    tmp_path: Path,
    synthmed: Callable[..., Result],
    bytes_of: Callable[..., dict[str, bytes]],
) -> None:
    """The control of the test above: something does depend on the seed."""
    run = tmp_path / "run"
    for stage in ("ingest", "prepare", "train"):
        result = synthmed(stage, run, "--config", finished.config, "--set", "seed=1", "-q")
        assert result.code == 0, result.err
    first, second = (bytes_of(r, ("ingest", "prepare", "model")) for r in (finished.path, run))
    ingest = [k for k in first if k.startswith("private/ingest")]
    assert [k for k in ingest if first[k] != second[k]] == []
    assert first["private/prepare/dataset.json"] != second["private/prepare/dataset.json"]
    assert first["private/model/weights.safetensors"] != second["private/model/weights.safetensors"]


def test_label_counts_are_respected(copied: Finished, synthmed: Callable[..., Result]) -> None:
    result = synthmed(
        "generate", copied.config, "--run", copied.path, "--device", "cpu", "--count", "20",
        "--label", "diagnosis=atrophy:17", "--label", "diagnosis=control:3",
    )  # fmt: skip
    assert result.code == 0, result.err
    table = (copied.path / "release/participants.tsv").read_text().splitlines()
    at = table[0].split("\t").index("diagnosis")
    asked = [row.split("\t")[at] for row in table[1:]]
    assert (asked.count("atrophy"), asked.count("control")) == (17, 3)
    # what was not asked for is drawn: both sexes are there
    sex = table[0].split("\t").index("sex")
    assert {row.split("\t")[sex] for row in table[1:]} == {"F", "M"}


def test_an_empty_holdout_is_told_not_fatal(
    make_config: Callable[..., Path], tmp_path: Path, synthmed: Callable[..., Result]
) -> None:
    """A share so small that nobody is held out: copies are judged, the rest says why it cannot."""
    config = make_config("nobody", data__holdout=0.01)
    result = synthmed("generate", config, "--run", tmp_path / "run", "--device", "cpu", "-q")
    assert result.code in (0, 4), result.err
    report = json.loads((tmp_path / "run/private/report/report.json").read_text())
    assert report["cohort"]["n_holdout"] == 0
    missing = [e for e in report["estimates"] if e["value"] is None]
    assert missing
    assert all(e["note"] for e in missing)


def test_the_source_may_be_gone_once_it_was_read(
    make_config: Callable[..., Path],
    cohort: Path,
    tmp_path: Path,
    synthmed: Callable[..., Result],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(cohort, source)
    config = make_config("gone", data__source=str(source))
    assert synthmed("ingest", tmp_path / "run", "--config", config, "-q").code == 0
    shutil.rmtree(source)
    result = synthmed("ingest", tmp_path / "run")
    assert result.code == 0, result.err
    assert "(unchanged)" in result.err


def test_a_changed_source_is_read_again_only_when_told(
    make_config: Callable[..., Path],
    cohort: Path,
    tmp_path: Path,
    synthmed: Callable[..., Result],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(cohort, source)
    config = make_config("grown", data__source=str(source))
    run = tmp_path / "run"
    for stage in ("ingest", "prepare"):
        assert synthmed(stage, run, "--config", config, "-q").code == 0
    person = sorted(p for p in source.glob("sub-*") if p.is_dir())[0]
    shutil.rmtree(person)
    before = (run / "private/ingest/manifest.json").read_bytes()
    result = synthmed("ingest", run)
    assert result.code == 2
    assert "data.source has changed" in result.err
    assert (run / "private/ingest/manifest.json").read_bytes() == before
    result = synthmed("ingest", run, "--overwrite")
    assert result.code == 0, result.err
    assert "made anew" in result.err
    assert not (run / "private/prepare").exists(), "made of a source that is no more"


CHANGES: dict[str, tuple[str, Any]] = {
    "ingest": ("data.conditions.age.high", 99),
    "prepare": ("data.holdout", 0.3),
    "train": ("train.max_steps", 6),
    "sample": ("sample.count", 19),
    "screen": ("screen.false_discovery_rate", 0.02),
    "evaluate": ("evaluate.resamples", 101),
    "release": ("export.name", "Another"),
}


@pytest.mark.parametrize("stage", DEPENDS)
def test_each_part_of_the_config_has_its_stage(stage: str, finished: Finished) -> None:
    """What changed, and everything that is made of it, is stale; what comes before is not."""
    key, value = CHANGES[stage]
    new = configfile.load(finished.config, (), {key: value})
    stale = stale_stages(Run(finished.path), configfile.load(finished.config), new)
    assert stale == list(DEPENDS)[list(DEPENDS).index(stage) :]


def test_every_field_of_the_config_belongs_to_a_stage(finished: Finished) -> None:
    """A field that no stage depends on would be changed without anything being made anew."""
    config = configfile.load(finished.config)
    covered = set()
    for part in DEPENDS.values():
        covered |= set(part(config))
    flat = set(type(config.data).model_fields) | (set(type(config).model_fields) - {"data"})
    # privacy counts twice: as itself for train, as a yes or no for prepare
    assert flat - covered == set()


# --- stopped runs -------------------------------------------------------------------------------


def start(*args: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), umask=0o022, start_new_session=True,
    )  # fmt: skip


LONG = {"train__max_steps": 100, "train__checkpoint_minutes": 0.002}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., Path],
    synthmed: Callable[..., Result],
) -> Finished:
    """A run long enough to be stopped in, and its config."""
    config = make_config("long", **LONG)
    path = tmp_path_factory.mktemp("long") / "run"
    result = synthmed("generate", config, "--run", path, "--device", "cpu", "-q")
    assert result.code == 0, result.err
    return Finished(path, config, result)


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 60
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.005)


def n_logged(run: Path) -> int:
    log = run / "private/model.partial/training.jsonl"
    return len(log.read_bytes().splitlines()) if log.exists() else 0


def test_a_stopped_training_goes_on_to_the_same_weights(
    uninterrupted: Finished,
    tmp_path: Path,
    synthmed: Callable[..., Result],
    bytes_of: Callable[..., dict[str, bytes]],
) -> None:
    run = tmp_path / "run"
    for stage in ("ingest", "prepare"):
        assert synthmed(stage, run, "--config", uninterrupted.config, "-q").code == 0
    process = start("train", run, "--device", "cpu")
    wait_for(lambda: n_logged(run) > 10, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    last = err.strip().splitlines()[-2:]
    assert "stopped at step" in last[0]
    assert "Traceback" not in err
    assert not (run / "private/model").exists()
    done = n_logged(run)
    assert 10 < done < 100

    result = synthmed("generate", uninterrupted.config, "--run", run, "--device", "cpu", "-q")
    assert result.code == 0, result.err
    log = (run / "private/model/training.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in log] == list(range(100))
    first, second = bytes_of(uninterrupted.path), bytes_of(run)
    assert [k for k in first if first[k] != second.get(k)] == []


def test_killed_at_any_time_it_ends_in_the_same_bytes(
    uninterrupted: Finished,
    tmp_path: Path,
    bytes_of: Callable[..., dict[str, bytes]],
    synthmed: Callable[..., Result],
) -> None:
    """kill -9 in ingest, in training and in what follows; then the same command."""
    run = tmp_path / "run"
    args = ("generate", uninterrupted.config, "--run", run, "--device", "cpu")
    rng = random.Random(5)
    private = run / "private"
    reached: tuple[Callable[[], bool], ...] = (
        (private / ".ingest.new").exists,
        lambda: n_logged(run) > 20,
        (private / "sample.partial").exists,
    )
    for found in reached:
        process = start(*args)
        wait_for(found, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=60)
    result = synthmed(*args, "-q")
    assert result.code == 0, result.err
    first, second = bytes_of(uninterrupted.path), bytes_of(run)
    assert sorted(first) == sorted(second)
    assert [k for k in first if first[k] != second[k]] == []
    assert {p.name for p in private.iterdir()} == {".lock", *STAGES}
