"""A folder of DICOM images without the people in it: `synthmed deidentify`.

What is written is new in every byte (deid/clean.py); names of files and folders come from keyed
digests, so that the same object goes to the same place and a second call goes on where a first one
stopped. The list of refused files names the source's own, so it lies beside the target, not in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from synthmed import __version__
from synthmed.deid import pixels, profile
from synthmed.deid.clean import Cleaner, Options
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import InputError, ResourceError, UsageError
from synthmed.formats import dicom
from synthmed.formats.listing import is_auxiliary, kind, walk
from synthmed.formats.quarantine import HEADER, Quarantine
from synthmed.formats.refusal import Refused, quiet
from synthmed.privacy.ledger import Ledger
from synthmed.progress import Progress
from synthmed.receipt import RECEIPT, write_cleaned
from synthmed.store import home, locked, write_bytes, write_json

_UNSEEN = {
    "keep": "text drawn into pixels where the header does not say so",
    "mask": "text drawn into pixels that the search does not find",
    "refuse": "text drawn into pixels that the search does not find",
}
"""What text may be left, by what was asked."""


def deidentify(
    source: Path, target: Path, options: Options = Options(), quiet_progress: bool = False
) -> dict[str, Any]:
    """Write clean copies of every DICOM image in `source`.

    Guarantee: no byte of the source is copied but stored pixel bits and values of known elements
    that the standard's profile keeps and that hold no string of the patient's identity. Text that
    is drawn into pixels without the header saying so is seen where `options.text` asks for it, and
    as far as a detector sees it.

    Args:
        source: a folder.
        target: a new or empty one, or that of an earlier call.
        options: what is kept beyond the basic profile.
        quiet_progress: print no progress.

    Returns:
        The receipt, which is also in the target: counts alone.

    Raises:
        InputError: no such folder, or no image in it that can be used.
        UsageError: the target is in the source, holds something else or what was made with other
            options, the list of refused files would replace another file, or what searches for
            text is not installed.
        ResourceError: a file cannot be written, or another call writes there.
    """
    if options.text != "keep":
        pixels.ready()  # said before anything is read
    _check_places(source, target, options)
    target = target.resolve()
    with locked(_lock(target), str(target), "choose another folder"):
        _check_places(source, target, options)  # another call may have begun and ended
        return _deidentified(source, target, options, quiet_progress)


def _lock(target: Path) -> Path:
    """What stands for a target while a call writes there; nothing of it in the target's folder."""
    folder = home() / "locks"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / hashlib.sha256(os.fsencode(target)).hexdigest()


def _deidentified(
    source: Path, target: Path, options: Options, quiet_progress: bool
) -> dict[str, Any]:
    """The same, once nobody else writes there."""
    listing = walk(source.resolve())
    cleaner = Cleaner(Pseudonyms.load(), options)
    quarantine = Quarantine()
    for path, reason in listing.refused.items():
        quarantine.add(path, reason)
    forgotten = Ledger(names=cleaner.pseudonyms).forgotten
    written: set[tuple[str, str, str, str]] = set()
    n_twice = 0
    progress = Progress("deidentify", quiet_progress)
    paths = [p for p in listing.sizes if not is_auxiliary(p)]
    target.mkdir(parents=True, exist_ok=True)
    # begun: what is there is ours, whenever the call ends
    write_json(target / RECEIPT, {"complete": False, "options": vars(options)})
    with quiet():
        for done, path in enumerate(paths, 1):
            try:
                if kind(listing, path) != "dicom":
                    raise Refused("not_an_image")
                data = dicom.dataset(listing.path(path), None, stop_before_pixels=False)
                place, content = _made(cleaner, data)
                if place[0] in forgotten:
                    raise Refused("forgotten")
                if place in written:
                    n_twice += 1
                else:
                    _write(target.joinpath(*place), content)
                    written.add(place)
            except Refused as reason:
                quarantine.add(path, reason)
            except MemoryError:
                quarantine.add(path, Refused("oversized", "The memory at hand is too small."))
            progress.update(done, len(paths))
    n_files = len(listing.sizes) + len(listing.refused)
    there = {p.relative_to(target).parts for p in target.rglob("*.dcm")}
    receipt = _receipt(cleaner, written, quarantine) | {
        "n_files": n_files,
        "n_auxiliary": len(listing.sizes) - len(paths),
        "n_same_twice": n_twice,
        "n_of_earlier_calls": len(there - written),
    }
    write_cleaned(target, receipt)
    refused = refused_list(target)
    refused.touch(mode=0o600)  # it names patients' files, and stays in the house
    refused.chmod(0o600)
    quarantine.write(refused)
    if not written:
        raise InputError(
            f"{source}: no image in {n_files} files; refused: {quarantine.summary()}",
            f"{refused_list(target)} names each and why.",
        )
    return receipt


