"""Patients of a synthetic cohort: labels, invented identities, scans, digests.

Everything about patient ``index`` follows from ``(seed, index)`` alone, so a larger cohort
begins with the same patients as a smaller one.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from anatomy import (
    FOV_MM,
    LATENTS,
    WHITE_MATTER,
    Anatomy,
    intensities,
    label_map,
    region_volumes,
    tissue_fractions,
)
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

COLUMNS = (
    "participant_id",
    "diagnosis",
    "age",
    "sex",
    "ventricles_mm3",
    "hippocampus_left_mm3",
    "hippocampus_right_mm3",
)
"""Columns of ``participants.tsv``."""

EXTRA_INDEX = 904_500
"""First index of the extra patients whose files are broken on purpose."""

# Streams of random numbers of one patient; a stream can grow without moving the others.
_BODY, _IDENTITY, _SCAN, _GEOMETRY = range(4)
# Streams of whole blocks of patients, out of the way of patient streams.
_LABEL_BLOCK, _SESSION_BLOCK, _BIDS_BLOCK, _DICOM_BLOCK, _RESCALE_BLOCK = range(100, 105)

_SURNAME_HEADS = (
    "Quill", "Bracken", "Thistle", "Ember", "Wolder", "Hazel", "Marrow", "Pellin", "Dravin",
    "Skerry", "Osmer", "Lindle", "Fennic", "Corvel", "Yarrow", "Tamble", "Ravel", "Vossel",
    "Grimble", "Ashen",
)  # fmt: skip
_SURNAME_TAILS = (
    "feather", "mantle", "wicke", "thorpe", "holme", "brooke", "garth", "mereth", "stead",
    "ledge", "combe", "shawe", "burne", "croft", "dayle", "fenning",
)  # fmt: skip
_GIVEN = {
    "F": ("Ottavina", "Callistra", "Dorvinia", "Elswytha", "Marisolde", "Perenella", "Isaveth",
          "Rosamunda", "Tiverine", "Wilhelmira"),
    "M": ("Berenhold", "Fendrick", "Gasparin", "Leofwulf", "Ambrosien", "Thaddeon", "Corvinus",
          "Hartwigg", "Osbertus", "Valdemaro"),
}  # fmt: skip
_PHYSICIANS = (
    "Zanderfoort", "Mickelwaite", "Abernethoe", "Yllingworth", "Krzepinski", "Duvallonne",
)  # fmt: skip
_INSTITUTIONS = (
    ("Larkspur Hollow Infirmary", "14 Tanglewood Causeway, Larkspur Hollow"),
    ("Wendreda Imaging Pavilion", "3 Saltmarsh Terrace, Eastwendre"),
    ("Copperbeech County Hospital", "200 Copperbeech Ring, Northmoorby"),
    ("Gullhaven Neuro Institute", "9 Lighthouse Parade, Gullhaven"),
)
_STREETS = ("Cinderpath Lane", "Foxglove Crescent", "Millrace Alley", "Juniper Steps")

_BIDS_CARDS = ("RAS", "RAS", "RAS", "RAS", "LAS", "LAS", "permuted", "oblique")
_DICOM_CARDS = (
    "axial", "axial", "axial", "axial", "axial", "sagittal", "coronal", "oblique",
)  # fmt: skip
_PERMUTED = (("P", "S", "R"), ("S", "L", "A"), ("A", "I", "L"), ("L", "P", "I"))
_DICOM_AXES = {
    "axial": ("L", "P", "S"),
    "oblique": ("L", "P", "S"),
    "sagittal": ("P", "I", "L"),
    "coronal": ("L", "I", "P"),
}
_DIRECTIONS = {
    "R": (1.0, 0.0, 0.0),
    "L": (-1.0, 0.0, 0.0),
    "A": (0.0, 1.0, 0.0),
    "P": (0.0, -1.0, 0.0),
    "S": (0.0, 0.0, 1.0),
    "I": (0.0, 0.0, -1.0),
}


@dataclass(frozen=True)
class Identity:
    """An invented person. Any resemblance to a living one is coincidence."""

    surname: str
    given: str
    number: int
    patient_id: str
    accession: str
    physician: str
    institution: str
    institution_address: str
    home_address: str
    station: str
    comment: str
    birth_date: datetime.date
    study_dates: tuple[datetime.date, ...]

    @property
    def name(self) -> str:
        """DICOM person name, ``Surname^Given``."""
        return f"{self.surname}^{self.given}"


@dataclass(frozen=True)
class Patient:
    """One patient: labels, identity, anatomy and how the scans are stored."""

    seed: int
    index: int
    diagnosis: str
    age: float
    sex: str
    sessions: int
    identity: Identity
    anatomy: Anatomy
    bids_variant: str
    dicom_plane: str
    rescale: tuple[float, float]

    @property
    def participant_id(self) -> str:
        """BIDS identifier, ``sub-<Surname><number>``."""
        return f"sub-{self.identity.surname}{self.identity.number}"

    def row(self) -> dict[str, str]:
        """Row of ``participants.tsv``: text by the names of ``COLUMNS``."""
        volumes = {k: f"{v:.1f}" for k, v in region_volumes(self.anatomy).items()}
        return {
            "participant_id": self.participant_id,
            "diagnosis": self.diagnosis,
            "age": f"{self.age:.1f}",
            "sex": self.sex,
        } | volumes


@dataclass(frozen=True)
class Scan:
    """One acquisition as stored.

    ``voxels`` int16 and ``labels`` uint8 have shape (i, j, k); ``affine`` (4, 4) maps voxel
    indices to RAS+ mm. Intensity is ``voxels * slope + intercept``.
    """

    voxels: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]


def _rng(seed: int, index: int, stream: int, session: int = 0) -> np.random.Generator:
    entropy = np.random.SeedSequence((seed, index, stream, session))
    return np.random.Generator(np.random.PCG64(entropy))


def _deal(seed: int, index: int, stream: int, cards: Sequence) -> object:
    """Card of patient ``index``: every block of ``len(cards)`` patients gets each card once."""
    block, place = divmod(index, len(cards))
    return cards[_rng(seed, block, stream).permutation(len(cards))[place]]


def _identity(seed: int, index: int, age: float, sex: str, sessions: int) -> Identity:
    rng = _rng(seed, index, _IDENTITY)
    count = len(_SURNAME_HEADS) * len(_SURNAME_TAILS)
    surnames = _rng(seed, 0, 99).permutation(count)
    head, tail = divmod(int(surnames[index % count]), len(_SURNAME_TAILS))
    surname = _SURNAME_HEADS[head] + _SURNAME_TAILS[tail]
    given = _GIVEN[sex][rng.integers(len(_GIVEN[sex]))]
    institution, address = _INSTITUTIONS[rng.integers(len(_INSTITUTIONS))]
    first = datetime.date(2008, 1, 7) + datetime.timedelta(days=int(rng.integers(3200)))
    dates = [first]
    for _ in range(sessions - 1):
        dates.append(dates[-1] + datetime.timedelta(days=int(rng.integers(300, 480))))
    house = int(rng.integers(2, 190))
    street = _STREETS[rng.integers(len(_STREETS))]
    return Identity(
        surname=surname,
        given=given,
        # 37 and 9000 have no common factor: no number comes twice in 4500 patients, and the
        # extra ones begin half a turn away.
        number=1000 + (37 * index + 411 * seed) % 9000,
        patient_id=f"LHX{int(rng.integers(10**6, 10**7))}",
        accession=f"ACQ{int(rng.integers(10**8, 10**9))}",
        physician=_PHYSICIANS[rng.integers(len(_PHYSICIANS))],
        institution=institution,
        institution_address=address,
        home_address=f"{house} {street}",
        station=f"MRSUITE{int(rng.integers(10, 99))}",
        comment=f"{given} {surname} known to clinic, daughter phones on Tuesdays",
        birth_date=first - datetime.timedelta(days=round(age * 365.25) + 20),
        study_dates=tuple(dates),
    )


def make_patient(seed: int, index: int) -> Patient:
    """Draw patient ``index`` (0-based) of the cohort ``seed``."""
    labels = [(d, s) for d in ("control", "atrophy") for s in ("F", "M")]
    diagnosis, sex = _deal(seed, index, _LABEL_BLOCK, labels)
    sessions = _deal(seed, index, _SESSION_BLOCK, (1, 1, 1, 1, 1, 1, 1, 2))
    rng = _rng(seed, index, _BODY)
    age = round(float(rng.uniform(45.0, 95.0)), 1)
    latents = rng.standard_normal(len(LATENTS))
    return Patient(
        seed=seed,
        index=index,
        diagnosis=diagnosis,
        age=age,
        sex=sex,
        sessions=sessions,
        identity=_identity(seed, index, age, sex, sessions),
        anatomy=Anatomy.from_latents(latents, diagnosis, age, sex),
        bids_variant=_deal(seed, index, _BIDS_BLOCK, _BIDS_CARDS),
        dicom_plane=_deal(seed, index, _DICOM_BLOCK, _DICOM_CARDS),
        rescale=_deal(
            seed, index, _RESCALE_BLOCK, ((1.0, 0.0), (1.0, 0.0), (1.0, -64.0), (2.0, -16.0))
        ),
    )


def make_patients(seed: int, count: int, broken: int = 0) -> tuple[list[Patient], list[Patient]]:
    """The ``count`` good patients and the ``broken`` extra ones of a cohort."""
    good = [make_patient(seed, i) for i in range(count)]
    return good, [make_patient(seed, EXTRA_INDEX + i) for i in range(broken)]


def planted_strings(patient: Patient, layout: str = "bids") -> list[str]:
    """Identity strings to be found in the source files of ``patient``; none is short.

    ``layout`` is ``bids`` or ``dicom``. NIfTI files must be decompressed before a search.
    """
    who = patient.identity
    strings = {
        who.surname,
        who.given,
        who.name,
        who.patient_id,
        who.accession,
        who.physician,
        who.institution,
        who.institution_address,
        who.home_address,
        who.station,
        who.comment,
    }
    dates = (who.birth_date, *who.study_dates)
    if layout == "bids":
        strings |= {patient.participant_id.removeprefix("sub-")}
        strings |= {date.isoformat() for date in dates}
    else:
        strings |= {date.strftime("%Y%m%d") for date in dates}
    return sorted(strings)


def make_affine(
    axes: Sequence[str], grid: int, rotation: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Affine (4, 4) from voxel indices to RAS+ mm for a cube of ``grid`` voxels an edge.

    ``axes`` names where each index grows, such as ("R", "A", "S"); ``rotation`` (3, 3) turns
    the whole grid. The centre of the field of view lies at the origin.
    """
    columns = np.array([_DIRECTIONS[a] for a in axes]).T * (FOV_MM / grid)
    if rotation is not None:
        columns = rotation @ columns
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = -columns @ np.full(3, (grid - 1) / 2.0)
    return affine


