"""The ledger for a person: who has paid how much, in which runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from synthmed.errors import UsageError
from synthmed.privacy.accounting import epsilon
from synthmed.privacy.ledger import Ledger


def overview(delta: float, with_patients: bool) -> dict[str, Any]:
    """What every patient has paid, those with the same history together.

    Args:
        delta: at which epsilon is computed.
        with_patients: list the pseudonyms as well.

    Raises:
        UsageError: delta is not between 0 and 1.
        InputError: the ledger was altered or lost.
    """
    if not 0 < delta < 1:
        raise UsageError(f"--delta {delta:g}: expected a number between 0 and 1")
    ledger = Ledger()
    charged = [a for a in ledger.accounts.values() if a.charges]
    everybody = sorted({p for a in charged for p in a.patients})
    together: dict[frozenset[str], list[str]] = {}
    for p in everybody:
        together.setdefault(frozenset(a.run for a in charged if p in a.patients), []).append(p)
    groups: list[dict[str, Any]] = []
    for runs, people in together.items():
        mine = [a for a in charged if a.run in runs]
        groups.append(
            {
                "n_patients": len(people),
                "epsilon": round(epsilon([a.steps for a in mine], delta), 4),
                "runs": [
                    {"run": a.run[:12], "title": a.title, "steps": len(a.charges)} for a in mine
                ],
                "promised": min(a.promise[0] for a in mine),
                "n_unprotected_runs": ledger.without_protection(people),
                **({"patients": people} if with_patients else {}),
            }
        )
    groups.sort(key=lambda g: -float(str(g["epsilon"])))
    return {"delta": delta, "n_lines": ledger.n_lines, "groups": groups}


def describe(facts: Mapping[str, Any]) -> str:
    """The overview as text."""
    if not facts["groups"]:
        return "no patient of this SYNTHMED_HOME has paid for a private run"
    lines = []
    for group in facts["groups"]:
        people = "1 patient" if group["n_patients"] == 1 else f"{group['n_patients']} patients"
        lines.append(
            f"{people}: epsilon {group['epsilon']:.2f} at delta {facts['delta']:g}, of "
            f"{group['promised']:g} promised for good"
        )
        for run in group["runs"]:
            lines.append(f"  {run['run']}  {run['steps']:>6} steps  {run['title']}")
        if group["n_unprotected_runs"]:
            lines.append(f"  and {group['n_unprotected_runs']} runs without protection")
        lines += [f"  {p}" for p in group.get("patients", [])]
    return "\n".join(lines)
