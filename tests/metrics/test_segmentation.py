"""segmentability and dice_*: phantoms whose masks are known, and pairs that were planted wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import shift
from sklearn.metrics import f1_score

from synthmed.artifacts import ChannelInfo
from synthmed.config import Intensity
from synthmed.metrics import Segmentation, segmenter, taught
from synthmed.metrics.school import School
from synthmed.metrics.segmenter import Layout
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.types import Estimate
from tests.metrics import cohorts

GRID = (18, 20, 16)
CHANNELS = (
    ChannelInfo("T1w"),
    ChannelInfo("parts:front", mask="parts", label_value=1),
    ChannelInfo("parts:back", mask="parts", label_value=2),
)
QUICK = Segmentation(draws=1, seeds=1)


def phantoms(seed: int, n: int, prefix: str) -> Cases:
    """Two ellipsoids of different brightness in noise, each in its own place, size and shape."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(k, dtype=float) for k in GRID), indexing="ij")
    volumes = np.empty((n, 3, *GRID), np.float16)
    for i in range(n):
        image = np.full(GRID, 0.3)
        for channel, y, bright in ((1, 6.0, 0.9), (2, 14.0, 0.6)):
            middle = np.array([9.0, y, 8.0]) + rng.uniform(-2, 2, 3)
            radii = rng.uniform(2.5, 4.0, 3)
            inside = sum(
                ((a - m) / r) ** 2 for a, m, r in zip(axes, middle, radii, strict=True)
            ) < 1  # fmt: skip
            image[inside] = bright
            volumes[i, channel] = inside
        volumes[i, 2] *= 1 - volumes[i, 1]
        volumes[i, 0] = image + 0.1 * rng.standard_normal(GRID)
    names = np.array([f"{prefix}{i:03d}" for i in range(n)])
    return Cases(volumes, names, [{} for _ in names])


def changed(cases: Cases, channels: slice, to: np.ndarray) -> Cases:
    volumes = cases.volumes.copy()
    volumes[:, channels] = to
    return replace(cases, volumes=volumes)


def compared(train: Cases, holdout: Cases, synthetic: Cases, resamples: int = 100) -> Sides:
    return replace(cohorts.sides(train, holdout, synthetic, resamples), channels=CHANNELS)


def measured(given: Sides, metric: Segmentation = QUICK) -> dict[tuple[str, str | None], Estimate]:
    found = metric.estimate(given, Shared(given))
    out = {(e.name, e.slice): e for e in found}
    assert len(out) == len(found)
    return out


TRAIN, HOLDOUT = phantoms(1, 20, "t"), phantoms(2, 12, "h")
HONEST = phantoms(3, 16, "s")


@pytest.fixture(scope="module")
def honest() -> dict[tuple[str, str | None], Estimate]:
    return measured(compared(TRAIN, HOLDOUT, HONEST))


def test_planted_masks_are_recovered_in_scans_that_were_never_seen() -> None:
    given = compared(TRAIN, HOLDOUT, HONEST)
    layout = Layout.of(given)
    pairs = {
        side: [layout.split(s.astype(np.float32)) for s in cases.volumes]
        for side, cases in (("train", TRAIN), ("holdout", HOLDOUT))
    }
    lessons = [
        segmenter.lesson(
            segmenter.surroundings(x, layout.spacing_mm), y, layout, np.random.default_rng(i)
        )
        for i, (x, y) in enumerate(pairs["train"])
    ]
    basis = segmenter.Basis(lessons)
    model = segmenter.teach(basis, lessons, np.ones(len(lessons)), layout.sizes)
    scores = []
    for x, y in pairs["holdout"]:
        features = segmenter.surroundings(x, layout.spacing_mm)
        (seen,) = segmenter.read(basis, [model], features, layout.sizes)
        scores.append(segmenter.dice(seen, y, layout.sizes))
        for k in (1, 2):
            reference = f1_score(y[0] == k, seen[0] == k)
            assert scores[-1][k - 1] == pytest.approx(reference, abs=1e-12)
    assert np.mean(scores, axis=0).min() > 0.9


