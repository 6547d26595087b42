"""The Snakemake workflow: the bytes of `generate`, from any folder, for files and shipped names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished, environment

from synthmed.pipeline import STAGES
from tests.proofs.prove import WORKFLOW, workflow

pytest.importorskip("snakemake", reason="the extra `cluster` is not installed")


def dry_run(folder: Path, config: str, run: str) -> str:
    """What Snakemake would do, on a PATH without the environment's own folder."""
    path = os.pathsep.join(
        p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "synthmed").exists()
    )
    env = environment({"PATH": path, "XDG_CACHE_HOME": str(folder / "cache")})
    return workflow(folder, config, run, 1, env, "--dry-run", "--printshellcmds")


def test_it_makes_the_bytes_of_generate(
    finished: Finished, tmp_path: Path, bytes_of: Callable[..., dict[str, bytes]]
) -> None:
    """Called elsewhere than in the checkout, with relative paths, one of which has a space."""
    shutil.copy(finished.config, tmp_path / "tiny.yaml")
    env = environment({"XDG_CACHE_HOME": str(tmp_path / "cache")})
    workflow(tmp_path, "tiny.yaml", "my runs/tiny", 1, env)
    made = tmp_path / "my runs/tiny"
    first, second = bytes_of(finished.path), bytes_of(made)
    assert sorted(first) == sorted(second)
    assert [k for k in first if first[k] != second[k]] == []
    assert (made / "config.yaml").read_bytes() == (finished.path / "config.yaml").read_bytes()


def test_a_shipped_config_and_the_command_beside_this_python(tmp_path: Path) -> None:
    """Neither an activated environment nor a file is needed, and the stages go in order."""
    said = dry_run(tmp_path, "quickstart", "runs/q")
    command = re.escape(str(Path(sys.executable).with_name("synthmed")))
    calls = re.findall(rf"{command} (\w+) runs/q(.*)", said)
    assert [stage for stage, _ in calls] == list(STAGES)
    assert calls[0][1].split() == ["--config", "quickstart"]
    assert not (tmp_path / "runs").exists()


def test_a_config_edited_later_sets_the_stages_off_again(copied: Finished, tmp_path: Path) -> None:
    """What still fits is then left alone by the stages themselves."""
    shutil.copy(copied.config, tmp_path / "tiny.yaml")
    before = min(p.stat().st_mtime for p in copied.path.rglob("*.json"))
    os.utime(tmp_path / "tiny.yaml", (before - 10, before - 10))
    # the order in which copytree wrote the manifests is not the order of the stages
    names = [f"{s}/manifest.json" for s in ("ingest", "prepare", "model", "sample", "screen")]
    names += ["evaluate/manifest.json", "report/report.json"]
    for i, name in enumerate(names):
        os.utime(copied.path / "private" / name, (before + i, before + i))
    assert "Nothing to be done" in dry_run(tmp_path, "tiny.yaml", "run")
    (tmp_path / "tiny.yaml").touch()
    said = dry_run(tmp_path, "tiny.yaml", "run")
    assert all(re.search(rf"^rule {stage}:|^localrule {stage}:", said, re.M) for stage in STAGES)


def test_without_a_config_it_says_what_to_add(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", str(WORKFLOW), "--cores", "1", "--dry-run"],
        cwd=tmp_path,
        env=environment({"XDG_CACHE_HOME": str(tmp_path / "cache")}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "--config config=FILE" in done.stdout + done.stderr
