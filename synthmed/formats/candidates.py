"""What a source offers, before any voxel is read: candidates for scans, and what is refused."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthmed import ages, processes
from synthmed.config import Condition, Data, Select
from synthmed.errors import InputError, UsageError
from synthmed.formats import bids, contrasts, dcm2niix, dicom, nifti, selection, stack, tables
from synthmed.formats.listing import Kind, Listing
from synthmed.formats.nifti import Image
from synthmed.formats.refusal import Refused, quiet
from synthmed.formats.tables import Cells, Table
from synthmed.formats.volumes import Volume, volumes

_HEADER_LABELS = ("age", "sex")
IMPORTS = ("synthmed.stages.reading",)
"""What a process that reads has to import."""
MANY_FILES = 1000
"""From so many files on, headers are read by several processes."""
_DAMAGED = {"reader_died", "header_unreadable", "truncated", "unreadable", "no_pixels"}

Labels = Mapping[str, str | float]


class FileRefused(Exception):
    """One file of a scan was refused, and the scan with it."""

    def __init__(self, path: str, reason: Refused) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Candidate:
    """A scan that may be used.

    Args:
        person: the identity behind its pseudonym.
        visit: tells one session of a person from another and orders them.
        order: orders the scans of a session.
        files: every file it is made of.
        read: its channels, those of DICOM each on its own grid; raises `Refused`, or `FileRefused`
            where one file is at fault. It can be sent to another process.
        labels: the values of the conditions, or why there are none.
        scanner: allow-listed fields.
        split: as the table has it, null where it has none.
        volume: what tells it from others of its series; empty where there is one.
        sequence: milliseconds of repetition, echo and inversion where the header says them.
        drawn: channels whose headers say that text is drawn into their pixels.
    """

    person: str
    visit: tuple[str, ...]
    order: str
    files: tuple[str, ...]
    read: Callable[[], Mapping[str, Image]]
    labels: Labels | Refused
    scanner: Labels = field(default_factory=dict)
    split: str | None = None
    volume: str = ""
    sequence: Mapping[str, float] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()


@dataclass
class Plan:
    """What will be read.

    Args:
        refused: (path, reason, person or "").
        volumes: each of a DICOM source, whose it is, and why it will not be read.
    """

    form: Kind
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[tuple[str, Refused, str]] = field(default_factory=list)
    volumes: list[tuple[Volume, str, Refused | None]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def refuse(self, files: Sequence[str], reason: Refused, person: str = "") -> None:
        """Refuse files that belong together."""
        self.refused += [(path, reason, person) for path in files]

    def refuse_volume(self, volume: Volume, person: str, reason: Refused) -> None:
        """Refuse a volume of a DICOM source."""
        self.volumes.append((volume, person, reason))
        self.refuse(_files(volume.slices), reason, person)


def find(data: Data, listing: Listing, kinds: Mapping[str, Kind]) -> Plan:
    """The scans of a source.

    Args:
        kinds: every file that is not auxiliary to what it is.

    Raises:
        UsageError: the config names a column that is not there.
        InputError: `data.table` cannot be read.
    """
    form = _format(data, listing, kinds)
    plan = Plan(form)
    others = [path for path, kind in kinds.items() if kind not in (form, "other")]
    plan.refuse(others, Refused("not_requested", f"Only {form} files are read here."))
    files = [path for path, kind in kinds.items() if kind == form]
    if not files:
        # what the config asks of tables does not matter where there is no scan at all
        return plan
    if form == "nifti":
        selects = [
            f"data.channels.{n}.select" for n, c in (data.channels or {}).items() if c.select
        ]
        if data.select is not None or selects:
            key = "data.select" if data.select is not None else selects[0]
            raise UsageError(
                f"{key}: it chooses among DICOM series, and the source holds NIfTI files",
                "Choose those by the table, data.modality, or columns or paths of data.channels.",
            )
        _plan_nifti(plan, data, listing, files)
    else:
        strays = [path for path, kind in kinds.items() if kind == "other"]
        # what a PACS did not give may be a slice of what it gave
        strays += [path for path, r in listing.refused.items() if r.code == "not_fetched"]
        _plan_dicom(plan, data, listing, files, strays)
    return plan


def _format(data: Data, listing: Listing, kinds: Mapping[str, Kind]) -> Kind:
    """`data.format`, or what there is; of both, NIfTI where a table or BIDS folders name it."""
    if data.format != "auto":
        return data.format
    there = set(kinds.values()) - {"other"}
    if there != {"nifti", "dicom"}:
        return "dicom" if there == {"dicom"} else "nifti"
    found, _ = tables.participants(listing, data)
    named = any({"image", "participant_id"} & set(t.columns) for t in found)
    return "nifti" if named or bids.implied(listing) else "dicom"


def _plan_nifti(plan: Plan, data: Data, listing: Listing, files: Sequence[str]) -> None:
    """The scans that tables or BIDS folders name."""
    found, unreadable = tables.participants(listing, data)
    if unreadable and not found:
        path, reason = next(iter(unreadable.items()))
        raise InputError(
            f"{posixpath.basename(path)}: {reason.explanation}",
            "It says whose each scan is: save it as UTF-8 text with a first line of column names.",
        )
    for path, reason in unreadable.items():
        plan.refuse([path], reason)
    tables.check_patient(found, data)
    reader = bids.Reader(listing, data, found)
    tables.check_conditions(found, data, more=reader.session_columns())
    used: set[str] = set()
    for wanted in reader.wanted():
        there = [f for f in wanted.files.values() if isinstance(f, str)]
        used.update(there)
        if wanted.person:
            plan.candidates.append(_from_nifti(data, listing, wanted))
        else:
            plan.refuse(there or [wanted.table.path], Refused("patient_missing", "An empty cell."))
    for path in files:
        if path not in used:
            plan.refuse([path], reader.unwanted(path))
    columns = sorted({tables.person_column(t, data) for t in reader.tables})
    plan.facts = {"patient_columns": columns, "n_tables": len(found)}


def _from_nifti(data: Data, listing: Listing, wanted: bids.Wanted) -> Candidate:
    """A scan of NIfTI files."""
    there = {name: f for name, f in wanted.files.items() if isinstance(f, str)}
    missing = {wanted.named[n]: f for n, f in wanted.files.items() if isinstance(f, Refused)}
    return Candidate(
        person=wanted.person,
        visit=wanted.visit,
        order=" ".join(wanted.named.values()),
        files=tuple(there.values()),
        read=_NiftiReader(listing.root, there, missing),
        labels=_labels(data, wanted.cells, wanted.table.decimal_comma),
        split=_split(wanted.cells),
    )


def _plan_dicom(
    plan: Plan, data: Data, listing: Listing, files: Sequence[str], strays: Sequence[str]
) -> None:
    """Every classic MR series; `strays` are files of no known kind, perhaps lost slices."""
    found, column = _checked_tables(data, listing)
    slices: list[dicom.Slice] = []
    damaged = list(strays)
    n = processes.how_many() if len(files) >= MANY_FILES else 1
    headers = processes.spread(_Headers(listing.root), files, n, IMPORTS)
    for path, header in zip(files, headers, strict=True):
        if isinstance(header, list):
            slices += header
            continue
        reason = header if isinstance(header, Refused) else Refused("reader_died")
        plan.refuse([path], reason)
        if reason.code in _DAMAGED:
            damaged.append(path)
    groups = dicom.series(slices)
    incomplete = _perhaps_incomplete(groups, damaged)
    rows = _rows_by_person(found, column)
    wanted: list[tuple[Volume, str]] = []
    for k, group in enumerate(groups):
        person = ""
        try:
            person = dicom.patient(group)
            if k in incomplete:
                raise Refused("missing_slices", "A damaged file beside it may be one of them.")
            # taken for one, a series of volumes is refused by its reader
            every = [Volume("", group.slices)]
            if data.volumes == "split":
                every = volumes(group.slices)
        except Refused as reason:
            plan.refuse(_files(group.slices), reason, person)
            plan.volumes.append((Volume("", group.slices), group.slices[0].who[0], reason))
            continue
        for volume in every:
            if unwanted := selection.unwanted(data.select or Select(), volume):
                plan.refuse_volume(volume, person, unwanted)
            elif data.text != "mask" and _drawn(volume):
                plan.refuse_volume(volume, person, Refused("burned_in", "Its header says so."))
            else:
                wanted.append((volume, person))
    if data.channels is None:
        scans = [(person, {data.modality: volume}) for volume, person in wanted]
    else:
        in_sessions = contrasts.sort(data.channels, wanted)
        scans = in_sessions.scans
        for refused in in_sessions.refused:
            plan.refuse_volume(*refused)
    for person, channels in scans:
        plan.volumes += [(volume, person, None) for volume in channels.values()]
        plan.candidates.append(_from_dicom(data, listing, channels, person, found, rows))
    plan.facts = {
        "patient_columns": [column] if found else ["PatientID"],
        "n_tables": len(found),
        "n_series_regrouped": sum(g.regrouped for g in groups),
    }


def people(data: Data, listing: Listing) -> set[str] | None:
    """The PatientIDs whose DICOM series can be used, as the tables have them; None for all.

    Raises:
        UsageError: the config asks for what DICOM series, or the tables, do not have.
        InputError: `data.table` cannot be read.
    """
    found, column = _checked_tables(data, listing)
    return set(_rows_by_person(found, column)) if _tabled(data, found) else None


def _checked_tables(data: Data, listing: Listing) -> tuple[list[Table], str]:
    """The tables of patients and their column, and all that can be said before a file is read."""
    if data.engine == "dcm2niix":
        dcm2niix.binary()
    for name, channel in (data.channels or {}).items():
        if not channel.select:
            raise UsageError(
                f"data.channels.{name}: a DICOM series is found by no column or path",
                "Say with `select` what it is like, or convert series and masks to NIfTI.",
            )
    found, column = _patient_tables(data, listing)
    tables.check_conditions(found, data, _HEADER_LABELS)
    return found, column


def _tabled(data: Data, found: Sequence[Table]) -> set[str]:
    """The conditions that tables have, so that somebody without a row is nobody's scan."""
    return {c for t in found for c in t.columns} & set(data.conditions)


