"""Search for many strings at once in large byte strings, in any case and several encodings.

Candidates come from the first four bytes of each string, compared at every offset in one
vectorised pass; only they are looked at closely, so a thousand names cost little more than one.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

MIN_TEXT = 4
"""Characters of the shortest string that is searched: shorter ones occur in any text."""

CHUNK_BYTES = 1 << 22
"""How much is compared at once: bounds the memory of the pass."""

_DIGEST = re.compile(rb"(?<![0-9a-z])(?:[0-9a-f]{64}|[0-9a-f]{128})(?![0-9a-z])")
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz") | frozenset(range(0x80, 0x100))
_DIGITS = frozenset(b"0123456789")


class Needles:
    """The strings to be found.

    A string of letters alone is found as a word, not inside a longer one, and digits alone as a
    number, not inside a longer one or behind a decimal point; anything else is found anywhere.

    Args:
        strings: what is searched; those under `MIN_TEXT` characters are left out.
        ending: that a number at either end of a string is not the beginning or end of a longer one:
            Subj1 is nobody of Subj10.
    """

    def __init__(self, strings: Collection[str], ending: bool = False) -> None:
        self._ending = ending
        self._by_head: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
        spelt = {(b, len(s)) for s in strings if len(s) >= MIN_TEXT for b in _spellings(s)}
        for needle, length in spelt:
            self._by_head[int.from_bytes(needle[:4], "little")].append((needle, length))
        self._heads = np.array(sorted(self._by_head), dtype=np.uint32)
        self._table = np.zeros(1 << 16, dtype=bool)
        self._table[_hashed(self._heads)] = True

    def found_in(self, content: bytes, *, shortest: int) -> bool:
        """Whether any string of at least `shortest` characters occurs in `content`."""
        if not len(self._heads):
            return False
        low = content.lower()
        # "face" inside a SHA-256 is nobody's name
        low = _DIGEST.sub(lambda m: b" " * len(m[0]), low) if shortest < 8 else low
        for begin in range(0, len(low), CHUNK_BYTES):
            if self._in_chunk(low, begin, shortest):
                return True
        return False

    def _in_chunk(self, low: bytes, begin: int, shortest: int) -> bool:
        part = np.frombuffer(low[begin : begin + CHUNK_BYTES + 3], dtype=np.uint8)
        if len(part) < 4:
            return False
        n = len(part) - 3
        windows = part[:n].astype(np.uint32)
        for i in (1, 2, 3):
            windows |= part[i : n + i].astype(np.uint32) << np.uint32(8 * i)
        # two steps: a table of 64 Ki entries leaves few offsets, an exact comparison almost none
        likely = np.flatnonzero(self._table[_hashed(windows)])
        for at in likely[np.isin(windows[likely], self._heads)]:
            offset = begin + int(at)
            for needle, length in self._by_head[int(windows[at])]:
                if (
                    length >= shortest
                    and low.startswith(needle, offset)
                    and _stands_alone(low, offset, needle, self._ending)
                ):
                    return True
        return False


def _hashed(windows: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Four bytes to 16 bits (Knuth's multiplicative hash; the product wraps)."""
    return (windows * np.uint32(2654435761)) >> np.uint32(16)


def _spellings(text: str) -> set[bytes]:
    """How `text` may be written, lower-cased byte by byte as the content will be.

    Letters with accents as one sign or two, and what JSON and HTML make of it. A file name that is
    not UTF-8 also as its bytes, and as the Latin-1 that these most often are.
    """
    spellings = set()
    forms = {text, text.lower(), text.upper()}
    if any("\udc80" <= sign <= "\udcff" for sign in text):  # os.fsdecode's, of bytes
        raw = text.encode("utf-8", "surrogateescape")
        spellings.add(raw.lower())
        forms.add(raw.decode("latin-1"))
    forms |= {unicodedata.normalize(kind, form) for form in forms for kind in ("NFC", "NFD")}
    for change in (_in_json, _in_html, html.escape):
        forms |= {change(form) for form in forms}
    for form in forms:
        for encoding in ("utf-8", "latin-1", "utf-16-le", "utf-16-be"):
            try:
                spellings.add(form.encode(encoding).lower())
            except UnicodeEncodeError:
                continue  # this encoding cannot hold the text, so it cannot hide there
    return spellings


def _in_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _in_html(text: str) -> str:
    """As jinja2 writes it; `html.escape` has another number for a quote."""
    return html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")


def _stands_alone(low: bytes, offset: int, needle: bytes, ending: bool) -> bool:
    """Whether a string of one kind (letters, digits) is not a piece of a longer one."""
    before = low[offset - 1 : offset] if offset else b""
    after = low[offset + len(needle) : offset + len(needle) + 2]
    kinds = set(needle)
    if kinds <= _LETTERS:
        return not (before and before[0] in _LETTERS) and not (after and after[0] in _LETTERS)
    if kinds <= _DIGITS:
        is_longer = after[:1].isdigit() or (after[:1] == b"." and after[1:].isdigit())
        return not (before.isdigit() or before == b"." or is_longer)
    cut_off = needle[-1] in _DIGITS and after[:1].isdigit()
    cut_off |= needle[0] in _DIGITS and before.isdigit()
    return not (ending and cut_off)
