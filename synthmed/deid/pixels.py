"""Text that is drawn into pixels: lines of it are found and painted over, and never read.

The detector is the one of PP-OCRv4 (differentiable binarization, Liao et al. 2020,
doi:10.1609/aaai.v34i07.6812), whose weights are in the package rapidocr-onnxruntime. That package
is not imported: it needs OpenCV, and OpenCV needs a graphics library that servers lack. The
weights run in onnxruntime; what comes before and after them is here.

A line that is certain raises the alarm; a plane without one is clean. A plane with an alarm is
looked through again at several sizes and brightnesses, and round its certain lines also in narrow
windows of brightness, which show dark letters in dark noise. What is less certain counts as well
where it lies beside a certain line and is as high: where one line is, others are. Nothing between
two lines of a block is kept, nor what is cut off by the picture's edge below or above one.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from synthmed.errors import UsageError, pip
from synthmed.formats.nifti import Image
from synthmed.formats.refusal import Refused

nib: Any = nibabel  # its functions carry no types

WEIGHTS = "models/ch_PP-OCRv4_det_infer.onnx"
"""In the folder of rapidocr_onnxruntime."""
SCALE = 3.0
"""How much a picture is enlarged: letters of five pixels become as high as the network wants."""
MAX_SIDE = 1024
"""Pixels that the longer side is enlarged to at most."""
TOP_PERCENT = 99.8
"""Brightness that becomes white; one bright vessel leaves text its contrast."""
THRESHOLD = 0.3
"""Of the network's answer: what counts as text."""
UNCLIP = 1.6
"""How far the answer, which is thinner than the letters, grows (equation 10 of the paper)."""
SURE, LIKELY = 0.8, 0.5
"""Mean answer of a line that raises the alarm, and of one beside such a line."""
LENGTH = 3.0
"""Ratio of a certain line's sides: a lone letter that marks a side is no name."""
FILL = 0.5
"""Part of its box that a certain line fills."""
MAX_HEIGHT = 0.12
"""Of a line, as a part of the picture's shorter side."""
MIN_HEIGHT = 3
"""Of the answer to a line, in enlarged pixels."""
MARGIN = 1
"""Pixels that a line is painted beyond its letters, whose edges are soft."""
ALIKE = 2.0
"""How much higher or lower than the certain line beside it a likely one may be."""
NEAR = 3.0
"""How many heights away from a certain line a likely one may lie."""
GAP = 2.0
"""How many heights may lie between two lines of a block: one line that was missed."""
EDGE = 1.0
"""How many heights from the picture's edge a line may be cut off."""
BESIDE = 2.0
"""How many heights a line is painted beyond its ends: a space and a few letters."""
SQUARE = 0.01
"""How much the sides of a square pixel may differ, as a part."""
ROUNDS = 4
"""How often a plane is painted and looked through again."""

Planes = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Span = tuple[int, int]


class Look(NamedTuple):
    """How a plane is shown to the network.

    Args:
        scale: enlargement, as a factor on the usual one.
        power: of the brightness; a low one shows dark text on dark ground.
        low: brightness that is shown black, as a part of the plane's range; and `high`, white.
    """

    scale: float = 1.0
    power: float = 1.0
    low: float = 0.0
    high: float = 1.0


LOOK = Look()
"""The first look, at every plane."""
LOOKS = (Look(2 / 3), LOOK, Look(4 / 3), Look(1.0, 1 / 3), Look(4 / 3, 1 / 3))
"""Those at a plane with an alarm."""
CLOSER = tuple(
    Look(4 / 3, 1.0, low, high)
    for low, high in ((0.0, 0.05), (0.0, 0.12), (0.0, 0.3), (0.4, 1.0), (0.75, 1.0))
)
"""Those round its certain lines."""


