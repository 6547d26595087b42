"""The copies test: which samples are nearer to one training patient than chance can explain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from synthmed.keys import Key
from synthmed.metrics.disguises import DISGUISES, disguised
from synthmed.metrics.sides import Cases
from synthmed.metrics.similarity import ImageSimilarity, Looked, Scores, Similarity
from synthmed.metrics.stats import Bools, Floats, Ints, benjamini_hochberg, exceedance_p, tail_p
from synthmed.types import Frozen

Names = npt.NDArray[np.str_]
Pairs = tuple[tuple[str, str], ...]

FEW = 5
"""A copy is near fewer patients than this: a person may be known under a second pseudonym."""
MOST_PLAYERS = 400
"""Of a side, who play a sample: more tell the tail little, and each costs as a sample does."""
STANDS_OUT = 3.0
"""Two names are one person's when their leads are more than so many times what is usual."""
FEWEST_PEOPLE = 12
"""Whose leads say what is usual."""
TOGETHER = 0.1
"""Of the rate: how often chance may put copies of many patients together beyond everybody."""
BY_CHANCE = 0.05
"""The largest share of the samples beyond everybody that chance may account for."""
IN_DISGUISE = 20
"""Training patients whose scans are copied in disguise, to say what the test sees of such."""


@dataclass(frozen=True)
class Matches:
    """Similarities of synthetic scans to the real ones.

    Args:
        to_train: (n_synthetic, n_train_scans).
        to_holdout: (n_synthetic, n_holdout_scans).
    """

    to_train: Floats
    to_holdout: Floats


class Compared(NamedTuple):
    """What a similarity said of scans and those of both sides, before a closer look."""

    to_train: Scores
    to_holdout: Scores

    @property
    def matches(self) -> Matches:
        """The scores alone."""
        return Matches(self.to_train.best, self.to_holdout.best)


class Match(Frozen):
    """The verdict on one sample.

    Args:
        copy_of: pseudonym of the training patient it copies, null when it is no copy.
        gap: best match in train minus best match in holdout (without a holdout: minus the best
            match among all other patients).
        p: chance of a gap this large for somebody who is not in train, by itself.
        nearest_patient: the training patient of the best match.
        nearest_scan: row of that scan in the training side.
        in_train: the best similarity in train.
        in_others: what it is compared with: the best in the holdout, or among other patients.
    """

    copy_of: str | None
    gap: float
    p: float
    nearest_patient: str
    nearest_scan: int
    in_train: float
    in_others: float


class Copies(Frozen):
    """The screening of a set of samples.

    Args:
        matches: one per sample, in the order of the samples.
        n_train: training patients.
        n_holdout: held-out patients, 0 when there are none.
        largest_null_gap: what a copy's gap has to pass; null when there was no null.
        power: share of training patients whose exact copy, alone in this cohort, would be flagged.
        false_discovery_rate: of samples that are rare each for itself. Where many are rare together
            it may be up to a twentieth.
        similarity: name of the similarity used; `image` where both its views were.
        disguised: share of copies in a disguise (`disguises.DISGUISES`) that would be found and
            given to their patient, each alone in this cohort; of `IN_DISGUISE` patients at most.
            Empty where that was not asked.
        under_two_names: pairs of patients who stand out as one person (`one_person`), of the
            players of both sides; null where that was not asked.
    """

    matches: tuple[Match, ...]
    n_train: int
    n_holdout: int
    largest_null_gap: float | None
    power: float
    false_discovery_rate: float
    similarity: str
    disguised: Mapping[str, float] = {}
    under_two_names: Pairs | None = None

    @property
    def flagged(self) -> tuple[int, ...]:
        """Which samples are copies."""
        return tuple(i for i, m in enumerate(self.matches) if m.copy_of is not None)

    @property
    def patients(self) -> tuple[str, ...]:
        """The distinct training patients that were copied, sorted."""
        return tuple(sorted({m.copy_of for m in self.matches if m.copy_of is not None}))


def match(train: Cases, holdout: Cases, synthetic: Cases, similarity: Similarity) -> Compared:
    """The similarities of every synthetic scan to every real one."""
    learned = similarity.features(train)
    fitted, held = similarity.fit(learned), similarity.features(holdout)
    made = similarity.features(synthetic)
    return Compared(fitted.compare(made, learned), fitted.compare(made, held))


