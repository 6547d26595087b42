"""Keyed pseudonyms: without the key nobody can tell, or test, who a pseudonym is.

The key is made on first use and stays in SYNTHMED_HOME. It is never logged and never written
into a run.
"""

from __future__ import annotations

import hmac
import os
import secrets
import unicodedata
from dataclasses import dataclass, field
from hashlib import sha256

from synthmed.errors import ResourceError
from synthmed.store import home, sync

KEY_FILE = "pseudonym.key"
KEY_BYTES = 32


@dataclass(frozen=True)
class Pseudonyms:
    """Names for people and scans under one key.

    Guarantee: HMAC-SHA256 (RFC 2104): the same identity has the same pseudonym in every run of
    this SYNTHMED_HOME, and another one elsewhere.

    Args:
        key: 32 random bytes.
    """

    key: bytes = field(repr=False)

    @classmethod
    def load(cls) -> Pseudonyms:
        """The pseudonyms of this SYNTHMED_HOME; its key is made if there is none.

        Raises:
            ResourceError: the key cannot be written or read, or is damaged.
        """
        path = home() / KEY_FILE
        try:
            if not path.exists():
                _make_key()
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            key = path.read_bytes()
        except OSError as error:
            raise ResourceError(
                f"SYNTHMED_HOME: {KEY_FILE} cannot be read or made ({error.strerror})",
                "Set SYNTHMED_HOME to a local folder only you can read and write.",
            ) from None
        if len(key) != KEY_BYTES:
            raise ResourceError(
                f"SYNTHMED_HOME: {KEY_FILE} holds {len(key)} bytes, expected {KEY_BYTES}",
                "Restore it from a backup; a new key gives every patient a new pseudonym.",
            )
        return cls(key)

    def patient(self, identity: str) -> str:
        """`p` and 16 hexadecimal digits for a person (64 bits: no collisions to be expected).

        An identity is the same however its accents are stored (Unicode NFC and NFD).
        """
        return "p" + self.digest("patient", unicodedata.normalize("NFC", identity))[:16]

    def scan(self, patient: str, session: int, series: int = 1) -> str:
        """The name of a patient's scan.

        Args:
            patient: a pseudonym.
            session: 1, 2, ... in the order of the sessions.
            series: 1, 2, ... within the session.

        >>> Pseudonyms(bytes(32)).scan("p0123456789abcdef", 2)
        'p0123456789abcdef_s02'
        """
        return f"{patient}_s{session:02d}" + (f"_r{series:02d}" if series > 1 else "")

    def digest(self, purpose: str, value: str | bytes) -> str:
        """64 hexadecimal digits of `value` under the key; purposes never share a digest."""
        if isinstance(value, str):
            value = value.encode("utf-8", "surrogateescape")
        return hmac.new(self.key, purpose.encode() + b"\0" + value, sha256).hexdigest()


def _make_key() -> None:
    """Make the key whole or not at all; where two processes try, both use the first one's."""
    folder = home()
    path = folder / KEY_FILE
    temporary = folder / f".{KEY_FILE}.{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(secrets.token_bytes(KEY_BYTES))
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, never replaces a key that is there
        except FileExistsError:
            return
        sync(folder)
    finally:
        temporary.unlink()
