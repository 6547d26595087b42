"""Source to catalogue: every file is used, auxiliary, or in the quarantine with its reason.

What is kept of a scan is voxels, geometry, declared labels, allow-listed scanner fields and
pseudonyms. A process has one scan in memory at a time, and the order of everything is that of
sorted pseudonyms or paths, never the file system's.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthmed.artifacts import Scan
from synthmed.config import Config
from synthmed.configfile import source_folder
from synthmed.deid import deface, pixels
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import InputError, UsageError
from synthmed.formats import candidates, selection, tables
from synthmed.formats.candidates import Plan
from synthmed.formats.listing import Kind, Listing, is_auxiliary, kind, walk
from synthmed.formats.quarantine import Quarantine, listed
from synthmed.formats.refusal import Refused, quiet
from synthmed.privacy.ledger import Ledger
from synthmed.stages import fetch
from synthmed.stages.reading import Progress, Reader, Reading, how_many

SPLITS = ("train", "holdout")
MIN_PATIENTS = 10
"""Fewer are no cohort."""


def ingest(
    config: Config,
    target: Path,
    *,
    work: Path | None = None,
    progress: Progress | None = None,
    min_patients: int = MIN_PATIENTS,
    use_split: bool = False,
    allow_copies: bool = False,
) -> dict[str, Any]:
    """Fill `target` with catalogue.jsonl, volumes/ and quarantine.tsv, and tell what was found.

    With `data.faces: remove` there are faces.tsv and faces/ too, which show what was removed.

    Guarantee: equal sources, configs and pseudonym keys give equal bytes. Only quarantine.tsv
    holds names that came from the source.

    Args:
        target: an empty folder.
        work: a folder of its own for what is fetched, where the source is a PACS; the caller
            removes it.
        progress: called with (done, total).
        min_patients: fewer usable patients are an error; quarantine.tsv is there all the same.
        use_split: carry the table's column `split` (`SPLITS`) to the scans.
        allow_copies: keep scans with the same voxels, as a cohort under test may have. Under
            differential privacy they are kept as well: one person's must not remove another's.

    Returns:
        Counts for the manifest and the report; no identity is in them.

    Raises:
        InputError: no such folder, nothing usable in it, too few patients, or a condition that
            nobody has a value for.
        UsageError: the config names a column that is not there or asks for a part that is not
            installed, or `target` is in the source.
        ResourceError: the volumes or the pseudonym key cannot be written.
    """
    config, listing = _listing(config, work, progress)
    target = target.resolve()
    if target.is_relative_to(listing.root):
        raise UsageError(
            "the run folder lies inside data.source: its volumes would be taken for patients",
            "Choose another place with --run.",
        )
    if config.data.text != "keep":
        pixels.ready()  # said before anything is read
    if config.data.faces == "remove":
        deface.ready()
    pseudonyms = Pseudonyms.load()
    quarantine = Quarantine()
    with quiet():
        kinds, n_auxiliary = _sort_files(listing, quarantine)
        plan = candidates.find(config.data, listing, kinds)
        if use_split:
            _check_split(plan)
        _leave_out(plan, pseudonyms, Ledger(names=pseudonyms).forgotten)
        for path, reason, person in plan.refused:
            quarantine.add(path, reason, pseudonyms.patient(person) if person else "")
        reading = Reading(
            Reader(
                config.data.channels or {},
                target,
                use_split,
                config.data.text,
                config.data.faces == "remove",
                plan.form == "dicom",
                config.data.flat,
            ),
            pseudonyms,
            quarantine,
            target,
            allow_copies,
            config.privacy is not None,
            # the network that looks for brains uses all cores itself
            1 if config.data.faces == "remove" else how_many(listing, plan.candidates),
        )
        scans = reading.scans(plan.candidates, progress)
    lines = [scan.model_dump_json() + "\n" for scan in scans]
    (target / "catalogue.jsonl").write_text("".join(lines), encoding="utf-8")
    quarantine.write(target / "quarantine.tsv", listing.names)
    if config.data.faces == "remove":
        (target / "faces.tsv").write_text(deface.table(scans), encoding="utf-8")
    n_files = len(listing.sizes) + len(listing.refused)
    n_patients = len({scan.patient for scan in scans})
    _check_enough(n_files, n_patients, min_patients, quarantine)
    for name in config.data.conditions:
        if not any(name in scan.labels for scan in scans):
            raise InputError(
                f"data.conditions.{name}: no usable scan has a value for it",
                "Check the column in the table, or take the condition out.",
            )
    return {
        "format": plan.form,
        "modality": config.data.modality,
        "n_files": n_files,
        "n_bytes": sum(listing.sizes.values()),
        "n_auxiliary": n_auxiliary,
        **tally(scans, quarantine.counts(), config.data.conditions),
        "n_undeclared_mask_voxels": dict(sorted(reading.undeclared.items())),
        "n_mask_voxels_removed": dict(sorted(reading.removed.items())),
        "text": config.data.text,
        "n_ids_alike": ids_alike({c.person for c in plan.candidates}),
        **plan.facts,
    }


def ids_alike(people: Iterable[str]) -> int:
    """How many ids differ from another in case, leading zeros, blanks or a `.0` alone.

    A spreadsheet changes them so, and one person would be on both sides of the split.

    >>> ids_alike(["0001", "1", "1.0", "a01", "A1", "B 2"])
    5
    """
    plain = Counter(
        re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"\s", "", p).removesuffix(".0")).casefold()
        for p in people
    )
    return sum(n for n in plain.values() if n > 1)


def tally(
    scans: Sequence[Scan], reasons: Mapping[str, int], conditions: Collection[str]
) -> dict[str, Any]:
    """The facts that follow from what a catalogue holds and its reasons for the rest."""
    unknown = {c: sum(c not in scan.labels for scan in scans) for c in conditions}
    return {
        "n_scans": len(scans),
        "n_patients": len({scan.patient for scan in scans}),
        "n_quarantined": sum(reasons.values()),
        "reasons": dict(reasons),
        "orientations": dict(sorted(Counter(scan.orientation for scan in scans).items())),
        "n_labels_missing": {name: n for name, n in unknown.items() if n},
        "n_text_masked": sum(scan.text_masked for scan in scans),
        **deface.tally(scans),
    }


def check_standing(scans: Sequence[Scan], run: Path) -> None:
    """See that the catalogue that a run has may still be used.

    Raises:
        UsageError: it holds somebody who was forgotten since.
        InputError: too few patients are left in it.
    """
    if n := len({scan.patient for scan in scans} & Ledger().forgotten):
        raise UsageError(
            f"run {run}: holds {n} of those who were forgotten",
            f"Take them out: `synthmed forget --in {run}`.",
        )
    if (n := len({scan.patient for scan in scans})) < MIN_PATIENTS:
        raise InputError(
            f"run {run}: {n} of at least {MIN_PATIENTS} patients are left in it",
            "Add patients to data.source, and pass --overwrite.",
        )


def _leave_out(plan: Plan, pseudonyms: Pseudonyms, forgotten: Collection[str]) -> None:
    """Refuse all that is of people who were forgotten; nothing is noted down of them but that."""

    def gone(person: str) -> bool:
        return bool(person and forgotten) and pseudonyms.patient(person) in forgotten

    reason = Refused("forgotten")
    plan.refused = [(p, reason, "") if gone(who) else (p, r, who) for p, r, who in plan.refused]
    for candidate in plan.candidates:
        if gone(candidate.person):
            plan.refuse(candidate.files, reason)
    plan.candidates = [c for c in plan.candidates if not gone(c.person)]


def look(
    config: Config, all_descriptions: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """What a DICOM source holds and what would become of it; headers are read, nothing is written.

    What a PACS holds is fetched into a temporary folder, which is removed.

    Args:
        config: says what is wanted.
        all_descriptions: show free text that few people share.
        progress: called with (done, total) files that are fetched.

    Returns:
        `volumes`, rows of what looks alike, and `refused`, counts of other files by reason.

    Raises:
        InputError: no such folder, or no DICOM file in it.
        UsageError: the config names a column that is not there.
    """
    with tempfile.TemporaryDirectory(prefix="synthmed-look-") as work, quiet():
        quarantine = Quarantine()
        config, listing = _listing(config, Path(work), progress)
        kinds, _ = _sort_files(listing, quarantine)
        plan = candidates.find(config.data, listing, kinds)
        seen = [s for v in plan.volumes for s in selection.seen(*v)]
    if plan.form != "dicom" or "dicom" not in kinds.values():
        raise InputError(
            f"data.source {config.data.source}: no DICOM file in it",
            "NIfTI files are chosen by their table; synthmed plan says what they are.",
        )
    of_volumes = {s.path for volume, _, _ in plan.volumes for s in volume.slices}
    for path, reason, _ in plan.refused:
        if path not in of_volumes:
            quarantine.add(path, reason)
    return {
        "volumes": selection.table(seen, all_descriptions),
        "refused": quarantine.counts(),
    }


def source_fingerprint(config: Config) -> str | None:
    """What the source holds: a digest under the pseudonym key, so that no name can be tested.

    It covers the relative names and sizes of all files and the bytes of the tables; voxels that
    change while the size of their file stays are not seen. Of a PACS it covers the address and the
    table, and None is where that table is gone.

    Raises:
        InputError: the source is missing or no folder.
    """
    if source_folder(config) is None:
        held = fetch.fingerprint(config)
        return None if held is None else Pseudonyms.load().digest("source", held)
    _, listing = _listing(config)
    seen = hashlib.sha256()
    for path, size in listing.sizes.items():
        seen.update(f"{path}\0{size}\0".encode("utf-8", "surrogateescape"))
        if path.lower().endswith((".tsv", ".csv")) and size <= tables.MAX_BYTES:
            try:
                seen.update(hashlib.sha256(listing.path(path).read_bytes()).digest())
            except OSError:
                seen.update(b"unreadable")
    for path, reason in listing.refused.items():
        seen.update(f"{path}\0{reason.code}\0".encode("utf-8", "surrogateescape"))
    return Pseudonyms.load().digest("source", seen.digest())


def _listing(
    config: Config, work: Path | None = None, progress: Progress | None = None
) -> tuple[Config, Listing]:
    """The source's files, fetched into `work` from a PACS, and the config to read them with."""
    source = source_folder(config)
    if source is None:
        if work is None:
            raise UsageError("data.source: an address, expected a folder")
        return fetch.fetch(config, work, progress)
    remedy = "Set it to the folder that holds the cohort, or pass --input FOLDER."
    if not source.exists():
        raise InputError(f"data.source {source}: no such folder", remedy)
    if not source.is_dir():
        raise InputError(f"data.source {source}: a file, expected a folder", remedy)
    listing = walk(source)
    if not listing.sizes and not listing.refused:
        raise InputError(f"data.source {source}: the folder is empty", remedy)
    return config, listing


