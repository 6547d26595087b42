"""Backbones that cannot be trained under differential privacy, and what to do instead."""

from __future__ import annotations

from synthmed.backbones.generative import Generative
from synthmed.config import Config
from synthmed.errors import UsageError


def refuse(config: Config, model: Generative) -> None:
    """Raise where a model's training has a fit that reads patients.

    Raises:
        UsageError: names the backbone, and what to set instead.
    """
    for current in model.rounds():
        if current.finish is not None and current.finish_privacy != "none":
            raise UsageError(
                f"backbone {config.backbone.name}: its training has a fit to the patients "
                "that no noise protects",
                REMEDIES.get(config.backbone.name, "Use another backbone under privacy."),
            )


REMEDIES = {
    "cvae": "Set backbone.prior: standard and backbone.factors: 0.",
    "cgan": "Set backbone.factors: 0.",
    "ddpm": "Set backbone.prediction: v, and a space that is not latent.",
    "autoencoder": "Use cvae with prior: standard: an autoencoder needs a density of its codes.",
}
