"""The lines that every decision has beside those of its policy, which no config can take away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from synthmed.artifacts import ScreenedCohort
from synthmed.config import Config
from synthmed.deid.scan import Finding
from synthmed.metrics.copies import FEWEST_PEOPLE, MOST_PLAYERS
from synthmed.origin import KNEW_HELD_OUT
from synthmed.report.facts import CohortFacts
from synthmed.types import COPIES_THAT_SHIP, Verdict

FLAGGED = "flagged samples"
"""The line on what the screen found."""
START = "weights to start from"
"""The line on what those of `train.init` knew."""
Status = Literal["pass", "inconclusive", "fail"]
RESOLVED = 0.05
"""Share of copies among samples that enough of them always rule out."""


def of_cohort(
    config: Config, cohort: ScreenedCohort, facts: CohortFacts, judged: Sequence[Verdict]
) -> list[Verdict]:
    """What the screen found, and that the policy asked about copies at all.

    Args:
        config: the run's; `screen.max_dropped` is the limit of the screen.
        cohort: what ships, with the outcome for every sample.
        facts: of the run.
        judged: the policy's own lines.
    """
    return [
        *_asked_about_copies(judged),
        *_flagged(config, cohort, facts),
        *_start(facts),
        _under_two_names(cohort),
    ]


def enough_samples(config: Config) -> int:
    """Fewest samples of which none copies anybody that bound how often the model does.

    The exact upper bound of 0 of n, 1 - 0.025^(1/n), is `screen.max_dropped` or less: 72 at 5 %.
    A limit below `RESOLVED` is asked of the samples that there are, and the bound is that of
    `RESOLVED`: no number of samples shows that a model never copies.
    """
    limit = min(max(config.screen.max_dropped, RESOLVED), 0.99)  # which a single one bounds
    return math.ceil(math.log(0.025) / math.log1p(-limit))


def _asked_about_copies(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """A policy that does not ask about copies cannot pass: a person has to look."""
    about = {"copies", "copied_patients", "copies_shipped"}
    if any(v.estimate in about and v.slice is None for v in verdicts):  # of everybody
        return []
    rule = "every policy must ask about copies"
    return [_line("copied_patients", rule, "inconclusive", "the policy has no line about copies")]


def _flagged(config: Config, cohort: ScreenedCohort, facts: CohortFacts) -> list[Verdict]:
    """What the screen found: past its limit the model is rejected, and no copy may ship."""
    n = len(cohort.screened) or facts.n_synthetic
    limit = config.screen.max_dropped
    flagged = {s.index for s in cohort.screened if s.flagged}
    again = {s.index for s in cohort.replaced or () if s.flagged}
    shipped = len((flagged | again) & {s.index for s in cohort.samples})
    found = f"{len(flagged)} of {n} samples copy a patient"
    within = f"{found}, within the limit of {limit:.3g}"
    status: Status
    if len(flagged) > limit * n:
        status = "fail"
        said = f"{found}, above the limit of {limit:.3g}: the model copies too much"
    elif n < enough_samples(config):
        status = "inconclusive"
        said = (
            f"{within}, but fewer than {enough_samples(config)} samples are too few to tell it "
            "from a model that copies more often"
        )
    else:
        status, said = "pass", within
    lines = [_line(FLAGGED, f"at most {limit:.3g} of what was sampled", status, said)]
    if shipped or cohort.replaced is None:
        said = (
            f"{shipped}; the screen did not drop them"
            if shipped
            else "an earlier version did not screen what replaced those it dropped; "
            "run screen again"
        )
        status = "fail" if shipped else "inconclusive"
        lines.append(_line(COPIES_THAT_SHIP, "none", status, said))
    return lines


def _start(facts: CohortFacts) -> list[Verdict]:
    """Weights that knew the held-out people blind every comparison with them.

    None with privacy: there the weights have to be declared to be public, and a line on who knew
    whom would be an answer about the patients.
    """
    if facts.init is None or facts.privacy is not None:
        return []
    knew = facts.init.get("knew_held_out")
    status: Status = "pass" if knew is False else "inconclusive"
    return [_line(START, "trained on nobody who is held out", status, KNEW_HELD_OUT[knew])]


def _under_two_names(cohort: ScreenedCohort) -> Verdict:
    """One person under two names is on both sides of a comparison: a person has to look."""
    pairs = cohort.under_two_names
    if pairs is None:
        said = f"was not asked: of fewer than {FEWEST_PEOPLE} people, or by an earlier version"
    elif pairs:
        said = (
            "some may be one person, whom the split and the copies test take for two; the "
            "restricted report names them"
        )
    else:
        said = "none stands out"
    rule = f"none, of up to {MOST_PLAYERS} people a side"
    status: Status = "pass" if pairs is not None and not pairs else "inconclusive"
    return _line("patients under two names", rule, status, said)


def of_audit(failed: bool) -> list[Verdict]:
    """A line where the run's own audit found that a promise of privacy is not kept."""
    if not failed:
        return []
    said = "failed; synthmed audit says what does not fit"
    return [_line("audit of the promise", "no audit of this model has failed", "fail", said)]


