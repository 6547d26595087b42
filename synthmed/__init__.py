"""synthmed: synthetic, privacy-preserving MRI cohorts, with the evidence to sign for them."""

__version__ = "0.1.0"
