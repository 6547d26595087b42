"""How well `synthmed plan` foretells a run: predicted against measured time and memory.

    python tests/benchmarks/plan.py quickstart --set train.max_steps=60
    python tests/benchmarks/plan.py CONFIG... --input FOLDER --set KEY=VALUE

Each config is planned, then ingested, prepared, trained and sampled for real, in processes of
their own. One line a config: seconds of training and of sampling, and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--input")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    asked = parser.parse_args()
    overrides = asked.overrides + ([f"data.source={asked.input}"] if asked.input else [])
    print("| config | what | predicted | measured | ratio |\n|---|---|---|---|---|")
    for config in asked.configs:
        before, after = planned(config, overrides), made(config, overrides)
        for name, value in after.items():
            ratio = before[name] / value
            print(f"| {config} | {name} | {before[name]:.2f} | {value:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