def test_voxels_that_teach_stand_for_all_of_their_kind() -> None:
    """Rare regions are drawn more often than they are, and weigh back to their number."""
    layout = Layout.of(compared(TRAIN, HOLDOUT, HONEST))
    images, labels = layout.split(TRAIN.volumes[0].astype(np.float32))
    features = segmenter.surroundings(images, layout.spacing_mm)
    found = segmenter.lesson(features, labels, layout, np.random.default_rng(0))
    counts = np.bincount(labels[0])
    np.testing.assert_allclose(np.bincount(found.labels[:, 0], found.weights), counts, rtol=1e-4)
    taken = np.bincount(found.labels[:, 0])
    assert taken[1] == min(90, counts[1]) and taken[2] == min(90, counts[2])  # a quarter of 360
    assert len(np.unique(found.features, axis=0)) == len(found.features)  # none twice
    rows = {tuple(f) for f in features.tolist()}
    assert all(tuple(f) in rows for f in found.features.tolist())


def test_dice_is_that_of_a_loop_and_empty_regions_agree() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 2, 300)).astype(np.uint16)
    a[1], b[1] = a[1] % 2, b[1] % 2
    expected = []
    for m, labels in ((0, (1, 2, 3)), (1, (1,))):
        for k in labels:
            both = sum(int(p == k and q == k) for p, q in zip(a[m], b[m], strict=True))
            either = sum(int(p == k) for p in a[m]) + sum(int(q == k) for q in b[m])
            expected.append(2 * both / either)
    np.testing.assert_allclose(segmenter.dice(a, b, (3, 1)), expected, atol=1e-12)
    nothing = np.zeros((1, 5), np.uint16)
    one = np.array([[0, 0, 1, 1, 0]], np.uint16)
    assert segmenter.dice(nothing, one, (2,)).tolist() == [0, 1]
    assert segmenter.dice(nothing, nothing, (2,)).tolist() == [1, 1]


def test_an_honest_cohort_is_read_and_teaches_like_patients(
    honest: dict[tuple[str, str | None], Estimate],
) -> None:
    seen = honest["segmentability", None]
    assert seen.group == "fidelity" and seen.floor > 0.9 and seen.ceiling < 0.6
    assert seen.value == pytest.approx(seen.floor, abs=0.03)
    assert seen.floor == pytest.approx(honest["dice_trtr", None].value, abs=1e-12)
    apart = honest["dice_tstr_minus_trtr", None]
    assert abs(apart.value) < 0.03 and apart.ci[1] - apart.ci[0] < 0.05
    assert apart.value == pytest.approx(
        honest["dice_tstr", None].value - honest["dice_trtr", None].value, abs=1e-12
    )
    regions = [honest["dice_tstr", f"region={c.name}"].value for c in CHANNELS[1:]]
    assert honest["dice_tstr", None].value == pytest.approx(np.mean(regions), abs=1e-12)
    assert {s for n, s in honest if n == "dice_augmented"} == {
        None, "region=parts:front", "region=parts:back", "8 patients", "16 patients",
    }  # fmt: skip
    few = honest["dice_trtr", "8 patients"]
    assert few.value < honest["dice_augmented", "8 patients"].value + 0.02


def test_the_figures_are_those_of_a_loop(
    honest: dict[tuple[str, str | None], Estimate],
) -> None:
    given = compared(TRAIN, HOLDOUT, HONEST)
    layout = Layout.of(given)
    school = School(Shared(given), layout, 1, False, given.key.fold("segmentation"))
    everyone = np.arange(len(TRAIN))

    def agreement(cases: Cases, way: str) -> float:
        model = school.segmenter(way, everyone, 0)
        found = []
        for scan in cases.volumes:
            features = segmenter.surroundings(scan[:1].astype(np.float32), (1, 1, 1))
            seen = segmenter.read(school.basis, [model], features, layout.sizes)[0, 0]
            found += [f1_score(scan[k].ravel() > 0.5, seen == k) for k in (1, 2)]
        return float(np.mean(found))

    assert honest["segmentability", None].value == pytest.approx(agreement(HONEST, "trtr"))
    assert honest["dice_trtr", None].value == pytest.approx(agreement(HOLDOUT, "trtr"))
    assert honest["dice_tstr", None].value == pytest.approx(agreement(HOLDOUT, "tstr"))
    often = TRAIN.volumes[:, 1:].astype(float).mean(axis=0)
    most = np.concatenate([1 - often.sum(0, keepdims=True), often]).argmax(0)
    placed = [
        f1_score(scan[k].ravel() > 0.5, most.ravel() == k)
        for scan in HOLDOUT.volumes
        for k in (1, 2)
    ]
    assert honest["dice_trtr", None].ceiling == pytest.approx(np.mean(placed))
    assert honest["dice_augmented_minus_trtr", None].ceiling == pytest.approx(
        np.mean(placed) - honest["dice_trtr", None].value
    )


