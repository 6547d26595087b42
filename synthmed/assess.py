"""Evidence and a decision for a cohort that any other tool has made: `synthmed assess`.

Both folders go through the same ingest and prepare as a run of our own, and the same screen,
metrics and policy judge them; only what a model would be needed for (replacing copies) is left
out. Volumes stay in private/: what may leave is the report alone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from synthmed import ages, configfile, policy, store
from synthmed.artifacts import Catalogue, Cohort, Dataset, Sample, Scan, ScreenedCohort
from synthmed.config import CATEGORY, Condition, Config
from synthmed.deid.foreign import naming
from synthmed.errors import InputError, UsageError
from synthmed.formats import synthetic as synthetic_files
from synthmed.inventory import versions
from synthmed.pipeline import verify_features
from synthmed.progress import Progress
from synthmed.stages import evaluate, release, screen
from synthmed.stages.identifiers import SourceNames, source_names, telling
from synthmed.stages.ingest import ingest
from synthmed.stages.lines import Elsewhere
from synthmed.stages.prepare import channels_of, conform, prepare
from synthmed.stages.sample import write_samples
from synthmed.store import Run
from synthmed.types import Decision

MAX_SIDE = 64
"""Without a config, volumes are compared on at most this many voxels a side."""

MARK = "assessed.json"
"""Marks a folder as the result of an assessment, which the next one may replace."""


def assess(
    real: Path,
    synthetic: Path,
    out: Path,
    patient: str | None = None,
    holdout: Path | None = None,
    config: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> Decision:
    """Judge `synthetic` against `real` and write evidence and reports to `out`.

    Args:
        real: folder of scans with participants.tsv; a column `split` says who was trained on.
        synthetic: folder of scans likewise.
        out: new folder, or the result of an earlier assessment.
        patient: column that names one person; by default patient, subject_group or participant_id.
        holdout: folder of scans of people never trained on.
        config: a config whose data, evaluate and policy parts apply; else channels, conditions
            and grid are taken from what both tables and the scans have in common.
        seed: of all resampling.
        device: torch device that compares images with images.
        quiet: no progress.

    Raises:
        UsageError: `out` holds something else, or the config makes a promise of privacy, which
            what is written to leave the house would break.
        InputError: a folder holds nothing usable, or a person is on both sides.
    """
    for given in (real, synthetic, *([holdout] if holdout else [])):
        if not given.is_dir():
            raise InputError(f"{given}: no such folder", "Check the path.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise UsageError(
            f"--out {out}: holds files that no assessment wrote", "Choose a new folder."
        )
    chosen = _config([real, synthetic, *([holdout] if holdout else [])], config, patient, seed)
    verify_features(chosen)
    policy.verify(chosen)
    run = Run(out)
    with run.lock():
        store.write_json(out / MARK, {"schema_version": 1})
        # from here on it holds patients: `forget` and `purge` know a run by its config
        store.write_bytes(out / "config.yaml", configfile.dump(chosen).encode())
        run.discard("catalogue")
        chosen, left_out = _catalogue(run, chosen, holdout, quiet, given=config is not None)
        data = _dataset(run, chosen, quiet)
        cohort, unread = _cohort(run, chosen, synthetic, data, quiet)
        store.write_bytes(out / "config.yaml", configfile.dump(chosen).encode())
        progress = Progress("screen", quiet)
        with run.writing("screening", "", {}, facts := {}) as target:
            facts.update(screen.screen(chosen, data, cohort, None, target, progress, device))
        progress.done(screen.summary(facts))
        folder = run.folder("screening")
        shipped = ScreenedCohort.open(cohort, folder)
        judged = chosen if config is not None else _as_synthetic(chosen, cohort)
        people = [real, *([holdout] if holdout else [])]
        not_shown = config is None and _not_shown(judged, people, synthetic)
        progress = Progress("evaluate", quiet)
        with run.writing("evidence", "", {}, measured := {}) as target:
            copies = screen.read_copies(folder)
            measured.update(
                evaluate.evaluate(judged, data, shipped, copies, target, progress, device)
            )
        progress.done(evaluate.summary(measured))
        about = {
            **run.require("dataset").manifest.facts,
            **facts,
            "n_synthetic": len(shipped.samples),
            "seed": chosen.seed,
            "versions": versions(),
            "digests": {
                kind: run.require(kind).digest() for kind in store.FOLDER if kind != "model"
            },
        }
        sources = [chosen, *([_at(chosen, holdout)] if holdout else [])]
        names = reduce(or_, map(source_names, sources))
        named = _naming(run, synthetic, names)
        return release.release(
            run,
            judged,
            release.Grounds(
                evaluate.read_estimates(run.folder("evidence")),
                elsewhere=Elsewhere(left_out + unread, *named, names.complete, not_shown),
            ),
            shipped,
            about,
            real=data,
            names=names,
            with_volumes=False,
        )


def _config(
    folders: Sequence[Path], config: str | None, patient: str | None, seed: int | None
) -> Config:
    """The config to judge by: the one named, or one made of what the tables share.

    Args:
        folders: real, synthetic, and of people held out if there is one.
    """
    real = folders[0]
    values: dict[str, Any] = {"data.source": str(real)}
    if patient is not None:
        values["data.patient"] = patient
    if seed is not None:
        values["seed"] = seed
    if config is not None:
        named = configfile.load(configfile.find(config), (), values)
        if named.privacy is not None:
            raise UsageError(
                f"{config}: privacy promises that no figure of these patients leaves, and the "
                "report of an assessment for others states such figures",
                "Read the restricted report of the private run. Or name a config with privacy: "
                "null, and keep all that is written here in the house.",
            )
        return named
    tree: dict[str, Any] = {
        "data": {
            "source": str(real),
            "patient": patient,
            "conditions": shared_labels(folders, patient),
            "missing_labels": "keep",  # a scan without a label may be a copy all the same
            "grid": [MAX_SIDE] * 3,  # until the scans have been seen
        },
        "backbone": {"name": "cvae"},
        "privacy": None,
        "train": {"max_steps": 1},
        "seed": seed or 0,
    }
    return configfile.validate(tree, "of assess")


_NO_LABEL = {"participant_id", "patient", "subject_group", "image", "split", "session_id"}


def shared_labels(folders: Sequence[Path], patient: str | None) -> dict[str, Any]:
    """Conditions made of the columns that every participants.tsv has.

    Two to ten words, some of them in common, are categories, more than ten different numbers a
    range; anything else (an identifier, free text, an age that is not in years) is left alone. They
    are wide enough for all tables, so that no scan is refused for its label: for reading alone, see
    `_as_synthetic`.

    Args:
        folders: real, synthetic, and of people held out if there is one.
        patient: column that names people.
    """
    tables = []
    for folder in folders:
        if (table := _table(folder)) is None:
            return {}
        tables.append(table)
    conditions: dict[str, Any] = {}
    for name in [c for c in tables[0].columns if all(c in t.columns for t in tables)]:
        if name in _NO_LABEL | {patient} or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
            continue
        of = [set(t[name]) - {"", "n/a"} for t in tables]
        values = sorted(set().union(*of))
        numbers = pd.to_numeric(pd.Series(values), errors="coerce")
        if len(values) > 10 and numbers.notna().all():
            # by their middle: one of them may be a slip of the pen
            if ages.doubt(name, "1", float(numbers.median())):
                continue
            conditions[name] = {
                "kind": "continuous",
                "low": float(numbers.min()),
                "high": float(numbers.max()),
                "unit": "years" if ages.named(name) else "1",
            }
        elif (
            2 <= len(values) <= 10
            and set.intersection(*of[:2])
            and all(re.fullmatch(CATEGORY, v) for v in values)
        ):
            conditions[name] = {"kind": "categorical", "categories": values}
    return conditions


def _table(folder: Path) -> pd.DataFrame | None:
    """The folder's participants.tsv as text; null without one, or one that ingest will refuse."""
    file = folder / "participants.tsv"
    if not file.is_file():
        return None
    try:
        return pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    except (ValueError, OSError):
        return None


