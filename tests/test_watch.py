"""The watch on memorising: planted memorisers are named, honest models are not, nothing changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synthmed import configfile
from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.conditions import Conditions
from synthmed.config import Config
from synthmed.errors import Interrupted
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.progress import Progress
from synthmed.stages import train as stage
from synthmed.training import LOG, Training
from synthmed.watch import COST, FORWARD, LOOKS, Watch, look_steps, looks, warnings


def cohort(n: int, rank: int) -> Dataset:
    """n patients, a third held out; what they have in common has `rank` dimensions."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((rank, 1, 8, 8, 8))
    place = rng.standard_normal((n, rank)) / math.sqrt(rank)
    x = 0.5 + 0.1 * np.tensordot(place, basis, 1) + 0.02 * rng.standard_normal((n, 1, 8, 8, 8))
    return Dataset(
        volumes=x.astype(np.float16),
        patients=np.array([f"p{i:03d}" for i in range(n)]),
        labels=[{}] * n,
        holdout=np.arange(n) % 3 == 0,
        channels=[ChannelInfo("T1w")],
        affine=np.eye(4),
    )


def config(steps: int, **train: Any) -> Config:
    tree = {
        "data": {"source": "x", "grid": [8, 8, 8]},
        "backbone": {"name": "cvae", "latent": 16, "widths": [8, 16]},
        "privacy": None,
        "train": {
            "max_steps": steps,
            "batch_patients": 8,
            "precision": "fp32",
            "optimizer": {"learning_rate": 5e-3},
            **train,
        },
    }
    return configfile.validate(tree, "test")


