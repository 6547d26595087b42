"""White-box membership attacks: what the weights of a run tell of who was trained on.

Whoever holds the weights can ask more of them than whoever holds the cohort: how well they denoise
a scan, reconstruct it, or tell it from synthetic ones. Each backbone says how
(`Generative.membership_scores`). A patient's score is the mean over all scans, under the scan's own
labels and with the same draws for everybody. Training patients are the members, held-out ones the
others, split at random, so that scores are exchangeable where the weights remember nobody.

No bound on epsilon is drawn from these rates. A bound from true and false positives counts
independent trials, and the patients of one training are not: they moved the same weights (Steinke,
Nasr and Jagielski 2023, arXiv:2305.08846, on what one training can show).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from safetensors.torch import load_file

from synthmed.artifacts import Dataset
from synthmed.backbones.examining import CHUNK, scans
from synthmed.backbones.generative import Generative
from synthmed.config import Config
from synthmed.keys import Key
from synthmed.loader import Loader, Side
from synthmed.metrics.attacks import by_scores
from synthmed.metrics.membership import CONTROL_SPLITS, by_chance, named
from synthmed.metrics.stats import Floats, auc, clopper_pearson, random_halves
from synthmed.origin import WEIGHTS
from synthmed.progress import Progress
from synthmed.stages import train
from synthmed.store import Artifact
from synthmed.training import load_state
from synthmed.types import Estimate

NAMES = ("whitebox_auc", "whitebox_tpr_at_fpr10")

MIN_TRAIN, MIN_HOLDOUT = 4, 2
"""Patients of either side below which nothing is computed."""

Scores = Mapping[str, Floats]
"""By attack, one number a patient of a side, in the order of their names."""


def attack(
    config: Config,
    model: Artifact,
    loader: Loader,
    device: str,
    key: Key,
    seed: int,
    progress: Progress,
) -> list[Estimate]:
    """Attack the trained model of a run by its own patients.

    Args:
        config: of the run.
        model: its trained model: the weights that samples are drawn with.
        loader: its cohort.
        device: where the model is run.
        key: of all randomness.
        seed: what the key was made of.
        progress: counts batches of scans.

    Returns:
        Both estimates for each attack; null, once each, where a side has too few patients.
    """
    data = loader.dataset
    n_train, n_holdout = len(data.train_patients()), len(data.holdout_patients())
    if n_train < MIN_TRAIN or n_holdout < MIN_HOLDOUT:
        why = (
            f"{n_train} training and {n_holdout} held-out patients; "
            f"at least {MIN_TRAIN} and {MIN_HOLDOUT} are needed"
        )
        return [_empty(name, None, n_train, n_holdout, seed, why) for name in NAMES]
    facts = model.manifest.facts
    size = max(2, min(CHUNK, loader.batch_patients // facts["pieces"]))
    with train.arithmetic(device, amp=False):
        trained = load(config, model, loader, device)
        members, others = both_sides(trained, loader, device, size, key.fold("draws"), progress)
    progress.done(f"{n_train} training and {n_holdout} held-out patients under the weights")
    note = "it started from other weights, which may have seen either side" if facts["init"] else ""
    resamples = config.evaluate.resamples
    return estimates(members, others, key.fold("statistics"), resamples, seed, note)


def load(config: Config, model: Artifact, loader: Loader, device: str) -> Generative:
    """The trained model as it is sampled: averaged weights, adapters added in."""
    built = train.build(config, loader, Key.root(0), device)  # all that it draws is replaced
    load_state(built, load_file(model.path / WEIGHTS))
    for module in built.modules.values():
        module.eval()
    return built


def both_sides(
    model: Generative, loader: Loader, device: str, size: int, key: Key, progress: Progress
) -> tuple[Scores, Scores]:
    """The scores of training and of held-out patients.

    Args:
        model: on `device`.
        loader: the cohort.
        device: where the model is.
        size: scans that go through the model at once; the last batch is filled up with scans of its
            own, so that no patient's score depends on how many others there are.
        key: of the draws, which are the same for every scan.
        progress: counts batches.
    """
    data = loader.dataset
    sides: tuple[Side, Side] = ("train", "holdout")
    rows = [np.flatnonzero(data.holdout == (side == "holdout")) for side in sides]
    total = sum(-(-len(r) // size) for r in rows)
    done, found = 0, []
    for mine in rows:
        parts = []
        for part in _batches(mine, size):
            x, c, given = scans(loader.read(np.resize(part, size).tolist(), device))
            scored = model.membership_scores(x, c, given, key)
            parts.append({k: v[: len(part)].cpu().numpy() for k, v in scored.items()})
            done += 1
            progress.update(done, total)
        each = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        found.append(_by_patient(each, data, mine))
    return found[0], found[1]


def estimates(
    members: Scores, others: Scores, key: Key, resamples: int, seed: int, note: str = ""
) -> list[Estimate]:
    """Both estimates for each attack, from the scores of every patient.

    - `whitebox_auc`: P(a training patient scores higher than a held-out one), with a bootstrap
      interval by patient; the note gives a permutation p by patient and the members-only control,
      the central 95 % of AUCs between random halves of the training patients: how far from 0.5 one
      strays with so few people where nothing leaks.
    - `whitebox_tpr_at_fpr10`: share of training patients above the score that at most 10 % of the
      held-out ones exceed, with Clopper-Pearson; its floor is `by_chance`.

    Args:
        members: of training patients.
        others: of held-out ones.
        key: of the resampling.
        resamples: of interval and p.
        seed: what the key was made of.
        note: is put behind the estimates' own.

    Source: Yeom et al. 2018; Carlini et al. 2022 (report the low false-positive end as well).
    """
    out = []
    for name, a in members.items():
        b, k = others[name], key.fold(name)
        n, m = len(a), len(b)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            why = "some scores are no numbers: the training has diverged"
            out += [_empty(e, name, n, m, seed, why) for e in NAMES]
            continue
        found = by_scores(a, b, resamples, k)
        halves = random_halves(a, CONTROL_SPLITS, k.fold("control").numpy())
        control = np.array([auc(*pair) for pair in halves])
        low, high = np.quantile(control, [0.025, 0.975])
        true = named(found.wins)
        said = (
            f"permutation p = {found.p:.3g}; members-only control {low:.2f} to {high:.2f}",
            f"the error of the threshold ({m} patients) is not in the interval",
        )
        values = (found.auc, true / n)
        intervals = (found.ci, clopper_pearson(true, n))
        floors = (0.5, by_chance(m))
        for which, value, ci, floor, words in zip(
            NAMES, values, intervals, floors, said, strict=True
        ):
            empty = _empty(which, name, n, m, seed, "; ".join(filter(None, (words, note))))
            out.append(empty.model_copy(update={"value": value, "ci": ci, "floor": floor}))
    return out


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _by_patient(each: Scores, data: Dataset, rows: np.ndarray) -> dict[str, Floats]:
    """The mean of each patient's scans, from the scores of all scans in these rows."""
    patients = data.patients[rows]
    names = sorted(set(patients))
    return {k: np.array([v[patients == p].mean() for p in names]) for k, v in each.items()}