def _lacking(header: Cells, cells: Cells) -> dict[str, str]:
    """What a header says where a row has nothing."""
    return {name: text for name, text in header.items() if tables.says_nothing(cells.get(name, ""))}


def _age(years: float | None, condition: Condition | None) -> str:
    """A header's age as a cell of a table in the unit that is declared."""
    if years is None or condition is None or condition.kind != "continuous":
        return ""
    return f"{years * (ages.per_year(condition.unit) or 1):g}"


def _from_dicom(
    data: Data,
    listing: Listing,
    channels: Mapping[str, Volume],
    person: str,
    found: Sequence[Table],
    rows: Mapping[str, Sequence[tuple[Cells, bool]]],
) -> Candidate:
    """A scan of one volume for each channel."""
    volume = next(iter(channels.values()))
    first = volume.slices[0]
    header = {"age": _age(first.age, data.conditions.get("age")), "sex": first.sex or ""}
    own = rows.get(person, ())
    labels: Labels | Refused
    if _tabled(data, found) and not own:
        labels = Refused("not_in_table", "No row has its PatientID.")
    else:
        every = [
            _labels(data, {**cells, **_lacking(header, cells)}, comma)
            for cells, comma in own or [({}, False)]
        ]
        labels = every[0]
        if not isinstance(labels, Refused) and any(other != labels for other in every):
            labels = Refused("label_ambiguous")
    splits = {_split(cells) for cells, _ in own}
    return Candidate(
        person=person,
        visit=first.study,
        order=f"{first.number or 0:09d} {first.series} {first.path} {volume.name}",
        files=tuple(_files([s for v in channels.values() for s in v.slices])),
        read=_DicomReader(
            listing.root,
            {name: v.slices for name, v in channels.items()},
            data.engine,
            data.tilted == "resample",
        ),
        labels=labels,
        scanner=dict(first.scanner),
        split=splits.pop() if len(splits) == 1 else None,
        volume=volume.name,
        sequence=selection.times_ms(first),
        drawn=frozenset(name for name, v in channels.items() if _drawn(v)),
    )