class GapTest:
    """The gap test by one similarity, fitted to real patients once and asked about any samples.

    gap = best match in train - best match in holdout. Null: every real patient, of either side,
    plays a sample (one scan of theirs, drawn by key; at most `MOST_PLAYERS` a side), matched with
    the *other* patients of both sides, so that nobody meets themselves and set sizes differ by one
    at most. Who was learned from plays no part in how alike two real scans are, so those of train
    tell the tail as well as the few who were held out. A sample is a copy when its gap is larger
    than every null gap, and rare: its p-value, from a generalised Pareto tail of the null
    (`stats.tail_p`), passes Benjamini-Hochberg at the false discovery rate asked for, or samples
    beyond the whole null are rare together. Together they are when they show so many patients that
    chance would do so at a tenth of that rate at most (`stats.exceedance_p`), and when of as many
    honest samples at most a twentieth of their number would be there. (Sixty players cannot tell
    how rare one gap is; that samples of twenty patients have such gaps is rare whatever the tail.
    Patients are counted since samples of one model resemble one another. Where samples are more
    than players, as many as there are players are counted, evenly spaced.)

    It must also be near one person: its lead, best match minus that of the fifth best patient of
    train, must be larger than every null lead, rare in the same way among the samples that pass the
    gap test, and that fifth patient's own gap at most what it is in the null at most, or a tenth of
    the sample's. An average of many training patients is nearer to all of them than to strangers,
    and so has a large gap, but it is nobody's copy. A copy's lead is about its gap. This is a
    second condition, without a guarantee of its own: what chance may do is bounded by the gap.

    Without a holdout the gap is the best match minus the best match among all *other* patients
    than that one, and the null is every real patient against everybody else: a copy is near one
    person alone. It cannot see a model that copied two people who look alike, or one person known
    under two pseudonyms, and it says so by its power.

    Guarantee: when samples and real patients are exchangeable, the chance that anything at all is
    flagged among the samples of one question is about the false discovery rate or less.

    Args:
        train: every scan the model may have learned from.
        holdout: scans of held-out patients; may be empty.
        similarity: how alike two scans are.
        key: draws the scan of each patient that plays a sample.
    """

    def __init__(self, train: Cases, holdout: Cases, similarity: Similarity, key: Key) -> None:
        self._learned, self._held = (
            Looked(side, np.arange(len(side)), similarity.features(side))
            for side in (train, holdout)
        )
        self._by = similarity.fit(self._learned.features)
        self._of_train, self._of_holdout = train.patients, holdout.patients
        rng = key.numpy()
        mine = _players(train.patients, rng)
        players = [Looked(train, mine, self._learned.features[mine])]
        if len(holdout) > 0:
            held_out = _players(holdout.patients, rng)
            players.append(Looked(holdout, held_out, self._held.features[held_out]))
        met = [self._among_others(of) for of in players]
        others = Matches(
            np.concatenate([m.to_train for m in met]), np.concatenate([m.to_holdout for m in met])
        )
        self._bar = Bar(*self._gap_and_lead(others))
        # an exact copy of a scan is as similar as can be to it, and to others as the scan is
        copied = self._of_train[mine]
        exact = np.where(
            copied[:, None] == self._of_train[None, :], self._by.same, others.to_train[: len(mine)]
        )
        self._exact = self._gap_and_lead(Matches(exact, others.to_holdout[: len(mine)]))
        self._two_names = one_person(
            np.hstack([others.to_train, others.to_holdout]),
            np.concatenate([of.cases.patients[of.rows] for of in players]),
            np.concatenate([train.patients, holdout.patients]),
        )

    def match(self, synthetic: Cases, found: Compared | None = None) -> Matches:
        """The similarities of samples to every real scan, to the best few by a closer look.

        Args:
            synthetic: the samples.
            found: what the similarity says of them at first, where it is known already.
        """
        made = Looked(synthetic, np.arange(len(synthetic)), self._by.features(synthetic))
        return self._closer(made, self._compared(made) if found is None else found)

    def _among_others(self, players: Looked) -> Matches:
        """Real people matched with all but themselves."""
        names, met = players.cases.patients[players.rows], self._compared(players)
        to_train, to_holdout = (
            scores._replace(best=_without_self(scores.best, names, of))
            for scores, of in zip(met, (self._of_train, self._of_holdout), strict=True)
        )
        return self._closer(players, Compared(to_train, to_holdout))

    def _compared(self, of: Looked) -> Compared:
        return Compared(
            self._by.compare(of.features, self._learned.features),
            self._by.compare(of.features, self._held.features),
        )

    def _closer(self, of: Looked, found: Compared) -> Matches:
        """As many of either side, or the larger side would have the better matches."""
        return Matches(
            self._by.closer(found.to_train, of, self._learned),
            self._by.closer(found.to_holdout, of, self._held),
        )

    def find(self, synthetic: Cases, fdr: float, found: Matches | None = None) -> Copies:
        """Screen samples.

        Args:
            synthetic: the samples.
            fdr: false discovery rate, above 0 and below 1.
            found: what `match` gives for them, where it is known already.
        """
        if found is None:
            found = self.match(synthetic)
        screened = judge(
            found.to_train,
            self._gap_and_lead(found),
            self._bar,
            self._exact,
            self._of_train,
            self._of_holdout,
            fdr,
            self._by.name,
        )
        return screened.model_copy(update={"under_two_names": self._two_names})

    def sees(self, found: Matches, of: Names, n_samples: int, fdr: float) -> Bools:
        """(n,) which copies of these patients would be found, each alone among other samples."""
        right = self._of_train[np.argmax(found.to_train, axis=1)] == of
        return np.asarray(right & self._bar.alone(*self._gap_and_lead(found), n_samples, fdr))

    def _gap_and_lead(self, of: Matches) -> tuple[Floats, Floats]:
        if len(self._of_holdout) == 0:
            gap = lead = _lead(of.to_train, self._of_train, 2)
        else:
            gap = _best(of.to_train) - _best(of.to_holdout)
            lead = _lead(of.to_train, self._of_train, FEW)
        return gap, lead


