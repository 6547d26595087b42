"""Tables of labels: participants.tsv and its kin, as text, and labels taken from their rows."""

from __future__ import annotations

import csv
import io
import math
import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from synthmed import ages
from synthmed.config import Categorical, Condition, Continuous, Data
from synthmed.errors import InputError, UsageError
from synthmed.formats.listing import Listing
from synthmed.formats.refusal import Refused

MAX_BYTES = 1 << 26
"""Bytes of a table."""
APART = ("derivatives", "sourcedata")
"""BIDS folders whose files are read only where the config names them."""

PEOPLE = ("patient", "subject_group", "participant_id")
"""Columns that may name one person, the first that is there."""
DICOM_PEOPLE = ("patient_id", "PatientID")
"""The same of tables that are joined with DICOM headers."""

_HEADINGS = frozenset(
    (*PEOPLE, "patient_id", "patientid", "participant", "subject", "subject_id", "sub", "id",
     "session", "session_id", "age", "sex", "gender", "diagnosis", "group", "site", "scanner",
     "date", "image", "mask", "label", "scan", "scan_id", "file", "filename", "path", "split")
)  # fmt: skip
"""Names of columns by which the first line of a table is known for its header."""
_PARTICIPANTS = ("participants.tsv", "participants.csv")
_MISSING = {"", "n/a", "nan"}

Cells = Mapping[str, str]
"""Column name to the text in one row, stripped."""


@dataclass(frozen=True)
class Table:
    """A table of the source.

    Args:
        path: relative to the source; for a table implied by a folder layout, the folder.
        columns: their names, stripped.
        rows: one mapping of column to text each.
        decimal_comma: whether "23,7" is a number (semicolon-separated files).
    """

    path: str
    columns: tuple[str, ...]
    rows: tuple[Cells, ...]
    folder: str
    decimal_comma: bool = False

    @property
    def name(self) -> str:
        """Its file name, fit for a message."""
        return posixpath.basename(self.path) or "the folder layout"


def columns(found: Sequence[Table], more: Collection[str] = ()) -> str:
    """The columns of tables for a message, or their number: without a header they are a patient.

    A line is a header for certain where it has a usual name of a column, which then does not stand
    in the column itself.

    Args:
        found: the tables.
        more: columns of others, known for what they are.
    """
    names, unsure = set(more), 0
    for table in found:
        usual = [c for c in table.columns if c.lower() in _HEADINGS]
        if any(all(row[c] != c for row in table.rows) for c in usual):
            names |= {c for c in table.columns if c.isprintable()}
        else:
            unsure += len(table.columns)
    if not names and not unsure:
        return "there is no table"
    said = f"columns: {', '.join(sorted(names))}" if names else ""
    if unsure:
        hidden = f"{unsure} columns without a usual name, not shown: the first line must name them"
        said = f"{said}; and {hidden}" if said else hidden
    return said


def participants(listing: Listing, data: Data) -> tuple[list[Table], dict[str, Refused]]:
    """The tables that say which scan is whose, and those that cannot be read.

    That is `data.table` where it is set, else every participants.tsv or .csv at any depth, but
    for those in `APART`.

    Raises:
        UsageError: `data.table` is not there.
        InputError: `data.table` cannot be read.
    """
    if data.table is not None:
        path = posixpath.normpath(data.table)
        if path not in listing.sizes:
            raise UsageError(
                f"data.table: no file {data.table} in data.source",
                "Give its path relative to data.source.",
            )
        try:
            return [read(listing, path)], {}
        except Refused as reason:
            raise InputError(f"data.table {data.table}: {reason.explanation}") from None
    tables, refused = [], {}
    for path in listing.sizes:
        apart = any(part in APART for part in path.split("/"))
        if posixpath.basename(path).lower() in _PARTICIPANTS and not apart:
            try:
                tables.append(read(listing, path))
            except Refused as reason:
                refused[path] = reason
    return tables, refused


def read(listing: Listing, path: str) -> Table:
    """Read a .tsv or .csv table (commas or semicolons, whichever its first line has more of).

    Raises:
        Refused: `table_unreadable`, with the line at fault.
    """
    if listing.sizes[path] > MAX_BYTES:
        raise Refused("table_unreadable", f"It is larger than {MAX_BYTES >> 20} MiB.")
    try:
        text = listing.path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused("table_unreadable", "It is not UTF-8 text.") from None
    except OSError:
        raise Refused("table_unreadable", "The system refuses to read it.") from None
    first = text.partition("\n")[0]
    tabs = path.lower().endswith(".tsv") or first.count("\t") > 0
    delimiter = "\t" if tabs else ";" if first.count(";") > first.count(",") else ","
    # BIDS knows no quoting in .tsv: a lone quote there is part of the text
    lines = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    try:
        header = [c.strip() for c in next(lines, [])]
        rows = [_row(header, cells, lines.line_num) for cells in lines if any(cells)]
    except csv.Error:
        raise Refused("table_unreadable", f"Line {lines.line_num} is not valid.") from None
    if not any(header):
        raise Refused("table_unreadable", "It is empty.")
    if len(set(header)) < len(header):
        raise Refused("table_unreadable", "Two of its columns have one name.")
    return Table(path, tuple(header), tuple(rows), posixpath.dirname(path), delimiter == ";")


