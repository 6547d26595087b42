"""The samplers' errors on a Gaussian, in docs/benchmarks.md: `python tests/benchmarks/samplers.py`.

Nothing is drawn: mean and covariance of each sampler's results are read off its affine map. The
last row is MONAI's DDPMScheduler with the same denoiser, on the times it sets itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import torch
from torch import Tensor

from synthmed.backbones.diffusion import Process, Schedule
from synthmed.backbones.samplers import DDIM, Ancestral, DPMSolver, Heun, Noise, Sampler
from tests.backbones.gaussians import Draw, Gaussian, moments
from tests.benchmarks.cohorts import publish

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- samplers:begin -->", "<!-- samplers:end -->"
COUNTS = [5, 10, 25, 50, 100, 250, 1000]
MEAN, SD = [0.5, -1.0, 0.25, 2.0], [0.1, 0.5, 1.0, 3.0]

ROWS: Mapping[str, Callable[[int], Sampler]] = {
    "ancestral": lambda n: Ancestral(steps=n),
    "ancestral, `data_sd` 1": lambda n: Ancestral(steps=n, data_sd=1),
    "ancestral, even in log SNR": lambda n: Ancestral(steps=n, spacing="log_snr"),
    "ddim": lambda n: DDIM(steps=n),
    "ddim, even in log SNR": lambda n: DDIM(steps=n, spacing="log_snr"),
    "dpm_solver": lambda n: DPMSolver(steps=n),
    "heun": lambda n: Heun(steps=(n + 1) // 2),
}
"""Each sampler with its defaults (and a few others) for a number of evaluations."""


def errors(data: Gaussian, draw: Draw) -> tuple[float, float]:
    """Worst error of a coordinate's mean or deviation, in deviations; 2-Wasserstein distance."""
    mean, covariance = moments(draw, len(data.mean))
    of_mean = (mean - data.mean).abs() / data.sd
    of_sd = (covariance.diagonal().sqrt() / data.sd - 1).abs()
    return float(torch.cat([of_mean, of_sd]).max()), data.wasserstein(mean, covariance)


def ours(data: Gaussian, process: Process, sampler: Sampler) -> Draw:
    """One of our samplers on these data."""
    return lambda noise: sampler.draw(data.denoiser(process), process, noise)


def monai(data: Gaussian, schedule: Schedule, steps: int) -> Draw:
    """MONAI's DDPMScheduler on these data, as a user sets it up for fewer steps."""
    from monai.networks.schedulers import DDPMScheduler

    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        schedule={"linear": "linear_beta", "cosine": "cosine"}[schedule],
        prediction_type="sample",
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)

    def draw(noise: Noise) -> Tensor:
        x = noise()
        with patch("torch.randn", lambda *_, **__: noise()):
            for t in scheduler.timesteps:
                bar = scheduler.alphas_cumprod[t].double()
                clean = data.expected(x, bar.sqrt(), (1 - bar).sqrt())
                x, _ = scheduler.step(clean, int(t), x)
        return x

    return draw


def table(schedule: Schedule, counts: Sequence[int] = COUNTS) -> str:
    """A sampler a row, a number of evaluations a column."""
    data, process = Gaussian.diagonal(MEAN, SD), Process(schedule)
    lines = [
        f"| {schedule} | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for name, make in ROWS.items():
        cells = [cell(*errors(data, ours(data, process, make(n)))) for n in counts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = [cell(*errors(data, monai(data, schedule, n))) for n in counts]
    lines.append("| MONAI's DDPMScheduler | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(worst: float, distance: float) -> str:
    """Both errors of one row at one count.

    >>> cell(0.0396, 0.12756), cell(15.5, 63)
    ('4.0 %, 0.128', '1550 %, 63')
    """
    percent = f"{100 * worst:.1f}" if worst < 1 else f"{100 * worst:.3g}"
    if worst >= 10:
        percent = f"{100 * worst:.0f}"
    return f"{percent} %, {distance:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and put it into the page."""
    parser = argparse.ArgumentParser(description="The samplers' errors, in docs/benchmarks.md.")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    parser.add_argument("--evaluations", type=int, nargs="+", default=COUNTS, metavar="N")
    options = parser.parse_args(arguments)
    parts = ["`python tests/benchmarks/samplers.py`:"]
    parts += [table(schedule, options.evaluations) for schedule in get_args(Schedule)]
    text = "\n\n".join(parts)
    publish(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
