"""What a plan says of the data and the cost, against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from synthmed import configfile, plan
from synthmed.artifacts import Scan
from synthmed.backbones.generative import Round
from synthmed.config import Config
from synthmed.measure import Measured, Request
from synthmed.metrics.anatomy import smd
from synthmed.metrics.copied import Copied
from synthmed.metrics.copies import Copies
from synthmed.policy import MIN_HOLDOUT, judge
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
        "age": {"min": 50.0, "max": 71.5, "lower half": 1, "upper half": 1},
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
    chosen = config(policy={}, sample__count=400)  # the default policy
    few = plan.cannot_pass(chosen, 150, MIN_HOLDOUT - 1, LABELS)
    assert plan.cannot_pass(chosen, 400, 170, LABELS) == []
    assert {"coverage", "recall", "region_volume_smd"} <= set(few)
    assert not {"copied_patients", "copies_shipped", "authenticity_excess"} & set(few)
    assert "authenticity_excess" in plan.cannot_pass(chosen, 150, 3, LABELS)


LABELS = {"diagnosis": {"control": 260, "atrophy": 310}, "sex": {"F": 300, "M": 270}, "age": {}}


def test_none_copied_of_a_few_patients_is_no_proof(config: Callable[..., Config]) -> None:
    """The bound that the copies test would have with nothing found and full power."""
    chosen = config(policy={})
    (rule,) = [r for r in chosen.policy.rules if r.estimate == "copied_patients"]
    for n_train, passes in ((67, False), (71, False), (72, True), (300, True)):
        clean = Copies(
            matches=(), n_train=n_train, n_holdout=90, largest_null_gap=1.0, power=1.0,
            false_discovery_rate=0.01, similarity="image",
        )  # fmt: skip
        shared: Any = SimpleNamespace(as_sampled=lambda c=clean: c, as_shipped=lambda c=clean: c)
        sides: Any = SimpleNamespace(
            seed=0, categorical={}, continuous={}, train=(), holdout=(), synthetic=()
        )
        found = {e.name: e for e in Copied().estimate(sides, shared)}
        verdict = judge(rule, found["copied_patients"], 90)
        assert (verdict.status == "pass") == passes
        told = plan.cannot_pass(chosen, n_train, 170, LABELS)
        assert ("copied_patients" not in told) == passes


def test_a_subgroup_needs_held_out_people_of_its_own(config: Callable[..., Config]) -> None:
    """Sixty held out are enough for the whole, and not for two halves of them."""
    chosen = config(policy={}, data__holdout=0.3, sample__count=400)
    halves = {"diagnosis": {"control": 100, "atrophy": 100}, "sex": {"F": 100, "M": 100}, "age": {}}
    assert plan.cannot_pass(chosen, 140, 60, halves) == ["mmd2_excess [worst subgroup]"]
    # every one that can be measured has to pass, so a middling one stands in the way
    small = {**halves, "diagnosis": {"control": 170, "atrophy": 40}}
    assert plan.cannot_pass(chosen, 147, 63, small) == ["mmd2_excess [worst subgroup]"]
    # one too small to be measured is not looked at, and utility takes ten of every category
    apart = {
        "diagnosis": {"control": 370, "atrophy": 30},
        "sex": {"F": 200, "M": 200},
        "age": {"min": 40.0, "max": 90.0, "lower half": 200, "upper half": 200},
    }
    foreseen = ["auc_tstr_minus_trtr", "mmd2_excess [worst subgroup]"]
    assert plan.cannot_pass(chosen, 280, 120, apart) == foreseen
    # of 400 people 120 have an age that nobody knows: the halves of the others are too small
    apart["diagnosis"] = {"control": 200, "atrophy": 200}
    assert plan.cannot_pass(chosen, 280, 120, apart) == []
    unknown = {**apart, "age": {"lower half": 140, "upper half": 140, "missing": 120}}
    assert plan.cannot_pass(chosen, 280, 120, unknown) == ["mmd2_excess [worst subgroup]"]
    # fewer samples than tell how often a model copies
    few = config(policy={}, data__holdout=0.3, sample__count=71, screen__max_dropped=0.05)
    assert "flagged samples" in plan.cannot_pass(few, 280, 120, apart)
    unlabelled = config(policy={}, data__conditions={}, sample__count=400)
    assert plan.cannot_pass(unlabelled, 140, 60, {}) == []
    # of an age that nobody differs in there are no halves, and no line about them unless asked for
    age = {"kind": "continuous", "low": 0, "high": 120, "unit": "years"}
    aged = config(policy={}, data__conditions={"age": age}, sample__count=400)
    assert plan.cannot_pass(aged, 280, 120, {"age": {"min": 66.5, "max": 71.4}}) == []
    rule = {"estimate": "mmd2_excess", "slice": "age=lower half", "at_most": 1}
    asked = config(policy={"rules": [rule]}, data__conditions={"age": age}, sample__count=400)
    told = plan.cannot_pass(asked, 280, 120, {"age": {"min": 66.5, "max": 71.4}})
    assert told == ["mmd2_excess [age=lower half]"]


@pytest.mark.parametrize(("n_holdout", "n_samples"), [(51, 120), (170, 30), (51, 500), (170, 200)])
def test_sizes_of_regions_are_too_uncertain_between_few(
    config: Callable[..., Config], n_holdout: int, n_samples: int
) -> None:
    """The interval of a difference of none, by the metric itself, and what the policy says."""
    chosen = config(policy={}, sample__count=n_samples)
    (rule,) = [r for r in chosen.policy.rules if r.estimate == "region_volume_smd"]
    rng = np.random.default_rng(0)
    volumes = [rng.standard_normal(n) for n in (n_holdout, n_samples)]
    real, made = ((v - v.mean()) / v.std(ddof=1) for v in volumes)
    value, (_, high) = smd(made, real)
    assert value == pytest.approx(0, abs=1e-9)
    foreseen = "region_volume_smd" in plan.cannot_pass(chosen, 400, n_holdout, LABELS)
    assert foreseen == (high > (rule.at_most or 0))


def test_a_rule_on_one_subgroup_is_met_by_its_people(config: Callable[..., Config]) -> None:
    rules = [
        {"estimate": "auc_tstr_minus_trtr", "slice": f"sex={s}", "bound": "lower", "at_least": -0.1}
        for s in "FM"
    ]
    rules += [
        {"estimate": "copied_patients", "slice": f"sex={s}", "bound": "upper", "at_most": 0.05}
        for s in "FM"
    ]
    chosen = config(policy={"rules": rules}, data__holdout=0.4, sample__count=72)
    # of 100 men 40 are held out, and of 60 to train on nobody copied leaves 5.96 % in doubt
    labels = {"diagnosis": {"control": 150, "atrophy": 150}, "sex": {"F": 200, "M": 100}, "age": {}}
    told = ["auc_tstr_minus_trtr [sex=M]", "copied_patients [sex=M]"]
    assert plan.cannot_pass(chosen, 180, 120, labels) == told
    few = {**labels, "sex": {"F": 276, "M": 24}}  # ten held out, and fourteen to train on
    assert plan.cannot_pass(chosen, 180, 120, few) == told
    assert plan.cannot_pass(chosen, 180, 120, {**labels, "sex": {"F": 150, "M": 150}}) == []


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
        finish_scans=None,
        finish_bytes=0,
        draw_bytes=0,
        reads_nobody=False,
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
    assert asked == [Request(18, 6, 4, 1, False, 6, True, "cpu", torch.get_num_threads())]
    assert facts["steps"] == 240
    assert facts["train_seconds"] == pytest.approx(AROUND + 240 * 0.5, abs=0.06)
    # 18 samples: one whole batch of 16 and one that is padded
    assert facts["sample_seconds"] == pytest.approx(2 + 1.5)
    assert facts["memory_gib"] == 1
    # 16^3 voxels of 2 bytes, prepared and ingested and sampled
    assert facts["disk_gib"] == pytest.approx(16**3 * 2 * (2 * 26 + 2 * 18) / 2**30, abs=1e-3)


def test_a_fit_that_reads_a_few_scans_costs_these(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, finish_scans=4)
    facts = plan.cost(config(train__watch=False), 18, 6, 26, "cpu")
    assert facts["train_seconds"] == pytest.approx(3 + 5 + 0.1 * 4 + 240 * 0.5, abs=0.06)


def test_a_fit_of_the_whole_cohort_is_in_the_memory(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4,000 scans three quarters are trained on; the trial held far fewer."""
    measured(monkeypatch, finish_bytes=2**20)
    assert plan.cost(config(), 18, 6, 26, "cpu")["memory_gib"] == 1, "what the trial took"
    facts = plan.cost(config(), 18, 6, 4096, "cpu")
    assert facts["memory_gib"] == 3 + 0.25


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
    # a phase that reads nobody draws what is asked for; the loader cuts the batch of the others
    assert (asked[0].n_patients, asked[0].batch_patients) == (18, 64)


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
