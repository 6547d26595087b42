"""Faces taken off head scans: the brain is found, and all that lies outside it becomes background.

The network is deepbet's (Fisch et al. 2024, doi:10.1016/j.compbiomed.2024.108845; MIT), trained on
T1-weighted heads of adults; its weights are in the package. It answers for everything it is shown,
so that its answer counts only where a second look agrees and a brain may have that size.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from synthmed.artifacts import Scan
from synthmed.errors import UsageError, pip
from synthmed.formats.nifti import Image, Voxels
from synthmed.formats.refusal import Refused
from synthmed.report.mosaic import png, three_planes, tinted

Mask = npt.NDArray[np.bool_]

BRAIN_ML = (700.0, 2200.0)
"""Volumes that a brain with the liquid around it can have, from the second year of life on; the
upper end leaves room for heads that were scaled to a template."""
AGREEMENT = 0.95
"""Least overlap (Dice) of two looks. Seen: 0.99 and more on upright T1-weighted heads, 0.92 at most
where the mask was wrong."""
CONTRAST = 0.2
"""Least spread (10th to 90th percentile, by the median) of a brain's values. Seen: 0.57 and more
in brains, 0.08 in an even ball, which looks the same twice."""
WIDER_MM = 30.0
"""How far the field of view reaches further at the second look."""
BACKGROUND_PERCENTILE = 0.5
"""Where the value of what is removed lies in the image: that of the air, not an outlier's."""


@dataclass(frozen=True)
class Cut:
    """A scan without its face.

    Args:
        images: channel name to image.
        brain_ml: volume of its brain.
        removed_share: share of its voxels that lay outside.
        picture: a PNG of three planes as they were, with what was removed in colour.
        n_mask_voxels: name of a mask to its voxels that were removed.
    """

    images: dict[str, Image]
    brain_ml: float
    removed_share: float
    picture: bytes
    n_mask_voxels: Counter[str]


def ready() -> None:
    """See that the network is there.

    Raises:
        UsageError: it is not installed.
    """
    _network()


def remove(images: Mapping[str, Image], masks: Collection[str]) -> Cut:
    """A scan with background outside the brain, in all its channels.

    Guarantee: the brain is looked for in the first image, and one mask cuts all channels. A scan
    comes back cut, or is refused.

    Args:
        images: channel name to image, on one grid.
        masks: names of those that are label maps; they become 0 outside the brain, since a label's
            outline can be that of a face.

    Raises:
        Refused: `brain_not_found`, or `constant`.
    """
    first = next(image for name, image in images.items() if name not in masks)
    brain, ml = _brain(first)
    out = {}
    for name, image in images.items():
        value = 0 if name in masks else _background(image.data)
        data = np.where(brain, image.data, image.data.dtype.type(value))
        if name not in masks and data.min() == data.max():
            raise Refused("constant", "So it is inside the brain.")
        out[name] = replace(image, data=data)
    lost = Counter({n: int((images[n].data != out[n].data).sum()) for n in masks})
    picture = tinted(three_planes(first.data, first.affine), ~brain, first.affine)
    # rounded to what tells brains apart: the catalogue is no place for sixteen digits
    return Cut(out, round(ml, 1), round(float(1 - brain.mean()), 4), png(picture), +lost)


def table(scans: Iterable[Scan]) -> str:
    """faces.tsv: a line a scan, for finding the extremes."""
    lines = ["scan\tbrain_ml\tremoved_share"]
    lines += [f"{s.scan}\t{s.brain_ml:.0f}\t{s.removed_share:.4f}" for s in scans]
    return "\n".join(lines) + "\n"


TALLIED = ("n_faces_removed", "brain_ml", "removed_share")
"""What `tally` tells."""


def tally(scans: Iterable[Scan]) -> dict[str, Any]:
    """How many scans lost their face, and least, median and most of what was found; or nothing."""
    cut = [(s.brain_ml, s.removed_share) for s in scans if s.brain_ml is not None]
    if not cut:
        return {}
    volumes, shares = np.array(cut, float).T
    return {
        "n_faces_removed": len(cut),
        "brain_ml": [round(float(f(volumes))) for f in (np.min, np.median, np.max)],
        "removed_share": [round(float(f(shares)), 4) for f in (np.min, np.median, np.max)],
    }


def _brain(image: Image) -> tuple[Mask, float]:
    """The brain of a head, and its volume in ml.

    Raises:
        Refused: there is none, or none that can be relied on.
    """
    data = image.data
    brain = _found(data)
    ml = float(brain.sum() * abs(np.linalg.det(image.affine[:3, :3])) / 1000)
    if not BRAIN_ML[0] <= ml <= BRAIN_ML[1]:
        least, most = BRAIN_ML
        detail = f"It would have {ml:.0f} ml; {least:.0f} to {most:.0f} are possible."
        raise Refused("brain_not_found", detail)
    low, middle, high = np.percentile(data[brain], (10, 50, 90))
    if high - low < CONTRAST * abs(middle):
        raise Refused("brain_not_found", "What was found is as even as a ball of water.")
    # mirrored and further away: what is a brain stays one, what is none is guessed anew
    margin = [int(np.ceil(WIDER_MM / side)) for side in image.spacing_mm]
    wider = np.pad(data[::-1], [(n, n) for n in margin], constant_values=_background(data))
    x, y, z = (slice(n, -n) for n in margin)
    again = _found(wider)[x, y, z][::-1]
    agreement = 2 * (brain & again).sum() / (brain.sum() + again.sum())
    if agreement < AGREEMENT:
        detail = f"Two looks agree in {agreement:.2f}; {AGREEMENT} is the least."
        raise Refused("brain_not_found", detail)
    return brain, ml


def _found(data: Voxels) -> Mask:
    """What the network takes for the brain: one piece without holes."""
    network = _network()
    try:
        share = network.run_model(np.ascontiguousarray(data, dtype=np.float32))
        found: Mask = network.postprocess(share > 0.5)
    except (AssertionError, RuntimeError, ValueError):  # what it does where it sees nothing
        raise Refused("brain_not_found") from None
    return found


def _background(data: Voxels) -> Any:
    """The value of an image's darkness; one that occurs in it."""
    return np.percentile(data, BACKGROUND_PERCENTILE, method="lower")


@cache
def _network() -> Any:
    """The network, on the processor: the same mask wherever a run is made.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wants another format of weights some day
            from deepbet import BrainExtraction

            return BrainExtraction(no_gpu=True)
    except ModuleNotFoundError:
        raise UsageError(
            "data.faces remove: deepbet, or a package that it needs, is not installed",
            f"Install it with: {pip('faces')}, or take data.faces: keep.",
        ) from None
