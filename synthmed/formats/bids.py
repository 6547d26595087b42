"""Which NIfTI files make up which scan: tables with paths, BIDS folders, or both.

Source of the folder layout: BIDS 1.10, `sub-<label>[/ses-<label>]/<datatype>/*_<suffix>.nii[.gz]`.
"""

from __future__ import annotations

import glob
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from synthmed.config import Channel, Data
from synthmed.errors import UsageError
from synthmed.formats import tables
from synthmed.formats.listing import Listing, join
from synthmed.formats.refusal import Refused
from synthmed.formats.tables import Cells, Table

_SESSIONS = re.compile(r"(^|/)sub-[^/]+_sessions\.tsv$")
_SUBJECT = re.compile(r"^sub-([^_./]+)")


@dataclass(frozen=True)
class Wanted:
    """One scan that a table (or the folder layout) names.

    Args:
        person: the value that identifies the patient; "" where the table leaves it empty.
        visit: (participant, session): what tells one session of a patient from another.
        files: channel name to a listed path, or to the reason why there is none.
        named: channel name to the path that was looked for, for the quarantine.
        cells: the row, session-level columns included.
        table: where the row stands.
    """

    person: str
    visit: tuple[str, str]
    files: Mapping[str, str | Refused]
    named: Mapping[str, str]
    cells: Cells
    table: Table


@dataclass(frozen=True)
class _Visit:
    """A row at one session."""

    session: str
    cells: Cells


