"""The audit of one run: attacks on its weights, and of a private one also its claim.

The claim is held against the run's records, and against canaries under its own mechanism.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from synthmed.backbones.generative import named_parameters, trained_by
from synthmed.config import Config
from synthmed.errors import InputError, UsageError
from synthmed.keys import Key
from synthmed.pipeline import loader_of
from synthmed.privacy import audit, whitebox
from synthmed.privacy.audited import FILE
from synthmed.privacy.gradients import per_patient
from synthmed.privacy.ledger import Ledger
from synthmed.privacy.patient_step import Mechanism
from synthmed.progress import Progress
from synthmed.stages import train
from synthmed.store import Artifact, Run, write_json
from synthmed.training import LOG
from synthmed.trial import noise_loader
from synthmed.types import Estimate

COMPANY = 2
"""Made-up patients in each step of the canaries' training."""


def perform(
    run: Run,
    config: Config,
    model: Artifact,
    n_canaries: int,
    n_trials: int,
    seed: int,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Audit a trained model, and write RUN/private/audit/audit.json.

    Args:
        run: the run, locked by the caller.
        config: its config.
        model: its trained model.
        n_canaries: of a private run.
        n_trials: how often a small network is trained in each of two worlds, for a private run; 0
            leaves it out.
        seed: of all randomness.
        device: where the model is attacked.
        progress: told how far that is.

    Raises:
        UsageError: the model has too few parameters for canaries, or the config promises privacy
            that it states nothing of.
        InputError: the ledger is another one.
    """
    stated = model.manifest.facts["privacy"]
    if config.privacy is not None and stated is None:
        raise UsageError(
            f"run {run.path}: its config promises privacy, of which its model states nothing",
            "Train the model anew with --overwrite.",
        )
    key = Key.root(seed).fold("audit")
    checked = (
        {
            **dict.fromkeys(("epsilon_claimed", "delta", "canaries", "two_worlds")),
            "records": [],
            "passed": True,
        }
        if stated is None
        else _claim(run, config, model, n_canaries, n_trials, key)
    )
    loader = loader_of(config, run.require("dataset").path)
    found = whitebox.attack(config, model, loader, device, key.fold("membership"), seed, progress)
    result = {
        "model": model.digest(),
        "seed": seed,
        **checked,
        "membership": [e.model_dump(mode="json") for e in found],
    }
    folder = run.private / "audit"
    folder.mkdir(exist_ok=True)
    write_json(folder / FILE, result)
    return result


def _claim(
    run: Run, config: Config, model: Artifact, n_canaries: int, n_trials: int, key: Key
) -> dict[str, Any]:
    """What records and canaries say of the claim of a private run."""
    stated = model.manifest.facts["privacy"]
    mechanism = Mechanism(
        stated["sample_rate"], stated["noise_multiplier"], stated["clip"], stated["divisor"]
    )
    loader = noise_loader(config, 2 * COMPANY, COMPANY)
    made = train.build(config, loader, key.fold("weights"), "cpu")
    train.restricted(made, config, key)
    params = named_parameters(made)
    reading = [p for r in made.rounds() for p in r.phases if p.reads_patients]
    account = Ledger().accounts.get(stated["lifetime"]["run"])
    if account is None:
        raise InputError(
            f"run {run.path}: the ledger in SYNTHMED_HOME does not know it",
            "Set SYNTHMED_HOME to the one that it was trained with.",
        )
    lines = [json.loads(x) for x in (model.path / LOG).read_text(encoding="utf-8").splitlines()]
    checks = []
    for phase in reading:
        size = sum(p.numel() for p in trained_by(phase, params).values())
        charged = sum(c[0].partition(".")[2] == phase.name for c in account.charges)
        checks += audit.records(lines, phase.name, mechanism, len(account.patients), size, charged)
    first = reading[0]
    wanted = trained_by(first, params)
    if sum(p.numel() for p in wanted.values()) < n_canaries:
        raise UsageError(f"--canaries {n_canaries}: the model has fewer trained parameters")

    def company(step: int) -> tuple[Sequence[Tensor], Tensor]:
        names = loader.patients[:COMPANY]
        batch, draws = loader.private_batch(first, key.fold("company", step), names, 1, "cpu")
        return per_patient("loop", first, params, list(wanted), batch, draws, 0.5)

    found = audit.canaries(
        list(wanted.values()),
        mechanism,
        account.steps.n,
        n_canaries,
        stated["delta"],
        key,
        company,
    )
    worlds = None
    if n_trials:
        worlds = audit.two_worlds(
            mechanism, account.steps.n, stated["delta"], n_trials, key.fold("two worlds")
        )
    bounds = [x["epsilon_lower_bound"] for x in (found, worlds) if x is not None]
    return {
        "epsilon_claimed": stated["epsilon"],
        "delta": stated["delta"],
        "canaries": found,
        "two_worlds": worlds,
        "records": [asdict(c) for c in checks],
        "passed": all(c.passed for c in checks) and max(bounds) <= stated["epsilon"],
    }


def describe(result: Mapping[str, Any]) -> str:
    """The audit as text."""
    attacks = whitebox.describe([Estimate.model_validate(e) for e in result["membership"]])
    if (found := result["canaries"]) is None:
        return "\n".join(
            [
                "claim      none: the run was trained without differential privacy",
                *attacks,
                "audit      no promise was made, so none can be broken",
            ]
        )
    lines = [
        f"claim      epsilon {result['epsilon_claimed']:.2f} at delta {result['delta']:g}",
        f"canaries   at least {found['epsilon_lower_bound']:.2f} (confidence 0.95; "
        f"{found['n_right']} of {found['n_guesses']} guesses right, "
        f"{found['best_possible']:.2f} if all were)",
    ]
    if worlds := result["two_worlds"]:
        lines.append(
            f"two worlds at least {worlds['epsilon_lower_bound']:.2f} (confidence 0.95; guessed "
            f"with in {worlds['guessed_with']} and {worlds['guessed_without']} of "
            f"{worlds['n_trials']} trainings with and without one person, "
            f"{worlds['best_possible']:.2f} if always right)"
        )
    for c in result["records"]:
        mark = "met" if c["passed"] else "NOT MET"
        lines.append(
            f"record     {c['name']}: {c['found']:.6g}, claimed {c['claimed']:.6g}: {mark}"
        )
    lines += attacks
    lines.append("audit      " + ("passed" if result["passed"] else "FAILED: do not release"))
    return "\n".join(lines)
