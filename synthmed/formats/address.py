"""The address of a PACS, as `data.source` gives it; nothing here talks to anybody."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

CALLING = "SYNTHMED"
"""AE title that a PACS is called with where the address names none."""

_SCHEMES: dict[str, tuple[Literal["dicomweb", "dimse"], bool, int]] = {
    "dicomweb": ("dicomweb", True, 443),
    "dicomweb+http": ("dicomweb", False, 80),
    "dimse": ("dimse", False, 104),
    "dimses": ("dimse", True, 2762),
}
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_TITLE = re.compile(r"(?=.*\S)[ -\[\]-~]{1,16}")
"""PS3.5 table 6.2-1, AE: up to 16 printable characters, no backslash, not blanks alone."""


@dataclass(frozen=True)
class Address:
    """Where a PACS is and how it is spoken to.

    Args:
        protocol: QIDO-RS and WADO-RS, or C-FIND and C-GET.
        tls: whether the connection is encrypted and the server's certificate verified.
        path: of a DICOMweb service, empty or with a leading /.
        calling: AE title of this side, and `called` that of the PACS; empty for DICOMweb.
        text: the address as it was given.
    """

    protocol: Literal["dicomweb", "dimse"]
    tls: bool
    host: str
    port: int
    path: str
    calling: str
    called: str
    text: str

    @property
    def url(self) -> str:
        """The base of a DICOMweb service."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.tls}://{host}:{self.port}{self.path}"

    @property
    def loopback(self) -> bool:
        """Whether it is this machine, so that nothing passes a wire."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    def __str__(self) -> str:
        return self.text


def is_address(text: str) -> bool:
    """Whether a source is an address and no folder.

    >>> is_address("dicomweb://pacs.example.org/dicom-web"), is_address("/data/my-cohort")
    (True, False)
    """
    return "://" in text


def parse(text: str) -> Address:
    """An address from its text: `dicomweb://HOST[:PORT]/PATH`, or `dimse://[CALLING@]HOST/CALLED`.

    >>> parse("dicomweb://pacs.example.org/dicom-web").url
    'https://pacs.example.org:443/dicom-web'
    >>> parse("dimse://ME@10.0.0.7:11112/ARCHIVE").called
    'ARCHIVE'

    Raises:
        ValueError: it is none; the message does not repeat it, since a password may be in it.
    """
    scheme, _, _ = text.partition("://")
    if scheme not in _SCHEMES:
        other = " (https is dicomweb, http is dicomweb+http)" * scheme.startswith("http")
        raise ValueError(f"an address begins with one of {', '.join(_SCHEMES)}{other}")
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("the address holds a blank or another character that belongs in none")
    protocol, tls, usual = _SCHEMES[scheme]
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port or usual
    except ValueError:
        raise ValueError("the address has no possible host or port") from None
    user, at, _ = parts.netloc.rpartition("@")
    if ":" in user or (at and protocol == "dicomweb"):
        raise ValueError(
            "no user and no password in an address, which is stored with the run; "
            "set SYNTHMED_PACS_TOKEN in the environment"
        )
    if not _HOST.fullmatch(host):
        raise ValueError("the address has no possible host or port")
    if parts.query or parts.fragment:
        raise ValueError("an address has no ? and no #; choose with data.table and data.select")
    path, calling, called = parts.path.rstrip("/"), "", ""
    if protocol == "dicomweb":
        if re.search(r"[^\w/.~%-]|\.\.", path, re.ASCII):
            raise ValueError("the path of the address is none")
    else:
        calling, called, path = unquote(user) or CALLING, unquote(path.removeprefix("/")), ""
        if not (_TITLE.fullmatch(calling) and _TITLE.fullmatch(called)):
            raise ValueError(
                "give dimse://CALLING@HOST:PORT/CALLED, with AE titles of 1 to 16 characters"
            )
    return Address(protocol, tls, host, port, path, calling, called, text)