def scan_affine(patient: Patient, layout: str, grid: int) -> NDArray[np.float64]:
    """Affine (4, 4) with which ``patient`` is stored in ``layout`` (bids or dicom)."""
    rng = _rng(patient.seed, patient.index, _GEOMETRY)
    variant = patient.bids_variant if layout == "bids" else patient.dicom_plane
    axis = rng.standard_normal(3)
    angle = np.deg2rad(rng.uniform(5.0, 10.0))
    permuted = _PERMUTED[rng.integers(len(_PERMUTED))]
    rotation = None
    if variant == "oblique":
        rotation = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis)).as_matrix()
    if layout == "dicom":
        axes: Sequence[str] = _DICOM_AXES[variant]
    else:
        axes = permuted if variant == "permuted" else ("L" if variant == "LAS" else "R", "A", "S")
    return make_affine(axes, grid, rotation)


def render(patient: Patient, session: int, layout: str, grid: int) -> Scan:
    """Scan ``session`` (1-based) of ``patient`` on a cube of ``grid`` voxels an edge.

    The anatomy is evaluated at the world coordinates of the stored grid, so left stays left
    whatever the storage order. A second session has its own head position, bias and noise.
    """
    affine = scan_affine(patient, layout, grid)
    index = np.indices((grid, grid, grid), dtype=np.float64).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    rng = _rng(patient.seed, patient.index, _SCAN, session)
    turn = np.deg2rad(np.clip(rng.normal(0.0, 1.0, 3), -2.5, 2.5))
    shift = np.clip(rng.normal(0.0, 0.8, 3), -2.0, 2.0)
    bias = np.clip(rng.normal(0.0, 0.035, 3), -0.08, 0.08)
    sigma = 0.025 * WHITE_MATTER * rng.uniform(0.85, 1.15)
    head = Rotation.from_rotvec(turn).as_matrix().T @ (world - shift[:, None])
    fractions = tissue_fractions(head, patient.anatomy, FOV_MM / grid)
    # Receive field: stronger near some part of the coil, and brighter at the rim.
    x, y, z = world / (FOV_MM / 2.0)
    field = np.exp(bias[0] * z + bias[1] * y + bias[2] * (x * x + y * y + z * z - 0.5))
    noise = rng.standard_normal((2, head.shape[1])) * sigma
    magnitude = np.hypot(intensities(fractions) * field + noise[0], noise[1])
    slope, intercept = patient.rescale if layout == "dicom" else (1.0, 0.0)
    stored = np.clip(np.rint((magnitude - intercept) / slope), 0, 4095)
    shape = (grid, grid, grid)
    return Scan(
        voxels=stored.astype(np.int16).reshape(shape),
        labels=label_map(fractions).reshape(shape),
        affine=affine,
    )


def array_hash(array: NDArray[np.integer]) -> str:
    """SHA-256 of shape, type and values of an integer array, whatever its memory layout."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    head = f"{plain.shape} {plain.dtype.kind}{plain.dtype.itemsize} ".encode()
    return hashlib.sha256(head + plain.tobytes()).hexdigest()


def digest(arrays: Mapping[str, str], rows: Iterable[Mapping[str, str]]) -> str:
    """SHA-256 of a cohort.

    ``arrays`` holds ``array_hash`` by the name of every readable scan and label map (the broken
    files have no part in it), ``rows`` the table of labels. Neither order matters.
    """
    table = sorted(json.dumps(dict(row), sort_keys=True) for row in rows)
    lines = [f"{name} {arrays[name]}" for name in sorted(arrays)] + table
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
