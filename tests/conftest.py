"""One cohort of phantoms and one finished tiny run for the whole session, and the command line.

`finished` is read by many tests and changed by none: a test that goes on from it takes a copy.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from synthmed import cli

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "sample_data"))

TINY: dict[str, Any] = {
    "data": {
        "source": "set by the fixture",
        "modality": "T1w",
        "conditions": {
            "diagnosis": {"kind": "categorical", "categories": ["control", "atrophy"]},
            "sex": {"kind": "categorical", "categories": ["F", "M"]},
            "age": {"kind": "continuous", "low": 40, "high": 100, "unit": "years"},
        },
        "grid": [16, 16, 16],
        "spacing_mm": [12, 12, 12],
        "holdout": 0.25,
    },
    "backbone": {"name": "cvae", "latent": 4, "widths": [4, 8]},
    "privacy": None,
    "train": {"max_steps": 5, "batch_patients": 4, "augment": {"shift_voxels": 1}},
    "sample": {"count": 18},
    "screen": {"max_dropped": 0.3},  # which eleven samples are enough to be sure of
    "evaluate": {"resamples": 100},
    # a line that this cohort passes whatever the five steps have learnt
    "policy": {"rules": [{"estimate": "copies_shipped", "at_most": 1000}]},
}
"""A whole run in a few seconds. Its policy releases; a test of the others changes the rules."""

REVIEW = [{"estimate": "not_measured", "at_most": 0}]
WITHHELD = [{"estimate": "authenticity", "at_least": 2}]


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Finished:
    """A run that went through the whole line."""

    path: Path
    config: Path
    result: Result


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test touches the user's pseudonym key, and all count threads alike."""
    threads, before = torch.get_num_threads(), os.environ.get("SYNTHMED_HOME")
    torch.set_num_threads(1)
    os.environ["SYNTHMED_HOME"] = str(tmp_path_factory.mktemp("home"))
    yield
    torch.set_num_threads(threads)
    os.environ.pop("SYNTHMED_HOME")
    if before is not None:
        os.environ["SYNTHMED_HOME"] = before


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """A run sets its process's umask; the next test starts from the usual one."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def phantoms() -> Any:
    """The generator of sample_data."""
    return importlib.import_module("phantoms")


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory, phantoms: Any) -> Path:
    """24 phantom patients in BIDS, 27 scans, two of them broken; not to be changed."""
    folder = tmp_path_factory.mktemp("source") / "bids"
    phantoms.make_cohort(folder, phantoms.Spec("bids", patients=24, grid=32, seed=7, broken=2))
    return folder


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Callable[..., Path]:
    """Write the tiny config, changed by `section__key=value`, and return its path."""
    folder = tmp_path_factory.mktemp("configs")

    def make(name: str = "tiny", /, **changes: Any) -> Path:
        tree = json.loads(json.dumps(TINY))
        tree["data"]["source"] = str(cohort)
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        return file

    return make


def in_process(*args: str | Path) -> Result:
    """The command line as a user calls it, without the seconds that imports take."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(a) for a in args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.guarded(lambda: cli.command(words))
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def synthmed() -> Callable[..., Result]:
    """Call the command line in this process."""
    return in_process


def environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """What a process of its own sees."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def command(*args: str | Path) -> list[str]:
    """The words that start the command line in a process of its own."""
    return [sys.executable, "-m", "synthmed.cli", *map(str, args)]


@pytest.fixture(scope="session")
def spawn() -> Callable[..., Result]:
    """Call the command line in a process of its own, with the usual umask."""

    def call(*args: str | Path, env: Mapping[str, str] = {}, **options: Any) -> Result:
        done = subprocess.run(
            command(*args),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env=environment(env),
            umask=0o022,
            check=False,
            **options,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., Path],
    spawn: Callable[..., Result],
) -> Finished:
    """A run released by its policy, made by a process of its own; not to be changed."""
    path, config = tmp_path_factory.mktemp("run") / "tiny", make_config()
    return Finished(path, config, spawn("generate", config, "--run", path, "--device", "cpu"))


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """A copy of the finished run, free to be changed."""
    shutil.copytree(finished.path, tmp_path / "run", symlinks=True)
    return Finished(tmp_path / "run", finished.config, finished.result)


STAGES = ("ingest", "prepare", "model", "sample", "screen", "evaluate", "report")


def contents(run: Path, folders: tuple[str, ...] = STAGES) -> dict[str, bytes]:
    """Every byte that a run made: artifacts, reports and what leaves, by path."""
    places = [run / "private" / f for f in folders] + [run / n for n in ("release", "withheld")]
    return {
        str(p.relative_to(run)): p.read_bytes()
        for place in places
        for p in sorted(place.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="session")
def bytes_of() -> Callable[..., dict[str, bytes]]:
    """Every byte that a run made, by path."""
    return contents
