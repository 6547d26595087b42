"""The runner of the slow proofs, and the proofs themselves in a short form."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.proofs import prove


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> prove.Case:
    return prove.Case.make(tmp_path_factory.mktemp("case"), patients=12, steps=8, count=4)


@pytest.mark.parametrize(
    ("number", "aims"),
    [(signal.SIGKILL, {"train": 1, "release": 1}), (signal.SIGTERM, {"screen": 1})],
    ids=["kill9", "sigterm"],
)
def test_a_stopped_run_ends_in_the_same_bytes(
    case: prove.Case, number: signal.Signals, aims: dict[str, int]
) -> None:
    result = prove.stopped(case, number, aims, seed=1)
    assert result.passed, result.figures
    seen = json.loads((case.folder / f"{number.name.lower()}.json").read_text())
    assert [s["aimed"] for s in seen] == list(aims)
    # going on after the last signal was sent sends no other
    assert prove.stopped(case, number, aims, seed=1) == result


def test_a_killed_private_training_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    result = prove.killed_privately(tmp_path, kills=1, steps=30, seed=1)
    assert result.passed, result.figures
    assert result.figures.startswith("1 kills of 1 trainings")
    whole, killed = (prove.Case(tmp_path / name) for name in ("whole", "killed-00"))
    assert prove.unlike(whole, killed) == []
    (killed.folder / "home/ledger.jsonl").write_bytes(b"changed")
    assert prove.unlike(whole, killed) == ["home/ledger.jsonl"]


def test_a_changed_byte_and_a_leftover_are_seen(case: prove.Case, tmp_path: Path) -> None:
    prove.whole_run(case)
    other = tmp_path / "other"
    shutil.copytree(case.folder / "whole", other)
    assert prove.differing(case.folder / "whole", other) == []
    assert prove.leftovers(other) == []
    (other / "private/ingest/quarantine.tsv").write_text("changed")
    (other / "private/model/weights.safetensors").unlink()
    (other / "private/sample.partial").mkdir()
    found = prove.differing(case.folder / "whole", other)
    assert found == ["private/ingest/quarantine.tsv", "private/model/weights.safetensors"]
    assert prove.leftovers(other) == ["private/sample.partial"]


def test_what_is_under_way_is_read_from_the_run(tmp_path: Path) -> None:
    assert prove.under_way(tmp_path) == "ingest"
    for folder in prove.FOLDERS.values():
        (tmp_path / "private" / folder).mkdir(parents=True)
        (tmp_path / "private" / folder / "manifest.json").touch()
    assert prove.under_way(tmp_path) == "release"
    (tmp_path / "withheld").mkdir()
    assert prove.under_way(tmp_path) == "done"


def test_the_table_keeps_the_rows_of_other_proofs(tmp_path: Path) -> None:
    table = tmp_path / "proofs.md"
    row = {
        "passed": True,
        "figures": "20 stops | all equal",
        "commit": "abc1234",
        "date": "2026-01-02",
    }
    prove.write_table(table, {"kill9": row})
    prove.write_table(table, {"screen": {**row, "passed": False, "figures": "9 alarms"}})
    text = table.read_text()
    assert "| holds | 20 stops / all equal | abc1234 | 2026-01-02 |" in text
    assert "| DOES NOT HOLD | 9 alarms | abc1234 | 2026-01-02 |" in text
    assert text.count("not yet measured") == len(prove.PROOFS) - 2


def test_a_proof_of_this_very_code_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def run(folder: Path) -> prove.Result:
        calls.append(folder)
        return prove.Result(True, "as it should be")

    monkeypatch.setattr(prove, "WORK", tmp_path)
    monkeypatch.setattr(prove, "TABLE", tmp_path / "proofs.md")
    monkeypatch.setitem(prove.PROOFS, "screen", prove.Proof("Something.", run))
    monkeypatch.setattr(prove, "code_digest", lambda: "one")
    assert prove.main(["--only", "screen"]) == 0
    assert prove.main(["--only", "screen"]) == 0
    assert len(calls) == 1
    monkeypatch.setattr(prove, "code_digest", lambda: "two")
    assert prove.main(["--only", "screen"]) == 0
    assert len(calls) == 2
    assert "done already, holds: as it should be" in capsys.readouterr().out
    assert prove.main(["--list"]) == 0
    assert all(name in capsys.readouterr().out for name in ["kill9"])
