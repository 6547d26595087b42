"""A private run from the scans to what leaves, at the command line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Result

from synthmed.config import Privacy
from synthmed.privacy.accounting import Steps, epsilon
from synthmed.privacy.outlook import HOPELESS, POOR, outlook, verdict

PROMISE = {"epsilon": 6, "sample_rate": 0.5, "patients": 18, "clip": 0.1}
CVAE = {"name": "cvae", "latent": 2, "widths": [4, 4], "prior": "standard"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ledger") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNTHMED_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Path]) -> Path:
    return make_config(
        "private", privacy=PROMISE, backbone=CVAE, data__view="grid", data__patient="participant_id"
    )


@pytest.fixture(scope="module")
def run(
    config: Path,
    home: Path,
    synthmed: Callable[..., Result],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A private run whose cohort is released."""
    path = tmp_path_factory.mktemp("private") / "run"
    result = synthmed("generate", config, "--run", path, "--device", "cpu")
    assert result.code == 0, result.err
    assert "epsilon 6.00 at delta 1e-05 a patient" in result.err
    return path


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return content


def test_both_reports_state_the_promise_and_one_the_patients(run: Path) -> None:
    shared, restricted = report(run / "release"), report(run / "private")
    for content in (shared, restricted):
        stated = content["privacy"]
        steps = Steps(stated["noise_multiplier"], stated["sample_rate"], stated["steps"])
        assert epsilon([steps], stated["delta"]) <= stated["epsilon"] <= 6
        assert stated["steps"] == 5
    assert restricted["privacy"]["lifetime"]["runs_charged"] == 1
    assert "lifetime" not in shared["privacy"], "who paid in which runs tells who is in this one"
    assert restricted["cohort"]["n_train"] and restricted["estimates"]
    assert shared["cohort"] == {
        **dict.fromkeys(("n_patients", "n_scans", "n_train", "n_holdout", "n_dropped")),
        "n_synthetic": 18,
    }
    assert shared["estimates"] == [] and {v["status"] for v in shared["policy"]} == {None}
    assert set(shared["provenance"]["digests"]) == {"config"}


def test_nothing_of_the_patients_is_in_what_leaves(run: Path) -> None:
    """No pseudonym, no figure of the restricted report, no count of the cohort."""
    restricted = report(run / "private")
    figures = {
        repr(e[k]) for e in restricted["estimates"] for k in ("value", "floor", "ceiling")
        if isinstance(e[k], float) and len(repr(e[k])) > 6
    }  # fmt: skip
    assert len(figures) > 10
    index = json.loads((run / "private/prepare/dataset.json").read_text())
    pseudonyms = {s["patient"] for s in index["scans"]}
    texts = [
        p.read_text()
        for p in (run / "release").rglob("*")
        if p.suffix in (".json", ".md", ".html", ".tsv")
    ]
    assert texts
    for text in texts:
        assert not [x for x in figures | pseudonyms if x in text]


def test_its_copies_are_reported_and_not_dropped(run: Path) -> None:
    assert json.loads((run / "private/screen/dropped.json").read_text()) == []


def test_the_ledger_says_who_has_paid(run: Path, synthmed: Callable[..., Result]) -> None:
    facts = synthmed("ledger", "--patients", "--json").json()
    (group,) = facts["groups"]
    index = json.loads((run / "private/prepare/dataset.json").read_text())
    trained = {s["patient"] for s in index["scans"] if s["split"] == "train"}
    assert set(group["patients"]) == trained and group["n_patients"] == len(trained)
    assert group["runs"][0]["steps"] == 5 and 5.9 < group["epsilon"] <= 6
    text = synthmed("ledger", "--delta", "1e-6").out
    assert f"{len(trained)} patients: epsilon" in text and "1e-06" in text
    assert synthmed("ledger", "--delta", "1").code == 2