def _as_synthetic(config: Config, cohort: Cohort) -> Config:
    """The config with the conditions that the synthetic scans show.

    Nobody has declared these conditions, and what is made of them is printed in the report that
    leaves: neither the youngest or oldest real patient nor a category of theirs alone may be in it.
    """
    conditions: dict[str, Condition] = {}
    for name, condition in config.data.conditions.items():
        known = [v for s in cohort.samples if (v := s.labels.get(name)) is not None]
        if condition.kind == "categorical":
            seen = tuple(c for c in condition.categories if c in known)
            conditions[name] = condition.model_copy(update={"categories": seen})
        elif len(set(known)) > 1:
            ends = sorted(map(float, known))
            update = {"low": ends[0], "high": ends[-1]}
            conditions[name] = condition.model_copy(update=update)
    data = config.data.model_copy(update={"conditions": conditions})
    return config.model_copy(update={"data": data})


def _not_shown(judged: Config, real: Sequence[Path], synthetic: Path) -> bool:
    """Whether a column of both sides tells real people apart who are not judged apart.

    A category that no synthetic scan has, under this spelling, or a number that all of them share.

    Args:
        judged: the config with the conditions that are judged.
        real: folder of the real side, and of people held out if there is one.
        synthetic: folder of the other.
    """
    theirs = _table(synthetic)
    for name, condition in shared_labels(real, judged.data.patient).items():
        if theirs is None or name not in theirs.columns:
            continue
        kept = judged.data.conditions.get(name)
        if kept is None or (
            kept.kind == "categorical" and not {*condition["categories"]} <= {*kept.categories}
        ):
            return True
    return False