def _empty(name: str, attack: str | None, n: int, n_holdout: int, seed: int, note: str) -> Estimate:
    """An estimate without its value."""
    how = {
        "whitebox_auc": "training patients against held-out ones; bootstrap interval by patient",
        "whitebox_tpr_at_fpr10": "share of training patients above all but 10 % of the held-out "
        "ones; floor: (k + 1) / (m + 1) of m held-out ones, k a tenth of them rounded down; "
        "Clopper-Pearson",
    }[name]
    return Estimate(
        name=name,
        group="audit",
        slice=None if attack is None else f"score={attack}",
        value=None,
        ci=None,
        n=n,
        better="lower",
        floor=None,
        ceiling=1.0,
        method=f"White-box attack on the trained weights, a patient's mean over scans: {how}. "
        "Ceiling: an attack that is always right.",
        seed=seed,
        note=note,
        n_holdout=n_holdout,
    )


def describe(found: Sequence[Estimate]) -> list[str]:
    """The attacks as lines of text, with what they mean."""
    aucs, shares = ([e for e in found if e.name == name] for name in NAMES)
    lines = []
    for a, share in zip(aucs, shares, strict=True):
        name = (a.slice or "").removeprefix("score=")
        if a.value is None or a.ci is None or share.value is None or share.ci is None:
            lines.append("weights    " + ": ".join(filter(None, (name, "not attacked", a.note))))
            continue
        lines += [
            f"weights    {name}: AUC {a.value:.2f} ({a.ci[0]:.2f} to {a.ci[1]:.2f}; 0.5 is "
            f"guessing), {a.note.partition(';')[0]}",
            f"           {100 * share.value:.0f} % of {share.n} training patients named "
            f"({100 * share.ci[0]:.0f} to {100 * share.ci[1]:.0f} %) at 10 % false alarms among "
            f"{share.n_holdout} held-out ones",
        ]
    if all(a.value is None for a in aucs):
        return lines
    return [
        *lines,
        "meaning    so well can whoever holds the weights and a person's scan tell whether that "
        "person was trained on",
        "           weights never leave the house; what the cohort tells is membership_auc in the "
        "report",
    ]
