"""A series taken apart into volumes: echoes, components, b-values and moments, each by its name.

A series may hold many volumes of one place. What they are told apart by is what the scanner varied
(the type of image, echo, inversion and so on), and where nothing else differs, time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthmed.formats import stack
from synthmed.formats.dicom import Slice, component
from synthmed.formats.refusal import Refused

Kind = tuple[tuple[str, str | float], ...]


@dataclass(frozen=True)
class Volume:
    """Slices at different places.

    Args:
        name: what tells it from the others of its series, such as "echo-2_time-10"; empty where
            there is one. It holds no text of the header.
    """

    name: str
    slices: tuple[Slice, ...]


def volumes(slices: Sequence[Slice]) -> list[Volume]:
    """The volumes of a series, in the order of what varies and then of time.

    Raises:
        Refused: some places have more slices than others.
    """
    places = _places(slices)
    if len(set(places)) == len(places):
        return [Volume("", tuple(slices))]
    by_kind: dict[Kind, list[int]] = defaultdict(list)
    for i, s in enumerate(slices):
        by_kind[s.kind].append(i)
    names = _names(sorted(by_kind, key=str))
    out = []
    for kind in sorted(by_kind, key=lambda k: (_sizes(k), str(k))):
        own = [(places[i], slices[i]) for i in by_kind[kind]]
        every = _stacks(own)
        if {place for place, _ in own} != set(places):
            raise Refused("duplicate_positions", "Some of its volumes lack slices of others.")
        for k, one in enumerate(every, 1):
            parts = [names[kind], f"time-{k}" if len(every) > 1 else ""]
            out.append(Volume("_".join(p for p in parts if p), one))
    return out


def _stacks(own: Sequence[tuple[int, Slice]]) -> list[tuple[Slice, ...]]:
    """Images of one kind as stacks, one after the other in time.

    Which images of different places belong together has to be said: by the file that holds them
    all, by one number of time or acquisition, or by instance numbers that run through the places
    volume by volume or through the times place by place. What is left to guessing is refused.

    Args:
        own: number of its place, and each image.
    """
    n_places = len({place for place, _ in own})
    n, rest = divmod(len(own), n_places)
    if rest or set(Counter(place for place, _ in own).values()) != {n}:
        raise Refused("duplicate_positions", "Some places have more images than others.")
    if n == 1:
        return [tuple(s for _, s in own)]
    told = [(s.path, s.moment.time, s.moment.acquisition) for _, s in own]
    for keys in zip(*told, strict=True):
        groups: dict[Any, list[tuple[int, Slice]]] = defaultdict(list)
        for key, item in zip(keys, own, strict=True):
            groups[key].append(item)
        if len(groups) == n and all(_once(g, n_places) for g in groups.values()):
            stacks = [tuple(s for _, s in sorted(g, key=_by_place)) for g in groups.values()]
            return sorted(stacks, key=lambda stack: min((s.moment, s.path) for s in stack))
    ordered = sorted(own, key=lambda item: item[1].moment[3:])
    if len({s.moment[3:] for _, s in own}) == len(own):  # instance, and image of its file
        blocks = [ordered[i : i + n_places] for i in range(0, len(own), n_places)]
        if all(_once(block, n_places) for block in blocks):
            return [tuple(s for _, s in block) for block in blocks]
        columns = [ordered[i : i + n] for i in range(0, len(own), n)]
        if all(len({place for place, _ in column}) == 1 for column in columns):
            return [tuple(s for _, s in stack) for stack in zip(*columns, strict=True)]
    raise Refused("duplicate_positions", "Which of its images belong together is not said.")


def _once(group: Sequence[tuple[int, Slice]], n_places: int) -> bool:
    """Whether a group has one image at every place."""
    return len(group) == n_places == len({place for place, _ in group})


def _by_place(item: tuple[int, Slice]) -> int:
    return item[0]


def _places(slices: Sequence[Slice]) -> list[int]:
    """Number of each slice's place; all different where no two are parallel or none repeats."""
    turns = np.array([s.orientation for s in slices])
    if len(slices) < 2 or np.abs(turns - turns[0]).max() > 1e-2:
        return list(range(len(slices)))
    heights = np.array([s.position for s in slices]) @ np.cross(turns[0, :3], turns[0, 3:])
    return [int(v) for v in stack.levels(heights)]


def _sizes(kind: Kind) -> list[float]:
    """The numbers of a kind, for sorting."""
    return [v for _, v in kind if isinstance(v, float)]


def _names(kinds: Sequence[Kind]) -> dict[Kind, str]:
    """Each kind by what differs among them: words of our own and counts."""
    varying: list[str] = []
    for name, _ in kinds[0]:  # no more than it takes to tell them apart
        told = len({tuple(dict(kind)[n] for n in varying) for kind in kinds})
        if told < len(kinds) and len({dict(kind)[name] for kind in kinds}) > 1:
            varying.append(name)
    every = {name: sorted({dict(kind)[name] for kind in kinds}, key=_order) for name in varying}
    words = {name: _words(name, values) for name, values in every.items()}
    return {
        kind: "_".join(words[name][every[name].index(dict(kind)[name])] for name in varying)
        for kind in kinds
    }


def _order(value: str | float) -> tuple[bool, float, str]:
    return isinstance(value, str), value if isinstance(value, float) else 0.0, str(value)


def _words(name: str, values: Sequence[str | float]) -> list[str]:
    """One for each value, all different."""
    if name == "type":
        found = [component(str(v)) for v in values]
        if len(set(found)) == len(found) and all(found):
            return found
    if name == "b":
        whole = [f"b-{round(float(v))}" for v in values]
        if len(set(whole)) == len(whole):
            return whole
    return [f"{name}-{k}" for k in range(1, len(values) + 1)]
