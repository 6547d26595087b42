"""What training and sampling take in time and memory, by a trial in a process of its own.

`plan` prints it, and `train.memory_gib` is kept by it. A process of its own, since the most memory
that a process ever held cannot be read apart from what it did before.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from synthmed.config import Config
from synthmed.errors import InputError, ResourceError, SynthmedError, UsageError


@dataclass(frozen=True)
class Request:
    """What to try.

    Args:
        n_patients: in the cohort of noise, one scan each.
        n_holdout: held out beside them; with any, what ends a training is tried as well.
        batch_patients: patients a step, and what a phase draws that reads none of them; above
            `n_patients` it is they that are fewer.
        pieces: the batch is worked through in.
        recompute: whether blocks compute their inside again on the way back.
        steps: of each phase, at least three: the first two are not timed.
        samples: whether to draw samples as well.
        device: where.
        threads: of the processor.
        n_read: patients a step where a phase reads them; null is as many as `batch_patients`.
    """

    n_patients: int
    n_holdout: int
    batch_patients: int
    pieces: int
    recompute: bool
    steps: int
    samples: bool
    device: str
    threads: int
    n_read: int | None = None


@dataclass(frozen=True)
class Measured:
    """What a trial took.

    Args:
        n_parameters: of the model.
        n_trained: those of them (or of adapters to them) that are trained.
        build_seconds: to make the model, libraries included.
        seconds_per_step: of each round.
        steps: of each round, within the config's steps and, at that speed, its minutes.
        finish_seconds: a training scan, of what the rounds fit without gradients.
        finish_scans: most scans that one of these fits reads; null for all.
        finish_bytes: a training scan, that such a fit holds at once.
        draw_bytes: a patient and step, of what the phases of a round draw.
        reads_nobody: whether a phase reads no patients, and so draws as many volumes as are asked
            for, however few patients there are.
        examine_seconds: for the look at the trained model.
        first_batch_seconds: to make the sampler and a first canonical batch; 0 without samples.
        batch_seconds: of a further one, written to disk.
        built_bytes: memory held once the model was there.
        peak_bytes: the most that was held: on CUDA what tensors took of the device, else all that
            the process had in memory, interpreter and libraries included.
    """

    n_parameters: int
    n_trained: int
    build_seconds: float
    seconds_per_step: tuple[float, ...]
    steps: tuple[int, ...]
    finish_seconds: float
    finish_scans: int | None
    finish_bytes: int
    draw_bytes: int
    reads_nobody: bool
    examine_seconds: float
    first_batch_seconds: float
    batch_seconds: float
    built_bytes: int
    peak_bytes: int


def measure(config: Config, request: Request) -> Measured:
    """Run a trial in a process of its own.

    Raises:
        ResourceError: it ran out of memory.
        SynthmedError: what the trial itself raised.
    """
    sent = {"config": config.model_dump(mode="json"), "request": asdict(request)}
    # all that a trial writes goes with it, however it ends
    with tempfile.TemporaryDirectory(prefix="synthmed-trial-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "synthmed.trial"],
            input=json.dumps(sent),
            env={**os.environ, "TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == -signal.SIGINT:  # Ctrl-C reaches the trial as well
        raise KeyboardInterrupt
    if done.returncode in (-9, 137):
        raise ResourceError("memory: a trial of the training was killed for want of it", _SMALLER)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.splitlines() or ["no output"])[-1]
        raise SynthmedError(f"a trial of the training failed: {last}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        kinds = {kind.exit_code: kind for kind in (UsageError, InputError, ResourceError)}
        raise kinds.get(answer["code"], SynthmedError)(answer["error"])
    rounds = {k: tuple(answer[k]) for k in ("seconds_per_step", "steps")}
    return Measured(**{**answer, **rounds})


_SMALLER = "Use a smaller model or grid, or lower train.batch_patients."


def peak_bytes(device: str) -> int:
    """The most bytes held so far: by tensors on a CUDA device, else by this process."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the process that started this one
        lines = status.read_text(encoding="ascii").splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes(device: str) -> int:
    """The bytes held now, counted as by `peak_bytes`; where the system does not say, the peak."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated())
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return peak_bytes(device)
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
