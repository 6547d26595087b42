"""Every backbone beside the reference, in docs/benchmarks.md.

    python tests/benchmarks/backbones.py --minutes 60
    python tests/benchmarks/backbones.py --cohorts acdc --models ddpm --curve
    python tests/benchmarks/backbones.py --table-only

Trains each model on each cohort for the same time, draws 100 samples, and measures them with the
run's own metrics on its own held-out patients. Runs and the real cohorts' contact sheets stay in
--out. A part that is done leaves its figures in --results and is not made again, so that the table
can be made in several sittings, and on machines of one kind: the split by patient is the same
everywhere. A real cohort is read from SYNTHMED_REAL_DATA. Minutes become steps at the first ones'
speed, so nothing else should run then, nor while samples are drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from synthmed import configfile
from synthmed.config import Config
from synthmed.deid.pseudonyms import KEY_BYTES, KEY_FILE
from synthmed.errors import SynthmedError
from tests.benchmarks.cohorts import NONE, number, publish
from tests.benchmarks.part import CURVED, HOUSE, LOOK, OUTSIDE, Part, curved, made
from tests.benchmarks.reference import Recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE, CONFIGS = ROOT / "docs" / "benchmarks.md", ROOT / "configs"
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- backbones:begin -->", "<!-- backbones:end -->"
MODELS = (*HOUSE, *OUTSIDE)
COHORTS = ("hippocampus", "acdc")
PHANTOMS = ("quickstart",)
"""Cohorts that are nobody, whose pictures may stand in docs/."""
DONOR = "hippocampus"
"""Whose configs name the backbones, for a cohort that has none of its own."""

PAIRS = (
    ("segmentability", "segmentability"),
    ("dice_tstr [95 %]", "dice_tstr"),
    ("dice_augmented_minus_trtr [95 %]", "dice_augmented_minus_trtr"),
    ("dice_augmented_minus_classical [95 %]", "dice_augmented_minus_classical"),
)
"""Rows of cohorts with masks alone."""
OWN = (
    ("discriminator_auc", "discriminator_auc"),
    ("region_volume_smd [95 %]", "region_volume_smd"),
    ("auc_tstr_minus_trtr [95 %]", "auc_tstr_minus_trtr"),
    ("auc_augmented_minus_trtr [95 %]", "auc_augmented_minus_trtr"),
    ("auc_augmented_minus_classical [95 %]", "auc_augmented_minus_classical"),
    *PAIRS,
)
"""Rows whose controls are a part's own: readers and classifiers taught anew, by what each version
of them learned; both ends over the parts are shown."""
FIGURES = (
    ("mmd2 [95 %]", "mmd2"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("density", "density"),
    ("coverage", "coverage"),
    ("copies", "copies"),
    ("authenticity", "authenticity"),
    ("condition_accuracy", "condition_accuracy"),
    ("membership_auc [95 %]", "membership_auc"),
    *OWN,
)
"""A row and its estimate; a name that ends in [95 %] shows the interval."""

PICKS = 0.005
"""What a control may move by with other picks of one scan a patient."""
SAME = ("dataset", "minutes", "device", "threads", "n_synthetic")
"""What has to be equal for two parts of a cohort to stand in one table."""


def configured(
    cohort: str, model: str, configs: Path = CONFIGS, values: Mapping[str, Any] = {}
) -> Config:
    """The config of a model on a cohort.

    That is COHORT-MODEL.yaml; else the cohort's own (COHORT.yaml, or COHORT-cvae.yaml), with the
    backbone and the training of hippocampus-MODEL.yaml unless it has that backbone already. For a
    model from outside the minutes that are set take the place of a backbone's own limit of steps.

    Args:
        cohort: its name.
        model: its name.
        configs: where they lie.
        values: dotted path to value, set last.
    """
    names = (f"{cohort}-{model}", cohort, f"{cohort}-cvae")
    file = next((f for n in names if (f := configs / f"{n}.yaml").is_file()), configs / names[1])
    config = configfile.load(file)
    borrowed: dict[str, Any] = {}
    if model in HOUSE and config.backbone.name != model:
        donor = configfile.load(configs / f"{DONOR}-{model}.yaml").model_dump(mode="json")
        borrowed = {k: donor[k] for k in ("backbone", "train")}
    elif model in OUTSIDE and "train.max_minutes" in values:
        borrowed = {"train.max_steps": None}
    return configfile.load(file, values=borrowed | dict(values))


def apart(step: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a step in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(step, *arguments).result()


def public_home(folder: Path) -> None:
    """Make SYNTHMED_HOME a folder whose key anyone knows: these cohorts are public, and the split
    depends on the key."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / KEY_FILE
    file.write_bytes(bytes(KEY_BYTES))
    file.chmod(0o600)
    os.environ["SYNTHMED_HOME"] = str(folder)


