"""Purging: no voxel and no weight of a run is left, what left it stays, and nothing else is hit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Result

from synthmed.store import Run

Cli = Callable[..., Result]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_no_voxel_is_left(copied: Finished, synthmed: Cli) -> None:
    run = copied.path
    # what a killed stage leaves beside the artifacts
    for name in ("model.partial", ".ingest.new", ".removed-prepare"):
        (run / "private" / name).mkdir()
        (run / "private" / name / "volume.npy").write_bytes(b"voxels")
    before, ledger = tree(run), (Path(os.environ["SYNTHMED_HOME"]) / "ledger.jsonl").read_bytes()
    result = synthmed("purge", run, "--yes")
    assert result.code == 0, result.err
    assert "private/ingest" in result.out and "not overwritten" in result.out
    after = tree(run)
    assert {p.name for p in (run / "private").iterdir()} == {".lock"}
    assert (run / "private/.lock").read_bytes() == b""
    kept = {k for k in before if k.startswith("release/")} | {"config.yaml", "manifest.json"}
    assert len(kept) > 40 and kept | {"log.jsonl", "private/.lock"} == set(after)
    assert [k for k in kept if after[k] != before[k]] == []
    assert after["log.jsonl"].startswith(before["log.jsonl"])
    assert b'"event": "purged"' in after["log.jsonl"]
    assert (Path(os.environ["SYNTHMED_HOME"]) / "ledger.jsonl").read_bytes() == ledger
    assert "nothing private is in it" in synthmed("purge", run, "--yes").out
    assert synthmed("purge", run, "--all", "--yes").code == 0
    assert set(tree(run)) == {"config.yaml", "manifest.json", "log.jsonl", "private/.lock"}


def test_withheld_goes(copied: Finished, synthmed: Cli) -> None:
    """It never passed the policy: it may hold copies of patients."""
    (copied.path / "release").rename(copied.path / "withheld")
    result = synthmed("purge", copied.path, "--yes", "--json")
    assert result.code == 0 and "withheld" in result.json()["removed"]
    assert not (copied.path / "withheld").exists()


def test_nothing_is_removed_unasked(copied: Finished, synthmed: Cli) -> None:
    before = tree(copied.path)
    told = synthmed("purge", copied.path, "--dry-run")
    assert told.code == 0 and "would remove private/evaluate" in told.out
    result = synthmed("purge", copied.path)
    assert result.code == 2 and "--yes" in result.err
    assert tree(copied.path) == before


def test_wrong_folders_are_refused(
    copied: Finished, cohort: Path, tmp_path: Path, synthmed: Cli
) -> None:
    (tmp_path / "linked").symlink_to(copied.path)
    moved = tmp_path / "moved"
    shutil.copytree(copied.path, moved)
    (moved / "private/ingest").rename(tmp_path / "elsewhere")
    (moved / "private/ingest").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    for place in (cohort, copied.path / "private", copied.path / "release", tmp_path,
                  tmp_path / "linked", moved, tmp_path / "none"):  # fmt: skip
        result = synthmed("purge", place, "--yes")
        assert result.code == 2, place
        assert result.out == "" and len(result.err.strip().splitlines()) <= 2
    with Run(copied.path).lock():
        assert synthmed("purge", copied.path, "--yes").code == 5
    assert tree(tmp_path) == before


class Killed(BaseException):
    """What nothing catches."""


def test_killed_it_goes_on(
    copied: Finished, synthmed: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any folder, and in the middle of one."""
    for at in range(1, 12, 2):
        calls = 0

        def rmdir(*args: Any, _real: Any = os.rmdir, _at: int = at, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == _at:
                raise Killed
            _real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rmdir", rmdir)
            try:
                synthmed("purge", copied.path, "--yes")
            except Killed:
                left = {p.name for p in (copied.path / "private").iterdir()} - {".lock"}
                assert left, "it was stopped half-way"
    assert synthmed("purge", copied.path, "--yes").code == 0
    assert {p.name for p in (copied.path / "private").iterdir()} == {".lock"}
    assert synthmed("ingest", copied.path, "-q").code == 0, "the run can be made anew"
