"""What a command raises becomes the contract's exit code and a line or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from synthmed.exits import guarded


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