@dataclass
class Reader:
    """Matches rows to files for one source and config."""

    listing: Listing
    data: Data
    tables: Sequence[Table]
    _sessions: dict[str, Table | None] = field(default_factory=dict)
    _labels: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the channels, and stand in for tables that are not there."""
        if not self.tables:
            self.tables = implied(self.listing)
        for table in self.tables:
            self._check_channels(table)
            rows = table.rows if "participant_id" in table.columns else ()
            self._labels[table.path] = {r["participant_id"].removeprefix("sub-") for r in rows}

    def wanted(self) -> Iterator[Wanted]:
        """Every scan that is asked for, whether its files are there or not.

        Raises:
            UsageError: no column names a person, or a channel names an unknown column.
        """
        for table in self.tables:
            column = tables.person_column(table, self.data)
            # a participant_id is unique within its own table alone; the other columns name people
            local = column == "participant_id" and self.data.patient is None
            for row in table.rows:
                for visit in self._visits(table, row):
                    person = visit.cells[column]
                    if tables.says_nothing(person):
                        person = ""  # nobody is called n/a
                    if column == "participant_id":
                        person = person.removeprefix("sub-")
                    if local and person and table.folder:
                        person = f"{table.folder}/{person}"
                    yield from self._scans(table, visit, person)

    def session_columns(self) -> set[str]:
        """Columns of the session tables (sub-X_sessions.tsv)."""
        found: set[str] = set()
        for path in self.listing.sizes:
            if _SESSIONS.search(path) and (table := self._session_table(path)):
                found.update(table.columns)
        return found

    def unwanted(self, path: str) -> Refused:
        """Why a NIfTI file that no scan uses is left aside."""
        parts = path.split("/")
        if any(p in tables.APART for p in parts[:-1]):
            return Refused("not_requested", "Derivatives and source data are read if named.")
        named = {m[1] for p in parts if (m := _SUBJECT.match(p))}
        if any(named & self._labels[t.path] for t in self.tables if _is_below(path, t.folder)):
            return Refused("not_requested", f"Asked for: {', '.join(self._asked())}.")
        return Refused("not_in_table")

    def _asked(self) -> list[str]:
        return list(self.data.channels or [self.data.modality])

    def _check_channels(self, table: Table) -> None:
        """Refuse channels that name columns the table lacks."""
        for name, channel in (self.data.channels or {}).items():
            needs = {channel.column} if channel.column else set(_fields(channel.path or ""))
            for column in sorted(needs - {*table.columns, "session_id"}):
                key = "column" if channel.column else "path"
                raise UsageError(
                    f"data.channels.{name}.{key}: no column {column} in {table.name}; "
                    f"{tables.columns([table])}"
                )

    def _visits(self, table: Table, row: Cells) -> list[_Visit]:
        """A row at each of its sessions, with the columns of sub-X_sessions.tsv added."""
        label = row.get("participant_id", "").removeprefix("sub-")
        if row.get("session_id"):
            sessions = [row["session_id"]]
        elif label and self._by_folder(table):
            below = posixpath.join(table.folder, f"sub-{glob.escape(label)}", "ses-*")
            sessions = [posixpath.basename(f) for f in self.listing.folders(below)]
            sessions += [""] if self._in_one_session(table, label) else []
        else:
            sessions = [""]
        return [_Visit(s, {**row, **self._session_cells(table, label, s)}) for s in sessions]

    def _by_folder(self, table: Table) -> bool:
        """Whether the files of a row are found by session folders, not by the row itself."""
        if self.data.channels is None:
            return "image" not in table.columns
        return any("session_id" in _fields(c.path or "") for c in self.data.channels.values())

    def _in_one_session(self, table: Table, label: str) -> bool:
        """Whether a participant has files outside session folders, or none at all."""
        folder = posixpath.join(table.folder, f"sub-{glob.escape(label)}")
        below = self.listing.folders(posixpath.join(folder, "*"))
        names = [posixpath.basename(f) for f in below]
        return not names or any(not n.startswith("ses-") for n in names)

    def _session_cells(self, table: Table, label: str, session: str) -> Cells:
        """The row of sub-X_sessions.tsv for a session."""
        path = posixpath.join(table.folder, f"sub-{label}", f"sub-{label}_sessions.tsv")
        if not session or path not in self.listing.sizes:
            return {}
        found = self._session_table(path)
        for row in found.rows if found else ():
            if row.get("session_id", "").removeprefix("ses-") == session.removeprefix("ses-"):
                return {k: v for k, v in row.items() if k != "session_id"}
        return {}

    def _session_table(self, path: str) -> Table | None:
        """A listed session table; one that cannot be read leaves its labels missing."""
        if path not in self._sessions:
            try:
                self._sessions[path] = tables.read(self.listing, path)
            except Refused:
                self._sessions[path] = None
        return self._sessions[path]

    def _scans(self, table: Table, visit: _Visit, person: str) -> Iterator[Wanted]:
        """The scans of a row at one session: one, or one a run where BIDS names tell."""
        who = visit.cells.get("participant_id", "") or visit.cells.get("image", "")

        def scan(files: Mapping[str, str | Refused], named: Mapping[str, str]) -> Wanted:
            return Wanted(person, (who, visit.session), files, named, visit.cells, table)

        if self.data.channels is not None:
            looked = {n: self._find(c, table, visit) for n, c in self.data.channels.items()}
            yield scan(
                {n: f for n, (_, f) in looked.items()}, {n: p for n, (p, _) in looked.items()}
            )
        elif "image" in table.columns:
            named, found = self._find(Channel(column="image"), table, visit)
            yield scan({self.data.modality: found}, {self.data.modality: named})
        else:
            for path, image in self._runs(table, visit):
                yield scan({self.data.modality: image}, {self.data.modality: path})

    def _find(self, channel: Channel, table: Table, visit: _Visit) -> tuple[str, str | Refused]:
        """(path looked for, listed path or reason) of one channel."""
        if channel.column is not None:
            cell = visit.cells[channel.column]
            if not cell or cell.lower() == "n/a":
                return table.path, Refused("channel_missing", "The table leaves its path empty.")
            try:
                path = join(table.folder, cell)
            except Refused as reason:
                return cell, reason
            if path in self.listing.refused:
                return path, self.listing.refused[path]
            if path not in self.listing.sizes:
                return path, Refused("channel_missing", "The table names it.")
            return path, path
        cells = {**visit.cells, "session_id": visit.session}
        pattern = _filled(channel.path or "", cells)
        pattern = posixpath.join(glob.escape(table.folder), pattern)
        found = self.listing.match(pattern)
        if len(found) == 1:
            return found[0], found[0]
        return pattern, Refused("channel_missing", f"{len(found)} files match its pattern.")

    def _runs(self, table: Table, visit: _Visit) -> Iterator[tuple[str, str | Refused]]:
        """(path, path or reason) of each image of the modality in a participant's session."""
        label = visit.cells.get("participant_id", "").removeprefix("sub-")
        folder = posixpath.join(table.folder, f"sub-{label}")
        places = [posixpath.join(glob.escape(folder), "*")]
        if visit.session:
            session = "ses-" + visit.session.removeprefix("ses-")
            folder = posixpath.join(folder, session)
            inside = posixpath.join(glob.escape(folder), "*")
            # a session named by the table alone has no folder of its own
            places = [inside] if self.listing.folders(glob.escape(folder)) else places
        suffix = self.data.modality
        found = [
            p
            for place in places
            for ending in (".nii", ".nii.gz")
            for p in self.listing.match(f"{place}/*_{suffix}{ending}")
            if not posixpath.basename(posixpath.dirname(p)).startswith("ses-")
        ]
        yield from ((p, p) for p in sorted(found))
        if not found:
            yield folder, Refused("channel_missing", f"No *_{suffix}.nii.gz in its folder.")


def implied(listing: Listing) -> list[Table]:
    """Tables for BIDS folders that have none: one row, of `participant_id`, a `sub-` folder."""
    found = []
    for folder in listing.every_folder():
        if any(p in tables.APART or _SUBJECT.match(p) for p in folder.split("/")):
            continue
        pattern = posixpath.join(glob.escape(folder), "sub-*")
        rows = tuple({"participant_id": posixpath.basename(f)} for f in listing.folders(pattern))
        if rows:
            found.append(Table(folder, ("participant_id",), rows, folder))
    return found


def _fields(pattern: str) -> list[str]:
    """Names of the columns in a pattern's braces."""
    return re.findall(r"\{([^{}]*)\}", pattern)


def _filled(pattern: str, cells: Cells) -> str:
    """The pattern with a row's text in its braces; wildcards in the text stand for themselves."""
    return re.sub(r"\{([^{}]*)\}", lambda m: glob.escape(cells[m[1]]), pattern)


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(folder + "/")
