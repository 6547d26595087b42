"""Which volumes of a DICOM source are wanted, and the table of what there is to choose from."""

from __future__ import annotations

import contextlib
import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthmed.config import Select
from synthmed.formats import stack
from synthmed.formats.dicom import Slice
from synthmed.formats.refusal import Refused
from synthmed.formats.volumes import Volume, volumes
from synthmed.text import aligned

MIN_PATIENTS = 3
"""Patients who share a description, for it to be shown: one alone may name somebody."""
PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class Seen:
    """One volume of a source, as its headers describe it.

    Args:
        person: the identity behind it, for counting; never shown.
        description: of its series; free text.
        facts: what may be shown of it: plane, matrix, voxel size, times, contrast agent, scanner.
        becomes: "read", or the code of the reason why not.
    """

    person: str
    description: str
    facts: tuple[tuple[str, Any], ...]
    becomes: str


def unwanted(select: Select, volume: Volume) -> Refused | None:
    """Why a volume is not wanted: the key of `data.select` that it does not fit."""
    first = volume.slices[0]
    texts = (first.acquired.description, first.acquired.protocol)
    tests = {
        "description": any(matches(select.description, t) for t in texts),
        "volume": matches(select.volume, volume.name),
        "plane": select.plane in (None, plane(first)),
        "contrast": select.contrast in (None, first.acquired.contrast),
        "max_spacing_mm": max(spacing(volume.slices)) <= (select.max_spacing_mm or np.inf) * 1.001,
        "echo_ms": _within(select.echo_ms, dict(first.kind)["echo"]),
        "inversion_ms": _within(select.inversion_ms, dict(first.kind)["inversion"]),
        "repetition_ms": _within(select.repetition_ms, first.acquired.repetition),
    }
    failed = next((name for name, fits in tests.items() if not fits), None)
    if failed is None:
        return None
    what = f"Its volume {volume.name}" if volume.name else "It"
    return Refused("not_requested", f"{what} does not fit data.select.{failed}.")


def plane(s: Slice) -> str:
    """The anatomical plane that a slice is nearest to."""
    turn = np.asarray(s.orientation)
    normal = np.abs(np.cross(turn[:3], turn[3:]))
    return PLANES[int(np.argmax(normal))]


def spacing(slices: Sequence[Slice]) -> tuple[float, float, float]:
    """Millimetres between columns, rows and slices; 0 between those of a single slice."""
    first = slices[0]
    turn = np.asarray(first.orientation)
    heights = np.array([s.position for s in slices]) @ np.cross(turn[:3], turn[3:])
    steps = np.diff(np.sort(heights))
    steps = steps[steps > stack.SAME_MM]
    return first.spacing[1], first.spacing[0], float(np.median(steps)) if len(steps) else 0.0


def times_ms(s: Slice) -> dict[str, float]:
    """Repetition, echo and inversion in milliseconds, those that the header says."""
    kind = dict(s.kind)
    found = (s.acquired.repetition, kind["echo"], kind["inversion"])
    times = zip(("repetition_ms", "echo_ms", "inversion_ms"), found, strict=True)
    return {name: round(float(v), 1) for name, v in times if v}


def seen(volume: Volume, person: str, reason: Refused | None) -> list[Seen]:
    """A volume for the table; its geometry is looked at where nothing else is against it.

    What is refused for being several volumes comes out as these.
    """
    if reason is None:
        try:
            stack.geometry(volume.slices)
        except Refused as refused:
            reason = refused
    parts = [volume]
    if reason is not None and reason.code == "is_4d":
        with contextlib.suppress(Refused):
            parts = volumes(volume.slices)
    return [_seen(part, person, "read" if reason is None else reason.code) for part in parts]


def _seen(volume: Volume, person: str, becomes: str) -> Seen:
    first = volume.slices[0]
    times = times_ms(first)
    facts = {
        "plane": plane(first),
        "matrix": [first.pixels[1], first.pixels[0], len(volume.slices)],
        "spacing_mm": [round(v, 2) for v in spacing(volume.slices)],
        "volume": volume.name.split("_time-")[0] if not volume.name.startswith("time-") else "",
        "times_ms": [times.get(k, 0.0) for k in ("repetition_ms", "echo_ms", "inversion_ms")],
        "contrast": first.acquired.contrast,
        **dict(first.scanner),
    }  # fmt: skip
    shown = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in facts.items())
    return Seen(person, first.acquired.description, shown, becomes)


def table(every: Iterable[Seen], all_descriptions: bool = False) -> list[dict[str, Any]]:
    """A row for volumes that look alike, the commonest first.

    Args:
        every: what there is.
        all_descriptions: show free text that fewer than `MIN_PATIENTS` people share.
    """
    found = list(every)
    share: dict[str, set[str]] = defaultdict(set)
    for v in found:
        share[v.description].add(v.person)
    shown = {
        d: d if all_descriptions or len(people) >= MIN_PATIENTS else ""
        for d, people in share.items()
    }
    rows: dict[Any, list[Seen]] = defaultdict(list)
    for v in found:
        rows[shown[v.description], v.facts, v.becomes].append(v)
    out = [
        {
            "n_volumes": len(alike),
            "n_patients": len({v.person for v in alike}),
            **{k: list(v) if isinstance(v, tuple) else v for k, v in facts},
            "description": text,
            "becomes": becomes,
        }
        for (text, facts, becomes), alike in rows.items()
    ]
    return sorted(out, key=lambda row: (-row["n_volumes"], str(row)))


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table as text."""
    head = (
        "volumes",
        "patients",
        "matrix",
        "mm",
        "plane",
        "TR/TE/TI",
        "scanner",
        "what",
        "becomes",
    )
    cells = [head]
    for row in rows:
        strength = row.get("field_strength_t")
        what = [row["volume"], "contrast agent" if row["contrast"] else "", row["description"]]
        cells.append(
            (
                str(row["n_volumes"]),
                str(row["n_patients"]),
                "x".join(map(str, row["matrix"])),
                "x".join(f"{v:g}" for v in row["spacing_mm"]),
                row["plane"],
                "/".join(f"{v:g}" if v else "-" for v in row["times_ms"]),
                row["manufacturer"] + (f" {strength:g} T" if strength else ""),
                ", ".join(w for w in what if w) or "-",
                row["becomes"],
            )
        )
    return aligned(cells)


def matches(patterns: Sequence[str], text: str) -> bool:
    """Whether a text fits one of the patterns and none that begin with !."""
    folded = text.casefold()
    hits = {p: fnmatch.fnmatchcase(folded, p.removeprefix("!").casefold()) for p in patterns}
    asked = [p for p in patterns if not p.startswith("!")]
    excluded = any(hit for p, hit in hits.items() if p.startswith("!"))
    return not excluded and (not asked or any(hits[p] for p in asked))


def _within(limits: tuple[float, float] | None, value: str | float) -> bool:
    """Whether a number that the header gives lies within limits; 0 means it does not give it."""
    return limits is None or limits[0] <= float(value) <= limits[1]
