"""What a reading of scans found, for passing around in the house: receipt.json and receipt.html.

Counts alone. No text of a header or a file name is in it, and a scanner, sequence, voxel size or
orientation that fewer than `MIN_PATIENTS` people have is counted with its like. No time either:
equal sources give equal receipts; how long the reading took is in log.jsonl.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthmed.artifacts import Scan
from synthmed.formats.refusal import REASONS
from synthmed.formats.selection import MIN_PATIENTS
from synthmed.progress import clock
from synthmed.report.page import environment, number
from synthmed.store import write_bytes, write_json
from synthmed.types import SCHEMA_VERSION

RECEIPT, PAGE = "receipt.json", "receipt.html"
"""The first also marks a folder as the target of an earlier `deidentify`."""
RARE = "rarer ones"
"""The row of all that few people have; `other` is a manufacturer that is not in the known list."""
NOT_TOLD = "not told"
_NOTHING_ELSE = "Counts alone: no name, number or text of a file or header is on this page."
_POOLED = f"What fewer than {MIN_PATIENTS} patients have is counted as “{RARE}”."


def of_ingest(facts: Mapping[str, Any], scans: Sequence[Scan]) -> dict[str, Any]:
    """The receipt of an ingest.

    Args:
        facts: what `stages.ingest.ingest` returned.
        scans: its catalogue.
    """
    kinds: dict[str, Callable[[Scan], str]] = {
        "scanner": _scanner,
        "sequence": _sequence,
        "voxel_mm": lambda scan: "x".join(f"{round(v, 1):g}" for v in scan.spacing_mm),
        "orientation": lambda scan: scan.orientation,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "format": facts["format"],
        "modality": facts["modality"],
        **{k: facts[k] for k in ("n_files", "n_bytes", "n_auxiliary", "n_scans", "n_patients")},
        "n_refused": facts["n_quarantined"],
        "refused": _refused(facts["reasons"]),
        **{name: _rows(scans, of) for name, of in kinds.items()},
    }


def write(folder: Path, receipt: Mapping[str, Any]) -> None:
    """receipt.json and its page, into the folder of a catalogue."""
    write_json(folder / RECEIPT, receipt)
    write_bytes(folder / PAGE, _page(_of_catalogue(receipt)))


def write_cleaned(folder: Path, receipt: Mapping[str, Any]) -> None:
    """The same for the target of `deidentify`, whose receipt says itself what it holds."""
    write_json(folder / RECEIPT, receipt)
    write_bytes(folder / PAGE, _page(_of_cleaned(receipt)))


def lines(receipt: Mapping[str, Any], seconds: float | None) -> list[str]:
    """The receipt of an ingest as text.

    Args:
        receipt: what `of_ingest` returned.
        seconds: that the reading took; None where nobody knows any more.
    """
    size = receipt["n_bytes"] / 1e6
    rows = [
        ("read", f"{receipt['n_scans']} scans of {receipt['n_patients']} patients", ""),
        ("", f"{receipt['n_files']} files, {size:.1f} MB", _speed(receipt, seconds)),
    ]
    for row in receipt["refused"]:
        rows.append(("refused", f"{row['n']} {row['reason']}", row["explanation"]))
    for name in _KINDS:
        for row in receipt[name]:
            count = f"{row['n_scans']} scans of {row['n_patients']} patients"
            rows.append((name.replace("_", " "), row["value"], count))
    shown = [(a if i == 0 or a != rows[i - 1][0] else "", *r) for i, (a, *r) in enumerate(rows)]
    widths = [max(len(row[k]) for row in shown) for k in range(2)]
    return [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in shown]


_KINDS = {
    "scanner": "Scanner",
    "sequence": "Sequence (TR/TE/TI, ms)",
    "voxel_mm": "Voxel (mm)",
    "orientation": "Orientation",
}
"""What scans are counted by, and its name on the page."""


def _speed(receipt: Mapping[str, Any], seconds: float | None) -> str:
    """Files and megabytes (10^6 bytes) a second."""
    if seconds is None:
        return ""
    files, size = receipt["n_files"] / max(seconds, 0.1), receipt["n_bytes"] / max(seconds, 0.1)
    return f"{files:.3g} files/s, {size / 1e6:.3g} MB/s, {clock(seconds)}"


def _refused(reasons: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"reason": c, "n": n, "explanation": REASONS[c]} for c, n in reasons.items()]


def _rows(scans: Sequence[Scan], of: Callable[[Scan], str]) -> list[dict[str, Any]]:
    """Scans and patients by a value, the commonest first; what few people have, last as one."""
    people: dict[str, set[str]] = defaultdict(set)
    for scan in scans:
        people[of(scan)].add(scan.patient)
    together: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        value = of(scan)
        together[value if len(people[value]) >= MIN_PATIENTS else RARE].append(scan)
    rows = [
        {"value": value, "n_scans": len(own), "n_patients": len({s.patient for s in own})}
        for value, own in together.items()
    ]
    return sorted(rows, key=lambda r: (r["value"] == RARE, -int(str(r["n_scans"])), r["value"]))


def _scanner(scan: Scan) -> str:
    strength = scan.scanner.get("field_strength_t")
    maker = str(scan.scanner.get("manufacturer", ""))
    return " ".join(p for p in (maker, f"{strength:g} T" if strength else "") if p) or NOT_TOLD


def _sequence(scan: Scan) -> str:
    """Repetition, echo and inversion, to two digits: more would tell single scans apart."""
    names = ("repetition_ms", "echo_ms", "inversion_ms")
    if not scan.sequence:
        return NOT_TOLD
    times = (scan.sequence.get(name) for name in names)
    return "/".join("-" if v is None else f"{float(f'{v:.2g}'):g}" for v in times)


# --- the page -----------------------------------------------------------------------------------


def _page(content: Mapping[str, Any]) -> bytes:
    return environment().get_template(PAGE).render(p=content).encode()


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], text: str = "") -> Any:
    """A table for the page; numbers in `rows` are set as such."""
    return {"title": title, "head": head, "rows": rows, "text": text}


def _refused_table(rows: Sequence[Mapping[str, Any]], where: str) -> Any:
    return _table(
        "Refused",
        ("Why", "Code", "Files"),
        [(r["explanation"], r["reason"], r["n"]) for r in rows],
        f"Each by its reason. {where}" if rows else "Nothing was.",
    )


def _of_catalogue(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """The page of an ingest."""
    tables = [_refused_table(receipt["refused"], "quarantine.tsv names them, and is private.")]
    for name, title in _KINDS.items():
        rows = [(r["value"], r["n_scans"], r["n_patients"]) for r in receipt[name]]
        tables.append(_table(title, (title, "Scans", "Patients"), rows))
    return {
        "eyebrow": "synthmed · receipt of ingest: for the house",
        "title": f"What was read: {receipt['modality']}",
        "lead": f"{receipt['n_scans']} scans of {receipt['n_patients']} patients, from "
        f"{receipt['n_files']} files ({receipt['format']}).",
        "text": f"{_NOTHING_ELSE} {_POOLED} Times are in milliseconds, to two digits.",
        "figures": [
            ("Scans", receipt["n_scans"]),
            ("Patients", receipt["n_patients"]),
            ("Refused", receipt["n_refused"]),
            ("Megabytes read", number(receipt["n_bytes"] / 1e6)),
        ],
        "tables": tables,
        "footer": "How long it took is in the run's log.jsonl. Auxiliary files (tables, "
        f"descriptions): {receipt['n_auxiliary']}.",
    }


def _of_cleaned(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """The page of a folder of clean DICOM."""
    methods = [(m["meaning"], m["code"]) for m in receipt["methods"]]
    elements = [(what[:1].upper() + what[1:], n) for what, n in receipt["elements"].items()]
    where = "The list beside this folder names them, and stays in the house."
    return {
        "eyebrow": "synthmed · receipt of deidentify",
        "title": "What was written",
        "lead": f"{receipt['n_written']} files of {receipt['n_series']} series, "
        f"{receipt['n_studies']} studies and {receipt['n_patients']} patients.",
        "text": f"{_NOTHING_ELSE} Not covered: {receipt['not_covered']}.",
        "figures": [
            ("Written", receipt["n_written"]),
            ("Patients", receipt["n_patients"]),
            ("Refused", receipt["n_refused"]),
            ("Copies of others", receipt["n_same_twice"]),
        ],
        "tables": [
            _refused_table(_refused(receipt["refused"]), where),
            _table("Methods", ("Method", "Code"), methods, receipt["profile"]),
            _table("Elements", ("What became of them", "Elements"), elements),
        ],
        "footer": f"synthmed {receipt['synthmed']}.",
    }
