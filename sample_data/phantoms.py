"""Make a cohort of synthetic T1-weighted heads, as BIDS NIfTI or as DICOM series.

    python sample_data/phantoms.py sample_data/generated/quickstart --check
    python sample_data/phantoms.py OUT --patients 40 --grid 48 --layout dicom --seed 3

The same parameters give the same voxels. ``--help`` lists the options, ``README.md`` next to
this file describes the data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import dicom_files
import nifti_files
import numpy as np
from cohort import Patient, digest, make_patient, make_patients, planted_strings

HERE = Path(__file__).resolve().parent
HASHES = HERE / "hashes.json"
MARKER = "COMPLETE.json"
FORMAT = 1
_STRANGERS = 500  # offset of the people who slip into somebody else's DICOM series


class CohortError(Exception):
    """A cohort that cannot be made or does not match; the message says what to do."""


@dataclass(frozen=True)
class Spec:
    """Parameters of a cohort. ``broken`` patients come on top of ``patients``."""

    layout: str = "bids"
    patients: int = 260
    grid: int = 32
    seed: int = 7
    broken: int = 5

    def key(self) -> str:
        """Name of the cohort in ``hashes.json``."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


QUICKSTART = Spec()
"""The cohort of the quick start, in ``sample_data/generated/quickstart``."""

SAMPLE = {
    "bids": Spec("bids", patients=12, grid=40, seed=1, broken=2),
    "dicom": Spec("dicom", patients=4, grid=40, seed=1, broken=0),
}
"""The committed cohorts, by their folder in ``sample_data``."""


def cohort_people(spec: Spec) -> tuple[list[Patient], list[Patient], list[Patient]]:
    """Good patients, patients with broken files, and people inside another one's series."""
    good, extra = make_patients(spec.seed, spec.patients, spec.broken)
    if spec.layout == "bids":
        return good, extra, []
    strangers = [make_patient(spec.seed, patient.index + _STRANGERS) for patient in extra]
    return good, extra, strangers


def identities(spec: Spec) -> dict[str, list[str]]:
    """Planted strings by participant id (BIDS) or patient id (DICOM), for leak tests."""
    good, extra, strangers = cohort_people(spec)
    people = [*good, *extra]
    if spec.layout == "dicom":
        mixed = dicom_files.BROKEN_KINDS.index("two_patients")
        people += strangers[mixed :: len(dicom_files.BROKEN_KINDS)]
        return {p.identity.patient_id: planted_strings(p, "dicom") for p in people}
    return {p.participant_id: planted_strings(p, "bids") for p in people}


def write_cohort(folder: Path, spec: Spec) -> str:
    """Write a whole cohort and its marker into the empty ``folder``; returns the digest."""
    good, extra, strangers = cohort_people(spec)
    if spec.layout == "bids":
        arrays, rows, broken = nifti_files.write_bids(folder, good, extra, spec.grid)
    else:
        pairs = list(zip(extra, strangers, strict=True))
        arrays, rows, broken = dicom_files.write_dicom(folder, good, pairs, spec.grid)
    value = digest(arrays, rows)
    marker = {"made_by": "phantoms.py", "format": FORMAT, "parameters": asdict(spec)}
    nifti_files.dump_json(folder / MARKER, marker | {"digest": value, "broken_files": broken})
    return value


def read_marker(folder: Path) -> dict | None:
    """The marker of a complete cohort, or None."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def folder_digest(folder: Path) -> str:
    """Digest of the files as they lie in ``folder``, to compare with the marker's."""
    marker = read_marker(folder)
    if marker is None:
        raise CohortError(f"{folder} holds no complete cohort: no readable {MARKER}")
    read = {"bids": nifti_files.read_bids, "dicom": dicom_files.read_dicom}
    return digest(*read[marker["parameters"]["layout"]](folder, marker["broken_files"]))


def published_digest(spec: Spec) -> str | None:
    """Digest of ``spec`` in ``hashes.json``, or None where it lists none."""
    if not HASHES.exists():
        return None
    return json.loads(HASHES.read_text(encoding="utf-8"))["cohorts"].get(spec.key())


def _record(values: dict[str, str]) -> None:
    """Add digests to ``hashes.json``."""
    old = json.loads(HASHES.read_text(encoding="utf-8"))["cohorts"] if HASHES.exists() else {}
    content = {"format": FORMAT, "made_with": {"numpy": np.__version__}}
    nifti_files.dump_json(HASHES, content | {"cohorts": dict(sorted((old | values).items()))})


