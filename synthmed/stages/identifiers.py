"""What the identifier scan of a release looks for: the run's pseudonyms and the source's names."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

from synthmed import receipt
from synthmed.artifacts import Catalogue
from synthmed.config import Config
from synthmed.configfile import source_folder, table_file
from synthmed.deid.needles import MIN_TEXT, Needles
from synthmed.formats import dicom
from synthmed.formats.listing import Listing, kind, walk
from synthmed.formats.refusal import Refused, quiet
from synthmed.formats.tables import DICOM_PEOPLE, PEOPLE, Table, participants
from synthmed.report.words import WORDS
from synthmed.store import Run
from synthmed.types import Estimate

MIN_DIGITS = 5
"""Digits of the shortest number that is searched: the samples of a release have four."""

_UID = re.compile(r"\d+(\.\d+){4,}")
_ENDING = re.compile(r"(\.(nii|img|hdr|mgz|mgh|nrrd|dcm|ima|json|tsv|csv|txt|gz|zip))+$", re.I)
_LETTERS = re.compile(r"[^\W\d_]{4,}")
_SHORT = re.compile(r"[^\W\d_]{3,}")
_NAMES = re.compile(r"(^|.*[^a-z])((sur|fore)?name|nachname|vorname)", re.I)
_THINGS = re.compile(
    r"file|path|image|series|sequence|scan|device|site|hospital|study|data|project|center|centre"
    r"|protocol|region|class|label|group|condition|diagnosis",
    re.I,
)
"""Names in a table that are nobody's."""


@dataclass(frozen=True)
class SourceNames:
    """Who and what a source names.

    Args:
        people: names of people, and parts of them, and numbers that stand for people.
        files: names of files and folders.
        layout: those of a quarter of all files or more, which tell no patient from another.
        complete: whether all of it was there to be read.
    """

    people: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    layout: frozenset[str] = frozenset()
    complete: bool = True

    def __or__(self, other: SourceNames) -> SourceNames:
        return SourceNames(
            self.people | other.people,
            self.files | other.files,
            self.layout | other.layout,
            self.complete and other.complete,
        )


def identifiers(
    run: Run, config: Config, evidence: Sequence[Estimate], names: SourceNames
) -> set[str]:
    """Every string that must not be in the release.

    What the report itself says is left out, since it would be found in every release: names of
    people that are words of it (a patient called `Train`), and names of files that are (a file
    called `image.nii.gz`) or of its title. Pseudonyms never are.

    Args:
        run: its ingest holds the pseudonyms, and the names of refused files.
        config: its names (modality, channels, conditions, categories) count as the report's words;
            title and licence do for file names alone.
        evidence: the names and methods of estimates count as the report's words.
        names: of the source.
    """
    folder = run.folder("catalogue")
    pseudonyms: set[str] = set()
    if (folder / "catalogue.jsonl").is_file():
        scans = Catalogue.open(folder).scans
        pseudonyms = {s.patient for s in scans} | {s.scan for s in scans}
    paths = set(names.files)
    for quarantine in sorted(folder.glob("quarantine*.tsv")):  # an assessment may have two
        with open(quarantine, encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE):
                paths |= _parts(row.get("path") or "")
    own = _own_words(config, evidence)
    found = {n for n in names.people if _searched(n) and not _occurs(n, own)}
    # a data set's name is in its files' names, its title and its licence
    public = f"{own}\n{config.export.name}\n{config.export.license}"
    found |= {n for n in paths if _searched(n) and not _occurs(n, public)}
    # of longer names the words, but for those of this program
    common = _program() | _words(public)
    parts = {w for n in paths | names.people for w in _words(n)}
    return pseudonyms | found | {w for w in parts if w not in common}


def telling(names: Iterable[str]) -> set[str]:
    """Names that nobody else would give: not `sub-01` or `image_3`, which any cohort may have.

    They have a word that this program does not know, or a number of `MIN_DIGITS` digits.
    """
    common = _program()
    return {
        name
        for name in names
        if len(name) >= MIN_TEXT
        and (
            any(w.lower() not in common for w in _SHORT.findall(name))
            or re.search(rf"\d{{{MIN_DIGITS}}}", name)
        )
    }


