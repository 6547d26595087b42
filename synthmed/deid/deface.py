"""Faces taken off head scans: the brain is found, and all that lies outside it becomes background.

The network is deepbet's (Fisch et al. 2024, doi:10.1016/j.compbiomed.2024.108845; MIT), trained on
T1-weighted heads of adults; its weights are in the package. It answers for everything it is shown,
so that its answer counts only where a second look agrees and a brain may have that size.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synthmed.errors import UsageError
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


@dataclass
class Faces:
    """Takes the faces off scans, and keeps a picture and a line of each.

    Args:
        target: the folder of the artifact; pictures go to its folder faces/.
    """

    target: Path
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)
    cut: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._network = _network()
        (self.target / "faces").mkdir()

    def remove(
        self, scan: str, images: Mapping[str, Image], masks: Collection[str]
    ) -> dict[str, Image]:
        """The scan with background outside the brain, in all its channels.

        Guarantee: the brain is looked for in the first image, and one mask cuts all channels. A
        scan comes back cut, or is refused.

        Args:
            scan: pseudonym, the name of the picture.
            images: channel name to image, on one grid.
            masks: names of those that are label maps; they become 0 outside the brain, since a
                label's outline can be that of a face.

        Raises:
            Refused: `brain_not_found`, or `constant`.
        """
        first = next(image for name, image in images.items() if name not in masks)
        brain, ml = self._brain(first)
        out = {}
        for name, image in images.items():
            value = 0 if name in masks else _background(image.data)
            data = np.where(brain, image.data, image.data.dtype.type(value))
            if name not in masks and data.min() == data.max():
                raise Refused("constant", "So it is inside the brain.")
            out[name] = replace(image, data=data)
        for name in masks:
            self.cut[name] += int((images[name].data != out[name].data).sum())
        self.kept[scan] = ml, float(1 - brain.mean())
        picture = tinted(three_planes(first.data, first.affine), ~brain, first.affine)
        self._picture(scan).write_bytes(png(picture))
        return out

    def forget(self, scan: str) -> None:
        """Drop what was kept of a scan that is refused after all."""
        del self.kept[scan]
        self._picture(scan).unlink()

    def finish(self) -> dict[str, Any]:
        """Write faces.tsv, a line a scan, and return the counts for the manifest."""
        lines = ["scan\tbrain_ml\tremoved_share"]
        lines += [f"{k}\t{ml:.0f}\t{share:.4f}" for k, (ml, share) in sorted(self.kept.items())]
        (self.target / "faces.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        volumes, shares = zip(*self.kept.values(), strict=True) if self.kept else ((), ())
        return {
            "n_faces_removed": len(self.kept),
            "brain_ml": [round(f(volumes)) for f in (min, np.median, max) if volumes],
            "removed_share": [round(float(f(shares)), 4) for f in (min, np.median, max) if shares],
            "n_mask_voxels_removed": {k: n for k, n in sorted(self.cut.items()) if n},
        }

    def _picture(self, scan: str) -> Path:
        return self.target / "faces" / f"{scan}.png"

    def _brain(self, image: Image) -> tuple[Mask, float]:
        """The brain of a head, and its volume in ml.

        Raises:
            Refused: there is none, or none that can be relied on.
        """
        data = image.data
        brain = self._found(data)
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
        again = self._found(wider)[x, y, z][::-1]
        agreement = 2 * (brain & again).sum() / (brain.sum() + again.sum())
        if agreement < AGREEMENT:
            detail = f"Two looks agree in {agreement:.2f}; {AGREEMENT} is the least."
            raise Refused("brain_not_found", detail)
        return brain, ml

    def _found(self, data: Voxels) -> Mask:
        """What the network takes for the brain: one piece without holes."""
        try:
            share = self._network.run_model(np.ascontiguousarray(data, dtype=np.float32))
            found: Mask = self._network.postprocess(share > 0.5)
        except (AssertionError, RuntimeError, ValueError):  # what it does where it sees nothing
            raise Refused("brain_not_found") from None
        return found


def _background(data: Voxels) -> Any:
    """The value of an image's darkness; one that occurs in it."""
    return np.percentile(data, BACKGROUND_PERCENTILE, method="lower")


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
            'Install it with: pip install "synthmed[faces]", or take data.faces: keep.',
        ) from None
