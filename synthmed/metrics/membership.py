"""membership_auc, membership_tpr_at_fpr10: can one tell who was in the training set."""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthmed.metrics.attacks import Attack, by_scores, descriptor_scores, ratio
from synthmed.metrics.base import Base
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.stats import Floats, clopper_pearson, random_halves, wins
from synthmed.metrics.subgroups import subgroups, too_small
from synthmed.types import Estimate

FALSE_POSITIVES = 0.1
CONTROL_SPLITS = 200
CONTROL = "control=members only"
DENSITY, DESCRIPTOR = "attack=density ratio", "attack=descriptor"
METHODS = {
    CONTROL: "Best image similarity of each patient to the cohort, one random half of the training "
    "patients against the other, {middle} on average whatever the attack: mean and central 95 % of "
    f"{CONTROL_SPLITS} halves; ceiling: as of the attack.",
    DENSITY: "Ratio of the cohort's density to that of held-out patients at each patient, in "
    "principal components of small images; training against held-out, neither of a pair in the "
    "reference; ceiling: the training set as samples",
    DESCRIPTOR: "Distance of each patient's descriptor to the nearest sample, training against "
    "held-out; ceiling: the training set as samples",
}
"""Slice of an estimate to what was done."""


class Membership(Base):
    """Membership attacks, the first by each patient's best match in the cohort; lower is better.

    The score of a patient is the best image similarity of any of their scans to any sample. Real
    train are the members, the holdout the non-members, split at random, so that scores are
    exchangeable when the cohort says nothing of membership.

    - `membership_auc`: P(a member scores higher than a non-member), with a bootstrap interval by
      patient; the note gives a permutation p by patient and the members-only control, the central
      95 % of AUCs between random halves of train. Floor 0.5; ceiling 1 (the training set itself as
      samples). Again for each label among its own people (`subgroups`), against the whole cohort:
      what is rare is learned by heart first.
    - `membership_tpr_at_fpr10`: share of members above the score that at most 10 % of non-members
      exceed, with Clopper-Pearson. Floor: the share expected where nothing leaks (`by_chance`), a
      tenth and a little more; ceiling 1.

    Both again for two more attacks, whose ceilings are computed:

    - slice `attack=density ratio`: where has the cohort more mass than the population
      (`attacks.ratio`). It sees what was learned by heart where people are few, which a plain
      density hides behind how common a patient is.
    - slice `attack=descriptor`: the nearest sample by descriptor (`attacks.descriptor_scores`). It
      sees texture and contrast that was kept where the anatomy was not.

    Both, slice `control=members only`: the members-only control as a figure, the mean over random
    halves with their central 95 %. Its spread says how far from its floor a figure between so few
    people strays where nothing leaks. Its mean says nothing: two random halves of one group are
    exchangeable, so that it is the floor whatever is wrong with the attack or with the split.

    Source: Yeom et al. 2018; Carlini et al. 2022 (report the low false-positive end as well); van
    Breugel et al. 2023 (density ratio).
    """

    name: Literal["membership"] = "membership"

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """All attacks, subgroups and the control; null without two held-out patients."""
        n_train, n_holdout = len(set(sides.train.patients)), len(set(sides.holdout.patients))
        if n_holdout < 2 or n_train < 4 or len(sides.synthetic) == 0:
            why = "too few patients"
            return [
                *self._nothing(None, n_train, sides, why),
                *self._nothing(DENSITY, n_train, sides, why),
                *self._nothing(DESCRIPTOR, n_train, sides, why),
            ]
        found = shared.matches()
        members = patient_scores(found.to_train, sides.train.patients)
        others = patient_scores(found.to_holdout, sides.holdout.patients)
        key = sides.key.fold("membership")
        whole = by_scores(members, others, sides.resamples, key)
        control = _of_halves(members, key.fold("control").numpy())  # AUC, true-positive rate
        (auc_low, tpr_low), (auc_high, tpr_high) = np.quantile(control, [0.025, 0.975], axis=0)
        true = named(whole.wins)
        out = [
            self._one(
                "membership_auc",
                None,
                whole.auc,
                whole.ci,
                n_train,
                0.5,
                sides,
                f"permutation p = {whole.p:.3g}; members-only control {auc_low:.2f} to "
                f"{auc_high:.2f}",
                n_holdout,
            ),
            self._one(
                "membership_tpr_at_fpr10",
                None,
                true / n_train,
                clopper_pearson(true, n_train),
                n_train,
                by_chance(n_holdout),
                sides,
                f"the error of the threshold ({n_holdout} patients) is not in the interval; "
                f"members-only control {tpr_low:.2f} to {tpr_high:.2f}",
                n_holdout,
            ),
        ]
        for name, people in subgroups(sides).items():
            if not too_small({side: people[side] for side in ("train", "holdout")}):
                some = _among(members, sides.train, people["train"])
                rest = _among(others, sides.holdout, people["holdout"])
                own = by_scores(some, rest, sides.resamples, key.fold("subgroup", name))
                note = f"permutation p = {own.p:.3g}; against the whole cohort"
                n, m = own.wins.shape
                out.append(
                    self._one("membership_auc", name, own.auc, own.ci, n, 0.5, sides, note, m)
                )
        area, share = (float(mean) for mean in control.mean(axis=0))
        out += [
            self._one(
                "membership_auc",
                CONTROL,
                area,
                (float(auc_low), float(auc_high)),
                n_train,
                0.5,
                sides,
                "",
                None,
            ),
            self._one(
                "membership_tpr_at_fpr10",
                CONTROL,
                share,
                (float(tpr_low), float(tpr_high)),
                n_train,
                by_chance(n_train - n_train // 2),
                sides,
                "",
                None,
            ),
        ]
        return out + self._attacks(sides, shared)

    def _attacks(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """The figures of the attacks by density and by descriptor."""
        key, times = sides.key.fold("membership", "attacks"), sides.resamples
        near = by_scores(*descriptor_scores(shared, "synthetic"), times, key.fold("descriptor"))
        copies = wins(*descriptor_scores(shared, "train"))
        out = self._both(DESCRIPTOR, near, copies, sides)
        density, stored = ratio(shared, "synthetic"), ratio(shared, "train")
        if density is None or stored is None:
            n = len(shared.patients("train"))
            return out + self._nothing(DENSITY, n, sides, "all scans of a side are alike")
        found = density.attack(times, key.fold("density"))
        return out + self._both(DENSITY, found, stored.wins(), sides)

    def _both(self, where: str, found: Attack, copies: Floats, sides: Sides) -> list[Estimate]:
        """AUC and true-positive rate of an attack; `copies`: its wins over a cohort of copies."""
        n, m = found.wins.shape
        true, stored = named(found.wins), named(copies)
        worst = float(copies.mean())
        told = f"permutation p = {found.p:.3g}"
        name, floor = "membership_auc", 0.5
        area = self._one(name, where, found.auc, found.ci, n, floor, sides, told, m, worst)
        told = f"the error of the threshold ({m} patients) is not in the interval"
        span = clopper_pearson(true, n)
        name, floor = "membership_tpr_at_fpr10", by_chance(m)
        share = self._one(name, where, true / n, span, n, floor, sides, told, m, stored / n)
        return [area, share]

    def _nothing(self, where: str | None, n: int, sides: Sides, why: str) -> list[Estimate]:
        """Both estimates of an attack that could not be made."""
        return [
            self._one(name, where, None, None, n, floor, sides, why, None)
            for name, floor in (("membership_auc", 0.5), ("membership_tpr_at_fpr10", None))
        ]

    @staticmethod
    def _one(
        name: str,
        subgroup: str | None,
        value: float | None,
        ci: tuple[float, float] | None,
        n: int,
        floor: float | None,
        sides: Sides,
        note: str,
        n_holdout: int | None,
        ceiling: float = 1.0,
    ) -> Estimate:
        what = "Best image similarity of each patient to the cohort, training against held-out"
        what = METHODS.get(subgroup or "", what)
        worst = "" if "ceiling" in what else "; ceiling: the training set as samples"
        how = (
            f"{what}{worst}; bootstrap interval by patient."
            if name == "membership_auc"
            else f"{what}: share of members above all but 10 % of the others; floor: (k + 1) / "
            "(m + 1) of m others, k a tenth of them rounded down; Clopper-Pearson."
        )
        if subgroup == CONTROL:
            how = what.format(middle="0.5" if name == "membership_auc" else "its floor")
        return Estimate(
            name=name,
            group="membership",
            slice=subgroup,
            value=value,
            ci=ci,
            n=n,
            better="lower",
            floor=floor,
            ceiling=ceiling,
            method=how,
            seed=sides.seed,
            note=note,
            n_holdout=n_holdout,
        )


def _of_halves(members: Floats, rng: np.random.Generator) -> Floats:
    """(CONTROL_SPLITS, 2) AUC and true-positive rate between random halves of the members."""
    each = (wins(*pair) for pair in random_halves(members, CONTROL_SPLITS, rng))
    return np.array([(won.mean(), named(won) / len(won)) for won in each])


def named(won: Floats) -> int:
    """Members above the smallest threshold that at most a tenth of the non-members exceed.

    From (n_members, n_others) wins: those who outscore all but a tenth of the non-members.
    """
    n_others = won.shape[1]
    return int(np.sum(np.sum(won == 1, axis=1) >= n_others - _may_exceed(n_others)))


def by_chance(n_others: int) -> float:
    """The share of members that `named` names where nothing leaks: (k + 1) / (m + 1).

    m are the non-members, k = floor(m / 10) those who may exceed the threshold. A member is named
    that ranks among the first k + 1 of itself and the m others, each rank being as likely as any.
    Exact for scores without ties; the wins of `Ratio` come from no ranking, and it is near.

    >>> [round(by_chance(m), 3) for m in (9, 24, 500)]
    [0.1, 0.12, 0.102]
    """
    return (_may_exceed(n_others) + 1) / (n_others + 1)


def _may_exceed(n_others: int) -> int:
    return int(FALSE_POSITIVES * n_others)


def patient_scores(
    scores: Floats, patients: np.ndarray[tuple[int, ...], np.dtype[np.str_]]
) -> Floats:
    """(n_patients,) best of each patient's scans over all samples, from (n_samples, n_scans)."""
    best = scores.max(axis=0)
    return np.array([best[patients == p].max() for p in sorted(set(patients))])


def _among(scores: Floats, cases: Cases, people: frozenset[str]) -> Floats:
    """The scores of some patients, from those of all in the order of their names."""
    return scores[[p in people for p in sorted(set(cases.patients))]]