def one_person(scores: Floats, players: Names, references: Names) -> Pairs | None:
    """Pairs of patients who stand out as one person scanned under two names; null if none can.

    Each is the other's best match, and what either has over its second best is more than
    `STANDS_OUT` times what anybody has else: over the second best, and of people in such pairs over
    the third. Two who merely look alike have third people nearly as close. One person under three
    names is not found, for the third name is the second best.

    Args:
        scores: (n_players, n_scans), -inf between scans of one name.
        players: who each row is; every name once. Fewer than `FEWEST_PEOPLE` do not say what is
            usual.
        references: who each column is of; names beside the players' are not looked at.
    """
    if len(players) < FEWEST_PEOPLE:
        return None
    people, each = _by_person(scores, references)
    each = each[:, np.searchsorted(people, players)]
    each = np.maximum(each, each.T)
    best = np.argmax(each, axis=1)
    third, second, first = np.sort(each, axis=1)[:, -3:].T
    lead = first - second
    pairs = [(i, int(j)) for i, j in enumerate(best) if best[j] == i and i < j]
    pairs.sort(key=lambda pair: -min(lead[list(pair)]))
    for n in range(len(pairs), 0, -1):
        usual = lead.copy()
        within = np.ravel(pairs[:n])
        usual[within] = (second - third)[within]
        if min(lead[list(pairs[n - 1])]) > STANDS_OUT * usual.max():
            return tuple((str(players[i]), str(players[j])) for i, j in pairs[:n])
    return ()