@dataclass(frozen=True)
class _Headers:
    """Reads the headers of one DICOM file below `root`: its slices, or why there are none."""

    root: Path

    def __call__(self, path: str) -> list[dicom.Slice] | Refused:
        with quiet():
            try:
                return dicom.slices(self.root / path, path)
            except Refused as reason:
                return reason


@dataclass(frozen=True)
class _NiftiReader:
    """Reads the channels of a scan from the files `there`; others are `missing` (path, why)."""

    root: Path
    there: Mapping[str, str]
    missing: Mapping[str, Refused]

    def __call__(self) -> Mapping[str, Image]:
        images = {}
        for name, path in self.there.items():
            try:
                images[name] = nifti.read(self.root / path)
            except Refused as reason:
                raise FileRefused(path, reason) from None
        # only now: a damaged image is called damaged even where its mask is missing
        for path, why in self.missing.items():
            raise FileRefused(path, why)
        return images


@dataclass(frozen=True)
class _DicomReader:
    """Reads the channels of a scan from slices."""

    root: Path
    channels: Mapping[str, tuple[dicom.Slice, ...]]
    engine: str
    upright: bool

    def __call__(self) -> Mapping[str, Image]:
        return {name: self._read(slices) for name, slices in self.channels.items()}

    def _read(self, slices: tuple[dicom.Slice, ...]) -> Image:
        if self.engine == "dcm2niix":
            return dcm2niix.read(slices, self.root.joinpath)
        return stack.read(slices, self.root.joinpath, self.upright)


