"""How well `synthmed plan` foretells a run, in docs/benchmarks.md: predicted against measured.

    python tests/benchmarks/plan.py quickstart --set train.max_steps=60
    python tests/benchmarks/plan.py CONFIG... --input FOLDER --set KEY=VALUE

Each config is planned, then ingested, prepared, trained and sampled for real, in processes of
their own: seconds of training and of sampling, and the peak of resident memory. Nothing else should
run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.cohorts import publish

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- plan:begin -->", "<!-- plan:end -->"
FIGURES = {
    "train_seconds": "training, s",
    "sample_seconds": "sampling, s",
    "memory_gib": "peak memory, GiB",
}

RUN = """
import sys
from pathlib import Path
from synthmed import configfile
from synthmed.pipeline import Line, begin
from synthmed.store import Run

place, file, *overrides = sys.argv[1:]
config = configfile.load(configfile.find(file), overrides)
run = Run(Path(place))
with run.lock():
    begin(run, config, overwrite=False)
    line = Line(run, config, quiet=True)
    for stage in ("ingest", "prepare", "train", "sample"):
        line.artifact(stage)
"""


def planned(config: str, overrides: list[str]) -> dict[str, Any]:
    """What the plan says."""
    options = [word for o in overrides for word in ("--set", o)]
    words = [sys.executable, "-m", "synthmed.cli", "plan", config, *options]
    done = subprocess.run(
        [*words, "--json", "-q", "--device", "cpu"], capture_output=True, text=True, check=True
    )
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def made(config: str, overrides: list[str]) -> dict[str, float]:
    """Seconds of training and sampling, and the peak of the process that did all of it."""
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen([sys.executable, "-c", RUN, folder, config, *overrides])
        _, status, usage = os.wait4(child.pid, 0)  # of this child alone
        if status:
            raise SystemExit(f"{config}: the run failed")
        lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = {x["event"]: x["seconds"] for x in map(json.loads, lines) if "seconds" in x}
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "train_seconds": seconds["train"],
        "sample_seconds": seconds["sample"],
        "memory_gib": usage.ru_maxrss * unit / 2**30,
    }


def table(found: Sequence[tuple[str, dict[str, Any], dict[str, float]]]) -> str:
    """A row a config and figure: what the plan said, what came, and the one over the other."""
    lines = ["| config | | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for config, before, after in found:
        for name, words in FIGURES.items():
            said, came = before[name], after[name]
            lines.append(f"| {config} | {words} | {said:.3g} | {came:.3g} | {said / came:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and put it into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--input")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    asked = parser.parse_args(arguments)
    overrides = asked.overrides + ([f"data.source={asked.input}"] if asked.input else [])
    found = [(c, planned(c, overrides), made(c, overrides)) for c in asked.configs]
    words = " ".join([*asked.configs, *(f"--set {o}" for o in asked.overrides)])
    text = f"`python tests/benchmarks/plan.py {words}`:\n\n{table(found)}"
    publish(asked.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
