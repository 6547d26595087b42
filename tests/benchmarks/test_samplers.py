"""The samplers' table: what it says of MONAI's scheduler, and that the page holds what was run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.backbones.gaussians import Gaussian, moments
from tests.benchmarks import samplers
from tests.benchmarks.samplers import BEGIN, END, PAGE, ROWS, errors, main, monai


@pytest.mark.parametrize(("steps", "least"), [(25, 0.95), (250, 0.7)])
def test_monais_strides_are_found_to_be_too_wide(steps: int, least: float) -> None:
    """For data of standard deviation 0.5; against one-step posteriors taken `steps` times."""
    _, covariance = moments(monai(Gaussian.diagonal([0.0], [0.5]), "linear", steps), 1)
    assert float(covariance.sqrt()) > least
    process = samplers.Process("linear")
    bars, betas = process.alpha_bars.tolist(), process.betas.tolist()
    variance = 1.0
    for t in torch.linspace(999, 0, steps).round().long().tolist():
        bar, beta, before = bars[t], betas[t], bars[t - 1] if t else 1.0
        denoised = math.sqrt(bar) * 0.25 / (bar * 0.25 + 1 - bar)
        # Ho et al. 2020, eq. 7
        gain = math.sqrt(before) * beta / (1 - bar) * denoised
        gain += math.sqrt(1 - beta) * (1 - before) / (1 - bar)
        variance = gain**2 * variance + (1 - before) / (1 - bar) * beta
    assert float(covariance) == pytest.approx(variance, rel=1e-3)  # its tables are float32


def test_monais_full_chain_is_ours() -> None:
    """Its schedule and ours, and both ways to read a draw off, agree where its step is right."""
    data = Gaussian.diagonal([0.3], [0.5])
    for schedule in ("linear", "cosine"):
        process = samplers.Process(schedule)
        found = errors(data, monai(data, schedule, 1000))
        expected = errors(data, samplers.ours(data, process, ROWS["ancestral"](1000)))
        assert found == pytest.approx(expected, rel=0.05)  # its tables are float32


def test_errors_are_those_of_the_moments() -> None:
    """A draw that is off by a known shift and width."""
    data = Gaussian.diagonal([1.0, -1.0], [0.5, 2.0])
    worst, distance = errors(
        data, lambda noise: torch.tensor([1.1, -1.0]) + noise() * torch.tensor([0.5, 3.0])
    )
    assert worst == pytest.approx(0.5)
    assert distance == pytest.approx(math.hypot(0.1, 1.0))


def test_no_row_asks_for_more_than_its_column_says() -> None:
    for make in ROWS.values():
        for n in samplers.COUNTS:
            assert n - 1 <= make(n).evaluations <= n


def test_the_page_is_written_between_its_markers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--page", str(page), "--evaluations", "5", "10"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert capsys.readouterr().out.strip() in text
    for name in ROWS:
        assert text.count(f"| {name} |") == 2


def test_the_page_of_the_project_agrees_with_a_run() -> None:
    """Its first columns, computed anew; MONAI's row may change with its version."""
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    for schedule in ("linear", "cosine"):
        for line in samplers.table(schedule, [5, 10]).splitlines()[2:-1]:
            assert any(row.startswith(line.rstrip("|")) for row in shown), line
