"""Anatomy of a synthetic head: level-set functions, tissue fractions, intensities.

Everything is a function of position, so one head can be sampled on any grid: axis-aligned,
flipped, oblique, fine or coarse. Coordinates are RAS+ millimetres (x to the patient's right,
y anterior, z superior) with the origin at the centre of the field of view. Each structure is
an approximate signed distance in mm, negative inside; a smooth step turns it into a
partial-volume fraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FOV_MM = 192.0
"""Edge of the cubic field of view in mm; the voxel size is ``FOV_MM / grid``."""

LABELS = {
    1: "ventricles",
    2: "hippocampus_left",
    3: "hippocampus_right",
    4: "grey_matter",
    5: "white_matter",
}
"""Values of the label map (0 is everything else)."""

LATENTS = (
    "size",
    "elongation",
    "height",
    "asymmetry",
    "fold_phase",
    "fold_depth",
    "cortex",
    "ventricle",
    "hippocampus",
)
"""Names of the latent factors, in the order in which they are drawn."""

WHITE_MATTER = 2400.0
"""Noise-free white-matter intensity of the stored integers."""

# T1-weighted contrast relative to white matter.
CONTRAST = {
    "fat": 1.12,
    "muscle": 0.50,
    "airway": 0.03,
    "orbit": 0.95,
    "eye": 0.22,
    "bone": 0.10,
    "csf": 0.20,
    "grey": 0.62,
    "white": 1.00,
    "deep_grey": 0.74,
    "brainstem": 0.86,
    "ventricles": 0.17,
    "hippocampus_left": 0.60,
    "hippocampus_right": 0.60,
}

_PIECE = 12_000  # points evaluated at once

SCALP_MM, SKULL_MM, CSF_MM = 6.5, 6.5, 2.0

# Centre lines (mirrored across the midline) and radii in mm: |x|, y, z, r.
_VENTRICLE_LINES = (
    ((8.0, 33.0, 16.0, 4.0), (9.0, 14.0, 24.0, 5.0), (11.0, -8.0, 27.0, 4.6),
     (21.0, -31.0, 17.0, 5.6), (30.0, -24.0, 0.0, 3.2), (35.0, -2.0, -11.0, 2.4)),
    ((21.0, -31.0, 17.0, 5.6), (22.0, -50.0, 11.0, 2.6)),
)  # fmt: skip
_HIPPOCAMPUS_LINE = (
    (23.0, 3.0, -18.0, 6.2), (27.5, -8.0, -17.0, 5.8),
    (28.0, -19.0, -11.0, 4.8), (22.0, -29.0, -2.0, 3.4),
)  # fmt: skip
_BRAINSTEM_LINE = (
    (0.0, -12.0, 4.0, 10.0), (0.0, -10.0, -22.0, 13.0),
    (0.0, -22.0, -48.0, 7.5), (0.0, -32.0, -120.0, 5.5),
)  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """Shape parameters of one head.

    ``scale`` is (x, y, z) relative to the template; ``*_mm`` are millimetres; ``ventricle``
    and ``hippocampus_*`` multiply the radii of these structures; ``fold_phase`` is in radians.
    """

    scale: tuple[float, float, float]
    asymmetry: float
    fold_phase: float
    fold_depth_mm: float
    sulcus_mm: float
    cortex_mm: float
    ventricle: float
    hippocampus_left: float
    hippocampus_right: float

    @classmethod
    def from_latents(cls, z: Array, diagnosis: str, age: float, sex: str) -> Anatomy:
        """Build the shape from latent factors ``z`` (len(LATENTS),), unit normal, clipped.

        Radii follow half the logarithm of the wanted volume ratio because the length of the
        tube-like structures stays the same.
        """
        v = dict(zip(LATENTS, np.clip(z, -2.0, 2.0).tolist(), strict=True))
        ill = diagnosis == "atrophy"
        years = (age - 70.0) / 25.0
        size = 1.0 + 0.015 * v["size"] + (0.014 if sex == "M" else -0.014)
        log_ventricle = 0.17 * v["ventricle"] + 0.12 * years + (1.10 if ill else 0.0)
        log_hippocampus = 0.10 * v["hippocampus"] - 0.05 * years - (0.48 if ill else 0.0)
        tilt = 0.03 * v["asymmetry"]
        return cls(
            scale=(
                size * (1.0 - 0.010 * v["elongation"]),
                size * (1.0 + 0.012 * v["elongation"]),
                size * (1.0 + 0.013 * v["height"]),
            ),
            asymmetry=v["asymmetry"],
            fold_phase=0.35 * v["fold_phase"],
            fold_depth_mm=12.0 + 1.8 * v["fold_depth"],
            sulcus_mm=0.9 + 0.20 * years + (0.45 if ill else 0.0),
            cortex_mm=4.2 + 0.3 * v["cortex"] - 0.25 * years,
            ventricle=float(np.exp(0.5 * log_ventricle)),
            hippocampus_left=float(np.exp(0.5 * (log_hippocampus - tilt))),
            hippocampus_right=float(np.exp(0.5 * (log_hippocampus + tilt))),
        )


def smooth_step(distance: Array, width: float) -> Array:
    """Fraction inside (0..1) for a signed ``distance`` in mm, over ``width`` mm."""
    t = np.clip(0.5 - distance / (1.5 * width), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _ellipsoid(p: Array, centre: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    """Approximate signed distance of ``p`` (3, N) to an axis-aligned ellipsoid."""
    q = p - np.asarray(centre)[:, None]
    q *= q
    weights = np.array([[r**-2 for r in radii], [r**-4 for r in radii]])
    near, slope = np.sqrt(weights @ q)
    return near * (near - 1.0) / np.maximum(slope, 1e-9)


def _tube(p: Array, line: tuple[tuple[float, ...], ...], scale: Array | float = 1.0) -> Array:
    """Distance of ``p`` (3, N) to a chain of round cones; ``scale`` multiplies the radii."""
    best = np.full(p.shape[1], np.inf)
    for start, stop in pairwise(line):
        a, b = np.asarray(start[:3]), np.asarray(stop[:3])
        q = p - a[:, None]
        h = np.clip((b - a) @ q / ((b - a) @ (b - a)), 0.0, 1.0)
        q -= (b - a)[:, None] * h
        radius = (start[3] + h * (stop[3] - start[3])) * scale
        q *= q
        np.minimum(best, np.sqrt(q[0] + q[1] + q[2]) - radius, out=best)
    return best


def _smooth_min(a: Array, b: Array, k: float) -> Array:
    """Union of two level sets with a fillet of about ``k`` mm."""
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.minimum(a, b) - h * h * (0.25 * k)


def _template(points: Array, anatomy: Anatomy) -> tuple[Array, Array]:
    """Head-frame points (3, N) in template mm, and the same mirrored to x >= 0."""
    p = points / np.asarray(anatomy.scale)[:, None]
    # The usual torque of the brain: right frontal and left occipital lobes reach further.
    p[1] -= 0.012 * anatomy.asymmetry * p[0] * np.tanh(p[1] / 40.0)
    mirrored = p.copy()
    np.abs(mirrored[0], out=mirrored[0])
    return p, mirrored


def _cavity(m: Array) -> dict[str, Array]:
    """Level sets (mm) of the intracranial parts for mirrored template points (3, N)."""
    dome = m.copy()
    # The parietal bones are wider apart than the frontal bone.
    dome[0] *= 1.0 + 0.0019 * (m[1] + 14.0)
    dome[2] = np.where(m[2] < 18.0, 18.0 + 0.8 * (m[2] - 18.0), m[2])
    cerebrum = _ellipsoid(dome, (0.0, -3.0, 18.0), (56.0, 72.0, 52.0))
    cerebrum = -_smooth_min(-cerebrum, m[2] + 9.0 - 0.10 * m[1], 10.0)
    temporal = _ellipsoid(m, (36.0, 4.0, -14.0), (19.0, 38.0, 18.0))
    cerebrum = _smooth_min(cerebrum, temporal, 8.0)
    cerebellum = _ellipsoid(m, (17.0, -44.0, -30.0), (31.0, 26.0, 20.0))
    return {
        "cerebrum": cerebrum,
        "cerebellum": cerebellum,
        "stem": _tube(m, _BRAINSTEM_LINE),
    }


def _ventricles(m: Array, side: Array, anatomy: Anatomy) -> Array:
    """Level set of the lateral and third ventricles; ``side`` is -1 on the left, +1 right."""
    scale = anatomy.ventricle * (1.0 - 0.05 * anatomy.asymmetry * side)
    lateral = np.minimum(*(_tube(m, line, scale) for line in _VENTRICLE_LINES))
    width = 2.4 * anatomy.ventricle
    third = _ellipsoid(m, (0.0, -6.0, 8.0), (width, 14.0, 10.0))
    return np.minimum(lateral, third)


def _hippocampi(m: Array, side: Array, anatomy: Anatomy) -> Array:
    """Level set of both hippocampi; ``side`` is -1 on the left, +1 on the right."""
    scale = np.where(side < 0, anatomy.hippocampus_left, anatomy.hippocampus_right)
    return _tube(m, _HIPPOCAMPUS_LINE, scale)


def _cerebral_surface(m: Array, side: Array, depth: Array, anatomy: Anatomy) -> Array:
    """Level set of the folded cerebral surface from its smooth hull ``depth`` (mm)."""
    x, y, z = m
    # Sulci are the zero level of a warped gyroid, cut off some millimetres below the hull.
    k = 2.0 * np.pi / 41.0
    phase = anatomy.fold_phase + 0.12 * anatomy.asymmetry * side
    u = k * (x + 4.0 * np.sin(y / 17.0)) + phase
    v = k * (y + 4.0 * np.sin(z / 15.0 + 1.0)) + 0.6 * phase
    w = k * (z + 4.0 * np.sin(x / 13.0 + 2.0)) + 0.8
    gyroid = np.sin(u) * np.cos(v) + np.sin(v) * np.cos(w) + np.sin(w) * np.cos(u)
    sulci = np.abs(gyroid) / (1.35 * k) - anatomy.sulcus_mm
    sulci = np.maximum(sulci, -(depth + anatomy.fold_depth_mm))
    callosum = (np.hypot((y + 3.0) / 43.0, (z - 8.0) / 27.0) - 1.0) * 27.0
    fissure = np.maximum(x - 1.2 - 0.3 * anatomy.sulcus_mm, -callosum)
    bank = 0.94 * np.abs(z - 5.0 + 0.33 * (y - 5.0)) - 0.7 - anatomy.sulcus_mm
    sylvian = np.maximum.reduce([bank, 37.0 - x, y - 36.0, -38.0 - y])
    return np.maximum(depth, -np.minimum(np.minimum(sulci, fissure), sylvian))


def _compose(layers: list[tuple[str, Array]], n: int) -> dict[str, Array]:
    """Fractions of painted layers, last on top; a name may recur. Adds up to at most 1."""
    left = np.ones(n)
    out: dict[str, Array] = {}
    for name, alpha in reversed(layers):
        share = alpha * left
        out[name] = out[name] + share if name in out else share
        left = np.maximum(left - share, 0.0)
    return out


def _head(p: Array, m: Array, cavity: Array) -> Array:
    """Level set of the skin for template points (3, N)."""
    x, y, z = p
    face = _ellipsoid(p, (0.0, 34.0, -44.0), (55.0, 50.0, 66.0))
    neck = np.maximum((np.hypot(x / 52.0, (y + 20.0) / 54.0) - 1.0) * 52.0, z + 24.0)
    head = _smooth_min(cavity - SCALP_MM - SKULL_MM - CSF_MM, face, 14.0)
    head = _smooth_min(head, neck, 14.0)
    nose = _ellipsoid(p, (0.0, 79.0, -36.0), (11.0, 13.0, 18.0))
    head = _smooth_min(head, nose, 8.0)
    ears = _ellipsoid(m, (69.0, -10.0, -20.0), (6.0, 13.0, 17.0))
    return _smooth_min(head, ears, 5.0)


def _outer_layers(m: Array, head: Array, cavity: Array, width: float) -> list[tuple[str, Array]]:
    """Layers outside the brain for mirrored template points (3, N), bottom first."""
    x, y, z = m
    # Streaks of fat between the muscles keep the face and neck from being a flat grey.
    streaks = 4.0 * np.sin(x / 6.0 + 0.5) * np.sin(y / 9.0) * np.cos(z / 11.0)
    airway = np.minimum(
        _ellipsoid(m, (6.0, 52.0, -34.0), (5.0, 24.0, 14.0)),
        _ellipsoid(m, (0.0, 16.0, -76.0), (9.0, 7.0, 34.0)),
    )
    sinus = np.minimum(
        _ellipsoid(m, (25.0, 56.0, -44.0), (11.0, 13.0, 13.0)),
        _ellipsoid(m, (0.0, 22.0, -22.0), (9.0, 10.0, 7.0)),
    )
    jaw = np.maximum(np.abs(_ellipsoid(m, (0.0, 20.0, -92.0), (42.0, 54.0, 26.0))) - 3.0, -y)
    return [
        ("fat", smooth_step(head, width)),
        ("muscle", smooth_step(head + SCALP_MM + 2.0 + streaks, width)),
        ("bone", smooth_step(jaw, width)),
        ("bone", smooth_step(cavity - CSF_MM - SKULL_MM, width)),
        ("orbit", smooth_step(_ellipsoid(m, (29.0, 52.0, -16.0), (17.0, 25.0, 14.0)), width)),
        ("airway", smooth_step(np.minimum(airway, sinus), width)),
        ("eye", smooth_step(_ellipsoid(m, (30.0, 64.0, -16.0), (12.0, 12.0, 12.0)), width)),
        ("csf", smooth_step(cavity - CSF_MM, width)),
    ]


def _brain_layers(
    m: Array, side: Array, parts: dict[str, Array], anatomy: Anatomy, width: float
) -> list[tuple[str, Array]]:
    """Layers of the brain for mirrored template points (3, N), bottom first."""
    cerebellum, stem = parts["cerebellum"] + 1.0, parts["stem"]
    hull = np.maximum(parts["cerebrum"] + 1.0, 3.0 - cerebellum)
    surface = _cerebral_surface(m, side, hull, anatomy)
    # Folia of the cerebellum: thin, nearly horizontal leaves around a white core.
    leaves = 2.2 * np.sin(m[2] / 2.6 + 0.05 * m[1])
    thalamus = _ellipsoid(m, (11.0, -11.0, 11.0), (8.0, 13.0, 8.0))
    striatum = _ellipsoid(m, (25.0, 6.0, 9.0), (6.0, 19.0, 10.0))
    caudate = _ellipsoid(m, (14.0, 17.0, 15.0), (4.5, 11.0, 8.0))
    deep = np.minimum(np.minimum(thalamus, striatum), caudate)
    hippocampi = smooth_step(_hippocampi(m, side, anatomy), width)
    fourth = _ellipsoid(m, (0.0, -29.0, -32.0), (6.0, 4.0, 8.0))
    return [
        ("grey", smooth_step(cerebellum, width)),
        ("white", smooth_step(cerebellum + 9.0 + leaves, width)),
        ("grey", smooth_step(surface, width)),
        ("white", smooth_step(surface + anatomy.cortex_mm, width)),
        ("brainstem", smooth_step(stem, width)),
        ("deep_grey", smooth_step(deep, width)),
        ("csf", smooth_step(fourth, width)),
        ("ventricles", smooth_step(_ventricles(m, side, anatomy), width)),
        ("hippocampus_left", np.where(side < 0, hippocampi, 0.0)),
        ("hippocampus_right", np.where(side > 0, hippocampi, 0.0)),
    ]


def _fractions(p: Array, m: Array, anatomy: Anatomy, width: float) -> dict[str, Array]:
    """Fractions (n,) at template points ``p`` (3, n) and their mirror images ``m``."""
    parts = _cavity(m)
    cavity = _smooth_min(parts["cerebrum"], parts["cerebellum"], 6.0)
    cavity = _smooth_min(cavity, parts["stem"] - 1.5, 6.0)
    head = _head(p, m, cavity)
    n = p.shape[1]
    # Air and skull fill most of the field of view: evaluate the rest where it can matter.
    near = np.flatnonzero(head < width)
    layers = _outer_layers(m[:, near], head[near], cavity[near], width)
    out = {name: np.zeros(n) for name, _ in layers}
    for name, share in _compose(layers, near.size).items():
        out[name][near] = share
    inside = np.flatnonzero(cavity < CSF_MM + width)
    side = np.where(p[0, inside] < 0.0, -1.0, 1.0)
    inner = {name: level[inside] for name, level in parts.items()}
    layers = _brain_layers(m[:, inside], side, inner, anatomy, width)
    brain = _compose(layers, inside.size)
    rest = np.maximum(1.0 - sum(brain.values()), 0.0)
    for share in out.values():
        share[inside] *= rest
    for name, share in brain.items():
        out.setdefault(name, np.zeros(n))[inside] += share
    return out


def tissue_fractions(points: Array, anatomy: Anatomy, width: float) -> dict[str, Array]:
    """Partial-volume fractions at ``points``.

    ``points`` is (3, N) in head-frame RAS mm, ``width`` the width in mm of the soft boundary
    (about one voxel). Returns arrays (N,) in 0..1 by the names of ``CONTRAST``; what is
    missing to 1 is air.
    """
    p, m = _template(points, anatomy)
    # A generous hull around every head: beyond it there is only air.
    x, y, z = m[0] / 92.0, m[1] / 108.0, np.maximum(m[2] + 10.0, 0.0) / 112.0
    hull = np.flatnonzero(x * x + y * y + z * z < 1.0)
    out = {name: np.zeros(p.shape[1]) for name in CONTRAST}
    # Pieces that fit the processor's cache take half the time.
    for i in range(0, hull.size, _PIECE):
        piece = hull[i : i + _PIECE]
        for name, share in _fractions(p[:, piece], m[:, piece], anatomy, width).items():
            out[name][piece] = share
    return out


def intensities(fractions: dict[str, Array]) -> Array:
    """Noise-free T1-weighted intensity (N,), in units of the stored integers."""
    return WHITE_MATTER * sum(CONTRAST[name] * share for name, share in fractions.items())


def label_map(fractions: dict[str, Array]) -> NDArray[np.uint8]:
    """Region labels (N,) of ``LABELS``: the largest fraction of a voxel at least half brain.

    Ventricles and hippocampi take a voxel when they fill half of it; grey and white matter
    share the rest.
    """
    grey = fractions["grey"] + fractions["deep_grey"]
    white = fractions["white"]
    labels = np.where(grey + white >= 0.5, np.where(grey >= white, 4, 5), 0).astype(np.uint8)
    for value in (1, 2, 3):
        labels[fractions[LABELS[value]] >= 0.5] = value
    return labels


def _box(low: tuple[float, ...], high: tuple[float, ...], step: float) -> Array:
    """Centres (3, N) of cubes of edge ``step`` mm that fill the box."""
    axes = [np.arange(a + step / 2, b, step) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)


def region_volumes(
    anatomy: Anatomy, ventricle_step: float = 3.0, hippocampus_step: float = 1.8
) -> dict[str, float]:
    """True volumes in mm3 of ventricles and hippocampi, summed on grids finer than any scan.

    Keys: ``ventricles_mm3``, ``hippocampus_left_mm3``, ``hippocampus_right_mm3``. They belong
    to the patient, not to a scan: neither the voxel grid nor noise enters. The default steps
    (mm) are within 2 % of the limit of fine steps.
    """
    points = _box((-55.0, -70.0, -30.0), (55.0, 55.0, 48.0), ventricle_step)
    p, m = _template(points, anatomy)
    side = np.sign(p[0])
    # A step narrower than a cube: rounding the surface off would swell thin tubes.
    # No horn reaches the corners of the box.
    near = np.flatnonzero(_ellipsoid(m, (0.0, -8.0, 6.0), (52.0, 66.0, 50.0)) < 0.0)
    m, side = m[:, near], side[near]
    inside = smooth_step(_ventricles(m, side, anatomy), 0.3 * ventricle_step)
    inside *= 1.0 - smooth_step(_hippocampi(m, side, anatomy), 0.3 * ventricle_step)
    volumes = {"ventricles_mm3": float(inside.sum()) * ventricle_step**3}
    step = hippocampus_step
    for name, sign in (("left", -1.0), ("right", 1.0)):
        low, high = sorted((sign * 10.0, sign * 43.0))
        p, m = _template(_box((low, -42.0, -30.0), (high, 18.0, 9.0), step), anatomy)
        level = _hippocampi(m, np.sign(p[0]), anatomy)
        volumes[f"hippocampus_{name}_mm3"] = float(smooth_step(level, 0.3 * step).sum()) * step**3
    return volumes
