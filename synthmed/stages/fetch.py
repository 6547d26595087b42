"""The step before ingest where `data.source` is the address of a PACS: fetch what is wanted.

What is fetched are originals of identified patients. They lie in a folder of the run that only this
user can open, and are removed once the catalogue is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from synthmed import configfile, store
from synthmed.config import Config
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import UsageError
from synthmed.formats import address, candidates, pacs, tables
from synthmed.formats.listing import Listing, walk
from synthmed.formats.refusal import quiet
from synthmed.privacy.ledger import Ledger

FOLDER = "fetched"
"""In RUN/private; outside what a changed config discards, since it costs hours to make."""


def fetch(
    config: Config, folder: Path, progress: Callable[[int, int], None] | None
) -> tuple[Config, Listing]:
    """Fill `folder` with the table and the MR series that can be used.

    What the config asks for in vain is said before anything is fetched. Where a table gives the
    conditions, only people who have a row are asked for; and never who was forgotten.

    Returns:
        The config as ingest reads the folder with it, and the folder's files.

    Raises:
        UsageError, InputError, ResourceError: as `formats.pacs.fetch`; or the table is not there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in folder.glob("labels.?sv"):
        old.unlink()
    changes: dict[str, str | None] = {"format": "dicom"}
    if (content := table(config)) is not None:
        tabs = str(config.data.table).lower().endswith(".tsv")
        changes["table"] = "labels.tsv" if tabs else "labels.csv"
        store.write_bytes(folder / str(changes["table"]), content)
    data = config.data.model_copy(update=changes)
    named = candidates.people(data, walk(folder))
    names = Pseudonyms.load()
    forgotten = Ledger(names=names).forgotten

    def people(person: str) -> bool:
        there = named is None or person in named
        return there and not (forgotten and names.patient(person) in forgotten)

    where = address.parse(data.source)
    with quiet():
        listing = pacs.fetch(where, folder, data.select, people, progress)
    return config.model_copy(update={"data": data}), listing


def fingerprint(config: Config) -> bytes | None:
    """The address and the table, which is what a run that read a PACS was made from.

    The PACS is not asked: a run reads it once, and goes on from that without a network. None where
    the table is gone.
    """
    file = configfile.table_file(config)
    if file is not None and not file.is_file():
        return None
    return config.data.source.encode() + b"\0" + (table(config) or b"")


def table(config: Config) -> bytes | None:
    """The bytes of the table; None where the config names none.

    Raises:
        UsageError: it is not there, or too large to be one.
    """
    file = configfile.table_file(config)
    if file is None:
        return None
    try:
        if file.stat().st_size <= tables.MAX_BYTES:
            return file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"data.table {config.data.table}: cannot be read ({error.strerror})",
            "Where data.source is an address, it is the path of a file on this machine.",
        ) from None
    raise UsageError(f"data.table {config.data.table}: larger than {tables.MAX_BYTES >> 20} MiB")
