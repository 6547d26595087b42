"""condition_accuracy, and what every metric promises."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from synthmed.metrics import DEFAULT_METRICS, ConditionAccuracy, Metric, condition, reader
from synthmed.metrics.reader import Kind
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases
from tests.metrics.cohorts import cases, sides

CATEGORIES = {"diagnosis": ("atrophy", "healthy")}


def labelled(given: Cases, rng: np.random.Generator) -> Cases:
    """The cases with a large bright spot in every second patient, and how bright it is."""
    volumes = given.volumes.astype(np.float32)
    people = {p: i for i, p in enumerate(sorted(set(given.patients)))}
    labels: list[dict[str, str | float]] = []
    for volume, patient in zip(volumes, given.patients, strict=True):
        sick = people[str(patient)] % 2
        brightness = 0.3 * sick + 0.1 * rng.random()
        volume[0, 6:14, 6:14, 6:12] += brightness
        labels.append({"diagnosis": "atrophy" if sick else "healthy", "load": float(brightness)})
    return Cases(volumes.astype(np.float16), given.patients, labels)


@pytest.fixture(scope="module")
def cohort() -> tuple[Cases, Cases, Cases]:
    rng = np.random.default_rng(0)
    train, holdout = cases(rng, 40, "t", twice=6), cases(rng, 24, "h", twice=4)
    return labelled(train, rng), labelled(holdout, rng), labelled(cases(rng, 30, "s"), rng)


def read(train: Cases, holdout: Cases, synthetic: Cases, **given):  # type: ignore[no-untyped-def]
    s = sides(train, holdout, synthetic, **given)
    return {e.slice: e for e in ConditionAccuracy().estimate(s, Shared(s))}


def test_conditions_that_came_are_recognised(cohort: tuple[Cases, Cases, Cases]) -> None:
    found = read(*cohort, categorical=CATEGORIES, continuous={"load": (0.0, 0.5)})
    groups = {"diagnosis=atrophy", "diagnosis=healthy", "load=lower half", "load=upper half"}
    assert set(found) == {None, "condition=diagnosis", "condition=load", *groups}
    category, number = found["condition=diagnosis"], found["condition=load"]
    assert category.value >= 0.9 and category.floor >= 0.9 and category.ceiling == 0.5
    assert number.value >= 0.8 and number.unit == "r" and number.ceiling == 0.0
    assert found[None].value == category.value and "diagnosis" in found[None].note
    assert category.n == 30 and category.n_holdout == 24


def test_shuffled_conditions_are_not_recognised(cohort: tuple[Cases, Cases, Cases]) -> None:
    train, holdout, honest = cohort
    order = np.random.default_rng(1).permutation(30)
    wrong = Cases(honest.volumes, honest.patients, [honest.labels[i] for i in order])
    found = read(train, holdout, wrong, categorical=CATEGORIES, continuous={"load": (0.0, 0.5)})
    low, high = found["condition=diagnosis"].ci
    assert low <= 0.5 <= high and abs(found["condition=load"].value) < 0.5


def test_a_category_that_never_came_fails_in_its_own_subgroup(
    cohort: tuple[Cases, Cases, Cases],
) -> None:
    """Whoever is asked for, somebody healthy comes: half of the cohort is as it should be."""
    train, holdout, honest = cohort
    well = [i for i, x in enumerate(honest.labels) if x["diagnosis"] == "healthy"]
    volumes = honest.volumes[np.resize(well, len(honest))]
    collapsed = Cases(volumes, honest.patients, honest.labels)
    found = read(train, holdout, collapsed, categorical=CATEGORIES)
    ill, rest = found["diagnosis=atrophy"], found["diagnosis=healthy"]
    assert ill.value == 0.0 and ill.floor >= 0.9 and rest.value >= 0.9
    assert (ill.n, ill.n_holdout, ill.ceiling) == (15, 12, 0.5)
    # the balanced figure of the whole is the mean of its categories
    assert found[None].value == pytest.approx((ill.value + rest.value) / 2, abs=1e-12)
    assert found[None].floor == pytest.approx((ill.floor + rest.floor) / 2, abs=1e-12)


def test_categories_missing_on_a_side_are_named(cohort: tuple[Cases, Cases, Cases]) -> None:
    train, holdout, honest = cohort
    labels = [{"diagnosis": "tumour"} if i < 6 else {"diagnosis": "healthy"} for i in range(30)]
    odd = Cases(honest.volumes, honest.patients, labels)
    note = read(train, holdout, odd, categorical={"diagnosis": ("atrophy", "healthy", "tumour")})[
        None
    ].note
    assert "never recognised: tumour" in note and "not asked for: atrophy" in note
    blank = Cases(honest.volumes, honest.patients, [{}] * 30)
    (nothing, _) = read(train, holdout, blank, categorical=CATEGORIES).values()
    assert nothing.value is None and "no synthetic scan" in nothing.note
    assert read(*cohort) == {}


def test_labels_that_are_not_known_are_left_out(cohort: tuple[Cases, Cases, Cases]) -> None:
    """Scans without a label change nothing but the note; were they read as a category or as 0,
    they would."""
    train, holdout, honest = cohort
    every = {"categorical": CATEGORIES, "continuous": {"load": (0.0, 0.5)}}

    def cut(side: Cases, kept: np.ndarray) -> Cases:
        return Cases(side.volumes[kept], side.patients[kept], [side.labels[int(i)] for i in kept])

    def blank(side: Cases, known: np.ndarray) -> Cases:
        labels = [x if i in known else {} for i, x in enumerate(side.labels)]
        return Cases(side.volumes, side.patients, labels)

    kept = [np.arange(0, len(train) - 9), np.arange(0, len(holdout) - 5)]
    fewer = read(cut(train, kept[0]), cut(holdout, kept[1]), honest, **every)
    found = read(blank(train, kept[0]), blank(holdout, kept[1]), honest, **every)
    for name in ("condition=diagnosis", "condition=load"):
        assert found[name].value == fewer[name].value
        assert found[name].floor == fewer[name].floor
        # never how many: the note may be printed in what leaves
        said = "label not known of some training and some held-out scans: left out"
        assert said in found[name].note
        assert "left out" not in fewer[name].note


def test_balanced_accuracy_is_sklearns_and_its_count_is_n_when_balanced() -> None:
    rng = np.random.default_rng(2)
    truth, answer = rng.choice(["a", "b", "c"], (2, 50))
    value, _ = condition.balanced(truth, answer)
    assert value == pytest.approx(balanced_accuracy_score(truth, answer), abs=1e-12)
    even = np.repeat(["a", "b"], 20)
    assert condition.balanced(even, even) == (1.0, pytest.approx(40))


@pytest.mark.parametrize(("n", "voxels"), [(90, 400), (90, 40), (40, 40)])
@pytest.mark.parametrize("kind", ["category", "number"])
def test_a_reader_sees_principal_components(n: int, voxels: int, kind: Kind) -> None:
    rng = np.random.default_rng(n + voxels)
    parts = rng.standard_normal((8, voxels))
    x = rng.standard_normal((n, 8)) @ parts + 0.5 * rng.standard_normal((n, voxels)) + 3
    y, w = x[:, :3].sum(axis=1), rng.random(n) + 0.5
    asked = rng.standard_normal((30, 8)) @ parts + 3
    kept = min(20, n // 3)
    oracle = make_pipeline(
        StandardScaler(), PCA(kept, svd_solver="full"), StandardScaler(), Ridge(alpha=10.0)
    )
    if kind == "number":
        expected = oracle.fit(x, y, ridge__sample_weight=w).predict(asked)
        said = reader.fit(x, y, w, kind, 20).predict(asked)
    else:
        y = np.digitize(y, np.quantile(y, [0.3, 0.6])).astype(str)
        last = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
        oracle.steps[-1] = ("last", last)
        expected = oracle.fit(x, y, last__sample_weight=w).predict_proba(asked)
        said = reader.fit(x, y, w, kind, 20).predict_proba(asked)
    np.testing.assert_allclose(said, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("voxels", [40, 300])
def test_a_reader_of_two_scans_over_and_over_does_not_read_rounding(voxels: int) -> None:
    rng = np.random.default_rng(0)
    two = rng.standard_normal((2, voxels)) + 1
    x, y = np.repeat(two, 30, axis=0), np.repeat([1.0, 2.0], 30)
    model = reader.fit(x, y, np.ones(60), "number", 20)
    near = two + 1e-9 * rng.standard_normal(two.shape)
    np.testing.assert_allclose(model.predict(near), model.predict(two), atol=1e-6)
    assert abs(model.predict(two) - [1.0, 2.0]).max() < 0.1


@pytest.mark.parametrize("metric", DEFAULT_METRICS, ids=lambda m: m.name)
def test_every_metric_is_deterministic_complete_and_frozen(
    cohort: tuple[Cases, Cases, Cases], metric: Metric
) -> None:
    small = [
        Cases(c.volumes[:n], c.patients[:n], c.labels[:n])
        for c, n in zip(cohort, (24, 18, 12), strict=True)
    ]
    given = sides(*small, categorical=CATEGORIES, continuous={"load": (0.0, 0.5)})
    first = metric.estimate(given, Shared(given))
    assert first == metric.estimate(given, Shared(given))
    for e in first:
        assert e.method.endswith(".") and e.seed == 0 and e.n > 0
        assert e.ci is None or e.ci[0] <= e.value <= e.ci[1]
        assert None not in (e.value, e.ci, e.floor, e.ceiling) or e.note
    again = TypeAdapter(Metric).validate_python({"name": metric.name})
    assert again == metric
    with pytest.raises(ValidationError):
        metric.name = "other"
    with pytest.raises(ValidationError):
        TypeAdapter(Metric).validate_python({"name": metric.name, "nonsense": 1})


def test_importing_the_metrics_imports_no_heavy_library() -> None:
    code = (
        "import sys, synthmed.metrics; "
        "print([m for m in ('scipy', 'sklearn', 'skimage', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
