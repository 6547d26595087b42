"""`synthmed purge RUN`: no patient data is left in a run; what it was, and what left, stays known.

Everything below private/ goes, and withheld/, which never passed the policy. config.yaml,
manifest.json and log.jsonl stay (settings, digests and times), and release/ unless it is to go too.
Files are unlinked, not overwritten: on flash memory and on file systems with snapshots nobody can
promise more from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthmed.errors import UsageError
from synthmed.places import is_run, refuse_links
from synthmed.store import Run, sync

NOT_PROMISED = (
    "files were unlinked, not overwritten; snapshots, backups and the source are not touched"
)


def purge(place: Path, release_too: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Remove the private part of a run.

    Guarantee: what is killed half-way ends the same when called again; until then the stages that
    are gone are simply not there.

    Args:
        place: the run's folder.
        release_too: remove release/ as well.
        dry_run: remove nothing, say what would be.

    Returns:
        `removed` and `kept`, names relative to the run, and `n_bytes` removed.

    Raises:
        UsageError: the folder is no run, or is or holds a link.
        ResourceError: another process uses it.
    """
    if not is_run(place):
        raise UsageError(f"purge {place}: no run in this folder", "Name the folder of one run.")
    refuse_links(place)
    run = Run(place)
    if dry_run:
        return _outcome(run, release_too)
    with run.lock():
        outcome = _outcome(run, release_too)
        for name in outcome["removed"]:
            run.remove(run.path / name)
        sync(run.private)
        run.log("purged", n_bytes=outcome["n_bytes"], release=release_too)
    return outcome


def describe(outcome: Mapping[str, Any], done: bool) -> str:
    """What was, or would be, removed."""
    size = f"{outcome['n_bytes'] / 1e6:.1f} MB"
    if not outcome["removed"]:
        text = [f"{outcome['run']}: nothing private is in it"]
    else:
        verb = "removed" if done else "would remove"
        text = [f"{outcome['run']}: {verb} {', '.join(outcome['removed'])} ({size})"]
    text.append(f"kept: {', '.join(outcome['kept'])}")
    text += [f"note: {note}" for note in outcome["notes"]]
    return "\n".join(text)


def _outcome(run: Run, release_too: bool) -> dict[str, Any]:
    # what a killed call has renamed already goes first: `Run.remove` renames to such names
    private = sorted(p for p in run.private.iterdir() if p.name != ".lock")
    private.sort(key=lambda p: not p.name.startswith(".removed-"))
    public = [run.path / n for n in ("withheld", *(["release"] if release_too else []))]
    doomed = [*private, *(p for p in public if p.exists())]
    sizes = [p.stat().st_size for d in doomed for p in [d, *d.rglob("*")] if p.is_file()]
    kept = ["config.yaml", "manifest.json", "log.jsonl", *([] if release_too else ["release"])]
    notes = [NOT_PROMISED, "the privacy ledger keeps what was spent: pseudonyms and amounts"]
    if not release_too and (run.path / "release").exists():
        notes.append("release/ holds synthetic scans alone and stays; --all removes it")
    return {
        "run": str(run.path),
        "removed": [str(p.relative_to(run.path)) for p in doomed],
        "kept": [name for name in kept if (run.path / name).exists()],
        "n_bytes": sum(sizes),
        "notes": notes,
    }
