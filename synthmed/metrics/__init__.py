"""Metrics: one file each, a frozen model whose fields are its settings and `estimate` its work."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from synthmed.metrics.authenticity import Authenticity
from synthmed.metrics.condition import ConditionAccuracy
from synthmed.metrics.copied import Copied
from synthmed.metrics.intensity import IntensityW1
from synthmed.metrics.membership import Membership
from synthmed.metrics.mmd import MMD
from synthmed.metrics.prdc import PRDC
from synthmed.metrics.spectrum import SpectrumDistance

Metric = Annotated[
    MMD
    | PRDC
    | IntensityW1
    | SpectrumDistance
    | ConditionAccuracy
    | Copied
    | Authenticity
    | Membership,
    Field(discriminator="name"),
]
"""Every metric; adding one is a file and its name here."""

DEFAULT_METRICS: tuple[Metric, ...] = (
    MMD(),
    PRDC(),
    IntensityW1(),
    SpectrumDistance(),
    ConditionAccuracy(),
    Copied(),
    Authenticity(),
    Membership(),
)
"""What `evaluate` computes unless told otherwise, in the order of the report."""
