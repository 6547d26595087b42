"""The paragraph on methods that a paper can take over: what was done, in figures of this report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIGURES = (
    ("mmd2_excess", "squared maximum mean discrepancy beyond that of real patients", ""),
    ("recall", "recall", "{:.3g} of real training patients"),
    ("coverage", "coverage", "{:.3g} of real training patients"),
    ("copied_patients", "share of training patients copied, before the filter", ""),
    ("membership_auc", "AUC of membership inference", "guessing {:.3g}"),
    (
        "auc_tstr_minus_trtr",
        "AUC of a classifier taught by synthetic scans less that of one taught by real scans",
        "",
    ),
)
"""What the paragraph reports where the report holds it, and what its floor is: a figure of real
patients, a convention, or nothing worth saying (the floor of a difference and of a share is 0)."""


def cited(report: Mapping[str, Any]) -> str:
    """A few sentences, without anything that the report itself does not show.

    Args:
        report: the content of report.json, of either kind.
    """
    count, data, privacy = report["cohort"], report["data"], report["privacy"]
    about = report["provenance"]
    model = data.get("backbone")
    made = f" with the backbone {model}" if model else ""
    parts = [
        f"{count['n_synthetic']} synthetic {data['modality']} scans were "
        + ("generated" if model else "assessed")
        + f"{made} by synthmed {about['synthmed']} (seed {about['seed']})."
    ]
    if count["n_train"] is not None:
        parts.append(
            f"The source held {count['n_scans']} scans of {count['n_patients']} patients, split by "
            f"patient: {count['n_train']} to learn from, {count['n_holdout']} held out."
            if model
            else f"They were set against {count['n_scans']} real scans of {count['n_patients']} "
            f"patients: {count['n_train']} taken for those learned from, {count['n_holdout']} for "
            "held out."
        )
    if privacy:
        parts.append(
            f"Training was differentially private (epsilon {privacy['epsilon']:.3g}, delta "
            f"{privacy['delta']}, unit {privacy['unit']}, adjacency {privacy['adjacency']}, "
            f"accountant {privacy['accountant']})."
        )
    else:
        parts.append(f"No formal privacy guarantee {'applies' if model else 'is known'}.")
    said = [text for figure in _FIGURES if (text := _figure(report, *figure))]
    if said:
        parts.append(f"Measured on real patients (95 % intervals): {'; '.join(said)}.")
    n_met = sum(v["status"] == "pass" for v in report["policy"])
    if all(v["status"] for v in report["policy"]):
        parts.append(f"{n_met} of {len(report['policy'])} lines of the release policy were met.")
    signed = ", signed for release by a named person" if report["signature"] else ""
    parts.append(f"Decision: {report['decision']}{signed}.")
    return " ".join(parts)


def _figure(report: Mapping[str, Any], name: str, what: str, floor: str) -> str:
    """One estimate of the whole cohort in words; empty where it is not in the report."""
    found = (e for e in report["estimates"] if e["name"] == name and e["slice"] is None)
    e = next(found, None)
    if e is None or e["value"] is None:
        return ""
    ci = f" [{e['ci'][0]:.3g}, {e['ci'][1]:.3g}]" if e["ci"] else ""
    beside = f" ({floor.format(e['floor'])})" if floor and e["floor"] is not None else ""
    return f"{what} {e['value']:.3g}{ci}{beside}"
