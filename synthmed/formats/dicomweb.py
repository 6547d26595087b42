"""DICOMweb: QIDO-RS through dicomweb-client, WADO-RS streamed to disk as the server sends it.

Source: PS3.18 sections 8.6 (multipart), 10.4 (retrieve) and 10.6 (search). The library would parse
each instance in memory and write it anew; here bytes stay what they are, a file of any size passes
in pieces, and an answer counts only with its closing boundary.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import requests
from dicomweb_client import DICOMwebClient
from requests.exceptions import RequestException, SSLError, TooManyRedirects

from synthmed.errors import InputError, UsageError
from synthmed.formats import dicom
from synthmed.formats.address import Address
from synthmed.formats.pacs import (
    TIMEOUT_SECONDS,
    WORKERS,
    Instance,
    Lost,
    Series,
    Study,
    Torn,
    number,
    whole,
)
from synthmed.formats.refusal import Refused

TOKEN = "SYNTHMED_PACS_TOKEN"
"""Environment variable of a bearer token (RFC 6750)."""
PAGE = 1000
"""Results asked for at a time."""
MAX_ANSWER_BYTES = 1 << 26
"""Bytes of a page of results."""
MAX_SECONDS = 1800.0
"""For one answer: a server that sends a byte now and then is none."""

_CHUNK = 1 << 20
_HEAD_BYTES = 1 << 13
_LATER = {408, 429, 500, 502, 503, 504}
_DICOM = 'multipart/related; type="application/dicom"; transfer-syntax=*'


class _Session(requests.Session):
    """Answers that the library reads whole are bounded."""

    def get(self, url: str | bytes, params: Any = None, **options: Any) -> requests.Response:
        """As of requests."""
        streamed = options.get("stream", False)
        # the library names the host without its port
        headers = {k: v for k, v in (options.get("headers") or {}).items() if k != "Host"}
        response = super().get(url, params, **{**options, "headers": headers, "stream": True})
        if not streamed:
            content = bytearray()
            for piece in _pieces(response):
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    response.close()
                    raise _TooLarge
            response._content = bytes(content)
        return response


class _TooLarge(Exception):
    """An answer is larger than anything that was asked for."""


class _Bearer(requests.auth.AuthBase):
    """The token, or nothing: in either case no password of ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Web:
    """A DICOMweb service.

    A redirection is an error: it could lead to where a token or a patient's scan must not go.

    Raises:
        UsageError: there is a token and the address is plain http to another machine, or the token
            has characters that no token has.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        token = os.environ.get(TOKEN, "").strip()
        if token and not (address.tls or address.loopback):
            raise UsageError(
                f"data.source {address}: {TOKEN} would travel unencrypted",
                f"Take dicomweb:// (https), or unset {TOKEN} if the PACS asks for none.",
            )
        if not re.fullmatch(r"[!-~]*", token):
            raise UsageError(f"{TOKEN}: holds a character that no token has")
        session = _Session()
        session.trust_env = address.tls  # a proxy of the environment, its CA bundle, ~/.netrc
        session.max_redirects = 0
        session.headers["Accept-Encoding"] = "identity"
        if token or not address.tls:
            session.auth = _Bearer(token)
        pool = requests.adapters.HTTPAdapter(pool_maxsize=WORKERS)
        session.mount("https://", pool)
        session.mount("http://", pool)
        self._session = session
        self._client = DICOMwebClient(
            address.url, session=session, permissive_uid=True, timeout=TIMEOUT_SECONDS
        )
        self._client.set_http_retry_params(retry=False)  # pacs.patiently does it for both protocols

    def studies(self) -> Sequence[Study]:
        """All that hold MR."""
        find, keys = self._client.search_for_studies, {"ModalitiesInStudy": "MR"}
        found = self._search("0020000D", find, search_filters=keys)
        return [Study(uid, _text(item, "00100020")) for uid, item in found.items()]

    def series(self, study: str) -> Sequence[Series]:
        """The MR series of a study."""
        found = self._search(
            "0020000E",
            self._client.search_for_series,
            study_instance_uid=study,
            fields=["SeriesDescription", "ProtocolName", "NumberOfSeriesRelatedInstances"],
            search_filters={"Modality": "MR"},
        )
        return [
            Series(study, uid, _text(item, "0008103E"), _text(item, "00181030"),
                   number(_text(item, "00201209")))
            for uid, item in found.items()
            if _text(item, "00080060") in ("", "MR")  # a server may know no such filter
        ]  # fmt: skip

    def instances(self, series: Series) -> Sequence[Instance]:
        """The files of a series."""
        found = self._search(
            "00080018",
            self._client.search_for_instances,
            study_instance_uid=series.study,
            series_instance_uid=series.uid,
        )
        return [Instance(uid, _text(item, "00080016")) for uid, item in found.items()]

    def fetch(self, series: Series, instance: str, file: Path) -> None:
        """Write an instance as the server sends it; the file has its name once it is whole.

        Raises:
            Refused: the server does not give it, or it is larger than a file may be.
            Lost: no answer, or `Torn`: one that is not whole.
            OSError: the file cannot be written.
        """
        place = f"/studies/{series.study}/series/{series.uid}/instances/{instance}"
        with self._asked(place) as response, whole(file) as handle:
            try:
                _save(response, handle)
            except RequestException:
                raise Torn("the connection ended within it") from None

    def close(self) -> None:
        """End all connections."""
        self._session.close()

    def _asked(self, place: str) -> requests.Response:
        """The answer to a request for an instance, its body yet to come."""
        try:
            response = self._session.get(
                self._address.url + place,
                headers={"Accept": _DICOM},
                stream=True,
                timeout=TIMEOUT_SECONDS,
            )
            if not response.ok:
                response.close()
            response.raise_for_status()
        except RequestException as error:
            fault = self._fault(error)
            if isinstance(fault, _NotHere):
                raise Refused("not_fetched", f"It answers {fault}.") from None
            raise fault from None
        return response

    def _search(
        self, key: str, find: Callable[..., list[Any]], **options: Any
    ) -> dict[str, Mapping[str, Any]]:
        """All results by their UID, page after page until one brings nothing new."""
        found: dict[str, Mapping[str, Any]] = {}
        offset = 0
        while True:
            try:
                page = find(limit=PAGE, offset=offset, **options)
                new = {_text(item, key): item for item in page}
            except RequestException as error:
                fault = self._fault(error)
                raise (
                    self._no_service(str(fault)) if isinstance(fault, _NotHere) else fault
                ) from None
            except (ValueError, TypeError, AttributeError, RecursionError, _TooLarge):
                raise self._no_service("no answer of such a service") from None
            new = {uid: item for uid, item in new.items() if uid not in found}
            if not new:
                return found
            found |= new
            offset += len(page)

    def _fault(self, error: RequestException) -> Exception:
        """What an exception of the library means, in our own words: it holds addresses of scans."""
        at = f"data.source {self._address}"
        code = None if error.response is None else error.response.status_code
        if isinstance(error, SSLError):
            return InputError(
                f"{at}: its TLS certificate is not valid here, or it speaks no TLS",
                "Name the file of your house's CA in REQUESTS_CA_BUNDLE; it is never taken unseen.",
            )
        if isinstance(error, TooManyRedirects):
            return InputError(f"{at}: leads to another address", "Give that one.")
        if code in (401, 403):
            said = "asks who we are" if code == 401 else "does not let us in"
            return InputError(f"{at}: {said} (HTTP {code})", f"Set {TOKEN} to a valid token.")
        if code in _LATER:
            return Lost(f"the server fails (HTTP {code})")
        if code is not None:
            return _NotHere(f"HTTP {code}")
        if isinstance(error, requests.exceptions.JSONDecodeError):
            return _NotHere("no JSON")
        return Lost("no answer")

    def _no_service(self, why: str) -> InputError:
        return InputError(
            f"data.source {self._address}: no DICOMweb service there ({why})",
            "Check the path, often /dicom-web or /dcm4chee-arc/aets/NAME/rs.",
        )


class _NotHere(Exception):
    """The server answers, and not with what was asked for."""


def _pieces(response: requests.Response) -> Iterator[bytes]:
    """The body, for no longer than `MAX_SECONDS`."""
    end = time.monotonic() + MAX_SECONDS
    for piece in response.iter_content(_CHUNK):
        if time.monotonic() > end:
            raise Torn("it takes too long")
        yield piece


def _save(response: requests.Response, handle: BinaryIO) -> None:
    """Write the one part of a multipart answer, or a body that is DICOM itself.

    Raises:
        Torn: the closing boundary is missing.
        Refused: more than one part, another kind of answer, or too large.
    """
    kind = response.headers.get("Content-Type", "")
    pieces = _pieces(response)
    if kind.lower().startswith("application/dicom") and "json" not in kind.lower():
        end = b""  # against the standard, and done
        if not {"content-length", "transfer-encoding"} & {k.lower() for k in response.headers}:
            raise Torn("nothing says where it ends")
    elif match := re.match(
        r'multipart/related\b.*?;\s*boundary=(?:"([^"]+)"|([^\s;]+))', kind, re.I
    ):
        end = b"\r\n--" + (match[1] or match[2]).encode("latin-1", "replace")
    else:
        raise Refused("not_fetched", "The answer is no DICOM.")
    size, tail = 0, b""
    head = _head(pieces, end[2:]) if end else b""
    for piece in itertools.chain([head], pieces):
        part = tail + piece
        at = part.find(end) if end else -1
        if at >= 0:
            size += handle.write(part[:at])
            rest = part[at + len(end) :]
            while len(rest) < 2 and (more := next(pieces, b"")):
                rest += more
            if not rest.startswith(b"--"):
                raise Torn("its closing boundary is missing, or it has several parts")
            break
        keep = min(len(end), len(part))
        size += handle.write(part[: len(part) - keep])
        tail = part[len(part) - keep :]
        if size > dicom.MAX_FILE_BYTES:
            raise dicom.too_large()
    else:
        if end:
            raise Torn("its closing boundary is missing")
    if size == 0:
        raise Torn("it is empty")
    if size > dicom.MAX_FILE_BYTES:
        raise dicom.too_large()


def _head(pieces: Iterator[bytes], boundary: bytes) -> bytes:
    """What follows the headers of the first part."""
    begin = b""
    for piece in pieces:
        begin += piece
        at = begin.find(b"\r\n\r\n")
        if at >= 0:
            if boundary not in begin[:at]:
                break
            return begin[at + 4 :]
        if len(begin) > _HEAD_BYTES:
            break
    raise Torn("its first boundary is missing")


def _text(item: Mapping[str, Any], tag: str) -> str:
    """The first value of an element of the DICOM JSON model (PS3.18 annex F), stripped."""
    values = item.get(tag, {}).get("Value") or [""]
    return "" if values[0] is None else str(values[0]).strip().strip("\0")
