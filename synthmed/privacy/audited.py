"""What a report says of an audit that was made of its run."""

from __future__ import annotations

import json
from typing import Any

from synthmed.store import Artifact, Run
from synthmed.types import Estimate

FILE = "audit.json"


def inside(run: Run, model: Artifact) -> list[Estimate]:
    """The attacks on the weights, for the restricted report alone.

    The weights stay in the house, so these figures judge no cohort and no policy may ask for them.
    Empty where this very model has had no audit, or one before there were such attacks.
    """
    result = _result(run, model)
    return [Estimate.model_validate(e) for e in result.get("membership", [])]


def estimates(run: Run, model: Artifact) -> list[Estimate]:
    """What the audit says of the claim; empty where this very model has had none, or no claim."""
    result = _result(run, model)
    if not result.get("canaries"):
        return []
    found = result["canaries"]
    failed = [c["name"] for c in result["records"] if not c["passed"]]
    records = f"failed: {', '.join(failed)}" if failed else "all as claimed"
    worlds = result.get("two_worlds") or {"epsilon_lower_bound": 0.0}
    bounds = {"canaries": found["epsilon_lower_bound"], "worlds": worlds["epsilon_lower_bound"]}
    told = f"canaries {bounds['canaries']:.2f}, two worlds {bounds['worlds']:.2f}; "
    told += "" if result["passed"] else "THE AUDIT FAILED; "
    return [
        Estimate(
            name="epsilon_lower_bound",
            group="audit",
            value=max(bounds.values()),
            ci=None,
            n=found["n_canaries"],
            better="lower",
            floor=0.0,
            ceiling=result["epsilon_claimed"],
            method=f"Canaries of norm C in one parameter each, under the run's own mechanism on "
            f"made-up patients; {found['n_guesses']} guesses, {found['n_right']} right; confidence "
            f"0.95 (Steinke, Nasr and Jagielski 2023). Ceiling: the claim. If every guess were "
            f"right it would be {found['best_possible']:.2f}.",
            seed=result["seed"],
            note=f"{told}records of the run: {records}; itself a bound, so without an interval",
            n_holdout=None,
        )
    ]


def failed(run: Run, model: Artifact) -> bool:
    """Whether an audit of this very model has found that its promise is not kept."""
    result = _result(run, model)
    return bool(result) and not result["passed"]


def _result(run: Run, model: Artifact) -> dict[str, Any]:
    """What the audit of this very model found; empty where it has had none."""
    file = run.private / "audit" / FILE
    if not file.is_file():
        return {}
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result if result["model"] == model.digest() else {}