def test_a_patient_who_has_paid_ends_another_run_with_exit_6(
    run: Path, config: Path, synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    """Another seed moves people across the split; one of them is enough."""
    again = synthmed("generate", config, "--run", tmp_path / "again", "--seed", "1")
    assert again.code == 6
    assert "6 at delta 1e-05 was promised to them for good" in again.err
    assert len(again.err.strip().splitlines()[-2:]) == 2 and "Traceback" not in again.err
    assert not (tmp_path / "again" / "release").exists()
    # what is done stays, and costs nothing to look at again
    assert synthmed("generate", config, "--run", run).code == 0
    assert synthmed("sample", run, "--config", config).code == 0


def test_cohorts_that_were_measured_and_not_decided_on_are_counted(
    run: Path, config: Path, synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    """Somebody may have read the evidence of several, and released the best."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for seed in (1, 2):
        for stage in ("sample", "screen", "evaluate"):
            change = ("--config", config, "--set", f"sample.seed={seed}")
            result = synthmed(stage, copy, *change, "--device", "cpu")
            assert result.code == 0, result.err
    assert synthmed("release", copy).code == 0
    assert report(run / "release")["privacy"]["attempts"] == 1
    assert report(copy / "release")["privacy"]["attempts"] == 3


def test_overwriting_does_not_buy_a_fresh_budget(
    run: Path, config: Path, synthmed: Callable[..., Result]
) -> None:
    before = synthmed("ledger", "--json").json()
    for change in ("train.max_steps=6", "seed=5", "data.holdout=0.4"):
        again = synthmed("generate", config, "--run", run, "--set", change, "--overwrite")
        assert again.code == 6, change
    assert synthmed("ledger", "--json").json() == before
    # nor does it cost the model that was paid for
    assert (run / "private/model/weights.safetensors").is_file() and (run / "release").is_dir()
    assert synthmed("generate", config, "--run", run).code == 0


def test_what_was_refused_for_training_is_refused_for_sampling(
    run: Path, config: Path, synthmed: Callable[..., Result]
) -> None:
    """A change of `sample` alone needs no --overwrite, and no training to be refused by."""
    result = synthmed("generate", config, "--run", run, "--set", "sample.prior=cohort")
    assert result.code == 2 and "sample.prior: cohort" in result.err


def test_an_altered_ledger_ends_with_exit_3(
    run: Path, config: Path, home: Path, synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    file = home / "ledger.jsonl"
    kept = file.read_bytes()
    try:
        file.write_bytes(kept.replace(b'"step": 3', b'"step": 2'))
        assert kept != file.read_bytes()
        for words in (["ledger"], ["generate", config, "--run", tmp_path / "x"]):
            result = synthmed(*words)
            assert result.code == 3
            assert "ledger in SYNTHMED_HOME was altered or lost" in result.err
    finally:
        file.write_bytes(kept)


def test_a_model_of_another_version_is_not_trained_again_unasked(
    run: Path, home: Path, synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    """Its patients have paid for it: as other input does, another default makes it stale."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    file = copy / "private/model/manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"config": "0" * 64}))
    weights = (copy / "private/model/weights.safetensors").read_bytes()
    before = (home / "ledger.jsonl").read_bytes()
    result = synthmed("train", copy, "--device", "cpu")
    assert result.code == 2 and "its patients have paid for it" in result.err
    assert (copy / "private/model/weights.safetensors").read_bytes() == weights
    assert (home / "ledger.jsonl").read_bytes() == before


def test_nobody_has_paid_where_nothing_was_trained(
    synthmed: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path))
    assert (
        synthmed("ledger").out.strip()
        == "no patient of this SYNTHMED_HOME has paid for a private run"
    )


# --- the audit ------------------------------------------------------------------------------------


def test_an_audit_stands_beside_the_claim_in_the_restricted_report(
    run: Path, synthmed: Callable[..., Result]
) -> None:
    before = (run / "release" / "SHA256SUMS").read_bytes()
    result = synthmed("audit", run, "--canaries", "200", "--worlds", "10", "--json")
    assert result.code == 0, result.out
    found = result.json()
    assert found["passed"] and len(found["records"]) == 5
    assert 0 <= found["canaries"]["epsilon_lower_bound"] <= found["epsilon_claimed"] <= 6
    assert synthmed("release", run).code == 0
    shown = [e for e in report(run / "private")["estimates"] if e["group"] == "audit"]
    (estimate,) = [e for e in shown if e["name"] == "epsilon_lower_bound"]
    bounds = [found[k]["epsilon_lower_bound"] for k in ("canaries", "two_worlds")]
    assert estimate["value"] == max(bounds) <= found["epsilon_claimed"]
    assert estimate["ceiling"] == found["epsilon_claimed"]
    attacks = [e for e in shown if e["name"].startswith("whitebox_")]
    assert [e["value"] for e in attacks] == [e["value"] for e in found["membership"]]
    assert len(attacks) == 4 and all(e["value"] is not None for e in attacks)
    # the attacks looked at patients, and the number of records is the cohort's: all stays inside
    assert before != b"" and report(run / "release")["estimates"] == []
    assert "whitebox" not in (run / "release/report/report.json").read_text()


def test_a_record_that_was_tampered_with_fails_the_audit(
    run: Path, synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    log = copy / "private/model/training.jsonl"
    lines = [json.loads(x) for x in log.read_text().splitlines()]
    lines[2]["vae.largest"] = 0.2
    text = "".join(json.dumps(x) + "\n" for x in lines)
    log.write_text(text)
    manifest = json.loads((copy / "private/model/manifest.json").read_text())
    manifest["files"]["training.jsonl"] = hashlib.sha256(text.encode()).hexdigest()
    (copy / "private/model/manifest.json").write_text(json.dumps(manifest))
    result = synthmed("audit", copy, "--canaries", "100")
    assert result.code == 4
    assert "largest contribution: 0.2, claimed 0.1: NOT MET" in result.out
    assert "FAILED: do not release" in result.out
    assert not (copy / "release").exists(), "what it was to keep may no longer leave"


# --- beforehand -----------------------------------------------------------------------------------


def test_the_plan_says_what_is_left_to_learn_from() -> None:
    promise = Privacy(epsilon=8, sample_rate=0.5, patients=100)
    few, many = (outlook(promise, 50, n) for n in (100, 1_000_000))
    assert few["noise_multiplier"] == many["noise_multiplier"]
    exact = 0.5 * 100 / (few["noise_multiplier"] * 10)
    assert few["signal_to_noise"] == pytest.approx(exact, rel=1e-3)
    assert few["signal_to_noise"] == pytest.approx(100 * many["signal_to_noise"], rel=0.01)
    assert few["verdict"].startswith("there is something") and many["verdict"].startswith("next to")
    assert verdict((POOR + HOPELESS) / 2).startswith("little")


def test_plan_prints_it(config: Path, home: Path, synthmed: Callable[..., Result]) -> None:
    text = synthmed("plan", config, "--device", "cpu").out
    assert "privacy    epsilon 6 at delta 1e-05 over 5 steps needs a noise multiplier" in text
    assert "signal to noise of a step at most" in text
