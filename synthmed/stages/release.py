"""Evidence to a decision, two reports, and release/ or withheld/: the last stage.

What may leave is built in a private folder, searched for identifiers, closed with SHA256SUMS and
renamed into place: RUN/release and RUN/withheld never stand side by side, and neither is ever
half there. The same inputs give the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthmed import policy
from synthmed.artifacts import Cohort, Dataset, ScreenedCohort
from synthmed.config import Config
from synthmed.deid.scan import Finding, mentions, scan
from synthmed.errors import UsageError
from synthmed.formats.bids_export import Naming, export
from synthmed.report import examination, images, viewer
from synthmed.report.build import Report, build
from synthmed.report.cards import card, croissant
from synthmed.report.facts import CohortFacts
from synthmed.report.folder import SUMS, close, empty, sums, write_page, write_report
from synthmed.report.images import Picture, masks_of
from synthmed.stages import lines
from synthmed.stages.identifiers import SourceNames, identifiers, source_names
from synthmed.store import Run, digest, sync, write_bytes, write_json
from synthmed.types import Decision, Estimate


@dataclass(frozen=True)
class Grounds:
    """What a decision rests on beside the scans.

    Args:
        evidence: all estimates that a policy may ask for.
        inside: those that the restricted report shows and no policy judges.
        digest: of all that the decision depends on, for `standing`.
        audit_failed: an audit found that the model's promise of privacy is not kept.
        elsewhere: what was seen of the files of an assessment.
    """

    evidence: Sequence[Estimate]
    inside: Sequence[Estimate] = ()
    digest: str = ""
    audit_failed: bool = False
    elsewhere: lines.Elsewhere | None = None


@dataclass(frozen=True)
class _Material:
    """All that the release folder is made of, but for the decision."""

    config: Config
    estimates: Sequence[Estimate]
    cohort: ScreenedCohort
    facts: CohortFacts
    pictures: Sequence[Picture]
    volumes: Sequence[Picture]
    n_searched: int
    with_volumes: bool


def release(
    run: Run,
    config: Config,
    grounds: Grounds,
    cohort: ScreenedCohort,
    facts: Mapping[str, Any],
    *,
    real: Dataset | None,
    names: SourceNames,
    with_volumes: bool = True,
) -> Decision:
    """Decide, write both reports, and fill RUN/release or RUN/withheld.

    A REVIEW that was signed stays signed as long as the report that was signed is made again
    byte for byte.

    Args:
        run: the run, locked by the caller.
        config: its config; `policy`, `screen.max_dropped`, `export` and `governance` matter here.
        grounds: what is decided on.
        cohort: what ships.
        facts: see `CohortFacts`.
        real: the real scans, for pictures in the restricted report; null leaves them out.
        names: of the source: they must not be in the release, nor may the pseudonyms and the
            names of refused files, which are looked up in the run.
        with_volumes: False for a cohort that was made elsewhere: the folder then holds the
            shareable report and SHA256SUMS alone, and names no model.

    Raises:
        UsageError: the config promises privacy that the model states nothing of.
    """
    told = CohortFacts.model_validate(facts)
    if config.privacy is not None and told.privacy is None:
        raise UsageError(
            "privacy: the config promises it, and nothing says that the model keeps it",
            "Train the model anew with --overwrite.",
        )
    run.discard_release()
    evidence = grounds.evidence
    searched = identifiers(run, config, evidence, names)
    masks = masks_of(config)
    shown = images.synthetic(cohort, config.data.conditions, masks)
    # a cohort that was made elsewhere is its maker's: pictures of it are enough
    seen = images.viewed(cohort, config.data.conditions, masks) if with_volumes else []
    material = _Material(config, evidence, cohort, told, shown, seen, len(searched), with_volumes)
    judged = policy.decide(config.policy.rules, evidence, n_holdout=told.n_holdout).verdicts
    before_scan = [
        *judged,
        *lines.of_cohort(config, cohort, told, judged),
        *lines.of_audit(grounds.audit_failed),
        *lines.of_elsewhere(grounds.elsewhere),
    ]

    new = empty(run.private / ".release.new")
    findings: list[Finding] = []
    decision = policy.conclude([*before_scan, lines.of_scan(findings, names.complete)])
    shareable = _fill(new, material, decision, findings)
    findings = scan(new, forbidden=searched, own=[viewer.library().encode()])
    if findings:
        decision = policy.conclude([*before_scan, lines.of_scan(findings, names.complete)])
        shareable = _fill(empty(new), material, decision, findings)

    private = empty(run.private / ".report.new")
    pictures, volumes = list(shown), list(seen)
    if real is not None:
        sampled = run.folder("cohort")
        everything = Cohort.open(sampled) if (sampled / "samples.jsonl").is_file() else None
        pictures += images.real(real, masks) + images.closest(cohort, everything, real, masks)
        volumes = images.viewed_closest(cohort, everything, real, masks) or volumes
    pictures += examination.pictures(run.folder("model"))
    restricted = build(
        "restricted",
        config,
        decision,
        [*evidence, *grounds.inside],
        told,
        findings=findings,
        n_searched=len(searched),
        images=[p.entry() for p in pictures],
        volumes=[v.entry() for v in volumes],
        names_model=with_volumes,
        examination=examination.read(run.folder("model")),
        under_two_names=cohort.under_two_names,
    )
    signature = _still_signed(run, decision, shareable, restricted)
    if signature:
        restricted["signature"] = signature
        _sign_folder(new, shareable, signature)
    write_report(private, restricted, [*pictures, *volumes])
    write_json(
        private / "decision.json",
        {"made_from": grounds.digest, "decision": decision.model_dump(mode="json")},
    )
    _into_place(run, private, run.private / "report")
    leaves = decision.decision == "RELEASE" or signature is not None
    _into_place(run, new, run.path / ("release" if leaves else "withheld"))
    return decision


def standing(run: Run, made_from: str) -> Decision | None:
    """The decision that stands in `run` if it was made from `made_from`, else None.

    After a REVIEW was signed the decision is still REVIEW, and RUN/release is there.
    """
    file = run.private / "report" / "decision.json"
    there = [run.path / n for n in ("release", "withheld") if (run.path / n / SUMS).is_file()]
    if not file.is_file() or len(there) != 1:
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["made_from"] != made_from:
        return None
    if sums(there[0]) != (there[0] / SUMS).read_text(encoding="utf-8"):
        return None  # altered since: it is built anew
    decision = Decision.model_validate(content["decision"])
    report: Report = json.loads((there[0] / "report/report.json").read_text(encoding="utf-8"))
    leaves = decision.decision == "RELEASE" or report["signature"] is not None
    if leaves != (there[0].name == "release"):
        return None  # somebody has moved it
    return decision


def sign(run: Run, config: Config, name: str, reason: str) -> None:
    """Move a cohort under REVIEW from withheld/ to release/, and record who, when and why.

    Args:
        run: the run, locked by the caller.
        config: its config, whose source names whom name and reason must not mention.
        name: who signs.
        reason: why it may be released.

    Raises:
        UsageError: nothing to sign, released already, WITHHELD, changed since it was built, or
            the name or reason is empty or holds an identifier of the source.
    """
    withheld = run.path / "withheld"
    if (run.path / "release").exists():
        raise UsageError(f"run {run.path}: released already", "There is nothing to sign.")
    file = run.private / "report" / "report.json"
    if not withheld.is_dir() or not file.is_file():
        raise UsageError(f"run {run.path}: no decision yet", f"Run `synthmed release {run.path}`.")
    restricted: Report = json.loads(file.read_text(encoding="utf-8"))
    if restricted["decision"] != "REVIEW":
        raise UsageError(
            f"run {run.path}: {restricted['decision']} cannot be signed away",
            "A line of the policy failed: change the model or the data, and run again.",
        )
    if not name.strip() or not reason.strip():
        raise UsageError("--sign and --reason: both must say something")
    if sums(withheld) != (withheld / SUMS).read_text(encoding="utf-8"):
        raise UsageError(
            f"{withheld}: changed since it was built",
            f"Run `synthmed release {run.path}` to build it again.",
        )
    if mentions(f"{name}\n{reason}", identifiers(run, config, (), source_names(config))):
        raise UsageError(
            "--sign or --reason: holds an identifier of the source, and would be released with it",
            "Say it without names, pseudonyms or file names of patients.",
        )
    new = empty(run.private / ".release.new")
    shutil.copytree(withheld, new, dirs_exist_ok=True)
    shareable: Report = json.loads((new / "report/report.json").read_text(encoding="utf-8"))
    signature = {
        "name": name.strip(),
        "reason": reason.strip(),
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    record = {**signature, "report": _signed_content(shareable, restricted)}
    _sign_folder(new, shareable, signature)
    write_json(run.private / "signed.json", record)
    run.log("signed", name=record["name"], reason=record["reason"])
    private = run.private / "report"
    write_json(private / "report.json", {**restricted, "signature": signature})
    write_page(private)
    run.remove(withheld)
    _into_place(run, new, run.path / "release")


def rebuild(run: Run) -> list[Path]:
    """Make both pages again from report.json and the images beside it; returns their paths.

    Raises:
        UsageError: the run has no report yet, or a file of the release was altered.
    """
    pages = []
    for name in ("private/report", "release/report", "withheld/report"):
        folder = run.path / name
        if not (folder / "report.json").is_file():
            continue
        _check_unaltered(folder.parent)
        write_page(folder)
        pages.append(folder / "report.html")
        if (folder.parent / SUMS).is_file():
            write_bytes(folder.parent / SUMS, sums(folder.parent).encode())
    if not pages:
        raise UsageError(f"run {run.path}: no report yet", f"Run `synthmed release {run.path}`.")
    return pages


def _check_unaltered(folder: Path) -> None:
    """Refuse to seal again what is not what was sealed, the page itself left aside."""
    if not (folder / SUMS).is_file():
        return

    def without_page(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.endswith("report/report.html")]

    if without_page(sums(folder)) != without_page((folder / SUMS).read_text(encoding="utf-8")):
        raise UsageError(
            f"{folder}: changed since it was built",
            f"Run `synthmed release {folder.parent}` to build it again.",
        )


def _fill(
    out: Path, material: _Material, decision: Decision, findings: Sequence[Finding]
) -> Report:
    """Everything that leaves, SHA256SUMS last; returns the content of its report.json."""
    config = material.config
    report = build(
        "shareable",
        config,
        decision,
        material.estimates,
        material.facts,
        findings=findings,
        n_searched=material.n_searched,
        images=[p.entry() for p in material.pictures],
        volumes=[v.entry() for v in material.volumes],
        names_model=material.with_volumes,
    )
    (out / "report").mkdir()
    write_report(out / "report", report, [*material.pictures, *material.volumes])
    if material.with_volumes:
        _fill_dataset(out, material, report)
    close(out)
    return report


def _fill_dataset(out: Path, material: _Material, report: Report) -> None:
    """The BIDS dataset and the cards that describe it."""
    config = material.config
    export(
        material.cohort,
        out,
        title=config.export.name,
        license=report["data"]["license"],
        conditions=config.data.conditions,
        naming=_naming(config),
        readme=card("README.md", report),
    )
    for name in ("MODEL_CARD.md", "DATASHEET.md"):
        write_bytes(out / name, card(name, report).encode())
    write_json(out / "croissant.json", croissant(report, out, config.data.conditions))


def _sign_folder(folder: Path, report: Report, signature: Mapping[str, str]) -> None:
    """Put the signature into the report and the README of a folder that is about to leave."""
    signed = {**report, "signature": dict(signature)}
    write_json(folder / "report/report.json", signed)
    write_page(folder / "report")
    if (folder / "README.md").exists():
        write_bytes(folder / "README.md", card("README.md", signed).encode())
    close(folder)


def _signed_content(shareable: Report, restricted: Report) -> str:
    """Digest of what a signature stands for: all that leaves, and all that it was decided by.

    How often it was decided is no part of it.
    """
    privacy = {k: v for k, v in (shareable["privacy"] or {}).items() if k != "attempts"}
    decided_by = {k: restricted[k] for k in ("estimates", "policy")}
    decided_by["digests"] = restricted["provenance"]["digests"]
    return digest([{**shareable, "signature": None, "privacy": privacy}, decided_by])


def _still_signed(
    run: Run, decision: Decision, shareable: Report, restricted: Report
) -> dict[str, str] | None:
    """The signature, if the very report that was signed has been made again."""
    file = run.private / "signed.json"
    if decision.decision != "REVIEW" or not file.is_file():
        return None
    record: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    if record.pop("report") != _signed_content(shareable, restricted):
        return None
    return record


def _naming(config: Config) -> Naming:
    given = [n for n, c in (config.data.channels or {}).items() if c.given]
    return Naming(config.data.modality, masks_of(config), given=given)


def _into_place(run: Run, new: Path, final: Path) -> None:
    new.rename(final)
    sync(final.parent)
    sync(run.path)