def source_names(config: Config) -> SourceNames:
    """Names of the source's files and folders, its headers' and its tables' words for people.

    Of a PACS it is the words for people of its table, if it has one: its headers are not at hand.
    """
    root, data, file = source_folder(config), config.data, table_file(config)
    if root is not None:
        if not root.is_dir():
            return SourceNames(complete=False)
        listing = walk(root)
    elif file is None or not file.is_file():
        return SourceNames(complete=False)
    else:
        listing = Listing(file.parent, {file.name: file.stat().st_size}, {})
        data = data.model_copy(update={"table": file.name})
    people: set[str] = set()
    for table in participants(listing, data)[0]:
        people |= _people(table, data.patient)
    if root is not None:
        people |= _in_headers(listing)
    paths = Counter(part for path in listing.sizes for part in _parts(path))
    layout = frozenset(name for name, n in paths.items() if n > max(1, len(listing.sizes) / 4))
    return SourceNames(frozenset(people), frozenset(paths), layout, complete=root is not None)


def _in_headers(listing: Listing) -> set[str]:
    """Names and numbers of the patients of all DICOM files."""
    found: set[str] = set()
    with quiet():
        for path in listing.sizes:
            if kind(listing, path) != "dicom":
                continue
            try:
                names, numbers = dicom.identity(listing.path(path))
            except Refused:  # nor was anything read from it
                continue
            found |= numbers
            for name in names:
                found |= {name, *_LETTERS.findall(name)}
    return found


def _people(table: Table, patient: str | None) -> set[str]:
    """A table's words for people: the first of the columns that may name one, and all names."""
    wanted = (patient,) if patient else (*PEOPLE, *DICOM_PEOPLE)
    column = next((name for name in wanted if name in table.columns), "")
    found = {row[column] for row in table.rows if row.get(column)}
    for name in table.columns:
        if _NAMES.fullmatch(name) and not _THINGS.search(name):
            for row in table.rows:
                found |= {row[name], *_LETTERS.findall(row[name])}
    return found


def _searched(name: str) -> bool:
    return len(name) >= (MIN_DIGITS if name.isdigit() else MIN_TEXT)


def _parts(path: str) -> set[str]:
    """The file's and the folders' names, without the endings of files; UIDs whole."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return {p if _UID.fullmatch(p) else _ENDING.sub("", p) for p in parts}


def _words(text: str) -> set[str]:
    return {word.lower() for word in _LETTERS.findall(text)}


def _occurs(name: str, text: str) -> bool:
    likely = name.lower() in text.lower()  # thousands of names: most are told apart at once
    return likely and Needles([name]).found_in(text.encode(), shortest=MIN_TEXT)


@cache
def _program() -> frozenset[str]:
    """Every word of this program, which may stand in a report for what it does."""
    every: set[str] = set()
    pending = [files("synthmed")]
    while pending:
        place = pending.pop()
        for item in place.iterdir():
            if item.is_dir():
                pending.append(item)
            elif item.name.endswith((".py", ".j2", ".html", ".md", ".css")):
                text = item.read_text(encoding="utf-8")
                every |= {word.lower() for word in _SHORT.findall(text)}
    return frozenset(every)


def _own_words(config: Config, evidence: Sequence[Estimate]) -> str:
    """Text that a report holds whoever the patients were."""
    package = files("synthmed")
    templates = package.joinpath("report/templates").iterdir()
    sources = [t for t in templates if t.name != receipt.PAGE]  # it never leaves
    written = (f"report/{name}.py" for name in ("build", "cited", "curves", "glance"))
    sources += [package.joinpath(p) for p in ("formats/bids_export.py", *written)]
    texts = [s.read_text(encoding="utf-8") for s in sources if s.is_file()]
    texts += [t for words in WORDS.values() for t in words]
    texts += [t for e in evidence for t in (e.name, e.method)]
    data = config.data
    texts += [data.modality, config.backbone.name, *(data.channels or ())]
    for name, condition in data.conditions.items():
        texts += [name, *(condition.categories if condition.kind == "categorical" else ())]
    return "\n".join(texts)