class ImageTest:
    """The gap test by both views of `ImageSimilarity`, each at half the rate.

    A sample is a copy when either says so. The verdict on it is that of the view of all voxels,
    unless the view of tissue alone has found it. `power` is that of the better view, which is a
    lower bound of what both see together. Patients under two names are those of the view of tissue.

    Guarantee: as of `GapTest`, by the union of two tests at half the false discovery rate.

    Some training scans are copied in disguise, to say in `Copies.disguised` what the test sees.

    Args:
        train: every scan the model may have learned from.
        holdout: scans of held-out patients; may be empty.
        channels: image channels.
        key: draws the scan of each patient that plays a sample.
        device: torch device that compares.
    """

    def __init__(
        self,
        train: Cases,
        holdout: Cases,
        channels: tuple[int, ...],
        key: Key,
        device: str = "cpu",
    ) -> None:
        self._whole, self._tissue = (
            GapTest(train, holdout, ImageSimilarity(channels, view, device), key)
            for view in (False, True)
        )
        self._train, self._key = train, key.fold("disguised")

    @cached_property
    def _in_disguise(self) -> tuple[Names, Mapping[str, tuple[Matches, Matches]]]:
        """Some training patients, and what either view says of their copies in each disguise."""
        _, first = np.unique(self._train.patients, return_index=True)
        rows = first[_spaced(len(first), IN_DISGUISE)]
        found = {}
        for name, how in DISGUISES.items():
            copies = disguised(self._train, rows, how, self._key.fold(name))
            found[name] = self._whole.match(copies), self._tissue.match(copies)
        return self._train.patients[rows], found

    def _seen(self, n_samples: int, fdr: float) -> Mapping[str, float]:
        of, found = self._in_disguise
        return {
            name: float(
                np.mean(
                    self._whole.sees(whole, of, n_samples, fdr / 2)
                    | self._tissue.sees(tissue, of, n_samples, fdr / 2)
                )
            )
            for name, (whole, tissue) in found.items()
        }

    def find(self, synthetic: Cases, fdr: float, found: Compared | None = None) -> Copies:
        """Screen samples.

        Args:
            synthetic: the samples.
            fdr: false discovery rate, above 0 and below 1.
            found: of `match` in the view of all voxels, where it is known already.
        """
        whole = self._whole.find(synthetic, fdr / 2, self._whole.match(synthetic, found))
        tissue = self._tissue.find(synthetic, fdr / 2)
        matches = tuple(
            b if a.copy_of is None and b.copy_of is not None else a
            for a, b in zip(whole.matches, tissue.matches, strict=True)
        )
        return whole.model_copy(
            update={
                "matches": matches,
                "power": max(whole.power, tissue.power),
                "false_discovery_rate": fdr,
                "disguised": self._seen(len(synthetic), fdr) if len(synthetic) else {},
                "under_two_names": tissue.under_two_names,
            }
        )


class Bar:
    """What real people who play samples reach, which a copy has to pass.

    Args:
        gap: of each; where one has no partner it is not finite.
        lead: of each.
    """

    def __init__(self, gap: Floats, lead: Floats) -> None:
        # gap - lead is the gap that the fifth best patient of train would have
        fifths = gap - lead
        self.gaps, self.leads, fifths = (v[np.isfinite(v)] for v in (gap, lead, fifths))
        self.gap = float(self.gaps.max()) if len(self.gaps) else math.inf
        self.lead = float(self.leads.max()) if len(self.leads) else math.inf
        self._fifth = float(fifths.max()) if len(fifths) else self.gap

    def p_gap(self, gap: Floats) -> Floats:
        """(n,) chance of a gap this large for somebody who is not in train."""
        return tail_p(gap, self.gaps) if len(self.gaps) else np.ones(len(gap))

    def p_lead(self, lead: Floats) -> Floats:
        """(n,) chance of a lead this large for a person."""
        return tail_p(lead, self.leads) if len(self.leads) else np.ones(len(lead))

    def passed(self, gap: Floats, lead: Floats) -> Bools:
        """(n,) whether gap and lead are larger than all others', and one person's alone."""
        of_few = gap - lead <= np.maximum(self._fifth, gap / 10)
        return np.asarray((gap > self.gap) & (lead > self.lead) & of_few)

    def alone(self, gap: Floats, lead: Floats, n_samples: int, fdr: float) -> Bools:
        """(n,) whether each would be found, alone among so many samples that copy nobody."""
        rare = (self.p_gap(gap) <= fdr / max(1, n_samples)) & (self.p_lead(lead) <= fdr)
        return np.asarray(self.passed(gap, lead) & rare & (n_samples > 0))