@dataclass(frozen=True)
class Elsewhere:
    """What was seen of the files of a cohort that was made elsewhere.

    Args:
        not_judged: real and synthetic scans that were refused.
        n_naming_people: synthetic files that hold a name, or a number, of a person of the source.
        n_naming_files: that hold a name of its files.
        complete: whether all names of the source could be searched for.
        not_shown: whether a column of both sides, which no config declares, tells real people
            apart who are not judged apart.
    """

    not_judged: int
    n_naming_people: int
    n_naming_files: int
    complete: bool
    not_shown: bool = False


def of_elsewhere(seen: Elsewhere | None) -> list[Verdict]:
    """The lines on files that this program has not written.

    Scans that were refused: nobody knows what is in them; a category that is not shown: a subgroup
    that nobody would ask about. Names: of people they may not leave;
    those of files may be what everybody calls such files.
    """
    if seen is None:
        return []
    status: Status
    if seen.n_naming_people:
        status, said = "fail", f"{seen.n_naming_people} hold a name or a number of a patient"
    elif seen.n_naming_files:
        status, said = "inconclusive", f"{seen.n_naming_files} hold a name of a real file"
    elif not seen.complete:
        status, said = "inconclusive", "not all names of the source could be searched for"
    else:
        status, said = "pass", "nothing found in paths, tables, text and headers"
    if status != "pass" and seen.complete:
        said += "; naming.tsv under private/ lists the files"
    lines = [_line("names in the synthetic files", "none of the source's", status, said)]
    if seen.not_judged:
        said = (
            "some files of the folders were refused, so that copies may be among them, or "
            "patients they are of; quarantine.tsv under private/ names them"
        )
        lines.append(_line("scans that were not judged", "none", "inconclusive", said))
    if seen.not_shown:
        # which ones is theirs alone
        said = (
            "a column of both tables tells real people apart, and no synthetic scan says so (in "
            "that spelling), so that no subgroup speaks of them; a config that declares the "
            "column judges it"
        )
        lines.append(_line("categories that are not shown", "none", "inconclusive", said))
    return lines


def of_scan(findings: Sequence[Finding], complete: bool) -> Verdict:
    """The line on the identifier scan; kinds and counts, never what was found.

    Args:
        findings: of the scan.
        complete: whether all names of the source could be searched for.
    """
    kinds = sorted({f.kind for f in findings})
    status: Status
    if findings:
        status = "fail"
        said = (
            f"{len(findings)} findings ({', '.join(kinds)}); the restricted report lists the files"
        )
    elif complete:
        status, said = "pass", "nothing found in any file"
    else:
        status = "inconclusive"
        said = (
            "nothing found, but data.source is not at hand (gone, or a PACS), so that not all of "
            "its names were searched for"
        )
    return _line("identifier scan", "nothing found in any file", status, said)


def _line(name: str, rule: str, status: Status, said: str) -> Verdict:
    """A line that is not a rule's: of the whole cohort, its reason begins with its name."""
    return Verdict(estimate=name, slice=None, rule=rule, status=status, reason=f"{name}: {said}.")
