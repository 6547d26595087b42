"""The table of a private step's cost: every way runs, and the page gets its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import private_step
from tests.benchmarks.private_step import BEGIN, END, WAYS, main, timed


@pytest.mark.parametrize("backbone", private_step.BACKBONES)
@pytest.mark.parametrize("way", WAYS[:4])
def test_every_way_takes_steps(backbone: str, way: str) -> None:
    found = timed(backbone, way, grid=8, batch=5, n_steps=4)
    assert found["seconds"] > 0 and found["peak_bytes"] > 2**20


def test_hooks_cannot_take_the_step_of_a_critic_with_a_penalty() -> None:
    """What the table says: why they are no third way."""
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        timed("cgan", "opacus hooks", grid=8, batch=5, n_steps=3)


def test_the_page_gets_a_row_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_step, "apart", lambda step, *a: step(*a))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    words = ["--page", str(page), "--grid", "8", "--batch", "4", "--steps", "3", "--turns", "2"]
    assert main([*words, "--backbones", "cvae"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    row = next(line for line in text.splitlines() if line.startswith("| cvae"))
    assert row.count("|") == len(WAYS) + 2 and "GiB" in row
