"""Metrics: one file each, a frozen model whose fields are its settings and `estimate` its work."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from synthmed.metrics.anatomy import RegionVolumeSMD
from synthmed.metrics.authenticity import Authenticity
from synthmed.metrics.condition import ConditionAccuracy
from synthmed.metrics.copied import Copied
from synthmed.metrics.disclosure import Disclosure
from synthmed.metrics.discriminator import DiscriminatorAUC
from synthmed.metrics.diversity import MSSSIMDiversity
from synthmed.metrics.frechet import Frechet
from synthmed.metrics.intensity import IntensityW1
from synthmed.metrics.kid import KID
from synthmed.metrics.membership import Membership
from synthmed.metrics.mmd import MMD
from synthmed.metrics.prdc import PRDC
from synthmed.metrics.segmentation import Segmentation
from synthmed.metrics.spaced import InSpace
from synthmed.metrics.spaces import RegionVolumes
from synthmed.metrics.spectrum import SpectrumDistance
from synthmed.metrics.utility import Utility
from synthmed.metrics.vendi import Vendi

Metric = Annotated[
    MMD
    | KID
    | Frechet
    | PRDC
    | Vendi
    | MSSSIMDiversity
    | IntensityW1
    | SpectrumDistance
    | RegionVolumeSMD
    | InSpace
    | DiscriminatorAUC
    | ConditionAccuracy
    | Copied
    | Authenticity
    | Membership
    | Disclosure
    | Utility
    | Segmentation,
    Field(discriminator="name"),
]
"""Every metric; adding one is a file and its name here."""

DEFAULT_METRICS: tuple[Metric, ...] = (
    MMD(),
    KID(),
    Frechet(),
    PRDC(),
    Vendi(),
    MSSSIMDiversity(),
    IntensityW1(),
    SpectrumDistance(),
    RegionVolumeSMD(),
    InSpace(space=RegionVolumes()),
    DiscriminatorAUC(),
    ConditionAccuracy(),
    Copied(),
    Authenticity(),
    Membership(),
    Disclosure(),
    Utility(),
    Segmentation(),
)
"""What `evaluate` computes unless told otherwise, in the order of the report."""