def _naming(run: Run, folder: Path, names: SourceNames) -> tuple[int, int]:
    """How many synthetic files name people of the source, and how many name files of it.

    Which they are is listed in the house.
    """
    found = naming(folder, telling(names.people), telling(names.files - names.layout))
    rows = [
        f"{path!r}\t{what}\n"
        for what, paths in zip(("a patient", "a file"), found, strict=True)
        for path in paths
    ]
    text = "path\tholds a name of\n" + "".join(rows)
    store.write_bytes(run.folder("cohort") / "naming.tsv", text.encode("utf-8", "backslashreplace"))
    return len(found[0]), len(found[1])


def _left_out(facts: Mapping[str, Any]) -> int:
    """How many real scans that can be read were refused: another tool may have learned from them.

    A file that is damaged can have taught nobody.
    """
    for_labels = ("label_missing", "label_unknown", "label_out_of_range", "label_ambiguous")
    return sum(facts["reasons"].get(reason, 0) for reason in ("not_in_table", *for_labels))


def _unread(facts: Mapping[str, Any]) -> int:
    """How many synthetic files were refused, whatever for, but those that nobody asked for."""
    other = ("not_requested", "not_an_image")
    return sum(n for reason, n in facts["reasons"].items() if reason not in other)


def _catalogue(
    run: Run, config: Config, holdout: Path | None, quiet: bool, given: bool
) -> tuple[Config, int]:
    """Ingest the real side; returns the config with a grid that fits it unless one was given, and
    how many scans were left out."""
    progress = Progress("real", quiet)
    with run.writing("catalogue", "", {}, facts := {}) as target:
        facts.update(ingest(config, target, progress=progress.update, use_split=True))
        scans, left_out = list(Catalogue.open(target).scans), _left_out(facts)
        if holdout is not None:
            scans = [s.model_copy(update={"split": "train"}) for s in scans]
            more, too = _held_out(config, holdout, target, {s.patient for s in scans})
            scans, left_out = scans + more, left_out + too
        elif all(s.split is None for s in scans):
            # nobody said who was trained on: everybody may have been
            scans = [s.model_copy(update={"split": "train"}) for s in scans]
        _write_catalogue(target, scans)
    if config.data.patient is None and "participant_id" in facts["patient_columns"]:
        progress.warn(
            "each participant_id is taken for a person of its own; where somebody has two, name "
            "the column that tells people with --patient, or copies and membership are judged wrong"
        )
    progress.done(f"{len(scans)} scans of {len({s.patient for s in scans})} people")
    return config if given else _on_grid_of(config, scans), left_out


