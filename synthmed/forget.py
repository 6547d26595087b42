"""`synthmed forget`: people out of the stores, and a list of what was made with them.

The order is what makes it safe to stop anywhere. First the ledger says that they are not to be
taken in again. Then all runs that may hold them are locked. In each run the model is marked before
the data set goes, which tells who trained it, and the catalogue goes last, which tells who was
there. A file `.forgetting` stands in a run until it is done, so that the next call goes on with it.

Everybody who was ever forgotten is taken out of what is found, not only those who are named: a run
that comes back from a backup is cleaned by the next call.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from synthmed import __version__, receipt, traces
from synthmed.artifacts import Catalogue
from synthmed.deid import deface
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.formats import quarantine
from synthmed.places import find, refuse_links
from synthmed.privacy.ledger import Ledger
from synthmed.report.examination import FOLDER as EXAMINATION
from synthmed.stages.fetch import FOLDER as FETCHED
from synthmed.stages.ingest import MIN_PATIENTS, tally
from synthmed.store import (
    FOLDER,
    Run,
    file_sha256,
    sync,
    write_bytes,
)
from synthmed.traces import ALL, BEGUN, PSEUDONYM, ROWS, Seen, look, named

_KEPT = {".lock", BEGUN, "ingest", "model", "signed.json"}
"""What of RUN/private is changed, or says nothing of patients; all else is made of them."""


def pseudonyms_of(identity: str, names: Pseudonyms) -> set[str]:
    """The pseudonyms that a person may have: `p` and 16 hexadecimal digits is one, all else an id.

    A participant_id of BIDS is the same one without its `sub-`, as ingest takes it; what is called
    `sub-` by another column stands for itself.
    """
    if PSEUDONYM.fullmatch(identity):
        return {identity}
    return {names.patient(i) for i in (identity, re.sub(r"(^|/)sub-(?=[^/]+$)", r"\1", identity))}


def forget(
    identities: Iterable[str], folders: Sequence[Path], dry_run: bool = False
) -> dict[str, Any]:
    """Take people out of runs and folders of clean DICOM, for good.

    Guarantee: what is killed half-way ends the same when called again. What other people have in a
    catalogue stays byte for byte; whatever was made of everybody together goes, and is made anew by
    the run's next call. What they have paid for private runs stays in the ledger.

    Args:
        identities: ids as the source has them, or pseudonyms; none of them is printed or written.
        folders: where to look for runs and targets of `deidentify`, at any depth.
        dry_run: change nothing, say what would be.

    Returns:
        `runs`, `cleaned`, what the ledger says, and `n_found_nowhere`.

    Raises:
        UsageError: there is nothing to search in one of the folders, or what would be changed
            holds a link.
        InputError: the ledger was altered or lost, or a manifest is of another version.
        ResourceError: another process uses one of the runs: nothing was removed.
    """
    names = Pseudonyms.load()
    ledger = Ledger(names=names)
    persons = [pseudonyms_of(i, names) for i in sorted({i.strip() for i in identities} - {""})]
    asked = set().union(*persons)
    new, people = asked - ledger.forgotten, asked | ledger.forgotten
    runs, targets = find(folders)
    if new and not dry_run:
        ledger.forget(new)
        # whoever has begun an ingest without knowing that is found now, and holds its lock
        runs, targets = find(folders)
    for store in (*(run / "private" for run in runs), *targets):
        refuse_links(store)
    with ExitStack() as held:
        opened = [Run(path) for path in runs]
        for run in opened if not dry_run else ():
            if _may_hold(run, people):
                held.enter_context(run.lock())
        # originals from a PACS, whoever they are of: the run's next call fetches what it may
        fetching = [run for run in opened if people and (run.private / FETCHED).exists()]
        seen = [look(run, people) for run in opened]
        touched = [s for s in seen if s.people or s.begun]
        weights = {traces.weights(s.run) for s in touched if s.trained} - {None}
        told = [_told(s) for s in touched]
        inside = {t: [p for p in sorted(people) if (t / p).exists()] for t in targets}
        found = set().union(*(s.people for s in touched), *inside.values())
        if not dry_run:
            for run in fetching:
                run.remove(run.private / FETCHED)
            for s in touched:
                _take_out(s, people)
            for target, own in inside.items():
                _clean(target, own)
    paid = ledger.runs_of(asked)
    there = {traces.account(run) for run in opened}
    known = found | (asked - new)
    known |= {p for p in asked if ledger.runs_of([p]) or ledger.without_protection([p])}
    return {
        "n_asked": len(persons),
        "n_found": len(found),
        "n_found_nowhere": sum(not person & known for person in persons),
        "n_runs_searched": len(runs),
        "runs": told,
        "fetched": [str(run.path) for run in fetching],
        "started_from": [str(r.path) for r in opened if traces.start(r) & weights],
        "cleaned": [{"folder": str(t), "n_patients": len(own)} for t, own in inside.items() if own],
        "ledger": {
            "private_trainings": [{"title": a.title, "steps": len(a.charges)} for a in paid],
            "n_elsewhere": sum(a.run not in there for a in paid),
            "n_unprotected_trainings": ledger.without_protection(asked),
        },
    }


def _may_hold(run: Run, people: Collection[str]) -> bool:
    """Whether a run has to be locked; one that trains on others is left alone."""
    try:
        # this first: it becomes the catalogue, which is looked at next
        reading = (run.private / f".{FOLDER['catalogue']}.new").exists()
        seen = look(run, people)
        fetched = (run.private / FETCHED).exists()
        return reading or fetched or bool(seen.begun or seen.people)
    except FileNotFoundError:
        return True  # another process is at work in it


# --- what is said -------------------------------------------------------------------------------


def _told(seen: Seen) -> dict[str, Any]:
    """A run for the list."""
    model = seen.model
    return {
        "run": str(seen.run.path),
        "n_people": len(seen.people),
        "n_scans": seen.n_scans,
        "extent": seen.extent,
        "n_trained_on": seen.n_trained_on,
        "private": bool(model and model.facts.get("privacy")),
        "n_patients_left": len({s["patient"] for s in traces.catalogue(seen.run)} - seen.people),
        "releases": seen.releases,
        "removed": _doomed(seen),
    }


def _doomed(seen: Seen) -> list[str]:
    """What goes as a whole, relative to the run: all that was made of its patients together."""
    if seen.extent == ROWS:
        return []
    made = sorted(f"private/{p.name}" for p in seen.run.private.iterdir() if p.name not in _KEPT)
    return made + ["withheld"] * ("withheld" in seen.parts)


# --- what is done -------------------------------------------------------------------------------


def _take_out(seen: Seen, people: Collection[str]) -> None:
    """Take people out of one run; each step may be done twice."""
    run = seen.run
    doomed = _doomed(seen)
    write_bytes(run.private / BEGUN, seen.extent.encode())
    sync(run.private)
    was = {k: m.digest() for k in ("catalogue", "model") if (m := run.manifest(k))}
    if seen.extent == ALL:
        _mark(seen)
    for name in doomed:
        run.remove(run.path / name)
    _empty_catalogue(run, people, same=seen.extent == ROWS)
    sync(run.private)
    run.record(__version__)
    run.log(
        "forgotten",
        n_people=len(seen.people),
        n_trained_on=seen.n_trained_on,
        releases=seen.releases,
        were=was,
    )
    (run.private / BEGUN).unlink()


def _mark(seen: Seen) -> None:
    """Let the model say that it was trained on people forgotten since; its pictures show some."""
    model, run = seen.model, seen.run
    if model is None:
        return
    taught = traces.trained_on(run, model)
    left = sorted(taught - seen.people) if taught is not None else None
    n = model.facts.get("n_forgotten", 0)
    # where nothing says who trained it, a second call finds the same people again
    n = max(n, len(seen.trained)) if taught is None else n + len(seen.trained)
    facts = {**model.facts} | ({"n_forgotten": n} if n else {})
    if left is not None:
        facts["trained_on"] = left
    shown = run.folder("model") / EXAMINATION
    files = {f: sha for f, sha in model.files.items() if not f.startswith(f"{EXAMINATION}/")}
    run.amend("model", files, facts, same=True)
    run.remove(shown)


def _empty_catalogue(run: Run, people: Collection[str], same: bool) -> None:
    """The catalogue without some people: its lists, their volumes, the receipt, the manifest."""
    folder = run.folder("catalogue")
    changed = set()
    reasons: dict[str, int] = {}
    for table in sorted(folder.glob("quarantine*.tsv")):
        text, counts = quarantine.without(table, people)
        reasons = counts if table.name == "quarantine.tsv" else reasons
        write_bytes(table, text.encode())
        changed.add(table.name)
    file = folder / "catalogue.jsonl"
    manifest = run.manifest("catalogue")
    if manifest is None or not file.is_file():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["patient"] not in people]
    write_bytes(file, "".join(kept).encode())
    scans = Catalogue.open(folder).scans
    facts = {k: v for k, v in manifest.facts.items() if k not in deface.TALLIED}
    facts |= tally(scans, reasons, manifest.facts["n_labels_missing"])
    if (folder / receipt.RECEIPT).is_file():
        receipt.write(folder, receipt.of_ingest(facts, scans))
        changed |= {receipt.RECEIPT, receipt.PAGE}
    for table in folder.glob("faces*.tsv"):  # of those held out elsewhere as well
        rows = table.read_text(encoding="utf-8").splitlines(keepends=True)
        left = [row for row in rows if not {*PSEUDONYM.findall(row)} & set(people)]
        write_bytes(table, "".join(left).encode())
        changed.add(table.name)
    for place in [p for p in (folder / "volumes", folder / "faces") if p.is_dir()]:
        for held in place.iterdir():
            if named(held, people):
                held.unlink()
        sync(place)
    files = {name: sha for name, sha in manifest.files.items() if (folder / name).is_file()}
    files |= {name: file_sha256(folder / name) for name in changed | {file.name}}
    run.amend("catalogue", files, facts, same)


def _clean(target: Path, people: Sequence[str]) -> None:
    """Take people's folders out of a target of `deidentify`, each in one step."""
    doomed = target / ".removed"
    shutil.rmtree(doomed, ignore_errors=True)
    for person in people:
        (target / person).rename(doomed)
        shutil.rmtree(doomed)
    sync(target)


