"""The generative families. Adding one is one file and one name in this union."""

from __future__ import annotations

from synthmed.backbones.cvae import CVAE

Backbone = CVAE
"""Every backbone a config can name (a discriminated union once there are two)."""
