"""Which metric sees which fault, 50 people a side, in docs/benchmarks.md.

    SYNTHMED_REAL_DATA=... python tests/benchmarks/faults.py

Real scans pose as synthetic ones, spoilt in one way each. People are drawn anew into holdout and
cohort each time, beside one of `TAUGHT` sets of people trained on. A figure raises the alarm beyond
the 95 % quantile of what it was over draws without any fault, so that every column has about 5 % of
false alarms (`copies`, which is mostly 0, has fewer; fresh draws without any show how many); a
cell holds the share of draws with the fault that raise it. No metric's own interval or permutation
is asked here: this is what a figure can see at best with so many people.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.restoration import estimate_sigma

from synthmed.metrics import anatomy, kernels
from synthmed.metrics.adjusted import encoded, without_labels
from synthmed.metrics.authenticity import authentic_share
from synthmed.metrics.blocks import smallest
from synthmed.metrics.condition import balanced
from synthmed.metrics.descriptor import N_BINS, RESOLUTION, describe
from synthmed.metrics.discriminator import places, told_apart
from synthmed.metrics.frechet import frechet, principal_axes
from synthmed.metrics.intensity import cdfs
from synthmed.metrics.prdc import prdc
from synthmed.metrics.reader import fit
from synthmed.metrics.stats import Ints, auc
from synthmed.metrics.utility import Judge, scored
from synthmed.metrics.vendi import vendi
from synthmed.types import Labels
from tests.benchmarks.cohorts import NONE, publish, real_data
from tests.benchmarks.lookups import (
    Likeness,
    among,
    between,
    differences,
    flagged,
    likenesses,
    segmented,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"
SIDE = 50
"""People in the cohort, and held out."""
NULLS, DRAWS = 200, 60
"""Draws without a fault, and with each."""
TAUGHT = 8
"""Sets of people who are trained on, of which a draw takes one: each teaches one segmenter."""
PAIRS = 3
"""Pairs a person whose difference is known."""
PHANTOMS, GRID = 240, 32
TORQUE = 1.0
"""Standard deviations of the phantoms' asymmetry that are added to it. As they are made, no side is
the more frequent one and mirroring changes nothing; with these, five in six lean to one side."""
HIPPOCAMPUS = (40, 56, 40)

Volume = npt.NDArray[Any]
Table = Mapping[str, npt.NDArray[Any]]
"""Descriptors, small images, cumulative intensities, region volumes, labels, and for `Known` the
person, the row of the scan and what the segmenters see in it; a person a row."""
AGES = (45.0, 95.0)


@dataclass(frozen=True)
class Known:
    """What is worked out once for all draws.

    Args:
        taught: sets of people trained on.
        views: of the likeness of scans.
        scans: of every person, as they are.
        pools: fault to differences of pairs of people.
        no_part: fault to figures that it says nothing of.
    """

    taught: Sequence[Ints]
    views: Sequence[Likeness]
    scans: Sequence[Volume]
    pools: Mapping[str, dict[tuple[int, int], float]]
    no_part: Mapping[str, Sequence[str]]


def blurred(x: Volume, rng: np.random.Generator) -> Volume:
    return ndimage.gaussian_filter(x, 0.4)


def noisier(x: Volume, rng: np.random.Generator) -> Volume:
    """Half as much noise again, as skimage estimates what is there."""
    return x + np.sqrt(1.5**2 - 1) * estimate_sigma(x) * rng.standard_normal(x.shape)


def checked(x: Volume, rng: np.random.Generator) -> Volume:
    """Neighbouring voxels 2 % of the range apart."""
    return x + 0.01 * (1 - 2 * (np.indices(x.shape).sum(axis=0) % 2))


def scaled(x: Volume, rng: np.random.Generator) -> Volume:
    middle = (np.array(x.shape) - 1) / 2
    return ndimage.affine_transform(x, np.eye(3) / 1.03, middle - middle / 1.03, order=1)


def contrasted(x: Volume, rng: np.random.Generator) -> Volume:
    """5 % more contrast of tissue about its mean."""
    tissue = x > anatomy.FOREGROUND
    mean = x[tissue].mean()
    return np.where(tissue, mean + 1.05 * (x - mean), x)


def flipped(x: Volume, rng: np.random.Generator) -> Volume:
    return x[::-1]


CHANGES: dict[str, Callable[[Volume, np.random.Generator], Volume]] = {
    "blur of 0.4 voxel": blurred,
    "noise + 50 %": noisier,
    "checkerboard of 2 %": checked,
    "3 % larger": scaled,
    "contrast + 5 %": contrasted,
    "left and right swapped": flipped,
}
"""What is done to every scan."""
REGION = "a region 10 % larger"
NOTHING = "nothing: fresh draws"
"""The control: what raises the alarm where no fault is."""
COLLAPSE, COPIES, DROPPED = "five people over and over", "copies of train", "a subgroup missing"
NO_PART = {
    # in its place are people, some of whom are trained on
    DROPPED: ("authenticity", "copies", "membership_auc", "segmentability"),
}
"""Figures that a fault, as it is made here, says nothing of."""


def phantoms(
    torque: float = 0.0, grid: int | None = None, n: int = PHANTOMS
) -> tuple[list[Volume], list[Volume], list[Labels], list[tuple[Volume, Volume]]]:
    """Scans, masks of the ventricles, labels, and both again with larger ventricles.

    Args:
        torque: standard deviations that are added to their asymmetry.
        grid: voxels a side, by default `GRID`.
        n: people.
    """
    sys.path.insert(0, str(ROOT / "sample_data"))
    from cohort import make_patient, render  # type: ignore[import-not-found,unused-ignore]

    scans, masks, labels, grown = [], [], [], []
    for i in range(n):
        patient = make_patient(11, i)
        patient = replace(patient, anatomy=lopsided(patient.anatomy, torque))
        # its radius: the length of the ventricles stays
        larger = replace(patient.anatomy, ventricle=patient.anatomy.ventricle * 1.1**0.5)
        pairs = []
        for who in (patient, replace(patient, anatomy=larger)):
            scan = render(who, 1, "bids", grid or GRID)
            image = nib.as_closest_canonical(nib.Nifti1Image(scan.voxels, scan.affine))
            parts = nib.as_closest_canonical(nib.Nifti1Image(scan.labels, scan.affine))
            x = np.asarray(image.dataobj, dtype=np.float32)
            pairs.append((x / np.percentile(x, 99.5), np.asarray(parts.dataobj) == 1))
        scans.append(pairs[0][0])
        masks.append(pairs[0][1][None])
        labels.append({"kind": patient.diagnosis, "age": patient.age})
        grown.append((pairs[1][0], pairs[1][1][None]))
    return scans, masks, labels, grown


def lopsided(anatomy: Any, torque: float) -> Any:
    """An anatomy of sample_data with its asymmetry, and what follows from it, moved to one side."""
    tilt = np.exp(0.5 * 0.03 * torque)
    return replace(
        anatomy,
        asymmetry=anatomy.asymmetry + torque,
        hippocampus_left=anatomy.hippocampus_left / tilt,
        hippocampus_right=anatomy.hippocampus_right * tilt,
    )


def hippocampus(root: Path) -> tuple[list[Volume], list[Volume], list[Labels], None]:
    """The first scan of each person, its mask's two labels, and the class of its volume."""
    import pandas as pd

    table = pd.read_csv(root / "hippocampus" / "participants.tsv", sep="\t", dtype=str)
    table = table.drop_duplicates("subject_group")
    scans, masks = [], []
    for name in table["image"]:
        image = nib.as_closest_canonical(nib.load(root / "hippocampus" / name))
        seg = next((root / "hippocampus" / "segs").glob(f"{Path(name).name[:9]}*"))
        parts = nib.as_closest_canonical(nib.load(seg))
        x, y = (centred(np.asarray(i.dataobj, dtype=np.float32)) for i in (image, parts))
        scans.append(x / np.percentile(x, 99.5))
        masks.append(np.stack([y == 1, y == 2]))
    return scans, masks, [{"kind": kind} for kind in table["volume_class"]], None


