"""What the evidence costs against the number of scans, in docs/benchmarks.md.

    python tests/benchmarks/scale.py --folder runs/scale

Made-up heads, two thirds of the real ones in train and one held out, as many synthetic as real;
all default metrics and the copies test, a process a size. Memory is what a process has allocated
for itself at most; the scans' file, which the system may drop and read again, is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import zoom

from synthmed.artifacts import ChannelInfo
from synthmed.keys import Key
from synthmed.metrics import DEFAULT_METRICS
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.progress import Progress
from synthmed.stages.evaluate import judge
from tests.benchmarks.cohorts import PAGE, publish

BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"
COARSE = 16
"""Voxels a side of what differs between people, before it is brought to the grid."""
KINDS = ("control", "atrophy")


def head(grid: int, rng: np.random.Generator, shared: np.ndarray[Any, Any]) -> Any:
    """(1, X, Y, Z) float16: a head of shared and individual tissue, and noise of its own."""
    own = 0.1 * rng.standard_normal((COARSE, COARSE, COARSE))
    tissue = zoom((shared + own).astype(np.float32), grid / COARSE, order=1)
    axes = np.meshgrid(*[np.linspace(-1, 1, grid, dtype=np.float32)] * 3, indexing="ij")
    inside = np.sqrt(sum(a**2 for a in axes)) < 0.85
    noise = 0.02 * rng.standard_normal((grid, grid, grid), dtype=np.float32)
    return ((0.6 + tissue) * inside + noise).astype(np.float16)[None]


def written(folder: Path, grid: int, most: int) -> Path:
    """A file of 2 x most heads, real before synthetic; made once."""
    file = folder / f"heads-{grid}-{most}.npy"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        shared = 0.1 * rng.standard_normal((COARSE, COARSE, COARSE))
        part = file.with_suffix(".partial")
        shape = (2 * most, 1, grid, grid, grid)
        out = np.lib.format.open_memmap(part, "w+", np.float16, shape)
        for i in range(len(out)):
            out[i] = head(grid, rng, shared)
        out.flush()
        part.rename(file)
    return file


def sides(file: Path, n: int) -> Sides:
    """The first n real and the first n synthetic heads of a file."""
    heads = np.load(file, mmap_mode="r")
    most, n_train = len(heads) // 2, 2 * n // 3

    def some(first: int, count: int, prefix: str) -> Cases:
        names = np.array([f"{prefix}{i:05}" for i in range(count)])
        return Cases(
            heads[first : first + count], names, [{"kind": KINDS[i % 2]} for i in range(count)]
        )

    return Sides(
        train=some(0, n_train, "t"),
        holdout=some(n_train, n - n_train, "h"),
        synthetic=some(most, n, "s"),
        channels=(ChannelInfo("T1w"),),
        spacing_mm=(1.5, 1.5, 1.5),
        categorical={"kind": KINDS},
        continuous={},
        key=Key.root(0),
        seed=0,
        resamples=500,
    )


class Clock(Progress):
    """Seconds of each metric, and of all subgroups together, from what `judge` reports."""

    def __init__(self) -> None:
        super().__init__("", quiet=True)
        self.marks: list[tuple[str, float]] = []

    def update(self, done: int, total: int, note: str = "") -> None:
        self.marks.append((note, time.perf_counter()))

    def ended(self) -> dict[str, float]:
        """Name to seconds; a metric asked about a subgroup counts as `subgroups`."""
        out: dict[str, float] = {}
        stops = [at for _, at in self.marks[1:]] + [time.perf_counter()]
        for (name, at), stop in zip(self.marks, stops, strict=True):
            key = "subgroups" if ", " in name else name
            out[key] = out.get(key, 0.0) + stop - at
        return out


def measured(file: Path, n: int) -> dict[str, Any]:
    """Seconds of all evidence and of its dearest metrics, and the peak of memory in bytes."""
    peak = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            kib = next(x for x in status.splitlines() if x.startswith("RssAnon")).split()[1]
            peak[0] = max(peak[0], 1024 * int(kib))

    watcher = threading.Thread(target=watch)
    watcher.start()
    given = sides(file, n)
    clock = Clock()
    start = time.perf_counter()
    judge(given, Shared(given), DEFAULT_METRICS, clock)
    seconds = time.perf_counter() - start
    each = clock.ended()
    ended.set()
    watcher.join()
    return {"n": n, "seconds": seconds, "each": each, "peak_bytes": peak[0]}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A size a row."""
    lines = ["| real + synthetic | seconds | times the size before | the dearest, s | peak, GiB |"]
    lines.append("|---|---|---|---|---|")
    for i, r in enumerate(found):
        times = f"{r['seconds'] / found[i - 1]['seconds']:.2f}" if i else ""
        dear = sorted(r["each"].items(), key=lambda kv: -kv[1])[:4]
        named = ", ".join(f"`{name}` {seconds:.0f}" for name, seconds in dear)
        lines.append(
            f"| {r['n']} + {r['n']} | {r['seconds']:.0f} | {times} | {named} | "
            f"{r['peak_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and put it into the page."""
    parser = argparse.ArgumentParser(description="What the evidence costs against its size.")
    parser.add_argument("--folder", type=Path, required=True, help="for the made-up heads")
    parser.add_argument("--grid", type=int, default=128, help="voxels a side")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--one", type=int, help="measure this size alone and print it as JSON")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    file = written(options.folder, options.grid, max(options.sizes))
    if options.one:
        print(json.dumps(measured(file, options.one)))
        return 0
    found = []
    for n in options.sizes:
        call = [sys.executable, __file__, "--folder", str(options.folder), "--one", str(n)]
        call += ["--grid", str(options.grid), "--sizes", *map(str, options.sizes)]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout))
        print(done.stdout.strip(), file=sys.stderr)
    sizes = " ".join(map(str, options.sizes))
    head_line = (
        f"`python tests/benchmarks/scale.py --folder runs/scale --grid {options.grid} "
        f"--sizes {sizes}`, {os.cpu_count()} CPU cores:"
    )
    publish(options.page, f"{head_line}\n\n{table(found)}", BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