def kept(file: Path, same: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any] | None:
    """The result of a part that is done; None where it is not.

    Args:
        file: of the result.
        same: whether a result was made as it would be now.

    Raises:
        SynthmedError: what is there was made by another config, time or device.
    """
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not same(result):
        raise SynthmedError(
            f"{file}: made with other settings", "Choose another --results, or remove it."
        )
    return result


def results(folder: Path) -> list[dict[str, Any]]:
    """Every result in a folder."""
    files = sorted(folder.glob("*.json"))
    return [json.loads(f.read_text(encoding="utf-8")) for f in files]


# --- the table ------------------------------------------------------------------------------------


def tables(found: Sequence[Mapping[str, Any]]) -> str:
    """A table a cohort: a figure a row, floor, ceiling and the models its columns.

    Raises:
        ValueError: parts of one cohort were made with other data, times or machines.
    """
    texts = []
    for cohort in dict.fromkeys(sorted((r["cohort"] for r in found), key=_place)):
        parts = [r for r in found if r["cohort"] == cohort]
        parts.sort(key=lambda r: MODELS.index(r["model"]))
        for name in SAME:
            if len({r[name] for r in parts}) > 1:
                raise ValueError(
                    f"{cohort}: parts differ in {name}: "
                    + ", ".join(f"{r['model']} {r[name]}" for r in parts)
                )
        texts.append(f"{heading(parts[0])}\n\n{table(parts)}")
    return "\n\n".join(texts)


def _place(cohort: str) -> tuple[int, str]:
    return (COHORTS.index(cohort) if cohort in COHORTS else len(COHORTS), cohort)


def heading(part: Mapping[str, Any]) -> str:
    """What the columns of a cohort share."""
    return (
        f"{part['cohort']}: {part['n_train']} people to train on, {part['n_holdout']} held out; "
        f"{part['minutes']:g} minutes of training on {part['device']} ({part['threads']} threads), "
        f"{part['n_synthetic']} samples; torch {part['versions']['torch']}"
    )


