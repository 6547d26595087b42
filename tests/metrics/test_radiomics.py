"""Radiomics as a space: numbers that can be computed by hand, and texture that is seen."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.feature import graycomatrix

from synthmed.artifacts import ChannelInfo
from synthmed.errors import UsageError
from synthmed.metrics import InSpace
from synthmed.metrics.radiomics import Radiomics, _mirp, _pyradiomics
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.spaced import Mapped
from tests.metrics.cohorts import sides

GRID = (10, 11, 9)
MEAN = {"mirp": "stat_mean", "pyradiomics": "original_firstorder_Mean"}
VARIANCE = {"mirp": "stat_var", "pyradiomics": "original_firstorder_Variance"}


@pytest.fixture(params=["mirp", "pyradiomics"])
def engine(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("mirp" if request.param == "mirp" else "radiomics")
    return request.param


def people(seed: int, n: int, prefix: str, smooth: float = 0.8) -> Cases:
    """Textured balls with a mask of their upper half."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, k) for k in GRID), indexing="ij")
    inside = sum(a**2 for a in axes) < 0.8
    volumes = np.zeros((n, 2, *GRID), np.float16)
    for scan in volumes:
        texture = gaussian_filter(rng.standard_normal(GRID), smooth)
        scan[0] = inside * (0.6 + 0.1 * texture / texture.std() + 0.03 * rng.standard_normal())
        scan[1] = inside & (axes[2] > 0)
    return Cases(volumes, np.array([f"{prefix}{i:03d}" for i in range(n)]), [{}] * n)


def given(synthetic: Cases, with_masks: bool) -> Sides:
    of = sides(people(1, 7, "t"), people(2, 5, "h"), synthetic)
    if with_masks:
        channels = (ChannelInfo("T1w"), ChannelInfo("half:top", mask="half"))
        return Sides(**{**of.__dict__, "channels": channels})
    plain = {
        side: Cases(c.volumes[:, :1], c.patients, c.labels)
        for side, c in (("train", of.train), ("holdout", of.holdout), ("synthetic", synthetic))
    }
    return Sides(**{**of.__dict__, **plain})


@pytest.mark.parametrize("with_masks", [True, False])
def test_numbers_are_of_the_grey_values_in_the_mask_or_in_tissue(
    engine: Any, with_masks: bool
) -> None:
    of = given(people(3, 3, "s"), with_masks)
    found = Mapped(Shared(of), Radiomics(engine=engine))._raw("train")
    extract = _mirp(32) if engine == "mirp" else _pyradiomics(32)
    volume = of.train.volumes[4, 0].astype(np.float32)
    mask = of.train.volumes[4, 1] > 0 if with_masks else volume >= 0.15
    names = sorted(extract(volume, mask))
    values = volume[mask].astype(np.float64)
    assert found.shape == (7, {"mirp": 120, "pyradiomics": 93}[engine])
    assert found[4, names.index(MEAN[engine])] == pytest.approx(values.mean(), rel=1e-5)
    assert found[4, names.index(VARIANCE[engine])] == pytest.approx(values.var(), rel=1e-4)


def test_co_occurrence_in_a_plane_is_that_of_scikit_image(engine: Any) -> None:
    """On a volume with values in a single plane the 3D matrix is that of four directions."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 8, (12, 12))
    volume = np.zeros((3, 12, 12), np.float32)
    volume[1] = 0.2 + 0.1 * levels
    extract = _mirp(8) if engine == "mirp" else _pyradiomics(8)
    found = extract(volume, volume > 0)
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    counts = graycomatrix(levels, [1], angles, levels=8, symmetric=True)[:, :, 0].astype(float)
    i, j = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    if engine == "mirp":  # one matrix of all directions
        merged = counts.sum(axis=2) / counts.sum()
        (name,) = [k for k in found if k.startswith("cm_contrast")]
        expected = np.sum(merged * (i - j) ** 2)
    else:  # a figure of each direction, averaged
        each = counts / counts.sum(axis=(0, 1))
        name = "original_glcm_Contrast"
        expected = np.mean(np.sum(each * ((i - j) ** 2)[:, :, None], axis=(0, 1)))
    assert found[name] == pytest.approx(expected, rel=1e-6)


def test_smooth_texture_is_seen(engine: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Where real train, of the same texture as the holdout, is not."""
    of = given(people(3, 6, "s", smooth=1.4), with_masks=False)
    estimates = InSpace(space=Radiomics(engine=engine)).estimate(of, Shared(of))
    found = {e.name: e for e in estimates}
    assert found["mmd2"].floor < found["mmd2"].ci[0]
    assert found["mmd2_excess"].ci[0] > 0
    assert {e.slice for e in estimates} == {"features=radiomics"}
    said = f"Frechet radiomics distance, {engine} variant: Squared Frechet distance"
    assert found["frechet"].method.startswith(said)
    assert f"({engine} " in found["mmd2"].method  # and its version
    assert capfd.readouterr() == ("", "")


def test_scans_without_tissue_are_judged(engine: Any) -> None:
    """Empty, of one voxel, of two that are apart, and of one grey value."""
    volumes = np.zeros((4, 2, *GRID), np.float16)
    volumes[1, :, 3, 3, 3] = volumes[2, :, 3, 3, 3] = volumes[2, :, 7, 7, 7] = 1
    volumes[3] = 0.5
    broken = Cases(volumes, np.array(list("abcd")), [{}] * 4)
    of = given(broken, with_masks=False)
    mapped = Mapped(Shared(of), Radiomics(engine=engine))
    assert np.isfinite(mapped.features("synthetic")).all()
    assert not mapped._raw("synthetic")[0].any()
    assert mapped.distances("synthetic", "train").min() > mapped.distances("train", "train").max()


@pytest.mark.parametrize(("engine", "module"), [("mirp", "mirp"), ("pyradiomics", "radiomics")])
def test_an_engine_that_is_not_installed_is_named(engine: Any, module: str) -> None:
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    of = given(people(3, 3, "s"), with_masks=False)
    with pytest.raises(UsageError, match=r"is not installed\n  Install it with: pip install"):
        InSpace(space=Radiomics(engine=engine)).estimate(of, Shared(of))