def centred(x: Volume) -> Volume:
    """A volume on the grid of the cohort, cut or filled with zeros about its middle."""
    out = np.zeros(HIPPOCAMPUS, np.float32)
    take, put = [], []
    for n, wanted in zip(x.shape, HIPPOCAMPUS, strict=True):
        kept = min(n, wanted)
        take.append(slice((n - kept) // 2, (n - kept) // 2 + kept))
        put.append(slice((wanted - kept) // 2, (wanted - kept) // 2 + kept))
    out[tuple(put)] = x[tuple(take)]
    return out


def tabled(scans: Sequence[Volume], masks: Sequence[Volume], labels: Sequence[Labels]) -> Table:
    """What the figures are made of."""
    block = np.stack(scans)[:, None].astype(np.float16).astype(np.float32)
    return {
        "descriptor": np.concatenate(
            [describe(block[i : i + 20]) for i in range(0, len(block), 20)]
        ),
        "small": smallest(block, [min(12, n) for n in block.shape[2:]]),
        "cdf": np.concatenate([cdfs(block[i : i + 20], 1000) for i in range(0, len(block), 20)]),
        "volume": np.stack([m.sum(axis=(1, 2, 3)) for m in masks]).astype(np.float64),
        "kind": np.array([x["kind"] for x in labels]),
        "labels": encoded(
            labels,
            {"kind": sorted({str(x["kind"]) for x in labels})},
            {"age": AGES} if "age" in labels[0] else {},
        ),
    }


def figures(
    s: Table, h: Table, t: Table, fault: str, which: int, known: Known, rng: np.random.Generator
) -> dict[str, float]:
    """Every figure of a cohort, turned so that more is worse.

    Args:
        s: the cohort.
        h: people held out.
        t: people trained on.
        fault: of the cohort.
        which: of the sets of people trained on.
        known: what is looked up.
        rng: for cross-validation.
    """
    mean, sd = t["descriptor"].mean(axis=0), t["descriptor"].std(axis=0)
    scale = np.maximum(sd, RESOLUTION)
    x, y, z = ((v["descriptor"] - mean) / scale for v in (s, h, t))
    d = {a + b: cdist(u, v) for a, u in zip("xyz", (x, y, z), strict=True)
         for b, v in zip("xyz", (x, y, z), strict=True)}  # fmt: skip
    gamma = 1 / (2 * np.median(d["zz"][np.triu_indices(len(z), 1)]) ** 2)
    k = {pair: np.exp(-gamma * distance**2) for pair, distance in d.items()}
    cubic = {a + b: (u @ v.T / u.shape[1] + 1) ** 3
             for a, u in zip("xy", (x, y), strict=True)
             for b, v in zip("xy", (x, y), strict=True)}  # fmt: skip
    axes = principal_axes(z, 5)
    placed = places(t["small"], 30)
    u, v = (placed(part["small"]) for part in (s, h))
    overlap = dict(zip(("precision", "recall", "density", "coverage"),
                       prdc(d["yy"], d["xx"], d["yx"], 5), strict=True))  # fmt: skip
    m = min(len(x), len(z))  # rows are in random order; the score grows with their number
    variety = abs(np.log(vendi(k["xx"][:m, :m]) / vendi(k["zz"][:m, :m])))
    reader = fit(t["small"], t["kind"], np.ones(len(t["kind"])), "category", 40)
    judge = Judge(h["kind"], "category", 1, rng)
    real, made = judge.figures(scored(reader, h["small"], judge))[0], judge.guess
    if len(set(s["kind"])) > 1:  # one category teaches nothing
        writer = fit(s["small"], s["kind"], np.ones(len(s["kind"])), "category", 40)
        made = judge.figures(scored(writer, h["small"], judge))[0]
    pool = known.pools[fault if fault in known.pools else ""]
    if fault == COLLAPSE:  # of whom few pairs are known
        pool = between(known.scans, s["person"])
    variety_of_pairs = among(pool, s["person"])
    most = known.views[0].scores[s["row"]].max(axis=0)
    left = without_labels(t["labels"], t["volume"])
    assert left is not None
    given = [left(v["labels"], v["volume"]) for v in (s, h)]
    gap = 10 / np.log(10) * (s["descriptor"].mean(axis=0) - h["descriptor"].mean(axis=0))[:N_BINS]
    out = {
        "mmd2": kernels.mmd2(k["xx"], k["yy"], k["xy"]),
        "mmd2, regions": joint(*(np.log(v["volume"]) for v in (s, h, t))),
        "kid": kernels.mmd2(cubic["xx"], cubic["yy"], cubic["xy"]),
        "frechet": frechet(x @ axes, y @ axes),
        **{name: -value for name, value in overlap.items()},
        "vendi": variety,
        "ms_ssim_diversity": abs(variety_of_pairs - among(known.pools[""], t["person"])),
        "intensity_w1": float(np.abs(s["cdf"].mean(axis=0) - h["cdf"].mean(axis=0)).mean()),
        "spectrum_distance": float(np.sqrt(np.mean(gap**2))),
        "region_volume_smd": max(
            anatomy.smd(a, b)[0] for a, b in zip(s["volume"].T, h["volume"].T, strict=True)
        ),
        "region_volume_smd, given labels": max(
            anatomy.smd(a, b)[0] for a, b in zip(given[0].T, given[1].T, strict=True)
        ),
        "region_volume_smd, worst label": worst_label(s, h),
        "segmentability": h["dice"][:, which].mean() - s["dice"][:, which].mean(),
        "condition_accuracy": -balanced(s["kind"], reader.predict(s["small"]))[0],
        "discriminator_auc": auc(*told_apart(np.hstack([x, u]), np.hstack([y, v]), 5, 10.0, rng)),
        "auc_tstr_minus_trtr": real - made,
        "authenticity": -authentic_share(d["xz"], d["zz"]),
        "copies": flagged(known.views, t["row"], h["row"], s["row"]),
        "membership_auc": auc(most[t["person"]], most[h["person"]]),
    }
    return {name: float(value) for name, value in out.items()}


def joint(s: Volume, h: Volume, t: Volume) -> float:
    """mmd2 of the log volumes of all regions together, as `spaces.RegionVolumes` has them."""
    scale = np.maximum(t.std(axis=0), anatomy.LEAST_SPREAD)
    x, y, z = (v / scale for v in (s, h, t))
    gamma = 1 / (2 * np.median(cdist(z, z)[np.triu_indices(len(z), 1)]) ** 2)
    return kernels.mmd2(*(np.exp(-gamma * cdist(a, b) ** 2) for a, b in ((x, x), (y, y), (x, y))))


def worst_label(s: Table, h: Table) -> float:
    """The largest difference of a region in people of one kind, of whom either side has three."""
    out = 0.0
    for kind in set(h["kind"]):
        a, b = (t["volume"][t["kind"] == kind] for t in (s, h))
        if min(len(a), len(b)) >= 3:
            out = max(out, *(anatomy.smd(x, y)[0] for x, y in zip(a.T, b.T, strict=True)))
    return out


def found(
    tables: Mapping[str, Table], known: Known, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Fault to figure to the share of draws that raise the alarm."""
    kind = tables[""]["kind"]
    n, n_kinds, lost = len(kind), len(set(kind)), min(kind)

    def drawn(fault: str) -> dict[str, float]:
        which = int(rng.integers(len(known.taught)))
        train = rng.permutation(known.taught[which])
        order = rng.permutation(np.setdiff1d(np.arange(n), train))
        cohort, holdout = order[:SIDE], order[SIDE : 2 * SIDE]
        own = tables[fault if fault in tables else ""]
        if fault == COLLAPSE:
            cohort = rng.choice(cohort[:5], SIDE)
        elif fault == COPIES:
            cohort = rng.choice(train, SIDE, replace=len(train) < SIDE)
        elif fault == DROPPED:
            rest = np.concatenate([cohort, train])
            cohort = rest[kind[rest] != lost][:SIDE]
        rows = lambda table, at: {name: v[at] for name, v in table.items()}  # noqa: E731
        made = rows(own, cohort)
        if fault == DROPPED:  # asked for as often as ever, and shown as somebody of another kind
            asked = rng.permutation(len(cohort))[: round(np.mean(kind == lost) * len(cohort))]
            made["kind"][asked] = lost
            made["labels"][asked, 1:n_kinds] = tables[""]["labels"][kind == lost][0, 1:n_kinds]
        if fault in (COLLAPSE, COPIES):  # never twice the same bytes: a copy has noise of its own
            made["descriptor"] = made["descriptor"] + 0.02 * RESOLUTION * rng.standard_normal(
                made["descriptor"].shape
            )
        held, real = rows(tables[""], holdout), rows(tables[""], train)
        return figures(made, held, real, fault, which, known, rng)

    nulls = [drawn("") for _ in range(NULLS)]
    limits = {name: float(np.quantile([f[name] for f in nulls], 0.95)) for name in nulls[0]}
    faults = [NOTHING, *(f for f in tables if f), COLLAPSE, COPIES, DROPPED]
    out = {}
    for fault in faults:
        seen = [drawn(fault) for _ in range(NULLS if fault == NOTHING else DRAWS)]
        out[fault] = {m: float(np.mean([f[m] > limits[m] for f in seen])) for m in limits}
        out[fault] |= dict.fromkeys(known.no_part.get(fault, ()), math.nan)
        print(fault, out[fault], file=sys.stderr)
    return out


def matrix(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Faults a row, figures a column, in per cent; at least 95 is bold."""
    names = list(next(iter(shares.values())))
    lines = ["| | " + " | ".join(f"`{n}`" for n in names) + " |", "|---|" + "---|" * len(names)]
    for fault, row in shares.items():
        cells = [
            NONE if math.isnan(v) else f"**{100 * v:.0f}**" if v >= 0.95 else f"{100 * v:.0f}"
            for v in row.values()
        ]
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spoilt(
    scans: Sequence[Volume], masks: Sequence[Volume], fault: str, rng: np.random.Generator
) -> tuple[list[Volume], Sequence[Volume]]:
    """Every scan with its mask, changed."""
    change = CHANGES[fault]
    moved = [m[:, ::-1] for m in masks] if change is flipped else masks
    if change is scaled:
        moved = [np.stack([scaled(p.astype(np.float32), rng) for p in m]) for m in masks]
    return [change(x, rng) for x in scans], moved


def of_cohort(cohort: Any, seed: int) -> str:
    """The matrix of a cohort."""
    scans, masks, labels, grown = cohort
    rng = np.random.default_rng(seed)
    n = len(scans)
    versions: dict[str, tuple[Sequence[Volume], Sequence[Volume]]] = {"": (scans, masks)}
    versions |= {fault: spoilt(scans, masks, fault, rng) for fault in CHANGES}
    if grown is not None:
        versions[REGION] = [x for x, _ in grown], [m for _, m in grown]
    taught = [rng.permutation(n)[2 * SIDE :] for _ in range(TAUGHT)]
    known = Known(
        taught=taught,
        views=likenesses([own for own, _ in versions.values()]),
        scans=scans,
        pools={fault: differences(own, PAIRS * n, rng) for fault, (own, _) in versions.items()},
        # where nobody grew no mask did
        no_part=NO_PART | ({REGION: ("segmentability",)} if grown is None else {}),
    )
    seen = segmented(list(versions.values()), taught, rng)
    tables: dict[str, Table] = {
        fault: {
            **tabled(own, parts, labels),
            "person": np.arange(n),
            "row": k * n + np.arange(n),
            "dice": seen[k],
        }
        for k, (fault, (own, parts)) in enumerate(versions.items())
    }
    if grown is None:  # the mask alone: nobody can warp a real scan as if it had grown
        tables[REGION] = {**tables[""], "volume": tables[""]["volume"] * 1.1}
    return matrix(found(tables, known, rng))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the matrices and put them into the page."""
    parser = argparse.ArgumentParser(description="Which metric sees which fault.")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    root = real_data()
    leaning = of_cohort(phantoms(TORQUE), 0)
    texts = [f"phantoms: {PHANTOMS} people; per cent of {DRAWS} draws\n\n{leaning}"]
    real = hippocampus(root)
    texts.append(f"hippocampus: {len(real[0])} people\n\n{of_cohort(real, 1)}")
    text = "\n\n".join(texts)
    publish(options.page, f"`python tests/benchmarks/faults.py`:\n\n{text}", BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
