"""The generative families. Adding one is one file and one name in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from synthmed.backbones.autoencoder import Autoencoder
from synthmed.backbones.cgan import CGAN
from synthmed.backbones.cvae import CVAE
from synthmed.backbones.ddpm import DDPM

Backbone = Annotated[Autoencoder | CVAE | CGAN | DDPM, Field(discriminator="name")]
"""Every backbone a config can name."""
