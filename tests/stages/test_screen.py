"""The screen finds planted copies, drops them once, and replaces them with their labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from synthmed import configfile
from synthmed.artifacts import ChannelInfo, Cohort, Dataset, Sample, ScreenedCohort
from synthmed.config import Config
from synthmed.formats import synthetic
from synthmed.progress import Progress
from synthmed.stages import screen as stage
from synthmed.stages.sample import write_samples

QUIET = Progress("screen", quiet=True)
GRID = (12, 12, 12)
CHANNELS = [ChannelInfo("T1w")]
N_TRAIN, N_HOLDOUT, N_SAMPLES, N_COPIES = 50, 50, 30, 3


def people(n: int, seed: int) -> np.ndarray:
    """Smooth random volumes on a common anatomy: (n, 1, X, Y, Z)."""
    rng = np.random.default_rng(seed)
    index = np.indices(GRID) - 5.5
    head = np.exp(-(index**2).sum(0) / 40)
    noise = np.stack([gaussian_filter(rng.standard_normal(GRID), 1.5) for _ in range(n)])
    scans = np.clip(0.3 * head + 1.5 * noise * head + 0.2, 0, 1.2)[:, None]
    return np.asarray(scans, np.float16)


def dataset() -> Dataset:
    n = N_TRAIN + N_HOLDOUT
    return Dataset(
        volumes=people(n, 1),
        patients=np.array([f"p{i:016x}" for i in range(n)]),
        labels=[{"dx": "A"}] * n,
        holdout=np.arange(n) >= N_TRAIN,
        channels=CHANNELS,
        affine=np.eye(4),
    )


class Replacing:
    """Draws fresh people for the indices it is asked for, and remembers with which labels.

    Args:
        copied: what it draws for some of them instead, (1, X, Y, Z).
    """

    def __init__(self, copied: Mapping[int, np.ndarray] | None = None) -> None:
        self.copied = copied or {}
        self.asked: dict[int, Mapping[str, str | float]] = {}
        self.replaced: dict[int, int] = {}

    def labels_of(self, k: int) -> Mapping[str, str | float]:
        return {"dx": "AB"[self.replaced.get(k, k) % 2]}

    def stand_in(self, replaced: Mapping[int, int]) -> None:
        self.replaced = dict(replaced)

    def write(self, indices: list[int], target: Path, done: Any) -> list[Sample]:
        out = []
        for k in indices:
            files = {"T1w": f"syn-{k:06d}_T1w.nii.gz"}
            drawn = self.copied.get(k, people(1, 1000 + k)[0])
            synthetic.write(target, files, drawn.astype(np.float32), CHANNELS, np.eye(4))
            self.asked[k] = self.labels_of(k)
            out.append(Sample(index=k, labels=dict(self.labels_of(k)), files=files))
        return out


def config(**screen: Any) -> Config:
    tree = {
        "data": {
            "source": "x", "grid": GRID,
            "conditions": {"dx": {"kind": "categorical", "categories": ["A", "B"]}},
        },
        "backbone": {"name": "cvae"},
        "privacy": None,
        "train": {"max_steps": 1},
        "screen": screen,
    }  # fmt: skip
    return configfile.validate(tree, "test")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Thirty samples, of which 4, 11 and 29 are training patients with a little noise."""
    folder = tmp_path_factory.mktemp("cohort")
    volumes = people(N_SAMPLES, 2).astype(np.float32)
    rng = np.random.default_rng(5)
    for k, patient in PLANTED.items():
        volumes[k] = dataset().volumes[patient] + rng.normal(0, 0.01, (1, *GRID))
    samples = []
    for k, volume in enumerate(np.clip(volumes, 0, 1.25)):
        files = {"T1w": f"syn-{k:06d}_T1w.nii.gz"}
        synthetic.write(folder, files, volume, CHANNELS, np.eye(4))
        samples.append(Sample(index=k, labels={"dx": "AB"[k % 2]}, files=files))
    write_samples(folder / "samples.jsonl", samples)
    return Cohort.open(folder)


PLANTED = {4: 7, 11: 8, 29: 7}
"""Sample to the training patient that it copies."""


def screened(
    cohort: Cohort, folder: Path, sampler: Any, **settings: Any
) -> tuple[dict[str, Any], ScreenedCohort]:
    folder.mkdir()
    facts = stage.screen(config(**settings), dataset(), cohort, sampler, folder, QUIET)
    return facts, ScreenedCohort.open(cohort, folder)


