"""A folder of DICOM images without the people in it: `synthmed deidentify`.

What is written is new in every byte (deid/clean.py); names of files and folders come from keyed
digests, so that the same object goes to the same place and a second call goes on where a first one
stopped. The list of refused files names the source's own, so it lies beside the target, not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthmed import __version__
from synthmed.deid import profile
from synthmed.deid.clean import Cleaner, Options
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import InputError, ResourceError, UsageError
from synthmed.formats import dicom
from synthmed.formats.listing import is_auxiliary, kind, walk
from synthmed.formats.quarantine import Quarantine
from synthmed.formats.refusal import Refused, quiet
from synthmed.progress import Progress
from synthmed.store import write_bytes, write_json

RECEIPT = "receipt.json"
"""Also marks a folder as the target of an earlier call."""


def deidentify(
    source: Path, target: Path, options: Options = Options(), quiet_progress: bool = False
) -> dict[str, Any]:
    """Write clean copies of every DICOM image in `source`.

    Guarantee: no byte of the source is copied but stored pixel bits and values of known elements
    that the standard's profile keeps and that hold no string of the patient's identity. Text that
    is drawn into pixels without the header saying so is not seen.

    Args:
        source: a folder.
        target: a new or empty one, or that of an earlier call.
        options: what is kept beyond the basic profile.
        quiet_progress: print no progress.

    Returns:
        The receipt, which is also in the target: counts alone.

    Raises:
        InputError: no such folder, or no image in it that can be used.
        UsageError: the target is in the source, or holds something else.
        ResourceError: a file cannot be written.
    """
    if not source.is_dir():
        raise InputError(f"{source}: no such folder", "Check the path.")
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{target}: lies inside the source", "Choose another place.")
    if target.exists() and any(target.iterdir()) and not (target / RECEIPT).is_file():
        raise UsageError(f"{target}: holds something else", "Choose a new folder.")
    listing = walk(source.resolve())
    cleaner = Cleaner(Pseudonyms.load(), options)
    quarantine = Quarantine()
    for path, reason in listing.refused.items():
        quarantine.add(path, reason)
    written: Counter[tuple[str, str, str]] = Counter()
    progress = Progress("deidentify", quiet_progress)
    paths = [p for p in listing.sizes if not is_auxiliary(p)]
    target.mkdir(parents=True, exist_ok=True)
    # begun: what is there is ours, whenever the call ends
    write_json(target / RECEIPT, {"complete": False})
    with quiet():
        for done, path in enumerate(paths, 1):
            try:
                if kind(listing, path) != "dicom":
                    raise Refused("not_an_image")
                data = dicom.dataset(listing.path(path), None, stop_before_pixels=False)
                place, content = _made(cleaner, data)
                _write(target.joinpath(*place), content)
                written[place[:3]] += 1
            except Refused as reason:
                quarantine.add(path, reason)
            except MemoryError:
                quarantine.add(path, Refused("oversized", "The memory at hand is too small."))
            progress.update(done, len(paths))
    receipt = _receipt(cleaner, written, quarantine, len(listing.sizes), len(paths))
    write_json(target / RECEIPT, receipt)
    quarantine.write(refused_list(target))
    if not written:
        raise InputError(
            f"{source}: no image in {len(listing.sizes)} files; refused: {quarantine.summary()}",
            f"{refused_list(target)} names each and why.",
        )
    return receipt


def refused_list(target: Path) -> Path:
    """Where the refused files are named: beside the target."""
    return target.with_name(f"{target.name}-refused.tsv")


def _made(cleaner: Cleaner, data: Any) -> tuple[tuple[str, str, str, str], bytes]:
    """A clean file, and its place: patient, study, series and a name."""
    uids = [str(data.get(name) or "") for name in ("StudyInstanceUID", "SeriesInstanceUID")]
    instance = str(data.get("SOPInstanceUID") or "")
    try:
        person, content = cleaner.clean(data)
    except Refused:
        raise
    except Exception:  # hostile values raise anything, and nothing of them is passed on
        raise Refused("header_unreadable", "One of its values is malformed.") from None
    study, series, name = (
        cleaner.pseudonyms.digest("place", value)[:16] for value in (*uids, instance)
    )
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
    cleaner: Cleaner,
    written: Mapping[tuple[str, str, str], int],
    quarantine: Quarantine,
    n_files: int,
    n_looked: int,
) -> dict[str, Any]:
    """Counts, and what was done by which rules."""
    spoken = {"X": "removed", "Z": "emptied", "D": "replaced", "U": "UID replaced", "K": "kept",
              "date": "date shifted", "words": "reduced to words of the trade",
              "name in text": "kept text emptied for a name in it"}  # fmt: skip
    return {
        "complete": True,
        "profile": f"{profile.EDITION}, Basic Application Level Confidentiality Profile",
        "options": {name: getattr(cleaner.options, name) for name in vars(cleaner.options)},
        "methods": [{"code": c, "meaning": m} for c, m in cleaner.options.codes],
        "synthmed": __version__,
        "n_files": n_files,
        "n_auxiliary": n_files - n_looked,
        "n_written": sum(written.values()),
        "n_patients": len({patient for patient, *_ in written}),
        "n_studies": len({place[:2] for place in written}),
        "n_series": len(written),
        "n_refused": len(quarantine.entries),
        "refused": quarantine.counts(),
        "elements": {spoken.get(k, k): n for k, n in sorted(cleaner.counts.items())},
        "not_covered": "text drawn into pixels where the header does not say so; faces",
    }
