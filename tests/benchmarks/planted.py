"""How many planted copies the screen and the second test find, in docs/benchmarks.md.

    SYNTHMED_REAL_DATA=... python tests/benchmarks/planted.py

Copies of training scans, disguised in one way, are hidden among 100 samples that are scans of other
people, of whom the tests know nothing. A cell holds the share of copies that were found and given
to the right patient, over at least 20 copies; what else was flagged stands in the last column.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.copies import GapTest, Matches
from synthmed.metrics.sides import Cases
from synthmed.metrics.similarity import DescriptorSimilarity, ImageSimilarity
from tests.benchmarks.cohorts import PAGE, publish, real_data
from tests.benchmarks.faults import GRID, hippocampus, phantoms
from tests.metrics.cohorts import DISGUISES, made

BEGIN, END = "<!-- planted:begin -->", "<!-- planted:end -->"
SAMPLES, SHARES, COPIES = 100, (1, 5, 20), 20
FDR = 0.01


def people(volumes: Any, rows: Any, prefix: str) -> Cases:
    """Some volumes as cases, a person each."""
    names = np.array([f"{prefix}{i:04}" for i in rows])
    return Cases(volumes[rows].astype(np.float16), names, [{} for _ in rows])


def power(scans: Sequence[Any], n_train: int, n_holdout: int, seed: int) -> dict[str, Any]:
    """Similarity and disguise to the share found at each of `SHARES`, and how many others were."""
    volumes = np.stack(scans)[:, None].astype(np.float32)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(volumes))
    train = people(volumes, order[:n_train], "t")
    holdout = people(volumes, order[n_train : n_train + n_holdout], "h")
    others = made(volumes[order[n_train + n_holdout :]])
    copied = rng.permutation(n_train)[:COPIES]
    out: dict[str, Any] = {}
    whole, tissue, descriptor = (
        GapTest(train, holdout, similarity, Key.root(seed))
        for similarity in (
            ImageSimilarity((0,)),
            ImageSimilarity((0,), tissue=True),
            DescriptorSimilarity((0,)),
        )
    )
    tests = {"screen": ([whole, tissue], FDR / 2), "descriptor": ([descriptor], FDR)}
    for kind, (parts, fdr) in tests.items():
        honest = [test.match(others) for test in parts]
        # fewer people than samples: some come twice, which makes them no more alike to train
        filler = np.resize(np.arange(len(others)), SAMPLES)
        for name, disguise in DISGUISES.items():
            first = [disguise(np.asarray(train.volumes[i, 0], np.float32), rng) for i in copied]
            planted = made(np.stack(first)[:, None])
            rows = [test.match(planted) for test in parts]
            found = {share: 0 for share in SHARES}
            false = 0
            for share in SHARES:
                for start in range(0, COPIES, share):
                    some = np.arange(start, start + share)
                    rest = filler[: SAMPLES - share]
                    verdicts = []
                    for test, of, by in zip(parts, rows, honest, strict=True):
                        both = Matches(
                            np.concatenate([of.to_train[some], by.to_train[rest]]),
                            np.concatenate([of.to_holdout[some], by.to_holdout[rest]]),
                        )
                        verdicts.append(test.find(others, fdr, both))
                    for k, at in enumerate(some):
                        right = str(train.patients[copied[at]])
                        found[share] += any(v.matches[k].copy_of == right for v in verdicts)
                    false += len({i for v in verdicts for i in v.flagged if i >= share})
            out[kind, name] = {"found": found, "false": false}
            print(kind, name, found, false, file=sys.stderr)
    return out


def table(found: Mapping[Any, Mapping[str, Any]]) -> str:
    """A disguise a row; three shares for each of the two similarities."""
    names = list(dict.fromkeys(s for s, _ in found))
    heads = [f"{s}, {share} %" for s in names for share in SHARES]
    lines = ["| | " + " | ".join([*heads, "flagged else"]) + " |"]
    lines.append("|---|" + "---|" * (len(heads) + 1))
    for disguise in dict.fromkeys(d for _, d in found):
        cells = [f"{found[s, disguise]['found'][n] / COPIES:.2f}" for s in names for n in SHARES]
        false = sum(found[s, disguise]["false"] for s in names)
        lines.append(f"| {disguise} | " + " | ".join([*cells, str(false)]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and put them into the page."""
    parser = argparse.ArgumentParser(description="How many planted copies are found.")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    root = real_data()
    texts = []
    for name, scans, sizes in (
        ("phantoms of 6 mm", phantoms()[0], ((120, 50), (120, 20))),
        ("phantoms of 3 mm", phantoms(grid=2 * GRID)[0], ((120, 50), (120, 20))),
        ("hippocampus", hippocampus(root)[0], ((60, 40), (60, 20))),
    ):
        for n_train, n_holdout in sizes:
            head = f"{name}: {n_train} people to train on, {n_holdout} held out"
            texts.append(f"{head}\n\n{table(power(scans, n_train, n_holdout, 0))}")
    text = "\n\n".join(texts)
    publish(options.page, f"`python tests/benchmarks/planted.py`:\n\n{text}", BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
