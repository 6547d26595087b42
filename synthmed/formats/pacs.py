"""Scans from a PACS: what is wanted of what it holds, fetched into a private folder.

The reader of folders decides about every file as always; here a file is only left on the server
where that reader could not use it. Names of files come from keyed digests of UIDs, so that a second
call fetches what is missing and no name tells whose a file is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from synthmed.config import Select
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import InputError, ResourceError, UsageError, pip
from synthmed.formats import selection
from synthmed.formats.address import Address
from synthmed.formats.dicom import MR_IMAGE
from synthmed.formats.frames import ENHANCED
from synthmed.formats.listing import Listing, walk
from synthmed.formats.refusal import Refused
from synthmed.store import sync

WORKERS = 3
"""Connections at a time."""
TIMEOUT_SECONDS = 30.0
"""For a server to take a connection, and between two pieces of an answer."""
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Between one attempt and the next, after which there is no other."""
READABLE = {MR_IMAGE, *ENHANCED}
"""SOP classes that the reader of folders takes."""

_UID = re.compile(r"[0-9][0-9.]{0,63}")

T = TypeVar("T")
U = TypeVar("U")


class Lost(Exception):
    """No answer, or one that says to try later: worth another attempt. The message may be shown."""


class Torn(Lost):
    """The answer broke off, or is not whole: worth another attempt, and no reason to stop."""


@dataclass(frozen=True)
class Study:
    """A study by its UID, and whose it is; empty where the server does not say."""

    uid: str
    patient: str


@dataclass(frozen=True)
class Series:
    """A series of a study.

    Args:
        description: SeriesDescription, and `protocol` ProtocolName; empty where not told.
        n_instances: how many the server says it holds; None where it does not.
    """

    study: str
    uid: str
    description: str = ""
    protocol: str = ""
    n_instances: int | None = None


@dataclass(frozen=True)
class Instance:
    """A file of a series; its SOP class is empty where the server does not say."""

    uid: str
    sop_class: str = ""


class Server(Protocol):
    """What either protocol can do; every call may raise `Lost` and `InputError`."""

    def studies(self) -> Sequence[Study]:
        """All that hold MR."""

    def series(self, study: str) -> Sequence[Series]:
        """The MR series of a study."""

    def instances(self, series: Series) -> Sequence[Instance]:
        """The files of a series."""

    def fetch(self, series: Series, instance: str, file: Path) -> None:
        """Write an instance as the server sends it; raises `Refused` where it does not give it."""

    def close(self) -> None:
        """End all connections."""


@dataclass
class _Wanted:
    """What is to be fetched, and what is known already to be refused, by path."""

    files: dict[str, tuple[Series, str]] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def fetch(
    address: Address,
    folder: Path,
    select: Select | None,
    people: Callable[[str], bool],
    progress: Callable[[int, int], None] | None = None,
) -> Listing:
    """Bring `folder` up to what the PACS holds of what is wanted.

    Guarantee: a file has its name only when it is whole; what is there is not fetched again, and
    what is no longer wanted is removed.

    Args:
        address: of the PACS.
        folder: made if missing, for this user alone.
        select: series whose description and protocol, as the server has them, fit no pattern of
            `description` are left there.
        people: whether somebody's PatientID is wanted; studies that the server says are others'
            are left there.
        progress: called with (done, total) files.

    Returns:
        The folder's files, with names by which a person finds them in the PACS, and what the PACS
        did not give or this package cannot read.

    Raises:
        UsageError: the part `pacs` is not installed, or a token would travel in the clear.
        InputError: no answer, no such service, not let in, or nothing there that is wanted.
        ResourceError: the connection was lost for longer than patience lasts, or no file can be
            written; the same call goes on.
    """
    server = connect(address)
    try:
        wanted = _wanted(server, address, select, people)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        missing = _tidied(folder, wanted.files)
        n_there = len(wanted.files) - len(missing)

        def one(path: str) -> Refused | None:
            series, instance = wanted.files[path]
            return _fetched(server, series, instance, folder / path)

        def shown(done: int) -> None:
            if progress:
                progress(n_there + done, len(wanted.files))

        for path, reason in zip(missing, _each(one, missing, shown), strict=True):
            if reason is not None:
                wanted.refused[path] = reason
    except Lost as why:
        raise ResourceError(
            f"data.source {address}: {why}, again and again",
            "What has come is kept; the same command goes on.",
        ) from None
    finally:
        server.close()
    refused = dict(sorted(wanted.refused.items()))
    return replace(walk(folder), refused=refused, names=wanted.names)


def connect(address: Address) -> Server:
    """A client for the protocol of an address.

    Raises:
        UsageError: the packages for it are not installed, or a token would travel in the clear.
    """
    package = "dicomweb_client" if address.protocol == "dicomweb" else "pynetdicom"
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"data.source {address}: {package} is not installed",
            f"Install it with: {pip('pacs')}.",
        )
    if address.protocol == "dicomweb":
        from synthmed.formats.dicomweb import Web

        return Web(address)
    from synthmed.formats.dimse import Dimse

    return Dimse(address)