def table(parts: Sequence[Mapping[str, Any]]) -> str:
    """The figures of one cohort's parts."""
    names = [p["model"] for p in parts]
    lines = ["| | floor | ceiling | " + " | ".join(names) + " |"]
    lines.append("|---|" + "---|" * (len(parts) + 2))
    for row, name in FIGURES:
        estimates = [estimate(p, name) for p in parts]
        if (row, name) in PAIRS and all(e is None for e in estimates):
            continue
        limit = math.inf if (row, name) in OWN else PICKS
        controls = [shared(row, estimates, side, limit) for side in ("floor", "ceiling")]
        cells = [value(e, interval=row.endswith("[95 %]")) for e in estimates]
        lines.append(f"| {row} | " + " | ".join([*controls, *cells]) + " |")
    for row, cell in COSTS.items():
        lines.append(f"| {row} | | | " + " | ".join(cell(p) for p in parts) + " |")
    percents = sorted({int(n) for p in parts for n in p["curve"]})
    for n in percents:
        cells = [look(p["curve"].get(str(n))) for p in parts]
        row = f"mmd2 after {n} % of the time, first {LOOK} samples [95 %] (minutes)"
        lines.append(f"| {row} | | | " + " | ".join(cells) + " |")
    for n in sorted({int(n) for p in parts for n in p["fewer_steps"]}):
        cells = [hurried(p["fewer_steps"].get(str(n))) for p in parts]
        row = f"mmd2 in {n} steps of the sampler, first {LOOK} samples [95 %] (seconds for all)"
        lines.append(f"| {row} | | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def estimate(part: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """An estimate of the whole cohort; None where there is none of that name."""
    found = (e for e in part["estimates"] if e["name"] == name and e["slice"] is None)
    return next(found, None)


def shared(
    row: str, estimates: Sequence[Mapping[str, Any] | None], side: str, limit: float = PICKS
) -> str:
    """A control that all models of a cohort have in common.

    What is averaged over picks of one scan a patient may differ by the limit where parts were
    measured by versions that picked others; then both ends are shown.

    Raises:
        ValueError: they differ by more, so that the parts were not measured alike.
    """
    controls = sorted(e[side] for e in estimates if e is not None and e[side] is not None)
    ends = dict.fromkeys(number(c) for c in controls[:1] + controls[-1:])
    if controls and controls[-1] - controls[0] > limit:
        raise ValueError(f"{row}: the parts do not have one {side}: {', '.join(ends)}")
    return " to ".join(ends) or NONE


def value(e: Mapping[str, Any] | None, interval: bool) -> str:
    """A figure, with its interval where asked for."""
    if e is None or e["value"] is None:
        return NONE
    limits = ", ".join(map(number, e["ci"])) if e["ci"] else NONE
    return f"{number(e['value'])} [{limits}]" if interval else number(e["value"])


def sampling(part: Mapping[str, Any]) -> str:
    """Seconds for all samples; those of the full chain in brackets."""
    times = part["sampling"]
    full = times["ancestral_seconds"]
    return f"{times['seconds']:.3g}" + (f" ({full:.0f})" if full is not None else "")


def minutes(training: Mapping[str, Any]) -> str:
    """Really trained; a dash where that was stopped and went on."""
    seconds = training["seconds"]
    return NONE if seconds is None else f"{seconds / 60:.1f}"


def look(found: Mapping[str, Any] | None) -> str:
    """A point of a curve: mmd2, its interval, and the minutes really trained."""
    return NONE if found is None else f"{value(found, interval=True)} ({minutes(found)})"


def hurried(found: Mapping[str, Any] | None) -> str:
    """The same of a model that samples in fewer steps, and the seconds of that."""
    return NONE if found is None else f"{value(found, interval=True)} ({found['seconds']:.2g})"


COSTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "seconds to sample them": sampling,
    "training steps": lambda p: " + ".join(str(n) for n in p["training"]["steps"]),
    "minutes trained": lambda p: minutes(p["training"]),
    "parameters, M": lambda p: f"{p['training']['n_parameters'] / 1e6:.2f}",
    "peak memory of training, GiB": lambda p: f"{p['training']['peak_bytes'] / 2**30:.2f}",
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cohorts", nargs="+", default=list(COHORTS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training a model")
    parser.add_argument("--max-steps", type=int, help="of training; for a trial of the script")
    parser.add_argument("--count", type=int, default=100, help="samples of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--curve", action="store_true", help="ddpm early, and in fewer steps")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file a part")
    parser.add_argument("--docs", action="store_true", help="phantoms' sheets into docs/images")
    parser.add_argument("--table-only", action="store_true", help="of what --results holds")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="default: configs/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides")
    own = Recipe()
    parser.add_argument("--monai-channels", type=int, nargs="+", default=list(own.channels))
    parser.add_argument("--monai-batch", type=int, default=own.batch)
    parser.add_argument("--ddim-steps", type=int, default=own.ddim_steps)
    parser.add_argument("--ancestral-steps", type=int, default=own.ancestral_steps)
    options = parser.parse_args(arguments)
    people = [c for c in options.cohorts if c not in PHANTOMS]
    if options.docs and people:
        parser.error(f"--docs: {people[0]} is no phantom; its pictures do not leave --out")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the parts that are missing, then print the table and put it into the page."""
    options = parsed(arguments)
    values = {
        "train.max_minutes": options.minutes,
        "sample.count": options.count,
    }
    if options.max_steps is not None:
        values["train.max_steps"] = options.max_steps
    for item in options.overrides:
        path, _, text = item.partition("=")
        values[path] = configfile.parse(text)
    recipe = Recipe(
        channels=tuple(options.monai_channels),
        batch=options.monai_batch,
        ddim_steps=options.ddim_steps,
        ancestral_steps=options.ancestral_steps,
    )
    public_home(options.out.resolve() / "home")
    options.results.mkdir(parents=True, exist_ok=True)
    asked = [(c, m) for c in options.cohorts for m in options.models]
    parts = [
        Part(
            cohort=cohort,
            model=model,
            config=configured(cohort, model, options.configs, values),
            folder=options.out.resolve() / f"{cohort}-{model}",
            result=options.results.resolve() / f"{cohort}-{model}.json",
            device=options.device,
            recipe=recipe,
        )
        for cohort, model in ([] if options.table_only else asked)
    ]
    # all are looked at before one is made
    done = [(part, kept(part.result, part.has_made)) for part in parts]
    for part, result in done:
        print(f"{part.cohort} {part.model}{'' if result is None else ': kept'}", file=sys.stderr)
        result = result or made(part, apart)
        if options.curve and part.model in CURVED and not result["curve"]:
            curved(part, result, apart)
    if options.docs:
        images = options.page.parent / "images"
        images.mkdir(exist_ok=True)
        for part in parts:
            sheet = part.folder / "sheet-small.png"
            if not sheet.exists():
                raise SynthmedError(
                    f"{sheet}: not there, since this part's figures were kept from elsewhere",
                    "Leave out --docs, or make the part anew with another --results.",
                )
            shutil.copyfile(sheet, images / f"{part.folder.name}.png")
    found = results(options.results)
    if not found:
        raise SynthmedError(f"{options.results}: no result yet", "Leave out --table-only.")
    told = "`python tests/benchmarks/backbones.py`, with the minutes that each table names:"
    text = f"{told}\n\n{tables(found)}"
    publish(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SynthmedError as error:
        sys.exit(str(error))
