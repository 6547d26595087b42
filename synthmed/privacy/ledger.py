"""Who has paid for what: every private step that any run has taken on any patient.

One file in SYNTHMED_HOME, appended to and never rewritten. Each line holds a digest, under the key
of the pseudonyms, of all lines before it, and a second file names the last one: a ledger that was
edited, cut short or lost is found out, and then nothing private is trained until it is back. It
holds pseudonyms, no names. It also holds who is not to be taken in again (`synthmed forget`): there
too a line that is lost would break a promise.

A charge is a (phase, step, state) of a run, the state being a digest of the weights a step begins
with. A step that is replayed from the same state draws the same patients and the same noise: it is
the same random variable and is charged once. Drawn afresh, it is charged again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import InputError, ResourceError
from synthmed.store import home, write_json

FILE, HEAD, LOCK = "ledger.jsonl", "ledger.head", ".ledger.lock"
START = "0" * 64

Charge = tuple[str, int, str]
"""(phase, step within its round, digest of the state it begins in)."""


class Steps(NamedTuple):
    """So many steps of one mechanism, in the order of Opacus' histories.

    Args:
        noise_multiplier: sigma, the noise's deviation over the bound C of a contribution.
        sample_rate: q, the probability with which each patient is in a step.
        n: how many.
    """

    noise_multiplier: float
    sample_rate: float
    n: int


@dataclass
class Account:
    """What one run has charged.

    Args:
        run: its number, drawn at random when its training began.
        title: what the run calls itself (export.name); never a path.
        patients: pseudonyms of everybody it trains on.
        mechanism: noise multiplier and sampling rate, with n = 1.
        promise: epsilon and delta that its report states for good.
        charges: every distinct step.
    """

    run: str
    title: str
    patients: frozenset[str]
    mechanism: Steps
    promise: tuple[float, float]
    charges: set[Charge] = field(default_factory=set)

    @property
    def steps(self) -> Steps:
        """All that it has charged to each of its patients."""
        return self.mechanism._replace(n=len(self.charges))


class Ledger:
    """The ledger of this SYNTHMED_HOME, read and checked.

    Raises:
        InputError: it was edited, cut short, or is missing although there was one.
    """

    def __init__(self, folder: Path | None = None, names: Pseudonyms | None = None) -> None:
        self.folder = folder or home()
        self._names = names or Pseudonyms.load()
        self.accounts: dict[str, Account] = {}
        self.unprotected: dict[str, frozenset[str]] = {}
        self.forgotten: set[str] = set()
        self._end, self._lines, self._digest = 0, 0, START
        self._digests = {START}
        with self._locked():
            self._read_on()
            self._compare_head()

    @property
    def head(self) -> str:
        """Digest of all lines so far: what a run keeps, to find out whether the ledger was lost."""
        return self._digest

    @property
    def n_lines(self) -> int:
        """How many lines it has."""
        return self._lines

    def holds(self, head: str) -> bool:
        """Whether this ledger, or a part of it from its beginning, has this digest."""
        return head in self._digests

    # --- writing ------------------------------------------------------------------------------

    def begin(self, account: Account, before: Callable[[], None] = lambda: None) -> None:
        """Open a run's account, before its first step.

        Args:
            account: of the run.
            before: raises where it must not begin; called as in `charge`.
        """
        self._append(
            {
                "kind": "run",
                "run": account.run,
                "title": account.title,
                "patients": sorted(account.patients),
                "noise_multiplier": account.mechanism.noise_multiplier,
                "sample_rate": account.mechanism.sample_rate,
                "epsilon": account.promise[0],
                "delta": account.promise[1],
            },
            before,
        )

    def charge(self, run: str, charge: Charge, before: Callable[[], None] = lambda: None) -> bool:
        """Write a step down, synced, before it is taken; False where it is written already.

        Args:
            run: its number.
            charge: the step.
            before: raises where it must not be taken; called when nobody else can write, with
                everything known that others have written.
        """
        if charge in self.accounts[run].charges:
            return False
        phase, step, state = charge
        entry = {"kind": "step", "run": run, "phase": phase, "step": step, "state": state}
        self._append(entry, before)
        return True

    def note_unprotected(self, run: str, patients: Iterable[str]) -> None:
        """Remember that a run without protection has trained on these patients."""
        self._append({"kind": "unprotected", "run": run, "patients": sorted(set(patients))})

    def forget(self, patients: Iterable[str]) -> None:
        """Remember that these patients are not to be taken in again; what they paid stays."""
        self._append({"kind": "forgotten", "patients": sorted(set(patients))})

    # --- reading ------------------------------------------------------------------------------

    def histories(self, patients: Iterable[str], besides: str | None = None) -> list[list[Account]]:
        """The different sets of charged accounts among these patients, mostly one or two.

        Args:
            patients: pseudonyms.
            besides: a run to leave out.
        """
        charged = [a for a in self.accounts.values() if a.charges and a.run != besides]
        found = {frozenset(a.run for a in charged if p in a.patients) for p in patients}
        return [[a for a in charged if a.run in runs] for runs in sorted(found, key=sorted)]

    def runs_of(self, patients: Iterable[str]) -> list[Account]:
        """Accounts that any of these patients has paid into, in the order they were opened."""
        wanted = frozenset(patients)
        return [a for a in self.accounts.values() if a.charges and wanted & a.patients]

    def without_protection(self, patients: Iterable[str]) -> int:
        """How many runs without protection have trained on any of these patients."""
        wanted = frozenset(patients)
        return sum(bool(wanted & people) for people in self.unprotected.values())

    # --- the file -----------------------------------------------------------------------------

    def _append(self, entry: dict[str, Any], before: Callable[[], None] = lambda: None) -> None:
        with self._locked():
            self._read_on()
            if self._compare_head():
                # before another line follows: two that are not named would look like a forgery
                self._name_last()
            before()
            line = json.dumps({**entry, "before": self._digest}, sort_keys=True).encode() + b"\n"
            path = self.folder / FILE
            try:
                with open(path, "ab", opener=_owners_alone) as handle:
                    handle.write(line)
                    handle.flush()
                    os.fsync(handle.fileno())
            except OSError as error:
                with open(path, "ab") as handle:  # half a line must not stand before the next one
                    handle.truncate(self._end)
                raise _unwritable(error) from None
            self._take(line)
            self._name_last()

    def _name_last(self) -> None:
        """Say in `HEAD` which line is the last."""
        try:
            write_json(self.folder / HEAD, {"lines": self._lines, "digest": self._digest})
            (self.folder / HEAD).chmod(0o600)
        except OSError as error:
            raise _unwritable(error) from None

    def _read_on(self) -> None:
        """Take in what this or another process has appended since."""
        path = self.folder / FILE
        if not path.exists():
            return
        with open(path, "rb") as handle:
            handle.seek(self._end)
            for line in handle.readlines():
                if not line.endswith(b"\n"):
                    # a crash cut it off before its step was taken
                    with open(path, "ab") as writer:
                        writer.truncate(self._end)
                    return
                self._take(line)

    def _take(self, line: bytes) -> None:
        number = self._lines + 1
        try:
            entry = json.loads(line)
            if entry.pop("before") != self._digest:
                raise _altered(f"line {number} does not follow the one before it")
            self._enter(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _altered(f"line {number} cannot be read") from None
        self._end += len(line)
        self._lines = number
        self._digest = self._names.digest("ledger", self._digest.encode() + line)
        self._digests.add(self._digest)

    def _enter(self, entry: dict[str, Any]) -> None:
        kind = entry["kind"]
        if kind == "run":
            mechanism = Steps(float(entry["noise_multiplier"]), float(entry["sample_rate"]), 1)
            people = frozenset(entry["patients"])
            promise = (float(entry["epsilon"]), float(entry["delta"]))
            account = Account(entry["run"], entry["title"], people, mechanism, promise)
            self.accounts[account.run] = account
        elif kind == "step":
            charge = (str(entry["phase"]), int(entry["step"]), str(entry["state"]))
            self.accounts[entry["run"]].charges.add(charge)
        elif kind == "unprotected":
            self.unprotected[entry["run"]] = frozenset(entry["patients"])
        elif kind == "forgotten":
            self.forgotten |= set(entry["patients"])
        else:
            raise ValueError(kind)

    def _compare_head(self) -> bool:
        """The last line is the one that was named, or one that was kept from being named.

        Returns:
            Whether it is not named yet.
        """
        path = self.folder / HEAD
        if not path.exists():
            if self._lines > 1:
                raise _altered(f"{HEAD}, which names its last line, is missing")
            return self._lines > 0
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            named = (int(head["lines"]), str(head["digest"]))
        except (ValueError, KeyError, TypeError):
            raise _altered(f"{HEAD} cannot be read") from None
        if named[1] not in self._digests or self._lines - named[0] not in (0, 1):
            raise _altered(f"it has {self._lines} lines, {named[0]} were written")
        return self._lines > named[0]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            handle = open(self.folder / LOCK, "w")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise ResourceError(
                f"SYNTHMED_HOME {self.folder}: cannot be written ({error.strerror})",
                "It holds the key and the ledger of this house; set it to a folder of your own.",
            ) from None
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _owners_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _unwritable(error: OSError) -> ResourceError:
    return ResourceError(
        f"the privacy ledger cannot be written ({error.strerror})",
        "Free some space in SYNTHMED_HOME; the same command goes on.",
    )


def _altered(what: str) -> InputError:
    return InputError(
        f"the privacy ledger in SYNTHMED_HOME was altered or lost: {what}",
        "Restore it from a backup. Without it nobody can say what the patients have already paid, "
        "so nothing private is trained.",
    )