def judge(
    to_train: Floats,
    sample: tuple[Floats, Floats],
    bar: Bar,
    exact: tuple[Floats, Floats],
    train_patients: Names,
    holdout_patients: Names,
    fdr: float,
    name: str,
) -> Copies:
    """Verdicts from gaps and leads alone; p is that of the gap.

    Args:
        to_train: (n_samples, n_train_scans) similarities.
        sample: (n_samples,) gap and lead of each sample.
        bar: what real people reach.
        exact: gap and lead that exact copies of training scans would have.
        train_patients: the patient of each training scan.
        holdout_patients: the patient of each held-out scan.
        fdr: false discovery rate.
        name: of the similarity.
    """
    n_samples = len(to_train)
    gap, lead = sample
    p = bar.p_gap(gap)
    nearest = np.argmax(to_train, axis=1) if n_samples else np.zeros(0, dtype=np.int64)
    of = train_patients[nearest]
    near = (gap > bar.gap) & _rare(gap, of, p, bar.gaps, fdr)
    copies = near & bar.passed(gap, lead)
    # among those alone that are near train, who may all be near many
    copies[near] &= _rare(lead[near], of[near], bar.p_lead(lead[near]), bar.leads, fdr)
    power = float(np.mean(bar.alone(*exact, n_samples, fdr))) if len(exact[0]) else 0.0
    matches = []
    for i, scan in enumerate(nearest):
        patient = str(of[i])
        best = float(to_train[i, scan])
        matches.append(
            Match(
                copy_of=patient if copies[i] else None,
                gap=float(gap[i]),
                p=float(p[i]),
                nearest_patient=patient,
                nearest_scan=int(scan),
                in_train=best,
                in_others=best - float(gap[i]),
            )
        )
    return Copies(
        matches=tuple(matches),
        n_train=len(set(train_patients)),
        n_holdout=len(set(holdout_patients)),
        largest_null_gap=bar.gap if math.isfinite(bar.gap) else None,
        power=power,
        false_discovery_rate=fdr,
        similarity=name,
    )


def _rare(values: Floats, of: Names, p: Floats, null: Floats, fdr: float) -> Bools:
    """(n,) which samples are rarer than chance explains, each for itself or many people's."""
    n = len(null)
    beyond = values > null.max(initial=-math.inf)
    # samples without end would show everybody sooner or later
    rows = _spaced(len(values), n)
    shown = of[rows[beyond[rows]]]
    rare = exceedance_p(len(np.unique(shown)), len(rows), n) <= TOGETHER * fdr
    if rare and len(rows) / (n + 1) <= BY_CHANCE * len(shown):
        return np.asarray(beyond)
    return benjamini_hochberg(p, fdr)


def _spaced(n: int, most: int) -> Ints:
    """Which of n to look at, evenly spaced from the first to the last: all, or `most` of them."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64)


def _players(patients: Names, rng: np.random.Generator) -> Ints:
    """A random scan of every patient, at most `MOST_PLAYERS`, in the order of scans."""
    # the first of each patient in a random order of scans
    order = rng.permutation(len(patients))
    _, first = np.unique(patients[order], return_index=True)
    return np.sort(rng.permutation(order[first])[:MOST_PLAYERS])


def _without_self(scores: Floats, queries: Names, references: Names) -> Floats:
    """Scores with -inf between scans of one person."""
    return np.where(queries[:, None] == references[None, :], -np.inf, scores)


def _best(scores: Floats) -> Floats:
    """The best score of each row; -inf where there is nobody to match."""
    return scores.max(axis=1) if scores.shape[1] else np.full(len(scores), -np.inf)


def _lead(scores: Floats, references: Names, rank: int) -> Floats:
    """(n,) best score of each row minus that of the `rank`-th best patient (the last of fewer)."""
    people, each = _by_person(scores, references)
    if len(people) < 2:
        return np.full(len(scores), np.nan)
    ordered = np.sort(each, axis=1)[:, ::-1]
    # somebody's own scans are -inf and come last: they are not among the ranked
    last = np.minimum(rank, np.isfinite(ordered).sum(axis=1)) - 1
    return np.asarray(ordered[:, 0] - ordered[np.arange(len(scores)), last])


def _by_person(scores: Floats, references: Names) -> tuple[Names, Floats]:
    """The people of the columns, sorted, and each row's best score of each, (n, n_people)."""
    order = np.argsort(references, kind="stable")
    people, first = np.unique(references[order], return_index=True)
    if not len(people):
        return people, np.zeros((len(scores), 0))
    return people, np.maximum.reduceat(scores[:, order], first, axis=1)