def refused_list(target: Path) -> Path:
    """Where the refused files are named: beside the target."""
    place = target.resolve()
    return place.with_name(f"{place.name}-refused.tsv")


def _check_places(source: Path, target: Path, options: Options) -> None:
    """Refuse what would be mixed, overwritten or read as a source of its own."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder", "Check the path.")
    if next((p for p in (target, *target.parents) if p.exists()), target).is_file():
        raise UsageError(f"{target}: is a file, or lies below one", "Name a folder.")
    refused = refused_list(target)
    for place in (target.resolve(), refused):
        if place.is_relative_to(source.resolve()):
            raise UsageError(f"{target}: lies inside the source", "Choose another place.")
    if refused.exists() and not refused.read_bytes().startswith(HEADER.encode()):
        raise UsageError(f"{refused}: is in the way", "Move it, or choose another target.")
    if not target.exists() or not any(target.iterdir()):
        return
    try:
        receipt = json.loads((target / RECEIPT).read_text(encoding="utf-8"))
        before = {**vars(Options()), **receipt["options"]}  # an option may be newer than it
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{target}: holds something else", "Choose a new folder.") from None
    if before != vars(options):
        raise UsageError(
            f"{target}: was made with other options", "Take the same ones, or a new folder."
        )


def _made(cleaner: Cleaner, data: Any) -> tuple[tuple[str, str, str, str], bytes]:
    """A clean file, and its place: patient, study, series and a name."""
    uids = [str(data.get(name) or "") for name in ("StudyInstanceUID", "SeriesInstanceUID")]
    try:
        person, content = cleaner.clean(data)
    except Refused:
        raise
    except Exception:  # hostile values raise anything, and nothing of them is passed on
        raise Refused("header_unreadable", "One of its values is malformed.") from None
    # by its content: two objects that claim one UID are two files
    named: list[str | bytes] = [*uids, content]
    study, series, name = (cleaner.pseudonyms.digest("place", value)[:16] for value in named)
    return (person, study, series, f"{name}.dcm"), content


def _write(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content)
    except OSError as error:
        raise ResourceError(
            f"deidentify: a file cannot be written ({error.strerror})",
            "Free some space, or choose another folder; the same command goes on.",
        ) from None


def _receipt(
    cleaner: Cleaner, written: Collection[tuple[str, str, str, str]], quarantine: Quarantine
) -> dict[str, Any]:
    """Counts, and what was done by which rules."""
    spoken = {"X": "removed", "Z": "emptied", "D": "replaced", "U": "UID replaced", "K": "kept",
              "date": "date shifted", "words": "reduced to words of the trade",
              "name in text": "kept text emptied for a name in it"}  # fmt: skip
    return {
        "complete": True,
        "profile": f"{profile.EDITION}, Basic Application Level Confidentiality Profile",
        "options": dict(vars(cleaner.options)),
        "methods": [{"code": c, "meaning": m} for c, m in cleaner.options.codes],
        "synthmed": __version__,
        "n_written": len(written),
        "n_patients": len({patient for patient, *_ in written}),
        "n_studies": len({place[:2] for place in written}),
        "n_series": len({place[:3] for place in written}),
        "n_refused": len(quarantine.entries),
        "refused": quarantine.counts(),
        "n_text_masked": cleaner.n_text_masked,
        "elements": {spoken.get(k, k): n for k, n in sorted(cleaner.counts.items())},
        "not_covered": f"{_UNSEEN[cleaner.options.text]}; faces",
    }
