"""report.json: the machine-readable report, in a restricted and a shareable version.

The page is made of this file and the images beside it alone, so it can be made again at any time.
No time is in it: the same evidence gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from synthmed import __version__
from synthmed.config import Config, Rule
from synthmed.deid.scan import Finding
from synthmed.metrics.subgroups import tens
from synthmed.policy import describe, limits
from synthmed.report.facts import CohortFacts
from synthmed.report.glance import WORST_FIRST
from synthmed.report.images import legend, masks_of
from synthmed.report.protected import protected, stated
from synthmed.types import SCHEMA_VERSION, WORST, Decision, Estimate

Report = dict[str, Any]


def build(
    kind: Literal["restricted", "shareable"],
    config: Config,
    decision: Decision,
    estimates: Sequence[Estimate],
    facts: CohortFacts,
    *,
    findings: Sequence[Finding],
    n_searched: int,
    images: Sequence[Mapping[str, str]],
    volumes: Sequence[Mapping[str, str]],
    names_model: bool = True,
    examination: Mapping[str, Any] | None = None,
    under_two_names: Sequence[Sequence[str]] | None = None,
) -> Report:
    """The content of report.json.

    The shareable version holds the estimates that the policy names and, of the identifier scan,
    the counts; the restricted one holds everything. No count of fewer than ten patients in a
    subgroup leaves: notes hold none, and where an estimate speaks of a part of those held out, the
    shareable version rounds their number down to tens, so that nobody can subtract.

    Args:
        kind: who reads it: inside the house (restricted) or the receiver (shareable).
        config: the run's config; its policy, conditions and governance are printed.
        decision: what was decided, line by line.
        estimates: the evidence.
        facts: numbers and digests of the run.
        findings: of the identifier scan.
        n_searched: strings the scan looked for.
        images: file (below report/), group and caption of each image that lies beside the report.
        volumes: likewise of each volume.
        names_model: False where the cohort was not made by the config's backbone.
        examination: what the model shows of itself; in the restricted version alone.
        under_two_names: pairs of pseudonyms; in the restricted version alone.
    """
    named = {(r.estimate, r.slice) for r in config.policy.rules}
    if kind == "shareable":
        estimates = [
            _without_small_counts(e, facts.n_holdout, e.slice in (WORST, *config.data.subgroups))
            for e in estimates
            if (e.name, e.slice) in named
        ]
    listed = [f.model_dump(mode="json") for f in findings] if kind == "restricted" else None
    scan = {"n_searched": n_searched, "n_findings": len(findings), "findings": listed}
    report = {
        "schema_version": SCHEMA_VERSION,
        "report": kind,
        "title": config.export.name,
        "decision": decision.decision,
        "reasons": list(decision.reasons),
        "cohort": {
            "n_patients": facts.n_patients,
            "n_scans": facts.n_scans,
            "n_train": facts.n_train,
            "n_holdout": facts.n_holdout,
            "n_synthetic": facts.n_synthetic,
            "n_dropped": facts.n_dropped,
        },
        "privacy": stated(facts.privacy, config.privacy, facts.attempts),
        "estimates": [_judged(e, config.policy.rules, decision) for e in estimates],
        "policy": [v.model_dump(mode="json") for v in decision.verdicts],
        "identifier_scan": scan,
        "signature": None,
        "data": {
            "modality": config.data.modality,
            "slices": config.data.flat is not None,
            "conditions": {n: c.model_dump(mode="json") for n, c in config.data.conditions.items()},
            "masks": legend(masks_of(config)),
            "given_masks": [n for n, c in (config.data.channels or {}).items() if c.given],
            "backbone": config.backbone.name if names_model else None,
            "license": config.governance.licence or config.export.license,
            "governance": config.governance.model_dump(mode="json"),
        },
        "images": [dict(i) for i in images],
        "volumes": [dict(v) for v in volumes],
        "examination": examination if kind == "restricted" else None,
        "under_two_names": (
            [list(p) for p in under_two_names or ()] if kind == "restricted" else None
        ),
        "provenance": {
            "synthmed": __version__,
            "versions": dict(sorted(facts.versions.items())),
            "digests": dict(sorted(facts.digests.items())),
            "seed": facts.seed if facts.seed is not None else config.seed,
            "n_resamples": config.evaluate.resamples,
            "init": facts.init,
        },
    }
    if kind == "shareable" and report["privacy"]:
        return protected(report, config.policy.rules)
    return report


def _without_small_counts(estimate: Estimate, n_holdout: int, is_subgroup: bool) -> Estimate:
    """An estimate with the number of a part of the patients rounded down to tens."""
    fields = {}
    n = estimate.n_holdout
    if n is not None and n != n_holdout:
        fields["n_holdout"] = tens(n)
    if is_subgroup:  # samples or training patients, as the method says
        fields["n"] = tens(estimate.n)
    return estimate.model_copy(update=fields)


def _judged(estimate: Estimate, rules: Sequence[Rule], decision: Decision) -> dict[str, Any]:
    """An estimate with its status and the limits that its rules amount to.

    The status is the worst of its rules' verdicts. Where no rule speaks of it nothing was decided:
    the status is inconclusive and `rules` is empty.
    """
    key = (estimate.name, estimate.slice)
    statuses = {v.status for v in decision.verdicts if (v.estimate, v.slice) == key}
    status = next((s for s in WORST_FIRST if s in statuses), "inconclusive")
    spoken = []
    for rule in rules:
        if (rule.estimate, rule.slice) == key:
            limit, review = limits(rule, estimate)
            side = "at_most" if rule.at_most is not None else "at_least"
            spoken.append({"text": describe(rule), "side": side, "limit": limit, "review": review})
    told = estimate.model_dump(mode="json", exclude={"stands_for"})
    return {**told, "status": status, "rules": spoken}
