"""Ages: which condition is one, in what unit, and from where on they are one group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from synthmed.types import Labels

if TYPE_CHECKING:
    from synthmed.config import Condition

POOL_YEARS = 90
"""Ages from here on are one (HIPAA Safe Harbor, 45 CFR 164.514(b)(2)(i)(C))."""
LONGEST_YEARS = 130
"""No age of anybody: what is declared to go beyond it is in another unit."""
UNITS = ("years", "months", "weeks", "days")

_PER_YEAR = {
    **dict.fromkeys(("a", "y", "yr", "yrs", "year", "years"), 1.0),
    **dict.fromkeys(("mo", "month", "months"), 12.0),
    **dict.fromkeys(("w", "wk", "week", "weeks"), 365.25 / 7),
    **dict.fromkeys(("d", "day", "days"), 365.25),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def named(name: str) -> bool:
    """Whether a column is an age by its name.

    >>> [named(n) for n in ("age", "age_years", "ageAtScan", "AGE", "stage", "Percentage")]
    [True, True, True, True, False, False]
    """
    return any(word.lower() == "age" for word in _WORD.findall(name))


def per_year(unit: str) -> float | None:
    """How many of a unit make a year: 1 where none is given, null where it is no unit of age."""
    return 1.0 if unit == "1" else _PER_YEAR.get(unit.lower())


def pool(name: str, condition: Condition) -> float | None:
    """From where on ages are one group, in the condition's unit; null where it is no age.

    A number is an age where its name says so, or where it is in years.
    """
    if condition.kind != "continuous":
        return None
    a_year = per_year(condition.unit)
    years = condition.unit != "1" and a_year == 1
    return POOL_YEARS * a_year if a_year is not None and (named(name) or years) else None


def pooled(labels: Labels, conditions: Mapping[str, Condition]) -> dict[str, str | float]:
    """Labels as they may leave: old ages are the pool's."""
    out = dict(labels)
    for name, condition in conditions.items():
        limit, value = pool(name, condition), out.get(name)
        if limit is not None and value is not None:
            out[name] = min(float(value), limit)
    return out


def doubt(name: str, unit: str, high: float) -> str:
    """What is wrong with an age that is declared so; empty where nothing is."""
    if not named(name):
        return ""
    if per_year(unit) is None:
        return f"{unit!r} is no unit of an age: {', '.join(UNITS)}"
    if unit == "1" and high > LONGEST_YEARS:
        return f"an age up to {high:g} is not in years: say {', '.join(UNITS[:-1])} or {UNITS[-1]}"
    return ""