def _sort_files(listing: Listing, quarantine: Quarantine) -> tuple[dict[str, Kind], int]:
    """What each file is, and how many are auxiliary; what is no image is quarantined."""
    for path, reason in listing.refused.items():
        quarantine.add(path, reason)
    kinds = {path: kind(listing, path) for path in listing.sizes if not is_auxiliary(path)}
    for path, found in kinds.items():
        if found == "other":
            quarantine.add(path, Refused("not_an_image"))
    return kinds, len(listing.sizes) - len(kinds)


def _check_split(plan: Plan) -> None:
    """Refuse sides that are not known: members and strangers would be mixed up."""
    n = sum(c.split not in (None, *SPLITS) for c in plan.candidates)
    if n:
        raise UsageError(
            f"column split: {n} scans are neither {' nor '.join(SPLITS)}",
            "Say for each whether it was trained on, or take the column out.",
        )


def _check_enough(n_files: int, n_patients: int, wanted: int, quarantine: Quarantine) -> None:
    """Refuse a source with too few patients, saying why files were refused."""
    if n_patients and n_patients >= wanted:
        return
    found = f"no usable scan in {n_files} files"
    if n_patients:
        found = f"{n_patients} of at least {wanted} patients have a usable scan"
    counts = quarantine.counts()
    remedy = "quarantine.tsv, which `synthmed ingest` leaves, names each refused file and why."
    if counts and next(iter(counts)) == "not_in_table":
        remedy = "Add a participants.tsv with a column image, or BIDS folders; see quarantine.tsv."
    raise InputError(
        f"data.source: {found}; refused: {quarantine.summary()}",
        remedy,
    )


def summary(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    text = f"{facts['n_scans']} scans of {facts['n_patients']} patients"
    reasons = dict(facts["reasons"])
    other = reasons.pop("not_requested", 0)
    if reasons:
        text += f"; {sum(reasons.values())} refused ({listed(reasons)})"
    if other:
        text += f"; {other} files not asked for"
    if alike := facts.get("n_ids_alike", 0):  # of a run by an earlier version not known
        text += f"; {alike} ids differ in case or zeros alone: people under two names?"
    if masked := facts["n_text_masked"]:
        text += f"; text painted over in {masked} scans"
    if "n_faces_removed" in facts:
        text += f"; faces removed from {facts['n_faces_removed']}"
    if missing := facts["n_labels_missing"]:
        lacking = ", ".join(f"{n} without {name}" for name, n in missing.items())
        text += f"; kept with labels missing: {lacking}"
    return text