def patiently(call: Callable[[], T]) -> T:
    """The result of a call that is tried again, with growing pauses, while it raises `Lost`."""
    for pause in PAUSES_SECONDS:
        try:
            return call()
        except Lost:
            time.sleep(pause)
    return call()


@contextlib.contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
    """A file to be written, which has its name once the block has ended well, or is not there."""
    temporary = file.with_suffix(".part")
    try:
        with open(temporary, "wb") as handle:
            yield handle
        sync(temporary)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def number(text: object) -> int | None:
    """A count as a server gives it, None where it is no number."""
    said = str(text)
    return int(said) if said.isdecimal() and len(said) < 10 else None


def _wanted(
    server: Server, address: Address, select: Select | None, people: Callable[[str], bool]
) -> _Wanted:
    """Ask for studies, their series and their files."""
    try:
        studies = patiently(server.studies)
    except Lost as why:
        raise InputError(
            f"data.source {address}: {why}", "Check host and port, and that the PACS is up."
        ) from None
    asked = [s for s in studies if not s.patient or people(s.patient)]
    found = _Wanted()
    for part in _each(partial(_of_study, server, select), asked):
        found.files |= part.files
        found.refused |= part.refused
        found.names |= part.names
    if not found.files:
        left = f"; {len(found.refused)} series or files are left out" if found.refused else ""
        raise InputError(
            f"data.source {address}: no MR image in {len(asked)} of {len(studies)} studies{left}",
            "Check what the PACS lets this machine see, data.table and data.select.description.",
        )
    return found


def _of_study(server: Server, select: Select | None, study: Study) -> _Wanted:
    """The series and files of one study."""
    pseudonyms, out = Pseudonyms.load(), _Wanted()

    def refuse(reason: Refused, *uids: str) -> None:
        path = "/".join(pseudonyms.digest("fetched", uid)[:16] for uid in uids)
        out.refused[path], out.names[path] = reason, "/".join(uids)

    if not _UID.fullmatch(study.uid):
        refuse(Refused("header_unreadable", "Its UID is none."), study.uid)
        return out
    for series in patiently(partial(server.series, study.uid)):
        texts = series.description, series.protocol
        fits = [selection.matches((select or Select()).description, t) for t in texts]
        if not _UID.fullmatch(series.uid):
            refuse(Refused("header_unreadable", "Its UID is none."), study.uid, series.uid)
            continue
        if all(texts) and not any(fits):
            reason = Refused("not_requested", "It does not fit data.select.description.")
            refuse(reason, study.uid, series.uid)
            continue
        instances = patiently(partial(server.instances, series))
        if len(instances) < (series.n_instances or 0):
            # a stack without its last slices would pass for a whole one
            told = f"The PACS lists {len(instances)} of its {series.n_instances} files."
            refuse(Refused("not_fetched", told), study.uid, series.uid)
            continue
        for instance in instances:
            uids = study.uid, series.uid, instance.uid
            if not _UID.fullmatch(instance.uid):
                refuse(Refused("header_unreadable", "Its UID is none."), *uids)
            elif instance.sop_class and instance.sop_class not in READABLE:
                refuse(Refused("not_mr_image"), *uids)
            else:
                place, name = (pseudonyms.digest("fetched", uid)[:16] for uid in uids[1:])
                path = f"{place}/{name}.dcm"
                out.files[path], out.names[path] = (series, instance.uid), "/".join(uids)
    return out


def _tidied(folder: Path, files: Mapping[str, object]) -> list[str]:
    """What is not there yet; what is there and not wanted, or not whole, is removed.

    A table that the caller has put beside the folders of series stays.
    """
    there = {str(p.relative_to(folder)) for p in folder.glob("*/*") if p.is_file()}
    for path in there - files.keys():
        (folder / path).unlink()
    return [path for path in sorted(files) if path not in there]


def _fetched(server: Server, series: Series, instance: str, file: Path) -> Refused | None:
    """Fetch one file, or say why it is not to be had."""
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        patiently(partial(server.fetch, series, instance, file))
    except Refused as reason:
        return reason
    except Torn as why:
        return Refused("not_fetched", f"It comes incomplete: {why}.")
    except OSError as error:
        raise ResourceError(
            f"ingest: a file cannot be written ({error.strerror})",
            "Free some space, or name another run folder; the same command goes on.",
        ) from None
    return None


def _each(
    call: Callable[[T], U], items: Iterable[T], done: Callable[[int], None] = lambda n: None
) -> list[U]:
    """`call` on each item, `WORKERS` at a time; the first that fails ends it."""
    with ThreadPoolExecutor(WORKERS, "pacs") as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            for n, future in enumerate(as_completed(futures), 1):
                future.result()
                done(n)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]
