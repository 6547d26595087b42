"""What a private step costs beside the same step without privacy, in docs/benchmarks.md.

    python tests/benchmarks/private_step.py

For each backbone a batch of patients with one scan each, all of them drawn: the ordinary step, the
private one by either way to a patient's gradient, the private one of a draw that nobody is in, and
Opacus' hooks on the same modules. Each runs in a process of its own, so that the peak of its memory
is its own. All of them take turns, and each one's fastest turn counts: a machine that others share
has slow minutes. Nothing else should run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from synthmed import configfile
from synthmed.backbones.generative import Phase
from synthmed.config import Config
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.measure import peak_bytes
from synthmed.privacy.gradients import per_patient
from synthmed.privacy.noise import SecretStream
from synthmed.privacy.patient_step import Mechanism, PatientStep
from synthmed.stages import train
from synthmed.training import Training, phase_step
from synthmed.trial import noise_loader
from tests.benchmarks.backbones import apart
from tests.benchmarks.cohorts import publish

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- private-step:begin -->", "<!-- private-step:end -->"
BACKBONES: dict[str, dict[str, Any]] = {
    "cvae": {"name": "cvae", "prior": "standard"},
    "ddpm": {"name": "ddpm", "prediction": "v"},
    "cgan": {"name": "cgan"},
}
NOBODY = "nobody drawn"
WAYS = ("ordinary", "loop", "vmap", NOBODY, "opacus hooks")
NONE = "\N{EN DASH}"
MECHANISM = Mechanism(sample_rate=1.0, noise_multiplier=1.0, clip=1.0, divisor=8.0)


def config_of(backbone: str, grid: int, batch: int) -> Config:
    """A config of noise on a cube."""
    return configfile.validate(
        {
            "data": {
                "source": "nowhere",
                "grid": [grid] * 3,
                "view": "grid",
                "conditions": {"dx": {"kind": "categorical", "categories": ["a", "b"]}},
            },
            "backbone": BACKBONES[backbone],
            "privacy": None,
            "train": {"max_steps": 100, "batch_patients": batch, "precision": "fp32"},
        },
        "benchmark",
    )


def timed(backbone: str, way: str, grid: int, batch: int, n_steps: int) -> dict[str, float]:
    """Median seconds of a step after the first two, and the peak of this process."""
    warnings.simplefilter("ignore")  # Opacus on hooks and on what it leaves out
    config = config_of(backbone, grid, batch)
    loader = noise_loader(config, batch, batch)
    model = train.build(config, loader, Key.root(0), "cpu")
    state = Training(model, [100])
    (phase,) = [p for p in state.rounds[0].phases if p.reads_patients]
    make = {"ordinary": ordinary, "opacus hooks": hooks}.get(way, private)
    step = make(state, phase, loader, config, way)
    times = []
    for number in range(n_steps):
        started = time.monotonic()
        step(number)
        times.append(time.monotonic() - started)
    return {"seconds": statistics.median(times[2:]), "peak_bytes": peak_bytes("cpu")}


Stepping = Callable[[int], None]


def ordinary(state: Training, phase: Phase, loader: Loader, config: Config, way: str) -> Stepping:
    """The step that training takes without privacy."""

    def step(number: int) -> None:
        state.step = number
        phase_step(state, phase, loader, config, Key.root(1), "cpu", False)

    return step


def private(state: Training, phase: Phase, loader: Loader, config: Config, way: str) -> Stepping:
    """The private step, all patients drawn or nobody, in chunks of four."""
    taking = PatientStep(state.optimizers[phase.name], MECHANISM)
    wanted = [k for k in state.params if phase.trainable(k)]

    def step(number: int) -> None:
        def chunks() -> Any:
            drawn = [] if way == NOBODY else loader.patients
            for at in range(0, len(drawn), 4):
                some = drawn[at : at + 4]
                batch, draws = loader.private_batch(phase, Key.root(number), some, 1, "cpu")
                yield per_patient(way, phase, state.params, wanted, batch, draws, 0.5)  # type: ignore[arg-type]

        taking.take(chunks(), SecretStream(Key.root(number).digest))

    return step


def hooks(state: Training, phase: Phase, loader: Loader, config: Config, way: str) -> Stepping:
    """Opacus' hooks on every layer that they know; all other parameters get no gradient a patient.

    The losses call modules with other parameters, which hooks do not see: here they call them with
    their own, as Opacus asks.

    Raises:
        NotImplementedError: they cannot differentiate this loss.
    """
    from opacus.grad_sample import GradSampleModule

    layers = [m for module in state.model.modules.values() for m in module.modules()]
    known = [
        m for m in layers if isinstance(m, torch.nn.Linear | torch.nn.Conv3d | torch.nn.GroupNorm)
    ]
    for m in layers:  # hooks and what is done in place exclude each other
        if hasattr(m, "inplace"):
            m.inplace = False
    wrapped = [GradSampleModule(m, strict=False) for m in known]
    wanted = [k for k in state.params if phase.trainable(k)]
    mine = [state.params[k] for k in wanted]
    optimizer = state.optimizers[phase.name]

    def itself(module: Any, params: Any, arguments: Any, words: Any = None) -> Any:
        return module(*arguments, **(words or {}))

    place = type(state.model).__module__

    def step(number: int) -> None:
        with mock.patch(f"{place}.functional_call", itself):
            take(number)

    def take(number: int) -> None:
        names = loader.patients
        batch, draws = loader.private_batch(phase, Key.root(number), names, 1, "cpu")
        for module in wrapped:
            module.zero_grad()
        phase.loss(state.params, batch, draws, 0.5).mean().backward()
        each = [g for p in mine if (g := getattr(p, "grad_sample", None)) is not None]
        if not each:
            raise NotImplementedError("no gradient a patient")
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in each]).norm(dim=0)
        factors = (MECHANISM.clip / norms).clamp(max=1)
        for p in mine:
            g: Tensor | None = getattr(p, "grad_sample", None)
            p.grad = torch.zeros_like(p) if g is None else torch.tensordot(factors, g, dims=1)
            p.grad += torch.randn_like(p)
        optimizer.step()

    return step


def row(backbone: str, grid: int, batch: int, n_steps: int, n_turns: int) -> list[str]:
    """Seconds of the ordinary step, then each way's multiple of it and its peak memory."""
    found: dict[str, dict[str, float]] = {}
    able = list(WAYS)
    for turn in range(n_turns):
        for way in list(able):
            try:
                f = apart(timed, backbone, way, grid, batch, n_steps)
            except (NotImplementedError, RuntimeError, AttributeError, ValueError) as error:
                print(f"{backbone} {way}: {type(error).__name__}: {error}", file=sys.stderr)
                able.remove(way)
                continue
            print(backbone, way, turn, f, file=sys.stderr)
            found[way] = {k: min(v, found.get(way, f)[k]) for k, v in f.items()}
    base = found.get("ordinary")
    if base is None:
        raise ValueError(f"{backbone}: the ordinary step failed")
    cells = [backbone, f"{base['seconds']:.3g} s, {base['peak_bytes'] / 2**30:.2f} GiB"]
    for way in WAYS[1:]:
        f = found.get(way)
        cells.append(
            "cannot"
            if f is None
            else f"{f['seconds'] / base['seconds']:.2f}, {f['peak_bytes'] / 2**30:.2f} GiB"
        )
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and put it into the page."""
    parser = argparse.ArgumentParser(description="The cost of a private step.")
    parser.add_argument("--grid", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    lines = ["| | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for backbone in options.backbones:
        cells = row(backbone, options.grid, options.batch, options.steps, options.turns)
        lines.append("| " + " | ".join(cells) + " |")
    text = (
        f"`python tests/benchmarks/private_step.py`, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {options.batch} patients on {options.grid}^3, fp32:\n\n"
    ) + "\n".join(lines)
    publish(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