def _check(folder: Path, spec: Spec, value: str) -> None:
    """Raise unless the files and the published digest both agree with ``value``."""
    try:
        found = folder_digest(folder)
    except CohortError:
        raise
    except Exception as error:
        raise CohortError(
            f"{folder}: a file cannot be read ({error}); make it again with --force"
        ) from error
    if found != value:
        raise CohortError(
            f"{folder}: files changed since they were written (digest {found[:12]}, expected "
            f"{value[:12]}); make it again with --force"
        )
    _check_published(folder, spec, value)


def _check_published(folder: Path, spec: Spec, value: str) -> None:
    published = published_digest(spec)
    if published is not None and published != value:
        raise CohortError(
            f"{folder}: digest {value[:12]} is not the published {published[:12]}. Another "
            f"version of numpy or scipy can do this (here numpy {np.__version__}; see "
            f"{HASHES.name}), and so can an older copy: try --force. Without --check the data "
            "can be used, but published numbers will not be met to the digit"
        )


def make_cohort(out: Path, spec: Spec, check: bool = False, force: bool = False) -> str:
    """Make the cohort in ``out`` unless it is there already; returns one line for the user.

    The files appear all at once: they are written to a sibling folder that takes the name
    ``out`` at the end. Raises ``CohortError`` where ``out`` holds something else.
    """
    marker = read_marker(out)
    if marker is not None and not force:
        if marker.get("format") != FORMAT or marker.get("parameters") != asdict(spec):
            raise CohortError(f"{out} holds a cohort made differently; --force replaces it")
        if check:
            _check(out, spec, marker["digest"])
            return f"{out}: complete and verified ({marker['digest'][:12]})"
        if published_digest(spec) in (None, marker["digest"]):
            return f"{out}: complete, nothing to do ({marker['digest'][:12]})"
        raise CohortError(f"{out}: made by another version of the generator; use --force")
    if marker is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CohortError(f"{out} exists and is not a cohort of this script; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        value = write_cohort(fresh, spec)
        if out.exists():
            out.rename(work / "old")
        fresh.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if check:
        _check(out, spec, value)
    note = "written and verified" if check else "written"
    return f"{out}: {spec.patients} patients, {spec.broken} broken, {note} ({value[:12]})"


def make_sample(check: bool, force: bool) -> list[str]:
    """Make the committed cohorts and their answer key; returns lines for the user."""
    lines = [make_cohort(HERE / name, spec, check, force) for name, spec in SAMPLE.items()]
    key = {name: identities(spec) for name, spec in SAMPLE.items()}
    nifti_files.dump_json(HERE / "identities.json", key)
    return lines


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a cohort of synthetic T1-weighted heads.",
        epilog="The planted identities of OUT are listed in OUT.identities.json.",
    )
    parser.add_argument("out", nargs="?", type=Path, help="folder to make")
    parser.add_argument("--patients", type=int, default=QUICKSTART.patients)
    parser.add_argument("--grid", type=int, default=QUICKSTART.grid, help="voxels an edge, 32-64")
    parser.add_argument("--layout", choices=("bids", "dicom"), default=QUICKSTART.layout)
    parser.add_argument("--seed", type=int, default=QUICKSTART.seed)
    parser.add_argument(
        "--broken", type=int, help="extra patients with broken files (5 for bids, 3 for dicom)"
    )
    parser.add_argument(
        "--check", action="store_true", help="read the files back and compare digests"
    )
    parser.add_argument("--force", action="store_true", help="replace a cohort made earlier")
    parser.add_argument(
        "--sample", action="store_true", help="make the committed sample_data/bids and dicom"
    )
    parser.add_argument(
        "--record", action="store_true", help="enter the digests made into hashes.json"
    )
    args = parser.parse_args(argv)
    if (args.out is None) != args.sample:
        parser.error("give either OUT or --sample")
    if not 32 <= args.grid <= 64:
        parser.error("--grid must be between 32 and 64")
    if args.patients < 1 or args.seed < 0 or (args.broken or 0) < 0:
        parser.error("--patients must be positive, --seed and --broken must not be negative")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv``; returns the exit status."""
    args = _arguments(argv)
    check = args.check and not args.record
    try:
        if args.sample:
            made = {HERE / name: spec for name, spec in SAMPLE.items()}
            lines = make_sample(check, args.force)
        else:
            broken = {"bids": 5, "dicom": 3}[args.layout] if args.broken is None else args.broken
            spec = Spec(args.layout, args.patients, args.grid, args.seed, broken)
            made = {args.out: spec}
            lines = [make_cohort(args.out, spec, check, args.force)]
            key = args.out.with_name(args.out.name + ".identities.json")
            if not key.exists() or args.force:
                partial = key.with_name(f".{key.name}.{os.getpid()}")
                nifti_files.dump_json(partial, identities(spec))
                partial.replace(key)
        if args.record:
            _record({spec.key(): read_marker(out)["digest"] for out, spec in made.items()})
    except CohortError as error:
        print(f"phantoms.py: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
