"""How long ingest takes and what memory it holds, in docs/benchmarks.md.

    pip install dcm2niix
    SYNTHMED_REAL_DATA=... python tests/benchmarks/ingest.py

Both commands convert the same scanner series in turns, ours in one process and without the start of
the program. Then folders of generated series, ten times larger each: what grows with them is what a
data manager with a whole archive has to know.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthmed import processes
from synthmed.configfile import validate
from synthmed.errors import InputError
from synthmed.formats import candidates, dcm2niix
from synthmed.stages import ingest, reading
from tests.benchmarks.cohorts import publish, real_data
from tests.formats import make

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- ingest:begin -->", "<!-- ingest:end -->"
SLICES, SIDE = 50, 128
"""Of a generated series."""
SIZES = (100, 1000, 10_000)
"""Files."""


def generated(folder: Path, n_files: int) -> Path:
    """A folder of series, each of another person."""
    for k in range(n_files // SLICES):
        data = make.voxels(k, (SIDE, SIDE, SLICES))
        make.series(folder / f"p{k:04d}", data, np.diag([1.5, 1.5, 3, 1]))
    return folder


def alone(source: Path, n: int) -> None:
    """Ingest a folder with `n` processes in this program, and print seconds and peak bytes."""
    data = {"source": str(source), "grid": [16, 16, 16], "volumes": "split"}
    tree = {"data": data, "backbone": {"name": "cvae"}, "privacy": None, "train": {"max_steps": 1}}
    processes.how_many = lambda: n  # type: ignore[assignment]
    candidates.MANY_FILES = 1 if n > 1 else sys.maxsize
    reading.MANY_BYTES = sys.maxsize
    with tempfile.TemporaryDirectory() as target:
        started = time.perf_counter()
        facts = ingest.ingest(validate(tree, "benchmark"), Path(target), min_patients=1)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "n_scans": facts["n_scans"]}))


def measured(source: Path, n: int) -> dict[str, Any]:
    """What `alone` prints, in a program of its own and under a key of its own."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, __file__, "--alone", str(source), "--processes", str(n)],
            env=os.environ | {"SYNTHMED_HOME": home},
            capture_output=True,
            text=True,
            check=True,
        )
    out: dict[str, Any] = json.loads(done.stdout)
    return out


def converted(source: Path) -> float:
    """Seconds that dcm2niix takes to compressed NIfTI."""
    with tempfile.TemporaryDirectory() as target:
        started = time.perf_counter()
        words = [str(dcm2niix.binary()), "-z", "y", "-o", target, str(source)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def beside_dcm2niix(source: Path, turns: int) -> str:
    """The two in turns: seconds, and the median of the turns' ratios."""
    both = [(measured(source, 1)["seconds"], converted(source)) for _ in range(turns)]
    ours, theirs = (statistics.median(column) for column in zip(*both, strict=True))
    ratio = statistics.median(a / b for a, b in both)
    n_files = sum(p.is_file() for p in source.rglob("*"))
    return (
        f"`dcm_qa_nih`, {n_files} files, {turns} turns: {ours:.2f} s, dcm2niix {theirs:.2f} s; "
        f"median ratio {ratio:.2f}."
    )


def growing(sizes: Sequence[int], n: int) -> str:
    """A row a size."""
    lines = [
        f"| files | seconds, one process | seconds, {n} processes | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = generated(Path(folder), size)
            one, several = measured(source, 1), measured(source, n)
            if one["n_scans"] != size // SLICES:
                raise InputError(f"{one['n_scans']} of {size // SLICES} series were read")
        lines.append(
            f"| {size} | {one['seconds']:.1f} | {several['seconds']:.1f} | "
            f"{one['peak'] / 2**20:.0f} |"
        )
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and put it into the page."""
    parser = argparse.ArgumentParser(description="Time and memory of ingest.")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--processes", type=int, default=processes.how_many())
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        alone(options.alone, options.processes)
        return 0
    real = real_data() / "dicom" / "vendors" / "dcm_qa_nih" / "In"
    text = f"`python tests/benchmarks/ingest.py`, {options.processes} hardware threads:\n\n"
    text += beside_dcm2niix(real, options.turns) + "\n\n"
    text += growing(options.sizes, options.processes)
    publish(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
