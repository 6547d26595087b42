"""What a command raises becomes the contract's exit code and a line or two."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from synthmed.exits import guarded, speakable


def no_array() -> None:
    raise MemoryError


def no_tensor() -> None:
    torch.empty(2**50)


def defect() -> None:
    raise RuntimeError("Mustermann, Erika")


@pytest.mark.parametrize(
    ("call", "code", "line"),
    [
        (no_array, 5, "error: out of memory"),
        (no_tensor, 5, "error: out of memory"),
        (defect, 1, "internal error: RuntimeError at test_exits.py"),
    ],
)
def test_code_and_line(
    call: Callable[[], Any], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(call) == code
    said = capsys.readouterr().err
    assert said.startswith(line) and "Mustermann" not in said and "Traceback" not in said


@pytest.mark.parametrize("after", ["| head -c 0", ">&-", "2>&- | cat"])
def test_streams_that_are_closed(after: str) -> None:
    """The reader has what it wanted, or nobody reads."""
    call = f"set -o pipefail; {sys.executable} -m synthmed.cli list metrics {after}"
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert done.stderr == ""


def test_letters_that_a_stream_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    speakable()
    print("\N{EN DASH} \xfc")
    print("unheard", file=sys.stderr)
    stream.flush()
    sys.stderr.close()
    assert stream.buffer.getvalue() == "? \xfc\n".encode("latin-1")  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [0, 1, 3])
def test_an_exit_of_a_library_is_no_success_of_ours(code: int) -> None:
    with pytest.raises(SystemExit) as error:
        guarded(lambda: sys.exit(code))
    assert error.value.code == code