def _held_out(
    config: Config, holdout: Path, target: Path, trained: set[str]
) -> tuple[list[Scan], int]:
    """Ingest the held-out folder into the same catalogue; also how many scans were left out."""
    inside = target / "holdout"
    inside.mkdir()
    facts = ingest(_at(config, holdout), inside, min_patients=1)
    scans = [s.model_copy(update={"split": "holdout"}) for s in Catalogue.open(inside).scans]
    if both := sorted(trained & {s.patient for s in scans}):
        raise InputError(
            f"--holdout: {len(both)} of its people are in REAL too, {both[0]} for one",
            "Held-out people must not have been trained on; take them out of one folder.",
        )
    folders = ("volumes", "faces") if config.data.faces == "remove" else ("volumes",)
    for folder in folders:
        for file in sorted((inside / folder).iterdir()):
            file.rename(target / folder / file.name)
    for table in sorted(inside.glob("*.tsv")):  # quarantine, and faces where they are removed
        table.rename(target / f"{table.stem}-holdout.tsv")
    shutil.rmtree(inside)
    return scans, _left_out(facts)


def _dataset(run: Run, config: Config, quiet: bool) -> Dataset:
    progress = Progress("prepare", quiet)
    with run.writing("dataset", "", {}, facts := {}) as target:
        catalogue = Catalogue.open(run.folder("catalogue"))
        facts.update(prepare(config, catalogue, target, progress))
    progress.done(f"{facts['n_train']} people trained on, {facts['n_holdout']} held out")
    return Dataset.open(run.folder("dataset"))


def _cohort(
    run: Run, config: Config, folder: Path, data: Dataset, quiet: bool
) -> tuple[Cohort, int]:
    """Conform the synthetic folder to the real side's grid and store it as a cohort; also how many
    files were not read."""
    progress = Progress("synthetic", quiet)
    channels = channels_of(config.data)
    with run.writing("cohort", "", {}, facts := {}) as target:
        inside = target / "ingest"
        inside.mkdir()
        found = ingest(
            _at(config, folder), inside, progress=progress.update, min_patients=1, allow_copies=True
        )
        catalogue = Catalogue.open(inside)
        samples = []
        for k, scan in enumerate(sorted(catalogue.scans, key=lambda s: s.scan)):
            names = synthetic_files.volume_names(channels)
            files = {name: f"syn-{k:06d}_{name}.nii.gz" for name in names}
            volume, _ = conform(catalogue, scan, config.data, channels, data.affine)
            synthetic_files.write(target, files, volume, channels, data.affine)
            samples.append(Sample(index=k, labels=dict(scan.labels), files=files))
        (inside / "quarantine.tsv").rename(target / "quarantine.tsv")
        shutil.rmtree(inside)
        write_samples(target / "samples.jsonl", samples)
        facts.update({"n_samples": len(samples), "n_quarantined": found["n_quarantined"]})
    progress.done(f"{len(samples)} synthetic scans")
    return Cohort.open(run.folder("cohort")), _unread(found)


def _on_grid_of(config: Config, scans: Sequence[Scan]) -> Config:
    """The config with the median field of view, on at most `MAX_SIDE` voxels a side."""
    shape = np.median([s.shape for s in scans], axis=0)
    spacing = np.median([s.spacing_mm for s in scans], axis=0)
    factor = max(1.0, float(shape.max()) / MAX_SIDE)
    grid = [max(8, round(float(n) / factor)) for n in shape]
    tree: Mapping[str, Any] = config.model_dump(mode="json")
    place = {"grid": grid, "spacing_mm": [round(float(s) * factor, 4) for s in spacing]}
    return configfile.validate({**tree, "data": {**tree["data"], **place}}, "of assess")


def _at(config: Config, folder: Path) -> Config:
    """The config with another source."""
    data = config.data.model_copy(update={"source": str(folder)})
    return config.model_copy(update={"data": data})


def _write_catalogue(target: Path, scans: Sequence[Scan]) -> None:
    lines = "".join(s.model_dump_json() + "\n" for s in sorted(scans, key=lambda s: s.scan))
    store.write_bytes(target / "catalogue.jsonl", lines.encode())
