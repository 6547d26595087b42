"""Under differential privacy nothing that was computed on real patients leaves but the decision."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from synthmed.config import Privacy, Rule
from synthmed.report.cards import card
from synthmed.report.page import render
from synthmed.report.protected import protected, stated

PROMISE = Privacy(epsilon=8, sample_rate=0.25, patients=200)
RULES = (
    Rule(estimate="mmd2", at_most=0.5),
    Rule(estimate="copied_patients", slice="diagnosis=rare", at_most=0.05, required=False),
)
STATEMENT: dict[str, Any] = {
    "epsilon": 3.25,
    "odds": 25.8,
    "delta": 1e-5,
    "promised": 8.0,
    "unit": "patient",
    "adjacency": "add or remove one patient, with all scans and labels",
    "accountant": "PRV, the larger of both directions",
    "epsilon_crosscheck": 3.6,
    "curve": {"1e-06": 3.9, "1e-05": 3.25},
    "steps": 200,
    "sample_rate": 0.25,
    "noise_multiplier": 2.5,
    "clip": 0.1,
    "divisor": 50.0,
    "draws": 1,
    "n_trained": 2600,
    "init_is_public": False,
    "generator": "AES-256 in counter mode, keyed in SYNTHMED_HOME",
    "gradients": {"0.vae": "vmap"},
    "lifetime": {"run": "31337", "epsilon": 0.7193, "runs_charged": 31337, "runs_unprotected": 2},
}
SECRET = 0.7193
"""A number that stands wherever something was computed on patients."""


def report() -> dict[str, Any]:
    estimate = {
        "name": "mmd2", "group": "fidelity", "value": SECRET, "ci": [SECRET, SECRET], "unit": "1",
        "n": 31337, "floor": SECRET, "ceiling": SECRET, "better": "lower", "target": None,
        "method": "m", "seed": 0, "slice": None, "note": f"p = {SECRET}", "n_holdout": 31337,
        "status": "fail", "rules": [],
    }  # fmt: skip
    return {
        "report": "shareable",
        "title": "Private heads",
        "decision": "REVIEW",
        "reasons": [f"mmd2: {SECRET} is above the limit."],
        "cohort": {
            "n_patients": 31337, "n_scans": 31337, "n_train": 31337, "n_holdout": 31337,
            "n_synthetic": 100, "n_dropped": 31337,
        },
        "privacy": stated(STATEMENT, PROMISE, attempts=3),
        "estimates": [estimate],
        "policy": [
            {"estimate": "mmd2", "slice": None, "rule": "value at most 0.5", "status": "fail",
             "reason": f"{SECRET}"},
            {"estimate": "identifier scan", "slice": None, "rule": "nothing found in any file",
             "status": "pass", "reason": "identifier scan: nothing found in any file."},
        ],
        "identifier_scan": {"n_searched": 31337, "n_findings": 0, "findings": None},
        "signature": None,
        "data": {
            "modality": "T1w", "conditions": {}, "masks": [], "given_masks": [],
            "backbone": "cvae", "license": "x",
            "governance": dict.fromkeys(("legal_basis", "ethics_number", "recipient", "licence")),
        },
        "images": [],
        "examination": None,
        "provenance": {
            "synthmed": "0", "versions": {}, "seed": 1, "n_resamples": 500, "init": None,
            "digests": {"config": "c" * 64, "dataset": "31337", "evidence": "31337"},
        },
    }  # fmt: skip


def everything(content: dict[str, Any]) -> str:
    cards = [card(name, content) for name in ("README.md", "MODEL_CARD.md", "DATASHEET.md")]
    return "\n".join([json.dumps(content), render(content, {}), *cards])


def test_no_figure_of_a_patient_is_in_any_file_that_leaves() -> None:
    text = everything(protected(report(), RULES))
    assert str(SECRET) not in text and "31337" not in text and "31,337" not in text
    # the control: the restricted content does hold them, in every file that shows them
    assert str(SECRET) in json.dumps(report()) and "31337" in json.dumps(report())
    assert "and 2 more without any protection" in render(report(), {})


def test_the_lines_that_leave_do_not_tell_who_was_counted() -> None:
    """A rule that is not required has no line where its subgroup is too small to be judged."""
    small, large, copied = report(), report(), report()
    judged = {"estimate": "copied_patients", "slice": "diagnosis=rare", "status": "pass"}
    large["policy"].insert(1, {**judged, "rule": "value at most 0.05", "reason": "0 of 10"})
    ships = {"estimate": "flagged samples that ship", "slice": None, "rule": "none"}
    copied["policy"].append({**ships, "status": "fail", "reason": "1"})
    said = [protected(each, RULES)["policy"] for each in (small, large, copied)]
    assert said[0] == said[1] == said[2]
    assert [(line["estimate"], line["slice"], line["rule"]) for line in said[0]] == [
        ("mmd2", None, "value at most 0.5"),
        ("copied_patients", "diagnosis=rare", "value at most 0.05"),
        ("identifier scan", None, "nothing found in any file"),
    ]
    assert all(line["status"] is None and not line["reason"] for line in said[0])


def test_what_leaves_states_the_promise_and_its_limits() -> None:
    before = report()
    kept = copy.deepcopy(before)
    text = everything(protected(before, RULES))
    assert before == kept
    for said in (
        "ε = 3.25", "δ = 1e-05", "add or remove one patient", "noise multiplier 2.5",
        "Rényi divergences 3.6", "about 200", "one bit", "3 so far", "not told",
        "at most 8.0 for any patient, for good", "AES-256", "epsilon 3.25 at delta 1e-05",
        "stay in the house",
    ):  # fmt: skip
        assert said in text, said
    assert "no formal privacy guarantee" not in text


@pytest.mark.parametrize(("delta", "told"), [(1e-3, True), (1e-5, False)])
def test_a_large_delta_is_said_to_expose_people(delta: float, told: bool) -> None:
    content = report()
    content["privacy"]["delta"] = delta
    page = render(protected(content, RULES), {})
    assert ("one person in 1,000 may be exposed entirely" in page) == told


def test_nothing_promised_is_nothing_stated() -> None:
    assert stated(None, None, 1) is None and stated(None, PROMISE, 1) is None