# --- as text ------------------------------------------------------------------------------------


def describe(outcome: Mapping[str, Any], done: bool) -> str:
    """What was, or would be, done, and what is left to do."""
    text: list[str] = []
    for run in outcome["runs"]:
        text += [f"run {run['run']}", *(f"  {line}" for line in _of_run(run, done))]
    verb = "removed" if done else "would remove"
    for place in outcome["fetched"]:
        text += [f"run {place}", f"  {verb}: private/{FETCHED}, originals that a PACS gave"]
    for place in outcome["started_from"]:
        text += [f"run {place}", "  to do: its model started from such weights: train it anew"]
    for target in outcome["cleaned"]:
        text += [
            f"clean DICOM {target['folder']}",
            f"  {verb}: {_many(target['n_patients'], 'folder')}",
        ]
        text.append("  to do: copies that were given to others")
    text.append(
        f"{_many(outcome['n_found'])} found in {len(outcome['runs'])} of "
        f"{_many(outcome['n_runs_searched'], 'run')} and "
        f"{_many(len(outcome['cleaned']), 'folder')} of clean DICOM"
    )
    paid = outcome["ledger"]
    n_paid, n_open = len(paid["private_trainings"]), paid["n_unprotected_trainings"]
    if n_paid or n_open:
        text.append(
            f"kept in the ledger: {n_paid} private and {n_open} unprotected trainings, as "
            "pseudonyms and amounts; without them a promise that was made to them would be lost"
        )
    if paid["n_elsewhere"]:
        text.append(f"to do: {paid['n_elsewhere']} of these runs are in no folder searched")
    if outcome["n_asked"]:
        verb = "is" if done else "would be"
        text.append(f"{outcome['n_asked']} {verb} on the list: no ingest takes them in again")
    text.append(
        "not touched: the source (quarantine.tsv may name paths in it), backups, snapshots, and "
        "whatever left the house"
    )
    return "\n".join(text)


