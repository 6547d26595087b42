"""Whether a model learns its training patients by heart, seen while it is trained.

At fixed places of a round the loss of each phase that reads patients is evaluated, under the
averaged weights and without a gradient, on a fixed subset of training patients and of held-out
ones. Training and held-out patients are taken in pairs with the same draws (noise, times), so that
these cancel in the difference. In a model that has learnt what patients have in common the
difference is small against its spread; in one that has learnt the patients it is not.

The held-out patients serve this warning and nothing else: no weight, step count or setting depends
on them, so what is later measured on them stays honest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from synthmed.backbones.generative import Phase
from synthmed.keys import Key
from synthmed.loader import Loader, Side
from synthmed.training import Training, phase_key

LOOKS = 10
"""Looks a round, where its steps are many enough."""

COST = 0.04
"""Share of a round's time that its looks may take; a short round gets fewer of them, or none."""

FORWARD = 1 / 3
"""Time of a loss without its gradient, as a share of the time with it."""

MIN_PAIRS = 5

LIMIT = 1.0
"""Mean difference, in standard deviations of a pair's difference, above which a person is warned.

For normal losses of equal spread, somebody who sees the loss of a patient tells with probability
Phi(LIMIT), 0.84, which of two patients was trained on.
"""

CERTAIN = 3.0
"""The mean difference must also exceed this many of its standard errors."""


def look_steps(steps: int, batch_patients: int, n_watched: int) -> set[int]:
    """After which steps of a round to look, the last always among them if any is affordable.

    Args:
        steps: of the round.
        batch_patients: patients a step.
        n_watched: patients that a look evaluates, of both sides.
    """
    affordable = COST * steps * batch_patients / (FORWARD * max(n_watched, 1))
    looks = min(LOOKS, int(affordable))
    return {round(steps * (i + 1) / looks) - 1 for i in range(looks)}


class Watch:
    """The fixed subsets, and the looks at them.

    Args:
        loader: the cohort.
        key: the training's key.
        device: where the model is.
        amp: whether training runs in bfloat16.
    """

    def __init__(self, loader: Loader, key: Key, device: str, amp: bool) -> None:
        self.key = key.fold("watch")
        self.device, self.amp = device, amp
        self.loader = loader
        self.n_pairs = n_pairs(loader)

    def due(self, state: Training) -> bool:
        """Whether to look after the step that is now done, `state.step` not yet counted up."""
        steps = state.steps[state.round]
        at = (
            look_steps(steps, self.loader.batch_patients, 2 * self.n_pairs)
            if self.n_pairs
            else set()
        )
        return state.step in at

    def look(self, state: Training) -> dict[str, float]:
        """What the log says of the fixed subsets: per phase the mean loss of either side, the mean
        difference of a pair and its standard deviation. Changes nothing."""
        params = state.averaged()
        out: dict[str, float] = {}
        for phase in (p for p in state.rounds[state.round].phases if p.reads_patients):
            train, holdout = (
                self._losses(state, phase, params, side) for side in ("train", "holdout")
            )
            gap = holdout - train
            out |= {
                f"{phase.name}.train": _short(train.mean()),
                f"{phase.name}.holdout": _short(holdout.mean()),
                f"{phase.name}.gap": _short(gap.mean()),
                f"{phase.name}.gap_sd": _short(gap.std()),
            }
        return out | {"watched_pairs": self.n_pairs}

    @torch.no_grad()
    def _losses(
        self, state: Training, phase: Phase, params: Mapping[str, Tensor], side: Side
    ) -> Tensor:
        """(n,) float64 losses as they count at the round's end, so that looks compare."""
        key = phase_key(self.key, state, phase)
        size = max(2, self.loader.batch_patients // state.pieces)
        losses = []
        for part in np.array_split(np.arange(self.n_pairs), max(1, self.n_pairs // size)):
            # the i-th pair has the i-th draws, whoever they are
            each = [phase.draw(key.fold(int(i)).torch(), 1) for i in part]
            draws = {k: torch.stack([d[k] for d in each]).to(self.device) for k in each[0]}
            batch = self.loader.watched_batch(side, self.device, slice(part[0], part[-1] + 1))
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.amp):
                losses.append(phase.loss(params, batch, draws, 1.0).double().cpu())
        return torch.cat(losses)


def n_pairs(loader: Loader) -> int:
    """Pairs of a training and a held-out patient that can be looked at; 0 where too few."""
    n = min(len(loader.watched("train")), len(loader.watched("holdout")))
    return n if n >= MIN_PAIRS else 0


def looks(log: Path) -> list[dict[str, float]]:
    """The lines of a training log that hold a look."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return [json.loads(x) for x in lines if '"watched_pairs"' in x]


def warnings(seen: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What the looks at one training say to a person, by phase; empty where nothing is wrong.

    A phase is warned of where, at the last look at it, the mean difference of a pair is above
    `LIMIT` standard deviations and `CERTAIN` standard errors, and has grown since the first look;
    if that is the only one, since before the training, when it was about 0.
    """
    out = {}
    for phase in dict.fromkeys(_phases(seen)):
        mine = [x for x in seen if f"{phase}.gap" in x]
        first, last = mine[0], mine[-1]
        gap, sd, n = last[f"{phase}.gap"], last[f"{phase}.gap_sd"], last["watched_pairs"]
        grown = len(mine) == 1 or gap > first[f"{phase}.gap"]
        if grown and gap > LIMIT * sd and gap > CERTAIN * sd / math.sqrt(n):
            told = 0.5 * (1 + math.erf(gap / max(sd, 1e-12) / math.sqrt(2)))
            out[phase] = (
                f"the model learns its training patients by heart: the loss {phase} is "
                f"{last[f'{phase}.train']:.4g} on them and {last[f'{phase}.holdout']:.4g} on "
                f"held-out ones, which tells one from the other {100 * told:.0f} % of the time. "
                "Samples may resemble patients: train for fewer steps, turn on train.augment, use "
                "a smaller model, or start from other weights (train.init); a backbone that has "
                "dropout may get more of it"
            )
    return out


def unwatched(loader: Loader, state: Training, seen: Sequence[Mapping[str, float]]) -> list[str]:
    """A sentence that says which losses were never looked at and why; empty where all were.

    Args:
        loader: the cohort.
        state: the training, at its end.
        seen: its looks.
    """
    reading = [p.name for r in state.rounds for p in r.phases if p.reads_patients]
    looked = set(_phases(seen))
    missed = [name for name in reading if name not in looked]
    if not missed:
        return []
    if n_pairs(loader):
        why = f"it was so short that a look would take more than {100 * COST:.0f} % of its time"
    else:
        n_train, n_holdout = len(loader.patients), len(loader.dataset.holdout_patients())
        why = (
            f"it takes {MIN_PAIRS} training and {MIN_PAIRS} held-out patients, "
            f"and there are {n_train} and {n_holdout}"
        )
    return [
        f"nothing was watched for memorised patients while the loss {' and '.join(missed)} was "
        f"trained on: {why}"
    ]


def _phases(seen: Iterable[Mapping[str, float]]) -> Iterable[str]:
    return (k.removesuffix(".gap") for x in seen for k in x if k.endswith(".gap"))


def _short(value: Tensor) -> float:
    return round(float(value), 6)
