"""Several processes that take private steps together, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from synthmed import ranks
from tests.proofs import prove


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> prove.Case:
    """A private run that was stopped at its first steps, with its ledger."""
    folder = tmp_path_factory.mktemp("ranks") / "begun"
    return prove.begun_privately(folder, steps=12)


def together(case: prove.Case, n: int, *words: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    call += ["--standalone", "-m", "synthmed.cli", *words, "--device", "cpu", "--quiet"]
    return subprocess.Popen(
        call,
        # one thread each, as torchrun sets it: a sum over threads has an order of its own
        env={**case.environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained(case: prove.Case, n: int) -> str:
    process = together(case, n, "train", str(case.folder / "run"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out + err


def test_alone_there_is_nobody_to_tell() -> None:
    assert (ranks.rank(), ranks.world(), ranks.launched()) == (0, 1, False)
    ranks.tell({"what": "ever"})
    assert ranks.gathered("part") == ["part"]


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_end_in_the_weights_and_the_ledger_of_one(
    begun: prove.Case, n: int, tmp_path: Path
) -> None:
    """The same clipped sums bit for bit: else weights and the ledger's digests would differ."""
    one, several = (prove.copied(begun, tmp_path / name) for name in ("one", "several"))
    subprocess.run(
        [sys.executable, "-m", "synthmed.cli", "train", str(one.folder / "run"), "--quiet"],
        env={**one.environment, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    trained(several, n)
    assert prove.unlike(one, several) == []
    assert prove.leftovers(several.folder / "run") == []


@pytest.mark.slow
def test_a_signal_ends_all_of_them_and_the_same_command_goes_on(
    begun: prove.Case, tmp_path: Path
) -> None:
    one, stopped = (prove.copied(begun, tmp_path / name) for name in ("one", "stopped"))
    ledger = stopped.folder / "home/ledger.jsonl"
    before = ledger.stat().st_size
    process = together(stopped, 2, "train", str(stopped.folder / "run"))
    while process.poll() is None and ledger.stat().st_size == before:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    trained(stopped, 2)
    trained(one, 2)
    assert prove.unlike(one, stopped) == []


def test_without_a_promise_one_process_is_enough(
    begun: prove.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = prove.copied(begun, tmp_path / "plain")
    monkeypatch.chdir(tmp_path)  # its run lies there: torchrun takes --run for an option of its own
    process = together(case, 2, "generate", str(case.config), "--set", "privacy=null")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "torchrun: 2 processes share the patients of private steps alone" in err
    assert os.environ.get("WORLD_SIZE") is None