class Line(NamedTuple):
    """A line of text in a plane.

    Args:
        rows: (first, behind the last), and `columns` likewise.
        height: of its letters in pixels.
        sure: whether it raises the alarm by itself.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    height: float
    sure: bool


def ready() -> None:
    """Load the detector.

    Raises:
        UsageError: it is not installed.
    """
    _network()


def found(planes: Planes) -> bool:
    """Whether text is drawn into an image.

    Args:
        planes: (n, rows, columns), as they were drawn on; mirrored planes do as well.

    Raises:
        UsageError: the detector is not installed.
    """
    return any(_alarm(plane) for plane in planes)


def painted(planes: Planes) -> tuple[Planes, Mask]:
    """An image without the text that is drawn into it, and where it was.

    A line takes the darkest value of its plane: a value that the image holds already and that says
    nothing. Pixels outside the mask stay as they are.

    Guarantee: the search finds nothing in what is returned; without text that is `planes`.

    Args:
        planes: (n, rows, columns).

    Returns:
        The planes, and a mask of their shape.

    Raises:
        Refused: text is still found where it was painted over.
        UsageError: the detector is not installed.
    """
    mask = np.zeros(planes.shape, np.bool_)
    alarmed = [k for k, plane in enumerate(planes) if _alarm(plane)]
    if not alarmed:
        return planes, mask
    clean = planes.copy()
    for k in alarmed:
        plane, covered = clean[k], mask[k]
        dark = plane.min()
        for turn in range(ROUNDS):
            lines = _block(plane, first=turn == 0)
            for line in lines:
                covered[slice(*line.rows), slice(*line.columns)] = True
            plane[covered] = dark
            if not lines:
                break
    if found(clean[alarmed]):
        raise Refused("burned_in", "It is still found where it was painted over.")
    return clean, mask


def painted_volume(image: Image, stored: bool) -> tuple[Image, bool]:
    """A volume without the text that is drawn into its slices, and whether there was any.

    Args:
        image: the volume.
        stored: its third axis as stored runs from slice to slice, and the first along their rows,
            as those of a DICOM series do. Else nobody knows: text is searched along every axis
            whose slices have square pixels (along all, where none has), upright and lying.

    Raises:
        Refused: text is still found where it was painted over.
        UsageError: the detector is not installed.
    """
    data = image.data.copy()
    any_text = False
    for planes in _slicings(replace(image, data=data), stored):  # views of `data`
        clean, mask = painted(planes)
        planes[mask] = clean[mask]
        any_text |= bool(mask.any())
    return (replace(image, data=data) if any_text else image), any_text


def found_in_volume(image: Image, stored: bool) -> bool:
    """Whether text is drawn into the slices of a volume; arguments as of `painted_volume`."""
    return any(found(planes) for planes in _slicings(image, stored))


def _slicings(image: Image, stored: bool) -> Iterator[Planes]:
    """Ways to see a volume as (n, rows, columns): views of its voxels."""
    if stored:
        # which axis of RAS each stored one is; text that is mirrored is found like any other
        column, row, piece = (
            int(a) for a in nib.orientations.axcodes2ornt(image.orientation)[:, 0]
        )
        yield image.data.transpose(piece, row, column)
        return
    sides = image.spacing_mm
    pairs = [[s for k, s in enumerate(sides) if k != axis] for axis in range(3)]
    square = [axis for axis, (a, b) in enumerate(pairs) if abs(a - b) <= SQUARE * max(a, b)]
    for axis in square or range(3):
        planes = np.moveaxis(image.data, axis, 0)
        yield planes
        yield planes.transpose(0, 2, 1)


@cache
def _network() -> Any:
    """The detector, one of a process; one thread, so that equal pictures get equal answers."""
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or package.origin is None or not importlib.util.find_spec("onnxruntime"):
        raise UsageError(
            "text in pixels: the detector is not installed",
            f"Install it with: {pip('text')}, or do not ask for the search.",
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    weights = Path(package.origin).parent / WEIGHTS
    return onnxruntime.InferenceSession(str(weights), options, ["CPUExecutionProvider"])


def _alarm(plane: Planes) -> bool:
    """Whether a plane holds a certain line."""
    return any(line.sure for line in _lines(plane, LOOK))


def _block(plane: Planes, first: bool) -> list[Line]:
    """What is painted of a plane: certain lines, likely ones beside them, and what is between.

    Args:
        plane: (rows, columns).
        first: whether it is looked at for the first time, or was painted before.
    """
    every = [line for look in (LOOKS if first else (LOOK,)) for line in _lines(plane, look)]
    sure = [line for line in every if line.sure]
    if first:
        every += [
            line
            for part in _around(sure, plane.shape)
            for look in CLOSER
            for line in _lines(plane, look, part)
        ]
    lines = [line for line in every if line.sure or any(_beside(line, other) for other in sure)]
    return [*(_wider(line, plane.shape) for line in lines), *_between(lines)]


def _beside(line: Line, other: Line) -> bool:
    """Whether a line is as high as another and near it."""
    return _alike(line, other) and max(_gaps(line, other)) <= NEAR * other.height


def _alike(a: Line, b: Line) -> bool:
    return max(a.height, b.height) <= ALIKE * min(a.height, b.height)


def _gaps(a: Line, b: Line) -> tuple[int, int]:
    """Rows and columns between two lines; negative where they overlap."""
    rows, columns = (
        max(p[0] - q[1], q[0] - p[1]) for p, q in ((a.rows, b.rows), (a.columns, b.columns))
    )
    return rows, columns


def _around(sure: Sequence[Line], shape: Sequence[int]) -> list[tuple[Span, Span]]:
    """Rows and columns round each block of certain lines, where others may be."""
    blocks: list[list[Line]] = []
    for line in sure:
        near = [b for b in blocks if any(_beside(line, other) for other in b)]
        blocks = [b for b in blocks if b not in near] + [[line, *(o for b in near for o in b)]]
    out = []
    for block in blocks:
        far = math.ceil((NEAR + 1) * max(line.height for line in block))
        rows, columns = (
            (max(0, min(s[0] for s in spans) - far), min(n, max(s[1] for s in spans) + far))
            for spans, n in (
                ([line.rows for line in block], shape[0]),
                ([line.columns for line in block], shape[1]),
            )
        )
        out.append((rows, columns))
    return out


def _wider(line: Line, shape: Sequence[int]) -> Line:
    """A line with its soft edges, what stands beside it where it goes on, and cut-off rows."""
    far = round(BESIDE * line.height)
    left, right = max(0, line.columns[0] - far), min(shape[1], line.columns[1] + far)
    top, bottom = max(0, line.rows[0] - MARGIN), min(shape[0], line.rows[1] + MARGIN)
    if top <= EDGE * line.height:
        top = 0
    if shape[0] - bottom <= EDGE * line.height:
        bottom = shape[0]
    return line._replace(rows=(top, bottom), columns=(left, right))


def _between(lines: Sequence[Line]) -> list[Line]:
    """What lies between two lines of a block, one above the other."""
    out = []
    for above in lines:
        for below in lines:
            gap, apart = below.rows[0] - above.rows[1], _gaps(above, below)[1]
            if apart < 0 < gap <= GAP * max(above.height, below.height) and _alike(above, below):
                columns = (
                    min(above.columns[0], below.columns[0]),
                    max(above.columns[1], below.columns[1]),
                )
                rows = (above.rows[1], below.rows[0])
                out.append(above._replace(rows=rows, columns=columns, sure=False))
    return out


def _lines(plane: Planes, look: Look, part: tuple[Span, Span] | None = None) -> list[Line]:
    """Lines of text in a plane, or in a part of its rows and columns.

    Args:
        plane: (rows, columns).
        look: how it is shown.
        part: (first, behind the last) row, and column; all by default.
    """
    (top, bottom), (left, right) = part or ((0, plane.shape[0]), (0, plane.shape[1]))
    shown = _grey(plane, look)[top:bottom, left:right]
    answer = _answer(shown, look.scale * min(SCALE, MAX_SIDE / max(plane.shape)))
    zoom = np.divide(answer.shape, shown.shape)
    highest = MAX_HEIGHT * float(np.multiply(plane.shape, zoom).min())
    labels, _ = ndimage.label(answer > THRESHOLD, np.ones((3, 3)))
    out = []
    for k, place in enumerate(ndimage.find_objects(labels), 1):
        own = labels[place] == k
        sides = np.array(own.shape)
        score = float(answer[place][own].mean())
        if not MIN_HEIGHT <= sides.min() <= highest or score < LIKELY:
            continue
        grown = sides.prod() * UNCLIP / (2 * sides.sum())
        rows, columns = (
            (
                first + max(0, int(np.floor((s.start - grown) / z))),
                first + min(n, int(np.ceil((s.stop + grown) / z))),
            )
            for s, z, n, first in zip(place, zoom, shown.shape, (top, left), strict=True)
        )
        sure = score >= SURE and sides.max() >= LENGTH * sides.min() and own.mean() >= FILL
        height = float((sides + 2 * grown).min() / zoom[sides.argmin()])
        # what a narrow window shows is no alarm: noise has shapes there
        out.append(Line(rows, columns, height, bool(sure) and part is None))
    return out


def _grey(plane: Planes, look: Look) -> npt.NDArray[np.float32]:
    """A plane from black (-1) to white (1), as the network wants it."""
    values = plane.astype(np.float64)
    low, high = values.min(), np.percentile(values, TOP_PERCENT)
    if high <= low:
        high = values.max()
    span = max(high - low, np.finfo(np.float64).tiny)
    grey = ((values - low) / span - look.low) / (look.high - look.low)
    out: npt.NDArray[np.float32] = (2 * np.clip(grey, 0, 1) ** look.power - 1).astype(np.float32)
    return out


def _answer(grey: npt.NDArray[np.float32], enlarged: float) -> npt.NDArray[np.float32]:
    """The network's answer to a picture, 0 to 1; its sides are multiples of 32."""
    sides = [max(1, round(n * enlarged / 32)) * 32 for n in grey.shape]
    zoom = np.divide(sides, grey.shape)
    picture = ndimage.zoom(grey, zoom, order=1, mode="nearest", grid_mode=True)
    colours = np.ascontiguousarray(np.broadcast_to(picture, (1, 3, *sides)))
    network = _network()
    out: npt.NDArray[np.float32] = network.run(None, {network.get_inputs()[0].name: colours})[0]
    answer: npt.NDArray[np.float32] = out[0, 0]
    return answer
