"""What a promise costs in utility, by epsilon and by route, in docs/benchmarks.md.

    python tests/benchmarks/utility.py
    python tests/benchmarks/utility.py --cohorts phantoms --routes low --epsilons 1

Routes: `scratch`, a small conditional VAE from random weights; `pretrained`, the same from weights
that were trained on phantoms, of which it trains a few; `low`, the spectral Gaussian. On the
phantoms the public weights come from other phantoms of the same kind, the best case; on hippocampus
crops from phantom heads, whose anatomy is another, the worst. A cell that is done leaves its
figures in --results. Every cell has a ledger of its own: nobody's budget is spent twice here, and
the split is by a public key. Steps, not minutes, are given, so that other work may run beside.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from synthmed import configfile
from synthmed.artifacts import Cohort, Dataset
from synthmed.config import Config
from synthmed.errors import SynthmedError
from synthmed.formats import synthetic
from synthmed.metrics.blocks import block_means
from synthmed.store import digest, write_json
from tests.benchmarks.backbones import apart, estimate, kept, public_home, value
from tests.benchmarks.cohorts import number, publish
from tests.benchmarks.part import DRAWN, Part, made, prepared, trained

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = Path(__file__).with_name("results") / "utility"
BEGIN, END = "<!-- utility:begin -->", "<!-- utility:end -->"
DELTA = 1e-5
SIDE = 12
"""Voxels a side that the classifier sees."""
DRAWS = 200
"""Bootstrap draws of held-out patients."""

ROUTES = ("scratch", "pretrained", "low")
EPSILONS = ("0", "1", "8", "inf")
"""Nothing is learned from the cohort at 0: the public weights as they are."""
COHORTS: dict[str, dict[str, Any]] = {
    "phantoms": {
        "source": "phantoms",
        "patient": "participant_id",
        "modality": "T1w",
        "conditions": {"diagnosis": {"kind": "categorical", "categories": ["control", "atrophy"]}},
        "grid": [32, 32, 32],
        "spacing_mm": [6, 6, 6],
        "holdout": 0.35,
        "view": "grid",
    },
    "hippocampus": {
        "source": "${SYNTHMED_REAL_DATA}/hippocampus",
        "patient": "subject_group",
        "modality": "T1w",
        "conditions": {
            "volume_class": {"kind": "categorical", "categories": ["small", "medium", "large"]}
        },
        "grid": [40, 56, 40],
        "spacing_mm": [1, 1, 1],
        "holdout": 0.43,
        "view": "grid",
    },
}
DECLARED = {"phantoms": 170, "hippocampus": 70}
"""Patients to train on, about, as a public figure."""
PUBLIC_SPACING = {"phantoms": [6, 6, 6], "hippocampus": [4.5, 4.5, 4.5]}
"""Voxels that phantoms are read with for the public weights of each cohort, in mm."""
STEPS = {"phantoms": (100, 40), "hippocampus": (50, 20)}
"""Private steps from scratch and from public weights: what some ten minutes on one core allow."""
PUBLIC_STEPS = {"phantoms": 1000, "hippocampus": 600}
"""That the public weights are trained for."""
COEFFICIENTS = {
    "1": {"coefficients": 8, "shift_coefficients": 3, "map_coefficients": 4},
    "8": {"coefficients": 512, "shift_coefficients": 6, "map_coefficients": 12},
    "inf": {"coefficients": 512, "shift_coefficients": 512, "map_coefficients": 512},
}
"""Of the spectral Gaussian: what noise leaves of it."""
CVAE: dict[str, Any] = {"name": "cvae", "latent": 8, "widths": [8, 16]}


def settings(route: str, epsilon: str, cohort: str, public: Path) -> dict[str, Any]:
    """Backbone, training and promise of a cell."""
    private = epsilon not in ("0", "inf")
    prior = {"prior": "fitted" if epsilon == "inf" else "standard"}
    promise: dict[str, Any] = {"epsilon": float(epsilon), "delta": DELTA, "at_once": 16}
    promise["patients"] = DECLARED[cohort]
    rate = {"learning_rate": 2e-3}
    if route == "low":
        backbone: dict[str, Any] = {"name": "spectral"} | COEFFICIENTS[epsilon]
        train: dict[str, Any] = {"max_steps": 20}
        promise |= {"sample_rate": 1.0, "clip": 0.03, "draws": 1}
    elif route == "scratch":
        backbone, train = CVAE | prior, {"max_steps": STEPS[cohort][0], "optimizer": rate}
        promise |= {"sample_rate": 0.5, "clip": 0.1, "draws": 1}
    else:
        backbone = CVAE | prior
        train = {
            "max_steps": STEPS[cohort][1],
            "optimizer": rate,
            "init": str(public),
            "trainable": "norms_and_conditions",
        }
        promise |= {"sample_rate": 1.0, "clip": 0.02, "init_is_public": True}
        promise["draws"] = 2 if cohort == "phantoms" else 1
    if not private:
        train |= {"max_steps": 600 if route != "low" else 200, "batch_patients": 16}
        if route == "pretrained":
            train["trainable"] = "all"
        if epsilon == "0":  # a step that moves nothing
            train |= {"max_steps": 1, "optimizer": {"learning_rate": 1e-12}}
    return {"backbone": backbone, "train": train, "privacy": promise if private else None}


def configured(cohort: str, route: str, epsilon: str, place: Path, count: int) -> Config:
    """The config of a cell; its phantoms and public weights lie in `place`."""
    data = dict(COHORTS[cohort])
    if data["source"] == "phantoms":
        data["source"] = str(place / "phantoms")
    tree = {
        "data": data,
        **settings(route, epsilon, cohort, place / f"public-{cohort}"),
        "sample": {"count": count},
        "evaluate": {"resamples": 200},
        "export": {"name": f"{cohort} {route}"},
    }
    return configfile.validate(tree, "utility")


def phantoms(folder: Path, patients: int, grid: int, seed: int) -> None:
    """Write phantoms where there are none, with thirds of the ventricles as a label: weights of the
    same shapes need as many categories."""
    if not (folder / "participants.tsv").is_file():
        subprocess.run(
            [
                *(sys.executable, str(ROOT / "sample_data" / "phantoms.py"), str(folder)),
                *("--patients", str(patients), "--grid", str(grid), "--seed", str(seed)),
            ],
            check=True,
            capture_output=True,
        )
        file = folder / "participants.tsv"
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = list(csv.DictReader(lines, delimiter="\t"))
        sizes = np.array([float(r["ventricles_mm3"]) for r in rows])
        third = np.searchsorted(np.quantile(sizes, [1 / 3, 2 / 3]), sizes)
        for row, k in zip(rows, third, strict=True):
            row["volume_class"] = ("small", "medium", "large")[k]
        with file.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def public(cohort: str, place: Path) -> Part:
    """Public weights for a cohort, trained on phantoms of another seed."""
    data = COHORTS[cohort] | {
        "source": str(place / "pretrain"),
        "patient": "participant_id",
        "spacing_mm": PUBLIC_SPACING[cohort],
        "holdout": 0.1,
    }
    config = configfile.validate(
        {
            "data": data,
            "backbone": CVAE | {"prior": "standard"},
            "privacy": None,
            "train": {
                "max_steps": PUBLIC_STEPS[cohort],
                "optimizer": {"learning_rate": 2e-3},
            },
            "export": {"name": "Phantom heads for pretraining"},
        },
        "utility",
    )
    folder = place / f"public-{cohort}"
    return Part(cohort, config.backbone.name, config, folder, result=folder / "training.json")


def classified(part: Part) -> dict[str, Any]:
    """auc_tstr and auc_trtr: a classifier of the samples, and of real training scans, on held-out
    patients, with a bootstrap interval by patient.

    Area under the curve, one against the rest, mean over the categories; logistic regression on
    the principal components of block averages; one scan a patient.
    """
    dataset = part.dataset()
    cohort = Cohort.open(part.folder / "private" / DRAWN)
    (name,) = part.config.data.conditions
    made_up = synthetic.read(cohort.samples, [cohort.path] * len(cohort.samples), dataset.channels)[
        :, 0
    ]
    told = np.array([str(s.labels[name]) for s in cohort.samples])
    train, test = (_firsts(dataset, side) for side in (False, True))
    real = dataset.volumes[:, 0].astype(np.float32)
    labels = np.array([str(x[name]) for x in dataset.labels])
    held_out, truth = _small(real[test]), labels[test]
    out: dict[str, Any] = {}
    for key, x, y in (
        ("auc_tstr", _small(made_up), told),
        ("auc_trtr", _small(real[train]), labels[train]),
    ):
        scores, classes = _scores(x, y, held_out)
        out[key] = _auc(scores, classes, truth)
        rng = np.random.default_rng(0)
        some = [rng.integers(0, len(truth), len(truth)) for _ in range(DRAWS)]
        drawn = [_auc(scores[i], classes, truth[i]) for i in some if len(set(truth[i])) > 1]
        out[f"{key}_ci"] = [float(np.quantile(drawn, q)) for q in (0.025, 0.975)]
    return out


def _firsts(dataset: Dataset, holdout: bool) -> list[int]:
    """Row of the first scan of each patient of a side."""
    rows: dict[str, int] = {}
    for i, patient in enumerate(dataset.patients):
        if bool(dataset.holdout[i]) == holdout:
            rows.setdefault(str(patient), i)
    return list(rows.values())


def _small(volumes: Any) -> Any:
    size = [min(SIDE, n) for n in volumes.shape[1:]]
    return block_means(np.asarray(volumes, np.float64)[:, None], size).reshape(len(volumes), -1)


def _scores(x: Any, y: Any, test: Any) -> tuple[Any, list[str]]:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    reader = make_pipeline(
        StandardScaler(),
        PCA(min(30, len(x) // 3), svd_solver="full", whiten=True),
        LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000),
    ).fit(x, y)
    return reader.predict_proba(test), [str(c) for c in reader.classes_]


def _auc(scores: Any, classes: Sequence[str], truth: Any) -> float:
    from sklearn.metrics import roc_auc_score

    each = [
        roc_auc_score(truth == c, scores[:, k])
        for k, c in enumerate(classes)
        if 0 < (truth == c).sum() < len(truth)
    ]
    return float(np.mean(each))


def cell(part: Part, asked: str) -> dict[str, Any]:
    """All figures of a cell, written to its file."""
    public_home(part.folder.with_name(f"{part.folder.name}-home"))
    result = made(part, apart)
    result |= apart(classified, part)
    model = json.loads((part.folder / "private/model/manifest.json").read_text(encoding="utf-8"))
    result |= {
        "asked": asked,
        "n_trained": model["facts"]["n_trained"],
        "privacy": _told(model["facts"]),
    }
    write_json(part.result, result)
    return result


def _asked(asked: str, result: Mapping[str, Any]) -> bool:
    return bool(result["asked"] == asked)


def _told(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    stated = facts["privacy"]
    keys = ("epsilon", "delta", "steps", "sample_rate", "noise_multiplier", "clip")
    return stated and {k: stated[k] for k in keys}


def table(found: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """A table a cohort: a route and an epsilon a row.

    Under a promise the split is by a keyed hash alone, without one it is stratified, so that the
    people and the controls are each row's own.
    """
    texts = []
    for cohort in dict.fromkeys(c for c, _, _ in found):
        lines = [
            f"{cohort}: people to train on and held out; parameters that are trained; in brackets "
            "the 95 % interval, after it what real data give: mmd2's ceiling (its floor is 0), "
            "condition_accuracy of held-out scans, auc_trtr.",
            "",
            "| route | epsilon | people | trained | mmd2 | condition_accuracy | auc_tstr |",
            "|---|---|---|---|---|---|---|",
        ]
        for (name, route, epsilon), x in found.items():
            if name == cohort:
                mmd2, told = (estimate(x, n) for n in ("mmd2", "condition_accuracy"))
                if mmd2 is None or told is None:
                    raise ValueError(f"{cohort}: a cell has no mmd2, or no condition_accuracy")
                lines.append(
                    f"| {route} | {epsilon} | {x['n_train']}, {x['n_holdout']} | {x['n_trained']} "
                    f"| {value(mmd2, interval=True)}, {number(mmd2['ceiling'])} "
                    f"| {value(told, interval=True)}, {number(told['floor'])} "
                    f"| {x['auc_tstr']:.2f} [{_pair(x['auc_tstr_ci'])}], {x['auc_trtr']:.2f} |"
                )
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def _pair(limits: Sequence[float]) -> str:
    return ", ".join(f"{v:.2f}" for v in limits)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the cells that are missing, print the table and put it into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cohorts", nargs="+", default=list(COHORTS), choices=list(COHORTS))
    parser.add_argument("--routes", nargs="+", default=list(ROUTES), choices=ROUTES)
    parser.add_argument("--epsilons", nargs="+", default=list(EPSILONS), choices=EPSILONS)
    parser.add_argument("--count", type=int, default=100, help="samples of a cell")
    parser.add_argument("--patients", type=int, default=260, help="phantoms of the cohort")
    parser.add_argument("--public-patients", type=int, default=600, help="phantoms to pretrain on")
    parser.add_argument("--out", type=Path, default=Path("runs/utility"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file a cell")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    place = options.out.resolve()
    place.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    phantoms(place / "phantoms", options.patients, 32, seed=0)
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cohort in options.cohorts:
        for route in options.routes:
            for epsilon in options.epsilons:
                if epsilon == "0" and route != "pretrained":
                    continue
                name = f"{cohort}-{route}-{epsilon}"
                config = configured(cohort, route, epsilon, place, options.count)
                part = Part(
                    cohort=cohort,
                    model=config.backbone.name,
                    config=config,
                    folder=place / name,
                    result=options.results.resolve() / f"{name}.json",
                )
                asked = digest(
                    [
                        COHORTS[cohort],
                        settings(route, epsilon, cohort, Path("public")),
                        options.count,
                    ]
                )
                done = kept(part.result, partial(_asked, asked))
                print(f"{name}{'' if done is None else ': kept'}", file=sys.stderr)
                if done is None and route == "pretrained":
                    phantoms(place / "pretrain", options.public_patients, 48, seed=11)
                    public_home(place / "public-home")
                    for step in (prepared, trained):
                        apart(step, public(cohort, place))
                found[cohort, route, epsilon] = done or cell(part, asked)
    text = f"`python tests/benchmarks/utility.py`:\n\n{table(found)}"
    publish(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SynthmedError as error:
        sys.exit(str(error))
