"""What the last stage must be told about a run beside the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class CohortFacts(BaseModel):
    """Numbers and digests of a run; unknown keys are ignored, so that stages may tell more.

    Args:
        n_patients: people in the catalogue that were used.
        n_scans: their scans.
        n_train: patients the model learned from.
        n_holdout: patients held out.
        n_synthetic: samples that ship.
        n_dropped: samples the screen dropped as copies.
        versions: package name to version of what made the cohort.
        digests: artifact kind to digest of its manifest, and "config" to the config's.
        seed: the run's root seed.
        init: the model that training started from (`origin.released`), if any.
        privacy: what a private training says of itself (`Session.statement`); null without one.
        attempts: how many decisions were made on this run, this one included.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    n_patients: int
    n_scans: int
    n_train: int
    n_holdout: int
    n_synthetic: int
    n_dropped: int
    versions: Mapping[str, str] = {}
    digests: Mapping[str, str] = {}
    seed: int | None = None
    init: Mapping[str, Any] | None = None
    privacy: Mapping[str, Any] | None = None
    attempts: int = 1
