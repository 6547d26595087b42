"""The ledger: nothing is forgotten, nothing is charged twice, and no altered one is believed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import InputError, ResourceError
from synthmed.privacy.ledger import FILE, HEAD, Account, Ledger, Steps

NAMES = Pseudonyms(bytes(range(32)))
STEP = Steps(2.0, 0.25, 1)


def account(run: str, *patients: str) -> Account:
    return Account(run, f"cohort {run}", frozenset(patients), STEP, (8.0, 1e-5))


def filled(folder: Path, n: int = 5) -> Ledger:
    ledger = Ledger(folder, NAMES)
    ledger.begin(account("a", "p1", "p2"))
    for k in range(n):
        assert ledger.charge("a", ("0.vae", k, f"s{k}"))
    return ledger


def test_charges_are_read_back(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.begin(account("b", "p2", "p3"))
    ledger.charge("b", ("0.vae", 0, "x"))
    ledger.note_unprotected("c", ["p3", "p4"])
    again = Ledger(tmp_path, NAMES)
    assert again.head == ledger.head

    def paid(*patients: str, besides: str | None = None) -> list[list[tuple[str, int]]]:
        found = again.histories(patients, besides)
        return sorted([(a.run, a.steps.n) for a in accounts] for accounts in found)

    assert paid("p1") == [[("a", 5)]]
    assert paid("p2") == [[("a", 5), ("b", 1)]]
    assert paid("p1", "p2", "p3", "p4") == [[], [("a", 5)], [("a", 5), ("b", 1)], [("b", 1)]]
    assert paid("p2", besides="a") == [[("b", 1)]]
    assert {a.promise for a in again.accounts.values()} == {(8.0, 1e-5)}
    assert [a.run for a in again.runs_of(["p2"])] == ["a", "b"]
    assert again.without_protection(["p1"]) == 0 and again.without_protection(["p1", "p4"]) == 1


def test_a_step_replayed_from_the_same_state_is_charged_once(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    assert not ledger.charge("a", ("0.vae", 3, "s3"))
    assert ledger.charge("a", ("0.vae", 3, "another state"))
    assert not Ledger(tmp_path, NAMES).charge("a", ("0.vae", 3, "another state"))
    assert ledger.accounts["a"].steps.n == 6


def test_what_must_not_be_taken_is_not_written(tmp_path: Path) -> None:
    """The check sees what another process has written until then."""
    first, second = filled(tmp_path), Ledger(tmp_path, NAMES)
    second.charge("a", ("0.vae", 70, "other"))
    seen: list[int] = []

    def refuse() -> None:
        seen.append(first.accounts["a"].steps.n)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        first.charge("a", ("0.vae", 71, "x"), refuse)
    assert seen == [6] and Ledger(tmp_path, NAMES).accounts["a"].steps.n == 6


def test_a_line_is_on_the_disk_before_the_step(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(x)["kind"] for x in lines] == ["run", "step", "step", "step"]
    assert json.loads(lines[-1])["state"] == "s2"


@pytest.mark.parametrize("line", range(6))
def test_an_edited_line_is_found(line: int, tmp_path: Path) -> None:
    filled(tmp_path)
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[line])
    entry["run" if line else "patients"] = "z" if line else ["p1"]
    lines[line] = json.dumps(entry, sort_keys=True).encode() + b"\n"
    (tmp_path / FILE).write_bytes(b"".join(lines))
    with pytest.raises(InputError, match="altered or lost"):
        Ledger(tmp_path, NAMES)


@pytest.mark.parametrize("kept", range(6))
def test_a_ledger_cut_short_is_found(kept: int, tmp_path: Path) -> None:
    filled(tmp_path)
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(lines[:kept]))
    with pytest.raises(InputError, match=f"it has {kept} lines, 6 were written"):
        Ledger(tmp_path, NAMES)


def test_a_lost_file_is_found(tmp_path: Path) -> None:
    filled(tmp_path)
    kept = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).unlink()
    with pytest.raises(InputError, match="it has 0 lines, 6 were written"):
        Ledger(tmp_path, NAMES)
    (tmp_path / FILE).write_bytes(kept)
    (tmp_path / HEAD).unlink()
    with pytest.raises(InputError, match=r"ledger\.head, which names its last line, is missing"):
        Ledger(tmp_path, NAMES)


def test_another_key_cannot_write_a_line_that_fits(tmp_path: Path) -> None:
    """Somebody without the key forges the chain with a key of their own."""
    filled(tmp_path)
    with pytest.raises(InputError, match="altered or lost"):
        Ledger(tmp_path, Pseudonyms(bytes(32)))


def test_a_line_that_a_crash_cut_off_is_taken_back(tmp_path: Path) -> None:
    filled(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    with open(tmp_path / FILE, "ab") as handle:
        handle.write(b'{"kind": "step", "run": "a", "ph')
    ledger = Ledger(tmp_path, NAMES)
    assert (tmp_path / FILE).read_bytes() == whole
    assert ledger.charge("a", ("0.vae", 5, "s5"))
    assert Ledger(tmp_path, NAMES).accounts["a"].steps.n == 6


def test_a_crash_between_line_and_head_loses_nothing(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    head = (tmp_path / HEAD).read_bytes()
    Ledger(tmp_path, NAMES).charge("a", ("0.vae", 4, "s4"))
    (tmp_path / HEAD).write_bytes(head)
    ledger = Ledger(tmp_path, NAMES)
    assert ledger.accounts["a"].steps.n == 5
    ledger.charge("a", ("0.vae", 5, "s5"))
    assert Ledger(tmp_path, NAMES).accounts["a"].steps.n == 6


def test_a_full_disk_does_not_close_it_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line still fits into the last block, and the file that names it no longer does."""
    ledger = filled(tmp_path, 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("synthmed.privacy.ledger.write_json", full)
        for step in (2, 3, 4):
            with pytest.raises(ResourceError, match="No space left on device"):
                Ledger(tmp_path, NAMES).charge("a", ("0.vae", step, f"s{step}"))
    lines = (tmp_path / FILE).read_bytes().splitlines()
    assert len(lines) == 4, "one line, and no other before it is named"
    again = Ledger(tmp_path, NAMES)
    assert not again.charge("a", ("0.vae", 2, "s2")), "it is charged already"
    assert again.charge("a", ("0.vae", 3, "s3"))
    assert len(Ledger(tmp_path, NAMES).accounts["a"].charges) == 4
    assert ledger.head != again.head


def test_a_home_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthmed.privacy.ledger.LOCK", "missing/.lock")
    with pytest.raises(ResourceError, match="SYNTHMED_HOME"):
        Ledger(tmp_path, NAMES).forget(["p1"])


def test_a_run_finds_out_whether_the_ledger_is_older_than_it(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    before = ledger.head
    assert ledger.holds(before)
    ledger.charge("a", ("0.vae", 9, "s9"))
    assert ledger.holds(before) and ledger.holds(ledger.head)
    (tmp_path / "old").mkdir()
    old = filled(tmp_path / "old", 3)
    assert not old.holds(ledger.head)


def _charge(folder: Path, run: str) -> None:
    ledger = Ledger(folder, NAMES)
    ledger.begin(account(run, run))
    for k in range(20):
        ledger.charge(run, ("p", k, "s"))


def test_two_processes_write_one_ledger(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_charge, args=(tmp_path, run)) for run in ("a", "b")]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    ledger = Ledger(tmp_path, NAMES)
    assert {run: a.steps.n for run, a in ledger.accounts.items()} == {"a": 20, "b": 20}


def test_it_is_the_owners_alone_and_holds_no_key(tmp_path: Path) -> None:

    before = os.umask(0o022)
    try:
        filled(tmp_path)
    finally:
        os.umask(before)
    for name in (FILE, HEAD):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
        assert NAMES.key.hex() not in (tmp_path / name).read_text()
