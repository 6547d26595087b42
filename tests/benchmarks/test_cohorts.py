"""The table of finished runs: what it reads, and what it leaves of the page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.benchmarks import cohorts
from tests.benchmarks.cohorts import BEGIN, END, column, durations, insert, main, shown


def estimate(name: str, value: float | None, **more: object) -> dict[str, object]:
    return {
        "name": name,
        "value": value,
        "ci": None,
        "floor": None,
        "ceiling": None,
        "slice": None,
    } | more


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "somewhere" / "brains"
    (folder / "private/report").mkdir(parents=True)
    (folder / "private/model").mkdir()
    report = {
        "decision": "REVIEW",
        "signature": {"name": "somebody"},
        "cohort": {"n_train": 60, "n_holdout": 20, "n_synthetic": 100},
        "data": {"backbone": "cvae"},
        "estimates": [
            estimate("mmd2", 0.01234, ci=[0.01, 0.02], floor=0.0, ceiling=0.5),
            estimate("recall", None, floor=0.9),
            estimate("condition_accuracy", 0.75, slice="sex"),
            estimate("condition_accuracy", 0.875, slice="diagnosis"),
            estimate("copied_patients", 0.0, ci=[0.0, 0.0596]),
        ],
        "provenance": {"versions": {"torch": "2.13.0"}},
    }
    (folder / "private/report/report.json").write_text(json.dumps(report))
    facts = {"steps": [300, 700]}
    (folder / "private/model/manifest.json").write_text(json.dumps({"facts": facts}))
    seconds = {"ingest": 0.4, "prepare": 5.0, "train": 120.2, "sample": 15.0}
    (folder / "log.jsonl").write_text(
        "".join(json.dumps({"event": e, "seconds": t}) + "\n" for e, t in seconds.items())
    )
    return folder


def test_a_column_holds_what_the_run_measured(run: Path) -> None:
    found = column(run)
    assert found["decision"] == "REVIEW (signed)"
    assert found["patients: train / held out"] == "60 / 20"
    assert found["training steps"] == "300 + 700"
    assert found["mmd2 [95 %] (floor, ceiling)"] == "0.0123 [0.01, 0.02] (0, 0.5)"
    assert found["recall (floor)"] == "– (0.9)"
    assert found["condition_accuracy"] == "sex 0.75; diagnosis 0.875"
    assert found["copied_patients [95 %]"] == "0 [0, 0.0596]"
    assert found["membership_auc [95 %]"] == "–"
    assert (found["training, s"], found["sampling, s"]) == ("120", "15")


def test_a_missing_interval_is_a_dash() -> None:
    assert shown({"copies": [estimate("copies", 3.0)]}, "copies", "ci") == "3 [–]"


def test_a_stopped_stage_has_no_duration(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    entries = [
        {"event": "ingest", "seconds": 1.0},
        {"event": "stopped"},
        {"event": "train", "seconds": 9.0},
        {"event": "sample", "seconds": 10.0},
    ]
    log.write_text("".join(json.dumps(e) + "\n" for e in entries))
    found = durations(log)
    assert (found["train"], found["sample"]) == ("–", "10")


def test_the_page_keeps_its_words_and_names_no_path(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([str(run), "--page", str(page), "--machine", "2 CPU cores"]) == 0
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "`python tests/benchmarks/cohorts.py runs/brains`, 2 CPU cores:" in text
    assert "| | brains |" in text
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text
    assert capsys.readouterr().out.strip() in text
    # a second call replaces what the first one wrote
    assert main([str(run), "--page", str(page), "--machine", "2 CPU cores"]) == 0
    assert page.read_text() == text


def test_a_page_without_markers_and_equal_names_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cohorts:begin"):
        insert(f"{END} {BEGIN}", "text")
    with pytest.raises(SystemExit):
        main([str(run), str(run)])


def test_the_page_of_the_project_has_the_markers() -> None:
    assert "text" in insert(cohorts.PAGE.read_text(encoding="utf-8"), "text")
