"""What cannot be done under differential privacy, and what to do instead."""

from __future__ import annotations

from synthmed.backbones.generative import Generative
from synthmed.config import Config
from synthmed.errors import UsageError


def refuse(config: Config, model: Generative) -> None:
    """Raise for what cannot be done under differential privacy, before anything is read.

    Raises:
        UsageError: names the setting, why, and what to set instead.
    """
    if config.train.max_minutes is not None:
        raise UsageError(
            "train.max_minutes: how many steps fit into a time depends on the patients, and the "
            "number of steps is a part of the promise",
            "Set train.max_steps, and leave max_minutes out.",
        )
    if config.data.view != "grid":
        raise UsageError(
            "data.view: drawn fits the sizes of the patients' fields of view, which privacy does "
            "not cover",
            "Set data.view: grid.",
        )
    if config.sample.prior == "cohort":
        raise UsageError(
            "sample.prior: cohort draws labels as the patients have them, which privacy does not "
            "cover",
            "Use uniform, or declare a distribution that is public.",
        )
    for current in model.rounds():
        if current.finish is not None and current.finish_privacy != "none":
            raise UsageError(
                f"backbone {config.backbone.name}: its training ends with a fit to the patients "
                "that no noise protects",
                REMEDIES.get(config.backbone.name, "Use another backbone under privacy."),
            )


REMEDIES = {
    "cvae": "Set backbone.prior: standard.",
    "ddpm": "Set backbone.prediction: v, and a space that is not latent.",
    "autoencoder": "Use cvae with prior: standard: an autoencoder needs a density of its codes.",
}
