"""What every metric must hold, over every member of the union."""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import pytest

from synthmed.artifacts import ChannelInfo
from synthmed.keys import Key
from synthmed.metrics import DEFAULT_METRICS, Metric
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.types import Estimate

GRID = (10, 12, 11)


def members() -> list[Any]:
    return list(get_args(get_args(Metric)[0]))


def cases(seed: int, n: int, prefix: str, grid: tuple[int, int, int] = GRID) -> Cases:
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.2, 0.8, n)[:, None, None, None, None]
    volumes = np.clip(level + 0.1 * rng.standard_normal((n, 2, *grid)), 0, 1.25)
    volumes[:, 1] = 0  # a drawn mask, in its own place and size
    for i, (x, y, size) in enumerate(rng.integers(3, 5, (n, 3))):
        volumes[i, 1, x : x + size, y : y + size, 4 * (grid[2] > 1) : 7] = 1
    labels = [{"group": "ab"[i % 2], "age": 40.0 + i} for i in range(n)]
    return Cases(
        volumes.astype(np.float16), np.array([f"{prefix}{i:03d}" for i in range(n)]), labels
    )


def sides(n_holdout: int = 20, grid: tuple[int, int, int] = GRID) -> Sides:
    return Sides(
        train=cases(1, 20, "t", grid),
        holdout=cases(2, n_holdout, "h", grid),
        synthetic=cases(3, 14, "s", grid),
        channels=[ChannelInfo("T1w"), ChannelInfo("parts:box", mask="parts", label_value=1)],
        spacing_mm=(1.0, 1.0, 1.0),
        categorical={"group": ("a", "b")},
        continuous={"age": (40.0, 80.0)},
        key=Key.root(5),
        seed=5,
        resamples=100,
    )


def measured(metric: Any, given: Sides) -> list[Estimate]:
    found: list[Estimate] = metric.estimate(given, Shared(given))
    return found


@pytest.fixture(params=members(), ids=lambda m: m.model_fields["name"].default)
def metric(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_the_default_holds_every_metric_once() -> None:
    names = [m.name for m in DEFAULT_METRICS]
    assert sorted(names) == sorted(m.model_fields["name"].default for m in members())


def test_estimates_are_whole(metric: Any) -> None:
    """Each figure says how it was made, stands inside its interval, and is plain JSON."""
    found = measured(metric, sides())
    assert found
    assert len({(e.name, e.slice) for e in found}) == len(found)
    for e in found:
        assert e.n > 0
        assert e.seed == 5
        assert len(e.method) > 20
        assert e.value is not None or e.note
        assert e.ci is not None or e.note
        assert e.floor is not None or e.note
        assert e.ceiling is not None or e.note
        if e.value is not None and e.ci is not None:
            assert e.ci[0] <= e.value <= e.ci[1]
        json.dumps(e.model_dump(mode="json"), allow_nan=False)


def test_the_same_sides_give_the_same_figures(metric: Any) -> None:
    assert measured(metric, sides()) == measured(metric, sides())


def test_order_of_scans_does_not_matter(metric: Any) -> None:
    """Shuffled scans are the same cohort; only what is resampled by key may move a little."""
    given = sides()
    turned = np.arange(len(given.synthetic))[::-1]
    shuffled = Cases(
        given.synthetic.volumes[turned],
        given.synthetic.patients[turned],
        [given.synthetic.labels[i] for i in turned],
    )
    other = Sides(**{**given.__dict__, "synthetic": shuffled})
    for a, b in zip(measured(metric, given), measured(metric, other), strict=True):
        assert (a.name, a.slice) == (b.name, b.slice)
        assert a.value == pytest.approx(b.value, rel=1e-6, abs=1e-9)


def test_blocks_do_not_matter(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans of a fine grid are read one by one; the figures are the same."""
    at_once = measured(metric, sides())
    monkeypatch.setattr("synthmed.metrics.blocks.BLOCK_VALUES", 1)
    for a, b in zip(at_once, measured(metric, sides()), strict=True):
        assert (a.name, a.slice) == (b.name, b.slice)
        assert a.value == pytest.approx(b.value, rel=1e-6, abs=1e-9)


def test_single_slices_are_measured_like_volumes(metric: Any) -> None:
    """The same figures exist, and none of them is lost to an axis of one voxel."""
    whole, flat = (measured(metric, sides(grid=grid)) for grid in (GRID, (10, 12, 1)))
    assert [(e.name, e.slice, e.value is None) for e in flat] == [
        (e.name, e.slice, e.value is None) for e in whole
    ]


def test_without_a_holdout_nothing_is_made_up(metric: Any) -> None:
    """What needs held-out people has no value; what has one says that none were needed."""
    for e in measured(metric, sides(n_holdout=0)):
        assert e.value is None or not e.n_holdout
        assert e.value is not None or e.note


def test_a_collapsed_and_a_broken_cohort_are_judged_not_refused(metric: Any) -> None:
    given = sides()
    for volumes in (np.zeros_like(given.synthetic.volumes), given.synthetic.volumes * np.nan):
        broken = Cases(volumes, given.synthetic.patients, given.synthetic.labels)
        for e in measured(metric, Sides(**{**given.__dict__, "synthetic": broken})):
            assert json.dumps(e.model_dump(mode="json"), allow_nan=False)