def test_masks_shifted_against_their_images_are_seen_and_mislead(
    honest: dict[tuple[str, str | None], Estimate],
) -> None:
    moved = shift(HONEST.volumes[:, 1:].astype(float), (0, 0, 3, 0, 3), order=0)
    found = measured(compared(TRAIN, HOLDOUT, changed(HONEST, slice(1, 3), moved)))
    for name in ("segmentability", "dice_tstr"):
        e = found[name, None]
        assert e.ci[1] < e.floor - 0.2
    assert found["dice_tstr_minus_trtr", None].ci[1] < -0.2
    # the yardstick knows nothing of the cohort
    assert found["dice_trtr", None] == honest["dice_trtr", None]


def test_a_subgroup_is_asked_of_its_own_patients() -> None:
    """At one of two sites the masks of the samples lie beside what the images show."""

    def at_sites(cases: Cases) -> Cases:
        return replace(cases, labels=[{"site": "ab"[i % 2]} for i in range(len(cases))])

    cohort = phantoms(4, 20, "s")
    cohort.volumes[1::2, 1:] = np.roll(cohort.volumes[1::2, 1:], 4, axis=(2, 4))
    given = replace(
        compared(at_sites(TRAIN), at_sites(phantoms(5, 22, "h")), at_sites(cohort)),
        categorical={"site": ("a", "b")},
    )
    found = measured(given)
    well, ill = (found["segmentability", f"site={s}"] for s in "ab")
    assert well.ci[1] > well.floor - 0.03 and ill.ci[1] < ill.floor - 0.2
    assert (well.n, well.n_holdout) == (10, 11)
    for name in ("segmentability", "dice_trtr", "dice_tstr", "dice_augmented_minus_classical"):
        whole = found[name, None]
        parts = [found[name, f"site={s}"] for s in "ab"]
        # both sites are as large: the figure of all patients is the mean of theirs
        assert whole.value == pytest.approx(np.mean([e.value for e in parts]), abs=1e-12)
        assert whole.floor is None or whole.floor == pytest.approx(
            np.mean([e.floor for e in parts]), abs=1e-12
        )


def test_images_of_noise_teach_no_more_than_a_place() -> None:
    noise = np.random.default_rng(0).normal(0.4, 0.2, (len(HONEST), 1, *GRID))
    found = measured(compared(TRAIN, HOLDOUT, changed(HONEST, slice(0, 1), noise)))
    e = found["dice_tstr", None]
    assert e.ci[1] < e.floor - 0.2
    assert e.value < e.ceiling + 0.1
    assert found["segmentability", None].ci[1] < 0.5


def test_no_masks_no_estimates_and_no_holdout_no_floor() -> None:
    given = cohorts.sides(TRAIN, HOLDOUT, HONEST)
    plain = replace(given, channels=(ChannelInfo("a"), ChannelInfo("b"), ChannelInfo("c")))
    assert QUICK.estimate(plain, Shared(plain)) == []
    nobody = Cases(TRAIN.volumes[:0], TRAIN.patients[:0], [])
    found = measured(compared(TRAIN, nobody, HONEST))
    seen = found["segmentability", None]
    assert (
        seen.value > 0.9 and seen.floor is None and seen.ceiling is None and "held-out" in seen.note
    )
    rest = [e for (name, _), e in found.items() if name.startswith("dice_")]
    assert len(rest) == 7 and all(e.value is None and e.note for e in rest)


def test_given_masks_count_like_drawn_ones(
    honest: dict[tuple[str, str | None], Estimate],
) -> None:
    given = compared(TRAIN, HOLDOUT, HONEST)
    told = replace(given, channels=[c if not c.mask else replace(c, given=True) for c in CHANNELS])
    assert measured(told) == honest


