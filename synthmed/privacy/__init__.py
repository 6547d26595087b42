"""Differential privacy for patients: the mechanism, what it costs, and who has paid. The only
importer of opacus."""
