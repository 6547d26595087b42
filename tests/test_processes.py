"""Work spread over processes: the order stays, a crash costs one item, and nothing is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthmed.errors import ResourceError
from synthmed.processes import Died, spread


def late(number: int) -> tuple[int, int]:
    """Later items are done first."""
    time.sleep(0.02 * (5 - number % 5))
    return number, os.getpid()


def deadly(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number


def failing(number: int) -> int:
    if number == 3:
        raise ResourceError("no disk", "Free some.")
    return number


def test_results_come_in_the_order_of_the_items() -> None:
    results = list(spread(late, range(20), 3))
    assert all(not isinstance(r, Died) for r in results)
    numbers, processes = zip(*results, strict=True)  # type: ignore[misc]
    assert list(numbers) == list(range(20))
    assert os.getpid() not in processes and len(set(processes)) > 1
    alone = list(spread(late, range(3), 1))
    assert alone == [(k, os.getpid()) for k in range(3)]


def test_a_crash_costs_the_item_that_caused_it() -> None:
    results = list(spread(deadly, range(12), 2))
    assert isinstance(results[7], Died)
    assert [r for r in results if not isinstance(r, Died)] == [k for k in range(12) if k != 7]


def test_an_error_reaches_the_caller_whole() -> None:
    results = spread(failing, range(50), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ResourceError, match="no disk") as error:
        next(results)
    assert error.value.remedy == "Free some."


def test_a_script_that_is_not_guarded_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text("from synthmed.processes import spread\nprint(list(spread(len, ['a'], 2)))\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode and "Died" not in done.stdout
    assert "processes that read cannot be started" in done.stderr


def test_no_process_outlives_the_program(tmp_path: Path) -> None:
    """Killed without a chance to say so, as by a cluster that is out of memory."""
    script = tmp_path / "spreading.py"
    script.write_text(
        "import os, time\n"
        "from synthmed.processes import spread\n"
        "def waits(folder):\n"
        "    open(os.path.join(folder, str(os.getpid())), 'w').close()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        f"    list(spread(waits, [{str(tmp_path / 'pids')!r}] * 2, 2))\n"
    )
    (tmp_path / "pids").mkdir()
    program = subprocess.Popen([sys.executable, str(script)])
    try:
        workers = waited(lambda: list((tmp_path / "pids").iterdir()), 2)
    finally:
        program.kill()
        program.wait()
    pids = [int(w.name) for w in workers]
    waited(lambda: [pid for pid in pids if not alive(pid)], 2)


def waited(found: Callable[[], list[Any]], n: int) -> list[Any]:
    """What `found` returns once it is `n` long."""
    for _ in range(600):
        if len(seen := found()) == n:
            return seen
        time.sleep(0.1)
    raise AssertionError(f"{len(seen)} of {n}")


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not asked for yet does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
