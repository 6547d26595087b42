"""What a GAN's training log and samples say, in words for the person who runs it.

Every threshold is where theory puts it, or far from what healthy runs show; each says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from torch import Tensor

from synthmed.backbones.nets.diversity import mean_distance, pooled

if TYPE_CHECKING:
    from synthmed.backbones.cgan import CGAN

# below this many steps nothing has been learned that could be judged
_SETTLED = 100
# a window at either end of the recent log, long enough for a median over random batches
_WINDOW = 20
# of its own, the steps of a side that are looked at
_RECENT = 200
# samples of one condition differ by their patient, in healthy runs by a tenth of their size or more
_SAMPLE_SPREAD = 0.02
# of the training scans' variety; an early stop leaves half of it, one mode leaves nothing
_VARIETY = 0.3
# growth of a loss or gradient over `_RECENT` steps at most; healthy runs stay within a factor of 5
_GROWTH = 30.0
# share of the penalty's weight that is left when slopes are below 0.45 and there is no gap
_FLAT = 0.3
# the means of samples and scans, over the distance of two scans; a copy of the cohort is below 0.2
_OFFSET = 1.0
# Adam's epsilon: a parameter whose gradient is smaller stands still
_EPSILON = 1e-8
# cross-entropy of a critic that is right with 99 % certainty, on either side
_CERTAIN = -2 * math.log(0.99)
# that of one that guesses, 2 log 2; critics that learned something stayed below 1.37 from their
# three hundredth step on, one that never did within 0.002
_GUESSING = 2 * math.log(2) - 0.003


def of_figures(figures: Mapping[str, float]) -> list[str]:
    """Whether the closing figures (`diversity.compare`) show collapsed modes, or another mean."""
    spread, modes, real = (figures[k] for k in ("spread", "modes", "modes_training"))
    said = []
    # the effective number starts at 1: a single mode has no variety
    variety = (modes - 1) / max(real - 1, 1e-12)
    if spread < _VARIETY or variety < _VARIETY:
        said.append(
            f"COLLAPSED: the samples are alike: two differ {spread:.0%} as much as two training "
            f"scans, and {modes:.1f} kinds stand for {real:.1f} of training. Try more patients a "
            "step (train.batch_patients), a lower backbone.critic_rate, or another "
            "backbone.lipschitz."
        )
    if figures["offset"] > _OFFSET:
        said.append(
            f"the mean sample is {figures['offset']:.1f} times as far from the mean scan as two "
            "scans are from each other: training was too short, or the critic taught nothing. Try "
            "more steps, a higher backbone.critic_rate, or more backbone.critic_steps."
        )
    return said


def of_samples(samples: Tensor, recent: Sequence[Mapping[str, float]]) -> list[str]:
    """Whether (n, C, X, Y, Z) samples of one condition and n keys are all the same, in training.

    Their mean distance is held against the size of their mean volume, since a look at the
    training scans would read patients.
    """
    if not recent or recent[-1]["step"] < _SETTLED:
        return []
    x = pooled(samples)
    if mean_distance(x) > _SAMPLE_SPREAD * float(x.mean(0).norm()):
        return []
    return [
        "COLLAPSED: samples with one condition and different keys are the same volume. Stop this "
        "run; try a larger train.batch_patients or a lower backbone.generator_rate."
    ]


def of_losses(
    config: CGAN, recent: Sequence[Mapping[str, float]], n_weights: int, n_values: int
) -> list[str]:
    """What the recent losses and gradient norms say of critic and generator.

    Args:
        config: which losses these are.
        recent: lines of the training log, oldest first.
        n_weights: parameters of the generator.
        n_values: numbers in a volume.
    """
    settled = [x for x in recent if x["step"] >= _SETTLED]
    critic, slopes, made = (
        [x[name] for x in settled if name in x][-_RECENT:]
        for name in ("critic", "critic.gradient", "generator.gradient")
    )
    return [*_critic(config, critic, n_values), *_gradients(slopes, made, n_weights)]


def _critic(config: CGAN, losses: Sequence[float], n_values: int) -> list[str]:
    if len(losses) < 2 * _WINDOW:
        return []
    last = losses[-_WINDOW:]
    penalised = config.loss == "wasserstein" and config.lipschitz == "penalty"
    # volumes in [0, 1] are at most the root of n_values apart, and so is a gap with slope 1
    if (penalised and abs(median(last)) > 10 * math.sqrt(n_values)) or (
        config.loss == "wasserstein" and _grown(losses)
    ):
        return [
            "the critic's loss runs away. Try a lower backbone.critic_rate and generator_rate, or "
            "another backbone.lipschitz."
        ]
    if penalised and median(losses) > _FLAT * config.penalty < median(last):
        return [
            "the critic is flat and does not tell scans from samples, so the generator learns "
            "nothing from it. Try a higher backbone.critic_rate, more backbone.critic_steps, or a "
            "lower backbone.generator_rate."
        ]
    if config.loss == "bce" and len(losses) == _RECENT and median(losses) > _GUESSING:
        return [
            "the critic guesses. Unless samples look like scans by now, the generator learns "
            "nothing from it and drifts: try backbone.lipschitz: penalty, more "
            "backbone.critic_steps, or a lower backbone.generator_rate."
        ]
    if config.loss == "bce" and median(last) < _CERTAIN:
        return [
            "the critic tells scans from samples with certainty, which leaves the generator little "
            "to follow. Try a lower backbone.critic_rate, backbone.dropout, or backbone.loss: "
            "wasserstein."
        ]
    return []


def _grown(values: Sequence[float]) -> bool:
    first, last = ([abs(x) for x in part] for part in (values[:_WINDOW], values[-_WINDOW:]))
    return median(last) > _GROWTH * max(median(first), _EPSILON)


def _gradients(critic: Sequence[float], made: Sequence[float], n_weights: int) -> list[str]:
    said = [
        f"the gradient of the {name} has grown {_GROWTH:.0f} times within {len(norms)} of its "
        f"steps: it explodes. Try a lower backbone.{name}_rate."
        for name, norms in (("critic", critic), ("generator", made))
        if len(norms) >= 2 * _WINDOW and _grown(norms)
    ]
    if len(made) >= _WINDOW and median(made[-_WINDOW:]) < _EPSILON * math.sqrt(n_weights):
        said.append(
            "the gradient of the generator has vanished: the critic is flat where the samples "
            "are. Try backbone.lipschitz: penalty, or a larger backbone.clip."
        )
    return said