def check_patient(tables: Sequence[Table], data: Data) -> None:
    """Check that every table has the column `data.patient`.

    Raises:
        UsageError: one has not, or there is no table.
    """
    if data.patient is None:
        return
    if not tables:
        raise UsageError(
            f"data.patient: {data.patient}, but data.source has no table with such a column",
            "Add a participants.tsv, name a table with data.table, or leave data.patient out.",
        )
    for table in tables:
        if data.patient not in table.columns:
            raise UsageError(
                f"data.patient: no column {data.patient} in {table.name}; {columns([table])}"
            )


def check_conditions(
    tables: Sequence[Table], data: Data, fallbacks: Sequence[str] = (), more: Collection[str] = ()
) -> None:
    """Check that each condition is a column of some table.

    Args:
        fallbacks: conditions that have another source, the DICOM headers.
        more: columns of the session tables.

    Raises:
        UsageError: one is not.
    """
    known = {c for t in tables for c in t.columns} | set(more)
    for name in data.conditions:
        if name in known or name in fallbacks:
            continue
        there = columns(tables, more)
        other = f"; from the DICOM headers: {', '.join(fallbacks)}" if fallbacks else ""
        raise UsageError(
            f"data.conditions.{name}: no such column in the tables of data.source; {there}{other}"
        )


def person_column(table: Table, data: Data) -> str:
    """The column that names one person: `data.patient`, else `patient`, `subject_group`,
    `participant_id`.

    Raises:
        UsageError: the table has none of them.
    """
    for name in (data.patient,) if data.patient else PEOPLE:
        if name in table.columns:
            return name
    raise UsageError(
        f"data.patient: null, and {table.name} has none of the columns {', '.join(PEOPLE)}; "
        f"{columns([table])}",
        "Set data.patient to the column that names one person.",
    )


def labels(
    cells: Cells,
    conditions: Mapping[str, Condition],
    decimal_comma: bool = False,
    keep_missing: bool = False,
) -> dict[str, str | float]:
    """The declared conditions of one scan, from the cells of its row.

    Text is stripped; empty, "n/a" and "nan" mean missing; 1 and 1.0 are the same category. Ages
    from 90 years on become 90 (`ages.pool`).

    Args:
        keep_missing: leave out what is missing, where it would be refused otherwise.

    Raises:
        Refused: `label_missing`, `label_unknown` or `label_out_of_range`, naming the condition
            but not the value.
    """
    found: dict[str, str | float] = {}
    for name, condition in conditions.items():
        text = cells.get(name, "")
        if keep_missing and _is_missing(text, condition):
            continue
        if isinstance(condition, Categorical):
            found[name] = _category(name, text, condition)
        else:
            found[name] = _number(name, text, condition, decimal_comma)
    return found


def _row(header: Sequence[str], cells: list[str], line: int) -> dict[str, str]:
    """One row as a mapping; missing cells at its end are empty."""
    if any(c.strip() for c in cells[len(header) :]):
        raise Refused("table_unreadable", f"Line {line} has more cells than the header.")
    texts = [c.strip() for c in cells[: len(header)]]
    texts += [""] * (len(header) - len(texts))
    return dict(zip(header, texts, strict=True))


def says_nothing(text: str) -> bool:
    """Whether a cell is empty or says that it is."""
    return text.lower() in _MISSING


def _is_missing(text: str, condition: Condition) -> bool:
    """Whether a cell says nothing; a declared category of that spelling says something."""
    declared = isinstance(condition, Categorical) and text in condition.categories
    return says_nothing(text) and not declared


def _category(name: str, text: str, condition: Categorical) -> str:
    """The declared category that `text` stands for."""
    if text in condition.categories:
        return text
    if _is_missing(text, condition):
        raise Refused("label_missing", f"Condition: {name}.")
    for category in condition.categories:
        if _plain(category) == _plain(text):
            return category
    raise Refused(
        "label_unknown", f"Condition: {name}; declared: {', '.join(condition.categories)}."
    )


def _plain(text: str) -> str | float:
    """A number where the text is one, so that 1 equals 1.0 and 01."""
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?", text) else text


def _number(name: str, text: str, condition: Continuous, decimal_comma: bool) -> float:
    """The value of a continuous condition, checked against its range."""
    if _is_missing(text, condition):
        raise Refused("label_missing", f"Condition: {name}.")
    oldest = ages.pool(name, condition)
    if oldest is not None:
        text = text.removesuffix("+")  # how BIDS tables write pooled ages: 89+
    try:
        value = float(text.replace(",", ".") if decimal_comma else text)
    except ValueError:
        raise Refused("label_unknown", f"Condition: {name}; not a number.") from None
    if not math.isfinite(value):
        raise Refused("label_unknown", f"Condition: {name}; not a finite number.")
    if oldest is not None:
        value = min(value, oldest)
    if not condition.low <= value <= condition.high:
        raise Refused(
            "label_out_of_range",
            f"Condition: {name}; declared: {condition.low:g} to {condition.high:g}.",
        )
    return value
