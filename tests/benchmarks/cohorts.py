"""Finished runs as a table in docs/benchmarks.md: `python tests/benchmarks/cohorts.py RUN...`.

Only what the runs have measured is written: report.json, the manifests and log.jsonl. Call it on
the machine that made the runs, or describe that one with --machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- cohorts:begin -->", "<!-- cohorts:end -->"
NONE = "\N{EN DASH}"


def real_data() -> Path:
    """The folder of scans of people, which a script cannot do without."""
    folder = os.environ.get("SYNTHMED_REAL_DATA")
    if not folder:
        sys.exit("SYNTHMED_REAL_DATA is not set: name the folder that holds the cohorts.")
    return Path(folder)


def column(run: Path) -> dict[str, str]:
    """What one run has measured, by the name of the figure."""
    report = json.loads((run / "private/report/report.json").read_text(encoding="utf-8"))
    model = json.loads((run / "private/model/manifest.json").read_text(encoding="utf-8"))
    estimates: dict[str, list[dict[str, Any]]] = {}
    for e in report["estimates"]:
        estimates.setdefault(e["name"], []).append(e)
    cohort = report["cohort"]
    signed = " (signed)" if report["signature"] else ""
    times = durations(run / "log.jsonl")
    return {
        "decision": report["decision"] + signed,
        "patients: train / held out": f"{cohort['n_train']} / {cohort['n_holdout']}",
        "synthetic scans": str(cohort["n_synthetic"]),
        "backbone": str(report["data"]["backbone"]),
        "training steps": " + ".join(str(n) for n in model["facts"]["steps"]),
        "mmd2 [95 %] (floor, ceiling)": shown(estimates, "mmd2", "ci", "floor", "ceiling"),
        "mmd2_excess [95 %] (ceiling)": shown(estimates, "mmd2_excess", "ci", "ceiling"),
        "recall (floor)": shown(estimates, "recall", "floor"),
        "coverage (floor)": shown(estimates, "coverage", "floor"),
        "condition_accuracy": shown(estimates, "condition_accuracy"),
        "copies": shown(estimates, "copies"),
        "copied_patients [95 %]": shown(estimates, "copied_patients", "ci"),
        "authenticity (floor)": shown(estimates, "authenticity", "floor"),
        "membership_auc [95 %]": shown(estimates, "membership_auc", "ci"),
        "training, s": times.get("train", NONE),
        "sampling, s": times.get("sample", NONE),
        "torch": report["provenance"]["versions"].get("torch", NONE),
    }


def shown(estimates: Mapping[str, Sequence[Mapping[str, Any]]], name: str, *parts: str) -> str:
    """An estimate with the parts asked for; several where it exists for slices alone."""
    found = estimates.get(name, [])
    chosen = [e for e in found if e["slice"] is None] or found
    texts = []
    for e in chosen:
        text = (f"{e['slice']} " if e["slice"] else "") + number(e["value"])
        if "ci" in parts:
            text += " [" + ", ".join(map(number, e["ci"])) + "]" if e["ci"] else f" [{NONE}]"
        beside = [number(e[p]) for p in ("floor", "ceiling") if p in parts]
        texts.append(text + (f" ({', '.join(beside)})" if beside else ""))
    return "; ".join(texts) or NONE


def number(x: float | None) -> str:
    """Three significant digits; a dash for null.

    >>> number(0.04567), number(None)
    ('0.0457', '–')
    """
    return NONE if x is None else f"{x:.3g}"


def durations(log: Path) -> dict[str, str]:
    """Seconds of each stage as its log line tells; a dash where it was stopped and went on."""
    out: dict[str, str] = {}
    stopped = False
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "seconds" in entry:
            out[entry["event"]] = NONE if stopped else f"{entry['seconds']:.0f}"
        stopped = entry["event"] == "stopped"
    return out


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A figure a row, a run a column."""
    rows = list(next(iter(columns.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {r} | " + " | ".join(c[r] for c in columns.values()) + " |" for r in rows]
    return "\n".join(lines)


def insert(page: str, text: str, first: str = BEGIN, last: str = END) -> str:
    """`page` with what stands between the two markers replaced.

    Raises:
        ValueError: a marker is missing, or they stand in the wrong order.
    """
    head, begin, rest = page.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page needs {first} and, after it, {last}")
    return f"{head}{first}\n{text}\n{last}{tail}"


def publish(page: Path, text: str, first: str = BEGIN, last: str = END) -> None:
    """Put a text between two markers of a page, and print it.

    Raises:
        ValueError: as `insert`.
    """
    page.write_text(insert(page.read_text(encoding="utf-8"), text, first, last), encoding="utf-8")
    print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and put it into the page."""
    parser = argparse.ArgumentParser(description="Finished runs as a table in docs/benchmarks.md.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    names = [run.resolve().name for run in options.runs]
    if len(set(names)) < len(names):
        parser.error("two runs have the same folder name, which is all the table says of them")
    columns = {name: column(run) for name, run in zip(names, options.runs, strict=True)}
    command = "python tests/benchmarks/cohorts.py " + " ".join(f"runs/{n}" for n in names)
    text = f"`{command}`, {options.machine}:\n\n{table(columns)}"
    publish(options.page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
