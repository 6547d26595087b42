"""What the identifier scan of a release looks for: the run's pseudonyms and the source's names."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import PurePosixPath

from synthmed import receipt
from synthmed.artifacts import Catalogue
from synthmed.config import Config
from synthmed.configfile import source_folder, table_file
from synthmed.deid.needles import MIN_TEXT, Needles
from synthmed.formats.listing import Listing, walk
from synthmed.formats.tables import DICOM_PEOPLE, PEOPLE, participants
from synthmed.report.words import WORDS
from synthmed.store import Run
from synthmed.types import Estimate

_UID = re.compile(r"\d+(\.\d+){4,}")


def identifiers(
    run: Run,
    config: Config | None,
    evidence: Sequence[Estimate],
    forbidden: Collection[str],
) -> set[str]:
    """Every string that must not be in the release.

    Names of refused files that are words of the report itself (a file called `image.nii.gz`) are
    left out: they would be found in every release. Pseudonyms never are.

    Args:
        run: its ingest holds the pseudonyms, and the names of refused files.
        config: its names (modality, channels, conditions, categories) count as the report's words.
        evidence: the names and methods of estimates count as the report's words.
        forbidden: more strings, such as the names of the files that were read.
    """
    folder = run.folder("catalogue")
    pseudonyms: set[str] = set()
    if (folder / "catalogue.jsonl").is_file():
        scans = Catalogue.open(folder).scans
        pseudonyms = {s.patient for s in scans} | {s.scan for s in scans}
    names = set(forbidden)
    for quarantine in sorted(folder.glob("quarantine*.tsv")):  # an assessment may have two
        with open(quarantine, encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE):
                names |= _parts(row.get("path") or "")
    own = _own_words(config, evidence)
    kept = {n for n in names if len(n) >= MIN_TEXT and not _occurs(n, own)}
    return pseudonyms | kept


def source_names(config: Config) -> set[str] | None:
    """Names of the source's files and folders, and its tables' words for people.

    Of a PACS it is the words for people of its table, if it has one. Null where the source, or
    that table, is no longer there to take names from.
    """
    root, data, file = source_folder(config), config.data, table_file(config)
    if root is not None:
        if not root.is_dir():
            return None
        listing = walk(root)
    elif file is None:
        return set()
    elif not file.is_file():
        return None
    else:
        listing = Listing(file.parent, {file.name: file.stat().st_size}, {})
        data = data.model_copy(update={"table": file.name})
    names = {part for path in listing.sizes for part in _parts(path)}
    found, _ = participants(listing, data)
    for table in found:
        wanted = (data.patient,) if data.patient else (*PEOPLE, *DICOM_PEOPLE)
        column = next((name for name in wanted if name in table.columns), "")
        names |= {row[column] for row in table.rows if row.get(column)}
    return names


def _parts(path: str) -> set[str]:
    """The file's and the folders' names, without what follows the first dot; UIDs whole."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return {p if _UID.fullmatch(p) else p.split(".")[0] for p in parts}


def _occurs(name: str, text: bytes) -> bool:
    return Needles([name]).found_in(text, shortest=MIN_TEXT)


def _own_words(config: Config | None, evidence: Sequence[Estimate]) -> bytes:
    """Text that a report holds whoever the patients were."""
    package = files("synthmed")
    templates = package.joinpath("report/templates").iterdir()
    sources = [t for t in templates if t.name != receipt.PAGE]  # it never leaves
    written = (f"report/{name}.py" for name in ("build", "cited", "curves", "glance"))
    sources += [package.joinpath(p) for p in ("formats/bids_export.py", *written)]
    texts = [s.read_text(encoding="utf-8") for s in sources if s.is_file()]
    texts += [t for words in WORDS.values() for t in words]
    texts += [t for e in evidence for t in (e.name, e.method)]
    if config is not None:
        data = config.data
        texts += [data.modality, config.backbone.name, config.export.name, *(data.channels or ())]
        for name, condition in data.conditions.items():
            texts += [name, *(condition.categories if condition.kind == "categorical" else ())]
    return "\n".join(texts).encode()
