"""The classic protocol: C-FIND for what there is, C-GET for the files, with pynetdicom.

Source: PS3.4 annex C (query and retrieve, study root, level by level as every server has to
support), PS3.7 section 9.3.3 (C-GET), PS3.15 annex B (TLS). Each transfer syntax is offered in a
context of its own, so that a server sends files as it holds them.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association

from synthmed.errors import InputError
from synthmed.formats import dicom
from synthmed.formats.address import Address
from synthmed.formats.pacs import (
    READABLE,
    TIMEOUT_SECONDS,
    Instance,
    Lost,
    Series,
    Study,
    number,
    whole,
)
from synthmed.formats.refusal import Refused

SYNTAXES = (
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian, RLELossless, JPEGLossless, JPEGLosslessSV1, JPEGBaseline8Bit,
    JPEGExtended12Bit, JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000,
)  # fmt: skip
"""Transfer syntaxes that the reader decodes, or refuses by name."""
ANSWER_SECONDS = 60.0
"""For a server to fetch a file from its own archive."""

_FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # study root query/retrieve information model, FIND
_GET = "1.2.840.10008.5.1.4.1.2.2.3"  # and GET
_PENDING = (0xFF00, 0xFF01)
_OUT_OF_RESOURCES = (0xA700, 0xA701, 0xA702)
_MAX_PDU = 1 << 17


@dataclass
class _Slot:
    """Where the file that comes next goes, and what became of it."""

    file: Path | None = None
    uid: str = ""
    n_bytes: int = 0
    oversized: bool = False
    stored: bool = False
    error: OSError | None = None


@dataclass
class _Line:
    """What is asked for over an association."""

    slot: _Slot = field(default_factory=_Slot)


class Dimse:
    """A PACS, and no more associations with it than there are calls at a time."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._tls: tuple[ssl.SSLContext, str] | None = None
        if address.tls:
            self._tls = ssl.create_default_context(), address.host
        self._ae = AE(ae_title=address.calling)
        self._ae.connection_timeout = self._ae.acse_timeout = TIMEOUT_SECONDS
        self._ae.dimse_timeout = self._ae.network_timeout = ANSWER_SECONDS
        self._contexts = [build_context(_FIND), build_context(_GET)]
        offered = itertools.product(sorted(READABLE), SYNTAXES)
        self._contexts += [build_context(kind, [syntax]) for kind, syntax in offered]
        self._roles = [build_role(kind, scp_role=True) for kind in sorted(READABLE)]
        self._idle: queue.SimpleQueue[tuple[_Line, Association]] = queue.SimpleQueue()

    def studies(self) -> Sequence[Study]:
        """All that hold MR, as far as the server tells them apart."""
        found = self._find("STUDY", ModalitiesInStudy="MR", StudyInstanceUID="", PatientID="")
        return [Study(_text(d, "StudyInstanceUID"), _text(d, "PatientID")) for d in found]

    def series(self, study: str) -> Sequence[Series]:
        """The MR series of a study."""
        found = self._find(
            "SERIES", StudyInstanceUID=study, SeriesInstanceUID="", Modality="MR",
            SeriesDescription="", ProtocolName="", NumberOfSeriesRelatedInstances="",
        )  # fmt: skip
        return [
            Series(study, _text(d, "SeriesInstanceUID"), _text(d, "SeriesDescription"),
                   _text(d, "ProtocolName"), number(_text(d, "NumberOfSeriesRelatedInstances")))
            for d in found
            if _text(d, "Modality") in ("", "MR")
        ]  # fmt: skip

    def instances(self, series: Series) -> Sequence[Instance]:
        """The files of a series."""
        found = self._find(
            "IMAGE", StudyInstanceUID=series.study, SeriesInstanceUID=series.uid,
            SOPInstanceUID="", SOPClassUID="",
        )  # fmt: skip
        return [Instance(_text(d, "SOPInstanceUID"), _text(d, "SOPClassUID")) for d in found]

    def fetch(self, series: Series, instance: str, file: Path) -> None:
        """Write an instance as the server sends it; the file has its name once it is whole.

        Raises:
            Refused: the server does not give it, or it is larger than a file may be.
            Lost: no answer, or the connection ended.
            OSError: the file cannot be written.
        """
        slot = _Slot(file, instance)
        asked = _query(
            "IMAGE", StudyInstanceUID=series.study, SeriesInstanceUID=series.uid,
            SOPInstanceUID=instance,
        )  # fmt: skip
        status = None
        with self._line(slot) as association:
            for answer, _ in association.send_c_get(asked, _GET):
                status = answer.get("Status")
        if slot.error is not None:
            raise slot.error
        if slot.oversized:
            raise dicom.too_large()
        if slot.stored:
            return
        if status is None or status in _OUT_OF_RESOURCES:
            raise Lost("the connection ended" if status is None else "the server fails")
        raise Refused("not_fetched", f"It answers {status:04X}.")

    def close(self) -> None:
        """End all connections."""
        with contextlib.suppress(queue.Empty):
            while True:
                _, association = self._idle.get_nowait()
                association.release()

    def _reach(self) -> None:
        """Connect without DICOM first: what is wrong below it has an answer of its own."""
        place = self._address.host, self._address.port
        try:
            plain = socket.create_connection(place, TIMEOUT_SECONDS)
        except OSError:
            raise Lost("no answer") from None
        try:
            with plain:
                if self._tls is not None:
                    context, name = self._tls
                    context.wrap_socket(plain, server_hostname=name).close()
        except ssl.SSLError:
            raise InputError(
                f"data.source {self._address}: its TLS certificate is not valid here, "
                "or it speaks no TLS",
                "Name the file of your house's CA in SSL_CERT_FILE; it is never taken unseen.",
            ) from None
        except OSError:
            raise Lost("it speaks no TLS") from None

    @contextlib.contextmanager
    def _line(self, slot: _Slot) -> Iterator[Association]:
        """An association over which files go to `slot`: one that is idle, or a new one."""
        line, association = self._taken() or self._associated()
        line.slot = slot
        try:
            yield association
        except RuntimeError:  # it has ended between the look and the call
            raise Lost("the connection ended") from None
        finally:
            if association.is_established:
                self._idle.put((line, association))

    def _taken(self) -> tuple[_Line, Association] | None:
        """An idle association that still stands."""
        with contextlib.suppress(queue.Empty):
            while True:
                line, association = self._idle.get_nowait()
                if association.is_established:
                    return line, association
        return None

    def _associated(self) -> tuple[_Line, Association]:
        """A new association."""
        self._reach()
        line = _Line()
        made = self._ae.associate(
            self._address.host,
            self._address.port,
            self._contexts,
            self._address.called,
            _MAX_PDU,
            [*self._roles],
            tls_args=self._tls,
            evt_handlers=[(evt.EVT_C_STORE, _store, [line]), (evt.EVT_DATA_RECV, _count, [line])],
        )
        if made.is_rejected:
            raise InputError(
                f"data.source {self._address}: the PACS rejects the association",
                f"It must know {self._address.calling} at this machine's address, "
                f"and be called {self._address.called}.",
            )
        if not made.is_established:
            raise Lost("no association")
        accepted = {str(c.abstract_syntax) for c in made.accepted_contexts}
        if not {_FIND, _GET} <= accepted or not READABLE & accepted:
            made.release()
            raise InputError(
                f"data.source {self._address}: the PACS offers no C-FIND, no C-GET or no MR images",
                "Ask its administrator to permit them, or take its DICOMweb service.",
            )
        return line, made

    def _find(self, level: str, **keys: str) -> list[Dataset]:
        """All matches of a query at a level."""
        with self._line(_Slot()) as association:
            answers = list(association.send_c_find(_query(level, **keys), _FIND))
        codes = [status.get("Status") for status, _ in answers]
        last = codes[-1] if codes else None
        if last is None or last in _OUT_OF_RESOURCES:
            raise Lost("the connection ended" if last is None else "the server fails")
        if last != 0x0000:
            raise InputError(
                f"data.source {self._address}: the PACS does not answer a query at the level "
                f"{level} ({last:04X})",
                "Ask its administrator, or take its DICOMweb service.",
            )
        found = [match for _, match in answers[:-1]]
        if None in found:
            raise InputError(f"data.source {self._address}: an answer of the PACS is damaged")
        return [match for match in found if match is not None]


