"""What a plan says of the data and the cost, against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthmed import configfile, plan
from synthmed.artifacts import Scan
from synthmed.config import Config
from synthmed.policy import MIN_HOLDOUT


@pytest.fixture
def config(make_config: Callable[..., Path]) -> Callable[..., Config]:
    def make(**values: Any) -> Config:
        return configfile.load(
            make_config(), (), {k.replace("__", "."): v for k, v in values.items()}
        )

    return make


def scan(patient: str, session: int, **labels: Any) -> Scan:
    return Scan(
        scan=f"{patient}_s{session:02d}", patient=patient, session=session, channels={},
        shape=(8, 8, 8), spacing_mm=(1, 1, 1), orientation="RAS", labels=labels,
    )  # fmt: skip


def test_labels_are_counted_by_person(config: Callable[..., Config]) -> None:
    scans = [
        scan("a", 1, diagnosis="control", sex="F", age=50),
        scan("a", 2, diagnosis="atrophy", sex="F", age=52),
        scan("b", 1, diagnosis="control", sex="M", age=71.5),
    ]
    assert plan.label_counts(config(), scans) == {
        "diagnosis": {"control": 2, "atrophy": 0},
        "sex": {"F": 1, "M": 1},
        "age": {"min": 50.0, "max": 71.5},
    }


def test_spread_is_along_each_axis() -> None:
    assert plan.spread([(1, 2, 3), (3, 2, 1), (2, 2, 9)]) == {
        "min": [1, 2, 1], "median": [2, 2, 3], "max": [3, 2, 9],
    }  # fmt: skip


def test_enough_held_out_people_leave_nothing_open(config: Callable[..., Config]) -> None:
    chosen = config(policy={})  # the default policy
    few = plan.cannot_pass(chosen, MIN_HOLDOUT - 1)
    assert plan.cannot_pass(chosen, MIN_HOLDOUT) == []
    assert {"coverage", "recall"} <= set(few)
    assert not {"copied_patients", "copies_shipped", "authenticity"} & set(few)


def test_the_cost_is_of_the_model_that_will_be_trained(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthmed.stages.train.seconds_per_step", lambda *a: [0.5])
    facts = plan.cost(config(train__max_steps=None, train__max_minutes=2), 18, 20, "cpu")
    assert facts["steps"] == 240
    assert facts["train_seconds"] == pytest.approx(120)
    assert plan.cost(config(train__max_minutes=2), 18, 20, "cpu")["steps"] == 5, "the smaller one"
    # 16^3 voxels of 2 bytes, prepared and ingested and sampled
    assert facts["disk_gib"] == pytest.approx(16**3 * 2 * (2 * 20 + 2 * 18) / 2**30, abs=1e-3)
    assert facts["memory_gib"] > 0
    small, large = (
        plan.cost(config(backbone__latent=n), 18, 20, "cpu")["n_parameters"] for n in (2, 8)
    )
    assert small < facts["n_parameters"] < large


def test_noise_has_the_shape_of_the_data(config: Callable[..., Config]) -> None:
    channels = {"T1w": {"column": "image"}, "seg": {"column": "m", "labels": {"a": 1, "b": 2}}}
    chosen = config(data__channels=channels)
    noise = plan._noise(chosen, 7)
    assert noise.volumes.shape == (7, 3, 16, 16, 16)
    assert len(noise.train_patients()) == 7
    assert np.array_equal(noise.volumes, plan._noise(chosen, 7).volumes), "keyed by the seed"
    assert set(noise.labels[0]) == {"diagnosis", "sex", "age"}