def test_a_region_that_is_empty_in_some_scans_and_one_that_nobody_has() -> None:
    train, holdout, made = (
        changed(c, slice(2, 3), np.zeros((len(c), 1, *GRID))) for c in (TRAIN, HOLDOUT, HONEST)
    )
    made.volumes[::2, 1] = 0
    found = measured(compared(train, holdout, made))
    assert ("segmentability", "region=parts:back") not in found
    seen = found["segmentability", None]
    assert seen == found["segmentability", "region=parts:front"].model_copy(update={"slice": None})
    assert "no held-out patient has parts:back" in seen.note
    assert f"{(len(made) + 1) // 2} of {len(made)} masks are empty" in seen.note
    holdout.volumes[:3, 1] = 0  # of patients nobody is told how many: a note may leave the house
    note = measured(compared(train, holdout, made))["dice_tstr", None].note
    assert "some held-out masks are empty" in note and "3 of" not in note
    assert 0.3 < seen.value < 0.6  # half of the images show what their masks deny
    none = changed(train, slice(1, 2), np.zeros((len(train), 1, *GRID)))
    lost = measured(compared(none, holdout, made))
    assert all(e.value is None and "no training scan" in e.note for e in lost.values())


def test_a_single_scan_a_side_is_measured_or_says_why() -> None:
    def first(c: Cases) -> Cases:
        return Cases(c.volumes[:1], c.patients[:1], c.labels[:1])

    found = measured(compared(first(TRAIN), first(HOLDOUT), first(HONEST)))
    seen = found["segmentability", None]
    assert 0 <= seen.ci[0] <= seen.value <= seen.ci[1] <= 1 and seen.ceiling is None
    assert "one held-out patient" in seen.note
    low, high = found["dice_tstr_minus_trtr", None].ci
    assert high - low > 0.9  # one patient says next to nothing


def test_a_patient_of_two_scans_counts_once_and_lends_no_mask_to_themself() -> None:
    names = np.array(["a", "a", *(f"h{i:02d}" for i in range(2, len(HOLDOUT)))])
    twice = Cases(HOLDOUT.volumes, names, HOLDOUT.labels)
    given = compared(TRAIN, twice, HONEST)
    layout = Layout.of(given)
    school = School(Shared(given), layout, 1, False, given.key)
    model = school.segmenter("trtr", np.arange(len(TRAIN)), 0)
    found = school.examine("holdout", [model])
    seen, truth = [], []
    for scan in twice.volumes:
        images, labels = layout.split(scan.astype(np.float32))
        features = segmenter.surroundings(images, layout.spacing_mm)
        seen.append(segmenter.read(school.basis, [model], features, layout.sizes)[0])
        truth.append(labels)
    scores = [segmenter.dice(s, t, layout.sizes) for s, t in zip(seen, truth, strict=True)]
    assert len(found.own) == len(twice) - 1
    np.testing.assert_allclose(found.own[0, 0], np.mean(scores[:2], axis=0), atol=1e-12)
    np.testing.assert_allclose(found.own[1:, 0], scores[2:], atol=1e-12)
    lent = [truth[-1], truth[-1], *truth[1:-1]]
    crossed = [segmenter.dice(s, t, layout.sizes) for s, t in zip(seen, lent, strict=True)]
    assert found.others is not None
    np.testing.assert_allclose(found.others[0, 0], np.mean(crossed[:2], axis=0), atol=1e-12)
    np.testing.assert_allclose(found.others[1:, 0], crossed[2:], atol=1e-12)


def test_masks_that_overlap_are_problems_of_their_own() -> None:
    channels = (
        ChannelInfo("T1w"),
        ChannelInfo("tissue:all", mask="tissue", label_value=1),
        ChannelInfo("lesion:all", mask="lesion", label_value=1),
    )

    def nested(cases: Cases) -> Cases:
        return changed(cases, slice(1, 2), np.maximum(cases.volumes[:, 1:2], cases.volumes[:, 2:]))

    given = replace(compared(nested(TRAIN), nested(HOLDOUT), nested(HONEST)), channels=channels)
    assert Layout.of(given).masks == ((1,), (2,))
    found = measured(given)
    assert found["dice_tstr", "region=tissue:all"].value > 0.9
    assert found["dice_tstr", "region=lesion:all"].value > 0.9


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(
    honest: dict[tuple[str, str | None], Estimate],
) -> None:
    again = measured(compared(TRAIN, HOLDOUT, HONEST))
    assert [e.model_dump_json() for e in again.values()] == [
        e.model_dump_json() for e in honest.values()
    ]
    other = measured(replace(compared(TRAIN, HOLDOUT, HONEST), key=cohorts.Key.root(1)))
    assert other["dice_tstr", None].value != honest["dice_tstr", None].value


