"""Radiomics as a space of features: texture as readers of medical images have standardised it."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from synthmed.errors import UsageError, pip
from synthmed.metrics.anatomy import FOREGROUND, drawn_masks
from synthmed.metrics.blocks import Singles
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.spaces import Measure, Slug, Space
from synthmed.metrics.stats import Bools, Floats

Engine = Literal["mirp", "pyradiomics"]
Extract = Callable[[Singles, Bools], Mapping[str, float]]
"""A volume and its mask to names and values; empty where nothing can be said of it."""

MIRP = {
    **{"statistics": "stat", "intensity_histogram": "ih", "glcm": "cm", "glrlm": "rlm"},
    **{"glszm": "szm", "ngtdm": "ngt", "ngldm": "ngl"},
}
"""Families of mirp, and the prefixes of their features. Morphology takes five times all these."""
PYRADIOMICS = ("firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm")
LEAST_SHARE = 1e-3


class Radiomics(Space):
    """Standardised features of grey values and texture in the tissue of each scan.

    Statistics and histogram of the grey values, and the matrices of co-occurrence, run length, size
    zone, neighbourhood tone and dependence in 3D over all directions, with a fixed number of bins
    between the least and the highest grey value: 120 numbers an image channel by mirp, 93 by
    pyradiomics. They are read where a cohort draws masks inside these (at least half), else where
    the first image is tissue (`anatomy.FOREGROUND`). A number that is not defined, as in a scan
    without tissue, counts as 0. The standard deviation of each counts as at least a thousandth of
    its root mean square.

    `frechet` in it follows the Frechet radiomic distance, and is not it: that one has features
    of filtered images as well, takes all of them without principal components and gives the
    logarithm. Figures of the two cannot be compared.

    Args:
        name: stands in the slice of the estimates, `features=NAME`.
        engine: the package that computes them, which has to be installed.
        bins: of grey values.

    Source: Zwanenburg et al. 2020, Radiology 295:328 (the features); Konz et al. 2024,
    arXiv:2412.01496 (a Frechet distance of them).
    """

    kind: Literal["radiomics"] = "radiomics"
    name: Slug = "radiomics"
    engine: Engine = "mirp"
    bins: Annotated[int, Field(ge=8, le=256)] = 32

    @property
    def variant(self) -> str:
        return f"Frechet radiomics distance, {self.engine} variant"

    @property
    def numbers(self) -> str:
        return f"radiomics features ({self.engine}{_version(self.engine)}, {self.bins} bins)"

    def verify(self) -> None:
        self._extractor()

    def _extractor(self) -> Extract:
        return _mirp(self.bins) if self.engine == "mirp" else _pyradiomics(self.bins)

    def measure(self, shared: Shared) -> Measure:
        extract = self._extractor()
        names = sorted(extract(*_example()))
        masks = drawn_masks(shared.sides)
        n = len(shared.images)

        def of_scan(scan: Singles) -> Floats:
            inside = scan[n:].sum(axis=0) >= 0.5 if masks else scan[0] >= FOREGROUND
            found = [extract(image, inside) for image in scan[:n]]
            values = [each.get(name, 0.0) for each in found for name in names]
            return np.asarray(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0))

        def features(side: Side) -> Floats:
            blocks = shared.blocks(side, [*shared.images, *masks])
            rows = [of_scan(scan) for block in blocks for scan in block]
            return np.stack(rows) if rows else np.zeros((0, n * len(names)))

        return features

    def least(self, mean: Floats, sd: Floats) -> Floats:
        return np.asarray(np.maximum(LEAST_SHARE * np.sqrt(mean**2 + sd**2), 1e-6))


def _mirp(bins: int) -> Extract:
    mirp = _module("mirp", "mirp", pip("radiomics"))

    def extract(image: Singles, inside: Bools) -> Mapping[str, float]:
        with _quiet():
            (found,) = mirp.extract_features(
                image=image,
                mask=inside,
                base_feature_families=list(MIRP),
                base_discretisation_method="fixed_bin_number",
                base_discretisation_n_bins=bins,
            )
        if found is None:  # an empty mask
            return {}
        known = [c for c in found.columns if str(c).split("_")[0] in MIRP.values()]
        return {str(c): float(found[c].iloc[0]) for c in known}

    return extract


def _pyradiomics(bins: int) -> Extract:
    remedy = "pip install versioneer cython numpy && pip install --no-build-isolation pyradiomics"
    extractors = _module("radiomics.featureextractor", "pyradiomics", remedy)
    sitk = _module("SimpleITK", "pyradiomics", remedy)
    with _quiet():
        extractor = extractors.RadiomicsFeatureExtractor(binCount=bins)
        extractor.disableAllFeatures()
        for family in PYRADIOMICS:
            extractor.enableFeatureClassByName(family)

    def extract(image: Singles, inside: Bools) -> Mapping[str, float]:
        # it takes a mask that fills its volume for an empty one
        padded, mask = np.pad(image, 1), np.pad(inside, 1).astype(np.uint8)
        if np.count_nonzero(mask) < 2:
            return {}
        with _quiet():
            found = extractor.execute(sitk.GetImageFromArray(padded), sitk.GetImageFromArray(mask))
        return {k: float(v) for k, v in found.items() if k.startswith("original_")}

    return extract


def _module(name: str, package: str, install: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"evaluate.features radiomics: {error.name or package} is not installed",
            f"Install it with: {install}",
        ) from None


def _version(package: str) -> str:
    try:
        return f" {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _example() -> tuple[Singles, Bools]:
    """A volume of which every feature can be told, for their names."""
    rng = np.random.default_rng(0)
    return rng.uniform(0.2, 1, (8, 8, 8)).astype(np.float32), np.ones((8, 8, 8), dtype=bool)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor log lines: both packages have one for each scan, mirp on stdout."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    nothing = logging.NullHandler()  # with one there, mirp does not set up its own
    root.addHandler(nothing)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(nothing)
