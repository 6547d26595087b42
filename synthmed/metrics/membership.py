"""membership_auc, membership_tpr_at_fpr10: can one tell who was in the training set."""

from __future__ import annotations

from typing import Literal

import numpy as np

from synthmed.keys import Key
from synthmed.metrics.base import Base
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.stats import (
    Floats,
    auc,
    auc_interval,
    auc_permutation_p,
    clopper_pearson,
)
from synthmed.metrics.subgroups import subgroups, too_small
from synthmed.types import Estimate

FALSE_POSITIVES = 0.1
CONTROL_SPLITS = 200


class Membership(Base):
    """A membership attack by each patient's best match in the synthetic cohort; lower is better.

    The score of a patient is the best image similarity of any of their scans to any sample. Real
    train are the members, the holdout the non-members, split at random, so that scores are
    exchangeable when the cohort says nothing of membership.

    - `membership_auc`: P(a member scores higher than a non-member), with a bootstrap interval by
      patient; the note gives a permutation p by patient and the members-only control, which is
      the AUC between random halves of train and should be 0.5. Floor 0.5; ceiling 1 (the training
      set itself as samples). Again for each label among its own people (`subgroups`), against the
      whole cohort: what is rare is learned by heart first.
    - `membership_tpr_at_fpr10`: share of members above the score that at most 10 % of non-members
      exceed, with Clopper-Pearson. Floor 0.1; ceiling 1.

    Source: Yeom et al. 2018; Carlini et al. 2022 (report the low false-positive end as well).
    """

    name: Literal["membership"] = "membership"

    def estimate(self, sides: Sides, shared: Shared) -> list[Estimate]:
        """Both estimates; null without two held-out patients."""
        n_train, n_holdout = len(set(sides.train.patients)), len(set(sides.holdout.patients))
        if n_holdout < 2 or n_train < 4 or len(sides.synthetic) == 0:
            return [
                self._one(name, None, None, None, n_train, floor, sides, "too few patients", None)
                for name, floor in (("membership_auc", 0.5), ("membership_tpr_at_fpr10", 0.1))
            ]
        found = shared.matches()
        members = patient_scores(found.to_train, sides.train.patients)
        others = patient_scores(found.to_holdout, sides.holdout.patients)
        key = sides.key.fold("membership")
        value, ci, p = self._auc(members, others, sides, key)
        rng = key.fold("control").numpy()
        control = np.empty(CONTROL_SPLITS)
        for i in range(CONTROL_SPLITS):
            order = rng.permutation(members)
            control[i] = auc(order[: n_train // 2], order[n_train // 2 :])
        control_low, control_high = np.quantile(control, [0.025, 0.975])
        # the smallest threshold that at most a tenth of the non-members exceed
        allowed = int(FALSE_POSITIVES * n_holdout)
        threshold = np.sort(others)[n_holdout - allowed - 1]
        true = int(np.sum(members > threshold))
        out = [
            self._one(
                "membership_auc",
                None,
                value,
                ci,
                n_train,
                0.5,
                sides,
                f"permutation p = {p:.3g}; members-only control {control_low:.2f} to "
                f"{control_high:.2f}",
                n_holdout,
            ),
            self._one(
                "membership_tpr_at_fpr10",
                None,
                true / n_train,
                clopper_pearson(true, n_train),
                n_train,
                FALSE_POSITIVES,
                sides,
                f"the error of the threshold ({n_holdout} patients) is not in the interval",
                n_holdout,
            ),
        ]
        for name, people in subgroups(sides).items():
            if not too_small({side: people[side] for side in ("train", "holdout")}):
                some = _among(members, sides.train, people["train"])
                rest = _among(others, sides.holdout, people["holdout"])
                value, ci, p = self._auc(some, rest, sides, key.fold("subgroup", name))
                note = f"permutation p = {p:.3g}; against the whole cohort"
                out.append(
                    self._one(
                        "membership_auc", name, value, ci, len(some), 0.5, sides, note, len(rest)
                    )
                )
        return out

    @staticmethod
    def _auc(
        members: Floats, others: Floats, sides: Sides, key: Key
    ) -> tuple[float, tuple[float, float], float]:
        """The AUC, its interval, and a permutation p."""
        return (
            auc(members, others),
            auc_interval(members, others, sides.resamples, key.fold("ci").numpy()),
            auc_permutation_p(members, others, sides.resamples, key.fold("p").numpy()),
        )

    @staticmethod
    def _one(
        name: str,
        subgroup: str | None,
        value: float | None,
        ci: tuple[float, float] | None,
        n: int,
        floor: float,
        sides: Sides,
        note: str,
        n_holdout: int | None,
    ) -> Estimate:
        what = "Best image similarity of each patient to the cohort, training against held-out"
        how = (
            f"{what}; ceiling: the training set as samples; bootstrap interval by patient."
            if name == "membership_auc"
            else f"{what}: share of members above all but 10 % of the others; Clopper-Pearson."
        )
        return Estimate(
            name=name,
            group="membership",
            slice=subgroup,
            value=value,
            ci=ci,
            n=n,
            better="lower",
            floor=floor,
            ceiling=1.0,
            method=how,
            seed=sides.seed,
            note=note,
            n_holdout=n_holdout,
        )


def patient_scores(
    scores: Floats, patients: np.ndarray[tuple[int, ...], np.dtype[np.str_]]
) -> Floats:
    """(n_patients,) best of each patient's scans over all samples, from (n_samples, n_scans)."""
    best = scores.max(axis=0)
    return np.array([best[patients == p].max() for p in sorted(set(patients))])


def _among(scores: Floats, cases: Cases, people: frozenset[str]) -> Floats:
    """The scores of some patients, from those of all in the order of their names."""
    return scores[[p in people for p in sorted(set(cases.patients))]]