class Heard(Progress):
    """Keeps what was warned of, and may stop the training."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__("train", quiet=True)
        self.stop_at, self.heard = stop_at, list[str]()

    def warn(self, text: str) -> None:
        self.heard.append(text)

    def update(self, done: int, total: int, note: str = "") -> None:
        if done == self.stop_at:
            import signal

            signal.raise_signal(signal.SIGTERM)


def run(
    conf: Config, data: Dataset, folder: Path, stop_at: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    for name in ("partial", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    heard = Heard(stop_at)
    loader = Loader(data, Conditions({}), conf.train.batch_patients, conf.train.augment)
    facts = stage.train(conf, loader, folder / "partial", folder / "target", heard, "cpu")
    return facts, heard.heard


def by_heart(texts: list[str]) -> list[str]:
    return [t for t in texts if "by heart" in t]


def test_a_model_that_learns_its_patients_by_heart_is_named(tmp_path: Path) -> None:
    """24 patients who share nothing, and a decoder with a map a latent dimension."""
    facts, heard = run(config(300), cohort(36, 36), tmp_path)
    assert len(by_heart(heard)) == 1, "once"
    assert len(by_heart(facts["remarks"])) == 1
    assert "train.augment" in by_heart(heard)[0]
    seen = looks(tmp_path / "target" / LOG)
    assert seen[-1]["step"] == 299
    assert seen[-1]["watched_pairs"] == 12


def test_a_model_of_plentiful_data_is_not(tmp_path: Path) -> None:
    """200 patients to train on, who differ along two dimensions."""
    facts, heard = run(config(300), cohort(300, 2), tmp_path)
    assert not by_heart(heard)
    assert not by_heart(facts["remarks"])
    assert looks(tmp_path / "target" / LOG), "it was looked"
    assert not [x for x in facts["remarks"] if "nothing was watched" in x]


def test_watching_changes_no_weight_and_can_be_switched_off(tmp_path: Path) -> None:
    data = cohort(60, 5)
    run(config(60), data, tmp_path / "on")
    run(config(60, watch=False), data, tmp_path / "off")
    assert looks(tmp_path / "on/target" / LOG)
    assert not looks(tmp_path / "off/target" / LOG)
    files = [tmp_path / n / "target/weights.safetensors" for n in ("on", "off")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_held_out_patients_change_no_weight(tmp_path: Path) -> None:
    """The same training patients with other held-out ones: the same weights, another log."""
    data = cohort(60, 5)
    other = np.array(data.volumes)
    other[data.holdout] = 1
    run(config(60), data, tmp_path / "a")
    run(config(60), Dataset(**{**data.__dict__, "volumes": other}), tmp_path / "b")
    files = [tmp_path / n / "target/weights.safetensors" for n in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    logs = [(tmp_path / n / "target" / LOG).read_bytes() for n in ("a", "b")]
    assert logs[0] != logs[1], "the other ones were seen"


@pytest.mark.parametrize("at", [29, 30, 31])
def test_the_log_survives_a_kill(at: int, tmp_path: Path) -> None:
    data = cohort(60, 5)
    run(config(60), data, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config(60), data, tmp_path / "parts", stop_at=at)
    run(config(60), data, tmp_path / "parts")
    logs = [(tmp_path / n / "target" / LOG).read_bytes() for n in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_a_look_is_at_the_averaged_weights_with_the_same_draws_for_a_pair() -> None:
    data, conf = cohort(60, 5), config(10)
    # each pair is one patient twice: whatever the model, nothing tells them apart
    twin = np.array(data.volumes)
    held, trained = np.flatnonzero(data.holdout), np.flatnonzero(~data.holdout)
    source = Loader(data, Conditions({}), 8, conf.train.augment)
    rows = source.watched("train")[: len(held)]
    twin[held[: len(rows)]] = data.volumes[rows]
    assert set(rows) <= set(trained)
    source = Loader(
        Dataset(**{**data.__dict__, "volumes": twin}), Conditions({}), 8, conf.train.augment
    )
    model = stage.build(conf, source, Key.root(0), "cpu")
    state = Training(model, [10])
    seen = Watch(source, Key.root(0), "cpu", amp=False).look(state)
    assert seen["vae.gap"] == pytest.approx(0, abs=1e-5)
    assert seen["vae.gap_sd"] == pytest.approx(0, abs=1e-5)
    for p in state.params.values():
        p.data.add_(1)
    again = Watch(source, Key.root(0), "cpu", amp=False).look(state)
    assert again == seen, "the averages have not moved"


def test_too_few_patients_are_not_watched() -> None:
    conf = config(1000)
    source = Loader(cohort(12, 2), Conditions({}), 8, conf.train.augment)
    state = Training(stage.build(conf, source, Key.root(0), "cpu"), [1000])
    state.step = 999
    assert not Watch(source, Key.root(0), "cpu", amp=False).due(state)


@pytest.mark.parametrize(
    ("patients", "why"), [(60, "more than 4 % of its time"), (12, "and there are 8 and 4")]
)
def test_a_training_that_was_not_watched_says_so(patients: int, why: str, tmp_path: Path) -> None:
    """Nobody shall take silence for a model that was looked at."""
    data = cohort(patients, 5)
    facts, _ = run(config(10), data, tmp_path / "on")
    (said,) = [x for x in facts["remarks"] if "nothing was watched" in x]
    assert "the loss vae" in said and why in said
    assert json.loads((tmp_path / "on/target/examination/remarks.json").read_text()) == [
        *facts["remarks"]
    ]
    facts, _ = run(config(10, watch=False), data, tmp_path / "off")
    assert not [x for x in facts["remarks"] if "nothing was watched" in x]


@given(st.integers(1, 100_000), st.integers(2, 64), st.integers(10, 64))
def test_looks_are_spread_end_with_the_round_and_cost_little(
    steps: int, batch: int, watched: int
) -> None:
    at = sorted(look_steps(steps, batch, watched))
    assert len(at) <= LOOKS
    assert len(at) * watched * FORWARD <= COST * steps * batch
    if at:
        assert at[-1] == steps - 1
        assert at[0] >= 0
        gaps = np.diff([-1, *at])
        assert gaps.max() - gaps.min() <= 1


def line(gap: float, sd: float, n: int = 32, phase: str = "p") -> dict[str, float]:
    return {
        f"{phase}.train": 1.0, f"{phase}.holdout": 1 + gap,
        f"{phase}.gap": gap, f"{phase}.gap_sd": sd, "watched_pairs": n,
    }  # fmt: skip


def test_a_warning_needs_a_gap_that_is_wide_certain_and_grown() -> None:
    assert list(warnings([line(0.1, 1), line(1.1, 1)])) == ["p"]
    assert not warnings([])
    assert list(warnings([line(1.1, 1)])) == ["p"], "grown from an untrained model's 0"
    assert not warnings([line(1.2, 1), line(1.1, 1)]), "not grown"
    assert not warnings([line(0.1, 1), line(0.9, 1)]), "not wide"
    assert not warnings([line(0.1, 1, 5), line(1.3, 1, 5)]), "not certain: 2.9 standard errors"
    assert "86 %" in warnings([line(0.1, 1), line(1.1, 1)])["p"], "Phi(1.1)"
    both = [line(0, 1) | line(0, 1, phase="q"), line(2, 1) | line(0.5, 1, phase="q")]
    assert list(warnings(both)) == ["p"]


def test_looks_do_not_touch_global_randomness() -> None:
    conf = config(10)
    source = Loader(cohort(60, 5), Conditions({}), 8, conf.train.augment)
    state = Training(stage.build(conf, source, Key.root(0), "cpu"), [10])
    before = torch.random.get_rng_state()
    Watch(source, Key.root(0), "cpu", amp=False).look(state)
    assert torch.equal(torch.random.get_rng_state(), before)
