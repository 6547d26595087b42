"""The generative families. Adding one is one file and one name in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from synthmed.backbones.autoencoder import Autoencoder
from synthmed.backbones.cgan import CGAN
from synthmed.backbones.cvae import CVAE
from synthmed.backbones.ddpm import DDPM
from synthmed.backbones.spectral import Spectral

Backbone = Annotated[Autoencoder | CVAE | CGAN | DDPM | Spectral, Field(discriminator="name")]
"""Every backbone a config can name."""
