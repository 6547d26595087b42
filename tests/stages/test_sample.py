"""Sample k is a function of (model, seed, k) alone, and labels are those that were asked for."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished
from scipy.stats import chisquare

from synthmed import configfile
from synthmed.artifacts import Cohort
from synthmed.config import Config
from synthmed.errors import UsageError
from synthmed.formats import nifti
from synthmed.progress import Progress
from synthmed.stages import sample as stage
from synthmed.stages.prepare import CLIP
from synthmed.stages.sample import Sampler, planned_labels, sample_count, sample_seed

QUIET = Progress("sample", quiet=True)


def sampler(finished: Finished, **values: Any) -> Sampler:
    config = configfile.load(
        finished.config, (), {k.replace("__", "."): v for k, v in values.items()}
    )
    model = finished.path / "private/model"
    return Sampler(config, model, "cpu", planned_labels(config, []))


def drawn(source: Sampler, folder: Path, indices: Sequence[int]) -> dict[int, bytes]:
    """The bytes of samples, by index."""
    folder.mkdir(exist_ok=True)
    samples = source.write(indices, folder, lambda n: None)
    assert [s.index for s in samples] == list(indices)
    return {s.index: (folder / s.files["T1w"]).read_bytes() for s in samples}


def test_a_sample_does_not_depend_on_how_many_or_which_are_drawn(
    finished: Finished, tmp_path: Path
) -> None:
    source = sampler(finished)
    assert source.batch == 16, "so that the counts below end within a batch"
    many = drawn(source, tmp_path / "many", range(40))
    assert len(set(many.values())) == 40
    few = drawn(sampler(finished), tmp_path / "few", range(5))
    assert few == {k: many[k] for k in range(5)}
    shards = tmp_path / "shards"
    parts = drawn(sampler(finished), shards, [33]) | drawn(sampler(finished), shards, [3, 17, 39])
    assert parts == {k: many[k] for k in (33, 3, 17, 39)}
    ran = {p.name: p.read_bytes() for p in (finished.path / "private/sample").glob("*.nii.gz")}
    assert ran == {f"syn-{k:06d}_T1w.nii.gz": many[k] for k in range(18)}


def test_samples_of_one_condition_differ(finished: Finished, tmp_path: Path) -> None:
    """Otherwise the labels alone would tell two samples apart."""
    source = sampler(finished)
    source.labels_of = lambda k: {"diagnosis": "control", "sex": "F", "age": 60.0}
    assert len(set(drawn(source, tmp_path / "x", range(20)).values())) == 20


def test_another_seed_or_label_is_another_sample(finished: Finished, tmp_path: Path) -> None:
    base = drawn(sampler(finished), tmp_path / "a", range(2))
    seeded = drawn(sampler(finished, sample__seed=9), tmp_path / "b", range(2))
    assert all(base[k] != seeded[k] for k in base)
    # label counts change the condition of the first samples, and no other sample
    first = sampler(finished).labels_of(0)["sex"]
    other = {"sex": {"F" if first == "M" else "M": 1}}
    labelled = drawn(sampler(finished, sample__labels=other), tmp_path / "c", range(2))
    assert labelled[0] != base[0]
    assert labelled[1] == base[1]


def test_a_resumed_stage_ends_in_the_same_bytes(finished: Finished, tmp_path: Path) -> None:
    config = configfile.load(finished.config)
    cohorts = []
    for name in ("whole", "resumed"):
        partial, target = tmp_path / f"{name}.partial", tmp_path / name
        partial.mkdir()
        target.mkdir()
        if name == "resumed":
            drawn(sampler(finished), partial, [2, 3, 17])
            (partial / ".syn-000004_T1w.nii.gz").write_bytes(b"cut off")
        facts = stage.sample(config, sampler(finished), partial, target, QUIET)
        assert facts == {"n_samples": 18, "seed": 0}
        assert len(Cohort.open(target).samples) == 18
        cohorts.append({p.name: p.read_bytes() for p in sorted(target.iterdir())})
    assert cohorts[0] == cohorts[1]
    assert len(cohorts[0]) == 19


def test_what_is_there_is_not_drawn_again(finished: Finished, tmp_path: Path) -> None:
    source = sampler(finished)
    before = drawn(source, tmp_path / "x", range(16))

    def never(number: int) -> Any:
        raise AssertionError(f"batch {number} was drawn again")

    source.canonical_batch = never  # type: ignore[method-assign]
    assert drawn(source, tmp_path / "x", range(16)) == before


def test_volumes_stay_in_the_prepared_range(finished: Finished) -> None:
    for file in sorted((finished.path / "private/sample").glob("*.nii.gz")):
        image = nifti.read(file)
        assert image.data.min() >= 0
        assert image.data.max() <= round(CLIP * 1000)
        assert image.data.max() > image.data.min()
        np.testing.assert_allclose(image.spacing_mm, 12)


# --- labels --------------------------------------------------------------------------------------


@pytest.fixture
def config(make_config: Callable[..., Path]) -> Callable[..., Config]:
    def make(**values: Any) -> Config:
        return configfile.load(make_config(), (), {f"sample.{k}": v for k, v in values.items()})

    return make


def test_labels_are_uniform_over_what_is_declared(config: Callable[..., Config]) -> None:
    labels_of = planned_labels(config(), [])
    drawn = [labels_of(k) for k in range(800)]
    cells = Counter((x["diagnosis"], x["sex"]) for x in drawn)
    assert len(cells) == 4
    assert chisquare(list(cells.values())).pvalue > 0.001
    ages = np.array([x["age"] for x in drawn], float)
    assert ages.min() >= 40
    assert ages.max() <= 100
    assert chisquare(np.histogram(ages, 6, (40, 100))[0]).pvalue > 0.001
    assert [labels_of(k) for k in reversed(range(9))] == drawn[8::-1]


def test_counts_are_exact_and_leave_the_rest_alone(config: Callable[..., Config]) -> None:
    plain = planned_labels(config(), [])
    asked = planned_labels(config(labels={"sex": {"M": 5, "F": 2}}), [])
    got = [asked(k)["sex"] for k in range(7)]
    assert got == ["M"] * 5 + ["F"] * 2
    for k in range(12):
        assert asked(k)["diagnosis"] == plain(k)["diagnosis"]
        assert asked(k)["age"] == plain(k)["age"]
    assert [asked(k) for k in range(7, 12)] == [plain(k) for k in range(7, 12)]


def test_the_count_follows_what_is_asked(config: Callable[..., Config]) -> None:
    assert sample_count(config(count=None)) == 100
    assert sample_count(config(count=None, labels={"sex": {"F": 3, "M": 4}})) == 7
    assert sample_count(config(count=9, labels={"sex": {"F": 3}})) == 9
    assert sample_seed(config(seed=None)) == 0
    assert sample_seed(config(seed=4)) == 4


def person(diagnosis: str, sex: str, age: float) -> Mapping[str, str | float]:
    return {"diagnosis": diagnosis, "sex": sex, "age": age}


def test_the_cohorts_own_joint_has_no_rare_cell(config: Callable[..., Config]) -> None:
    """Four men with atrophy would be singled out: they count for the commonest combination."""
    people = (
        [person("control", "F", 61.3)] * 9
        + [person("control", "M", 72.4)] * 5
        + [person("atrophy", "M", 88.8)] * 4
    )
    labels_of = planned_labels(config(prior="cohort"), people)
    drawn = [labels_of(k) for k in range(600)]
    cells = Counter((x["diagnosis"], x["sex"]) for x in drawn)
    assert set(cells) == {("control", "F"), ("control", "M")}
    assert cells["control", "F"] / 600 == pytest.approx(13 / 18, abs=0.07)
    # a twentieth of 40 to 100 is three years, counted from 40
    assert {x["age"] for x in drawn} == {61.0, 73.0, 88.0}


def test_numbers_are_rounded_by_their_own_range(config: Callable[..., Config]) -> None:
    """A lesion load of 0 to 0.4 in steps of five would be 0 for everybody."""
    conditions = {"load": {"kind": "continuous", "low": 0, "high": 0.4}}
    chosen = config(prior="cohort").model_copy(
        update={"data": configfile.validate({
            **config().model_dump(mode="json"),
            "data": {**config().data.model_dump(mode="json"), "conditions": conditions},
        }, "test").data}
    )  # fmt: skip
    labels_of = planned_labels(chosen, [{"load": x} for x in (0.011, 0.0131, 0.2, 0.389, 0.4)])
    assert {labels_of(k)["load"] for k in range(99)} == {0.02, 0.2, 0.38, 0.4}


def test_a_person_with_a_label_missing_is_left_out_of_the_joint(
    config: Callable[..., Config],
) -> None:
    """And what is drawn is complete."""
    people = [person("control", "F", 60)] * 5 + [{"diagnosis": "atrophy"}] * 9
    labels_of = planned_labels(config(prior="cohort"), people)
    assert {tuple(labels_of(k)) for k in range(50)} == {("diagnosis", "sex", "age")}
    assert {labels_of(k)["diagnosis"] for k in range(50)} == {"control"}
    with pytest.raises(UsageError, match="no combination of labels is shared by five"):
        planned_labels(config(prior="cohort"), people[5:])


def test_rounding_stays_in_the_declared_range(config: Callable[..., Config]) -> None:
    labels_of = planned_labels(config(prior="cohort"), [person("control", "F", 99.9)] * 6)
    assert labels_of(0)["age"] == 100
    strict = config(prior="cohort").model_copy(
        update={"data": configfile.validate({
            **config().model_dump(mode="json"),
            "data": {
                **config().data.model_dump(mode="json"),
                "conditions": {"age": {"kind": "continuous", "low": 41, "high": 98}},
            },
        }, "test").data}
    )  # fmt: skip
    ages = {planned_labels(strict, [{"age": a}] * 5)(0)["age"] for a in (41.0, 98.0)}
    assert ages == {41.0, 98.0}


def test_one_person_is_one_vote_however_often_scanned(
    copied: Finished, synthmed: Callable[..., Any]
) -> None:
    """A rare combination of a person with two scans stays rare: the pool is of people."""
    from synthmed.artifacts import Dataset
    from synthmed.pipeline import Line
    from synthmed.store import Run

    config = configfile.load(copied.config, (), {"sample.prior": "cohort"})
    run = Run(copied.path)
    data = Dataset.open(run.folder("dataset"))
    train = data.train_patients()
    # one training patient alone has atrophy, with five scans
    rows = np.array([0] * 5 + list(range(1, 12)))
    patients = np.array([train[0] if r == 0 else train[r] for r in rows])
    shaped = Dataset(
        volumes=data.volumes[: len(rows)],
        patients=patients,
        labels=[person("atrophy" if r == 0 else "control", "F", 60) for r in rows],
        holdout=np.zeros(len(rows), bool),
        channels=data.channels,
        affine=data.affine,
    )
    source = Line(run, config).sampler(run.require("model"), shaped)
    assert {source.labels_of(k)["diagnosis"] for k in range(200)} == {"control"}
    shutil.rmtree(copied.path)