def _of_run(run: Mapping[str, Any], done: bool) -> list[str]:
    """A run's lines."""
    verb = "removed" if done else "would remove"
    if run["extent"] == ROWS:
        return [f"{verb}: their rows in quarantine.tsv; none of their scans was used"]
    gone = "".join(f", {name}" for name in run["removed"])
    text = [f"{verb}: {_many(run['n_scans'], 'scan')} of {_many(run['n_people'])}{gone}"]
    if run["n_trained_on"]:
        text.append(
            f"model: trained on {run['n_trained_on']} of them. Weights cannot forget: it stays, "
            "marked, until the run is made anew, and nothing is sampled from it"
        )
    elif run["n_trained_on"] == 0:
        text.append("model: not trained on them, they were held out")
    for release in run["releases"]:
        signed = " (signed)" if release["signed"] else ""
        day = f" of {release['when']}" if release["when"] else ""
        to = f", for {release['recipient']}" if release["recipient"] else ""
        goes = "goes" if release["folder"] in run["removed"] else "stays"
        text.append(
            f"{release['folder']}/: {release['decision']}{signed}{day}{to}; made with them, {goes}"
        )
    if run["n_patients_left"] < MIN_PATIENTS:
        text.append(f"to do: {run['n_patients_left']} patients are left, too few for a cohort")
    elif run["n_trained_on"] is not None:
        again = f"`synthmed generate {run['run']}/config.yaml --run {run['run']}`"
        cost = " with --overwrite, which charges the others again" if run["private"] else ""
        text.append(f"to do: {again}{cost} trains anew; `synthmed purge` removes the model")
    if any(r["folder"] == "release" for r in run["releases"]):
        text.append("to do: recall what was given away, if they object to that too")
    return text


def _many(n: int, what: str = "person") -> str:
    """A number of things.

    >>> _many(1), _many(2), _many(0, "scan")
    ('1 person', '2 people', '0 scans')
    """
    if n == 1:
        return f"1 {what}"
    return f"{n} people" if what == "person" else f"{n} {what}s"