def _drawn(volume: Volume) -> bool:
    """Whether a header of it says that text is drawn into the pixels."""
    return any(s.drawn for s in volume.slices)


def _files(slices: Sequence[dicom.Slice]) -> list[str]:
    """The files that slices lie in, each once."""
    return list(dict.fromkeys(s.path for s in slices))


def _patient_tables(data: Data, listing: Listing) -> tuple[list[Table], str]:
    """The tables with a column of PatientIDs, and that column's name."""
    wanted = (data.patient,) if data.patient else tables.DICOM_PEOPLE
    if data.table is not None:
        candidates, _ = tables.participants(listing, data)
    else:
        candidates = []
        for path in listing.sizes:
            if path.lower().endswith((".tsv", ".csv")):
                try:
                    candidates.append(tables.read(listing, path))
                except Refused:  # one of the auxiliary files, no table of patients
                    continue
    for column in wanted:
        if found := [t for t in candidates if column in t.columns]:
            return found, column
    if data.table is not None or data.patient not in (None, "PatientID"):
        raise UsageError(
            f"data.patient: no column {' or '.join(wanted)} in the tables of data.source; "
            f"{tables.columns(candidates)}",
            "Name the column that holds the PatientID of the DICOM headers.",
        )
    return [], "PatientID"


def _rows_by_person(found: Sequence[Table], column: str) -> dict[str, list[tuple[Cells, bool]]]:
    """PatientID to the rows that name it, and whether their numbers have a decimal comma."""
    rows: dict[str, list[tuple[Cells, bool]]] = defaultdict(list)
    for table in found:
        for cells in table.rows:
            rows[cells[column]].append((cells, table.decimal_comma))
    return rows


def _perhaps_incomplete(groups: Sequence[dicom.Series], damaged: Sequence[str]) -> set[int]:
    """Series beside which a damaged file lies that may be one of their slices.

    A slice lost at the end of a stack leaves no gap. Where a folder holds one series alone, a
    damaged file with the ending of its slices is taken for one.
    """
    holds: dict[tuple[str, str], set[int]] = defaultdict(set)
    for k, group in enumerate(groups):
        # a file of many images is whole by itself
        for s in group.slices if len(_files(group.slices)) == len(group.slices) else ():
            holds[_place(s.path)].add(k)
    suspects = [holds[place] for path in damaged if (place := _place(path)) in holds]
    return {k for found in suspects if len(found) == 1 for k in found}


def _place(path: str) -> tuple[str, str]:
    """Folder and ending of a file; what follows the last dot of a UID is no ending."""
    folder, name = posixpath.split(path)
    ending = posixpath.splitext(name)[1].lower()
    return folder, "" if ending.strip(".").isdigit() else ending


def _labels(data: Data, cells: Cells, decimal_comma: bool) -> Labels | Refused:
    try:
        keep = data.missing_labels == "keep"
        return tables.labels(cells, data.conditions, decimal_comma, keep)
    except Refused as reason:
        return reason


def _split(cells: Cells) -> str | None:
    """The side a table puts a scan on, as it stands there; null where it has no such column."""
    return next((text.lower() for name, text in cells.items() if name.lower() == "split"), None)
