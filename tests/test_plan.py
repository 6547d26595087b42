"""What a plan says of the data and the cost, against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthmed import configfile, plan
from synthmed.artifacts import Scan
from synthmed.backbones.generative import Round
from synthmed.config import Config
from synthmed.measure import Measured, Request
from synthmed.policy import MIN_HOLDOUT
from synthmed.stages.train import steps_within
from synthmed.trial import noise
from synthmed.watch import COST


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


def test_labels_that_are_missing_are_counted(config: Callable[..., Config]) -> None:
    scans = [
        scan("a", 1, diagnosis="control", sex="F"),
        scan("a", 2, diagnosis="control", sex="F", age=52),
        scan("b", 1, sex="M"),
    ]
    assert plan.label_counts(config(), scans) == {
        "diagnosis": {"control": 1, "atrophy": 0, "missing": 1},
        "sex": {"F": 1, "M": 1},
        "age": {"missing": 2},
    }


def test_spread_is_along_each_axis() -> None:
    assert plan.spread([(1, 2, 3), (3, 2, 1), (2, 2, 9)]) == {
        "min": [1, 2, 1], "median": [2, 2, 3], "max": [3, 2, 9],
    }  # fmt: skip


def test_enough_held_out_people_leave_nothing_open(config: Callable[..., Config]) -> None:
    chosen = config(policy={})  # the default policy
    few = plan.cannot_pass(chosen, MIN_HOLDOUT - 1)
    assert plan.cannot_pass(chosen, MIN_HOLDOUT) == []
    assert {"coverage", "recall", "region_volume_smd"} <= set(few)
    assert not {"copied_patients", "copies_shipped", "authenticity_excess"} & set(few)
    assert "authenticity_excess" in plan.cannot_pass(chosen, 3)


AROUND = 3 + 5 + 0.1 * 26 * 18 / 24
"""Seconds to build the model, to examine it, and to fit what is fitted on the training scans."""


def measured(monkeypatch: pytest.MonkeyPatch, **values: Any) -> list[Request]:
    """Let every trial end in these figures; returns the list of what was asked for."""
    figures = Measured(
        n_parameters=10,
        n_trained=10,
        build_seconds=3.0,
        seconds_per_step=(0.5,),
        steps=(240,),
        finish_seconds=0.1,
        examine_seconds=5.0,
        first_batch_seconds=2.0,
        batch_seconds=1.5,
        built_bytes=2**28,
        peak_bytes=2**30,
    )
    asked: list[Request] = []

    def answer(config: Config, request: Request) -> Measured:
        asked.append(request)
        return replace(figures, **values)

    monkeypatch.setattr(plan, "measure", answer)
    return asked


def test_the_cost_adds_up(config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch)
    facts = plan.cost(config(train__watch=False), 18, 6, 26, "cpu")
    assert asked == [Request(18, 6, 4, 1, 6, True, "cpu", torch.get_num_threads())]
    assert facts["steps"] == 240
    assert facts["train_seconds"] == pytest.approx(AROUND + 240 * 0.5, abs=0.06)
    # 18 samples: one whole batch of 16 and one that is padded
    assert facts["sample_seconds"] == pytest.approx(2 + 1.5)
    assert facts["memory_gib"] == 1
    # 16^3 voxels of 2 bytes, prepared and ingested and sampled
    assert facts["disk_gib"] == pytest.approx(16**3 * 2 * (2 * 26 + 2 * 18) / 2**30, abs=1e-3)


def test_rounds_cost_what_they_cost(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long cheap round, a fit without steps, a short dear one: not a mean of their speeds."""
    measured(monkeypatch, seconds_per_step=(0.01, 0.0, 2.0), steps=(1000, 0, 10))
    facts = plan.cost(config(train__watch=False), 18, 6, 26, "cpu")
    assert facts["steps"] == 1010
    assert facts["steps_by_round"] == [1000, 0, 10]
    assert facts["train_seconds"] == pytest.approx(AROUND + 10 + 20, abs=0.06)


def test_watching_is_in_the_cost(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch)
    facts = plan.cost(config(), 18, 6, 26, "cpu")
    assert AROUND + 120 < facts["train_seconds"] <= AROUND + 120 * (1 + COST)


def test_a_few_patients_are_tried_with_the_batch_they_will_have(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch)
    plan.cost(config(train__batch_patients=64), 18, 6, 26, "cpu")
    assert (asked[0].n_patients, asked[0].batch_patients) == (18, 18)


def test_minutes_and_steps_are_shared_between_the_rounds(config: Callable[..., Config]) -> None:
    """The smaller of both holds in each round; a round without phases has none."""

    class Model:
        def rounds(self) -> list[Round]:
            phase: Any = object()
            return [Round([phase], share=0.75), Round([], share=0), Round([phase], share=0.25)]

    model: Any = Model()
    both = config(train__max_steps=1000, train__max_minutes=2)
    # 90 s and 30 s, 750 steps and 250 steps
    assert steps_within(both, model, [0.5, 0, 0.01]) == [180, 0, 250]
    assert steps_within(config(train__max_steps=1000), model, []) == [750, 0, 250]
    minutes = config(train__max_steps=None, train__max_minutes=2)
    assert steps_within(minutes, model, [0.5, 0, 0.01]) == [180, 0, 3000]
    assert steps_within(minutes, model, [100, 0, 100]) == [1, 0, 1], "at least one"


def test_noise_has_the_shape_of_the_data(config: Callable[..., Config]) -> None:
    channels = {"T1w": {"column": "image"}, "seg": {"column": "m", "labels": {"a": 1, "b": 2}}}
    chosen = config(data__channels=channels)
    made = noise(chosen, 7)
    assert made.volumes.shape == (7, 3, 16, 16, 16)
    assert len(made.train_patients()) == 7
    assert np.array_equal(made.volumes, noise(chosen, 7).volumes), "keyed by the seed"
    assert set(made.labels[0]) == {"diagnosis", "sex", "age"}