def test_altered_copies_take_their_masks_along() -> None:
    """A mask that equals its image, cut at a half, still does after both were moved."""
    inside = TRAIN.volumes[:, 1].astype(np.float32)
    block = np.stack([inside, inside], axis=1)
    given = compared(TRAIN, HOLDOUT, HONEST)
    moved = taught.altered(block, 0, given, 0, False, [True, False])
    assert np.mean((moved[:, 1] > 0.5) != (inside > 0.5)) > 0.02
    assert moved[:, 1].max() == pytest.approx(1, abs=1e-6) and moved[:, 1].min() == 0
    for image, mask in moved:
        # brightness is changed in the image alone, by one monotone curve
        order = np.argsort(mask, axis=None, kind="stable")
        assert np.all(np.diff(image.ravel()[order]) >= -1e-6)
        assert not np.array_equal(image, mask)
    school = School(Shared(given), Layout.of(given), 1, False, given.key)
    whole = TRAIN.volumes.astype(np.float32)
    expected = taught.altered(whole, 0, given, 0, False, [True, False, False])
    for (images, labels), scan in zip(school._pairs("train", 0), expected, strict=True):
        np.testing.assert_array_equal(images, scan[:1])
        shares = np.stack([1 - scan[1] - scan[2], scan[1], scan[2]])
        np.testing.assert_array_equal(labels[0].reshape(GRID), shares.argmax(0))


def test_fine_grids_are_averaged_and_their_labels_stay_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segmenter, "SIDE", 9)
    given = replace(compared(TRAIN, HOLDOUT, HONEST), spacing_mm=(1.0, 2.0, 1.0))
    layout = Layout.of(given)
    assert layout.grid == (9, 9, 9)
    assert layout.spacing_mm == pytest.approx((2.0, 40 / 9, 16 / 9))
    images, labels = layout.split(TRAIN.volumes[0].astype(np.float32))
    assert images.shape == (1, 9, 9, 9) and set(np.unique(labels)) <= {0, 1, 2}
    assert measured(given)["dice_trtr", None].value > 0.7


def test_large_sides_are_thinned_by_patient_and_the_note_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("synthmed.metrics.school.MOST_SCANS", 12)
    found = measured(compared(TRAIN, HOLDOUT, HONEST))
    e = found["dice_tstr", None]
    assert "looked at 12 of 20 training scans, 12 of 16 synthetic scans" in e.note
    assert e.value > 0.85


@pytest.mark.real_data
@pytest.mark.skipif("SYNTHMED_REAL_DATA" not in os.environ, reason="SYNTHMED_REAL_DATA is not set")
def test_hippocampi_are_found() -> None:
    """Taught by the scans of 40 people, asked about 20 others."""
    import nibabel as nib
    import pandas as pd

    root = Path(os.environ["SYNTHMED_REAL_DATA"]) / "hippocampus"
    table = pd.read_csv(root / "participants.tsv", sep="\t", dtype=str)
    cut = Intensity()
    people = sorted(set(table["subject_group"]))[:60]
    sides: dict[bool, list[tuple[str, np.ndarray]]] = {True: [], False: []}
    for row in (
        table[table["subject_group"].isin(people)].drop_duplicates("subject_group").itertuples()
    ):
        image = np.asarray(nib.load(root / row.image).dataobj, np.float32)
        mask = np.asarray(nib.load(root / "segs" / f"{row.participant_id}_seg.nii.gz").dataobj)
        low, high = np.percentile(image, [cut.low_percentile, cut.high_percentile])
        scan = np.stack([np.clip((image - low) / (high - low), 0, 1.25), mask == 1, mask == 2])
        sides[people.index(row.subject_group) < 40].append((row.subject_group, scan))
    train, holdout = (
        Cases(
            np.stack([s for _, s in part]).astype(np.float16),
            np.array([p for p, _ in part]),
            [{} for _ in part],
        )
        for part in (sides[True], sides[False])
    )
    given = compared(train, holdout, cohorts.made(train.volumes[:4]))
    layout = Layout.of(given)
    school = School(Shared(given), layout, 1, False, given.key)
    model = school.segmenter("trtr", np.arange(len(train)), 0)
    found = school.examine("holdout", [model])
    assert found.own.mean() > 0.6
    assert found.own.mean() > found.placed.mean() + 0.05  # it looks at the image
    assert found.others is not None and found.others.mean() < found.own.mean() - 0.1