def test_planted_copies_are_dropped_and_replaced(cohort: Cohort, tmp_path: Path) -> None:
    source = Replacing()
    facts, shipped = screened(cohort, tmp_path / "s", source)
    assert facts == {
        "n_samples": 30, "n_flagged": 3, "n_dropped": 3, "n_flagged_again": 0,
        "n_patients_copied": 2, "n_under_two_names": 0,
    }  # fmt: skip
    assert json.loads((tmp_path / "s/dropped.json").read_text()) == sorted(PLANTED)
    indices = [s.index for s in shipped.samples]
    assert len(indices) == 30, "as many as were asked for"
    assert not set(indices) & set(PLANTED)
    # the stream goes on behind the cohort, with the labels of those it replaces
    assert indices[-3:] == [30, 31, 32]
    assert source.replaced == {30: 4, 31: 11, 32: 29}
    assert [source.asked[k]["dx"] for k in (30, 31, 32)] == ["A", "B", "B"]
    for sample, folder in zip(shipped.samples, shipped.folders, strict=True):
        assert folder == (tmp_path / "s" if sample.index >= 30 else cohort.path)
        assert (folder / sample.files["T1w"]).is_file()
    patients = dataset().patients
    for k, patient in PLANTED.items():
        assert shipped.screened[k].flagged
        assert shipped.screened[k].nearest == patients[patient]
    assert stage.summary(facts) == (
        "3 of 30 samples copy a patient (2 patients); 3 dropped and replaced"
    )
    assert shipped.replaced is not None
    assert [(s.index, s.flagged) for s in shipped.replaced] == [(k, False) for k in (30, 31, 32)]


def test_a_replacement_that_is_a_copy_is_seen(cohort: Cohort, tmp_path: Path) -> None:
    """Softened, so that the descriptor that looks at all that ships does not know it."""
    softened = gaussian_filter(dataset().volumes[20].astype(np.float32), (0, 0.4, 0.4, 0.4))
    facts, shipped = screened(cohort, tmp_path / "s", Replacing({31: softened}))
    assert (facts["n_dropped"], facts["n_flagged_again"]) == (3, 1)
    assert shipped.replaced is not None
    assert [s.index for s in shipped.replaced if s.flagged] == [31]
    assert 31 in [s.index for s in shipped.samples], "the screen filters once"
    assert stage.summary(facts).endswith("3 dropped and replaced, of which 1 copies one again")


def test_replacements_that_nobody_screened_are_told(cohort: Cohort, tmp_path: Path) -> None:
    screened(cohort, tmp_path / "s", Replacing())
    (tmp_path / "s" / "copies-replaced.json").unlink()
    assert ScreenedCohort.open(cohort, tmp_path / "s").replaced is None
    screened(cohort, tmp_path / "n", None)
    assert ScreenedCohort.open(cohort, tmp_path / "n").replaced == ()


def test_a_held_out_look_alike_is_no_copy(tmp_path: Path) -> None:
    """The control: nobody learnt from these, however alike a sample is to one of them."""
    folder = tmp_path / "cohort"
    folder.mkdir()
    volumes = people(N_SAMPLES, 2).astype(np.float32)
    for k, patient in PLANTED.items():
        volumes[k] = dataset().volumes[N_TRAIN + patient]
    samples = []
    for k, volume in enumerate(np.clip(volumes, 0, 1.25)):
        files = {"T1w": f"syn-{k:06d}_T1w.nii.gz"}
        synthetic.write(folder, files, volume, CHANNELS, np.eye(4))
        samples.append(Sample(index=k, labels={"dx": "A"}, files=files))
    facts, shipped = screened(Cohort(folder, samples), tmp_path / "s", Replacing())
    assert (facts["n_flagged"], facts["n_dropped"]) == (0, 0)
    assert [s.index for s in shipped.samples] == list(range(30))
    assert stage.summary(facts) == "none of 30 samples copies a patient"


def test_without_filter_or_sampler_copies_are_told_and_stay(cohort: Cohort, tmp_path: Path) -> None:
    for name, sampler, settings in (("f", Replacing(), {"filter": False}), ("n", None, {})):
        facts, shipped = screened(cohort, tmp_path / name, sampler, **settings)
        assert (facts["n_flagged"], facts["n_dropped"]) == (3, 0)
        assert [s.index for s in shipped.samples] == list(range(30))
        assert sum(s.flagged for s in shipped.screened) == 3


def test_patients_who_may_be_one_person_are_counted_on_the_line() -> None:
    facts = {"n_samples": 30, "n_flagged": 0, "n_dropped": 0, "n_patients_copied": 0}
    assert stage.summary(facts) == "none of 30 samples copies a patient", "an earlier version's"
    one, two = (stage.summary({**facts, "n_under_two_names": n}) for n in (1, 2))
    assert one.endswith("copies a patient; 1 pair of patients may be one person")
    assert two.endswith("copies a patient; 2 pairs of patients may be one person")


def test_the_verdicts_are_read_back_whole(cohort: Cohort, tmp_path: Path) -> None:
    screened(cohort, tmp_path / "s", None)
    copies = stage.read_copies(tmp_path / "s")
    assert list(copies.flagged) == sorted(PLANTED)
    assert len(copies.matches) == N_SAMPLES
    screened(cohort, tmp_path / "again", None)
    first, second = ((tmp_path / n / "copies.json").read_bytes() for n in ("s", "again"))
    assert first == second