def _query(level: str, **keys: str) -> Dataset:
    """An identifier; an empty value asks for one."""
    out = Dataset()
    out.QueryRetrieveLevel = level
    for name, value in keys.items():
        setattr(out, name, value)
    return out


def _store(event: evt.Event, line: _Line) -> int:
    """Take a file that was asked for; the status to answer with (PS3.4 table B.2-1)."""
    slot, request = line.slot, event.request
    if slot.file is None or str(getattr(request, "AffectedSOPInstanceUID", "")) != slot.uid:
        return 0xC000
    if slot.oversized:
        return 0xA700
    try:
        with whole(slot.file) as handle:
            handle.write(event.encoded_dataset())
    except OSError as error:
        slot.error = error
        return 0xA700
    slot.stored = True
    return 0x0000


def _count(event: evt.Event, line: _Line) -> None:
    """End a connection on which more comes than a file may hold."""
    slot, wire = line.slot, event.assoc.dul.socket
    slot.n_bytes += len(event.data) if slot.file is not None else 0
    if slot.n_bytes > dicom.MAX_FILE_BYTES and not slot.oversized:
        slot.oversized = True
        if wire is not None:  # an abort would wait for the thread that this is called in
            wire.close()


def _text(data: Dataset, name: str) -> str:
    """An element as stripped text, empty where it is missing."""
    with contextlib.suppress(Exception):  # a damaged value raises anything
        value = data.get(name)
        return "" if value is None else str(value).strip().strip("\0")
    return ""
