"""The list of what was refused, and nothing else that names a file of the source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from synthmed.formats.refusal import Refused

HEADER = "path\tpatient\treason\texplanation"
"""First line of the table."""


@dataclass
class Quarantine:
    """Refused files, each with its patient's pseudonym where known, a code and a sentence."""

    entries: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def add(self, path: str, reason: Refused, patient: str = "") -> None:
        """Enter a path (relative to the source) with its reason."""
        self.entries.setdefault((path, reason.code, patient), reason.explanation)

    def write(self, file: Path, names: Mapping[str, str] = {}) -> None:
        """Write the table, sorted by path, or by what `names` calls a path."""
        rows = sorted(
            (names.get(path, path), code, patient, explanation)
            for (path, code, patient), explanation in self.entries.items()
        )
        lines = [HEADER]
        lines += [
            f"{_cell(path)}\t{patient}\t{code}\t{explanation}"
            for path, code, patient, explanation in rows
        ]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def counts(self) -> dict[str, int]:
        """Reason code to number of entries, the commonest first."""
        return _counts(code for _, code, _ in self.entries)

    def summary(self) -> str:
        """The three commonest reasons with their counts, for a message."""
        counts = [f"{code} {n}" for code, n in self.counts().items()]
        return ", ".join(counts[:3] + ["..."] * (len(counts) > 3)) or "nothing"


def without(file: Path, people: Collection[str]) -> tuple[str, dict[str, int]]:
    """A written table without the rows of some people, and the reasons of the others.

    Args:
        file: what `Quarantine.write` has written.
        people: pseudonyms.
    """
    head, *rows = file.read_text(encoding="utf-8").split("\n")[:-1]
    kept = [row for row in rows if row.split("\t")[1] not in people]
    return "\n".join([head, *kept]) + "\n", _counts(row.split("\t")[2] for row in kept)


def listed(counts: Mapping[str, int]) -> str:
    """Counts by reason, for a line on the terminal.

    >>> listed({"truncated": 2, "rgb": 1})
    '2 truncated, 1 rgb'
    """
    return ", ".join(f"{n} {code}" for code, n in counts.items())


def _counts(codes: Iterable[str]) -> dict[str, int]:
    """How often each occurs, the commonest first."""
    return dict(sorted(Counter(codes).items(), key=lambda item: (-item[1], item[0])))


def _cell(path: str) -> str:
    """A file name that stays in its cell: control characters and odd bytes are escaped."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
